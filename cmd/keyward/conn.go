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
	ended   func(connection uint64)
	last    atomic.Uint64
}

func (l *trackedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	remote := &connectionAddr{Addr: c.RemoteAddr(), id: l.last.Add(1), silence: l.silence}
	return &trackedConn{Conn: c, remote: remote, ended: l.ended}, nil
}

type trackedConn struct {
	net.Conn
	remote *connectionAddr
	ended  func(connection uint64)
	once   sync.Once
}

func (c *trackedConn) RemoteAddr() net.Addr { return c.remote }

func (c *trackedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { c.ended(c.remote.id) })
	return err
}

// A connectionAddr is the other end of a connection, and what happened by it. Safe for concurrent use.
type connectionAddr struct {
	net.Addr
	id      uint64
	silence time.Duration
	granted atomic.Int64 // when the first lease was granted by it, Unix nanoseconds; 0: none
	heard   atomic.Bool  // an access-log entry came by it
}

// ConnectionID is the connection's number in this process, from 1.
func (a *connectionAddr) ConnectionID() uint64 { return a.id }

// Granted notes that a lease was granted.
func (a *connectionAddr) Granted() {
	if a.granted.Load() == 0 {
		a.granted.CompareAndSwap(0, time.Now().UnixNano())
	}
}

// Heard notes that an access-log entry came.
func (a *connectionAddr) Heard() { a.heard.Store(true) }

// Unheard reports whether leases were granted long enough ago for an entry to have come, and none did.
// A request that runs on is said to do so every renewEvery, so by then there must have been one.
func (a *connectionAddr) Unheard() bool {
	granted := a.granted.Load()
	return granted != 0 && !a.heard.Load() && time.Since(time.Unix(0, granted)) > a.silence
}
