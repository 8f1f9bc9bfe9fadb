package limits_test

import (
	"math"
	"math/big"
	"testing"
	"time"

	"pgregory.net/rapid"

	"keyward/authz/apikey"
	"keyward/limits"
	"keyward/limits/limitstest"
)

const day = 24 * time.Hour

func TestRateTake(t *testing.T) {
	per10 := limits.Rate{Interval: 10, Burst: 3}
	for _, tt := range []struct {
		name      string
		rate      limits.Rate
		full, now int64
		wantNext  int64
		wantRetry time.Duration
	}{
		{"never used, at the beginning of time", per10, 0, 0, 10, 0},
		{"never used, later", per10, 0, 1000, 1010, 0},
		{"full again just now", per10, 1000, 1000, 1010, 0},
		{"full long ago earns nothing more", per10, 5, 1000, 1010, 0},
		{"one spent", per10, 1010, 1000, 1020, 0},
		{"the last of the burst", per10, 1020, 1000, 1030, 0},
		{"a nanosecond too early for the last", per10, 1021, 1000, 1021, 1},
		{"empty", per10, 1030, 1000, 1030, 10},
		{"empty, a nanosecond before room", per10, 1030, 1009, 1030, 1},
		{"empty, room at this instant", per10, 1030, 1010, 1040, 0},
		{"burst lowered since: counts as just empty", per10, 9999, 1000, 1030, 10},
		{"burst raised since: what was spent stays spent", limits.Rate{Interval: 10, Burst: 5}, 1030, 1000, 1040, 0},
		{"burst of one", limits.Rate{Interval: 10, Burst: 1}, 0, 1000, 1010, 0},
		{"burst of one, spent", limits.Rate{Interval: 10, Burst: 1}, 1010, 1003, 1010, 7},
		{"the smallest interval", limits.Rate{Interval: 1, Burst: 1}, 1001, 1001, 1002, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			next, retry := tt.rate.Take(tt.full, tt.now)
			if next != tt.wantNext || retry != tt.wantRetry {
				t.Errorf("got next %d, retry in %d, want %d, %d", next, retry, tt.wantNext, tt.wantRetry)
			}
		})
	}
}

func TestRateOf(t *testing.T) {
	rate := func(requests int, per time.Duration) apikey.Rate {
		return apikey.Rate{Requests: requests, Per: apikey.Duration(per)}
	}
	for _, tt := range []struct {
		name string
		in   apikey.Limits
		want limits.Rate
	}{
		{"nothing said", apikey.Limits{}, limits.Rate{}},
		{"unlimited", apikey.Limits{Rate: rate(apikey.Unlimited, 0)}, limits.Rate{}},
		{"unlimited over an inherited burst", apikey.Limits{Rate: rate(apikey.Unlimited, 0), Burst: 20}, limits.Rate{}},
		{"only concurrency", apikey.Limits{MaxConcurrent: 5}, limits.Rate{}},
		{"as shipped", apikey.ShippedLimits, limits.Rate{Interval: 500 * time.Millisecond, Burst: 20}},
		{"key's rate, shipped burst", apikey.Limits{Rate: rate(1, time.Hour)}.Or(apikey.ShippedLimits), limits.Rate{Interval: time.Hour, Burst: 20}},
		{"key's burst, shipped rate", apikey.Limits{Burst: 3}.Or(apikey.ShippedLimits), limits.Rate{Interval: 500 * time.Millisecond, Burst: 3}},
		{"interval rounded up", apikey.Limits{Rate: rate(3, time.Second), Burst: 1}, limits.Rate{Interval: 333_333_334, Burst: 1}},
		{"inherited rate under an unlimited burst: a period's requests at once", apikey.Limits{Burst: apikey.Unlimited}.Or(apikey.ShippedLimits), limits.Rate{Interval: 500 * time.Millisecond, Burst: 120}},
		{"inherited burst that does not fit the rate", apikey.Limits{Rate: rate(1, 366*day), Burst: 1_000_000_000}, limits.Rate{Interval: 366 * day, Burst: math.MaxInt64 / 2 / int64(366*day)}},
		{"a burst that just fits", apikey.Limits{Rate: rate(1, 4*time.Second), Burst: 1_000_000_000}, limits.Rate{Interval: 4 * time.Second, Burst: 1_000_000_000}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := limits.RateOf(tt.in)
			if got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
			if got.IsZero() != (tt.want == limits.Rate{}) {
				t.Errorf("IsZero of %+v is %t", got, got.IsZero())
			}
		})
	}
}

