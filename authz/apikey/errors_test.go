package apikey_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"keyward/authz/apikey"
)

func TestErrors(t *testing.T) {
	invalid := fmt.Errorf("create key: %w", apikey.Invalid("limits.burst", "must be at least 1"))
	if got, ok := errors.AsType[*apikey.InvalidError](invalid); !ok || *got != (apikey.InvalidError{Field: "limits.burst", Reason: "must be at least 1"}) {
		t.Errorf("got %+v, want field and reason", got)
	}
	if got, want := invalid.Error(), "create key: limits.burst: must be at least 1"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := apikey.Invalid("", "is missing").Error(), "is missing"; got != want {
		t.Errorf("without a field: got %q, want %q", got, want)
	}

	var busy error = &apikey.BusyError{What: "too many unknown keys", RetryAfter: time.Second}
	if !errors.Is(busy, apikey.ErrUndecided) {
		t.Error("busy is not undecided: it would be taken for an answer")
	}
	if errors.Is(busy, apikey.ErrNotFound) || errors.Is(invalid, apikey.ErrUndecided) {
		t.Error("an error is another")
	}
	if got, want := busy.Error(), "could not decide: too many unknown keys"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
