// Package usage knows who used what: how many requests of which key were let through and refused, why, from
// which networks, and when a key was last used.
//
// A [Counter] hears of every decision and writes what it counted in batches, so that a request costs the store
// nothing. Trade-off: what was not written yet is lost with the process, some ten seconds at most while the
// store can be written to.
package usage

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A Store keeps last uses and counts.
type Store interface {
	Touch(ctx context.Context, uses []apikey.Use) error
	AddUsage(ctx context.Context, as admin.UsageBatch, counts []admin.Usage) error
}

// A Listener hears of counts that were written, each once. They are lent: it must not change them.
type Listener interface {
	Counted(ctx context.Context, counts []admin.Usage)
}

// Config says what is counted. The zero value counts everything.
type Config struct {
	// Off counts nothing. Last uses are written all the same, because keys may end when they are idle.
	Off bool
	// Instance returns an instance by its canonical id, nil if there is none: of an instance that is gone, or
	// does not want it, nothing is counted. It is asked within ten seconds of a decision; what is written later is
	// written only if the same instance is there still. nil: all are counted.
	Instance func(id string) *apikey.Instance
	// Listener hears of what was written; nil: nobody.
	Listener Listener
}

// A Counter counts decisions and what Envoy's access log tells of requests, and remembers when keys were last
// used. It implements authz.Uses. Safe for concurrent use.
//
// Shape: for each key that something happened to since counts were last taken, one record in one of 64 shards;
// what belongs to no key is in one record per instance and shard. Instance totals are made of both when they
// are taken, so that they are exact also when there was no room for a key's own counts.
type Counter struct {
	store   Store
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	shards  [shards]shard
	// recent remembers keys that end when they are idle, so that those in use need not be asked about.
	recent *lru.Cache[apikey.ID, time.Time]

	// What was taken from the shards and is not written.
	mu   sync.Mutex
	uses map[apikey.ID][]apikey.Use // one for each generation
	kept map[place]*admin.UsageCounts
	// sent is the batch that was given to the store, until that says that it has it. Whether it has is not known
	// after an error, so it comes again as it was, under its name, before another one.
	sent   []admin.Usage
	sentAs admin.UsageBatch
}

const (
	shards = 64
	// interval is well below the minute by which a last use may be late, and divides it: no minute's counts
	// wait for another's.
	interval     = 10 * time.Second
	writeTimeout = 5 * time.Second
	// endTimeout is for everything that is written when the process ends: with the time that running requests have
	// then it stays below the 30 s after which orchestrators kill.
	endTimeout = 10 * time.Second
	// recentKeys is how many keys that can become idle are remembered; of others the store is asked.
	recentKeys = 65_536
	// maxSeries is how many keys are counted apart between two writes, some 40 MB.
	maxSeries = 100_000
	// maxKept is how many counts wait for a store that cannot be written to.
	maxKept = 2 * maxSeries
	// batchSize bounds how long a batch keeps the store's writer from others.
	batchSize = 100
	// usesSize is how many last uses are written within one writeTimeout.
	usesSize = 1000
)

// A place is one Usage's.
type place struct {
	instance string
	made     int64     // when the instance was, Unix time in µs: its id alone may mean another one later
	key      apikey.ID // zero: the instance as a whole
	minute   int64     // Unix time / 60
}

// NewCounter returns a Counter that writes to store while Run runs. Its metrics go to reg; nil: nowhere.
func NewCounter(store Store, cfg Config, reg prometheus.Registerer, log *slog.Logger) *Counter {
	recent, err := lru.New[apikey.ID, time.Time](recentKeys)
	if err != nil {
		panic(err) // only for a size below 1
	}
	c := &Counter{
		store: store, cfg: cfg, log: log, recent: recent,
		uses: map[apikey.ID][]apikey.Use{}, kept: map[place]*admin.UsageCounts{}, sentAs: admin.UsageBatch{Writer: apikey.ID(uuid.New())},
	}
	c.metrics = newMetrics(reg, c.waiting)
	return c
}

// waiting is how many series are not written.
func (c *Counter) waiting() int {
	c.mu.Lock() // who takes holds it until all is in one of the two
	defer c.mu.Unlock()
	return int(c.metrics.series.Load()) + len(c.kept) + len(c.sent)
}

// shardOf chooses by the last byte of a key's UUIDv7, which is random. What belongs to no key is spread: a
// flood of garbage should not have to wait for itself.
func (c *Counter) shardOf(key apikey.ID) *shard {
	if key.IsZero() {
		return &c.shards[rand.Uint32()%shards] //nolint:gosec // any will do
	}
	return &c.shards[key[15]%shards]
}

// Decided implements authz.Uses.
func (c *Counter) Decided(u authz.Use) {
	allowed := u.Reason.Outcome() == authz.Allowed
	from := networkOf(u.Client)
	var key apikey.ID
	if u.Key != nil {
		key = u.Key.ID
		if allowed && u.Key.InactivityDays > 0 {
			c.recent.Add(key, u.At)
		}
	}
	s := c.shardOf(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.at(u.At)
	r := p.record(key, u.InstanceID)
	if r == nil && !key.IsZero() && c.metrics.series.Load() >= maxSeries {
		c.metrics.dropped.Inc()
		if allowed {
			p.usedLate(&u, from)
		}
		key = apikey.ID{} // the instance's total stays exact
		r = p.record(key, u.InstanceID)
	}
	if r == nil {
		r = p.add(s, key, u.InstanceID, &c.metrics.series)
	}
	r.instance = u.InstanceID // not what an access log said of the key before: whoever writes it can make up instances
	if !allowed {
		r.refuse(u.Reason)
		return
	}
	r.allow(from)
	if !key.IsZero() {
		r.use(u.Key.Generation, u.At, from, u.Pattern)
	}
}

// Last implements authz.Uses: when a key that can become idle was last used, as far as this process remembers.
func (c *Counter) Last(id apikey.ID) time.Time {
	at, _ := c.recent.Peek(id)
	return at
}

// Ended counts what Envoy tells of a request that ended: status 0 if none was sent. A request of no key has a
// zero one. instanceID may be borrowed.
func (c *Counter) Ended(instanceID string, key apikey.ID, status int, requestBytes, responseBytes int64, took time.Duration) {
	s := c.shardOf(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.at(time.Now())
	r := p.record(key, instanceID)
	if r == nil && c.metrics.series.Load() >= maxSeries {
		key = apikey.ID{}
		r = p.record(key, instanceID)
		c.metrics.dropped.Inc()
		if r == nil { // no new one: whoever can write access logs can make up instances
			return
		}
	}
	if r == nil {
		r = p.add(s, key, strings.Clone(instanceID), &c.metrics.series)
	}
	r.end(status, requestBytes, responseBytes, took)
}

// Pending returns the last use of a key that is not written yet, zero if there is none. What it does not
// return was written before.
func (c *Counter) Pending(id apikey.ID) (last time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, u := range c.uses[id] {
		if u.At.After(last) {
			last = u.At
		}
	}
	s := c.shardOf(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range append(s.over, s.now) {
		if p == nil {
			continue
		}
		if r := p.keys[id]; r != nil && r.last.After(last) {
			last = r.last
		}
		for u, late := range p.late {
			if u.key == id && late.at.After(last) {
				last = late.at
			}
		}
	}
	return last
}
