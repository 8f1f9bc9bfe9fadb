package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	tracepb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A receiver is an OTLP collector that keeps what it is sent.
type receiver struct {
	tracepb.UnimplementedTraceServiceServer
	address string // over gRPC, which Envoy speaks
	url     string // over HTTP, which keyward does

	mu    sync.Mutex
	spans []span
	text  bytes.Buffer // all that keyward sent, to search; Envoy's spans hold the URL and more
}

// A span is one as it was received.
type span struct {
	service, name           string
	trace, id, parent       string // in hexadecimal
	failed                  bool
	outcome, reason         string
	instance, key, decision string
	status                  int64
}

func receive(t *testing.T) *receiver {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{address: l.Addr().String()}
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		body, err := io.ReadAll(q.Body)
		in := new(tracepb.ExportTraceServiceRequest)
		if err == nil {
			err = proto.Unmarshal(body, in)
		}
		if err != nil || q.URL.Path != "/v1/traces" {
			t.Errorf("keyward sent to %s: %v", q.URL.Path, err)
		}
		_, _ = r.Export(q.Context(), in)
		w.Header().Set("Content-Type", "application/x-protobuf") // an empty message is the answer
	}))
	t.Cleanup(web.Close)
	r.url = web.URL
	server := grpc.NewServer()
	tracepb.RegisterTraceServiceServer(server, r)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *receiver) Export(_ context.Context, in *tracepb.ExportTraceServiceRequest) (*tracepb.ExportTraceServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, resource := range in.GetResourceSpans() {
		service := ""
		for _, a := range resource.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				service = a.GetValue().GetStringValue()
			}
		}
		if service == "keyward" {
			r.text.WriteString(protojson.Format(resource))
		}
		for _, scope := range resource.GetScopeSpans() {
			for _, got := range scope.GetSpans() {
				s := span{
					service: service, name: got.GetName(), failed: got.GetStatus().GetCode() == 2,
					trace: fmt.Sprintf("%x", got.GetTraceId()), id: fmt.Sprintf("%x", got.GetSpanId()), parent: fmt.Sprintf("%x", got.GetParentSpanId()),
				}
				for _, a := range got.GetAttributes() {
					text := a.GetValue().GetStringValue()
					switch a.GetKey() {
					case "keyward.outcome":
						s.outcome = text
					case "keyward.reason":
						s.reason = text
					case "keyward.instance":
						s.instance = text
					case "keyward.key_id":
						s.key = text
					case "keyward.decision_id":
						s.decision = text
					case "http.response.status_code":
						s.status = a.GetValue().GetIntValue()
					}
				}
				r.spans = append(r.spans, s)
			}
		}
	}
	return new(tracepb.ExportTraceServiceResponse), nil
}

// find returns the spans of a trace and a name.
func (r *receiver) find(service, trace, name string) (found []span) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.spans {
		if s.service == service && (trace == "" || s.trace == trace) && s.name == name {
			found = append(found, s)
		}
	}
	return found
}

const checkSpan = "envoy.service.auth.v3.Authorization/Check"

