package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"keyward/envoy/traffic"
)

// TestBenchReadsNoOtherProcess: metrics that nobody named are read only where keyward itself may be.
func TestBenchReadsNoOtherProcess(t *testing.T) {
	for name, tt := range map[string]struct {
		args, env []string
		want      string
	}{
		"nothing said":              {nil, nil, defaultMetrics},
		"loopback":                  {[]string{"--address", "127.0.0.1:4000"}, nil, defaultMetrics},
		"loopback, IPv6":            {[]string{"--address", "[::1]:4000"}, nil, defaultMetrics},
		"localhost":                 {[]string{"--address", "localhost:4000", "--server", "https://localhost:1"}, nil, defaultMetrics},
		"Unix socket":               {[]string{"--address", "unix:///run/keyward/check.sock"}, nil, defaultMetrics},
		"elsewhere":                 {[]string{"--address", "192.0.2.1:9191"}, nil, ""},
		"elsewhere, by name":        {[]string{"--address", "keyward.example:9191"}, nil, ""},
		"server elsewhere":          {[]string{"--server", "https://keyward.example"}, nil, ""},
		"server of the environment": {nil, []string{"KEYWARD_SERVER=https://keyward.example"}, ""},
		"server of the secrets":     {[]string{"--server", "https://keyward.example", "--secrets", "x"}, nil, defaultMetrics},
		"switched off":              {[]string{"--metrics", "-"}, nil, ""},
		"named":                     {[]string{"--address", "192.0.2.1:9191", "--metrics", "192.0.2.1:9193"}, nil, "http://192.0.2.1:9193"},
		"named with a scheme":       {[]string{"--metrics", "https://192.0.2.1:9193/"}, nil, "https://192.0.2.1:9193"},
	} {
		b := &bench{app: &app{environ: tt.env}}
		if err := b.command().ParseFlags(tt.args); err != nil {
			t.Fatal(err)
		}
		if got := b.metricsURL(); got != tt.want {
			t.Errorf("%s: reads %q, want %q", name, got, tt.want)
		}
	}
}

// TestBenchPrintsNoDigitsItDoesNotKnow: processor time comes in steps of 10 ms.
func TestBenchPrintsNoDigitsItDoesNotKnow(t *testing.T) {
	for _, tt := range []struct {
		cpu      time.Duration // in all
		requests int64
		want     float64 // µs of each
		text     string
	}{
		{1_470 * time.Millisecond, 100_000, 14.7, "14.7 µs"},
		{14_777 * time.Millisecond, 1_000_000, 14.8, "14.8 µs"},
		{1_460 * time.Millisecond, 99_999, 15, "15 µs"},
		{90 * time.Millisecond, 6_000, 20, "20 µs"},
		{30 * time.Millisecond, 200, 200, "200 µs"},
		{0, 200, 0, "less than 100 µs"},
		{0, 1_000_000, 0, "less than 0.1 µs"},
	} {
		got, text := serverCPU(&traffic.Result{CPUPerRequest: tt.cpu / time.Duration(tt.requests), Requests: tt.requests})
		if got != tt.want || text != tt.text {
			t.Errorf("%v for %d: got %v and %q, want %v and %q", tt.cpu, tt.requests, got, text, tt.want, tt.text)
		}
	}
}

// TestBenchKeysEnd: a bench that was killed leaves keys without limits, and not for long.
func TestBenchKeysEnd(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("kwm_x"), 0o600); err != nil {
		t.Fatal(err)
	}
	made := make(chan string, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodPut:
			fmt.Fprint(w, "{}")
		case http.MethodPost:
			var in struct{ ExpiresIn string }
			if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
				t.Error(err)
			}
			made <- in.ExpiresIn
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	defer server.Close()
	run(t.Context(), []string{"bench", "--server", server.URL, "--token-file", token, "--keys", "1", "--metrics", "-", "--warmup", "30s", "--duration", "10m"},
		strings.NewReader(""), io.Discard, io.Discard)
	if got, want := <-made, "1h10m30s"; got != want {
		t.Errorf("expires in %q, want %q", got, want)
	}
}

// TestBenchSaysWhatItLeaves: when the instance cannot be removed, the last word is how to do it by hand,
// whether the run failed or was interrupted.
func TestBenchSaysWhatItLeaves(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("kwm_x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, interrupt := range map[string]bool{"failed": false, "interrupted": true} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch r.Method {
				case http.MethodPut:
					fmt.Fprint(w, "{}")
				case http.MethodPost:
					if interrupt {
						_, _ = io.Copy(io.Discard, r.Body) // only then is it noticed that the client is gone
						cancel()
						<-r.Context().Done()
						return
					}
					w.WriteHeader(http.StatusInternalServerError)
				case http.MethodDelete:
					w.WriteHeader(http.StatusServiceUnavailable)
				}
			}))
			defer server.Close()
			var stdout, stderr bytes.Buffer
			code := run(ctx, []string{"bench", "--server", server.URL, "--token-file", token, "--keys", "1", "--metrics", "-"}, strings.NewReader(""), &stdout, &stderr)
			if code == exitOK {
				t.Error("the exit code is 0")
			}
			lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
			last := lines[len(lines)-1]
			if want := regexp.MustCompile(`the instance (bench-[0-9a-f]{12}) may be left: .*; remove it by: keyward instances delete bench-[0-9a-f]{12} --revoke-keys --yes$`); !want.MatchString(last) {
				t.Errorf("the last word is %q", last)
			}
		})
	}
}
