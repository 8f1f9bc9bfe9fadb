package admin

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"keyward/authz/apikey"
)

// A KeyInput is what a new key is to be, as people write it. Empty fields say nothing.
type KeyInput struct {
	Name              string                  `json:"name" minLength:"1" maxLength:"128" doc:"1 to 128 printable characters, no space first or last."`
	Description       string                  `json:"description,omitempty" maxLength:"1024"`
	Type              apikey.Type             `json:"type,omitempty" enum:"instance,agent,user" default:"instance"`
	AgentName         string                  `json:"agentName,omitempty" pattern:"^[A-Za-z0-9._-]{1,128}$" doc:"Needed for an agent key, refused for others."`
	UserPrincipalName string                  `json:"userPrincipalName,omitempty" minLength:"1" maxLength:"256" doc:"Needed for a user key, refused for others. Printable ASCII without space and comma."`
	Scopes            []string                `json:"scopes,omitzero" strict:"notnull" nullable:"false" maxItems:"64" doc:"Absent: every right that the instance's policy allows. Empty: none."`
	Environment       string                  `json:"environment,omitempty" doc:"1 to 64 of A-Z a-z 0-9 . _ -. Absent: any."`
	AllowedIPs        []string                `json:"allowedIps,omitzero" nullable:"false" minItems:"1" maxItems:"64" doc:"Addresses and CIDR ranges. Absent: from everywhere."`
	Limits            LimitsInput             `json:"limits,omitzero" doc:"Absent fields are inherited."`
	ExpirationPolicy  apikey.ExpirationPolicy `json:"expirationPolicy,omitempty" enum:"none,time,inactivity" doc:"Absent: what the other fields say, and if they say nothing, what the instance's policy does."`
	ExpirationDate    string                  `json:"expirationDate,omitempty" strict:"notempty" minLength:"1" doc:"RFC 3339 with a zone, or a date, which means its end in UTC. In the future, at most the policy's longest life ahead (365 days as shipped)."`
	ExpiresIn         string                  `json:"expiresIn,omitempty" strict:"notempty" minLength:"1" doc:"Instead of a date: a duration such as 24h or 30d."`
	NotBefore         string                  `json:"notBefore,omitempty" strict:"notempty" minLength:"1" doc:"RFC 3339 with a zone, or a date, which means its beginning in UTC."`
	InactivityDays    *int                    `json:"inactivityDays,omitempty" minimum:"1" maximum:"365" doc:"The key expires after so many days without use."`
	Metadata          map[string]string       `json:"metadata,omitempty" doc:"At most 32 entries; names to 64, values to 256 characters."`

	Quotas map[string]apikey.QuotaOverride `json:"quotas,omitempty" doc:"By the names of quotas of the instance that count this key alone: the limit that it has instead; -1 for unlimited."`
}

// A LimitsInput is limits as people write them: an absent field inherits, -1 is unlimited, 0 is refused.
type LimitsInput struct {
	Rate          *RateInput `json:"rate,omitempty"`
	Burst         *int       `json:"burst,omitempty" doc:"Requests that may come at once."`
	MaxConcurrent *int       `json:"maxConcurrent,omitempty" doc:"Requests that may run at once."`
}

// A RateInput is a rate as people write it.
type RateInput struct {
	Requests *int   `json:"requests,omitempty" required:"true" doc:"-1 for unlimited."`
	Per      string `json:"per,omitempty" doc:"A duration such as 60s."`
}

// A PolicyInput is a policy as people write it.
type PolicyInput struct {
	Disabled      bool               `json:"disabled,omitempty" doc:"Refuses every key of the instance."`
	Defaults      DefaultsInput      `json:"defaults,omitzero" doc:"Apply to each key of a type that does not say otherwise."`
	Total         LimitsInput        `json:"total,omitzero" doc:"Applies to all keys of the instance together; without maxConcurrent."`
	AllowedScopes []string           `json:"allowedScopes,omitzero" strict:"notnull" nullable:"false" maxItems:"64" doc:"Caps every key's rights. Absent: no cap."`
	Caps          CapsInput          `json:"caps,omitzero" doc:"How many keys there may be that are neither revoked nor expired."`
	Creation      CreationInput      `json:"creation,omitzero" doc:"How many keys may be made within any hour."`
	Expiration    ExpirationInput    `json:"expiration,omitzero" doc:"How long keys may live."`
	OnLeak        apikey.OnLeak      `json:"onLeak,omitzero" doc:"What becomes of a key whose secret is reported as leaked: revoke or flag."`
	KeepRevoked   string             `json:"keepRevoked,omitempty" doc:"How long revoked keys are kept before they are removed with their digests, from 1d. As shipped: 90d."`
	Shadow        apikey.Shadow      `json:"shadow,omitzero" doc:"What is judged, counted and reported, and refuses nobody."`
	Usage         apikey.UsagePolicy `json:"usage,omitzero" doc:"Whether requests are counted."`
	Alerts        AlertsInput        `json:"alerts,omitzero" doc:"What is worth an alert, and how many it takes."`
}