// TestTraces: an Envoy that traces a request says so with its Check, and then keyward's part of the trace
// hangs below Envoy's. Requests that Envoy does not trace have no spans, whatever tracing.ratio says: that
// is for callers who have not decided. No span holds a secret.
func TestTraces(t *testing.T) {
	t.Parallel()
	r := receive(t)
	s := serve(t, config{yaml: fmt.Sprintf("tracing: {enabled: true, endpoint: %q, ratio: 1}\n", r.url)})
	home := s.instance(t, admin.PolicyInput{})
	k := s.key(t, home, admin.KeyInput{})
	tracing := func(sampled int) func(map[string]any) {
		return func(tree map[string]any) {
			at(tree, "static_resources", "listeners", 0, "filter_chains", 0, "filters", 0, "typed_config").(map[string]any)["tracing"] = map[string]any{
				"random_sampling": map[string]any{"value": sampled},
				"provider": map[string]any{"name": "envoy.tracers.opentelemetry", "typed_config": map[string]any{
					"@type":        "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
					"grpc_service": map[string]any{"envoy_grpc": map[string]any{"cluster_name": "traces"}},
					"service_name": "front",
				}},
			}
			host, port, _ := net.SplitHostPort(r.address)
			resources := tree["static_resources"].(map[string]any)
			resources["clusters"] = append(resources["clusters"].([]any), map[string]any{
				"name": "traces", "type": "STATIC",
				"typed_extension_protocol_options": map[string]any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": map[string]any{
					"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
					"explicit_http_config": map[string]any{"http2_protocol_options": map[string]any{}},
				}},
				"load_assignment": map[string]any{"cluster_name": "traces", "endpoints": []any{map[string]any{"lb_endpoints": []any{map[string]any{
					"endpoint": map[string]any{"address": map[string]any{"socket_address": map[string]any{"address": host, "port_value": port}}},
				}}}}},
			})
		}
	}
	f, quiet := s.front(t, frontConfig{edit: tracing(100)}), s.front(t, frontConfig{edit: tracing(0)})
	f.awaitHealthy(t)
	quiet.awaitHealthy(t)
	c := f.caller(t)

	unknown := s.unknown(apikey.KindInstance)
	traced := func(n int) (id, line string) {
		id = fmt.Sprintf("4bf92f3577b34da6a3ce929d0e0e%04x", n)
		return id, "traceparent: 00-" + id + "-00f067aa0ba902b7-01"
	}
	_, line := traced(0)
	quiet.caller(t).get("/", withKey(k.secret), line).want(t, 200, "which Envoy does not trace")
	allowed, line := traced(1)
	c.get("/", withKey(k.secret), line).want(t, 200, "traced")
	denied, line := traced(2)
	c.get("/?password="+unknown, withKey(unknown), line, "User-Agent: "+unknown).want(t, 401, "traced")
	cold := s.key(t, home, admin.KeyInput{})
	missed, line := traced(3)
	c.get("/", withKey(cold.secret), line).want(t, 200, "traced, with a key that is not in memory")
	_, err := s.client.Key(t.Context(), home, apikey.ID{1})
	if err == nil {
		t.Fatal("there is such a key")
	}

	var got []span
	for _, trace := range []string{allowed, denied, missed} {
		waitFor(t, "the spans of "+trace, func() bool { return len(r.find("keyward", trace, checkSpan)) > 0 })
		got = append(got, r.find("keyward", trace, checkSpan)...)
	}
	for i, s := range got {
		if len(s.decision) != 32 {
			t.Errorf("decision id %q", s.decision)
		}
		waitFor(t, "Envoy's own span", func() bool {
			return slices.ContainsFunc(r.find("front", s.trace, "async envoy.service.auth.v3.Authorization.Check egress"), func(above span) bool { return above.id == s.parent })
		})
		got[i].decision, got[i].id, got[i].parent = "", "", ""
	}
	want := []span{
		{service: "keyward", name: checkSpan, trace: allowed, outcome: "allowed", reason: "key", instance: home, key: k.ID.String()},
		{service: "keyward", name: checkSpan, trace: denied, outcome: "unauthenticated", reason: "unknown_key"},
		{service: "keyward", name: checkSpan, trace: missed, outcome: "allowed", reason: "key", instance: home, key: cold.ID.String()},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(span{})); diff != "" {
		t.Error(diff)
	}
	below := r.find("keyward", missed, "store.FindKey")
	if len(below) != 1 || below[0].parent != r.find("keyward", missed, checkSpan)[0].id {
		t.Errorf("look-ups of a key that is not in memory: %+v", below)
	}
	// Of all Checks, those three; and the Management API begins traces of its own.
	if all := r.find("keyward", "", checkSpan); len(all) != 3 {
		t.Errorf("%d spans of Checks, want 3: %+v", len(all), all)
	}
	for name, status := range map[string]int64{
		"POST /instances/{instanceId}/apiKeys":        201,
		"GET /instances/{instanceId}/apiKeys/{keyId}": 404,
	} {
		waitFor(t, name, func() bool { return len(r.find("keyward", "", name)) > 0 })
		if got := r.find("keyward", "", name)[0]; got.status != status || got.parent != "" {
			t.Errorf("%s: %+v, want status %d", name, got, status)
		}
	}

	// An Envoy that traces nothing says nothing, and keyward's own ratio counts.
	plain := s.front(t, frontConfig{})
	plain.awaitHealthy(t)
	alone, line := traced(4)
	plain.caller(t).get("/", withKey(k.secret), line).want(t, 200, "by an Envoy that does not trace")
	waitFor(t, "a trace of keyward's own", func() bool { return len(r.find("keyward", "", checkSpan)) == 4 })
	if got := r.find("keyward", "", checkSpan)[3]; got.trace == alone || got.parent != "" || got.key != k.ID.String() {
		t.Errorf("%+v, want a trace of keyward's own: what a client says is Envoy's to believe", got)
	}

	s.process.stop(t) // which sends what is left
	r.mu.Lock()
	defer r.mu.Unlock()
	if hits := s.canary.Find(r.text.Bytes()); len(hits) > 0 {
		t.Errorf("spans hold secrets: %v", hits)
	}
}
