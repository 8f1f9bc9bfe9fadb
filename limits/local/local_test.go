package local

import (
	"encoding/binary"
	"flag"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/limits"
	"keyward/limits/limitstest"
)

func TestContract(t *testing.T) {
	limitstest.RunInBubble(t, func(*testing.T) limitstest.Subject {
		return limitstest.Subject{Limiter: New(Config{}, nil), Advance: time.Sleep}
	})
}

var sequences = flag.Int("sequences", 1_000_000, "random sequences of demands on quotas to hold the limiter to; a fiftieth under -race")

func openTable(*testing.T) limitstest.Subject {
	return limitstest.Subject{Limiter: New(Config{}, nil), Advance: time.Sleep}
}

func TestQuotasAreTheOracle(t *testing.T) {
	n := *sequences
	if raceEnabled {
		n /= 50
	}
	limitstest.Sequences(t, n, openTable)
}

func TestRetryAfterIsTrue(t *testing.T) {
	n := 100_000
	if raceEnabled {
		n /= 10
	}
	limitstest.Retries(t, n, openTable)
}

func cellOf(owner uint64, class limits.Class) limits.Cell {
	c := limits.Cell{Class: class}
	binary.BigEndian.PutUint64(c.Owner[8:], owner)
	return c
}

// demandOf is a demand on so many limits of one owner's.
func demandOf(owner uint64, n int, r limits.Rate) *limits.Demand {
	var d limits.Demand
	for i := range n {
		d.Rates = append(d.Rates, limits.RateDemand{Cell: cellOf(owner, limits.Class(1+i)), Rate: r})
	}
	return &d
}

func mustTake(t *testing.T, l *Limiter, d *limits.Demand) limits.Decision {
	t.Helper()
	decision, ok := l.TryTake(d)
	if !ok {
		t.Fatal("TryTake did not decide")
	}
	return decision
}

// gathered reads the limiter's metrics, by name and label; of a histogram, its count.
func gathered(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), "keyward_limits_")
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			values[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return values
}

func counted(t *testing.T, reg *prometheus.Registry) (cells, swept float64) {
	t.Helper()
	values := gathered(t, reg)
	return values["cells"], values["swept_cells_total"]
}

// held counts the cells in the table, and checks that index and slots agree.
func held(t *testing.T, l *Limiter) (n int) {
	t.Helper()
	for i := range l.shards {
		s := &l.shards[i]
		if len(s.index) != len(s.slots) {
			t.Fatalf("shard %d: %d cells in the index, %d slots", i, len(s.index), len(s.slots))
		}
		for position, slot := range s.slots {
			if at, ok := s.index[slot.cell]; !ok || int(at) != position {
				t.Fatalf("shard %d: the cell in slot %d is in the index at %d, %t", i, position, at, ok)
			}
			if l.shardOf(&slot.cell) != int32(i) {
				t.Fatalf("shard %d holds a cell of shard %d", i, l.shardOf(&slot.cell))
			}
		}
		n += len(s.slots)
	}
	heldQuotas(t, l)
	return n
}

func TestOnlyWhatIsSpentCostsACell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		l := New(Config{}, reg)
		want := func(cells int) {
			t.Helper()
			counted, _ := counted(t, reg)
			if n := held(t, l); n != cells || counted != float64(cells) {
				t.Fatalf("%d cells held and %v counted, want %d", n, counted, cells)
			}
		}
		if !mustTake(t, l, demandOf(1, 5, limits.Rate{})).Allowed {
			t.Fatal("refused by limits that are none")
		}
		want(0)
		d := demandOf(2, 1, limits.Rate{Interval: time.Hour, Burst: 1})
		mustTake(t, l, d)
		want(1)
		// Refused by the limit that is spent: the others stay as if never named.
		d.Rates = append(d.Rates, demandOf(3, 5, limits.Rate{Interval: time.Hour, Burst: 1}).Rates...)
		if mustTake(t, l, d).Allowed {
			t.Fatal("allowed over a limit that is spent")
		}
		want(1)
	})
}

