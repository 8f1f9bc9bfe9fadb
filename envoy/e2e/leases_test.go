package e2e_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"keyward/authz/admin"
	"keyward/authz/manage"
)

// soon is how long after its request's end a place may stay taken. Envoy says it within a millisecond;
// the rest is for a busy machine. That no lease just ran out is told by the metrics, see wantNoneLost.
const soon = patience / 2

// eachFeedback runs a test over each protocol by which Envoy tells that requests ended.
func eachFeedback(t *testing.T, test func(t *testing.T, feedback string)) {
	t.Helper()
	for _, feedback := range []string{"als", "otlp"} {
		t.Run(feedback, func(t *testing.T) {
			t.Parallel()
			test(t, feedback)
		})
	}
}

// serveLeases starts a keyward with this in its concurrency block.
func serveLeases(t testing.TB, format string, args ...any) *server {
	t.Helper()
	return serve(t, config{yaml: "concurrency: {" + fmt.Sprintf(format, args...) + "}\n"})
}

// concurrent is a limit of running requests, and none that could be in its way.
func concurrent(n int) admin.LimitsInput {
	in := limited(100_000, "1s", 100_000)
	in.MaxConcurrent = &n
	return in
}

// metric returns the value of a series, named as in the metrics' text.
func (s *server) metric(t testing.TB, series string) float64 {
	t.Helper()
	status, body, err := fetch("http://" + s.metrics + "/metrics")
	if err != nil || status != http.StatusOK {
		t.Fatalf("metrics: %d, %v", status, err)
	}
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), series+" "); ok {
			n, err := strconv.ParseFloat(value, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no metric %s", series)
	return 0
}

// leasesEnded returns how many leases ended by a cause.
func (s *server) leasesEnded(t testing.TB, cause string) float64 {
	t.Helper()
	return s.metric(t, `keyward_limits_leases_ended_total{cause="`+cause+`"}`)
}

// wantNoneLost asserts that every lease this process ever granted ended because Envoy, or the caller of
// Check, said so: none is left, and none ran out.
func (s *server) wantNoneLost(t testing.TB) {
	t.Helper()
	granted := s.metric(t, "keyward_limits_leases_granted_total") + s.metric(t, "keyward_limits_leases_adopted_total")
	heard := s.leasesEnded(t, "log") + s.leasesEnded(t, "identity") + s.leasesEnded(t, "context")
	lost := s.leasesEnded(t, "expiry") + s.leasesEnded(t, "node")
	if left := s.metric(t, "keyward_limits_leases"); left != 0 || lost != 0 || granted != heard {
		t.Errorf("%v leases granted, %v heard to end, %v ran out, %v left; want all heard", granted, heard, lost, left)
	}
	t.Logf("%v leases granted; ended by log %v, by identity %v, by context %v",
		granted, s.leasesEnded(t, "log"), s.leasesEnded(t, "identity"), s.leasesEnded(t, "context"))
}

// A stage is an Envoy with routes, filters and an upstream for every way in which a request can end.
type stage struct {
	*front
	s    *server
	home string // instance of the keys
	work *workshop
}

// stage starts an Envoy that knows when keyward is there.
func (s *server) stage(t testing.TB, c frontConfig) *stage {
	t.Helper()
	x := &stage{s: s, work: serveWorkshop(t), home: s.instance(t, admin.PolicyInput{})}
	more := c.edit
	c.edit = func(config map[string]any) {
		x.work.put(t, config)
		if more != nil {
			more(config)
		}
	}
	x.front = s.front(t, c)
	x.awaitHealthy(t)
	return x
}

// leaseKey makes a key that may run n requests at once.
func (x *stage) leaseKey(t testing.TB, n int) key {
	t.Helper()
	return x.s.key(t, x.home, admin.KeyInput{Limits: concurrent(n)})
}

// inFlight lists the requests of a key that count.
func (x *stage) inFlight(t testing.TB, k key) []manage.InFlight {
	t.Helper()
	all, err := x.s.client.InFlight(t.Context(), k.InstanceID)
	if err != nil {
		t.Fatal(err)
	}
	var own []manage.InFlight
	for _, r := range all {
		if r.KeyID == k.ID {
			own = append(own, r)
		}
	}
	return own
}

// get sends a request on a connection of its own. 503 is sent again: keyward's health was checked too late.
func (x *stage) get(t testing.TB, k key, target string, lines ...string) answer {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		b := x.begin(t, target, append(lines, withKey(k.secret))...)
		a, err := b.wait()
		b.abort()
		if err != nil {
			t.Fatalf("%s: %v", target, err)
		}
		if a.status != http.StatusServiceUnavailable || a.header.Get(workshopMark) != "" || time.Now().After(end) {
			return a
		}
	}
}

