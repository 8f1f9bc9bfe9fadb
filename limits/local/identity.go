package local

import (
	"encoding/binary"
	"hash/maphash"
	"math"
	"sync"
	"time"

	"keyward/limits"
)

const (
	// goneFor is how long a grant may still be on its way when its request has ended.
	goneFor = time.Second
	forever = math.MaxInt64
)

// How much is remembered, in entries of 88 bytes. In each shard, so that nothing grows without bound
// whatever is sent: 65,536 in all, and four times that for the first 45 seconds.
const (
	goneBound    = 256
	earlyBound   = 1024
	expiredBound = 256
)

// Identities finds the live leases of an identity, and remembers leases and identities that are gone.
// Its lock is the last: whoever holds it takes no other.
type identities struct {
	mu      sync.Mutex
	index   map[uint64]int32 // by the identity's hash: the first of its entries
	entries []identityEntry
	free    int32 // first of the entries that are not in use, linked by next

	gone    memory // identities that ended just now
	early   memory // leases and identities that ended while leases of older requests are adopted
	expired memory // leases that nobody ended

	forgotten uint64 // entries that a bound has cost
	_         [32]byte
}

// A place is where a lease or a cell is: in which shard of cells, and at which position of its table. It
// can be looked at only while that shard is locked.
type place struct{ shard, at int32 }

type identityEntry struct {
	place
	next int32 // another of the same hash
}

// hashOf hashes a lease's identity, or all of the lease where that names nothing.
func (l *Limiter) hashOf(e *limits.Lease) uint64 {
	var b [51]byte
	copy(b[:16], e.Identity.Peer[:])
	binary.LittleEndian.PutUint16(b[16:], e.Identity.Port)
	binary.LittleEndian.PutUint64(b[18:], uint64(e.Identity.Start))
	if !e.Identity.IsZero() {
		return maphash.Bytes(l.seed, b[:26])
	}
	binary.LittleEndian.PutUint64(b[26:], e.HTTP)
	copy(b[34:50], e.Cell.Owner[:])
	b[50] = byte(e.Cell.Class)
	return maphash.Bytes(l.seed, b[:])
}

func (l *Limiter) identitiesOf(hash uint64) *identities { return &l.identities[hash%shardCount] }

// find returns the position of a live lease in its shard, which is locked, as the identities are.
func (l *Limiter) find(ids *identities, hash uint64, shard int32, e *limits.Lease) int32 {
	for i := ids.index[hash]; i != none; i = ids.entries[i].next {
		if p := ids.entries[i].place; p.shard == shard && l.shards[shard].leases.table[p.at].Lease == *e {
			return p.at
		}
	}
	return none
}

func (ids *identities) insert(hash uint64, p place) {
	if ids.index == nil {
		ids.index = make(map[uint64]int32)
		ids.entries = make([]identityEntry, 1, 8)
	}
	i := ids.free
	if i == none {
		i = int32(len(ids.entries))
		ids.entries = append(ids.entries, identityEntry{})
	} else {
		ids.free = ids.entries[i].next
	}
	ids.entries[i] = identityEntry{p, ids.index[hash]}
	ids.index[hash] = i
}

func (ids *identities) remove(hash uint64, p place) {
	last := int32(none)
	for i := ids.index[hash]; i != none; last, i = i, ids.entries[i].next {
		if ids.entries[i].place != p {
			continue
		}
		next := ids.entries[i].next
		switch {
		case last != none:
			ids.entries[last].next = next
		case next != none:
			ids.index[hash] = next
		default:
			delete(ids.index, hash)
		}
		ids.entries[i] = identityEntry{next: ids.free}
		ids.free = i
		return
	}
}

// remember keeps a lease, or an identity (a lease that is nothing else), in one of the memories.
func (ids *identities) remember(m *memory, hash uint64, e *limits.Lease, now, until int64) {
	bound := expiredBound
	switch m {
	case &ids.gone:
		bound = goneBound
	case &ids.early:
		bound = earlyBound
	}
	if m.add(hash, e, now, until, bound) {
		ids.forgotten++
	}
}
