package check_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/envoy/check"
	"keyward/envoy/wire"
)

// recorded is a tracer that begins a share of traces itself, and what it ends.
func recorded(ratio float64) (trace.Tracer, *tracetest.SpanRecorder) {
	spans := tracetest.NewSpanRecorder()
	return sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(ratio)))).Tracer("test"), spans
}

// handle asks as gRPC does.
func handle(t testing.TB, server *check.Server, ctx context.Context, message []byte) { //nolint:revive // t first
	t.Helper()
	codec := wire.NewCodec()
	out, err := server.Handle(ctx, func(v any) error { return codec.Unmarshal(mem.BufferSlice{mem.SliceBuffer(message)}, v) })
	if err != nil {
		return // the span says it
	}
	sent, err := codec.Marshal(out)
	if err != nil {
		t.Fatal(err)
	}
	sent.Free()
}

// said is the context of a call with these traceparents in its metadata.
func said(parents ...string) context.Context {
	return metadata.NewIncomingContext(context.Background(), metadata.MD{"traceparent": parents})
}

const parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-"

// TestSpans: whoever asks decides what is traced, and where nobody did the ratio does. A traceparent among the
// request's own headers, which is a client's, counts for nothing. A span says no outcome that there was not,
// whichever way Envoy is told.
func TestSpans(t *testing.T) {
	unknown := func() (*apikey.Key, error) { return nil, apikey.ErrNotFound }
	away := func() (*apikey.Key, error) { return nil, fmt.Errorf("%w: the disk is gone", apikey.ErrUndecided) }
	type attributes map[string]string
	for name, test := range map[string]struct {
		ctx     context.Context
		ratio   float64
		find    func() (*apikey.Key, error)
		message []byte     // nil: a good one
		want    attributes // nil: no span
	}{
		"sampled by Envoy": {
			ctx: said(parent + "01"), find: known,
			want: attributes{"outcome": "allowed", "reason": "key", "key_id": keyID.String(), "instance": "demo", "parent": "00f067aa0ba902b7"},
		},
		"not sampled by Envoy": {ctx: said(parent + "00"), ratio: 1, find: known},
		"nobody said, all": {
			ctx: context.Background(), ratio: 1, find: unknown,
			want: attributes{"outcome": "unauthenticated", "reason": "unknown_key", "parent": "0000000000000000"},
		},
		"nobody said, none":   {ctx: context.Background(), find: known},
		"nonsense":            {ctx: said("00-zz-01"), find: known},
		"two":                 {ctx: said(parent+"01", parent+"01"), find: known},
		"an RPC error":        {ctx: said(parent + "01"), find: known, message: []byte("\xff"), want: attributes{"outcome": "undecided", "parent": "00f067aa0ba902b7"}},
		"the store is away":   {ctx: said(parent + "01"), find: away, want: attributes{"outcome": "undecided", "parent": "00f067aa0ba902b7"}},
		"keyward has a fault": {ctx: said(parent + "01"), find: func() (*apikey.Key, error) { panic(secret) }, want: attributes{"outcome": "undecided", "parent": "00f067aa0ba902b7"}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFacts()
			f.find = test.find
			tracer, spans := recorded(test.ratio)
			server, _, _ := newServer(t, f, authz.Config{}, check.Config{Tracer: tracer, ErrorResponse: true})
			if test.message == nil {
				test.message = marshal(t, fullRequest(secret))
			}
			handle(t, server, test.ctx, test.message)
			var got attributes
			for _, span := range spans.Ended() {
				if got != nil {
					t.Error("more than one span")
				}
				got = attributes{"parent": span.Parent().SpanID().String()}
				for _, a := range span.Attributes() {
					if a.Key != "keyward.decision_id" {
						got[string(a.Key)[len("keyward."):]] = a.Value.String()
					}
				}
				undecided := got["outcome"] == "undecided"
				if s := span.Status(); (s.Code == codes.Error) != undecided || undecided && s.Description != "could not decide" || len(span.Events()) > 0 {
					t.Errorf("status %+v, events %v", s, span.Events())
				}
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
			if n := len(spans.Started()); n != len(spans.Ended()) {
				t.Errorf("%d spans began, %d ended", n, len(spans.Ended()))
			}
		})
	}
}

// BenchmarkTraced measures what traces cost a Check of a cached key, as gRPC calls it. Without them it is
// TestCheckAllocatesNothing that holds the price.
func BenchmarkTraced(b *testing.B) {
	s := newStack(b, 10)
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.NeverSample()))).Tracer("bench")
	traced, err := s.another(check.Config{Tracer: tracer})
	if err != nil {
		b.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		server *check.Server
		ctx    context.Context
	}{
		{"off", s.server, said(parent + "01")},
		{"not_sampled_by_Envoy", traced, said(parent + "00")},
		{"not_sampled_by_keyward", traced, context.Background()},
		{"sampled", traced, said(parent + "01")},
	} {
		b.Run(test.name, func(b *testing.B) {
			a := newAsked(b, s.free[0])
			b.ReportAllocs()
			for b.Loop() {
				handle(b, test.server, test.ctx, a.next(s.free[0]))
			}
		})
	}
}
