package admin_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

func TestRevokeKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.policy(t, "a", apikey.Policy{Creation: apikey.Creation{PerHour: apikey.Unlimited}})
		d.instance(t, "b")
		ctx := t.Context()
		var old []apikey.ID
		for range 12 {
			old = append(old, d.make(t, admin.KeyInput{Environment: "test"}).Key.ID)
		}
		bystander := d.key(t, "b").Key
		disabled, expired := d.make(t, admin.KeyInput{Environment: "test"}).Key, d.make(t, admin.KeyInput{Environment: "test", ExpiresIn: "1h"}).Key
		d.patch(t, disabled.ID, admin.KeyPatch{Disabled: admin.To(true)})
		revoked := d.make(t, admin.KeyInput{Environment: "test"}).Key
		if _, err := d.RevokeKey(ctx, root, "a", revoked.ID, apikey.RevokedOwnerLeft); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * oneDay)
		used := d.make(t, admin.KeyInput{Environment: "test"}).Key
		prod := d.make(t, admin.KeyInput{Environment: "prod"}).Key
		d.use(t, old[0], time.Now().Add(-oneDay))

		unused := admin.KeyListInput{Environment: "test", UnusedFor: "90d"}
		for field, in := range map[string]admin.BulkRevocation{
			"filter":           {},
			"all":              {All: true, Filter: unused},
			"reason":           {All: true, Reason: "bored"},
			"filter.unusedFor": {Filter: admin.KeyListInput{UnusedFor: "long"}},
			// What .NET sends for a date that nobody set must not mean every key.
			"filter.expiresBefore": {Filter: admin.KeyListInput{ExpiresBefore: "0001-01-01T00:00:00Z"}},
			"filter.idleBefore":    {Filter: admin.KeyListInput{IdleBefore: "0001-01-01T00:00:00+00:00"}},
			"count":                {Filter: unused, Count: new(-1)},
		} {
			if _, err := d.RevokeKeys(ctx, root, "a", in); invalidField(err) != field {
				t.Errorf("got %v, want %s named", err, field)
			}
		}
		before := len(d.actions(t))
		dry, err := d.RevokeKeys(ctx, root, "a", admin.BulkRevocation{Filter: unused, DryRun: true})
		if err != nil || dry.Count != 13 || dry.RecentlyUsed != 0 || len(dry.Keys) != 13 || dry.Revoked != 0 {
			t.Errorf("what would go: %+v, %v; want 11 unused, the disabled and the expired one", dry, err)
		}
		for _, count := range []*int{nil, new(12), new(14)} {
			_, err := d.RevokeKeys(ctx, root, "a", admin.BulkRevocation{Filter: unused, Count: count})
			if confirm, ok := errors.AsType[*admin.ConfirmError](err); !ok || confirm.Count != 13 {
				t.Errorf("many without their count: %v", err)
			}
		}
		if after := len(d.actions(t)); after != before {
			t.Errorf("%d events of what was not done", after-before)
		}
		done, err := d.RevokeKeys(ctx, root, "a", admin.BulkRevocation{Filter: unused, Count: new(13), Reason: apikey.RevokedUnused})
		if err != nil || done.Revoked != 13 || !done.Propagation.Everywhere {
			t.Fatalf("got %+v and error %v", done, err)
		}
		for id, want := range map[apikey.ID]apikey.RevocationReason{
			old[1]: apikey.RevokedUnused, disabled.ID: apikey.RevokedUnused, expired.ID: apikey.RevokedUnused, revoked.ID: apikey.RevokedOwnerLeft,
			old[0]: "", used.ID: "", prod.ID: "",
		} {
			k, err := d.Key(ctx, root, "a", id)
			if err != nil || k.RevokedReason != want || k.RevokedAt.IsZero() != (want == "") {
				t.Errorf("key %v: revoked %v for %q, error %v; want %q", id, k.RevokedAt, k.RevokedReason, err, want)
			}
		}
		if after := len(d.actions(t)); after != before+13 {
			t.Errorf("%d events, want 13", after-before)
		}
		// One that was used lately needs its count, however few they are.
		_, err = d.RevokeKeys(ctx, root, "a", admin.BulkRevocation{Filter: admin.KeyListInput{Environment: "test"}})
		if confirm, ok := errors.AsType[*admin.ConfirmError](err); !ok || *confirm != (admin.ConfirmError{Count: 2, RecentlyUsed: 1}) {
			t.Errorf("got %v", err)
		}
		if done, err = d.RevokeKeys(ctx, root, "a", admin.BulkRevocation{All: true, Count: new(3)}); err != nil || done.Revoked != 3 {
			t.Errorf("the whole instance: %+v, %v", done, err)
		}
		if k, err := d.Key(ctx, root, "b", bystander.ID); err != nil || !k.RevokedAt.IsZero() {
			t.Errorf("another instance's key: %+v, %v", k, err)
		}
		if done, err = d.RevokeKeys(ctx, root, "a", admin.BulkRevocation{All: true}); err != nil || done.Count != 0 || !done.Propagation.Everywhere {
			t.Errorf("nothing is left: %+v, %v", done, err)
		}
	})
}