// FuzzRateTake holds one step to what any caller builds on, wherever the bucket stands.
func FuzzRateTake(f *testing.F) {
	f.Add(int64(0), int64(0), int64(1), int64(1))
	f.Add(int64(1030), int64(1000), int64(10), int64(3))
	f.Add(int64(math.MaxInt64), int64(100*365*day), int64(366*day), int64(145))
	f.Add(int64(-1), int64(7), int64(time.Second), int64(1_000_000_000))
	f.Fuzz(func(t *testing.T, full, now, interval, burst int64) {
		// The domain: a clock within a century, a rate as RateOf makes them, a state left by another rate.
		now = int64(uint64(now) % uint64(100*365*day))
		interval = int64(uint64(interval)%uint64(366*day)) + 1
		burst = int64(uint64(burst)%uint64(math.MaxInt64/2/interval)) + 1
		full = int64(uint64(full) % (1 << 63))
		r := limits.Rate{Interval: time.Duration(interval), Burst: burst}

		next, retry := r.Take(full, now)
		if room := now + burst*interval; next < now || next > room {
			t.Fatalf("next %d is not from now %d to an empty bucket's %d", next, now, room)
		}
		switch {
		case retry < 0 || int64(retry) > interval:
			t.Fatalf("a wait of %d is not from 0 to the interval %d", retry, interval)
		case retry == 0 && next != max(full, now)+interval:
			t.Fatalf("passed from full %d at %d to %d: not one interval %d", full, now, next, interval)
		case retry > 0:
			if _, again := r.Take(next, now+int64(retry)-1); again != 1 {
				t.Fatalf("a nanosecond before the wait of %d is over: wait %d, want 1", retry, again)
			}
			if _, again := r.Take(next, now+int64(retry)); again != 0 {
				t.Fatalf("after the wait of %d: wait %d, want none", retry, again)
			}
		}
	})
}

// anyLimits draws limits that a configuration may hold.
func anyLimits(t *rapid.T) apikey.Limits {
	return rapid.Custom(func(t *rapid.T) apikey.Limits {
		per := rapid.OneOf(
			rapid.Int64Range(1, int64(2*time.Millisecond)),
			rapid.SampledFrom([]int64{int64(time.Second), int64(time.Minute), int64(time.Hour), int64(day), int64(366 * day)}),
			rapid.Int64Range(1, int64(366*day)),
		).Draw(t, "per")
		return apikey.Limits{
			Rate: apikey.Rate{
				Requests: rapid.OneOf(rapid.IntRange(1, 20), rapid.IntRange(1, 1_000_000_000)).Draw(t, "requests"),
				Per:      apikey.Duration(per),
			},
			Burst: rapid.OneOf(rapid.IntRange(1, 20), rapid.IntRange(1, 1_000_000_000)).Draw(t, "burst"),
		}
	}).Filter(func(l apikey.Limits) bool { return l.Validate("") == nil }).Draw(t, "limits")
}

// anyGap draws a time between two requests: at once, near multiples of the interval, or anything, and
// never so long that a hundred of them leave the clock's century.
func anyGap(t *rapid.T, interval int64) int64 {
	return min(math.MaxInt64/2/100, rapid.OneOf(
		rapid.Just(int64(0)),
		rapid.Int64Range(0, 2*interval),
		rapid.Map(rapid.Int64Range(1, 3), func(n int64) int64 { return n * interval }),
		rapid.Map(rapid.Int64Range(1, 3), func(n int64) int64 { return n*interval - 1 }),
		rapid.Int64Range(0, 30*interval),
	).Draw(t, "gap"))
}

// A bucket in integers admits what the exact bucket of the same interval admits, no more and no less,
// and names the same wait, also when the limits change on the way.
func TestRateIsTheExactBucket(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := limits.RateOf(anyLimits(t))
		exact := new(limitstest.Bucket)
		now, full := rapid.Int64Range(0, int64(day)).Draw(t, "start"), int64(0)
		for range rapid.IntRange(1, 60).Draw(t, "requests") {
			if rapid.IntRange(0, 9).Draw(t, "change") == 0 {
				r = limits.RateOf(anyLimits(t))
			}
			now += anyGap(t, int64(r.Interval))
			var retry time.Duration
			full, retry = r.Take(full, now)
			want := exact.Wait(r, now)
			if retry != want {
				t.Fatalf("at %d under %+v: wait %d, the exact bucket's is %d", now, r, retry, want)
			}
			if retry == 0 {
				exact.Spend()
			}
		}
	})
}

// The promise to whoever set the limit, in its own words: any window w admits at most burst +
// requests/per × w. Rounding may take up to 1 % of the rate, and never gives.
func TestAnyWindowKeepsThePromise(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := anyLimits(t)
		r := limits.RateOf(l)
		requests, per := big.NewInt(int64(l.Rate.Requests)), big.NewInt(int64(l.Rate.Per))

		// interval × requests ≤ per × 1.01
		slow := new(big.Int).Mul(big.NewInt(int64(r.Interval)), requests)
		if slow.Mul(slow, big.NewInt(100)).Cmp(new(big.Int).Mul(per, big.NewInt(101))) > 0 {
			t.Fatalf("interval %d is more than 1 %% above %s/%s", r.Interval, per, requests)
		}

		var now, full int64
		var admitted []int64
		for range rapid.IntRange(1, 80).Draw(t, "tries") {
			now += anyGap(t, int64(r.Interval))
			next, retry := r.Take(full, now)
			if full = next; retry == 0 {
				admitted = append(admitted, now)
			}
		}
		for i, from := range admitted {
			for j := i; j < len(admitted); j++ {
				// (count - burst) × per ≤ w × requests
				over := new(big.Int).Mul(big.NewInt(int64(j-i+1-l.Burst)), per)
				if earned := new(big.Int).Mul(big.NewInt(admitted[j]-from), requests); over.Cmp(earned) > 0 {
					t.Fatalf("%d admitted in %d ns under %+v", j-i+1, admitted[j]-from, l)
				}
			}
		}
	})
}

func BenchmarkRateTake(b *testing.B) {
	r := limits.RateOf(apikey.ShippedLimits)
	b.ReportAllocs()
	var full, now int64
	for b.Loop() {
		full, _ = r.Take(full, now)
		now += int64(r.Interval) / 2 // every second request is refused
	}
}
