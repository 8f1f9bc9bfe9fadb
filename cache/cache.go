// Package cache stands in front of the store and gives facts about keys: the record that a digest
// finds, that there is none, or that it cannot tell. It never decides and never remembers a decision.
//
// Trade-off: known keys are answered from memory, as fresh as the last look at the store's revision,
// and a change waits until every replica has confirmed it. So there is no time to live and no stale
// answer after an acknowledged change; the price is that a replica which loses its store stops
// answering: at once for keys it does not hold, after the grace for all.
//
// What keeps it true:
//
//   - Every record carries the generation of its stripe as it was before the record was loaded, and is
//     valid only while that is still the stripe's. Invalidating is counting the stripe up. Neither
//     ristretto's Set nor its Del, which both act later than they return, is relied on for anything.
//   - A poll publishes the revision it heard of, then applies the changes, then confirms, and only then
//     renews the serve lease, from the instant before it began. The lease is judged on the monotonic
//     and on the wall clock: the first stands still while a machine is suspended, the second jumps.
//   - The set of known digests answers for secrets that nobody ever had, without a read. Where it
//     cannot, reads for digests outside it have a budget.
//
// Begin with [New], give [Cache.Run] a goroutine, ask [Cache.Cached] and, where it cannot tell,
// [Cache.FindKey]; ask [Cache.Serving] last, when the answer is ready to go.
package cache

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/singleflight"

	"keyward/authz/apikey"
	"keyward/limits"
)

// A Source is what the cache needs of a store. Safe for concurrent use; every call ends when its
// context does.
type Source interface {
	// FindKey returns the key that a digest finds, with Digest set, whatever its status, and a
	// revision: the record is at least as new as that, also where there is none.
	// Errors: apikey.ErrNotFound; anything else is an outage.
	FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, apikey.Revision, error)
	// Digests calls yield with every digest that finds a key, until it returns false. The digests are
	// at least as new as the returned revision.
	Digests(ctx context.Context, yield func(apikey.Digest) bool) (apikey.Revision, error)
	// RecentKeys calls yield with what FindKey would answer to every digest that finds a key that is not
	// revoked, the keys that were used last first, until it returns false.
	RecentKeys(ctx context.Context, yield func(k *apikey.Key, at apikey.Revision) bool) error
	// Changes returns what changed after a revision and the newest revision; truncated means that the
	// store no longer knows everything since then.
	Changes(ctx context.Context, after apikey.Revision) (changes []apikey.Change, head apikey.Revision, truncated bool, err error)
	// Instances lists all instances.
	Instances(ctx context.Context) ([]*apikey.Instance, error)

	// Register makes a replica known, so that changes wait for it, until ttl after its last Confirm.
	Register(ctx context.Context, replica string, at apikey.Revision, ttl time.Duration) error
	// Confirm says that the replica serves nothing older than a revision, and renews it.
	// Errors: apikey.ErrNotFound if it is no longer known.
	Confirm(ctx context.Context, replica string, at apikey.Revision, ttl time.Duration) error
	// Unregister forgets a replica that serves no more.
	Unregister(ctx context.Context, replica string) error
}

// DefaultGrace and DefaultWarmUp are for an operator who named none. They are not the zero Config's: there,
// no grace is no grace, and no warm-up none.
const (
	DefaultGrace  = 30 * time.Second
	DefaultWarmUp = time.Minute
)

