package usage_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/storetest"
	"keyward/authz/usage"
)

// memory is a store that keeps what it was told, or refuses.
type memory struct {
	mu     sync.Mutex
	last   map[apikey.ID]apikey.Use
	counts map[string]*admin.UsageCounts // by instance, key and minute
	heard  map[string]*admin.UsageCounts // the same, by the listener
	err    error                         // of every call
	after  int                           // batches until they fail with err too; -1: never
	names  map[apikey.ID]int64           // of the batches that came last
	mute   int                           // batches that are added, and the answer is lost
	slow   time.Duration                 // of a batch
	uses   []int                         // that came at once
	touch  int                           // calls until they fail; 0: never
	log    bytes.Buffer
}

func newMemory() *memory {
	return &memory{
		last: map[apikey.ID]apikey.Use{}, counts: map[string]*admin.UsageCounts{}, heard: map[string]*admin.UsageCounts{}, after: -1, names: map[apikey.ID]int64{},
	}
}

func (m *memory) Touch(_ context.Context, uses []apikey.Use) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	if m.touch--; m.touch == 0 {
		return errors.New("full")
	}
	m.uses = append(m.uses, len(uses))
	for _, u := range uses {
		if u.At.After(m.last[u.KeyID].At) {
			m.last[u.KeyID] = u
		}
	}
	return nil
}

func (m *memory) AddUsage(ctx context.Context, as admin.UsageBatch, counts []admin.Usage) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.slow > 0 {
		select {
		case <-time.After(m.slow):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if m.err != nil {
		return m.err
	}
	if m.after == 0 {
		return errors.New("full")
	}
	m.after--
	if as.Writer.IsZero() {
		return errors.New("a batch without a name")
	}
	if as.Number > m.names[as.Writer] {
		m.names[as.Writer] = as.Number
		add(m.counts, counts)
	}
	if m.mute > 0 {
		m.mute--
		return errors.New("connection reset")
	}
	return nil
}

func (m *memory) Counted(_ context.Context, counts []admin.Usage) {
	m.mu.Lock()
	defer m.mu.Unlock()
	add(m.heard, counts)
}

func add(to map[string]*admin.UsageCounts, counts []admin.Usage) {
	for _, u := range counts {
		at := place(u.InstanceID, u.KeyID, u.Start)
		if to[at] == nil {
			to[at] = new(admin.UsageCounts)
		}
		to[at].Add(&u.UsageCounts)
	}
}

func place(instance string, key apikey.ID, minute time.Time) string {
	return fmt.Sprintf("%s/%s %s", instance, key, minute.UTC().Format("15:04:05"))
}

func (m *memory) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

// failAfter lets batches fail once there were so many more; -1: never.
func (m *memory) failAfter(batches int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.after = batches
}

func (m *memory) written() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.counts)
}

func (m *memory) lastUsed(id apikey.ID) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last[id].At
}

// start runs a counter; stop ends it.
func start(t *testing.T, m *memory, cfg usage.Config) (c *usage.Counter, reg *prometheus.Registry, stop func()) {
	t.Helper()
	cfg.Listener = m
	reg = prometheus.NewRegistry()
	c = usage.NewCounter(m, cfg, reg, slog.New(slog.NewTextHandler(&m.log, nil)))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(stop)
	return c, reg, stop
}

