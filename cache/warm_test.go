package cache

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz/apikey"
	"keyward/cache/cachetest"
)

// usedStore holds keys 1 to n, of which the greater were used later.
func usedStore(n int) *cachetest.Store {
	store := cachetest.NewStore()
	for i := 1; i <= n; i++ {
		k := key(i)
		k.LastUsedAt = time.Unix(int64(i), 0)
		store.Put(k, digest(i))
	}
	return store
}

func TestWarmUpLoadsWhatWasUsedLast(t *testing.T) {
	store := usedStore(50)
	bubble(t, store, Config{Records: 20, WarmUp: time.Minute}, func(t *testing.T, c *Cache) {
		if !c.Ready() || value(t, c, "warm_up_records", "") != 20 {
			t.Errorf("got ready %t, %v records, want 20", c.Ready(), value(t, c, "warm_up_records", ""))
		}
		for i := 31; i <= 50; i++ {
			d := digest(i)
			if k, ok, err := c.Cached(&d); !ok || err != nil || k.ID != key(i).ID {
				t.Errorf("key %d: got %v, %t, %v", i, k, ok, err)
			}
		}
		if n := store.Calls("FindKey"); n != 0 {
			t.Errorf("%d keys were read one by one", n)
		}
		mustFind(t, c, digest(1)) // the others as ever
	})
}

func TestNoWarmUpUnlessAskedFor(t *testing.T) {
	store := usedStore(5)
	bubble(t, store, Config{}, func(t *testing.T, c *Cache) {
		if !c.Ready() || store.Calls("RecentKeys") != 0 {
			t.Errorf("got ready %t and %d calls", c.Ready(), store.Calls("RecentKeys"))
		}
	})
}

// hold keeps answers of RecentKeys back until release is called or the caller leaves.
func hold(store *cachetest.Store) (release func()) {
	held := make(chan struct{})
	store.OnAnswer(func(ctx context.Context, call string) error {
		if call != "RecentKeys" {
			return nil
		}
		select {
		case <-held:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	return func() { close(held) }
}

func TestReadyWaitsForTheWarmUpAndRequestsDoNot(t *testing.T) {
	store := usedStore(5)
	synctest.Test(t, func(t *testing.T) {
		release := hold(store)
		c := newCache(t, store, Config{WarmUp: time.Minute})
		running(t, c)
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if c.Ready() {
			t.Error("ready before the warm-up is over")
		}
		mustFind(t, c, digest(1))
		if err := c.Serving(); err != nil {
			t.Error(err)
		}
		catchUp(t, c, store.Put(key(9), digest(9))) // changes need not wait either
		release()
		synctest.Wait()
		if !c.Ready() {
			t.Error("not ready after the warm-up")
		}
	})
}

func TestWarmUpEndsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := usedStore(5)
		hold(store)
		c := newCache(t, store, Config{WarmUp: 10 * time.Second})
		running(t, c)
		time.Sleep(10*time.Second - time.Millisecond)
		synctest.Wait()
		if c.Ready() {
			t.Error("ready too soon")
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if !c.Ready() {
			t.Error("the warm-up does not end")
		}
		mustFind(t, c, digest(1))
	})
}

func TestRunEndsDuringTheWarmUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := usedStore(5)
		hold(store)
		c := newCache(t, store, Config{WarmUp: time.Hour})
		end := running(t, c)
		synctest.Wait()
		begin := time.Now()
		end()
		if took := time.Since(begin); took > time.Second {
			t.Errorf("Run ended after %v", took)
		}
	})
}

func TestAStoreThatCannotListKeysIsServedFrom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := usedStore(5)
		store.OnAnswer(func(_ context.Context, call string) error {
			if call == "RecentKeys" {
				return errAway
			}
			return nil
		})
		var log logBuffer
		c, err := New(store, Config{WarmUp: time.Minute}, prometheus.NewRegistry(), slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		running(t, c)
		synctest.Wait()
		if !c.Ready() || log.count("cannot load keys into the cache") != 1 || value(t, c, "store_errors_total", "recent_keys") != 1 {
			t.Errorf("got ready %t, and the log %s", c.Ready(), log.b.String())
		}
		mustFind(t, c, digest(1))
	})
}

