package portal

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz/admin"
)

// signedOut fails unless a request with these cookies is sent to sign in.
func signedOut(t *testing.T, b *browser) {
	t.Helper()
	resp := b.do(http.MethodGet, "/instances/"+instance+"/keys", nil)
	if resp.StatusCode != http.StatusSeeOther || !strings.HasPrefix(resp.Header.Get("Location"), "/sign-in") {
		t.Errorf("got %d to %q, want to be sent to sign in", resp.StatusCode, resp.Header.Get("Location"))
	}
}

func signedIn(t *testing.T, b *browser) {
	t.Helper()
	if resp := b.do(http.MethodGet, "/instances/"+instance+"/keys", nil); resp.StatusCode != http.StatusOK {
		t.Errorf("got %d, want to be signed in", resp.StatusCode)
	}
}

func TestSessionCookie(t *testing.T) {
	d := newDesk(t)
	resp := d.browser().do(http.MethodPost, "/sign-in", url.Values{"token": {" " + d.tokens[admin.RoleOwner].Secret.Reveal() + "\n"}})
	if len(resp.Cookies()) != 1 {
		t.Fatalf("cookies: %v", resp.Cookies())
	}
	c := resp.Cookies()[0]
	if !strings.HasPrefix(c.Name, "__Host-") || !c.Secure || !c.HttpOnly || c.Path != "/" || c.Domain != "" || c.SameSite != http.SameSiteLaxMode || len(c.Value) != 43 {
		t.Errorf("the cookie is %v", c)
	}
}

func TestWhatEndsASession(t *testing.T) {
	d := newDesk(t)
	for name, spoil := range map[string]func(b *browser){
		"no cookie":          func(b *browser) { b.cookies = map[string]string{} },
		"another's id":       func(b *browser) { b.cookies[sessionCookie] = strings.Repeat("A", 43) },
		"a cookie of 10 KiB": func(b *browser) { b.cookies[sessionCookie] = strings.Repeat("A", 10<<10) },
		"an empty cookie":    func(b *browser) { b.cookies[sessionCookie] = "" },
		"two cookies": func(b *browser) {
			b.header.Set("Cookie", sessionCookie+"="+b.cookies[sessionCookie])
		},
		"signed out": func(b *browser) {
			kept := b.cookies[sessionCookie]
			if resp := b.post("/sign-out", nil); resp.StatusCode != http.StatusSeeOther || b.cookies[sessionCookie] != "" {
				t.Errorf("sign out: %d", resp.StatusCode)
			}
			b.cookies[sessionCookie] = kept
		},
		"signed in anew": func(b *browser) {
			kept := b.cookies[sessionCookie]
			b.do(http.MethodPost, "/sign-in", url.Values{"token": {d.tokens[admin.RoleAuditor].Secret.Reveal()}})
			signedIn(t, b)
			b.cookies[sessionCookie] = kept
		},
		"the token is revoked": func(*browser) {
			if _, err := d.svc.RevokeToken(t.Context(), d.owner, d.tokens[admin.RoleOwner].Token.ID); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			made, err := d.svc.CreateToken(t.Context(), d.owner, admin.TokenInput{Name: "one more", Role: admin.RoleOwner, InstanceID: instance})
			if err != nil {
				t.Fatal(err)
			}
			d.tokens[admin.RoleOwner] = made
			b := d.signIn(admin.RoleOwner)
			signedIn(t, b)
			spoil(b)
			signedOut(t, b)
		})
	}
}

