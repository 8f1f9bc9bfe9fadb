//go:build !race

package cache

import (
	"errors"
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
