package apikey

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
)

// KindForeign is the kind of secrets that keyward did not make: keys were imported for them.
const KindForeign Kind = 'f'

// A Shape is how foreign secrets look, so that a request that carries one is told from one that does not.
// What fits no shape costs no hash and no look-up.
type Shape struct {
	// Prefix is what each of them begins with: 3 to 32 printable ASCII characters.
	Prefix string
	// MinLength and MaxLength are those of the whole secret, in characters, from 16 beyond the prefix to
	// 1024. The secret is printable ASCII without space, comma, quotes and backslash.
	MinLength, MaxLength int
	// AgentToken says that they are Agent Access Tokens of FoundationaLLM, keya.….ayek, which
	// [ParseAgentToken] takes apart. Then the other fields are empty.
	AgentToken bool
}

const (
	leastForeign = 16 // characters beyond the prefix: fewer could be guessed
	mostForeign  = 1024

	agentTokenPrefix = "keya."
	agentTokenSuffix = ".ayek"
)

func (s *Shape) prefix() string {
	if s.AgentToken {
		return agentTokenPrefix
	}
	return s.Prefix
}

// fits reports whether secret, which has the prefix, has the rest of the shape too.
func (s *Shape) fits(secret string) bool {
	if s.AgentToken {
		return isAgentToken(secret)
	}
	if len(secret) < s.MinLength || len(secret) > s.MaxLength {
		return false
	}
	return isForeignText(secret)
}

func isForeignText(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case c <= ' ', c > '~', c == ',', c == '"', c == '\'', c == '\\':
			return false
		}
	}
	return true
}

// foreign returns the shape whose prefix s has, nil if there is none.
func (f Format) foreign(s string) *Shape {
	for i := range f.Foreign {
		if strings.HasPrefix(s, f.Foreign[i].prefix()) {
			return &f.Foreign[i]
		}
	}
	return nil
}

// beginsForeign reports whether s begins with what could be a foreign secret, whatever follows: the full stop
// after one may be part of a secret as well.
func (f Format) beginsForeign(s string) bool {
	shape := f.foreign(s)
	switch {
	case shape == nil:
		return false
	case shape.AgentToken:
		end := strings.Index(s, agentTokenSuffix)
		return end >= 0 && isAgentToken(s[:end+len(agentTokenSuffix)])
	}
	return len(s) >= shape.MinLength && isForeignText(s[:shape.MinLength])
}

// validateForeign reports shapes that are unsafe, or that overlap with others or with ours.
func (f Format) validateForeign() error {
	prefixes := []string{f.first() + "i_", f.first() + "a_", f.first() + "u_", f.first() + "m_", "eyJ"} // the last: JWTs, which are the applications'
	for i := range f.Foreign {
		s := &f.Foreign[i]
		switch {
		case s.AgentToken && (s.Prefix != "" || s.MinLength != 0 || s.MaxLength != 0):
			return Invalid("foreign", "has an agentAccessToken with prefix or lengths: its shape is known")
		case s.AgentToken:
		case len(s.Prefix) < 3 || len(s.Prefix) > 32 || !isForeignText(s.Prefix):
			return Invalid("foreign", "has a prefix that is not 3 to 32 printable characters without space, comma, quotes and backslash")
		case s.MinLength < len(s.Prefix)+leastForeign || s.MaxLength > mostForeign || s.MinLength > s.MaxLength:
			return Invalid("foreign", "has lengths that are not from 16 characters beyond the prefix to 1024, the shorter one first")
		}
		for _, other := range prefixes {
			if strings.HasPrefix(other, s.prefix()) || strings.HasPrefix(s.prefix(), other) {
				return Invalid("foreign", "has a prefix that begins as another, as our own or as JWTs do")
			}
		}
		prefixes = append(prefixes, s.prefix())
	}
	return nil
}

// foreignHint is what lists show of a foreign secret: its prefix and last four characters.
func (s *Shape) hint(secret string) string {
	secret = strings.TrimSuffix(secret, agentTokenSuffix)
	return s.prefix() + "…" + secret[len(secret)-hintLen:]
}

const base58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

var isBase58 = func() (is [256]bool) {
	for _, c := range []byte(base58) {
		is[c] = true
	}
	return is
}()

// isAgentToken reports whether s is keya, four parts in base58 and ayek, separated by dots.
func isAgentToken(s string) bool {
	if len(s) > mostForeign || len(s) < len(agentTokenPrefix)+len(agentTokenSuffix) ||
		!strings.HasPrefix(s, agentTokenPrefix) || !strings.HasSuffix(s, agentTokenSuffix) {
		return false
	}
	inner := s[len(agentTokenPrefix) : len(s)-len(agentTokenSuffix)]
	parts, length := 1, 0
	for i := range len(inner) {
		switch c := inner[i]; {
		case isBase58[c]:
			length++
		case c == '.' && length > 0:
			parts, length = parts+1, 0
		default:
			return false
		}
	}
	// 128 bytes are 128 to 175 characters.
	return parts == 4 && length >= 128 && length <= 175
}

