package traffic

import (
	"context"
	"crypto/tls"
	"fmt"
	"math/rand"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"google.golang.org/grpc/codes"
)

// redialAfter is how long a lost connection is waited with.
const redialAfter = 100 * time.Millisecond

// A worker keeps one connection busy. Its goroutine reads answers and, in a closed loop, asks again; at a
// fixed rate the pacer asks, from its own goroutine.
type worker struct {
	run    *run
	number int

	mu      sync.Mutex
	link    *link // nil while there is no connection
	over    bool  // nothing is asked any more
	pending []int64
	next    int // of pending

	choice    choice
	templates map[int]*template // by the length of a secret
	longest   int64             // request
	count     uint64

	latency []*hdrhistogram.Histogram // by class
	answers map[int]int64             // by status
	errors  map[string]int64
}

func newWorker(r *run, number int) *worker {
	w := &worker{run: r, number: number, templates: map[int]*template{}, answers: map[int]int64{}, errors: map[string]int64{}}
	for n, t := range r.templates {
		w.templates[n] = t.clone()
		w.longest = max(w.longest, int64(len(t.message)))
	}
	for range r.Classes {
		w.latency = append(w.latency, newHistogram())
	}
	w.choice = newChoice(r.Classes, r.Zipf, int64(r.Seed)+int64(number)*1_000_003)
	return w
}

// A choice draws classes by their shares, and their secrets evenly or by Zipf's law.
type choice struct {
	random *rand.Rand
	shares []float64 // added up
	zipf   []*rand.Zipf
	counts []int
}

func newChoice(classes []Class, s float64, seed int64) choice {
	c := choice{random: rand.New(rand.NewSource(seed))} //nolint:gosec // which key is used next is no secret
	sum := 0.0
	for _, class := range classes {
		sum += class.Share
		c.shares = append(c.shares, sum)
		c.counts = append(c.counts, class.Secrets.Len())
		if s > 1 {
			c.zipf = append(c.zipf, rand.NewZipf(c.random, s, 1, uint64(class.Secrets.Len()-1)))
		}
	}
	return c
}

func (c *choice) next() (class, secret int) {
	if len(c.shares) > 1 {
		x := c.random.Float64() * c.shares[len(c.shares)-1]
		for x >= c.shares[class] {
			class++
		}
	}
	if c.zipf != nil {
		return class, int(c.zipf[class].Uint64())
	}
	return class, c.random.Intn(c.counts[class])
}

// dial connects. The server has said what it allows when it returns.
func (w *worker) dial(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	network, address := "tcp", w.run.Address
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		network, address = "unix", path
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return fmt.Errorf("connect to the Check server: %w", err)
	}
	authority := "keyward"
	if w.run.TLS != nil {
		config := w.run.TLS.Clone()
		config.NextProtos = []string{"h2"}
		if config.ServerName == "" {
			config.ServerName, _, _ = net.SplitHostPort(address)
		}
		authority = config.ServerName
		secured := tls.Client(conn, config)
		if err := secured.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			return fmt.Errorf("connect to the Check server by TLS: %w", err)
		}
		conn = secured
	}
	l, err := newLink(w, conn, authority)
	if err != nil {
		_ = conn.Close()
		return fmt.Errorf("%s does not speak HTTP/2 as a gRPC server does: %w", w.run.Address, err)
	}
	w.mu.Lock()
	w.link = l
	w.mu.Unlock()
	return nil
}

func (w *worker) hangUp() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.link != nil {
		_ = w.link.conn.Close()
	}
}