func metric(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetCounter().GetValue() + f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func use(k *apikey.Key, reason authz.Reason, from string) authz.Use {
	u := authz.Use{Reason: reason, Key: k, InstanceID: "demo", Pattern: "/v1/", At: time.Now()}
	if from != "" {
		u.Client = netip.MustParseAddr(from)
	}
	return u
}

func keyOf(n byte, generation int) *apikey.Key {
	return &apikey.Key{ID: apikey.ID{1, 15: n}, InstanceID: "demo", Generation: generation}
}

func TestUsesAreWrittenWithinAMinuteAndAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		c, _, stop := start(t, store, usage.Config{})
		k := keyOf(7, 1)
		first := time.Now()
		c.Decided(use(k, authz.ReasonKey, "192.0.2.9"))
		late := use(k, authz.ReasonKey, "198.51.100.1") // late news of an earlier use
		late.At = first.Add(-time.Hour)
		c.Decided(late)
		if got := c.Pending(k.ID); !got.Equal(first) {
			t.Errorf("pending: got %v, want %v", got, first)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got, want := store.last[k.ID], (apikey.Use{KeyID: k.ID, Generation: 1, At: first, Network: "192.0.2.0/24", Path: "/v1/"}); got != want {
			t.Errorf("after a minute: got %+v, want %+v", got, want)
		}
		if got := store.counts[place("demo", k.ID, first)]; got == nil || got.Allowed != 2 {
			t.Errorf("after a minute: counted %+v", got)
		}

		store.fail(errors.New("disk full"))
		second := time.Now()
		c.Decided(use(k, authz.ReasonKey, ""))
		time.Sleep(time.Minute)
		if got := c.Pending(k.ID); !got.Equal(second) {
			t.Errorf("a use that could not be written was forgotten: got %v, want %v", got, second)
		}
		store.fail(nil)
		stop()
		if got := store.lastUsed(k.ID); !got.Equal(second) {
			t.Errorf("after the end: got %v, want %v", got, second)
		}
		if got := store.counts[place("demo", k.ID, second)]; got == nil || got.Allowed != 1 {
			t.Errorf("after the end: counted %+v", got)
		}
	})
}

func TestEveryDecisionIsCountedOnceInItsMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		c, reg, stop := start(t, store, usage.Config{})
		minute := time.Now()
		old, current, other := keyOf(1, 1), keyOf(1, 2), keyOf(2, 1)
		for range 3 {
			c.Decided(use(old, authz.ReasonKey, "192.0.2.1"))
			c.Decided(use(current, authz.ReasonKey, "2001:db8:1:2::3"))
			c.Decided(use(current, authz.ReasonLimitBurst, "192.0.2.1"))
			c.Decided(use(other, authz.ReasonMissingScope, "192.0.2.1"))
			c.Decided(use(nil, authz.ReasonUnknownKey, "192.0.2.1"))
			c.Decided(use(nil, authz.ReasonJWT, "198.51.100.7"))
			elsewhere := use(nil, authz.ReasonPublic, "")
			elsewhere.InstanceID = ""
			c.Decided(elsewhere)
			c.Ended("demo", old.ID, 204, 10, 20, time.Second)
			c.Ended("demo", old.ID, 0, -1, -1, -time.Second)
			c.Ended("demo", apikey.ID{}, 599, 1, 2, 3*time.Second)
			time.Sleep(time.Second)
		}
		time.Sleep(time.Until(minute.Add(59 * time.Second)))
		c.Decided(use(current, authz.ReasonLimitBurst, ""))
		first := use(old, authz.ReasonKey, "") // comes in the next minute, before anything of this one is written
		next := minute.Add(time.Minute)
		first.At = next
		c.Decided(first)
		stop()

		of := func(allowed int64, reasons map[string]int64, generations map[int]int64, networks map[string]int64, ended admin.EndedRequests) *admin.UsageCounts {
			refused := int64(0)
			for _, n := range reasons {
				refused += n
			}
			return &admin.UsageCounts{Allowed: allowed, Refused: refused, Reasons: reasons, Generations: generations, Networks: networks, Ended: ended}
		}
		ended := admin.EndedRequests{Count: 6, Status: [6]int64{3, 0, 3, 0, 0, 0}, RequestBytes: 30, ResponseBytes: 60, Duration: 3 * time.Second, Longest: time.Second}
		all := admin.EndedRequests{Count: 9, Status: [6]int64{3, 0, 3, 0, 0, 3}, RequestBytes: 33, ResponseBytes: 66, Duration: 12 * time.Second, Longest: 3 * time.Second}
		want := map[string]*admin.UsageCounts{
			place("demo", old.ID, minute): of(6, map[string]int64{"limit_burst": 4}, map[int]int64{1: 3, 2: 3},
				map[string]int64{"192.0.2.0/24": 3, "2001:db8:1::/48": 3}, ended),
			place("demo", other.ID, minute): of(0, map[string]int64{"missing_scope": 3}, nil, nil, admin.EndedRequests{}),
			place("demo", apikey.ID{}, minute): of(9, map[string]int64{"limit_burst": 4, "missing_scope": 3, "unknown_key": 3}, map[int]int64{1: 3, 2: 3},
				map[string]int64{"192.0.2.0/24": 3, "2001:db8:1::/48": 3, "198.51.100.0/24": 3}, all),
			place("", apikey.ID{}, minute):   of(3, nil, nil, nil, admin.EndedRequests{}),
			place("demo", old.ID, next):      of(1, nil, map[int]int64{1: 1}, nil, admin.EndedRequests{}),
			place("demo", apikey.ID{}, next): of(1, nil, map[int]int64{1: 1}, nil, admin.EndedRequests{}),
		}
		if d := cmp.Diff(want, store.counts); d != "" {
			t.Errorf("written (-want +got):\n%s", d)
		}
		if d := cmp.Diff(want, store.heard); d != "" {
			t.Errorf("heard (-want +got):\n%s", d)
		}
		if n := metric(t, reg, "keyward_usage_series"); n != 0 {
			t.Errorf("%v series when all is written", n)
		}
		if n := metric(t, reg, "keyward_usage_dropped_total"); n != 0 {
			t.Errorf("%v dropped", n)
		}
	})
}

