package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

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
