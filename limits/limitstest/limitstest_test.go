package limitstest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// Limiters that are wrong on purpose fail rapid's checks: that is no reason to shrink them or to keep
// the sequence.
func TestMain(m *testing.M) {
	flag.Parse()
	for name, value := range map[string]string{"rapid.nofailfile": "true", "rapid.shrinktime": "0s"} {
		if err := flag.Set(name, value); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// A simple limiter is the contract in the fewest lines: one lock, one map, and a place for each mistake
// that a real one could make.
type simple struct {
	mistake string
	mu      sync.Mutex
	clock   func() int64
	full    map[limits.Cell]int64
}

func newSimple(mistake string) *simple {
	base := time.Now()
	return &simple{mistake: mistake, clock: func() int64 { return int64(time.Since(base)) }, full: make(map[limits.Cell]int64)}
}

const (
	takeAndUndo       = "takes limit by limit and gives back on a refusal"
	spendsOnRefusal   = "spends the limits before the one that refuses"
	forgetsClamp      = "does not keep a lowered limit's clamp"
	clampsOnlyRefuser = "keeps the clamp of the limit it reports only"
	firstRefusal      = "reports the first limit that refuses"
	shortestWait      = "reports the shortest wait"
	tiesByPlace       = "reports ties by their place in the demand"
	waitTooLong       = "reports a step more than the wait"
	waitTooShort      = "reports a step less than the wait"
	oneTooMany        = "admits one more than the burst"
	oneTooFew         = "admits one less than the burst"
	noCeiling         = "lets an idle bucket grow over its burst"
	byOwner           = "knows a cell by its owner alone"
	byHalfOwner       = "knows a cell by half of its owner"
	notAtomic         = "judges and spends under two locks"
	sortsInPlace      = "sorts its caller's demand"
	twiceIsOnce       = "takes a cell that is named twice for one"
	chargesNoLimit    = "judges a zero rate"
	fewLimits         = "looks at the first eight limits only"
)

func (s *simple) TryTake(d *limits.Demand) (limits.Decision, bool) {
	decision, err := s.Take(context.Background(), d)
	return decision, err == nil
}

func (s *simple) Take(_ context.Context, d *limits.Demand) (limits.Decision, error) {
	var rates []limits.RateDemand
	for _, r := range d.Rates {
		if !r.Rate.IsZero() || s.mistake == chargesNoLimit {
			rates = append(rates, r)
		}
	}
	if s.mistake == fewLimits {
		rates = rates[:min(len(rates), 8)]
	}
	if s.mistake == sortsInPlace {
		slices.SortFunc(d.Rates, func(a, b limits.RateDemand) int { return int(a.Cell.Class) - int(b.Cell.Class) })
	}
	seen := make(map[limits.Cell]bool)
	for _, r := range rates {
		if seen[r.Cell] && s.mistake != twiceIsOnce {
			return limits.Decision{}, fmt.Errorf("a demand names a cell twice: %w", apikey.ErrUndecided)
		}
		seen[r.Cell] = true
	}
	if s.mistake == takeAndUndo {
		return s.takeAndUndo(rates), nil
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.clock()
	decision := limits.Decision{Allowed: true}
	for _, r := range rates {
		if s.mistake == firstRefusal && !decision.Allowed {
			break
		}
		_, wait := s.judgeLocked(r, now, s.mistake != forgetsClamp && s.mistake != clampsOnlyRefuser)
		longer := wait > decision.RetryAfter
		switch {
		case s.mistake == shortestWait && !decision.Allowed:
			longer = wait < decision.RetryAfter
		case s.mistake != tiesByPlace && wait == decision.RetryAfter:
			longer = r.Cell.Class < decision.Class
		}
		if wait > 0 && longer {
			decision = limits.Decision{Class: r.Cell.Class, RetryAfter: wait}
		}
	}
	if !decision.Allowed {
		for _, r := range rates {
			next, wait := s.judgeLocked(r, now, s.mistake == clampsOnlyRefuser && r.Cell.Class == decision.Class)
			if s.mistake == spendsOnRefusal && wait == 0 {
				s.full[s.name(r.Cell)] = next
			}
		}
		switch s.mistake {
		case waitTooLong:
			decision.RetryAfter++
		case waitTooShort:
			decision.RetryAfter = max(1, decision.RetryAfter-1)
		}
		return decision, nil
	}
	if s.mistake == notAtomic {
		s.mu.Unlock()
		runtime.Gosched()
		s.mu.Lock()
	}
	for _, r := range rates {
		s.full[s.name(r.Cell)], _ = s.judgeLocked(r, now, false)
	}
	return decision, nil
}

func (s *simple) Look(context.Context, *limits.Demand, []limits.Standing) ([]limits.Standing, error) {
	return nil, apikey.ErrUndecided
}

// name is the name under which the state of a cell is kept.
func (s *simple) name(c limits.Cell) limits.Cell {
	switch s.mistake {
	case byOwner:
		c.Class = 0
	case byHalfOwner:
		clear(c.Owner[12:])
	}
	return c
}

func (s *simple) judgeLocked(r limits.RateDemand, now int64, keepClamp bool) (next int64, wait time.Duration) {
	switch s.mistake {
	case oneTooMany:
		r.Rate.Burst++
	case oneTooFew:
		r.Rate.Burst = max(1, r.Rate.Burst-1)
	}
	full, known := s.full[s.name(r.Cell)]
	if s.mistake == noCeiling && known && full < now {
		next = full + int64(r.Rate.Interval)
		return next, 0
	}
	next, wait = r.Rate.Take(full, now)
	if wait > 0 && keepClamp {
		s.full[s.name(r.Cell)] = next
	}
	return next, wait
}

// takeAndUndo is what all or nothing must not be: right when alone, and in others' way when not.
func (s *simple) takeAndUndo(rates []limits.RateDemand) limits.Decision {
	decision := limits.Decision{Allowed: true}
	var taken []limits.RateDemand
	for _, r := range rates {
		s.mu.Lock()
		next, wait := r.Rate.Take(s.full[s.name(r.Cell)], s.clock())
		s.full[s.name(r.Cell)] = next
		s.mu.Unlock()
		if wait == 0 {
			taken = append(taken, r)
		} else if wait > decision.RetryAfter || wait == decision.RetryAfter && r.Cell.Class < decision.Class {
			decision = limits.Decision{Class: r.Cell.Class, RetryAfter: wait}
		}
	}
	if !decision.Allowed {
		for _, r := range taken {
			s.mu.Lock()
			s.full[s.name(r.Cell)] -= int64(r.Rate.Interval)
			s.mu.Unlock()
		}
	}
	return decision
}

func TestSimpleLimiterPasses(t *testing.T) {
	RunInBubble(t, func(*testing.T) Subject {
		return Subject{Limiter: newSimple(""), Advance: time.Sleep}
	})
}

// A clock of coarse steps, as one behind a network has.
func TestCoarseClockPasses(t *testing.T) {
	Run(t, func(*testing.T) Subject {
		s, now := newSimple(""), int64(0)
		s.clock = func() int64 { return now }
		return Subject{
			Limiter:    s,
			Resolution: time.Microsecond,
			Advance: func(d time.Duration) {
				if d%time.Microsecond != 0 {
					t.Fatalf("advance by %d: not a multiple of the resolution", d)
				}
				now += int64(d)
			},
		}
	})
}

// The suite is worth what it refuses: each mistake is caught, by the case that is there for it.
func TestMistakesAreCaught(t *testing.T) {
	for _, tt := range []struct{ mistake, caughtBy string }{
		{takeAndUndo, "RefusedDemandIsInNobodysWay"},
		{spendsOnRefusal, "AllOrNothing"},
		{forgetsClamp, "LoweredLimitClamps"},
		{forgetsClamp, "RetryAfterIsTrue"},
		{clampsOnlyRefuser, "LoweredLimitClampsWhereAnotherRefuses"},
		{firstRefusal, "LongestWaitIsReported"},
		{shortestWait, "LongestWaitIsReported"},
		{tiesByPlace, "TiesGoByClass"},
		{waitTooLong, "BurstThenRefusal"},
		{waitTooLong, "RetryAfterIsTrue"},
		{waitTooLong, "ExactlyTheOracle"},
		{waitTooShort, "BurstThenRefusal"},
		{waitTooShort, "RetryAfterIsTrue"},
		{oneTooMany, "BurstThenRefusal"},
		{oneTooMany, "ExactlyTheOracle"},
		{oneTooMany, "ExactlyBurstAtOneInstant"},
		{oneTooFew, "BurstThenRefusal"},
		{noCeiling, "IdlenessEarnsNoMoreThanTheBurst"},
		{noCeiling, "ExactlyTheOracle"},
		{byOwner, "CellsAreIndependent"},
		{byHalfOwner, "CellsAreIndependent"},
		{notAtomic, "ExactlyBurstAtOneInstant"},
		{sortsInPlace, "DemandBelongsToItsCaller"},
		{twiceIsOnce, "OneCellTwiceIsNotDecided"},
		{chargesNoLimit, "NoLimitNoRefusal"},
		{fewLimits, "ManyLimitsInOneDemand"},
	} {
		t.Run(tt.caughtBy+"/"+tt.mistake, func(t *testing.T) {
			failed := firstFailure(t, tt.mistake, tt.caughtBy)
			if failed == "" {
				t.Errorf("a limiter that %s passed", tt.mistake)
			}
			t.Log(failed)
		})
	}
}

// Taking and undoing is right for one request at a time, so that only requests side by side tell.
func TestTakeAndUndoIsRightWhenAlone(t *testing.T) {
	for _, c := range cases {
		// These two ask side by side; of 400 at one instant it may let 99 pass a burst of 100.
		if c.name != "RefusedDemandIsInNobodysWay" && c.name != "ExactlyBurstAtOneInstant" {
			if failed := firstFailure(t, takeAndUndo, c.name); failed != "" {
				t.Errorf("%s: %s", c.name, failed)
			}
		}
	}
}

// firstFailure runs a case with a limiter that makes a mistake, and returns the first failure; "": none.
func firstFailure(t *testing.T, mistake, name string) string {
	for _, c := range cases {
		if c.name == name {
			return failureOf(t, func(t failer) {
				c.run(t, newTable(Subject{Limiter: newSimple(mistake), Advance: time.Sleep}))
			})
		}
	}
	t.Fatalf("no case %s", name)
	return ""
}

// failureOf runs something that may fail in a bubble, and returns its first failure; "": none.
func failureOf(t *testing.T, run func(t failer)) (failed string) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{failer: t}
		var done sync.WaitGroup
		done.Go(func() { run(r) }) // FailNow ends the goroutine
		done.Wait()
		failed = r.first
	})
	return failed
}

// A recorder is a test that fails for itself alone.
type recorder struct {
	failer
	mu    sync.Mutex
	first string // failure; "": none
}

func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.first == "" {
		r.first = fmt.Sprintf(format, args...)
	}
}

func (r *recorder) Failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.first != ""
}

func (r *recorder) Error(args ...any)                 { r.Errorf("%s", fmt.Sprint(args...)) }
func (r *recorder) Fail()                             { r.Errorf("failed") }
func (r *recorder) FailNow()                          { r.Fail(); runtime.Goexit() }
func (r *recorder) Fatal(args ...any)                 { r.Error(args...); runtime.Goexit() }
func (r *recorder) Fatalf(format string, args ...any) { r.Errorf(format, args...); runtime.Goexit() }
func (r *recorder) Log(...any)                        {}
func (r *recorder) Logf(string, ...any)               {}
