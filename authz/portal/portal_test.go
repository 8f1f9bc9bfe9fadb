package portal

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/storetest"
)

// A desk is a portal over a store in memory, with a token of each role.
type desk struct {
	t      testing.TB
	svc    *admin.Service
	store  *storetest.Memory
	web    http.Handler
	owner  admin.Caller
	tokens map[admin.Role]admin.CreatedToken
	cfg    Config
	pepper *apikey.Pepper
	before func() // once, before the next transaction
	fails  error  // of every transaction, unless nil
}

const (
	instance = "acme"
	ann      = "ann@example.com"
)

func newDesk(t testing.TB) *desk {
	t.Helper()
	peppers := apikey.Peppers{Current: apikey.NewPepper(1, true)}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	d := &desk{t: t, pepper: peppers.Current, store: storetest.NewMemory(admin.NewAuditKeys(peppers)), tokens: map[admin.Role]admin.CreatedToken{}}
	d.svc = admin.New(gate{d.store, d}, admin.Config{Format: apikey.Format{First: apikey.DefaultFirst}, Peppers: peppers}, nil, log)
	d.owner = admin.Caller{Name: "test", Role: admin.RoleOwner}
	if _, err := d.svc.PutInstance(t.Context(), d.owner, instance, apikey.Policy{}); err != nil {
		t.Fatal(err)
	}
	for _, role := range []admin.Role{admin.RoleOwner, admin.RoleOperator, admin.RoleAuditor, admin.RoleUser} {
		in := admin.TokenInput{Name: "the " + string(role), Role: role, InstanceID: instance}
		if role == admin.RoleUser {
			in.UserPrincipalName = ann
		}
		made, err := d.svc.CreateToken(t.Context(), d.owner, in)
		if err != nil {
			t.Fatal(err)
		}
		d.tokens[role] = made
	}
	d.cfg = Config{Log: log, Version: "test"}
	d.web = New(d.svc, d.cfg)
	return d
}

// A gate is the desk's store as the service sees it.
type gate struct {
	admin.Store

	d *desk
}

func (g gate) Update(ctx context.Context, fn func(admin.Tx) error) (apikey.Revision, error) {
	if before := g.d.before; before != nil {
		g.d.before = nil
		before()
	}
	if g.d.fails != nil {
		return 0, g.d.fails
	}
	return g.Store.Update(ctx, fn)
}

// A browser keeps cookies, and sends what browsers send.
type browser struct {
	d       *desk
	cookies map[string]string
	header  http.Header // of every request besides
	from    string      // its address; "": that of httptest
}

func (d *desk) browser() *browser {
	return &browser{d: d, cookies: map[string]string{}, header: http.Header{}}
}

func (b *browser) do(method, target string, form url.Values) *http.Response {
	b.d.t.Helper()
	var body io.Reader
	if form != nil {
		body = strings.NewReader(form.Encode())
	}
	r := httptest.NewRequestWithContext(b.d.t.Context(), method, "http://localhost"+target, body)
	if form != nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if method != http.MethodGet {
		r.Header.Set("Origin", "http://localhost")
		r.Header.Set("Sec-Fetch-Site", "same-origin")
	}
	if b.from != "" {
		r.RemoteAddr = b.from + ":4321"
	}
	for name, values := range b.header {
		r.Header.Del(name)
		if values != nil {
			r.Header[name] = values
		}
	}
	for name, value := range b.cookies {
		r.AddCookie(&http.Cookie{Name: name, Value: value, Quoted: false})
	}
	w := httptest.NewRecorder()
	b.d.web.ServeHTTP(w, r)
	resp := w.Result()
	for _, c := range resp.Cookies() {
		if c.MaxAge < 0 {
			delete(b.cookies, c.Name)
		} else {
			b.cookies[c.Name] = c.Value
		}
	}
	return resp
}

// text returns the body of an answer.
func text(t testing.TB, resp *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// get follows redirects and returns the page.
func (b *browser) get(target string) (status int, page string) {
	b.d.t.Helper()
	return b.follow(b.do(http.MethodGet, target, nil))
}

func (b *browser) follow(resp *http.Response) (status int, page string) {
	b.d.t.Helper()
	for range 10 {
		if resp.StatusCode != http.StatusSeeOther {
			return resp.StatusCode, text(b.d.t, resp)
		}
		resp = b.do(http.MethodGet, resp.Header.Get("Location"), nil)
	}
	b.d.t.Fatal("redirected for ever")
	return 0, ""
}

// post sends a form with what its page carried.
func (b *browser) post(target string, form url.Values) *http.Response {
	b.d.t.Helper()
	sent := url.Values{"form": {b.formToken()}}
	for name, values := range form {
		sent[name] = values
	}
	return b.do(http.MethodPost, target, sent)
}

func (b *browser) formToken() string {
	return b.d.svc.FormToken(apikey.NewSecret(b.cookies[sessionCookie]))
}

// signIn signs in with the token of a role.
func (d *desk) signIn(role admin.Role) *browser {
	d.t.Helper()
	b := d.browser()
	resp := b.do(http.MethodPost, "/sign-in", url.Values{"token": {d.tokens[role].Secret.Reveal()}})
	if resp.StatusCode != http.StatusSeeOther || b.cookies[sessionCookie] == "" {
		d.t.Fatalf("sign in as %s: status %d: %s", role, resp.StatusCode, text(d.t, resp))
	}
	return b
}

func TestSignIn(t *testing.T) {
	d := newDesk(t)
	for role := range d.tokens {
		b := d.signIn(role)
		status, page := b.get("/instances")
		if status != http.StatusOK || !strings.Contains(page, "Signed in as <strong>the "+string(role)) {
			t.Errorf("%s: status %d: %s", role, status, page)
		}
	}
}