// TestRevokedDuringTheWarmUp: the store has answered, with a good key, and before the answer is taken up
// the key is revoked and everybody knows.
func TestRevokedDuringTheWarmUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := usedStore(5)
		release := hold(store)
		c := newCache(t, store, Config{WarmUp: time.Minute})
		running(t, c)
		synctest.Wait()
		catchUp(t, c, store.Put(revoked(3), digest(3)))
		release()
		synctest.Wait()
		for i := 1; i <= 5; i++ {
			if k := mustFind(t, c, digest(i)); k.RevokedAt.IsZero() == (i == 3) {
				t.Errorf("key %d: revoked at %v", i, k.RevokedAt)
			}
		}
		if n := value(t, c, "warm_up_records", ""); n != 4 {
			t.Errorf("got %v records, want the 4 that did not change", n)
		}
	})
}

// TestWarmUpTakesNothingOlderThanWhatWasSeen: a copy of the store that is behind answers.
func TestWarmUpTakesNothingOlderThanWhatWasSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := usedStore(5)
		c := newCache(t, store, Config{WarmUp: time.Minute})
		store.OnAnswer(func(_ context.Context, call string) error {
			if call == "Digests" {
				// Between the known set and the warm-up the reads move to a copy that is behind.
				store.SetLag(1)
			}
			return nil
		})
		store.Put(revoked(5), digest(5))
		running(t, c)
		synctest.Wait()
		if n := value(t, c, "warm_up_records", ""); n != 0 || !c.Ready() {
			t.Errorf("got %v records and ready %t, want none", n, c.Ready())
		}
		store.SetLag(0)
		if k := mustFind(t, c, digest(5)); k.RevokedAt.IsZero() {
			t.Error("a revoked key is served as it was")
		}
	})
}

// TestNothingIsLostInAHurry fills a cache to the brim: ristretto drops most of what is set without waiting.
func TestNothingIsLostInAHurry(t *testing.T) {
	const n = 50_000
	c := newCache(t, usedStore(n), Config{Records: n, WarmUp: time.Minute})
	running(t, c)
	for end := time.Now().Add(time.Minute); !c.Ready() && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	missing := 0
	for i := 1; i <= n; i++ {
		d := digest(i)
		if _, ok, _ := c.Cached(&d); !ok {
			missing++
		}
	}
	if got := value(t, c, "warm_up_records", ""); missing != 0 || got != n {
		t.Errorf("%d of %d keys are not there, %v are said to be", missing, n, got)
	}
}

// TestTheWarmUpTellsNoOldStory: the store has answered RecentKeys, then every key is revoked, which no poll
// has shown yet. Who loads a key meanwhile is told that it is revoked, and the next must not be told that it
// is good.
func TestTheWarmUpTellsNoOldStory(t *testing.T) {
	const n = 40_000
	store := usedStore(n)
	answered, release := make(chan struct{}), make(chan struct{})
	store.OnAnswer(func(_ context.Context, call string) error {
		if call == "RecentKeys" { // once
			close(answered)
			<-release
		}
		return nil
	})
	c := newCache(t, store, Config{Records: n, WarmUp: time.Minute, Poll: time.Hour, Lease: 2 * time.Hour})
	running(t, c)
	<-answered
	for i := 1; i <= n; i++ {
		store.Put(revoked(i), digest(i))
	}
	var told [n + 1]bool
	ask := func(i int) {
		k, err := find(t, c, digest(i))
		if err != nil {
			t.Errorf("key %d: %v", i, err)
			return
		}
		if now := !k.RevokedAt.IsZero(); told[i] && !now {
			t.Errorf("key %d: revoked, then good", i)
		} else {
			told[i] = now
		}
	}
	var all sync.WaitGroup
	const askers = 8
	for asker := range askers { // each has keys of its own
		all.Go(func() {
			for begun := false; !t.Failed(); begun = true {
				warm := c.warm.Load()
				for range 100 {
					ask(1 + asker + askers*rand.IntN(n/askers))
				}
				if begun && warm {
					return
				}
				if asker == 0 && !begun { // some are loaded before, most meanwhile
					close(release)
				}
			}
		})
	}
	all.Wait()
	news := 0
	for i := 1; i <= n; i++ {
		if told[i] {
			news++
			ask(i)
		}
	}
	if news == 0 {
		t.Error("nobody was told that a key is revoked: this proves nothing")
	}
}

