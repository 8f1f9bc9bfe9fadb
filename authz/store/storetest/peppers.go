package storetest

import (
	"errors"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

func testPeppers(t *testing.T, s admin.Store) {
	ctx := t.Context()
	if list, err := s.Peppers(ctx); err != nil || len(list) != 0 {
		t.Errorf("a new store: got %v and error %v", list, err)
	}
	update(t, s, func(tx admin.Tx) error {
		return errors.Join(
			tx.PutPepper(ctx, 4294967295, [16]byte{3}),
			tx.PutPepper(ctx, 1, [16]byte{1}),
			tx.PutPepper(ctx, 1, [16]byte{1})) // the same again is no conflict
	})
	list, err := s.Peppers(ctx)
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, "peppers by version", []admin.PepperRecord{{Version: 1, Check: [16]byte{1}}, {Version: 4294967295, Check: [16]byte{3}}}, list)
}

func testRedigest(t *testing.T, s admin.Store) {
	ctx := t.Context()
	populate(t, s)
	keyOf(t, s, "tenant", 2)
	update(t, s, func(tx admin.Tx) error { // these were made under a newer pepper, and have no older digest
		return errors.Join(
			tx.InsertGeneration(ctx, id(2), apikey.Generation{Number: 2}, digest("key 2 again"), 2),
			tx.InsertToken(ctx, &admin.Token{ID: id(51)}, digest("newer token"), 2))
	})
	revision, audited := head(t, s), len(events(t, s))
	redigest := func(batch ...admin.Redigest) {
		t.Helper()
		if err := s.Redigest(ctx, batch); err != nil {
			t.Fatal(err)
		}
	}
	redigest(
		admin.Redigest{Old: digest("nothing"), New: digest("from nothing"), Version: 2}, // skipped
		admin.Redigest{Old: digest("key 1"), New: digest("key 1 v2"), Version: 2},
		admin.Redigest{Old: digest("token"), New: digest("token v2"), Version: 2})
	for range 2 {
		for _, d := range []apikey.Digest{digest("key 1"), digest("key 1 v2")} {
			if k := found(t, s, d); k.ID != id(1) || k.Generation != 1 || k.Digest != d {
				t.Errorf("by %v: got key %v, generation %d, digest %v", d, k.ID, k.Generation, k.Digest)
			}
		}
		for _, d := range []apikey.Digest{digest("token"), digest("token v2")} {
			if token, err := s.Token(ctx, d); err != nil || token.ID != id(50) {
				t.Errorf("token by %v: got %v and error %v", d, token, err)
			}
		}
		redigest(admin.Redigest{Old: digest("key 1"), New: digest("key 1 v2"), Version: 2}) // a batch may come twice
	}
	// What would take a digest from one to another, add a second of one version, or go back, is skipped.
	redigest(
		admin.Redigest{Old: digest("key 2"), New: digest("key 1"), Version: 3},
		admin.Redigest{Old: digest("key 1"), New: digest("key 1 v2, another"), Version: 2},
		admin.Redigest{Old: digest("key 2 again"), New: digest("key 2 again, older"), Version: 1},
		admin.Redigest{Old: digest("newer token"), New: digest("newer token, older"), Version: 1},
		admin.Redigest{Old: digest("key 2"), New: digest("key 2, same version"), Version: 1})
	for _, name := range []string{"from nothing", "key 1 v2, another", "key 2 again, older", "key 2, same version"} {
		wantNotFound(t, s, digest("%s", name))
	}
	if _, err := s.Token(ctx, digest("newer token, older")); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("token under an older pepper: got %v, want ErrNotFound", err)
	}
	if k := found(t, s, digest("key 1")); k.ID != id(1) {
		t.Errorf("a digest was taken from key %v by %v", id(1), k.ID)
	}
	if got := head(t, s); got != revision {
		t.Errorf("revision: got %d, want %d: redigesting is no mutation", got, revision)
	}
	if got := len(events(t, s)); got != audited {
		t.Errorf("redigesting wrote %d audit events", got-audited)
	}
	// From here on both are the key's digests, in changes too.
	last := update(t, s, func(tx admin.Tx) error { return tx.UpdateKey(ctx, plain("tenant", 1)) })
	changes, _, _, err := s.Changes(ctx, last-1)
	if err != nil || len(changes) != 1 || len(changes[0].Digests) != 2 {
		t.Errorf("changes: got %v and error %v, want key 1 with two digests", changes, err)
	}
}

