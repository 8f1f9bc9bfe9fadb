// Package local keeps the state of limits in this process.
//
// A [Limiter] is a table of cells in many shards. A decision locks the shards of all cells it involves,
// in ascending order, judges every limit and then spends them all or none. Nothing is ever taken and
// given back: a request that is refused is at no moment in the way of one that is not.
//
// Running requests are counted by leases: lease.go has their life, wait.go those who wait for one to
// end, identity.go how a lease is found, and what is remembered of those that are gone. Quotas are counted
// in quota.go; save.go is how those with long windows outlive the process.
//
// Trade-off: nothing is shared with other processes, and a restart forgets what was spent but for quotas that
// were saved: every bucket is full again. Leases come back by adoption. Replicas that must count together
// use another limiter.
package local

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz/apikey"
	"keyward/limits"
)

// Config is how a limiter keeps house. The zero Config is right for a server.
type Config struct {
	// SweepEvery is the least time between two steps of the sweep, each of which looks at up to 64
	// cells of one shard; 0: 1 ms, which is 64,000 cells a second.
	SweepEvery time.Duration
	// RenewEvery is how often running requests are renewed; 0: 10 s.
	RenewEvery time.Duration
	// TTL is how long a lease lives that nobody renews; 0: 3.5 × RenewEvery.
	TTL time.Duration
	// Started is when the process began, by the wall clock. For 45 s from then, leases of older requests
	// are adopted. Zero: when the limiter is made.
	Started time.Time
	// QuotaCells is how many quota cells there may be, one for each quota of each partition that has counted
	// something which still counts; 0: 1,000,000, which is some 300 MB where windows hold little. None is
	// ever dropped for another: a demand that needs one more is undecided, and counted.
	QuotaCells int64
}

const (
	shardBits  = 8
	shardCount = 1 << shardBits
	// sweepStep cells take a few microseconds, which a request that meets the sweep can wait for.
	sweepStep = 64
	// usualLimits in one demand are judged without allocation. More are no error.
	usualLimits = 12
	// usualQuotaCells is Config.QuotaCells where that says nothing.
	usualQuotaCells = 1_000_000
)

// A Limiter is a [limits.Leaser] whose state is in this process. Make one with [New]. Its clock is
// monotonic. It has no goroutine of its own. Safe for concurrent use.
//
// Shape: 256 shards of cells and their leases, a cell in the shard that a seeded hash of it names; and
// 256 shards of identities, by which leases are found. Neither cells nor leases nor their indexes hold
// pointers, so the garbage collector does not walk them.
//
// Locks: first the shards of all cells involved, ascending; then one shard of identities. Whoever holds
// that takes no other lock.
//
// Memory: a cell is made when it is first spent and costs about 90 bytes, a lease about 200. Cells that
// have no leases and whose bucket is full again say nothing and are swept, a few at a time, by the
// requests that come; room once used is kept for the next. A cell that still matters is never evicted:
// only authenticated callers have cells, so their number is bounded by that of keys. Cells of quotas have a
// table of their own: about 250 bytes each, and 16 for every instant of which a unit counts. Callers that
// are known by somebody else's word have those as well, so their number has a bound, Config.QuotaCells.
type Limiter struct {
	seed       maphash.Seed // random: nobody can choose ids that meet in one shard
	base       time.Time    // the clock counts from here
	sweepEvery int64        // nanoseconds
	ttl        int64        // nanoseconds
	orphanTTL  int64        // nanoseconds
	youngUntil int64        // on the clock: until then leases of older requests are adopted
	olderUntil int64        // a request that began by then is an older one; microseconds of Unix time

	shards     [shardCount]shard
	identities [shardCount]identities

	sweepDue  atomic.Int64 // when the next step of the sweep may be taken
	sweepNext atomic.Uint32

	quotaCells atomic.Int64
	quotaBound int64
	errFull    error // for a demand that needs more

	waiting atomic.Int64 // in all queues
	waiters sync.Pool    // of *waiter

	cells  prometheus.Gauge
	swept  prometheus.Counter
	waited prometheus.Histogram

	quotasSwept, quotasFull, quotasLocked prometheus.Counter
}

