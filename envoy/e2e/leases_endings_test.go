package e2e_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"keyward/envoy/envoytest"
)

// TestLeaseEndings: however a request ends, Envoy says so, and its place is free again. Each ending has
// a key of its own, and all of them happen side by side. Not one lease may have to run out.
func TestLeaseEndings(t *testing.T) {
	t.Parallel()
	eachFeedback(t, func(t *testing.T, feedback string) {
		s := serveLeases(t, "feedback: %s, renewEvery: 3s", feedback)
		versions := envoytest.Versions()
		if feedback != "als" {
			versions = []string{envoytest.DefaultVersion}
		}
		t.Run("on", func(t *testing.T) {
			for _, version := range versions {
				t.Run(version, func(t *testing.T) {
					t.Parallel()
					x := s.stage(t, frontConfig{version: version})
					t.Run("each", func(t *testing.T) { testEndings(t, x) })
				})
			}
		})
		s.wantNoneLost(t)
	})
}

func testEndings(t *testing.T, x *stage) {
	for _, tt := range []struct {
		name  string
		limit int // 0: 1
		end   func(t *testing.T, x *stage, k key)
	}{
		{name: "Normal", end: func(t *testing.T, x *stage, k key) {
			b := x.hold(t, k, "/?hold=10s")
			x.wantFull(t, k)
			if a, err := b.wait(); err != nil || a.status != http.StatusOK || a.body != "done" {
				t.Fatalf("got %d %q, %v", a.status, a.body, err)
			}
		}},
		{name: "ClientAborts", end: func(t *testing.T, x *stage, k key) {
			b := x.hold(t, k, "/?hold=10m")
			x.wantFull(t, k)
			b.abort()
		}},
		{name: "ClientHalfCloses", end: func(t *testing.T, x *stage, k key) {
			b := x.hold(t, k, "/?hold=10m")
			if err := b.conn.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if a, err := b.wait(); err == nil {
				t.Fatalf("got %d, want Envoy to hang up", a.status)
			}
		}},
		{name: "EventsAborted", end: func(t *testing.T, x *stage, k key) {
			b := x.hold(t, k, "/events?hold=10m")
			x.wantFull(t, k)
			b.abort()
		}},
		{name: "UpstreamResets", end: func(t *testing.T, x *stage, k key) {
			// keyward's own 503 is told from Envoy's by what the upstream saw.
			for hits := x.work.of(k).hits; x.work.of(k).hits == hits; {
				b := x.begin(t, "/reset", withKey(k.secret))
				if a, err := b.wait(); err != nil || a.status != http.StatusServiceUnavailable {
					t.Fatalf("got %d %q, %v, want 503", a.status, a.body, err)
				}
			}
		}},
		{name: "RouteTimeOut", end: func(t *testing.T, x *stage, k key) {
			if a := x.get(t, k, "/hurried?hold=10m"); a.status != http.StatusGatewayTimeout {
				t.Fatalf("got %d %q, want 504", a.status, a.body)
			}
		}},
		{name: "LaterFilterFaults", end: func(t *testing.T, x *stage, k key) {
			if a := x.get(t, k, "/", faultHeader+": 1"); a.status != http.StatusTeapot || x.work.of(k).hits != 0 {
				t.Fatalf("got %d %q, and %d at the upstream, want 418 and none", a.status, a.body, x.work.of(k).hits)
			}
		}},
		{name: "LaterFilterForbids", end: func(t *testing.T, x *stage, k key) {
			a := x.get(t, k, "/", rbacHeader+": 1")
			if a.status != http.StatusForbidden || !strings.HasPrefix(a.body, "RBAC") || x.work.of(k).hits != 0 {
				t.Fatalf("got %d %q, and %d at the upstream, want 403 of RBAC and none", a.status, a.body, x.work.of(k).hits)
			}
		}},
		{name: "WebsocketClosed", end: func(t *testing.T, x *stage, k key) {
			b := x.hold(t, k, "/websocket", upgradeLines...)
			b.say(t, "hello")
			x.wantStays(t, k, 1, 11*time.Second) // longer than a lease lives that nobody renews
			x.wantFull(t, k)
			b.say(t, "still there")
			b.abort()
		}},
		{name: "GRPCStreamFinished", end: func(t *testing.T, x *stage, k key) {
			stream := x.watch(t, t.Context(), k, "")
			for n := 0; ; n++ {
				if _, err := stream.Recv(); errors.Is(err, io.EOF) && n == 2 {
					return // 3 messages with that of watch
				} else if err != nil {
					t.Fatalf("after %d more messages: %v", n, err)
				}
			}
		}},
		{name: "GRPCStreamCancelled", end: func(t *testing.T, x *stage, k key) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			stream := x.watch(t, ctx, k, endless)
			x.wantFull(t, k)
			cancel()
			for {
				if _, err := stream.Recv(); status.Code(err) == codes.Canceled {
					return
				} else if err != nil {
					t.Fatal(err)
				}
			}
		}},
		{name: "HTTP2StreamReset", limit: 20, end: func(t *testing.T, x *stage, k key) {
			client := x.http2Client(t)
			var running sync.WaitGroup
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			for range 20 {
				running.Go(func() {
					if _, err := x.http2Get(ctx, client, k, "/?hold=10m"); !errors.Is(err, context.Canceled) {
						t.Errorf("got %v, want a request that was cancelled", err)
					}
				})
			}
			waitFor(t, "20 requests on one connection", func() bool { return len(x.inFlight(t, k)) == 20 && x.work.of(k).now == 20 })
			x.wantFull(t, k)
			cancel()
			running.Wait()
			x.wantNone(t, k, soon)
			// The connection is whole: only streams were reset.
			if code, err := x.http2Get(t.Context(), client, k, "/"); err != nil || code != http.StatusOK {
				t.Errorf("on the same connection: got %d, %v, want 200", code, err)
			}
		}},
		{name: "RapidReset", limit: 1000, end: rapidReset},
		{name: "AbortsWhenever", limit: 1000, end: func(t *testing.T, x *stage, k key) {
			const requests, within = 500, 2500 * time.Microsecond
			var sending sync.WaitGroup
			for worker := range 10 {
				sending.Go(func() {
					for i := worker; i < requests; i += 10 {
						conn, err := net.Dial("tcp", x.address)
						if err != nil {
							t.Error(err)
							return
						}
						_, _ = io.WriteString(conn, requestText("GET", "/?hold=10m", withKey(k.secret)))
						time.Sleep(within * time.Duration(i) / requests)
						_ = conn.Close()
					}
				})
			}
			sending.Wait()
			ended := time.Now()
			x.wantNone(t, k, soon)
			t.Logf("%d aborts, %d came to the upstream; no lease %v later", requests, x.work.of(k).hits, time.Since(ended).Round(time.Millisecond))
		}},
		{name: "InternalRedirect", limit: 2, end: func(t *testing.T, x *stage, k key) {
			b := x.hold(t, k, "/redirected?hold=3s", keptHeader+": "+k.secret)
			if a, err := b.wait(); err != nil || a.status != http.StatusOK || a.body != "done" {
				t.Fatalf("got %d %q, %v", a.status, a.body, err)
			}
			if hits, granted := x.work.of(k).hits, x.s.granted(t, k); hits != 2 || granted != 2 {
				t.Errorf("%d requests at the upstream and %d leases, want 2 and 2", hits, granted)
			}
		}},
		{name: "RouterRetries", end: func(t *testing.T, x *stage, k key) {
			if a := x.get(t, k, "/retried"); a.status != http.StatusBadGateway {
				t.Fatalf("got %d %q, want 502", a.status, a.body)
			}
			if hits, granted := x.work.of(k).hits, x.s.granted(t, k); hits != 3 || granted != 1 {
				t.Errorf("%d requests at the upstream and %d leases, want 3 and 1", hits, granted)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			k := x.leaseKey(t, max(tt.limit, 1))
			tt.end(t, x, k)
			x.wantBack(t, k, soon)
		})
	}
}

