package sqlite

import (
	"context"
	"database/sql"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

const alertColumns = `id, instance_id, kind, key_id, subject, message, count, opened_at, seen_at, resolved_at, acked_at, acked_by`

// PutAlert implements admin.Store.
func (s *Store) PutAlert(ctx context.Context, a *admin.Alert) error {
	return s.write(ctx, "keep an alert", func(t *tx) error {
		return t.execOne(ctx, "keep an alert", `INSERT INTO alerts (`+alertColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (id) DO UPDATE SET instance_id = excluded.instance_id, kind = excluded.kind, key_id = excluded.key_id,
				subject = excluded.subject, message = excluded.message, count = excluded.count, opened_at = excluded.opened_at,
				seen_at = excluded.seen_at, resolved_at = excluded.resolved_at, acked_at = excluded.acked_at, acked_by = excluded.acked_by`,
			a.ID[:], a.InstanceID, a.Kind, a.KeyID[:], a.Subject, a.Message, a.Count,
			micros(a.OpenedAt), micros(a.SeenAt), micros(a.ResolvedAt), micros(a.AckedAt), a.AckedBy)
	})
}

// Alert implements admin.Store.
func (r *reader) Alert(ctx context.Context, instanceID string, id apikey.ID) (*admin.Alert, error) {
	for row, err := range r.rows(ctx, "read an alert", `SELECT `+alertColumns+` FROM alerts WHERE id = ? AND instance_id = ?`, id[:], instanceID) {
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
		and("instance_id = ?", q.InstanceID)
	}
	if q.Kind != "" {
		and("kind = ?", q.Kind)
	}
	if q.KeyID != (apikey.ID{}) {
		and("key_id = ?", q.KeyID[:])
	}
	if q.Open {
		and("resolved_at = " + neverSQL)
	}
	if q.After != (admin.AlertPlace{}) {
		and("(opened_at, id) < (?, ?)", micros(q.After.OpenedAt), q.After.ID[:])
	}
	var list []*admin.Alert
	for row, err := range r.rows(ctx, "list alerts", `SELECT `+alertColumns+` FROM alerts WHERE `+where+
		` ORDER BY opened_at DESC, id DESC LIMIT ?`, append(args, q.Limit)...) {
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
	return s.write(ctx, "forget alerts", func(t *tx) error {
		_, err := t.exec(ctx, "forget alerts", `DELETE FROM alerts WHERE resolved_at < ? AND resolved_at <> `+neverSQL, micros(before))
		return err
	})
}