func TestBulkRevocationInBatches(t *testing.T) {
	d := open(t)
	unlimited := apikey.Policy{Caps: apikey.Caps{Instance: -1}, Creation: apikey.Creation{PerHour: -1}}
	d.policy(t, "a", unlimited)
	const n = 1203
	_, err := d.store.Update(t.Context(), func(tx admin.Tx) error {
		errs := []error{tx.Audit(t.Context(), admin.Event{Action: "fixture"})}
		for i := range n {
			errs = append(errs, tx.InsertKey(t.Context(), &apikey.Key{ID: apikey.ID{1, byte(i >> 8), byte(i)}, InstanceID: "a", Name: fmt.Sprint(i), CreatedAt: time.Now()}))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		t.Fatal(err)
	}
	done, err := d.RevokeKeys(t.Context(), root, "a", admin.BulkRevocation{All: true, Count: new(n)})
	if err != nil || done.Revoked != n || len(done.Keys) != 1000 {
		t.Fatalf("got %d of %d, %d listed, error %v", done.Revoked, n, len(done.Keys), err)
	}
	counts, err := d.CountKeys(t.Context(), root, "a")
	if err != nil || counts.Usable != 0 || counts.Revoked != n {
		t.Errorf("got %+v and error %v", counts, err)
	}
}

// A failing store has no room any more after so many changes.
type failing struct {
	admin.Store
	left int
}

func (f *failing) Update(ctx context.Context, fn func(admin.Tx) error) (apikey.Revision, error) {
	if f.left--; f.left < 0 {
		return 0, fmt.Errorf("full: %w", apikey.ErrUndecided)
	}
	return f.Store.Update(ctx, fn)
}

// TestBulkRevocationThatFailsSaysHowFarItCame: what was done before is told, and has reached this replica.
func TestBulkRevocationThatFailsSaysHowFarItCame(t *testing.T) {
	d := open(t)
	d.policy(t, "a", apikey.Policy{Caps: apikey.Caps{Instance: -1}, Creation: apikey.Creation{PerHour: -1}})
	const n = 450
	_, err := d.store.Update(t.Context(), func(tx admin.Tx) error {
		errs := []error{tx.Audit(t.Context(), admin.Event{Action: "fixture"})}
		for i := range n {
			errs = append(errs, tx.InsertKey(t.Context(), &apikey.Key{ID: apikey.ID{1, byte(i >> 8), byte(i)}, InstanceID: "a", Name: fmt.Sprint(i), CreatedAt: time.Now()}))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ batches, revoked, before int }{{2, 400, n}, {0, 0, n - 400}} {
		caughtUp := apikey.Revision(0)
		replica := catchUp(func(_ context.Context, rev apikey.Revision) error { caughtUp = rev; return nil })
		svc := admin.New(&failing{d.store, test.batches}, admin.Config{Peppers: apikey.Peppers{Current: d.pepper}}, replica, slog.New(slog.DiscardHandler))
		_, err = svc.RevokeKeys(t.Context(), root, "a", admin.BulkRevocation{All: true, Count: &test.before})
		some, partly := errors.AsType[*admin.PartialError](err)
		if !errors.Is(err, apikey.ErrUndecided) || partly != (test.revoked > 0) || (caughtUp > 0) != partly {
			t.Fatalf("got %v, after which this replica is at %d", err, caughtUp)
		}
		if partly && (some.Revoked != test.revoked || some.Count != n || !strings.Contains(some.Progress(), "400 of 450 keys are revoked;")) {
			t.Errorf("got %+v: %s", some, some.Progress())
		}
		if counts, err := d.CountKeys(t.Context(), root, "a"); err != nil || counts.Revoked != 400 {
			t.Errorf("%d are revoked, error %v", counts.Revoked, err)
		}
	}
	if done, err := d.RevokeKeys(t.Context(), root, "a", admin.BulkRevocation{All: true, Count: new(n - 400)}); err != nil || done.Revoked != n-400 {
		t.Errorf("repeated: %+v, %v", done, err)
	}
}

// catchUp is a whole cache.
type catchUp func(context.Context, apikey.Revision) error

func (f catchUp) CatchUp(ctx context.Context, rev apikey.Revision) error { return f(ctx, rev) }

// A spoiler changes a key between the look and the revocation.
type spoiler struct {
	admin.Store
	before func()
}

func (s spoiler) Update(ctx context.Context, fn func(admin.Tx) error) (apikey.Revision, error) {
	s.before()
	return s.Store.Update(ctx, fn)
}

func TestKeyUsedMeanwhileIsSpared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		used, unused := d.make(t, admin.KeyInput{}).Key, d.make(t, admin.KeyInput{}).Key
		time.Sleep(100 * oneDay)
		svc := d.with(spoiler{d.store, func() { d.use(t, used.ID, time.Now()) }}, apikey.Peppers{Current: d.pepper})
		done, err := svc.RevokeKeys(t.Context(), root, "a", admin.BulkRevocation{Filter: admin.KeyListInput{UnusedFor: "90d"}})
		if err != nil || done.Count != 2 || done.Revoked != 1 {
			t.Fatalf("got %+v and error %v", done, err)
		}
		for id, want := range map[apikey.ID]bool{used.ID: false, unused.ID: true} {
			if k, err := d.Key(t.Context(), root, "a", id); err != nil || k.RevokedAt.IsZero() == want {
				t.Errorf("key %v: revoked %v, want %t", id, k.RevokedAt, want)
			}
		}
	})
}

// reporting runs what reports of leaks ask for until the returned func is called.
func reporting(t *testing.T, svc *admin.Service) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error)
	go func() { ended <- svc.RunLeakReports(ctx) }()
	return func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

