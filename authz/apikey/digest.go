package apikey

import (
	"bufio"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strconv"
	"strings"
	"sync"
	"unsafe"
)

// A Digest is how a key is found: HMAC-SHA-256 of the secret under the pepper, 32 bytes. A secret
// carries 256 random bits, so a fast hash is enough: slow ones are for passwords people choose.
type Digest [sha256.Size]byte

// Equal compares in constant time.
func (d *Digest) Equal(other *Digest) bool { return subtle.ConstantTimeCompare(d[:], other[:]) == 1 }

// Prefix is the first 8 bytes, as the set of known digests keeps them.
func (d *Digest) Prefix() uint64 { return binary.BigEndian.Uint64(d[:8]) }

// String shows the first bytes only: enough to tell two digests apart in a test, useless for a look-up.
func (d Digest) String() string { return hex.EncodeToString(d[:4]) + "…" }

// A Pepper is the key under which secrets become digests. It is versioned and never in the database,
// so a stolen database cannot confirm a guess. Other secrets of the server are derived from it by label.
// Safe for concurrent use.
type Pepper struct {
	version uint32
	// key is 32 bytes. A pointer to a string for the same reason as in Secret: a pointer to an array is
	// followed by fmt where the verb does not fit.
	key  *string
	dev  bool
	macs sync.Pool // of *mac
}

// A mac is a keyed hash with room for its input and output, so that a digest allocates nothing.
type mac struct {
	hash hash.Hash
	in   []byte
	sum  [sha256.Size]byte
}

// NewPepper makes a random pepper. One made for development is marked, and serve refuses it.
func NewPepper(version uint32, dev bool) *Pepper {
	var random [32]byte
	_, _ = rand.Read(random[:])
	key := string(random[:])
	return &Pepper{version: version, key: &key, dev: dev}
}

// Version says which pepper a digest was made with; from 1.
func (p *Pepper) Version() uint32 { return p.version }

// Dev reports whether the pepper was made for development.
func (p *Pepper) Dev() bool { return p.dev }

// String names the pepper without showing it.
func (p *Pepper) String() string { return fmt.Sprintf("pepper version %d", p.version) }

// GoString names the pepper without showing it.
func (p *Pepper) GoString() string { return p.String() }

// Digest returns the digest of a secret that keyward made.
func (p *Pepper) Digest(secret string) Digest { return digest(p, secret) }

// DigestOf returns the digest of a secret of a kind. Foreign secrets are found by the digest of their
// SHA-256, so that a key is the same whether it was imported with the secret or with its SHA-256.
func (p *Pepper) DigestOf(kind Kind, secret string) Digest {
	if kind != KindForeign {
		return digest(p, secret)
	}
	return p.DigestSHA256(sha256.Sum256(unsafe.Slice(unsafe.StringData(secret), len(secret)))) //nolint:gosec // a conversion to []byte would allocate
}

// DigestSHA256 returns the digest of a foreign secret whose SHA-256 is known. The 32 bytes themselves are
// no secret that anybody could send: they fit no [Shape], and what does not is not looked up.
func (p *Pepper) DigestSHA256(sum [sha256.Size]byte) Digest { return digest(p, sum[:]) }

func digest[T string | []byte](p *Pepper, secret T) Digest {
	m, _ := p.macs.Get().(*mac)
	if m == nil {
		m = &mac{hash: hmac.New(sha256.New, []byte(*p.key))}
		m.hash.Reset() // the state that every later Reset goes back to, from before any secret
	}
	m.in = append(m.in[:0], secret...)
	_, _ = m.hash.Write(m.in) // a hash never fails
	d := Digest(m.hash.Sum(m.sum[:0]))
	// The pool outlives the request, the secret should not: the hash keeps its last block until Reset.
	clear(m.in)
	m.hash.Reset()
	p.macs.Put(m)
	return d
}

// Derive returns 32 bytes for another purpose: HKDF-SHA-256(pepper, label). The same pepper and label
// give the same bytes; different labels are independent.
func (p *Pepper) Derive(label string) [32]byte {
	b, err := hkdf.Expand(sha256.New, []byte(*p.key), "keyward "+label, 32)
	if err != nil {
		panic(err) // only for lengths above 255 hashes
	}
	return [32]byte(b)
}

// CheckValue tells a right pepper from a wrong one without giving it away. The store keeps it.
func (p *Pepper) CheckValue() [16]byte {
	full := p.Derive("pepper check value")
	return [16]byte(full[:16])
}

// Peppers are the pepper in use and, while a rotation lasts, the one before it.
type Peppers struct {
	Current  *Pepper
	Previous *Pepper // nil outside a rotation
}

// Validate reports two peppers that cannot be used together.
func (p Peppers) Validate() error {
	if p.Current == nil {
		return errors.New("no pepper")
	}
	if p.Previous != nil && p.Previous.version >= p.Current.version {
		return fmt.Errorf("the previous pepper's version (%d) must be below the current one's (%d): are the two files swapped?",
			p.Previous.version, p.Current.version)
	}
	return nil
}

// ByVersion returns the pepper of a version, or nil.
func (p Peppers) ByVersion(version uint32) *Pepper {
	for _, one := range []*Pepper{p.Current, p.Previous} {
		if one != nil && one.version == version {
			return one
		}
	}
	return nil
}

const pepperHeader = "keyward pepper"

// MarshalPepper writes the text of a pepper file. Whoever writes it to disk gives it mode 0600.
func MarshalPepper(p *Pepper) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nversion: %d\n", pepperHeader, p.version)
	if p.dev {
		b.WriteString("for: development\n")
	}
	fmt.Fprintf(&b, "key: %s\n", base64.StdEncoding.EncodeToString([]byte(*p.key)))
	return []byte(b.String())
}

// ParsePepper reads the text of a pepper file. Errors never show its content.
func ParsePepper(text []byte) (*Pepper, error) {
	lines := bufio.NewScanner(strings.NewReader(string(text)))
	if !lines.Scan() || lines.Text() != pepperHeader {
		return nil, errors.New("not a pepper file: its first line must be \"" + pepperHeader + "\"; keyward pepper new makes one")
	}
	p := &Pepper{}
	seen := make(map[string]bool)
	for lines.Scan() {
		field, value, ok := strings.Cut(lines.Text(), ": ")
		if ok && seen[field] {
			return nil, errors.New("pepper file: version, for or key is there twice")
		}
		seen[field] = true
		switch {
		case lines.Text() == "":
		case ok && field == "version":
			v, err := strconv.ParseUint(value, 10, 32)
			if err != nil || v == 0 {
				return nil, errors.New("pepper file: version is not a number from 1")
			}
			p.version = uint32(v)
		case ok && field == "for" && value == "development":
			p.dev = true
		case ok && field == "key":
			decoded, err := base64.StdEncoding.DecodeString(value)
			if err != nil || len(decoded) != 32 {
				return nil, errors.New("pepper file: key is not 32 bytes in base64")
			}
			key := string(decoded)
			p.key = &key
		default:
			return nil, errors.New("pepper file: a line that is not version, for or key")
		}
	}
	if lines.Err() != nil {
		return nil, errors.New("pepper file: a line is too long")
	}
	if p.version == 0 || p.key == nil {
		return nil, errors.New("pepper file: version or key is missing")
	}
	return p, nil
}
