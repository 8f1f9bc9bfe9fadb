package generate

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// What stands in a [Config] where nothing is said.
const (
	DefaultListen       = "127.0.0.1:10000"
	DefaultKeyward      = "127.0.0.1:9191"
	DefaultCheckTimeout = 250 * time.Millisecond
	DefaultStatPrefix   = "keyward"
	// DefaultMaxRequestBytes is how much of a body is looked at.
	DefaultMaxRequestBytes = 64 << 10
	// DefaultRequestTimeout and its like are the ones that Envoy's guide for edge proxies recommends.
	DefaultRequestTimeout  = 5 * time.Minute
	DefaultResponseTimeout = 5 * time.Minute
	DefaultIdleTimeout     = 5 * time.Minute
)

// DefaultCredentialHeaders are the headers in which keyward looks for a key.
func DefaultCredentialHeaders() []string {
	return []string{"x-api-key", "x-agent-access-token", "authorization"}
}

// DefaultIdentityHeaders are the headers in which keyward tells the upstream who is calling.
func DefaultIdentityHeaders() []string {
	return []string{
		"x-keyward-key-id", "x-keyward-key-type", "x-keyward-instance-id", "x-keyward-agent",
		"x-keyward-user", "x-keyward-scopes", "x-keyward-decision-id", "x-user-identity",
	}
}

// unixScheme stands before the path of a Unix socket, as grpc-go writes it.
const unixScheme = "unix://"

// A ClientAddress says which address keyward takes for the caller's, as its own configuration has it.
type ClientAddress string

// The client addresses: the other end of the connection, or what Envoy or the proxies in front of it say.
const (
	ClientPeer          ClientAddress = "peer"
	ClientEnvoyExternal ClientAddress = "x-envoy-external-address"
	ClientForwardedFor  ClientAddress = "xff"
)

// A Config says what stands around Envoy. Its zero value is complete but for the upstreams. Header names
// are taken without case.
type Config struct {
	Listen string // where Envoy accepts requests, ip:port; port 0: the system chooses; "": DefaultListen
	Admin  string // Envoy's admin interface, ip:port on loopback; "": none

	// Upstreams are the application's servers, host:port. Needed; a fragment does without.
	Upstreams []string
	// UpstreamHTTP2 is for servers that speak HTTP/2 without TLS, as gRPC servers do; otherwise HTTP/1.1.
	UpstreamHTTP2 bool

	Keyward    string // where keyward answers Check: host:port or unix:///path; "": DefaultKeyward
	KeywardTLS *TLS   // nil: without TLS
	// PlaintextKeyward permits a Keyward on another machine without TLS. The keys of all callers are then
	// readable on the way, and whoever reaches that port can try keys.
	PlaintextKeyward bool
	CheckTimeout     time.Duration // how long keyward may take; 0: DefaultCheckTimeout

	CredentialHeaders []string // headers that may carry a key; none: DefaultCredentialHeaders
	// IdentityHeaders are the headers that only keyward may set: Envoy removes what a client sends under
	// these names, or under one that an upstream might take for them. None: DefaultIdentityHeaders.
	IdentityHeaders []string
	CheckHeaders    []string // headers that keyward is sent besides those that it always needs

	ClientAddress ClientAddress // "": ClientPeer
	TrustedHops   int           // trusted proxies in front of Envoy that append to x-forwarded-for
	CORSPreflight bool          // keyward lets CORS preflights pass, and so must see what makes one
	// InternalCIDRs are the networks whose clients may steer Envoy by x-envoy-* headers. None: nobody may.
	InternalCIDRs []netip.Prefix
	// TokenClaims tells keyward what Envoy's jwt_authn filter, which has to stand before it, knows of a caller.
	TokenClaims bool

	// Bodies are the requests whose bodies keyward looks at: Envoy sends it no other. MaxRequestBytes is how much
	// of one it sends at most; 0: DefaultMaxRequestBytes.
	Bodies          []Body
	MaxRequestBytes int

	// Feedback is how Envoy says that requests ended; "": FeedbackALS. RenewEvery is how often it says that
	// one still runs, as keyward's own configuration has it; 0: DefaultRenewEvery.
	Feedback   Feedback
	RenewEvery time.Duration
	// Usage has Envoy tell keyward how each request of a known key went: its status, bytes and duration.
	Usage bool

	StatPrefix string // of Envoy's statistics about Check; "": DefaultStatPrefix

	RequestTimeout  time.Duration // for a client to send its request; 0: DefaultRequestTimeout, negative: none
	ResponseTimeout time.Duration // for the upstream's whole answer; 0: DefaultResponseTimeout, negative: none
	IdleTimeout     time.Duration // without a byte in either direction; 0: DefaultIdleTimeout, negative: none

	// AccessLog writes a line of JSON to stdout for each request, without its query, which may hold a key.
	AccessLog bool
}

