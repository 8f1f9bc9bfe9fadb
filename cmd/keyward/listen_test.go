package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"keyward/authz/apikey"
)

// An authority signs certificates for tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{}
	a.key, a.cert = sign(t, nil, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

// sign makes a key and a certificate as described, by itself or by an authority.
func sign(t *testing.T, by *authority, template *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	if template.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-24 * time.Hour)
	}
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(time.Hour)
	}
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func (a *authority) pem() []byte { return pemOf("CERTIFICATE", a.cert.Raw) }

// A pair is a certificate with its key, in PEM.
type pair struct{ cert, key []byte }

func (p pair) tls(t *testing.T) tls.Certificate {
	t.Helper()
	c, err := tls.X509KeyPair(p.cert, p.key)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (a *authority) pair(t *testing.T, template x509.Certificate) pair {
	t.Helper()
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	key, cert := sign(t, a, &template)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pair{pemOf("CERTIFICATE", cert.Raw), pemOf("PRIVATE KEY", der)}
}

// server is a certificate of a server called keyward.
func (a *authority) server(t *testing.T, common string, more ...func(*x509.Certificate)) pair {
	t.Helper()
	template := x509.Certificate{Subject: pkix.Name{CommonName: common}, DNSNames: []string{"keyward"}}
	for _, change := range more {
		change(&template)
	}
	return a.pair(t, template)
}

// A secured is a reloader with its files and a listener behind it.
type secured struct {
	*reloader
	TLS
	address string
	gauge   prometheus.Gauge
	log     *bytes.Buffer
	stamp   time.Time
	t       *testing.T
}

// put writes files of the configuration, each with a time of its own: file systems count coarsely.
func (s *secured) put(files map[string][]byte) {
	s.t.Helper()
	s.stamp = s.stamp.Add(time.Second)
	for path, text := range files {
		if err := errors.Join(os.WriteFile(path, text, 0o600), os.Chtimes(path, s.stamp, s.stamp)); err != nil {
			s.t.Fatal(err)
		}
	}
}

// secure serves one byte over TLS.
func secure(t *testing.T, first pair, clients *authority, names ...string) *secured {
	t.Helper()
	dir := t.TempDir()
	s := &secured{t: t, log: &bytes.Buffer{}, stamp: time.Now().Add(-time.Hour), gauge: prometheus.NewGauge(prometheus.GaugeOpts{Name: "expiry"})}
	s.TLS = TLS{CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem"), ClientNames: names}
	files := map[string][]byte{s.CertFile: first.cert, s.KeyFile: first.key}
	if clients != nil {
		s.ClientCAFile = filepath.Join(dir, "ca.pem")
		files[s.ClientCAFile] = clients.pem()
	}
	s.put(files)
	var err error
	if s.reloader, err = newReloader(s.TLS, slog.New(slog.NewTextHandler(s.log, nil)), s.gauge); err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", s.server())
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("k"))
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return s
}

// call connects as a client and returns the name in the server's certificate.
func (s *secured) call(servers *authority, client *tls.Config) (string, error) {
	config := &tls.Config{}
	if client != nil {
		config = client.Clone()
	}
	config.ServerName, config.RootCAs = "keyward", x509.NewCertPool()
	config.RootCAs.AddCert(servers.cert)
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", s.address, config)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	// With TLS 1.3 a client hears only now that it was refused.
	if _, err := io.ReadAll(conn); err != nil {
		return "", err
	}
	return conn.ConnectionState().PeerCertificates[0].Subject.CommonName, nil
}

func (s *secured) wantName(servers *authority, client *tls.Config, want string) {
	s.t.Helper()
	if got, err := s.call(servers, client); err != nil || got != want {
		s.t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

func (s *secured) wantRefused(why string, servers *authority, client *tls.Config) {
	s.t.Helper()
	if got, err := s.call(servers, client); err == nil {
		s.t.Errorf("%s was let in by %s", why, got)
	}
}

func (s *secured) wantExpiry(p pair) {
	s.t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(s.gauge)
	families, err := registry.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	if got, want := families[0].GetMetric()[0].GetGauge().GetValue(), float64(p.tls(s.t).Leaf.NotAfter.Unix()); got != want {
		s.t.Errorf("expiry: got %v, want %v", got, want)
	}
}

func TestRenewedCertificateIsServed(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "ca")
	first := ca.server(t, "first")
	s := secure(t, first, nil)
	s.wantName(ca, nil, "first")
	s.wantExpiry(first)

	s.reload()
	if s.log.Len() > 0 {
		t.Errorf("nothing changed, and it says: %s", s.log)
	}
	second := ca.server(t, "second", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(48 * time.Hour) })
	s.put(map[string][]byte{s.CertFile: second.cert, s.KeyFile: second.key})
	s.wantName(ca, nil, "first") // not before it was looked at
	s.reload()
	s.wantName(ca, nil, "second")
	s.wantExpiry(second)

	// Behind a link that is switched, as in a Kubernetes volume, too.
	third := ca.server(t, "third")
	dir := t.TempDir()
	s.put(map[string][]byte{filepath.Join(dir, "cert"): third.cert, filepath.Join(dir, "key"): third.key})
	for name, path := range map[string]string{"cert": s.CertFile, "key": s.KeyFile} {
		if err := errors.Join(os.Symlink(filepath.Join(dir, name), path+".new"), os.Rename(path+".new", path)); err != nil {
			t.Fatal(err)
		}
	}
	s.reload()
	s.wantName(ca, nil, "third")
}

func TestBadPairKeepsTheOldOne(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "ca")
	first, second := ca.server(t, "first"), ca.server(t, "second")
	s := secure(t, first, ca)
	client := &tls.Config{Certificates: []tls.Certificate{ca.server(t, "client").tls(t)}}
	canaryKey := []byte("-----BEGIN PRIVATE KEY-----\n" + canary + "\n-----END PRIVATE KEY-----\n")
	for name, files := range map[string]map[string][]byte{
		"halfway through a renewal": {s.CertFile: second.cert},
		"no certificate":            {s.CertFile: []byte(canary)},
		"no key":                    {s.KeyFile: canaryKey},
		"empty":                     {s.CertFile: nil, s.KeyFile: nil},
		"no authority":              {s.CertFile: second.cert, s.KeyFile: second.key, s.ClientCAFile: []byte(canary)},
	} {
		s.log.Reset()
		s.put(files)
		s.reload()
		s.wantName(ca, client, "first")
		s.wantRefused(name+": a client without a certificate", ca, nil)
		s.wantExpiry(first)
		if said := s.log.String(); !strings.Contains(said, "the old one stays in use") || strings.Contains(said, canary) {
			t.Errorf("%s: it says %q", name, said)
		}
		// It goes on trying: the renewal's second half makes it good.
		s.put(map[string][]byte{s.CertFile: second.cert, s.KeyFile: second.key, s.ClientCAFile: ca.pem()})
		s.reload()
		s.wantName(ca, client, "second")
		s.put(map[string][]byte{s.CertFile: first.cert, s.KeyFile: first.key})
		s.reload()
		s.wantName(ca, client, "first")
	}
	if err := os.Remove(s.KeyFile); err != nil {
		t.Fatal(err)
	}
	s.reload()
	s.wantName(ca, client, "first")

	// At the start there is no old one.
	if _, err := newReloader(s.TLS, slog.New(slog.DiscardHandler), s.gauge); err == nil {
		t.Error("a listener started without its key")
	}
}

