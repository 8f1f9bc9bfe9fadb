package e2e_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	logv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// nodeGone is how long leases may outlive an Envoy that is frozen or was killed: 3 s until keyward's keepalive
// has found a frozen one, and renewEvery and 3 s more, as its requests might go on elsewhere; the rest is for a
// busy machine.
const nodeGone = patience

// TestLeasesOfANode: an Envoy that is gone does not keep the places of its requests, and one that takes
// its leave says of each that it ended.
func TestLeasesOfANode(t *testing.T) {
	t.Parallel()
	eachFeedback(t, func(t *testing.T, feedback string) {
		// Leases live so long that only the end of the connection can explain theirs.
		s := serveLeases(t, "feedback: %s, renewEvery: 1s, ttl: 10m", feedback)
		other := s.stage(t, frontConfig{})
		// next is the key's next request at another Envoy.
		next := func(t *testing.T, k key) {
			t.Helper()
			if a := other.get(t, k, "/"); a.status != http.StatusOK {
				t.Fatalf("the next request, elsewhere: got %d %q, want 200", a.status, a.body)
			}
			other.wantNone(t, k, soon)
		}
		t.Run("each", func(t *testing.T) {
			t.Run("Killed", func(t *testing.T) {
				t.Parallel()
				x := s.stage(t, frontConfig{})
				k := x.leaseKey(t, 1)
				x.hold(t, k, "/?hold=10m")
				other.wantFull(t, k)
				began := time.Now()
				if err := x.Kill(); err != nil {
					t.Fatal(err)
				}
				x.wantNone(t, k, nodeGone)
				t.Logf("free %v after kill -9", time.Since(began).Round(10*time.Millisecond))
				next(t, k)
			})
			t.Run("Frozen", func(t *testing.T) {
				t.Parallel()
				x := s.stage(t, frontConfig{})
				k := x.leaseKey(t, 1)
				b := x.hold(t, k, "/?hold=10m")
				if err := x.Pause(); err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				x.wantNone(t, k, nodeGone)
				t.Logf("free %v after SIGSTOP", time.Since(began).Round(10*time.Millisecond))
				next(t, k)
				if err := x.Continue(); err != nil {
					t.Fatal(err)
				}
				// What was frozen runs on, and says so.
				waitFor(t, "the thawed request to count again", func() bool { return len(x.inFlight(t, k)) == 1 })
				other.wantFull(t, k)
				b.abort()
				x.wantBack(t, k, soon)
			})
			t.Run("Drained", func(t *testing.T) {
				t.Parallel()
				x := s.stage(t, frontConfig{})
				k := x.leaseKey(t, 2)
				running := []*begun{x.hold(t, k, "/?hold=8s"), x.hold(t, k, "/?hold=8s")}
				if err := x.Drain(t.Context()); err != nil {
					t.Fatal(err)
				}
				for _, b := range running {
					if a, err := b.wait(); err != nil || a.status != http.StatusOK {
						t.Errorf("while draining: got %d %q, %v, want 200", a.status, a.body, err)
					}
				}
				x.wantNone(t, k, soon)
				if err := x.Stop(); err != nil {
					t.Error(err)
				}
				next(t, k)
			})
		})
		if node, expired := s.leasesEnded(t, "node"), s.leasesEnded(t, "expiry"); node != 2 || expired != 0 {
			t.Errorf("%v leases ended with their connection and %v ran out, want 2 and 0", node, expired)
		}
	})
}

