package manage

import (
	"context"
	"crypto/hmac"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// EventParams are the parameters of a list of audit events. huma looks into an embedded struct only if its name is
// exported.
type EventParams struct {
	Actor       string `query:"actor" doc:"Exactly, e.g. token:0192f0c1-…"`
	Action      string `query:"action" doc:"Exactly, e.g. key.create"`
	Target      string `query:"target" doc:"Id of what was changed, or was to be."`
	Outcome     string `query:"outcome" enum:"done,refused"`
	From        string `query:"from" doc:"RFC 3339 with a zone; inclusive."`
	To          string `query:"to" doc:"RFC 3339 with a zone; inclusive."`
	MaxPageSize number `query:"maxpagesize" doc:"Events on a page; more than 1000 counts as 1000. By default 100."`
	Cursor      string `query:"cursor" doc:"From nextLink."`
}

type (
	eventList struct {
		InstanceID string `path:"instanceId"`
		EventParams
	}
	chainPart struct {
		After       wholeNumber `query:"after" doc:"Begin after the event with this sequence number; absent: with the first."`
		MaxPageSize number      `query:"maxpagesize" doc:"Events on a page; more than 1000 counts as 1000. By default 100."`
	}
	auditVerification struct {
		Sequence wholeNumber `query:"sequence" doc:"Of a head that was exported earlier."`
		Link     string      `query:"link" doc:"Of the same head."`
	}
)

func (h *handler) listEvents(ctx context.Context, c *call, in *eventList) (*out[list[admin.EventRecord]], error) {
	// The cursor holds for the instance, however its id is spelled.
	id, err := apikey.CanonicalInstanceID(in.InstanceID)
	if err != nil {
		return nil, apikey.ErrNotFound
	}
	return h.events(ctx, c, id, &in.EventParams)
}

func (h *handler) listAllEvents(ctx context.Context, c *call, in *EventParams) (*out[list[admin.EventRecord]], error) {
	return h.events(ctx, c, "", in)
}

// events lists the events of an instance, those of all if that is "".
func (h *handler) events(ctx context.Context, c *call, instanceID string, in *EventParams) (*out[list[admin.EventRecord]], error) {
	size, err := pageSizeOf(in.MaxPageSize)
	if err != nil {
		return nil, err
	}
	filter := admin.EventFilter{Actor: in.Actor, Action: in.Action, Target: in.Target, InstanceID: instanceID, Outcome: admin.Outcome(in.Outcome)}
	switch filter.Outcome {
	case "", admin.OutcomeDone, admin.OutcomeRefused:
	default:
		return nil, apikey.Invalid("outcome", "must be done or refused")
	}
	for _, bound := range []struct {
		name, text string
		into       *time.Time
	}{{"from", in.From, &filter.From}, {"to", in.To, &filter.To}} {
		if bound.text == "" {
			continue
		}
		if *bound.into, err = time.Parse(time.RFC3339, bound.text); err != nil {
			return nil, apikey.Invalid(bound.name, "must be RFC 3339 with a zone, such as 2026-01-31T12:00:00Z")
		}
	}
	var after admin.EventPlace
	if c.r.URL.Query().Has("cursor") {
		if after, err = h.cursors.decodeEvent(instanceID, in.Cursor); err != nil {
			return nil, err
		}
	}
	events, err := h.svc.AuditEvents(ctx, c.Caller, filter, after, size+1) // one more tells whether this is the last page
	if err != nil {
		return nil, err
	}
	next := ""
	if len(events) > size {
		events = events[:size]
		last := events[size-1]
		next = nextLink(c.r, h.cursors.encodeEvent(instanceID, admin.EventPlace{At: last.At, Sequence: last.Sequence}))
	}
	page := listOf(events, admin.EventRecordOf)
	page.NextLink = next
	return ok(page), nil
}

// pageSizeOf reads a maxpagesize.
func pageSizeOf(n number) (int, error) {
	if n == "" {
		return usualPage, nil
	}
	size, err := strconv.ParseUint(string(n), 10, 31)
	if err != nil || size == 0 {
		return 0, apikey.Invalid("maxpagesize", "must be a number from 1")
	}
	return min(int(size), maxPage), nil
}

// Shape: base64url of At in µs (8 bytes) ‖ sequence (8) ‖ HMAC-SHA-256 (16). A place of 16 bytes is of an
// event, one of 24 of a key: neither list takes the other's cursor.
const eventPlaceLen = 8 + 8

func (c cursors) encodeEvent(instanceID string, p admin.EventPlace) string {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, eventPlaceLen+cursorMACLen), uint64(p.At.UnixMicro()))
	b = binary.BigEndian.AppendUint64(b, uint64(p.Sequence))
	return base64.RawURLEncoding.EncodeToString(append(b, c.mac("audit of "+instanceID, b)...))
}

