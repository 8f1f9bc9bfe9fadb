//go:build !linux

package traffic

import "time"

// newSleeper returns a sleep. It may be a millisecond late.
func newSleeper() func(time.Duration) { return time.Sleep }