// TestLeasesSurviveARestart: requests that run while keyward is restarted, however that came, count again
// after one period, and still end.
func TestLeasesSurviveARestart(t *testing.T) {
	t.Parallel()
	eachFeedback(t, func(t *testing.T, feedback string) {
		const limit, renewEvery = 5, 3 * time.Second
		s := serveLeases(t, "feedback: %s, renewEvery: %s", feedback, renewEvery)
		x := s.stage(t, frontConfig{})
		k := x.leaseKey(t, limit)
		var running []*begun
		for range limit {
			running = append(running, x.hold(t, k, "/?hold=10m"))
		}
		for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
			began := time.Now()
			s.process.signal(t, signal)
			_ = s.process.wait(t)
			took := time.Since(began)
			s.restart(t)
			x.awaitHealthy(t)
			began = time.Now()
			// A period, and what Envoy needs to open its stream again.
			for len(x.inFlight(t, k)) < limit {
				if time.Since(began) > renewEvery+soon {
					t.Fatalf("%v: %d requests count %v after the restart, want %d", signal, len(x.inFlight(t, k)), time.Since(began), limit)
				}
				time.Sleep(20 * time.Millisecond)
			}
			t.Logf("%v took %v; whole %v after Envoy had found keyward again", signal, took.Round(10*time.Millisecond), time.Since(began).Round(10*time.Millisecond))
			for _, r := range x.inFlight(t, k) {
				if !r.Adopted {
					t.Errorf("%v: %+v was not adopted", signal, r)
				}
			}
			x.wantFull(t, k)
		}
		for _, b := range running {
			b.abort()
		}
		x.wantBack(t, k, soon)
		s.wantNoneLost(t)
	})
}

// TestLeasesSurviveARestartUnderLoad: whatever ends, begins or is lost while keyward is away, nothing of it
// counts for ever.
func TestLeasesSurviveARestartUnderLoad(t *testing.T) {
	t.Parallel()
	eachFeedback(t, func(t *testing.T, feedback string) {
		const clients, limit = 16, 8
		s := serveLeases(t, "feedback: %s, renewEvery: 1s", feedback)
		x := s.stage(t, frontConfig{})
		k := x.leaseKey(t, limit)
		var stop atomic.Bool
		var passed atomic.Int64
		var sending sync.WaitGroup
		defer sending.Wait()
		defer stop.Store(true)
		for range clients {
			sending.Go(func() {
				for !stop.Load() {
					b, err := x.dial(fmt.Sprintf("/?hold=%dms", rand.IntN(30)), withKey(k.secret))
					if err != nil {
						t.Error(err)
						return
					}
					if rand.IntN(5) == 0 {
						time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
						b.abort()
						continue
					}
					a, err := b.wait()
					b.abort()
					switch {
					case err != nil:
						t.Error(err)
						return
					case a.status == http.StatusOK:
						passed.Add(1)
					case a.status != http.StatusTooManyRequests && a.status != http.StatusServiceUnavailable:
						t.Errorf("got %d %q", a.status, a.body)
						return
					default:
						time.Sleep(5 * time.Millisecond)
					}
				}
			})
		}
		more := func() {
			t.Helper()
			want := passed.Load() + 100
			waitFor(t, "requests to pass", func() bool { return passed.Load() >= want || t.Failed() })
		}
		more()
		for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
			s.process.signal(t, signal)
			_ = s.process.wait(t)
			s.restart(t)
			more()
		}
		stop.Store(true)
		sending.Wait()
		// Entries were lost with the connections. What was adopted of those lives for 3.5 s.
		x.wantBack(t, k, 3500*time.Millisecond+soon)
		if left := s.metric(t, "keyward_limits_leases"); left != 0 {
			t.Errorf("%v leases left", left)
		}
		t.Logf("%d requests passed", passed.Load())
	})
}

