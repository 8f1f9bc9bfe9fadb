// Package holders is what holders of keys, and finders of leaked ones, may ask over HTTP without a management
// token: the secret is the proof. There is nothing else on it, so that it can be reached from where the
// Management API must not be.
//
//	GET  /self     what a key may: with its secret in X-API-Key or Authorization: Bearer
//	POST /revoke   end a leaked key: {"secret": "…"}; answered before anything is looked up
//
// Neither tells whether a secret is a key's unless it is and may be used. Whoever tries secrets out is held
// to a few wrong ones per address. docs/holders-openapi.json describes it to programs.
package holders

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"mime"
	"net/http"
	"net/netip"
	"path"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/limits"
)

// Keys knows who holds a key; *authz.Authorizer does.
type Keys interface {
	HeaderNames() []string
	Self(ctx context.Context, r *authz.Request) (authz.Self, authz.Reason, error)
}

// Reports takes reports of leaked secrets; *admin.Service does.
type Reports interface {
	ReportLeaked(secret apikey.Secret, from netip.Addr, requestID string) error
}

// wrongSecrets is how many secrets that are no usable key's one address may send.
var wrongSecrets = limits.Rate{Interval: 2 * time.Second, Burst: 30}

const maxBody = 4 << 10 // bytes

// New returns the handler. Timeouts belong to the http.Server around it. Safe for concurrent use.
func New(keys Keys, reports Reports, log *slog.Logger) http.Handler {
	h := &handler{keys: keys, reports: reports, log: log, wrong: admin.NewSources(wrongSecrets), mux: http.NewServeMux()}
	h.mux.HandleFunc("GET /self", h.self)
	h.mux.HandleFunc("POST /revoke", h.revoke)
	h.mux.HandleFunc("/self", notAllowed("GET, HEAD"))
	h.mux.HandleFunc("/revoke", notAllowed("POST"))
	h.mux.HandleFunc("/", nothing)
	return h
}

type handler struct {
	keys    Keys
	reports Reports
	log     *slog.Logger
	wrong   *admin.Sources
	mux     *http.ServeMux
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	defer func() {
		if v := recover(); v != nil {
			// Its value may hold what the request carried, so only the runtime's own is shown.
			what := fmt.Sprintf("%T", v)
			if bug, ok := v.(runtime.Error); ok {
				what = bug.Error()
			}
			h.log.Error("panic in a holder's request", slog.String("panic", what), slog.String("stack", string(debug.Stack())))
			panic(http.ErrAbortHandler)
		}
	}()
	// ServeMux would redirect a path that is not clean, and a secret with it; there is nothing at such a path.
	if r.URL.Path == "" || path.Clean(r.URL.Path) != r.URL.Path {
		nothing(w, r)
		return
	}
	h.mux.ServeHTTP(w, r)
}

func nothing(w http.ResponseWriter, _ *http.Request) {
	refuse(w, http.StatusNotFound, "NotFound", "there is GET /self and POST /revoke here, and nothing else")
}

// An Answer says what a key may, as JSON.
type Answer struct {
	KeyID             apikey.ID     `json:"keyId" format:"uuid"`
	InstanceID        string        `json:"instanceId"`
	Type              apikey.Type   `json:"type" enum:"instance,agent,user"`
	AgentName         string        `json:"agentName,omitempty" doc:"Set for agent keys only."`
	UserPrincipalName string        `json:"userPrincipalName,omitempty" doc:"Set for user keys only."`
	Environment       string        `json:"environment,omitempty"`
	Scopes            []string      `json:"scopes" nullable:"false" doc:"In force; [\"*\"] for every right."`
	Limits            apikey.Limits `json:"limits" doc:"In force; -1 where there is none."`
	Remaining         *Remaining    `json:"remaining,omitempty" doc:"Requests that the limits leave now, on the replica that answers."`
	// Standings is where each limit stands, on the replica that answers; absent where that cannot be seen.
	Standings      []admin.KeyLimit `json:"standings,omitempty" doc:"Where each limit stands that a request with the key can meet, on the replica that answers."`
	ExpirationDate time.Time        `json:"expirationDate,omitzero"`
	IdleAfter      time.Time        `json:"idleAfter,omitzero" doc:"When the key ends if it is not used any more. Asking about a key is no use of it."`
	Generation     Generation       `json:"generation" doc:"Which of the key's secrets was sent."`
}

// Remaining says how many requests the limits leave now, on the replica that answers.
type Remaining struct {
	Burst         int64 `json:"burst" doc:"-1: no limit."`
	MaxConcurrent int64 `json:"maxConcurrent" doc:"-1: no limit."`
}

// Generation says which of the key's secrets was sent.
type Generation struct {
	Number          int       `json:"number"`
	ValidUntil      time.Time `json:"validUntil,omitzero"`
	DeprecatedSince time.Time `json:"deprecatedSince,omitzero" doc:"When a newer secret came. Absent for the newest."`
}

func (h *handler) self(w http.ResponseWriter, r *http.Request) {
	peer, from := peerOf(r)
	if wait := h.wrong.Take(from); wait > 0 {
		refuseFor(w, http.StatusTooManyRequests, "TooManyRequests", "too many wrong keys came from this address", wait)
		return
	}
	asked := authz.Request{Method: r.Method, Peer: peer}
	for _, name := range h.keys.HeaderNames() {
		for _, value := range r.Header.Values(name) {
			asked.Headers = append(asked.Headers, authz.Pair{Name: name, Value: value})
		}
	}
	self, reason, err := h.keys.Self(r.Context(), &asked)
	switch {
	case err != nil:
		h.wrong.GiveBack(from)
		if !errors.Is(err, apikey.ErrUndecided) && r.Context().Err() == nil {
			h.log.Error("a holder's request failed", slog.Any("error", err))
		}
		retry := time.Second
		if busy, ok := errors.AsType[*apikey.BusyError](err); ok {
			retry = busy.RetryAfter
		}
		refuseFor(w, http.StatusServiceUnavailable, "ServiceUnavailable", "the key could not be checked right now", retry)
	case reason != authz.ReasonKey:
		w.Header().Set("WWW-Authenticate", `Bearer realm="keyward"`)
		refuse(w, http.StatusUnauthorized, "Unauthorized", "a valid API key is required: check that the key is complete, active and sent once")
	default:
		h.wrong.GiveBack(from)
		reply(w, http.StatusOK, answerOf(self))
	}
}

func answerOf(s authz.Self) Answer {
	k := s.Key
	a := Answer{
		KeyID: k.ID, InstanceID: k.InstanceID, Type: k.Type, AgentName: k.AgentName, UserPrincipalName: k.UserPrincipalName,
		Environment: k.Environment, Scopes: s.Scopes.Strings(), Limits: s.Limits, ExpirationDate: k.ExpirationDate, IdleAfter: k.IdleAfter(),
		Generation: Generation{Number: k.Generation},
	}
	if a.Scopes == nil {
		a.Scopes = []string{"*"}
	}
	at := time.Now()
	for i := range s.Standings {
		a.Standings = append(a.Standings, admin.KeyLimitOf(k, &s.Standings[i], at))
	}
	if s.Left != nil {
		a.Remaining = &Remaining{Burst: s.Left.Burst, MaxConcurrent: s.Left.Running}
	}
	if i := slices.IndexFunc(k.Generations, func(g apikey.Generation) bool { return g.Number == k.Generation }); i >= 0 {
		a.Generation.ValidUntil = k.Generations[i].ValidUntil
	}
	a.Generation.DeprecatedSince, _, _ = k.Deprecated()
	return a
}

// A Report is the body of POST /revoke.
type Report struct {
	Secret string `json:"secret" doc:"What was found, whole: it is its own proof."`
}