// wantFull asserts that the key may run no more.
func (x *stage) wantFull(t testing.TB, k key) {
	t.Helper()
	a := x.get(t, k, "/one-too-many")
	var problem struct{ Error struct{ Code, Limit string } }
	if err := json.Unmarshal([]byte(a.body), &problem); err != nil || a.status != http.StatusTooManyRequests || problem.Error.Limit != "concurrency" {
		t.Fatalf("beside requests that run: got %d %q, want 429 for concurrency", a.status, a.body)
	}
}

// wantBack asserts that nothing of the key counts within a time, and that its place is free then.
func (x *stage) wantBack(t testing.TB, k key, within time.Duration) {
	t.Helper()
	x.wantNone(t, k, within)
	if a := x.get(t, k, "/next"); a.status != http.StatusOK {
		t.Fatalf("the next request: got %d %q, want 200", a.status, a.body)
	}
	x.wantNone(t, k, within)
}

func (x *stage) wantNone(t testing.TB, k key, within time.Duration) {
	t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(20 * time.Millisecond) {
		left := x.inFlight(t, k)
		if len(left) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %v %d requests still count, among them %+v", within, len(left), left[0])
		}
	}
}

// wantStays asserts that a number of the key's requests count for all of a time.
func (x *stage) wantStays(t testing.TB, k key, n int, during time.Duration) {
	t.Helper()
	for end := time.Now().Add(during); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if got := len(x.inFlight(t, k)); got != n {
			t.Fatalf("%d requests count, want %d", got, n)
		}
	}
}

// A begun request is one whose answer nobody waits for yet, on a connection of its own.
type begun struct {
	conn   net.Conn
	in     *bufio.Reader
	done   chan struct{} // closed when the answer is there
	answer answer
	err    error
}

// begin sends a GET.
func (x *stage) begin(t testing.TB, target string, lines ...string) *begun {
	t.Helper()
	b, err := x.dial(target, lines...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.abort)
	return b
}

// dial sends a GET. For any goroutine.
func (x *stage) dial(target string, lines ...string) (*begun, error) {
	network := "tcp"
	if strings.HasPrefix(x.address, "/") {
		network = "unix"
	}
	conn, err := net.Dial(network, x.address)
	if err != nil {
		return nil, err
	}
	b := &begun{conn: conn, in: bufio.NewReader(conn), done: make(chan struct{})}
	if _, err := io.WriteString(conn, requestText("GET", target, lines...)); err != nil {
		_ = conn.Close()
		return nil, err
	}
	go func() {
		defer close(b.done)
		res, err := http.ReadResponse(b.in, &http.Request{Method: http.MethodGet})
		if err != nil {
			b.err = err
			return
		}
		b.answer.status, b.answer.header = res.StatusCode, res.Header
		if res.StatusCode == http.StatusSwitchingProtocols {
			return
		}
		body, err := io.ReadAll(res.Body)
		b.answer.body, b.err = string(body), err
	}()
	return b, nil
}

