package manage

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// An issuer is an OIDC issuer on this machine.
type issuer struct {
	url     string
	keys    atomic.Pointer[jose.JSONWebKeySet]
	fetches atomic.Int64 // of keys
	down    atomic.Bool
	// jwksURI, unless "", is what the discovery document says instead.
	jwksURI string
	name    string // that the discovery document says instead
}

// A signer is a key of an issuer.
type signer struct {
	kid       string
	algorithm jose.SignatureAlgorithm
	key       crypto.Signer
}

func newSigner(t *testing.T, kid string, algorithm jose.SignatureAlgorithm) signer {
	t.Helper()
	var key crypto.Signer
	var err error
	if algorithm == jose.ES256 {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	} else {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		t.Fatal(err)
	}
	return signer{kid, algorithm, key}
}

// sign makes a token of claims.
func (s signer) sign(t *testing.T, claims map[string]any) apikey.Secret {
	t.Helper()
	return sign(t, jose.SigningKey{Algorithm: s.algorithm, Key: jose.JSONWebKey{Key: s.key, KeyID: s.kid}}, claims)
}

func sign(t *testing.T, key jose.SigningKey, claims map[string]any) apikey.Secret {
	t.Helper()
	made, err := jose.NewSigner(key, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := made.Sign(text)
	if err != nil {
		t.Fatal(err)
	}
	compact, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return apikey.NewSecret(compact)
}

func (i *issuer) publish(signers ...signer) {
	set := &jose.JSONWebKeySet{}
	for _, s := range signers {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: s.key.Public(), KeyID: s.kid, Algorithm: string(s.algorithm), Use: "sig"})
	}
	i.keys.Store(set)
}

func (i *issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if i.down.Load() {
		http.Error(w, "down", http.StatusBadGateway)
		return
	}
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		document := map[string]string{"issuer": i.url, "jwks_uri": i.url + "/keys"}
		if i.jwksURI != "" {
			document["jwks_uri"] = i.jwksURI
		}
		if i.name != "" {
			document["issuer"] = i.name
		}
		_ = json.NewEncoder(w).Encode(document)
	case "/keys":
		i.fetches.Add(1)
		_ = json.NewEncoder(w).Encode(i.keys.Load())
	default:
		http.NotFound(w, r)
	}
}

func newIssuer(t *testing.T, signers ...signer) *issuer {
	t.Helper()
	i := &issuer{}
	i.publish(signers...)
	i.url = serve(t, i)
	return i
}

// config of an issuer with a rule of each kind.
func (i *issuer) config() admin.OIDCIssuer {
	return admin.OIDCIssuer{
		Issuer: i.url, Audience: "keyward", Algorithms: []string{"RS256", "ES256"}, UPNClaim: "upn", UPNSuffix: "@example.com",
		Rules: []admin.OIDCRule{
			{Claim: "roles", Value: "owners", Role: admin.RoleOwner},
			{Claim: "/realm/roles", Value: "operators", Role: admin.RoleOperator, InstanceID: "a"},
			{Claim: "auditor_of", Value: "*", Role: admin.RoleAuditor, InstanceClaim: "auditor_of"},
			{Claim: "groups", Value: "users", Role: admin.RoleUser, InstanceID: "a"},
		},
	}
}

// claims are those of a token that works, but for its role.
func (i *issuer) claims(and ...any) map[string]any {
	c := map[string]any{"iss": i.url, "aud": "keyward", "sub": "ann", "exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix()}
	for n := 0; n < len(and); n += 2 {
		if and[n+1] == nil {
			delete(c, and[n].(string))
		} else {
			c[and[n].(string)] = and[n+1]
		}
	}
	return c
}

// trusting is a desk that trusts issuers.
func trusting(t *testing.T, client *http.Client, issuers ...admin.OIDCIssuer) *desk {
	t.Helper()
	d := open(t)
	known, err := admin.NewOIDC(issuers, client)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(d.log, nil))
	d.svc = admin.New(d.store, admin.Config{Peppers: apikey.Peppers{Current: pepper}, Leases: d, OIDC: known}, nil, log)
	d.Handler = New(d.svc, Config{Pepper: pepper, Log: log})
	return d
}

