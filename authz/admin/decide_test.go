package admin_test

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/usage"
	"keyward/cache"
	"keyward/limits/local"
)

// A warmGate decides requests as serve does: from a cache that follows the store.
type warmGate struct {
	*desk
	authorizer *authz.Authorizer
}

// inGate runs fn with one in a bubble. The cache looks at the store by itself once in an hour only: what
// is true after an answer is true because of the answer.
func inGate(t *testing.T, fn func(t *testing.T, g *warmGate)) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		log := slog.New(slog.NewTextHandler(d.log, nil))
		facts, err := cache.New(d.store, cache.Config{Poll: time.Hour, Lease: 3 * time.Hour}, prometheus.NewRegistry(), log)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		counter := usage.NewCounter(d.store, usage.Config{}, nil, log)
		running := make(chan error, 1)
		go func() { running <- facts.Run(ctx) }()
		defer func() {
			stop()
			if err := <-running; err != nil {
				t.Error(err)
			}
			facts.Close()
		}()
		peppers := apikey.Peppers{Current: d.pepper}
		d.Service = admin.New(d.store, admin.Config{Peppers: peppers}, facts, log)
		g := &warmGate{desk: d}
		rule := authz.Rule{Path: "/admin", Scopes: []apikey.Scope{"admin"}}
		keys := decisionFacts{facts, d.store}
		if g.authorizer, err = authz.New(authz.Config{Rules: []authz.Rule{rule}}, keys, local.New(local.Config{}, nil), peppers, counter, nobodyRedigests{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // the cache has loaded what it needs
		d.policy(t, "a", apikey.Policy{Creation: apikey.Creation{PerHour: apikey.Unlimited}})
		fn(t, g)
	})
}

// decisionFacts is what a decision is told of keys: by the cache, and by the store about last uses.
type decisionFacts struct {
	*cache.Cache
	store admin.Store
}

func (f decisionFacts) LastUsed(ctx context.Context, id apikey.ID) (time.Time, error) {
	return f.store.LastUsed(ctx, id)
}

type nobodyRedigests struct{}

func (nobodyRedigests) Redigest(_, _ apikey.Digest) {}

// ask decides one request with a secret.
func (g *warmGate) ask(t *testing.T, secret apikey.Secret, path string) *authz.Decision {
	t.Helper()
	r := &authz.Request{Method: "GET", Host: "h", Path: path, Peer: "192.0.2.1", Headers: []authz.Pair{{Name: "x-api-key", Value: secret.Reveal()}}}
	d := new(authz.Decision)
	if err := g.authorizer.Decide(t.Context(), r, d); err != nil {
		t.Fatal(err)
	}
	g.authorizer.TakeBack(t.Context(), d)
	return d
}

