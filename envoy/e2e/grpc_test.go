package e2e_test

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

func (f *front) grpc(t *testing.T) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(f.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestGRPCCallers(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	f := s.front(t, frontConfig{grpc: true})
	f.awaitHealthy(t)
	home := s.instance(t, admin.PolicyInput{})
	conn := f.grpc(t)
	client := healthpb.NewHealthClient(conn)
	with := func(pairs ...string) context.Context { return metadata.AppendToOutgoingContext(t.Context(), pairs...) }

	// call makes a call as often as Envoy says that keyward is away, which on a busy machine it may. There is
	// patience for all calls together, for the sake of a keyward that says so itself.
	end := time.Now().Add(patience)
	call := func(do func() error) error {
		for ; ; time.Sleep(50 * time.Millisecond) {
			if err := do(); status.Code(err) != codes.Unavailable || time.Now().After(end) {
				return err
			}
		}
	}
	check := func(ctx context.Context, options ...grpc.CallOption) error {
		return call(func() error {
			_, err := client.Check(ctx, &healthpb.HealthCheckRequest{}, options...)
			return err
		})
	}
	watch := func(ctx context.Context) error {
		return call(func() error {
			stream, err := client.Watch(ctx, &healthpb.HealthCheckRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		})
	}
	// The message is short text for people, not the JSON that HTTP callers get.
	wantStatus := func(what string, err error, code codes.Code, message string) {
		t.Helper()
		if got := status.Convert(err); got.Code() != code || got.Message() != message {
			t.Errorf("%s: got %v %q, want %v %q", what, got.Code(), got.Message(), code, message)
		}
	}
	const unauthorized = "A valid API key is required. Check that the key is complete, active and sent once."

	k := s.key(t, home, admin.KeyInput{Type: apikey.TypeAgent, AgentName: "sales", Scopes: []string{"calls:*"}})
	for i, credentials := range [][]string{{"x-api-key", k.secret}, {"authorization", "Bearer " + k.secret}, {"x-agent-access-token", k.secret, "authorization", "Bearer eyJhbGciOiJub25lIn0.e30.c2ln"}} {
		mark := "grpc-" + string(rune('a'+i))
		if err := check(with(append(credentials, strings.ToLower(caseHeader), mark, "x-keyward-user", "evil", "x.keyward.scopes", "evil")...)); err != nil {
			t.Fatalf("%s: %v", credentials[0], err)
		}
		for _, seen := range f.up.of(mark) {
			got := defaultNames.identity(seen)
			for i := range got { // as HTTP/2 has them; the upstream's library spells them its way
				got[i].Name = strings.ToLower(got[i].Name)
				if decisionID.MatchString(got[i].Value) {
					got[i].Value = "…"
				}
			}
			if diff := cmp.Diff(defaultNames.of(k, "calls:*"), got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", credentials[0], diff)
			}
			if seen.has(k.secret[8:]) || seen.has("evil") {
				t.Errorf("%s: the secret or a spoof reached the upstream", credentials[0])
			}
		}
		if n := len(f.up.of(mark)); n != 1 {
			t.Errorf("%s: arrived %d times, want once", credentials[0], n)
		}
	}
	wantStatus("no key", check(t.Context()), codes.Unauthenticated, unauthorized)
	wantStatus("an unknown key", check(with("x-api-key", s.unknown(apikey.KindAgent))), codes.Unauthenticated, unauthorized)
	wantStatus("a stream without a key", watch(t.Context()), codes.Unauthenticated, unauthorized)
	wantStatus("a stream without the scope", watch(with("x-api-key", k.secret)), codes.PermissionDenied, "The key lacks the scope watch. Use a key that has it.")
	if err := watch(with("x-api-key", s.key(t, home, admin.KeyInput{Scopes: []string{"watch"}}).secret)); err != nil {
		t.Errorf("a stream with the scope: %v", err)
	}
	wantStatus("a bad path", call(func() error {
		return conn.Invoke(with("x-api-key", k.secret), "/grpc.health.v1.Health/Check;x", &healthpb.HealthCheckRequest{}, &healthpb.HealthCheckResponse{})
	}), codes.InvalidArgument, "The path is ambiguous. Send it without dot segments, empty segments, backslashes, semicolons and needless escapes.")

	limitedKey := s.key(t, home, admin.KeyInput{Limits: limited(1, "1h", 5)})
	statuses := map[codes.Code]int{}
	for range 12 {
		var header, trailer metadata.MD
		err := check(with("x-api-key", limitedKey.secret), grpc.Header(&header), grpc.Trailer(&trailer))
		statuses[status.Code(err)]++
		if err == nil {
			continue
		}
		if all := metadata.Join(header, trailer).Get("retry-after"); !slices.Equal(all, []string{"3600"}) && !slices.Equal(all, []string{"3599"}) {
			t.Errorf("got retry-after %q, want about 3600 seconds", all)
		}
		if message := status.Convert(err).Message(); !strings.HasPrefix(message, "Rate limit exceeded. Retry after 3") || strings.Contains(message, "{") {
			t.Errorf("got message %q", message)
		}
	}
	if diff := cmp.Diff(map[codes.Code]int{codes.OK: 5, codes.ResourceExhausted: 7}, statuses); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	// gRPC-Web is HTTP to Envoy, and is answered in JSON.
	c := f.caller(t)
	c.do("POST", "/grpc.health.v1.Health/Check", "Content-Type: application/grpc-web+proto", "Content-Length: 0").wantRefusal(t, http.StatusUnauthorized, "gRPC-Web")
}
