package sqlite

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	codes "modernc.org/sqlite/lib"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/storetest"
)

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) admin.Store { return open(t, file(t)) })
}

// file names a database that is not there yet.
func file(t testing.TB) string { return filepath.Join(t.TempDir(), "keyward.db") }

// open opens a store that the test's end closes.
func open(t testing.TB, path string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Path: path, Audit: storetest.AuditKeys})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func keyID(n int) (id apikey.ID) {
	binary.BigEndian.PutUint64(id[:], uint64(n))
	return id
}

func digestOf(n int) apikey.Digest { return sha256.Sum256(keyID(n).Append(nil)) }

// create makes a key of the instance "tenant", and the instance if need be.
func createKey(ctx context.Context, s *Store, n int) (apikey.Revision, error) {
	return s.Update(ctx, func(tx admin.Tx) error {
		if _, err := tx.Instance(ctx, "tenant"); errors.Is(err, apikey.ErrNotFound) {
			if err := tx.PutInstance(ctx, &apikey.Instance{ID: "tenant", CreatedAt: time.Now()}); err != nil {
				return err
			}
		}
		k := &apikey.Key{ID: keyID(n), InstanceID: "tenant", Type: apikey.TypeInstance, Name: fmt.Sprint("key ", n), CreatedAt: time.Now()}
		if err := tx.InsertKey(ctx, k); err != nil {
			return err
		}
		if err := tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 1, CreatedAt: k.CreatedAt}, digestOf(n), 1); err != nil {
			return err
		}
		return tx.Audit(ctx, admin.Event{At: k.CreatedAt, Action: "key.create", Target: k.ID.String()})
	})
}

func mustCreate(t testing.TB, s *Store, n int) apikey.Revision {
	t.Helper()
	revision, err := createKey(t.Context(), s, n)
	if err != nil {
		t.Fatal(err)
	}
	return revision
}

// wantError fails unless err says all of parts.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("got no error, want one that says %q", parts)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("got error %q, want it to say %q", err, part)
		}
	}
}

func TestDurabilityIsInForce(t *testing.T) {
	s := open(t, file(t))
	if n := s.writer.Stats().MaxOpenConnections; n != 1 {
		t.Errorf("writer: %d connections, want 1", n)
	}
	pools := map[*sql.DB]string{s.writer: "0", s.readers: "1"} // and whether it is query_only
	for db, queryOnly := range pools {
		// Every connection of the pool, not only the first.
		var held []*sql.Conn
		for range db.Stats().MaxOpenConnections {
			conn, err := db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, conn)
			for pragma, want := range map[string]string{
				"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1", "secure_delete": "1", "busy_timeout": "5000",
				"query_only": queryOnly,
			} {
				var got string
				if err := conn.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&got); err != nil || got != want {
					t.Errorf("%s: got %q and error %v, want %q", pragma, got, err, want)
				}
			}
		}
		for _, conn := range held {
			_ = conn.Close()
		}
	}
	if n := s.readers.Stats().MaxOpenConnections; n < 2 {
		t.Errorf("%d readers, want at least 2", n)
	}
}

