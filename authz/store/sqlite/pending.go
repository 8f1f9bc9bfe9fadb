package sqlite

import (
	"context"

	"keyward/authz/apikey"
)

// AgentHash implements admin.Reader.
func (r *reader) AgentHash(ctx context.Context, id apikey.ID) (h apikey.AgentHash, err error) {
	found, err := r.one(ctx, "read agent hash", `SELECT salt, hash FROM agent_hashes WHERE key_id = ?`, []any{id[:]},
		exactly(h.Salt[:]), exactly(h.Hash[:]))
	if err == nil && !found {
		err = notFound("agent hash")
	}
	return h, err
}

// InsertPending implements admin.Tx.
func (t *tx) InsertPending(ctx context.Context, id apikey.ID, g apikey.Generation, h apikey.AgentHash) error {
	// A second one of the key would have the same digest, and is refused for that.
	if err := t.InsertGeneration(ctx, id, g, id.PendingDigest(), apikey.NoPepper); err != nil {
		return err
	}
	return t.execOne(ctx, "insert agent hash", `INSERT INTO agent_hashes (key_id, generation, salt, hash) VALUES (?, ?, ?, ?)`,
		id[:], g.Number, h.Salt[:], h.Hash[:])
}

// Settle implements admin.Tx.
func (t *tx) Settle(ctx context.Context, id apikey.ID, d apikey.Digest, pepperVersion uint32) error {
	if _, err := t.AgentHash(ctx, id); err != nil {
		return err
	}
	if err := t.free(ctx, "settle", `SELECT 1 FROM key_digests WHERE digest = ?`, d); err != nil {
		return err
	}
	// Listed before and after: by either digest somebody may have looked.
	if err := t.keyChanged(ctx, id); err != nil {
		return err
	}
	pending := id.PendingDigest()
	for _, step := range []struct {
		query string
		args  []any
	}{
		{`UPDATE key_digests SET digest = ?, pepper_version = ? WHERE digest = ?`, []any{d[:], pepperVersion, pending[:]}},
		{`DELETE FROM agent_hashes WHERE key_id = ?`, []any{id[:]}},
	} {
		if err := t.execOne(ctx, "settle", step.query, step.args...); err != nil {
			return err
		}
	}
	return t.keyChanged(ctx, id)
}
