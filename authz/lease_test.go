package authz

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"hash/fnv"
	"math"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"keyward/authz/apikey"
	"keyward/limits"
)

var requestStart = time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC)

func someLease() limits.Lease {
	return limits.Lease{
		Cell:     LeaseCell(apikey.ID{1, 2, 3, 15: 4}),
		Identity: NewIdentity("203.0.113.9", 4711, requestStart),
		HTTP:     12345678901234567890,
	}
}

func drawLease(t *rapid.T) limits.Lease {
	l := limits.Lease{
		Cell:     LeaseCell(apikey.ID(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "key"))),
		Identity: limits.Identity{Start: rapid.Int64().Draw(t, "start")},
		HTTP:     rapid.Uint64().Draw(t, "http.id"),
	}
	if rapid.Bool().Draw(t, "with address") {
		l.Identity.Peer = [16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "peer"))
		l.Identity.Port = rapid.Uint16().Draw(t, "port")
	}
	return l
}

// TestLeaseIDLayout spells an id out by other means than the code's: ids outlive the process that made
// them, so a change of layout loses the leases of whoever upgrades.
func TestLeaseIDLayout(t *testing.T) {
	pepper := apikey.NewPepper(0x01020304, false)
	l := someLease()
	key := pepper.Derive("lease")
	covered := netip.MustParseAddr("::ffff:203.0.113.9").AsSlice()
	covered = binary.BigEndian.AppendUint16(covered, 4711)
	covered = binary.BigEndian.AppendUint64(covered, uint64(requestStart.UnixMicro()))
	covered = binary.BigEndian.AppendUint64(covered, l.HTTP)
	covered = append(covered, l.Cell.Owner[:]...)
	mac := hmac.New(sha256.New, key[:])
	mac.Write(covered)
	raw := append([]byte{1, 2, 3, 4}, l.Cell.Owner[:]...)
	raw = binary.BigEndian.AppendUint64(raw, l.HTTP)
	raw = append(raw, mac.Sum(nil)[:16]...)

	got := string(NewLeaseIDs(apikey.Peppers{Current: pepper}).Append([]byte("lease: "), l))
	if want := "lease: " + base64.RawURLEncoding.EncodeToString(raw); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestLeaseIDsOpenForTheirRequestOnly(t *testing.T) {
	ids := NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(1, false)})
	rapid.Check(t, func(t *rapid.T) {
		l := drawLease(t)
		id := string(ids.Append(nil, l))
		if len(id) != LeaseIDSize {
			t.Fatalf("%d characters, want %d", len(id), LeaseIDSize)
		}
		if got, err := ids.Open(id, l.Identity); err != nil || got != l {
			t.Fatalf("got %+v, %v, want %+v", got, err, l)
		}
		other := l.Identity
		switch rapid.IntRange(0, 2).Draw(t, "what differs") {
		case 0:
			other.Peer[rapid.IntRange(0, 15).Draw(t, "byte")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		case 1:
			other.Port ^= 1 << rapid.IntRange(0, 15).Draw(t, "bit")
		case 2:
			other.Start ^= 1 << rapid.IntRange(0, 63).Draw(t, "bit")
		}
		if _, err := ids.Open(id, other); !errors.Is(err, ErrLeaseForged) {
			t.Fatalf("another request's: got %v, want %v", err, ErrLeaseForged)
		}
	})
}

func TestNoBitOfALeaseIDIsFree(t *testing.T) {
	ids := NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(1, false)})
	l := someLease()
	id := ids.Append(nil, l)
	raw, err := base64.RawURLEncoding.DecodeString(string(id))
	if err != nil {
		t.Fatal(err)
	}
	for bit := range len(raw) * 8 {
		raw[bit/8] ^= 1 << (bit % 8)
		want := ErrLeaseForged
		if bit < 32 {
			want = ErrLeaseVersion
		}
		if got, err := ids.Open(base64.RawURLEncoding.EncodeToString(raw), l.Identity); !errors.Is(err, want) || got != (limits.Lease{}) {
			t.Errorf("bit %d: got %+v, %v, want %v", bit, got, err, want)
		}
		raw[bit/8] ^= 1 << (bit % 8)
	}
}

func TestLeaseIDShapes(t *testing.T) {
	ids := NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(1, false)})
	l := someLease()
	id := string(ids.Append(nil, l))
	// The last character carries 4 bits; its last two must be 0.
	alphabet := "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, id[len(id)-1])
	for name, bad := range map[string]string{
		"empty":              "",
		"short":              id[:len(id)-1],
		"long":               id + "A",
		"padded":             id + "=",
		"padding inside":     id[:len(id)-1] + "=",
		"other alphabet":     "+/" + id[2:],
		"line break":         id[:20] + "\n" + id[21:],
		"line break at last": id[:len(id)-1] + "\r",
		"stray bits":         id[:len(id)-1] + alphabet[last+1:last+2],
		"not ASCII":          "é" + id[2:],
		"NUL":                id[:len(id)-1] + "\x00",
		"huge":               strings.Repeat(id, 1000),
	} {
		if got, err := ids.Open(bad, l.Identity); !errors.Is(err, ErrLeaseShape) || got != (limits.Lease{}) {
			t.Errorf("%s: got %+v, %v, want %v", name, got, err, ErrLeaseShape)
		}
	}
}

