package limits

import (
	"time"

	"keyward/authz/apikey"
)

// A Quota is a limit over a window, ready to be judged: in any Window, or in each calendar Period, it admits
// at most Limit units. The zero Quota limits nothing.
//
// A window holds what is less than Window old: whoever spent all of it at one instant may spend again when
// exactly Window is over. Up to 1,024 units every unit counts for exactly Window. Above that, units of the
// same hundredth of the window count as if all had come with the last of them: never less than Window, and
// less than Window/100 longer.
type Quota struct {
	Limit  int64         // units, from 1
	Window time.Duration // of a sliding quota; 0: Period says it
	Period Period        // of a calendar quota
	// Lockout is how long the quota refuses everything once it has refused; 0: it has no lockout. Only the
	// limit that a refusal reports begins its lockout, and what it has counted is forgotten then. While it
	// lasts nothing is counted, and it is not extended.
	Lockout time.Duration
}

// Never is the wait of a demand that costs more than its quota's limit: it starts no lockout, which would be
// everybody's. It is too long to be waited for, and can be added to any time without overflow.
const Never = time.Duration(1 << 61)

const (
	exactUnits = 1024
	subWindows = 100
	// MaxRuns is the largest number of runs that a tally has.
	MaxRuns = exactUnits
)

// IsZero reports whether q limits nothing.
func (q Quota) IsZero() bool { return q.Limit == 0 }

// grain is how near to each other units must come to be counted as one run; 0: at the same instant.
func (q *Quota) grain() int64 {
	if q.Window == 0 || q.Limit <= exactUnits {
		return 0
	}
	return max(1, int64(q.Window/subWindows))
}

// A Period is a span of the calendar, in UTC.
type Period uint8

// The periods.
const (
	Day   Period = iota + 1
	Month        // of the calendar, not 30 days
)

// span returns when the period that holds a time began, and when it ends. Both are Unix nanoseconds by the
// wall clock.
func (p Period) span(wall int64) (begin, end int64) {
	year, month, day := time.Unix(0, wall).UTC().Date()
	from, to := time.Date(year, month, day, 0, 0, 0, 0, time.UTC), time.Date(year, month, day+1, 0, 0, 0, 0, time.UTC)
	if p != Day {
		from, to = time.Date(year, month, 1, 0, 0, 0, 0, time.UTC), time.Date(year, month+1, 1, 0, 0, 0, 0, time.UTC)
	}
	return from.UnixNano(), to.UnixNano()
}

// A QuotaDemand is one quota that a request must pass.
type QuotaDemand struct {
	Cell  Cell // of a quota's class; it does not change with the quota's numbers, so a changed quota keeps its count
	Quota Quota
	Cost  int64 // units that the request spends, from 1; below, it counts as 1
	// Shadow: judged, and spent where there is room, but it refuses nothing and begins no lockout.
	Shadow bool
}

// Units is the cost as it is judged.
func (d *QuotaDemand) Units() int64 { return max(1, d.Cost) }

// A Run is units that a quota has counted as one: all at the time of the last of them.
type Run struct {
	At    int64 // on the limiter's clock
	Units int64 // above 0
}

// Runs are the runs of a tally, the oldest first, in a ring that its user makes and may make larger.
type Runs struct {
	Ring       []Run // its length is 0 or a power of two
	First, Len int32
}

func (r *Runs) at(i int32) *Run { return &r.Ring[(r.First+i)&int32(len(r.Ring)-1)] }

// CopyTo copies the runs to the beginning of a larger ring.
func (r *Runs) CopyTo(ring []Run) Runs {
	for i := range r.Len {
		ring[i] = *r.at(i)
	}
	return Runs{Ring: ring, Len: r.Len}
}

// A Tally is what a quota has counted, beside its [Runs]. It holds no pointer. The zero Tally has counted
// nothing.
//
// Its times are nanoseconds on a clock that never goes back. A calendar's periods are those of the wall clock,
// which may: so a period that holds units is over only when both clocks say so, the other one by how long the
// period still had when its first unit came. A wall clock that jumps closes a quota for longer, at most by
// the jump, and never opens one.
//
// A quota that has changed goes on with what its cell has counted: what the old one would still count, by the
// new one's window. A calendar keeps of its units only when the last one came, so in a window they count from
// then; what a window has counted before a calendar's period began is forgotten.
type Tally struct {
	window   int64 // of the quota that judged last
	grain    int64
	ends     int64 // of a calendar's period, while it holds units
	endsWall int64 // the same by the wall clock, in Unix nanoseconds
	used     int64 // units of all runs
	locked   int64 // when the lockout ends
	period   Period
}