var somewhere = netip.MustParseAddr("192.0.2.7")

func TestReportLeaked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		ctx := t.Context()
		stop := reporting(t, d.Service)
		defer stop()
		report := func(secret apikey.Secret) {
			t.Helper()
			if err := d.ReportLeaked(secret, somewhere, "r1"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		get := func(id apikey.ID) *apikey.Key {
			t.Helper()
			k, err := d.store.Key(ctx, "a", id)
			if err != nil {
				t.Fatal(err)
			}
			return k
		}
		single := d.make(t, admin.KeyInput{})
		rotated := d.make(t, admin.KeyInput{Type: "user", UserPrincipalName: "ann"})
		second, err := d.RotateKey(ctx, root, "a", rotated.Key.ID, admin.RotateInput{}, 0)
		if err != nil {
			t.Fatal(err)
		}
		agent := d.make(t, admin.KeyInput{Type: "agent", AgentName: "x"})
		before := d.actions(t)

		for range 2 { // the second time is once
			report(single.Secret)
			if k := get(single.Key.ID); k.RevokedReason != apikey.RevokedKeyCompromise || k.RevokedAt.IsZero() || !k.Generations[0].Revoked || k.LeakReportedAt.IsZero() {
				t.Errorf("its only secret leaked: %+v", k)
			}
			report(rotated.Secret)
			if k := get(rotated.Key.ID); !k.RevokedAt.IsZero() || !k.Generations[0].Revoked || k.Generations[1].Revoked || k.LeakReportedAt.IsZero() {
				t.Errorf("one of its secrets leaked: %+v", k)
			}
			report(agent.Secret)
			if k := get(agent.Key.ID); !k.RevokedAt.IsZero() || k.Generations[0].Revoked || k.LeakReportedAt.IsZero() {
				t.Errorf("an agent's secret leaked: %+v", k)
			}
		}
		// Its next secret has not been reported yet.
		next, err := d.RotateKey(ctx, root, "a", agent.Key.ID, admin.RotateInput{}, 0)
		if err != nil {
			t.Fatal(err)
		}
		before = append(before, "key.leak", "key.leak", "key.leak", "key.rotate")
		for range 2 {
			report(next.Secret)
			report(agent.Secret)
		}
		if k := get(agent.Key.ID); !k.RevokedAt.IsZero() || k.Generations[1].Revoked || k.LeakReportedAt.Before(k.Generations[1].CreatedAt) {
			t.Errorf("the next secret of an agent leaked: %+v", k)
		}
		report(apikey.Format{}.New(apikey.KindInstance)) // nobody's
		if got := d.actions(t)[len(before):]; !slices.Equal(got, []string{"key.leak"}) {
			t.Errorf("audit: %v", got)
		}
		events, err := d.store.Events(ctx, 0, 100)
		if err != nil {
			t.Fatal(err)
		}
		last := events[len(events)-1]
		if last.Actor != "leak report" || last.RemoteAddr != "192.0.2.7" || last.RequestID != "r1" || last.InstanceID != "a" || last.Target != agent.Key.ID.String() {
			t.Errorf("the event does not say who: %+v", last)
		}
		report(second.Secret) // the last one that is valid
		if k := get(rotated.Key.ID); k.RevokedReason != apikey.RevokedKeyCompromise {
			t.Errorf("none of its secrets is left: %+v", k)
		}
		d.policy(t, "a", apikey.Policy{OnLeak: apikey.OnLeak{Agent: apikey.LeakRevokes}})
		report(agent.Secret)
		report(next.Secret)
		if k := get(agent.Key.ID); k.RevokedReason != apikey.RevokedKeyCompromise {
			t.Errorf("by another policy: %+v", k)
		}
		for id, done := range map[apikey.ID]string{single.Key.ID: "it is revoked", rotated.Key.ID: "its secret is ended", agent.Key.ID: "it goes on"} {
			if !regexp.MustCompile(`reported as leaked" instance=a key_id=` + id.String() + ` generation=1 done="` + done).MatchString(d.log.String()) {
				t.Errorf("the log does not say what became of %v: %s", id, d.log)
			}
		}
		all, err := json.Marshal(events)
		if err != nil {
			t.Fatal(err)
		}
		noCanary(t, string(all)+d.log.String(), single.Secret, rotated.Secret, agent.Secret)
	})
}

