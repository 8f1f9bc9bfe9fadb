package admin

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"time"

	"keyward/authz/apikey"
)

// KeyPlaces writes where a list goes on, in a form that readers can carry, but neither make nor read: a page that
// was made in bounded time ends at a key that need not be in the list, and that its reader may not be allowed to
// see. It is sealed together with the list that it is for, so that one of another instance, filter or order is
// none here, nor is one that somebody else seals ([PlacesOfAPI], [PlacesOfPortal]). Safe for concurrent use.
//
// Shape: base64url of the time that orders in µs (8 bytes) ‖ key id (16) ‖ the name that orders, by AES-256-GCM
// with a random nonce before (12) and the tag after it (16). Names are short: [maxPlaceName].
type KeyPlaces struct{ places cipher.AEAD }

// Whose places they are: what the key that seals them is derived by.
const (
	PlacesOfAPI    = "management cursor of keys"
	PlacesOfPortal = "portal link of keys"
)

const (
	placeLen     = 8 + 16
	maxPlaceName = 1 << 10 // more than any name of a key has
)

// NewKeyPlaces returns those that are sealed under a key of a pepper, which every replica has; nil: of chance.
func NewKeyPlaces(pepper *apikey.Pepper, whose string) KeyPlaces {
	var key [32]byte
	if pepper != nil {
		key = pepper.Derive(whose)
	} else {
		_, _ = rand.Read(key[:])
	}
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic(err) // of a key of 32 bytes
	}
	places, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err) // of AES
	}
	return KeyPlaces{places}
}

// KeyPlaces returns those that are sealed under the pepper in use.
func (s *Service) KeyPlaces(whose string) KeyPlaces {
	return NewKeyPlaces(s.cfg.Peppers.Current, whose)
}

// Seal writes a place in a list.
func (p KeyPlaces) Seal(list string, at KeyPlace) string {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, placeLen+len(at.Name)), uint64(at.At.UnixMicro()))
	b = append(b, at.ID[:]...)
	b = append(b, at.Name...)
	return base64.RawURLEncoding.EncodeToString(p.places.Seal(nil, nil, b, []byte(list))) //nolint:gosec // G407: it takes none and makes one at random
}

// Open reads what Seal wrote for the same list; false for anything else.
func (p KeyPlaces) Open(list, s string) (KeyPlace, bool) {
	sealed, err := base64.RawURLEncoding.Strict().DecodeString(s)
	var b []byte
	if err == nil && len(sealed) <= placeLen+maxPlaceName+p.places.Overhead() {
		b, err = p.places.Open(nil, nil, sealed, []byte(list))
	}
	if err != nil || len(b) < placeLen {
		return KeyPlace{}, false
	}
	return KeyPlace{
		At:   time.UnixMicro(int64(binary.BigEndian.Uint64(b))).UTC(),
		ID:   apikey.ID(b[8:placeLen]),
		Name: string(b[placeLen:]),
	}, true
}

// In names the list of the keys of an instance (its canonical id) that in asks for, for [KeyPlaces]. Filter and
// order are as they were written, not as they are meant now: "unused for 90 days" means another day on every page.
func (in KeyListInput) In(instanceID string) string {
	filter, err := json.Marshal(in)
	if err != nil {
		panic(err) // of a struct of strings
	}
	return "keys of " + instanceID + " " + string(filter)
}
