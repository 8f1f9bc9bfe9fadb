// Package cachetest holds a store in memory for tests of what stands on a cache: it keeps revisions
// and replicas as a real store does, and fails, waits and lags on demand.
package cachetest

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"keyward/authz/apikey"
)

// A Store is a cache.Source. Make one with [NewStore]. Safe for concurrent use.
type Store struct {
	mu        sync.Mutex
	revision  apikey.Revision
	changes   []apikey.Change
	known     apikey.Revision // changes after it are known
	keys      map[apikey.Digest][]version
	lag       apikey.Revision
	instances map[string]*apikey.Instance
	replicas  map[string]Replica
	calls     map[string]int
	onAnswer  func(ctx context.Context, call string) error
}

// A version is what a digest found from a revision on; nil: nothing.
type version struct {
	from apikey.Revision
	key  *apikey.Key
}

// A Replica is what the store knows of one.
type Replica struct {
	Confirmed apikey.Revision
	Until     time.Time
}

// NewStore makes an empty store at revision 1.
func NewStore() *Store {
	return &Store{
		revision:  1,
		known:     1,
		keys:      map[apikey.Digest][]version{},
		instances: map[string]*apikey.Instance{},
		replicas:  map[string]Replica{},
		calls:     map[string]int{},
	}
}

// Put creates or replaces what digests find; a nil key removes it. It returns the change's revision.
func (s *Store) Put(k *apikey.Key, digests ...apikey.Digest) apikey.Revision {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision++
	change := apikey.Change{Revision: s.revision, KeyID: apikey.ID{1}, Digests: digests}
	if k != nil {
		change.KeyID, change.InstanceID = k.ID, k.InstanceID
	}
	s.changes = append(s.changes, change)
	for _, d := range digests {
		s.putLocked(k, d)
	}
	return s.revision
}

// Redigest lets one more digest find a key, without a change.
func (s *Store) Redigest(k *apikey.Key, d apikey.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.putLocked(k, d)
}

func (s *Store) putLocked(k *apikey.Key, d apikey.Digest) {
	if k != nil {
		found := *k
		found.Digest = d
		k = &found
	}
	s.keys[d] = append(s.keys[d], version{s.revision, k})
}

// PutInstance creates or replaces an instance.
func (s *Store) PutInstance(in *apikey.Instance) apikey.Revision {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision++
	s.instances[in.ID] = in
	s.changes = append(s.changes, apikey.Change{Revision: s.revision, InstanceID: in.ID})
	return s.revision
}

// Truncate forgets what changed so far.
func (s *Store) Truncate() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes, s.known = nil, s.revision
}

// Restore goes back to an earlier revision, as a backup does.
func (s *Store) Restore(revision apikey.Revision) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision = revision
	newer := func(at apikey.Revision) bool { return at > revision }
	s.changes = slices.DeleteFunc(s.changes, func(c apikey.Change) bool { return newer(c.Revision) })
	for d, versions := range s.keys {
		s.keys[d] = slices.DeleteFunc(versions, func(v version) bool { return newer(v.from) })
	}
}

// SetLag makes FindKey and Digests answer with the truth of some revisions ago, as a copy that is
// behind does.
func (s *Store) SetLag(revisions apikey.Revision) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lag = revisions
}

// OnAnswer sets what happens between the making of an answer and its return; an error replaces the
// answer. call is the method's name. nil: nothing happens.
func (s *Store) OnAnswer(hook func(ctx context.Context, call string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onAnswer = hook
}

// Fail makes every call fail with err; nil: no more.
func (s *Store) Fail(err error) {
	if err == nil {
		s.OnAnswer(nil)
		return
	}
	s.OnAnswer(func(context.Context, string) error { return err })
}

// Calls returns how often a method was called.
func (s *Store) Calls(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[method]
}

// Replica returns what is known of a replica.
func (s *Store) Replica(name string) (Replica, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.replicas[name]
	return r, ok
}

// Forget makes a replica unknown.
func (s *Store) Forget(replica string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.replicas, replica)
}

