package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/holders"
	"keyward/authz/manage"
	"keyward/authz/portal"
	"keyward/authz/store/sqlite"
	"keyward/authz/usage"
	"keyward/cache"
	"keyward/envoy/accesslog"
	"keyward/envoy/check"
	"keyward/envoy/generate"
	"keyward/envoy/wire"
	"keyward/limits"
	"keyward/limits/local"
)

const (
	// drainDelay gives Envoy's health checks (every second) time to see NOT_SERVING before the
	// listener goes.
	drainDelay = 2 * time.Second
	// drainTimeout is how long running calls may take after that.
	drainTimeout = 10 * time.Second
	readyTimeout = 30 * time.Second
	// healthInterval is how soon Envoy's health checks show that nothing can be decided any more.
	healthInterval = 50 * time.Millisecond
	// lastDecision is how long a Check that came just before the drain may take, without waiting.
	lastDecision = 250 * time.Millisecond
	// maxLogMessage leaves room for Envoy's batches of access-log entries, of 1 MiB and an entry.
	maxLogMessage = 4 << 20 // bytes
	// connectionSilence is how much later than it should a first access-log entry may come.
	connectionSilence = 5 * time.Second
	// connectionIdle is how long a connection of Envoy's may be open without a call, at least.
	connectionIdle = 15 * time.Minute
	// spareFiles are for what else is open: the store, its log, the other listeners.
	spareFiles = 64
	// bootstrapWarning is how often the log says that the first token still lives.
	bootstrapWarning = 24 * time.Hour
	// serveActor is who the audit names for what serve does by itself.
	serveActor = "keyward serve"
	// adminTokenFile holds the first management token, beside the store.
	adminTokenFile = "admin.token"
)

// A service is keyward, running.
type service struct {
	cfg        *Config // as at the start
	live       *Config // as last reloaded; for reload only
	log        *slog.Logger
	level      *slog.LevelVar
	registry   *prometheus.Registry
	store      *sqlite.Store
	cache      *cache.Cache
	authorizer *authz.Authorizer
	admin      *admin.Service
	limiter    *local.Limiter
	quotas     *quotaKeeper
	leases     *authz.LeaseIDs
	logKey     [32]byte // of the log's names for principals
	accessLogs *accesslog.Server
	replica    string
	usage      *usage.Counter
	alerts     *usage.Alerts
	webhook    *usage.Webhook // nil: none is configured
	redigester *admin.Redigester
	settler    *admin.Settler
	health     *health.Server
	draining   atomic.Bool
	ready      atomic.Bool // what health checks are answered, for /readyz
	drainDelay time.Duration
	serving    chan struct{} // closed when everything is
	pepper     *apikey.Pepper
	traces     *traces          // nil: none are made
	login      *admin.OIDCLogin // nil: people sign in to the portal with tokens only

	check, manage, holders, portal, metrics net.Listener // nil where not configured
	reloaders                               map[string]*reloader
	bootstrapMade                           bool // this start made the first token
}

// serviceOptions are what a command knows better than the configuration.
type serviceOptions struct {
	allowDevPepper bool
	drainDelay     time.Duration
	log            io.Writer
}

