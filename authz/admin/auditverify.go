package admin

import (
	"context"
	"fmt"
	"math"
	"time"
)

// An AuditHead names a place in the audit by what it proves: whoever holds one can tell later whether
// everything up to it is still there, unchanged.
type AuditHead struct {
	Sequence int64     `json:"sequence" doc:"Of the last event; 0 if there is none."`
	Link     Link      `json:"link" doc:"Of the last event, 64 hexadecimal digits."`
	At       time.Time `json:"at,omitzero" doc:"When it was asked for."`
}

// An AuditFinding is something that is wrong with the audit.
type AuditFinding struct {
	Segment  int64  `json:"segment,omitempty"`
	Sequence int64  `json:"sequence,omitempty" doc:"Of the event where it shows."`
	Problem  string `json:"problem"`
}

// An AuditReport is what a verification of the audit found.
type AuditReport struct {
	Whole    bool           `json:"whole" doc:"Nothing is wrong."`
	Events   int64          `json:"events" doc:"That were read."`
	Segments int64          `json:"segments"`
	Removed  int64          `json:"removed" doc:"Segments whose events were removed for their age."`
	Head     AuditHead      `json:"head"`
	Findings []AuditFinding `json:"findings" nullable:"false" doc:"The first 100."`
	// Unproved lists the sequence numbers of given heads whose events were removed for their age.
	Unproved []int64 `json:"unproved,omitempty" nullable:"false" doc:"Given heads whose events were removed for their age."`
}

const (
	maxFindings = 100
	verifyPage  = 500
)

// VerifyAudit follows the whole chain and reports what is wrong: an event that was changed, removed, put
// in or moved, a segment or its MAC that is not as it was left, an end that was cut off. heads are heads
// from earlier: what they prove must still be there. It reads page by page, while others may write.
// Errors: an outage only.
func VerifyAudit(ctx context.Context, r Reader, keys AuditKeys, heads ...AuditHead) (AuditReport, error) {
	v := &verifier{ctx: ctx, reader: r, keys: keys, heads: heads, at: math.MinInt64}
	v.report.Head.At = time.Now().UTC().Truncate(time.Microsecond)
	// Every change has an event, so there are no fewer events than changes. The number of changes is
	// asked for first, so that what is written meanwhile makes no difference.
	changes, err := r.Mutations(ctx)
	if err != nil {
		return AuditReport{}, err
	}
	segments, err := r.AuditSegments(ctx)
	if err != nil {
		return AuditReport{}, err
	}
	var last AuditSegment
	for i := range segments {
		s := &segments[i]
		v.segment(&last, s, i == len(segments)-1)
		if err := v.events(s); err != nil {
			return AuditReport{}, err
		}
		last = *s
	}
	if err := v.end(last, changes); err != nil {
		return AuditReport{}, err
	}
	if len(segments) == 0 {
		if err := v.nothing(); err != nil {
			return AuditReport{}, err
		}
	}
	for _, head := range v.heads {
		if head.Sequence > last.Last {
			v.find(last.Number, last.Last, "the audit ends here, but a head of event %d was exported: its end was cut off", head.Sequence)
		}
	}
	v.report.Segments = int64(len(segments))
	v.report.Head.Sequence, v.report.Head.Link = last.Last, last.Head
	v.report.Whole = len(v.report.Findings) == 0
	if v.report.Findings == nil {
		v.report.Findings = []AuditFinding{}
	}
	return v.report, nil
}

// nothing judges an audit without segments: that is one of a store without anything. Segments are never
// removed, and what the store has was put in by somebody.
func (v *verifier) nothing() error {
	peppers, err := v.reader.Peppers(v.ctx)
	if err != nil {
		return err
	}
	instances, err := v.reader.Instances(v.ctx)
	if err != nil {
		return err
	}
	tokens, err := v.reader.Tokens(v.ctx)
	if err != nil {
		return err
	}
	if len(peppers)+len(instances)+len(tokens) > 0 {
		v.find(0, 0, "the audit is empty, and the store is not: it was cut off whole")
	}
	return nil
}

// A verifier reads events in their order, a page ahead.
type verifier struct {
	ctx    context.Context //nolint:containedctx // of one call
	reader Reader
	keys   AuditKeys
	heads  []AuditHead
	page   []Event
	at     int64 // the page before ended there
	done   bool
	report AuditReport
}

func (v *verifier) find(segment, sequence int64, format string, args ...any) {
	if len(v.report.Findings) < maxFindings {
		v.report.Findings = append(v.report.Findings, AuditFinding{segment, sequence, fmt.Sprintf(format, args...)})
	}
}

