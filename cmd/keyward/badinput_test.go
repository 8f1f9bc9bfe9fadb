package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/limits"
)

// The tests of this file go through the catalogue of bad input, reference/reliability.md (c), rows 1 to
// 73: each case begins with its row's number and words. Where DESIGN §2 wants another answer than the
// row, it decides, and the case says so.
//
// Rows that other tests hold, because they need a real Envoy, a clock or another layer:
//
//	29 61 KiB headers, 101 headers     Envoy's own limits; what it lets through is row 61 here
//	38 disabled key                    authz TestDecisions: "disabled"
//	39 expired, expiry == now          authz TestDecisions, e2e TestUnauthorized/ToTheInstantOfExpiry
//	41 inactive too long               authz TestIdleIsAskedOfTheStore
//	42 rotated key                     authz TestDecisions: "rotated away"
//	45 scope tricks                    apikey TestParseScope, FuzzParseScope, FuzzScopes; a few here
//	48 X-Forwarded-For                 authz TestClientAddress, FuzzClientAddress; with peer here
//	51 x_key_id, X.Key.Id              e2e TestSpoofedIdentityNeverArrives
//	52 Connection: x-key-id            e2e TestSpoofedIdentityNeverArrives
//	53 identity header in trailers     e2e TestSpoofedTrailersNeverArrive
//	54 CR, LF in a tenant's name       admin TestKeyInputRefused; check TestValuesThatNoHeaderCanCarryAreLeftOut
//	56 upgrades                        e2e TestLeaseEndings (websocket, CONNECT), TestGRPCCallers
//	64 Check without certificate       TestClientCertificates; e2e TestTLSWithClientCertificates
//	67 burst 0, NaN, 2^63 …            apikey TestLimitsValidate, manage TestBadBodies, FuzzLimits
//	69 max_concurrent 0                manage TestBadBodies: 400, "disable the key" (DESIGN §8)
//	71 ALS message of 100 MB           accesslog TestHugeMessagesAreRefusedUnread; the server's own bound here
//	72 management JSON                 manage TestBadBodies, FuzzDecode, FuzzRequests
//	73 expirationDate                  admin TestKeyInputRefused, manage TestBadBodies
//
// Row 68 cannot apply: a request has no cost but one.

// A wired is keyward as serve wires it, on a store and listeners of its own, in this process: so its
// reads of the store can be counted.
type wired struct {
	*service
	config string
	conn   *grpc.ClientConn
	log    *lockedBuffer
	asked  uint64 // requests so far: each has a number of its own
}

// A lockedBuffer can be read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// wireUp starts a keyward with more configuration than the smallest.
func wireUp(t *testing.T, more string) *wired {
	t.Helper()
	dir := t.TempDir()
	pepper := filepath.Join(dir, "pepper")
	if err := writeNewPrivate(pepper, apikey.MarshalPepper(apikey.NewPepper(1, false))); err != nil {
		t.Fatal(err)
	}
	w := &wired{log: new(lockedBuffer), config: fmt.Sprintf(`
listen: {check: {address: "127.0.0.1:0"}, manage: {address: "127.0.0.1:0"}, holders: {address: "127.0.0.1:0"}, metrics: {address: "127.0.0.1:0"}}
store: {sqlite: {path: %q}}
pepper: {file: %q}
log: {level: debug, decisionsPerSecond: 1000000}
`, filepath.Join(dir, "keyward.db"), pepper)}
	cfg, faults := load(t, w.config+more, nil, nil)
	if faults != nil {
		t.Fatal(faults)
	}
	var err error
	if w.service, err = openService(t.Context(), cfg, serviceOptions{log: w.log}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, w.close()); err != nil {
			t.Error(err)
		}
	})
	<-w.serving
	w.conn, err = grpc.NewClient(w.check.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.conn.Close() })
	return w
}

var owner = admin.Caller{Name: "test", Role: admin.RoleOwner}

// instance makes one with a policy.
func (w *wired) instance(t *testing.T, id string, policy apikey.Policy) {
	t.Helper()
	policy.Creation.PerHour = apikey.Unlimited // what is made here is no matter of its own
	if _, err := w.admin.PutInstance(t.Context(), owner, id, policy); err != nil {
		t.Fatal(err)
	}
}

// key makes one that nothing limits unless in says so.
func (w *wired) key(t *testing.T, instance string, in admin.KeyInput) (*apikey.Key, string) {
	t.Helper()
	in.Name = "n"
	if in.Limits == (admin.LimitsInput{}) {
		none := apikey.Unlimited
		in.Limits = admin.LimitsInput{Rate: &admin.RateInput{Requests: &none}, Burst: &none, MaxConcurrent: &none}
	}
	made, err := w.admin.CreateKey(t.Context(), owner, instance, in)
	if err != nil {
		t.Fatal(err)
	}
	return made.Key, made.Secret.Reveal()
}

// reads is how many keys were read from the store. Each is one call of it: nothing changes meanwhile.
func (w *wired) reads(t *testing.T) int { return w.metric(t, "keyward_cache_loads_total") }

// metric sums a metric up, or of it what has one of the labels.
func (w *wired) metric(t *testing.T, name string, labels ...string) (sum int) {
	t.Helper()
	families, err := w.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		found = true
		for _, m := range f.GetMetric() {
			if len(labels) > 0 && !slices.Contains(labels, m.GetLabel()[0].GetValue()) {
				continue
			}
			sum += int(m.GetCounter().GetValue() + m.GetGauge().GetValue())
		}
	}
	if !found {
		t.Fatalf("no metric %s", name)
	}
	return sum
}

// anAsk is a GET of / by a client at 192.0.2.1, and what a case changes about it.
func anAsk(changes ...func(*authv3.AttributeContext_HttpRequest, *authv3.CheckRequest)) *authv3.CheckRequest {
	r := checkRequest("", http.MethodGet, "/")
	for _, change := range changes {
		change(r.GetAttributes().GetRequest().GetHttp(), r)
	}
	return r
}

type change = func(*authv3.AttributeContext_HttpRequest, *authv3.CheckRequest)

