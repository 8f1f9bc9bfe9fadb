package e2e_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
)

// atOnce sends a number of requests with several connections, and returns the answers.
func (f *front) atOnce(t *testing.T, n int, lines ...[]string) []answer {
	t.Helper()
	const connections = 8
	answers := make([][]answer, connections)
	var sending sync.WaitGroup
	for i := range connections {
		c := f.caller(t)
		sending.Go(func() {
			defer c.hangUp()
			for j := i; j < n; j += connections {
				for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
					a, err := c.once(requestText("GET", "/any", lines[j%len(lines)]...))
					if err != nil {
						t.Error(err)
						return
					}
					if a.status != http.StatusServiceUnavailable || time.Now().After(end) {
						answers[i] = append(answers[i], a)
						break
					}
				}
			}
		})
	}
	sending.Wait()
	return slices.Concat(answers...)
}

// split counts the answers that let a request through, and returns the others. Any but 200 and 429 is a
// fault.
func split(t *testing.T, answers []answer) (passed int, refused []answer) {
	t.Helper()
	for _, a := range answers {
		switch a.status {
		case http.StatusOK:
			passed++
		case http.StatusTooManyRequests:
			refused = append(refused, a)
		default:
			t.Fatalf("got status %d: %s", a.status, a.body)
		}
	}
	return passed, refused
}

