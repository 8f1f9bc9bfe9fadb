package storetest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sort"
	"sync"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/limits"
)

// A Memory is an admin.Store that keeps everything in memory and passes [Run], for tests of what stands
// on a store and has to be fast: a read takes about a microsecond, a transaction a few. Nothing blocks but
// on channels, so it works in a testing/synctest bubble. Make one with [NewMemory]. Safe for concurrent
// use.
type Memory struct {
	memoryReader

	audit   admin.AuditKeys
	writing chan struct{} // holds one value while a transaction runs

	mu       sync.RWMutex
	view     memoryView // of what is committed
	replicas map[string]admin.Replica
	leads    map[string]memoryLead // by job
	closed   bool
	underWay sync.WaitGroup
}

var _ admin.Store = (*Memory)(nil)

// NewMemory makes an empty store. audit makes the MACs of the audit's segments; the zero value makes none.
func NewMemory(audit admin.AuditKeys) *Memory {
	s := &Memory{audit: audit, writing: make(chan struct{}, 1), replicas: map[string]admin.Replica{}, leads: map[string]memoryLead{}}
	s.view = memoryView{
		instances: newTable[string, *apikey.Instance](), keys: newTable[apikey.ID, *memoryKey](), digests: newTable[apikey.Digest, apikey.ID](),
		tokens: newTable[apikey.ID, *memoryToken](), tokenDigests: newTable[apikey.Digest, apikey.ID](),
		peppers: newTable[uint32, [16]byte](), marks: newTable[string, struct{}](),
		replays: newTable[admin.ReplayID, memoryReplay](), hashes: newTable[apikey.ID, apikey.AgentHash](),
		quotaStates:  newTable[limits.Cell, limits.QuotaState](),
		usageWriters: newTable[apikey.ID, int64](),
		usage:        newTable[usagePlace, admin.UsageCounts](), alerts: newTable[apikey.ID, admin.Alert](),
		notices: newTable[apikey.ID, admin.Notice](), networks: newTable[networkPlace, admin.KeyNetwork](),
		sessions: newTable[admin.SessionID, admin.Session](),
	}
	s.look = func(ctx context.Context) (*memoryView, func(), error) {
		leave, err := s.enter(ctx)
		if err != nil {
			return nil, nil, err
		}
		s.mu.RLock()
		return &s.view, func() { s.mu.RUnlock(); leave() }, nil
	}
	return s
}

func (s *Memory) enter(ctx context.Context) (leave func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, outage(err)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, outage(errors.New("the store is closed"))
	}
	s.underWay.Add(1)
	return s.underWay.Done, nil
}

func outage(err error) error { return fmt.Errorf("memory: %w: %w", apikey.ErrUndecided, err) }

// Close implements admin.Store.
func (s *Memory) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.underWay.Wait()
	return nil
}

// Digests implements admin.Reader. While yield takes its time the call is under way, but holds nothing.
func (s *Memory) Digests(ctx context.Context, yield func(apikey.Digest) bool) (apikey.Revision, error) {
	leave, err := s.enter(ctx)
	if err != nil {
		return 0, err
	}
	defer leave()
	return s.memoryReader.Digests(ctx, yield)
}

// RecentKeys implements admin.Reader, as Digests does.
func (s *Memory) RecentKeys(ctx context.Context, yield func(*apikey.Key, apikey.Revision) bool) error {
	leave, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	return s.memoryReader.RecentKeys(ctx, yield)
}

// Update implements admin.Store.
func (s *Memory) Update(ctx context.Context, fn func(tx admin.Tx) error) (apikey.Revision, error) {
	var revision apikey.Revision
	err := s.write(ctx, func(t *memoryTx) error {
		t.revision++
		if err := fn(t); err != nil {
			return err
		}
		if t.broken == nil && !t.audited {
			return errors.New("update: refused: the transaction wrote no audit event")
		}
		revision = t.revision
		return nil
	})
	if err != nil {
		return 0, err
	}
	return revision, nil
}

