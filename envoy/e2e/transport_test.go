package e2e_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"keyward/authz/admin"
)

func TestUnixSocket(t *testing.T) {
	t.Parallel()
	s := serve(t, config{unix: true, yaml: routes})
	info, err := os.Stat(s.path("check.sock"))
	if err != nil || info.Mode() != fs.ModeSocket|0o660 {
		t.Fatalf("got %v, %v, want a socket of mode 0660", info, err)
	}
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	home := s.instance(t, admin.PolicyInput{})
	k := s.key(t, home, admin.KeyInput{AllowedIPs: []string{"127.0.0.1"}}) // the client's address, not the socket's
	far := s.key(t, home, admin.KeyInput{AllowedIPs: []string{"203.0.113.7"}})
	c := f.caller(t)
	c.get("/any", withKey(k.secret)).want(t, http.StatusOK)
	c.get("/any", withKey(far.secret)).want(t, http.StatusForbidden)
	c.get("/any").want(t, http.StatusUnauthorized)

	// A crash leaves the socket behind, which does not keep the next from starting.
	s.process.kill(t)
	if _, err := os.Stat(s.path("check.sock")); err != nil {
		t.Errorf("the socket went with the process: %v", err)
	}
	s.restart(t)
	c.get("/any", withKey(k.secret)).want(t, http.StatusOK, "after a crash")
}

// An authority signs certificates and writes them into its folder.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir(), pool: x509.NewCertPool()}
	template := certificate("authority of " + t.Name())
	template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
	a.cert, a.key = a.sign("ca", template)
	a.pool.AddCert(a.cert)
	return a
}

func certificate(name string) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

// issue makes NAME.pem and NAME.key, for these DNS names and addresses.
func (a *authority) issue(name string, hosts ...string) tls.Certificate {
	a.t.Helper()
	template := certificate(name)
	for _, n := range hosts {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	a.sign(name, template)
	pair, err := tls.LoadX509KeyPair(a.file(name+".pem"), a.file(name+".key"))
	if err != nil {
		a.t.Fatal(err)
	}
	return pair
}

func (a *authority) sign(name string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{".pem": {Type: "CERTIFICATE", Bytes: der}, ".key": {Type: "PRIVATE KEY", Bytes: private}} {
		// In the place of the old one, as renewing programs do.
		if err := os.WriteFile(a.file(name+file+".new"), pem.EncodeToMemory(block), 0o600); err != nil {
			a.t.Fatal(err)
		}
		if err := os.Rename(a.file(name+file+".new"), a.file(name+file)); err != nil {
			a.t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

func TestTLSWithClientCertificates(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t), newAuthority(t)
	ca.issue("keyward", "keyward.test", "127.0.0.1")
	envoys := ca.issue("envoy", "envoy.test")
	wrongName := ca.issue("stranger", "stranger.test")
	wrongAuthority := other.issue("envoy", "envoy.test")
	s := serve(t, config{yaml: routes, tls: fmt.Sprintf("{certFile: %q, keyFile: %q, clientCAFile: %q, clientNames: [envoy.test]}",
		ca.file("keyward.pem"), ca.file("keyward.key"), ca.file("ca.pem"))})
	k := s.key(t, s.instance(t, admin.PolicyInput{}), admin.KeyInput{})
	behind := func(authority *authority, name string) *front {
		return s.front(t, frontConfig{args: []string{
			"--keyward-ca", ca.file("ca.pem"), "--keyward-name", "keyward.test",
			"--keyward-cert", authority.file(name + ".pem"), "--keyward-key", authority.file(name + ".key"),
		}})
	}

	good := behind(ca, "envoy")
	good.awaitHealthy(t)
	good.caller(t).get("/any", withKey(k.secret)).want(t, http.StatusOK)
	good.caller(t).get("/any").want(t, http.StatusUnauthorized)
	for name, bad := range map[string]*front{"another's name": behind(ca, "stranger"), "another authority": behind(other, "envoy")} {
		c := bad.caller(t)
		c.patient = false
		for _, target := range []string{"/any", "/public/a"} {
			c.get(target, withKey(k.secret)).want(t, http.StatusServiceUnavailable, name)
		}
	}

	// Whoever can call Check can try keys: so nobody else can.
	ask := func(creds credentials.TransportCredentials) (codes.Code, error) {
		conn, err := grpc.NewClient(s.check, grpc.WithTransportCredentials(creds))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		_, err = healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		return status.Code(err), err
	}
	with := func(pool *x509.CertPool, certificates ...tls.Certificate) credentials.TransportCredentials {
		c := &tls.Config{RootCAs: pool, ServerName: "keyward.test"}
		if len(certificates) > 0 { // whatever the server says it accepts
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificates[0], nil }
		}
		return credentials.NewTLS(c)
	}
	if code, err := ask(with(ca.pool, envoys)); code != codes.OK {
		t.Fatalf("the right certificate: %v", err)
	}
	for name, creds := range map[string]credentials.TransportCredentials{
		"without TLS": insecure.NewCredentials(), "without a certificate": with(ca.pool),
		"another's name": with(ca.pool, wrongName), "another authority": with(ca.pool, wrongAuthority),
	} {
		if code, err := ask(creds); code != codes.Unavailable {
			t.Errorf("%s: got %v, want a refused connection", name, err)
		}
	}

	// Renewed certificates, and another list of authorities, are taken without a restart.
	renewed := ca.issue("keyward", "keyward.test", "127.0.0.1")
	others, err := os.ReadFile(other.file("ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(ca.file("ca.pem"), others, 0o600); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the new certificate", func() bool {
		conn, err := tls.Dial("tcp", s.check, &tls.Config{RootCAs: ca.pool, ServerName: "keyward.test", Certificates: []tls.Certificate{wrongAuthority}})
		if err != nil {
			return false
		}
		defer func() { _ = conn.Close() }()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.Cmp(renewed.Leaf.SerialNumber) == 0
	})
	if code, err := ask(with(ca.pool, wrongAuthority)); code != codes.OK {
		t.Errorf("the new authority: %v", err)
	}
	if code, _ := ask(with(ca.pool, envoys)); code != codes.Unavailable {
		t.Errorf("the old authority: got %v, want a refused connection", code)
	}
}
