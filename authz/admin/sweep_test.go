package admin_test

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// Counts are kept as long as is said of each interval, and removed within the hour after that.
func TestSweepForgetsOldUsage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		svc := admin.New(d.store, admin.Config{Peppers: apikey.Peppers{Current: d.pepper}, UsageKeep: map[admin.UsageInterval]time.Duration{
			admin.UsageMinute: 2 * time.Hour, admin.UsageHour: 26 * time.Hour,
		}}, nil, slog.New(slog.NewTextHandler(d.log, nil)))
		begin := time.Now()
		if err := d.store.AddUsage(t.Context(), admin.UsageBatch{}, []admin.Usage{{InstanceID: "a", Start: begin, UsageCounts: admin.UsageCounts{Allowed: 1}}}); err != nil {
			t.Fatal(err)
		}
		defer sweeping(t, svc, "one")()
		want := func(after time.Duration, want ...int) { // rows of minutes, hours and days
			t.Helper()
			time.Sleep(time.Until(begin.Add(after)))
			synctest.Wait()
			var got []int
			for _, interval := range admin.UsageIntervals() {
				rows, err := d.store.Usage(t.Context(), admin.UsageQuery{
					InstanceID: "a", Interval: interval, From: begin.Add(-24 * time.Hour), To: time.Now().Add(time.Hour),
				})
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, len(rows))
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got)\n%s", fmt.Sprint(after), diff)
			}
		}
		want(time.Hour+30*time.Minute, 1, 1, 1)
		want(3*time.Hour+30*time.Minute, 0, 1, 1)
		want(25*time.Hour+30*time.Minute, 0, 1, 1)
		want(27*time.Hour+30*time.Minute, 0, 0, 1) // of days nothing is said
	})
}

// What is left of deleted instances is removed within the hour, also where counts are kept for ever.
func TestSweepForgetsDeletedInstances(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		store := &tidied{Store: d.store}
		svc := admin.New(store, admin.Config{Peppers: apikey.Peppers{Current: d.pepper}}, nil, slog.New(slog.NewTextHandler(d.log, nil)))
		defer sweeping(t, svc, "one")()
		time.Sleep(150 * time.Minute)
		synctest.Wait()
		if n := store.times.Load(); n != 3 {
			t.Errorf("%d times within two and a half hours, want at the start and each hour", n)
		}
	})
}

// tidied counts how often what is left of deleted instances is removed.
type tidied struct {
	admin.Store
	times atomic.Int64
}

func (s *tidied) ForgetDeleted(ctx context.Context) error {
	s.times.Add(1)
	return s.Store.ForgetDeleted(ctx)
}
