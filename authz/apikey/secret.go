package apikey

import (
	"crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"regexp"
	"unsafe"
)

// A Secret is what a caller sends to prove that it holds a key. It is in clear only in the answer
// that creates it and in the request that carries it.
//
// It cannot leak by accident: every printer, logger and marshaller gets a placeholder or an error,
// == does not compile, and fmt finds only an address even when a Secret hides in an unexported field.
// [Secret.Reveal] is the one way out.
type Secret struct {
	_ [0]func() // not comparable
	p *string   // a pointer, because fmt walks into unexported fields without asking Format
}

// NewSecret wraps a secret that came from outside.
func NewSecret(text string) Secret { return Secret{p: &text} }

// Reveal returns the secret in clear; empty for the zero Secret.
func (s Secret) Reveal() string {
	if s.p == nil {
		return ""
	}
	return *s.p
}

// IsZero reports whether there is no secret.
func (s Secret) IsZero() bool { return s.p == nil || *s.p == "" }

const redacted = "[secret]"

func (s Secret) String() string { return redacted }

// GoString keeps %#v from showing the secret.
func (s Secret) GoString() string { return redacted }

// Format keeps every verb from showing the secret.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue keeps slog from showing the secret.
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

var errMarshalSecret = errors.New("a secret cannot be marshalled: reveal it on purpose")

// MarshalText refuses, and with it JSON, XML and YAML encoders.
func (s Secret) MarshalText() ([]byte, error) { return nil, errMarshalSecret }

// MarshalBinary refuses, and with it gob.
func (s Secret) MarshalBinary() ([]byte, error) { return nil, errMarshalSecret }

// A Kind is what a secret of ours is for; its prefix says so.
type Kind byte

// The letter of each kind stands after the first part of the prefix: kwi_, kwa_, kwu_, kwm_.
const (
	KindInstance   Kind = 'i'
	KindAgent      Kind = 'a'
	KindUser       Kind = 'u'
	KindManagement Kind = 'm'
)

// A Format says how our secrets look: prefix (first part, kind, "_"), 43 random base62 characters,
// then 6 base62 characters of CRC-32 (IEEE) over all before. The checksum stops typing errors and
// lets a scanner tell a key from noise without asking anyone; it is public, so it stops no attacker.
// The zero Format has the first part "kw".
type Format struct {
	First string // [a-z][a-z0-9]{0,9}
	// Foreign are the shapes of secrets that keyward did not make, and takes.
	Foreign []Shape
}

const (
	base62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	// randomLen: 62^43 > 2^256.
	randomLen   = 43
	checksumLen = 6
	// DefaultFirst is the first part of a prefix where the configuration names none.
	DefaultFirst = "kw"
)

var (
	// ErrShape: the text does not look like one of our secrets: length or alphabet.
	ErrShape = errors.New("not the shape of a key")
	// ErrChecksum: it looks like one, but was mistyped or made up.
	ErrChecksum = errors.New("the key's checksum is wrong")

	firstPattern = regexp.MustCompile(`^[a-z][a-z0-9]{0,9}$`)
)

// Validate reports a first part that would make ambiguous or unsafe prefixes.
func (f Format) Validate() error {
	if !firstPattern.MatchString(f.first()) {
		return Invalid("prefix", "must be 1 to 10 lower-case letters and digits, a letter first")
	}
	return f.validateForeign()
}

func (f Format) first() string {
	if f.First == "" {
		return DefaultFirst
	}
	return f.First
}

// New makes a secret of kind k with 256 bits from the system's random source.
func (f Format) New(k Kind) Secret {
	b := make([]byte, 0, f.Len())
	b = append(append(b, f.first()...), byte(k), '_')
	var random [64]byte
	for need := randomLen; need > 0; {
		_, _ = rand.Read(random[:]) // never fails: crypto/rand ends the program instead
		for _, r := range random {
			// 248 is the largest multiple of 62 in a byte: taking only what is below keeps every
			// character equally likely.
			if r < 248 && need > 0 {
				b = append(b, base62[r%62])
				need--
			}
		}
	}
	b = appendChecksum(b, crc32.ChecksumIEEE(b))
	return NewSecret(string(b))
}

