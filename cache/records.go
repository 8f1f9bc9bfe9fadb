package cache

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"github.com/dgraph-io/ristretto/v2"
	lru "github.com/hashicorp/golang-lru/v2"

	"keyward/authz/apikey"
)

const stripes = 1 << 16

// A stripe counts the invalidations of the digests that fall into it. Look-ups hold its lock for
// reading, fills and invalidations for writing; nobody waits for anything while holding it.
type stripe struct {
	mu         sync.RWMutex
	generation uint64
}

// A record is what ristretto holds. It is valid only while generation is still its stripe's.
type record struct {
	key        *apikey.Key
	generation uint64 // of the stripe, from before the key was read
}

// records holds what the store said about digests: keys in ristretto, and in an LRU of its own, so that
// junk cannot push out keys, digests that find nothing. Safe for concurrent use.
//
// ristretto compares no keys, only two hashes, and of two digests that agree in the first it keeps one.
// So the whole digest in the record is compared as well, and the other one is read every time.
type records struct {
	stripes []stripe
	// keys is keyed by the first 16 bytes of a digest, of which keyToHash makes ristretto's two hashes;
	// ristretto keeps no keys. A slice of the caller's digest is the one type of key that carries 16
	// bytes without making anything.
	keys    *ristretto.Cache[[]byte, record]
	unknown *lru.Cache[apikey.Digest, uint64] // with the generation of the stripe from before the read
	// asked holds, until the warm-up is over, the digests that were read for a request: what such a read
	// finds may be newer than what the warm-up has of it, and has been told. nil after that.
	asked   atomic.Pointer[digestSet]
	metrics *metrics
	closed  atomic.Bool
}

func newRecords(size, unknown int, m *metrics) (*records, error) {
	r := &records{stripes: make([]stripe, stripes), metrics: m}
	r.asked.Store(newDigestSet())
	var err error
	if r.unknown, err = lru.New[apikey.Digest, uint64](unknown); err != nil {
		return nil, err
	}
	r.keys, err = ristretto.NewCache(&ristretto.Config[[]byte, record]{
		NumCounters:        10 * int64(size),
		MaxCost:            int64(size),
		BufferItems:        1024,
		KeyToHash:          keyToHash,
		IgnoreInternalCost: true, // or a million records would be room for 17,000
		OnReject:           func(*ristretto.Item[record]) { m.rejected.Inc() },
		OnEvict: func(*ristretto.Item[record]) {
			if !r.closed.Load() { // closing evicts everything
				m.evicted.Inc()
			}
		},
	})
	return r, err
}

func keyToHash(first16 []byte) (uint64, uint64) {
	return binary.BigEndian.Uint64(first16), binary.BigEndian.Uint64(first16[8:])
}

// stripeOf takes the last two bytes: the first eight are the known prefix and ristretto's shard, the
// next eight its second hash, and what shares those should not share a stripe for that reason.
func (r *records) stripeOf(d *apikey.Digest) *stripe { return &r.stripes[stripeIndex(d)] }

func stripeIndex(d *apikey.Digest) uint16 { return binary.BigEndian.Uint16(d[len(d)-2:]) }

func (r *records) generation(d *apikey.Digest) uint64 {
	s := r.stripeOf(d)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.generation
}

// generations returns those of all stripes, for a read of many digests at once.
func (r *records) generations() []uint64 {
	all := make([]uint64, len(r.stripes))
	for i := range r.stripes {
		s := &r.stripes[i]
		s.mu.RLock()
		all[i] = s.generation
		s.mu.RUnlock()
	}
	return all
}

// get returns a valid key or nil, and the generation of the stripe at that moment.
func (r *records) get(d *apikey.Digest) (*apikey.Key, uint64) {
	s := r.stripeOf(d)
	// The lock is for close, which waits for it: a Get while ristretto closes may panic.
	s.mu.RLock()
	generation := s.generation
	var rec record
	var ok bool
	if !r.closed.Load() {
		rec, ok = r.keys.Get(d[:16])
	}
	s.mu.RUnlock()
	if !ok || rec.generation != generation || !rec.key.Digest.Equal(d) {
		return nil, generation
	}
	return rec.key, generation
}

// lacks reports whether the store said, within the given generation, that the digest finds nothing.
func (r *records) lacks(d *apikey.Digest, generation uint64) bool {
	at, ok := r.unknown.Get(*d)
	return ok && at == generation
}