func TestIdleCellsAreSweptAndBusyOnesStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		l := New(Config{}, reg)
		const idle, busy = 20_000, 500
		// The clock stands still, so only the first of these requests takes a step of the sweep.
		for i := range uint64(idle) {
			mustTake(t, l, demandOf(i, 1, limits.Rate{Interval: time.Second, Burst: 5}))
		}
		slow := limits.Rate{Interval: 24 * time.Hour, Burst: 1}
		for i := range uint64(busy) {
			mustTake(t, l, demandOf(idle+i, 1, slow))
		}
		if n := held(t, l); n != idle+busy {
			t.Fatalf("%d cells before the sweep, want %d", n, idle+busy)
		}

		// A nanosecond too early nothing is idle; a second after the one request of each, all are.
		time.Sleep(time.Second - time.Nanosecond)
		for range 2 * shardCount {
			l.sweep(&l.shards[l.sweepNext.Add(1)%shardCount])
		}
		if n := held(t, l); n != idle+busy {
			t.Fatalf("%d cells swept that were not idle", idle+busy-n)
		}
		time.Sleep(time.Nanosecond)

		// Requests of a single key sweep the whole table, a step each millisecond.
		steps := 0
		for held(t, l) > busy {
			before := held(t, l)
			mustTake(t, l, demandOf(idle, 1, slow))
			if gone := before - held(t, l); gone > sweepStep {
				t.Fatalf("one request swept %d cells, want at most %d", gone, sweepStep)
			}
			if steps++; steps > 10*(idle/sweepStep+shardCount) {
				t.Fatalf("%d cells left after %d steps", held(t, l), steps)
			}
			time.Sleep(time.Millisecond)
		}
		if cells, swept := counted(t, reg); cells != busy || swept != idle {
			t.Errorf("%v cells and %v swept counted, want %d and %d", cells, swept, busy, idle)
		}
		for i := range uint64(busy) {
			if mustTake(t, l, demandOf(idle+i, 1, slow)).Allowed {
				t.Fatalf("busy key %d had its bucket filled", i)
			}
		}
	})
}

func TestSweepIsNotTakenTooOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{SweepEvery: time.Second}, nil)
		d := demandOf(1, 1, limits.Rate{Interval: 1, Burst: 1_000_000})
		mustTake(t, l, d) // the first request of all
		for _, tt := range []struct {
			after time.Duration
			want  uint32
		}{{0, 1}, {time.Second - 1, 1}, {1, 2}, {0, 2}, {time.Hour, 3}, {0, 3}} {
			time.Sleep(tt.after)
			for range 10 {
				mustTake(t, l, d)
			}
			if got := l.sweepNext.Load(); got != tt.want {
				t.Fatalf("%d steps taken, want %d", got, tt.want)
			}
		}
	})
}

// Requests, refusals and the sweep side by side: under the race detector, and with the table whole after.
func TestSweepBesideRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{SweepEvery: 1}, nil)
		for range 20 {
			var all sync.WaitGroup
			for g := range uint64(8) {
				all.Go(func() {
					for i := range uint64(200) {
						owner := (i*g + i) % 100
						mustTake(t, l, demandOf(owner, 3, limits.Rate{Interval: time.Microsecond, Burst: 10}))
						l.sweep(&l.shards[i%shardCount])
					}
				})
			}
			all.Wait()
			held(t, l)
			time.Sleep(7 * time.Microsecond)
		}
	})
}

// The clock is read when the locks are held, not when the request came: what waited for a lock is judged
// by the time at which it got it.
func TestClockIsReadUnderTheLocks(t *testing.T) {
	l := New(Config{}, nil)
	const interval = 2 * time.Millisecond
	d := demandOf(1, 2, limits.Rate{Interval: interval, Burst: 1})
	mustTake(t, l, d)
	// Until this lock is free the request waits, longer than until its bucket is full again.
	s := &l.shards[l.shardOf(&d.Rates[1].Cell)]
	s.mu.Lock()
	asking, answer := make(chan struct{}), make(chan limits.Decision)
	go func() {
		close(asking)
		decision, _ := l.TryTake(d)
		answer <- decision
	}()
	<-asking
	for until := l.now() + 2*int64(interval); l.now() < until; {
		runtime.Gosched()
	}
	s.mu.Unlock()
	if got := <-answer; !got.Allowed {
		t.Errorf("got %+v: judged by a time from before the lock was free", got)
	}
}

// hasPointer reports whether a value of a type holds anything for the garbage collector to follow.
func hasPointer(typ reflect.Type) bool {
	if typ.Kind() == reflect.Struct {
		for i := range typ.NumField() {
			if hasPointer(typ.Field(i).Type) {
				return true
			}
		}
		return false
	}
	if typ.Kind() == reflect.Array {
		return hasPointer(typ.Elem())
	}
	return typ.Kind() < reflect.Bool || typ.Kind() > reflect.Complex128
}

func TestTableHoldsNoPointers(t *testing.T) {
	index := reflect.TypeFor[shard]().Field(1)
	if index.Name != "index" {
		t.Fatalf("the second field of a shard is %s, not its index", index.Name)
	}
	for _, typ := range []reflect.Type{
		reflect.TypeFor[slot](), index.Type.Key(), index.Type.Elem(), reflect.TypeFor[quotaSlot](), reflect.TypeFor[limits.Run](),
		reflect.TypeFor[lease](), reflect.TypeFor[identityEntry](), reflect.TypeFor[memoryEntry](),
	} {
		if hasPointer(typ) {
			t.Errorf("%s holds a pointer", typ)
		}
	}
	for name, size := range map[string]uintptr{"cells": unsafe.Sizeof(shard{}), "identities": unsafe.Sizeof(identities{})} {
		if size%64 != 0 {
			t.Errorf("a shard of %s has %d bytes, want whole cache lines of 64, or neighbours slow each other down", name, size)
		}
	}
	if size := unsafe.Sizeof(slot{}); size != 32 {
		t.Errorf("a slot has %d bytes, want no more than the 32 of a cell and a time", size)
	}
}