// openService opens everything and binds every listener, so that a fault shows before anything is
// served. Close it, whether or not it was run.
func openService(ctx context.Context, cfg *Config, opts serviceOptions) (_ *service, err error) {
	s := &service{cfg: cfg, live: cfg, level: new(slog.LevelVar), registry: prometheus.NewRegistry(), drainDelay: opts.drainDelay,
		serving: make(chan struct{}), reloaders: map[string]*reloader{}}
	s.level.Set(cfg.logLevel())
	s.log = newLogger(opts.log, cfg.Log.Format, s.level)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	s.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	peppers, err := readPeppers(cfg.Pepper, opts.allowDevPepper, s.log)
	if err != nil {
		return nil, err
	}
	s.pepper = peppers.Current
	previous := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "keyward_pepper_previous",
		Help: "1 while a previous pepper is read: a rotation that is not finished.",
	})
	s.registry.MustRegister(previous)
	if peppers.Previous != nil {
		previous.Set(1)
	}
	if s.store, err = sqlite.Open(ctx, sqlite.Config{Path: cfg.Store.SQLite.Path, Audit: admin.NewAuditKeys(peppers)}); err != nil {
		return nil, err
	}
	if err := admin.OpenPeppers(ctx, s.store, peppers, serveActor); err != nil {
		return nil, err
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	s.replica = fmt.Sprintf("%s-%d-%d", host, os.Getpid(), time.Now().Unix())
	cacheConfig := cfg.cacheConfig()
	cacheConfig.Replica = s.replica
	if s.traces, err = openTraces(ctx, cfg.Tracing, s.replica, s.log); err != nil {
		return nil, err
	}
	if s.cache, err = cache.New(s.keyStore(), cacheConfig, s.registry, s.log); err != nil {
		return nil, err
	}
	s.limiter = local.New(cfg.Concurrency.leases(), s.registry)
	s.quotas = &quotaKeeper{store: s.store, limiter: s.limiter, log: s.log}
	if err := s.quotas.restore(ctx); err != nil {
		return nil, err
	}
	s.leases, s.logKey = authz.NewLeaseIDs(peppers), peppers.Current.Derive("decision log")
	if s.webhook, err = s.newWebhook(cfg.Alerts.Webhook); err != nil {
		return nil, err
	}
	s.alerts = usage.NewAlerts(s.store, usage.AlertsConfig{
		UnknownKeys: apikey.UnknownKeyAlerts(cfg.Alerts.UnknownKeys), Keep: cfg.Alerts.Keep.Std(), Notify: s.webhook != nil, Holder: s.replica,
	}, s.registry, s.log)
	s.usage = usage.NewCounter(s.store, usage.Config{Off: !*cfg.Usage.Enabled, Instance: s.cache.Instance, Listener: s.alerts}, s.registry, s.log)
	s.accessLogs = accesslog.New(s.limiter, s.usage, s.leases, s.registry, s.log)
	issuers, err := cfg.oidc()
	if err != nil {
		return nil, err
	}
	var clientSecret []byte
	if file := cfg.Portal.OIDC.ClientSecretFile; file != "" {
		if clientSecret, err = readPrivate(file); err != nil {
			return nil, fmt.Errorf("portal.oidc.clientSecretFile: %w", err)
		}
	}
	if s.login, err = cfg.Portal.OIDC.login(issuers, apikey.NewSecret(strings.TrimSpace(string(clientSecret)))); err != nil {
		return nil, err
	}
	adminConfig := admin.Config{
		Format: cfg.format(), Peppers: peppers, Leases: inFlight{s}, OIDC: issuers, Decisions: decisions{s}, Replica: s.replica,
		AuditKeep: cfg.Audit.Keep.Std(), UsageKeep: cfg.Usage.keep(),
	}
	if s.webhook != nil { // a nil *usage.Webhook would be one
		adminConfig.Webhook = s.webhook
	}
	s.admin = admin.New(s.store, adminConfig, s.cache, s.log)
	s.redigester = admin.NewRedigester(s.store, peppers.Current.Version(), s.cache.Learn, s.log)

	decisions, err := cfg.authorizer()
	if err != nil {
		return nil, err
	}
	s.settler = admin.NewSettler(s.admin, s.cache)
	facts := keyFacts{Cache: s.cache, Settler: s.settler, store: s.keyStore(), usage: s.usage}
	if s.authorizer, err = authz.New(decisions, facts, s.limiter, peppers, s.usage, s.redigester); err != nil {
		return nil, err
	}
	for _, l := range []struct {
		name   string
		config Listener
		into   *net.Listener
	}{
		{"check", cfg.Listen.Check, &s.check},
		{"manage", cfg.Listen.Manage, &s.manage},
		{"holders", cfg.Listen.Holders, &s.holders},
		{"portal", cfg.Listen.Portal, &s.portal},
		{"metrics", cfg.Listen.Metrics, &s.metrics},
	} {
		if l.config.Address == "" {
			continue
		}
		bound, err := l.config.listen(ctx)
		if err != nil {
			return nil, fmt.Errorf("listen.%s: %w", l.name, err)
		}
		*l.into = s.limit(bound, l.name, l.config)
		switch {
		case l.config.isLoopback():
		case !l.config.TLS.enabled():
			s.log.Warn("listens beyond this machine without TLS", "listener", l.name, "address", l.config.Address)
		case l.name == "check" && l.config.TLS.ClientCAFile == "":
			s.log.Warn("whoever reaches this listener can try keys and end leases: set tls.clientCAFile", "listener", l.name, "address", l.config.Address)
		}
		if l.config.TLS.enabled() {
			expiry := prometheus.NewGauge(prometheus.GaugeOpts{
				Name:        "keyward_tls_certificate_expiry_seconds",
				Help:        "When the listener's certificate ends, in Unix time.",
				ConstLabels: prometheus.Labels{"listener": l.name},
			})
			s.registry.MustRegister(expiry)
			if s.reloaders[l.name], err = newReloader(l.config.TLS, s.log, expiry); err != nil {
				return nil, fmt.Errorf("listen.%s.tls: %w", l.name, err)
			}
		}
	}
	s.check = s.track(s.check)
	if s.bootstrapMade, err = s.admin.Bootstrap(ctx, admin.Caller{Name: serveActor, Role: admin.RoleOwner}, s.adminTokenPath()); err != nil {
		return nil, err
	}
	return s, nil
}

