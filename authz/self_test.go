package authz_test

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/limits"
)

// lookable is a world whose limiter can tell what is left.
type lookable struct {
	*world

	left map[limits.Class]int64
}

func (l lookable) Look(_ context.Context, d *limits.Demand, standings []limits.Standing) ([]limits.Standing, error) {
	for _, r := range d.Rates {
		standings = append(standings, limits.Standing{Class: r.Cell.Class, Remaining: l.left[r.Cell.Class]})
	}
	if d.Lease.Limit > 0 {
		standings = append(standings, limits.Standing{Class: limits.ClassConcurrency, Remaining: l.left[limits.ClassConcurrency]})
	}
	return standings, nil
}

// TestHolderLearnsWhatIsInForceAndSpendsNothing asks as somebody who may use the key, and as all who may not.
func TestHolderLearnsWhatIsInForceAndSpendsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		now := time.Now()
		w.instances["capped"] = &apikey.Instance{ID: "capped", Policy: apikey.Policy{
			AllowedScopes: apikey.Scopes{"orders:*"}, Total: apikey.Limits{Rate: apikey.Rate{Requests: 9, Per: apikey.Duration(time.Second)}},
		}}
		w.instances["off"] = &apikey.Instance{ID: "off", Policy: apikey.Policy{Disabled: true}}
		ask := func(limiter limits.Leaser, pairs ...authz.Pair) (authz.Self, authz.Reason, error) {
			a, err := authz.New(authz.Config{}, w, limiter, w.peppers, w, w)
			if err != nil {
				t.Fatal(err)
			}
			return a.Self(t.Context(), &authz.Request{Peer: "192.0.2.1", Headers: pairs})
		}
		key := func(s apikey.Secret) authz.Pair { return header("x-api-key", s.Reveal()) }

		k := apikey.Key{InstanceID: "capped", Scopes: apikey.Scopes{"bills:read", "orders:read"}, Limits: apikey.Limits{Burst: 7, MaxConcurrent: 5},
			AllowedIPs: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}
		good := w.issue(k)
		room := lookable{w, map[limits.Class]int64{limits.ClassBurst: 6, limits.ClassInstance: 4, limits.ClassConcurrency: 3}}
		got, reason, err := ask(room, key(good))
		want := authz.Self{
			Scopes: apikey.Scopes{"orders:read"}, Left: &authz.Left{Burst: 4, Running: 3},
			Limits: apikey.Limits{Rate: apikey.ShippedLimits.Rate, Burst: 7, MaxConcurrent: 5},
		}
		if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(authz.Self{}, "Key", "Standings")); diff != "" || reason != authz.ReasonKey || err != nil || got.Key == nil || len(got.Standings) != 3 {
			t.Fatalf("%s, %v (-want +got):\n%s", reason, err, diff)
		}
		free := w.issue(apikey.Key{Limits: apikey.Limits{Rate: apikey.Rate{Requests: -1}, MaxConcurrent: -1}})
		if got, _, _ := ask(room, header("authorization", "Bearer "+free.Reveal())); got.Left == nil || *got.Left != (authz.Left{Burst: -1, Running: -1}) || got.Scopes != nil {
			t.Errorf("without limits: %+v", got)
		}
		if got, _, _ := ask(w, key(good)); got.Left != nil {
			t.Errorf("a limiter that cannot tell: %+v", got.Left)
		}

		for want, pairs := range map[authz.Reason][]authz.Pair{
			authz.ReasonNoCredential:        nil,
			authz.ReasonAmbiguousCredential: {key(good), header("authorization", "Bearer "+free.Reveal())},
			authz.ReasonMalformedCredential: {key(apikey.Format{}.New(apikey.KindManagement))},
			authz.ReasonBadChecksum:         {header("x-api-key", good.Reveal()[:len(good.Reveal())-1]+map[bool]string{true: "b", false: "a"}[good.Reveal()[len(good.Reveal())-1] == 'a'])},
			authz.ReasonUnknownKey:          {key(apikey.Format{}.New(apikey.KindInstance))},
			authz.ReasonRevoked:             {key(w.issue(apikey.Key{RevokedAt: now}))},
			authz.ReasonDisabled:            {key(w.issue(apikey.Key{Disabled: true}))},
			authz.ReasonInstanceDisabled:    {key(w.issue(apikey.Key{InstanceID: "off"}))},
			authz.ReasonNotYetValid:         {key(w.issue(apikey.Key{NotBefore: now.Add(time.Second)}))},
			authz.ReasonExpired:             {key(w.issue(apikey.Key{ExpirationDate: now.Add(-1)}))},
			authz.ReasonGenerationEnded:     {key(w.issue(apikey.Key{Generations: []apikey.Generation{{Number: 1, Revoked: true}, {Number: 2}}}))},
			authz.ReasonIdle:                {key(w.issue(apikey.Key{InactivityDays: 1, CreatedAt: now.Add(-25 * time.Hour)}))},
			authz.ReasonAddress:             {key(w.issue(apikey.Key{AllowedIPs: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}}))},
		} {
			if got, reason, err := ask(w, pairs...); reason != want || err != nil || got.Key != nil {
				t.Errorf("got %s, %v, %+v, want %s", reason, err, got, want)
			}
		}
		w.notServed = apikey.ErrUndecided
		if got, _, err := ask(w, key(good)); !errors.Is(err, apikey.ErrUndecided) || got.Key != nil {
			t.Errorf("what the others answered is too old: %v, %+v", err, got)
		}
		if w.spent() {
			t.Errorf("asking used a key: %v, %v", w.demands, w.used)
		}
	})
}
