package local

import (
	"context"

	"keyward/limits"
)

// Look says where every limit of a demand stands. See [limits.Limiter]. It never blocks.
func (l *Limiter) Look(_ context.Context, d *limits.Demand, standings []limits.Standing) ([]limits.Standing, error) {
	var usual [usualLimits]involved
	t, ok := l.involve(usual[:0], d)
	if !ok {
		return standings, errTwice
	}
	begin := len(standings)
	standings = append(standings, make([]limits.Standing, len(t.cells))...)
	l.lock(t.cells)
	defer l.unlock(t.cells)
	at := l.instant(t.quotas)
	for i := range t.cells {
		c := &t.cells[i]
		s := &l.shards[c.shard]
		var standing limits.Standing
		switch c.kind {
		case aRate:
			r, full := t.rate(c), int64(0)
			if position, ok := s.index[r.Cell]; ok {
				full = s.slots[position].full
			}
			standing = r.Stand(full, at.clock)
		case aQuota:
			standing = lookQuota(&s.quotas, t.quota(c), at)
			standing.Quota = int(c.position)
		default:
			l.expire(s, at.clock)
			standing = l.lookLeases(s, t.lease)
		}
		standings[begin+int(c.place)] = standing
	}
	return standings, nil
}

// lookQuota says where a quota stands. What it judges is a copy: whoever looks changes nothing.
func lookQuota(t *quotaTable, q *limits.QuotaDemand, at instant) limits.Standing {
	var tally limits.Tally
	var runs limits.Runs
	if position, ok := t.index[q.Cell]; ok {
		s := &t.slots[position]
		tally, runs = s.tally, t.runs(s)
		runs = runs.CopyTo(make([]limits.Run, len(runs.Ring)))
	}
	return tally.Stand(&runs, q, at.clock, at.wall)
}

func (l *Limiter) lookLeases(s *shard, d *limits.LeaseDemand) limits.Standing {
	standing := limits.Standing{Class: d.Lease.Cell.Class, Limit: d.Limit, Shadow: d.Shadow}
	turns := int64(0)
	if position, ok := s.index[d.Lease.Cell]; ok {
		standing.Used = int64(s.slots[position].live)
		if q := s.queues.byCell[d.Lease.Cell]; q != nil {
			turns = int64(q.turns)
		}
	}
	standing.Remaining = max(0, d.Limit-standing.Used-turns)
	if standing.Remaining == 0 {
		standing.RefusesFor = concurrencyRetry
	}
	return standing
}
