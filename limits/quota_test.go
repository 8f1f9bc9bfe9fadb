package limits_test

import (
	"encoding/binary"
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"

	"keyward/authz/apikey"
	"keyward/limits"
)

func TestQuotaOf(t *testing.T) {
	const minute = time.Minute
	for _, tt := range []struct {
		name string
		in   apikey.Quota
		want limits.Quota
	}{
		{"a window", apikey.Quota{Limit: 7, Window: time.Hour, Lockout: minute}, limits.Quota{Limit: 7, Window: time.Hour, Lockout: minute}},
		{"a day", apikey.Quota{Limit: 7, Period: apikey.PeriodDay}, limits.Quota{Limit: 7, Period: limits.Day}},
		{"a month", apikey.Quota{Limit: 7, Period: apikey.PeriodMonth}, limits.Quota{Limit: 7, Period: limits.Month}},
		{"smoothed as documented", apikey.Quota{Limit: 120, Window: minute, Lockout: minute, Smoothed: true}, limits.Quota{Limit: 40, Window: 20 * time.Second, Lockout: minute}},
		{"smoothed, rounded down", apikey.Quota{Limit: 100, Window: minute, Smoothed: true}, limits.Quota{Limit: 33, Window: 20 * time.Second}},
		{"smoothed over a quarter of an hour", apikey.Quota{Limit: 1000, Window: 15 * minute, Smoothed: true}, limits.Quota{Limit: 22, Window: 20 * time.Second}},
		{"smoothed to one", apikey.Quota{Limit: 3, Window: minute, Smoothed: true}, limits.Quota{Limit: 1, Window: 20 * time.Second}},
		{"a share is never nothing", apikey.Quota{Limit: 2, Window: minute, Smoothed: true}, limits.Quota{Limit: 1, Window: 20 * time.Second}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := limits.QuotaOf(&tt.in, tt.in.Limit)
			if got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
			var tally limits.Tally
			if wait, trips := tally.Judge(&limits.Runs{}, &got, 1, 0, 0); got.IsZero() || wait != 0 || trips {
				t.Errorf("the first request is told to wait for %v, trips %t", wait, trips)
			}
		})
	}
}

// A counter is a tally with its runs and both clocks.
type counter struct {
	tally limits.Tally
	runs  limits.Runs
	clock int64
	wall  time.Time
}

func newCounter(wall time.Time) *counter {
	return &counter{runs: limits.Runs{Ring: make([]limits.Run, 2*limits.MaxRuns)}, wall: wall}
}

// pass lets time pass by both clocks, jump sets the wall clock alone.
func (c *counter) pass(d time.Duration) { c.clock += int64(d); c.wall = c.wall.Add(d) }
func (c *counter) jump(d time.Duration) { c.wall = c.wall.Add(d) }

func (c *counter) take(q limits.Quota, units int64) time.Duration {
	wait, _ := c.tally.Judge(&c.runs, &q, units, c.clock, c.wall.UnixNano())
	if wait == 0 {
		c.tally.Spend(&c.runs, &q, units, c.clock, c.wall.UnixNano())
	}
	return wait
}

