package local

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"keyward/limits"
)

// TestExactInAStorm sends hundreds of callers at once at random mixes of a total, a key's rate, its quota and
// its running requests, and holds what came of it to the promises of DESIGN §11 (P5, P7, P8): in any window
// at most burst + rate·w and a quota's limit, never more running than the limit, and not a nanosecond or a
// unit of any limit's state spent by a refusal.
//
// In a bubble the clock stands still while anybody runs, so a caller reads the very time that the limiter
// judged it by: there is no slack.
func TestExactInAStorm(t *testing.T) {
	const people, totals, keys, rounds = 300, 3, 12, 5
	asks := 80
	if raceEnabled {
		asks /= 10
	}
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{}, nil)
		rateOf := func(c limits.Cell) limits.Rate {
			if c.Class == limits.ClassInstance {
				return limits.Rate{Interval: 700 * time.Microsecond, Burst: 40}
			}
			return limits.Rate{Interval: 2 * time.Millisecond, Burst: 7}
		}
		quota := limits.Quota{Limit: 14, Window: 30 * time.Millisecond}
		limitOf := func(key uint64) int64 { return 1 + int64(key%4) }

		var running [keys]atomic.Int64
		var refused [limits.ClassConcurrency + 1]atomic.Int64
		var requests atomic.Uint64
		var mu sync.Mutex
		admitted := map[limits.Cell][]int64{} // when, on the limiter's clock
		ask := func(dice *rand.Rand, wait time.Duration) (key uint64, lease limits.Lease, granted bool) {
			key = dice.Uint64N(keys)
			d := &limits.Demand{}
			for _, cell := range []limits.Cell{cellOf(1000+key%totals, limits.ClassInstance), cellOf(key, limits.ClassBurst)} {
				if dice.IntN(4) > 0 {
					d.Rates = append(d.Rates, limits.RateDemand{Cell: cell, Rate: rateOf(cell)})
				}
			}
			if dice.IntN(2) == 0 {
				slices.Reverse(d.Rates)
			}
			if dice.IntN(4) > 0 {
				d.Quotas = []limits.QuotaDemand{quotaOf(key, quota)}
			}
			if dice.IntN(4) > 0 {
				d.Lease = limits.LeaseDemand{Lease: leaseOf(key, requests.Add(1)), Limit: limitOf(key), Wait: wait}
			}
			got, err := l.Take(t.Context(), d)
			if err != nil {
				t.Error(err)
				return key, lease, false
			}
			if !got.Allowed {
				refused[got.Class].Add(1)
				return key, lease, false
			}
			now := l.now()
			mu.Lock()
			defer mu.Unlock()
			for _, r := range d.Rates {
				admitted[r.Cell] = append(admitted[r.Cell], now)
			}
			for _, q := range d.Quotas {
				admitted[q.Cell] = append(admitted[q.Cell], now)
			}
			return key, d.Lease.Lease, d.Lease.Limit > 0
		}
		for round := range uint64(rounds) {
			var all sync.WaitGroup
			for person := range uint64(people) {
				all.Go(func() {
					dice := rand.New(rand.NewPCG(person, rand.Uint64()))
					for range asks {
						// Many wake up at the same time.
						time.Sleep(time.Duration(dice.IntN(40)) * 500 * time.Microsecond)
						key, lease, granted := ask(dice, time.Duration(max(0, dice.IntN(10)-6))*time.Millisecond)
						if !granted {
							continue
						}
						// Counted from after the grant to before the end: what is counted runs.
						if n := running[key].Add(1); n > limitOf(key) {
							t.Errorf("key %d: %d run at once, want at most %d", key, n, limitOf(key))
						}
						time.Sleep(time.Duration(dice.IntN(4)) * time.Millisecond)
						running[key].Add(-1)
						mustEnd(t, l, endings(limits.CauseLog, lease)...)
					}
				})
			}
			all.Wait()
			// All at one instant, after which nothing comes back before the states are looked at.
			var left []limits.Lease
			var last sync.Mutex
			for person := range uint64(people) {
				all.Go(func() {
					if _, lease, granted := ask(rand.New(rand.NewPCG(person, round)), 0); granted {
						last.Lock()
						defer last.Unlock()
						left = append(left, lease)
					}
				})
			}
			all.Wait()
			for cell, times := range admitted {
				slices.Sort(times)
				// The state is that of a limiter that only ever saw what passed.
				full, now := int64(0), l.now()
				if cell.Class == limits.ClassKeyQuota {
					used := int64(0)
					for _, at := range times {
						if at+int64(quota.Window) > now {
							used++
						}
					}
					if got := mustLook(t, l, demandQuotas(limits.QuotaDemand{Cell: cell, Quota: quota}))[0]; got.Used != used {
						t.Errorf("%d units used, want %d: a refusal was in it", got.Used, used)
					}
					continue
				}
				for _, at := range times {
					full, _ = rateOf(cell).Take(full, at)
				}
				if got := stateOf(l, cell, now).full; got != max(full, now) {
					t.Errorf("full again at %v, want %v: a refusal was in it", time.Duration(got), time.Duration(full))
				}
			}
			if n := whole(t, l); n != len(left) {
				t.Errorf("%d leases live, want the %d of those who were let in last", n, len(left))
			}
			mustEnd(t, l, endings(limits.CauseLog, left...)...)
		}
		for cell, times := range admitted {
			if cell.Class != limits.ClassKeyQuota {
				wantWindows(t, rateOf(cell), times)
				continue
			}
			for i := range times[min(quota.Limit, int64(len(times))):] {
				if took := times[int64(i)+quota.Limit] - times[i]; took < int64(quota.Window) {
					t.Fatalf("%d passed in %v, want at most %d in %v", quota.Limit+1, time.Duration(took), quota.Limit, quota.Window)
				}
			}
		}
		t.Logf("refused by the total %d times, by the quota %d, by the burst %d, by concurrency %d", refused[limits.ClassInstance].Load(),
			refused[limits.ClassKeyQuota].Load(), refused[limits.ClassBurst].Load(), refused[limits.ClassConcurrency].Load())
		for _, class := range []limits.Class{limits.ClassInstance, limits.ClassKeyQuota, limits.ClassBurst, limits.ClassConcurrency} {
			if refused[class].Load() < int64(rounds*asks) {
				t.Errorf("class %d refused %d times: too rarely to prove anything", class, refused[class].Load())
			}
		}
	})
}

