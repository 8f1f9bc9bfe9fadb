package accesslog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/envoy/wire"
	"keyward/limits"
)

var (
	start = time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC)
	keyID = apikey.ID{1, 2, 3}
)

// keeper is a limits.Leaser that notes what it is told.
type keeper struct {
	limits.Leaser // what a log has no business with

	mu       sync.Mutex
	renewals []limits.Lease
	endings  []limits.Ending
	order    string                                 // of calls: r, e
	largest  int                                    // batch
	do       func(ctx context.Context, n int) error // called with the number of the call, from 1
}

func (k *keeper) called(ctx context.Context, what string, renewals []limits.Lease, endings []limits.Ending) error {
	k.mu.Lock()
	k.renewals = append(k.renewals, renewals...)
	k.endings = append(k.endings, endings...)
	k.order += what
	k.largest = max(k.largest, len(renewals), len(endings))
	n := len(k.order)
	k.mu.Unlock()
	if k.do != nil {
		return k.do(ctx, n)
	}
	return nil
}

func (k *keeper) calls() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.order)
}

func (k *keeper) Renew(ctx context.Context, leases []limits.Lease) error {
	return k.called(ctx, "r", leases, nil)
}

func (k *keeper) End(ctx context.Context, endings []limits.Ending) error {
	return k.called(ctx, "e", nil, endings)
}

// world is a server and what it talks to.
type world struct {
	*Server
	keeper  *keeper
	account *account
	peppers apikey.Peppers
	reg     *prometheus.Registry
	logged  *bytes.Buffer
}

func newWorld() *world {
	w := &world{
		keeper:  &keeper{},
		account: &account{},
		peppers: apikey.Peppers{Current: apikey.NewPepper(3, false), Previous: apikey.NewPepper(2, false)},
		reg:     prometheus.NewRegistry(),
		logged:  new(bytes.Buffer),
	}
	w.Server = New(w.keeper, w.account, authz.NewLeaseIDs(w.peppers), w.reg, slog.New(slog.NewJSONHandler(w.logged, nil)))
	return w
}

// received is a message as the server's codec gives it.
func received(message []byte) (m wire.Message) {
	_ = wire.NewCodec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(message)}, &m) // a message is never refused unread
	return m
}

// hear gives the server one message without a network.
func (w *world) hear(t testing.TB, parse parser, message []byte) {
	t.Helper()
	m := received(message)
	w.read(t.Context(), &source{sender: w.nodes.of(t.Context())}, &m, parse)
	m.Free()
}

// counter reads a metric; of those by kind, one.
func (w *world) counter(t testing.TB, name, kind string) float64 {
	t.Helper()
	families, err := w.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (kind == "" || m.GetLabel()[0].GetValue() == kind) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	t.Fatalf("no metric %s{kind=%q}", name, kind)
	return 0
}

// kinds lists the entries by kind, without zeros.
func (w *world) kinds(t testing.TB) map[string]float64 {
	t.Helper()
	all := map[string]float64{}
	for _, name := range kindNames {
		if n := w.counter(t, "keyward_access_log_entries_total", name); n > 0 {
			all[name] = n
		}
	}
	return all
}

// rawCodec is a client's that sends buffers and receives bytes as they are.
type rawCodec struct{}

func (rawCodec) Name() string                           { return "proto" }
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) { return v.(mem.BufferSlice), nil }
func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// countedConn counts what the server reads, and numbers its connection as the real listener does.
type countedConn struct {
	net.Conn
	read *atomic.Int64
	addr numberedAddr
}

func (c countedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.read.Add(int64(n))
	return n, err
}
func (c countedConn) RemoteAddr() net.Addr { return c.addr }

type numberedAddr uint64

func (numberedAddr) Network() string        { return "test" }
func (numberedAddr) String() string         { return "test" }
func (a numberedAddr) ConnectionID() uint64 { return uint64(a) }

type countingListener struct {
	*bufconn.Listener
	read     atomic.Int64
	accepted atomic.Uint64
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return countedConn{c, &l.read, numberedAddr(l.accepted.Add(1))}, nil
}