// TestALateAnswerSignsNobodyOut: what an ended session asked for may be answered when the browser has signed in anew,
// and would take the new cookie away.
func TestALateAnswerSignsNobodyOut(t *testing.T) {
	d := newDesk(t)
	b := d.signIn(admin.RoleOwner)
	old := map[string]string{sessionCookie: b.cookies[sessionCookie]}
	b.do(http.MethodPost, "/sign-in", url.Values{"token": {d.tokens[admin.RoleOwner].Secret.Reveal()}}) // which ends the one before
	late := &browser{d: d, cookies: old, header: http.Header{}}
	for _, unattendedly := range []bool{false, true} {
		if unattendedly {
			late.header = http.Header{unattended: {"1"}, "Hx-Request": {"true"}}
		}
		for method, target := range map[string]string{http.MethodGet: "/instances/" + instance + "/keys", http.MethodPost: "/sign-out"} {
			var form url.Values
			if method == http.MethodPost {
				form = url.Values{"form": {late.formToken()}}
			}
			resp := late.do(method, target, form)
			if to := resp.Header.Get("Location") + resp.Header.Get("Hx-Redirect"); !strings.HasPrefix(to, "/sign-in") {
				t.Errorf("%s: sent to %q", method, to)
			}
			if set := resp.Header["Set-Cookie"]; set != nil {
				t.Errorf("%s by a session that is over changes cookies: %q", method, set)
			}
		}
	}
	signedIn(t, b)
}

func TestSignInTakesNoSessionThatIsThere(t *testing.T) {
	d := newDesk(t)
	b := d.browser()
	fixed := strings.Repeat("C", 43)
	b.cookies[sessionCookie] = fixed
	b.do(http.MethodPost, "/sign-in", url.Values{"token": {d.tokens[admin.RoleOwner].Secret.Reveal()}})
	if b.cookies[sessionCookie] == fixed {
		t.Error("who knew the cookie before is signed in with it")
	}
	signedIn(t, b)
	b.cookies[sessionCookie] = fixed
	signedOut(t, b)
}

func TestSessionEndsByTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		idle, busy, polling := d.signIn(admin.RoleOwner), d.signIn(admin.RoleOwner), d.signIn(admin.RoleOwner)
		polling.header.Set(unattended, "1")
		begin := time.Now()
		time.Sleep(DefaultIdle - time.Minute)
		signedIn(t, busy)
		signedIn(t, polling)
		time.Sleep(time.Minute)
		signedOut(t, idle)
		signedOut(t, polling) // a page that refreshes itself keeps nobody signed in
		for time.Since(begin) < DefaultMost {
			signedIn(t, busy)
			time.Sleep(10 * time.Minute)
		}
		signedOut(t, busy) // though it was used ten minutes ago
	})
}

func TestSessionEndsWithItsToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		made, err := d.svc.CreateToken(t.Context(), d.owner, admin.TokenInput{Name: "short", Role: admin.RoleOwner, InstanceID: instance, ExpiresIn: "10m"})
		if err != nil {
			t.Fatal(err)
		}
		d.tokens[admin.RoleOwner] = made
		b := d.signIn(admin.RoleOwner)
		time.Sleep(10*time.Minute + time.Microsecond)
		signedOut(t, b)
	})
}

func TestChangeDependsOnTheToken(t *testing.T) {
	d := newDesk(t)
	b := d.signIn(admin.RoleOwner)
	_, page := b.get("/instances/" + instance + "/keys/new")
	form := fieldsOf(page)
	for name, values := range aNewKey("late") {
		form[name] = values
	}
	// The request is known to be a good token's, and then the token is revoked.
	d.before = func() {
		if _, err := d.svc.RevokeToken(t.Context(), d.owner, d.tokens[admin.RoleOwner].Token.ID); err != nil {
			t.Error(err)
		}
	}
	if resp := b.do(http.MethodPost, "/instances/"+instance+"/keys/new", form); resp.StatusCode != http.StatusSeeOther {
		t.Errorf("a revoked token made a key: %d", resp.StatusCode)
	}
	signedOut(t, b)
}

