package portal

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A keyForm is what the forms for a new key and for changing one hold, as it was typed.
type keyForm struct {
	Name, Description, Type, AgentName, UserPrincipalName, Environment string

	ScopesMode string // all | these | none
	Scopes     string // one a line
	AllowedIPs string // one a line
	Metadata   string // name=value, one a line

	RateRequests, RatePer, Burst, MaxConcurrent string

	ExpirationPolicy, ExpirationDate, InactivityDays string
}

// text returns a field as it was typed, with line ends as we write them: browsers send others.
func typed(q url.Values, name string) string {
	return strings.TrimSpace(strings.ReplaceAll(q.Get(name), "\r\n", "\n"))
}

func keyFormOf(q url.Values) keyForm {
	return keyForm{
		Name: typed(q, "name"), Description: typed(q, "description"), Type: typed(q, "type"), AgentName: typed(q, "agentName"),
		UserPrincipalName: typed(q, "userPrincipalName"), Environment: typed(q, "environment"),
		ScopesMode: typed(q, "scopesMode"), Scopes: typed(q, "scopes"), AllowedIPs: typed(q, "allowedIps"), Metadata: typed(q, "metadata"),
		RateRequests: typed(q, "rateRequests"), RatePer: typed(q, "ratePer"), Burst: typed(q, "burst"), MaxConcurrent: typed(q, "maxConcurrent"),
		ExpirationPolicy: typed(q, "expirationPolicy"), ExpirationDate: typed(q, "expirationDate"), InactivityDays: typed(q, "inactivityDays"),
	}
}

// keyFormFrom shows a key as a form.
func keyFormFrom(r *admin.KeyRecord) keyForm {
	f := keyForm{
		Name: r.Name, Description: r.Description, Type: string(r.Type), AgentName: r.AgentName, UserPrincipalName: r.UserPrincipalName,
		Environment: r.Environment, ScopesMode: "these", Scopes: strings.Join(r.Scopes, "\n"), AllowedIPs: strings.Join(r.AllowedIPs, "\n"),
		ExpirationPolicy: string(r.ExpirationPolicy),
	}
	switch {
	case r.Scopes == nil:
		f.ScopesMode = "all"
	case len(r.Scopes) == 0:
		f.ScopesMode = "none"
	}
	var lines []string
	for _, name := range slices.Sorted(maps.Keys(r.Metadata)) {
		lines = append(lines, name+"="+r.Metadata[name])
	}
	f.Metadata = strings.Join(lines, "\n")
	if r.Limits.Rate.Requests != 0 {
		f.RateRequests = strconv.Itoa(r.Limits.Rate.Requests)
		if r.Limits.Rate.Per != 0 {
			f.RatePer = r.Limits.Rate.Per.String()
		}
	}
	for to, n := range map[*string]int{&f.Burst: r.Limits.Burst, &f.MaxConcurrent: r.Limits.MaxConcurrent, &f.InactivityDays: r.InactivityDays} {
		if n != 0 {
			*to = strconv.Itoa(n)
		}
	}
	if !r.ExpirationDate.IsZero() {
		f.ExpirationDate = r.ExpirationDate.Format(time.DateOnly)
	}
	return f
}

// lines splits a field into its lines, without empty ones.
func lines(s string) []string {
	var list []string
	for line := range strings.SplitSeq(s, "\n") {
		if line = strings.TrimSpace(line); line != "" {
			list = append(list, line)
		}
	}
	return list
}

// A fieldFaults collects what is wrong with the fields of a form.
type fieldFaults map[string]string

func (f fieldFaults) say(field, reason string) { f[field] = join(f[field], reason) }

// Listed are the faults in the form's order.
func (f fieldFaults) Listed() []fault {
	var all []fault
	for _, at := range formFields {
		if reason := f[at.name]; reason != "" {
			all = append(all, fault{at.name, at.label, upper(reason) + "."})
		}
	}
	return all
}

// count reads a whole number; nil for an empty field.
func (f fieldFaults) count(field, s string) *int {
	if s == "" {
		return nil
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		f.say(field, "must be a whole number")
		return nil
	}
	return &n
}

