package cache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"

	"keyward/authz/apikey"
)

// A follower keeps a cache as new as the store.
type follower struct {
	polls singleflight.Group
	// heard is the newest revision that this replica has heard of: no answer from before it is kept.
	// It is raised before the stripes are.
	heard atomic.Uint64
	// confirmed is the revision that this replica has told the store it serves nothing older than.
	confirmed atomic.Uint64
	// failedAt is when the last poll failed, in nanoseconds of the monotonic clock; 0 after success.
	failedAt atomic.Int64
	rebuild  chan struct{} // holds one wish for a new set of known digests

	// turn is held by the poll under way. A channel, because a poll may hold it for as long as the
	// store takes, and virtual time stands still while anybody waits for a mutex.
	turn       chan struct{}
	state      runState
	seen       apikey.Revision // everything up to it is applied
	registered bool
	current    bool      // the snapshot of instances is as new as seen
	outage     time.Time // when polls began to fail; zero: they do not
}

type runState int

const (
	notLoaded runState = iota
	following
	stopped
)

// Run loads what the cache needs and then follows the store until ctx ends. After that, nothing more
// is answered and no change waits for this replica: stop taking requests first. Once per cache; it
// returns nil.
func (c *Cache) Run(ctx context.Context) error {
	if !c.loadFirst(ctx) {
		return nil
	}
	var beside sync.WaitGroup
	beside.Go(func() { c.rebuildKnown(ctx) })
	beside.Go(func() { c.warmUp(ctx) })
	tick := time.NewTicker(c.cfg.Poll)
	defer tick.Stop()
	for ctx.Err() == nil {
		_ = c.poll(ctx) // counted and logged where it happens; the next one is due anyway
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	beside.Wait()
	c.stop(ctx)
	return nil
}

// loadFirst reads the known digests, trying until it can or ctx ends.
func (c *Cache) loadFirst(ctx context.Context) bool {
	revision, ok := c.fillKnown(ctx)
	if !ok {
		return false
	}
	f := &c.follower
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	f.seen = revision
	f.heard.Store(uint64(revision))
	f.state = following
	return true
}

// rebuildKnown fills a new set of known digests whenever a poll began one.
func (c *Cache) rebuildKnown(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.follower.rebuild:
			c.fillKnown(ctx)
		}
	}
}

// fillKnown reads all digests into the set that was begun, trying until it can or ctx ends.
func (c *Cache) fillKnown(ctx context.Context) (apikey.Revision, bool) {
	logged := false
	for {
		revision, err := c.readDigests(ctx)
		if err == nil {
			return revision, true
		}
		if ctx.Err() == nil && !logged {
			c.log.Error("cannot read the known keys from the store; trying on", "err", err)
			logged = true
		}
		select {
		case <-ctx.Done():
			return 0, false
		case <-time.After(c.cfg.Poll):
		}
	}
}

func (c *Cache) readDigests(ctx context.Context) (revision apikey.Revision, err error) {
	defer c.recovered("read digests", &err)
	set := c.known.begun()
	if set == nil { // an earlier wish was met together with this one
		return 0, nil
	}
	begin := time.Now()
	heard := c.follower.heard.Load()
	revision, err = c.store.Digests(ctx, func(d apikey.Digest) bool {
		set.add(d.Prefix())
		return ctx.Err() == nil
	})
	if err = errors.Join(err, ctx.Err()); err != nil {
		return 0, c.failed("digests", err)
	}
	// What changed after heard was added by polls, to this set too; what changed before must be in what
	// was just read.
	if uint64(revision) < heard {
		return 0, c.failed("digests", errors.New("the store's answer is older than what this server has seen"))
	}
	c.known.complete(set)
	took := time.Since(begin)
	c.metrics.knownSeconds.Set(took.Seconds())
	c.log.Info("the known keys are read", "digests", set.size(), "took", took.Round(time.Millisecond))
	return revision, nil
}

// stop ends the lease and only then tells the store not to wait for this replica.
func (c *Cache) stop(ctx context.Context) {
	f := &c.follower
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	f.state = stopped
	c.lease.drop()
	if !f.registered {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.cfg.LoadTimeout) // ctx is over
	defer cancel()
	if err := c.store.Unregister(ctx, c.cfg.Replica); err != nil {
		c.log.Warn("cannot unregister from the store; changes wait for this replica until its lease has run out",
			"after", c.cfg.Lease+c.cfg.Grace, "err", c.failed("unregister", err))
	}
}

// catchUpTries is how often a poll may not reach the revision that it was made for.
const catchUpTries = 3

// CatchUp reads the changes up to a revision at least, applies them and tells the store. When it
// returns nil, nothing older is served by this replica. Errors: apikey.ErrUndecided.
func (c *Cache) CatchUp(ctx context.Context, revision apikey.Revision) error {
	err := fmt.Errorf("%w: the store does not show it", apikey.ErrUndecided)
	// A poll that was under way may have begun before the change, so one is not enough.
	for range catchUpTries {
		if c.follower.confirmed.Load() >= uint64(revision) {
			return nil
		}
		if failed := c.poll(ctx); failed != nil {
			err = failed
		}
	}
	if c.follower.confirmed.Load() >= uint64(revision) {
		return nil
	}
	return fmt.Errorf("catch up with revision %d: %w", revision, err)
}

