package storetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

const oneDay = 24 * time.Hour

// crowd makes keys of "tenant" in which everything that lists look at differs, and returns them as the
// store has them. Some that are over are marked, some are not.
func crowd(t *testing.T, s admin.Store, n int) []*apikey.Key {
	t.Helper()
	ctx := t.Context()
	instance(t, s, "tenant", "other")
	dice := rand.New(rand.NewPCG(1, 2))
	pick := func(of ...time.Duration) time.Duration { return of[dice.IntN(len(of))] }
	update(t, s, func(tx admin.Tx) error {
		for i := range n {
			k := plain("tenant", i+1)
			k.CreatedAt = noon.Add(-time.Duration(dice.IntN(6)) * 20 * oneDay)
			k.CreatedBy = []string{"token:a", "token:b"}[dice.IntN(2)]
			k.Name = []string{"app", "app-1", "app%", "apple", "b", "ap_", "éclair", "APP"}[dice.IntN(8)]
			k.Environment = []string{"", "prod", "test"}[dice.IntN(3)]
			switch dice.IntN(3) {
			case 0:
				k.Type, k.AgentName = apikey.TypeAgent, []string{"x", "y"}[dice.IntN(2)]
			case 1:
				k.Type, k.UserPrincipalName = apikey.TypeUser, []string{"x", "ann@example.com", "Ann@Example.com"}[dice.IntN(3)]
			}
			if dice.IntN(2) == 0 {
				k.LastUsedAt = k.CreatedAt.Add(pick(-oneDay, time.Hour, 40*oneDay))
			}
			if dice.IntN(2) == 0 {
				k.ExpirationDate = noon.Add(pick(-30*oneDay, -time.Microsecond, 0, time.Microsecond, 30*oneDay))
			}
			if dice.IntN(2) == 0 {
				k.InactivityDays = []int{1, 20, 40, 365}[dice.IntN(4)]
			}
			if dice.IntN(4) == 0 {
				k.IdleFrom = noon.Add(-pick(oneDay, 30*oneDay))
			}
			k.Disabled = dice.IntN(5) == 0
			if dice.IntN(5) == 0 {
				k.RevokedAt = noon.Add(-time.Duration(dice.IntN(5)) * oneDay)
			}
			both := i%20 == 0 // over in both ways, and listed once
			if both {
				k.CreatedAt, k.LastUsedAt, k.ExpirationDate, k.InactivityDays = noon.Add(-60*oneDay), time.Time{}, noon.Add(-oneDay), 1
				k.Disabled, k.RevokedAt = false, time.Time{}
			}
			if err := tx.InsertKey(ctx, k); err != nil {
				return err
			}
			for g := range 1 + dice.IntN(2) {
				if err := tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: g + 1, CreatedAt: noon}, digest("%d %d", i, g), 1); err != nil {
					return err
				}
			}
			if over := !k.ExpirationDate.IsZero() && k.ExpirationDate.Before(noon) || k.IdleAt(noon, k.LastUsedAt); over && k.RevokedAt.IsZero() && !both && dice.IntN(2) == 0 {
				if err := tx.MarkEnded(ctx, k.ID, noon); err != nil {
					return err
				}
			}
		}
		return insert(ctx, tx, plain("other", 1_000_000), digest("other"))
	})
	all, err := s.Keys(ctx, "tenant", admin.KeyQuery{Limit: n + 1})
	if err != nil || len(all) != n {
		t.Fatalf("got %d keys and error %v, want %d", len(all), err, n)
	}
	return all
}

// sorted returns what a query without a limit finds, by the filter and the order themselves.
func sorted(all []*apikey.Key, q admin.KeyQuery) []apikey.ID {
	var passed []*apikey.Key
	for _, k := range all {
		if q.Passes(k, q.Now) && (q.Order != admin.OrderIdle || k.InactivityDays > 0) {
			passed = append(passed, k)
		}
	}
	slices.SortFunc(passed, func(a, b *apikey.Key) int { return compare(q.Order, q.Order.PlaceOf(a), q.Order.PlaceOf(b)) })
	return idsOf(passed)
}

