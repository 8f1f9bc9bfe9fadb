package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"keyward/authz/apikey"
)

// An EventRecord is an audit event as people read it.
type EventRecord struct {
	Sequence   int64           `json:"sequence" doc:"Grows by one with every event."`
	At         time.Time       `json:"at"`
	Actor      string          `json:"actor,omitempty" doc:"token:{id}, oidc:{issuer}#{subject}, or a process. Absent: nobody who could say who it was."`
	RemoteAddr string          `json:"remoteAddr,omitempty" doc:"Absent for the process itself."`
	Action     string          `json:"action" example:"key.create"`
	Outcome    Outcome         `json:"outcome" enum:"done,refused"`
	Refused    string          `json:"refused,omitempty" doc:"The code of the error where it was refused." example:"Forbidden"`
	InstanceID string          `json:"instanceId,omitempty"`
	Target     string          `json:"target,omitempty" doc:"Id of what was changed, or was to be."`
	RequestID  string          `json:"requestId,omitempty"`
	Before     json.RawMessage `json:"before,omitempty"`
	After      json.RawMessage `json:"after,omitempty"`
	Link       Link            `json:"link" doc:"SHA-256 over the event and the link of the one before, in hexadecimal digits."`
}

// EventRecordOf returns e as people read it.
func EventRecordOf(e Event) EventRecord {
	return EventRecord{
		Sequence: e.Sequence, At: e.At.UTC(), Actor: e.Actor, RemoteAddr: e.RemoteAddr, Action: e.Action, Outcome: e.Outcome(), Refused: e.Refused,
		InstanceID: e.InstanceID, Target: e.Target, RequestID: e.RequestID, Before: e.Before, After: e.After, Link: e.Link,
	}
}

// Event returns the event that a record shows, as its link was made of.
func (r *EventRecord) Event() Event {
	return Event{
		Sequence: r.Sequence, At: r.At, Actor: r.Actor, RemoteAddr: r.RemoteAddr, Action: r.Action, Refused: r.Refused,
		InstanceID: r.InstanceID, Target: r.Target, RequestID: r.RequestID, Before: r.Before, After: r.After, Link: r.Link,
	}
}

// AuditEvents lists the audit events that a filter lets through, newest first, at most limit, from the
// place after which to begin. Without an instance in the filter it is about all of them. A caller of one
// instance sees those since that instance was made.
func (s *Service) AuditEvents(ctx context.Context, caller Caller, filter EventFilter, after EventPlace, limit int) ([]Event, error) {
	var err error
	if filter.InstanceID == "" {
		err = caller.mayAll(readAudit)
	} else {
		filter.InstanceID, err = caller.mayIn(filter.InstanceID, readAudit)
	}
	if err != nil {
		return nil, err
	}
	if caller.InstanceID != "" {
		// Another tenant may have had the id before: what was its is not the caller's to see.
		switch in, err := s.store.Instance(ctx, filter.InstanceID); {
		case err == nil && filter.From.Before(in.CreatedAt):
			filter.From = in.CreatedAt
		case err != nil && !isNotFound(err):
			return nil, err
		}
	}
	events, err := s.store.FindEvents(ctx, filter, after, limit)
	if err != nil || len(events) > 0 || filter.InstanceID == "" {
		return events, err
	}
	// To tell no events from no instance. One that was deleted has events.
	if _, err := s.store.Instance(ctx, filter.InstanceID); err != nil {
		if !isNotFound(err) {
			return nil, err
		}
		former, err := s.store.FindEvents(ctx, EventFilter{InstanceID: filter.InstanceID}, EventPlace{}, 1)
		if err != nil {
			return nil, err
		}
		if len(former) == 0 {
			return nil, apikey.ErrNotFound
		}
	}
	return nil, nil
}

// AuditChain lists audit events of all instances in the order of the chain, at most limit, after the one
// with the given sequence number: what has to be exported so that the chain can be followed elsewhere.
func (s *Service) AuditChain(ctx context.Context, caller Caller, after int64, limit int) ([]Event, error) {
	if err := caller.mayAll(readAudit); err != nil {
		return nil, err
	}
	return s.store.Events(ctx, after, limit)
}

// AuditHead returns the end of the chain, to be kept where whoever can write the store cannot.
func (s *Service) AuditHead(ctx context.Context, caller Caller) (AuditHead, error) {
	if err := caller.mayAll(readAudit); err != nil {
		return AuditHead{}, err
	}
	segments, err := s.store.AuditSegments(ctx)
	if err != nil {
		return AuditHead{}, err
	}
	head := AuditHead{At: now()}
	if len(segments) > 0 {
		last := segments[len(segments)-1]
		head.Sequence, head.Link = last.Last, last.Head
	}
	return head, nil
}

// AuditVerify follows the whole chain, and compares it with heads from earlier. One call at a time.
// Errors: apikey.ErrConflict while another runs, or old events are removed.
func (s *Service) AuditVerify(ctx context.Context, caller Caller, heads ...AuditHead) (AuditReport, error) {
	if err := caller.mayAll(readAudit); err != nil {
		return AuditReport{}, err
	}
	if !s.verifies.TryLock() {
		return AuditReport{}, fmt.Errorf("the audit is being verified already, or old events are being removed: try again: %w", apikey.ErrConflict)
	}
	defer s.verifies.Unlock()
	report, err := VerifyAudit(ctx, s.store, s.audit, heads...)
	if err == nil && !report.Whole {
		first := report.Findings[0]
		s.log.Error("the audit is not as it was written", slog.Int("findings", len(report.Findings)), slog.Int64("segment", first.Segment),
			slog.Int64("sequence", first.Sequence), slog.String("first", first.Problem))
	}
	return report, err
}