func TestClientCertificates(t *testing.T) {
	t.Parallel()
	servers, clients, others := newAuthority(t, "servers"), newAuthority(t, "clients"), newAuthority(t, "clients")
	spiffe, err := url.Parse("spiffe://example/envoy")
	if err != nil {
		t.Fatal(err)
	}
	with := func(a *authority, template x509.Certificate) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{a.pair(t, template).tls(t)}}
	}
	byDNS := with(clients, x509.Certificate{DNSNames: []string{"other", "envoy.example"}})
	byURI := with(clients, x509.Certificate{URIs: []*url.URL{spiffe}})
	wrongName := with(clients, x509.Certificate{DNSNames: []string{"envoy.example.evil", "xenvoy.example", "*.example"}})
	onlyCommonName := with(clients, x509.Certificate{Subject: pkix.Name{CommonName: "envoy.example"}})
	stranger := with(others, x509.Certificate{DNSNames: []string{"envoy.example"}})
	expired := with(clients, x509.Certificate{DNSNames: []string{"envoy.example"}, NotAfter: time.Now().Add(-time.Minute)})
	notYet := with(clients, x509.Certificate{DNSNames: []string{"envoy.example"}, NotBefore: time.Now().Add(time.Hour), NotAfter: time.Now().Add(2 * time.Hour)})
	pair := servers.server(t, "keyward")

	named := secure(t, pair, clients, "envoy.example", "spiffe://example/envoy")
	anybody := secure(t, pair, clients)
	open := secure(t, pair, nil)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		at := func(c *tls.Config) *tls.Config {
			c = c.Clone()
			c.MinVersion, c.MaxVersion = version, version
			return c
		}
		named.wantName(servers, at(byDNS), "keyward")
		named.wantName(servers, at(byURI), "keyward")
		named.wantRefused("a client with another name", servers, at(wrongName))
		named.wantRefused("a client with the name in the wrong place", servers, at(onlyCommonName))
		anybody.wantName(servers, at(byDNS), "keyward")
		anybody.wantName(servers, at(wrongName), "keyward")
		for _, s := range []*secured{named, anybody} {
			s.wantRefused("a client without a certificate", servers, at(&tls.Config{}))
			s.wantRefused("a client of another authority", servers, at(stranger))
			s.wantRefused("a client whose certificate is over", servers, at(expired))
			s.wantRefused("a client whose certificate is not valid yet", servers, at(notYet))
		}
		open.wantName(servers, at(&tls.Config{}), "keyward")
	}
	open.wantRefused("a client with TLS 1.1", servers, &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11})
}