// CapsInput are caps as people write them: an absent field inherits, -1 is none, 0 is refused.
type CapsInput struct {
	Instance *int `json:"instance,omitempty" doc:"Of the instance. As shipped: 1000."`
	User     *int `json:"user,omitempty" doc:"Of each user. As shipped: 10."`
	Agent    *int `json:"agent,omitempty" doc:"Of each agent. As shipped: 20."`
}

// CreationInput are rates of creation as people write them, as in [CapsInput].
type CreationInput struct {
	PerHour        *int `json:"perHour,omitempty" doc:"In the instance. As shipped: 60."`
	PerHourAndUser *int `json:"perHourAndUser,omitempty" doc:"By each creator with the role user. As shipped: 20."`
}

// ExpirationInput is what a policy says of the life of keys, as people write it.
type ExpirationInput struct {
	Default        apikey.ExpirationPolicy `json:"default,omitempty" enum:"none,time,inactivity" doc:"For a key that says nothing. As shipped: none."`
	Required       bool                    `json:"required,omitempty" doc:"Keys without an end are refused."`
	Life           string                  `json:"life,omitempty" doc:"Of a key that says no more than time. As shipped: 120d."`
	LongestLife    string                  `json:"longestLife,omitempty" doc:"From creation, change or rotation. As shipped: 365d."`
	InactivityDays *int                    `json:"inactivityDays,omitempty" minimum:"1" maximum:"365" doc:"Of a key that says no more than inactivity. As shipped: 90."`
}

// DefaultsInput are the limits of each type of key as people write them.
type DefaultsInput struct {
	Instance LimitsInput `json:"instance,omitzero"`
	Agent    LimitsInput `json:"agent,omitzero"`
	User     LimitsInput `json:"user,omitzero"`
}

const (
	maxLife         = 365 * 24 * time.Hour // of a token, and until a key begins
	maxAllowedIPs   = 64
	maxMetadata     = 32
	clockSkew       = time.Minute // that a notBefore of "now" may be late by
	maxInactiveDays = apikey.MaxInactivityDays
)

// key checks in and returns the key it describes, without id, instance and generations. policy is in force.
// Errors: *apikey.InvalidError, *ForbiddenError, several joined.
func (in *KeyInput) key(format apikey.Format, policy *apikey.Policy, now time.Time) (*apikey.Key, error) {
	k := &apikey.Key{
		Name: in.Name, Description: in.Description, Type: in.Type, Environment: in.Environment,
		AgentName: in.AgentName, UserPrincipalName: in.UserPrincipalName, Metadata: in.Metadata, Quotas: in.Quotas, CreatedAt: now,
	}
	var bad faults
	bad.add(words(format, k))
	if k.Type == "" {
		k.Type = apikey.TypeInstance
	}
	if k.Type.Kind() == 0 {
		bad.add(apikey.Invalid("type", "must be instance, agent or user"))
	} else {
		bad.add(owner("agentName", in.AgentName, k.Type == apikey.TypeAgent, "agent", agentName))
		bad.add(owner("userPrincipalName", in.UserPrincipalName, k.Type == apikey.TypeUser, "user", principal))
	}
	if in.Environment != "" && !isName(in.Environment, 64) {
		bad.add(apikey.Invalid("environment", "must be 1 to 64 of A-Z a-z 0-9 . _ -"))
	}
	var err error
	k.Scopes, err = parseScopes("scopes", in.Scopes)
	bad.add(err)
	bad.add(allowed(policy, k.Scopes))
	bad.add(noSecretScope(format, "scopes", k.Scopes))
	k.AllowedIPs, err = parsePrefixes("allowedIps", in.AllowedIPs)
	bad.add(err)
	k.Limits, err = in.Limits.Limits("limits")
	bad.add(err)
	k.ExpirationDate, k.InactivityDays, err = in.life().resolve(&policy.Expiration, now)
	bad.add(err)
	k.NotBefore, err = in.notBefore(now, k.ExpirationDate)
	bad.add(err)
	bad.add(noSecret(format, "agentName", in.AgentName))
	bad.add(noSecret(format, "userPrincipalName", in.UserPrincipalName))
	bad.add(noSecret(format, "environment", in.Environment))
	return k, bad.err()
}

