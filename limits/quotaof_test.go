package limits

import (
	"testing"
	"time"

	"keyward/authz/apikey"
)

func TestQuotaOf(t *testing.T) {
	for name, c := range map[string]struct {
		q     apikey.Quota
		limit int
		want  Quota
	}{
		"a window":           {apikey.Quota{Window: time.Hour, Lockout: time.Minute}, 100, Quota{Limit: 100, Window: time.Hour, Lockout: time.Minute}},
		"a day":              {apikey.Quota{Period: apikey.PeriodDay}, 100, Quota{Limit: 100, Period: Day}},
		"a month":            {apikey.Quota{Period: apikey.PeriodMonth}, 100, Quota{Limit: 100, Period: Month}},
		"smoothed, 120/60":   {apikey.Quota{Window: time.Minute, Smoothed: true, Lockout: time.Minute}, 120, Quota{Limit: 40, Window: 20 * time.Second, Lockout: time.Minute}},
		"smoothed, 100/60":   {apikey.Quota{Window: time.Minute, Smoothed: true}, 100, Quota{Limit: 33, Window: 20 * time.Second}},
		"smoothed, 1000/900": {apikey.Quota{Window: 15 * time.Minute, Smoothed: true}, 1000, Quota{Limit: 22, Window: 20 * time.Second}},
		"smoothed, 3/60":     {apikey.Quota{Window: time.Minute, Smoothed: true}, 3, Quota{Limit: 1, Window: 20 * time.Second}},
		"smoothed, 5/20":     {apikey.Quota{Window: 20 * time.Second, Smoothed: true}, 5, Quota{Limit: 5, Window: 20 * time.Second}},
		// An override from before the window grew: strict, never none.
		"smoothed, 2/60": {apikey.Quota{Window: time.Minute, Smoothed: true}, 2, Quota{Limit: 1, Window: 20 * time.Second}},
		"unlimited":      {apikey.Quota{Window: time.Minute, Lockout: time.Minute}, apikey.Unlimited, Quota{}},
	} {
		c.q.Limit = 77 // the definition's own is not looked at
		if got := QuotaOf(&c.q, c.limit); got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
}
