package apikey

import (
	"strings"
	"time"
)

// An Instance is a tenant: it owns keys, policy, quotas and audit.
type Instance struct {
	ID        string // canonical, see CanonicalInstanceID
	Policy    Policy
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
}

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
