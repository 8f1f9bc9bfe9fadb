package storetest

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

func testSessions(t *testing.T, s admin.Store) {
	ctx, at := t.Context(), time.Now().UTC().Truncate(time.Microsecond)
	byToken := &admin.Session{
		ID: admin.SessionID{1, 31: 0xff}, CreatedAt: at, SeenAt: at, EndsAt: at.Add(12 * time.Hour), IdleAt: at.Add(30 * time.Minute),
		Token: apikey.Digest{2, 31: 3},
	}
	byIssuer := &admin.Session{
		ID: admin.SessionID{2}, CreatedAt: at, SeenAt: at, EndsAt: at.Add(time.Hour), IdleAt: at.Add(10 * time.Minute),
		Subject: admin.OIDCSubject{Name: "oidc:https://issuer.example#ann", Role: admin.RoleUser, InstanceID: "acme", UserPrincipalName: "ann@example.com"},
	}
	before := head(t, s)
	for _, session := range []*admin.Session{byToken, byIssuer} {
		if err := s.PutSession(ctx, session); err != nil {
			t.Fatal(err)
		}
	}
	look := func(want *admin.Session) {
		t.Helper()
		got, err := s.Session(ctx, want.ID)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("a session came back otherwise (-want +got):\n%s", diff)
		}
	}
	gone := func(id admin.SessionID) {
		t.Helper()
		if _, err := s.Session(ctx, id); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("a session that is gone: got %v, want ErrNotFound", err)
		}
	}
	look(byToken)
	look(byIssuer)
	gone(admin.SessionID{3})

	// A use only adds, and never brings back.
	byToken.SeenAt, byToken.IdleAt = at.Add(time.Minute), at.Add(31*time.Minute)
	for _, seen := range []time.Duration{time.Minute, 0} {
		if err := s.TouchSession(ctx, byToken.ID, at.Add(seen), at.Add(30*time.Minute+seen)); err != nil {
			t.Fatal(err)
		}
		look(byToken)
	}
	look(byIssuer)
	for range 2 {
		if err := s.EndSession(ctx, byToken.ID); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.TouchSession(ctx, byToken.ID, at.Add(time.Hour), at.Add(2*time.Hour)); err != nil {
		t.Fatal(err)
	}
	gone(byToken.ID)
	look(byIssuer)

	// Those that are over go, by either of their ends, and no others.
	byToken.ID = admin.SessionID{4}
	byToken.EndsAt, byToken.IdleAt = at.Add(5*time.Minute), at.Add(30*time.Minute)
	if err := s.PutSession(ctx, byToken); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		now               time.Time
		tokenHas, userHas bool
	}{{at.Add(5*time.Minute - time.Microsecond), true, true}, {at.Add(5 * time.Minute), false, true}, {at.Add(10 * time.Minute), false, false}} {
		if err := s.ForgetSessions(ctx, step.now); err != nil {
			t.Fatal(err)
		}
		for id, has := range map[admin.SessionID]bool{byToken.ID: step.tokenHas, byIssuer.ID: step.userHas} {
			if has {
				if _, err := s.Session(ctx, id); err != nil {
					t.Errorf("%v after the beginning a session is gone: %v", step.now.Sub(at), err)
				}
			} else {
				gone(id)
			}
		}
	}
	if after := head(t, s); after != before {
		t.Errorf("sessions made a revision: %d, before %d", after, before)
	}

	// They end by who signed in, whoever that is, and with the transaction.
	const ann, eve = "oidc:https://issuer.example#ann", "oidc:https://issuer.example#ann' OR '1"
	for i, name := range []string{"", ann, ann, eve} {
		session := &admin.Session{ID: admin.SessionID{5, byte(i)}, CreatedAt: at, SeenAt: at, EndsAt: at.Add(time.Hour), IdleAt: at.Add(time.Hour)}
		if session.Subject.Name = name; name == "" {
			session.Token = apikey.Digest{1}
		}
		if err := s.PutSession(ctx, session); err != nil {
			t.Fatal(err)
		}
	}
	undone := errors.New("undone")
	if _, err := s.Update(ctx, func(tx admin.Tx) error {
		if n, err := tx.EndSessions(ctx, ""); n != 4 || err != nil {
			t.Errorf("all: %d, %v", n, err)
		}
		return undone
	}); !errors.Is(err, undone) {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		want int
	}{{"oidc:https://issuer.example#an", 0}, {"oidc:https://issuer.example#Ann", 0}, {ann, 2}, {ann, 0}, {eve, 1}, {"", 1}, {"", 0}} {
		update(t, s, func(tx admin.Tx) error {
			n, err := tx.EndSessions(ctx, step.name)
			if n != step.want {
				t.Errorf("%q: %d ended, want %d", step.name, n, step.want)
			}
			return err
		})
	}
}

func testKeysUsage(t *testing.T, s admin.Store) {
	ctx, day := t.Context(), time.Date(2026, 11, 20, 0, 0, 0, 0, time.UTC)
	one, two, other := apikey.ID{1, 15: 1}, apikey.ID{2, 15: 2}, apikey.ID{3, 15: 3}
	counts := func(in string, key apikey.ID, at time.Time, allowed int64) admin.Usage {
		return admin.Usage{InstanceID: in, KeyID: key, Start: at, UsageCounts: admin.UsageCounts{
			Allowed: allowed, Refused: 1, Reasons: map[string]int64{"revoked": 1}, Generations: map[int]int64{1: allowed},
		}}
	}
	instance(t, s, "acme", "other")
	err := s.AddUsage(ctx, admin.UsageBatch{}, []admin.Usage{
		counts("acme", two, day.Add(26*time.Hour), 5), counts("acme", one, day.Add(time.Hour), 1), counts("acme", one, day.Add(2*time.Hour), 2),
		counts("acme", one, day.Add(25*time.Hour), 4), counts("acme", one, day.Add(-time.Minute), 8), counts("acme", one, day.Add(48*time.Hour), 16),
		counts("acme", other, day.Add(time.Hour), 32), counts("other", one, day.Add(time.Hour), 64),
	})
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.KeysUsage(ctx, []apikey.ID{two, one, {9}}, admin.UsageQuery{InstanceID: "acme", KeyID: other, Interval: admin.UsageDay, From: day, To: day.Add(48 * time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	sum := func(key apikey.ID, at time.Time, allowed, refused int64) admin.Usage {
		return admin.Usage{InstanceID: "acme", KeyID: key, Start: at, UsageCounts: admin.UsageCounts{Allowed: allowed, Refused: refused}}
	}
	want := []admin.Usage{sum(one, day, 3, 2), sum(one, day.Add(24*time.Hour), 4, 1), sum(two, day.Add(24*time.Hour), 5, 1)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got, err := s.KeysUsage(ctx, nil, admin.UsageQuery{InstanceID: "acme", Interval: admin.UsageDay, From: day, To: day.Add(time.Hour)}); err != nil || len(got) > 0 {
		t.Errorf("of no keys: %v, %v", got, err)
	}
}
