package limitstest

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"keyward/limits"
)

// Sequences holds limiters to the [Oracle] over n random sequences of demands on quotas and rates: windows and
// calendars, costs, lockouts, limits in shadow, definitions that change. Every answer is that of the oracle.
//
// All is in testing/synctest bubbles, a new one before time runs out: a bubble's clock begins in 2000 and ends
// in 2262. open is called again and again.
func Sequences(t *testing.T, n int, open func(t *testing.T) Subject) {
	inBubbles(t, n, 10_000, func(t *testing.T, n int) {
		sequences(t, n, rand.Uint64(), func() *table { return newTable(open(t)) })
	})
}

func inBubbles(t *testing.T, n, atOnce int, run func(t *testing.T, n int)) {
	for ; n > 0 && !t.Failed(); n -= atOnce {
		synctest.Test(t, func(t *testing.T) { run(t, min(n, atOnce)) })
	}
}

func sequences(t failer, n int, seed uint64, fresh func() *table) {
	t.Helper()
	var s *table
	dice := rand.New(rand.NewPCG(seed, 0))
	begun := time.Time{}
	var allowed, refused, shadowed, locked int
	for i := range n {
		if s == nil || i%1000 == 0 {
			s = fresh()
			begun = s.Now()
		}
		var oracle Oracle
		cells := []limits.QuotaDemand{
			s.anyQuota(dice, limits.ClassGlobalQuota), s.anyQuota(dice, limits.ClassPrincipalQuota),
			s.anyQuota(dice, limits.ClassKeyQuota), s.anyQuota(dice, limits.ClassKeyQuota),
		}[:1+dice.IntN(4)]
		rate := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1+dice.Int64N(30), 1+dice.Int64N(4)), Shadow: dice.IntN(4) == 0}
		changing := dice.IntN(3) == 0
		for range 2 + dice.IntN(9) {
			if dice.IntN(3) == 0 {
				s.Advance(s.anyGap(dice))
			}
			var d limits.Demand
			if dice.IntN(4) == 0 {
				d.Rates = append(d.Rates, rate)
			}
			for j := range cells {
				if dice.IntN(3) == 0 {
					continue
				}
				if changing && dice.IntN(4) == 0 {
					cells[j].Quota = s.anyQuota(dice, 0).Quota
				}
				cells[j].Cost = 1
				if dice.IntN(3) == 0 {
					cells[j].Cost = dice.Int64N(5)
				}
				d.Quotas = append(d.Quotas, cells[j])
			}
			now := s.Now()
			want := oracle.Take(&d, int64(now.Sub(begun)), now)
			if got := s.take(t, &d); got != want {
				t.Fatalf("seed %d, sequence %d, %v after its limiter began, %+v: got %+v, want %+v", seed, i, now.Sub(begun), d, got, want)
			}
			switch {
			case !want.Allowed:
				refused++
				if len(d.Quotas) > 0 && want.Class != limits.ClassBurst && d.Quotas[want.Quota].Quota.Lockout == want.RetryAfter {
					locked++
				}
			case want.Shadowed != 0:
				shadowed++
			default:
				allowed++
			}
		}
	}
	if least := min(allowed, shadowed*10, refused, locked*10); least < n/3 {
		t.Fatalf("%d allowed, %d allowed in shadow, %d refused, %d lockouts of %d sequences: too few of one to prove anything",
			allowed, shadowed, refused, locked, n)
	}
}

// anyQuota draws a quota that is soon spent, of a cell that nobody has used.
func (s *table) anyQuota(dice *rand.Rand, class limits.Class) limits.QuotaDemand {
	q := limits.Quota{Limit: 1 + dice.Int64N(4), Window: time.Duration(1+dice.Int64N(40)) * s.Resolution}
	switch dice.IntN(8) {
	case 0:
		q.Window, q.Period = 0, limits.Day
	case 1:
		q.Window, q.Period = 0, limits.Month
	case 2:
		q.Window = time.Duration(1+dice.Int64N(40)) * time.Hour
	}
	if dice.IntN(3) == 0 {
		q.Lockout = time.Duration(1+dice.Int64N(60)) * s.Resolution
	}
	return limits.QuotaDemand{Cell: s.cell(class), Quota: q, Cost: 1, Shadow: dice.IntN(5) == 0}
}

