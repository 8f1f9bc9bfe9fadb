package traffic

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// A call is one request that waits for its answer. Times are in nanoseconds since the run's begin.
type call struct {
	class     int
	due, sent int64
	request   time.Time // what the Check says of it
	number    uint64

	body   []byte // of a message that came in pieces
	read   bool   // the message was read
	answer answer
	fault  string
}

// A link is one HTTP/2 connection. Frames are read by the worker's goroutine alone; everything else is
// under the worker's lock.
type link struct {
	worker *worker
	conn   net.Conn
	framer *http2.Framer
	out    bytes.Buffer // frames that were not sent yet

	encoder   *hpack.Encoder
	block     bytes.Buffer
	blocks    int    // encoded so far: the first one fills the server's table, later ones refer to it
	later     []byte // the block of all later requests, once it stays the same
	authority string

	decoder *hpack.Decoder
	status  string // grpc-status of the block that is being read
	stream  uint32 // of that block
	ends    bool   // it ends its stream

	calls     map[uint32]*call
	free      []*call
	nextID    uint32
	window    int64 // bytes that the server takes, of the whole connection
	perStream int64 // and of each new stream
	peerLimit uint32
	goingAway bool
	received  int64 // bytes that the server was not told yet that we have taken
}

const (
	// What we take before we say so: more than is ever under way.
	streamWindow     = 1 << 20
	connectionWindow = 1 << 30
	readBuffer       = 64 << 10
)

// newLink begins HTTP/2 on a connection, up to the server's settings.
func newLink(w *worker, conn net.Conn, authority string) (*link, error) {
	l := &link{worker: w, conn: conn, authority: authority, calls: map[uint32]*call{}, nextID: 1,
		window: 65_535, perStream: 65_535, peerLimit: 1<<31 - 1}
	l.encoder = hpack.NewEncoder(&l.block)
	l.decoder = hpack.NewDecoder(4096, func(f hpack.HeaderField) {
		if f.Name == "grpc-status" {
			l.status = f.Value
		}
	})
	l.framer = http2.NewFramer(&l.out, bufio.NewReaderSize(flushFirst{l}, readBuffer))
	l.framer.SetReuseFrames()
	l.out.WriteString(http2.ClientPreface)
	l.must(l.framer.WriteSettings(
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: streamWindow},
	))
	l.must(l.framer.WriteWindowUpdate(0, connectionWindow-65_535))
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, err
	}
	frame, err := l.framer.ReadFrame()
	if err != nil {
		return nil, err
	}
	if _, ok := frame.(*http2.SettingsFrame); !ok {
		return nil, fmt.Errorf("its first frame is %v", frame.Header().Type)
	}
	if err := l.handle(frame); err != nil {
		return nil, err
	}
	if l.perStream < w.longest {
		return nil, fmt.Errorf("it takes %d bytes a stream, and a Check has %d", l.perStream, w.longest)
	}
	return l, conn.SetDeadline(time.Time{})
}

// must: frames are written to memory, so only a frame that we should not have written fails.
func (l *link) must(err error) {
	if err != nil {
		panic(err)
	}
}

// flushFirst sends what is to be sent before it waits for more: one write for all the requests that the
// answers of one read made room for.
type flushFirst struct{ l *link }

func (f flushFirst) Read(b []byte) (int, error) {
	w := f.l.worker
	w.mu.Lock()
	err := f.l.flushLocked()
	w.mu.Unlock()
	if err != nil {
		return 0, err
	}
	return f.l.conn.Read(b)
}

func (l *link) flushLocked() error {
	if l.out.Len() == 0 {
		return nil
	}
	_, err := l.conn.Write(l.out.Bytes())
	l.out.Reset()
	return err
}

// errDone ends serve when everything was asked and answered.
var errDone = errors.New("done")

// serve reads answers and asks again, until the run is over (nil) or the connection is.
func (l *link) serve() error {
	w := l.worker
	w.mu.Lock()
	w.fillLocked(w.run.now())
	if w.over {
		w.boundLocked()
	}
	w.mu.Unlock()
	for {
		frame, err := l.framer.ReadFrame()
		w.mu.Lock()
		if err == nil {
			err = l.handle(frame)
		}
		if err == nil && (w.over && w.isIdleLocked() || l.goingAway && len(l.calls) == 0) {
			err = errDone
		}
		over := w.over
		w.mu.Unlock()
		switch {
		case err == nil:
		case over && (errors.Is(err, errDone) || errors.Is(err, os.ErrDeadlineExceeded)):
			return nil
		default:
			return err
		}
	}
}

func (l *link) handle(frame http2.Frame) error {
	switch f := frame.(type) {
	case *http2.DataFrame:
		return l.data(f)
	case *http2.HeadersFrame:
		l.status, l.stream, l.ends = "", f.StreamID, f.StreamEnded()
		return l.header(f.HeaderBlockFragment(), f.HeadersEnded())
	case *http2.ContinuationFrame:
		return l.header(f.HeaderBlockFragment(), f.HeadersEnded())
	case *http2.SettingsFrame:
		return l.settings(f)
	case *http2.WindowUpdateFrame:
		// Those of a stream do not matter: a stream's only message fits, see mayStart.
		if f.StreamID == 0 {
			l.window += int64(f.Increment)
			l.refill()
		}
	case *http2.PingFrame:
		if !f.IsAck() {
			l.must(l.framer.WritePing(true, f.Data))
		}
	case *http2.RSTStreamFrame:
		if c := l.take(f.StreamID); c != nil {
			l.worker.run.answered.Add(1)
			l.worker.fail("stream reset: " + f.ErrCode.String())
			l.refill()
		}
	case *http2.GoAwayFrame:
		l.goingAway = true
		for id := range l.calls {
			if id > f.LastStreamID {
				l.take(id)
				l.worker.fail("refused by a server that is going away")
			}
		}
	}
	return nil
}