// An AgentToken is an Agent Access Token, taken apart.
type AgentToken struct {
	InstanceID string // canonical
	AgentName  string
	KeyID      ID
	// Random is the 128 bytes that make it a secret. Whoever knows the rest of a token can make up these alone.
	Random Secret
}

var errAgentToken = errors.New("not an Agent Access Token")

// ParseAgentToken takes keya.….ayek apart: an instance, "{instance}~FoundationaLLM.Agent~agents~{agent}", a
// key id and 128 random bytes. The error says no more than that it is none.
func ParseAgentToken(s string) (t AgentToken, err error) {
	if !isAgentToken(s) {
		return t, errAgentToken
	}
	var parts [4][]byte
	for i, part := range strings.Split(s, ".")[1:5] {
		parts[i] = decodeBase58(part)
	}
	context := strings.Split(string(parts[1]), "~")
	if len(parts[3]) != 128 || len(context) != 4 || !strings.EqualFold(context[0], string(parts[0])) ||
		!strings.EqualFold(context[1], "FoundationaLLM.Agent") || !strings.EqualFold(context[2], "agents") {
		return t, errAgentToken
	}
	if t.InstanceID, err = CanonicalInstanceID(string(parts[0])); err != nil {
		return AgentToken{}, errAgentToken
	}
	t.AgentName = context[3]
	if t.KeyID, err = ParseID(string(parts[2])); err != nil {
		return AgentToken{}, errAgentToken
	}
	t.Random = NewSecret(string(parts[3]))
	return t, nil
}

// NewAgentToken makes an Agent Access Token, as the application does: for an agent of an instance, with a key's
// id and 128 random bytes. The names are those that keys have.
func NewAgentToken(instanceID, agentName string, id ID) Secret {
	var random [128]byte
	_, _ = rand.Read(random[:]) // never fails
	parts := [...]string{instanceID, instanceID + "~FoundationaLLM.Agent~agents~" + agentName, id.String(), string(random[:])}
	for i := range parts {
		parts[i] = encodeBase58([]byte(parts[i]))
	}
	return NewSecret(agentTokenPrefix + strings.Join(parts[:], ".") + agentTokenSuffix)
}

// An AgentHash is what the application keeps of an Agent Access Token: the Argon2id hash of its random bytes.
// It confirms a secret, and finds none. Nothing prints it.
type AgentHash struct {
	Salt [16]byte
	Hash [128]byte
}

// ParseAgentHash reads salt and hash in base58, as the application writes them.
// Errors: *InvalidError for salt or hash.
func ParseAgentHash(salt, hash string) (h AgentHash, err error) {
	for _, part := range []struct {
		field, text string
		to          []byte
	}{{"salt", salt, h.Salt[:]}, {"hash", hash, h.Hash[:]}} {
		// Longer ones are not decoded: that takes the square of the length.
		if len(part.text) > 2*len(part.to) || strings.Trim(part.text, base58) != "" {
			return AgentHash{}, Invalid(part.field, fmt.Sprintf("must be %d bytes in base58", len(part.to)))
		}
		decoded := decodeBase58(part.text)
		if len(decoded) != len(part.to) {
			return AgentHash{}, Invalid(part.field, fmt.Sprintf("must be %d bytes in base58", len(part.to)))
		}
		copy(part.to, decoded)
	}
	return h, nil
}

// Format keeps every verb from showing the hash.
func (h AgentHash) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[hash]") }

// PendingDigest is what finds a key of which only an [AgentHash] is known, until a secret is seen that it
// confirms. It says nothing of any secret: whoever is found by it has proved nothing. It is under no pepper,
// because ids are public; [NoPepper] is its version. No secret has it as its digest.
func (id ID) PendingDigest() Digest {
	return sha256.Sum256(append([]byte("keyward pending agent access token\x00"), id[:]...))
}

// NoPepper is the version of digests that are under no pepper. Those of peppers begin at 1.
const NoPepper = 0

// encodeBase58 writes each leading zero byte as 1.
func encodeBase58(b []byte) string {
	n, base, digit := new(big.Int).SetBytes(b), big.NewInt(58), new(big.Int)
	var backwards []byte
	for n.Sign() > 0 {
		n.DivMod(n, base, digit)
		backwards = append(backwards, base58[digit.Int64()])
	}
	for i := 0; i < len(b) && b[i] == 0; i++ {
		backwards = append(backwards, base58[0])
	}
	slices.Reverse(backwards)
	return string(backwards)
}

// decodeBase58 decodes what has the alphabet. Each leading 1 is a zero byte.
func decodeBase58(s string) []byte {
	n, base := new(big.Int), big.NewInt(58)
	for i := range len(s) {
		n.Add(n.Mul(n, base), big.NewInt(int64(strings.IndexByte(base58, s[i]))))
	}
	zeros := len(s) - len(strings.TrimLeft(s, "1"))
	return append(make([]byte, zeros), n.Bytes()...)
}
