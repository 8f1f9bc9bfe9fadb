package manage

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
	"keyward/limits"
)

var update = flag.Bool("update", false, "rewrite golden files")

var (
	pepper = apikey.NewPepper(1, false)
	root   = admin.Caller{Name: "test", Role: admin.RoleOwner}
)

// A desk is the API on a new store, with an owner's token and what was logged.
type desk struct {
	http.Handler
	svc   *admin.Service
	store admin.Store
	owner apikey.Secret
	log   *bytes.Buffer

	running []admin.RunningRequest
	ended   []limits.Lease
	decider *authz.Authorizer
}

func open(t *testing.T) *desk {
	t.Helper()
	store, err := sqlite.Open(context.Background(), sqlite.Config{
		Path: filepath.Join(t.TempDir(), "keyward.db"), Audit: admin.NewAuditKeys(apikey.Peppers{Current: pepper}),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	if err := admin.OpenPeppers(t.Context(), store, apikey.Peppers{Current: pepper}, "test"); err != nil {
		t.Fatal(err)
	}
	return on(t, store, apikey.Peppers{Current: pepper})
}

// Running and End make the desk the one who counts running requests.
func (d *desk) Running(apikey.ID) []admin.RunningRequest { return d.running }

func (d *desk) End(_ context.Context, l limits.Lease) error {
	d.ended = append(d.ended, l)
	return nil
}

func on(t *testing.T, store admin.Store, peppers apikey.Peppers) *desk {
	t.Helper()
	d := &desk{store: store, log: new(bytes.Buffer)}
	log := slog.New(slog.NewTextHandler(d.log, nil))
	d.decider = decides(t, store, peppers)
	d.svc = admin.New(store, admin.Config{
		Peppers: peppers, Leases: d, Decisions: d.decider, Replica: "r", Format: apikey.Format{Foreign: []apikey.Shape{{AgentToken: true}}},
	}, nil, log)
	d.Handler = New(d.svc, Config{Pepper: peppers.Current, Log: log})
	d.owner = d.token(t, admin.TokenInput{Name: "owner", Role: admin.RoleOwner}).Secret
	return d
}

func (d *desk) token(t *testing.T, in admin.TokenInput) admin.CreatedToken {
	t.Helper()
	made, err := d.svc.CreateToken(t.Context(), root, in)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func (d *desk) instance(t *testing.T, id string) {
	t.Helper()
	if _, err := d.svc.PutInstance(t.Context(), root, id, apikey.Policy{Creation: apikey.Creation{PerHour: apikey.Unlimited}}); err != nil {
		t.Fatal(err)
	}
}

func (d *desk) key(t *testing.T, instance string) admin.CreatedKey {
	t.Helper()
	made, err := d.svc.CreateKey(t.Context(), root, instance, admin.KeyInput{Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// send sends a request as the holder of a token, the zero Secret for none. Headers come in pairs.
func (d *desk) send(token apikey.Secret, method, target, body string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	if !token.IsZero() {
		r.Header.Set("Authorization", "Bearer "+token.Reveal())
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header[http.CanonicalHeaderKey(headers[i])] = []string{headers[i+1]}
	}
	w := httptest.NewRecorder()
	d.ServeHTTP(w, r)
	return w
}

// read decodes an answer and fails unless it has the status.
func read[T any](t *testing.T, w *httptest.ResponseRecorder, status int) T {
	t.Helper()
	var v T
	if w.Code != status {
		t.Fatalf("got %d %s, want %d", w.Code, w.Body, status)
	}
	if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil {
		t.Fatalf("%v in %s", err, w.Body)
	}
	return v
}

// wantError fails unless an answer is an error of the API's shape.
func wantError(t *testing.T, w *httptest.ResponseRecorder, status int, code, target string) {
	t.Helper()
	var body map[string]map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || len(body) != 1 {
		t.Fatalf("got %d %q, want an error object", w.Code, w.Body)
	}
	e := body["error"]
	for name := range e {
		if !slices.Contains([]string{"code", "message", "target", "details"}, name) {
			t.Errorf("unknown member %s in %s", name, w.Body)
		}
	}
	got, _ := e["target"].(string)
	if message, _ := e["message"].(string); w.Code != status || e["code"] != code || got != target || message == "" {
		t.Errorf("got %d %s, want %d %s about %q", w.Code, w.Body, status, code, target)
	}
	if got := w.Header().Get("Content-Type"); got != "application/json" {
		t.Errorf("Content-Type %q", got)
	}
	if got := w.Header().Get("Cache-Control"); got != "no-store" {
		t.Errorf("Cache-Control %q", got)
	}
}

func noCanary(t *testing.T, text string, secrets ...apikey.Secret) {
	t.Helper()
	for _, s := range secrets {
		if sent := s.Reveal(); strings.Contains(text, sent[4:20]) || strings.Contains(text, sent[20:40]) {
			t.Error("a secret leaked")
		}
	}
}

// importable is a secret that somebody has already.
var importable = apikey.Format{}.New(apikey.KindInstance).Reveal()

const quotaBody = `{"name":"q","context":"CoreAPI:Completions","partition":"None","limit":1,"window":"60s"}`

// sweep is every route, with a request that would succeed for an owner. {key} and {token} are ids.
var sweep = []struct {
	method, target, body       string
	owner, operator, auditor   int // statuses for a token of all instances
	ownOwner, ownOper, ownAudi int // and for one of instance a
	user, ownUser              int // and for both kinds of a user's token; {key} is not the user's
}{
	{"GET", "/instances", "", 200, 200, 200, 200, 200, 200, 403, 403},
	{"PUT", "/instances/a", `{"policy":{}}`, 200, 200, 403, 200, 200, 403, 403, 403},
	{"GET", "/instances/a", "", 200, 200, 200, 200, 200, 200, 403, 403},
	{"DELETE", "/instances/a?revokeKeys=true", "", 200, 403, 403, 200, 403, 403, 403, 403},
	{"GET", "/instances/a/apiKeys", "", 200, 200, 200, 200, 200, 200, 200, 200},
	{"POST", "/instances/a/apiKeys", `{"name":"n"}`, 201, 201, 403, 201, 201, 403, 201, 201},
	{"GET", "/instances/a/apiKeys/{key}", "", 200, 200, 200, 200, 200, 200, 404, 404},
	{"GET", "/instances/a/apiKeys:limits", "", 200, 200, 200, 200, 200, 200, 200, 200},
	{"POST", "/instances/a/apiKeys:revoke", `{"filter":{"namePrefix":"none"}}`, 200, 200, 403, 200, 200, 403, 200, 200},
	{"PATCH", "/instances/a/apiKeys/{key}", `{"description":"d"}`, 200, 200, 403, 200, 200, 403, 404, 404},
	{"POST", "/instances/a/apiKeys/{key}/rotate", `{"endOldest":true}`, 200, 200, 403, 200, 200, 403, 404, 404},
	{"POST", "/instances/a/apiKeys/{key}/generations/1/revoke", "", 409, 409, 403, 409, 409, 403, 404, 404},
	{"GET", "/instances/a/apiKeys/{key}/advice", "", 200, 200, 200, 200, 200, 200, 404, 404},
	{"POST", "/instances/a/disable", "", 200, 200, 403, 200, 200, 403, 403, 403},
	{"POST", "/instances/a/enable", "", 200, 200, 403, 200, 200, 403, 403, 403},
	{"DELETE", "/instances/a/apiKeys/{key}", "", 200, 200, 403, 200, 200, 403, 404, 404},
	{"POST", "/instances/a/apiKeys:import", `{"name":"n","secret":"` + importable + `"}`, 201, 200, 403, 200, 200, 403, 403, 403},
	{"POST", "/instances/a/apiKeys:verify", `{"secret":"` + importable + `"}`, 200, 200, 403, 200, 200, 403, 403, 403},
	{"GET", "/instances/a/apiKeys/{key}/limits", "", 200, 200, 200, 200, 200, 200, 404, 404},
	{"GET", "/instances/a/apiKeys/{key}/usage", "", 200, 200, 200, 200, 200, 200, 404, 404},
	{"GET", "/instances/a/usage", "", 200, 200, 200, 200, 200, 200, 403, 403},
	{"GET", "/instances/a/usage/top", "", 200, 200, 200, 200, 200, 200, 403, 403},
	{"GET", "/usage", "", 200, 200, 200, 404, 404, 404, 403, 404},
	{"GET", "/instances/a/decisions/0123456789abcdef0123456789abcdef", "", 404, 404, 404, 404, 404, 404, 403, 403},
	{"GET", "/instances/a/apiKeys:export", "", 200, 200, 200, 200, 200, 200, 403, 403},
	{"GET", "/instances/a/quotas", "", 200, 200, 200, 200, 200, 200, 403, 403},
	{"POST", "/instances/a/quotas:apply", `{"quotas":[` + quotaBody + `]}`, 200, 200, 403, 200, 200, 403, 403, 403},
	{"PUT", "/instances/a/quotas/q", quotaBody, 200, 200, 403, 200, 200, 403, 403, 403},
	{"GET", "/instances/a/quotas/q", "", 200, 200, 200, 200, 200, 200, 403, 403},
	{"DELETE", "/instances/a/quotas/none", "", 404, 404, 403, 404, 404, 403, 403, 403},
	{"GET", "/instances/a" + salesTokens, "", 200, 200, 200, 200, 200, 200, 403, 403},
	{"POST", "/instances/a" + salesTokens + "/8b0f6c58-4a7c-4d7f-9d3e-5b1a0c9e7f21", tokenBody, 200, 200, 403, 200, 200, 403, 403, 403},
	{"DELETE", "/instances/a" + salesTokens + "/{key}", "", 200, 200, 403, 200, 200, 403, 403, 403},
	{"POST", "/instances/a" + salesTokens + "/validate", `{"access_token":"none"}`, 200, 200, 200, 200, 200, 200, 403, 403},
	{"GET", "/instances/a/inFlight", "", 200, 200, 200, 200, 200, 200, 403, 403},
	{"DELETE", "/instances/a/inFlight/none", "", 404, 404, 403, 404, 404, 403, 403, 403},
	{"GET", "/instances/a/alerts", "", 200, 200, 200, 200, 200, 200, 403, 403},
	{"GET", "/instances/a/alerts/{key}", "", 404, 404, 404, 404, 404, 404, 403, 403},
	{"POST", "/instances/a/alerts/{key}/ack", "", 404, 404, 403, 404, 404, 403, 403, 403},
	{"GET", "/alerts", "", 200, 200, 200, 404, 404, 404, 403, 404},
	{"GET", "/alerts/{key}", "", 404, 404, 404, 404, 404, 404, 403, 404},
	{"POST", "/alerts/{key}/ack", "", 404, 404, 403, 404, 404, 404, 403, 404},
	{"POST", "/alerts:test", "", 409, 409, 403, 404, 404, 404, 403, 404},
	{"GET", "/tokens", "", 200, 403, 200, 200, 403, 200, 403, 403},
	{"POST", "/tokens", `{"name":"n","role":"auditor","instanceId":"a"}`, 201, 403, 403, 201, 403, 403, 403, 403},
	{"DELETE", "/tokens/{token}", "", 200, 403, 403, 200, 403, 403, 403, 403},
	{"DELETE", "/sessions?all=true", "", 200, 403, 403, 404, 404, 404, 403, 404},
	{"GET", "/peppers", "", 200, 403, 200, 404, 404, 404, 403, 404},
	{"DELETE", "/peppers/1", "", 409, 403, 403, 404, 404, 404, 403, 404},
	{"GET", "/instances/a/auditEvents", "", 200, 403, 200, 200, 403, 200, 403, 403},
	{"GET", "/auditEvents", "", 200, 403, 200, 404, 404, 404, 403, 404},
	{"GET", "/audit/chain", "", 200, 403, 200, 404, 404, 404, 403, 404},
	{"GET", "/audit/head", "", 200, 403, 200, 404, 404, 404, 403, 404},
	{"GET", "/audit/verify", "", 200, 403, 200, 404, 404, 404, 403, 404},
}

func TestEveryRouteWantsAToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		key := d.key(t, "a")
		expired := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleOwner, ExpiresIn: "1h"})
		revoked := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleOwner})
		if _, err := d.svc.RevokeToken(t.Context(), root, revoked.Token.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour + time.Second)
		bearer := func(s apikey.Secret) []string { return []string{"Authorization", "Bearer " + s.Reveal()} }
		var body string
		for name, headers := range map[string][]string{
			"no token":      nil,
			"empty":         {"Authorization", ""},
			"scheme only":   {"Authorization", "Bearer"},
			"no scheme":     {"Authorization", d.owner.Reveal()},
			"basic":         {"Authorization", "Basic " + d.owner.Reveal()},
			"two spaces":    {"Authorization", "Bearer  " + d.owner.Reveal()},
			"own header":    {"X-API-Key", d.owner.Reveal()},
			"garbage":       {"Authorization", "Bearer kwm_x"},
			"unknown":       bearer(apikey.Format{}.New(apikey.KindManagement)),
			"a key":         bearer(key.Secret),
			"expired":       bearer(expired.Secret),
			"revoked":       bearer(revoked.Secret),
			"two in a line": {"Authorization", "Bearer " + d.owner.Reveal() + ", Bearer " + d.owner.Reveal()},
		} {
			routes := [][2]string{{"GET", "/"}, {"GET", "/nothing"}, {"PATCH", "/tokens"}, {"GET", "/docs/"}, {"GET", "/openapi.yaml"}}
			for _, route := range sweep {
				routes = append(routes, [2]string{route.method, ids(route.target, key, revoked)})
			}
			for _, route := range routes {
				w := d.send(apikey.Secret{}, route[0], route[1], `{"name":"n"}`, headers...)
				wantError(t, w, 401, CodeUnauthorized, "")
				challenge := w.Header().Get("WWW-Authenticate")
				sent := len(headers) > 0 && headers[0] == "Authorization" && headers[1] != ""
				if !strings.HasPrefix(challenge, "Bearer realm=") || strings.Contains(challenge, "invalid_token") != sent {
					t.Errorf("%s: challenge %q", name, challenge)
				}
				if body == "" {
					body = w.Body.String()
				}
				if w.Body.String() != body {
					t.Errorf("%s %v: got %s: the cause shows", name, route, w.Body)
				}
			}
		}
		r := httptest.NewRequest("GET", "/instances", nil)
		r.Header["Authorization"] = []string{"Bearer " + d.owner.Reveal(), "Bearer " + d.owner.Reveal()}
		w := httptest.NewRecorder()
		d.ServeHTTP(w, r)
		wantError(t, w, 401, CodeUnauthorized, "")
		if w := d.send(apikey.Secret{}, "GET", "/instances", "", "Authorization", "bEARER "+d.owner.Reveal()); w.Code != 200 {
			t.Errorf("the scheme's case matters: %d", w.Code)
		}
		noCanary(t, d.log.String(), d.owner, key.Secret, expired.Secret, revoked.Secret)
	})
}

