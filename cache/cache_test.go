package cache

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz/apikey"
	"keyward/cache/cachetest"
	"keyward/limits"
)

func TestConfigSaysWhatCannotBeMeant(t *testing.T) {
	if err := (Config{}).Validate(); err != nil {
		t.Errorf("the zero Config: %v", err)
	}
	for field, cfg := range map[string]Config{
		"records":         {Records: -1},
		"unknown":         {Unknown: -1},
		"grace":           {Grace: -1},
		"loadTimeout":     {LoadTimeout: -1},
		"poll":            {Poll: -1},
		"lease":           {Lease: 500 * time.Millisecond},
		"missesPerSource": {MissesPerSource: limits.Rate{Interval: 1}},
		"missesTotal":     {MissesTotal: limits.Rate{Burst: 1}},
	} {
		bad, ok := errors.AsType[*apikey.InvalidError](cfg.Validate())
		if !ok || bad.Field != field {
			t.Errorf("got %v, want %s to be refused", cfg.Validate(), field)
		}
		if _, err := New(cachetest.NewStore(), cfg, prometheus.NewRegistry(), slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("New took a bad %s", field)
		}
	}
}

func TestMetricsRegisteredTwiceAreAnError(t *testing.T) {
	reg := prometheus.NewRegistry()
	c, err := New(cachetest.NewStore(), Config{Records: 10}, reg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := New(cachetest.NewStore(), Config{Records: 10}, reg, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("got no error")
	}
}

func TestKeyIsLoadedOnce(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		d := digest(1)
		if _, ok, _ := c.Cached(&d); ok {
			t.Fatal("cached before it was loaded")
		}
		for range 10 {
			k := mustFind(t, c, d)
			if k.ID != key(1).ID || k.Digest != d {
				t.Fatalf("got key %v by %v", k.ID, k.Digest)
			}
		}
		if n := store.Calls("FindKey"); n != 1 {
			t.Errorf("%d reads, want 1", n)
		}
		time.Sleep(time.Hour) // no time to live while the lease is renewed
		mustFind(t, c, d)
		if n := store.Calls("FindKey"); n != 1 {
			t.Errorf("%d reads an hour later, want 1", n)
		}
		if hits, misses := value(t, c, "lookups_total", "hit"), value(t, c, "lookups_total", "miss"); hits != 10 || misses != 2 {
			t.Errorf("counted %v hits and %v misses, want 10 and 2", hits, misses)
		}
		if n := value(t, c, "loads_total", "found"); n != 1 {
			t.Errorf("counted %v loads, want 1", n)
		}
	})
}

func TestDigestOutsideTheKnownSetCostsNoRead(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		for n := 2; n < 1000; n++ {
			d := digest(n)
			if k, ok, err := c.Cached(&d); k != nil || !ok || !errors.Is(err, apikey.ErrNotFound) {
				t.Fatalf("Cached: got %v %v %v, want ErrNotFound", k, ok, err)
			}
			if _, err := c.FindKey(t.Context(), d, source); !errors.Is(err, apikey.ErrNotFound) {
				t.Fatalf("FindKey: got %v, want ErrNotFound", err)
			}
		}
		if n := store.Calls("FindKey"); n != 0 {
			t.Errorf("%d reads, want none", n)
		}
		if n := c.records.unknown.Len(); n != 0 {
			t.Errorf("%d digests are remembered, want none", n)
		}
		if n := value(t, c, "lookups_total", "unknown"); n != 998 {
			t.Errorf("counted %v unknown, want 998", n)
		}
		if n := value(t, c, "known_digests", ""); n != 1 {
			t.Errorf("counted %v known digests, want 1", n)
		}
	})
}

func TestNewKeyIsKnownOnceCaughtUp(t *testing.T) {
	store := cachetest.NewStore()
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		_, err := find(t, c, digest(1))
		wantErr(t, err, apikey.ErrNotFound)
		catchUp(t, c, store.Put(key(1), digest(1)))
		mustFind(t, c, digest(1))
		store.Put(key(2), digest(2)) // by another replica
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		mustFind(t, c, digest(2))
	})
}