// TestChangeDependsOnTheSession: one that is ended changes nothing any more, also by what is on its way.
func TestChangeDependsOnTheSession(t *testing.T) {
	d := newDesk(t)
	b := d.signIn(admin.RoleOwner)
	d.before = func() {
		if n, err := d.svc.EndSessions(t.Context(), d.owner, admin.WhoseSessions{All: true}); n != 1 || err != nil {
			t.Errorf("%d ended, %v", n, err)
		}
	}
	form := aNewKey("late")
	form.Set("once", "3d5f2f4c-5f0c-4b55-93c5-0a4c2b0e9f10")
	if resp := b.post(keysPath+"/new", form); resp.StatusCode != http.StatusSeeOther || d.before != nil {
		t.Errorf("a session that is over made a key: %d", resp.StatusCode)
	}
	if keys, err := d.svc.Keys(t.Context(), d.owner, instance, admin.KeyQuery{Limit: 10}); len(keys) != 0 || err != nil {
		t.Errorf("%d keys, %v", len(keys), err)
	}
	signedOut(t, b)
}

func TestSigningInAndOutIsAudited(t *testing.T) {
	d := newDesk(t)
	b := d.signIn(admin.RoleOperator)
	b.post("/sign-out", nil)
	b.do(http.MethodPost, "/sign-in", url.Values{"token": {"kwm_wrong"}})
	id := d.tokens[admin.RoleOperator].Token.ID.String()
	for _, action := range []string{"session.begin", "session.end"} {
		events, err := d.store.FindEvents(t.Context(), admin.EventFilter{Action: action, InstanceID: instance, Target: id}, admin.EventPlace{}, 10)
		if err != nil || len(events) != 1 || events[0].Actor != "token:"+id || events[0].RemoteAddr == "" || events[0].RequestID == "" {
			t.Errorf("%s: %+v, %v", action, events, err)
		}
	}
}

func TestNoCookieIsExplained(t *testing.T) {
	d := newDesk(t)
	status, page := d.browser().get("/signed-in?next=/")
	if status != http.StatusForbidden || !strings.Contains(page, "did not keep") {
		t.Errorf("%d: %s", status, page)
	}
	for host, warned := range map[string]bool{
		"localhost:9195": false, "127.0.0.1:9195": false, "[::1]:9195": false, "portal.localhost": false, "keyward.example": true, "10.0.0.7:9195": true,
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/sign-in", nil)
		r.Host = host
		w := httptest.NewRecorder()
		d.web.ServeHTTP(w, r)
		if got := strings.Contains(w.Body.String(), "plain HTTP from another machine"); got != warned {
			t.Errorf("%s: warned %t, want %t", host, got, warned)
		}
	}
}

func TestNobodyIsSentElsewhere(t *testing.T) {
	for to, want := range map[string]string{
		"/instances/a/keys?status=active": "/instances/a/keys?status=active", "": "/", "https://evil.example": "/", "//evil.example": "/",
		"/\\evil.example": "/", "javascript:alert(1)": "/", "/a/../b": "/", "/%2e%2e//evil.example": "/", "/\tevil": "/", "evil": "/",
	} {
		if got := ownPath(to); got != want {
			t.Errorf("%q: got %q, want %q", to, got, want)
		}
	}
}

func TestWrongTokensAreThrottledBySource(t *testing.T) {
	d := newDesk(t)
	try := func(from, token string) int {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "http://localhost/sign-in", strings.NewReader(url.Values{"token": {token}}.Encode()))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Header.Set("Origin", "http://localhost")
		r.RemoteAddr = from + ":4321"
		w := httptest.NewRecorder()
		d.web.ServeHTTP(w, r)
		return w.Code
	}
	refused := 0
	for range 1000 {
		switch try("192.0.2.1", "kwm_"+strings.Repeat("a", 49)) {
		case http.StatusTooManyRequests:
			refused++
		case http.StatusUnauthorized:
		default:
			t.Fatal("neither refused nor throttled")
		}
	}
	if let := 1000 - refused; let > 100 || let < 10 {
		t.Errorf("%d wrong tokens were looked at, want at most 100", let)
	}
	good := d.tokens[admin.RoleOwner].Secret.Reveal()
	if got := try("192.0.2.2", good); got != http.StatusSeeOther {
		t.Errorf("somebody else cannot sign in: %d", got)
	}
	for range 200 { // right ones cost nothing
		if got := try("192.0.2.3", good); got != http.StatusSeeOther {
			t.Fatalf("a right token: %d", got)
		}
	}
}

