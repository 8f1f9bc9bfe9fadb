// Package accesslog hears from Envoy that requests ended or still run, and tells whoever counts them.
//
// There are two logs. That of leases says which requests run no longer; that of usage, named
// keyward-usage, how each request of a known key went. Neither is ever taken for the other: an entry of
// usage ends no lease, and one of a lease counts as no usage.
//
// It speaks both protocols that Envoy has for access logs: its own (gRPC ALS v3, a stream for each of
// Envoy's workers) and OTLP logs (a call for each batch). Entries are read in place, only the few fields
// that matter. An entry may name a lease, which must be one that keyward made for this very request; or
// only a request, and then no lease of it can be in use any more.
//
// Trade-off: access logs are never acknowledged, so nothing here is an error to Envoy. What cannot be
// read, is not ours or cannot be passed on is counted and dropped, and the lease runs out by itself.
//
// The services take their bytes raw: the gRPC server needs the codec of package wire.
package accesslog

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"keyward/authz"
	"keyward/envoy/wire"
	"keyward/limits"
)

const (
	// batchSize is how many renewals or endings are passed on at once. It bounds what one message can
	// hold in memory, however many entries it has.
	batchSize = 1024
	// passOnTimeout bounds how long a stream waits for the leases' keeper. Meanwhile Envoy is held back.
	passOnTimeout = time.Second
	alsName       = "envoy.service.accesslog.v3.AccessLogService"
	otlpName      = "opentelemetry.proto.collector.logs.v1.LogsService"
)

// A Server hears access logs. Safe for concurrent use.
type Server struct {
	leaser  limits.Leaser
	usage   usageCounter
	ids     *authz.LeaseIDs
	nodes   nodes
	names   names
	batches sync.Pool // of *batch
	metrics *metrics
	log     *slog.Logger

	stopping chan struct{}
	stop     sync.Once
	hearing  sync.WaitGroup
}

// New returns a Server that passes on to leaser and usage what it hears. The leaser must not keep the slices
// it is given. Without usage that log is ignored.
func New(leaser limits.Leaser, usage usageCounter, ids *authz.LeaseIDs, reg prometheus.Registerer, log *slog.Logger) *Server {
	s := &Server{
		leaser:  leaser,
		usage:   usage,
		ids:     ids,
		nodes:   nodes{known: map[uint64]*sender{}},
		names:   names{known: map[string]string{}},
		batches: sync.Pool{New: func() any { return new(batch) }},
		log:     log,

		stopping: make(chan struct{}),
	}
	s.metrics = newMetrics(reg, s.nodes.count)
	return s
}

// Register adds both services to a gRPC server. Its largest message must be larger than Envoy's batches
// (buffer_size_bytes of its configuration, and an entry more): 4 MiB do for batches of 1 MiB.
func (s *Server) Register(to grpc.ServiceRegistrar) {
	to.RegisterService(&alsService, s)
	to.RegisterService(&otlpService, s)
}

var alsService = grpc.ServiceDesc{
	ServiceName: alsName,
	HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{{
		StreamName:    "StreamAccessLogs",
		ClientStreams: true,
		Handler:       func(srv any, stream grpc.ServerStream) error { return srv.(*Server).stream(stream) },
	}},
	Metadata: "envoy/service/accesslog/v3/als.proto",
}

var otlpService = grpc.ServiceDesc{
	ServiceName: otlpName,
	HandlerType: (*any)(nil),
	Methods:     []grpc.MethodDesc{{MethodName: "Export", Handler: export}},
	Metadata:    "opentelemetry/proto/collector/logs/v1/logs_service.proto",
}

// Stop ends all streams, which Envoy never does: a server that stops gracefully would wait for them for
// ever. To be called when no request is decided any more.
func (s *Server) Stop() { s.stop.Do(func() { close(s.stopping) }) }

// Wait returns when nothing is passed on any more. To be called after Stop, when the gRPC server has
// ended.
func (s *Server) Wait() { s.hearing.Wait() }

// stream hears one ALS stream until Envoy or Stop ends it.
func (s *Server) stream(stream grpc.ServerStream) error {
	ended := make(chan error, 1)
	s.hearing.Go(func() { ended <- s.hear(stream) }) // ends with the stream, which ends when this returns
	select {
	case err := <-ended:
		return err
	case <-s.stopping:
		return nil
	}
}

func (s *Server) hear(stream grpc.ServerStream) error {
	s.metrics.streams.Inc()
	defer s.metrics.streams.Dec()
	from := source{sender: s.nodes.of(stream.Context())}
	var m wire.Message
	defer m.Free()
	for {
		if err := stream.RecvMsg(&m); errors.Is(err, io.EOF) {
			return stream.SendMsg(&wire.Answer{})
		} else if err != nil {
			return err
		}
		s.read(stream.Context(), &from, &m, readALS)
		m.Free()
	}
}