// Judge says for how long a demand of so many units is refused; 0: it has room. trips: it is refused because
// the quota is spent, so that this refusal begins a lockout if it is the one that is reported. Judge spends
// nothing; what no longer counts is forgotten.
func (t *Tally) Judge(runs *Runs, q *Quota, units, now, wall int64) (wait time.Duration, trips bool) {
	t.settle(runs, q, now, wall)
	if units > q.Limit {
		return Never, false
	}
	// A lockout that was shortened since is as long as a new one would be.
	t.locked = min(t.locked, now+int64(q.Lockout))
	if t.locked > now {
		wait = time.Duration(t.locked - now)
	}
	over := units - (q.Limit - t.used)
	if over <= 0 {
		return wait, false
	}
	trips = wait == 0 && q.Lockout > 0
	if q.Window == 0 {
		return max(wait, time.Duration(t.left(now, wall))), trips
	}
	for i := range runs.Len {
		run := runs.at(i)
		if over -= run.Units; over <= 0 {
			return max(wait, time.Duration(run.At+t.window-now)), trips
		}
	}
	return Never, false // no tally that Spend has made comes here
}

// Spend counts units that Judge has just found room for. The runs have room for one more.
func (t *Tally) Spend(runs *Runs, q *Quota, units, now, wall int64) {
	t.become(q)
	t.used += units
	if runs.Len > 0 {
		newest := runs.at(runs.Len - 1)
		if q.Window == 0 || t.together(newest.At, now) {
			newest.At = now
			newest.Units += units
			return
		}
	} else if q.Window == 0 {
		t.open(now, wall)
	}
	runs.Len++
	*runs.at(runs.Len - 1) = Run{At: now, Units: units}
}

// Lock begins the lockout of a quota that Judge says trips.
func (t *Tally) Lock(runs *Runs, q *Quota, now int64) {
	t.clear(runs)
	t.locked = now + int64(q.Lockout)
}

// Idle reports whether the tally says no more than a zero one.
func (t *Tally) Idle(runs *Runs, now, wall int64) bool {
	return t.locked <= now && t.resets(runs, now, wall) <= 0
}

// Long reports whether what the tally has counted, at changed last, matters for so long: a calendar's always.
func (t *Tally) Long(changed int64, d time.Duration) bool {
	return t.window == 0 || t.window >= int64(d) || t.locked-changed >= int64(d)
}

// resets is how long it takes until nothing is used; 0 or below: nothing is.
func (t *Tally) resets(runs *Runs, now, wall int64) int64 {
	switch {
	case runs.Len == 0:
		return 0
	case t.window == 0:
		return t.left(now, wall)
	}
	return runs.at(runs.Len-1).At + t.window - now
}

// Stand says where a demand's quota stands. It forgets what Judge forgets.
func (t *Tally) Stand(runs *Runs, d *QuotaDemand, now, wall int64) Standing {
	wait, trips := t.Judge(runs, &d.Quota, d.Units(), now, wall)
	s := Standing{
		Class: d.Cell.Class, Limit: d.Quota.Limit, Used: t.used, RefusesFor: wait, Shadow: d.Shadow,
		ResetsIn: time.Duration(max(0, t.resets(runs, now, wall))), LockedFor: time.Duration(max(0, t.locked-now)),
	}
	if trips && !d.Shadow {
		s.RefusesFor, s.NoRoomFor = d.Quota.Lockout, wait
	}
	if wait == 0 {
		s.Remaining = (d.Quota.Limit - t.used) / d.Units()
	}
	return s
}

// left is how long a calendar's period lasts; 0 or below: it is over by both clocks.
func (t *Tally) left(now, wall int64) int64 { return max(t.ends-now, t.endsWall-wall) }

// open begins the period that holds this time.
func (t *Tally) open(now, wall int64) {
	_, t.endsWall = t.period.span(wall)
	t.ends = now + t.endsWall - wall
}

// together reports whether two times are one to the tally.
func (t *Tally) together(a, b int64) bool {
	return a == b || t.grain > 0 && floor(a, t.grain) == floor(b, t.grain)
}

// floor divides; what was counted before the limiter's clock began has times below 0.
func floor(a, b int64) int64 {
	if a < 0 {
		return (a+1)/b - 1
	}
	return a / b
}

// become makes the tally one of a quota's.
func (t *Tally) become(q *Quota) { t.window, t.period, t.grain = int64(q.Window), q.Period, q.grain() }

func (t *Tally) clear(runs *Runs) { t.used, runs.First, runs.Len = 0, 0, 0 }