// TestWallClockJumpsOpenNoCalendar: a period that is spent stays so until both clocks say that it is over.
func TestWallClockJumpsOpenNoCalendar(t *testing.T) {
	const hour = time.Hour
	noon := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		name   string
		period limits.Period
		jump   time.Duration
		opens  time.Duration // after the jump
	}{
		{"none", limits.Day, 0, 12 * hour},
		{"forward within the day", limits.Day, 3 * hour, 12 * hour},
		{"forward over midnight", limits.Day, 13 * hour, 12 * hour},
		{"forward over a year", limits.Day, 366 * 24 * hour, 12 * hour},
		{"back within the day", limits.Day, -3 * hour, 15 * hour},
		{"back to the day before", limits.Day, -24 * hour, 36 * hour},
		{"a month, none", limits.Month, 0, 12 * hour},
		{"a month, forward into the next", limits.Month, 13 * hour, 12 * hour},
		{"a month, back to its beginning", limits.Month, -29 * 24 * hour, 12*hour + 29*24*hour},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := limits.Quota{Limit: 2, Period: tt.period}
			c := newCounter(noon)
			c.take(q, 2)
			c.jump(tt.jump)
			if got := c.take(q, 1); got != tt.opens {
				t.Fatalf("told to wait for %v, want %v", got, tt.opens)
			}
			c.pass(tt.opens - 1)
			if got := c.take(q, 1); got != 1 {
				t.Fatalf("a nanosecond before: told to wait for %v", got)
			}
			c.pass(1)
			if got := c.take(q, 2); got != 0 {
				t.Fatalf("then: told to wait for %v", got)
			}
		})
	}
	// A restart reads when the day ends by the wall clock, and does not believe it alone afterwards.
	q := limits.Quota{Limit: 1, Period: limits.Day}
	c := newCounter(noon)
	c.take(q, 1)
	state, _ := c.tally.Append(nil, &c.runs, c.clock, c.wall.UnixNano())
	c = newCounter(noon.Add(hour))
	c.tally, c.runs, _ = limits.ParseTally(state, c.clock, c.wall.UnixNano())
	c.jump(20 * hour)
	if got := c.take(q, 1); got != 11*hour {
		t.Errorf("after a restart and a jump: told to wait for %v, want %v", got, 11*hour)
	}
	// There and back again, in small steps and large ones: a count has no more than the limit until the end of
	// its day, as that was when its first unit came, is over by both clocks.
	rapid.Check(t, func(t *rapid.T) {
		q := limits.Quota{Limit: rapid.Int64Range(1, 5).Draw(t, "limit"), Period: limits.Day}
		c := newCounter(noon)
		used, ends, midnight := int64(0), int64(0), time.Time{}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			c.pass(time.Duration(rapid.Int64Range(0, int64(10*hour)).Draw(t, "pass")))
			c.jump(time.Duration(rapid.Int64Range(-int64(50*hour), int64(50*hour)).Draw(t, "jump")))
			for range rapid.IntRange(0, 6).Draw(t, "requests") {
				// Seen by a request: what both clocks say in between, and take back, nobody hears.
				if c.clock >= ends && !c.wall.Before(midnight) {
					used = 0
				}
				if used == 0 {
					midnight = c.wall.Truncate(24 * hour).Add(24 * hour)
					ends = c.clock + int64(midnight.Sub(c.wall))
				}
				if passed := c.take(q, 1) == 0; passed != (used < q.Limit) {
					t.Fatalf("%d of %d used: passed is %t", used, q.Limit, passed)
				}
				used = min(used+1, q.Limit)
			}
		}
	})
}

// Hundredths of a window are as long before the limiter's clock began as after: units are restored there.
func TestHundredthsBelowZero(t *testing.T) {
	q := limits.Quota{Limit: 5000, Window: 100_000}
	c := newCounter(time.Unix(1_800_000_000, 0))
	for _, tt := range []struct {
		clock int64
		runs  int32
	}{{-1001, 1}, {-1000, 2}, {-500, 2}, {-1, 2}, {0, 3}, {500, 3}, {999, 3}, {1000, 4}} {
		c.clock = tt.clock
		if c.take(q, 1); c.runs.Len != tt.runs {
			t.Errorf("at %d: %d runs, want %d", tt.clock, c.runs.Len, tt.runs)
		}
	}
}

