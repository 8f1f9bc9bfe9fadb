package authz

import (
	"encoding/hex"
	"sync"
	"sync/atomic"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// A Refusal is what is remembered of a request that was refused. Nothing in it came from the client.
type Refusal struct {
	ID         ID
	At         time.Time
	Reason     Reason
	KeyID      apikey.ID // zero: no key was known
	InstanceID string    // of the key, or whose quotas were judged; "" for none
	Route      string    // pattern of the rule that the request matched; "": none
	Shadowed   Shadowed
	// What follows is set with Limited.
	Quota      *apikey.Quota // that refused; nil: another limit did
	Limit      limits.Class
	RetryAfter time.Duration
}

// keptRefusals is how many refusals are remembered of callers whose key is known, and as many of others:
// whoever sends garbage must not be able to push out what holders of keys will ask about.
const keptRefusals = 4096

// recent remembers the last refusals. Requests that are allowed do not come here.
type recent struct {
	known, unknown refusals
}

// refusals is a ring. Each place has a lock of its own, which nobody waits for but whoever looks.
type refusals struct {
	next  atomic.Uint64
	slots [keptRefusals]refusal
}

type refusal struct {
	mu sync.Mutex
	Refusal
	route *Rule
}

// remember remembers a decision that refuses.
func (a *Authorizer) remember(d *Decision, at time.Time) {
	ring := &a.recent.unknown
	if d.Key != nil || d.Holder != (Holder{}) {
		ring = &a.recent.known
	}
	s := &ring.slots[(ring.next.Add(1)-1)%keptRefusals]
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Refusal = Refusal{
		ID: d.ID, At: at, Reason: d.Reason, Shadowed: d.Shadowed, Quota: d.Quota, Limit: d.Limit, RetryAfter: d.RetryAfter,
	}
	s.InstanceID = d.InstanceID
	if d.Key != nil {
		s.KeyID, s.InstanceID = d.Key.ID, d.Key.InstanceID
	}
	s.route = d.route
}

// Recall returns a recent refusal by its id. ok is false if this process does not remember it: it was not
// here, or too many came since.
func (a *Authorizer) Recall(id ID) (_ Refusal, ok bool) {
	for _, ring := range []*refusals{&a.recent.known, &a.recent.unknown} {
		for i := range ring.slots {
			s := &ring.slots[i]
			s.mu.Lock()
			found, route := s.Refusal, s.route
			s.mu.Unlock()
			if found.ID == id && id != (ID{}) {
				if route != nil {
					found.Route = route.String()
				}
				return found, true
			}
		}
	}
	return Refusal{}, false
}

// stepOf is the step that answers with a reason.
func stepOf(r Reason) Step {
	switch r {
	case ReasonInvalidPath:
		return StepPath
	case ReasonNoRoute, ReasonPublic:
		return StepRoute
	case ReasonPreflight, ReasonNoCredential, ReasonAmbiguousCredential, ReasonAnonymous:
		return StepCredential
	case ReasonMalformedCredential, ReasonBadChecksum:
		return StepShape
	case ReasonUnknownKey:
		return StepKnown
	case ReasonRevoked, ReasonDisabled, ReasonInstanceDisabled, ReasonNotYetValid, ReasonExpired, ReasonGenerationEnded, ReasonIdle:
		return StepLife
	case ReasonInvalidRequest, ReasonInvalidBody, ReasonAgentMissing, ReasonWrongInstance, ReasonWrongAgent, ReasonAgentRequired, ReasonWrongEnvironment:
		return StepPlace
	case ReasonMissingScope, ReasonAddress:
		return StepRight
	case ReasonKey, ReasonJWT:
		return StepAllowed
	}
	return StepLimits
}

// Step is the step that has decided. Of [ReasonInvalidRequest] it is the later one of the two that can.
func (r Refusal) Step() Step { return stepOf(r.Reason) }

// ParseID reads what [ID.String] writes.
func ParseID(s string) (id ID, ok bool) {
	n, err := hex.Decode(id[:], []byte(s[:min(len(s), 2*len(id))]))
	return id, err == nil && n == len(id) && len(s) == 2*len(id)
}
