package accesslog

import (
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A kind is what became of an entry.
type kind uint8

const (
	kindEnd         kind = iota // it ended a lease
	kindIdentityEnd             // it ended whatever its request holds
	kindRenewal
	kindUsage     // it told what a request was
	kindIgnored   // not for us
	kindForged    // its lease is not its request's
	kindForeign   // its lease is of an unknown pepper
	kindMalformed // it could not be read
	kinds
)

var kindNames = [kinds]string{
	kindEnd: "end", kindIdentityEnd: "identity_end", kindRenewal: "renewal", kindUsage: "usage", kindIgnored: "ignored",
	kindForged: "forged", kindForeign: "foreign", kindMalformed: "malformed",
}

// metrics counts what was heard.
type metrics struct {
	entries  [kinds]prometheus.Counter
	delay    prometheus.Histogram
	streams  prometheus.Gauge
	failures prometheus.Counter
	panics   prometheus.Counter

	forged, foreign, lost, broken complaint
}

func newMetrics(reg prometheus.Registerer, nodes func() float64) *metrics {
	entries := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "keyward_access_log_entries_total",
		Help: "Access-log entries by what became of them.",
	}, []string{"kind"})
	m := &metrics{
		delay: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "keyward_access_log_delay_seconds",
			Help:    "Time from a request's end, by Envoy's clock, to its release here.",
			Buckets: []float64{1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1, 5, 30},
		}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "keyward_access_log_streams",
			Help: "Access-log streams that are open.",
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyward_access_log_failures_total",
			Help: "Batches of ends and renewals that could not be passed on.",
		}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyward_access_log_panics_total",
			Help: "Messages that met a fault of keyward's own. The log has the stack.",
		}),
	}
	for k, name := range kindNames {
		m.entries[k] = entries.WithLabelValues(name)
	}
	known := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "keyward_access_log_nodes",
		Help: "Connections by which access logs came.",
	}, nodes)
	reg.MustRegister(entries, m.delay, m.streams, m.failures, m.panics, known)
	return m
}

// late notes how long ago a request ended, if that is known. Envoy's clock may be a little ahead: no
// delay. Much ahead or far behind, it is wrong and says nothing.
func (m *metrics) late(now, end time.Time) {
	if delay := now.Sub(end); !end.IsZero() && delay > -time.Second && delay < time.Hour {
		m.delay.Observe(max(delay, 0).Seconds())
	}
}

// complainEvery is how often the same complaint is logged.
const complainEvery = 10 * time.Second

// A complaint is something that may come with every entry and is logged now and then.
type complaint struct {
	next    atomic.Int64 // when it may be logged again, in Unix nanoseconds
	skipped atomic.Int64 // since it was last logged
}

// due reports whether it may be logged now, and how often it was not since it last was.
func (c *complaint) due() (skipped int64, ok bool) {
	now := time.Now()
	next := c.next.Load()
	if now.UnixNano() < next || !c.next.CompareAndSwap(next, now.Add(complainEvery).UnixNano()) {
		c.skipped.Add(1)
		return 0, false
	}
	return c.skipped.Swap(0), true
}

func (s *Server) complain(about *complaint, what string, args ...any) {
	if skipped, ok := about.due(); ok {
		s.log.Warn(what, append(args, slog.Int64("skipped", skipped))...)
	}
}

// panicked tells of a panic without its value, which may hold what an entry carried.
func (s *Server) panicked(p any) {
	s.metrics.panics.Inc()
	skipped, ok := s.metrics.broken.due()
	if !ok {
		return
	}
	what := fmt.Sprintf("%T", p)
	if e, ok := p.(runtime.Error); ok {
		what = e.Error() // indices and types only
	}
	s.log.Error("panic in an access log: please report it", "what", what, "stack", string(debug.Stack()), "skipped", skipped)
}