func (s *table) anyGap(dice *rand.Rand) time.Duration {
	switch dice.IntN(20) {
	case 0:
		return time.Duration(dice.Int64N(30)) * time.Hour
	case 1:
		now := s.Now().UTC()
		return now.Truncate(24 * time.Hour).Add(24 * time.Hour).Sub(now) // to midnight, where days change
	case 2:
		return time.Duration(dice.Int64N(40*24)) * time.Hour
	}
	return time.Duration(dice.Int64N(40)) * s.Resolution
}

// window returns a quota of so many steps of Resolution.
func (s *table) window(limit, steps int64) limits.Quota {
	return limits.Quota{Limit: limit, Window: time.Duration(steps) * s.Resolution}
}

// quota asks for one unit of a quota of a class, of a cell that nobody has used.
func (s *table) quota(class limits.Class, q limits.Quota) limits.QuotaDemand {
	return limits.QuotaDemand{Cell: s.cell(class), Quota: q, Cost: 1}
}

func asks(quotas ...limits.QuotaDemand) *limits.Demand {
	return &limits.Demand{Quotas: slices.Clone(quotas)}
}

// wantUnits says how many more units a quota has at this instant, and spends them.
func (s *table) wantUnits(t failer, q limits.QuotaDemand, want int) {
	t.Helper()
	q.Cost = 1
	for got := range want {
		if !s.take(t, asks(q)).Allowed {
			t.Fatalf("%d units left, want %d", got, want)
		}
	}
	if got := s.take(t, asks(q)); got.Allowed {
		t.Fatalf("more than %d units left", want)
	}
}

func (s *table) look(t failer, d *limits.Demand) []limits.Standing {
	t.Helper()
	standings, err := s.Limiter.Look(context.Background(), d, nil)
	if err != nil {
		t.Fatalf("look: %v", err)
	}
	return standings
}

func quotaAdmitsItsLimit(t failer, s *table) {
	q := s.quota(limits.ClassKeyQuota, s.window(5, 1000))
	for range 5 {
		s.wantAllowed(t, asks(q))
	}
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 1000*s.Resolution)
	s.Advance(999 * s.Resolution)
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, s.Resolution)
	s.Advance(s.Resolution)
	s.wantUnits(t, q, 5)
	other := q
	other.Cell = s.cell(limits.ClassKeyQuota)
	s.wantUnits(t, other, 5) // partitions share nothing
	s.wantAllowed(t, asks(limits.QuotaDemand{Cell: q.Cell}))
}

// Every unit counts for exactly the window.
func quotaSlides(t failer, s *table) {
	q := s.quota(limits.ClassKeyQuota, s.window(1024, 1024*10))
	for range 1024 {
		s.wantAllowed(t, asks(q))
		s.Advance(10 * s.Resolution)
	}
	for range 2000 {
		// The first one of the window is just over.
		s.wantAllowed(t, asks(q))
		s.wantRefused(t, asks(q), limits.ClassKeyQuota, 10*s.Resolution)
		s.Advance(9 * s.Resolution)
		s.wantRefused(t, asks(q), limits.ClassKeyQuota, s.Resolution)
		s.Advance(s.Resolution)
	}
}

// A cost is so many units at one instant.
func quotaCosts(t failer, s *table) {
	q := s.quota(limits.ClassKeyQuota, s.window(10, 1000))
	q.Quota.Lockout = 7 * s.Resolution
	costs := func(units int64) *limits.Demand {
		q := q
		q.Cost = units
		return asks(q)
	}
	s.wantRefused(t, costs(11), limits.ClassKeyQuota, limits.Never) // and nobody is locked out for it
	s.wantAllowed(t, costs(4))
	s.Advance(100 * s.Resolution)
	s.wantAllowed(t, costs(3))
	s.Advance(100 * s.Resolution)
	s.wantAllowed(t, costs(2))
	q.Quota.Lockout = 0
	s.wantRefused(t, costs(2), limits.ClassKeyQuota, 800*s.Resolution)
	s.wantRefused(t, costs(5), limits.ClassKeyQuota, 800*s.Resolution)
	s.wantRefused(t, costs(6), limits.ClassKeyQuota, 900*s.Resolution)
	s.wantRefused(t, costs(9), limits.ClassKeyQuota, 1000*s.Resolution)
	s.wantRefused(t, costs(11), limits.ClassKeyQuota, limits.Never)
	s.wantAllowed(t, costs(0)) // as 1
	s.wantRefused(t, costs(1), limits.ClassKeyQuota, 800*s.Resolution)
	s.Advance(800 * s.Resolution)
	s.wantAllowed(t, costs(4))
	s.wantRefused(t, costs(-3), limits.ClassKeyQuota, 100*s.Resolution)
}

