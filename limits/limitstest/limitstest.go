// Package limitstest is the contract of a [limits.Limiter] as a test suite: whoever passes it gives the
// same answers to the same questions, in this process or over a network. [Bucket], [Log] and
// [Oracle] are what it is held to, for other tests as well.
//
// Begin with [Run], or with [RunInBubble] for a limiter that lives in this process alone.
package limitstest

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"keyward/authz/apikey"
	"keyward/limits"
)

// A Subject is a limiter to be tested. No other test may use its state at the same time.
type Subject struct {
	Limiter limits.Limiter
	// Advance moves the limiter's clock on by a multiple of Resolution, and nothing else moves it: the
	// suite counts in single steps of Resolution. In a bubble that is time.Sleep.
	Advance func(time.Duration)
	// Resolution is the limiter's smallest step of time; 0: a nanosecond. Every interval and every time
	// of the suite is a multiple of it.
	Resolution time.Duration
	// Now is the limiter's wall clock, which goes with the other one; nil: time.Now.
	Now func() time.Time
}

// Run holds the subjects that open returns to the contract, a fresh one for each case. The end of t is
// where open cleans up.
func Run(t *testing.T, open func(t *testing.T) Subject) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { c.run(t, newTable(open(t))) })
	}
}

// RunInBubble is [Run] with every case, and its call of open, in a testing/synctest bubble of its own.
func RunInBubble(t *testing.T, open func(t *testing.T) Subject) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { c.run(t, newTable(open(t))) })
		})
	}
}

// A failer is what a case needs of a test: *testing.T, *rapid.T or a stand-in that may fail.
type failer = rapid.TB

// The cases, the plainest first: where several fail, the first says most.
var cases = []struct {
	name string
	run  func(t failer, s *table)
}{
	{"BurstThenRefusal", burstThenRefusal},
	{"IdlenessEarnsNoMoreThanTheBurst", idlenessEarnsNoMoreThanTheBurst},
	{"NoLimitNoRefusal", noLimitNoRefusal},
	{"SlowestRate", slowestRate},
	{"CellsAreIndependent", cellsAreIndependent},
	{"DemandsShareACell", demandsShareACell},
	{"AllOrNothing", allOrNothing},
	{"LongestWaitIsReported", longestWaitIsReported},
	{"TiesGoByClass", tiesGoByClass},
	{"ManyLimitsInOneDemand", manyLimitsInOneDemand},
	{"OneCellTwiceIsNotDecided", oneCellTwiceIsNotDecided},
	{"ChangedLimitKeepsWhatIsSpent", changedLimitKeepsWhatIsSpent},
	{"LoweredLimitClamps", loweredLimitClamps},
	{"LoweredLimitClampsWhereAnotherRefuses", loweredLimitClampsWhereAnotherRefuses},
	{"DemandBelongsToItsCaller", demandBelongsToItsCaller},
	{"RetryAfterIsTrue", retryAfterIsTrue},
	{"ExactlyTheOracle", exactlyTheOracle},
	{"ShadowRefusesNothing", shadowRefusesNothing},
	{"QuotaAdmitsItsLimit", quotaAdmitsItsLimit},
	{"QuotaSlides", quotaSlides},
	{"QuotaCosts", quotaCosts},
	{"QuotaOfTwentySeconds", quotaOfTwentySeconds},
	{"LockoutNeitherCountsNorIsExtended", lockoutNeitherCountsNorIsExtended},
	{"LockoutShorterThanItsWindow", lockoutShorterThanItsWindow},
	{"OnlyTheReportedQuotaLocks", onlyTheReportedQuotaLocks},
	{"ChangedLockoutClamps", changedLockoutClamps},
	{"AllOrNothingWithQuotas", allOrNothingWithQuotas},
	{"TiesOfQuotas", tiesOfQuotas},
	{"QuotaAndRateShareNoCell", quotaAndRateShareNoCell},
	{"CalendarDays", calendarDays},
	{"CalendarMonths", calendarMonths},
	{"ManyUnitsInHundredths", manyUnitsInHundredths},
	{"ChangedQuotaKeepsItsCount", changedQuotaKeepsItsCount},
	{"ChangedWindow", changedWindow},
	{"QuotaBecomesCalendar", quotaBecomesCalendar},
	{"ManyUnitsBecomeFew", manyUnitsBecomeFew},
	{"LookSpendsNothing", lookSpendsNothing},
	{"LookSaysWhatTakeDoes", lookSaysWhatTakeDoes},
	{"RetryAfterIsTrueForAll", retryAfterIsTrueForAll},
	{"QuotasAreTheOracle", func(t failer, s *table) { sequences(t, 500, 1, func() *table { return s }) }},
	{"ExactlyLimitAtOneInstant", exactlyLimitAtOneInstant},
	{"ExactlyBurstAtOneInstant", exactlyBurstAtOneInstant},
	{"RefusedDemandIsInNobodysWay", refusedDemandIsInNobodysWay},
	{"CrossingDemandsEnd", crossingDemandsEnd},
}

