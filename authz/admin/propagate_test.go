package admin

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/apikey"
)

// A replicasFunc is a store of which only the replicas are asked.
type replicasFunc struct {
	Store
	list func(context.Context) ([]Replica, error)
}

func (r replicasFunc) Replicas(ctx context.Context) ([]Replica, error) { return r.list(ctx) }

type catchUpFunc func(context.Context, apikey.Revision) error

func (f catchUpFunc) CatchUp(ctx context.Context, rev apikey.Revision) error { return f(ctx, rev) }

func TestPropagate(t *testing.T) {
	away := errors.New("store away")
	// Each replica confirms revision 7 at a time, and runs out at a time, both after the start.
	type replica struct{ confirms, until time.Duration }
	const never = time.Hour
	for _, tt := range []struct {
		name     string
		replicas []replica
		down     bool
		wait     time.Duration
		took     time.Duration // at least; at most a poll more
		want     Propagation   // EffectiveEverywhereAt apart
		at       time.Duration // EffectiveEverywhereAt; -1: not known
	}{
		{"nobody serves", nil, false, 5 * time.Second, 0, Propagation{Everywhere: true}, 0},
		{"all know already", []replica{{0, never}, {0, never}}, false, 5 * time.Second, 0, Propagation{Confirmed: 2, Total: 2, Everywhere: true}, 0},
		{"one is slow", []replica{{0, never}, {2 * time.Second, never}}, false, 5 * time.Second, 2 * time.Second, Propagation{Confirmed: 2, Total: 2, Everywhere: true}, 2 * time.Second},
		{"one is dead and runs out", []replica{{0, never}, {never, 3 * time.Second}}, false, 5 * time.Second, 3 * time.Second, Propagation{Confirmed: 1, Total: 1, Everywhere: true}, 3 * time.Second},
		{"two are cut off", []replica{{0, never}, {never, 30 * time.Second}, {never, 32 * time.Second}}, false, 5 * time.Second, 5 * time.Second, Propagation{Confirmed: 1, Total: 3}, 32 * time.Second},
		{"a create is less patient", []replica{{never, 30 * time.Second}}, false, time.Second, time.Second, Propagation{Total: 1}, 30 * time.Second},
		{"the store cannot say", nil, true, 5 * time.Second, 5 * time.Second, Propagation{}, -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begin := time.Now()
				store := replicasFunc{list: func(context.Context) (list []Replica, err error) {
					if tt.down {
						return nil, away
					}
					for _, r := range tt.replicas {
						now := time.Now()
						one := Replica{Confirmed: 6, Until: begin.Add(r.until), Now: now}
						if !now.Before(begin.Add(r.confirms)) {
							one.Confirmed = 7
						}
						if now.Before(one.Until) {
							list = append(list, one)
						}
					}
					return list, nil
				}}
				s := New(store, Config{}, nil, slog.New(slog.DiscardHandler))
				got := s.propagate(t.Context(), 7, tt.wait)
				if took := time.Since(begin); took < tt.took || took > tt.took+lastPoll {
					t.Errorf("took %v, want %v", took, tt.took)
				}
				effective := got.EffectiveEverywhereAt
				got.EffectiveEverywhereAt = time.Time{}
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Errorf("(-want +got)\n%s", diff)
				}
				switch since := effective.Sub(begin); {
				case tt.at < 0:
					if !effective.IsZero() {
						t.Errorf("effective %v, want it unknown", effective)
					}
				case since < tt.at || since > tt.at+lastPoll:
					t.Errorf("effective after %v, want %v", since, tt.at)
				}
			})
		})
	}
}

func TestThisReplicaCatchesUpThoughTheCallerLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var caughtUp apikey.Revision
		store := replicasFunc{list: func(ctx context.Context) ([]Replica, error) {
			return []Replica{{Confirmed: 1, Until: time.Now().Add(time.Hour), Now: time.Now()}}, ctx.Err()
		}}
		s := New(store, Config{}, catchUpFunc(func(ctx context.Context, rev apikey.Revision) error {
			time.Sleep(100 * time.Millisecond)
			if ctx.Err() == nil {
				caughtUp = rev
			}
			return ctx.Err()
		}), slog.New(slog.DiscardHandler))
		ctx, leave := context.WithCancel(t.Context())
		leave()
		begin := time.Now()
		got := s.propagate(ctx, 7, revokeWait)
		if caughtUp != 7 {
			t.Error("the local cache did not catch up")
		}
		if got.Total != 1 || got.EffectiveEverywhereAt.IsZero() {
			t.Errorf("got %+v, want the truth about the other replica", got)
		}
		if took := time.Since(begin); took > time.Second {
			t.Errorf("took %v: nobody waits for this answer", took)
		}
	})
}
