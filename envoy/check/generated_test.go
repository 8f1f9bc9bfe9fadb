package check_test

import (
	"cmp"
	"encoding/json"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/envoy/check"
	"keyward/envoy/check/checktest"
	"keyward/limits"
)

var (
	wantedHeaders    = []string{"x-api-key", "x-agent-access-token", "authorization", "x-forwarded-for", "content-type"}
	wantedExtensions = []string{"instance", "agent", "environment", "required_scopes"}
)

// wanted is all there is to want, or, with one header, nothing else.
func wanted(headers []string) checktest.Wanted {
	if len(headers) == 1 {
		return checktest.Wanted{Headers: headers, Extensions: wantedExtensions}
	}
	return checktest.Wanted{Headers: headers, Extensions: wantedExtensions, Payload: "claims", Claims: []string{"iss", "oid", "sub"}, Body: true}
}

// A reading is what a message says.
type reading struct {
	Request   authz.Request
	GRPC      bool
	Code      codes.Code
	Malformed bool
}

func ours(message []byte, headers []string) reading {
	var r reading
	var err error
	want := wanted(headers)
	r.GRPC, err = check.Read(&r.Request, message, want.Headers, want.Extensions, want.Payload, want.Claims, want.Body)
	r.Code, r.Malformed = status.Code(err), errors.Is(err, check.ErrMalformed)
	return r
}

// generated is what generated code makes of it. ambiguous: the message's map has a header in two
// spellings, and it is up to chance which comes first.
func generated(in *authv3.CheckRequest, headers []string) (r reading, ambiguous bool) {
	var err error
	r.GRPC, err = checktest.Fill(&r.Request, in, wanted(headers))
	r.Code = status.Code(err)
	spellings := map[string]int{}
	for name := range in.GetAttributes().GetRequest().GetHttp().GetHeaders() {
		name = strings.ToLower(name)
		spellings[name]++
		ambiguous = ambiguous || spellings[name] > 1 && (name == "content-type" || name == "x-envoy-auth-partial-body")
	}
	return r, ambiguous
}

// same compares two readings. Of what was not read nothing is compared.
func same(t *testing.T, message []byte, want, got reading) {
	t.Helper()
	if want.Code != codes.OK || got.Code != codes.OK {
		want, got = reading{Code: want.Code}, reading{Code: got.Code}
	}
	inOrder := func(a, b authz.Pair) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Value, b.Value)) }
	for _, r := range []*authz.Request{&want.Request, &got.Request} {
		slices.SortFunc(r.Headers, inOrder) // a map has no order; that of the list is tested by itself
		slices.SortFunc(r.Extensions, inOrder)
	}
	if diff := gocmp.Diff(&want, &got, cmpopts.IgnoreUnexported(authz.Request{}), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("%x\n(-generated +ours):\n%s", message, diff)
	}
}

// compare holds our reader against generated code, both ways: what generated code reads, we read the
// same; what the parts that we look at do not allow, we refuse.
func compare(t *testing.T, message []byte) {
	t.Helper()
	for _, headers := range [][]string{wantedHeaders, {"x-api-key"}} {
		got := ours(message, headers)
		in := new(authv3.CheckRequest)
		err := proto.Unmarshal(message, in)
		switch {
		case err == nil && got.Malformed:
			if !hasGroup(message, 0) {
				t.Errorf("%x: generated code reads it and ours does not", message)
			}
		case err == nil:
			if want, ambiguous := generated(in, headers); !ambiguous {
				same(t, message, want, got)
			}
		case !got.Malformed:
			if err := proto.Unmarshal(message, dynamicpb.NewMessage(looked)); err != nil {
				t.Errorf("%x: ours reads it, although what it looks at is broken: %v", message, err)
			}
		}
	}
}

// hasGroup looks for a group wherever there may be a message.
func hasGroup(b []byte, depth int) bool {
	for len(b) > 0 {
		_, kind, n := protowire.ConsumeField(b)
		if n < 0 {
			return false
		}
		if kind == protowire.StartGroupType {
			return true
		}
		if kind == protowire.BytesType && depth < 12 {
			_, _, tag := protowire.ConsumeTag(b)
			if value, m := protowire.ConsumeBytes(b[tag:n]); m >= 0 && hasGroup(value, depth+1) {
				return true
			}
		}
		b = b[n:]
	}
	return false
}

