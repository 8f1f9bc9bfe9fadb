package e2e_test

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/envoy/envoytest"
)

// routes are the rules of most tests.
const routes = `routes:
- {path: /public/, mode: public}
- {path: /optional/, mode: optional}
- {method: GET, path: /orders, scopes: "orders:read"}
- {method: POST, path: /orders, scopes: ["orders:write"]}
- {path: /admin/, scopes: admin}
- {path: "/agents/{agent}/chat", agent: "{agent}"}
- {path: /chat, agent: [required, "?agent"]}
- {path: "/instances/{instance}/", instance: "{instance}"}
- {path: "/environments/{environment}/", environment: "{environment}"}
- {path: /grpc.health.v1.Health/Watch, scopes: watch}
`

// Names are those of the identity headers in use.
type names struct{ keyID, keyType, instanceID, agent, user, scopes, decisionID string }

var defaultNames = names{
	"x-keyward-key-id", "x-keyward-key-type", "x-keyward-instance-id", "x-keyward-agent",
	"x-keyward-user", "x-keyward-scopes", "x-keyward-decision-id",
}

func (n names) all() []string {
	return []string{n.keyID, n.keyType, n.instanceID, n.agent, n.user, n.scopes, n.decisionID}
}

var decisionID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// plain is how a careless upstream could read a header's name: as CGI does, and without regard to what
// stands between words.
func plain(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(name))
}

// identity returns what an upstream could take for identity: every line whose name could be read as one
// of the names, with a decision's id, which nobody can foresee, as "…".
func (n names) identity(s *seen) []line {
	var found []line
	for _, l := range slices.Concat(s.Lines, s.Trailers) {
		if slices.Contains(slices.Concat(n.all(), defaultNames.all()), plain(l.Name)) {
			if l.Name == n.decisionID && decisionID.MatchString(l.Value) {
				l.Value = "…"
			}
			found = append(found, l)
		}
	}
	slices.SortFunc(found, func(a, b line) int { return strings.Compare(a.Name, b.Name) })
	return found
}

// of is the identity that a key has to arrive with.
func (n names) of(k key, scopes string) []line {
	want := []line{
		{n.keyID, k.ID.String()}, {n.keyType, string(k.Type)}, {n.instanceID, k.InstanceID},
		{n.agent, k.AgentName}, {n.user, k.UserPrincipalName}, {n.scopes, scopes}, {n.decisionID, "…"},
	}
	want = slices.DeleteFunc(want, func(l line) bool { return l.Value == "" || l.Name == "off" })
	slices.SortFunc(want, func(a, b line) int { return strings.Compare(a.Name, b.Name) })
	return want
}

