package sqlite

import (
	"context"
	"database/sql"
	"time"

	"keyward/authz/admin"
)

// AddUsage implements admin.Store.
func (s *Store) AddUsage(ctx context.Context, counts []admin.Usage) error {
	return s.write(ctx, "add usage", func(t *tx) error {
		for i := range counts {
			for _, interval := range admin.UsageIntervals() {
				if err := t.addUsage(ctx, &counts[i], interval); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// A usageDetail is what a row of usage holds in JSON.
type usageDetail struct {
	Reasons     map[string]int64    `json:"reasons,omitempty"`
	Generations map[int]int64       `json:"generations,omitempty"`
	Networks    map[string]int64    `json:"networks,omitempty"`
	Ended       admin.EndedRequests `json:"ended,omitzero"`
}

func (d *usageDetail) counts(allowed, refused int64) admin.UsageCounts {
	return admin.UsageCounts{
		Allowed: allowed, Refused: refused, Reasons: d.Reasons, Generations: d.Generations, Networks: d.Networks, Ended: d.Ended,
	}
}

func (t *tx) addUsage(ctx context.Context, u *admin.Usage, interval admin.UsageInterval) error {
	const what = "add usage"
	each := interval.Duration()
	start := u.Start.UTC().Truncate(each)
	var kept usageDetail
	var allowed, refused int64
	statement, err := t.prepare(ctx, what, `SELECT allowed, refused, detail FROM usage WHERE instance_id = ? AND key_id = ? AND interval = ? AND start = ?`)
	if err != nil {
		return err
	}
	for row, err := range t.each(what, func() (*sql.Rows, error) {
		return statement.QueryContext(ctx, u.InstanceID, u.KeyID[:], int64(each.Seconds()), micros(start))
	}) {
		if err == nil {
			err = t.scan(what, row, &allowed, &refused, document{&kept})
		}
		if err != nil {
			return err
		}
	}
	sum := kept.counts(allowed, refused)
	sum.Add(&u.UsageCounts)
	detail, err := text(usageDetail{sum.Reasons, sum.Generations, sum.Networks, sum.Ended})
	if err != nil {
		return t.fault(what, err)
	}
	return t.execOne(ctx, what, `INSERT INTO usage (instance_id, key_id, interval, start, allowed, refused, detail) VALUES (?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET allowed = excluded.allowed, refused = excluded.refused, detail = excluded.detail`,
		u.InstanceID, u.KeyID[:], int64(each.Seconds()), micros(start), sum.Allowed, sum.Refused, detail)
}

// Usage implements admin.Store.
func (r *reader) Usage(ctx context.Context, q admin.UsageQuery) ([]admin.Usage, error) {
	var list []admin.Usage
	for row, err := range r.rows(ctx, "list usage", `SELECT start, allowed, refused, detail FROM usage
		WHERE instance_id = ? AND key_id = ? AND interval = ? AND start >= ? AND start < ? ORDER BY start`,
		q.InstanceID, q.KeyID[:], int64(q.Interval.Duration().Seconds()), micros(q.From), micros(q.To)) {
		if err != nil {
			return nil, err
		}
		u := admin.Usage{InstanceID: q.InstanceID, KeyID: q.KeyID}
		var detail usageDetail
		var allowed, refused int64
		if err := r.scan("list usage", row, instant{&u.Start}, &allowed, &refused, document{&detail}); err != nil {
			return nil, err
		}
		u.UsageCounts = detail.counts(allowed, refused)
		list = append(list, u)
	}
	return list, nil
}

// TopUsage implements admin.Store.
func (r *reader) TopUsage(ctx context.Context, instanceID string, q admin.UsageTop) ([]admin.Usage, error) {
	by := "sum(allowed + refused)"
	if q.By == admin.ByRefused {
		by = "sum(refused)"
	}
	var list []admin.Usage
	for row, err := range r.rows(ctx, "find the most used keys", `SELECT key_id FROM usage
		WHERE instance_id = ? AND interval = ? AND start >= ? AND start < ? AND key_id <> zeroblob(16)
		GROUP BY key_id ORDER BY `+by+` DESC, key_id LIMIT ?`,
		instanceID, int64(q.Interval.Duration().Seconds()), micros(q.From), micros(q.To), q.Limit) {
		if err != nil {
			return nil, err
		}
		u := admin.Usage{InstanceID: instanceID}
		if err := r.scan("find the most used keys", row, exactly(u.KeyID[:])); err != nil {
			return nil, err
		}
		list = append(list, u)
	}
	for i := range list {
		counts, err := r.Usage(ctx, admin.UsageQuery{
			InstanceID: instanceID, KeyID: list[i].KeyID, Interval: q.Interval, From: q.From, To: q.To,
		})
		if err != nil {
			return nil, err
		}
		for j := range counts {
			list[i].Add(&counts[j].UsageCounts)
		}
	}
	return list, nil
}

// ForgetUsage implements admin.Store.
func (s *Store) ForgetUsage(ctx context.Context, before map[admin.UsageInterval]time.Time) error {
	for interval, at := range before {
		for more := true; more; { // a few at a time: others want to write as well
			err := s.write(ctx, "forget usage", func(t *tx) error {
				n, err := t.exec(ctx, "forget usage", `DELETE FROM usage WHERE (instance_id, key_id, interval, start) IN
					(SELECT instance_id, key_id, interval, start FROM usage WHERE interval = ? AND start < ? LIMIT ?)`,
					int64(interval.Duration().Seconds()), micros(at), batch)
				more = n == batch
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}