// 120 in 60 s with a lockout of 60 s, as FoundationaLLM documents it.
func quotaOfTwentySeconds(t failer, s *table) {
	q := s.quota(limits.ClassPrincipalQuota, limits.Quota{Limit: 40, Window: 20 * time.Second, Lockout: 60 * time.Second})
	for range 40 {
		s.wantAllowed(t, asks(q))
	}
	s.wantRefused(t, asks(q), limits.ClassPrincipalQuota, 60*time.Second)
	s.Advance(59_900 * time.Millisecond)
	s.wantRefused(t, asks(q), limits.ClassPrincipalQuota, 100*time.Millisecond)
	s.Advance(100 * time.Millisecond)
	s.wantUnits(t, q, 40)
	other := s.quota(limits.ClassPrincipalQuota, q.Quota)
	s.wantUnits(t, other, 40) // of another principal
	one := s.quota(limits.ClassPrincipalQuota, limits.Quota{Limit: 1, Window: 20 * time.Second})
	s.wantAllowed(t, asks(one))
	s.wantRefused(t, asks(one), limits.ClassPrincipalQuota, 20*time.Second)
}

func lockoutNeitherCountsNorIsExtended(t failer, s *table) {
	q := s.quota(limits.ClassKeyQuota, s.window(3, 1000))
	q.Quota.Lockout = 5000 * s.Resolution
	s.wantUnits(t, q, 3)
	for left := int64(5000); left > 0; left -= 100 {
		s.wantRefused(t, asks(q), limits.ClassKeyQuota, time.Duration(left)*s.Resolution)
		s.Advance(100 * s.Resolution)
	}
	s.wantUnits(t, q, 3)
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 5000*s.Resolution)
}

// What was counted is forgotten when the lockout begins.
func lockoutShorterThanItsWindow(t failer, s *table) {
	q := s.quota(limits.ClassKeyQuota, s.window(3, 1000))
	q.Quota.Lockout = 10 * s.Resolution
	s.wantUnits(t, q, 3)
	s.Advance(9 * s.Resolution)
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, s.Resolution)
	s.Advance(s.Resolution)
	s.wantUnits(t, q, 3)
}

func onlyTheReportedQuotaLocks(t failer, s *table) {
	short := s.quota(limits.ClassGlobalQuota, s.window(2, 1000))
	short.Quota.Lockout = 2000 * s.Resolution
	long := s.quota(limits.ClassKeyQuota, s.window(2, 1500))
	long.Quota.Lockout = 3000 * s.Resolution
	s.wantAllowed(t, asks(short, long))
	s.wantAllowed(t, asks(short, long))
	want := limits.Decision{Class: limits.ClassKeyQuota, Quota: 1, RetryAfter: 3000 * s.Resolution}
	if got := s.take(t, asks(short, long)); got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	// The other one still counts what it did, and is not locked.
	if got := s.look(t, asks(short))[0]; got.Used != 2 || got.LockedFor != 0 {
		t.Fatalf("a quota that was not reported stands at %+v", got)
	}
	s.Advance(1000 * s.Resolution)
	s.wantAllowed(t, asks(short))
	// Where another sort of limit is reported, none locks.
	s.Advance(3000 * s.Resolution)
	rate := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(9000, 1)}
	all := asks(short, long)
	all.Rates = append(all.Rates, rate)
	s.wantAllowed(t, all)
	s.wantAllowed(t, asks(short, long))
	s.wantRefused(t, all, limits.ClassBurst, 9000*s.Resolution)
	for _, standing := range s.look(t, asks(short, long)) {
		if standing.LockedFor != 0 || standing.Used != 2 {
			t.Fatalf("a rate was reported, and a quota stands at %+v", standing)
		}
	}
	// A lockout that begins is not the whole wait where another limit refuses for longer than that.
	brief := s.quota(limits.ClassGlobalQuota, s.window(1, 1000))
	brief.Quota.Lockout = 10 * s.Resolution
	other := s.quota(limits.ClassKeyQuota, s.window(1, 500))
	s.wantAllowed(t, asks(brief, other))
	s.wantRefused(t, asks(brief, other), limits.ClassGlobalQuota, 500*s.Resolution)
	s.Advance(500 * s.Resolution)
	s.wantAllowed(t, asks(brief, other))
}

