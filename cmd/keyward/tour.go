package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

// errTour ends a tour on which something was not as it should be.
var errTour = errors.New("the tour found something wrong")

// A tour sends requests through Envoy and says what was expected and what came.
type tour struct {
	ctx    context.Context //nolint:containedctx // lives for one call of app.tour
	out    io.Writer
	state  devState
	client *manage.Client
	failed bool
}

// tour is the whole way once, with keys of its own.
func (a *app) tour(ctx context.Context, state devState) error {
	token, err := readPrivate(state.TokenFile)
	if err != nil {
		return err
	}
	secret, err := readPrivate(state.SecretFile)
	if err != nil {
		return err
	}
	t := &tour{ctx: ctx, out: a.stdout, state: state,
		client: manage.NewClient(state.Manage, apikey.NewSecret(strings.TrimSpace(string(token))), nil)}
	key := strings.TrimSpace(string(secret))

	t.expect("no key", t.get("/orders", ""), http.StatusUnauthorized)
	allowed := t.get("/orders", key)
	t.expect("a key with the scope orders:read", allowed, http.StatusOK)
	t.check("the service sees who is calling", allowed.seen.Headers["X-Keyward-Key-Id"], []string{state.keyID.String()})
	t.check("and what the key may", allowed.seen.Headers["X-Keyward-Scopes"], []string{"orders:read"})
	t.check("and no key", allowed.seen.Headers["X-Api-Key"], []string(nil))
	t.expect("a key without the scope orders:write", t.send(http.MethodPost, "/orders", key), http.StatusForbidden)
	t.expect("a key that nobody has", t.get("/orders", apikey.Format{}.New(apikey.KindInstance).Reveal()), http.StatusUnauthorized)
	t.expect("a public route, without a key", t.get("/public/page", ""), http.StatusOK)
	t.expect("a path that servers read in two ways", t.get("/public/page;x", ""), http.StatusBadRequest)

	burst, err := t.key("tour burst", tourLimits(devBurst, 0))
	if err != nil {
		return err
	}
	var codes []int
	var limited answer
	for range 2 * devBurst {
		got := t.get("/orders", burst.Secret.Reveal())
		codes = append(codes, got.status)
		if got.status == http.StatusTooManyRequests {
			limited = got
		}
	}
	t.check(fmt.Sprintf("%d requests at once, burst %d: the first %d", len(codes), devBurst, devBurst),
		codes[:devBurst], slices.Repeat([]int{http.StatusOK}, devBurst))
	t.expect("more than the burst", limited, http.StatusTooManyRequests)
	t.check("in the body", limited.problem.Error.Code, "RateLimitExceeded")
	t.check("Retry-After", limited.retryAfter, strconv.Itoa(limited.problem.Error.RetryAfter))
	if wait, err := time.ParseDuration(limited.retryAfter + "s"); err == nil {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
		t.expect("after Retry-After", t.get("/orders", burst.Secret.Reveal()), http.StatusOK)
	}

	if err := t.concurrency(); err != nil {
		return err
	}

	revoked, err := t.key("tour revoke", tourLimits(devBurst, 0))
	if err != nil {
		return err
	}
	t.expect("a new key, at once", t.get("/orders", revoked.Secret.Reveal()), http.StatusOK)
	for _, k := range []manage.CreatedKey{revoked, burst} {
		if _, err := t.client.RevokeKey(ctx, state.Instance, k.Key.ID, "other"); err != nil {
			return err
		}
	}
	t.expect("revoked, the next request", t.get("/orders", revoked.Secret.Reveal()), http.StatusUnauthorized)

	if ctx.Err() != nil {
		return errInterrupted
	}
	if t.failed {
		return errTour
	}
	fmt.Fprintln(t.out, "All as expected.")
	return nil
}

// concurrency shows that requests which run count, and that their end frees a place at once: also that
// of a request whose client went away.
func (t *tour) concurrency() error {
	const limit = 10
	key, err := t.key("tour concurrency", tourLimits(1000, limit))
	if err != nil {
		return err
	}
	answers := make(chan answer)
	for range limit + 1 {
		go func() { answers <- t.get("/orders?delay=2s", key.Secret.Reveal()) }()
	}
	codes := map[int]int{}
	var limited answer
	for range limit + 1 {
		got := <-answers
		codes[got.status]++
		if got.status == http.StatusTooManyRequests {
			limited = got
		}
	}
	t.check(fmt.Sprintf("%d slow requests side by side, limit %d", limit+1, limit),
		codes, map[int]int{http.StatusOK: limit, http.StatusTooManyRequests: 1})
	t.check("in the body", limited.problem.Error.Limit, "concurrency")
	t.expect("when they have ended", t.get("/orders", key.Secret.Reveal()), http.StatusOK)

	one, err := t.key("tour abort", tourLimits(1000, 1))
	if err != nil {
		return err
	}
	leaving, leave := context.WithTimeout(t.ctx, 300*time.Millisecond)
	defer leave()
	gone := *t
	gone.ctx = leaving
	t.expect("a slow request whose client goes away", gone.get("/orders?delay=1m", one.Secret.Reveal()), 0)
	t.expect("its place is free again", t.get("/orders", one.Secret.Reveal()), http.StatusOK)
	for _, k := range []manage.CreatedKey{key, one} {
		if _, err := t.client.RevokeKey(t.ctx, t.state.Instance, k.Key.ID, "other"); err != nil {
			return err
		}
	}
	return nil
}

func tourLimits(burst, maxConcurrent int) admin.LimitsInput {
	requests := 6 * burst
	in := admin.LimitsInput{Rate: &admin.RateInput{Requests: &requests, Per: "1m"}, Burst: &burst}
	if maxConcurrent > 0 {
		in.MaxConcurrent = &maxConcurrent
	}
	return in
}

func (t *tour) key(name string, limits admin.LimitsInput) (manage.CreatedKey, error) {
	return t.client.CreateKey(t.ctx, t.state.Instance, admin.KeyInput{
		Name: name, Scopes: []string{"orders:read"}, ExpiresIn: "1h", Limits: limits,
	})
}

// An answer is what came back through Envoy.
type answer struct {
	status     int // 0: nothing came
	retryAfter string
	seen       echo // what the demo service saw
	problem    struct {
		Error struct {
			Code       string
			RetryAfter int
			Limit      string
		}
	}
}

func (t *tour) get(path, key string) answer { return t.send(http.MethodGet, path, key) }

func (t *tour) send(method, path, key string) (got answer) {
	r, err := http.NewRequestWithContext(t.ctx, method, t.state.Envoy+path, nil)
	if err != nil {
		return got
	}
	written, _, _ := strings.Cut(path, "?")
	r.URL.Opaque = "//" + r.URL.Host + written // exactly as written; the query is apart
	if key != "" {
		r.Header.Set("X-API-Key", key)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return got
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return got
	}
	got.status, got.retryAfter = resp.StatusCode, resp.Header.Get("Retry-After")
	if resp.StatusCode == http.StatusOK {
		_ = json.NewDecoder(bytes.NewReader(body)).Decode(&got.seen)
	} else {
		_ = json.NewDecoder(bytes.NewReader(body)).Decode(&got.problem)
	}
	return got
}

// expect compares an answer's status.
func (t *tour) expect(what string, got answer, want int) { t.check(what, got.status, want) }

func (t *tour) check(what string, got, want any) {
	verdict := "ok  "
	if fmt.Sprint(got) != fmt.Sprint(want) {
		verdict, t.failed = "FAIL", true
	}
	fmt.Fprintf(t.out, "%s  %-58s expected %v, got %v\n", verdict, what, want, got)
}
