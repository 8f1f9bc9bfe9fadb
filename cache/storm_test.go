package cache

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"keyward/authz/apikey"
	"keyward/cache/cachetest"
)

// trials is how many, or a tenth under the race detector.
func trials(n int) int {
	if raceEnabled || testing.Short() {
		return n / 10
	}
	return n
}

// TestRevokedKeyIsNeverServed revokes keys while slow reads of them are on their way, some from a copy
// that lags behind, and checks all who ask after the revocation was acknowledged.
func TestRevokedKeyIsNeverServed(t *testing.T) {
	const workers = 4
	store := cachetest.NewStore()
	store.OnAnswer(func(_ context.Context, call string) error {
		if call == "FindKey" { // the answer is made; its way takes time
			for range rand.IntN(8) {
				runtime.Gosched()
			}
			store.SetLag(apikey.Revision(rand.IntN(2) * rand.IntN(3)))
		}
		return nil
	})
	c := started(t, store, Config{Records: 100_000})
	var served, late atomic.Int64
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			for i := range trials(100_000) / workers {
				n := i*workers + w
				d := digest(n)
				if err := c.CatchUp(t.Context(), store.Put(key(n), d)); err != nil {
					t.Error(err)
					return
				}
				var acknowledged atomic.Bool
				ask := func() {
					after := acknowledged.Load()
					k, ok, err := c.Cached(&d)
					if !ok {
						k, err = c.FindKey(t.Context(), d, source)
					}
					switch {
					case errors.Is(err, apikey.ErrUndecided): // the copy lagged too long
					case err != nil:
						t.Errorf("key %d: %v", n, err)
					case after && k.RevokedAt.IsZero():
						late.Add(1)
					default:
						served.Add(1)
					}
				}
				var askers sync.WaitGroup
				for range 2 {
					askers.Go(func() {
						for range 3 {
							ask()
						}
					})
				}
				runtime.Gosched()
				if err := c.CatchUp(t.Context(), store.Put(revoked(n), d)); err != nil {
					t.Error(err)
					return
				}
				acknowledged.Store(true)
				ask()
				askers.Wait()
				ask() // what a slow read left behind
			}
		})
	}
	all.Wait()
	if late.Load() > 0 {
		t.Errorf("served %d times after the revocation was acknowledged", late.Load())
	}
	if served.Load() == 0 {
		t.Error("nothing was served at all")
	}
	t.Logf("%d answers; %v stale fills", served.Load(), value(t, c, "stale_fills_total", ""))
	if value(t, c, "stale_fills_total", "") == 0 {
		t.Error("no read was overtaken: the test proves nothing")
	}
}

// TestStorm lets 16 goroutines ask for few keys while those change all the time: every answer must be
// at least as new as the last change that was acknowledged before the question.
func TestStorm(t *testing.T) {
	const keys = 64
	store := cachetest.NewStore()
	c := started(t, store, Config{Records: 50}) // too small for all
	var acknowledged [keys]atomic.Int64
	put := func(n int, version int64) {
		k := key(n)
		k.CreatedBy = string(rune(version))
		if err := c.CatchUp(t.Context(), store.Put(k, digest(n))); err != nil {
			t.Error(err)
		}
		acknowledged[n].Store(version)
	}
	for n := range keys {
		put(n, 1)
	}
	ctx, stop := context.WithCancel(t.Context())
	var writer, askers sync.WaitGroup
	writer.Go(func() {
		for version := int64(2); ctx.Err() == nil; version++ {
			n := rand.IntN(keys)
			put(n, acknowledged[n].Load()+1)
			c.records.invalidateAll()
		}
	})
	for range 16 {
		askers.Go(func() {
			for range trials(20_000) {
				n := rand.IntN(keys)
				atLeast := acknowledged[n].Load()
				k, err := find(t, c, digest(n))
				if errors.Is(err, apikey.ErrUndecided) { // overtaken too often
					continue
				}
				if err != nil || int64([]rune(k.CreatedBy)[0]) < atLeast {
					t.Errorf("key %d: got %v (%v), want version %d or later", n, k, err, atLeast)
					return
				}
			}
		})
	}
	askers.Wait()
	stop()
	writer.Wait()
}