// A table is a subject with what the cases say over and over.
type table struct {
	Subject
	owners atomic.Uint64
	takes  atomic.Uint64
}

func newTable(s Subject) *table {
	if s.Resolution == 0 {
		s.Resolution = time.Nanosecond
	}
	if s.Now == nil {
		s.Now = time.Now
	}
	return &table{Subject: s}
}

// cell returns a cell that nobody has used.
func (s *table) cell(class limits.Class) limits.Cell {
	c := limits.Cell{Class: class}
	binary.LittleEndian.PutUint64(c.Owner[4:], s.owners.Add(1))
	return c
}

// rate returns a rate with an interval of so many steps of Resolution.
func (s *table) rate(steps, burst int64) limits.Rate {
	return limits.Rate{Interval: time.Duration(steps) * s.Resolution, Burst: burst}
}

// take decides a demand, by TryTake where that can, and by Take alone every second time.
func (s *table) take(t failer, d *limits.Demand) limits.Decision {
	t.Helper()
	if s.takes.Add(1)%2 == 0 {
		if decision, ok := s.Limiter.TryTake(d); ok {
			return s.sane(t, decision)
		}
	}
	decision, err := s.Limiter.Take(context.Background(), d)
	if err != nil {
		t.Fatalf("take: %v", err)
	}
	return s.sane(t, decision)
}

// sane checks that an allowance says nothing of a refusal, and a refusal everything.
func (s *table) sane(t failer, d limits.Decision) limits.Decision {
	t.Helper()
	if d.Allowed && d != (limits.Decision{Allowed: true, Shadowed: d.Shadowed}) || !d.Allowed && (d.Class == 0 || d.RetryAfter <= 0) {
		t.Fatalf("got %+v: neither an allowance nor a refusal with class and wait", d)
	}
	return d
}

func (s *table) wantAllowed(t failer, d *limits.Demand) {
	t.Helper()
	if got := s.take(t, d); !got.Allowed {
		t.Fatalf("refused (class %d, retry after %d), want allowed", got.Class, got.RetryAfter)
	}
}

func (s *table) wantRefused(t failer, d *limits.Demand, class limits.Class, retryAfter time.Duration) {
	t.Helper()
	want := limits.Decision{Class: class, RetryAfter: retryAfter}
	if got := s.take(t, d); got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
}

// wantLeft says how many more requests a limit has at this instant, and spends them.
func (s *table) wantLeft(t failer, r limits.RateDemand, want int) {
	t.Helper()
	for got := range want {
		if !s.take(t, demand(r)).Allowed {
			t.Fatalf("%d left, want %d", got, want)
		}
	}
	if s.take(t, demand(r)).Allowed {
		t.Fatalf("more than %d left", want)
	}
}

func demand(rates ...limits.RateDemand) *limits.Demand {
	return &limits.Demand{Rates: slices.Clone(rates)}
}