func TestIdentityArrivesAndCredentialsDoNot(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	home := s.instance(t, admin.PolicyInput{})
	capped := s.instance(t, admin.PolicyInput{AllowedScopes: []string{"orders:read", "billing:*"}})
	whole := s.key(t, home, admin.KeyInput{})
	none := s.key(t, home, admin.KeyInput{Scopes: []string{}})
	agent := s.key(t, home, admin.KeyInput{Type: apikey.TypeAgent, AgentName: "sales", Scopes: []string{"orders:write", "orders:read"}})
	user := s.key(t, capped, admin.KeyInput{Type: apikey.TypeUser, UserPrincipalName: "ada@example.com", Scopes: []string{"billing:*", "orders:read"}})
	most := s.key(t, capped, admin.KeyInput{})

	everyVersion(t, s, func(t *testing.T, f *front) {
		c := f.caller(t)
		for _, k := range []struct {
			name   string
			key    key
			scopes string
		}{
			{"an instance key with every right", whole, "*"},
			{"an instance key without rights", none, ""},
			{"an agent key", agent, "orders:read orders:write"},
			{"a user key", user, "billing:* orders:read"},
			{"a key with what the policy allows", most, "billing:* orders:read"},
		} {
			// Each way to send a secret, alone and with the application's own credentials beside it.
			for _, lines := range [][]string{
				{withKey(k.key.secret)},
				{"x-api-key:" + k.key.secret},
				{"X-Agent-Access-Token: " + k.key.secret},
				{"Authorization: Bearer " + k.key.secret},
				{"authorization: bEARER  " + k.key.secret},
				{withKey(k.key.secret), "Authorization: Bearer " + k.key.secret},
				{withKey(k.key.secret), "X-Agent-Access-Token: " + k.key.secret},
			} {
				a := c.get("/any/path?q=1&api_key=theirs", lines...).want(t, http.StatusOK, k.name)
				if diff := cmp.Diff(defaultNames.of(k.key, k.scopes), defaultNames.identity(a.seen)); diff != "" {
					t.Errorf("%s (-want +got):\n%s", k.name, diff)
				}
				if a.seen.has(k.key.secret[8:]) {
					t.Errorf("%s: the secret reached the upstream", k.name)
				}
				for _, name := range []string{"x-api-key", "x-agent-access-token", "authorization"} {
					if got := a.seen.values(name); got != nil {
						t.Errorf("%s: %s reached the upstream", k.name, name)
					}
				}
				if a.seen.Target != "/any/path?q=1&api_key=theirs" {
					t.Errorf("got target %s, want it as it was sent", a.seen.Target)
				}
			}
		}

		// What is the application's own stays as it is.
		const jwt = "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEifQ.c2ln"
		for _, own := range []string{jwt, "Basic a3dpOnNlY3JldA==", "Bearer kw_" + strings.Repeat("x", 20)} {
			a := c.get("/", withKey(whole.secret), "Authorization: "+own, "Cookie: session=1", "X-Tenant: t").want(t, http.StatusOK)
			want := map[string][]string{"authorization": {own}, "cookie": {"session=1"}, "x-tenant": {"t"}}
			for name, value := range want {
				if diff := cmp.Diff(value, a.seen.values(name)); diff != "" {
					t.Errorf("%s (-want +got):\n%s", name, diff)
				}
			}
		}
		// A key in the query is a query, unless that is switched on.
		c.get("/?api_key="+whole.secret).want(t, http.StatusUnauthorized)

		// Where nobody has to say who is calling, what was sent as a secret is removed all the same.
		for _, target := range []string{"/public/page", "/optional/page"} {
			a := c.get(target, withKey(whole.secret), "Authorization: Bearer "+whole.secret).want(t, http.StatusOK)
			if a.seen.has(whole.secret[8:]) {
				t.Errorf("%s: the secret reached the upstream", target)
			}
		}
		if a := c.get("/public/page", withKey(whole.secret)); len(defaultNames.identity(a.seen)) != 0 {
			t.Errorf("a public route: got identity %v", defaultNames.identity(a.seen))
		}
		a := c.get("/optional/page", withKey(agent.secret)).want(t, http.StatusOK)
		if diff := cmp.Diff(defaultNames.of(agent, "orders:read orders:write"), defaultNames.identity(a.seen)); diff != "" {
			t.Errorf("an optional route with a key (-want +got):\n%s", diff)
		}
		a = c.get("/optional/page").want(t, http.StatusOK)
		if got := defaultNames.identity(a.seen); len(got) != 0 {
			t.Errorf("an optional route without a key: got identity %v", got)
		}
		c.get("/optional/page", withKey(s.unknown(apikey.KindUser))).want(t, http.StatusUnauthorized, "an optional route with a bad key")
	})
}

