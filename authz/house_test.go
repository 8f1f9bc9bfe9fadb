package authz_test

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/cache"
	"keyward/limits"
	"keyward/limits/local"
)

// sized is n, or a tenth of it under the race detector.
func sized(n int) int {
	if authz.RaceEnabled || testing.Short() {
		return n / 10
	}
	return n
}

var owner = admin.Caller{Name: "test", Role: admin.RoleOwner}

var (
	housePeppers = apikey.Peppers{Current: apikey.NewPepper(1, false)}
	auditKeys    = admin.NewAuditKeys(housePeppers) // of the stores of houses
)

// unbounded is a policy under which as many keys can be made as a test likes.
func unbounded(p apikey.Policy) apikey.Policy {
	p.Caps = apikey.Caps{Instance: apikey.Unlimited, User: apikey.Unlimited, Agent: apikey.Unlimited}
	p.Creation = apikey.Creation{PerHour: apikey.Unlimited}
	return p
}

// A house is a real store with the real service on it and replicas that decide from real caches.
type house struct {
	store    admin.Store
	peppers  apikey.Peppers
	replicas []*replica
}

// A replica is what one process has of its own.
type replica struct {
	*authz.Authorizer
	cache   *cache.Cache
	reg     *prometheus.Registry // the cache's
	service *admin.Service
}

// newHouse starts a replica for each of the sources, which see the store in one way or another.
func newHouse(t *testing.T, store admin.Store, config cache.Config, rules []authz.Rule, sources ...cache.Source) *house {
	t.Helper()
	h := &house{store: store, peppers: housePeppers}
	h.start(t, config, rules, sources...)
	return h
}

// start starts the replicas and waits until they answer, not for their warm-up.
func (h *house) start(t *testing.T, config cache.Config, rules []authz.Rule, sources ...cache.Source) {
	t.Helper()
	for _, source := range sources {
		reg := prometheus.NewRegistry()
		c, err := cache.New(source, config, reg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		ctx, cancel := context.WithCancel(context.Background())
		var run sync.WaitGroup
		run.Go(func() { _ = c.Run(ctx) })
		t.Cleanup(func() { cancel(); run.Wait() })
		r := &replica{cache: c, reg: reg, service: admin.New(h.store, admin.Config{Peppers: h.peppers}, c, slog.New(slog.DiscardHandler))}
		r.Authorizer = h.authorizer(t, authz.Config{Rules: rules}, facts{c, h.store.LastUsed}, local.New(local.Config{}, nil))
		h.replicas = append(h.replicas, r)
	}
	for _, r := range h.replicas {
		for r.cache.Serving() != nil { // until Run has loaded the set
			time.Sleep(time.Millisecond)
		}
	}
}

func (h *house) authorizer(t *testing.T, config authz.Config, keys authz.Keys, limiter limits.Leaser) *authz.Authorizer {
	t.Helper()
	a, err := authz.New(config, keys, limiter, h.peppers, nobody{}, nobody{})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// count reads a counter or gauge of a cache, the one with the first label of several.
func count(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "keyward_cache_"+name {
			return f.GetMetric()[0].GetCounter().GetValue() + f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

// facts is a cache, and the store for last uses.
type facts struct {
	*cache.Cache
	lastUsed func(context.Context, apikey.ID) (time.Time, error)
}

func (f facts) LastUsed(ctx context.Context, id apikey.ID) (time.Time, error) {
	return f.lastUsed(ctx, id)
}

// nobody listens.
type nobody struct{}

func (nobody) Decided(authz.Use)           {}
func (nobody) Last(apikey.ID) time.Time    { return time.Time{} }
func (nobody) Redigest(_, _ apikey.Digest) {}

// unlimited are limits that never refuse.
var unlimited = admin.LimitsInput{Rate: &admin.RateInput{Requests: new(-1)}, Burst: new(-1), MaxConcurrent: new(-1)}

// asking is a request with a secret.
func asking(secret apikey.Secret) authz.Request {
	return authz.Request{Method: "GET", Path: "/", Peer: "192.0.2.1", Headers: []authz.Pair{header("x-api-key", secret.Reveal())}}
}

// ask decides as an adapter does: at once where that can be, else with waiting.
func ask(ctx context.Context, a *authz.Authorizer, r *authz.Request, d *authz.Decision) error {
	ok, err := a.Try(r, d)
	if !ok {
		err = a.Decide(ctx, r, d)
	}
	if err != nil {
		return err
	}
	a.Decided(r, d, time.Now())
	return nil
}
