package portal

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A keyView is the page of one key.
type keyView struct {
	Key      admin.KeyRecord
	Owner    string
	Badges   []badge
	Advice   admin.Advice
	Metadata []pair
	NoScopes bool // it has no right at all, which is not the same as every one

	Usage   usageView
	Limits  []limitRow
	Counted string // the replica that counts
	NoLimit string // why nothing is known of what remains

	Running     []admin.RunningRequest
	SeesRunning bool

	Generations []generationRow
	Events      []eventRow
	SeesAudit   bool

	// What the caller may do with the key as it is.
	Rotates, Edits, Disables, Enables, Revokes bool
}

type pair struct{ Name, Value string }

// A generationRow is one secret of a key.
type generationRow struct {
	admin.GenerationRecord
	Ended   bool
	Newest  bool
	Allowed int64 // requests in the time that the page shows
	CanEnd  bool
}

// A limitRow is where a limit stands.
type limitRow struct {
	admin.KeyLimit
	Name, Most, Remaining string
}

// An eventRow is an audit event of the key.
type eventRow struct {
	At             time.Time
	Action, Actor  string
	Refused        string
	RemoteAddr, ID string
}

// A usageView is what was counted of a key in a time.
type usageView struct {
	Range    string
	Ranges   []choice
	Interval string
	Rows     []usageRow
	Allowed  int64
	Refused  int64
	Reasons  []counted
	Networks []counted
	Text     string // all of it in a sentence
	Ended    *endedView
}

type usageRow struct {
	At               time.Time
	Label            string
	Allowed, Refused int64
	Reasons          string
}

type counted struct {
	What string
	N    int64
}

// An endedView is what Envoy tells of requests that have ended.
type endedView struct {
	Count         int64
	Classes       []counted
	Request       string // bytes
	Response      string
	Mean, Longest string
}

// ranges are the times that a page shows, and the counts of each.
var ranges = map[string]struct {
	text     string
	interval admin.UsageInterval
	n        int
}{
	"1h": {"1 hour", admin.UsageMinute, 60}, "24h": {"24 hours", admin.UsageHour, 24},
	"7d": {"7 days", admin.UsageHour, 7 * 24}, "30d": {"30 days", admin.UsageDay, 30},
}

var rangeChoices = []choice{{"1h", "1 hour"}, {"24h", "24 hours"}, {"7d", "7 days"}, {"30d", "30 days"}}

const (
	usualRange  = "24h"
	maxNetworks = 20
	maxEvents   = 20
)

func (p *portal) showKey(w http.ResponseWriter, v *visit) error {
	k, err := p.keyOf(v)
	if err != nil {
		return err
	}
	ctx, now := v.Context(), time.Now()
	r := admin.RecordOf(k, now)
	data := keyView{Key: r, Owner: ownerOf(&r), Badges: badgesOf(k, &r, now), Advice: admin.AdviceOn(k, now), NoScopes: k.Scopes != nil && len(k.Scopes) == 0}
	for _, name := range slices.Sorted(maps.Keys(r.Metadata)) {
		data.Metadata = append(data.Metadata, pair{name, r.Metadata[name]})
	}
	usage, generations, err := p.usageOf(v, k, now)
	if err != nil {
		return err
	}
	data.Usage = usage
	if err := p.limitsOf(v, k, &data); err != nil {
		return err
	}
	if data.SeesRunning = v.Can("inflight.read"); data.SeesRunning {
		running, err := p.svc.InFlight(ctx, v.Caller, v.Instance)
		if err != nil {
			return err
		}
		data.Running = slices.DeleteFunc(running, func(r admin.RunningRequest) bool { return r.KeyID != k.ID })
	}
	if data.SeesAudit = v.Can("audit.read"); data.SeesAudit {
		events, err := p.svc.AuditEvents(ctx, v.Caller, admin.EventFilter{InstanceID: v.Instance, Target: k.ID.String()}, admin.EventPlace{}, maxEvents)
		if err != nil {
			return err
		}
		for _, e := range events {
			data.Events = append(data.Events, eventRow{e.At, e.Action, cmp.Or(e.Actor, "nobody known"), e.Refused, e.RemoteAddr, e.RequestID})
		}
	}
	revoked, user := r.Status == "revoked", v.Caller.Role == admin.RoleUser
	data.Rotates, data.Edits, data.Revokes = !revoked && v.Can("key.rotate"), !revoked && v.Can("key.update"), !revoked && v.Can("key.revoke")
	data.Disables = data.Edits && !k.Disabled
	data.Enables = data.Edits && k.Disabled && !user // who disabled it may have had a reason
	data.Generations = generationsOf(k, &r, generations, now, data.Revokes)
	return p.show(w, v, "key", r.Name, data)
}

// generationsOf lists the secrets of a key, the newest first.
func generationsOf(k *apikey.Key, r *admin.KeyRecord, allowed map[int]int64, now time.Time, mayEnd bool) []generationRow {
	var rows []generationRow
	valid := 0
	for i, g := range r.Generations {
		row := generationRow{GenerationRecord: g, Ended: k.Generations[i].EndedAt(now), Newest: k.Newest() != nil && k.Newest().Number == g.Number, Allowed: allowed[g.Number]}
		if !row.Ended {
			valid++
		}
		rows = append(rows, row)
	}
	for i := range rows {
		rows[i].CanEnd = mayEnd && !rows[i].Ended && valid > 1
	}
	slices.SortFunc(rows, func(a, b generationRow) int { return b.Number - a.Number })
	return rows
}

