package check_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/envoy/check"
	"keyward/envoy/wire"
	"keyward/limits"
)

// facts is everything behind the authorizer: one function says what a digest finds.
type facts struct {
	find   func() (*apikey.Key, error)
	policy apikey.Policy
	limits limits.Decision

	mu    sync.Mutex
	ended []limits.Ending
}

func (f *facts) Cached(d *apikey.Digest) (*apikey.Key, bool, error) {
	k, err := f.find()
	return k, err == nil || errors.Is(err, apikey.ErrNotFound), err
}
func (f *facts) FindKey(context.Context, apikey.Digest, netip.Addr) (*apikey.Key, error) {
	return f.find()
}
func (f *facts) Instance(id string) *apikey.Instance {
	return &apikey.Instance{ID: id, Policy: f.policy}
}
func (f *facts) LastUsed(context.Context, apikey.ID) (time.Time, error) {
	return time.Time{}, nil
}
func (f *facts) Serving() error                                  { return nil }
func (f *facts) Decided(authz.Use)                               {}
func (f *facts) Last(apikey.ID) time.Time                        { return time.Time{} }
func (f *facts) Redigest(_, _ apikey.Digest)                     {}
func (f *facts) Renew(context.Context, []limits.Lease) error     { return nil }
func (f *facts) Disconnected(uint64)                             {}
func (f *facts) Running(func(limits.Cell) bool) []limits.Running { return nil }
func (f *facts) End(_ context.Context, endings []limits.Ending) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = append(f.ended, endings...)
	return nil
}
func (f *facts) TryTake(*limits.Demand) (limits.Decision, bool) { return f.limits, true }
func (f *facts) Look(context.Context, *limits.Demand, []limits.Standing) ([]limits.Standing, error) {
	return nil, apikey.ErrUndecided
}
func (f *facts) Take(context.Context, *limits.Demand) (limits.Decision, error) {
	return f.limits, nil
}

var (
	keyID  = apikey.ID{1, 2, 3}
	secret = apikey.Format{}.New(apikey.KindAgent).Reveal()
	record = &apikey.Key{
		ID: keyID, InstanceID: "demo", Type: apikey.TypeAgent, AgentName: "sales",
		Scopes: apikey.Scopes{"a:b", "c"}, Generation: 1, Generations: []apikey.Generation{{Number: 1}},
	}
)

func known() (*apikey.Key, error) { return record, nil }

func newFacts() *facts { return &facts{find: known, limits: limits.Decision{Allowed: true}} }

// newServer returns a server, the log that it writes and the ids of its leases.
func newServer(t *testing.T, f *facts, rules authz.Config, cfg check.Config) (*check.Server, *bytes.Buffer, *authz.LeaseIDs) {
	t.Helper()
	peppers := apikey.Peppers{Current: apikey.NewPepper(1, false)}
	a, err := authz.New(rules, f, f, peppers, f, f)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Leases = authz.NewLeaseIDs(peppers)
	log := new(bytes.Buffer)
	s, err := check.New(a, cfg, prometheus.NewRegistry(), slog.New(slog.NewJSONHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return s, log, cfg.Leases
}

// checkOnce asks without a network.
func checkOnce(t *testing.T, s *check.Server, ctx context.Context, in *authv3.CheckRequest) (*authv3.CheckResponse, error) { //nolint:revive // t first
	t.Helper()
	message, err := proto.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := s.Answer(ctx, message, nil)
	if err != nil {
		return nil, err
	}
	out := new(authv3.CheckResponse)
	if err := proto.Unmarshal(answer, out); err != nil {
		t.Fatal(err)
	}
	return out, nil
}

// dial serves checks in memory and returns a client and what was logged.
func dial(t *testing.T, f *facts, rules authz.Config, cfg check.Config) (authv3.AuthorizationClient, *bytes.Buffer) {
	t.Helper()
	s, log, _ := newServer(t, f, rules, cfg)
	return serve(t, s), log
}

func serve(t *testing.T, s *check.Server) authv3.AuthorizationClient {
	t.Helper()
	server := grpc.NewServer(grpc.ForceServerCodecV2(wire.NewCodec()))
	s.Register(server)
	l := bufconn.Listen(1 << 16)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///keyward", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return authv3.NewAuthorizationClient(conn)
}

func request(path string, headers map[string]string) *authv3.CheckRequest {
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source: &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
			SocketAddress: &corev3.SocketAddress{Address: "203.0.113.9", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 4711}},
		}}},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Method: "GET", Host: "api.example", Path: path, Headers: headers,
		}},
	}}
}

