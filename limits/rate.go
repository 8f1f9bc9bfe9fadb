package limits

import (
	"math"
	"time"

	"keyward/authz/apikey"
)

// A Rate is a sustained rate and the burst allowed above it, ready to be judged: any window w admits at
// most Burst + w/Interval requests. The zero Rate limits nothing.
type Rate struct {
	Interval time.Duration // between two requests at the sustained rate
	Burst    int64         // requests that may come at once, from 1
}

// RateOf returns the rate of resolved limits, the zero Rate if they do not limit it. A burst that is
// unlimited under a limited rate means that all requests of the rate's period may come at once.
func RateOf(l apikey.Limits) Rate {
	if l.Rate.Requests <= 0 {
		return Rate{}
	}
	r := Rate{Interval: l.Rate.Interval(), Burst: int64(l.Burst)}
	if r.Burst <= 0 {
		r.Burst = int64(l.Rate.Requests)
	}
	// Fields inherit alone, so no validation saw this pair: what does not fit is 146 years away.
	r.Burst = min(r.Burst, int64(math.MaxInt64/2/r.Interval))
	return r
}

// IsZero reports whether r limits nothing.
func (r Rate) IsZero() bool { return r.Interval == 0 }

// Left is how many requests Take would let through at now, one after the other, of the bucket that will next
// be full at time full.
func (r Rate) Left(full, now int64) int64 {
	interval := int64(r.Interval)
	return max(0, (now+r.Burst*interval-max(full, now))/interval)
}

// Take spends one request from the bucket that will next be full at time full, in nanoseconds on the
// limiter's clock, and returns when it will be full after that. Where there is no room it returns full
// as it counts now and how long to wait for room; above 0 means refused. Zero as full is a bucket never
// used; now is from 0, and has more than a century to run.
//
// This is GCRA in integers. A bucket further from full than the burst reaches, because the limit was
// lowered since, counts as just empty. That is why a refusal returns full as well, and why the limiter
// keeps it: otherwise the bucket would be just empty again after the wait it was told.
func (r Rate) Take(full, now int64) (next int64, retryIn time.Duration) {
	interval := int64(r.Interval)
	full = min(max(full, now), now+r.Burst*interval)
	next = full + interval
	if over := next - (now + r.Burst*interval); over > 0 {
		return full, time.Duration(over)
	}
	return next, 0
}
