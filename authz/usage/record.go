package usage

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A shard holds the records of some keys.
type shard struct {
	mu    sync.Mutex
	now   *period
	over  []*period // of minutes that have ended; they wait to be taken
	spare []*period // empty
	free  []*record // empty
}

// A period is what was counted in one minute, or in a part of it.
type period struct {
	minute    int64
	keys      map[apikey.ID]*record
	instances map[string]*record // what belongs to no key
	// late are the last uses of keys whose counts there is no room for: they may not be lost, because keys may
	// end when they are idle.
	late map[used]lateUse
}

type used struct {
	key        apikey.ID
	generation int
}

type lateUse struct {
	at      time.Time
	from    network
	pattern string
}

// at returns the period of an instant. Time that goes back counts to the present minute.
func (s *shard) at(at time.Time) *period {
	minute := at.Unix() / 60
	if s.now != nil && s.now.minute < minute {
		s.over, s.now = append(s.over, s.now), nil
	}
	if s.now == nil {
		if n := len(s.spare); n > 0 {
			s.now, s.spare = s.spare[n-1], s.spare[:n-1]
		} else {
			s.now = &period{keys: map[apikey.ID]*record{}, instances: map[string]*record{}, late: map[used]lateUse{}}
		}
		s.now.minute = minute
	}
	return s.now
}

// take takes what was counted away.
func (s *shard) take() []*period {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := s.over
	if s.now != nil {
		taken = append(taken, s.now)
	}
	s.over, s.now = nil, nil
	return taken
}

// give gives back what was taken, to be used again: no more records than were of use this time.
func (s *shard) give(taken []*period) {
	var records []*record
	for _, p := range taken {
		for _, r := range p.keys {
			r.reset()
			records = append(records, r)
		}
		for _, r := range p.instances {
			r.reset()
			records = append(records, r)
		}
		clear(p.keys)
		clear(p.instances)
		clear(p.late)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free = append(s.free[:min(len(s.free), len(records))], records...)
	s.spare = append(s.spare[:min(len(s.spare), len(taken))], taken...)
}

// record returns the record of a key, or with a zero one of what belongs to none in an instance; nil if there
// is none.
func (p *period) record(key apikey.ID, instance string) *record {
	if key.IsZero() {
		return p.instances[instance]
	}
	return p.keys[key]
}

// add makes the record that is not there.
func (p *period) add(s *shard, key apikey.ID, instance string, series *atomic.Int64) *record {
	series.Add(1)
	r := new(record)
	if n := len(s.free); n > 0 {
		r, s.free = s.free[n-1], s.free[:n-1]
	}
	r.instance = instance
	if key.IsZero() {
		p.instances[instance] = r
	} else {
		p.keys[key] = r
	}
	return r
}

// usedLate notes a use of a key whose counts there is no room for.
func (p *period) usedLate(u *authz.Use, from network) {
	k := used{u.Key.ID, u.Key.Generation}
	if u.At.After(p.late[k].at) {
		p.late[k] = lateUse{u.At, from, u.Pattern}
	}
}

// A record is what was counted in a period, of a key or of what belongs to none.
type record struct {
	instance    string
	allowed     int64
	generations []generation // of allowed requests; seldom more than one
	networks    []tally[network]
	elsewhere   int64 // allowed, from networks that there is no room for
	reasons     []tally[authz.Reason]
	ended       admin.EndedRequests

	last    time.Time // allowed request
	from    network   // of it
	pattern string    // of it
}

type tally[K comparable] struct {
	of K
	n  int64
}

type generation struct {
	tally[int]
	last time.Time
}

// reset empties r, and keeps what it has room for.
func (r *record) reset() {
	*r = record{generations: r.generations[:0], networks: r.networks[:0], reasons: r.reasons[:0]}
}

// allow counts an allowed request.
func (r *record) allow(from network) {
	r.allowed++
	if from == 0 {
		return
	}
	for i := range r.networks {
		if r.networks[i].of == from {
			r.networks[i].n++
			return
		}
	}
	if len(r.networks) == admin.MaxNetworks {
		r.elsewhere++
		return
	}
	r.networks = append(r.networks, tally[network]{from, 1})
}

// use notes an allowed request with a generation of the record's key.
func (r *record) use(number int, at time.Time, from network, pattern string) {
	if at.After(r.last) {
		r.last, r.from, r.pattern = at, from, pattern
	}
	for i := range r.generations {
		if g := &r.generations[i]; g.of == number {
			g.n++
			if at.After(g.last) {
				g.last = at
			}
			return
		}
	}
	r.generations = append(r.generations, generation{tally[int]{number, 1}, at})
}

// refuse counts a refused request.
func (r *record) refuse(reason authz.Reason) {
	for i := range r.reasons {
		if r.reasons[i].of == reason {
			r.reasons[i].n++
			return
		}
	}
	r.reasons = append(r.reasons, tally[authz.Reason]{reason, 1})
}

// end counts a request that ended.
func (r *record) end(status int, requestBytes, responseBytes int64, took time.Duration) {
	class := status / 100
	if class < 0 || class >= len(r.ended.Status) {
		class = 0
	}
	one := admin.EndedRequests{
		Count: 1, RequestBytes: max(requestBytes, 0), ResponseBytes: max(responseBytes, 0), Duration: max(took, 0), Longest: took,
	}
	one.Status[class] = 1
	r.ended.Add(&one)
}

// counts returns what the record holds.
func (r *record) counts() *admin.UsageCounts {
	c := &admin.UsageCounts{Allowed: r.allowed, Ended: r.ended}
	for _, t := range r.reasons {
		c.Refused += t.n
	}
	if len(r.reasons) > 0 {
		c.Reasons = make(map[string]int64, len(r.reasons))
		for _, t := range r.reasons {
			c.Reasons[t.of.String()] = t.n
		}
	}
	if len(r.generations) > 0 {
		c.Generations = make(map[int]int64, len(r.generations))
		for _, g := range r.generations {
			c.Generations[g.of] = g.n
		}
	}
	if len(r.networks) > 0 {
		c.Networks = make(map[string]int64, len(r.networks)+1)
		for _, t := range r.networks {
			c.Networks[t.of.String()] = t.n
		}
		if r.elsewhere > 0 {
			c.Networks[admin.OtherNetworks] = r.elsewhere
		}
	}
	return c
}

// A network is the first 24 bits of an IPv4 address, or 48 of an IPv6 one, below the family's number; 0: unknown.
type network uint64

func networkOf(a netip.Addr) network {
	switch {
	case a.Is4():
		b := a.As4()
		return 4<<48 | network(binary.BigEndian.Uint32(b[:])>>8)
	case a.Is6():
		b := a.As16()
		return 6<<48 | network(binary.BigEndian.Uint64(b[:])>>16)
	}
	return 0
}

// String returns the network as CIDR; "" for an unknown one.
func (n network) String() string {
	switch n >> 48 {
	case 4:
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(n)<<8)
		return netip.PrefixFrom(netip.AddrFrom4(b), 24).String()
	case 6:
		var b [16]byte
		binary.BigEndian.PutUint64(b[:], uint64(n)<<16)
		return netip.PrefixFrom(netip.AddrFrom16(b), 48).String()
	}
	return ""
}
