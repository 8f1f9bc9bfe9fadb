package local

import (
	"context"
	"errors"
	"flag"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"pgregory.net/rapid"

	"keyward/authz/apikey"
	"keyward/limits"
	"keyward/limits/limitstest"
)

var histories = flag.Int("histories", 100_000, "random histories of leases to hold the limiter to; a tenth under -race")

func openLeases(*testing.T) limitstest.LeaseSubject {
	return limitstest.LeaseSubject{
		Leaser: New(Config{}, nil), Started: time.Now(), TTL: 35 * time.Second, OrphanTTL: 13 * time.Second,
	}
}

func TestLeaseContract(t *testing.T) { limitstest.RunLeasesInBubble(t, openLeases) }

func TestLeaseHistories(t *testing.T) {
	n := *histories
	if raceEnabled {
		n /= 10
	}
	limitstest.Histories(t, n, openLeases)
}

// leaseOf is a lease of a request that began an hour after any process did.
func leaseOf(owner, request uint64) limits.Lease {
	return limits.Lease{
		Cell:     cellOf(owner, limits.ClassConcurrency),
		Identity: limits.Identity{Peer: [16]byte{15: 1}, Port: 4711, Start: time.Now().Add(time.Hour).UnixMicro() + int64(request)},
		HTTP:     request,
	}
}

func asking(e limits.Lease, limit int64) *limits.Demand {
	return &limits.Demand{Lease: limits.LeaseDemand{Lease: e, Limit: limit, Connection: 1}}
}

func endings(cause limits.Cause, leases ...limits.Lease) (e []limits.Ending) {
	for _, lease := range leases {
		e = append(e, limits.Ending{Lease: lease, Cause: cause})
	}
	return e
}

func mustEnd(t testing.TB, l *Limiter, e ...limits.Ending) {
	t.Helper()
	if err := l.End(t.Context(), e); err != nil {
		t.Fatal(err)
	}
}

func mustRenew(t testing.TB, l *Limiter, e ...limits.Lease) {
	t.Helper()
	if err := l.Renew(t.Context(), e); err != nil {
		t.Fatal(err)
	}
}

// whole checks that all tables and lists of the limiter's leases agree, and returns how many live.
func whole(t *testing.T, l *Limiter) (live int) {
	t.Helper()
	held(t, l)
	found := make(map[place]uint64) // hashes
	for i := range l.shards {
		s := &l.shards[i]
		ofCell, ofConnection := make(map[limits.Cell]int32), make(map[uint64]int)
		n := 0
		for at := range s.leases.table {
			if e := &s.leases.table[at]; e.live {
				n++
				ofCell[e.Cell]++
				ofConnection[e.connection]++
				found[place{int32(i), int32(at)}] = l.hashOf(&e.Lease)
			}
		}
		if n != int(s.leases.live) {
			t.Fatalf("shard %d has %d leases, and counts %d", i, n, s.leases.live)
		}
		live += n
		for _, slot := range s.slots {
			if slot.live != ofCell[slot.cell] {
				t.Fatalf("a cell counts %d leases, want %d", slot.live, ofCell[slot.cell])
			}
			if q := s.queues.byCell[slot.cell]; slot.queued != (q != nil) || q != nil && q.first == nil && q.turns == 0 {
				t.Fatalf("a cell says it has a queue: %t; it has %+v", slot.queued, q)
			}
			delete(ofCell, slot.cell)
		}
		if len(ofCell) > 0 {
			t.Fatalf("leases of cells that are not there: %v", ofCell)
		}
		for in, o := range s.leases.orders {
			until, last := int64(0), int32(none)
			for at := o.oldest; at != none; last, at = at, s.leases.table[at].newer {
				e := &s.leases.table[at]
				if !e.live || int(e.order) != in || e.older != last || e.until < until {
					t.Fatalf("lease %+v is out of order after %d, until %d", e, last, until)
				}
				until = e.until
				n--
			}
			if o.newest != last {
				t.Fatalf("the newest is %d, want %d", o.newest, last)
			}
		}
		if n != 0 {
			t.Fatalf("%d leases are in no order of expiry", n)
		}
		delete(ofConnection, 0)
		for connection, at := range s.leases.connections {
			for before := int32(none); at != none; before, at = at, s.leases.table[at].after {
				if e := &s.leases.table[at]; !e.live || e.connection != connection || e.before != before {
					t.Fatalf("lease %+v is in the list of connection %d", e, connection)
				}
				ofConnection[connection]--
			}
			if ofConnection[connection] != 0 {
				t.Fatalf("%d leases are not in the list of connection %d", ofConnection[connection], connection)
			}
			delete(ofConnection, connection)
		}
		if len(ofConnection) > 0 {
			t.Fatalf("leases of connections without a list: %v", ofConnection)
		}
		if s.queues.waiting == 0 && s.queues.alarmAt != 0 {
			t.Fatal("an alarm is set for nobody")
		}
	}
	for i := range l.identities {
		ids := &l.identities[i]
		for hash, at := range ids.index {
			if at == none {
				t.Fatal("an identity without entries")
			}
			for ; at != none; at = ids.entries[at].next {
				if got, ok := found[ids.entries[at].place]; !ok || got != hash {
					t.Fatalf("an identity has a lease that is not there, or not its own")
				}
				delete(found, ids.entries[at].place)
			}
		}
	}
	if len(found) > 0 {
		t.Fatalf("%d leases are not found by their identity", len(found))
	}
	return live
}

func TestLeasesAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		l := New(Config{RenewEvery: 2 * time.Second}, reg) // a lease lives 7 s, an orphan 5
		var e []limits.Lease
		for i := range uint64(10) {
			e = append(e, leaseOf(1, i))
		}
		for i := range e[:7] {
			d := asking(e[i], 7)
			if i == 6 {
				d.Lease.Connection = 9
			}
			mustTake(t, l, d)
		}
		mustTake(t, l, asking(e[0], 7)) // the same again
		mustTake(t, l, asking(e[7], 7)) // refused
		if n := gathered(t, reg)["leases"]; n != 7 {
			t.Errorf("%v leases, want 7", n)
		}
		mustEnd(t, l, endings(limits.CauseLog, e[0], e[0])...) // the second is unknown
		mustEnd(t, l, endings(limits.CauseContext, e[1])...)
		mustEnd(t, l, endings(limits.CauseForced, e[2])...)
		mustEnd(t, l, endings(200, e[3])...)
		mustEnd(t, l, limits.Ending{Lease: limits.Lease{Identity: e[4].Identity}, AllOfIdentity: true, Cause: limits.CauseIdentity})
		mustEnd(t, l, limits.Ending{Lease: limits.Lease{Identity: e[8].Identity}, AllOfIdentity: true}) // unknown
		mustEnd(t, l, limits.Ending{AllOfIdentity: true})                                               // names nothing
		l.Disconnected(9)

		var all sync.WaitGroup
		all.Go(func() {
			d := asking(e[9], 1)
			d.Lease.Wait = time.Second
			if got, err := l.Take(t.Context(), d); err != nil || got.Allowed || got.Waited != time.Second {
				t.Errorf("got %+v, %v", got, err)
			}
		})
		synctest.Wait()
		if n := gathered(t, reg)["waiting"]; n != 1 {
			t.Errorf("%v wait, want 1", n)
		}
		all.Wait()
		time.Sleep(7 * time.Second)
		mustRenew(t, l, e[6], e[8])

		got := gathered(t, reg)
		for name := range got {
			if got[name] == 0 {
				delete(got, name)
			}
		}
		want := map[string]float64{
			"cells": 1, "leases": 1, "leases_granted_total": 7, "leases_refused_total": 2, "leases_adopted_total": 1,
			"leases_ended_total log": 1, "leases_ended_total context": 1, "leases_ended_total force": 1,
			"leases_ended_total unknown": 1, "leases_ended_total identity": 1, "leases_ended_total expiry": 1,
			"leases_ended_total node": 1, "leases_unknown_total end": 3, "leases_unknown_total renewal": 1,
			"lease_wait_seconds": 1,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("metrics (-want +got):\n%s", diff)
		}
		if n := whole(t, l); n != 1 {
			t.Errorf("%d live, want 1", n)
		}
		// Whoever looks sees what is, also where no request has come since.
		time.Sleep(time.Hour)
		if n := gathered(t, reg)["leases"]; n != 0 {
			t.Errorf("%v leases after an hour", n)
		}
	})
}

