package portal

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// keyPages registers the list of keys, and what is about one key.
func (p *portal) keyPages() {
	const keys, key = "/instances/{instance}/keys", "/instances/{instance}/keys/{key}"
	p.page(sectionKeys, "GET "+keys, p.listKeys)
	p.page(sectionKeys, "GET "+keys+"/new", p.newKey)
	p.page(sectionKeys, "POST "+keys+"/new", p.createKey)
	p.page(sectionKeys, "GET "+key, p.showKey)
	p.page(sectionKeys, "GET "+key+"/edit", p.editKey)
	p.page(sectionKeys, "POST "+key+"/edit", p.updateKey)
	p.page(sectionKeys, "GET "+key+"/rotate", p.askToRotate)
	p.page(sectionKeys, "POST "+key+"/rotate", p.rotateKey)
	p.page(sectionKeys, "GET "+key+"/revoke", p.askToRevoke)
	p.page(sectionKeys, "POST "+key+"/revoke", p.revokeKey)
	p.page(sectionKeys, "POST "+key+"/disable", p.switchKey(true))
	p.page(sectionKeys, "POST "+key+"/enable", p.switchKey(false))
	p.page(sectionKeys, "POST "+key+"/generations/{number}/end", p.endGeneration)
}

const (
	sectionKeys = "Keys"
	pageSize    = 50
	sparkDays   = 14
	// soon is how long before its end a key is marked.
	soon = 14 * 24 * time.Hour
)

// A keysView is the list of keys.
type keysView struct {
	Filter  keyFilter
	Faults  map[string]string
	Rows    []keyRow
	Counts  admin.KeyCounts
	Room    admin.Room // of the instance's keys, or of the caller's own
	Own     bool       // only the caller's keys are counted and listed
	Next    string     // address of the next page, also of a short or empty one; "" on the last
	First   string     // address of the first page; "" there
	Astray  bool       // the address goes on in a list that is not this one
	None    bool       // there are no keys at all
	Filters bool       // something is asked for
	Choices keyChoices
}

// A keyFilter is what the form above the list says.
type keyFilter struct {
	Name, Type, Status, Owner, Environment, Show, Order string
}

// A choice is an option of a list to choose from.
type choice struct{ Value, Text string }

type keyChoices struct{ Types, Statuses, Shows, Orders []choice }

var choicesOfKeys = keyChoices{
	Types:    []choice{{"", "Any type"}, {"instance", "Instance"}, {"agent", "Agent"}, {"user", "User"}},
	Statuses: []choice{{"", "Any status"}, {"active", "Active"}, {"disabled", "Disabled"}, {"expired", "Expired"}, {"revoked", "Revoked"}},
	Shows: []choice{
		{"", "All keys"}, {"unused30d", "Unused for 30 days"}, {"unused90d", "Unused for 90 days"}, {"never", "Never used"},
		{"expiring", "Expiring within 14 days"}, {"idling", "Ending unused within 14 days"}, {"endless", "Without an end"},
	},
	Orders: []choice{
		{"", "By the filter"}, {"createdAt desc", "Newest first"}, {"createdAt", "Oldest first"}, {"name", "Name, A to Z"}, {"name desc", "Name, Z to A"},
		{"lastUsedAt desc", "Last used first"}, {"lastUsedAt", "Longest unused first"}, {"expirationDate", "First to expire first"}, {"expirationDate desc", "Last to expire first"},
	},
}

// A keyRow is a key in the list.
type keyRow struct {
	admin.KeyRecord
	Owner  string
	URL    string
	Badges []badge
	Spark  *spark // nil: nothing was counted
}

// A badge marks what somebody should know of a key.
type badge struct {
	Text string
	Bad  bool
}

// filterOf reads the form above the list.
func filterOf(q url.Values) keyFilter {
	return keyFilter{
		Name: q.Get("name"), Type: q.Get("type"), Status: q.Get("status"), Owner: q.Get("owner"),
		Environment: q.Get("environment"), Show: q.Get("show"), Order: q.Get("order"),
	}
}

// values is the filter as an address has it, without what is not asked for.
func (f keyFilter) values() url.Values {
	q := url.Values{}
	for name, value := range map[string]string{
		"name": f.Name, "type": f.Type, "status": f.Status, "owner": f.Owner, "environment": f.Environment, "show": f.Show, "order": f.Order,
	} {
		if value != "" {
			q.Set(name, value)
		}
	}
	return q
}

// address is where the list is; after says where in it a page begins, "" at its beginning.
func (f keyFilter) address(v *visit, after string) string {
	q := f.values()
	if after != "" {
		q.Set("after", after)
	}
	if len(q) == 0 {
		return v.Path("keys")
	}
	return v.Path("keys") + "?" + q.Encode()
}

// input is the filter in the words of authz/admin. An owner of no known type is a user if it looks like one.
func (f keyFilter) input() (admin.KeyListInput, error) {
	in := admin.KeyListInput{
		Type: apikey.Type(f.Type), Status: f.Status, Environment: f.Environment, NamePrefix: f.Name, OrderBy: admin.KeyOrder(f.Order),
	}
	switch {
	case f.Type == string(apikey.TypeUser), f.Type == "" && strings.Contains(f.Owner, "@"):
		in.UserPrincipalName = f.Owner
	default:
		in.AgentName = f.Owner
	}
	switch f.Show {
	case "":
	case "unused30d", "unused90d":
		in.UnusedFor = strings.TrimPrefix(f.Show, "unused")
	case "never":
		in.NeverUsed = true
	case "expiring":
		in.ExpiresBefore = "14d"
	case "idling":
		in.IdleBefore = "14d"
	case "endless":
		in.NoExpiration = true
	default:
		return in, apikey.Invalid("show", "is not one of the choices")
	}
	return in, nil
}

