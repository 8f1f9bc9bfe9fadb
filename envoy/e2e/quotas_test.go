package e2e_test

import (
	"bufio"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// platform are the routes of FoundationaLLM's Core API that the tests need.
const platform = `
routes:
- {method: POST, path: "/instances/{id}/completions", mode: optional, context: "CoreAPI:Completions", instance: "{id}", agent: "$.agent_name"}
- {method: GET, path: "/instances/{id}/completions/agents", context: "CoreAPI:Completions", instance: "{id}"}
- {method: POST, path: "/ignored", context: "CoreAPI:Completions", agent: "$.agent_name", agentMissing: ignore}
- {path: /public/, mode: public}
jwt: {issuer: "https://login.test", payload: claims}
identityHeaders: {userIdentity: x-user-identity}
envoy: {maxRequestBytes: 50000}
`

// quotas applies a quota-store.json as an operator does, with the command line.
func (s *server) quotas(t testing.TB, instance string, store ...map[string]any) {
	t.Helper()
	for i := range store {
		for name, value := range map[string]any{
			"description": "", "context": "CoreAPI:Completions", "type": "RawRequestRateLimit", "metric_partition": "UserPrincipalName",
			"metric_window_seconds": 60, "lockout_duration_seconds": 60, "distributed_enforcement": false,
		} {
			if _, ok := store[i][name]; !ok {
				store[i][name] = value
			}
		}
	}
	text, err := json.Marshal(store)
	if err != nil {
		t.Fatal(err)
	}
	file := s.path("quota-store-" + instance + ".json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	token := s.path("admin.token")
	s.run(t, "quotas", "apply", instance, "-f", file, "--server", "http://"+s.manage, "--token-file", token)
}

// complete asks for a completion.
func (c *caller) complete(instance, body string, lines ...string) answer {
	c.t.Helper()
	return c.doJSON("POST", "/instances/"+instance+"/completions", body, lines...)
}

// doJSON sends a request with a body of JSON.
func (c *caller) doJSON(method, target, body string, lines ...string) answer {
	c.t.Helper()
	lines = append(slices.Clone(lines), "Content-Type: application/json", "Content-Length: "+strconv.Itoa(len(body)))
	return c.send(requestText(method, target, lines...) + body)
}

const toSales = `{"user_prompt": "hello", "agent_name": "sales"}`

// platformToken is the header in which that platform's clients send an Agent Access Token.
func platformToken(secret string) string { return "X-AGENT-ACCESS-TOKEN: " + secret }

// exceeded is what that platform's clients read of a 429.
type exceeded struct {
	Name     string `json:"quota_name"`
	Context  string `json:"quota_context"`
	Exceeded bool   `json:"quota_exceeded"`
	Seconds  int    `json:"time_until_retry_seconds"`
}

func (a answer) exceeded(t testing.TB) (e exceeded) {
	t.Helper()
	a.want(t, http.StatusTooManyRequests)
	if err := json.Unmarshal([]byte(a.body), &e); err != nil {
		t.Fatalf("%v: %s", err, a.body)
	}
	if retry := a.header.Get("Retry-After"); retry != strconv.Itoa(e.Seconds) || !e.Exceeded || len(a.body) > 1<<10 {
		t.Errorf("got Retry-After %q beside %s", retry, a.body)
	}
	return e
}

// TestOracle1 is §7.1 of reference/foundationallm.md through Envoy, in real time.
func TestOracle1(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: platform})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	c := f.caller(t)
	for try := 0; ; try++ {
		home := s.instance(t, admin.PolicyInput{})
		s.quotas(t, home, map[string]any{"name": "CompletionsPerUser", "metric_limit": 120})
		agent := s.key(t, home, admin.KeyInput{Type: apikey.TypeAgent, AgentName: "sales"})
		began := time.Now()
		for range 40 {
			c.complete(home, toSales, platformToken(agent.secret)).want(t, http.StatusOK)
		}
		tripped := c.complete(home, toSales, platformToken(agent.secret))
		if time.Since(began) > 15*time.Second && try < 5 {
			continue // some of the 40 may have left the window
		}
		want := exceeded{"CompletionsPerUser", "CoreAPI:Completions", true, 60}
		if diff := cmp.Diff(want, tripped.exceeded(t)); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
		if got := tripped.header.Get("Ratelimit-Policy") + " " + tripped.header.Get("Ratelimit"); got != `"CompletionsPerUser";q=40;w=20 "CompletionsPerUser";r=0;t=60` {
			t.Errorf("got %s", got)
		}
		var body map[string]map[string]any
		_ = json.Unmarshal([]byte(tripped.body), &body)
		if body["error"]["code"] != "RateLimitExceeded" || body["error"]["limit"] != "quota" || body["error"]["retryAfter"] != 60.0 {
			t.Errorf("got %s", tripped.body)
		}
		// What comes meanwhile neither counts nor extends it. The lockout began between sent and came.
		time.Sleep(time.Until(tripped.sent.Add(50 * time.Second)))
		near := c.complete(home, toSales, platformToken(agent.secret))
		least, most := tripped.sent.Add(time.Minute).Sub(near.came), tripped.came.Add(time.Minute).Sub(near.sent)
		if e := near.exceeded(t); e.Seconds < int(math.Ceil(least.Seconds())) || e.Seconds > int(math.Ceil(most.Seconds())) {
			t.Errorf("near the end: %+v, want %v to %v, rounded up", e, least, most)
		}
		time.Sleep(time.Until(tripped.came.Add(60*time.Second + 10*time.Millisecond)))
		c.complete(home, toSales, platformToken(agent.secret)).want(t, http.StatusOK, "after the lockout")
		return
	}
}

