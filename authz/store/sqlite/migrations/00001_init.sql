-- Times are microseconds since 1970, UTC; the zero time is the year 1 (-62135596800000000), so that no
-- real instant can be taken for "never". Ids and digests are BLOBs of 16 and 32 bytes.

-- +goose Up

CREATE TABLE meta (
    one       INTEGER PRIMARY KEY CHECK (one = 1), -- a table of one row
    revision  INTEGER NOT NULL,                    -- the newest
    forgotten INTEGER NOT NULL                     -- changes up to this revision are not all known any more
) STRICT;
INSERT INTO meta VALUES (1, 0, 0);

CREATE TABLE instances (
    id         TEXT    NOT NULL PRIMARY KEY,
    policy     TEXT    NOT NULL, -- JSON
    created_at INTEGER NOT NULL,
    revision   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE keys (
    id                  BLOB    NOT NULL PRIMARY KEY,
    instance_id         TEXT    NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
    type                TEXT    NOT NULL,
    name                TEXT    NOT NULL,
    description         TEXT    NOT NULL,
    agent_name          TEXT    NOT NULL,
    user_principal_name TEXT    NOT NULL,
    environment         TEXT    NOT NULL,
    scopes              TEXT    NOT NULL, -- JSON; null: every right
    allowed_ips         TEXT    NOT NULL, -- JSON
    limits              TEXT    NOT NULL, -- JSON
    expires_at          INTEGER NOT NULL,
    inactivity_days     INTEGER NOT NULL,
    not_before          INTEGER NOT NULL,
    metadata            TEXT    NOT NULL, -- JSON
    disabled            INTEGER NOT NULL,
    revoked_at          INTEGER NOT NULL,
    revoked_reason      TEXT    NOT NULL,
    created_at          INTEGER NOT NULL,
    created_by          TEXT    NOT NULL,
    last_used_at        INTEGER NOT NULL
) STRICT;
CREATE INDEX keys_newest ON keys (instance_id, created_at, id);
CREATE INDEX keys_usable ON keys (instance_id, revoked_at, expires_at);

CREATE TABLE generations (
    key_id       BLOB    NOT NULL REFERENCES keys (id) ON DELETE CASCADE,
    number       INTEGER NOT NULL,
    hint         TEXT    NOT NULL,
    created_at   INTEGER NOT NULL,
    valid_until  INTEGER NOT NULL,
    last_used_at INTEGER NOT NULL,
    PRIMARY KEY (key_id, number)
) STRICT, WITHOUT ROWID;

-- A generation has a digest for each pepper version under which it may be found: one, and while a pepper
-- rotation lasts, two. They are rows, not columns, so that no digest can find two things.
CREATE TABLE key_digests (
    digest         BLOB    NOT NULL PRIMARY KEY,
    key_id         BLOB    NOT NULL,
    generation     INTEGER NOT NULL,
    pepper_version INTEGER NOT NULL,
    UNIQUE (key_id, generation, pepper_version),
    FOREIGN KEY (key_id, generation) REFERENCES generations (key_id, number) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

-- One row for each digest of each key that a revision touched; a key without digests, and an instance,
-- have one row. seq gives the order.
CREATE TABLE changes (
    seq         INTEGER PRIMARY KEY,
    revision    INTEGER NOT NULL,
    instance_id TEXT    NOT NULL,
    key_id      BLOB, -- NULL: the instance itself
    digest      BLOB
) STRICT;
CREATE INDEX changes_revision ON changes (revision);

CREATE TABLE tokens (
    id          BLOB    NOT NULL PRIMARY KEY,
    name        TEXT    NOT NULL,
    role        TEXT    NOT NULL,
    instance_id TEXT    NOT NULL, -- '': all
    hint        TEXT    NOT NULL,
    created_at  INTEGER NOT NULL,
    created_by  TEXT    NOT NULL,
    expires_at  INTEGER NOT NULL,
    revoked_at  INTEGER NOT NULL,
    bootstrap   INTEGER NOT NULL
) STRICT;

CREATE TABLE token_digests (
    digest         BLOB    NOT NULL PRIMARY KEY,
    token_id       BLOB    NOT NULL REFERENCES tokens (id) ON DELETE CASCADE,
    pepper_version INTEGER NOT NULL,
    UNIQUE (token_id, pepper_version)
) STRICT, WITHOUT ROWID;

CREATE TABLE peppers (
    version     INTEGER PRIMARY KEY,
    check_value BLOB NOT NULL
) STRICT;

CREATE TABLE marks (
    name TEXT NOT NULL PRIMARY KEY
) STRICT, WITHOUT ROWID;

CREATE TABLE audit (
    sequence     INTEGER PRIMARY KEY AUTOINCREMENT, -- a number is never given twice
    at           INTEGER NOT NULL,
    actor        TEXT    NOT NULL,
    remote_addr  TEXT    NOT NULL,
    action       TEXT    NOT NULL,
    instance_id  TEXT    NOT NULL,
    target       TEXT    NOT NULL,
    request_id   TEXT    NOT NULL,
    state_before TEXT, -- JSON; NULL: there was nothing
    state_after  TEXT
) STRICT;
