package admin

import (
	"cmp"
	"context"
	"time"

	"github.com/google/uuid"

	"keyward/authz/apikey"
)

// A CreatedKey is a new key with its secret, which is nowhere else: whoever loses it makes another key.
type CreatedKey struct {
	Key         *apikey.Key
	Secret      apikey.Secret
	Propagation Propagation
	Replayed    bool // an earlier request with the same Idempotency-Key made it
}

// CreateKey makes a key with its first secret. The caps and the creation rate of the policy are judged in
// the transaction that makes it, so that they hold to the last key.
// Errors: *QuotaExceededError, *RateError.
func (s *Service) CreateKey(ctx context.Context, caller Caller, instanceID string, in KeyInput) (CreatedKey, error) {
	id, err := caller.mayIn(instanceID, createKey)
	if err != nil {
		return CreatedKey{}, err
	}
	return s.once(ctx, caller, id, createWait, func() (CreatedKey, error) { return s.createKey(ctx, caller, id, in, nil) })
}

// createKey makes a key: with a secret of ours, or as an Agent Access Token, if as is not nil.
func (s *Service) createKey(ctx context.Context, caller Caller, id string, in KeyInput, as *agentToken) (CreatedKey, error) {
	if err := caller.own(&in); err != nil {
		return CreatedKey{}, err
	}
	instance, missing := s.store.Instance(ctx, id)
	if isNotFound(missing) {
		instance = &apikey.Instance{ID: id} // what cannot be accepted anywhere is told first
		in.Quotas = nil
	} else if missing != nil {
		return CreatedKey{}, missing
	}
	// Judged here already, so that what cannot be accepted keeps nobody waiting for the one writer.
	k, err := s.newKey(caller, &in, instance)
	if err := cmp.Or(err, missing); err != nil {
		return CreatedKey{}, err
	}
	kind := k.Type.Kind()
	var secret apikey.Secret
	if as != nil {
		kind, secret = apikey.KindForeign, apikey.NewAgentToken(id, k.AgentName, as.id)
	} else {
		secret = s.cfg.Format.New(kind)
	}
	pepper := s.cfg.Peppers.Current
	digest := pepper.DigestOf(kind, secret.Reveal())
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		instance, err := tx.Instance(ctx, id)
		if err != nil {
			return err
		}
		// And anew: it may have waited for its turn, and the policy may be another one.
		if k, err = s.newKey(caller, &in, instance); err != nil {
			return err
		}
		if as != nil {
			k.ID, k.Disabled = as.id, as.disabled
		}
		k.Generations = []apikey.Generation{{Number: 1, Hint: s.cfg.Format.Hint(secret), CreatedAt: k.CreatedAt}}
		policy := instance.Policy.InForce()
		if err := mayCreate(ctx, tx, caller, id, policy.Creation, k.CreatedAt); err != nil {
			return err
		}
		if err := withinCaps(ctx, tx, k, policy.Caps, 1, k.CreatedAt); err != nil {
			return err
		}
		if err := tx.InsertKey(ctx, k); err != nil {
			return err
		}
		if err := tx.InsertGeneration(ctx, k.ID, k.Generations[0], digest, pepper.Version()); err != nil {
			return err
		}
		if err := s.keepReplay(ctx, tx, caller, id, k.ID, 1, secret); err != nil {
			return err
		}
		return caller.audit(ctx, tx, createKey, id, k.ID.String(), nil, auditOf(k))
	})
	if err != nil {
		return CreatedKey{}, err
	}
	k.Revision = rev
	return CreatedKey{Key: k, Secret: secret, Propagation: s.propagate(ctx, rev, createWait)}, nil
}

// newKey checks in and makes the key that it describes, without a secret.
func (s *Service) newKey(caller Caller, in *KeyInput, instance *apikey.Instance) (*apikey.Key, error) {
	policy := instance.Policy.InForce()
	k, err := in.key(s.cfg.Format, &policy, now())
	var bad faults
	bad.add(err)
	bad.add(overrides(instance.Quotas, k.Type, k.Quotas))
	if err := bad.err(); err != nil {
		return nil, err
	}
	k.ID, k.InstanceID, k.CreatedBy = newID(), instance.ID, caller.Name
	return k, nil
}

