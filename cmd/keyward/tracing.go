package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/url"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/encoding"

	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
	"keyward/cache"
)

// Tracing says where traces of Checks and of the Management API go. What is not set here the OpenTelemetry SDK
// takes from its own OTEL_ variables, as operators expect of it: above all the headers that a collector wants
// to see, which are secrets and stand in no configuration. With enabled: false nobody reads them.
//
// OTLP over HTTP alone, because of [noGzip].
type Tracing struct {
	Enabled  bool    `yaml:"enabled"`
	Endpoint string  `yaml:"endpoint"` // URL of an OTLP receiver over HTTP; "": OTEL_EXPORTER_OTLP_ENDPOINT, else this machine
	Ratio    float64 `yaml:"ratio"`    // of the requests for which the caller has not decided already
}

func (t Tracing) validate() error {
	var faults []error
	if !(t.Ratio >= 0 && t.Ratio <= 1) { // so that NaN is refused too
		faults = append(faults, apikey.Invalid("tracing.ratio", "must be from 0 to 1"))
	}
	if _, err := t.url(); err != nil {
		faults = append(faults, err)
	}
	return errors.Join(faults...)
}

// url is where the exporter sends to; "" where the environment says it.
func (t Tracing) url() (string, error) {
	if t.Endpoint == "" {
		return "", nil
	}
	u, err := url.Parse(t.Endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "", apikey.Invalid("tracing.endpoint", "must be a URL such as http://127.0.0.1:4318, with https for TLS and without a password: "+
			"that goes into OTEL_EXPORTER_OTLP_HEADERS")
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/v1/traces" // as for OTEL_EXPORTER_OTLP_ENDPOINT
	}
	return u.String(), nil
}

// noGzip stands for gzip in grpc-go. Both of OpenTelemetry's exporters register gzip for the whole process, and then
// the server of Checks would take compressed messages, which are far larger than what whoever sends them pays for.
// Envoy compresses none.
type noGzip struct{}

var errNoGzip = errors.New("keyward takes no compressed messages")

func (noGzip) Name() string                               { return "gzip" }
func (noGzip) Compress(io.Writer) (io.WriteCloser, error) { return nil, errNoGzip }
func (noGzip) Decompress(io.Reader) (io.Reader, error)    { return nil, errNoGzip }

func init() { encoding.RegisterCompressor(noGzip{}) } // the last one registered counts

const (
	// tracesFlush is how long the end may take to send what was not sent yet.
	tracesFlush = 5 * time.Second
	// tracesComplaint is how often it is worth a line that traces do not arrive.
	tracesComplaint = time.Minute
)

// traces makes spans and sends them in the background, in batches from a queue that drops what does not fit: a
// receiver that is away costs spans, never a request. nil makes none.
type traces struct {
	provider *sdktrace.TracerProvider
	log      *slog.Logger
	flush    time.Duration // how long close may take
}

// openTraces returns nil where there are none. Nothing is connected to yet.
func openTraces(ctx context.Context, cfg Tracing, replica string, log *slog.Logger) (*traces, error) {
	if !cfg.Enabled {
		return nil, nil
	}
	// The SDK knows one place for its faults, the process's.
	var complained atomic.Int64
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		now := time.Now().Unix()
		if last := complained.Load(); now-last >= int64(tracesComplaint/time.Second) && complained.CompareAndSwap(last, now) {
			log.Warn("traces do not reach their receiver: look at tracing.endpoint and the OTEL_ variables", "error", err)
		}
	}))
	to, err := cfg.url()
	if err != nil {
		return nil, err
	}
	var options []otlptracehttp.Option
	if to != "" {
		options = append(options, otlptracehttp.WithEndpointURL(to))
	}
	exporter, err := otlptracehttp.New(ctx, options...)
	if err != nil {
		return nil, err
	}
	self, err := resource.New(ctx, resource.WithTelemetrySDK(), resource.WithAttributes(
		attribute.String("service.name", "keyward"),
		attribute.String("service.version", readVersion().Version),
		attribute.String("service.instance.id", replica),
	), resource.WithFromEnv()) // the last wins
	if err != nil {
		return nil, errors.Join(err, exporter.Shutdown(ctx))
	}
	return &traces{log: log, flush: tracesFlush, provider: sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter), sdktrace.WithResource(self),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(cfg.Ratio))),
		sdktrace.WithoutPanicRecording(), // the value of a panic may be anything
	)}, nil
}

// tracer returns nil where no traces are made.
func (t *traces) tracer() trace.Tracer {
	if t == nil {
		return nil
	}
	return t.provider.Tracer("keyward")
}

// close sends what is left, for as long as flush.
func (t *traces) close() {
	if t == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), t.flush)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		t.log.Warn("the last traces were not sent", "error", err)
	}
}

// keyStore is what a Check may have to ask of the store.
type keyStore interface {
	cache.Source
	LastUsed(ctx context.Context, id apikey.ID) (time.Time, error)
}

// keyStore is the store, with spans around what sampled Checks ask of it if traces are made.
func (s *service) keyStore() keyStore {
	if s.traces == nil {
		return s.store
	}
	return tracedStore{s.store, s.traces.tracer()}
}

type tracedStore struct {
	*sqlite.Store
	tracer trace.Tracer
}

func (t tracedStore) FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, apikey.Revision, error) {
	ctx, span := t.span(ctx, "store.FindKey")
	k, revision, err := t.Store.FindKey(ctx, d)
	endSpan(span, err)
	return k, revision, err
}

// LastUsed is asked about a key that looks idle.
func (t tracedStore) LastUsed(ctx context.Context, id apikey.ID) (time.Time, error) {
	ctx, span := t.span(ctx, "store.LastUsed")
	at, err := t.Store.LastUsed(ctx, id)
	endSpan(span, err)
	return at, err
}

// span begins one in a trace that there is already: what keyward asks on its own account has none.
func (t tracedStore) span(ctx context.Context, name string) (context.Context, trace.Span) {
	if parent := trace.SpanFromContext(ctx); !parent.IsRecording() {
		return ctx, parent
	}
	return t.tracer.Start(ctx, name, trace.WithSpanKind(trace.SpanKindClient))
}

// endSpan ends a span of the store, and not one that was not begun.
func endSpan(span trace.Span, err error) {
	switch {
	case errors.Is(err, apikey.ErrNotFound):
		span.SetAttributes(attribute.Bool("keyward.found", false))
	case err != nil:
		span.SetStatus(codes.Error, "the store failed; the log says more")
	}
	span.End() // of one that does not record, it does nothing
}
