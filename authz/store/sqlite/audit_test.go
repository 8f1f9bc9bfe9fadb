package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/storetest"
)

var auditNoon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// audited makes a store with an audit of several segments, 5 events a day, the last one open.
func audited(t *testing.T, path string, days int) *Store {
	t.Helper()
	s := open(t, path)
	for day := range days {
		for n := range 5 {
			addEvent(t, s, auditNoon.Add(time.Duration(day)*25*time.Hour+time.Duration(n)*time.Minute), day)
		}
	}
	return s
}

func addEvent(t *testing.T, s *Store, at time.Time, n int) {
	t.Helper()
	e := admin.Event{
		At: at, Actor: "token:a", RemoteAddr: "192.0.2.1", Action: "key.update", Refused: "", InstanceID: "tenant", Target: fmt.Sprint(n), RequestID: "r",
		Before: json.RawMessage(`{"a":1}`), After: json.RawMessage(`{"a":2}`),
	}
	if _, err := s.Update(t.Context(), func(tx admin.Tx) error { return tx.Audit(t.Context(), e) }); err != nil {
		t.Fatal(err)
	}
}

func verifyAudit(t *testing.T, r admin.Reader, heads ...admin.AuditHead) admin.AuditReport {
	t.Helper()
	report, err := admin.VerifyAudit(t.Context(), r, storetest.AuditKeys, heads...)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// tampered changes the store behind its back, verifies, and takes it all back.
func tampered(t *testing.T, s *Store, heads []admin.AuditHead, change func(ctx context.Context, t *tx) error) admin.AuditReport {
	t.Helper()
	var report admin.AuditReport
	mine := errors.New("take it back")
	err := s.write(t.Context(), "tamper", func(x *tx) error {
		if err := change(t.Context(), x); err != nil {
			return err
		}
		report = verifyAudit(t, x, heads...)
		return mine
	})
	if !errors.Is(err, mine) {
		t.Fatal(err)
	}
	return report
}

func runs(statements ...string) func(context.Context, *tx) error {
	return func(ctx context.Context, x *tx) error {
		for _, s := range statements {
			n, err := x.exec(ctx, "tamper", s)
			if err != nil {
				return fmt.Errorf("%s: %w", s, err)
			}
			if n == 0 {
				return fmt.Errorf("%s changes nothing", s)
			}
		}
		return nil
	}
}

// TestEveryTamperingIsFound flips each field of each event and each segment, drops, doubles and swaps
// each, and cuts the audit everywhere, as one who can write the file and does not have the pepper.
func TestEveryTamperingIsFound(t *testing.T) {
	const days, last = 4, 20
	s := audited(t, file(t), days)
	if report := verifyAudit(t, s); !report.Whole || report.Events != last || report.Segments != days {
		t.Fatalf("before: %+v", report)
	}
	tried := 0
	want := func(name string, change func(context.Context, *tx) error) {
		t.Helper()
		tried++
		if report := tampered(t, s, nil, change); report.Whole || len(report.Findings) == 0 {
			t.Errorf("%s: not found", name)
		}
	}
	flips := map[string]string{
		"at": "at + 1", "actor": "'token:b'", "remote_addr": "'192.0.2.2'", "action": "'key.revoke'", "refused": "'Forbidden'", "instance_id": "'other'",
		"target": "target || 'x'", "request_id": "''", "state_before": "NULL", "state_after": "'{\"a\": 2}'", "link": "zeroblob(32)",
	}
	for n := 1; n <= last; n++ {
		for column, value := range flips {
			want(fmt.Sprintf("%s of event %d", column, n), runs(fmt.Sprintf("UPDATE audit SET %s = %s WHERE sequence = %d", column, value, n)))
		}
		want(fmt.Sprintf("no link of event %d", n), runs(fmt.Sprintf("UPDATE audit SET link = NULL WHERE sequence = %d", n)))
		want(fmt.Sprintf("event %d dropped", n), runs(fmt.Sprintf("DELETE FROM audit WHERE sequence = %d", n)))
		if n < last {
			want(fmt.Sprintf("event %d dropped, the others moved up", n), runs(fmt.Sprintf("DELETE FROM audit WHERE sequence = %d", n),
				fmt.Sprintf("UPDATE audit SET sequence = -sequence WHERE sequence > %d", n), fmt.Sprintf("UPDATE audit SET sequence = -sequence - 1 WHERE sequence < %d", -n)))
		}
		want(fmt.Sprintf("event %d moved to the end", n), runs(fmt.Sprintf("UPDATE audit SET sequence = %d WHERE sequence = %d", last+1, n)))
		want(fmt.Sprintf("event %d moved to the beginning", n), runs(fmt.Sprintf("UPDATE audit SET sequence = 0 WHERE sequence = %d", n)))
		want(fmt.Sprintf("event %d doubled at the end", n), runs(fmt.Sprintf("INSERT INTO audit (%s) SELECT %d, %s FROM audit WHERE sequence = %d",
			eventColumns, last+1, strings.TrimPrefix(eventColumns, "sequence, "), n)))
		want(fmt.Sprintf("one put in before event %d", n), runs(fmt.Sprintf("UPDATE audit SET sequence = -sequence WHERE sequence >= %d", n),
			fmt.Sprintf("UPDATE audit SET sequence = 1 - sequence WHERE sequence <= -%d", n),
			fmt.Sprintf("INSERT INTO audit (%s) SELECT %d, %s FROM audit WHERE sequence = %d", eventColumns, n, strings.TrimPrefix(eventColumns, "sequence, "), n+1)))
		want(fmt.Sprintf("cut after event %d", n-1), runs(fmt.Sprintf("DELETE FROM audit WHERE sequence >= %d", n)))
		want(fmt.Sprintf("cut up to event %d", n), runs(fmt.Sprintf("DELETE FROM audit WHERE sequence <= %d", n)))
		for m := 1; m < n; m++ {
			want(fmt.Sprintf("events %d and %d swapped", m, n), runs(fmt.Sprintf("UPDATE audit SET sequence = 0 WHERE sequence = %d", m),
				fmt.Sprintf("UPDATE audit SET sequence = %d WHERE sequence = %d", m, n), fmt.Sprintf("UPDATE audit SET sequence = %d WHERE sequence = 0", n)))
		}
		// One who knows how: from here on every link is made anew, and with them the segments, all but the MAC.
		want(fmt.Sprintf("chained anew from event %d on", n), func(ctx context.Context, x *tx) error {
			if err := runs(fmt.Sprintf("UPDATE audit SET actor = 'token:b' WHERE sequence = %d", n))(ctx, x); err != nil {
				return err
			}
			return rechain(ctx, x)
		})
		if n < last {
			want(fmt.Sprintf("cut after event %d, with the segments", n), func(ctx context.Context, x *tx) error {
				return cut(ctx, x, n)
			})
		}
	}
	for n := 1; n <= days; n++ {
		for column, value := range map[string]string{
			"first": "first + 1", "last": "last - 1", "previous": "randomblob(32)", "head": "randomblob(32)", "began_at": "began_at + 1",
			"sealed_at": "sealed_at + 1", "removed_at": "1", "pepper_version": "pepper_version + 1", "mac": "randomblob(32)", "number": "number + 10",
		} {
			want(fmt.Sprintf("%s of segment %d", column, n), runs(fmt.Sprintf("UPDATE audit_segments SET %s = %s WHERE number = %d", column, value, n)))
		}
		want(fmt.Sprintf("segment %d without its MAC", n), runs(fmt.Sprintf("UPDATE audit_segments SET mac = zeroblob(32), pepper_version = 0 WHERE number = %d", n)))
		want(fmt.Sprintf("segment %d dropped", n), runs(fmt.Sprintf("DELETE FROM audit_segments WHERE number = %d", n)))
		want(fmt.Sprintf("segment %d dropped with its events", n), runs(fmt.Sprintf("DELETE FROM audit_segments WHERE number = %d", n),
			fmt.Sprintf("DELETE FROM audit WHERE sequence BETWEEN %d AND %d", 5*n-4, 5*n)))
		want(fmt.Sprintf("events of segment %d removed in its name", n), runs(fmt.Sprintf("UPDATE audit_segments SET removed_at = 1 WHERE number = %d", n),
			fmt.Sprintf("DELETE FROM audit WHERE sequence BETWEEN %d AND %d", 5*n-4, 5*n)))
		if n > 1 {
			want(fmt.Sprintf("segments from %d on dropped with their events", n), runs(fmt.Sprintf("DELETE FROM audit_segments WHERE number >= %d", n),
				fmt.Sprintf("DELETE FROM audit WHERE sequence > %d", 5*n-5), fmt.Sprintf("UPDATE meta SET revision = %d", 5*n-5)))
		}
	}
	want("all segments dropped", runs("DELETE FROM audit_segments"))
	want("everything dropped", runs("DELETE FROM audit_segments", "DELETE FROM audit"))
	for _, left := range []string{
		"INSERT INTO peppers VALUES (1, zeroblob(16))", "INSERT INTO instances (id, policy, created_at, revision) VALUES ('tenant', '{}', 1, 1)",
		"INSERT INTO tokens (id, name, role, instance_id, hint, created_at, created_by, expires_at, revoked_at, bootstrap) VALUES (zeroblob(16), '', '', '', '', 1, '', 1, 1, 0)",
	} {
		want("everything dropped, and the number of changes with it, but: "+left, runs(left, "DELETE FROM audit_segments", "DELETE FROM audit", "UPDATE meta SET revision = 0"))
	}
	t.Logf("%d ways", tried)
	if report := verifyAudit(t, s); !report.Whole {
		t.Errorf("afterwards: %+v", report)
	}
}

// rechain makes every link and segment anew, as one without the pepper can.
func rechain(ctx context.Context, x *tx) error {
	all, err := x.Events(ctx, 0, 1000)
	if err != nil {
		return err
	}
	segments, err := x.AuditSegments(ctx)
	if err != nil {
		return err
	}
	var link admin.Link
	for i := range all {
		link = all[i].LinkAfter(link)
		all[i].Link = link
		if _, err := x.exec(ctx, "rechain", `UPDATE audit SET link = ? WHERE sequence = ?`, link[:], all[i].Sequence); err != nil {
			return err
		}
	}
	link = admin.Link{}
	for i := range segments {
		segments[i].Previous = link
		link = all[segments[i].Last-1].Link
		segments[i].Head = link
		if err := x.putSegment(ctx, &segments[i]); err != nil {
			return err
		}
	}
	return nil
}

// cut removes what came after an event, and makes the segments look as they did then, all but the MAC.
func cut(ctx context.Context, x *tx, last int) error {
	all, err := x.Events(ctx, 0, 1000)
	if err != nil {
		return err
	}
	segments, err := x.AuditSegments(ctx)
	if err != nil {
		return err
	}
	if err := runs(fmt.Sprintf("DELETE FROM audit WHERE sequence > %d", last), fmt.Sprintf("UPDATE meta SET revision = %d", last))(ctx, x); err != nil {
		return err
	}
	for i := range segments {
		one := &segments[i]
		switch {
		case one.First > int64(last):
			_, err = x.exec(ctx, "cut", `DELETE FROM audit_segments WHERE number = ?`, one.Number)
		case one.Last >= int64(last):
			one.Last, one.Head, one.SealedAt = int64(last), all[last-1].Link, time.Time{}
			err = x.putSegment(ctx, one)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// A whole older copy proves itself: only a head that was exported finds it.
func TestOlderCopyIsFoundByAnExportedHead(t *testing.T) {
	path := file(t)
	s := audited(t, path, 2)
	older, err := s.AuditSegments(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	addEvent(t, s, auditNoon.Add(26*time.Hour), 1)
	head := verifyAudit(t, s).Head
	rollBack := func(ctx context.Context, x *tx) error {
		if err := runs("DELETE FROM audit WHERE sequence > 10", "DELETE FROM audit_segments", "UPDATE meta SET revision = 10")(ctx, x); err != nil {
			return err
		}
		for i := range older {
			if err := x.putSegment(ctx, &older[i]); err != nil {
				return err
			}
		}
		return nil
	}
	if report := tampered(t, s, nil, rollBack); !report.Whole {
		t.Errorf("an older copy is no fault in itself: %+v", report.Findings)
	}
	if report := tampered(t, s, []admin.AuditHead{head}, rollBack); report.Whole {
		t.Error("the exported head does not find the older copy")
	}
	forged := head
	forged.Link[0]++
	if report := verifyAudit(t, s, forged); report.Whole {
		t.Error("a head with another link goes through")
	}
	addEvent(t, s, auditNoon.Add(26*time.Hour), 2)
	if report := verifyAudit(t, s, head); !report.Whole {
		t.Errorf("a good head of earlier: %+v", report.Findings)
	}
}

// What was cut off is not covered up by what the server writes afterwards, and the server goes on.
func TestServerDoesNotSealWhatItDidNotWrite(t *testing.T) {
	for name, change := range map[string]func(context.Context, *tx) error{
		"cut within the open segment": func(ctx context.Context, x *tx) error { return cut(ctx, x, 8) },
		"cut to a sealed segment":     func(ctx context.Context, x *tx) error { return cut(ctx, x, 3) },
		"the open segment dropped":    runs("DELETE FROM audit_segments WHERE number = 2"),
		"all segments dropped":        runs("DELETE FROM audit_segments"),
		"the segment says less":       runs("UPDATE audit_segments SET last = last - 1 WHERE number = 2"),
		"chained anew": func(ctx context.Context, x *tx) error {
			if err := runs("UPDATE audit SET actor = 'token:b' WHERE sequence = 9")(ctx, x); err != nil {
				return err
			}
			return rechain(ctx, x)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := file(t)
			s := audited(t, path, 2)
			if err := s.write(t.Context(), "tamper", func(x *tx) error { return change(t.Context(), x) }); err != nil {
				t.Fatal(err)
			}
			for n := range 12 {
				addEvent(t, s, auditNoon.Add(50*time.Hour), n)
			}
			if report := verifyAudit(t, s); report.Whole {
				t.Error("covered up")
			}
			if err := s.SealAudit(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if report := verifyAudit(t, open(t, path)); report.Whole {
				t.Error("covered up by a restart")
			}
		})
	}
}

// After a rotation the audit proves itself with the new pepper alone.
func TestAuditIsResealedUnderTheNextPepper(t *testing.T) {
	path := file(t)
	first, second := apikey.NewPepper(1, false), apikey.NewPepper(2, false)
	with := func(p apikey.Peppers, fn func(s *Store, keys admin.AuditKeys)) {
		t.Helper()
		keys := admin.NewAuditKeys(p)
		s, err := Open(t.Context(), Config{Path: path, Audit: keys})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}()
		if err := admin.OpenPeppers(t.Context(), s, p, "test"); err != nil {
			t.Fatal(err)
		}
		fn(s, keys)
	}
	whole := func(s *Store, keys admin.AuditKeys) {
		t.Helper()
		report, err := admin.VerifyAudit(t.Context(), s, keys)
		if err != nil || !report.Whole {
			t.Errorf("got %+v, error %v", report, err)
		}
	}
	with(apikey.Peppers{Current: first}, func(s *Store, keys admin.AuditKeys) {
		for day := range 3 {
			addEvent(t, s, time.Now().Add(time.Duration(day)*25*time.Hour), day)
		}
		whole(s, keys)
	})
	with(apikey.Peppers{Current: second, Previous: first}, whole)
	with(apikey.Peppers{Current: second}, func(s *Store, keys admin.AuditKeys) {
		whole(s, keys)
		report, err := admin.VerifyAudit(t.Context(), s, admin.NewAuditKeys(apikey.Peppers{Current: apikey.NewPepper(2, false)}))
		if err != nil || report.Whole {
			t.Errorf("another pepper: got %+v, error %v", report, err)
		}
	})
}

// Events from before there was a chain come first in it, as they were.
func TestEventsOfTheFirstSchemaAreChained(t *testing.T) {
	path := file(t)
	s := audited(t, path, 2)
	before, err := s.Events(t.Context(), 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	undo := slices.Concat([]string{
		"DROP TABLE usage", "DROP TABLE usage_writers", "DROP TABLE instance_numbers", "ALTER TABLE keys DROP COLUMN last_used_network", "ALTER TABLE keys DROP COLUMN last_used_path",
		"DROP TABLE alerts", "DROP TABLE notices", "DROP TABLE key_networks", "DROP TABLE sessions",
		"DROP TABLE quota_states", "ALTER TABLE instances DROP COLUMN quotas", "ALTER TABLE keys DROP COLUMN quotas",
		"DROP TABLE agent_hashes", "DROP TABLE audit_segments", "ALTER TABLE meta DROP COLUMN leapt", "DROP TABLE idempotency", "ALTER TABLE tokens DROP COLUMN user_principal_name", "ALTER TABLE tokens DROP COLUMN last_used_at",
	}, func() (drops []string) {
		for _, index := range []string{
			"audit_at", "audit_instance", "audit_actor", "audit_action", "audit_target", "audit_refused",
			"keys_by_type_and_name", "keys_by_type_and_use", "keys_by_type_and_expiry", "keys_by_type_and_idleness",
			"keys_by_status_and_name", "keys_by_status_and_expiry", "keys_by_status_and_idleness",
		} {
			drops = append(drops, "DROP INDEX "+index)
		}
		return append(drops, "ALTER TABLE audit DROP COLUMN refused", "ALTER TABLE audit DROP COLUMN link", "DELETE FROM goose_db_version WHERE version_id >= 4")
	}())
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	for _, statement := range undo {
		if _, err := db.Exec(statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path)
	for range 2 { // again is nothing
		if err := s.SealAudit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if report := verifyAudit(t, s); !report.Whole || report.Events != 11 {
		t.Errorf("got %+v", report)
	}
	after, err := s.Events(t.Context(), 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	if len(after) != 11 || after[10].Action != "audit.begin" || !strings.Contains(string(after[10].After), `"events":10`) {
		t.Fatalf("the last event is %+v", after[len(after)-1])
	}
	for i, e := range before {
		if after[i].Link != e.Link || after[i].Sequence != e.Sequence { // the content goes into the link
			t.Errorf("event %d: got %+v, want %+v", i, after[i], e)
		}
	}
	addEvent(t, s, time.Now(), 1)
	if report := verifyAudit(t, s); !report.Whole {
		t.Errorf("got %+v", report)
	}
}

func TestAuditQueriesUseAnIndex(t *testing.T) {
	s := open(t, file(t))
	for name, c := range map[string]struct {
		filter admin.EventFilter
		want   string
	}{
		"all":       {admin.EventFilter{}, "audit_at"},
		"time":      {admin.EventFilter{From: auditNoon, To: auditNoon}, "audit_at"},
		"actor":     {admin.EventFilter{Actor: "a"}, "audit_actor"},
		"action":    {admin.EventFilter{Action: "a"}, "audit_action"},
		"instance":  {admin.EventFilter{InstanceID: "a"}, "audit_instance"},
		"target":    {admin.EventFilter{Target: "a"}, "audit_target"},
		"refused":   {admin.EventFilter{Outcome: admin.OutcomeRefused}, "audit_refused"},
		"with more": {admin.EventFilter{InstanceID: "a", From: auditNoon, Outcome: admin.OutcomeDone}, "audit_instance"},
	} {
		t.Run(name, func(t *testing.T) {
			query, args := findEvents(c.filter, admin.EventPlace{At: auditNoon, Sequence: 1}, 10)
			rows, err := s.readers.QueryContext(t.Context(), "EXPLAIN QUERY PLAN "+query, args...)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = rows.Close() }()
			var plan []string
			for rows.Next() {
				var id, parent, unused int
				var detail string
				if err := rows.Scan(&id, &parent, &unused, &detail); err != nil {
					t.Fatal(err)
				}
				plan = append(plan, detail)
			}
			text := strings.Join(plan, "; ")
			if err := rows.Err(); err != nil || !strings.Contains(text, "USING INDEX "+c.want+" ") || strings.Contains(text, "SCAN") || strings.Contains(text, "TEMP B-TREE") {
				t.Errorf("got the plan %q and error %v, want it to use %s", text, err, c.want)
			}
		})
	}
}