// compare says which of two places comes first in an order.
func compare(order admin.KeyOrder, x, y admin.KeyPlace) int {
	byTime := x.At.Compare(y.At)
	if strings.HasPrefix(string(order), "expirationDate") && x.At.IsZero() != y.At.IsZero() {
		byTime = -byTime // without a date: after all dates
	}
	c := cmp.Or(byTime, strings.Compare(x.Name, y.Name), slices.Compare(x.ID[:], y.ID[:]))
	if order == admin.OrderNewest || strings.HasSuffix(string(order), " desc") {
		return -c
	}
	return c
}

func idsOf(keys []*apikey.Key) []apikey.ID {
	var ids []apikey.ID
	for _, k := range keys {
		ids = append(ids, k.ID)
	}
	return ids
}

var allOrders = []admin.KeyOrder{
	admin.OrderNewest, admin.OrderOldest, admin.OrderName, admin.OrderNameDesc, admin.OrderLastUsed, admin.OrderLastUsedDesc,
	admin.OrderExpiration, admin.OrderExpirationDesc, admin.OrderIdle,
}

var someFilters = []admin.KeyFilter{
	{},
	{Type: apikey.TypeInstance}, {Type: apikey.TypeAgent},
	{Status: "active"}, {Status: "disabled"}, {Status: "revoked"}, {Status: "expired"},
	{UserPrincipalName: "ann@example.com"}, {UserPrincipalName: "x"}, {UserPrincipalName: "X"},
	{AgentName: "x"}, {AgentName: "x", Status: "expired"},
	{Environment: "prod"}, {Environment: "prod", Status: "active"},
	{CreatedBy: "token:a"}, {CreatedBy: "token:a", Environment: "test", Type: apikey.TypeUser},
	{NamePrefix: "app"}, {NamePrefix: "app%"}, {NamePrefix: "ap_"}, {NamePrefix: "é"}, {NamePrefix: "app", Status: "expired"},
	{UnusedSince: noon.Add(-50 * oneDay)}, {UnusedSince: noon.Add(-50 * oneDay), Status: "active"},
	{ExpiresBefore: noon.Add(30 * oneDay)}, {ExpiresBefore: noon.Add(31 * oneDay), Status: "active"}, {ExpiresBefore: noon},
	{IdleBefore: noon.Add(30 * oneDay)}, {IdleBefore: noon.Add(30 * oneDay), Status: "active"},
	{NeverUsed: true}, {NeverUsed: true, Status: "active"},
	{NoExpiration: true}, {NoExpiration: true, Type: apikey.TypeAgent},
	{
		Type: apikey.TypeUser, Status: "active", UserPrincipalName: "x", Environment: "prod", CreatedBy: "token:b", NamePrefix: "a",
		UnusedSince: noon.Add(oneDay), NeverUsed: true,
	},
}

func testLists(t *testing.T, s admin.Store) {
	all := crowd(t, s, 150)
	for _, filter := range someFilters {
		for _, order := range allOrders {
			q := admin.KeyQuery{KeyFilter: filter, Order: order, Limit: 1000, Now: noon}
			got, err := s.Keys(t.Context(), "tenant", q)
			if err != nil {
				t.Fatalf("%+v by %q: %v", filter, order, err)
			}
			wantSame(t, fmt.Sprintf("%+v by %q", filter, order), sorted(all, q), idsOf(got))
			for _, k := range got {
				i := slices.IndexFunc(all, func(one *apikey.Key) bool { return one.ID == k.ID })
				if i < 0 || len(all[i].Generations) != len(k.Generations) {
					t.Errorf("%+v by %q: key %v has other generations than in another list", filter, order, k.ID)
				}
			}
		}
	}
}

func testListPages(t *testing.T, s admin.Store) {
	all := crowd(t, s, 100)
	for _, status := range []string{"", "active", "expired", "revoked"} {
		for _, order := range allOrders {
			q := admin.KeyQuery{KeyFilter: admin.KeyFilter{Status: status}, Order: order, Limit: 7, Now: noon}
			want := sorted(all, q)
			var got []apikey.ID
			for len(got) <= len(want) {
				page, err := s.Keys(t.Context(), "tenant", q)
				if err != nil {
					t.Fatal(err)
				}
				if len(page) > q.Limit {
					t.Fatalf("a page of %d", len(page))
				}
				if len(page) == 0 {
					break
				}
				got = append(got, idsOf(page)...)
				q.After = order.PlaceOf(page[len(page)-1])
			}
			wantSame(t, fmt.Sprintf("pages of %q by %q", status, order), want, got)
		}
	}
}

