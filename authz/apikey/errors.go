package apikey

import (
	"errors"
	"time"
)

// What any layer may answer. Test with errors.Is and errors.AsType, never by text.
var (
	// ErrNotFound: there is no such key, instance or token.
	ErrNotFound = errors.New("not found")
	// ErrUndecided: the question could not be answered now (store away, too many loads, lease run out).
	// It is an outage, not an answer: never remember it, never turn it into a denial.
	ErrUndecided = errors.New("could not decide")
	// ErrConflict: another change got there first, or the name is taken.
	ErrConflict = errors.New("conflict")
)

// An InvalidError is a value that cannot be accepted. It names the field and says why; it never
// carries the value itself, which may be a secret.
type InvalidError struct {
	Field  string // as its user wrote it, e.g. "limits.burst"
	Reason string // e.g. "must be at least 1"
}

func (e *InvalidError) Error() string {
	if e.Field == "" {
		return e.Reason
	}
	return e.Field + ": " + e.Reason
}

// Invalid makes an *InvalidError.
func Invalid(field, reason string) error { return &InvalidError{Field: field, Reason: reason} }

// A BusyError is an [ErrUndecided] with a time: too much was asked at once, come again.
type BusyError struct {
	What       string        // e.g. "too many unknown keys"
	RetryAfter time.Duration // at least a second
}

func (e *BusyError) Error() string { return "could not decide: " + e.What }

// Unwrap makes errors.Is(e, ErrUndecided) true.
func (e *BusyError) Unwrap() error { return ErrUndecided }
