package sqlite

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/pressly/goose/v3"
)

// applicationID marks a database file as keyward's ("kwrd"); file(1) and PRAGMA application_id show it.
const applicationID = 0x6b777264

//go:embed migrations/*.sql
var migrations embed.FS

// resolve returns the one name of a database file, whatever links and relative paths lead to it: the
// lock lies beside that. The file itself need not exist yet, its folder must.
func resolve(path string) (string, error) {
	if path == "" {
		return "", errors.New("store: no path to the database file")
	}
	absolute, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("store: %w", err)
	}
	whole, err := filepath.EvalSymlinks(absolute)
	if err == nil {
		return whole, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("store: %w", err)
	}
	if _, err := os.Lstat(absolute); err == nil {
		return "", fmt.Errorf("store: %s is a symbolic link to a file that does not exist", absolute)
	}
	folder, err := filepath.EvalSymlinks(filepath.Dir(absolute))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("store: the folder %s does not exist: create it first (mkdir -m 700 %[1]s)", filepath.Dir(absolute))
	}
	if err != nil {
		return "", fmt.Errorf("store: %w", err)
	}
	return filepath.Join(folder, filepath.Base(absolute)), nil
}

// lock takes the lock file beside a database file. The kernel frees the lock when the process ends,
// however it ends; the file stays, because removing it would let two processes lock two files of one
// name. Its content is the pid of the last holder, for the message only.
func lock(path string) (*os.File, error) {
	name := path + ".lock"
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		holder, _ := io.ReadAll(io.LimitReader(file, 32))
		_ = file.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("store: lock %s: %w", name, err)
		}
		switch pid, _ := strconv.Atoi(strings.TrimSpace(string(holder))); pid {
		case os.Getpid():
			return nil, fmt.Errorf("store: %s is open in this process already", path)
		case 0:
			return nil, fmt.Errorf("store: %s is in use by another process: stop it, or go through its Management API", path)
		default:
			return nil, fmt.Errorf("store: %s is in use by process %d: stop it, or go through its Management API", path, pid)
		}
	}
	if err = file.Truncate(0); err == nil {
		_, err = file.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("store: lock %s: %w", name, err)
	}
	return file, nil
}

// create makes the file where there is none, for its owner only: SQLite gives the files that it puts
// beside it the same mode.
func create(path string) error {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return file.Close()
}

// inspect looks at a file without changing it. fresh means that it is ours to fill: there is nothing in
// it. A file that is not ours, or that a newer keyward wrote, is an error. The lock is held.
func inspect(ctx context.Context, path string) (fresh bool, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return false, fmt.Errorf("store: %w", err)
	}
	if !info.Mode().IsRegular() {
		return false, fmt.Errorf("store: %s is not a file", path)
	}
	if info.Size() == 0 {
		return true, nil
	}
	// SQLite itself has to look: what it wrote last may be in the log beside the file only.
	db, err := sql.Open("sqlite", uri(path, "ro"))
	if err != nil {
		return false, fault(path, "open", err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	var application, tables int64
	err = db.QueryRowContext(ctx, `SELECT (SELECT application_id FROM pragma_application_id), (SELECT count(*) FROM sqlite_schema)`).
		Scan(&application, &tables)
	if err != nil {
		return false, fault(path, "open", err)
	}
	switch {
	case application == 0 && tables == 0:
		return true, nil
	case application != applicationID:
		return false, fmt.Errorf("store: %s is a database of another program, not of keyward; nothing was changed", path)
	}
	var versioned bool
	err = db.QueryRowContext(ctx, `SELECT count(*) FROM sqlite_schema WHERE name = 'goose_db_version'`).Scan(&versioned)
	if err != nil {
		return false, fault(path, "open", err)
	}
	if !versioned {
		return false, nil // it ended between making the file ours and making the tables
	}
	var schema, newest int64
	if err := db.QueryRowContext(ctx, `SELECT coalesce(max(version_id), 0) FROM goose_db_version`).Scan(&schema); err != nil {
		return false, fault(path, "open", err)
	}
	scripts, err := fs.Glob(migrations, "migrations/*.sql")
	if err != nil {
		return false, fmt.Errorf("store: %w", err)
	}
	for _, name := range scripts {
		version, err := goose.NumericComponent(name)
		if err != nil {
			return false, fmt.Errorf("store: %w", err)
		}
		newest = max(newest, version)
	}
	if schema > newest {
		return false, fmt.Errorf("store: %s was written by a newer keyward (its schema is %d, this one knows %d): "+
			"use that version, or restore a backup from before; nothing was changed", path, schema, newest)
	}
	return false, nil
}

// migrate brings the schema up to date, each step in a transaction of its own.
func migrate(ctx context.Context, db *sql.DB, fresh bool) error {
	if fresh {
		// Before all else: from here on the file is ours even if the next step is the last we do.
		if _, err := db.ExecContext(ctx, fmt.Sprintf("PRAGMA application_id = %d", applicationID)); err != nil {
			return err
		}
	}
	scripts, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	provider, err := goose.NewProvider(goose.DialectSQLite3, db, scripts, goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return err
	}
	_, err = provider.Up(ctx) // not closed: that would close db
	return err
}

// uri names a database to the driver. Pragmas are for one connection, and database/sql opens
// connections when it likes: only here do they reach all of them.
func uri(path, mode string, pragmas ...string) string {
	query := url.Values{
		"mode":    {mode},
		"_txlock": {"immediate"},
		"_pragma": append([]string{"busy_timeout(5000)"}, pragmas...),
	}
	name := url.URL{Scheme: "file", Path: path, RawQuery: query.Encode()}
	return name.String()
}
