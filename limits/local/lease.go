package local

import (
	"context"
	"math"
	"time"

	"keyward/limits"
)

const (
	// adoptFor is how long after its start a process adopts the leases of requests older than itself, and
	// remembers which of them ended: longer than a lease lives by default.
	adoptFor = 45 * time.Second
	// skew is how far ahead of ours the clock may be that says when a request began.
	skew = 5 * time.Second
	// orphanGrace is how much longer than RenewEvery a lease lives after its connection.
	orphanGrace = 3 * time.Second
	// concurrencyRetry is a hint: nobody knows when a request ends.
	concurrencyRetry = time.Second
)

// none is the position that names nothing: the first entry of every list is never used.
const none = 0

// A leaseTable holds the live leases of a shard's cells, under the shard's lock.
//
// A lease lives for one of two times, from when it was last renewed or from when its connection ended.
// So two lists in the order of arrival are in the order of expiry as well, and nothing is searched for,
// sorted or left behind when a lease is renewed.
type leaseTable struct {
	table       []lease
	free        int32 // first of those that are not in use, linked by newer
	live        int32
	orders      [2]order         // of expiry: of leases with a connection, and of orphans
	connections map[uint64]int32 // first lease of each connection
}

// An order is a list of leases, the next to expire first.
type order struct{ oldest, newest int32 }

const (
	kept = iota
	orphaned
)

// A lease is the state of one lease. It holds no pointer.
type lease struct {
	limits.Lease
	note          uint64
	connection    uint64
	granted       int64 // on the clock; below 0: before the limiter was made
	until         int64 // on the clock
	older, newer  int32 // neighbours in its order of expiry
	before, after int32 // neighbours among those of its connection
	order         uint8 // kept or orphaned
	live          bool
	adopted       bool
}

// insert makes a live lease, and returns its position.
func (t *leaseTable) insert(e lease) int32 {
	if len(t.table) == 0 {
		t.table = make([]lease, 1, 8)
	}
	at := t.free
	if at == none {
		at = int32(len(t.table))
		t.table = append(t.table, lease{})
	} else {
		t.free = t.table[at].newer
	}
	connection := e.connection
	e.connection, e.live = 0, true
	t.table[at] = e
	t.live++
	t.queue(at, kept)
	t.setConnection(at, connection)
	return at
}

// remove makes a lease's place free.
func (t *leaseTable) remove(at int32) {
	t.setConnection(at, 0)
	t.unqueue(at)
	t.table[at] = lease{newer: t.free}
	t.free = at
	t.live--
}

// queue makes a lease the last of an order to expire.
func (t *leaseTable) queue(at int32, in uint8) {
	e, o := &t.table[at], &t.orders[in]
	e.order, e.older, e.newer = in, o.newest, none
	if o.newest == none {
		o.oldest = at
	} else {
		t.table[o.newest].newer = at
	}
	o.newest = at
}

func (t *leaseTable) unqueue(at int32) {
	e := &t.table[at]
	o := &t.orders[e.order]
	if e.older == none {
		o.oldest = e.newer
	} else {
		t.table[e.older].newer = e.newer
	}
	if e.newer == none {
		o.newest = e.older
	} else {
		t.table[e.newer].older = e.older
	}
}

// setConnection says by which connection a lease was asked for last; 0: none that is known.
func (t *leaseTable) setConnection(at int32, connection uint64) {
	e := &t.table[at]
	if e.connection == connection {
		return
	}
	if e.connection != 0 {
		if e.after != none {
			t.table[e.after].before = e.before
		}
		switch {
		case e.before != none:
			t.table[e.before].after = e.after
		case e.after != none:
			t.connections[e.connection] = e.after
		default:
			delete(t.connections, e.connection)
		}
	}
	e.connection, e.before, e.after = connection, none, none
	if connection == 0 {
		return
	}
	if t.connections == nil {
		t.connections = make(map[uint64]int32)
	}
	if e.after = t.connections[connection]; e.after != none {
		t.table[e.after].before = at
	}
	t.connections[connection] = at
}

// next returns when the next lease expires; MaxInt64: there is none.
func (t *leaseTable) next() int64 {
	next := int64(math.MaxInt64)
	for _, o := range t.orders {
		if o.oldest != none {
			next = min(next, t.table[o.oldest].until)
		}
	}
	return next
}

