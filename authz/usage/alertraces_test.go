package usage_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/storetest"
	"keyward/authz/usage"
)

// A raced store lets another replica be faster, and remembers which keys were asked for.
type raced struct {
	*storetest.Memory
	mu     sync.Mutex
	faster func(a *admin.Alert) // once, before an alert is kept
	listed []*apikey.Key
}

func (r *raced) PutAlert(ctx context.Context, a *admin.Alert, notices ...admin.Notice) error {
	r.mu.Lock()
	faster := r.faster
	r.faster = nil
	r.mu.Unlock()
	if faster != nil {
		faster(a)
	}
	return r.Memory.PutAlert(ctx, a, notices...)
}

func (r *raced) Keys(ctx context.Context, instanceID string, q admin.KeyQuery) ([]*apikey.Key, error) {
	page, err := r.Memory.Keys(ctx, instanceID, q)
	if q.Order == admin.OrderExpiration {
		r.mu.Lock()
		r.listed = append(r.listed, page...)
		r.mu.Unlock()
	}
	return page, err
}

func (r *raced) before(faster func(a *admin.Alert)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faster = faster
}

// inRace runs a test with an engine over a raced store; prepare is before it starts.
func inRace(t *testing.T, prepare func(w *watch), test func(t *testing.T, w *watch, store *raced)) {
	synctest.Test(t, func(t *testing.T) {
		memory := storetest.NewMemory(admin.AuditKeys{})
		defer func() { _ = memory.Close() }()
		store, log := &raced{Memory: memory}, new(bytes.Buffer)
		w := &watch{t: t, store: memory, log: log}
		w.policy(apikey.Alerts{Unused: apikey.UnusedKeyAlerts{Disabled: true}})
		prepare(w)
		w.engine = usage.NewAlerts(store, usage.AlertsConfig{Holder: "one", Notify: true}, nil, slog.New(slog.NewTextHandler(log, nil)))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- w.engine.Run(ctx) }()
		synctest.Wait()
		time.Sleep(3 * time.Second) // not at the very instants at which the engine looks
		test(t, w, store)
		cancel()
		<-done
		if strings.Contains(log.String(), "could not be done") {
			t.Errorf("a race is no failure:\n%s", log)
		}
	})
}

// Another replica opens the same alert between the look and the write: then it is seen again, not twice there, and
// the webhook is told by the one that was faster.
func TestAlertThatAnotherReplicaJustOpened(t *testing.T) {
	inRace(t, func(*watch) {}, func(t *testing.T, w *watch, store *raced) {
		store.before(func(a *admin.Alert) {
			other := *a
			other.ID[0]++
			if err := store.Memory.PutAlert(t.Context(), &other); err != nil {
				t.Error(err)
			}
		})
		w.count(w.refused("", apikey.ID{}, "unknown_key", 500))
		time.Sleep(tick)
		w.want("two at once", "all nowhere unknownKeys")
		all, err := w.store.Alerts(t.Context(), admin.AlertQuery{Everywhere: true, Limit: 9})
		if err != nil || len(all) != 1 || all[0].Count != 2 {
			t.Errorf("got %+v, %v; want one that was seen twice", all, err)
		}
		if due, _ := w.store.DueNotices(t.Context(), time.Now(), 9); len(due) != 0 {
			t.Errorf("the webhook is told of an alert that was not opened: %s", due[0].Body)
		}
	})
}

// Somebody acknowledges a new network, or another replica resolves it, while this one does: it is over once.
func TestAlertThatSomebodyJustResolved(t *testing.T) {
	inRace(t, func(*watch) {}, func(t *testing.T, w *watch, store *raced) {
		k := w.key(1, nil)
		w.used(k, office)
		time.Sleep(tick)
		w.used(k, cafe)
		time.Sleep(tick)
		store.before(func(a *admin.Alert) {
			if err := store.Memory.PutAlert(t.Context(), a); err != nil {
				t.Error(err)
			}
		})
		time.Sleep(8 * day)
		w.want("a week later", "newNetwork "+cafe+" resolved")
		if due, _ := w.store.DueNotices(t.Context(), time.Now(), 9); len(due) != 1 {
			t.Errorf("got %d notices, want that it was opened", len(due))
		}
		if strings.Contains(w.log.String(), "alert resolved") {
			t.Errorf("the log says that this one resolved it:\n%s", w.log)
		}
	})
}

// More keys than a page expire soon, after more than a page that have expired: each in use has its alert within one
// look, each is read once, and those that have expired are not.
func TestManyKeysExpire(t *testing.T) {
	const n = 450
	inRace(t, func(w *watch) {
		w.update(func(tx admin.Tx) error {
			for i := range 2 * n {
				k := &apikey.Key{
					ID: apikey.ID{1, 14: byte(i >> 8), 15: byte(i)}, InstanceID: home, Type: apikey.TypeInstance, Name: "n",
					CreatedAt: time.Now().Add(-20 * day), LastUsedAt: time.Now().Add(-day), ExpirationDate: time.Now().Add(day + time.Duration(i)*time.Minute),
				}
				if i < n {
					k.ExpirationDate = time.Now().Add(-time.Duration(i+1) * time.Minute)
				}
				if err := tx.InsertKey(w.t.Context(), k); err != nil {
					return err
				}
			}
			return nil
		})
	}, func(t *testing.T, w *watch, store *raced) {
		if got := len(w.alerts()); got != n {
			t.Errorf("%d alerts, want %d", got, n)
		}
		store.mu.Lock()
		defer store.mu.Unlock()
		if len(store.listed) != n {
			t.Errorf("%d keys were read, want the %d that expire soon", len(store.listed), n)
		}
	})
}
