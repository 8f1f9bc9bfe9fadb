package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/apikey/canarytest"
	"keyward/authz/manage"
	"keyward/authz/store/sqlite"
)

// A leakSearch sends secrets along every path and keeps what comes back, to look for them in it.
type leakSearch struct {
	*wired
	canarytest.Canary
	t    *testing.T
	dir  string // of what came back, beside the store's own folder
	kept int
	// statuses counts the answers over HTTP.
	statuses map[int]int
	web      http.Client
}

// keep writes what came back to a file.
func (l *leakSearch) keep(name string, text []byte) {
	l.t.Helper()
	l.kept++
	if err := os.WriteFile(filepath.Join(l.dir, fmt.Sprintf("%03d %s", l.kept, name)), text, 0o600); err != nil {
		l.t.Fatal(err)
	}
}

// secret remembers one.
func (l *leakSearch) secret(s apikey.Secret) string {
	l.Add(s.Reveal())
	return s.Reveal()
}

// call sends a request to one of the listeners and keeps the whole answer. Headers come in pairs.
func (l *leakSearch) call(base, method, target, body string, headers ...string) []byte {
	l.t.Helper()
	r, err := http.NewRequestWithContext(l.t.Context(), method, "http://"+base+target, strings.NewReader(body))
	if err != nil {
		l.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	if body != "" && r.Header.Get("Content-Type") == "" {
		r.Header.Set("Content-Type", "application/json")
	}
	answer, err := l.web.Do(r)
	if err != nil {
		l.t.Fatal(strings.Split(err.Error(), `"`)[0]) // without the address, which may hold a secret
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		l.t.Fatal(err)
	}
	var whole bytes.Buffer
	_ = answer.Header.Write(&whole)
	l.statuses[answer.StatusCode]++
	l.keep(fmt.Sprintf("answer %d", answer.StatusCode), append(whole.Bytes(), text...))
	return text
}

// make creates something with a secret over HTTP and returns both; only this answer may show the secret.
func (l *leakSearch) make(token, target, body, what string, headers ...string) (id, secret string) {
	l.t.Helper()
	r, err := http.NewRequestWithContext(l.t.Context(), http.MethodPost, "http://"+l.manage.Addr().String()+target, strings.NewReader(body))
	if err != nil {
		l.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	answer, err := l.web.Do(r)
	if err != nil {
		l.t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	var made map[string]json.RawMessage
	if err := errors.Join(err, json.Unmarshal(text, &made)); err != nil || answer.StatusCode/100 != 2 {
		l.t.Fatalf("%s: %d, %v", target, answer.StatusCode, err)
	}
	var thing struct{ ID string }
	if err := errors.Join(json.Unmarshal(made[what], &thing), json.Unmarshal(made["secret"], &secret)); err != nil {
		l.t.Fatal(err)
	}
	l.Add(secret)
	delete(made, "secret")
	rest, err := json.Marshal(made)
	if err != nil {
		l.t.Fatal(err)
	}
	l.keep("made", rest)
	return thing.ID, secret
}

// check asks as Envoy does with a secret in one place, and keeps the answer.
func (l *leakSearch) check(changes ...change) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), patience)
	defer cancel()
	answer, err := authv3.NewAuthorizationClient(l.conn).Check(ctx, l.fresh(anAsk(changes...)))
	l.keep("check", fmt.Appendf(nil, "%v %v", answer, err))
}

// A panicking store fails as no store should: with what it was asked in its words.
type panicking struct {
	admin.Store
	words string
}

func (p panicking) Instances(context.Context) ([]*apikey.Instance, error) { panic(p.words) }
func (p panicking) Instance(context.Context, string) (*apikey.Instance, error) {
	panic(errors.New(p.words))
}

