package main

import (
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A limitedListener lets so many connections in and no more. The one too many is taken and closed at once:
// left in the queue it would be connected, as far as its other end can tell, and hang, and what hangs with
// it there is Envoy's requests and health checks until each runs into its timeout. Closed, Envoy knows at
// once, and the connections that it has go on. Safe for concurrent use.
type limitedListener struct {
	net.Listener
	name    string
	most    int64
	open    atomic.Int64
	refused prometheus.Counter
	log     *slog.Logger
	said    time.Time // when the log last heard of it; of the one goroutine that accepts
}

// refusalWarning is how often the log says that connections are refused.
const refusalWarning = time.Minute

func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.open.Add(1) <= l.most {
			return &limitedConn{Conn: c, freed: sync.OnceFunc(func() { l.open.Add(-1) })}, nil
		}
		l.open.Add(-1)
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // a reset, which leaves nothing to remember on either side
		}
		_ = c.Close()
		l.refused.Inc()
		if now := time.Now(); now.Sub(l.said) >= refusalWarning {
			l.said = now
			l.log.Error("too many connections: new ones are closed. Raise maxConnections if they are all wanted",
				"listener", l.name, "maxConnections", l.most)
		}
	}
}

type limitedConn struct {
	net.Conn
	freed func()
}

func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.freed()
	return err
}