func TestOIDCRolesAndInstances(t *testing.T) {
	rs, es := newSigner(t, "rs", jose.RS256), newSigner(t, "es", jose.ES256)
	i := newIssuer(t, rs, es)
	d := trusting(t, nil, i.config())
	d.instance(t, "a")
	d.instance(t, "b")
	for name, tt := range map[string]struct {
		claims               []any
		role                 admin.Role // "": 403
		instance, upn, actor string
	}{
		"owner":                       {[]any{"roles", []string{"x", "owners"}}, admin.RoleOwner, "", "", "ann"},
		"owner by one text":           {[]any{"roles", "owners"}, admin.RoleOwner, "", "", "ann"},
		"operator of one instance":    {[]any{"realm", map[string]any{"roles": []string{"operators"}}}, admin.RoleOperator, "a", "", "ann"},
		"auditor of what it says":     {[]any{"auditor_of", "b"}, admin.RoleAuditor, "b", "", "ann"},
		"user":                        {[]any{"groups", []string{"users"}, "upn", "ann@example.com", "sub", "s|1"}, admin.RoleUser, "a", "ann@example.com", "s|1"},
		"suffix in another case":      {[]any{"groups", "users", "upn", "ann@EXAMPLE.com"}, admin.RoleUser, "a", "ann@EXAMPLE.com", "ann"},
		"first rule wins":             {[]any{"groups", "users", "roles", "owners"}, admin.RoleOwner, "", "", "ann"},
		"no role":                     {nil, "", "", "", "ann"},
		"another value":               {[]any{"roles", "Owners"}, "", "", "", "ann"},
		"any value is none for owner": {[]any{"roles", "*"}, "", "", "", "ann"},
		"part of a value":             {[]any{"roles", "owners,x"}, "", "", "", "ann"},
		"an object":                   {[]any{"roles", map[string]any{"owners": true}}, "", "", "", "ann"},
		"a number":                    {[]any{"roles", []any{1, true, nil}}, "", "", "", "ann"},
		"pointer as a name":           {[]any{"realm", "operators"}, "", "", "", "ann"},
		"auditor of two":              {[]any{"auditor_of", []string{"a", "b"}}, "", "", "", "ann"},
		"auditor of nothing":          {[]any{"auditor_of", ""}, "", "", "", "ann"},
		"auditor of no id":            {[]any{"auditor_of", "../a"}, "", "", "", "ann"},
		"user without a UPN":          {[]any{"groups", "users"}, "", "", "", "ann"},
		"user of another domain":      {[]any{"groups", "users", "upn", "ann@evil.com"}, "", "", "", "ann"},
		"user with a suffix only":     {[]any{"groups", "users", "upn", "@example.com"}, "", "", "", "ann"},
		"user with the domain inside": {[]any{"groups", "users", "upn", "ann@example.com.evil"}, "", "", "", "ann"},
		"user, UPN of another claim":  {[]any{"groups", "users", "email", "ann@example.com", "email_verified", true}, "", "", "", "ann"},
		"user with a comma":           {[]any{"groups", "users", "upn", "ann,bob@example.com"}, "", "", "", "ann"},
		"user with two UPNs":          {[]any{"groups", "users", "upn", []string{"ann@example.com"}}, "", "", "", "ann"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, s := range []signer{rs, es} {
				got, err := d.svc.Authenticate(t.Context(), s.sign(t, i.claims(tt.claims...)))
				if want := "oidc:" + i.url + "#" + tt.actor; got.Name != want {
					t.Errorf("name %q, want %q; %v", got.Name, want, err)
				}
				if _, forbidden := errors.AsType[*admin.ForbiddenError](err); forbidden != (tt.role == "") {
					t.Errorf("error %v", err)
				}
				if got.Role != tt.role || got.InstanceID != tt.instance || got.UserPrincipalName != tt.upn {
					t.Errorf("got %+v", got)
				}
			}
		})
	}
	if n := i.fetches.Load(); n != 1 {
		t.Errorf("keys were fetched %d times", n)
	}

	// Over HTTP, from the token to the audit.
	user := rs.sign(t, i.claims("groups", "users", "upn", "ann@example.com"))
	made := read[createdKey](t, d.send(user, "POST", aKeys, `{"name":"n"}`), 201)
	if made.Key.UserPrincipalName != "ann@example.com" || made.Key.CreatedBy != "oidc:"+i.url+"#ann" {
		t.Errorf("got %+v", made.Key)
	}
	wantError(t, d.send(user, "GET", "/instances/b/apiKeys", ""), 404, CodeNotFound, "")
	nobody := rs.sign(t, i.claims("sub", "carol"))
	wantError(t, d.send(nobody, "GET", "/instances", ""), 403, CodeForbidden, "")
	events, err := d.store.FindEvents(t.Context(), admin.EventFilter{Actor: "oidc:" + i.url + "#carol"}, admin.EventPlace{}, 10)
	if err != nil || len(events) != 1 || events[0].Action != "authenticate" || events[0].Refused != CodeForbidden {
		t.Errorf("got %+v, %v", events, err)
	}
	noCanary(t, d.log.String(), user, nobody)
}