// own makes a key that a user asks for the user's own. What is not the user's to decide is refused.
func (c Caller) own(in *KeyInput) error {
	if c.Role != RoleUser {
		return nil
	}
	switch {
	case in.Type != "" && in.Type != apikey.TypeUser:
		return &ForbiddenError{Field: "type", Reason: "must be user: the role user makes keys of its own only"}
	case in.UserPrincipalName != "" && in.UserPrincipalName != c.UserPrincipalName:
		return &ForbiddenError{Field: "userPrincipalName", Reason: "must be the caller's own: the role user makes keys of its own only"}
	case in.Limits != (LimitsInput{}):
		return usersLimits()
	case len(in.Quotas) > 0:
		return usersQuotas()
	}
	in.Type, in.UserPrincipalName = apikey.TypeUser, c.UserPrincipalName
	return nil
}

// usersLimits refuses limits, lower ones too: they would stay where they are when the policy's go down.
func usersLimits() error {
	return &ForbiddenError{Field: "limits", Reason: "are not the role user's to choose: the instance's policy has them"}
}

// allowed refuses a scope that the policy would take away again at every decision. A key without
// scopes has what the policy allows.
func allowed(p *apikey.Policy, scopes apikey.Scopes) error {
	for _, scope := range scopes {
		if !p.AllowedScopes.Cover(scope) {
			return &ForbiddenError{Field: "scopes", Reason: "has a scope that the instance's allowedScopes do not cover"}
		}
	}
	return nil
}

// Key returns one key.
func (s *Service) Key(ctx context.Context, caller Caller, instanceID string, id apikey.ID) (*apikey.Key, error) {
	instance, err := caller.mayIn(instanceID, readKeys)
	if err != nil {
		return nil, err
	}
	return s.key(ctx, s.store, caller, instance, id)
}

// key returns a key that exists for the caller.
func (s *Service) key(ctx context.Context, from Reader, caller Caller, instance string, id apikey.ID) (*apikey.Key, error) {
	k, err := from.Key(ctx, instance, id)
	if err == nil && !caller.owns(k) {
		return nil, apikey.ErrNotFound
	}
	return k, err
}

// newID makes an id whose order is that of creation.
func newID() apikey.ID { return apikey.ID(uuid.Must(uuid.NewV7())) }

// A KeyRecord is a key as people read it: in the API, on the command line, in the audit. It holds no
// secret and no digest.
type KeyRecord struct {
	ID                apikey.ID               `json:"id" format:"uuid"`
	InstanceID        string                  `json:"instanceId"`
	Name              string                  `json:"name"`
	Description       string                  `json:"description,omitempty"`
	Type              apikey.Type             `json:"type" enum:"instance,agent,user"`
	AgentName         string                  `json:"agentName,omitempty" doc:"Set for agent keys only."`
	UserPrincipalName string                  `json:"userPrincipalName,omitempty" doc:"Set for user keys only."`
	Scopes            []string                `json:"scopes,omitzero" nullable:"false" doc:"Absent: every right that the instance's policy allows. Empty: none."`
	Environment       string                  `json:"environment,omitempty"`
	AllowedIPs        []string                `json:"allowedIps,omitempty" nullable:"false" doc:"Absent: from everywhere."`
	Limits            apikey.Limits           `json:"limits" doc:"What is absent is inherited from the instance's policy; -1 is unlimited."`
	ExpirationPolicy  apikey.ExpirationPolicy `json:"expirationPolicy" enum:"none,time,inactivity"`
	ExpirationDate    time.Time               `json:"expirationDate,omitzero"`
	InactivityDays    int                     `json:"inactivityDays,omitempty"`
	IdleAfter         time.Time               `json:"idleAfter,omitzero" doc:"When it will have expired for inactivity, unless it is used before. Up to a minute behind."`
	NotBefore         time.Time               `json:"notBefore,omitzero"`
	Metadata          map[string]string       `json:"metadata,omitempty"`
	Status            string                  `json:"status" enum:"active,disabled,revoked,expired"`
	Hint              string                  `json:"hint" doc:"Prefix and last four characters of the newest secret."`
	CreatedAt         time.Time               `json:"createdAt"`
	CreatedBy         string                  `json:"createdBy"`
	LastUsedAt        time.Time               `json:"lastUsedAt,omitzero" doc:"Up to a minute behind."`
	LastUsedNetwork   string                  `json:"lastUsedNetwork,omitempty" doc:"From which network that was: a /24, or a /48 of IPv6."`
	LastUsedPath      string                  `json:"lastUsedPath,omitempty" doc:"On which route: its host and path, as the configuration has them."`
	LeakReportedAt    time.Time               `json:"leakReportedAt,omitzero" doc:"When somebody reported a secret of it as leaked."`
	Generations       []GenerationRecord      `json:"generations" nullable:"false"`

	Quotas map[string]apikey.QuotaOverride `json:"quotas,omitempty" doc:"By the names of quotas of the instance: the limit that the key has instead; -1 is unlimited. It says nothing while there is no quota of that name that counts the key alone."`
}