// testKeyPages: pages that may be short are together the list, whatever it is of; each goes on where the last
// ended, and the last one says so.
func testKeyPages(t *testing.T, s admin.Store) {
	all := crowd(t, s, 150)
	for _, filter := range someFilters {
		for _, order := range allOrders {
			for _, limit := range []int{7, 1000} {
				q := admin.KeyQuery{KeyFilter: filter, Order: order, Limit: limit, Now: noon}
				what := fmt.Sprintf("pages of %+v by %q", filter, order)
				var got []apikey.ID
				for pages := 0; ; pages++ {
					page, err := s.KeyPage(t.Context(), "tenant", q)
					if err != nil {
						t.Fatal(err)
					}
					if len(page.Keys) > limit || pages > len(all) {
						t.Fatalf("%s: %d keys on page %d", what, len(page.Keys), pages)
					}
					got = append(got, idsOf(page.Keys)...)
					if page.Next == (admin.KeyPlace{}) {
						break
					}
					if q.After != (admin.KeyPlace{}) && compare(order, q.After, page.Next) >= 0 {
						t.Fatalf("%s: the next page is not after this", what)
					}
					q.After = page.Next
				}
				wantSame(t, what, sorted(all, q), got)
			}
		}
	}
	if page, err := s.KeyPage(t.Context(), "nowhere", admin.KeyQuery{Limit: 3}); err != nil || len(page.Keys) != 0 || page.Next != (admin.KeyPlace{}) {
		t.Errorf("keys of no instance: %+v, %v", page, err)
	}
	// A page that ends with the last key is the last.
	whole := admin.KeyQuery{Limit: len(all), Now: noon}
	if page, err := s.KeyPage(t.Context(), "tenant", whole); err != nil || len(page.Keys) == len(all) && page.Next != (admin.KeyPlace{}) {
		t.Errorf("the whole list has a next page: %+v, %v", page.Next, err)
	}
}

// count counts keys as the contract says, from the keys themselves.
func count(all []*apikey.Key, owner admin.KeyOwner, marked map[apikey.ID]bool, now time.Time) (n admin.KeyCounts) {
	for _, k := range all {
		if owner != (admin.KeyOwner{}) && admin.OwnerOf(k) != owner {
			continue
		}
		n.Total++
		switch {
		case !k.RevokedAt.IsZero():
			n.Revoked++
		case marked[k.ID] || !k.ExpirationDate.IsZero() && now.After(k.ExpirationDate):
			n.Expired++
		default:
			n.Usable++
			if k.Disabled {
				n.Disabled++
			}
		}
	}
	return n
}