// write runs fn in a transaction, after all others, and commits if that returns nil and nothing broke.
func (s *Memory) write(ctx context.Context, fn func(t *memoryTx) error) error {
	leave, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	select {
	case s.writing <- struct{}{}:
	case <-ctx.Done():
		return outage(ctx.Err())
	}
	defer func() { <-s.writing }()
	t := &memoryTx{memoryView: s.view.begin(), audit: s.audit}
	t.look = func(ctx context.Context) (*memoryView, func(), error) { return &t.memoryView, func() {}, t.alive(ctx) }
	if err := fn(t); err != nil {
		return err
	}
	if t.broken != nil {
		return t.broken
	}
	if err := ctx.Err(); err != nil {
		return outage(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.view = t.commit()
	return nil
}

// Touch implements admin.Store.
func (s *Memory) Touch(ctx context.Context, uses []apikey.Use) error {
	return s.write(ctx, func(t *memoryTx) error {
		for _, use := range uses {
			k, ok := t.keys.get(use.KeyID)
			if !ok {
				continue
			}
			at, used, now := micros(use.At), *k, micros(time.Now())
			if at.After(k.LastUsedAt) && !k.IdleAt(now, at) && !k.overByTime(now) {
				used.endedAt = time.Time{} // it was held for over
			}
			if at.After(k.LastUsedAt) {
				used.LastUsedAt, used.LastUsedNetwork, used.LastUsedPath = at, use.Network, use.Path
			}
			used.Generations = slices.Clone(k.Generations)
			for i := range used.Generations {
				if g := &used.Generations[i]; g.Number == use.Generation {
					g.LastUsedAt = later(g.LastUsedAt, at)
				}
			}
			t.keys.put(use.KeyID, &used)
		}
		return nil
	})
}

// TouchTokens implements admin.Store.
func (s *Memory) TouchTokens(ctx context.Context, uses []admin.TokenUse) error {
	return s.write(ctx, func(t *memoryTx) error {
		for _, use := range uses {
			if token, ok := t.tokens.get(use.ID); ok {
				used := clone(token)
				used.LastUsedAt = later(token.LastUsedAt, micros(use.At))
				t.tokens.put(use.ID, used)
			}
		}
		return nil
	})
}

// Redigest implements admin.Store.
func (s *Memory) Redigest(ctx context.Context, batch []admin.Redigest) error {
	return s.write(ctx, func(t *memoryTx) error {
		for _, r := range batch {
			if id, ok := t.digests.get(r.Old); ok {
				k, _ := t.keys.get(id)
				_, taken := t.digests.get(r.New)
				if found, ok := k.found.redigested(r); ok && !taken {
					next := *k
					next.found = found
					t.putKey(&next)
				}
			}
			if id, ok := t.tokenDigests.get(r.Old); ok {
				token, _ := t.tokens.get(id)
				_, taken := t.tokenDigests.get(r.New)
				if next, ok := token.found.redigested(r); ok && !taken {
					t.putToken(&memoryToken{token.Token, next})
				}
			}
		}
		return nil
	})
}

// SaveQuotaStates implements admin.Store.
func (s *Memory) SaveQuotaStates(ctx context.Context, states []limits.QuotaState) error {
	return s.write(ctx, func(t *memoryTx) error {
		for _, state := range states {
			state.Until, state.Counts = micros(state.Until), bytes.Clone(state.Counts)
			t.quotaStates.put(state.Cell, state)
		}
		return nil
	})
}

// QuotaStates implements admin.Store.
func (s *Memory) QuotaStates(ctx context.Context, now time.Time, yield func(limits.QuotaState) bool) error {
	v, done, err := s.look(ctx)
	if err != nil {
		return err
	}
	defer done()
	for _, state := range v.quotaStates.all() {
		state.Counts = bytes.Clone(state.Counts)
		if state.Until.After(micros(now)) && !yield(state) {
			break
		}
	}
	return nil
}

// ForgetQuotaStates implements admin.Store.
func (s *Memory) ForgetQuotaStates(ctx context.Context, now time.Time) error {
	return s.write(ctx, func(t *memoryTx) error {
		for cell, state := range t.quotaStates.all() {
			if !state.Until.After(micros(now)) {
				t.quotaStates.drop(cell)
			}
		}
		return nil
	})
}

// Register implements admin.Store.
func (s *Memory) Register(ctx context.Context, replica string, at apikey.Revision, ttl time.Duration) error {
	return s.inReplicas(ctx, func(now time.Time) error {
		s.replicas[replica] = admin.Replica{ID: replica, Confirmed: at, Until: now.Add(ttl)}
		return nil
	})
}

// Confirm implements admin.Store.
func (s *Memory) Confirm(ctx context.Context, replica string, at apikey.Revision, ttl time.Duration) error {
	return s.inReplicas(ctx, func(now time.Time) error {
		r, ok := s.replicas[replica]
		if !ok {
			return notThere("replica")
		}
		r.Confirmed, r.Until = max(r.Confirmed, at), now.Add(ttl)
		s.replicas[replica] = r
		return nil
	})
}

// Unregister implements admin.Store.
func (s *Memory) Unregister(ctx context.Context, replica string) error {
	return s.inReplicas(ctx, func(time.Time) error {
		delete(s.replicas, replica)
		return nil
	})
}

// Replicas implements admin.Store.
func (s *Memory) Replicas(ctx context.Context) (list []admin.Replica, err error) {
	err = s.inReplicas(ctx, func(now time.Time) error {
		for _, r := range s.replicas {
			r.Now = now
			list = append(list, r)
		}
		return nil
	})
	return list, err
}

// A memoryLead is who does a job, and until when.
type memoryLead struct {
	holder string
	until  time.Time
}

// Lead implements admin.Store.
func (s *Memory) Lead(ctx context.Context, job, holder string, ttl time.Duration) (leads bool, err error) {
	err = s.inReplicas(ctx, func(now time.Time) error {
		if held, ok := s.leads[job]; ok && held.holder != holder && now.Before(held.until) {
			return nil
		}
		s.leads[job], leads = memoryLead{holder, now.Add(ttl)}, ttl > 0
		return nil
	})
	return leads, err
}

func (s *Memory) inReplicas(ctx context.Context, fn func(now time.Time) error) error {
	leave, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now().UTC()
	maps.DeleteFunc(s.replicas, func(_ string, r admin.Replica) bool { return !now.Before(r.Until) })
	return fn(now)
}

func notThere(what string) error { return fmt.Errorf("%s: %w", what, apikey.ErrNotFound) }

func taken(what string) error { return fmt.Errorf("%s: %w", what, apikey.ErrConflict) }

// micros is a time as stores keep it.
func micros(t time.Time) time.Time { return t.UTC().Truncate(time.Microsecond) }

// A memoryView is all that is committed, or that with a transaction's changes on top. What pointers in it
// point to never changes.
type memoryView struct {
	instances    table[string, *apikey.Instance]
	keys         table[apikey.ID, *memoryKey]
	digests      table[apikey.Digest, apikey.ID]
	tokens       table[apikey.ID, *memoryToken]
	tokenDigests table[apikey.Digest, apikey.ID]
	peppers      table[uint32, [16]byte]
	marks        table[string, struct{}]
	replays      table[admin.ReplayID, memoryReplay]
	hashes       table[apikey.ID, apikey.AgentHash]
	quotaStates  table[limits.Cell, limits.QuotaState]
	usage        table[usagePlace, admin.UsageCounts]
	usageWriters table[apikey.ID, int64] // the number of the last batch
	alerts       table[apikey.ID, admin.Alert]
	notices      table[apikey.ID, admin.Notice]
	networks     table[networkPlace, admin.KeyNetwork]
	sessions     table[admin.SessionID, admin.Session]

	revision, forgotten apikey.Revision
	// A transaction appends to these beyond what readers see of them.
	changes  []apikey.Change
	events   []admin.Event
	segments []admin.AuditSegment // by number; what readers see of it is never written
}

func (v *memoryView) begin() memoryView {
	next := *v
	next.instances, next.keys, next.digests = v.instances.begin(), v.keys.begin(), v.digests.begin()
	next.tokens, next.tokenDigests = v.tokens.begin(), v.tokenDigests.begin()
	next.peppers, next.marks, next.replays = v.peppers.begin(), v.marks.begin(), v.replays.begin()
	next.hashes = v.hashes.begin()
	next.quotaStates = v.quotaStates.begin()
	next.usageWriters, next.usage, next.alerts, next.sessions = v.usageWriters.begin(), v.usage.begin(), v.alerts.begin(), v.sessions.begin()
	next.notices, next.networks = v.notices.begin(), v.networks.begin()
	return next
}

func (v *memoryView) commit() memoryView {
	next := *v
	next.instances, next.keys, next.digests = v.instances.commit(), v.keys.commit(), v.digests.commit()
	next.tokens, next.tokenDigests = v.tokens.commit(), v.tokenDigests.commit()
	next.peppers, next.marks, next.replays = v.peppers.commit(), v.marks.commit(), v.replays.commit()
	next.hashes = v.hashes.commit()
	next.quotaStates = v.quotaStates.commit()
	next.usageWriters, next.usage, next.alerts, next.sessions = v.usageWriters.commit(), v.usage.commit(), v.alerts.commit(), v.sessions.commit()
	next.notices, next.networks = v.notices.commit(), v.networks.commit()
	return next
}

// A table is a map, with the changes of a transaction on top while there is one.
type table[K comparable, V any] struct {
	base map[K]V
	over map[K]*V // nil: gone
}

func newTable[K comparable, V any]() table[K, V] { return table[K, V]{base: map[K]V{}} }

func (t table[K, V]) begin() table[K, V] { return table[K, V]{t.base, map[K]*V{}} }

func (t table[K, V]) commit() table[K, V] {
	for k, v := range t.over {
		if v == nil {
			delete(t.base, k)
		} else {
			t.base[k] = *v
		}
	}
	return table[K, V]{base: t.base}
}

func (t table[K, V]) get(k K) (v V, ok bool) {
	if changed, ok := t.over[k]; ok {
		if changed == nil {
			return v, false
		}
		return *changed, true
	}
	v, ok = t.base[k]
	return v, ok
}

func (t table[K, V]) has(k K) bool {
	_, ok := t.get(k)
	return ok
}

func (t table[K, V]) put(k K, v V) { t.over[k] = &v }

func (t table[K, V]) drop(k K) { t.over[k] = nil }

func (t table[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		for k, v := range t.base {
			if _, changed := t.over[k]; !changed && !yield(k, v) {
				return
			}
		}
		for k, v := range t.over {
			if v != nil && !yield(k, *v) {
				return
			}
		}
	}
}

// A memoryKey is a key and what finds it.
type memoryKey struct {
	apikey.Key
	found   memoryDigests
	endedAt time.Time // when it was marked; zero: it was not
}

func (k *memoryKey) overByTime(now time.Time) bool {
	return !k.ExpirationDate.IsZero() && now.After(k.ExpirationDate)
}

type memoryToken struct {
	admin.Token
	found memoryDigests
}

type memoryDigests []memoryDigest

type memoryDigest struct {
	digest     apikey.Digest
	generation int
	version    uint32
}

func (list memoryDigests) of(d apikey.Digest) memoryDigest {
	return list[slices.IndexFunc(list, func(m memoryDigest) bool { return m.digest == d })]
}

// redigested returns the list with one more; ok is false where that would be a second one of its version
// or go back.
func (list memoryDigests) redigested(r admin.Redigest) (memoryDigests, bool) {
	old := list.of(r.Old)
	if old.version >= r.Version || slices.ContainsFunc(list, func(m memoryDigest) bool { return m.generation == old.generation && m.version == r.Version }) {
		return nil, false
	}
	return append(slices.Clip(list), memoryDigest{r.New, old.generation, r.Version}), true
}

// without returns the list without a version.
func (list memoryDigests) without(version uint32) memoryDigests {
	return slices.DeleteFunc(slices.Clone(list), func(m memoryDigest) bool { return m.version == version })
}

// alone counts those of a version for whose generation there is no other and which usable says count.
func (list memoryDigests) alone(version uint32, usable func(generation int) bool) (n int) {
	for _, m := range list {
		if m.version == version && usable(m.generation) &&
			!slices.ContainsFunc(list, func(o memoryDigest) bool { return o.generation == m.generation && o.version != version }) {
			n++
		}
	}
	return n
}

// left counts what only a version of the pepper finds and could still be used.
func (v *memoryView) left(version uint32) (n int) {
	now := micros(time.Now())
	open := func(end time.Time) bool { return end.IsZero() || !end.Before(now) }
	for _, k := range v.keys.all() {
		if k.RevokedAt.IsZero() && open(k.ExpirationDate) {
			n += k.found.alone(version, func(number int) bool {
				return slices.ContainsFunc(k.Generations, func(g apikey.Generation) bool { return g.Number == number && open(g.ValidUntil) && !g.Revoked })
			})
		}
	}
	for _, t := range v.tokens.all() {
		if t.RevokedAt.IsZero() && open(t.ExpiresAt) {
			n += t.found.alone(version, func(int) bool { return true })
		}
	}
	return n
}

// A memoryReader answers admin.Reader from the view that look returns.
type memoryReader struct {
	look func(ctx context.Context) (v *memoryView, done func(), err error)
}

func clone[T any](p *T) *T {
	c := *p
	return &c
}

// Instance implements admin.Reader.
func (r *memoryReader) Instance(ctx context.Context, id string) (*apikey.Instance, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	in, ok := v.instances.get(id)
	if !ok {
		return nil, notThere("instance")
	}
	return clone(in), nil
}

// Instances implements admin.Reader.
func (r *memoryReader) Instances(ctx context.Context) (list []*apikey.Instance, err error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	for _, in := range v.instances.all() {
		list = append(list, clone(in))
	}
	slices.SortFunc(list, func(a, b *apikey.Instance) int { return cmp.Compare(a.ID, b.ID) })
	return list, nil
}

// Key implements admin.Reader.
func (r *memoryReader) Key(ctx context.Context, instanceID string, id apikey.ID) (*apikey.Key, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	k, ok := v.keys.get(id)
	if !ok || k.InstanceID != instanceID {
		return nil, notThere("key")
	}
	return clone(&k.Key), nil
}

// FindKey implements admin.Reader.
func (r *memoryReader) FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, apikey.Revision, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer done()
	id, ok := v.digests.get(d)
	if !ok {
		return nil, v.revision, notThere("key")
	}
	k, _ := v.keys.get(id)
	found := clone(&k.Key)
	found.Digest, found.Generation = d, k.found.of(d).generation
	return found, v.revision, nil
}

// LastUsed implements admin.Reader.
func (r *memoryReader) LastUsed(ctx context.Context, id apikey.ID) (time.Time, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return time.Time{}, err
	}
	defer done()
	k, ok := v.keys.get(id)
	if !ok {
		return time.Time{}, notThere("key")
	}
	return k.LastUsedAt, nil
}