// TLS is how Envoy reaches keyward by TLS. Paths are files on Envoy's machine.
type TLS struct {
	CAFile   string // who signs keyward's certificate
	CertFile string // Envoy's own certificate and key; "": none
	KeyFile  string
	// ServerName must be in keyward's certificate: a DNS name or an IP address. "": the host of Keyward.
	ServerName string
}

// withDefaults fills in what was left out, and brings names to lower case. It does not touch what the
// caller's slices hold.
func (c Config) withDefaults() Config {
	c.Listen = cmp.Or(c.Listen, DefaultListen)
	c.Keyward = cmp.Or(c.Keyward, DefaultKeyward)
	c.ClientAddress = cmp.Or(c.ClientAddress, ClientPeer)
	c.StatPrefix = cmp.Or(c.StatPrefix, DefaultStatPrefix)
	c.CheckTimeout = cmp.Or(c.CheckTimeout, DefaultCheckTimeout)
	c.RequestTimeout = cmp.Or(c.RequestTimeout, DefaultRequestTimeout)
	c.ResponseTimeout = cmp.Or(c.ResponseTimeout, DefaultResponseTimeout)
	c.IdleTimeout = cmp.Or(c.IdleTimeout, DefaultIdleTimeout)
	c.MaxRequestBytes = cmp.Or(c.MaxRequestBytes, DefaultMaxRequestBytes)
	c.Feedback = cmp.Or(c.Feedback, FeedbackALS)
	c.RenewEvery = cmp.Or(c.RenewEvery, DefaultRenewEvery)
	if len(c.CredentialHeaders) == 0 {
		c.CredentialHeaders = DefaultCredentialHeaders()
	}
	if len(c.IdentityHeaders) == 0 {
		c.IdentityHeaders = DefaultIdentityHeaders()
	}
	for _, names := range []*[]string{&c.CredentialHeaders, &c.IdentityHeaders, &c.CheckHeaders} {
		lower := make([]string, len(*names))
		for i, name := range *names {
			lower[i] = strings.ToLower(name)
		}
		*names = lower
	}
	if c.KeywardTLS != nil && c.KeywardTLS.ServerName == "" && !strings.HasPrefix(c.Keyward, unixScheme) {
		tls := *c.KeywardTLS
		tls.ServerName, _, _ = net.SplitHostPort(c.Keyward)
		c.KeywardTLS = &tls
	}
	return c
}

// validate reports everything that is contradictory or unsafe in a Config that has its defaults.
func (c Config) validate(fragment bool) error {
	var errs []error
	bad := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
	}

	listen, err := netip.ParseAddrPort(c.Listen)
	if err != nil || listen.Addr().Zone() != "" {
		bad("listen", "%q is not an IP address and a port such as %s", c.Listen, DefaultListen)
	}
	if c.Admin != "" {
		switch admin, err := netip.ParseAddrPort(c.Admin); {
		case err != nil:
			bad("admin", "%q is not an IP address and a port such as 127.0.0.1:9901", c.Admin)
		case !admin.Addr().IsLoopback():
			bad("admin", "%s is not on loopback: whoever reaches it can read and stop everything", c.Admin)
		case admin == listen && admin.Port() != 0:
			bad("admin", "%s is the address of listen too", c.Admin)
		}
	}

	if len(c.Upstreams) == 0 && !fragment {
		bad("upstreams", "at least one host:port is needed")
	}
	for _, u := range c.Upstreams {
		if err := checkHostPort(u); err != nil {
			bad("upstreams", "%v", err)
		} else if sameAddress(u, listen) {
			bad("upstreams", "%s is the address of listen: Envoy would call itself", u)
		}
	}
	c.validateKeyward(listen, bad)
	c.validateHeaders(bad)

	switch c.ClientAddress {
	case ClientPeer:
		if c.TrustedHops != 0 {
			bad("trustedHops", "%d, but clientAddress %q looks at no proxy in front: use %q or %q", c.TrustedHops, ClientPeer, ClientEnvoyExternal, ClientForwardedFor)
		}
	case ClientEnvoyExternal, ClientForwardedFor:
	default:
		bad("clientAddress", "%q is none of %q, %q, %q", c.ClientAddress, ClientPeer, ClientEnvoyExternal, ClientForwardedFor)
	}
	if !slices.Contains(Feedbacks(), c.Feedback) {
		bad("feedback", "%q is none of als, alsBatched, otlp, otlpBatched, none", c.Feedback)
	}
	if c.MaxRequestBytes < 1 || c.MaxRequestBytes > 1<<20 {
		bad("maxRequestBytes", "%d is not from 1 to 1048576", c.MaxRequestBytes)
	}
	if c.RenewEvery < time.Millisecond {
		bad("renewEvery", "%v is not a duration of at least 1ms", c.RenewEvery)
	}
	if c.TrustedHops < 0 || c.TrustedHops > 32 {
		bad("trustedHops", "%d is not from 0 to 32", c.TrustedHops)
	}
	for _, p := range c.InternalCIDRs {
		if !p.IsValid() || p.Bits() == 0 {
			bad("internalCIDRs", "%v would let every client steer Envoy by x-envoy-* headers", p)
		}
	}
	if !regexp.MustCompile(`^[a-z][a-z0-9_]*$`).MatchString(c.StatPrefix) {
		bad("statPrefix", "%q is not of lower-case letters, digits and _, a letter first", c.StatPrefix)
	}
	return errors.Join(errs...)
}