func ids(target string, key admin.CreatedKey, token admin.CreatedToken) string {
	return strings.NewReplacer("{key}", key.Key.ID.String(), "{token}", token.Token.ID.String()).Replace(target)
}

// tokenFor describes a token of a role; that of a user is ann's.
func tokenFor(role admin.Role, instance string) admin.TokenInput {
	in := admin.TokenInput{Name: "n", Role: role, InstanceID: instance}
	if role == admin.RoleUser {
		in.UserPrincipalName = "ann@example.com"
	}
	return in
}

func TestRolesOnEveryRoute(t *testing.T) {
	d := open(t)
	for _, route := range sweep {
		for _, who := range []struct {
			role     admin.Role
			instance string
			want     int
		}{
			{admin.RoleOwner, "", route.owner}, {admin.RoleOperator, "", route.operator}, {admin.RoleAuditor, "", route.auditor},
			{admin.RoleOwner, "a", route.ownOwner}, {admin.RoleOperator, "a", route.ownOper}, {admin.RoleAuditor, "a", route.ownAudi},
			{admin.RoleUser, "", route.user}, {admin.RoleUser, "a", route.ownUser},
		} {
			d.instance(t, "a")
			caller := d.token(t, tokenFor(who.role, who.instance))
			target := ids(route.target, d.key(t, "a"), d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleAuditor, InstanceID: "a"}))
			w := d.send(caller.Secret, route.method, target, route.body)
			if w.Code != who.want {
				t.Errorf("%s %s by %s of %q: got %d %s, want %d", route.method, route.target, who.role, who.instance, w.Code, w.Body, who.want)
			}
			switch {
			case w.Code != 403:
			case strings.Contains(route.target, salesTokens):
				wantPlatformError(t, w, 403)
			default:
				wantError(t, w, 403, CodeForbidden, "")
			}
		}
	}
}

