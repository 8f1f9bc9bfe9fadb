package main

import (
	"container/list"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/credentials"
)

// A limitedListener lets so many connections in and no more. The one too many is taken and closed at once:
// left in the queue it would be connected, as far as its other end can tell, and hang, and what hangs with
// it there is Envoy's requests and health checks until each runs into its timeout. Closed, Envoy knows at
// once, and the connections that it has go on. Safe for concurrent use.
//
// With TLS a connection takes its place when it has shown whatever certificate is asked for, or somebody
// without one could take them all. Until then it is a stranger, of which there are never more than
// maxStrangers either: of too many the one that has been one for longest goes. Envoys are done with it
// within milliseconds, so it is not theirs.
type limitedListener struct {
	net.Listener
	name             string
	most             int
	tls              bool
	refused, dropped prometheus.Counter
	log              *slog.Logger

	mu                       sync.Mutex
	open                     int       // connections that have a place
	strangers                list.List // of *limitedConn, the oldest first
	saidRefused, saidDropped time.Time // when the log last heard of it
}

const (
	// maxStrangers is enough for every thread of some Envoys that start at once: with handshakes of 10 ms
	// somebody would have to open 50,000 connections a second to keep them out.
	maxStrangers = 512
	// refusalWarning is how often the log says that connections are refused.
	refusalWarning = time.Minute
)

func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		conn := &limitedConn{Conn: c, listener: l}
		if l.tls {
			l.mu.Lock()
			conn.stranger = l.strangers.PushBack(conn)
			l.mu.Unlock()
			l.dropStrangers()
			return conn, nil
		}
		if conn.admit() == nil {
			return conn, nil
		}
	}
}

// dropStrangers closes the oldest strangers while there are too many.
func (l *limitedListener) dropStrangers() {
	l.mu.Lock()
	var oldest *limitedConn
	if l.strangers.Len() > maxStrangers {
		oldest = l.strangers.Front().Value.(*limitedConn)
	}
	say := oldest != nil && time.Since(l.saidDropped) >= refusalWarning
	if say {
		l.saidDropped = time.Now()
	}
	l.mu.Unlock()
	if oldest == nil {
		return
	}
	l.dropped.Inc() // before anybody can see that it is closed
	oldest.reset()
	if say {
		l.log.Error("too many connections that agree on no TLS: the oldest of them are closed", "listener", l.name, "most", maxStrangers)
	}
}

type limitedConn struct {
	net.Conn
	listener *limitedListener
	// Of these at most one is set; the listener's mutex guards them.
	stranger *list.Element
	placed   bool
	closed   bool
}

var errNoPlace = errors.New("maxConnections are open")

// admit gives the connection a place, or closes it. More than once is as once.
func (c *limitedConn) admit() error {
	l := c.listener
	l.mu.Lock()
	if c.placed || c.closed {
		l.mu.Unlock()
		return nil
	}
	if l.open < l.most {
		c.leaveLocked()
		c.placed = true
		l.open++
		l.mu.Unlock()
		return nil
	}
	say := time.Since(l.saidRefused) >= refusalWarning
	if say {
		l.saidRefused = time.Now()
	}
	l.mu.Unlock()
	l.refused.Inc()
	c.reset()
	if say {
		l.log.Error("too many connections: new ones are closed. Raise maxConnections if they are all wanted",
			"listener", l.name, "maxConnections", l.most)
	}
	return errNoPlace
}

// leaveLocked gives back what the connection counts as. The caller holds the listener's mutex.
func (c *limitedConn) leaveLocked() {
	if c.stranger != nil {
		c.listener.strangers.Remove(c.stranger)
		c.stranger = nil
	}
	if c.placed {
		c.placed = false
		c.listener.open--
	}
}

// reset closes the connection such that nothing is left to remember on either side.
func (c *limitedConn) reset() {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	c.leaveLocked()
	c.closed = true
	return err
}

// count is how many connections have a place.
func (l *limitedListener) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open
}

func (c *limitedConn) limited() *limitedConn { return c }

// limitedOf returns what the listener made of a connection that others have wrapped since; nil if it is none.
func limitedOf(c net.Conn) *limitedConn {
	if secured, ok := c.(*tls.Conn); ok {
		c = secured.NetConn()
	}
	if wrapped, ok := c.(interface{ limited() *limitedConn }); ok {
		return wrapped.limited()
	}
	return nil
}

// admitting gives a connection its place when TLS is agreed on.
type admitting struct {
	credentials.TransportCredentials
}

func (a admitting) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := a.TransportCredentials.ServerHandshake(c)
	if err != nil {
		return nil, nil, err
	}
	return secured, info, limitedOf(c).admit()
}

// admitHTTP is an http.Server's ConnState hook, which gives a connection its place with its first request.
func admitHTTP(c net.Conn, state http.ConnState) {
	if limited := limitedOf(c); limited != nil && state == http.StateActive {
		_ = limited.admit() // closes it
	}
}