func withKey(path string) *authv3.CheckRequest {
	return request(path, map[string]string{"x-api-key": secret})
}

func headersOf(options []*corev3.HeaderValueOption) map[string]string {
	all := map[string]string{}
	for _, h := range options {
		all[h.GetHeader().GetKey()] = h.GetHeader().GetValue()
	}
	return all
}

func TestAllowedRequestsCarryIdentityAndNoSecret(t *testing.T) {
	client, _ := dial(t, newFacts(), authz.Config{Credentials: authz.Credentials{QueryParameter: "key"}}, check.Config{Identity: check.Identity{Agent: "x-agent", KeyType: check.Off}})
	in := request("/?key="+secret, map[string]string{"authorization": "Bearer " + secret})
	out, err := client.Check(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	ok := out.GetOkResponse()
	if out.GetStatus() == nil || out.GetStatus().GetCode() != 0 || ok == nil {
		t.Fatalf("got %v, want an allow that says so", out)
	}
	got := headersOf(ok.GetHeaders())
	decision := got["x-keyward-decision-id"]
	want := map[string]string{
		"x-keyward-key-id": keyID.String(), "x-keyward-instance-id": "demo", "x-agent": "sales",
		"x-keyward-scopes": "a:b c", "x-keyward-decision-id": decision,
	}
	if diff := cmp.Diff(want, got); diff != "" || len(decision) != 32 {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
	// The switched-off name, the default name of a renamed one and the empty one are removed.
	wantRemoved := []string{"x-keyward-agent", "x-keyward-key-type", "x-keyward-user", "x-user-identity", "x-api-key", "x-agent-access-token", "authorization"}
	if diff := cmp.Diff(wantRemoved, ok.GetHeadersToRemove()); diff != "" {
		t.Errorf("removed (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"key"}, ok.GetQueryParametersToRemove()); diff != "" {
		t.Errorf("query (-want +got):\n%s", diff)
	}
	wantMetadata := map[string]any{
		"keyward.key_id": keyID.String(), "keyward.instance": "demo", "keyward.reason": "key", "keyward.decision_id": decision,
	}
	gotMetadata := out.GetDynamicMetadata().AsMap()
	if lease, _ := gotMetadata["keyward.lease"].(string); len(lease) != authz.LeaseIDSize {
		t.Errorf("lease %q", lease)
	}
	delete(gotMetadata, "keyward.lease")
	if diff := cmp.Diff(wantMetadata, gotMetadata); diff != "" {
		t.Errorf("metadata (-want +got):\n%s", diff)
	}
	for _, h := range ok.GetHeaders() {
		//nolint:staticcheck // what replaces it is ignored by the Envoys we support
		if h.GetAppend() == nil || h.GetAppend().GetValue() || h.GetAppendAction() != corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD ||
			h.GetHeader().GetValue() == "" || h.GetHeader().GetRawValue() != nil {
			t.Errorf("%v would not overwrite on every Envoy", h)
		}
	}
}

func TestClientsWithAnOlderSecretAreToldByASwitch(t *testing.T) {
	rotated := time.Date(2030, 3, 4, 5, 6, 7, 0, time.UTC)
	ends := time.Date(2030, 3, 5, 5, 6, 7, 0, time.FixedZone("", 3600))
	for _, test := range []struct {
		name       string
		switchedOn bool
		generation int // that the caller has
		until      time.Time
		want       map[string]string
	}{
		{"old", true, 1, ends, map[string]string{"deprecation": "@1898831167", "sunset": "Tue, 05 Mar 2030 04:06:07 GMT"}},
		{"old_as_long_as_the_key", true, 1, time.Time{}, map[string]string{"deprecation": "@1898831167"}},
		{"newest", true, 2, ends, map[string]string{}},
		{"switched_off", false, 1, ends, map[string]string{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			k := *record
			k.Generation = test.generation
			k.Generations = []apikey.Generation{{Number: 1, ValidUntil: test.until}, {Number: 2, CreatedAt: rotated}}
			f := newFacts()
			f.find = func() (*apikey.Key, error) { return &k, nil }
			client, _ := dial(t, f, authz.Config{Rules: []authz.Rule{{Path: "/scoped", Scopes: apikey.Scopes{"x:y"}}}}, check.Config{Deprecation: test.switchedOn})
			out, err := client.Check(t.Context(), request("/", map[string]string{"x-api-key": secret}))
			if err != nil || out.GetOkResponse() == nil {
				t.Fatalf("got %v, %v, want an allow", out, err)
			}
			if diff := cmp.Diff(test.want, headersOf(out.GetOkResponse().GetResponseHeadersToAdd())); diff != "" {
				t.Errorf("headers to the client (-want +got):\n%s", diff)
			}
			// Of refusals only 429 says it: who is told to come again is told with what.
			f.limits = limits.Decision{Class: limits.ClassBurst, RetryAfter: time.Second}
			for path, status := range map[string]int{"/": 429, "/scoped": 403, "/a//b": 400} {
				out, err := client.Check(t.Context(), withKey(path))
				if err != nil || int(out.GetDeniedResponse().GetStatus().GetCode()) != status {
					t.Fatalf("got %v, %v, want %d", out, err, status)
				}
				want := test.want
				if status != 429 {
					want = map[string]string{}
				}
				got := headersOf(out.GetDeniedResponse().GetHeaders())
				maps.DeleteFunc(got, func(name, _ string) bool { return name != "deprecation" && name != "sunset" })
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%d: headers to the client (-want +got):\n%s", status, diff)
				}
			}
		})
	}
}

func TestEveryAllowedModeRemovesWhatClientsMustNotSend(t *testing.T) {
	client, _ := dial(t, newFacts(), authz.Config{Rules: []authz.Rule{
		{Path: "/public", Mode: authz.Public}, {Path: "/maybe", Mode: authz.Optional},
	}}, check.Config{})
	for _, path := range []string{"/public", "/maybe"} {
		in := request(path, map[string]string{"authorization": "Bearer eyJ.e30.x"})
		out, err := client.Check(t.Context(), in)
		if err != nil {
			t.Fatal(err)
		}
		want := append(check.DefaultIdentity.Names(), "x-api-key", "x-agent-access-token")
		if diff := cmp.Diff(want, out.GetOkResponse().GetHeadersToRemove()); diff != "" || len(out.GetOkResponse().GetHeaders()) > 0 {
			t.Errorf("%s (-want +got):\n%s\nset: %v", path, diff, out.GetOkResponse().GetHeaders())
		}
	}
}

func TestValuesThatNoHeaderCanCarryAreLeftOut(t *testing.T) {
	f := newFacts()
	odd := *record
	odd.AgentName = "sales\r\nx-keyward-user: root"
	f.find = func() (*apikey.Key, error) { return &odd, nil }
	client, _ := dial(t, f, authz.Config{}, check.Config{})
	out, err := client.Check(t.Context(), withKey("/"))
	if err != nil {
		t.Fatal(err)
	}
	if v, there := headersOf(out.GetOkResponse().GetHeaders())["x-keyward-agent"]; there {
		t.Errorf("sent %q", v)
	}
}

func TestRefusals(t *testing.T) {
	limited := func(f *facts) {
		f.limits = limits.Decision{Class: limits.ClassBurst, RetryAfter: 59*time.Second + time.Millisecond}
	}
	nobody := func(f *facts) { f.find = func() (*apikey.Key, error) { return nil, apikey.ErrNotFound } }
	rules := authz.Config{Rules: []authz.Rule{{Path: "/scoped", Scopes: apikey.Scopes{"x:y"}}}}
	for name, tt := range map[string]struct {
		world   func(*facts)
		request *authv3.CheckRequest
		http    int32
		code    codes.Code
		headers map[string]string
		body    map[string]any // without decisionId
		grpc    string         // body for a gRPC caller
	}{
		"no key": {
			request: request("/", nil), http: 401, code: codes.Unauthenticated,
			headers: map[string]string{"www-authenticate": `Bearer realm="keyward"`},
			body:    map[string]any{"code": "Unauthorized", "message": "A valid API key is required. Check that the key is complete, active and sent once."},
		},
		"unknown key": {
			world: nobody, request: withKey("/"), http: 401, code: codes.Unauthenticated,
			headers: map[string]string{"www-authenticate": `Bearer realm="keyward", error="invalid_token"`},
			body:    map[string]any{"code": "Unauthorized", "message": "A valid API key is required. Check that the key is complete, active and sent once."},
		},
		"missing scope": {
			request: withKey("/scoped"), http: 403, code: codes.PermissionDenied,
			body: map[string]any{"code": "Forbidden", "message": "The key lacks the scope x:y. Use a key that has it."},
		},
		"bad path": {
			request: withKey("/a//b"), http: 400, code: codes.InvalidArgument,
			body: map[string]any{"code": "InvalidPath", "message": "The path is ambiguous. Send it without dot segments, empty segments, backslashes, semicolons and needless escapes."},
		},
		"burst": {
			world: limited, request: withKey("/"), http: 429, code: codes.ResourceExhausted,
			headers: map[string]string{"retry-after": "60", "ratelimit-policy": `"burst";q=20;w=10`, "ratelimit": `"burst";r=0;t=60`},
			body:    map[string]any{"code": "RateLimitExceeded", "message": "Rate limit exceeded. Retry after 60 seconds.", "retryAfter": 60.0, "limit": "burst"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFacts()
			if tt.world != nil {
				tt.world(f)
			}
			client, _ := dial(t, f, rules, check.Config{})
			out, err := client.Check(t.Context(), tt.request)
			if err != nil {
				t.Fatal(err)
			}
			denied := out.GetDeniedResponse()
			if out.GetStatus().GetCode() != int32(tt.code) || int32(denied.GetStatus().GetCode()) != tt.http {
				t.Errorf("got %v and %v, want %v and %d", out.GetStatus(), denied.GetStatus(), tt.code, tt.http)
			}
			want := map[string]string{"content-type": "application/json", "cache-control": "no-store"}
			for name, value := range tt.headers {
				want[name] = value
			}
			if diff := cmp.Diff(want, headersOf(denied.GetHeaders())); diff != "" {
				t.Errorf("headers (-want +got):\n%s", diff)
			}
			var body struct{ Error map[string]any }
			if err := json.Unmarshal([]byte(denied.GetBody()), &body); err != nil || len(denied.GetBody()) > 1024 {
				t.Fatalf("body %q: %v", denied.GetBody(), err)
			}
			decision := out.GetDynamicMetadata().AsMap()["keyward.decision_id"]
			tt.body["decisionId"] = decision
			if diff := cmp.Diff(tt.body, body.Error); diff != "" {
				t.Errorf("body (-want +got):\n%s", diff)
			}
			if m := out.GetDynamicMetadata().AsMap(); m["keyward.denied"] != "true" || m["keyward.reason"] == "" {
				t.Errorf("metadata %v", m)
			}

			tt.request.GetAttributes().GetRequest().GetHttp().Method = "POST"
			h := tt.request.GetAttributes().GetRequest().GetHttp()
			if h.Headers == nil {
				h.Headers = map[string]string{}
			}
			h.Headers["content-type"] = "application/grpc+proto"
			out, err = client.Check(t.Context(), tt.request)
			if err != nil {
				t.Fatal(err)
			}
			denied = out.GetDeniedResponse()
			got := headersOf(denied.GetHeaders())
			if got["grpc-status"] != codeText(tt.code) || got["content-type"] != "" || denied.GetBody() != tt.body["message"] {
				t.Errorf("to a gRPC caller: %v %q", got, denied.GetBody())
			}
		})
	}
}

func codeText(c codes.Code) string {
	b, _ := json.Marshal(uint32(c))
	return string(b)
}

// TestAllCausesOf401LookAlike: whoever guesses learns nothing from the answer.
func TestAllCausesOf401LookAlike(t *testing.T) {
	bodies := map[string]bool{}
	for _, find := range []func() (*apikey.Key, error){
		func() (*apikey.Key, error) { return nil, apikey.ErrNotFound },
		func() (*apikey.Key, error) { k := *record; k.RevokedAt = time.Now(); return &k, nil },
		func() (*apikey.Key, error) { k := *record; k.Disabled = true; return &k, nil },
		func() (*apikey.Key, error) { k := *record; k.ExpirationDate = time.Unix(1, 0); return &k, nil },
	} {
		f := newFacts()
		f.find = find
		client, _ := dial(t, f, authz.Config{}, check.Config{})
		out, err := client.Check(t.Context(), withKey("/"))
		if err != nil {
			t.Fatal(err)
		}
		id := out.GetDynamicMetadata().AsMap()["keyward.decision_id"].(string)
		headers, _ := json.Marshal(headersOf(out.GetDeniedResponse().GetHeaders()))
		bodies[strings.ReplaceAll(out.GetDeniedResponse().GetBody(), id, "")+string(headers)] = true
	}
	if len(bodies) != 1 {
		t.Errorf("%d different answers: %v", len(bodies), bodies)
	}
}

func TestCouldNotDecide(t *testing.T) {
	away := func() (*apikey.Key, error) { return nil, apikey.ErrUndecided }
	busy := func() (*apikey.Key, error) {
		return nil, &apikey.BusyError{What: "too many unknown keys", RetryAfter: time.Second}
	}
	f := newFacts()
	client, _ := dial(t, f, authz.Config{}, check.Config{})
	f.find = away
	if out, err := client.Check(t.Context(), withKey("/")); status.Code(err) != codes.Unavailable {
		t.Errorf("store away: got %v, %v, want UNAVAILABLE", out, err)
	}
	f.find = busy
	out, err := client.Check(t.Context(), withKey("/"))
	if err != nil || out.GetDeniedResponse().GetStatus().GetCode() != 503 || headersOf(out.GetDeniedResponse().GetHeaders())["retry-after"] != "1" ||
		out.GetStatus().GetCode() != int32(codes.Unavailable) {
		t.Errorf("too many unknown keys: got %v, %v, want 503 with Retry-After: 1", out, err)
	}

	client, _ = dial(t, f, authz.Config{}, check.Config{ErrorResponse: true})
	for _, find := range []func() (*apikey.Key, error){away, busy} {
		f.find = find
		out, err := client.Check(t.Context(), withKey("/"))
		if err != nil || out.GetErrorResponse().GetStatus().GetCode() != 503 || out.GetStatus().GetCode() != int32(codes.Unavailable) ||
			headersOf(out.GetErrorResponse().GetHeaders())["retry-after"] != "1" {
			t.Errorf("error_response: got %v, %v", out, err)
		}
	}
}

func TestPanicIsAnErrorAndTellsNoSecret(t *testing.T) {
	f := newFacts()
	f.find = func() (*apikey.Key, error) { panic("the secret is " + secret) }
	client, log := dial(t, f, authz.Config{}, check.Config{})
	if out, err := client.Check(t.Context(), withKey("/")); status.Code(err) != codes.Internal {
		t.Errorf("got %v, %v, want INTERNAL", out, err)
	}
	if !strings.Contains(log.String(), "panic in a Check") || strings.Contains(log.String(), secret) {
		t.Errorf("log: %s", log)
	}
}

func TestRequestsThatAreNone(t *testing.T) {
	client, _ := dial(t, newFacts(), authz.Config{}, check.Config{})
	l4 := request("/", nil)
	l4.Attributes.Request = nil
	for name, tt := range map[string]struct {
		in   *authv3.CheckRequest
		want codes.Code
	}{
		"no attributes": {&authv3.CheckRequest{}, codes.InvalidArgument},
		"a connection":  {l4, codes.Unimplemented},
		"not a request": {&authv3.CheckRequest{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{}}}, codes.Unimplemented},
	} {
		if out, err := client.Check(t.Context(), tt.in); status.Code(err) != tt.want {
			t.Errorf("%s: got %v, %v, want %v", name, out, err, tt.want)
		}
	}
}

func TestHeadersInEitherForm(t *testing.T) {
	client, _ := dial(t, newFacts(), authz.Config{}, check.Config{})
	raw := func(values ...*corev3.HeaderValue) *authv3.CheckRequest {
		r := request("/", nil)
		r.Attributes.Request.Http.HeaderMap = &corev3.HeaderMap{Headers: values}
		return r
	}
	for name, tt := range map[string]struct {
		in   *authv3.CheckRequest
		want string
	}{
		"map":            {withKey("/"), "key"},
		"list":           {raw(&corev3.HeaderValue{Key: "x-api-key", Value: secret}), "key"},
		"raw":            {raw(&corev3.HeaderValue{Key: "x-api-key", RawValue: []byte(secret)}), "key"},
		"raw, any case":  {raw(&corev3.HeaderValue{Key: "X-API-Key", RawValue: []byte(secret)}), "key"},
		"raw, repeated":  {raw(&corev3.HeaderValue{Key: "x-api-key", RawValue: []byte(secret)}, &corev3.HeaderValue{Key: "x-api-key", RawValue: []byte(secret)}), "ambiguous_credential"},
		"raw, not UTF-8": {raw(&corev3.HeaderValue{Key: "x-api-key", RawValue: []byte(secret[:10] + "\xff" + secret[11:])}), "malformed_credential"},
		"map, joined":    {request("/", map[string]string{"x-api-key": secret + "," + secret}), "ambiguous_credential"},
	} {
		out, err := client.Check(t.Context(), tt.in)
		if err != nil {
			t.Fatal(err)
		}
		if got := out.GetDynamicMetadata().AsMap()["keyward.reason"]; got != tt.want {
			t.Errorf("%s: got %v, want %v", name, got, tt.want)
		}
	}
}

func TestDecisionLogIsSampledAndTellsNoSecret(t *testing.T) {
	client, log := dial(t, newFacts(), authz.Config{Credentials: authz.Credentials{QueryParameter: "key"}}, check.Config{LogPerSecond: 1})
	start := time.Now()
	for range 50 {
		if _, err := client.Check(t.Context(), request("/path/"+secret+"?key="+secret, map[string]string{"x-api-key": secret})); err != nil {
			t.Fatal(err)
		}
	}
	most := int(time.Since(start)/time.Second) + 2
	lines := strings.Count(log.String(), "\n")
	if lines < 1 || lines > most || strings.Contains(log.String(), secret[4:20]) || !strings.Contains(log.String(), `"path":"/path/[secret]"`) {
		t.Errorf("%d lines, want 1 to %d:\n%s", lines, most, log)
	}
}

func TestBadConfigurationIsRefused(t *testing.T) {
	for name, cfg := range map[string]check.Config{
		"two headers of one name": {Identity: check.Identity{Agent: "x-a", User: "x-a"}},
		"a name that is none":     {Identity: check.Identity{Agent: "X Agent"}},
		"realm":                   {Realm: `a"b`},
	} {
		if _, err := check.New(nil, cfg, prometheus.NewRegistry(), slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// connection is what a listener knows of the connection that a Check came by.
type connection struct {
	net.Addr
	granted int
	unheard bool
}

func (c *connection) ConnectionID() uint64 { return 7 }
func (c *connection) Granted()             { c.granted++ }
func (c *connection) Unheard() bool        { return c.unheard }

func TestLeaseNamesTheRequestThatItWasGrantedTo(t *testing.T) {
	f := newFacts()
	s, _, ids := newServer(t, f, authz.Config{}, check.Config{})
	c := &connection{}
	in := withKey("/")
	start := time.UnixMicro(1_700_000_000_123_456)
	in.Attributes.Request.Time = timestamppb.New(start)
	in.Attributes.Request.Http.Id = "12345"
	out, err := checkOnce(t, s, peer.NewContext(t.Context(), &peer.Peer{Addr: c}), in)
	if err != nil {
		t.Fatal(err)
	}
	id, _ := out.GetDynamicMetadata().AsMap()["keyward.lease"].(string)
	identity := authz.NewIdentity("203.0.113.9", 4711, start)
	want := limits.Lease{Cell: authz.LeaseCell(keyID), Identity: identity, HTTP: 12345}
	if got, err := ids.Open(id, identity); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	if c.granted != 1 || len(f.ended) != 0 {
		t.Errorf("granted %d, ended %v", c.granted, f.ended)
	}
}

func TestGrantThatNobodyWaitsForIsTakenBack(t *testing.T) {
	f := newFacts()
	s, _, _ := newServer(t, f, authz.Config{}, check.Config{})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if out, err := checkOnce(t, s, gone, withKey("/")); status.Code(err) != codes.Canceled {
		t.Fatalf("got %v, %v, want an error: the request would run uncounted", out, err)
	}
	if len(f.ended) != 1 || f.ended[0].Cause != limits.CauseContext || f.ended[0].Lease.Cell != authz.LeaseCell(keyID) {
		t.Errorf("ended %+v, want the lease just granted", f.ended)
	}
}

func TestNodeThatNeverSaysThatARequestEnded(t *testing.T) {
	f := newFacts()
	f.limits = limits.Decision{Class: limits.ClassConcurrency, RetryAfter: time.Second}
	s, log, _ := newServer(t, f, authz.Config{}, check.Config{})
	for _, unheard := range []bool{false, true, true} {
		out, err := checkOnce(t, s, peer.NewContext(t.Context(), &peer.Peer{Addr: &connection{unheard: unheard}}), withKey("/"))
		if err != nil {
			t.Fatal(err)
		}
		want := map[bool]string{false: "limit_concurrency", true: "concurrency_no_feedback"}[unheard]
		if got := out.GetDynamicMetadata().AsMap()["keyward.reason"]; got != want {
			t.Errorf("reason %v, want %s", got, want)
		}
		headers := headersOf(out.GetDeniedResponse().GetHeaders())
		if headers["retry-after"] != "1" || headers["ratelimit-policy"] != `"concurrency";q=10;qu="concurrent-requests"` ||
			!strings.Contains(out.GetDeniedResponse().GetBody(), `"limit":"concurrency"`) {
			t.Errorf("got %v %s", headers, out.GetDeniedResponse().GetBody())
		}
	}
	if n := strings.Count(log.String(), "keyward envoy generate envoy"); n != 1 {
		t.Errorf("%d lines say what to do, want 1:\n%s", n, log)
	}
}

// TestShadowIsTold: in metadata, log and metric, of a request that is let through.
func TestShadowIsTold(t *testing.T) {
	f := newFacts()
	f.limits.Shadowed = 1<<limits.ClassGlobalQuota | 1<<limits.ClassKeyQuota | 1<<limits.ClassBurst
	registry, log := prometheus.NewRegistry(), new(bytes.Buffer)
	peppers := apikey.Peppers{Current: apikey.NewPepper(1, false)}
	a, err := authz.New(authz.Config{Rules: []authz.Rule{{Path: "/", Scopes: apikey.Scopes{"x:y"}, Shadow: true}}}, f, f, peppers, f, f)
	if err != nil {
		t.Fatal(err)
	}
	s, err := check.New(a, check.Config{Leases: authz.NewLeaseIDs(peppers), LogPerSecond: 10}, registry, slog.New(slog.NewJSONHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	out, err := checkOnce(t, s, t.Context(), withKey("/"))
	if err != nil || out.GetStatus().GetCode() != 0 {
		t.Fatal(out, err)
	}
	const want = "quota,burst,scopes"
	if got := out.GetDynamicMetadata().AsMap()["keyward.shadow"]; got != want {
		t.Errorf("metadata: got %v, want %s", got, want)
	}
	if !strings.Contains(log.String(), `"shadow":"`+want+`"`) {
		t.Errorf("log: %s", log)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counted := map[string]float64{}
	for _, family := range families {
		if family.GetName() == "keyward_shadow_refusals_total" {
			for _, m := range family.GetMetric() {
				counted[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	if diff := cmp.Diff(map[string]float64{"instance": 0, "quota": 1, "burst": 1, "concurrency": 0, "scopes": 1, "addresses": 0}, counted); diff != "" {
		t.Errorf("metric (-want +got):\n%s", diff)
	}
}

// TestPrincipalsInTheLogCannotBeGuessed: their names there are always the same under one key, and others under
// another.
func TestPrincipalsInTheLogCannotBeGuessed(t *testing.T) {
	peppers := apikey.Peppers{Current: apikey.NewPepper(1, false)}
	f := newFacts()
	a, err := authz.New(authz.Config{Rules: []authz.Rule{{Path: "/", Context: "S:C"}}}, f, f, peppers, f, f)
	if err != nil {
		t.Fatal(err)
	}
	logged := func(key [32]byte) [2]string {
		log := new(bytes.Buffer)
		cfg := check.Config{Leases: authz.NewLeaseIDs(peppers), LogPerSecond: 10, LogKey: key}
		s, err := check.New(a, cfg, prometheus.NewRegistry(), slog.New(slog.NewJSONHandler(log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		if out, err := checkOnce(t, s, t.Context(), withKey("/")); err != nil || out.GetStatus().GetCode() != 0 {
			t.Fatal(out, err)
		}
		var line struct{ Principal, UserID string }
		if err := json.Unmarshal(log.Bytes(), &line); err != nil || len(line.Principal) != 32 || len(line.UserID) != 32 {
			t.Fatalf("%v: %s", err, log)
		}
		return [2]string{line.Principal, line.UserID}
	}
	one, again, other, none, alsoNone := logged([32]byte{1}), logged([32]byte{1}), logged([32]byte{2}), logged([32]byte{}), logged([32]byte{})
	if one != again {
		t.Errorf("under one key: %v and %v", one, again)
	}
	for i := range one {
		if one[i] == other[i] || none[i] == alsoNone[i] || one[i] == none[i] {
			t.Errorf("the same under different keys: %v, %v, %v, %v", one, other, none, alsoNone)
		}
	}
}

// TestQuotaRefusalIsWhatClientsRead: word for word, and never more than 1 KiB.
func TestQuotaRefusalIsWhatClientsRead(t *testing.T) {
	s, _, _ := newServer(t, newFacts(), authz.Config{}, check.Config{LegacyRateLimit: true})
	d := authz.Decision{
		Reason: authz.ReasonLimitQuotaPrincipal, Limit: limits.ClassPrincipalQuota, RetryAfter: 59*time.Second + 1,
		Quota: &apikey.Quota{Name: "per-user", Context: "CoreAPI:Completions"}, QuotaLimit: limits.Quota{Limit: 40, Window: 20 * time.Second},
	}
	out := new(authv3.CheckResponse)
	if err := proto.Unmarshal(s.Deny(&d, false), out); err != nil {
		t.Fatal(err)
	}
	const want = `{"error":{"code":"RateLimitExceeded","message":"Rate limit exceeded. Retry after 60 seconds.","retryAfter":60,"limit":"quota","decisionId":"00000000000000000000000000000000"},` +
		`"quota_name":"per-user","quota_context":"CoreAPI:Completions","quota_exceeded":true,"time_until_retry_seconds":60}`
	if got := out.GetDeniedResponse().GetBody(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	wantHeaders := map[string]string{
		"retry-after": "60", "ratelimit-policy": `"per-user";q=40;w=20`, "ratelimit": `"per-user";r=0;t=60`, "cache-control": "no-store",
		"content-type": "application/json", "x-ratelimit-limit": "40", "x-ratelimit-remaining": "0", "x-ratelimit-reset": "60",
	}
	if diff := cmp.Diff(wantHeaders, headersOf(out.GetDeniedResponse().GetHeaders())); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
	part := strings.Repeat("x", 128)
	d.Quota = &apikey.Quota{Name: part, Context: part[:64] + ":" + part[:64] + ":" + part}
	d.RetryAfter = limits.Never
	if err := proto.Unmarshal(s.Deny(&d, false), out); err != nil || len(out.GetDeniedResponse().GetBody()) > 1<<10 {
		t.Errorf("%v: a body of %d bytes", err, len(out.GetDeniedResponse().GetBody()))
	}
}
