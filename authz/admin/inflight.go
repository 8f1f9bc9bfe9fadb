package admin

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// Leases is what can be seen of running requests, and done to them.
type Leases interface {
	// Running lists the requests that count now. key is zero for all of them.
	Running(key apikey.ID) []RunningRequest
	// End ends a lease by force. The request itself goes on.
	End(ctx context.Context, l limits.Lease) error
}

// A RunningRequest is a request that counts against its key's max-concurrent.
type RunningRequest struct {
	ID         string // of its lease
	Lease      limits.Lease
	KeyID      apikey.ID
	Method     string // "": of no standard
	Path       string // the pattern of the rule it matched; "": none
	Node       string // the Envoy it runs at, as that calls itself; "": not known yet
	Connection uint64
	Replica    string // that counts it
	Adopted    bool   // granted before this replica started
	Started    time.Time
	Until      time.Time // it counts until then unless Envoy says that it still runs
}

// InFlight lists the requests of an instance that run now, the oldest first.
func (s *Service) InFlight(ctx context.Context, caller Caller, instanceID string) ([]RunningRequest, error) {
	id, err := caller.mayIn(instanceID, readInFlight)
	if err != nil {
		return nil, err
	}
	if _, err := s.store.Instance(ctx, id); err != nil {
		return nil, err
	}
	return s.inFlight(ctx, id)
}

func (s *Service) inFlight(ctx context.Context, instanceID string) ([]RunningRequest, error) {
	if s.cfg.Leases == nil {
		return nil, nil // nothing runs where nothing is served
	}
	var own []RunningRequest
	mine := map[apikey.ID]bool{} // whether a key belongs to the instance
	for _, r := range s.cfg.Leases.Running(apikey.ID{}) {
		is, asked := mine[r.KeyID]
		if !asked {
			_, err := s.store.Key(ctx, instanceID, r.KeyID)
			if err != nil && !errors.Is(err, apikey.ErrNotFound) {
				return nil, err
			}
			is = err == nil
			mine[r.KeyID] = is
		}
		if is {
			own = append(own, r)
		}
	}
	slices.SortFunc(own, func(a, b RunningRequest) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.ID, b.ID))
	})
	return own, nil
}

// EndInFlight ends the lease of a request by force, so that it no longer counts. The request itself
// goes on.
func (s *Service) EndInFlight(ctx context.Context, caller Caller, instanceID, lease string) error {
	id, err := caller.mayIn(instanceID, endInFlight)
	if err != nil {
		return err
	}
	own, err := s.inFlight(ctx, id)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(own, func(r RunningRequest) bool { return r.ID == lease })
	if i < 0 {
		return apikey.ErrNotFound
	}
	// Written down first: no audit, no change.
	_, err = s.update(ctx, func(ctx context.Context, tx Tx) error {
		return caller.audit(ctx, tx, endInFlight, id, own[i].KeyID.String(), map[string]any{"lease": lease, "method": own[i].Method, "path": own[i].Path}, nil)
	})
	if err != nil {
		return err
	}
	return s.cfg.Leases.End(ctx, own[i].Lease)
}
