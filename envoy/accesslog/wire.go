package accesslog

import (
	"net/netip"
	"time"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
)

// A parser reads one message: it calls named for each place that says who sends, before the entries from
// there, and take for each entry, also for what cannot be read. Strings are gone when it returns.
// It gives the same as generated code would: fields in any order, unknown and wrongly typed ones
// skipped, of a repeat the last, repeated messages merged, of a choice the last; but a broken part does
// not spoil the others.
type parser func(message []byte, named func(origin), take func(entry))

// An origin is how the other side calls itself. All of it may be empty.
type origin struct {
	node, cluster, log string
}

// An event is what an entry tells of.
type event uint8

const (
	eventOther event = iota
	eventEnd
	eventPeriodic
)

// An entry is what matters of one access-log entry.
type entry struct {
	broken bool // it could not be read
	event  event
	lease  string // "": none
	peer   netip.AddrPort
	start  time.Time // zero or 1970: unknown
	end    time.Time // zero: unknown
}

// fields walks over the fields of one message in wire format.
type fields struct {
	rest   []byte
	number protowire.Number
	kind   protowire.Type
	bytes  []byte // of a field of BytesType
	varint uint64 // of a field of VarintType
	broken bool   // the rest is not in wire format; nothing follows
}

func walk(message []byte) fields { return fields{rest: message} }

// next goes to the next field, if there is one.
func (f *fields) next() bool {
	if len(f.rest) == 0 || f.broken {
		return false
	}
	number, kind, n := protowire.ConsumeTag(f.rest)
	if n >= 0 {
		value := f.rest[n:]
		switch kind {
		case protowire.BytesType:
			f.bytes, n = protowire.ConsumeBytes(value)
		case protowire.VarintType:
			f.varint, n = protowire.ConsumeVarint(value)
		default:
			n = protowire.ConsumeFieldValue(number, kind, value)
		}
		if n >= 0 {
			f.number, f.kind, f.rest = number, kind, value[n:]
			return true
		}
	}
	f.broken = true
	return false
}

// is reports whether the field is this one. One of another type is unknown to its message.
func (f *fields) is(number protowire.Number, kind protowire.Type) bool {
	return f.number == number && f.kind == kind
}

// isBytes is for text and messages.
func (f *fields) isBytes(number protowire.Number) bool { return f.is(number, protowire.BytesType) }

// isVarint is for whole numbers.
func (f *fields) isVarint(number protowire.Number) bool { return f.is(number, protowire.VarintType) }

// text makes a string of bytes without copying: it lives as long as the message that they are part of.
func text(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) } //nolint:gosec // spares a copy of every text in every entry