func TestConfiguredNames(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: `
routes:
- {path: /public/, mode: public}
- {path: /, scopes: []}
defaultRoute: required
corsPreflight: allow
client: {address: xff, trustedHops: 1}
credentials: {headers: [x-acme-key, x-acme-token], query: api_key, prefix: acme, realm: acme}
identityHeaders: {keyId: x-acme-id, keyType: x-acme-type, instanceId: x-acme-tenant, agent: x-acme-agent, user: x-acme-user, scopes: "off", decisionId: x-acme-decision}
`})
	own := names{"x-acme-id", "x-acme-type", "x-acme-tenant", "x-acme-agent", "x-acme-user", "off", "x-acme-decision"}
	home := s.instance(t, admin.PolicyInput{})
	k := s.key(t, home, admin.KeyInput{Type: apikey.TypeUser, UserPrincipalName: "ada@example.com"})
	far := s.key(t, home, admin.KeyInput{AllowedIPs: []string{"203.0.113.0/24"}})
	if !strings.HasPrefix(k.secret, "acmeu_") {
		t.Errorf("got a secret that begins with %s, want acmeu_", k.secret[:6])
	}

	everyVersion(t, s, func(t *testing.T, f *front) {
		c := f.caller(t)
		for _, sent := range []struct{ target, header, arrives string }{
			{"/a?b=1&c=a+b&flag&d=%20x", "X-Acme-Key: " + k.secret, "/a?b=1&c=a+b&flag&d=%20x"},
			{"/a?b=1", "x-acme-token: " + k.secret, "/a?b=1"},
			{"/a?b=1", "Authorization: Bearer " + k.secret, "/a?b=1"},
			// Envoy writes a query anew when it takes something away: in the order of the names, each with "=".
			{"/a?b=1&api_key=" + k.secret + "&a=%20x&flag&c=a+b&empty=", "X-Other: 1", "/a?a=%20x&b=1&c=a+b&empty=&flag="},
			{"/a?api_key=" + k.secret, "X-Acme-Key: " + k.secret, "/a"},
			{"/public/a?api_key=" + k.secret + "&b=1", "X-Other: 1", "/public/a?b=1"},
		} {
			a := c.get(sent.target, sent.header).want(t, http.StatusOK, sent.arrives)
			want := own.of(k, "")
			if strings.HasPrefix(sent.target, "/public") {
				want = nil
			}
			if diff := cmp.Diff(want, own.identity(a.seen)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", sent.arrives, diff)
			}
			if a.seen.Target != sent.arrives {
				t.Errorf("got target %s, want %s", a.seen.Target, sent.arrives)
			}
			if a.seen.has(k.secret[8:]) {
				t.Errorf("%s: the secret reached the upstream", sent.arrives)
			}
		}
		// The default names are no credentials here; what is sent under the identity's names, old or new, does
		// not arrive.
		c.get("/a", withKey(k.secret)).want(t, http.StatusUnauthorized, "X-API-Key")
		a := c.get("/public/a", "X-API-Key: theirs", "X-Keyward-User: evil", "x.acme.user: evil", "X-Acme-Tenant: evil", "X-Keyward-Scopes: evil").want(t, http.StatusOK)
		if got := own.identity(a.seen); len(got) != 0 {
			t.Errorf("got identity %v", got)
		}
		if got := a.seen.values("x-api-key"); !slices.Equal(got, []string{"theirs"}) {
			t.Errorf("got X-API-Key %q, want the application's own", got)
		}
		// A parameter that Envoy cannot take away, and one that is there twice.
		c.get("/a?api%5Fkey="+k.secret).want(t, http.StatusBadRequest, "an escaped name")
		c.get("/public/a?api%5Fkey="+k.secret).want(t, http.StatusBadRequest, "an escaped name on a public route")
		c.get("/a?api_key="+k.secret+"&api_key="+k.secret).want(t, http.StatusUnauthorized, "twice")
		a = c.get("/a").want(t, http.StatusUnauthorized, "no key")
		if got := a.header.Get("WWW-Authenticate"); got != `Bearer realm="acme"` {
			t.Errorf("got WWW-Authenticate %s", got)
		}

		// One proxy in front is trusted: what it appended is the client's address.
		for forwarded, want := range map[string]int{
			"203.0.113.9":               http.StatusOK,
			"198.51.100.1, 203.0.113.9": http.StatusOK,
			"203.0.113.9, 198.51.100.1": http.StatusForbidden,
		} {
			c.get("/a", "X-Acme-Key: "+far.secret, "X-Forwarded-For: "+forwarded).want(t, want, forwarded)
		}
		c.get("/a", "X-Acme-Key: "+far.secret).want(t, http.StatusForbidden, "no proxy")

		// CORS preflights carry no key, and are let through here; nothing else that looks like one is.
		preflight := []string{"Origin: https://app.example", "Access-Control-Request-Method: PUT"}
		a = c.do("OPTIONS", "/a", append(preflight, "X-Acme-User: evil", "X-Acme-Key: "+k.secret)...).want(t, http.StatusOK, "preflight")
		if got := own.identity(a.seen); len(got) != 0 || a.seen.has(k.secret[8:]) {
			t.Errorf("a preflight: got identity %v, or the secret", got)
		}
		c.do("OPTIONS", "/a", preflight[0]).want(t, http.StatusUnauthorized, "OPTIONS without a method")
		c.do("OPTIONS", "/a", preflight[1]).want(t, http.StatusUnauthorized, "OPTIONS without an origin")
		c.do("PUT", "/a", append(preflight, "Content-Length: 0")...).want(t, http.StatusUnauthorized, "PUT")
	})
}

