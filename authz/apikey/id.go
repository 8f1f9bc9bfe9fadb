package apikey

import (
	"encoding/hex"
	"fmt"
)

// An ID names a key for ever. It is public: a UUIDv7 for keys that keyward makes, any UUID for
// imported ones. The zero ID names nothing.
type ID [16]byte

// ParseID reads the 36-character form of a UUID, in either case.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return ID{}, errNotUUID
	}
	var packed [32]byte
	n := 0
	for i := range len(s) {
		if i == 8 || i == 13 || i == 18 || i == 23 {
			continue
		}
		packed[n] = s[i]
		n++
	}
	if _, err := hex.Decode(id[:], packed[:]); err != nil {
		return ID{}, errNotUUID
	}
	return id, nil
}

var errNotUUID = fmt.Errorf("not a UUID such as 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f")

// Append appends the 36-character, lower-case form.
func (id ID) Append(dst []byte) []byte {
	text := [36]byte{8: '-', 13: '-', 18: '-', 23: '-'}
	hex.Encode(text[0:], id[0:4])
	hex.Encode(text[9:], id[4:6])
	hex.Encode(text[14:], id[6:8])
	hex.Encode(text[19:], id[8:10])
	hex.Encode(text[24:], id[10:16])
	return append(dst, text[:]...)
}

func (id ID) String() string { return string(id.Append(make([]byte, 0, 36))) }

// IsZero reports whether id names nothing.
func (id ID) IsZero() bool { return id == ID{} }

// MarshalText writes the 36-character form.
func (id ID) MarshalText() ([]byte, error) { return id.Append(nil), nil }

// UnmarshalText reads the 36-character form.
func (id *ID) UnmarshalText(text []byte) (err error) {
	*id, err = ParseID(string(text))
	return err
}