// grant makes the lease that a demand asks for. Its cells and its identity are locked.
func (l *Limiter) grant(t *taking, ids *identities, now int64) {
	c := &t.cells[t.cell]
	s := &l.shards[c.shard]
	if c.slot == missing {
		c.slot = l.add(s, &t.lease.Lease.Cell)
	}
	l.insert(place{c.shard, c.slot}, ids, t.hash, now, lease{
		Lease: t.lease.Lease, note: t.lease.Note, connection: t.lease.Connection, granted: now,
	})
	s.counts.granted++
}

// insert makes a lease of the cell at a place live from now. The cell and the identity are locked.
func (l *Limiter) insert(cell place, ids *identities, hash uint64, now int64, e lease) {
	s := &l.shards[cell.shard]
	e.until = now + l.ttl
	ids.insert(hash, place{cell.shard, s.leases.insert(e)})
	s.slots[cell.at].live++
	l.setAlarm(s, now)
}

// renew lets a lease live for its whole time again.
func (l *Limiter) renew(s *shard, at int32, now int64) {
	s.leases.unqueue(at)
	s.leases.queue(at, kept)
	s.leases.table[at].until = now + l.ttl
}

// drop ends a lease that is no longer found by its identity. Its shard is locked.
func (l *Limiter) drop(s *shard, at int32, cause limits.Cause) {
	if int(cause) >= len(s.counts.ended) {
		cause = 0
	}
	position := s.index[s.leases.table[at].Cell]
	s.leases.remove(at)
	s.slots[position].live--
	s.counts.ended[cause]++
	l.giveTurns(s, position)
}

// expire ends every lease of a shard whose time is over, and remembers that nobody ended it. The shard
// is locked, no identity is.
func (l *Limiter) expire(s *shard, now int64) {
	if s.leases.next() > now {
		return
	}
	for in, cause := range [...]limits.Cause{kept: limits.CauseExpiry, orphaned: limits.CauseNode} {
		for {
			at := s.leases.orders[in].oldest
			if at == none || s.leases.table[at].until > now {
				break
			}
			gone := s.leases.table[at].Lease
			hash, shard := l.hashOf(&gone), l.shardOf(&gone.Cell)
			ids := l.identitiesOf(hash)
			ids.mu.Lock()
			ids.remove(hash, place{shard, at})
			ids.remember(&ids.expired, hash, &gone, now, forever)
			ids.mu.Unlock()
			l.drop(s, at, cause)
		}
	}
}

// Renew says that requests still run. See [limits.Leaser].
func (l *Limiter) Renew(_ context.Context, leases []limits.Lease) error {
	var now int64
	for i := range leases {
		now = l.renewOrAdopt(&leases[i])
	}
	if now > 0 {
		l.sweepIfDue(now)
	}
	return nil
}

func (l *Limiter) renewOrAdopt(asked *limits.Lease) (now int64) {
	hash := l.hashOf(asked)
	ids, shard := l.identitiesOf(hash), l.shardOf(&asked.Cell)
	s := &l.shards[shard]
	s.mu.Lock()
	defer s.mu.Unlock()
	now = l.now()
	l.expire(s, now)
	ids.mu.Lock()
	defer ids.mu.Unlock()
	if at := l.find(ids, hash, shard, asked); at != none {
		l.renew(s, at, now)
		return now
	}
	young := now < l.youngUntil && asked.Identity.Start <= l.olderUntil
	switch {
	case young && ids.early.has(hash, asked, now):
		s.counts.unknownRenewals++
	case ids.expired.forget(hash, asked) || young:
		// When it was granted is not known here. When its request began is near enough.
		granted := time.UnixMicro(asked.Identity.Start).Sub(l.base)
		position, ok := s.index[asked.Cell]
		if !ok {
			position = l.add(s, &asked.Cell)
		}
		l.insert(place{shard, position}, ids, hash, now, lease{Lease: *asked, granted: min(int64(granted), now), adopted: true})
		s.counts.adopted++
	default:
		s.counts.unknownRenewals++
	}
	return now
}

// End says that requests ended. See [limits.Leaser].
func (l *Limiter) End(_ context.Context, endings []limits.Ending) error {
	var now int64
	for i := range endings {
		if e := &endings[i]; e.AllOfIdentity {
			now = l.endIdentity(e)
		} else {
			now = l.endLease(e)
		}
	}
	if now > 0 {
		l.sweepIfDue(now)
	}
	return nil
}