func TestWriterBeginsImmediate(t *testing.T) {
	s := open(t, file(t))
	tx, err := s.writer.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback() }()
	other, err := sql.Open("sqlite", uri(s.path, "rw"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	other.SetMaxOpenConns(1)
	if _, err := other.Exec("PRAGMA busy_timeout = 0"); err != nil {
		t.Fatal(err)
	}
	// Another writer is kept out from BEGIN on, before the first statement.
	if _, err = other.Exec(`INSERT INTO marks (name) VALUES ('other')`); code(err)&0xff != codes.SQLITE_BUSY {
		t.Errorf("got %v, want SQLITE_BUSY", err)
	}
}

func TestFilesAreTheOwnersOnly(t *testing.T) {
	path := file(t)
	s := open(t, path)
	mustCreate(t, s, 1)
	for _, suffix := range []string{"", "-wal", "-shm", ".lock"} {
		info, err := os.Stat(path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if mode := info.Mode().Perm(); mode != 0o600 {
			t.Errorf("%s has mode %o, want 600", info.Name(), mode)
		}
	}
}

func TestCloseLeavesAllInOneFile(t *testing.T) {
	path := file(t)
	s := open(t, path)
	mustCreate(t, s, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"-wal", "-shm"} {
		if _, err := os.Stat(path + suffix); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", suffix, err)
		}
	}
	again := open(t, path) // the lock is free
	if _, _, err := again.FindKey(t.Context(), digestOf(1)); err != nil {
		t.Error(err)
	}
}

func TestRevisionsGoOnAfterReopening(t *testing.T) {
	path := file(t)
	s := open(t, path)
	before := mustCreate(t, s, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if after := mustCreate(t, open(t, path), 2); after <= before {
		t.Errorf("revision %d after %d", after, before)
	}
}

func TestAnyPathOpens(t *testing.T) {
	for _, name := range []string{"with space.db", "100%25.db", "a?b=c&mode=memory.db", "a#b.db", "ключ.db", "semi;colon.db", "no-extension"} {
		t.Run(name, func(t *testing.T) {
			folder := t.TempDir()
			s := open(t, filepath.Join(folder, name))
			mustCreate(t, s, 1)
			if _, err := os.Stat(filepath.Join(folder, name)); err != nil {
				t.Errorf("the database is elsewhere: %v", err)
			}
		})
	}
}

func TestOneOpenerAtATime(t *testing.T) {
	folder := t.TempDir()
	path := filepath.Join(folder, "keyward.db")
	s := open(t, path)
	mustCreate(t, s, 1)
	if err := os.Mkdir(filepath.Join(folder, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{"link.db": "keyward.db", "sub/link.db": path, "folder": folder} {
		if err := os.Symlink(to, filepath.Join(folder, from)); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(filepath.Join(folder, "sub"))
	for _, name := range []string{
		path, "../keyward.db", "link.db", filepath.Join(folder, "link.db"), filepath.Join(folder, "folder", "keyward.db"), folder + "/./sub/..//keyward.db",
	} {
		_, err := Open(t.Context(), Config{Path: name})
		wantError(t, err, "keyward.db is open in this process already")
	}
	mustCreate(t, s, 2) // the refused ones did it no harm
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, "link.db")
}

func TestRefusedFilesStayAsTheyAre(t *testing.T) {
	run := func(t *testing.T, path, statements string) {
		t.Helper()
		db, err := sql.Open("sqlite", uri(path, "rwc"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = db.Close() }()
		if _, err := db.ExecContext(t.Context(), statements); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		make func(t *testing.T, path string)
		want []string
	}{
		{"another program's database", func(t *testing.T, path string) {
			run(t, path, "CREATE TABLE t (x); INSERT INTO t VALUES (1)")
		}, []string{"database of another program", "nothing was changed"}},
		{"another program's database with an id", func(t *testing.T, path string) {
			run(t, path, "PRAGMA application_id = 1; PRAGMA user_version = 3")
		}, []string{"database of another program"}},
		{"another program's database with a log", func(t *testing.T, path string) {
			run(t, path, "PRAGMA journal_mode = WAL; CREATE TABLE t (x)")
		}, []string{"database of another program"}},
		{"no database", func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte(strings.Repeat("listen:\n  check: 127.0.0.1:9001\n", 100)), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"is not a database", "nothing was changed"}},
		{"a newer schema", func(t *testing.T, path string) {
			s := open(t, path)
			mustCreate(t, s, 1)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			run(t, path, "INSERT INTO goose_db_version (version_id, is_applied) VALUES (99, 1)")
		}, []string{"written by a newer keyward", "its schema is 99, this one knows 7", "nothing was changed"}},
		{"a newer schema in the log only", func(t *testing.T, path string) {
			s := open(t, path)
			if _, err := s.writer.ExecContext(t.Context(), "INSERT INTO goose_db_version (version_id, is_applied) VALUES (99, 1)"); err != nil {
				t.Fatal(err)
			}
			for _, suffix := range []string{"", "-wal"} { // as after kill -9
				content, err := os.ReadFile(path + suffix)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path+".copy"+suffix, content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(os.Rename(path+".copy", path), os.Rename(path+".copy-wal", path+"-wal")); err != nil {
				t.Fatal(err)
			}
		}, []string{"its schema is 99"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := file(t)
			c.make(t, path)
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = Open(t.Context(), Config{Path: path})
			wantError(t, err, append(c.want, path)...)
			after, err := os.ReadFile(path)
			if err != nil || !slices.Equal(before, after) {
				t.Errorf("the file was changed (error %v)", err)
			}
		})
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	folder := t.TempDir()
	if err := os.Symlink("nowhere", filepath.Join(folder, "dangling")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, path, want string }{
		{"no path", "", "no path to the database file"},
		{"no folder", filepath.Join(folder, "no", "keyward.db"), "the folder " + filepath.Join(folder, "no") + " does not exist: create it first"},
		{"a folder", folder, "is not a file"},
		{"a link to nothing", filepath.Join(folder, "dangling"), "is a symbolic link to a file that does not exist"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Open(t.Context(), Config{Path: c.path})
			wantError(t, err, c.want)
		})
	}
}

// TestInterruptedBeginning: whatever Open had done when it was killed, the next Open goes on from there.
func TestInterruptedBeginning(t *testing.T) {
	for _, c := range []struct{ name, statements string }{
		{"file made", ""},
		{"log begun", "PRAGMA journal_mode = WAL"},
		{"made ours", fmt.Sprintf("PRAGMA journal_mode = WAL; PRAGMA application_id = %d", applicationID)},
		{"version table made", fmt.Sprintf(`PRAGMA journal_mode = WAL; PRAGMA application_id = %d;
			CREATE TABLE goose_db_version (id INTEGER PRIMARY KEY AUTOINCREMENT, version_id INTEGER NOT NULL, is_applied INTEGER NOT NULL, tstamp TIMESTAMP DEFAULT (datetime('now')));
			INSERT INTO goose_db_version (version_id, is_applied) VALUES (0, 1)`, applicationID)},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := file(t)
			if err := create(path); err != nil {
				t.Fatal(err)
			}
			db, err := sql.Open("sqlite", uri(path, "rw"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := db.ExecContext(t.Context(), c.statements); err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			mustCreate(t, open(t, path), 1)
		})
	}
}

func TestFullDiskSaysSo(t *testing.T) {
	s := open(t, file(t))
	mustCreate(t, s, 1)
	var pages int
	if err := s.writer.QueryRow("PRAGMA page_count").Scan(&pages); err != nil {
		t.Fatal(err)
	}
	if _, err := s.writer.Exec(fmt.Sprintf("PRAGMA max_page_count = %d", pages)); err != nil { // SQLite's own full disk
		t.Fatal(err)
	}
	large := admin.Event{Action: strings.Repeat("x", 1<<20)}
	_, err := s.Update(t.Context(), func(tx admin.Tx) error {
		if err := tx.PutInstance(t.Context(), &apikey.Instance{ID: "before"}); err != nil {
			t.Error(err)
		}
		// fn overlooks the error; the next statement must not run on its own, outside the transaction.
		if err := tx.Audit(t.Context(), large); !errors.Is(err, apikey.ErrUndecided) {
			t.Errorf("got %v, want ErrUndecided", err)
		}
		_ = tx.PutInstance(t.Context(), &apikey.Instance{ID: "after"})
		_ = tx.Audit(t.Context(), admin.Event{})
		return nil
	})
	if !errors.Is(err, apikey.ErrUndecided) {
		t.Errorf("got %v, want ErrUndecided", err)
	}
	wantError(t, err, "no space left for "+s.path, "make room")
	for _, id := range []string{"before", "after"} {
		if _, err := s.Instance(t.Context(), id); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("instance %s: got %v, want ErrNotFound", id, err)
		}
	}
	if _, _, err := s.FindKey(t.Context(), digestOf(1)); err != nil {
		t.Errorf("reads must go on: %v", err)
	}
	if _, err := s.writer.Exec("PRAGMA max_page_count = 1000000"); err != nil {
		t.Fatal(err)
	}
	mustCreate(t, s, 2) // room was made
}

func TestReadOnlyFileSaysSo(t *testing.T) {
	s := open(t, file(t))
	if _, err := s.writer.Exec("PRAGMA query_only = 1"); err != nil {
		t.Fatal(err)
	}
	_, err := createKey(t.Context(), s, 1)
	if !errors.Is(err, apikey.ErrUndecided) {
		t.Errorf("got %v, want ErrUndecided", err)
	}
	wantError(t, err, s.path+" cannot be written")
	if _, err := s.writer.Exec("PRAGMA query_only = 0"); err != nil {
		t.Fatal(err)
	}
}

func TestReadersCannotWrite(t *testing.T) {
	s := open(t, file(t))
	if _, err := s.readers.Exec(`INSERT INTO marks (name) VALUES ('m')`); code(err)&0xff != codes.SQLITE_READONLY {
		t.Errorf("got %v, want SQLITE_READONLY", err)
	}
}

func TestUndecodableRowNamesItsKey(t *testing.T) {
	for _, column := range []string{"scopes", "allowed_ips", "limits", "metadata"} {
		t.Run(column, func(t *testing.T) {
			s := open(t, file(t))
			mustCreate(t, s, 1)
			if _, err := s.writer.Exec(`UPDATE keys SET ` + column + ` = '{"a":["kwi_secret"'`); err != nil {
				t.Fatal(err)
			}
			_, _, err := s.FindKey(t.Context(), digestOf(1))
			if !errors.Is(err, apikey.ErrUndecided) {
				t.Errorf("got %v, want ErrUndecided", err)
			}
			wantError(t, err, keyID(1).String(), column)
			if strings.Contains(err.Error(), "kwi_secret") {
				t.Errorf("the error tells what the row holds: %v", err)
			}
		})
	}
}

func TestOldChangesAreForgotten(t *testing.T) {
	s := open(t, file(t))
	s.keep = 10
	var revisions []apikey.Revision
	for n := range 20 {
		revisions = append(revisions, mustCreate(t, s, n+1)) // two change rows each, the first three
	}
	var rows int64
	if err := s.writer.QueryRow(`SELECT count(*) FROM changes`).Scan(&rows); err != nil || rows != s.keep {
		t.Errorf("%d rows are kept (error %v), want %d", rows, err, s.keep)
	}
	head := revisions[len(revisions)-1]
	known := 0
	for i, after := range revisions {
		list, at, truncated, err := s.Changes(t.Context(), after)
		if err != nil || at != head {
			t.Fatalf("got head %d and error %v, want %d", at, err, head)
		}
		if truncated {
			if known > 0 {
				t.Errorf("after %d: truncated, though an older revision was not", after)
			}
			continue
		}
		known++
		if got, want := len(list), len(revisions)-1-i; got != want {
			t.Errorf("after %d: got %d changes, want %d: some are missing and nobody was told", after, got, want)
		}
	}
	if known < 4 || known > 6 { // ten rows are five keys
		t.Errorf("%d revisions can catch up, want about 5", known)
	}
	// One transaction larger than all that is kept: everybody must forget all.
	s.keep = 1
	last := mustCreate(t, s, 100)
	if _, _, truncated, err := s.Changes(t.Context(), last-1); err != nil || !truncated {
		t.Errorf("got truncated %t and error %v, want true", truncated, err)
	}
	if _, _, truncated, err := s.Changes(t.Context(), last); err != nil || truncated {
		t.Errorf("at the head: got truncated %t and error %v, want false", truncated, err)
	}
}

func TestHotQueriesUseIndexes(t *testing.T) {
	s := open(t, file(t))
	blob := make([]byte, 32)
	for name, c := range map[string]struct {
		query string
		args  []any
		want  string
	}{
		"FindKey":         {findKey, []any{blob}, "SEARCH d USING PRIMARY KEY (digest=?)"},
		"FindKey, a miss": {missKey, []any{blob}, "SEARCH key_digests USING PRIMARY KEY (digest=?)"},
		"Key":             {oneKey, []any{blob[:16], "tenant"}, "SEARCH k USING INDEX sqlite_autoindex_keys_1 (id=?)"},
		"Changes":         {listChanges, []any{1}, "SEARCH c USING INDEX changes_revision (revision>?) LEFT-JOIN"},
		"RecentKeys":      {recentKeys, []any{never}, "SCAN k USING INDEX keys_recent"},
		"Token":           {oneToken, []any{blob}, "SEARCH d USING PRIMARY KEY (digest=?)"},
	} {
		t.Run(name, func(t *testing.T) {
			rows, err := s.readers.QueryContext(t.Context(), "EXPLAIN QUERY PLAN "+c.query, c.args...)
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
				// "SCAN k" in Keys reads the page that the subquery found, and sorts it again; RecentKeys reads all,
				// for as long as it is let, and sorts nothing.
				whole := strings.HasPrefix(detail, "SCAN") && !slices.Contains([]string{"SCAN k", "SCAN k USING INDEX keys_recent", "SCAN CONSTANT ROW"}, detail)
				if whole || strings.Contains(detail, "TEMP B-TREE") && name != "Keys" {
					t.Errorf("reads a whole table, or sorts: %s", detail)
				}
			}
			if err := rows.Err(); err != nil || !slices.Contains(plan, c.want) {
				t.Errorf("got the plan %q and error %v, want it to have %q", plan, err, c.want)
			}
		})
	}
}

func TestKeptTransactionIsOver(t *testing.T) {
	s := open(t, file(t))
	var kept admin.Tx
	_, err := s.Update(t.Context(), func(tx admin.Tx) error {
		kept = tx
		return tx.Audit(t.Context(), admin.Event{})
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := kept.PutInstance(t.Context(), &apikey.Instance{ID: "late"}); !errors.Is(err, sql.ErrTxDone) {
		t.Errorf("got %v, want sql.ErrTxDone", err)
	}
	if _, err := s.Instance(t.Context(), "late"); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

// TestReplicasRunOutToTheInstant adds to the contract, which cannot turn the clock.
func TestReplicasRunOutToTheInstant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := replicas{calls: &calls{}}
		ctx := t.Context()
		if err := r.Register(ctx, "a", 1, 2*time.Second); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := r.Confirm(ctx, "a", 2, 2*time.Second); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2*time.Second - 1)
		if list, err := r.Replicas(ctx); err != nil || len(list) != 1 || list[0].Confirmed != 2 || list[0].Until.Sub(list[0].Now) != 1 {
			t.Errorf("a nanosecond before: got %v and error %v", list, err)
		}
		time.Sleep(time.Nanosecond)
		if list, err := r.Replicas(ctx); err != nil || len(list) != 0 {
			t.Errorf("at the instant: got %v and error %v", list, err)
		}
		if err := r.Confirm(ctx, "a", 3, time.Second); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("got %v, want ErrNotFound", err)
		}
	})
}

// TestCloseWaitsForEveryCall adds to the contract: SQLite itself makes Close wait for most calls, but
// for five seconds at most.
func TestCloseWaitsForEveryCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c calls
		leave, err := c.enter()
		if err != nil {
			t.Fatal(err)
		}
		ended := false
		go func() {
			c.end()
			ended = true
		}()
		time.Sleep(time.Hour)
		if ended {
			t.Error("did not wait for the call under way")
		}
		if _, err := c.enter(); !errors.Is(err, errClosed) {
			t.Errorf("a call while closing: got %v, want errClosed", err)
		}
		leave()
		synctest.Wait()
		if !ended {
			t.Error("waits for a call that is over")
		}
	})
}

