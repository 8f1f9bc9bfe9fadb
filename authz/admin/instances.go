package admin

import (
	"context"
	"errors"
	"math"
	"slices"

	"keyward/authz/apikey"
)

// A PutResult is an instance that was created or changed.
type PutResult struct {
	Instance    *apikey.Instance
	Created     bool
	Propagation Propagation
}

// PutInstance creates an instance or replaces its policy.
func (s *Service) PutInstance(ctx context.Context, caller Caller, instanceID string, policy apikey.Policy) (PutResult, error) {
	return s.PutInstanceIf(ctx, caller, instanceID, policy, 0)
}

// IfThere is a condition that holds for every version of what there is.
const IfThere apikey.Revision = math.MaxUint64

// IfAbsent is a condition that holds for what is not there: what somebody else makes at the same time is not replaced.
const IfAbsent apikey.Revision = math.MaxUint64 - 1

// PutInstanceIf does the same on condition that the instance still has the revision ifMatch, that it is
// there ([IfThere]) or not ([IfAbsent]), or on none (0). Errors: [ErrPrecondition].
func (s *Service) PutInstanceIf(ctx context.Context, caller Caller, instanceID string, policy apikey.Policy, ifMatch apikey.Revision) (PutResult, error) {
	// The one place where an id that none can have is the caller's mistake: it chooses the id here.
	if _, err := apikey.CanonicalInstanceID(instanceID); err != nil {
		return PutResult{}, err
	}
	if err := noSecret(s.cfg.Format, "instanceId", instanceID); err != nil {
		return PutResult{}, err
	}
	id, err := caller.mayIn(instanceID, putInstance)
	if err != nil {
		return PutResult{}, err
	}
	if err := policy.Validate(); err != nil {
		return PutResult{}, under("policy", err)
	}
	if err := noSecretScope(s.cfg.Format, "policy.allowedScopes", policy.AllowedScopes); err != nil {
		return PutResult{}, err
	}
	var in *apikey.Instance
	var created bool
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		in = &apikey.Instance{ID: id, Policy: policy, CreatedAt: now()}
		var before any
		old, err := tx.Instance(ctx, id)
		switch {
		case err == nil:
			before, in.Quotas, in.CreatedAt = &old.Policy, old.Quotas, old.CreatedAt
		case !isNotFound(err):
			return err
		}
		created = before == nil
		switch {
		case ifMatch == 0, ifMatch == IfAbsent && created, ifMatch == IfThere && !created:
		case created || ifMatch != old.Revision:
			return ErrPrecondition
		}
		if err := tx.PutInstance(ctx, in); err != nil {
			return err
		}
		return caller.audit(ctx, tx, putInstance, id, id, before, &in.Policy)
	})
	if err != nil {
		return PutResult{}, err
	}
	in.Revision = rev
	wait := revokeWait
	if created { // there was nothing to take away
		wait = createWait
	}
	return PutResult{Instance: in, Created: created, Propagation: s.propagate(ctx, rev, wait)}, nil
}

// SwitchInstance refuses every key of an instance, or no longer does: the fastest way to end all of them at
// once. Repeating it changes nothing, and tells anew how far it has come.
func (s *Service) SwitchInstance(ctx context.Context, caller Caller, instanceID string, disabled bool) (PutResult, error) {
	id, err := caller.mayIn(instanceID, putInstance)
	if err != nil {
		return PutResult{}, err
	}
	var in *apikey.Instance
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		if in, err = tx.Instance(ctx, id); err != nil {
			return err
		}
		if in.Policy.Disabled == disabled {
			return errNothing
		}
		before := in.Policy
		in.Policy.Disabled = disabled
		if err := tx.PutInstance(ctx, in); err != nil {
			return err
		}
		return caller.audit(ctx, tx, putInstance, id, id, &before, &in.Policy)
	})
	if errors.Is(err, errNothing) {
		rev, err = s.head(ctx)
	} else if err == nil {
		in.Revision = rev
	}
	if err != nil {
		return PutResult{}, err
	}
	return PutResult{Instance: in, Propagation: s.propagate(ctx, rev, revokeWait)}, nil
}

// Instance returns one instance.
func (s *Service) Instance(ctx context.Context, caller Caller, instanceID string) (*apikey.Instance, error) {
	id, err := caller.mayIn(instanceID, readInstances)
	if err != nil {
		return nil, err
	}
	return s.store.Instance(ctx, id)
}

// Instances lists the instances that the caller can see, by id.
func (s *Service) Instances(ctx context.Context, caller Caller) ([]*apikey.Instance, error) {
	if err := caller.may(readInstances); err != nil {
		return nil, err
	}
	all, err := s.store.Instances(ctx)
	if err != nil || caller.InstanceID == "" {
		return all, err
	}
	return slices.DeleteFunc(all, func(in *apikey.Instance) bool { return in.ID != caller.InstanceID }), nil
}

// DeleteInstance removes an instance, its keys and the management tokens that are for it alone: who
// later gives the same id to another tenant must not let the old ones in.
// Errors: [ErrInUse] while it has usable keys, unless revokeKeys.
func (s *Service) DeleteInstance(ctx context.Context, caller Caller, instanceID string, revokeKeys bool) (Propagation, error) {
	id, err := caller.mayIn(instanceID, deleteInstance)
	if err != nil {
		return Propagation{}, err
	}
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		old, err := tx.Instance(ctx, id)
		if err != nil {
			return err
		}
		counts, err := tx.CountKeys(ctx, id, KeyOwner{}, now())
		if err != nil {
			return err
		}
		usable := counts.Usable
		if usable > 0 && !revokeKeys {
			return ErrInUse
		}
		tokens, err := tx.Tokens(ctx)
		if err != nil {
			return err
		}
		for _, t := range tokens {
			if t.InstanceID == id && t.RevokedAt.IsZero() {
				if err := endToken(ctx, tx, caller, t); err != nil {
					return err
				}
			}
		}
		if err := tx.DeleteInstance(ctx, id); err != nil {
			return err
		}
		return caller.audit(ctx, tx, deleteInstance, id, id, struct {
			Policy     *apikey.Policy `json:"policy"`
			Quotas     []apikey.Quota `json:"quotas,omitempty"`
			UsableKeys int            `json:"usableKeys"`
		}{&old.Policy, old.Quotas, usable}, nil)
	})
	if err != nil {
		return Propagation{}, err
	}
	return s.propagate(ctx, rev, revokeWait), nil
}

func isNotFound(err error) bool { return errors.Is(err, apikey.ErrNotFound) }