func TestCellsWithLeasesAreNotSwept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Config{TTL: time.Hour}, nil)
		const cells = 5000
		for i := range uint64(cells) {
			mustTake(t, l, asking(leaseOf(i, i), 1))
		}
		sweepAll := func() {
			for range 10 {
				for i := range l.shards {
					l.sweep(&l.shards[i])
				}
			}
		}
		sweepAll()
		if n := held(t, l); n != cells {
			t.Fatalf("%d cells were swept with a lease in each", cells-n)
		}
		// Every second one ends: what stays moves about in the table, and is found and ended all the same.
		for i := uint64(0); i < cells; i += 2 {
			mustEnd(t, l, endings(limits.CauseLog, leaseOf(i, i))...)
		}
		sweepAll()
		if n := whole(t, l); n != cells/2 || held(t, l) != cells/2 {
			t.Fatalf("%d leases in %d cells, want %d in as many", n, held(t, l), cells/2)
		}
		var waiting sync.WaitGroup
		waiting.Go(func() {
			d := asking(leaseOf(1, 99), 1)
			d.Lease.Wait = time.Minute
			if got, err := l.Take(t.Context(), d); err != nil || !got.Allowed {
				t.Errorf("got %+v, %v", got, err)
			}
		})
		synctest.Wait()
		for i := uint64(1); i < cells; i += 2 {
			mustEnd(t, l, endings(limits.CauseLog, leaseOf(i, i))...)
			if i == 1 {
				sweepAll() // while one has a turn
			}
		}
		waiting.Wait()
		sweepAll()
		if n := whole(t, l); n != 1 || held(t, l) != 1 {
			t.Fatalf("%d leases in %d cells, want 1 in 1", n, held(t, l))
		}
		// The sweep alone ends what is over.
		time.Sleep(time.Hour)
		sweepAll()
		if n := whole(t, l); n != 0 || held(t, l) != 0 {
			t.Fatalf("%d leases in %d cells, want none", n, held(t, l))
		}
	})
}

func TestTimesFollowTheConfiguration(t *testing.T) {
	for _, tt := range []struct {
		name       string
		in         Config
		ttl, after time.Duration // of its connection
	}{
		{"as shipped", Config{}, 35 * time.Second, 13 * time.Second},
		{"renewed every second", Config{RenewEvery: time.Second}, 3500 * time.Millisecond, 3500 * time.Millisecond},
		{"a time to live of its own", Config{RenewEvery: 4 * time.Second, TTL: time.Minute}, time.Minute, 7 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := New(tt.in, nil)
				start := time.Now()
				mustTake(t, l, asking(leaseOf(1, 1), 1))
				until := func() time.Duration {
					running := l.Running(func(limits.Cell) bool { return true })
					if len(running) != 1 {
						t.Fatalf("%+v run", running)
					}
					return running[0].Until.Sub(start)
				}
				if got := until(); got != tt.ttl {
					t.Errorf("a lease lives %s, want %s", got, tt.ttl)
				}
				l.Disconnected(1)
				if got := until(); got != tt.after {
					t.Errorf("an orphan lives %s, want %s", got, tt.after)
				}
			})
		})
	}
}

// The process may be older than its limiter.
func TestYouthIsTheProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		started := time.Now().Add(-44 * time.Second).Round(0)
		l := New(Config{Started: started}, nil)
		older, newer, late := leaseOf(1, 1), leaseOf(1, 2), leaseOf(1, 3)
		older.Identity.Start = started.UnixMicro() + skew.Microseconds()
		newer.Identity.Start = older.Identity.Start + 1
		late.Identity.Start = older.Identity.Start
		mustRenew(t, l, older, newer)
		if n := whole(t, l); n != 1 {
			t.Errorf("%d adopted, want 1", n)
		}
		time.Sleep(time.Second)
		mustRenew(t, l, late)
		if n := whole(t, l); n != 1 {
			t.Errorf("%d live after the process's youth, want 1", n)
		}
	})
}

func TestMemoriesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		l := New(Config{}, reg)
		const bound = max(goneBound, earlyBound, expiredBound)
		most := func(of func(*identities) *memory, bound int) (most int) {
			t.Helper()
			for i := range l.identities {
				m := of(&l.identities[i])
				if m.held > bound || len(m.entries) > bound+1 {
					t.Fatalf("%d remembered in %d entries, want at most %d", m.held, len(m.entries), bound)
				}
				most = max(most, m.held)
			}
			return most
		}
		gone := func(ids *identities) *memory { return &ids.gone }
		early := func(ids *identities) *memory { return &ids.early }
		expired := func(ids *identities) *memory { return &ids.expired }

		for i := range uint64(3 * bound * shardCount / 2) {
			e := leaseOf(i, i)
			e.Identity.Start = int64(i) // older than the process
			mustEnd(t, l, limits.Ending{Lease: e, AllOfIdentity: i%2 == 0})
		}
		if most(gone, goneBound) != goneBound || most(early, earlyBound) != earlyBound {
			t.Error("the bounds were not reached: the test is too small")
		}
		forgotten := gathered(t, reg)["leases_forgotten_total"]
		if forgotten == 0 {
			t.Error("what was forgotten is not counted")
		}

		// When their time is over, they go without being counted as forgotten.
		time.Sleep(adoptFor)
		for i := range uint64(bound * shardCount) {
			mustTake(t, l, asking(leaseOf(i%1000, i), math.MaxInt64))
		}
		time.Sleep(35 * time.Second)
		for i := range uint64(shardCount * 20) {
			mustEnd(t, l, limits.Ending{Lease: leaseOf(i, i)}, limits.Ending{Lease: leaseOf(i, i), AllOfIdentity: true})
		}
		if n := most(early, earlyBound); n != 0 || l.identities[0].early.entries != nil {
			t.Errorf("%d early ends are remembered for good", n)
		}
		if n := most(gone, goneBound); n > 60 {
			t.Errorf("%d ends of identities are remembered for too long", n)
		}
		if most(expired, expiredBound) != expiredBound {
			t.Error("the bound of expired leases was not reached: the test is too small")
		}
		if now := gathered(t, reg)["leases_forgotten_total"]; now <= forgotten {
			t.Error("forgotten leases are not counted")
		}
		if n := whole(t, l); n != 0 {
			t.Errorf("%d live", n)
		}
	})
}

// A memory is a list of what was added, the newest last, of which only so many and so young count.
func TestMemory(t *testing.T) {
	type kept struct {
		hash  uint64
		lease limits.Lease
		until int64
	}
	rapid.Check(t, func(t *rapid.T) {
		var m memory
		var model []kept
		bound := rapid.IntRange(1, 6).Draw(t, "bound")
		now := int64(0)
		draw := func() (uint64, limits.Lease) {
			port := rapid.Uint16Range(0, 4).Draw(t, "port")
			e := limits.Lease{Identity: limits.Identity{Port: port}}
			if e.HTTP = rapid.Uint64Range(0, 2).Draw(t, "http"); port == 0 {
				e.HTTP++
			}
			return uint64(port / 2), e // two identities have one hash
		}
		exactly := func(e limits.Lease) func(kept) bool { return func(k kept) bool { return k.lease == e } }
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			model = slices.DeleteFunc(model, func(k kept) bool { return k.until <= now })
			hash, e := draw()
			switch rapid.IntRange(0, 5).Draw(t, "step") {
			case 0, 1:
				model = slices.DeleteFunc(model, exactly(e))
				want := len(model) == bound
				if want {
					model = model[1:]
				}
				model = append(model, kept{hash, e, now + 10})
				if got := m.add(hash, &e, now, now+10, bound); got != want {
					t.Fatalf("add forgot another: %t, want %t", got, want)
				}
			case 2:
				m.prune(now)
				want := slices.ContainsFunc(model, exactly(e))
				model = slices.DeleteFunc(model, exactly(e))
				if got := m.forget(hash, &e); got != want {
					t.Fatalf("forget knew it: %t, want %t", got, want)
				}
			case 3:
				m.prune(now)
				model = slices.DeleteFunc(model, func(k kept) bool { return k.lease.Identity == e.Identity })
				m.forgetAll(hash, e.Identity)
			case 4:
				now += rapid.Int64Range(0, 12).Draw(t, "time")
				continue
			}
			want := slices.ContainsFunc(model, func(k kept) bool {
				return k.lease == e || !e.Identity.IsZero() && k.lease == limits.Lease{Identity: e.Identity}
			})
			if got := m.has(hash, &e, now); got != want {
				t.Fatalf("has it: %t, want %t", got, want)
			}
			if m.held != len(model) {
				t.Fatalf("holds %d, want %d", m.held, len(model))
			}
		}
	})
}

