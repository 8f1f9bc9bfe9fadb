package storetest

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

func testInstances(t *testing.T, s admin.Store) {
	ctx := t.Context()
	if list, err := s.Instances(ctx); err != nil || len(list) != 0 {
		t.Errorf("a new store: got %v and error %v, want no instance", list, err)
	}
	limits := fullKey("", 0).Limits
	want := &apikey.Instance{
		ID: "tenant-1",
		Policy: apikey.Policy{
			Disabled: true,
			Defaults: apikey.Defaults{
				Instance: limits,
				Agent:    apikey.Limits{Burst: 4},
				User:     apikey.Limits{MaxConcurrent: apikey.Unlimited},
			},
			Total:         apikey.Limits{Rate: apikey.Rate{Requests: apikey.Unlimited}},
			AllowedScopes: apikey.Scopes{"a:b"},
			Caps:          apikey.Caps{Instance: 1, User: 2, Agent: apikey.Unlimited},
			Creation:      apikey.Creation{PerHour: 3, PerHourAndUser: 4},
			Expiration: apikey.Expiration{
				Default: apikey.ExpiresByTime, Required: true, Life: apikey.Duration(time.Hour),
				LongestLife: apikey.Duration(48 * time.Hour), InactivityDays: 5,
			},
			OnLeak:      apikey.OnLeak{Instance: apikey.LeakFlags, Agent: apikey.LeakRevokes, User: apikey.LeakFlags},
			KeepRevoked: apikey.Duration(72 * time.Hour),
			Shadow:      apikey.Shadow{Rate: true, MaxConcurrent: true, Total: true, Scopes: true, AllowedIPs: true},
			Usage:       apikey.UsagePolicy{Enabled: new(false)},
			Alerts: apikey.Alerts{
				NewNetwork:  apikey.NewNetworkAlerts{Disabled: true},
				Refusals:    apikey.RefusalAlerts{Disabled: true, Window: apikey.Duration(time.Minute), PerKey: 1, PerInstance: 2, Factor: 3},
				UnknownKeys: apikey.UnknownKeyAlerts{Disabled: true, PerMinute: 4},
				Expiring:    apikey.ExpiringKeyAlerts{Disabled: true, Days: []int{9, 8}},
				Unused:      apikey.UnusedKeyAlerts{Disabled: true, IdleDays: 5, NeverUsedDays: 6},
			},
		},
		CreatedAt: noon,
	}
	wantNoZero(t, want.Policy)
	want.Revision = update(t, s, func(tx admin.Tx) error {
		in := *want
		in.Revision = 12345 // not the caller's to say
		return tx.PutInstance(ctx, &in)
	})
	got, err := s.Instance(ctx, want.ID)
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, "instance", want, got)

	// Replaced as a whole, but for its creation.
	replaced := &apikey.Instance{ID: want.ID, Policy: apikey.Policy{AllowedScopes: apikey.Scopes{}}, CreatedAt: noon}
	replaced.Revision = update(t, s, func(tx admin.Tx) error {
		return tx.PutInstance(ctx, &apikey.Instance{ID: want.ID, Policy: replaced.Policy, CreatedAt: noon.Add(time.Hour)})
	})
	if got, err = s.Instance(ctx, want.ID); err != nil {
		t.Fatal(err)
	}
	wantSame(t, "replaced instance", replaced, got)

	instance(t, s, "b", "Tenant-1", "a")
	list, err := s.Instances(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, in := range list {
		ids = append(ids, in.ID)
	}
	wantSame(t, "instances by id", []string{"Tenant-1", "a", "b", "tenant-1"}, ids) // exact: two of them differ in case only
	wantSame(t, "the instance in the list", replaced, list[3])
}

