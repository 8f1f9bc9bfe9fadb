package e2e_test

import (
	"bufio"
	"bytes"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// samples reads the metrics whose names begin with keyward_; histograms by their count.
func (s *server) samples(t *testing.T) map[string]int {
	t.Helper()
	status, body, err := fetch("http://" + s.metrics + "/metrics")
	if err != nil || status != http.StatusOK {
		t.Fatalf("got %d, %v", status, err)
	}
	values := map[string]int{}
	for lines := bufio.NewScanner(bytes.NewReader(body)); lines.Scan(); {
		name, value, ok := strings.Cut(lines.Text(), " ")
		if n, err := strconv.ParseFloat(value, 64); ok && err == nil && strings.HasPrefix(name, "keyward_") {
			values[name] = int(n)
		}
	}
	return values
}

func TestMetricsCountWhatWasSent(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes + "- {path: /any}\n" + "defaultRoute: deny\ncorsPreflight: allow\n"})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	home, closed := s.instance(t, admin.PolicyInput{}), s.instance(t, admin.PolicyInput{Disabled: true})
	full := s.instance(t, admin.PolicyInput{Total: limited(1, "1h", 1)})
	good := s.key(t, home, admin.KeyInput{Scopes: []string{"orders:read"}})
	revoked := s.key(t, home, admin.KeyInput{})
	s.revoke(t, revoked)
	expired := s.key(t, home, admin.KeyInput{ExpiresIn: "1s"})
	later := s.key(t, home, admin.KeyInput{NotBefore: time.Now().Add(time.Hour).Format(time.RFC3339)})
	agent := s.key(t, home, admin.KeyInput{Type: apikey.TypeAgent, AgentName: "sales"})
	production := s.key(t, home, admin.KeyInput{Environment: "production"})
	far := s.key(t, home, admin.KeyInput{AllowedIPs: []string{"203.0.113.7"}})
	once := s.key(t, home, admin.KeyInput{Limits: limited(1, "1h", 1)})
	together := s.key(t, full, admin.KeyInput{})
	shut := s.key(t, closed, admin.KeyInput{})
	mistyped := good.secret[:10] + strings.Map(func(r rune) rune { return r ^ 1 }, good.secret[10:11]) + good.secret[11:]
	if !strings.ContainsAny(mistyped[10:11], "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") {
		mistyped = good.secret[:10] + "b" + good.secret[11:]
	}
	time.Sleep(time.Until(expired.ExpirationDate.Add(10 * time.Millisecond)))

	c := f.caller(t)
	want := map[authz.Reason]int{}
	send := func(times int, reason authz.Reason, method, target string, lines ...string) {
		t.Helper()
		status := map[authz.Outcome]int{authz.Allowed: 200, authz.Invalid: 400, authz.Unauthenticated: 401, authz.Forbidden: 403, authz.Limited: 429}[reason.Outcome()]
		for range times {
			c.do(method, target, append(lines, "Content-Length: 0")...).want(t, status, reason)
		}
		want[reason] += times
	}
	send(7, authz.ReasonKey, "GET", "/orders", withKey(good.secret))
	send(2, authz.ReasonPublic, "GET", "/public/a", withKey(good.secret))
	send(3, authz.ReasonAnonymous, "GET", "/optional/a")
	send(2, authz.ReasonPreflight, "OPTIONS", "/any", "Origin: https://a.example", "Access-Control-Request-Method: PUT")
	send(4, authz.ReasonNoCredential, "GET", "/any")
	send(3, authz.ReasonUnknownKey, "GET", "/any", withKey(s.unknown(apikey.KindAgent)))
	send(2, authz.ReasonBadChecksum, "GET", "/any", withKey(mistyped))
	send(5, authz.ReasonMalformedCredential, "GET", "/any", withKey("secret"))
	send(2, authz.ReasonAmbiguousCredential, "GET", "/any", withKey(good.secret), withKey(good.secret))
	send(3, authz.ReasonRevoked, "GET", "/any", withKey(revoked.secret))
	send(2, authz.ReasonExpired, "GET", "/any", withKey(expired.secret))
	send(1, authz.ReasonNotYetValid, "GET", "/any", withKey(later.secret))
	send(2, authz.ReasonInstanceDisabled, "GET", "/any", withKey(shut.secret))
	send(2, authz.ReasonNoRoute, "GET", "/nowhere", withKey(good.secret))
	send(3, authz.ReasonInvalidPath, "GET", "/a;b", withKey(good.secret))
	send(1, authz.ReasonInvalidRequest, "GET", "/chat?agent=", withKey(agent.secret))
	send(2, authz.ReasonWrongInstance, "GET", "/instances/"+full+"/a", withKey(good.secret))
	send(3, authz.ReasonWrongAgent, "GET", "/agents/support/chat", withKey(agent.secret))
	send(1, authz.ReasonAgentRequired, "GET", "/chat", withKey(agent.secret))
	send(2, authz.ReasonWrongEnvironment, "GET", "/environments/staging/a", withKey(production.secret))
	send(4, authz.ReasonMissingScope, "POST", "/orders", withKey(good.secret))
	send(1, authz.ReasonAddress, "GET", "/any", withKey(far.secret))
	send(1, authz.ReasonKey, "GET", "/any", withKey(once.secret))
	send(5, authz.ReasonLimitBurst, "GET", "/any", withKey(once.secret))
	send(1, authz.ReasonKey, "GET", "/any", withKey(together.secret))
	send(3, authz.ReasonLimitInstance, "GET", "/any", withKey(together.secret))

	wantCounts, total, allowed := map[string]int{}, 0, 0
	for _, reason := range authz.Reasons() {
		wantCounts[`keyward_decisions_total{outcome="`+reason.Outcome().String()+`",reason="`+reason.String()+`"}`] = want[reason]
		total += want[reason]
		if reason.Outcome() == authz.Allowed {
			allowed += want[reason]
		}
	}
	values := s.samples(t)
	got := map[string]int{}
	for name, value := range values {
		if strings.HasPrefix(name, "keyward_decisions_total") {
			got[name] = value
		}
	}
	if diff := cmp.Diff(wantCounts, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// A look-up each for what had the shape of a key; one of them read the store for each key that there is.
	if n := values["keyward_check_duration_seconds_count"] - values["keyward_undecided_total"]; n != total {
		t.Errorf("the histogram has %d decisions, want %d", n, total)
	}
	for _, name := range []string{"keyward_check_panics_total", "keyward_check_malformed_total"} {
		if n, there := values[name]; n != 0 || !there {
			t.Errorf("%s: got %d, there: %v", name, n, there)
		}
	}
	for _, name := range []string{`keyward_cache_lookups_total{result="hit"}`, `keyward_cache_lookups_total{result="miss"}`, `keyward_cache_loads_total{outcome="found"}`} {
		if values[name] == 0 {
			t.Errorf("%s: got none", name)
		}
	}
	for name := range values {
		for _, mine := range []string{good.ID.String(), home, full, closed} {
			if strings.Contains(name, mine) {
				t.Errorf("%s: a label for each key or instance", name)
			}
		}
	}
	// Envoy counts the same.
	stats, err := f.Stats(t.Context(), `^http\.ingress\.ext_authz\.keyward\.(ok|denied)$`)
	if err != nil {
		t.Fatal(err)
	}
	wantStats := map[string]int64{"http.ingress.ext_authz.keyward.ok": int64(allowed), "http.ingress.ext_authz.keyward.denied": int64(total - allowed)}
	if diff := cmp.Diff(wantStats, stats); diff != "" {
		t.Errorf("Envoy (-want +got):\n%s", diff)
	}
	for page, want := range map[string]string{"healthz": "alive\n", "readyz": "ready\n"} {
		if status, body, err := fetch("http://" + s.metrics + "/" + page); err != nil || status != http.StatusOK || string(body) != want {
			t.Errorf("%s: got %d %q, %v", page, status, body, err)
		}
	}
}
