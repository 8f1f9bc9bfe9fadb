package traffic

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// newSleeper returns a sleep that is exact to some microseconds. Go's own timers wait in whole
// milliseconds while a program is idle, which would send ten requests at once every millisecond instead
// of one every hundred microseconds. The calling goroutine keeps its thread until it ends.
func newSleeper() func(time.Duration) {
	runtime.LockOSThread()
	// The kernel's default lets every sleep take 50 µs more. Without this right it stays so.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	return func(d time.Duration) {
		t := unix.NsecToTimespec(int64(d))
		_ = unix.Nanosleep(&t, nil) // woken up early, the caller looks at the clock again
	}
}