func TestEmailOnlyIfVerified(t *testing.T) {
	s := newSigner(t, "k", jose.RS256)
	i := newIssuer(t, s)
	config := i.config()
	config.UPNClaim, config.UPNSuffix = "email", ""
	d := trusting(t, nil, config)
	for _, tt := range []struct {
		verified any
		good     bool
	}{{true, true}, {false, false}, {nil, false}, {"true", false}, {1, false}} {
		got, err := d.svc.Authenticate(t.Context(), s.sign(t, i.claims("groups", "users", "email", "ann@example.com", "email_verified", tt.verified)))
		if (err == nil) != tt.good || (got.UserPrincipalName == "ann@example.com") != tt.good {
			t.Errorf("email_verified %v: got %+v, %v", tt.verified, got, err)
		}
	}
}

func TestOIDCTokensThatAreRefused(t *testing.T) {
	good, stranger := newSigner(t, "k", jose.RS256), newSigner(t, "k", jose.RS256)
	i := newIssuer(t, good)
	d := trusting(t, nil, i.config())
	d.instance(t, "a")
	at := func(after time.Duration) int64 { return time.Now().Add(after).Unix() }
	token := func(and ...any) apikey.Secret {
		return good.sign(t, i.claims(append([]any{"roles", "owners"}, and...)...))
	}
	read[any](t, d.send(token(), "GET", "/instances", ""), 200)
	// Within the clock's skew.
	read[any](t, d.send(token("exp", at(-30*time.Second)), "GET", "/instances", ""), 200)
	read[any](t, d.send(token("nbf", at(30*time.Second)), "GET", "/instances", ""), 200)
	read[any](t, d.send(token("aud", []string{"other", "keyward"}), "GET", "/instances", ""), 200)

	valid := token().Reveal()
	parts := strings.Split(valid, ".")
	b64 := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	public, err := json.Marshal(jose.JSONWebKey{Key: good.key.Public(), KeyID: "k"})
	if err != nil {
		t.Fatal(err)
	}
	// A server that would be asked if an address in a token were followed.
	asked := false
	thief := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	for name, secret := range map[string]apikey.Secret{
		"expired":                        token("exp", at(-2*time.Minute)),
		"no expiry":                      token("exp", nil),
		"not yet valid":                  token("nbf", at(2*time.Minute)),
		"not-before as text":             token("nbf", "soon"),
		"not before the end of time":     token("nbf", 1e300),
		"another subject in capitals":    token("SUB", "root"),
		"another end, folded":            token("exp", at(-2*time.Minute), "Exp", at(time.Hour)),
		"another audience in capitals":   token("aud", "other", "zAUD", 1, "AUD", "keyward"),
		"a subject by Unicode's folding": token("sub", "x", "\u017fub", "root"),
		"another audience":               token("aud", "other"),
		"no audience":                    token("aud", nil),
		"another issuer":                 token("iss", "https://other.example"),
		"issuer with a slash":            token("iss", i.url+"/"),
		"issuer to be fetched":           token("iss", thief),
		"no subject":                     token("sub", nil),
		"empty subject":                  token("sub", ""),
		"long subject":                   token("sub", strings.Repeat("x", 256)),
		"subject of two lines":           token("sub", "a\nb"),
		"subject that is a secret":       token("sub", "x"+apikey.Format{}.New(apikey.KindUser).Reveal()),
		"a nonce":                        token("nonce", "n"),
		"another key of the same id":     stranger.sign(t, i.claims("roles", "owners")),
		"HS256 under the public key":     sign(t, jose.SigningKey{Algorithm: jose.HS256, Key: public}, i.claims("roles", "owners")),
		"no signature":                   apikey.NewSecret(b64(`{"alg":"none"}`) + "." + parts[1] + "."),
		"alg none with a signature":      apikey.NewSecret(b64(`{"alg":"none","kid":"k"}`) + "." + parts[1] + "." + parts[2]),
		"an algorithm that is not named": newSignerToken(t, good, jose.PS256, i.claims("roles", "owners")),
		"a key brought along":            withHeader(t, stranger, map[jose.HeaderKey]any{"jwk": json.RawMessage(public)}, i.claims("roles", "owners")),
		"an address of keys":             withHeader(t, stranger, map[jose.HeaderKey]any{"jku": thief + "/keys", "x5u": thief}, i.claims("roles", "owners")),
		"claims changed":                 apikey.NewSecret(parts[0] + "." + b64(`{"iss":"`+i.url+`","aud":"keyward","sub":"x","exp":9999999999,"roles":"owners"}`) + "." + parts[2]),
		"cut off":                        apikey.NewSecret(valid[:len(valid)-10]),
		"four parts":                     apikey.NewSecret(valid + ".x"),
		"two dots":                       apikey.NewSecret(".."),
		"garbage":                        apikey.NewSecret("a.b.c"),
		"huge":                           apikey.NewSecret(parts[0] + "." + b64(strings.Repeat("x", 20<<10)) + "." + parts[2]),
	} {
		w := d.send(secret, "GET", "/instances", "")
		if w.Code != 401 {
			t.Errorf("%s: got %d %s", name, w.Code, w.Body)
			continue
		}
		wantError(t, w, 401, CodeUnauthorized, "")
	}
	if asked {
		t.Error("an address in a token was followed")
	}
	if strings.Contains(d.log.String(), parts[2]) {
		t.Error("a token is in the log")
	}
	// With a nonce where the configuration says that it does not matter.
	config := i.config()
	config.AllowNonce = true
	lenient := trusting(t, nil, config)
	read[any](t, lenient.send(token("nonce", "n"), "GET", "/instances", ""), 200)
}