func testKeyComesBackWhole(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	full, bare := fullKey("tenant", 2), &apikey.Key{ID: id(1), InstanceID: "tenant"}
	wantNoZero(t, *full, "Generations", "Digest", "Generation", "Revision")
	wantNoZero(t, fullGeneration)
	wantNoZero(t, full.Limits)
	revision := update(t, s, func(tx admin.Tx) error {
		return errors.Join(
			tx.InsertKey(ctx, full), tx.InsertGeneration(ctx, full.ID, fullGeneration, digest("full"), 1),
			tx.InsertKey(ctx, bare))
	})
	full.Revision, bare.Revision = revision, revision
	full.Generations = []apikey.Generation{fullGeneration}
	for _, want := range []*apikey.Key{full, bare} {
		got, err := s.Key(ctx, "tenant", want.ID)
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, "Key", want, got)
	}
	list, err := s.Keys(ctx, "tenant", admin.KeyQuery{Limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, "Keys", []*apikey.Key{full, bare}, list)

	full.Digest, full.Generation = digest("full"), 1
	wantSame(t, "FindKey", full, found(t, s, digest("full")))
}

func testNilIsNotEmpty(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	empty, absent := plain("tenant", 1), plain("tenant", 2)
	empty.Scopes, empty.AllowedIPs, empty.Metadata = apikey.Scopes{}, []netip.Prefix{}, map[string]string{}
	empty.Quotas = map[string]apikey.QuotaOverride{}
	revision := update(t, s, func(tx admin.Tx) error { return errors.Join(tx.InsertKey(ctx, empty), tx.InsertKey(ctx, absent)) })
	empty.Revision, absent.Revision = revision, revision
	for _, want := range []*apikey.Key{empty, absent} {
		got, err := s.Key(ctx, "tenant", want.ID)
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, "inserted", want, got)
	}
	// An update tells them apart too, in both directions.
	empty.ID, absent.ID = absent.ID, empty.ID
	empty.Name, absent.Name = absent.Name, empty.Name
	revision = update(t, s, func(tx admin.Tx) error { return errors.Join(tx.UpdateKey(ctx, empty), tx.UpdateKey(ctx, absent)) })
	empty.Revision, absent.Revision = revision, revision
	for _, want := range []*apikey.Key{empty, absent} {
		got, err := s.Key(ctx, "tenant", want.ID)
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, "updated", want, got)
	}
}

func testTimesToTheMicrosecond(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	for n, c := range []struct {
		name     string
		in, want time.Time
	}{
		{"zero", time.Time{}, time.Time{}},
		{"the epoch is not zero", time.Unix(0, 0), time.Unix(0, 0).UTC()},
		{"below a microsecond", noon.Add(999 * time.Nanosecond), noon},
		{"before the epoch, rounded down too", time.Unix(-1, 999_999_999), time.Unix(-1, 999_999_000).UTC()},
		{"another zone", noon.In(time.FixedZone("", 5*3600)), noon},
		{"the last of JSON's years", time.Date(9999, 12, 31, 23, 59, 59, 999999000, time.UTC), time.Date(9999, 12, 31, 23, 59, 59, 999999000, time.UTC)},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := plain("tenant", n+1)
			k.CreatedAt, k.ExpirationDate, k.NotBefore, k.RevokedAt, k.LastUsedAt = c.in, c.in, c.in, c.in, c.in
			k.LeakReportedAt, k.IdleFrom = c.in, c.in
			revision := update(t, s, func(tx admin.Tx) error {
				return errors.Join(tx.InsertKey(ctx, k),
					tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 1, CreatedAt: c.in, ValidUntil: c.in, LastUsedAt: c.in}, digest("%d", n), 1))
			})
			want := *k
			want.CreatedAt, want.ExpirationDate, want.NotBefore, want.RevokedAt, want.LastUsedAt = c.want, c.want, c.want, c.want, c.want
			want.LeakReportedAt, want.IdleFrom, want.Revision = c.want, c.want, revision
			want.Generations = []apikey.Generation{{Number: 1, CreatedAt: c.want, ValidUntil: c.want, LastUsedAt: c.want}}
			got, err := s.Key(ctx, "tenant", k.ID)
			if err != nil {
				t.Fatal(err)
			}
			wantSame(t, "key", &want, got)
		})
	}
}