func testCounts(t *testing.T, s admin.Store) {
	ctx := t.Context()
	if n, err := s.CountKeys(ctx, "nowhere", admin.KeyOwner{}, noon); err != nil || n != (admin.KeyCounts{}) {
		t.Errorf("of no instance: got %+v and error %v", n, err)
	}
	instance(t, s, "tenant", "other")
	marked := map[apikey.ID]bool{id(8): true, id(9): true}
	for n, change := range []func(k *apikey.Key){
		func(*apikey.Key) {},
		func(k *apikey.Key) { k.Disabled = true },
		func(k *apikey.Key) { k.NotBefore = noon.Add(time.Hour) },
		func(k *apikey.Key) { k.ExpirationDate = noon.Add(time.Microsecond) },
		func(k *apikey.Key) { k.ExpirationDate = noon }, // valid while now ≤ expiry
		func(k *apikey.Key) { k.ExpirationDate = noon.Add(-time.Microsecond) },
		func(k *apikey.Key) { k.ExpirationDate, k.Disabled = time.Unix(0, 0), true },
		func(k *apikey.Key) { k.ExpirationDate = noon.Add(-time.Hour) },                                   // marked
		func(k *apikey.Key) { k.InactivityDays, k.Disabled, k.CreatedAt = 1, true, noon.Add(-10*oneDay) }, // marked
		func(k *apikey.Key) { k.InactivityDays, k.CreatedAt = 1, noon.Add(-10*oneDay) },                   // idle, and nobody has noticed
		func(k *apikey.Key) { k.RevokedAt, k.Disabled = noon, true },
		func(k *apikey.Key) { k.RevokedAt, k.ExpirationDate = time.Unix(0, 0), noon.Add(-time.Hour) },
		func(k *apikey.Key) { k.InstanceID = "other" },
		func(k *apikey.Key) { k.Type = "" },
	} {
		for _, owner := range []admin.KeyOwner{{}, {Type: apikey.TypeAgent, Name: "x"}, {Type: apikey.TypeUser, Name: "x"}} {
			if n > 0 && owner.Type != "" && n%3 == 0 {
				continue // so that owners differ
			}
			k := plain("tenant", n+1)
			change(k)
			if owner.Type != "" {
				k.Type, k.ID[1] = owner.Type, owner.Type[0]
				if marked[id(n+1)] {
					marked[k.ID] = true
				}
			}
			switch owner.Type {
			case apikey.TypeAgent:
				k.AgentName = owner.Name
			case apikey.TypeUser:
				k.UserPrincipalName = []string{owner.Name, strings.ToUpper(owner.Name)}[n%2] // one owner
			}
			update(t, s, func(tx admin.Tx) error {
				err := tx.InsertKey(ctx, k)
				if marked[k.ID] {
					err = errors.Join(err, tx.MarkEnded(ctx, k.ID, noon), tx.MarkEnded(ctx, k.ID, noon.Add(time.Hour)))
				}
				return err
			})
		}
	}
	for _, in := range []string{"tenant", "other"} {
		all, err := s.Keys(ctx, in, admin.KeyQuery{Limit: 1000})
		if err != nil {
			t.Fatal(err)
		}
		for _, owner := range []admin.KeyOwner{
			{}, {Type: apikey.TypeAgent, Name: "x"}, {Type: apikey.TypeUser, Name: "x"}, {Type: apikey.TypeUser, Name: "y"}, {Type: apikey.TypeUser},
		} {
			got, err := s.CountKeys(ctx, in, owner, noon)
			if err != nil {
				t.Fatal(err)
			}
			wantSame(t, fmt.Sprintf("%s, %+v", in, owner), count(all, owner, marked, noon), got)
		}
	}
}

// testCountsUnderChange: whatever happens to keys, the counts that are kept are those of the keys.
func testCountsUnderChange(t *testing.T, s admin.Store) {
	ctx := t.Context()
	all := crowd(t, s, 60)
	dice := rand.New(rand.NewPCG(3, 4))
	marked := map[apikey.ID]bool{}
	for _, k := range all { // as far as crowd marked any, which nothing but counts tells
		update(t, s, func(tx admin.Tx) error { return tx.UpdateKey(ctx, reborn(k)) })
	}
	for range 40 {
		k := all[dice.IntN(len(all))]
		update(t, s, func(tx admin.Tx) error {
			now, err := tx.Key(ctx, "tenant", k.ID)
			if errors.Is(err, apikey.ErrNotFound) {
				return nil
			}
			if err != nil {
				return err
			}
			switch dice.IntN(6) {
			case 0:
				now.Disabled = !now.Disabled
			case 1:
				now.RevokedAt = noon
			case 2:
				now.ExpirationDate = noon.Add(time.Duration(dice.IntN(10)-5) * oneDay)
				delete(marked, k.ID)
			case 3:
				marked[k.ID] = true
				return tx.MarkEnded(ctx, k.ID, noon)
			case 4:
				delete(marked, k.ID)
				return tx.DeleteKey(ctx, "tenant", k.ID)
			case 5:
				now.Name = "renamed" // takes no mark back
			}
			return tx.UpdateKey(ctx, now)
		})
		left, err := s.Keys(ctx, "tenant", admin.KeyQuery{Limit: 1000})
		if err != nil {
			t.Fatal(err)
		}
		for _, owner := range []admin.KeyOwner{{}, {Type: apikey.TypeAgent, Name: "x"}, {Type: apikey.TypeUser, Name: "ann@example.com"}} {
			got, err := s.CountKeys(ctx, "tenant", owner, noon)
			if err != nil {
				t.Fatal(err)
			}
			if want := count(left, owner, marked, noon); got != want {
				t.Fatalf("%+v: got %+v, want %+v", owner, got, want)
			}
		}
	}
	update(t, s, func(tx admin.Tx) error { return tx.DeleteInstance(ctx, "tenant") })
	instance(t, s, "tenant")
	if n, err := s.CountKeys(ctx, "tenant", admin.KeyOwner{}, noon); err != nil || n != (admin.KeyCounts{}) {
		t.Errorf("a new instance of an old name: got %+v and error %v", n, err)
	}
	if n, err := s.CountKeys(ctx, "other", admin.KeyOwner{}, noon); err != nil || n.Total != 1 {
		t.Errorf("the neighbour: got %+v and error %v", n, err)
	}
}

