package holders_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/holders"
)

// behind is everything behind the handler.
type behind struct {
	self   authz.Self
	reason authz.Reason
	err    error
	bug    bool
	asked  []authz.Pair
	peer   string

	reported []string
	from     netip.Addr
	report   error
}

func (b *behind) HeaderNames() []string { return []string{"authorization", "x-api-key"} }

func (b *behind) Self(_ context.Context, r *authz.Request) (authz.Self, authz.Reason, error) {
	if b.bug {
		panic("with " + secret)
	}
	b.asked, b.peer = r.Headers, r.Peer
	return b.self, b.reason, b.err
}

func (b *behind) ReportLeaked(s apikey.Secret, from netip.Addr, _ string) error {
	b.reported, b.from = append(b.reported, s.Reveal()), from
	return b.report
}

var secret = apikey.Format{}.New(apikey.KindInstance).Reveal()

func send(b http.Handler, method, path, body string, header ...string) *http.Response {
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	r.RemoteAddr = "192.0.2.1:40000"
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	b.ServeHTTP(w, r)
	return w.Result()
}

func text(t *testing.T, r *http.Response) string {
	t.Helper()
	var b bytes.Buffer
	if _, err := b.ReadFrom(r.Body); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(b.String())
}

func code(t *testing.T, r *http.Response) string {
	t.Helper()
	var body struct {
		Error struct{ Code, Message string }
	}
	s := text(t, r)
	if err := json.Unmarshal([]byte(s), &body); err != nil || body.Error.Message == "" {
		t.Fatalf("%q is no error: %v", s, err)
	}
	return fmt.Sprint(r.StatusCode, " ", body.Error.Code)
}

func TestHolderSeesWhatTheKeyMay(t *testing.T) {
	day := func(n int) time.Time { return time.Date(2030, 1, n, 0, 0, 0, 0, time.UTC) }
	k := &apikey.Key{
		ID: apikey.ID{1}, InstanceID: "demo", Type: apikey.TypeAgent, AgentName: "sales", Name: "internal name", Metadata: map[string]string{"a": "b"},
		Generation: 1, ExpirationDate: day(9),
		Generations: []apikey.Generation{{Number: 1, ValidUntil: day(3)}, {Number: 2, CreatedAt: day(2)}},
	}
	b := &behind{reason: authz.ReasonKey, self: authz.Self{Key: k, Scopes: apikey.Scopes{"a:b"}, Limits: apikey.ShippedLimits, Left: &authz.Left{Burst: 3, Running: -1}}}
	h := holders.New(b, b, slog.New(slog.DiscardHandler))
	r := send(h, "GET", "/self", "", "X-API-Key", secret, "Cookie", "a=b")
	want := `{"keyId":"01000000-0000-0000-0000-000000000000","instanceId":"demo","type":"agent","agentName":"sales","scopes":["a:b"],` +
		`"limits":{"rate":{"requests":120,"per":"1m"},"burst":20,"maxConcurrent":10},"remaining":{"burst":3,"maxConcurrent":-1},` +
		`"expirationDate":"2030-01-09T00:00:00Z","generation":{"number":1,"validUntil":"2030-01-03T00:00:00Z","deprecatedSince":"2030-01-02T00:00:00Z"}}`
	if diff := cmp.Diff(want, text(t, r)); diff != "" || r.StatusCode != 200 || r.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("status %d, header %v, (-want +got):\n%s", r.StatusCode, r.Header, diff)
	}
	if diff := cmp.Diff([]authz.Pair{{Name: "x-api-key", Value: secret}}, b.asked); diff != "" || b.peer != "192.0.2.1" {
		t.Errorf("asked from %s (-want +got):\n%s", b.peer, diff)
	}
	b.self = authz.Self{Key: &apikey.Key{Type: apikey.TypeUser, UserPrincipalName: "ann@example.com"}}
	if got := text(t, send(h, "GET", "/self", "")); !strings.Contains(got, `"scopes":["*"]`) || strings.Contains(got, "remaining") {
		t.Errorf("got %s", got)
	}
}

func TestAllCausesOf401LookAlike(t *testing.T) {
	var first string
	for _, reason := range authz.Reasons() {
		if reason == authz.ReasonKey {
			continue
		}
		b := &behind{reason: reason, self: authz.Self{Key: &apikey.Key{Name: "leaks"}}}
		r := send(holders.New(b, b, slog.New(slog.DiscardHandler)), "GET", "/self", "", "X-API-Key", secret)
		got := fmt.Sprint(r.StatusCode, r.Header, text(t, r))
		if first == "" {
			first = got
		}
		if r.StatusCode != 401 || got != first {
			t.Errorf("%s: got %s, want %s", reason, got, first)
		}
	}
}

// TestSecretsCannotBeTriedOut: an address has so many wrong ones; good ones, and what could not be decided, cost
// nothing.
func TestSecretsCannotBeTriedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &behind{reason: authz.ReasonKey, self: authz.Self{Key: &apikey.Key{}}}
		h := holders.New(b, b, slog.New(slog.DiscardHandler))
		for range 100 {
			if r := send(h, "GET", "/self", ""); r.StatusCode != 200 {
				t.Fatalf("a good key: %d", r.StatusCode)
			}
		}
		b.err = &apikey.BusyError{RetryAfter: 3 * time.Second}
		for range 100 {
			if r := send(h, "GET", "/self", ""); r.StatusCode != 503 || r.Header.Get("Retry-After") != "3" {
				t.Fatalf("could not decide: %d, %v", r.StatusCode, r.Header)
			}
		}
		b.err, b.reason = nil, authz.ReasonUnknownKey
		for range 30 {
			if r := send(h, "GET", "/self", ""); r.StatusCode != 401 {
				t.Fatalf("a wrong key: %d", r.StatusCode)
			}
		}
		b.reason = authz.ReasonKey // now the right one is among those that are not looked at any more
		r := send(h, "GET", "/self", "")
		if got := code(t, r); got != "429 TooManyRequests" {
			t.Fatalf("got %s", got)
		}
		wait, _ := strconv.Atoi(r.Header.Get("Retry-After"))
		time.Sleep(time.Duration(wait) * time.Second)
		if r := send(h, "GET", "/self", ""); r.StatusCode != 200 {
			t.Errorf("after the time that it was told: %d", r.StatusCode)
		}
	})
}

