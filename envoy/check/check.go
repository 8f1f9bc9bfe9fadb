// Package check is Envoy's ext_authz service (v3): it turns a CheckRequest into an authz.Request and an
// authz.Decision into a CheckResponse.
//
// To Envoy, a response without a status is an "allowed". So answers are made in one place, by the allow,
// deny and failure writers below, and looked at once more before they leave; anything else becomes an
// RPC error, which Envoy answers with 503 as configured by envoy/generate. A panic ends the same way.
//
// Trade-off: nothing here is retried or cached. Envoy asks, keyward answers, and what cannot be decided
// in time is said to be so.
package check

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"keyward/authz"
	"keyward/authz/apikey"
)

// Config says how answers look. The zero value works.
type Config struct {
	Identity Identity
	// Realm stands in the WWW-Authenticate header of a 401; "keyward" if empty.
	Realm string
	// ErrorResponse answers "could not decide" with Envoy's error_response, which carries a Retry-After,
	// instead of an RPC error. Envoys before 1.37 take it for a 403: use it only without them.
	ErrorResponse bool
	// Timeout bounds a decision that has to wait; 1 s if zero. Some platforms give Envoy's own call ten
	// minutes.
	Timeout time.Duration
	// Leases make the ids by which Envoy's access log names what it was granted. Needed.
	Leases *authz.LeaseIDs
	// Format is how secrets look: what looks like one in a path is not logged.
	Format apikey.Format
	// LogPerSecond is how many decisions are logged at most; the rest are counted. 0: none.
	LogPerSecond int
}

// Validate reports what New would not take.
func (c Config) Validate() error {
	_, err := newAnswers(c)
	return err
}

// A Server answers Checks. Safe for concurrent use.
type Server struct {
	authv3.UnimplementedAuthorizationServer

	authorizer *authz.Authorizer
	answers    answers
	timeout    time.Duration
	requests   sync.Pool
	log        *decisionLog
	metrics    *metrics
}

// New returns a Server that asks the authorizer.
func New(a *authz.Authorizer, cfg Config, reg prometheus.Registerer, log *slog.Logger) (*Server, error) {
	answers, err := newAnswers(cfg)
	if err != nil {
		return nil, err
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = time.Second
	}
	return &Server{
		authorizer: a,
		answers:    answers,
		timeout:    cfg.Timeout,
		requests:   sync.Pool{New: func() any { return new(authz.Request) }},
		log:        newDecisionLog(log, cfg.LogPerSecond, cfg.Format),
		metrics:    newMetrics(reg),
	}, nil
}

// Check decides one request. A denial is a CheckResponse with a status other than 0; an error means that
// keyward could not decide.
func (s *Server) Check(ctx context.Context, in *authv3.CheckRequest) (out *authv3.CheckResponse, err error) {
	start := time.Now()
	var d authz.Decision
	defer func() {
		if p := recover(); p != nil {
			s.authorizer.TakeBack(ctx, &d)
			s.metrics.panics.Inc()
			s.log.panicked(p)
			out, err = nil, status.Error(codes.Internal, "keyward failed to decide; its log says more")
		}
	}()

	r := s.requests.Get().(*authz.Request)
	defer func() {
		r.Reset()
		s.requests.Put(r)
	}()
	about, err := fill(r, in, s.authorizer.HeaderNames())
	connection := connectionOf(ctx)
	r.Connection = connection.ConnectionID()
	if err != nil {
		s.metrics.malformed.Inc()
		return nil, err
	}

	ok, err := s.authorizer.Try(r, &d)
	if !ok {
		waiting, cancel := context.WithTimeout(ctx, s.timeout)
		err = s.authorizer.Decide(waiting, r, &d)
		cancel()
	}
	if err != nil {
		s.metrics.failed(time.Since(start))
		s.log.failed(r, &d, err)
		return sealed(s.answers.failure(&d, about, err))
	}
	if d.Reason == authz.ReasonLimitConcurrency && connection.Unheard() {
		d.Reason = authz.ReasonNoFeedback
		s.log.noFeedback(connection.ConnectionID())
	}
	took := time.Since(start)
	s.metrics.decided(&d, took)
	s.log.decided(r, &d, took)
	if d.Outcome() != authz.Allowed {
		return sealed(s.answers.deny(&d, about), nil)
	}
	out, err = sealed(s.answers.allow(&d), nil)
	if !d.Leased {
		return out, err
	}
	connection.Granted()
	if err == nil && ctx.Err() != nil {
		err = rpcStatus(ctx.Err()) // nobody waits for this any more, so nobody would ever say that it ended
	}
	if err != nil {
		s.authorizer.TakeBack(ctx, &d)
		return nil, err
	}
	return out, nil
}

// A Connection is what the server knows of the connection that a Check came by. The listener's
// addresses implement it. Safe for concurrent use.
type Connection interface {
	ConnectionID() uint64
	// Granted notes that a lease was granted.
	Granted()
	// Unheard reports whether leases were granted long enough ago and no end of any was ever heard.
	Unheard() bool
}

// connectionOf returns the record of a call's connection.
func connectionOf(ctx context.Context) Connection {
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.Addr.(Connection); ok {
			return c
		}
	}
	return noConnection{}
}

// noConnection stands for a connection of which nothing is known.
type noConnection struct{}

func (noConnection) ConnectionID() uint64 { return 0 }
func (noConnection) Granted()             {}
func (noConnection) Unheard() bool        { return false }

// sealed lets only whole answers out: an allow that says so, or a refusal that says so.
func sealed(r *authv3.CheckResponse, err error) (*authv3.CheckResponse, error) {
	if err != nil {
		return nil, err
	}
	refused := r.GetStatus().GetCode() != int32(codes.OK)
	if r.GetStatus() == nil ||
		refused == (r.GetOkResponse() != nil) ||
		refused != (r.GetDeniedResponse() != nil || r.GetErrorResponse() != nil) {
		return nil, status.Error(codes.Internal, "keyward made half an answer")
	}
	return r, nil
}

// about is what an answer needs to know of the request it answers.
type about struct {
	grpc bool // the caller speaks gRPC
}

// rpcStatus turns "could not decide" into the error of the call.
func rpcStatus(err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "keyward could not decide in time")
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the caller is gone")
	}
	return status.Error(codes.Unavailable, "keyward could not decide; its log says more")
}

// describePanic says what a panic was without its value, which may hold what a request carried.
func describePanic(p any) (what string, stack string) {
	what = fmt.Sprintf("%T", p)
	if e, ok := p.(runtime.Error); ok {
		what = e.Error() // indices and types only
	}
	return what, string(debug.Stack())
}

// isUndecided tells an outage that was expected to happen some day from a fault of ours.
func isUndecided(err error) bool {
	return errors.Is(err, apikey.ErrUndecided) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