// fuzzPepper is always the same one, so that a corpus can hold ids that open.
const fuzzPepper = "keyward pepper\n\nversion: 7\nkey: AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"

// FuzzOpenLease: only what Append made opens, for its own request, and no bit of it is free. id is any
// text; the rest is a lease and one bit of its id's text.
func FuzzOpenLease(f *testing.F) {
	pepper, err := apikey.ParsePepper([]byte(fuzzPepper))
	if err != nil {
		f.Fatal(err)
	}
	ids := NewLeaseIDs(apikey.Peppers{Current: pepper})
	l := someLease()
	f.Add(string(ids.Append(nil, l)), l.Cell.Owner[:], l.HTTP, l.Identity.Port, l.Identity.Start, uint16(0))
	f.Add("", []byte{}, uint64(0), uint16(0), int64(0), uint16(LeaseIDSize*8-1))
	f.Add(strings.Repeat("A", LeaseIDSize), []byte{0xff}, uint64(math.MaxUint64), uint16(math.MaxUint16), int64(math.MinInt64), uint16(77))
	f.Add(strings.Repeat("\n", LeaseIDSize), []byte{1}, uint64(1), uint16(1), int64(1), uint16(8*58))
	f.Fuzz(func(t *testing.T, id string, key []byte, http uint64, port uint16, start int64, bit uint16) {
		l := limits.Lease{Identity: limits.Identity{Peer: netip.MustParseAddr("203.0.113.9").As16(), Port: port, Start: start}, HTTP: http}
		copy(l.Cell.Owner[:], key)
		l.Cell = LeaseCell(l.Cell.Owner)
		made := ids.Append(nil, l)
		if got, err := ids.Open(string(made), l.Identity); err != nil || got != l {
			t.Fatalf("its own id: got %+v, %v, want %+v", got, err, l)
		}
		other := l.Identity
		other.Start ^= 1
		wantShut(t, ids, string(made), other)

		i := int(bit) % (len(made) * 8)
		made[i/8] ^= 1 << (i % 8)
		wantShut(t, ids, string(made), l.Identity)

		// What opens is the one spelling of what it opens as.
		if got, err := ids.Open(id, l.Identity); err != nil {
			wantShut(t, ids, id, l.Identity)
		} else if back := string(ids.Append(nil, got)); back != id || got.Identity != l.Identity {
			t.Fatalf("%q opened as %+v, whose id is %q", id, got, back)
		}
	})
}

// wantShut fails unless an id is refused by a known error, without any lease.
func wantShut(t *testing.T, ids *LeaseIDs, id string, identity limits.Identity) {
	t.Helper()
	got, err := ids.Open(id, identity)
	if got != (limits.Lease{}) || !errors.Is(err, ErrLeaseShape) && !errors.Is(err, ErrLeaseForged) && !errors.Is(err, ErrLeaseVersion) {
		t.Fatalf("%q: got %+v, %v, want it refused", id, got, err)
	}
}

func TestLeasesOutliveAPepperRotation(t *testing.T) {
	one, two, three := apikey.NewPepper(1, false), apikey.NewPepper(2, false), apikey.NewPepper(3, false)
	before := NewLeaseIDs(apikey.Peppers{Current: one})
	during := NewLeaseIDs(apikey.Peppers{Current: two, Previous: one})
	after := NewLeaseIDs(apikey.Peppers{Current: two})
	l := someLease()
	old, current := string(before.Append(nil, l)), string(during.Append(nil, l))
	for name, tt := range map[string]struct {
		ids  *LeaseIDs
		id   string
		want error
	}{
		"old before":             {before, old, nil},
		"old during":             {during, old, nil},
		"old after":              {after, old, ErrLeaseVersion},
		"new during":             {during, current, nil},
		"new after":              {after, current, nil},
		"new before":             {before, current, ErrLeaseVersion},
		"same version, other":    {NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(2, false)}), current, ErrLeaseForged},
		"neither of two peppers": {NewLeaseIDs(apikey.Peppers{Current: three, Previous: two}), old, ErrLeaseVersion},
	} {
		got, err := tt.ids.Open(tt.id, l.Identity)
		if !errors.Is(err, tt.want) || tt.want == nil && got != l {
			t.Errorf("%s: got %+v, %v, want %v", name, got, err, tt.want)
		}
	}
}

