package local

import "keyward/limits"

// Left is how many requests a rate would let through now. It spends nothing.
func (l *Limiter) Left(cell limits.Cell, rate limits.Rate) int64 {
	s := &l.shards[l.shardOf(&cell)]
	s.mu.Lock()
	defer s.mu.Unlock()
	var full int64
	if position, ok := s.index[cell]; ok {
		full = s.slots[position].full
	}
	return rate.Left(full, l.now())
}

// Live is how many leases of the cell live now.
func (l *Limiter) Live(cell limits.Cell) int64 {
	s := &l.shards[l.shardOf(&cell)]
	s.mu.Lock()
	defer s.mu.Unlock()
	l.expire(s, l.now())
	position, ok := s.index[cell]
	if !ok {
		return 0
	}
	return int64(s.slots[position].live)
}