// A Config is what may be chosen about a cache. The zero Config works, and is strict.
type Config struct {
	// Records is how many keys are held; 0: 1,000,000. One takes about 800 bytes, and 50 bytes of
	// counters are reserved for each from the start.
	Records int
	// Unknown is how many digests are remembered as finding nothing; 0: 65,536. About 200 bytes each.
	Unknown int
	// Grace is how long keys in the cache are served after the serve lease has run out. 0: not at all.
	// A change may have to wait for Lease + Grace before it is effective on a replica that is cut off.
	Grace time.Duration
	// WarmUp is how long the keys that were used last may be loaded at the start, as many as Records,
	// before [Cache.Ready] no longer waits for it. 0: none are loaded before they are asked for.
	WarmUp time.Duration
	// LoadTimeout ends a read of one key; 0: 1 s.
	LoadTimeout time.Duration
	// Poll is the time from one look at the store's revision to the next; 0: 500 ms. Shorter than Lease.
	Poll time.Duration
	// Lease is how long a successful poll lets the cache answer, from before the poll began; 0: 2 s.
	// A poll that takes longer is given up.
	Lease time.Duration
	// MissesPerSource and MissesTotal are how many reads of digests that are not known to exist may be
	// made for one source (an IPv4 address, an IPv6 /64) and for all. The zero Rate: 10 per second,
	// 20 at once, and 200 per second, 400 at once.
	MissesPerSource, MissesTotal limits.Rate
	// Replica names this process in the store, unlike any other; "": a random name.
	Replica string
}

func (cfg Config) withDefaults() Config {
	cfg.Records = cmp.Or(cfg.Records, 1_000_000)
	cfg.Unknown = cmp.Or(cfg.Unknown, 65_536)
	cfg.LoadTimeout = cmp.Or(cfg.LoadTimeout, time.Second)
	cfg.Poll = cmp.Or(cfg.Poll, 500*time.Millisecond)
	cfg.Lease = cmp.Or(cfg.Lease, 2*time.Second)
	cfg.MissesPerSource = cmp.Or(cfg.MissesPerSource, limits.Rate{Interval: time.Second / 10, Burst: 20})
	cfg.MissesTotal = cmp.Or(cfg.MissesTotal, limits.Rate{Interval: time.Second / 200, Burst: 400})
	cfg.Replica = cmp.Or(cfg.Replica, rand.Text())
	return cfg
}

// Validate reports every field that cannot be meant.
func (cfg Config) Validate() error {
	var errs []error
	check := func(ok bool, field, reason string) {
		if !ok {
			errs = append(errs, apikey.Invalid(field, reason))
		}
	}
	cfg = cfg.withDefaults()
	check(cfg.Records > 0, "records", "must be at least 1")
	check(cfg.Unknown > 0, "unknown", "must be at least 1")
	check(cfg.Grace >= 0, "grace", "must be 0 (strict) or a duration such as 30s")
	check(cfg.WarmUp >= 0, "warmUp", "must be 0 (none) or a duration such as 60s")
	check(cfg.LoadTimeout > 0, "loadTimeout", "must be a duration above 0 such as 1s")
	check(cfg.Poll > 0, "poll", "must be a duration above 0 such as 500ms")
	check(cfg.Lease > cfg.Poll, "lease", "must be longer than poll, or it would run out between two polls")
	check(cfg.MissesPerSource.Interval > 0 && cfg.MissesPerSource.Burst > 0, "missesPerSource", "must be a rate and a burst above 0")
	check(cfg.MissesTotal.Interval > 0 && cfg.MissesTotal.Burst > 0, "missesTotal", "must be a rate and a burst above 0")
	return errors.Join(errs...)
}

// A Cache gives facts about keys and instances. Safe for concurrent use.
type Cache struct {
	cfg     Config
	store   Source
	log     *slog.Logger
	metrics *metrics
	lease   lease
	records *records
	known   known
	budget  *budget
	packer  *packer
	warm    atomic.Bool // the warm-up is over

	loads     singleflight.Group
	instances atomic.Pointer[map[string]*apikey.Instance]
	follower  follower

	// work counts loads and polls. gate keeps new ones out once Close has begun; without it one could
	// still write to ristretto while that closes, which panics.
	gate      sync.RWMutex
	closed    bool
	work      sync.WaitGroup
	closeOnce sync.Once
}

// New makes a cache. It holds nothing and answers nothing until [Cache.Run] has loaded what it needs.
// End Run, then Close it.
func New(store Source, cfg Config, reg prometheus.Registerer, log *slog.Logger) (*Cache, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	c := &Cache{cfg: cfg.withDefaults(), store: store, log: log, metrics: newMetrics()}
	c.lease = lease{length: c.cfg.Lease, grace: c.cfg.Grace, clock: systemClock()}
	c.known.reset()
	c.instances.Store(&map[string]*apikey.Instance{})
	c.follower.turn, c.follower.rebuild = make(chan struct{}, 1), make(chan struct{}, 1)
	if err := c.metrics.register(reg, c); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	var err error
	if c.budget, err = newBudget(c.cfg.MissesPerSource, c.cfg.MissesTotal); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	if c.packer, err = newPacker(); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	if c.records, err = newRecords(c.cfg.Records, c.cfg.Unknown, c.metrics); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	return c, nil
}