// serve runs the services in memory; dial opens a connection of its own each time.
func (w *world) serve(t *testing.T, options ...grpc.ServerOption) (dial func() *grpc.ClientConn, l *countingListener) {
	t.Helper()
	server := grpc.NewServer(append(options, grpc.ForceServerCodecV2(wire.NewCodec()))...)
	w.Register(server)
	l = &countingListener{Listener: bufconn.Listen(1 << 16)}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return func() *grpc.ClientConn {
		conn, err := grpc.NewClient("passthrough:///keyward", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}, l
}

// said is one entry, as Envoy would say it by either protocol.
type said struct {
	lease   string
	address string // "": a Unix socket
	port    uint32
	start   time.Time
	what    datav3.AccessLogType
	took    time.Duration
}

func (s said) als() *datav3.HTTPAccessLogEntry {
	c := &datav3.AccessLogCommon{AccessLogType: s.what, Duration: durationpb.New(s.took)}
	if !s.start.IsZero() {
		c.StartTime = timestamppb.New(s.start)
	}
	fields := map[string]*structpb.Value{"keyward.decision_id": structpb.NewStringValue("d")}
	if s.lease != "" {
		fields["keyward.lease"] = structpb.NewStringValue(s.lease)
	}
	c.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
		"envoy.filters.http.ext_authz": {Fields: fields},
		"another.filter":               {Fields: map[string]*structpb.Value{"keyward.lease": structpb.NewStringValue("not this")}},
	}}
	c.DownstreamDirectRemoteAddress = &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: s.address, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: s.port},
	}}}
	if s.address == "" {
		c.DownstreamDirectRemoteAddress = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "/run/x.sock"}}}
	}
	// The address that a client may choose never counts.
	c.DownstreamRemoteAddress = &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: "198.51.100.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 1},
	}}}
	return &datav3.HTTPAccessLogEntry{
		CommonProperties: c,
		Request:          &datav3.HTTPRequestProperties{Path: "/orders?page=2", Authority: "api.example", UserAgent: "curl/8.5.0"},
		Response:         &datav3.HTTPResponseProperties{},
	}
}

func (s said) otlp() []byte {
	or := func(v string) string {
		if v == "" {
			return "-"
		}
		return v
	}
	peer, began := "/run/x.sock", "-"
	if s.address != "" {
		peer = net.JoinHostPort(s.address, fmt.Sprint(s.port))
	}
	if !s.start.IsZero() {
		began = fmt.Sprint(s.start.UnixNano())
	}
	return join(fixed64(1, uint64(s.start.UnixNano())),
		attribute("lease", or(s.lease)), attribute("peer", peer), attribute("start", began),
		attribute("rid", "a3f0"), attribute("type", s.what.String()), attribute("duration", fmt.Sprint(s.took.Milliseconds())))
}

func alsMessage(all ...said) *alsv3.StreamAccessLogsMessage {
	logs := &alsv3.StreamAccessLogsMessage_HTTPAccessLogEntries{}
	for _, s := range all {
		logs.LogEntry = append(logs.LogEntry, s.als())
	}
	return &alsv3.StreamAccessLogsMessage{LogEntries: &alsv3.StreamAccessLogsMessage_HttpLogs{HttpLogs: logs}}
}

func otlpMessage(all ...said) []byte {
	var records [][]byte
	for _, s := range all {
		records = append(records, s.otlp())
	}
	return otlp(records...)
}

func identified(m *alsv3.StreamAccessLogsMessage, node, cluster, log string) *alsv3.StreamAccessLogsMessage {
	m.Identifier = &alsv3.StreamAccessLogsMessage_Identifier{Node: &corev3.Node{Id: node, Cluster: cluster}, LogName: log}
	return m
}

// sendALS sends messages on a stream of their own, and returns when the server has answered.
func sendALS(t testing.TB, conn *grpc.ClientConn, messages ...*alsv3.StreamAccessLogsMessage) {
	t.Helper()
	stream, err := alsv3.NewAccessLogServiceClient(conn).StreamAccessLogs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := stream.CloseAndRecv(); err != nil {
		t.Fatal(err)
	}
}

