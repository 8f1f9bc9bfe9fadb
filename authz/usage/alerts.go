package usage

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// AlertStore is what alerts need of a store.
type AlertStore interface {
	admin.AlertStore
	Instance(ctx context.Context, id string) (*apikey.Instance, error)
	Instances(ctx context.Context) ([]*apikey.Instance, error)
	Key(ctx context.Context, instanceID string, id apikey.ID) (*apikey.Key, error)
	Keys(ctx context.Context, instanceID string, q admin.KeyQuery) ([]*apikey.Key, error)
	Usage(ctx context.Context, q admin.UsageQuery) ([]admin.Usage, error)
	Lead(ctx context.Context, job, holder string, ttl time.Duration) (leads bool, err error)
}

// AlertsConfig says what an instance's policy cannot.
type AlertsConfig struct {
	// UnknownKeys is about secrets in requests that belong to no instance; its zero value is as shipped.
	UnknownKeys apikey.UnknownKeyAlerts
	// Keep is how long resolved alerts are kept; 0 means [KeepAlerts].
	Keep time.Duration
	// Notify queues a notice for the webhook with every alert that is opened or resolved.
	Notify bool
	// Holder names this process.
	Holder string
}

// KeepAlerts is how long resolved alerts are kept unless something else is configured.
const KeepAlerts = 90 * dayLong

// Alerts opens alerts and resolves them. What this process hears of (Counted) it judges itself, by what all
// replicas have written to the store; what needs no hearing, and the end of alerts, is left to one process.
// Two that find the same open one alert: the store sees to that. Safe for concurrent use.
//
// Bounds: a round judges the refusals of at most maxJudged keys, those with the most first; an instance has at most
// maxOpen alerts of a kind open, and then one more that says so.
type Alerts struct {
	store   AlertStore
	cfg     AlertsConfig
	log     *slog.Logger
	metrics alertMetrics

	// learnt remembers when networks of keys were last written to the store, so that one in use costs nothing.
	learnt *lru.Cache[keyNetwork, time.Time]

	mu    sync.Mutex
	heard heard
	open  map[admin.AlertsOf]int // as far as this process knows

	after   admin.AlertPlace // where looking after open alerts goes on
	visited time.Time        // when keys were last looked through, on the monotonic clock too
}

// Heard is what this process heard of since it last judged.
type heard struct {
	networks map[keyNetwork]seenAt
	refused  map[alertPlace]int64
	unknown  map[string]bool // by instance
}

type keyNetwork struct {
	key     apikey.ID
	network string
}

type seenAt struct {
	instance string
	at       time.Time
}

// An alertPlace is a key, or with KeyID zero an instance.
type alertPlace struct {
	instance string
	key      apikey.ID
}

const (
	alertsJob    = "alerts"
	judgeEvery   = 10 * time.Second // networks and floods
	lookEvery    = time.Minute      // refusals, and alerts that are open
	visitEvery   = time.Hour        // keys are looked through
	alertsTTL    = 3 * time.Minute  // of the lead: whoever takes it over comes that late at most
	roundTimeout = 30 * time.Second // for what is heard: it must not pile up behind a slow store

	maxHeard     = 10_000 // networks, and places with refusals; what is not remembered is heard again if it goes on
	maxJudged    = 1_000
	maxOpen      = 1_000 // of a kind in an instance
	maxOfKey     = 8     // new networks of a key that are open at once
	maxLooked    = 5_000 // open alerts in a round
	maxVisited   = 20_000
	alertPage    = 200
	rememberNets = 65_536

	relearnAfter  = dayLong         // a network in use is written again
	forgetNetwork = 400 * dayLong   // and forgotten when it was not used for so long
	networkOpen   = 7 * dayLong     // then a new network is new no more, whoever looked or not
	seenAgain     = dayLong         // what just goes on is counted again
	floodOver     = 5 * time.Minute // without a flood
	surgeOver     = 3               // windows without a surge
	subjectMore   = "more"          // of the alert that says that there are too many
)

type alertMetrics struct {
	open   *prometheus.GaugeVec
	opened *prometheus.CounterVec
}

