package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/pressly/goose/v3"

	"keyward/authz/admin"
)

const (
	partialSuffix = ".partial" // of a file that is not whole yet
	// revisionLeap is how far a restored store goes beyond the backup's revision: nobody may take a
	// revision from after the backup for one of those that come now.
	revisionLeap = 1_000_000
)

// leftOut are the tables whose rows do not go into backups: sealed secrets that are to be gone soon, who is
// signed in, and what the webhook was about to be told.
var leftOut = []string{"idempotency", "sessions", "notices"}

// Backup writes all that is committed in the store at path to a new file, of mode 0600. It takes no lock: a
// process that has the store open, this one or another on this machine, goes on and is not held up, and what
// it commits meanwhile is not in the backup. The new file is whole or not there: it gets its name last. It
// holds digests, no secret and no pepper: keep the pepper's file beside it, elsewhere.
//
// The file itself is read, not a server asked for it: all digests and the audit never go over a network,
// and a backup can also be taken of a server that does not answer any more.
func Backup(ctx context.Context, path, to string) error {
	path, err := resolve(path)
	if err != nil {
		return err
	}
	fresh, err := inspect(ctx, path)
	if err != nil {
		return err
	}
	if fresh {
		return fmt.Errorf("store: %s holds nothing", path)
	}
	if err := copyTo(ctx, path, to); err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	return nil
}

// copyTo copies a database, which may be in use, to a new file.
func copyTo(ctx context.Context, from, to string) (err error) {
	for _, path := range []*string{&from, &to} { // SQLite takes no other in what names a database to it
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	if _, err := os.Lstat(to); err == nil {
		return fmt.Errorf("%s is there already: name a new file, or remove it", to)
	}
	partial := to + partialSuffix
	file, err := os.OpenFile(partial, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already: another copy is being written, or one was interrupted; if none is, remove it", partial)
	}
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, file.Close())
		if err != nil {
			_ = os.Remove(partial)
		}
	}()
	if err := vacuumInto(ctx, from, partial); err != nil {
		return err
	}
	if err := dropLeftOut(ctx, partial); err != nil {
		return fault(partial, "copy", err)
	}
	if err := file.Sync(); err != nil {
		return err
	}
	if err := os.Link(partial, to); err != nil { // which, unlike a rename, replaces nothing
		return err
	}
	if err := os.Remove(partial); err != nil {
		return err
	}
	return syncFolder(to)
}