// TestOracle3 is about who shares a count: the same key from two addresses, all of them with partition None.
func TestOracle3(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: platform})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	for partition, shared := range map[string]bool{"UserPrincipalName": false, "None": true} {
		home := s.instance(t, admin.PolicyInput{})
		s.quotas(t, home, map[string]any{"name": "q", "metric_limit": 12, "metric_partition": partition, "lockout_duration_seconds": 600})
		one := s.key(t, home, admin.KeyInput{Type: apikey.TypeAgent, AgentName: "sales"})
		two := s.key(t, home, admin.KeyInput{Type: apikey.TypeAgent, AgentName: "sales"})
		c := f.caller(t)
		for range 3 {
			c.complete(home, toSales, platformToken(one.secret)).want(t, http.StatusOK)
		}
		elsewhere := f.caller(t)
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
		conn, err := dialer.Dial("tcp", f.address)
		if err != nil {
			t.Skip("this machine has no second address of its own: " + err.Error())
		}
		elsewhere.use(conn)
		elsewhere.complete(home, toSales, platformToken(one.secret)).want(t, http.StatusOK)
		elsewhere.complete(home, toSales, platformToken(one.secret)).exceeded(t)
		c.complete(home, toSales, platformToken(one.secret)).exceeded(t)
		want := http.StatusOK
		if shared {
			want = http.StatusTooManyRequests
		}
		c.complete(home, toSales, platformToken(two.secret)).want(t, want, partition)
	}
}