func (l *link) settings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	err := f.ForeachSetting(func(s http2.Setting) error {
		switch s.ID {
		case http2.SettingInitialWindowSize:
			l.perStream = int64(s.Val)
		case http2.SettingMaxConcurrentStreams:
			l.peerLimit = s.Val
		case http2.SettingHeaderTableSize:
			l.encoder.SetMaxDynamicTableSize(min(s.Val, 4096))
			l.blocks, l.later = 0, nil
		}
		return s.Valid()
	})
	l.must(l.framer.WriteSettingsAck())
	return err
}

// headers returns the next request's header block: what Envoy sends. Each block is sent, in this order.
func (l *link) headers() []byte {
	if l.later != nil {
		return l.later
	}
	scheme := "http"
	if l.worker.run.TLS != nil {
		scheme = "https"
	}
	timeout := strconv.FormatInt(l.worker.run.Timeout.Milliseconds(), 10)
	l.block.Reset()
	for _, h := range []hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":path", Value: "/envoy.service.auth.v3.Authorization/Check"},
		{Name: ":authority", Value: l.authority},
		{Name: ":scheme", Value: scheme},
		{Name: "te", Value: "trailers"},
		{Name: "grpc-timeout", Value: timeout + "m"},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "x-envoy-internal", Value: "true"},
		{Name: "x-forwarded-for", Value: "10.20.30.40"},
		{Name: "x-envoy-expected-rq-timeout-ms", Value: timeout},
	} {
		l.must(l.encoder.WriteField(h))
	}
	if l.blocks++; l.blocks > 1 {
		l.later = bytes.Clone(l.block.Bytes())
	}
	return l.block.Bytes()
}

// mayStart reports whether there is room for another request.
func (l *link) mayStart() bool {
	return !l.goingAway && len(l.calls) < l.worker.run.Streams && len(l.calls) < int(l.peerLimit) &&
		l.window >= l.worker.longest && l.nextID < 1<<31-1
}

// ask writes a request.
func (l *link) ask(message []byte, c call) {
	id := l.nextID
	l.nextID += 2
	l.must(l.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: l.headers(), EndHeaders: true}))
	l.must(l.framer.WriteData(id, true, message))
	l.window -= int64(len(message))
	var own *call
	if n := len(l.free); n > 0 {
		own, l.free = l.free[n-1], l.free[:n-1]
	} else {
		own = new(call)
	}
	c.body = own.body[:0]
	*own = c
	l.calls[id] = own
}

func (l *link) take(id uint32) *call {
	c := l.calls[id]
	if c != nil {
		delete(l.calls, id)
		l.free = append(l.free, c)
	}
	return c
}

func (l *link) refill() { l.worker.fillLocked(l.worker.run.now()) }

func (l *link) header(fragment []byte, last bool) error {
	if _, err := l.decoder.Write(fragment); err != nil {
		return err
	}
	if !last {
		return nil
	}
	if err := l.decoder.Close(); err != nil {
		return err
	}
	if l.ends {
		l.end(l.stream, l.status)
	}
	return nil
}

// end takes the end of a stream.
func (l *link) end(id uint32, status string) {
	c := l.take(id)
	if c == nil {
		return
	}
	if status == "0" && !c.read {
		c.fault = "an answer without a message"
	}
	now := l.worker.run.now()
	l.worker.answeredLocked(c, status, now)
	l.worker.fillLocked(now)
}

func (l *link) data(f *http2.DataFrame) error {
	// Padding counts as well.
	if l.received += int64(f.Length); l.received > connectionWindow/2 {
		l.must(l.framer.WriteWindowUpdate(0, uint32(l.received)))
		l.received = 0
	}
	if c := l.calls[f.StreamID]; c != nil {
		l.message(c, f.Data())
	}
	if f.StreamEnded() {
		l.end(f.StreamID, "")
	}
	return nil
}

// message takes a piece of an answer, nearly always all of it.
func (l *link) message(c *call, b []byte) {
	if len(c.body) > 0 {
		c.body = append(c.body, b...)
		b = c.body
	}
	if len(b) < grpcPrefix || len(b) < grpcPrefix+int(binary.BigEndian.Uint32(b[1:])) {
		if len(c.body) == 0 {
			c.body = append(c.body, b...)
		}
		if len(c.body) > streamWindow/2 {
			c.read, c.fault = true, "an answer of more than 512 KiB"
		}
		return
	}
	c.read = true
	if b[0] != 0 {
		c.fault = "a compressed answer"
		return
	}
	c.answer, c.fault = classify(b[grpcPrefix : grpcPrefix+int(binary.BigEndian.Uint32(b[1:]))])
	if c.answer.lease != nil {
		l.worker.run.leases.add(string(c.answer.lease), c)
		c.answer.lease = nil // it lies in the frame
	}
}