// scopes returns nil for every right, and what is not nil but empty for none.
func (f *keyForm) scopes(bad fieldFaults) []string {
	switch f.ScopesMode {
	case "all":
		return nil
	case "none":
		return []string{}
	case "these":
		list := lines(f.Scopes)
		if len(list) == 0 {
			bad.say("scopes", "is empty: name a scope, or choose another right above")
		}
		return list
	}
	bad.say("scopesMode", "must be chosen")
	return nil
}

func (f *keyForm) metadata(bad fieldFaults) map[string]string {
	entries := map[string]string{}
	for _, line := range lines(f.Metadata) {
		name, value, ok := strings.Cut(line, "=")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		if _, twice := entries[name]; !ok || twice {
			bad.say("metadata", "must be name=value on each line, each name once")
			return nil
		}
		entries[name] = value
	}
	if len(entries) == 0 {
		return nil
	}
	return entries
}

func (f *keyForm) limits(bad fieldFaults) admin.LimitsInput {
	in := admin.LimitsInput{Burst: bad.count("burst", f.Burst), MaxConcurrent: bad.count("maxConcurrent", f.MaxConcurrent)}
	if n := bad.count("rateRequests", f.RateRequests); n != nil {
		in.Rate = &admin.RateInput{Requests: n}
		if *n != apikey.Unlimited {
			in.Rate.Per = f.RatePer
		}
	} else if f.RatePer != "" && f.RateRequests == "" {
		bad.say("rateRequests", "is missing: how many requests in this time?")
	}
	return in
}

// key returns the key that the form describes, and what of it cannot even be read.
func (f *keyForm) key() (admin.KeyInput, fieldFaults) {
	bad := fieldFaults{}
	in := admin.KeyInput{
		Name: f.Name, Description: f.Description, Type: apikey.Type(f.Type), Environment: f.Environment, AllowedIPs: lines(f.AllowedIPs),
		Scopes: f.scopes(bad), Metadata: f.metadata(bad), Limits: f.limits(bad), ExpirationPolicy: apikey.ExpirationPolicy(f.ExpirationPolicy),
	}
	switch in.Type { // a field of another type may have been filled in before
	case apikey.TypeAgent:
		in.AgentName = f.AgentName
	case apikey.TypeUser:
		in.UserPrincipalName = f.UserPrincipalName
	}
	switch in.ExpirationPolicy {
	case apikey.ExpiresByTime:
		if in.ExpirationDate = f.ExpirationDate; in.ExpirationDate == "" {
			bad.say("expirationDate", "is missing")
		}
	case apikey.ExpiresInactivity:
		if in.InactivityDays = bad.count("inactivityDays", f.InactivityDays); f.InactivityDays == "" {
			bad.say("inactivityDays", "is missing")
		}
	}
	return in, bad
}

// patch returns the change that makes of was what the form says. What was not touched is left out, so that what
// could not be said today, such as a date that has passed, is in nobody's way.
func (f *keyForm) patch(was *keyForm) (admin.KeyPatch, fieldFaults) {
	bad := fieldFaults{}
	var p admin.KeyPatch
	if f.Name != was.Name {
		p.Name = admin.To(f.Name)
	}
	if f.Description != was.Description {
		p.Description = admin.To(f.Description)
	}
	if f.ScopesMode != was.ScopesMode || f.Scopes != was.Scopes {
		if scopes := f.scopes(bad); scopes == nil {
			p.Scopes = admin.Null[[]string]()
		} else {
			p.Scopes = admin.To(scopes)
		}
	}
	if f.AllowedIPs != was.AllowedIPs {
		if list := lines(f.AllowedIPs); list == nil {
			p.AllowedIPs = admin.Null[[]string]()
		} else {
			p.AllowedIPs = admin.To(list)
		}
	}
	if f.Metadata != was.Metadata {
		change := map[string]*string{}
		old := was.metadata(fieldFaults{})
		for name := range old {
			change[name] = nil
		}
		for name, value := range f.metadata(bad) {
			change[name] = &value
		}
		p.Metadata = admin.To(change)
	}
	f.patchLimits(was, &p, bad)
	if f.ExpirationPolicy != was.ExpirationPolicy || f.ExpirationDate != was.ExpirationDate || f.InactivityDays != was.InactivityDays {
		p.ExpirationPolicy = admin.To(apikey.ExpirationPolicy(f.ExpirationPolicy))
		switch apikey.ExpirationPolicy(f.ExpirationPolicy) {
		case apikey.ExpiresByTime:
			switch {
			case f.ExpirationDate == "":
				bad.say("expirationDate", "is missing")
			case f.ExpirationDate != was.ExpirationDate:
				p.ExpirationDate = admin.To(f.ExpirationDate)
			}
		case apikey.ExpiresInactivity:
			if days := bad.count("inactivityDays", f.InactivityDays); days != nil {
				p.InactivityDays = admin.To(*days)
			} else if f.InactivityDays == "" {
				bad.say("inactivityDays", "is missing")
			}
			if was.ExpirationPolicy == string(apikey.ExpiresByTime) {
				p.ExpirationDate = admin.Null[string]()
			}
		}
	}
	return p, bad
}