// TestLeasesOnAUnixSocket: clients of a listener on a Unix socket have no address by which an entry
// without a lease could name their request. What such a one would have ended lives as long as a lease that
// nobody renews.
func TestLeasesOnAUnixSocket(t *testing.T) {
	t.Parallel()
	s := serveLeases(t, "feedback: als, renewEvery: 3s")
	dir, err := os.MkdirTemp("", "keyward-") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	x := s.stage(t, frontConfig{edit: func(config map[string]any) {
		listener := config["static_resources"].(map[string]any)["listeners"].([]any)[0].(map[string]any)
		listener["address"] = map[string]any{"pipe": map[string]any{"path": filepath.Join(dir, "envoy.sock")}}
	}})
	k := x.leaseKey(t, 2)
	b1, b2 := x.hold(t, k, "/?hold=10s"), x.hold(t, k, "/?hold=10m")
	x.wantFull(t, k)
	b2.abort()
	if a, err := b1.wait(); err != nil || a.status != http.StatusOK {
		t.Fatalf("got %d %q, %v", a.status, a.body, err)
	}
	x.wantBack(t, k, soon)
	s.wantNoneLost(t)

	many := x.leaseKey(t, 1000)
	for i := range 100 {
		b, err := x.dial("/?hold=10m", withKey(many.secret))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * 25 * time.Microsecond)
		b.abort()
	}
	x.wantBack(t, many, 10*time.Second+soon)
	t.Logf("of %v leases %v ran out", s.metric(t, "keyward_limits_leases_granted_total"), s.leasesEnded(t, "expiry"))
}