func (g *warmGate) want(t *testing.T, what string, secret apikey.Secret, want authz.Reason) {
	t.Helper()
	if got := g.ask(t, secret, "/").Reason; got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// TestDecisionsFollowTheLifeOfAKey: what the answer to a change says is true for the next request, from a
// warm cache.
func TestDecisionsFollowTheLifeOfAKey(t *testing.T) {
	inGate(t, func(t *testing.T, g *warmGate) {
		ctx := t.Context()
		made := g.make(t, admin.KeyInput{})
		g.want(t, "created", made.Secret, authz.ReasonKey)
		g.patch(t, made.Key.ID, admin.KeyPatch{Disabled: admin.To(true)})
		g.want(t, "disabled", made.Secret, authz.ReasonDisabled)
		g.patch(t, made.Key.ID, admin.KeyPatch{Disabled: admin.To(false)})
		g.want(t, "enabled", made.Secret, authz.ReasonKey)
		if got := g.ask(t, made.Secret, "/admin").Reason; got != authz.ReasonKey {
			t.Errorf("every right: got %v", got)
		}
		g.patch(t, made.Key.ID, admin.KeyPatch{Scopes: admin.To([]string{"other"})})
		if got := g.ask(t, made.Secret, "/admin").Reason; got != authz.ReasonMissingScope {
			t.Errorf("narrowed: got %v", got)
		}
		g.patch(t, made.Key.ID, admin.KeyPatch{AllowedIPs: admin.To([]string{"10.0.0.0/8"})})
		g.want(t, "from elsewhere", made.Secret, authz.ReasonAddress)
		g.patch(t, made.Key.ID, admin.KeyPatch{AllowedIPs: admin.Null[[]string]()})

		if _, err := g.SwitchInstance(ctx, root, "a", true); err != nil {
			t.Fatal(err)
		}
		g.want(t, "instance switched off", made.Secret, authz.ReasonInstanceDisabled)
		if _, err := g.SwitchInstance(ctx, root, "a", false); err != nil {
			t.Fatal(err)
		}
		g.want(t, "instance switched on", made.Secret, authz.ReasonKey)

		if _, err := g.RevokeKey(ctx, root, "a", made.Key.ID, ""); err != nil {
			t.Fatal(err)
		}
		g.want(t, "revoked", made.Secret, authz.ReasonRevoked)
	})
}

func TestDecisionsFollowRotation(t *testing.T) {
	inGate(t, func(t *testing.T, g *warmGate) {
		ctx := t.Context()
		rotate := func(id apikey.ID, in admin.RotateInput) apikey.Secret {
			t.Helper()
			made, err := g.RotateKey(ctx, root, "a", id, in, 0)
			if err != nil {
				t.Fatal(err)
			}
			return made.Secret
		}
		first := g.make(t, admin.KeyInput{})
		g.want(t, "the first", first.Secret, authz.ReasonKey)
		second := rotate(first.Key.ID, admin.RotateInput{GracePeriod: "1h"})
		for what, secret := range map[string]apikey.Secret{"the old one": first.Secret, "the new one": second} {
			d := g.ask(t, secret, "/")
			if d.Reason != authz.ReasonKey || d.Key.ID != first.Key.ID {
				t.Errorf("%s while both are valid: %v", what, d.Reason)
			}
			if _, _, deprecated := d.Key.Deprecated(); deprecated != (what == "the old one") {
				t.Errorf("%s is deprecated: %t", what, deprecated)
			}
		}
		time.Sleep(time.Hour - time.Second)
		g.want(t, "the old one, before its end", first.Secret, authz.ReasonKey)
		time.Sleep(2 * time.Second)
		g.want(t, "the old one, after its end", first.Secret, authz.ReasonGenerationEnded)
		g.want(t, "the new one", second, authz.ReasonKey)

		third := rotate(first.Key.ID, admin.RotateInput{GracePeriod: "0s"})
		g.want(t, "without grace", second, authz.ReasonGenerationEnded)
		g.want(t, "the third", third, authz.ReasonKey)
		fourth := rotate(first.Key.ID, admin.RotateInput{})
		if _, err := g.RevokeGeneration(ctx, root, "a", first.Key.ID, 3); err != nil {
			t.Fatal(err)
		}
		g.want(t, "the third, revoked", third, authz.ReasonGenerationEnded)
		g.want(t, "the fourth", fourth, authz.ReasonKey)
		fifth := rotate(first.Key.ID, admin.RotateInput{})
		sixth := rotate(first.Key.ID, admin.RotateInput{EndOldest: true})
		g.want(t, "the oldest, ended", fourth, authz.ReasonGenerationEnded)
		g.want(t, "the one before", fifth, authz.ReasonKey)
		g.want(t, "the newest", sixth, authz.ReasonKey)

		stop := reporting(t, g.Service)
		if err := g.ReportLeaked(fifth, somewhere, ""); err != nil {
			t.Fatal(err)
		}
		stop()
		g.want(t, "reported as leaked", fifth, authz.ReasonGenerationEnded)
		g.want(t, "its sister", sixth, authz.ReasonKey)
	})
}

func TestDecisionsFollowTime(t *testing.T) {
	inGate(t, func(t *testing.T, g *warmGate) {
		brief, idle, used, late := g.make(t, admin.KeyInput{ExpiresIn: "12h"}), g.make(t, admin.KeyInput{InactivityDays: new(1)}),
			g.make(t, admin.KeyInput{InactivityDays: new(1)}), g.make(t, admin.KeyInput{NotBefore: time.Now().Add(time.Hour).UTC().Format(time.RFC3339)})
		begin := time.Now()
		g.want(t, "not yet", late.Secret, authz.ReasonNotYetValid)
		time.Sleep(12*time.Hour - time.Second)
		g.want(t, "at last", late.Secret, authz.ReasonKey)
		g.want(t, "before its end", brief.Secret, authz.ReasonKey)
		time.Sleep(2 * time.Second)
		g.want(t, "after its end", brief.Secret, authz.ReasonExpired)
		g.use(t, used.Key.ID, time.Now()) // on another replica
		time.Sleep(time.Until(begin.Add(oneDay + time.Minute)))
		for range 2 { // a refused attempt revives nothing
			g.want(t, "unused for a day", idle.Secret, authz.ReasonIdle)
		}
		g.want(t, "used elsewhere", used.Secret, authz.ReasonKey)
		// Whoever has the right to may give it a longer time.
		g.patch(t, idle.Key.ID, admin.KeyPatch{InactivityDays: admin.To(7)})
		g.want(t, "with more time", idle.Secret, authz.ReasonKey)
		g.patch(t, brief.Key.ID, admin.KeyPatch{ExpiresIn: admin.To("1h")})
		g.want(t, "with another date", brief.Secret, authz.ReasonKey)
	})
}

func TestRemovedKeyIsUnknown(t *testing.T) {
	inGate(t, func(t *testing.T, g *warmGate) {
		made := g.make(t, admin.KeyInput{})
		g.want(t, "created", made.Secret, authz.ReasonKey)
		if _, err := g.RevokeKey(t.Context(), root, "a", made.Key.ID, ""); err != nil {
			t.Fatal(err)
		}
		g.policy(t, "a", apikey.Policy{KeepRevoked: apikey.Duration(oneDay)})
		time.Sleep(oneDay + time.Minute)
		stop := sweeping(t, g.Service, "one")
		time.Sleep(time.Second)
		stop()
		time.Sleep(2 * time.Hour) // the cache looks by itself
		g.want(t, "removed", made.Secret, authz.ReasonUnknownKey)
	})
}