// A shard is a part of the table under its own lock.
type shard struct {
	mu    sync.Mutex
	index map[limits.Cell]int32 // position in slots
	slots []slot                // dense, so that the sweep goes through them in order
	sweep int                   // position in slots where the sweep goes on

	leases leaseTable
	queues queueTable
	counts counts
	quotas quotaTable
	_      [16]byte
}

// A slot is the state of one cell. It holds no pointer.
type slot struct {
	cell   limits.Cell
	queued bool  // the shard has a queue for the cell
	live   int32 // leases
	full   int64 // when the bucket is full again, see limits.Rate.Take
}

// idle reports whether the slot says no more than a missing one.
func (s *slot) idle(now int64) bool { return s.full <= now && s.live == 0 && !s.queued }

// New makes a limiter with its metrics in reg; a nil reg keeps them to itself.
func New(c Config, reg prometheus.Registerer) *Limiter {
	if c.SweepEvery <= 0 {
		c.SweepEvery = time.Millisecond
	}
	if c.RenewEvery <= 0 {
		c.RenewEvery = 10 * time.Second
	}
	if c.TTL <= 0 {
		c.TTL = c.RenewEvery * 7 / 2
	}
	if c.QuotaCells <= 0 {
		c.QuotaCells = usualQuotaCells
	}
	now := time.Now()
	if c.Started.IsZero() {
		c.Started = now
	}
	l := &Limiter{
		seed:       maphash.MakeSeed(),
		base:       now,
		sweepEvery: int64(c.SweepEvery),
		ttl:        int64(c.TTL),
		orphanTTL:  int64(c.RenewEvery + orphanGrace),
		youngUntil: int64(adoptFor - now.Sub(c.Started)),
		olderUntil: c.Started.Add(skew).UnixMicro(),
		waiters:    sync.Pool{New: newWaiter},
		quotaBound: c.QuotaCells,
		errFull:    fmt.Errorf("all %d quota cells are in use, and none is dropped for another: %w", c.QuotaCells, apikey.ErrUndecided),
	}
	for i := range l.shards {
		l.shards[i].index = make(map[limits.Cell]int32)
	}
	l.register(reg)
	return l
}

// Take decides a demand. It blocks only where nothing but the limit of running requests refuses, and
// for no longer than the demand's Wait or until 20 ms before the deadline of ctx.
// Errors: apikey.ErrUndecided for a demand that names a cell twice, for a request that has ended, if ctx is
// done before the wait is over, and for a demand that needs more quota cells than there may be.
func (l *Limiter) Take(ctx context.Context, d *limits.Demand) (limits.Decision, error) {
	var usual [usualLimits]involved
	t, ok := l.involve(usual[:0], d)
	if !ok {
		return limits.Decision{}, errTwice
	}
	if len(t.cells) == 0 {
		return limits.Decision{Allowed: true}, nil
	}
	decision, verdict, w, now := l.decide(&t, patience(ctx, &d.Lease), true)
	l.sweepIfDue(now)
	switch verdict {
	case ended:
		return limits.Decision{}, errEnded
	case overfull:
		l.quotasFull.Inc()
		return limits.Decision{}, l.errFull
	case crowded:
		return l.await(ctx, &t, w)
	}
	return decision, nil
}

var (
	errTwice = fmt.Errorf("a demand names a limit twice, or more than 32,766 limits: %w", apikey.ErrUndecided)
	errEnded = fmt.Errorf("the request has ended: %w", apikey.ErrUndecided)
)

// TryTake decides every demand but one that may wait for a running request to end, and those for which
// Take has an error.
func (l *Limiter) TryTake(d *limits.Demand) (decision limits.Decision, ok bool) {
	var usual [usualLimits]involved
	t, ok := l.involve(usual[:0], d)
	if !ok {
		return limits.Decision{}, false
	}
	if len(t.cells) == 0 {
		return limits.Decision{Allowed: true}, true
	}
	decision, verdict, _, now := l.decide(&t, d.Lease.Wait, false)
	l.sweepIfDue(now)
	if verdict != decided {
		return limits.Decision{}, false
	}
	return decision, true
}

// A taking is a demand on its way through the table.
type taking struct {
	demand *limits.Demand
	cells  []involved          // in the order in which they are locked
	quotas bool                // there are any
	lease  *limits.LeaseDemand // nil: it asks for none
	// What follows is set where it asks for one.
	cell int    // position in cells
	hash uint64 // of the identity
}