// An Accepted is its answer: the same whether the secret is anybody's or not.
type Accepted struct {
	Message   string `json:"message"`
	RequestID string `json:"requestId" format:"uuid" doc:"By which the audit knows the report."`
}

func (h *handler) revoke(w http.ResponseWriter, r *http.Request) {
	if media, params, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" ||
		params["charset"] != "" && !strings.EqualFold(params["charset"], "utf-8") || r.Header.Get("Content-Encoding") != "" {
		refuse(w, http.StatusUnsupportedMediaType, "UnsupportedMediaType", "the body must be application/json in UTF-8, not compressed")
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		refuse(w, http.StatusRequestEntityTooLarge, "PayloadTooLarge", "the body is larger than 4 KiB")
		return
	}
	report, good := readReport(body)
	if err != nil || !good {
		refuse(w, http.StatusBadRequest, "InvalidRequest", `the body must be {"secret": "…"} and nothing else`)
		return
	}
	_, from := peerOf(r)
	id := uuid.NewString()
	err = h.reports.ReportLeaked(apikey.NewSecret(report.Secret), from, id)
	bad, isBad := errors.AsType[*apikey.InvalidError](err)
	often, isOften := errors.AsType[*admin.RateError](err)
	busy, isBusy := errors.AsType[*apikey.BusyError](err)
	switch {
	case isBad:
		refuse(w, http.StatusBadRequest, "InvalidRequest", bad.Error())
	case isOften:
		refuseFor(w, http.StatusTooManyRequests, "TooManyRequests", "too many reports came from this address", often.RetryAfter)
	case isBusy:
		refuseFor(w, http.StatusServiceUnavailable, "ServiceUnavailable", busy.What, busy.RetryAfter)
	case err != nil:
		h.log.Error("a report of a leaked key failed", slog.Any("error", err))
		refuse(w, http.StatusInternalServerError, "InternalError", "internal error")
	default:
		reply(w, http.StatusAccepted, Accepted{"if the secret is a key's, it is ended now or its owner is told, as the instance's policy says", id})
	}
}

// readReport reads a report that is one object with one member, a text. encoding/json alone would take the
// last of two secrets, and whoever sent both would believe that both are ended.
func readReport(body []byte) (report Report, good bool) {
	d := json.NewDecoder(bytes.NewReader(body))
	var tokens []json.Token
	for len(tokens) <= 4 {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return report, false
		}
		tokens = append(tokens, token)
	}
	if len(tokens) != 4 || tokens[0] != json.Delim('{') || tokens[1] != "secret" || tokens[3] != json.Delim('}') {
		return report, false
	}
	report.Secret, good = tokens[2].(string)
	return report, good
}

// peerOf returns the address of the connection's other end, which is who counts: a header that names
// another one can be made up. The zero Addr on a Unix socket.
func peerOf(r *http.Request) (text string, _ netip.Addr) {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return "", netip.Addr{}
	}
	return peer.Addr().String(), peer.Addr()
}

func notAllowed(allow string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Allow", allow)
		refuse(w, http.StatusMethodNotAllowed, "MethodNotAllowed", "the method is not allowed here")
	}
}

// refuseFor says when to come again.
func refuseFor(w http.ResponseWriter, status int, code, message string, wait time.Duration) {
	w.Header().Set("Retry-After", strconv.Itoa(max(1, int(math.Ceil(wait.Seconds())))))
	refuse(w, status, code, message)
}

// ErrorBody is an error as JSON.
type ErrorBody struct {
	Error ErrorMembers `json:"error"`
}

// ErrorMembers are the members of an error. Codes are those of [Codes].
type ErrorMembers struct {
	Code    string `json:"code" example:"Unauthorized"`
	Message string `json:"message"`
}

func refuse(w http.ResponseWriter, status int, code, message string) {
	reply(w, status, ErrorBody{ErrorMembers{code, message}})
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	_ = e.Encode(body) // a client that left is no error
}
