package limits

import (
	"encoding/binary"
	"errors"
	"math"
	"time"
)

// A QuotaState is what a quota has counted, for whoever keeps it over a restart. Its Counts are the
// limiter's own business: one state of at most some 16 KiB, in times of the wall clock.
type QuotaState struct {
	Cell   Cell
	Until  time.Time // the state says nothing more after that
	Counts []byte
}

// stateVersion is the first byte of a state.
const stateVersion = 1

// Append appends the tally and its runs to b, in times of the wall clock, and returns until when that says
// anything.
func (t *Tally) Append(b []byte, runs *Runs, now, wall int64) (_ []byte, until time.Time) {
	last := max(t.locked, now+t.resets(runs, now, wall))
	toWall := wall - now
	locked := int64(0)
	if t.locked > now {
		locked = t.locked + toWall
	}
	b = append(b, stateVersion, byte(t.period))
	b = binary.AppendVarint(b, t.window)
	b = binary.AppendVarint(b, t.endsWall)
	b = binary.AppendVarint(b, locked)
	before := int64(0)
	for i := range runs.Len {
		run := runs.at(i)
		b = binary.AppendVarint(b, run.At+toWall-before)
		b = binary.AppendVarint(b, run.Units)
		before = run.At + toWall
	}
	return b, time.Unix(0, last+toWall)
}

var errState = errors.New("is not a state of this version, or is damaged")

// ParseTally reads what Append has written, by whatever process. Times that the wall clock has not reached
// yet count as now: it went back since.
func ParseTally(b []byte, now, wall int64) (t Tally, runs Runs, err error) {
	if len(b) < 2 || b[0] != stateVersion || Period(b[1]) > Month {
		return Tally{}, Runs{}, errState
	}
	t.period = Period(b[1])
	b = b[2:]
	bad := false
	next := func() int64 {
		v, n := binary.Varint(b)
		if n <= 0 {
			bad, b = true, nil
			return 0
		}
		b = b[n:]
		return v
	}
	// Nothing is kept for longer than that, in either direction, and no more units: so no sum overflows.
	const longest, maxUnits = math.MaxInt64 / 8, math.MaxInt64 / 4
	sane := func(v int64) bool { return v > -longest && v < longest }
	toClock := now - wall
	t.window, t.endsWall = next(), next()
	t.locked = next()
	if bad || t.window < 0 || t.window >= longest || t.window == 0 && t.period == 0 {
		return Tally{}, Runs{}, errState
	}
	if t.locked != 0 {
		left := t.locked - wall
		if t.locked < 0 || !sane(left) {
			return Tally{}, Runs{}, errState
		}
		t.locked = now + left
	}
	if t.window == 0 {
		if t.endsWall < 0 || !sane(t.endsWall-wall) {
			return Tally{}, Runs{}, errState
		}
		t.ends = t.endsWall + toClock
	}
	var all []Run
	for at := int64(0); len(b) > 0; {
		step, units := next(), next()
		if bad || len(all) == MaxRuns || units <= 0 || units > maxUnits-t.used || step < 0 || step > math.MaxInt64-at {
			return Tally{}, Runs{}, errState
		}
		at += step
		if !sane(at - wall) {
			return Tally{}, Runs{}, errState
		}
		all = append(all, Run{At: min(at+toClock, now), Units: units})
		t.used += units
	}
	size := 1
	for size < len(all) {
		size *= 2
	}
	runs = Runs{Ring: make([]Run, size), Len: int32(len(all))}
	copy(runs.Ring, all)
	if t.window == 0 {
		t.join(&runs, func(int64, int64) bool { return true })
	}
	return t, runs, nil
}
