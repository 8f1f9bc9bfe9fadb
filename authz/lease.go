package authz

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"hash"
	"hash/fnv"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// Errors of LeaseIDs.Open. None of them is a fault of ours: an id comes back from a log that others write.
var (
	ErrLeaseShape   = errors.New("not a lease id")
	ErrLeaseForged  = errors.New("a lease id for another request, or one that keyward did not make")
	ErrLeaseVersion = errors.New("a lease id of a pepper that is not in use")
)

// A lease id is what Envoy hands back when the request ends:
//
//	pepper version (4 bytes, big endian) ‖ key id (16) ‖ http.id (8) ‖ MAC (16)
//
// in base64url without padding. The MAC also covers the client's address and the start, which are not in
// the id: a log entry has them of its own, so an id says nothing about any other request.
const (
	leaseVersion = 4
	leaseKey     = leaseVersion + 16
	leaseHTTP    = leaseKey + 8
	leaseMAC     = 16
	leaseSize    = leaseHTTP + leaseMAC

	// LeaseIDSize is the length of a lease id's text.
	LeaseIDSize = (leaseSize*8 + 5) / 6
)

// leaseText refuses a last character with stray bits: one lease, one id.
var leaseText = base64.RawURLEncoding.Strict()

// LeaseIDs makes and opens lease ids under keys derived from the peppers. The current pepper's makes
// them; that of the one before still opens them. Safe for concurrent use.
type LeaseIDs struct {
	current  *leaseKeyed
	previous *leaseKeyed // nil outside a rotation
}

// leaseKeyed is one version's key.
type leaseKeyed struct {
	version uint32
	key     [32]byte
	macs    sync.Pool // of *leaseHash
}

// leaseHash is a keyed hash with room for its input and output, so that a MAC allocates nothing.
type leaseHash struct {
	hash hash.Hash
	in   [16 + 2 + 8 + 8 + 16]byte
	sum  [sha256.Size]byte
}

// NewLeaseIDs derives the keys. The peppers are valid together.
func NewLeaseIDs(peppers apikey.Peppers) *LeaseIDs {
	keyed := func(p *apikey.Pepper) *leaseKeyed {
		if p == nil {
			return nil
		}
		return &leaseKeyed{version: p.Version(), key: p.Derive("lease")}
	}
	return &LeaseIDs{current: keyed(peppers.Current), previous: keyed(peppers.Previous)}
}

// Append appends the id of a lease. The same lease has the same id, until the pepper changes.
func (ids *LeaseIDs) Append(dst []byte, l limits.Lease) []byte {
	var raw [leaseSize]byte
	binary.BigEndian.PutUint32(raw[:], ids.current.version)
	copy(raw[leaseVersion:], l.Cell.Owner[:])
	binary.BigEndian.PutUint64(raw[leaseKey:], l.HTTP)
	mac := ids.current.mac(&l)
	copy(raw[leaseHTTP:], mac[:])
	return leaseText.AppendEncode(dst, raw[:])
}

// Open returns the lease of an id that came back with a request of this identity.
// Errors: ErrLeaseShape, ErrLeaseVersion, ErrLeaseForged. The id is not kept.
func (ids *LeaseIDs) Open(id string, identity limits.Identity) (limits.Lease, error) {
	if len(id) != LeaseIDSize {
		return limits.Lease{}, ErrLeaseShape
	}
	var text [LeaseIDSize]byte
	var raw [leaseSize]byte
	copy(text[:], id)
	// The decoder skips line breaks, which leaves it short.
	if n, err := leaseText.Decode(raw[:], text[:]); err != nil || n != leaseSize {
		return limits.Lease{}, ErrLeaseShape
	}
	keyed := ids.byVersion(binary.BigEndian.Uint32(raw[:]))
	if keyed == nil {
		return limits.Lease{}, ErrLeaseVersion
	}
	l := limits.Lease{
		Cell:     LeaseCell(apikey.ID(raw[leaseVersion:leaseKey])),
		Identity: identity,
		HTTP:     binary.BigEndian.Uint64(raw[leaseKey:]),
	}
	mac := keyed.mac(&l)
	if subtle.ConstantTimeCompare(mac[:], raw[leaseHTTP:]) != 1 {
		return limits.Lease{}, ErrLeaseForged
	}
	return l, nil
}

func (ids *LeaseIDs) byVersion(version uint32) *leaseKeyed {
	switch {
	case ids.current.version == version:
		return ids.current
	case ids.previous != nil && ids.previous.version == version:
		return ids.previous
	}
	return nil
}

func (k *leaseKeyed) mac(l *limits.Lease) [leaseMAC]byte {
	m, _ := k.macs.Get().(*leaseHash)
	if m == nil {
		m = &leaseHash{hash: hmac.New(sha256.New, k.key[:])}
		m.hash.Reset() // the state that every later Reset goes back to
	}
	copy(m.in[0:16], l.Identity.Peer[:])
	binary.BigEndian.PutUint16(m.in[16:], l.Identity.Port)
	binary.BigEndian.PutUint64(m.in[18:], uint64(l.Identity.Start))
	binary.BigEndian.PutUint64(m.in[26:], l.HTTP)
	copy(m.in[34:], l.Cell.Owner[:])
	_, _ = m.hash.Write(m.in[:]) // a hash never fails
	mac := [leaseMAC]byte(m.hash.Sum(m.sum[:0]))
	m.hash.Reset()
	k.macs.Put(m)
	return mac
}

// LeaseCell names the state of a key's running requests.
func LeaseCell(keyID apikey.ID) limits.Cell {
	return limits.Cell{Owner: keyID, Class: limits.ClassConcurrency}
}

// NewIdentity makes an identity from what Envoy says of a request, the same from a Check and from a log
// entry: an IPv4 address may be mapped or not, a zone does not matter, the start counts in whole
// microseconds. Without an address and port, as on a Unix socket, it names nothing and keeps the start
// alone; without a start it keeps nothing. The address is not kept.
func NewIdentity(address string, port uint32, start time.Time) limits.Identity {
	addr, err := netip.ParseAddr(address)
	if err != nil || port > 1<<16-1 {
		port = 0
	}
	return IdentityOf(netip.AddrPortFrom(addr, uint16(port)), start)
}

// IdentityOf is NewIdentity for an address that was parsed already.
func IdentityOf(peer netip.AddrPort, start time.Time) limits.Identity {
	micros := start.UnixMicro()
	if micros <= 0 {
		return limits.Identity{}
	}
	if !peer.IsValid() || peer.Port() == 0 {
		return limits.Identity{Start: micros}
	}
	return limits.Identity{Peer: peer.Addr().As16(), Port: peer.Port(), Start: micros}
}

// HTTPID makes a number of Envoy's id of a request. Envoy writes a number in decimal; of anything else
// it is a hash.
func HTTPID(id string) uint64 {
	if n, err := strconv.ParseUint(id, 10, 64); err == nil {
		return n
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(id)) // a hash never fails
	return h.Sum64()
}
