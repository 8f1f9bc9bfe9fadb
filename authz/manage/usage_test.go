package manage

import (
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

func (d *desk) counted(t *testing.T, counts ...admin.Usage) {
	t.Helper()
	if err := d.store.AddUsage(t.Context(), admin.UsageBatch{}, counts); err != nil {
		t.Fatal(err)
	}
}

// sums is what an answer has of requests that nobody made.
func sums(change func(*admin.UsageSums)) admin.UsageSums {
	s := admin.UsageSums{Reasons: map[string]int64{}, Generations: map[int]int64{}, Networks: map[string]int64{}}
	change(&s)
	return s
}

func TestUsageIsWhatWasCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(11*time.Hour + 40*time.Minute + 30*time.Second) // since 2000-01-01, by its clock
		now := time.Now().UTC()
		hour := now.Truncate(time.Hour)
		d := open(t)
		d.instance(t, "a")
		key := d.key(t, "a")
		path := "/instances/a/apiKeys/" + key.Key.ID.String() + "/usage"
		counted := func(ago time.Duration, c admin.UsageCounts) admin.Usage {
			return admin.Usage{InstanceID: "a", KeyID: key.Key.ID, Start: now.Add(-ago), UsageCounts: c}
		}
		d.counted(t,
			counted(0, admin.UsageCounts{Allowed: 3, Refused: 2, Reasons: map[string]int64{"limit_burst": 2}, Generations: map[int]int64{1: 1, 2: 2}, Networks: map[string]int64{"192.0.2.0/24": 3}}),
			counted(2*time.Hour, admin.UsageCounts{Allowed: 1, Generations: map[int]int64{1: 1}, Networks: map[string]int64{"192.0.2.0/24": 1}}),
			counted(30*time.Hour, admin.UsageCounts{Allowed: 1000}),
		)

		// By default the last 24 hours, hour by hour, and the hour that has begun.
		got := read[admin.UsageRecord](t, d.send(d.owner, "GET", path, ""), 200)
		if got.Interval != admin.UsageHour || !got.To.Equal(hour.Add(time.Hour)) || !got.From.Equal(hour.Add(-24*time.Hour)) || len(got.Value) != 25 {
			t.Fatalf("got %s, %v to %v, %d", got.Interval, got.From, got.To, len(got.Value))
		}
		for i, b := range got.Value {
			want := admin.UsageBucket{Start: got.From.Add(time.Duration(i) * time.Hour)}
			want.UsageSums = sums(func(s *admin.UsageSums) {
				switch i {
				case 22:
					s.Allowed, s.Generations, s.Networks = 1, map[int]int64{1: 1}, map[string]int64{"192.0.2.0/24": 1}
				case 24:
					s.Allowed, s.Refused, s.Reasons = 3, 2, map[string]int64{"limit_burst": 2}
					s.Generations, s.Networks = map[int]int64{1: 1, 2: 2}, map[string]int64{"192.0.2.0/24": 3}
				}
			})
			if diff := cmp.Diff(want, b); diff != "" {
				t.Errorf("hour %d (-want +got):\n%s", i, diff)
			}
		}
		wantTotal := sums(func(s *admin.UsageSums) {
			s.Allowed, s.Refused, s.Reasons = 4, 2, map[string]int64{"limit_burst": 2}
			s.Generations, s.Networks = map[int]int64{1: 2, 2: 2}, map[string]int64{"192.0.2.0/24": 4}
		})
		if diff := cmp.Diff(wantTotal, got.Total); diff != "" {
			t.Errorf("total (-want +got):\n%s", diff)
		}
		if !strings.Contains(got.NotCollected, "keyward envoy generate --usage") {
			t.Errorf("notCollected: %q", got.NotCollected)
		}
		// A chart needs no thought: nothing is absent, and what was not collected is null.
		first := read[map[string]any](t, d.send(d.owner, "GET", path, ""), 200)["value"].([]any)[0]
		text, _ := json.Marshal(first)
		if want := `{"allowed":0,"generations":{},"networks":{},"reasons":{},"refused":0,"responses":null,"start":"1999-12-31T11:00:00Z"}`; string(text) != want {
			t.Errorf("got %s, want %s", text, want)
		}

		// Envoy tells.
		d.counted(t, counted(0, admin.UsageCounts{Ended: admin.EndedRequests{
			Count: 2, Status: [6]int64{0, 0, 1, 0, 0, 1}, RequestBytes: 10, ResponseBytes: 300, Duration: 3 * time.Second, Longest: 2 * time.Second,
		}}))
		got = read[admin.UsageRecord](t, d.send(d.owner, "GET", path, ""), 200)
		want := &admin.ResponseSums{
			Count: 2, Statuses: admin.ResponseStatus{Success: 1, ServerError: 1}, RequestBytes: 10, ResponseBytes: 300, MeanSeconds: 1.5, LongestSeconds: 2,
		}
		if diff := cmp.Diff(want, got.Total.Responses); diff != "" || got.NotCollected != "" {
			t.Errorf("notCollected %q (-want +got):\n%s", got.NotCollected, diff)
		}
		if diff := cmp.Diff(want, got.Value[24].Responses); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if got.Value[0].Responses == nil || got.Value[22].Responses != nil {
			t.Errorf("an hour without requests: %v; one of which Envoy told nothing: %v", got.Value[0].Responses, got.Value[22].Responses)
		}
	})
}

func TestUsageOfATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(40*24*time.Hour + 90*time.Second) // it is 2000-02-10T00:01:30Z
		d := open(t)
		d.instance(t, "a")
		for _, tt := range []struct {
			query, interval, from, to string
			n                         int
		}{
			{"from=3h", "minute", "2000-02-09T21:01:00Z", "2000-02-10T00:02:00Z", 181},
			{"from=7d", "hour", "2000-02-03T00:00:00Z", "2000-02-10T01:00:00Z", 169},
			{"from=169h", "day", "2000-02-02T00:00:00Z", "2000-02-11T00:00:00Z", 9},
			{"from=2000-02-09", "hour", "2000-02-09T00:00:00Z", "2000-02-10T01:00:00Z", 25},
			{"from=2000-02-08&to=2000-02-08", "hour", "2000-02-08T00:00:00Z", "2000-02-09T00:00:00Z", 24},
			{"from=2000-02-08&to=2000-02-09&interval=day", "day", "2000-02-08T00:00:00Z", "2000-02-10T00:00:00Z", 2},
			{"to=2000-02-09T12:00:00Z", "hour", "2000-02-08T12:00:00Z", "2000-02-09T12:00:00Z", 24},
			{"from=2000-02-09T12:30:00%2B01:00&to=2000-02-09T13:10:00Z&interval=hour", "hour", "2000-02-09T11:00:00Z", "2000-02-09T14:00:00Z", 3},
			{"from=1h&to=9999-12-31", "minute", "2000-02-09T23:01:00Z", "2000-02-10T00:02:00Z", 61},
			{"from=23h&to=22h", "minute", "2000-02-09T01:01:00Z", "2000-02-09T02:02:00Z", 61},
			{"from=48h&to=47h", "hour", "2000-02-08T00:00:00Z", "2000-02-08T02:00:00Z", 2},
			{"from=31d&to=30d", "day", "2000-01-10T00:00:00Z", "2000-01-12T00:00:00Z", 2},
		} {
			for _, path := range []string{"/instances/a/usage?", "/usage?"} {
				got := read[admin.UsageRecord](t, d.send(d.owner, "GET", path+tt.query, ""), 200)
				if string(got.Interval) != tt.interval || got.From.Format(time.RFC3339) != tt.from || got.To.Format(time.RFC3339) != tt.to || len(got.Value) != tt.n {
					t.Errorf("%s: got %s, %v to %v, %d", tt.query, got.Interval, got.From, got.To, len(got.Value))
				}
				if got.NotCollected != "" || got.Value[0].Responses == nil {
					t.Errorf("%s: nothing was asked, so nothing is missing: %q", tt.query, got.NotCollected)
				}
			}
		}
		const secret = "kwi_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM"
		for _, tt := range []struct{ query, target string }{
			{"from=yesterday", "from"}, {"from=" + secret, "from"}, {"to=" + secret, "to"}, {"interval=" + secret, "interval"}, {"interval=week", "interval"},
			{"from=-1h", "from"}, {"to=-1h", "to"}, {"from=0s", "from"}, {"from=1h&to=2h", "from"}, {"from=2000-03-01", "from"}, {"from=1969-12-31", "from"},
			{"from=30d&interval=minute", "interval"}, {"from=2001h&interval=hour", "interval"}, {"from=1970-01-01", "interval"}, {"from=" + strings.Repeat("9", 30) + "h", "from"},
		} {
			for _, path := range []string{"/instances/a/usage?", "/usage?"} {
				w := d.send(d.owner, "GET", path+tt.query, "")
				wantError(t, w, 400, CodeInvalidRequest, tt.target)
				noEcho(t, w, secret)
			}
		}
		w := d.send(d.owner, "GET", "/instances/a/usage?from=2000h&to=0s&interval=minute", "")
		wantError(t, w, 400, CodeInvalidRequest, "interval")
		if !strings.Contains(w.Body.String(), "at most 2000") || !strings.Contains(w.Body.String(), "a longer interval or a shorter time") {
			t.Errorf("it does not say what to do: %s", w.Body)
		}
		for _, tt := range []struct{ query, target string }{
			{"by=" + secret, "by"}, {"by=allowed", "by"}, {"limit=" + secret, "limit"}, {"limit=0", "limit"}, {"limit=1001", "limit"}, {"limit=1.5", "limit"},
			{"from=" + secret, "from"}, {"to=0x", "to"}, {"interval=hour", "interval"},
		} {
			w := d.send(d.owner, "GET", "/instances/a/usage/top?"+tt.query, "")
			wantError(t, w, 400, CodeInvalidRequest, tt.target)
			noEcho(t, w, secret)
		}
	})
}

