package admin

import (
	"context"
	"errors"
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

// CreateKey makes a key with its first secret.
func (s *Service) CreateKey(ctx context.Context, caller Caller, instanceID string, in KeyInput) (CreatedKey, error) {
	id, err := caller.mayIn(instanceID, createKey)
	if err != nil {
		return CreatedKey{}, err
	}
	if made, found, err := s.replay(ctx, caller, id); found || err != nil {
		return made, err
	}
	if in, err = caller.own(in); err != nil {
		return CreatedKey{}, err
	}
	k, err := in.key(s.cfg.Format, now())
	if err != nil {
		return CreatedKey{}, err
	}
	secret := s.cfg.Format.New(k.Type.Kind())
	k.ID, k.InstanceID, k.CreatedBy = newID(), id, caller.Name
	k.Generations = []apikey.Generation{{Number: 1, Hint: s.cfg.Format.Hint(secret), CreatedAt: k.CreatedAt}}

	pepper := s.cfg.Peppers.Current
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		instance, err := tx.Instance(ctx, id)
		if err != nil {
			return err
		}
		if err := allowed(&instance.Policy, k.Scopes); err != nil {
			return err
		}
		if err := tx.InsertKey(ctx, k); err != nil {
			return err
		}
		if err := tx.InsertGeneration(ctx, k.ID, k.Generations[0], pepper.Digest(secret.Reveal()), pepper.Version()); err != nil {
			return err
		}
		if err := s.keepReplay(ctx, tx, caller, id, k.ID, 1, secret); err != nil {
			return err
		}
		return caller.audit(ctx, tx, createKey, id, k.ID.String(), nil, auditOf(k))
	})
	if errors.Is(err, errReplayed) {
		made, found, err := s.replay(ctx, caller, id)
		if err == nil && !found {
			err = apikey.ErrConflict // the other one's time ran out at this very moment
		}
		return made, err
	}
	if err != nil {
		return CreatedKey{}, err
	}
	return CreatedKey{Key: k, Secret: secret, Propagation: s.propagate(ctx, rev, createWait)}, nil
}

// own makes a key that a user asks for the user's own. What is not the user's to decide is refused.
func (c Caller) own(in KeyInput) (KeyInput, error) {
	if c.Role != RoleUser {
		return in, nil
	}
	if in.Type == "" {
		in.Type = apikey.TypeUser
	}
	if in.UserPrincipalName == "" {
		in.UserPrincipalName = c.UserPrincipalName
	}
	switch {
	case in.Type != apikey.TypeUser:
		return in, &ForbiddenError{Field: "type", Reason: "must be user: the role user makes keys of its own only"}
	case in.UserPrincipalName != c.UserPrincipalName:
		return in, &ForbiddenError{Field: "userPrincipalName", Reason: "must be the caller's own: the role user makes keys of its own only"}
	case in.Limits != (LimitsInput{}):
		return in, &ForbiddenError{Field: "limits", Reason: "are not the role user's to choose: the instance's policy has them"}
	}
	return in, nil
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
	k, err := s.store.Key(ctx, instance, id)
	if err != nil {
		return nil, err
	}
	if !caller.owns(k) {
		return nil, apikey.ErrNotFound
	}
	return k, nil
}

// Keys lists keys of an instance, newest first, at most limit, from the place after which to begin.
func (s *Service) Keys(ctx context.Context, caller Caller, instanceID string, after KeyPlace, limit int) ([]*apikey.Key, error) {
	instance, err := caller.mayIn(instanceID, readKeys)
	if err != nil {
		return nil, err
	}
	if _, err := s.store.Instance(ctx, instance); err != nil {
		return nil, err // to tell no keys from no instance
	}
	if caller.Role != RoleUser {
		return s.store.Keys(ctx, instance, after, limit)
	}
	var own []*apikey.Key
	for len(own) < limit {
		page, err := s.store.Keys(ctx, instance, after, keysPage)
		if err != nil {
			return nil, err
		}
		for _, k := range page {
			if caller.owns(k) && len(own) < limit {
				own = append(own, k)
			}
		}
		if len(page) < keysPage {
			break
		}
		last := page[len(page)-1]
		after = KeyPlace{CreatedAt: last.CreatedAt, ID: last.ID}
	}
	return own, nil
}

// keysPage is how many keys are read at a time where most are not the caller's.
const keysPage = 1000

// A Revocation is a key that is over.
type Revocation struct {
	Key         *apikey.Key
	Propagation Propagation
}

var errRevokedAlready = errors.New("revoked already")

