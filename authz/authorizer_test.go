package authz_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/limits"
)

// world is everything a decision needs, held in memory: a whole store, cache and limiter.
type world struct {
	peppers   apikey.Peppers
	keys      map[apikey.Digest]*apikey.Key
	instances map[string]*apikey.Instance
	cold      bool // nothing is in memory: only FindKey can tell
	err       error
	notServed error
	lastUsed  time.Time
	lastHere  time.Time
	found     int // calls of FindKey

	demands []limits.Demand
	ended   []limits.Ending
	answer  limits.Decision
	onTake  func()
	block   bool // the limiter's TryTake cannot decide

	used      []apikey.ID
	decided   []authz.Use
	redigests int
}

func newWorld() *world {
	return &world{
		peppers:   apikey.Peppers{Current: apikey.NewPepper(2, false)},
		keys:      map[apikey.Digest]*apikey.Key{},
		instances: map[string]*apikey.Instance{"demo": {ID: "demo"}},
		answer:    limits.Decision{Allowed: true},
	}
}

func (w *world) Cached(d *apikey.Digest) (*apikey.Key, bool, error) {
	if w.err != nil {
		return nil, false, w.err
	}
	if w.cold {
		return nil, false, nil
	}
	if k := w.keys[*d]; k != nil {
		return k, true, nil
	}
	return nil, true, apikey.ErrNotFound
}

func (w *world) FindKey(_ context.Context, d apikey.Digest, _ netip.Addr) (*apikey.Key, error) {
	w.found++
	if k := w.keys[d]; k != nil {
		return k, nil
	}
	return nil, apikey.ErrNotFound
}

func (w *world) Instance(id string) *apikey.Instance { return w.instances[id] }
func (w *world) LastUsed(context.Context, apikey.ID) (time.Time, error) {
	return w.lastUsed, w.err
}
func (w *world) Serving() error { return w.notServed }

func (w *world) TryTake(d *limits.Demand) (limits.Decision, bool) {
	if w.block {
		return limits.Decision{}, false
	}
	answer, _ := w.Take(context.Background(), d)
	return answer, true
}

func (w *world) Take(_ context.Context, d *limits.Demand) (limits.Decision, error) {
	if w.onTake != nil {
		w.onTake()
	}
	w.demands = append(w.demands, limits.Demand{Rates: append([]limits.RateDemand(nil), d.Rates...), Quotas: append([]limits.QuotaDemand(nil), d.Quotas...), Lease: d.Lease})
	return w.answer, nil
}

func (w *world) Look(context.Context, *limits.Demand, []limits.Standing) ([]limits.Standing, error) {
	return nil, apikey.ErrUndecided
}

func (w *world) End(_ context.Context, endings []limits.Ending) error {
	w.ended = append(w.ended, endings...)
	return nil
}
func (w *world) Renew(context.Context, []limits.Lease) error     { return nil }
func (w *world) Disconnected(uint64)                             {}
func (w *world) Running(func(limits.Cell) bool) []limits.Running { return nil }

func (w *world) Last(apikey.ID) time.Time { return w.lastHere }
func (w *world) Decided(u authz.Use) {
	w.decided = append(w.decided, u)
	if u.Reason == authz.ReasonKey {
		w.used = append(w.used, u.Key.ID)
	}
}
func (w *world) Redigest(_, _ apikey.Digest)      { w.redigests++ }
func (w *world) spent() bool                      { return len(w.demands) > 0 || len(w.used) > 0 }
func (w *world) issue(k apikey.Key) apikey.Secret { return w.issueUnder(w.peppers.Current, k) }

// issueUnder gives a key a secret, with whatever the test says about it and sound values for the rest.
func (w *world) issueUnder(p *apikey.Pepper, k apikey.Key) apikey.Secret {
	if k.Type == "" {
		k.Type = apikey.TypeInstance
	}
	if k.InstanceID == "" {
		k.InstanceID = "demo"
	}
	if k.CreatedAt.IsZero() {
		k.CreatedAt = time.Now().Add(-time.Hour)
	}
	if k.ID.IsZero() {
		k.ID = apikey.ID{15: byte(len(w.keys) + 1)}
	}
	k.Generation = 1
	if k.Generations == nil {
		k.Generations = []apikey.Generation{{Number: 1}}
	}
	secret := apikey.Format{}.New(k.Type.Kind())
	k.Digest = p.Digest(secret.Reveal())
	w.keys[k.Digest] = &k
	return secret
}

