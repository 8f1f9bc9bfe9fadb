package cache

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz/apikey"
	"keyward/cache/cachetest"
)

func TestLeasePhases(t *testing.T) {
	const s = int64(time.Second)
	for _, test := range []struct {
		name       string
		mono, wall int64 // since the renewal
		strict     phase
		graceful   phase // with 30 s
	}{
		{"at once", 0, 0, leaseHeld, leaseHeld},
		{"just before the end", 2*s - 1, 2*s - 1, leaseHeld, leaseHeld},
		{"at the end", 2 * s, 2 * s, leaseOut, leaseGrace},
		{"end of the grace", 32*s - 1, 32*s - 1, leaseOut, leaseGrace},
		{"after the grace", 32 * s, 32 * s, leaseOut, leaseOut},
		{"suspended: only the wall clock went on", s, 3 * s, leaseOut, leaseGrace},
		{"suspended for long", s, 3600 * s, leaseOut, leaseOut},
		{"wall clock set back while time went on", 3 * s, s, leaseOut, leaseGrace},
		{"wall clock set back behind the renewal", s, -s, leaseOut, leaseOut},
		{"monotonic clock behind the renewal", -s, s, leaseOut, leaseOut},
	} {
		for grace, want := range map[time.Duration]phase{0: test.strict, 30 * time.Second: test.graceful} {
			now := instant{5, 7}
			l := lease{length: 2 * time.Second, grace: grace, clock: func() instant { return now }}
			if got := l.phase(); got != leaseOut {
				t.Errorf("never renewed: got %v, want out", got)
			}
			l.renew(now)
			now.mono += test.mono
			now.wall += test.wall
			if got := l.phase(); got != want {
				t.Errorf("%s, grace %v: got %v, want %v", test.name, grace, got, want)
			}
			l.drop()
			if got := l.phase(); got != leaseOut {
				t.Errorf("dropped: got %v, want out", got)
			}
		}
	}
}

// answers checks what a cache that holds digest 1, and knows of digest 2, says to three digests.
func answers(t *testing.T, c *Cache, held, known, unknown, serving error) {
	t.Helper()
	for n, want := range map[int]error{1: held, 2: known, 3: unknown} {
		switch k, err := find(t, c, digest(n)); {
		case want != nil:
			wantErr(t, err, want)
		case err != nil || k == nil:
			t.Fatalf("digest %d: got %v, want a key", n, err)
		}
	}
	if err := c.Serving(); serving == nil && err != nil {
		t.Fatalf("Serving: got %v, want nil", err)
	} else if serving != nil {
		wantErr(t, err, serving)
	}
	if c.Ready() != (serving == nil) {
		t.Fatalf("Ready: got %v", c.Ready())
	}
}

func storeOfTwo() *cachetest.Store {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	store.Put(key(2), digest(2))
	return store
}

func TestWithoutTheStoreServesUntilTheLeaseAndItsGraceAreOut(t *testing.T) {
	for _, grace := range []time.Duration{0, 30 * time.Second} {
		store := storeOfTwo()
		bubble(t, store, Config{Grace: grace}, func(t *testing.T, c *Cache) {
			undecided := apikey.ErrUndecided
			mustFind(t, c, digest(1))
			store.Fail(errAway) // the lease began at this instant
			time.Sleep(2*time.Second - 1)
			answers(t, c, nil, undecided, apikey.ErrNotFound, nil)
			time.Sleep(time.Nanosecond)
			if grace > 0 {
				answers(t, c, nil, undecided, undecided, nil)
				if n := value(t, c, "lease_state", ""); n != 1 {
					t.Errorf("lease state %v, want 1", n)
				}
				time.Sleep(grace - 1)
				answers(t, c, nil, undecided, undecided, nil)
				time.Sleep(time.Nanosecond)
			}
			answers(t, c, undecided, undecided, undecided, undecided)
			if n := value(t, c, "lease_state", ""); n != 0 {
				t.Errorf("lease state %v, want 0", n)
			}
			time.Sleep(100 * time.Millisecond)
			store.Fail(nil)
			// The next poll is due in 400 ms; a request does not wait for it.
			answers(t, c, nil, nil, apikey.ErrNotFound, nil)
			if n := value(t, c, "lease_state", ""); n != 2 {
				t.Errorf("lease state %v, want 2", n)
			}
		})
	}
}

func TestLeaseBeginsBeforeThePoll(t *testing.T) {
	store := storeOfTwo()
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		store.OnAnswer(func(_ context.Context, call string) error {
			if call == "Confirm" {
				time.Sleep(1500 * time.Millisecond)
			}
			return nil
		})
		time.Sleep(2 * time.Second) // a poll began at 0.5 s and ended now
		synctest.Wait()
		store.Fail(errAway)
		time.Sleep(500*time.Millisecond - 1)
		if err := c.Serving(); err != nil {
			t.Errorf("2 s less 1 ns after the poll began: %v", err)
		}
		time.Sleep(time.Nanosecond)
		wantErr(t, c.Serving(), apikey.ErrUndecided)
	})
}

