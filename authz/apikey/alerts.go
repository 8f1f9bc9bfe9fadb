package apikey

import (
	"cmp"
	"slices"
	"time"
)

// Alerts say what is worth an alert in an instance. Every field's zero value inherits from [ShippedPolicy].
type Alerts struct {
	NewNetwork  NewNetworkAlerts  `json:"newNetwork,omitzero"`
	Refusals    RefusalAlerts     `json:"refusals,omitzero"`
	UnknownKeys UnknownKeyAlerts  `json:"unknownKeys,omitzero"`
	Expiring    ExpiringKeyAlerts `json:"expiring,omitzero"`
	Unused      UnusedKeyAlerts   `json:"unused,omitzero"`
}

// NewNetworkAlerts are about keys that are used from a network that they were never used from.
type NewNetworkAlerts struct {
	Disabled bool `json:"disabled,omitempty"`
}

// RefusalAlerts are about far more refusals than usual: at least PerKey of a key (PerInstance of the instance) within
// Window, and at least Factor times as many as within an average Window of those before.
type RefusalAlerts struct {
	Disabled    bool     `json:"disabled,omitempty"`
	Window      Duration `json:"window,omitempty"` // whole minutes
	PerKey      int      `json:"perKey,omitempty"`
	PerInstance int      `json:"perInstance,omitempty"`
	Factor      int      `json:"factor,omitempty"`
}

// UnknownKeyAlerts are about secrets that are no key's.
type UnknownKeyAlerts struct {
	Disabled  bool `json:"disabled,omitempty"`
	PerMinute int  `json:"perMinute,omitempty"` // at least
}

// ExpiringKeyAlerts are about keys that are in use and expire soon.
type ExpiringKeyAlerts struct {
	Disabled bool  `json:"disabled,omitempty"`
	Days     []int `json:"days,omitempty"` // before the end, falling; each is an alert of its own
}

// UnusedKeyAlerts are about keys that nobody seems to need.
type UnusedKeyAlerts struct {
	Disabled      bool `json:"disabled,omitempty"`
	IdleDays      int  `json:"idleDays,omitempty"`      // since the last use
	NeverUsedDays int  `json:"neverUsedDays,omitempty"` // since it was made, imported or restored
}

// ShippedAlerts hold where an instance's policy says nothing.
var ShippedAlerts = Alerts{
	Refusals:    RefusalAlerts{Window: Duration(5 * time.Minute), PerKey: 100, PerInstance: 500, Factor: 5},
	UnknownKeys: UnknownKeyAlerts{PerMinute: 100},
	Expiring:    ExpiringKeyAlerts{Days: []int{14, 3, 1}},
	Unused:      UnusedKeyAlerts{IdleDays: 60, NeverUsedDays: 14},
}

// InForce returns a with what it does not say taken from [ShippedAlerts].
func (a Alerts) InForce() Alerts {
	s := &ShippedAlerts
	a.Refusals = RefusalAlerts{
		Disabled: a.Refusals.Disabled, Window: cmp.Or(a.Refusals.Window, s.Refusals.Window), PerKey: cmp.Or(a.Refusals.PerKey, s.Refusals.PerKey),
		PerInstance: cmp.Or(a.Refusals.PerInstance, s.Refusals.PerInstance), Factor: cmp.Or(a.Refusals.Factor, s.Refusals.Factor),
	}
	a.UnknownKeys.PerMinute = cmp.Or(a.UnknownKeys.PerMinute, s.UnknownKeys.PerMinute)
	if len(a.Expiring.Days) == 0 {
		a.Expiring.Days = slices.Clone(s.Expiring.Days)
	}
	a.Unused.IdleDays = cmp.Or(a.Unused.IdleDays, s.Unused.IdleDays)
	a.Unused.NeverUsedDays = cmp.Or(a.Unused.NeverUsedDays, s.Unused.NeverUsedDays)
	return a
}

const (
	minAlertWindow = time.Minute
	maxAlertWindow = time.Hour
	maxAlertCount  = 1_000_000_000
	maxAlertFactor = 1000
	maxAlertDays   = 365
	maxAlertStages = 5
)

// Validate reports the first field that cannot be meant.
func (a *Alerts) Validate() error {
	w := a.Refusals.Window.Std()
	if w != 0 && (w < minAlertWindow || w > maxAlertWindow || w%time.Minute != 0) {
		return Invalid("refusals.window", "must be whole minutes from 1m to 1h")
	}
	for _, n := range []struct {
		field string
		n     int
		max   int
		text  string
	}{
		{"refusals.perKey", a.Refusals.PerKey, maxAlertCount, "must be from 1 to 1000000000"},
		{"refusals.perInstance", a.Refusals.PerInstance, maxAlertCount, "must be from 1 to 1000000000"},
		{"refusals.factor", a.Refusals.Factor, maxAlertFactor, "must be from 1 to 1000"},
		{"unknownKeys.perMinute", a.UnknownKeys.PerMinute, maxAlertCount, "must be from 1 to 1000000000"},
		{"unused.idleDays", a.Unused.IdleDays, maxAlertDays, "must be from 1 to 365"},
		{"unused.neverUsedDays", a.Unused.NeverUsedDays, maxAlertDays, "must be from 1 to 365"},
	} {
		if n.n < 0 || n.n > n.max { // 0 inherits
			return Invalid(n.field, n.text)
		}
	}
	days := a.Expiring.Days
	if len(days) > maxAlertStages {
		return Invalid("expiring.days", "must be at most 5 numbers")
	}
	for i, d := range days {
		if d < 1 || d > maxAlertDays || i > 0 && d >= days[i-1] {
			return Invalid("expiring.days", "must be numbers from 365 to 1, each smaller than the one before")
		}
	}
	return nil
}
