// Package sqlite keeps keys on one file, for one process. It is the store unless another is configured.
//
// Trade-off: nothing to install and nothing to run, and a read costs microseconds; but one process, and
// one writer at a time. A commit is on the disk before it is acknowledged (write-ahead log,
// synchronous=FULL), so it survives kill -9 and a power cut alike, and costs what the disk takes to say so.
//
// How it holds its promises: a lock file beside the database keeps a second process out. Writes go
// through one connection, each in an immediate transaction, so they never meet; reads go through a few
// others, and every read is one statement, which is one snapshot: a record and the revision beside it
// are of the same moment.
//
// Begin with [Open].
package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/limits"
)

// Config says where the store is.
type Config struct {
	// Path of the database file. It is made if it is not there, with mode 0600; its folder must exist.
	Path string
	// Audit makes the MACs of the audit's segments; the zero value makes none.
	Audit admin.AuditKeys
}

// A Store is an admin.Store on one file. Safe for concurrent use.
type Store struct {
	reader // by readers, outside any transaction
	replicas

	path    string
	audit   admin.AuditKeys
	lock    *os.File
	writer  *sql.DB   // one connection
	readers *sql.DB   // as many as there are cores; they cannot write
	hot     *sql.Stmt // findKey, prepared: every cache miss runs it
	keep    int64     // change rows
	calls   calls
	close   func() error
}

var _ admin.Store = (*Store)(nil)

const (
	// keepChanges bounds what a replica can catch up with: hours of a busy day, some 15 MB.
	keepChanges = 100_000
	// batch bounds how long writes of many rows keep a revocation waiting.
	batch = 500
	// maxReaders: reads beyond it are bound by memory bandwidth, not by connections.
	maxReaders = 8
)

// Open opens the store, makes it if there is none, and brings its schema up to date. It refuses a file
// that another process has open, that another program made, or that a newer keyward wrote, and leaves
// such a file as it is. Its errors are for the operator.
func Open(ctx context.Context, cfg Config) (_ *Store, err error) {
	path, err := resolve(cfg.Path)
	if err != nil {
		return nil, err
	}
	s := &Store{path: path, audit: cfg.Audit, keep: keepChanges}
	s.fault = func(what string, err error) error { return fault(path, what, err) }
	if s.lock, err = lock(path); err != nil {
		return nil, err
	}
	s.close = sync.OnceValue(s.shutDown)
	defer func() {
		if err != nil {
			_ = s.close()
		}
	}()
	if err := create(path); err != nil {
		return nil, err
	}
	fresh, err := inspect(ctx, path)
	if err != nil {
		return nil, err
	}
	pragmas := []string{
		"journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)",
		"secure_delete(1)",             // what was deleted is not left in free pages
		"journal_size_limit(67108864)", // a log that grew once gives its space back
	}
	if s.writer, err = sql.Open("sqlite", uri(path, "rw", pragmas...)); err != nil {
		return nil, s.fault("open", err)
	}
	s.writer.SetMaxOpenConns(1)
	var journal string
	if err := s.writer.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&journal); err != nil {
		return nil, s.fault("open", err)
	}
	if journal != "wal" { // SQLite says nothing, and goes on without
		return nil, fmt.Errorf("store: no write-ahead log can be kept beside %s: is it on a network file system? It must be on a local one", path)
	}
	if err := migrate(ctx, s.writer, fresh); err != nil {
		return nil, s.fault("bring the schema up to date", err)
	}
	if s.readers, err = sql.Open("sqlite", uri(path, "rw", append(pragmas, "query_only(1)")...)); err != nil {
		return nil, s.fault("open", err)
	}
	cores := max(2, min(runtime.GOMAXPROCS(0), maxReaders))
	s.readers.SetMaxOpenConns(cores)
	s.readers.SetMaxIdleConns(cores)
	if s.hot, err = s.readers.PrepareContext(ctx, findKey); err != nil {
		return nil, s.fault("open", err)
	}
	s.query, s.find, s.reader.enter = s.readers.QueryContext, s.hot.QueryContext, s.calls.enter
	s.replicas.calls = &s.calls
	return s, nil
}

// Close implements admin.Store. It leaves everything in the database file and nothing in the log.
func (s *Store) Close() error { return s.close() }

