package cache

import (
	"sync/atomic"
	"time"
)

// A lease is the right to answer from the cache. It begins before the poll that renewed it, so that it
// ends before the store believes so. Safe for concurrent use.
type lease struct {
	length, grace time.Duration
	clock         func() instant
	since         atomic.Pointer[instant] // nil: none
}

// An instant is one moment on two clocks, in nanoseconds.
type instant struct{ mono, wall int64 }

func systemClock() func() instant {
	base := time.Now()
	return func() instant {
		now := time.Now()
		return instant{mono: int64(now.Sub(base)), wall: now.UnixNano()}
	}
}

type phase int

// The phases, in the order of what they allow.
const (
	leaseOut   phase = iota // nothing is answered
	leaseGrace              // keys that are held are answered
	leaseHeld               // everything is answered
)

func (l *lease) renew(since instant) { l.since.Store(&since) }

func (l *lease) drop() { l.since.Store(nil) }

func (l *lease) phase() phase {
	since := l.since.Load()
	if since == nil {
		return leaseOut
	}
	now := l.clock()
	mono, wall := now.mono-since.mono, now.wall-since.wall
	if mono < 0 || wall < 0 { // a clock that went back can vouch for nothing
		return leaseOut
	}
	switch gone := time.Duration(max(mono, wall)); {
	case gone < l.length:
		return leaseHeld
	case gone < l.length+l.grace:
		return leaseGrace
	}
	return leaseOut
}