// A known prefix whose digest finds nothing is what deleted keys leave behind.
func TestUnknownIsRememberedUntilItChanges(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	d := sharing(digest(1), 8)
	bubble(t, store, Config{Unknown: 2}, func(t *testing.T, c *Cache) {
		for range 5 {
			_, err := find(t, c, d)
			wantErr(t, err, apikey.ErrNotFound)
		}
		if n := store.Calls("FindKey"); n != 1 {
			t.Errorf("%d reads, want 1", n)
		}
		catchUp(t, c, store.Put(key(2), d))
		if k := mustFind(t, c, d); k.ID != key(2).ID {
			t.Errorf("got %v", k.ID)
		}
		for n := 9; n < 20; n++ {
			_, err := find(t, c, sharing(digest(1), n))
			wantErr(t, err, apikey.ErrNotFound)
		}
		if n := c.records.unknown.Len(); n != 2 {
			t.Errorf("%d unknown digests are remembered, want 2", n)
		}
	})
}

func TestOutageIsNotRemembered(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		store.Fail(errAway)
		_, err := find(t, c, digest(1))
		wantErr(t, err, apikey.ErrUndecided)
		if errors.Is(err, apikey.ErrNotFound) {
			t.Error("an outage is also a not found")
		}
		if n := value(t, c, "store_errors_total", "find_key"); n != 1 {
			t.Errorf("counted %v errors, want 1", n)
		}
		store.Fail(nil)
		mustFind(t, c, digest(1))
	})
}

func TestWrongRecordIsNotServed(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, wrongKey{store}, Config{}, func(t *testing.T, c *Cache) {
		k, err := find(t, c, digest(1))
		wantErr(t, err, apikey.ErrUndecided)
		if k != nil {
			t.Error("got a key with the error")
		}
	})
}

type wrongKey struct{ *cachetest.Store }

func (w wrongKey) FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, apikey.Revision, error) {
	k, revision, err := w.Store.FindKey(ctx, d)
	k.Digest[31] ^= 1
	return k, revision, err
}

// asking asks for d in a goroutine of its own.
func asking(ctx context.Context, c *Cache, d apikey.Digest) <-chan answer {
	ch := make(chan answer, 1)
	go func() {
		k, err := c.FindKey(ctx, d, source)
		ch <- answer{k, err}
	}()
	return ch
}

type answer struct {
	key *apikey.Key
	err error
}

// blockLoads makes reads of keys wait, with their answers made, until the returned function is called.
func blockLoads(store *cachetest.Store) (release func()) {
	gate := make(chan struct{})
	store.OnAnswer(func(ctx context.Context, call string) error {
		if call != "FindKey" {
			return nil
		}
		select {
		case <-gate:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	return sync.OnceFunc(func() { store.OnAnswer(nil); close(gate) })
}

func TestManyWhoAskForOneKeyAreOneRead(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		release := blockLoads(store)
		var all []<-chan answer
		for range 100 {
			all = append(all, asking(t.Context(), c, digest(1)))
		}
		synctest.Wait()
		release()
		for _, one := range all {
			if got := <-one; got.err != nil || got.key.ID != key(1).ID {
				t.Fatalf("got %v", got)
			}
		}
		if n := store.Calls("FindKey"); n != 1 {
			t.Errorf("%d reads, want 1", n)
		}
	})
}

func TestLoadsOfDifferentKeysAreNotMixedUp(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	store.Put(key(2), sharing(digest(1), 31))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		release := blockLoads(store)
		one, two := asking(t.Context(), c, digest(1)), asking(t.Context(), c, sharing(digest(1), 31))
		synctest.Wait()
		release()
		if got := <-one; got.err != nil || got.key.ID != key(1).ID {
			t.Errorf("got %v, want key 1", got)
		}
		if got := <-two; got.err != nil || got.key.ID != key(2).ID {
			t.Errorf("got %v, want key 2", got)
		}
	})
}

