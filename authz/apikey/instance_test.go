package apikey_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"pgregory.net/rapid"

	"keyward/authz/apikey"
)

const guid = "8ac6074c-bdde-43cb-a140-ec0002d96d2b"

func TestCanonicalInstanceID(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{guid, guid},
		{strings.ToUpper(guid), guid},
		{"8AC6074c-bdde-43CB-a140-ec0002d96d2B", guid},
		{"demo", "demo"},
		{"Demo", "Demo"}, // no GUID: exact
		{"a", "a"},
		{"A-b_9", "A-b_9"},
		{"x" + guid, "x" + guid}, // longer than a GUID: a name
		{"abcdefab-BDDE-43cb-a140-ec0002d96d2G", "abcdefab-BDDE-43cb-a140-ec0002d96d2G"}, // not hexadecimal: a name
		{strings.Repeat("a", 128), strings.Repeat("a", 128)},
	} {
		got, err := apikey.CanonicalInstanceID(tt.in)
		if err != nil || got != tt.want {
			t.Errorf("%q: got %q, %v; want %q", tt.in, got, err, tt.want)
		}
		if again, err := apikey.CanonicalInstanceID(got); err != nil || again != got {
			t.Errorf("%q is not canonical: %q, %v", got, again, err)
		}
	}
	for _, bad := range []string{
		"", "1a", "-a", "_a", "a b", "a.b", "a/b", "a:b", "*", "ä", "aé", "a\n", "a\x00", "..", "{" + guid + "}",
		strings.ReplaceAll(guid, "-", ""), strings.Repeat("a", 129), "\u212aelvin",
	} {
		got, err := apikey.CanonicalInstanceID(bad)
		if _, ok := errors.AsType[*apikey.InvalidError](err); !ok || got != "" {
			t.Errorf("%q: got %q, %v; want an *InvalidError", bad, got, err)
		}
	}
}

func TestIsInstance(t *testing.T) {
	for _, tt := range []struct {
		canonical, s string
		want         bool
	}{
		{guid, guid, true},
		{guid, strings.ToUpper(guid), true},
		{guid, "8ac6074c-bdde-43cb-a140-ec0002d96d2c", false},
		{guid, "", false},
		{guid, strings.ReplaceAll(guid, "-", ""), false},
		{guid, "{" + guid + "}", false},
		{"demo", "demo", true},
		{"demo", "Demo", false},
		{"demo", "DEMO", false},
		{"demo", "demo ", false},
		{"demo", "", false},
		// 36 characters that are no GUID: exact like any name.
		{"abcdefab-bdde-43cb-a140-ec0002d96d2g", "abcdefab-bdde-43cb-a140-ec0002d96d2G", false},
		{strings.Repeat("k", 36), strings.Repeat("K", 36), false},
		// The Kelvin sign folds to k, the long s to s; neither is a letter of ours.
		{strings.Repeat("k", 36), strings.Repeat("\u212a", 12), false},
	} {
		if got := apikey.IsInstance(tt.canonical, tt.s); got != tt.want {
			t.Errorf("%q is %q: got %t, want %t", tt.s, tt.canonical, got, tt.want)
		}
	}
}

// A spelling names an instance exactly if it is the same once canonical.
func TestIsInstanceIsCanonicalEquality(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		id := rapid.OneOf(
			rapid.Map(rapid.SliceOfN(rapid.Byte(), 16, 16), func(b []byte) string { return uuid.UUID(b).String() }),
			rapid.StringMatching(`[A-Za-z][A-Za-z0-9_-]{0,9}`),
			rapid.StringMatching(`[a-h][0-9a-fG]{7}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`),
		).Draw(t, "id")
		canonical, err := apikey.CanonicalInstanceID(id)
		if err != nil {
			t.Fatal(err)
		}
		spelling := []byte(id)
		for i := range spelling {
			if rapid.IntRange(0, 3).Draw(t, "flip case") == 0 {
				spelling[i] = strings.ToUpper(id[i : i+1])[0]
			}
		}
		other, err := apikey.CanonicalInstanceID(string(spelling))
		if err != nil {
			t.Fatal(err)
		}
		if got := apikey.IsInstance(canonical, string(spelling)); got != (canonical == other) {
			t.Fatalf("%q is %q: got %t", spelling, canonical, got)
		}
	})
}

func TestLimitsOf(t *testing.T) {
	p := apikey.Policy{Defaults: apikey.Defaults{
		Instance: apikey.Limits{Burst: 1},
		Agent:    apikey.Limits{Burst: 2, MaxConcurrent: apikey.Unlimited},
		User:     apikey.Limits{Rate: rate(5, time.Hour)},
	}, Total: apikey.Limits{Rate: rate(1, time.Hour), Burst: 1}}
	shipped := apikey.ShippedLimits
	for _, tt := range []struct {
		name string
		key  apikey.Key
		want apikey.Limits
	}{
		{"instance key", apikey.Key{Type: apikey.TypeInstance}, apikey.Limits{Rate: shipped.Rate, Burst: 1, MaxConcurrent: 10}},
		{"agent key", apikey.Key{Type: apikey.TypeAgent}, apikey.Limits{Rate: shipped.Rate, Burst: 2, MaxConcurrent: apikey.Unlimited}},
		{"user key", apikey.Key{Type: apikey.TypeUser}, apikey.Limits{Rate: rate(5, time.Hour), Burst: 20, MaxConcurrent: 10}},
		{
			"its own first, field by field",
			apikey.Key{Type: apikey.TypeAgent, Limits: apikey.Limits{MaxConcurrent: 4, Rate: rate(apikey.Unlimited, 0)}},
			apikey.Limits{Rate: rate(apikey.Unlimited, 0), Burst: 2, MaxConcurrent: 4},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, p.LimitsOf(&tt.key)); diff != "" {
				t.Errorf("difference (-want +got):\n%s", diff)
			}
		})
	}
	if got := new(apikey.Policy).LimitsOf(&apikey.Key{Type: apikey.TypeUser}); got != shipped {
		t.Errorf("without a policy: got %+v, want the shipped limits", got)
	}
}

