package authz

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// A Request is what a decision needs to know of an HTTP request. Its strings may borrow from the
// adapter's buffers until the answer is written. It carries secrets, so it does not print.
//
// Requests can be used again: Reset keeps their buffers.
type Request struct {
	Method, Host string
	Path         string // with its query, as it came over the wire
	Peer         string // address of the connection's other end, without port
	// At is when the request was asked about; zero: when it is decided.
	At time.Time
	// Identity and HTTP name the request for its lease, Connection the one by which it was asked about;
	// see package limits.
	Identity   limits.Identity
	HTTP       uint64
	Connection uint64
	// Headers are those that Authorizer.HeaderNames names, in lower case, each occurrence by itself or
	// several joined by commas, in their order.
	Headers []Pair
	// Extensions are what the route's configuration in Envoy says about the request: those that
	// Authorizer.ExtensionNames names.
	Extensions []Pair
	// Claims are of a token that Envoy has verified: those that Authorizer.ClaimNames names and that are text.
	Claims []Pair
	// Body is the request's body, if Authorizer.WantsBody. BodySent says that it is, empty or not; BodyCut that
	// it is longer.
	Body              []byte
	BodySent, BodyCut bool
	// Framed says that the protocol has frames, as HTTP/2 does: no header has to announce a body.
	Framed bool

	// What a decision needs room for while it is made.
	match     match
	scratch   []byte
	digests   [2]apikey.Digest // under the current pepper and the previous one
	rates     [2]limits.RateDemand
	quotas    []limits.QuotaDemand
	inForce   []*apikey.Quota // of quotas
	upn       []byte          // of the caller, once somebody needed it
	userID    []byte          // the same
	standings []Standing
	demand    limits.Demand
	explain   *Explanation // nil: the request is real
}

// A Pair is a name and a value.
type Pair struct{ Name, Value string }

// Reset empties the request for another use.
func (r *Request) Reset() {
	if cap(r.Headers)+cap(r.Extensions)+cap(r.Claims) > keepPairs || cap(r.scratch) > keepScratch || cap(r.quotas) > keepQuotas {
		*r = Request{} // one large request should not make every later one large
		return
	}
	clear(r.Headers)
	clear(r.Extensions)
	clear(r.Claims)
	clear(r.scratch)
	clear(r.inForce)
	clear(r.standings)
	clear(r.upn)
	clear(r.userID)
	*r = Request{
		Headers: r.Headers[:0], Extensions: r.Extensions[:0], Claims: r.Claims[:0], scratch: r.scratch[:0],
		quotas: r.quotas[:0], inForce: r.inForce[:0], standings: r.standings[:0],
		upn: r.upn[:0], userID: r.userID[:0],
	}
}

const (
	keepPairs   = 128
	keepScratch = 4 << 10 // bytes
	keepQuotas  = 64
)

// Format shows nothing that could be a secret.
func (r *Request) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[request]") }

// header returns the one value of a header without the white space around it. n counts occurrences.
func (r *Request) header(name string) (value string, n int) {
	for _, h := range r.Headers {
		if h.Name == name {
			value = trimSpace(h.Value)
			n++
		}
	}
	return value, n
}

// member returns the text of one member of the body. ok is false if the body cannot be read, or only the
// beginning of it: what is not there could name another.
func (r *Request) member(name string) (value string, present, ok bool) {
	switch {
	case r.BodyCut:
		return "", false, false
	case len(r.Body) > 0 && r.encoded():
		return "", false, false // compressed text can be JSON by itself, and other JSON to whoever decodes it
	case len(r.Body) > 0:
		return bodyMember(r.Body, name)
	case r.BodySent:
		return "", false, true
	}
	// Envoy sends none where there is none, and where it was not told to.
	length, n := r.header("content-length")
	_, chunked := r.header("transfer-encoding")
	if n == 0 && chunked == 0 {
		return "", false, !r.Framed || !usuallyHasBody(r.Method) // with frames, nobody knows
	}
	return "", false, chunked == 0 && length == "0"
}

// encoded reports whether the body is something else before it is decoded.
func (r *Request) encoded() bool {
	value, n := r.header("content-encoding")
	return n > 1 || n == 1 && !strings.EqualFold(trimSpace(value), "identity")
}

// usuallyHasBody reports whether a method is one whose requests without a body say so, in any protocol.
func usuallyHasBody(method string) bool {
	return method == http.MethodPost || method == http.MethodPut || method == http.MethodPatch
}

// trimSpace trims what HTTP calls optional white space.
func trimSpace(s string) string { return strings.Trim(s, " \t") }

// ClientAddress says which address counts as the client's.
type ClientAddress string

// Where a client's address is read. Anything but the peer is only as good as the proxies before us.
const (
	ClientPeer     ClientAddress = "peer"                     // the connection's other end
	ClientExternal ClientAddress = "x-envoy-external-address" // set by an Envoy edge
	ClientXFF      ClientAddress = "xff"                      // x-forwarded-for, past the trusted hops
)

// clientAddr returns the client's address, unmapped and without zone. Where the configured source says
// nothing that can be trusted it is the peer's; the zero Addr if that is no IP address either.
func (r *Request) clientAddr(from ClientAddress, trustedHops int) netip.Addr {
	switch from {
	case ClientExternal:
		if v, n := r.header("x-envoy-external-address"); n == 1 {
			if a, err := netip.ParseAddr(v); err == nil {
				return plainAddr(a)
			}
		}
	case ClientXFF:
		if a, ok := r.forwardedFor(trustedHops); ok {
			return a
		}
	}
	a, err := netip.ParseAddr(r.Peer)
	if err != nil {
		return netip.Addr{}
	}
	return plainAddr(a)
}

// forwardedFor reads the address that stands trustedHops before the end of all X-Forwarded-For
// values: Envoy appended the last one itself, every trusted proxy before it one more. What stands
// further left is the client's own word.
func (r *Request) forwardedFor(trustedHops int) (netip.Addr, bool) {
	for i := len(r.Headers) - 1; i >= 0; i-- {
		if r.Headers[i].Name != "x-forwarded-for" {
			continue
		}
		for rest := r.Headers[i].Value; rest != ""; {
			at := strings.LastIndexByte(rest, ',')
			last := trimSpace(rest[at+1:])
			if trustedHops == 0 {
				a, err := netip.ParseAddr(last)
				return plainAddr(a), err == nil
			}
			trustedHops--
			rest = rest[:max(at, 0)]
		}
	}
	return netip.Addr{}, false
}

func plainAddr(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }
