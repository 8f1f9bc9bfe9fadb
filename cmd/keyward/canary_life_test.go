package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"keyward/authz/apikey"
)

// What the canary does along the life of a key, beside making one: changes, rotations, imports, lists, the
// audit, holders, OIDC and the command line.

const canaryKeys = "/instances/demo/apiKeys"

func bearer(token string) []string { return []string{"Authorization", "Bearer " + token} }

// foreign is a foreign secret of the shape that the test's configuration registers.
func (l *leakSearch) foreign() string {
	s := "acme_" + apikey.Format{}.New(apikey.KindInstance).Reveal()[4:] + "0123456789"
	l.Add(s)
	return s
}

// imports brings in keys of all three sorts, and returns their secrets.
func (l *leakSearch) imports(token string) []string {
	l.t.Helper()
	ours, foreign, hashed := l.secret(apikey.Format{}.New(apikey.KindUser)), l.foreign(), l.foreign()
	sum := sha256.Sum256([]byte(hashed))
	l.Add(string(sum[:])) // whoever has it needs no pepper to try secrets out
	var rows bytes.Buffer
	for _, row := range []any{
		map[string]any{"name": "ours", "secret": ours, "userPrincipalName": "bob@example.com"},
		map[string]any{"name": "foreign", "secret": foreign},
		map[string]any{"name": "hashed", "sha256": hex.EncodeToString(sum[:])},
	} {
		line, err := json.Marshal(row)
		if err != nil {
			l.t.Fatal(err)
		}
		rows.Write(append(line, '\n'))
	}
	ndjson := append(bearer(token), "Content-Type", "application/x-ndjson")
	for _, query := range []string{"?dryRun=true", "", "", "?firstRow=7"} {
		if said := l.call(l.manage.Addr().String(), "POST", canaryKeys+":import"+query, rows.String(), ndjson...); !bytes.Contains(said, []byte(`"done":true`)) {
			l.t.Fatalf("nothing was imported: %s", said)
		}
	}
	return []string{ours, foreign, hashed}
}

// life takes a key of its own from change to end, and repeats what can be repeated. It returns the secrets.
func (l *leakSearch) life(token string) []string {
	l.t.Helper()
	at := l.manage.Addr().String()
	id, first := l.make(token, canaryKeys, `{"name":"life","expiresIn":"30d"}`, "key", "Idempotency-Key", "life")
	key := canaryKeys + "/" + id
	l.call(at, "PATCH", key, `{"name":"changed","metadata":{"a":"b"},"limits":{"burst":5}}`, append(bearer(token), "Content-Type", "application/merge-patch+json")...)
	_, second := l.make(token, key+"/rotate", `{}`, "key", "Idempotency-Key", "turn")
	if _, again := l.make(token, key+"/rotate", `{}`, "key", "Idempotency-Key", "turn"); again != second {
		l.t.Fatal("the repeated rotation made another secret")
	}
	l.call(at, "POST", key+"/rotate", `{"gracePeriod":"1h"}`, append(bearer(token), "Idempotency-Key", "turn")...) // another body
	l.call(at, "POST", key+"/rotate", `{}`, bearer(token)...)                                                      // a third valid one
	l.call(at, "POST", key+"/generations/1/revoke", "", bearer(token)...)
	_, third := l.make(token, key+"/rotate", `{"endOldest":true,"gracePeriod":"0s"}`, "key")
	l.call(at, "POST", key+"/generations/3/revoke", "", bearer(token)...) // the only one left
	for _, target := range []string{"", "/advice"} {
		l.call(at, "GET", key+target, "", bearer(token)...)
	}
	var bulk []string
	for range 3 {
		_, made := l.make(token, canaryKeys, `{"name":"bulk","environment":"bulk"}`, "key")
		bulk = append(bulk, made)
	}
	for _, body := range []string{`{"filter":{"environment":"bulk"},"dryRun":true}`, `{"filter":{"environment":"bulk"},"count":2}`, `{"filter":{"environment":"bulk"},"count":3,"reason":"unused"}`} {
		l.call(at, "POST", canaryKeys+":revoke", body, bearer(token)...)
	}
	l.call(at, "DELETE", key, "", bearer(token)...)
	l.call(at, "POST", canaryKeys, `{"name":"life","expiresIn":"30d"}`, append(bearer(token), "Idempotency-Key", "life")...) // what it made is gone
	l.call(at, "POST", "/instances/demo/disable", "", bearer(token)...)
	l.call(at, "POST", "/instances/demo/enable", "", bearer(token)...)
	return append(bulk, first, second, third)
}

