package e2e_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestLeasesUnderLoad is not parallel: its counts are exact, but what it waits for would come late beside
// all the other tests.
func TestLeasesUnderLoad(t *testing.T) {
	for _, feedback := range []string{"als", "otlp"} {
		t.Run(feedback, func(t *testing.T) {
			s := serveLeases(t, "feedback: %s, wait: 2s", feedback)
			x := s.stage(t, frontConfig{})
			t.Run("Handover", func(t *testing.T) { testHandover(t, x) })
			t.Run("NeverAboveTheLimit", func(t *testing.T) { testNeverAboveTheLimit(t, x) })
			t.Run("NoneLeft", func(t *testing.T) { testNoneLeft(t, x) })
			s.wantNoneLost(t)
		})
	}
}

// testHandover: a client that sends its next request the moment it has the last answer is never told
// that its own last request still runs.
func testHandover(t *testing.T, x *stage) {
	const requests = 500
	k := x.leaseKey(t, 1)
	c := x.caller(t)
	for i := range requests {
		c.get("/", withKey(k.secret)).want(t, http.StatusOK, "request ", i, " of ", requests)
	}
	_, body, err := fetch("http://" + x.s.metrics + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	var waited strings.Builder
	for line := range strings.Lines(string(body)) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "keyward_limits_lease_wait_seconds_"); ok {
			waited.WriteString(" " + strings.TrimPrefix(rest, "bucket"))
		}
	}
	t.Logf("of %d requests waited, by seconds:%s", requests, &waited)
}

// testNeverAboveTheLimit counts at the upstream.
func testNeverAboveTheLimit(t *testing.T, x *stage) {
	const limit = 7
	clients, each := 200, 10
	if raceEnabled || testing.Short() {
		each = 4
	}
	k := x.leaseKey(t, limit)
	var passed, refused, aborted atomic.Int64
	var sending sync.WaitGroup
	for client := range clients {
		sending.Go(func() {
			for i := range each {
				name := fmt.Sprintf("%d-%d", client, i)
				b, err := x.dial(fmt.Sprintf("/?hold=%dms", 5+rand.IntN(20)), withKey(k.secret), caseHeader+": "+name)
				if err != nil {
					t.Error(err)
					return
				}
				if rand.IntN(5) == 0 {
					select {
					case <-time.After(time.Duration(rand.IntN(30_000)) * time.Microsecond):
					case <-b.done:
					}
					x.work.gone(name)
					b.abort()
					aborted.Add(1)
					continue
				}
				a, err := b.wait()
				b.abort()
				switch {
				case err != nil:
					t.Error(err)
					return
				case a.status == http.StatusOK:
					passed.Add(1)
				case a.status == http.StatusTooManyRequests:
					refused.Add(1)
				case a.status != http.StatusServiceUnavailable:
					t.Errorf("got %d %q", a.status, a.body)
					return
				}
				time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
			}
		})
	}
	sending.Wait()
	got := x.work.of(k)
	if got.peak > limit {
		t.Errorf("%d requests ran at once, want %d at most", got.peak, limit)
	}
	if got.peak < limit {
		t.Errorf("%d requests ran at once at most: the limit of %d was never reached", got.peak, limit)
	}
	t.Logf("%d passed, %d refused, %d aborted; at the upstream %d in all, %d at once", passed.Load(), refused.Load(), aborted.Load(), got.hits, got.peak)
	x.wantBack(t, k, soon)
}

