package e2e_test

import (
	"bytes"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
)

// An errand is a request that is sent so many times, and what becomes of it.
type errand struct {
	n      int
	target string
	secret string // "": without
	status int

	instance string    // that counts it
	key      apikey.ID // the same
	reason   string    // "": allowed
	number   int       // of the secret's generation
}

// run sends errands in any order by several connections. Any answer but the one that belongs to it is a fault.
func (f *front) run(t *testing.T, errands []errand) {
	t.Helper()
	var all []*errand
	for i := range errands {
		all = append(all, slices.Repeat([]*errand{&errands[i]}, errands[i].n)...)
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	var next, passed atomic.Int64
	var sending sync.WaitGroup
	for range 8 {
		c := f.caller(t)
		sending.Go(func() {
			defer c.hangUp()
			for i := next.Add(1) - 1; i < int64(len(all)) && !t.Failed(); i = next.Add(1) - 1 {
				e := all[i]
				var lines []string
				if e.secret != "" {
					lines = append(lines, withKey(e.secret))
				}
				a, err := c.once(requestText("GET", e.target, lines...))
				// 503: keyward's health was checked too late, and nobody judged the request.
				for end := time.Now().Add(patience); err == nil && a.status == http.StatusServiceUnavailable && time.Now().Before(end); {
					time.Sleep(50 * time.Millisecond)
					a, err = c.once(requestText("GET", e.target, lines...))
				}
				if err != nil {
					t.Error(err)
				} else if e.status == 0 { // allowed as long as the burst lasts, then refused
					if a.status == http.StatusOK {
						passed.Add(1)
					} else if a.status != http.StatusTooManyRequests {
						t.Errorf("%s: got status %d", e.target, a.status)
					}
				} else if a.status != e.status {
					t.Errorf("%s, %s: got status %d, want %d", e.target, e.reason, a.status, e.status)
				}
			}
		})
	}
	sending.Wait()
	if passed.Load() != burstOfErrands && !t.Failed() {
		t.Errorf("%d passed of a burst of %d", passed.Load(), burstOfErrands)
	}
}

const burstOfErrands = 50

// TestUsageIsExact: 10,000 requests of every sort give exactly those counts, although the process is killed when
// half of them are written.
func TestUsageIsExact(t *testing.T) {
	s := serve(t, config{yaml: routes})
	f := s.front(t, frontConfig{})
	home, other := s.instance(t, admin.PolicyInput{}), s.instance(t, admin.PolicyInput{})
	unlimited := admin.LimitsInput{Rate: &admin.RateInput{Requests: new(apikey.Unlimited)}, MaxConcurrent: new(apikey.Unlimited)}
	few := limited(1, "24h", burstOfErrands)
	few.MaxConcurrent = new(apikey.Unlimited)

	rotated := s.key(t, home, admin.KeyInput{Limits: unlimited})
	second := s.rotate(t, rotated, admin.RotateInput{})
	narrow := s.key(t, home, admin.KeyInput{Limits: unlimited, Scopes: []string{"orders:read"}})
	revoked := s.key(t, home, admin.KeyInput{Limits: unlimited})
	s.revoke(t, revoked)
	abroad := s.key(t, other, admin.KeyInput{Limits: unlimited})
	garbled := []byte(rotated.secret)
	if last := &garbled[len(garbled)-1]; *last == 'A' {
		*last = 'B'
	} else {
		*last = 'A'
	}

	half := func(burst key) []errand {
		return []errand{
			{n: 1000, target: "/any", secret: rotated.secret, status: 200, instance: home, key: rotated.ID, number: 1},
			{n: 900, target: "/any", secret: second.secret, status: 200, instance: home, key: rotated.ID, number: 2},
			{n: 700, target: "/orders", secret: narrow.secret, status: 200, instance: home, key: narrow.ID, number: 1},
			{n: 400, target: "/admin/x", secret: narrow.secret, status: 403, instance: home, key: narrow.ID, reason: "missing_scope"},
			{n: 400, target: "/any", secret: revoked.secret, status: 401, instance: home, key: revoked.ID, reason: "revoked"},
			{n: burstOfErrands + 350, target: "/any", secret: burst.secret, instance: home, key: burst.ID},
			{n: 200, target: "/any", secret: abroad.secret, status: 200, instance: other, key: abroad.ID, number: 1},
			{n: 100, target: "/instances/" + home + "/x", secret: abroad.secret, status: 403, instance: other, key: abroad.ID, reason: "wrong_instance"},
			{n: 250, target: "/any", secret: s.unknown(apikey.KindInstance), status: 401, reason: "unknown_key"},
			{n: 150, target: "/instances/" + home + "/x", secret: s.unknown(apikey.KindInstance), status: 401, instance: home, reason: "unknown_key"},
			{n: 100, target: "/instances/nowhere/x", secret: string(garbled), status: 401, reason: "bad_checksum"},
			{n: 50, target: "/any", secret: "nonsense", status: 401, reason: "malformed_credential"},
			{n: 150, target: "/instances/" + home + "/x", status: 401, instance: home, reason: "no_credential"},
			{n: 100, target: "/optional/x", status: 200},
			{n: 50, target: "/public/x", status: 200},
			{n: 50, target: "/any;x", secret: rotated.secret, status: 400, reason: "invalid_path"},
		}
	}
	want := map[string]*admin.UsageCounts{}
	all := 0
	expect := func(errands []errand) {
		for _, e := range errands {
			all += e.n
			var c admin.UsageCounts
			refused := e.n
			switch {
			case e.status == 0:
				e.reason, e.number = "limit_burst", 1
				c.Allowed, refused = burstOfErrands, e.n-burstOfErrands
			case e.reason == "":
				c.Allowed, refused = int64(e.n), 0
			}
			if refused > 0 {
				c.Refused, c.Reasons = int64(refused), map[string]int64{e.reason: int64(refused)}
			}
			if e.number > 0 {
				c.Generations = map[int]int64{e.number: c.Allowed}
				c.Networks = map[string]int64{"127.0.0.0/24": c.Allowed}
			}
			for _, place := range []string{e.instance + " " + e.key.String(), e.instance + " " + apikey.ID{}.String()} {
				if want[place] == nil {
					want[place] = new(admin.UsageCounts)
				}
				want[place].Add(&c)
				if e.key.IsZero() {
					break
				}
			}
		}
	}
	for i := range 2 {
		f.awaitHealthy(t)
		errands := half(s.key(t, home, admin.KeyInput{Limits: few}))
		expect(errands)
		f.run(t, errands)
		if t.Failed() {
			return
		}
		if i == 1 {
			break
		}
		began := time.Now()
		waitFor(t, "counts to be written", func() bool {
			status, body, err := fetch("http://" + s.metrics + "/metrics")
			return err == nil && status == http.StatusOK && bytes.Contains(body, []byte("\nkeyward_usage_series 0\n"))
		})
		t.Logf("written after %v", time.Since(began))
		s.process.kill(t)
		s.restart(t)
	}
	if all != 10_000 {
		t.Fatalf("%d requests", all)
	}
	s.process.signal(t, syscall.SIGTERM)
	if err := s.process.wait(t); err != nil {
		t.Fatal(err)
	}

	store, err := sqlite.Open(t.Context(), sqlite.Config{Path: s.path("keyward.db")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	for _, interval := range admin.UsageIntervals() {
		got := map[string]*admin.UsageCounts{}
		for place := range want {
			instance, id, _ := bytes.Cut([]byte(place), []byte(" "))
			key, err := apikey.ParseID(string(id))
			if err != nil {
				t.Fatal(err)
			}
			list, err := store.Usage(t.Context(), admin.UsageQuery{
				InstanceID: string(instance), KeyID: key, Interval: interval, From: time.Now().AddDate(0, 0, -2), To: time.Now().Add(time.Hour),
			})
			if err != nil {
				t.Fatal(err)
			}
			got[place] = new(admin.UsageCounts)
			for i := range list {
				got[place].Add(&list[i].UsageCounts)
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("by %s (-want +got):\n%s", interval, d)
		}
	}
	k, err := store.Key(t.Context(), home, narrow.ID)
	if err != nil || k.LastUsedNetwork != "127.0.0.0/24" || k.LastUsedPath != "/orders" {
		t.Errorf("last used from %q on %q, %v", k.LastUsedNetwork, k.LastUsedPath, err)
	}
}
