package local

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"keyward/limits"
)

func mustLook(t *testing.T, l *Limiter, d *limits.Demand) []limits.Standing {
	t.Helper()
	standings, err := l.Look(t.Context(), d, nil)
	if err != nil {
		t.Fatal(err)
	}
	return standings
}

// TestLeftIsWhatWouldPass: as many as are said to be left pass, and not one more.
func TestLeftIsWhatWouldPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		random := rand.New(rand.NewPCG(1, 2))
		for owner := range uint64(200) {
			l := New(Config{}, nil)
			r := limits.Rate{Interval: time.Duration(1 + random.Int64N(1e10)), Burst: 1 + random.Int64N(50)}
			d := demandOf(owner, 1, r)
			left := func() int64 { return mustLook(t, l, d)[0].Remaining }
			if got := left(); got != r.Burst {
				t.Fatalf("of a bucket never used: got %d, want %d", got, r.Burst)
			}
			for range random.IntN(60) {
				mustTake(t, l, d)
				time.Sleep(time.Duration(random.Int64N(2e9)))
			}
			said, passed := left(), int64(0)
			if again := left(); again != said {
				t.Fatalf("looking spent: %d, then %d", said, again)
			}
			for mustTake(t, l, d).Allowed {
				passed++
			}
			if passed != said {
				t.Fatalf("%+v: %d were left, %d passed", r, said, passed)
			}
		}
	})
}

func TestLiveIsWhatRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{RenewEvery: time.Second}, nil)
		lease := limits.Lease{Cell: cellOf(7, limits.ClassConcurrency), Identity: limits.Identity{Port: 1, Start: 1}}
		d := &limits.Demand{Lease: limits.LeaseDemand{Lease: lease, Limit: 5}}
		live := func(want int64) {
			t.Helper()
			if got := mustLook(t, l, d)[0]; got.Used != want || got.Remaining != 5-want {
				t.Errorf("got %+v, want %d used", got, want)
			}
		}
		live(0)
		mustTake(t, l, d)
		d.Lease.Lease.HTTP = 2
		mustTake(t, l, d)
		live(2)
		_ = l.End(t.Context(), []limits.Ending{{Lease: d.Lease.Lease}})
		live(1)
		time.Sleep(time.Minute) // nobody renewed it, and nobody else has looked since
		live(0)
	})
}
