package traffic

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// grpcPrefix comes before a message: not compressed, and its length in four bytes.
const grpcPrefix = 5

// A Request makes Checks in wire format, the same that [Run] sends: for who calls a Check server in its own
// process. Not safe for concurrent use.
type Request struct{ template *template }

// NewRequest returns a Request for secrets of one length.
func NewRequest(method, host, path string, secretLen int) (*Request, error) {
	t, err := newTemplate(method, host, path, secretLen)
	return &Request{t}, err
}

// Make returns the Check with this secret, valid until the next. number differs between all calls.
func (r *Request) Make(secret string, number uint64, now time.Time) []byte {
	r.template.patch([]byte(secret), number, now)
	return r.template.message[grpcPrefix:]
}

// A template is a Check as Envoy sends it for the request of a browser, 1.4 KB, with the places of what
// differs from call to call. Every value that is patched has a fixed length.
type template struct {
	message []byte // with its gRPC prefix
	secret  int    // where it is, secretLen bytes
	request int    // the last digits of x-request-id
	id      int    // of http.id, idDigits
	second  int    // of the request's time, a varint of momentSize bytes
	nano    int
	length  int // of a secret
}

const (
	requestDigits = 12
	idDigits      = 19
	// From 2^28 on a varint has five bytes; seconds have as many until 2^35.
	momentSize = 5
	smallest   = 1 << 28
)

// idOf is what a fresh template has in the place of http.id, and where the numbers of calls begin.
const idOf = uint64(1_000_000_000_000_000_000)

func newTemplate(method, host, path string, secretLen int) (*template, error) {
	secret := strings.Repeat("s", secretLen)
	id := "1000000000000000000"
	const requestID = "6e1a7f0c-52b4-4c3e-9d1f-000000000000"
	moment := &timestamppb.Timestamp{Seconds: 1<<34 - 1, Nanos: 1<<29 - 1}
	// With encode_raw_headers, as generated configurations have it. Pseudo headers come first.
	headers := &corev3.HeaderMap{}
	for _, h := range [][2]string{
		{":authority", host}, {":path", path}, {":method", method}, {":scheme", "https"},
		{"user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/141.0.0.0 Safari/537.36"},
		{"accept", "application/json, text/plain, */*"},
		{"accept-language", "en-US,en;q=0.9,de;q=0.8"},
		{"accept-encoding", "gzip, deflate, br, zstd"},
		{"content-type", "application/json"},
		{"cookie", "session=" + strings.Repeat("0123456789abcdef", 14) + "; theme=dark; consent=necessary.analytics"},
		{"referer", "https://app.example/orders/overview"},
		{"sec-ch-ua", `"Chromium";v="141", "Not?A_Brand";v="8"`},
		{"sec-ch-ua-mobile", "?0"},
		{"sec-ch-ua-platform", `"Linux"`},
		{"sec-fetch-dest", "empty"},
		{"sec-fetch-mode", "cors"},
		{"sec-fetch-site", "same-origin"},
		{"x-forwarded-for", clientIP},
		{"x-forwarded-proto", "https"},
		{"x-request-id", requestID},
		{"x-api-key", secret},
	} {
		headers.Headers = append(headers.Headers, &corev3.HeaderValue{Key: h[0], RawValue: []byte(h[1])})
	}
	address := func(ip string, port uint32) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
		}}}
	}
	check := &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source:      &authv3.AttributeContext_Peer{Address: address(clientIP, clientPort)},
		Destination: &authv3.AttributeContext_Peer{Address: address("10.20.30.40", 8443), Principal: "ingress.app.example"},
		Request: &authv3.AttributeContext_Request{
			Time: moment,
			Http: &authv3.AttributeContext_HttpRequest{
				Id: id, Method: method, Host: host, Path: path, Scheme: "https", Protocol: "HTTP/2", Size: -1,
				HeaderMap: headers,
			},
		},
		ContextExtensions: map[string]string{"virtual_host": "app"},
		MetadataContext: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			"envoy.filters.http.header_to_metadata": {Fields: map[string]*structpb.Value{"tier": structpb.NewStringValue("gold")}},
		}},
		RouteMetadataContext: &corev3.Metadata{},
	}}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(check)
	if err != nil {
		return nil, err
	}
	stamp, err := proto.Marshal(moment)
	if err != nil {
		return nil, err
	}
	m := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body)))
	m = append(m, body...)
	at := bytes.Index(m, stamp)
	t := &template{
		message: m, length: secretLen,
		// After its header's name come the tag and the length of raw_value.
		secret:  bytes.LastIndex(m, []byte("x-api-key")) + len("x-api-key") + 1 + protowire.SizeVarint(uint64(secretLen)),
		request: bytes.Index(m, []byte(requestID)) + len(requestID) - requestDigits,
		id:      bytes.Index(m, []byte(id)),
		second:  at + 1,
		nano:    at + 1 + momentSize + 1,
	}
	if !bytes.HasPrefix(m[t.secret:], []byte(secret)) || t.request < 0 || t.id < 0 || at < 0 || len(stamp) != 2*(1+momentSize) {
		return nil, errors.New("traffic: the request's places were not found")
	}
	return t, nil
}

// Where the client of every request is.
const (
	clientIP   = "192.0.2.17"
	clientPort = 40_000
)

// clone returns a copy to patch.
func (t *template) clone() *template {
	own := *t
	own.message = bytes.Clone(t.message)
	return &own
}

// patch makes the next request: number differs between all calls of a run. It returns the request's time,
// which with http.id and the client's address names it in the access log. Envoy's times are in whole
// microseconds; a fraction with a shorter encoding is moved to later in its second.
func (t *template) patch(secret []byte, number uint64, now time.Time) time.Time {
	copy(t.message[t.secret:t.secret+t.length], secret)
	const hex = "0123456789abcdef"
	for i, n := requestDigits-1, number; i >= 0; i, n = i-1, n>>4 {
		t.message[t.request+i] = hex[n&15]
	}
	for i, n := idDigits-1, idOf+number; i >= 0; i, n = i-1, n/10 {
		t.message[t.id+i] = byte('0' + n%10)
	}
	nanos := now.Nanosecond() / 1000 * 1000
	if nanos < smallest {
		nanos += (smallest/1000 + 1) * 1000
	}
	putMoment(t.message[t.second:], uint64(now.Unix()))
	putMoment(t.message[t.nano:], uint64(nanos))
	return time.Unix(now.Unix(), int64(nanos))
}

func putMoment(at []byte, v uint64) {
	var b [10]byte
	copy(at[:momentSize], protowire.AppendVarint(b[:0], v))
}
