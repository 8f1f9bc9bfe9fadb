package apikey

import (
	"cmp"
	"errors"
	"strings"
	"time"
)

// An Instance is a tenant: it owns keys, policy, quotas and audit.
type Instance struct {
	ID        string // canonical, see CanonicalInstanceID
	Policy    Policy
	Quotas    []Quota // by name
	CreatedAt time.Time
	Revision  Revision // of its last change
}

// A Policy says what the keys of an instance may be and use. Every field's zero value is the default.
type Policy struct {
	// Disabled refuses every key of the instance.
	Disabled bool `json:"disabled,omitempty"`
	// Defaults apply to each key of a type; each field inherits alone, from ShippedLimits.
	Defaults Defaults `json:"defaults,omitzero"`
	// Total applies to all keys of the instance together. MaxConcurrent has no meaning here.
	Total Limits `json:"total,omitzero"`
	// AllowedScopes caps every key's rights, at decision time; nil: no cap.
	AllowedScopes Scopes `json:"allowedScopes,omitzero"`
	// Caps say how many keys there may be, Creation how fast they may be made.
	Caps     Caps     `json:"caps,omitzero"`
	Creation Creation `json:"creation,omitzero"`
	// Expiration says how long keys may live.
	Expiration Expiration `json:"expiration,omitzero"`
	// OnLeak says what happens to a key whose secret somebody reports as leaked.
	OnLeak OnLeak `json:"onLeak,omitzero"`
	// KeepRevoked is how long revoked keys are kept before they are removed with their digests.
	KeepRevoked Duration `json:"keepRevoked,omitempty"`
	// Shadow says what is judged and reported, and refuses nobody.
	Shadow Shadow `json:"shadow,omitzero"`
	// Usage says whether requests are counted.
	Usage UsagePolicy `json:"usage,omitzero"`
	// Alerts say what is worth an alert, and how many it takes.
	Alerts Alerts `json:"alerts,omitzero"`
}

// UsagePolicy says whether the requests of an instance are counted. When its keys were last used is kept always.
type UsagePolicy struct {
	Enabled *bool `json:"enabled,omitempty" doc:"False: not counted. Default: true."`
}

// On reports whether requests are counted.
func (u UsagePolicy) On() bool { return u.Enabled == nil || *u.Enabled }

// Shadow names limits and rights that are judged, counted and reported, but not enforced: to see what they
// would do before they do it. Quotas and routes say it for themselves.
type Shadow struct {
	Rate          bool `json:"rate,omitempty" doc:"Every key's rate and burst."`
	MaxConcurrent bool `json:"maxConcurrent,omitempty" doc:"Every key's running requests."`
	Total         bool `json:"total,omitempty" doc:"The rate and burst of all keys together."`
	Scopes        bool `json:"scopes,omitempty" doc:"The scopes that routes require."`
	AllowedIPs    bool `json:"allowedIps,omitempty" doc:"The addresses that keys may be used from."`
}

// Caps bound the keys that are neither revoked nor expired, disabled ones included. Zero inherits,
// [Unlimited] is no cap.
type Caps struct {
	Instance int `json:"instance,omitempty"` // of the instance
	User     int `json:"user,omitempty"`     // of each user
	Agent    int `json:"agent,omitempty"`    // of each agent
}

// Creation bounds the keys that are made within any hour. Zero inherits, [Unlimited] is no limit.
type Creation struct {
	PerHour        int `json:"perHour,omitempty"`        // in the instance
	PerHourAndUser int `json:"perHourAndUser,omitempty"` // by each creator with the role user
}

// An ExpirationPolicy says by what a key expires.
type ExpirationPolicy string

// The expiration policies. A key that expires for inactivity may have a date as well.
const (
	ExpiresNever      ExpirationPolicy = "none"
	ExpiresByTime     ExpirationPolicy = "time"
	ExpiresInactivity ExpirationPolicy = "inactivity"
)

// Expiration says how long keys may live. Every field's zero value inherits.
type Expiration struct {
	Default        ExpirationPolicy `json:"default,omitempty"`        // of a key that says nothing
	Required       bool             `json:"required,omitempty"`       // no key without an end
	Life           Duration         `json:"life,omitempty"`           // of a key that says no more than "time"
	LongestLife    Duration         `json:"longestLife,omitempty"`    // from creation, change or rotation to the date
	InactivityDays int              `json:"inactivityDays,omitempty"` // of a key that says no more than "inactivity"
}