// NewAlerts returns an engine that works while Run runs. Its metrics go to reg; nil: nowhere.
func NewAlerts(store AlertStore, cfg AlertsConfig, reg prometheus.Registerer, log *slog.Logger) *Alerts {
	cfg.UnknownKeys = apikey.Alerts{UnknownKeys: cfg.UnknownKeys}.InForce().UnknownKeys
	cfg.Keep = cmp.Or(cfg.Keep, KeepAlerts)
	learnt, err := lru.New[keyNetwork, time.Time](rememberNets)
	if err != nil {
		panic(err) // only for a size below 1
	}
	with := promauto.With(reg)
	a := &Alerts{store: store, cfg: cfg, log: log, learnt: learnt, heard: newHeard(), metrics: alertMetrics{
		open: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "keyward_alerts_open", Help: "Alerts that are open, of all instances, as the store says once a minute.",
		}, []string{"kind"}),
		opened: with.NewCounterVec(prometheus.CounterOpts{
			Name: "keyward_alerts_opened_total", Help: "Alerts that this process opened.",
		}, []string{"kind"}),
	}}
	for _, kind := range admin.AlertKinds() {
		a.metrics.open.WithLabelValues(string(kind))
		a.metrics.opened.WithLabelValues(string(kind))
	}
	return a
}

func newHeard() heard {
	return heard{networks: map[keyNetwork]seenAt{}, refused: map[alertPlace]int64{}, unknown: map[string]bool{}}
}

// Counted implements Listener. It only remembers: what has to be asked of the store, Run does.
func (a *Alerts) Counted(_ context.Context, counts []admin.Usage) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range counts {
		u := &counts[i]
		at := alertPlace{u.InstanceID, u.KeyID}
		if n := refusalsOf(&u.UsageCounts); n > 0 && u.InstanceID != "" {
			if _, known := a.heard.refused[at]; known || len(a.heard.refused) < maxHeard {
				a.heard.refused[at] += n
			}
		}
		if u.KeyID.IsZero() {
			if floodOf(&u.UsageCounts) > 0 && len(a.heard.unknown) < maxHeard {
				a.heard.unknown[u.InstanceID] = true
			}
			continue
		}
		for network := range u.Networks {
			one := keyNetwork{u.KeyID, network}
			written, _ := a.learnt.Get(one)
			if network != admin.OtherNetworks && u.Start.Sub(written) >= relearnAfter && len(a.heard.networks) < maxHeard {
				a.heard.networks[one] = seenAt{u.InstanceID, u.Start}
			}
		}
	}
}

// Run judges until ctx is done.
func (a *Alerts) Run(ctx context.Context) error {
	judge, look := time.NewTicker(judgeEvery), time.NewTicker(lookEvery)
	defer judge.Stop()
	defer look.Stop()
	do := func(what string, fn func(context.Context) error) {
		if err := fn(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("alerts: "+what+" could not be done now; it is tried again", slog.Any("error", err))
		}
	}
	do("counting open alerts", a.count)
	do("looking after alerts", a.lead)
	for {
		select {
		case <-ctx.Done():
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			if _, err := a.store.Lead(end, alertsJob, a.cfg.Holder, 0); err != nil {
				a.log.Warn("another process takes the alerts over only when the lead runs out", slog.Any("error", err))
			}
			return nil
		case <-judge.C:
			do("judging what was heard", a.judge)
		case <-look.C:
			do("counting open alerts", a.count)
			do("judging refusals", a.judgeRefusals)
			do("looking after alerts", a.lead)
		}
	}
}

// count asks the store how many alerts are open.
func (a *Alerts) count(ctx context.Context) error {
	open, err := a.store.OpenAlerts(ctx)
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.open = open
	a.mu.Unlock()
	sums := map[admin.AlertKind]int{}
	for of, n := range open {
		sums[of.Kind] += n
	}
	for _, kind := range admin.AlertKinds() {
		a.metrics.open.WithLabelValues(string(kind)).Set(float64(sums[kind]))
	}
	return nil
}

// judge looks at the networks and floods that were heard of.
func (a *Alerts) judge(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, roundTimeout)
	defer cancel()
	a.mu.Lock()
	networks, unknown := a.heard.networks, a.heard.unknown
	a.heard.networks, a.heard.unknown = map[keyNetwork]seenAt{}, map[string]bool{}
	a.mu.Unlock()
	errs := []error{a.judgeNetworks(ctx, networks)}
	for instance := range unknown {
		errs = append(errs, a.judgeFlood(ctx, instance))
	}
	return errors.Join(errs...)
}