// wait returns the answer.
func (b *begun) wait() (answer, error) {
	select {
	case <-b.done:
		return b.answer, b.err
	case <-time.After(2 * patience):
		return answer{}, errors.New("no answer")
	}
}

// abort goes away, whether or not there is an answer.
func (b *begun) abort() {
	_ = b.conn.Close()
	<-b.done
}

// hold begins a request and returns when it counts and has come to the upstream.
func (x *stage) hold(t testing.TB, k key, target string, lines ...string) *begun {
	t.Helper()
	before, hits := len(x.inFlight(t, k)), x.work.of(k).hits
	end := time.Now().Add(patience)
	for b := x.begin(t, target, append(lines, withKey(k.secret))...); time.Now().Before(end); {
		if len(x.inFlight(t, k)) > before && x.work.of(k).hits > hits {
			return b
		}
		select {
		case <-b.done:
			if b.err == nil && b.answer.status == http.StatusSwitchingProtocols {
				time.Sleep(20 * time.Millisecond)
				continue
			}
			if b.err != nil || b.answer.status != http.StatusServiceUnavailable {
				t.Fatalf("%s: got %d %q, %v, and it should run", target, b.answer.status, b.answer.body, b.err)
			}
			time.Sleep(50 * time.Millisecond)
			b = x.begin(t, target, append(lines, withKey(k.secret))...)
		case <-time.After(20 * time.Millisecond):
		}
	}
	t.Fatalf("%s never began to count", target)
	return nil
}

// A workshop is an upstream whose answers take as long, and end in the way, that a request asks for:
// ?hold=DURATION, and the paths below. It speaks HTTP/1.1, HTTP/2 without TLS and gRPC.
type workshop struct {
	address string

	mu     sync.Mutex
	byKey  map[string]*tally // by the key's id
	visits map[string]*visit // by caseHeader, which for this is one for each request
}

// A tally is of the requests of one key that came.
type tally struct {
	hits int // in all
	now  int // that run
	peak int // that ran at once
}

// A visit is a request that runs until its answer's last byte is about to be written or its client is
// about to close its connection, whichever is first.
type visit struct {
	tally *tally // nil: it has not come
	over  bool
}

const (
	// workshopMark is in every answer of a workshop.
	workshopMark = "X-E2e-Workshop"
	keyHeader    = "X-Keyward-Key-Id"
)

func (w *workshop) enter(r *http.Request) *visit {
	w.mu.Lock()
	defer w.mu.Unlock()
	v := w.visitLocked(r.Header.Get(caseHeader))
	v.tally = w.tallyLocked(r.Header.Get(keyHeader))
	v.tally.hits++
	if !v.over {
		v.tally.now++
		v.tally.peak = max(v.tally.peak, v.tally.now)
	}
	return v
}

func (w *workshop) leave(v *visit) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !v.over && v.tally != nil {
		v.tally.now--
	}
	v.over = true
}

// gone is called by a client that is about to close its connection.
func (w *workshop) gone(name string) {
	w.mu.Lock()
	v := w.visitLocked(name)
	w.mu.Unlock()
	w.leave(v)
}

func (w *workshop) visitLocked(name string) *visit {
	if name == "" {
		return new(visit)
	}
	if w.visits[name] == nil {
		w.visits[name] = new(visit)
	}
	return w.visits[name]
}

func (w *workshop) tallyLocked(keyID string) *tally {
	if w.byKey[keyID] == nil {
		w.byKey[keyID] = new(tally)
	}
	return w.byKey[keyID]
}

// of returns what came of a key.
func (w *workshop) of(k key) tally {
	w.mu.Lock()
	defer w.mu.Unlock()
	return *w.tallyLocked(k.ID.String())
}