// limit bounds how many connections a listener has open at once.
func (s *service) limit(l net.Listener, name string, config Listener) net.Listener {
	labels := prometheus.Labels{"listener": name}
	most := uint64(config.MaxConnections) + spareFiles
	if config.TLS.enabled() {
		most += maxStrangers
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil && most > files.Cur {
		s.log.Warn("this process may open fewer files than it may have connections: raise the limit (ulimit -n, LimitNOFILE), or lower maxConnections",
			"listener", name, "maxConnections", config.MaxConnections, "files", files.Cur, "wanted", most)
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help, ConstLabels: labels})
		s.registry.MustRegister(c)
		return c
	}
	limited := &limitedListener{
		Listener: l, name: name, most: config.MaxConnections, tls: config.TLS.enabled(), log: s.log,
		refused: counter("keyward_connections_refused_total", "Connections that were closed because maxConnections were open."),
		dropped: counter("keyward_handshakes_dropped_total", "Connections that were closed because too many had not agreed on TLS yet."),
	}
	s.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "keyward_connections", Help: "Connections that are open; with TLS, from when it is agreed on.", ConstLabels: labels,
	}, func() float64 { return float64(limited.count()) }))
	return limited
}

// track lets leases follow the connections that they were asked for by.
func (s *service) track(l net.Listener) net.Listener {
	heard := s.accessLogs.Heard
	if s.cfg.Concurrency.Feedback == string(generate.FeedbackNone) {
		heard = func(uint64) bool { return true } // nobody is blamed for what was asked for
	}
	tracked := &trackedListener{
		Listener: l,
		silence:  2*s.cfg.Concurrency.RenewEvery.Std() + connectionSilence,
		heard:    heard,
		ended: func(connection uint64, granted bool) {
			if granted {
				s.limiter.Disconnected(connection)
			}
			s.accessLogs.Disconnected(connection)
		},
	}
	s.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "keyward_nodes_without_feedback",
		Help: "Connections of Envoys that take leases and never say that a request ended or still runs.",
	}, tracked.unheard))
	return tracked
}

// inFlight shows the requests that this replica counts.
type inFlight struct{ s *service }