func newSignerToken(t *testing.T, s signer, algorithm jose.SignatureAlgorithm, claims map[string]any) apikey.Secret {
	t.Helper()
	s.algorithm = algorithm
	return s.sign(t, claims)
}

// withHeader signs with more in the token's header.
func withHeader(t *testing.T, s signer, header map[jose.HeaderKey]any, claims map[string]any) apikey.Secret {
	t.Helper()
	made, err := jose.NewSigner(jose.SigningKey{Algorithm: s.algorithm, Key: jose.JSONWebKey{Key: s.key, KeyID: s.kid}}, &jose.SignerOptions{ExtraHeaders: header})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := made.Sign(text)
	if err != nil {
		t.Fatal(err)
	}
	compact, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return apikey.NewSecret(compact)
}

// inBubble sends requests to an issuer without a network, so that time can be made to pass.
type inBubble struct{ handler http.Handler }

func (b inBubble) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	b.handler.ServeHTTP(w, r)
	return w.Result(), nil
}

func TestOIDCKeysRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second, stranger := newSigner(t, "1", jose.RS256), newSigner(t, "2", jose.RS256), newSigner(t, "9", jose.RS256)
		i := &issuer{url: "https://login.example"}
		i.publish(first)
		d := trusting(t, &http.Client{Transport: inBubble{i}}, i.config())
		status := func(s signer) int {
			return d.send(s.sign(t, i.claims("roles", "owners")), "GET", "/instances", "").Code
		}
		want := func(s signer, code int) {
			t.Helper()
			if got := status(s); got != code {
				t.Errorf("key %s: got %d, want %d", s.kid, got, code)
			}
		}
		want(first, 200)
		// Tokens that nobody signed cannot make the server ask the issuer again and again.
		for range 100 {
			want(stranger, 401)
		}
		if n := i.fetches.Load(); n != 1 {
			t.Errorf("asked %d times", n)
		}
		time.Sleep(5 * time.Second)
		want(stranger, 401)
		if n := i.fetches.Load(); n != 2 {
			t.Errorf("asked %d times", n)
		}
		// A new key is known at its first use, beside the old one.
		time.Sleep(5 * time.Second)
		i.publish(first, second)
		want(second, 200)
		want(first, 200)
		// A key that is withdrawn stops within ten minutes, and needs no other to be seen.
		i.publish(second)
		time.Sleep(10*time.Minute + time.Second)
		want(first, 401)
		want(second, 200)
		// While the issuer is away its keys go on for a day; who is not known gets no 401.
		i.down.Store(true)
		time.Sleep(time.Hour)
		want(second, 200)
		want(stranger, 503)
		time.Sleep(24 * time.Hour)
		want(second, 503)
		i.down.Store(false)
		time.Sleep(5 * time.Second)
		want(second, 200)
		want(stranger, 401)
	})
}

