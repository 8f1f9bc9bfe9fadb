package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// usageKey is id, and for 0 that of no key: of the instance as a whole.
func usageKey(n int) apikey.ID {
	if n == 0 {
		return apikey.ID{}
	}
	return id(n)
}

// fullHour is the beginning of a minute, and of an hour.
var fullHour = noon.Truncate(time.Hour)

// always is longer than anything is kept.
var always = [2]time.Time{noon.AddDate(-1, 0, 0), noon.AddDate(1, 0, 0)}

// used returns what was counted in an interval.
func used(t *testing.T, s admin.Store, instance string, key apikey.ID, interval admin.UsageInterval) []admin.Usage {
	t.Helper()
	list, err := s.Usage(t.Context(), admin.UsageQuery{InstanceID: instance, KeyID: key, Interval: interval, From: always[0], To: always[1]})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func addUsage(t *testing.T, s admin.Store, counts ...admin.Usage) {
	t.Helper()
	if err := s.AddUsage(t.Context(), admin.UsageBatch{}, counts); err != nil {
		t.Fatal(err)
	}
}

// fullCounts is what is counted with a value in every field.
func fullCounts() admin.UsageCounts {
	return admin.UsageCounts{
		Allowed: 5, Refused: 3, Reasons: map[string]int64{"limit_burst": 2, "missing_scope": 1},
		Generations: map[int]int64{1: 4, 2: 1}, Networks: map[string]int64{"192.0.2.0/24": 4, admin.OtherNetworks: 1},
		Ended: admin.EndedRequests{
			Count: 6, Status: [6]int64{1, 0, 2, 1, 1, 1}, RequestBytes: 700, ResponseBytes: 1 << 40, Duration: 3 * time.Second, Longest: 2 * time.Second,
		},
	}
}

func testUsage(t *testing.T, s admin.Store) {
	full := fullCounts()
	wantNoZero(t, full)
	wantNoZero(t, full.Ended)
	start := time.Date(2026, 3, 1, 23, 59, 30, 123, time.FixedZone("east", 2*3600))
	of := func(key int, at time.Time, c admin.UsageCounts) admin.Usage {
		return admin.Usage{InstanceID: "tenant", KeyID: usageKey(key), Start: at, UsageCounts: c}
	}
	instance(t, s, "tenant", "other")
	// A minute, the next, which is another hour, and one of the next day in UTC.
	addUsage(t, s, of(1, start, full), of(2, start, full), of(0, start, full))
	addUsage(t, s, of(1, start, full), of(1, start.Add(30*time.Second), full), of(1, start.Add(2*time.Hour+time.Minute), full))
	addUsage(t, s, admin.Usage{Start: start, UsageCounts: full}) // of no instance
	addUsage(t, s)                                               // nothing at all

	twice := fullCounts()
	twice.Add(&full)
	if twice.Ended.Longest != full.Ended.Longest || twice.Ended.Duration != 2*full.Ended.Duration || twice.Reasons["limit_burst"] != 4 {
		t.Fatalf("adding: %+v", twice)
	}
	thrice := sum(twice, full)
	at := func(day, hour, minute int) time.Time { return time.Date(2026, 3, day, hour, minute, 0, 0, time.UTC) }
	for interval, want := range map[admin.UsageInterval][]admin.Usage{
		admin.UsageMinute: {of(1, at(1, 21, 59), twice), of(1, at(1, 22, 0), full), of(1, at(2, 0, 0), full)},
		admin.UsageHour:   {of(1, at(1, 21, 0), twice), of(1, at(1, 22, 0), full), of(1, at(2, 0, 0), full)},
		admin.UsageDay:    {of(1, at(1, 0, 0), thrice), of(1, at(2, 0, 0), full)},
	} {
		wantSame(t, string(interval), want, used(t, s, "tenant", usageKey(1), interval))
	}
	wantSame(t, "another key", []admin.Usage{of(2, at(1, 21, 0), full)}, used(t, s, "tenant", usageKey(2), admin.UsageHour))
	wantSame(t, "the instance", []admin.Usage{of(0, at(1, 21, 0), full)}, used(t, s, "tenant", apikey.ID{}, admin.UsageHour))
	wantSame(t, "no instance", []admin.Usage{{Start: at(1, 21, 0), UsageCounts: full}}, used(t, s, "", apikey.ID{}, admin.UsageHour))
	if list := used(t, s, "other", usageKey(1), admin.UsageHour); len(list) != 0 {
		t.Errorf("another instance's key: %+v", list)
	}
	q := admin.UsageQuery{InstanceID: "tenant", KeyID: usageKey(1), Interval: admin.UsageMinute, From: at(1, 22, 0), To: at(2, 0, 0)}
	list, err := s.Usage(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, "from the first to before the last", []admin.Usage{of(1, at(1, 22, 0), full)}, list)
}

func sum(a, b admin.UsageCounts) admin.UsageCounts {
	var c admin.UsageCounts
	c.Add(&a)
	c.Add(&b)
	return c
}

// testUsageAgrees: whatever is added, in whatever batches and by however many at once, minutes, hours and days say the same.
func testUsageAgrees(t *testing.T, s admin.Store) {
	const writers, rounds = 4, 25
	instance(t, s, "tenant")
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for round := range rounds {
				var batch []admin.Usage
				for key := range 3 {
					batch = append(batch, admin.Usage{
						InstanceID: "tenant", KeyID: usageKey(key), Start: fullHour.Add(time.Duration(round*(w+1)) * 17 * time.Minute),
						UsageCounts: admin.UsageCounts{Allowed: 1, Generations: map[int]int64{w: 1}},
					})
				}
				if err := s.AddUsage(t.Context(), admin.UsageBatch{}, batch); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	for key := range 3 {
		for _, interval := range admin.UsageIntervals() {
			var total admin.UsageCounts
			for _, u := range used(t, s, "tenant", usageKey(key), interval) {
				if !u.Start.Equal(u.Start.Truncate(interval.Duration())) {
					t.Errorf("%s: begins at %v", interval, u.Start)
				}
				total.Add(&u.UsageCounts)
			}
			want := admin.UsageCounts{Allowed: writers * rounds, Generations: map[int]int64{0: rounds, 1: rounds, 2: rounds, 3: rounds}}
			wantSame(t, fmt.Sprintf("key %d by %s", key, interval), want, total)
		}
	}
}

func testUsageNetworks(t *testing.T, s admin.Store) {
	counts := func(first, n int) admin.Usage {
		u := admin.Usage{InstanceID: "tenant", KeyID: usageKey(1), Start: fullHour, UsageCounts: admin.UsageCounts{Networks: map[string]int64{}}}
		for i := range n {
			u.Networks[fmt.Sprintf("10.0.%d.0/24", first+i)] = 1
			u.Allowed++
		}
		return u
	}
	instance(t, s, "tenant")
	addUsage(t, s, counts(0, admin.MaxNetworks-1))
	addUsage(t, s, counts(0, 30))
	addUsage(t, s, counts(100, 50))
	for _, interval := range admin.UsageIntervals() {
		list := used(t, s, "tenant", usageKey(1), interval)
		if len(list) != 1 {
			t.Fatalf("%s: %+v", interval, list)
		}
		total := int64(0)
		for _, n := range list[0].Networks {
			total += n
		}
		if got := list[0].Networks; len(got) > admin.MaxNetworks+1 || got[admin.OtherNetworks] != 49 || got["10.0.0.0/24"] != 2 || total != list[0].Allowed {
			t.Errorf("%s: %d networks, %d other, %d in all: %v", interval, len(got), got[admin.OtherNetworks], total, got)
		}
	}
}

func testUsageTop(t *testing.T, s admin.Store) {
	var batch []admin.Usage
	add := func(in string, key int, at time.Time, allowed, refused int64) {
		batch = append(batch, admin.Usage{InstanceID: in, KeyID: usageKey(key), Start: at, UsageCounts: admin.UsageCounts{
			Allowed: allowed, Refused: refused, Reasons: map[string]int64{"limit_burst": refused},
		}})
	}
	instance(t, s, "tenant", "other")
	add("tenant", 1, fullHour, 10, 0)
	add("tenant", 1, fullHour.Add(time.Hour), 10, 1)
	add("tenant", 2, fullHour, 15, 5)
	add("tenant", 3, fullHour, 0, 20)
	add("tenant", 4, fullHour, 20, 0) // as much as 2 and 3
	add("tenant", 5, fullHour.Add(3*time.Hour), 1000, 1000)
	add("tenant", 0, fullHour, 1000, 1000) // the instance is no key
	add("other", 6, fullHour, 1000, 1000)
	addUsage(t, s, batch...)
	for name, c := range map[string]struct {
		by    admin.UsageOrder
		limit int
		want  []apikey.ID
	}{
		"by requests":   {admin.ByRequests, 10, []apikey.ID{id(1), id(2), id(3), id(4)}},
		"the first two": {admin.ByRequests, 2, []apikey.ID{id(1), id(2)}},
		"by refused":    {admin.ByRefused, 10, []apikey.ID{id(3), id(2), id(1), id(4)}},
	} {
		for _, interval := range []admin.UsageInterval{admin.UsageMinute, admin.UsageHour} {
			list, err := s.TopUsage(t.Context(), "tenant", admin.UsageTop{Interval: interval, From: fullHour, To: fullHour.Add(2 * time.Hour), By: c.by, Limit: c.limit})
			if err != nil {
				t.Fatal(err)
			}
			var got []apikey.ID
			for _, u := range list {
				got = append(got, u.KeyID)
				if u.KeyID == usageKey(1) {
					wantSame(t, "sum", admin.Usage{InstanceID: "tenant", KeyID: usageKey(1), UsageCounts: admin.UsageCounts{
						Allowed: 20, Refused: 1, Reasons: map[string]int64{"limit_burst": 1},
					}}, u)
				}
			}
			wantSame(t, name, c.want, got)
		}
	}
}

func testForgetUsage(t *testing.T, s admin.Store) {
	instance(t, s, "tenant")
	var batch []admin.Usage
	for i := range 1200 { // more than a store would remove in one go
		batch = append(batch, admin.Usage{InstanceID: "tenant", KeyID: usageKey(i % 2), Start: fullHour.Add(time.Duration(i) * time.Minute), UsageCounts: admin.UsageCounts{Allowed: 1}})
	}
	addUsage(t, s, batch...)
	err := s.ForgetUsage(t.Context(), map[admin.UsageInterval]time.Time{
		admin.UsageMinute: fullHour.Add(1190 * time.Minute), admin.UsageHour: fullHour.Add(2 * time.Hour),
	})
	if err != nil {
		t.Fatal(err)
	}
	for interval, want := range map[admin.UsageInterval]int{admin.UsageMinute: 5, admin.UsageHour: 18, admin.UsageDay: 2} {
		for key := range 2 {
			if list := used(t, s, "tenant", usageKey(key), interval); len(list) != want {
				t.Errorf("key %d by %s: %d left, want %d", key, interval, len(list), want)
			}
		}
	}
	if list := used(t, s, "tenant", usageKey(0), admin.UsageMinute); !list[0].Start.Equal(fullHour.Add(1190 * time.Minute)) {
		t.Errorf("what began at the time itself is gone: %v", list[0].Start)
	}
}

// testUsageGoesWithItsInstance, and stays when a key goes.
func testUsageGoesWithItsInstance(t *testing.T, s admin.Store) {
	alertOf := func(in string) apikey.ID { return id(len(in) + int(in[1])) }
	instance(t, s, "tenant")
	instance(t, s, "target")
	keyOf(t, s, "target", 1)
	keyOf(t, s, "tenant", 2)
	for _, in := range []string{"tenant", "target"} {
		for key := range 3 {
			addUsage(t, s, admin.Usage{InstanceID: in, KeyID: usageKey(key), Start: fullHour, UsageCounts: fullCounts()})
		}
		putAlert(t, s, &admin.Alert{ID: alertOf(in), InstanceID: in, Kind: admin.AlertUnused, KeyID: id(1), OpenedAt: fullHour}, nil)
	}
	left := func() (n int) {
		for key := range 3 {
			for _, interval := range admin.UsageIntervals() {
				n += len(used(t, s, "target", usageKey(key), interval))
			}
		}
		alerts, err := s.Alerts(t.Context(), admin.AlertQuery{InstanceID: "target", Limit: 10})
		if err != nil {
			t.Fatal(err)
		}
		return n + len(alerts)
	}
	update(t, s, func(tx admin.Tx) error { return tx.DeleteKey(t.Context(), "target", usageKey(1)) })
	if n := left(); n != 10 {
		t.Errorf("a key was removed: %d left, want 10", n)
	}
	failed := errors.New("changed its mind")
	if _, err := s.Update(t.Context(), func(tx admin.Tx) error {
		return errors.Join(tx.Audit(t.Context(), event), tx.DeleteInstance(t.Context(), "target"), failed)
	}); !errors.Is(err, failed) {
		t.Fatal(err)
	}
	if n := left(); n != 10 {
		t.Errorf("an instance was not removed after all: %d left, want 10", n)
	}
	update(t, s, func(tx admin.Tx) error { return tx.DeleteInstance(t.Context(), "target") })
	gone := func(when string) {
		t.Helper()
		if n := left(); n != 0 {
			t.Errorf("%s: %d left", when, n)
		}
		top, err := s.TopUsage(t.Context(), "target", admin.UsageTop{Interval: admin.UsageDay, From: always[0], To: always[1], By: admin.ByRequests, Limit: 9})
		keys, keysErr := s.KeysUsage(t.Context(), []apikey.ID{id(1)}, admin.UsageQuery{InstanceID: "target", Interval: admin.UsageDay, From: always[0], To: always[1]})
		if err != nil || keysErr != nil || len(top)+len(keys) > 0 {
			t.Errorf("%s: top %v, keys %v; %v, %v", when, top, keys, err, keysErr)
		}
		everywhere, err := s.Alerts(t.Context(), admin.AlertQuery{Everywhere: true, Limit: 10})
		ofKey, keyErr := s.Alerts(t.Context(), admin.AlertQuery{InstanceID: "target", KeyID: id(1), Open: true, Limit: 10})
		open, openErr := s.OpenAlerts(t.Context())
		if err != nil || openErr != nil || keyErr != nil || len(everywhere) != 1 || len(ofKey) != 0 || len(open) != 1 {
			t.Errorf("%s: alerts %v, of its key %v, open %v; %v, %v, %v", when, everywhere, ofKey, open, err, keyErr, openErr)
		}
		if _, err := s.Alert(t.Context(), alertOf("target")); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("%s: its alert: %v", when, err)
		}
	}
	gone("an instance was removed")
	instance(t, s, "target")
	gone("it was made again")
	again := &admin.Alert{ID: id(77), InstanceID: "target", Kind: admin.AlertUnused, KeyID: id(1), OpenedAt: fullHour}
	putAlert(t, s, again, nil) // the one that was open is no obstacle
	update(t, s, func(tx admin.Tx) error { return tx.DeleteInstance(t.Context(), "target") })
	instance(t, s, "target")
	if err := s.ForgetDeleted(t.Context()); err != nil {
		t.Fatal(err)
	}
	gone("what was left of it is removed")
	if alerts, err := s.Alerts(t.Context(), admin.AlertQuery{InstanceID: "tenant", Limit: 10}); err != nil || len(alerts) != 1 || len(used(t, s, "tenant", usageKey(1), admin.UsageDay)) != 1 {
		t.Errorf("another instance lost its own: %v, %v", alerts, err)
	}
}

// testUsageAllOrNothing: a batch that was not written is tried again, so nothing of it may have been added.
func testUsageAllOrNothing(t *testing.T, s admin.Store) {
	instance(t, s, "tenant")
	var batch []admin.Usage
	for i := range 3000 {
		batch = append(batch, admin.Usage{InstanceID: "tenant", KeyID: usageKey(i), Start: fullHour, UsageCounts: fullCounts()})
	}
	for _, after := range []time.Duration{0, time.Millisecond, 20 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		err := s.AddUsage(ctx, admin.UsageBatch{Writer: id(1), Number: 1}, batch)
		cancel()
		first, last := used(t, s, "tenant", usageKey(0), admin.UsageDay), used(t, s, "tenant", usageKey(2999), admin.UsageDay)
		if err == nil {
			return // as fast as that
		}
		if len(first)+len(last) > 0 {
			t.Fatalf("a batch failed (%v), and some of it was added", err)
		}
	}
	// Nothing was added, so it is still to come.
	if err := s.AddUsage(t.Context(), admin.UsageBatch{Writer: id(1), Number: 1}, batch[:1]); err != nil || len(used(t, s, "tenant", usageKey(0), admin.UsageDay)) != 1 {
		t.Errorf("a batch that failed could not be added any more: %v", err)
	}
}

// testUsageBatches: a batch that comes again is added once.
func testUsageBatches(t *testing.T, s admin.Store) {
	instance(t, s, "tenant")
	want := int64(0)
	for _, c := range []struct {
		what   string
		as     admin.UsageBatch
		adding int64
	}{
		{"the first one", admin.UsageBatch{Writer: id(1), Number: 1}, 1},
		{"again", admin.UsageBatch{Writer: id(1), Number: 1}, 0},
		{"another writer's", admin.UsageBatch{Writer: id(2), Number: 1}, 1},
		{"the next", admin.UsageBatch{Writer: id(1), Number: 2}, 1},
		{"much later", admin.UsageBatch{Writer: id(1), Number: 1 << 40}, 1},
		{"that again", admin.UsageBatch{Writer: id(1), Number: 1 << 40}, 0},
		{"an old one", admin.UsageBatch{Writer: id(1), Number: 2}, 0},
		{"the other writer's again", admin.UsageBatch{Writer: id(2), Number: 1}, 0},
		{"one without a name", admin.UsageBatch{}, 1},
		{"and again", admin.UsageBatch{}, 1},
	} {
		if err := s.AddUsage(t.Context(), c.as, []admin.Usage{{InstanceID: "tenant", Start: fullHour, UsageCounts: admin.UsageCounts{Allowed: 1}}}); err != nil {
			t.Fatal(err)
		}
		want += c.adding
		for _, interval := range admin.UsageIntervals() {
			if list := used(t, s, "tenant", apikey.ID{}, interval); len(list) != 1 || list[0].Allowed != want {
				t.Fatalf("%s, by %s: %+v, want %d", c.what, interval, list, want)
			}
		}
	}
}

// testUsageOfAnotherInstance: counts may come late, when their instance is gone, or another one has its name.
func testUsageOfAnotherInstance(t *testing.T, s admin.Store) {
	made := noon.Add(1234 * time.Nanosecond)
	put := func(at time.Time) {
		update(t, s, func(tx admin.Tx) error {
			return tx.PutInstance(t.Context(), &apikey.Instance{ID: "target", CreatedAt: at})
		})
	}
	counts := func(allowed int64, made time.Time) admin.Usage {
		return admin.Usage{InstanceID: "target", KeyID: usageKey(1), Start: fullHour, InstanceMade: made, UsageCounts: admin.UsageCounts{Allowed: allowed}}
	}
	want := func(what string, want int64) {
		t.Helper()
		for _, interval := range admin.UsageIntervals() {
			var got admin.UsageCounts
			for _, u := range used(t, s, "target", usageKey(1), interval) {
				got.Add(&u.UsageCounts)
			}
			if got.Allowed != want {
				t.Errorf("%s, by %s: %d, want %d", what, interval, got.Allowed, want)
			}
		}
	}
	addUsage(t, s, counts(1, time.Time{}), counts(1, made))
	want("before it was made", 0)
	put(made)
	in, err := s.Instance(t.Context(), "target")
	if err != nil {
		t.Fatal(err)
	}
	addUsage(t, s, counts(1, time.Time{}), counts(2, made), counts(4, in.CreatedAt), counts(8, made.Add(time.Millisecond)))
	want("there", 7)
	update(t, s, func(tx admin.Tx) error { return tx.DeleteInstance(t.Context(), "target") })
	addUsage(t, s, counts(16, time.Time{}), counts(32, made), admin.Usage{Start: fullHour, UsageCounts: admin.UsageCounts{Allowed: 1}})
	want("deleted", 0)
	if len(used(t, s, "", apikey.ID{}, admin.UsageDay)) != 1 {
		t.Error("what belongs to no instance was not added, because of one that is gone")
	}
	put(made.Add(time.Hour))
	want("made again", 0)
	addUsage(t, s, counts(64, made), counts(128, made.Add(time.Hour)))
	want("made again, and counted", 128)
	if err := s.ForgetDeleted(t.Context()); err != nil {
		t.Fatal(err)
	}
	want("tidied", 128)
}
