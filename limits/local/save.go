package local

import (
	"errors"
	"fmt"
	"time"

	"keyward/limits"
)

const (
	// longWindow is from where on what a quota has counted is worth keeping over a restart.
	longWindow = 5 * time.Minute
	// saveBytes of states, or a few more, are made while a shard is locked.
	saveBytes = 16 << 10
)

// SaveQuotas yields what quotas with windows or lockouts of 5 minutes and longer, and those of the calendar,
// have counted, of each cell that has counted something since; 0: since the limiter was made, so that what was
// restored and has not changed is left out. next is since for the next call.
// Where yield returns false it ends there, and next is since: nothing counts as saved. Whoever keeps the states
// keeps one for each cell, the newest, and may forget it after its Until. A state is the receiver's own.
//
// What a crash forgets is what was counted since the last call began. Safe for concurrent use; no lock is held
// while yield runs.
func (l *Limiter) SaveQuotas(since time.Duration, yield func(limits.QuotaState) bool) (next time.Duration) {
	next = time.Duration(l.now())
	var states []limits.QuotaState
	for i := range l.shards {
		// From the last slot to the first: the sweep moves slots from the end into gaps, so that what is
		// still to come stays so. What is added meanwhile has changed since next.
		for position := int(^uint(0) >> 1); position > 0; {
			states, position = l.saveSome(&l.shards[i], position, int64(since), states[:0])
			for _, s := range states {
				if !yield(s) {
					return since
				}
			}
		}
	}
	return next
}

// saveSome makes the states of some of the slots before a position, and returns how many are left.
func (l *Limiter) saveSome(s *shard, position int, since int64, states []limits.QuotaState) (_ []limits.QuotaState, left int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := l.instant(true)
	t := &s.quotas
	position = min(position, len(t.slots))
	var b []byte
	for ; position > 0 && len(b) < saveBytes; position-- {
		slot := &t.slots[position-1]
		if slot.changed < since || !slot.tally.Long(slot.changed, longWindow) {
			continue
		}
		runs := t.runs(slot)
		if slot.tally.Idle(&runs, at.clock, at.wall) {
			continue
		}
		state := limits.QuotaState{Cell: slot.cell}
		begin := len(b)
		b, state.Until = slot.tally.Append(b, &runs, at.clock, at.wall)
		state.Counts = b[begin:len(b):len(b)]
		states = append(states, state)
	}
	return states, position
}

// RestoreQuotas goes on with what another process has saved, by the wall clock: call it before the first
// demand. The states that say nothing more are left out. The error is of those that cannot be restored: they
// are damaged, there are more than Config.QuotaCells, or their cell has counted already. All others are.
func (l *Limiter) RestoreQuotas(states []limits.QuotaState) error {
	var first error
	failed := 0
	for i := range states {
		if err := l.restore(&states[i]); err != nil {
			if failed++; first == nil {
				first = fmt.Errorf("cell %x of class %d: %w", states[i].Cell.Owner, states[i].Cell.Class, err)
			}
		}
	}
	if failed == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d saved quotas cannot be restored and count from nothing, the first: %w", failed, len(states), first)
}

var errCounted = errors.New("it has counted already")

func (l *Limiter) restore(state *limits.QuotaState) error {
	s := &l.shards[l.shardOf(&state.Cell)]
	s.mu.Lock()
	defer s.mu.Unlock()
	at := l.instant(true)
	tally, runs, err := limits.ParseTally(state.Counts, at.clock, at.wall)
	if err != nil || tally.Idle(&runs, at.clock, at.wall) {
		return err
	}
	t := &s.quotas
	if _, ok := t.index[state.Cell]; ok {
		return errCounted
	}
	if !l.reserve(1) {
		return l.errFull
	}
	slot := &t.slots[t.add(&state.Cell)]
	slot.tally, slot.changed = tally, -1
	t.move(slot, &runs, runs.Len)
	slot.keep(&runs)
	return nil
}