// Digests implements admin.Reader.
func (r *memoryReader) Digests(ctx context.Context, yield func(apikey.Digest) bool) (apikey.Revision, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return 0, err
	}
	var list []apikey.Digest
	for d := range v.digests.all() {
		list = append(list, d)
	}
	revision := v.revision
	done()
	for _, d := range list {
		if !yield(d) {
			break
		}
	}
	return revision, nil
}

// RecentKeys implements admin.Reader.
func (r *memoryReader) RecentKeys(ctx context.Context, yield func(*apikey.Key, apikey.Revision) bool) error {
	v, done, err := r.look(ctx)
	if err != nil {
		return err
	}
	var list []*apikey.Key
	for d, id := range v.digests.all() {
		if k, _ := v.keys.get(id); k.RevokedAt.IsZero() {
			found := clone(&k.Key)
			found.Digest, found.Generation = d, k.found.of(d).generation
			list = append(list, found)
		}
	}
	revision := v.revision
	done()
	slices.SortFunc(list, func(a, b *apikey.Key) int {
		return cmp.Or(b.LastUsedAt.Compare(a.LastUsedAt), bytes.Compare(a.Digest[:], b.Digest[:]))
	})
	for _, k := range list {
		if !yield(k, revision) {
			break
		}
	}
	return nil
}

