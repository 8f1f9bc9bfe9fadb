-- +goose Up

-- A server that starts loads the keys that were used last.
CREATE INDEX keys_recent ON keys (last_used_at);
