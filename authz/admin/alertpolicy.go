package admin

import (
	"slices"

	"keyward/authz/apikey"
)

// AlertsInput says what is worth an alert, as people write it: an absent field is as shipped.
type AlertsInput struct {
	NewNetwork  apikey.NewNetworkAlerts `json:"newNetwork,omitzero" doc:"A key is used from a network that it was never used from."`
	Refusals    RefusalAlertsInput      `json:"refusals,omitzero" doc:"A key, or the instance, is refused far more than it was."`
	UnknownKeys UnknownKeyAlertsInput   `json:"unknownKeys,omitzero" doc:"Somebody tries secrets that are no key's."`
	Expiring    ExpiringAlertsInput     `json:"expiring,omitzero" doc:"A key that is in use expires soon."`
	Unused      UnusedAlertsInput       `json:"unused,omitzero" doc:"A key is idle, or was never used."`
}

// RefusalAlertsInput is [apikey.RefusalAlerts] as people write it.
type RefusalAlertsInput struct {
	Disabled    bool   `json:"disabled,omitempty"`
	Window      string `json:"window,omitempty" doc:"What is counted, in whole minutes from 1m to 1h. As shipped: 5m."`
	PerKey      *int   `json:"perKey,omitempty" minimum:"1" doc:"Refusals of a key within the window, at least. As shipped: 100."`
	PerInstance *int   `json:"perInstance,omitempty" minimum:"1" doc:"The same of the whole instance. As shipped: 500."`
	Factor      *int   `json:"factor,omitempty" minimum:"1" maximum:"1000" doc:"And this many times what an average window had before. As shipped: 5."`
}

// UnknownKeyAlertsInput is [apikey.UnknownKeyAlerts] as people write it.
type UnknownKeyAlertsInput struct {
	Disabled  bool `json:"disabled,omitempty"`
	PerMinute *int `json:"perMinute,omitempty" minimum:"1" doc:"At least. As shipped: 100."`
}

// ExpiringAlertsInput is [apikey.ExpiringKeyAlerts] as people write it.
type ExpiringAlertsInput struct {
	Disabled bool  `json:"disabled,omitempty"`
	Days     []int `json:"days,omitzero" strict:"notnull" nullable:"false" minItems:"1" maxItems:"5" doc:"Before the end, falling, each an alert of its own. As shipped: 14, 3, 1."`
}

// UnusedAlertsInput is [apikey.UnusedKeyAlerts] as people write it.
type UnusedAlertsInput struct {
	Disabled      bool `json:"disabled,omitempty"`
	IdleDays      *int `json:"idleDays,omitempty" minimum:"1" maximum:"365" doc:"Since the last use. As shipped: 60."`
	NeverUsedDays *int `json:"neverUsedDays,omitempty" minimum:"1" maximum:"365" doc:"Since it was made, imported or restored. As shipped: 14."`
}

// alerts checks in and returns what it describes. Errors: *apikey.InvalidError, several joined.
func (in *AlertsInput) alerts(field string) (apikey.Alerts, error) {
	a := apikey.Alerts{
		NewNetwork: in.NewNetwork, Refusals: apikey.RefusalAlerts{Disabled: in.Refusals.Disabled}, UnknownKeys: apikey.UnknownKeyAlerts{Disabled: in.UnknownKeys.Disabled},
		Expiring: apikey.ExpiringKeyAlerts{Disabled: in.Expiring.Disabled, Days: slices.Clone(in.Expiring.Days)}, Unused: apikey.UnusedKeyAlerts{Disabled: in.Unused.Disabled},
	}
	var bad faults
	for _, n := range []struct {
		field string
		from  *int
		to    *int
	}{
		{"refusals.perKey", in.Refusals.PerKey, &a.Refusals.PerKey},
		{"refusals.perInstance", in.Refusals.PerInstance, &a.Refusals.PerInstance},
		{"refusals.factor", in.Refusals.Factor, &a.Refusals.Factor},
		{"unknownKeys.perMinute", in.UnknownKeys.PerMinute, &a.UnknownKeys.PerMinute},
		{"unused.idleDays", in.Unused.IdleDays, &a.Unused.IdleDays},
		{"unused.neverUsedDays", in.Unused.NeverUsedDays, &a.Unused.NeverUsedDays},
	} {
		switch {
		case n.from == nil:
		case *n.from == 0:
			bad.add(apikey.Invalid(field+"."+n.field, "must not be 0: leave it out for what is shipped, or say disabled: true"))
		default:
			*n.to = *n.from
		}
	}
	if in.Refusals.Window != "" {
		var err error
		a.Refusals.Window, err = apikey.ParseDuration(in.Refusals.Window)
		if err == nil && a.Refusals.Window == 0 {
			err = apikey.Invalid("", "must not be 0: leave it out for what is shipped")
		}
		bad.add(under(field+".refusals.window", err))
	}
	if in.Expiring.Days != nil && len(in.Expiring.Days) == 0 {
		bad.add(apikey.Invalid(field+".expiring.days", "must not be empty: leave it out for what is shipped, or say disabled: true"))
	}
	if bad == nil {
		bad.add(under(field, a.Validate()))
	}
	return a, bad.err()
}