func (w *world) authorizer(t *testing.T, cfg authz.Config) *authz.Authorizer {
	t.Helper()
	a, err := authz.New(cfg, w, w, w.peppers, w, w)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func decide(t *testing.T, a *authz.Authorizer, r authz.Request) authz.Decision {
	t.Helper()
	var d authz.Decision
	if err := a.Decide(t.Context(), &r, &d); err == nil {
		a.Decided(&r, &d, time.Now())
	} else {
		t.Fatalf("could not decide: %v", err)
	}
	return d
}

func source(t *testing.T, s string) []authz.Source {
	t.Helper()
	parsed, err := authz.ParseSource(s)
	if err != nil {
		t.Fatal(err)
	}
	return []authz.Source{parsed}
}

func header(name, value string) authz.Pair { return authz.Pair{Name: name, Value: value} }

// TestDecisions goes through DESIGN §2 row by row: what the request is, and the first step that fails.
func TestDecisions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		now := time.Now()
		w.instances["off"] = &apikey.Instance{ID: "off", Policy: apikey.Policy{Disabled: true}}
		w.instances["capped"] = &apikey.Instance{ID: "capped", Policy: apikey.Policy{AllowedScopes: apikey.Scopes{"orders:*"}}}
		const guid = "0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f"
		w.instances[guid] = &apikey.Instance{ID: guid}

		good := w.issue(apikey.Key{})
		other := w.issue(apikey.Key{})
		agent := w.issue(apikey.Key{Type: apikey.TypeAgent, AgentName: "sales"})
		prod := w.issue(apikey.Key{Environment: "prod"})
		reader := w.issue(apikey.Key{Scopes: apikey.Scopes{"orders:read"}})
		noRights := w.issue(apikey.Key{Scopes: apikey.Scopes{}})
		capped := w.issue(apikey.Key{InstanceID: "capped"})
		office := w.issue(apikey.Key{AllowedIPs: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8::/32")}})
		inGUID := w.issue(apikey.Key{InstanceID: guid})
		revoked := w.issue(apikey.Key{RevokedAt: now})
		disabled := w.issue(apikey.Key{Disabled: true})
		instanceOff := w.issue(apikey.Key{InstanceID: "off"})
		early := w.issue(apikey.Key{NotBefore: now.Add(time.Second)})
		expired := w.issue(apikey.Key{ExpirationDate: now.Add(-time.Nanosecond)})
		lastInstant := w.issue(apikey.Key{ExpirationDate: now})
		rotated := w.issue(apikey.Key{Generations: []apikey.Generation{{Number: 1, ValidUntil: now.Add(-time.Nanosecond)}, {Number: 2}}})
		idle := w.issue(apikey.Key{InactivityDays: 1, CreatedAt: now.Add(-25 * time.Hour)})
		unknown := apikey.Format{}.New(apikey.KindInstance)
		token := apikey.Format{}.New(apikey.KindManagement)
		mistyped := good.Reveal()[:20] + map[bool]string{true: "b", false: "a"}[good.Reveal()[20] == 'a'] + good.Reveal()[21:]

		key := func(s apikey.Secret) []authz.Pair { return []authz.Pair{header("x-api-key", s.Reveal())} }
		bearer := func(s string) authz.Pair { return header("authorization", "Bearer "+s) }

		a := w.authorizer(t, authz.Config{
			Credentials: authz.Credentials{QueryParameter: "api_key"},
			AllowCORS:   true,
			Rules: []authz.Rule{
				{Path: "/public/", Mode: authz.Public},
				{Path: "/maybe", Mode: authz.Optional},
				{Path: "/orders", Scopes: apikey.Scopes{"orders:read"}},
				{Path: "/orders/all", Scopes: apikey.Scopes{"orders:read", "orders:write"}},
				{Path: "/bills", Scopes: apikey.Scopes{"bills:read"}},
				{Path: "/instances/{instance}/{rest...}", Instance: source(t, "{instance}")},
				{Path: "/ask", Instance: source(t, "?instance"), Agent: source(t, "?agent"), Environment: source(t, "?env")},
				{Path: "/agents/{agent}/chat", Agent: source(t, "{agent}")},
				{Path: "/chat", AgentRequired: true},
			},
		})

		for name, tt := range map[string]struct {
			method     string // GET if empty
			path       string // "/" if empty
			headers    []authz.Pair
			extensions []authz.Pair
			peer       string
			want       authz.Reason
			missing    apikey.Scope
		}{
			// 1. Path: before any rule, a public one included.
			"dot segment under a public rule": {path: "/public/../admin", want: authz.ReasonInvalidPath},
			"path parameter":                  {path: "/public/..;/admin", want: authz.ReasonInvalidPath},
			"escaped slash":                   {path: "/public%2fadmin", headers: key(good), want: authz.ReasonInvalidPath},
			"blank beside dots":               {path: "/public/..%20/admin", want: authz.ReasonInvalidPath},
			"blank before a segment":          {path: "/public/%20../admin", want: authz.ReasonInvalidPath},
			"double escape":                   {path: "/%252e", headers: key(good), want: authz.ReasonInvalidPath},
			"no path at all":                  {method: "CONNECT", path: "-", headers: key(good), want: authz.ReasonInvalidPath},
			"the query is not judged":         {path: "/?next=//../;%2f", headers: key(good), want: authz.ReasonKey},
			// 2. Route.
			"public":                        {path: "/public/page", want: authz.ReasonPublic},
			"public does not look at keys":  {path: "/public/page", headers: key(revoked), want: authz.ReasonPublic},
			"optional without a credential": {path: "/maybe", want: authz.ReasonAnonymous},
			"optional with a good one":      {path: "/maybe", headers: key(good), want: authz.ReasonKey},
			"optional with a bad one":       {path: "/maybe", headers: key(unknown), want: authz.ReasonUnknownKey},
			"optional with a foreign one":   {path: "/maybe", headers: []authz.Pair{bearer("eyJhbGciOi.e30.x")}, want: authz.ReasonAnonymous},
			"preflight": {method: "OPTIONS", path: "/orders", headers: []authz.Pair{
				header("origin", "https://app"), header("access-control-request-method", "GET")}, want: authz.ReasonPreflight},
			"OPTIONS that is no preflight": {method: "OPTIONS", path: "/orders", headers: []authz.Pair{header("origin", "https://app")}, want: authz.ReasonNoCredential},
			// 3. Credential.
			"none":                                 {want: authz.ReasonNoCredential},
			"empty":                                {headers: []authz.Pair{header("x-api-key", " \t")}, want: authz.ReasonNoCredential},
			"white space around":                   {headers: []authz.Pair{header("x-api-key", "\t "+good.Reveal()+" ")}, want: authz.ReasonKey},
			"in the agent token header":            {headers: []authz.Pair{header("x-agent-access-token", good.Reveal())}, want: authz.ReasonKey},
			"bearer":                               {headers: []authz.Pair{bearer(good.Reveal())}, want: authz.ReasonKey},
			"bearer in capitals":                   {headers: []authz.Pair{header("authorization", "BEARER "+good.Reveal())}, want: authz.ReasonKey},
			"without a scheme":                     {headers: []authz.Pair{header("authorization", good.Reveal())}, want: authz.ReasonNoCredential},
			"another scheme":                       {headers: []authz.Pair{header("authorization", "Basic "+good.Reveal())}, want: authz.ReasonNoCredential},
			"in the query":                         {path: "/?api_key=" + good.Reveal(), want: authz.ReasonKey},
			"in the query, escaped name":           {path: "/?api%5Fkey=" + good.Reveal(), want: authz.ReasonInvalidRequest},
			"escaped name, public route":           {path: "/public/?api%5fkey=" + good.Reveal(), want: authz.ReasonInvalidRequest},
			"in the query of a CONNECT":            {method: "CONNECT", path: "/?api_key=" + good.Reveal(), want: authz.ReasonInvalidRequest},
			"in the query twice":                   {path: "/?api_key=" + good.Reveal() + "&api_key=" + good.Reveal(), want: authz.ReasonAmbiguousCredential},
			"comma in our header":                  {headers: []authz.Pair{header("x-api-key", good.Reveal()+","+good.Reveal())}, want: authz.ReasonAmbiguousCredential},
			"space in our header":                  {headers: []authz.Pair{header("x-api-key", good.Reveal()+" x")}, want: authz.ReasonAmbiguousCredential},
			"repeated header, same secret":         {headers: append(key(good), key(good)...), want: authz.ReasonAmbiguousCredential},
			"repeated header, one empty":           {headers: append(key(good), header("x-api-key", "")), want: authz.ReasonAmbiguousCredential},
			"same secret in two headers":           {headers: append(key(good), bearer(good.Reveal())), want: authz.ReasonKey},
			"two secrets":                          {headers: append(key(good), bearer(other.Reveal())), want: authz.ReasonAmbiguousCredential},
			"good header, bad bearer":              {headers: append(key(good), bearer("kwi_junk")), want: authz.ReasonAmbiguousCredential},
			"secret and another in query":          {path: "/?api_key=" + other.Reveal(), headers: key(good), want: authz.ReasonAmbiguousCredential},
			"an application's own JWT beside":      {headers: append(key(good), bearer("eyJhbGciOi.e30.x")), want: authz.ReasonKey},
			"ours and a JWT in one Authorization":  {headers: []authz.Pair{header("authorization", "Bearer eyJ.e30.x, Bearer "+good.Reveal())}, want: authz.ReasonAmbiguousCredential},
			"ours and a JWT in two Authorizations": {headers: []authz.Pair{bearer("eyJ.e30.x"), bearer(good.Reveal())}, want: authz.ReasonAmbiguousCredential},
			// 4. Shape: nothing is looked up.
			"noise":                     {headers: []authz.Pair{header("x-api-key", "hunter2")}, want: authz.ReasonMalformedCredential},
			"one character short":       {headers: []authz.Pair{header("x-api-key", good.Reveal()[:52])}, want: authz.ReasonMalformedCredential},
			"59 KiB":                    {headers: []authz.Pair{header("x-api-key", "kwi_"+strings.Repeat("a", 59<<10))}, want: authz.ReasonMalformedCredential},
			"quoted":                    {headers: []authz.Pair{header("x-api-key", `"`+good.Reveal()+`"`)}, want: authz.ReasonMalformedCredential},
			"foreign bytes":             {headers: []authz.Pair{header("x-api-key", "kwi_"+strings.Repeat("\xff", 49))}, want: authz.ReasonMalformedCredential},
			"mistyped":                  {headers: []authz.Pair{header("x-api-key", mistyped)}, want: authz.ReasonBadChecksum},
			"upper case":                {headers: []authz.Pair{header("x-api-key", strings.ToUpper(good.Reveal()))}, want: authz.ReasonMalformedCredential},
			"a management token":        {headers: key(token), want: authz.ReasonMalformedCredential},
			"malformed beats the right": {path: "/orders", headers: []authz.Pair{header("x-api-key", "kwi_")}, want: authz.ReasonMalformedCredential},
			// 5. Known?
			"unknown": {headers: key(unknown), want: authz.ReasonUnknownKey},
			// 6. Life.
			"revoked":                 {headers: key(revoked), want: authz.ReasonRevoked},
			"disabled":                {headers: key(disabled), want: authz.ReasonDisabled},
			"instance disabled":       {headers: key(instanceOff), want: authz.ReasonInstanceDisabled},
			"not yet valid":           {headers: key(early), want: authz.ReasonNotYetValid},
			"expired":                 {headers: key(expired), want: authz.ReasonExpired},
			"expires at this instant": {headers: key(lastInstant), want: authz.ReasonKey},
			"rotated away":            {headers: key(rotated), want: authz.ReasonGenerationEnded},
			"idle":                    {headers: key(idle), want: authz.ReasonIdle},
			"life beats place":        {path: "/instances/other/x", headers: key(revoked), want: authz.ReasonRevoked},
			// 7. Place.
			"own instance":                  {path: "/instances/demo/x", headers: key(good), want: authz.ReasonKey},
			"another instance":              {path: "/instances/other/x", headers: key(good), want: authz.ReasonWrongInstance},
			"an instance's name has a case": {path: "/instances/Demo/x", headers: key(good), want: authz.ReasonWrongInstance},
			"a GUID has none":               {path: "/instances/" + strings.ToUpper(guid) + "/x", headers: key(inGUID), want: authz.ReasonKey},
			"instance in the query":         {path: "/ask?instance=other", headers: key(good), want: authz.ReasonWrongInstance},
			"two sources, one wrong":        {path: "/instances/demo/x", headers: key(good), extensions: []authz.Pair{header("instance", "other")}, want: authz.ReasonWrongInstance},
			"instance from Envoy":           {headers: key(good), extensions: []authz.Pair{header("instance", "demo")}, want: authz.ReasonKey},
			"instance twice":                {path: "/ask?instance=demo&instance=demo", headers: key(good), want: authz.ReasonInvalidRequest},
			"instance empty":                {path: "/ask?instance=", headers: key(good), want: authz.ReasonInvalidRequest},
			"instance empty from Envoy":     {headers: key(good), extensions: []authz.Pair{header("instance", "")}, want: authz.ReasonInvalidRequest},
			"own agent":                     {path: "/agents/sales/chat", headers: key(agent), want: authz.ReasonKey},
			"another agent":                 {path: "/agents/support/chat", headers: key(agent), want: authz.ReasonWrongAgent},
			"any agent for an instance key": {path: "/agents/support/chat", headers: key(good), want: authz.ReasonKey},
			"agent from Envoy":              {headers: key(agent), extensions: []authz.Pair{header("agent", "support")}, want: authz.ReasonWrongAgent},
			"no agent named":                {headers: key(agent), want: authz.ReasonKey},
			"no agent named, required":      {path: "/chat", headers: key(agent), want: authz.ReasonAgentRequired},
			"required, named by Envoy":      {path: "/chat", headers: key(agent), extensions: []authz.Pair{header("agent", "sales")}, want: authz.ReasonKey},
			"required, no agent key":        {path: "/chat", headers: key(good), want: authz.ReasonKey},
			"own environment":               {path: "/ask?env=prod", headers: key(prod), want: authz.ReasonKey},
			"another environment":           {path: "/ask?env=test", headers: key(prod), want: authz.ReasonWrongEnvironment},
			"any environment":               {path: "/ask?env=test", headers: key(good), want: authz.ReasonKey},
			"environment from Envoy":        {headers: key(prod), extensions: []authz.Pair{header("environment", "test")}, want: authz.ReasonWrongEnvironment},
			// 8. Right.
			"has the scope":             {path: "/orders", headers: key(reader), want: authz.ReasonKey},
			"lacks a scope":             {path: "/bills", headers: key(reader), want: authz.ReasonMissingScope, missing: "bills:read"},
			"lacks one of two":          {path: "/orders/all", headers: key(reader), want: authz.ReasonMissingScope, missing: "orders:write"},
			"no scopes said is all":     {path: "/orders/all", headers: key(good), want: authz.ReasonKey},
			"empty scopes are none":     {path: "/orders", headers: key(noRights), want: authz.ReasonMissingScope, missing: "orders:read"},
			"scope from Envoy":          {headers: key(reader), extensions: []authz.Pair{header("required_scopes", "orders:read, bills:read")}, want: authz.ReasonMissingScope, missing: "bills:read"},
			"scope from Envoy, held":    {headers: key(reader), extensions: []authz.Pair{header("required_scopes", " orders:read ")}, want: authz.ReasonKey},
			"union of rule and Envoy":   {path: "/orders", headers: key(reader), extensions: []authz.Pair{header("required_scopes", "x")}, want: authz.ReasonMissingScope, missing: "x"},
			"policy caps the key":       {path: "/bills", headers: key(capped), want: authz.ReasonMissingScope, missing: "bills:read"},
			"within the policy's cap":   {path: "/orders", headers: key(capped), want: authz.ReasonKey},
			"address allowed":           {headers: key(office), peer: "203.0.113.9", want: authz.ReasonKey},
			"address mapped":            {headers: key(office), peer: "::ffff:203.0.113.9", want: authz.ReasonKey},
			"address of IPv6":           {headers: key(office), peer: "2001:db8::1%eth0", want: authz.ReasonKey},
			"address refused":           {headers: key(office), peer: "198.51.100.1", want: authz.ReasonAddress},
			"address unknown":           {headers: key(office), peer: "/run/envoy.sock", want: authz.ReasonAddress},
			"address in odd writing":    {headers: key(office), peer: "203.0.113.010", want: authz.ReasonAddress},
			"forwarded-for is no proof": {headers: append(key(office), header("x-forwarded-for", "203.0.113.9")), peer: "198.51.100.1", want: authz.ReasonAddress},
			// 10. Allowed.
			"allowed": {headers: key(good), want: authz.ReasonKey},
		} {
			if tt.method == "" {
				tt.method = "GET"
			}
			switch tt.path {
			case "":
				tt.path = "/"
			case "-":
				tt.path = ""
			}
			r := authz.Request{Method: tt.method, Host: "api.example", Path: tt.path, Peer: tt.peer, Headers: tt.headers, Extensions: tt.extensions}
			w.demands, w.used = nil, nil
			d := decide(t, a, r)
			if d.Reason != tt.want || d.MissingScope != tt.missing {
				t.Errorf("%s: got %v (missing %q), want %v (missing %q)", name, d.Reason, d.MissingScope, tt.want, tt.missing)
			}
			if spent := w.spent(); spent != (tt.want == authz.ReasonKey) {
				t.Errorf("%s: limits spent or use noted: %v, for a request that was %v", name, spent, d.Outcome())
			}
			if known := d.Key != nil; known != (tt.want > authz.ReasonUnknownKey && tt.want != authz.ReasonInvalidRequest || strings.Contains(name, "instance ")) {
				t.Errorf("%s: the key is known: %v", name, known)
			}
			var tried authz.Decision
			ok, err := a.Try(&r, &tried)
			if tt.want == authz.ReasonIdle {
				if ok {
					t.Errorf("%s: Try decided without asking the store for the last use", name)
				}
			} else if !ok || err != nil || tried.Reason != tt.want {
				t.Errorf("%s: Try: got %v, %v, %v, want what Decide said", name, tried.Reason, ok, err)
			}
		}
	})
}