// looked is a CheckRequest with only those fields that are looked at: the others are unknown to it, and
// text that is only looked at when it is wanted is bytes.
var looked = lookedDescriptor()

func lookedDescriptor() protoreflect.MessageDescriptor {
	const text, raw, number32, number64, uint32s = descriptorpb.FieldDescriptorProto_TYPE_STRING, descriptorpb.FieldDescriptorProto_TYPE_BYTES,
		descriptorpb.FieldDescriptorProto_TYPE_INT32, descriptorpb.FieldDescriptorProto_TYPE_INT64, descriptorpb.FieldDescriptorProto_TYPE_UINT32
	scalar := func(n int32, kind descriptorpb.FieldDescriptorProto_Type) *descriptorpb.FieldDescriptorProto {
		return &descriptorpb.FieldDescriptorProto{
			Name: proto.String("f" + string(rune('a')+n)), Number: proto.Int32(n), Type: kind.Enum(),
			Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
		}
	}
	message := func(n int32, name string, repeated bool) *descriptorpb.FieldDescriptorProto {
		f := scalar(n, descriptorpb.FieldDescriptorProto_TYPE_MESSAGE)
		f.TypeName = proto.String(".looked." + name)
		if repeated {
			f.Label = descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum()
		}
		return f
	}
	file := &descriptorpb.FileDescriptorProto{Name: proto.String("looked.proto"), Package: proto.String("looked"), Syntax: proto.String("proto3")}
	define := func(name string, fields ...*descriptorpb.FieldDescriptorProto) {
		file.MessageType = append(file.MessageType, &descriptorpb.DescriptorProto{Name: proto.String(name), Field: fields})
	}
	define("Check", message(1, "Attributes", false))
	define("Attributes", message(1, "Peer", false), message(4, "Request", false), message(10, "Entry", true), scalar(11, raw))
	define("Peer", message(1, "Address", false))
	define("Address", message(1, "Socket", false))
	define("Socket", scalar(2, text), scalar(3, uint32s), scalar(4, raw))
	define("Request", message(1, "Time", false), message(2, "HTTP", false))
	define("Time", scalar(1, number64), scalar(2, number32))
	define("HTTP", scalar(1, text), scalar(2, text), message(3, "Entry", true), scalar(4, text), scalar(5, text), scalar(11, raw), scalar(12, raw), message(13, "List", false))
	define("Entry", scalar(1, raw), scalar(2, raw))
	define("List", message(1, "Header", true))
	define("Header", scalar(1, raw), scalar(2, raw), scalar(3, raw))
	f, err := protodesc.NewFile(file, nil)
	if err != nil {
		panic(err)
	}
	return f.Messages().ByName("Check")
}

// fullRequest is as Envoy sends them.
func fullRequest(key string) *authv3.CheckRequest {
	address := func(ip string, port uint32) *authv3.AttributeContext_Peer {
		return &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
			SocketAddress: &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}},
		}}}
	}
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source:      address("203.0.113.9", 51234),
		Destination: address("198.51.100.7", 8443),
		Request: &authv3.AttributeContext_Request{
			Time: &timestamppb.Timestamp{Seconds: 1_700_000_000, Nanos: 123_456_000},
			Http: &authv3.AttributeContext_HttpRequest{
				Id: "13718393372137239113", Method: "POST", Path: "/v1/agents/sales/completions?stream=true", Host: "api.example.com", Scheme: "https", Size: 482, Protocol: "HTTP/2",
				Headers: map[string]string{
					":authority": "api.example.com", ":method": "POST", ":path": "/v1/agents/sales/completions?stream=true", ":scheme": "https",
					"accept": "application/json, text/event-stream", "accept-encoding": "gzip, deflate, br, zstd", "accept-language": "en-US,en;q=0.9",
					"cache-control": "no-cache", "content-length": "482", "content-type": "application/json",
					"origin": "https://app.example.com", "pragma": "no-cache", "priority": "u=1, i", "referer": "https://app.example.com/chat",
					"user-agent":  "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
					"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "x-api-key": key,
					"x-envoy-external-address": "203.0.113.9", "x-forwarded-for": "203.0.113.9", "x-forwarded-proto": "https",
					"x-request-id": "7d3f1a52-9f0b-4a63-8f4e-3f1f5a0e9b1c",
				},
			},
		},
		ContextExtensions: map[string]string{"instance": "demo", "team": "payments"},
		MetadataContext:   &corev3.Metadata{},
	}}
}