func TestReportIsAcceptedWithoutAWord(t *testing.T) {
	b := &behind{}
	h := holders.New(b, b, slog.New(slog.DiscardHandler))
	r := send(h, "POST", "/revoke", `{"secret": "`+secret+`"}`, "Content-Type", "application/json; charset=UTF-8")
	if got := text(t, r); r.StatusCode != 202 || strings.Contains(got, secret) || !strings.Contains(got, `"requestId":"`) {
		t.Errorf("got %d %s", r.StatusCode, got)
	}
	if diff := cmp.Diff([]string{secret}, b.reported); diff != "" || b.from != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("from %s (-want +got):\n%s", b.from, diff)
	}
}

func TestRefusals(t *testing.T) {
	json, good := "application/json", `{"secret":"`+secret+`"}`
	for name, tt := range map[string]struct {
		method, path, body, media string
		report                    error
		want                      string
		retry                     string
	}{
		"elsewhere":    {"GET", "/metrics", "", "", nil, "404 NotFound", ""},
		"root":         {"GET", "/", "", "", nil, "404 NotFound", ""},
		"below":        {"GET", "/self/x", "", "", nil, "404 NotFound", ""},
		"self_post":    {"POST", "/self", "", "", nil, "405 MethodNotAllowed", ""},
		"revoke_get":   {"GET", "/revoke", "", "", nil, "405 MethodNotAllowed", ""},
		"form":         {"POST", "/revoke", "secret=" + secret, "application/x-www-form-urlencoded", nil, "415 UnsupportedMediaType", ""},
		"no_type":      {"POST", "/revoke", good, "", nil, "415 UnsupportedMediaType", ""},
		"charset":      {"POST", "/revoke", good, json + "; charset=utf-16", nil, "415 UnsupportedMediaType", ""},
		"too_large":    {"POST", "/revoke", good + strings.Repeat(" ", 4<<10), json, nil, "413 PayloadTooLarge", ""},
		"empty":        {"POST", "/revoke", "", json, nil, "400 InvalidRequest", ""},
		"other_member": {"POST", "/revoke", `{"secret":"` + secret + `","keyId":"x"}`, json, nil, "400 InvalidRequest", ""},
		"twice":        {"POST", "/revoke", `{"secret":"` + secret + `","secret":"` + secret + `"}`, json, nil, "400 InvalidRequest", ""},
		"other_case":   {"POST", "/revoke", `{"Secret":"` + secret + `"}`, json, nil, "400 InvalidRequest", ""},
		"cut_off":      {"POST", "/revoke", `{"secret":"` + secret + `"`, json, nil, "400 InvalidRequest", ""},
		"deep":         {"POST", "/revoke", strings.Repeat("[", 4<<10), json, nil, "400 InvalidRequest", ""},
		"unclean":      {"POST", "//revoke", good, json, nil, "404 NotFound", ""},
		"dots":         {"POST", "/x/../revoke", good, json, nil, "404 NotFound", ""},
		"two_bodies":   {"POST", "/revoke", good + good, json, nil, "400 InvalidRequest", ""},
		"no_text":      {"POST", "/revoke", `{"secret":1}`, json, nil, "400 InvalidRequest", ""},
		"no_key":       {"POST", "/revoke", good, json, apikey.Invalid("secret", "is none"), "400 InvalidRequest", ""},
		"too_often":    {"POST", "/revoke", good, json, &admin.RateError{RetryAfter: 90 * time.Second}, "429 TooManyRequests", "90"},
		"queue_full":   {"POST", "/revoke", good, json, &apikey.BusyError{What: "too many wait", RetryAfter: time.Second}, "503 ServiceUnavailable", "1"},
		"fault":        {"POST", "/revoke", good, json, errors.New("inside"), "500 InternalError", ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := &behind{reason: authz.ReasonNoCredential, report: tt.report}
			r := send(holders.New(b, b, slog.New(slog.DiscardHandler)), tt.method, tt.path, tt.body, "Content-Type", tt.media)
			if got := code(t, r); got != tt.want || r.Header.Get("Retry-After") != tt.retry {
				t.Errorf("got %s, Retry-After %q, want %s, %q", got, r.Header.Get("Retry-After"), tt.want, tt.retry)
			}
			if tt.report == nil && len(b.reported) > 0 {
				t.Error("it was reported all the same")
			}
		})
	}
}

func TestPanicTellsNoSecret(t *testing.T) {
	var log bytes.Buffer
	b := &behind{bug: true}
	h := holders.New(b, b, slog.New(slog.NewTextHandler(&log, nil)))
	func() {
		defer func() {
			if v := recover(); v != http.ErrAbortHandler { //nolint:errorlint // net/http compares it so too
				t.Errorf("panics with %v", v)
			}
		}()
		send(h, "GET", "/self", "", "X-API-Key", secret)
	}()
	if said := log.String(); !strings.Contains(said, "panic in a holder's request") || strings.Contains(said, secret) {
		t.Errorf("the log says %s", said)
	}
}