func TestUnroutedRequestsCanBeRefused(t *testing.T) {
	w := newWorld()
	secret := w.issue(apikey.Key{})
	a := w.authorizer(t, authz.Config{DenyUnrouted: true, Rules: []authz.Rule{{Path: "/known"}}})
	r := authz.Request{Method: "GET", Path: "/other", Headers: []authz.Pair{header("x-api-key", secret.Reveal())}}
	if d := decide(t, a, r); d.Reason != authz.ReasonNoRoute {
		t.Errorf("no rule: got %v", d.Reason)
	}
	r.Path = "/known"
	if d := decide(t, a, r); d.Reason != authz.ReasonKey {
		t.Errorf("a rule: got %v", d.Reason)
	}
}

func TestIdleIsAskedOfTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		secret := w.issue(apikey.Key{InactivityDays: 1, CreatedAt: time.Now().Add(-48 * time.Hour)})
		a := w.authorizer(t, authz.Config{})
		r := authz.Request{Method: "GET", Path: "/", Headers: []authz.Pair{header("x-api-key", secret.Reveal())}}
		if d := decide(t, a, r); d.Reason != authz.ReasonIdle {
			t.Errorf("never used: got %v", d.Reason)
		}
		w.lastUsed = time.Now().Add(-24 * time.Hour) // by another replica
		if d := decide(t, a, r); d.Reason != authz.ReasonKey {
			t.Errorf("used a day ago: got %v", d.Reason)
		}
		w.lastUsed, w.lastHere = time.Time{}, time.Now().Add(-time.Hour) // by this one
		var tried authz.Decision
		if ok, err := a.Try(&r, &tried); !ok || err != nil || tried.Reason != authz.ReasonKey {
			t.Errorf("used here an hour ago: got %v, %v, %v", tried.Reason, ok, err)
		}
		w.lastHere = time.Time{}
		w.err = apikey.ErrUndecided
		var d authz.Decision
		if err := a.Decide(t.Context(), &r, &d); !errors.Is(err, apikey.ErrUndecided) {
			t.Errorf("store away: got %v, %v", d.Reason, err)
		}
	})
}