func (c Config) validateKeyward(listen netip.AddrPort, bad func(field, format string, args ...any)) {
	if socket, ok := strings.CutPrefix(c.Keyward, unixScheme); ok {
		if !path.IsAbs(socket) || len(socket) > 107 { // what a Unix address has room for
			bad("keyward", "%q is not unix:// and an absolute path of at most 107 bytes", c.Keyward)
		}
	} else if err := checkHostPort(c.Keyward); err != nil {
		bad("keyward", "%v; or unix:///path for a Unix socket", err)
	} else if sameAddress(c.Keyward, listen) {
		bad("keyward", "%s is the address of listen: Envoy would ask itself", c.Keyward)
	} else if c.KeywardTLS == nil && !isLoopback(c.Keyward) && !c.PlaintextKeyward {
		bad("keyward", "%s is not on this machine: use keywardTLS, or set plaintextKeyward if the network may see all keys", c.Keyward)
	}
	switch tls := c.KeywardTLS; {
	case tls == nil:
	case c.PlaintextKeyward:
		bad("plaintextKeyward", "contradicts keywardTLS")
	default:
		if tls.CAFile == "" {
			bad("keywardTLS.caFile", "is needed: without it anyone could pose as keyward")
		}
		if (tls.CertFile == "") != (tls.KeyFile == "") {
			bad("keywardTLS.certFile", "certFile and keyFile go together")
		}
		if tls.ServerName == "" {
			bad("keywardTLS.serverName", "is needed with a Unix socket")
		} else if !validHost(tls.ServerName) {
			bad("keywardTLS.serverName", "%q is neither a DNS name nor an IP address", tls.ServerName)
		}
	}
	if c.CheckTimeout < time.Millisecond {
		bad("checkTimeout", "%v is not a duration of at least 1ms", c.CheckTimeout)
	}
}

func (c Config) validateHeaders(bad func(field, format string, args ...any)) {
	check := func(field string, names []string, unfit func(name string) bool) {
		for _, name := range names {
			switch {
			case !headerName.MatchString(name) || cost([]string{name}) > maxCost:
				bad(field, "%q is not a header name of letters, digits and single hyphens, not too long", name)
			case unfit(name):
				bad(field, "%s has a meaning of its own and cannot be taken away from clients", name)
			case field != "identityHeaders" && slices.Contains(c.IdentityHeaders, name):
				bad(field, "%s is in identityHeaders too, and so is removed from every request", name)
			}
		}
	}
	check("credentialHeaders", c.CredentialHeaders, Reserved)
	check("identityHeaders", c.IdentityHeaders, func(name string) bool { return Reserved(name) || name == "authorization" })
	check("checkHeaders", c.CheckHeaders, func(string) bool { return false })
	if n := namespaces(slices.Concat(c.CredentialHeaders, c.IdentityHeaders)); cost(n) > maxCost {
		bad("identityHeaders", "these and credentialHeaders begin in %d ways, too many for Envoy: let them begin alike, as x-keyward-user and x-keyward-agent do", len(n))
	}
}

func checkHostPort(s string) error {
	host, port, err := net.SplitHostPort(s)
	if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || n == 0 || !validHost(host) {
		return fmt.Errorf("%q is not host:port", s)
	}
	return nil
}

var dnsName = regexp.MustCompile(`^[a-zA-Z0-9_]([a-zA-Z0-9_-]*[a-zA-Z0-9])?(\.[a-zA-Z0-9_]([a-zA-Z0-9_-]*[a-zA-Z0-9])?)*\.?$`)

func validHost(host string) bool {
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.Zone() == "" && !addr.IsUnspecified()
	}
	return len(host) <= 253 && dnsName.MatchString(host)
}

// isLoopback takes localhost for this machine: RFC 6761 promises it.
func isLoopback(hostPort string) bool {
	host, _, _ := net.SplitHostPort(hostPort)
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback() || strings.EqualFold(host, "localhost")
}

// sameAddress reports whether a connection to hostPort would reach the listener.
func sameAddress(hostPort string, listen netip.AddrPort) bool {
	host, port, _ := net.SplitHostPort(hostPort)
	if port != strconv.Itoa(int(listen.Port())) {
		return false
	}
	if isLoopback(hostPort) && (listen.Addr().IsUnspecified() || listen.Addr().Unmap().IsLoopback()) {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap() == listen.Addr().Unmap()
}
