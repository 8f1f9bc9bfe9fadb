package limitstest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"keyward/authz/apikey"
	"keyward/limits"
)

// Histories holds a leaser to an exact model over so many random histories of demands that wait or do
// not, ends, renewals, connections that end and waiters that leave: lost, twice, late and in any order.
// After each step everybody has the answer that the model says, at the time that it says, or waits as it
// says. So no grant is made above the limit, nothing counts below zero or beyond its time, no turn is
// lost, nobody who waits is forgotten or overtaken, and a refusal has spent nothing.
//
// All is in one testing/synctest bubble. open is called again and again.
func Histories(t *testing.T, n int, open func(t *testing.T) LeaseSubject) {
	synctest.Test(t, func(t *testing.T) {
		histories(t, n, func() *crowd { return newCrowd(t, open(t)) })
	})
}

func histories(t failer, n int, fresh func() *crowd) {
	const each = "rapid.checks"
	before := flag.Lookup(each).Value.String()
	defer func() { _ = flag.Set(each, before) }()
	var s *crowd
	// Rapid ends a check after a day, and a bubble's days are short.
	for left := n; left > 0 && !t.Failed(); left -= atOnce {
		if err := flag.Set(each, strconv.Itoa(min(left, atOnce))); err != nil {
			t.Fatalf("number of histories: %v", err)
		}
		check(t, func(rt *rapid.T) {
			// A leaser is young once. Most histories go on with one that others have used: what those left
			// behind, if they left anything, is found as well.
			if s == nil || rapid.IntRange(0, 7).Draw(rt, "fresh") == 0 {
				s = fresh()
			}
			h := &history{crowd: s, t: rt, start: time.Now()}
			s.t = rt
			defer s.disperse()
			h.run()
		})
	}
}

// atOnce is a number of histories that takes less than a day by far.
const atOnce = 250

// A history is the model: what a leaser must do, in the fewest words, knowing all times.
type history struct {
	*crowd
	t     *rapid.T
	start time.Time
	now   time.Duration // since start
	cells []*modelCell
	all   []*modelLease
	ended []identityEnd
	steps int
}

type modelCell struct {
	cell  limits.Cell
	limit int64         // of the newest demand
	queue []*modelLease // first come first served
}

// A modelLease is a lease that was asked for, or may yet be.
type modelLease struct {
	lease   limits.Lease
	cell    *modelCell
	rate    limits.RateDemand // its own, so that nobody who waits competes for it; of one request an hour
	spent   bool
	spentAt time.Duration

	live       bool
	until      time.Duration
	connection uint64
	expired    bool // here, and nobody ended it
	early      bool // it ended while it could have been adopted

	asked     *waiting // nil: nobody waits for an answer
	since     time.Duration
	deadline  time.Duration
	answer    limits.Decision // as the model has it
	undecided bool
	answered  bool
}

type identityEnd struct {
	identity limits.Identity
	at       time.Duration
	early    bool
}

func (h *history) run() {
	for range rapid.IntRange(1, 2).Draw(h.t, "cells") {
		h.cells = append(h.cells, &modelCell{
			cell:  h.cell(limits.ClassConcurrency),
			limit: rapid.Int64Range(1, 3).Draw(h.t, "limit"),
		})
	}
	for range rapid.IntRange(1, 30).Draw(h.t, "steps") {
		h.step()
		h.Settle()
		h.compare()
	}
	h.nothingIsLeft()
}