func TestOutagesAreNotDenials(t *testing.T) {
	for name, broken := range map[string]func(*world){
		"store away":             func(w *world) { w.err = fmt.Errorf("disk: %w", apikey.ErrUndecided) },
		"serve lease run out":    func(w *world) { w.notServed = apikey.ErrUndecided },
		"instance not known yet": func(w *world) { delete(w.instances, "demo") },
		"too many unknown keys":  func(w *world) { w.err = &apikey.BusyError{What: "x", RetryAfter: time.Second} },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			secret := w.issue(apikey.Key{})
			a := w.authorizer(t, authz.Config{})
			broken(w)
			r := authz.Request{Method: "GET", Path: "/", Headers: []authz.Pair{header("x-api-key", secret.Reveal())}}
			var d authz.Decision
			if err := a.Decide(t.Context(), &r, &d); !errors.Is(err, apikey.ErrUndecided) {
				t.Errorf("Decide: got %v, %v, want an outage", d.Reason, err)
			}
			if ok, err := a.Try(&r, &d); !ok || !errors.Is(err, apikey.ErrUndecided) {
				t.Errorf("Try: got %v, %v, want an outage", ok, err)
			}
			if len(w.used) > 0 {
				t.Error("a use was noted for a request that was not allowed")
			}
		})
	}
}

