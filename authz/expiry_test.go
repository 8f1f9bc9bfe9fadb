package authz_test

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/storetest"
	"keyward/authz/usage"
	"keyward/cache"
	"keyward/limits/local"
)

const (
	// lag is by how much a last use that is written down, or judged by, may be behind.
	lag = time.Minute
	// agingPoll is how soon a replica learns what the other one did: in days of virtual time every poll costs.
	agingPoll = 5 * time.Minute
)

// A using is a replica that notes uses as serve does, and judges idleness by what it noted and by what is
// written.
type using struct {
	*replica
	end func() // ends the noting, with what waits to be written written
}

// aging is a house of two replicas on one store.
func aging(t *testing.T) (a, b *using) {
	t.Helper()
	store := storetest.NewMemory(auditKeys)
	h := newHouse(t, store, cache.Config{Records: 20, Unknown: 20, Poll: agingPoll, Lease: 2 * agingPoll}, nil, store, store)
	uses := func(r *replica) *using {
		noted := usage.NewCounter(store, usage.Config{}, nil, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(context.Background())
		var run sync.WaitGroup
		run.Go(func() { _ = noted.Run(ctx) })
		u := &using{r, func() { cancel(); run.Wait() }}
		t.Cleanup(u.end)
		lastUsed := func(ctx context.Context, id apikey.ID) (time.Time, error) {
			written, err := store.LastUsed(ctx, id)
			if waits := noted.Pending(id); waits.After(written) {
				written = waits
			}
			return written, err
		}
		var err error
		if r.Authorizer, err = authz.New(authz.Config{}, facts{r.cache, lastUsed}, local.New(local.Config{}, nil), h.peppers, noted, nobody{}); err != nil {
			t.Fatal(err)
		}
		return u
	}
	a, b = uses(h.replicas[0]), uses(h.replicas[1])
	if _, err := a.service.PutInstance(t.Context(), owner, "home", unbounded(apikey.Policy{})); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// key makes a key and waits until both replicas know.
func (u *using) key(t *testing.T, in admin.KeyInput) admin.CreatedKey {
	t.Helper()
	in.Name, in.Limits = "n", unlimited
	made, err := u.service.CreateKey(t.Context(), owner, "home", in)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(agingPoll)
	return made
}

// wants asks a replica, which has to answer so.
func (u *using) wants(t *testing.T, secret apikey.Secret, want authz.Reason, when string) {
	t.Helper()
	r := asking(secret)
	var d authz.Decision
	if err := ask(t.Context(), u.Authorizer, &r, &d); err != nil || d.Reason != want {
		t.Errorf("%s: got %v, %v, want %v", when, d.Reason, err, want)
	}
}

// TestExpiresByTime: valid while now ≤ expiry, refused next, on a replica that has the key cached and on one
// that never saw it; a bare date is its end in UTC.
func TestExpiresByTime(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		in  admin.KeyInput
		end time.Duration // from the beginning of a bubble, midnight in UTC
	}{
		"a bare date":                {admin.KeyInput{ExpirationDate: "2000-01-01"}, 24*time.Hour - time.Microsecond},
		"an instant in another zone": {admin.KeyInput{ExpirationDate: "2000-01-01T09:30:00+05:30"}, 4 * time.Hour},
		"a duration":                 {admin.KeyInput{ExpiresIn: "3h"}, 3 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				midnight := time.Now()
				a, b := aging(t)
				late := time.Since(midnight)
				made := a.key(t, tt.in)
				end := made.Key.ExpirationDate
				if got := end.Sub(midnight); got != tt.end && (tt.in.ExpiresIn == "" || got != tt.end+late) {
					t.Errorf("it ends after %v, want %v", got, tt.end)
				}
				a.wants(t, made.Secret, authz.ReasonKey, "new")
				time.Sleep(time.Until(end))
				a.wants(t, made.Secret, authz.ReasonKey, "as it ends, cached")
				time.Sleep(time.Nanosecond)
				a.wants(t, made.Secret, authz.ReasonExpired, "next, cached")
				b.wants(t, made.Secret, authz.ReasonExpired, "next, never seen")
			})
		})
	}
}

// TestExpiresByInactivity: from the last allowed use, on whichever replica that was.
func TestExpiresByInactivity(t *testing.T) {
	t.Parallel()
	const idle = 24 * time.Hour
	synctest.Test(t, func(t *testing.T) {
		a, b := aging(t)
		k := a.key(t, admin.KeyInput{InactivityDays: new(1)})
		unused := a.key(t, admin.KeyInput{InactivityDays: new(1)})
		disabled := func(yes bool) {
			t.Helper()
			if _, err := a.service.UpdateKey(t.Context(), owner, "home", k.Key.ID, admin.KeyPatch{Disabled: admin.To(yes)}, 0); err != nil {
				t.Fatal(err)
			}
			time.Sleep(agingPoll)
		}
		// Both have it cached, and only one of them is asked for a day.
		b.wants(t, k.Secret, authz.ReasonKey, "new")
		time.Sleep(idle - time.Second)
		a.wants(t, k.Secret, authz.ReasonKey, "in its last seconds")
		time.Sleep(lag)
		b.wants(t, k.Secret, authz.ReasonKey, "on a replica that did not serve it for a day")
		// That was a use. The next is as late as it can be.
		used := time.Now()
		time.Sleep(time.Until(used.Add(idle)))
		b.wants(t, k.Secret, authz.ReasonKey, "as it becomes idle")
		used = time.Now()

		// Refused attempts, for whatever reason, are no uses.
		disabled(true)
		time.Sleep(idle / 2)
		a.wants(t, k.Secret, authz.ReasonDisabled, "disabled")
		b.wants(t, k.Secret, authz.ReasonDisabled, "disabled")
		disabled(false)
		time.Sleep(time.Until(used.Add(idle + time.Nanosecond)))
		for _, u := range []*using{a, b, a, b} {
			u.wants(t, k.Secret, authz.ReasonIdle, "idle")
			u.wants(t, unused.Secret, authz.ReasonIdle, "never used")
			time.Sleep(lag)
		}
		got, err := a.service.Key(t.Context(), owner, "home", k.Key.ID)
		if err != nil || !got.LastUsedAt.Equal(used) {
			t.Errorf("last used %v, %v, want %v", got.LastUsedAt, err, used)
		}
		if got := got.StatusAt(time.Now()); got != apikey.StatusIdle {
			t.Errorf("the record says %s", got)
		}
	})
}

// TestIdleNoEarlierThanTheLag: a use that another replica has not heard of may cost a key its last moments
// there, and no more: not longer than uses wait to be written, and never what is written when the replica
// that noted it ends.
func TestIdleNoEarlierThanTheLag(t *testing.T) {
	t.Parallel()
	const idle = 24 * time.Hour
	for name, leaves := range map[string]bool{"both go on": false, "the one that served it ends": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := aging(t)
				k := a.key(t, admin.KeyInput{InactivityDays: new(1)})
				b.wants(t, k.Secret, authz.ReasonKey, "new")
				time.Sleep(idle - time.Second)
				a.wants(t, k.Secret, authz.ReasonKey, "in its last second")
				if leaves {
					a.end()
				}
				time.Sleep(2 * time.Second)
				if !leaves {
					a.wants(t, k.Secret, authz.ReasonKey, "where it was used")
					time.Sleep(lag)
				}
				b.wants(t, k.Secret, authz.ReasonKey, "elsewhere, when it is written")
			})
		})
	}
}
