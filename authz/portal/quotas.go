package portal

import (
	"errors"
	"net/http"
	"strconv"
	"strings"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// quotaPages registers the quotas of an instance: what they are, how much of them is used, and their changes, each
// of which is shown before it is made.
func (p *portal) quotaPages() {
	const at, section = "/instances/{instance}", "Quotas"
	p.page(section, "GET "+at+"/quotas", p.quotas)
	p.page(section, "GET "+at+"/new-quota", p.newQuota)
	p.page(section, "POST "+at+"/new-quota", p.putQuota)
	p.page(section, "GET "+at+"/quotas/{quota}", p.quota)
	p.page(section, "POST "+at+"/quotas/{quota}", p.putQuota)
	p.page(section, "GET "+at+"/quotas/{quota}/delete", p.askDeleteQuota)
	p.page(section, "POST "+at+"/quotas/{quota}/delete", p.deleteQuota)
}

// lookedAtKeys is how many keys are asked for how much of a quota they have used.
const lookedAtKeys = 20

// A quotaRow is a quota in the list.
type quotaRow struct {
	admin.QuotaRecord
	Every string          // window or period
	Use   *admin.KeyLimit // where one count is shared by all; nil: each has its own, or nobody can tell
}

// A quotasView is the list of quotas.
type quotasView struct {
	Quotas  []quotaRow
	Replica string // where use was counted; "": nobody can tell
}

func (p *portal) quotas(w http.ResponseWriter, v *visit) error {
	all, _, err := p.svc.Quotas(v.Context(), v.Caller, v.Instance)
	if err != nil {
		return err
	}
	// All that share one count see the same of it, so any key will do.
	uses, replica, err := p.quotaUses(v, 1)
	if err != nil {
		return err
	}
	data := quotasView{Replica: replica}
	for i := range all {
		row := quotaRow{QuotaRecord: admin.QuotaRecordOf(&all[i]), Every: every(&all[i])}
		if all[i].Partition == apikey.PartitionNone {
			for j := range uses {
				if uses[j].Quota == all[i].Name {
					row.Use = &uses[j].KeyLimit
				}
			}
		}
		data.Quotas = append(data.Quotas, row)
	}
	return p.show(w, v, "quotas", "Quotas", data)
}

func every(q *apikey.Quota) string {
	if q.Window > 0 {
		return apikey.Duration(q.Window).String()
	}
	return string(q.Period)
}

// A quotaUse is how much of a quota a key has used.
type quotaUse struct {
	admin.KeyLimit
	Key *apikey.Key
}

// quotaUses asks for the use of all quotas by the keys that were used last, at most so many. Nothing where nobody
// can tell, as while the server cannot decide, or in a process that decides no requests.
func (p *portal) quotaUses(v *visit, keys int) (uses []quotaUse, replica string, err error) {
	list, err := p.svc.Keys(v.Context(), v.Caller, v.Instance, admin.KeyQuery{
		KeyFilter: admin.KeyFilter{Status: "active"}, Order: admin.OrderLastUsedDesc, Limit: keys,
	})
	if err != nil {
		return nil, "", err
	}
	for _, k := range list {
		now, err := p.svc.LimitsOfKey(v.Context(), v.Caller, v.Instance, k.ID)
		_, none := errors.AsType[*admin.StateError](err)
		switch {
		case errors.Is(err, apikey.ErrNotFound): // gone meanwhile
			continue
		case none || errors.Is(err, apikey.ErrUndecided):
			return nil, "", nil
		case err != nil:
			return nil, "", err
		}
		replica = now.Replica
		for _, l := range now.Limits {
			if l.Quota != "" {
				uses = append(uses, quotaUse{l, k})
			}
		}
	}
	return uses, replica, nil
}

// A quotaView is the page of one quota, or of one to be.
type quotaView struct {
	Name     string // "": a new one
	Revision apikey.Revision
	Fields   fieldList
	Faults   []fault
	Conflict bool // somebody else changed the quotas meanwhile
	MayPut   bool
	Record   *admin.QuotaRecord // as it is now; nil: there is none
	Every    string
	Uses     []quotaUse
	Replica  string
	Shared   bool // one count for all
}

// quotaFields are the fields of a quota's form.
func quotaFields(in admin.QuotaInput, limit string, isNew bool) fieldList {
	on := func(b bool) string {
		if b {
			return "on"
		}
		return ""
	}
	list := fieldList{
		{Name: "description", Label: "Description", Kind: "text", Value: in.Description, Max: 1024},
		{Name: "context", Label: "Context", Kind: "text", Value: in.Context, Required: true,
			Help: "What is counted: service:controller, or service:controller:agent for one agent. Routes name their context in the server's configuration."},
		{Name: "partition", Label: "Counted", Kind: "choice", Value: string(in.Partition), Choices: []choice{
			{string(apikey.PartitionNone), "for everybody together"},
			{string(apikey.PartitionUPN), "for each principal"},
			{string(apikey.PartitionIdentifier), "for each principal, by its identifier"},
			{string(apikey.PartitionKey), "for each key"},
		}},
		{Name: "limit", Label: "Limit", Kind: "number", Value: limit, Required: true, Help: "Requests, or their cost where routes have one."},
		{Name: "window", Label: "Window", Kind: "text", Value: in.Window, Max: 16, Help: "A duration such as 60s, 1h or 30d. This or the period."},
		{Name: "period", Label: "Period", Kind: "choice", Value: string(in.Period), Help: "Of the calendar, in UTC.",
			Choices: []choice{{"", "none: the window says it"}, {"day", "day"}, {"month", "month"}}},
		{Name: "lockout", Label: "Lockout", Kind: "text", Value: in.Lockout, Max: 16, Empty: "none",
			Help: "How long everything is refused once the quota refused, such as 5m."},
		{Name: "smoothed", Label: "Smoothed", Kind: "switch", Value: on(in.Smoothed),
			Help: "Judged over 20 s, with the share of the limit that falls to them. The window must be a multiple of 20 s."},
		{Name: "distributedEnforcement", Label: "Counted over all replicas together", Kind: "switch", Value: on(in.DistributedEnforcement)},
		{Name: "shadow", Label: "Shadow", Kind: "switch", Value: on(in.Shadow), Help: "Counted and reported, but it refuses nothing."},
	}
	if isNew {
		list = append(fieldList{{Name: "name", Label: "Name", Kind: "text", Value: in.Name, Required: true, Max: 128,
			Help: "Letters, digits, . _ and -. It cannot be changed."}}, list...)
	}
	return list
}

func (p *portal) newQuota(w http.ResponseWriter, v *visit) error {
	_, revision, err := p.svc.Quotas(v.Context(), v.Caller, v.Instance)
	if err != nil {
		return err
	}
	in := admin.QuotaInput{Partition: apikey.PartitionNone, Window: "60s"}
	return p.show(w, v, "quota", "New quota", quotaView{Revision: revision, Fields: quotaFields(in, "", true), MayPut: v.Can("quota.put")})
}

func (p *portal) quota(w http.ResponseWriter, v *visit) error {
	data, err := p.quotaView(v, v.PathValue("quota"))
	if err != nil {
		return err
	}
	return p.show(w, v, "quota", "Quota "+data.Name, data)
}

// quotaView reads a quota and its use.
func (p *portal) quotaView(v *visit, name string) (quotaView, error) {
	q, revision, err := p.svc.Quota(v.Context(), v.Caller, v.Instance, name)
	if err != nil {
		return quotaView{}, err
	}
	record := admin.QuotaRecordOf(&q)
	data := quotaView{
		Name: q.Name, Revision: revision, Fields: quotaFields(record.QuotaInput, strconv.Itoa(q.Limit), false), MayPut: v.Can("quota.put"),
		Record: &record, Every: every(&q), Shared: q.Partition == apikey.PartitionNone,
	}
	looked := lookedAtKeys
	if data.Shared {
		looked = 1
	}
	uses, replica, err := p.quotaUses(v, looked)
	if err != nil {
		return quotaView{}, err
	}
	data.Replica = replica
	for _, use := range uses {
		if use.Quota == q.Name {
			data.Uses = append(data.Uses, use)
		}
	}
	return data, nil
}

// A quotaPreview is what a change of quotas would do.
type quotaPreview struct {
	Name     string
	Revision apikey.Revision
	Changes  []quotaChange
	Hidden   []choice // what the form held, to be sent again
	Enforced string
	New      bool
	Counting bool // a count may run, which goes on
}

// A quotaChange is a field that becomes another.
type quotaChange struct{ Label, Before, After string }

// putQuota shows what the form would change, and then changes it.
func (p *portal) putQuota(w http.ResponseWriter, v *visit) error {
	name, isNew := v.PathValue("quota"), v.PathValue("quota") == ""
	form := func(field string) string { return strings.TrimSpace(v.PostForm.Get(field)) }
	in := admin.QuotaInput{
		Description: form("description"), Context: form("context"), Partition: apikey.Partition(form("partition")), Window: form("window"),
		Period: apikey.Period(form("period")), Lockout: form("lockout"), Smoothed: form("smoothed") != "",
		DistributedEnforcement: form("distributedEnforcement") != "", Shadow: form("shadow") != "",
	}
	if isNew {
		name = form("name")
	}
	in.Name = name
	revision, err := revisionOf(v)
	if err != nil {
		return err
	}
	var bad faultList
	if in.Limit, err = strconv.Atoi(form("limit")); err != nil {
		bad.add(apikey.Invalid("limit", "must be a whole number"))
	}
	if name == "" {
		bad.add(apikey.Invalid("name", "is missing"))
	}
	again := func(status int, err error) error { return p.quotaAgain(w, v, status, in, form("limit"), isNew, err) }
	if err := bad.err(); err != nil {
		return again(http.StatusBadRequest, err)
	}
	if form("do") == "edit" {
		return again(http.StatusOK, nil)
	}
	done, err := p.svc.ApplyQuotas(v.Context(), v.Caller, v.Instance, admin.QuotaSet{Quotas: []admin.QuotaInput{in}, DryRun: true}, revision)
	if err == nil && isNew && len(done.Changes) > 0 && done.Changes[0].Before != nil || err == nil && isNew && len(done.Changes) == 0 {
		err = apikey.Invalid("name", "is taken by another quota of this instance")
	}
	if err != nil {
		return again(statusOf(err), err)
	}
	if form("do") != "apply" {
		data := quotaPreview{Name: name, Revision: revision, New: isNew, Hidden: hidden(v, quotaFields(in, "", true))}
		for i := range done.Changes {
			data.Changes = append(data.Changes, changesOf(&done.Changes[i])...)
		}
		q := done.Quota(name)
		record := admin.QuotaRecordOf(&q)
		data.Enforced = enforced(&record)
		data.Counting = !isNew && len(data.Changes) > 0
		return p.show(w, v, "quotapreview", "What would change", data)
	}
	changed, err := p.svc.PutQuota(v.Context(), v.Caller, v.Instance, name, in, revision)
	if err != nil {
		return again(statusOf(err), err)
	}
	return p.done(w, v, v.Path("quotas", name), "The quota "+name+" is as you said"+"."+everywhere(changed.Propagation))
}

// quotaAgain shows the form again with what was entered and what is wrong with it.
func (p *portal) quotaAgain(w http.ResponseWriter, v *visit, status int, in admin.QuotaInput, limit string, isNew bool, err error) error {
	faults, rest := faultsOf(err)
	conflict := len(rest) == 1 && errors.Is(rest[0], admin.ErrPrecondition)
	if len(rest) > 0 && !conflict {
		return err
	}
	title := "New quota"
	var data quotaView
	if isNew {
		_, revision, err := p.svc.Quotas(v.Context(), v.Caller, v.Instance)
		if err != nil {
			return err
		}
		data = quotaView{Revision: revision, MayPut: v.Can("quota.put")}
	} else {
		if data, err = p.quotaView(v, in.Name); err != nil {
			return err
		}
		title = "Quota " + data.Name
	}
	data.Fields, data.Conflict = quotaFields(in, limit, isNew), conflict
	plain := map[string]string{}
	for field, reason := range faults { // the set that is tried has one quota
		_, name, ok := strings.Cut(field, "].")
		if !ok {
			if field, ok = strings.CutPrefix(field, "quotas."); ok {
				name = field[strings.LastIndexByte(field, '.')+1:]
			} else {
				name = field
			}
		}
		plain[name] = join(plain[name], reason)
	}
	data.Faults = data.Fields.blame(plain, "")
	if !conflict && err == nil && len(faults) == 0 {
		// Back from the preview: what the page was made of still counts, so that a change meanwhile is noticed.
		if data.Revision, err = revisionOf(v); err != nil {
			return err
		}
	}
	return p.showAs(w, v, status, "quota", title, data)
}

func (p *portal) askDeleteQuota(w http.ResponseWriter, v *visit) error {
	data, err := p.quotaView(v, v.PathValue("quota"))
	if err != nil {
		return err
	}
	return p.show(w, v, "quotadelete", "Delete quota "+data.Name, data)
}

func (p *portal) deleteQuota(w http.ResponseWriter, v *visit) error {
	revision, err := revisionOf(v)
	if err != nil {
		return err
	}
	name := v.PathValue("quota")
	done, err := p.svc.DeleteQuota(v.Context(), v.Caller, v.Instance, name, revision)
	if err != nil {
		return err
	}
	return p.done(w, v, v.Path("quotas"), "The quota "+name+" is deleted"+"."+everywhere(done.Propagation))
}

// changesOf lists what becomes of a quota, field by field.
func changesOf(c *admin.QuotaChange) []quotaChange {
	value := func(q *apikey.Quota) fieldList {
		if q == nil {
			return nil
		}
		return quotaFields(admin.QuotaInputOf(q), strconv.Itoa(q.Limit), false)
	}
	before, after := value(c.Before), value(c.After)
	var changes []quotaChange
	for i := range max(len(before), len(after)) {
		var one quotaChange
		if i < len(before) {
			one.Label, one.Before = before[i].Label, before[i].Read()
		}
		if i < len(after) {
			one.Label, one.After = after[i].Label, after[i].Read()
		}
		if one.Before != one.After {
			changes = append(changes, one)
		}
	}
	return changes
}

// enforced says what a quota comes to.
func enforced(q *admin.QuotaRecord) string {
	if q.Enforced.Window > 0 {
		return strconv.FormatInt(q.Enforced.Limit, 10) + " in any " + q.Enforced.Window.String()
	}
	return strconv.FormatInt(q.Enforced.Limit, 10) + " in each " + string(q.Enforced.Period)
}
