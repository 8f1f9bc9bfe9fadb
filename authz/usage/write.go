package usage

import (
	"bytes"
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

type metrics struct {
	series   atomic.Int64 // in the shards
	written  prometheus.Counter
	dropped  prometheus.Counter
	failures prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, waiting func() int) *metrics {
	m := &metrics{
		written: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyward_usage_written_total", Help: "Counts of a key or an instance in a minute that were added to the store.",
		}),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyward_usage_dropped_total",
			Help: "Requests that are missing in what their key, or with the store away for long their instance, is said to have done: there were too many to remember.",
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyward_usage_failures_total", Help: "Times that last uses or counts could not be written. They are kept and tried again.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.written, m.dropped, m.failures, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "keyward_usage_series", Help: "Keys and instances of which something was counted that is not written yet, each minute apart.",
		}, func() float64 { return float64(waiting()) }))
	}
	return m
}

// Run writes until ctx is done, and then once more. It writes at whole multiples of its interval, so that a
// minute is over when its counts are written last.
func (c *Counter) Run(ctx context.Context) error {
	for {
		next := time.NewTimer(interval - time.Duration(time.Now().UnixNano())%interval)
		select {
		case <-next.C:
			c.write(ctx)
		case <-ctx.Done():
			next.Stop()
			c.write(context.WithoutCancel(ctx)) // what happened before the end still counts
			return nil
		}
	}
}

// write writes what there is. What cannot be written waits for the next time.
func (c *Counter) write(ctx context.Context) {
	uses, counts := c.take()
	if len(uses) > 0 {
		within, cancel := context.WithTimeout(ctx, writeTimeout)
		err := c.store.Touch(within, uses)
		cancel()
		if err != nil {
			c.failed(err, "last uses could not be written; they are kept and tried again", len(uses))
		} else {
			c.touched(uses)
		}
	}
	for batch := range slices.Chunk(counts, batchSize) {
		within, cancel := context.WithTimeout(ctx, writeTimeout)
		err := c.store.AddUsage(within, batch)
		cancel()
		if err != nil {
			c.failed(err, "counts of requests could not be written; they are kept and tried again", len(batch))
			return
		}
		c.metrics.written.Add(float64(len(batch)))
		c.added(batch)
		if c.cfg.Listener != nil {
			c.cfg.Listener.Counted(ctx, batch)
		}
	}
}

func (c *Counter) failed(err error, what string, n int) {
	c.metrics.failures.Inc()
	c.log.Warn(what, slog.Int("number", n), slog.Any("error", err))
}

// take takes what the shards hold to what waits to be written, and lists all that does.
func (c *Counter) take() (uses []apikey.Use, counts []admin.Usage) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.shards {
		s := &c.shards[i]
		taken := s.take()
		for _, p := range taken {
			c.keep(p)
			c.metrics.series.Add(-int64(len(p.keys) + len(p.instances)))
		}
		s.give(taken)
	}
	c.bound()
	for _, of := range c.uses {
		uses = append(uses, of...)
	}
	for at, n := range c.kept {
		counts = append(counts, admin.Usage{InstanceID: at.instance, KeyID: at.key, Start: time.Unix(60*at.minute, 0).UTC(), UsageCounts: *n})
	}
	slices.SortFunc(counts, func(a, b admin.Usage) int { // as they lie in the store
		return cmp.Or(a.Start.Compare(b.Start), cmp.Compare(a.InstanceID, b.InstanceID), bytes.Compare(a.KeyID[:], b.KeyID[:]))
	})
	return uses, counts
}

// keep adds a period to what waits to be written.
func (c *Counter) keep(p *period) {
	for id, r := range p.keys {
		network := r.from.String()
		for _, g := range r.generations { // the key's last use is also one of these
			c.keepUse(apikey.Use{KeyID: id, Generation: g.of, At: g.last, Network: network, Path: r.pattern})
		}
		c.keepCounts(p.minute, id, r)
	}
	for _, r := range p.instances {
		c.keepCounts(p.minute, apikey.ID{}, r)
	}
	for u, late := range p.late {
		c.keepUse(apikey.Use{KeyID: u.key, Generation: u.generation, At: late.at, Network: late.from.String(), Path: late.pattern})
	}
}

func (c *Counter) keepUse(u apikey.Use) {
	for i := range c.uses[u.KeyID] {
		if kept := &c.uses[u.KeyID][i]; kept.Generation == u.Generation {
			if u.At.After(kept.At) {
				*kept = u
			}
			return
		}
	}
	c.uses[u.KeyID] = append(c.uses[u.KeyID], u)
}

// keepCounts adds a record to its key's counts and to its instance's.
func (c *Counter) keepCounts(minute int64, key apikey.ID, r *record) {
	if !c.wanted(r.instance) {
		return
	}
	counts := r.counts()
	for _, at := range []place{{r.instance, key, minute}, {r.instance, apikey.ID{}, minute}} {
		kept := c.kept[at]
		if kept == nil {
			kept = new(admin.UsageCounts)
			c.kept[at] = kept
		}
		kept.Add(counts)
		if key.IsZero() {
			return
		}
	}
}

// wanted reports whether an instance's requests are to be counted.
func (c *Counter) wanted(id string) bool {
	if c.cfg.Off {
		return false
	}
	if c.cfg.Instance == nil || id == "" {
		return true
	}
	instance := c.cfg.Instance(id)
	return instance != nil && instance.Policy.Usage.On()
}

// bound drops counts of keys, and if that is not enough of instances, that there are too many of.
func (c *Counter) bound() {
	for _, all := range []bool{false, true} {
		for at, n := range c.kept {
			if len(c.kept) <= maxKept {
				return
			}
			if all || !at.key.IsZero() {
				c.metrics.dropped.Add(float64(max(n.Allowed+n.Refused, n.Ended.Count)))
				delete(c.kept, at)
			}
		}
	}
}

// touched forgets what was written of last uses: nothing was noted since it was taken.
func (c *Counter) touched(uses []apikey.Use) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, u := range uses {
		delete(c.uses, u.KeyID)
	}
}

// added forgets what was written of counts.
func (c *Counter) added(counts []admin.Usage) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range counts {
		u := &counts[i]
		delete(c.kept, place{u.InstanceID, u.KeyID, u.Start.Unix() / 60})
	}
}
