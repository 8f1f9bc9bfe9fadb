// Package check is Envoy's ext_authz service (v3): it turns the bytes of a CheckRequest into an
// authz.Request and an authz.Decision into the bytes of a CheckResponse. Envoy waits for every Check, so
// neither goes through generated types, and a Check of a known key allocates nothing.
//
// To Envoy, a response without a status is an "allowed". So answers are made in one place, by the allow,
// deny and failure writers below, and looked at once more before they leave; anything else becomes an
// RPC error, which Envoy answers with 503 as configured by envoy/generate. A panic ends the same way.
//
// Trade-off: nothing here is retried or cached. Envoy asks, keyward answers, and what cannot be decided
// in time is said to be so. And the messages' field numbers stand in this package again; package
// checktest does the same with generated code, against which both directions are tested.
//
// The gRPC server needs the codec of package wire.
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

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/envoy/wire"
)

// DefaultRealm stands in the WWW-Authenticate header where none is configured.
const DefaultRealm = "keyward"

// Config says how answers look. The zero value works.
type Config struct {
	Identity Identity
	// Realm stands in the WWW-Authenticate header of a 401; DefaultRealm if empty.
	Realm string
	// ErrorResponse answers "could not decide" with Envoy's error_response, which carries a Retry-After,
	// instead of an RPC error. Envoys before 1.37 take it for a 403: use it only without them.
	ErrorResponse bool
	// Deprecation tells clients with an older secret than their key's newest so: allowed requests, and those
	// that only a limit refuses, are answered with a Deprecation header and, where the secret's end is known,
	// a Sunset.
	Deprecation bool
	// LegacyRateLimit adds X-RateLimit-Limit, -Remaining and -Reset to wherever RateLimit is.
	LegacyRateLimit bool
	// Timeout bounds a decision that has to wait; 1 s if zero. Some platforms give Envoy's own call ten
	// minutes.
	Timeout time.Duration
	// Leases make the ids by which Envoy's access log names what it was granted. Needed.
	Leases *authz.LeaseIDs
	// Format is how secrets look: what looks like one in a path is not logged.
	Format apikey.Format
	// MaxBody is how much of a body Envoy sends where a rule needs it, in bytes.
	MaxBody int
	// LogPerSecond is how many decisions are logged at most; the rest are counted. 0: none.
	LogPerSecond int
	// LogKey is what the log's names for principals are made under, so that nobody finds out whose they are by
	// guessing. Zero: one that nobody else has, until this process ends.
	LogKey [32]byte
	// Tracer makes a span of each Check that is sampled. nil: there are no traces, at no cost.
	Tracer trace.Tracer
}

// Validate reports what New would not take.
func (c Config) Validate() error {
	_, err := newAnswers(c)
	return err
}

// A Server answers Checks. Safe for concurrent use.
type Server struct {
	authorizer *authz.Authorizer
	answers    answers
	timeout    time.Duration
	maxBody    int
	calls      sync.Pool // of *call
	log        *decisionLog
	metrics    *metrics
	tracer     trace.Tracer // nil: no traces
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
		maxBody:    cfg.MaxBody,
		calls:      sync.Pool{New: func() any { return new(call) }},
		log:        newDecisionLog(log, &cfg),
		metrics:    newMetrics(reg),
		tracer:     cfg.Tracer,
	}, nil
}

// A call is one Check under way. It is used again, so that a Check allocates nothing.
type call struct {
	message  wire.Message
	request  authz.Request
	decision authz.Decision
	reader   reader
	// undecided says that the answer, which is one of error_response, is none.
	undecided bool
}

// reset forgets all that the call borrowed or carried.
func (c *call) reset() {
	c.request.Reset()
	c.reader.reset()
	c.decision = authz.Decision{}
	c.undecided = false
	c.message.Free()
}

// maxMessage is far above any Check that Envoy sends, besides the body.
const maxMessage = 256 << 10 // bytes

var errTooLong = status.Error(codes.ResourceExhausted, "a Check of more than 256 KiB beside its body: let Envoy send fewer headers (allowed_headers), and no larger a body than envoy.maxRequestBytes")