// forget drops what no longer counts.
func (t *Tally) forget(runs *Runs, now, wall int64) {
	if t.window == 0 {
		if t.left(now, wall) <= 0 {
			t.clear(runs)
		}
		return
	}
	t.dropUntil(runs, now-t.window)
}

// dropUntil drops the runs up to a time.
func (t *Tally) dropUntil(runs *Runs, until int64) {
	for runs.Len > 0 && runs.at(0).At <= until {
		t.used -= runs.at(0).Units
		runs.First = (runs.First + 1) & int32(len(runs.Ring)-1)
		runs.Len--
	}
}

// settle forgets what no longer counts, and makes the tally that of a quota that has changed since.
func (t *Tally) settle(runs *Runs, q *Quota, now, wall int64) {
	t.forget(runs, now, wall)
	if t.window == int64(q.Window) && t.grain == q.grain() && (t.window > 0 || t.period == q.Period) {
		return
	}
	t.become(q)
	if q.Window > 0 {
		t.forget(runs, now, wall)
		if t.grain > 0 {
			t.join(runs, t.together)
		}
		return
	}
	begin, _ := t.period.span(wall)
	t.dropUntil(runs, now-(wall-begin)-1)
	t.join(runs, func(int64, int64) bool { return true })
	t.open(now, wall)
}

// join makes one run of neighbours that are together.
func (t *Tally) join(runs *Runs, together func(a, b int64) bool) {
	if runs.Len == 0 {
		return
	}
	last := int32(0)
	for i := int32(1); i < runs.Len; i++ {
		run, into := *runs.at(i), runs.at(last)
		if together(into.At, run.At) {
			into.At, into.Units = run.At, into.Units+run.Units
		} else {
			last++
			*runs.at(last) = run
		}
	}
	runs.Len = last + 1
}

// A Standing is where one limit of a demand stands, for whoever looks.
type Standing struct {
	Class     Class
	Quota     int           // position in Demand.Quotas, for the classes of quotas
	Limit     int64         // burst, units or leases
	Used      int64         // of a rate: how far from full the bucket is, in requests, rounded up
	Remaining int64         // requests of the demand's cost that would pass now
	ResetsIn  time.Duration // until nothing is used, if nobody comes; 0: nothing is used. Of leases always 0: nobody knows
	LockedFor time.Duration // 0: not locked
	// RefusesFor is how long the demand, if it came now, would wait for this limit: for the lockout that it
	// would begin, or until there is room. Of leases, a hint. 0: it has room.
	RefusesFor time.Duration
	// NoRoomFor is how long it would wait without the lockout, where RefusesFor is one that it would begin;
	// otherwise 0.
	NoRoomFor time.Duration
	Shadow    bool
}

// waits is how long there is no room, whatever lockout the demand would begin.
func (s *Standing) waits() time.Duration {
	if s.NoRoomFor > 0 {
		return s.NoRoomFor
	}
	return s.RefusesFor
}

// Judge says what a demand would be answered whose limits stand so, if it came now and did not wait for a
// lease. It is how Limiter.Take judges, on what Limiter.Look has seen. Quota is that of the standing.
func Judge(standings []Standing) (d Decision) {
	longest, own, reported := time.Duration(0), time.Duration(0), -1
	for i := range standings {
		s := &standings[i]
		switch refuses := max(s.waits(), s.RefusesFor); {
		case refuses <= 0:
		case s.Shadow:
			d.Shadowed |= 1 << s.Class
		case refuses > longest || refuses == longest && s.Class < standings[reported].Class:
			longest, own, reported = refuses, s.RefusesFor, i
		}
	}
	if d.Allowed = reported < 0; d.Allowed {
		return d
	}
	d.Class, d.Quota, d.RetryAfter = standings[reported].Class, standings[reported].Quota, own
	for i := range standings {
		if s := &standings[i]; i != reported && !s.Shadow {
			d.RetryAfter = max(d.RetryAfter, s.waits())
		}
	}
	return d
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

// Stand says where a rate stands whose bucket will next be full at time full.
func (d *RateDemand) Stand(full, now int64) Standing {
	r := d.Rate
	clamped, wait := r.Take(full, now)
	if wait == 0 {
		clamped -= int64(r.Interval)
	}
	left := r.Left(full, now)
	return Standing{
		Class: d.Cell.Class, Limit: r.Burst, Used: r.Burst - left, Remaining: left,
		ResetsIn: time.Duration(clamped - now), RefusesFor: wait, Shadow: d.Shadow,
	}
}