func noEcho(t *testing.T, w *httptest.ResponseRecorder, sent string) {
	t.Helper()
	if strings.Contains(w.Body.String(), sent) {
		t.Errorf("it repeats what was sent: %s", w.Body)
	}
}

func TestTopUsageTellsWhatTheKeysAre(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	busy, quiet, foreign, idle := d.key(t, "a"), d.key(t, "a"), d.key(t, "b"), d.key(t, "a")
	if _, err := d.svc.RevokeKey(t.Context(), root, "a", quiet.Key.ID, ""); err != nil {
		t.Fatal(err)
	}
	gone := apikey.ID(uuid.New())
	now := time.Now()
	for _, u := range []admin.Usage{
		{InstanceID: "a", KeyID: busy.Key.ID, UsageCounts: admin.UsageCounts{Allowed: 50, Refused: 1}},
		{InstanceID: "a", KeyID: quiet.Key.ID, UsageCounts: admin.UsageCounts{Allowed: 1, Refused: 20}},
		{InstanceID: "a", KeyID: gone, UsageCounts: admin.UsageCounts{Allowed: 9}},
		{InstanceID: "a", UsageCounts: admin.UsageCounts{Allowed: 1000}},
		{InstanceID: "b", KeyID: foreign.Key.ID, UsageCounts: admin.UsageCounts{Allowed: 1000}},
	} {
		u.Start = now
		d.counted(t, u)
		u.Start = now.Add(-23 * time.Hour)
		d.counted(t, u)
		u.Start = now.Add(-100 * time.Hour) // too long ago
		u.Allowed *= 10
		d.counted(t, u)
	}
	top := func(query string) TopUsage {
		return read[TopUsage](t, d.send(d.owner, "GET", "/instances/a/usage/top"+query, ""), 200)
	}
	ids := func(list []admin.UsedKey) (ids []apikey.ID) {
		for _, k := range list {
			ids = append(ids, k.KeyID)
		}
		return ids
	}
	got := top("")
	if diff := cmp.Diff([]apikey.ID{busy.Key.ID, quiet.Key.ID, gone}, ids(got.Value)); diff != "" || got.By != admin.ByRequests {
		t.Fatalf("by %s (-want +got):\n%s", got.By, diff)
	}
	if one := got.Value[0]; one.Allowed != 100 || one.Refused != 2 || one.Name != "n" || one.Hint != admin.RecordOf(busy.Key, now).Hint || one.Type != "instance" || one.Status != "active" {
		t.Errorf("got %+v", one)
	}
	if one := got.Value[1]; one.Status != "revoked" || one.Allowed != 2 {
		t.Errorf("got %+v", one)
	}
	if one := got.Value[2]; one.Name+one.Hint+string(one.Type)+one.Status != "" || one.Allowed != 18 {
		t.Errorf("a key that is gone: %+v", one)
	}
	if diff := cmp.Diff([]apikey.ID{quiet.Key.ID}, ids(top("?by=refused&limit=1").Value)); diff != "" {
		t.Errorf("by refused (-want +got):\n%s", diff)
	}
	if got := top("?to=2d&from=3d"); got.Value == nil || len(got.Value) != 0 {
		t.Errorf("a time in which nobody came: %+v", got)
	}

	// A user sees its own key's, and nobody else's.
	ann := d.token(t, tokenFor(admin.RoleUser, "a"))
	hers, err := d.svc.CreateKey(t.Context(), root, "a", admin.KeyInput{Name: "n", Type: apikey.TypeUser, UserPrincipalName: "ann@example.com"})
	if err != nil {
		t.Fatal(err)
	}
	path := func(k admin.CreatedKey) string { return "/instances/a/apiKeys/" + k.Key.ID.String() + "/usage" }
	read[admin.UsageRecord](t, d.send(ann.Secret, "GET", path(hers), ""), 200)
	wantError(t, d.send(ann.Secret, "GET", path(idle), ""), 404, CodeNotFound, "")
	wantError(t, d.send(d.owner, "GET", path(foreign), ""), 404, CodeNotFound, "")
	wantError(t, d.send(d.owner, "GET", "/instances/none/usage", ""), 404, CodeNotFound, "")
	wantError(t, d.send(d.owner, "GET", "/instances/none/usage/top", ""), 404, CodeNotFound, "")
}