// header sets headers in the form of a map, as Envoy sends them unless told otherwise.
func header(pairs ...string) change {
	return func(h *authv3.AttributeContext_HttpRequest, _ *authv3.CheckRequest) {
		for i := 0; i < len(pairs); i += 2 {
			h.Headers[pairs[i]] = pairs[i+1]
		}
	}
}

// raw adds headers in the form of a list, as Envoy sends them with encode_raw_headers.
func raw(pairs ...string) change {
	return func(h *authv3.AttributeContext_HttpRequest, _ *authv3.CheckRequest) {
		h.Headers = nil
		h.HeaderMap = &corev3.HeaderMap{}
		for i := 0; i < len(pairs); i += 2 {
			h.HeaderMap.Headers = append(h.HeaderMap.Headers, &corev3.HeaderValue{Key: pairs[i], RawValue: []byte(pairs[i+1])})
		}
	}
}

func path(p string) change {
	return func(h *authv3.AttributeContext_HttpRequest, _ *authv3.CheckRequest) { h.Path = p }
}

func method(m string) change {
	return func(h *authv3.AttributeContext_HttpRequest, _ *authv3.CheckRequest) { h.Method = m }
}

func from(address string) change {
	return func(_ *authv3.AttributeContext_HttpRequest, r *authv3.CheckRequest) {
		r.Attributes.Source.Address.GetSocketAddress().Address = address
	}
}

// rawBytes is a client's codec that sends bytes as they are.
type rawBytes struct{}

func (rawBytes) Name() string { return "proto" }
func (rawBytes) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}
func (rawBytes) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

const checkMethod = "/envoy.service.auth.v3.Authorization/Check"

// send sends the bytes of a CheckRequest.
func (w *wired) send(ctx context.Context, message []byte) (*authv3.CheckResponse, error) {
	var answer []byte
	if err := w.conn.Invoke(ctx, checkMethod, message, &answer, grpc.ForceCodecV2(rawBytes{}), grpc.MaxCallSendMsgSize(64<<20)); err != nil {
		return nil, err
	}
	out := new(authv3.CheckResponse)
	return out, proto.Unmarshal(answer, out)
}

// ask sends a Check and says in a few words what Envoy would do with the answer: "200", "401" for a
// caller that sent nothing, "401 bad" for one that sent a bad key, another status with its error.code, or
// "error" and the code of the RPC.
func (w *wired) ask(t *testing.T, message []byte) (string, *authv3.CheckResponse) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := w.send(ctx, message)
	if err != nil {
		return "error " + status.Code(err).String(), nil
	}
	if out.GetStatus().GetCode() == 0 {
		if out.GetStatus() == nil || out.GetOkResponse() == nil {
			t.Errorf("an answer that allows by what it lacks: %v", out)
		}
		return "200", out
	}
	denied := out.GetDeniedResponse()
	headers := map[string]string{}
	for _, h := range denied.GetHeaders() {
		headers[h.GetHeader().GetKey()] = h.GetHeader().GetValue()
	}
	var body struct{ Error struct{ Code string } }
	if err := json.Unmarshal([]byte(denied.GetBody()), &body); err != nil || body.Error.Code == "" || len(denied.GetBody()) > 1024 ||
		headers["content-type"] != "application/json" || headers["cache-control"] != "no-store" {
		t.Errorf("got %v %q (%v), want a small error in JSON that nobody stores", headers, denied.GetBody(), err)
	}
	code := int(denied.GetStatus().GetCode())
	if code != http.StatusUnauthorized {
		return fmt.Sprint(code, " ", body.Error.Code), out
	}
	switch headers["www-authenticate"] {
	case `Bearer realm="keyward"`:
		return "401", out
	case `Bearer realm="keyward", error="invalid_token"`:
		return "401 bad", out
	}
	t.Errorf("a 401 with the challenge %q", headers["www-authenticate"])
	return "401 ?", out
}

// fresh gives a request a number of its own, so that no two are one request to those who count leases.
func (w *wired) fresh(r *authv3.CheckRequest) *authv3.CheckRequest {
	w.asked++
	if in := r.GetAttributes().GetRequest(); in != nil {
		in.Time = timestamppb.New(time.Unix(1_790_000_000, int64(w.asked)*1000))
	}
	return r
}

// A badInput is one row of the catalogue, or a part of one.
type badInput struct {
	row     string // its number and words
	request *authv3.CheckRequest
	want    string // see ask
	// note says where DESIGN §2 wants something else than the row, or what the row means here.
	note string
}

// judge sends each input and counts what it cost: garbage costs no read of the store, and neither does
// what is in the cache or not in the set of known digests.
func (w *wired) judge(t *testing.T, secrets []string, inputs []badInput) {
	t.Helper()
	for _, in := range inputs {
		t.Run(in.row, func(t *testing.T) {
			message, err := proto.MarshalOptions{AllowPartial: true}.Marshal(w.fresh(in.request))
			if err != nil {
				t.Fatal(err)
			}
			before := w.reads(t)
			got, out := w.ask(t, message)
			if got != in.want {
				t.Errorf("got %s, want %s %s", got, in.want, in.note)
			}
			if n := w.reads(t) - before; n != 0 {
				t.Errorf("cost %d reads of the store", n)
			}
			for _, s := range secrets {
				if bytes.Contains([]byte(out.String()), []byte(s[4:20])) {
					t.Errorf("the answer shows a secret: %v", out)
				}
			}
		})
	}
	for _, s := range secrets {
		if strings.Contains(w.log.String(), s[4:20]) {
			t.Error("the log shows a secret")
		}
	}
}

// sealed returns a body with its checksum: a made-up secret that only its digest gives away.
func sealed(body string) string {
	const base62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	var digits [6]byte
	for i, sum := len(digits)-1, crc32.ChecksumIEEE([]byte(body)); i >= 0; i, sum = i-1, sum/62 {
		digits[i] = base62[sum%62]
	}
	return body + string(digits[:])
}

