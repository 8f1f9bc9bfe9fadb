package limits

import "time"

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
