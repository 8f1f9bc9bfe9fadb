package apikey_test

import (
	"encoding/json"
	"errors"
	"math"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"keyward/authz/apikey"
)

func rate(requests int, per time.Duration) apikey.Rate {
	return apikey.Rate{Requests: requests, Per: apikey.Duration(per)}
}

func TestLimitsValidate(t *testing.T) {
	const off = apikey.Unlimited
	for _, tt := range []struct {
		name   string
		limits apikey.Limits
		field  string // refused there; "": accepted
	}{
		{"nothing said", apikey.Limits{}, ""},
		{"as shipped", apikey.ShippedLimits, ""},
		{"all unlimited", apikey.Limits{Rate: rate(off, 0), Burst: off, MaxConcurrent: off}, ""},
		{"unlimited rate with a period that does not matter", apikey.Limits{Rate: rate(off, -5)}, ""},
		{"rate alone, burst inherited", apikey.Limits{Rate: rate(1, time.Second)}, ""},
		{"burst alone, rate inherited", apikey.Limits{Burst: 1}, ""},
		{"unlimited burst, rate inherited", apikey.Limits{Burst: off}, ""},
		{"smallest", apikey.Limits{Rate: rate(1, 1), Burst: 1, MaxConcurrent: 1}, ""},
		{"longest period", apikey.Limits{Rate: rate(1, 366*day), Burst: 1}, ""},
		{"largest counts", apikey.Limits{Rate: rate(1_000_000_000, time.Second), Burst: 1_000_000_000, MaxConcurrent: 1_000_000_000}, ""},

		{"period without requests", apikey.Limits{Rate: rate(0, time.Second)}, "limits.rate.requests"},
		{"requests below unlimited", apikey.Limits{Rate: rate(-2, time.Second)}, "limits.rate.requests"},
		{"too many requests", apikey.Limits{Rate: rate(1_000_000_001, time.Hour)}, "limits.rate.requests"},
		{"requests without period", apikey.Limits{Rate: rate(1, 0)}, "limits.rate.per"},
		{"negative period", apikey.Limits{Rate: rate(1, -time.Second)}, "limits.rate.per"},
		{"period too long", apikey.Limits{Rate: rate(1, 366*day+1)}, "limits.rate.per"},
		{"negative burst", apikey.Limits{Burst: -2}, "limits.burst"},
		{"burst too large", apikey.Limits{Burst: 1_000_000_001}, "limits.burst"},
		{"unlimited burst would undo the rate", apikey.Limits{Rate: rate(1, time.Second), Burst: off}, "limits.burst"},
		{"burst over an unlimited rate", apikey.Limits{Rate: rate(off, 0), Burst: 5}, "limits.burst"},
		{"negative concurrency", apikey.Limits{MaxConcurrent: -2}, "limits.maxConcurrent"},
		{"concurrency too large", apikey.Limits{MaxConcurrent: 1_000_000_001}, "limits.maxConcurrent"},
		{"burst of 145 years and more", apikey.Limits{Rate: rate(1, 366*day), Burst: 145}, ""},
		{"burst of more than 146 years", apikey.Limits{Rate: rate(1, 366*day), Burst: 146}, "limits.burst"},

		// The 1 % rule: the interval is rounded up to whole nanoseconds.
		{"ten million a second", apikey.Limits{Rate: rate(10_000_000, time.Second)}, ""},
		{"faster, 1 % off exactly", apikey.Limits{Rate: rate(505_000_000, time.Second)}, ""},
		{"faster, a little over 1 %", apikey.Limits{Rate: rate(505_000_001, time.Second)}, "limits.rate"},
		{"faster, 20 % off", apikey.Limits{Rate: rate(300_000_000, time.Second)}, "limits.rate"},
		{"faster, and exact", apikey.Limits{Rate: rate(500_000_000, time.Second)}, ""},
		{"faster than a clock", apikey.Limits{Rate: rate(2, 1)}, "limits.rate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.limits.Validate("limits")
			if tt.field == "" {
				if err != nil {
					t.Errorf("got %v, want none", err)
				}
				return
			}
			if invalid, ok := errors.AsType[*apikey.InvalidError](err); !ok || invalid.Field != tt.field {
				t.Errorf("got %v, want %s refused", err, tt.field)
			}
		})
	}
}

// A rate that is accepted is kept within 1 %, on the slow side only; what is refused could not be.
func TestRateIsKeptWithinOnePercent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := rate(
			rapid.OneOf(rapid.IntRange(1, 1000), rapid.IntRange(1, 1_000_000_000)).Draw(t, "requests"),
			time.Duration(rapid.OneOf(rapid.Int64Range(1, 1000), rapid.Int64Range(1, int64(time.Minute)), rapid.Int64Range(1, int64(366*day))).Draw(t, "per")),
		)
		per := big.NewInt(int64(r.Per))
		took := new(big.Int).Mul(big.NewInt(int64(r.Interval())), big.NewInt(int64(r.Requests)))
		if took.Cmp(per) < 0 {
			t.Fatalf("%+v: interval %d lets more through", r, r.Interval())
		}
		if shorter := new(big.Int).Sub(took, big.NewInt(int64(r.Requests))); shorter.Cmp(per) >= 0 {
			t.Fatalf("%+v: interval %d is longer than it must be", r, r.Interval())
		}
		over := new(big.Int).Sub(took, per)
		within := over.Mul(over, big.NewInt(100)).Cmp(per) <= 0
		if err := (apikey.Limits{Rate: r}).Validate("l"); (err == nil) != within {
			t.Fatalf("%+v, interval %d: within 1 %%: %t, validated: %v", r, r.Interval(), within, err)
		}
	})
}

