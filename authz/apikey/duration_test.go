package apikey_test

import (
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"keyward/authz/apikey"
)

const day = 24 * time.Hour

func TestDuration(t *testing.T) {
	for _, tt := range []struct {
		text string
		want time.Duration
		back string // as it is written, where that differs
	}{
		{"0s", 0, ""},
		{"0", 0, "0s"},
		{"0d", 0, "0s"},
		{"90s", 90 * time.Second, "1m30s"},
		{"1m", time.Minute, ""},
		{"60s", time.Minute, "1m"},
		{"10m", 10 * time.Minute, ""},
		{"100m", 100 * time.Minute, "1h40m"},
		{"2h", 2 * time.Hour, ""},
		{"20h", 20 * time.Hour, ""},
		{"20h10m", 20*time.Hour + 10*time.Minute, ""},
		{"1h0m1s", time.Hour + time.Second, ""},
		{"24h", day, "1d"},
		{"25h", 25 * time.Hour, ""},
		{"30d", 30 * day, ""},
		{"366d", 366 * day, ""},
		{"-1d", -day, ""},
		{"-90m", -90 * time.Minute, "-1h30m"},
		{"1.5h", 90 * time.Minute, "1h30m"},
		{"250ms", 250 * time.Millisecond, ""},
		{"1ns", 1, ""},
		{"100000d", 100_000 * day, ""},
		{"106751d", 106_751 * day, ""}, // the longest that fits
		{"2562024h", 106_751 * day, "106751d"},
	} {
		got, err := apikey.ParseDuration(tt.text)
		if err != nil || got.Std() != tt.want {
			t.Errorf("%s: got %v, %v; want %v", tt.text, got.Std(), err, tt.want)
			continue
		}
		back := tt.back
		if back == "" {
			back = tt.text
		}
		if got.String() != back {
			t.Errorf("%s is written %s, want %s", tt.text, got, back)
		}
	}
}

func TestParseDurationRefuses(t *testing.T) {
	for _, bad := range []string{
		"", "d", "s", "1", "31 d", " 31d", "31D", "1.5d", "1d12h", "d30", "0x10d", "1_000d", "one day",
		"106752d", "-106752d", "99999999999999999999d", "9999999h", "30dd",
	} {
		d, err := apikey.ParseDuration(bad)
		if invalid, ok := errors.AsType[*apikey.InvalidError](err); !ok || d != 0 {
			t.Errorf("%q: got %v, %v; want an *InvalidError", bad, d, err)
		} else if len(bad) > 3 && strings.Contains(invalid.Error(), bad) {
			t.Errorf("%q: the error repeats the value: %v", bad, err)
		}
	}
}

func TestDurationRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := apikey.Duration(rapid.OneOf(
			rapid.Int64(),
			rapid.Map(rapid.Int64Range(-106_751, 106_751), func(n int64) int64 { return n * int64(day) }),
			rapid.Map(rapid.Int64Range(-2_562_047, 2_562_047), func(n int64) int64 { return n * int64(time.Hour) }),
			rapid.Map(rapid.Int64Range(-100_000, 100_000), func(n int64) int64 { return n * int64(time.Minute) }),
			rapid.SampledFrom([]int64{math.MaxInt64, math.MinInt64 + 1}),
		).Draw(t, "duration"))
		text, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		var back apikey.Duration
		if err := json.Unmarshal(text, &back); err != nil || back != d {
			t.Fatalf("%d was written %s and read as %d, %v", d, text, back, err)
		}
	})
}

func FuzzParseDuration(f *testing.F) {
	for _, s := range []string{"90s", "30d", "-1d", "1h30m", "1.5h", "106751d", "106752d", "0x10d", "2562047h47m16.854775807s", "1µs", "d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := apikey.ParseDuration(s)
		if err != nil {
			wantInvalid(t, err, s)
			return
		}
		if want, err := time.ParseDuration(s); err == nil && want != d.Std() {
			t.Fatalf("%q: got %v, want %v", s, d.Std(), want)
		}
		if back, err := apikey.ParseDuration(d.String()); err != nil || back != d {
			t.Fatalf("%q is written %s, which is read as %v, %v", s, d, back.Std(), err)
		}
	})
}
