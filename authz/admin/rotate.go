package admin

import (
	"context"
	"fmt"
	"slices"
	"time"

	"keyward/authz/apikey"
)

// A RotateInput says how a key gets another secret. Empty fields say nothing.
type RotateInput struct {
	GracePeriod    string `json:"gracePeriod,omitempty" strict:"notempty" minLength:"1" doc:"How long the secret before this one goes on: a duration from 0s to 30d, by default 24h, and never beyond the end that the key had."`
	ExpirationDate string `json:"expirationDate,omitempty" strict:"notempty" minLength:"1" doc:"As on creation. By default, if the key has a date, it gets as long again as the secret before was given."`
	ExpiresIn      string `json:"expiresIn,omitempty" strict:"notempty" minLength:"1" doc:"Instead of a date: a duration such as 30d."`
	EndOldest      bool   `json:"endOldest,omitempty" doc:"Where two secrets are valid already: end the older one at once."`
}

const (
	// UsualGrace is how long the secret before goes on where nobody says, LongestGrace at most.
	UsualGrace   = 24 * time.Hour
	LongestGrace = 30 * 24 * time.Hour
	// MaxValid is how many secrets of a key are valid at once.
	MaxValid = 2
	// soonOver is longer than a replica goes on without news: a secret that ends sooner may be accepted there
	// after its end.
	soonOver = time.Minute
)

// RotateKey gives an active key another secret, a new generation under the same id: counters, limits and
// history go on. The secret before stays valid for the grace period. ifMatch is the Revision that the
// caller saw, 0 for whatever it is now.
// Errors: [ErrPrecondition], *StateError, *RateError.
func (s *Service) RotateKey(ctx context.Context, caller Caller, instanceID string, id apikey.ID, in RotateInput, ifMatch apikey.Revision) (CreatedKey, error) {
	instance, err := caller.mayIn(instanceID, rotateKey)
	if err != nil {
		return CreatedKey{}, err
	}
	return s.once(ctx, caller, instance, revokeWait, func() (CreatedKey, error) { return s.rotateKey(ctx, caller, instance, id, in, ifMatch) })
}

func (s *Service) rotateKey(ctx context.Context, caller Caller, instance string, id apikey.ID, in RotateInput, ifMatch apikey.Revision) (CreatedKey, error) {
	grace, err := in.grace()
	if err != nil {
		return CreatedKey{}, err
	}
	k, err := s.key(ctx, s.store, caller, instance, id) // for the kind of the secret
	if err != nil {
		return CreatedKey{}, err
	}
	secret := s.cfg.Format.New(k.Type.Kind())
	pepper := s.cfg.Peppers.Current
	digest := pepper.Digest(secret.Reveal())
	ended := false // at once, or nearly
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		ended = false
		instance, err := tx.Instance(ctx, instance)
		if err != nil {
			return err
		}
		old, err := s.key(ctx, tx, caller, instance.ID, id)
		if err != nil {
			return err
		}
		if err := mayChange(old, ifMatch); err != nil {
			return err
		}
		at, policy := now(), instance.Policy.InForce()
		if status := statusOf(old, at); status != statusActive {
			return &StateError{"the key is " + status + ": only an active key can be rotated"}
		}
		if err := mayRotate(caller, old, policy.Creation, at); err != nil {
			return err
		}
		rotated := *old
		rotated.Generations = slices.Clone(old.Generations)
		if rotated.ExpirationDate, err = in.expiration(old, &policy.Expiration, at); err != nil {
			return err
		}
		if !old.ExpirationDate.Equal(rotated.ExpirationDate) {
			if err := tx.UpdateKey(ctx, &rotated); err != nil {
				return err
			}
		}
		// The old secrets were given until the key's end, as it was: rotating does not lengthen their life.
		until := at.Add(grace)
		for _, end := range []time.Time{old.ExpirationDate, rotated.ExpirationDate} {
			if !end.IsZero() && end.Before(until) {
				until = end
			}
		}
		valid := validGenerations(&rotated, at)
		if len(valid) >= MaxValid && !in.EndOldest {
			return &StateError{fmt.Sprintf("%d secrets are valid already, which is the most: end one of them first, or say endOldest", len(valid))}
		}
		for i, g := range valid {
			switch {
			case len(valid)-i >= MaxValid || grace == 0: // all but the newest
				g.ValidUntil, g.Revoked, ended = at, true, true
			case g.ValidUntil.IsZero() || until.Before(g.ValidUntil):
				g.ValidUntil, ended = until, ended || until.Before(at.Add(soonOver))
			default:
				continue // it ends earlier already
			}
			if err := tx.EndGeneration(ctx, id, g.Number, g.ValidUntil, g.Revoked); err != nil {
				return err
			}
		}
		newest := apikey.Generation{Number: 1, Hint: s.cfg.Format.Hint(secret), CreatedAt: at}
		if last := old.Newest(); last != nil {
			newest.Number = last.Number + 1
		}
		if err := tx.InsertGeneration(ctx, id, newest, digest, pepper.Version()); err != nil {
			return err
		}
		if err := s.keepReplay(ctx, tx, caller, instance.ID, id, newest.Number, secret); err != nil {
			return err
		}
		rotated.Generations = append(rotated.Generations, newest)
		k = &rotated
		return caller.audit(ctx, tx, rotateKey, instance.ID, id.String(), auditOf(old), auditOf(k))
	})
	if err != nil {
		return CreatedKey{}, err
	}
	k.Revision = rev
	wait := createWait
	if ended {
		wait = revokeWait
	}
	return CreatedKey{Key: k, Secret: secret, Propagation: s.propagate(ctx, rev, wait)}, nil
}