// A start does not wait for an issuer, and management tokens do not either.
func TestIssuerThatIsAway(t *testing.T) {
	s := newSigner(t, "k", jose.RS256)
	listener, err := net.Listen("tcp", "127.0.0.1:0") // nobody answers
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	i := &issuer{url: "http://" + listener.Addr().String()}
	d := trusting(t, &http.Client{Timeout: 100 * time.Millisecond}, i.config())
	read[any](t, d.send(d.owner, "GET", "/instances", ""), 200)
	w := d.send(s.sign(t, i.claims("roles", "owners")), "GET", "/instances", "")
	wantError(t, w, 503, CodeServiceUnavailable, "")
	if w.Header().Get("Retry-After") == "" || w.Header().Get("WWW-Authenticate") != "" {
		t.Errorf("headers %v", w.Header())
	}
}

func TestDiscoveryIsNotBelievedBlindly(t *testing.T) {
	s := newSigner(t, "k", jose.RS256)
	thief := newIssuer(t, s)
	redirect := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, thief.url+"/keys", http.StatusFound)
	}))
	for name, change := range map[string]func(*issuer){
		"keys in a file":               func(i *issuer) { i.jwksURI = "file:///etc/passwd" },
		"keys behind a redirect":       func(i *issuer) { i.jwksURI = redirect + "/keys" },
		"a document of another issuer": func(i *issuer) { i.name = "https://other.example" },
		"no keys":                      func(i *issuer) { i.publish() },
		"a secret for a key": func(i *issuer) {
			i.keys.Store(&jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: []byte("0123456789abcdef0123456789abcdef"), KeyID: "k"}}})
		},
	} {
		i := newIssuer(t, s)
		change(i)
		d := trusting(t, nil, i.config())
		if w := d.send(s.sign(t, i.claims("roles", "owners")), "GET", "/instances", ""); w.Code != 503 {
			t.Errorf("%s: got %d %s", name, w.Code, w.Body)
		}
	}
	if thief.fetches.Load() != 0 {
		t.Error("a redirect was followed")
	}
	// Who answers at the other address would be believed.
	i := &issuer{url: "https://login.example", jwksURI: "http://keys.example/keys"}
	i.publish(s)
	d := trusting(t, &http.Client{Transport: inBubble{i}}, i.config())
	if w := d.send(s.sign(t, i.claims("roles", "owners")), "GET", "/instances", ""); w.Code != 503 || i.fetches.Load() != 0 {
		t.Errorf("keys over plain HTTP: got %d %s", w.Code, w.Body)
	}
}

