package accesslog

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxNodes bounds how many connections are remembered. Envoy has one for each of its workers.
	maxNodes = 4096
	// maxName bounds what is kept of a name, in bytes.
	maxName = 256
	// Unknown is the name of a node that does not say its own.
	Unknown = "unknown"
)

// A Node is an Envoy as it was heard on one connection.
type Node struct {
	ID, Cluster string    // as it calls itself; "unknown" if it does not
	Connection  uint64    // 0: of all connections without a number
	Connected   time.Time // when it was first heard
	LastHeard   time.Time
	LastEnd     time.Time // zero: never heard to end a request
	Entries     int64     // heard
	Ends        int64     // of them ends of requests that are or may be ours
}

// Nodes lists who was heard, by connection.
func (s *Server) Nodes() []Node { return s.nodes.list() }

// Heard reports whether a connection ever said of a request of ours that it ended or still runs.
func (s *Server) Heard(connection uint64) bool {
	one := s.nodes.find(connection)
	return one != nil && one.speaks.Load()
}

// Disconnected forgets a connection that ended.
func (s *Server) Disconnected(connection uint64) { s.nodes.forget(connection) }

// nodes are the connections that logs came by. Safe for concurrent use.
type nodes struct {
	mu    sync.Mutex
	known map[uint64]*sender
}

// A sender is one connection's record. Safe for concurrent use.
type sender struct {
	connection uint64
	connected  time.Time
	last       atomic.Int64 // when something was last heard, in Unix nanoseconds
	ended      atomic.Int64 // when an end was; 0: never
	entries    atomic.Int64
	ends       atomic.Int64
	speaks     atomic.Bool // an end or a renewal was heard

	mu          sync.Mutex
	id, cluster string
}

// of returns the record of a call's connection, a new one if need be.
func (n *nodes) of(ctx context.Context) *sender {
	connection := connectionOf(ctx)
	n.mu.Lock()
	defer n.mu.Unlock()
	one := n.known[connection]
	if one == nil {
		if len(n.known) >= maxNodes {
			n.makeRoomLocked()
		}
		one = &sender{connection: connection, connected: time.Now(), id: Unknown, cluster: Unknown}
		one.last.Store(one.connected.UnixNano())
		n.known[connection] = one
	}
	return one
}

// makeRoomLocked forgets who was not heard for longest.
func (n *nodes) makeRoomLocked() {
	var oldest *sender
	for _, one := range n.known {
		if oldest == nil || one.last.Load() < oldest.last.Load() {
			oldest = one
		}
	}
	delete(n.known, oldest.connection)
}

func (n *nodes) find(connection uint64) *sender {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.known[connection]
}

func (n *nodes) forget(connection uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.known, connection)
}

func (n *nodes) count() float64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return float64(len(n.known))
}

func (n *nodes) list() []Node {
	n.mu.Lock()
	defer n.mu.Unlock()
	all := make([]Node, 0, len(n.known))
	for _, one := range n.known {
		all = append(all, one.node())
	}
	slices.SortFunc(all, func(a, b Node) int { return cmp.Compare(a.Connection, b.Connection) })
	return all
}

// name takes over how the other side calls itself, where it does. The names are copied.
func (s *sender) name(id, cluster string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, part := range []struct {
		to *string
		as string
	}{{&s.id, id}, {&s.cluster, cluster}} {
		if part.as != "" && part.as != *part.to {
			*part.to = strings.ToValidUTF8(strings.Clone(part.as[:min(len(part.as), maxName)]), "")
		}
	}
}

// heard notes that a message came.
func (s *sender) heard(now time.Time, entries, ends int64) {
	s.last.Store(now.UnixNano())
	s.entries.Add(entries)
	if ends > 0 {
		s.ended.Store(now.UnixNano())
		s.ends.Add(ends)
	}
}

func (s *sender) lastEnd() time.Time {
	if nanos := s.ended.Load(); nanos != 0 {
		return time.Unix(0, nanos)
	}
	return time.Time{}
}

func (s *sender) node() Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Node{
		ID: s.id, Cluster: s.cluster, Connection: s.connection, Connected: s.connected,
		LastHeard: time.Unix(0, s.last.Load()), LastEnd: s.lastEnd(),
		Entries: s.entries.Load(), Ends: s.ends.Load(),
	}
}
