package main

import (
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/protobuf/proto"
)

// TestTracesAreOff unless they are asked for: then nothing is installed, and nothing is in the way of a Check.
func TestTracesAreOff(t *testing.T) {
	made, err := openTraces(t.Context(), defaultConfig().Tracing, "replica", slog.New(slog.DiscardHandler))
	if made != nil || made.tracer() != nil || err != nil {
		t.Errorf("%v, %v, want nothing", made, err)
	}
	made.close()
	s := new(service)
	if _, wrapped := s.keyStore().(tracedStore); wrapped {
		t.Error("the store has spans around it")
	}
}

// TestTracesOverHTTP: by HTTP too, and what the configuration does not say, such as a collector's password and
// one's own name for the service, comes from the variables of OpenTelemetry.
func TestTracesOverHTTP(t *testing.T) {
	var mu sync.Mutex
	got := map[string]string{} // of spans' names, their services
	collector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		in := new(tracepb.ExportTraceServiceRequest)
		if err != nil || proto.Unmarshal(body, in) != nil || r.URL.Path != "/v1/traces" || r.Header.Get("x-password") != "of-the-collector" {
			t.Errorf("%s %v, %v", r.URL, r.Header, err)
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		for _, from := range in.GetResourceSpans() {
			for _, a := range from.GetResource().GetAttributes() {
				if a.GetKey() == "service.name" {
					got[from.GetScopeSpans()[0].GetSpans()[0].GetName()] = a.GetValue().GetStringValue()
				}
			}
		}
	}))
	defer collector.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-password=of-the-collector")
	t.Setenv("OTEL_SERVICE_NAME", "keys")
	for name, config := range map[string]Tracing{
		"by configuration": {Enabled: true, Endpoint: collector.URL, Ratio: 1},
		"by environment":   {Enabled: true, Ratio: 1},
		"never sampled":    {Enabled: true, Endpoint: collector.URL, Ratio: 0},
	} {
		if config.Endpoint == "" {
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.URL)
		} else {
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
		}
		made, err := openTraces(t.Context(), config, "replica", slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		_, span := made.tracer().Start(t.Context(), name)
		span.End()
		made.close() // which sends it
	}
	if len(got) != 2 || got["by configuration"] != "keys" || got["by environment"] != "keys" {
		t.Errorf("received %v", got)
	}
}

// TestTracesWithoutReceiver: a receiver that takes connections and never answers holds up nobody, the end only
// for as long as it may, and the log says it once.
func TestTracesWithoutReceiver(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var log lockedBuffer
	made, err := openTraces(t.Context(), Tracing{Enabled: true, Endpoint: "http://" + l.Addr().String(), Ratio: 1}, "replica", newLogger(&log, "json", slog.LevelInfo))
	if err != nil {
		t.Fatal(err)
	}
	made.flush = 200 * time.Millisecond
	for range 10_000 { // five times what is kept
		_, span := made.tracer().Start(t.Context(), "one of many")
		span.End()
	}
	ended := make(chan struct{})
	go func() {
		made.close()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the end waits for the receiver")
	}
	if n := strings.Count(log.String(), "the last traces were not sent"); n != 1 {
		t.Errorf("said %d times, want once: %s", n, &log)
	}
}
