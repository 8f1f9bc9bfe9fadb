package local

import (
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz/apikey"
	"keyward/limits"
)

// heldQuotas counts the cells of quotas, and checks that index, slots, blocks and the count of all agree.
func heldQuotas(t *testing.T, l *Limiter) (n int) {
	t.Helper()
	for i := range l.shards {
		q := &l.shards[i].quotas
		if len(q.index) != len(q.slots) {
			t.Fatalf("shard %d: %d quota cells in the index, %d slots", i, len(q.index), len(q.slots))
		}
		var used [blockSizes]map[int32]bool
		for position := range q.slots {
			s := &q.slots[position]
			if at, ok := q.index[s.cell]; !ok || int(at) != position || l.shardOf(&s.cell) != int32(i) {
				t.Fatalf("shard %d: the quota cell in slot %d is in the index at %d, %t", i, position, at, ok)
			}
			if s.block == none {
				if s.runs > 0 {
					t.Fatalf("shard %d, slot %d: %d runs and no block", i, position, s.runs)
				}
				continue
			}
			if used[s.size] == nil {
				used[s.size] = make(map[int32]bool)
			}
			if used[s.size][s.block] || s.block > q.pools[s.size].made {
				t.Fatalf("shard %d, slot %d: block %d of size %d is another's, or nobody's", i, position, s.block, s.size)
			}
			used[s.size][s.block] = true
			runs := q.runs(s)
			before := int64(-1 << 62)
			for r := range runs.Len {
				run := runs.Ring[(runs.First+r)%int32(len(runs.Ring))]
				if run.Units < 1 || run.At < before {
					t.Fatalf("shard %d, slot %d: runs %+v", i, position, runs)
				}
				before = run.At
			}
		}
		for size := range q.pools {
			p := &q.pools[size]
			free := 0
			for number := p.free; number != none; number = int32(p.block(int8(size), number)[0].At) {
				if free++; used[size][number] || free > int(p.made) {
					t.Fatalf("shard %d: block %d of size %d is free and in use, or free twice", i, number, size)
				}
			}
			if free+len(used[size]) != int(p.made) {
				t.Fatalf("shard %d: of %d blocks of size %d, %d are free and %d in use", i, p.made, size, free, len(used[size]))
			}
		}
		n += len(q.slots)
	}
	if got := l.quotaCells.Load(); got != int64(n) {
		t.Fatalf("%d quota cells are counted, %d held", got, n)
	}
	return n
}

func demandQuotas(quotas ...limits.QuotaDemand) *limits.Demand { return &limits.Demand{Quotas: quotas} }

func quotaOf(owner uint64, q limits.Quota) limits.QuotaDemand {
	return limits.QuotaDemand{Cell: cellOf(owner, limits.ClassKeyQuota), Quota: q, Cost: 1}
}

// Blocks of every size, grown, given back and used again by others, and cells swept in between.
func TestQuotaCellsAreSweptAndTheirRoomUsedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		l := New(Config{}, reg)
		dice := rand.New(rand.NewPCG(3, 3))
		busy := quotaOf(999_999, limits.Quota{Limit: 1, Period: limits.Month})
		mustTake(t, l, demandQuotas(busy))
		for round := range 30 {
			for owner := range uint64(300) {
				q := limits.Quota{Limit: 1 + dice.Int64N(1024), Window: time.Second}
				for range dice.Int64N(q.Limit) + 1 {
					mustTake(t, l, demandQuotas(quotaOf(owner, q)))
					if dice.IntN(50) == 0 {
						time.Sleep(time.Duration(dice.IntN(2000)) * time.Microsecond)
					}
				}
			}
			time.Sleep(time.Second)
			for range 3 * shardCount {
				l.sweep(&l.shards[l.sweepNext.Add(1)%shardCount])
			}
			if n := heldQuotas(t, l); n != 1 {
				t.Fatalf("round %d: %d quota cells held after a second, want only the busy one", round, n)
			}
		}
		if mustTake(t, l, demandQuotas(busy)).Allowed {
			t.Error("a busy quota was forgotten")
		}
		values := gathered(t, reg)
		if values["quota_cells"] != 1 || values["swept_quota_cells_total"] < 300 || values["quota_cells_lacking_total"] != 0 {
			t.Errorf("got metrics %v", values)
		}
		// A cell that is locked is not idle.
		locked := quotaOf(5, limits.Quota{Limit: 1, Window: time.Millisecond, Lockout: time.Hour})
		mustTake(t, l, demandQuotas(locked))
		mustTake(t, l, demandQuotas(locked))
		time.Sleep(time.Minute)
		for range 3 * shardCount {
			l.sweep(&l.shards[l.sweepNext.Add(1)%shardCount])
		}
		if got := mustTake(t, l, demandQuotas(locked)); got.Allowed || got.RetryAfter != time.Hour-time.Minute {
			t.Errorf("got %+v from a quota that is locked for %v", got, time.Hour-time.Minute)
		}
		if got := gathered(t, reg)["quota_lockouts_total"]; got != 1 {
			t.Errorf("%v lockouts counted, want 1", got)
		}
	})
}

