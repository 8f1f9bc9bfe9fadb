package storetest

import (
	"errors"
	"slices"
	"testing"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

var agentHash = apikey.AgentHash{Salt: [16]byte{1, 15: 2}, Hash: [128]byte{3, 127: 4}}

// pendingOf adds key n of "tenant", whose first generation is known by a hash only.
func pendingOf(t *testing.T, s admin.Store, n int) *apikey.Key {
	t.Helper()
	k := plain("tenant", n)
	update(t, s, func(tx admin.Tx) error {
		return errors.Join(tx.InsertKey(t.Context(), k), tx.InsertPending(t.Context(), k.ID, apikey.Generation{Number: 1, CreatedAt: noon}, agentHash))
	})
	return k
}

func testPending(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant", "other")
	keyOf(t, s, "tenant", 9)
	pendingOf(t, s, 1)
	pending, settled := id(1).PendingDigest(), digest("settled")
	wantHash := func(r admin.Reader, want error) {
		t.Helper()
		if h, err := r.AgentHash(ctx, id(1)); !errors.Is(err, want) || err == nil && h != agentHash {
			t.Errorf("hash: got error %v, want %v", err, want)
		}
	}
	wantHash(s, nil)
	if k := found(t, s, pending); k.ID != id(1) || k.Generation != 1 || k.Digest != pending || len(k.Generations) != 1 {
		t.Errorf("by its id: got %+v", k)
	}
	// It is a key like others: changes list what finds it, and so do the digests.
	before := head(t, s)
	update(t, s, func(tx admin.Tx) error {
		return errors.Join(tx.UpdateKey(ctx, plain("tenant", 1)),
			tx.InsertGeneration(ctx, id(1), apikey.Generation{Number: 2}, digest("rotated"), 1))
	})
	wantDigests := func(after apikey.Revision, want ...apikey.Digest) {
		t.Helper()
		changes, _, _, err := s.Changes(ctx, after)
		if err != nil || len(changes) != 1 {
			t.Fatalf("changes: got %v, error %v", changes, err)
		}
		for _, d := range want {
			if !slices.Contains(changes[0].Digests, d) {
				t.Errorf("the change is not listed with %v", d)
			}
		}
		if len(changes[0].Digests) != len(want) {
			t.Errorf("the change has digests %v, want %v", changes[0].Digests, want)
		}
	}
	wantDigests(before, pending, digest("rotated"))
	if _, left := dump(t, s).Digests[pending]; !left {
		t.Error("what finds it is not among the digests")
	}
	// No pepper finds it, so none is needed for it.
	update(t, s, func(tx admin.Tx) error { return tx.PutPepper(ctx, 1, [16]byte{1}) })
	if n, err := s.PepperLeft(ctx, 1); err != nil || n != 2 {
		t.Errorf("left to the pepper: got %d, error %v, want key 9 and the second generation", n, err)
	}

	for name, c := range map[string]struct {
		run  func(tx admin.Tx) error
		want error
	}{
		"a second hash of a key": {func(tx admin.Tx) error {
			return tx.InsertPending(ctx, id(1), apikey.Generation{Number: 3}, agentHash)
		}, apikey.ErrConflict},
		"a hash of a taken generation": {func(tx admin.Tx) error {
			return tx.InsertPending(ctx, id(9), apikey.Generation{Number: 1}, agentHash)
		}, apikey.ErrConflict},
		"a hash of no key": {func(tx admin.Tx) error {
			return tx.InsertPending(ctx, id(8), apikey.Generation{Number: 1}, agentHash)
		}, apikey.ErrNotFound},
		"settled where nothing is pending": {func(tx admin.Tx) error { return tx.Settle(ctx, id(9), settled, 1) }, apikey.ErrNotFound},
		"settled by a taken digest":        {func(tx admin.Tx) error { return tx.Settle(ctx, id(1), digest("key 9"), 1) }, apikey.ErrConflict},
	} {
		wantUntouched(t, s, func() {
			_, err := s.Update(ctx, func(tx admin.Tx) error { return errors.Join(tx.Audit(ctx, event), c.run(tx)) })
			if !errors.Is(err, c.want) || errors.Is(err, apikey.ErrUndecided) {
				t.Errorf("%s: got %v, want %v", name, err, c.want)
			}
		})
		wantHash(s, nil)
	}

	// Settled: an ordinary digest, of the same generation, and nothing else.
	before = head(t, s)
	update(t, s, func(tx admin.Tx) error {
		if err := tx.Settle(ctx, id(1), settled, 1); err != nil {
			return err
		}
		wantHash(tx, apikey.ErrNotFound)
		return nil
	})
	wantDigests(before, pending, settled, digest("rotated"))
	wantHash(s, apikey.ErrNotFound)
	wantNotFound(t, s, pending)
	if k := found(t, s, settled); k.ID != id(1) || k.Generation != 1 || k.Revision != head(t, s) {
		t.Errorf("by its digest: got %+v at revision %d", k, head(t, s))
	}
	if n, err := s.PepperLeft(ctx, 1); err != nil || n != 3 {
		t.Errorf("left to the pepper: got %d, error %v, want one more", n, err)
	}

	// The hash goes with its key, and with its instance.
	pendingOf(t, s, 2)
	pendingOf(t, s, 3)
	update(t, s, func(tx admin.Tx) error { return tx.DeleteKey(ctx, "tenant", id(2)) })
	update(t, s, func(tx admin.Tx) error { return tx.DeleteInstance(ctx, "tenant") })
	for _, n := range []int{2, 3} {
		if _, err := s.AgentHash(ctx, id(n)); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("hash of key %d, which is gone: got %v", n, err)
		}
		wantNotFound(t, s, id(n).PendingDigest())
	}
	instance(t, s, "tenant")
	pendingOf(t, s, 2) // and may come again
}