func burstThenRefusal(t failer, s *table) {
	r := s.rate(1000, 5)
	d := demand(limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: r})
	for range 5 {
		s.wantAllowed(t, d)
	}
	s.wantRefused(t, d, limits.ClassBurst, r.Interval)
	s.Advance(400 * s.Resolution)
	s.wantRefused(t, d, limits.ClassBurst, 600*s.Resolution)
	s.Advance(599 * s.Resolution)
	s.wantRefused(t, d, limits.ClassBurst, s.Resolution)
	s.Advance(s.Resolution)
	s.wantAllowed(t, d)
	s.wantRefused(t, d, limits.ClassBurst, r.Interval)
}

func idlenessEarnsNoMoreThanTheBurst(t failer, s *table) {
	r := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1000, 3)}
	s.wantLeft(t, r, 3)
	s.Advance(2000 * s.Resolution)
	s.wantLeft(t, r, 2)
	s.Advance(1_000_000 * s.Resolution)
	s.wantLeft(t, r, 3)
}

func noLimitNoRefusal(t failer, s *table) {
	free := limits.RateDemand{Cell: s.cell(limits.ClassInstance)}
	one := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1000, 1)}
	for range 100 {
		s.wantAllowed(t, demand())
		s.wantAllowed(t, demand(free, free))
	}
	s.wantAllowed(t, demand(free, one))
	s.wantRefused(t, demand(free, one), limits.ClassBurst, one.Rate.Interval)
}

// The slowest rate that a configuration may hold, with the largest burst that goes with it.
func slowestRate(t failer, s *table) {
	interval := 366 * 24 * time.Hour
	r := limits.RateDemand{
		Cell: s.cell(limits.ClassBurst),
		Rate: limits.Rate{Interval: interval, Burst: math.MaxInt64 / 2 / int64(interval)},
	}
	for range r.Rate.Burst {
		s.wantAllowed(t, demand(r))
	}
	s.wantRefused(t, demand(r), limits.ClassBurst, interval)
	s.Advance(s.Resolution)
	s.wantRefused(t, demand(r), limits.ClassBurst, interval-s.Resolution)
}

func cellsAreIndependent(t failer, s *table) {
	r := s.rate(1000, 2)
	a := s.cell(limits.ClassBurst)
	near := a // differs in the last bit of its owner alone
	near.Owner[15] ^= 1
	far := a
	far.Owner[0] ^= 0x80
	class := a
	class.Class = limits.ClassInstance
	for _, cell := range []limits.Cell{a, near, far, class} {
		s.wantLeft(t, limits.RateDemand{Cell: cell, Rate: r}, 2)
	}
}

// A cell is the same limit in whatever demand and place it stands.
func demandsShareACell(t failer, s *table) {
	total := limits.RateDemand{Cell: s.cell(limits.ClassInstance), Rate: s.rate(1000, 3)}
	first := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(500, 9)}
	second := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(700, 9)}
	s.wantAllowed(t, demand(total, first))
	s.wantAllowed(t, demand(second, total))
	s.wantAllowed(t, demand(total))
	s.wantRefused(t, demand(first, total), limits.ClassInstance, total.Rate.Interval)
	s.wantRefused(t, demand(total, second), limits.ClassInstance, total.Rate.Interval)
	s.wantLeft(t, first, 8)
	s.wantLeft(t, second, 8)
}

// A refusal spends nothing, whichever limit refuses and wherever the others stand.
func allOrNothing(t failer, s *table) {
	const limitsInAll = 5
	for refuses := range limitsInAll {
		d := demand()
		for i := range limitsInAll {
			r := limits.RateDemand{Cell: s.cell(limits.Class(1 + i)), Rate: s.rate(1000, 3)}
			if i == refuses {
				r.Rate.Burst = 1
			}
			d.Rates = append(d.Rates, r)
		}
		s.wantAllowed(t, d)
		for range 10 {
			s.wantRefused(t, d, limits.Class(1+refuses), 1000*s.Resolution)
		}
		for i, r := range d.Rates {
			if i != refuses {
				s.wantLeft(t, r, 2)
			}
		}
		// The limit that refused is not the worse for having been asked ten times.
		s.Advance(1000 * s.Resolution)
		s.wantLeft(t, d.Rates[refuses], 1)
	}
}

