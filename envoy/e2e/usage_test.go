package e2e_test

import (
	"net/http"
	"strings"
	"sync"
	"testing"

	"keyward/authz/apikey"
)

// TestUsageBesideLeases: with both logs each lease is heard to end, none by what the log of usage says, and
// each request is told of once.
func TestUsageBesideLeases(t *testing.T) {
	eachFeedback(t, func(t *testing.T, feedback string) {
		s := serveLeases(t, "feedback: %s, wait: 200ms", feedback)
		x := s.stage(t, frontConfig{args: []string{"--usage"}})
		const clients, each, limit = 8, 25, 4
		k := x.leaseKey(t, limit)
		var sending sync.WaitGroup
		for range clients {
			sending.Go(func() {
				c := x.caller(t)
				for range each {
					c.get("/?hold=2ms", withKey(k.secret)) // 200, or 429 where four run
				}
			})
		}
		sending.Wait()
		x.caller(t).get("/", withKey(s.unknown(apikey.KindUser))).want(t, http.StatusUnauthorized)
		if came := x.work.of(k); came.peak > limit {
			t.Errorf("%d requests ran at once, want at most %d", came.peak, limit)
		}
		x.wantNone(t, k, soon)
		s.wantNoneLost(t)
		entries := func(kind string) float64 { return s.metric(t, `keyward_access_log_entries_total{kind="`+kind+`"}`) }
		waitFor(t, "Envoy to tell of usage", func() bool { return entries("usage") >= clients*each })
		if n := entries("usage"); n != clients*each {
			t.Errorf("%v requests are told of, want %d: those of the key, also the refused ones", n, clients*each)
		}
		for _, kind := range []string{"forged", "foreign", "malformed", "ignored"} {
			if n := entries(kind); n != 0 {
				t.Errorf("%v entries are %s", n, kind)
			}
		}
		if log := s.log(); strings.Contains(log, "panic") {
			t.Error("the log tells of a panic")
		}
	})
}