func testUpdateKey(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant", "other")
	before := fullKey("tenant", 1)
	update(t, s, func(tx admin.Tx) error {
		return errors.Join(tx.InsertKey(ctx, before), tx.InsertGeneration(ctx, before.ID, fullGeneration, digest("1"), 1))
	})
	// Every field says something else; those that may not change are expected as they were.
	change := &apikey.Key{
		ID: before.ID, InstanceID: before.InstanceID,
		Type: apikey.TypeUser, AgentName: "x", UserPrincipalName: "x", CreatedAt: noon.Add(time.Hour), CreatedBy: "x",
		LastUsedAt: noon.Add(time.Hour), LastUsedNetwork: "2001:db8::/48", LastUsedPath: "/other", Generations: []apikey.Generation{{Number: 9}}, Digest: digest("x"), Generation: 9,
		Name: "new name", Description: "new", Environment: "test", Scopes: apikey.Scopes{"c"},
		AllowedIPs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32")}, Limits: apikey.Limits{Burst: 99},
		ExpirationDate: noon.Add(time.Hour), InactivityDays: 3, NotBefore: noon.Add(time.Minute), Metadata: map[string]string{"k": "v"},
		Disabled: false, RevokedAt: noon.Add(2 * time.Hour), RevokedReason: "stolen", LeakReportedAt: noon.Add(3 * time.Hour),
		IdleFrom: noon.Add(4 * time.Hour), Revision: 12345,
	}
	revision := update(t, s, func(tx admin.Tx) error { return tx.UpdateKey(ctx, change) })
	want := *change
	want.Revision = revision
	want.Type, want.AgentName, want.UserPrincipalName = before.Type, before.AgentName, before.UserPrincipalName
	want.CreatedAt, want.CreatedBy, want.LastUsedAt = before.CreatedAt, before.CreatedBy, before.LastUsedAt
	want.LastUsedNetwork, want.LastUsedPath = before.LastUsedNetwork, before.LastUsedPath
	want.Generations, want.Digest, want.Generation = []apikey.Generation{fullGeneration}, apikey.Digest{}, 0
	got, err := s.Key(ctx, "tenant", before.ID)
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, "updated key", &want, got)

	elsewhere := *change
	elsewhere.InstanceID = "other"
	update(t, s, func(tx admin.Tx) error {
		if err := tx.UpdateKey(ctx, &elsewhere); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("update under another instance: got %v, want ErrNotFound", err)
		}
		return nil
	})
}

func testGenerations(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	k := keyOf(t, s, "tenant", 1)
	update(t, s, func(tx admin.Tx) error {
		return errors.Join(
			tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 3, Hint: "three"}, digest("three"), 1),
			tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 2, Hint: "two"}, digest("two"), 2))
	})
	for d, want := range map[apikey.Digest]int{digest("key 1"): 1, digest("two"): 2, digest("three"): 3} {
		got := found(t, s, d)
		if got.ID != k.ID || got.Generation != want || got.Digest != d {
			t.Errorf("got generation %d by %v, want %d by %v", got.Generation, got.Digest, want, d)
		}
		var numbers []int
		for _, g := range got.Generations {
			numbers = append(numbers, g.Number)
		}
		wantSame(t, "generations, by number", []int{1, 2, 3}, numbers)
	}
	got, err := s.Key(ctx, "tenant", k.ID)
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest != (apikey.Digest{}) || got.Generation != 0 {
		t.Errorf("Key told the digest %v of generation %d; only FindKey may", got.Digest, got.Generation)
	}
}

