package admin

import (
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"keyward/limits"
)

// manySources is how many addresses are told apart. One that falls out begins anew.
const manySources = 16_384

// Sources limit how often each address does something. Of IPv6, one subscriber has a whole /64, which
// counts as one address. Safe for concurrent use.
type Sources struct {
	rate  limits.Rate
	begin time.Time

	mu   sync.Mutex
	full *simplelru.LRU[netip.Addr, int64] // limits.Rate's state of each address
}

// NewSources returns limits of rate for each address.
func NewSources(rate limits.Rate) *Sources {
	full, err := simplelru.NewLRU[netip.Addr, int64](manySources, nil)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &Sources{rate: rate, begin: time.Now(), full: full}
}

// Take spends one time of an address. Above 0 is how long it has to wait for another: nothing was spent.
func (s *Sources) Take(from netip.Addr) (wait time.Duration) {
	from = sourceOf(from)
	s.mu.Lock()
	defer s.mu.Unlock()
	full, _ := s.full.Get(from)
	full, wait = s.rate.Take(full, int64(time.Since(s.begin)))
	s.full.Add(from, full)
	return wait
}

// GiveBack gives an address back what one Take spent.
func (s *Sources) GiveBack(from netip.Addr) {
	from = sourceOf(from)
	s.mu.Lock()
	defer s.mu.Unlock()
	if full, ok := s.full.Get(from); ok {
		s.full.Add(from, full-int64(s.rate.Interval))
	}
}

func sourceOf(from netip.Addr) netip.Addr {
	from = from.Unmap()
	if from.Is6() {
		if network, err := from.WithZone("").Prefix(64); err == nil {
			from = network.Addr()
		}
	}
	return from
}
