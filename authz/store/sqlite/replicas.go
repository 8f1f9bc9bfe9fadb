package sqlite

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// replicas are the replicas of this store. They live in memory: one process may have the file open, so
// whoever answers Checks from it is in this process and ends with it. A list on disk could only name
// replicas that are gone, and a revocation after a crash would wait for them. The clock is Go's, which
// is monotonic: a step of the wall clock lets nobody run out.
type replicas struct {
	calls *calls
	mu    sync.Mutex
	known map[string]admin.Replica
	leads map[string]lead // by job
}

// A lead is who does a job, and until when. It lives in memory for the same reason as the replicas.
type lead struct {
	holder string
	until  time.Time
}

// Lead implements admin.Store.
func (r *replicas) Lead(ctx context.Context, job, holder string, ttl time.Duration) (bool, error) {
	leave, err := r.enter(ctx, "lead "+job)
	if err != nil {
		return false, err
	}
	defer leave()
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if held, ok := r.leads[job]; ok && held.holder != holder && now.Before(held.until) {
		return false, nil
	}
	if r.leads == nil {
		r.leads = map[string]lead{}
	}
	r.leads[job] = lead{holder, now.Add(ttl)}
	return ttl > 0, nil
}

// Register implements admin.Store.
func (r *replicas) Register(ctx context.Context, replica string, at apikey.Revision, ttl time.Duration) error {
	leave, err := r.enter(ctx, "register replica")
	if err != nil {
		return err
	}
	defer leave()
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now().UTC()
	r.sweepLocked(now)
	if r.known == nil {
		r.known = map[string]admin.Replica{}
	}
	r.known[replica] = admin.Replica{ID: replica, Confirmed: at, Until: now.Add(ttl)}
	return nil
}

// Confirm implements admin.Store.
func (r *replicas) Confirm(ctx context.Context, replica string, at apikey.Revision, ttl time.Duration) error {
	leave, err := r.enter(ctx, "confirm")
	if err != nil {
		return err
	}
	defer leave()
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now().UTC()
	r.sweepLocked(now)
	one, ok := r.known[replica]
	if !ok {
		return fmt.Errorf("replica: %w", apikey.ErrNotFound)
	}
	one.Confirmed = max(one.Confirmed, at)
	one.Until = now.Add(ttl)
	r.known[replica] = one
	return nil
}

// Unregister implements admin.Store.
func (r *replicas) Unregister(ctx context.Context, replica string) error {
	leave, err := r.enter(ctx, "unregister replica")
	if err != nil {
		return err
	}
	defer leave()
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.known, replica)
	return nil
}

// Replicas implements admin.Store.
func (r *replicas) Replicas(ctx context.Context) ([]admin.Replica, error) {
	leave, err := r.enter(ctx, "list replicas")
	if err != nil {
		return nil, err
	}
	defer leave()
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now().UTC()
	r.sweepLocked(now)
	list := make([]admin.Replica, 0, len(r.known))
	for _, one := range r.known {
		one.Now = now
		list = append(list, one)
	}
	slices.SortFunc(list, func(a, b admin.Replica) int { return cmp.Compare(a.ID, b.ID) })
	return list, nil
}

func (r *replicas) enter(ctx context.Context, what string) (leave func(), err error) {
	if err = ctx.Err(); err == nil {
		leave, err = r.calls.enter()
	}
	if err != nil {
		return nil, fmt.Errorf("store: %s: %w: %w", what, apikey.ErrUndecided, err)
	}
	return leave, nil
}

// sweepLocked drops the replicas that have run out.
func (r *replicas) sweepLocked(now time.Time) {
	for id, one := range r.known {
		if !now.Before(one.Until) {
			delete(r.known, id)
		}
	}
}
