package manage

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path"
	"reflect"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/google/uuid"
	"go.opentelemetry.io/otel/trace"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// Config says what differs from one server to another. The zero Config works.
type Config struct {
	// Format is that of our secrets; a request id with one in it is not repeated.
	Format apikey.Format
	// Pepper is what the key of list cursors is derived from, so that every replica reads every
	// replica's. nil: a key of this handler's own.
	Pepper *apikey.Pepper
	Log    *slog.Logger // nil: slog.Default
	// Caller, unless nil, is who every request comes from, without a token. Only for a handler that no
	// network reaches.
	Caller *admin.Caller
	// Version is that of the program, for the OpenAPI document.
	Version string
	// Tracer makes a span of each request that is sampled; nil: there are no traces.
	Tracer trace.Tracer
}

// New returns the Management API. Timeouts belong to the http.Server around it. Safe for concurrent use.
func New(svc *admin.Service, cfg Config) http.Handler {
	h := &handler{svc: svc, cfg: cfg, mux: http.NewServeMux(), cursors: newCursors(cfg.Pepper)}
	if h.cfg.Log == nil {
		h.cfg.Log = slog.Default()
	}
	if h.cfg.Version == "" {
		h.cfg.Version = "dev"
	}
	api := humago.New(h.mux, huma.Config{
		// Not huma.DefaultConfig: it adds $schema members and Link headers to answers, and a page of
		// documentation whose viewer comes from elsewhere.
		OpenAPI: &huma.OpenAPI{
			OpenAPI: "3.1.0",
			Info:    &huma.Info{Title: "keyward Management API", Version: h.cfg.Version},
			Components: &huma.Components{
				Schemas: huma.NewMapRegistry("#/components/schemas/", huma.DefaultSchemaNamer),
				SecuritySchemes: map[string]*huma.SecurityScheme{
					"token": {Type: "http", Scheme: "bearer", Description: "A management token, kwm_…, or a JWT of a configured OIDC issuer"},
				},
			},
			Security: []map[string][]string{{"token": {}}},
		},
		Formats:       map[string]huma.Format{"application/json": {Marshal: writeJSON}},
		DefaultFormat: "application/json",
	})
	// huma describes its own errors unless it takes ours for them.
	api.OpenAPI().Components.Schemas.RegisterTypeAlias(reflect.TypeFor[huma.ErrorModel](), reflect.TypeFor[ErrorBody]())
	h.routes(api)
	h.document(api.OpenAPI())
	h.serveDocs(api.OpenAPI())
	return h
}

// A handler puts around the routes what holds for every request.
type handler struct {
	svc     *admin.Service
	cfg     Config
	mux     *http.ServeMux
	cursors cursors
}

// A call is one authenticated request, as the routes see it.
type call struct {
	admin.Caller
	w http.ResponseWriter // the server's own, which http.MaxBytesReader has to know
	r *http.Request
}

type callKey struct{}

const documentPath = "/openapi.json"

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id := h.requestID(r)
	answer := &answer{ResponseWriter: w}
	header := answer.Header()
	header.Set("X-Request-Id", id)
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	if h.cfg.Tracer != nil {
		traced, end := h.trace(r, id)
		defer func() { end(answer) }()
		r = traced
	}
	defer func() {
		if v := recover(); v != nil {
			h.panicked(answer, r, id, v)
		}
	}()

	caller := admin.Caller{RequestID: id}
	if r.URL.Path != documentPath && r.URL.Path != docsPath {
		var err error
		caller, err = h.authenticate(r)
		caller.RequestID, caller.RemoteAddr = id, r.RemoteAddr
		if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
			caller.RemoteAddr = host
		}
		caller.Attempt = new(admin.Attempt)
		if err != nil {
			f := statusOf(err)
			switch f.status {
			case http.StatusUnauthorized:
				h.svc.Unauthenticated(caller.RemoteAddr)
			case http.StatusForbidden: // an identity that is good, and has no role
				caller.Attempt.Action = "authenticate"
				h.svc.Refused(r.Context(), caller, "", f.ErrorBody.Error.Code)
			}
			h.refuse(answer, r, id, f)
			return
		}
	}
	// ServeMux would redirect a path that is not clean; there is nothing at such a path.
	route, pattern := h.mux.Handler(r)
	switch {
	case r.URL.Path == "" || path.Clean(r.URL.Path) != r.URL.Path:
		h.refuse(answer, r, id, statusOf(apikey.ErrNotFound))
	case isValidation(r.URL.Path) && r.Method != http.MethodPost:
		h.refuse(answer, r, id, notAllowed(http.MethodPost))
	case pattern == "":
		h.refuse(answer, r, id, unrouted(route, r))
	default:
		trace.SpanFromContext(r.Context()).SetName(pattern)
		c := &call{Caller: caller, w: w}
		c.r = r.WithContext(context.WithValue(admin.WithCredential(r.Context(), caller), callKey{}, c))
		h.mux.ServeHTTP(answer, c.r)
	}
}

