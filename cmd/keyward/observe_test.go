package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

// readMetrics parses /metrics, and refuses labels by which series would grow with the keys.
func readMetrics(t *testing.T, at ports, secrets ...string) map[string]float64 {
	t.Helper()
	resp, err := http.Get("http://" + at.metrics + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("status %d, %v", resp.StatusCode, err)
	}
	for _, s := range secrets {
		if bytes.Contains(text, []byte(s)) {
			t.Error("/metrics shows what belongs to one key")
		}
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for name, family := range families {
		if strings.HasPrefix(name, "keyward_") && family.GetHelp() == "" {
			t.Errorf("%s has no help", name)
		}
		for _, m := range family.GetMetric() {
			series := name
			for _, l := range m.GetLabel() {
				series += " " + l.GetName() + "=" + l.GetValue()
				if n := strings.ToLower(l.GetName()); strings.HasPrefix(name, "keyward_") && (strings.Contains(n, "key") || slices.Contains([]string{"id", "instance", "user", "agent", "digest", "path"}, n)) {
					t.Errorf("%s has the label %s", name, n)
				}
			}
			values[series] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + m.GetUntyped().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return values
}

// TestServeIsSeen: metrics, health, profiles and the log of a server, until it drains.
func TestServeIsSeen(t *testing.T) {
	t.Parallel()
	dir, at := t.TempDir(), newPorts()
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, "keyward.yaml"), []byte(smallest), 0o600),
		writeNewPrivate(filepath.Join(dir, "pepper"), apikey.MarshalPepper(apikey.NewPepper(1, false))),
	); err != nil {
		t.Fatal(err)
	}
	// Its drain is longer than usual: only until then it tells of itself, and a busy machine takes its time to ask.
	server, err := serveAs(dir, append(at.env(), drainTime+"=15s"), at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.kill)
	token, err := os.ReadFile(filepath.Join(dir, adminTokenFile))
	if err != nil {
		t.Fatal(err)
	}
	client := manage.NewClient("http://"+at.manage, apikey.NewSecret(strings.TrimSpace(string(token))), nil)
	if _, err := client.PutInstance(t.Context(), "demo", admin.PolicyInput{}); err != nil {
		t.Fatal(err)
	}
	created, err := client.CreateKey(t.Context(), "demo", admin.KeyInput{Name: "seen"})
	if err != nil {
		t.Fatal(err)
	}
	secret, id := created.Secret.Reveal(), created.Key.ID.String()
	conn, err := dialCheck(at.check)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ask := func(secret string, want int) {
		t.Helper()
		if got, err := conn.status(secret, http.MethodGet, "/"); err != nil || got != want {
			t.Fatalf("got %d, %v, want %d", got, err, want)
		}
	}

	before := readMetrics(t, at, secret, id)
	ask(secret, http.StatusOK)
	ask(secret, http.StatusOK)
	ask("", http.StatusUnauthorized)
	unknown := apikey.Format{}.New(apikey.KindInstance).Reveal()
	ask(unknown, http.StatusUnauthorized)
	after := readMetrics(t, at, secret, id, unknown)
	grown := func(parts ...string) (sum float64) {
		for series, value := range after {
			if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(series, p) }) {
				sum += value - before[series]
			}
		}
		return sum
	}
	for _, test := range []struct {
		want  float64
		parts []string
	}{
		{2, []string{"keyward_decisions_total", "outcome=allowed"}},
		{2, []string{"keyward_decisions_total", "outcome=unauthenticated"}},
		{4, []string{"keyward_check_duration_seconds"}},
		{0, []string{"keyward_undecided_total"}},
		{0, []string{"keyward_check_panics_total"}},
	} {
		if got := grown(test.parts...); got != test.want {
			t.Errorf("%v: grew by %v, want %v", test.parts, got, test.want)
		}
	}
	for _, part := range []string{"keyward_cache_", "go_goroutines", "process_open_fds"} {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(after)), func(s string) bool { return strings.HasPrefix(s, part) }) {
			t.Errorf("no metric %s…", part)
		}
	}

	base := "http://" + at.metrics
	if err := errors.Join(
		statusIs(base+"/healthz", 200), statusIs(base+"/readyz", 200),
		statusIs(base+"/debug/pprof/", 200), statusIs(base+"/debug/pprof/heap", 200), statusIs(base+"/debug/pprof/goroutine?debug=1", 200),
		statusIs(base+"/", 404), statusIs(base+"/instances", 404),
		// and nowhere else
		statusIs("http://"+at.manage+"/metrics", 401), statusIs("http://"+at.manage+"/debug/pprof/", 401),
	); err != nil {
		t.Error(err)
	}

	// A sampled line for each decision, in JSON, that names the key and shows no secret.
	decisions := 0
	for line := range strings.Lines(server.says()) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Errorf("%v: %s", err, line)
		}
		if entry["msg"] == "decision" {
			decisions++
		}
	}
	if said := server.says(); decisions != 4 || !strings.Contains(said, id) || strings.Contains(said, secret) || strings.Contains(said, unknown) || strings.Contains(said, "kwm_") {
		t.Errorf("%d decisions in\n%s", decisions, said)
	}

	// Envoy watches the service by its health.
	watch, stop := context.WithCancel(t.Context())
	defer stop()
	stream, err := healthpb.NewHealthClient(conn.conn).Watch(watch, &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	wantHealth := func(want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		if got, err := stream.Recv(); err != nil || got.GetStatus() != want {
			t.Fatalf("got %v, %v, want %v", got, err, want)
		}
	}
	wantHealth(healthpb.HealthCheckResponse_SERVING)
	health := healthpb.NewHealthClient(conn.conn)
	for service, want := range map[string]codes.Code{"": codes.OK, "envoy.service.auth.v3.Authorization": codes.OK, "other": codes.NotFound} {
		if got, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{Service: service}); status.Code(err) != want || err == nil && got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("health of %q: %v, %v", service, got, err)
		}
	}
	if err := server.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wantHealth(healthpb.HealthCheckResponse_NOT_SERVING)
	if err := errors.Join(statusIs(base+"/readyz", http.StatusServiceUnavailable), statusIs(base+"/healthz", http.StatusOK), statusIs(base+"/metrics", http.StatusOK)); err != nil {
		t.Errorf("draining: %v", err)
	}
	stop()
	if code, err := server.ended(); code != exitOK || err != nil {
		t.Errorf("exit code %d, %v", code, err)
	}
}

func TestATourCanFail(t *testing.T) {
	var out bytes.Buffer
	tour := tour{out: &out}
	tour.check("first", []int{1}, []int{1})
	if tour.failed {
		t.Error("failed without a reason")
	}
	tour.expect("second", answer{status: 200}, 401)
	tour.check("third", "a", "a")
	if !tour.failed {
		t.Error("an unexpected answer was let pass")
	}
	lines := strings.Split(out.String(), "\n")
	if !strings.HasPrefix(lines[0], "ok  ") || !strings.HasPrefix(lines[1], "FAIL") || !strings.HasSuffix(lines[1], "expected 401, got 200") {
		t.Errorf("got %s", fmt.Sprint(lines))
	}
}
