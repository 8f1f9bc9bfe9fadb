package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math"
	"strings"
	"time"

	"keyward/authz/admin"
)

const (
	eventColumns = `sequence, at, actor, remote_addr, action, refused, instance_id, target, request_id, state_before, state_after, link`

	listEvents = `SELECT ` + eventColumns + ` FROM audit WHERE sequence > ? ORDER BY sequence LIMIT ?`

	segmentColumns = `number, first, last, previous, head, began_at, sealed_at, removed_at, pepper_version, mac`

	newestSegment = `SELECT ` + segmentColumns + ` FROM audit_segments ORDER BY number DESC LIMIT 1`
)

// findEvents makes the statement that lists what a filter lets through.
func findEvents(f admin.EventFilter, after admin.EventPlace, limit int) (query string, args []any) {
	var where []string
	and := func(condition string, values ...any) {
		where = append(where, condition)
		args = append(args, values...)
	}
	for _, c := range []struct{ column, value string }{
		{"target", f.Target}, {"instance_id", f.InstanceID}, {"actor", f.Actor}, {"action", f.Action},
	} {
		if c.value != "" {
			and(c.column+" = ?", c.value)
		}
	}
	switch f.Outcome {
	case admin.OutcomeDone:
		and("refused = ''")
	case admin.OutcomeRefused:
		and("refused <> ''")
	}
	if !f.From.IsZero() {
		and("at >= ?", micros(f.From))
	}
	if !f.To.IsZero() {
		and("at <= ?", micros(f.To))
	}
	if after != (admin.EventPlace{}) {
		and("(at, sequence) < (?, ?)", micros(after.At), after.Sequence)
	}
	query = `SELECT ` + eventColumns + ` FROM audit`
	if len(where) > 0 {
		query += ` WHERE ` + strings.Join(where, " AND ")
	}
	return query + ` ORDER BY at DESC, sequence DESC LIMIT ?`, append(args, max(limit, 0))
}

// Events implements admin.Reader.
func (r *reader) Events(ctx context.Context, after int64, limit int) ([]admin.Event, error) {
	return r.events(r.rows(ctx, "list audit events", listEvents, after, max(limit, 0)))
}

// FindEvents implements admin.Reader.
func (r *reader) FindEvents(ctx context.Context, f admin.EventFilter, after admin.EventPlace, limit int) ([]admin.Event, error) {
	query, args := findEvents(f, after, limit)
	return r.events(r.rows(ctx, "find audit events", query, args...))
}

func (r *reader) events(rows iter.Seq2[*sql.Rows, error]) ([]admin.Event, error) {
	var list []admin.Event
	for row, err := range rows {
		if err != nil {
			return nil, err
		}
		var e admin.Event
		var before, afterwards sql.NullString
		var link []byte
		err := row.Scan(&e.Sequence, instant{&e.At}, &e.Actor, &e.RemoteAddr, &e.Action, &e.Refused, &e.InstanceID, &e.Target, &e.RequestID,
			&before, &afterwards, &link)
		if err != nil {
			return nil, r.fault(fmt.Sprintf("read audit event %d", e.Sequence), err)
		}
		// One of another length is no link that anything could have: a verification should say so, and a
		// list should go on.
		if len(link) == len(e.Link) {
			e.Link = admin.Link(link)
		}
		e.Before, e.After = rawOf(before), rawOf(afterwards)
		list = append(list, e)
	}
	return list, nil
}

func rawOf(s sql.NullString) json.RawMessage {
	if !s.Valid {
		return nil
	}
	return json.RawMessage(s.String)
}

// Mutations implements admin.Reader.
func (r *reader) Mutations(ctx context.Context) (n int64, err error) {
	_, err = r.one(ctx, "count mutations", `SELECT revision - leapt FROM meta WHERE one = 1`, nil, &n)
	return n, err
}

// AuditSegments implements admin.Reader.
func (r *reader) AuditSegments(ctx context.Context) ([]admin.AuditSegment, error) {
	return r.segments(r.rows(ctx, "list audit segments", `SELECT `+segmentColumns+` FROM audit_segments ORDER BY number`))
}

