package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"keyward/authz/apikey"
	"keyward/authz/manage"
)

// TestEnsureInstanceReplacesNothing: not what somebody else makes at the same time, and not what could not be seen
// because the server was busy for a moment.
func TestEnsureInstanceReplacesNothing(t *testing.T) {
	const there = `{"id":"shop","policy":{},"createdAt":"2026-11-24T00:00:00Z"}`
	for name, test := range map[string]struct {
		statuses []int // of the answers, in their order
		want     string
		status   int
	}{
		"is there":         {[]int{200}, "GET", 0},
		"is not":           {[]int{404, 201}, "GET,PUT*", 0},
		"made meanwhile":   {[]int{404, 412, 200}, "GET,PUT*,GET", 0},
		"not to be seen":   {[]int{403}, "GET", 403},
		"the server rests": {[]int{503}, "GET", 503},
		"not to be made":   {[]int{404, 403}, "GET,PUT*", 403},
	} {
		t.Run(name, func(t *testing.T) {
			var asked []string
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked = append(asked, r.Method+r.Header.Get("If-None-Match"))
				w.WriteHeader(test.statuses[len(asked)-1])
				_, _ = w.Write([]byte(there))
			}))
			defer server.Close()
			in, err := ensureInstance(t.Context(), manage.NewClient(server.URL, apikey.NewSecret("kwm_x"), nil), "shop")
			if refusedAs(err) != test.status || (err == nil) != (in.ID == "shop") || strings.Join(asked, ",") != test.want {
				t.Errorf("asked %v, want %s; got %q, %v", asked, test.want, in.ID, err)
			}
		})
	}
}