// Whatever is accepted leaves room to count in 63 bits.
func TestAcceptedLimitsDoNotOverflow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := apikey.Limits{
			Rate:  rate(rapid.IntRange(1, 1_000_000_000).Draw(t, "requests"), time.Duration(rapid.Int64Range(1, int64(366*day)).Draw(t, "per"))),
			Burst: rapid.IntRange(1, 1_000_000_000).Draw(t, "burst"),
		}
		reach := new(big.Int).Mul(big.NewInt(int64(l.Rate.Interval())), big.NewInt(int64(l.Burst)))
		fits := reach.Cmp(big.NewInt(math.MaxInt64/2)) <= 0
		if err := l.Validate("l"); err == nil && !fits {
			t.Fatalf("%+v was accepted and reaches %v ns", l, reach)
		}
	})
}

func TestLimitsOr(t *testing.T) {
	const off = apikey.Unlimited
	parent := apikey.Limits{Rate: rate(10, time.Minute), Burst: 3, MaxConcurrent: 2}
	for _, tt := range []struct {
		name            string
		l, parent, want apikey.Limits
	}{
		{"nothing said", apikey.Limits{}, parent, parent},
		{"everything said", apikey.ShippedLimits, parent, apikey.ShippedLimits},
		{"nobody says anything", apikey.Limits{}, apikey.Limits{}, apikey.Limits{}},
		{"rate alone", apikey.Limits{Rate: rate(1, time.Hour)}, parent, apikey.Limits{Rate: rate(1, time.Hour), Burst: 3, MaxConcurrent: 2}},
		{"burst alone", apikey.Limits{Burst: 7}, parent, apikey.Limits{Rate: rate(10, time.Minute), Burst: 7, MaxConcurrent: 2}},
		{"concurrency alone", apikey.Limits{MaxConcurrent: 7}, parent, apikey.Limits{Rate: rate(10, time.Minute), Burst: 3, MaxConcurrent: 7}},
		{"unlimited is said", apikey.Limits{Rate: rate(off, 0), Burst: off, MaxConcurrent: off}, parent, apikey.Limits{Rate: rate(off, 0), Burst: off, MaxConcurrent: off}},
		{"unlimited is inherited", apikey.Limits{Burst: 5}, apikey.Limits{Rate: rate(off, 0), MaxConcurrent: off}, apikey.Limits{Rate: rate(off, 0), Burst: 5, MaxConcurrent: off}},
		{"a rate is inherited whole", apikey.Limits{Rate: rate(0, time.Hour)}, parent, parent},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, tt.l.Or(tt.parent)); diff != "" {
				t.Errorf("difference (-want +got):\n%s", diff)
			}
		})
	}
}

// What a key, its policy and the shipped limits say, in JSON: absent stays absent, unlimited is written.
func TestLimitsJSON(t *testing.T) {
	for _, tt := range []struct {
		limits apikey.Limits
		want   string
	}{
		{apikey.Limits{}, `{}`},
		{apikey.ShippedLimits, `{"rate":{"requests":120,"per":"1m"},"burst":20,"maxConcurrent":10}`},
		{apikey.Limits{Rate: rate(apikey.Unlimited, 0), Burst: apikey.Unlimited}, `{"rate":{"requests":-1},"burst":-1}`},
		{apikey.Limits{Rate: rate(1000, 30*day)}, `{"rate":{"requests":1000,"per":"30d"}}`},
	} {
		text, err := json.Marshal(tt.limits)
		if err != nil || string(text) != tt.want {
			t.Errorf("got %s, %v; want %s", text, err, tt.want)
		}
		var back apikey.Limits
		if err := json.Unmarshal(text, &back); err != nil || back != tt.limits {
			t.Errorf("%s was read as %+v, %v", text, back, err)
		}
	}
}

// FuzzLimits: limits that are accepted can be counted with, and are written as they are read.
func FuzzLimits(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"rate":{"requests":120,"per":"1m"},"burst":20,"maxConcurrent":10}`, `{"rate":{"requests":-1},"burst":-1,"maxConcurrent":-1}`,
		`{"rate":{"requests":505000000,"per":"1s"}}`, `{"rate":{"requests":2,"per":"1ns"},"burst":1}`, `{"rate":{"requests":1,"per":"366d"},"burst":146}`,
		`{"burst":9223372036854775807}`, `{"rate":{"requests":0,"per":"-1d"}}`, `{"burst":1e400}`, `{"rate":{"requests":1,"per":"NaN"}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var l apikey.Limits
		if json.Unmarshal(text, &l) != nil {
			return
		}
		_ = l.Or(apikey.ShippedLimits).Or(apikey.Limits{})
		if err := l.Validate("limits"); err != nil {
			wantInvalid(t, err, string(text))
			return
		}
		if l.Rate.Requests > 0 {
			reach := new(big.Int).Mul(big.NewInt(int64(l.Rate.Interval())), big.NewInt(int64(l.Burst)))
			if l.Rate.Interval() <= 0 || reach.Cmp(big.NewInt(math.MaxInt64/2)) > 0 {
				t.Fatalf("%+v was accepted, with an interval of %d", l, l.Rate.Interval())
			}
		}
		written, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		var back apikey.Limits
		if err := json.Unmarshal(written, &back); err != nil || back != l {
			t.Fatalf("%+v is written %s, which is read as %+v, %v", l, written, back, err)
		}
	})
}
