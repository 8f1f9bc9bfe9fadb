package storetest

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

func testChanges(t *testing.T, s admin.Store) {
	ctx := t.Context()
	if list, head, truncated, err := s.Changes(ctx, 0); err != nil || len(list) != 0 || head != 0 || truncated {
		t.Errorf("a new store: got %v, head %d, truncated %t, error %v", list, head, truncated, err)
	}
	instanceChange := apikey.Change{InstanceID: "tenant"}
	keyChange := func(n int, names ...string) apikey.Change {
		c := apikey.Change{InstanceID: "tenant", KeyID: id(n)}
		for _, name := range names {
			c.Digests = append(c.Digests, digest("%s", name))
		}
		return c
	}
	steps := []struct {
		name string
		run  func(tx admin.Tx) error
		want []apikey.Change
	}{
		{"put instance", func(tx admin.Tx) error { return tx.PutInstance(ctx, &apikey.Instance{ID: "tenant"}) }, []apikey.Change{instanceChange}},
		{"only audit", func(admin.Tx) error { return nil }, nil},
		{"insert key", func(tx admin.Tx) error { return tx.InsertKey(ctx, plain("tenant", 1)) }, []apikey.Change{keyChange(1)}},
		{"insert generation", func(tx admin.Tx) error {
			return tx.InsertGeneration(ctx, id(1), apikey.Generation{Number: 1}, digest("1a"), 1)
		}, []apikey.Change{keyChange(1, "1a")}},
		{"another generation", func(tx admin.Tx) error {
			return tx.InsertGeneration(ctx, id(1), apikey.Generation{Number: 2}, digest("1b"), 1)
		}, []apikey.Change{keyChange(1, "1a", "1b")}},
		{"update key", func(tx admin.Tx) error { return tx.UpdateKey(ctx, plain("tenant", 1)) }, []apikey.Change{keyChange(1, "1a", "1b")}},
		{"several writes, each key once", func(tx admin.Tx) error {
			return errors.Join(
				insert(ctx, tx, plain("tenant", 2), digest("2")),
				tx.UpdateKey(ctx, plain("tenant", 1)),
				tx.UpdateKey(ctx, plain("tenant", 2)),
				tx.PutInstance(ctx, &apikey.Instance{ID: "tenant"}),
				tx.PutInstance(ctx, &apikey.Instance{ID: "other"}))
		}, []apikey.Change{keyChange(1, "1a", "1b"), keyChange(2, "2"), instanceChange, {InstanceID: "other"}}},
		{"tokens, peppers and marks are no keys", func(tx admin.Tx) error {
			_, err := tx.Mark(ctx, "m")
			return errors.Join(err, tx.InsertToken(ctx, &admin.Token{ID: id(9)}, digest("t"), 1), tx.RevokeToken(ctx, id(9), noon),
				tx.PutPepper(ctx, 1, [16]byte{}))
		}, nil},
		{"delete instance", func(tx admin.Tx) error { return tx.DeleteInstance(ctx, "tenant") },
			[]apikey.Change{instanceChange, keyChange(1, "1a", "1b"), keyChange(2, "2")}},
		{"deleted and made anew in one go", func(tx admin.Tx) error { // what found the old key is listed too
			return errors.Join(
				tx.PutInstance(ctx, &apikey.Instance{ID: "tenant"}),
				insert(ctx, tx, plain("tenant", 1), digest("old")),
				tx.DeleteInstance(ctx, "tenant"),
				tx.PutInstance(ctx, &apikey.Instance{ID: "tenant"}),
				insert(ctx, tx, plain("tenant", 1), digest("new")))
		}, []apikey.Change{instanceChange, keyChange(1, "old", "new")}},
	}
	same := func(what string, want, got []apikey.Change) {
		t.Helper()
		wantSame(t, what, want, got, cmpopts.EquateEmpty(),
			cmpopts.SortSlices(func(a, b apikey.Change) bool {
				return fmt.Sprint(a.Revision, a.InstanceID, a.KeyID) < fmt.Sprint(b.Revision, b.InstanceID, b.KeyID)
			}),
			cmpopts.SortSlices(func(a, b apikey.Digest) bool { return bytes.Compare(a[:], b[:]) < 0 }))
	}
	var all []apikey.Change
	last, steady := apikey.Revision(0), apikey.Revision(0)
	for i, step := range steps {
		revision := update(t, s, step.run)
		if revision <= last {
			t.Errorf("%s: revision %d after %d, want it to grow", step.name, revision, last)
		}
		for j := range step.want {
			step.want[j].Revision = revision
		}
		list, head, truncated, err := s.Changes(ctx, last)
		if err != nil || head != revision || truncated {
			t.Errorf("%s: got head %d, truncated %t, error %v, want head %d", step.name, head, truncated, err, revision)
		}
		same(step.name, step.want, list)
		if list, head, truncated, err := s.Changes(ctx, revision); err != nil || len(list) != 0 || head != revision || truncated {
			t.Errorf("%s: after head: got %v, head %d, truncated %t, error %v", step.name, list, head, truncated, err)
		}
		if i == 0 {
			steady = revision
		} else {
			all = append(all, step.want...)
		}
		last = revision
	}
	list, _, _, err := s.Changes(ctx, steady)
	if err != nil {
		t.Fatal(err)
	}
	same("all since the first", all, list)
	if !slices.IsSortedFunc(list, func(a, b apikey.Change) int { return int(a.Revision) - int(b.Revision) }) {
		t.Error("changes do not come oldest first")
	}
}