// TestOracle6And8 is about what is refused and counts nothing, and about agents in bodies, on every version of
// Envoy.
func TestOracle6And8(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: platform})
	everyVersion(t, s, func(t *testing.T, f *front) {
		home, away := s.instance(t, admin.PolicyInput{}), s.instance(t, admin.PolicyInput{})
		s.quotas(t, home, map[string]any{"name": "all", "metric_partition": "None", "metric_limit": 9, "lockout_duration_seconds": 600},
			map[string]any{"name": "sales", "metric_partition": "None", "metric_limit": 6, "context": "CoreAPI:Completions:sales", "type": "AgentRequestRateLimit", "lockout_duration_seconds": 600})
		agent := s.key(t, home, admin.KeyInput{Type: apikey.TypeAgent, AgentName: "sales"})
		user := s.key(t, home, admin.KeyInput{Type: apikey.TypeUser, UserPrincipalName: "ada@example.com"})
		c := f.caller(t)
		long := `{"pad": "` + strings.Repeat("x", 60_000) + `", "agent_name": "sales"}`
		fits := `{"pad": "` + strings.Repeat("x", 49_900) + `", "agent_name": "billing"}`
		for what, tt := range map[string]struct {
			status int
			send   func() answer
		}{
			"another agent":     {403, func() answer { return c.complete(home, `{"agent_name": "billing"}`, platformToken(agent.secret)) }},
			"another, and long": {403, func() answer { return c.complete(home, fits, platformToken(agent.secret)) }},
			"another instance":  {403, func() answer { return c.complete(away, toSales, platformToken(agent.secret)) }},
			"a bad key":         {401, func() answer { return c.complete(home, toSales, platformToken(s.unknown(apikey.KindAgent))) }},
			"no agent":          {400, func() answer { return c.complete(home, `{"user_prompt": "hello"}`, platformToken(agent.secret)) }},
			"no body":           {400, func() answer { return c.complete(home, ``, platformToken(agent.secret)) }},
			"no JSON":           {400, func() answer { return c.complete(home, `agent_name=sales`, platformToken(agent.secret)) }},
			"named twice": {400, func() answer {
				return c.complete(home, `{"agent_name":"sales","agent_name":"billing"}`, platformToken(agent.secret))
			}},
			"in another case": {400, func() answer {
				return c.complete(home, `{"Agent_Name":"billing","agent_name":"sales"}`, platformToken(agent.secret))
			}},
			"not text":        {400, func() answer { return c.complete(home, `{"agent_name":["sales"]}`, platformToken(agent.secret)) }},
			"too long to see": {400, func() answer { return c.complete(home, long, platformToken(agent.secret)) }},
			"too long, it lies": {400, func() answer {
				return c.complete(home, long, platformToken(agent.secret), "X-Envoy-Auth-Partial-Body: false")
			}},
			"too long, no key":  {401, func() answer { return c.complete(home, long, platformToken(s.unknown(apikey.KindAgent))) }},
			"too long, ignored": {400, func() answer { return c.doJSON("POST", "/ignored", long, platformToken(agent.secret)) }},
			"ignored, another":  {403, func() answer { return c.doJSON("POST", "/ignored", `{"agent_name":"x"}`, platformToken(agent.secret)) }},
			"in chunks, another": {403, func() answer {
				const body = `{"agent_name": "billing"}`
				return c.send(requestText("POST", "/instances/"+home+"/completions", platformToken(agent.secret), "Transfer-Encoding: chunked") +
					fmt.Sprintf("5\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n", body[:5], len(body)-5, body[5:]))
			}},
			"a trailing slash": {403, func() answer {
				return c.doJSON("POST", "/instances/"+home+"/completions/", `{"agent_name": "billing"}`, platformToken(agent.secret))
			}},
		} {
			a := tt.send()
			if a.status != tt.status {
				t.Errorf("%s: got %d %s, want %d", what, a.status, a.body, tt.status)
			}
			if a.seen != nil {
				t.Errorf("%s: came through", what)
			}
		}
		if t.Failed() {
			return
		}
		// None of it has counted: 2 of 6 for sales, 3 of 9 in all, in 20 s; each of three ways to send one.
		began := time.Now()
		c.complete(home, `{"pad": "`+strings.Repeat("x", 40_000)+`", "agent_name": "sales"}`, platformToken(agent.secret)).want(t, http.StatusOK, "the first")
		a := c.send(requestText("POST", "/instances/"+home+"/completions", platformToken(agent.secret), "Transfer-Encoding: chunked")+
			fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(toSales), toSales)).want(t, http.StatusOK, "the second")
		got := c.complete(home, toSales, platformToken(agent.secret)).exceeded(t)
		if got.Name != "sales" || got.Context != "CoreAPI:Completions:sales" {
			t.Errorf("the third of sales: %+v", got)
		}
		c.complete(home, `{"agent_name": "billing"}`, withKey(user.secret)).want(t, http.StatusOK, "the third of all")
		if got = c.complete(home, `{"agent_name": "billing"}`, withKey(user.secret)).exceeded(t); got.Name != "all" && time.Since(began) < 15*time.Second {
			t.Errorf("the fourth of all: %+v", got)
		}
		// What an upstream of that platform is told, whatever the client says.
		var identity map[string]any
		if values := a.seen.values("x-user-identity"); len(values) != 1 || json.Unmarshal([]byte(values[0]), &identity) != nil {
			t.Fatalf("got x-user-identity %q", values)
		}
		id := agent.ID.String()
		want := map[string]any{
			"name": id, "user_name": id, "user_id": id, "upn": "aat_sales_" + id + "@foundationallm.internal_",
			"associated_with_access_token": true, "group_ids": []any{},
		}
		if diff := cmp.Diff(want, identity); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		for _, name := range []string{"X-User-Identity", "x-user.identity", "x~user-identity"} {
			a = c.get("/public/a", name+`: {"upn":"root"}`).want(t, http.StatusOK, name)
			if a.seen.has("root") {
				t.Errorf("%s of a client came through: %v", name, a.seen.Lines)
			}
		}
	})
}