func TestMicros(t *testing.T) {
	for _, at := range []time.Time{{}, time.Unix(0, 0), time.Unix(0, 1000), time.Unix(-1, 0), time.Now().Truncate(time.Microsecond)} {
		var got time.Time
		if err := (instant{&got}).Scan(micros(at)); err != nil || !cmp.Equal(at.UTC().Round(0), got) || at.IsZero() != got.IsZero() {
			t.Errorf("got %v and error %v, want %v", got, err, at)
		}
	}
}

func BenchmarkFindKey(b *testing.B) {
	s := open(b, file(b))
	const n = 1000
	_, err := s.Update(b.Context(), func(tx admin.Tx) error {
		errs := []error{tx.PutInstance(b.Context(), &apikey.Instance{ID: "tenant"}), tx.Audit(b.Context(), admin.Event{})}
		for i := range n {
			k := &apikey.Key{ID: keyID(i), InstanceID: "tenant", Scopes: apikey.Scopes{"a:*"}}
			errs = append(errs, tx.InsertKey(b.Context(), k), tx.InsertGeneration(b.Context(), k.ID, apikey.Generation{Number: 1}, digestOf(i), 1))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		b.Fatal(err)
	}
	for name, ctx := range map[string]context.Context{"background": context.Background(), "deadline": b.Context()} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i = (i + 7919) % n
				if _, _, err := s.FindKey(ctx, digestOf(i)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkUpdate(b *testing.B) {
	s := open(b, file(b))
	b.ReportAllocs()
	for b.Loop() {
		n := make([]byte, 8)
		_, _ = rand.Read(n)
		if _, err := createKey(b.Context(), s, int(binary.BigEndian.Uint64(n))); err != nil {
			b.Fatal(err)
		}
	}
}