// TestTallySurvives: what is written is what is read, at whatever times by both clocks, and both go on alike.
func TestTallySurvives(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q := limits.Quota{Limit: rapid.Int64Range(1, 2000).Draw(t, "limit"), Lockout: time.Duration(rapid.Int64Range(0, 50).Draw(t, "lockout"))}
		if q.Window = time.Duration(rapid.Int64Range(0, 5000).Draw(t, "window")); q.Window == 0 {
			q.Period = limits.Period(rapid.IntRange(1, 2).Draw(t, "period"))
		}
		a := newCounter(time.Date(2026, 1, 31, 23, 0, 0, rapid.IntRange(0, 999_999_999).Draw(t, "wall"), time.UTC))
		a.clock = rapid.Int64Range(0, 1<<50).Draw(t, "clock")
		spend := func() {
			a.pass(time.Duration(rapid.Int64Range(0, 100).Draw(t, "pass")))
			units := rapid.Int64Range(1, max(1, q.Limit/3)).Draw(t, "units")
			if wait, trips := a.tally.Judge(&a.runs, &q, units, a.clock, a.wall.UnixNano()); trips && rapid.Bool().Draw(t, "locks") {
				a.tally.Lock(&a.runs, &q, a.clock)
			} else if wait == 0 {
				a.tally.Spend(&a.runs, &q, units, a.clock, a.wall.UnixNano())
			}
		}
		for range rapid.IntRange(1, 50).Draw(t, "before") {
			spend()
		}
		state, until := a.tally.Append(nil, &a.runs, a.clock, a.wall.UnixNano())
		down := time.Duration(rapid.Int64Range(0, 3000).Draw(t, "down"))
		a.pass(down)
		b := newCounter(a.wall)
		var err error
		var runs limits.Runs
		b.clock = rapid.Int64Range(0, 1000).Draw(t, "new clock")
		if b.tally, runs, err = limits.ParseTally(state, b.clock, b.wall.UnixNano()); err != nil {
			t.Fatal(err)
		}
		b.runs = runs.CopyTo(b.runs.Ring)
		if over := a.wall.Before(until); over != !b.tally.Idle(&b.runs, b.clock, b.wall.UnixNano()) {
			t.Fatalf("said to say something until %v: at %v it is %t that it does not", until, a.wall, over)
		}
		for range rapid.IntRange(1, 20).Draw(t, "after") {
			d := time.Duration(rapid.Int64Range(0, 1000).Draw(t, "pass"))
			a.pass(d)
			b.pass(d)
			units := rapid.Int64Range(1, q.Limit).Draw(t, "units")
			// Hundredths of a window begin anew with the clock: where units share one, they may count for
			// a hundredth longer.
			slack := time.Duration(0)
			if q.Limit > 1024 {
				slack = max(1, q.Window/100)
			}
			if x, y := a.take(q, units), b.take(q, units); y < x-slack || y > x+slack {
				t.Fatalf("told to wait for %v, and for %v after a restart", x, y)
			} else if x != y {
				return
			}
		}
	})
}

// state writes one as Append does, whatever it says.
func state(period byte, window, endsWall, locked int64, runs ...int64) []byte {
	b := []byte{1, period}
	for _, v := range append([]int64{window, endsWall, locked}, runs...) {
		b = binary.AppendVarint(b, v)
	}
	return b
}

func TestParseTallyRefusesNonsense(t *testing.T) {
	const clock, wall = int64(1000), int64(1_800_000_000_000_000_000)
	hour, huge := int64(time.Hour), int64(math.MaxInt64)
	many := make([]int64, 0, 2*limits.MaxRuns+2)
	for range limits.MaxRuns {
		many = append(many, 0, 1)
	}
	many[0] = wall
	for name, b := range map[string][]byte{
		"nothing":                   {},
		"another version":           append([]byte{2}, state(0, hour, 0, 0, wall, 1)[1:]...),
		"an unknown period":         state(3, 0, wall, 0, wall, 1),
		"neither window nor period": state(0, 0, wall, 0, wall, 1),
		"a window below 0":          state(0, -1, 0, 0, wall, 1),
		"a window without end":      state(0, huge, 0, 0, wall, 1),
		"cut off":                   state(0, hour, 0, 0, wall),
		"cut off early":             state(0, hour, 0, 0)[:4],
		"a run of nothing":          state(0, hour, 0, 0, wall, 0),
		"a run below nothing":       state(0, hour, 0, 0, wall, -5),
		"more units than there are": state(0, hour, 0, 0, wall, huge/4, 1, huge/4),
		"runs out of order":         state(0, hour, 0, 0, wall, 1, -1, 1),
		"a run before time":         state(0, hour, 0, 0, -wall, 1),
		"a run past time":           state(0, hour, 0, 0, wall, 1, huge-10, 1),
		"too many runs":             state(0, hour, 0, 0, append(many, 0, 1)...),
		"locked for ever":           state(0, hour, 0, huge, wall, 1),
		"locked before time":        state(0, hour, 0, -huge, wall, 1),
		"a period without end":      state(1, 0, huge, 0, wall, 1),
	} {
		if tally, runs, err := limits.ParseTally(b, clock, wall); err == nil {
			t.Errorf("%s: got %+v, %+v", name, tally, runs)
		}
	}
	if _, runs, err := limits.ParseTally(state(0, hour, 0, 0, many...), clock, wall); err != nil || runs.Len != limits.MaxRuns {
		t.Errorf("as many runs as there may be: %d, %v", runs.Len, err)
	}
	// The wall clock went back since: what came later than now comes now.
	tally, runs, err := limits.ParseTally(state(0, hour, 0, 0, wall+7*hour, 4), clock, wall)
	q := limits.Quota{Limit: 4, Window: time.Hour}
	if wait, _ := tally.Judge(&runs, &q, 1, clock, wall); err != nil || wait != time.Hour {
		t.Errorf("a unit of later counts for %v, %v, want an hour", wait, err)
	}
}