// words checks what of a key is free text.
func words(format apikey.Format, k *apikey.Key) error {
	var bad faults
	bad.add(text("name", k.Name, 1, 128, ""))
	bad.add(text("description", k.Description, 0, 1024, "\n\t"))
	bad.add(metadata(k.Metadata))
	bad.add(noSecret(format, "name", k.Name))
	bad.add(noSecret(format, "description", k.Description))
	for name, value := range k.Metadata {
		bad.add(noSecret(format, "metadata", name+" "+value))
	}
	return bad.err()
}

// A lifeInput is what somebody said of when a key expires. nil and "" say nothing.
type lifeInput struct {
	policy    apikey.ExpirationPolicy
	date      string // ExpirationDate or
	expiresIn string // ExpiresIn
	days      *int
}

func (in *KeyInput) life() lifeInput {
	return lifeInput{in.ExpirationPolicy, in.ExpirationDate, in.ExpiresIn, in.InactivityDays}
}

// resolve returns the date, zero for none, and the days of inactivity, 0 for none, of a key that begins
// at now. Errors: *apikey.InvalidError, *ForbiddenError.
func (l lifeInput) resolve(p *apikey.Expiration, now time.Time) (date time.Time, days int, err error) {
	if date, err = l.end(p.LongestLife.Std(), now); err != nil {
		return time.Time{}, 0, err
	}
	if l.days != nil {
		if days, err = inactivityDays(*l.days); err != nil {
			return time.Time{}, 0, err
		}
	}
	policy := l.policy
	if policy == "" && date.IsZero() && days == 0 {
		policy = p.Default
	}
	switch policy {
	case "": // what the others say
	case apikey.ExpiresNever:
		if !date.IsZero() || days != 0 {
			return time.Time{}, 0, apikey.Invalid("expirationPolicy", "none does not go with expirationDate, expiresIn or inactivityDays")
		}
	case apikey.ExpiresByTime:
		if days != 0 {
			return time.Time{}, 0, apikey.Invalid("inactivityDays", "goes with the expirationPolicy inactivity")
		}
		if date.IsZero() {
			date = now.Add(p.Life.Std())
		}
	case apikey.ExpiresInactivity:
		if days == 0 {
			days = p.InactivityDays
		}
	default:
		return time.Time{}, 0, apikey.Invalid("expirationPolicy", "must be none, time or inactivity")
	}
	return date, days, endless(p, date, days)
}

// endless refuses a key without an end where the policy does not allow it.
func endless(p *apikey.Expiration, date time.Time, days int) error {
	if p.Required && date.IsZero() && days == 0 {
		return &ForbiddenError{Field: "expirationPolicy", Reason: "must be time or inactivity: the instance's policy allows no key without an end"}
	}
	return nil
}

// end returns the date that was given, zero if none was.
func (l lifeInput) end(longest time.Duration, now time.Time) (time.Time, error) {
	switch {
	case l.date != "" && l.expiresIn != "":
		return time.Time{}, apikey.Invalid("expiresIn", "does not go with expirationDate: give one of them")
	case l.expiresIn != "":
		return expiresIn(l.expiresIn, longest, now)
	case l.date == "":
		return time.Time{}, nil
	}
	t, day, err := parseTime("expirationDate", l.date)
	if err != nil {
		return time.Time{}, err
	}
	if day {
		t = endOfDay(t)
	}
	switch {
	case !t.After(now):
		return time.Time{}, apikey.Invalid("expirationDate", "must be in the future")
	case t.After(now.Add(longest)):
		return time.Time{}, apikey.Invalid("expirationDate", "must be at most "+apikey.Duration(longest).String()+" ahead, the longest life of a key here")
	}
	return t, nil
}

// endOfDay is the last instant of a day in UTC that we tell from the next one.
func endOfDay(day time.Time) time.Time { return day.AddDate(0, 0, 1).Add(-time.Microsecond) }

func inactivityDays(n int) (int, error) {
	if n < 1 || n > maxInactiveDays {
		return 0, apikey.Invalid("inactivityDays", "must be from 1 to 365")
	}
	return n, nil
}