func TestPreflightNeedsAKeyUnlessAllowed(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes + "defaultRoute: deny\n"})
	f := s.front(t, frontConfig{})
	c := f.caller(t)
	c.do("OPTIONS", "/orders", "Origin: https://app.example", "Access-Control-Request-Method: GET").want(t, http.StatusForbidden, "a method without a rule")
	c.do("OPTIONS", "/admin/", "Origin: https://app.example", "Access-Control-Request-Method: GET").want(t, http.StatusUnauthorized, "preflight")
	a := c.get("/nowhere", withKey(s.key(t, s.instance(t, admin.PolicyInput{}), admin.KeyInput{}).secret)).want(t, http.StatusForbidden, "no rule")
	if p := a.problem(t); p["code"] != "Forbidden" || p["message"] != "No route allows this request." {
		t.Errorf("got %v", p)
	}
}

// spoofs are spellings of identity headers that clients try: each is the lines of one request.
func spoofs() [][]string {
	alternate := func(s string) string {
		b := []byte(s)
		for i := 0; i < len(b); i += 2 {
			b[i] = strings.ToUpper(string(b[i]))[0]
		}
		return string(b)
	}
	var all [][]string
	for i, name := range defaultNames.all() {
		// Each separator alone and mixed, in several cases. The longest name has the most of them.
		spellings := []string{name, strings.ToUpper(name), http.CanonicalHeaderKey(name), alternate(name)}
		for _, separator := range []string{"_", ".", "~", "!", "'", "*", "+", "^", "|", "`", "$", "&", "%", "#"} {
			first, rest, _ := strings.Cut(name, "-")
			for _, s := range []string{
				strings.ReplaceAll(name, "-", separator),
				first + separator + rest,
				strings.ReplaceAll(first+separator+rest, "-", "."),
			} {
				spellings = append(spellings, []string{s, strings.ToUpper(s), alternate(s)}[i%3])
			}
		}
		for j, s := range spellings {
			all = append(all, [][]string{
				{s + ": evil"},
				{s + ": evil1", s + ": evil2"},
				{s + ":"},
				{s + ": evil", name + ": evil", http.CanonicalHeaderKey(name) + ":"},
				{"Connection: " + s, s + ": evil"},
			}[(i+j)%5])
		}
		all = append(all,
			// Our own header must not be taken away by a client that calls it a matter of one hop.
			[]string{"Connection: " + name}, []string{"Connection: close, " + name, name + ": evil"},
			[]string{"Connection: keep-alive, " + strings.ToUpper(name)},
			[]string{"TE: trailers", "Connection: TE, " + name, name + ": evil"},
			[]string{name + ": evil\t,", name + ":\tevil"},
			[]string{name + ": evil", "X-Filler: " + strings.Repeat("x", 4000), name + ": evil"},
			[]string{name + ": \xff\xfeevil"},
			// What servers read in two ways.
			[]string{name + " : evil"}, []string{name + "\t: evil"}, []string{"X-Folded: a", " " + name + ": evil"},
			[]string{"X-Folded: a\r\n\t" + name + ": evil"}, []string{"X-Split: a\n" + name + ": evil"}, []string{"X-Split: a\r" + name + ": evil"},
			[]string{"\x00" + name + ": evil"}, []string{name + "\x00: evil"},
		)
	}
	return all
}