// TestMemoryOfOneQuotaIsBounded: whatever it admits, a cell's runs fit the largest block.
func TestMemoryOfOneQuotaIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{}, nil)
		dice := rand.New(rand.NewPCG(1, 1))
		most := int32(0)
		for n := range 200_000 {
			q := limits.Quota{Limit: 1024, Window: 100 * time.Millisecond}
			if n/10_000%2 == 1 {
				q = limits.Quota{Limit: 1 << 40, Window: time.Duration(1+n/20_000) * 50 * time.Millisecond}
			}
			mustTake(t, l, demandQuotas(quotaOf(1, q)))
			time.Sleep(time.Duration(dice.IntN(100)) * time.Microsecond)
			cell := cellOf(1, limits.ClassKeyQuota)
			t := &l.shards[l.shardOf(&cell)].quotas
			most = max(most, t.slots[t.index[cell]].runs)
		}
		heldQuotas(t, l)
		if most < 1000 || most > limits.MaxRuns {
			t.Errorf("up to %d runs, want about %d", most, limits.MaxRuns)
		}
	})
}

func TestQuotaCellsHaveABound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		l := New(Config{QuotaCells: 10}, reg)
		day := limits.Quota{Limit: 5, Window: time.Hour}
		for owner := range uint64(9) {
			mustTake(t, l, demandQuotas(quotaOf(owner, day)))
		}
		refused := func(d *limits.Demand) {
			t.Helper()
			if decision, ok := l.TryTake(d); ok {
				t.Fatalf("TryTake decided what needs a cell more: %+v", decision)
			}
			if decision, err := l.Take(t.Context(), d); !errors.Is(err, apikey.ErrUndecided) || !strings.Contains(err.Error(), "all 10 quota cells") {
				t.Fatalf("Take answered what needs a cell more: %+v, %v", decision, err)
			}
		}
		// Two more are needed, there is room for one: nothing is spent, also not of what has a cell.
		both := demandQuotas(quotaOf(0, day), quotaOf(100, day), quotaOf(101, day))
		both.Rates = demandOf(7, 1, limits.Rate{Interval: time.Hour, Burst: 1}).Rates
		refused(both)
		both.Lease = limits.LeaseDemand{Lease: leaseOf(1, 1), Limit: 1}
		refused(both)
		if st := mustLook(t, l, both); st[0].Used != 0 || st[1].Used != 1 || st[4].Used != 0 {
			t.Fatalf("an error has spent: %+v", st)
		}
		mustTake(t, l, demandQuotas(quotaOf(100, day)))
		refused(demandQuotas(quotaOf(101, day)))
		// A shadow is not worth an error: it is not counted.
		shadow := quotaOf(101, day)
		shadow.Shadow = true
		if got := mustTake(t, l, demandQuotas(shadow, quotaOf(100, day))); got != (limits.Decision{Allowed: true}) {
			t.Fatalf("got %+v", got)
		}
		// Those that have a cell go on, and are refused by their limit alone.
		for range 3 {
			if !mustTake(t, l, demandQuotas(quotaOf(100, day))).Allowed {
				t.Fatal("refused below the limit")
			}
		}
		if got := mustTake(t, l, demandQuotas(quotaOf(100, day))); got.Class != limits.ClassKeyQuota {
			t.Fatalf("got %+v over the limit", got)
		}
		if got := gathered(t, reg)["quota_cells_lacking_total"]; got != 4 {
			t.Errorf("%v requests counted that lacked a cell, want 4", got)
		}
		if n := heldQuotas(t, l); n != 10 {
			t.Errorf("%d cells held, want 10", n)
		}
		time.Sleep(time.Hour)
		for range 2 * shardCount {
			l.sweep(&l.shards[l.sweepNext.Add(1)%shardCount])
		}
		if !mustTake(t, l, demandQuotas(quotaOf(101, day))).Allowed {
			t.Error("refused though all others are swept")
		}
	})
}