func testPages(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant", "other")
	// Five moments, five keys in each, inserted in no order: pages of three break within a moment.
	var want []apikey.ID
	update(t, s, func(tx admin.Tx) error {
		for i := range 25 {
			n := (i*7)%25 + 1
			k := plain("tenant", n*100)
			k.CreatedAt = noon.Add(time.Duration(n/5) * time.Minute)
			if err := insert(ctx, tx, k, digest("key %d", n)); err != nil {
				return err
			}
			if err := tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 2}, digest("key %d again", n), 1); err != nil {
				return err
			}
		}
		return insert(ctx, tx, plain("other", 1), digest("other"))
	})
	for n := 25; n > 0; n-- {
		want = append(want, id(n*100))
	}
	var got []apikey.ID
	place := admin.KeyPlace{}
	for page := 1; ; page++ {
		list, err := s.Keys(ctx, "tenant", admin.KeyQuery{After: place, Limit: 3})
		if err != nil {
			t.Fatal(err)
		}
		if len(list) == 0 {
			break
		}
		if len(list) > 3 {
			t.Fatalf("got %d keys, want at most 3", len(list))
		}
		for _, k := range list {
			if len(k.Generations) != 2 {
				t.Errorf("key %v: got %d generations, want 2", k.ID, len(k.Generations))
			}
			if slices.Contains(want, k.ID) {
				got = append(got, k.ID)
			}
		}
		last := list[len(list)-1]
		place = admin.OrderNewest.PlaceOf(last)
		// Meanwhile keys are added: newer than all, and right beside where the page ended.
		update(t, s, func(tx admin.Tx) error {
			newer, beside := plain("tenant", 1_000_000+page), plain("tenant", 0)
			newer.CreatedAt = noon.Add(24 * time.Hour)
			beside.ID, beside.CreatedAt = last.ID, last.CreatedAt
			beside.ID[15]++
			return errors.Join(tx.InsertKey(ctx, newer), tx.InsertKey(ctx, beside))
		})
	}
	wantSame(t, "keys that were there from the first page to the last, newest first", want, got)

	if list, err := s.Keys(ctx, "nowhere", admin.KeyQuery{Limit: 3}); err != nil || len(list) != 0 {
		t.Errorf("keys of no instance: got %v and error %v, want none", list, err)
	}
	if list, err := s.Keys(ctx, "tenant", admin.KeyQuery{}); err != nil || len(list) != 0 {
		t.Errorf("at most 0 keys: got %d and error %v, want none", len(list), err)
	}
}

func testRefusals(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant", "other")
	keyOf(t, s, "tenant", 1)
	update(t, s, func(tx admin.Tx) error {
		return errors.Join(tx.InsertToken(ctx, &admin.Token{ID: id(50)}, digest("token"), 1), tx.PutPepper(ctx, 1, [16]byte{1}))
	})
	writes := []struct {
		name string
		run  func(tx admin.Tx) error
		want error
	}{
		{"delete no instance", func(tx admin.Tx) error { return tx.DeleteInstance(ctx, "nowhere") }, apikey.ErrNotFound},
		{"key of no instance", func(tx admin.Tx) error { return tx.InsertKey(ctx, plain("nowhere", 9)) }, apikey.ErrNotFound},
		{"taken key id", func(tx admin.Tx) error { return tx.InsertKey(ctx, plain("other", 1)) }, apikey.ErrConflict},
		{"update no key", func(tx admin.Tx) error { return tx.UpdateKey(ctx, plain("tenant", 9)) }, apikey.ErrNotFound},
		{"generation of no key", func(tx admin.Tx) error {
			return tx.InsertGeneration(ctx, id(9), apikey.Generation{Number: 1}, digest("9"), 1)
		}, apikey.ErrNotFound},
		{"taken generation", func(tx admin.Tx) error {
			return tx.InsertGeneration(ctx, id(1), apikey.Generation{Number: 1}, digest("9"), 1)
		}, apikey.ErrConflict},
		{"taken digest", func(tx admin.Tx) error {
			return tx.InsertGeneration(ctx, id(1), apikey.Generation{Number: 2}, digest("key 1"), 1)
		}, apikey.ErrConflict},
		{"end generation of no key", func(tx admin.Tx) error { return tx.EndGeneration(ctx, id(9), 1, noon, true) }, apikey.ErrNotFound},
		{"end no generation", func(tx admin.Tx) error { return tx.EndGeneration(ctx, id(1), 2, noon, true) }, apikey.ErrNotFound},
		{"delete no key", func(tx admin.Tx) error { return tx.DeleteKey(ctx, "tenant", id(9)) }, apikey.ErrNotFound},
		{"delete a key of another instance", func(tx admin.Tx) error { return tx.DeleteKey(ctx, "other", id(1)) }, apikey.ErrNotFound},
		{"mark no key", func(tx admin.Tx) error { return tx.MarkEnded(ctx, id(9), noon) }, apikey.ErrNotFound},
		{"taken token id", func(tx admin.Tx) error {
			return tx.InsertToken(ctx, &admin.Token{ID: id(50)}, digest("another"), 1)
		}, apikey.ErrConflict},
		{"taken token digest", func(tx admin.Tx) error {
			return tx.InsertToken(ctx, &admin.Token{ID: id(51)}, digest("token"), 1)
		}, apikey.ErrConflict},
		{"revoke no token", func(tx admin.Tx) error { return tx.RevokeToken(ctx, id(51), noon) }, apikey.ErrNotFound},
		{"another pepper of one version", func(tx admin.Tx) error { return tx.PutPepper(ctx, 1, [16]byte{2}) }, apikey.ErrConflict},
		{"retire no pepper", func(tx admin.Tx) error { return tx.RetirePepper(ctx, 9) }, apikey.ErrNotFound},
	}
	for _, c := range writes {
		t.Run(c.name, func(t *testing.T) {
			_, err := s.Update(ctx, func(tx admin.Tx) error { return errors.Join(tx.Audit(ctx, event), c.run(tx)) })
			if !errors.Is(err, c.want) || errors.Is(err, apikey.ErrUndecided) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			wantNoDigest(t, err)
		})
	}
	reads := []struct {
		name string
		run  func() error
	}{
		{"instance", func() error { _, err := s.Instance(ctx, "nowhere"); return err }},
		{"key", func() error { _, err := s.Key(ctx, "tenant", id(9)); return err }},
		{"key of another instance", func() error { _, err := s.Key(ctx, "other", id(1)); return err }},
		{"find key", func() error { _, _, err := s.FindKey(ctx, digest("9")); return err }},
		{"a token's digest finds no key", func() error { _, _, err := s.FindKey(ctx, digest("token")); return err }},
		{"a key's digest finds no token", func() error { _, err := s.Token(ctx, digest("key 1")); return err }},
		{"last used", func() error { _, err := s.LastUsed(ctx, id(9)); return err }},
		{"token", func() error { _, err := s.Token(ctx, digest("9")); return err }},
		{"confirm", func() error { return s.Confirm(ctx, "nobody", 1, time.Minute) }},
	}
	for _, c := range reads {
		t.Run(c.name, func(t *testing.T) {
			err := c.run()
			if !errors.Is(err, apikey.ErrNotFound) || errors.Is(err, apikey.ErrUndecided) {
				t.Errorf("got %v, want ErrNotFound", err)
			}
			wantNoDigest(t, err)
		})
	}
}

