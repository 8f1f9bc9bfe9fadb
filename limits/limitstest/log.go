package limitstest

import (
	"slices"
	"time"

	"keyward/limits"
)

// A Log is what a quota has admitted, unit by unit: the oracle for quotas of up to 1,024 units, written from
// what a quota promises and not from how package limits keeps it. Its times are nanoseconds on a clock of its
// user's, and never go back; the wall clock goes with it. Not safe for concurrent use.
type Log struct {
	quota  limits.Quota // that was judged last
	units  []int64      // when each came, the oldest first
	locked int64        // until when

	mistake string // see the tests
}

// began returns when a calendar quota's period that holds now began, and when it ends.
func began(p limits.Period, now int64, wall time.Time) (begin, end int64) {
	y, m, d := wall.UTC().Date()
	from, to := time.Date(y, m, d, 0, 0, 0, 0, time.UTC), time.Date(y, m, d+1, 0, 0, 0, 0, time.UTC)
	if p == limits.Month {
		from, to = time.Date(y, m, 1, 0, 0, 0, 0, time.UTC), time.Date(y, m+1, 1, 0, 0, 0, 0, time.UTC)
	}
	return now - int64(wall.Sub(from)), now + int64(to.Sub(wall))
}

// forget drops the units that a quota no longer counts.
func (o *Log) forget(q limits.Quota, now int64, wall time.Time) {
	if q.IsZero() {
		return
	}
	o.units = slices.DeleteFunc(o.units, func(at int64) bool {
		if q.Window > 0 {
			if o.mistake == windowClosed {
				return at+int64(q.Window) < now
			}
			return at+int64(q.Window) <= now
		}
		if o.mistake == calendarSlides {
			return at+int64(24*time.Hour) <= now
		}
		begin, _ := began(q.Period, now, wall)
		return at < begin
	})
}

// Wait returns how long the quota refuses units that come now, as if it would refuse nothing for having
// refused; and for how long it refuses them if this refusal begins its lockout, 0 if it would not.
func (o *Log) Wait(q limits.Quota, units, now int64, wall time.Time) (wait, lockout time.Duration) {
	o.forget(o.quota, now, wall)
	if o.mistake == changeForgets && q != o.quota {
		o.units = nil
	}
	if n := len(o.units); n > 0 && o.quota.Window == 0 && o.mistake != calendarKeepsAll {
		for i := range o.units {
			o.units[i] = o.units[n-1]
		}
	}
	if o.mistake != changeIgnored || o.quota.IsZero() {
		o.quota = q
	} else {
		q = o.quota
	}
	o.forget(q, now, wall)
	if units > q.Limit {
		if o.mistake == neverLocks {
			return limits.Never, q.Lockout
		}
		return limits.Never, 0
	}
	o.locked = min(o.locked, now+int64(q.Lockout))
	wait = time.Duration(max(0, o.locked-now))
	locked := wait > 0
	for n := 0; int64(len(o.units)-n)+units > q.Limit; {
		// Waits for the oldest of those that are left.
		free := o.units[n] + int64(q.Window)
		if o.mistake == windowClosed {
			free++
		}
		if n++; q.Window == 0 {
			_, free = began(q.Period, now, wall)
			n = len(o.units)
		}
		wait = max(wait, time.Duration(free-now))
	}
	if wait > 0 && !locked {
		lockout = q.Lockout
	}
	if locked && o.mistake == lockoutExtends {
		o.locked = now + int64(q.Lockout)
		wait = q.Lockout
	}
	return wait, lockout
}

// Spend counts units that Wait has found room for.
func (o *Log) Spend(units, now int64) {
	for range units {
		o.units = append(o.units, now)
	}
}

// Lock begins the lockout that Wait spoke of.
func (o *Log) Lock(now int64) {
	o.locked = now + int64(o.quota.Lockout)
	if o.mistake != lockKeepsCount {
		o.units = nil
	}
}

// An Oracle is what limits of all sorts but running requests must answer together, in the fewest words. The
// zero Oracle has seen nothing.
type Oracle struct {
	rates  map[limits.Cell]*Bucket
	quotas map[limits.Cell]*Log
}

func (o *Oracle) rate(c limits.Cell) *Bucket {
	if o.rates == nil {
		o.rates = make(map[limits.Cell]*Bucket)
	}
	if o.rates[c] == nil {
		o.rates[c] = new(Bucket)
	}
	return o.rates[c]
}

func (o *Oracle) quota(c limits.Cell) *Log {
	if o.quotas == nil {
		o.quotas = make(map[limits.Cell]*Log)
	}
	if o.quotas[c] == nil {
		o.quotas[c] = new(Log)
	}
	return o.quotas[c]
}

// Take decides a demand without a lease.
func (o *Oracle) Take(d *limits.Demand, now int64, wall time.Time) limits.Decision {
	type refusal struct {
		class         limits.Class
		quota         int
		wait, lockout time.Duration
		log           *Log
	}
	var refusals []refusal
	var decision limits.Decision
	noRoom := make(map[limits.Cell]bool)
	judge := func(c limits.Cell, shadow bool, r refusal) {
		if r.wait > 0 {
			noRoom[c] = true
			if shadow {
				decision.Shadowed |= 1 << c.Class
			} else {
				refusals = append(refusals, r)
			}
		}
	}
	for _, r := range d.Rates {
		judge(r.Cell, r.Shadow, refusal{class: r.Cell.Class, wait: o.rate(r.Cell).Wait(r.Rate, now)})
	}
	for i, q := range d.Quotas {
		log := o.quota(q.Cell)
		wait, lockout := log.Wait(q.Quota, q.Units(), now, wall)
		judge(q.Cell, q.Shadow, refusal{q.Cell.Class, i, wait, lockout, log})
	}
	if len(refusals) > 0 {
		// Stable: those that are equal stay in the order of the demand.
		slices.SortStableFunc(refusals, func(a, b refusal) int {
			if x, y := max(a.wait, a.lockout), max(b.wait, b.lockout); x != y {
				return int(min(1, max(-1, y-x)))
			}
			return int(a.class) - int(b.class)
		})
		reported := refusals[0]
		decision.Class, decision.Quota, decision.RetryAfter = reported.class, reported.quota, reported.wait
		if reported.lockout > 0 {
			reported.log.Lock(now)
			decision.RetryAfter = reported.lockout
		}
		for _, r := range refusals[1:] {
			decision.RetryAfter = max(decision.RetryAfter, r.wait)
		}
		return decision
	}
	decision.Allowed = true
	for _, r := range d.Rates {
		if !noRoom[r.Cell] {
			o.rate(r.Cell).Spend()
		}
	}
	for _, q := range d.Quotas {
		if !noRoom[q.Cell] {
			o.quota(q.Cell).Spend(q.Units(), now)
		}
	}
	return decision
}

// What a Log does wrong where a test asks for it.
const (
	windowClosed     = "lets a window hold its last instant"
	calendarSlides   = "takes a day for 24 hours"
	calendarKeepsAll = "knows when each unit of a calendar came"
	changeForgets    = "forgets what a changed quota has counted"
	changeIgnored    = "judges by the quota that a cell had first"
	neverLocks       = "locks for a cost that never passes"
	lockoutExtends   = "extends a lockout"
	lockKeepsCount   = "keeps the count of a quota that locks"
)