func changedLockoutClamps(t failer, s *table) {
	q := s.quota(limits.ClassKeyQuota, s.window(1, 10))
	q.Quota.Lockout = 5000 * s.Resolution
	s.wantUnits(t, q, 1)
	q.Quota.Lockout = 100 * s.Resolution
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 100*s.Resolution)
	s.Advance(99 * s.Resolution)
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, s.Resolution)
	q.Quota.Lockout = 0
	s.wantUnits(t, q, 1)
}

// A refusal spends nothing, whichever limit refuses and wherever the others stand.
func allOrNothingWithQuotas(t failer, s *table) {
	const limitsInAll = 5
	for refuses := range limitsInAll {
		d := demand()
		for i := range limitsInAll {
			if i == 0 || i == 4 {
				r := limits.RateDemand{Cell: s.cell(limits.Class(1 + i)), Rate: s.rate(1000, 3)}
				if i == refuses {
					r.Rate.Burst = 1
				}
				d.Rates = append(d.Rates, r)
				continue
			}
			q := s.quota(limits.Class(1+i), s.window(3, 1000))
			if i == refuses {
				q.Quota.Limit = 1
			}
			d.Quotas = append(d.Quotas, q)
		}
		s.wantAllowed(t, d)
		for range 10 {
			got := s.take(t, d)
			got.Quota = 0
			if want := (limits.Decision{Class: limits.Class(1 + refuses), RetryAfter: 1000 * s.Resolution}); got != want {
				t.Fatalf("got %+v, want %+v", got, want)
			}
		}
		for _, r := range d.Rates {
			if r.Rate.Burst > 1 {
				s.wantLeft(t, r, 2)
			}
		}
		for _, q := range d.Quotas {
			if q.Quota.Limit > 1 {
				s.wantUnits(t, q, 2)
			}
		}
	}
}

func tiesOfQuotas(t failer, s *table) {
	window := s.window(1, 1000)
	d := asks(s.quota(limits.ClassKeyQuota, window), s.quota(limits.ClassKeyQuota, window),
		s.quota(limits.ClassPrincipalQuota, window), s.quota(limits.ClassGlobalQuota, window), s.quota(limits.ClassGlobalQuota, window))
	d.Rates = []limits.RateDemand{{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1000, 1)}}
	s.wantAllowed(t, d)
	for _, want := range []struct {
		class limits.Class
		quota int
	}{{limits.ClassGlobalQuota, 3}, {limits.ClassGlobalQuota, 3}, {limits.ClassPrincipalQuota, 2}, {limits.ClassKeyQuota, 0}, {limits.ClassKeyQuota, 0}} {
		if got := s.take(t, d); got != (limits.Decision{Class: want.class, Quota: want.quota, RetryAfter: 1000 * s.Resolution}) {
			t.Fatalf("got %+v, want %+v", got, want)
		}
		d.Quotas = d.Quotas[:len(d.Quotas)-1]
	}
	s.wantRefused(t, d, limits.ClassBurst, 1000*s.Resolution)
}

func quotaAndRateShareNoCell(t failer, s *table) {
	q := s.quota(limits.ClassKeyQuota, s.window(1, 1000))
	both := asks(q)
	both.Rates = []limits.RateDemand{{Cell: q.Cell, Rate: s.rate(1000, 1)}}
	for _, d := range []*limits.Demand{both, asks(q, q)} {
		if decision, ok := s.Limiter.TryTake(d); ok {
			t.Fatalf("TryTake decided a demand that names a cell twice: %+v", decision)
		}
		if _, err := s.Limiter.Look(context.Background(), d, nil); err == nil {
			t.Fatalf("Look answered a demand that names a cell twice")
		}
	}
	s.wantUnits(t, q, 1)
}

// midnight advances to when the next day begins, but for some time.
func (s *table) midnight(less time.Duration) {
	now := s.Now().UTC()
	next := now.Truncate(24 * time.Hour).Add(24 * time.Hour)
	for next.Sub(now) < less {
		next = next.Add(24 * time.Hour)
	}
	s.Advance(next.Sub(now) - less)
}