func TestPolicyValidate(t *testing.T) {
	bad := apikey.Limits{Burst: -2}
	for _, tt := range []struct {
		name   string
		policy apikey.Policy
		field  string // refused there; "": accepted
	}{
		{"nothing said", apikey.Policy{}, ""},
		{"everything said", apikey.Policy{
			Disabled:      true,
			Defaults:      apikey.Defaults{Instance: apikey.ShippedLimits, Agent: apikey.ShippedLimits, User: apikey.ShippedLimits},
			Total:         apikey.Limits{Rate: rate(1000, time.Minute), Burst: 50},
			AllowedScopes: apikey.Scopes{"a:*"},
		}, ""},
		{"total off", apikey.Policy{Total: apikey.Limits{Rate: rate(apikey.Unlimited, 0)}}, ""},
		{"instance", apikey.Policy{Defaults: apikey.Defaults{Instance: bad}}, "defaults.instance.burst"},
		{"agent", apikey.Policy{Defaults: apikey.Defaults{Agent: bad}}, "defaults.agent.burst"},
		{"user", apikey.Policy{Defaults: apikey.Defaults{User: bad}}, "defaults.user.burst"},
		{"total", apikey.Policy{Total: bad}, "total.burst"},
		{"total concurrency", apikey.Policy{Total: apikey.Limits{MaxConcurrent: 5}}, "total.maxConcurrent"},
		{"total burst without rate", apikey.Policy{Total: apikey.Limits{Burst: 5}}, "total.burst"},
		{"total rate without burst", apikey.Policy{Total: apikey.Limits{Rate: rate(1, time.Second)}}, "total.burst"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.policy.Validate()
			if tt.field == "" {
				if err != nil {
					t.Errorf("got %v, want none", err)
				}
				return
			}
			if invalid, ok := errors.AsType[*apikey.InvalidError](err); !ok || invalid.Field != tt.field {
				t.Errorf("got %v, want %s refused", err, tt.field)
			}
		})
	}
}

// FuzzInstanceID: a spelling names an instance exactly if it is one of that instance's id.
func FuzzInstanceID(f *testing.F) {
	for _, s := range []string{guid, strings.ToUpper(guid), "demo", "Demo", "a-1_B", "", "1a", "é", guid[:35] + "ﬀ"} {
		f.Add(guid, s)
		f.Add("demo", s)
	}
	f.Fuzz(func(t *testing.T, one, two string) {
		id, err := apikey.CanonicalInstanceID(one)
		if err != nil {
			wantInvalid(t, err, one)
			return
		}
		if again, err := apikey.CanonicalInstanceID(id); err != nil || again != id {
			t.Fatalf("%q became %q, which becomes %q, %v", one, id, again, err)
		}
		other, err := apikey.CanonicalInstanceID(two)
		if got, want := apikey.IsInstance(id, two), err == nil && other == id; got != want {
			t.Fatalf("%q names %q: got %t, want %t", two, id, got, want)
		}
	})
}

func TestPolicyInForce(t *testing.T) {
	if diff := cmp.Diff(apikey.ShippedPolicy, apikey.Policy{}.InForce()); diff != "" {
		t.Errorf("an empty policy (-shipped +got)\n%s", diff)
	}
	said := apikey.Policy{
		Disabled:   true,
		Caps:       apikey.Caps{Instance: 1, User: 2, Agent: apikey.Unlimited},
		Creation:   apikey.Creation{PerHour: 3, PerHourAndUser: 4},
		Expiration: apikey.Expiration{Default: apikey.ExpiresByTime, Required: true, Life: 5, LongestLife: 6, InactivityDays: 7},
		OnLeak:     apikey.OnLeak{Instance: apikey.LeakFlags, Agent: apikey.LeakRevokes, User: apikey.LeakFlags}, KeepRevoked: 8,
		Alerts: apikey.Alerts{
			NewNetwork: apikey.NewNetworkAlerts{Disabled: true}, Refusals: apikey.RefusalAlerts{Disabled: true, Window: 9, PerKey: 10, PerInstance: 11, Factor: 12},
			UnknownKeys: apikey.UnknownKeyAlerts{Disabled: true, PerMinute: 13}, Expiring: apikey.ExpiringKeyAlerts{Disabled: true, Days: []int{14}},
			Unused: apikey.UnusedKeyAlerts{Disabled: true, IdleDays: 15, NeverUsedDays: 16},
		},
	}
	if diff := cmp.Diff(said, said.InForce()); diff != "" {
		t.Errorf("what is said is in force (-want +got)\n%s", diff)
	}
	// Whoever shortens the longest life need not know of the usual one.
	short := apikey.Policy{Expiration: apikey.Expiration{LongestLife: apikey.Duration(time.Hour)}}
	if life := short.InForce().Expiration.Life; life != apikey.Duration(time.Hour) {
		t.Errorf("a key that says only time lives %v", life)
	}
	for typ, want := range map[apikey.Type]apikey.LeakAction{
		apikey.TypeInstance: apikey.LeakRevokes, apikey.TypeAgent: apikey.LeakFlags, apikey.TypeUser: apikey.LeakRevokes,
	} {
		if got := apikey.ShippedPolicy.OnLeak.Of(typ); got != want {
			t.Errorf("a leaked %s key: %s, want %s", typ, got, want)
		}
	}
}
