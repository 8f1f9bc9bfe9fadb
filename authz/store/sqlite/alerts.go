package sqlite

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// alertsSQL reads alerts in the order of the list before: what was deleted with its instance is not among them.
const alertsSQL = `SELECT a.id, n.instance_id, a.kind, a.key_id, a.subject, a.message, a.count, a.opened_at, a.seen_at, a.resolved_at,
	a.acked_at, a.acked_by FROM alerts a CROSS JOIN instance_numbers n ON n.number = a.instance AND n.instance_id IS NOT NULL `

// PutAlert implements admin.Store.
func (s *Store) PutAlert(ctx context.Context, a *admin.Alert, notices ...admin.Notice) error {
	return s.write(ctx, "keep an alert", func(t *tx) error {
		if err := t.putAlert(ctx, a); err != nil {
			return err
		}
		for _, n := range notices {
			if err := t.QueueNotice(ctx, n); err != nil {
				return err
			}
		}
		return nil
	})
}

func (t *tx) putAlert(ctx context.Context, a *admin.Alert) error {
	instance, _, there, err := t.numberOf(ctx, a.InstanceID)
	if err == nil && !there { // deleted meanwhile
		err = notFound("instance")
	}
	if err != nil {
		return err
	}
	n, err := t.exec(ctx, "keep an alert", `INSERT INTO alerts
		(id, instance, kind, key_id, subject, message, count, opened_at, seen_at, resolved_at, acked_at, acked_by) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET kind = excluded.kind, key_id = excluded.key_id,
			subject = excluded.subject, message = excluded.message, count = excluded.count, opened_at = excluded.opened_at,
			seen_at = excluded.seen_at, resolved_at = excluded.resolved_at
		WHERE resolved_at = `+neverSQL+` AND instance = excluded.instance`,
		a.ID[:], instance, a.Kind, a.KeyID[:], a.Subject, a.Message, a.Count,
		micros(a.OpenedAt), micros(a.SeenAt), micros(a.ResolvedAt), micros(a.AckedAt), a.AckedBy)
	if err == nil && n == 0 {
		err = fmt.Errorf("keep an alert: it is resolved, or another instance's: %w", apikey.ErrConflict)
	}
	return err
}

// Alert implements admin.Store.
func (r *reader) Alert(ctx context.Context, id apikey.ID) (*admin.Alert, error) {
	for row, err := range r.rows(ctx, "read an alert", alertsSQL+`WHERE a.id = ?`, id[:]) {
		if err != nil {
			return nil, err
		}
		return r.alert(row)
	}
	return nil, notFound("alert")
}

// Alerts implements admin.Store.
func (r *reader) Alerts(ctx context.Context, q admin.AlertQuery) ([]*admin.Alert, error) {
	where, args := "1", []any{}
	and := func(condition string, values ...any) { where, args = where+" AND "+condition, append(args, values...) }
	if !q.Everywhere {
		instance := "a.instance = "
		if q.KeyID != (apikey.ID{}) { // then by the index of keys: an instance may have very many
			instance = "+a.instance = "
		}
		and(instance+numberSQL, q.InstanceID)
	}
	if q.Kind != "" {
		and("a.kind = ?", q.Kind)
	}
	if q.KeyID != (apikey.ID{}) {
		and("a.key_id = ? AND a.key_id <> x'00000000000000000000000000000000'", q.KeyID[:]) // as the index says it
	}
	if q.Open {
		and("a.resolved_at = " + neverSQL)
	}
	if q.After != (admin.AlertPlace{}) {
		and("(a.opened_at, a.id) < (?, ?)", micros(q.After.OpenedAt), q.After.ID[:])
	}
	var list []*admin.Alert
	for row, err := range r.rows(ctx, "list alerts", alertsSQL+`WHERE `+where+
		` ORDER BY a.opened_at DESC, a.id DESC LIMIT ?`, append(args, q.Limit)...) {
		if err != nil {
			return nil, err
		}
		a, err := r.alert(row)
		if err != nil {
			return nil, err
		}
		list = append(list, a)
	}
	return list, nil
}

func (r *reader) alert(row *sql.Rows) (*admin.Alert, error) {
	a := &admin.Alert{}
	err := r.scan("read an alert", row, exactly(a.ID[:]), &a.InstanceID, &a.Kind, exactly(a.KeyID[:]), &a.Subject, &a.Message, &a.Count,
		instant{&a.OpenedAt}, instant{&a.SeenAt}, instant{&a.ResolvedAt}, instant{&a.AckedAt}, &a.AckedBy)
	return a, err
}

// ForgetAlerts implements admin.Store.
func (s *Store) ForgetAlerts(ctx context.Context, before time.Time) error {
	_, err := s.forget(ctx, "forget alerts", `DELETE FROM alerts WHERE id IN
		(SELECT id FROM alerts WHERE resolved_at < ? AND resolved_at <> `+neverSQL+` LIMIT ?)`, micros(before))
	return err
}

// OpenAlerts implements admin.Store.
func (r *reader) OpenAlerts(ctx context.Context) (map[admin.AlertsOf]int, error) {
	open := map[admin.AlertsOf]int{}
	for row, err := range r.rows(ctx, "count alerts", `SELECT n.instance_id, a.kind, count(*) FROM alerts a INDEXED BY alerts_open
		CROSS JOIN instance_numbers n ON n.number = a.instance AND n.instance_id IS NOT NULL
		WHERE a.resolved_at = `+neverSQL+` GROUP BY a.instance, a.kind`) {
		if err != nil {
			return nil, err
		}
		var of admin.AlertsOf
		var n int
		if err := r.scan("count alerts", row, &of.InstanceID, &of.Kind, &n); err != nil {
			return nil, err
		}
		open[of] = n
	}
	return open, nil
}