func export1(ctx context.Context, conn *grpc.ClientConn, message ...[]byte) (reply []byte, err error) {
	var buffers mem.BufferSlice
	for _, b := range message {
		buffers = append(buffers, mem.SliceBuffer(b))
	}
	err = conn.Invoke(ctx, "/opentelemetry.proto.collector.logs.v1.LogsService/Export", buffers, &reply, grpc.ForceCodecV2(rawCodec{}))
	return reply, err
}

func sendOTLP(t testing.TB, conn *grpc.ClientConn, message ...[]byte) {
	t.Helper()
	reply, err := export1(t.Context(), conn, message...)
	if err != nil {
		t.Fatal(err)
	}
	if len(reply) > 0 {
		t.Errorf("answered %x, want nothing", reply)
	}
}

const (
	atEnd      = datav3.AccessLogType_DownstreamEnd
	atInterval = datav3.AccessLogType_DownstreamPeriodic
)

func leaseOf(address string, port uint32, http uint64) limits.Lease {
	return limits.Lease{Cell: authz.LeaseCell(keyID), Identity: authz.NewIdentity(address, port, start), HTTP: http}
}

func TestWhatEntriesMean(t *testing.T) {
	w := newWorld()
	id := func(l limits.Lease) string { return string(w.ids.Append(nil, l)) }
	lease, mapped := leaseOf("203.0.113.9", 4711, 7), leaseOf("203.0.113.9", 4711, 8)
	six, unix := leaseOf("2001:db8::1", 4711, 9), leaseOf("", 0, 10)
	old := string(authz.NewLeaseIDs(apikey.Peppers{Current: w.peppers.Previous}).Append(nil, lease))
	foreign := string(authz.NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(4, false)}).Append(nil, lease))
	forged := string(authz.NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(3, false)}).Append(nil, lease))
	ended := func(l limits.Lease) []limits.Ending { return []limits.Ending{{Lease: l, Cause: limits.CauseLog}} }
	for _, tt := range []struct {
		name     string
		said     said
		kind     string
		renewals []limits.Lease
		endings  []limits.Ending
	}{
		{name: "end", said: said{id(lease), "203.0.113.9", 4711, start, atEnd, 0}, kind: "end", endings: ended(lease)},
		{name: "end, start to the nanosecond", said: said{id(lease), "203.0.113.9", 4711, start.Add(999), atEnd, 0}, kind: "end", endings: ended(lease)},
		{name: "end, address mapped", said: said{id(mapped), "::ffff:203.0.113.9", 4711, start, atEnd, 0}, kind: "end", endings: ended(mapped)},
		{name: "end, IPv6", said: said{id(six), "2001:db8::1", 4711, start, atEnd, 0}, kind: "end", endings: ended(six)},
		{name: "end, Unix socket", said: said{id(unix), "", 0, start, atEnd, 0}, kind: "end", endings: ended(unix)},
		{name: "end, previous pepper", said: said{old, "203.0.113.9", 4711, start, atEnd, 0}, kind: "end", endings: ended(lease)},
		{name: "end without lease", said: said{"", "203.0.113.9", 4711, start, atEnd, 0}, kind: "identity_end", endings: []limits.Ending{
			{Lease: limits.Lease{Identity: lease.Identity}, AllOfIdentity: true, Cause: limits.CauseIdentity},
		}},
		{name: "end without lease, Unix socket", said: said{"", "", 0, start, atEnd, 0}, kind: "ignored"},
		{name: "end without lease and start", said: said{"", "203.0.113.9", 4711, time.Time{}, atEnd, 0}, kind: "ignored"},
		{name: "end without lease and port", said: said{"", "203.0.113.9", 0, start, atEnd, 0}, kind: "ignored"},
		{name: "periodic", said: said{id(lease), "203.0.113.9", 4711, start, atInterval, 0}, kind: "renewal", renewals: []limits.Lease{lease}},
		{name: "periodic without lease", said: said{"", "203.0.113.9", 4711, start, atInterval, 0}, kind: "ignored"},
		{name: "start", said: said{id(lease), "203.0.113.9", 4711, start, datav3.AccessLogType_DownstreamStart, 0}, kind: "ignored"},
		{name: "upstream's end", said: said{id(lease), "203.0.113.9", 4711, start, datav3.AccessLogType_UpstreamEnd, 0}, kind: "ignored"},
		{name: "no type", said: said{id(lease), "203.0.113.9", 4711, start, 0, 0}, kind: "ignored"},
		{name: "unknown type", said: said{id(lease), "203.0.113.9", 4711, start, 99, 0}, kind: "ignored"},
		{name: "another's port", said: said{id(lease), "203.0.113.9", 4712, start, atEnd, 0}, kind: "forged"},
		{name: "another's address", said: said{id(lease), "203.0.113.8", 4711, start, atEnd, 0}, kind: "forged"},
		{name: "another's start", said: said{id(lease), "203.0.113.9", 4711, start.Add(time.Microsecond), atEnd, 0}, kind: "forged"},
		{name: "no start", said: said{id(lease), "203.0.113.9", 4711, time.Time{}, atEnd, 0}, kind: "forged"},
		{name: "no address", said: said{id(lease), "", 0, start, atEnd, 0}, kind: "forged"},
		{name: "made up", said: said{forged, "203.0.113.9", 4711, start, atEnd, 0}, kind: "forged"},
		{name: "made up renewal", said: said{forged, "203.0.113.9", 4711, start, atInterval, 0}, kind: "forged"},
		{name: "unknown pepper", said: said{foreign, "203.0.113.9", 4711, start, atEnd, 0}, kind: "foreign"},
		{name: "not a lease id", said: said{"lease", "203.0.113.9", 4711, start, atEnd, 0}, kind: "malformed"},
		{name: "much too long", said: said{strings.Repeat("A", 100_000), "203.0.113.9", 4711, start, atEnd, 0}, kind: "malformed"},
	} {
		for protocol, send := range map[string]func(*testing.T, *grpc.ClientConn){
			"ALS":  func(t *testing.T, conn *grpc.ClientConn) { sendALS(t, conn, alsMessage(tt.said)) },
			"OTLP": func(t *testing.T, conn *grpc.ClientConn) { sendOTLP(t, conn, otlpMessage(tt.said)) },
		} {
			t.Run(tt.name+", "+protocol, func(t *testing.T) {
				fresh := newWorld()
				fresh.ids = w.ids
				dial, _ := fresh.serve(t)
				send(t, dial())
				if diff := cmp.Diff(tt.renewals, fresh.keeper.renewals); diff != "" {
					t.Errorf("renewals (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(tt.endings, fresh.keeper.endings); diff != "" {
					t.Errorf("endings (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(map[string]float64{tt.kind: 1}, fresh.kinds(t)); diff != "" {
					t.Errorf("kinds (-want +got):\n%s", diff)
				}
				wantEnds := int64(len(tt.endings))
				if n := fresh.Nodes(); len(n) != 1 || n[0].Entries != 1 || n[0].Ends != wantEnds || n[0].LastEnd.IsZero() != (wantEnds == 0) {
					t.Errorf("nodes: got %+v", n)
				}
				if tt.said.lease != "" && strings.Contains(fresh.logged.String(), tt.said.lease) {
					t.Errorf("the log has the lease: %s", fresh.logged)
				}
			})
		}
	}
}

// TestEndBeatsRenewalOfTheSameMessage: both may be logged within one batch.
func TestEndBeatsRenewalOfTheSameMessage(t *testing.T) {
	w := newWorld()
	l := leaseOf("203.0.113.9", 4711, 7)
	id := string(w.ids.Append(nil, l))
	one := said{lease: id, address: "203.0.113.9", port: 4711, start: start, what: atEnd}
	two := one
	two.what = atInterval
	w.hear(t, readALS, marshal(t, alsMessage(one, two, one)))
	if w.keeper.order != "re" || len(w.keeper.renewals) != 1 || len(w.keeper.endings) != 2 {
		t.Errorf("got calls %q with %d renewals and %d endings, want the renewal and then both ends", w.keeper.order, len(w.keeper.renewals), len(w.keeper.endings))
	}
}

// TestLargeMessagesComeInBatches: memory is bounded however many entries a message has, and none is lost.
func TestLargeMessagesComeInBatches(t *testing.T) {
	w := newWorld()
	const n = 3*batchSize + 10
	var records [][]byte
	var want []limits.Lease
	for i := range n {
		l := leaseOf("203.0.113.9", 4711, uint64(i))
		want = append(want, l)
		records = append(records, said{string(w.ids.Append(nil, l)), "203.0.113.9", 4711, start, atEnd, 0}.otlp())
	}
	w.hear(t, readOTLP, otlp(records...))
	var got []limits.Lease
	for _, e := range w.keeper.endings {
		got = append(got, e.Lease)
	}
	if !slices.Equal(got, want) || w.keeper.largest != batchSize {
		t.Errorf("got %d endings, at most %d at once; want %d, at most %d", len(got), w.keeper.largest, n, batchSize)
	}
}

func TestFaultsAreNoErrorsToEnvoy(t *testing.T) {
	w := newWorld()
	w.keeper.do = func(_ context.Context, n int) error {
		switch n {
		case 1:
			panic("secret of a request")
		case 2:
			return errors.New("redis is away")
		}
		return nil
	}
	end := alsMessage(said{address: "203.0.113.9", port: 4711, start: start, what: atEnd})
	dial, _ := w.serve(t)
	conn := dial()
	sendALS(t, conn, end, end, end) // one stream: it goes on after the panic
	sendOTLP(t, conn, []byte("\xff\xff not protobuf"))
	if len(w.keeper.endings) != 3 {
		t.Errorf("%d ends arrived, want 3", len(w.keeper.endings))
	}
	for name, want := range map[string]float64{"keyward_access_log_panics_total": 1, "keyward_access_log_failures_total": 1} {
		if got := w.counter(t, name, ""); got != want {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	if diff := cmp.Diff(map[string]float64{"identity_end": 3, "malformed": 1}, w.kinds(t)); diff != "" {
		t.Errorf("kinds (-want +got):\n%s", diff)
	}
	if log := w.logged.String(); !strings.Contains(log, "redis is away") || !strings.Contains(log, "accesslog_test.go") || strings.Contains(log, "secret") {
		t.Errorf("the log must have the error and the panic's place, not its value:\n%s", log)
	}
}

// TestWhatWasHeardCountsAlsoIfTheStreamBroke: the keeper's context must not end with the stream's.
func TestWhatWasHeardCountsAlsoIfTheStreamBroke(t *testing.T) {
	w := newWorld()
	var in error
	var limited bool
	w.keeper.do = func(ctx context.Context, _ int) error {
		in = ctx.Err()
		_, limited = ctx.Deadline()
		return nil
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	m := received(otlpMessage(said{address: "::1", port: 1, start: start, what: atEnd}))
	w.read(gone, &source{sender: w.nodes.of(gone)}, &m, readOTLP)
	if len(w.keeper.endings) != 1 || in != nil || !limited {
		t.Errorf("%d ends, context %v, with a deadline: %t", len(w.keeper.endings), in, limited)
	}
}

// TestASenderThatNeverStopsIsHeldBack: while the keeper stands still, grpc's window fills and no more is read.
func TestASenderThatNeverStopsIsHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.keeper.do = func(ctx context.Context, _ int) error {
			<-ctx.Done()
			return ctx.Err()
		}
		dial, l := w.serve(t)
		conn := dial()
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := alsv3.NewAccessLogServiceClient(conn).StreamAccessLogs(ctx)
		if err != nil {
			t.Fatal(err)
		}
		m := alsMessage(slices.Repeat([]said{{address: "203.0.113.9", port: 4711, start: start, what: atEnd}}, 100)...)
		done := make(chan error)
		go func() {
			for {
				if err := stream.Send(m); err != nil {
					done <- err
					return
				}
			}
		}()
		synctest.Wait() // no time has passed: the keeper has the first message still
		if read := l.read.Load(); read > 1<<20 || w.keeper.calls() != 1 {
			t.Errorf("%d bytes read and %d messages passed on while the first stood still", read, w.keeper.calls())
		}
		time.Sleep(10*passOnTimeout + time.Millisecond)
		synctest.Wait()
		if n := w.counter(t, "keyward_access_log_failures_total", ""); n != 10 {
			t.Errorf("%v failures after ten times the timeout", n)
		}
		if n := w.counter(t, "keyward_access_log_streams", ""); n != 1 {
			t.Errorf("%v streams, want 1", n)
		}
		cancel()
		if err := <-done; !errors.Is(err, io.EOF) {
			t.Error(err)
		}
		time.Sleep(time.Minute) // what was received already is still heard
		if n := w.counter(t, "keyward_access_log_streams", ""); n != 0 {
			t.Errorf("%v streams after the only one ended", n)
		}
	})
}

func TestHugeMessagesAreRefusedUnread(t *testing.T) {
	w := newWorld()
	dial, l := w.serve(t, grpc.MaxRecvMsgSize(4<<20))
	conn := dial()
	mebibyte := make([]byte, 1<<20)
	huge := slices.Repeat([][]byte{mebibyte}, 100)
	if _, err := export1(t.Context(), conn, huge...); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("OTLP: got %v, want %v", err, codes.ResourceExhausted)
	}
	stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true},
		"/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs", grpc.ForceCodecV2(rawCodec{}))
	if err != nil {
		t.Fatal(err)
	}
	var buffers mem.BufferSlice
	for _, b := range huge {
		buffers = append(buffers, mem.SliceBuffer(b))
	}
	_ = stream.SendMsg(buffers) // it may see the end of the stream before all is sent
	var reply []byte
	if err := stream.RecvMsg(&reply); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("ALS: got %v, want %v", err, codes.ResourceExhausted)
	}
	if read := l.read.Load(); read > 8<<20 {
		t.Errorf("%d bytes of 200 MiB were read", read)
	}
	// Others on the same connection do not notice. In many pieces: a message larger than a frame.
	end := said{address: "203.0.113.9", port: 4711, start: start, what: atEnd}
	sendALS(t, conn, alsMessage(slices.Repeat([]said{end}, 5000)...))
	if diff := cmp.Diff(map[string]float64{"identity_end": 5000}, w.kinds(t)); diff != "" {
		t.Errorf("kinds (-want +got):\n%s", diff)
	}
}

func TestNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		dial, _ := w.serve(t)
		began := time.Now()
		end := said{address: "203.0.113.9", port: 4711, start: start, what: atEnd}
		periodic := end
		periodic.what = atInterval

		one, two, three := dial(), dial(), dial()
		sendALS(t, one, identified(alsMessage(end), "envoy-1", "edge", "lease"), alsMessage(end, periodic))
		time.Sleep(time.Minute)
		sendALS(t, two, alsMessage(periodic)) // no identifier
		long := strings.Repeat("ü", maxName)
		resource := field(1, field(1, str(1, "node_name"), field(2, str(1, long))), field(1, str(1, "cluster_name"), field(2, str(1, "east"))))
		sendOTLP(t, three, field(1, resource, field(2, field(2, end.otlp()))))
		time.Sleep(time.Minute)
		sendALS(t, one, alsMessage(periodic)) // another stream, without a name: still envoy-1
		sendOTLP(t, three, otlpMessage(periodic))

		at := func(minutes int) time.Time { return began.Add(time.Duration(minutes) * time.Minute) }
		want := []Node{
			{ID: "envoy-1", Cluster: "edge", Connection: 1, Connected: at(0), LastHeard: at(2), LastEnd: at(0), Entries: 4, Ends: 2},
			{ID: "unknown", Cluster: "unknown", Connection: 2, Connected: at(1), LastHeard: at(1), Entries: 1},
			{ID: long[:maxName], Cluster: "east", Connection: 3, Connected: at(1), LastHeard: at(2), LastEnd: at(1), Entries: 2, Ends: 1},
		}
		if diff := cmp.Diff(want, w.Nodes()); diff != "" {
			t.Errorf("nodes (-want +got):\n%s", diff)
		}
		for connection, want := range map[uint64]bool{1: true, 2: false, 3: true, 4: false} {
			if got := w.Heard(connection); got != want {
				t.Errorf("heard of connection %d: got %v, want %v", connection, got, want)
			}
		}
		if n := w.counter(t, "keyward_access_log_nodes", ""); n != 3 {
			t.Errorf("%v nodes, want 3", n)
		}
		w.Disconnected(1)
		w.Disconnected(99)
		if diff := cmp.Diff(want[1:], w.Nodes()); diff != "" || w.Heard(1) {
			t.Errorf("after a disconnection, nodes (-want +got):\n%s", diff)
		}
	})
}

