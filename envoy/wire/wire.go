// Package wire reads protobuf messages where they lie: the bytes that gRPC received, neither copied nor
// turned into generated types. Check and the access logs, which Envoy sends for every request, take a
// few fields out of many that way, without an allocation.
//
// Trade-off: whoever reads a message states its field numbers, and its rules (the last of a repeated
// scalar counts, repeated messages merge), again. So each reader is tested against generated code.
//
// A server that is to hand messages over like that has [Codec] as its codec; what is not a [Message]
// goes through the standard one.
package wire

import (
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
)

// Fields walks over the fields of one message in wire format:
//
//	f := wire.Walk(message)
//	for f.Next() {
//		switch {
//		case f.IsBytes(1):
//			use(f.Bytes)
//		}
//	}
//	if f.Broken { … }
type Fields struct {
	// Rest is what comes after the current field.
	Rest   []byte
	Number protowire.Number
	Kind   protowire.Type
	Bytes  []byte // of a field of BytesType: text, a message
	Varint uint64 // of a field of VarintType: a whole number
	Broken bool   // the rest is not in wire format; nothing follows
	// NoGroups makes groups, which proto3 does not have, count as broken. Otherwise they are skipped.
	NoGroups bool
}

// Walk begins before the first field of a message.
func Walk(message []byte) Fields { return Fields{Rest: message} }

// Next goes to the next field, if there is one.
func (f *Fields) Next() bool {
	if len(f.Rest) == 0 || f.Broken {
		return false
	}
	// Most fields have a tag and a length of one byte.
	if b := f.Rest; len(b) >= 2 && b[0] < 0x80 && protowire.Type(b[0]&7) == protowire.BytesType && b[0]>>3 != 0 && b[1] < 0x80 {
		if end := 2 + int(b[1]); end <= len(b) {
			f.Number, f.Kind = protowire.Number(b[0]>>3), protowire.BytesType
			f.Bytes, f.Rest = b[2:end:end], b[end:]
			return true
		}
		f.Broken = true
		return false
	}
	return f.next()
}

func (f *Fields) next() bool {
	number, kind, n := protowire.ConsumeTag(f.Rest)
	if n >= 0 && number <= protowire.MaxValidNumber {
		value := f.Rest[n:]
		switch kind {
		case protowire.BytesType:
			f.Bytes, n = protowire.ConsumeBytes(value)
		case protowire.VarintType:
			f.Varint, n = protowire.ConsumeVarint(value)
		default:
			n = protowire.ConsumeFieldValue(number, kind, value)
		}
		if n >= 0 && (kind != protowire.StartGroupType || !f.NoGroups) {
			f.Number, f.Kind, f.Rest = number, kind, value[n:]
			return true
		}
	}
	f.Broken = true
	return false
}

// Is reports whether the field is this one. A field of another type than its message says is unknown to
// the message, and skipped.
func (f *Fields) Is(number protowire.Number, kind protowire.Type) bool {
	return f.Number == number && f.Kind == kind
}

// IsBytes is for text and messages.
func (f *Fields) IsBytes(number protowire.Number) bool { return f.Is(number, protowire.BytesType) }

// IsVarint is for whole numbers.
func (f *Fields) IsVarint(number protowire.Number) bool { return f.Is(number, protowire.VarintType) }

// Text makes a string of bytes without copying: it lives as long as the message that they are part of.
func Text(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) } //nolint:gosec // spares a copy of every text in every message