// TestChangedClientAuthority: from the next connection on, and for those that resume a session too, only
// the new authority counts.
func TestChangedClientAuthority(t *testing.T) {
	t.Parallel()
	servers, before, after := newAuthority(t, "servers"), newAuthority(t, "before"), newAuthority(t, "after")
	s := secure(t, servers.server(t, "keyward"), before)
	template := x509.Certificate{DNSNames: []string{"envoy.example"}}
	oldClient := &tls.Config{Certificates: []tls.Certificate{before.pair(t, template).tls(t)}, ClientSessionCache: tls.NewLRUClientSessionCache(4)}
	newClient := &tls.Config{Certificates: []tls.Certificate{after.pair(t, template).tls(t)}}
	s.wantName(servers, oldClient, "keyward")
	s.wantName(servers, oldClient, "keyward")
	s.wantRefused("a client of the new authority, too early,", servers, newClient)

	both := append(before.pem(), after.pem()...)
	s.put(map[string][]byte{s.ClientCAFile: both})
	s.reload()
	s.wantName(servers, oldClient, "keyward")
	s.wantName(servers, newClient, "keyward")

	s.put(map[string][]byte{s.ClientCAFile: after.pem()})
	s.reload()
	s.wantRefused("a client of the old authority", servers, oldClient)
	s.wantName(servers, newClient, "keyward")
}

