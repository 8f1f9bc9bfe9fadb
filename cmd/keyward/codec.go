package main

import (
	"errors"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"

	_ "google.golang.org/grpc/encoding/proto" // registers the codec that ours stands in front of
)

// rawCodec gives messages that want them their bytes as they came, and answers that have them theirs as
// they are. Everything else goes through the standard codec.
type rawCodec struct{ encoding.CodecV2 }

// maxMessage is far above any Check that Envoy sends without bodies. Access logs come in larger ones.
const maxMessage = 256 << 10 // bytes

var errTooLong = errors.New("the message is longer than 256 KiB")

func newRawCodec() encoding.CodecV2 { return rawCodec{encoding.GetCodecV2("proto")} }

func (c rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if raw, ok := v.(interface{ UnmarshalBuffers(mem.BufferSlice) error }); ok {
		return raw.UnmarshalBuffers(data)
	}
	if data.Len() > maxMessage {
		return errTooLong
	}
	return c.CodecV2.Unmarshal(data, v)
}

func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if raw, ok := v.(interface {
		MarshalBuffers() (mem.BufferSlice, error)
	}); ok {
		return raw.MarshalBuffers()
	}
	return c.CodecV2.Marshal(v)
}