func (f inFlight) Running(key apikey.ID) []admin.RunningRequest {
	nodes := map[uint64]string{}
	for _, n := range f.s.accessLogs.Nodes() {
		if n.ID != accesslog.Unknown {
			nodes[n.Connection] = n.ID
		}
	}
	var all []admin.RunningRequest
	for _, r := range f.s.limiter.Running(func(c limits.Cell) bool { return key.IsZero() || c == authz.LeaseCell(key) }) {
		method, pattern := f.s.authorizer.Describe(r.Note)
		all = append(all, admin.RunningRequest{
			ID: string(f.s.leases.Append(nil, r.Lease)), Lease: r.Lease, KeyID: r.Lease.Cell.Owner, Method: method, Path: pattern,
			Node: nodes[r.Connection], Connection: r.Connection, Replica: f.s.replica, Adopted: r.Adopted,
			Started: time.UnixMicro(r.Lease.Identity.Start), Until: r.Until,
		})
	}
	return all
}

func (f inFlight) End(ctx context.Context, l limits.Lease) error {
	return f.s.limiter.End(ctx, []limits.Ending{{Lease: l, Cause: limits.CauseForced}})
}

// decisions explains what this replica decides.
type decisions struct{ s *service }

func (d decisions) Explain(ctx context.Context, in authz.Inquiry) (*authz.Explanation, error) {
	return d.s.authorizer.Explain(ctx, in)
}

func (d decisions) LimitsOf(ctx context.Context, k *apikey.Key) ([]authz.Standing, error) {
	return d.s.authorizer.LimitsOf(ctx, k)
}

func (d decisions) Recall(id authz.ID) (authz.Refusal, bool) { return d.s.authorizer.Recall(id) }

func (s *service) adminTokenPath() string {
	return filepath.Join(filepath.Dir(s.cfg.Store.SQLite.Path), adminTokenFile)
}

// keyFacts is what the authorizer is told of keys: by the cache, by the store about last uses, and by the
// settler about imported tokens.
type keyFacts struct {
	*cache.Cache
	*admin.Settler
	store keyStore
	usage *usage.Counter
}

var _ authz.Settler = keyFacts{} // which the authorizer only looks for

// LastUsed returns the later of what is written and what waits to be. What waits is asked first: what is written
// meanwhile is then found in the store.
func (f keyFacts) LastUsed(ctx context.Context, id apikey.ID) (time.Time, error) {
	pending := f.usage.Pending(id)
	written, err := f.store.LastUsed(ctx, id)
	if err != nil {
		return time.Time{}, err
	}
	if pending.After(written) {
		return pending, nil
	}
	return written, nil
}