func (in *KeyInput) notBefore(now, end time.Time) (time.Time, error) {
	if in.NotBefore == "" {
		return time.Time{}, nil
	}
	t, day, err := parseTime("notBefore", in.NotBefore)
	earliest := now.Add(-clockSkew)
	if day {
		earliest = now.UTC().Truncate(24 * time.Hour) // today
	}
	switch {
	case err != nil:
		return time.Time{}, err
	case t.Before(earliest):
		return time.Time{}, apikey.Invalid("notBefore", "must not be in the past")
	case t.After(now.Add(maxLife)):
		return time.Time{}, apikey.Invalid("notBefore", "must be at most 365 days ahead")
	case !end.IsZero() && !t.Before(end):
		return time.Time{}, apikey.Invalid("notBefore", "must be before the key expires")
	}
	return t, nil
}

// expiresIn returns the instant that lies a duration ahead.
func expiresIn(s string, longest time.Duration, now time.Time) (time.Time, error) {
	d, err := apikey.ParseDuration(s)
	if err != nil {
		return time.Time{}, under("expiresIn", err)
	}
	if d.Std() < time.Second || d.Std() > longest {
		return time.Time{}, apikey.Invalid("expiresIn", "must be from 1s to "+apikey.Duration(longest).String())
	}
	return now.Add(d.Std()), nil
}

// parseTime reads RFC 3339 strictly, or a bare date as its first instant in UTC. Nothing of ours happens before
// 1970: what says so is somebody's zero, which must not be taken for ours, which says nothing.
func parseTime(field, s string) (t time.Time, day bool, err error) {
	if t, err = time.Parse(time.DateOnly, s); err == nil {
		day = true
	} else if t, err = time.Parse(time.RFC3339, s); err != nil || !rfc3339.MatchString(s) {
		return time.Time{}, false, apikey.Invalid(field, "must be RFC 3339 with a zone, such as 2027-01-31T12:00:00Z, or a date such as 2027-01-31")
	}
	t = t.UTC().Truncate(time.Microsecond)
	if t.Year() < 1970 || t.Year() > 9999 {
		return time.Time{}, false, apikey.Invalid(field, "must be from the years 1970 to 9999")
	}
	return t, day, nil
}