func (p *portal) listKeys(w http.ResponseWriter, v *visit) error {
	ctx, now := v.Context(), time.Now()
	q := v.URL.Query()
	data := keysView{Filter: filterOf(q), Own: v.Caller.Role == admin.RoleUser, Choices: choicesOfKeys}
	data.Filters = len(data.Filter.values()) > 0
	limits, err := p.svc.KeyLimits(ctx, v.Caller, v.Instance, admin.KeyOwner{})
	if err != nil {
		return err
	}
	if data.Room = limits.Instance; data.Own && limits.Owner != nil {
		data.Room = *limits.Owner
	}
	if data.Counts, err = p.svc.CountKeys(ctx, v.Caller, v.Instance); err != nil {
		return err
	}
	data.None = data.Counts.Total == 0
	in, fault := data.Filter.input()
	query, bad := in.Query(now)
	if fault == nil {
		fault = bad
	}
	query.Limit = pageSize
	if after := q.Get("after"); after != "" && fault == nil {
		data.First = data.Filter.address(v, "")
		place, ok := p.places.Open(in.In(v.Instance), after)
		query.After, data.Astray = place, !ok
	}
	if fault != nil || data.Astray {
		var rest []error
		if data.Faults, rest = faultsOf(fault); len(rest) > 0 {
			return fault
		}
		return p.showAs(w, v, http.StatusBadRequest, "keys", "Keys", data)
	}
	// Not Keys: a filter that finds little would have it read every key that there is.
	page, err := p.svc.KeyPage(ctx, v.Caller, v.Instance, query)
	if err != nil {
		return err
	}
	if page.Next != (admin.KeyPlace{}) {
		data.Next = data.Filter.address(v, p.places.Seal(in.In(v.Instance), page.Next))
	}
	from := now.UTC().Truncate(24*time.Hour).AddDate(0, 0, 1-sparkDays)
	used, err := p.svc.KeysUsage(ctx, v.Caller, v.Instance, page.Keys, admin.UsageQuery{Interval: admin.UsageDay, From: from, To: now})
	if err != nil {
		return err
	}
	for _, k := range page.Keys {
		r := admin.RecordOf(k, now)
		data.Rows = append(data.Rows, keyRow{
			KeyRecord: r, Owner: ownerOf(&r), URL: v.Path("keys", k.ID.String()), Badges: badgesOf(k, &r, now), Spark: sparkOf(used[k.ID], from),
		})
	}
	return p.show(w, v, "keys", "Keys", data)
}

func ownerOf(r *admin.KeyRecord) string {
	if r.AgentName != "" {
		return r.AgentName
	}
	return r.UserPrincipalName
}

// badgesOf marks what somebody should know of a key.
func badgesOf(k *apikey.Key, r *admin.KeyRecord, now time.Time) []badge {
	var list []badge
	if !r.LeakReportedAt.IsZero() {
		list = append(list, badge{"reported as leaked", true})
	}
	if r.Status == "revoked" || r.Status == "expired" {
		return list
	}
	if end := r.ExpirationDate; !end.IsZero() && end.Sub(now) < soon {
		list = append(list, badge{"expires " + distance(end, now), true})
	}
	if !r.NotBefore.IsZero() && r.NotBefore.After(now) {
		list = append(list, badge{"begins " + distance(r.NotBefore, now), false})
	}
	advice := admin.AdviceOn(k, now)
	switch idle := r.IdleAfter; {
	case !idle.IsZero() && idle.Sub(now) < soon:
		list = append(list, badge{"ends unused " + distance(idle, now), true})
	case advice.Safe:
		list = append(list, badge{fmt.Sprintf("idle for %d days", advice.UnusedDays), false})
	}
	if newest := k.Newest(); newest != nil && slices.ContainsFunc(k.Generations, func(g apikey.Generation) bool {
		return g.Number != newest.Number && !g.EndedAt(now) && g.LastUsedAt.After(newest.CreatedAt)
	}) {
		list = append(list, badge{"old secret still in use", true})
	}
	return list
}

// A spark is a small line of usage: points of an SVG of sparkWidth × sparkHeight.
type spark struct {
	Allowed, Refused string // points
	Text             string // the same in words
}

const (
	sparkWidth  = 84
	sparkHeight = 20
)

// sparkOf draws what was counted on the days since from; nil where nothing was.
func sparkOf(used []admin.Usage, from time.Time) *spark {
	var allowed, refused [sparkDays]int64
	var sums [2]int64
	most := int64(0)
	for i := range used {
		u := &used[i]
		day := int(u.Start.Sub(from) / (24 * time.Hour))
		if day < 0 || day >= sparkDays {
			continue
		}
		allowed[day], refused[day] = u.Allowed, u.Refused
		sums[0], sums[1] = sums[0]+u.Allowed, sums[1]+u.Refused
		most = max(most, u.Allowed, u.Refused)
	}
	if most == 0 {
		return nil
	}
	line := func(counts [sparkDays]int64) string {
		var b strings.Builder
		for day, n := range counts {
			fmt.Fprintf(&b, "%d,%.1f ", day*sparkWidth/(sparkDays-1), 1+float64(sparkHeight-2)*(1-float64(n)/float64(most)))
		}
		return b.String()
	}
	s := &spark{Allowed: line(allowed), Text: fmt.Sprintf("%s allowed and %s refused in %d days", number(sums[0]), number(sums[1]), sparkDays)}
	if sums[1] > 0 {
		s.Refused = line(refused)
	}
	return s
}

// number writes a count with its thousands apart.
func number(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "\u202f" + s[i:]
	}
	return s
}