func TestCloseWaitsForLoads(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{Grace: time.Hour}, func(t *testing.T, c *Cache) {
		mustFind(t, c, digest(1))
		catchUp(t, c, store.Put(key(1), digest(1)))
		store.OnAnswer(func(_ context.Context, call string) error {
			if call == "FindKey" {
				time.Sleep(100 * time.Millisecond)
			}
			return nil
		})
		asked := asking(t.Context(), c, digest(1))
		synctest.Wait()
		begin := time.Now()
		c.Close()
		if waited := time.Since(begin); waited != 100*time.Millisecond {
			t.Errorf("waited %v, want 100ms", waited)
		}
		if got := <-asked; got.err != nil {
			t.Errorf("a load that was under way got %v", got.err)
		}
		wantErr(t, c.Serving(), apikey.ErrUndecided)
		_, err := find(t, c, digest(1))
		wantErr(t, err, apikey.ErrUndecided)
	})
}

func TestWaiterLeavesAloneAtItsOwnDeadline(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		release := blockLoads(store)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		begin := time.Now()
		first := asking(ctx, c, digest(1))
		synctest.Wait()
		second := asking(t.Context(), c, digest(1))
		got := <-first
		wantErr(t, got.err, apikey.ErrUndecided)
		wantErr(t, got.err, context.DeadlineExceeded)
		if waited := time.Since(begin); waited != 100*time.Millisecond {
			t.Errorf("waited %v, want 100ms", waited)
		}
		release()
		if got := <-second; got.err != nil {
			t.Errorf("the second waiter got %v, want the key", got.err)
		}
		if n := store.Calls("FindKey"); n != 1 {
			t.Errorf("%d reads, want 1", n)
		}
	})
}

func TestLoadEndsAtItsTimeout(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{LoadTimeout: 300 * time.Millisecond}, func(t *testing.T, c *Cache) {
		defer blockLoads(store)()
		begin := time.Now()
		_, err := c.FindKey(context.Background(), digest(1), source)
		wantErr(t, err, apikey.ErrUndecided)
		if waited := time.Since(begin); waited != 300*time.Millisecond {
			t.Errorf("waited %v, want 300ms", waited)
		}
	})
}

func TestPanicIsAnErrorForAllWaiters(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		store.OnAnswer(func(_ context.Context, call string) error {
			time.Sleep(100 * time.Millisecond)
			panic("at the store")
		})
		one, two := asking(t.Context(), c, digest(1)), asking(t.Context(), c, digest(1))
		for _, got := range []answer{<-one, <-two} {
			wantErr(t, got.err, apikey.ErrUndecided)
		}
		wantErr(t, c.CatchUp(t.Context(), 100), apikey.ErrUndecided) // polls panic too
		store.OnAnswer(nil)
		mustFind(t, c, digest(1))
	})
}

func TestWhoComesAfterARevocationJoinsNoOlderLoad(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		release := blockLoads(store)
		old := asking(t.Context(), c, digest(1))
		synctest.Wait() // the active key is read, and on its way
		catchUp(t, c, store.Put(revoked(1), digest(1)))
		late := asking(t.Context(), c, digest(1))
		synctest.Wait()
		if n := store.Calls("FindKey"); n != 2 {
			t.Errorf("%d reads, want a new one for who came after", n)
		}
		release()
		if got := <-late; got.err != nil || got.key.RevokedAt.IsZero() {
			t.Errorf("who came after got %+v, want the revoked key", got)
		}
		if got := <-old; got.err != nil || got.key.RevokedAt.IsZero() {
			t.Errorf("who came before got %+v, want the revoked key too", got)
		}
		if mustFind(t, c, digest(1)).RevokedAt.IsZero() {
			t.Error("the active key came back")
		}
		if n := value(t, c, "stale_fills_total", ""); n != 1 {
			t.Errorf("counted %v stale fills, want 1", n)
		}
	})
}

// A load that begins again because a change overtook it is not to run beside one that begins after the
// change: the later to end would put an older record in the place of a newer one.
func TestNobodyIsToldANewRecordAndThenAnOlderOne(t *testing.T) {
	store := cachetest.NewStore()
	version := func(n string) *apikey.Key {
		k := key(1)
		k.CreatedBy = n
		return k
	}
	store.Put(version("1"), digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		var reads atomic.Int64
		store.OnAnswer(func(_ context.Context, call string) error {
			if call == "FindKey" && reads.Add(1) <= 2 { // that of version 1, and the next
				time.Sleep(100 * time.Millisecond)
			}
			return nil
		})
		var first sync.WaitGroup
		first.Go(func() { mustFind(t, c, digest(1)) })
		synctest.Wait()
		catchUp(t, c, store.Put(version("2"), digest(1)))
		time.Sleep(150 * time.Millisecond) // the load has begun again
		store.Put(version("3"), digest(1)) // and is overtaken once more; no poll has seen it
		told := mustFind(t, c, digest(1))
		first.Wait()
		if then := mustFind(t, c, digest(1)); then.CreatedBy < told.CreatedBy {
			t.Errorf("told version %s, then version %s", told.CreatedBy, then.CreatedBy)
		}
	})
}

