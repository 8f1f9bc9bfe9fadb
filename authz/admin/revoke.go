package admin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"keyward/authz/apikey"
)

// A Revocation is a key that is over.
type Revocation struct {
	Key         *apikey.Key
	Propagation Propagation
}

// RevokeKey ends a key for good. Repeating it changes nothing, and tells anew how far it has come; the
// first reason stays.
func (s *Service) RevokeKey(ctx context.Context, caller Caller, instanceID string, id apikey.ID, reason apikey.RevocationReason) (Revocation, error) {
	instance, err := caller.mayIn(instanceID, revokeKey)
	if err != nil {
		return Revocation{}, err
	}
	if err := validReason(reason); err != nil {
		return Revocation{}, err
	}
	var k *apikey.Key
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		if k, err = s.key(ctx, tx, caller, instance, id); err != nil {
			return err
		}
		if !k.RevokedAt.IsZero() {
			return errNothing
		}
		k, err = revoke(ctx, tx, caller, k, reason, now())
		return err
	})
	if rev, err = s.ofKey(ctx, k, rev, err); err != nil {
		return Revocation{}, err
	}
	return Revocation{Key: k, Propagation: s.propagate(ctx, rev, revokeWait)}, nil
}

// revoke ends a key in the store and returns it as it is then.
func revoke(ctx context.Context, tx Tx, caller Caller, old *apikey.Key, reason apikey.RevocationReason, at time.Time) (*apikey.Key, error) {
	k := *old
	k.RevokedAt, k.RevokedReason = at, reason
	if err := tx.UpdateKey(ctx, &k); err != nil {
		return nil, err
	}
	return &k, caller.audit(ctx, tx, revokeKey, k.InstanceID, k.ID.String(), auditOf(old), auditOf(&k))
}

func validReason(reason apikey.RevocationReason) error {
	if reason != "" && !slices.Contains(apikey.RevocationReasons(), reason) {
		return apikey.Invalid("reason", "must be keyCompromise, superseded, ownerLeft, unused or other")
	}
	return nil
}

// A BulkRevocation says which keys to revoke.
type BulkRevocation struct {
	Filter KeyListInput            `json:"filter,omitzero" doc:"Which keys; its order says nothing."`
	All    bool                    `json:"all,omitempty" doc:"Every key of the instance: only with an empty filter, which is refused without."`
	Reason apikey.RevocationReason `json:"reason,omitempty" enum:"keyCompromise,superseded,ownerLeft,unused,other"`
	DryRun bool                    `json:"dryRun,omitempty" doc:"Tell what would go, and revoke nothing."`
	Count  *int                    `json:"count,omitempty" doc:"How many keys the caller expects. Needed where they are more than 10, or where one of them was used, or was imported or restored, within the last 7 days."`
}

// BulkRevoked is what a bulk revocation did, or with DryRun would do.
type BulkRevoked struct {
	Count        int           // of the keys that the filter means and that were not revoked before
	RecentlyUsed int           // of those: used within the last 7 days, or nobody knows
	Keys         []*apikey.Key // the first 1000 of them, as they were before
	Revoked      int           // 0 with DryRun. Fewer than Count where a key no longer passed the filter when it came to it.
	Propagation  Propagation   // zero with DryRun
}

// A ConfirmError asks for a bulk revocation to be repeated with its count.
type ConfirmError struct {
	Count        int // how many keys would be revoked
	RecentlyUsed int // how many of them were used within the last 7 days
}

func (e *ConfirmError) Error() string {
	return fmt.Sprintf("this revokes %d keys, of which %d were used within the last 7 days: repeat it with count %[1]d", e.Count, e.RecentlyUsed)
}

// A PartialError says that a bulk revocation failed on the way, and how far it came: what it counts is revoked
// for good. The batch that failed may be revoked as well. To go on, the call is repeated.
type PartialError struct {
	Revoked, Count int         // at least so many, of those that the filter meant
	Propagation    Propagation // of those that are revoked
	Err            error
}

func (e *PartialError) Error() string { return e.Progress() + ": " + e.Err.Error() }

// Progress is the error without its cause.
func (e *PartialError) Progress() string {
	text := fmt.Sprintf("it failed on the way: %d of %d keys are revoked", e.Revoked, e.Count)
	if !e.Propagation.Everywhere {
		text += ", which is not known everywhere yet"
	}
	return text + "; repeat it for the others, with their count"
}

func (e *PartialError) Unwrap() error { return e.Err }

const (
	fewKeys    = 10
	recentUse  = 7 * 24 * time.Hour
	listedKeys = 1000
	// bulkBatch is how many keys one transaction revokes: what comes in between must not wait long.
	bulkBatch = 200
)

