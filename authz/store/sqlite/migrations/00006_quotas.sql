-- Definitions of quotas are part of their instance, and what a key has instead is part of the key: each is
-- read in the same snapshot as the rest of its record.

-- +goose Up

ALTER TABLE instances ADD COLUMN quotas TEXT NOT NULL DEFAULT 'null'; -- JSON
ALTER TABLE keys ADD COLUMN quotas TEXT NOT NULL DEFAULT 'null'; -- JSON

-- What long quotas have counted, over a restart. counts are the limiter's own business.
CREATE TABLE quota_states (
    owner  BLOB    NOT NULL,
    class  INTEGER NOT NULL,
    until  INTEGER NOT NULL, -- says nothing more after that
    counts BLOB    NOT NULL,
    PRIMARY KEY (owner, class)
) STRICT, WITHOUT ROWID;
CREATE INDEX quota_states_until ON quota_states (until);