func serveWorkshop(t testing.TB) *workshop {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &workshop{address: l.Addr().String(), byKey: map[string]*tally{}, visits: map[string]*visit{}}
	services := grpc.NewServer()
	healthpb.RegisterHealthServer(services, watches{})
	server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		v := w.enter(r)
		defer w.leave(v)
		if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			services.ServeHTTP(out, r)
			return
		}
		w.serve(out, r, v)
	})}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	ctx, cancel := context.WithCancel(context.Background())
	server.BaseContext = func(net.Listener) context.Context { return ctx }
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		cancel()
		_ = server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
		services.Stop()
	})
	return w
}

func (w *workshop) serve(out http.ResponseWriter, r *http.Request, v *visit) {
	out.Header().Set(workshopMark, "1")
	hold, _ := time.ParseDuration(r.URL.Query().Get("hold"))
	switch r.URL.Path {
	case "/reset": // before any answer
		conn, _, err := http.NewResponseController(out).Hijack()
		if err == nil {
			_ = conn.(*net.TCPConn).SetLinger(0)
			_ = conn.Close()
		}
		return
	case "/retried":
		out.WriteHeader(http.StatusBadGateway)
		return
	case "/redirected": // Envoy follows it
		out.Header().Set("Location", "http://app.test/landed?"+r.URL.RawQuery)
		out.WriteHeader(http.StatusFound)
		return
	case "/websocket":
		echo(r.Context(), out)
		return
	case "/events": // an answer that never ends
		_, _ = io.WriteString(out, "data: 1\n\n")
		_ = http.NewResponseController(out).Flush()
	}
	select {
	case <-time.After(hold):
	case <-r.Context().Done():
	}
	w.leave(v)
	_, _ = io.WriteString(out, "done")
}

// echo answers an upgrade, and then every byte with itself.
func echo(ctx context.Context, out http.ResponseWriter) {
	conn, in, err := http.NewResponseController(out).Hijack()
	if err != nil {
		return
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"); err != nil {
		return
	}
	_, _ = io.Copy(conn, in)
}

// watches is gRPC's health service with streams that end, and one that does not.
type watches struct {
	healthpb.UnimplementedHealthServer
}

const endless = "endless"

func (watches) Watch(in *healthpb.HealthCheckRequest, stream grpc.ServerStreamingServer[healthpb.HealthCheckResponse]) error {
	for range 3 {
		if err := stream.Send(&healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}); err != nil {
			return err
		}
	}
	if in.GetService() == endless {
		<-stream.Context().Done()
	}
	return nil
}

// upgradeLines make a request the opening of a websocket, as far as Envoy looks.
var upgradeLines = []string{
	"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
}

// say sends a word over an open websocket and hears it back.
func (b *begun) say(t testing.TB, word string) {
	t.Helper()
	if a, err := b.wait(); err != nil || a.status != http.StatusSwitchingProtocols {
		t.Fatalf("websocket: got %d, %v, want 101", a.status, err)
	}
	_ = b.conn.SetDeadline(time.Now().Add(patience))
	heard := make([]byte, len(word))
	if _, err := io.WriteString(b.conn, word); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(b.in, heard); err != nil || string(heard) != word {
		t.Fatalf("websocket: said %q, heard %q, %v", word, heard, err)
	}
}

// keptHeader has the key where a request to /redirected needs it again.
const keptHeader = "X-E2e-Kept"

// Filters that refuse what has these headers, after keyward has allowed it.
const (
	faultHeader = "X-E2e-Fault"
	rbacHeader  = "X-E2e-Rbac"
)