// askFor says that the store is going to be read for a digest: from here on the warm-up leaves it alone.
func (r *records) askFor(d *apikey.Digest) {
	s := r.stripeOf(d)
	s.mu.Lock() // so that it is either before a Set of the warm-up or after it
	defer s.mu.Unlock()
	if asked := r.asked.Load(); asked != nil {
		asked.add(d.Prefix())
	}
}

// warm sets what the warm-up has read, unless the digest was asked for meanwhile. It reports whether
// ristretto may have it, or may take it the next time.
func (r *records) warm(d *apikey.Digest, rec record) bool {
	free := true
	ok := r.put(d, rec.generation, func() {
		if asked := r.asked.Load(); asked != nil && asked.has(d.Prefix()) {
			free = false
			return
		}
		r.hand(d, rec)
	})
	return ok && free
}

// warmed says that the warm-up is over.
func (r *records) warmed() { r.asked.Store(nil) }

// fill keeps the store's answer, nil for a digest that finds nothing. generation was read before the
// store was. It reports whether that still holds; if not, nothing was kept and the answer may be too
// old to be used.
func (r *records) fill(d *apikey.Digest, k *apikey.Key, generation uint64) bool {
	rec := record{k, generation}
	if k == nil {
		return r.put(d, generation, func() { r.unknown.Add(*d, generation) })
	}
	for {
		queued, ok := r.set(d, rec)
		if !ok || !queued {
			return ok
		}
		// Until the queue is worked off the next look-up would load again.
		r.keys.Wait()
		// Of two Sets of a new key in the queue ristretto keeps the first. If that was an older one, of an
		// earlier generation or of the warm-up, it is in place by now, and the next Set replaces it on the spot.
		if now, ok := r.keys.Get(d[:16]); !ok || now == rec || now.generation > generation {
			return true
		}
	}
}

// set hands a record to ristretto, if its stripe is still at the record's generation. queued says whether
// ristretto may have it at some time.
func (r *records) set(d *apikey.Digest, rec record) (queued, ok bool) {
	ok = r.put(d, rec.generation, func() { queued = r.hand(d, rec) })
	return queued, ok
}

// hand is ristretto's Set. The caller holds the stripe's lock.
func (r *records) hand(d *apikey.Digest, rec record) (queued bool) {
	if queued = r.keys.Set(d[:16], rec, 1); !queued {
		r.metrics.dropped.Inc()
	}
	return queued
}

// put runs write under the stripe's lock, if the stripe is still at the given generation.
func (r *records) put(d *apikey.Digest, generation uint64, write func()) bool {
	s := r.stripeOf(d)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.generation != generation {
		return false
	}
	write()
	return true
}

// invalidate makes everything that is known of the digest's stripe invalid before it returns.
func (r *records) invalidate(d *apikey.Digest) {
	s := r.stripeOf(d)
	s.mu.Lock()
	s.generation++
	s.mu.Unlock()
	// From here on it is only about memory.
	r.keys.Del(d[:16])
	r.unknown.Remove(*d)
}

// invalidateAll makes everything invalid before it returns. ristretto keeps the dead records until
// others take their places: clearing it is not safe while it is used.
func (r *records) invalidateAll() {
	for i := range r.stripes {
		s := &r.stripes[i]
		s.mu.Lock()
		s.generation++
		s.mu.Unlock()
	}
	r.unknown.Purge()
}

// forgetUnknown forgets that a digest finds nothing.
func (r *records) forgetUnknown(d *apikey.Digest) { r.unknown.Remove(*d) }

// close ends ristretto's goroutines. Nothing may be filled or invalidated from its beginning on; get
// finds nothing more.
func (r *records) close() {
	r.closed.Store(true)
	for i := range r.stripes { // look-ups that came before end
		r.stripes[i].mu.Lock()
		r.stripes[i].mu.Unlock() //nolint:staticcheck // it is a barrier: there is nothing to do inside
	}
	r.keys.Close()
}

// loadKey names a load: fixed widths, so that no two loads share a name.
func loadKey(d *apikey.Digest, generation uint64) string {
	var key [len(apikey.Digest{}) + 8]byte
	copy(key[:], d[:])
	binary.BigEndian.PutUint64(key[len(d):], generation)
	return string(key[:])
}
