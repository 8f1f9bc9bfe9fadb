package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"time"

	"keyward/authz/apikey"
)

// A Member is a member of a merge patch (RFC 7396): absent, null, or with a value. Absent says nothing,
// null takes away what is there.
type Member[T any] struct {
	Present, Null bool
	Value         T
}

// To returns a member that sets a value.
func To[T any](v T) Member[T] { return Member[T]{Present: true, Value: v} }

// Null returns a member that takes a value away.
func Null[T any]() Member[T] { return Member[T]{Present: true, Null: true} }

// IsZero reports whether the member is absent.
func (m Member[T]) IsZero() bool { return !m.Present }

// MarshalJSON writes null or the value. An absent member is left out with omitzero.
func (m Member[T]) MarshalJSON() ([]byte, error) {
	if m.Null || !m.Present {
		return []byte("null"), nil
	}
	return json.Marshal(m.Value)
}

// UnmarshalJSON reads null or a value.
func (m *Member[T]) UnmarshalJSON(b []byte) error {
	*m = Member[T]{Present: true, Null: bytes.Equal(bytes.TrimSpace(b), []byte("null"))}
	if m.Null {
		return nil
	}
	return json.Unmarshal(b, &m.Value)
}

// A KeyPatch is a change to a key, as a merge patch. What of a key cannot be changed stands in it only so
// that the answer can say so: it is accepted where it says what is so already.
type KeyPatch struct {
	Name           Member[string]             `json:"name,omitzero"`
	Description    Member[string]             `json:"description,omitzero"`
	Scopes         Member[[]string]           `json:"scopes,omitzero" doc:"null: every right that the instance's policy allows."`
	AllowedIPs     Member[[]string]           `json:"allowedIps,omitzero" doc:"null: from everywhere."`
	Limits         Member[LimitsPatch]        `json:"limits,omitzero" doc:"null: all inherited."`
	Metadata       Member[map[string]*string] `json:"metadata,omitzero" doc:"Member by member; null removes."`
	Disabled       Member[bool]               `json:"disabled,omitzero"`
	ExpirationDate Member[string]             `json:"expirationDate,omitzero" doc:"null: no date."`
	ExpiresIn      Member[string]             `json:"expiresIn,omitzero" doc:"Instead of a date, from now. null changes nothing."`
	InactivityDays Member[int]                `json:"inactivityDays,omitzero" doc:"null: does not expire for inactivity."`
	// ExpirationPolicy none takes date and days away, time the days, inactivity neither.
	ExpirationPolicy Member[apikey.ExpirationPolicy] `json:"expirationPolicy,omitzero"`

	Type              Member[string] `json:"type,omitzero" doc:"Cannot be changed."`
	AgentName         Member[string] `json:"agentName,omitzero" doc:"Cannot be changed."`
	UserPrincipalName Member[string] `json:"userPrincipalName,omitzero" doc:"Cannot be changed."`
	Environment       Member[string] `json:"environment,omitzero" doc:"Cannot be changed."`
	NotBefore         Member[string] `json:"notBefore,omitzero" doc:"Cannot be changed."`

	Quotas Member[map[string]*apikey.QuotaOverride] `json:"quotas,omitzero" doc:"By the names of quotas; null inherits."`
}

// A LimitsPatch changes limits one by one; null inherits.
type LimitsPatch struct {
	Rate          Member[RatePatch] `json:"rate,omitzero"`
	Burst         Member[int]       `json:"burst,omitzero"`
	MaxConcurrent Member[int]       `json:"maxConcurrent,omitzero"`
}

// A RatePatch changes a rate.
type RatePatch struct {
	Requests Member[int]    `json:"requests,omitzero"`
	Per      Member[string] `json:"per,omitzero"`
}

// A KeyChange is a key that was changed.
type KeyChange struct {
	Key         *apikey.Key
	Propagation Propagation
}