func calendarDays(t failer, s *table) {
	q := s.quota(limits.ClassGlobalQuota, limits.Quota{Limit: 3, Period: limits.Day})
	s.midnight(time.Hour)
	s.wantAllowed(t, asks(q))
	s.Advance(30 * time.Minute)
	s.wantUnits(t, q, 2)
	s.wantRefused(t, asks(q), limits.ClassGlobalQuota, 30*time.Minute)
	s.Advance(30*time.Minute - s.Resolution)
	s.wantRefused(t, asks(q), limits.ClassGlobalQuota, s.Resolution)
	s.Advance(s.Resolution)
	s.wantUnits(t, q, 3)
	s.wantRefused(t, asks(q), limits.ClassGlobalQuota, 24*time.Hour)
	s.Advance(24*time.Hour + 5*time.Hour)
	s.wantUnits(t, q, 3)
	s.wantRefused(t, asks(q), limits.ClassGlobalQuota, 19*time.Hour)
}

func calendarMonths(t failer, s *table) {
	q := s.quota(limits.ClassGlobalQuota, limits.Quota{Limit: 2, Period: limits.Month})
	for range 14 {
		now := s.Now().UTC()
		next := time.Date(now.Year(), now.Month()+1, 1, 0, 0, 0, 0, time.UTC)
		s.wantUnits(t, q, 2)
		s.wantRefused(t, asks(q), limits.ClassGlobalQuota, next.Sub(now))
		s.Advance(next.Sub(now) - s.Resolution)
		s.wantRefused(t, asks(q), limits.ClassGlobalQuota, s.Resolution)
		s.Advance(s.Resolution)
	}
}

// Above 1,024 units a quota may count a unit for up to a hundredth of the window longer: it never admits more
// than its limit in any window, and refuses only what has no room in a window that is so much longer.
func manyUnitsInHundredths(t failer, s *table) {
	dice := rand.New(rand.NewPCG(5, 5))
	for _, steps := range []int64{100_000, 99_999, 250, 5_000_000} {
		q := s.quota(limits.ClassGlobalQuota, s.window(1500, steps))
		grain := q.Quota.Window / 100
		type spent struct{ at, units int64 }
		var log []spent
		now, refused := int64(0), 0
		within := func(window time.Duration) (n int64) {
			for i := len(log) - 1; i >= 0 && log[i].at+int64(window) > now; i-- {
				n += log[i].units
			}
			return n
		}
		for range 6000 {
			gap := time.Duration(dice.Int64N(steps/300+2)) * s.Resolution
			s.Advance(gap)
			now += int64(gap)
			q.Cost = 1 + dice.Int64N(15)
			got := s.take(t, asks(q))
			if got.Allowed {
				log = append(log, spent{now, q.Cost})
				if n := within(q.Quota.Window); n > q.Quota.Limit {
					t.Fatalf("%d units in a window of %v, want at most %d", n, q.Quota.Window, q.Quota.Limit)
				}
				continue
			}
			refused++
			if n := within(q.Quota.Window + grain); n+q.Cost <= q.Quota.Limit {
				t.Fatalf("%d units refused where %d are in a window of %v and a hundredth: limit %d", q.Cost, n, q.Quota.Window, q.Quota.Limit)
			}
			if refused%10 == 0 {
				s.Advance(got.RetryAfter - s.Resolution)
				s.wantRefused(t, asks(q), limits.ClassGlobalQuota, s.Resolution)
				s.Advance(s.Resolution)
				s.wantAllowed(t, asks(q))
				now += int64(got.RetryAfter)
				log = append(log, spent{now, q.Cost})
			}
		}
		if refused < 100 {
			t.Fatalf("%d refusals: too few to prove anything", refused)
		}
	}
}

func changedQuotaKeepsItsCount(t failer, s *table) {
	q := s.quota(limits.ClassKeyQuota, s.window(5, 1000))
	s.wantUnits(t, q, 5)
	q.Quota.Limit = 8 // raised: what was spent stays spent
	s.Advance(100 * s.Resolution)
	s.wantUnits(t, q, 3)
	q.Quota.Limit = 2 // lowered: six of eight must be over first
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 1000*s.Resolution)
	q.Quota.Limit = 4
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 900*s.Resolution)
	s.Advance(900 * s.Resolution)
	s.wantUnits(t, q, 1)
}

