package storetest

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// fullAlert is an alert in which every field has a value.
func fullAlert(n int, instanceID string) *admin.Alert {
	return &admin.Alert{
		ID: id(n), InstanceID: instanceID, Kind: admin.AlertNewNetwork, KeyID: id(1), Subject: "203.0.113.0/24", Message: "näme '; --",
		Count: 3, OpenedAt: noon.Add(time.Duration(n) * time.Second), SeenAt: noon.Add(time.Minute),
		ResolvedAt: noon.Add(time.Hour), AckedAt: noon.Add(2 * time.Minute), AckedBy: "token:x",
	}
}

func putAlert(t *testing.T, s admin.Store, a *admin.Alert, want error) {
	t.Helper()
	if err := s.PutAlert(t.Context(), a); !errors.Is(err, want) {
		t.Fatalf("put alert %v: got %v, want %v", a.ID, err, want)
	}
}

func alert(t *testing.T, s admin.Store, n int) admin.Alert {
	t.Helper()
	a, err := s.Alert(t.Context(), id(n))
	if err != nil {
		t.Fatalf("alert %d: %v", n, err)
	}
	return *a
}

func testAlerts(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant", "other")
	whole := fullAlert(1, "tenant")
	wantNoZero(t, *whole)
	putAlert(t, s, whole, nil)
	wantSame(t, "alert", *whole, alert(t, s, 1))
	if _, err := s.Alert(ctx, id(9)); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("no such alert: got %v", err)
	}

	// One that is resolved stays so: it is never opened again, not even by who has not heard of it.
	again := *whole
	again.ResolvedAt, again.Message = time.Time{}, "again"
	putAlert(t, s, &again, apikey.ErrConflict)
	wantSame(t, "resolved alert", *whole, alert(t, s, 1))

	open := func(n int, change func(a *admin.Alert)) *admin.Alert {
		a := fullAlert(n, "tenant")
		a.ResolvedAt, a.AckedAt, a.AckedBy = time.Time{}, time.Time{}, ""
		if change != nil {
			change(a)
		}
		return a
	}
	second := open(2, nil) // a resolved one of the same is no obstacle
	putAlert(t, s, second, nil)
	putAlert(t, s, open(3, nil), apikey.ErrConflict)
	if _, err := s.Alert(ctx, id(3)); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("what was refused is kept: %v", err)
	}
	for n, change := range map[int]func(*admin.Alert){
		3: func(a *admin.Alert) { a.InstanceID = "other" },
		4: func(a *admin.Alert) { a.Kind = admin.AlertUnused },
		5: func(a *admin.Alert) { a.KeyID = id(2) },
		6: func(a *admin.Alert) { a.Subject = "" },
		7: func(a *admin.Alert) { a.InstanceID = "" },
		8: func(a *admin.Alert) { a.ResolvedAt = noon },
	} {
		putAlert(t, s, open(n, change), nil)
	}
	putAlert(t, s, open(9, func(a *admin.Alert) { a.InstanceID = "nobody" }), apikey.ErrNotFound)

	// Who knows of it is not the engine's to say, and not to take back.
	update(t, s, func(tx admin.Tx) error {
		a, err := tx.Alert(ctx, id(2))
		if err != nil {
			return err
		}
		a.AckedAt, a.AckedBy, a.Message = noon.Add(time.Minute), "token:y", "not this"
		if err := tx.AckAlert(ctx, &admin.Alert{ID: id(99)}); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("ack of no alert: %v", err)
		}
		return tx.AckAlert(ctx, a)
	})
	second.Count, second.SeenAt, second.Message = 4, noon.Add(2*time.Minute), "seen again"
	putAlert(t, s, second, nil)
	want := *second
	want.AckedAt, want.AckedBy = noon.Add(time.Minute), "token:y"
	wantSame(t, "acked alert", want, alert(t, s, 2))

	counted, err := s.OpenAlerts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, "open alerts", map[admin.AlertsOf]int{
		{InstanceID: "tenant", Kind: admin.AlertNewNetwork}: 3, {InstanceID: "tenant", Kind: admin.AlertUnused}: 1,
		{InstanceID: "other", Kind: admin.AlertNewNetwork}: 1, {Kind: admin.AlertNewNetwork}: 1,
	}, counted)

	list := func(q admin.AlertQuery) (ids []int) {
		t.Helper()
		if q.Limit == 0 {
			q.Limit = 100
		}
		alerts, err := s.Alerts(ctx, q)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range alerts {
			ids = append(ids, int(a.ID[15]))
		}
		return ids
	}
	for _, test := range []struct {
		what string
		q    admin.AlertQuery
		want []int
	}{
		{"of an instance", admin.AlertQuery{InstanceID: "tenant"}, []int{8, 6, 5, 4, 2, 1}},
		{"of none", admin.AlertQuery{}, []int{7}},
		{"everywhere", admin.AlertQuery{Everywhere: true}, []int{8, 7, 6, 5, 4, 3, 2, 1}},
		{"open", admin.AlertQuery{Everywhere: true, Open: true}, []int{7, 6, 5, 4, 3, 2}},
		{"of a kind", admin.AlertQuery{InstanceID: "tenant", Kind: admin.AlertUnused}, []int{4}},
		{"of a key", admin.AlertQuery{InstanceID: "tenant", KeyID: id(2)}, []int{5}},
		{"first page", admin.AlertQuery{Everywhere: true, Limit: 3}, []int{8, 7, 6}},
		{"second page", admin.AlertQuery{Everywhere: true, Limit: 3, After: admin.AlertPlace{OpenedAt: noon.Add(6 * time.Second), ID: id(6)}}, []int{5, 4, 3}},
	} {
		wantSame(t, "alerts "+test.what, test.want, list(test.q))
	}

	if err := s.ForgetAlerts(ctx, noon.Add(time.Hour)); err != nil { // 8 was resolved at noon, 1 not before
		t.Fatal(err)
	}
	wantSame(t, "alerts that are left", []int{7, 6, 5, 4, 3, 2, 1}, list(admin.AlertQuery{Everywhere: true}))

	update(t, s, func(tx admin.Tx) error { return tx.DeleteInstance(ctx, "tenant") })
	wantSame(t, "alerts after their instance", []int{7, 3}, list(admin.AlertQuery{Everywhere: true}))
}