// Changes implements admin.Reader.
func (r *memoryReader) Changes(ctx context.Context, after apikey.Revision) ([]apikey.Change, apikey.Revision, bool, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, 0, false, err
	}
	defer done()
	if after < v.forgotten || after > v.revision {
		return nil, v.revision, true, nil
	}
	first := sort.Search(len(v.changes), func(i int) bool { return v.changes[i].Revision > after })
	return slices.Clone(v.changes[first:]), v.revision, false, nil
}

// Token implements admin.Reader.
func (r *memoryReader) Token(ctx context.Context, d apikey.Digest) (*admin.Token, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	id, ok := v.tokenDigests.get(d)
	if !ok {
		return nil, notThere("token")
	}
	t, _ := v.tokens.get(id)
	return clone(&t.Token), nil
}

// Tokens implements admin.Reader.
func (r *memoryReader) Tokens(ctx context.Context) (list []*admin.Token, err error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	for _, t := range v.tokens.all() {
		list = append(list, clone(&t.Token))
	}
	slices.SortFunc(list, func(a, b *admin.Token) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), bytes.Compare(b.ID[:], a.ID[:]))
	})
	return list, nil
}

// Peppers implements admin.Reader.
func (r *memoryReader) Peppers(ctx context.Context) (list []admin.PepperRecord, err error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	for version, check := range v.peppers.all() {
		list = append(list, admin.PepperRecord{Version: version, Check: check})
	}
	slices.SortFunc(list, func(a, b admin.PepperRecord) int { return cmp.Compare(a.Version, b.Version) })
	return list, nil
}