// TestNodesAreBounded: whoever was not heard for longest is forgotten first.
func TestNodesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		by := func(connection uint64) *sender {
			time.Sleep(time.Millisecond)
			return w.nodes.of(peer.NewContext(t.Context(), &peer.Peer{Addr: numberedAddr(connection)}))
		}
		first := by(1)
		for c := range uint64(maxNodes - 1) {
			by(c + 2)
		}
		time.Sleep(time.Millisecond)
		first.heard(time.Now(), 1, 0)
		by(maxNodes + 1)
		all := w.Nodes()
		if len(all) != maxNodes || all[0].Connection != 1 || all[1].Connection != 3 || all[maxNodes-1].Connection != maxNodes+1 {
			t.Errorf("%d nodes, from %+v and %+v to %+v", len(all), all[0], all[1], all[len(all)-1])
		}
	})
}

// TestConnectionsWithoutNumber: what is not known of a connection costs only its place in the list.
func TestConnectionsWithoutNumber(t *testing.T) {
	w := newWorld()
	for _, ctx := range []context.Context{t.Context(), peer.NewContext(t.Context(), &peer.Peer{Addr: &net.TCPAddr{}})} {
		w.nodes.of(ctx)
	}
	if all := w.Nodes(); len(all) != 1 || all[0].Connection != 0 {
		t.Errorf("got %+v, want one without number", all)
	}
}

