package check

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz"
	"keyward/authz/apikey"
)

// metrics counts decisions. Never a label per key.
type metrics struct {
	byReason  []prometheus.Counter
	failures  prometheus.Counter
	panics    prometheus.Counter
	malformed prometheus.Counter
	shadowed  [16]prometheus.Counter // by bit; nil for those that mean nothing
	seconds   prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) *metrics {
	decisions := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "keyward_decisions_total",
		Help: "Decisions by outcome and reason.",
	}, []string{"outcome", "reason"})
	m := &metrics{
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyward_undecided_total",
			Help: "Checks that could not be decided: an outage, or too much at once.",
		}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyward_check_panics_total",
			Help: "Checks that met a fault of keyward's own. The log has the stack.",
		}),
		malformed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "keyward_check_malformed_total",
			Help: "Checks without attributes, or for something that is not HTTP.",
		}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "keyward_check_duration_seconds",
			Help:    "Time from a Check's arrival in the handler to its decision.",
			Buckets: []float64{1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 5e-3, 2.5e-2, 0.1, 0.5, 2.5},
		}),
		byReason: make([]prometheus.Counter, len(authz.Reasons())+1),
	}
	for _, r := range authz.Reasons() {
		m.byReason[r] = decisions.WithLabelValues(r.Outcome().String(), r.String())
	}
	shadowed := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "keyward_shadow_refusals_total",
		Help: "Requests that a limit, scope or address in shadow would have refused, by which.",
	}, []string{"limit"})
	for bit, name := range authz.ShadowedNames {
		if name != "" {
			m.shadowed[bit] = shadowed.WithLabelValues(name)
		}
	}
	reg.MustRegister(decisions, shadowed, m.failures, m.panics, m.malformed, m.seconds)
	return m
}

func (m *metrics) decided(d *authz.Decision, took time.Duration) {
	m.byReason[d.Reason].Inc()
	if d.Shadowed != 0 {
		var last prometheus.Counter // quotas of several classes have one counter, and are neighbours
		for bit, c := range m.shadowed {
			if d.Shadowed>>bit&1 != 0 && c != nil && c != last {
				c.Inc()
				last = c
			}
		}
	}
	m.seconds.Observe(took.Seconds())
}

func (m *metrics) failed(took time.Duration) {
	m.failures.Inc()
	m.seconds.Observe(took.Seconds())
}

// decisionLog writes a sample of decisions: the first so many of each second.
type decisionLog struct {
	format     apikey.Format
	key        [32]byte // of pseudonyms
	log        *slog.Logger
	perSecond  int64
	second     atomic.Int64 // Unix time of the second that written and skipped belong to
	written    atomic.Int64
	skipped    atomic.Int64 // since the last line
	complained atomic.Int64 // when it was last said that a node gives no feedback, Unix time
}

// complainEvery is how often a wrong configuration of Envoy is worth a line.
const complainEvery = 60 // seconds

// noFeedback says what is wrong with an Envoy that is granted leases and never ends one.
func (l *decisionLog) noFeedback(connection uint64) {
	now := time.Now().Unix()
	if last := l.complained.Load(); now-last < complainEvery || !l.complained.CompareAndSwap(last, now) {
		return
	}
	l.log.Error("an Envoy takes leases for running requests and never says that one ended, so keys stay at their max-concurrent until the leases run out: "+
		"add the access log that keyward envoy generate envoy --fragment writes, or set concurrency.feedback to none",
		"connection", connection)
}

func newDecisionLog(log *slog.Logger, cfg *Config) *decisionLog {
	l := &decisionLog{log: log, perSecond: int64(cfg.LogPerSecond), format: cfg.Format, key: cfg.LogKey}
	if l.key == [32]byte{} {
		_, _ = rand.Read(l.key[:]) // never fails
	}
	return l
}

