package sqlite

import (
	"context"
	"strings"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// KeysUsage implements admin.Store. It reads one range of the primary key for each key, and of their rows not the
// detail.
func (r *reader) KeysUsage(ctx context.Context, keys []apikey.ID, q admin.UsageQuery) ([]admin.Usage, error) {
	const what = "list usage of keys"
	if len(keys) == 0 {
		return nil, nil
	}
	args := []any{q.InstanceID}
	for i := range keys {
		args = append(args, keys[i][:])
	}
	args = append(args, int64(q.Interval.Duration().Seconds()), micros(q.From), micros(q.To))
	var list []admin.Usage
	for row, err := range r.rows(ctx, what, `SELECT key_id, start, allowed, refused FROM usage
		WHERE instance = `+numberSQL+` AND key_id IN (?`+strings.Repeat(", ?", len(keys)-1)+`) AND interval = ? AND start >= ? AND start < ?
		ORDER BY key_id, start`, args...) {
		if err != nil {
			return nil, err
		}
		u := admin.Usage{InstanceID: q.InstanceID}
		if err := r.scan(what, row, exactly(u.KeyID[:]), instant{&u.Start}, &u.Allowed, &u.Refused); err != nil {
			return nil, err
		}
		list = append(list, u)
	}
	return list, nil
}