// wantWindows looks at every window that begins and ends with one of the times, which are sorted: what
// passed in it is at most the burst and what the rate earns.
func wantWindows(t *testing.T, rate limits.Rate, times []int64) {
	t.Helper()
	for i := range times {
		for j := i; j < len(times); j++ {
			if n, most := int64(j-i+1), rate.Burst+(times[j]-times[i])/int64(rate.Interval); n > most {
				t.Fatalf("%d passed in %v, want at most %d under %+v", n, time.Duration(times[j]-times[i]), most, rate)
			}
		}
	}
}

// A state is what a cell says at a time: one that is not there says the same as one that is idle.
type state struct {
	full int64
	live int32
}

func stateOf(l *Limiter, c limits.Cell, now int64) state {
	s := &l.shards[l.shardOf(&c)]
	s.mu.Lock()
	defer s.mu.Unlock()
	got := state{full: now}
	if at, ok := s.index[c]; ok {
		got = state{max(s.slots[at].full, now), s.slots[at].live}
	}
	return got
}

// TestRefusalLeavesEverythingAsItWas: whatever mix of limits refuses, and whichever of them it is, every
// cell of the demand says afterwards what it said before.
func TestRefusalLeavesEverythingAsItWas(t *testing.T) {
	demands := 200_000
	if raceEnabled {
		demands /= 10
	}
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{}, nil)
		seed := rand.Uint64()
		dice := rand.New(rand.NewPCG(seed, 0))
		var running []limits.Lease
		var refusals [limits.ClassConcurrency + 1]int
		for n := range uint64(demands) {
			if dice.IntN(3) == 0 {
				time.Sleep(time.Duration(dice.IntN(2000)) * time.Microsecond)
			}
			if dice.IntN(4) > 0 && len(running) > 0 {
				i := dice.IntN(len(running))
				mustEnd(t, l, endings(limits.CauseLog, running[i])...)
				running = slices.Delete(running, i, i+1)
			}
			key := dice.Uint64N(6)
			lease := leaseOf(key, n)
			d := &limits.Demand{Rates: []limits.RateDemand{
				{Cell: cellOf(1000+key%2, limits.ClassInstance), Rate: limits.Rate{Interval: 5 * time.Millisecond, Burst: 4}},
				{Cell: cellOf(key, limits.ClassBurst), Rate: limits.Rate{Interval: 3 * time.Millisecond, Burst: 2}},
			}}
			d.Rates = d.Rates[dice.IntN(3):]
			if dice.IntN(2) == 0 {
				d.Quotas = []limits.QuotaDemand{quotaOf(key, limits.Quota{Limit: 3, Window: 10 * time.Millisecond})}
				d.Quotas[0].Cost = 1 + dice.Int64N(3)
			}
			if dice.IntN(3) == 0 || len(d.Rates) == 0 {
				d.Lease = limits.LeaseDemand{Lease: lease, Limit: 1 + int64(key%2)}
			}
			cells := []limits.Cell{lease.Cell}
			for _, r := range d.Rates {
				cells = append(cells, r.Cell)
			}
			look := func() (all []state) {
				for _, c := range cells {
					all = append(all, stateOf(l, c, l.now()))
				}
				return all
			}
			before, standings := look(), mustLook(t, l, &limits.Demand{Quotas: d.Quotas})
			got, ok := l.TryTake(d)
			if !ok {
				t.Fatal("TryTake did not decide")
			}
			if got.Allowed {
				if d.Lease.Limit > 0 {
					running = append(running, lease)
				}
				continue
			}
			refusals[got.Class]++
			if after := look(); !slices.Equal(before, after) || !slices.Equal(standings, mustLook(t, l, &limits.Demand{Quotas: d.Quotas})) {
				t.Fatalf("seed %d: %+v refused %+v: state was %+v, is %+v", seed, got, d, before, after)
			}
		}
		t.Logf("refusals: total %d, quota %d, burst %d, concurrency %d", refusals[limits.ClassInstance], refusals[limits.ClassKeyQuota],
			refusals[limits.ClassBurst], refusals[limits.ClassConcurrency])
		if least := min(refusals[limits.ClassInstance], refusals[limits.ClassKeyQuota], refusals[limits.ClassBurst], refusals[limits.ClassConcurrency]); least < demands/500 {
			t.Errorf("a limit refused only %d times of %d", least, demands)
		}
	})
}

