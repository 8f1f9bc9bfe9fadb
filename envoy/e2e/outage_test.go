package e2e_test

import (
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"keyward/authz/admin"
	"keyward/envoy/envoytest"
)

// TestKeywardAway: Envoy asks about every request, public ones too, because only keyward knows which are.
// So while keyward is away all of them are 503.
func TestKeywardAway(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	home := s.instance(t, admin.PolicyInput{})
	good, revoked := s.key(t, home, admin.KeyInput{}), s.key(t, home, admin.KeyInput{})
	s.revoke(t, revoked)
	const timeout = time.Second
	var fronts []*front
	for _, version := range envoytest.Versions() {
		fronts = append(fronts, s.front(t, frontConfig{version: version, args: []string{"--check-timeout", timeout.String()}}))
	}
	rpc := s.front(t, frontConfig{grpc: true, args: []string{"--check-timeout", timeout.String()}})
	client := healthpb.NewHealthClient(rpc.grpc(t))
	call := func() codes.Code {
		_, err := client.Check(metadata.AppendToOutgoingContext(t.Context(), "x-api-key", good.secret), &healthpb.HealthCheckRequest{})
		return status.Code(err)
	}

	// back waits until the good key is accepted through all Envoys. Until then the answer is 503, and never a
	// word about the key; what was revoked stays so.
	back := func(when string) {
		t.Helper()
		for _, f := range fronts {
			c := f.caller(t)
			c.patient = false
			waitFor(t, when, func() bool {
				if a := c.get("/any", withKey(revoked.secret)); a.status != http.StatusUnauthorized && a.status != http.StatusServiceUnavailable {
					t.Fatalf("%s: the revoked key: got status %d", when, a.status)
				}
				a := c.get("/any", withKey(good.secret))
				if a.status != http.StatusOK && a.status != http.StatusServiceUnavailable {
					t.Fatalf("%s: the good key: got status %d, want 503 or 200", when, a.status)
				}
				return a.status == http.StatusOK
			})
			c.patient = true
			c.get("/any", withKey(revoked.secret)).want(t, http.StatusUnauthorized, when)
			c.get("/any").want(t, http.StatusUnauthorized, when)
			c.get("/public/a").want(t, http.StatusOK, when)
		}
		waitFor(t, when+", for gRPC", func() bool { return call() == codes.OK })
	}
	// away sends requests of all sorts, none of which may get through.
	away := func(when string) {
		t.Helper()
		longest := time.Duration(0)
		for _, f := range fronts {
			c := f.caller(t)
			c.patient = false
			for i, target := range slices.Repeat([]string{"/any", "/optional/a", "/public/a", "/orders"}, 3) {
				lines := [][]string{nil, {withKey(good.secret)}, {withKey(revoked.secret)}}[i%3]
				a := c.get(target, append(lines, caseHeader+": "+strings.ReplaceAll(when, " ", "-"))...)
				if a.status != http.StatusServiceUnavailable || a.body != "" || a.seen != nil {
					t.Errorf("%s: %s: got %d %q, want 503 without a word", when, target, a.status, a.body)
				}
				longest = max(longest, a.came.Sub(a.sent))
			}
			if n := len(f.up.of(strings.ReplaceAll(when, " ", "-"))); n != 0 {
				t.Errorf("%s: %d requests reached the upstream", when, n)
			}
		}
		// Not an assertion about speed: Envoy waits five minutes for what has no timeout of its own.
		if longest > timeout+20*time.Second {
			t.Errorf("%s: an answer took %v, want about %v at most", when, longest, timeout)
		}
		t.Logf("%s: the longest answer took %v", when, longest)
		if got := call(); got != codes.Unavailable {
			t.Errorf("%s: a gRPC caller got %v, want Unavailable", when, got)
		}
	}
	seenAway := func() {
		t.Helper()
		for _, f := range fronts {
			waitFor(t, "the health check to see it", func() bool {
				stats, err := f.Stats(t.Context(), `^cluster\.keyward\.membership_healthy$`)
				return err == nil && stats["cluster.keyward.membership_healthy"] == 0
			})
		}
	}

	back("at the beginning")
	s.process.kill(t)
	away("killed")
	seenAway()
	away("seen to be killed")
	s.restart(t)
	back("started again")
	record, err := s.client.Key(t.Context(), home, good.ID)
	if err != nil || record.Status != "active" || record.Hint != good.Hint {
		t.Errorf("got %+v, %v, want the key as it was", record, err)
	}
	fresh := s.key(t, home, admin.KeyInput{})
	fronts[0].caller(t).get("/any", withKey(fresh.secret)).want(t, http.StatusOK, "a new key after the restart")

	s.process.signal(t, syscall.SIGSTOP)
	away("frozen")
	seenAway()
	away("seen to be frozen")
	s.process.signal(t, syscall.SIGCONT)
	back("thawed")

	for _, f := range fronts {
		stats, err := f.Stats(t.Context(), `ext_authz\.keyward\.failure_mode_allowed$`)
		if err != nil || stats["http.ingress.ext_authz.keyward.failure_mode_allowed"] != 0 {
			t.Errorf("got %v, %v, want nothing let through", stats, err)
		}
	}
}