// TestLongRequestsStayCounted: with everything at its default, a request of more than a minute and a
// websocket on which nothing is said count for as long as they last.
func TestLongRequestsStayCounted(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 75 s: run without -short")
	}
	t.Parallel()
	eachFeedback(t, func(t *testing.T, feedback string) {
		const long = 70 * time.Second
		s := serveLeases(t, "feedback: %s", feedback)
		x := s.stage(t, frontConfig{})
		slow, socket := x.leaseKey(t, 1), x.leaseKey(t, 1)
		began := time.Now()
		b := x.hold(t, slow, "/?hold="+long.String())
		w := x.hold(t, socket, "/websocket", upgradeLines...)
		for time.Since(began) < long-5*time.Second {
			x.wantStays(t, slow, 1, 500*time.Millisecond)
			x.wantStays(t, socket, 1, 500*time.Millisecond)
		}
		x.wantFull(t, slow)
		x.wantFull(t, socket)
		if a, err := b.wait(); err != nil || a.status != http.StatusOK {
			t.Errorf("the long request: got %d %q, %v, want 200", a.status, a.body, err)
		}
		w.say(t, "still there")
		w.abort()
		x.wantBack(t, slow, soon)
		x.wantBack(t, socket, soon)
		s.wantNoneLost(t)
	})
}

// TestLeasesWithoutFeedback: where the operator has said that Envoy tells nothing, a request counts for
// exactly its time to live, and that is nobody's fault.
func TestLeasesWithoutFeedback(t *testing.T) {
	t.Parallel()
	const ttl = 7 * time.Second // longer than a node may be silent: 2 × renewEvery and 5 s
	s := serveLeases(t, "feedback: none, renewEvery: 100ms, ttl: %s", ttl)
	x := s.stage(t, frontConfig{})
	k := x.leaseKey(t, 1)
	c := x.caller(t) // one connection, so one of Envoy's workers and its connection to keyward
	began := time.Now()
	c.get("/", withKey(k.secret)).want(t, http.StatusOK, "a request")
	refused := 0
	for c.get("/", withKey(k.secret)).status == http.StatusTooManyRequests {
		refused++
		time.Sleep(200 * time.Millisecond)
	}
	if lived := time.Since(began); refused == 0 || lived < ttl {
		t.Errorf("the request counted for %v, and %d were refused; want %v", lived, refused, ttl)
	}
	if n := s.metric(t, `keyward_decisions_total{outcome="limited",reason="concurrency_no_feedback"}`); n != 0 {
		t.Errorf("%v refusals blame the Envoy for what the configuration says", n)
	}
	if n := s.metric(t, "keyward_nodes_without_feedback"); n != 0 {
		t.Errorf("%v nodes without feedback where none is expected", n)
	}
	if strings.Contains(s.log(), `"level":"ERROR"`) {
		t.Error("keyward's log has an error")
	}
}

// TestNodeWithoutFeedback: an Envoy that was not told to tell of ends is found out, and its operator told
// what to do.
func TestNodeWithoutFeedback(t *testing.T) {
	t.Parallel()
	s := serveLeases(t, "feedback: als, renewEvery: 100ms, ttl: 10m")
	x := s.stage(t, frontConfig{args: []string{"--set", "concurrency.feedback=none"}, edit: func(config map[string]any) {
		// What keyward says to Envoy of its reasons, in Envoy's own log.
		stdout := managerOf(config)["access_log"].([]any)[0].(map[string]any)["typed_config"].(map[string]any)
		stdout["log_format"].(map[string]any)["json_format"].(map[string]any)["reason"] = "%DYNAMIC_METADATA(envoy.filters.http.ext_authz:keyward.reason)%"
	}})
	k := x.leaseKey(t, 1)
	c := x.caller(t) // one connection, so one of Envoy's workers and its connection to keyward
	c.get("/", withKey(k.secret)).want(t, http.StatusOK, "a request")
	const series = `keyward_decisions_total{outcome="limited",reason="concurrency_no_feedback"}`
	waitFor(t, "the node to be found out", func() bool {
		c.get("/", withKey(k.secret)).want(t, http.StatusTooManyRequests, "the next, of whose predecessor nobody tells")
		return s.metric(t, series) > 0
	})
	for range 5 {
		c.get("/", withKey(k.secret)).want(t, http.StatusTooManyRequests, "one more")
	}
	if n := s.metric(t, series); n < 6 {
		t.Errorf("%s %v, want 6 or more", series, n)
	}
	if n := s.metric(t, "keyward_nodes_without_feedback"); n != 1 {
		t.Errorf("%v nodes without feedback, want 1", n)
	}
	waitFor(t, "the reason in Envoy's log", func() bool { return strings.Contains(x.Log(), `"reason":"concurrency_no_feedback"`) })
	var errors []string
	for line := range strings.Lines(s.log()) {
		if strings.Contains(line, `"level":"ERROR"`) {
			errors = append(errors, line)
		}
	}
	if len(errors) != 1 || !strings.Contains(errors[0], "keyward envoy generate envoy") {
		t.Errorf("keyward's log has these errors, want one that names the fix: %q", errors)
	}
}