func (c cursors) decodeEvent(instanceID, s string) (admin.EventPlace, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != eventPlaceLen+cursorMACLen || !hmac.Equal(b[eventPlaceLen:], c.mac("audit of "+instanceID, b[:eventPlaceLen])) {
		return admin.EventPlace{}, apikey.Invalid("cursor", "is not one that this list gave: begin again without it")
	}
	return admin.EventPlace{
		At:       time.UnixMicro(int64(binary.BigEndian.Uint64(b))).UTC(),
		Sequence: int64(binary.BigEndian.Uint64(b[8:])),
	}, nil
}

func (h *handler) auditChain(ctx context.Context, c *call, in *chainPart) (*out[list[admin.EventRecord]], error) {
	size, err := pageSizeOf(in.MaxPageSize)
	if err != nil {
		return nil, err
	}
	after, err := in.After.value("after")
	if err != nil {
		return nil, err
	}
	events, err := h.svc.AuditChain(ctx, c.Caller, after, size+1)
	if err != nil {
		return nil, err
	}
	next := ""
	if len(events) > size {
		events = events[:size]
		next = nextLinkWith(c.r, "after", strconv.FormatInt(events[size-1].Sequence, 10))
	}
	page := listOf(events, admin.EventRecordOf)
	page.NextLink = next
	return ok(page), nil
}

func (h *handler) auditHead(ctx context.Context, c *call, _ *noInput) (*out[admin.AuditHead], error) {
	head, err := h.svc.AuditHead(ctx, c.Caller)
	if err != nil {
		return nil, err
	}
	return ok(head), nil
}

func (h *handler) auditVerify(ctx context.Context, c *call, in *auditVerification) (*out[admin.AuditReport], error) {
	var heads []admin.AuditHead
	if in.Sequence != "" || in.Link != "" {
		var head admin.AuditHead
		var err error
		if head.Sequence, err = in.Sequence.value("sequence"); err != nil {
			return nil, err
		}
		if err := head.Link.UnmarshalText([]byte(in.Link)); err != nil {
			return nil, apikey.Invalid("link", err.Error())
		}
		heads = append(heads, head)
	}
	defer c.unhurried()()
	report, err := h.svc.AuditVerify(ctx, c.Caller, heads...)
	if err != nil {
		return nil, err
	}
	return ok(report), nil
}

// AuditEvents lists audit events, newest first, page by page as they are asked for. An error ends it.
// Without an instance in the filter they are those of all.
func (c *Client) AuditEvents(ctx context.Context, filter admin.EventFilter) iter.Seq2[admin.EventRecord, error] {
	path := "/auditEvents"
	if filter.InstanceID != "" {
		path = instancePath(filter.InstanceID, "auditEvents")
	}
	query := url.Values{"maxpagesize": {strconv.Itoa(pageSize)}}
	for name, value := range map[string]string{
		"actor": filter.Actor, "action": filter.Action, "target": filter.Target, "outcome": string(filter.Outcome),
		"from": queryTime(filter.From), "to": queryTime(filter.To),
	} {
		if value != "" {
			query.Set(name, value)
		}
	}
	return eventPages(ctx, c, path, query, "cursor")
}

// AuditChain lists the audit events of all instances in the order of the chain.
func (c *Client) AuditChain(ctx context.Context) iter.Seq2[admin.EventRecord, error] {
	return eventPages(ctx, c, "/audit/chain", url.Values{"maxpagesize": {strconv.Itoa(maxPage)}}, "after")
}

func eventPages(ctx context.Context, c *Client, path string, query url.Values, place string) iter.Seq2[admin.EventRecord, error] {
	return func(yield func(admin.EventRecord, error) bool) {
		for {
			page, err := send[list[admin.EventRecord]](ctx, c, http.MethodGet, path, query, nil)
			if err != nil {
				yield(admin.EventRecord{}, err)
				return
			}
			for _, e := range page.Value {
				if !yield(e, nil) {
					return
				}
			}
			if page.NextLink == "" {
				return
			}
			// Only the place is taken from the link: the token goes to no other server.
			next, err := url.Parse(page.NextLink)
			if err != nil || next.Query().Get(place) == "" {
				yield(admin.EventRecord{}, fmt.Errorf("list audit events: the server's nextLink has no %s", place))
				return
			}
			query.Set(place, next.Query().Get(place))
		}
	}
}

func queryTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// AuditHead returns the end of the chain.
func (c *Client) AuditHead(ctx context.Context) (admin.AuditHead, error) {
	return send[admin.AuditHead](ctx, c, http.MethodGet, "/audit/head", nil, nil)
}

// AuditVerify has the server follow the whole chain, and compare it with a head from earlier unless nil.
func (c *Client) AuditVerify(ctx context.Context, head *admin.AuditHead) (admin.AuditReport, error) {
	var query url.Values
	if head != nil {
		query = url.Values{"sequence": {strconv.FormatInt(head.Sequence, 10)}, "link": {head.Link.String()}}
	}
	return send[admin.AuditReport](ctx, c, http.MethodGet, "/audit/verify", query, nil)
}
