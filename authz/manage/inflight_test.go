package manage

import (
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/limits"
)

func TestInFlightShowsAndEndsWhatRuns(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	mine, foreign := d.key(t, "a"), d.key(t, "b")
	run := func(id string, key admin.CreatedKey, ago time.Duration) admin.RunningRequest {
		return admin.RunningRequest{
			ID: id, KeyID: key.Key.ID, Lease: limits.Lease{HTTP: uint64(len(d.running) + 1)},
			Method: "GET", Path: "/x/{y}", Node: "edge-1", Connection: 3, Replica: "r1",
			Started: time.Now().Add(-ago), Until: time.Now().Add(time.Minute),
		}
	}
	d.running = append(d.running, run("young", mine, time.Second))
	d.running = append(d.running, run("foreign", foreign, time.Hour))
	d.running = append(d.running, run("old", mine, time.Minute))

	got := read[list[InFlight]](t, d.send(d.owner, "GET", "/instances/a/inFlight", ""), 200)
	if len(got.Value) != 2 || got.Value[0].LeaseID != "old" || got.Value[1].LeaseID != "young" {
		t.Fatalf("got %+v, want old and young", got.Value)
	}
	if one := got.Value[0]; one.KeyID != mine.Key.ID || one.Method != "GET" || one.Path != "/x/{y}" || one.Node != "edge-1" ||
		one.Replica != "r1" || one.AgeSeconds < 59 || one.AgeSeconds > 120 {
		t.Errorf("got %+v", one)
	}

	wantError(t, d.send(d.owner, "DELETE", "/instances/a/inFlight/foreign", ""), 404, CodeNotFound, "")
	wantError(t, d.send(d.owner, "GET", "/instances/c/inFlight", ""), 404, CodeNotFound, "")
	if len(d.ended) != 0 {
		t.Fatalf("ended %v", d.ended)
	}
	read[EndedInFlight](t, d.send(d.owner, "DELETE", "/instances/a/inFlight/old", ""), 200)
	if len(d.ended) != 1 || d.ended[0] != d.running[2].Lease {
		t.Errorf("ended %+v, want that of old", d.ended)
	}
	events, err := d.store.Events(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	if last := events[len(events)-1]; last.Action != "inflight.end" || last.InstanceID != "a" || last.Target != mine.Key.ID.String() {
		t.Errorf("audit: %+v", last)
	}
}
