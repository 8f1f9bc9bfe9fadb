package admin_test

import (
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
	"keyward/authz/store/storetest"
)

// sealed is a desk whose audit is sealed, and kept for a time; at path, or "" for a store in memory, where the
// minutes of many days cost nothing.
func sealed(t *testing.T, path string, keep time.Duration) *desk {
	t.Helper()
	d := open(t)
	peppers := apikey.Peppers{Current: d.pepper}
	d.store = storetest.NewMemory(admin.NewAuditKeys(peppers))
	if path != "" {
		store, err := sqlite.Open(t.Context(), sqlite.Config{Path: path, Audit: admin.NewAuditKeys(peppers)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = store.Close() })
		d.store = store
	}
	d.Service = admin.New(d.store, admin.Config{Peppers: peppers, AuditKeep: keep}, nil, logOf(d))
	return d
}

func TestOldAuditEventsAreRemovedAndTheRestProvesItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := sealed(t, "", 3*24*time.Hour)
		stop := sweeping(t, d.Service, "one")
		d.instance(t, "a")
		var heads []admin.AuditHead
		for range 10 {
			d.key(t, "a")
			head, err := d.AuditHead(t.Context(), root)
			if err != nil {
				t.Fatal(err)
			}
			heads = append(heads, head)
			time.Sleep(25 * time.Hour)
		}
		stop()
		events, err := d.store.Events(t.Context(), 0, 1000)
		if err != nil {
			t.Fatal(err)
		}
		// What is kept at least is there, and of what is older at most one segment and its day.
		for _, e := range events {
			if age := time.Since(e.At); age > 6*24*time.Hour {
				t.Errorf("event %d is %v old", e.Sequence, age)
			}
		}
		removals := 0
		for _, e := range events {
			if e.Action == "audit.remove" && e.Actor == "keyward serve" && strings.HasPrefix(e.Target, "segment ") && e.Before != nil {
				removals++
			}
		}
		if removals == 0 || events[0].Sequence == 1 {
			t.Errorf("%d removals, the first event is %d", removals, events[0].Sequence)
		}
		kept := slices.ContainsFunc(events, func(e admin.Event) bool {
			return time.Since(e.At) > 3*24*time.Hour-time.Hour && e.Action == "key.create"
		})
		if !kept {
			t.Error("more was removed than is old")
		}
		report, err := d.AuditVerify(t.Context(), root, heads...)
		if err != nil || !report.Whole || report.Removed == 0 || len(report.Unproved) == 0 {
			t.Errorf("got %+v, %v", report, err)
		}
	})
}

// A slow verification does not take the removal of old events meanwhile for tampering.
func TestVerifyWhileOldEventsAreDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := sealed(t, "", 3*24*time.Hour)
		d.instance(t, "a")
		for range 10 {
			d.key(t, "a")
			time.Sleep(25 * time.Hour)
		}
		slow := admin.New(pausing{d.store}, admin.Config{Peppers: apikey.Peppers{Current: d.pepper}, AuditKeep: 3 * 24 * time.Hour}, nil, logOf(d))
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- slow.RunSweep(ctx, "one") }()
		report, err := slow.AuditVerify(t.Context(), root)
		if err != nil || !report.Whole || report.Removed != 0 {
			t.Errorf("got %+v, %v", report, err)
		}
		time.Sleep(90 * time.Minute) // the next time they are removed
		stop()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if report, err = d.AuditVerify(t.Context(), root); err != nil || !report.Whole || report.Removed == 0 {
			t.Errorf("afterwards: %+v, %v", report, err)
		}
	})
}

// pausing is a store whose audit takes hours to be read from the beginning.
type pausing struct{ admin.Store }

func (p pausing) Events(ctx context.Context, after int64, limit int) ([]admin.Event, error) {
	if after == math.MinInt64 {
		time.Sleep(2*time.Hour + time.Minute)
	}
	return p.Store.Events(ctx, after, limit)
}

// What is not as it was written is evidence: it is not removed for its age, nor is what comes after it.
func TestTamperedAuditIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.db")
		d := sealed(t, path, 24*time.Hour)
		d.instance(t, "a")
		for range 4 {
			d.key(t, "a")
			time.Sleep(25 * time.Hour)
		}
		tamper(t, path, `UPDATE audit SET actor = 'somebody else' WHERE sequence = 2`)
		stop := sweeping(t, d.Service, "one")
		time.Sleep(2 * time.Hour)
		stop()
		events, err := d.store.Events(t.Context(), 0, 1000)
		if err != nil || len(events) != 5 {
			t.Errorf("%d events are left, %v", len(events), err)
		}
		if !strings.Contains(d.log.String(), "old audit events could not be removed") || !strings.Contains(d.log.String(), "keyward audit verify") {
			t.Errorf("the log says %s", d.log)
		}
	})
}

// Without a MAC key there is no proof, and with a wrong pepper none that is believed.
func TestVerifyNeedsThePepper(t *testing.T) {
	d := sealed(t, filepath.Join(t.TempDir(), "audit.db"), 0)
	d.instance(t, "a")
	if report, err := d.AuditVerify(t.Context(), root); err != nil || !report.Whole {
		t.Fatalf("got %+v, %v", report, err)
	}
	other := admin.New(d.store, admin.Config{Peppers: apikey.Peppers{Current: apikey.NewPepper(1, false)}}, nil, logOf(d))
	if report, err := other.AuditVerify(t.Context(), root); err != nil || report.Whole {
		t.Errorf("another pepper of the same version: got %+v, %v", report, err)
	}
	for _, caller := range []admin.Caller{{Role: admin.RoleOperator}, {Role: admin.RoleUser, UserPrincipalName: "x"}, {Role: admin.RoleOwner, InstanceID: "a"}, {}} {
		if _, err := d.AuditVerify(t.Context(), caller); err == nil {
			t.Errorf("%+v may", caller)
		}
	}
}

func logOf(d *desk) *slog.Logger { return slog.New(slog.NewTextHandler(d.log, nil)) }

func tamper(t *testing.T, path, statement string) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.Exec(statement)
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}
