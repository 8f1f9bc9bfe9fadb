package admin

import (
	"encoding/json"
	"net/netip"
	"sync"
	"time"
)

// refusals counts attempts that were refused, and says which of them get an event of their own. What it
// holds is bounded. A crash forgets at most a minute of counts. Safe for concurrent use; the zero value works.
type refusals struct {
	mu      sync.Mutex
	counts  map[refusal]int
	singles map[string]int // events of their own in this minute, by actor
	seen    map[refusal]bool
}

// A refusal is what attempts that are counted together have in common.
type refusal struct {
	actor, remoteAddr, action, code, instanceID, target string
}

const (
	// singlesPerMinute is how many refused attempts of one caller get an event of their own.
	singlesPerMinute = 30
	// maxRefusals bounds the kinds of attempts that are told apart within a minute.
	maxRefusals = 256
	maxSeen     = 4096
)

// first reports whether an attempt gets an event of its own; otherwise it is counted.
func (r *refusals) first(one refusal) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen == nil {
		r.seen, r.singles = map[refusal]bool{}, map[string]int{}
	}
	if r.seen[one] {
		r.countLocked(one)
		return false
	}
	if r.singles[one.actor] >= singlesPerMinute || len(r.seen) >= maxSeen {
		// Told apart by target they would be as many as the caller likes.
		r.countLocked(refusal{actor: one.actor, remoteAddr: one.remoteAddr, action: one.action, code: one.code})
		return false
	}
	r.seen[one] = true
	r.singles[one.actor]++
	return true
}

func (r *refusals) count(one refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.countLocked(one)
}

func (r *refusals) countLocked(one refusal) {
	r.addLocked(one, 1)
}

func (r *refusals) addLocked(one refusal, n int) {
	if r.counts == nil {
		r.counts = map[refusal]int{}
	}
	if _, known := r.counts[one]; !known && len(r.counts) >= maxRefusals {
		one = refusal{action: one.action, code: one.code} // one for all the rest
	}
	r.counts[one] += n
}

// take returns what was counted and begins a new minute.
func (r *refusals) take() map[refusal]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	counted := r.counts
	r.counts, r.seen, r.singles = nil, nil, nil
	return counted
}

// giveBack counts what could not be written once more.
func (r *refusals) giveBack(counted map[refusal]int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for one, n := range counted {
		r.addLocked(one, n)
	}
}

// event is what the audit has of it; attempts is 0 for an event of its own.
func (one refusal) event(at time.Time, attempts int) Event {
	e := Event{
		At: at, Actor: one.actor, RemoteAddr: one.remoteAddr, Action: one.action, Refused: one.code,
		InstanceID: one.instanceID, Target: one.target,
	}
	if attempts > 0 {
		e.After, _ = json.Marshal(map[string]int{"attempts": attempts}) // cannot fail
	}
	return e
}

// network is what counts as one source: an address, and of IPv6 what one subscriber has.
func network(remoteAddr string) string {
	addr, err := netip.ParseAddr(remoteAddr)
	if err != nil {
		return remoteAddr
	}
	addr = addr.Unmap().WithZone("")
	if addr.Is4() {
		return addr.String()
	}
	prefix, err := addr.Prefix(64)
	if err != nil {
		return remoteAddr
	}
	return prefix.String()
}