func TestDelay(t *testing.T) {
	for _, tt := range []struct {
		name  string
		delay time.Duration // from the request's end to the entry
		want  float64       // observed; -1: nothing
	}{
		{"at once", 0, 0},
		{"a batch", 20 * time.Millisecond, 0.02},
		{"before the last byte", -300 * time.Millisecond, 0},
		{"a clock much ahead", -time.Minute, -1},
		{"a clock far behind", 10 * 365 * 24 * time.Hour, -1},
	} {
		for protocol, hear := range map[string]func(*testing.T, *world, said){
			"ALS":  func(t *testing.T, w *world, s said) { w.hear(t, readALS, marshal(t, alsMessage(s))) },
			"OTLP": func(t *testing.T, w *world, s said) { w.hear(t, readOTLP, otlpMessage(s)) },
		} {
			t.Run(tt.name+", "+protocol, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld()
					l := leaseOf("::1", 1, 7)
					took := 3 * time.Second
					l.Identity = authz.NewIdentity("::1", 1, time.Now().Add(-tt.delay-took))
					id := string(w.ids.Append(nil, l))
					s := said{id, "::1", 1, time.Now().Add(-tt.delay - took), atEnd, took}
					hear(t, w, s)
					s.what = atInterval
					hear(t, w, s) // not an end: no delay
					want := 0.0
					if tt.want >= 0 {
						want = 1
					}
					if n := w.counter(t, "keyward_access_log_delay_seconds", ""); n != want {
						t.Fatalf("%v observed, want %v; entries %v", n, want, w.kinds(t))
					}
					families, err := w.reg.Gather()
					if err != nil {
						t.Fatal(err)
					}
					for _, f := range families {
						if sum := f.GetMetric()[0].GetHistogram().GetSampleSum(); f.GetName() == "keyward_access_log_delay_seconds" && want == 1 && sum != tt.want {
							t.Errorf("observed %v s, want %v", sum, tt.want)
						}
					}
				})
			})
		}
	}
}

