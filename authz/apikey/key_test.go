package apikey_test

import (
	"testing"
	"time"

	"keyward/authz/apikey"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestKindOfType(t *testing.T) {
	for typ, want := range map[apikey.Type]apikey.Kind{
		apikey.TypeInstance: apikey.KindInstance,
		apikey.TypeAgent:    apikey.KindAgent,
		apikey.TypeUser:     apikey.KindUser,
		"":                  0,
		"management":        0,
		"User":              0,
	} {
		if got := typ.Kind(); got != want {
			t.Errorf("%q: got %q, want %q", typ, got, want)
		}
	}
}

func TestStatusAt(t *testing.T) {
	const tick = time.Nanosecond
	zone := time.FixedZone("elsewhere", -7*3600)
	for _, tt := range []struct {
		name string
		key  apikey.Key
		now  time.Time
		want apikey.Status
	}{
		{"nothing said", apikey.Key{}, noon, apikey.StatusActive},
		{"revoked", apikey.Key{RevokedAt: noon}, noon, apikey.StatusRevoked},
		{"revoked with a time still to come", apikey.Key{RevokedAt: noon.Add(day)}, noon, apikey.StatusRevoked},
		{"disabled", apikey.Key{Disabled: true}, noon, apikey.StatusDisabled},
		{"a tick before it begins", apikey.Key{NotBefore: noon}, noon.Add(-tick), apikey.StatusNotYetValid},
		{"as it begins", apikey.Key{NotBefore: noon}, noon, apikey.StatusActive},
		{"a tick before it expires", apikey.Key{ExpirationDate: noon}, noon.Add(-tick), apikey.StatusActive},
		{"as it expires: valid while now ≤ expiry", apikey.Key{ExpirationDate: noon}, noon, apikey.StatusActive},
		{"as it expires, told in another zone", apikey.Key{ExpirationDate: noon.In(zone)}, noon, apikey.StatusActive},
		{"a tick after it expires", apikey.Key{ExpirationDate: noon}, noon.Add(tick), apikey.StatusExpired},
		{"idle", apikey.Key{InactivityDays: 1, CreatedAt: noon}, noon.Add(day + tick), apikey.StatusIdle},
		{"used since", apikey.Key{InactivityDays: 1, CreatedAt: noon, LastUsedAt: noon.Add(tick)}, noon.Add(day + tick), apikey.StatusActive},

		{"revoked before all", apikey.Key{RevokedAt: noon, Disabled: true, NotBefore: noon.Add(day), ExpirationDate: noon.Add(-day)}, noon, apikey.StatusRevoked},
		{"disabled before times", apikey.Key{Disabled: true, NotBefore: noon.Add(day), ExpirationDate: noon.Add(-day)}, noon, apikey.StatusDisabled},
		{"not yet valid before expired", apikey.Key{NotBefore: noon.Add(day), ExpirationDate: noon.Add(-day)}, noon, apikey.StatusNotYetValid},
		{"expired before idle", apikey.Key{ExpirationDate: noon.Add(-day), InactivityDays: 1}, noon, apikey.StatusExpired},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.key.StatusAt(tt.now); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestIdleAt(t *testing.T) {
	created := noon
	for _, tt := range []struct {
		name     string
		days     int
		lastUsed time.Time
		now      time.Time
		want     bool
	}{
		{"does not expire for idleness", 0, time.Time{}, created.Add(10_000 * day), false},
		{"never used, just created", 90, time.Time{}, created, false},
		{"never used, at the end", 90, time.Time{}, created.Add(90 * day), false},
		{"never used, a tick after", 90, time.Time{}, created.Add(90*day + 1), true},
		{"used, at the end", 90, created.Add(day), created.Add(91 * day), false},
		{"used, a tick after", 90, created.Add(day), created.Add(91*day + 1), true},
		{"used before it was made: counts from its creation", 90, created.Add(-80 * day), created.Add(80 * day), false},
		{"a clock behind its last use", 1, created.Add(2 * day), created.Add(day), false},
		{"the longest life", 36_500, time.Time{}, created.Add(36_500 * day), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := apikey.Key{CreatedAt: created, InactivityDays: tt.days}
			if got := k.IdleAt(tt.now, tt.lastUsed); got != tt.want {
				t.Errorf("got %t, want %t", got, tt.want)
			}
		})
	}
}

func TestGenerationEnded(t *testing.T) {
	k := apikey.Key{Generations: []apikey.Generation{
		{Number: 2, ValidUntil: noon, Revoked: true},
		{Number: 3, ValidUntil: noon},
		{Number: 4},
	}}
	for _, tt := range []struct {
		name       string
		generation int
		now        time.Time
		want       bool
	}{
		{"old, as it ends", 3, noon, false},
		{"old, a tick after", 3, noon.Add(1), true},
		{"new, for as long as the key", 4, noon.Add(1000 * day), false},
		{"ended at once, by a clock that is behind", 2, noon.Add(-day), true},
		{"gone", 1, noon, true},
	} {
		k.Generation = tt.generation
		if got := k.GenerationEnded(tt.now); got != tt.want {
			t.Errorf("%s: got %t, want %t", tt.name, got, tt.want)
		}
	}
}

func TestDeprecated(t *testing.T) {
	k := apikey.Key{Generations: []apikey.Generation{
		{Number: 3, CreatedAt: noon.Add(-day), ValidUntil: noon.Add(day)},
		{Number: 4, CreatedAt: noon},
		{Number: 2, CreatedAt: noon.Add(-2 * day)},
	}}
	for _, tt := range []struct {
		generation   int
		since, until time.Time
		ok           bool
	}{
		{2, noon, time.Time{}, true},
		{3, noon, noon.Add(day), true},
		{4, time.Time{}, time.Time{}, false},
	} {
		k.Generation = tt.generation
		since, until, ok := k.Deprecated()
		if !since.Equal(tt.since) || !until.Equal(tt.until) || ok != tt.ok {
			t.Errorf("generation %d: got %v, %v, %t", tt.generation, since, until, ok)
		}
	}
	if _, _, ok := new(apikey.Key).Deprecated(); ok {
		t.Error("a key without secrets has an old one")
	}
}

func TestIdleFrom(t *testing.T) {
	k := apikey.Key{CreatedAt: noon, InactivityDays: 10, LastUsedAt: noon.Add(5 * day), IdleFrom: noon.Add(8 * day)}
	if want := noon.Add(18 * day); !k.IdleAfter().Equal(want) || k.IdleAt(want, k.LastUsedAt) || !k.IdleAt(want.Add(1), k.LastUsedAt) {
		t.Errorf("idle after %v, want %v", k.IdleAfter(), want)
	}
	k.LastUsedAt = noon.Add(9 * day)
	if want := noon.Add(19 * day); !k.IdleAfter().Equal(want) {
		t.Errorf("idle after %v, want %v", k.IdleAfter(), want)
	}
	k.InactivityDays = 0
	if !k.IdleAfter().IsZero() {
		t.Errorf("idle after %v, though it does not expire for idleness", k.IdleAfter())
	}
}

func TestPrincipal(t *testing.T) {
	id, err := apikey.ParseID("0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		key  apikey.Key
		want string
	}{
		{"user", apikey.Key{ID: id, Type: apikey.TypeUser, UserPrincipalName: "ann@example.com"}, "ann@example.com"},
		{"agent", apikey.Key{ID: id, Type: apikey.TypeAgent, AgentName: "Weather-1"}, "aat_Weather-1_0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f@foundationallm.internal_"},
		{"instance", apikey.Key{ID: id, Type: apikey.TypeInstance}, "iak_0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f@foundationallm.internal_"},
	} {
		if got := string(tt.key.AppendPrincipal([]byte("on behalf of "))); got != "on behalf of "+tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}