// reborn is k with another expiry, which takes marks back.
func reborn(k *apikey.Key) *apikey.Key {
	k.ExpirationDate = k.ExpirationDate.Add(time.Second)
	if k.ExpirationDate.Year() < 1970 {
		k.ExpirationDate = noon.Add(oneDay)
	}
	return k
}

func testEndGeneration(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	k := keyOf(t, s, "tenant", 1)
	update(t, s, func(tx admin.Tx) error {
		return tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 2, Hint: "two", CreatedAt: noon}, digest("two"), 1)
	})
	before := found(t, s, digest("key 1"))
	for _, c := range []struct {
		until   time.Time
		revoked bool
	}{{noon.Add(time.Hour), false}, {noon, true}, {noon.Add(time.Minute), false}} {
		revision := update(t, s, func(tx admin.Tx) error { return tx.EndGeneration(ctx, k.ID, 1, c.until, c.revoked) })
		before.Generations[0].ValidUntil, before.Generations[0].Revoked, before.Revision = c.until, c.revoked, revision
		wantSame(t, "by the digest of the one that was ended", before, found(t, s, digest("key 1")))
		changes, _, _, err := s.Changes(ctx, revision-1)
		if err != nil || len(changes) != 1 || changes[0].KeyID != k.ID || !slices.Contains(changes[0].Digests, digest("key 1")) {
			t.Errorf("changes: got %v and error %v: a cache would go on with the old generation", changes, err)
		}
	}
	if two := found(t, s, digest("two")); two.Generation != 2 || !two.Generations[1].ValidUntil.IsZero() {
		t.Errorf("the other generation: got %+v", two)
	}
}

func testDeleteKey(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	gone, stays := keyOf(t, s, "tenant", 1), keyOf(t, s, "tenant", 2)
	revision := update(t, s, func(tx admin.Tx) error { return tx.DeleteKey(ctx, "tenant", gone.ID) })
	wantNotFound(t, s, digest("key 1"))
	if _, err := s.Key(ctx, "tenant", gone.ID); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	changes, _, _, err := s.Changes(ctx, revision-1)
	if err != nil || len(changes) != 1 || changes[0].KeyID != gone.ID || !slices.Equal(changes[0].Digests, []apikey.Digest{digest("key 1")}) {
		t.Errorf("changes: got %v and error %v: a cache would go on with the key", changes, err)
	}
	found(t, s, digest("key 2"))
	_ = stays
	// What is gone leaves its place.
	update(t, s, func(tx admin.Tx) error { return insert(ctx, tx, plain("tenant", 1), digest("key 1")) })
}

