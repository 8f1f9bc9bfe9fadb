// Package local keeps the state of limits in this process.
//
// A [Limiter] is a table of cells in many shards. A decision locks the shards of all cells it involves,
// in ascending order, judges every limit and then spends them all or none. Nothing is ever taken and
// given back: a request that is refused is at no moment in the way of one that is not.
//
// Trade-off: nothing is shared with other processes, and a restart forgets what was spent: every bucket
// is full again. Replicas that must count together use another limiter.
package local

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"hash/maphash"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"keyward/authz/apikey"
	"keyward/limits"
)

// Config is how a limiter keeps house. The zero Config is right for a server.
type Config struct {
	// SweepEvery is the least time between two steps of the sweep, each of which looks at up to 64
	// cells of one shard; 0: 1 ms, which is 64,000 cells a second.
	SweepEvery time.Duration
}

const (
	shardBits  = 8
	shardCount = 1 << shardBits
	// sweepStep cells take a few microseconds, which a request that meets the sweep can wait for.
	sweepStep = 64
	// usualLimits in one demand are judged without allocation. More are no error.
	usualLimits = 8
)

// A Limiter is a [limits.Limiter] whose state is in this process. Make one with [New]. Its clock is
// monotonic. Safe for concurrent use.
//
// Shape: 256 shards of cells, a cell in the shard that a seeded hash of it names. Neither cells nor
// their index hold pointers, so the garbage collector does not walk them.
//
// Memory: a cell is made when it is first spent and costs about 90 bytes. Cells whose bucket is full
// again say nothing and are swept, a few at a time, by the requests that come; room once used is kept
// for the next. A cell that still matters is never evicted: only authenticated callers have cells, so
// their number is bounded by that of keys.
type Limiter struct {
	seed       maphash.Seed // random: nobody can choose ids that meet in one shard
	base       time.Time    // the clock counts from here
	sweepEvery int64        // nanoseconds
	shards     [shardCount]shard

	sweepDue  atomic.Int64 // when the next step of the sweep may be taken
	sweepNext atomic.Uint32

	cells prometheus.Gauge
	swept prometheus.Counter
}

// A shard is a part of the table under its own lock.
type shard struct {
	mu    sync.Mutex
	index map[limits.Cell]int32 // position in slots
	slots []slot                // dense, so that the sweep goes through them in order
	sweep int                   // position in slots where the sweep goes on
	_     [64 - 8 - 8 - 24 - 8]byte
}

// A slot is the state of one cell. It holds no pointer.
type slot struct {
	cell limits.Cell
	full int64 // when the bucket is full again, see limits.Rate.Take
}

// idle reports whether the slot says no more than a missing one.
func (s *slot) idle(now int64) bool { return s.full <= now }

// New makes a limiter with its metrics in reg; a nil reg keeps them to itself.
func New(c Config, reg prometheus.Registerer) *Limiter {
	if c.SweepEvery <= 0 {
		c.SweepEvery = time.Millisecond
	}
	l := &Limiter{
		seed:       maphash.MakeSeed(),
		base:       time.Now(),
		sweepEvery: int64(c.SweepEvery),
		cells: promauto.With(reg).NewGauge(prometheus.GaugeOpts{
			Name: "keyward_limits_cells",
			Help: "Cells of rate limits held in memory: one for each limit of a key or instance that is not fully unspent.",
		}),
		swept: promauto.With(reg).NewCounter(prometheus.CounterOpts{
			Name: "keyward_limits_swept_cells_total",
			Help: "Cells of rate limits that were dropped because they were unspent again.",
		}),
	}
	for i := range l.shards {
		l.shards[i].index = make(map[limits.Cell]int32)
	}
	return l
}

// Take decides a demand. It never blocks for longer than other decisions take.
// Errors: apikey.ErrUndecided for a demand that names a cell twice.
func (l *Limiter) Take(_ context.Context, d *limits.Demand) (limits.Decision, error) {
	decision, ok := l.TryTake(d)
	if !ok {
		return limits.Decision{}, errTwice
	}
	return decision, nil
}

var errTwice = fmt.Errorf("a demand names a limit twice: %w", apikey.ErrUndecided)

// TryTake decides every demand but one that names a cell twice.
func (l *Limiter) TryTake(d *limits.Demand) (decision limits.Decision, ok bool) {
	var usual [usualLimits]involved
	cells, ok := l.involve(usual[:0], d)
	if !ok {
		return limits.Decision{}, false
	}
	if len(cells) == 0 {
		return limits.Decision{Allowed: true}, true
	}
	decision, now := l.decide(cells)
	l.sweepIfDue(now)
	return decision, true
}

// An involved cell is one that a decision is about.
type involved struct {
	*limits.RateDemand
	shard int32
	slot  int32 // position in the shard while its lock is held, or missing
	full  int64 // as it will be once spent
}

const missing = -1

