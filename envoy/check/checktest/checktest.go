// Package checktest answers Checks through generated code: the plain way, which package check does
// without. Tests compare the two; and a keyward built with -tags keyward_standard_codec serves it, so
// that make bench can say what the difference is worth.
package checktest

import (
	"context"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	grpcstatus "google.golang.org/grpc/status"

	"keyward/authz"
	"keyward/envoy/check"
)

// A Server is an authv3.AuthorizationServer. It decides as a check.Server does, without its log and
// metrics. Safe for concurrent use.
type Server struct {
	authv3.UnimplementedAuthorizationServer

	authorizer *authz.Authorizer
	answers    answers
	timeout    time.Duration
}

// New returns a Server that asks the authorizer; nil for tests that only read or write messages.
func New(a *authz.Authorizer, cfg check.Config) (*Server, error) {
	answers, err := newAnswers(cfg)
	if err != nil {
		return nil, err
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = time.Second
	}
	return &Server{authorizer: a, answers: answers, timeout: cfg.Timeout}, nil
}

// Check decides one request.
func (s *Server) Check(ctx context.Context, in *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	var r authz.Request
	var d authz.Decision
	want := Wanted{Headers: s.authorizer.HeaderNames(), Extensions: s.authorizer.ExtensionNames(), Body: s.authorizer.WantsBody()}
	want.Payload, want.Claims = s.authorizer.ClaimNames()
	grpc, err := Fill(&r, in, want)
	if err != nil {
		return nil, err
	}
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.Addr.(check.Connection); ok {
			r.Connection = c.ConnectionID()
			defer func() {
				if d.Leased {
					c.Granted()
				}
			}()
		}
	}
	ok, err := s.authorizer.Try(&r, &d)
	if !ok {
		ctx, cancel := context.WithTimeout(ctx, s.timeout)
		defer cancel()
		err = s.authorizer.Decide(ctx, &r, &d)
	}
	switch {
	case err != nil:
		return s.Failure(&d, grpc, err)
	case d.Outcome() != authz.Allowed:
		return s.Deny(&d, grpc), nil
	case d.Leased && ctx.Err() != nil:
		s.authorizer.TakeBack(ctx, &d)
		return nil, grpcstatus.Error(codes.Canceled, "the caller is gone")
	}
	return s.Allow(&d), nil
}

// Allow is the answer to a request that is let through.
func (s *Server) Allow(d *authz.Decision) *authv3.CheckResponse { return s.answers.allow(d) }

// Deny is the answer to a request that is refused; grpc says that the caller speaks gRPC.
func (s *Server) Deny(d *authz.Decision, grpc bool) *authv3.CheckResponse {
	return s.answers.deny(d, grpc)
}

// Failure says that a request could not be decided.
func (s *Server) Failure(d *authz.Decision, grpc bool, err error) (*authv3.CheckResponse, error) {
	return s.answers.failure(d, grpc, err)
}