func (h *history) step() {
	h.steps++
	switch rapid.SampledFrom([]string{
		"ask", "ask", "ask", "ask", "end", "end", "end batch", "end identity", "renew", "disconnect",
		"give up", "spend rate", "advance", "advance", "advance",
	}).Draw(h.t, "step") {
	case "ask":
		h.ask()
	case "end":
		if m := h.any("lease"); m != nil {
			h.modelEnd(m)
			h.end(m.lease)
		}
	case "end batch":
		var leases []limits.Lease
		for range rapid.IntRange(1, 4).Draw(h.t, "ends") {
			// What waits is left out: it may have its turn by the ends before, and whether it has its
			// lease before the next end is a question of scheduling.
			if m := h.any("lease"); m != nil && m.asked == nil {
				leases = append(leases, m.lease)
				h.modelEnd(m)
			}
		}
		h.end(leases...)
	case "end identity":
		if m := h.any("lease"); m != nil {
			h.modelEndIdentity(m.lease.Identity)
			h.endAll(m.lease)
		}
	case "renew":
		var leases []limits.Lease
		for range rapid.IntRange(1, 3).Draw(h.t, "renewals") {
			// What is waited for is not renewed: that it then needs no turn has a case of its own.
			if m := h.any("lease"); m != nil && m.asked == nil {
				leases = append(leases, m.lease)
				h.modelRenew(m)
			}
		}
		h.renew(leases...)
	case "disconnect":
		connection := rapid.Uint64Range(0, 2).Draw(h.t, "connection")
		for _, m := range h.all {
			if m.live && m.connection == connection && connection != 0 {
				m.until, m.connection = min(m.until, h.now+h.OrphanTTL), 0
			}
		}
		h.Leaser.Disconnected(connection)
	case "give up":
		if m := h.any("waiter"); m != nil && m.asked != nil {
			m.cell.queue = slices.DeleteFunc(m.cell.queue, func(w *modelLease) bool { return w == m })
			m.answered, m.undecided = true, true
			m.asked.cancel()
		}
	case "spend rate":
		if m := h.any("lease"); m != nil {
			if got, err := h.take(demand(m.rate)); err != nil || got.Allowed == m.spent {
				h.t.Fatalf("rate of %s, spent %t: %+v, %v", h.name(m), m.spent, got, err)
			}
			if !m.spent {
				m.spent, m.spentAt = true, h.now
			}
		}
	case "advance":
		h.advance(rapid.OneOf(
			rapid.Int64Range(0, 30),
			rapid.Int64Range(0, int64(h.TTL/time.Millisecond)),
		).Draw(h.t, "milliseconds"))
	}
}

// any draws one of the leases that were ever asked for; nil: there is none.
func (h *history) any(label string) *modelLease {
	if len(h.all) == 0 {
		return nil
	}
	// The newest are the most interesting.
	back := rapid.IntRange(0, min(len(h.all)-1, 11)).Draw(h.t, label)
	return h.all[len(h.all)-1-back]
}

// ask takes a lease: of a new request, of one that was asked for before, or of a redirected one.
func (h *history) ask() {
	var m *modelLease
	if before := h.any("of"); before != nil && before.asked == nil && rapid.IntRange(0, 5).Draw(h.t, "again") == 0 {
		m = before
	} else {
		c := rapid.SampledFrom(h.cells).Draw(h.t, "cell")
		m = &modelLease{cell: c, lease: h.lease(c.cell), rate: h.slow(limits.ClassBurst, 1)}
		switch rapid.IntRange(0, 5).Draw(h.t, "kind") {
		case 0: // a request that began before the process
			m.lease.Identity.Start = h.Started.Add(-time.Minute).UnixMicro() + int64(h.asked)
		case 1:
			if before != nil {
				m.lease.Identity = before.lease.Identity
			}
		case 2: // one of whom nobody can say all
			m.lease.Identity = limits.Identity{Start: m.lease.Identity.Start}
		}
		h.all = append(h.all, m)
	}
	limit := m.cell.limit
	if rapid.IntRange(0, 7).Draw(h.t, "change") == 0 {
		limit = rapid.Int64Range(1, 4).Draw(h.t, "limit")
	}
	d := asking(m.lease, limit, m.rate)
	d.Lease.Connection = rapid.Uint64Range(0, 2).Draw(h.t, "connection")
	if rapid.Bool().Draw(h.t, "patient") {
		// Waits end at times of their own, so that what comes first is no question of scheduling.
		d.Lease.Wait = time.Duration(rapid.OneOf(rapid.Int64Range(0, 20), rapid.Int64Range(0, 60_000)).Draw(h.t, "wait"))*time.Millisecond +
			time.Duration(h.steps)*time.Microsecond
	}
	ctx, wait := context.Background(), d.Lease.Wait
	if rapid.IntRange(0, 4).Draw(h.t, "deadline") == 0 {
		// Not so near that there is no time to wait: the second look, by Take, would have its own result.
		deadline := answerBefore + time.Duration(rapid.Int64Range(0, 60).Draw(h.t, "deadline in ms"))*time.Millisecond + time.Duration(h.steps)*time.Microsecond
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, deadline)
		context.AfterFunc(ctx, cancel)
		wait = min(wait, deadline-answerBefore)
	}
	m.connection, m.since, m.deadline = h.connectionAfter(m, d.Lease.Connection), h.now, h.now+wait
	m.answered, m.undecided, m.answer = false, false, limits.Decision{}
	h.modelAsk(m, limit, d.Lease.Connection, wait)
	m.asked = h.startWith(ctx, d)
}