// What another tenant has looks exactly like what nobody has.
func TestTenantsCannotSeeEachOther(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	foreign, own := d.key(t, "a"), d.key(t, "b")
	foreignToken := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleAuditor, InstanceID: "a"})
	const nobody = "0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f"
	for _, role := range []admin.Role{admin.RoleOwner, admin.RoleOperator, admin.RoleAuditor, admin.RoleUser} {
		caller := d.token(t, tokenFor(role, "b"))
		for _, route := range sweep {
			if !strings.Contains(route.target, "/a") && !strings.Contains(route.target, "{token}") {
				continue
			}
			there := d.send(caller.Secret, route.method, ids(route.target, foreign, foreignToken), route.body)
			absent := strings.NewReplacer("/instances/a", "/instances/nobody", "{key}", nobody, "{token}", nobody).Replace(route.target)
			nowhere := d.send(caller.Secret, route.method, absent, route.body)
			if there.Code != nowhere.Code || there.Body.String() != nowhere.Body.String() {
				t.Errorf("%s %s by %s: %d %s, but if nobody has it %d %s", route.method, route.target, role, there.Code, there.Body, nowhere.Code, nowhere.Body)
			}
			if there.Code != 404 && there.Code != 403 {
				t.Errorf("%s %s by %s: got %d", route.method, route.target, role, there.Code)
			}
		}
		// Another's key under one's own instance.
		w := d.send(caller.Secret, "GET", "/instances/b/apiKeys/"+foreign.Key.ID.String(), "")
		wantError(t, w, 404, CodeNotFound, "")
		if role == admin.RoleUser {
			continue // who sees no list but that of its own keys
		}
		// Lists.
		page := read[list[admin.KeyRecord]](t, d.send(caller.Secret, "GET", "/instances/b/apiKeys", ""), 200)
		if len(page.Value) != 1 || page.Value[0].ID != own.Key.ID {
			t.Errorf("keys: %+v", page.Value)
		}
		instances := read[list[Instance]](t, d.send(caller.Secret, "GET", "/instances", ""), 200)
		if len(instances.Value) != 1 || instances.Value[0].ID != "b" {
			t.Errorf("instances: %+v", instances.Value)
		}
		if role == admin.RoleOperator {
			continue
		}
		for _, token := range read[list[admin.TokenRecord]](t, d.send(caller.Secret, "GET", "/tokens", ""), 200).Value {
			if token.InstanceID != "b" {
				t.Errorf("sees the token %+v", token)
			}
		}
	}
	// The instance of a new token neither.
	caller := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleOwner, InstanceID: "b"})
	var answers []string
	for _, id := range []string{"a", "nobody"} {
		w := d.send(caller.Secret, "POST", "/tokens", `{"name":"n","role":"owner","instanceId":"`+id+`"}`)
		wantError(t, w, 400, CodeInvalidRequest, "instanceId")
		answers = append(answers, w.Body.String())
	}
	if answers[0] != answers[1] {
		t.Errorf("got %q", answers)
	}
	for _, w := range []*httptest.ResponseRecorder{d.send(d.owner, "GET", "/instances/a/apiKeys/"+foreign.Key.ID.String(), "")} {
		read[admin.KeyRecord](t, w, 200) // nothing was harmed
	}
}

func TestCreateKeyShowsTheSecretOnce(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	w := d.send(d.owner, "POST", "/instances/a/apiKeys", `{
		"name": "my-api-key", "description": "Production backend service", "type": "agent", "agentName": "sales",
		"scopes": ["chat:*"], "environment": "prod", "allowedIps": ["10.0.0.0/8"],
		"limits": {"rate": {"requests": 90, "per": "90s"}, "burst": 5, "maxConcurrent": -1},
		"expiresIn": "30d", "inactivityDays": 10, "notBefore": null, "metadata": {"team": "core"}
	}`)
	made := read[map[string]any](t, w, 201)
	secret, _ := made["secret"].(string)
	if len(made) != 2 || len(secret) != (apikey.Format{}).Len() || !strings.HasPrefix(secret, "kwa_") {
		t.Fatalf("got %s", w.Body)
	}
	if w.Header().Get("Cache-Control") != "no-store" {
		t.Error("the answer with the secret may be stored")
	}
	location := w.Header().Get("Location")
	got := read[map[string]any](t, d.send(d.owner, "GET", location, ""), 200)
	if diff := cmp.Diff(made["key"], any(got)); diff != "" {
		t.Errorf("created, got (-created +got)\n%s", diff)
	}
	var names []string
	for name := range got {
		names = append(names, name)
	}
	slices.Sort(names)
	want := []string{
		"agentName", "allowedIps", "createdAt", "createdBy", "description", "environment", "expirationDate", "expirationPolicy",
		"generations", "hint", "id", "idleAfter", "inactivityDays", "instanceId", "limits", "metadata", "name", "scopes", "status", "type",
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("members (-want +got)\n%s", diff)
	}
	if diff := cmp.Diff(map[string]any{"rate": map[string]any{"requests": 90., "per": "1m30s"}, "burst": 5., "maxConcurrent": -1.}, got["limits"]); diff != "" {
		t.Errorf("limits (-want +got)\n%s", diff)
	}
	if got["expirationPolicy"] != "inactivity" || got["status"] != "active" || got["hint"] != "kwa_…"+secret[len(secret)-4:] {
		t.Errorf("got %v", got)
	}
	everything := ""
	for _, target := range []string{"/instances", "/instances/a", "/instances/a/apiKeys", location, "/tokens"} {
		everything += d.send(d.owner, "GET", target, "").Body.String()
	}
	everything += d.send(d.owner, "DELETE", location, "").Body.String()
	noCanary(t, everything+d.log.String(), apikey.NewSecret(secret), d.owner)
}