// TestAReportThatFailsHoldsUpNoOther: the record of one key cannot be read; the others that were reported end.
func TestAReportThatFailsHoldsUpNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		sick, sound := d.make(t, admin.KeyInput{}), d.make(t, admin.KeyInput{})
		svc := d.with(unreadable{d.store, d.pepper.Digest(sick.Secret.Reveal())}, apikey.Peppers{Current: d.pepper})
		stop := reporting(t, svc)
		defer stop()
		for _, secret := range []apikey.Secret{sick.Secret, sound.Secret} {
			if err := svc.ReportLeaked(secret, somewhere, ""); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Minute)
		if k, err := d.store.Key(t.Context(), "a", sound.Key.ID); err != nil || k.RevokedAt.IsZero() {
			t.Errorf("after a minute: got %+v and error %v", k, err)
		}
	})
}

// unreadable is a store with a key that cannot be read.
type unreadable struct {
	admin.Store
	digest apikey.Digest
}

func (u unreadable) FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, apikey.Revision, error) {
	if d == u.digest {
		return nil, 0, fmt.Errorf("read key: %w", apikey.ErrUndecided)
	}
	return u.Store.FindKey(ctx, d)
}

func TestReportOfWhatIsNoKey(t *testing.T) {
	d := open(t)
	mistyped := []byte(apikey.Format{}.New(apikey.KindUser).Reveal())
	mistyped[12] ^= 1
	for name, secret := range map[string]apikey.Secret{
		"nothing":            {},
		"text":               apikey.NewSecret("hunter2"),
		"mistyped":           apikey.NewSecret(string(mistyped)),
		"a management token": apikey.Format{}.New(apikey.KindManagement),
	} {
		for range 100 { // it costs nothing, so it is not counted
			if err := d.ReportLeaked(secret, somewhere, ""); invalidField(err) != "secret" {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
}

// A stuck store does not answer until it is let go.
type stuck struct {
	admin.Store
	asked atomic.Int64
	away  atomic.Bool
}

func (s *stuck) FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, apikey.Revision, error) {
	s.asked.Add(1)
	if s.away.Load() {
		return nil, 0, fmt.Errorf("gone: %w", apikey.ErrUndecided)
	}
	return s.Store.FindKey(ctx, d)
}

// TestReportsAreAnsweredBeforeTheStoreIsAsked: accepted while it is away, bounded, and done when it is back.
func TestReportsAreAnsweredBeforeTheStoreIsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		store := &stuck{Store: d.store}
		store.away.Store(true)
		svc := d.with(store, apikey.Peppers{Current: d.pepper})
		leaked := d.make(t, admin.KeyInput{})
		address := netip.MustParseAddr("10.0.0.1")
		if err := svc.ReportLeaked(leaked.Secret, address, ""); err != nil {
			t.Fatal(err)
		}
		accepted := 1
		for {
			address = address.Next()
			err := svc.ReportLeaked(apikey.Format{}.New(apikey.KindInstance), address, "")
			if busy, full := errors.AsType[*apikey.BusyError](err); full {
				if busy.RetryAfter < time.Second {
					t.Errorf("come again after %v", busy.RetryAfter)
				}
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if accepted++; accepted > 10_000 {
				t.Fatal("the queue has no end")
			}
		}
		if n := store.asked.Load(); n != 0 {
			t.Errorf("the store was asked %d times before the answers", n)
		}
		stop := reporting(t, svc)
		time.Sleep(time.Minute)
		if k, err := d.store.Key(t.Context(), "a", leaked.Key.ID); err != nil || !k.RevokedAt.IsZero() {
			t.Fatalf("got %+v, %v", k, err)
		}
		store.away.Store(false)
		time.Sleep(2 * time.Second)
		if k, err := d.store.Key(t.Context(), "a", leaked.Key.ID); err != nil || k.RevokedAt.IsZero() {
			t.Errorf("an accepted report was lost: %+v, %v", k, err)
		}
		stop()
		// What was accepted before the end is done at the end.
		another := d.make(t, admin.KeyInput{})
		stopped := reporting(t, svc)
		if err := svc.ReportLeaked(another.Secret, somewhere, ""); err != nil {
			t.Fatal(err)
		}
		stopped()
		if k, err := d.store.Key(t.Context(), "a", another.Key.ID); err != nil || k.RevokedAt.IsZero() {
			t.Errorf("a report from before the end was lost: %+v, %v", k, err)
		}
	})
}

func TestReportsOfOneAddressAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		stop := reporting(t, d.Service)
		defer stop()
		report := func(from string) error {
			return d.ReportLeaked(apikey.Format{}.New(apikey.KindInstance), netip.MustParseAddr(from), "")
		}
		for i := range 30 {
			if err := report(fmt.Sprintf("2001:db8:1:2::%x", i+1)); err != nil { // one /64
				t.Fatalf("report %d: %v", i, err)
			}
		}
		often, ok := errors.AsType[*admin.RateError](report("2001:db8:1:2:ffff::1%eth0"))
		if !ok || often.RetryAfter <= 0 || often.RetryAfter > time.Minute {
			t.Fatalf("got %v", often)
		}
		for _, other := range []string{"2001:db8:1:3::1", "192.0.2.1", "::ffff:192.0.2.2"} {
			if err := report(other); err != nil {
				t.Errorf("%s: %v", other, err)
			}
		}
		time.Sleep(often.RetryAfter)
		if err := report("2001:db8:1:2::1"); err != nil {
			t.Errorf("after the time that it was told: %v", err)
		}
	})
}

func TestLeakedUnderThePreviousPepper(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		made := d.make(t, admin.KeyInput{})
		svc := d.with(d.store, apikey.Peppers{Current: apikey.NewPepper(2, false), Previous: d.pepper})
		stop := reporting(t, svc)
		if err := svc.ReportLeaked(made.Secret, somewhere, ""); err != nil {
			t.Fatal(err)
		}
		stop()
		if k, err := d.store.Key(t.Context(), "a", made.Key.ID); err != nil || k.RevokedAt.IsZero() {
			t.Errorf("got %+v, %v", k, err)
		}
	})
}

// sweeping keeps house for svc, under a name, until the returned func is called.
func sweeping(t *testing.T, svc *admin.Service, holder string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error)
	go func() { ended <- svc.RunSweep(ctx, holder) }()
	return func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// sweep keeps house once.
func (d *desk) sweep(t *testing.T) {
	t.Helper()
	stop := sweeping(t, d.Service, "test")
	synctest.Wait()
	stop()
}

func TestSweepMarksWhatHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		ctx := t.Context()
		begin := time.Now()
		brief := d.make(t, admin.KeyInput{ExpiresIn: "12h"}).Key
		idle := d.make(t, admin.KeyInput{InactivityDays: new(1)}).Key
		used := d.make(t, admin.KeyInput{InactivityDays: new(1)}).Key
		revoked := d.make(t, admin.KeyInput{ExpiresIn: "1h"}).Key
		d.make(t, admin.KeyInput{})
		if _, err := d.RevokeKey(ctx, root, "a", revoked.ID, ""); err != nil {
			t.Fatal(err)
		}
		expired := func() (ids []string) {
			events, err := d.store.Events(ctx, 0, 1000)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range events {
				if e.Action != "key.expire" {
					continue
				}
				var after struct{ ExpiredBy, Status string }
				if err := json.Unmarshal(e.After, &after); err != nil || after.Status != "expired" || e.Actor != "keyward serve" || e.InstanceID != "a" {
					t.Errorf("event %s by %s, error %v", e.After, e.Actor, err)
				}
				ids = append(ids, e.Target+" "+after.ExpiredBy)
			}
			return ids
		}
		at := func(after time.Duration, want ...string) {
			t.Helper()
			time.Sleep(time.Until(begin.Add(after)))
			d.sweep(t)
			if got := expired(); !slices.Equal(got, want) {
				t.Errorf("after %v: %v have been marked, want %v", after, got, want)
			}
		}
		byTime, byIdleness := brief.ID.String()+" time", idle.ID.String()+" inactivity"
		at(12*time.Hour - time.Second)
		at(12*time.Hour+time.Second, byTime)
		d.use(t, used.ID, time.Now()) // at half a day: idle at one and a half
		// Idle after a day; but a last use may be two minutes on its way.
		at(oneDay+2*time.Minute-time.Second, byTime)
		at(oneDay+2*time.Minute+time.Second, byTime, byIdleness)
		at(oneDay+time.Hour, byTime, byIdleness) // each once
		counts, err := d.CountKeys(ctx, root, "a")
		if want := (admin.KeyCounts{Total: 5, Usable: 2, Revoked: 1, Expired: 2}); err != nil || counts != want {
			t.Errorf("got %+v and error %v, want %+v", counts, err, want)
		}
		at(2*oneDay, byTime, byIdleness, used.ID.String()+" inactivity")
	})
}

// A key that the job held for idle was in use elsewhere: when that is written down, it counts again.
func TestLateUseTakesBackTheMark(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		k := d.make(t, admin.KeyInput{InactivityDays: new(1)}).Key
		time.Sleep(oneDay + 5*time.Minute)
		d.sweep(t)
		if counts, err := d.CountKeys(t.Context(), root, "a"); err != nil || counts.Expired != 1 {
			t.Fatalf("got %+v and error %v", counts, err)
		}
		d.use(t, k.ID, time.Now().Add(-6*time.Minute))
		if counts, err := d.CountKeys(t.Context(), root, "a"); err != nil || counts.Usable != 1 {
			t.Errorf("got %+v and error %v", counts, err)
		}
		list, err := d.Keys(t.Context(), root, "a", admin.KeyQuery{KeyFilter: admin.KeyFilter{Status: "active"}, Limit: 9, Now: time.Now()})
		if err != nil || len(list) != 1 {
			t.Errorf("%d active keys, error %v", len(list), err)
		}
	})
}

func TestRevokedKeysAreRemovedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		ctx := t.Context()
		d.policy(t, "a", apikey.Policy{KeepRevoked: apikey.Duration(oneDay)})
		d.policy(t, "b", apikey.Policy{KeepRevoked: apikey.Duration(2 * oneDay)})
		here, there, stays := d.make(t, admin.KeyInput{}), d.key(t, "b"), d.make(t, admin.KeyInput{})
		for instance, made := range map[string]admin.CreatedKey{"a": here, "b": there} {
			if _, err := d.RevokeKey(ctx, root, instance, made.Key.ID, ""); err != nil {
				t.Fatal(err)
			}
		}
		found := func(made admin.CreatedKey) bool {
			_, _, err := d.store.FindKey(ctx, d.pepper.Digest(made.Secret.Reveal()))
			if err != nil && !errors.Is(err, apikey.ErrNotFound) {
				t.Fatal(err)
			}
			return err == nil
		}
		for _, c := range []struct {
			after       time.Duration
			here, there bool
		}{{oneDay - time.Minute, true, true}, {2 * time.Minute, false, true}, {oneDay - 2*time.Minute, false, true}, {2 * time.Minute, false, false}} {
			time.Sleep(c.after)
			d.sweep(t)
			if got := [...]bool{found(here), found(there), found(stays)}; got != [...]bool{c.here, c.there, true} {
				t.Errorf("after another %v: there are %v", c.after, got)
			}
		}
		actions := d.actions(t)
		if n := len(slices.DeleteFunc(actions, func(a string) bool { return a != "key.remove" })); n != 2 {
			t.Errorf("%d removals in the audit", n)
		}
	})
}

func TestSweepGoesOnAfterAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		d.make(t, admin.KeyInput{ExpiresIn: "1h"})
		var away atomic.Bool
		svc := admin.New(unsteady{d.store, &away, new(atomic.Int64), new(atomic.Int64), new(atomic.Int64)}, admin.Config{Peppers: apikey.Peppers{Current: d.pepper}}, nil, slog.New(slog.NewTextHandler(d.log, nil)))
		defer sweeping(t, svc, "one")()
		away.Store(true)
		time.Sleep(2 * time.Hour)
		away.Store(false)
		time.Sleep(2 * time.Minute)
		if got := d.actions(t); got[len(got)-1] != "key.expire" {
			t.Errorf("audit: %v", got)
		}
		if !strings.Contains(d.log.String(), "it is tried again") {
			t.Error("nobody was told")
		}
	})
}

// TestOneSweeps: of two processes one keeps house, and the other when that has ended.
func TestOneSweeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		var swept, replays, audits [2]atomic.Int64
		var stops [2]func()
		for i := range stops {
			store := unsteady{Store: d.store, away: new(atomic.Bool), asked: &swept[i], replays: &replays[i], audits: &audits[i]}
			svc := admin.New(store, admin.Config{Peppers: apikey.Peppers{Current: d.pepper}, AuditKeep: oneDay}, nil, slog.New(slog.NewTextHandler(d.log, nil)))
			stops[i] = sweeping(t, svc, fmt.Sprint("process ", i))
			time.Sleep(time.Second)
		}
		time.Sleep(10 * time.Minute)
		if first, second := swept[0].Load(), swept[1].Load(); first != 11 || second != 0 {
			t.Errorf("they swept %d and %d times in 10 minutes, want 11 and 0", first, second)
		}
		if first, second := replays[0].Load(), replays[1].Load(); first != 11 || second != 0 {
			t.Errorf("they forgot answers %d and %d times in 10 minutes, want 11 and 0", first, second)
		}
		time.Sleep(2 * time.Hour)
		if first, second := audits[0].Load(), audits[1].Load(); first != 3 || second != 0 {
			t.Errorf("they looked through the audit %d and %d times in two hours, want 3 and 0", first, second)
		}
		stops[0]()
		time.Sleep(2 * time.Minute)
		if n := swept[1].Load(); n != 2 {
			t.Errorf("the other swept %d times in the 2 minutes after, want 2", n)
		}
		if replays[1].Load() != 2 || audits[1].Load() != 1 {
			t.Errorf("the other forgot answers %d times and looked through the audit %d times", replays[1].Load(), audits[1].Load())
		}
		stops[1]()
	})
}

// unsteady is a store that is away now and then, and counts how often it was asked what is due.
type unsteady struct {
	admin.Store
	away  *atomic.Bool
	asked *atomic.Int64
	// how often the rest of the house was kept
	replays, audits *atomic.Int64
}

// ForgetReplays and AuditSegments count too: whoever does not lead does nothing of the house's.
func (u unsteady) ForgetReplays(ctx context.Context, now time.Time) error {
	u.replays.Add(1)
	return u.Store.ForgetReplays(ctx, now)
}

func (u unsteady) AuditSegments(ctx context.Context) ([]admin.AuditSegment, error) {
	u.audits.Add(1)
	return u.Store.AuditSegments(ctx)
}

func (u unsteady) DueKeys(ctx context.Context, expired, idle time.Time, limit int) ([]*apikey.Key, error) {
	u.asked.Add(1)
	if u.away.Load() {
		return nil, fmt.Errorf("gone: %w", apikey.ErrUndecided)
	}
	return u.Store.DueKeys(ctx, expired, idle, limit)
}

// TestUsesBeforeAnImportAreUnknown: what was imported today with the date on which it was made elsewhere is not
// taken for a key that nobody has used since then.
func TestUsesBeforeAnImportAreUnknown(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	rows := []admin.ImportRow{{Number: 1, Input: admin.ImportInput{
		KeyInput: admin.KeyInput{Name: "n"}, Secret: (apikey.Format{}).New(apikey.KindInstance).Reveal(), CreatedAt: "2020-01-31",
	}}}
	if done, err := d.ImportKeys(t.Context(), root, "a", rows, false); err != nil || !done.Done {
		t.Fatalf("got %+v and error %v", done, err)
	}
	unused := admin.BulkRevocation{Filter: admin.KeyListInput{UnusedFor: "90d"}}
	if done, err := d.RevokeKeys(t.Context(), root, "a", unused); err != nil || done.Count != 0 || done.Revoked != 0 {
		t.Errorf("unused for 90 days: got %+v and error %v", done, err)
	}
	_, err := d.RevokeKeys(t.Context(), root, "a", admin.BulkRevocation{All: true})
	if confirm, ok := errors.AsType[*admin.ConfirmError](err); !ok || confirm.RecentlyUsed != 1 {
		t.Errorf("all: got error %v", err)
	}
}