func TestTryLeavesWaitingToDecide(t *testing.T) {
	w := newWorld()
	secret := w.issue(apikey.Key{})
	a := w.authorizer(t, authz.Config{})
	r := authz.Request{Method: "GET", Path: "/", Headers: []authz.Pair{header("x-api-key", secret.Reveal())}}
	var d authz.Decision

	w.cold = true
	if ok, err := a.Try(&r, &d); ok || err != nil || w.found > 0 || w.spent() {
		t.Errorf("cold cache: got %v, %v, %d loads", ok, err, w.found)
	}
	if d := decide(t, a, r); d.Reason != authz.ReasonKey || w.found != 1 {
		t.Errorf("cold cache, Decide: got %v after %d loads", d.Reason, w.found)
	}
	w.cold, w.block, w.demands, w.used = false, true, nil, nil
	if ok, err := a.Try(&r, &d); ok || err != nil || w.spent() {
		t.Errorf("busy limiter: got %v, %v", ok, err)
	}
	if d := decide(t, a, r); d.Reason != authz.ReasonKey {
		t.Errorf("busy limiter, Decide: got %v", d.Reason)
	}
}

func TestLimitsAreThoseInForce(t *testing.T) {
	w := newWorld()
	minute := apikey.Duration(time.Minute)
	w.instances["demo"].Policy = apikey.Policy{
		Defaults: apikey.Defaults{User: apikey.Limits{Burst: 7}},
		Total:    apikey.Limits{Rate: apikey.Rate{Requests: 600, Per: minute}, Burst: 50},
	}
	rate := func(interval time.Duration, burst int64) limits.Rate {
		return limits.Rate{Interval: interval, Burst: burst}
	}
	total := rate(100*time.Millisecond, 50)
	a := w.authorizer(t, authz.Config{})
	for name, tt := range map[string]struct {
		key  apikey.Key
		want []limits.Rate
	}{
		"shipped":           {apikey.Key{}, []limits.Rate{total, rate(500*time.Millisecond, 20)}},
		"of the type":       {apikey.Key{Type: apikey.TypeUser, UserPrincipalName: "ann@example"}, []limits.Rate{total, rate(500*time.Millisecond, 7)}},
		"of the key":        {apikey.Key{Limits: apikey.Limits{Rate: apikey.Rate{Requests: 60, Per: minute}}}, []limits.Rate{total, rate(time.Second, 20)}},
		"key has none":      {apikey.Key{Limits: apikey.Limits{Rate: apikey.Rate{Requests: apikey.Unlimited}}}, []limits.Rate{total}},
		"burst but no rate": {apikey.Key{Limits: apikey.Limits{Rate: apikey.Rate{Requests: apikey.Unlimited}, MaxConcurrent: 3}}, []limits.Rate{total}},
	} {
		t.Run(name, func(t *testing.T) {
			secret := w.issue(tt.key)
			w.demands = nil
			decide(t, a, authz.Request{Method: "GET", Path: "/", Headers: []authz.Pair{header("x-api-key", secret.Reveal())}})
			var got []limits.Rate
			for _, r := range w.demands[0].Rates {
				got = append(got, r.Rate)
			}
			if fmt.Sprint(got) != fmt.Sprint(tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}

	secret := w.issue(apikey.Key{})
	w.answer = limits.Decision{Class: limits.ClassInstance, RetryAfter: 3 * time.Second}
	d := decide(t, a, authz.Request{Method: "GET", Path: "/", Headers: []authz.Pair{header("x-api-key", secret.Reveal())}})
	if d.Reason != authz.ReasonLimitInstance || d.RetryAfter != 3*time.Second || d.Rate != total || d.Outcome() != authz.Limited {
		t.Errorf("refused by the instance's total: got %+v", d)
	}
}

func TestRunningRequestsAreCountedWithTheRest(t *testing.T) {
	w := newWorld()
	w.instances["demo"].Policy.Defaults.User.MaxConcurrent = 3
	a := w.authorizer(t, authz.Config{LeaseWait: 5 * time.Millisecond, Rules: []authz.Rule{{Path: "/a/{b}"}}})
	identity := authz.NewIdentity("203.0.113.9", 4711, time.UnixMicro(1_700_000_000_000_000))
	for name, tt := range map[string]struct {
		key  apikey.Key
		want int64
	}{
		"shipped":     {apikey.Key{}, 10},
		"of the type": {apikey.Key{Type: apikey.TypeUser, UserPrincipalName: "ann@example"}, 3},
		"of the key":  {apikey.Key{Limits: apikey.Limits{MaxConcurrent: 1}}, 1},
		"none":        {apikey.Key{Limits: apikey.Limits{MaxConcurrent: apikey.Unlimited}}, 0},
	} {
		secret := w.issue(tt.key)
		w.demands, w.answer = nil, limits.Decision{Allowed: true}
		r := authz.Request{Method: "POST", Path: "/a/x", Identity: identity, HTTP: 42, Connection: 7,
			Headers: []authz.Pair{header("x-api-key", secret.Reveal())}}
		d := decide(t, a, r)
		got := w.demands[0].Lease
		if got.Limit != tt.want || d.Leased != (tt.want > 0) {
			t.Errorf("%s: limit %d, leased %v, want %d", name, got.Limit, d.Leased, tt.want)
		}
		if tt.want == 0 {
			continue
		}
		want := limits.Lease{Cell: authz.LeaseCell(d.Key.ID), Identity: identity, HTTP: 42}
		if got.Lease != want || d.Lease != want || got.Connection != 7 || got.Wait != 5*time.Millisecond {
			t.Errorf("%s: got %+v and %+v, want %+v", name, got, d.Lease, want)
		}
		if method, pattern := a.Describe(got.Note); method != "POST" || pattern != "/a/{b}" {
			t.Errorf("%s: described as %q %q", name, method, pattern)
		}

		w.answer = limits.Decision{Class: limits.ClassConcurrency, RetryAfter: time.Second}
		d = decide(t, a, r)
		if d.Reason != authz.ReasonLimitConcurrency || d.Leased || d.Concurrent != tt.want {
			t.Errorf("%s, refused: got %+v", name, d)
		}
	}
}

// TestWaitingForAPlaceOutlivesNoRevocation: who revoked was told that the key is refused from now on.
func TestWaitingForAPlaceOutlivesNoRevocation(t *testing.T) {
	w := newWorld()
	secret := w.issue(apikey.Key{})
	digest := w.peppers.Current.Digest(secret.Reveal())
	a := w.authorizer(t, authz.Config{})
	w.answer = limits.Decision{Allowed: true, Waited: time.Millisecond}
	w.onTake = func() {
		revoked := *w.keys[digest]
		revoked.RevokedAt = time.Now()
		w.keys[digest] = &revoked
	}
	d := decide(t, a, authz.Request{Method: "GET", Path: "/", Headers: []authz.Pair{header("x-api-key", secret.Reveal())}})
	if d.Reason != authz.ReasonRevoked || d.Leased {
		t.Errorf("revoked while it waited: got %v, leased %v", d.Reason, d.Leased)
	}
	if len(w.ended) != 1 || w.ended[0].Lease != w.demands[0].Lease.Lease {
		t.Errorf("ended %+v, want the lease that it got", w.ended)
	}
}

func TestLeaseOfAnAnswerThatIsNotGivenIsTakenBack(t *testing.T) {
	w := newWorld()
	secret := w.issue(apikey.Key{})
	a := w.authorizer(t, authz.Config{})
	w.notServed = apikey.ErrUndecided
	r := authz.Request{Method: "GET", Path: "/", Headers: []authz.Pair{header("x-api-key", secret.Reveal())}}
	var d authz.Decision
	if err := a.Decide(t.Context(), &r, &d); err == nil || d.Leased {
		t.Fatalf("got %+v, %v", d, err)
	}
	if len(w.ended) != 1 || w.ended[0].Lease != w.demands[0].Lease.Lease || w.ended[0].Cause != limits.CauseContext {
		t.Errorf("ended %+v, want the lease of %+v", w.ended, w.demands)
	}

	// Asked again, the first answer's request may run.
	w.ended, w.answer.Repeated = nil, true
	if err := a.Decide(t.Context(), &r, &d); err == nil || d.Leased || len(w.ended) != 0 {
		t.Errorf("a repeated Check: got %+v, %v, ended %+v", d, err, w.ended)
	}
}

func TestDescriptionsOutliveAReload(t *testing.T) {
	w := newWorld()
	secret := w.issue(apikey.Key{})
	a := w.authorizer(t, authz.Config{Rules: []authz.Rule{{Path: "/old"}}})
	decide(t, a, authz.Request{Method: "BREW", Path: "/old", Headers: []authz.Pair{header("x-api-key", secret.Reveal())}})
	if err := a.Configure(authz.Config{Rules: []authz.Rule{{Path: "/new"}}}); err != nil {
		t.Fatal(err)
	}
	if method, pattern := a.Describe(w.demands[0].Lease.Note); method != "" || pattern != "/old" {
		t.Errorf("got %q %q", method, pattern)
	}
}

func TestPreviousPepperFindsKeys(t *testing.T) {
	w := newWorld()
	w.peppers.Previous = apikey.NewPepper(1, false)
	old := w.issueUnder(w.peppers.Previous, apikey.Key{})
	fresh := w.issue(apikey.Key{})
	a := w.authorizer(t, authz.Config{})
	for _, tt := range []struct {
		secret    apikey.Secret
		want      authz.Reason
		redigests int
	}{
		{fresh, authz.ReasonKey, 0},
		{old, authz.ReasonKey, 1},
		{apikey.Format{}.New(apikey.KindUser), authz.ReasonUnknownKey, 1},
		{old, authz.ReasonKey, 2}, // again while nothing is in memory
	} {
		w.cold = tt.redigests == 2
		d := decide(t, a, authz.Request{Method: "GET", Path: "/", Headers: []authz.Pair{header("x-api-key", tt.secret.Reveal())}})
		if d.Reason != tt.want || w.redigests != tt.redigests {
			t.Errorf("got %v and %d digests queued, want %v and %d", d.Reason, w.redigests, tt.want, tt.redigests)
		}
	}
}

func TestSecretsAreFoundWhereverTheyHaveToBeRemoved(t *testing.T) {
	w := newWorld()
	secret := w.issue(apikey.Key{}).Reveal()
	a := w.authorizer(t, authz.Config{
		Credentials: authz.Credentials{QueryParameter: "key"},
		Rules:       []authz.Rule{{Path: "/public", Mode: authz.Public}, {Path: "/maybe", Mode: authz.Optional}},
	})
	for name, tt := range map[string]struct {
		path            string
		authorization   string
		inAuthorization bool
		inQuery         bool
	}{
		"ours":                        {"/", "Bearer " + secret, true, false},
		"ours on a public route":      {"/public", "Bearer " + secret, true, false},
		"ours beside another, public": {"/public", "Bearer abc, Bearer " + secret, true, false},
		"the application's":           {"/maybe", "Bearer eyJ.e30.x", false, false},
		"query":                       {"/?key=" + secret, "", false, true},
		"query on a public route":     {"/public?key=" + secret, "", false, true},
		"no query":                    {"/maybe?keys=1", "", false, false},
	} {
		r := authz.Request{Method: "GET", Path: tt.path, Headers: []authz.Pair{header("authorization", tt.authorization)}}
		d := decide(t, a, r)
		if d.InAuthorization != tt.inAuthorization || d.InQuery != tt.inQuery {
			t.Errorf("%s: got %v, %v, want %v, %v", name, d.InAuthorization, d.InQuery, tt.inAuthorization, tt.inQuery)
		}
	}
}

func TestClientAddress(t *testing.T) {
	office := []netip.Prefix{netip.MustParsePrefix("203.0.113.9/32")}
	for name, tt := range map[string]struct {
		cfg     authz.Config
		headers []authz.Pair
		want    bool
	}{
		"external":                   {authz.Config{ClientAddress: authz.ClientExternal}, []authz.Pair{header("x-envoy-external-address", "203.0.113.9")}, true},
		"external twice":             {authz.Config{ClientAddress: authz.ClientExternal}, []authz.Pair{header("x-envoy-external-address", "203.0.113.9"), header("x-envoy-external-address", "203.0.113.9")}, false},
		"external absent":            {authz.Config{ClientAddress: authz.ClientExternal}, nil, false},
		"last of xff":                {authz.Config{ClientAddress: authz.ClientXFF}, []authz.Pair{header("x-forwarded-for", "1.1.1.1, 203.0.113.9")}, true},
		"forged in front":            {authz.Config{ClientAddress: authz.ClientXFF}, []authz.Pair{header("x-forwarded-for", "203.0.113.9, 1.1.1.1")}, false},
		"past one trusted hop":       {authz.Config{ClientAddress: authz.ClientXFF, TrustedHops: 1}, []authz.Pair{header("x-forwarded-for", "203.0.113.9,10.0.0.1")}, true},
		"over several headers":       {authz.Config{ClientAddress: authz.ClientXFF, TrustedHops: 1}, []authz.Pair{header("x-forwarded-for", "203.0.113.9"), header("x-forwarded-for", "10.0.0.1")}, true},
		"fewer hops than trusted":    {authz.Config{ClientAddress: authz.ClientXFF, TrustedHops: 3}, []authz.Pair{header("x-forwarded-for", "203.0.113.9")}, false},
		"garbage falls to the peer":  {authz.Config{ClientAddress: authz.ClientXFF}, []authz.Pair{header("x-forwarded-for", "203.0.113.9, x")}, false},
		"an empty element counts":    {authz.Config{ClientAddress: authz.ClientXFF}, []authz.Pair{header("x-forwarded-for", "203.0.113.9,")}, false},
		"peer ignores what it hears": {authz.Config{}, []authz.Pair{header("x-forwarded-for", "203.0.113.9")}, false},
	} {
		w := newWorld()
		secret := w.issue(apikey.Key{AllowedIPs: office})
		a := w.authorizer(t, tt.cfg)
		r := authz.Request{Method: "GET", Path: "/", Peer: "10.0.0.1", Headers: append(tt.headers, header("x-api-key", secret.Reveal()))}
		if got := decide(t, a, r).Reason == authz.ReasonKey; got != tt.want {
			t.Errorf("%s: allowed %v, want %v", name, got, tt.want)
		}
	}
}

func TestScopesHandedOnAreThoseInForce(t *testing.T) {
	w := newWorld()
	w.instances["demo"].Policy.AllowedScopes = apikey.Scopes{"orders:*"}
	a := w.authorizer(t, authz.Config{})
	for _, tt := range []struct {
		scopes apikey.Scopes
		want   string
	}{
		{nil, "orders:*"},
		{apikey.Scopes{"*"}, "orders:*"},
		{apikey.Scopes{"bills:read", "orders:read"}, "orders:read"},
		{apikey.Scopes{"bills:read"}, ""},
	} {
		secret := w.issue(apikey.Key{Scopes: tt.scopes})
		d := decide(t, a, authz.Request{Method: "GET", Path: "/", Headers: []authz.Pair{header("x-api-key", secret.Reveal())}})
		if got := string(d.AppendScopes(nil)); got != tt.want {
			t.Errorf("%v: got %q, want %q", tt.scopes, got, tt.want)
		}
	}
}

func TestConfigurationIsReplacedWholeOrNotAtAll(t *testing.T) {
	w := newWorld()
	a := w.authorizer(t, authz.Config{Rules: []authz.Rule{{Path: "/open", Mode: authz.Public}}})
	for name, bad := range map[string]authz.Config{
		"equal rules":     {Rules: []authz.Rule{{Path: "/a/{x}"}, {Path: "/a/{y}"}}},
		"client address":  {ClientAddress: "header"},
		"trusted hops":    {TrustedHops: 2},
		"prefix":          {Credentials: authz.Credentials{Format: apikey.Format{First: "K W"}}},
		"header twice":    {Credentials: authz.Credentials{Headers: []string{"x-key", "x-key"}}},
		"query parameter": {Credentials: authz.Credentials{QueryParameter: "a&b"}},
		"header's case":   {Credentials: authz.Credentials{Headers: []string{"X-Key"}}},
		"header not ours": {Credentials: authz.Credentials{Headers: []string{"authorization"}}},
	} {
		if err := a.Configure(bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	r := authz.Request{Method: "GET", Path: "/open"}
	if d := decide(t, a, r); d.Reason != authz.ReasonPublic {
		t.Errorf("after a bad configuration: got %v, want the old one's answer", d.Reason)
	}
	if err := a.Configure(authz.Config{}); err != nil {
		t.Fatal(err)
	}
	if d := decide(t, a, r); d.Reason != authz.ReasonNoCredential {
		t.Errorf("after a good configuration: got %v", d.Reason)
	}
}

func TestRequestsDoNotPrint(t *testing.T) {
	r := &authz.Request{Headers: []authz.Pair{header("x-api-key", "kwi_secret")}}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if got := fmt.Sprintf(verb, r); strings.Contains(got, "secret") {
			t.Errorf("%s: %s", verb, got)
		}
	}
}
