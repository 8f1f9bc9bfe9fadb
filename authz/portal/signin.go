package portal

import (
	"crypto/subtle"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"strings"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// The cookies. With the prefix __Host-, a browser takes them over TLS only, or from this machine, and from this
// very host: no other one of the domain can set or read them.
const (
	sessionCookie = "__Host-keyward"
	saidCookie    = "__Host-keyward-said"
)

// cookieOf makes a cookie; a negative life removes it. Lax, so that a link in a mail or an alert finds its reader
// signed in: nothing is changed by following one.
func cookieOf(name, value string, life time.Duration) *http.Cookie {
	seconds := int(life / time.Second)
	if life < 0 {
		seconds = -1 // 0 would say nothing, and the browser would keep an empty one
	}
	return &http.Cookie{
		Name: name, Value: value, Path: "/", MaxAge: seconds, Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode,
	}
}

// sessionOf returns what the browser keeps of a session. Two of a kind are none: who knows which is whose.
func sessionOf(r *http.Request) (apikey.Secret, bool) {
	all := r.CookiesNamed(sessionCookie)
	if len(all) != 1 || all[0].Value == "" {
		return apikey.Secret{}, false
	}
	return apikey.NewSecret(all[0].Value), true
}

// signInPages registers what works without a session.
func (p *portal) signInPages() {
	p.mux.HandleFunc("GET /sign-in", p.signInPage)
	p.mux.HandleFunc("POST /sign-in", p.signIn)
	p.mux.HandleFunc("GET /signed-in", p.signedIn)
	p.page("", "POST /sign-out", p.signOut)
}

// A signInView is the page to sign in.
type signInView struct {
	Next     string // where to go then; a path of ours
	Fault    string
	Insecure bool   // the browser will not keep the cookie
	Issuer   string // who signs people in as well; "": nobody
	Away     string // an issuer that cannot be reached, Wait for how many seconds it is not asked
	Wait     string
}

func (p *portal) signInPage(w http.ResponseWriter, r *http.Request) {
	p.askToSignIn(w, r, http.StatusOK, signInView{Next: ownPath(r.FormValue("next"))})
}

func (p *portal) askToSignIn(w http.ResponseWriter, r *http.Request, status int, data signInView) {
	data.Insecure = insecure(r)
	if p.cfg.Login != nil {
		data.Issuer = p.cfg.Login.Host()
	}
	if err := p.showAs(w, nil, status, "signin", "Sign in", data); err != nil {
		p.fail(w, r, nil, err)
	}
}

// ownPath returns a path of ours to go to, or the first page: nobody is to be sent elsewhere by a link to us.
func ownPath(to string) string {
	u, err := url.Parse(to)
	if err != nil || u.Scheme != "" || u.Host != "" || u.User != nil || !strings.HasPrefix(to, "/") || strings.HasPrefix(to, "//") ||
		strings.ContainsAny(to, "\\\r\n\t") || path.Clean(u.Path) != u.Path {
		return "/"
	}
	return to
}

// insecure reports whether a browser would refuse the cookie: over plain HTTP it takes it from this machine only.
// Behind a proxy that ends TLS nobody can tell for sure, so it decides nothing but what the page says.
func insecure(r *http.Request) bool {
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
		return false
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.Trim(strings.ToLower(host), "[]")
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return err != nil || !ip.IsLoopback()
}

const noToken = "That is not a management token that works. It may be mistyped, expired or revoked. Ask whoever gave it to you, " +
	"or make a new one with: keyward tokens create"

func (p *portal) signIn(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		p.fail(w, r, nil, formFault(err))
		return
	}
	from := sourceOf(r)
	if wait := p.wrong.Take(from); wait > 0 {
		p.fail(w, r, nil, &admin.RateError{What: "wrong tokens came from this address", Limit: int(wrongTokens.Burst), Per: time.Minute, RetryAfter: max(wait, time.Second)})
		return
	}
	caller, err := p.svc.Authenticate(r.Context(), apikey.NewSecret(strings.TrimSpace(r.PostForm.Get("token"))))
	caller.RequestID, caller.RemoteAddr = requestID(r), r.RemoteAddr
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		caller.RemoteAddr = host
	}
	switch {
	case errors.Is(err, admin.ErrUnauthenticated):
		p.svc.Unauthenticated(caller.RemoteAddr)
		p.askToSignIn(w, r, http.StatusUnauthorized, signInView{Next: ownPath(r.FormValue("next")), Fault: noToken})
		return
	case err != nil:
		p.fail(w, r, nil, err)
		return
	}
	p.wrong.GiveBack(from)
	p.begin(w, r, caller, ownPath(r.PostForm.Get("next")))
}

// begin signs a caller in, whom the service knows, and goes on to a page of ours.
func (p *portal) begin(w http.ResponseWriter, r *http.Request, caller admin.Caller, next string) {
	former, _ := sessionOf(r)
	cookie, err := p.svc.SignIn(r.Context(), caller, former, admin.SessionLife{Idle: p.cfg.Idle, Most: p.cfg.Most})
	if err != nil {
		p.fail(w, r, nil, err)
		return
	}
	http.SetCookie(w, cookieOf(sessionCookie, cookie.Reveal(), p.cfg.Most))
	p.redirect(w, r, "/signed-in?next="+url.QueryEscape(next))
}

// signedIn finds out whether the browser kept the cookie: over plain HTTP from elsewhere it does not, without a
// word.
func (p *portal) signedIn(w http.ResponseWriter, r *http.Request) {
	if _, kept := sessionOf(r); kept {
		p.redirect(w, r, ownPath(r.FormValue("next")))
		return
	}
	if err := p.showAs(w, nil, http.StatusForbidden, "nocookie", "Your browser did not keep the session", signInView{Insecure: insecure(r)}); err != nil {
		p.fail(w, r, nil, err)
	}
}

func (p *portal) signOut(w http.ResponseWriter, v *visit) error {
	cookie, _ := sessionOf(v.Request)
	if err := p.svc.SignOut(v.Context(), v.Caller, cookie); err != nil {
		return err
	}
	http.SetCookie(w, cookieOf(sessionCookie, "", -1))
	// Whatever pages the browser still has of ours.
	w.Header().Set("Clear-Site-Data", `"cache"`)
	p.redirect(w, v.Request, "/sign-in")
	return nil
}

func sameText(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