// involve lists the cells of a demand in the order in which they are locked. It reports whether each
// is named once.
func (l *Limiter) involve(cells []involved, d *limits.Demand) ([]involved, bool) {
	for i := range d.Rates {
		if r := &d.Rates[i]; !r.Rate.IsZero() {
			cells = append(cells, involved{RateDemand: r, shard: l.shardOf(&r.Cell)})
		}
	}
	slices.SortFunc(cells, func(a, b involved) int {
		return cmp.Or(cmp.Compare(a.shard, b.shard), compareCells(&a.Cell, &b.Cell))
	})
	for i := 1; i < len(cells); i++ {
		if cells[i].Cell == cells[i-1].Cell {
			return nil, false
		}
	}
	return cells, true
}

func compareCells(a, b *limits.Cell) int {
	return cmp.Or(bytes.Compare(a.Owner[:], b.Owner[:]), cmp.Compare(a.Class, b.Class))
}

func (l *Limiter) shardOf(c *limits.Cell) int32 {
	h := maphash.Bytes(l.seed, c.Owner[:]) ^ uint64(c.Class)
	h *= 0x9e3779b97f4a7c15 // the class is in the low bits, the shard is taken from the high ones
	return int32(h >> (64 - shardBits))
}

// decide judges cells, and spends them all if all have room.
func (l *Limiter) decide(cells []involved) (limits.Decision, int64) {
	l.lock(cells)
	defer l.unlock(cells)
	// The clock is read once, and not before all locks are held: so no shard ever sees time go back. A
	// time from before the wait for a lock would be earlier than what has happened to the cell since. It
	// would count a cell that was swept meanwhile as full from before it was, and the wait that a
	// refusal reports would be too long by the wait for the lock.
	now := l.now()

	decision := limits.Decision{Allowed: true}
	for i := range cells {
		c := &cells[i]
		wait := c.judge(&l.shards[c.shard], now)
		if wait > decision.RetryAfter || wait > 0 && wait == decision.RetryAfter && c.Cell.Class < decision.Class {
			decision = limits.Decision{Class: c.Cell.Class, RetryAfter: wait}
		}
	}
	if decision.Allowed {
		for i := range cells {
			l.spend(&cells[i])
		}
	}
	return decision, now
}

// judge finds the cell's state and says how long its limit refuses; 0: it does not. It spends nothing.
func (c *involved) judge(s *shard, now int64) (wait time.Duration) {
	position, ok := s.index[c.Cell]
	if !ok {
		c.slot = missing
		c.full, wait = c.Rate.Take(0, now)
		return wait
	}
	c.slot = position
	c.full, wait = c.Rate.Take(s.slots[position].full, now)
	if wait > 0 {
		// What a lowered limit no longer counts is forgotten at once, or the wait would not be true.
		s.slots[position].full = c.full
	}
	return wait
}

// spend writes what judge found. The cell's shard is locked.
func (l *Limiter) spend(c *involved) {
	s := &l.shards[c.shard]
	if c.slot != missing {
		s.slots[c.slot].full = c.full
		return
	}
	s.index[c.Cell] = int32(len(s.slots)) // a shard of 2^31 cells would take 190 GB
	s.slots = append(s.slots, slot{cell: c.Cell, full: c.full})
	l.cells.Inc()
}

// lock locks the shards of cells, each once. The order is the same for everybody, so nobody waits for a
// shard while holding one that its holder waits for.
func (l *Limiter) lock(cells []involved) {
	last := int32(-1)
	for i := range cells {
		if s := cells[i].shard; s != last {
			l.shards[s].mu.Lock()
			last = s
		}
	}
}

func (l *Limiter) unlock(cells []involved) {
	last := int32(-1)
	for i := range cells {
		if s := cells[i].shard; s != last {
			l.shards[s].mu.Unlock()
			last = s
		}
	}
}

// now is the limiter's clock: nanoseconds since it was made, monotonic.
func (l *Limiter) now() int64 { return int64(time.Since(l.base)) }

// sweepIfDue takes a step of the sweep if none was taken for a while. The caller holds no lock.
func (l *Limiter) sweepIfDue(now int64) {
	if due := l.sweepDue.Load(); now >= due && l.sweepDue.CompareAndSwap(due, now+l.sweepEvery) {
		l.sweep(&l.shards[l.sweepNext.Add(1)%shardCount])
	}
}

// sweep looks at the next few cells of a shard and drops the idle ones.
func (l *Limiter) sweep(s *shard) {
	s.mu.Lock()
	now := l.now() // under the lock, as in decide
	dropped := 0
	for range min(sweepStep, len(s.slots)) {
		if s.sweep >= len(s.slots) {
			s.sweep = 0
		}
		if !s.slots[s.sweep].idle(now) {
			s.sweep++
			continue
		}
		// The last slot moves into the gap, and is the next to be looked at.
		last := len(s.slots) - 1
		delete(s.index, s.slots[s.sweep].cell)
		if s.sweep != last {
			s.slots[s.sweep] = s.slots[last]
			s.index[s.slots[s.sweep].cell] = int32(s.sweep)
		}
		s.slots = s.slots[:last]
		dropped++
	}
	s.mu.Unlock()
	if dropped > 0 {
		l.cells.Sub(float64(dropped))
		l.swept.Add(float64(dropped))
	}
}