// mistaken types a secret into everything that is not for it, of a key's later life.
func (l *leakSearch) mistaken(token, id, s string) {
	l.t.Helper()
	at, q := l.manage.Addr().String(), url.QueryEscape(s)
	text, _ := json.Marshal(s)
	send := func(method, target, format string, headers ...string) {
		body := format
		if strings.Contains(format, "%s") {
			body = fmt.Sprintf(format, text)
		}
		l.call(at, method, target, body, append(bearer(token), headers...)...)
	}
	key := canaryKeys + "/" + id
	for _, patch := range []string{
		`{"name":%s}`, `{"description":%s}`, `{"scopes":[%s]}`, `{"metadata":{"a":%s}}`, `{"metadata":{%s:"a"}}`, `{"metadata":{%s:null}}`, `{"allowedIps":[%s]}`,
		`{"limits":{"rate":{"requests":1,"per":%s}}}`, `{"limits":%s}`, `{"expirationDate":%s}`, `{"expiresIn":%s}`, `{"inactivityDays":%s}`, `{"expirationPolicy":%s}`,
		`{"type":%s}`, `{"agentName":%s}`, `{"userPrincipalName":%s}`, `{"environment":%s}`, `{"notBefore":%s}`, `{"disabled":%s}`, `{%s:1}`, `%s`,
	} {
		send("PATCH", key, patch, "Content-Type", "application/merge-patch+json")
	}
	send("PATCH", key, `{"name":"n"}`, "If-Match", `"`+s+`"`)
	send("PATCH", key, `{"name":"n"}`, "If-Match", s)
	for _, body := range []string{`{"gracePeriod":%s}`, `{"expirationDate":%s}`, `{"expiresIn":%s}`, `{"endOldest":%s}`, `{%s:1}`} {
		send("POST", key+"/rotate", body)
	}
	for _, body := range []string{
		`{"filter":{"type":%s}}`, `{"filter":{"status":%s}}`, `{"filter":{"userPrincipalName":%s}}`, `{"filter":{"agentName":%s}}`, `{"filter":{"environment":%s}}`,
		`{"filter":{"createdBy":%s}}`, `{"filter":{"namePrefix":%s}}`, `{"filter":{"unusedFor":%s}}`, `{"filter":{"expiresBefore":%s}}`, `{"filter":{"orderBy":%s}}`,
		`{"filter":{%s:1}}`, `{"filter":{"environment":"none"},"reason":%s}`, `{"filter":{"environment":"none"},"count":%s}`,
	} {
		send("POST", canaryKeys+":revoke", body)
	}
	const ours = `"secret":"kwi_importedSecret000000000000000000000000000002x97mr"` // nobody's
	for _, row := range []string{
		`{"name":%s,` + ours + `}`, `{"name":"n","description":%s,` + ours + `}`, `{"name":"n","scopes":[%s],` + ours + `}`, `{"name":"n","environment":%s,` + ours + `}`,
		`{"name":"n","metadata":{"a":%s},` + ours + `}`, `{"name":"n","metadata":{%s:"a"},` + ours + `}`, `{"name":"n","type":%s,` + ours + `}`,
		`{"name":"n","agentName":%s,"secret":"kwa_importedSecret000000000000000000000000000002x97mr"}`, `{"name":"n","type":"agent","agentName":%s,"sha256":"` + strings.Repeat("ab", 32) + `"}`,
		`{"name":"n","type":"user","userPrincipalName":%s,"sha256":"` + strings.Repeat("cd", 32) + `"}`, `{"name":"n","allowedIps":[%s],` + ours + `}`, `{"name":"n","id":%s,` + ours + `}`,
		`{"name":"n","createdAt":%s,` + ours + `}`, `{"name":"n","sha256":%s}`, `{"name":"n","notBefore":%s,` + ours + `}`, `{"name":"n",%s:1,` + ours + `}`, `%s`, `{%s`, `{"name":"n","secret":[%s]}`,
	} {
		send("POST", canaryKeys+":import", row, "Content-Type", "application/x-ndjson")
		send("POST", canaryKeys+":import?dryRun=true", row, "Content-Type", "application/x-ndjson")
	}
	for _, policy := range []string{
		`{"allowedScopes":[%s]}`, `{"caps":{"user":%s}}`, `{"creation":{"perHour":%s}}`, `{"expiration":{"default":%s}}`, `{"expiration":{"life":%s}}`, `{"onLeak":{"user":%s}}`, `{"onLeak":%s}`,
		`{"keepRevoked":%s}`, `{"defaults":{"user":{"rate":{"requests":1,"per":%s}}}}`, `{%s:1}`,
	} {
		send("PUT", "/instances/demo", `{"policy":`+policy+`}`)
	}
	for _, target := range []string{
		"POST " + key + "/generations/" + q + "/revoke", "POST " + canaryKeys + "/" + q + "/rotate", "GET " + canaryKeys + "/" + q + "/advice", "PATCH " + canaryKeys + "/" + q,
		"POST /instances/" + q + "/disable", "POST /instances/" + q + "/apiKeys:import", "GET /instances/" + q + "/apiKeys:export", "GET " + canaryKeys + ":limits?userPrincipalName=" + q,
		"GET " + canaryKeys + ":limits?agentName=" + q, "GET " + canaryKeys + ":export?" + q, "POST " + canaryKeys + ":import?firstRow=" + q, "POST " + canaryKeys + ":import?dryRun=" + q,
		"GET /instances/demo/auditEvents?action=" + q, "GET /instances/demo/auditEvents?cursor=" + q, "GET /instances/" + q + "/auditEvents", "GET /audit/chain?after=" + q,
		"GET " + key + "/usage?from=" + q, "GET " + key + "/usage?interval=" + q, "GET " + canaryKeys + "/" + q + "/usage", "GET /instances/" + q + "/usage", "GET /instances/demo/usage?to=" + q,
		"GET /instances/demo/usage/top?by=" + q, "GET /instances/demo/usage/top?limit=" + q, "GET /usage?" + q, "GET /usage?from=" + q,
		"GET " + canaryKeys + "?type=" + q, "GET " + canaryKeys + "?status=" + q, "GET " + canaryKeys + "?userPrincipalName=" + q, "GET " + canaryKeys + "?agentName=" + q,
		"GET " + canaryKeys + "?environment=" + q, "GET " + canaryKeys + "?createdBy=" + q, "GET " + canaryKeys + "?namePrefix=" + q, "GET " + canaryKeys + "?unusedFor=" + q,
		"GET " + canaryKeys + "?expiresBefore=" + q, "GET " + canaryKeys + "?idleBefore=" + q, "GET " + canaryKeys + "?neverUsed=" + q, "GET " + canaryKeys + "?orderby=" + q,
		"GET " + canaryKeys + "?api-version=" + q, "DELETE /tokens/" + q, "DELETE " + canaryKeys + "/" + q, "DELETE /instances/" + q,
	} {
		method, target, _ := strings.Cut(target, " ")
		body := ""
		if method == "PATCH" || method == "POST" {
			body = "{}"
		}
		send(method, target, body)
	}
	// A request id that is no secret, but has one in it, is written to the audit with what it asks for.
	send("POST", canaryKeys+":revoke", `{"filter":{"environment":"none"}}`, "X-Request-Id", "deploy-"+s)
	send("PATCH", key, `{"description":"`+strconv.Itoa(l.kept)+`"}`, "X-Request-Id", "deploy:"+s+":1")
	l.make(token, canaryKeys, `{"name":"n"}`, "key", "Idempotency-Key", s)
}

