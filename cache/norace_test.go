//go:build !race

package cache

import (
	"errors"
	"runtime"
	"testing"

	"keyward/authz/apikey"
	"keyward/cache/cachetest"
)

const raceEnabled = false

func TestCachedAllocatesNothing(t *testing.T) {
	store := cachetest.NewStore()
	store.PutInstance(&apikey.Instance{ID: "demo"})
	d := digest(1)
	store.Put(key(1), d)
	c := started(t, store, Config{})
	if _, err := c.FindKey(t.Context(), d, source); err != nil {
		t.Fatal(err)
	}
	unknown, remembered := digest(2), digest(1)
	remembered[20] = 1 // its prefix is known
	if _, err := c.FindKey(t.Context(), remembered, source); !errors.Is(err, apikey.ErrNotFound) {
		t.Fatal(err)
	}
	for name, f := range map[string]func(){
		"hit": func() {
			if k, ok, _ := c.Cached(&d); k == nil || !ok {
				t.Fatal("not a hit")
			}
		},
		"unknown": func() {
			if _, ok, err := c.Cached(&unknown); err == nil || !ok {
				t.Fatal("not unknown")
			}
		},
		"remembered as unknown": func() {
			if _, ok, err := c.Cached(&remembered); err == nil || !ok {
				t.Fatal("not unknown")
			}
		},
		"instance": func() {
			if c.Instance("demo") == nil {
				t.Fatal("no instance")
			}
		},
		"serving": func() {
			if err := c.Serving(); err != nil {
				t.Fatal(err)
			}
		},
	} {
		if n := testing.AllocsPerRun(10_000, f); n != 0 {
			t.Errorf("%s: %v allocations, want 0", name, n)
		}
	}
}

// TestDroppedSetsAreSetAgain hands over more at once than ristretto's queue takes. The race detector
// slows that down so much that nothing is dropped.
func TestDroppedSetsAreSetAgain(t *testing.T) {
	const n, rounds = 60_000, 20
	c := started(t, cachetest.NewStore(), Config{Records: n * rounds})
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // so that hardly anybody works the queue off meanwhile
	for round := range rounds {
		w := warming{Cache: c, generations: c.records.generations()}
		for i := range n {
			k := key(i)
			k.Digest = digest(round*n + i)
			w.batch = append(w.batch, k)
		}
		w.keep()
		if w.kept != n || w.lost != 0 {
			t.Fatalf("got %d kept and %d lost of %d", w.kept, w.lost, n)
		}
		if value(t, c, "sets_dropped_total", "queue") > 0 {
			return
		}
	}
	t.Error("nothing was ever dropped: this proves nothing")
}
