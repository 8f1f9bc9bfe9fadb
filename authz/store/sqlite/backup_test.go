package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/storetest"
)

func TestBackupWhileWriting(t *testing.T) {
	ctx := t.Context()
	s := open(t, file(t))
	for n := range 20 {
		mustCreate(t, s, n+1)
	}
	canary := []byte(strings.Repeat("sealed canary ", 100))
	_, err := s.Update(ctx, func(tx admin.Tx) error {
		return errors.Join(tx.KeepReplay(ctx, admin.ReplayID{1}, canary, time.Now(), time.Now().Add(time.Hour)), tx.Audit(ctx, admin.Event{}))
	})
	if err != nil {
		t.Fatal(err)
	}
	stop, cancel := context.WithCancel(ctx)
	var writer sync.WaitGroup
	writer.Go(func() {
		for n := 100; stop.Err() == nil; n++ {
			if _, err := createKey(ctx, s, n); err != nil {
				t.Errorf("a write during the backup: %v", err)
				return
			}
		}
	})
	to := filepath.Join(t.TempDir(), "backup.db")
	if err := Backup(ctx, s.path, to); err != nil {
		t.Fatal(err)
	}
	cancel()
	writer.Wait()
	if err := Check(ctx, to); err != nil {
		t.Error(err)
	}
	info, err := os.Stat(to)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, error %v; want 0600", info.Mode(), err)
	}
	names, err := os.ReadDir(filepath.Dir(to))
	if err != nil || len(names) != 1 {
		t.Errorf("files beside the backup: %v", names)
	}
	content, err := os.ReadFile(to)
	if err != nil || strings.Contains(string(content), "sealed canary") {
		t.Errorf("a sealed secret is in the backup (error %v)", err)
	}
	wantError(t, Backup(ctx, s.path, to), to, "is there already")

	restored := file(t)
	done, err := Restore(ctx, to, Config{Path: restored, Audit: storetest.AuditKeys}, "test", false)
	if err != nil || done.Replaced != "" || time.Since(done.TakenAt) > time.Minute {
		t.Fatalf("got %+v and error %v", done, err)
	}
	r := open(t, restored)
	keys, err := r.Keys(ctx, "tenant", admin.KeyQuery{Limit: 1_000_000})
	if err != nil || len(keys) < 20 {
		t.Fatalf("%d keys are in it, error %v; want at least the 20 from before", len(keys), err)
	}
	counts, err := r.CountKeys(ctx, "tenant", admin.KeyOwner{}, time.Now())
	if err != nil || counts.Total != len(keys) {
		t.Errorf("it counts %d keys, and has %d (error %v)", counts.Total, len(keys), err)
	}
	// A key and its event are of one moment; one is that of the kept answer.
	events, err := r.Events(ctx, 0, 1_000_000)
	if err != nil || len(events) != len(keys)+2 || events[len(keys)+1].Action != "store.restore" || events[len(keys)+1].Actor != "test" {
		t.Errorf("%d events for %d keys, error %v", len(events), len(keys), err)
	}
}

