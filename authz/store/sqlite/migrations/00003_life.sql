-- The whole life of a key: revisions for If-Match, generations ended at once, marks of what has ended,
-- counts that are kept, and an index for every way to look for keys.

-- +goose Up

ALTER TABLE keys ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE keys ADD COLUMN leak_reported_at INTEGER NOT NULL DEFAULT -62135596800000000;
ALTER TABLE keys ADD COLUMN idle_from INTEGER NOT NULL DEFAULT -62135596800000000;
ALTER TABLE keys ADD COLUMN ended_at INTEGER NOT NULL DEFAULT -62135596800000000; -- when it was found to be over
UPDATE keys SET revision = (SELECT max(revision, 1) FROM meta);

ALTER TABLE generations ADD COLUMN revoked INTEGER NOT NULL DEFAULT 0;

-- What lists are filtered and ordered by. What never comes is the largest number.
ALTER TABLE keys ADD COLUMN status TEXT NOT NULL GENERATED ALWAYS AS (CASE
    WHEN revoked_at <> -62135596800000000 THEN 'revoked'
    WHEN disabled THEN 'disabled'
    WHEN ended_at <> -62135596800000000 THEN 'expired'
    ELSE 'active' END) VIRTUAL; -- expired only once that was marked
ALTER TABLE keys ADD COLUMN quiet_since INTEGER NOT NULL GENERATED ALWAYS AS (max(last_used_at, created_at, idle_from)) VIRTUAL;
ALTER TABLE keys ADD COLUMN expiry INTEGER NOT NULL GENERATED ALWAYS AS
    (CASE expires_at WHEN -62135596800000000 THEN 9223372036854775807 ELSE expires_at END) VIRTUAL;
ALTER TABLE keys ADD COLUMN idle_after INTEGER NOT NULL GENERATED ALWAYS AS (CASE inactivity_days
    WHEN 0 THEN 9223372036854775807
    ELSE max(last_used_at, created_at, idle_from) + inactivity_days * 86400000000 END) VIRTUAL;

DROP INDEX keys_usable; -- the counts below take its place
CREATE INDEX keys_by_type ON keys (instance_id, type, created_at, id);
CREATE INDEX keys_by_status ON keys (instance_id, status, created_at, id);
CREATE INDEX keys_by_creator ON keys (instance_id, created_by, created_at, id);
CREATE INDEX keys_by_user ON keys (instance_id, user_principal_name, created_at, id) WHERE user_principal_name <> '';
CREATE INDEX keys_by_agent ON keys (instance_id, agent_name, created_at, id) WHERE agent_name <> '';
CREATE INDEX keys_by_environment ON keys (instance_id, environment, created_at, id) WHERE environment <> '';
CREATE INDEX keys_never_used ON keys (instance_id, created_at, id) WHERE last_used_at = -62135596800000000;
CREATE INDEX keys_without_end ON keys (instance_id, created_at, id)
    WHERE expires_at = -62135596800000000 AND inactivity_days = 0;
CREATE INDEX keys_by_name ON keys (instance_id, name, id);
CREATE INDEX keys_by_use ON keys (instance_id, quiet_since, id);
CREATE INDEX keys_by_status_and_use ON keys (instance_id, status, quiet_since, id);
CREATE INDEX keys_by_expiry ON keys (instance_id, expiry, id);
CREATE INDEX keys_by_idleness ON keys (instance_id, idle_after, id) WHERE inactivity_days > 0;
CREATE INDEX keys_revoked ON keys (instance_id, revoked_at) WHERE revoked_at <> -62135596800000000;
-- What is over and not marked yet: few rows, if somebody marks.
CREATE INDEX keys_due_by_time ON keys (expires_at)
    WHERE revoked_at = -62135596800000000 AND ended_at = -62135596800000000 AND expires_at <> -62135596800000000;
CREATE INDEX keys_due_by_idleness ON keys (idle_after)
    WHERE revoked_at = -62135596800000000 AND ended_at = -62135596800000000 AND inactivity_days > 0;

-- How many keys an instance has (type and name ''), and each agent and user in it, users in lower case. Triggers keep the
-- counts, so no write can forget them.
CREATE TABLE key_counts (
    instance_id TEXT    NOT NULL,
    type        TEXT    NOT NULL,
    name        TEXT    NOT NULL,
    total       INTEGER NOT NULL,
    usable      INTEGER NOT NULL, -- neither revoked nor marked as ended
    disabled    INTEGER NOT NULL, -- of the usable ones
    revoked     INTEGER NOT NULL,
    PRIMARY KEY (instance_id, type, name)
) STRICT, WITHOUT ROWID;