// The same where ristretto did not keep what the request loaded.
func TestTheWarmUpTellsNoOldStoryOfWhatWasDropped(t *testing.T) {
	store := usedStore(2)
	synctest.Test(t, func(t *testing.T) {
		release := hold(store)
		c := newCache(t, store, Config{WarmUp: time.Minute, Poll: time.Hour, Lease: 2 * time.Hour})
		running(t, c)
		synctest.Wait() // the store has answered
		d := digest(1)
		store.Put(revoked(1), d)
		if k := mustFind(t, c, d); k.RevokedAt.IsZero() {
			t.Fatal("an old answer")
		}
		c.records.keys.Del(d[:16])
		c.records.keys.Wait()
		release()
		synctest.Wait()
		if k := mustFind(t, c, d); !c.Ready() || k.RevokedAt.IsZero() {
			t.Errorf("ready %t: revoked, then good", c.Ready())
		}
		if other := digest(2); mustFind(t, c, other) == nil || store.Calls("FindKey") != 2 {
			t.Errorf("%d keys were read one by one, want 2: the other one is the warm-up's", store.Calls("FindKey"))
		}
	})
}

// The warm-up's Set may still be in ristretto's queue when a request loads the key: see fill.
func TestWhatARequestLoadsReplacesTheWarmUps(t *testing.T) {
	r := testRecords(t, 10_000, 10)
	for n := range 5000 {
		d := digest(n)
		r.warm(&d, record{found(d), r.generation(&d)})
		r.askFor(&d)
		now := found(d)
		r.fill(&d, now, r.generation(&d))
		if k, _ := r.get(&d); k != now {
			t.Fatalf("record %d is hidden by an older one", n)
		}
		if r.warm(&d, record{found(d), r.generation(&d)}) {
			t.Fatalf("the warm-up may replace record %d", n)
		}
	}
}

// A hook is a counter that is heard.
type hook struct {
	prometheus.Counter
	inc func()
}

func (h hook) Inc() {
	h.inc()
	h.Counter.Inc()
}

// TestDroppedSetsAreSetAgain hands over more at once than ristretto's queue takes, while nobody works it off.
func TestDroppedSetsAreSetAgain(t *testing.T) {
	const n = 40_000
	c := newCache(t, cachetest.NewStore(), Config{Records: 2 * n})
	stuck, dropped := make(chan struct{}), make(chan struct{})
	stick := sync.OnceFunc(func() {
		close(stuck)
		<-dropped
	})
	c.metrics.rejected, c.metrics.evicted = hook{c.metrics.rejected, stick}, hook{c.metrics.evicted, stick}
	c.metrics.dropped = hook{c.metrics.dropped, sync.OnceFunc(func() { close(dropped) })}
	// Whoever works the queue off has to say that there is no room, and gets no further.
	c.records.keys.UpdateMaxCost(0)
	d := digest(-1)
	c.records.set(&d, record{found(d), 0})
	<-stuck
	c.records.keys.UpdateMaxCost(2 * n)

	w := warming{Cache: c, generations: c.records.generations()}
	for i := range n {
		k := key(i)
		k.Digest = digest(i)
		w.batch = append(w.batch, k)
	}
	w.keep()
	if w.kept != n || w.lost != 0 {
		t.Errorf("got %d kept and %d lost of %d", w.kept, w.lost, n)
	}
	if value(t, c, "sets_dropped_total", "queue") == 0 {
		t.Error("nothing was dropped: this proves nothing")
	}
}