// TestFailedBatchesAreTriedAgain: and none that was written.
func TestFailedBatchesAreTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		c, reg, stop := start(t, store, usage.Config{})
		store.failAfter(1) // of three
		minute := time.Now()
		for round := range 2 {
			for n := range 250 {
				k := keyOf(0, 1)
				k.ID[15] = byte(n)
				c.Decided(use(k, authz.ReasonKey, ""))
			}
			time.Sleep(12 * time.Second)
			if n := store.written(); round == 0 && n != 100 {
				t.Fatalf("%d counts were written before the store failed", n)
			}
		}
		store.failAfter(-1)
		stop()
		for n := range 250 {
			if got := store.counts[place("demo", apikey.ID{1, 15: byte(n)}, minute)]; got == nil || got.Allowed != 2 {
				t.Fatalf("key %d: %+v, want 2", n, got)
			}
		}
		if got := store.counts[place("demo", apikey.ID{}, minute)]; got.Allowed != 500 {
			t.Errorf("in all: %d, want 500", got.Allowed)
		}
		if d := cmp.Diff(store.counts, store.heard); d != "" {
			t.Errorf("heard (-written +heard):\n%s", d)
		}
		if n := metric(t, reg, "keyward_usage_failures_total"); n != 2 {
			t.Errorf("%v failures, want 2", n)
		}
	})
}

// TestBatchWithALostAnswerIsCountedOnce, although more is counted of the same meanwhile.
func TestBatchWithALostAnswerIsCountedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		c, _, stop := start(t, store, usage.Config{})
		minute := time.Now()
		for range 4 {
			store.mu.Lock()
			store.mute = 1
			store.mu.Unlock()
			for n := range 250 {
				k := keyOf(0, 1)
				k.ID[15] = byte(n)
				c.Decided(use(k, authz.ReasonKey, "192.0.2.1"))
			}
			time.Sleep(12 * time.Second)
		}
		stop()
		for n := range 250 {
			if got := store.counts[place("demo", apikey.ID{1, 15: byte(n)}, minute)]; got == nil || got.Allowed != 4 || got.Networks["192.0.2.0/24"] != 4 {
				t.Fatalf("key %d: %+v, want 4", n, got)
			}
		}
		if got := store.counts[place("demo", apikey.ID{}, minute)]; got.Allowed != 1000 {
			t.Errorf("in all: %d, want 1000", got.Allowed)
		}
		if d := cmp.Diff(store.counts, store.heard); d != "" {
			t.Errorf("heard (-written +heard):\n%s", d)
		}
	})
}

