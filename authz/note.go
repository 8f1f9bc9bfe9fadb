package authz

import (
	"slices"
	"sync"
)

// notes numbers hosts and paths of rules, so that a lease can say which one its request matched without
// holding a string. A number is never given twice, so leases outlive a reload.
type notes struct {
	mu       sync.Mutex
	patterns []string // by number - 1
}

func (n *notes) number(pattern string) uint32 {
	n.mu.Lock()
	defer n.mu.Unlock()
	if i := slices.Index(n.patterns, pattern); i >= 0 {
		return uint32(i + 1)
	}
	n.patterns = append(n.patterns, pattern)
	return uint32(len(n.patterns))
}

func (n *notes) pattern(number uint32) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if number == 0 || int(number) > len(n.patterns) {
		return ""
	}
	return n.patterns[number-1]
}

// knownMethods are the methods that a note can tell apart.
var knownMethods = [...]string{"", "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"}

func note(rule *Rule, method string) uint64 {
	return uint64(rule.note)<<8 | uint64(max(0, slices.Index(knownMethods[:], method)))
}

// Describe returns the method and the rule's pattern that a lease's note stands for; "" for a method of
// no standard, and for requests that no rule matched.
func (a *Authorizer) Describe(note uint64) (method, pattern string) {
	return knownMethods[int(note&0xff)%len(knownMethods)], a.notes.pattern(uint32(note >> 8))
}
