package cache

import (
	"slices"
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
	set.trim()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.building != set {
		return false
	}
	k.current.Store(&knownSet{set, true})
	k.building = nil
	return true
}

// A digestSet holds prefixes of digests: sorted lists, each of those that begin with the same 14 bits.
// Digests are spread evenly, so all lists are short: of ten million in the set, 610. That takes 90 MB, of
// which the garbage collector looks at nothing. A look-up takes a read lock and
// ten comparisons. Safe for concurrent use.
type digestSet struct {
	lists [1 << listBits]digestList
	count atomic.Int64
}

const listBits = 14

type digestList struct {
	mu       sync.RWMutex
	prefixes []uint64 // ascending
}

func newDigestSet() *digestSet { return &digestSet{} }

func (s *digestSet) list(prefix uint64) *digestList { return &s.lists[prefix>>(64-listBits)] }

func (s *digestSet) add(prefix uint64) {
	l := s.list(prefix)
	l.mu.Lock()
	defer l.mu.Unlock()
	at := len(l.prefixes)
	if at > 0 && prefix <= l.prefixes[at-1] { // most come in order, from a store that keeps them so
		var ok bool
		if at, ok = slices.BinarySearch(l.prefixes, prefix); ok {
			return
		}
	}
	l.prefixes = slices.Insert(l.prefixes, at, prefix)
	s.count.Add(1)
}

func (s *digestSet) has(prefix uint64) bool {
	l := s.list(prefix)
	l.mu.RLock()
	_, ok := slices.BinarySearch(l.prefixes, prefix)
	l.mu.RUnlock()
	return ok
}

func (s *digestSet) size() int { return int(s.count.Load()) }

// trim gives back the room that the lists have for growing.
func (s *digestSet) trim() {
	for i := range s.lists {
		l := &s.lists[i]
		l.mu.Lock()
		l.prefixes = append(make([]uint64, 0, len(l.prefixes)), l.prefixes...)
		l.mu.Unlock()
	}
}