// FuzzParseTally: any bytes are an error or a state that admits no more than its limit, and never a panic.
func FuzzParseTally(f *testing.F) {
	q := limits.Quota{Limit: 5, Window: time.Hour, Lockout: time.Minute}
	c := newCounter(time.Unix(1_800_000_000, 0))
	for range 4 {
		c.take(q, 1)
		c.pass(time.Minute)
	}
	add := func() {
		state, _ := c.tally.Append(nil, &c.runs, c.clock, c.wall.UnixNano())
		f.Add(state, int64(5), int64(time.Hour))
		f.Add(state[:len(state)-1], int64(5), int64(0))
	}
	add()
	c.tally.Lock(&c.runs, &q, c.clock)
	add()
	c.take(limits.Quota{Limit: 3, Period: limits.Month}, 3)
	add()
	f.Add([]byte{}, int64(1), int64(1))
	f.Add(binary.AppendVarint([]byte{1, 0}, -1), int64(1), int64(1))
	f.Fuzz(func(t *testing.T, state []byte, limit, window int64) {
		q := limits.Quota{Limit: limit%3000 + 1, Window: time.Duration(window % int64(1000*24*time.Hour)).Abs(), Lockout: time.Second, Period: limits.Day}
		q.Limit = max(q.Limit, -q.Limit) + 1
		c := newCounter(time.Unix(1_800_000_000, 0))
		c.clock = 12345
		tally, runs, err := limits.ParseTally(state, c.clock, c.wall.UnixNano())
		if err != nil {
			return
		}
		if runs.Len > limits.MaxRuns {
			t.Fatalf("%d runs", runs.Len)
		}
		c.tally, c.runs = tally, runs.CopyTo(c.runs.Ring)
		again, _ := tally.Append(nil, &runs, c.clock, c.wall.UnixNano())
		if _, _, err := limits.ParseTally(again, c.clock, c.wall.UnixNano()); err != nil {
			t.Fatalf("what was read and written cannot be read: %v", err)
		}
		for admitted := int64(0); ; {
			wait, trips := c.tally.Judge(&c.runs, &q, 1, c.clock, c.wall.UnixNano())
			switch {
			case wait < 0 || wait > limits.Never:
				t.Fatalf("told to wait for %d", wait)
			case trips:
				c.tally.Lock(&c.runs, &q, c.clock)
				if got := c.take(q, 1); got != q.Lockout {
					t.Fatalf("locked for %v, and told to wait for %v", q.Lockout, got)
				}
				return
			case wait > 0:
				c.pass(wait)
				if got := c.take(q, 1); got != 0 {
					t.Fatalf("told to wait for %v, and then for %v", wait, got)
				}
				return
			}
			c.tally.Spend(&c.runs, &q, 1, c.clock, c.wall.UnixNano())
			if admitted++; admitted > q.Limit {
				t.Fatalf("%d admitted at one instant, want at most %d", admitted, q.Limit)
			}
		}
	})
}

func BenchmarkTally(b *testing.B) {
	b.ReportAllocs()
	q := limits.Quota{Limit: 1000, Window: time.Second}
	c := newCounter(time.Unix(1_800_000_000, 0))
	for b.Loop() {
		c.clock += int64(time.Millisecond)
		c.take(q, 1)
	}
}