// testNoneLeft sends many requests, of which none may leave anything behind.
func testNoneLeft(t *testing.T, x *stage) {
	requests := 100_000
	switch {
	case testing.Short():
		requests = 2_000
	case raceEnabled:
		requests = 5_000
	}
	const workers = 32
	k := x.leaseKey(t, workers)
	client := x.http2Client(t)
	var next, failed atomic.Int64
	var sending sync.WaitGroup
	began := time.Now()
	for range workers {
		sending.Go(func() {
			for next.Add(1) <= int64(requests) {
				code, err := x.http2Get(context.Background(), client, k, "/")
				// 503: keyward's health was checked too late.
				for end := time.Now().Add(patience); err == nil && code == http.StatusServiceUnavailable && time.Now().Before(end); {
					time.Sleep(50 * time.Millisecond)
					code, err = x.http2Get(context.Background(), client, k, "/")
				}
				if err != nil {
					t.Error(err)
					return
				}
				if code != http.StatusOK {
					failed.Add(1)
				}
			}
		})
	}
	sending.Wait()
	took := time.Since(began)
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d requests failed", n, requests)
	}
	x.wantNone(t, k, soon)
	waitFor(t, "all leases to end", func() bool { return x.s.metric(t, "keyward_limits_leases") == 0 })
	t.Logf("no lease after %d requests, %.0f a second", requests, float64(requests)/took.Seconds())
}

// TestWaitIsAQueue: with a wait of seconds, requests above the limit are not refused but done one after the
// other, also where that takes longer than a Check may take otherwise.
func TestWaitIsAQueue(t *testing.T) {
	t.Parallel()
	s := serveLeases(t, "feedback: als, wait: 30s")
	x := s.stage(t, frontConfig{})
	k := x.leaseKey(t, 1)
	const hold = 3 * time.Second
	first := x.hold(t, k, "/?hold="+hold.String())
	var queue []*begun
	for range 3 {
		queue = append(queue, x.begin(t, "/?hold=100ms", withKey(k.secret)))
	}
	for _, b := range append(queue, first) {
		if a, err := b.wait(); err != nil || a.status != http.StatusOK {
			t.Errorf("got %d %q, %v, want 200", a.status, a.body, err)
		}
	}
	if peak := x.work.of(k).peak; peak != 1 {
		t.Errorf("%d requests ran at once, want 1", peak)
	}
	x.wantBack(t, k, soon)
}

// BenchmarkConcurrencyThroughput is what keyward's limit costs a service that is always full: the same
// requests, held to the limit by keyward and by the clients themselves. ratio is the first throughput by
// the second; the shorter the requests, the more an end that is heard late matters.
func BenchmarkConcurrencyThroughput(b *testing.B) {
	const limit, clients = 7, 32
	s := serveLeases(b, "feedback: als, wait: 10s")
	x := s.stage(b, frontConfig{})
	held, free := x.leaseKey(b, limit), x.leaseKey(b, clients)
	client := x.http2Client(b)
	slots := make(chan struct{}, limit)
	// run returns how long requests take in which the upstream takes its time.
	run := func(b *testing.B, requests int64, hold time.Duration, k key, self bool) time.Duration {
		var next atomic.Int64
		var sending sync.WaitGroup
		began := time.Now()
		for range clients {
			sending.Go(func() {
				for next.Add(1) <= requests {
					if self {
						slots <- struct{}{}
					}
					code, err := x.http2Get(b.Context(), client, k, "/?hold="+hold.String())
					if self {
						<-slots
					}
					if err != nil || code != http.StatusOK {
						b.Errorf("got %d, %v, want 200", code, err)
						return
					}
				}
			})
		}
		sending.Wait()
		return time.Since(began)
	}
	run(b, 200, 0, free, true) // connections, caches
	for _, hold := range []time.Duration{time.Millisecond, 10 * time.Millisecond, 100 * time.Millisecond} {
		b.Run("request="+hold.String(), func(b *testing.B) {
			requests := int64(limit * time.Second / 2 / max(hold, 2*time.Millisecond)) // half a second, or more
			var byKeyward, byClients time.Duration
			for b.Loop() {
				byKeyward += run(b, requests, hold, held, false)
				byClients += run(b, requests, hold, free, true)
			}
			n := float64(b.N) * float64(requests)
			b.ReportMetric(n/byKeyward.Seconds(), "keyward-req/s")
			b.ReportMetric(n/byClients.Seconds(), "clients-req/s")
			b.ReportMetric(byClients.Seconds()/byKeyward.Seconds(), "ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
	if peak := x.work.of(held).peak; peak > limit {
		b.Errorf("%d requests ran at once, want %d at most", peak, limit)
	}
}