func TestCellsSpreadOverShards(t *testing.T) {
	l := New(Config{}, nil)
	for name, cell := range map[string]func(i uint64) limits.Cell{
		"consecutive owners": func(i uint64) limits.Cell { return cellOf(i, limits.ClassBurst) },
		"owners that differ at the front": func(i uint64) limits.Cell {
			c := cellOf(0, limits.ClassBurst)
			binary.BigEndian.PutUint64(c.Owner[:], i<<40)
			return c
		},
		"classes": func(i uint64) limits.Cell { return cellOf(0, limits.Class(i)) },
	} {
		var shards [shardCount]int
		n := 64 * shardCount
		if name == "classes" {
			n = 256
		}
		for i := range uint64(n) {
			c := cell(i)
			shards[l.shardOf(&c)]++
		}
		mean := n / shardCount
		for i, got := range shards {
			if got > 2*mean+20 { // ten standard deviations and more
				t.Errorf("%s: shard %d holds %d of %d", name, i, got, n)
			}
		}
	}
}

func TestDecisionsDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates; run without -race")
	}
	slow := limits.Rate{Interval: 24 * time.Hour, Burst: 1}
	fast := limits.Rate{Interval: 1, Burst: 1_000_000}
	for _, tt := range []struct {
		name    string
		n       int
		rate    limits.Rate
		quota   limits.Quota // three of them
		allowed bool
	}{
		{"nothing to limit", 4, limits.Rate{}, limits.Quota{}, true},
		{"one limit", 1, fast, limits.Quota{}, true},
		{"key and instance", 2, fast, limits.Quota{}, true},
		{"as many as usual", usualLimits, fast, limits.Quota{}, true},
		{"one limit, refused", 1, slow, limits.Quota{}, false},
		{"as many as usual, refused", usualLimits, slow, limits.Quota{}, false},
		{"three quotas", 2, fast, limits.Quota{Limit: 1000, Window: 1}, true},
		{"three quotas of many units", 2, fast, limits.Quota{Limit: 1 << 40, Window: time.Hour}, true},
		{"three calendars", 2, fast, limits.Quota{Limit: 1 << 40, Period: limits.Month}, true},
		{"three quotas, refused", 2, fast, limits.Quota{Limit: 1, Window: time.Hour}, false},
		{"three quotas, locked", 2, fast, limits.Quota{Limit: 1, Window: time.Hour, Lockout: time.Hour}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := New(Config{}, nil)
			var d limits.Demand
			for i := range tt.n {
				d.Rates = append(d.Rates, limits.RateDemand{Cell: cellOf(uint64(tt.n-i), limits.ClassBurst), Rate: tt.rate})
			}
			if !tt.quota.IsZero() {
				d.Quotas = threeQuotas(7, tt.quota)
			}
			mustTake(t, l, &d)
			ctx := t.Context()
			for name, take := range map[string]func() (limits.Decision, bool){
				"TryTake": func() (limits.Decision, bool) { return l.TryTake(&d) },
				"Take": func() (limits.Decision, bool) {
					decision, err := l.Take(ctx, &d)
					return decision, err == nil
				},
			} {
				if allocs := testing.AllocsPerRun(1000, func() {
					if decision, ok := take(); !ok || decision.Allowed != tt.allowed {
						t.Fatalf("got %+v, %t", decision, ok)
					}
				}); allocs != 0 {
					t.Errorf("%s: %v allocations, want 0", name, allocs)
				}
			}
		})
	}
}

// The limits of a usual request: its key's and its instance's.
func usual(key uint64) *limits.Demand {
	r := limits.Rate{Interval: 1, Burst: 1_000_000_000}
	return &limits.Demand{Rates: []limits.RateDemand{
		{Cell: cellOf(key%100, limits.ClassInstance), Rate: r},
		{Cell: cellOf(key, limits.ClassBurst), Rate: r},
	}}
}

func BenchmarkTryTake(b *testing.B) {
	b.ReportAllocs()
	l, d := New(Config{}, nil), usual(7)
	for b.Loop() {
		l.TryTake(d)
	}
}

func BenchmarkTryTakeManyKeys(b *testing.B) {
	b.ReportAllocs()
	l, d := New(Config{}, nil), usual(7)
	d.Rates[1].Rate = limits.Rate{Interval: time.Hour, Burst: 1000}
	var key uint64
	for b.Loop() {
		key += 0x9e3779b97f4a7c15
		binary.BigEndian.PutUint64(d.Rates[1].Cell.Owner[8:], key>>46) // of 262,144
		l.TryTake(d)
	}
}

func BenchmarkTryTakeParallel(b *testing.B) {
	b.ReportAllocs()
	l := New(Config{}, nil)
	b.RunParallel(func(pb *testing.PB) {
		d := usual(7)
		for pb.Next() {
			l.TryTake(d)
		}
	})
}
