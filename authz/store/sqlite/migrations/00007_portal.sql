-- +goose Up

-- What the portal filters lists by, in every order of a list; keys_by_status_and_use is there already.
CREATE INDEX keys_by_type_and_name ON keys (instance_id, type, name, id);
CREATE INDEX keys_by_type_and_use ON keys (instance_id, type, quiet_since, id);
CREATE INDEX keys_by_type_and_expiry ON keys (instance_id, type, expiry, id);
CREATE INDEX keys_by_type_and_idleness ON keys (instance_id, type, idle_after, id) WHERE inactivity_days > 0;
CREATE INDEX keys_by_status_and_name ON keys (instance_id, status, name, id);
CREATE INDEX keys_by_status_and_expiry ON keys (instance_id, status, expiry, id);
CREATE INDEX keys_by_status_and_idleness ON keys (instance_id, status, idle_after, id) WHERE inactivity_days > 0;

-- What there may be very much of is kept under a number of its instance: it is gone for every reader when the
-- instance is, although its rows are removed a few at a time later, and it is not there for an instance that is made
-- again under the same name.
CREATE TABLE instance_numbers (
    number      INTEGER NOT NULL PRIMARY KEY,
    instance_id TEXT -- NULL: it was deleted, and there may be rows left
) STRICT;
CREATE UNIQUE INDEX instance_numbers_of ON instance_numbers (instance_id);
INSERT INTO instance_numbers (number, instance_id) VALUES (0, ''); -- what belongs to no instance

-- Requests by key (a zero id: of the instance as a whole) and time. detail holds what is counted besides, as
-- JSON.
CREATE TABLE usage (
    instance    INTEGER NOT NULL, -- its number
    key_id      BLOB    NOT NULL,
    interval    INTEGER NOT NULL, -- seconds: 60, 3600 or 86400
    start       INTEGER NOT NULL,
    allowed     INTEGER NOT NULL,
    refused     INTEGER NOT NULL,
    detail      TEXT    NOT NULL,
    PRIMARY KEY (instance, key_id, interval, start)
) STRICT, WITHOUT ROWID;
CREATE INDEX usage_time ON usage (interval, start);
CREATE INDEX usage_top ON usage (instance, interval, start, allowed, refused);

-- The last batch of counts of each process that adds some: a batch whose outcome it did not hear of is added once.
CREATE TABLE usage_writers (
    writer BLOB    NOT NULL PRIMARY KEY,
    batch  INTEGER NOT NULL,
    at     INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

ALTER TABLE keys ADD COLUMN last_used_network TEXT NOT NULL DEFAULT '';
ALTER TABLE keys ADD COLUMN last_used_path TEXT NOT NULL DEFAULT '';

CREATE TABLE alerts (
    id          BLOB    NOT NULL PRIMARY KEY,
    instance    INTEGER NOT NULL, -- its number
    kind        TEXT    NOT NULL,
    key_id      BLOB    NOT NULL,
    subject     TEXT    NOT NULL,
    message     TEXT    NOT NULL,
    count       INTEGER NOT NULL,
    opened_at   INTEGER NOT NULL,
    seen_at     INTEGER NOT NULL,
    resolved_at INTEGER NOT NULL,
    acked_at    INTEGER NOT NULL,
    acked_by    TEXT    NOT NULL
) STRICT;
CREATE UNIQUE INDEX alerts_open ON alerts (instance, kind, key_id, subject) WHERE resolved_at = -62135596800000000;
CREATE INDEX alerts_newest ON alerts (instance, opened_at, id);
CREATE INDEX alerts_newest_of_all ON alerts (opened_at, id);
CREATE INDEX alerts_open_newest ON alerts (instance, opened_at, id) WHERE resolved_at = -62135596800000000;
CREATE INDEX alerts_open_newest_of_all ON alerts (opened_at, id) WHERE resolved_at = -62135596800000000;
CREATE INDEX alerts_of_key ON alerts (key_id, opened_at, id) WHERE key_id <> x'00000000000000000000000000000000';
CREATE INDEX alerts_resolved ON alerts (resolved_at) WHERE resolved_at <> -62135596800000000;

-- What the webhook has to be told of them.
CREATE TABLE notices (
    id      BLOB    NOT NULL PRIMARY KEY,
    type    TEXT    NOT NULL,
    body    TEXT    NOT NULL, -- JSON
    made_at INTEGER NOT NULL,
    tries   INTEGER NOT NULL,
    next_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX notices_next ON notices (next_at);
CREATE INDEX notices_made ON notices (made_at);

CREATE TABLE key_networks (
    key_id   BLOB    NOT NULL REFERENCES keys (id) ON DELETE CASCADE,
    network  TEXT    NOT NULL,
    first_at INTEGER NOT NULL,
    last_at  INTEGER NOT NULL,
    PRIMARY KEY (key_id, network)
) STRICT, WITHOUT ROWID;
CREATE INDEX key_networks_last ON key_networks (last_at);

CREATE TABLE sessions (
    id         BLOB    NOT NULL PRIMARY KEY,
    created_at INTEGER NOT NULL,
    seen_at    INTEGER NOT NULL,
    ends_at    INTEGER NOT NULL,
    idle_at    INTEGER NOT NULL,
    token      BLOB    NOT NULL,
    subject    TEXT    NOT NULL -- JSON
) STRICT, WITHOUT ROWID;
CREATE INDEX sessions_idle ON sessions (idle_at);