func TestRevokeKey(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	made := d.key(t, "a")
	target := "/instances/a/apiKeys/" + made.Key.ID.String()
	var first string
	for range 2 {
		w := d.send(d.owner, "DELETE", target+"?reason=keyCompromise", "")
		got := read[map[string]any](t, w, 200)
		if diff := cmp.Diff(map[string]any{"confirmed": 0., "total": 0.}, got["replicas"]); diff != "" || len(got) != 4 || got["keyId"] != made.Key.ID.String() {
			t.Errorf("got %s", w.Body)
		}
		for _, name := range []string{"revokedAt", "effectiveEverywhereAt"} {
			if at, err := time.Parse(time.RFC3339, fmt.Sprint(got[name])); err != nil || at.Location() != time.UTC || time.Since(at) > time.Minute {
				t.Errorf("%s: %v", name, got[name])
			}
		}
		if first == "" {
			first = fmt.Sprint(got["revokedAt"])
		}
		if got["revokedAt"] != first {
			t.Errorf("revoked at %v, then at %v", first, got["revokedAt"])
		}
	}
	if k := read[admin.KeyRecord](t, d.send(d.owner, "GET", target, ""), 200); k.Status != "revoked" {
		t.Errorf("got %s", k.Status)
	}
}

func TestNotYetEverywhereIs202(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		made := d.key(t, "a")
		if err := d.store.Register(t.Context(), "behind", 1, time.Hour); err != nil {
			t.Fatal(err)
		}
		for _, route := range []struct{ method, target, body string }{
			{"PATCH", "/instances/a/apiKeys/" + made.Key.ID.String(), `{"disabled":true}`},
			{"PATCH", "/instances/a/apiKeys/" + made.Key.ID.String(), `{"disabled":false}`},
			{"POST", "/instances/a/apiKeys/" + made.Key.ID.String() + "/rotate", `{"gracePeriod":"0s"}`},
			{"POST", "/instances/a/apiKeys/" + made.Key.ID.String() + "/generations/1/revoke", ""},
			{"POST", "/instances/a/apiKeys:revoke", `{"all":true}`},
			{"POST", "/instances/a/apiKeys:revoke", `{"all":true}`}, // what is done may still be on its way
			{"DELETE", "/instances/a/apiKeys/" + made.Key.ID.String(), ""},
			{"POST", "/instances/a/disable", ""},
			{"POST", "/instances/a/enable", ""},
			{"PUT", "/instances/a", `{"policy":{"disabled":true}}`},
			{"DELETE", "/instances/a", ""},
		} {
			begin := time.Now()
			got := read[Effect](t, d.send(d.owner, route.method, route.target, route.body), 202)
			if got.Replicas != (Replicas{0, 1}) || !got.EffectiveEverywhereAt.After(time.Now()) {
				t.Errorf("%s %s: got %+v", route.method, route.target, got)
			}
			if waited := time.Since(begin); waited < 5*time.Second || waited > 6*time.Second {
				t.Errorf("%s %s: waited %v", route.method, route.target, waited)
			}
		}
		begin := time.Now()
		read[any](t, d.send(d.owner, "PUT", "/instances/a", `{"policy":{}}`), 201)
		read[any](t, d.send(d.owner, "POST", "/instances/a/apiKeys", `{"name":"n"}`), 201)
		if waited := time.Since(begin); waited < 2*time.Second || waited > 3*time.Second {
			t.Errorf("two creations waited %v", waited)
		}
	})
}

func TestInstances(t *testing.T) {
	d := open(t)
	const policy = `{"disabled":true,"defaults":{"agent":{"rate":{"requests":1,"per":"10s"}}},"total":{"rate":{"requests":-1}},"allowedScopes":["a:*"]}`
	w := d.send(d.owner, "PUT", "/instances/a", `{"policy":`+policy+`}`)
	read[any](t, w, 201)
	if got := w.Header().Get("Location"); got != "/instances/a" {
		t.Errorf("Location %q", got)
	}
	got := read[map[string]json.RawMessage](t, d.send(d.owner, "GET", "/instances/a", ""), 200)
	if len(got) != 3 {
		t.Errorf("got %v", got)
	}
	// What is read can be written again.
	again := read[map[string]json.RawMessage](t, d.send(d.owner, "PUT", "/instances/a", `{"policy":`+string(got["policy"])+`}`), 200)
	for _, name := range []string{"policy", "createdAt", "id"} {
		if string(again[name]) != string(got[name]) {
			t.Errorf("%s: %s became %s", name, got[name], again[name])
		}
	}
	var have, want any
	_, _ = json.Unmarshal(got["policy"], &have), json.Unmarshal([]byte(policy), &want)
	if diff := cmp.Diff(want, have); diff != "" {
		t.Errorf("policy (-want +got)\n%s", diff)
	}
	d.key(t, "a")
	wantError(t, d.send(d.owner, "DELETE", "/instances/a", ""), 409, CodeInstanceInUse, "")
	wantError(t, d.send(d.owner, "DELETE", "/instances/a?revokeKeys=yes", ""), 400, CodeInvalidRequest, "revokeKeys")
	if got := read[DeletedInstance](t, d.send(d.owner, "DELETE", "/instances/a?revokeKeys=true", ""), 200); got.InstanceID != "a" {
		t.Errorf("got %+v", got)
	}
	wantError(t, d.send(d.owner, "GET", "/instances/a", ""), 404, CodeNotFound, "")
	wantError(t, d.send(d.owner, "PUT", "/instances/1a", `{"policy":{}}`), 400, CodeInvalidRequest, "instanceId")
	wantError(t, d.send(d.owner, "PUT", "/instances/a", `{}`), 400, CodeInvalidRequest, "policy")
	wantError(t, d.send(d.owner, "PUT", "/instances/a", `{"policy":null}`), 400, CodeInvalidRequest, "policy")
}

func TestTokens(t *testing.T) {
	d := open(t)
	w := d.send(d.owner, "POST", "/tokens", `{"name":"n","role":"auditor","expiresIn":"90d"}`)
	made := read[createdToken](t, w, 201)
	if got, want := w.Header().Get("Location"), "/tokens/"+made.Token.ID.String(); got != want {
		t.Errorf("Location %q, want %q", got, want)
	}
	if made.Token.Status != "active" || made.Token.ExpiresAt.Sub(made.Token.CreatedAt) != 90*24*time.Hour || !strings.HasPrefix(made.Token.CreatedBy, "token:") {
		t.Errorf("got %+v", made.Token)
	}
	token := apikey.NewSecret(made.Secret)
	read[any](t, d.send(token, "GET", "/instances", ""), 200)
	for range 2 {
		if got := read[RevokedToken](t, d.send(d.owner, "DELETE", "/tokens/"+made.Token.ID.String(), ""), 200); got.TokenID != made.Token.ID {
			t.Errorf("got %+v", got)
		}
	}
	wantError(t, d.send(token, "GET", "/instances", ""), 401, CodeUnauthorized, "")
	w = d.send(d.owner, "GET", "/tokens", "")
	if got := read[list[admin.TokenRecord]](t, w, 200); len(got.Value) != 2 || got.Value[0].Status != "revoked" || got.Value[1].Status != "active" {
		t.Errorf("got %+v", got)
	}
	noCanary(t, w.Body.String()+d.log.String(), token, d.owner)
}