func changedWindow(t failer, s *table) {
	q := s.quota(limits.ClassKeyQuota, s.window(4, 1000))
	s.wantAllowed(t, asks(q))
	s.Advance(400 * s.Resolution)
	s.wantAllowed(t, asks(q))
	// Longer: what still counted counts for longer.
	q.Quota.Window = 3000 * s.Resolution
	s.wantUnits(t, q, 2)
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 2600*s.Resolution)
	// Shorter: the first is over.
	q.Quota.Window = 400 * s.Resolution
	s.wantUnits(t, q, 1)
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 400*s.Resolution)
	// What the shorter one had forgotten does not come back.
	q.Quota.Window = 3000 * s.Resolution
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 3000*s.Resolution)
	q.Quota.Limit = 5
	s.wantUnits(t, q, 1)
}

func quotaBecomesCalendar(t failer, s *table) {
	q := s.quota(limits.ClassKeyQuota, limits.Quota{Limit: 6, Window: 48 * time.Hour})
	s.midnight(time.Hour)
	for range 3 {
		s.wantAllowed(t, asks(q))
	}
	s.Advance(2 * time.Hour)
	s.wantAllowed(t, asks(q))
	// What came yesterday is none of today's.
	q.Quota = limits.Quota{Limit: 6, Period: limits.Day}
	s.Advance(time.Hour)
	s.wantUnits(t, q, 5)
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 22*time.Hour)
	s.Advance(time.Hour)
	// When each of a day's units came is not known: as late as the last, all of them.
	q.Quota = limits.Quota{Limit: 6, Window: 5 * time.Hour}
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 4*time.Hour)
	q.Quota.Limit = 7
	s.wantUnits(t, q, 1)
	q.Quota = limits.Quota{Limit: 7, Period: limits.Month}
	s.wantUnits(t, q, 0)
}

// A quota that counted every unit counts many together, and the other way round: never less than it had.
func manyUnitsBecomeFew(t failer, s *table) {
	q := s.quota(limits.ClassKeyQuota, s.window(1024, 1_000_000))
	for range 1024 {
		s.wantAllowed(t, asks(q))
		s.Advance(100 * s.Resolution)
	}
	s.wantUnits(t, q, 0)
	q.Quota.Limit = 3000
	for range 1976 {
		s.wantAllowed(t, asks(q))
		s.Advance(100 * s.Resolution)
	}
	s.wantUnits(t, q, 0)
	q.Quota.Limit = 1024
	got := s.take(t, asks(q))
	// 1,977 units must be over first: the last of those came 102,300 steps ago, or up to a hundredth later.
	least := (1_000_000 - 102_400) * s.Resolution
	if got.Allowed || got.RetryAfter < least || got.RetryAfter > least+10_000*s.Resolution {
		t.Fatalf("got %+v, want a wait from %v on, and a hundredth of the window at most", got, least)
	}
	s.Advance(got.RetryAfter - s.Resolution)
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, s.Resolution)
	s.Advance(s.Resolution)
	s.wantAllowed(t, asks(q))
}

func shadowRefusesNothing(t failer, s *table) {
	r := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1000, 2), Shadow: true}
	q := s.quota(limits.ClassKeyQuota, s.window(3, 1000))
	q.Quota.Lockout, q.Shadow = 9000*s.Resolution, true
	other := s.quota(limits.ClassGlobalQuota, s.window(6, 1000))
	d := &limits.Demand{Rates: []limits.RateDemand{r}, Quotas: []limits.QuotaDemand{q, other}}
	const rate, quota = 1 << limits.ClassBurst, 1 << limits.ClassKeyQuota
	want := func(want limits.Decision) {
		t.Helper()
		if got := s.take(t, d); got != want {
			t.Fatalf("got %+v, want %+v", got, want)
		}
	}
	for _, shadowed := range []uint16{0, 0, rate, rate | quota, rate | quota, rate | quota} {
		want(limits.Decision{Allowed: true, Shadowed: shadowed})
	}
	want(limits.Decision{Class: limits.ClassGlobalQuota, Quota: 1, RetryAfter: 1000 * s.Resolution, Shadowed: rate | quota})
	// No lockout has begun, and what had no room was not spent.
	for _, standing := range s.look(t, d) {
		if standing.Class == limits.ClassKeyQuota && (standing.LockedFor != 0 || standing.Used != 3 || standing.RefusesFor != 1000*s.Resolution) {
			t.Fatalf("a quota in shadow stands at %+v", standing)
		}
	}
	s.Advance(1000 * s.Resolution)
	want(limits.Decision{Allowed: true})
	// Out of shadow they have counted like any other.
	d.Rates[0].Shadow, d.Quotas[0].Shadow = false, false
	s.wantRefused(t, &limits.Demand{Rates: d.Rates}, limits.ClassBurst, 1000*s.Resolution)
	s.wantUnits(t, d.Quotas[0], 2)
	// A lockout that began before goes on in shadow, and refuses nothing.
	d = asks(q)
	want(limits.Decision{Allowed: true, Shadowed: quota})
	s.Advance(8999 * s.Resolution)
	want(limits.Decision{Allowed: true, Shadowed: quota})
	s.Advance(s.Resolution)
	want(limits.Decision{Allowed: true})
}

