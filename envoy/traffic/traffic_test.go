package traffic

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	alfv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/google/go-cmp/cmp"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

// patience is how long a test waits for what is bound to happen, on a machine that has other work.
const patience = time.Minute

// allow and deny are whole answers.
func allow() *authv3.CheckResponse {
	return &authv3.CheckResponse{Status: &statuspb.Status{}, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}}
}

func deny(code codes.Code, http int) *authv3.CheckResponse {
	return &authv3.CheckResponse{Status: &statuspb.Status{Code: int32(code)}, HttpResponse: &authv3.CheckResponse_DeniedResponse{
		DeniedResponse: &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: typev3.StatusCode(http)}},
	}}
}

func leased(r *authv3.CheckResponse, lease string) *authv3.CheckResponse {
	r.DynamicMetadata = &structpb.Struct{Fields: map[string]*structpb.Value{
		"keyward.key_id": structpb.NewStringValue("an id"),
		leaseField:       structpb.NewStringValue(lease),
	}}
	return r
}

// An authorizer answers Checks as a test says. It is a grpc-go server: what speaks to it speaks HTTP/2 as
// Envoy does, or it would say so.
type authorizer struct {
	authv3.UnimplementedAuthorizationServer
	alsv3.UnimplementedAccessLogServiceServer
	check func(ctx context.Context, secret string, in *authv3.CheckRequest) (*authv3.CheckResponse, error)

	mu      sync.Mutex
	entries []*alfv3.HTTPAccessLogEntry
}

func (a *authorizer) Check(ctx context.Context, in *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	return a.check(ctx, header(in, "x-api-key"), in)
}

func (a *authorizer) StreamAccessLogs(stream alsv3.AccessLogService_StreamAccessLogsServer) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return stream.SendAndClose(&alsv3.StreamAccessLogsResponse{})
		}
		a.mu.Lock()
		a.entries = append(a.entries, m.GetHttpLogs().GetLogEntry()...)
		a.mu.Unlock()
	}
}

func header(in *authv3.CheckRequest, name string) string {
	for _, h := range in.GetAttributes().GetRequest().GetHttp().GetHeaderMap().GetHeaders() {
		if h.GetKey() == name {
			return string(h.GetRawValue())
		}
	}
	return ""
}

func serveOn(t *testing.T, l net.Listener, a *authorizer, options ...grpc.ServerOption) *grpc.Server {
	t.Helper()
	s := grpc.NewServer(options...)
	authv3.RegisterAuthorizationServer(s, a)
	alsv3.RegisterAccessLogServiceServer(s, a)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return s
}

func serve(t *testing.T, a *authorizer, options ...grpc.ServerOption) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, a, options...)
	return l.Addr().String()
}

func secretsOf(texts ...string) *Secrets {
	s := &Secrets{}
	for _, text := range texts {
		s.Add(text)
	}
	return s
}

// byName answers each secret by its name.
func byName(_ context.Context, secret string, _ *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	switch {
	case strings.HasPrefix(secret, "valid"):
		return allow(), nil
	case strings.HasPrefix(secret, "limited"):
		return deny(codes.ResourceExhausted, 429), nil
	case strings.HasPrefix(secret, "away"):
		return nil, status.Error(codes.Unavailable, "away")
	case strings.HasPrefix(secret, "half"):
		return &authv3.CheckResponse{HttpResponse: allow().HttpResponse}, nil
	}
	return deny(codes.Unauthenticated, 401), nil
}

// short is a run that takes little time.
func short(address string, classes ...Class) Config {
	return Config{Address: address, Connections: 2, Streams: 4, Duration: 200 * time.Millisecond, Timeout: patience, Classes: classes}
}