// connectionAfter is the connection of a lease that is asked for: as it was until there is a grant.
func (h *history) connectionAfter(m *modelLease, asked uint64) uint64 {
	if m.live {
		return m.connection
	}
	return asked
}

func (h *history) modelAsk(m *modelLease, limit int64, connection uint64, wait time.Duration) {
	if m.live {
		m.until, m.connection = h.now+h.TTL, connection
		h.modelAnswer(m, repeated)
		return
	}
	if h.isGone(m) {
		h.modelUndecided(m)
		return
	}
	// A limit that it raises gives turns to those who wait, and turns count whatever becomes of them.
	c := m.cell
	c.limit = limit
	turns := max(0, min(int64(len(c.queue)), limit-h.liveOf(c)))
	full := int64(len(c.queue)) > turns || h.liveOf(c)+turns >= limit
	switch {
	case m.spent:
		h.modelAnswer(m, h.rateRefusal(m))
	case !full:
		h.modelGrant(m)
	case wait > 0 && len(c.queue) < queueBound:
		c.queue = append(c.queue, m)
	default:
		h.modelAnswer(m, tooMany)
	}
	h.modelTurns(c)
}

// modelTurns gives the room of a cell to those who wait.
func (h *history) modelTurns(c *modelCell) {
	for len(c.queue) > 0 && h.liveOf(c) < c.limit {
		m := c.queue[0]
		c.queue = c.queue[1:]
		switch {
		case h.isGone(m):
			h.modelUndecided(m)
		case m.spent:
			h.modelAnswer(m, h.rateRefusal(m))
		default:
			h.modelGrant(m)
		}
	}
}

func (h *history) modelGrant(m *modelLease) {
	m.live, m.until, m.expired = true, h.now+h.TTL, false
	m.spent, m.spentAt = true, h.now
	h.modelAnswer(m, granted)
}

func (h *history) modelAnswer(m *modelLease, d limits.Decision) {
	d.Waited = h.now - m.since
	m.answer, m.answered = d, true
}

func (h *history) modelUndecided(m *modelLease) { m.answered, m.undecided = true, true }

// rateRefusal is the answer by a rate that is spent: an hour is longer than any hint.
func (h *history) rateRefusal(m *modelLease) limits.Decision {
	return limits.Decision{Class: limits.ClassBurst, RetryAfter: m.spentAt + m.rate.Rate.Interval - h.now}
}

func (h *history) liveOf(c *modelCell) (n int64) {
	for _, m := range h.all {
		if m.cell == c && m.live {
			n++
		}
	}
	return n
}

func (h *history) isGone(m *modelLease) bool {
	return !m.lease.Identity.IsZero() && slices.ContainsFunc(h.ended, func(e identityEnd) bool {
		return e.identity == m.lease.Identity && h.now < e.at+goneFor
	})
}

// adoptable reports whether the process is young and a request older.
func (h *history) adoptable(start int64) bool {
	return h.start.Add(h.now).Sub(h.Started) < adoptFor && start <= h.Started.Add(skew).UnixMicro()
}

func (h *history) modelEnd(m *modelLease) {
	m.early = m.early || h.adoptable(m.lease.Identity.Start)
	m.expired = false
	if m.live {
		m.live = false
		h.modelTurns(m.cell)
	}
}

func (h *history) modelEndIdentity(i limits.Identity) {
	if i.IsZero() {
		return
	}
	h.ended = append(h.ended, identityEnd{i, h.now, h.adoptable(i.Start)})
	for _, m := range h.all {
		if m.lease.Identity == i {
			m.live, m.expired = false, false
		}
	}
	for _, c := range h.cells {
		h.modelTurns(c)
	}
}