// An end of an identity and grants to it at one moment: whichever comes first, nothing lives after both.
func TestNoGrantSlipsPastTheEndOfItsIdentity(t *testing.T) {
	l := New(Config{}, nil)
	for round := range uint64(2000) {
		var all sync.WaitGroup
		for redirect := range uint64(3) {
			all.Go(func() {
				e := leaseOf(redirect, redirect)
				e.Identity.Start = math.MaxInt64 - int64(round)
				_, _ = l.Take(t.Context(), asking(e, 1000))
			})
		}
		all.Go(func() {
			e := limits.Lease{Identity: leaseOf(0, 0).Identity}
			e.Identity.Start = math.MaxInt64 - int64(round)
			mustEnd(t, l, limits.Ending{Lease: e, AllOfIdentity: true})
		})
		all.Wait()
	}
	if n := whole(t, l); n != 0 {
		t.Errorf("%d leases of requests that ended", n)
	}
}

// Between the moment in which a lease's place is noted and that in which it is ended, another lease may
// have come there.
func TestPlaceIsOfOneIdentity(t *testing.T) {
	l := New(Config{}, nil)
	e, other := leaseOf(1, 1), leaseOf(1, 2)
	mustTake(t, l, asking(e, 1))
	noted := place{l.shardOf(&e.Cell), l.shards[l.shardOf(&e.Cell)].leases.orders[kept].oldest}
	mustEnd(t, l, endings(limits.CauseLog, e)...)
	mustTake(t, l, asking(other, 1))
	hash := l.hashOf(&e)
	if l.endPlace(l.identitiesOf(hash), hash, e.Identity, noted, limits.CauseIdentity) || whole(t, l) != 1 {
		t.Error("the end of an identity ended another's lease")
	}
	hash = l.hashOf(&other)
	if !l.endPlace(l.identitiesOf(hash), hash, other.Identity, noted, limits.CauseIdentity) || whole(t, l) != 0 {
		t.Error("the lease was not in the other's place: the test tests nothing")
	}
}

// An identity that names nothing is not worth remembering.
func TestNoIdentityIsNotRemembered(t *testing.T) {
	l := New(Config{}, nil)
	for i := range int64(1000) {
		mustEnd(t, l, limits.Ending{Lease: limits.Lease{Identity: limits.Identity{Start: i}}, AllOfIdentity: true})
	}
	for i := range l.identities {
		if ids := &l.identities[i]; ids.gone.held+ids.early.held > 0 {
			t.Fatal("it is remembered")
		}
	}
}

// A waiter may leave for another reason in the moment in which it gets its turn. Whoever uses it next
// must not wake by that.
func TestWaitersAreUsedAgain(t *testing.T) {
	l := New(Config{}, nil)
	w := newWaiter().(*waiter)
	w.timer.Reset(time.Hour)
	w.turn = true
	w.ready <- struct{}{}
	l.recycle(w)
	if len(w.ready) > 0 || w.turn || w.timer.Stop() {
		t.Errorf("it is not as new: %d, %t", len(w.ready), w.turn)
	}
}