// TestCountsOfADeletedInstance: what waited for the store is not written when its instance is gone, nor to the one
// that has its name then.
func TestCountsOfADeletedInstance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &awayCounts{Memory: storetest.NewMemory(admin.AuditKeys{})}
		defer store.Close()
		update := func(fn func(tx admin.Tx) error) {
			t.Helper()
			if _, err := store.Update(t.Context(), func(tx admin.Tx) error { return errors.Join(tx.Audit(t.Context(), admin.Event{}), fn(tx)) }); err != nil {
				t.Fatal(err)
			}
		}
		put := func(tx admin.Tx) error {
			return tx.PutInstance(t.Context(), &apikey.Instance{ID: "demo", CreatedAt: time.Now()})
		}
		remove := func(tx admin.Tx) error { return tx.DeleteInstance(t.Context(), "demo") }
		want := func(when string, want int64) {
			t.Helper()
			list, err := store.Usage(t.Context(), admin.UsageQuery{InstanceID: "demo", Interval: admin.UsageDay, From: time.Now().Add(-48 * time.Hour), To: time.Now()})
			if err != nil {
				t.Fatal(err)
			}
			var got admin.UsageCounts
			for _, u := range list {
				got.Add(&u.UsageCounts)
			}
			if got.Allowed != want {
				t.Errorf("%s: %d allowed, want %d", when, got.Allowed, want)
			}
		}
		c := usage.NewCounter(store, usage.Config{Instance: func(id string) *apikey.Instance {
			in, err := store.Instance(t.Context(), id)
			if err != nil {
				return nil
			}
			return in
		}}, nil, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.Run(ctx) }()

		update(put)
		time.Sleep(3 * time.Second) // not at the very instants at which the counter writes
		decide := func(n int) {
			for range n {
				c.Decided(use(keyOf(1, 1), authz.ReasonKey, ""))
			}
			time.Sleep(20 * time.Second)
		}
		decide(1)
		want("there", 1)
		store.away.Store(true)
		decide(2)
		update(remove)
		store.away.Store(false)
		time.Sleep(20 * time.Second)
		update(put)
		want("deleted while the store was away", 0)
		decide(4)
		want("made again", 4)
		store.away.Store(true)
		decide(8)
		update(remove)
		time.Sleep(time.Second)
		update(put)
		decide(16)
		store.away.Store(false)
		time.Sleep(20 * time.Second)
		want("deleted and made again while the store was away", 16)
		cancel()
		<-done
	})
}

// awayCounts is a store to which counts cannot be written.
type awayCounts struct {
	*storetest.Memory
	away atomic.Bool
}

func (s *awayCounts) AddUsage(ctx context.Context, as admin.UsageBatch, counts []admin.Usage) error {
	if s.away.Load() {
		return apikey.ErrUndecided
	}
	return s.Memory.AddUsage(ctx, as, counts)
}

// TestManyLastUsesAreWrittenBitByBit: what was written once is not written again because of what was not.
func TestManyLastUsesAreWrittenBitByBit(t *testing.T) {
	const keys, generations = 700, 3 // a thousand end between two generations of a key
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		c, _, stop := start(t, store, usage.Config{})
		time.Sleep(time.Second)
		for n := range keys {
			for g := range generations {
				c.Decided(use(&apikey.Key{ID: apikey.ID{1, 14: byte(n >> 8), 15: byte(n)}, InstanceID: "demo", Generation: g + 1}, authz.ReasonKey, ""))
			}
		}
		store.mu.Lock()
		store.touch = 2
		store.mu.Unlock()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if d := cmp.Diff([]int{1000}, store.uses); d != "" {
			t.Errorf("before the second failed (-want +got)\n%s", d)
		}
		stop()
		if d := cmp.Diff([]int{1000, 1000, 100}, store.uses); d != "" {
			t.Errorf("in all (-want +got)\n%s", d)
		}
		if len(store.last) != keys {
			t.Errorf("last uses of %d keys, want %d", len(store.last), keys)
		}
	})
}

// TestTheEndIsBounded: a slow store does not hold up the end of the process, and what is lost is told.
func TestTheEndIsBounded(t *testing.T) {
	const keys = 5000
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		c, reg, stop := start(t, store, usage.Config{})
		time.Sleep(time.Second)
		store.slow = 4 * time.Second
		for n := range keys {
			c.Decided(use(&apikey.Key{ID: apikey.ID{1, 14: byte(n >> 8), 15: byte(n)}, InstanceID: "demo", Generation: 1}, authz.ReasonKey, ""))
		}
		begin := time.Now()
		stop()
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
		// Two batches of a hundred, one of which is the instance's.
		if n := store.written(); n != 200 {
			t.Errorf("%d counts were written, want 200", n)
		}
		if n := metric(t, reg, "keyward_usage_dropped_total"); n != keys-199 {
			t.Errorf("%v dropped, want %d", n, keys-199)
		}
		if log := store.log.String(); strings.Count(log, "level=ERROR") != 1 || !strings.Contains(log, fmt.Sprintf("requests=%d last_uses=0", keys-199)) {
			t.Errorf("log:\n%s", log)
		}
	})
}

