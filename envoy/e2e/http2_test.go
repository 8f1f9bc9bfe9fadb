package e2e_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

// A field is a header field of HTTP/2, which is sent as it is: net/http refuses to send what is wrong.
type field struct{ name, value string }

// The frames and flags of RFC 9113 that are needed here.
const (
	frameData, frameHeaders, frameReset, frameSettings, framePing, frameGoAway = 0, 1, 3, 4, 6, 7

	flagEndStream, flagAck, flagEndHeaders = 1, 1, 4
)

// wellFormed reports whether a server has to take the fields. Envoy hangs up on whoever sends others, and
// takes a second for it.
func wellFormed(fields []field) bool {
	return !slices.ContainsFunc(fields, func(f field) bool {
		return f.name == "connection" || f.name != strings.ToLower(f.name) || strings.ContainsAny(f.name, " \t\r\n\x00") || strings.ContainsAny(f.value, "\r\n\x00")
	})
}

// http2 sends one request on a connection of its own, with a body and trailers if there are any. It
// reports whether the upstream answered; 503 is tried again, as a [caller] does. For any goroutine.
func (f *front) http2(t *testing.T, header, trailer []field) bool {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		body, unavailable := f.http2Once(t, header, trailer)
		if !unavailable || time.Now().After(end) {
			return json.Valid(body) && bytes.Contains(body, []byte(`"Target"`))
		}
	}
}

func (f *front) http2Once(t *testing.T, header, trailer []field) (body []byte, unavailable bool) {
	t.Helper()
	conn, err := net.Dial("tcp", f.address)
	if err != nil {
		t.Error(err)
		return nil, false
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(patience))
	out := bytes.NewBufferString("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	writeFrame(out, frameSettings, 0, 0, nil)
	const stream = 1
	if trailer == nil {
		writeFrame(out, frameHeaders, flagEndHeaders|flagEndStream, stream, block(header))
	} else {
		writeFrame(out, frameHeaders, flagEndHeaders, stream, block(header))
		writeFrame(out, frameData, 0, stream, []byte("body"))
		writeFrame(out, frameHeaders, flagEndHeaders|flagEndStream, stream, block(trailer))
	}
	if _, err := conn.Write(out.Bytes()); err != nil {
		return nil, false // hung up on
	}
	for {
		kind, flags, id, payload, err := readFrame(conn)
		if err != nil {
			return nil, false
		}
		switch kind {
		case frameSettings, framePing:
			if flags&flagAck == 0 {
				ack := new(bytes.Buffer)
				if kind == frameSettings {
					payload = nil
				}
				writeFrame(ack, kind, flagAck, 0, payload)
				if _, err := conn.Write(ack.Bytes()); err != nil {
					return nil, false
				}
			}
		case frameReset, frameGoAway:
			return nil, false
		case frameHeaders:
			// Envoy writes ":status" first: 503 has no short form, so it is there in full or in Huffman's code.
			unavailable = unavailable || bytes.Contains(payload[:min(len(payload), 12)], []byte("503")) || bytes.Contains(payload[:min(len(payload), 12)], []byte{0x6c, 0x0c})
		case frameData:
			body = append(body, payload...)
		}
		if id == stream && flags&flagEndStream != 0 && (kind == frameData || kind == frameHeaders) {
			return body, unavailable
		}
	}
}

func writeFrame(w *bytes.Buffer, kind, flags byte, stream uint32, payload []byte) {
	n := len(payload)
	w.Write([]byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags})
	_ = binary.Write(w, binary.BigEndian, stream)
	w.Write(payload)
}

func readFrame(r io.Reader) (kind, flags byte, stream uint32, payload []byte, err error) {
	var head [9]byte
	if _, err = io.ReadFull(r, head[:]); err != nil {
		return
	}
	payload = make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
	_, err = io.ReadFull(r, payload)
	return head[3], head[4], binary.BigEndian.Uint32(head[5:]) &^ (1 << 31), payload, err
}

// block is a header block of literal fields without indexing, RFC 7541 section 6.2.2.
func block(fields []field) []byte {
	var b []byte
	text := func(s string) {
		n := len(s)
		if n < 127 {
			b = append(b, byte(n))
		} else {
			b = append(b, 127)
			for n -= 127; n >= 128; n >>= 7 {
				b = append(b, byte(n)|128)
			}
			b = append(b, byte(n))
		}
		b = append(b, s...)
	}
	for _, f := range fields {
		b = append(b, 0)
		text(f.name)
		text(f.value)
	}
	return b
}
