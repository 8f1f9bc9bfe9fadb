package admin

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"hash"
	"time"

	"keyward/authz/apikey"
)

// The audit is a chain: the link of an event is SHA-256 over its content and the link before it. Links
// are plain hashes, so that anybody can follow an exported chain and hold it against an exported head
// without being told a secret. What plain hashes do not stop, whoever can write the database making the
// chain anew from some event on, the segments stop: each has a MAC over its place and its last link under
// a key derived from the pepper, which is not in the database. The open segment's is made anew with every
// event, so events cannot be cut off at the end either: the row that would have to say so is gone.
//
// What is left: a whole older copy of the database put in the place of a newer one proves itself. Only a
// head that was exported finds that, so export it now and then to where the database's owner cannot write.
//
// A segment that is full, or a day old, is sealed and the next one begins. The events of sealed segments
// can be removed when they are old; the segment stays and goes on linking what is before and after it.

// A Link is what an audit event leaves to the next.
type Link [sha256.Size]byte

func (l Link) String() string { return hex.EncodeToString(l[:]) }

// MarshalText writes hexadecimal digits.
func (l Link) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (l *Link) UnmarshalText(text []byte) error {
	b, err := hex.DecodeString(string(text))
	if err != nil || len(b) != len(l) {
		return errors.New("must be 64 hexadecimal digits")
	}
	*l = Link(b)
	return nil
}

// LinkAfter returns the link of e after another. Every field counts, each with its length, and the time
// to the microsecond, as stores keep it.
func (e *Event) LinkAfter(before Link) Link {
	h := sha256.New()
	writeText(h, "keyward audit event 1")
	h.Write(before[:])
	writeNumber(h, e.Sequence)
	writeNumber(h, e.At.UnixMicro())
	for _, s := range []string{e.Actor, e.RemoteAddr, e.Action, e.Refused, e.InstanceID, e.Target, e.RequestID} {
		writeText(h, s)
	}
	for _, side := range []json.RawMessage{e.Before, e.After} {
		if side == nil {
			writeNumber(h, -1) // which no length is
			continue
		}
		writeText(h, string(side))
	}
	return Link(h.Sum(nil))
}

func writeNumber(h hash.Hash, n int64) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(n))
	h.Write(b[:]) // a hash never fails
}

func writeText(h hash.Hash, s string) {
	writeNumber(h, int64(len(s)))
	h.Write([]byte(s))
}

// An AuditSegment is a stretch of the audit. The newest one is open, all others are sealed.
type AuditSegment struct {
	Number int64 // from 1
	First  int64 // sequence number of its first event
	Last   int64 // and of its last
	// Previous is the link before its first event, zero for the first of all; Head is that of its last.
	Previous, Head Link
	BeganAt        time.Time // when its first event was written
	SealedAt       time.Time // zero: it is open
	RemovedAt      time.Time // when its events were removed; zero: they are there
	PepperVersion  uint32    // of the key of MAC; 0: there was none
	MAC            [sha256.Size]byte
}

const (
	segmentEvents = 10_000
	segmentAge    = 24 * time.Hour
)

func (s *AuditSegment) full(at time.Time) bool {
	return s.Last-s.First+1 >= segmentEvents || at.Sub(s.BeganAt) >= segmentAge
}

// AuditKeys make and check the MACs of segments. The zero value makes none. Safe for concurrent use.
type AuditKeys struct{ peppers apikey.Peppers }

// NewAuditKeys derives the keys from the peppers.
func NewAuditKeys(p apikey.Peppers) AuditKeys { return AuditKeys{p} }

// Sign gives a segment its MAC.
func (k AuditKeys) Sign(s *AuditSegment) {
	if p := k.peppers.Current; p != nil {
		s.PepperVersion = p.Version()
		s.MAC = s.mac(p)
	}
}

// Good reports whether the MAC of a segment is right.
func (k AuditKeys) Good(s *AuditSegment) bool {
	if k.peppers.Current == nil && s.PepperVersion == 0 {
		return true // a store without keys
	}
	p := k.peppers.ByVersion(s.PepperVersion)
	if p == nil {
		return false
	}
	want := s.mac(p)
	return hmac.Equal(s.MAC[:], want[:])
}

// Outdated reports whether the MAC of a segment is right and of an earlier pepper.
func (k AuditKeys) Outdated(s *AuditSegment) bool {
	return k.peppers.Current != nil && s.PepperVersion != k.peppers.Current.Version() && k.Good(s)
}

func (s *AuditSegment) mac(p *apikey.Pepper) [sha256.Size]byte {
	key := p.Derive("audit segment")
	h := hmac.New(sha256.New, key[:])
	for _, n := range []int64{
		s.Number, s.First, s.Last, s.BeganAt.UnixMicro(), s.SealedAt.UnixMicro(), s.RemovedAt.UnixMicro(), int64(s.PepperVersion),
	} {
		writeNumber(h, n)
	}
	h.Write(s.Previous[:])
	h.Write(s.Head[:])
	return [sha256.Size]byte(h.Sum(nil))
}

// Extend puts e at the end of the chain: it gives e its sequence number and its link, and returns the
// segments as they are then, to be written with it. open is the newest segment, nil if there is none;
// newest is the greatest sequence number of any event. A store calls it in the transaction of the event.
//
// A segment whose MAC is wrong is not extended, since that would give it a good one. It stays as it is,
// for [VerifyAudit] to find, and the next one begins.
func (k AuditKeys) Extend(open *AuditSegment, newest int64, e *Event) []AuditSegment {
	var changed []AuditSegment
	var next AuditSegment
	switch {
	case open == nil:
		next = AuditSegment{Number: 1, First: newest + 1, BeganAt: e.At}
	case !k.Good(open) || !open.SealedAt.IsZero():
		next = AuditSegment{Number: open.Number + 1, First: max(open.Last, newest) + 1, BeganAt: e.At, Previous: open.Head, Head: open.Head}
	case open.full(e.At):
		sealed := *open
		sealed.SealedAt = e.At
		k.Sign(&sealed)
		changed = append(changed, sealed)
		next = AuditSegment{Number: open.Number + 1, First: open.Last + 1, BeganAt: e.At, Previous: open.Head, Head: open.Head}
	default:
		next = *open
	}
	e.Sequence = max(next.Last+1, next.First)
	e.Link = e.LinkAfter(next.Head)
	next.Last, next.Head = e.Sequence, e.Link
	k.Sign(&next)
	return append(changed, next)
}

// Begin chains the events of a store from before there was a chain, called for each in their order, and
// returns the segment after the last. It is sealed by the first event that Extend puts after it.
func (s *AuditSegment) Begin(e *Event) {
	if s.Number == 0 {
		*s = AuditSegment{Number: 1, First: e.Sequence, BeganAt: e.At}
	}
	e.Link = e.LinkAfter(s.Head)
	s.Last, s.Head = e.Sequence, e.Link
}
