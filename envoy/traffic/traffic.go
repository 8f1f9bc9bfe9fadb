// Package traffic asks a Check server what Envoy would ask it, as fast as it answers or at a fixed rate, and
// measures the answers. It is what keyward bench and the comparisons in envoy/benchmarks run on.
//
// Why not grpc-go's client: a load generator must cost less than what it measures. grpc-go's client is at
// its own end at 8,000 to 16,000 calls a second on one core (reference/performance.md §0), keyward is not.
// So a connection here is one goroutine on the framer and HPACK of golang.org/x/net, with a request that
// was encoded once and is patched for each call (secret, request id, time), one write and one read for
// many calls, and answers that are classified by their bytes.
//
// Two ways to load. Closed loop: every stream asks again as soon as it was answered; that measures how
// much a server can do, and its latencies are those of a server that is always full. Fixed rate: requests
// are due at even distances, whatever the server does, and latency counts from when a request was due, not
// from when it could be sent. A server that stops for 100 ms has then made a hundred milliseconds' worth
// of requests wait, as it would have in earnest, and the figures say so.
package traffic

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Config says what to ask, how often, and what answers are right.
type Config struct {
	Address string      // of the Check server: host:port, or unix:///path. Needed
	TLS     *tls.Config // nil: without TLS

	Connections int // 0: 1
	Streams     int // requests at once on each connection; 0: 1
	// Rate is requests per second over all connections, evenly spaced. 0: each stream asks again as soon as
	// it was answered. A request that is due while all streams are busy waits for one, and its latency
	// counts from when it was due.
	Rate     float64
	Warmup   time.Duration // not measured
	Duration time.Duration // measured. Needed
	Timeout  time.Duration // of a Check, sent as grpc-timeout; a later answer is an error; 0: 250 ms, as generated configurations have it

	Method, Host, Path string // of the request that Envoy asks about; "": GET, app.example, /

	Classes []Class // what is asked; at least one
	// Zipf is how unevenly the secrets of a class are used: s of a Zipf distribution, above 1; 0: evenly.
	Zipf float64
	Seed uint64 // of the choice of secrets

	// CPU reads the processor time that the server has used. It is called at the beginning and at the end
	// of the measured time. nil: not measured.
	CPU func() (time.Duration, error)
	// Progress is called a few times a second; nil: by nobody.
	Progress func(Progress)
	// Observe is told each measured latency of each class by its index, from several goroutines at once if
	// there are several connections; nil: nobody is.
	Observe func(class int, latency time.Duration)
}

// A Class is requests that should be answered alike.
type Class struct {
	Name    string
	Share   float64 // of all requests; shares need not add up to 1
	Secrets *Secrets
	Want    []int // the answers, as HTTP status, that are right; any other is an error. None: all but errors are
}

// A Progress says how far a run is.
type Progress struct {
	Elapsed, Total time.Duration // with the warm-up
	Answers        int64         // so far
	Errors         int64
}

// A Result is what was measured.
type Result struct {
	Elapsed  time.Duration `json:"-"`
	Requests int64         `json:"requests"`          // answered in the measured time
	PerSec   float64       `json:"requestsPerSecond"` // of these
	Latency  Latency       `json:"latency"`           // of the requests that were due in the measured time
	Answers  map[int]int64 `json:"answers"`           // by HTTP status; right and wrong ones, of the whole run
	// Errors counts, over the whole run, what went wrong, by a short text.
	Errors  map[string]int64   `json:"errors"`
	Classes map[string]Latency `json:"classes"`
	// CPUPerRequest is the server's processor time over the measured time, for each request answered in it;
	// 0 if it was not measured.
	CPUPerRequest time.Duration `json:"-"`
	Leases        int64         `json:"leases"` // granted, and ended by us
}

// Latency is a distribution, in microseconds.
type Latency struct {
	Count int64   `json:"count"`
	Mean  float64 `json:"mean"`
	P50   float64 `json:"p50"`
	P90   float64 `json:"p90"`
	P99   float64 `json:"p99"`
	P999  float64 `json:"p99_9"`
	Max   float64 `json:"max"`
}

