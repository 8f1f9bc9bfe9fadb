package admin_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
)

// Whether a key's holders have changed to its new secret can be seen.
func TestAdviceTellsWhatWasCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		id := d.key(t, "a").Key.ID
		advice := func() admin.Advice {
			t.Helper()
			a, err := d.KeyAdvice(t.Context(), root, "a", id)
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		count := func(c admin.UsageCounts) {
			t.Helper()
			if err := d.store.AddUsage(t.Context(), admin.UsageBatch{}, []admin.Usage{{InstanceID: "a", KeyID: id, Start: time.Now(), UsageCounts: c}}); err != nil {
				t.Fatal(err)
			}
		}
		count(admin.UsageCounts{Refused: 7, Reasons: map[string]int64{"limit_burst": 7}})
		if got := advice(); got.Usage != nil {
			t.Errorf("nothing was allowed, but: %+v", got.Usage)
		}
		count(admin.UsageCounts{Allowed: 40, Generations: map[int]int64{1: 40}, Networks: map[string]int64{"192.0.2.0/24": 30, "198.51.100.0/24": 9, admin.OtherNetworks: 1}})
		want := &admin.UsageAdvice{Requests: 40, PerDay: 40, Networks: 2, Generations: []admin.GenerationUse{{Number: 1, LastHour: 40}}}
		if diff := cmp.Diff(want, advice().Usage); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}

		time.Sleep(3*24*time.Hour + 2*time.Hour)
		if _, err := d.RotateKey(t.Context(), root, "a", id, admin.RotateInput{GracePeriod: "2h"}, 0); err != nil {
			t.Fatal(err)
		}
		until := time.Now().Add(2 * time.Hour).UTC()
		count(admin.UsageCounts{Allowed: 3, Generations: map[int]int64{1: 2, 2: 1}, Networks: map[string]int64{"192.0.2.0/24": 3}})
		got := advice()
		want = &admin.UsageAdvice{
			Requests: 43, PerDay: 43.0 / 4, Networks: 2, OldInUse: true,
			Generations: []admin.GenerationUse{{Number: 1, LastHour: 2, ValidUntil: until}, {Number: 2, LastHour: 1}},
		}
		if diff := cmp.Diff(want, got.Usage); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		if want := "The secret with the number 1 is still in use: requests within the last hour: 2. It ends in 2h"; !strings.Contains(got.Text, want) {
			t.Errorf("got %q, want %q", got.Text, want)
		}

		// Nobody uses it any more.
		time.Sleep(61 * time.Minute)
		count(admin.UsageCounts{Allowed: 1, Generations: map[int]int64{2: 1}})
		got = advice()
		if got.Usage.OldInUse || strings.Contains(got.Text, "still in use") || fmt.Sprint(got.Usage.Generations[0].LastHour, got.Usage.Generations[1].LastHour) != "0 1" {
			t.Errorf("got %q, %+v", got.Text, got.Usage)
		}

		time.Sleep(31 * 24 * time.Hour)
		if got := advice(); got.Usage != nil {
			t.Errorf("too long ago: %+v", got.Usage)
		}
	})
}
