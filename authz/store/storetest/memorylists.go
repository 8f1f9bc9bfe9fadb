package storetest

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// some returns copies of the keys that pass, in no order.
func (r *memoryReader) some(ctx context.Context, passes func(k *memoryKey) bool) (list []*apikey.Key, err error) {
	v, done, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	for _, k := range v.keys.all() {
		if passes(k) {
			list = append(list, clone(&k.Key))
		}
	}
	return list, nil
}

// first returns the first of a list, at most limit.
func first[T any](list []T, limit int) []T { return list[:min(len(list), max(limit, 0))] }

// Keys implements admin.Reader.
func (r *memoryReader) Keys(ctx context.Context, instanceID string, q admin.KeyQuery) ([]*apikey.Key, error) {
	list, err := r.ordered(ctx, instanceID, q)
	list = slices.DeleteFunc(list, func(k *apikey.Key) bool { return !q.Passes(k, q.Now) })
	return first(list, q.Limit), err
}

// memoryLooksAt is how many keys a page looks at. It is small, so that what goes through pages meets short ones.
const memoryLooksAt = 100

// KeyPage implements admin.Reader.
func (r *memoryReader) KeyPage(ctx context.Context, instanceID string, q admin.KeyQuery) (page admin.KeyPage, err error) {
	list, err := r.ordered(ctx, instanceID, q)
	for i, k := range list {
		passes := q.Passes(k, q.Now)
		if i == memoryLooksAt || passes && len(page.Keys) == max(q.Limit, 0) {
			page.Next = q.After
			if i > 0 {
				page.Next = q.Order.PlaceOf(list[i-1])
			}
			break
		}
		if passes {
			page.Keys = append(page.Keys, k)
		}
	}
	return page, err
}

// ordered returns all keys that a query may be about, in its order.
func (r *memoryReader) ordered(ctx context.Context, instanceID string, q admin.KeyQuery) ([]*apikey.Key, error) {
	list, err := r.some(ctx, func(k *memoryKey) bool {
		return k.InstanceID == instanceID && (q.Order != admin.OrderIdle || k.InactivityDays > 0) &&
			(q.After == admin.KeyPlace{} || compare(q.Order, q.After, q.Order.PlaceOf(&k.Key)) < 0)
	})
	slices.SortFunc(list, func(a, b *apikey.Key) int { return compare(q.Order, q.Order.PlaceOf(a), q.Order.PlaceOf(b)) })
	return list, err
}

// CountKeys implements admin.Reader.
func (r *memoryReader) CountKeys(ctx context.Context, instanceID string, owner admin.KeyOwner, now time.Time) (n admin.KeyCounts, err error) {
	_, err = r.some(ctx, func(k *memoryKey) bool {
		if k.InstanceID != instanceID || owner != (admin.KeyOwner{}) && admin.OwnerOf(&k.Key) != owner {
			return false
		}
		n.Total++
		switch {
		case !k.RevokedAt.IsZero():
			n.Revoked++
		case !k.endedAt.IsZero() || k.overByTime(micros(now)):
			n.Expired++
		default:
			n.Usable++
			if k.Disabled {
				n.Disabled++
			}
		}
		return false
	})
	return n, err
}

// Creations implements admin.Reader.
func (r *memoryReader) Creations(ctx context.Context, instanceID, createdBy string, since time.Time, limit int) ([]time.Time, error) {
	list, err := r.some(ctx, func(k *memoryKey) bool {
		return k.InstanceID == instanceID && k.CreatedAt.After(micros(since)) &&
			(createdBy == "" && !strings.HasPrefix(k.CreatedBy, admin.ImportedBy) || createdBy != "" && createdBy == k.CreatedBy)
	})
	var times []time.Time
	for _, k := range list {
		times = append(times, k.CreatedAt)
	}
	slices.SortFunc(times, func(a, b time.Time) int { return b.Compare(a) })
	if limit <= 0 {
		return nil, err
	}
	return first(times, limit), err
}

// DueKeys implements admin.Reader.
func (r *memoryReader) DueKeys(ctx context.Context, expired, idle time.Time, limit int) ([]*apikey.Key, error) {
	list, err := r.some(ctx, func(k *memoryKey) bool {
		return k.RevokedAt.IsZero() && k.endedAt.IsZero() &&
			(k.overByTime(micros(expired)) || k.InactivityDays > 0 && k.IdleAfter().Before(micros(idle)))
	})
	return first(list, limit), err
}

// RevokedKeys implements admin.Reader.
func (r *memoryReader) RevokedKeys(ctx context.Context, instanceID string, before time.Time, limit int) ([]*apikey.Key, error) {
	list, err := r.some(ctx, func(k *memoryKey) bool {
		return k.InstanceID == instanceID && !k.RevokedAt.IsZero() && k.RevokedAt.Before(micros(before))
	})
	slices.SortFunc(list, func(a, b *apikey.Key) int {
		return cmp.Or(a.RevokedAt.Compare(b.RevokedAt), bytes.Compare(a.ID[:], b.ID[:]))
	})
	return first(list, limit), err
}
