package storetest

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A networkPlace is a row of the networks of keys.
type networkPlace struct {
	key     apikey.ID
	network string
}

// PutAlert implements admin.Store.
func (s *Memory) PutAlert(ctx context.Context, a *admin.Alert, notices ...admin.Notice) error {
	return s.write(ctx, func(t *memoryTx) error {
		if a.InstanceID != "" && !t.instances.has(a.InstanceID) {
			return notThere("instance of an alert")
		}
		old, there := t.alerts.get(a.ID)
		if there && (!old.ResolvedAt.IsZero() || old.InstanceID != a.InstanceID) {
			return taken("alert")
		}
		for _, other := range t.alerts.all() {
			if other.ID != a.ID && a.ResolvedAt.IsZero() && other.ResolvedAt.IsZero() && other.InstanceID == a.InstanceID &&
				other.Kind == a.Kind && other.KeyID == a.KeyID && other.Subject == a.Subject {
				return taken("alert")
			}
		}
		kept := *a
		if there {
			kept.AckedAt, kept.AckedBy = old.AckedAt, old.AckedBy
		}
		t.putAlert(kept)
		for _, n := range notices {
			if err := t.QueueNotice(ctx, n); err != nil {
				return err
			}
		}
		return nil
	})
}

func (t *memoryTx) putAlert(a admin.Alert) {
	for _, at := range []*time.Time{&a.OpenedAt, &a.SeenAt, &a.ResolvedAt, &a.AckedAt} {
		*at = micros(*at)
	}
	t.alerts.put(a.ID, a)
}

// Alert implements admin.Store.
func (r *memoryReader) Alert(ctx context.Context, id apikey.ID) (*admin.Alert, error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	a, ok := v.alerts.get(id)
	if !ok {
		return nil, notThere("alert")
	}
	return &a, nil
}

// Alerts implements admin.Store.
func (s *Memory) Alerts(ctx context.Context, q admin.AlertQuery) (list []*admin.Alert, err error) {
	v, done, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	for _, a := range v.alerts.all() {
		place := admin.AlertPlace{OpenedAt: a.OpenedAt, ID: a.ID}
		if (q.Everywhere || a.InstanceID == q.InstanceID) && (q.Kind == "" || a.Kind == q.Kind) &&
			(q.KeyID == (apikey.ID{}) || a.KeyID == q.KeyID) && (!q.Open || a.ResolvedAt.IsZero()) &&
			(q.After == (admin.AlertPlace{}) || compareAlerts(place, q.After) < 0) {
			list = append(list, &a)
		}
	}
	slices.SortFunc(list, func(a, b *admin.Alert) int {
		return compareAlerts(admin.AlertPlace{OpenedAt: b.OpenedAt, ID: b.ID}, admin.AlertPlace{OpenedAt: a.OpenedAt, ID: a.ID})
	})
	return list[:min(len(list), q.Limit)], nil
}

func compareAlerts(a, b admin.AlertPlace) int {
	return cmp.Or(a.OpenedAt.Compare(micros(b.OpenedAt)), bytes.Compare(a.ID[:], b.ID[:]))
}

// OpenAlerts implements admin.Store.
func (s *Memory) OpenAlerts(ctx context.Context) (map[admin.AlertsOf]int, error) {
	v, done, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	open := map[admin.AlertsOf]int{}
	for _, a := range v.alerts.all() {
		if a.ResolvedAt.IsZero() {
			open[admin.AlertsOf{InstanceID: a.InstanceID, Kind: a.Kind}]++
		}
	}
	return open, nil
}

// ForgetAlerts implements admin.Store.
func (s *Memory) ForgetAlerts(ctx context.Context, before time.Time) error {
	return s.write(ctx, func(t *memoryTx) error {
		for id, a := range t.alerts.all() {
			if !a.ResolvedAt.IsZero() && a.ResolvedAt.Before(micros(before)) {
				t.alerts.drop(id)
			}
		}
		return nil
	})
}

// AckAlert implements admin.Tx.
func (t *memoryTx) AckAlert(ctx context.Context, a *admin.Alert) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	kept, ok := t.alerts.get(a.ID)
	if !ok {
		return notThere("alert")
	}
	kept.AckedAt, kept.AckedBy, kept.ResolvedAt = a.AckedAt, a.AckedBy, a.ResolvedAt
	t.putAlert(kept)
	return nil
}