func (f *keyForm) patchLimits(was *keyForm, p *admin.KeyPatch, bad fieldFaults) {
	if f.RateRequests == was.RateRequests && f.RatePer == was.RatePer && f.Burst == was.Burst && f.MaxConcurrent == was.MaxConcurrent {
		return
	}
	in, limits := f.limits(bad), admin.LimitsPatch{Rate: admin.Null[admin.RatePatch](), Burst: admin.Null[int](), MaxConcurrent: admin.Null[int]()}
	if in.Rate != nil {
		limits.Rate = admin.To(admin.RatePatch{Requests: admin.To(*in.Rate.Requests), Per: admin.To(in.Rate.Per)})
	}
	if in.Burst != nil {
		limits.Burst = admin.To(*in.Burst)
	}
	if in.MaxConcurrent != nil {
		limits.MaxConcurrent = admin.To(*in.MaxConcurrent)
	}
	p.Limits = admin.To(limits)
}

// fieldNames are the fields of the form for those of the service that are called otherwise.
var fieldNames = map[string]string{
	"limits.rate": "rateRequests", "limits.rate.requests": "rateRequests", "limits.rate.per": "ratePer",
	"limits.burst": "burst", "limits.maxConcurrent": "maxConcurrent", "limits": "burst", "expiresIn": "expirationDate",
}

// formFields are the fields that a form shows faults at, in its order.
var formFields = []struct{ name, label string }{
	{"name", "Name"}, {"description", "Description"}, {"type", "Type"}, {"agentName", "Agent"}, {"userPrincipalName", "User"},
	{"scopesMode", "Scopes"}, {"scopes", "Scopes"}, {"expirationPolicy", "Expiration"}, {"expirationDate", "Date"}, {"inactivityDays", "Days without use"},
	{"rateRequests", "Requests"}, {"ratePer", "in"}, {"burst", "Burst"}, {"maxConcurrent", "At once"},
	{"environment", "Environment"}, {"allowedIps", "Allowed addresses"}, {"metadata", "Metadata"},
}

var entryOf = regexp.MustCompile(`^([a-zA-Z]+)\[(\d+)\]$`)

// addTo adds what the service says of a form to what is known already; what is not about a field of it is returned.
func addTo(bad fieldFaults, err error) error {
	fields, rest := faultsOf(err)
	if len(rest) > 0 {
		return err
	}
	for field, reason := range fields {
		if m := entryOf.FindStringSubmatch(field); m != nil {
			n, _ := strconv.Atoi(m[2])
			field, reason = m[1], fmt.Sprintf("line %d %s", n+1, reason)
		}
		if name, ok := fieldNames[field]; ok {
			field = name
		}
		if !slices.ContainsFunc(formFields, func(f struct{ name, label string }) bool { return f.name == field }) {
			return err
		}
		bad.say(field, reason)
	}
	return nil
}

// once makes a form that is sent twice do its work once. Everything that was sent counts, also what tells the form of
// one session from that of another: what was made is shown again in the session that made it, and in no other of the
// same person. Errors: errForm.
func once(v *visit) (*admin.Once, error) {
	key := v.PostForm.Get("once")
	if _, err := uuid.Parse(key); err != nil {
		return nil, errForm
	}
	return &admin.Once{Key: key, Method: http.MethodPost, Route: v.URL.Path, Body: sha256.Sum256([]byte(v.PostForm.Encode()))}, nil
}