func (s *Store) shutDown() error {
	s.calls.end()
	var errs []error
	if s.hot != nil {
		errs = append(errs, s.hot.Close())
	}
	if s.readers != nil {
		errs = append(errs, s.readers.Close())
	}
	if s.writer != nil {
		// The last connection does the same when it closes, but tells nobody if it cannot.
		var busy, inLog, moved int
		err := s.writer.QueryRow("PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &inLog, &moved)
		if err == nil && busy != 0 {
			err = errors.New("another program reads it; what is in the log beside it is safe there")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("empty the log of %s: %w", s.path, err))
		}
		errs = append(errs, s.writer.Close())
	}
	errs = append(errs, s.lock.Close()) // which frees it
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("store: close: %w", err)
	}
	return nil
}

// Update implements admin.Store.
func (s *Store) Update(ctx context.Context, fn func(admin.Tx) error) (apikey.Revision, error) {
	var revision apikey.Revision
	err := s.write(ctx, "update", func(t *tx) error {
		if err := t.begin(ctx); err != nil {
			return err
		}
		if err := fn(t); err != nil {
			return err
		}
		if t.broken != nil {
			return t.broken
		}
		if !t.audited {
			return errNoAudit
		}
		revision = t.revision
		return t.forgetOldest(ctx, s.keep)
	})
	if err != nil {
		return 0, err
	}
	return revision, nil
}

// Touch implements admin.Store.
func (s *Store) Touch(ctx context.Context, uses []apikey.Use) error {
	for some := range slices.Chunk(uses, batch) {
		err := s.write(ctx, "record uses", func(t *tx) error {
			for _, use := range some {
				if err := t.touch(ctx, use); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Redigest implements admin.Store.
func (s *Store) Redigest(ctx context.Context, list []admin.Redigest) error {
	for some := range slices.Chunk(list, batch) {
		err := s.write(ctx, "redigest", func(t *tx) error {
			for _, one := range some {
				if err := t.redigest(ctx, one); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// SaveQuotaStates implements admin.Store.
func (s *Store) SaveQuotaStates(ctx context.Context, states []limits.QuotaState) error {
	for some := range slices.Chunk(states, batch) {
		err := s.write(ctx, "save the states of quotas", func(t *tx) error {
			for i := range some {
				if err := t.saveQuotaState(ctx, &some[i]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// ForgetQuotaStates implements admin.Store.
func (s *Store) ForgetQuotaStates(ctx context.Context, now time.Time) error {
	_, err := s.forget(ctx, "forget the states of quotas", `DELETE FROM quota_states WHERE (owner, class) IN
		(SELECT owner, class FROM quota_states WHERE until <= ? LIMIT ?)`, micros(now))
	return err
}

// forget removes what a statement names, a few at a time, because others want to write as well: LIMIT is its last
// argument. It returns how many there were, also where it could not remove all.
func (s *Store) forget(ctx context.Context, what, query string, args ...any) (removed int, err error) {
	args = append(args, batch)
	for n := int64(batch); n == batch; removed += int(n) {
		err := s.write(ctx, what, func(t *tx) (err error) {
			n, err = t.exec(ctx, what, query, args...)
			return err
		})
		if err != nil {
			return removed, err
		}
	}
	return removed, nil
}

// write runs fn in a transaction on the one writing connection. It commits only what is whole: an error
// or panic of fn, a statement that failed for another reason than a constraint, and a context that ended
// before the commit all take everything back.
func (s *Store) write(ctx context.Context, what string, fn func(t *tx) error) error {
	leave, err := s.calls.enter()
	if err != nil {
		return s.fault(what, err)
	}
	defer leave()
	conn, err := s.writer.Conn(ctx) // waits its turn, as long as ctx lets it
	if err != nil {
		return s.fault(what, err)
	}
	defer func() { _ = conn.Close() }() // back to the pool

	// ctx may end the wait for BEGIN, but not the transaction behind our back: database/sql would roll it
	// back in a goroutine of its own, and the driver would interrupt a COMMIT half-way.
	own, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, cancel)
	defer stop()
	sqlTx, err := conn.BeginTx(own, nil)
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err() // own says cancelled where ctx says too late
		}
		return s.fault(what, err)
	}
	defer func() { _ = sqlTx.Rollback() }() // nothing is left to take back after a commit
	if !stop() {
		return s.fault(what, ctx.Err())
	}

	t := newTx(sqlTx, s.audit, s.fault)
	if err := fn(t); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return s.fault(what, err)
	}
	if err := sqlTx.Commit(); err != nil {
		return s.fault(what+": commit, which may or may not have happened", err)
	}
	return nil
}

// calls counts the calls under way, so that closing can wait for them.
type calls struct {
	mu       sync.Mutex
	closed   bool
	underWay sync.WaitGroup
}

func (c *calls) enter() (leave func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errClosed
	}
	c.underWay.Add(1)
	return c.underWay.Done, nil
}

func (c *calls) end() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.underWay.Wait()
}