// renewEvery is how soon after a failed poll a request may make another one: those who ask while the
// store is away should not keep it from coming back.
const renewEvery = 50 * time.Millisecond

// renew tries to get the serve lease back for a request that cannot be answered without it.
func (c *Cache) renew(ctx context.Context) error {
	if at := c.follower.failedAt.Load(); at != 0 && c.lease.clock().mono-at < int64(renewEvery) {
		return errLease
	}
	if err := c.poll(ctx); err != nil {
		return err
	}
	if c.lease.phase() != leaseHeld {
		return errLease
	}
	return nil
}

// poll looks at the store's revision, once for all who ask at the same time, and waits until ctx is
// done at most. Errors: apikey.ErrUndecided.
func (c *Cache) poll(ctx context.Context) error {
	answer := c.follower.polls.DoChan("", func() (any, error) {
		return nil, c.pollShared(context.WithoutCancel(ctx)) // others wait for it: the first may leave
	})
	select {
	case a := <-answer:
		return a.Err
	case <-ctx.Done():
		return fmt.Errorf("%w: poll: %w", apikey.ErrUndecided, context.Cause(ctx))
	}
}

var errNotFollowing = fmt.Errorf("%w: the cache is not following the store", apikey.ErrUndecided)

func (c *Cache) pollShared(ctx context.Context) (err error) {
	if !c.enter() {
		return errClosed
	}
	defer c.work.Done()
	f := &c.follower
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	if f.state != following {
		return errNotFollowing
	}
	defer func() { c.noteOutage(err) }()
	defer c.recovered("poll", &err)
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Lease) // a longer poll could not renew anything
	defer cancel()
	if err = c.followOnce(ctx); !errors.Is(err, errForgotten) {
		return err
	}
	c.lease.drop() // changes may not have waited for this replica
	f.registered = false
	c.log.Warn("the store no longer knew this replica; forgetting everything and registering anew")
	c.metrics.flushes.Inc()
	c.records.invalidateAll()
	return c.followOnce(ctx)
}

var errForgotten = fmt.Errorf("%w: the store does not know this replica", apikey.ErrUndecided)

// followOnce applies what changed and renews the lease. Errors: errForgotten, or an outage. The caller
// holds the follower's lock.
func (c *Cache) followOnce(ctx context.Context) error {
	f := &c.follower
	begin := c.lease.clock() // the store counts from later, so it waits for longer than we serve
	ttl := c.cfg.Lease + c.cfg.Grace
	if !f.registered { // before the changes are read: what comes after them waits for us
		if err := c.store.Register(ctx, c.cfg.Replica, f.seen, ttl); err != nil {
			return c.failed("register", err)
		}
		f.registered = true
	}
	changes, head, truncated, err := c.store.Changes(ctx, f.seen)
	if err != nil {
		return c.failed("changes", err)
	}
	if err := c.apply(ctx, changes, head, truncated); err != nil {
		return err
	}
	switch err := c.store.Confirm(ctx, c.cfg.Replica, head, ttl); {
	case errors.Is(err, apikey.ErrNotFound):
		return errForgotten
	case err != nil:
		return c.failed("confirm", err)
	}
	c.lease.renew(begin)
	f.confirmed.Store(uint64(head))
	return nil
}

// apply makes the facts as new as head: instances, then what is known, then the stripes, and last the
// revision. If it fails, nothing has moved.
func (c *Cache) apply(ctx context.Context, changes []apikey.Change, head apikey.Revision, truncated bool) error {
	f := &c.follower
	lost := truncated || head < f.seen
	instances := lost || !f.current
	for i := range changes {
		instances = instances || changes[i].KeyID.IsZero()
	}
	if instances {
		list, err := c.store.Instances(ctx)
		if err != nil {
			return c.failed("instances", err)
		}
		byID := make(map[string]*apikey.Instance, len(list))
		for _, in := range list {
			byID[in.ID] = in
		}
		c.instances.Store(&byID)
		f.current = true
	}
	f.heard.Store(uint64(head))
	if lost {
		c.log.Warn("the store does not know what changed since this server's revision, as after a restored backup; forgetting everything",
			"revision", f.seen, "store", head)
		c.metrics.flushes.Inc()
		c.known.reset()
		c.records.invalidateAll()
		select {
		case f.rebuild <- struct{}{}:
		default: // one is wished for already
		}
	}
	for i := range changes {
		for j := range changes[i].Digests {
			d := &changes[i].Digests[j]
			c.known.add(d)
			c.records.invalidate(d)
		}
	}
	// Otherwise the Dels of many changes leave the queue full, and what is loaded next is not kept.
	c.records.keys.Wait()
	f.seen = head
	return nil
}

// noteOutage logs the first of the polls that fail, and the first that does not.
func (c *Cache) noteOutage(err error) {
	f := &c.follower
	switch {
	case err != nil && f.outage.IsZero():
		f.outage = time.Now()
		c.log.Error("cannot follow the store; keys in the cache are served until lease and grace have run out, others are not",
			"lease", c.cfg.Lease, "grace", c.cfg.Grace, "err", err)
	case err == nil && !f.outage.IsZero():
		c.log.Info("following the store again", "after", time.Since(f.outage))
		f.outage = time.Time{}
	}
	var at int64
	if err != nil {
		at = max(c.lease.clock().mono, 1)
	}
	f.failedAt.Store(at)
}