func lookSpendsNothing(t failer, s *table) {
	r := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1000, 3)}
	q := s.quota(limits.ClassKeyQuota, s.window(3, 1000))
	q.Quota.Lockout = 50 * s.Resolution
	d := &limits.Demand{Rates: []limits.RateDemand{r, {Cell: s.cell(limits.ClassInstance)}}, Quotas: []limits.QuotaDemand{{Cell: s.cell(limits.ClassGlobalQuota)}, q}}
	want := func(want ...limits.Standing) {
		t.Helper()
		for range 3 {
			if got := s.look(t, d); !slices.Equal(got, want) {
				t.Fatalf("got %+v, want %+v", got, want)
			}
		}
	}
	want(limits.Standing{Class: limits.ClassBurst, Limit: 3, Remaining: 3},
		limits.Standing{Class: limits.ClassKeyQuota, Quota: 1, Limit: 3, Remaining: 3})
	s.wantAllowed(t, d)
	s.Advance(300 * s.Resolution)
	want(limits.Standing{Class: limits.ClassBurst, Limit: 3, Used: 1, Remaining: 2, ResetsIn: 700 * s.Resolution},
		limits.Standing{Class: limits.ClassKeyQuota, Quota: 1, Limit: 3, Used: 1, Remaining: 2, ResetsIn: 700 * s.Resolution})
	s.wantAllowed(t, d)
	s.wantAllowed(t, d)
	// Asked now, the quota would begin its lockout. Looking at it begins none.
	want(limits.Standing{Class: limits.ClassBurst, Limit: 3, Used: 3, ResetsIn: 2700 * s.Resolution, RefusesFor: 700 * s.Resolution},
		limits.Standing{Class: limits.ClassKeyQuota, Quota: 1, Limit: 3, Used: 3, ResetsIn: 1000 * s.Resolution, RefusesFor: 50 * s.Resolution, NoRoomFor: 700 * s.Resolution})
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 50*s.Resolution)
	want(limits.Standing{Class: limits.ClassBurst, Limit: 3, Used: 3, ResetsIn: 2700 * s.Resolution, RefusesFor: 700 * s.Resolution},
		limits.Standing{Class: limits.ClassKeyQuota, Quota: 1, Limit: 3, LockedFor: 50 * s.Resolution, RefusesFor: 50 * s.Resolution})
	// Looking with other numbers changes nothing either.
	other := q
	other.Quota = limits.Quota{Limit: 1, Window: s.Resolution}
	s.look(t, asks(other))
	s.wantRefused(t, asks(q), limits.ClassKeyQuota, 50*s.Resolution)
	every := s.quota(limits.ClassKeyQuota, s.window(3, 100_000))
	for range 3 {
		s.wantAllowed(t, asks(every))
		s.Advance(s.Resolution)
	}
	many := every
	many.Quota.Limit = 5000 // by hundredths
	s.look(t, asks(many))
	for range 3 {
		s.wantRefused(t, asks(every), limits.ClassKeyQuota, 99_997*s.Resolution)
		s.Advance(99_997 * s.Resolution)
		s.wantUnits(t, every, 1)
		s.Advance(s.Resolution)
		s.wantUnits(t, every, 1)
		s.Advance(s.Resolution)
		s.wantUnits(t, every, 1)
		s.Advance(s.Resolution)
	}
}

