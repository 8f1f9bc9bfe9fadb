package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz/apikey"
)

// A Listener says where one of keyward's servers listens.
type Listener struct {
	// Address is host:port, or unix:///path for a socket with mode 0660. Empty: not served.
	Address string `yaml:"address"`
	TLS     TLS    `yaml:"tls"`
	// MaxConnections is how many may be open at once; further ones are closed.
	MaxConnections int `yaml:"maxConnections"`
}

// TLS says how a listener proves who it is, and whom it lets in.
type TLS struct {
	CertFile string `yaml:"certFile"` // PEM, the leaf first
	KeyFile  string `yaml:"keyFile"`  // PEM
	// ClientCAFile turns client certificates on: whoever has none from these authorities is refused.
	ClientCAFile string `yaml:"clientCAFile"`
	// ClientNames are DNS or URI names of which a client's certificate must carry one; empty: any client
	// of the authorities.
	ClientNames []string `yaml:"clientNames"`
}

func (t TLS) enabled() bool { return t.CertFile != "" || t.KeyFile != "" || t.ClientCAFile != "" }

func (l Listener) validate(field string) error {
	var faults []error
	fault := func(name, reason string) { faults = append(faults, apikey.Invalid(field+"."+name, reason)) }
	if path, ok := strings.CutPrefix(l.Address, "unix://"); ok {
		if !strings.HasPrefix(path, "/") {
			fault("address", "needs an absolute path, such as unix:///run/keyward/check.sock")
		}
		if l.TLS.enabled() {
			fault("tls", "makes no sense on a Unix socket: its file mode says who may call")
		}
	} else if l.Address != "" {
		if _, _, err := net.SplitHostPort(l.Address); err != nil {
			fault("address", "must be host:port, such as 127.0.0.1:9191, or unix:///path")
		}
	}
	if l.MaxConnections < 1 || l.MaxConnections > 1_000_000 {
		fault("maxConnections", "must be from 1 to 1000000")
	}
	if l.TLS.enabled() && (l.TLS.CertFile == "" || l.TLS.KeyFile == "") {
		fault("tls", "needs certFile and keyFile")
	}
	if len(l.TLS.ClientNames) > 0 && l.TLS.ClientCAFile == "" {
		fault("tls.clientNames", "needs clientCAFile: names prove nothing without an authority")
	}
	return errors.Join(faults...)
}

// isLoopback reports whether only this machine can connect.
func (l Listener) isLoopback() bool {
	if strings.HasPrefix(l.Address, "unix://") {
		return true
	}
	host, _, _ := net.SplitHostPort(l.Address)
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// listen binds the address. A Unix socket that a dead process left behind is replaced, a living one's
// is not.
func (l Listener) listen(ctx context.Context) (net.Listener, error) {
	path, isUnix := strings.CutPrefix(l.Address, "unix://")
	if !isUnix {
		return new(net.ListenConfig).Listen(ctx, "tcp", l.Address)
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s is there and is no socket: remove it, or name another path", path)
		}
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			_ = conn.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) { // only that says that nobody listens: a busy one answers otherwise
			return nil, fmt.Errorf("another process serves %s", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	socket, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o660); err != nil { //nolint:gosec // Envoy runs as another user of the group
		return nil, errors.Join(err, socket.Close())
	}
	return socket, nil
}

// A reloader serves the newest good certificate of one listener: files that changed are read again,
// and a pair that does not fit, or an authority that cannot be read, leaves the old one in use.
type reloader struct {
	config  TLS
	log     *slog.Logger
	current atomic.Pointer[tls.Config]
	stamp   string // what the files looked like when current was read
	expiry  prometheus.Gauge
}

// reloadInterval is how soon a renewed certificate is used.
const reloadInterval = 10 * time.Second

// newReloader reads the files for the first time; then they have to be good.
func newReloader(config TLS, log *slog.Logger, expiry prometheus.Gauge) (*reloader, error) {
	r := &reloader{config: config, log: log, expiry: expiry}
	return r, r.load()
}

func (r *reloader) load() error {
	stamp := r.fileStamp() // before reading: a change in between is seen next time
	pair, err := tls.LoadX509KeyPair(r.config.CertFile, r.config.KeyFile)
	if err != nil {
		return fmt.Errorf("certificate %s: %w", r.config.CertFile, err)
	}
	next := &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{pair},
		NextProtos:   []string{"h2", "http/1.1"},
	}
	if r.config.ClientCAFile != "" {
		pem, err := os.ReadFile(r.config.ClientCAFile)
		if err != nil {
			return fmt.Errorf("client authorities: %w", err)
		}
		next.ClientCAs = x509.NewCertPool()
		if !next.ClientCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("client authorities: %s holds no certificate in PEM", r.config.ClientCAFile)
		}
		next.ClientAuth = tls.RequireAndVerifyClientCert
		if len(r.config.ClientNames) > 0 {
			next.VerifyConnection = r.verifyName
		}
	}
	r.stamp = stamp
	r.current.Store(next)
	r.expiry.Set(float64(pair.Leaf.NotAfter.Unix()))
	return nil
}

// verifyName looks for one of the wanted names in the leaf, whose chain is verified already.
func (r *reloader) verifyName(state tls.ConnectionState) error {
	leaf := state.PeerCertificates[0]
	has := func(name string) bool {
		return slices.Contains(leaf.DNSNames, name) || slices.ContainsFunc(leaf.URIs, func(u *url.URL) bool { return u.String() == name })
	}
	if !slices.ContainsFunc(r.config.ClientNames, has) {
		return errors.New("the client's certificate carries none of the names in clientNames")
	}
	return nil
}

// run reads files again when they change, until ctx is done.
func (r *reloader) run(ctx context.Context) error {
	tick := time.NewTicker(reloadInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			r.reload()
		}
	}
}

func (r *reloader) reload() {
	if r.fileStamp() == r.stamp {
		return
	}
	if err := r.load(); err != nil {
		r.log.Error("a changed certificate was not taken; the old one stays in use", "error", err)
		return
	}
	r.log.Info("certificate reloaded", "file", r.config.CertFile)
}

// fileStamp tells whether any of the files changed, also behind a symbolic link that was switched.
func (r *reloader) fileStamp() string {
	var b strings.Builder
	for _, path := range []string{r.config.CertFile, r.config.KeyFile, r.config.ClientCAFile} {
		if info, err := os.Stat(path); err == nil {
			fmt.Fprintf(&b, "%s %d %d\n", path, info.ModTime().UnixNano(), info.Size())
		}
	}
	return b.String()
}

// server is the configuration to serve with: every connection gets the newest.
func (r *reloader) server() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return r.current.Load(), nil
		},
	}
}