// ofHolders asks the holders' listener as holders and finders do, right and wrong.
func (l *leakSearch) ofHolders(s string) {
	l.t.Helper()
	at, q := l.holders.Addr().String(), url.QueryEscape(s)
	text, _ := json.Marshal(s)
	for _, headers := range [][]string{{"X-API-Key", s}, {"Authorization", "Bearer " + s}, {"Authorization", s}, {"X-API-Key", s, "X-Request-Id", s}, {"X-API-Key", s + "," + s}} {
		l.call(at, "GET", "/self", "", headers...)
	}
	for _, target := range []string{"/self?key=" + q, "/" + q, "/self/" + q, "/revoke?secret=" + q} {
		l.call(at, "GET", target, "")
		l.call(at, "POST", target, "{}")
	}
	for _, body := range []string{`%s`, `{"secret":%s`, `{"secret":[%s]}`, `{%s:1}`, `{"secret":"x","also":%s}`, `{"secret":%s}{}`, `{"secret":%s}`, `{"secret":%s}`} {
		l.call(at, "POST", "/revoke", fmt.Sprintf(body, text))
	}
	l.call(at, "POST", "/revoke", s, "Content-Type", "text/plain")
	l.call(at, "POST", "/revoke", fmt.Sprintf(`{"secret":%s}`, text), "Content-Encoding", s)
}

