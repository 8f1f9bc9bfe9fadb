package limits

import (
	"context"
	"time"
)

// An Identity names a request as Envoy sees it on the client's connection: nothing else has the same
// peer and start. Its parts are in every access-log entry, also in those that know of no lease.
type Identity struct {
	Peer  [16]byte // address of the connection's other end, IPv4 mapped
	Port  uint16   // 0: there is no such address, as on a Unix socket; then the identity names nothing
	Start int64    // when the request began, in microseconds of Unix time
}

// IsZero reports whether the identity names nothing.
func (i Identity) IsZero() bool { return i.Port == 0 }

// A Lease is one running request's claim on its key's max-concurrent. Two leases are the same if all of
// it is the same; HTTP tells apart the two requests that an internal redirect makes of one identity.
// It holds no pointer.
type Lease struct {
	Cell     Cell // class ClassConcurrency
	Identity Identity
	HTTP     uint64 // Envoy's id of the request
}

// A LeaseDemand asks for a lease, together with the rates of the same [Demand]: all or nothing. A refusal
// by its limit has a RetryAfter of a second, a hint. A lease that lives already is granted again as
// [Decision].Repeated, whatever the limits.
//
// Take has apikey.ErrUndecided where nobody is left to use the answer: for a request whose end came up
// to a second before (see [Ending].AllOfIdentity), and if ctx is done while it waits.
type LeaseDemand struct {
	Lease Lease
	// Limit is how many leases of the cell may live at once; 0: the demand has no lease. That of the
	// newest demand is in force for all who wait.
	Limit int64
	// Wait is the longest time to wait for one to end where only this limit refuses: first come first
	// served, until 20 ms before the deadline of ctx, and not at all where 64 wait for the cell or 4,096
	// for all. Who waits holds nothing, and is judged anew when it is its turn.
	Wait time.Duration
	// Connection is the one by which the request was asked about; 0: unknown. Leases outlive it only if
	// they are renewed: see Limiter.Disconnected.
	Connection uint64
	// Note is kept with the lease for whoever lists it.
	Note uint64
	// Shadow: leases are granted above the limit as well, so that nobody waits, also not who waits already.
	Shadow bool
}

// An Ending says that a request ended.
type Ending struct {
	// Lease is what ended. With AllOfIdentity only its Identity counts: every lease of it ended, in
	// whatever cells, and for a second none is granted to it. An identity that names nothing ends nothing.
	Lease         Lease
	AllOfIdentity bool
	Cause         Cause
}

// A Cause is how a lease ended. It is counted, and changes nothing.
type Cause uint8

// The causes.
const (
	CauseLog      Cause = iota + 1 // Envoy's access log named the lease
	CauseIdentity                  // it named the request: Envoy never took the grant
	CauseContext                   // the one who asked was gone when the grant was made
	CauseNode                      // the connection that it came by ended, and nobody renewed it
	CauseExpiry                    // nobody renewed it for too long
	CauseForced                    // an operator ended it
)

// String returns the word for the cause in logs and metrics.
func (c Cause) String() string {
	switch c {
	case CauseLog:
		return "log"
	case CauseIdentity:
		return "identity"
	case CauseContext:
		return "context"
	case CauseNode:
		return "node"
	case CauseExpiry:
		return "expiry"
	case CauseForced:
		return "force"
	}
	return "unknown"
}

// A Running is a live lease, for whoever looks.
type Running struct {
	Lease      Lease
	Note       uint64
	Connection uint64    // by which it was asked for last; 0: unknown, or it ended since
	Adopted    bool      // granted by another process, or before this one let it expire; its note is lost
	Granted    time.Time // of an adopted one: when its request began
	Until      time.Time // it lives until then unless it is renewed
}

// A Leaser is a [Limiter] that counts running requests. Safe for concurrent use.
//
// No lease is granted while the cell's live leases are at its limit or above; adoption and lowering a
// limit may leave more. Ending a lease twice, late or never does no harm.
type Leaser interface {
	Limiter
	// Renew says that requests still run. An unknown lease is adopted, whatever the limit, if this
	// process let it expire, or if this process is young and the request is older than it; otherwise it
	// is counted and dropped. In any order and batch.
	Renew(ctx context.Context, leases []Lease) error
	// End says that requests ended. What is unknown is counted and dropped, or remembered for a while
	// where a renewal or a grant may still be on its way. In any order and batch.
	End(ctx context.Context, endings []Ending) error
	// Disconnected says that a connection ended, by which leases were asked for. They may still run:
	// they end soon unless they are renewed.
	Disconnected(connection uint64)
	// Running lists the live leases of the cells for which of returns true, in no order.
	Running(of func(Cell) bool) []Running
}