func (r *reader) segments(rows iter.Seq2[*sql.Rows, error]) ([]admin.AuditSegment, error) {
	var list []admin.AuditSegment
	for row, err := range rows {
		if err != nil {
			return nil, err
		}
		var s admin.AuditSegment
		err := r.scan("read audit segment", row, &s.Number, &s.First, &s.Last, exactly(s.Previous[:]), exactly(s.Head[:]),
			instant{&s.BeganAt}, instant{&s.SealedAt}, instant{&s.RemovedAt}, &s.PepperVersion, exactly(s.MAC[:]))
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, nil
}

// openSegment returns the newest segment, nil if there is none.
func (t *tx) openSegment(ctx context.Context) (*admin.AuditSegment, error) {
	list, err := t.segments(t.rows(ctx, "read audit segment", newestSegment))
	if err != nil || len(list) == 0 {
		return nil, err
	}
	return &list[0], nil
}

// putSegment writes a segment.
func (t *tx) putSegment(ctx context.Context, s *admin.AuditSegment) error {
	return t.execOne(ctx, "write audit segment", `INSERT INTO audit_segments (`+segmentColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (number) DO UPDATE SET first = excluded.first, last = excluded.last, previous = excluded.previous,
		head = excluded.head, began_at = excluded.began_at, sealed_at = excluded.sealed_at, removed_at = excluded.removed_at,
		pepper_version = excluded.pepper_version, mac = excluded.mac`,
		s.Number, s.First, s.Last, s.Previous[:], s.Head[:], micros(s.BeganAt), micros(s.SealedAt), micros(s.RemovedAt), s.PepperVersion, s.MAC[:])
}

// Audit implements admin.Tx.
func (t *tx) Audit(ctx context.Context, e admin.Event) error {
	for _, m := range []json.RawMessage{e.Before, e.After} {
		if m != nil && !json.Valid(m) {
			return errors.New("audit event: before and after must be JSON or nil") // or no list of events could be shown
		}
	}
	// A transaction may write hundreds of events, and nobody else writes meanwhile: it looks once.
	open, newest := t.last.segment, t.last.event
	if open == nil {
		var err error
		if open, err = t.openSegment(ctx); err != nil {
			return err
		}
		if _, err := t.one(ctx, "read the newest audit event", `SELECT coalesce(max(sequence), 0) FROM audit`, nil, &newest); err != nil {
			return err
		}
	}
	e.At = time.UnixMicro(micros(e.At)).UTC() // as it will come back
	changed := t.audit.Extend(open, newest, &e)
	t.last.segment, t.last.event = nil, 0 // until all is written
	for i := range changed {
		if err := t.putSegment(ctx, &changed[i]); err != nil {
			return err
		}
	}
	err := t.execOne(ctx, "write audit event", `INSERT INTO audit (`+eventColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		e.Sequence, micros(e.At), e.Actor, e.RemoteAddr, e.Action, e.Refused, e.InstanceID, e.Target, e.RequestID, raw(e.Before), raw(e.After), e.Link[:])
	if err == nil {
		t.audited = true
		t.last.segment, t.last.event = &changed[len(changed)-1], e.Sequence
	}
	return err
}

// RemoveAuditSegment implements admin.Tx.
func (t *tx) RemoveAuditSegment(ctx context.Context, number int64, at time.Time) error {
	list, err := t.segments(t.rows(ctx, "read audit segment", `SELECT `+segmentColumns+` FROM audit_segments WHERE number = ? AND sealed_at <> ?`, number, never))
	if err != nil {
		return err
	}
	if len(list) == 0 || !t.audit.Good(&list[0]) {
		return notFound("audit segment")
	}
	s := &list[0]
	s.RemovedAt = at
	t.audit.Sign(s)
	if err := t.putSegment(ctx, s); err != nil {
		return err
	}
	_, err = t.exec(ctx, "remove audit events", `DELETE FROM audit WHERE sequence BETWEEN ? AND ?`, s.First, s.Last)
	return err
}

// SealAudit implements admin.Store.
func (s *Store) SealAudit(ctx context.Context) error {
	return s.write(ctx, "seal the audit", func(t *tx) error {
		if err := t.chainOld(ctx); err != nil {
			return err
		}
		all, err := t.AuditSegments(ctx)
		if err != nil {
			return err
		}
		for i := range all {
			if !t.audit.Outdated(&all[i]) {
				continue
			}
			t.audit.Sign(&all[i])
			if err := t.putSegment(ctx, &all[i]); err != nil {
				return err
			}
		}
		return nil
	})
}

// chainOld chains the events that were written before there was a chain. They come first, as they are, and
// are followed by an event that says so: whoever takes a chain apart to have it made anew here cannot take
// along when that was.
func (t *tx) chainOld(ctx context.Context) error {
	var pending bool
	_, err := t.one(ctx, "chain the audit", `SELECT NOT EXISTS (SELECT 1 FROM audit_segments) AND EXISTS (SELECT 1 FROM audit)`, nil, &pending)
	if err != nil || !pending {
		return err
	}
	var segment admin.AuditSegment
	var count int64
	for after := int64(math.MinInt64); ; {
		page, err := t.Events(ctx, after, batch)
		if err != nil {
			return err
		}
		if len(page) == 0 {
			break
		}
		for i := range page {
			e := &page[i]
			segment.Begin(e)
			if err := t.execOne(ctx, "chain the audit", `UPDATE audit SET link = ? WHERE sequence = ?`, e.Link[:], e.Sequence); err != nil {
				return err
			}
			after = e.Sequence
			count++
		}
	}
	t.audit.Sign(&segment)
	if err := t.putSegment(ctx, &segment); err != nil {
		return err
	}
	what, err := json.Marshal(map[string]any{"events": count, "link": segment.Head})
	if err != nil {
		return err
	}
	return t.Audit(ctx, admin.Event{At: time.Now(), Actor: "keyward", Action: "audit.begin", After: what})
}

// Replay implements admin.Reader.
func (r *reader) Replay(ctx context.Context, id admin.ReplayID, now time.Time) ([]byte, error) {
	var sealed []byte
	found, err := r.one(ctx, "find a kept answer", `SELECT sealed FROM idempotency WHERE id = ? AND expires_at > ?`, []any{id[:], micros(now)}, &sealed)
	if err == nil && !found {
		err = notFound("kept answer")
	}
	return sealed, err
}

// KeepReplay implements admin.Tx.
func (t *tx) KeepReplay(ctx context.Context, id admin.ReplayID, sealed []byte, now, until time.Time) error {
	if _, err := t.exec(ctx, "keep an answer", `DELETE FROM idempotency WHERE id = ? AND expires_at <= ?`, id[:], micros(now)); err != nil {
		return err
	}
	return t.execOne(ctx, "keep an answer", `INSERT INTO idempotency (id, sealed, expires_at) VALUES (?, ?, ?)`, id[:], sealed, micros(until))
}

// ForgetReplays implements admin.Store.
func (s *Store) ForgetReplays(ctx context.Context, now time.Time) error {
	return s.write(ctx, "forget kept answers", func(t *tx) error {
		_, err := t.exec(ctx, "forget kept answers", `DELETE FROM idempotency WHERE expires_at <= ?`, micros(now))
		return err
	})
}

// TouchTokens implements admin.Store.
func (s *Store) TouchTokens(ctx context.Context, uses []admin.TokenUse) error {
	return s.write(ctx, "record uses of tokens", func(t *tx) error {
		for _, use := range uses {
			at := micros(use.At)
			if _, err := t.exec(ctx, "record use", `UPDATE tokens SET last_used_at = ?1 WHERE id = ?2 AND last_used_at < ?1`, at, use.ID[:]); err != nil {
				return err
			}
		}
		return nil
	})
}