// Len is the length of every secret that keyward makes, in bytes.
func (f Format) Len() int { return len(f.first()) + 2 + randomLen + checksumLen }

// Pattern is a regular expression that finds secrets of this format in a text, in a group, in the common
// part of RE2, PCRE and Python. What it finds by chance, [Format.Check] refuses.
func (f Format) Pattern() string {
	kinds := string([]byte{byte(KindInstance), byte(KindAgent), byte(KindUser), byte(KindManagement)})
	return fmt.Sprintf(`\b(%s[%s]_[0-9A-Za-z]{%d})\b`, f.first(), kinds, randomLen+checksumLen)
}

// Owns reports whether s starts with one of our prefixes, and of which kind. What it owns is a
// credential of ours, good or bad: it is judged, and never passed on to an upstream.
func (f Format) Owns(s string) (Kind, bool) {
	if k, ok := f.made(s); ok {
		return k, true
	}
	if f.foreign(s) != nil {
		return KindForeign, true
	}
	return 0, false
}

// Within reports whether there is a secret anywhere in a text, also one with a wrong checksum: somebody may
// have typed it where it does not belong.
func (f Format) Within(text string) bool {
	for i := range len(text) {
		kind, ours := f.Owns(text[i:])
		if !ours {
			continue
		}
		if kind == KindForeign {
			if f.beginsForeign(text[i:]) {
				return true
			}
			continue
		}
		if _, err := f.Check(text[i:min(i+f.Len(), len(text))]); !errors.Is(err, ErrShape) {
			return true
		}
	}
	return false
}

// made is Owns of what keyward makes itself.
func (f Format) made(s string) (Kind, bool) {
	first := f.first()
	n := len(first)
	if len(s) < n+2 || s[:n] != first || s[n+1] != '_' {
		return 0, false
	}
	switch k := Kind(s[n]); k {
	case KindInstance, KindAgent, KindUser, KindManagement:
		return k, true
	}
	return 0, false
}

// Check looks at shape and checksum. It costs no hash and no look-up.
// Errors: [ErrShape], [ErrChecksum].
func (f Format) Check(s string) (Kind, error) {
	k, ok := f.made(s)
	if !ok {
		if shape := f.foreign(s); shape != nil && shape.fits(s) {
			return KindForeign, nil
		}
		return 0, ErrShape
	}
	if len(s) != f.Len() {
		return 0, ErrShape
	}
	for i := len(f.first()) + 2; i < len(s); i++ {
		if !isBase62[s[i]] {
			return 0, ErrShape
		}
	}
	body := len(s) - checksumLen
	if uint64(crc32.ChecksumIEEE(unsafe.Slice(unsafe.StringData(s), body))) != parseChecksum(s[body:]) { //nolint:gosec // a conversion to []byte would allocate
		return 0, ErrChecksum
	}
	return k, nil
}

// HintLen is how many characters of the end a hint shows: 24 of 256 bits.
const hintLen = 4

// Hint is what lists show of a secret: its prefix and last four characters.
func (f Format) Hint(s Secret) string {
	text := s.Reveal()
	if shape := f.foreign(text); shape != nil && shape.fits(text) {
		return shape.hint(text)
	}
	if len(text) != f.Len() {
		return ""
	}
	return text[:len(f.first())+2] + "…" + text[len(text)-hintLen:]
}

func appendChecksum(dst []byte, sum uint32) []byte {
	var digits [checksumLen]byte
	for i := checksumLen - 1; i >= 0; i-- {
		digits[i] = base62[sum%62]
		sum /= 62
	}
	return append(dst, digits[:]...)
}

// parseChecksum returns a value above any CRC-32 where the digits do not fit 32 bits.
func parseChecksum(s string) (sum uint64) {
	for i := range len(s) {
		sum = sum*62 + uint64(base62Value(s[i]))
	}
	return sum
}

func base62Value(c byte) byte {
	switch {
	case c <= '9':
		return c - '0'
	case c <= 'Z':
		return c - 'A' + 10
	default:
		return c - 'a' + 36
	}
}

// isBase62 says which characters a secret may have.
var isBase62 = func() (is [256]bool) {
	for _, c := range []byte(base62) {
		is[c] = true
	}
	return is
}()