// check is the method of the service, for a server with the codec of package wire. The bytes of the
// request stay referenced until the answer is written, and are given back once, whatever happens.
func (s *Server) check(ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
	c := s.calls.Get().(*call)
	defer func() {
		c.reset()
		s.calls.Put(c)
	}()
	if err := decode(&c.message); err != nil {
		return nil, err
	}
	if interceptor == nil {
		if s.tracer != nil {
			return s.traced(ctx, c)
		}
		return s.reply(ctx, c)
	}
	return interceptor(ctx, &c.message, &grpc.UnaryServerInfo{Server: s, FullMethod: fullMethod},
		func(ctx context.Context, _ any) (any, error) { return s.reply(ctx, c) })
}

// reply answers a call in a buffer that gRPC takes over.
func (s *Server) reply(ctx context.Context, c *call) (any, error) {
	out := wire.NewAnswer()
	answer, err := s.answer(ctx, connectionOf(ctx), c, c.message.Bytes(), *out)
	if err != nil {
		out.Drop()
		return nil, err
	}
	*out = answer
	return out, nil
}

// answer decides one request and appends the answer to dst. A denial is a CheckResponse with a status
// other than 0; an error means that keyward could not decide.
func (s *Server) answer(ctx context.Context, from Connection, c *call, message, dst []byte) (out []byte, err error) {
	start := time.Now()
	r, d := &c.request, &c.decision
	defer func() {
		if p := recover(); p != nil {
			s.authorizer.TakeBack(ctx, d)
			s.metrics.panics.Inc()
			s.log.panicked(p)
			out, err = nil, status.Error(codes.Internal, "keyward failed to decide; its log says more")
		}
	}()
	c.reader.body = s.authorizer.WantsBody()
	most := maxMessage
	if c.reader.body {
		most += s.maxBody
	}
	if len(message) > most {
		s.metrics.malformed.Inc()
		return nil, errTooLong
	}
	r.At, r.Connection = start, from.ConnectionID()
	c.reader.to, c.reader.headers, c.reader.extensions = r, s.authorizer.HeaderNames(), s.authorizer.ExtensionNames()
	c.reader.payload, c.reader.claims = s.authorizer.ClaimNames()
	about, err := c.reader.read(message)
	if err != nil {
		s.metrics.malformed.Inc()
		return nil, err
	}

	ok, err := s.authorizer.Try(r, d)
	if !ok {
		waiting, cancel := context.WithTimeout(ctx, s.timeout)
		err = s.authorizer.Decide(waiting, r, d)
		cancel()
	}
	if err != nil {
		s.metrics.failed(time.Since(start))
		s.log.failed(r, d, err)
		c.undecided = true
		return sealed(s.answers.failure(dst, d, about, err))
	}
	if d.Reason == authz.ReasonLimitConcurrency && from.Unheard() {
		d.Reason = authz.ReasonNoFeedback
		s.log.noFeedback(from.ConnectionID())
	}
	took := time.Since(start)
	s.metrics.decided(d, took)
	s.log.decided(r, d, took)
	s.authorizer.Decided(r, d, start.Add(took))
	if d.Outcome() != authz.Allowed {
		return sealed(s.answers.deny(dst, d, about), nil)
	}
	out, err = sealed(s.answers.allow(dst, d), nil)
	if !d.Leased {
		return out, err
	}
	from.Granted()
	if err == nil && ctx.Err() != nil {
		err = rpcStatus(ctx.Err()) // nobody waits for this any more, so nobody would ever say that it ended
	}
	if err != nil {
		s.authorizer.TakeBack(ctx, d)
		return nil, err
	}
	return out, nil
}

// sealed lets only whole answers out.
func sealed(answer []byte, err error) ([]byte, error) {
	if err == nil && !complete(answer) {
		err = status.Error(codes.Internal, "keyward made half an answer")
	}
	if err != nil {
		return nil, err
	}
	return answer, nil
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