// An involved cell is one that a decision is about. It is small: its like are sorted for every request.
type involved struct {
	full     int64 // of a rate: as it will be once spent
	shard    int32
	slot     int32 // position in the shard's table while its lock is held, or missing
	position int32 // in Demand.Rates or Demand.Quotas
	place    int16 // among all the demand's limits
	kind     kind
	noRoom   bool // judged, but in shadow, so that nothing of it is spent
}

type kind uint8

const (
	aRate kind = iota
	aQuota
	theLease
)

const (
	missing = -1
	// mostLimits is more than any demand has.
	mostLimits = math.MaxInt16
)

func (t *taking) rate(c *involved) *limits.RateDemand   { return &t.demand.Rates[c.position] }
func (t *taking) quota(c *involved) *limits.QuotaDemand { return &t.demand.Quotas[c.position] }

func (t *taking) cellOf(c *involved) *limits.Cell {
	switch c.kind {
	case aRate:
		return &t.rate(c).Cell
	case aQuota:
		return &t.quota(c).Cell
	}
	return &t.lease.Lease.Cell
}

// involve lists the cells of a demand in the order in which they are locked. It reports whether each
// is named once.
func (l *Limiter) involve(cells []involved, d *limits.Demand) (t taking, once bool) {
	t.demand = d
	if len(d.Rates)+len(d.Quotas) >= mostLimits {
		return t, false
	}
	for i := range d.Rates {
		if r := &d.Rates[i]; !r.Rate.IsZero() {
			cells = append(cells, involved{kind: aRate, shard: l.shardOf(&r.Cell), position: int32(i), place: int16(len(cells))})
		}
	}
	for i := range d.Quotas {
		if q := &d.Quotas[i]; !q.Quota.IsZero() {
			cells = append(cells, involved{kind: aQuota, shard: l.shardOf(&q.Cell), position: int32(i), place: int16(len(cells))})
			t.quotas = true
		}
	}
	if d.Lease.Limit > 0 {
		t.lease = &d.Lease
		t.hash = l.hashOf(&d.Lease.Lease)
		cells = append(cells, involved{kind: theLease, shard: l.shardOf(&d.Lease.Lease.Cell), place: int16(len(cells))})
	}
	slices.SortFunc(cells, func(a, b involved) int {
		if a.shard != b.shard {
			return int(a.shard - b.shard)
		}
		return compareCells(t.cellOf(&a), t.cellOf(&b))
	})
	for i := range cells {
		if i > 0 && cells[i].shard == cells[i-1].shard && *t.cellOf(&cells[i]) == *t.cellOf(&cells[i-1]) {
			return t, false
		}
		if cells[i].kind == theLease {
			t.cell = i
		}
	}
	t.cells = cells
	return t, true
}

func compareCells(a, b *limits.Cell) int {
	return cmp.Or(bytes.Compare(a.Owner[:], b.Owner[:]), cmp.Compare(a.Class, b.Class))
}

func (l *Limiter) shardOf(c *limits.Cell) int32 {
	h := maphash.Bytes(l.seed, c.Owner[:]) ^ uint64(c.Class)
	h *= 0x9e3779b97f4a7c15 // the class is in the low bits, the shard is taken from the high ones
	return int32(h >> (64 - shardBits))
}

// A verdict is what judging a demand comes to.
type verdict uint8

const (
	decided  verdict = iota // the decision says it all
	crowded                 // only the limit of running requests refuses, and one may end in time
	ended                   // the request has ended: nobody needs a decision
	overfull                // it needs more quota cells than there may be
)

// decide judges a demand's cells, and spends them all if all have room. Where the demand may wait, it
// joins the queue if asked to.
func (l *Limiter) decide(t *taking, wait time.Duration, join bool) (d limits.Decision, v verdict, w *waiter, now int64) {
	l.lock(t.cells)
	defer l.unlock(t.cells)
	// The clock is read once, and not before all locks are held: so no shard ever sees time go back. A
	// time from before the wait for a lock would be earlier than what has happened to the cell since. It
	// would count a cell that was swept meanwhile as full from before it was, and the wait that a
	// refusal reports would be too long by the wait for the lock.
	at := l.instant(t.quotas)
	now = at.clock
	if t.lease == nil {
		r := l.judgeLimits(t, at)
		if !r.refuses() && !l.spend(t, at) {
			return d, overfull, nil, now
		}
		return l.conclude(t, &r, at), decided, nil, now
	}
	s := &l.shards[t.cells[t.cell].shard]
	l.expire(s, now)
	d, v = l.judge(t, at, nil)
	if v == crowded {
		switch {
		case wait <= 0 || !l.mayWait(s, &t.lease.Lease.Cell):
			v = decided
		case join:
			if w = l.join(s, t.lease, wait, now); w == nil {
				v = decided
			}
		}
	}
	s.countRefusal(d, v)
	return d, v, w, now
}