// A LeakAction is what happens to a key whose secret is reported as leaked.
type LeakAction string

// The actions.
const (
	LeakRevokes LeakAction = "revoke" // the secret ends, and with the last one the key
	LeakFlags   LeakAction = "flag"   // the key is marked, and goes on
)

// OnLeak is the action for each type of key; "" inherits.
type OnLeak struct {
	Instance LeakAction `json:"instance,omitempty"`
	Agent    LeakAction `json:"agent,omitempty"`
	User     LeakAction `json:"user,omitempty"`
}

// Of returns the action for a type of key.
func (o OnLeak) Of(t Type) LeakAction {
	switch t {
	case TypeAgent:
		return o.Agent
	case TypeUser:
		return o.User
	}
	return o.Instance
}

// ShippedPolicy holds where an instance's policy says nothing, but for limits: those are ShippedLimits.
// Agent keys live in public applications, where everybody finds them: a report must not end one.
var ShippedPolicy = Policy{
	Caps:     Caps{Instance: 1000, User: 10, Agent: 20},
	Creation: Creation{PerHour: 60, PerHourAndUser: 20},
	Expiration: Expiration{
		Default: ExpiresNever, Life: Duration(120 * day), LongestLife: Duration(365 * day), InactivityDays: 90,
	},
	OnLeak:      OnLeak{Instance: LeakRevokes, Agent: LeakFlags, User: LeakRevokes},
	KeepRevoked: Duration(90 * day),
	Alerts:      ShippedAlerts,
}

// InForce returns p with what it does not say taken from [ShippedPolicy]. Limits inherit in LimitsOf.
func (p Policy) InForce() Policy {
	s := &ShippedPolicy
	p.Caps = Caps{cmp.Or(p.Caps.Instance, s.Caps.Instance), cmp.Or(p.Caps.User, s.Caps.User), cmp.Or(p.Caps.Agent, s.Caps.Agent)}
	p.Creation = Creation{cmp.Or(p.Creation.PerHour, s.Creation.PerHour), cmp.Or(p.Creation.PerHourAndUser, s.Creation.PerHourAndUser)}
	e, d := p.Expiration, s.Expiration
	p.Expiration = Expiration{
		Default: cmp.Or(e.Default, d.Default), Required: e.Required, Life: cmp.Or(e.Life, d.Life),
		LongestLife: cmp.Or(e.LongestLife, d.LongestLife), InactivityDays: cmp.Or(e.InactivityDays, d.InactivityDays),
	}
	if e.Life == 0 { // what nobody said must not be refused for what somebody did
		p.Expiration.Life = min(d.Life, p.Expiration.LongestLife)
	}
	p.OnLeak = OnLeak{cmp.Or(p.OnLeak.Instance, s.OnLeak.Instance), cmp.Or(p.OnLeak.Agent, s.OnLeak.Agent), cmp.Or(p.OnLeak.User, s.OnLeak.User)}
	p.KeepRevoked = cmp.Or(p.KeepRevoked, s.KeepRevoked)
	p.Alerts = p.Alerts.InForce()
	return p
}

const (
	// MaxInactivityDays is the longest period of idleness after which a key can expire.
	MaxInactivityDays = 365
	maxLife           = 3650 * day
	minLife           = time.Hour
	minKeep           = day
)

// Defaults are the limits of each type of key.
type Defaults struct {
	Instance Limits `json:"instance,omitzero"`
	Agent    Limits `json:"agent,omitzero"`
	User     Limits `json:"user,omitzero"`
}