INSERT INTO key_counts
    SELECT instance_id, '', '', count(*), count(*) FILTER (WHERE revoked_at = -62135596800000000),
        count(*) FILTER (WHERE revoked_at = -62135596800000000 AND disabled), count(*) FILTER (WHERE revoked_at <> -62135596800000000)
    FROM keys GROUP BY instance_id;
INSERT INTO key_counts
    SELECT instance_id, type, agent_name || lower(user_principal_name), count(*), count(*) FILTER (WHERE revoked_at = -62135596800000000),
        count(*) FILTER (WHERE revoked_at = -62135596800000000 AND disabled), count(*) FILTER (WHERE revoked_at <> -62135596800000000)
    FROM keys WHERE type IN ('agent', 'user') GROUP BY instance_id, type, agent_name || lower(user_principal_name);

-- +goose StatementBegin
CREATE TRIGGER key_inserted AFTER INSERT ON keys BEGIN
    INSERT INTO key_counts
        SELECT NEW.instance_id, o.type, o.name, 1,
            NEW.revoked_at = -62135596800000000 AND NEW.ended_at = -62135596800000000,
            NEW.revoked_at = -62135596800000000 AND NEW.ended_at = -62135596800000000 AND NEW.disabled,
            NEW.revoked_at <> -62135596800000000
        FROM (SELECT '' AS type, '' AS name UNION
            SELECT NEW.type, CASE NEW.type WHEN 'agent' THEN NEW.agent_name ELSE lower(NEW.user_principal_name) END WHERE NEW.type IN ('agent', 'user')) o
        WHERE true -- or ON would belong to FROM
        ON CONFLICT DO UPDATE SET total = total + 1, usable = usable + excluded.usable,
            disabled = disabled + excluded.disabled, revoked = revoked + excluded.revoked;
END;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE TRIGGER key_updated AFTER UPDATE OF revoked_at, ended_at, disabled ON keys
WHEN OLD.revoked_at <> NEW.revoked_at OR OLD.ended_at <> NEW.ended_at OR OLD.disabled <> NEW.disabled BEGIN
    UPDATE key_counts SET
        usable = usable + (NEW.revoked_at = -62135596800000000 AND NEW.ended_at = -62135596800000000)
            - (OLD.revoked_at = -62135596800000000 AND OLD.ended_at = -62135596800000000),
        disabled = disabled + (NEW.revoked_at = -62135596800000000 AND NEW.ended_at = -62135596800000000 AND NEW.disabled)
            - (OLD.revoked_at = -62135596800000000 AND OLD.ended_at = -62135596800000000 AND OLD.disabled),
        revoked = revoked + (NEW.revoked_at <> -62135596800000000) - (OLD.revoked_at <> -62135596800000000)
    WHERE instance_id = NEW.instance_id AND (type, name) IN
        (VALUES ('', ''), (NEW.type, CASE NEW.type WHEN 'agent' THEN NEW.agent_name ELSE lower(NEW.user_principal_name) END));
END;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE TRIGGER key_deleted AFTER DELETE ON keys BEGIN
    UPDATE key_counts SET total = total - 1,
        usable = usable - (OLD.revoked_at = -62135596800000000 AND OLD.ended_at = -62135596800000000),
        disabled = disabled - (OLD.revoked_at = -62135596800000000 AND OLD.ended_at = -62135596800000000 AND OLD.disabled),
        revoked = revoked - (OLD.revoked_at <> -62135596800000000)
    WHERE instance_id = OLD.instance_id AND (type, name) IN
        (VALUES ('', ''), (OLD.type, CASE OLD.type WHEN 'agent' THEN OLD.agent_name ELSE lower(OLD.user_principal_name) END));
    DELETE FROM key_counts
    WHERE instance_id = OLD.instance_id AND total = 0 AND (type, name) IN
        (VALUES ('', ''), (OLD.type, CASE OLD.type WHEN 'agent' THEN OLD.agent_name ELSE lower(OLD.user_principal_name) END));
END;
-- +goose StatementEnd