// withToken adds a body, and the claims of a token as Envoy's jwt_authn filter writes them.
func withToken(in *authv3.CheckRequest, claims map[string]any) *authv3.CheckRequest {
	payload, err := structpb.NewStruct(map[string]any{"claims": claims})
	if err != nil {
		panic(err)
	}
	in.Attributes.MetadataContext = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"envoy.filters.http.jwt_authn": payload}}
	in.Attributes.Request.Http.RawBody = []byte(`{"agent_name":"sales"}`)
	in.Attributes.Request.Http.Headers["x-envoy-auth-partial-body"] = "false"
	return in
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// field puts bytes into a field; of them a message is made.
func field(number protowire.Number, content ...[]byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), slices.Concat(content...))
}

func number(n protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), v)
}

// oddMessages are well-formed or not, and such as no Envoy sends.
func oddMessages() map[string][]byte {
	http := func(content ...[]byte) []byte { return field(1, field(4, field(2, content...))) }
	source := func(content ...[]byte) []byte {
		return field(1, field(1, content...), field(4, field(2)))
	}
	entry := func(key, value string) []byte { return slices.Concat(field(1, []byte(key)), field(2, []byte(value))) }
	socket := field(1, field(2, []byte("203.0.113.9")), number(3, 4711))
	start := field(1, field(4, field(1, number(1, 1_700_000_000), number(2, 5000)), field(2)), field(1, field(1, socket)))
	claims := func(value ...[]byte) []byte {
		value = [][]byte{field(1, field(1, []byte("sub")), field(2, value...))}
		value = [][]byte{field(1, field(1, []byte("claims")), field(2, field(5, value...)))}
		return field(1, field(4, field(2)), field(11, field(1, field(1, []byte("envoy.filters.http.jwt_authn")), field(2, value...))))
	}
	deep := func(n int) []byte {
		b := field(3, []byte("me"))
		for range n {
			b = field(6, field(1, b)) // a list of one
		}
		return b
	}
	group := []byte{0x9b, 0x06, 0x9c, 0x06} // field 99
	return map[string][]byte{
		"empty":                     {},
		"attributes empty":          field(1),
		"request empty":             field(1, field(4)),
		"http empty":                http(),
		"merged":                    slices.Concat(http(field(2, []byte("GET"))), http(field(4, []byte("/a"))), start),
		"last scalar":               http(field(4, []byte("/a")), field(4, []byte("/b"))),
		"last of a map":             http(field(3, entry("x-api-key", "a")), field(3, entry("x-api-key", "b")), field(3, entry("X-Api-Key", "c"))),
		"map and list":              http(field(13, field(1, entry("x-api-key", "c"))), field(3, entry("x-api-key", "a")), field(13, field(1, entry("x-api-key", "b")))),
		"entry without key":         http(field(3, field(2, []byte("v")))),
		"entry without value":       http(field(3, field(1, []byte("x-api-key")))),
		"entry, last key":           http(field(3, entry("other", "a"), entry("x-api-key", "b"))),
		"raw value":                 http(field(13, field(1, entry("x-api-key", "a"), field(3, []byte("\xff"))))),
		"raw value, empty":          http(field(13, field(1, entry("x-api-key", "a"), field(3)))),
		"not UTF-8 in a path":       http(field(4, []byte("/\xff"))),
		"not UTF-8 in a key":        http(field(3, entry("x-api-key", "\xff"))),
		"not UTF-8 in a list":       http(field(13, field(1, entry("x-api-key", "\xff")))),
		"not UTF-8 where unread":    http(field(3, entry("cookie", "\xff"))),
		"not UTF-8 name":            http(field(3, entry("x-api-ke\xff", "a"))),
		"Kelvin":                    http(field(3, entry("x-api-\u212aey", "a"))),
		"content types":             http(field(13, field(1, entry("content-type", "application/grpc"))), field(3, entry("content-type", "text/html"))),
		"content type of a map":     http(field(3, entry("content-type", "application/grpc+proto"))),
		"wrong types":               slices.Concat(number(1, 1), field(1, number(4, 1), field(4, field(2, number(3, 1), number(4, 7), number(13, 1))))),
		"unknown fields":            slices.Concat(field(77, []byte("?")), http(field(99, []byte("x")), []byte{0xa1, 0x06, 1, 2, 3, 4, 5, 6, 7, 8}, []byte{0xa5, 0x06, 1, 2, 3, 4})),
		"group":                     slices.Concat(start, group),
		"group inside":              http(group),
		"group in an entry":         http(field(3, entry("a", "b"), group)),
		"group, open":               http([]byte{0x9b, 0x06}),
		"group's end":               http([]byte{0x9c, 0x06}),
		"field 0":                   http([]byte{0x02, 0x00}),
		"cut":                       http(field(4, []byte("/a")))[:5],
		"cut inside":                http(append(field(4, []byte("/a")), 0x22, 5, 'x')),
		"cut where unread":          http(field(3, []byte{0x0a, 6, 'c', 'o', 'o', 'k', 'i', 'e', 0x12, 9})),
		"pipe after socket":         source(field(1, socket, field(2, field(1, []byte("/tmp/s"))))),
		"socket after pipe":         source(field(1, field(2, field(1, []byte("/tmp/s"))), socket)),
		"internal after socket":     source(field(1, socket), field(1, field(3))),
		"socket merged":             source(field(1, field(1, field(2, []byte("203.0.113.9")))), field(1, field(1, number(3, 4711)))),
		"named port":                source(field(1, field(1, field(2, []byte("203.0.113.9")), number(3, 4711), field(4, []byte("http"))))),
		"port of 33 bits":           slices.Concat(start, source(field(1, field(1, number(3, 1<<32+80))))),
		"start of 33 bits of nanos": field(1, field(4, field(1, number(1, 1_700_000_000), number(2, 1<<32+5000)), field(2)), field(1, field(1, socket))),
		"start before 1970":         field(1, field(4, field(1, number(1, 1<<64-5)), field(2)), field(1, field(1, socket))),
		"extensions":                field(1, field(10, entry("agent", "a")), field(10, entry("agent", "b")), field(10, entry("team", "c")), field(4, field(2))),
		"id":                        http(field(1, []byte("not a number"))),
		"a body":                    http(field(11, []byte("{}")), field(3, entry("x-envoy-auth-partial-body", "false"))),
		"a body that is cut":        http(field(12, []byte("{\xff")), field(13, field(1, entry("x-envoy-auth-partial-body", "true")))),
		"no body":                   http(field(3, entry("x-envoy-auth-partial-body", "false"))),
		"two bodies":                http(field(11, []byte("a")), field(12, []byte("b")), field(11, []byte("c")), field(12)),
		"not UTF-8 in a body":       http(field(11, []byte("\xff"))),
		"claims":                    claims(field(3, []byte("me"))),
		"claims, another namespace": field(1, field(4, field(2)), field(11, field(1, entry("other", "x")))),
		"claims, a number":          claims([]byte{0x11, 1, 2, 3, 4, 5, 6, 7, 8}),
		"claims, null":              claims(number(1, 0)),
		"claims, a struct":          claims(field(5, field(1, entry("a", "")))),
		"claims, text and then not": claims(field(3, []byte("me")), number(4, 1)),
		"claims, text twice":        claims(field(3, []byte("me")), field(3, []byte("you"))),
		"claims, not UTF-8":         claims(field(3, []byte("\xff"))),
		"claims in two":             slices.Concat(claims(field(3, []byte("me"))), field(1, field(11, field(2, []byte("?")))), claims(field(3, []byte("you")))),
		"claims, cut":               field(1, field(4, field(2)), field(11, field(1, field(1, []byte("envoy.filters.http.jwt_authn")), field(2, []byte{0x0a, 9})))),
		"claims, merged": field(1, field(4, field(2)), field(11, field(1, field(1, []byte("envoy.filters.http.jwt_authn")),
			field(2, field(1, field(1, []byte("claims")), field(2, field(5, field(1, field(1, []byte("iss")), field(2, field(3, []byte("a")))))),
				field(2, field(5, field(1, field(1, []byte("sub")), field(2, field(3, []byte("b"))))))))))),
		"claims, the last of a name": field(1, field(4, field(2)), field(11, field(1, field(1, []byte("envoy.filters.http.jwt_authn")),
			field(2, field(1, field(1, []byte("claims")), field(2, field(5,
				field(1, field(1, []byte("sub")), field(2, field(3, []byte("a")))), field(1, field(1, []byte("sub")), field(2, field(3, []byte("b"))))))))))),
		"claims, deep":          claims(deep(2000)),
		"long length of length": {0x0a, 0x80, 0x80, 0x80, 0x00},
	}
}