func TestFormsOfOthersAreRefused(t *testing.T) {
	d := newDesk(t)
	key, err := d.svc.CreateKey(t.Context(), d.owner, instance, admin.KeyInput{Name: "victim"})
	if err != nil {
		t.Fatal(err)
	}
	target := "/instances/" + instance + "/keys/" + key.Key.ID.String() + "/disable"
	for name, test := range map[string]struct {
		header http.Header
		form   func(own string) url.Values
		want   int
	}{
		"ours":                        {want: http.StatusSeeOther},
		"ours, an old browser":        {header: http.Header{"Sec-Fetch-Site": nil}, want: http.StatusSeeOther},
		"neither origin nor fetch":    {header: http.Header{"Sec-Fetch-Site": nil, "Origin": nil}, want: http.StatusForbidden},
		"another site":                {header: http.Header{"Sec-Fetch-Site": {"cross-site"}, "Origin": {"https://evil.example"}}, want: http.StatusForbidden},
		"another site, old browser":   {header: http.Header{"Sec-Fetch-Site": nil, "Origin": {"https://evil.example"}}, want: http.StatusForbidden},
		"another host of the domain":  {header: http.Header{"Sec-Fetch-Site": {"same-site"}, "Origin": {"https://x.localhost"}}, want: http.StatusForbidden},
		"a sandbox":                   {header: http.Header{"Sec-Fetch-Site": {"cross-site"}, "Origin": {"null"}}, want: http.StatusForbidden},
		"a sandbox, old browser":      {header: http.Header{"Sec-Fetch-Site": nil, "Origin": {"null"}}, want: http.StatusForbidden},
		"null that claims to be ours": {header: http.Header{"Origin": {"null"}}, want: http.StatusForbidden},
		"an origin that is empty":     {header: http.Header{"Sec-Fetch-Site": nil, "Origin": {""}}, want: http.StatusForbidden},
		"two origins":                 {header: http.Header{"Origin": {"http://localhost", "https://evil.example"}}, want: http.StatusForbidden},
		"no form token":               {form: func(string) url.Values { return url.Values{} }, want: http.StatusForbidden},
		"an empty form token":         {form: func(string) url.Values { return url.Values{"form": {""}} }, want: http.StatusForbidden},
		"another session's":           {form: func(string) url.Values { return url.Values{"form": {d.signIn(admin.RoleOperator).formToken()}} }, want: http.StatusForbidden},
		"a simple form of text":       {header: http.Header{"Content-Type": {"text/plain"}}, want: http.StatusForbidden},
		"JSON":                        {header: http.Header{"Content-Type": {"application/json"}}, want: http.StatusForbidden},
		"the token in the query":      {form: func(string) url.Values { return url.Values{} }, want: http.StatusForbidden},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := d.svc.UpdateKey(t.Context(), d.owner, instance, key.Key.ID, admin.KeyPatch{Disabled: admin.To(false)}, 0); err != nil {
				t.Fatal(err)
			}
			b := d.signIn(admin.RoleOwner)
			b.header = test.header
			form := url.Values{"form": {b.formToken()}}
			if test.form != nil {
				form = test.form(b.formToken())
			}
			to := target
			if name == "the token in the query" {
				to += "?form=" + b.formToken()
			}
			resp := b.do(http.MethodPost, to, form)
			if resp.StatusCode != test.want {
				t.Errorf("got %d, want %d", resp.StatusCode, test.want)
			}
			k, err := d.svc.Key(context.WithoutCancel(t.Context()), d.owner, instance, key.Key.ID)
			if err != nil || k.Disabled != (test.want == http.StatusSeeOther) {
				t.Errorf("disabled: %t, %v", k.Disabled, err)
			}
		})
	}
	// Signing somebody in as somebody else is such a form too.
	b := d.browser()
	b.header = http.Header{"Sec-Fetch-Site": {"cross-site"}, "Origin": {"https://evil.example"}}
	if resp := b.do(http.MethodPost, "/sign-in", url.Values{"token": {d.tokens[admin.RoleOwner].Secret.Reveal()}}); resp.StatusCode != http.StatusForbidden {
		t.Errorf("sign in from elsewhere: %d", resp.StatusCode)
	}
}

