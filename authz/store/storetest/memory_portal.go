package storetest

import (
	"bytes"
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A usagePlace is a row of usage.
type usagePlace struct {
	instance string
	key      apikey.ID
	interval admin.UsageInterval
	start    time.Time
}

// AddUsage implements admin.Store.
func (s *Memory) AddUsage(ctx context.Context, as admin.UsageBatch, counts []admin.Usage) error {
	return s.write(ctx, func(t *memoryTx) error {
		if !as.Writer.IsZero() {
			if last, known := t.usageWriters.get(as.Writer); known && as.Number <= last {
				return nil
			}
			t.usageWriters.put(as.Writer, as.Number)
		}
		for _, u := range counts {
			if u.InstanceID != "" {
				if in, ok := t.instances.get(u.InstanceID); !ok || !u.InstanceMade.IsZero() && !in.CreatedAt.Equal(micros(u.InstanceMade)) {
					continue
				}
			}
			for _, interval := range admin.UsageIntervals() {
				place := usagePlace{u.InstanceID, u.KeyID, interval, u.Start.UTC().Truncate(interval.Duration())}
				kept, _ := t.usage.get(place)
				sum := cloneCounts(kept)
				sum.Add(&u.UsageCounts)
				t.usage.put(place, sum)
			}
		}
		return nil
	})
}

// ForgetDeleted implements admin.Store: what is deleted is gone at once.
func (s *Memory) ForgetDeleted(ctx context.Context) error {
	return s.write(ctx, func(*memoryTx) error { return nil })
}

func cloneCounts(c admin.UsageCounts) admin.UsageCounts {
	c.Reasons, c.Generations, c.Networks = maps.Clone(c.Reasons), maps.Clone(c.Generations), maps.Clone(c.Networks)
	return c
}

// Usage implements admin.Store.
func (s *Memory) Usage(ctx context.Context, q admin.UsageQuery) (list []admin.Usage, err error) {
	v, done, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	for at, counts := range v.usage.all() {
		if at.instance == q.InstanceID && at.key == q.KeyID && at.interval == q.Interval && !at.start.Before(micros(q.From)) && at.start.Before(micros(q.To)) {
			list = append(list, admin.Usage{InstanceID: at.instance, KeyID: at.key, Start: at.start, UsageCounts: cloneCounts(counts)})
		}
	}
	slices.SortFunc(list, func(a, b admin.Usage) int { return a.Start.Compare(b.Start) })
	return list, nil
}

// TopUsage implements admin.Store.
func (s *Memory) TopUsage(ctx context.Context, instanceID string, q admin.UsageTop) (list []admin.Usage, err error) {
	v, done, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	sums := map[apikey.ID]*admin.Usage{}
	for at, counts := range v.usage.all() {
		if at.instance != instanceID || at.key == (apikey.ID{}) || at.interval != q.Interval || at.start.Before(micros(q.From)) || !at.start.Before(micros(q.To)) {
			continue
		}
		if sums[at.key] == nil {
			sums[at.key] = &admin.Usage{InstanceID: instanceID, KeyID: at.key}
		}
		sums[at.key].Add(&counts)
	}
	for _, u := range sums {
		list = append(list, *u)
	}
	by := func(u *admin.Usage) int64 {
		if q.By == admin.ByRefused {
			return u.Refused
		}
		return u.Allowed + u.Refused
	}
	slices.SortFunc(list, func(a, b admin.Usage) int {
		return cmp.Or(cmp.Compare(by(&b), by(&a)), bytes.Compare(a.KeyID[:], b.KeyID[:]))
	})
	return list[:min(len(list), q.Limit)], nil
}

// ForgetUsage implements admin.Store.
func (s *Memory) ForgetUsage(ctx context.Context, before map[admin.UsageInterval]time.Time) error {
	return s.write(ctx, func(t *memoryTx) error {
		for at := range t.usage.all() {
			if limit, ok := before[at.interval]; ok && at.start.Before(micros(limit)) {
				t.usage.drop(at)
			}
		}
		return nil
	})
}

// PutSession implements admin.Store.
func (s *Memory) PutSession(ctx context.Context, session *admin.Session) error {
	return s.write(ctx, func(t *memoryTx) error {
		kept := *session
		for _, at := range []*time.Time{&kept.CreatedAt, &kept.SeenAt, &kept.EndsAt, &kept.IdleAt} {
			*at = micros(*at)
		}
		t.sessions.put(kept.ID, kept)
		return nil
	})
}

// Session implements admin.Reader.
func (r *memoryReader) Session(ctx context.Context, id admin.SessionID) (*admin.Session, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	session, ok := v.sessions.get(id)
	if !ok {
		return nil, notThere("session")
	}
	return &session, nil
}

// TouchSession implements admin.Store.
func (s *Memory) TouchSession(ctx context.Context, id admin.SessionID, seen, idle time.Time) error {
	return s.write(ctx, func(t *memoryTx) error {
		session, ok := t.sessions.get(id)
		if !ok {
			return nil
		}
		if seen = micros(seen); seen.After(session.SeenAt) {
			session.SeenAt = seen
		}
		if idle = micros(idle); idle.After(session.IdleAt) {
			session.IdleAt = idle
		}
		t.sessions.put(id, session)
		return nil
	})
}

// EndSession implements admin.Store.
func (s *Memory) EndSession(ctx context.Context, id admin.SessionID) error {
	return s.write(ctx, func(t *memoryTx) error {
		t.sessions.drop(id)
		return nil
	})
}

// EndSessions implements admin.Tx.
func (t *memoryTx) EndSessions(ctx context.Context, name string) (int, error) {
	if err := t.alive(ctx); err != nil {
		return 0, err
	}
	ended := 0
	for id, session := range t.sessions.all() {
		if name == "" || session.Subject.Name == name {
			t.sessions.drop(id)
			ended++
		}
	}
	return ended, nil
}

// ForgetSessions implements admin.Store.
func (s *Memory) ForgetSessions(ctx context.Context, now time.Time) error {
	return s.write(ctx, func(t *memoryTx) error {
		for id, session := range t.sessions.all() {
			if !session.IdleAt.After(micros(now)) || !session.EndsAt.After(micros(now)) {
				t.sessions.drop(id)
			}
		}
		return nil
	})
}
