package sqlite

import (
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
		"never used":      {NeverUsed: true},
		"without end":     {NoExpiration: true},
	}
)

// TestListsGoByIndexes: no list reads the whole table, and none sorts more than a page, but for the keys
// of one owner and for those that have expired and nobody has marked.
func TestListsGoByIndexes(t *testing.T) {
	s := open(t, file(t))
	for name, filter := range listFilters {
		for _, order := range listOrders {
			query, args := listKeys("tenant", admin.KeyQuery{
				KeyFilter: filter, Order: order, Limit: 10, Now: listNow, After: admin.KeyPlace{At: listNow, Name: "n", ID: keyID(1)},
			}, "")
			sorts := 0
			for _, step := range plan(t, s, query, args) {
				if strings.HasPrefix(step, "SCAN keys") {
					t.Errorf("%s by %q reads the whole table: %s", name, order, step)
				}
				if strings.Contains(step, "TEMP B-TREE") {
					sorts++
				}
			}
			for _, owner := range []struct{ named, index string }{{filter.UserPrincipalName, "keys_by_user"}, {filter.AgentName, "keys_by_agent"}} {
				if steps := plan(t, s, query, args); owner.named != "" && !slices.ContainsFunc(steps, func(step string) bool { return strings.Contains(step, "INDEX "+owner.index+" ") }) {
					t.Errorf("%s by %q reads the keys of others: %q", name, order, steps)
				}
			}
			// The page is sorted once more, with the generations.
			if sorts > 1 && filter.UserPrincipalName == "" && filter.AgentName == "" && filter.Status != "expired" {
				t.Errorf("%s by %q sorts: %q", name, order, plan(t, s, query, args))
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

// TestRareKeysAreFoundByWhatIsRare: a part of the filter that means few keys decides the way to them, whatever the
// order; one that means many does not, or a page would cost sorting them all.
func TestRareKeysAreFoundByWhatIsRare(t *testing.T) {
	ctx := t.Context()
	s := open(t, file(t))
	_, err := s.Update(ctx, func(tx admin.Tx) error {
		errs := []error{tx.PutInstance(ctx, &apikey.Instance{ID: "tenant"}), tx.Audit(ctx, admin.Event{})}
		for i := range fewKeys + 20 {
			k := &apikey.Key{
				ID: keyID(i + 1), InstanceID: "tenant", Type: apikey.TypeInstance, Name: fmt.Sprint("common ", i), CreatedBy: "common", Environment: "common",
				CreatedAt: listNow, LastUsedAt: listNow.Add(time.Duration(i)),
			}
			if i%1000 == 1 {
				k.Name, k.CreatedBy, k.Environment, k.LastUsedAt, k.Disabled = fmt.Sprint("rare ", i), "rare", "rare", time.Time{}, true
				k.ExpirationDate, k.InactivityDays = listNow.Add(time.Hour), 5
			}
			errs = append(errs, tx.InsertKey(ctx, k))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		t.Fatal(err)
	}
	for want, filters := range map[string][]admin.KeyFilter{
		"keys_by_creator":     {{CreatedBy: "rare"}, {CreatedBy: "rare", Environment: "common"}},
		"keys_by_environment": {{Environment: "rare"}, {Environment: "rare", Status: "active"}, {Environment: "none"}},
		"keys_never_used":     {{NeverUsed: true}},
		"keys_by_name":        {{NamePrefix: "rare"}},
		"keys_by_expiry":      {{ExpiresBefore: listNow.Add(2 * time.Hour)}},
		"keys_by_idleness":    {{IdleBefore: listNow.Add(10 * 24 * time.Hour)}},
		"keys_by_status":      {{Status: "disabled"}, {Status: "disabled", CreatedBy: "common"}},
		"":                    {{}, {CreatedBy: "common"}, {Environment: "common"}, {NamePrefix: "common"}, {NoExpiration: true}, {Status: "active"}, {UserPrincipalName: "ann"}},
	} {
		for _, filter := range filters {
			for _, order := range listOrders {
				q := admin.KeyQuery{KeyFilter: filter, Order: order, Limit: 100, Now: listNow}
				got, err := s.rarest(ctx, "tenant", q)
				usual, _ := drive(orders[order].column, &filter)
				if err != nil || got != want && usual != want {
					t.Errorf("%+v by %q: got %q, %v, want %q", filter, order, got, err, want)
				}
				query, args := listKeys("tenant", q, got)
				if steps := plan(t, s, query, args); got != "" && !slices.ContainsFunc(steps, func(step string) bool { return strings.Contains(step, "INDEX "+got+" (") }) {
					t.Errorf("%+v by %q: %q", filter, order, steps)
				}
				keys, err := s.Keys(ctx, "tenant", q)
				if n := len(keys); err != nil || want != "" && want != "keys_by_status" && filter.Status == "" && filter.Environment == "rare" && n != 6 && order != admin.OrderIdle {
					t.Errorf("%+v by %q: %d keys, %v", filter, order, n, err)
				}
			}
		}
	}
}

var million = flag.Int("keys", 20_000, "keys of the benchmark of lists")

// BenchmarkLists measures the first page of every list; -keys 1000000 is what it is meant for.
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
		b.Run(strings.ReplaceAll(name, " ", "_"), func(b *testing.B) {
			filter := listFilters[name]
			q := admin.KeyQuery{KeyFilter: filter, Limit: 101, Now: listNow}
			switch {
			case !filter.IdleBefore.IsZero():
				q.Order = admin.OrderIdle
			case !filter.ExpiresBefore.IsZero():
				q.Order = admin.OrderExpiration
			case !filter.UnusedSince.IsZero():
				q.Order = admin.OrderLastUsed
			case filter.NamePrefix != "":
				q.Order = admin.OrderName
			}
			found := 0
			for b.Loop() {
				keys, err := s.Keys(ctx, "9d3ca1b4-0000-4000-8000-0123456789ab", q)
				if err != nil {
					b.Fatal(err)
				}
				found = len(keys)
			}
			b.ReportMetric(float64(found), "keys")
		})
	}
	b.Run("count", func(b *testing.B) {
		for b.Loop() {
			if _, err := s.CountKeys(ctx, "9d3ca1b4-0000-4000-8000-0123456789ab", admin.KeyOwner{}, listNow); err != nil {
				b.Fatal(err)
			}
		}
	})
}