func TestLeaseIDsConcurrently(t *testing.T) {
	ids := NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(1, false)})
	var all sync.WaitGroup
	for worker := range 8 {
		all.Go(func() {
			l := someLease()
			var id []byte
			for n := range 1000 {
				l.HTTP = uint64(worker*1000 + n)
				id = ids.Append(id[:0], l)
				if got, err := ids.Open(string(id), l.Identity); err != nil || got != l {
					t.Errorf("got %+v, %v, want %+v", got, err, l)
					return
				}
			}
		})
	}
	all.Wait()
}

func TestLeaseIDsDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector empties pools; run without -race")
	}
	ids := NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(1, false)})
	l := someLease()
	id := string(ids.Append(nil, l))
	room := make([]byte, 0, LeaseIDSize)
	if allocs := testing.AllocsPerRun(1000, func() { ids.Append(room, l) }); allocs != 0 {
		t.Errorf("Append: %v allocations, want 0", allocs)
	}
	if allocs := testing.AllocsPerRun(1000, func() { _, _ = ids.Open(id, l.Identity) }); allocs != 0 {
		t.Errorf("Open: %v allocations, want 0", allocs)
	}
}

func TestNewIdentity(t *testing.T) {
	v4 := limits.Identity{Peer: netip.MustParseAddr("203.0.113.9").As16(), Port: 4711, Start: requestStart.UnixMicro()}
	v6 := v4
	v6.Peer = netip.MustParseAddr("2001:db8::1").As16()
	local := v4
	local.Peer = netip.MustParseAddr("fe80::1").As16()
	nameless := limits.Identity{Start: v4.Start}
	for _, tt := range []struct {
		name    string
		address string
		port    uint32
		start   time.Time
		want    limits.Identity
	}{
		{"IPv4", "203.0.113.9", 4711, requestStart, v4},
		{"IPv4 mapped", "::ffff:203.0.113.9", 4711, requestStart, v4},
		{"IPv4 mapped, in hex", "::FFFF:cb00:7109", 4711, requestStart, v4},
		{"IPv6", "2001:db8::1", 4711, requestStart, v6},
		{"IPv6 spelt out", "2001:0DB8:0:0:0:0:0:1", 4711, requestStart, v6},
		{"with a zone", "fe80::1%eth0", 4711, requestStart, local},
		{"without the zone", "fe80::1", 4711, requestStart, local},
		{"nanoseconds do not count", "203.0.113.9", 4711, requestStart.Add(999), v4},
		{"nor does the zone of the clock", "203.0.113.9", 4711, requestStart.In(time.FixedZone("", 3600)), v4},
		{"a socket's path", "/run/app.sock", 0, requestStart, nameless},
		{"no address", "", 0, requestStart, nameless},
		{"no address but a port", "", 4711, requestStart, nameless},
		{"no port", "203.0.113.9", 0, requestStart, nameless},
		{"a port too large", "203.0.113.9", 1<<16 + 4711, requestStart, nameless},
		{"a name", "localhost", 4711, requestStart, nameless},
		{"no start", "203.0.113.9", 4711, time.Time{}, limits.Identity{}},
		{"no start in protobuf", "203.0.113.9", 4711, time.Unix(0, 0), limits.Identity{}},
		{"before all", "203.0.113.9", 4711, time.Unix(math.MinInt64>>21, 0), limits.Identity{}},
	} {
		if got := NewIdentity(tt.address, tt.port, tt.start); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
	if nameless.IsZero() != true || v4.IsZero() {
		t.Error("an identity without address must name nothing, one with an address something")
	}
}

func TestHTTPID(t *testing.T) {
	hashed := func(s string) uint64 {
		h := fnv.New64a()
		h.Write([]byte(s))
		return h.Sum64()
	}
	for id, want := range map[string]uint64{
		"0":                                    0,
		"7":                                    7,
		"18446744073709551615":                 math.MaxUint64,
		"18446744073709551616":                 hashed("18446744073709551616"),
		"-1":                                   hashed("-1"),
		"a3f0":                                 hashed("a3f0"),
		"":                                     hashed(""),
		"2d3f1f6e-6d2f-9b8e-a3f5-0c0c07398f00": hashed("2d3f1f6e-6d2f-9b8e-a3f5-0c0c07398f00"),
	} {
		if got := HTTPID(id); got != want {
			t.Errorf("%q: got %d, want %d", id, got, want)
		}
	}
}

func BenchmarkLeaseIDs(b *testing.B) {
	ids := NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(1, false)})
	l := someLease()
	id := string(ids.Append(nil, l))
	room := make([]byte, 0, LeaseIDSize)
	b.Run("append", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			ids.Append(room, l)
		}
	})
	b.Run("open", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = ids.Open(id, l.Identity)
		}
	})
}