func (in *RotateInput) grace() (time.Duration, error) {
	if in.GracePeriod == "" {
		return UsualGrace, nil
	}
	d, err := apikey.ParseDuration(in.GracePeriod)
	if err != nil {
		return 0, under("gracePeriod", err)
	}
	if d < 0 || d.Std() > LongestGrace {
		return 0, apikey.Invalid("gracePeriod", "must be from 0s to 30d")
	}
	return d.Std(), nil
}

// expiration returns the date that k has after a rotation: the one asked for, or as long again as its
// newest secret was given, at most the longest life.
func (in *RotateInput) expiration(k *apikey.Key, policy *apikey.Expiration, at time.Time) (time.Time, error) {
	date, err := lifeInput{date: in.ExpirationDate, expiresIn: in.ExpiresIn}.end(policy.LongestLife.Std(), at)
	if err != nil {
		return time.Time{}, err
	}
	if date.IsZero() && !k.ExpirationDate.IsZero() {
		begin := k.CreatedAt
		if newest := k.Newest(); newest != nil {
			begin = newest.CreatedAt
		}
		date = at.Add(min(k.ExpirationDate.Sub(begin), policy.LongestLife.Std()))
	}
	if !date.IsZero() && !k.NotBefore.Before(date) {
		return time.Time{}, apikey.Invalid("expirationDate", "must be after the key's notBefore")
	}
	return date, endless(policy, date, k.InactivityDays)
}

// validGenerations returns those of k that are valid at a time, the oldest first.
func validGenerations(k *apikey.Key, at time.Time) []*apikey.Generation {
	var valid []*apikey.Generation
	for i := range k.Generations {
		if g := &k.Generations[i]; !g.EndedAt(at) {
			valid = append(valid, g)
		}
	}
	slices.SortFunc(valid, func(a, b *apikey.Generation) int { return a.Number - b.Number })
	return valid
}

// RevokeGeneration ends one secret of a key at once. Repeating it changes nothing, and tells anew how far
// it has come. Errors: apikey.ErrNotFound if there is no such generation; *StateError for the only one
// that is valid.
func (s *Service) RevokeGeneration(ctx context.Context, caller Caller, instanceID string, id apikey.ID, number int) (KeyChange, error) {
	instance, err := caller.mayIn(instanceID, revokeKey)
	if err != nil {
		return KeyChange{}, err
	}
	var k *apikey.Key
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		old, err := s.key(ctx, tx, caller, instance, id)
		if err != nil {
			return err
		}
		k = old
		i := slices.IndexFunc(old.Generations, func(g apikey.Generation) bool { return g.Number == number })
		at := now()
		switch {
		case i < 0:
			return apikey.ErrNotFound
		case old.Generations[i].Revoked || !old.RevokedAt.IsZero():
			return errNothing
		}
		if valid := validGenerations(old, at); len(valid) == 1 && valid[0].Number == number {
			return &StateError{"it is the only secret of the key that is valid: rotate the key first, or revoke it"}
		}
		revoked := *old
		revoked.Generations = slices.Clone(old.Generations)
		k = &revoked
		if err := endGeneration(ctx, tx, k, i, at); err != nil {
			return err
		}
		return caller.audit(ctx, tx, revokeOneOfKey, instance, id.String(), auditOf(old), auditOf(k))
	})
	if rev, err = s.ofKey(ctx, k, rev, err); err != nil {
		return KeyChange{}, err
	}
	return KeyChange{Key: k, Propagation: s.propagate(ctx, rev, revokeWait)}, nil
}

// endGeneration ends a generation at once, in the store and in the record. One that is over by its time
// keeps that: it must not be over later than it was.
func endGeneration(ctx context.Context, tx Tx, k *apikey.Key, i int, at time.Time) error {
	g := &k.Generations[i]
	if g.ValidUntil.IsZero() || at.Before(g.ValidUntil) {
		g.ValidUntil = at
	}
	g.Revoked = true
	return tx.EndGeneration(ctx, k.ID, g.Number, g.ValidUntil, true)
}
