package check

import (
	"context"

	"keyward/authz"
)

// Answer answers one message on a connection that nothing is known of.
func (s *Server) Answer(ctx context.Context, message, dst []byte) ([]byte, error) {
	return s.answerOn(ctx, connectionOf(ctx), message, dst)
}

func (s *Server) answerOn(ctx context.Context, from Connection, message, dst []byte) ([]byte, error) {
	c := s.calls.Get().(*call)
	defer func() {
		c.reset()
		s.calls.Put(c)
	}()
	return s.answer(ctx, from, c, message, dst)
}

// Handle answers as gRPC lets it: decode gives the message, and the answer is the codec's to send.
func (s *Server) Handle(ctx context.Context, decode func(any) error) (any, error) {
	return handle(s, ctx, decode, nil)
}

// Read reads a message as a Check does.
func Read(r *authz.Request, message []byte, headers, extensions []string, payload string, claims []string, body bool) (grpc bool, err error) {
	c := reader{to: r, headers: headers, extensions: extensions, payload: payload, claims: claims, body: body}
	about, err := c.read(message)
	return about.grpc, err
}

// Allow, Deny and Failure write answers.
func (s *Server) Allow(d *authz.Decision) []byte { return s.answers.allow(nil, d) }
func (s *Server) Deny(d *authz.Decision, grpc bool) []byte {
	return s.answers.deny(nil, d, about{grpc})
}
func (s *Server) Failure(d *authz.Decision, grpc bool, err error) ([]byte, error) {
	return s.answers.failure(nil, d, about{grpc}, err)
}

// ErrMalformed is what Read gives for bytes that are no message.
var ErrMalformed = errMalformed

// Complete reports whether an answer may leave.
func Complete(answer []byte) bool { return complete(answer) }
