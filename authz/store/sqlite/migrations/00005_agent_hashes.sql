-- +goose Up

-- Agent Access Tokens whose holder has not come yet: the Argon2id hash of what is secret about them. The
-- generation's digest is meanwhile that of the key's id, with pepper_version 0.
CREATE TABLE agent_hashes (
    key_id     BLOB    NOT NULL PRIMARY KEY,
    generation INTEGER NOT NULL,
    salt       BLOB    NOT NULL,
    hash       BLOB    NOT NULL,
    FOREIGN KEY (key_id, generation) REFERENCES generations (key_id, number) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