// policy returns what is worth an alert in an instance; false if there is no such instance.
func (a *Alerts) policy(ctx context.Context, instance string) (apikey.Alerts, bool, error) {
	if instance == "" {
		return apikey.Alerts{UnknownKeys: a.cfg.UnknownKeys}.InForce(), true, nil
	}
	in, err := a.store.Instance(ctx, instance)
	if errors.Is(err, apikey.ErrNotFound) {
		return apikey.Alerts{}, false, nil
	}
	if err != nil {
		return apikey.Alerts{}, false, err
	}
	return in.Policy.Alerts.InForce(), true, nil
}

func (a *Alerts) judgeNetworks(ctx context.Context, seen map[keyNetwork]seenAt) error {
	byKey := map[alertPlace][]keyNetwork{}
	for one, where := range seen {
		at := alertPlace{where.instance, one.key}
		byKey[at] = append(byKey[at], one)
	}
	var errs []error
	var learn []admin.KeyNetwork
	for at, networks := range byKey {
		news, err := a.news(ctx, at, networks, seen)
		errs = append(errs, err)
		learn = append(learn, news...)
	}
	// After their alerts: after a crash in between they are news once more, and the alert is there.
	if len(learn) > 0 {
		if err := a.store.LearnNetworks(ctx, learn); err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
	for _, n := range learn {
		a.learnt.Add(keyNetwork{n.KeyID, n.Network}, n.LastAt)
	}
	return errors.Join(errs...)
}

// news opens alerts for the networks of a key that are new, and returns those to learn: all of them, but where
// the store could not be asked.
func (a *Alerts) news(ctx context.Context, at alertPlace, networks []keyNetwork, seen map[keyNetwork]seenAt) ([]admin.KeyNetwork, error) {
	known, err := a.store.KeyNetworks(ctx, at.key)
	if err != nil {
		return nil, err
	}
	var fresh, learn []admin.KeyNetwork
	for _, one := range networks {
		n := admin.KeyNetwork{KeyID: one.key, Network: one.network, FirstAt: seen[one].at, LastAt: seen[one].at}
		learn = append(learn, n)
		if !slices.ContainsFunc(known, func(k admin.KeyNetwork) bool { return k.Network == n.Network }) {
			fresh = append(fresh, n)
		}
	}
	if len(fresh) == 0 {
		return learn, nil
	}
	policy, there, err := a.policy(ctx, at.instance)
	if err != nil || !there {
		return nil, err
	}
	k, err := a.store.Key(ctx, at.instance, at.key)
	if errors.Is(err, apikey.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	slices.SortFunc(fresh, func(x, y admin.KeyNetwork) int { return cmp.Compare(x.Network, y.Network) })
	for _, n := range fresh {
		if policy.NewNetwork.Disabled || learns(k, known, n.LastAt) {
			continue
		}
		if err := a.newNetwork(ctx, k, n.Network); err != nil {
			return nil, err
		}
	}
	return learn, nil
}

func (a *Alerts) newNetwork(ctx context.Context, k *apikey.Key, network string) error {
	subject := network
	open, err := a.store.Alerts(ctx, admin.AlertQuery{InstanceID: k.InstanceID, Kind: admin.AlertNewNetwork, KeyID: k.ID, Open: true, Limit: maxOfKey})
	if err != nil {
		return err
	}
	message := fmt.Sprintf("%s was used from %s, from where it was never used before", nameOf(k), network)
	if len(open) >= maxOfKey && !slices.ContainsFunc(open, func(o *admin.Alert) bool { return o.Subject == network }) {
		subject = admin.OtherNetworks
		message = fmt.Sprintf("%s was used from still more networks from where it was never used before, the last one %s", nameOf(k), network)
	}
	return a.see(ctx, admin.Alert{InstanceID: k.InstanceID, Kind: admin.AlertNewNetwork, KeyID: k.ID, Subject: subject, Message: message}, k)
}

func (a *Alerts) judgeFlood(ctx context.Context, instance string) error {
	policy, there, err := a.policy(ctx, instance)
	if err != nil || !there || policy.UnknownKeys.Disabled {
		return err
	}
	peak, err := a.flood(ctx, instance)
	if err != nil || peak < int64(policy.UnknownKeys.PerMinute) {
		return err
	}
	return a.see(ctx, admin.Alert{InstanceID: instance, Kind: admin.AlertUnknownKeys, Message: floodMessage(peak)}, nil)
}

func floodMessage(peak int64) string {
	return fmt.Sprintf("%d requests within a minute came with secrets that are no key's", peak)
}

// flood returns the worst of the last minutes.
func (a *Alerts) flood(ctx context.Context, instance string) (int64, error) {
	last := time.Now().UTC().Truncate(time.Minute)
	minutes, err := a.store.Usage(ctx, admin.UsageQuery{
		InstanceID: instance, Interval: admin.UsageMinute, From: last.Add(-(unknownMinutes - 1) * time.Minute), To: last.Add(time.Minute),
	})
	return floodPeak(minutes), err
}

// judgeRefusals looks at who was refused, those with the most refusals first.
func (a *Alerts) judgeRefusals(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, roundTimeout)
	defer cancel()
	a.mu.Lock()
	refused := a.heard.refused
	a.heard.refused = map[alertPlace]int64{}
	a.mu.Unlock()
	places := make([]alertPlace, 0, len(refused))
	for at := range refused {
		places = append(places, at)
	}
	slices.SortFunc(places, func(x, y alertPlace) int {
		// An instance before its keys: all of its refusals may be one key's.
		return cmp.Or(cmp.Compare(refused[y], refused[x]), cmp.Compare(x.instance, y.instance), bytes.Compare(x.key[:], y.key[:]))
	})
	var errs []error
	for _, at := range places[:min(len(places), maxJudged)] {
		errs = append(errs, a.judgeSurge(ctx, at))
	}
	return errors.Join(errs...)
}

func (a *Alerts) judgeSurge(ctx context.Context, at alertPlace) error {
	policy, there, err := a.policy(ctx, at.instance)
	if err != nil || !there || policy.Refusals.Disabled {
		return err
	}
	s, err := a.surge(ctx, at, policy.Refusals.Window.Std())
	if err != nil || !s.begins(surgeAtLeast(at, &policy), policy.Refusals.Factor) {
		return err
	}
	of := "the instance"
	var k *apikey.Key
	if !at.key.IsZero() {
		if k, err = a.store.Key(ctx, at.instance, at.key); errors.Is(err, apikey.ErrNotFound) {
			return nil
		} else if err != nil {
			return err
		}
		of = nameOf(k)
	}
	return a.see(ctx, admin.Alert{
		InstanceID: at.instance, Kind: admin.AlertRefusals, KeyID: at.key, Message: s.beginning(of, policy.Refusals.Window.Std()),
	}, k)
}

func surgeAtLeast(at alertPlace, policy *apikey.Alerts) int {
	if at.key.IsZero() {
		return policy.Refusals.PerInstance
	}
	return policy.Refusals.PerKey
}

func (a *Alerts) surge(ctx context.Context, at alertPlace, window time.Duration) (surge, error) {
	last := time.Now().UTC().Truncate(time.Minute)
	minutes, err := a.store.Usage(ctx, admin.UsageQuery{
		InstanceID: at.instance, KeyID: at.key, Interval: admin.UsageMinute, From: surgeFrom(last, window), To: last.Add(time.Minute),
	})
	return surgeOf(minutes, last, window), err
}

// see opens an alert, or notes that the one that is open was seen again. k is what it is about, nil for no key.
func (a *Alerts) see(ctx context.Context, alert admin.Alert, k *apikey.Key) error {
	for range 3 { // each time somebody else was faster
		open, err := a.opened(ctx, &alert)
		if err != nil {
			return err
		}
		if open != nil {
			open.Message, open.SeenAt = alert.Message, alertTime()
			open.Count++
			err = a.store.PutAlert(ctx, open)
		} else {
			err = a.openNew(ctx, alert, k)
		}
		switch {
		case errors.Is(err, apikey.ErrNotFound): // the instance is gone
			return nil
		case !errors.Is(err, apikey.ErrConflict):
			return err
		}
	}
	return nil // it comes and goes: whoever is faster does it
}

// opened returns the open alert of the same kind, key and subject; nil if there is none.
func (a *Alerts) opened(ctx context.Context, like *admin.Alert) (*admin.Alert, error) {
	q := admin.AlertQuery{InstanceID: like.InstanceID, Kind: like.Kind, KeyID: like.KeyID, Open: true, Limit: alertPage}
	for {
		page, err := a.store.Alerts(ctx, q)
		if err != nil {
			return nil, err
		}
		for _, one := range page {
			if one.KeyID == like.KeyID && one.Subject == like.Subject {
				return one, nil
			}
		}
		if len(page) < q.Limit {
			return nil, nil
		}
		q.After = placeOf(page[len(page)-1])
	}
}

func placeOf(a *admin.Alert) admin.AlertPlace {
	return admin.AlertPlace{OpenedAt: a.OpenedAt, ID: a.ID}
}

// alertTime is now as a store keeps it: wall time alone, because it is compared with what was kept, by another process
// perhaps, and never with what this one waits for.
func alertTime() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }

// openNew opens an alert; where too many of its kind are open, the one that says so instead.
// Errors: apikey.ErrConflict if somebody else just did, apikey.ErrNotFound if the instance is gone.
func (a *Alerts) openNew(ctx context.Context, alert admin.Alert, k *apikey.Key) error {
	of := admin.AlertsOf{InstanceID: alert.InstanceID, Kind: alert.Kind}
	a.mu.Lock()
	full := a.open[of] >= maxOpen && alert.Subject != subjectMore
	a.mu.Unlock()
	if full {
		return a.see(ctx, admin.Alert{
			InstanceID: alert.InstanceID, Kind: alert.Kind, Subject: subjectMore,
			Message: fmt.Sprintf("%d alerts of this kind are open, and there would be more: no others are opened until some are resolved", maxOpen),
		}, nil)
	}
	alert.ID, alert.Count = apikey.ID(uuid.Must(uuid.NewV7())), 1
	alert.OpenedAt = alertTime()
	alert.SeenAt = alert.OpenedAt
	if err := a.put(ctx, admin.NoticeOpened, &alert, k); err != nil {
		return err
	}
	a.mu.Lock()
	if a.open == nil {
		a.open = map[admin.AlertsOf]int{}
	}
	a.open[of]++
	a.mu.Unlock()
	a.metrics.open.WithLabelValues(string(alert.Kind)).Inc()
	a.metrics.opened.WithLabelValues(string(alert.Kind)).Inc()
	a.log.LogAttrs(ctx, slog.LevelWarn, "alert opened", append(alertAttrs(&alert), slog.String("message", alert.Message))...)
	return nil
}

