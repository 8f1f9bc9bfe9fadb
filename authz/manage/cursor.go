package manage

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// cursors says where a list goes on, in a form that callers can carry but not make: it is authenticated
// together with the list that it is for, so that one of another instance, filter or order is no cursor
// here. Everything that differs is the same error.
//
// That of keys is encrypted: a short page ends at a key that need not be in the list, and that its reader may
// not be allowed to see.
//
// Shape: base64url of the time that orders in µs (8 bytes) ‖ key id (16) ‖ the name that orders, by AES-256-GCM
// with a random nonce before (12) and the tag after it (16). Names are short: [maxCursorName].
type cursors struct {
	key    [32]byte    // of those of events, which have HMAC-SHA-256 (16)
	places cipher.AEAD // of those of keys
}

func newCursors(pepper *apikey.Pepper) cursors {
	var c cursors
	var places [32]byte
	if pepper != nil {
		c.key, places = pepper.Derive("management cursor"), pepper.Derive("management cursor of keys")
	} else {
		_, _ = rand.Read(c.key[:])
		_, _ = rand.Read(places[:])
	}
	block, err := aes.NewCipher(places[:])
	if err == nil {
		c.places, err = cipher.NewGCMWithRandomNonce(block)
	}
	if err != nil {
		panic(err) // of a key of 32 bytes
	}
	return c
}

const (
	placeLen      = 8 + 16
	cursorMACLen  = 16
	maxCursorName = 1 << 10 // more than any name of a key has
)

// keysOf names the list of keys that a cursor is for. Filter and order are as the caller wrote them, not
// as they are meant now: "unused for 90 days" means another day on every page.
func keysOf(instanceID string, in admin.KeyListInput) string {
	filter, err := json.Marshal(in)
	if err != nil {
		panic(err) // of a struct of strings
	}
	return "keys of " + instanceID + " " + string(filter)
}

func (c cursors) encode(list string, p admin.KeyPlace) string {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, placeLen+len(p.Name)), uint64(p.At.UnixMicro()))
	b = append(b, p.ID[:]...)
	b = append(b, p.Name...)
	return base64.RawURLEncoding.EncodeToString(c.places.Seal(nil, nil, b, []byte(list)))
}

func (c cursors) decode(list, s string) (admin.KeyPlace, error) {
	sealed, err := base64.RawURLEncoding.Strict().DecodeString(s)
	var b []byte
	if err == nil && len(sealed) <= placeLen+maxCursorName+c.places.Overhead() {
		b, err = c.places.Open(nil, nil, sealed, []byte(list))
	}
	if err != nil || len(b) < placeLen {
		return admin.KeyPlace{}, apikey.Invalid("cursor", "is not one that this list gave: begin again without it")
	}
	return admin.KeyPlace{
		At:   time.UnixMicro(int64(binary.BigEndian.Uint64(b))).UTC(),
		ID:   apikey.ID(b[8:placeLen]),
		Name: string(b[placeLen:]),
	}, nil
}

func (c cursors) mac(list string, place []byte) []byte {
	h := hmac.New(sha256.New, c.key[:])
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(list)))) // where one ends and the other begins
	h.Write([]byte(list))
	h.Write(place)
	return h.Sum(nil)[:cursorMACLen]
}