func TestUsageOfNoInstance(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	now := time.Now()
	d.counted(t,
		admin.Usage{Start: now, UsageCounts: admin.UsageCounts{Refused: 5, Reasons: map[string]int64{"unknown_key": 5}}},
		admin.Usage{InstanceID: "a", Start: now, UsageCounts: admin.UsageCounts{Refused: 7, Reasons: map[string]int64{"expired": 7}}},
	)
	for path, want := range map[string]map[string]int64{"/usage": {"unknown_key": 5}, "/instances/a/usage": {"expired": 7}} {
		got := read[admin.UsageRecord](t, d.send(d.owner, "GET", path, ""), 200)
		if diff := cmp.Diff(want, got.Total.Reasons); diff != "" || got.Total.Refused != want["unknown_key"]+want["expired"] {
			t.Errorf("%s: (-want +got):\n%s", path, diff)
		}
		if got.Total.Responses != nil || got.NotCollected != "" {
			t.Errorf("%s: of requests without a key Envoy has nothing to tell: %v, %q", path, got.Total.Responses, got.NotCollected)
		}
	}
}

func TestClientAsksForUsage(t *testing.T) {
	d := open(t)
	server := httptest.NewServer(d)
	defer server.Close()
	c := NewClient(server.URL, d.owner, nil)
	d.instance(t, "a")
	key := d.key(t, "a")
	now := time.Now()
	d.counted(t,
		admin.Usage{InstanceID: "a", KeyID: key.Key.ID, Start: now, UsageCounts: admin.UsageCounts{Allowed: 1}},
		admin.Usage{InstanceID: "a", Start: now, UsageCounts: admin.UsageCounts{Allowed: 2}},
		admin.Usage{Start: now, UsageCounts: admin.UsageCounts{Allowed: 3}},
	)
	in := admin.UsageInput{From: "2d", To: "0s", Interval: admin.UsageDay}
	for i, ask := range []func() (admin.UsageRecord, error){
		func() (admin.UsageRecord, error) { return c.KeyUsage(t.Context(), "a", key.Key.ID, in) },
		func() (admin.UsageRecord, error) { return c.InstanceUsage(t.Context(), "a", in) },
		func() (admin.UsageRecord, error) { return c.UsageOfNoInstance(t.Context(), in) },
	} {
		got, err := ask()
		if err != nil || got.Interval != admin.UsageDay || len(got.Value) != 3 || got.Total.Allowed != int64(i+1) {
			t.Errorf("%d: got %+v, %v", i, got, err)
		}
	}
	top, err := c.TopUsage(t.Context(), "a", in, admin.ByRefused, 5)
	if err != nil || len(top.Value) != 1 || top.By != admin.ByRefused || top.Value[0].KeyID != key.Key.ID {
		t.Errorf("got %+v, %v", top, err)
	}
	if _, err := c.TopUsage(t.Context(), "a", admin.UsageInput{}, "", 0); err != nil {
		t.Error(err)
	}
}