func TestReadsAsGeneratedCodeDoes(t *testing.T) {
	for name, message := range oddMessages() {
		t.Run(name, func(t *testing.T) { compare(t, message) })
	}
	full := fullRequest(secret)
	compare(t, marshal(t, full))
	list := &corev3.HeaderMap{}
	for name, value := range full.GetAttributes().GetRequest().GetHttp().GetHeaders() {
		list.Headers = append(list.Headers, &corev3.HeaderValue{Key: name, RawValue: []byte(value)})
	}
	full.Attributes.Request.Http.Headers, full.Attributes.Request.Http.HeaderMap = nil, list
	compare(t, marshal(t, full))
	compare(t, marshal(t, withToken(fullRequest(secret), tokenClaims)))
}

var tokenClaims = map[string]any{"iss": "https://login.example", "sub": "s", "oid": 7, "aud": []any{"a", map[string]any{"b": nil}}}

// TestListKeepsItsOrder: which address counts depends on it.
func TestListKeepsItsOrder(t *testing.T) {
	in := request("/", map[string]string{"x-forwarded-for": "0"})
	list := &corev3.HeaderMap{}
	for _, v := range []string{"1", "2", "3"} {
		list.Headers = append(list.Headers, &corev3.HeaderValue{Key: "X-Forwarded-For", Value: v})
	}
	in.Attributes.Request.Http.HeaderMap = list
	message := marshal(t, in)
	var r authz.Request
	if _, err := check.Read(&r, message, wantedHeaders, nil, "", nil, false); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, h := range r.Headers {
		got = append(got, h.Name+"="+h.Value)
	}
	want := []string{"x-forwarded-for=0", "x-forwarded-for=1", "x-forwarded-for=2", "x-forwarded-for=3"}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestSpellingsAreBounded: to compare each with all others must not become anybody's weapon.
func TestSpellingsAreBounded(t *testing.T) {
	spelling := func(n int) string {
		b := []byte("x-agent-access-token")
		for i := range b {
			if n>>i&1 == 1 && b[i] != '-' {
				b[i] -= 'a' - 'A'
			}
		}
		return string(b)
	}
	for _, many := range []int{60, 5000} {
		headers := map[string]string{}
		for n := range many {
			headers[spelling(n*2)] = "v"
		}
		var r authz.Request
		_, err := check.Read(&r, marshal(t, request("/", headers)), wantedHeaders, nil, "", nil, false)
		if refused := errors.Is(err, check.ErrMalformed); refused != (len(headers) > 64) {
			t.Errorf("%d spellings: %v", len(headers), err)
		}
	}
}

// TestDamagedMessages cuts and changes a real one everywhere.
func TestDamagedMessages(t *testing.T) {
	message := marshal(t, withToken(fullRequest(secret), tokenClaims))
	random := rand.New(rand.NewPCG(1, 2))
	step := 1
	if raceEnabled {
		step = 10
	}
	for i := 0; i < len(message); i += step {
		compare(t, message[:i])
		damaged := slices.Clone(message)
		damaged[i] = byte(random.Uint32())
		compare(t, damaged)
		damaged[i] ^= 1 << random.IntN(8)
		compare(t, damaged)
	}
}

func FuzzCheckRequest(f *testing.F) {
	for _, message := range oddMessages() {
		f.Add(message)
	}
	f.Add(marshal(f, fullRequest(secret)))
	f.Add(marshal(f, withToken(fullRequest(secret), tokenClaims)))
	s := newAnswering(f)
	f.Fuzz(func(t *testing.T, message []byte) {
		compare(t, message)
		// Whatever comes in, an answer goes out, whole, or an error that says whose fault it is.
		answer, err := s.Answer(t.Context(), message, nil)
		switch status.Code(err) {
		case codes.OK:
			if !check.Complete(answer) {
				t.Errorf("half an answer: %x", answer)
			}
		case codes.InvalidArgument, codes.Unimplemented, codes.ResourceExhausted:
		default:
			t.Errorf("%x: %v", message, err)
		}
	})
}

// newAnswering returns a server for whom every key is known.
func newAnswering(t testing.TB) *check.Server {
	t.Helper()
	f, peppers := newFacts(), apikey.Peppers{Current: apikey.NewPepper(1, false)}
	body, err := authz.ParseSource("$.agent_name")
	if err != nil {
		t.Fatal(err)
	}
	a, err := authz.New(authz.Config{
		AllowCORS: true, Credentials: authz.Credentials{QueryParameter: "key"}, JWT: authz.JWT{Issuer: "https://login.example", Payload: "claims"},
		Rules: []authz.Rule{{Path: "/", Agent: []authz.Source{body}, Mode: authz.Optional, Context: "a:b"}},
	}, f, f, peppers, f, f)
	if err != nil {
		t.Fatal(err)
	}
	s, err := check.New(a, check.Config{Leases: authz.NewLeaseIDs(peppers)}, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestWritesAsGeneratedCodeDoes compares every answer there is, and random ones.
func TestWritesAsGeneratedCodeDoes(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	ids := authz.NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(1, false)})
	for _, cfg := range []check.Config{
		{Leases: ids},
		{Leases: ids, ErrorResponse: true, Deprecation: true, Realm: "a realm", Identity: check.Identity{Agent: "x-a", User: check.Off, Scopes: "x-keyward-user", UserIdentity: "x-user-identity"}, LegacyRateLimit: true},
	} {
		s, err := check.New(nil, cfg, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		plain, err := checktest.New(nil, cfg)
		if err != nil {
			t.Fatal(err)
		}
		reasons := authz.Reasons()
		rounds := 20
		if raceEnabled {
			rounds = 2
		}
		for i := range rounds * len(reasons) {
			d := randomDecision(random)
			d.Reason = reasons[i%len(reasons)]
			grpc := random.IntN(2) == 0
			if d.Outcome() == authz.Allowed {
				sameAnswer(t, plain.Allow(d), s.Allow(d))
			} else {
				sameAnswer(t, plain.Deny(d, grpc), s.Deny(d, grpc))
			}
			for _, cause := range []error{apikey.ErrUndecided, &apikey.BusyError{RetryAfter: d.RetryAfter}} {
				want, wantErr := plain.Failure(d, grpc, cause)
				got, gotErr := s.Failure(d, grpc, cause)
				if status.Code(wantErr) != status.Code(gotErr) {
					t.Errorf("failure: got %v, want %v", gotErr, wantErr)
				} else if wantErr == nil {
					sameAnswer(t, want, got)
				}
			}
		}
	}
}

// TestWritesEveryLength: all that holds a text of n bytes passes the lengths where one more byte is needed
// to say so, one after the other.
func TestWritesEveryLength(t *testing.T) {
	cfg := check.Config{Leases: authz.NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(1, false)})}
	s, err := check.New(nil, cfg, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := checktest.New(nil, cfg)
	if err != nil {
		t.Fatal(err)
	}
	d := &authz.Decision{Reason: authz.ReasonKey, Key: &apikey.Key{Type: apikey.TypeUser}}
	for _, around := range []int{1 << 7, 1 << 14} {
		for n := max(0, around-1100); n < around+4; n++ { // an allow has less than 1,100 bytes beside it
			d.Key.InstanceID = strings.Repeat("i", n)
			got := new(authv3.CheckResponse)
			if err := proto.Unmarshal(s.Allow(d), got); err != nil || !proto.Equal(plain.Allow(d), got) {
				t.Fatalf("an instance of %d bytes: %v, or not as generated code has it", n, err)
			}
		}
	}
}

// TestScopesAreCappedByThePolicy: what an upstream is told, through the authorizer itself.
func TestScopesAreCappedByThePolicy(t *testing.T) {
	for name, tt := range map[string]struct{ key, allowed apikey.Scopes }{
		"no cap":           {apikey.Scopes{"a:b", "c"}, nil},
		"within":           {apikey.Scopes{"a:b", "c"}, apikey.Scopes{"a:*", "c", "d"}},
		"narrower":         {apikey.Scopes{"a:*", "c"}, apikey.Scopes{"a:b", "a:x:y"}},
		"the key has all":  {nil, apikey.Scopes{"a:b", "c:*"}},
		"neither says any": {nil, nil},
		"nothing in both":  {apikey.Scopes{"a:b"}, apikey.Scopes{"c"}},
		"nothing allowed":  {apikey.Scopes{"a:b"}, apikey.Scopes{}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFacts()
			capped := *record
			capped.Scopes = tt.key
			f.find = func() (*apikey.Key, error) { return &capped, nil }
			f.policy.AllowedScopes = tt.allowed
			s, _, _ := newServer(t, f, authz.Config{}, check.Config{})
			out, err := checkOnce(t, s, t.Context(), withKey("/"))
			if err != nil {
				t.Fatal(err)
			}
			want := strings.Join(tt.key.Intersect(nil, tt.allowed).Strings(), " ")
			if tt.key == nil && tt.allowed == nil {
				want = "*"
			}
			got, sent := headersOf(out.GetOkResponse().GetHeaders())["x-keyward-scopes"]
			removed := slices.Contains(out.GetOkResponse().GetHeadersToRemove(), "x-keyward-scopes")
			if got != want || sent != (want != "") || removed == sent {
				t.Errorf("got %q, sent %v, removed %v, want %q", got, sent, removed, want)
			}
		})
	}
}