// TestTheEndWithoutAStore: each request that is lost counts once, although it is in two counts.
func TestTheEndWithoutAStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		c, reg, stop := start(t, store, usage.Config{})
		store.fail(errors.New("disk full"))
		for range 3 {
			c.Decided(use(keyOf(1, 1), authz.ReasonKey, ""))
			c.Decided(use(keyOf(2, 1), authz.ReasonLimitBurst, ""))
			c.Decided(use(nil, authz.ReasonUnknownKey, ""))
			time.Sleep(25 * time.Second)
		}
		stop()
		if n := metric(t, reg, "keyward_usage_dropped_total"); n != 9 {
			t.Errorf("%v dropped, want 9", n)
		}
		if log := store.log.String(); !strings.Contains(log, "requests=9 last_uses=1") {
			t.Errorf("log:\n%s", log)
		}
	})
}

// TestNoRoomForAKey: the instance's total stays exact, and the key's last use is kept.
func TestNoRoomForAKey(t *testing.T) {
	const keys = 100_100
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		c, reg, stop := start(t, store, usage.Config{})
		minute := time.Now()
		for range 2 {
			for n := range keys {
				k := &apikey.Key{ID: apikey.ID{1, 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)}, Generation: 1}
				c.Decided(use(k, authz.ReasonKey, "192.0.2.1"))
			}
		}
		c.Ended("made up", apikey.ID{9}, 200, 1, 1, 1)
		dropped := metric(t, reg, "keyward_usage_dropped_total")
		if dropped < 200 || dropped > 2*200 { // records of what belongs to no key need room too
			t.Errorf("dropped %v, want a little over 200", dropped)
		}
		if series := metric(t, reg, "keyward_usage_series"); series < 100_000 || series > 100_064 {
			t.Errorf("%v series", series)
		}
		stop()
		if got := store.counts[place("demo", apikey.ID{}, minute)]; got == nil || got.Allowed != 2*keys || got.Networks["192.0.2.0/24"] != 2*keys {
			t.Errorf("in all: %+v, want %d", got, 2*keys)
		}
		if len(store.last) != keys {
			t.Errorf("last uses of %d keys, want %d", len(store.last), keys)
		}
		if len(store.heard) == 0 || store.counts[place("made up", apikey.ID{9}, minute)] != nil {
			t.Error("an instance that an access log made up took a place")
		}
	})
}

func TestNetworksOfAKeyAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		c, _, stop := start(t, store, usage.Config{})
		minute, k := time.Now(), keyOf(1, 1)
		for n := range 100 {
			c.Decided(use(k, authz.ReasonKey, fmt.Sprintf("10.0.%d.1", n)))
		}
		c.Decided(use(k, authz.ReasonKey, "10.0.0.2"))
		stop()
		for _, id := range []apikey.ID{k.ID, {}} {
			got := store.counts[place("demo", id, minute)]
			if len(got.Networks) != admin.MaxNetworks+1 || got.Networks[admin.OtherNetworks] != 36 || got.Networks["10.0.0.0/24"] != 2 {
				t.Errorf("%d networks: %v", len(got.Networks), got.Networks)
			}
		}
	})
}

// TestLastUsesAreKeptWhereNothingIsCounted: keys may end when they are idle.
func TestLastUsesAreKeptWhereNothingIsCounted(t *testing.T) {
	no := &apikey.Instance{ID: "demo", Policy: apikey.Policy{Usage: apikey.UsagePolicy{Enabled: new(false)}}}
	yes := &apikey.Instance{ID: "demo"}
	for name, tt := range map[string]struct {
		cfg  usage.Config
		want int // counts
	}{
		"off":                           {usage.Config{Off: true}, 0},
		"off, in the instance":          {usage.Config{Instance: func(string) *apikey.Instance { return no }}, 0},
		"the instance is gone":          {usage.Config{Instance: func(string) *apikey.Instance { return nil }}, 0},
		"on":                            {usage.Config{Instance: func(string) *apikey.Instance { return yes }}, 2},
		"on, and nobody knows which is": {usage.Config{}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := newMemory()
				c, _, stop := start(t, store, tt.cfg)
				k := keyOf(1, 1)
				at := time.Now()
				c.Decided(use(k, authz.ReasonKey, ""))
				time.Sleep(time.Minute)
				stop()
				if len(store.counts) != tt.want || !store.lastUsed(k.ID).Equal(at) {
					t.Errorf("counted %v, last used %v", store.counts, store.lastUsed(k.ID))
				}
			})
		})
	}
}

