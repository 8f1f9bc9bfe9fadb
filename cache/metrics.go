package cache

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz/apikey"
)

// metrics are counted one by one, not by looking up a label: the first three are on the way of every
// request.
type metrics struct {
	hits, misses, unknowns      prometheus.Counter
	found, notFound, failed     prometheus.Counter
	dropped, rejected, evicted  prometheus.Counter
	refusedSource, refusedTotal prometheus.Counter
	stale, flushes              prometheus.Counter
	storeErrors                 *prometheus.CounterVec
	knownSeconds                prometheus.Gauge
	warmSeconds, warmRecords    prometheus.Gauge
	all                         []prometheus.Collector
}

func newMetrics() *metrics {
	m := &metrics{}
	vec := func(name, label, help string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "keyward", Subsystem: "cache", Name: name, Help: help}, []string{label})
		m.all = append(m.all, v)
		return v
	}
	counter := func(name, help string) prometheus.Counter {
		v := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "keyward", Subsystem: "cache", Name: name, Help: help})
		m.all = append(m.all, v)
		return v
	}
	gauge := func(name, help string) prometheus.Gauge {
		v := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "keyward", Subsystem: "cache", Name: name, Help: help})
		m.all = append(m.all, v)
		return v
	}
	lookups := vec("lookups_total", "result", "Look-ups in the cache: a key was there (hit), it is known that there is none (unknown), or the store has to be asked (miss).")
	m.hits, m.misses, m.unknowns = lookups.WithLabelValues("hit"), lookups.WithLabelValues("miss"), lookups.WithLabelValues("unknown")
	loads := vec("loads_total", "outcome", "Keys read from the store, by outcome.")
	m.found, m.notFound, m.failed = loads.WithLabelValues("found"), loads.WithLabelValues("not_found"), loads.WithLabelValues("error")
	lost := vec("sets_dropped_total", "by", "Keys that were read but not kept: the queue was full (queue), or others are used more (policy).")
	m.dropped, m.rejected = lost.WithLabelValues("queue"), lost.WithLabelValues("policy")
	refused := vec("budget_refusals_total", "budget", "Look-ups of unknown keys that were put off because the budget was spent.")
	m.refusedSource, m.refusedTotal = refused.WithLabelValues("source"), refused.WithLabelValues("total")
	m.evicted = counter("evictions_total", "Keys that made room for others.")
	m.stale = counter("stale_fills_total", "Answers of the store that were dropped because something changed while they were read.")
	m.flushes = counter("flushes_total", "How often everything had to be forgotten.")
	m.storeErrors = vec("store_errors_total", "call", "Calls of the store that failed.")
	for _, call := range []string{"find_key", "changes", "confirm", "register", "unregister", "digests", "instances", "recent_keys"} {
		m.storeErrors.WithLabelValues(call) // what is there from the first scrape on is seen to grow
	}
	m.knownSeconds = gauge("known_load_seconds", "How long the set of known digests took to read, the last time.")
	m.warmSeconds = gauge("warm_up_seconds", "How long the keys that were used last took to load at the start; 0 until they are.")
	m.warmRecords = gauge("warm_up_records", "Keys that were loaded at the start and read back.")
	return m
}

// register adds the metrics, and those that are read off c, to reg.
func (m *metrics) register(reg prometheus.Registerer, c *Cache) error {
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "keyward", Subsystem: "cache", Name: name, Help: help}, value)
	}
	all := append(m.all,
		gauge("lease_state", "The right to answer: 2 held, 1 grace (only keys in the cache), 0 out (503).",
			func() float64 { return float64(c.lease.phase()) }),
		gauge("revision", "The store's revision that this replica has confirmed.",
			func() float64 { return float64(c.follower.confirmed.Load()) }),
		gauge("known_digests", "Digests known to find a key.",
			func() float64 { return float64(c.known.size()) }))
	var errs []error
	for _, one := range all {
		errs = append(errs, reg.Register(one))
	}
	return errors.Join(errs...)
}

// loaded counts the end of a load.
func (m *metrics) loaded(err error) {
	switch {
	case err == nil:
		m.found.Inc()
	case errors.Is(err, apikey.ErrNotFound):
		m.notFound.Inc()
	default:
		m.failed.Inc()
	}
}
