// Package usage knows who used what. So far: when each key was last used.
package usage

import (
	"context"
	"log/slog"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"keyward/authz/apikey"
)

// A toucher is the store that keeps last uses.
type toucher interface {
	Touch(ctx context.Context, uses []apikey.Use) error
}

// LastUsed remembers when keys were last used and writes it down in batches, so that a request costs
// the store nothing. A crash forgets at most one interval; what is written only ever grows.
// Safe for concurrent use.
type LastUsed struct {
	store  toucher
	log    *slog.Logger
	shards [shards]shard
	// recent remembers keys that end when they are idle, so that those in use need not be asked about.
	recent *lru.Cache[apikey.ID, time.Time]
}

const (
	shards = 64
	// interval is well below the minute by which a last use may be late.
	interval     = 10 * time.Second
	writeTimeout = 5 * time.Second
	// recentKeys is how many keys that can become idle are remembered; of others the store is asked.
	recentKeys = 65_536
)

type shard struct {
	mu      sync.Mutex
	pending map[used]time.Time
}

type used struct {
	key        apikey.ID
	generation int
}

// NewLastUsed returns a LastUsed that writes to store while Run runs.
func NewLastUsed(store toucher, log *slog.Logger) *LastUsed {
	recent, err := lru.New[apikey.ID, time.Time](recentKeys)
	if err != nil {
		panic(err) // only for a size below 1
	}
	l := &LastUsed{store: store, log: log, recent: recent}
	for i := range l.shards {
		l.shards[i].pending = map[used]time.Time{}
	}
	return l
}

// Used notes an allowed request with k.
func (l *LastUsed) Used(k *apikey.Key, at time.Time) {
	if k.InactivityDays > 0 {
		l.recent.Add(k.ID, at)
	}
	// The last byte of a UUIDv7 is random.
	s := &l.shards[k.ID[15]%shards]
	s.mu.Lock()
	s.note(used{k.ID, k.Generation}, at)
	s.mu.Unlock()
}

func (s *shard) note(u used, at time.Time) {
	if at.After(s.pending[u]) {
		s.pending[u] = at
	}
}

// Pending returns the last use that is not written yet, zero if there is none.
func (l *LastUsed) Pending(id apikey.ID) (last time.Time) {
	s := &l.shards[id[15]%shards]
	s.mu.Lock()
	defer s.mu.Unlock()
	for u, at := range s.pending {
		if u.key == id && at.After(last) {
			last = at
		}
	}
	return last
}

// Last returns when a key that can become idle was last used, as far as this process remembers.
func (l *LastUsed) Last(id apikey.ID) time.Time {
	at, _ := l.recent.Peek(id)
	return at
}

// Run writes until ctx is done, and then once more.
func (l *LastUsed) Run(ctx context.Context) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			l.write(ctx)
		case <-ctx.Done():
			l.write(context.WithoutCancel(ctx)) // what was used before the end still counts
			return nil
		}
	}
}

func (l *LastUsed) write(ctx context.Context) {
	var batch []apikey.Use
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.Lock()
		taken := s.pending
		if len(taken) == 0 {
			s.mu.Unlock()
			continue
		}
		s.pending = make(map[used]time.Time, len(taken))
		s.mu.Unlock()
		for u, at := range taken {
			batch = append(batch, apikey.Use{KeyID: u.key, Generation: u.generation, At: at})
		}
	}
	if len(batch) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if err := l.store.Touch(ctx, batch); err != nil {
		l.log.Warn("last uses could not be written; they are kept and tried again", "keys", len(batch), "error", err)
		for _, u := range batch {
			s := &l.shards[u.KeyID[15]%shards]
			s.mu.Lock()
			s.note(used{u.KeyID, u.Generation}, u.At)
			s.mu.Unlock()
		}
	}
}