// The store must not stop waiting for a replica that may still serve.
func TestStoreWaitsLongerThanTheReplicaServes(t *testing.T) {
	store := storeOfTwo()
	bubble(t, store, Config{Grace: 10 * time.Second}, func(t *testing.T, c *Cache) {
		store.OnAnswer(func(context.Context, string) error {
			time.Sleep(70 * time.Millisecond)
			return nil
		})
		for range 20 {
			time.Sleep(333 * time.Millisecond)
			until, _ := store.Replica("r1")
			since := c.lease.since.Load()
			if ends := time.Unix(0, since.wall).Add(12 * time.Second); ends.After(until.Until) {
				t.Fatalf("serves until %v, the store waits until %v", ends, until.Until)
			}
		}
	})
}

func TestOnlyAConfirmedPollRenews(t *testing.T) {
	for _, failing := range []string{"Changes", "Confirm"} {
		store := storeOfTwo()
		bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
			store.OnAnswer(func(_ context.Context, call string) error {
				if call == failing {
					return errAway
				}
				return nil
			})
			time.Sleep(2 * time.Second)
			if c.Serving() == nil {
				t.Errorf("%s fails, and the lease is renewed", failing)
			}
		})
	}
}

func TestSuspendedOrJumpedClockEndsTheLease(t *testing.T) {
	store := storeOfTwo()
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, store, Config{Grace: 10 * time.Second})
		var mono, wall atomic.Int64 // what the two clocks gain over virtual time
		virtual := c.lease.clock
		c.lease.clock = func() instant {
			now := virtual()
			return instant{now.mono + mono.Load(), now.wall + wall.Load()}
		}
		running(t, c)
		synctest.Wait()
		mustFind(t, c, digest(1))
		for _, jump := range []struct {
			name       string
			mono, wall time.Duration
		}{
			{"machine suspended", 0, time.Hour},
			{"wall clock set back", 0, -time.Hour},
			{"monotonic clock ahead", time.Hour, 0},
		} {
			polls := store.Calls("Changes")
			mono.Add(int64(jump.mono))
			wall.Add(int64(jump.wall))
			wantErr(t, c.Serving(), apikey.ErrUndecided)
			d := digest(1)
			if _, ok, _ := c.Cached(&d); ok {
				t.Errorf("%s: served without a word from the store", jump.name)
			}
			mustFind(t, c, d) // asks the store first
			if n := store.Calls("Changes"); n != polls+1 {
				t.Errorf("%s: %d polls, want 1", jump.name, n-polls)
			}
			if err := c.Serving(); err != nil {
				t.Errorf("%s: %v after a poll", jump.name, err)
			}
		}
	})
}

func TestRequestsWithoutALeaseShareOnePoll(t *testing.T) {
	store := storeOfTwo()
	bubble(t, store, Config{Grace: time.Minute}, func(t *testing.T, c *Cache) {
		store.Fail(errAway)
		time.Sleep(3*time.Second + 100*time.Millisecond)
		gate := make(chan struct{})
		store.OnAnswer(func(_ context.Context, call string) error {
			if call == "Changes" {
				<-gate
			}
			return nil
		})
		polls := store.Calls("Changes")
		ctx, leave := context.WithCancel(t.Context())
		first := asking(ctx, c, digest(1))
		synctest.Wait() // it is its poll that the others join
		var all []<-chan answer
		for range 100 {
			all = append(all, asking(t.Context(), c, digest(1)))
		}
		synctest.Wait()
		leave()
		wantErr(t, (<-first).err, context.Canceled)
		close(gate)
		for _, one := range all {
			if got := <-one; got.err != nil {
				t.Fatalf("got %v, want the key", got.err)
			}
		}
		if n := store.Calls("Changes") - polls; n != 1 {
			t.Errorf("%d polls, want 1", n)
		}
	})
}

func TestRequestsDoNotKeepTheStoreFromComingBack(t *testing.T) {
	store := storeOfTwo()
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		store.Fail(errAway)
		time.Sleep(3 * time.Second)
		polls := store.Calls("Changes")
		for range 1000 {
			_, err := find(t, c, digest(1))
			wantErr(t, err, apikey.ErrUndecided)
			time.Sleep(time.Millisecond)
		}
		if n := store.Calls("Changes") - polls; n < 10 || n > 23 {
			t.Errorf("%d polls in a second, want one every 50 ms and the regular ones", n)
		}
	})
}