func measure(t *testing.T, c Config) *Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, err := Run(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRightAnswersAreNoErrors(t *testing.T) {
	c := short(serve(t, &authorizer{check: byName}),
		Class{Name: "valid", Share: 0.5, Secrets: secretsOf("valid1", "valid22"), Want: []int{200}},
		Class{Name: "unknown", Share: 0.3, Secrets: secretsOf("nobody"), Want: []int{401}},
		Class{Name: "limited", Share: 0.2, Secrets: secretsOf("limited"), Want: []int{200, 429}})
	c.Warmup = 50 * time.Millisecond
	var cpu atomic.Int64
	c.CPU = func() (time.Duration, error) { return time.Duration(cpu.Add(1)) * time.Second, nil }
	var progress atomic.Int64
	c.Progress = func(p Progress) { progress.Store(p.Answers) }
	c.Duration = 600 * time.Millisecond
	r := measure(t, c)
	if n := r.ErrorCount(); n != 0 {
		t.Fatalf("got errors %v", r.Errors)
	}
	for _, want := range []int{200, 401, 429} {
		if r.Answers[want] == 0 {
			t.Errorf("no answer was %d: %v", want, r.Answers)
		}
	}
	if r.Requests == 0 || r.Latency.Count == 0 || r.Latency.P50 <= 0 || r.Latency.P50 > r.Latency.P99 || r.Latency.P99 > r.Latency.Max {
		t.Errorf("got %+v", r)
	}
	sum := int64(0)
	for _, l := range r.Classes {
		sum += l.Count
	}
	if sum != r.Latency.Count {
		t.Errorf("classes have %d requests, all together %d", sum, r.Latency.Count)
	}
	if want := time.Second / time.Duration(r.Requests); r.CPUPerRequest != want {
		t.Errorf("CPU per request: got %v, want %v", r.CPUPerRequest, want)
	}
	if progress.Load() == 0 {
		t.Error("no progress was told")
	}
}

func TestWrongAnswersAreErrors(t *testing.T) {
	address := serve(t, &authorizer{check: byName})
	for secret, want := range map[string]string{
		"nobody":  "valid: 401",
		"limited": "valid: 429",
		"away":    "RPC error Unavailable",
		"half":    halfAnswer,
	} {
		t.Run(secret, func(t *testing.T) {
			r := measure(t, short(address, Class{Name: "valid", Share: 1, Secrets: secretsOf(secret), Want: []int{200}}))
			if got := r.ErrorKinds(); len(got) != 1 || got[0] != want || r.Errors[want] == 0 {
				t.Errorf("got %v, want %q alone", r.Errors, want)
			}
		})
	}
}

func TestLateAnswersAreErrors(t *testing.T) {
	a := &authorizer{check: func(context.Context, string, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
		time.Sleep(20 * time.Millisecond)
		return allow(), nil
	}}
	c := short(serve(t, a), Class{Share: 1, Secrets: secretsOf("valid")})
	c.Timeout = time.Millisecond
	r := measure(t, c)
	if r.ErrorCount() == 0 || r.ErrorCount() != r.Errors["answered after the timeout"]+r.Errors["RPC error DeadlineExceeded"]+r.Errors["stream reset: CANCEL"] {
		t.Errorf("got errors %v", r.Errors)
	}
}

// TestTimeoutOfAServerThatIgnoresIt: grpc-go's does not.
func TestTimeoutOfAServerThatIgnoresIt(t *testing.T) {
	class := Class{Name: "valid", Share: 1, Secrets: secretsOf("valid"), Want: []int{200}}
	w := newWorker(&run{Config: Config{Timeout: time.Millisecond, Connections: 1, Classes: []Class{class}}, to: 1}, 0)
	for _, took := range []time.Duration{time.Millisecond, time.Millisecond + 1} {
		w.answeredLocked(&call{answer: answer{status: 200}}, "0", int64(took))
	}
	if diff := cmp.Diff(map[string]int64{"answered after the timeout": 1}, w.errors); diff != "" {
		t.Error(diff)
	}
}

// TestFixedRate: each request that is due is sent and counted once, and one that had to wait for a server
// that stood still has waited since it was due.
func TestFixedRate(t *testing.T) {
	const rate, stall = 200, 400 * time.Millisecond
	var first sync.Once
	var gate sync.RWMutex
	a := &authorizer{check: func(context.Context, string, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
		first.Do(func() {
			gate.Lock()
			time.AfterFunc(stall, gate.Unlock)
		})
		gate.RLock()
		defer gate.RUnlock()
		return allow(), nil
	}}
	c := short(serve(t, a), Class{Share: 1, Secrets: secretsOf("valid"), Want: []int{200}})
	c.Rate, c.Connections, c.Streams, c.Duration = rate, 2, 1, time.Second
	r := measure(t, c)
	if r.ErrorCount() != 0 {
		t.Fatalf("got errors %v", r.Errors)
	}
	if r.Latency.Count != rate || r.Answers[200] != rate {
		t.Errorf("%d were due, %d were measured and %d answered", rate, r.Latency.Count, r.Answers[200])
	}
	// Some 80 requests were due while the server stood still, one every 5 ms. A client that had waited
	// with them would have measured two long ones.
	if r.Latency.P90 < 150_000 || r.Latency.Max < 390_000 {
		t.Errorf("got p90 %.0f µs and a longest of %.0f µs: the waiting does not count", r.Latency.P90, r.Latency.Max)
	}
}

// TestServersRules: few streams, a small window, pings and a connection that the server takes leave of.
func TestServersRules(t *testing.T) {
	var mu sync.Mutex
	running, most := map[string]int{}, 0 // requests at once on a connection
	a := &authorizer{check: func(ctx context.Context, _ string, _ *authv3.CheckRequest) (*authv3.CheckResponse, error) {
		from, _ := peer.FromContext(ctx)
		add := func(n int) {
			mu.Lock()
			defer mu.Unlock()
			running[from.Addr.String()] += n
			most = max(most, running[from.Addr.String()])
		}
		add(1)
		defer add(-1)
		time.Sleep(time.Millisecond)
		return allow(), nil
	}}
	c := short(serve(t, a, grpc.MaxConcurrentStreams(3), grpc.KeepaliveParams(keepalive.ServerParameters{
		MaxConnectionAge: 200 * time.Millisecond, Time: time.Second, Timeout: patience,
	})), Class{Share: 1, Secrets: secretsOf("valid"), Want: []int{200}})
	c.Connections, c.Streams, c.Duration = 1, 100, time.Second
	r := measure(t, c)
	if r.ErrorCount() != 0 {
		t.Errorf("got errors %v", r.Errors)
	}
	mu.Lock()
	defer mu.Unlock()
	if most < 2 || most > 3 || len(running) < 2 {
		t.Errorf("%d requests were running at once on one of %d connections, want up to 3, and several connections", most, len(running))
	}
}

// TestWindow: more than fits into the server's window at once.
func TestWindow(t *testing.T) {
	a := &authorizer{check: byName}
	c := short(serve(t, a), Class{Share: 1, Secrets: secretsOf("valid"), Want: []int{200}})
	c.Connections, c.Streams, c.Duration = 1, 100, time.Second
	if r := measure(t, c); r.ErrorCount() != 0 || r.Answers[200] <= 100 { // 46 Checks fit into 64 KiB
		t.Errorf("got %d answers, errors %v", r.Answers[200], r.Errors)
	}
}

func TestLostConnectionsAreMadeAnew(t *testing.T) {
	// A busy machine may need a while for the server that comes back.
	for takes := time.Second; ; takes *= 4 {
		asked, failures := loseServer(t, takes)
		for kind := range failures {
			if kind != "connection lost" && kind != "no connection" && kind != "refused by a server that is going away" && !strings.HasPrefix(kind, "RPC error") && !strings.HasPrefix(kind, "stream reset") {
				t.Errorf("got errors %v", failures)
			}
		}
		if asked > 0 {
			return
		}
		if takes > patience/4 {
			t.Fatalf("the server that came back was not asked within %v", takes)
		}
	}
}

// loseServer runs with a server that is stopped after some answers, and one that follows it on its address. It returns
// how often that was asked, and what went wrong.
func loseServer(t *testing.T, takes time.Duration) (asked int64, failures map[string]int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	// Nobody else can have the port in between.
	held, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	var answers, after atomic.Int64
	enough, over := make(chan struct{}), make(chan struct{})
	serving := serveOn(t, l, &authorizer{check: func(ctx context.Context, secret string, in *authv3.CheckRequest) (*authv3.CheckResponse, error) {
		if answers.Add(1) == 50 {
			close(enough)
		}
		return byName(ctx, secret, in)
	}})
	var follows sync.WaitGroup
	follows.Go(func() {
		select {
		case <-enough:
		case <-over:
			return
		}
		serving.Stop()
		again, err := net.FileListener(held)
		if err != nil {
			t.Error(err)
			return
		}
		serveOn(t, again, &authorizer{check: func(ctx context.Context, secret string, in *authv3.CheckRequest) (*authv3.CheckResponse, error) {
			after.Add(1)
			return byName(ctx, secret, in)
		}})
	})
	c := short(l.Addr().String(), Class{Share: 1, Secrets: secretsOf("valid"), Want: []int{200}})
	c.Duration = takes
	r := measure(t, c)
	close(over)
	follows.Wait()
	return after.Load(), r.Errors
}

func TestLeasesAreEnded(t *testing.T) {
	var granted sync.Map
	var count atomic.Int64
	a := &authorizer{}
	a.check = func(_ context.Context, _ string, in *authv3.CheckRequest) (*authv3.CheckResponse, error) {
		id := fmt.Sprintf("lease-%d", count.Add(1))
		granted.Store(id, in)
		return leased(allow(), id), nil
	}
	r := measure(t, short(serve(t, a), Class{Share: 1, Secrets: secretsOf("valid"), Want: []int{200}}))
	if r.ErrorCount() != 0 {
		t.Fatalf("got errors %v", r.Errors)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := count.Load(); r.Leases != n || int64(len(a.entries)) != n {
		t.Errorf("granted %d, reported %d, ended %d", n, r.Leases, len(a.entries))
	}
	for _, e := range a.entries {
		p := e.GetCommonProperties()
		id := p.GetMetadata().GetFilterMetadata()["envoy.filters.http.ext_authz"].GetFields()[leaseField].GetStringValue()
		was, ok := granted.LoadAndDelete(id)
		if !ok {
			t.Fatalf("%q was never granted, or ended twice", id)
		}
		in := was.(*authv3.CheckRequest).GetAttributes()
		// What names a request to keyward: its client's address and its start.
		if !p.GetStartTime().AsTime().Equal(in.GetRequest().GetTime().AsTime()) ||
			!proto.Equal(p.GetDownstreamDirectRemoteAddress(), in.GetSource().GetAddress()) ||
			p.GetAccessLogType() != alfv3.AccessLogType_DownstreamEnd {
			t.Fatalf("ended %v for the Check %v", e, in)
		}
	}
}

func TestTLS(t *testing.T) {
	certificates := httptest.NewTLSServer(http.NotFoundHandler())
	defer certificates.Close()
	pool := x509.NewCertPool()
	pool.AddCert(certificates.Certificate())
	authority := make(chan string, 1)
	a := &authorizer{check: func(ctx context.Context, _ string, _ *authv3.CheckRequest) (*authv3.CheckResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		select {
		case authority <- md.Get(":authority")[0]:
		default:
		}
		return allow(), nil
	}}
	address := serve(t, a, grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: certificates.TLS.Certificates})))
	c := short(address, Class{Share: 1, Secrets: secretsOf("valid"), Want: []int{200}})
	c.TLS = &tls.Config{RootCAs: pool, ServerName: "example.com"}
	if r := measure(t, c); r.ErrorCount() != 0 || r.Requests == 0 {
		t.Errorf("got %d requests, errors %v", r.Requests, r.Errors)
	}
	if got := <-authority; got != "example.com" {
		t.Errorf("got authority %q", got)
	}
	c.TLS = &tls.Config{RootCAs: x509.NewCertPool()}
	if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("got error %v, want one about the certificate", err)
	}
}

func TestUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "check.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	a := &authorizer{}
	a.check = func(context.Context, string, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
		return leased(allow(), "a lease"), nil
	}
	serveOn(t, l, a)
	r := measure(t, short("unix://"+path, Class{Share: 1, Secrets: secretsOf("valid"), Want: []int{200}}))
	if r.ErrorCount() != 0 || r.Requests == 0 || r.Leases == 0 {
		t.Errorf("got %d requests, %d leases, errors %v", r.Requests, r.Leases, r.Errors)
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	hanging := make(chan struct{})
	defer close(hanging)
	a := &authorizer{check: func(ctx context.Context, _ string, _ *authv3.CheckRequest) (*authv3.CheckResponse, error) {
		select {
		case <-hanging:
		case <-ctx.Done():
		}
		return allow(), nil
	}}
	for _, rate := range []float64{0, 100} {
		c := short(serve(t, a), Class{Share: 1, Secrets: secretsOf("valid")})
		c.Duration, c.Rate = time.Hour, rate
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(100*time.Millisecond, cancel)
		if _, err := Run(ctx, c); !errors.Is(err, context.Canceled) {
			t.Errorf("rate %g: got error %v", rate, err)
		}
	}
}

func TestWhatCannotBeRun(t *testing.T) {
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = nobody.Close()
	good := Class{Share: 1, Secrets: secretsOf("valid")}
	for name, c := range map[string]Config{
		"nobody listens": short(nobody.Addr().String(), good),
		"no duration":    {Address: "x", Classes: []Class{good}},
		"no class":       {Address: "x", Duration: 1},
		"no secrets":     {Address: "x", Duration: 1, Classes: []Class{{Share: 1}}},
		"zipf of one":    {Address: "x", Duration: 1, Zipf: 1, Classes: []Class{good}},
		"negative rate":  {Address: "x", Duration: 1, Rate: -1, Classes: []Class{good}},
		"no connection":  {Address: "x", Duration: 1, Connections: -1, Classes: []Class{good}},
	} {
		if _, err := Run(t.Context(), c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	// Another kind of server is an error at once, not a run without answers.
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	if _, err := Run(t.Context(), short(other.Listener.Addr().String(), good)); err == nil || !strings.Contains(err.Error(), "does not speak HTTP/2") {
		t.Errorf("got error %v", err)
	}
}

func TestRequestIsWhatItSays(t *testing.T) {
	now := time.Now()
	for _, secretLen := range []int{1, 53, 115, 300} {
		tpl, err := newTemplate("POST", "shop.example", "/a?b=c", secretLen)
		if err != nil {
			t.Fatal(err)
		}
		if secretLen == 53 && (len(tpl.message) < 1300 || len(tpl.message) > 1500) {
			t.Errorf("a Check has %d bytes, Envoy's has some 1,400", len(tpl.message))
		}
		ids := map[string]bool{}
		for number := uint64(1); number <= 3; number++ {
			secret := bytes.Repeat([]byte{byte('a' + number)}, secretLen)
			moment := tpl.patch(secret, number, now)
			if d := moment.Sub(now).Abs(); d > 300*time.Millisecond {
				t.Errorf("the request's time is %v off", d)
			}
			var in authv3.CheckRequest
			if err := proto.Unmarshal(tpl.message[grpcPrefix:], &in); err != nil {
				t.Fatal(err)
			}
			http := in.GetAttributes().GetRequest().GetHttp()
			if got := header(&in, "x-api-key"); got != string(secret) {
				t.Errorf("got secret %q", got)
			}
			if !in.GetAttributes().GetRequest().GetTime().AsTime().Equal(moment) || moment.Nanosecond()%1000 != 0 {
				t.Errorf("got time %v, want %v in whole microseconds", in.GetAttributes().GetRequest().GetTime().AsTime(), moment)
			}
			if n, err := strconv.ParseUint(http.GetId(), 10, 64); err != nil || n != idOf+number {
				t.Errorf("got http.id %q", http.GetId())
			}
			ids[http.GetId()+header(&in, "x-request-id")] = true
			got := []string{http.GetMethod(), http.GetHost(), http.GetPath(), header(&in, ":method"), header(&in, ":authority"), header(&in, ":path")}
			if diff := cmp.Diff([]string{"POST", "shop.example", "/a?b=c", "POST", "shop.example", "/a?b=c"}, got); diff != "" {
				t.Error(diff)
			}
			if n := len(http.GetHeaderMap().GetHeaders()); n != 21 {
				t.Errorf("got %d headers", n)
			}
		}
		if len(ids) != 3 {
			t.Errorf("requests share ids: %v", ids)
		}
	}
	// Times whose encoding would be shorter keep their place.
	tpl, err := newTemplate("GET", "h", "/", 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, nanos := range []int64{0, 1, 999, smallest - 1, smallest, 999_999_999} {
		moment := tpl.patch([]byte("x"), 1, time.Unix(1_800_000_000, nanos))
		var in authv3.CheckRequest
		if err := proto.Unmarshal(tpl.message[grpcPrefix:], &in); err != nil {
			t.Fatalf("%d ns: %v", nanos, err)
		}
		if !in.GetAttributes().GetRequest().GetTime().AsTime().Equal(moment) || in.GetAttributes().GetRequest().GetTime().CheckValid() != nil {
			t.Errorf("%d ns: got %v, want %v", nanos, in.GetAttributes().GetRequest().GetTime(), moment)
		}
	}
}

func TestClassify(t *testing.T) {
	both := allow()
	both.Status.Code = 16
	odd := deny(codes.OK, 401)
	for name, test := range map[string]struct {
		in    *authv3.CheckResponse
		want  int
		lease string
		fault string
	}{
		"allowed":              {in: allow(), want: 200},
		"allowed with a lease": {in: leased(allow(), "abc"), want: 200, lease: "abc"},
		"allowed with headers": {in: &authv3.CheckResponse{Status: &statuspb.Status{}, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{
			Headers: []*corev3.HeaderValueOption{{Header: &corev3.HeaderValue{Key: "x", Value: "y"}}},
		}}}, want: 200},
		"a status alone":        {in: &authv3.CheckResponse{Status: &statuspb.Status{}}, want: 200},
		"401":                   {in: deny(codes.Unauthenticated, 401), want: 401},
		"429":                   {in: deny(codes.ResourceExhausted, 429), want: 429},
		"denied without a word": {in: &authv3.CheckResponse{Status: &statuspb.Status{Code: 7}}, want: 403},
		"503 by choice": {in: &authv3.CheckResponse{Status: &statuspb.Status{Code: 14}, HttpResponse: &authv3.CheckResponse_ErrorResponse{
			ErrorResponse: &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: 503}},
		}}, want: 503},
		"no status":               {in: &authv3.CheckResponse{HttpResponse: allow().HttpResponse}, fault: halfAnswer},
		"no status, but a denial": {in: &authv3.CheckResponse{HttpResponse: deny(7, 403).HttpResponse}, fault: halfAnswer},
		"nothing":                 {in: &authv3.CheckResponse{}, fault: halfAnswer},
		"an allow that denies":    {in: odd, fault: oddAnswer},
		"a denial that allows":    {in: both, fault: oddAnswer},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := proto.Marshal(test.in)
			if err != nil {
				t.Fatal(err)
			}
			got, fault := classify(b)
			if got.status != test.want || string(got.lease) != test.lease || fault != test.fault {
				t.Errorf("got %d, lease %q, fault %q; want %d, %q, %q", got.status, got.lease, fault, test.want, test.lease, test.fault)
			}
			// A piece of it is never a whole answer of another kind.
			for i := range len(b) {
				if got, fault := classify(b[:i]); fault == "" && got.status != test.want && got.status != 200 && got.status != 403 {
					t.Errorf("the first %d bytes are a %d", i, got.status)
				}
			}
		})
	}
	for _, garbage := range []string{"\xff", "\x0a\x05\x08", "\x0a\x02\x08\xff", "not a message at all"} {
		if got, fault := classify([]byte(garbage)); fault != brokenAnswer {
			t.Errorf("%q: got %v, fault %q", garbage, got, fault)
		}
	}
}

