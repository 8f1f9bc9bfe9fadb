package usage

import (
	"log/slog"
	"strings"
	"testing"

	"keyward/authz/admin"
	"keyward/authz/store/storetest"
)

// TestAVisitIsTimedByTheMonotonicClock: a wall clock that is set back must not keep keys from being looked through. What
// is kept has wall time alone. Not in a bubble: its clock has no monotonic reading.
func TestAVisitIsTimedByTheMonotonicClock(t *testing.T) {
	store := storetest.NewMemory(admin.AuditKeys{})
	defer func() { _ = store.Close() }()
	a := NewAlerts(store, AlertsConfig{Holder: "one"}, nil, slog.New(slog.DiscardHandler))
	if err := a.lead(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(a.visited.String(), "m=") {
		t.Errorf("the visit of %v has no monotonic time", a.visited)
	}
	if at := alertTime(); strings.Contains(at.String(), "m=") {
		t.Errorf("%v is kept, and has monotonic time", at)
	}
}