// run serves until ctx is done, and then drains: not serving any more, running calls to their end,
// what was remembered written down.
func (s *service) run(ctx context.Context) error {
	grpcServer, err := s.grpcServer()
	if err != nil {
		return err
	}
	// What answers requests lives until the requests have ended, so it has a context of its own.
	behind, stopBehind := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBehind()
	group, failed := errgroup.WithContext(behind)
	group.Go(func() error { return s.cache.Run(behind) })
	group.Go(func() error { return s.usage.Run(behind) })
	group.Go(func() error { return s.alerts.Run(behind) })
	if s.webhook != nil {
		group.Go(func() error { return s.webhook.Run(behind, s.store, s.replica) })
	}
	group.Go(func() error { return s.quotas.run(behind) })
	group.Go(func() error { return s.redigester.Run(behind) })
	group.Go(func() error { return s.settler.Run(behind) })
	group.Go(func() error { return s.admin.Run(behind) })
	group.Go(func() error { return s.warnOfBootstrap(behind) })
	group.Go(func() error { return s.admin.RunSweep(behind, s.replica) })
	group.Go(func() error { return s.admin.RunLeakReports(behind) })
	for _, r := range s.reloaders {
		group.Go(func() error { return r.run(behind) })
	}

	manageServer := s.httpServer(manage.New(s.admin, manage.Config{
		Format: s.cfg.format(), Pepper: s.pepper, Log: s.log, Version: readVersion().Version, Tracer: s.traces.tracer(),
	}))
	holdersServer := s.httpServer(holders.New(s.authorizer, s.admin, s.log))
	portalServer := s.httpServer(portal.New(s.admin, portal.Config{
		Log: s.log, Version: readVersion().Version, Idle: s.cfg.Portal.Idle.Std(), Most: s.cfg.Portal.Most.Std(), Envoys: envoys{s}, Login: s.login,
	}))
	metricsServer := s.httpServer(s.metricsHandler())
	group.Go(func() error { return grpcServer.Serve(s.check) })
	serveHTTP := func(name string, server *http.Server, l net.Listener) {
		if l == nil {
			return
		}
		group.Go(func() (err error) {
			if r := s.reloaders[name]; r != nil {
				server.TLSConfig = r.server()
				err = server.ServeTLS(l, "", "")
			} else {
				err = server.Serve(l)
			}
			if errors.Is(err, http.ErrServerClosed) {
				return nil
			}
			return fmt.Errorf("%s: %w", name, err)
		})
	}
	serveHTTP("manage", manageServer, s.manage)
	serveHTTP("holders", holdersServer, s.holders)
	serveHTTP("portal", portalServer, s.portal)
	serveHTTP("metrics", metricsServer, s.metrics)

	group.Go(func() error {
		s.watchHealth(ctx, failed)
		return nil
	})

	select {
	case <-failed.Done(): // one of them ended by itself
	case <-ctx.Done():
	}
	s.log.Info("draining")
	s.draining.Store(true)
	s.setHealth(false)
	if s.drainDelay > 0 && failed.Err() == nil {
		time.Sleep(s.drainDelay)
	}
	deadline, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	// Envoy never ends its log streams. Requests that wait for a place still want to hear of ends, so the
	// streams go when no request can be waiting any more; what ends later is taken up by whoever starts next.
	streams := time.AfterFunc(s.cfg.Concurrency.wait()+lastDecision, s.accessLogs.Stop)
	defer streams.Stop()
	var stopping sync.WaitGroup
	stopping.Go(func() { stopGRPC(deadline, grpcServer) })
	stopping.Go(func() { stopHTTP(deadline, manageServer) })
	stopping.Go(func() { stopHTTP(deadline, holdersServer) })
	stopping.Go(func() { stopHTTP(deadline, portalServer) })
	stopping.Go(func() { stopHTTP(deadline, metricsServer) })
	stopping.Wait()
	s.accessLogs.Stop()
	s.accessLogs.Wait()
	stopBehind()
	err = group.Wait()
	s.log.Info("stopped")
	return err
}

// stopGRPC lets running calls end until the deadline, and cuts off what is left.
func stopGRPC(deadline context.Context, server *grpc.Server) {
	stopped := make(chan struct{})
	go func() {
		server.GracefulStop()
		close(stopped)
	}()
	select {
	case <-stopped:
	case <-deadline.Done():
		server.Stop()
		<-stopped
	}
}

// stopHTTP does the same for HTTP.
func stopHTTP(deadline context.Context, server *http.Server) {
	if err := server.Shutdown(deadline); err != nil {
		_ = server.Close() // its connections are cut; there is nothing left to do about an error
	}
}

// watchHealth tells Envoy whether requests can be decided, until the service drains.
func (s *service) watchHealth(ctx, failed context.Context) {
	tick := time.NewTicker(healthInterval)
	defer tick.Stop()
	late := time.NewTimer(readyTimeout)
	defer late.Stop()
	announced := false
	for {
		ready := s.cache.Ready()
		s.setHealth(ready)
		if ready && !announced {
			announced = true
			s.log.Info("serving", "check", s.cfg.Listen.Check.Address, "manage", s.cfg.Listen.Manage.Address, "holders", s.cfg.Listen.Holders.Address, "portal", s.cfg.Listen.Portal.Address, "metrics", s.cfg.Listen.Metrics.Address)
			close(s.serving)
		}
		select {
		case <-ctx.Done():
			return
		case <-failed.Done():
			return
		case <-late.C:
			if !announced {
				s.log.Warn("not ready yet: keys are still being loaded")
			}
		case <-tick.C:
		}
	}
}