func testCreations(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant", "other")
	for n := range 6 {
		k := plain("tenant", n+1)
		k.CreatedAt = noon.Add(time.Duration(n) * time.Minute)
		k.CreatedBy = []string{"even", "odd"}[n%2]
		if n == 5 {
			k.RevokedAt = noon // revoked keys were made too
		}
		update(t, s, func(tx admin.Tx) error { return tx.InsertKey(ctx, k) })
	}
	keyOf(t, s, "other", 100)
	minute := func(list ...int) (times []time.Time) {
		for _, n := range list {
			times = append(times, noon.Add(time.Duration(n)*time.Minute))
		}
		return times
	}
	for _, c := range []struct {
		by    string
		since time.Time
		limit int
		want  []time.Time
	}{
		{"", time.Time{}, 10, minute(5, 4, 3, 2, 1, 0)},
		{"", noon.Add(2 * time.Minute), 10, minute(5, 4, 3)}, // after it
		{"", time.Time{}, 2, minute(5, 4)},
		{"odd", time.Time{}, 10, minute(5, 3, 1)},
		{"odd", noon.Add(time.Minute), 1, minute(5)},
		{"nobody", time.Time{}, 10, nil},
		{"", time.Time{}, 0, nil},
	} {
		got, err := s.Creations(ctx, "tenant", c.by, c.since, c.limit)
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, fmt.Sprintf("%+v", c), c.want, got)
	}
}