// rfc3339 is the grammar: time.Parse also takes an hour of one digit, a decimal comma, a zone of 24 hours.
var rfc3339 = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)$`)

// token checks in and returns the token it describes, without id.
func (in *TokenInput) token(format apikey.Format, now time.Time) (*Token, error) {
	t := &Token{Name: in.Name, Role: in.Role, UserPrincipalName: in.UserPrincipalName, CreatedAt: now}
	var bad faults
	bad.add(text("name", in.Name, 1, 128, ""))
	bad.add(noSecret(format, "name", in.Name))
	if !slices.Contains([]Role{RoleOwner, RoleOperator, RoleAuditor, RoleUser}, in.Role) {
		bad.add(apikey.Invalid("role", "must be owner, operator, auditor or user"))
	}
	switch upn := in.UserPrincipalName; {
	case in.Role == RoleUser && upn == "":
		bad.add(apikey.Invalid("userPrincipalName", "is missing: a token of the role user needs it"))
	case in.Role != RoleUser && upn != "":
		bad.add(apikey.Invalid("userPrincipalName", "is for tokens of the role user only"))
	case upn != "" && !principal.ok(upn):
		bad.add(apikey.Invalid("userPrincipalName", principal.says))
	}
	bad.add(noSecret(format, "userPrincipalName", in.UserPrincipalName))
	var err error
	if in.InstanceID != "" {
		t.InstanceID, err = apikey.CanonicalInstanceID(in.InstanceID)
		bad.add(err)
		bad.add(noSecret(format, "instanceId", in.InstanceID))
	}
	if in.ExpiresIn != "" {
		t.ExpiresAt, err = expiresIn(in.ExpiresIn, maxLife, now)
		bad.add(err)
	}
	return t, bad.err()
}

// Policy checks in and returns the policy it describes. Errors: *apikey.InvalidError, several joined.
func (in *PolicyInput) Policy() (apikey.Policy, error) {
	p := apikey.Policy{Disabled: in.Disabled}
	var bad faults
	for _, l := range []struct {
		field string
		from  *LimitsInput
		to    *apikey.Limits
	}{
		{"policy.defaults.instance", &in.Defaults.Instance, &p.Defaults.Instance},
		{"policy.defaults.agent", &in.Defaults.Agent, &p.Defaults.Agent},
		{"policy.defaults.user", &in.Defaults.User, &p.Defaults.User},
		{"policy.total", &in.Total, &p.Total},
	} {
		limits, err := l.from.Limits(l.field)
		*l.to = limits
		bad.add(err)
	}
	var err error
	p.AllowedScopes, err = parseScopes("policy.allowedScopes", in.AllowedScopes)
	bad.add(err)
	for _, c := range []struct {
		field string
		from  *int
		to    *int
	}{
		{"policy.caps.instance", in.Caps.Instance, &p.Caps.Instance},
		{"policy.caps.user", in.Caps.User, &p.Caps.User},
		{"policy.caps.agent", in.Caps.Agent, &p.Caps.Agent},
		{"policy.creation.perHour", in.Creation.PerHour, &p.Creation.PerHour},
		{"policy.creation.perHourAndUser", in.Creation.PerHourAndUser, &p.Creation.PerHourAndUser},
		{"policy.expiration.inactivityDays", in.Expiration.InactivityDays, &p.Expiration.InactivityDays},
	} {
		switch {
		case c.from == nil:
		case *c.from == 0:
			bad.add(apikey.Invalid(c.field, "must not be 0: leave it out for what is shipped, or give -1 for no limit where there may be none"))
		default:
			*c.to = *c.from
		}
	}
	p.Expiration.Default, p.Expiration.Required, p.OnLeak = in.Expiration.Default, in.Expiration.Required, in.OnLeak
	p.Shadow, p.Usage = in.Shadow, in.Usage
	p.Alerts, err = in.Alerts.alerts("policy.alerts")
	bad.add(err)
	for _, d := range []struct {
		field, from string
		to          *apikey.Duration
	}{
		{"policy.expiration.life", in.Expiration.Life, &p.Expiration.Life},
		{"policy.expiration.longestLife", in.Expiration.LongestLife, &p.Expiration.LongestLife},
		{"policy.keepRevoked", in.KeepRevoked, &p.KeepRevoked},
	} {
		if d.from != "" {
			*d.to, err = apikey.ParseDuration(d.from)
			if err == nil && *d.to == 0 {
				err = apikey.Invalid("", "must not be 0: leave it out for what is shipped")
			}
			bad.add(under(d.field, err))
		}
	}
	if bad == nil {
		bad.add(under("policy", p.Validate())) // what the fields say together
	}
	return p, bad.err()
}

// Limits checks l and returns the limits it describes; field is its path. Errors: *apikey.InvalidError.
func (l *LimitsInput) Limits(field string) (apikey.Limits, error) {
	var limits apikey.Limits
	var bad faults
	count := func(name string, from *int, to *int) {
		switch {
		case from == nil:
		case *from == 0:
			bad.add(apikey.Invalid(field+"."+name, "must not be 0, which would let nothing through: leave it out to inherit, or give -1 for unlimited"))
		default:
			*to = *from
		}
	}
	if l.Rate != nil {
		if l.Rate.Requests == nil {
			bad.add(apikey.Invalid(field+".rate.requests", "is missing"))
		}
		count("rate.requests", l.Rate.Requests, &limits.Rate.Requests)
		if l.Rate.Per != "" {
			per, err := apikey.ParseDuration(l.Rate.Per)
			bad.add(under(field+".rate.per", err))
			limits.Rate.Per = per
		}
	}
	count("burst", l.Burst, &limits.Burst)
	count("maxConcurrent", l.MaxConcurrent, &limits.MaxConcurrent)
	if bad == nil {
		bad.add(limits.Validate(field))
	}
	return limits, bad.err()
}

func parseScopes(field string, list []string) (apikey.Scopes, error) {
	for i, s := range list {
		if _, err := apikey.ParseScope(s); err != nil {
			return nil, under(field+"["+strconv.Itoa(i)+"]", err)
		}
	}
	scopes, err := apikey.ParseScopes(list)
	return scopes, under(field, err)
}

// parsePrefixes reads addresses and ranges into one spelling each, sorted, without doubles.
func parsePrefixes(field string, list []string) ([]netip.Prefix, error) {
	switch {
	case list == nil:
		return nil, nil
	case len(list) == 0:
		return nil, apikey.Invalid(field, "must not be empty: leave it out to allow every address")
	case len(list) > maxAllowedIPs:
		return nil, apikey.Invalid(field, "has more than 64 entries")
	}
	prefixes := make([]netip.Prefix, 0, len(list))
	for i, s := range list {
		p, ok := parsePrefix(s)
		if !ok {
			return nil, apikey.Invalid(field+"["+strconv.Itoa(i)+"]", "must be an address or a range such as 10.0.0.0/8 or 2001:db8::/32, without a zone")
		}
		prefixes = append(prefixes, p)
	}
	slices.SortFunc(prefixes, netip.Prefix.Compare)
	return slices.Compact(prefixes), nil
}

func parsePrefix(s string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(s) // refuses zones
	if err != nil {
		addr, err := netip.ParseAddr(s)
		if err != nil || addr.Zone() != "" {
			return netip.Prefix{}, false
		}
		p = netip.PrefixFrom(addr, addr.BitLen())
	}
	if p.Addr().Is4In6() {
		// Client addresses are compared unmapped; a shorter prefix would cover more than IPv4.
		if p.Bits() < 96 {
			return netip.Prefix{}, false
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), true
}

func metadata(m map[string]string) error {
	if len(m) > maxMetadata {
		return apikey.Invalid("metadata", "has more than 32 entries")
	}
	for name, value := range m {
		if text("", name, 1, 64, "") != nil {
			return apikey.Invalid("metadata", "has a name that is not 1 to 64 printable characters")
		}
		if text("", value, 0, 256, "") != nil {
			return apikey.Invalid("metadata", "has a value that is not at most 256 printable characters")
		}
	}
	return nil
}

// owner checks the field that says whose a key is, which keys of one type need and others must not have.
func owner(field, value string, wanted bool, typ string, rule rule) error {
	switch {
	case wanted && value == "":
		return apikey.Invalid(field, "is missing: a key of type "+typ+" needs it")
	case !wanted && value != "":
		return apikey.Invalid(field, "is for keys of type "+typ+" only")
	case wanted && !rule.ok(value):
		return apikey.Invalid(field, rule.says)
	}
	return nil
}

// A rule is a check with its own words.
type rule struct {
	ok   func(string) bool
	says string
}

var (
	agentName = rule{func(s string) bool { return isName(s, 128) }, "must be 1 to 128 of A-Z a-z 0-9 . _ -"}
	// A user principal name goes into header values, where a space or a comma would end it.
	principal = rule{isPrincipal, "must be 1 to 256 printable ASCII characters without space and comma"}
)

func isPrincipal(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' || s[i] == ',' {
			return false
		}
	}
	return s != "" && len(s) <= 256
}

func isName(s string, most int) bool {
	for i := range len(s) {
		c := s[i]
		if (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && c != '.' && c != '_' && c != '-' {
			return false
		}
	}
	return s != "" && len(s) <= most
}

// text checks free text: least to most characters, printable or one of also, no space first or last.
func text(field, s string, least, most int, also string) error {
	switch n := utf8.RuneCountInString(s); {
	case n < least:
		return apikey.Invalid(field, "is missing")
	case n > most:
		return apikey.Invalid(field, fmt.Sprintf("has more than %d characters", most))
	case strings.TrimSpace(s) != s:
		return apikey.Invalid(field, "must not begin or end with white space")
	}
	for _, r := range s {
		// The replacement character is what a decoder leaves where it could not read.
		if r == utf8.RuneError || !unicode.IsPrint(r) && !strings.ContainsRune(also, r) {
			return apikey.Invalid(field, "has a character that is not printable")
		}
	}
	return nil
}

// noSecret refuses text with one of our secrets in it, also a mistyped one: what is typed into a wrong
// field would be in clear in lists, backups and the audit.
func noSecret(format apikey.Format, field, s string) error {
	if format.Within(s) {
		return apikey.Invalid(field, "contains a secret: revoke it if it is in use, and leave it out")
	}
	return nil
}

// noSecretScope refuses a scope that is a secret: one has the grammar of the other.
func noSecretScope(format apikey.Format, field string, scopes apikey.Scopes) error {
	for _, scope := range scopes {
		if err := noSecret(format, field, string(scope)); err != nil {
			return err
		}
	}
	return nil
}

// under puts the path field before the one that an *apikey.InvalidError names. nil stays nil.
func under(field string, err error) error {
	bad, ok := errors.AsType[*apikey.InvalidError](err)
	switch {
	case !ok:
		return err
	case bad.Field == "":
		return apikey.Invalid(field, bad.Reason)
	}
	return apikey.Invalid(field+"."+bad.Field, bad.Reason)
}

// faults collects what is wrong, so that a person mends it all at once.
type faults []error

func (f *faults) add(err error) {
	if err != nil {
		*f = append(*f, err)
	}
}

func (f faults) err() error {
	if len(f) == 1 {
		return f[0]
	}
	return errors.Join(f...)
}