// TestCertificatesAreLookedAtByThemselves: nobody has to call reload.
func TestCertificatesAreLookedAtByThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority(t, "ca")
		s := &secured{t: t, log: &bytes.Buffer{}, stamp: time.Now(), gauge: prometheus.NewGauge(prometheus.GaugeOpts{Name: "expiry"})}
		dir := t.TempDir()
		s.TLS = TLS{CertFile: filepath.Join(dir, "cert"), KeyFile: filepath.Join(dir, "key")}
		first, second := ca.server(t, "first"), ca.server(t, "second")
		s.put(map[string][]byte{s.CertFile: first.cert, s.KeyFile: first.key})
		r, err := newReloader(s.TLS, slog.New(slog.DiscardHandler), s.gauge)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.run(ctx) }()
		s.put(map[string][]byte{s.CertFile: second.cert, s.KeyFile: second.key})
		time.Sleep(reloadInterval + time.Second)
		synctest.Wait()
		if got := r.current.Load().Certificates[0].Leaf.Subject.CommonName; got != "second" {
			t.Errorf("after %v: still %s", reloadInterval, got)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestUnixSocket(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "kw") // short: a socket's path has room for some 100 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "check.sock")
	config := Listener{Address: "unix://" + path}

	live, err := config.listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := config.listen(t.Context()); err == nil || !strings.Contains(err.Error(), "another process serves "+path) {
		t.Errorf("a socket that is served: %v", err)
	}
	if conn, err := net.Dial("unix", path); err != nil {
		t.Errorf("the one that serves it was disturbed: %v", err)
	} else {
		_ = conn.Close()
	}

	// What a dead process leaves behind is replaced.
	live.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := live.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Fatalf("no socket was left: %v", err)
	}
	var next net.Listener
	// Not at once where another test is about to start a program: until then the child has the socket open.
	if err := eventually(func() (err error) {
		next, err = config.listen(t.Context())
		return err
	}); err != nil {
		t.Fatalf("a socket that nobody serves: %v", err)
	}
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a polite end left its socket: %v", err)
	}

	// What is no socket stays as it is.
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := config.listen(t.Context()); err == nil || !strings.Contains(err.Error(), "is no socket: remove it, or name another path") {
		t.Errorf("a regular file: %v", err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "precious" {
		t.Errorf("the file: %q, %v", text, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(dir, "target")
	if err := errors.Join(os.WriteFile(target, nil, 0o600), os.Symlink(target, path)); err != nil {
		t.Fatal(err)
	}
	if _, err := config.listen(t.Context()); err == nil {
		t.Error("a link was followed")
	}
}

// TestBusyUnixSocketIsNotTakenForAStaleOne: a process that has no time to accept serves all the same.
func TestBusyUnixSocketIsNotTakenForAStaleOne(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "kw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "check.sock")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for range 16 { // until nobody else gets in
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err != nil {
			break
		}
		t.Cleanup(func() { _ = conn.Close() })
	}
	if _, err := (Listener{Address: "unix://" + path}).listen(t.Context()); err == nil || !strings.Contains(err.Error(), "another process serves") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("its socket is gone: %v", err)
	}
}

// TestServeWithTLSAndSocket: the same at the door of the program. A gRPC caller without a certificate is
// refused, one with it is answered, and so is whoever can open the socket.
func TestServeWithTLSAndSocket(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "kw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	ca := newAuthority(t, "ca")
	own, envoy, other := ca.server(t, "keyward"), ca.pair(t, x509.Certificate{DNSNames: []string{"envoy.example"}}), ca.pair(t, x509.Certificate{DNSNames: []string{"other.example"}})
	config := smallest + `
listen:
  check: {tls: {certFile: cert.pem, keyFile: key.pem, clientCAFile: ca.pem, clientNames: [envoy.example]}}
  manage: {tls: {certFile: cert.pem, keyFile: key.pem}}
`
	for name, text := range map[string][]byte{
		"keyward.yaml": []byte(config), "cert.pem": own.cert, "key.pem": own.key, "ca.pem": ca.pem(),
		"pepper": apikey.MarshalPepper(apikey.NewPepper(1, false)),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	at := newPorts()
	server, err := serve(dir, at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.kill)
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	check := func(target string, transport credentials.TransportCredentials) (*authv3.CheckResponse, error) {
		conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(transport))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		return authv3.NewAuthorizationClient(conn).Check(ctx, checkRequest("", "GET", "/"))
	}
	with := func(certificates ...tls.Certificate) credentials.TransportCredentials {
		return credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "keyward", Certificates: certificates})
	}
	for who, transport := range map[string]credentials.TransportCredentials{
		"without a certificate": with(), "with another name": with(other.tls(t)), "without TLS": insecure.NewCredentials(),
	} {
		if answer, err := check(at.check, transport); err == nil {
			t.Errorf("a caller %s was answered: %v", who, answer)
		}
	}
	if answer, err := check(at.check, with(envoy.tls(t))); err != nil || answer.GetDeniedResponse() == nil {
		t.Errorf("Envoy: %v, %v", answer, err)
	}
	values := readMetrics(t, at)
	for _, listener := range []string{"check", "manage"} {
		if got, want := values["keyward_tls_certificate_expiry_seconds listener="+listener], float64(own.tls(t).Leaf.NotAfter.Unix()); got != want {
			t.Errorf("expiry of %s: got %v, want %v", listener, got, want)
		}
	}
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "keyward"}}, Timeout: patience}
	defer web.CloseIdleConnections()
	if resp, err := web.Get("https://" + at.manage + "/instances"); err != nil || resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("Management API: %v, %v", resp, err)
	} else {
		_ = resp.Body.Close()
	}
	server.kill()

	// What the kill left of a socket does not keep the next from starting.
	socket := "unix://" + filepath.Join(dir, "check.sock")
	if err := os.WriteFile(filepath.Join(dir, "keyward.yaml"), []byte(smallest), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if server, err = serve(dir, at, "--set", "listen.check.address="+socket); err != nil {
			t.Fatal(err)
		}
		if answer, err := check(socket, insecure.NewCredentials()); err != nil || answer.GetDeniedResponse() == nil {
			t.Errorf("over the socket: %v, %v", answer, err)
		}
		server.kill()
	}
}

func TestLoopback(t *testing.T) {
	for address, want := range map[string]bool{
		"127.0.0.1:1": true, "127.8.8.8:1": true, "[::1]:1": true, "localhost:1": true, "unix:///x": true,
		":1": false, "0.0.0.0:1": false, "[::]:1": false, "192.0.2.1:1": false, "example.com:1": false, "[::ffff:127.0.0.1]:1": true,
	} {
		if got := (Listener{Address: address}).isLoopback(); got != want {
			t.Errorf("%s: got %t", address, got)
		}
	}
}