// An oidcOfTest signs tokens that the server believes.
type oidcOfTest struct {
	*httptest.Server
	key *ecdsa.PrivateKey
}

func newOIDC(t *testing.T) *oidcOfTest {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	o := &oidcOfTest{key: key}
	o.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var said any = jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "1", Algorithm: "ES256", Use: "sig"}}}
		if strings.HasPrefix(r.URL.Path, "/.well-known/") {
			said = map[string]string{"issuer": o.URL, "jwks_uri": o.URL + "/keys"}
		}
		_ = json.NewEncoder(w).Encode(said)
	}))
	t.Cleanup(o.Close)
	return o
}

func (o *oidcOfTest) config() string {
	return fmt.Sprintf(`
oidc:
- issuer: %s
  audience: keyward
  algorithms: [ES256]
  upnClaim: upn
  roles: [{claim: groups, value: users, role: user}, {claim: groups, value: readers, role: auditor, instanceClaim: tenant}]
`, o.URL)
}

// token signs claims over the usual ones.
func (o *oidcOfTest) token(l *leakSearch, claims map[string]any) string {
	l.t.Helper()
	all := map[string]any{"iss": o.URL, "aud": "keyward", "sub": "ann", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix()}
	for name, value := range claims {
		all[name] = value
	}
	text, err := json.Marshal(all)
	if err != nil {
		l.t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: o.key, KeyID: "1"}}, nil)
	if err != nil {
		l.t.Fatal(err)
	}
	signed, err := signer.Sign(text)
	if err != nil {
		l.t.Fatal(err)
	}
	jwt, err := signed.CompactSerialize()
	if err != nil {
		l.t.Fatal(err)
	}
	l.Add(jwt[strings.LastIndexByte(jwt, '.')+1:]) // without its signature it opens nothing
	return jwt
}

