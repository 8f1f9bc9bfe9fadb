package local

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"keyward/limits"
)

// TestLeftIsWhatWouldPass: as many as are said to be left pass, and not one more.
func TestLeftIsWhatWouldPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		random := rand.New(rand.NewPCG(1, 2))
		for owner := range uint64(200) {
			l := New(Config{}, nil)
			r := limits.Rate{Interval: time.Duration(1 + random.Int64N(1e10)), Burst: 1 + random.Int64N(50)}
			d := demandOf(owner, 1, r)
			if got := l.Left(d.Rates[0].Cell, r); got != r.Burst {
				t.Fatalf("of a bucket never used: got %d, want %d", got, r.Burst)
			}
			for range random.IntN(60) {
				mustTake(t, l, d)
				time.Sleep(time.Duration(random.Int64N(2e9)))
			}
			left, passed := l.Left(d.Rates[0].Cell, r), int64(0)
			if again := l.Left(d.Rates[0].Cell, r); again != left {
				t.Fatalf("looking spent: %d, then %d", left, again)
			}
			for mustTake(t, l, d).Allowed {
				passed++
			}
			if passed != left {
				t.Fatalf("%+v: %d were left, %d passed", r, left, passed)
			}
		}
	})
}

func TestLiveIsWhatRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{RenewEvery: time.Second}, nil)
		cell := cellOf(7, limits.ClassConcurrency)
		live := func(want int64) {
			t.Helper()
			if got := l.Live(cell); got != want {
				t.Errorf("got %d, want %d", got, want)
			}
		}
		live(0)
		lease := limits.Lease{Cell: cell, Identity: limits.Identity{Port: 1, Start: 1}}
		mustTake(t, l, &limits.Demand{Lease: limits.LeaseDemand{Lease: lease, Limit: 5}})
		lease.HTTP = 2
		mustTake(t, l, &limits.Demand{Lease: limits.LeaseDemand{Lease: lease, Limit: 5}})
		live(2)
		_ = l.End(t.Context(), []limits.Ending{{Lease: lease}})
		live(1)
		time.Sleep(time.Minute) // nobody renewed it, and nobody else has looked since
		live(0)
	})
}