// UpdateKey changes a key. ifMatch is the Revision that the caller saw, 0 for whatever it is now.
//
// A change that may take something away waits for the replicas as a revocation does. A change of nothing
// is no change. An expired key can be given a new life, a revoked one cannot be changed at all.
// Errors: [ErrPrecondition], *StateError, *QuotaExceededError where the change makes one more usable key.
func (s *Service) UpdateKey(ctx context.Context, caller Caller, instanceID string, id apikey.ID, patch KeyPatch, ifMatch apikey.Revision) (KeyChange, error) {
	instance, err := caller.mayIn(instanceID, updateKey)
	if err != nil {
		return KeyChange{}, err
	}
	var old, k *apikey.Key
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		in, err := tx.Instance(ctx, instance)
		if err != nil {
			return err
		}
		if old, err = s.key(ctx, tx, caller, instance, id); err != nil {
			return err
		}
		at, policy := now(), in.Policy.InForce()
		if err := mayChange(old, ifMatch); err != nil {
			return err
		}
		if left, _ := patchQuotas(old.Quotas, patch.Quotas); caller.Role == RoleUser && patch.Quotas.Present && !sameOverrides(left, old.Quotas) {
			return usersQuotas() // before anything is said of the instance's quotas, which are not the user's to see
		}
		if k, err = patch.apply(s.cfg.Format, old, &policy, in.Quotas, at); err != nil {
			return err
		}
		if reflect.DeepEqual(old, k) {
			return errNothing
		}
		if caller.Role == RoleUser && k.Limits != old.Limits {
			return usersLimits()
		}
		if caller.Role == RoleUser && old.Disabled && !k.Disabled {
			return &ForbiddenError{Field: "disabled", Reason: "must stay: who disabled the key may have had a reason, so an operator enables it"}
		}
		if err := tx.UpdateKey(ctx, k); err != nil {
			return err
		}
		if over(old, at) && !over(k, at) || old.Disabled && !k.Disabled {
			if err := withinCaps(ctx, tx, k, policy.Caps, 0, at); err != nil {
				return err
			}
		}
		action := updateKey
		switch {
		case k.Disabled && !old.Disabled:
			action = disableKey
		case old.Disabled && !k.Disabled:
			action = enableKey
		}
		return caller.audit(ctx, tx, action, instance, id.String(), auditOf(old), auditOf(k))
	})
	if rev, err = s.ofKey(ctx, k, rev, err); err != nil {
		return KeyChange{}, err
	}
	wait := revokeWait
	if sameRights(old, k) {
		wait = createWait
	}
	return KeyChange{Key: k, Propagation: s.propagate(ctx, rev, wait)}, nil
}

// mayChange refuses a key that has changed since it was seen, and one that is revoked.
func mayChange(k *apikey.Key, ifMatch apikey.Revision) error {
	if ifMatch != 0 && ifMatch != IfThere && ifMatch != k.Revision {
		return ErrPrecondition
	}
	if !k.RevokedAt.IsZero() {
		return &StateError{"the key is revoked, for good: create another one"}
	}
	return nil
}

// over reports whether a key has expired at a time, whatever else is with it.
func over(k *apikey.Key, at time.Time) bool {
	return !k.ExpirationDate.IsZero() && at.After(k.ExpirationDate) || k.IdleAt(at, k.LastUsedAt)
}

// sameRights reports whether two records of a key differ in nothing that a decision looks at.
func sameRights(a, b *apikey.Key) bool {
	x, y := *a, *b
	for _, k := range []*apikey.Key{&x, &y} {
		k.Name, k.Description, k.Metadata, k.Revision, k.LeakReportedAt = "", "", nil, 0, time.Time{}
	}
	return reflect.DeepEqual(x, y)
}

// apply returns k as the patch makes it. policy is in force.
func (p *KeyPatch) apply(format apikey.Format, k *apikey.Key, policy *apikey.Policy, quotas []apikey.Quota, at time.Time) (*apikey.Key, error) {
	changed := *k
	var bad faults
	notBefore := ""
	if !k.NotBefore.IsZero() {
		notBefore = k.NotBefore.UTC().Format(time.RFC3339Nano)
	}
	for _, fixed := range []struct {
		field string
		said  Member[string]
		is    string
	}{
		{"type", p.Type, string(k.Type)},
		{"agentName", p.AgentName, k.AgentName},
		{"userPrincipalName", p.UserPrincipalName, k.UserPrincipalName},
		{"environment", p.Environment, k.Environment},
		{"notBefore", p.NotBefore, notBefore},
	} {
		if fixed.said.Present && fixed.said.Value != fixed.is {
			bad.add(apikey.Invalid(fixed.field, "cannot be changed: create another key"))
		}
	}
	if p.Name.Present {
		changed.Name = p.Name.Value
	}
	if p.Description.Present {
		changed.Description = p.Description.Value
	}
	if p.Metadata.Present {
		changed.Metadata = patchMetadata(k.Metadata, p.Metadata)
	}
	if p.Name.Present || p.Description.Present || p.Metadata.Present {
		// Not otherwise: what was accepted once, before another foreign shape was registered say, must not keep
		// anybody from disabling the key.
		bad.add(words(format, &changed))
	}
	var err error
	if p.Scopes.Present {
		changed.Scopes, err = parseScopes("scopes", p.Scopes.Value) // nil for null
		bad.add(err)
		if !p.Scopes.Null && p.Scopes.Value == nil {
			changed.Scopes = apikey.Scopes{}
		}
		bad.add(allowed(policy, changed.Scopes))
		bad.add(noSecretScope(format, "scopes", changed.Scopes))
	}
	if p.AllowedIPs.Present {
		list := p.AllowedIPs.Value
		if !p.AllowedIPs.Null && list == nil {
			list = []string{}
		}
		changed.AllowedIPs, err = parsePrefixes("allowedIps", list)
		bad.add(err)
	}
	if p.Limits.Present {
		limits := patchLimits(k.Limits, p.Limits)
		changed.Limits, err = limits.Limits("limits")
		bad.add(err)
	}
	if p.Quotas.Present {
		var said map[string]apikey.QuotaOverride
		changed.Quotas, said = patchQuotas(k.Quotas, p.Quotas)
		bad.add(overrides(quotas, k.Type, said)) // what stays may be of a quota that is gone
		if len(changed.Quotas) > apikey.MaxQuotas {
			bad.add(apikey.Invalid("quotas", fmt.Sprintf("has more than %d entries", apikey.MaxQuotas)))
		}
	}
	switch {
	case p.Disabled.Null:
		bad.add(apikey.Invalid("disabled", "must be true or false"))
	case p.Disabled.Present:
		changed.Disabled = p.Disabled.Value
	}
	changed.ExpirationDate, changed.InactivityDays, err = p.life(k, &policy.Expiration, at)
	bad.add(err)
	return &changed, bad.err()
}