func TestLatency(t *testing.T) {
	h := newHistogram()
	for i := int64(1); i <= 10_000; i++ {
		if err := h.RecordValue(i * 1000); err != nil {
			t.Fatal(err)
		}
	}
	got := latencyOf(h)
	if got.Count != 10_000 {
		t.Errorf("got a count of %d", got.Count)
	}
	for name, v := range map[string][2]float64{
		"mean": {got.Mean, 5000}, "p50": {got.P50, 5000}, "p90": {got.P90, 9000}, "p99": {got.P99, 9900}, "p99.9": {got.P999, 9990}, "max": {got.Max, 10_000},
	} {
		if math.Abs(v[0]-v[1]) > v[1]/500 {
			t.Errorf("%s: got %.1f µs, want %.1f within 0.2 %%", name, v[0], v[1])
		}
	}
}

func TestChoice(t *testing.T) {
	many := &Secrets{}
	for i := range 1000 {
		many.Add(strconv.Itoa(i))
	}
	classes := []Class{{Share: 3, Secrets: many}, {Share: 1, Secrets: secretsOf("a", "b")}}
	count := func(s float64) (of [2]int, first int) {
		c := newChoice(classes, s, 1)
		for range 100_000 {
			class, secret := c.next()
			if secret < 0 || secret >= classes[class].Secrets.Len() {
				t.Fatalf("class %d has no secret %d", class, secret)
			}
			of[class]++
			if class == 0 && secret == 0 {
				first++
			}
		}
		return of, first
	}
	even, firstEven := count(0)
	if even[0] < 74_000 || even[0] > 76_000 {
		t.Errorf("shares of 3 to 1: got %v", even)
	}
	if firstEven < 30 || firstEven > 150 { // 75 on average
		t.Errorf("evenly: got %d of the first of 1000", firstEven)
	}
	if _, first := count(1.1); first < 10_000 { // its share is 1/ζ, some 18 %
		t.Errorf("by Zipf's law: got %d of the first", first)
	}
}

func TestSecrets(t *testing.T) {
	s, err := ReadSecrets(strings.NewReader("kwi_first\n\nkwi_second1\r\nlast"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for i := range s.Len() {
		got = append(got, string(s.at(i)))
	}
	if diff := cmp.Diff([]string{"kwi_first", "kwi_second1", "last"}, got); diff != "" {
		t.Error(diff)
	}
	if text := fmt.Sprintf("%v %+v %#v %s", s, s, s, s); strings.Contains(text, "kwi") {
		t.Errorf("printed: %s", text)
	}
	for _, bad := range []string{"", "\n\n", "kwi_good\nkwi_two words", "kwi_\xff", "kwi_" + strings.Repeat("x", 10_000)} {
		if _, err := ReadSecrets(strings.NewReader(bad)); err == nil || strings.Contains(err.Error(), "kwi_") {
			t.Errorf("%.20q: got error %v, want one that shows nothing of it", bad, err)
		}
	}
}