// TestComplaintsAreSampled: whoever writes forged entries does not write our log.
func TestComplaintsAreSampled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		id := string(w.ids.Append(nil, leaseOf("::1", 1, 7)))
		forged := otlpMessage(slices.Repeat([]said{{id, "::1", 2, start, atEnd, 0}}, 1000)...)
		w.hear(t, readOTLP, forged)
		time.Sleep(complainEvery)
		w.hear(t, readOTLP, forged)
		if log := w.logged.String(); strings.Count(log, "\n") != 2 || !strings.Contains(log, `"skipped":999`) {
			t.Errorf("want two lines, the second with what was skipped; got\n%s", log)
		}
	})
}

// TestInterceptorsAreCalled: one that authenticates must not be passed by.
func TestInterceptorsAreCalled(t *testing.T) {
	w := newWorld()
	dial, _ := w.serve(t, grpc.UnaryInterceptor(func(_ context.Context, _ any, info *grpc.UnaryServerInfo, _ grpc.UnaryHandler) (any, error) {
		return nil, status.Error(codes.PermissionDenied, info.FullMethod)
	}))
	_, err := export1(t.Context(), dial(), otlpMessage(said{address: "::1", port: 1, start: start, what: atEnd}))
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "/opentelemetry.proto.collector.logs.v1.LogsService/Export") || w.keeper.order != "" {
		t.Errorf("got %v, calls %q", err, w.keeper.order)
	}
}