// setHealth sets what health checks are answered. Once draining it stays NOT_SERVING.
func (s *service) setHealth(serving bool) {
	if s.draining.Load() {
		s.health.Shutdown() // ignores every later change
		return
	}
	status := healthpb.HealthCheckResponse_NOT_SERVING
	if serving {
		status = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", status)
	s.health.SetServingStatus(check.ServiceName, status)
	s.ready.Store(serving) // last: whom /readyz tells so may ask at once
}

// close frees what openService opened.
func (s *service) close() error {
	var faults []error
	for _, l := range []net.Listener{s.check, s.manage, s.holders, s.portal, s.metrics} {
		if l != nil {
			if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				faults = append(faults, err)
			}
		}
	}
	if s.cache != nil {
		s.cache.Close()
	}
	s.traces.close()
	if s.store != nil {
		faults = append(faults, s.store.Close())
	}
	return errors.Join(faults...)
}

// transportOptions are those of grpc that fit Checks: a great many small calls over few connections, and
// beside them access logs, which are few streams that never end. A connection without any call for as long as
// idle is closed.
func transportOptions(idle time.Duration) []grpc.ServerOption {
	return []grpc.ServerOption{
		// A worker keeps the stack that a Check needs, which a fresh goroutine has to grow first: a tenth to a
		// fifth of a Check's processor time. More than are in flight at once, because whoever finds all busy
		// (an access log and a Check that waits for a place keep theirs) gets a goroutine of its own, as
		// without workers: nothing ever waits for a worker. Idle, one costs its stack of some 8 KiB.
		grpc.NumStreamWorkers(256),
		// Fixed windows save the pings by which grpc would measure what the line takes. A Check fits many
		// times; for a longer message grpc opens the window of its stream as soon as it is read.
		grpc.InitialWindowSize(64 << 10),
		grpc.InitialConnWindowSize(1 << 20),
		// Read and write buffers stay at grpc's 32 KiB: larger ones gained nothing, none cost three times as much.

		// Envoy pings at the interval of its own configuration, with and without calls: every 10 s in what we
		// generate, and no sensible one is below a second. grpc's default would hang up on it.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second / 2, PermitWithoutStream: true}),
		// A node that is frozen or cut off is noticed, and its leases end. One that is idle is told to go
		// (GOAWAY, in two steps, so that no call is lost), and an Envoy opens another connection when it asks again.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 2 * time.Second, Timeout: time.Second, MaxConnectionIdle: idle}),
		// As many as may wait for places in all. An Envoy that has more in flight opens another connection.
		grpc.MaxConcurrentStreams(4096),
		grpc.MaxRecvMsgSize(maxLogMessage),
		grpc.MaxHeaderListSize(64 << 10),
		// For TLS and HTTP/2 to be agreed on.
		grpc.ConnectionTimeout(5 * time.Second),
		grpc.ForceServerCodecV2(wire.NewCodec()),
	}
}

// grpcServer is the server that Envoy calls.
func (s *service) grpcServer() (*grpc.Server, error) {
	options := transportOptions(s.cfg.Concurrency.connectionIdle())
	if r := s.reloaders["check"]; r != nil {
		options = append(options, grpc.Creds(admitting{credentials.NewTLS(r.server())}))
	}
	server := grpc.NewServer(options...)
	s.accessLogs.Register(server)
	config := s.cfg.checkConfig()
	config.Leases, config.LogKey, config.Tracer = s.leases, s.logKey, s.traces.tracer()
	if err := registerChecks(server, s.authorizer, config, s.registry, s.log); err != nil {
		return nil, err
	}
	s.health = health.NewServer()
	s.setHealth(false) // until the cache is ready
	healthpb.RegisterHealthServer(server, s.health)
	return server, nil
}

func (s *service) httpServer(handler http.Handler) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      60 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ConnState:         admitHTTP,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
}

