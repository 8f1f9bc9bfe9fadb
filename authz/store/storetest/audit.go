package storetest

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// wantChain fails unless the audit proves itself, and returns its head.
func wantChain(t *testing.T, s admin.Reader, heads ...admin.AuditHead) admin.AuditHead {
	t.Helper()
	report, err := admin.VerifyAudit(t.Context(), s, AuditKeys, heads...)
	if err != nil {
		t.Fatal(err)
	}
	if !report.Whole {
		t.Errorf("the audit is not whole: %+v", report.Findings)
	}
	return report.Head
}

func segments(t *testing.T, s admin.Reader) []admin.AuditSegment {
	t.Helper()
	list, err := s.AuditSegments(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func testAuditChain(t *testing.T, s admin.Store) {
	ctx := t.Context()
	wantChain(t, s)
	if n, err := s.Mutations(ctx); err != nil || n != 0 {
		t.Errorf("%d mutations before the first, error %v", n, err)
	}
	// Three days, two events a day: a segment for each.
	var heads []admin.AuditHead
	for day := range 3 {
		for hour := range 2 {
			_, err := s.Update(ctx, func(tx admin.Tx) error {
				return tx.Audit(ctx, admin.Event{At: noon.Add(time.Duration(25*day+hour) * time.Hour), Action: fmt.Sprint(day)})
			})
			if err != nil {
				t.Fatal(err)
			}
			heads = append(heads, wantChain(t, s, heads...))
		}
	}
	if n, err := s.Mutations(ctx); err != nil || n != 6 {
		t.Errorf("%d mutations, error %v; want 6", n, err)
	}
	all := segments(t, s)
	if len(all) != 3 {
		t.Fatalf("got %d segments, want one for each day", len(all))
	}
	for i, one := range all {
		first := int64(2*i + 1)
		if one.Number != int64(i+1) || one.First != first || one.Last != first+1 || one.SealedAt.IsZero() != (i == 2) || one.PepperVersion != 1 {
			t.Errorf("segment %d: got %+v", i+1, one)
		}
	}
	// What a transaction takes back was never in the chain.
	wantUntouched(t, s, func() {
		_, err := s.Update(ctx, func(tx admin.Tx) error {
			return errors.Join(tx.Audit(ctx, event), tx.RemoveAuditSegment(ctx, 1, noon), errors.New("mine"))
		})
		if err == nil {
			t.Error("want an error")
		}
	})
	wantChain(t, s, heads...)

	// Old events go, and the rest still proves itself.
	update(t, s, func(tx admin.Tx) error { return tx.RemoveAuditSegment(ctx, 1, noon) })
	got := events(t, s)
	if len(got) != 5 || got[0].Sequence != 3 {
		t.Errorf("after the removal there are %d events", len(got))
	}
	report, err := admin.VerifyAudit(ctx, s, AuditKeys, heads...)
	if err != nil || !report.Whole || report.Removed != 1 || report.Segments != 3 || report.Events != 5 || !slices.Equal(report.Unproved, []int64{1}) {
		t.Errorf("got %+v, error %v", report, err)
	}
	for _, number := range []int64{0, 3, 4} { // none, the open one, none
		_, err := s.Update(ctx, func(tx admin.Tx) error {
			if err := tx.RemoveAuditSegment(ctx, number, noon); !errors.Is(err, apikey.ErrNotFound) {
				t.Errorf("segment %d: got %v, want ErrNotFound", number, err)
			}
			return tx.Audit(ctx, event)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if got := segments(t, s); len(got) != 3 || !got[0].RemovedAt.Equal(noon) || got[0].Head != all[0].Head {
		t.Errorf("got %+v", got)
	}
	before := segments(t, s)
	if err := s.SealAudit(ctx); err != nil { // under the same pepper nothing is to be done
		t.Fatal(err)
	}
	wantSame(t, "segments", before, segments(t, s))
	wantChain(t, s, heads...)
}

func testFindEvents(t *testing.T, s admin.Store) {
	ctx := t.Context()
	var all []admin.Event
	for i := range 60 {
		e := admin.Event{
			At:         noon.Add(time.Duration(i/3) * time.Minute), // three at a time
			Actor:      fmt.Sprint("actor ", i%2),
			Action:     fmt.Sprint("action ", i%3),
			InstanceID: []string{"", "a", "b", "a'--"}[i%4],
			Target:     fmt.Sprint("target ", i%5),
			After:      json.RawMessage(fmt.Sprint(i)),
		}
		if i%7 == 0 {
			e.Refused = "Forbidden"
		}
		update(t, s, func(tx admin.Tx) error { return tx.Audit(ctx, e) })
		all = append(all, e)
	}
	for name, test := range map[string]struct {
		filter admin.EventFilter
		wants  func(admin.Event) bool
	}{
		"all":      {admin.EventFilter{From: noon.Add(time.Microsecond)}, func(e admin.Event) bool { return e.At.After(noon) }},
		"actor":    {admin.EventFilter{Actor: "actor 1"}, func(e admin.Event) bool { return e.Actor == "actor 1" }},
		"action":   {admin.EventFilter{Action: "action 1"}, func(e admin.Event) bool { return e.Action == "action 1" }},
		"instance": {admin.EventFilter{InstanceID: "a"}, func(e admin.Event) bool { return e.InstanceID == "a" }},
		"quoted":   {admin.EventFilter{InstanceID: "a'--"}, func(e admin.Event) bool { return e.InstanceID == "a'--" }},
		"target":   {admin.EventFilter{Target: "target 1"}, func(e admin.Event) bool { return e.Target == "target 1" }},
		"nobody's": {admin.EventFilter{Actor: "actor"}, func(admin.Event) bool { return false }},
		"done":     {admin.EventFilter{Actor: "actor 1", Outcome: admin.OutcomeDone}, func(e admin.Event) bool { return e.Actor == "actor 1" && e.Refused == "" }},
		"refused":  {admin.EventFilter{Outcome: admin.OutcomeRefused}, func(e admin.Event) bool { return e.Refused != "" }},
		"a time": {
			admin.EventFilter{Actor: "actor 0", From: noon.Add(2 * time.Minute), To: noon.Add(9 * time.Minute)},
			func(e admin.Event) bool {
				return e.Actor == "actor 0" && !e.At.Before(noon.Add(2*time.Minute)) && !e.At.After(noon.Add(9*time.Minute))
			},
		},
		"everything at once": {
			admin.EventFilter{Actor: "actor 1", Action: "action 0", InstanceID: "b", Target: "target 3", From: noon, To: noon.Add(time.Hour), Outcome: admin.OutcomeDone},
			func(e admin.Event) bool {
				return e.Actor == "actor 1" && e.Action == "action 0" && e.InstanceID == "b" && e.Target == "target 3" && e.Refused == ""
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var want []string
			for _, e := range slices.Backward(all) {
				if test.wants(e) {
					want = append(want, string(e.After))
				}
			}
			for _, size := range []int{1, 4, 100} {
				var got []string
				var place admin.EventPlace
				for {
					page, err := s.FindEvents(ctx, test.filter, place, size)
					if err != nil {
						t.Fatal(err)
					}
					if len(page) > size {
						t.Fatalf("got %d events, want at most %d", len(page), size)
					}
					for _, e := range page {
						if e.Action != "test" { // those of update
							got = append(got, string(e.After))
						}
					}
					if len(page) < size {
						break
					}
					last := page[len(page)-1]
					place = admin.EventPlace{At: last.At, Sequence: last.Sequence}
				}
				if !slices.Equal(got, want) {
					t.Errorf("pages of %d: got %v, want %v", size, got, want)
				}
			}
		})
	}
}

func testReplays(t *testing.T, s admin.Store) {
	ctx := t.Context()
	one, two := admin.ReplayID{1}, admin.ReplayID{2}
	until := noon.Add(10 * time.Minute)
	keep := func(id admin.ReplayID, sealed string, now, until time.Time) error {
		_, err := s.Update(ctx, func(tx admin.Tx) error {
			if err := tx.KeepReplay(ctx, id, []byte(sealed), now, until); err != nil {
				return err
			}
			return tx.Audit(ctx, event)
		})
		return err
	}
	want := func(id admin.ReplayID, now time.Time, want string) {
		t.Helper()
		got, err := s.Replay(ctx, id, now)
		if want == "" {
			if !errors.Is(err, apikey.ErrNotFound) {
				t.Errorf("got %q, error %v, want ErrNotFound", got, err)
			}
			return
		}
		if err != nil || string(got) != want {
			t.Errorf("got %q, error %v, want %q", got, err, want)
		}
	}
	want(one, noon, "")
	if err := keep(one, "first", noon, until); err != nil {
		t.Fatal(err)
	}
	want(one, noon, "first")
	want(one, until.Add(-time.Microsecond), "first")
	want(one, until, "")
	want(two, noon, "")
	if err := keep(one, "second", until.Add(-time.Microsecond), until.Add(time.Hour)); !errors.Is(err, apikey.ErrConflict) {
		t.Errorf("got %v, want ErrConflict", err)
	}
	want(one, noon, "first")
	// It is part of the transaction.
	_, err := s.Update(ctx, func(tx admin.Tx) error {
		if err := tx.KeepReplay(ctx, two, []byte("taken back"), noon, until); err != nil {
			t.Error(err)
		}
		return errors.New("mine")
	})
	if err == nil {
		t.Error("want an error")
	}
	want(two, noon, "")
	// What has run out makes room.
	if err := keep(one, "third", until, until.Add(time.Hour)); err != nil {
		t.Error(err)
	}
	want(one, until, "third")
	if err := keep(two, "other", noon, until); err != nil {
		t.Fatal(err)
	}
	if err := s.ForgetReplays(ctx, until); err != nil {
		t.Fatal(err)
	}
	want(one, until, "third")
	want(two, noon, "") // gone for good, whatever the time
}