// PepperLeft implements admin.Reader.
func (r *memoryReader) PepperLeft(ctx context.Context, version uint32) (int, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return 0, err
	}
	defer done()
	return v.left(version), nil
}

// A memoryTx is a transaction.
type memoryTx struct {
	memoryReader
	memoryView
	audit   admin.AuditKeys
	audited bool
	broken  error // the first outage: after it nothing runs
}

func (t *memoryTx) alive(ctx context.Context) error {
	if err := ctx.Err(); err != nil && t.broken == nil {
		t.broken = outage(err)
	}
	return t.broken
}

// changed lists what a write touched.
func (t *memoryTx) changed(instanceID string, id apikey.ID, found memoryDigests) {
	i := len(t.changes)
	for i > 0 && t.changes[i-1].Revision == t.revision {
		i--
	}
	at := slices.IndexFunc(t.changes[i:], func(c apikey.Change) bool { return c.InstanceID == instanceID && c.KeyID == id })
	if at < 0 {
		t.changes = append(t.changes, apikey.Change{Revision: t.revision, InstanceID: instanceID, KeyID: id})
		at = len(t.changes) - 1 - i
	}
	c := &t.changes[i+at]
	for _, m := range found {
		if !slices.Contains(c.Digests, m.digest) {
			c.Digests = append(c.Digests, m.digest)
		}
	}
}