// ofOIDC comes with tokens of an issuer: one that works, and those that are refused for each cause, with a
// secret where a claim should be.
func (l *leakSearch) ofOIDC(o *oidcOfTest, s string) {
	l.t.Helper()
	at := l.manage.Addr().String()
	user := []string{"users"}
	works := o.token(l, map[string]any{"groups": user, "upn": "ann@example.com"})
	if said := l.call(at, "GET", canaryKeys, "", bearer(works)...); !bytes.Contains(said, []byte(`"value"`)) {
		l.t.Fatalf("the token of the issuer does not work: %s", said)
	}
	for _, claims := range []map[string]any{
		{"groups": user, "upn": s}, {"groups": user}, {"groups": []string{s}}, {"groups": user, "aud": s}, {"groups": user, "iss": s},
		{"groups": user, "exp": 1}, {"groups": user, "nbf": s}, {"groups": user, "nonce": s}, {"groups": []string{"readers"}, "tenant": s},
		{"groups": user, "upn": "ann@example.com", "sub": s}, {"sub": s},
	} {
		jwt := o.token(l, claims)
		for _, sent := range []string{jwt, jwt[:len(jwt)-4] + "AAAA", jwt + "." + s} {
			l.call(at, "GET", canaryKeys, "", bearer(sent)...)
			l.call(at, "POST", canaryKeys, `{"name":"n"}`, bearer(sent)...)
		}
		l.check(header("authorization", "Bearer "+jwt, "x-api-key", s))
	}
}