func TestPeppers(t *testing.T) {
	before := open(t)
	unused := before.token(t, admin.TokenInput{Name: "unused", Role: admin.RoleAuditor})
	peppers := apikey.Peppers{Current: apikey.NewPepper(2, false), Previous: pepper}
	if err := admin.OpenPeppers(t.Context(), before.store, peppers, "test"); err != nil {
		t.Fatal(err)
	}
	d := on(t, before.store, peppers)
	read[any](t, d.send(before.owner, "GET", "/instances", ""), 200) // after which both peppers find it
	got := read[list[Pepper]](t, d.send(d.owner, "GET", "/peppers", ""), 200)
	if diff := cmp.Diff([]Pepper{{1, 1}, {2, 1}}, got.Value); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	wantError(t, d.send(d.owner, "DELETE", "/peppers/1", ""), 409, CodePepperInUse, "")
	wantError(t, d.send(d.owner, "DELETE", "/peppers/2", ""), 409, CodePepperInUse, "")
	for _, version := range []string{"3", "x", "-1", "4294967297"} {
		wantError(t, d.send(d.owner, "DELETE", "/peppers/"+version, ""), 404, CodeNotFound, "")
	}
	read[any](t, d.send(d.owner, "DELETE", "/tokens/"+unused.Token.ID.String(), ""), 200)
	read[any](t, d.send(d.owner, "DELETE", "/peppers/1", ""), 200)
	if got := read[list[Pepper]](t, d.send(before.owner, "GET", "/peppers", ""), 200); len(got.Value) != 1 || got.Value[0].Version != 2 {
		t.Errorf("left: %+v", got.Value)
	}
}

// A handler in the process itself trusts its maker, and still says who it was.
func TestCallerInsteadOfAToken(t *testing.T) {
	d := open(t)
	h := New(d.svc, Config{Caller: &admin.Caller{Name: "keyward --offline", Role: admin.RoleOperator}})
	for method, want := range map[string]int{"PUT": 201, "DELETE": 403} {
		r := httptest.NewRequest(method, "/instances/a", strings.NewReader(`{"policy":{}}`))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("%s: got %d %s, want %d", method, w.Code, w.Body, want)
		}
	}
	events, err := d.store.Events(t.Context(), 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	if last := events[len(events)-1]; last.Actor != "keyward --offline" || last.RequestID == "" {
		t.Errorf("got %+v", last)
	}
}

