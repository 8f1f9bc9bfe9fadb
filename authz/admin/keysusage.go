package admin

import (
	"context"
	"slices"
	"time"

	"keyward/authz/apikey"
)

// A KeysUsageStore keeps usage so that a list of keys can show some of each key's.
type KeysUsageStore interface {
	// KeysUsage lists what some keys of an instance did, by key and then oldest first, as UsageStore.Usage does:
	// of UsageCounts only Allowed and Refused. q.KeyID says nothing.
	KeysUsage(ctx context.Context, keys []apikey.ID, q UsageQuery) ([]Usage, error)
}

// maxKeysUsage bounds the keys and the intervals of one [Service.KeysUsage].
const maxKeysUsage = 100

// KeysUsage lists how many requests of each of some keys were allowed and refused, at most 100 keys over at most
// 100 intervals, by key. keys are what [Service.Keys] gave the caller.
func (s *Service) KeysUsage(ctx context.Context, caller Caller, instanceID string, keys []*apikey.Key, q UsageQuery) (map[apikey.ID][]Usage, error) {
	instance, err := caller.mayIn(instanceID, readUsage)
	if err != nil {
		return nil, err
	}
	var bad faults
	if len(keys) > maxKeysUsage {
		bad.add(apikey.Invalid("keys", "are more than 100"))
	}
	if !slices.Contains(UsageIntervals(), q.Interval) {
		bad.add(apikey.Invalid("interval", "must be minute, hour or day"))
	}
	if span := q.To.Sub(q.From); span <= 0 || span > maxKeysUsage*max(q.Interval.Duration(), time.Minute) {
		bad.add(apikey.Invalid("from", "must be before to, by at most 100 intervals"))
	}
	if err := bad.err(); err != nil {
		return nil, err
	}
	var ids []apikey.ID
	for _, k := range keys {
		if k.InstanceID == instance && caller.owns(k) {
			ids = append(ids, k.ID)
		}
	}
	if len(ids) == 0 {
		return nil, nil
	}
	q.InstanceID, q.KeyID = instance, apikey.ID{}
	list, err := s.store.KeysUsage(ctx, ids, q)
	if err != nil {
		return nil, err
	}
	by := map[apikey.ID][]Usage{}
	for _, u := range list {
		by[u.KeyID] = append(by[u.KeyID], u)
	}
	return by, nil
}