// RevokeKeys revokes every key of an instance that a filter means, in batches. To stop them all at once
// and at any number, [Service.SwitchInstance] comes first.
//
// A key that no longer passes the filter when its turn comes (it was used, say) is spared. An error after
// the first batch leaves revoked what is: repeat the call.
// Errors: *ConfirmError, *PartialError.
func (s *Service) RevokeKeys(ctx context.Context, caller Caller, instanceID string, in BulkRevocation) (BulkRevoked, error) {
	instance, err := caller.mayIn(instanceID, revokeKey)
	if err != nil {
		return BulkRevoked{}, err
	}
	q, err := in.query(now())
	if err != nil {
		return BulkRevoked{}, err
	}
	if _, err := s.store.Instance(ctx, instance); err != nil {
		return BulkRevoked{}, err
	}
	if !caller.narrow(&q.KeyFilter) {
		return BulkRevoked{}, nil
	}
	var done BulkRevoked
	var ids []apikey.ID
	for _, status := range []string{statusActive, statusDisabled, statusExpired} {
		if q.Status != "" && q.Status != status {
			continue
		}
		some := q
		some.Status = status
		err := allKeys(ctx, s.store, instance, some, func(k *apikey.Key) bool {
			ids = append(ids, k.ID)
			if recentlyUsed(k, q.Now) {
				done.RecentlyUsed++
			}
			if len(done.Keys) < listedKeys {
				done.Keys = append(done.Keys, k)
			}
			return true
		})
		if err != nil {
			return BulkRevoked{}, err
		}
	}
	done.Count = len(ids)
	if in.DryRun {
		return done, nil
	}
	if in.Count == nil && (done.Count > fewKeys || done.RecentlyUsed > 0) || in.Count != nil && *in.Count != done.Count {
		return done, &ConfirmError{done.Count, done.RecentlyUsed}
	}
	rev, err := s.head(ctx)
	if err != nil {
		return done, err
	}
	for batch := range slices.Chunk(ids, bulkBatch) {
		revoked := 0
		at, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
			revoked = 0
			for _, id := range batch {
				k, err := tx.Key(ctx, instance, id)
				switch {
				case isNotFound(err):
					continue
				case err != nil:
					return err
				case !k.RevokedAt.IsZero() || !q.Passes(k, q.Now):
					continue
				}
				if _, err := revoke(ctx, tx, caller, k, in.Reason, now()); err != nil {
					return err
				}
				revoked++
			}
			if revoked == 0 {
				return errNothing
			}
			return nil
		})
		switch {
		case errors.Is(err, errNothing):
			continue
		case err != nil && done.Revoked > 0:
			// Whoever reads the number takes it for done.
			done.Propagation = s.propagate(ctx, rev, revokeWait)
			return done, &PartialError{done.Revoked, done.Count, done.Propagation, err}
		case err != nil:
			return done, err
		}
		done.Revoked += revoked
		rev = at
	}
	done.Propagation = s.propagate(ctx, rev, revokeWait)
	return done, nil
}

// recentlyUsed reports whether a key was used lately, or may have been: where IdleFrom says so, nobody knows.
func recentlyUsed(k *apikey.Key, at time.Time) bool {
	return at.Sub(k.LastUsedAt) < recentUse || at.Sub(k.IdleFrom) < recentUse
}

// query checks in and returns the query for the keys that it means.
func (in *BulkRevocation) query(at time.Time) (KeyQuery, error) {
	filter := in.Filter
	filter.OrderBy = ""
	var bad faults
	q, err := filter.Query(at)
	bad.add(under("filter", err))
	bad.add(validReason(in.Reason))
	switch empty := filter == (KeyListInput{}); {
	case empty && !in.All:
		bad.add(apikey.Invalid("filter", "is empty: say which keys, or all"))
	case in.All && !empty:
		bad.add(apikey.Invalid("all", "goes with an empty filter only"))
	}
	if in.Count != nil && *in.Count < 0 {
		bad.add(apikey.Invalid("count", "must not be negative"))
	}
	return q, bad.err()
}

// An Advice says whether a key seems to be needed.
type Advice struct {
	LastUsedAt time.Time `json:"lastUsedAt,omitzero" doc:"Absent: never."`
	UnusedDays int       `json:"unusedDays" doc:"Whole days since the last use, or since it was made, imported or restored."`
	Safe       bool      `json:"safe" doc:"Nobody seems to use it: it can be revoked."`
	Text       string    `json:"text"`
	// Usage is what was counted, where [Service.KeyAdvice] looked.
	Usage *UsageAdvice `json:"usage,omitempty" doc:"How it was used lately. Absent where no request was counted in 30 days."`
}

// safeAfter is how long a key must have been unused for its revocation to be called safe: longer than a
// month, because some programs run once in one.
const safeAfter = 35 * 24 * time.Hour

// AdviceOn says whether a key seems to be needed at a time, by when it was last used.
func AdviceOn(k *apikey.Key, at time.Time) Advice {
	since := quietSince(k)
	quiet := at.Sub(since)
	a := Advice{LastUsedAt: k.LastUsedAt.UTC(), UnusedDays: max(int(quiet/(24*time.Hour)), 0), Safe: quiet >= safeAfter}
	switch status := statusOf(k, at); {
	case status == statusRevoked || status == statusExpired:
		a.Safe, a.Text = true, "It is "+status+" and opens nothing."
	case !a.Safe && since.After(k.LastUsedAt) && since.After(k.CreatedAt):
		a.Text = fmt.Sprintf("Not used in the %s since it was imported or restored, and nothing is known from before: too soon to tell.", inDays(a.UnusedDays))
	case a.Safe && k.LastUsedAt.IsZero() && since.Equal(k.CreatedAt):
		a.Text = fmt.Sprintf("Never used in the %d days since it was made: safe to revoke.", a.UnusedDays)
	case a.Safe:
		a.Text = fmt.Sprintf("Unused for %d days: safe to revoke.", a.UnusedDays)
	case k.LastUsedAt.IsZero():
		a.Text = fmt.Sprintf("Never used in the %s since it was made, which may be too soon to tell.", inDays(a.UnusedDays))
	case a.UnusedDays == 0:
		a.Text = "In use: last used within a day. Rotate it, and revoke it when nobody uses the old secret."
	default:
		a.Text = fmt.Sprintf("Used %s ago: ask its owner before revoking it.", inDays(a.UnusedDays))
	}
	return a
}

// inDays says for people how long whole days are.
func inDays(n int) string {
	switch n {
	case 0:
		return "hours"
	case 1:
		return "1 day"
	}
	return fmt.Sprintf("%d days", n)
}