// TestWindowsHoldOnTheRealClock is the storm on a clock that does not wait for anybody. When the limiter
// read its clock is not to be seen from outside, only that it was between the call and the answer: so
// what is counted in a window is what began and was answered within it. That is a little less than what
// passed in it, by the calls under way at its edges; nothing is allowed for beyond that.
func TestWindowsHoldOnTheRealClock(t *testing.T) {
	const people = 200
	rate := limits.Rate{Interval: 200 * time.Microsecond, Burst: 30}
	length := 1500 * time.Millisecond
	if raceEnabled {
		length /= 3
	}
	l := New(Config{}, nil)
	type span struct{ began, answered int64 }
	var mu sync.Mutex
	var passed []span
	var all sync.WaitGroup
	for range people {
		all.Go(func() {
			var mine []span
			d := demandOf(1, 1, rate)
			for l.now() < int64(length) {
				began := l.now()
				if got, ok := l.TryTake(d); ok && got.Allowed {
					mine = append(mine, span{began, l.now()})
				} else {
					time.Sleep(time.Duration(rand.IntN(int(3 * time.Millisecond))))
				}
			}
			mu.Lock()
			passed = append(passed, mine...)
			mu.Unlock()
		})
	}
	all.Wait()
	slices.SortFunc(passed, func(a, b span) int { return cmp.Compare(a.answered, b.answered) })
	for _, first := range passed {
		n := int64(0)
		for _, last := range passed {
			if last.began < first.began {
				continue
			}
			n++ // answered by last.answered, for they are sorted by that
			if most := rate.Burst + (last.answered-first.began)/int64(rate.Interval); n > most {
				t.Fatalf("%d passed in %v, want at most %d", n, time.Duration(last.answered-first.began), most)
			}
		}
	}
	t.Logf("%d passed in %v", len(passed), length)
	if int64(len(passed)) < rate.Burst {
		t.Errorf("only %d passed", len(passed))
	}
}