// QueueNotice implements admin.Tx.
func (t *memoryTx) QueueNotice(ctx context.Context, n admin.Notice) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	if t.notices.has(n.ID) {
		return taken("notice")
	}
	n.Body, n.MadeAt, n.NextAt = bytes.Clone(n.Body), micros(n.MadeAt), micros(n.NextAt)
	t.notices.put(n.ID, n)
	return nil
}

// DueNotices implements admin.Store.
func (s *Memory) DueNotices(ctx context.Context, now time.Time, limit int) (list []admin.Notice, err error) {
	v, done, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	for _, n := range v.notices.all() {
		if !n.NextAt.After(micros(now)) {
			n.Body = bytes.Clone(n.Body)
			list = append(list, n)
		}
	}
	slices.SortFunc(list, func(a, b admin.Notice) int {
		return cmp.Or(a.NextAt.Compare(b.NextAt), bytes.Compare(a.ID[:], b.ID[:]))
	})
	return list[:min(len(list), limit)], nil
}

// RetryNotice implements admin.Store.
func (s *Memory) RetryNotice(ctx context.Context, n admin.Notice) error {
	return s.write(ctx, func(t *memoryTx) error {
		if kept, ok := t.notices.get(n.ID); ok {
			kept.Tries, kept.NextAt = n.Tries, micros(n.NextAt)
			t.notices.put(n.ID, kept)
		}
		return nil
	})
}

// ForgetNotice implements admin.Store.
func (s *Memory) ForgetNotice(ctx context.Context, id apikey.ID) error {
	return s.write(ctx, func(t *memoryTx) error {
		t.notices.drop(id)
		return nil
	})
}

// ForgetNotices implements admin.Store.
func (s *Memory) ForgetNotices(ctx context.Context, before time.Time, keep int) (late, over int, err error) {
	err = s.write(ctx, func(t *memoryTx) error {
		var left []admin.Notice
		for id, n := range t.notices.all() {
			if n.MadeAt.Before(micros(before)) {
				t.notices.drop(id)
				late++
			} else {
				left = append(left, n)
			}
		}
		slices.SortFunc(left, func(a, b admin.Notice) int {
			return cmp.Or(a.MadeAt.Compare(b.MadeAt), bytes.Compare(a.ID[:], b.ID[:]))
		})
		over = max(0, len(left)-keep)
		for _, n := range left[:over] {
			t.notices.drop(n.ID)
		}
		return nil
	})
	return late, over, err
}

// KeyNetworks implements admin.Store.
func (s *Memory) KeyNetworks(ctx context.Context, key apikey.ID) (list []admin.KeyNetwork, err error) {
	v, done, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	return v.networksOf(key), nil
}

// networksOf returns the networks of a key, those used last first.
func (v *memoryView) networksOf(key apikey.ID) (list []admin.KeyNetwork) {
	for at, n := range v.networks.all() {
		if at.key == key {
			list = append(list, n)
		}
	}
	slices.SortFunc(list, func(a, b admin.KeyNetwork) int {
		return cmp.Or(b.LastAt.Compare(a.LastAt), cmp.Compare(a.Network, b.Network))
	})
	return list
}

// LearnNetworks implements admin.Store.
func (s *Memory) LearnNetworks(ctx context.Context, networks []admin.KeyNetwork) error {
	return s.write(ctx, func(t *memoryTx) error {
		for _, n := range networks {
			if !t.keys.has(n.KeyID) {
				continue
			}
			n.FirstAt, n.LastAt = micros(n.FirstAt), micros(n.LastAt)
			if old, ok := t.networks.get(networkPlace{n.KeyID, n.Network}); ok {
				n.LastAt = later(old.LastAt, n.LastAt)
				if old.FirstAt.Before(n.FirstAt) {
					n.FirstAt = old.FirstAt
				}
			}
			t.networks.put(networkPlace{n.KeyID, n.Network}, n)
			if all := t.networksOf(n.KeyID); len(all) > admin.MaxKeyNetworks {
				for _, old := range all[admin.MaxKeyNetworks:] {
					t.networks.drop(networkPlace{old.KeyID, old.Network})
				}
			}
		}
		return nil
	})
}

// ForgetNetworks implements admin.Store.
func (s *Memory) ForgetNetworks(ctx context.Context, before time.Time) error {
	return s.write(ctx, func(t *memoryTx) error {
		for at, n := range t.networks.all() {
			if n.LastAt.Before(micros(before)) {
				t.networks.drop(at)
			}
		}
		return nil
	})
}

func (t *memoryTx) dropNetworks(key apikey.ID) {
	for at := range t.networks.all() {
		if at.key == key {
			t.networks.drop(at)
		}
	}
}
