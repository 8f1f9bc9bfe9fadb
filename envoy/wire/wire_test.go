package wire_test

import (
	"bytes"
	"strings"
	"testing"

	"google.golang.org/grpc/encoding"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"keyward/envoy/wire"
)

func TestCut(t *testing.T) {
	long := strings.Repeat("l", 300)
	message := protowire.AppendTag(nil, 1, protowire.BytesType)
	message = protowire.AppendString(message, "short")
	message = protowire.AppendTag(message, 2, protowire.VarintType)
	message = protowire.AppendVarint(message, 1<<40)
	message = protowire.AppendTag(message, 300, protowire.BytesType)
	message = protowire.AppendString(message, long)
	message = protowire.AppendTag(message, 4, protowire.Fixed64Type)
	message = protowire.AppendFixed64(message, 9)
	message = protowire.AppendTag(message, 5, protowire.BytesType)
	message = protowire.AppendString(message, "")
	message = append(message, 6<<3|3, 6<<3|4) // an empty group
	for i, want := range []struct {
		tag     wire.Tag
		content func([]byte) bool
	}{
		{wire.Bytes(1), func(b []byte) bool { return wire.Text(b) == "short" }},
		{wire.Varint(2), func(b []byte) bool { return wire.Number(b) == 1<<40 }},
		{wire.Bytes(300), func(b []byte) bool { return string(b) == long }},
		{wire.Fixed64(4), func(b []byte) bool { return len(b) == 8 }},
		{wire.Bytes(5), func(b []byte) bool { return len(b) == 0 && wire.Text(b) == "" }},
		{6<<3 | 3, func([]byte) bool { return wire.Tag(6<<3|3).IsGroup() && !wire.Bytes(6).IsGroup() }},
	} {
		tag, content, rest, ok := wire.Cut(message)
		if !ok || tag != want.tag || !want.content(content) {
			t.Errorf("field %d: tag %d, content %x, %v", i, tag, content, ok)
		}
		message = rest
	}
	if len(message) != 0 {
		t.Errorf("%d bytes are left", len(message))
	}
}

func TestBrokenMessages(t *testing.T) {
	for name, message := range map[string][]byte{
		"cut tag":            {0x80},
		"cut length":         {0x0a, 0x80},
		"no length":          {0x0a},
		"longer than all":    {0x0a, 2, 'a'},
		"much longer":        {0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01},
		"cut number":         {0x08},
		"field 0":            {0x02, 0},
		"field 2^29":         {0x82, 0x80, 0x80, 0x80, 0x10, 0},
		"wire type 6":        {0x0e, 0},
		"open group":         {0x0b},
		"end of a group":     {0x0c},
		"tag above 32 bits":  {0xfa, 0xff, 0xff, 0xff, 0xff, 0x01, 0},
		"number of 11 bytes": {0x08, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00},
	} {
		if tag, _, _, ok := wire.Cut(message); ok {
			t.Errorf("%s: tag %d, want broken", name, tag)
		}
	}
}

// TestMessagesAreFreed: every reference that is taken is given back once, also when decoding repeats.
func TestMessagesAreFreed(t *testing.T) {
	pool := new(countingPool)
	buffer := func(n int) mem.Buffer { return mem.NewBuffer(pool.Get(n), pool) }
	codec := wire.NewCodec()
	var m wire.Message
	for _, data := range []mem.BufferSlice{{buffer(2000)}, {buffer(2000), buffer(2000)}, {}} {
		if err := codec.Unmarshal(data, &m); err != nil {
			t.Fatal(err)
		}
		data.Free() // as grpc does when Unmarshal has returned
		if got, want := len(m.Bytes()), 2000*len(data); got != want {
			t.Errorf("%d bytes, want %d", got, want)
		}
	}
	m.Free()
	m.Free()
	if pool.out != 0 || m.Bytes() != nil {
		t.Errorf("%d buffers not given back", pool.out)
	}
}

type countingPool struct{ out int }

func (p *countingPool) Get(n int) *[]byte { p.out++; b := make([]byte, n); return &b }
func (p *countingPool) Put(*[]byte)       { p.out-- }

func TestAnswersAreSentAsTheyAre(t *testing.T) {
	codec := wire.NewCodec()
	for _, n := range []int{0, 1, 1000, 3000, 100 << 10} {
		want := bytes.Repeat([]byte{'x'}, n)
		a := wire.NewAnswer()
		*a = append(*a, want...)
		sent, err := codec.Marshal(a)
		if err != nil || !bytes.Equal(sent.Materialize(), want) {
			t.Errorf("%d bytes: sent %d, %v", n, sent.Len(), err)
		}
		sent.Free()
	}
	if b := wire.NewAnswer(); len(*b) != 0 {
		t.Errorf("a new answer holds %d bytes", len(*b))
	}
	if sent, err := codec.Marshal(&wire.Answer{}); err != nil || sent.Len() != 0 {
		t.Errorf("the zero Answer: %v, %v", sent, err)
	}
}

// TestOtherMessages: what is neither goes through the standard codec, up to a length.
func TestOtherMessages(t *testing.T) {
	codec, standard := wire.NewCodec(), encoding.GetCodecV2("proto")
	if codec.Name() != standard.Name() {
		t.Errorf("the codec is named %q, want %q", codec.Name(), standard.Name())
	}
	sent, err := codec.Marshal(&healthpb.HealthCheckRequest{Service: "s"})
	if err != nil {
		t.Fatal(err)
	}
	var got healthpb.HealthCheckRequest
	if err := codec.Unmarshal(sent, &got); err != nil || got.GetService() != "s" {
		t.Errorf("got %v, %v", &got, err)
	}
	huge, err := standard.Marshal(&healthpb.HealthCheckRequest{Service: strings.Repeat("s", 256<<10)})
	if err != nil {
		t.Fatal(err)
	}
	if err := codec.Unmarshal(huge, &got); err == nil {
		t.Error("a message of more than 256 KiB was read")
	}
}
