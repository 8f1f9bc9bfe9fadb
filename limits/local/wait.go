package local

import (
	"context"
	"fmt"
	"math"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

const (
	// queueBound and waitingBound are how many may wait for one cell, and for all.
	queueBound   = 64
	waitingBound = 4096
	// answerBefore is how long before its caller's deadline a wait ends, so that the answer still arrives.
	answerBefore = 20 * time.Millisecond
)

// A queueTable holds the queues of a shard's cells, under the shard's lock: few, and not for long.
type queueTable struct {
	byCell  map[limits.Cell]*queue
	waiting int32
	// While somebody waits, the alarm ends what expires: nobody else may come to do it.
	alarm   *time.Timer
	alarmAt int64 // on the limiter's clock; 0: it is not set
}

// A queue is the waiters of a cell, first come first served, and the turns that were given to those at
// its head. A turn counts as a running request until its holder has exchanged it for a lease or has
// passed it on, so nobody overtakes. A queue exists while it has either.
type queue struct {
	limit       int64 // as the newest demand has it
	turns       int32
	waiting     int32
	first, last *waiter
}

// A waiter is a demand that waits. All but its channel and its timer is under the shard's lock.
type waiter struct {
	ready chan struct{} // has one value when turn becomes true
	timer *time.Timer

	queue    *queue // nil: it has left
	turn     bool
	since    int64 // on the limiter's clock
	previous *waiter
	next     *waiter
}

func newWaiter() any {
	t := time.NewTimer(math.MaxInt64)
	t.Stop()
	return &waiter{ready: make(chan struct{}, 1), timer: t}
}

// patience returns how long a demand may wait.
func patience(ctx context.Context, d *limits.LeaseDemand) time.Duration {
	if d.Wait <= 0 {
		return 0
	}
	if deadline, ok := ctx.Deadline(); ok {
		return min(d.Wait, time.Until(deadline)-answerBefore)
	}
	return d.Wait
}

// roomFor reports whether the limit of running requests lets a demand pass, and whether it is over the limit
// in doing so, in shadow. w is as in judge: the limit of a demand that comes is the newest there is, that of
// one that has waited may be an old one. Where somebody waits there is no room but for whoever had a turn: all
// other was given away. In shadow there is room for everybody, so also for those who wait.
func (l *Limiter) roomFor(s *shard, t *taking, w *waiter) (room, over bool) {
	c := &t.cells[t.cell]
	if c.slot == missing {
		return true, false
	}
	slot := &s.slots[c.slot]
	limit := t.lease.Limit
	if t.lease.Shadow {
		limit, over = math.MaxInt64, int64(slot.live) >= limit
	}
	if !slot.queued {
		return int64(slot.live) < limit, over
	}
	q := s.queues.byCell[slot.cell]
	if w == nil {
		q.limit = limit
		l.giveTurns(s, c.slot)
	}
	return t.lease.Shadow || q.hasRoom(slot), over
}

func (q *queue) hasRoom(slot *slot) bool { return int64(slot.live)+int64(q.turns) < q.limit }

// giveTurns gives the room that a cell has to the first in its queue. Whatever may have made room calls
// it before it unlocks the shard.
func (l *Limiter) giveTurns(s *shard, position int32) {
	slot := &s.slots[position]
	if !slot.queued {
		return
	}
	q := s.queues.byCell[slot.cell]
	for q.first != nil && q.hasRoom(slot) {
		w := q.first
		l.unlink(s, w)
		q.turns++
		w.turn = true
		w.ready <- struct{}{}
	}
	if q.first == nil && q.turns == 0 {
		delete(s.queues.byCell, slot.cell)
		slot.queued = false
	}
}

// mayWait reports whether there is room for one more waiter.
func (l *Limiter) mayWait(s *shard, cell *limits.Cell) bool {
	if l.waiting.Load() >= waitingBound {
		return false
	}
	q := s.queues.byCell[*cell]
	return q == nil || q.waiting < queueBound
}

// join makes a waiter the last of its cell's queue; nil: others took the last room there was.
func (l *Limiter) join(s *shard, d *limits.LeaseDemand, wait time.Duration, now int64) *waiter {
	if l.waiting.Add(1) > waitingBound {
		l.waiting.Add(-1)
		return nil
	}
	q := s.queues.byCell[d.Lease.Cell]
	if q == nil {
		if s.queues.byCell == nil {
			s.queues.byCell = make(map[limits.Cell]*queue)
		}
		q = &queue{limit: d.Limit}
		s.queues.byCell[d.Lease.Cell] = q
		s.slots[s.index[d.Lease.Cell]].queued = true
	}
	w := l.waiters.Get().(*waiter)
	w.queue, w.since = q, now
	w.timer.Reset(wait)
	if w.previous = q.last; q.last == nil {
		q.first = w
	} else {
		q.last.next = w
	}
	q.last = w
	q.waiting++
	s.queues.waiting++
	l.setAlarm(s, now)
	return w
}

// unlink takes a waiter out of the line.
func (l *Limiter) unlink(s *shard, w *waiter) {
	q := w.queue
	if w.previous == nil {
		q.first = w.next
	} else {
		w.previous.next = w.next
	}
	if w.next == nil {
		q.last = w.previous
	} else {
		w.next.previous = w.previous
	}
	w.previous, w.next = nil, nil
	q.waiting--
	l.waiting.Add(-1)
	if s.queues.waiting--; s.queues.waiting == 0 && s.queues.alarm != nil {
		s.queues.alarm.Stop()
		s.queues.alarmAt = 0
	}
}

// takeOut ends a waiter's waiting, or counts off its turn. Only the one who waits calls it, and makes the
// room that there may be now the next one's.
func (l *Limiter) takeOut(s *shard, w *waiter) {
	if w.turn {
		w.queue.turns--
	} else {
		l.unlink(s, w)
	}
	w.queue = nil
}

// await waits for a turn, for the end of the wait or for ctx, and answers.
func (l *Limiter) await(ctx context.Context, t *taking, w *waiter) (limits.Decision, error) {
	c := &t.cells[t.cell]
	s := &l.shards[c.shard]
	defer func() {
		if w.queue != nil { // no answer: ctx is done, or there is a panic on its way
			s.mu.Lock()
			l.takeOut(s, w)
			l.giveTurns(s, s.index[t.lease.Lease.Cell])
			s.mu.Unlock()
		}
		l.waited.Observe(time.Duration(l.now() - w.since).Seconds())
		l.recycle(w)
	}()
	select {
	case <-w.ready:
	case <-w.timer.C:
	case <-ctx.Done():
	}
	if err := ctx.Err(); err != nil {
		return limits.Decision{}, fmt.Errorf("wait for a running request to end: %w: %w", apikey.ErrUndecided, err)
	}
	return l.finish(t, w)
}

// finish judges the demand of a waiter that has its turn, or whose wait is over, anew. Which of the two
// it is is decided here, under the lock: a turn that was given is used.
func (l *Limiter) finish(t *taking, w *waiter) (limits.Decision, error) {
	l.lock(t.cells)
	defer l.unlock(t.cells)
	at := l.instant(t.quotas)
	c := &t.cells[t.cell]
	s := &l.shards[c.shard]
	l.expire(s, at.clock)
	l.takeOut(s, w)
	defer l.giveTurns(s, s.index[t.lease.Lease.Cell])
	d, v := l.judge(t, at, w)
	switch v {
	case ended:
		return limits.Decision{}, errEnded
	case overfull:
		l.quotasFull.Inc()
		return limits.Decision{}, l.errFull
	}
	s.countRefusal(d, decided)
	d.Waited = time.Duration(at.clock - w.since)
	return d, nil
}

func (l *Limiter) recycle(w *waiter) {
	w.timer.Stop()
	select {
	case <-w.ready:
	default:
	}
	w.turn = false
	l.waiters.Put(w)
}

// setAlarm sees to it that the next lease to expire does so in time while somebody waits. The shard is
// locked.
func (l *Limiter) setAlarm(s *shard, now int64) {
	q := &s.queues
	if q.waiting == 0 {
		return
	}
	next := s.leases.next()
	if next == math.MaxInt64 || q.alarmAt != 0 && q.alarmAt <= next {
		return // set already, perhaps for a lease that was renewed since: then it is set again when it rings
	}
	q.alarmAt = next
	if q.alarm == nil {
		q.alarm = time.AfterFunc(time.Duration(next-now), func() { l.ring(s) })
	} else {
		q.alarm.Reset(time.Duration(next - now))
	}
}

func (l *Limiter) ring(s *shard) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queues.alarmAt = 0
	now := l.now()
	l.expire(s, now)
	l.setAlarm(s, now)
}
