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
	Name              string            `json:"name" minLength:"1" maxLength:"128" doc:"1 to 128 printable characters, no space first or last."`
	Description       string            `json:"description,omitempty" maxLength:"1024"`
	Type              apikey.Type       `json:"type,omitempty" enum:"instance,agent,user" default:"instance"`
	AgentName         string            `json:"agentName,omitempty" pattern:"^[A-Za-z0-9._-]{1,128}$" doc:"Needed for an agent key, refused for others."`
	UserPrincipalName string            `json:"userPrincipalName,omitempty" minLength:"1" maxLength:"256" doc:"Needed for a user key, refused for others. Printable ASCII without space and comma."`
	Scopes            []string          `json:"scopes,omitzero" strict:"notnull" nullable:"false" maxItems:"64" doc:"Absent: every right that the instance's policy allows. Empty: none."`
	Environment       string            `json:"environment,omitempty" doc:"1 to 64 of A-Z a-z 0-9 . _ -. Absent: any."`
	AllowedIPs        []string          `json:"allowedIps,omitzero" nullable:"false" minItems:"1" maxItems:"64" doc:"Addresses and CIDR ranges. Absent: from everywhere."`
	Limits            LimitsInput       `json:"limits,omitzero" doc:"Absent fields are inherited."`
	ExpirationDate    string            `json:"expirationDate,omitempty" doc:"RFC 3339 with a zone, or a date, which means its end in UTC. In the future, at most 365 days ahead."`
	ExpiresIn         string            `json:"expiresIn,omitempty" doc:"Instead of a date: a duration such as 24h or 30d."`
	NotBefore         string            `json:"notBefore,omitempty" doc:"RFC 3339 with a zone, or a date, which means its beginning in UTC."`
	InactivityDays    *int              `json:"inactivityDays,omitempty" minimum:"1" maximum:"365" doc:"The key expires after so many days without use."`
	Metadata          map[string]string `json:"metadata,omitempty" doc:"At most 32 entries; names to 64, values to 256 characters."`
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
	Disabled      bool          `json:"disabled,omitempty" doc:"Refuses every key of the instance."`
	Defaults      DefaultsInput `json:"defaults,omitzero" doc:"Apply to each key of a type that does not say otherwise."`
	Total         LimitsInput   `json:"total,omitzero" doc:"Applies to all keys of the instance together; without maxConcurrent."`
	AllowedScopes []string      `json:"allowedScopes,omitzero" strict:"notnull" nullable:"false" maxItems:"64" doc:"Caps every key's rights. Absent: no cap."`
}

// DefaultsInput are the limits of each type of key as people write them.
type DefaultsInput struct {
	Instance LimitsInput `json:"instance,omitzero"`
	Agent    LimitsInput `json:"agent,omitzero"`
	User     LimitsInput `json:"user,omitzero"`
}

const (
	maxLife         = 365 * 24 * time.Hour
	maxAllowedIPs   = 64
	maxMetadata     = 32
	clockSkew       = time.Minute // that a notBefore of "now" may be late by
	maxInactiveDays = 365
)

// key checks in and returns the key it describes, without id, instance and generations.
// Errors: *apikey.InvalidError, several joined.
func (in *KeyInput) key(format apikey.Format, now time.Time) (*apikey.Key, error) {
	k := &apikey.Key{
		Name: in.Name, Description: in.Description, Type: in.Type, Environment: in.Environment,
		AgentName: in.AgentName, UserPrincipalName: in.UserPrincipalName, Metadata: in.Metadata, CreatedAt: now,
	}
	var bad faults
	bad.add(text("name", in.Name, 1, 128, ""))
	bad.add(text("description", in.Description, 0, 1024, "\n\t"))
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
	k.AllowedIPs, err = parsePrefixes("allowedIps", in.AllowedIPs)
	bad.add(err)
	k.Limits, err = in.Limits.Limits("limits")
	bad.add(err)
	k.ExpirationDate, err = in.expiration(now)
	bad.add(err)
	k.NotBefore, err = in.notBefore(now, k.ExpirationDate)
	bad.add(err)
	if in.InactivityDays != nil {
		if k.InactivityDays = *in.InactivityDays; k.InactivityDays < 1 || k.InactivityDays > maxInactiveDays {
			bad.add(apikey.Invalid("inactivityDays", "must be from 1 to 365"))
		}
	}
	bad.add(metadata(in.Metadata))

	bad.add(noSecret(format, "name", in.Name))
	bad.add(noSecret(format, "description", in.Description))
	bad.add(noSecret(format, "agentName", in.AgentName))
	bad.add(noSecret(format, "userPrincipalName", in.UserPrincipalName))
	bad.add(noSecret(format, "environment", in.Environment))
	for name, value := range in.Metadata {
		bad.add(noSecret(format, "metadata", name+" "+value))
	}
	return k, bad.err()
}

func (in *KeyInput) expiration(now time.Time) (time.Time, error) {
	switch {
	case in.ExpirationDate != "" && in.ExpiresIn != "":
		return time.Time{}, apikey.Invalid("expiresIn", "does not go with expirationDate: give one of them")
	case in.ExpiresIn != "":
		return expiresIn(in.ExpiresIn, now)
	case in.ExpirationDate == "":
		return time.Time{}, nil
	}
	t, day, err := parseTime("expirationDate", in.ExpirationDate)
	if err != nil {
		return time.Time{}, err
	}
	if day {
		t = t.AddDate(0, 0, 1).Add(-time.Microsecond)
	}
	switch {
	case !t.After(now):
		return time.Time{}, apikey.Invalid("expirationDate", "must be in the future")
	case t.After(now.Add(maxLife)):
		return time.Time{}, apikey.Invalid("expirationDate", "must be at most 365 days ahead")
	}
	return t, nil
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
func expiresIn(s string, now time.Time) (time.Time, error) {
	d, err := apikey.ParseDuration(s)
	if err != nil {
		return time.Time{}, under("expiresIn", err)
	}
	if d.Std() < time.Second || d.Std() > maxLife {
		return time.Time{}, apikey.Invalid("expiresIn", "must be from 1s to 365d")
	}
	return now.Add(d.Std()), nil
}

// parseTime reads RFC 3339 strictly, or a bare date as its first instant in UTC.
func parseTime(field, s string) (t time.Time, day bool, err error) {
	if t, err := time.Parse(time.DateOnly, s); err == nil {
		return t, true, nil
	}
	t, err = time.Parse(time.RFC3339, s)
	if err != nil || !rfc3339.MatchString(s) {
		return time.Time{}, false, apikey.Invalid(field, "must be RFC 3339 with a zone, such as 2027-01-31T12:00:00Z, or a date such as 2027-01-31")
	}
	return t.UTC().Truncate(time.Microsecond), false, nil
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
	}
	if in.ExpiresIn != "" {
		t.ExpiresAt, err = expiresIn(in.ExpiresIn, now)
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

// noSecret refuses text with one of our secrets in it: what is typed into a wrong field would be in
// clear in lists, backups and the audit.
func noSecret(format apikey.Format, field, s string) error {
	for i := 0; i+format.Len() <= len(s); i++ {
		if _, err := format.Check(s[i : i+format.Len()]); err == nil {
			return apikey.Invalid(field, "contains a secret: revoke it if it is in use, and leave it out")
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
