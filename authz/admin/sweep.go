package admin

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"keyward/authz/apikey"
)

// The sweep is housekeeping: no decision waits for it or looks at what it writes.
const (
	sweepJob   = "sweep"
	sweepEvery = time.Minute
	sweepTTL   = 3 * time.Minute // of the lead: whoever takes it over comes that late at most
	sweepBatch = 200             // of one transaction
	pruneEvery = time.Hour       // the audit is looked through
)

// IdleLag is how late a last use may be written down, with room: until then a key that looks idle may have
// been in use.
const IdleLag = 2 * time.Minute

// sweeper is who the audit says did it.
var sweeper = Caller{Name: "keyward serve"}

// RunSweep keeps house until ctx is done, in one process at a time; holder names this one. It marks the
// keys that have expired, by time or for inactivity, so that counts and audit know of it; and it removes what
// is over: revoked keys with their digests when the policy's time to keep them is, kept answers, and old
// events of the audit and counts of usage.
func (s *Service) RunSweep(ctx context.Context, holder string) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	var pruned time.Time
	for {
		if err := s.sweep(ctx, holder); err != nil && ctx.Err() == nil {
			s.log.Warn("cannot mark expired keys and remove what is over; it is tried again", slog.Any("error", err))
		}
		if time.Since(pruned) >= pruneEvery {
			led, err := s.leading(ctx, holder, s.pruneAudit)
			if err != nil && ctx.Err() == nil {
				s.log.Error("old audit events could not be removed", slog.Any("error", err))
			}
			if led {
				pruned = time.Now()
				if err := s.forgetUsage(ctx); err != nil && ctx.Err() == nil {
					s.log.Error("old usage could not be removed", slog.Any("error", err))
				}
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			_, err := s.store.Lead(end, sweepJob, holder, 0)
			if err != nil {
				s.log.Warn("another process takes the sweep over only when the lead runs out", slog.Any("error", err))
			}
			return nil
		}
	}
}

// leading does something again and again while there is more to do and this process leads; led reports whether
// it did at all.
func (s *Service) leading(ctx context.Context, holder string, do func(context.Context) (more bool, err error)) (led bool, err error) {
	for more := true; more; led = true {
		leads, err := s.store.Lead(ctx, sweepJob, holder, sweepTTL)
		if err != nil || !leads {
			return led, err
		}
		if more, err = do(ctx); err != nil {
			return true, err
		}
	}
	return led, nil
}

func (s *Service) sweep(ctx context.Context, holder string) error {
	_, forgetting := s.leading(ctx, holder, func(ctx context.Context) (bool, error) { return false, s.store.ForgetReplays(ctx, now()) })
	_, marking := s.leading(ctx, holder, s.markEnded)
	instances, err := s.store.Instances(ctx)
	if err = errors.Join(forgetting, marking, err); err != nil {
		return err
	}
	for _, in := range instances {
		_, err := s.leading(ctx, holder, func(ctx context.Context) (bool, error) {
			return s.removeRevoked(ctx, in.ID, in.Policy.InForce().KeepRevoked.Std())
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// markEnded marks one batch; more says that there may be another.
func (s *Service) markEnded(ctx context.Context) (more bool, err error) {
	at := now()
	idle := at.Add(-IdleLag)
	due, err := s.store.DueKeys(ctx, at, idle, 1) // without a turn of the one writer
	if err != nil || len(due) == 0 {
		return false, err
	}
	_, err = s.update(ctx, func(ctx context.Context, tx Tx) error {
		due, err := tx.DueKeys(ctx, at, idle, sweepBatch)
		if err != nil {
			return err
		}
		more = len(due) == sweepBatch
		for _, k := range due {
			cause := apikey.ExpiresInactivity
			if !k.ExpirationDate.IsZero() && at.After(k.ExpirationDate) {
				cause = apikey.ExpiresByTime
			}
			if err := tx.MarkEnded(ctx, k.ID, at); err != nil {
				return err
			}
			after := struct {
				keyAudit
				ExpiredBy apikey.ExpirationPolicy `json:"expiredBy"`
			}{auditOf(k), cause}
			if err := sweeper.audit(ctx, tx, expireKey, k.InstanceID, k.ID.String(), nil, after); err != nil {
				return err
			}
		}
		if len(due) == 0 {
			return errNothing
		}
		return nil
	})
	if errors.Is(err, errNothing) {
		err = nil
	}
	return more, err
}

// removeRevoked removes one batch; more says that there may be another.
func (s *Service) removeRevoked(ctx context.Context, instanceID string, keep time.Duration) (more bool, err error) {
	before := now().Add(-keep)
	old, err := s.store.RevokedKeys(ctx, instanceID, before, 1)
	if err != nil || len(old) == 0 {
		return false, err
	}
	_, err = s.update(ctx, func(ctx context.Context, tx Tx) error {
		// The policy may have changed, and the instance may be gone.
		in, err := tx.Instance(ctx, instanceID)
		if isNotFound(err) {
			return errNothing
		}
		if err != nil {
			return err
		}
		old, err := tx.RevokedKeys(ctx, instanceID, now().Add(-in.Policy.InForce().KeepRevoked.Std()), sweepBatch)
		if err != nil {
			return err
		}
		more = len(old) == sweepBatch
		for _, k := range old {
			if err := tx.DeleteKey(ctx, instanceID, k.ID); err != nil {
				return err
			}
			if err := sweeper.audit(ctx, tx, removeKey, instanceID, k.ID.String(), auditOf(k), nil); err != nil {
				return err
			}
		}
		if len(old) == 0 {
			return errNothing
		}
		return nil
	})
	if errors.Is(err, errNothing) {
		err = nil
	}
	return more, err
}
