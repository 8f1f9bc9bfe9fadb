package sqlite

import (
	"errors"
	"fmt"

	driver "modernc.org/sqlite"
	codes "modernc.org/sqlite/lib"

	"keyward/authz/apikey"
)

// errNoAudit is a bug of whoever called Update.
var errNoAudit = errors.New("update: refused: the transaction wrote no audit event")

var errClosed = errors.New("the store is closed")

// ErrDamaged: a file is damaged, or not a database at all. To who waits for an answer it is an outage like any
// other, apikey.ErrUndecided; but no waiting ends it.
var ErrDamaged = errors.New("damaged")

// A damagedError says which file is damaged.
type damagedError struct {
	what, hint string
	err        error
}

func (e *damagedError) Error() string { return fmt.Sprintf("store: %s: %s: %v", e.what, e.hint, e.err) }

func (e *damagedError) Unwrap() []error { return []error{ErrDamaged, apikey.ErrUndecided, e.err} }

// fault makes an outage of what the driver said: what was being done, what is wrong, and where the
// error is one that a person can mend, how.
func fault(path, what string, err error) error {
	var hint string
	switch code(err) & 0xff {
	case codes.SQLITE_FULL:
		hint = fmt.Sprintf("no space left for %s: make room on its disk", path)
	case codes.SQLITE_READONLY:
		hint = fmt.Sprintf("%s cannot be written: look at the owner and mode of the file, its folder and the file system", path)
	case codes.SQLITE_CANTOPEN:
		hint = fmt.Sprintf("%s cannot be opened: look at the owner and mode of the file and its folder", path)
	case codes.SQLITE_IOERR:
		hint = fmt.Sprintf("%s cannot be read or written: is its disk full or broken?", path)
	case codes.SQLITE_NOTADB:
		return &damagedError{what, path + " is not a database; nothing was changed", err}
	case codes.SQLITE_CORRUPT:
		return &damagedError{what, path + " is damaged: what can take its place is a backup that is whole", err}
	case codes.SQLITE_BUSY, codes.SQLITE_LOCKED:
		hint = fmt.Sprintf("another program holds %s", path)
	default:
		return fmt.Errorf("store: %s: %w: %w", what, apikey.ErrUndecided, err)
	}
	return fmt.Errorf("store: %s: %w: %s: %w", what, apikey.ErrUndecided, hint, err)
}

// code returns SQLite's extended result code, 0 if err is not SQLite's.
func code(err error) int {
	if e, ok := errors.AsType[*driver.Error](err); ok {
		return e.Code()
	}
	return 0
}

// refused translates what a constraint says; nil if it was none that the contract speaks of. SQLite
// takes back the one statement, the transaction goes on.
func refused(what string, err error) error {
	switch code(err) {
	case codes.SQLITE_CONSTRAINT_PRIMARYKEY, codes.SQLITE_CONSTRAINT_UNIQUE, codes.SQLITE_CONSTRAINT_ROWID:
		return fmt.Errorf("%s: %w", what, apikey.ErrConflict)
	case codes.SQLITE_CONSTRAINT_FOREIGNKEY:
		return fmt.Errorf("%s: %w", what, apikey.ErrNotFound)
	}
	return nil
}