func testNotices(t *testing.T, s admin.Store) {
	ctx := t.Context()
	notice := func(n int) admin.Notice {
		return admin.Notice{
			ID: id(n), Type: admin.NoticeOpened, Body: fmt.Appendf(nil, `{"n":%d}`, n), MadeAt: noon, Tries: 1, NextAt: noon.Add(time.Duration(n) * time.Second),
		}
	}
	wantNoZero(t, notice(1))
	a := fullAlert(1, "")
	a.ResolvedAt = time.Time{}
	if err := s.PutAlert(ctx, a, notice(2), notice(1)); err != nil {
		t.Fatal(err)
	}
	other := *a
	other.ID = id(2)
	if err := s.PutAlert(ctx, &other, notice(3)); !errors.Is(err, apikey.ErrConflict) {
		t.Fatalf("got %v, want a conflict", err)
	}
	update(t, s, func(tx admin.Tx) error { return tx.QueueNotice(ctx, notice(4)) })
	due := func(at time.Time, limit int, want ...admin.Notice) {
		t.Helper()
		got, err := s.DueNotices(ctx, at, limit)
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, "notices", want, got)
	}
	due(noon, 10)
	due(noon.Add(time.Second), 10, notice(1))
	due(noon.Add(time.Hour), 10, notice(1), notice(2), notice(4)) // 3 was refused with its alert
	due(noon.Add(time.Hour), 2, notice(1), notice(2))
	later := notice(1)
	later.Tries, later.NextAt = 2, noon.Add(time.Minute)
	if err := s.RetryNotice(ctx, later); err != nil {
		t.Fatal(err)
	}
	if err := s.RetryNotice(ctx, notice(3)); err != nil { // gone, and stays so
		t.Fatal(err)
	}
	if err := s.ForgetNotice(ctx, id(4)); err != nil {
		t.Fatal(err)
	}
	due(noon.Add(time.Hour), 10, notice(2), later)
}

