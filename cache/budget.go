package cache

import (
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"keyward/authz/apikey"
	"keyward/limits"
)

// budgetSources is how many sources are told apart. One that falls out begins anew; the total holds.
const budgetSources = 16_384

// A budget bounds how many digests that are not known to exist may be looked for. Both rates are judged
// before either is spent. Safe for concurrent use.
type budget struct {
	perSource, total limits.Rate

	mu      sync.Mutex
	full    int64                             // of the total: limits.Rate's only state
	sources *simplelru.LRU[netip.Addr, int64] // the same of each source
}

func newBudget(perSource, total limits.Rate) (*budget, error) {
	sources, err := simplelru.NewLRU[netip.Addr, int64](budgetSources, nil)
	return &budget{perSource: perSource, total: total, sources: sources}, err
}

// take spends one look-up at now, in nanoseconds of a monotonic clock. Errors: *apikey.BusyError.
func (b *budget) take(source netip.Addr, now int64, m *metrics) error {
	source = sourceOf(source)
	b.mu.Lock()
	defer b.mu.Unlock()
	full, _ := b.sources.Get(source)
	full, wait := b.perSource.Take(full, now)
	if wait > 0 {
		m.refusedSource.Inc()
		return errBusy
	}
	total, wait := b.total.Take(b.full, now)
	if wait > 0 {
		m.refusedTotal.Inc()
		return errBusy
	}
	b.full = total
	b.sources.Add(source, full)
	return nil
}

var errBusy error = &apikey.BusyError{What: "too many unknown keys", RetryAfter: time.Second}

// sourceOf is what counts as one source: an IPv4 address, or the /64 that one IPv6 subscriber has.
func sourceOf(a netip.Addr) netip.Addr {
	a = a.Unmap()
	if a.Is6() {
		net, _ := a.WithZone("").Prefix(64) // an error only for bits out of range
		return net.Addr()
	}
	return a
}
