package storetest

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"slices"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/limits"
)

// fullQuota is a quota in which every field has a value, though not all of them go together.
var fullQuota = apikey.Quota{
	Name: "full", Description: `näme '; "`, Context: "CoreAPI:Completions:agent", Partition: apikey.PartitionUPN, Limit: 120,
	Window: time.Minute, Period: apikey.PeriodMonth, Smoothed: true, Lockout: 90 * time.Second, Distributed: true, Shadow: true,
}

// testQuotas is about definitions: they are part of their instance, and change with it alone.
func testQuotas(t *testing.T, s admin.Store) {
	ctx := t.Context()
	wantNoZero(t, fullQuota)
	instance(t, s, "other")
	for _, quotas := range [][]apikey.Quota{
		{fullQuota, {Name: "bare", Limit: math.MaxInt32, Window: 366 * 24 * time.Hour}},
		{},
		nil,
		{fullQuota},
	} {
		want := &apikey.Instance{ID: "tenant", Quotas: quotas, CreatedAt: noon}
		_, before, _, err := s.Changes(ctx, 0)
		if err != nil {
			t.Fatal(err)
		}
		want.Revision = update(t, s, func(tx admin.Tx) error {
			if err := tx.PutInstance(ctx, &apikey.Instance{ID: "tenant", Quotas: quotas, CreatedAt: noon}); err != nil {
				return err
			}
			got, err := tx.Instance(ctx, "tenant")
			if err == nil {
				wantSame(t, "quotas in the transaction", quotas, got.Quotas)
			}
			return err
		})
		got, err := s.Instance(ctx, "tenant")
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, "instance", want, got)
		all, err := s.Instances(ctx)
		if err != nil || len(all) != 2 {
			t.Fatalf("got %d instances and error %v, want 2", len(all), err)
		}
		wantSame(t, "the instance in the list", want, all[1])
		if all[0].Quotas != nil {
			t.Errorf("another instance has %v now", all[0].Quotas)
		}
		changes, _, _, err := s.Changes(ctx, before)
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, "changes", []apikey.Change{{Revision: want.Revision, InstanceID: "tenant"}}, changes)
	}
}

func testQuotaStates(t *testing.T, s admin.Store) {
	ctx := t.Context()
	instance(t, s, "tenant")
	cell := func(n int, class limits.Class) limits.Cell { return limits.Cell{Owner: id(n), Class: class} }
	want := map[limits.Cell]limits.QuotaState{}
	check := func(what string, now time.Time) {
		t.Helper()
		got, open := map[limits.Cell]limits.QuotaState{}, map[limits.Cell]limits.QuotaState{}
		err := s.QuotaStates(ctx, now, func(state limits.QuotaState) bool {
			if _, twice := got[state.Cell]; twice {
				t.Errorf("%s: a state comes twice", what)
			}
			got[state.Cell] = state
			return true
		})
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		for cell, state := range want {
			if state.Until.After(now) {
				open[cell] = state
			}
		}
		wantSame(t, what, open, got)
	}
	save := func(states ...limits.QuotaState) {
		t.Helper()
		if err := s.SaveQuotaStates(ctx, states); err != nil {
			t.Fatal(err)
		}
		for _, state := range states {
			state.Counts = bytes.Clone(state.Counts)
			want[state.Cell] = state
		}
	}
	_, head, _, err := s.Changes(ctx, 0)
	if err != nil {
		t.Fatal(err)
	}
	mutations, err := s.Mutations(ctx)
	if err != nil {
		t.Fatal(err)
	}

	check("a new store", noon)
	save()
	counts := []byte{0, 1, 255}
	save(
		limits.QuotaState{Cell: cell(1, limits.ClassKeyQuota), Until: noon.Add(time.Hour), Counts: counts},
		limits.QuotaState{Cell: cell(1, limits.ClassGlobalQuota), Until: noon.Add(2 * time.Hour), Counts: []byte("another class")},
		limits.QuotaState{Cell: cell(2, math.MaxUint8), Until: noon.Add(time.Hour), Counts: []byte{0}},
	)
	counts[0] = 99 // the caller's again
	check("saved", noon.Add(-time.Hour))
	check("what has ended says nothing", noon.Add(90*time.Minute))
	check("at its end too", noon.Add(time.Hour))

	save(limits.QuotaState{Cell: cell(1, limits.ClassKeyQuota), Until: noon.Add(3 * time.Hour), Counts: bytes.Repeat([]byte{7}, 16<<10)})
	check("in place of an older one", noon)
	// More than any batch, and the last of a cell counts.
	var many []limits.QuotaState
	for n := range 1203 {
		many = append(many, limits.QuotaState{Cell: cell(100+n%1200, limits.ClassPrincipalQuota), Until: noon.Add(time.Minute), Counts: fmt.Append(nil, n)})
	}
	save(many...)
	check("many", noon)

	n := 0
	if err := s.QuotaStates(ctx, noon, func(limits.QuotaState) bool { n++; return n < 3 }); err != nil || n != 3 {
		t.Errorf("a reader that has enough was called %d times, error %v, want 3", n, err)
	}

	if err := s.ForgetQuotaStates(ctx, noon.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	maps.DeleteFunc(want, func(_ limits.Cell, state limits.QuotaState) bool { return !state.Until.After(noon.Add(time.Hour)) })
	check("forgotten", noon.Add(-time.Hour))
	if left := slices.Collect(maps.Keys(want)); len(left) != 2 {
		t.Fatalf("the case proves nothing: %d are left", len(left))
	}

	// No mutation: no revision, and no audit to make room for.
	_, after, _, err := s.Changes(ctx, 0)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.Mutations(ctx); err != nil || again != mutations || after != head {
		t.Errorf("revision %d and %d mutations became %d and %d, error %v", head, mutations, after, again, err)
	}
}