func TestOIDCConfigurationIsChecked(t *testing.T) {
	i := &issuer{url: "https://login.example"}
	for field, change := range map[string]func(*admin.OIDCIssuer){
		"issuer":                 func(c *admin.OIDCIssuer) { c.Issuer = "http://login.example" },
		"issuer ":                func(c *admin.OIDCIssuer) { c.Issuer = "https://login.example#x" },
		"issuer  ":               func(c *admin.OIDCIssuer) { c.Issuer = "" },
		"jwksURL":                func(c *admin.OIDCIssuer) { c.JWKSURL = "http://login.example/keys" },
		"audience":               func(c *admin.OIDCIssuer) { c.Audience = "" },
		"algorithms":             func(c *admin.OIDCIssuer) { c.Algorithms = []string{"RS256", "HS256"} },
		"algorithms ":            func(c *admin.OIDCIssuer) { c.Algorithms = []string{"none"} },
		"upnSuffix":              func(c *admin.OIDCIssuer) { c.UPNSuffix = "example.com" },
		"upnSuffix ":             func(c *admin.OIDCIssuer) { c.UPNSuffix = "@" },
		"upnClaim":               func(c *admin.OIDCIssuer) { c.UPNClaim = "" },
		"roles":                  func(c *admin.OIDCIssuer) { c.Rules = nil },
		"roles[0].claim":         func(c *admin.OIDCIssuer) { c.Rules[0].Claim = "" },
		"roles[0].value":         func(c *admin.OIDCIssuer) { c.Rules[0].Value = "*" }, // of owner
		"roles[0].value ":        func(c *admin.OIDCIssuer) { c.Rules[0].Value = "" },
		"roles[0].role":          func(c *admin.OIDCIssuer) { c.Rules[0].Role = "" },
		"roles[1].instance":      func(c *admin.OIDCIssuer) { c.Rules[1].InstanceID = "a/b" },
		"roles[1].instanceClaim": func(c *admin.OIDCIssuer) { c.Rules[1].InstanceClaim = "x" },
	} {
		config := i.config()
		change(&config)
		_, err := admin.NewOIDC([]admin.OIDCIssuer{config}, nil)
		if bad, ok := errors.AsType[*apikey.InvalidError](err); !ok || bad.Field != "oidc[0]."+strings.TrimSpace(field) {
			t.Errorf("%s: got %v", field, err)
		}
	}
	// Two issuers: each its own users.
	one, two := i.config(), i.config()
	two.Issuer = "https://other.example"
	for name, tt := range map[string]struct {
		suffix string
		good   bool
	}{"none": {"", false}, "the same": {"@Example.com", false}, "its own": {"@other.example", true}} {
		two.UPNSuffix = tt.suffix
		if _, err := admin.NewOIDC([]admin.OIDCIssuer{one, two}, nil); (err == nil) != tt.good {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := admin.NewOIDC([]admin.OIDCIssuer{one, one}, nil); err == nil {
		t.Error("one issuer twice")
	}
	local := i.config()
	local.Issuer = "http://127.0.0.1:1"
	if _, err := admin.NewOIDC([]admin.OIDCIssuer{local}, nil); err != nil {
		t.Error(err)
	}
}

// TestCreationsAreCountedByIdentity: neither a name that others have too, nor another name for oneself, changes
// how many keys a user may make within an hour.
func TestCreationsAreCountedByIdentity(t *testing.T) {
	s := newSigner(t, "1", jose.RS256)
	here, there := newIssuer(t, s), newIssuer(t, s)
	config := func(i *issuer, suffix string) admin.OIDCIssuer {
		return admin.OIDCIssuer{
			Issuer: i.url, Audience: "keyward", UPNClaim: "upn", UPNSuffix: suffix,
			Rules: []admin.OIDCRule{{Claim: "groups", Value: "users", Role: admin.RoleUser, InstanceID: "a"}},
		}
	}
	d := trusting(t, nil, config(here, "@example.com"), config(there, "@example.org"))
	if _, err := d.svc.PutInstance(t.Context(), root, "a", apikey.Policy{
		Caps: apikey.Caps{User: apikey.Unlimited}, Creation: apikey.Creation{PerHour: apikey.Unlimited, PerHourAndUser: 2},
	}); err != nil {
		t.Fatal(err)
	}
	makes := func(who string, caller apikey.Secret, wants ...int) {
		t.Helper()
		for n, want := range wants {
			if w := d.send(caller, "POST", aKeys, `{"name":"n"}`); w.Code != want {
				t.Errorf("%s, key %d: got %d %s, want %d", who, n+1, w.Code, w.Body, want)
			}
		}
	}
	ann := admin.TokenInput{Name: "ann's", Role: admin.RoleUser, UserPrincipalName: "ann@example.com"}
	makes("a token", d.token(t, ann).Secret, 201, 201, 429)
	makes("another token of the same name", d.token(t, ann).Secret, 201, 201, 429)
	of := func(i *issuer, and ...any) apikey.Secret {
		return s.sign(t, i.claims(append([]any{"groups", "users", "name", "Ann"}, and...)...))
	}
	makes("who an issuer knows", of(here, "upn", "ann@example.com"), 201, 201, 429)
	makes("the same by another name", of(here, "upn", "ann.married@example.com", "name", "Ann Other"), 429)
	makes("somebody else of the same name", of(here, "upn", "ann@example.com", "sub", "ann2"), 201, 201, 429)
	makes("the same subject of another issuer", of(there, "upn", "ann@example.org"), 201, 201, 429)
}