func (h *history) modelRenew(m *modelLease) {
	early := m.early || !m.lease.Identity.IsZero() && slices.ContainsFunc(h.ended, func(e identityEnd) bool {
		return e.early && e.identity == m.lease.Identity
	})
	young := h.adoptable(m.lease.Identity.Start)
	switch {
	case m.live:
		m.until = h.now + h.TTL
	case young && early:
	case m.expired || young:
		m.live, m.until, m.expired, m.connection = true, h.now+h.TTL, false, 0
	}
}

// advance lets time go by, from one thing that happens to the next.
func (h *history) advance(milliseconds int64) {
	target := h.now + time.Duration(milliseconds)*time.Millisecond
	for {
		next := time.Duration(math.MaxInt64)
		for _, m := range h.all {
			if m.live {
				next = min(next, m.until)
			}
		}
		for _, c := range h.cells {
			for _, m := range c.queue {
				next = min(next, m.deadline)
			}
		}
		h.Advance(min(next, target) - h.now)
		h.now = min(next, target)
		if next > target {
			return
		}
		for _, m := range h.all {
			if m.live && m.until <= h.now {
				m.live, m.expired = false, true
			}
		}
		for _, c := range h.cells {
			h.modelTurns(c)
			for _, m := range slices.Clone(c.queue) {
				if m.deadline > h.now {
					continue
				}
				c.queue = slices.DeleteFunc(c.queue, func(w *modelLease) bool { return w == m })
				switch {
				case h.isGone(m):
					h.modelUndecided(m)
				case m.spent:
					h.modelAnswer(m, h.rateRefusal(m))
				default:
					h.modelAnswer(m, tooMany)
				}
			}
		}
		h.Settle()
		h.compare()
	}
}

// compare holds every answer, and every wait, to the model.
func (h *history) compare() {
	for _, m := range h.all {
		if m.asked == nil {
			continue
		}
		switch {
		case m.answered && !m.asked.answered():
			h.t.Fatalf("at %s %s waits: want %+v (undecided %t)", h.now, h.name(m), m.answer, m.undecided)
		case !m.answered && m.asked.answered():
			h.t.Fatalf("at %s %s has %+v, %v: want it to wait", h.now, h.name(m), m.asked.got, m.asked.err)
		case !m.answered:
			continue
		case m.undecided && !errors.Is(m.asked.err, apikey.ErrUndecided),
			!m.undecided && (m.asked.err != nil || m.asked.got != m.answer):
			h.t.Fatalf("at %s %s has %+v, %v: want %+v (undecided %t)", h.now, h.name(m), m.asked.got, m.asked.err, m.answer, m.undecided)
		}
		m.asked.cancel()
		m.asked = nil
	}
}

func (h *history) name(m *modelLease) string {
	return fmt.Sprintf("request %d of cell %d", slices.Index(h.all, m), slices.Index(h.cells, m.cell))
}

// nothingIsLeft holds the leases that live to the model, and then the cells to being as new when
// everybody who waits has left and the last lease is over.
func (h *history) nothingIsLeft() {
	mine := func(of limits.Cell) bool {
		return slices.ContainsFunc(h.cells, func(c *modelCell) bool { return c.cell == of })
	}
	left := make(map[limits.Lease]time.Duration)
	for _, r := range h.Leaser.Running(mine) {
		left[r.Lease] = r.Until.Sub(h.start)
	}
	for _, m := range h.all {
		until, ok := left[m.lease]
		if ok != m.live || m.live && until != m.until {
			h.t.Fatalf("at %s %s lives %t until %s, want %t, %s", h.now, h.name(m), ok, until, m.live, m.until)
		}
		delete(left, m.lease)
	}
	if len(left) > 0 {
		h.t.Fatalf("%+v live, and were never asked for", left)
	}
	for _, m := range h.all {
		if m.asked != nil {
			m.asked.cancel()
			m.cell.queue = nil
			h.modelUndecided(m)
		}
	}
	h.Settle()
	h.compare()
	h.advance(int64(h.TTL / time.Millisecond))
	h.Settle()
	if left := h.Leaser.Running(mine); len(left) > 0 {
		h.t.Fatalf("%+v live beyond their time", left)
	}
	for _, c := range h.cells {
		leases := []limits.Lease{h.grant(c.cell, 2), h.grant(c.cell, 2)}
		h.want(asking(h.lease(c.cell), 2), tooMany)
		h.end(leases...)
	}
}