func TestAnswerOlderThanWhatWasSeenIsNotServed(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		catchUp(t, c, store.Put(revoked(1), digest(1)))
		store.SetLag(1) // a read that goes to a copy which does not know it yet
		_, err := find(t, c, digest(1))
		wantErr(t, err, apikey.ErrUndecided)
		_, err = find(t, c, sharing(digest(1), 8)) // finding nothing can be too old as well
		wantErr(t, err, apikey.ErrUndecided)
		if n := store.Calls("FindKey"); n != 2*loadTries {
			t.Errorf("%d reads, want %d", n, 2*loadTries)
		}
		store.SetLag(0)
		if mustFind(t, c, digest(1)).RevokedAt.IsZero() {
			t.Error("the old answer was kept")
		}
	})
}

// While a poll applies a change, a read that sees the new generation must also see which revision it
// needs.
func TestReadDuringAPollNeedsThePollsRevision(t *testing.T) {
	store := cachetest.NewStore()
	before := store.Put(key(1), digest(1))
	now := store.Put(revoked(1), digest(1))
	c := newCache(t, store, Config{})
	c.follower.heard.Store(uint64(before))
	store.SetLag(1)
	d := digest(1)
	s := c.records.stripeOf(&d)
	s.mu.Lock()
	loaded := make(chan error, 1)
	go func() {
		_, err := c.load(t.Context(), &d)
		loaded <- err
	}()
	for range 10_000 {
		runtime.Gosched() // it reads the stripe's generation, and waits for it
	}
	c.follower.heard.Store(uint64(now))
	s.generation++
	s.mu.Unlock()
	wantErr(t, <-loaded, apikey.ErrUndecided)
	if k, _ := c.records.get(&d); k != nil {
		t.Error("a read from before the change was kept")
	}
}

// A poll publishes what it heard before it counts a stripe up, and what it applied before it confirms.
func TestChangesAreAppliedBeforeTheyAreConfirmed(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	store.PutInstance(&apikey.Instance{ID: "demo"})
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		mustFind(t, c, digest(1))
		store.Put(key(2), digest(2))
		store.Put(revoked(1), digest(1))
		revision := store.PutInstance(&apikey.Instance{ID: "demo", Policy: apikey.Policy{Disabled: true}})
		asked := false
		store.OnAnswer(func(_ context.Context, call string) error {
			if call != "Confirm" {
				return nil
			}
			asked = true
			if !c.Instance("demo").Policy.Disabled {
				t.Error("the old policy is there at the confirmation")
			}
			old, made := digest(1), digest(2)
			if k, ok, _ := c.Cached(&old); ok {
				t.Errorf("%v is still served at the confirmation", k.ID)
			}
			if _, ok, err := c.Cached(&made); ok {
				t.Errorf("the new key is said not to exist (%v) at the confirmation", err)
			}
			if c.follower.heard.Load() != uint64(revision) {
				t.Error("reads from before the change are still taken at the confirmation")
			}
			return nil
		})
		catchUp(t, c, revision)
		if !asked {
			t.Error("nothing was confirmed")
		}
		if r, _ := store.Replica("r1"); r.Confirmed != revision {
			t.Errorf("confirmed %d, want %d", r.Confirmed, revision)
		}
	})
}

