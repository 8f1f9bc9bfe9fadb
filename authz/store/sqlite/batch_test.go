package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	driver "modernc.org/sqlite"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A commitWatch counts the rows of tables that each transaction changes.
type commitWatch struct {
	rows map[string]int // of the transaction under way
	most int            // of one table in one transaction
	all  int
}

// watchCommits counts from now on. The calls of the store that it counts must not overlap.
func watchCommits(t *testing.T, s *Store) *commitWatch {
	t.Helper()
	w := &commitWatch{rows: map[string]int{}}
	conn, err := s.writer.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	err = conn.Raw(func(c any) error {
		hooks, ok := c.(driver.HookRegisterer)
		if !ok {
			return fmt.Errorf("%T has no hooks", c)
		}
		hooks.RegisterPreUpdateHook(func(d driver.SQLitePreUpdateData) { w.rows[d.TableName]++ })
		hooks.RegisterCommitHook(func() int32 {
			for _, n := range w.rows {
				w.most, w.all = max(w.most, n), w.all+n
			}
			clear(w.rows)
			return 0
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// wantBatches asserts how many rows were changed, and that no transaction changed more than one batch.
func (w *commitWatch) wantBatches(t *testing.T, what string, rows int) {
	t.Helper()
	if w.all != rows || w.most > batch {
		t.Errorf("%s: %d rows were changed, %d at once; want %d, at most %d at once", what, w.all, w.most, rows, batch)
	}
	w.most, w.all = 0, 0
}

// TestManyRowsAreWrittenInBatches: whoever has to write a revocation does not wait for a million rows of housekeeping.
func TestManyRowsAreWrittenInBatches(t *testing.T) {
	const many = 2*batch + 7
	ctx, s := t.Context(), open(t, file(t))
	begin := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	if _, err := s.Update(ctx, func(tx admin.Tx) error {
		if err := tx.PutInstance(ctx, &apikey.Instance{ID: "tenant"}); err != nil {
			return err
		}
		for n := range 10 {
			if err := tx.InsertKey(ctx, &apikey.Key{ID: keyID(n), InstanceID: "tenant", Type: apikey.TypeInstance}); err != nil {
				return err
			}
		}
		return tx.Audit(ctx, admin.Event{})
	}); err != nil {
		t.Fatal(err)
	}
	var networks []admin.KeyNetwork
	for n := range many {
		networks = append(networks, admin.KeyNetwork{KeyID: keyID(n % 10), Network: fmt.Sprint("network ", n), FirstAt: begin, LastAt: begin})
	}
	alerts := func() {
		t.Helper()
		err := s.write(ctx, "test", func(t *tx) error {
			for n := range many {
				if err := t.putAlert(ctx, &admin.Alert{
					ID: apikey.ID{1, 14: byte(n >> 8), 15: byte(n)}, InstanceID: "tenant", Kind: admin.AlertUnused, OpenedAt: begin, ResolvedAt: begin,
				}); err != nil {
					return err
				}
				if err := t.QueueNotice(ctx, admin.Notice{ID: apikey.ID{byte(n >> 8), byte(n), 2: 1}, MadeAt: begin}); err != nil && !errors.Is(err, apikey.ErrConflict) {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	count := func() {
		t.Helper()
		var counts []admin.Usage
		for n := range many {
			counts = append(counts, admin.Usage{InstanceID: "tenant", Start: begin.Add(time.Duration(n) * time.Minute), UsageCounts: admin.UsageCounts{Allowed: 1}})
		}
		if err := s.AddUsage(ctx, admin.UsageBatch{}, counts); err != nil {
			t.Fatal(err)
		}
	}
	alerts()
	count()
	w := watchCommits(t, s)
	do := func(what string, rows int, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		w.wantBatches(t, what, rows)
	}
	do("networks are learnt", many, s.LearnNetworks(ctx, networks))
	do("networks are forgotten", many, s.ForgetNetworks(ctx, begin.Add(time.Second)))
	do("alerts are forgotten", many, s.ForgetAlerts(ctx, begin.Add(time.Second)))
	do("counts are forgotten", many, s.ForgetUsage(ctx, map[admin.UsageInterval]time.Time{admin.UsageMinute: begin.AddDate(1, 0, 0)}))
	_, _, err := s.ForgetNotices(ctx, begin, many-batch-1)
	do("too many notices are forgotten", batch+1, err)
	_, _, err = s.ForgetNotices(ctx, begin.Add(time.Second), many)
	do("old notices are forgotten", many-batch-1, err)

	alerts()
	count()
	const rows = 2*many + many/60 + 1 + 2 + 1 // alerts and minutes, hours, days, the number
	w.most, w.all = 0, 0
	if _, err := s.Update(ctx, func(tx admin.Tx) error {
		return errors.Join(tx.DeleteInstance(ctx, "tenant"), tx.Audit(ctx, admin.Event{}))
	}); err != nil {
		t.Fatal(err)
	}
	if w.all > 200 { // keys and what is listed of them
		t.Errorf("%d rows were changed when the instance was deleted", w.all)
	}
	w.most, w.all = 0, 0
	do("what is left of the instance is forgotten", rows, s.ForgetDeleted(ctx))
	do("there is nothing left", 0, s.ForgetDeleted(ctx))
	for _, table := range []string{"usage", "alerts"} {
		var n int
		if err := s.writer.QueryRowContext(ctx, "SELECT count(*) FROM "+table).Scan(&n); err != nil || n != 0 {
			t.Errorf("%d rows are left in %s: %v", n, table, err)
		}
	}
}

// TestWhatIsLeftOfAnInstanceStaysHidden: who still has an alert of a deleted instance in hand does not bring it back
// in the one that has its name now.
func TestWhatIsLeftOfAnInstanceStaysHidden(t *testing.T) {
	ctx, s := t.Context(), open(t, file(t))
	update := func(fn func(tx admin.Tx) error) {
		t.Helper()
		if _, err := s.Update(ctx, func(tx admin.Tx) error { return errors.Join(fn(tx), tx.Audit(ctx, admin.Event{})) }); err != nil {
			t.Fatal(err)
		}
	}
	put := func(tx admin.Tx) error { return tx.PutInstance(ctx, &apikey.Instance{ID: "tenant"}) }
	update(put)
	a := &admin.Alert{ID: apikey.ID{1}, InstanceID: "tenant", Kind: admin.AlertUnused, OpenedAt: time.Now()}
	if err := s.PutAlert(ctx, a); err != nil {
		t.Fatal(err)
	}
	update(func(tx admin.Tx) error { return tx.DeleteInstance(ctx, "tenant") })
	update(put)
	a.Count++
	if err := s.PutAlert(ctx, a); !errors.Is(err, apikey.ErrConflict) {
		t.Errorf("got %v, want a conflict", err)
	}
	if list, err := s.Alerts(ctx, admin.AlertQuery{Everywhere: true, Limit: 9}); err != nil || len(list) != 0 {
		t.Errorf("got %v, %v", list, err)
	}
}

// TestUsageWritersAreBounded: of processes that are gone the last batch is not remembered for ever.
func TestUsageWritersAreBounded(t *testing.T) {
	ctx, s := t.Context(), open(t, file(t))
	writer := func(n int) apikey.ID { return apikey.ID{7, 14: byte(n >> 8), 15: byte(n)} }
	err := s.write(ctx, "test", func(t *tx) error {
		for n := range maxUsageWriters {
			if _, err := t.firstTime(ctx, admin.UsageBatch{Writer: writer(n), Number: 1}); err != nil {
				return err
			}
			id := writer(n)
			if _, err := t.exec(ctx, "test", "UPDATE usage_writers SET at = at - ? WHERE writer = ?", 10*maxUsageWriters-n, id[:]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	add := func(n int, number int64) {
		t.Helper()
		if err := s.AddUsage(ctx, admin.UsageBatch{Writer: writer(n), Number: number}, []admin.Usage{{Start: time.Unix(0, 0), UsageCounts: admin.UsageCounts{Allowed: 1}}}); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 5 {
		add(maxUsageWriters+n, 1) // and 0 to 4 are forgotten
	}
	for n := 5; n < maxUsageWriters+5; n++ {
		add(n, 1) // all known
	}
	var rows int
	if err := s.writer.QueryRowContext(ctx, "SELECT count(*) FROM usage_writers").Scan(&rows); err != nil || rows != maxUsageWriters {
		t.Errorf("%d writers are remembered, error %v; want %d", rows, err, maxUsageWriters)
	}
	list, err := s.Usage(ctx, admin.UsageQuery{Interval: admin.UsageDay, To: time.Unix(1, 0)})
	if err != nil || len(list) != 1 || list[0].Allowed != 5 {
		t.Errorf("got %+v, %v; want 5 allowed", list, err)
	}
}

// TestAlertsAndUsageAreReadByAnIndex: the number of an instance costs no list its order.
func TestAlertsAndUsageAreReadByAnIndex(t *testing.T) {
	ctx, s := t.Context(), open(t, file(t))
	var query string
	var args []any
	r := s.reader
	r.query = func(ctx context.Context, q string, a ...any) (*sql.Rows, error) {
		query, args = q, a
		return s.reader.query(ctx, q, a...)
	}
	after := admin.AlertPlace{OpenedAt: time.Now(), ID: apikey.ID{1}}
	for name, read := range map[string]struct {
		read  func() error
		index string
	}{
		"all alerts": {func() error { _, err := r.Alerts(ctx, admin.AlertQuery{Everywhere: true, Limit: 9}); return err }, "alerts_newest_of_all"},
		"all alerts, next page": {func() error {
			_, err := r.Alerts(ctx, admin.AlertQuery{Everywhere: true, After: after, Limit: 9})
			return err
		}, "alerts_newest_of_all"},
		"all open alerts": {func() error {
			_, err := r.Alerts(ctx, admin.AlertQuery{Everywhere: true, Open: true, Limit: 9})
			return err
		}, "alerts_open_newest_of_all"},
		"alerts": {func() error { _, err := r.Alerts(ctx, admin.AlertQuery{InstanceID: "a", Limit: 9}); return err }, "alerts_newest"},
		"open alerts": {func() error {
			_, err := r.Alerts(ctx, admin.AlertQuery{InstanceID: "a", Open: true, Limit: 9})
			return err
		}, "alerts_open_newest"},
		"alerts of a key": {func() error {
			_, err := r.Alerts(ctx, admin.AlertQuery{InstanceID: "a", KeyID: apikey.ID{1}, Limit: 9})
			return err
		}, "alerts_of_key"},
		"how many are open": {func() error { _, err := r.OpenAlerts(ctx); return err }, "alerts_open"},
		"usage": {func() error {
			_, err := r.Usage(ctx, admin.UsageQuery{InstanceID: "a", Interval: admin.UsageDay})
			return err
		}, "PRIMARY KEY"},
	} {
		if err := read.read(); err != nil {
			t.Fatal(err)
		}
		steps := strings.Join(plan(t, s, query, args), "\n")
		if !strings.Contains(steps, read.index) || strings.Contains(steps, "TEMP B-TREE") || strings.Contains(steps, "SCAN n") {
			t.Errorf("%s is not read by %s alone:\n%s", name, read.index, steps)
		}
	}
}
