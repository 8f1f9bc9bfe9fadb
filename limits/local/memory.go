package local

import "keyward/limits"

// A memory holds a bounded number of leases and identities for a while. Where it is full, the oldest
// makes room. It holds no pointers but to its tables. The zero memory is empty.
type memory struct {
	index          map[uint64]int32 // by hash: the first of its entries
	entries        []memoryEntry
	oldest, newest int32
	free           int32 // first of the entries that are not in use, linked by newer
	held           int
}

type memoryEntry struct {
	limits.Lease // with an identity and nothing else: everything of that identity
	hash         uint64
	until        int64 // on the limiter's clock
	older, newer int32
	same         int32 // another of the same hash
}

// covers reports whether an entry speaks of a lease, or of an identity.
func (m *memoryEntry) covers(e *limits.Lease) bool {
	return m.Lease == *e || m.Lease == (limits.Lease{Identity: e.Identity}) && !e.Identity.IsZero()
}

// add keeps a lease or an identity, in place of what it knew of it. It reports whether something else
// had to be forgotten for it before its time.
func (m *memory) add(hash uint64, e *limits.Lease, now, until int64, bound int) (forgot bool) {
	if m.index == nil {
		m.index = make(map[uint64]int32)
		m.entries = make([]memoryEntry, 1, 8)
	}
	m.prune(now)
	m.forget(hash, e)
	at := m.free
	switch {
	case m.held >= bound:
		at = m.oldest
		m.drop(at)
		m.free = m.entries[at].newer
		forgot = true
	case at != none:
		m.free = m.entries[at].newer
	default:
		at = int32(len(m.entries))
		m.entries = append(m.entries, memoryEntry{})
	}
	m.entries[at] = memoryEntry{Lease: *e, hash: hash, until: until, older: m.newest, same: m.index[hash]}
	m.index[hash] = at
	if m.newest == none {
		m.oldest = at
	} else {
		m.entries[m.newest].newer = at
	}
	m.newest = at
	m.held++
	return forgot
}

// prune drops what is old enough. All of a memory is kept for the same time, or to the same time.
func (m *memory) prune(now int64) {
	for m.held > 0 && m.entries[m.oldest].until <= now {
		m.drop(m.oldest)
	}
}

// has reports whether it remembers a lease, or all of its identity.
func (m *memory) has(hash uint64, e *limits.Lease, now int64) bool {
	m.prune(now)
	if m.held == 0 {
		return false
	}
	for at := m.index[hash]; at != none; at = m.entries[at].same {
		if m.entries[at].covers(e) {
			return true
		}
	}
	return false
}

// forget drops what it knows of exactly this lease or identity, and reports whether it knew.
func (m *memory) forget(hash uint64, e *limits.Lease) bool {
	for at := m.index[hash]; at != none; at = m.entries[at].same {
		if m.entries[at].Lease == *e {
			m.drop(at)
			return true
		}
	}
	return false
}

// forgetAll drops every lease of an identity.
func (m *memory) forgetAll(hash uint64, identity limits.Identity) {
	for at := m.index[hash]; at != none; {
		next := m.entries[at].same
		if m.entries[at].Identity == identity {
			m.drop(at)
		}
		at = next
	}
}

func (m *memory) drop(at int32) {
	e := &m.entries[at]
	if first := m.index[e.hash]; first != at {
		for m.entries[first].same != at {
			first = m.entries[first].same
		}
		m.entries[first].same = e.same
	} else if e.same != none {
		m.index[e.hash] = e.same
	} else {
		delete(m.index, e.hash)
	}
	if e.older == none {
		m.oldest = e.newer
	} else {
		m.entries[e.older].newer = e.newer
	}
	if e.newer == none {
		m.newest = e.older
	} else {
		m.entries[e.newer].older = e.older
	}
	*e = memoryEntry{newer: m.free}
	m.free = at
	m.held--
}