// saved is a store of states, as somebody else keeps them.
type saved map[limits.Cell]limits.QuotaState

func (s saved) from(l *Limiter, since time.Duration) (n int, next time.Duration) {
	next = l.SaveQuotas(since, func(q limits.QuotaState) bool {
		s[q.Cell] = q
		n++
		return true
	})
	return n, next
}

func (s saved) restored(t *testing.T) *Limiter {
	t.Helper()
	l := New(Config{}, nil)
	var states []limits.QuotaState
	for _, q := range s {
		states = append(states, q)
	}
	if err := l.RestoreQuotas(states); err != nil {
		t.Fatal(err)
	}
	heldQuotas(t, l)
	return l
}

// TestQuotasSurviveARestart: windows and lockouts go on where they were, exactly, and calendars end when they
// would have.
func TestQuotasSurviveARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(13*time.Hour + 17*time.Minute + 11)
		sliding := quotaOf(1, limits.Quota{Limit: 500, Window: time.Hour})
		many := quotaOf(2, limits.Quota{Limit: 100_000, Window: time.Hour})
		many.Cost = 150
		day := quotaOf(3, limits.Quota{Limit: 300, Period: limits.Day})
		month := quotaOf(4, limits.Quota{Limit: 700, Period: limits.Month})
		locked := quotaOf(5, limits.Quota{Limit: 2, Window: 20 * time.Second, Lockout: time.Hour})
		short := quotaOf(6, limits.Quota{Limit: 2, Window: 20 * time.Second})
		all := []limits.QuotaDemand{sliding, many, day, month, locked, short}
		// One that never restarts is what the other is compared with.
		a, b := New(Config{}, nil), New(Config{}, nil)
		store, since := saved{}, time.Duration(0)
		dice := rand.New(rand.NewPCG(2, 2))
		for n := range 4000 {
			time.Sleep(time.Duration(dice.Int64N(int64(20 * time.Second))))
			d := demandQuotas(all[dice.IntN(len(all)-1)])
			x, y := mustTake(t, a, d), mustTake(t, b, d)
			slack := time.Duration(0)
			if d.Quotas[0].Quota == many.Quota {
				slack = time.Hour / 100
			}
			if x != y && (x.Allowed && y.Allowed || (x.RetryAfter-y.RetryAfter).Abs() > slack) {
				t.Fatalf("request %d, of %+v: answered %+v, and %+v with restarts", n, d.Quotas, x, y)
			}
			if x.Allowed != y.Allowed {
				// They count differently from here on, within the slack: both begin anew.
				a, b = New(Config{}, nil), New(Config{}, nil)
				store, since = saved{}, 0
				continue
			}
			if dice.IntN(5) == 0 {
				_, since = store.from(b, since)
				if dice.IntN(3) == 0 {
					time.Sleep(time.Duration(dice.Int64N(int64(time.Minute))))
					b, since = store.restored(t), 0
				}
			}
		}
		mustTake(t, b, demandQuotas(short))
		store = saved{}
		store.from(b, 0)
		if _, ok := store[short.Cell]; ok {
			t.Error("a window of 20 s was saved")
		}
	})
}

