package storetest

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// long is a time to live that does not end during a test, short one that does.
const (
	long  = time.Hour
	short = 30 * time.Millisecond
)

// confirmed lists the known replicas and what they confirmed.
func confirmed(t *testing.T, s admin.Store) map[string]apikey.Revision {
	t.Helper()
	list, err := s.Replicas(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]apikey.Revision{}
	for _, r := range list {
		if !r.Now.Before(r.Until) {
			t.Errorf("replica %s is listed after its time: now %v, until %v", r.ID, r.Now, r.Until)
		}
		known[r.ID] = r.Confirmed
	}
	return known
}

func testReplicas(t *testing.T, s admin.Store) {
	ctx := t.Context()
	no := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	wantSame(t, "a new store", map[string]apikey.Revision{}, confirmed(t, s))
	no(s.Register(ctx, "a", 3, long))
	no(s.Register(ctx, "b", 1, long))
	wantSame(t, "registered", map[string]apikey.Revision{"a": 3, "b": 1}, confirmed(t, s))
	no(s.Confirm(ctx, "b", 7, 2*long))
	no(s.Confirm(ctx, "a", 2, long)) // a confirmation that was overtaken takes nothing back
	wantSame(t, "confirmed", map[string]apikey.Revision{"a": 3, "b": 7}, confirmed(t, s))
	list, err := s.Replicas(ctx)
	no(err)
	for _, r := range list {
		want := map[string]time.Duration{"a": long, "b": 2 * long}[r.ID]
		if left := r.Until.Sub(r.Now); left > want || left < want-time.Minute {
			t.Errorf("replica %s is known for %v more, want about %v", r.ID, left, want)
		}
	}
	no(s.Register(ctx, "b", 5, long)) // a new life of the same replica
	wantSame(t, "registered again", map[string]apikey.Revision{"a": 3, "b": 5}, confirmed(t, s))
	no(s.Unregister(ctx, "a"))
	no(s.Unregister(ctx, "a")) // or somebody unknown
	wantSame(t, "unregistered", map[string]apikey.Revision{"b": 5}, confirmed(t, s))
	if err := s.Confirm(ctx, "a", 9, long); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("confirm after unregister: got %v, want ErrNotFound", err)
	}

	// Many at once.
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			name := fmt.Sprint("many ", i)
			err := s.Register(ctx, name, 0, long)
			for revision := range apikey.Revision(10) {
				err = errors.Join(err, s.Confirm(ctx, name, revision, long))
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	known := confirmed(t, s)
	delete(known, "b")
	if len(known) != 20 {
		t.Errorf("got %d replicas, want 20", len(known))
	}
	for name, at := range known {
		if at != 9 {
			t.Errorf("%s confirmed %d, want 9", name, at)
		}
	}
}

func testReplicasRunOut(t *testing.T, s admin.Store) {
	ctx := t.Context()
	for _, name := range []string{"lost", "renewed"} {
		if err := s.Register(ctx, name, 1, short); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Confirm(ctx, "renewed", 2, long); err != nil && !errors.Is(err, apikey.ErrNotFound) {
		t.Fatal(err)
	} else if err != nil { // a slow machine: it had run out already, and may come back
		if err := s.Register(ctx, "renewed", 2, long); err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		known := confirmed(t, s)
		if _, ok := known["lost"]; !ok {
			wantSame(t, "known", map[string]apikey.Revision{"renewed": 2}, known)
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a replica did not run out")
		}
		time.Sleep(short / 10)
	}
	if err := s.Confirm(ctx, "lost", 2, long); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("confirm after its time: got %v, want ErrNotFound", err)
	}
	if err := s.Register(ctx, "lost", 4, long); err != nil {
		t.Fatal(err)
	}
	wantSame(t, "registered anew", map[string]apikey.Revision{"lost": 4, "renewed": 2}, confirmed(t, s))
}

func testDeleteInstance(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant", "other")
	for n := range 5 {
		keyOf(t, s, "tenant", n+1)
	}
	keyOf(t, s, "other", 9)
	update(t, s, func(tx admin.Tx) error {
		return tx.InsertToken(ctx, &admin.Token{ID: id(1), InstanceID: "tenant", CreatedAt: noon}, digest("token"), 1)
	})
	audited := len(events(t, s))
	update(t, s, func(tx admin.Tx) error { return tx.DeleteInstance(ctx, "tenant") })
	if _, err := s.Instance(ctx, "tenant"); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("instance: got %v, want ErrNotFound", err)
	}
	for n := range 5 {
		wantNotFound(t, s, digest("key %d", n+1))
		if _, err := s.Key(ctx, "tenant", id(n+1)); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("key %d: got %v, want ErrNotFound", n+1, err)
		}
		if _, err := s.LastUsed(ctx, id(n+1)); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("last use of key %d: got %v, want ErrNotFound", n+1, err)
		}
	}
	if k := found(t, s, digest("key 9")); k.ID != id(9) {
		t.Errorf("got key %v, want %v", k.ID, id(9))
	}
	if _, err := s.Token(ctx, digest("token")); err != nil {
		t.Errorf("token: %v", err)
	}
	if got := len(events(t, s)); got != audited+1 {
		t.Errorf("got %d audit events, want %d", got, audited+1)
	}
	// Its name, ids and digests are free again, and nothing of the old comes back.
	instance(t, s, "tenant")
	if list, err := s.Keys(ctx, "tenant", admin.KeyQuery{Limit: 10}); err != nil || len(list) != 0 {
		t.Errorf("a new instance of the name: got %v and error %v, want no keys", list, err)
	}
	keyOf(t, s, "tenant", 1)
	if k := found(t, s, digest("key 1")); !slices.EqualFunc(k.Generations, []int{1}, func(g apikey.Generation, n int) bool { return g.Number == n }) {
		t.Errorf("a new key under an old id has the generations %v", k.Generations)
	}
}