func testRetirePepper(t *testing.T, s admin.Store) {
	ctx := t.Context()
	populate(t, s)
	keyOf(t, s, "tenant", 2)
	retire := func() error {
		_, err := s.Update(ctx, func(tx admin.Tx) error { return errors.Join(tx.Audit(ctx, event), tx.RetirePepper(ctx, 1)) })
		return err
	}
	update(t, s, func(tx admin.Tx) error { return tx.PutPepper(ctx, 2, [16]byte{2}) })
	// Key 1, key 2 and the token have only the old digest; each alone holds the pepper.
	for _, settle := range []func() error{
		func() error {
			return s.Redigest(ctx, []admin.Redigest{{Old: digest("key 1"), New: digest("key 1 v2"), Version: 2}})
		},
		func() error {
			return s.Redigest(ctx, []admin.Redigest{{Old: digest("token"), New: digest("token v2"), Version: 2}})
		},
		func() error {
			revoked := plain("tenant", 2)
			revoked.RevokedAt = noon
			update(t, s, func(tx admin.Tx) error { return tx.UpdateKey(ctx, revoked) })
			return nil
		},
	} {
		if err := retire(); !errors.Is(err, apikey.ErrConflict) {
			t.Errorf("retire while secrets are left: got %v, want ErrConflict", err)
		}
		if k := found(t, s, digest("key 1")); k.ID != id(1) {
			t.Errorf("a refused retirement took key 1's old digest")
		}
		if err := settle(); err != nil {
			t.Fatal(err)
		}
	}
	if err := retire(); err != nil {
		t.Fatalf("retire with nothing left: %v", err)
	}
	for _, name := range []string{"key 1", "key 2"} {
		wantNotFound(t, s, digest("%s", name))
	}
	if _, err := s.Token(ctx, digest("token")); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("token by the old digest: got %v, want ErrNotFound", err)
	}
	if k := found(t, s, digest("key 1 v2")); k.ID != id(1) {
		t.Errorf("by the new digest: got key %v", k.ID)
	}
	if token, err := s.Token(ctx, digest("token v2")); err != nil || token.ID != id(50) {
		t.Errorf("token by the new digest: got %v and error %v", token, err)
	}
	if k, err := s.Key(ctx, "tenant", id(2)); err != nil || len(k.Generations) != 1 {
		t.Errorf("a revoked key must stay to be read: got %v and error %v", k, err)
	}
	if err := s.Redigest(ctx, []admin.Redigest{{Old: digest("key 2"), New: digest("key 2 v2"), Version: 2}}); err != nil {
		t.Fatal(err)
	}
	wantNotFound(t, s, digest("key 2 v2")) // a batch that comes too late revives nothing
	if list, err := s.Peppers(ctx); err != nil || len(list) != 1 || list[0].Version != 2 {
		t.Errorf("peppers: got %v and error %v, want version 2 alone", list, err)
	}
	var stream []apikey.Digest
	if _, err := s.Digests(ctx, func(d apikey.Digest) bool { stream = append(stream, d); return true }); err != nil {
		t.Fatal(err)
	}
	wantSame(t, "digests", []apikey.Digest{digest("key 1 v2")}, stream)
}

func testLeft(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	now := time.Now()
	ended, ending := now.Add(-time.Hour), now.Add(time.Hour)
	update(t, s, func(tx admin.Tx) error {
		errs := []error{tx.PutPepper(ctx, 1, [16]byte{1}), tx.PutPepper(ctx, 2, [16]byte{2}), tx.PutPepper(ctx, 3, [16]byte{3})}
		n := 0
		key := func(change func(k *apikey.Key, g *apikey.Generation)) {
			n++
			k, g := plain("tenant", n), apikey.Generation{Number: 1}
			change(k, &g)
			errs = append(errs, tx.InsertKey(ctx, k), tx.InsertGeneration(ctx, k.ID, g, digest("key %d", n), 1))
		}
		token := func(token admin.Token) {
			n++
			token.ID = id(n)
			errs = append(errs, tx.InsertToken(ctx, &token, digest("token %d", n), 1))
		}
		// Six count for version 1: four of keys, two of tokens.
		key(func(*apikey.Key, *apikey.Generation) {}) // key 1, redigested below
		key(func(k *apikey.Key, g *apikey.Generation) { k.ExpirationDate, g.ValidUntil = ending, ending })
		key(func(k *apikey.Key, _ *apikey.Generation) { k.Disabled = true })
		key(func(k *apikey.Key, _ *apikey.Generation) { k.NotBefore = ending })
		token(admin.Token{})
		token(admin.Token{ExpiresAt: ending})
		// These do not.
		key(func(k *apikey.Key, _ *apikey.Generation) { k.RevokedAt = ended })
		key(func(k *apikey.Key, _ *apikey.Generation) { k.RevokedAt = ending }) // revoked is revoked
		key(func(k *apikey.Key, _ *apikey.Generation) { k.ExpirationDate = ended })
		key(func(_ *apikey.Key, g *apikey.Generation) { g.ValidUntil = ended })
		token(admin.Token{RevokedAt: ended})
		token(admin.Token{ExpiresAt: ended})
		// Generations count, not keys: one more for version 2.
		errs = append(errs, tx.InsertGeneration(ctx, id(1), apikey.Generation{Number: 2}, digest("second"), 2))
		return errors.Join(errs...)
	})
	left := func() [3]int {
		t.Helper()
		var all [3]int
		for i := range all {
			n, err := s.PepperLeft(ctx, uint32(i+1))
			if err != nil {
				t.Fatal(err)
			}
			all[i] = n
		}
		if n, err := s.PepperLeft(ctx, 4); n != 0 || err != nil {
			t.Errorf("of a version that is not there: got %d and error %v", n, err)
		}
		return all
	}
	if got, want := left(), [3]int{6, 1, 0}; got != want {
		t.Errorf("left: got %v, want %v", got, want)
	}
	err := s.Redigest(ctx, []admin.Redigest{
		{Old: digest("key 1"), New: digest("key 1 v2"), Version: 2},
		{Old: digest("token 5"), New: digest("token 5 v3"), Version: 3},
	})
	if err != nil {
		t.Fatal(err)
	}
	// What two versions find is left to neither.
	if got, want := left(), [3]int{4, 1, 0}; got != want {
		t.Errorf("left after redigesting two: got %v, want %v", got, want)
	}
}