// authenticate finds out who sends a request.
func (h *handler) authenticate(r *http.Request) (admin.Caller, error) {
	if h.cfg.Caller != nil {
		return *h.cfg.Caller, nil
	}
	sent := r.Header.Values("Authorization")
	if len(sent) != 1 {
		return admin.Caller{}, admin.ErrUnauthenticated
	}
	scheme, token, ok := strings.Cut(sent[0], " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return admin.Caller{}, admin.ErrUnauthenticated
	}
	return h.svc.Authenticate(r.Context(), apikey.NewSecret(token))
}

// unrouted says what ServeMux would have said of a request that no route takes, in our words.
func unrouted(route http.Handler, r *http.Request) *failure {
	said := &answerHeader{header: http.Header{}}
	route.ServeHTTP(said, r)
	if said.status != http.StatusMethodNotAllowed {
		return statusOf(apikey.ErrNotFound)
	}
	return notAllowed(said.header.Get("Allow"))
}

// notAllowed refuses a method where others are allowed.
func notAllowed(allow string) *failure {
	f := fail(http.StatusMethodNotAllowed, CodeMethodNotAllowed, "the method is not allowed here")
	f.header.Set("Allow", allow)
	return f
}

// refuse answers a request that no route saw.
func (h *handler) refuse(w http.ResponseWriter, r *http.Request, id string, f *failure) {
	h.logCause(r, id, f)
	header := w.Header()
	for name, values := range f.header {
		header[name] = values
	}
	if f.status == http.StatusUnauthorized && r.Header.Get("Authorization") == "" {
		header.Set("WWW-Authenticate", challenge)
	}
	header.Set("Content-Type", "application/json")
	w.WriteHeader(f.status)
	_ = writeJSON(w, f.ErrorBody) // a client that left is no error
}

func (h *handler) logCause(r *http.Request, id string, f *failure) {
	if f.cause != nil {
		h.cfg.Log.Error("a management request failed", slog.String("request_id", id), slog.String("method", r.Method),
			slog.String("route", r.Pattern), slog.Int("status", f.status), slog.Any("error", f.cause))
	}
}

// panicked answers and logs a bug. A panic's value may hold anything, so only the runtime's own is shown.
func (h *handler) panicked(w *answer, r *http.Request, id string, v any) {
	if v == http.ErrAbortHandler { //nolint:errorlint // net/http compares it so too
		panic(v)
	}
	what := fmt.Sprintf("%T", v)
	if bug, ok := v.(runtime.Error); ok {
		what = bug.Error()
	}
	h.cfg.Log.Error("panic in a management request", slog.String("request_id", id), slog.String("method", r.Method),
		slog.String("panic", what), slog.String("stack", string(debug.Stack())))
	if w.begun {
		panic(http.ErrAbortHandler) // too late for an answer: better none than half of one
	}
	f := statusOf(fmt.Errorf("panic"))
	f.cause = nil // logged above
	h.refuse(w, r, id, f)
}

// requestID is the client's own if it can be repeated safely, otherwise a new one.
func (h *handler) requestID(r *http.Request) string {
	sent := r.Header.Values("X-Request-Id")
	if len(sent) != 1 || !printable(sent[0], 128) {
		return uuid.NewString()
	}
	if _, ours := h.cfg.Format.Owns(sent[0]); ours || h.cfg.Format.Within(sent[0]) {
		return uuid.NewString() // it goes to the log and the audit
	}
	return sent[0]
}

// document serves the OpenAPI document, made once: huma would make it at the first request, without a lock.
func (h *handler) document(api *huma.OpenAPI) {
	text, err := json.MarshalIndent(api, "", "  ")
	if err != nil {
		panic(err) // of our own types
	}
	h.mux.HandleFunc("GET "+documentPath, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(text)
	})
}

// An answer knows whether it has begun, and with what.
type answer struct {
	http.ResponseWriter
	begun  bool
	status int // 0 where nobody said one: 200
}

func (a *answer) WriteHeader(status int) {
	a.begun, a.status = true, status
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(b []byte) (int, error) {
	a.begun = true
	return a.ResponseWriter.Write(b)
}

// An answerHeader keeps status and header of an answer and drops the rest.
type answerHeader struct {
	header http.Header
	status int
}

func (a *answerHeader) Header() http.Header         { return a.header }
func (a *answerHeader) Write(b []byte) (int, error) { return len(b), nil }
func (a *answerHeader) WriteHeader(status int)      { a.status = status }
