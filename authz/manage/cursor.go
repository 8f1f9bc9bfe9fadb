package manage

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// cursors says where a list goes on, in a form that callers can carry but not make: it is authenticated
// together with the instance it is for. Everything that differs is the same error.
//
// Shape: base64url of CreatedAt in µs (8 bytes) ‖ key id (16) ‖ HMAC-SHA-256 (16).
type cursors struct{ key [32]byte }

func newCursors(pepper *apikey.Pepper) cursors {
	if pepper != nil {
		return cursors{pepper.Derive("management cursor")}
	}
	var c cursors
	_, _ = rand.Read(c.key[:])
	return c
}

const (
	placeLen     = 8 + 16
	cursorMACLen = 16
)

func (c cursors) encode(instanceID string, p admin.KeyPlace) string {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, placeLen+cursorMACLen), uint64(p.At.UnixMicro()))
	b = append(b, p.ID[:]...)
	return base64.RawURLEncoding.EncodeToString(append(b, c.mac(instanceID, b)...))
}

func (c cursors) decode(instanceID, s string) (admin.KeyPlace, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != placeLen+cursorMACLen || !hmac.Equal(b[placeLen:], c.mac(instanceID, b[:placeLen])) {
		return admin.KeyPlace{}, apikey.Invalid("cursor", "is not one that this list gave: begin again without it")
	}
	return admin.KeyPlace{
		At: time.UnixMicro(int64(binary.BigEndian.Uint64(b))).UTC(),
		ID: apikey.ID(b[8:placeLen]),
	}, nil
}

func (c cursors) mac(instanceID string, place []byte) []byte {
	h := hmac.New(sha256.New, c.key[:])
	h.Write(place) // of fixed length, so where it ends is clear
	h.Write([]byte(instanceID))
	return h.Sum(nil)[:cursorMACLen]
}
