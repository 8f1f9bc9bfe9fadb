package main

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// A trackedListener numbers its connections and says when they end. What is known of a connection is
// kept in its address, which is what grpc shows of it to handlers.
type trackedListener struct {
	net.Listener
	// silence is how long a node that was granted leases may be silent before it counts as unheard.
	silence time.Duration
	heard   func(connection uint64) bool          // whether an access log came by it
	ended   func(connection uint64, granted bool) // granted: leases were asked for by it
	last    atomic.Uint64
	live    sync.Map // of *connectionAddr, by id
}

func (l *trackedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	remote := &connectionAddr{Addr: c.RemoteAddr(), id: l.last.Add(1), listener: l}
	l.live.Store(remote.id, remote)
	return &trackedConn{Conn: c, remote: remote}, nil
}

type trackedConn struct {
	net.Conn
	remote *connectionAddr
	once   sync.Once
}

func (c *trackedConn) RemoteAddr() net.Addr { return c.remote }

func (c *trackedConn) limited() *limitedConn { return limitedOf(c.Conn) }

func (c *trackedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.remote.listener.live.Delete(c.remote.id)
		c.remote.listener.ended(c.remote.id, c.remote.granted.Load() != 0)
	})
	return err
}

// unheard counts the connections that leases were granted by and no access log ever came.
func (l *trackedListener) unheard() float64 {
	n := 0
	l.live.Range(func(_, c any) bool {
		if c.(*connectionAddr).Unheard() {
			n++
		}
		return true
	})
	return float64(n)
}

// A connectionAddr is the other end of a connection, and what happened by it. Safe for concurrent use.
type connectionAddr struct {
	net.Addr
	id       uint64
	listener *trackedListener
	granted  atomic.Int64 // when the first lease was granted by it, Unix nanoseconds; 0: none
}

// ConnectionID is the connection's number in this process, from 1.
func (a *connectionAddr) ConnectionID() uint64 { return a.id }

// Granted notes that a lease was granted.
func (a *connectionAddr) Granted() {
	if a.granted.Load() == 0 {
		a.granted.CompareAndSwap(0, time.Now().UnixNano())
	}
}

// Unheard reports whether leases were granted long enough ago for an entry to have come, and none did.
// A request that runs on is said to do so every renewEvery, so by then there must have been one.
func (a *connectionAddr) Unheard() bool {
	granted := a.granted.Load()
	return granted != 0 && time.Since(time.Unix(0, granted)) > a.listener.silence && !a.listener.heard(a.id)
}