func TestSpoofedIdentityNeverArrives(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	k := s.key(t, s.instance(t, admin.PolicyInput{}), admin.KeyInput{Type: apikey.TypeUser, UserPrincipalName: "ada@example.com", Scopes: []string{"a:b"}})
	all := spoofs()
	if len(all) < 200 {
		t.Fatalf("%d spellings are too few to mean anything", len(all))
	}
	// With a key, ours arrives once and alone; without one there is none.
	ways := []struct {
		target, secret string
		want           []line
	}{
		{"/required", k.secret, defaultNames.of(k, "a:b")},
		{"/optional/a", k.secret, defaultNames.of(k, "a:b")},
		{"/optional/a", "", nil},
		{"/public/a", "", nil},
	}

	t.Run("HTTP1", func(t *testing.T) {
		everyVersion(t, s, func(t *testing.T, f *front) {
			c := f.caller(t)
			statuses := map[int]int{}
			for i, lines := range all {
				for j, way := range ways {
					mark := fmt.Sprintf("%d-%d", i, j)
					if way.secret != "" {
						lines = append([]string{withKey(way.secret)}, lines...)
					}
					a := c.get(way.target, append([]string{caseHeader + ": " + mark}, lines...)...)
					statuses[a.status]++
					judgeSpoof(t, f, mark, lines, a.status == http.StatusOK, way.want)
					if a.status != http.StatusOK && a.status != http.StatusBadRequest {
						t.Errorf("%q: got status %d, want 200 or 400", lines, a.status)
					}
					if way.secret != "" {
						lines = lines[1:]
					}
				}
			}
			if statuses[http.StatusOK] < 200*len(ways) {
				t.Errorf("got %v answers by status, too few to mean anything", statuses)
			}
			t.Logf("%d spellings in %d ways: %v", len(all), len(ways), statuses)
		})
	})

	t.Run("HTTP2", func(t *testing.T) {
		everyVersion(t, s, func(t *testing.T, f *front) {
			var arrived, refused atomic.Int32
			var sending errgroup.Group
			sending.SetLimit(16)
			for i, lines := range all {
				for j, way := range ways {
					mark := fmt.Sprintf("h2-%d-%d", i, j)
					fields := []field{{":method", "GET"}, {":scheme", "http"}, {":authority", "app.test"}, {":path", way.target}, {strings.ToLower(caseHeader), mark}}
					if way.secret != "" {
						fields = append(fields, field{"x-api-key", way.secret})
					}
					for _, l := range lines {
						name, value, _ := strings.Cut(l, ":")
						if i%10 != 0 { // otherwise as it is: HTTP/2 has no upper case
							name = strings.ToLower(name)
						}
						fields = append(fields, field{name, strings.TrimSpace(value)})
					}
					if !wellFormed(fields) && (i%5 != 0 || j != i%len(ways)) {
						continue
					}
					sending.Go(func() error {
						ok := f.http2(t, fields, nil)
						if ok {
							arrived.Add(1)
						} else {
							refused.Add(1)
						}
						judgeSpoof(t, f, mark, lines, ok, way.want)
						return nil
					})
				}
			}
			_ = sending.Wait()
			if arrived.Load() < 200 || refused.Load() < 50 {
				t.Errorf("%d arrived and %d were refused, too few to mean anything", arrived.Load(), refused.Load())
			}
			t.Logf("%d arrived, %d were refused", arrived.Load(), refused.Load())
		})
	})
}