func longestWaitIsReported(t failer, s *table) {
	short := limits.RateDemand{Cell: s.cell(limits.ClassInstance), Rate: s.rate(1000, 1)}
	long := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1001, 1)}
	middle := limits.RateDemand{Cell: s.cell(limits.ClassKeyQuota), Rate: s.rate(900, 1)}
	s.wantAllowed(t, demand(short, long, middle))
	s.wantRefused(t, demand(short, long, middle), limits.ClassBurst, long.Rate.Interval)
	s.wantRefused(t, demand(long, middle, short), limits.ClassBurst, long.Rate.Interval)
	s.wantRefused(t, demand(middle, short), limits.ClassInstance, short.Rate.Interval)
	// When the others have room again, the last one still refuses, and says so for itself.
	s.Advance(1000 * s.Resolution)
	s.wantRefused(t, demand(short, long, middle), limits.ClassBurst, s.Resolution)
	s.Advance(s.Resolution)
	s.wantAllowed(t, demand(short, long, middle))
}

func tiesGoByClass(t failer, s *table) {
	var d limits.Demand
	for class := limits.ClassInstance; class < limits.ClassConcurrency; class++ {
		// The class that comes last in order stands first in the demand, and has the lowest owner.
		d.Rates = slices.Insert(d.Rates, 0, limits.RateDemand{Cell: s.cell(class), Rate: s.rate(1000, 1)})
	}
	s.wantAllowed(t, &d)
	for len(d.Rates) > 0 {
		first := len(d.Rates) - 1 // the lowest class left
		s.wantRefused(t, &d, d.Rates[first].Cell.Class, 1000*s.Resolution)
		slices.Reverse(d.Rates)
		s.wantRefused(t, &d, d.Rates[0].Cell.Class, 1000*s.Resolution)
		slices.Reverse(d.Rates)
		d.Rates = d.Rates[:first]
	}
}

// No number of limits is too many.
func manyLimitsInOneDemand(t failer, s *table) {
	var d limits.Demand
	for i := range int64(40) {
		d.Rates = append(d.Rates, limits.RateDemand{Cell: s.cell(limits.ClassKeyQuota), Rate: s.rate(1000+i, 2)})
	}
	s.wantAllowed(t, &d)
	s.wantAllowed(t, &d)
	s.wantRefused(t, &d, limits.ClassKeyQuota, 1039*s.Resolution)
	s.Advance(1038 * s.Resolution)
	s.wantRefused(t, &d, limits.ClassKeyQuota, s.Resolution)
	s.Advance(s.Resolution)
	s.wantAllowed(t, &d)
}

func oneCellTwiceIsNotDecided(t failer, s *table) {
	once := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1000, 3)}
	other := limits.RateDemand{Cell: s.cell(limits.ClassInstance), Rate: s.rate(1000, 3)}
	twice := demand(once, other, once)
	if decision, ok := s.Limiter.TryTake(twice); ok {
		t.Fatalf("TryTake decided a demand that names a cell twice: %+v", decision)
	}
	if decision, err := s.Limiter.Take(context.Background(), twice); !errors.Is(err, apikey.ErrUndecided) {
		t.Fatalf("Take answered a demand that names a cell twice: %+v, %v; want apikey.ErrUndecided", decision, err)
	}
	s.wantLeft(t, once, 3)
	s.wantLeft(t, other, 3)
}

func changedLimitKeepsWhatIsSpent(t failer, s *table) {
	cell := s.cell(limits.ClassBurst)
	with := func(steps, burst int64) limits.RateDemand {
		return limits.RateDemand{Cell: cell, Rate: s.rate(steps, burst)}
	}
	s.wantLeft(t, with(1000, 5), 5)
	s.wantLeft(t, with(1000, 8), 3)                                               // raised: what was spent stays spent
	s.wantRefused(t, demand(with(1000, 8)), limits.ClassBurst, 1000*s.Resolution) // 8,000 steps from full
	s.Advance(3000 * s.Resolution)                                                // 5,000 steps from full
	s.wantRefused(t, demand(with(1000, 5)), limits.ClassBurst, 1000*s.Resolution)
	// Half as fast: the way to full stays as long, and is now two and a half requests.
	s.wantLeft(t, with(2000, 5), 2)
	s.wantRefused(t, demand(with(2000, 5)), limits.ClassBurst, 1000*s.Resolution)
}