// A stranger is somebody who can reach the port on which Envoy's access logs come.
type stranger struct {
	t      *testing.T
	stream grpc.ClientStreamingClient[logv3.StreamAccessLogsMessage, logv3.StreamAccessLogsResponse]
}

func (s *server) stranger(t *testing.T) *stranger {
	t.Helper()
	conn, err := grpc.NewClient(s.check, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	stream, err := logv3.NewAccessLogServiceClient(conn).StreamAccessLogs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &stranger{t, stream}
}

// log writes one entry. lease "": it has none.
func (a *stranger) log(what datav3.AccessLogType, peer netip.AddrPort, start time.Time, lease string) {
	a.t.Helper()
	entry := &datav3.AccessLogCommon{
		AccessLogType: what,
		StartTime:     timestamppb.New(start),
		DownstreamDirectRemoteAddress: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: peer.Addr().String(), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(peer.Port())},
		}}},
	}
	if lease != "" {
		entry.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			"envoy.filters.http.ext_authz": {Fields: map[string]*structpb.Value{"keyward.lease": structpb.NewStringValue(lease)}},
		}}
	}
	err := a.stream.Send(&logv3.StreamAccessLogsMessage{
		Identifier: &logv3.StreamAccessLogsMessage_Identifier{Node: &corev3.Node{Id: "stranger"}, LogName: "keyward-leases"},
		LogEntries: &logv3.StreamAccessLogsMessage_HttpLogs{HttpLogs: &logv3.StreamAccessLogsMessage_HTTPAccessLogEntries{
			LogEntry: []*datav3.HTTPAccessLogEntry{{CommonProperties: entry}},
		}},
	})
	if err != nil {
		a.t.Fatal(err)
	}
}

// peerOf is the address that Envoy sees a request come from.
func (b *begun) peerOf() netip.AddrPort { return b.conn.LocalAddr().(*net.TCPAddr).AddrPort() }