func sameAnswer(t *testing.T, want *authv3.CheckResponse, message []byte) {
	t.Helper()
	got := new(authv3.CheckResponse)
	if err := proto.Unmarshal(message, got); err != nil {
		t.Fatalf("%x: %v", message, err)
	}
	for _, m := range []*authv3.CheckResponse{want, got} { // there are several ways to escape a character
		for _, h := range m.GetOkResponse().GetHeaders() {
			var identity any
			if h.GetHeader().GetKey() == "x-user-identity" && json.Unmarshal([]byte(h.GetHeader().GetValue()), &identity) == nil {
				again, _ := json.Marshal(identity)
				h.Header.Value = string(again)
			}
		}
		for _, refused := range []*authv3.DeniedHttpResponse{m.GetDeniedResponse(), m.GetErrorResponse()} {
			var body any
			if refused != nil && json.Unmarshal([]byte(refused.GetBody()), &body) == nil {
				again, _ := json.Marshal(body)
				refused.Body = string(again)
			}
		}
	}
	if diff := gocmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Fatalf("(-generated +ours):\n%s", diff)
	}
	if !check.Complete(message) {
		t.Fatalf("taken for half an answer: %v", got)
	}
}

// randomDecision makes one with texts of every length that matters, around those of one and two bytes.
func randomDecision(random *rand.Rand) *authz.Decision {
	text := func() string {
		n := []int{0, 1, 20, 64, 127, 128, 300, 16_383, 16_384, 20_000}[min(random.IntN(60), 9)]
		if random.IntN(6) != 0 {
			n = random.IntN(40)
		}
		const letters = "abcXYZ019._- \"\\<&é\n"
		b := make([]byte, 0, n)
		for len(b) < n {
			if random.IntN(20) == 0 {
				b = append(b, letters[random.IntN(len(letters))])
			} else {
				b = append(b, byte('a'+random.IntN(26)))
			}
		}
		return strings.ToValidUTF8(string(b), "?")
	}
	d := &authz.Decision{
		CredentialHeaders: []string{"x-api-key", "x-agent-access-token"}, CredentialQuery: "key",
		CredentialSent: random.IntN(2) == 0, InAuthorization: random.IntN(2) == 0, InQuery: random.IntN(2) == 0,
		MissingScope: apikey.Scope(text()), Limit: limits.Class(1 + random.IntN(6)),
		Rate:       limits.Rate{Burst: random.Int64N(1000), Interval: time.Duration(random.Int64N(1e10))},
		RetryAfter: time.Duration(random.Int64N(1e12)), Leased: random.IntN(2) == 0,
	}
	if random.IntN(4) == 0 {
		d.Shadowed = authz.Shadowed(random.Uint32())
	}
	quota := func() (*apikey.Quota, limits.Quota) {
		judged := limits.Quota{Limit: random.Int64N(1e9), Window: time.Duration(random.Int64N(1e15)), Lockout: time.Minute}
		if random.IntN(3) == 0 {
			judged.Window, judged.Period = 0, limits.Day+limits.Period(random.IntN(2))
		}
		return &apikey.Quota{Name: text(), Context: text()}, judged
	}
	if d.Limit == limits.ClassGlobalQuota || d.Limit == limits.ClassPrincipalQuota || d.Limit == limits.ClassKeyQuota {
		d.Quota, d.QuotaLimit = quota()
	}
	for range random.IntN(4) {
		one := authz.Standing{Standing: limits.Standing{
			Class: limits.Class(1 + random.IntN(6)), Limit: random.Int64N(1e9), Remaining: random.Int64N(100), ResetsIn: time.Duration(random.Int64N(1e12)),
		}}
		if one.Class == limits.ClassInstance || one.Class == limits.ClassBurst {
			one.Rate = d.Rate
		} else if one.Class != limits.ClassConcurrency {
			one.Quota, one.QuotaLimit = quota()
		}
		d.Standings = append(d.Standings, one)
	}
	for i := range d.ID {
		d.ID[i] = byte(random.Uint32())
	}
	if random.IntN(2) == 0 {
		d.Concurrent = 1 + random.Int64N(1e6)
	}
	if random.IntN(4) != 0 {
		d.Key = &apikey.Key{ID: apikey.ID(d.ID), InstanceID: text(), Type: []apikey.Type{apikey.TypeUser, apikey.TypeAgent, apikey.TypeInstance}[random.IntN(3)], AgentName: text(), UserPrincipalName: text()}
		for n := range random.IntN(3) {
			d.Key.Generations = append(d.Key.Generations, apikey.Generation{Number: n + 1, CreatedAt: time.Unix(random.Int64N(1e10), 0)})
			if random.IntN(2) == 0 {
				d.Key.Generations[n].ValidUntil = time.Unix(random.Int64N(1e10), random.Int64N(1e9))
			}
			d.Key.Generation = 1 + random.IntN(2)
		}
		for range random.IntN(5) {
			d.Key.Scopes = append(d.Key.Scopes, apikey.Scope(text()))
		}
		d.Lease = limits.Lease{Cell: authz.LeaseCell(d.Key.ID), HTTP: random.Uint64()}
	} else {
		d.Leased = false
		if random.IntN(2) == 0 {
			d.Holder = authz.Holder{Issuer: "https://login.example", Subject: text(), UPN: text(), ID: text()}
		}
	}
	return d
}