func (t *memoryTx) putKey(k *memoryKey) {
	t.keys.put(k.ID, k)
	for _, m := range k.found {
		t.digests.put(m.digest, k.ID)
	}
}

func (t *memoryTx) putToken(token *memoryToken) {
	t.tokens.put(token.ID, token)
	for _, m := range token.found {
		t.tokenDigests.put(m.digest, token.ID)
	}
}

// PutInstance implements admin.Tx.
func (t *memoryTx) PutInstance(ctx context.Context, in *apikey.Instance) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	next := &apikey.Instance{ID: in.ID, Policy: in.Policy, Quotas: in.Quotas, CreatedAt: micros(in.CreatedAt), Revision: t.revision}
	if old, ok := t.instances.get(in.ID); ok {
		next.CreatedAt = old.CreatedAt
	}
	t.instances.put(in.ID, next)
	t.changed(in.ID, apikey.ID{}, nil)
	return nil
}

// DeleteInstance implements admin.Tx.
func (t *memoryTx) DeleteInstance(ctx context.Context, id string) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	if !t.instances.has(id) {
		return notThere("instance")
	}
	t.instances.drop(id)
	t.changed(id, apikey.ID{}, nil)
	for _, k := range t.keys.all() {
		if k.InstanceID == id {
			t.dropKey(k)
		}
	}
	for at := range t.usage.all() {
		if at.instance == id {
			t.usage.drop(at)
		}
	}
	for alertID, a := range t.alerts.all() {
		if a.InstanceID == id {
			t.alerts.drop(alertID)
		}
	}
	return nil
}

