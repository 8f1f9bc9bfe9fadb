package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/test/bufconn"

	"keyward/authz/apikey"
)

// wantRefused connects, and fails unless the connection is closed at once.
func wantRefused(t *testing.T, address string) {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err == nil {
		defer c.Close()
		_ = c.SetReadDeadline(time.Now().Add(patience))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a closed connection", err)
	}
}

func TestOneConnectionTooManyIsClosedAtOnce(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	l := &limitedListener{Listener: inner, name: "check", most: 2, refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "x"}),
		log: slog.New(slog.NewTextHandler(&log, nil))}
	accepted := make(chan net.Conn, 10)
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	})
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	next := func() net.Conn {
		t.Helper()
		select {
		case c := <-accepted:
			return c
		case <-time.After(patience):
			t.Fatal("not let in")
			return nil
		}
	}
	dial()
	one := next()
	second := dial()
	other := next()
	for range 3 {
		wantRefused(t, inner.Addr().String())
	}
	if _, err := other.Write([]byte{1}); err != nil { // those that were let in go on
		t.Error(err)
	}
	if _, err := second.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
	_ = one.Close()
	_ = one.Close() // twice frees one place only
	dial()
	third := next()
	wantRefused(t, inner.Addr().String())
	_ = inner.Close()
	accepting.Wait()
	if n := l.count(); n != 2 {
		t.Errorf("got %d open, want 2", n)
	}
	_, _ = other.Close(), third.Close()
	if n := l.count(); n != 0 {
		t.Errorf("got %d open at the end", n)
	}
	if n := strings.Count(log.String(), "too many connections"); n != 1 || !strings.Contains(log.String(), "maxConnections=2") {
		t.Errorf("said %d times: %s", n, log.String())
	}
}

// TestServeKeepsToMaxConnections: an Envoy that is connected does not notice that others are refused.
func TestServeKeepsToMaxConnections(t *testing.T) {
	t.Parallel()
	dir, at := t.TempDir(), newPorts()
	if err := errors.Join(
		os.WriteFile(dir+"/keyward.yaml", []byte(smallest+"listen: {check: {maxConnections: 1}}\n"), 0o600),
		writeNewPrivate(dir+"/pepper", apikey.MarshalPepper(apikey.NewPepper(1, false))),
	); err != nil {
		t.Fatal(err)
	}
	server, err := serve(dir, at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.kill)
	conn, err := dialCheck(at.check)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	healthy := func() {
		t.Helper()
		if got, err := healthpb.NewHealthClient(conn.conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil || got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("got %v, %v", got, err)
		}
	}
	healthy()
	for range 3 {
		wantRefused(t, at.check)
	}
	healthy()
	metrics := readMetrics(t, at)
	if got := metrics["keyward_connections_refused_total listener=check"]; got != 3 {
		t.Errorf("%v refused, want 3", got)
	}
	if got := metrics["keyward_connections listener=check"]; got != 1 {
		t.Errorf("%v open, want 1", got)
	}
}

// TestWhoHasNoCertificateTakesNoPlace: connections that never begin TLS, or show the wrong certificate, keep
// no Envoy out, however many there are.
func TestWhoHasNoCertificateTakesNoPlace(t *testing.T) {
	t.Parallel()
	dir, at, ca := t.TempDir(), newPorts(), newAuthority(t, "ca")
	pair := ca.server(t, "keyward")
	if err := errors.Join(
		os.WriteFile(dir+"/keyward.yaml", []byte(smallest+"listen:\n  check: {maxConnections: 2, tls: {certFile: cert, keyFile: key, clientCAFile: ca}}\n"), 0o600),
		os.WriteFile(dir+"/cert", pair.cert, 0o600), os.WriteFile(dir+"/key", pair.key, 0o600), os.WriteFile(dir+"/ca", ca.pem(), 0o600),
		writeNewPrivate(dir+"/pepper", apikey.MarshalPepper(apikey.NewPepper(1, false))),
	); err != nil {
		t.Fatal(err)
	}
	server, err := serve(dir, at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.kill)
	const tooMany = 20
	var strangers []net.Conn
	for range maxStrangers + tooMany {
		c, err := net.Dial("tcp", at.check)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		strangers = append(strangers, c)
	}
	for _, c := range strangers[:tooMany] {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("got %v: the oldest are not closed", err)
		}
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	config := &tls.Config{RootCAs: roots, ServerName: "keyward", NextProtos: []string{"h2"}}
	if c, err := tls.Dial("tcp", at.check, config); err == nil { // TLS 1.3 says later that a certificate is missing
		if _, err := io.ReadAll(c); err == nil {
			t.Error("let in without a certificate")
		}
		_ = c.Close()
	}
	config.Certificates = []tls.Certificate{ca.server(t, "envoy").tls(t)}
	healthy := func(c *grpc.ClientConn) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if _, err := healthpb.NewHealthClient(c).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
			t.Error(err)
		}
	}
	var envoys []*grpc.ClientConn
	for range 2 {
		c, err := grpc.NewClient(at.check, grpc.WithTransportCredentials(credentials.NewTLS(config)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		healthy(c)
		envoys = append(envoys, c)
	}
	// A third with a certificate is one too many.
	if c, err := tls.Dial("tcp", at.check, config); err == nil {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("one too many was let in")
		}
		_ = c.Close()
	}
	for _, c := range envoys {
		healthy(c)
	}
	metrics := readMetrics(t, at)
	// Those that failed or gave up are gone, and the Envoys' handshakes pushed out some more.
	if got := metrics["keyward_handshakes_dropped_total listener=check"]; got < tooMany {
		t.Errorf("%v dropped, want %d at least", got, tooMany)
	}
	if got := metrics["keyward_connections listener=check"]; got != 2 {
		t.Errorf("%v open, want 2", got)
	}
	if got := metrics["keyward_connections_refused_total listener=check"]; got != 1 {
		t.Errorf("%v refused, want 1", got)
	}
}