// Close waits for loads under way and frees what the cache holds. Requests may still come, and are not
// answered. End Run before.
func (c *Cache) Close() {
	c.closeOnce.Do(func() {
		c.gate.Lock()
		c.closed = true
		c.gate.Unlock()
		c.work.Wait()
		c.lease.drop()
		c.records.close()
	})
}

// enter begins a piece of work that Close has to wait for; false if it is too late.
func (c *Cache) enter() bool {
	c.gate.RLock()
	defer c.gate.RUnlock()
	if !c.closed {
		c.work.Add(1)
	}
	return !c.closed
}

var (
	errClosed = fmt.Errorf("%w: the cache is closed", apikey.ErrUndecided)
	errLease  = fmt.Errorf("%w: no word from the store for longer than the serve lease", apikey.ErrUndecided)
	errPanic  = fmt.Errorf("%w: a panic, see the log", apikey.ErrUndecided)
)

// Ready reports whether requests should come: all is loaded, and the serve lease holds or its grace lasts.
// Those that come while the cache is being filled are answered too, by way of the store.
func (c *Cache) Ready() bool { return c.warm.Load() && c.lease.phase() != leaseOut }

// Serving is the last check of a decision that was made from this cache's facts. It returns nil while
// the serve lease or its grace holds on both clocks. Errors: apikey.ErrUndecided.
func (c *Cache) Serving() error {
	if c.lease.phase() == leaseOut {
		return errLease
	}
	return nil
}

// Instance returns the policy snapshot of an instance by its canonical id, nil if there is none.
// It takes no lock and allocates nothing.
func (c *Cache) Instance(id string) *apikey.Instance { return (*c.instances.Load())[id] }

// Cached tells what is known of a digest without waiting for anything: a key, or apikey.ErrNotFound.
// ok is false if only [Cache.FindKey] can tell. It allocates nothing, provided that d already lives on
// the heap: what calls through an interface moves it there.
func (c *Cache) Cached(d *apikey.Digest) (k *apikey.Key, ok bool, err error) {
	k, ok, err = c.lookup(d)
	switch {
	case !ok:
		c.metrics.misses.Inc()
	case err != nil:
		c.metrics.unknowns.Inc()
	default:
		c.metrics.hits.Inc()
	}
	return k, ok, err
}

func (c *Cache) lookup(d *apikey.Digest) (*apikey.Key, bool, error) {
	phase := c.lease.phase() // before the facts, so that they are at least as new as it
	if phase == leaseOut {
		return nil, false, nil
	}
	k, generation := c.records.get(d)
	if k != nil {
		return k, true, nil
	}
	if phase != leaseHeld { // what was unknown a lease ago may have been made since
		return nil, false, nil
	}
	if c.known.lacks(d) || c.records.lacks(d, generation) {
		return nil, true, apikey.ErrNotFound
	}
	return nil, false, nil
}

// FindKey returns the key that a digest finds, whatever its status, loading it if needed. source is
// where the request came from; the zero Addr is a source like any other. It waits until ctx is done at
// most.
// Errors: apikey.ErrNotFound; *apikey.BusyError if the budget for unknown digests is spent; otherwise
// apikey.ErrUndecided.
func (c *Cache) FindKey(ctx context.Context, d apikey.Digest, source netip.Addr) (*apikey.Key, error) {
	if k, ok, err := c.lookup(&d); ok {
		return k, err
	}
	if c.lease.phase() != leaseHeld {
		if err := c.renew(ctx); err != nil {
			return nil, err
		}
		if k, ok, err := c.lookup(&d); ok {
			return k, err
		}
	}
	if !c.known.has(&d) {
		if err := c.budget.take(source, c.lease.clock().mono, c.metrics); err != nil {
			return nil, err
		}
	}
	return c.load(ctx, &d)
}

