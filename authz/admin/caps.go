package admin

import (
	"context"
	"slices"
	"time"

	"keyward/authz/apikey"
)

// creationWindow is what "per hour" means: any hour, not the clock's.
const creationWindow = time.Hour

// mayCreate judges how many keys were made within the last hour, in the transaction that makes one more.
// Errors: *RateError with the longest wait.
func mayCreate(ctx context.Context, tx Tx, caller Caller, instanceID string, c apikey.Creation, at time.Time) error {
	var refusal *RateError
	judge := func(what, createdBy string, limit int) error {
		if limit == apikey.Unlimited {
			return nil
		}
		made, err := tx.Creations(ctx, instanceID, createdBy, at.Add(-creationWindow), limit)
		if err != nil || len(made) < limit {
			return err
		}
		// The next one may come when the last of these is an hour old: then one fewer than the limit is left.
		wait := max(made[limit-1].Add(creationWindow).Sub(at), time.Second)
		if refusal == nil || wait > refusal.RetryAfter {
			refusal = &RateError{What: what, Limit: limit, Per: creationWindow, RetryAfter: wait}
		}
		return nil
	}
	if err := judge("keys were made in this instance", "", c.PerHour); err != nil {
		return err
	}
	if caller.Role == RoleUser {
		if err := judge("keys were made by this user", caller.Name, c.PerHourAndUser); err != nil {
			return err
		}
	}
	if refusal != nil {
		return refusal
	}
	return nil
}

// freeRotations is how many secrets within an hour a key may have in any case: whoever lost one must not wait
// because new keys are to be rare.
const freeRotations = 10

// mayRotate judges how many secrets a key was given within the last hour, by the rates for new keys: each stays
// in the store and in every record of the key, so that they must not be as many as a caller likes.
// Errors: *RateError.
func mayRotate(caller Caller, k *apikey.Key, c apikey.Creation, at time.Time) error {
	limit := c.PerHour
	if caller.Role == RoleUser {
		limit = c.PerHourAndUser
	}
	if limit == apikey.Unlimited {
		return nil
	}
	limit = max(limit, freeRotations)
	var made []time.Time
	for _, g := range k.Generations {
		if g.CreatedAt.After(at.Add(-creationWindow)) {
			made = append(made, g.CreatedAt)
		}
	}
	if len(made) < limit {
		return nil
	}
	slices.SortFunc(made, func(a, b time.Time) int { return b.Compare(a) })
	wait := max(made[limit-1].Add(creationWindow).Sub(at), time.Second)
	return &RateError{What: "secrets were made for this key", Limit: limit, Per: creationWindow, RetryAfter: wait}
}

// withinCaps judges the caps that k counts against, in the transaction that changes it. more is how many
// keys come to what is there: 1 before k is inserted, 0 after k was changed.
// Errors: *QuotaExceededError.
func withinCaps(ctx context.Context, tx Tx, k *apikey.Key, caps apikey.Caps, more int, at time.Time) error {
	owners := []KeyOwner{{}}
	if own := OwnerOf(k); own != (KeyOwner{}) {
		owners = append(owners, own)
	}
	for _, owner := range owners {
		name, limit := capOf(caps, owner)
		if limit == apikey.Unlimited {
			continue
		}
		counts, err := tx.CountKeys(ctx, k.InstanceID, owner, at)
		if err != nil {
			return err
		}
		if counts.Usable+more > limit {
			return &QuotaExceededError{Cap: name, Limit: limit, Used: counts.Usable + more - 1} // the others
		}
	}
	return nil
}

// capOf is the cap on an owner's keys, and what it is called.
func capOf(caps apikey.Caps, owner KeyOwner) (name string, limit int) {
	switch owner.Type {
	case apikey.TypeAgent:
		return "agent", caps.Agent
	case apikey.TypeUser:
		return "user", caps.User
	}
	return "instance", caps.Instance
}

// A Room says how much there may be of something, how much there is, and what is left.
type Room struct {
	Limit int  `json:"limit" doc:"-1: no limit."`
	Used  int  `json:"used"`
	Left  *int `json:"left,omitempty" doc:"Absent where there is no limit."`
}

