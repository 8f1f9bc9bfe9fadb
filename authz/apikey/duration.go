package apikey

import (
	"math"
	"strconv"
	"strings"
	"time"
)

// A Duration is a time.Duration that people write as 90s, 24h or 30d.
type Duration time.Duration

const (
	day     = 24 * time.Hour
	maxDays = math.MaxInt64 / int64(day)
)

// ParseDuration reads what time.ParseDuration reads, and whole days such as 30d.
func ParseDuration(s string) (Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseInt(days, 10, 32)
		if err != nil || n > maxDays || n < -maxDays {
			return 0, errDuration
		}
		return Duration(time.Duration(n) * day), nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, errDuration // time's own error repeats the value
	}
	return Duration(d), nil
}

var errDuration = Invalid("", "must be a duration such as 90s, 24h or 30d")

// Std returns d as the standard library's type.
func (d Duration) Std() time.Duration { return time.Duration(d) }

func (d Duration) String() string {
	t := time.Duration(d)
	if t != 0 && t%day == 0 {
		return strconv.FormatInt(int64(t/day), 10) + "d"
	}
	// 1m0s and 2h0m0s are right and nobody writes them.
	s := t.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// MarshalText writes the short form.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what [ParseDuration] reads.
func (d *Duration) UnmarshalText(text []byte) (err error) {
	*d, err = ParseDuration(string(text))
	return err
}