// life returns the date and the days of inactivity that the patch leaves k with.
func (p *KeyPatch) life(k *apikey.Key, policy *apikey.Expiration, at time.Time) (time.Time, int, error) {
	date, days := k.ExpirationDate, k.InactivityDays
	if !p.ExpirationPolicy.Present && !p.ExpirationDate.Present && !p.ExpiresIn.Present && !p.InactivityDays.Present {
		return date, days, nil // what the policy says now is for what is changed now
	}
	if p.ExpirationPolicy.Null {
		return date, days, apikey.Invalid("expirationPolicy", "must be none, time or inactivity")
	}
	for _, text := range []struct {
		field string
		said  Member[string]
	}{{"expirationDate", p.ExpirationDate}, {"expiresIn", p.ExpiresIn}, {"expirationPolicy", Member[string]{p.ExpirationPolicy.Present, false, string(p.ExpirationPolicy.Value)}}} {
		if text.said.Present && !text.said.Null && text.said.Value == "" { // an empty field of a form takes no date away
			return date, days, apikey.Invalid(text.field, "must not be empty: leave it out to change nothing")
		}
	}
	said := lifeInput{policy: p.ExpirationPolicy.Value, date: p.ExpirationDate.Value, expiresIn: p.ExpiresIn.Value}
	given, err := said.end(policy.LongestLife.Std(), at)
	switch {
	case err != nil:
		return date, days, err
	case !given.IsZero():
		date = given
	case p.ExpirationDate.Null:
		date = time.Time{}
	}
	switch {
	case p.InactivityDays.Null:
		days = 0
	case p.InactivityDays.Present:
		if days, err = inactivityDays(p.InactivityDays.Value); err != nil {
			return date, days, err
		}
	}
	switch said.policy {
	case "":
	case apikey.ExpiresNever:
		if !given.IsZero() || p.InactivityDays.Value != 0 {
			return date, days, apikey.Invalid("expirationPolicy", "none does not go with expirationDate, expiresIn or inactivityDays")
		}
		date, days = time.Time{}, 0
	case apikey.ExpiresByTime:
		if p.InactivityDays.Value != 0 {
			return date, days, apikey.Invalid("inactivityDays", "goes with the expirationPolicy inactivity")
		}
		days = 0
		if date.IsZero() {
			date = at.Add(policy.Life.Std())
		}
	case apikey.ExpiresInactivity:
		if days == 0 {
			days = policy.InactivityDays
		}
	default:
		return date, days, apikey.Invalid("expirationPolicy", "must be none, time or inactivity")
	}
	if !date.IsZero() && !k.NotBefore.Before(date) {
		return date, days, apikey.Invalid("expirationDate", "must be after notBefore")
	}
	return date, days, endless(policy, date, days)
}

// patchMetadata returns the metadata that a patch leaves; nil where nothing is left of it.
func patchMetadata(old map[string]string, patch Member[map[string]*string]) map[string]string {
	if patch.Null {
		return nil
	}
	left := map[string]string{}
	for name, value := range old {
		left[name] = value
	}
	for name, value := range patch.Value {
		if value == nil {
			delete(left, name)
		} else {
			left[name] = *value
		}
	}
	if len(left) == 0 && len(old) == 0 {
		return old
	}
	return left
}

// patchLimits returns limits as people write them, as a patch leaves them.
func patchLimits(old apikey.Limits, patch Member[LimitsPatch]) LimitsInput {
	var in LimitsInput
	if patch.Null {
		return in
	}
	if old.Rate.Requests != 0 {
		in.Rate = &RateInput{Requests: &old.Rate.Requests}
		if old.Rate.Per != 0 {
			in.Rate.Per = old.Rate.Per.String()
		}
	}
	if rate := patch.Value.Rate; rate.Null {
		in.Rate = nil
	} else if rate.Present {
		if in.Rate == nil {
			in.Rate = &RateInput{}
		}
		if r := rate.Value.Requests; r.Present {
			in.Rate.Requests = nil
			if !r.Null {
				in.Rate.Requests = &r.Value
			}
		}
		if rate.Value.Per.Present {
			in.Rate.Per = rate.Value.Per.Value
		}
	}
	for _, count := range []struct {
		old   int
		patch Member[int]
		to    **int
	}{{old.Burst, patch.Value.Burst, &in.Burst}, {old.MaxConcurrent, patch.Value.MaxConcurrent, &in.MaxConcurrent}} {
		switch n := count.patch.Value; {
		case count.patch.Null:
		case count.patch.Present:
			*count.to = &n
		case count.old != 0:
			*count.to = &count.old
		}
	}
	return in
}