// sampled reports whether one more line may be written now, and how many were left out before it.
func (l *decisionLog) sampled() (skipped int64, ok bool) {
	if l.perSecond <= 0 {
		return 0, false
	}
	now := time.Now().Unix()
	if last := l.second.Load(); last != now && l.second.CompareAndSwap(last, now) {
		l.written.Store(0)
	}
	if l.written.Add(1) > l.perSecond {
		l.skipped.Add(1)
		return 0, false
	}
	return l.skipped.Swap(0), true
}

func (l *decisionLog) decided(r *authz.Request, d *authz.Decision, took time.Duration) {
	skipped, ok := l.sampled()
	if !ok {
		return
	}
	l.log.Info("decision", append(l.describe(r, d), slog.Int64("tookMicros", took.Microseconds()), slog.Int64("skipped", skipped))...)
}

func (l *decisionLog) failed(r *authz.Request, d *authz.Decision, err error) {
	if !isUndecided(err) {
		l.log.Error("decision failed", append(l.describe(r, d), slog.Any("error", err))...)
		return
	}
	if skipped, ok := l.sampled(); ok {
		l.log.Warn("could not decide", append(l.describe(r, d), slog.Any("error", err), slog.Int64("skipped", skipped))...)
	}
}

func (l *decisionLog) panicked(p any) {
	what, stack := describePanic(p)
	l.log.Error("panic in a Check: please report it", "what", what, "stack", stack)
}

// clean returns a text of a client's up to what looks like one of our secrets.
func (l *decisionLog) clean(text string) string {
	for i := range text {
		if _, ours := l.format.Owns(text[i:]); ours {
			return text[:i] + "[secret]"
		}
	}
	return text
}

// describe tells a decision without anything that could be a secret: no query, no header, and of path and
// method only what comes before one of ours.
func (l *decisionLog) describe(r *authz.Request, d *authz.Decision) []any {
	path, _, _ := strings.Cut(r.Path, "?")
	if plain, err := url.PathUnescape(path); err == nil && l.clean(plain) != plain {
		path = plain // because escapes hide where the secret begins
	}
	path = cut(l.clean(path), 256)
	attrs := []any{
		slog.String("decisionId", d.ID.String()),
		slog.String("outcome", d.Outcome().String()),
		slog.String("reason", d.Reason.String()),
		slog.String("method", l.clean(cut(r.Method, 32))),
		slog.String("path", path),
		slog.String("peer", r.Peer),
	}
	if d.Shadowed != 0 {
		attrs = append(attrs, slog.String("shadow", string(d.Shadowed.Append(nil))))
	}
	if d.Quota != nil {
		attrs = append(attrs, slog.String("quota", d.Quota.Name))
	}
	if d.Key != nil {
		attrs = append(attrs, slog.String("keyId", d.Key.ID.String()), slog.String("instance", d.Key.InstanceID))
	} else if d.InstanceID != "" {
		attrs = append(attrs, slog.String("instance", d.InstanceID))
	}
	// What quotas went by, so that others can be tried on the log. Names of people are not written.
	if _, context, cost := d.Route(); context != "" && d.HasIdentity() {
		attrs = append(attrs, slog.String("context", context), slog.Int("cost", cost))
		if d.Agent != "" {
			attrs = append(attrs, slog.String("agent", l.clean(cut(d.Agent, 128))))
		}
		attrs = append(attrs, slog.String("principal", l.pseudonym(d, d.AppendUPN(nil))), slog.String("userId", l.pseudonym(d, d.AppendUserID(nil))))
	}
	return attrs
}

// pseudonym stands for somebody in an instance: always the same, and no name. It is under a key, because names
// of people can be guessed.
func (l *decisionLog) pseudonym(d *authz.Decision, name []byte) string {
	instance := d.InstanceID
	if d.Key != nil {
		instance = d.Key.InstanceID
	}
	mac := hmac.New(sha256.New, l.key[:])
	_, _ = mac.Write(append(append([]byte(instance), 0), name...)) // a hash never fails
	return hex.EncodeToString(mac.Sum(nil)[:16])
}