// ErrorCount is how many errors there were.
func (r *Result) ErrorCount() (n int64) {
	for _, count := range r.Errors {
		n += count
	}
	return n
}

// Latencies are kept from 1 µs to 2 minutes with three significant digits. HdrHistogram is what the field
// compares by; its steps grow with the value, so a tail is as exact as a median.
const (
	lowest, highest = int64(time.Microsecond / 10), int64(2 * time.Minute)
	digits          = 3
)

func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(lowest, highest, digits) }

func latencyOf(h *hdrhistogram.Histogram) Latency {
	micros := func(ns float64) float64 { return ns / 1e3 }
	at := func(percent float64) float64 { return micros(float64(h.ValueAtQuantile(percent))) }
	return Latency{
		Count: h.TotalCount(), Mean: micros(h.Mean()),
		P50: at(50), P90: at(90), P99: at(99), P999: at(99.9), Max: micros(float64(h.Max())),
	}
}

// grace is how long answers are waited for after the end, beyond the timeout.
const grace = time.Second

func (c Config) withDefaults() (Config, error) {
	c.Connections = cmp.Or(c.Connections, 1)
	c.Streams = cmp.Or(c.Streams, 1)
	c.Timeout = cmp.Or(c.Timeout, 250*time.Millisecond)
	c.Method, c.Host, c.Path = cmp.Or(c.Method, "GET"), cmp.Or(c.Host, "app.example"), cmp.Or(c.Path, "/")
	shares := 0.0
	for _, class := range c.Classes {
		if class.Share < 0 || class.Secrets.Len() == 0 {
			return c, fmt.Errorf("traffic: class %s has no secrets or a negative share", class.Name)
		}
		shares += class.Share
	}
	switch {
	case c.Connections < 1 || c.Streams < 1:
		return c, errors.New("traffic: connections and streams must be at least 1")
	case c.Rate < 0 || c.Warmup < 0 || c.Duration <= 0 || c.Timeout < time.Millisecond:
		return c, errors.New("traffic: rate and warm-up must not be negative, the duration must be positive, the timeout at least 1 ms")
	case c.Zipf != 0 && c.Zipf <= 1:
		return c, errors.New("traffic: zipf must be above 1, or 0 for an even use")
	case shares <= 0:
		return c, errors.New("traffic: nothing to ask")
	}
	return c, nil
}

// A run is one call of Run.
type run struct {
	Config
	templates map[int]*template // by the length of a secret; not changed
	begin     time.Time         // of everything, on the monotonic clock
	from, to  int64             // the measured time, in nanoseconds since begin
	answered  atomic.Int64
	failed    atomic.Int64
	leases    *leaseEnder
}

// now is the time since the beginning, in nanoseconds.
func (r *run) now() int64 { return int64(time.Since(r.begin)) }

// Run asks until the time is over, and waits for the last answers. Leases that it was granted are ended
// as Envoy would, over the access log service on the same address.
// Errors: the configuration is wrong, nobody listens, or ctx is done. What the server answers is in the
// Result, good or bad, and never an error.
func Run(ctx context.Context, c Config) (*Result, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	r := &run{Config: c, templates: map[int]*template{}, leases: newLeaseEnder(c)}
	for _, class := range c.Classes {
		for n := range class.Secrets.lengths() {
			if r.templates[n] == nil {
				if r.templates[n], err = newTemplate(c.Method, c.Host, c.Path, n); err != nil {
					return nil, err
				}
			}
		}
	}
	workers := make([]*worker, c.Connections)
	for i := range workers {
		workers[i] = newWorker(r, i)
		if err := workers[i].dial(ctx); err != nil {
			for _, w := range workers[:i] {
				w.hangUp()
			}
			return nil, err
		}
	}
	r.begin = time.Now()
	r.from, r.to = int64(c.Warmup), int64(c.Warmup+c.Duration)
	running, stop := context.WithCancel(ctx)
	defer stop()
	var group sync.WaitGroup
	for _, w := range workers {
		group.Go(func() { w.serve(running) })
	}
	var pacing, aside sync.WaitGroup
	if c.Rate > 0 {
		pacing.Go(func() { r.pace(running, workers) })
	}
	if c.Progress != nil {
		aside.Go(func() { r.report(running) })
	}
	begin, err := r.sample(running, r.from)
	var end sample
	if err == nil {
		end, err = r.sample(running, r.to)
	}
	if err != nil {
		stop()
	}
	pacing.Wait() // on a busy machine it is late: what was due in time counts all the same
	for _, w := range workers {
		w.finish()
	}
	group.Wait()
	stop()
	aside.Wait()
	ended, leaseErr := r.leases.close()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, err
	}
	result := r.result(workers, begin, end)
	result.Leases = ended
	if leaseErr != nil {
		result.Errors["leases not ended: "+leaseErr.Error()]++
	}
	return result, nil
}