// AckAlert implements admin.Tx.
func (t *tx) AckAlert(ctx context.Context, a *admin.Alert) error {
	return t.execOne(ctx, "alert", `UPDATE alerts SET acked_at = ?, acked_by = ?, resolved_at = ? WHERE id = ?`,
		micros(a.AckedAt), a.AckedBy, micros(a.ResolvedAt), a.ID[:])
}

// QueueNotice implements admin.Tx.
func (t *tx) QueueNotice(ctx context.Context, n admin.Notice) error {
	return t.execOne(ctx, "queue a notice", `INSERT INTO notices (id, type, body, made_at, tries, next_at) VALUES (?, ?, ?, ?, ?, ?)`,
		n.ID[:], n.Type, string(n.Body), micros(n.MadeAt), n.Tries, micros(n.NextAt))
}

// DueNotices implements admin.Store.
func (r *reader) DueNotices(ctx context.Context, now time.Time, limit int) ([]admin.Notice, error) {
	var list []admin.Notice
	for row, err := range r.rows(ctx, "read notices", `SELECT id, type, body, made_at, tries, next_at FROM notices
		WHERE next_at <= ? ORDER BY next_at, id LIMIT ?`, micros(now), limit) {
		if err != nil {
			return nil, err
		}
		var n admin.Notice
		var body string
		if err := r.scan("read a notice", row, exactly(n.ID[:]), &n.Type, &body, instant{&n.MadeAt}, &n.Tries, instant{&n.NextAt}); err != nil {
			return nil, err
		}
		n.Body = []byte(body)
		list = append(list, n)
	}
	return list, nil
}

// RetryNotice implements admin.Store.
func (s *Store) RetryNotice(ctx context.Context, n admin.Notice) error {
	return s.write(ctx, "retry a notice", func(t *tx) error {
		_, err := t.exec(ctx, "retry a notice", `UPDATE notices SET tries = ?, next_at = ? WHERE id = ?`, n.Tries, micros(n.NextAt), n.ID[:])
		return err
	})
}

// ForgetNotice implements admin.Store.
func (s *Store) ForgetNotice(ctx context.Context, id apikey.ID) error {
	return s.write(ctx, "forget a notice", func(t *tx) error {
		_, err := t.exec(ctx, "forget a notice", `DELETE FROM notices WHERE id = ?`, id[:])
		return err
	})
}

// ForgetNotices implements admin.Store.
func (s *Store) ForgetNotices(ctx context.Context, before time.Time, keep int) (late, over int, err error) {
	late, err = s.forget(ctx, "forget notices", `DELETE FROM notices WHERE id IN (SELECT id FROM notices WHERE made_at < ? LIMIT ?)`, micros(before))
	if err != nil {
		return late, 0, err
	}
	over, err = s.forget(ctx, "forget notices", `DELETE FROM notices WHERE id IN (SELECT id FROM notices ORDER BY made_at, id
		LIMIT max(0, min(?2, (SELECT count(*) FROM notices) - ?1)))`, keep)
	return late, over, err
}

// KeyNetworks implements admin.Store.
func (r *reader) KeyNetworks(ctx context.Context, key apikey.ID) ([]admin.KeyNetwork, error) {
	var list []admin.KeyNetwork
	for row, err := range r.rows(ctx, "read networks", `SELECT network, first_at, last_at FROM key_networks
		WHERE key_id = ? ORDER BY last_at DESC, network`, key[:]) {
		if err != nil {
			return nil, err
		}
		n := admin.KeyNetwork{KeyID: key}
		if err := r.scan("read a network", row, &n.Network, instant{&n.FirstAt}, instant{&n.LastAt}); err != nil {
			return nil, err
		}
		list = append(list, n)
	}
	return list, nil
}

// LearnNetworks implements admin.Store.
func (s *Store) LearnNetworks(ctx context.Context, networks []admin.KeyNetwork) error {
	for some := range slices.Chunk(networks, batch) {
		if err := s.write(ctx, "learn networks", func(t *tx) error { return t.learnNetworks(ctx, some) }); err != nil {
			return err
		}
	}
	return nil
}

func (t *tx) learnNetworks(ctx context.Context, networks []admin.KeyNetwork) error {
	grown := map[apikey.ID]bool{}
	for _, n := range networks {
		if _, err := t.exec(ctx, "learn a network", `INSERT INTO key_networks (key_id, network, first_at, last_at)
			SELECT ?1, ?2, ?3, ?4 WHERE EXISTS (SELECT 1 FROM keys WHERE id = ?1)
			ON CONFLICT DO UPDATE SET first_at = min(first_at, excluded.first_at), last_at = max(last_at, excluded.last_at)`,
			n.KeyID[:], n.Network, micros(n.FirstAt), micros(n.LastAt)); err != nil {
			return err
		}
		grown[n.KeyID] = true
	}
	for key := range grown {
		if _, err := t.exec(ctx, "forget networks", `DELETE FROM key_networks WHERE key_id = ?1 AND network IN (
			SELECT network FROM key_networks WHERE key_id = ?1 ORDER BY last_at DESC, network LIMIT -1 OFFSET ?2)`,
			key[:], admin.MaxKeyNetworks); err != nil {
			return err
		}
	}
	return nil
}

// ForgetNetworks implements admin.Store.
func (s *Store) ForgetNetworks(ctx context.Context, before time.Time) error {
	_, err := s.forget(ctx, "forget networks", `DELETE FROM key_networks WHERE (key_id, network) IN
		(SELECT key_id, network FROM key_networks WHERE last_at < ? LIMIT ?)`, micros(before))
	return err
}