// Guess spends one of the reads that a source may make for digests which are not known to exist, for a
// secret that costs as much to judge. Errors: *apikey.BusyError.
func (c *Cache) Guess(source netip.Addr) error {
	return c.budget.take(source, c.lease.clock().mono, c.metrics)
}

// Lacks reports whether nothing had a digest at the last poll. What [Cache.FindKey] does not find may have had
// it then, and be gone since.
func (c *Cache) Lacks(d *apikey.Digest) bool { return c.known.lacks(d) }

// loadTries is how often a key is read because the answer was too old when it came.
const loadTries = 4

// errStale is how one read says that its answer was too old.
var errStale = fmt.Errorf("%w: find key: the store's answers are older than what this server has seen", apikey.ErrUndecided)

// load reads a key from the store, once for all who ask for it at the same time. Whoever comes after
// an invalidation does not join a read from before it: the generation is part of what is shared.
//
// So of one digest and generation there is one read at a time, and the next begins after it: what one
// of them puts in the place of another's record is never older. A read whose answer was too old is begun
// again here, and not beside one that is shared by the new generation.
func (c *Cache) load(ctx context.Context, d *apikey.Digest) (*apikey.Key, error) {
	for range loadTries {
		generation := c.records.generation(d)
		answer := c.loads.DoChan(loadKey(d, generation), func() (any, error) {
			return c.loadShared(context.WithoutCancel(ctx), d, generation) // others wait for it: the first may leave
		})
		select {
		case a := <-answer:
			if errors.Is(a.Err, errStale) {
				continue
			}
			k, _ := a.Val.(*apikey.Key)
			return k, a.Err
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: find key: %w", apikey.ErrUndecided, context.Cause(ctx))
		}
	}
	return nil, errStale
}

// loadShared reads a key once, for all who wait for it. generation was read before. Errors: errStale.
func (c *Cache) loadShared(ctx context.Context, d *apikey.Digest, generation uint64) (k *apikey.Key, err error) {
	if !c.enter() {
		return nil, errClosed
	}
	defer c.work.Done()
	defer func() {
		if !errors.Is(err, errStale) { // which is counted below
			c.metrics.loaded(err)
		}
	}()
	defer c.recovered("find key", &err)
	ctx, cancel := context.WithTimeout(ctx, c.cfg.LoadTimeout)
	defer cancel()
	c.records.askFor(d)
	// After the generation, in this order: a poll raises heard before it counts the stripe up. Whoever sees
	// the new generation therefore refuses an answer from before the change.
	heard := c.follower.heard.Load()
	k, revision, err := c.store.FindKey(ctx, *d)
	switch {
	case errors.Is(err, apikey.ErrNotFound):
		k = nil
	case err != nil:
		return nil, c.failed("find_key", err)
	case !k.Digest.Equal(d):
		return nil, c.failed("find_key", errors.New("the store answered with a key of another digest"))
	default:
		k = c.packer.pack(k)
	}
	if uint64(revision) < heard || !c.records.fill(d, k, generation) {
		c.metrics.stale.Inc()
		return nil, errStale
	}
	return k, err
}

// Learn makes a digest known that a key was just given without a new revision.
func (c *Cache) Learn(d apikey.Digest) {
	c.known.add(&d)
	c.records.forgetUnknown(&d)
}

// failed counts an error of the store and makes it an outage. The cause is for people only.
func (c *Cache) failed(call string, err error) error {
	c.metrics.storeErrors.WithLabelValues(call).Inc()
	if errors.Is(err, apikey.ErrUndecided) {
		return fmt.Errorf("%s: %w", call, err)
	}
	return fmt.Errorf("%w: %s: %v", apikey.ErrUndecided, call, err) //nolint:errorlint // a driver's error is no promise of ours
}

// recovered, when deferred, turns a panic into an error.
func (c *Cache) recovered(doing string, err *error) {
	if p := recover(); p != nil {
		c.log.Error("panic", "doing", doing, "panic", p, "stack", string(debug.Stack()))
		*err = errPanic
	}
}