func TestAuditSaysWhoCalled(t *testing.T) {
	d := open(t)
	d.send(d.owner, "PUT", "/instances/a", `{"policy":{}}`, "X-Request-Id", "r-1")
	events, err := d.store.Events(t.Context(), 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	last := events[len(events)-1]
	if !strings.HasPrefix(last.Actor, "token:") || last.RemoteAddr != "192.0.2.1" || last.RequestID != "r-1" {
		t.Errorf("got %+v", last)
	}
}

func TestPages(t *testing.T) {
	d := open(t)
	const guid = "9d3ca1b4-0000-4000-8000-0123456789ab"
	d.instance(t, guid)
	d.instance(t, "b")
	d.key(t, "b")
	var want []apikey.ID
	for range 5 {
		want = append(want, d.key(t, guid).Key.ID)
	}
	slices.Reverse(want) // newest first
	for _, tt := range []struct {
		query string
		pages []int
	}{
		{"", []int{5}},
		{"?maxpagesize=2", []int{2, 2, 1}},
		{"?maxpagesize=5", []int{5}},
		{"?maxpagesize=4", []int{4, 1}},
		{"?maxpagesize=1000000000", []int{5}},
	} {
		var got []apikey.ID
		var pages []int
		target := "https://keys.example.org/instances/" + strings.ToUpper(guid) + "/apiKeys" + tt.query
		for target != "" {
			w := d.send(d.owner, "GET", target, "")
			page := read[list[admin.KeyRecord]](t, w, 200)
			pages = append(pages, len(page.Value))
			for _, k := range page.Value {
				got = append(got, k.ID)
			}
			if target = page.NextLink; target != "" && !strings.HasPrefix(target, "https://keys.example.org/instances/") {
				t.Fatalf("nextLink %q is not the request's own address", target)
			}
			if target == "" && strings.Contains(w.Body.String(), "nextLink") {
				t.Error("the last page has a nextLink")
			}
		}
		if !slices.Equal(got, want) || !slices.Equal(pages, tt.pages) {
			t.Errorf("%q: got %v in pages of %v, want %v in pages of %v", tt.query, got, pages, want, tt.pages)
		}
	}
	if w := d.send(d.owner, "GET", "/instances/nobody/apiKeys", ""); w.Code != 404 {
		t.Errorf("no such instance: %d", w.Code)
	}
	d.instance(t, "empty")
	if got := d.send(d.owner, "GET", "/instances/empty/apiKeys", "").Body.String(); got != "{\"value\":[]}\n" {
		t.Errorf("got %q", got)
	}
}

func TestCursorsCannotBeMade(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	d.key(t, "a")
	d.key(t, "a")
	page := read[list[admin.KeyRecord]](t, d.send(d.owner, "GET", "/instances/a/apiKeys?maxpagesize=1", ""), 200)
	_, cursor, _ := strings.Cut(page.NextLink, "cursor=")
	cursor, _, _ = strings.Cut(cursor, "&")
	good := "/instances/a/apiKeys?maxpagesize=1&cursor=" + cursor
	read[any](t, d.send(d.owner, "GET", good, ""), 200)
	bad := map[string]string{
		"empty":              "/instances/a/apiKeys?cursor=",
		"garbage":            "/instances/a/apiKeys?cursor=%00%ff",
		"another instance's": "/instances/b/apiKeys?cursor=" + cursor,
		"another server's":   "/instances/a/apiKeys?cursor=" + newCursors(nil).Seal(admin.KeyListInput{}.In("a"), admin.KeyPlace{}),
		"the portal's":       "/instances/a/apiKeys?cursor=" + d.svc.KeyPlaces(admin.PlacesOfPortal).Seal(admin.KeyListInput{}.In("a"), admin.KeyPlace{}),
		"another filter's":   "/instances/a/apiKeys?maxpagesize=1&namePrefix=n&cursor=" + cursor,
		"another order's":    "/instances/a/apiKeys?maxpagesize=1&orderby=createdAt&cursor=" + cursor,
		"long":               "/instances/a/apiKeys?cursor=" + strings.Repeat("A", 1<<16),
		"cut":                "/instances/a/apiKeys?cursor=" + cursor[:len(cursor)-2],
	}
	for i := range cursor {
		edited := []byte(cursor)
		edited[i] = "AB"[min(1, strings.Count(cursor[i:i+1], "A"))]
		bad[fmt.Sprint("edited at ", i)] = "/instances/a/apiKeys?cursor=" + string(edited)
	}
	for name, target := range bad {
		t.Run(name, func(t *testing.T) {
			wantError(t, d.send(d.owner, "GET", target, ""), 400, CodeInvalidRequest, "cursor")
		})
	}
}

func TestNoSuchPathOrMethod(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	k := d.key(t, "a").Key.ID.String()
	for _, target := range []string{
		"/", "/instances/", "/instances/a/", "//instances", "/instances/../tokens", "/instances/a/apikeys", "/Instances",
		"/docs/", "/openapi", "/openapi.yaml", "/openapi-3.0.json", "/schemas/KeyRecord.json",
		"/instances/%2e%2e/tokens", "/instances/b", "/instances/%00", "/instances/" + strings.Repeat("x", 1<<16),
		"/instances/a/apiKeys/x", "/instances/a/apiKeys/%00", "/instances/a/apiKeys/" + k + "/", "/instances/a%2fapiKeys",
		"/instances/a/apiKeys/00000000-0000-0000-0000-000000000000", "/instances/a/apiKeys/" + k[:35], "/instances/a/apiKeys/" + d.owner.Reveal(),
	} {
		t.Run(target[:min(len(target), 60)], func(t *testing.T) {
			w := d.send(d.owner, "GET", target, "")
			wantError(t, w, 404, CodeNotFound, "")
			if got, want := w.Body.String(), d.send(d.owner, "GET", "/nothing", "").Body.String(); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		})
	}
	if w := d.send(d.owner, "GET", "/instances/a/apiKeys/"+strings.ToUpper(k), ""); w.Code != 200 {
		t.Errorf("a UUID in upper case: %d", w.Code)
	}
	for target, allow := range map[string]string{
		"/instances":                "GET, HEAD",
		"/instances/a":              "DELETE, GET, HEAD, PUT",
		"/instances/a/apiKeys":      "GET, HEAD, POST",
		"/instances/a/apiKeys/" + k: "DELETE, GET, HEAD, PATCH",
		"/tokens":                   "GET, HEAD, POST",
		"/tokens/" + k:              "DELETE",
		"/openapi.json":             "GET, HEAD",
		"/docs":                     "GET, HEAD",
	} {
		w := d.send(d.owner, "OPTIONS", target, "")
		wantError(t, w, 405, CodeMethodNotAllowed, "")
		if got := w.Header().Get("Allow"); got != allow {
			t.Errorf("%s: Allow %q, want %q", target, got, allow)
		}
	}
}

func TestUnknownParametersAreRefused(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	for target, field := range map[string]string{
		"/instances/a/apiKeys?maxPageSize=1":                 "maxPageSize",
		"/instances/a/apiKeys?maxpagesize=0":                 "maxpagesize",
		"/instances/a/apiKeys?maxpagesize=-1":                "maxpagesize",
		"/instances/a/apiKeys?maxpagesize=1e3":               "maxpagesize",
		"/instances/a/apiKeys?maxpagesize=1&maxpagesize=2":   "maxpagesize",
		"/instances/a/apiKeys?" + d.owner.Reveal() + "=1":    "",
		"/instances/a/apiKeys?a;b":                           "",
		"/instances/a/apiKeys?maxpagesize=%zz":               "",
		"/instances?x=1":                                     "x",
		"/tokens?maxpagesize=1":                              "maxpagesize",
		"/instances/a?revokeKeys=true":                       "revokeKeys",
		"/instances/a/apiKeys?maxpagesize=99999999999999999": "maxpagesize",
	} {
		w := d.send(d.owner, "GET", target, "")
		wantError(t, w, 400, CodeInvalidRequest, field)
		noCanary(t, w.Body.String(), d.owner)
	}
	w := d.send(d.owner, "DELETE", "/instances/a/apiKeys/"+d.key(t, "a").Key.ID.String()+"?reason=a%0ab", "")
	wantError(t, w, 400, CodeInvalidRequest, "reason")
}

func TestBadBodies(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	canary := apikey.Format{}.New(apikey.KindInstance)
	long := `{"name":"n","description":"` + strings.Repeat("x", maxBody) + `"}`
	for _, tt := range []struct {
		name, body string
		status     int
		target     string
		headers    []string
	}{
		{"empty", " ", 400, "", nil},
		{"not JSON", "name=n", 400, "", nil},
		{"array", "[]", 400, "", nil},
		{"null", "null", 400, "", nil},
		{"trailing bytes", `{"name":"n"} x`, 400, "", nil},
		{"two documents", `{"name":"n"}{"name":"m"}`, 400, "", nil},
		{"member twice", `{"name":"n","name":"m"}`, 400, "name", nil},
		{"member twice, one escaped", `{"name":"n","n\u0061me":"m"}`, 400, "name", nil},
		{"member deep down twice", `{"name":"n","limits":{"burst":1,"burst":2}}`, 400, "limits.burst", nil},
		{"metadata twice", `{"name":"n","metadata":{"k":"1","k":"2"}}`, 400, "metadata", nil},
		{"wrong case", `{"Name":"n"}`, 400, "name", nil},
		{"wrong case, both", `{"name":"n","NAME":"m"}`, 400, "name", nil},
		{"wrong case deep down", `{"name":"n","limits":{"maxconcurrent":1}}`, 400, "limits.maxConcurrent", nil},
		{"folded by Unicode", `{"name":"n","de\u017fcription":"x"}`, 400, "description", nil},
		{"unknown", `{"name":"n","instanceId":"b"}`, 400, "instanceId", nil},
		{"unknown, server's own", `{"name":"n","hash":"x","id":"y"}`, 400, "hash", nil},
		{"unknown and secret", `{"name":"n","` + canary.Reveal() + `":1}`, 400, "", nil},
		{"Go name", `{"name":"n","AllowedIPs":[]}`, 400, "allowedIps", nil},
		{"depth 10000", `{"name":"n","scopes":` + strings.Repeat("[", 10000) + strings.Repeat("]", 10000) + `}`, 400, "", nil},
		{"depth 9000", `{"name":"n","scopes":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + `}`, 400, "scopes[0]", nil},
		{"1e400", `{"name":"n","limits":{"burst":1e400}}`, 400, "limits.burst", nil},
		{"-0", `{"name":"n","limits":{"burst":-0}}`, 400, "limits.burst", nil},
		{"1.0", `{"name":"n","limits":{"burst":1.0}}`, 400, "limits.burst", nil},
		{"1e1", `{"name":"n","limits":{"burst":1e1}}`, 400, "limits.burst", nil},
		{"2^63", `{"name":"n","limits":{"burst":9223372036854775808}}`, 400, "limits.burst", nil},
		{"number in a string", `{"name":"n","limits":{"burst":"1"}}`, 400, "limits.burst", nil},
		{"limit 0", `{"name":"n","limits":{"burst":0}}`, 400, "limits.burst", nil},
		{"rate 0", `{"name":"n","limits":{"rate":{"requests":0,"per":"1s"}}}`, 400, "limits.rate.requests", nil},
		{"concurrency 0", `{"name":"n","limits":{"maxConcurrent":0}}`, 400, "limits.maxConcurrent", nil},
		{"NaN", `{"name":"n","limits":{"burst":NaN}}`, 400, "", nil},
		{"name a number", `{"name":1}`, 400, "name", nil},
		{"name an object", `{"name":{}}`, 400, "name", nil},
		{"scopes null", `{"name":"n","scopes":null}`, 400, "scopes", nil},
		{"scope null", `{"name":"n","scopes":[null]}`, 400, "scopes[0]", nil},
		{"scopes a string", `{"name":"n","scopes":"a"}`, 400, "scopes", nil},
		{"metadata a number", `{"name":"n","metadata":{"k":1}}`, 400, "metadata", nil},
		{"metadata null", `{"name":"n","metadata":{"k":null}}`, 400, "metadata", nil},
		{"half a character", `{"name":"\ud800"}`, 400, "name", nil},
		{"not UTF-8", "{\"name\":\"\xff\"}", 400, "", nil},
		{"byte order mark", "\xef\xbb\xbf" + `{"name":"n"}`, 400, "", nil},
		{"UTF-16", "\xff\xfe{\x00}\x00", 400, "", nil},
		{"UTF-16 without mark", "{\x00}\x00", 400, "", nil},
		{"date past", `{"name":"n","expirationDate":"2020-01-01T00:00:00Z"}`, 400, "expirationDate", nil},
		{"date year 10000", `{"name":"n","expirationDate":"10000-01-01T00:00:00Z"}`, 400, "expirationDate", nil},
		{"date no zone", `{"name":"n","expirationDate":"2099-01-01T00:00:00"}`, 400, "expirationDate", nil},
		{"date 24:00", `{"name":"n","expirationDate":"2099-01-01T24:00:00Z"}`, 400, "expirationDate", nil},
		{"date epoch", `{"name":"n","expirationDate":1798761599}`, 400, "expirationDate", nil},
		{"expiration policy", `{"name":"n","expirationPolicy":"sometimes"}`, 400, "expirationPolicy", nil},
		{"secret as a value", `{"name":"n","type":"` + canary.Reveal() + `","environment":"` + canary.Reveal() + `!"}`, 400, "type", nil},
		{"secret as a name", `{"name":"` + canary.Reveal() + `"}`, 400, "name", nil},
		{"no content type", `{"name":"n"}`, 415, "", []string{"Content-Type", ""}},
		{"form", `{"name":"n"}`, 415, "", []string{"Content-Type", "application/x-www-form-urlencoded"}},
		{"text", `{"name":"n"}`, 415, "", []string{"Content-Type", "text/plain"}},
		{"merge patch", `{"name":"n"}`, 415, "", []string{"Content-Type", "application/merge-patch+json"}},
		{"Latin 1", `{"name":"n"}`, 415, "", []string{"Content-Type", "application/json; charset=iso-8859-1"}},
		{"bad content type", `{"name":"n"}`, 415, "", []string{"Content-Type", "application/json;;;="}},
		{"compressed", `{"name":"n"}`, 415, "", []string{"Content-Encoding", "gzip"}},
		{"1 MiB and 1", long[:maxBody+1], 413, "", nil},
		{"much more", strings.Repeat(" ", 3*maxBody), 413, "", nil},
		{"1 MiB", `{"name":"n","x":"` + strings.Repeat("x", maxBody-len(`{"name":"n","x":""}`)) + `"}`, 400, "x", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code := map[int]string{400: CodeInvalidRequest, 413: CodePayloadTooLarge, 415: CodeUnsupportedMediaType}[tt.status]
			w := d.send(d.owner, "POST", "/instances/a/apiKeys", tt.body, tt.headers...)
			wantError(t, w, tt.status, code, tt.target)
			if w.Body.Len() > 1024 {
				t.Errorf("an error of %d bytes", w.Body.Len())
			}
			noCanary(t, w.Body.String()+d.log.String(), canary)
		})
	}
	if page := read[list[admin.KeyRecord]](t, d.send(d.owner, "GET", "/instances/a/apiKeys", ""), 200); len(page.Value) != 0 {
		t.Errorf("%d keys were made", len(page.Value))
	}
	for _, kind := range []string{"application/json; charset=UTF-8", "Application/JSON"} {
		read[any](t, d.send(d.owner, "POST", "/instances/a/apiKeys", "\n{ \"name\" : \"n\" }\r\n", "Content-Type", kind), 201)
	}
}

func TestSeveralFaultsAreDetails(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	w := d.send(d.owner, "POST", "/instances/a/apiKeys", `{"name":"","type":"agent","inactivityDays":0}`)
	got := read[ErrorBody](t, w, 400).Error
	var targets []string
	for _, detail := range got.Details {
		targets = append(targets, detail.Target)
	}
	if want := []string{"name", "agentName", "inactivityDays"}; got.Target != "name" || !slices.Equal(targets, want) {
		t.Errorf("got %s, want details about %v", w.Body, want)
	}
}

func TestForbiddenScopeNamesTheField(t *testing.T) {
	d := open(t)
	read[any](t, d.send(d.owner, "PUT", "/instances/a", `{"policy":{"allowedScopes":["a"]}}`), 201)
	wantError(t, d.send(d.owner, "POST", "/instances/a/apiKeys", `{"name":"n","scopes":["b"]}`), 403, CodeForbidden, "scopes")
}

func TestRequestIDs(t *testing.T) {
	d := open(t)
	for sent, echoed := range map[string]bool{
		"abc-123":                           true,
		strings.Repeat("x", 128):            true,
		"":                                  false,
		strings.Repeat("x", 129):            false,
		"a b":                               false,
		"a\tb":                              false,
		"é":                                 false,
		d.owner.Reveal():                    false,
		"deploy:" + d.owner.Reveal() + ":1": false,
		"Bearer=" + apikey.Format{}.New(apikey.KindUser).Reveal() + ";": false,
		"deploy:" + d.owner.Reveal()[:20]:                               true, // too short for one
	} {
		for _, target := range []string{"/instances", "/nothing", "/openapi.json"} {
			got := d.send(d.owner, "GET", target, "", "X-Request-Id", sent).Header().Get("X-Request-Id")
			if (got == sent) != echoed || got == "" {
				t.Errorf("%q: got %q", sent, got)
			}
		}
	}
}

// A broken store panics, or fails in another way.
type broken struct {
	admin.Store
	fail func() error
}

func (b broken) Instances(context.Context) ([]*apikey.Instance, error) { return nil, b.fail() }

func TestPanicIsA500(t *testing.T) {
	good := open(t)
	for name, tt := range map[string]struct {
		fail func() error
		log  string
	}{
		"panic with a secret": {func() error { panic("clear " + good.owner.Reveal()) }, "panic=string"},
		"runtime error":       {func() error { return []error{}[len(good.owner.Reveal())] }, "index out of range"},
		"unknown error":       {func() error { return os.ErrInvalid }, "invalid argument"},
	} {
		t.Run(name, func(t *testing.T) {
			d := on(t, broken{good.store, tt.fail}, apikey.Peppers{Current: pepper})
			w := d.send(d.owner, "GET", "/instances", "", "X-Request-Id", "r-7")
			wantError(t, w, 500, CodeInternalError, "")
			if !strings.Contains(d.log.String(), tt.log) || !strings.Contains(d.log.String(), "request_id=r-7") {
				t.Errorf("the log does not help: %s", d.log)
			}
			noCanary(t, w.Body.String()+d.log.String(), good.owner, d.owner)
		})
	}
}

func TestStoreAwayIs503(t *testing.T) {
	d := open(t)
	away := on(t, broken{d.store, func() error { return apikey.ErrUndecided }}, apikey.Peppers{Current: pepper})
	w := away.send(away.owner, "GET", "/instances", "")
	wantError(t, w, 503, CodeServiceUnavailable, "")
	if got := w.Header().Get("Retry-After"); got != "1" {
		t.Errorf("Retry-After %q", got)
	}
	if err := d.store.Close(); err != nil {
		t.Fatal(err)
	}
	w = d.send(d.owner, "GET", "/instances", "") // not even the token can be judged: no 401
	wantError(t, w, 503, CodeServiceUnavailable, "")
	if got := w.Header().Get("WWW-Authenticate"); got != "" {
		t.Errorf("WWW-Authenticate %q", got)
	}
}

func TestWhatWasDoneBeforeAFailureIsTold(t *testing.T) {
	for cause, status := range map[error]int{fmt.Errorf("full: %w", apikey.ErrUndecided): 503, os.ErrInvalid: 500} {
		f := statusOf(fmt.Errorf("revoke: %w", &admin.PartialError{Revoked: 200, Count: 450, Propagation: admin.Propagation{Everywhere: true}, Err: cause}))
		if f.status != status || !strings.Contains(f.ErrorBody.Error.Message, "200 of 450 keys are revoked; repeat it") || f.cause == nil || (f.header.Get("Retry-After") == "1") != (status == 503) {
			t.Errorf("%v: got %d, %+v, %v", cause, f.status, f.ErrorBody, f.header)
		}
		if strings.Contains(f.ErrorBody.Error.Message, cause.Error()) {
			t.Errorf("what is inside is told: %s", f.ErrorBody.Error.Message)
		}
	}
}

func TestAnswersAreOurs(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	k := d.key(t, "a")
	token := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleAuditor, InstanceID: "a"})
	for _, route := range sweep {
		if strings.HasPrefix(route.target, "/instances/a?") || route.owner >= 400 {
			continue // the others need the instance; and this is about successes
		}
		for _, accept := range []string{"", "application/xml", "json", "text/html;q=1, */*;q=0"} {
			w := d.send(d.owner, route.method, ids(route.target, k, token), route.body, "Accept", accept)
			kind := "application/json"
			if strings.HasSuffix(route.target, ":export") {
				kind = ndjson
			}
			if w.Code/100 != 2 || w.Header().Get("Content-Type") != kind || w.Header().Get("X-Content-Type-Options") != "nosniff" {
				t.Errorf("%s %s, Accept %q: %d, %v", route.method, route.target, accept, w.Code, w.Header())
			}
			if w.Header().Get("Link") != "" || strings.Contains(w.Body.String(), "$schema") {
				t.Errorf("%s %s: huma's additions are on: %v %s", route.method, route.target, w.Header(), w.Body)
			}
		}
	}
}

func TestOpenAPIDocument(t *testing.T) {
	d := open(t)
	w := d.send(apikey.Secret{}, "GET", "/openapi.json", "")
	doc := read[struct {
		OpenAPI    string
		Paths      map[string]map[string]any
		Components struct{ Schemas map[string]any }
	}](t, w, 200)
	if !strings.HasPrefix(doc.OpenAPI, "3.1") {
		t.Errorf("version %q", doc.OpenAPI)
	}
	swept := map[string]bool{}
	for path, item := range doc.Paths {
		pattern := regexp.MustCompile(`^` + regexp.MustCompile(`\{[^/]+?\}`).ReplaceAllString(path, `[^/]+`) + `$`)
		for method := range item {
			found := false
			for _, route := range sweep {
				target, _, _ := strings.Cut(route.target, "?")
				if strings.EqualFold(route.method, method) && pattern.MatchString(target) {
					found = true
					swept[route.method+route.target] = true
				}
			}
			if !found {
				t.Errorf("%s %s is not in the sweep: say there what each role is answered", method, path)
			}
		}
	}
	for _, route := range sweep {
		if !swept[route.method+route.target] {
			t.Errorf("%s %s is in the sweep, but there is no such operation", route.method, route.target)
		}
	}
	for _, part := range strings.Split(w.Body.String(), `"#/components/schemas/`)[1:] {
		name, _, _ := strings.Cut(part, `"`)
		if doc.Components.Schemas[name] == nil {
			t.Errorf("no schema %s", name)
		}
	}
	golden := filepath.Join("testdata", "openapi.json")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, append(w.Body.Bytes(), '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.TrimSpace(string(want)), strings.TrimSpace(w.Body.String())); diff != "" {
		t.Errorf("the document changed; if that is meant, run with -update (-want +got)\n%s", diff)
	}
}

// Of two who read an instance, the second to write is told, and has changed nothing.
func TestPutInstanceIfMatch(t *testing.T) {
	d := open(t)
	const at = "/instances/a"
	wantError(t, d.send(d.owner, "PUT", at, `{"policy":{}}`, "If-Match", "*"), 412, CodePreconditionFailed, "")
	wantError(t, d.send(d.owner, "PUT", at, `{"policy":{}}`, "If-Match", `"1"`), 412, CodePreconditionFailed, "")
	wantError(t, d.send(d.owner, "GET", at, ""), 404, CodeNotFound, "")
	made := d.send(d.owner, "PUT", at, `{"policy":{}}`)
	seen := made.Header().Get("ETag")
	if got := d.send(d.owner, "GET", at, "").Header().Get("ETag"); made.Code != 201 || seen == "" || got != seen {
		t.Fatalf("got %d with ETag %q, then %q", made.Code, seen, got)
	}
	first := d.send(d.owner, "PUT", at, `{"policy":{"caps":{"user":3}}}`, "If-Match", seen)
	now := first.Header().Get("ETag")
	if first.Code != 200 || now == seen || now != d.send(d.owner, "GET", at, "").Header().Get("ETag") {
		t.Errorf("got %d with ETag %q after %q", first.Code, now, seen)
	}
	for _, old := range []string{seen, "W/" + now, `"0"`} {
		wantError(t, d.send(d.owner, "PUT", at, `{"policy":{"caps":{"user":4}}}`, "If-Match", old), 412, CodePreconditionFailed, "")
	}
	wantError(t, d.send(d.owner, "PUT", at, `{"policy":{}}`, "If-Match", "1"), 400, CodeInvalidRequest, "If-Match")
	if got := read[Instance](t, d.send(d.owner, "GET", at, ""), 200); got.Policy.Caps.User != 3 {
		t.Errorf("caps %+v: a refused change changed them", got.Policy.Caps)
	}
	// The kill switch needs no condition, and is a change.
	off := d.send(d.owner, "POST", at+"/disable", "")
	if off.Code != 200 || off.Header().Get("ETag") == now {
		t.Errorf("got %d with ETag %q after %q", off.Code, off.Header().Get("ETag"), now)
	}
	wantError(t, d.send(d.owner, "PUT", at, `{"policy":{}}`, "If-Match", now), 412, CodePreconditionFailed, "")
	if got := d.send(d.owner, "PUT", at, `{"policy":{}}`, "If-Match", "*"); got.Code != 200 {
		t.Errorf("got %d", got.Code)
	}
	c := NewClient(serve(t, d), d.owner, nil)
	in, err := c.VersionedInstance(t.Context(), "a")
	if err != nil || in.ETag == "" || in.ID != "a" {
		t.Fatalf("got %+v, %v", in, err)
	}
	if _, err := c.PutInstance(WithIfMatch(t.Context(), in.ETag), "a", admin.PolicyInput{}); err != nil {
		t.Error(err)
	}
	if _, err := c.PutInstance(WithIfMatch(t.Context(), in.ETag), "a", admin.PolicyInput{}); !isCode(err, CodePreconditionFailed) {
		t.Errorf("got %v", err)
	}
}

// What is to be made is not replaced, whoever was faster.
func TestPutInstanceIfNoneMatch(t *testing.T) {
	d := open(t)
	const at = "/instances/a"
	made := d.send(d.owner, "PUT", at, `{"policy":{"caps":{"user":3}}}`, "If-None-Match", "*")
	if made.Code != 201 || made.Header().Get("ETag") == "" {
		t.Fatalf("got %d: %s", made.Code, made.Body)
	}
	again := d.send(d.owner, "PUT", at, `{"policy":{}}`, "If-None-Match", "*")
	wantError(t, again, 412, CodePreconditionFailed, "")
	if !strings.Contains(again.Body.String(), "there already") {
		t.Errorf("it does not say why: %s", again.Body)
	}
	for _, bad := range [][]string{{"If-None-Match", made.Header().Get("ETag")}, {"If-None-Match", ""}, {"If-None-Match", "*", "If-Match", "*"}} {
		wantError(t, d.send(d.owner, "PUT", at, `{"policy":{}}`, bad...), 400, CodeInvalidRequest, "If-None-Match")
	}
	wantError(t, d.send(d.owner, "PUT", at+"/quotas/q", `{}`, "If-None-Match", "*"), 400, CodeInvalidRequest, "If-None-Match")
	c := NewClient(serve(t, d), d.owner, nil)
	if _, err := c.PutInstance(WithIfAbsent(t.Context()), "a", admin.PolicyInput{}); !isCode(err, CodePreconditionFailed) {
		t.Errorf("the client: %v", err)
	}
	if got := read[Instance](t, d.send(d.owner, "GET", at, "", "If-None-Match", "*"), 200); got.Policy.Caps.User != 3 {
		t.Errorf("caps %+v: a refused change changed them", got.Policy.Caps)
	}
	if in, err := c.PutInstance(WithIfAbsent(t.Context()), "b", admin.PolicyInput{}); err != nil || in.ID != "b" {
		t.Errorf("the client: %+v, %v", in, err)
	}
}
