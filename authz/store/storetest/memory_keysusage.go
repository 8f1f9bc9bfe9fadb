package storetest

import (
	"bytes"
	"cmp"
	"context"
	"slices"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// KeysUsage implements admin.Store.
func (s *Memory) KeysUsage(ctx context.Context, keys []apikey.ID, q admin.UsageQuery) (list []admin.Usage, err error) {
	v, done, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	for at, counts := range v.usage.all() {
		if at.instance == q.InstanceID && slices.Contains(keys, at.key) && at.interval == q.Interval && !at.start.Before(micros(q.From)) && at.start.Before(micros(q.To)) {
			list = append(list, admin.Usage{InstanceID: at.instance, KeyID: at.key, Start: at.start,
				UsageCounts: admin.UsageCounts{Allowed: counts.Allowed, Refused: counts.Refused}})
		}
	}
	slices.SortFunc(list, func(a, b admin.Usage) int {
		return cmp.Or(bytes.Compare(a.KeyID[:], b.KeyID[:]), a.Start.Compare(b.Start))
	})
	return list, nil
}