func TestHangingPollIsGivenUp(t *testing.T) {
	store := storeOfTwo()
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		store.OnAnswer(func(ctx context.Context, _ string) error {
			<-ctx.Done()
			return ctx.Err()
		})
		time.Sleep(500 * time.Millisecond) // a poll begins
		begin := time.Now()
		wantErr(t, c.poll(context.Background()), apikey.ErrUndecided)
		if waited := time.Since(begin); waited != 2*time.Second {
			t.Errorf("waited %v, want 2s", waited)
		}
		store.OnAnswer(nil)
		time.Sleep(2*time.Second + renewEvery) // the regular poll hangs too
		mustFind(t, c, digest(1))
	})
}

func TestRunLoadsFollowsAndLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := storeOfTwo()
		c := newCache(t, store, Config{Grace: time.Hour})
		answers(t, c, apikey.ErrUndecided, apikey.ErrUndecided, apikey.ErrUndecided, apikey.ErrUndecided)
		store.Fail(errAway)
		end := running(t, c)
		time.Sleep(10 * time.Second)
		if c.Ready() {
			t.Error("ready with nothing loaded")
		}
		store.Fail(nil)
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		answers(t, c, nil, nil, apikey.ErrNotFound, nil)
		r, _ := store.Replica("r1")
		if r.Confirmed != 3 {
			t.Errorf("confirmed %d, want 3", r.Confirmed)
		}
		end()
		if _, ok := store.Replica("r1"); ok {
			t.Error("still registered after its end")
		}
		answers(t, c, apikey.ErrUndecided, apikey.ErrUndecided, apikey.ErrUndecided, apikey.ErrUndecided)
		if _, ok := store.Replica("r1"); ok {
			t.Error("registered again by a request")
		}
	})
}

// What changes after the changes were read must wait for this replica.
func TestReplicaIsRegisteredBeforeItReadsChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := storeOfTwo()
		c := newCache(t, store, Config{})
		store.OnAnswer(func(_ context.Context, call string) error {
			if _, ok := store.Replica("r1"); call == "Changes" && !ok {
				t.Error("read changes without being registered")
			}
			return nil
		})
		running(t, c)
		synctest.Wait()
		answers(t, c, nil, nil, apikey.ErrNotFound, nil)
	})
}

func TestLeaseEndsBeforeTheReplicaIsForgotten(t *testing.T) {
	store := storeOfTwo()
	bubbleEnding(t, store, func(t *testing.T, c *Cache, end func()) {
		store.OnAnswer(func(_ context.Context, call string) error {
			if call == "Unregister" && c.Serving() == nil {
				t.Error("still serving while changes no longer wait for it")
			}
			return nil
		})
		end()
		if store.Calls("Unregister") != 1 {
			t.Error("did not unregister")
		}
	})
}

func TestEndDuringAPollDoesNotRegisterAgain(t *testing.T) {
	store := storeOfTwo()
	bubbleEnding(t, store, func(t *testing.T, c *Cache, end func()) {
		store.OnAnswer(func(_ context.Context, call string) error {
			if call == "Changes" {
				time.Sleep(time.Second)
			}
			return nil
		})
		time.Sleep(600 * time.Millisecond)
		end()
		time.Sleep(10 * time.Second)
		if _, ok := store.Replica("r1"); ok || c.Ready() {
			t.Error("a poll outlived the end")
		}
	})
}

func bubbleEnding(t *testing.T, store *cachetest.Store, test func(t *testing.T, c *Cache, end func())) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, store, Config{})
		end := running(t, c)
		synctest.Wait()
		test(t, c, end)
	})
}

func TestAnOutageIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, log := storeOfTwo(), &logBuffer{}
		c, err := New(store, Config{Records: 10}, prometheus.NewRegistry(), slog.New(slog.NewTextHandler(log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		store.Fail(errAway)
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() { _ = c.Run(ctx) })
		time.Sleep(10 * time.Second)
		store.Fail(nil)
		for range 2 {
			time.Sleep(10*time.Second + 1)
			store.Fail(errAway)
			time.Sleep(10 * time.Second)
			store.Fail(nil)
		}
		time.Sleep(10 * time.Second)
		cancel()
		run.Wait()
		for message, want := range map[string]int{
			"cannot read the known keys": 1,
			"cannot follow the store":    2,
			"following the store again":  2,
			"level=ERROR":                3,
		} {
			if n := log.count(message); n != want {
				t.Errorf("%q was logged %d times, want %d", message, n, want)
			}
		}
		if n := value(t, c, "store_errors_total", "changes"); n != 40 {
			t.Errorf("counted %v errors, want 40", n)
		}
	})
}
