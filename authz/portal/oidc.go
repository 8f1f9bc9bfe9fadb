package portal

import (
	"encoding/base64"
	"errors"
	"net"
	"net/http"
	"strings"
	"time"

	"keyward/authz/admin"
)

const (
	// loginCookie binds what comes back from an issuer to the browser that was sent there.
	loginCookie = "__Host-keyward-login"
	// loginLife is how long somebody may take to sign in there.
	loginLife = 10 * time.Minute
	maxNext   = 1 << 10 // bytes of where to go afterwards
)

// oidcPages registers the way to an issuer and back.
func (p *portal) oidcPages() {
	if p.cfg.Login != nil {
		p.mux.HandleFunc("GET /sign-in/oidc", p.toIssuer)
		p.mux.HandleFunc("GET "+admin.LoginPath, p.fromIssuer)
	}
}

// toIssuer sends a browser to the issuer. It changes nothing but a cookie, so it may be a link.
func (p *portal) toIssuer(w http.ResponseWriter, r *http.Request) {
	next := ownPath(r.FormValue("next"))
	if len(next) > maxNext {
		next = "/"
	}
	to, flow, err := p.cfg.Login.Begin(r.Context())
	if err != nil {
		p.notByIssuer(w, r, next, err)
		return
	}
	kept := strings.Join([]string{flow.State, flow.Nonce, flow.Verifier, base64.RawURLEncoding.EncodeToString([]byte(next))}, ".")
	http.SetCookie(w, cookieOf(loginCookie, kept, loginLife))
	p.redirect(w, r, to)
}

// flowOf returns what a browser kept since it was sent to the issuer; the zero OIDCFlow, which nothing answers, if
// that is not there once.
func flowOf(r *http.Request) (flow admin.OIDCFlow, next string) {
	all := r.CookiesNamed(loginCookie)
	if len(all) != 1 {
		return flow, "/"
	}
	parts := strings.Split(all[0].Value, ".")
	if len(parts) != 4 {
		return flow, "/"
	}
	to, err := base64.RawURLEncoding.DecodeString(parts[3])
	if err != nil {
		return flow, "/"
	}
	return admin.OIDCFlow{State: parts[0], Nonce: parts[1], Verifier: parts[2]}, ownPath(string(to))
}

// fromIssuer signs in who comes back.
func (p *portal) fromIssuer(w http.ResponseWriter, r *http.Request) {
	flow, next := flowOf(r)
	back := r.URL.Query()
	if flow.State != "" && sameText(back.Get("state"), flow.State) { // else the answer that it waits for is still to come
		http.SetCookie(w, cookieOf(loginCookie, "", -1)) // one is all it was for
	}
	from := sourceOf(r)
	if wait := p.wrong.Take(from); wait > 0 { // each may cost the issuer a call
		p.fail(w, r, nil, &admin.RateError{What: "attempts to sign in came from this address", Limit: int(wrongTokens.Burst), Per: time.Minute, RetryAfter: max(wait, time.Second)})
		return
	}
	caller, err := p.svc.FinishLogin(r.Context(), p.cfg.Login, flow, back)
	caller.RequestID, caller.RemoteAddr = requestID(r), r.RemoteAddr
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		caller.RemoteAddr = host
	}
	switch {
	case errors.Is(err, admin.ErrUnauthenticated):
		p.svc.Unauthenticated(caller.RemoteAddr)
		fault := errNoAnswer
		if back.Has("error") {
			fault = errIssuerRefused
		}
		p.fail(w, r, nil, fault)
		return
	case err != nil:
		if no, ok := errors.AsType[*admin.ForbiddenError](err); ok { // an identity that is good, and has no role
			caller.Attempt = &admin.Attempt{Action: "authenticate"}
			p.svc.Refused(r.Context(), caller, "", failureOf(no).code)
		}
		p.notByIssuer(w, r, next, err)
		return
	}
	p.wrong.GiveBack(from)
	p.begin(w, r, caller, next)
}

// notByIssuer answers an error of the issuer's. Where that is away, it asks to sign in otherwise, or later.
func (p *portal) notByIssuer(w http.ResponseWriter, r *http.Request, next string, err error) {
	away, ok := errors.AsType[*admin.IssuerAwayError](err)
	if !ok {
		p.fail(w, r, nil, err)
		return
	}
	if away.Cause != nil {
		p.logCause(r, err)
	}
	wait := retryAfter(away.RetryAfter)
	w.Header().Set("Retry-After", wait)
	p.askToSignIn(w, r, http.StatusServiceUnavailable, signInView{Next: next, Away: away.Host, Wait: wait})
}