func testTruncated(t *testing.T, s admin.Store) {
	ctx := t.Context()
	populate(t, s)
	top := head(t, s)
	for _, after := range []apikey.Revision{top + 1, top + 1000, math.MaxInt64, math.MaxUint64} {
		list, head, truncated, err := s.Changes(ctx, after)
		if err != nil || !truncated || head != top || len(list) != 0 {
			t.Errorf("after %d: got %v, head %d, truncated %t, error %v, want truncated with head %d", after, list, head, truncated, err, top)
		}
	}
	retired := update(t, s, func(tx admin.Tx) error {
		return errors.Join(tx.DeleteInstance(ctx, "tenant"), tx.RevokeToken(ctx, id(50), noon), tx.RetirePepper(ctx, 1))
	})
	for after := range retired {
		if _, head, truncated, err := s.Changes(ctx, after); err != nil || !truncated || head != retired {
			t.Errorf("after %d, before a pepper was retired: got head %d, truncated %t, error %v", after, head, truncated, err)
		}
	}
	instance(t, s, "later")
	if list, _, truncated, err := s.Changes(ctx, retired); err != nil || truncated || len(list) != 1 {
		t.Errorf("after the pepper was retired: got %v, truncated %t, error %v, want one change", list, truncated, err)
	}
	if _, _, truncated, err := s.Changes(ctx, retired-1); err != nil || !truncated {
		t.Errorf("before the pepper was retired, later: got truncated %t, error %v", truncated, err)
	}
}

func testDigests(t *testing.T, s admin.Store) {
	ctx := t.Context()
	list := func() []apikey.Digest {
		t.Helper()
		var list []apikey.Digest
		revision, err := s.Digests(ctx, func(d apikey.Digest) bool {
			list = append(list, d)
			return true
		})
		if err != nil || revision != head(t, s) {
			t.Errorf("got revision %d and error %v, want %d", revision, err, head(t, s))
		}
		slices.SortFunc(list, func(a, b apikey.Digest) int { return bytes.Compare(a[:], b[:]) })
		return list
	}
	if got := list(); len(got) != 0 {
		t.Errorf("a new store: got %v", got)
	}
	instance(t, s, "tenant")
	var want []apikey.Digest
	for n := range 20 {
		keyOf(t, s, "tenant", n+1)
		want = append(want, digest("key %d", n+1))
	}
	update(t, s, func(tx admin.Tx) error { // a token's digest finds no key; a revoked key's does
		revoked := plain("tenant", 1)
		revoked.RevokedAt = noon
		return errors.Join(tx.UpdateKey(ctx, revoked), tx.InsertToken(ctx, &admin.Token{ID: id(1)}, digest("token"), 1))
	})
	if err := s.Redigest(ctx, []admin.Redigest{{Old: digest("key 2"), New: digest("key 2 new"), Version: 2}}); err != nil {
		t.Fatal(err)
	}
	want = append(want, digest("key 2 new"))
	slices.SortFunc(want, func(a, b apikey.Digest) int { return bytes.Compare(a[:], b[:]) })
	wantSame(t, "digests", want, list())

	n := 0
	revision, err := s.Digests(ctx, func(apikey.Digest) bool {
		n++
		return n < 3
	})
	if err != nil || n != 3 || revision != head(t, s) {
		t.Errorf("stopped at the third: got %d, revision %d, error %v", n, revision, err)
	}
}

