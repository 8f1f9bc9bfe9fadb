package accesslog_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/structpb"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/envoy/accesslog"
	"keyward/envoy/envoytest"
	"keyward/envoy/generate"
	"keyward/envoy/wire"
	"keyward/limits"
)

// A told is what an Envoy said of one request.
type told struct {
	instance       string
	key            apikey.ID
	status         int
	received, sent int64
	took           time.Duration
}

type ledger struct {
	mu  sync.Mutex
	all []told
}

func (l *ledger) Ended(instanceID string, key apikey.ID, status int, requestBytes, responseBytes int64, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, told{instanceID, key, status, requestBytes, responseBytes, took})
}

// take waits for n requests to be told, and returns them by key.
func (l *ledger) take(t *testing.T, n int) []told {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		l.mu.Lock()
		all := slices.Clone(l.all)
		l.mu.Unlock()
		if len(all) >= n || time.Now().After(deadline) {
			if len(all) != n {
				t.Fatalf("%d requests were told, want %d: %+v", len(all), n, all)
			}
			slices.SortFunc(all, func(a, b told) int { return bytes.Compare(a.key[:], b.key[:]) })
			return all
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// A judge answers Check by what the path says, and gives the request a key whose number is in it:
// /ok/7, /denied/7, and /nobody/7 without a key.
type judge struct {
	authv3.UnimplementedAuthorizationServer
}

const ledgerHome = "9d3ca1b4-0000-4000-8000-0123456789ab"

func keyNumber(n int) (id apikey.ID) {
	id[15] = byte(n)
	return id
}

func (judge) Check(_ context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	target, _, _ := strings.Cut(r.GetAttributes().GetRequest().GetHttp().GetPath(), "?")
	path := strings.Split(strings.TrimPrefix(target, "/"), "/")
	n, _ := strconv.Atoi(path[1])
	facts := map[string]*structpb.Value{"keyward.reason": structpb.NewStringValue(path[0])}
	if path[0] != "nobody" {
		facts["keyward.key_id"], facts["keyward.instance"] = structpb.NewStringValue(keyNumber(n).String()), structpb.NewStringValue(ledgerHome)
	}
	answer := &authv3.CheckResponse{Status: &status.Status{}, DynamicMetadata: &structpb.Struct{Fields: facts}}
	if path[0] == "denied" {
		answer.Status.Code = 8
		answer.HttpResponse = &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: 429}, Body: "no"}}
		return answer, nil
	}
	answer.HttpResponse = &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}
	return answer, nil
}

type unheard struct{ limits.Leaser }

func (unheard) Renew(context.Context, []limits.Lease) error { panic("usage renewed a lease") }
func (unheard) End(context.Context, []limits.Ending) error  { panic("usage ended a lease") }

// exchange sends a request as it is written, reads until the other side closes, and returns how many
// bytes came.
func exchange(t *testing.T, address, request string) (status int, received int64) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(all)), nil)
	if err != nil {
		t.Fatalf("%q: %v", all, err)
	}
	_ = res.Body.Close()
	return res.StatusCode, int64(len(all))
}

// TestEnvoyTellsOfUsage: the status, the bytes that the client itself counts, and how long it took, of each
// request of a known key and of no other, by both protocols on the oldest, a middle and the newest Envoy.
func TestEnvoyTellsOfUsage(t *testing.T) {
	const delay = 150 * time.Millisecond
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Query().Has("slow") {
			time.Sleep(delay)
		}
		if code, err := strconv.Atoi(r.URL.Query().Get("status")); err == nil {
			w.WriteHeader(code)
		}
		n, _ := strconv.Atoi(r.URL.Query().Get("bytes"))
		_, _ = w.Write(bytes.Repeat([]byte("x"), n))
	}))
	t.Cleanup(upstream.Close)
	for _, version := range envoytest.Versions() {
		for _, feedback := range []generate.Feedback{generate.FeedbackALS, generate.FeedbackOTLP} {
			t.Run(version+"/"+string(feedback), func(t *testing.T) {
				var book ledger
				reg := prometheus.NewRegistry()
				heard := accesslog.New(unheard{}, &book, authz.NewLeaseIDs(apikey.Peppers{Current: apikey.NewPepper(1, false)}), reg, slog.New(slog.DiscardHandler))
				address := serveJudge(t, heard)
				config, err := generate.Envoy(generate.Config{
					Listen: "127.0.0.1:0", Upstreams: []string{upstream.Listener.Addr().String()}, Keyward: address,
					CheckTimeout: 10 * time.Second, Feedback: feedback, Usage: true,
				})
				if err != nil {
					t.Fatal(err)
				}
				envoy := envoytest.Run(t, version, envoytest.Config{Bootstrap: config})
				front := envoy.Listener(generate.Listener)
				waitForKeyward(t, envoy)

				send := func(line, body string) (int, int64, int64) {
					request := line + " HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n"
					if body != "" {
						request += fmt.Sprintf("Content-Length: %d\r\n", len(body))
					}
					request += "\r\n" + body
					status, received := exchange(t, front, request)
					return status, int64(len(request)), received
				}
				send("GET /nobody/1", "")
				var want []told
				for i, tt := range []struct {
					line, body string
					status     int
					atLeast    time.Duration
				}{
					{"GET /ok/1?bytes=7", "", 200, 0},
					{"GET /ok/2?status=204", "", 204, 0},
					{"GET /ok/3?status=404&bytes=100000", "", 404, 0},
					{"POST /ok/4?status=500", strings.Repeat("y", 100_000), 500, 0},
					{"GET /ok/5?slow", "", 200, delay},
					{"GET /denied/6", "", 429, 0},
				} {
					status, sent, received := send(tt.line, tt.body)
					if status != tt.status {
						t.Fatalf("%s: got %d, want %d", tt.line, status, tt.status)
					}
					want = append(want, told{ledgerHome, keyNumber(i + 1), tt.status, sent, received, tt.atLeast})
				}
				for i, got := range book.take(t, len(want)) {
					w := want[i]
					if got.took < w.took || got.took > 20*time.Second {
						t.Errorf("request %d took %v, want at least %v", i, got.took, w.took)
					}
					w.took = got.took
					if got != w {
						t.Errorf("got %+v, want %+v", got, w)
					}
				}
			})
		}
	}
}

func waitForKeyward(t *testing.T, envoy *envoytest.Process) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		stats, err := envoy.Stats(t.Context(), `^cluster\.keyward\.membership_healthy$`)
		if err == nil && stats["cluster.keyward.membership_healthy"] == 1 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("Envoy does not find keyward: %v, %v", stats, err)
		}
	}
}

func serveJudge(t *testing.T, heard *accesslog.Server) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.ForceServerCodecV2(wire.NewCodec()),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}))
	authv3.RegisterAuthorizationServer(server, judge{})
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	heard.Register(server)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		heard.Stop()
		server.Stop()
		heard.Wait()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}