// TestNoSecretIsWrittenDown is the canary: keys of all types, management tokens and the pepper go along
// every path that there is, right and wrong, and then nothing that the program wrote or said has any of
// them, but for the answers that create them.
func TestNoSecretIsWrittenDown(t *testing.T) {
	t.Parallel()
	issuer := newOIDC(t)
	l := &leakSearch{t: t, dir: t.TempDir(), statuses: map[int]int{}, wired: wireUp(t, issuer.config()+`
credentials: {query: key, foreign: [{prefix: acme_}]}
routes:
- {path: /, scopes: [orders:read]}
- {path: "/a/{agent}", agent: "{agent}"}
- {path: "/i/{id}", instance: "{id}"}
- {path: /open, mode: public}
- {path: /maybe, mode: optional}
`)}
	defer l.web.CloseIdleConnections()
	store := l.cfg.Store.SQLite.Path
	text := readText(t, l.cfg.Pepper.File)
	key, err := base64.StdEncoding.DecodeString(regexp.MustCompile(`(?m)^key: (.*)$`).FindStringSubmatch(text)[1])
	if err != nil {
		t.Fatal(err)
	}
	l.Add(string(key))
	admins := strings.TrimSpace(readText(t, l.adminTokenPath()))
	l.Add(admins)

	manageAt, metricsAt := l.manage.Addr().String(), l.metrics.Addr().String()
	as := func(token string) []string { return []string{"Authorization", "Bearer " + token} }
	l.call(manageAt, "PUT", "/instances/demo", `{"policy":{"creation":{"perHour":-1},"caps":{"user":1}}}`, as(admins)...)
	_, token := l.make(admins, "/tokens", `{"name":"ann","role":"owner"}`, "token")
	goneID, gone := l.make(token, "/tokens", `{"name":"gone","role":"operator","instanceId":"demo"}`, "token")
	_, user := l.make(token, "/tokens", `{"name":"u","role":"user","userPrincipalName":"ann@example.com"}`, "token")
	l.call(manageAt, "DELETE", "/tokens/"+goneID, "", as(token)...)

	const keys = "/instances/demo/apiKeys"
	_, good := l.make(token, keys, `{"name":"good","scopes":["orders:read"]}`, "key")
	_, agent := l.make(token, keys, `{"name":"agent","type":"agent","agentName":"sales","limits":{"burst":1}}`, "key")
	_, users := l.make(user, keys, `{"name":"own"}`, "key")
	_, again := l.make(token, keys, `{"name":"again"}`, "key", "Idempotency-Key", "once")
	if _, same := l.make(token, keys, `{"name":"again"}`, "key", "Idempotency-Key", "once"); same != again {
		t.Fatal("the repeated request made another key")
	}
	revokedID, revoked := l.make(token, keys, `{"name":"revoked","metadata":{"team":"core"}}`, "key")
	l.call(manageAt, "DELETE", keys+"/"+revokedID+"?reason=keyCompromise", "", as(token)...)
	unknown, unknownToken := l.secret(apikey.Format{}.New(apikey.KindUser)), l.secret(apikey.Format{}.New(apikey.KindManagement))
	mistyped := flipped(l.secret(apikey.Format{}.New(apikey.KindInstance)), 30)
	l.Add(mistyped)
	secrets := append(l.imports(token), l.life(token)...)
	secrets = append(secrets, admins, token, gone, user, good, agent, users, again, revoked, unknown, unknownToken, mistyped, string(key))

	// To Envoy's side: each in every place where a secret can stand, and where it should not.
	for _, s := range secrets[:len(secrets)-1] {
		q := url.QueryEscape(s)
		for _, where := range [][]change{
			{header("x-api-key", s)}, {header("x-agent-access-token", s)}, {header("authorization", "Bearer "+s)},
			{header("authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte("u:"+s)))},
			{header("authorization", "Bearer "+s+", Bearer "+s)}, {raw("x-api-key", s, "x-api-key", s)}, {raw("X-API-Key", s)},
			{header("x-api-key", " "+s+" ")}, {header("x-api-key", s+","+s)}, {header("x-api-key", s, "authorization", "Bearer "+good)},
			{header("x-api-key", strings.ToUpper(s))}, {header("x-api-key", s[:40])}, {header("x-api-key", s+"x")},
			{path("/?key=" + q)}, {path("/?key=" + q + "&key=" + q)}, {path("/?%6Bey=" + q)}, {path("/" + s)}, {path("/a/" + s), header("x-api-key", good)},
			{path("/i/" + s), header("x-api-key", s)}, {path("//" + s)}, {path("/open?key=" + q), header("x-api-key", s)}, {path("/maybe"), header("cookie", s)},
			{method(s), header("x-api-key", s)}, {header("x-forwarded-for", s, "x-request-id", s, "x-keyward-key-id", s)},
			{header("x-api-key", s, "content-type", "application/grpc")},
			{path("/%6" + string("0123456789ABCDEF"[s[0]&15]) + s[1:])},
		} {
			l.check(where...)
		}
	}
	for range 30 { // beyond its limits
		l.check(header("x-api-key", agent))
	}
	for _, s := range secrets {
		_, _ = l.send(t.Context(), []byte(s)) // no message at all
	}

	// To the Management API's side: as tokens, and typed into what they are not for.
	for _, s := range secrets[:len(secrets)-1] {
		q := url.QueryEscape(s)
		for _, caller := range []string{token, user, s} {
			for _, target := range []string{
				"/instances", "/tokens", "/peppers", "/instances/demo", keys, keys + "/" + revokedID, "/auditEvents", "/instances/demo/inFlight",
				"/" + q, "/instances/" + q, "/instances/" + q + "/apiKeys", keys + "/" + q, keys + "?cursor=" + q, keys + "?maxpagesize=" + q, keys + "?" + q + "=1",
				"/auditEvents?actor=" + q + "&target=" + q, "/auditEvents?from=" + q, "/audit/verify?link=" + q, "/openapi.json?" + q, "/docs?" + q,
			} {
				if target == "/"+q || caller != s || !strings.Contains(target, q) {
					l.call(manageAt, "GET", target, "", append(as(caller), "X-Request-Id", s, "Accept", s)...)
				}
			}
		}
		typed, _ := json.Marshal(s)
		for _, body := range []string{
			`{"name":%s}`, `{"name":"n","description":%s}`, `{"name":"n","type":%s}`, `{"name":"n","type":"agent","agentName":%s}`,
			`{"name":"n","type":"user","userPrincipalName":%s}`, `{"name":"n","scopes":[%s]}`, `{"name":"n","environment":%s}`,
			`{"name":"n","allowedIps":[%s]}`, `{"name":"n","expirationDate":%s}`, `{"name":"n","expiresIn":%s}`, `{"name":"n","notBefore":%s}`,
			`{"name":"n","metadata":{"a":%s}}`, `{"name":"n","metadata":{%s:"a"}}`, `{"name":"n",%s:1}`, `{"name":"n","limits":{"rate":{"requests":1,"per":%s}}}`,
			`{"name":"n","limits":{"burst":%s}}`, `{"name":"n","role":"auditor","instanceId":%s}`, `{"name":"n","role":"user","userPrincipalName":%s}`, `%s`, `{%s`, `{"name":"n"}%s`,
		} {
			l.call(manageAt, "POST", keys, fmt.Sprintf(body, typed), append(as(token), "Content-Type", "application/json")...)
			l.call(manageAt, "POST", "/tokens", fmt.Sprintf(body, typed), append(as(token), "Content-Type", "application/json")...)
		}
		const quota = `{"name":"n","context":"a:b","partition":"None","limit":1,"window":"1h"`
		for _, body := range []string{
			quota + `,"description":%s}`, quota + `,"context":%s}`, quota + `,"name":%s}`, quota + `,"partition":%s}`, quota + `,"lockout":%s}`,
			quota + `,"limit":%s}`, quota + `,%s:1}`, quota + `,"shadow":%s}`, quota + `,"period":%s}`,
			`{"name":"n","context":"a:b:"%s}`, `{"name":"n","context":"a:b","partition":"None","limit":1,"window":%s}`,
			`{"name":%s,"context":"a:b","partition":"None","limit":1,"window":"1h"}`, `{"name":"n","context":%s,"partition":"None","limit":1,"window":"1h"}`,
			`{"name":"n","description":%s,"context":"a:b","partition":"None","limit":1,"window":"1h"}`,
		} {
			body = fmt.Sprintf(body, typed)
			l.call(manageAt, "PUT", "/instances/demo/quotas/n", body, append(as(token), "Content-Type", "application/json")...)
			l.call(manageAt, "POST", "/instances/demo/quotas:apply", `{"quotas":[`+body+`]}`, append(as(token), "Content-Type", "application/json")...)
		}
		for _, body := range []string{`{"name":"n","quotas":{%s:{"limit":1}}}`, `{"name":"n","quotas":{"n":{"limit":%s}}}`, `{"name":"n","quotas":{"n":{%s:1}}}`} {
			l.call(manageAt, "POST", keys, fmt.Sprintf(body, typed), append(as(token), "Content-Type", "application/json")...)
		}
		l.call(manageAt, "PUT", "/instances/demo/quotas/"+q, quota+`}`, append(as(token), "Content-Type", "application/json")...)
		l.call(manageAt, "GET", "/instances/demo/quotas/"+q, "", as(token)...)
		l.call(manageAt, "DELETE", "/instances/demo/quotas/"+q, "", as(token)...)
		for _, body := range []string{
			`{"secret":%s}`, `{"keyId":%s}`, `{"secret":%[1]s,"headers":[{"name":"x-api-key","value":%[1]s}]}`, `{"headers":[{"name":"x-api-key","value":%s}]}`,
			`{"headers":[{"name":"authorization","value":%s}]}`, `{"headers":[{"name":%s,"value":"x"}]}`, `{"secret":%[1]s,"method":%[1]s}`, `{"host":%s}`,
			`{"secret":%[1]s,"path":%[1]s}`, `{"secret":%[1]s,"contextExtensions":{"instance":%[1]s}}`, `{"secret":%[1]s,"contextExtensions":{"agent":%[1]s}}`,
			`{"secret":%[1]s,"contextExtensions":{"required_scopes":%[1]s}}`, `{"contextExtensions":{%s:"x"}}`, `{"secret":%[1]s,"body":%[1]s}`,
			`{"secret":%[1]s,"clientAddress":%[1]s}`, `{"secret":%[1]s,"time":%[1]s}`, `{"secret":[%s]}`, `{%s:"x"}`,
		} {
			l.call(manageAt, "POST", keys+":verify", fmt.Sprintf(body, typed), as(token)...)
		}
		l.call(manageAt, "GET", "/instances/demo/decisions/"+q, "", as(token)...)
		l.call(manageAt, "GET", keys+"/"+q+"/limits", "", as(token)...)
		l.call(manageAt, "PUT", "/instances/"+q, `{"policy":{}}`, as(token)...)
		l.call(manageAt, "PUT", "/instances/demo", fmt.Sprintf(`{"policy":{"total":{"rate":{"requests":1,"per":%s}}}}`, typed), as(token)...)
		l.call(manageAt, "PUT", "/instances/demo", fmt.Sprintf(`{"policy":{"allowedScopes":[%s]}}`, typed), as(token)...)
		l.call(manageAt, "DELETE", keys+"/"+revokedID+"?reason="+q, "", as(token)...)
		l.call(manageAt, "DELETE", "/instances/demo/inFlight/"+q, "", as(token)...)
		l.call(manageAt, "DELETE", "/peppers/"+q, "", as(token)...)
		l.call(manageAt, "DELETE", "/sessions?actor="+q, "", as(token)...)
		l.call(manageAt, "DELETE", "/sessions?actor=oidc:"+q, "", as(token)...)
		l.call(manageAt, "POST", keys, `{"name":"n"}`, append(as(token), "Content-Type", s)...)
		l.call(manageAt, "POST", keys, `{"name":"n","expiresIn":"x"}`, append(as(token), "Idempotency-Key", s+s+s+s+s+s)...)
		l.call(manageAt, "GET", "/instances", "", "Authorization", s)
		l.call(manageAt, "GET", "/instances", "", "X-API-Key", s)
		for _, target := range []string{"/" + q, "/metrics?" + q, "/healthz?" + q} {
			l.call(metricsAt, "GET", target, "", as(s)...)
		}
	}
	changedID, _ := l.make(token, keys, `{"name":"to change"}`, "key")
	for _, s := range secrets[:len(secrets)-1] {
		l.mistaken(token, changedID, s)
		l.ofOIDC(issuer, s)
		l.commands(token, s)
	}
	l.call(manageAt, "POST", keys, `{"name":"over the cap"}`, as(user)...)
	l.call(manageAt, "POST", keys, `{"name":"another"}`, append(as(token), "Idempotency-Key", "once")...)

	// A program that fails in its own code, with a secret in what it fails with.
	for _, s := range secrets {
		broken := admin.New(panicking{l.store, s}, admin.Config{Peppers: apikey.Peppers{Current: l.pepper}}, nil, l.service.log)
		api := manage.New(broken, manage.Config{Log: l.service.log, Caller: &owner})
		for _, target := range []string{"/instances", "/instances/demo"} {
			answer := httptest.NewRecorder()
			api.ServeHTTP(answer, httptest.NewRequest("GET", target, nil))
			if answer.Code != http.StatusInternalServerError {
				t.Fatalf("a panic was answered with %d", answer.Code)
			}
			l.keep("panic", answer.Body.Bytes())
		}
	}
	// What holds secrets, printed by mistake.
	// The service is one that nobody runs: fmt reads all it is made of, without its locks.
	idle := admin.New(l.store, admin.Config{Peppers: apikey.Peppers{Current: l.pepper}}, nil, l.service.log)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		l.keep("printed", fmt.Appendf(nil, verb, []any{apikey.NewSecret(good), l.pepper, l.cfg, idle}))
	}
	l.service.log.Warn("by mistake", slog.Any("secret", apikey.NewSecret(good)), slog.Any("pepper", l.pepper))

	// Last, because it ends keys; and what becomes of the reports is written down too.
	for _, s := range secrets[:len(secrets)-1] {
		l.ofHolders(s)
	}
	// What was done along the way, so that nothing of it is looked for in vain.
	for _, action := range []string{
		"key.create", "key.update", "key.rotate", "key.revokeGeneration", "key.revoke", "key.import", "key.export", "key.leak", "instance.put", "token.create", "token.revoke",
	} {
		if err := eventually(func() error {
			if events := l.call(manageAt, "GET", "/auditEvents?outcome=done&action="+action, "", as(token)...); !bytes.Contains(events, []byte(`"action":"`+action)) {
				return fmt.Errorf("%s was never done: %s", action, events)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	for _, status := range []int{200, 201, 202, 400, 401, 403, 404, 405, 409, 412, 415, 422, 429} {
		if l.statuses[status] == 0 {
			t.Errorf("nothing was answered with %d", status)
		}
	}

	// What can be read afterwards.
	for _, target := range []string{"/metrics", "/readyz", "/debug/pprof/goroutine?debug=2", "/debug/pprof/cmdline", "/debug/pprof/heap"} {
		l.call(metricsAt, "GET", target, "", "Accept-Encoding", "gzip")
	}
	for _, target := range []string{"/audit/chain?maxpagesize=1000", "/auditEvents?maxpagesize=1000", "/audit/head", "/audit/verify", "/tokens", keys + "?maxpagesize=1000", "/peppers", "/openapi.json", "/docs"} {
		l.call(manageAt, "GET", target, "", as(token)...)
	}
	backup := filepath.Join(l.dir, "backup.db")
	if err := sqlite.Backup(t.Context(), store, backup); err != nil {
		t.Fatal(err)
	}
	l.keep("log", []byte(l.log.String()))
	if info, err := os.Stat(store + "-wal"); err != nil || info.Size() == 0 {
		t.Errorf("there is no WAL to look into: %v", err)
	}
	for _, dir := range []string{l.dir, filepath.Dir(store)} {
		hits, err := l.Search(dir, filepath.Base(l.cfg.Pepper.File), adminTokenFile)
		if err != nil {
			t.Fatal(err)
		}
		for _, hit := range hits {
			t.Errorf("a secret was written down: %s", hit)
		}
	}
	said := l.log.String()
	for _, part := range []string{`"msg":"decision"`, "panic in a management request", "by mistake"} {
		if !strings.Contains(said, part) {
			t.Errorf("the log lacks %s: what was to be looked into is not there", part)
		}
	}
	if l.kept < 6000 || l.Len() < 40 {
		t.Errorf("too little to prove anything: %d answers, %d secrets", l.kept, l.Len())
	}
	t.Logf("%d secrets, %d answers, log of %d KiB", l.Len(), l.kept, len(said)>>10)
}
