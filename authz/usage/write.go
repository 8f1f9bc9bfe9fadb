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
			Help: "Requests that are missing in what their key, or with the store away for long their instance, is said to have done: there were too many to remember, or the process ended.",
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

// Run writes until ctx is done, and then once more, for [endTimeout] at most. It writes at whole multiples of its
// interval, so that a minute is over when its counts are written last.
func (c *Counter) Run(ctx context.Context) error {
	for {
		next := time.NewTimer(interval - time.Duration(time.Now().UnixNano())%interval)
		select {
		case <-next.C:
			c.write(ctx)
		case <-ctx.Done():
			next.Stop()
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
			defer cancel()
			c.write(end) // what happened before the end still counts
			c.lose()
			return nil
		}
	}
}

// write writes what there is. What cannot be written waits for the next time.
func (c *Counter) write(ctx context.Context) {
	uses, counts := c.take()
	for some := range slices.Chunk(uses, usesSize) {
		within, cancel := context.WithTimeout(ctx, writeTimeout)
		err := c.store.Touch(within, some)
		cancel()
		if err != nil {
			c.failed(err, "last uses could not be written; they are kept and tried again", len(some))
			break
		}
		c.touched(some)
	}
	if len(c.sent) > 0 && !c.send(ctx) {
		return
	}
	for batch := range slices.Chunk(counts, batchSize) {
		c.next(batch)
		if !c.send(ctx) {
			return
		}
	}
}

// next makes counts the batch that is sent.
func (c *Counter) next(counts []admin.Usage) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range counts {
		u := &counts[i]
		delete(c.kept, place{u.InstanceID, u.InstanceMade.UnixMicro(), u.KeyID, u.Start.Unix() / 60})
	}
	c.sent = slices.Clone(counts) // not the whole list, while the store is away
	c.sentAs.Number++
}

// send gives the batch to the store, and reports whether that has it.
func (c *Counter) send(ctx context.Context) bool {
	within, cancel := context.WithTimeout(ctx, writeTimeout)
	err := c.store.AddUsage(within, c.sentAs, c.sent)
	cancel()
	if err != nil {
		c.failed(err, "counts of requests could not be written; they are kept and tried again", len(c.sent))
		return false
	}
	c.metrics.written.Add(float64(len(c.sent)))
	if c.cfg.Listener != nil {
		c.cfg.Listener.Counted(ctx, c.sent)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sent = nil
	return true
}

func (c *Counter) failed(err error, what string, n int) {
	c.metrics.failures.Inc()
	c.log.Warn(what, slog.Int("number", n), slog.Any("error", err))
}

// lose tells what is lost because the process ends. Of the batch that is sent it is not known.
func (c *Counter) lose() {
	c.mu.Lock()
	defer c.mu.Unlock()
	uses := 0
	for _, of := range c.uses {
		uses += len(of)
	}
	type minute struct { // of an instance
		instance     string
		made, minute int64
	}
	missing := map[minute]struct{ all, keys int64 }{} // a request is in its instance's counts, and may be in a key's
	add := func(at place, n *admin.UsageCounts) {
		m := minute{at.instance, at.made, at.minute}
		sums := missing[m]
		if at.key.IsZero() {
			sums.all += requests(n)
		} else {
			sums.keys += requests(n)
		}
		missing[m] = sums
	}
	for at, n := range c.kept {
		add(at, n)
	}
	for i := range c.sent {
		u := &c.sent[i]
		add(place{u.InstanceID, u.InstanceMade.UnixMicro(), u.KeyID, u.Start.Unix() / 60}, &u.UsageCounts)
	}
	lost := int64(0)
	for _, sums := range missing {
		lost += max(sums.all, sums.keys)
	}
	if uses == 0 && lost == 0 {
		return
	}
	c.metrics.dropped.Add(float64(lost))
	c.log.Error("the process ends, and what was counted last is not written: the store could not take it in time",
		slog.Int64("requests", lost), slog.Int("last_uses", uses), slog.Duration("within", endTimeout))
}

// requests is how many requests counts are of.
func requests(n *admin.UsageCounts) int64 { return max(n.Allowed+n.Refused, n.Ended.Count) }

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
		counts = append(counts, admin.Usage{
			InstanceID: at.instance, InstanceMade: time.UnixMicro(at.made).UTC(), KeyID: at.key, Start: time.Unix(60*at.minute, 0).UTC(), UsageCounts: *n,
		})
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
	made, wanted := c.wanted(r.instance)
	if !wanted {
		return
	}
	counts := r.counts()
	for _, at := range []place{{r.instance, made, key, minute}, {r.instance, made, apikey.ID{}, minute}} {
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

// wanted reports whether an instance's requests are to be counted, and when it was made: in µs, and the zero time where
// that does not matter.
func (c *Counter) wanted(id string) (made int64, ok bool) {
	made = time.Time{}.UnixMicro()
	if c.cfg.Off {
		return made, false
	}
	if c.cfg.Instance == nil || id == "" {
		return made, true
	}
	instance := c.cfg.Instance(id)
	if instance == nil || !instance.Policy.Usage.On() {
		return made, false
	}
	return instance.CreatedAt.UnixMicro(), true
}

// bound drops counts of keys, and if that is not enough of instances, that there are too many of.
func (c *Counter) bound() {
	for _, all := range []bool{false, true} {
		for at, n := range c.kept {
			if len(c.kept) <= maxKept {
				return
			}
			if all || !at.key.IsZero() {
				c.metrics.dropped.Add(float64(requests(n)))
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
		left := slices.DeleteFunc(c.uses[u.KeyID], func(of apikey.Use) bool { return of.Generation == u.Generation })
		if len(left) == 0 {
			delete(c.uses, u.KeyID)
		} else {
			c.uses[u.KeyID] = left
		}
	}
}