func TestHeadersOfEveryAnswer(t *testing.T) {
	d := newDesk(t)
	b := d.signIn(admin.RoleOwner)
	for _, target := range []string{"/sign-in", "/", "/instances/" + instance + "/keys", "/instances/" + instance + "/keys/new", "/nothing", "//x", "/instances/" + instance + "/keys/"} {
		resp := b.do(http.MethodGet, target, nil)
		h := resp.Header
		for name, want := range map[string]string{
			"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
			"Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-store",
		} {
			if got := h.Get(name); got != want {
				t.Errorf("%s: %s: got %q, want %q", target, name, got, want)
			}
		}
		if page := text(t, resp); strings.Contains(page, " style=") || strings.Contains(page, "<style") || strings.Contains(page, "javascript:") ||
			strings.Contains(page, " onclick") || strings.Count(page, "<script") != strings.Count(page, `<script src="/assets/`) || strings.Contains(page, "//cdn") {
			t.Errorf("%s: code or style in the page", target)
		}
	}
	p := d.web.(*portal)
	for name, address := range p.assets.url {
		resp := b.do(http.MethodGet, address, nil)
		if resp.StatusCode != http.StatusOK || !strings.Contains(resp.Header.Get("Cache-Control"), "immutable") || text(t, resp) != string(p.assets.read(name)) {
			t.Errorf("%s: %d %v", address, resp.StatusCode, resp.Header)
		}
	}
}

func TestRequestsThatAreNone(t *testing.T) {
	d := newDesk(t)
	b := d.signIn(admin.RoleOwner)
	for _, test := range []struct {
		method, target string
		form           url.Values
		want           int
	}{
		{http.MethodGet, "/nothing", nil, http.StatusNotFound},
		{http.MethodGet, "/instances/../keys", nil, http.StatusNotFound},
		{http.MethodGet, "/instances/other/keys", nil, http.StatusNotFound},
		{http.MethodGet, "/instances/-/keys", nil, http.StatusNotFound},
		{http.MethodGet, "/instances/" + instance + "/keys/nonsense", nil, http.StatusNotFound},
		{http.MethodGet, "/instances/" + instance + "/keys/00000000-0000-0000-0000-000000000000", nil, http.StatusNotFound},
		{http.MethodGet, "/instances/" + instance + "/keys?after=x", nil, http.StatusBadRequest},
		{http.MethodGet, "/instances/" + instance + "/keys?status=x&type=y&show=z", nil, http.StatusBadRequest},
		{http.MethodPut, "/instances/" + instance + "/keys", nil, http.StatusMethodNotAllowed},
		{http.MethodGet, "/sign-out", nil, http.StatusMethodNotAllowed}, // a picture's address, say
		{http.MethodHead, "/sign-out", nil, http.StatusMethodNotAllowed},
		{http.MethodOptions, "/sign-out", nil, http.StatusMethodNotAllowed},
		{http.MethodPost, "/sign-out", url.Values{}, http.StatusForbidden},
		{http.MethodPost, "/instances/" + instance + "/keys/new", url.Values{"form": {b.formToken()}, "name": {strings.Repeat("x", maxBody)}}, http.StatusRequestEntityTooLarge},
		{http.MethodPost, "/instances/" + instance + "/keys/new", url.Values{"form": {b.formToken()}, "name": {"x"}}, http.StatusBadRequest}, // without its id
	} {
		if resp := b.do(test.method, test.target, test.form); resp.StatusCode != test.want {
			t.Errorf("%s %.60s: got %d, want %d", test.method, test.target, resp.StatusCode, test.want)
		}
	}
	signedIn(t, b)
}