// put has an Envoy's generated configuration lead to the workshop, with routes and filters for the ways in
// which Envoy itself ends a request.
func (w *workshop) put(t testing.TB, config map[string]any) {
	t.Helper()
	host, port, err := net.SplitHostPort(w.address)
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	static := config["static_resources"].(map[string]any)
	cluster := func(name string, http map[string]any) map[string]any {
		return map[string]any{
			"name": name, "type": "STATIC", "connect_timeout": "5s",
			"circuit_breakers": map[string]any{"thresholds": []any{map[string]any{"max_connections": 50_000, "max_requests": 50_000, "max_pending_requests": 50_000}}},
			"load_assignment": map[string]any{"cluster_name": name, "endpoints": []any{map[string]any{"lb_endpoints": []any{map[string]any{
				"endpoint": map[string]any{"address": map[string]any{"socket_address": map[string]any{"address": host, "port_value": number}}},
			}}}}},
			"typed_extension_protocol_options": map[string]any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": map[string]any{
				"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
				"explicit_http_config": http,
			}},
		}
	}
	static["clusters"] = append(static["clusters"].([]any),
		cluster("workshop", map[string]any{"http_protocol_options": map[string]any{}}),
		cluster("workshop-h2", map[string]any{"http2_protocol_options": map[string]any{}}))

	route := func(prefix string, action map[string]any) map[string]any {
		return map[string]any{"match": map[string]any{"prefix": prefix}, "route": action}
	}
	// keyward took the key from the request before it was redirected, so it would have none at its second
	// Check. Whoever wants internal redirects has to see to that; here the route gives it back.
	redirected := route("/redirected", map[string]any{"cluster": "workshop", "internal_redirect_policy": map[string]any{"max_internal_redirects": 1}})
	redirected["request_headers_to_add"] = []any{map[string]any{
		"header": map[string]any{"key": "X-API-Key", "value": "%REQ(" + keptHeader + ")%"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
	}}
	manager := managerOf(config)
	vhost := manager["route_config"].(map[string]any)["virtual_hosts"].([]any)[0].(map[string]any)
	vhost["routes"] = []any{
		route("/grpc.health.v1.Health/", map[string]any{"cluster": "workshop-h2", "timeout": "0s"}),
		route("/hurried", map[string]any{"cluster": "workshop", "timeout": "0.3s"}),
		route("/retried", map[string]any{"cluster": "workshop", "retry_policy": map[string]any{
			"retry_on": "gateway-error", "num_retries": 2, "retry_back_off": map[string]any{"base_interval": "0.001s"},
		}}),
		redirected,
		route("/", map[string]any{"cluster": "workshop", "timeout": "0s"}),
	}

	present := func(header string) map[string]any { return map[string]any{"name": header, "present_match": true} }
	filters := manager["http_filters"].([]any)
	router := filters[len(filters)-1]
	manager["http_filters"] = append(filters[:len(filters)-1:len(filters)-1],
		map[string]any{"name": "envoy.filters.http.fault", "typed_config": map[string]any{
			"@type":   "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault",
			"headers": []any{present(faultHeader)},
			"abort":   map[string]any{"http_status": http.StatusTeapot, "percentage": map[string]any{"numerator": 100}},
		}},
		map[string]any{"name": "envoy.filters.http.rbac", "typed_config": map[string]any{
			"@type": "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC",
			"rules": map[string]any{"action": "DENY", "policies": map[string]any{"marked": map[string]any{
				"permissions": []any{map[string]any{"header": present(rbacHeader)}},
				"principals":  []any{map[string]any{"any": true}},
			}}},
		}},
		router)
}

// managerOf returns the HTTP connection manager of a generated configuration.
func managerOf(config map[string]any) map[string]any {
	listener := config["static_resources"].(map[string]any)["listeners"].([]any)[0].(map[string]any)
	chain := listener["filter_chains"].([]any)[0].(map[string]any)
	return chain["filters"].([]any)[0].(map[string]any)["typed_config"].(map[string]any)
}

// granted returns how many Checks keyward has allowed for a key, from its log.
func (s *server) granted(t testing.TB, k key) int {
	t.Helper()
	n := 0
	for line := range strings.Lines(s.log()) {
		var said struct{ Msg, Outcome, KeyID string }
		if err := json.Unmarshal([]byte(line), &said); err != nil {
			t.Fatalf("%v: %q", err, line)
		}
		if said.Msg == "decision" && said.Outcome == "allowed" && said.KeyID == k.ID.String() {
			n++
		}
	}
	return n
}