// watch opens a stream of gRPC that counts, and hears its first message.
func (x *stage) watch(t *testing.T, ctx context.Context, k key, service string) grpc.ServerStreamingClient[healthpb.HealthCheckResponse] {
	t.Helper()
	conn, err := grpc.NewClient(x.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ctx = metadata.AppendToOutgoingContext(ctx, "x-api-key", k.secret)
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		stream, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{Service: service})
		if err == nil {
			if _, err = stream.Recv(); err == nil {
				return stream
			}
		}
		if status.Code(err) != codes.Unavailable || time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// http2Client has one connection, of HTTP/2.
func (x *stage) http2Client(t testing.TB) *http.Client {
	t.Helper()
	transport := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// http2Get returns the status of a whole answer. For any goroutine.
func (x *stage) http2Get(ctx context.Context, client *http.Client, k key, target string) (int, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+x.address+target, nil)
	if err != nil {
		return 0, err
	}
	r.Header.Set("X-API-Key", k.secret)
	res, err := client.Do(r)
	if err != nil {
		return 0, err
	}
	defer func() { _ = res.Body.Close() }()
	_, err = io.Copy(io.Discard, res.Body)
	return res.StatusCode, err
}

// rapidReset opens streams and resets each soon, until Envoy has had enough of it and hangs up. It is
// tried with longer and longer pauses before the resets, until some Checks were as fast.
func rapidReset(t *testing.T, x *stage, k key) {
	for pause := time.Millisecond; ; pause *= 2 {
		x.rapidReset(t, k, pause)
		x.wantNone(t, k, soon)
		granted := x.s.granted(t, k)
		if granted > 0 {
			t.Logf("%d leases in connections of rapid resets", granted)
			return
		}
		if pause > 300*time.Millisecond {
			t.Fatal("no Check was as fast: nothing was tried")
		}
	}
}

func (x *stage) rapidReset(t *testing.T, k key, pause time.Duration) {
	t.Helper()
	const streams, batch = 2000, 20 // Envoy looks after 500
	conn, err := net.Dial("tcp", x.address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(patience))
	frame := func(out *bytes.Buffer, kind, flags byte, stream uint32, payload []byte) {
		out.Write(binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind)))
		out.WriteByte(flags)
		out.Write(binary.BigEndian.AppendUint32(nil, stream))
		out.Write(payload)
	}
	// Literal fields without indexing, RFC 7541 section 6.2.2; all are shorter than 127 bytes.
	var fields bytes.Buffer
	for _, f := range [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", "app.test"}, {":path", "/?hold=10m"}, {"x-api-key", k.secret}} {
		fmt.Fprintf(&fields, "\x00%c%s%c%s", len(f[0]), f[0], len(f[1]), f[1])
	}
	const headers, reset, settings, endStream, endHeaders, cancel = 1, 3, 4, 1, 4, 8
	out := bytes.NewBufferString("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	frame(out, settings, 0, 0, nil)
	hungUp := make(chan struct{})
	go func() {
		defer close(hungUp)
		_, _ = io.Copy(io.Discard, conn)
	}()
	for first := uint32(0); first < streams; first += batch {
		for i := first; i < first+batch; i++ {
			frame(out, headers, endStream|endHeaders, 2*i+1, fields.Bytes())
		}
		if _, err := out.WriteTo(conn); err != nil {
			break
		}
		time.Sleep(pause)
		for i := first; i < first+batch; i++ {
			frame(out, reset, 0, 2*i+1, binary.BigEndian.AppendUint32(nil, cancel))
		}
		if _, err := out.WriteTo(conn); err != nil {
			break
		}
	}
	select {
	case <-hungUp:
	case <-time.After(patience):
		t.Fatal("Envoy let it go on")
	}
	const refused = "http.ingress.downstream_rq_too_many_premature_resets"
	if stats, err := x.Stats(t.Context(), refused); err != nil || stats[refused] == 0 {
		t.Errorf("%s: %v, %v, want some", refused, stats, err)
	}
}
