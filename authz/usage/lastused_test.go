package usage_test

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz/apikey"
	"keyward/authz/usage"
)

// memory is a store that keeps what it was told, or refuses.
type memory struct {
	mu   sync.Mutex
	last map[apikey.ID]time.Time
	err  error
}

func (m *memory) Touch(_ context.Context, uses []apikey.Use) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	for _, u := range uses {
		if u.At.After(m.last[u.KeyID]) {
			m.last[u.KeyID] = u.At
		}
	}
	return nil
}

func (m *memory) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

func (m *memory) lastUsed(id apikey.ID) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last[id]
}

func TestUsesAreWrittenWithinAMinuteAndAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{last: map[apikey.ID]time.Time{}}
		l := usage.NewLastUsed(store, slog.New(slog.DiscardHandler))
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()

		k := &apikey.Key{ID: apikey.ID{15: 7}, Generation: 1}
		first := time.Now()
		l.Used(k, first)
		l.Used(k, first.Add(-time.Hour)) // late news of an earlier use
		if got := l.Pending(k.ID); !got.Equal(first) {
			t.Errorf("pending: got %v, want %v", got, first)
		}
		time.Sleep(time.Minute + time.Second)
		if got := store.lastUsed(k.ID); !got.Equal(first) {
			t.Errorf("after a minute: got %v, want %v", got, first)
		}

		store.fail(errors.New("disk full"))
		second := time.Now()
		l.Used(k, second)
		time.Sleep(time.Minute + time.Second)
		if got := l.Pending(k.ID); !got.Equal(second) {
			t.Errorf("a use that could not be written was forgotten: got %v, want %v", got, second)
		}
		store.fail(nil)
		stop()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if got := store.lastUsed(k.ID); !got.Equal(second) {
			t.Errorf("after the end: got %v, want %v", got, second)
		}
	})
}

func BenchmarkUsed(b *testing.B) {
	l := usage.NewLastUsed(&memory{}, slog.New(slog.DiscardHandler))
	k := &apikey.Key{ID: apikey.ID{15: 7}, Generation: 1}
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(1)
		l.Used(k, now)
	}
}