func TestNothingMovesIfTheInstancesCannotBeRead(t *testing.T) {
	store := cachetest.NewStore()
	store.PutInstance(&apikey.Instance{ID: "demo"})
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		before, _ := store.Replica("r1")
		revision := store.PutInstance(&apikey.Instance{ID: "demo", Policy: apikey.Policy{Disabled: true}})
		store.OnAnswer(func(_ context.Context, call string) error {
			if call == "Instances" {
				return errAway
			}
			return nil
		})
		wantErr(t, c.CatchUp(t.Context(), revision), apikey.ErrUndecided)
		if r, _ := store.Replica("r1"); r.Confirmed != before.Confirmed {
			t.Errorf("confirmed %d without its policy", r.Confirmed)
		}
		store.OnAnswer(nil)
		catchUp(t, c, revision)
		if !c.Instance("demo").Policy.Disabled {
			t.Error("the policy was lost")
		}
	})
}

func TestInstancesAreReadOnlyWhenOneChanged(t *testing.T) {
	store := cachetest.NewStore()
	store.PutInstance(&apikey.Instance{ID: "demo"})
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		if c.Instance("demo") == nil || c.Instance("other") != nil {
			t.Fatal("not the store's instances")
		}
		catchUp(t, c, store.Put(key(1), digest(1)))
		if n := store.Calls("Instances"); n != 1 {
			t.Errorf("%d reads, want 1", n)
		}
		catchUp(t, c, store.PutInstance(&apikey.Instance{ID: "other"}))
		if c.Instance("other") == nil {
			t.Error("the new instance is missing")
		}
	})
}

func TestCatchUpDoesNotTrustAnEarlierPoll(t *testing.T) {
	store := cachetest.NewStore()
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		gate := make(chan struct{})
		store.OnAnswer(func(_ context.Context, call string) error {
			if call == "Changes" {
				<-gate
			}
			return nil
		})
		time.Sleep(500 * time.Millisecond) // the next poll has its answer
		synctest.Wait()
		revision := store.Put(key(1), digest(1))
		done := make(chan error, 1)
		go func() { done <- c.CatchUp(t.Context(), revision) }()
		synctest.Wait()
		store.OnAnswer(nil)
		close(gate)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		mustFind(t, c, digest(1))
		if r, _ := store.Replica("r1"); r.Confirmed < revision {
			t.Errorf("confirmed %d, want %d", r.Confirmed, revision)
		}
	})
}

func TestCatchUpSaysThatItCannot(t *testing.T) {
	store := cachetest.NewStore()
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		wantErr(t, c.CatchUp(t.Context(), 100), apikey.ErrUndecided) // no such revision
		revision := store.Put(key(1), digest(1))
		store.Fail(errAway)
		wantErr(t, c.CatchUp(t.Context(), revision), apikey.ErrUndecided)
		store.OnAnswer(func(ctx context.Context, _ string) error {
			<-ctx.Done()
			return ctx.Err()
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		begin := time.Now()
		wantErr(t, c.CatchUp(ctx, revision), context.DeadlineExceeded)
		if waited := time.Since(begin); waited != time.Millisecond {
			t.Errorf("waited %v, want 1ms", waited)
		}
	})
}

func TestLearnedDigestIsKnown(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		mustFind(t, c, digest(1))
		learned, remembered := digest(2), sharing(digest(1), 8)
		one := digest(1)
		copy(learned[30:], one[30:]) // same stripe: it must not be counted up
		_, err := find(t, c, learned)
		wantErr(t, err, apikey.ErrNotFound)
		_, err = find(t, c, remembered)
		wantErr(t, err, apikey.ErrNotFound)
		reads := store.Calls("FindKey")
		for _, d := range []apikey.Digest{learned, remembered} {
			store.Redigest(key(1), d)
			c.Learn(d)
			if k := mustFind(t, c, d); k.Digest != d {
				t.Errorf("found by %v, want %v", k.Digest, d)
			}
		}
		mustFind(t, c, digest(1))
		if n := store.Calls("FindKey"); n != reads+2 {
			t.Errorf("%d reads, want 2: learning made others load again", n-reads)
		}
	})
}

// rebuilding makes a cache's set of known digests incomplete until the returned function is called.
func rebuilding(t *testing.T, store *cachetest.Store, c *Cache) (done func()) {
	t.Helper()
	gate := make(chan struct{})
	store.OnAnswer(func(ctx context.Context, call string) error {
		if call == "Digests" {
			<-gate
		}
		return nil
	})
	revision := store.Put(key(0), digest(0))
	store.Truncate()
	catchUp(t, c, revision)
	synctest.Wait()
	return sync.OnceFunc(func() {
		store.OnAnswer(nil)
		close(gate)
		synctest.Wait()
	})
}