func TestLimits(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	home := s.instance(t, admin.PolicyInput{})

	t.Run("BurstIsExactAndRetryAfterIsTrue", func(t *testing.T) {
		t.Parallel()
		const burst, interval = 10, 5 * time.Second
		// What the bucket earns meanwhile passes too: on a machine so busy that the burst takes longer than
		// one interval, another key is tried.
		for try := 0; ; try++ {
			k := s.key(t, home, admin.KeyInput{Limits: limited(12, "1m", burst)})
			began := time.Now()
			passed, refused := split(t, f.atOnce(t, 40, []string{withKey(k.secret)}))
			if took := time.Since(began); took > interval-time.Second && try < 5 {
				t.Logf("40 requests took %v", took)
				continue
			}
			if passed != burst || len(refused) != 40-burst {
				t.Fatalf("%d passed and %d were refused, want %d and %d", passed, len(refused), burst, 40-burst)
			}
			for _, a := range refused {
				after := a.header.Get("Retry-After")
				if after != "5" && after != "4" {
					t.Fatalf("got Retry-After %q, want what is left of %v, rounded up", after, interval)
				}
				want := map[string]string{"Retry-After": after, "Ratelimit-Policy": `"burst";q=10;w=50`, "Ratelimit": `"burst";r=0;t=` + after, "Cache-Control": "no-store"}
				for name, value := range want {
					if got := a.header.Get(name); got != value {
						t.Errorf("got %s %q, want %q", name, got, value)
					}
				}
				seconds, _ := strconv.Atoi(after)
				wantRefused := map[string]any{"code": "RateLimitExceeded", "message": fmt.Sprintf("Rate limit exceeded. Retry after %d seconds.", seconds), "retryAfter": float64(seconds), "limit": "burst"}
				if diff := cmp.Diff(wantRefused, a.wantRefusal(t, http.StatusTooManyRequests, "burst")); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			}
			// Once more at once, and again after what that answer says: no shorter, no longer.
			c := f.caller(t)
			a := c.get("/any", withKey(k.secret)).want(t, http.StatusTooManyRequests, "at once")
			seconds, err := strconv.Atoi(a.header.Get("Retry-After"))
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Until(a.came.Add(time.Duration(seconds) * time.Second)))
			c.get("/any", withKey(k.secret)).want(t, http.StatusOK, "after Retry-After")
			a = c.get("/any", withKey(k.secret))
			if a.status != http.StatusTooManyRequests && time.Since(began) < 2*interval {
				t.Errorf("got status %d, want 429: only one had been earned", a.status)
			}
			return
		}
	})

	t.Run("BodyIsTheOneOfTheSpecification", func(t *testing.T) {
		t.Parallel()
		// spec/api-key-limits.md, "Rate Limit Response"
		const specified = `{
			"error": {
				"code": "RateLimitExceeded",
				"message": "Rate limit exceeded. Retry after 60 seconds.",
				"retryAfter": 60
			}
		}`
		var want map[string]map[string]any
		if err := json.Unmarshal([]byte(specified), &want); err != nil {
			t.Fatal(err)
		}
		c := f.caller(t)
		for try := 0; ; try++ {
			k := s.key(t, home, admin.KeyInput{Limits: limited(1, "1m", 1)})
			first := c.get("/any", withKey(k.secret)).want(t, http.StatusOK)
			a := c.get("/any", withKey(k.secret))
			if a.came.Sub(first.sent) > time.Second && try < 5 {
				continue // a second of the sixty is over
			}
			got := a.wantRefusal(t, http.StatusTooManyRequests, "the second in a minute")
			for name, value := range want["error"] {
				if got[name] != value {
					t.Errorf("got %s %v, want %v", name, got[name], value)
				}
				delete(got, name)
			}
			if diff := cmp.Diff(map[string]any{"limit": "burst"}, got); diff != "" {
				t.Errorf("what is added (-want +got):\n%s", diff)
			}
			return
		}
	})

	t.Run("InstanceTotalHoldsForAllItsKeys", func(t *testing.T) {
		t.Parallel()
		const burst, interval = 6, 10 * time.Second
		for try := 0; ; try++ {
			together := s.instance(t, admin.PolicyInput{Total: limited(6, "1m", burst)})
			one, two := s.key(t, together, admin.KeyInput{}), s.key(t, together, admin.KeyInput{Limits: limited(1, "1h", 100)})
			began := time.Now()
			passed, refused := split(t, f.atOnce(t, 20, []string{withKey(one.secret)}, []string{withKey(two.secret)}))
			if took := time.Since(began); took > interval-time.Second && try < 5 {
				t.Logf("20 requests took %v", took)
				continue
			}
			if passed != burst {
				t.Errorf("%d passed, want %d of both keys together", passed, burst)
			}
			for _, a := range refused {
				if p := a.wantRefusal(t, http.StatusTooManyRequests, "total"); p["limit"] != "instance" {
					t.Errorf("got %v, want the limit of the instance", p)
				}
				if got := a.header.Get("Ratelimit-Policy"); got != `"instance";q=6;w=60` {
					t.Errorf("got RateLimit-Policy %s", got)
				}
			}
			break
		}
		// Another instance is not concerned.
		c := f.caller(t)
		c.get("/any", withKey(s.key(t, home, admin.KeyInput{}).secret)).want(t, http.StatusOK)
	})

	t.Run("KeysInheritThePolicysDefaults", func(t *testing.T) {
		t.Parallel()
		strict := s.instance(t, admin.PolicyInput{Defaults: admin.DefaultsInput{Instance: limited(1, "1h", 3)}})
		for range 2 { // each key has its own bucket
			made, err := s.client.CreateKey(t.Context(), strict, admin.KeyInput{Name: "inherits"})
			if err != nil {
				t.Fatal(err)
			}
			s.canary.Add(made.Secret.Reveal())
			if passed, _ := split(t, f.atOnce(t, 12, []string{withKey(made.Secret.Reveal())})); passed != 3 {
				t.Errorf("%d passed, want 3", passed)
			}
		}
	})

	t.Run("RefusedRequestsSpendNothing", func(t *testing.T) {
		t.Parallel()
		k := s.key(t, home, admin.KeyInput{Scopes: []string{"orders:read"}, Limits: limited(1, "1h", 2)})
		c := f.caller(t)
		for range 10 {
			c.do("POST", "/orders", withKey(k.secret), "Content-Length: 0").want(t, http.StatusForbidden)
			c.get("/a;b", withKey(k.secret)).want(t, http.StatusBadRequest)
		}
		c.get("/orders", withKey(k.secret)).want(t, http.StatusOK, "the first")
		c.get("/public/a", withKey(k.secret)).want(t, http.StatusOK, "a public route")
		c.get("/orders", withKey(k.secret)).want(t, http.StatusOK, "the second")
		c.get("/orders", withKey(k.secret)).want(t, http.StatusTooManyRequests, "the third")
	})
}