// TestOnlyWhatChangedIsSaved: and what a crash forgets is what came after the last save.
func TestOnlyWhatChangedIsSaved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{}, nil)
		hour := limits.Quota{Limit: 10, Window: time.Hour}
		for owner := range uint64(5000) {
			mustTake(t, l, demandQuotas(quotaOf(owner, hour)))
		}
		store := saved{}
		n, since := store.from(l, 0)
		if n != 5000 {
			t.Fatalf("%d states saved, want 5000", n)
		}
		time.Sleep(time.Second)
		if n, _ := store.from(l, since); n != 5000 { // counted at the very instant of the save: perhaps after it
			t.Fatalf("%d states saved, want 5000 once more", n)
		}
		_, since = store.from(l, since)
		time.Sleep(time.Second)
		if n, _ := store.from(l, since); n != 0 {
			t.Fatalf("%d states saved though nothing changed", n)
		}
		for owner := range uint64(10) {
			mustTake(t, l, demandQuotas(quotaOf(owner, hour)))
		}
		// One that could not be kept is not taken for saved.
		calls := 0
		if next := l.SaveQuotas(since, func(limits.QuotaState) bool { calls++; return calls < 3 }); next != since || calls != 3 {
			t.Fatalf("%d states, and next is %v, want 3 and %v", calls, next, since)
		}
		if n, next := store.from(l, since); n != 10 || next <= since {
			t.Fatalf("%d states saved, want 10; next is %v after %v", n, next, since)
		}
		for owner := range uint64(3) { // lost by the crash
			for range 4 {
				mustTake(t, l, demandQuotas(quotaOf(owner, hour)))
			}
		}
		time.Sleep(10 * time.Minute)
		l = store.restored(t)
		l.SaveQuotas(0, func(limits.QuotaState) bool { t.Error("restored, not changed, and saved again"); return false })
		for owner, want := range map[uint64]int64{0: 2, 9: 2, 10: 1, 4999: 1} {
			if got := mustLook(t, l, demandQuotas(quotaOf(owner, hour)))[0]; got.Used != want || got.ResetsIn > 50*time.Minute || got.ResetsIn < 49*time.Minute {
				t.Errorf("quota %d stands at %+v, want %d used", owner, got, want)
			}
		}
		time.Sleep(50 * time.Minute)
		if n := heldQuotas(t, store.restored(t)); n != 0 {
			t.Errorf("%d cells restored that say nothing more", n)
		}
	})
}

// TestLockoutsAreSaved: a lockout of an hour outlives the process, also one of a short window.
func TestLockoutsAreSaved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{}, nil)
		q := quotaOf(5, limits.Quota{Limit: 2, Window: 20 * time.Second, Lockout: time.Hour})
		mustTake(t, l, demandQuotas(q))
		mustTake(t, l, demandQuotas(q))
		time.Sleep(time.Second)
		store := saved{}
		n, since := store.from(l, 0)
		if n != 0 {
			t.Fatalf("%d states of a window of 20 s saved", n)
		}
		time.Sleep(time.Second)
		mustTake(t, l, demandQuotas(q))
		if n, _ := store.from(l, since); n != 1 {
			t.Fatalf("%d states saved, want that of the lockout", n)
		}
		time.Sleep(59 * time.Minute)
		l = store.restored(t)
		if got := mustTake(t, l, demandQuotas(q)); got.RetryAfter != time.Minute {
			t.Fatalf("got %+v, want refused for the last minute", got)
		}
		time.Sleep(time.Minute)
		if !mustTake(t, l, demandQuotas(q)).Allowed {
			t.Error("refused after the lockout")
		}
	})
}

func TestWhatCannotBeRestored(t *testing.T) {
	l := New(Config{QuotaCells: 2}, nil)
	hour := limits.Quota{Limit: 10, Window: time.Hour}
	other := New(Config{}, nil)
	store := saved{}
	for owner := range uint64(4) {
		mustTake(t, other, demandQuotas(quotaOf(owner, hour)))
	}
	store.from(other, 0)
	state := func(owner uint64) limits.QuotaState { return store[cellOf(owner, limits.ClassKeyQuota)] }
	damaged := state(1)
	damaged.Counts = []byte("\x01nonsense")
	mustTake(t, l, demandQuotas(quotaOf(0, hour)))
	err := l.RestoreQuotas([]limits.QuotaState{state(0), damaged, state(2), state(3)})
	if err == nil || !strings.Contains(err.Error(), "3 of 4") || !strings.Contains(err.Error(), "has counted already") {
		t.Errorf("got %v", err)
	}
	if err := l.RestoreQuotas([]limits.QuotaState{damaged}); err == nil || !strings.Contains(err.Error(), "damaged") || strings.Contains(err.Error(), "nonsense") {
		t.Errorf("got %v", err)
	}
	if err := l.RestoreQuotas([]limits.QuotaState{state(3)}); !errors.Is(err, apikey.ErrUndecided) {
		t.Errorf("got %v, want the bound's error", err)
	}
	for owner, want := range map[uint64]int64{0: 1, 1: 0, 2: 1, 3: 0} {
		if got := mustLook(t, l, demandQuotas(quotaOf(owner, hour)))[0].Used; got != want {
			t.Errorf("quota %d has %d used, want %d", owner, got, want)
		}
	}
	heldQuotas(t, l)
}