// The same for HTTP, where the first request is what takes a place.
func TestWhoAsksNothingTakesNoPlace(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ca := newAuthority(t, "ca")
	l := &limitedListener{Listener: inner, name: "manage", most: 1, tls: true, log: slog.New(slog.DiscardHandler),
		refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "x"}), dropped: prometheus.NewCounter(prometheus.CounterOpts{Name: "y"})}
	server := &http.Server{
		Handler: http.NotFoundHandler(), ConnState: admitHTTP, ReadHeaderTimeout: patience, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{ca.server(t, "keyward").tls(t)}},
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.ServeTLS(l, "", "") })
	defer serving.Wait()
	defer server.Close()
	for range 3 {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	for _, http2 := range []bool{false, true} {
		get := func() (*http.Transport, error) {
			transport := &http.Transport{ForceAttemptHTTP2: http2, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "keyward"}}
			resp, err := (&http.Client{Transport: transport, Timeout: patience}).Get("https://" + inner.Addr().String())
			if err == nil {
				_, _ = io.ReadAll(resp.Body)
				_ = resp.Body.Close()
			}
			return transport, err
		}
		first, err := get()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := get(); err == nil {
			t.Error("one too many was let in")
		}
		first.CloseIdleConnections()
		if err := eventually(func() error {
			if n := l.count(); n != 0 {
				return fmt.Errorf("%d are open", n)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
}

// pinging connects to a server with our transport options as an Envoy does that asks nothing, and sends a ping
// every interval. The server lets it be idle for an hour. It returns how many were answered before the server hung up, at most as many as were wanted.
func pinging(t *testing.T, interval time.Duration, want int) (answered int) {
	t.Helper()
	l := bufconn.Listen(64 << 10)
	server := grpc.NewServer(transportOptions(time.Hour)...)
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) })
	defer serving.Wait()
	defer server.Stop()
	conn, err := l.DialContext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(conn, conn)
	if err := framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	acks, writes := make(chan struct{}, want), make(chan func() error, 100)
	var working sync.WaitGroup
	working.Go(func() { // frames are written by one goroutine only
		for write := range writes {
			if write() != nil {
				return
			}
		}
	})
	working.Go(func() {
		defer close(acks)
		for {
			frame, err := framer.ReadFrame()
			if err != nil {
				return
			}
			switch f := frame.(type) {
			case *http2.GoAwayFrame:
				return
			case *http2.PingFrame:
				if f.IsAck() {
					acks <- struct{}{}
				} else {
					data := f.Data
					writes <- func() error { return framer.WritePing(true, data) } // keyward's own
				}
			}
		}
	})
	for ; answered < want; answered++ {
		writes <- func() error { return framer.WritePing(false, [8]byte{1}) }
		if _, ok := <-acks; !ok {
			break
		}
		time.Sleep(interval)
	}
	_ = conn.Close()
	close(writes)
	working.Wait()
	return answered
}

func TestEnvoysPingsAreWelcome(t *testing.T) {
	for name, test := range map[string]struct {
		interval time.Duration
		stays    bool
	}{
		"as we generate it":       {10 * time.Second, true},
		"as often as is of use":   {time.Second, true},
		"a flood is no keepalive": {10 * time.Millisecond, false},
		"idle for too long":       {5 * time.Minute, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const pings = 30
				if got := pinging(t, test.interval, pings); (got == pings) != test.stays {
					t.Errorf("%d of %d pings were answered", got, pings)
				}
			})
		})
	}
}

// TestNobodyWaitsForAWorker: more calls that take their time than there are workers, as access logs and
// Checks that wait for a place do, and one more that does not.
func TestNobodyWaitsForAWorker(t *testing.T) {
	l := bufconn.Listen(1 << 20)
	server := grpc.NewServer(transportOptions(time.Hour)...)
	healthpb.RegisterHealthServer(server, health.NewServer())
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) })
	defer serving.Wait()
	defer server.Stop()
	conn, err := grpc.NewClient("passthrough:", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := healthpb.NewHealthClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for range 600 { // a watch never ends by itself
		watch, err := client.Watch(ctx, &healthpb.HealthCheckRequest{})
		if err == nil {
			_, err = watch.Recv()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := client.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
		t.Error(err)
	}
}

func TestConnectionsOutliveTheirLeases(t *testing.T) {
	for _, test := range []struct {
		c    Concurrency
		want time.Duration
	}{
		{defaultConfig().Concurrency, 15 * time.Minute},
		{Concurrency{Feedback: "none", TTL: apikey.Duration(time.Hour)}, time.Hour},
		{Concurrency{Feedback: "otlp", RenewEvery: apikey.Duration(time.Hour)}, 4 * time.Hour},
	} {
		if got := test.c.connectionIdle(); got != test.want {
			t.Errorf("%+v: got %v, want %v", test.c, got, test.want)
		}
	}
}