// flipped returns s with another character at i.
func flipped(s string, i int) string {
	c := byte('a')
	if s[i] == c {
		c = 'b'
	}
	return s[:i] + string(c) + s[i+1:]
}

func TestBadCredentials(t *testing.T) {
	w := wireUp(t, `
routes:
  - {path: /orders, scopes: "orders:read"}
  - {path: /everything, scopes: "orders:read:all"}
  - {path: /public/, mode: public}
`)
	w.instance(t, "demo", apikey.Policy{})
	w.instance(t, "off", apikey.Policy{Disabled: true})
	goodKey, good := w.key(t, "demo", admin.KeyInput{})
	_, other := w.key(t, "demo", admin.KeyInput{})
	lostKey, lost := w.key(t, "demo", admin.KeyInput{})
	_, early := w.key(t, "demo", admin.KeyInput{NotBefore: time.Now().Add(time.Hour).UTC().Format(time.RFC3339)})
	_, homeless := w.key(t, "off", admin.KeyInput{})
	_, reader := w.key(t, "demo", admin.KeyInput{Scopes: []string{"orders:read"}})
	_, near := w.key(t, "demo", admin.KeyInput{AllowedIPs: []string{"10.0.0.1", "2001:db8::/32"}})
	_, unused := w.key(t, "demo", admin.KeyInput{})
	if _, err := w.admin.RevokeKey(t.Context(), owner, "demo", lostKey.ID, apikey.RevokedOther); err != nil {
		t.Fatal(err)
	}
	secrets := []string{good, other, lost, early, homeless, reader, near, unused}

	// The control: each key is read once, and that read is counted. From here on nothing costs one.
	before := w.reads(t)
	for _, s := range secrets[:len(secrets)-1] {
		for range 2 {
			message, _ := proto.Marshal(w.fresh(anAsk(header("x-api-key", s), from("10.0.0.1"))))
			w.ask(t, message)
		}
	}
	if n := w.reads(t) - before; n != len(secrets)-1 {
		t.Fatalf("%d reads for %d keys asked for twice: what is counted is not what is read", n, len(secrets)-1)
	}

	key := func(value string) *authv3.CheckRequest { return anAsk(header("x-api-key", value)) }
	bearer := func(value string) *authv3.CheckRequest { return anAsk(header("authorization", value)) }
	digest := w.digestOf(good)
	var inputs []badInput
	add := func(row string, request *authv3.CheckRequest, want string, note ...string) {
		inputs = append(inputs, badInput{row, request, want, strings.Join(note, "")})
	}
	add("1 no credential at all", anAsk(), "401")
	add("2 x-api-key empty", key(""), "401")
	add("3 only spaces or tabs", key(" \t "), "401")
	const foreign = "Authorization with nothing of our shape is the application's (§2.3): neither counted nor removed"
	add("4 Bearer with no token", bearer("Bearer"), "401", foreign)
	add("4 Bearer with no token, with a space", bearer("Bearer "), "401", foreign)
	add("5 bearer in lower case", bearer("bearer "+good), "200")
	add("5 BEARER in upper case", bearer("BEARER "+good), "200")
	const lenient = "whatever blanks an upstream would skip are skipped, or it would see a secret that we did not"
	add("6 two spaces after Bearer", bearer("Bearer  "+good), "200", lenient)
	add("6 a tab after Bearer", bearer("Bearer\t"+good), "200", lenient)
	for _, scheme := range []string{"Basic", "Digest", "Token", "ApiKey", "Bearer-"} {
		add("7 scheme "+scheme, bearer(scheme+" "+good), "401", foreign)
	}
	add("7 no scheme", bearer(good), "401", foreign)
	add("8 spaces around", key(" \t"+good+" "), "200")
	add("8 a space inside", key(good[:20]+" "+good[20:]), "401 bad")
	add("8 a space inside, bearer", bearer("Bearer "+good[:20]+" "+good[20:]), "401 bad")
	add("9 same valid key in A and N", anAsk(header("x-api-key", good, "authorization", "Bearer "+good)), "200")
	add("9 same valid key in both of ours", anAsk(header("x-api-key", good, "x-agent-access-token", good)), "200")
	const ambiguous = "an ambiguous credential is a 401 (§2.3): the 400 would tell that the first one is good"
	add("10 different keys in A and N", anAsk(header("x-api-key", unused, "authorization", "Bearer "+good)), "401 bad", ambiguous)
	add("10 different keys in N and the other header", anAsk(header("x-api-key", good, "x-agent-access-token", unused)), "401 bad", ambiguous)
	add("11 valid in N, junk of our shape in A", anAsk(header("x-api-key", good, "authorization", "Bearer kwi_junk")), "401 bad", ambiguous)
	add("11 valid in N, somebody else's token in A", anAsk(header("x-api-key", good, "authorization", "Bearer eyJ.e30.x")), "200", foreign)
	add("12 duplicate N, equal values", anAsk(raw("x-api-key", good, "x-api-key", good)), "401 bad", ambiguous)
	add("13 duplicate N, first valid", anAsk(raw("x-api-key", good, "x-api-key", "junk")), "401 bad", ambiguous)
	add("14 duplicate N, second valid", anAsk(raw("x-api-key", "junk", "x-api-key", good)), "401 bad", ambiguous)
	add("14 duplicate N, first empty", anAsk(raw("x-api-key", "", "x-api-key", good)), "401 bad", ambiguous)
	add("15 merged mode k1,k2", key(good+","+other), "401 bad", ambiguous)
	add("15 merged mode k1,k1", key(good+","+good), "401 bad", ambiguous)
	add("16 Bearer k1,Bearer k2", bearer("Bearer "+good+",Bearer "+other), "401 bad", ambiguous)
	add("16 Bearer k1 in a list with another scheme", bearer("Basic dTpw, Bearer "+good), "401 bad", ambiguous)
	var many []string
	for range 99 {
		many = append(many, "x-api-key", good)
	}
	add("17 99 duplicates of N", anAsk(raw(many...)), "401 bad", ambiguous)
	add("18 key in query, feature off", anAsk(path("/?api_key="+good+"&key="+good)), "401")
	add("20 key in a cookie", anAsk(header("cookie", "x-api-key="+good)), "401")
	add("20 key in the body", anAsk(func(h *authv3.AttributeContext_HttpRequest, _ *authv3.CheckRequest) {
		h.Body, h.RawBody = good, []byte(good)
	}), "401")
	add("20 key in userinfo", anAsk(func(h *authv3.AttributeContext_HttpRequest, _ *authv3.CheckRequest) { h.Host = good + "@app.example" }), "401")
	add("20 key in the fragment", anAsk(func(h *authv3.AttributeContext_HttpRequest, _ *authv3.CheckRequest) { h.Fragment, h.Query = good, good }), "401")
	add("20 key in the path", anAsk(path("/"+good)), "401")
	add("21 wrong prefix", key("kwx_"+good[4:]), "401 bad")
	add("21 somebody else's prefix", key("ghp_"+good[4:]), "401 bad")
	add("22 one character short", key(good[:len(good)-1]), "401 bad")
	add("22 one character long", key(good+"0"), "401 bad")
	for _, i := range []int{4, 20, len(good) - 1} {
		add(fmt.Sprintf("23 flipped character %d", i), key(flipped(good, i)), "401 bad")
	}
	add("24 checksum right, unknown key", key(sealed(flipped(good[:len(good)-6], 20))), "401 bad", "no read either: the set of known digests is fresh (§2.5)")
	add("25 another kind, same random part", key(sealed("kwa_"+good[4:len(good)-6])), "401 bad", "kinds are our keyspaces")
	add("25 another kind, old checksum", key("kwa_"+good[4:]), "401 bad")
	add("25 a management token", key(apikey.Format{}.New(apikey.KindManagement).Reveal()), "401 bad")
	add("26 lower-cased", key(strings.ToLower(good)), "401 bad")
	add("26 upper-cased", key(strings.ToUpper(good)), "401 bad")
	add("27 URL-encoded", key(strings.Replace(good, "_", "%5F", 1)), "401 bad")
	add("27 base64-wrapped", key(base64.StdEncoding.EncodeToString([]byte(good))), "401 bad")
	add("27 quoted", key(`"`+good+`"`), "401 bad")
	add("27 in angle brackets", key("<"+good+">"), "401 bad")
	add("28 8 KiB", key(strings.Repeat("k", 8<<10)), "401 bad")
	add("28 59 KiB", key("kwi_"+strings.Repeat("k", 59<<10)), "401 bad")
	for _, c := range "\x00\r\n\x7f\x01\x1b" {
		add(fmt.Sprintf("30 control character %#02x inside", c), key(good[:20]+string(c)+good[21:]), "401 bad")
		add(fmt.Sprintf("30 control character %#02x at the end", c), key(good+string(c)), "401 bad")
	}
	add("30 a vertical tab around it", key("\v"+good), "401 bad", "only what HTTP calls white space is trimmed")
	for name, bytes := range map[string]string{"0xFF": "\xff", "overlong": "\xc0\xae", "lone surrogate": "\xed\xa0\x80"} {
		add("31 invalid UTF-8, raw mode, "+name+" instead of a character", anAsk(raw("x-api-key", good[:20]+bytes+good[21:])), "401 bad")
		add("31 invalid UTF-8, raw mode, "+name+" more than it has", anAsk(raw("x-api-key", good+bytes)), "401 bad", "never allowed, even if it collapses to a good key")
	}
	add("31 invalid UTF-8, merged mode, as Envoy writes it", key(good[:20]+"!"+good[21:]), "401 bad")
	for name, s := range map[string]string{
		"homoglyph": "\u043awi_" + good[4:], "full width": "\uff4bwi_" + good[4:], "zero width": good[:20] + "\u200b" + good[20:],
		"byte order mark": "\ufeff" + good, "NFKC-equal digit": "kwi_\u00b2" + good[5:], "no-break space around": "\u00a0" + good,
	} {
		add("32 "+name, key(s), "401 bad")
	}
	add("33 emoji", key("\U0001f511"+good), "401 bad")
	add("33 right-to-left override", key("\u202e"+good), "401 bad")
	add("34 a key's public id", key(goodKey.ID.String()), "401 bad")
	add("34 a key's hint", key(goodKey.Generations[0].Hint), "401 bad")
	add("35 the digest in hex", key(hex.EncodeToString(digest)), "401 bad")
	add("35 the digest in base64", key(base64.StdEncoding.EncodeToString(digest)), "401 bad")
	add("35 the digest in our shape", key(sealed("kwi_"+hex.EncodeToString(digest)[:43])), "401 bad")
	for _, s := range []string{`' OR '1'='1`, `'; DROP TABLE keys; --`, `return redis.call("FLUSHALL")`, `%s%n%x`, `{{.Secret}}`, `${jndi:ldap://x}`, `$(id)`, `../../etc/passwd`, `*`} {
		add("36 payload "+s, key(s), "401 bad")
	}
	const oneCode = "one answer for all causes (§2): the cause is in metadata and log only"
	add("37 revoked key", key(lost), "401 bad", oneCode)
	add("40 not before in the future", key(early), "401 bad", oneCode)
	add("43 key of a disabled instance", key(homeless), "401 bad", oneCode)
	add("44 valid key, missing scope", anAsk(header("x-api-key", reader), path("/everything")), "403 Forbidden", "without a challenge: the body names the scope")
	add("44 valid key, its scope", anAsk(header("x-api-key", reader), path("/orders")), "200")
	add("45 the scope in another case of the path", anAsk(header("x-api-key", reader), path("/Everything")), "200", "paths have a case: no rule names this one, so any key will do (defaultRoute)")
	for _, p := range []string{
		"//", "/./", "/../", "/a/..", "/%2f", "/%5c", "/\\", "/%2e%2e/", "/a;x", "/%3b", "/a./..", "/..;/", "/%252e", "/%61", "/%zz", "/%", "/a\x00", "/\u00e9",
		"/public/../orders", "/public/..%2forders", "/public/%2e%2e/orders", "/public//orders", "/a#b", "", "orders", "http://app.example/orders",
	} {
		add("46 path "+p, anAsk(header("x-api-key", good), path(p)), "400 InvalidPath", "on every route, a public one too")
	}
	add("46 trailing dot", anAsk(header("x-api-key", good), path("/orders.")), "200", "another path than /orders to everybody")
	for _, m := range []string{"get", "PURGE", strings.Repeat("M", 100), "", "GET /"} {
		add("47 method "+m+", with a key", anAsk(header("x-api-key", good), method(m)), "200", "a method of its own: no rule names it, so any key will do (defaultRoute)")
		add("47 method "+m+", without", anAsk(method(m)), "401")
		add("47 method "+m+", without the scope of the path", anAsk(header("x-api-key", reader), method(m), path("/everything")), "403 Forbidden")
	}
	for _, xff := range []string{"10.0.0.1", strings.Repeat("10.0.0.1, ", 50) + "10.0.0.1", "garbage", "::ffff:10.0.0.1", ""} {
		add("48 X-Forwarded-For "+xff[:min(len(xff), 20)], anAsk(header("x-api-key", near, "x-forwarded-for", xff, "x-envoy-external-address", xff, "forwarded", "for="+xff), from("192.0.2.1")), "403 Forbidden")
	}
	for address, want := range map[string]string{
		"10.0.0.1": "200", "::ffff:10.0.0.1": "200", "::ffff:a00:1": "200", "2001:db8::1%eth0": "200", "2001:DB8::1": "200",
		"010.0.0.1": "403 Forbidden", "10.1": "403 Forbidden", "0x0a000001": "403 Forbidden", "10.0.0.1:80": "403 Forbidden", "": "403 Forbidden", "/run/x.sock": "403 Forbidden", "10.0.0.1\x00": "403 Forbidden",
	} {
		add("49 allow-listed key from "+address, anAsk(header("x-api-key", near), from(address)), want)
	}
	add("50 client sends x-keyward-key-id", anAsk(header("x-api-key", good, "x-keyward-key-id", "admin", "x-keyward-user", "root")), "200", "see below what the upstream gets")
	add("50 x-keyward-key-id alone", anAsk(header("x-keyward-key-id", goodKey.ID.String(), "x-keyward-instance-id", "demo")), "401")
	add("55 x-envoy-* and x-ext-authz-*", anAsk(header("x-envoy-original-path", "/public/", "x-envoy-internal", "true", "x-ext-authz-check-result", "allowed",
		"x-envoy-auth-partial-body", "false", "x-original-url", "/public/", "x-rewrite-url", "/public/", "x-http-method-override", "OPTIONS")), "401")
	add("56 CONNECT", anAsk(method("CONNECT"), path("")), "400 InvalidPath", "without a path there is nothing to judge")
	add("56 extended CONNECT", anAsk(method("CONNECT"), header(":protocol", "websocket")), "401")
	add("57 OPTIONS preflight without a key", anAsk(method("OPTIONS"), header("origin", "https://app.example", "access-control-request-method", "GET")), "401")
	for _, p := range []string{"/healthz", "/health", "/ready", "/favicon.ico", "/.well-known/acme-challenge/x"} {
		add("58 health-check path "+p, anAsk(path(p), header("user-agent", "kube-probe/1.30")), "401")
	}
	add("58 health-check user agent", anAsk(header("user-agent", "Envoy/HC", "x-envoy-healthchecked-cluster", "x")), "401")
	add("61 10k headers", anAsk(header("x-api-key", good), func(h *authv3.AttributeContext_HttpRequest, _ *authv3.CheckRequest) {
		for i := range 10_000 {
			h.Headers[fmt.Sprint("x-", i)] = "v"
		}
	}), "200", "ours are found among them; below the bound on a message they are no fault")
	w.judge(t, secrets, inputs)

	if !w.usage.Pending(keyOf(t, w, unused).ID).IsZero() {
		t.Error("10: a key counts as used that was sent beside another")
	}
	message, _ := proto.Marshal(w.fresh(anAsk(header("x-api-key", good, "x-keyward-key-id", "admin", "x-keyward-user", "root"))))
	_, out := w.ask(t, message)
	for _, h := range out.GetOkResponse().GetHeaders() {
		if h.GetHeader().GetKey() == "x-keyward-key-id" && (h.GetHeader().GetValue() != goodKey.ID.String() || h.GetAppendAction() != corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD) {
			t.Errorf("50: the upstream gets %v", h)
		}
	}
	if !slices.Contains(out.GetOkResponse().GetHeadersToRemove(), "x-keyward-user") {
		t.Errorf("50: a key without a user leaves the client's word: removes %v", out.GetOkResponse().GetHeadersToRemove())
	}

	// 19, 47: what is off by default, on.
	cfg, faults := load(t, w.config+"credentials: {query: api_key}\ndefaultRoute: deny\ncorsPreflight: allow\nroutes: [{path: \"/{$}\"}, {method: GET, path: /orders, scopes: \"orders:read\"}]\n", nil, nil)
	if faults != nil {
		t.Fatal(faults)
	}
	if err := w.reload(cfg); err != nil {
		t.Fatal(err)
	}
	inputs = nil
	const escaped = "Envoy removes a parameter by its literal name only: what could not be taken away is refused"
	add("19 key in query, feature on", anAsk(path("/?a=b&api_key="+good)), "200")
	add("19 key in query, percent-encoded value", anAsk(path("/?api_key="+strings.Replace(good, "_", "%5f", 1))), "200", "a query's value is decoded, as every reader of it does")
	add("19 key in query twice", anAsk(path("/?api_key="+good+"&api_key="+good)), "401 bad", ambiguous)
	add("19 key in query twice, second escaped", anAsk(path("/?api_key="+good+"&api%5Fkey="+good)), "400 InvalidRequest", escaped)
	add("19 key in query, name escaped", anAsk(path("/?api%5Fkey="+good)), "400 InvalidRequest", escaped)
	add("19 key in query, name in another case", anAsk(path("/?API_KEY="+good)), "401", "another parameter: names have a case")
	add("19 key in query, empty", anAsk(path("/?api_key=")), "401")
	add("19 key in query, with a semicolon", anAsk(path("/?api_key="+good+";x=y")), "401 bad")
	add("19 key in query and another in N", anAsk(path("/?api_key="+good), header("x-api-key", other)), "401 bad", ambiguous)
	add("19 key in query and in N", anAsk(path("/?api_key="+good), header("x-api-key", good)), "200")
	add("19 key in the query of a CONNECT", anAsk(method("CONNECT"), path("/?api_key="+good)), "400 InvalidRequest", escaped)
	add("47 method in another case, routes of GET only", anAsk(method("get"), path("/orders"), header("x-api-key", good)), "403 Forbidden")
	add("57 OPTIONS preflight, allowed", anAsk(method("OPTIONS"), header("origin", "https://app.example", "access-control-request-method", "GET")), "200")
	add("57 OPTIONS that is no preflight", anAsk(method("OPTIONS"), header("origin", "https://app.example")), "401")
	w.judge(t, secrets, inputs)
	message, _ = proto.Marshal(w.fresh(anAsk(path("/?a=b&api_key=" + good))))
	if _, out := w.ask(t, message); !slices.Equal(out.GetOkResponse().GetQueryParametersToRemove(), []string{"api_key"}) {
		t.Errorf("19: removes the parameters %v", out.GetOkResponse().GetQueryParametersToRemove())
	}
}

