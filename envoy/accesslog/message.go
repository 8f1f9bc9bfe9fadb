package accesslog

import "google.golang.org/grpc/mem"

// A Message is one message of either service as it came over the wire, unread. It is what the services
// give to the server's codec, whose Unmarshal(data, v) must be, for a v that has the method,
//
//	return v.UnmarshalBuffers(data)
//
// and nothing else: the bytes are neither looked at nor copied nor freed by the codec.
type Message struct {
	data mem.Buffer
}

// UnmarshalBuffers takes a reference to the bytes, in one piece: a message that came in several is
// copied into a pooled buffer. It may be called again, and then replaces what was there.
func (m *Message) UnmarshalBuffers(data mem.BufferSlice) error {
	m.Free()
	m.data = data.MaterializeToBuffer(mem.DefaultBufferPool())
	return nil
}

// Free gives the bytes back; nothing of them may be used afterwards. Safe to call again.
func (m *Message) Free() {
	if m.data != nil {
		m.data.Free()
		m.data = nil
	}
}

func (m *Message) bytes() []byte {
	if m.data == nil {
		return nil
	}
	return m.data.ReadOnlyData()
}

// A Reply is the answer of both services, which has no fields. The codec's Marshal(v) must be, for a v
// that has the method,
//
//	return v.MarshalBuffers()
type Reply struct{}

// MarshalBuffers returns no bytes.
func (*Reply) MarshalBuffers() (mem.BufferSlice, error) { return nil, nil }