func TestUnknownDigestsHaveABudget(t *testing.T) {
	store := cachetest.NewStore()
	for n := range 100 {
		store.Put(key(n), digest(n))
	}
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		done := rebuilding(t, store, c)
		next := 1000
		ask := func(addr string, times int) (answered, busy int) {
			t.Helper()
			for range times {
				next++
				_, err := c.FindKey(t.Context(), digest(next), netip.MustParseAddr(addr))
				if refused, ok := errors.AsType[*apikey.BusyError](err); ok {
					if refused.RetryAfter != time.Second || !errors.Is(err, apikey.ErrUndecided) {
						t.Fatalf("got %#v", refused)
					}
					busy++
					continue
				}
				wantErr(t, err, apikey.ErrNotFound)
				answered++
			}
			return answered, busy
		}
		want := func(step string, answered, busy, wantAnswered int) {
			t.Helper()
			if answered != wantAnswered || answered+busy == 0 {
				t.Errorf("%s: %d were answered, want %d", step, answered, wantAnswered)
			}
		}
		a, b := ask("192.0.2.1", 30)
		want("one source", a, b, 20)
		if n := value(t, c, "budget_refusals_total", "source"); n != 10 {
			t.Errorf("counted %v refusals of a source, want 10", n)
		}
		a, b = ask("::ffff:192.0.2.1", 1)
		want("the same source in another spelling", a, b, 0)
		a, b = ask("192.0.2.2", 1)
		want("its neighbour", a, b, 1)
		a, b = ask("2001:db8::1", 20)
		want("an IPv6 source", a, b, 20)
		a, b = ask("2001:db8::ffff:1", 1)
		want("the same /64", a, b, 0)
		a, b = ask("2001:db8:0:1::1", 1)
		want("another /64", a, b, 1)
		time.Sleep(100 * time.Millisecond)
		a, b = ask("192.0.2.1", 5)
		want("a tenth of a second later", a, b, 1)
		answered := 0
		for i := range 50 {
			a, _ = ask(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}).String(), 20)
			answered += a
		}
		if answered < 350 || answered > 400 {
			t.Errorf("of all sources %d were answered, want what is left of 400", answered)
		}
		if n := value(t, c, "budget_refusals_total", "total"); n != float64(1000-answered) {
			t.Errorf("counted %v refusals in total, want %d", n, 1000-answered)
		}
		for n := range 100 { // known before the set was lost
			if _, err := c.FindKey(t.Context(), digest(n), netip.MustParseAddr("192.0.2.1")); err != nil {
				t.Fatalf("a known key shares the budget: %v", err)
			}
		}
		refused := digest(next)
		store.Redigest(key(1), refused)
		time.Sleep(time.Second)
		if _, err := c.FindKey(t.Context(), refused, source); err != nil {
			t.Errorf("a refusal was remembered: %v", err)
		}
		done()
		unknown := digest(100_000)
		if _, ok, _ := c.Cached(&unknown); !ok {
			t.Error("the set is not complete again")
		}
	})
}

func TestChangesReachASetThatIsBeingRead(t *testing.T) {
	store := cachetest.NewStore()
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		done := rebuilding(t, store, c) // the answer without the next key is on its way
		catchUp(t, c, store.Put(key(1), digest(1)))
		store.Redigest(key(2), digest(2))
		c.Learn(digest(2))
		done()
		mustFind(t, c, digest(1))
		mustFind(t, c, digest(2))
		_, err := find(t, c, digest(3))
		wantErr(t, err, apikey.ErrNotFound)
	})
}

func TestSetFromBeforeASecondLossIsNotTaken(t *testing.T) {
	store := cachetest.NewStore()
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		done := rebuilding(t, store, c)
		revision := store.Put(key(1), digest(1))
		store.Truncate()
		catchUp(t, c, revision)
		done()
		mustFind(t, c, digest(1))
		if n := store.Calls("Digests"); n != 3 {
			t.Errorf("read the digests %d times, want 3", n)
		}
	})
}