// judge decides a demand for a lease whose cells are locked and whose shard has no expired lease left,
// and spends it if it passes. w is nil for a demand that comes, otherwise the waiter that has left its
// queue to be judged.
func (l *Limiter) judge(t *taking, at instant, w *waiter) (limits.Decision, verdict) {
	ids := l.identitiesOf(t.hash)
	ids.mu.Lock()
	defer ids.mu.Unlock()
	c := &t.cells[t.cell]
	s := &l.shards[c.shard]
	if found := l.find(ids, t.hash, c.shard, &t.lease.Lease); found != none {
		l.renew(s, found, at.clock)
		s.leases.setConnection(found, t.lease.Connection)
		return limits.Decision{Allowed: true, Repeated: true}, decided
	}
	if ids.gone.has(t.hash, &t.lease.Lease, at.clock) {
		return limits.Decision{}, ended
	}
	r := l.judgeLimits(t, at)
	v := decided
	switch room, over := l.roomFor(s, t, w); {
	case !room:
		if !r.refuses() {
			v = crowded
		}
		r.refuse(t, t.cell, concurrencyRetry, 0)
	case over:
		r.shadowed |= 1 << t.lease.Lease.Cell.Class
	}
	if !r.refuses() {
		if !l.spend(t, at) {
			return limits.Decision{}, overfull
		}
		l.grant(t, ids, at.clock)
	}
	return l.conclude(t, &r, at), v
}

// A ruling is what judging every limit of a demand comes to.
type ruling struct {
	shadowed uint16
	// What follows is set where a limit refuses.
	longest time.Duration // that the reported limit may refuse
	own     time.Duration // how long it refuses if it is the one reported
	others  time.Duration // how long those refuse that are not
	wait    time.Duration // how long it would, were it one of those
	trips   bool          // it begins its lockout
	cell    int           // position in the taking
	class   limits.Class
	place   int16
}

func (r *ruling) refuses() bool { return r.longest > 0 }

// refuse adds a limit that refuses for so long, and for its lockout if that is above 0 and the limit is the
// one that is reported.
func (r *ruling) refuse(t *taking, cell int, wait, lockout time.Duration) {
	c, longest := &t.cells[cell], max(wait, lockout)
	class := t.cellOf(c).Class
	if longest < r.longest || longest == r.longest && (class > r.class || class == r.class && c.place > r.place) {
		r.others = max(r.others, wait)
		return
	}
	r.others = max(r.others, r.wait)
	r.longest, r.wait, r.own, r.trips = longest, wait, wait, lockout > 0
	if r.trips {
		r.own = lockout
	}
	r.cell, r.class, r.place = cell, class, c.place
}

// conclude makes the decision of a ruling. Of a refusal that is final it begins the lockout.
func (l *Limiter) conclude(t *taking, r *ruling, at instant) limits.Decision {
	d := limits.Decision{Allowed: !r.refuses(), Shadowed: r.shadowed}
	if d.Allowed {
		return d
	}
	c := &t.cells[r.cell]
	if r.trips {
		c.lockQuota(&l.shards[c.shard].quotas, t.quota(c), at)
		l.quotasLocked.Inc()
	}
	d.Class, d.RetryAfter = r.class, max(r.own, r.others)
	if c.kind == aQuota {
		d.Quota = int(c.position)
	}
	return d
}