// answer makes an answer under the lock and returns it after the hook.
func (s *Store) answer(ctx context.Context, call string, fact func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	s.calls[call]++
	err, hook := fact(), s.onAnswer
	s.mu.Unlock()
	if hook != nil {
		if failed := hook(ctx, call); failed != nil {
			return failed
		}
	}
	return err
}

// FindKey is part of cache.Source.
func (s *Store) FindKey(ctx context.Context, d apikey.Digest) (k *apikey.Key, at apikey.Revision, err error) {
	err = s.answer(ctx, "FindKey", func() error {
		at = s.revision - min(s.lag, s.revision)
		if k = found(s.keys[d], at); k == nil {
			return apikey.ErrNotFound
		}
		return nil
	})
	return k, at, err
}

// found returns what was found at a revision; nil: nothing.
func found(versions []version, at apikey.Revision) (k *apikey.Key) {
	for _, v := range versions {
		if v.from <= at {
			k = v.key
		}
	}
	return k
}

// Digests is part of cache.Source.
func (s *Store) Digests(ctx context.Context, yield func(apikey.Digest) bool) (at apikey.Revision, err error) {
	var all []apikey.Digest
	err = s.answer(ctx, "Digests", func() error {
		at = s.revision - min(s.lag, s.revision)
		for d, versions := range s.keys {
			if found(versions, at) != nil {
				all = append(all, d)
			}
		}
		return nil
	})
	for _, d := range all {
		if err != nil || !yield(d) {
			break
		}
	}
	return at, err
}

// RecentKeys is part of cache.Source. Of keys that were used at the same time, those with the smaller
// digests come first.
func (s *Store) RecentKeys(ctx context.Context, yield func(*apikey.Key, apikey.Revision) bool) error {
	var at apikey.Revision
	var list []*apikey.Key
	err := s.answer(ctx, "RecentKeys", func() error {
		at = s.revision - min(s.lag, s.revision)
		for _, versions := range s.keys {
			if k := found(versions, at); k != nil && k.RevokedAt.IsZero() {
				list = append(list, k)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	slices.SortFunc(list, func(a, b *apikey.Key) int {
		return cmp.Or(b.LastUsedAt.Compare(a.LastUsedAt), bytes.Compare(a.Digest[:], b.Digest[:]))
	})
	for _, k := range list {
		if !yield(k, at) || ctx.Err() != nil {
			break
		}
	}
	return ctx.Err()
}

// Changes is part of cache.Source.
func (s *Store) Changes(ctx context.Context, after apikey.Revision) (list []apikey.Change, head apikey.Revision, truncated bool, err error) {
	err = s.answer(ctx, "Changes", func() error {
		head, truncated = s.revision, after < s.known
		for i := len(s.changes); i > 0 && s.changes[i-1].Revision > after; i-- {
			list = append(list, s.changes[i-1])
		}
		slices.Reverse(list)
		return nil
	})
	return list, head, truncated, err
}

// Instances is part of cache.Source.
func (s *Store) Instances(ctx context.Context) (list []*apikey.Instance, err error) {
	err = s.answer(ctx, "Instances", func() error {
		for _, in := range s.instances {
			list = append(list, in)
		}
		return nil
	})
	return list, err
}

// Register is part of cache.Source.
func (s *Store) Register(ctx context.Context, replica string, at apikey.Revision, ttl time.Duration) error {
	return s.answer(ctx, "Register", func() error {
		s.replicas[replica] = Replica{at, time.Now().Add(ttl)}
		return nil
	})
}

// Confirm is part of cache.Source.
func (s *Store) Confirm(ctx context.Context, replica string, at apikey.Revision, ttl time.Duration) error {
	return s.answer(ctx, "Confirm", func() error {
		if r, ok := s.replicas[replica]; !ok || r.Until.Before(time.Now()) {
			return apikey.ErrNotFound
		}
		s.replicas[replica] = Replica{at, time.Now().Add(ttl)}
		return nil
	})
}

// Unregister is part of cache.Source.
func (s *Store) Unregister(ctx context.Context, replica string) error {
	return s.answer(ctx, "Unregister", func() error {
		delete(s.replicas, replica)
		return nil
	})
}
