package e2e_test

import (
	"context"
	"flag"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/portal/portaltest"
)

// screenshots is where pictures of the portal's pages go: "make screenshots" says docs/screenshots.
var screenshots = flag.String("screenshots", "", "write pictures of the portal's pages to this folder")

// portalRoutes make every request one that needs a key and that quotas can count.
const portalRoutes = "routes: [{path: \"/{rest...}\", context: \"core:completions\"}]"

func (s *server) adminToken(t testing.TB) string {
	t.Helper()
	token, err := os.ReadFile(s.path("admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(token))
}

// signIn signs in as a person would.
func signIn(t *testing.T, s *server, p *portaltest.Page) {
	t.Helper()
	p.Go("http://" + s.portal + "/")
	p.Fill("#token", s.adminToken(t))
	p.Press("main", "Sign in")
	p.Until("document.querySelector('header .brand') && !document.querySelector('#token')")
}

// calls sends a request through Envoy and returns its status.
func calls(t *testing.T, f *front, secret string) int {
	t.Helper()
	c := f.caller(t)
	defer c.hangUp()
	return c.get("/chat", "X-API-Key: "+secret).status
}

// The life of a key as a person has it in a browser, with and without scripts: what is shown and what Envoy lets
// through are the same at every step.
func TestPortalLifeOfAKey(t *testing.T) {
	browser := portaltest.Start(t)
	s := serve(t, config{yaml: portalRoutes})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	for name, view := range map[string]portaltest.View{
		"scripts": portaltest.Desk, "no scripts": {Width: 1280, Height: 800, NoScript: true}, "phone": portaltest.Phone,
	} {
		t.Run(name, func(t *testing.T) {
			id := s.instance(t, admin.PolicyInput{})
			p := browser.Open(t, view)
			signIn(t, s, p)
			p.Go("http://" + s.portal + "/instances/" + id + "/keys")
			p.See("There are no keys yet")
			p.Fits()
			p.Press("main", "Create the first key")
			p.See("Create key")
			p.Fits()
			p.Fill("#name", "pipeline of "+name)
			p.Press("main", "Create key")
			secret := s.shownSecret(p)
			if got := calls(t, f, secret); got != http.StatusOK {
				t.Fatalf("the new key through Envoy: %d, want 200", got)
			}
			p.Click("input[type=checkbox]")
			p.Press("main", "Done")
			p.Until(`/keys\/[0-9a-f-]{36}$/.test(location.pathname)`)
			key := portaltest.Value[string](p, "location.href")
			p.Fits()
			// What is counted is written every 10 s.
			p.WaitReload(func() bool {
				return portaltest.Value[int](p, "Array.from(document.querySelectorAll('#usage-table tbody tr')).reduce((n, r) => n + Number(r.cells[1].dataset.n), 0)") == 1
			})
			if !view.NoScript && !p.Has("[data-chart] canvas") {
				t.Error("there is no chart")
			}

			p.Press("main", "Rotate")
			p.Until(`location.pathname.endsWith("/rotate")`)
			p.Click("main form button")
			next := s.shownSecret(p)
			if next == secret {
				t.Fatal("rotating shows the same secret")
			}
			for which, one := range map[string]string{"old": secret, "new": next} {
				if got := calls(t, f, one); got != http.StatusOK {
					t.Errorf("the %s secret after rotating: %d, want 200", which, got)
				}
			}
			p.Go(key)
			p.Press("main", "Revoke")
			p.Until(`location.pathname.endsWith("/revoke")`)
			p.See("pipeline of " + name)
			p.Click("main form button")
			p.Until(`!location.pathname.endsWith("/revoke")`)
			p.See("revoked")
			for which, one := range map[string]string{"old": secret, "new": next} {
				if got := calls(t, f, one); got != http.StatusUnauthorized {
					t.Errorf("the %s secret after revoking: %d, want 401", which, got)
				}
			}
			p.Go(key) // nothing on any later page has it
			for _, one := range []string{secret, next} {
				if html := portaltest.Value[string](p, "document.documentElement.outerHTML"); strings.Contains(html, one) {
					t.Error("a later page has the secret")
				}
			}
		})
	}
}

// shownSecret returns the secret that the page shows, which is nowhere to be found later.
func (s *server) shownSecret(p *portaltest.Page) string {
	p.Until("document.querySelector('#secret')")
	if p.Has("[data-do=mask]") { // masked, where scripts run
		p.Click("[data-do=mask]")
	}
	secret := strings.TrimSpace(portaltest.Value[string](p, "document.querySelector('#secret').value"))
	s.canary.Add(secret)
	return secret
}

// hostile is what people may try to have run in others' browsers.
const hostile = `"><script>alert(1)</script><img src=x onerror=alert(2)>'{{.}}`

// furnish fills an instance with something to show on every page, some of it hostile, and returns the pages.
func furnish(t *testing.T, s *server, f *front, name string) (instance string, pages map[string]string) {
	t.Helper()
	id := s.instance(t, admin.PolicyInput{})
	days := func(n int) *int { return &n }
	k := s.key(t, id, admin.KeyInput{Name: name, Description: "For " + name, Metadata: map[string]string{"team": name}})
	s.key(t, id, admin.KeyInput{Name: "Agent of the help desk", Type: apikey.TypeAgent, AgentName: "help-desk", ExpiresIn: "10d"})
	s.key(t, id, admin.KeyInput{Name: "Ann's notebook", Type: apikey.TypeUser, UserPrincipalName: "ann@example.com", InactivityDays: days(30)})
	gone := s.key(t, id, admin.KeyInput{Name: "Old importer"})
	s.revoke(t, gone)
	if _, err := s.client.PutQuota(t.Context(), id, "daily", admin.QuotaInput{Description: name, Context: "core:completions", Partition: apikey.PartitionNone, Limit: 500, Period: "day"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.PutQuota(t.Context(), id, "per-key", admin.QuotaInput{Context: "core:completions", Partition: apikey.PartitionKey, Limit: 60, Window: "1m", Shadow: true}); err != nil {
		t.Fatal(err)
	}
	for range 12 {
		calls(t, f, k.secret)
	}
	calls(t, f, gone.secret)
	at := "http://" + s.portal + "/instances/" + id
	key := at + "/keys/" + k.ID.String()
	return id, map[string]string{
		"instances": "http://" + s.portal + "/instances", "keys": at + "/keys", "create": at + "/keys/new", "key": key, "edit": key + "/edit", "rotate": key + "/rotate",
		"revoke": key + "/revoke", "quotas": at + "/quotas", "quota": at + "/quotas/daily", "quota-of-each-key": at + "/quotas/per-key", "new-quota": at + "/new-quota", "delete-quota": at + "/quotas/daily/delete",
		"policy": at + "/policy", "alerts": at + "/alerts", "audit": at + "/audit", "tokens": at + "/tokens", "new-token": at + "/new-token", "envoy": at + "/envoy",
		"not-found": at + "/nowhere",
	}
}

// Every page is for everybody: axe-core finds nothing in light, dark and narrow, the page is never wider than 320 px, and the
// keyboard gets to what can be done. With -screenshots, pictures are kept.
func TestPortalPagesAreForEverybody(t *testing.T) {
	browser := portaltest.Start(t)
	s := serve(t, config{yaml: portalRoutes})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	_, pages := furnish(t, s, f, "Nightly import")
	alike := map[string]bool{"edit": true, "quota-of-each-key": true, "not-found": true} // others that have a picture
	views := map[string]portaltest.View{"light": portaltest.Desk, "dark": portaltest.Dark, "narrow": portaltest.Narrow}
	for name, view := range views {
		p := browser.Open(t, view)
		look := func(page string) {
			p.Settled()
			p.Fits()
			p.Accessible()
			if *screenshots != "" && !alike[page] {
				p.Screenshot(filepath.Join(*screenshots, page+"-"+name+".png"))
			}
		}
		p.Go("http://" + s.portal + "/sign-in")
		look("sign-in")
		signIn(t, s, p)
		p.Go(pages["key"])
		p.WaitReload(func() bool { return p.Has("#usage-table [data-n='12']") || strings.Contains(p.Text("#usage"), "12") }) // it is written every 10 s
		for page, url := range pages {
			p.Go(url)
			look(page)
		}
		if name == "narrow" {
			continue
		}
		for page, actions := range map[string][]string{
			"keys": {"a[href$='/keys/new']", "a[href$='/policy']"}, "key": {"a[href$='/rotate']", "a[href$='/edit']", "form[action$='/disable'] button", "a[href$='/revoke']"},
			"create": {"#name", "main form button"}, "quotas": {"a[href$='/new-quota']"}, "policy": {"main form button"}, "audit": {"main summary", "form[action$='/verify'] button"},
			"tokens": {"a[href$='/new-token']", "a[href$='/revoke']"}, "envoy": {"main form button"},
		} {
			p.Go(pages[page])
			p.Reaches(append(actions, "header form button")...)
		}
	}
}

// What people enter is text, in every field and on every page.
func TestPortalRunsNobodysScript(t *testing.T) {
	browser := portaltest.Start(t)
	s := serve(t, config{yaml: portalRoutes})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	id, pages := furnish(t, s, f, hostile)
	p := browser.Open(t, portaltest.Desk) // which fails of a dialog, of anything on the console, and of a violation of the policy
	p.Go("http://" + s.portal + "/sign-in?next=javascript:alert(3)")
	p.Fill("#token", hostile)
	p.Press("main", "Sign in")
	p.See("That is not a management token")
	signIn(t, s, p)
	for _, url := range pages {
		p.Go(url)
		p.Settled()
	}
	at := "http://" + s.portal + "/instances/" + id
	// What a form is given back with, too.
	for url, button := range map[string]string{
		at + "/new-quota": "Show what would change", at + "/new-token": "Create token", at + "/policy": "Show what would change", at + "/keys/new": "Create key",
	} {
		p.Go(url)
		p.Until("(() => { document.querySelectorAll('main input:not([type=hidden]):not([type=checkbox]):not([type=radio]):not([type=date]), main textarea')" +
			".forEach(e => { e.value = " + `'"><script>alert(4)<\/script><img src=x onerror=alert(5)>'` + " }); return true })()")
		p.Press("main", button)
		p.Settled()
	}
	for _, query := range []string{"/audit?action=%22%3E%3Cscript%3Ealert(6)%3C/script%3E", "/envoy?upstreams=%3Cscript%3Ealert(7)%3C/script%3E", "/keys?name=%22%3E%3Cscript%3Ealert(8)%3C/script%3E", "/alerts?kind=%3Cscript%3E"} {
		p.Go(at + query)
		p.Settled()
	}
	if names := portaltest.Value[int](p, "document.querySelectorAll('script:not([src])').length"); names != 0 {
		t.Errorf("%d scripts inside a page", names)
	}
}

// A page of ours is shown in nobody's frame, and the cookie is one that only this host's server sees.
func TestPortalIsNotFramedAndItsCookieIsItsOwn(t *testing.T) {
	browser := portaltest.Start(t)
	s := serve(t, config{})
	p := browser.Open(t, portaltest.Desk)
	signIn(t, s, p)
	var cookies []*network.Cookie
	p.Do(chromedp.Func(func(ctx context.Context, _ *chromedp.Target) error {
		got, err := chromedp.Call(ctx, network.GetCookies, network.GetCookiesParams{})
		cookies = got.Cookies
		return err
	}))
	if len(cookies) != 1 {
		t.Fatalf("%d cookies, want the session's alone", len(cookies))
	}
	if c := cookies[0]; !strings.HasPrefix(c.Name, "__Host-") || !c.HTTPOnly || !c.Secure || c.SameSite != network.CookieSameSiteLax || c.Path != "/" || strings.HasPrefix(c.Domain, ".") {
		t.Errorf("the cookie is %+v", c)
	}
	if got := portaltest.Value[string](p, "document.cookie"); got != "" {
		t.Errorf("scripts see the cookie: %q", got)
	}
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = w.Write([]byte(`<!doctype html><title>Win a prize</title><link rel="icon" href="data:,"><iframe src="http://` + s.portal + `/instances"></iframe>`))
	}))
	t.Cleanup(elsewhere.Close)
	p.Go(elsewhere.URL)
	p.Settled()
	p.Expect("frame-ancestors")
	p.Taken() // Chromium tells of it more than once
}