func testForgetNotices(t *testing.T, s admin.Store) {
	ctx := t.Context()
	const n = 1200 // more than a store would remove in one go
	update(t, s, func(tx admin.Tx) error {
		for i := range n { // the longest due is not the oldest
			if err := tx.QueueNotice(ctx, admin.Notice{
				ID: id(i), Type: admin.NoticeTest, Body: []byte(`{}`), MadeAt: noon.Add(time.Duration(i) * time.Second), NextAt: noon.Add(time.Duration(-i) * time.Hour),
			}); err != nil {
				return err
			}
		}
		return nil
	})
	for _, c := range []struct {
		before     time.Time
		keep       int
		late, over int
		oldest     int
	}{
		{noon, n, 0, 0, 0}, // the time itself is not before it
		{noon.Add(time.Second), n, 1, 0, 1},
		{noon.Add(10 * time.Second), 1185, 9, 5, 15},
		{noon, 1185, 0, 0, 15},
		{noon, 1000, 0, 185, 200},
		{noon.Add(time.Hour), 10, 1000, 0, -1},
	} {
		late, over, err := s.ForgetNotices(ctx, c.before, c.keep)
		if err != nil || late != c.late || over != c.over {
			t.Errorf("%+v: got %d late and %d over, error %v", c, late, over, err)
		}
		left, err := s.DueNotices(ctx, noon.Add(time.Hour), n)
		if err != nil {
			t.Fatal(err)
		}
		if c.oldest < 0 && len(left) == 0 {
			continue
		}
		if len(left) != n-c.oldest || left[len(left)-1].ID != id(c.oldest) {
			t.Errorf("%+v: %d are left, the oldest %v", c, len(left), left[len(left)-1].ID)
		}
	}
}

func testNetworks(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant", "other")
	keyOf(t, s, "tenant", 1)
	keyOf(t, s, "tenant", 2)
	keyOf(t, s, "other", 3)
	at := func(key, minutes, last int, network string) admin.KeyNetwork {
		return admin.KeyNetwork{
			KeyID: id(key), Network: network, FirstAt: noon.Add(time.Duration(minutes) * time.Minute), LastAt: noon.Add(time.Duration(last) * time.Minute),
		}
	}
	wantNoZero(t, at(1, 0, 1, "10.0.0.0/24"))
	learn := func(networks ...admin.KeyNetwork) {
		t.Helper()
		if err := s.LearnNetworks(ctx, networks); err != nil {
			t.Fatal(err)
		}
	}
	want := func(key int, want ...admin.KeyNetwork) {
		t.Helper()
		got, err := s.KeyNetworks(ctx, id(key))
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, "networks", want, got)
	}
	learn(at(1, 0, 1, "10.0.0.0/24"), at(1, 2, 2, "10.0.1.0/24"), at(2, 0, 0, "10.0.0.0/24"), at(3, 0, 0, "x"), at(99, 0, 0, "nobody's"))
	want(1, at(1, 2, 2, "10.0.1.0/24"), at(1, 0, 1, "10.0.0.0/24"))
	want(99)
	learn(at(1, 5, 5, "10.0.0.0/24"), at(1, 1, 1, "10.0.1.0/24")) // first only falls, last only grows
	want(1, at(1, 0, 5, "10.0.0.0/24"), at(1, 1, 2, "10.0.1.0/24"))
	if err := s.ForgetNetworks(ctx, noon.Add(3*time.Minute)); err != nil {
		t.Fatal(err)
	}
	want(1, at(1, 0, 5, "10.0.0.0/24"))
	want(2)

	var many []admin.KeyNetwork
	for n := range admin.MaxKeyNetworks + 5 {
		many = append(many, at(2, 0, n, fmt.Sprint("network ", n)))
	}
	learn(many...)
	got, err := s.KeyNetworks(ctx, id(2))
	if err != nil || len(got) != admin.MaxKeyNetworks || got[0] != many[len(many)-1] || got[len(got)-1] != many[5] {
		t.Errorf("of too many: got %d from %+v to %+v, error %v", len(got), got[0], got[len(got)-1], err)
	}

	learn(at(3, 5, 5, "x"))
	update(t, s, func(tx admin.Tx) error { return tx.DeleteKey(ctx, "tenant", id(1)) })
	want(1)
	update(t, s, func(tx admin.Tx) error { return tx.DeleteInstance(ctx, "tenant") })
	want(2)
	want(3, at(3, 5, 5, "x"))
}
