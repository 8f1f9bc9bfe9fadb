package apikey

import (
	"math"
	"time"
)

// Unlimited is the value of a limit that is switched off.
const Unlimited = -1

// A Rate is how many requests may come per time, sustained. The zero Rate says nothing and inherits;
// Requests = [Unlimited] switches the rate off, and its Per does not matter.
type Rate struct {
	Requests int      `json:"requests"`
	Per      Duration `json:"per,omitempty"`
}

// Interval is the time from one request to the next at the sustained rate, rounded up to a whole
// nanosecond so that rounding never lets more through. Valid, limited rates only.
func (r Rate) Interval() time.Duration {
	n := time.Duration(r.Requests)
	return (time.Duration(r.Per) + n - 1) / n
}

// Limits are what one key may use. Each field inherits alone where it is zero, and [Unlimited]
// switches it off.
type Limits struct {
	Rate          Rate `json:"rate,omitzero"`
	Burst         int  `json:"burst,omitempty"`         // requests that may come at once
	MaxConcurrent int  `json:"maxConcurrent,omitempty"` // requests that may run at once
}

// ShippedLimits hold where neither the key nor its instance's policy says anything.
var ShippedLimits = Limits{Rate: Rate{Requests: 120, Per: Duration(time.Minute)}, Burst: 20, MaxConcurrent: 10}

const (
	maxCount = 1_000_000_000
	maxPer   = 366 * day
)

// Validate reports every field that cannot be meant, by its path below field.
func (l Limits) Validate(field string) error {
	if l.Rate != (Rate{}) {
		if err := l.Rate.validate(field + ".rate"); err != nil {
			return err
		}
	}
	if err := validCount(field+".burst", l.Burst); err != nil {
		return err
	}
	if l.Burst == Unlimited && l.Rate.Requests > 0 {
		return Invalid(field+".burst", "must be a number where a rate is set: an unlimited burst would undo the rate")
	}
	if l.Burst > 0 && l.Rate.Requests == Unlimited {
		return Invalid(field+".burst", "needs a rate; the rate is unlimited")
	}
	if l.Burst > 0 && l.Rate.Requests > 0 && l.Rate.Interval() > math.MaxInt64/2/time.Duration(l.Burst) {
		return Invalid(field+".burst", "times the rate's interval is more than 146 years")
	}
	return validCount(field+".maxConcurrent", l.MaxConcurrent)
}

func (r Rate) validate(field string) error {
	if err := validCount(field+".requests", r.Requests); err != nil {
		return err
	}
	if r.Requests == 0 {
		return Invalid(field+".requests", "is missing")
	}
	if r.Requests == Unlimited {
		return nil
	}
	per := time.Duration(r.Per)
	if per <= 0 || per > maxPer {
		return Invalid(field+".per", "must be a duration above 0 and at most 366d, such as 60s")
	}
	// Rounded up, the interval may be at most 1 % too long, or the rate would not be the one asked for.
	if over := r.Interval()*time.Duration(r.Requests) - per; over > per/100 {
		return Invalid(field, "is too fast to keep within 1 %: at most 10000000 requests per second")
	}
	return nil
}

func validCount(field string, n int) error {
	if n < Unlimited || n > maxCount {
		return Invalid(field, "must be from 1 to 1000000000, or -1 for unlimited")
	}
	return nil
}

// Or returns l with what it does not say taken from parent, field by field.
func (l Limits) Or(parent Limits) Limits {
	if l.Rate.Requests == 0 {
		l.Rate = parent.Rate
	}
	if l.Burst == 0 {
		l.Burst = parent.Burst
	}
	if l.MaxConcurrent == 0 {
		l.MaxConcurrent = parent.MaxConcurrent
	}
	return l
}