// TestForgedLogEntries: what somebody makes up without having seen the request frees and takes nothing.
// Whoever knows a request's address and start, and can write access logs, can end its lease: that is why
// the port is on loopback unless there is TLS (DESIGN §4).
func TestForgedLogEntries(t *testing.T) {
	t.Parallel()
	s := serveLeases(t, "feedback: als, renewEvery: 3s")
	x := s.stage(t, frontConfig{})
	one, two := x.leaseKey(t, 1), x.leaseKey(t, 1)
	b1, b2 := x.hold(t, one, "/?hold=10m"), x.hold(t, two, "/?hold=10m")
	r1, r2 := x.inFlight(t, one)[0], x.inFlight(t, two)[0]
	a := s.stranger(t)
	const end, periodic = datav3.AccessLogType_DownstreamEnd, datav3.AccessLogType_DownstreamPeriodic
	entries := func(kind string) float64 {
		t.Helper()
		return s.metric(t, `keyward_access_log_entries_total{kind="`+kind+`"}`)
	}
	// changed is a lease with one character changed at a place.
	changed := func(lease string, at int) string {
		c := byte('A')
		if lease[at] == c {
			c = 'B'
		}
		return lease[:at] + string(c) + lease[at+1:]
	}

	for name, tt := range map[string]struct {
		lease string
		peer  netip.AddrPort
		start time.Time
		kind  string
	}{
		"another request's lease":      {r2.LeaseID, b1.peerOf(), r1.StartedAt, "forged"},
		"another port":                 {r1.LeaseID, netip.AddrPortFrom(b1.peerOf().Addr(), b1.peerOf().Port()+1), r1.StartedAt, "forged"},
		"another address":              {r1.LeaseID, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), b1.peerOf().Port()), r1.StartedAt, "forged"},
		"a microsecond later":          {r1.LeaseID, b1.peerOf(), r1.StartedAt.Add(time.Microsecond), "forged"},
		"another key":                  {changed(r1.LeaseID, 10), b1.peerOf(), r1.StartedAt, "forged"},
		"another MAC":                  {changed(r1.LeaseID, len(r1.LeaseID)-5), b1.peerOf(), r1.StartedAt, "forged"},
		"another pepper":               {changed(r1.LeaseID, 1), b1.peerOf(), r1.StartedAt, "foreign"},
		"no lease at all":              {"let me in", b1.peerOf(), r1.StartedAt, "malformed"},
		"a lease, and something more":  {r1.LeaseID + "A", b1.peerOf(), r1.StartedAt, "malformed"},
		"a request that nobody sent":   {"", netip.MustParseAddrPort("192.0.2.1:80"), time.Now(), "identity_end"},
		"an hour before":               {"", b1.peerOf(), r1.StartedAt.Add(-time.Hour), "identity_end"},
		"not an end: nothing to renew": {"", b1.peerOf(), r1.StartedAt, "ignored"},
	} {
		what := end
		if tt.kind == "ignored" {
			what = periodic
		}
		before := entries(tt.kind)
		a.log(what, tt.peer, tt.start, tt.lease)
		waitFor(t, name+" to be counted", func() bool { return entries(tt.kind) > before })
		if n := entries(tt.kind); n != before+1 {
			t.Errorf("%s: %v entries are %s, want %v", name, n, tt.kind, before+1)
		}
	}
	// Renewals that were made up do not prolong anything, nor bring back what never was.
	before := entries("forged")
	a.log(periodic, b2.peerOf(), r2.StartedAt, r1.LeaseID)
	waitFor(t, "a forged renewal to be counted", func() bool { return entries("forged") == before+1 })
	for _, k := range []key{one, two} {
		x.wantStays(t, k, 1, time.Second)
		x.wantFull(t, k)
	}

	// Whoever knows the request ends its lease: by the lease, or by the request alone.
	a.log(end, b1.peerOf(), r1.StartedAt, "")
	x.wantNone(t, one, soon)
	if by := s.leasesEnded(t, "identity"); by == 0 {
		t.Error("an entry without lease ended nothing")
	}
	before = s.leasesEnded(t, "log")
	a.log(end, b2.peerOf(), r2.StartedAt, r2.LeaseID)
	waitFor(t, "the lease to end", func() bool { return s.leasesEnded(t, "log") >= before+1 })
	if expired := s.leasesEnded(t, "expiry"); expired != 0 {
		t.Errorf("%v leases ran out", expired)
	}

	// The requests' own ends come later, and more of them: no place is freed twice.
	for range 3 {
		a.log(end, b1.peerOf(), r1.StartedAt, "")
		a.log(end, b2.peerOf(), r2.StartedAt, r2.LeaseID)
	}
	b1.abort()
	b2.abort()
	for _, k := range []key{one, two} {
		x.wantBack(t, k, soon)
		b := x.hold(t, k, "/?hold=10m")
		x.wantFull(t, k)
		b.abort()
		x.wantBack(t, k, soon)
	}
	if !strings.Contains(s.log(), "an access log names a lease that is not its request's") {
		t.Error("keyward's log does not tell of forged entries")
	}
}