func testDueKeys(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant", "other")
	idle := func(k *apikey.Key, days int) { k.InactivityDays, k.CreatedAt = days, noon.Add(-10*oneDay) }
	due := map[apikey.ID]bool{}
	for n, c := range []struct {
		due    bool
		change func(k *apikey.Key)
	}{
		{false, func(*apikey.Key) {}},
		{true, func(k *apikey.Key) { k.ExpirationDate = noon.Add(-time.Microsecond) }},
		{true, func(k *apikey.Key) { k.ExpirationDate, k.InstanceID = time.Unix(0, 0), "other" }},
		{true, func(k *apikey.Key) { k.ExpirationDate, k.Disabled = noon.Add(-oneDay), true }},
		{false, func(k *apikey.Key) { k.ExpirationDate = noon }},
		{false, func(k *apikey.Key) { k.ExpirationDate, k.RevokedAt = noon.Add(-oneDay), noon }},
		{true, func(k *apikey.Key) { idle(k, 8) }},
		{false, func(k *apikey.Key) { idle(k, 9) }}, // by the hour given for idleness, which is a day before
		{false, func(k *apikey.Key) { idle(k, 1); k.LastUsedAt = noon.Add(-oneDay) }},
		{false, func(k *apikey.Key) { idle(k, 1); k.IdleFrom = noon.Add(-oneDay) }},
		{true, func(k *apikey.Key) { idle(k, 1); k.ExpirationDate = noon.Add(-oneDay) }},        // both: once
		{true, func(k *apikey.Key) { idle(k, 1); k.ExpirationDate = noon.AddDate(1000, 0, 0) }}, // by the store's clock too
	} {
		k := plain("tenant", n+1)
		c.change(k)
		due[k.ID] = c.due
		update(t, s, func(tx admin.Tx) error { return insert(ctx, tx, k, digest("key %d", n+1)) })
	}
	list := func() map[apikey.ID]bool {
		got := map[apikey.ID]bool{}
		keys, err := s.DueKeys(ctx, noon, noon.Add(-oneDay), 100)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range keys {
			if got[k.ID] || len(k.Generations) != 1 {
				t.Errorf("key %v twice, or with %d generations", k.ID, len(k.Generations))
			}
			got[k.ID] = true
		}
		return got
	}
	for k, want := range due {
		if got := list()[k]; got != want {
			t.Errorf("key %v: due %t, want %t", k, got, want)
		}
	}
	if keys, err := s.DueKeys(ctx, noon, noon, 2); err != nil || len(keys) != 2 {
		t.Errorf("at most 2: got %d and error %v", len(keys), err)
	}
	// Marked keys are not listed again, and no cache hears of it.
	before := dump(t, s).Keys
	revision := update(t, s, func(tx admin.Tx) error {
		for k, is := range due {
			if is {
				if err := tx.MarkEnded(ctx, k, noon); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if left := list(); len(left) != 0 {
		t.Errorf("marked, and still due: %v", left)
	}
	wantSame(t, "keys after their marks", before, dump(t, s).Keys)
	if changes, _, _, err := s.Changes(ctx, revision-1); err != nil || len(changes) != 0 {
		t.Errorf("changes: got %v and error %v", changes, err)
	}
	// A later use takes back the mark of an idle key, not that of one whose date has passed.
	now := time.Now()
	if err := s.Touch(ctx, []apikey.Use{{KeyID: id(12), Generation: 1, At: now}, {KeyID: id(2), Generation: 1, At: now}}); err != nil {
		t.Fatal(err)
	}
	counts, err := s.CountKeys(ctx, "tenant", admin.KeyOwner{}, noon)
	if err != nil || counts.Expired != 4 { // 2, 4, 7, 11
		t.Errorf("got %+v and error %v, want 4 expired", counts, err)
	}
	// Another date takes it back too.
	extended := plain("tenant", 2)
	extended.ExpirationDate = noon.Add(oneDay)
	update(t, s, func(tx admin.Tx) error { return tx.UpdateKey(ctx, extended) })
	if counts, err = s.CountKeys(ctx, "tenant", admin.KeyOwner{}, noon); err != nil || counts.Expired != 3 {
		t.Errorf("got %+v and error %v, want 3 expired", counts, err)
	}
	// And so does a use of any other key that was marked by mistake, by a clock that was ahead for a while.
	update(t, s, func(tx admin.Tx) error { return tx.MarkEnded(ctx, id(1), noon) })
	if counts, err = s.CountKeys(ctx, "tenant", admin.KeyOwner{}, noon); err != nil || counts.Expired != 4 {
		t.Errorf("got %+v and error %v, want 4 expired", counts, err)
	}
	if err := s.Touch(ctx, []apikey.Use{{KeyID: id(1), Generation: 1, At: now}}); err != nil {
		t.Fatal(err)
	}
	if counts, err = s.CountKeys(ctx, "tenant", admin.KeyOwner{}, noon); err != nil || counts.Expired != 3 {
		t.Errorf("got %+v and error %v, want 3 expired", counts, err)
	}
}

func testRevokedKeys(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant", "other")
	for n := range 6 {
		k := plain("tenant", n+1)
		if n > 0 {
			k.RevokedAt = noon.Add(time.Duration(-n) * time.Hour)
		}
		if n == 5 {
			k.InstanceID = "other"
		}
		update(t, s, func(tx admin.Tx) error { return insert(ctx, tx, k, digest("key %d", n+1)) })
	}
	for _, c := range []struct {
		before time.Time
		limit  int
		want   []apikey.ID
	}{
		{noon, 10, []apikey.ID{id(5), id(4), id(3), id(2)}},
		{noon.Add(-2 * time.Hour), 10, []apikey.ID{id(5), id(4)}},
		{noon, 1, []apikey.ID{id(5)}},
	} {
		got, err := s.RevokedKeys(ctx, "tenant", c.before, c.limit)
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, fmt.Sprintf("%+v", c), c.want, idsOf(got))
	}
}

func testLead(t *testing.T, s admin.Store) {
	ctx := t.Context()
	lead := func(job, holder string, ttl time.Duration) bool {
		t.Helper()
		leads, err := s.Lead(ctx, job, holder, ttl)
		if err != nil {
			t.Fatal(err)
		}
		return leads
	}
	var leaders atomic.Int64
	var all sync.WaitGroup
	for n := range 20 {
		all.Go(func() {
			if leads, err := s.Lead(context.WithoutCancel(ctx), "crowd", fmt.Sprint(n), time.Minute); err != nil {
				t.Error(err)
			} else if leads {
				leaders.Add(1)
			}
		})
	}
	all.Wait()
	if n := leaders.Load(); n != 1 {
		t.Errorf("%d lead, want 1", n)
	}
	if !lead("job", "a", time.Minute) || lead("job", "b", time.Minute) || !lead("job", "a", time.Minute) || !lead("another", "b", time.Minute) {
		t.Error("who came first must lead, and go on, until it gives up")
	}
	if lead("job", "b", 0) || lead("job", "b", time.Minute) {
		t.Error("another gave up what was not its own")
	}
	if lead("job", "a", 0) || !lead("job", "b", 20*time.Millisecond) {
		t.Error("what was given up must be free")
	}
	for deadline := time.Now().Add(10 * time.Second); !lead("job", "a", time.Minute); {
		if time.Now().After(deadline) {
			t.Fatal("a lead that ran out is still held")
		}
		time.Sleep(5 * time.Millisecond)
	}
}