// Requests, saves, looks and the sweep side by side: under the race detector, with the table whole after, and
// every state saved one that can be restored.
func TestSavesBesideRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{SweepEvery: 1}, nil)
		for range 10 {
			var all sync.WaitGroup
			for g := range uint64(8) {
				all.Go(func() {
					dice := rand.New(rand.NewPCG(g, 0))
					for i := range uint64(200) {
						q := quotaOf(dice.Uint64N(60), limits.Quota{Limit: 1 + dice.Int64N(2000), Window: time.Duration(1 + dice.Int64N(int64(10*time.Minute)))})
						mustTake(t, l, demandQuotas(q, limits.QuotaDemand{Cell: cellOf(1, limits.ClassGlobalQuota), Quota: q.Quota, Cost: 1}))
						mustLook(t, l, demandQuotas(q))
						l.sweep(&l.shards[i%shardCount])
						if i%20 == 0 {
							l.SaveQuotas(0, func(s limits.QuotaState) bool {
								if _, _, err := limits.ParseTally(s.Counts, 0, time.Now().UnixNano()); err != nil {
									t.Error(err)
								}
								return true
							})
						}
					}
				})
			}
			all.Wait()
			heldQuotas(t, l)
			time.Sleep(3 * time.Minute)
		}
	})
}

// FuzzRestoreQuotas: any bytes are an error or a state that admits no more than its limit.
func FuzzRestoreQuotas(f *testing.F) {
	l := New(Config{}, nil)
	for _, q := range []limits.Quota{{Limit: 5, Window: time.Hour}, {Limit: 5, Period: limits.Day}, {Limit: 2, Window: time.Hour, Lockout: time.Hour}} {
		d := demandQuotas(quotaOf(uint64(q.Limit)+uint64(q.Period), q))
		for range 3 {
			l.TryTake(d)
		}
	}
	l.SaveQuotas(0, func(s limits.QuotaState) bool { f.Add(s.Counts); return true })
	f.Fuzz(func(t *testing.T, counts []byte) {
		l := New(Config{}, nil)
		q := quotaOf(1, limits.Quota{Limit: 2000, Window: time.Hour})
		_ = l.RestoreQuotas([]limits.QuotaState{{Cell: q.Cell, Counts: counts}})
		heldQuotas(t, l)
		for n := 0; mustTake(t, l, demandQuotas(q)).Allowed; n++ {
			if n >= 2000 {
				t.Fatal("more than the limit passed")
			}
		}
		heldQuotas(t, l)
		store := saved{}
		store.from(l, 0)
		store.restored(t)
	})
}

// threeQuotas are those of a usual request: over everybody, of its principal and of its key.
func threeQuotas(key uint64, q limits.Quota) []limits.QuotaDemand {
	return []limits.QuotaDemand{
		{Cell: cellOf(1, limits.ClassGlobalQuota), Quota: q, Cost: 1},
		{Cell: cellOf(key%1000, limits.ClassPrincipalQuota), Quota: q, Cost: 1},
		{Cell: cellOf(key, limits.ClassKeyQuota), Quota: q, Cost: 1},
	}
}

// What three quotas cost beside the rates of a usual request: none, exact windows that let one of many pass,
// windows in hundredths, and a calendar.
func BenchmarkTryTakeQuotas(b *testing.B) {
	for _, tt := range []struct {
		name  string
		quota limits.Quota
	}{
		{"none", limits.Quota{}},
		{"exact", limits.Quota{Limit: 1000, Window: time.Millisecond}},
		{"coarse", limits.Quota{Limit: 1_000_000_000, Window: time.Hour}},
		{"calendar", limits.Quota{Limit: 1 << 50, Period: limits.Month}},
		{"refused", limits.Quota{Limit: 1000, Window: 24 * time.Hour}},
	} {
		b.Run(tt.name, func(b *testing.B) {
			b.ReportAllocs()
			l, d := New(Config{}, nil), usual(7)
			d.Quotas = threeQuotas(7, tt.quota)
			for b.Loop() {
				l.TryTake(d)
			}
		})
	}
}