func (p *portal) limitsOf(v *visit, k *apikey.Key, data *keyView) error {
	limits, err := p.svc.LimitsOfKey(v.Context(), v.Caller, v.Instance, k.ID)
	if _, none := errors.AsType[*admin.StateError](err); none || errors.Is(err, apikey.ErrUndecided) {
		data.NoLimit = "What remains is not known: no replica here decides requests, or it cannot be asked now."
		return nil
	}
	if err != nil {
		return err
	}
	data.Counted = limits.Replica
	for _, l := range limits.Limits {
		row := limitRow{KeyLimit: l, Name: limitName(&l), Most: number(l.Most), Remaining: number(l.Remaining)}
		switch {
		case l.Most == apikey.Unlimited:
			row.Most, row.Remaining = "unlimited", "unlimited"
		case l.Limit == "concurrency":
			row.Most += " at once"
		case l.Limit == "quota":
			row.Most += " per " + l.Window
		case l.Every != "":
			row.Most += " at once, then one every " + l.Every
		}
		data.Limits = append(data.Limits, row)
	}
	return nil
}

func limitName(l *admin.KeyLimit) string {
	switch l.Limit {
	case "instance":
		return "Rate of the whole instance"
	case "burst":
		return "Rate and burst"
	case "concurrency":
		return "Requests at once"
	}
	return "Quota " + l.Quota
}

// usageOf counts what a key did in the time that the address names, and how much of it by which secret.
func (p *portal) usageOf(v *visit, k *apikey.Key, now time.Time) (usageView, map[int]int64, error) {
	view := usageView{Range: v.FormValue("range"), Ranges: rangeChoices}
	shown, ok := ranges[view.Range]
	if !ok {
		view.Range, shown = usualRange, ranges[usualRange]
	}
	view.Interval = string(shown.interval)
	each := shown.interval.Duration()
	from := now.UTC().Truncate(each).Add(-time.Duration(shown.n-1) * each)
	list, err := p.svc.KeyUsage(v.Context(), v.Caller, v.Instance, k.ID, admin.UsageQuery{Interval: shown.interval, From: from, To: now})
	if err != nil {
		return view, nil, err
	}
	var sum admin.UsageCounts
	at := map[time.Time]*admin.Usage{}
	for i := range list {
		sum.Add(&list[i].UsageCounts)
		at[list[i].Start.UTC()] = &list[i]
	}
	layout := map[admin.UsageInterval]string{admin.UsageMinute: "15:04", admin.UsageHour: "2 Jan 15:04", admin.UsageDay: "2 Jan"}[shown.interval]
	for i := range shown.n {
		start := from.Add(time.Duration(i) * each)
		row := usageRow{At: start, Label: start.Format(layout)}
		if u := at[start]; u != nil {
			row.Allowed, row.Refused, row.Reasons = u.Allowed, u.Refused, reasonsText(u.Reasons)
		}
		view.Rows = append(view.Rows, row)
	}
	view.Allowed, view.Refused = sum.Allowed, sum.Refused
	view.Reasons, view.Networks = most(sum.Reasons, len(sum.Reasons)), most(sum.Networks, maxNetworks)
	view.Text = usageText(&sum, shown.text)
	view.Ended = endedOf(&sum.Ended)
	return view, sum.Generations, nil
}

func usageText(sum *admin.UsageCounts, span string) string {
	if sum.Allowed+sum.Refused == 0 {
		return "No request was counted in the last " + span + "."
	}
	s := fmt.Sprintf("%s allowed and %s refused in the last %s.", number(sum.Allowed), number(sum.Refused), span)
	if first := most(sum.Reasons, 1); len(first) > 0 {
		s += fmt.Sprintf(" Most refusals: %s (%s).", first[0].What, number(first[0].N))
	}
	return s
}

func reasonsText(reasons map[string]int64) string {
	var parts []string
	for _, r := range most(reasons, len(reasons)) {
		parts = append(parts, r.What+" "+number(r.N))
	}
	return strings.Join(parts, ", ")
}

// most returns the n highest counts, the highest first.
func most(counts map[string]int64, n int) []counted {
	var list []counted
	for what, n := range counts {
		list = append(list, counted{what, n})
	}
	slices.SortFunc(list, func(a, b counted) int { return cmp.Or(cmp.Compare(b.N, a.N), strings.Compare(a.What, b.What)) })
	return list[:min(n, len(list))]
}

// endedOf shows what Envoy told; nil where it did not.
func endedOf(e *admin.EndedRequests) *endedView {
	if e.Count == 0 {
		return nil
	}
	view := &endedView{
		Count: e.Count, Request: bytesText(e.RequestBytes), Response: bytesText(e.ResponseBytes),
		Mean: (e.Duration / time.Duration(e.Count)).Round(100 * time.Microsecond).String(), Longest: e.Longest.Round(100 * time.Microsecond).String(),
	}
	for class, n := range e.Status {
		if n > 0 {
			what := "no answer"
			if class > 0 {
				what = fmt.Sprintf("%dxx", class)
			}
			view.Classes = append(view.Classes, counted{what, n})
		}
	}
	return view
}

func bytesText(n int64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}
