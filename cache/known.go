package cache

import (
	"sync"
	"sync/atomic"

	"keyward/authz/apikey"
)

// known is the set of all digests in the store, by their first 8 bytes. It only grows between two
// rebuilds: a digest that is gone costs a read and then a place among the unknown. While it is being
// rebuilt, what was in the old set still counts as known, or clients with good keys would share the
// budget with those who guess. Safe for concurrent use.
type known struct {
	current atomic.Pointer[knownSet]

	mu       sync.Mutex
	building *digestSet // nil: none
}

type knownSet struct {
	*digestSet
	complete bool // what is not in it does not exist, as of the last poll
}

// has reports whether a digest is or was known.
func (k *known) has(d *apikey.Digest) bool { return k.current.Load().has(d.Prefix()) }

// lacks reports whether no such digest exists, as of the last poll.
func (k *known) lacks(d *apikey.Digest) bool {
	now := k.current.Load()
	return now.complete && !now.has(d.Prefix())
}

// size is how many digests are known.
func (k *known) size() int { return k.current.Load().size() }

func (k *known) add(d *apikey.Digest) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.current.Load().add(d.Prefix())
	if k.building != nil {
		k.building.add(d.Prefix())
	}
}

// reset says that the set can no longer tell what does not exist, and begins a new one.
func (k *known) reset() {
	k.mu.Lock()
	defer k.mu.Unlock()
	old := newDigestSet()
	if now := k.current.Load(); now != nil {
		old = now.digestSet
	}
	k.current.Store(&knownSet{old, false})
	k.building = newDigestSet()
}

// begun returns the set that is to be filled; nil if there is none.
func (k *known) begun() *digestSet {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.building
}

// complete says that a set which was begun now holds every digest. It is refused if another one was
// begun since.
func (k *known) complete(set *digestSet) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.building != set {
		return false
	}
	k.current.Store(&knownSet{set, true})
	k.building = nil
	return true
}

// A digestSet holds prefixes of digests. Ten million take about 290 MB, of which the garbage collector
// looks at nothing. A look-up takes a read lock of one of 256 shards. Safe for concurrent use.
type digestSet struct{ shards [256]digestShard }

type digestShard struct {
	mu       sync.RWMutex
	prefixes map[uint64]struct{}
}

func newDigestSet() *digestSet {
	s := &digestSet{}
	for i := range s.shards {
		s.shards[i].prefixes = make(map[uint64]struct{})
	}
	return s
}

func (s *digestSet) shard(prefix uint64) *digestShard { return &s.shards[prefix%uint64(len(s.shards))] }

func (s *digestSet) add(prefix uint64) {
	shard := s.shard(prefix)
	shard.mu.Lock()
	shard.prefixes[prefix] = struct{}{}
	shard.mu.Unlock()
}

func (s *digestSet) has(prefix uint64) bool {
	shard := s.shard(prefix)
	shard.mu.RLock()
	_, ok := shard.prefixes[prefix]
	shard.mu.RUnlock()
	return ok
}

func (s *digestSet) size() (n int) {
	for i := range s.shards {
		shard := &s.shards[i]
		shard.mu.RLock()
		n += len(shard.prefixes)
		shard.mu.RUnlock()
	}
	return n
}