// pruneAudit removes the events of the oldest sealed segment that ended longer ago than they are to be kept;
// more says that there was one. Only what is whole is removed: what is not is evidence.
func (s *Service) pruneAudit(ctx context.Context) (more bool, err error) {
	if s.cfg.AuditKeep == 0 {
		return false, nil
	}
	segments, err := s.store.AuditSegments(ctx)
	if err != nil {
		return false, err
	}
	if !s.verifies.TryLock() { // it would miss what is removed behind its back, and call that tampering
		return false, nil // the next hour comes
	}
	defer s.verifies.Unlock()
	limit := now().Add(-s.cfg.AuditKeep)
	i := slices.IndexFunc(segments, func(segment AuditSegment) bool { return segment.RemovedAt.IsZero() })
	if i < 0 || segments[i].SealedAt.IsZero() || segments[i].SealedAt.After(limit) {
		return false, nil
	}
	segment := segments[i]
	var before AuditSegment
	if i > 0 {
		before = segments[i-1]
	}
	v := &verifier{ctx: ctx, reader: s.store, keys: s.audit, at: segment.First - 1}
	v.segment(&before, &segment, false)
	if err := v.events(&segment); err != nil {
		return false, err
	}
	if len(v.report.Findings) > 0 {
		return false, fmt.Errorf("audit segment %d is not as it was written, and is kept: look with keyward audit verify: %s",
			segment.Number, v.report.Findings[0].Problem)
	}
	_, err = s.update(ctx, func(ctx context.Context, tx Tx) error {
		if err := tx.RemoveAuditSegment(ctx, segment.Number, now()); err != nil {
			return err
		}
		return sweeper.audit(ctx, tx, removeAudit, "", fmt.Sprintf("segment %d", segment.Number), map[string]any{
			"first": segment.First, "last": segment.Last, "sealedAt": segment.SealedAt, "link": segment.Head,
		}, nil)
	})
	if err != nil {
		return false, fmt.Errorf("audit segment %d: %w", segment.Number, err)
	}
	return true, nil
}

// Refused writes down that a caller was refused: code is that of the error it was answered, target the id
// of what it was about. What a caller may see and does not exist is no refusal, unless it was to be changed.
//
// The first attempts of a caller in a minute are events of their own, on disk before the answer. Beyond
// them, and for the same attempt again, the minute has one event that counts them: a caller must not be
// able to fill the disk.
func (s *Service) Refused(ctx context.Context, caller Caller, target, code string) {
	a := caller.Attempt
	if a == nil || a.Action == "" || strings.HasSuffix(a.Action, ".read") && code != "Forbidden" && !a.Foreign {
		return
	}
	one := refusal{actor: caller.Name, remoteAddr: caller.RemoteAddr, action: a.Action, code: code, instanceID: a.InstanceID, target: target}
	if a.Foreign { // it belongs to whose the caller is, and tells the other tenant nothing
		one.instanceID, one.target = caller.InstanceID, strings.Trim(a.InstanceID+"/"+target, "/")
	}
	// Both came from the caller. What looks like an id may be a secret in the wrong place.
	for _, text := range []*string{&one.instanceID, &one.target} {
		if noSecret(s.cfg.Format, "", *text) != nil {
			*text = ""
		}
	}
	if !s.refusals.first(one) {
		return
	}
	e := one.event(now(), 0)
	e.RequestID = caller.RequestID
	_, err := s.write(ctx, func(ctx context.Context, tx Tx) error { return tx.Audit(ctx, e) })
	if err != nil {
		s.log.Error("a refused attempt is missing from the audit", slog.String("actor", e.Actor), slog.String("action", e.Action),
			slog.String("request_id", e.RequestID), slog.Any("error", err))
	}
}

// Unauthenticated counts a request by nobody who could say who it was. The audit has one event for each
// address and minute, for an IPv6 network of /64 and for all that come to be too many.
func (s *Service) Unauthenticated(remoteAddr string) {
	s.refusals.count(refusal{remoteAddr: network(remoteAddr), action: authenticate, code: "Unauthorized"})
}

// writeRefusals writes what was counted.
func (s *Service) writeRefusals(ctx context.Context) error {
	counted := s.refusals.take()
	if len(counted) == 0 {
		return nil
	}
	at := now()
	_, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		for one, n := range counted {
			if err := tx.Audit(ctx, one.event(at, n)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		s.refusals.giveBack(counted)
		return fmt.Errorf("write refused attempts to the audit: %w", err)
	}
	return nil
}

const (
	usesEvery     = 20 * time.Second // well below the minute by which a last use may be late
	refusalsEvery = time.Minute
)

// Run writes what this process writes in batches until ctx is done, and then once more.
func (s *Service) Run(ctx context.Context) error {
	do := func(ctx context.Context, what string, fn func(context.Context) error) {
		ctx, cancel := context.WithTimeout(ctx, updateTimeout)
		defer cancel()
		if err := fn(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn(what, slog.Any("error", err))
		}
	}
	uses, minute := time.NewTicker(usesEvery), time.NewTicker(refusalsEvery)
	defer uses.Stop()
	defer minute.Stop()
	for {
		select {
		case <-ctx.Done():
			last := context.WithoutCancel(ctx)
			do(last, "last uses of management tokens are lost", s.writeUses)
			do(last, "counted refusals are lost", s.writeRefusals)
			return nil
		case <-uses.C:
			do(ctx, "last uses of management tokens could not be written; they are tried again", s.writeUses)
		case <-minute.C:
			do(ctx, "counted refusals could not be written; they are tried again", s.writeRefusals)
		}
	}
}