func loweredLimitClamps(t failer, s *table) {
	cell := s.cell(limits.ClassBurst)
	with := func(steps, burst int64) limits.RateDemand {
		return limits.RateDemand{Cell: cell, Rate: s.rate(steps, burst)}
	}
	s.wantLeft(t, with(1000, 50), 50)
	// Fifty requests of debt, but the new limit knows no more than two.
	s.wantRefused(t, demand(with(1000, 2)), limits.ClassBurst, 1000*s.Resolution)
	s.Advance(999 * s.Resolution)
	s.wantRefused(t, demand(with(1000, 2)), limits.ClassBurst, s.Resolution)
	s.Advance(s.Resolution)
	s.wantAllowed(t, demand(with(1000, 2)))
	s.wantRefused(t, demand(with(1000, 2)), limits.ClassBurst, 1000*s.Resolution)
	// A faster rate clamps in the same way.
	s.wantRefused(t, demand(with(10, 2)), limits.ClassBurst, 10*s.Resolution)
	s.Advance(10 * s.Resolution)
	s.wantLeft(t, with(10, 2), 1)
}

// The wait that is reported is another limit's, and must still be long enough for the lowered one.
func loweredLimitClampsWhereAnotherRefuses(t failer, s *table) {
	for _, order := range [][2]limits.Class{
		{limits.ClassInstance, limits.ClassBurst},
		{limits.ClassBurst, limits.ClassInstance},
	} {
		lowered := limits.RateDemand{Cell: s.cell(order[0]), Rate: s.rate(1000, 50)}
		other := limits.RateDemand{Cell: s.cell(order[1]), Rate: s.rate(1500, 1)}
		s.wantLeft(t, lowered, 50)
		s.wantLeft(t, other, 1)
		lowered.Rate.Burst = 1
		s.wantRefused(t, demand(lowered, other), order[1], 1500*s.Resolution)
		s.Advance(1500 * s.Resolution)
		s.wantAllowed(t, demand(lowered, other))
	}
}

// The caller may fill the demand with the next request's limits as soon as it has its answer.
func demandBelongsToItsCaller(t failer, s *table) {
	a := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1000, 3)}
	b := limits.RateDemand{Cell: s.cell(limits.ClassInstance), Rate: s.rate(1000, 3)}
	c := limits.RateDemand{Cell: s.cell(limits.ClassKeyQuota), Rate: s.rate(1000, 3)}
	var d limits.Demand
	for _, asked := range [][]limits.RateDemand{{a, b}, {b, a}} {
		d.Rates = append(d.Rates[:0], asked...)
		s.wantAllowed(t, &d)
		if !slices.Equal(d.Rates, asked) {
			t.Fatalf("asked with %+v, the demand is now %+v", asked, d.Rates)
		}
	}
	d.Rates = append(d.Rates[:0], c)
	s.wantAllowed(t, &d)
	s.wantLeft(t, a, 1)
	s.wantLeft(t, b, 1)
	s.wantLeft(t, c, 2)
}

// check runs a property of sequences. The wrapper hides that t is a *testing.T: rapid would ask it for
// a deadline, which a bubble forbids.
func check(t failer, property func(t *rapid.T)) {
	t.Helper()
	rapid.Check(struct{ failer }{t}, property)
}

// steps draws a time in steps of Resolution.
func (s *table) steps(t *rapid.T, longest int64) time.Duration {
	return time.Duration(rapid.OneOf(
		rapid.Int64Range(0, 3),
		rapid.Int64Range(0, longest),
	).Draw(t, "steps")) * s.Resolution
}

