package storetest

import (
	"context"
	"slices"

	"keyward/authz/apikey"
)

// AgentHash implements admin.Reader.
func (r *memoryReader) AgentHash(ctx context.Context, id apikey.ID) (apikey.AgentHash, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return apikey.AgentHash{}, err
	}
	defer done()
	h, ok := v.hashes.get(id)
	if !ok {
		return apikey.AgentHash{}, notThere("agent hash")
	}
	return h, nil
}

// InsertPending implements admin.Tx.
func (t *memoryTx) InsertPending(ctx context.Context, id apikey.ID, g apikey.Generation, h apikey.AgentHash) error {
	if err := t.InsertGeneration(ctx, id, g, id.PendingDigest(), apikey.NoPepper); err != nil {
		return err
	}
	t.hashes.put(id, h)
	return nil
}

// Settle implements admin.Tx.
func (t *memoryTx) Settle(ctx context.Context, id apikey.ID, d apikey.Digest, pepperVersion uint32) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	k, ok := t.keys.get(id)
	switch {
	case !ok || !t.hashes.has(id):
		return notThere("agent hash")
	case t.digests.has(d):
		return taken("digest")
	}
	pending := id.PendingDigest()
	next := clone(k)
	next.found, next.Revision = slices.Clone(k.found), t.revision
	i := slices.IndexFunc(next.found, func(m memoryDigest) bool { return m.digest == pending })
	next.found[i].digest, next.found[i].version = d, pepperVersion
	t.digests.drop(pending)
	t.hashes.drop(id)
	t.putKey(next)
	t.changed(k.InstanceID, id, append(slices.Clip(next.found), k.found...))
	return nil
}
