// Package portal is the management of keys in a browser: Settings > API Keys. What it shows and does is
// admin.Service's; it adds who is signed in, forms and pages.
//
// Trade-off: pages are made on the server, and everything works as plain links and forms. Scripts make it smoother,
// and are never needed. There is no build step, nothing is loaded from elsewhere, and the content security policy
// allows no code or style inside a page: what looks or acts otherwise is a file in assets.
//
// A page is made so:
//
//   - a file of its own with a func (p *portal) quotaPages() that registers its addresses by p.page, and a line in
//     [sections], which puts it into the navigation and calls that;
//   - a template pages/quotas.html that defines "main", which gets a view: its Data is the page's own, .Visit who
//     asks. Forms begin with {{template "form" $}}, which is what tells them from somebody else's;
//   - a handler func(w http.ResponseWriter, v *visit) error that calls the service with v.Caller and ends with
//     p.show, or after a change with p.done, which redirects and says a sentence on the next page. An error that it
//     returns becomes a page that explains; what can be mended in a form it shows there itself, by [faultsOf].
//
// Buttons are shown to those who may use them (.Visit.Can "key.create"); the service decides anyway.
package portal

import (
	"bytes"
	"context"
	"fmt"
	"html/template"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/google/uuid"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/limits"
)

// Config says what differs from one server to another.
type Config struct {
	Log *slog.Logger // nil: slog.Default
	// Idle is how long a session lives without being used, Most in any case; 0: [DefaultIdle], [DefaultMost].
	Idle, Most time.Duration
	// Version is that of the program, for the foot of a page.
	Version string
	// Envoys is what is in front of the server; nil: the page about it shows none.
	Envoys Envoys
	// Login signs people in with an OIDC issuer as well; nil: with management tokens only.
	Login *admin.OIDCLogin
}

// How long a session lives where nobody says otherwise.
const (
	DefaultIdle = 30 * time.Minute
	DefaultMost = 12 * time.Hour
)

const (
	maxBody = 256 << 10 // bytes of a form
)

// wrongTokens is how many tokens that are none one address may send. A token has 256 bits of chance, so nobody
// guesses one: this bounds what trying costs us. Whoever is signed in already does not meet it.
var wrongTokens = limits.Rate{Interval: 2 * time.Second, Burst: 30}

// New returns the portal. Timeouts belong to the http.Server around it. Safe for concurrent use.
func New(svc *admin.Service, cfg Config) http.Handler {
	p := &portal{svc: svc, cfg: cfg, mux: &routes{ServeMux: http.NewServeMux()}, wrong: admin.NewSources(wrongTokens), places: svc.KeyPlaces(admin.PlacesOfPortal)}
	if p.cfg.Log == nil {
		p.cfg.Log = slog.Default()
	}
	if p.cfg.Idle == 0 {
		p.cfg.Idle = DefaultIdle
	}
	if p.cfg.Most == 0 {
		p.cfg.Most = DefaultMost
	}
	p.assets = loadAssets()
	p.pages = p.loadPages()
	p.assets.routes(p.mux.ServeMux)
	p.signInPages()
	p.oidcPages()
	p.instancePages()
	for _, s := range sections {
		s.pages(p)
	}
	return p
}

type portal struct {
	svc    *admin.Service
	cfg    Config
	mux    *routes
	wrong  *admin.Sources
	places admin.KeyPlaces
	assets *assets
	pages  map[string]*template.Template
	cross  http.CrossOriginProtection
}

// routes are the addresses of pages, and know which there are: a test has every one of them looked at.
type routes struct {
	*http.ServeMux

	patterns []string
}

func (r *routes) HandleFunc(pattern string, page func(http.ResponseWriter, *http.Request)) {
	r.patterns = append(r.patterns, pattern)
	r.ServeMux.HandleFunc(pattern, page)
}

// policy lets a browser load what this server serves, and nothing inside a page. The data: of images is Pico's.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; " +
	"form-action 'self'; frame-ancestors 'none'; base-uri 'none'"