// digestOf is what the store knows a secret by.
func (w *wired) digestOf(secret string) []byte {
	d := w.pepper.Digest(secret)
	return d[:]
}

func keyOf(t *testing.T, w *wired, secret string) *apikey.Key {
	t.Helper()
	k, _, err := w.store.FindKey(t.Context(), w.pepper.Digest(secret))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// field is a field of a message in wire format.
func field(number protowire.Number, parts ...[]byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), bytes.Join(parts, nil))
}

// TestBadCalls is about what is no HTTP request, or no call at all.
func TestBadCalls(t *testing.T) {
	w := wireUp(t, "")
	w.instance(t, "demo", apikey.Policy{})
	_, good := w.key(t, "demo", admin.KeyInput{})
	whole, err := proto.Marshal(w.fresh(anAsk(header("x-api-key", good))))
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := w.ask(t, whole); got != "200" {
		t.Fatalf("got %s", got)
	}
	keyless, err := proto.Marshal(w.fresh(anAsk()))
	if err != nil {
		t.Fatal(err)
	}
	with := func(message []byte, more ...[]byte) []byte {
		return bytes.Join(append([][]byte{message}, more...), nil)
	}
	group := func(number protowire.Number, depth int) []byte {
		var b []byte
		for range depth {
			b = protowire.AppendTag(b, number, protowire.StartGroupType)
		}
		for range depth {
			b = protowire.AppendTag(b, number, protowire.EndGroupType)
		}
		return b
	}
	nested := func(depth int) (b []byte) { // fields of a field of a field …
		for range depth {
			b = field(11, field(1, b))
		}
		return b
	}
	noSource := anAsk(header("x-api-key", good))
	noSource.Attributes.Source = nil
	sourceless, err := proto.Marshal(w.fresh(noSource))
	if err != nil {
		t.Fatal(err)
	}
	const fault = "error InvalidArgument error Unimplemented error Internal error ResourceExhausted"
	for _, tt := range []struct {
		row     string
		message []byte
		want    string // any of these
		note    string
	}{
		{"59 no attributes", nil, "error InvalidArgument", ""},
		{"59 empty attributes", field(1), "error Unimplemented", "without an HTTP request it is as good as a connection's"},
		{"59 no http", field(1, field(4)), "error Unimplemented", "the same"},
		{"59 empty http", field(1, field(4, field(2))), "400", "a request without a path"},
		{"59 no source", sourceless, "200", "as from a Unix socket, which has none (§5): who calls is told by the key"},
		{"60 network (L4) CheckRequest", field(1, field(1, field(1, field(1, field(2, []byte("192.0.2.1")))))), "error Unimplemented", ""},
		{"61 CheckRequest of 300 KiB", with(whole, field(1000, make([]byte, 300<<10))), fault, ""},
		{"61 10 MiB body", with(whole, field(1, field(4, field(2, field(11, make([]byte, 10<<20)))))), "error ResourceExhausted", ""},
		{"61 deep metadata", with(whole, field(1, nested(100))), "200 " + fault, "nothing of it is needed"},
		{"61 deeper metadata", with(keyless, field(1, nested(5000))), "401 " + fault, ""},
		{"62 unknown fields", with(field(1000, []byte("?")), whole, protowire.AppendVarint(protowire.AppendTag(nil, 1001, protowire.VarintType), 1)), "200", "newer Envoys say more"},
		{"62 groups", with(whole, group(1000, 1)), "200 " + fault, "Envoy sends none"},
		{"62 groups in groups", with(keyless, group(1000, 20_000)), "401 " + fault, ""},
		{"62 a group that ends as another", with(keyless, []byte{0x0b, 0x14}), fault, ""},
		{"62 a group without end", with(keyless, []byte{0x0b}), fault, ""},
		{"62 field number 0", with(whole, []byte{0x02, 0x00}), fault, ""},
		{"62 a length beyond all", with(whole, []byte("\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")), fault, ""},
		{"62 garbage", []byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), fault, ""},
		{"31 invalid UTF-8 in a text, which Envoy never sends", with(field(1, field(4, field(2, field(3, field(1, []byte("x-api-key")), field(2, []byte(good[:20]+"\xff"+good[21:])))))), keyless), "401 " + fault, ""},
	} {
		t.Run(tt.row, func(t *testing.T) {
			before := w.reads(t)
			got, _ := w.ask(t, tt.message)
			if code, _, _ := strings.Cut(got, " "); !strings.Contains(" "+tt.want+" ", " "+got+" ") && (code == "error" || !strings.Contains(" "+tt.want+" ", " "+code+" ")) {
				t.Errorf("got %s, want %s; %s", got, tt.want, tt.note)
			}
			if n := w.reads(t) - before; n != 0 {
				t.Errorf("cost %d reads of the store", n)
			}
		})
	}
	t.Run("62 truncated", func(t *testing.T) {
		for n := range len(whole) {
			if got, _ := w.ask(t, whole[:n]); got == "200" && n < len(whole)-20 {
				t.Errorf("the first %d of %d bytes are allowed", n, len(whole))
			}
		}
	})

	t.Run("62 compressed", func(t *testing.T) {
		var small bytes.Buffer
		z := gzip.NewWriter(&small)
		_, _ = z.Write(make([]byte, 64<<20))
		_ = z.Close()
		if got := w.post(t, checkMethod, small.Bytes(), true, "application/grpc"); got != "grpc 13" {
			t.Errorf("got %s, want INTERNAL: nothing is decompressed", got)
		}
	})
	t.Run("63 missing TE", func(t *testing.T) {
		// A trailer is what grpc-go sends whatever the client says it takes. The call is like any other.
		if got := w.post(t, checkMethod, keyless, false, "application/grpc"); got != "grpc 0" {
			t.Errorf("got %s", got)
		}
	})
	t.Run("63 another content type", func(t *testing.T) {
		if got := w.post(t, checkMethod, whole, false, "application/json"); got != "http 415" {
			t.Errorf("got %s", got)
		}
	})
	for _, name := range []string{"/unknown.Service/Check", "/envoy.service.auth.v3.Authorization/Nothing", "/", "//", "/envoy.service.auth.v3.Authorization", "/envoy.service.auth.v2.Authorization/Check", checkMethod + "/"} {
		t.Run("63 method "+name, func(t *testing.T) {
			var answer []byte
			if err := w.conn.Invoke(t.Context(), name, whole, &answer, grpc.ForceCodecV2(rawBytes{})); status.Code(err) != codes.Unimplemented {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("63 method without a slash", func(t *testing.T) {
		var answer []byte
		if err := w.conn.Invoke(t.Context(), checkMethod[1:], whole, &answer, grpc.ForceCodecV2(rawBytes{})); err == nil {
			t.Error("answered")
		}
	})

	t.Run("65 deadline", func(t *testing.T) {
		past, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
		defer cancel()
		if _, err := w.send(past, whole); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("past: got %v", err)
		}
		for range 100 {
			short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			if out, err := w.send(short, whole); err != nil && status.Code(err) != codes.DeadlineExceeded || err == nil && out.GetOkResponse() == nil {
				t.Errorf("1 ms: got %v, %v", out, err)
			}
			cancel()
		}
	})

	t.Run("66 1,000 Checks of one key at once, cold", func(t *testing.T) {
		_, cold := w.key(t, "demo", admin.KeyInput{})
		before := w.reads(t)
		var all sync.WaitGroup
		begin := make(chan struct{})
		for range 1000 {
			message, err := proto.Marshal(w.fresh(anAsk(header("x-api-key", cold))))
			if err != nil {
				t.Fatal(err)
			}
			all.Go(func() {
				<-begin
				if got, _ := w.ask(t, message); got != "200" {
					t.Errorf("got %s", got)
				}
			})
		}
		close(begin)
		all.Wait()
		// One who looks, sleeps through the whole read and then asks makes another. That is a matter of luck,
		// and of few; 1,000 reads are none.
		if n := w.reads(t) - before; n < 1 || n > 8 {
			t.Errorf("%d reads, want one", n)
		}
	})

	if got, _ := w.ask(t, whole); got != "200" {
		t.Errorf("after all that a good Check gets %s", got)
	}
	if n := w.metric(t, "keyward_check_panics_total"); n != 0 {
		t.Errorf("%d panics", n)
	}
}

// post makes a gRPC call by hand, over HTTP/2 without TLS, and says how it ended.
func (w *wired) post(t *testing.T, method string, message []byte, compressed bool, contentType string) string {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	web := &http.Transport{Protocols: protocols}
	defer web.CloseIdleConnections()
	frame := []byte{0}
	if compressed {
		frame[0] = 1
	}
	frame = append(binary.BigEndian.AppendUint32(frame, uint32(len(message))), message...)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+w.check.Addr().String()+method, bytes.NewReader(frame))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", contentType)
	if compressed {
		r.Header.Set("Grpc-Encoding", "gzip")
	}
	answer, err := web.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if _, err := io.Copy(io.Discard, answer.Body); err != nil {
		t.Fatal(err)
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Sprint("http ", answer.StatusCode)
	}
	return "grpc " + cmp.Or(answer.Trailer.Get("Grpc-Status"), answer.Header.Get("Grpc-Status"))
}

// TestBadAccessLogs: what is said of running requests moves the count of those only where it is right,
// and never below none.
func TestBadAccessLogs(t *testing.T) {
	w := wireUp(t, "concurrency: {wait: 0s}\n")
	w.instance(t, "demo", apikey.Policy{})
	none, two := apikey.Unlimited, 2
	_, good := w.key(t, "demo", admin.KeyInput{Limits: admin.LimitsInput{Rate: &admin.RateInput{Requests: &none}, Burst: &none, MaxConcurrent: &two}})

	// run begins a request and returns what names it.
	run := func(want string) (lease string, began time.Time) {
		t.Helper()
		r := w.fresh(anAsk(header("x-api-key", good)))
		message, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		got, out := w.ask(t, message)
		if got != want {
			t.Fatalf("got %s, want %s", got, want)
		}
		lease, _ = out.GetDynamicMetadata().AsMap()["keyward.lease"].(string)
		return lease, r.GetAttributes().GetRequest().GetTime().AsTime()
	}
	running := func() int { return len(w.limiter.Running(func(limits.Cell) bool { return true })) }
	entry := func(lease string, began time.Time, took *durationpb.Duration) *datav3.HTTPAccessLogEntry {
		c := &datav3.AccessLogCommon{AccessLogType: datav3.AccessLogType_DownstreamEnd, StartTime: timestamppb.New(began), Duration: took}
		c.DownstreamDirectRemoteAddress = checkRequest("", "", "").GetAttributes().GetSource().GetAddress()
		if lease != "" {
			c.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"envoy.filters.http.ext_authz": {
				Fields: map[string]*structpb.Value{"keyward.lease": structpb.NewStringValue(lease)}}}}
		}
		return &datav3.HTTPAccessLogEntry{CommonProperties: c}
	}
	tell := func(t *testing.T, m *alsv3.StreamAccessLogsMessage, entries ...*datav3.HTTPAccessLogEntry) {
		t.Helper()
		m.LogEntries = &alsv3.StreamAccessLogsMessage_HttpLogs{HttpLogs: &alsv3.StreamAccessLogsMessage_HTTPAccessLogEntries{LogEntry: entries}}
		stream, err := alsv3.NewAccessLogServiceClient(w.conn).StreamAccessLogs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.CloseAndRecv(); err != nil {
			t.Fatal(err)
		}
	}

	lease, began := run("200")
	elsewhere := func(version uint32) string { // another replica's, or another installation's
		ids := authz.NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(version, false)})
		return string(ids.Append(nil, limits.Lease{Cell: authz.LeaseCell(apikey.ID{1}), Identity: authz.NewIdentity("192.0.2.1", 40000, began), HTTP: 1}))
	}
	unknown := string(w.leases.Append(nil, limits.Lease{Cell: authz.LeaseCell(apikey.ID{1}), Identity: authz.NewIdentity("192.0.2.1", 40000, began), HTTP: 1}))
	for _, tt := range []struct {
		row     string
		entry   *datav3.HTTPAccessLogEntry
		counted string // as this kind of entry
	}{
		{"70 unknown key id", entry(unknown, began, nil), "end"}, // which finds nothing to end
		{"70 end of a slot of another pepper of this version", entry(elsewhere(1), began, nil), "forged"},
		{"70 end of a slot of another pepper's version", entry(elsewhere(9), began, nil), "foreign"},
		{"70 the lease of another request", entry(lease, began.Add(time.Microsecond), nil), "forged"},
		{"70 a lease cut short", entry(lease[:len(lease)-1], began, nil), "malformed"},
		{"70 a lease with more behind it", entry(lease+"A", began, nil), "malformed"},
		{"70 100 KiB of lease", entry(strings.Repeat("A", 100<<10), began, nil), "malformed"},
		{"70 no lease, another request", entry("", began.Add(time.Second), nil), "identity_end"},
		{"70 no lease, no start", entry("", time.Unix(0, 0), nil), "ignored"},
		{"70 no properties", &datav3.HTTPAccessLogEntry{}, "ignored"},
		{"70 a duration below 0, of another request", entry(lease, began.Add(time.Hour), durationpb.New(-time.Hour)), "forged"},
	} {
		t.Run(tt.row, func(t *testing.T) {
			before, counted := w.reads(t), w.metric(t, "keyward_access_log_entries_total", tt.counted)
			tell(t, &alsv3.StreamAccessLogsMessage{}, tt.entry)
			if n := w.metric(t, "keyward_access_log_entries_total", tt.counted) - counted; n != 1 {
				t.Errorf("counted as %s %d times, want once", tt.counted, n)
			}
			if n := running(); n != 1 {
				t.Errorf("%d requests run, want the one", n)
			}
			if n := w.reads(t) - before; n != 0 {
				t.Errorf("cost %d reads of the store", n)
			}
		})
	}
	// A request that ended has ended, however long the log says that it took. Its place is free once.
	for _, took := range []*durationpb.Duration{durationpb.New(-5 * time.Second), durationpb.New(10 * 365 * 24 * time.Hour), {Seconds: -1 << 63, Nanos: -1 << 31}} {
		t.Run("70 duration "+took.String(), func(t *testing.T) {
			tell(t, &alsv3.StreamAccessLogsMessage{}, entry(lease, began, took))
			if n := running(); n != 0 {
				t.Errorf("%d requests run, want none", n)
			}
			lease, began = run("200")
		})
	}
	t.Run("70 duplicate end", func(t *testing.T) {
		var ends []*datav3.HTTPAccessLogEntry
		for range 20 {
			ends = append(ends, entry(lease, began, nil))
		}
		tell(t, &alsv3.StreamAccessLogsMessage{}, ends...)
		tell(t, &alsv3.StreamAccessLogsMessage{}, ends...)
		run("200")
		lease, began = run("200")
		run("429 RateLimitExceeded") // 39 ends too many made no room
	})
	t.Run("71 garbage log name, no identifier", func(t *testing.T) {
		garbage := strings.Repeat("\x00\u202e%s", 1000)
		tell(t, &alsv3.StreamAccessLogsMessage{Identifier: &alsv3.StreamAccessLogsMessage_Identifier{Node: &corev3.Node{Id: garbage, Cluster: garbage}, LogName: garbage}}, entry(unknown, began, nil))
		tell(t, &alsv3.StreamAccessLogsMessage{Identifier: &alsv3.StreamAccessLogsMessage_Identifier{}}, entry(unknown, began, nil))
		if n := running(); n != 2 {
			t.Errorf("%d requests run, want 2", n)
		}
	})
	t.Run("71 message of 100 MB", func(t *testing.T) {
		for _, size := range []int{5 << 20, 100 << 20} {
			var answer []byte
			err := w.conn.Invoke(t.Context(), "/opentelemetry.proto.collector.logs.v1.LogsService/Export", make([]byte, size), &answer, grpc.ForceCodecV2(rawBytes{}), grpc.MaxCallSendMsgSize(200<<20))
			if status.Code(err) != codes.ResourceExhausted {
				t.Errorf("%d bytes: got %v", size, err)
			}
		}
		tell(t, &alsv3.StreamAccessLogsMessage{}, entry(lease, began, nil))
		run("200") // Checks and logs of the same connection go on
	})
	if n := w.metric(t, "keyward_access_log_panics_total"); n != 0 {
		t.Errorf("%d panics", n)
	}
}
