package wire

import (
	"errors"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that ours stands in front of
	"google.golang.org/grpc/mem"
)

// NewCodec returns a codec for grpc.ForceServerCodecV2. A [Message] gets its bytes as they came, an
// [Answer] gives its bytes as they are; health checks and whatever else is served go through the
// standard codec.
//
// gRPC may ask a codec for the same message more than once: nothing is decided here.
func NewCodec() encoding.CodecV2 { return codec{encoding.GetCodecV2("proto")} }

type codec struct{ encoding.CodecV2 }

// maxOther is far above every message that is neither a Check nor a log.
const maxOther = 256 << 10 // bytes

var errTooLong = errors.New("the message is longer than 256 KiB")

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if m, ok := v.(*Message); ok {
		m.receive(data)
		return nil
	}
	if data.Len() > maxOther {
		return errTooLong
	}
	return c.CodecV2.Unmarshal(data, v)
}

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if a, ok := v.(*Answer); ok {
		return a.send(), nil
	}
	return c.CodecV2.Marshal(v)
}

// A Message is one message as it came over the wire, unread. The zero Message is empty.
type Message struct{ data mem.Buffer }

// receive takes a reference to the bytes, in one piece: a message that came in several is copied into a
// pooled buffer. If it is called again, it replaces what was there.
func (m *Message) receive(data mem.BufferSlice) {
	m.Free()
	m.data = data.MaterializeToBuffer(mem.DefaultBufferPool())
}

// Bytes returns the message, valid until Free.
func (m *Message) Bytes() []byte {
	if m.data == nil {
		return nil
	}
	return m.data.ReadOnlyData()
}

// Free gives the bytes back; nothing of them may be used afterwards. Safe to call again.
func (m *Message) Free() {
	if m.data != nil {
		m.data.Free()
		m.data = nil
	}
}

// An Answer is a message in wire format that is to be sent. It is sent once; then its bytes belong to
// gRPC, which gives them back to where [NewAnswer] takes them from. The zero Answer is an empty message.
type Answer []byte

// NewAnswer returns an empty Answer with room for 2 KiB, which most answers never exceed: append to it.
func NewAnswer() *Answer { return (*Answer)(answers.Get(0)) }

// Drop gives back an Answer that is not sent.
func (a *Answer) Drop() { answers.Put((*[]byte)(a)) }

func (a *Answer) send() mem.BufferSlice {
	if len(*a) == 0 {
		return nil
	}
	return mem.BufferSlice{mem.NewBuffer((*[]byte)(a), &answers)}
}
