package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"
)

// maxDelay is how slow the demo service can be made.
const maxDelay = 5 * time.Minute

// demoService answers any request with what reached it, so that one sees what Envoy and keyward made of
// it. ?delay=1s makes it slow.
func demoService(w http.ResponseWriter, r *http.Request) {
	if text := r.URL.Query().Get("delay"); text != "" {
		delay, err := time.ParseDuration(text)
		if err != nil || delay < 0 || delay > maxDelay {
			http.Error(w, fmt.Sprintf("delay must be a duration from 0s to %v", maxDelay), http.StatusBadRequest)
			return
		}
		select {
		case <-time.After(delay):
		case <-r.Context().Done():
			return
		}
	}
	headers := map[string][]string{}
	for name, values := range r.Header {
		headers[name] = values
	}
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(echo{Method: r.Method, Path: r.URL.RequestURI(), Host: r.Host, Headers: headers})
}

// An echo is what the demo service answers.
type echo struct {
	Method  string              `json:"method"`
	Path    string              `json:"path"`
	Host    string              `json:"host"`
	Headers map[string][]string `json:"headers"`
}
