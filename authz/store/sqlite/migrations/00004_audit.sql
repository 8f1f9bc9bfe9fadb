-- +goose Up

ALTER TABLE audit ADD COLUMN refused TEXT NOT NULL DEFAULT ''; -- why nothing was done; '': it was done
ALTER TABLE audit ADD COLUMN link BLOB; -- 32 bytes; NULL only until SealAudit has chained the events from before

-- What is asked for is found without reading the rest; the sequence is part of each, as the row's id.
CREATE INDEX audit_at ON audit (at);
CREATE INDEX audit_instance ON audit (instance_id, at);
CREATE INDEX audit_actor ON audit (actor, at);
CREATE INDEX audit_action ON audit (action, at);
CREATE INDEX audit_target ON audit (target, at);
CREATE INDEX audit_refused ON audit (at) WHERE refused <> '';

CREATE TABLE audit_segments (
    number         INTEGER PRIMARY KEY,
    first          INTEGER NOT NULL, -- sequence of its first event
    last           INTEGER NOT NULL,
    previous       BLOB    NOT NULL, -- link
    head           BLOB    NOT NULL, -- link
    began_at       INTEGER NOT NULL,
    sealed_at      INTEGER NOT NULL,
    removed_at     INTEGER NOT NULL,
    pepper_version INTEGER NOT NULL,
    mac            BLOB    NOT NULL
) STRICT;

ALTER TABLE tokens ADD COLUMN user_principal_name TEXT NOT NULL DEFAULT '';
ALTER TABLE tokens ADD COLUMN last_used_at INTEGER NOT NULL DEFAULT -62135596800000000;

-- By how much the revision is ahead of the number of mutations: a restored store leaps.
ALTER TABLE meta ADD COLUMN leapt INTEGER NOT NULL DEFAULT 0;

-- Sealed answers to requests with an Idempotency-Key. A backup is made without them: they are gone after
-- ten minutes, and a copy would keep them.
CREATE TABLE idempotency (
    id         BLOB    NOT NULL PRIMARY KEY,
    sealed     BLOB    NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_expires ON idempotency (expires_at);
