package portal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// auditPages registers the audit: who did what, and whether it is still as it was written.
func (p *portal) auditPages() {
	p.page("Audit", "GET /instances/{instance}/audit", p.auditEvents)
	p.page("Audit", "POST /instances/{instance}/audit/verify", p.verifyAudit)
}

const auditPage = 50 // events on a page

// An auditView is a page of events.
type auditView struct {
	Filter   fieldList
	Faults   []fault
	Events   []auditEvent
	Older    string // address of the next page; "": there is none
	First    string // address of the first one; "": this is it
	All      bool   // of all instances
	MayAll   bool   // the caller is of all instances, and may look at the chain
	Filtered bool
}

// An auditEvent is an event as the page shows it.
type auditEvent struct {
	admin.EventRecord
	Done    bool
	Details string // before and after, as JSON to read
}

func (p *portal) auditEvents(w http.ResponseWriter, v *visit) error {
	if err := v.ParseForm(); err != nil {
		return errForm
	}
	form := func(name string) string { return strings.TrimSpace(v.Form.Get(name)) }
	filter := admin.EventFilter{
		InstanceID: v.Instance, Action: form("action"), Actor: form("actor"), Target: form("target"), Outcome: admin.Outcome(form("outcome")),
	}
	all := form("all") != "" && v.Caller.InstanceID == ""
	if all {
		filter.InstanceID = ""
	}
	data := auditView{All: all, MayAll: v.Caller.InstanceID == "", Filter: fieldList{
		{Name: "action", Label: "Action", Kind: "text", Value: filter.Action, Max: 64, Help: "Such as key.create."},
		{Name: "actor", Label: "By", Kind: "text", Value: filter.Actor, Help: "token: or oidc: and its id."},
		{Name: "target", Label: "Of", Kind: "text", Value: filter.Target, Help: "The id of a key, a quota's name, …"},
		{Name: "outcome", Label: "Outcome", Kind: "choice", Value: string(filter.Outcome), Choices: []choice{
			{"", "any"}, {string(admin.OutcomeDone), "done"}, {string(admin.OutcomeRefused), "refused"},
		}},
		{Name: "from", Label: "From", Kind: "date", Value: form("from")},
		{Name: "to", Label: "To", Kind: "date", Value: form("to")},
	}}
	faults := map[string]string{}
	for _, bound := range []struct {
		name string
		to   *time.Time
		end  time.Duration
	}{{"from", &filter.From, 0}, {"to", &filter.To, 24*time.Hour - time.Microsecond}} {
		text := form(bound.name)
		if text == "" {
			continue
		}
		day, err := time.Parse(time.DateOnly, text)
		if err != nil {
			faults[bound.name] = "must be a date such as 2026-01-31"
			continue
		}
		*bound.to = day.Add(bound.end)
	}
	if filter.Outcome != "" && filter.Outcome != admin.OutcomeDone && filter.Outcome != admin.OutcomeRefused {
		faults["outcome"] = "must be done or refused"
	}
	after, err := parsePlace(form("after"))
	if err != nil {
		return apikey.ErrNotFound
	}
	query := url.Values{}
	for _, f := range data.Filter {
		if f.Value != "" {
			query.Set(f.Name, f.Value)
			data.Filtered = true
		}
	}
	if all {
		query.Set("all", "on")
	}
	address := func(after string) string {
		if after != "" {
			query.Set("after", after)
			defer query.Del("after")
		}
		return v.Path("audit") + "?" + query.Encode()
	}
	if len(faults) > 0 {
		data.Faults = data.Filter.blame(faults, "")
		return p.showAs(w, v, http.StatusBadRequest, "audit", "Audit", data)
	}
	events, err := p.svc.AuditEvents(v.Context(), v.Caller, filter, after, auditPage+1)
	if err != nil {
		return err
	}
	if len(events) > auditPage {
		events = events[:auditPage]
		last := events[auditPage-1]
		data.Older = address(fmt.Sprintf("%d.%d", last.At.UnixMicro(), last.Sequence))
	}
	if after != (admin.EventPlace{}) {
		data.First = address("")
	}
	for _, e := range events {
		data.Events = append(data.Events, auditEventOf(e))
	}
	return p.show(w, v, "audit", "Audit", data)
}

func auditEventOf(e admin.Event) auditEvent {
	one := auditEvent{EventRecord: admin.EventRecordOf(e), Done: e.Outcome() == admin.OutcomeDone}
	var b bytes.Buffer
	for _, side := range []struct {
		name string
		json.RawMessage
	}{{"Before", e.Before}, {"After", e.After}} {
		if len(side.RawMessage) > 0 {
			b.WriteString(side.name + "\n")
			if json.Indent(&b, side.RawMessage, "", "  ") != nil {
				b.Write(side.RawMessage)
			}
			b.WriteByte('\n')
		}
	}
	one.Details = strings.TrimSpace(b.String())
	return one
}

// parsePlace reads what an address says of where a page begins.
func parsePlace(s string) (admin.EventPlace, error) {
	if s == "" {
		return admin.EventPlace{}, nil
	}
	at, sequence, _ := strings.Cut(s, ".")
	micro, err := strconv.ParseInt(at, 10, 64)
	if err != nil {
		return admin.EventPlace{}, err
	}
	n, err := strconv.ParseInt(sequence, 10, 64)
	return admin.EventPlace{At: time.UnixMicro(micro).UTC(), Sequence: n}, err
}

// verifyAudit follows the chain of all events and shows what was found.
func (p *portal) verifyAudit(w http.ResponseWriter, v *visit) error {
	report, err := p.svc.AuditVerify(v.Context(), v.Caller)
	if err != nil {
		return err
	}
	return p.show(w, v, "auditverify", "Verify the audit", report)
}