func (p *portal) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w := &answer{ResponseWriter: rw}
	h := w.Header()
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	// Not no-referrer: with that, browsers send Origin: null with our own forms.
	h.Set("Referrer-Policy", "same-origin")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=()")
	h.Set("Cache-Control", "no-store")
	id := uuid.NewString()
	h.Set("X-Request-Id", id)
	r = r.WithContext(context.WithValue(r.Context(), requestIDKey{}, id))
	defer func() {
		if v := recover(); v != nil {
			p.panicked(w, r, id, v)
		}
	}()
	// ServeMux would redirect a path that is not clean; there is nothing at such a path.
	if r.URL.Path == "" || path.Clean(r.URL.Path) != r.URL.Path {
		p.fail(w, r, nil, apikey.ErrNotFound)
		return
	}
	if err := p.ours(r); err != nil {
		p.fail(w, r, nil, err)
		return
	}
	r.Body = http.MaxBytesReader(rw, r.Body, maxBody)
	_, pattern := p.mux.Handler(r)
	if pattern == "" {
		if allowed := p.allowed(r); allowed != "" {
			h.Set("Allow", allowed)
			p.fail(w, r, nil, errMethod)
			return
		}
		p.fail(w, r, nil, apikey.ErrNotFound)
		return
	}
	p.mux.ServeHTTP(w, r)
}

type requestIDKey struct{}

// requestID is by what log and audit know a request.
func requestID(r *http.Request) string {
	id, _ := r.Context().Value(requestIDKey{}).(string)
	return id
}

// ours refuses what changes something and does not come from a page of ours. http.CrossOriginProtection knows what
// browsers say of that, and lets through who says nothing: no browser of the last years does, so nobody else needs
// to. A page in a sandbox calls itself null, and may be anybody's.
func (p *portal) ours(r *http.Request) error {
	if r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodOptions {
		return nil
	}
	origin := r.Header.Values("Origin")
	if len(origin) > 1 || len(origin) == 1 && (origin[0] == "null" || origin[0] == "") || len(origin) == 0 && r.Header.Get("Sec-Fetch-Site") == "" {
		return errForeign
	}
	if err := p.cross.Check(r); err != nil {
		return errForeign
	}
	return nil
}

// allowed lists the methods that an address takes, where it takes others than that of the request.
func (p *portal) allowed(r *http.Request) string {
	var methods []string
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		other := r.Clone(r.Context())
		other.Method = method
		if _, pattern := p.mux.Handler(other); pattern != "" {
			methods = append(methods, method)
		}
	}
	return strings.Join(methods, ", ")
}

// panicked answers and logs a bug. A panic's value may hold anything, so only the runtime's own is shown.
func (p *portal) panicked(w *answer, r *http.Request, id string, v any) {
	if v == http.ErrAbortHandler { //nolint:errorlint // net/http compares it so too
		panic(v)
	}
	what := fmt.Sprintf("%T", v)
	if bug, ok := v.(runtime.Error); ok {
		what = bug.Error()
	}
	p.cfg.Log.Error("panic in the portal", slog.String("request_id", id), slog.String("method", r.Method),
		slog.String("panic", what), slog.String("stack", string(debug.Stack())))
	if w.begun {
		panic(http.ErrAbortHandler) // too late for an answer: better none than half of one
	}
	p.fail(w, r, nil, errBug)
}

// An answer knows whether it has begun.
type answer struct {
	http.ResponseWriter
	begun bool
}

func (a *answer) WriteHeader(status int) {
	a.begun = true
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(b []byte) (int, error) {
	a.begun = true
	return a.ResponseWriter.Write(b)
}

// sourceOf is the address that a request comes from; the zero Addr over a Unix socket, where all are one.
func sourceOf(r *http.Request) netip.Addr {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	addr, _ := netip.ParseAddr(host)
	return addr.Unmap().WithZone("")
}

// write sends a page that was made whole before, so that a fault in it is an error and not half a page.
func write(w http.ResponseWriter, status int, page *bytes.Buffer) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(page.Bytes()) // a browser that left is no error
}