// anyDemand draws limits on some of the given cells.
func (s *table) anyDemand(t *rapid.T, cells []limits.Cell) *limits.Demand {
	var d limits.Demand
	for _, cell := range rapid.Permutation(cells).Draw(t, "cells")[:rapid.IntRange(1, len(cells)).Draw(t, "limits")] {
		d.Rates = append(d.Rates, limits.RateDemand{
			Cell: cell,
			Rate: s.rate(rapid.Int64Range(1, 1000).Draw(t, "interval"), rapid.Int64Range(1, 5).Draw(t, "burst")),
		})
	}
	return &d
}

func (s *table) someCells() []limits.Cell {
	return []limits.Cell{
		s.cell(limits.ClassBurst), s.cell(limits.ClassInstance), s.cell(limits.ClassKeyQuota),
		s.cell(limits.ClassBurst), s.cell(limits.ClassGlobalQuota),
	}
}

// Whoever waits as long as it was told passes, if nobody else came; a single step earlier it does not.
func retryAfterIsTrue(t failer, s *table) {
	refusals := 0
	check(t, func(t *rapid.T) {
		cells := s.someCells()
		for range 150 {
			d := s.anyDemand(t, cells)
			refused := s.take(t, d)
			if refused.Allowed {
				continue
			}
			refusals++
			early := time.Duration(rapid.SampledFrom([]int64{1, 1, 1, 2, 7}).Draw(t, "early")) * s.Resolution
			if early >= refused.RetryAfter {
				early = s.Resolution
			}
			s.Advance(refused.RetryAfter - early)
			if again := s.take(t, d); again.Allowed || again.RetryAfter != early {
				t.Fatalf("%d before the end of its wait of %d: %+v", early, refused.RetryAfter, again)
			}
			s.Advance(early)
			s.wantAllowed(t, d)
		}
	})
	// Fewer checks may be asked for by flag; the demands are drawn such that most sequences refuse often.
	t.Logf("%d refusals waited out", refusals)
}

// Whatever comes, the answers are those of exact buckets judged together, and no window of any limit
// holds more than its burst and what the rate earns in it.
func exactlyTheOracle(t failer, s *table) {
	check(t, func(t *rapid.T) {
		var now int64
		cells := s.someCells()
		exact := make(map[limits.Cell]*Bucket)
		admitted := make(map[limits.Cell][]int64)
		fixed := s.anyDemand(t, cells) // limits that never change, for the windows
		for _, cell := range cells {
			exact[cell] = new(Bucket)
		}
		changing := rapid.Bool().Draw(t, "limits change")
		for range rapid.IntRange(1, 100).Draw(t, "requests") {
			gap := s.steps(t, 1500)
			s.Advance(gap)
			now += int64(gap)

			d := s.anyDemand(t, cells)
			if !changing {
				d = demand(rapid.Permutation(fixed.Rates).Draw(t, "demand")[:rapid.IntRange(1, len(fixed.Rates)).Draw(t, "limits")]...)
			}
			want := limits.Decision{Allowed: true}
			for _, r := range d.Rates {
				wait := exact[r.Cell].Wait(r.Rate, now)
				if wait > want.RetryAfter || wait > 0 && wait == want.RetryAfter && r.Cell.Class < want.Class {
					want = limits.Decision{Class: r.Cell.Class, RetryAfter: wait}
				}
			}
			if got := s.take(t, d); got != want {
				t.Fatalf("at %d, %+v: got %+v, want %+v", now, d.Rates, got, want)
			}
			for _, r := range d.Rates {
				if want.Allowed {
					exact[r.Cell].Spend()
					admitted[r.Cell] = append(admitted[r.Cell], now)
				}
			}
		}
		if changing {
			return
		}
		for _, r := range fixed.Rates {
			times := admitted[r.Cell]
			for i := range times {
				for j := i; j < len(times); j++ {
					if most := r.Rate.Burst + (times[j]-times[i])/int64(r.Rate.Interval); int64(j-i+1) > most {
						t.Fatalf("%d admitted in %d under %+v", j-i+1, times[j]-times[i], r.Rate)
					}
				}
			}
		}
	})
}