// put keeps an alert and the notice about it.
func (a *Alerts) put(ctx context.Context, of admin.NoticeType, alert *admin.Alert, k *apikey.Key) error {
	var notices []admin.Notice
	if a.cfg.Notify {
		n, err := admin.NewNotice(of, alert, k)
		if err != nil {
			return err
		}
		notices = append(notices, n)
	}
	return a.store.PutAlert(ctx, alert, notices...)
}

func alertAttrs(a *admin.Alert) []slog.Attr {
	attrs := []slog.Attr{slog.String("kind", string(a.Kind)), slog.String("alert", a.ID.String())}
	if a.InstanceID != "" {
		attrs = append(attrs, slog.String("instance", a.InstanceID))
	}
	if !a.KeyID.IsZero() {
		attrs = append(attrs, slog.String("key_id", a.KeyID.String()))
	}
	if a.Subject != "" {
		attrs = append(attrs, slog.String("subject", a.Subject))
	}
	return attrs
}

// resolve says that an alert is over.
func (a *Alerts) resolve(ctx context.Context, alert *admin.Alert, k *apikey.Key, why string) error {
	alert.ResolvedAt = alertTime()
	err := a.put(ctx, admin.NoticeResolved, alert, k)
	if errors.Is(err, apikey.ErrConflict) || errors.Is(err, apikey.ErrNotFound) {
		return nil // somebody else did, or its instance is gone
	}
	if err != nil {
		return err
	}
	a.metrics.open.WithLabelValues(string(alert.Kind)).Dec()
	a.log.LogAttrs(ctx, slog.LevelInfo, "alert resolved", append(alertAttrs(alert), slog.String("why", why))...)
	return nil
}
