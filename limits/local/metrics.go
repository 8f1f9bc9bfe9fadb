package local

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"keyward/limits"
)

// Counts are what happened to the leases of a shard. They are under its lock, where counting is nearly
// free, and are added up when somebody looks.
type counts struct {
	granted, refused, adopted    uint64
	unknownRenewals, unknownEnds uint64
	ended                        [limits.CauseForced + 1]uint64 // by cause
}

// countRefusal counts a decision that the limit of running requests refused.
func (s *shard) countRefusal(d limits.Decision, v verdict) {
	if v == decided && !d.Allowed && d.Class == limits.ClassConcurrency {
		s.counts.refused++
	}
}

// register makes the metrics.
func (l *Limiter) register(reg prometheus.Registerer) {
	with := promauto.With(reg)
	l.cells = with.NewGauge(prometheus.GaugeOpts{
		Name: "keyward_limits_cells",
		Help: "Cells of limits held in memory: one for each limit of a key or instance that is not fully unspent.",
	})
	l.swept = with.NewCounter(prometheus.CounterOpts{
		Name: "keyward_limits_swept_cells_total",
		Help: "Cells of limits that were dropped because they were unspent again.",
	})
	with.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "keyward_limits_quota_cells",
		Help: "Quota cells held in memory: one for each quota of each partition that has counted what still counts.",
	}, func() float64 { return float64(l.quotaCells.Load()) })
	l.quotasSwept = with.NewCounter(prometheus.CounterOpts{
		Name: "keyward_limits_swept_quota_cells_total",
		Help: "Quota cells that were dropped because nothing of what they had counted still counts.",
	})
	l.quotasFull = with.NewCounter(prometheus.CounterOpts{
		Name: "keyward_limits_quota_cells_lacking_total",
		Help: "Requests for which there was no quota cell left: undecided, or not counted by a quota in shadow.",
	})
	l.quotasLocked = with.NewCounter(prometheus.CounterOpts{
		Name: "keyward_limits_quota_lockouts_total",
		Help: "Lockouts of quotas that began.",
	})
	l.waited = with.NewHistogram(prometheus.HistogramOpts{
		Name:    "keyward_limits_lease_wait_seconds",
		Help:    "How long requests waited for a running one to end, whatever came of it.",
		Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
	})
	with.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "keyward_limits_waiting",
		Help: "Requests that wait for a running one to end.",
	}, func() float64 { return float64(l.waiting.Load()) })
	with.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "keyward_limits_leases",
		Help: "Leases that live: running requests that count.",
	}, l.sum(func(s *shard) uint64 { return uint64(s.leases.live) }))
	counter := func(name, help string, labels prometheus.Labels, of func(*shard) uint64) {
		with.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help, ConstLabels: labels}, l.sum(of))
	}
	counter("keyward_limits_leases_granted_total", "Leases granted.", nil,
		func(s *shard) uint64 { return s.counts.granted })
	counter("keyward_limits_leases_refused_total", "Requests refused because too many of their key's ran.", nil,
		func(s *shard) uint64 { return s.counts.refused })
	counter("keyward_limits_leases_adopted_total", "Leases taken over because their requests still ran.", nil,
		func(s *shard) uint64 { return s.counts.adopted })
	for cause := limits.Cause(0); cause <= limits.CauseForced; cause++ {
		counter("keyward_limits_leases_ended_total", "Leases that ended, by what ended them.", prometheus.Labels{"cause": cause.String()},
			func(s *shard) uint64 { return s.counts.ended[cause] })
	}
	const help = "Renewals and ends that met no lease, and were dropped."
	counter("keyward_limits_leases_unknown_total", help, prometheus.Labels{"what": "renewal"},
		func(s *shard) uint64 { return s.counts.unknownRenewals })
	counter("keyward_limits_leases_unknown_total", help, prometheus.Labels{"what": "end"},
		func(s *shard) uint64 { return s.counts.unknownEnds })
	with.NewCounterFunc(prometheus.CounterOpts{
		Name: "keyward_limits_leases_forgotten_total",
		Help: "Ended leases that were forgotten before their time because more ended than are remembered.",
	}, func() float64 {
		var sum uint64
		for i := range l.identities {
			ids := &l.identities[i]
			ids.mu.Lock()
			sum += ids.forgotten
			ids.mu.Unlock()
		}
		return float64(sum)
	})
}

// sum returns a function that adds up a count of every shard as it is now.
func (l *Limiter) sum(of func(*shard) uint64) func() float64 {
	return func() float64 {
		var sum uint64
		for i := range l.shards {
			s := &l.shards[i]
			s.mu.Lock()
			l.expire(s, l.now())
			sum += of(s)
			s.mu.Unlock()
		}
		return float64(sum)
	}
}
