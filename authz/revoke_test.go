package authz_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
	"keyward/authz/store/storetest"
	"keyward/cache"
)

// TestTakenAwayIsRefusedFromTheAcknowledgementOn: from the moment at which the service says that a right
// is gone, no decision that begins allows it. Reads of the store that began before are on their way
// meanwhile, and come when they may do the most harm. P1 of DESIGN §11, in one process.
func TestTakenAwayIsRefusedFromTheAcknowledgementOn(t *testing.T) {
	t.Run("memory", func(t *testing.T) { takeAway(t, storetest.NewMemory(auditKeys), 64, sized(100_000)) })
	t.Run("sqlite", func(t *testing.T) {
		store, err := sqlite.Open(t.Context(), sqlite.Config{Path: filepath.Join(t.TempDir(), "keyward.db"), Audit: auditKeys})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = store.Close() })
		takeAway(t, store, 16, sized(1000))
	})
}

// A slowStore's look-ups take their time on the way back: some are held until somebody lets them go.
type slowStore struct {
	admin.Store
	held sync.Map // of apikey.Digest and *hold
}

type hold struct{ begun, release chan struct{} }

func (s *slowStore) FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, apikey.Revision, error) {
	k, revision, err := s.Store.FindKey(ctx, d)
	if h, ok := s.held.LoadAndDelete(d); ok {
		close(h.(*hold).begun)
		<-h.(*hold).release
	} else {
		for range rand.IntN(8) {
			runtime.Gosched()
		}
	}
	return k, revision, err
}

// A taking is a way to take a right away, and to give it back to keys that are still there.
type taking struct {
	name  string
	share int // of 128 trials
	take  func(ctx context.Context, s *admin.Service, k *apikey.Key) (admin.Propagation, error)
	again *apikey.Policy // nil: nothing comes back
}

var takings = []taking{
	{"revoke", 107, func(ctx context.Context, s *admin.Service, k *apikey.Key) (admin.Propagation, error) {
		done, err := s.RevokeKey(ctx, owner, k.InstanceID, k.ID, "")
		return done.Propagation, err
	}, nil},
	{"disable the instance", 10, put(apikey.Policy{Disabled: true}), &apikey.Policy{}},
	{"narrow the policy's scopes", 10, put(apikey.Policy{AllowedScopes: apikey.Scopes{"other"}}), &apikey.Policy{}},
	{"delete the instance", 1, func(ctx context.Context, s *admin.Service, k *apikey.Key) (admin.Propagation, error) {
		return s.DeleteInstance(ctx, owner, k.InstanceID, true)
	}, &apikey.Policy{}},
}

func put(policy apikey.Policy) func(context.Context, *admin.Service, *apikey.Key) (admin.Propagation, error) {
	return func(ctx context.Context, s *admin.Service, k *apikey.Key) (admin.Propagation, error) {
		done, err := s.PutInstance(ctx, owner, k.InstanceID, unbounded(policy))
		return done.Propagation, err
	}
}

// insist repeats a change until it is acknowledged, and reports whether it was. A store that is too busy to
// answer in time, and an answer that says "not yet", acknowledge nothing; nor is anything acknowledged by
// what an earlier try has deleted.
func insist(t *testing.T, what string, change func() (admin.Propagation, error)) bool {
	for range 100 {
		done, err := change()
		switch {
		case err == nil && done.Everywhere:
			return true
		case errors.Is(err, apikey.ErrNotFound):
			return false
		case err != nil && !errors.Is(err, apikey.ErrUndecided):
			t.Errorf("%s: %v", what, err)
			return false
		}
	}
	t.Errorf("%s: never acknowledged", what)
	return false
}

// takeAway makes so many keys, and takes their rights away while readers use them.
func takeAway(t *testing.T, store admin.Store, workers, trials int) {
	const readers = 4
	slow := &slowStore{Store: store}
	h := newHouse(t, store, cache.Config{Records: 10_000}, []authz.Rule{{Path: "/", Scopes: []apikey.Scope{"use"}}}, slow)
	r := h.replicas[0]
	var allowed, refused, late, overtaken, undecided, next atomic.Int64
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			ctx, id := t.Context(), fmt.Sprintf("instance-%d", w)
			insist(t, "put instance", func() (admin.Propagation, error) {
				done, err := r.service.PutInstance(ctx, owner, id, unbounded(apikey.Policy{}))
				return done.Propagation, err
			})
			for int(next.Add(1)) <= trials && !t.Failed() {
				var how taking
				dice := rand.IntN(128)
				for _, how = range takings {
					if dice -= how.share; dice < 0 {
						break
					}
				}
				made, err := r.service.CreateKey(ctx, owner, id, admin.KeyInput{Name: "n", Limits: unlimited})
				if errors.Is(err, apikey.ErrUndecided) || err == nil && !made.Propagation.Everywhere {
					continue // the machine is busy: another key
				}
				if err != nil {
					t.Errorf("create: %v", err)
					return
				}
				var gone atomic.Bool
				ask := func() {
					var d authz.Decision
					request := asking(made.Secret)
					after := gone.Load() // before the decision begins
					err := ask(ctx, r.Authorizer, &request, &d)
					switch {
					case errors.Is(err, apikey.ErrUndecided):
						undecided.Add(1)
					case err != nil:
						t.Errorf("ask: %v", err)
					case d.Outcome() != authz.Allowed:
						refused.Add(1)
					case after:
						late.Add(1)
						t.Errorf("%s was acknowledged, and then the key was allowed", how.name)
					default:
						allowed.Add(1)
					}
				}
				var stuck *hold
				if rand.IntN(4) == 0 {
					stuck = &hold{make(chan struct{}), make(chan struct{})}
					slow.held.Store(h.peppers.Current.Digest(made.Secret.Reveal()), stuck)
				}
				acknowledged, used := make(chan struct{}), make(chan struct{})
				var first sync.Once
				var asking sync.WaitGroup
				for range readers {
					asking.Go(func() {
						for range 4 {
							ask()
							first.Do(func() { close(used) })
							runtime.Gosched()
						}
						<-acknowledged
						ask()
						ask() // what a read that came late has left behind
					})
				}
				if stuck != nil {
					<-stuck.begun
				} else {
					<-used // with one processor nobody else might come before the acknowledgement
				}
				gone.Store(insist(t, how.name, func() (admin.Propagation, error) { return how.take(ctx, r.service, made.Key) }))
				if stuck != nil {
					overtaken.Add(1)
					asking.Go(ask) // which must not wait for the read that is stuck
					runtime.Gosched()
					close(stuck.release)
				}
				close(acknowledged)
				asking.Wait()
				ask()
				if how.again == nil {
					continue
				}
				insist(t, "give back", func() (admin.Propagation, error) {
					back, err := r.service.PutInstance(ctx, owner, id, unbounded(*how.again))
					return back.Propagation, err
				})
			}
		})
	}
	all.Wait()
	t.Logf("%d trials: %d allowed before, %d refused, %d undecided; %d reads began before and ended after; %v answers were too old to be kept",
		trials, allowed.Load(), refused.Load(), undecided.Load(), overtaken.Load(), count(t, r.reg, "stale_fills_total"))
	if n := int64(trials); late.Load() > 0 || allowed.Load() < n/2 || refused.Load() < n || overtaken.Load() < n/8 || undecided.Load() > n {
		t.Errorf("%d were allowed after the acknowledgement; or there was too little of something to prove anything", late.Load())
	}
}
