package portal

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// An issuer is one on this machine, where everybody is signed in already: who is sent there is sent back.
type issuer struct {
	*httptest.Server
	t   *testing.T
	key *rsa.PrivateKey

	mu        sync.Mutex
	codes     map[string]url.Values // of the requests that they were given for; each works once
	claims    func(claims map[string]any)
	sign      func(claims []byte) string // nil: as it should be
	namesIss  bool
	publicKey bool // the client has no secret
	away      bool
	stranger  bool // the client is none that it knows
	asked     int  // to exchange a code
}

// issuerKey is made once: it takes a while.
var issuerKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

const (
	portalURL    = "http://localhost"
	clientID     = "keyward-portal"
	clientSecret = "s3cret of the client"
)

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i := &issuer{t: t, key: issuerKey(), codes: map[string]url.Values{}, claims: func(map[string]any) {}, namesIss: true}
	i.Server = httptest.NewServer(i)
	t.Cleanup(i.Close)
	return i
}

// inBubble sends requests to an issuer without a network, so that time can be made to pass.
type inBubble struct{ handler http.Handler }

func (b inBubble) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	b.handler.ServeHTTP(w, r)
	return w.Result(), nil
}

func (i *issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case i.away:
		http.Error(w, "away", http.StatusBadGateway)
	case r.URL.Path == "/.well-known/openid-configuration":
		_ = json.NewEncoder(w).Encode(map[string]any{
			"issuer": i.URL, "jwks_uri": i.URL + "/keys", "authorization_endpoint": i.URL + "/authorize?tenant=1", "token_endpoint": i.URL + "/token",
			"authorization_response_iss_parameter_supported": i.namesIss,
		})
	case r.URL.Path == "/keys":
		_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: i.key.Public(), KeyID: "1", Algorithm: "RS256", Use: "sig"}}})
	case r.URL.Path == "/token":
		i.asked++
		if err := r.ParseForm(); err != nil {
			i.t.Error(err)
		}
		asked, known := i.codes[r.PostForm.Get("code")]
		delete(i.codes, r.PostForm.Get("code"))
		id, secret, _ := r.BasicAuth()
		if i.publicKey {
			id, secret = r.PostForm.Get("client_id"), url.QueryEscape(clientSecret)
		}
		challenge := sha256.Sum256([]byte(r.PostForm.Get("code_verifier")))
		switch {
		case i.stranger || id != clientID || secret != url.QueryEscape(clientSecret):
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"error":"invalid_client","error_description":"`+clientSecret+`"}`)
			return
		case !known, r.PostForm.Get("redirect_uri") != asked.Get("redirect_uri"), base64.RawURLEncoding.EncodeToString(challenge[:]) != asked.Get("code_challenge"):
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadRequest)
			_, _ = io.WriteString(w, `{"error":"invalid_grant"}`)
			return
		}
		claims := map[string]any{
			"iss": i.URL, "aud": clientID, "sub": "ann", "exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(),
			"nonce": asked.Get("nonce"), "roles": []string{"keys"}, "upn": ann,
		}
		i.claims(claims)
		text, err := json.Marshal(claims)
		if err != nil {
			i.t.Error(err)
		}
		sign := i.sign
		if sign == nil {
			sign = func(claims []byte) string {
				return signed(i.t, jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: i.key, KeyID: "1"}}, claims)
			}
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{"access_token": "none of ours", "token_type": "Bearer", "id_token": sign(text)})
	default:
		http.NotFound(w, r)
	}
}

func signed(t *testing.T, key jose.SigningKey, claims []byte) string {
	signer, err := jose.NewSigner(key, nil)
	if err != nil {
		t.Error(err)
		return ""
	}
	made, err := signer.Sign(claims)
	if err != nil {
		t.Error(err)
		return ""
	}
	compact, err := made.CompactSerialize()
	if err != nil {
		t.Error(err)
	}
	return compact
}

// authorize is what the issuer's page does: it sends back with a code.
func (i *issuer) authorize(to string) (back string) {
	i.t.Helper()
	u, err := url.Parse(to)
	if err != nil || !strings.HasPrefix(to, i.URL+"/authorize?") {
		i.t.Fatalf("sent to %q, %v", to, err)
	}
	asked := u.Query()
	for name, want := range map[string]string{
		"tenant": "1", "response_type": "code", "client_id": clientID, "redirect_uri": portalURL + admin.LoginPath, "code_challenge_method": "S256", "scope": "openid profile email",
	} {
		if asked.Get(name) != want {
			i.t.Errorf("%s: %q, want %q", name, asked.Get(name), want)
		}
	}
	code := rand.Text()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.codes[code] = asked
	q := url.Values{"code": {code}, "state": {asked.Get("state")}}
	if i.namesIss {
		q.Set("iss", i.URL)
	}
	return admin.LoginPath + "?" + q.Encode()
}

// withIssuer returns a desk that signs people in with an issuer, too.
func withIssuer(t *testing.T, i *issuer) *desk {
	t.Helper()
	return withIssuerBy(t, i, nil)
}

// withIssuerBy asks the issuer by a client; nil: over the network.
func withIssuerBy(t *testing.T, i *issuer, client *http.Client) *desk {
	t.Helper()
	d := newDesk(t)
	known, err := admin.NewOIDC([]admin.OIDCIssuer{{
		Issuer: i.URL, Audience: "the management API", UPNClaim: "upn",
		Rules: []admin.OIDCRule{{Claim: "roles", Value: "keys", Role: admin.RoleOperator, InstanceID: instance}, {Claim: "roles", Value: "mine", Role: admin.RoleUser, InstanceID: instance}},
	}}, client)
	if err != nil {
		t.Fatal(err)
	}
	config := admin.OIDCLoginConfig{Issuer: i.URL, ClientID: clientID, RedirectURL: portalURL + admin.LoginPath, ClientSecret: apikey.NewSecret(clientSecret)}
	if i.publicKey {
		config.ClientSecret = apikey.Secret{}
	}
	if d.cfg.Login, err = admin.NewOIDCLogin(known, config); err != nil {
		t.Fatal(err)
	}
	d.web = New(d.svc, d.cfg)
	return d
}

// leave begins to sign in and returns what the issuer sends the browser back to.
func (b *browser) leave(i *issuer, next string) (back string) {
	b.d.t.Helper()
	resp := b.do(http.MethodGet, "/sign-in/oidc?next="+url.QueryEscape(next), nil)
	if resp.StatusCode != http.StatusSeeOther {
		b.d.t.Fatalf("status %d: %s", resp.StatusCode, text(b.d.t, resp))
	}
	return i.authorize(resp.Header.Get("Location"))
}

func TestSignInByOIDC(t *testing.T) {
	for name, public := range map[string]bool{"with a secret": false, "without": true} {
		t.Run(name, func(t *testing.T) {
			i := newIssuer(t)
			i.publicKey = public
			d := withIssuer(t, i)
			b := d.browser()
			if _, page := b.get("/sign-in?next=/instances"); !strings.Contains(page, `href="/sign-in/oidc?next=%2finstances"`) || !strings.Contains(page, "Sign in with "+d.cfg.Login.Host()) {
				t.Errorf("no way to the issuer in %s", page)
			}
			resp := b.do(http.MethodGet, b.leave(i, "/instances/"+instance+"/keys?status=active"), nil)
			status, page := b.follow(resp)
			if status != http.StatusOK || !strings.Contains(page, "<strong>"+i.URL+"#ann</strong>") {
				t.Errorf("status %d: %s", status, page)
			}
			if to := resp.Header.Get("Location"); to != "/signed-in?next="+url.QueryEscape("/instances/"+instance+"/keys?status=active") {
				t.Errorf("then to %q", to)
			}
			if len(b.cookies) != 1 || b.cookies[sessionCookie] == "" {
				t.Errorf("cookies %v", b.cookies)
			}
		})
	}
}

// TestOIDCSessionEndsWithItsToken, however long portal.most is.
func TestOIDCSessionEndsWithItsToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{Server: &httptest.Server{URL: "https://login.example"}, t: t, key: issuerKey(), codes: map[string]url.Values{}, namesIss: true}
		i.claims = func(c map[string]any) { c["exp"] = time.Now().Add(10 * time.Minute).Unix() }
		d := withIssuerBy(t, i, &http.Client{Transport: inBubble{i}})
		b := d.browser()
		if resp := b.do(http.MethodGet, b.leave(i, "/"), nil); resp.StatusCode != http.StatusSeeOther {
			t.Fatalf("status %d", resp.StatusCode)
		}
		time.Sleep(11*time.Minute - time.Millisecond) // a minute for clocks
		signedIn(t, b)
		time.Sleep(2 * time.Millisecond)
		signedOut(t, b)
	})
}

// TestOIDCSessionIsEnded by an owner, at once, and nobody else's with it.
func TestOIDCSessionIsEnded(t *testing.T) {
	i := newIssuer(t)
	d := withIssuer(t, i)
	signIn := func(subject string) *browser {
		i.mu.Lock()
		i.claims = func(c map[string]any) { c["sub"] = subject }
		i.mu.Unlock()
		b := d.browser()
		b.do(http.MethodGet, b.leave(i, "/"), nil)
		signedIn(t, b)
		return b
	}
	first, second, other, byToken := signIn("ann"), signIn("ann"), signIn("bob"), d.signIn(admin.RoleOwner)
	for _, step := range []struct {
		whose admin.WhoseSessions
		out   []*browser
		in    []*browser
	}{
		{admin.WhoseSessions{Actor: "oidc:" + i.URL + "#ann"}, []*browser{first, second}, []*browser{other, byToken}},
		{admin.WhoseSessions{All: true}, []*browser{other, byToken}, nil},
	} {
		if n, err := d.svc.EndSessions(t.Context(), d.owner, step.whose); n != 2 || err != nil {
			t.Errorf("%+v: %d ended, %v", step.whose, n, err)
		}
		for _, b := range step.out {
			signedOut(t, b)
		}
		for _, b := range step.in {
			signedIn(t, b)
		}
	}
	signIn("ann") // anew, as long as the issuer gives a role
}

// TestWrongAnswersAreThrottledBySource: what comes back costs the issuer a call, so an address cannot have many made.
func TestWrongAnswersAreThrottledBySource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // in which no time passes by itself
		i := &issuer{Server: &httptest.Server{URL: "https://login.example"}, t: t, key: issuerKey(), codes: map[string]url.Values{}, claims: func(map[string]any) {}, namesIss: true}
		d := withIssuerBy(t, i, &http.Client{Transport: inBubble{i}})
		b := d.browser()
		b.from = "192.0.2.1"
		guess := func() int {
			t.Helper()
			kept := strings.Repeat("s", 43)
			b.cookies[loginCookie] = kept + "." + kept + "." + kept + "."
			return b.do(http.MethodGet, admin.LoginPath+"?state="+kept+"&code=guessed&iss="+url.QueryEscape(i.URL), nil).StatusCode
		}
		for n := range 200 {
			want := http.StatusUnauthorized
			if n >= int(wrongTokens.Burst) {
				want = http.StatusTooManyRequests
			}
			b.header = http.Header{"X-Forwarded-For": {fmt.Sprint("192.0.2.", n)}, "X-Real-Ip": {fmt.Sprint("192.0.2.", n)}} // as anybody can say
			if got := guess(); got != want {
				t.Fatalf("guess %d: %d, want %d", n, got, want)
			}
		}
		if i.asked != int(wrongTokens.Burst) {
			t.Errorf("the issuer was asked %d times", i.asked)
		}
		// Tokens that are none come out of the same budget.
		if got := b.do(http.MethodPost, "/sign-in", url.Values{"token": {"kwm_wrong"}}).StatusCode; got != http.StatusTooManyRequests {
			t.Errorf("a token: %d", got)
		}
		other := d.browser()
		other.from = "192.0.2.2"
		for range 100 { // right ones cost nothing
			if got := other.do(http.MethodGet, other.leave(i, "/"), nil).StatusCode; got != http.StatusSeeOther {
				t.Fatalf("somebody else cannot sign in: %d", got)
			}
		}
		time.Sleep(wrongTokens.Interval)
		if first, second := guess(), guess(); first != http.StatusUnauthorized || second != http.StatusTooManyRequests {
			t.Errorf("after a while: %d, %d", first, second)
		}
	})
}

// TestForgedAnswers: nobody is signed in by what is not the answer of that issuer, for that client, to that browser,
// for the first time; and no page repeats what came.
func TestForgedAnswers(t *testing.T) {
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	claim := func(name string, value any) func(i *issuer) {
		return func(i *issuer) {
			i.claims = func(c map[string]any) {
				if c[name] = value; value == nil {
					delete(c, name)
				}
			}
		}
	}
	query := func(change func(q url.Values)) func(t *testing.T, i *issuer, b *browser, back string) string {
		return func(_ *testing.T, _ *issuer, _ *browser, back string) string {
			u, _ := url.Parse(back)
			q := u.Query()
			change(q)
			return u.Path + "?" + q.Encode()
		}
	}
	for name, test := range map[string]struct {
		issuer func(i *issuer)
		back   func(t *testing.T, i *issuer, b *browser, back string) string
		status int // 401 unless set
	}{
		"a good one":            {status: http.StatusSeeOther},
		"an issuer without iss": {issuer: func(i *issuer) { i.namesIss = false }, status: http.StatusSeeOther},
		"two audiences, made for us": {issuer: func(i *issuer) {
			i.claims = func(c map[string]any) { c["aud"], c["azp"] = []string{clientID, "x"}, clientID }
		}, status: http.StatusSeeOther},
		"for another client":      {issuer: claim("aud", "another")},
		"for the Management API":  {issuer: claim("aud", "the management API")},
		"two audiences":           {issuer: claim("aud", []string{clientID, "x"})},
		"made for another client": {issuer: claim("azp", "another")},
		"another issuer's token":  {issuer: claim("iss", "https://evil.example")},
		"no nonce":                {issuer: claim("nonce", nil)},
		"another nonce":           {issuer: claim("nonce", "x")},
		"a nonce that is no text": {issuer: claim("nonce", 1)},
		"expired":                 {issuer: claim("exp", time.Now().Add(-time.Hour).Unix())},
		"not yet":                 {issuer: claim("nbf", time.Now().Add(time.Hour).Unix())},
		"nobody":                  {issuer: claim("sub", "")},
		"without a role":          {issuer: claim("roles", []string{"others"}), status: http.StatusForbidden},
		"a user without a name":   {issuer: func(i *issuer) { i.claims = func(c map[string]any) { c["roles"], c["upn"] = "mine", nil } }, status: http.StatusForbidden},
		"a token that is none":    {issuer: func(i *issuer) { i.sign = func([]byte) string { return "none" } }},
		"no token":                {issuer: func(i *issuer) { i.sign = func([]byte) string { return "" } }},
		"signed by somebody else": {issuer: func(i *issuer) {
			i.sign = func(c []byte) string {
				return signed(t, jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: other, KeyID: "1"}}, c)
			}
		}},
		"signed with the client secret": {issuer: func(i *issuer) {
			i.sign = func(c []byte) string {
				return signed(t, jose.SigningKey{Algorithm: jose.HS256, Key: []byte(strings.Repeat(clientSecret, 2))}, c)
			}
		}},
		"not signed": {issuer: func(i *issuer) {
			i.sign = func(c []byte) string {
				return base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + base64.RawURLEncoding.EncodeToString(c) + "."
			}
		}},
		"another state":       {back: query(func(q url.Values) { q.Set("state", "x") })},
		"no state":            {back: query(func(q url.Values) { q.Del("state") })},
		"two states":          {back: query(func(q url.Values) { q.Add("state", "x") })},
		"no code":             {back: query(func(q url.Values) { q.Del("code") })},
		"two codes":           {back: query(func(q url.Values) { q.Add("code", "x") })},
		"another code":        {back: query(func(q url.Values) { q.Set("code", "x") })},
		"from another issuer": {back: query(func(q url.Values) { q.Set("iss", "https://evil.example") })},
		"from nobody":         {back: query(func(q url.Values) { q.Del("iss") })},
		"refused there": {back: query(func(q url.Values) {
			q.Del("code")
			q.Set("error", "access_denied")
			q.Set("error_description", "<b>evil</b>")
		})},
		"in another browser": {back: func(_ *testing.T, _ *issuer, b *browser, back string) string {
			b.cookies = map[string]string{}
			return back
		}},
		"in another browser that has begun, too": {back: func(_ *testing.T, i *issuer, b *browser, back string) string {
			b.leave(i, "/")
			return back
		}},
		// What an attacker began is put into the way of somebody's own.
		"a code of another's": {back: func(t *testing.T, i *issuer, b *browser, back string) string {
			theirs, _ := url.Parse(b.d.browser().leave(i, "/"))
			return query(func(q url.Values) { q.Set("code", theirs.Query().Get("code")) })(t, i, b, back)
		}},
		"again": {back: func(t *testing.T, _ *issuer, b *browser, back string) string {
			kept := b.cookies[loginCookie]
			if resp := b.do(http.MethodGet, back, nil); resp.StatusCode != http.StatusSeeOther {
				t.Errorf("the first time: %d", resp.StatusCode)
			}
			if _, there := b.cookies[loginCookie]; there {
				t.Error("the answer can be given again")
			}
			b.cookies = map[string]string{loginCookie: kept}
			return back
		}},
		"a cookie that is none": {back: func(_ *testing.T, _ *issuer, b *browser, back string) string {
			b.cookies[loginCookie] = "..."
			return back
		}},
		"an empty flow": {back: func(_ *testing.T, _ *issuer, b *browser, _ string) string {
			b.cookies[loginCookie] = "..." + base64.RawURLEncoding.EncodeToString([]byte("/"))
			return admin.LoginPath + "?state=&code=x&iss=" + url.QueryEscape(b.d.cfg.Login.Host())
		}},
		"the client's secret is wrong": {issuer: func(i *issuer) { i.stranger = true }, status: http.StatusServiceUnavailable},
		"while the issuer is away": {back: func(_ *testing.T, i *issuer, _ *browser, back string) string {
			i.mu.Lock()
			defer i.mu.Unlock()
			i.away = true
			return back
		}, status: http.StatusServiceUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			i := newIssuer(t)
			if test.issuer != nil {
				test.issuer(i)
			}
			d := withIssuer(t, i)
			var log strings.Builder
			d.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
			d.web = New(d.svc, d.cfg)
			b := d.browser()
			back := b.leave(i, "/")
			if test.back != nil {
				back = test.back(t, i, b, back)
			}
			want := test.status
			if want == 0 {
				want = http.StatusUnauthorized
			}
			resp := b.do(http.MethodGet, back, nil)
			page := text(t, resp)
			if resp.StatusCode != want || (b.cookies[sessionCookie] != "") != (want == http.StatusSeeOther) {
				t.Errorf("status %d, want %d; cookies %v: %s", resp.StatusCode, want, b.cookies, page)
			}
			u, _ := url.Parse(back)
			for _, secret := range []string{clientSecret, u.Query().Get("code"), "evil"} {
				if len(secret) > 2 && (strings.Contains(page, secret) || strings.Contains(log.String(), secret)) {
					t.Errorf("%q is in the page or the log: %s\n%s", secret, page, &log)
				}
			}
		})
	}
}

// TestOIDCSendsNobodyElsewhere: not by the address to go on to, not by one that a client claims to be at.
func TestOIDCSendsNobodyElsewhere(t *testing.T) {
	i := newIssuer(t)
	d := withIssuer(t, i)
	for _, evil := range []string{"https://evil.example", "//evil.example", "/\\evil.example", "/" + strings.Repeat("x", 5000)} {
		b := d.browser()
		b.header.Set("X-Forwarded-Host", "evil.example")
		resp := b.do(http.MethodGet, b.leave(i, evil), nil)
		if to := resp.Header.Get("Location"); to != "/signed-in?next=%2F" {
			t.Errorf("%.30s: sent to %q", evil, to)
		}
		// The cookie is this browser's own, but what is in it is judged again.
		b = d.browser()
		back := b.leave(i, "/")
		parts := strings.Split(b.cookies[loginCookie], ".")
		b.cookies[loginCookie] = strings.Join(parts[:3], ".") + "." + base64.RawURLEncoding.EncodeToString([]byte("https://evil.example"))
		if to := b.do(http.MethodGet, back, nil).Header.Get("Location"); to != "/signed-in?next=%2F" {
			t.Errorf("by its cookie: sent to %q", to)
		}
	}
	c := d.browser().do(http.MethodGet, "/sign-in/oidc", nil).Cookies()[0]
	if c.Name != loginCookie || !c.Secure || !c.HttpOnly || c.Path != "/" || c.Domain != "" || c.SameSite != http.SameSiteLaxMode || c.MaxAge != 600 {
		t.Errorf("the cookie is %v", c)
	}
}

// TestAnAnswerToNobodyEndsNoSignIn: a link of somebody else's, or another tab, is not what the browser waits for.
func TestAnAnswerToNobodyEndsNoSignIn(t *testing.T) {
	i := newIssuer(t)
	b := withIssuer(t, i).browser()
	first := b.leave(i, "/")
	back := b.leave(i, "/")
	for _, other := range []string{admin.LoginPath, admin.LoginPath + "?state=&code=x", admin.LoginPath + "?state=x&error=y", first} {
		if resp := b.do(http.MethodGet, other, nil); resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%.40s: %d", other, resp.StatusCode)
		}
	}
	if resp := b.do(http.MethodGet, back, nil); resp.StatusCode != http.StatusSeeOther || b.cookies[sessionCookie] == "" {
		t.Errorf("its own answer: %d", resp.StatusCode)
	}
}

// TestAnIssuerThatIsAwayIsNoDeadEnd: the page says what to do, and where somebody wanted to go is not lost.
func TestAnIssuerThatIsAwayIsNoDeadEnd(t *testing.T) {
	i := newIssuer(t)
	d := withIssuer(t, i)
	b := d.browser()
	const next = "/instances/" + instance + "/keys?status=active"
	back := b.leave(i, next)
	i.mu.Lock()
	i.away = true
	i.mu.Unlock()
	fresh := withIssuer(t, i) // which does not know the issuer yet
	for name, test := range map[string]struct {
		d  *desk
		b  *browser
		to string
	}{
		"on the way there": {fresh, fresh.browser(), "/sign-in/oidc?next=" + url.QueryEscape(next)},
		"on the way back":  {d, b, back},
	} {
		t.Run(name, func(t *testing.T) {
			resp := test.b.do(http.MethodGet, test.to, nil)
			page := text(t, resp)
			wait := resp.Header.Get("Retry-After")
			if resp.StatusCode != http.StatusServiceUnavailable || wait == "" || wait == "0" {
				t.Errorf("status %d, Retry-After %q", resp.StatusCode, wait)
			}
			for _, want := range []string{test.d.cfg.Login.Host() + " cannot be reached", "try again in " + wait + " s", `name="token"`, `value="` + html.EscapeString(next) + `"`} {
				if !strings.Contains(page, want) {
					t.Errorf("%q is not in the page: %s", want, page)
				}
			}
		})
	}
	// And the token signs in.
	if resp := fresh.browser().do(http.MethodPost, "/sign-in", url.Values{"token": {fresh.tokens[admin.RoleOwner].Secret.Reveal()}}); resp.StatusCode != http.StatusSeeOther {
		t.Errorf("with a token: %d", resp.StatusCode)
	}
}

// TestNoIssuerNoWay: without one there are no such pages.
func TestNoIssuerNoWay(t *testing.T) {
	b := newDesk(t).browser()
	for _, target := range []string{"/sign-in/oidc", admin.LoginPath + "?code=x&state=x"} {
		if resp := b.do(http.MethodGet, target, nil); resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %d", target, resp.StatusCode)
		}
	}
	if _, page := b.get("/sign-in"); strings.Contains(page, "oidc") {
		t.Error("the page offers what there is not")
	}
}
