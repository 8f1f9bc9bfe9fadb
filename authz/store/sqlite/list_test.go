package sqlite

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// plan is what SQLite makes of a statement.
func plan(t *testing.T, s *Store, query string, args []any) []string {
	t.Helper()
	rows, err := s.readers.QueryContext(t.Context(), "EXPLAIN QUERY PLAN "+query, args...)
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	defer func() { _ = rows.Close() }()
	var steps []string
	for rows.Next() {
		var id, parent, unused int
		var step string
		if err := rows.Scan(&id, &parent, &unused, &step); err != nil {
			t.Fatal(err)
		}
		steps = append(steps, step)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return steps
}

var (
	listNow     = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	listOrders  = []admin.KeyOrder{"", "createdAt", "name", "name desc", "lastUsedAt", "lastUsedAt desc", "expirationDate", "expirationDate desc", "idleAfter"}
	listFilters = map[string]admin.KeyFilter{
		"all":             {},
		"type":            {Type: apikey.TypeUser},
		"active":          {Status: "active"},
		"disabled":        {Status: "disabled"},
		"revoked":         {Status: "revoked"},
		"expired":         {Status: "expired"},
		"user":            {UserPrincipalName: "user 8", Type: apikey.TypeUser},
		"user, active":    {UserPrincipalName: "user 8", Status: "active"},
		"user, unused":    {UserPrincipalName: "user 8", UnusedSince: listNow.Add(-90 * 24 * time.Hour)},
		"agent":           {AgentName: "agent 5"},
		"agent, expired":  {AgentName: "agent 5", Status: "expired"},
		"agent, name":     {AgentName: "agent 5", NamePrefix: "key 77"},
		"environment":     {Environment: "rare"},
		"creator":         {CreatedBy: "token:rare"},
		"name":            {NamePrefix: "key 77"},
		"unused":          {UnusedSince: listNow.Add(-90 * 24 * time.Hour)},
		"unused, active":  {UnusedSince: listNow.Add(-90 * 24 * time.Hour), Status: "active"},
		"expires":         {ExpiresBefore: listNow.Add(7 * 24 * time.Hour)},
		"expires, active": {ExpiresBefore: listNow.Add(7 * 24 * time.Hour), Status: "active"},
		"idle":            {IdleBefore: listNow.Add(7 * 24 * time.Hour), Status: "active"},
		"idle alone":      {IdleBefore: listNow.Add(7 * 24 * time.Hour)},
		"never used":      {NeverUsed: true},
		"without end":     {NoExpiration: true},
	}
)

// singleFilters are all that a list can be filtered by, one at a time.
var singleFilters = []string{
	"all", "type", "active", "disabled", "revoked", "expired", "user", "agent", "environment", "creator", "name", "unused", "expires",
	"idle alone", "never used", "without end",
}

// inIndex reports whether a filter and an order have an index of their own: without a filter, by type and by
// status in every order; a range in its own order; everything else in the order of creation.
func inIndex(filter string, order admin.KeyOrder) bool {
	column := orders[order].column
	switch filter {
	case "all", "type", "active", "disabled", "revoked", "expired":
		return true
	case "name":
		return column == "name"
	case "unused":
		return column == "quiet_since"
	case "expires":
		return column == "expiry"
	case "idle alone":
		return column == "idle_after"
	}
	return column == "created_at"
}

// checkPlan holds a list to going by its index, without reading a table and without sorting more than the
// page.
func checkPlan(t *testing.T, s *Store, what string, q admin.KeyQuery, w way, upTo admin.KeyPlace) {
	t.Helper()
	query, args := listKeys("tenant", q, w, upTo)
	steps := plan(t, s, query, args)
	sorts := 0
	for _, step := range steps {
		if strings.HasPrefix(step, "SCAN keys") {
			t.Errorf("%s reads the whole table: %s", what, step)
		}
		if strings.Contains(step, "TEMP B-TREE") {
			sorts++
		}
	}
	// From the place where the last page ended, and to the one where this ends.
	order := orders[q.Order]
	after, until := "("+order.column+",id)>(?,?)", "("+order.column+",id)<(?,?)"
	if !order.rising {
		after, until = until, after
	}
	var ends []string
	if q.After != (admin.KeyPlace{}) {
		ends = append(ends, after)
	}
	if upTo != (admin.KeyPlace{}) {
		ends = append(ends, until)
	}
	if !slices.ContainsFunc(steps, func(step string) bool {
		for _, end := range ends {
			if !strings.Contains(step, end) {
				return false
			}
		}
		return strings.HasPrefix(step, "SEARCH keys") && strings.Contains(step, "INDEX "+w.index+" (instance_id=?")
	}) {
		t.Errorf("%s does not go by %s from place to place: %q", what, w.index, steps)
	}
	// The page is sorted once more, with the generations; and what has expired and nobody has marked, which is little.
	if sorts > 1 && q.Status != "expired" {
		t.Errorf("%s sorts: %q", what, steps)
	}
}

// TestListsGoByIndexes: no list reads the whole table, and none sorts more than a page; every filter alone has
// an index of its own in the orders that it promises, and all of that index is used.
func TestListsGoByIndexes(t *testing.T) {
	s := open(t, file(t))
	place := admin.KeyPlace{At: listNow, Name: "n", ID: keyID(1)}
	for name, filter := range listFilters {
		for _, order := range listOrders {
			what := fmt.Sprintf("%s by %q", name, order)
			q := admin.KeyQuery{KeyFilter: filter, Order: order, Limit: 10, Now: listNow, After: place}
			w := drive(orders[order].column, &filter)
			checkPlan(t, s, what, q, w, admin.KeyPlace{})
			if want := inIndex(name, order); slices.Contains(singleFilters, name) && w.exact != want {
				t.Errorf("%s: an index has both: got %v, want %v", what, w.exact, want)
			}
			if w.exact {
				continue
			}
			checkPlan(t, s, what, q, w, place)
			first := q
			first.After = admin.KeyPlace{}
			checkPlan(t, s, what+", the first page", first, w, place)
			query, args := s.budget.lastLooked("tenant", q, w)
			if steps := plan(t, s, query, args); len(steps) != 1 || !strings.HasPrefix(steps[0], "SEARCH keys USING ") || !strings.Contains(steps[0], "INDEX "+w.index+" (instance_id=?") {
				t.Errorf("%s looks for its end without its index: %q", what, steps)
			}
			parts, counts := s.budget.rareParts("tenant", q, w)
			for i, p := range parts {
				if steps := plan(t, s, counts[i].text, counts[i].args); !slices.ContainsFunc(steps, func(step string) bool {
					return strings.HasPrefix(step, "SEARCH keys USING ") && strings.Contains(step, "INDEX "+p.index+" (instance_id=?")
				}) {
					t.Errorf("%s counts without an index: %q", what, steps)
				}
			}
		}
	}
	for name, query := range map[string]struct {
		text string
		args []any
	}{
		"count":        {countKeys, []any{"tenant", "", "", 1}},
		"creations":    {creations, []any{"tenant", 1, 1}},
		"creations by": {creationsBy, []any{"tenant", 1, "c", 1}},
		"due":          {dueKeys, []any{1, 1, 1}},
		"revoked":      {revokedKeys, []any{"tenant", 1, 1}},
	} {
		for _, step := range plan(t, s, query.text, query.args) {
			if strings.HasPrefix(step, "SCAN keys") {
				t.Errorf("%s reads the whole table: %s", name, step)
			}
		}
	}
}

// looked counts the keys that a page made SQLite look at: all of its index from where it began to the last key
// that was found, or to where it stopped.
func looked(t testing.TB, s *Store, instanceID string, q admin.KeyQuery, w way, to admin.KeyPlace) (n int) {
	t.Helper()
	l := &listing{}
	l.and("instance_id = " + l.arg(instanceID))
	l.between(q, to)
	for _, more := range w.more {
		l.and(more)
	}
	l.filter(&w.means)
	if w.means.Status != "" {
		l.and("status = " + l.arg(w.means.Status))
	}
	query := "SELECT count(*) FROM keys INDEXED BY " + w.index + " WHERE " + strings.Join(l.where, " AND ")
	if err := s.writer.QueryRow(query, l.args...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// pageOf makes one page, and says how it was made and at how many keys it looked.
func pageOf(t testing.TB, s *Store, instanceID string, q admin.KeyQuery) (page admin.KeyPage, how string, n int) {
	t.Helper()
	w, rare, err := s.way(t.Context(), instanceID, q)
	if err != nil {
		t.Fatal(err)
	}
	if page, err = s.KeyPage(t.Context(), instanceID, q); err != nil {
		t.Fatal(err)
	}
	if rare {
		whole := q
		whole.After = admin.KeyPlace{}
		return page, "sorted", looked(t, s, instanceID, whole, w, admin.KeyPlace{})
	}
	to := page.Next
	if to == (admin.KeyPlace{}) { // the rest was looked at
		return page, map[bool]string{true: "index", false: "bounded"}[w.exact], looked(t, s, instanceID, q, w, to)
	}
	if w.exact || len(page.Keys) == q.Limit {
		return page, map[bool]string{true: "index", false: "bounded"}[w.exact], looked(t, s, instanceID, q, w, to) + 1
	}
	return page, "bounded", looked(t, s, instanceID, q, w, to)
}

// TestPagesLookAtFewKeys: where an index has filter and order, a page looks at its own keys and one more; where
// none has, at no more than a bound, and says where to go on. The bounds are smaller here than a server's: what
// is proved is that a page keeps to them with many more keys, and costs a tenth.
func TestPagesLookAtFewKeys(t *testing.T) {
	ctx := t.Context()
	s := open(t, file(t))
	if b := s.budget; b.fewKeys() != 5_000 || b.manyKeys() != 5_000 {
		t.Errorf("a server's pages cost %d and %d keys, want 5000", b.fewKeys(), b.manyKeys())
	}
	s.budget = budget{few: 500, many: 500}
	const n, page, late = 2*500 + 250, 50, 500 + 100
	_, err := s.Update(ctx, func(tx admin.Tx) error {
		errs := []error{tx.PutInstance(ctx, &apikey.Instance{ID: "tenant"}), tx.Audit(ctx, admin.Event{})}
		for i := range n {
			at := listNow.Add(time.Duration(i-n) * time.Minute)
			k := &apikey.Key{
				ID: keyID(i + 1), InstanceID: "tenant", Type: apikey.TypeInstance, Name: fmt.Sprintf("key %06d", i), CreatedBy: "early", Environment: "early",
				CreatedAt: at, LastUsedAt: at, ExpirationDate: listNow.Add(time.Duration(n+1-i) * time.Hour), InactivityDays: 30,
			}
			if i%3 == 0 {
				k.Type, k.AgentName = apikey.TypeAgent, fmt.Sprint("agent ", i%30)
			}
			if i%5 == 0 {
				k.Disabled = true
			}
			if i >= n-late { // more than few, and as far as can be from where orders begin
				k.CreatedBy, k.Environment, k.LastUsedAt = "late", "late", time.Time{}
			}
			if i%100 == 1 {
				k.CreatedBy, k.Environment = "rare", "rare"
			}
			errs = append(errs, tx.InsertKey(ctx, k))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		t.Fatal(err)
	}
	bound := map[string]int{"index": page + 1, "sorted": s.budget.few, "bounded": s.budget.many}
	ways := map[string]int{}
	for _, filter := range []admin.KeyFilter{
		{}, {Type: apikey.TypeAgent}, {Status: "active"}, {Status: "disabled"}, {AgentName: "agent 9"}, {CreatedBy: "late"}, {CreatedBy: "rare"}, {Environment: "late"},
		{NeverUsed: true}, {NamePrefix: "key"}, {NamePrefix: "key 0001"}, {UnusedSince: listNow}, {ExpiresBefore: listNow.Add(1070 * time.Hour)},
		{IdleBefore: listNow.Add(365 * 24 * time.Hour)}, {Type: apikey.TypeAgent, CreatedBy: "late"}, {Environment: "late", Status: "disabled", NamePrefix: "key"},
		{NoExpiration: true}, {CreatedBy: "nobody"}, {Environment: "late", CreatedBy: "rare"},
	} {
		for _, order := range listOrders {
			q := admin.KeyQuery{KeyFilter: filter, Order: order, Limit: page, Now: listNow}
			want, err := s.Keys(ctx, "tenant", admin.KeyQuery{KeyFilter: filter, Order: order, Limit: n, Now: listNow})
			if err != nil {
				t.Fatal(err)
			}
			var got []*apikey.Key
			for pages := 0; pages < 3 || len(got) == 0; pages++ { // the first ones tell, and the first with keys
				p, how, n := pageOf(t, s, "tenant", q)
				ways[how]++
				if n > bound[how] {
					t.Errorf("%+v by %q, page %d, %s: looks at %d keys, want at most %d", filter, order, pages, how, n, bound[how])
				}
				if len(p.Keys) == 0 && p.Next != (admin.KeyPlace{}) {
					ways["empty"]++
				}
				got = append(got, p.Keys...)
				if q.After = p.Next; p.Next == (admin.KeyPlace{}) {
					if len(got) != len(want) {
						t.Errorf("%+v by %q: %d keys in all pages, want %d", filter, order, len(got), len(want))
					}
					break
				}
			}
			for i, k := range got {
				if k.ID != want[i].ID {
					t.Fatalf("%+v by %q: key %d is another than in the whole list", filter, order, i)
				}
			}
		}
	}
	for _, how := range []string{"index", "sorted", "bounded", "empty"} {
		if ways[how] == 0 {
			t.Errorf("no page was made like this: %s: %v", how, ways)
		}
	}
}

var million = flag.Int("keys", 20_000, "keys of the benchmark of lists")

// BenchmarkLists measures the first page of every list, and at how many keys it looks; -keys 1000000 is what it is meant for.
func BenchmarkLists(b *testing.B) {
	ctx := context.Background()
	s := open(b, file(b))
	n := *million
	begin := time.Now()
	for from := 0; from < n; from += 10_000 {
		_, err := s.Update(ctx, func(tx admin.Tx) error {
			errs := []error{tx.PutInstance(ctx, &apikey.Instance{ID: "9d3ca1b4-0000-4000-8000-0123456789ab"}), tx.Audit(ctx, admin.Event{})}
			for i := from; i < min(from+10_000, n); i++ {
				at := listNow.Add(-time.Duration(n-i) * (2 * 365 * 24 * time.Hour / time.Duration(n)))
				k := &apikey.Key{
					ID: keyID(i), InstanceID: "9d3ca1b4-0000-4000-8000-0123456789ab", Name: fmt.Sprint("key ", i), Type: apikey.TypeInstance,
					CreatedAt: at, CreatedBy: "token:common", Environment: "common", LastUsedAt: at.Add(time.Hour),
				}
				switch i % 4 {
				case 0:
					k.Type, k.UserPrincipalName = apikey.TypeUser, fmt.Sprint("user ", i%(n/10))
				case 1:
					k.Type, k.AgentName = apikey.TypeAgent, fmt.Sprint("agent ", i%(n/10))
				case 2:
					k.ExpirationDate = at.Add(300 * 24 * time.Hour)
				case 3:
					k.InactivityDays = 365
				}
				if i%3 == 0 {
					k.RevokedAt = at
				}
				if i%5000 == 1 {
					k.Environment, k.CreatedBy, k.LastUsedAt = "rare", "token:rare", time.Time{}
				}
				errs = append(errs, tx.InsertKey(ctx, k), tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 1}, digestOf(i), 1))
			}
			return errors.Join(errs...)
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	// As the sweep leaves it, but for the last minutes.
	if _, err := s.writer.Exec(`UPDATE keys SET ended_at = 1 WHERE revoked_at = `+neverSQL+` AND (expiry < ?1 OR idle_after < ?1)`, micros(listNow.Add(-time.Hour))); err != nil {
		b.Fatal(err)
	}
	var pages, size int64
	if err := s.writer.QueryRow("SELECT page_count, page_size FROM pragma_page_count, pragma_page_size").Scan(&pages, &size); err != nil {
		b.Fatal(err)
	}
	b.Logf("%d keys in %v, %d MB", n, time.Since(begin).Round(time.Millisecond), pages*size>>20)
	names := make([]string, 0, len(listFilters))
	for name := range listFilters {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		for _, order := range listOrders {
			q := admin.KeyQuery{KeyFilter: listFilters[name], Order: order, Limit: 100, Now: listNow}
			b.Run(strings.ReplaceAll(name+"/by "+cmp.Or(string(order), "newest"), " ", "_"), func(b *testing.B) {
				page, how, n := pageOf(b, s, "9d3ca1b4-0000-4000-8000-0123456789ab", q)
				for b.Loop() {
					if _, err := s.KeyPage(ctx, "9d3ca1b4-0000-4000-8000-0123456789ab", q); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(len(page.Keys)), "keys")
				b.ReportMetric(float64(n), how)
			})
		}
	}
	b.Run("count", func(b *testing.B) {
		for b.Loop() {
			if _, err := s.CountKeys(ctx, "9d3ca1b4-0000-4000-8000-0123456789ab", admin.KeyOwner{}, listNow); err != nil {
				b.Fatal(err)
			}
		}
	})
}
