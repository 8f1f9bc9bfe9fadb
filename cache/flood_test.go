package cache

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/cache/cachetest"
	"keyward/limits"
	"keyward/limits/local"
)

// factsOf is a cache as the authorizer sees it.
type factsOf struct{ *Cache }

func (factsOf) LastUsed(context.Context, apikey.ID) (time.Time, error) { return time.Time{}, nil }

// nobody hears of uses and re-digesting.
type nobody struct{}

func (nobody) Decided(authz.Use)           {}
func (nobody) Last(apikey.ID) time.Time    { return time.Time{} }
func (nobody) Redigest(_, _ apikey.Digest) {}

// heapInUse returns what is left after garbage collection.
func heapInUse() (bytes int64) {
	var m runtime.MemStats
	for range 3 { // the first lets go of what pools hold, the second of what they held before
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// within returns how many requests a rate admits in a time, at most.
func within(r limits.Rate) func(time.Duration) int {
	return func(elapsed time.Duration) int { return int(r.Burst) + int(elapsed/r.Interval) }
}

// TestFlood sends a million secrets that nobody has, each another one, at 50,000 a second of virtual time,
// and beside every 25 of them a request with a good key, through the authorizer, the cache and local
// limits. The store is read within the budget, memory stays within its bound, and nobody with a good key
// notices.
func TestFlood(t *testing.T) {
	const (
		workers, step = 8, 100 // requests of a worker between two sleeps
		pause         = 16 * time.Millisecond
		good          = 2000 // keys; not all of them are in memory when the flood comes

		// Bytes that may be in use afterwards and were not before: for each good key that was read
		// meanwhile and each digest remembered as unknown what Config says; for each source that was let
		// through, a place in an LRU; and slack for the runtime and the test. What is refused leaves nothing.
		slack, perKey, perUnknown, perSource = 256 << 10, 450, 200, 200
	)
	none := func(time.Duration) int { return 0 }
	total, one := within(Config{}.withDefaults().MissesTotal), within(Config{}.withDefaults().MissesPerSource)
	for _, tt := range []struct {
		name     string
		requests int
		garbage  bool // with a wrong checksum
		stale    bool // the set of known digests is being read anew: it cannot tell what does not exist
		away     bool // and the store cannot be read
		sources  int
		reads    func(elapsed time.Duration) int // of secrets that nobody has
	}{
		{name: "the set of known digests is fresh", requests: 1_000_000, sources: 1 << 20, reads: none},
		{name: "garbage", requests: 1_000_000, garbage: true, stale: true, sources: 1 << 20, reads: none},
		{name: "the set is not fresh", requests: 1_000_000, stale: true, sources: 1 << 20, reads: total},
		{name: "the set is not fresh, one source", requests: 500_000, stale: true, sources: 1, reads: one},
		{name: "the store is away", requests: 500_000, stale: true, away: true, sources: 1 << 20, reads: total},
	} {
		t.Run(tt.name, func(t *testing.T) {
			store := cachetest.NewStore()
			peppers := apikey.Peppers{Current: apikey.NewPepper(1, false)}
			store.PutInstance(&apikey.Instance{ID: "demo"})
			secrets := make([]string, good)
			for n := range secrets {
				secrets[n] = apikey.Format{}.New(apikey.KindInstance).Reveal()
				k := key(n)
				k.Type, k.Generation, k.Generations = apikey.TypeInstance, 1, []apikey.Generation{{Number: 1}}
				k.Limits = apikey.Limits{Rate: apikey.Rate{Requests: 1000, Per: apikey.Duration(time.Second)}, Burst: 1000, MaxConcurrent: apikey.Unlimited}
				store.Put(k, peppers.Current.Digest(secrets[n]))
			}
			bubble(t, store, Config{Records: 10_000}, func(t *testing.T, c *Cache) {
				a, err := authz.New(authz.Config{}, factsOf{c}, local.New(local.Config{}, nil), peppers, nobody{}, nobody{})
				if err != nil {
					t.Fatal(err)
				}
				ask := func(r *authz.Request, secret string, source int) (authz.Outcome, error) {
					r.Reset()
					r.Method, r.Path = "GET", "/"
					r.Peer = netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 10<<24+uint32(source)))).String()
					r.Headers = append(r.Headers, authz.Pair{Name: "x-api-key", Value: secret})
					var d authz.Decision
					ok, err := a.Try(r, &d)
					if !ok {
						err = a.Decide(t.Context(), r, &d)
					}
					return d.Outcome(), err
				}
				if tt.stale {
					defer rebuilding(t, store, c)()
				}
				warm := good / 2
				if tt.away {
					warm = good
				}
				for n := range warm {
					if got, err := ask(new(authz.Request), secrets[n], 0); err != nil || got != authz.Allowed {
						t.Fatalf("got %v, %v", got, err)
					}
				}
				if tt.away {
					store.OnAnswer(func(_ context.Context, call string) error {
						if call == "FindKey" {
							return errAway
						}
						return nil
					})
				}

				before, readBefore, start := heapInUse(), store.Calls("FindKey"), time.Now()
				var allowed, unknown, busy, failed atomic.Int64
				var all sync.WaitGroup
				for w := range workers {
					all.Go(func() {
						r := new(authz.Request)
						for i := range trials(tt.requests) / workers {
							n := i*workers + w
							secret := apikey.Format{}.New(apikey.KindInstance).Reveal()
							if tt.garbage {
								secret = secret[:10] + string(secret[10]^1) + secret[11:] // another character, of our alphabet or not
							}
							switch got, err := ask(r, secret, n%tt.sources); {
							case err == nil && got == authz.Unauthenticated:
								unknown.Add(1)
							case errors.Is(err, errBusy):
								busy.Add(1)
							case errors.Is(err, apikey.ErrUndecided) && tt.away:
								failed.Add(1)
							default:
								t.Errorf("a secret that nobody has: got %v, %v", got, err)
								return
							}
							if n%25 == 0 {
								if got, err := ask(r, secrets[n/25%good], n%tt.sources); err != nil || got != authz.Allowed {
									t.Errorf("a good key: got %v, %v", got, err)
									return
								}
								allowed.Add(1)
							}
							if i%step == step-1 {
								time.Sleep(pause)
							}
						}
					})
				}
				all.Wait()
				synctest.Wait()
				elapsed := time.Since(start)
				grown, reads := heapInUse()-before, store.Calls("FindKey")-readBefore

				// Each good key that was not in memory is read once, whatever the budget.
				budget, cold := tt.reads(elapsed), good-warm
				if reads > budget+cold || reads < cold {
					t.Errorf("%d reads in %v, want %d of the budget and %d good keys", reads, elapsed, budget, cold)
				}
				bound := slack + cold*perKey + min(budget, c.cfg.Unknown)*perUnknown + min(budget, tt.sources, budgetSources)*perSource
				if grown > int64(bound) {
					t.Errorf("%d bytes more are in use, want at most %d", grown, bound)
				}
				// Only what the store said is remembered, never that it could not be asked.
				remembered := reads - cold
				if tt.away {
					remembered = 0
				}
				if n := c.records.unknown.Len(); n != remembered {
					t.Errorf("%d digests are remembered as unknown, want the %d that the store did not find", n, remembered)
				}
				if allowed.Load() < int64(cold) || busy.Load() > 0 != (budget > 0) || failed.Load() > 0 != tt.away {
					t.Error("the test proves nothing: it saw none of what it is about")
				}
				t.Logf("%d unknown, %d put off, %d failed, %d good ones allowed in %v; %d reads of at most %d; %d KiB more in use, of at most %d",
					unknown.Load(), busy.Load(), failed.Load(), allowed.Load(), elapsed, reads, budget+cold, grown>>10, bound>>10)
			})
		})
	}
}