// TestAllocationsDoNotGrowWithEntries: a message costs a few, an entry none.
func TestAllocationsDoNotGrowWithEntries(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector empties pools; run without -race")
	}
	for name, tt := range protocols(t) {
		allocs := func(message []byte) float64 {
			from := &source{sender: tt.world.nodes.of(t.Context())}
			m := received(message)
			return testing.AllocsPerRun(100, func() { tt.world.read(context.Background(), from, &m, tt.parse) })
		}
		for _, address := range []string{"203.0.113.9", "2001:db8::1", ""} {
			if a, b := allocs(tt.message(1, address)), allocs(tt.message(100, address)); b > a || a > 16 {
				t.Errorf("%s from %q: %v allocations for one entry, %v for a hundred", name, address, a, b)
			}
		}
	}
}

type protocol struct {
	world   *world
	parse   parser
	message func(entries int, address string) []byte
}

// protocols are worlds whose keeper notes nothing, and messages of entries with leases.
func protocols(tb testing.TB) map[string]protocol {
	w := newWorld()
	w.leaser = deaf{}
	entries := func(n int, address string) (all []said) {
		for i := range n {
			l := leaseOf(address, 4711, uint64(i))
			all = append(all, said{string(w.ids.Append(nil, l)), address, 4711, start, atEnd, 3 * time.Second})
		}
		return all
	}
	return map[string]protocol{
		"ALS":  {w, readALS, func(n int, address string) []byte { return marshal(tb, alsMessage(entries(n, address)...)) }},
		"OTLP": {w, readOTLP, func(n int, address string) []byte { return otlpMessage(entries(n, address)...) }},
	}
}

type deaf struct{ limits.Leaser }

func (deaf) Renew(context.Context, []limits.Lease) error { return nil }
func (deaf) End(context.Context, []limits.Ending) error  { return nil }

func BenchmarkAccessLog(b *testing.B) {
	for name, p := range protocols(b) {
		for _, n := range []int{1, 100} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				message := p.message(n, "203.0.113.9")
				m := received(message)
				from := &source{sender: p.world.nodes.of(b.Context())}
				b.ReportAllocs()
				b.SetBytes(int64(len(message)))
				for b.Loop() {
					p.world.read(context.Background(), from, &m, p.parse)
				}
				b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
				if got := p.world.counter(b, "keyward_access_log_entries_total", "end"); got < float64(n) {
					b.Fatalf("%v ends heard", got)
				}
			})
		}
	}
}

func TestStopEndsStreamsThatEnvoyKeepsOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		dial, _ := w.serve(t)
		stream, err := alsv3.NewAccessLogServiceClient(dial()).StreamAccessLogs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(alsMessage()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := w.counter(t, "keyward_access_log_streams", ""); n != 1 {
			t.Fatalf("%v streams, want 1", n)
		}
		w.Stop()
		w.Stop() // twice does no harm
		synctest.Wait()
		if n := w.counter(t, "keyward_access_log_streams", ""); n != 0 {
			t.Errorf("%v streams after Stop", n)
		}
		if err := stream.RecvMsg(new(alsv3.StreamAccessLogsResponse)); err == nil {
			t.Error("the stream is open still")
		}
	})
}
