package sqlite

import (
	"context"
	"database/sql"
	"time"

	"keyward/authz/admin"
)

// AddUsage implements admin.Store.
func (s *Store) AddUsage(ctx context.Context, as admin.UsageBatch, counts []admin.Usage) error {
	return s.write(ctx, "add usage", func(t *tx) error {
		if first, err := t.firstTime(ctx, as); err != nil || !first {
			return err
		}
		for i := range counts {
			u := &counts[i]
			number, made, there, err := t.numberOf(ctx, u.InstanceID)
			if err != nil {
				return err
			}
			if !there || !u.InstanceMade.IsZero() && micros(u.InstanceMade) != micros(made) {
				continue
			}
			for _, interval := range admin.UsageIntervals() {
				if err := t.addUsage(ctx, number, u, interval); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// maxUsageWriters is of how many processes the last batch of counts is remembered, those that wrote last: far more
// than run at once. One that fell out of them, while so many others wrote, might have a batch added twice.
const maxUsageWriters = 1000

// firstTime notes that a batch is added; false if it was before.
func (t *tx) firstTime(ctx context.Context, as admin.UsageBatch) (bool, error) {
	const what = "note a batch of usage"
	if as.Writer.IsZero() {
		return true, nil
	}
	now := micros(time.Now())
	n, err := t.exec(ctx, what, `UPDATE usage_writers SET batch = ?2, at = ?3 WHERE writer = ?1 AND batch < ?2`, as.Writer[:], as.Number, now)
	if err != nil || n == 1 {
		return n == 1, err
	}
	if n, err = t.exec(ctx, what, `INSERT INTO usage_writers (writer, batch, at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING`, as.Writer[:], as.Number, now); err != nil || n == 0 {
		return false, err
	}
	_, err = t.exec(ctx, what, `DELETE FROM usage_writers WHERE writer IN (SELECT writer FROM usage_writers WHERE writer <> ? ORDER BY at DESC LIMIT -1 OFFSET ?)`,
		as.Writer[:], maxUsageWriters-1)
	return true, err
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

func (t *tx) addUsage(ctx context.Context, instance int64, u *admin.Usage, interval admin.UsageInterval) error {
	const what = "add usage"
	each := interval.Duration()
	start := u.Start.UTC().Truncate(each)
	var kept usageDetail
	var allowed, refused int64
	statement, err := t.prepare(ctx, what, `SELECT allowed, refused, detail FROM usage WHERE instance = ? AND key_id = ? AND interval = ? AND start = ?`)
	if err != nil {
		return err
	}
	for row, err := range t.each(what, func() (*sql.Rows, error) {
		return statement.QueryContext(ctx, instance, u.KeyID[:], int64(each.Seconds()), micros(start))
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
	return t.execOne(ctx, what, `INSERT INTO usage (instance, key_id, interval, start, allowed, refused, detail) VALUES (?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET allowed = excluded.allowed, refused = excluded.refused, detail = excluded.detail`,
		instance, u.KeyID[:], int64(each.Seconds()), micros(start), sum.Allowed, sum.Refused, detail)
}

// numberSQL is the number of an instance in statements: none, and so no rows, for one that is not there.
const numberSQL = `(SELECT number FROM instance_numbers WHERE instance_id = ?)`

// Usage implements admin.Store.
func (r *reader) Usage(ctx context.Context, q admin.UsageQuery) ([]admin.Usage, error) {
	var list []admin.Usage
	for row, err := range r.rows(ctx, "list usage", `SELECT start, allowed, refused, detail FROM usage
		WHERE instance = `+numberSQL+` AND key_id = ? AND interval = ? AND start >= ? AND start < ? ORDER BY start`,
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
		WHERE instance = `+numberSQL+` AND interval = ? AND start >= ? AND start < ? AND key_id <> zeroblob(16)
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
		_, err := s.forget(ctx, "forget usage", `DELETE FROM usage WHERE (instance, key_id, interval, start) IN
			(SELECT instance, key_id, interval, start FROM usage WHERE interval = ? AND start < ? LIMIT ?)`,
			int64(interval.Duration().Seconds()), micros(at))
		if err != nil {
			return err
		}
	}
	return nil
}
