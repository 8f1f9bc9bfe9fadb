// Package limits holds the rules by which keyward limits requests, as pure functions, and the contract
// between them and the state they need.
//
// State is kept by a [Limiter]: in this process (limits/local) or shared by replicas. All of them give
// the same answers to the same questions; limitstest holds them to it. What a request must pass is one
// [Demand], and it is all or nothing: every limit is judged before any is spent, so a refusal spends
// nothing. Nothing here knows what a key or a request is beyond a [Cell].
package limits

import (
	"context"
	"time"
)

// A Class is the sort of a limit. Where several limits refuse, the one that refuses longest is reported: that
// of a quota that begins a lockout is the longer of its lockout and of what it would wait without one. Of
// those that refuse equally long it is the one whose class comes first, and then the first in the demand.
type Class uint8

// The classes, in the order in which ties are reported.
const (
	ClassInstance       Class = iota + 1 // all keys of an instance together
	ClassGlobalQuota                     // a quota over everybody
	ClassPrincipalQuota                  // a quota of one principal
	ClassKeyQuota                        // a quota of one key
	ClassBurst                           // one key's rate and burst
	ClassConcurrency                     // one key's running requests
)

// A Cell names the state of one limit: whose it is, and which. It holds no pointer, so that a table of
// millions costs the garbage collector nothing. Only authenticated callers have cells.
type Cell struct {
	Owner [16]byte // a key's id, or a hash of what owns the limit
	Class Class
}

// A RateDemand is one rate that a request must pass.
type RateDemand struct {
	Cell Cell
	Rate Rate
	// Shadow: judged, and spent where there is room, but it refuses nothing.
	Shadow bool
}

// A Demand is everything that one request must pass. The caller owns it and may use it again after
// the answer. It names a cell once at most: what passes a limit twice is a mistake of whoever made the
// demand, and is not decided.
type Demand struct {
	Rates  []RateDemand
	Quotas []QuotaDemand
	Lease  LeaseDemand
}

// A Decision says whether the whole demand was met.
type Decision struct {
	Allowed bool
	// Waited is how long the decision waited for a lease to end, whatever came of it.
	Waited time.Duration
	// Repeated: the same lease lives already, so nothing was spent again.
	Repeated bool
	// Shadowed has the bit of every class of which a limit has no room and is in shadow: 1 << Class.
	Shadowed uint16
	// What follows is set on a refusal only.
	Class      Class         // of the limit that is reported
	Quota      int           // position in Demand.Quotas of the one that refuses, if that is a quota
	RetryAfter time.Duration // above 0: when the same demand would pass, if nobody else came; see [Never]
}

// A Limiter holds the state of limits and decides demands. The clock is its own. Safe for concurrent use.
type Limiter interface {
	// Take decides a demand; it may block until ctx is done.
	// Errors: apikey.ErrUndecided if it cannot decide, and for a demand that names a cell twice. An
	// error has spent nothing.
	Take(ctx context.Context, d *Demand) (Decision, error)
	// TryTake is the part of Take that never blocks. ok is false if only Take can decide; nothing has
	// been spent then.
	TryTake(d *Demand) (decision Decision, ok bool)
	// Look appends where every limit of a demand stands: rates, quotas and the lease, in the order of the
	// demand and all at one instant. A limit that is none is left out. Nothing is spent.
	// Errors: those of Take.
	Look(ctx context.Context, d *Demand, standings []Standing) ([]Standing, error)
}