// TestNothingIsLostBetweenWriters counts from many goroutines while counts are taken.
func TestNothingIsLostBetweenWriters(t *testing.T) {
	store := newMemory()
	synctest.Test(t, func(t *testing.T) {
		c, _, stop := start(t, store, usage.Config{})
		const goroutines, rounds = 8, 2000
		var all sync.WaitGroup
		for g := range goroutines {
			all.Go(func() {
				for n := range rounds {
					c.Decided(use(keyOf(byte(n%5), 1), authz.ReasonKey, "192.0.2.1"))
					c.Decided(use(nil, authz.ReasonBadChecksum, ""))
					time.Sleep(time.Duration(g) * 10 * time.Millisecond)
				}
			})
		}
		all.Wait()
		stop()
		var total, keys admin.UsageCounts
		for at, n := range store.counts {
			if strings.HasPrefix(at, "demo/"+apikey.ID{}.String()) && n.Reasons["bad_checksum"] > 0 {
				total.Add(n)
			} else {
				keys.Add(n)
			}
		}
		if want := int64(goroutines * rounds); total.Refused != want || total.Allowed+keys.Allowed != 2*want {
			t.Errorf("refused %d, allowed %d in all and %d by key, want %d", total.Refused, total.Allowed, keys.Allowed, want)
		}
	})
}

func BenchmarkDecided(b *testing.B) {
	c := usage.NewCounter(newMemory(), usage.Config{}, nil, slog.New(slog.DiscardHandler))
	for name, u := range map[string]authz.Use{
		"allowed": use(keyOf(7, 1), authz.ReasonKey, "192.0.2.1"),
		"refused": use(keyOf(7, 1), authz.ReasonLimitBurst, "192.0.2.1"),
		"unknown": use(nil, authz.ReasonUnknownKey, "192.0.2.1"),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				u.At = u.At.Add(1)
				c.Decided(u)
			}
		})
	}
}

// Whoever can write access logs can tell of a known key and another instance, or one that is not there. What was
// decided stays where the key is.
func TestAccessLogMovesNoDecisions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		c, _, stop := start(t, m, usage.Config{Instance: func(id string) *apikey.Instance {
			if id != "a" {
				return nil
			}
			return &apikey.Instance{ID: id}
		}})
		k := keyOf(1, 1)
		at := time.Now()
		c.Ended("made-up", k.ID, 200, 1, 1, time.Second)
		u := use(k, authz.ReasonKey, "192.0.2.1")
		u.InstanceID = "a"
		c.Decided(u)
		stop()
		for _, where := range []string{place("a", k.ID, at), place("a", apikey.ID{}, at)} {
			if got := m.counts[where]; got == nil || got.Allowed != 1 {
				t.Errorf("%s: got %+v, want 1 allowed", where, got)
			}
		}
	})
}

// Sums of what an access log tells stay at the most there is, and never become negative.
func TestEndedSumsDoNotOverflow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		c, _, stop := start(t, m, usage.Config{})
		k, at := keyOf(1, 1), time.Now()
		for range 2 {
			for range 3 {
				c.Ended("demo", k.ID, 200, math.MaxInt64/2, math.MaxInt64/2, math.MaxInt64/2)
			}
			time.Sleep(30 * time.Second) // and once more where they are added up
		}
		stop()
		got := m.counts[place("demo", k.ID, at)]
		if want := (admin.EndedRequests{
			Count: 6, Status: [6]int64{2: 6}, RequestBytes: math.MaxInt64, ResponseBytes: math.MaxInt64, Duration: math.MaxInt64, Longest: math.MaxInt64 / 2,
		}); got == nil || got.Ended != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	})
}
