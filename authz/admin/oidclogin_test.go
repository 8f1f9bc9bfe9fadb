package admin_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A slowIssuer answers after a second, with what it says of itself or that it is away, and knows when it was asked.
type slowIssuer struct {
	mu    sync.Mutex
	away  bool
	asked []time.Time
}

func (i *slowIssuer) RoundTrip(r *http.Request) (*http.Response, error) {
	i.mu.Lock()
	i.asked = append(i.asked, time.Now())
	i.mu.Unlock()
	time.Sleep(time.Second)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	status := http.StatusOK
	if i.away {
		status = http.StatusBadGateway
	}
	document := `{"issuer":"https://issuer.example","authorization_endpoint":"https://issuer.example/authorize","token_endpoint":"https://issuer.example/token"}`
	return &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(document)), Request: r}, nil
}

func (i *slowIssuer) times() []time.Time {
	i.mu.Lock()
	defer i.mu.Unlock()
	return append([]time.Time(nil), i.asked...)
}

func (i *slowIssuer) login(t *testing.T) *admin.OIDCLogin {
	t.Helper()
	known, err := admin.NewOIDC([]admin.OIDCIssuer{{
		Issuer: "https://issuer.example", Audience: "x", Rules: []admin.OIDCRule{{Claim: "r", Value: "x", Role: admin.RoleOwner}},
	}}, &http.Client{Transport: i})
	if err != nil {
		t.Fatal(err)
	}
	l, err := admin.NewOIDCLogin(known, admin.OIDCLoginConfig{Issuer: "https://issuer.example", ClientID: "c", RedirectURL: "https://keys.example" + admin.LoginPath})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestAnIssuerIsAskedOnceForAll who come meanwhile, also when the first of them leaves; and one of them has the cause,
// so that the log has it once.
func TestAnIssuerIsAskedOnceForAll(t *testing.T) {
	for name, away := range map[string]bool{"there": false, "away": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				i := &slowIssuer{away: away}
				l := i.login(t)
				impatient, leave := context.WithCancel(t.Context())
				var all sync.WaitGroup
				var mu sync.Mutex
				causes, failed := 0, 0
				begin := func(ctx context.Context) {
					_, _, err := l.Begin(ctx)
					mu.Lock()
					defer mu.Unlock()
					if err != nil {
						failed++
					}
					if a, ok := errors.AsType[*admin.IssuerAwayError](err); ok && a.Cause != nil {
						causes++
					}
				}
				all.Go(func() { begin(impatient) })
				synctest.Wait()
				for range 100 {
					all.Go(func() { begin(t.Context()) })
				}
				synctest.Wait()
				if !away { // else the one with the cause is gone
					leave()
				}
				all.Wait()
				leave()
				wantFailed, wantCauses := 1, 0
				if away {
					wantFailed, wantCauses = 101, 1
				}
				if asked := len(i.times()); asked != 1 || failed != wantFailed || causes != wantCauses {
					t.Errorf("asked %d times, %d failed, %d have a cause; want 1, %d, %d", asked, failed, causes, wantFailed, wantCauses)
				}
			})
		})
	}
}

// TestAnIssuerThatIsAwayIsAskedSeldom, however often somebody wants to sign in, and is found again when it is back.
func TestAnIssuerThatIsAwayIsAskedSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &slowIssuer{away: true}
		l := i.login(t)
		begin := time.Now()
		for time.Since(begin) < 3*time.Minute {
			_, _, err := l.Begin(t.Context())
			away, ok := errors.AsType[*admin.IssuerAwayError](err)
			if !ok || !errors.Is(err, apikey.ErrUndecided) || away.Host != "issuer.example" || away.RetryAfter < time.Second || away.RetryAfter > 30*time.Second {
				t.Fatalf("got %v: %+v", err, away)
			}
			time.Sleep(70 * time.Millisecond)
		}
		asked := i.times()
		pauses := []int{1, 2, 4, 8, 16, 30, 30, 30}
		for n := 1; n < len(asked) && n <= len(pauses); n++ {
			// Each question takes a second, and somebody comes every 70 ms.
			if gap, least := asked[n].Sub(asked[n-1]), time.Duration(pauses[n-1]+1)*time.Second; gap < least || gap > least+100*time.Millisecond {
				t.Errorf("between question %d and the next: %v, want %v", n, gap, least)
			}
		}
		if len(asked) != 10 {
			t.Errorf("asked %d times in three minutes, want 10", len(asked))
		}
		i.mu.Lock()
		i.away = false
		i.mu.Unlock()
		_, _, err := l.Begin(t.Context())
		away, _ := errors.AsType[*admin.IssuerAwayError](err)
		if away == nil {
			t.Fatalf("it was asked during the pause: %v", err)
		}
		time.Sleep(away.RetryAfter) // as one is told
		for range 3 {
			if to, _, err := l.Begin(t.Context()); err != nil || !strings.HasPrefix(to, "https://issuer.example/authorize?") {
				t.Errorf("it is back: got %q, %v", to, err)
			}
		}
		if again := len(i.times()); again != len(asked)+1 {
			t.Errorf("asked %d times more, want once", again-len(asked))
		}
	})
}