// next returns the next event up to a sequence number, nil if there is none; take goes on.
func (v *verifier) next(upTo int64) (*Event, error) {
	if len(v.page) == 0 && !v.done {
		page, err := v.reader.Events(v.ctx, v.at, verifyPage)
		if err != nil {
			return nil, err
		}
		v.page, v.done = page, len(page) == 0
		if len(page) > 0 {
			v.at = page[len(page)-1].Sequence
		}
	}
	if len(v.page) == 0 || v.page[0].Sequence > upTo {
		return nil, nil
	}
	return &v.page[0], nil
}

func (v *verifier) take() {
	v.page = v.page[1:]
	v.report.Events++
}

// segment judges a segment by itself and by the one before it.
func (v *verifier) segment(before, s *AuditSegment, newest bool) {
	if s.Number != before.Number+1 {
		v.find(s.Number, 0, "segment %d is missing before it", before.Number+1)
	}
	if s.First != before.Last+1 {
		v.find(s.Number, s.First, "it begins at event %d, the one before it ends at %d", s.First, before.Last)
	}
	if s.Previous != before.Head {
		v.find(s.Number, s.First, "it does not go on from the link that the one before it ends with")
	}
	switch {
	case v.keys.peppers.Current != nil && v.keys.peppers.ByVersion(s.PepperVersion) == nil:
		v.find(s.Number, 0, "its MAC is under pepper version %d, which is not configured", s.PepperVersion)
	case !v.keys.Good(s):
		v.find(s.Number, 0, "its MAC is wrong: it was changed, or written without the pepper")
	}
	switch {
	case newest && !s.SealedAt.IsZero():
		v.find(s.Number, s.Last, "it is the newest and sealed: the open one is missing")
	case !newest && s.SealedAt.IsZero():
		v.find(s.Number, s.Last, "it was never sealed, though another one follows")
	}
}

// events follows the chain through a segment.
func (v *verifier) events(s *AuditSegment) error {
	if !s.RemovedAt.IsZero() {
		v.report.Removed++
	}
	link, expected := s.Previous, s.First
	for {
		e, err := v.next(s.Last)
		if err != nil {
			return err
		}
		if e == nil {
			break
		}
		switch {
		case e.Sequence < s.First:
			v.find(0, e.Sequence, "the event is in no segment: it was put in")
		case !s.RemovedAt.IsZero():
			v.find(s.Number, e.Sequence, "the event is there, though those of its segment were removed: it was put in")
		default:
			if e.Sequence != expected {
				v.find(s.Number, e.Sequence, "events from %d up to it are missing", expected)
			}
			if e.LinkAfter(link) != e.Link {
				v.find(s.Number, e.Sequence, "its link does not fit: the event or its place was changed")
			}
			v.proves(e.Sequence, e.Link)
			link, expected = e.Link, e.Sequence+1
		}
		v.take()
	}
	if !s.RemovedAt.IsZero() {
		v.removed(s)
		return nil
	}
	if expected != s.Last+1 {
		v.find(s.Number, expected, "events from %d to %d are missing", expected, s.Last)
	}
	if link != s.Head {
		v.find(s.Number, s.Last, "the segment ends with another link than its last event")
	}
	return nil
}

// proves compares an event with the heads that were exported at it.
func (v *verifier) proves(sequence int64, link Link) {
	for _, head := range v.heads {
		if head.Sequence == sequence && head.Link != link {
			v.find(0, sequence, "an exported head has another link here: this or an earlier event was changed since")
		}
	}
}

func (v *verifier) removed(s *AuditSegment) {
	v.proves(s.Last, s.Head)
	for _, head := range v.heads {
		if head.Sequence >= s.First && head.Sequence < s.Last {
			v.report.Unproved = append(v.report.Unproved, head.Sequence)
		}
	}
}

// end looks at what is behind the last segment.
func (v *verifier) end(last AuditSegment, changes int64) error {
	beyond, err := v.next(math.MaxInt64)
	if err != nil {
		return err
	}
	if beyond != nil { // written since, or put in?
		segments, err := v.reader.AuditSegments(v.ctx)
		if err != nil {
			return err
		}
		if len(segments) == 0 || segments[len(segments)-1].Last < beyond.Sequence {
			v.find(0, beyond.Sequence, "the event is in no segment: it was put in, or the end of the segments was cut off")
		}
	} else if last.Last < changes {
		v.find(last.Number, last.Last, "the store has had %d changes, but the audit ends at event %d: its end was cut off", changes, last.Last)
	}
	return nil
}