// At one instant hundreds of requests meet two limits. Exactly the smaller burst passes, and exactly
// that much is gone from the other.
func exactlyBurstAtOneInstant(t failer, s *table) {
	for range 5 {
		key := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1_000_000, 100)}
		total := limits.RateDemand{Cell: s.cell(limits.ClassInstance), Rate: s.rate(1_000_000, 150)}
		var allowed atomic.Int64
		var all sync.WaitGroup
		start := make(chan struct{})
		for i := range 400 {
			d := demand(key, total)
			if i%2 == 0 {
				slices.Reverse(d.Rates)
			}
			all.Go(func() {
				<-start
				decision, ok := s.Limiter.TryTake(d)
				if !ok {
					var err error
					if decision, err = s.Limiter.Take(context.Background(), d); err != nil {
						t.Errorf("take: %v", err)
					}
				}
				if decision.Allowed {
					allowed.Add(1)
				}
			})
		}
		close(start)
		all.Wait()
		if got := allowed.Load(); got != 100 {
			t.Fatalf("%d of 400 passed a burst of 100", got)
		}
		s.wantLeft(t, key, 0)
		s.wantLeft(t, total, 50)
	}
}

// One limit is spent, so demands that name it are refused. While they come without a pause, somebody
// asks for the last request of another limit that they name too: it is there, and must be given. A
// limiter that takes what it can and gives back what it should not have taken is caught holding it.
// The demands are long, to keep it long between the take and the undo, in whichever order it goes.
func refusedDemandIsInNobodysWay(t failer, s *table) {
	const rounds, refused, between = 40, 3, 200
	for round := range rounds {
		spent := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1_000_000, 1)}
		d := demand()
		for range between {
			d.Rates = append(d.Rates, limits.RateDemand{Cell: s.cell(limits.ClassKeyQuota), Rate: s.rate(1_000_000, 1000)})
		}
		last := limits.RateDemand{Cell: s.cell(limits.ClassInstance), Rate: s.rate(1_000_000, 1)}
		d.Rates = append(append([]limits.RateDemand{last}, d.Rates...), spent)
		if round%2 == 1 {
			slices.Reverse(d.Rates)
		}
		s.wantLeft(t, spent, 1)

		var stop atomic.Bool
		var running, all sync.WaitGroup
		running.Add(refused)
		for range refused {
			all.Go(func() {
				for first := true; first || !stop.Load(); first = false {
					if s.take(failures{t}, d).Allowed {
						t.Errorf("a demand passed a limit that is spent")
						stop.Store(true)
					}
					if first {
						running.Done()
					}
				}
			})
		}
		running.Wait()
		got := s.take(failures{t}, demand(last))
		stop.Store(true)
		all.Wait()
		if t.Failed() {
			t.FailNow()
		}
		if !got.Allowed {
			t.Fatalf("round %d: refused (class %d, retry after %d) what was there, because of demands that got nothing",
				round, got.Class, got.RetryAfter)
		}
		s.wantLeft(t, last, 0)
	}
}

// Demands over the same limits in every order end: nobody waits for what another holds.
func crossingDemandsEnd(t failer, s *table) {
	var rates []limits.RateDemand
	for range 6 {
		rates = append(rates, limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: s.rate(1_000_000, 10_000)})
	}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			d := demand(rates...)
			for n := range 200 {
				turn := (i*7 + n) % len(rates)
				d.Rates = append(append(d.Rates[:0], rates[turn:]...), rates[:turn]...)
				if n%2 == 0 {
					slices.Reverse(d.Rates)
				}
				if !s.take(failures{t}, d).Allowed {
					t.Errorf("refused below the burst")
					return
				}
			}
		})
	}
	all.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for _, r := range rates {
		r.Rate.Burst = 8*200 + 3
		s.wantLeft(t, r, 3)
	}
}

// failures is a test as goroutines may use it: FailNow, and with it Fatalf, only notes the failure.
type failures struct{ failer }

func (f failures) Fatalf(format string, args ...any) { f.Errorf(format, args...) }