// wantNoDigest fails if an error tells one of the digests that these tests use, whole or in part.
func wantNoDigest(t *testing.T, err error) {
	t.Helper()
	for _, name := range []string{"9", "token", "key 1"} {
		d := digest("%s", name)
		for _, told := range []string{string(d[:8]), hex.EncodeToString(d[:4]), fmt.Sprintf("%d", d[:4])} {
			if err != nil && strings.Contains(strings.ToLower(err.Error()), strings.Trim(told, "[]")) {
				t.Errorf("the error tells a digest: %q", err)
			}
		}
	}
}

func testRefusedWriteDidNothing(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	keyOf(t, s, "tenant", 1)
	before := dump(t, s)
	update(t, s, func(tx admin.Tx) error {
		for _, err := range []error{
			tx.InsertKey(ctx, plain("tenant", 1)),
			tx.InsertGeneration(ctx, id(1), apikey.Generation{Number: 2}, digest("key 1"), 1),
			tx.DeleteInstance(ctx, "nowhere"),
			tx.DeleteKey(ctx, "nowhere", id(1)),
			tx.EndGeneration(ctx, id(1), 7, noon, true),
		} {
			if err == nil {
				t.Error("got no error")
			}
		}
		return nil // and the transaction goes on
	})
	wantSame(t, "store after refused writes", before, dump(t, s))
	update(t, s, func(tx admin.Tx) error {
		if err := tx.InsertKey(ctx, plain("tenant", 1)); !errors.Is(err, apikey.ErrConflict) {
			t.Errorf("got %v, want ErrConflict", err)
		}
		return insert(ctx, tx, plain("tenant", 2), digest("key 2"))
	})
	if k := found(t, s, digest("key 2")); k.ID != id(2) {
		t.Errorf("got key %v, want %v", k.ID, id(2))
	}
}