func (t *memoryTx) dropKey(k *memoryKey) {
	t.changed(k.InstanceID, k.ID, k.found)
	t.keys.drop(k.ID)
	t.hashes.drop(k.ID)
	t.dropNetworks(k.ID)
	for _, m := range k.found {
		t.digests.drop(m.digest)
	}
}

// DeleteKey implements admin.Tx.
func (t *memoryTx) DeleteKey(ctx context.Context, instanceID string, id apikey.ID) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	k, ok := t.keys.get(id)
	if !ok || k.InstanceID != instanceID {
		return notThere("key")
	}
	t.dropKey(k)
	return nil
}

// MarkEnded implements admin.Tx.
func (t *memoryTx) MarkEnded(ctx context.Context, id apikey.ID, at time.Time) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	k, ok := t.keys.get(id)
	if !ok {
		return notThere("key")
	}
	next := *k
	if next.endedAt.IsZero() {
		next.endedAt = micros(at)
	}
	t.putKey(&next)
	return nil
}

// InsertKey implements admin.Tx.
func (t *memoryTx) InsertKey(ctx context.Context, k *apikey.Key) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	switch {
	case t.keys.has(k.ID):
		return taken("key")
	case !t.instances.has(k.InstanceID):
		return notThere("instance")
	}
	next := &memoryKey{Key: *k}
	next.Generations, next.Digest, next.Generation, next.Revision = nil, apikey.Digest{}, 0, t.revision
	for _, at := range []*time.Time{
		&next.ExpirationDate, &next.NotBefore, &next.RevokedAt, &next.LeakReportedAt, &next.CreatedAt, &next.LastUsedAt, &next.IdleFrom,
	} {
		*at = micros(*at)
	}
	t.putKey(next)
	t.changed(k.InstanceID, k.ID, nil)
	return nil
}

// UpdateKey implements admin.Tx.
func (t *memoryTx) UpdateKey(ctx context.Context, k *apikey.Key) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	old, ok := t.keys.get(k.ID)
	if !ok || old.InstanceID != k.InstanceID {
		return notThere("key")
	}
	next := &memoryKey{*k, old.found, old.endedAt}
	next.Type, next.AgentName, next.UserPrincipalName = old.Type, old.AgentName, old.UserPrincipalName
	next.CreatedAt, next.CreatedBy, next.LastUsedAt = old.CreatedAt, old.CreatedBy, old.LastUsedAt
	next.LastUsedNetwork, next.LastUsedPath = old.LastUsedNetwork, old.LastUsedPath
	next.Generations, next.Digest, next.Generation, next.Revision = old.Generations, apikey.Digest{}, 0, t.revision
	for _, at := range []*time.Time{&next.ExpirationDate, &next.NotBefore, &next.RevokedAt, &next.LeakReportedAt, &next.IdleFrom} {
		*at = micros(*at)
	}
	if !next.ExpirationDate.Equal(old.ExpirationDate) || next.InactivityDays != old.InactivityDays {
		next.endedAt = time.Time{}
	}
	t.putKey(next)
	t.changed(k.InstanceID, k.ID, next.found)
	return nil
}