// judgeLimits judges all rates and quotas of a demand. It spends nothing.
func (l *Limiter) judgeLimits(t *taking, at instant) (r ruling) {
	for i := range t.cells {
		c := &t.cells[i]
		s := &l.shards[c.shard]
		var wait, lockout time.Duration
		var shadow bool
		switch c.kind {
		case aRate:
			r := t.rate(c)
			wait, shadow = c.judgeRate(s, r, at.clock), r.Shadow
		case aQuota:
			q := t.quota(c)
			var trips bool
			if wait, trips = c.judgeQuota(&s.quotas, q, at); trips {
				lockout = q.Quota.Lockout
			}
			shadow = q.Shadow
		default:
			c.slot = missing
			if position, ok := s.index[t.lease.Lease.Cell]; ok {
				c.slot = position
			}
		}
		switch c.noRoom = wait > 0; {
		case wait <= 0:
		case shadow:
			r.shadowed |= 1 << t.cellOf(c).Class
		default:
			r.refuse(t, i, wait, lockout)
		}
	}
	return r
}

// judgeRate finds the cell's state and says how long its rate refuses; 0: it does not. It spends nothing.
func (c *involved) judgeRate(s *shard, r *limits.RateDemand, now int64) (wait time.Duration) {
	position, ok := s.index[r.Cell]
	if !ok {
		c.slot = missing
		c.full, wait = r.Rate.Take(0, now)
		return wait
	}
	c.slot = position
	c.full, wait = r.Rate.Take(s.slots[position].full, now)
	if wait > 0 {
		// What a lowered limit no longer counts is forgotten at once, or the wait would not be true.
		s.slots[position].full = c.full
	}
	return wait
}

// spend writes what judgeLimits found. The cells' shards are locked. It reports whether there may be as many
// quota cells as that takes; otherwise it has spent nothing. What is in shadow is not worth an error: where
// there is no cell for it, it is not counted.
func (l *Limiter) spend(t *taking, at instant) bool {
	if t.quotas {
		fresh := int64(0)
		for i := range t.cells {
			if c := &t.cells[i]; c.kind == aQuota && c.slot == missing && !t.quota(c).Shadow {
				fresh++
			}
		}
		if !l.reserve(fresh) {
			return false
		}
	}
	for i := range t.cells {
		c := &t.cells[i]
		s := &l.shards[c.shard]
		switch {
		case c.noRoom:
		case c.kind == aRate:
			if c.slot == missing {
				c.slot = l.add(s, &t.rate(c).Cell)
			}
			s.slots[c.slot].full = c.full
		case c.kind == aQuota:
			if q := t.quota(c); c.slot != missing || !q.Shadow || l.reserve(1) {
				c.spendQuota(&s.quotas, q, at)
			} else {
				l.quotasFull.Inc()
			}
		}
	}
	return true
}

// add makes a cell that the shard does not have, and returns its slot.
func (l *Limiter) add(s *shard, cell *limits.Cell) int32 {
	position := int32(len(s.slots)) // a shard of 2^31 cells would take 190 GB
	s.index[*cell] = position
	s.slots = append(s.slots, slot{cell: *cell})
	l.cells.Inc()
	return position
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

// An instant is a time by both clocks.
type instant struct {
	clock int64 // as now has it
	wall  int64 // Unix nanoseconds; 0 where nobody needs it
}

// instant reads the clocks, that of the calendar only where it is needed.
func (l *Limiter) instant(withWall bool) instant {
	if !withWall {
		return instant{clock: l.now()}
	}
	now := time.Now()
	return instant{clock: int64(now.Sub(l.base)), wall: now.UnixNano()}
}

// now is the limiter's clock: nanoseconds since it was made, monotonic.
func (l *Limiter) now() int64 { return int64(time.Since(l.base)) }

// sweepIfDue takes a step of the sweep if none was taken for a while. The caller holds no lock.
func (l *Limiter) sweepIfDue(now int64) {
	if due := l.sweepDue.Load(); now >= due && l.sweepDue.CompareAndSwap(due, now+l.sweepEvery) {
		l.sweep(&l.shards[l.sweepNext.Add(1)%shardCount])
	}
}

// sweep ends what has expired in a shard, looks at the next few of its cells and drops the idle ones.
func (l *Limiter) sweep(s *shard) {
	s.mu.Lock()
	at := l.instant(len(s.quotas.slots) > 0) // under the lock, as in decide
	now := at.clock
	l.expire(s, now)
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
	quotas := l.sweepQuotas(&s.quotas, at)
	s.mu.Unlock()
	if quotas > 0 {
		l.quotasSwept.Add(float64(quotas))
	}
	if dropped > 0 {
		l.cells.Sub(float64(dropped))
		l.swept.Add(float64(dropped))
	}
}