// TestIdentityIsOursWithoutEnvoysHelp: whoever writes an Envoy configuration of his own may forget the filter
// that removes look-alikes. The names themselves are safe even then.
func TestIdentityIsOursWithoutEnvoysHelp(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	k := s.key(t, s.instance(t, admin.PolicyInput{}), admin.KeyInput{Type: apikey.TypeAgent, AgentName: "sales", Scopes: []string{}})
	want := map[string][]line{"/required": defaultNames.of(k, ""), "/optional/a": nil, "/public/a": nil}
	for _, version := range envoytest.Versions() {
		f := s.front(t, frontConfig{version: version, edit: func(tree map[string]any) {
			manager := at(tree, "static_resources", "listeners", 0, "filter_chains", 0, "filters", 0, "typed_config").(map[string]any)
			filters := manager["http_filters"].([]any)
			if name := at(filters, 0, "name"); name != "envoy.filters.http.header_mutation" {
				t.Fatalf("the first filter is %v", name)
			}
			manager["http_filters"] = filters[1:]
		}})
		f.awaitHealthy(t)
		c := f.caller(t)
		for _, name := range defaultNames.all() {
			for _, lines := range [][]string{
				{name + ": evil"}, {strings.ToUpper(name) + ": evil"}, {name + ":"},
				{name + ": evil1", http.CanonicalHeaderKey(name) + ": evil2", name + ":"}, {"Connection: " + name, name + ": evil"},
			} {
				for target, want := range want {
					if want != nil {
						lines = append(slices.Clip(lines), withKey(k.secret))
					}
					a := c.get(target, lines...).want(t, http.StatusOK, lines)
					if diff := cmp.Diff(want, defaultNames.identity(a.seen)); diff != "" {
						t.Errorf("%s: %s: %q (-want +got):\n%s", version, target, lines, diff)
					}
					if want != nil {
						lines = lines[:len(lines)-1]
					}
				}
			}
		}
	}
}

// judgeSpoof looks at what the upstream got of a request.
func judgeSpoof(t *testing.T, f *front, mark string, lines []string, arrived bool, want []line) {
	t.Helper()
	got := f.up.of(mark)
	if len(got) != map[bool]int{true: 1}[arrived] {
		t.Errorf("%q: answered as if it had arrived: %v; arrived %d times", lines, arrived, len(got))
	}
	for _, s := range got {
		if diff := cmp.Diff(want, defaultNames.identity(s)); diff != "" {
			t.Errorf("%q (-want +got):\n%s", lines, diff)
		}
		for _, l := range slices.Concat(s.Lines, s.Trailers) {
			// The spelling of another header's value is no identity.
			if strings.Contains(l.Value, "evil") && !slices.Contains([]string{"x-folded", "x-split"}, plain(l.Name)) {
				t.Errorf("%q: got %q", lines, l)
			}
			if plain(l.Name) == "connection" && strings.Contains(plain(l.Value), "keyward") {
				t.Errorf("%q: the upstream is told to drop ours: %q", lines, l)
			}
		}
	}
}

func TestSpoofedTrailersNeverArrive(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	k := s.key(t, s.instance(t, admin.PolicyInput{}), admin.KeyInput{})
	// Over HTTP/1.1 Envoy hands no trailers on, so these go to an upstream that speaks HTTP/2.
	f := s.front(t, frontConfig{grpc: true})
	f.awaitHealthy(t)
	for i, target := range []string{"/required", "/optional/a", "/public/a"} {
		for j, name := range slices.Concat(defaultNames.all(), []string{"x.keyward.user", "x~keyward~scopes", "x-keyward.agent"}) {
			mark := fmt.Sprintf("trailers-%d-%d", i, j)
			ok := f.http2(t, []field{
				{":method", "POST"}, {":scheme", "http"}, {":authority", "app.test"}, {":path", target},
				{strings.ToLower(caseHeader), mark}, {"x-api-key", k.secret},
				{"trailer", name + ", x-checksum"}, // net/http shows no others
			}, []field{{name, "evil"}, {"x-checksum", "1"}})
			got := f.up.of(mark)
			if !ok || len(got) != 1 {
				t.Errorf("%s: %s: arrived %d times, want once", target, name, len(got))
				continue
			}
			if got[0].has("evil") {
				t.Errorf("%s: %s reached the upstream", target, name)
			}
			if !slices.Contains(got[0].Trailers, line{"X-Checksum", "1"}) {
				t.Errorf("%s: %s: got trailers %v, want the application's own", target, name, got[0].Trailers)
			}
		}
	}
	// A key in a trailer is none.
	if f.http2(t, []field{{":method", "POST"}, {":scheme", "http"}, {":authority", "app.test"}, {":path", "/required"}, {strings.ToLower(caseHeader), "late"}},
		[]field{{"x-api-key", k.secret}}) || len(f.up.of("late")) != 0 {
		t.Error("a key in a trailer was taken")
	}
}
