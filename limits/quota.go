package limits

import (
	"time"

	"keyward/authz/apikey"
)

// A Quota is a limit over a window, ready to be judged: in any Window, or in each calendar Period, it admits
// at most Limit units. The zero Quota limits nothing.
type Quota struct {
	Limit  int64         // units, from 1
	Window time.Duration // of a sliding quota; 0: Period says it
	Period Period        // of a calendar quota
	// Lockout is how long the quota refuses everything once it has refused; 0: it has no lockout.
	Lockout time.Duration
}

// IsZero reports whether q limits nothing.
func (q Quota) IsZero() bool { return q.Limit == 0 }

// A Period is a span of the calendar, in UTC.
type Period uint8

// The periods.
const (
	Day   Period = iota + 1
	Month        // of the calendar, not 30 days
)

// A QuotaDemand is one quota that a request must pass.
type QuotaDemand struct {
	Cell  Cell // of a quota's class; it does not change with the quota's numbers, so a changed quota keeps its count
	Quota Quota
	Cost  int64 // units that the request spends, from 1
	// Shadow: judged and counted, but it refuses nothing.
	Shadow bool
}

// A QuotaState is what a long quota has counted, for whoever keeps it over a restart. Its Counts are the
// limiter's own business.
type QuotaState struct {
	Cell   Cell
	Until  time.Time // the state says nothing more after that
	Counts []byte
}

// A Standing is where one limit of a demand stands, for whoever looks.
type Standing struct {
	Class     Class
	Quota     int           // position in Demand.Quotas, for the classes of quotas
	Limit     int64         // burst, units or leases
	Used      int64         // of a rate: how far from full the bucket is, in requests, rounded up
	Remaining int64         // requests of the demand's cost that would pass now
	ResetsIn  time.Duration // until nothing is used, if nobody comes; 0: nothing is used
	LockedFor time.Duration // 0: not locked
	// RefusesFor is how long the demand would wait for this limit; 0: it has room.
	RefusesFor time.Duration
	Shadow     bool
}

// QuotaOf returns a definition as it is judged, with limit in place of its own: what [apikey.Quota.LimitOf]
// says. The zero Quota for a limit that is unlimited.
//
// A smoothed quota is judged over 20 s, with a whole share of its limit: limit / (window / 20 s), rounded
// down as FoundationaLLM does, so 100 a minute is 33 in any 20 s. The share is never 0, which would be no
// limit: an override may be from before the window grew.
func QuotaOf(q *apikey.Quota, limit int) Quota {
	if limit <= 0 {
		return Quota{}
	}
	of := Quota{Limit: int64(limit), Window: q.Window, Lockout: q.Lockout}
	switch {
	case q.Period == apikey.PeriodDay:
		of.Period = Day
	case q.Period == apikey.PeriodMonth:
		of.Period = Month
	case q.Smoothed:
		of.Limit = max(1, int64(limit)/int64(q.LeastLimit()))
		of.Window = apikey.SmoothedWindow
	}
	return of
}