// A sample is what has been done at a moment.
type sample struct {
	at       time.Duration
	answered int64
	cpu      time.Duration
}

// sample waits for a moment and looks at it.
func (r *run) sample(ctx context.Context, at int64) (s sample, err error) {
	select {
	case <-ctx.Done():
		return s, context.Cause(ctx)
	case <-time.After(time.Until(r.begin.Add(time.Duration(at)))):
	}
	if r.CPU != nil {
		if s.cpu, err = r.CPU(); err != nil {
			return s, fmt.Errorf("read the server's processor time: %w", err)
		}
	}
	s.at, s.answered = time.Since(r.begin), r.answered.Load()
	return s, nil
}

func (r *run) report(ctx context.Context) {
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			r.Progress(Progress{
				Elapsed: min(time.Since(r.begin), r.Warmup+r.Duration), Total: r.Warmup + r.Duration,
				Answers: r.answered.Load(), Errors: r.failed.Load(),
			})
		}
	}
}

// pace makes requests due, one after the other, each at its time, to the connections in turn.
func (r *run) pace(ctx context.Context, workers []*worker) {
	sleep := newSleeper()
	step := float64(time.Second) / r.Rate
	for n := int64(0); ctx.Err() == nil; {
		// Computed from the beginning each time: roundings do not add up.
		due := int64(float64(n) * step)
		if due >= r.to {
			return
		}
		if wait := due - r.now(); wait > 0 {
			sleep(time.Duration(wait))
			continue
		}
		workers[n%int64(len(workers))].due(due)
		n++
	}
}

func (r *run) result(workers []*worker, begin, end sample) *Result {
	out := &Result{Elapsed: end.at - begin.at, Requests: end.answered - begin.answered,
		Answers: map[int]int64{}, Errors: map[string]int64{}, Classes: map[string]Latency{}}
	out.PerSec = float64(out.Requests) / out.Elapsed.Seconds()
	if r.CPU != nil && out.Requests > 0 {
		out.CPUPerRequest = (end.cpu - begin.cpu) / time.Duration(out.Requests)
	}
	all := newHistogram()
	for i, class := range r.Classes {
		one := newHistogram()
		for _, w := range workers {
			one.Merge(w.latency[i])
		}
		all.Merge(one)
		out.Classes[class.Name] = latencyOf(one)
	}
	out.Latency = latencyOf(all)
	for _, w := range workers {
		for status, n := range w.answers {
			out.Answers[status] += n
		}
		for what, n := range w.errors {
			out.Errors[what] += n
		}
	}
	return out
}

// ErrorKinds lists what went wrong, the most frequent first.
func (r *Result) ErrorKinds() []string {
	kinds := slices.Collect(maps.Keys(r.Errors))
	slices.SortFunc(kinds, func(a, b string) int {
		return cmp.Or(cmp.Compare(r.Errors[b], r.Errors[a]), cmp.Compare(a, b))
	})
	return kinds
}
