package check

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/metadata"

	"keyward/authz"
)

// traced is reply with a span around it. What the span tells is public: no header, no path, no text of an
// error, as a secret may stand in each.
//
// Whose trace it is Envoy says, which puts a traceparent into the metadata of its call while it traces the
// request itself. One that a client sent, among the Check's headers, is Envoy's to believe, not ours.
func (s *Server) traced(ctx context.Context, c *call) (any, error) {
	ctx = propagation.TraceContext{}.Extract(ctx, traceContextOf(ctx))
	if parent := trace.SpanContextFromContext(ctx); parent.IsValid() && !parent.IsSampled() {
		return s.reply(ctx, c) // the tracer would say the same, at a higher price
	}
	ctx, span := s.tracer.Start(ctx, fullMethod[1:], trace.WithSpanKind(trace.SpanKindServer))
	defer func() { span.End() }() // End itself would record what a panic says
	answer, err := s.reply(ctx, c)
	if span.IsRecording() {
		describe(span, &c.decision, err != nil || c.undecided)
	}
	return answer, err
}

// describe says what was decided. A decision means nothing if there was none.
func describe(span trace.Span, d *authz.Decision, undecided bool) {
	if undecided {
		span.SetAttributes(attribute.String("keyward.outcome", "undecided"))
		span.SetStatus(codes.Error, "could not decide")
		return
	}
	span.SetAttributes(
		attribute.String("keyward.outcome", d.Outcome().String()),
		attribute.String("keyward.reason", d.Reason.String()),
		attribute.String("keyward.decision_id", d.ID.String()),
	)
	if route, _, _ := d.Route(); route != "" {
		span.SetAttributes(attribute.String("keyward.route", route))
	}
	switch {
	case d.Key != nil:
		span.SetAttributes(attribute.String("keyward.key_id", d.Key.ID.String()), attribute.String("keyward.instance", d.Key.InstanceID))
	case d.InstanceID != "":
		span.SetAttributes(attribute.String("keyward.instance", d.InstanceID))
	}
}

// A traceContext is what a call says of the trace that it is part of.
type traceContext struct{ parent, state string }

func traceContextOf(ctx context.Context) traceContext {
	one := func(name string) string {
		if values := metadata.ValueFromIncomingContext(ctx, name); len(values) == 1 {
			return values[0]
		}
		return ""
	}
	return traceContext{one("traceparent"), one("tracestate")}
}

// Get makes it a propagation.TextMapCarrier, as do the others; nothing is sent on.
func (c traceContext) Get(name string) string {
	if name == "traceparent" {
		return c.parent
	}
	return c.state
}

func (traceContext) Set(string, string) {}
func (traceContext) Keys() []string     { return nil }