// export hears one batch of OTLP logs.
func export(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
	m := new(wire.Message)
	defer m.Free()
	if err := decode(m); err != nil {
		return nil, err
	}
	s := srv.(*Server)
	handle := func(ctx context.Context, in any) (any, error) {
		from := source{sender: s.nodes.of(ctx)}
		s.read(ctx, &from, in.(*wire.Message), readOTLP)
		return &wire.Answer{}, nil
	}
	if interceptor == nil {
		return handle(ctx, m)
	}
	return interceptor(ctx, m, &grpc.UnaryServerInfo{Server: srv, FullMethod: "/" + otlpName + "/Export"}, handle)
}

// A source is what is known of where entries come from: of a stream for as long as it lasts.
type source struct {
	sender *sender
	usage  bool
}

// named notes how the other side calls itself.
func (f *source) named(o origin) {
	f.usage = o.log == usageLog
	f.sender.name(o.node, o.cluster)
}

// A batch is what one message says, until it is passed on.
type batch struct {
	renewals []limits.Lease
	endings  []limits.Ending
}

// read understands one message and passes on what it says, renewals before ends: a request that ended
// does not come back because both were logged at once.
func (s *Server) read(ctx context.Context, from *source, m *wire.Message, parse parser) {
	now := time.Now()
	b := s.batches.Get().(*batch)
	entries, ends := int64(0), int64(0)
	defer func() {
		if p := recover(); p != nil {
			s.panicked(p) // the batch is left to the garbage collector: nobody knows what is in it
		} else {
			s.batches.Put(b)
		}
		from.sender.heard(now, entries, ends)
	}()
	parse(m.Bytes(), from.named, func(e entry) {
		entries++
		k := s.judge(&e, from, b, now)
		s.metrics.entries[k].Inc()
		switch k {
		case kindEnd, kindIdentityEnd:
			ends++
			from.sender.speaks.Store(true)
		case kindRenewal:
			from.sender.speaks.Store(true)
		}
		if len(b.renewals) == batchSize || len(b.endings) == batchSize {
			s.passOn(ctx, b)
		}
	})
	s.passOn(ctx, b)
}

// judge decides what an entry means and puts that into b. An entry with a lease that is not right never
// counts as one without: whoever made it up could name any request.
func (s *Server) judge(e *entry, from *source, b *batch, now time.Time) kind {
	if e.broken {
		return kindMalformed
	}
	if from.usage {
		return s.count(e)
	}
	if e.event == eventOther {
		return kindIgnored
	}
	identity := authz.IdentityOf(e.peer, e.start)
	if e.lease == "" {
		if e.event != eventEnd || identity.IsZero() {
			return kindIgnored
		}
		b.endings = append(b.endings, limits.Ending{
			Lease: limits.Lease{Identity: identity}, AllOfIdentity: true, Cause: limits.CauseIdentity,
		})
		return kindIdentityEnd
	}
	lease, err := s.ids.Open(e.lease, identity)
	switch {
	case errors.Is(err, authz.ErrLeaseForged):
		s.complain(&s.metrics.forged, "an access log names a lease that is not its request's: somebody else can write access logs here, or two keywards have different peppers of one version")
		return kindForged
	case errors.Is(err, authz.ErrLeaseVersion):
		s.complain(&s.metrics.foreign, "an access log names a lease of an unknown pepper: give this keyward the pepper that granted it, as pepper.previousFile while a rotation lasts")
		return kindForeign
	case err != nil:
		return kindMalformed
	case e.event == eventPeriodic:
		b.renewals = append(b.renewals, lease)
		return kindRenewal
	}
	b.endings = append(b.endings, limits.Ending{Lease: lease, Cause: limits.CauseLog})
	s.metrics.late(now, e.end)
	return kindEnd
}

// passOn tells the leaser what b holds, and empties it.
func (s *Server) passOn(ctx context.Context, b *batch) {
	if len(b.renewals) == 0 && len(b.endings) == 0 {
		return
	}
	// What was heard counts, also if the stream broke right after it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), passOnTimeout)
	defer cancel()
	var renewed, ended error
	if len(b.renewals) > 0 {
		renewed = s.leaser.Renew(ctx, b.renewals)
	}
	if len(b.endings) > 0 {
		ended = s.leaser.End(ctx, b.endings)
	}
	if err := errors.Join(renewed, ended); err != nil {
		s.metrics.failures.Inc()
		s.complain(&s.metrics.lost, "what an access log said could not be passed on; its leases run out by themselves", "error", err)
	}
	b.renewals, b.endings = b.renewals[:0], b.endings[:0]
}

// connectionOf returns the number of a call's connection, 0 if it has none. The listener gives it, in
// the addresses of its connections.
func connectionOf(ctx context.Context) uint64 {
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.Addr.(interface{ ConnectionID() uint64 }); ok {
			return c.ConnectionID()
		}
	}
	return 0
}