// Everything at once, on few cells, and the tables are whole after.
func TestStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		l := New(Config{SweepEvery: 1}, reg)
		const people, steps, owners = 200, 60, 5
		for range 3 {
			var all sync.WaitGroup
			for person := range uint64(people) {
				all.Go(func() {
					dice := rand.New(rand.NewPCG(person, uint64(time.Now().UnixNano())))
					var mine []limits.Lease
					for step := range uint64(steps) {
						e := leaseOf(dice.Uint64N(owners), person*steps+step)
						if dice.IntN(5) == 0 && len(mine) > 0 {
							e = mine[dice.IntN(len(mine))]
						}
						switch dice.IntN(10) {
						case 0:
							mustEnd(t, l, limits.Ending{Lease: e, AllOfIdentity: true, Cause: limits.CauseIdentity})
						case 1:
							mustRenew(t, l, append(mine, e)...)
						case 2:
							mustEnd(t, l, endings(limits.CauseLog, append(mine, e)...)...)
						case 3:
							l.Disconnected(dice.Uint64N(4))
						case 4:
							time.Sleep(time.Duration(dice.IntN(int(20 * time.Second))))
						case 5:
							l.sweep(&l.shards[dice.IntN(shardCount)])
						default:
							mine = append(mine, e)
							d := asking(e, 1+dice.Int64N(9))
							d.Lease.Connection = dice.Uint64N(4)
							d.Lease.Wait = time.Duration(dice.IntN(int(30 * time.Second)))
							d.Rates = demandOf(dice.Uint64N(owners), 2, limits.Rate{Interval: time.Millisecond, Burst: 50}).Rates
							ctx, cancel := context.WithTimeout(t.Context(), time.Duration(dice.IntN(int(40*time.Second))))
							if _, err := l.Take(ctx, d); err != nil && !errors.Is(err, apikey.ErrUndecided) {
								t.Error(err)
							}
							cancel()
						}
					}
				})
			}
			all.Wait()
			whole(t, l)
		}
		time.Sleep(35 * time.Second)
		values := gathered(t, reg)
		if n := whole(t, l); n != 0 || values["leases"] != 0 || values["waiting"] != 0 {
			t.Errorf("%d leases live, %v are counted, %v wait", n, values["leases"], values["waiting"])
		}
		ended := 0.0
		for _, cause := range []string{"log", "identity", "expiry", "node"} {
			ended += values["leases_ended_total "+cause]
		}
		if begun := values["leases_granted_total"] + values["leases_adopted_total"]; begun != ended || begun < people {
			t.Errorf("%v leases began, %v ended", begun, ended)
		}
		for i := range l.shards {
			if s := &l.shards[i]; len(s.queues.byCell) > 0 || len(s.leases.connections) > 0 {
				t.Fatalf("left behind: %+v, %v", s.queues, slices.Collect(maps.Keys(s.leases.connections)))
			}
		}
	})
}

func TestLeasesDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates; run without -race")
	}
	l := New(Config{}, nil)
	ctx := t.Context()
	d := usual(7)
	d.Lease = asking(leaseOf(7, 1), 3).Lease
	full := asking(leaseOf(8, 1), 1)
	mustTake(t, l, full)
	refused := asking(leaseOf(8, 2), 1)
	patient := asking(leaseOf(8, 3), 1)
	patient.Lease.Wait = time.Second
	ending, renewal := make([]limits.Ending, 1), make([]limits.Lease, 1)
	all := limits.Ending{Lease: limits.Lease{Identity: limits.Identity{Port: 9}}, AllOfIdentity: true}
	mustEnd(t, l, all)
	for name, run := range map[string]func() bool{
		"grant and end": func() bool {
			d.Lease.Lease.Identity.Start++
			got, ok := l.TryTake(d)
			ending[0] = limits.Ending{Lease: d.Lease.Lease, Cause: limits.CauseLog}
			return l.End(ctx, ending) == nil && ok && got.Allowed
		},
		"grant by Take and end": func() bool {
			d.Lease.Lease.Identity.Start++
			got, err := l.Take(ctx, d)
			ending[0] = limits.Ending{Lease: d.Lease.Lease, Cause: limits.CauseLog}
			return l.End(ctx, ending) == nil && err == nil && got.Allowed
		},
		"same again": func() bool { got, ok := l.TryTake(full); return ok && got.Repeated },
		"refused":    func() bool { got, ok := l.TryTake(refused); return ok && !got.Allowed },
		"may wait":   func() bool { _, ok := l.TryTake(patient); return !ok },
		"renewed": func() bool {
			renewal[0] = full.Lease.Lease
			return l.Renew(ctx, renewal) == nil
		},
		"end of an identity": func() bool {
			ending[0] = all
			return l.End(ctx, ending) == nil
		},
	} {
		if allocs := testing.AllocsPerRun(1000, func() {
			if !run() {
				t.Fatalf("%s: not so", name)
			}
		}); allocs != 0 {
			t.Errorf("%s: %v allocations, want 0", name, allocs)
		}
	}
}

// benchmarkLeases takes a lease and ends it, beside so many that live on.
func benchmarkLeases(b *testing.B, live uint64, d *limits.Demand) {
	b.ReportAllocs()
	l := New(Config{TTL: time.Hour}, nil)
	for i := range live {
		mustAllow(b, l, asking(leaseOf(i/8, i), 8))
	}
	d.Lease = asking(leaseOf(live, live), 8).Lease
	ending, ctx := make([]limits.Ending, 1), b.Context()
	for b.Loop() {
		d.Lease.Lease.Identity.Start++
		mustAllow(b, l, d)
		ending[0] = limits.Ending{Lease: d.Lease.Lease, Cause: limits.CauseLog}
		_ = l.End(ctx, ending)
	}
}

func mustAllow(b *testing.B, l *Limiter, d *limits.Demand) {
	if got, ok := l.TryTake(d); !ok || !got.Allowed {
		b.Fatalf("got %+v, %t", got, ok)
	}
}

func BenchmarkLease(b *testing.B) {
	b.Run("live=0", func(b *testing.B) { benchmarkLeases(b, 0, new(limits.Demand)) })
	b.Run("live=1M", func(b *testing.B) { benchmarkLeases(b, 1_000_000, new(limits.Demand)) })
	b.Run("with two rates", func(b *testing.B) { benchmarkLeases(b, 0, usual(7)) })
}

func BenchmarkLeaseParallel(b *testing.B) {
	b.ReportAllocs()
	l := New(Config{}, nil)
	b.RunParallel(func(pb *testing.PB) {
		d := asking(leaseOf(rand.Uint64(), rand.Uint64()>>1), 8)
		ending := make([]limits.Ending, 1)
		for pb.Next() {
			d.Lease.Lease.Identity.Start++
			l.TryTake(d)
			ending[0] = limits.Ending{Lease: d.Lease.Lease, Cause: limits.CauseLog}
			_ = l.End(context.Background(), ending)
		}
	})
}

// BenchmarkExpiry is the cost of one lease that nobody ends, from its grant to its end.
func BenchmarkExpiry(b *testing.B) {
	b.ReportAllocs()
	l := New(Config{TTL: time.Nanosecond}, nil)
	d := asking(leaseOf(1, 1), 1<<40)
	for b.Loop() {
		d.Lease.Lease.Identity.Start++
		l.TryTake(d)
	}
}

func BenchmarkRenew(b *testing.B) {
	b.ReportAllocs()
	l := New(Config{TTL: time.Hour}, nil)
	leases := make([]limits.Lease, 1000)
	for i := range leases {
		leases[i] = leaseOf(uint64(i), uint64(i))
		mustAllow(b, l, asking(leases[i], 1))
	}
	n := 0
	for b.Loop() {
		_ = l.Renew(b.Context(), leases[n%1000:n%1000+1])
		n++
	}
}