func TestSetOlderThanWhatWasSeenIsNotTaken(t *testing.T) {
	store := cachetest.NewStore()
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		store.SetLag(1)
		revision := store.Put(key(1), digest(1))
		store.Truncate()
		catchUp(t, c, revision)
		synctest.Wait()
		d := digest(1)
		if _, ok, err := c.Cached(&d); ok {
			t.Errorf("got %v by a set from before the key", err)
		}
		store.SetLag(0)
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		if !c.known.current.Load().complete {
			t.Error("the set was not read again")
		}
		mustFind(t, c, d)
	})
}

func TestTruncatedChangesForgetEverything(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	store.PutInstance(&apikey.Instance{ID: "demo"})
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		mustFind(t, c, digest(1))
		store.Put(revoked(1), digest(1))
		store.Put(key(2), digest(2))
		revision := store.PutInstance(&apikey.Instance{ID: "demo", Policy: apikey.Policy{Disabled: true}})
		store.Truncate()
		catchUp(t, c, revision)
		synctest.Wait()
		if mustFind(t, c, digest(1)).RevokedAt.IsZero() {
			t.Error("the active key is still served")
		}
		mustFind(t, c, digest(2))
		if !c.Instance("demo").Policy.Disabled {
			t.Error("the old policy is still served")
		}
		_, err := find(t, c, digest(3))
		wantErr(t, err, apikey.ErrNotFound)
		if n := value(t, c, "flushes_total", ""); n != 1 {
			t.Errorf("counted %v flushes, want 1", n)
		}
	})
}

func TestRestoredBackupForgetsEverything(t *testing.T) {
	store := cachetest.NewStore()
	before := store.Put(key(1), digest(1))
	store.Put(revoked(1), digest(1))
	store.Put(key(2), digest(2))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		mustFind(t, c, digest(1))
		mustFind(t, c, digest(2))
		store.Restore(before)
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		if !mustFind(t, c, digest(1)).RevokedAt.IsZero() {
			t.Error("a record from after the backup is still served")
		}
		reads := store.Calls("FindKey")
		_, err := find(t, c, digest(2))
		wantErr(t, err, apikey.ErrNotFound)
		if store.Calls("FindKey") != reads {
			t.Error("a digest from after the backup is still known")
		}
		if r, _ := store.Replica("r1"); r.Confirmed != before {
			t.Errorf("confirmed %d, want %d", r.Confirmed, before)
		}
	})
}

func TestForgottenReplicaBeginsAnew(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		mustFind(t, c, digest(1))
		store.Forget("r1")
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		if _, ok := store.Replica("r1"); !ok {
			t.Fatal("did not register anew")
		}
		if err := c.Serving(); err != nil {
			t.Errorf("not serving again: %v", err)
		}
		mustFind(t, c, digest(1))
		if n := store.Calls("FindKey"); n != 2 {
			t.Errorf("%d reads, want 2: what changed may not have waited for this replica", n)
		}
	})
}

func TestReplicaThatIsAlwaysForgottenServesNothing(t *testing.T) {
	store := cachetest.NewStore()
	store.Put(key(1), digest(1))
	bubble(t, store, Config{Grace: time.Hour}, func(t *testing.T, c *Cache) {
		mustFind(t, c, digest(1))
		store.OnAnswer(func(_ context.Context, call string) error {
			if call == "Confirm" {
				return apikey.ErrNotFound
			}
			return nil
		})
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		wantErr(t, c.Serving(), apikey.ErrUndecided)
		_, err := find(t, c, digest(1))
		wantErr(t, err, apikey.ErrUndecided)
	})
}

func TestCachedIsWhatTheStoreHas(t *testing.T) {
	store := cachetest.NewStore()
	k := key(1)
	k.Scopes, k.Name = apikey.Scopes{"a:*"}, "n"
	store.Put(k, digest(1))
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		fromStore, _, err := store.FindKey(t.Context(), digest(1))
		if err != nil {
			t.Fatal(err)
		}
		loaded, cached := mustFind(t, c, digest(1)), mustFind(t, c, digest(1))
		if diff := cmp.Diff(fromStore, loaded, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Errorf("loaded is not what the store has (-store +loaded):\n%s", diff)
		}
		if loaded != cached {
			t.Error("cached is not what was loaded")
		}
	})
}