func TestRestoreGoesOnFromTheBackup(t *testing.T) {
	ctx := t.Context()
	path := file(t)
	s := open(t, path)
	mustCreate(t, s, 1)
	ago := func(days int) time.Time { return time.Now().Add(-time.Duration(days) * 24 * time.Hour) }
	_, err := s.Update(ctx, func(tx admin.Tx) error {
		return errors.Join(tx.Audit(ctx, admin.Event{At: time.Now()}),
			tx.InsertKey(ctx, &apikey.Key{ID: keyID(2), InstanceID: "tenant", CreatedAt: ago(29), InactivityDays: 30}),
			tx.InsertKey(ctx, &apikey.Key{ID: keyID(5), InstanceID: "tenant", CreatedAt: ago(100), InactivityDays: 30}), // is idle
			tx.InsertKey(ctx, &apikey.Key{ID: keyID(6), InstanceID: "tenant", CreatedAt: ago(100)}))
	})
	if err != nil {
		t.Fatal(err)
	}
	backup := filepath.Join(t.TempDir(), "backup.db")
	if err := Backup(ctx, s.path, backup); err != nil {
		t.Fatal(err)
	}
	// Used after the backup, which does not know of it.
	if err := s.Touch(ctx, []apikey.Use{{KeyID: keyID(2), At: time.Now()}}); err != nil {
		t.Fatal(err)
	}
	later := mustCreate(t, s, 3)
	if _, err := Restore(ctx, backup, Config{Path: path, Audit: storetest.AuditKeys}, "test", true); err == nil {
		t.Fatal("a store in use was replaced")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = Restore(ctx, backup, Config{Path: path, Audit: storetest.AuditKeys}, "test", false)
	wantError(t, err, path, "is there already")
	for _, left := range []string{".restoring", ".restoring.partial"} { // by one that was killed
		if err := os.WriteFile(path+left, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	done, err := Restore(ctx, backup, Config{Path: path, Audit: storetest.AuditKeys}, "test", true)
	if err != nil {
		t.Fatal(err)
	}
	if err := Check(ctx, done.Replaced); err != nil {
		t.Errorf("what was there before: %v", err)
	}
	for _, name := range []string{path + ".restoring", path + ".restoring.lock", path + "-wal"} {
		if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
	r := open(t, path)
	if _, err := r.Key(ctx, "tenant", keyID(3)); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("a key from after the backup: %v", err)
	}
	if next := mustCreate(t, r, 4); next <= later {
		t.Errorf("revision %d after the restoration, %d was given before", next, later)
	}
	if _, _, truncated, err := r.Changes(ctx, later); err != nil || !truncated {
		t.Errorf("a replica from before the restoration is not told to forget all it knows: %v", err)
	}
	k, err := r.Key(ctx, "tenant", keyID(2))
	if err != nil || k.IdleAt(time.Now().Add(29*24*time.Hour), k.LastUsedAt) || !k.IdleAt(time.Now().Add(31*24*time.Hour), k.LastUsedAt) {
		t.Errorf("idle from %v, error %v: lost uses must not end it, and it must end", k.IdleFrom, err)
	}
	if k, err = r.Key(ctx, "tenant", keyID(5)); err != nil || k.StatusAt(time.Now()) != apikey.StatusIdle {
		t.Errorf("got %+v and error %v: the restoration gave life to a key that was idle for too long", k, err)
	}
	unused, err := r.Keys(ctx, "tenant", admin.KeyQuery{KeyFilter: admin.KeyFilter{UnusedSince: ago(90)}, Limit: 9})
	if err != nil || len(unused) != 1 || unused[0].ID != keyID(5) {
		t.Errorf("unused for 90 days: got %+v and error %v; of the others nobody knows", unused, err)
	}
}

// TestRestoreLeavesNoStrayLog: the log of a store that was killed, and whose file was then removed, is not
// played into the restored store.
func TestRestoreLeavesNoStrayLog(t *testing.T) {
	ctx := t.Context()
	path := file(t)
	s := open(t, path)
	mustCreate(t, s, 1)
	backup := filepath.Join(t.TempDir(), "backup.db")
	if err := Backup(ctx, s.path, backup); err != nil {
		t.Fatal(err)
	}
	for n := range 40 {
		mustCreate(t, s, n+2)
	}
	log, err := os.ReadFile(path + "-wal") // as a kill would leave it
	if err != nil || len(log) == 0 {
		t.Fatalf("a log of %d bytes, error %v", len(log), err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(path), os.WriteFile(path+"-wal", log, 0o600)); err != nil {
		t.Fatal(err)
	}
	done, err := Restore(ctx, backup, Config{Path: path, Audit: storetest.AuditKeys}, "test", false)
	if err != nil || done.Replaced != "" {
		t.Fatalf("got %+v and error %v", done, err)
	}
	if err := Check(ctx, path); err != nil {
		t.Error(err)
	}
	keys, err := open(t, path).Keys(ctx, "tenant", admin.KeyQuery{Limit: 99})
	if err != nil || len(keys) != 1 {
		t.Errorf("%d keys, error %v; the backup has one", len(keys), err)
	}
}

// TestRestoredAuditProvesItself: what the backup has is proved in the restored copy, and goes on; what came
// after it is missed by whoever kept a head.
func TestRestoredAuditProvesItself(t *testing.T) {
	ctx := t.Context()
	path := file(t)
	peppers := apikey.Peppers{Current: apikey.NewPepper(1, false)}
	cfg := Config{Path: path, Audit: admin.NewAuditKeys(peppers)}
	reopen := func(peppers apikey.Peppers) *Store {
		t.Helper()
		s, err := Open(ctx, Config{Path: path, Audit: admin.NewAuditKeys(peppers)})
		if err == nil {
			err = admin.OpenPeppers(ctx, s, peppers, "test")
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	s := reopen(peppers)
	_, err := s.Update(ctx, func(tx admin.Tx) error {
		return errors.Join(tx.Audit(ctx, admin.Event{}), tx.InsertToken(ctx, &admin.Token{ID: keyID(1)}, peppers.Current.Digest("t"), 1))
	})
	if err != nil {
		t.Fatal(err)
	}
	for day := range 3 {
		addEvent(t, s, time.Now().Add(time.Duration(day)*25*time.Hour), day)
	}
	verify := func(s *Store, peppers apikey.Peppers, heads ...admin.AuditHead) admin.AuditReport {
		t.Helper()
		report, err := admin.VerifyAudit(ctx, s, admin.NewAuditKeys(peppers), heads...)
		if err != nil {
			t.Fatal(err)
		}
		return report
	}
	backup := filepath.Join(t.TempDir(), "backup.db")
	if err := Backup(ctx, s.path, backup); err != nil {
		t.Fatal(err)
	}
	before := verify(s, peppers)
	addEvent(t, s, time.Now().Add(100*time.Hour), 4)
	after := verify(s, peppers)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}

	for name, keys := range map[string]admin.AuditKeys{
		"another pepper of the version": admin.NewAuditKeys(apikey.Peppers{Current: apikey.NewPepper(1, false)}),
		"a newer pepper alone":          admin.NewAuditKeys(apikey.Peppers{Current: apikey.NewPepper(2, false)}),
		"no pepper":                     {},
	} {
		if _, err := Restore(ctx, backup, Config{Path: path, Audit: keys}, "test", true); err == nil || !strings.Contains(err.Error(), "pepper") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if now, err := os.ReadFile(path); err != nil || !slices.Equal(content, now) {
		t.Errorf("the store was changed (error %v)", err)
	}

	if _, err := Restore(ctx, backup, cfg, "test", true); err != nil {
		t.Fatal(err)
	}
	s = reopen(peppers)
	if report := verify(s, peppers, before.Head); !report.Whole || report.Segments < 3 || report.Events != before.Events+1 {
		t.Errorf("restored: got %+v", report)
	}
	if report := verify(s, peppers, after.Head); report.Whole {
		t.Error("nobody misses what came after the backup")
	}
	addEvent(t, s, time.Now(), 5)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// The same backup, after the pepper was rotated.
	rotated := apikey.Peppers{Previous: peppers.Current, Current: apikey.NewPepper(2, false)}
	if _, err := Restore(ctx, backup, Config{Path: path, Audit: admin.NewAuditKeys(rotated)}, "test", true); err != nil {
		t.Fatal(err)
	}
	if report := verify(reopen(rotated), rotated, before.Head); !report.Whole {
		t.Errorf("restored under the next pepper: got %+v", report)
	}
}

func TestDamagedBackupChangesNothing(t *testing.T) {
	ctx := t.Context()
	path := file(t)
	s := open(t, path)
	for n := range 50 {
		mustCreate(t, s, n+1)
	}
	backup := filepath.Join(t.TempDir(), "backup.db")
	if err := Backup(ctx, s.path, backup); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(backup)
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flipped := slices.Clone(whole)
	for i := 4096 * 3; i < 4096*3+200; i++ {
		flipped[i] ^= 0xff
	}
	for name, content := range map[string][]byte{
		"cut":                   whole[:len(whole)/2],
		"flipped":               flipped,
		"empty":                 nil,
		"text":                  []byte("not a database at all, however long the text may be"),
		"another's application": append(append(slices.Clone(whole[:68]), 0, 0, 0, 1), whole[72:]...),
	} {
		bad := filepath.Join(t.TempDir(), "bad.db")
		if err := os.WriteFile(bad, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Restore(ctx, bad, Config{Path: path, Audit: storetest.AuditKeys}, "test", true); err == nil {
			t.Errorf("%s: restored", name)
		} else if damaged := name == "cut" || name == "flipped" || name == "text"; errors.Is(err, ErrDamaged) != damaged {
			t.Errorf("%s: got %v, which is called damage: %t", name, err, !damaged)
		}
	}
	if _, err := Restore(ctx, filepath.Join(t.TempDir(), "none"), Config{Path: path, Audit: storetest.AuditKeys}, "test", true); err == nil {
		t.Error("none: restored")
	}
	if after, err := os.ReadFile(path); err != nil || !slices.Equal(before, after) {
		t.Errorf("the store was changed (error %v)", err)
	}
	if names, err := os.ReadDir(filepath.Dir(path)); err != nil || len(names) != 2 { // and its lock
		t.Errorf("files left beside the store: %v, %v", names, err)
	}
}

// TestMigrationFromTheFirstSchema: what was written before the second migration comes through it.
func TestMigrationFromTheFirstSchema(t *testing.T) {
	ctx := t.Context()
	path := file(t)
	if err := create(path); err != nil {
		t.Fatal(err)
	}
	script, err := migrations.ReadFile("migrations/00001_init.sql")
	if err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", uri(path, "rw", "journal_mode(WAL)"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.ExecContext(ctx, string(script)+`
		CREATE TABLE goose_db_version (id INTEGER PRIMARY KEY AUTOINCREMENT, version_id INTEGER NOT NULL, is_applied INTEGER NOT NULL, tstamp TIMESTAMP DEFAULT (datetime('now')));
		INSERT INTO goose_db_version (version_id, is_applied) VALUES (0, 1), (1, 1);
		PRAGMA application_id = 1802990180;
		UPDATE meta SET revision = 7;
		INSERT INTO instances VALUES ('tenant', '{}', 1, 1);
		INSERT INTO keys VALUES
			(x'00000000000000010000000000000000', 'tenant', 'user', 'one', '', '', 'ann', '', 'null', 'null', '{}', -62135596800000000, 0, -62135596800000000, 'null', 1, -62135596800000000, '', 5, 'c', -62135596800000000),
			(x'00000000000000020000000000000000', 'tenant', 'instance', 'two', '', '', '', '', 'null', 'null', '{}', 99, 3, -62135596800000000, 'null', 0, 8, 'lost', 6, 'c', 7);
		INSERT INTO generations VALUES (x'00000000000000010000000000000000', 1, 'h', 5, -62135596800000000, -62135596800000000);`)
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	steps, err := Migrations(ctx, path)
	if err != nil || len(steps) < 2 || steps[0].AppliedAt.IsZero() || !steps[1].AppliedAt.IsZero() {
		t.Fatalf("before: got %+v and error %v", steps, err)
	}
	if steps, err = Migrate(ctx, path); err != nil || steps[1].AppliedAt.IsZero() || time.Since(steps[1].AppliedAt) > time.Hour {
		t.Fatalf("after: got %+v and error %v", steps, err)
	}
	s := open(t, path)
	keys, err := s.Keys(ctx, "tenant", admin.KeyQuery{Limit: 10})
	if err != nil || len(keys) != 2 || keys[0].Name != "two" || keys[0].Revision != 7 || keys[1].Generations[0].Revoked || !keys[1].IdleFrom.IsZero() || !keys[1].LeakReportedAt.IsZero() {
		t.Errorf("got %+v and error %v", keys, err)
	}
	for owner, want := range map[admin.KeyOwner]admin.KeyCounts{
		{}: {Total: 2, Usable: 1, Disabled: 1, Revoked: 1}, {Type: apikey.TypeUser, Name: "ann"}: {Total: 1, Usable: 1, Disabled: 1},
	} {
		if got, err := s.CountKeys(ctx, "tenant", owner, time.Now()); err != nil || got != want {
			t.Errorf("%+v: got %+v and error %v, want %+v", owner, got, err, want)
		}
	}
	if _, err := Migrations(ctx, path); err == nil {
		t.Error("a store in use was looked into")
	}
	if _, err := Migrations(ctx, file(t)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no store: %v", err)
	}
}