func testRecentKeys(t *testing.T, s admin.Store) {
	ctx := t.Context()
	list := func(most int) (list []*apikey.Key) {
		t.Helper()
		revision := head(t, s)
		err := s.RecentKeys(ctx, func(k *apikey.Key, at apikey.Revision) bool {
			if at != revision {
				t.Errorf("got revision %d, want %d", at, revision)
			}
			list = append(list, k)
			return len(list) < most
		})
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	if got := list(100); len(got) != 0 {
		t.Errorf("a new store: got %v", got)
	}
	instance(t, s, "tenant", "other")
	full := fullKey("other", 50)
	full.RevokedAt, full.RevokedReason = time.Time{}, ""
	update(t, s, func(tx admin.Tx) error {
		for n := range 20 {
			if err := insert(ctx, tx, plain("tenant", n+1), digest("key %d", n+1)); err != nil {
				return err
			}
		}
		revoked := plain("tenant", 1)
		revoked.RevokedAt = noon
		return errors.Join(
			tx.UpdateKey(ctx, revoked),
			tx.InsertGeneration(ctx, id(2), apikey.Generation{Number: 2, Hint: "kwi_…more", CreatedAt: noon}, digest("key 2 again"), 1),
			tx.InsertKey(ctx, plain("tenant", 21)), // nothing finds it
			tx.InsertKey(ctx, full), tx.InsertGeneration(ctx, full.ID, fullGeneration, digest("full"), 1))
	})
	var uses []apikey.Use
	for n := range 20 {
		if n != 9 { // key 10 was never used
			uses = append(uses, apikey.Use{KeyID: id(n + 1), Generation: 1, At: noon.Add(time.Duration(n*7%20) * time.Second)})
		}
	}
	if err := errors.Join(s.Touch(ctx, uses), s.Redigest(ctx, []admin.Redigest{{Old: digest("key 3"), New: digest("key 3 new"), Version: 2}})); err != nil {
		t.Fatal(err)
	}

	want := map[apikey.Digest]*apikey.Key{}
	for _, name := range []string{"full", "key 2 again", "key 3 new"} {
		want[digest("%s", name)] = found(t, s, digest("%s", name))
	}
	for n := 2; n <= 20; n++ {
		want[digest("key %d", n)] = found(t, s, digest("key %d", n))
	}
	all := list(1000)
	got := map[apikey.Digest]*apikey.Key{}
	for i, k := range all {
		got[k.Digest] = k
		if i > 0 && k.LastUsedAt.After(all[i-1].LastUsedAt) {
			t.Errorf("record %d was used at %v, the one before at %v", i, k.LastUsedAt, all[i-1].LastUsedAt)
		}
	}
	wantSame(t, "by digest", want, got)
	if len(all) != len(want) {
		t.Errorf("got %d records, want %d: each digest once", len(all), len(want))
	}
	for most := 1; most <= len(all); most++ {
		wantSame(t, "the first", all[:most], list(most))
	}
}

func testRecentKeysAndWriter(t *testing.T, s admin.Store) {
	instance(t, s, "tenant")
	for n := range 3 {
		keyOf(t, s, "tenant", n+1)
	}
	before, n := head(t, s), 0
	err := s.RecentKeys(t.Context(), func(k *apikey.Key, at apikey.Revision) bool {
		n++
		written := make(chan error, 1)
		go func() { // as another caller
			_, err := s.Update(t.Context(), func(tx admin.Tx) error {
				revoked := plain("tenant", 1)
				revoked.RevokedAt = noon
				return errors.Join(tx.Audit(t.Context(), event), tx.UpdateKey(t.Context(), revoked))
			})
			written <- err
		}()
		select {
		case err := <-written:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Error("a writer waits for a reader")
		}
		if at == before && !k.RevokedAt.IsZero() {
			t.Error("a record is newer than the revision that came with it, and the next may be older")
		}
		return true
	})
	if err != nil || n < 2 {
		t.Errorf("got %d keys and error %v", n, err)
	}
}

func testTouch(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	keyOf(t, s, "tenant", 1)
	if at, err := s.LastUsed(ctx, id(1)); err != nil || !at.IsZero() {
		t.Errorf("never used: got %v and error %v, want zero", at, err)
	}
	made, n := head(t, s), 1
	rapid.Check(t, func(rt *rapid.T) {
		// A key of its own for each case, with two generations, and one that is never there.
		n++
		ctx := t.Context()
		_, err := s.Update(ctx, func(tx admin.Tx) error {
			return errors.Join(tx.Audit(ctx, event), insert(ctx, tx, plain("tenant", n), digest("key %d", n)),
				tx.InsertGeneration(ctx, id(n), apikey.Generation{Number: 2}, digest("key %d again", n), 1))
		})
		if err != nil {
			rt.Fatal(err)
		}
		made++
		want := map[int]time.Time{1: {}, 2: {}}
		var newest time.Time
		var network, path string
		for _, batch := range rapid.SliceOfN(rapid.SliceOfN(rapid.IntRange(0, 1000), 0, 4), 1, 4).Draw(rt, "seconds") {
			var uses []apikey.Use
			for _, second := range batch {
				use := apikey.Use{
					KeyID: id(n), Generation: 1 + second%3, At: noon.Add(time.Duration(second) * time.Second),
					Network: fmt.Sprintf("192.0.%d.0/24", second%256), Path: fmt.Sprint("/", second),
				}
				uses = append(uses, use, apikey.Use{KeyID: id(999_999), Generation: 1, At: use.At})
				if use.At.After(newest) {
					network, path = use.Network, use.Path
				}
				newest = later(newest, use.At)
				if _, ok := want[use.Generation]; ok { // a third generation is not there
					want[use.Generation] = later(want[use.Generation], use.At)
				}
			}
			if err := s.Touch(ctx, uses); err != nil {
				rt.Fatal(err)
			}
			k, revision, err := s.FindKey(ctx, digest("key %d", n))
			if err != nil {
				rt.Fatal(err)
			}
			at, err := s.LastUsed(ctx, id(n))
			if err != nil || at != newest || k.LastUsedAt != newest {
				rt.Errorf("key last used: got %v and %v, error %v, want %v", at, k.LastUsedAt, err, newest)
			}
			if k.LastUsedNetwork != network || k.LastUsedPath != path {
				rt.Errorf("key last used from %q on %q, want %q and %q", k.LastUsedNetwork, k.LastUsedPath, network, path)
			}
			for i, g := range k.Generations {
				if g.LastUsedAt != want[g.Number] {
					rt.Errorf("generation %d last used: got %v, want %v", i+1, g.LastUsedAt, want[g.Number])
				}
			}
			if revision != made {
				rt.Errorf("revision: got %d, want %d: a use is no mutation", revision, made)
			}
		}
	})
	if changes, _, _, err := s.Changes(ctx, made); err != nil || len(changes) != 0 {
		t.Errorf("uses were listed as changes: %v, error %v", changes, err)
	}
	audited := len(events(t, s))
	var many []apikey.Use // more than a store would write in one go
	for i := range 1200 {
		many = append(many, apikey.Use{KeyID: id(1), Generation: 1, At: noon.Add(time.Duration(i) * time.Second)})
	}
	if err := s.Touch(ctx, many); err != nil {
		t.Fatal(err)
	}
	if at, err := s.LastUsed(ctx, id(1)); err != nil || at != many[1199].At {
		t.Errorf("after a large batch: got %v and error %v, want %v", at, err, many[1199].At)
	}
	if got := len(events(t, s)); got != audited {
		t.Errorf("uses wrote %d audit events", got-audited)
	}
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}
