package manage

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// cursors says where a list goes on, in a form that callers can carry but not make: it is authenticated
// together with the list that it is for, so that one of another instance, filter or order is no cursor
// here. Everything that differs is the same error.
//
// That of keys, and of what is listed as they are, is sealed: see [admin.KeyPlaces].
type cursors struct {
	admin.KeyPlaces

	key [32]byte // of those of events, which have HMAC-SHA-256 (16)
}

func newCursors(pepper *apikey.Pepper) cursors {
	c := cursors{KeyPlaces: admin.NewKeyPlaces(pepper, admin.PlacesOfAPI)}
	if pepper != nil {
		c.key = pepper.Derive("management cursor")
	} else {
		_, _ = rand.Read(c.key[:])
	}
	return c
}

const cursorMACLen = 16

// decode reads what Seal wrote for the same list.
func (c cursors) decode(list, s string) (admin.KeyPlace, error) {
	place, ok := c.Open(list, s)
	if !ok {
		return place, apikey.Invalid("cursor", "is not one that this list gave: begin again without it")
	}
	return place, nil
}

func (c cursors) mac(list string, place []byte) []byte {
	h := hmac.New(sha256.New, c.key[:])
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(list)))) // where one ends and the other begins
	h.Write([]byte(list))
	h.Write(place)
	return h.Sum(nil)[:cursorMACLen]
}