func (s *service) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.registry, promhttp.HandlerOpts{ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelError)}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "alive\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		switch {
		case s.draining.Load():
			http.Error(w, "draining", http.StatusServiceUnavailable)
		case !s.ready.Load():
			http.Error(w, "keys are not loaded, or the store has been away for too long", http.StatusServiceUnavailable)
		default:
			_, _ = io.WriteString(w, "ready\n")
		}
	})
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// warnOfBootstrap reminds the operator every day that the token in a file is still good.
func (s *service) warnOfBootstrap(ctx context.Context) error {
	tick := time.NewTicker(bootstrapWarning)
	defer tick.Stop()
	for {
		ends, err := s.admin.BootstrapAlive(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			s.log.Warn("could not look whether the first management token still lives", "error", err)
		case !ends.IsZero():
			s.log.Warn("the first management token is still good: make your own with keyward tokens create --role owner, which ends it",
				"file", s.adminTokenPath(), "ends", ends)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// reload takes over what can change while serving, and says what cannot. One call at a time.
func (s *service) reload(next *Config) error {
	taken := *s.live
	taken.Preset = next.Preset // its routes are among the others
	taken.Routes, taken.IgnoreCase, taken.DefaultRoute = next.Routes, next.IgnoreCase, next.DefaultRoute
	taken.CORSPreflight, taken.Client, taken.Log.Level = next.CORSPreflight, next.Client, next.Log.Level
	taken.JWT = next.JWT
	taken.Credentials.Headers, taken.Credentials.Bearer, taken.Credentials.Query = next.Credentials.Headers, next.Credentials.Bearer, next.Credentials.Query
	// From what is taken, not from next: a new credentials.prefix here, and the old one where keys are
	// made, would refuse every new key.
	decisions, err := taken.authorizer()
	if err != nil {
		return err
	}
	if err := s.authorizer.Configure(decisions); err != nil {
		return err
	}
	s.level.Set(next.logLevel())
	if !reflect.DeepEqual(&taken, next) {
		s.log.Warn("some of the changed configuration needs a restart", "takenNow", reloaded)
	}
	s.live = &taken
	s.log.Info("configuration reloaded")
	return nil
}

// reloaded lists what a SIGHUP takes over.
const reloaded = "preset, routes, ignoreCase, defaultRoute, corsPreflight, client, jwt, credentials.headers, credentials.bearer, credentials.query, log.level"

func newLogger(w io.Writer, format string, level slog.Leveler) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == "text" {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// readPeppers reads the pepper files and refuses what anybody else can read. A previous one that is not
// there, or is the current one over again, is none: both are how things stand before and after a
// rotation, and in the middle of one that was cut off. Whether it is needed the store knows.
func readPeppers(files PepperFiles, allowDev bool, log *slog.Logger) (apikey.Peppers, error) {
	var peppers apikey.Peppers
	for _, f := range []struct {
		field, path string
		into        **apikey.Pepper
	}{
		{"pepper.file", files.File, &peppers.Current},
		{"pepper.previousFile", files.PreviousFile, &peppers.Previous},
	} {
		if f.path == "" {
			continue
		}
		text, err := readPrivate(f.path)
		if errors.Is(err, fs.ErrNotExist) && f.into == &peppers.Previous {
			log.Info("there is no previous pepper", "pepper.previousFile", f.path)
			continue
		}
		if err != nil {
			return peppers, fmt.Errorf("%s: %w", f.field, err)
		}
		if *f.into, err = apikey.ParsePepper(text); err != nil {
			return peppers, fmt.Errorf("%s: %s: %w", f.field, f.path, err)
		}
		if (*f.into).Dev() && !allowDev {
			return peppers, fmt.Errorf("%s: %s was made by keyward dev and must not guard real keys: "+
				"make one with keyward pepper new, or say --allow-dev-pepper if you mean it", f.field, f.path)
		}
	}
	if p := peppers.Previous; p != nil && p.Version() == peppers.Current.Version() && p.CheckValue() == peppers.Current.CheckValue() {
		log.Warn("pepper.previousFile holds the current pepper: a rotation was cut off; run keyward pepper rotate again")
		peppers.Previous = nil
	}
	return peppers, peppers.Validate()
}

// readPrivate reads a small file that only its owner may read.
func readPrivate(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %#o: others can read it; chmod 600 %s", path, mode, path)
	}
	return io.ReadAll(io.LimitReader(f, 64<<10))
}
