package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"keyward/authz/apikey"
	"keyward/authz/manage"
	"keyward/authz/store/sqlite"
)

func TestExitCodes(t *testing.T) {
	for _, test := range []struct {
		err  error
		want int
	}{
		{errors.New("anything"), 1},
		{usageError{errors.New("x")}, 2},
		{&manage.Error{Status: 400}, 2},
		{&manage.Error{Status: 401}, 3},
		{&manage.Error{Status: 403}, 3},
		{&manage.Error{Status: 404}, 1}, // of something that is no keyward
		{&manage.Error{Status: 404, Code: manage.CodeNotFound}, 4},
		{&manage.Error{Status: 409}, 5},
		{&manage.Error{Status: 412}, 5},
		{&manage.Error{Status: 429}, 6},
		{&manage.Error{Status: 503}, 6},
		{&manage.Error{Status: 500}, 1},
		{&manage.Error{Status: 415}, 1},
		{errUnreachable, 6},
		{apikey.ErrUndecided, 6},
		{errors.Join(sqlite.ErrDamaged, apikey.ErrUndecided), 1},
		{errInterrupted, 130},
	} {
		if got := exitCode(test.err); got != test.want {
			t.Errorf("%v: got %d, want %d", test.err, got, test.want)
		}
		if got := exitCode(errors.Join(nil, fmt.Errorf("wrapped: %w", test.err))); got != test.want {
			t.Errorf("%v, wrapped: got %d, want %d", test.err, got, test.want)
		}
	}
}

// TestErrorsKeepSecrets: what was typed in a wrong place is not said again.
func TestErrorsKeepSecrets(t *testing.T) {
	for _, secret := range []string{
		apikey.Format{}.New(apikey.KindManagement).Reveal(), apikey.Format{First: "acme2"}.New(apikey.KindAgent).Reveal(),
		"keya.NfYmD45x1VE4aLuxejdmSn.25SDHuoyL2qesXhJwG7Z.jtTBaL8RrVe.6ywo1VdN1YNn.ayek",
	} {
		for _, args := range [][]string{{secret}, {"keys", "get", "demo", secret + "/x", "y"}, {"self", "x" + secret}, {"keys", "list", "demo", "-o", secret}} {
			code, out, said := tested(t, "", args...)
			if code == exitOK || strings.Contains(out+said, secret[8:24]) || !strings.HasPrefix(said, "error: ") {
				t.Errorf("%q: ended with %d and says %s%s", args[0], code, out, said)
			}
		}
	}
	_, _, said := tested(t, "", "keys", "list", "demo", "-o", "wrong")
	if !strings.Contains(said, "wrong") && !strings.Contains(said, "--output") {
		t.Errorf("an error says nothing any more: %s", said)
	}
}

func TestLimitsAreShownAsTheyAreSet(t *testing.T) {
	minute := apikey.Duration(time.Minute)
	for want, limits := range map[string]apikey.Limits{
		"inherited":                  {},
		"rate 120/1m, burst 20":      {Rate: apikey.Rate{Requests: 120, Per: minute}, Burst: 20},
		"rate unlimited":             {Rate: apikey.Rate{Requests: apikey.Unlimited}},
		"burst 5, max concurrent 10": {Burst: 5, MaxConcurrent: 10},
		"max concurrent unlimited":   {MaxConcurrent: apikey.Unlimited},
	} {
		if got := limitsText(limits); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestTimesAreShownRoughly(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 59 * time.Second: "59s", time.Minute: "1m", 59 * time.Minute: "59m", time.Hour: "1h",
		47 * time.Hour: "47h", 48 * time.Hour: "2d", 365 * 24 * time.Hour: "365d",
	} {
		if got := rough(d); got != want {
			t.Errorf("%v: got %s, want %s", d, got, want)
		}
	}
	if got := when(time.Time{}) + stamp(time.Time{}); got != "" {
		t.Errorf("never is shown as %q", got)
	}
	if got := when(time.Now().Add(-90 * time.Minute)); got != "1h ago" {
		t.Errorf("got %q", got)
	}
	if got := when(time.Now().Add(49 * time.Hour)); got != "in 2d" {
		t.Errorf("got %q", got)
	}
	if got := stamp(time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("", 3600))); got != "2026-01-02T02:04:05Z" {
		t.Errorf("got %q", got)
	}
}