func TestStormOnOneColdKeyIsFewReads(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	c := started(t, store, Config{})
	for round := range 50 {
		reads := store.Calls("FindKey")
		var askers sync.WaitGroup
		for range 16 {
			askers.Go(func() {
				for range 100 {
					if _, err := find(t, c, digest(1)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		askers.Wait()
		// An asker may miss, sleep through the whole load and then make another; 100 rounds each would
		// show a record that stays unreadable.
		if n := store.Calls("FindKey") - reads; n > 16 {
			t.Fatalf("round %d: %d reads of one key", round, n)
		}
		c.records.invalidateAll()
	}
}

func TestCloseDuringTraffic(t *testing.T) {
	for round := range trials(300) {
		store := cachetest.NewStore()
		for n := range 32 {
			store.Put(key(n), digest(n))
		}
		c := newCache(t, store, Config{Records: 100})
		end := running(t, c)
		for c.CatchUp(t.Context(), 1) != nil {
		}
		var closed atomic.Bool
		var askers sync.WaitGroup
		for a := range 8 {
			askers.Go(func() {
				for i := 0; ; i++ {
					after := closed.Load()
					d := digest((a + i) % 32)
					k, err := find(t, c, d)
					if after {
						if k != nil || !errors.Is(err, apikey.ErrUndecided) {
							t.Errorf("got %v, %v from a closed cache", k, err)
						}
						return
					}
					if i%7 == 0 {
						_ = c.CatchUp(t.Context(), store.Put(key(a), digest(a)))
						c.Learn(digest(a))
						c.Serving()
						c.Instance("demo")
					}
				}
			})
		}
		for range round % 20 {
			runtime.Gosched()
		}
		var closers sync.WaitGroup
		closers.Go(c.Close)
		closers.Go(c.Close)
		closers.Wait()
		closed.Store(true)
		if c.Serving() == nil || c.Ready() {
			t.Error("a closed cache serves")
		}
		askers.Wait()
		end()
	}
}

func TestKnownSetTakesManyAtOnce(t *testing.T) {
	var k known
	k.reset()
	set := k.begun()
	var all sync.WaitGroup
	for w := range 8 {
		all.Go(func() {
			for n := range 1000 {
				d := digest(w*1000 + n)
				k.add(&d)
				if !k.has(&d) || k.lacks(&d) {
					t.Error("added, and not there")
				}
			}
		})
	}
	all.Wait()
	if !k.complete(set) || k.complete(set) {
		t.Error("a set is complete once")
	}
	if n := k.size(); n != 8000 {
		t.Errorf("size %d, want 8000", n)
	}
	if d := digest(8000); k.has(&d) || !k.lacks(&d) {
		t.Error("has what was never added")
	}
}

func BenchmarkCached(b *testing.B) {
	store := cachetest.NewStore()
	var held [1024]apikey.Digest
	for n := range held {
		held[n] = digest(n)
		store.Put(key(n), held[n])
	}
	c := started(b, store, Config{Records: 100_000})
	var unknown [1024]apikey.Digest
	for n := range unknown {
		unknown[n] = digest(len(held) + n)
		if _, err := c.FindKey(b.Context(), held[n], netip.Addr{}); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("hit", func(b *testing.B) {
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			if k, _, _ := c.Cached(&held[n%len(held)]); k == nil {
				b.Fatal("not a hit")
			}
		}
	})
	b.Run("unknown", func(b *testing.B) {
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			if _, ok, _ := c.Cached(&unknown[n%len(unknown)]); !ok {
				b.Fatal("not unknown")
			}
		}
	})
}