// commands are the command line's: each ends well or badly, and says nothing of what it was given.
func (l *leakSearch) commands(owner, s string) {
	l.t.Helper()
	dir := l.t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			l.t.Fatal(err)
		}
		return path
	}
	good := write("owner", owner)
	config, token, rows := write("keyward.yaml", l.config), write("token", s), write("rows", `{"name":"n","secret":"`+s+`"}`)
	wrong := write("wrong.yaml", "pepper: {file: "+s+"}\n"+s+": 1\n")
	online := func(args ...string) []string {
		return append(args, "--server", "http://"+l.manage.Addr().String(), "--token-file", good)
	}
	holders := []string{"--holders", "http://" + l.holders.Addr().String()}
	for _, c := range []struct {
		stdin string
		args  []string
	}{
		{"", []string{s}}, {"", []string{"keys", s}}, {"", []string{"keys", "--" + s}}, {"", []string{"self", s}}, {"", []string{"keys", "list", "demo", "-o", s}},
		{"", []string{"keys", "list", "demo", "--server", "http://" + s}}, {"", []string{"keys", "list", "demo", "--server", s}}, {"", []string{"keys", "list", "demo", "--token-file", s}},
		{"", []string{"instances", "list", "--context", s}}, {"", []string{"instances", "list", "--server", "http://" + l.manage.Addr().String(), "--token-file", token}},
		{"", online("keys", "create", "demo", "--name", s)}, {"", online("keys", "create", "demo", "--name", "n", "--scope", s)}, {"", online("keys", "create", "demo", "--name", "n", "--rate", s)},
		{"", online("keys", "create", "demo", "--name", "n", "--type", s)}, {"", online("keys", "create", "demo", "--name", "n", "--burst", s)}, {"", online("keys", "create", s, "--name", "n")},
		{"", online("keys", "create", "demo", "--name", "n", "--expires-in", s)}, {"", online("keys", "create", "demo", "--name", "n", "--metadata", s)},
		{"", online("keys", "get", "demo", s)}, {"", online("keys", "get", "demo", s, s)}, {"", online("keys", "revoke", "demo", s, "--yes")}, {"", online("keys", "rotate", "demo", s)},
		{"", online("keys", "update", "demo", s, "--name", "n")}, {"", online("keys", "disable", "demo", s, "--yes")}, {"", online("keys", "advice", "demo", s)}, {"", online("keys", "limits", s)},
		{"", online("keys", "import", "demo", rows, "--dry-run")}, {"", online("keys", "import", "demo", rows)}, {"", online("keys", "import", "demo", s)}, {s, online("keys", "import", "demo", "-")},
		{"", online("keys", "export", "demo")}, {"", online("keys", "export", s)}, {"", online("policy", "get", "demo")}, {"", online("policy", "set", "demo", "--file", s)},
		{"", online("policy", "set", "demo", "--file", token)}, {"", online("tokens", "create", "--role", s, "--name", "n")}, {"", online("tokens", "create", "--role", "auditor", "--name", s)},
		{"", online("tokens", "revoke", s, "--yes")}, {"", online("tokens", "list", "-o", "yaml")}, {"", online("audit", "list", "--actor", s)}, {"", online("inflight", "end", "demo", s, "--yes")},
		{"", []string{"keys", "list", "demo", "--offline", "--config", s}}, {"", []string{"keys", "list", "demo", "--offline", "--config", wrong}}, {"", []string{"keys", "list", "demo", "--offline", "--config", config}},
		{"", []string{"config", "validate", "--config", wrong}}, {"", []string{"config", "print", "--config", config, "--set", s}},
		{"", []string{"backup", filepath.Join(dir, "none", s), "--config", config}}, {"", []string{"restore", s, "--config", config, "--yes"}}, {"", []string{"pepper", "retire", s}},
		{"", []string{"context", "use", s}}, {"", []string{"envoy", "generate", s}}, {"", []string{"__complete", "keys", "get", "demo", s}},
		{s, append([]string{"self"}, holders...)}, {s, append([]string{"self", "-o", "json"}, holders...)}, {s + " " + s, append([]string{"self"}, holders...)}, {s, []string{"self", "--holders", s}},
		{s, online("explain", "demo", "/x")}, {s, online("explain", "demo", "/x", "-o", "json")}, {"", online("explain", "demo", s, "--no-key")}, {"", online("explain", s, "/", "--no-key")},
		{"", online("explain", "demo", "/", "--key", s)}, {"", online("explain", "demo", "/", "-H", "x-api-key: "+s, "--no-key")}, {"", online("explain", "demo", "/", "-H", s, "--no-key")},
		{s, online("explain", "demo", "/", "--extension", "instance="+s)}, {s, online("explain", "demo", "/", "--extension", "required_scopes="+s)}, {s, online("explain", "demo", "/", "--client", s, "--time", s)},
		{"", online("usage", s)}, {"", online("usage", "demo", s)}, {"", online("usage", "demo", "--from", s)}, {"", online("usage", "demo", "--interval", s)}, {"", online("usage", "demo", "--top", "1", "--by", s)}, {"", online("usage", "demo", "--top", s)}, {"", online("usage", "demo", "-o", s)},
		{"", online("explain", "demo", "--decision", s)}, {"", online("keys", "limits", "demo", s)}, {"", []string{"quotas", "replay", s, "--log", rows, "--file", wrong}}, {"", []string{"quotas", "replay", "demo", "--log", rows, "--file", s}},
		{s, append([]string{"revoke-leaked"}, holders...)}, {"", append([]string{"revoke-leaked", s}, holders...)},
	} {
		if strings.HasPrefix(s, "acme_") && (strings.Contains(strings.Join(c.args, " "), s) || slices.Contains(c.args, wrong)) {
			continue // what shapes a server registers no client knows
		}
		_, out, problems := tested(l.t, c.stdin, c.args...)
		name := strings.ReplaceAll(strings.Join(c.args[:min(2, len(c.args))], " "), s, "…")
		l.keep("command "+strings.ReplaceAll(name, "/", "_"), []byte(out+"\n"+problems))
	}
	for _, args := range [][]string{
		online("audit", "list", "-o", "jsonl"), online("audit", "verify"), online("audit", "export"), online("audit", "head"), online("keys", "list", "demo", "-o", "yaml"),
		{"backup", filepath.Join(l.dir, "backup of "+strconv.Itoa(l.kept)+".db"), "--config", config},
	} {
		code, out, problems := tested(l.t, "", args...)
		if code != exitOK {
			l.t.Errorf("%v: %s", args[:2], problems)
		}
		l.keep("command "+args[0], []byte(out+"\n"+problems))
	}
}
