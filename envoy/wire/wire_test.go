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

func TestWalk(t *testing.T) {
	message := protowire.AppendTag(nil, 1, protowire.BytesType)
	message = protowire.AppendString(message, "short")
	message = protowire.AppendTag(message, 2, protowire.VarintType)
	message = protowire.AppendVarint(message, 1<<40)
	message = protowire.AppendTag(message, 300, protowire.BytesType)
	message = protowire.AppendString(message, strings.Repeat("l", 300))
	message = protowire.AppendTag(message, 4, protowire.Fixed64Type)
	message = protowire.AppendFixed64(message, 9)
	message = protowire.AppendTag(message, 5, protowire.BytesType)
	message = protowire.AppendString(message, "")
	f := wire.Walk(message)
	for i, ok := range []func() bool{
		func() bool { return f.IsBytes(1) && !f.IsBytes(2) && !f.IsVarint(1) && wire.Text(f.Bytes) == "short" },
		func() bool { return f.IsVarint(2) && f.Varint == 1<<40 },
		func() bool { return f.IsBytes(300) && len(f.Bytes) == 300 },
		func() bool { return f.Is(4, protowire.Fixed64Type) },
		func() bool { return f.IsBytes(5) && len(f.Bytes) == 0 },
	} {
		if !f.Next() || !ok() {
			t.Errorf("field %d: %+v", i, f)
		}
	}
	if f.Next() || f.Broken {
		t.Errorf("after the last field: %+v", f)
	}
}

func TestBrokenMessages(t *testing.T) {
	for name, message := range map[string][]byte{
		"cut tag":            {0x80},
		"cut length":         {0x0a, 0x80},
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
		f := wire.Walk(message)
		if f.Next() || !f.Broken || f.Next() {
			t.Errorf("%s: %+v, want broken", name, f)
		}
	}
	group := []byte{0x0b, 0x0c}
	if f := wire.Walk(group); !f.Next() || !f.Is(1, protowire.StartGroupType) || f.Next() || f.Broken {
		t.Errorf("a group: %+v, want it skipped", f)
	}
	if f := (wire.Fields{Rest: group, NoGroups: true}); f.Next() || !f.Broken {
		t.Errorf("a group where there are to be none: %+v, want broken", f)
	}
	f := wire.Walk([]byte{0x0a, 1, 'a', 0x0b})
	if !f.Next() || f.Broken || f.Next() || !f.Broken {
		t.Errorf("broken after a good field: %+v", f)
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