func (l *Limiter) endLease(e *limits.Ending) (now int64) {
	hash := l.hashOf(&e.Lease)
	ids, shard := l.identitiesOf(hash), l.shardOf(&e.Lease.Cell)
	s := &l.shards[shard]
	s.mu.Lock()
	defer s.mu.Unlock()
	now = l.now()
	l.expire(s, now)

	ids.mu.Lock()
	at := l.find(ids, hash, shard, &e.Lease)
	if at != none {
		ids.remove(hash, place{shard, at})
	} else {
		ids.expired.forget(hash, &e.Lease)
	}
	l.rememberEarly(ids, hash, &e.Lease, now)
	ids.mu.Unlock()

	if at == none {
		s.counts.unknownEnds++
		return now
	}
	l.drop(s, at, e.Cause)
	return now
}

// endIdentity ends every lease of an identity, in whatever cells they are. Their cells are not known
// before the identity is locked, and must not be locked after: so the leases are noted first, and ended
// one by one. Nothing slips in between: from the first moment on, nothing is granted to the identity.
func (l *Limiter) endIdentity(e *limits.Ending) (now int64) {
	if e.Lease.Identity.IsZero() {
		s := &l.shards[0]
		s.mu.Lock()
		defer s.mu.Unlock()
		s.counts.unknownEnds++
		return l.now()
	}
	all := limits.Lease{Identity: e.Lease.Identity}
	hash := l.hashOf(&all)
	ids := l.identitiesOf(hash)

	var usual [8]place // a request has one lease, and one more for each internal redirect
	found := usual[:0]
	ids.mu.Lock()
	now = l.now()
	for at := ids.index[hash]; at != none; at = ids.entries[at].next {
		found = append(found, ids.entries[at].place)
	}
	ids.remember(&ids.gone, hash, &all, now, now+int64(goneFor))
	ids.expired.forgetAll(hash, all.Identity)
	l.rememberEarly(ids, hash, &all, now)
	ids.mu.Unlock()

	known := false
	for _, p := range found {
		known = l.endPlace(ids, hash, all.Identity, p, e.Cause) || known
	}
	if !known {
		s := &l.shards[hash%shardCount]
		s.mu.Lock()
		defer s.mu.Unlock()
		s.counts.unknownEnds++
	}
	return now
}

// endPlace ends the lease at a place if it is one of an identity.
func (l *Limiter) endPlace(ids *identities, hash uint64, identity limits.Identity, p place, cause limits.Cause) bool {
	s := &l.shards[p.shard]
	s.mu.Lock()
	defer s.mu.Unlock()
	l.expire(s, l.now())
	ids.mu.Lock()
	e := &s.leases.table[p.at]
	// Since the place was noted its lease may have ended, and another may have come.
	found := e.live && e.Identity == identity
	if found {
		ids.remove(hash, p)
	} else {
		ids.expired.forgetAll(hash, identity) // or it has just expired
	}
	ids.mu.Unlock()
	if found {
		l.drop(s, p.at, cause)
	}
	return found
}

// rememberEarly keeps an end for as long as a renewal that comes after it could be taken for that of a
// running request, because this process is young and the request is older.
func (l *Limiter) rememberEarly(ids *identities, hash uint64, e *limits.Lease, now int64) {
	if now >= l.youngUntil {
		ids.early = memory{}
	} else if e.Identity.Start <= l.olderUntil {
		ids.remember(&ids.early, hash, e, now, l.youngUntil)
	}
}

// Disconnected says that a connection ended. See [limits.Leaser].
func (l *Limiter) Disconnected(connection uint64) {
	if connection == 0 {
		return
	}
	for i := range l.shards {
		l.orphan(&l.shards[i], connection)
	}
}

func (l *Limiter) orphan(s *shard, connection uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := l.now()
	l.expire(s, now)
	until := now + l.orphanTTL
	for at := s.leases.connections[connection]; at != none; at = s.leases.connections[connection] {
		s.leases.setConnection(at, 0)
		if e := &s.leases.table[at]; e.until > until {
			s.leases.unqueue(at)
			s.leases.queue(at, orphaned)
			e.until = until
		}
	}
	l.setAlarm(s, now)
}

// Running lists the live leases of the cells for which of returns true, in no order. It looks at every
// lease, a shard at a time.
func (l *Limiter) Running(of func(limits.Cell) bool) []limits.Running {
	var running []limits.Running
	var table []lease
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.Lock()
		l.expire(s, l.now())
		table = append(table[:0], s.leases.table...) // of is not ours: it is asked without the lock
		s.mu.Unlock()
		for at := range table {
			if e := &table[at]; e.live && of(e.Cell) {
				running = append(running, limits.Running{
					Lease: e.Lease, Note: e.note, Connection: e.connection, Adopted: e.adopted,
					Granted: l.base.Add(time.Duration(e.granted)), Until: l.base.Add(time.Duration(e.until)),
				})
			}
		}
	}
	return running
}