// Validate reports the first field that cannot be meant.
func (p *Policy) Validate() error {
	for _, d := range []struct {
		field string
		Limits
	}{
		{"defaults.instance", p.Defaults.Instance},
		{"defaults.agent", p.Defaults.Agent},
		{"defaults.user", p.Defaults.User},
		{"total", p.Total},
	} {
		if err := d.Validate(d.field); err != nil {
			return err
		}
	}
	if p.Total.MaxConcurrent != 0 {
		return Invalid("total.maxConcurrent", "is not a limit: only keys have max-concurrent")
	}
	if p.Total.Burst > 0 && p.Total.Rate.Requests <= 0 {
		return Invalid("total.burst", "needs a rate")
	}
	if p.Total.Rate.Requests > 0 && p.Total.Burst == 0 {
		return Invalid("total.burst", "is missing: a total rate needs one, and there is nothing to inherit")
	}
	if err := p.validateLife(); err != nil {
		return err
	}
	if err := p.Alerts.Validate(); err != nil {
		bad, _ := errors.AsType[*InvalidError](err)
		return Invalid("alerts."+bad.Field, bad.Reason)
	}
	return nil
}

// validateLife reports the first field about numbers and lives of keys that cannot be meant.
func (p *Policy) validateLife() error {
	for _, c := range []struct {
		field string
		n     int
	}{
		{"caps.instance", p.Caps.Instance},
		{"caps.user", p.Caps.User},
		{"caps.agent", p.Caps.Agent},
		{"creation.perHour", p.Creation.PerHour},
		{"creation.perHourAndUser", p.Creation.PerHourAndUser},
	} {
		if err := validCount(c.field, c.n); err != nil {
			return err
		}
	}
	e := p.Expiration
	switch e.Default {
	case "", ExpiresNever, ExpiresByTime, ExpiresInactivity:
	default:
		return Invalid("expiration.default", "must be none, time or inactivity")
	}
	for _, d := range []struct {
		field string
		Duration
	}{{"expiration.life", e.Life}, {"expiration.longestLife", e.LongestLife}} {
		if d.Duration != 0 && (d.Std() < minLife || d.Std() > maxLife) {
			return Invalid(d.field, "must be from 1h to 3650d")
		}
	}
	if e.Life > p.InForce().Expiration.LongestLife {
		return Invalid("expiration.life", "must be at most the longest life")
	}
	if e.InactivityDays < 0 || e.InactivityDays > MaxInactivityDays {
		return Invalid("expiration.inactivityDays", "must be from 1 to 365")
	}
	for _, l := range []struct {
		field  string
		action LeakAction
	}{{"onLeak.instance", p.OnLeak.Instance}, {"onLeak.agent", p.OnLeak.Agent}, {"onLeak.user", p.OnLeak.User}} {
		if l.action != "" && l.action != LeakRevokes && l.action != LeakFlags {
			return Invalid(l.field, "must be revoke or flag")
		}
	}
	if p.KeepRevoked != 0 && (p.KeepRevoked.Std() < minKeep || p.KeepRevoked.Std() > maxLife) {
		return Invalid("keepRevoked", "must be from 1d to 3650d")
	}
	return nil
}

// LimitsOf returns the limits in force for k: its own, then the policy's for its type, then the shipped.
func (p *Policy) LimitsOf(k *Key) Limits {
	inherited := &p.Defaults.Instance
	switch k.Type {
	case TypeAgent:
		inherited = &p.Defaults.Agent
	case TypeUser:
		inherited = &p.Defaults.User
	}
	return k.Limits.Or(*inherited).Or(ShippedLimits)
}

const maxInstanceID = 128

// CanonicalInstanceID returns the one spelling of an instance id: lower case for a GUID, which is
// compared without case; any other id is [A-Za-z][A-Za-z0-9_-]* and exact.
func CanonicalInstanceID(s string) (string, error) {
	if id, err := ParseID(s); err == nil {
		return id.String(), nil
	}
	ok := s != "" && len(s) <= maxInstanceID && isLetter(s[0])
	for i := 1; i < len(s) && ok; i++ {
		c := s[i]
		ok = isLetter(c) || '0' <= c && c <= '9' || c == '_' || c == '-'
	}
	if !ok {
		return "", Invalid("instanceId", "must be a GUID, or a letter followed by letters, digits, _ and -, at most 128")
	}
	return s, nil
}

// IsInstance reports whether s, as a request spells it, names the instance with the canonical id.
func IsInstance(canonical, s string) bool {
	if canonical == s {
		return true
	}
	if len(s) != 36 || !strings.EqualFold(canonical, s) {
		return false
	}
	_, err := ParseID(s)
	return err == nil
}

func isLetter(c byte) bool { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' }