func testTokens(t *testing.T, s admin.Store) {
	ctx := t.Context()
	full := &admin.Token{
		ID: id(1), Name: "ops", Role: admin.RoleOperator, InstanceID: "tenant", Hint: "kwm_…abcd", CreatedAt: noon, CreatedBy: "serve",
		UserPrincipalName: "ann@example.com", ExpiresAt: noon.Add(time.Hour), RevokedAt: noon.Add(time.Minute), LastUsedAt: noon.Add(time.Second),
		Bootstrap: true,
	}
	wantNoZero(t, *full)
	tie, older := &admin.Token{ID: id(2), CreatedAt: noon}, &admin.Token{ID: id(3), CreatedAt: noon.Add(-time.Hour)}
	update(t, s, func(tx admin.Tx) error {
		return errors.Join(
			tx.InsertToken(ctx, older, digest("older"), 1),
			tx.InsertToken(ctx, full, digest("full"), 1),
			tx.InsertToken(ctx, tie, digest("tie"), 1))
	})
	list, err := s.Tokens(ctx)
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, "tokens, newest first", []*admin.Token{tie, full, older}, list)

	revokedAt := noon.Add(2 * time.Hour)
	update(t, s, func(tx admin.Tx) error { return tx.RevokeToken(ctx, tie.ID, revokedAt) })
	update(t, s, func(tx admin.Tx) error { return tx.RevokeToken(ctx, tie.ID, revokedAt.Add(time.Hour)) }) // twice is once
	tie.RevokedAt = revokedAt
	for name, want := range map[string]*admin.Token{"full": full, "tie": tie, "older": older} {
		got, err := s.Token(ctx, digest("%s", name))
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, name, want, got)
	}

	// A last use only grows; of a token that is gone it is nobody's.
	revision, audit := head(t, s), events(t, s)
	for _, at := range []time.Time{noon.Add(time.Hour), noon} {
		if err := s.TouchTokens(ctx, []admin.TokenUse{{ID: older.ID, At: at}, {ID: id(99), At: at}}); err != nil {
			t.Fatal(err)
		}
	}
	older.LastUsedAt = noon.Add(time.Hour)
	list, err = s.Tokens(ctx)
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, "tokens after a use", []*admin.Token{tie, full, older}, list)
	wantSame(t, "revision", revision, head(t, s))
	wantSame(t, "audit", audit, events(t, s))
}

func testAudit(t *testing.T, s admin.Store) {
	ctx := t.Context()
	full := admin.Event{
		At: noon, Actor: "token:1", RemoteAddr: "192.0.2.1:555", Action: "key.create", Refused: "Forbidden", InstanceID: "tenant", Target: "k", RequestID: "r",
		Before: json.RawMessage(`{"a":1}`), After: json.RawMessage(`[null,"x"]`),
	}
	wantNoZero(t, full, "Sequence", "Link")
	var want []admin.Event
	for range 3 {
		_, err := s.Update(ctx, func(tx admin.Tx) error {
			numbered := full
			numbered.Sequence = 99 // not the caller's to say
			return errors.Join(tx.Audit(ctx, numbered), tx.Audit(ctx, admin.Event{Action: "bare"}))
		})
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, full, admin.Event{Action: "bare"})
	}
	var got []admin.Event
	after, link := int64(0), admin.Link{}
	for {
		page, err := s.Events(ctx, after, 4)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		if len(page) > 4 {
			t.Fatalf("got %d events, want at most 4", len(page))
		}
		for _, e := range page {
			if e.Sequence != after+1 {
				t.Errorf("sequence %d comes after %d", e.Sequence, after)
			}
			if e.LinkAfter(link) != e.Link {
				t.Errorf("event %d does not follow the one before: did a byte of it change?", e.Sequence)
			}
			after, link = e.Sequence, e.Link
			e.Sequence, e.Link = 0, admin.Link{}
			if (e.Action == "bare") != (e.Before == nil) || (e.Action == "bare") != (e.After == nil) {
				t.Errorf("%s: nil became something, or the reverse: %q, %q", e.Action, e.Before, e.After)
			}
			got = append(got, e)
		}
	}
	wantSame(t, "events in the order of writing", want, got)

	if _, err := s.Update(ctx, func(tx admin.Tx) error {
		return tx.Audit(ctx, admin.Event{After: json.RawMessage(`{`)})
	}); err == nil {
		t.Error("an event that is not JSON was kept: nobody could list it")
	}
}
