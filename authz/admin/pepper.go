package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"keyward/authz/apikey"
)

// OpenPeppers compares the peppers of the configuration with what the store was made with, and
// remembers a new one. It must pass before anything is served: with a wrong pepper every key would be
// unknown, and everybody would be told 401 instead of the operator being told why.
func OpenPeppers(ctx context.Context, store Store, peppers apikey.Peppers, actor string) error {
	stored, err := comparePeppers(ctx, store, peppers)
	if err != nil {
		return err
	}
	var fresh []*apikey.Pepper
	for _, p := range []*apikey.Pepper{peppers.Previous, peppers.Current} {
		if p == nil {
			continue
		}
		if _, ok := stored[p.Version()]; ok {
			continue
		}
		if p == peppers.Previous && len(stored) > 0 {
			continue // retired, or never used with this store: it finds nothing, and does no harm
		}
		fresh = append(fresh, p)
	}
	// Before the first event, and not before the pepper is known to be the right one.
	if err := store.SealAudit(ctx); err != nil {
		return fmt.Errorf("seal the audit under the current pepper: %w", err)
	}
	if len(fresh) == 0 {
		return nil
	}
	_, err = store.Update(ctx, func(tx Tx) error {
		for _, p := range fresh {
			if err := tx.PutPepper(ctx, p.Version(), p.CheckValue()); err != nil {
				return err
			}
			after, err := json.Marshal(map[string]any{"version": p.Version()})
			if err != nil {
				return err
			}
			if err := tx.Audit(ctx, Event{At: time.Now(), Actor: actor, Action: "pepper.add", Target: p.String(), After: after}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remember the pepper: %w", err)
	}
	return nil
}

// comparePeppers refuses peppers that are not those of the store, and returns what that knows of its own, by
// version.
func comparePeppers(ctx context.Context, store Reader, peppers apikey.Peppers) (map[uint32]PepperRecord, error) {
	if err := peppers.Validate(); err != nil {
		return nil, err
	}
	known, err := store.Peppers(ctx)
	if err != nil {
		return nil, fmt.Errorf("compare the pepper: %w", err)
	}
	stored := map[uint32]PepperRecord{}
	newest := uint32(0)
	for _, record := range known {
		stored[record.Version] = record
		newest = max(newest, record.Version)
	}
	for _, p := range []*apikey.Pepper{peppers.Current, peppers.Previous} {
		if p == nil {
			continue
		}
		if record, ok := stored[p.Version()]; ok && record.Check != p.CheckValue() {
			return nil, fmt.Errorf("the pepper file with version %d is not the one that this store was made with: "+
				"restore the right file, for no key can be checked without it", p.Version())
		}
	}
	for _, record := range known {
		if peppers.ByVersion(record.Version) != nil {
			continue // not counted: of ten million keys that takes minutes, at each start
		}
		left, err := store.PepperLeft(ctx, record.Version)
		if err != nil {
			return nil, fmt.Errorf("compare the pepper: %w", err)
		}
		if left > 0 {
			return nil, fmt.Errorf("%d keys and tokens can only be found with pepper version %d, which is not configured: "+
				"name its file as pepper.file, or as pepper.previousFile after a rotation", left, record.Version)
		}
	}
	current := peppers.Current.Version()
	if current < newest {
		return nil, fmt.Errorf("pepper.file has version %d, but this store has seen version %d: use the newer file", current, newest)
	}
	return stored, nil
}

// Fit refuses a store that was made with other peppers than those of k, for what k would write into its audit
// would break the chain.
func (k AuditKeys) Fit(ctx context.Context, store Reader) error {
	_, err := comparePeppers(ctx, store, k.peppers)
	return err
}

// ErrPepperInUse: keys or tokens are left that only this pepper finds, or it is the newest.
var ErrPepperInUse = errors.New("the pepper is still in use")

// A PepperStatus is a version of the pepper that the store knows, and how many usable keys and tokens only
// it finds.
type PepperStatus struct {
	Version uint32
	Left    int
}

// Peppers lists the versions of the pepper that the store knows.
func (s *Service) Peppers(ctx context.Context, caller Caller) ([]PepperStatus, error) {
	if err := caller.mayAll(readPeppers); err != nil {
		return nil, err
	}
	records, err := s.store.Peppers(ctx)
	if err != nil {
		return nil, err
	}
	list := make([]PepperStatus, len(records))
	for i, record := range records {
		left, err := s.store.PepperLeft(ctx, record.Version)
		if err != nil {
			return nil, err
		}
		list[i] = PepperStatus{record.Version, left}
	}
	return list, nil
}

// RetirePepper ends the time in which an earlier pepper finds anything. Errors: [ErrPepperInUse] while
// usable keys or tokens are left that were not used since the rotation, and for the newest pepper.
func (s *Service) RetirePepper(ctx context.Context, caller Caller, version uint32) error {
	if err := caller.mayAll(retirePepper); err != nil {
		return err
	}
	// A replica that was restarted later than this one may have gone on sealing under the old one.
	if err := s.store.SealAudit(ctx); err != nil {
		return err
	}
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		records, err := tx.Peppers(ctx)
		if err != nil {
			return err
		}
		newest, found := uint32(0), false
		for _, record := range records {
			newest = max(newest, record.Version)
			if record.Version != version {
				continue
			}
			found = true
			left, err := tx.PepperLeft(ctx, version)
			if err != nil {
				return err
			}
			if left > 0 {
				return fmt.Errorf("%w: %d keys and tokens are found by version %d alone", ErrPepperInUse, left, version)
			}
		}
		switch {
		case !found:
			return apikey.ErrNotFound
		case version == newest:
			return fmt.Errorf("%w: version %d is the newest", ErrPepperInUse, version)
		}
		if err := tx.RetirePepper(ctx, version); err != nil {
			return err
		}
		return caller.audit(ctx, tx, retirePepper, "", fmt.Sprintf("pepper version %d", version), map[string]any{"version": version}, nil)
	})
	if err != nil {
		return err
	}
	s.propagate(ctx, rev, createWait)
	return nil
}