// use makes the caller send by this connection.
func (c *caller) use(conn net.Conn) {
	c.hangUp()
	c.conn, c.in = conn, bufio.NewReader(conn)
}

// TestTwoUsersAndAToken is one quota-store.json with a global, a per-UPN and a per-key definition, two users
// with two keys each, and a caller with a token: exactly so many pass.
func TestTwoUsersAndAToken(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: platform})
	idp := newIssuer(t, "https://login.test")
	f := s.front(t, frontConfig{edit: idp.guard})
	f.awaitHealthy(t)
	c := f.caller(t)
	for try := 0; ; try++ {
		home := s.instance(t, admin.PolicyInput{})
		s.quotas(t, home,
			map[string]any{"name": "everybody", "metric_partition": "None", "metric_limit": 36, "lockout_duration_seconds": 600},
			map[string]any{"name": "per-user", "metric_partition": "UserPrincipalName", "metric_limit": 24, "lockout_duration_seconds": 600},
			map[string]any{"name": "per-key", "metric_partition": "ApiKey", "metric_limit": 15, "lockout_duration_seconds": 600})
		user := func(upn string) key {
			return s.key(t, home, admin.KeyInput{Type: apikey.TypeUser, UserPrincipalName: upn})
		}
		ada1, ada2, bob1, bob2 := user("ada@example.com"), user("Ada@Example.com"), user("bob@example.com"), user("bob@example.com")
		token := idp.token(t, map[string]any{"preferred_username": "ADA@example.com", "oid": "0b1", "sub": "s"})
		began := time.Now()
		send := func(n int, line string) (got []string) {
			for range n {
				a := c.complete(home, toSales, line)
				if a.status == http.StatusOK {
					got = append(got, "ok")
					continue
				}
				got = append(got, a.exceeded(t).Name)
			}
			return got
		}
		got := map[string][]string{}
		got["1 ada's first"] = send(7, withKey(ada1.secret))
		got["2 ada's second"] = send(5, withKey(ada2.secret))
		got["3 ada's token"] = send(2, "Authorization: Bearer "+token)
		got["4 bob's first"] = send(6, withKey(bob1.secret))
		got["5 bob's second"] = send(2, withKey(bob2.secret))
		got["6 a stranger's token"] = send(1, "Authorization: Bearer "+idp.token(t, map[string]any{"sub": "stranger"}))
		if time.Since(began) > 15*time.Second && try < 5 {
			continue
		}
		const ok = "ok"
		want := map[string][]string{
			"1 ada's first":        {ok, ok, ok, ok, ok, "per-key", "per-key"},
			"2 ada's second":       {ok, ok, ok, "per-user", "per-user"},
			"3 ada's token":        {"per-user", "per-user"},
			"4 bob's first":        {ok, ok, ok, ok, "everybody", "everybody"},
			"5 bob's second":       {"everybody", "everybody"},
			"6 a stranger's token": {"everybody"},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		break
	}

	t.Run("ATokenIsAPrincipal", func(t *testing.T) {
		home := s.instance(t, admin.PolicyInput{})
		s.quotas(t, home, map[string]any{"name": "per-user", "metric_limit": 9, "lockout_duration_seconds": 600})
		line := "Authorization: Bearer " + idp.token(t, map[string]any{"preferred_username": "Carl@example.com", "oid": "0b2"})
		a := c.complete(home, toSales, line, "X-Keyward-User: root", "X-Keyward-Key-Id: 1", `X-User-Identity: {"upn":"root"}`).want(t, http.StatusOK)
		for name, want := range map[string][]string{
			"x-keyward-user": {"Carl@example.com"}, "x-keyward-key-id": nil, "x-keyward-key-type": nil, "x-keyward-scopes": nil, "x-keyward-instance-id": nil,
			"x-user-identity": {`{"name":"carl@example.com","user_name":"carl@example.com","user_id":"0b2","upn":"carl@example.com","associated_with_access_token":false,"group_ids":[]}`},
			"authorization":   {strings.TrimPrefix(line, "Authorization: ")},
		} {
			if diff := cmp.Diff(want, a.seen.values(name)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
		}
		c.complete(home, toSales, line).want(t, http.StatusOK)
		c.complete(home, toSales, line).want(t, http.StatusOK)
		if e := c.complete(home, toSales, line).exceeded(t); e.Name != "per-user" {
			t.Errorf("got %+v", e)
		}
		// Nobody is counted nowhere, and a token of somebody else's is nobody's.
		for range 20 {
			c.complete(home, toSales).want(t, http.StatusOK, "anonymous")
		}
		c.complete("no-such", toSales, line).want(t, http.StatusForbidden, "another instance")
		c.complete(home, toSales, "Authorization: Bearer "+newIssuer(t, "https://login.test").token(t, nil)).want(t, http.StatusUnauthorized, "a forged token")
	})
}

// TestLongQuotasSurvive: a restart forgets nothing, and kill -9 nothing that is 10 s old.
func TestLongQuotasSurvive(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: platform})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	home := s.instance(t, admin.PolicyInput{})
	for name, q := range map[string]admin.QuotaInput{
		"hour":  {Partition: apikey.PartitionUPN, Limit: 9, Window: "24h"},
		"month": {Partition: apikey.PartitionNone, Limit: 1000, Period: apikey.PeriodMonth},
	} {
		q.Context = "CoreAPI:Completions"
		if _, err := s.client.PutQuota(t.Context(), home, name, q); err != nil {
			t.Fatal(err)
		}
	}
	k := s.key(t, home, admin.KeyInput{Type: apikey.TypeAgent, AgentName: "sales"})
	c := f.caller(t)
	pass := func(n int, what string) {
		t.Helper()
		for range n {
			c.complete(home, toSales, platformToken(k.secret)).want(t, http.StatusOK, what)
		}
	}
	pass(2, "before the first restart")
	s.process.signal(t, syscall.SIGTERM)
	if err := s.process.wait(t); err != nil {
		t.Fatal(err)
	}
	s.restart(t)
	f.awaitHealthy(t)
	pass(3, "before the crash")
	time.Sleep(10 * time.Second)
	s.process.kill(t)
	s.restart(t)
	f.awaitHealthy(t)
	pass(4, "after the crash")
	if e := c.complete(home, toSales, platformToken(k.secret)).exceeded(t); e.Name != "hour" || e.Seconds < 23*3600 {
		t.Errorf("the tenth: %+v", e)
	}
}

