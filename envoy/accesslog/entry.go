package accesslog

import (
	"net/netip"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"keyward/envoy/wire"
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

	// What usage is made of. A number that cannot be one is unknown.
	key, instance  string
	status         int64 // 0: none was sent
	received, sent int64 // bytes
	took           time.Duration
}

// unknown stands for a number that could not be read.
const unknown = -1

// fields walks over the fields of one message.
type fields struct {
	rest   []byte
	tag    wire.Tag
	bytes  []byte // the field's content
	broken bool   // the rest is no message; nothing follows
}

func walk(message []byte) fields { return fields{rest: message} }

// next goes to the next field, if there is one.
func (f *fields) next() bool {
	if len(f.rest) == 0 || f.broken {
		return false
	}
	tag, content, rest, ok := wire.Cut(f.rest)
	if !ok {
		f.broken = true
		return false
	}
	f.tag, f.bytes, f.rest = tag, content, rest
	return true
}

// isBytes is for text and messages.
func (f *fields) isBytes(number protowire.Number) bool { return f.tag == wire.Bytes(number) }

// isVarint is for whole numbers, which number reads.
func (f *fields) isVarint(number protowire.Number) bool { return f.tag == wire.Varint(number) }

func (f *fields) number() uint64 { return wire.Number(f.bytes) }