// InsertGeneration implements admin.Tx.
func (t *memoryTx) InsertGeneration(ctx context.Context, id apikey.ID, g apikey.Generation, d apikey.Digest, pepperVersion uint32) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	k, ok := t.keys.get(id)
	switch {
	case t.digests.has(d):
		return taken("digest")
	case !ok:
		return notThere("key")
	case slices.ContainsFunc(k.Generations, func(have apikey.Generation) bool { return have.Number == g.Number }):
		return taken("generation")
	}
	g.CreatedAt, g.ValidUntil, g.LastUsedAt = micros(g.CreatedAt), micros(g.ValidUntil), micros(g.LastUsedAt)
	next := clone(k)
	next.found, next.Revision = append(slices.Clip(k.found), memoryDigest{d, g.Number, pepperVersion}), t.revision
	next.Generations = append(slices.Clip(k.Generations), g)
	slices.SortFunc(next.Generations, func(a, b apikey.Generation) int { return cmp.Compare(a.Number, b.Number) })
	t.putKey(next)
	t.changed(k.InstanceID, id, next.found)
	return nil
}

// EndGeneration implements admin.Tx.
func (t *memoryTx) EndGeneration(ctx context.Context, id apikey.ID, number int, validUntil time.Time, revoked bool) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	k, ok := t.keys.get(id)
	if !ok {
		return notThere("key")
	}
	i := slices.IndexFunc(k.Generations, func(g apikey.Generation) bool { return g.Number == number })
	if i < 0 {
		return notThere("generation")
	}
	next := clone(k)
	next.Generations, next.Revision = slices.Clone(k.Generations), t.revision
	next.Generations[i].ValidUntil, next.Generations[i].Revoked = micros(validUntil), revoked
	t.putKey(next)
	t.changed(k.InstanceID, id, next.found)
	return nil
}

// InsertToken implements admin.Tx.
func (t *memoryTx) InsertToken(ctx context.Context, token *admin.Token, d apikey.Digest, pepperVersion uint32) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	if t.tokens.has(token.ID) || t.tokenDigests.has(d) {
		return taken("token")
	}
	next := &memoryToken{*token, memoryDigests{{digest: d, version: pepperVersion}}}
	for _, at := range []*time.Time{&next.CreatedAt, &next.ExpiresAt, &next.RevokedAt, &next.LastUsedAt} {
		*at = micros(*at)
	}
	t.putToken(next)
	return nil
}

// RevokeToken implements admin.Tx.
func (t *memoryTx) RevokeToken(ctx context.Context, id apikey.ID, at time.Time) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	token, ok := t.tokens.get(id)
	if !ok {
		return notThere("token")
	}
	next := *token
	if next.RevokedAt.IsZero() {
		next.RevokedAt = micros(at)
	}
	t.putToken(&next)
	return nil
}

// PutPepper implements admin.Tx.
func (t *memoryTx) PutPepper(ctx context.Context, version uint32, check [16]byte) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	if old, ok := t.peppers.get(version); ok && old != check {
		return taken("pepper version")
	}
	t.peppers.put(version, check)
	return nil
}

// RetirePepper implements admin.Tx.
func (t *memoryTx) RetirePepper(ctx context.Context, version uint32) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	switch {
	case !t.peppers.has(version):
		return notThere("pepper version")
	case t.left(version) > 0:
		return taken("pepper version")
	}
	t.peppers.drop(version)
	t.forgotten = t.revision
	for _, k := range t.keys.all() {
		for _, m := range k.found {
			if m.version == version {
				t.digests.drop(m.digest)
			}
		}
		next := clone(k)
		next.found = k.found.without(version)
		t.putKey(next)
	}
	for _, token := range t.tokens.all() {
		for _, m := range token.found {
			if m.version == version {
				t.tokenDigests.drop(m.digest)
			}
		}
		t.putToken(&memoryToken{token.Token, token.found.without(version)})
	}
	return nil
}

// Mark implements admin.Tx.
func (t *memoryTx) Mark(ctx context.Context, name string) (first bool, err error) {
	if err := t.alive(ctx); err != nil {
		return false, err
	}
	first = !t.marks.has(name)
	t.marks.put(name, struct{}{})
	return first, nil
}