func TestAdvice(t *testing.T) {
	made := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name string
		key  apikey.Key
		at   time.Duration
		safe bool
		days int
		says string
	}{
		{"made just now", apikey.Key{}, 0, false, 0, "Never used in the hours since it was made, which may be too soon"},
		{"made yesterday", apikey.Key{}, oneDay, false, 1, "Never used in the 1 day since"},
		{"new", apikey.Key{}, 2 * oneDay, false, 2, "Never used in the 2 days since it was made, which may be too soon"},
		{"imported just now", apikey.Key{IdleFrom: made.Add(90 * oneDay)}, 90*oneDay + time.Hour, false, 0, "Not used in the hours since it was imported"},
		{"used yesterday", apikey.Key{LastUsedAt: made.Add(39 * oneDay)}, 40 * oneDay, false, 1, "Used 1 day ago"},
		{"never used", apikey.Key{}, 40 * oneDay, true, 40, "Never used in the 40 days"},
		{"in use", apikey.Key{LastUsedAt: made.Add(39*oneDay + time.Hour)}, 40 * oneDay, false, 0, "In use"},
		{"used last week", apikey.Key{LastUsedAt: made.Add(33 * oneDay)}, 40 * oneDay, false, 7, "Used 7 days ago"},
		{"monthly", apikey.Key{LastUsedAt: made}, 31 * oneDay, false, 31, "ask its owner"},
		{"unused", apikey.Key{LastUsedAt: made}, 90 * oneDay, true, 90, "Unused for 90 days: safe"},
		{"imported", apikey.Key{IdleFrom: made.Add(90 * oneDay)}, 92 * oneDay, false, 2, "nothing is known from before"},
		{"restored", apikey.Key{LastUsedAt: made.Add(40 * oneDay), IdleFrom: made.Add(90 * oneDay)}, 92 * oneDay, false, 2, "nothing is known from before"},
		{"imported long ago", apikey.Key{IdleFrom: made.Add(50 * oneDay)}, 90 * oneDay, true, 40, "Unused for 40 days: safe"},
		{"used since the import", apikey.Key{LastUsedAt: made.Add(80 * oneDay), IdleFrom: made.Add(50 * oneDay)}, 90 * oneDay, false, 10, "Used 10 days ago"},
		{"revoked", apikey.Key{RevokedAt: made, LastUsedAt: made}, oneDay, true, 1, "revoked"},
		{"expired", apikey.Key{ExpirationDate: made, LastUsedAt: made}, oneDay, true, 1, "expired"},
	} {
		c.key.CreatedAt = made
		got := admin.AdviceOn(&c.key, made.Add(c.at))
		if got.Safe != c.safe || got.UnusedDays != c.days || !strings.Contains(got.Text, c.says) {
			t.Errorf("%s: got %+v", c.name, got)
		}
	}
}

type noWebhook struct{}

func (noWebhook) Send(context.Context, admin.Notice) admin.WebhookAnswer {
	return admin.WebhookAnswer{}
}

// The webhook is told of each report that did something, in the transaction that did it.
func TestLeakReportsAreNoticed(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	key := d.key(t, "a")
	svc := admin.New(d.store, admin.Config{Peppers: apikey.Peppers{Current: d.pepper}, Webhook: noWebhook{}}, nil, slog.New(slog.DiscardHandler))
	stop := reporting(t, svc)
	for range 2 { // the second one finds nothing to do
		if err := svc.ReportLeaked(key.Secret, somewhere, "r"); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	due, err := d.store.DueNotices(t.Context(), time.Now().Add(time.Minute), 9)
	if err != nil || len(due) != 1 || due[0].Type != admin.NoticeLeaked {
		t.Fatalf("notices: %+v, %v", due, err)
	}
	body := string(due[0].Body)
	if !strings.Contains(body, `"leak":{"generation":1,"done":"keyRevoked"}`) || !strings.Contains(body, key.Key.ID.String()) || strings.Contains(body, key.Secret.Reveal()) {
		t.Errorf("got %s", body)
	}
}
