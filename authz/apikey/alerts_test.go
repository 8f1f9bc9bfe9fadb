package apikey_test

import (
	"errors"
	"testing"
	"time"

	"keyward/authz/apikey"
)

func TestAlertsValidate(t *testing.T) {
	for _, test := range []struct {
		field string // "": it is fine
		apikey.Alerts
	}{
		{"", apikey.Alerts{}},
		{"", apikey.ShippedAlerts},
		{"", apikey.Alerts{Expiring: apikey.ExpiringKeyAlerts{Days: []int{365, 30, 7, 2, 1}}}},
		{"alerts.refusals.window", apikey.Alerts{Refusals: apikey.RefusalAlerts{Window: apikey.Duration(30 * time.Second)}}},
		{"alerts.refusals.window", apikey.Alerts{Refusals: apikey.RefusalAlerts{Window: apikey.Duration(90 * time.Second)}}},
		{"alerts.refusals.window", apikey.Alerts{Refusals: apikey.RefusalAlerts{Window: apikey.Duration(2 * time.Hour)}}},
		{"alerts.refusals.window", apikey.Alerts{Refusals: apikey.RefusalAlerts{Window: apikey.Duration(-time.Minute)}}},
		{"alerts.refusals.perKey", apikey.Alerts{Refusals: apikey.RefusalAlerts{PerKey: -1}}},
		{"alerts.refusals.perInstance", apikey.Alerts{Refusals: apikey.RefusalAlerts{PerInstance: 2_000_000_000}}},
		{"alerts.refusals.factor", apikey.Alerts{Refusals: apikey.RefusalAlerts{Factor: 1001}}},
		{"alerts.unknownKeys.perMinute", apikey.Alerts{UnknownKeys: apikey.UnknownKeyAlerts{PerMinute: -1}}},
		{"alerts.expiring.days", apikey.Alerts{Expiring: apikey.ExpiringKeyAlerts{Days: []int{1, 3}}}},
		{"alerts.expiring.days", apikey.Alerts{Expiring: apikey.ExpiringKeyAlerts{Days: []int{3, 3}}}},
		{"alerts.expiring.days", apikey.Alerts{Expiring: apikey.ExpiringKeyAlerts{Days: []int{3, 0}}}},
		{"alerts.expiring.days", apikey.Alerts{Expiring: apikey.ExpiringKeyAlerts{Days: []int{366}}}},
		{"alerts.expiring.days", apikey.Alerts{Expiring: apikey.ExpiringKeyAlerts{Days: []int{6, 5, 4, 3, 2, 1}}}},
		{"alerts.unused.idleDays", apikey.Alerts{Unused: apikey.UnusedKeyAlerts{IdleDays: 366}}},
		{"alerts.unused.neverUsedDays", apikey.Alerts{Unused: apikey.UnusedKeyAlerts{NeverUsedDays: -1}}},
	} {
		policy := apikey.Policy{Alerts: test.Alerts}
		err := policy.Validate()
		bad, _ := errors.AsType[*apikey.InvalidError](err)
		if test.field == "" && err != nil || test.field != "" && (bad == nil || bad.Field != test.field) {
			t.Errorf("%+v: got %v, want an error about %q", test.Alerts, err, test.field)
		}
	}
}