// serve asks until finish was called and everything is answered, or ctx is done. A lost connection is an
// error for each request that was on it, and is made anew.
func (w *worker) serve(ctx context.Context) {
	abandon := context.AfterFunc(ctx, w.hangUp)
	defer abandon()
	for ctx.Err() == nil {
		l := w.link
		if l == nil {
			time.Sleep(redialAfter)
			if w.isOver() {
				break
			}
			if err := w.dial(ctx); err != nil {
				w.mu.Lock()
				w.fail("no connection")
				w.mu.Unlock()
			}
			continue
		}
		err := l.serve()
		_ = l.conn.Close()
		w.mu.Lock()
		w.link = nil
		lost := int64(len(l.calls))
		if lost > 0 {
			what := "connection lost"
			if w.over {
				what = "no answer"
			}
			w.errors[what] += lost
			w.run.failed.Add(lost)
		}
		over := w.over
		w.mu.Unlock()
		if err == nil || over {
			break
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if left := len(w.pending) - w.next; left > 0 && ctx.Err() == nil {
		w.errors["due and never sent"] += int64(left)
		w.run.failed.Add(int64(left))
	}
}

func (w *worker) isOver() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.over
}

// finish lets nothing be asked any more, but what was due already.
func (w *worker) finish() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	if w.link != nil {
		w.boundLocked()
	}
}

// boundLocked ends the waiting for the last answers.
func (w *worker) boundLocked() {
	patience := w.run.Timeout + grace
	if w.isIdleLocked() {
		patience = 0 // wakes up whoever reads
	}
	_ = w.link.conn.SetReadDeadline(time.Now().Add(patience)) // it fails only where reading does
}

func (w *worker) isIdleLocked() bool { return len(w.link.calls) == 0 && w.next == len(w.pending) }

// due asks for a request that is due at a moment, now or, while all streams are busy, later.
func (w *worker) due(at int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over {
		return
	}
	w.pending = append(w.pending, at)
	if w.link != nil {
		w.fillLocked(w.run.now())
		_ = w.link.flushLocked() // whoever reads sees it too
	}
}

// fillLocked starts what can be started.
func (w *worker) fillLocked(now int64) {
	l := w.link
	if w.run.Rate == 0 {
		for !w.over && now < w.run.to && l.mayStart() {
			w.startLocked(now, now)
		}
		return
	}
	for w.next < len(w.pending) && l.mayStart() {
		w.startLocked(w.pending[w.next], now)
		w.next++
	}
	if w.next == len(w.pending) {
		w.pending, w.next = w.pending[:0], 0
	}
}

func (w *worker) startLocked(due, now int64) {
	class, index := w.choice.next()
	secret := w.run.Classes[class].Secrets.at(index)
	t := w.templates[len(secret)]
	// Connections take numbers in turn, so that none is used twice.
	w.count++
	number := w.count*uint64(w.run.Connections) + uint64(w.number)
	moment := t.patch(secret, number, w.run.begin.Add(time.Duration(now)))
	w.link.ask(t.message, call{class: class, due: due, sent: now, request: moment, number: number})
}

// answeredLocked takes the end of a call. status is grpc-status, "" if there was none.
func (w *worker) answeredLocked(c *call, status string, now int64) {
	w.run.answered.Add(1)
	class := &w.run.Classes[c.class]
	took := now - c.due
	switch {
	case status == "":
		w.fail("no grpc-status")
	case status != "0":
		w.fail("RPC error " + statusName(status))
	case c.fault != "":
		w.fail(c.fault)
	default:
		w.answers[c.answer.status]++
		if len(class.Want) > 0 && !slices.Contains(class.Want, c.answer.status) {
			w.fail(fmt.Sprintf("%s: %d", class.Name, c.answer.status))
		} else if now-c.sent > int64(w.run.Timeout) {
			w.fail("answered after the timeout")
		}
	}
	if c.due >= w.run.from && c.due < w.run.to {
		_ = w.latency[c.class].RecordValue(min(max(took, lowest), highest)) // it is in the range
		if w.run.Observe != nil {
			w.run.Observe(c.class, time.Duration(took))
		}
	}
}

func (w *worker) fail(what string) {
	w.errors[what]++
	w.run.failed.Add(1)
}

// statusName makes UNAVAILABLE of "14".
func statusName(s string) string {
	var c codes.Code
	if c.UnmarshalJSON([]byte(s)) != nil {
		return "with a grpc-status that is no number"
	}
	return c.String()
}
