package storetest

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sort"
	"time"

	"keyward/authz/admin"
)

// eventsAfter returns the events from the one after a sequence number on.
func (v *memoryView) eventsAfter(after int64) []admin.Event {
	return v.events[sort.Search(len(v.events), func(i int) bool { return v.events[i].Sequence > after }):]
}

// Events implements admin.Reader.
func (r *memoryReader) Events(ctx context.Context, after int64, limit int) ([]admin.Event, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	return slices.Clone(first(v.eventsAfter(after), limit)), nil
}

// FindEvents implements admin.Reader.
func (r *memoryReader) FindEvents(ctx context.Context, f admin.EventFilter, after admin.EventPlace, limit int) ([]admin.Event, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	newestFirst := func(a, b admin.EventPlace) int {
		return cmp.Or(b.At.Compare(a.At), cmp.Compare(b.Sequence, a.Sequence))
	}
	place := func(e *admin.Event) admin.EventPlace { return admin.EventPlace{At: e.At, Sequence: e.Sequence} }
	is := func(want, got string) bool { return want == "" || want == got }
	var list []admin.Event
	for _, e := range v.events {
		if is(f.Actor, e.Actor) && is(f.Action, e.Action) && is(f.InstanceID, e.InstanceID) && is(f.Target, e.Target) &&
			(f.From.IsZero() || !e.At.Before(micros(f.From))) && (f.To.IsZero() || !e.At.After(micros(f.To))) &&
			(f.Outcome != admin.OutcomeDone || e.Refused == "") && (f.Outcome != admin.OutcomeRefused || e.Refused != "") &&
			(after == admin.EventPlace{} || newestFirst(after, place(&e)) < 0) {
			list = append(list, e)
		}
	}
	slices.SortFunc(list, func(a, b admin.Event) int { return newestFirst(place(&a), place(&b)) })
	return first(list, limit), nil
}

// Mutations implements admin.Reader.
func (r *memoryReader) Mutations(ctx context.Context) (int64, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return 0, err
	}
	defer done()
	return int64(v.revision), nil
}

// AuditSegments implements admin.Reader.
func (r *memoryReader) AuditSegments(ctx context.Context) ([]admin.AuditSegment, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	return slices.Clone(v.segments), nil
}

// putSegment replaces the segment of that number, or adds it: numbers are places from 1.
func (v *memoryView) putSegment(s admin.AuditSegment) {
	v.segments = slices.Clone(v.segments)
	if n := int(s.Number); n > len(v.segments) {
		v.segments = append(v.segments, s)
	} else {
		v.segments[n-1] = s
	}
}

// Audit implements admin.Tx.
func (t *memoryTx) Audit(ctx context.Context, e admin.Event) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	for _, m := range []json.RawMessage{e.Before, e.After} {
		if m != nil && !json.Valid(m) {
			return errors.New("audit event: before and after must be JSON or nil")
		}
	}
	var open *admin.AuditSegment
	if n := len(t.segments); n > 0 {
		open = &t.segments[n-1]
	}
	newest := int64(0)
	if n := len(t.events); n > 0 {
		newest = t.events[n-1].Sequence
	}
	e.At = micros(e.At)
	for _, s := range t.audit.Extend(open, newest, &e) {
		t.putSegment(s)
	}
	t.events = append(t.events, e)
	t.audited = true
	return nil
}

// RemoveAuditSegment implements admin.Tx.
func (t *memoryTx) RemoveAuditSegment(ctx context.Context, number int64, at time.Time) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	i := slices.IndexFunc(t.segments, func(s admin.AuditSegment) bool { return s.Number == number && !s.SealedAt.IsZero() })
	if i < 0 || !t.audit.Good(&t.segments[i]) {
		return notThere("audit segment")
	}
	s := t.segments[i]
	s.RemovedAt = micros(at)
	t.audit.Sign(&s)
	t.putSegment(s)
	t.events = slices.DeleteFunc(slices.Clone(t.events), func(e admin.Event) bool { return e.Sequence >= s.First && e.Sequence <= s.Last })
	return nil
}

// SealAudit implements admin.Store. There are no events from before the chain.
func (s *Memory) SealAudit(ctx context.Context) error {
	return s.write(ctx, func(t *memoryTx) error {
		for _, segment := range t.segments {
			if t.audit.Outdated(&segment) {
				t.audit.Sign(&segment)
				t.putSegment(segment)
			}
		}
		return nil
	})
}

// A memoryReplay is a kept answer.
type memoryReplay struct {
	sealed []byte
	until  time.Time
}

// Replay implements admin.Reader.
func (r *memoryReader) Replay(ctx context.Context, id admin.ReplayID, now time.Time) ([]byte, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	kept, ok := v.replays.get(id)
	if !ok || !kept.until.After(micros(now)) {
		return nil, notThere("kept answer")
	}
	return slices.Clone(kept.sealed), nil
}

// KeepReplay implements admin.Tx.
func (t *memoryTx) KeepReplay(ctx context.Context, id admin.ReplayID, sealed []byte, now, until time.Time) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	if kept, ok := t.replays.get(id); ok && kept.until.After(micros(now)) {
		return taken("kept answer")
	}
	t.replays.put(id, memoryReplay{slices.Clone(sealed), micros(until)})
	return nil
}

// ForgetReplays implements admin.Store.
func (s *Memory) ForgetReplays(ctx context.Context, now time.Time) error {
	return s.write(ctx, func(t *memoryTx) error {
		for id, kept := range t.replays.all() {
			if !kept.until.After(micros(now)) {
				t.replays.drop(id)
			}
		}
		return nil
	})
}