// RevokeKey ends a key for good. Repeating it changes nothing, and tells anew how far it has come.
func (s *Service) RevokeKey(ctx context.Context, caller Caller, instanceID string, id apikey.ID, reason string) (Revocation, error) {
	instance, err := caller.mayIn(instanceID, revokeKey)
	if err != nil {
		return Revocation{}, err
	}
	var bad faults
	bad.add(text("reason", reason, 0, 256, ""))
	bad.add(noSecret(s.cfg.Format, "reason", reason))
	if err := bad.err(); err != nil {
		return Revocation{}, err
	}
	var k *apikey.Key
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		old, err := tx.Key(ctx, instance, id)
		if err != nil {
			return err
		}
		if !caller.owns(old) {
			return apikey.ErrNotFound
		}
		if !old.RevokedAt.IsZero() {
			k = old
			return errRevokedAlready
		}
		revoked := *old
		revoked.RevokedAt, revoked.RevokedReason = now(), reason
		if err := tx.UpdateKey(ctx, &revoked); err != nil {
			return err
		}
		k = &revoked
		return caller.audit(ctx, tx, revokeKey, instance, id.String(), auditOf(old), auditOf(k))
	})
	if errors.Is(err, errRevokedAlready) {
		rev, err = s.head(ctx)
	}
	if err != nil {
		return Revocation{}, err
	}
	return Revocation{Key: k, Propagation: s.propagate(ctx, rev, revokeWait)}, nil
}

// newID makes an id whose order is that of creation.
func newID() apikey.ID { return apikey.ID(uuid.Must(uuid.NewV7())) }

// A KeyRecord is a key as people read it: in the API, on the command line, in the audit. It holds no
// secret and no digest.
type KeyRecord struct {
	ID                apikey.ID          `json:"id" format:"uuid"`
	InstanceID        string             `json:"instanceId"`
	Name              string             `json:"name"`
	Description       string             `json:"description,omitempty"`
	Type              apikey.Type        `json:"type" enum:"instance,agent,user"`
	AgentName         string             `json:"agentName,omitempty" doc:"Set for agent keys only."`
	UserPrincipalName string             `json:"userPrincipalName,omitempty" doc:"Set for user keys only."`
	Scopes            []string           `json:"scopes,omitzero" nullable:"false" doc:"Absent: every right that the instance's policy allows. Empty: none."`
	Environment       string             `json:"environment,omitempty"`
	AllowedIPs        []string           `json:"allowedIps,omitempty" nullable:"false" doc:"Absent: from everywhere."`
	Limits            apikey.Limits      `json:"limits" doc:"What is absent is inherited from the instance's policy; -1 is unlimited."`
	ExpirationPolicy  string             `json:"expirationPolicy" enum:"none,time,inactivity"`
	ExpirationDate    time.Time          `json:"expirationDate,omitzero"`
	InactivityDays    int                `json:"inactivityDays,omitempty"`
	NotBefore         time.Time          `json:"notBefore,omitzero"`
	Metadata          map[string]string  `json:"metadata,omitempty"`
	Status            string             `json:"status" enum:"active,disabled,revoked,expired"`
	Hint              string             `json:"hint" doc:"Prefix and last four characters of the newest secret."`
	CreatedAt         time.Time          `json:"createdAt"`
	CreatedBy         string             `json:"createdBy"`
	LastUsedAt        time.Time          `json:"lastUsedAt,omitzero" doc:"Up to a minute behind."`
	Generations       []GenerationRecord `json:"generations" nullable:"false"`
}

// A GenerationRecord is one secret of a key, as people read it.
type GenerationRecord struct {
	Number     int       `json:"number"`
	Hint       string    `json:"hint"`
	CreatedAt  time.Time `json:"createdAt"`
	ValidUntil time.Time `json:"validUntil,omitzero"`
	LastUsedAt time.Time `json:"lastUsedAt,omitzero"`
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
		ExpirationPolicy:  "none",
		ExpirationDate:    k.ExpirationDate.UTC(),
		InactivityDays:    k.InactivityDays,
		NotBefore:         k.NotBefore.UTC(),
		Metadata:          k.Metadata,
		Status:            "active",
		CreatedAt:         k.CreatedAt.UTC(),
		CreatedBy:         k.CreatedBy,
		LastUsedAt:        k.LastUsedAt.UTC(),
		Generations:       make([]GenerationRecord, len(k.Generations)),
	}
	for _, p := range k.AllowedIPs {
		r.AllowedIPs = append(r.AllowedIPs, p.String())
	}
	switch {
	case k.InactivityDays != 0:
		r.ExpirationPolicy = "inactivity" // and perhaps a date as well
	case !k.ExpirationDate.IsZero():
		r.ExpirationPolicy = "time"
	}
	switch k.StatusAt(at) {
	case apikey.StatusRevoked:
		r.Status = "revoked"
	case apikey.StatusDisabled:
		r.Status = "disabled"
	case apikey.StatusExpired, apikey.StatusIdle:
		r.Status = "expired"
	}
	newest := 0
	for i, g := range k.Generations {
		r.Generations[i] = GenerationRecord{g.Number, g.Hint, g.CreatedAt.UTC(), g.ValidUntil.UTC(), g.LastUsedAt.UTC()}
		if g.Number > newest {
			newest, r.Hint = g.Number, g.Hint
		}
	}
	return r
}

// A keyAudit is what the audit keeps of a key.
type keyAudit struct {
	KeyRecord
	RevokedAt     time.Time `json:"revokedAt,omitzero"`
	RevokedReason string    `json:"revokedReason,omitempty"`
}

func auditOf(k *apikey.Key) keyAudit {
	return keyAudit{KeyRecord: RecordOf(k, now()), RevokedAt: k.RevokedAt.UTC(), RevokedReason: k.RevokedReason}
}