// A GenerationRecord is one secret of a key, as people read it.
type GenerationRecord struct {
	Number     int       `json:"number"`
	Hint       string    `json:"hint"`
	CreatedAt  time.Time `json:"createdAt"`
	ValidUntil time.Time `json:"validUntil,omitzero"`
	LastUsedAt time.Time `json:"lastUsedAt,omitzero"`
	Revoked    bool      `json:"revoked,omitempty" doc:"Ended at once, at validUntil."`
}

// RecordOf returns k as people read it at a time.
func RecordOf(k *apikey.Key, at time.Time) KeyRecord {
	r := KeyRecord{
		ID:                k.ID,
		InstanceID:        k.InstanceID,
		Name:              k.Name,
		Description:       k.Description,
		Type:              k.Type,
		AgentName:         k.AgentName,
		UserPrincipalName: k.UserPrincipalName,
		Scopes:            k.Scopes.Strings(),
		Environment:       k.Environment,
		Limits:            k.Limits,
		Quotas:            k.Quotas,
		ExpirationPolicy:  apikey.ExpiresNever,
		ExpirationDate:    k.ExpirationDate.UTC(),
		InactivityDays:    k.InactivityDays,
		NotBefore:         k.NotBefore.UTC(),
		Metadata:          k.Metadata,
		IdleAfter:         k.IdleAfter().UTC(),
		Status:            statusOf(k, at),
		CreatedAt:         k.CreatedAt.UTC(),
		CreatedBy:         k.CreatedBy,
		LastUsedAt:        k.LastUsedAt.UTC(),
		LastUsedNetwork:   k.LastUsedNetwork,
		LastUsedPath:      k.LastUsedPath,
		LeakReportedAt:    k.LeakReportedAt.UTC(),
		Generations:       make([]GenerationRecord, len(k.Generations)),
	}
	for _, p := range k.AllowedIPs {
		r.AllowedIPs = append(r.AllowedIPs, p.String())
	}
	switch {
	case k.InactivityDays != 0:
		r.ExpirationPolicy = apikey.ExpiresInactivity // and perhaps a date as well
	case !k.ExpirationDate.IsZero():
		r.ExpirationPolicy = apikey.ExpiresByTime
	}
	for i, g := range k.Generations {
		r.Generations[i] = GenerationRecord{g.Number, g.Hint, g.CreatedAt.UTC(), g.ValidUntil.UTC(), g.LastUsedAt.UTC(), g.Revoked}
	}
	if newest := k.Newest(); newest != nil {
		r.Hint = newest.Hint
	}
	return r
}

// A keyAudit is what the audit keeps of a key.
type keyAudit struct {
	KeyRecord
	RevokedAt     time.Time               `json:"revokedAt,omitzero"`
	RevokedReason apikey.RevocationReason `json:"revokedReason,omitempty"`
}

func auditOf(k *apikey.Key) keyAudit {
	return keyAudit{KeyRecord: RecordOf(k, now()), RevokedAt: k.RevokedAt.UTC(), RevokedReason: k.RevokedReason}
}