func roomOf(limit, used int) Room {
	r := Room{Limit: limit, Used: used}
	if limit != apikey.Unlimited {
		left := max(limit-used, 0)
		r.Left = &left
	}
	return r
}

// KeyLimits are the caps and rates of an instance, and how far they are used.
type KeyLimits struct {
	Instance Room  `json:"instance" doc:"Keys of the instance that are neither revoked nor expired."`
	Owner    *Room `json:"owner,omitempty" doc:"The same of the agent or user that was asked about."`
	// What each owner may have, whoever was asked about.
	PerUser  int   `json:"perUser" doc:"Keys that each user may have; -1: no limit."`
	PerAgent int   `json:"perAgent" doc:"Keys that each agent may have; -1: no limit."`
	Creation Room  `json:"creation" doc:"Keys made in the instance within the last hour."`
	Creator  *Room `json:"creator,omitempty" doc:"The same of the caller, where its role is user."`
}

// KeyLimits returns the caps and creation rates of an instance: their size, what is used and what is left.
// With an owner other than the zero one it tells that owner's too. A caller with the role user is told
// about itself.
func (s *Service) KeyLimits(ctx context.Context, caller Caller, instanceID string, owner KeyOwner) (KeyLimits, error) {
	id, err := caller.mayIn(instanceID, readKeys)
	if err != nil {
		return KeyLimits{}, err
	}
	owner = owner.canonical()
	if caller.Role == RoleUser {
		own := KeyOwner{apikey.TypeUser, caller.UserPrincipalName}.canonical()
		if owner != (KeyOwner{}) && owner != own || own.Name == "" {
			return KeyLimits{}, apikey.ErrNotFound
		}
		owner = own
	}
	instance, err := s.store.Instance(ctx, id)
	if err != nil {
		return KeyLimits{}, err
	}
	policy, at := instance.Policy.InForce(), now()
	l := KeyLimits{PerUser: policy.Caps.User, PerAgent: policy.Caps.Agent}
	counts, err := s.store.CountKeys(ctx, id, KeyOwner{}, at)
	if err != nil {
		return KeyLimits{}, err
	}
	l.Instance = roomOf(policy.Caps.Instance, counts.Usable)
	if owner != (KeyOwner{}) {
		if counts, err = s.store.CountKeys(ctx, id, owner, at); err != nil {
			return KeyLimits{}, err
		}
		_, limit := capOf(policy.Caps, owner)
		room := roomOf(limit, counts.Usable)
		l.Owner = &room
	}
	if l.Creation, err = s.created(ctx, id, "", policy.Creation.PerHour, at); err != nil {
		return KeyLimits{}, err
	}
	if caller.Role == RoleUser {
		room, err := s.created(ctx, id, caller.Name, policy.Creation.PerHourAndUser, at)
		if err != nil {
			return KeyLimits{}, err
		}
		l.Creator = &room
	}
	return l, nil
}

// mostCreations bounds what is counted where nothing else does.
const mostCreations = 100_000

func (s *Service) created(ctx context.Context, instanceID, createdBy string, limit int, at time.Time) (Room, error) {
	made, err := s.store.Creations(ctx, instanceID, createdBy, at.Add(-creationWindow), mostCreations)
	return roomOf(limit, len(made)), err
}

// CountKeys counts the keys of an instance; for a caller with the role user, its own.
func (s *Service) CountKeys(ctx context.Context, caller Caller, instanceID string) (KeyCounts, error) {
	id, err := caller.mayIn(instanceID, readKeys)
	if err != nil {
		return KeyCounts{}, err
	}
	if _, err := s.store.Instance(ctx, id); err != nil {
		return KeyCounts{}, err
	}
	owner := KeyOwner{}
	if caller.Role == RoleUser {
		if owner = (KeyOwner{apikey.TypeUser, caller.UserPrincipalName}).canonical(); owner.Name == "" {
			return KeyCounts{}, nil
		}
	}
	return s.store.CountKeys(ctx, id, owner, now())
}
