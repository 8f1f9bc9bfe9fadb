package admin

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// leaks are the reports of leaked secrets that wait for their turn.
type leaks struct {
	queue   chan leak
	sources *Sources
}

// A leak is one report. It holds digests: the secret itself is forgotten when the report is accepted.
type leak struct {
	digests   []apikey.Digest
	from      string
	requestID string
}

const (
	leakQueue = 1024
	leakPause = time.Second // before a store that does not answer is asked again
	leakTries = 30          // before other reports have their turn
)

// leakRate is how often one address may report.
var leakRate = limits.Rate{Interval: time.Minute, Burst: 30}

func newLeaks() leaks {
	return leaks{queue: make(chan leak, leakQueue), sources: NewSources(leakRate)}
}

// ReportLeaked takes the report that a secret has leaked. Whoever has the secret may say so: it is its own
// proof, and there is no other. The answer comes before the store is asked, so it tells nobody whether the
// secret is a key's. What becomes of the key, [Service.RunLeakReports] does.
//
// from is where the report came from.
// Errors: *apikey.InvalidError for what cannot be a key, at no cost; *RateError for too many reports from
// one address (of IPv6: one /64); *apikey.BusyError while too many wait.
func (s *Service) ReportLeaked(secret apikey.Secret, from netip.Addr, requestID string) error {
	sent := secret.Reveal()
	kind, err := s.cfg.Format.Check(sent)
	if err != nil || kind == apikey.KindManagement {
		return apikey.Invalid("secret", "is not an API key: its prefix, length or checksum is wrong")
	}
	if wait := s.leaks.sources.Take(from); wait > 0 {
		return &RateError{What: "reports came from one address", Limit: int(leakRate.Burst), Per: time.Duration(leakRate.Burst) * leakRate.Interval, RetryAfter: max(wait, time.Second)}
	}
	l := leak{digests: []apikey.Digest{s.cfg.Peppers.Current.DigestOf(kind, sent)}, from: from.String(), requestID: requestID}
	if s.cfg.Peppers.Previous != nil {
		l.digests = append(l.digests, s.cfg.Peppers.Previous.DigestOf(kind, sent))
	}
	select {
	case s.leaks.queue <- l:
		return nil
	default:
		return &apikey.BusyError{What: "too many reports of leaked keys wait", RetryAfter: time.Second}
	}
}

// RunLeakReports does what reports of leaked secrets ask for until ctx is done, and then what still waits.
func (s *Service) RunLeakReports(ctx context.Context) error {
	var unfinished []leak
	for ctx.Err() == nil {
		select {
		case l := <-s.leaks.queue:
			if !s.leaked(ctx, l) {
				unfinished = append(unfinished, l)
			}
		case <-ctx.Done():
		}
	}
	// They were accepted, so they are tried once more, for as long as an end may take.
	rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), updateTimeout)
	defer cancel()
	for {
		for _, l := range unfinished {
			if !s.leaked(rest, l) {
				s.log.Error("a report of a leaked key is lost: the store does not answer, and the process ends", slog.String("from", l.from))
			}
		}
		select {
		case l := <-s.leaks.queue:
			unfinished = []leak{l}
		default:
			return nil
		}
	}
}

// leaked acts on one report. While the store is away it tries on; false if ctx ended before. A report that fails
// by itself (a record that cannot be read, say) goes to the end of the queue, and does not hold up the others.
func (s *Service) leaked(ctx context.Context, l leak) bool {
	for tries := 1; ; tries++ {
		err := s.endLeaked(ctx, l)
		if err == nil || isNotFound(err) || errors.Is(err, errNothing) {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		s.log.Warn("cannot act on the report of a leaked key yet", slog.String("from", l.from), slog.Any("error", err))
		if tries >= leakTries && len(s.leaks.queue) > 0 {
			select {
			case s.leaks.queue <- l:
				return true // it comes again
			default:
			}
		}
		select {
		case <-time.After(leakPause):
		case <-ctx.Done():
		}
	}
}

// endLeaked does what the policy says about the secret with one of the digests.
// Errors: apikey.ErrNotFound if it is nobody's, errNothing if it was done before.
func (s *Service) endLeaked(ctx context.Context, l leak) error {
	// Looked for outside first: what nobody knows must not cost a turn of the one writer.
	var digest apikey.Digest
	for _, digest = range l.digests {
		if _, _, err := s.store.FindKey(ctx, digest); err == nil {
			break
		} else if !isNotFound(err) || digest == l.digests[len(l.digests)-1] {
			return err
		}
	}
	var done slog.Attr // what the report did
	caller := Caller{Name: "leak report", RemoteAddr: l.from, RequestID: l.requestID}
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		old, _, err := tx.FindKey(ctx, digest)
		if err != nil {
			return err
		}
		in, err := tx.Instance(ctx, old.InstanceID)
		if err != nil {
			return err
		}
		number := old.Generation
		old.Digest, old.Generation = apikey.Digest{}, 0
		at, k := now(), *old
		k.Generations = slices.Clone(old.Generations)
		i := slices.IndexFunc(k.Generations, func(g apikey.Generation) bool { return g.Number == number })
		flags := in.Policy.InForce().OnLeak.Of(k.Type) == apikey.LeakFlags
		// A report from before a secret was made is about another one.
		known := !k.LeakReportedAt.Before(k.Generations[i].CreatedAt)
		if !k.RevokedAt.IsZero() || flags && known || k.Generations[i].Revoked {
			return errNothing
		}
		if !known {
			k.LeakReportedAt = at
		}
		if !flags {
			if err := endGeneration(ctx, tx, &k, i, at); err != nil {
				return err
			}
			if len(validGenerations(&k, at)) == 0 {
				k.RevokedAt, k.RevokedReason = at, apikey.RevokedKeyCompromise
			}
		}
		if err := tx.UpdateKey(ctx, &k); err != nil {
			return err
		}
		action, outcome := "its secret is ended", LeakEndedSecret
		switch {
		case flags:
			action, outcome = "it goes on, as the policy says (onLeak): rotate it", LeakFlagged
		case !k.RevokedAt.IsZero():
			action, outcome = "it is revoked", LeakRevokedKey
		}
		if s.cfg.Webhook != nil {
			n, err := NoticeBody{Type: NoticeLeaked, Leak: &NoticeLeak{number, outcome}}.notice(&k)
			if err != nil {
				return err
			}
			if err := tx.QueueNotice(ctx, n); err != nil {
				return err
			}
		}
		done = slog.Group("", slog.String("instance", k.InstanceID), slog.String("key_id", k.ID.String()), slog.Int("generation", number), slog.String("done", action))
		return caller.audit(ctx, tx, leakKey, k.InstanceID, k.ID.String(), auditOf(old), auditOf(&k))
	})
	if err == nil {
		s.log.Warn("a key was reported as leaked", done, slog.String("from", l.from), slog.String("request_id", l.requestID))
		s.propagate(ctx, rev, createWait)
	}
	return err
}