// vacuumInto copies what is committed into an empty file: one snapshot, without free pages.
func vacuumInto(ctx context.Context, from, to string) (err error) {
	db, err := sql.Open("sqlite", uri(from, "ro"))
	if err != nil {
		return fault(from, "copy", err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if _, err := db.ExecContext(ctx, `VACUUM INTO ?`, to); err != nil {
		return fault(to, "copy "+from, err)
	}
	return nil
}

// dropLeftOut empties the tables that are left out, and leaves nothing of them in free pages.
func dropLeftOut(ctx context.Context, path string) (err error) {
	db, err := sql.Open("sqlite", uri(path, "rw", "secure_delete(1)", "synchronous(FULL)"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	for _, table := range leftOut {
		var there bool
		if err := db.QueryRowContext(ctx, `SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = ?`, table).Scan(&there); err != nil {
			return err
		}
		if there {
			if _, err := db.ExecContext(ctx, `DELETE FROM `+table); err != nil { //nolint:gosec // G202: a name of ours
				return err
			}
		}
	}
	return nil
}

// syncFolder makes the new name of a file outlive a power cut.
func syncFolder(path string) error {
	folder, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}

// A Restored says what was restored.
type Restored struct {
	TakenAt  time.Time // of the newest event in the backup: what was done later is not in it, revocations included
	Replaced string    // where the store that was there before is now; "" if there was none
}

// Restore makes the store that cfg names from a backup. A store that is there already is refused, unless
// replace: it is then moved aside, not removed. No process may have it open. cfg.Audit must be of the pepper
// that the backup's keys are found with: the restoration is an event, and the audit must go on as it was.
//
// What the backup does not know is lost: keys that were revoked since work again, until they are revoked
// anew. So that lost uses end no key, and make none look unused, idleness counts from the restoration at the
// earliest; what was idle for too long when the backup was taken stays so. The backup is
// checked first, whole; if it is damaged, or the pepper is another one, nothing is changed. actor is who the
// audit says did it.
func Restore(ctx context.Context, backup string, cfg Config, actor string, replace bool) (done Restored, err error) {
	path, err := resolve(cfg.Path)
	if err != nil {
		return Restored{}, err
	}
	held, err := lock(path)
	if err != nil {
		return Restored{}, err
	}
	defer func() { err = errors.Join(err, held.Close()) }()
	if err := Check(ctx, backup); err != nil {
		return Restored{}, fmt.Errorf("restore: %w", err)
	}
	_, statErr := os.Lstat(path)
	occupied := statErr == nil
	if occupied && !replace {
		return Restored{}, fmt.Errorf("%s is there already: stop what uses it, and say that it is to be replaced (it is kept beside)", path)
	}
	// Made ready under another name: until the last step nothing has changed.
	fresh := path + ".restoring"
	sweep := func() { // what is left after a success is the lock; before, the rest of one that was interrupted
		for _, suffix := range []string{"", "-wal", "-shm", ".lock", partialSuffix} {
			_ = os.Remove(fresh + suffix)
		}
	}
	sweep()
	defer sweep()
	if err := copyTo(ctx, backup, fresh); err != nil {
		return Restored{}, fmt.Errorf("restore: %w", err)
	}
	if done.TakenAt, err = adopt(ctx, Config{Path: fresh, Audit: cfg.Audit}, backup, actor); err != nil {
		return Restored{}, err
	}
	// With its log, if it has one: that belongs to it and to no other file. A log whose file is gone is moved
	// as well: SQLite would write it over the restored store.
	aside := fmt.Sprintf("%s.replaced-%s", path, time.Now().UTC().Format("20060102T150405.000000Z"))
	for _, suffix := range []string{"-wal", "-shm", ""} {
		if err := os.Rename(path+suffix, aside+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return Restored{}, err
		}
	}
	if occupied {
		done.Replaced = aside
	}
	if err := os.Rename(fresh, path); err != nil {
		return Restored{}, err
	}
	return done, syncFolder(path)
}

// adopt makes a copy of a backup a store that goes on, and returns when its newest event was.
func adopt(ctx context.Context, cfg Config, backup, actor string) (takenAt time.Time, err error) {
	s, err := Open(ctx, cfg) // brings its schema up to date
	if err != nil {
		return time.Time{}, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := cfg.Audit.Fit(ctx, s); err != nil {
		return time.Time{}, fmt.Errorf("restore: %w", err)
	}
	// Before an event of today's is put after those from before there was a chain.
	if _, err := s.one(ctx, "newest event", `SELECT coalesce(max(at), ?) FROM audit`, []any{never}, instant{&takenAt}); err != nil {
		return time.Time{}, err
	}
	if err := s.SealAudit(ctx); err != nil {
		return time.Time{}, err
	}
	now := time.Now().UTC()
	_, err = s.Update(ctx, func(of admin.Tx) error {
		t := of.(*tx)
		// A last use may have been written down a moment late.
		_, err := t.exec(ctx, "restore", `UPDATE keys SET idle_from = max(idle_from, ?) WHERE idle_after >= ?`,
			micros(now), micros(takenAt.Add(-admin.IdleLag)))
		if err != nil {
			return err
		}
		t.revision += revisionLeap
		if err := t.execOne(ctx, "restore", `UPDATE meta SET revision = ?1, forgotten = ?1, leapt = leapt + ?2 WHERE one = 1`, t.revision, revisionLeap); err != nil {
			return err
		}
		after, err := json.Marshal(map[string]any{"backup": filepath.Base(backup), "takenAt": takenAt})
		if err != nil {
			return err
		}
		return t.Audit(ctx, admin.Event{At: now, Actor: actor, Action: "store.restore", Target: "store", After: after})
	})
	return takenAt, err
}

// Check looks whether a database file is a whole store of keyward that this version can open: every page,
// every reference, the schema. It changes nothing.
func Check(ctx context.Context, path string) (err error) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return fmt.Errorf("store: %w", err)
	case !info.Mode().IsRegular() || info.Size() == 0:
		return fmt.Errorf("store: %s holds nothing", path)
	}
	if path, err = filepath.Abs(path); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	empty, err := inspect(ctx, path)
	if err != nil {
		return err
	}
	db, err := sql.Open("sqlite", uri(path, "ro"))
	if err != nil {
		return fault(path, "check", err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	var sound string
	if err := db.QueryRowContext(ctx, `PRAGMA integrity_check(1)`).Scan(&sound); err != nil {
		return fault(path, "check", err)
	}
	var tables, dangling int
	err = db.QueryRowContext(ctx, `SELECT (SELECT count(*) FROM sqlite_schema WHERE name = 'meta'), (SELECT count(*) FROM pragma_foreign_key_check)`).
		Scan(&tables, &dangling)
	switch {
	case err != nil:
		return fault(path, "check", err)
	case sound != "ok":
		return &damagedError{"check", path + " is damaged", errors.New(sound)}
	case dangling > 0:
		return &damagedError{"check", path + " is damaged", fmt.Errorf("%d rows point to nothing", dangling)}
	case empty || tables == 0:
		return fmt.Errorf("store: %s holds nothing", path)
	}
	return nil
}

// A Migration is one step of the schema.
type Migration struct {
	Version   int64
	Name      string    // of its script
	AppliedAt time.Time // zero: not yet
}

// Migrations lists the steps of the schema and which of them the store at path has made. No process may
// have it open. It changes nothing.
func Migrations(ctx context.Context, path string) (list []Migration, err error) {
	if path, err = resolve(path); err != nil {
		return nil, err
	}
	if _, err := os.Stat(path); err != nil { // before a lock file is made beside nothing
		return nil, fmt.Errorf("store: %w", err)
	}
	held, err := lock(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, held.Close()) }()
	if _, err := inspect(ctx, path); err != nil {
		return nil, err
	}
	scripts, err := fs.Glob(migrations, "migrations/*.sql")
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	db, err := sql.Open("sqlite", uri(path, "ro"))
	if err != nil {
		return nil, fault(path, "list migrations", err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	applied := map[int64]time.Time{}
	var versioned bool
	if err := db.QueryRowContext(ctx, `SELECT count(*) FROM sqlite_schema WHERE name = 'goose_db_version'`).Scan(&versioned); err != nil {
		return nil, fault(path, "list migrations", err)
	}
	if versioned {
		rows, err := db.QueryContext(ctx, `SELECT version_id, CAST(strftime('%s', tstamp) AS INTEGER) FROM goose_db_version`)
		if err != nil {
			return nil, fault(path, "list migrations", err)
		}
		defer func() { _ = rows.Close() }()
		for rows.Next() {
			var version, at int64
			if err := rows.Scan(&version, &at); err != nil {
				return nil, fault(path, "list migrations", err)
			}
			applied[version] = time.Unix(at, 0).UTC()
		}
		if err := rows.Err(); err != nil {
			return nil, fault(path, "list migrations", err)
		}
	}
	for _, script := range scripts {
		version, err := goose.NumericComponent(script)
		if err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
		list = append(list, Migration{Version: version, Name: filepath.Base(script), AppliedAt: applied[version]})
	}
	return list, nil
}

// Migrate brings the schema of the store at path up to date, as Open does, and lists its steps.
func Migrate(ctx context.Context, path string) ([]Migration, error) {
	s, err := Open(ctx, Config{Path: path})
	if err != nil {
		return nil, err
	}
	if err := s.Close(); err != nil {
		return nil, err
	}
	return Migrations(ctx, path)
}
