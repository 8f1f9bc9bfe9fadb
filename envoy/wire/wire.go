// Package wire reads protobuf messages where they lie: the bytes that gRPC received, neither copied nor
// turned into generated types. Check and the access logs, which Envoy sends for every request, take a
// few fields out of many that way, without an allocation.
//
// Trade-off: whoever reads a message states its field numbers, and its rules (the last of a repeated
// scalar counts, repeated messages merge), again. So each reader is tested against generated code.
//
// A server that is to hand messages over like that has [NewCodec]'s codec; what is not a [Message] goes
// through the standard one.
package wire

import (
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
)

// A Tag is a field's number and wire type, as messages have them. A field of another type than its
// message says is unknown to the message, and skipped.
type Tag uint32

// The wire types.
const (
	varint  = Tag(protowire.VarintType)
	fixed64 = Tag(protowire.Fixed64Type)
	bytes   = Tag(protowire.BytesType)
	group   = Tag(protowire.StartGroupType)
)

// Bytes returns the tag of a field that is text or a message.
func Bytes(number protowire.Number) Tag { return Tag(number<<3) | bytes }

// Varint returns the tag of a field that is a whole number.
func Varint(number protowire.Number) Tag { return Tag(number<<3) | varint }

// Fixed64 returns the tag of a field of eight bytes.
func Fixed64(number protowire.Number) Tag { return Tag(number<<3) | fixed64 }

// IsGroup reports whether the field is a group, which proto3 does not have.
func (t Tag) IsGroup() bool { return t&7 == group }

// Cut cuts the first field off a message that is not empty; what comes after it is the rest. The content
// is what text or a message holds, and of any other field its bytes as they stand. ok is false if no
// field stands there.
//
//	for len(message) > 0 {
//		tag, content, rest, ok := wire.Cut(message)
//		if !ok {
//			return errBroken
//		}
//		message = rest
//		switch tag {
//		case wire.Bytes(1): // name
//			name = wire.Text(content)
//		}
//	}
func Cut(message []byte) (tag Tag, content, rest []byte, ok bool) {
	// Most fields have a tag and a length of one byte.
	if len(message) >= 2 && message[0] >= 1<<3 && message[0] < 0x80 && Tag(message[0])&7 == bytes && message[1] < 0x80 {
		if end := 2 + int(message[1]); end <= len(message) {
			return Tag(message[0]), message[2:end], message[end:], true
		}
		return 0, nil, nil, false
	}
	return cutAny(message)
}

func cutAny(message []byte) (tag Tag, content, rest []byte, ok bool) {
	number, kind, n := protowire.ConsumeTag(message)
	if n < 0 || number > protowire.MaxValidNumber {
		return 0, nil, nil, false
	}
	tag, message = Tag(number<<3)|Tag(kind), message[n:]
	if kind == protowire.BytesType {
		content, n = protowire.ConsumeBytes(message)
	} else if n = protowire.ConsumeFieldValue(number, kind, message); n >= 0 {
		content = message[:n]
	}
	if n < 0 {
		return 0, nil, nil, false
	}
	return tag, content, message[n:], true
}

// Number reads the content of a field that is a whole number.
func Number(content []byte) uint64 {
	n, _ := protowire.ConsumeVarint(content) // Cut saw to it that it is one
	return n
}

// Text makes a string of bytes without copying: it lives as long as the message that they are part of.
func Text(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) } //nolint:gosec // spares a copy of every text in every message