func TestPackedIsEqual(t *testing.T) {
	whole := new(apikey.Key)
	fill(t, reflect.ValueOf(whole).Elem(), 1)
	p, err := newPacker()
	if err != nil {
		t.Fatal(err)
	}
	variants := map[string]func(k *apikey.Key){
		"whole":          func(*apikey.Key) {},
		"one generation": func(k *apikey.Key) { k.Generations = k.Generations[:1] },
		"no generation":  func(k *apikey.Key) { k.Generations = nil },
		"empty lists": func(k *apikey.Key) {
			k.Scopes, k.Generations, k.AllowedIPs = apikey.Scopes{}, []apikey.Generation{}, []netip.Prefix{}
		},
		"every right":  func(k *apikey.Key) { k.Scopes = nil },
		"other scopes": func(k *apikey.Key) { k.Scopes = apikey.Scopes{"b", "a:*"} },
		// Not valid, but a cache is not the one to say so.
		"one scope of two words": func(k *apikey.Key) { k.Scopes = apikey.Scopes{"a:* b"} },
		"one scope of two":       func(k *apikey.Key) { k.Scopes = apikey.Scopes{"a:*b"} },
		"empty scopes":           func(k *apikey.Key) { k.Scopes = apikey.Scopes{"", "a:*", "", "b"} },
		"many scopes":            func(k *apikey.Key) { k.Scopes = slices.Repeat(apikey.Scopes{"a:*", "b", "c"}, 1000) },
		"no text":                func(k *apikey.Key) { k.Name, k.Description, k.UserPrincipalName, k.RevokedReason = "", "", "", "" },
		"nothing":                func(k *apikey.Key) { *k = apikey.Key{} },
	}
	same := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	for range 2 { // the second time what is shared is there
		for name, change := range variants {
			k := *whole
			change(&k)
			before := k
			packed := p.pack(&k)
			if diff := cmp.Diff(&before, packed, same); diff != "" {
				t.Errorf("%s: %s", name, diff)
			}
			if diff := cmp.Diff(before, k, same); diff != "" {
				t.Errorf("%s: the original changed: %s", name, diff)
			}
		}
	}
	a, b := *whole, *whole
	a.Name, b.Name = "a", "b"
	a.InstanceID, a.Scopes = strings.Clone(b.InstanceID), slices.Clone(b.Scopes)
	one, other := p.pack(&a), p.pack(&b)
	kept := p.scopes.Len()
	a.Scopes = slices.Repeat(apikey.Scopes{"a:*"}, packerList)
	if long, again := p.pack(&a), p.pack(&a); &long.Scopes[0] == &again.Scopes[0] || p.scopes.Len() != kept {
		t.Error("a long list is kept although its key is gone")
	}
	if unsafe.StringData(one.InstanceID) != unsafe.StringData(other.InstanceID) || &one.Scopes[0] != &other.Scopes[0] {
		t.Error("what two keys have in common is kept twice")
	}
}

// fill gives every field a value of its own, however deep, so that a field that is new to a record is not
// forgotten where records are copied.
func fill(t *testing.T, v reflect.Value, n int) int {
	t.Helper()
	n++
	switch to := v.Addr().Interface().(type) {
	case *time.Time:
		*to = time.Unix(int64(n), 0).UTC()
		return n
	case *netip.Prefix:
		*to = netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 32)
		return n
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(fmt.Sprint("text ", n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(n))
	case reflect.Uint8, reflect.Uint64:
		v.SetUint(uint64(n%255 + 1))
	case reflect.Struct:
		for i := range v.NumField() {
			n = fill(t, v.Field(i), n)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fallthrough
	case reflect.Array:
		for i := range v.Len() {
			n = fill(t, v.Index(i), n)
		}
	case reflect.Map:
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		n = fill(t, value, fill(t, key, n))
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(key, value)
	default:
		t.Fatalf("this test cannot fill a %v: teach it", v.Type())
	}
	return n
}

func TestDigestSet(t *testing.T) {
	s, want := newDigestSet(), map[uint64]bool{}
	wantAll := func(when string) {
		t.Helper()
		if s.size() != len(want) {
			t.Errorf("%s: got %d, want %d", when, s.size(), len(want))
		}
		for p := range want {
			if !s.has(p) {
				t.Fatalf("%s: %x is missing", when, p)
			}
			if !want[p+1] && s.has(p+1) || !want[p-1] && s.has(p-1) {
				t.Fatalf("%s: a neighbour of %x is there", when, p)
			}
		}
	}
	wantAll("empty")
	for i := range 100_000 {
		d := digest(i % 90_000) // some twice
		s.add(d.Prefix())
		want[d.Prefix()] = true
	}
	for _, p := range []uint64{0, 1, 1 << 63, ^uint64(0), ^uint64(0) - 2, 1<<50 - 1, 1 << 50} { // at the edges of lists
		s.add(p)
		want[p] = true
	}
	wantAll("filled")
	s.trim()
	wantAll("trimmed")
	s.add(5)
	want[5] = true
	wantAll("one more")
}