// As many as are said to be left pass, and not one more; and a refusal waits as long as it was said.
func lookSaysWhatTakeDoes(t failer, s *table) {
	dice := rand.New(rand.NewPCG(8, 8))
	for range 300 {
		q := s.anyQuota(dice, limits.ClassKeyQuota)
		q.Shadow = false
		for range 10 {
			s.Advance(s.anyGap(dice))
			q.Cost = 1 + dice.Int64N(q.Quota.Limit)
			before := s.look(t, asks(q))[0]
			got := s.take(t, asks(q))
			if got.Allowed != (before.Remaining > 0) || got.RetryAfter != before.RefusesFor {
				t.Fatalf("%+v was said to stand at %+v, and is answered %+v", q, before, got)
			}
			after := s.look(t, asks(q))[0]
			if got.Allowed && (after.Used != before.Used+q.Cost || after.Remaining != before.Remaining-1) {
				t.Fatalf("%+v stood at %+v, and after an allowance stands at %+v", q, before, after)
			}
		}
	}
}

// Whoever waits as long as it was told passes, if nobody else came, whatever limits refused.
func retryAfterIsTrueForAll(t failer, s *table) { s.retries(t, 1000, 3) }

// Retries waits out n refusals by rates and quotas of all sorts together.
func Retries(t *testing.T, n int, open func(t *testing.T) Subject) {
	inBubbles(t, n, 1000, func(t *testing.T, n int) { newTable(open(t)).retries(t, n, rand.Uint64()) })
}

func (s *table) retries(t failer, n int, seed uint64) {
	t.Helper()
	dice := rand.New(rand.NewPCG(seed, 1))
	for refused := 0; refused < n; {
		var d limits.Demand
		d.Rates = []limits.RateDemand{
			{Cell: s.cell(limits.ClassInstance), Rate: s.rate(1+dice.Int64N(50), 1+dice.Int64N(9))},
			{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1+dice.Int64N(50), 1+dice.Int64N(9))},
		}[:dice.IntN(3)]
		for class := limits.ClassGlobalQuota; class <= limits.ClassKeyQuota; class++ {
			q := s.anyQuota(dice, class)
			q.Shadow = q.Shadow && class > limits.ClassGlobalQuota
			if dice.IntN(10) == 0 {
				q.Quota.Limit += 1024
			}
			d.Quotas = append(d.Quotas, q)
		}
		for range 30 {
			for i := range d.Quotas {
				q := &d.Quotas[i]
				q.Cost = 1 + dice.Int64N(q.Quota.Limit)
				if dice.IntN(8) == 0 { // the count goes on under another quota
					changed := s.anyQuota(dice, 0).Quota
					changed.Limit += q.Quota.Limit / 2
					q.Quota, q.Cost = changed, 1
				}
			}
			judged := limits.Judge(s.look(t, &d))
			got := s.take(t, &d)
			if judged != got {
				t.Fatalf("seed %d: %+v was judged %+v, and is answered %+v", seed, d, judged, got)
			}
			if got.Allowed {
				continue
			}
			refused++
			early := min(s.Resolution, got.RetryAfter)
			s.Advance(got.RetryAfter - early)
			standings := s.look(t, &d)
			if !slices.ContainsFunc(standings, func(l limits.Standing) bool { return l.RefusesFor > 0 && !l.Shadow }) {
				t.Fatalf("seed %d: %v before the end of its wait %+v would pass: it was told %+v", seed, early, d, got)
			}
			s.Advance(early)
			if again := s.take(t, &d); !again.Allowed {
				t.Fatalf("seed %d: told to wait for %+v, %+v is refused: %+v", seed, got, d, again)
			}
		}
	}
}

// At one instant hundreds of requests meet two quotas. Exactly the smaller limit passes, and exactly that much
// is gone from the other.
func exactlyLimitAtOneInstant(t failer, s *table) {
	for _, limit := range []int64{100, 2000} {
		key := s.quota(limits.ClassKeyQuota, s.window(limit, 1_000_000))
		all := s.quota(limits.ClassGlobalQuota, s.window(limit+50, 1_000_000))
		var allowed atomic.Int64
		var done sync.WaitGroup
		start := make(chan struct{})
		for i := range 2 * limit {
			d := asks(key, all)
			if i%2 == 0 {
				slices.Reverse(d.Quotas)
			}
			done.Go(func() {
				<-start
				if decision, ok := s.Limiter.TryTake(d); ok && decision.Allowed {
					allowed.Add(1)
				}
			})
		}
		close(start)
		done.Wait()
		if got := allowed.Load(); got != limit {
			t.Fatalf("%d of %d passed a limit of %d", got, 2*limit, limit)
		}
		s.wantUnits(t, key, 0)
		s.wantUnits(t, all, 50)
	}
}