// An issuer signs tokens.
type issuer struct {
	name string
	key  *rsa.PrivateKey
}

func newIssuer(t testing.TB, name string) *issuer {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{name, k}
}

var textOf = base64.RawURLEncoding.EncodeToString

// token signs claims, with those that every token has.
func (i *issuer) token(t testing.TB, claims map[string]any) string {
	t.Helper()
	all := map[string]any{"iss": i.name, "exp": time.Now().Add(time.Hour).Unix()}
	for name, value := range claims {
		all[name] = value
	}
	payload, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	signed := textOf([]byte(`{"alg":"RS256","kid":"1"}`)) + "." + textOf(payload)
	sum := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, i.key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + textOf(signature)
}

// guard adds Envoy's jwt_authn filter, for tokens of the issuer, before ext_authz.
func (i *issuer) guard(tree map[string]any) {
	manager := at(tree, "static_resources", "listeners", 0, "filter_chains", 0, "filters", 0, "typed_config").(map[string]any)
	jwks := fmt.Sprintf(`{"keys":[{"kty":"RSA","alg":"RS256","use":"sig","kid":"1","n":%q,"e":%q}]}`,
		textOf(i.key.N.Bytes()), textOf(big.NewInt(int64(i.key.E)).Bytes()))
	filter := map[string]any{"name": "envoy.filters.http.jwt_authn", "typed_config": map[string]any{
		"@type": "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
		"providers": map[string]any{"idp": map[string]any{
			"issuer": i.name, "local_jwks": map[string]any{"inline_string": jwks}, "payload_in_metadata": "claims", "forward": true,
		}},
		"rules": []any{map[string]any{"match": map[string]any{"prefix": "/"}, "requires": map[string]any{"requires_any": map[string]any{
			"requirements": []any{map[string]any{"provider_name": "idp"}, map[string]any{"allow_missing": map[string]any{}}},
		}}}},
	}}
	manager["http_filters"] = slices.Insert(manager["http_filters"].([]any), 1, any(filter))
}
