package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// An httpLoad keeps connections busy with one request after the other, in HTTP/1.1. It is written by hand
// because the cores are shared with what is measured: a request is one write of bytes that were made
// before, an answer is read no further than its length.
type httpLoad struct {
	address          string
	connections      int
	secrets          [][]byte // each connection has one after the other
	warmup, duration time.Duration
	cpu              []func() (time.Duration, error) // whose processor time is read
}

// An httpResult is what was measured.
type httpResult struct {
	requests int64
	cpu      []time.Duration // for each request, in the order of httpLoad.cpu
	p50, p99 float64         // µs
}

func (l httpLoad) run(ctx context.Context) (*httpResult, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	begin := time.Now()
	from, to := begin.Add(l.warmup), begin.Add(l.warmup+l.duration)
	var answered atomic.Int64
	histograms := make([]*hdrhistogram.Histogram, l.connections)
	var group sync.WaitGroup
	for i := range histograms {
		histograms[i] = hdrhistogram.New(100, int64(time.Minute), 3)
		group.Go(func() {
			if err := l.ask(ctx, i, from, to, &answered, histograms[i]); err != nil {
				cancel(err)
			}
		})
	}
	read := func(at time.Time) (n int64, times []time.Duration) {
		select {
		case <-ctx.Done():
			return 0, nil
		case <-time.After(time.Until(at)):
		}
		for _, cpu := range l.cpu {
			used, err := cpu()
			if err != nil {
				cancel(err)
			}
			times = append(times, used)
		}
		return answered.Load(), times
	}
	n0, cpu0 := read(from)
	n1, cpu1 := read(to)
	group.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if n1 == n0 {
		return nil, errors.New("nothing was answered")
	}
	r := &httpResult{requests: n1 - n0}
	for i := range cpu1 {
		r.cpu = append(r.cpu, (cpu1[i]-cpu0[i])/time.Duration(r.requests))
	}
	all := histograms[0]
	for _, h := range histograms[1:] {
		all.Merge(h)
	}
	r.p50, r.p99 = float64(all.ValueAtQuantile(50))/1e3, float64(all.ValueAtQuantile(99))/1e3
	return r, nil
}

// ask keeps one connection busy until the time is over.
func (l httpLoad) ask(ctx context.Context, number int, from, to time.Time, answered *atomic.Int64, h *hdrhistogram.Histogram) error {
	conn, err := net.Dial("tcp", l.address)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	in := bufio.NewReaderSize(conn, 4<<10)
	secretLen := len(l.secrets[0])
	request := fmt.Appendf(nil, "GET /orders/1048576?expand=items HTTP/1.1\r\nhost: app.example\r\nuser-agent: keyward-benchmarks\r\n"+
		"accept: application/json\r\naccept-language: en\r\ncontent-type: application/json\r\nx-api-key: %s\r\n\r\n", bytes.Repeat([]byte{'s'}, secretLen))
	place := len(request) - 4 - secretLen
	for i := number; ; i += l.connections {
		copy(request[place:], l.secrets[i%len(l.secrets)])
		start := time.Now()
		if start.After(to) {
			return nil
		}
		if _, err := conn.Write(request); err != nil {
			return cmpCause(ctx, err)
		}
		status, err := readResponse(in)
		if err != nil {
			return cmpCause(ctx, err)
		}
		if status != http.StatusOK {
			return fmt.Errorf("answer %d from Envoy", status)
		}
		answered.Add(1)
		if !start.Before(from) {
			_ = h.RecordValue(int64(time.Since(start))) // a minute is longer than any visit
		}
	}
}

// cmpCause says why a connection ended, if it was us.
func cmpCause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// readResponse reads an answer with a content-length and returns its status.
func readResponse(in *bufio.Reader) (status int, err error) {
	line, err := in.ReadSlice('\n')
	if err != nil {
		return 0, err
	}
	if len(line) < 12 {
		return 0, errors.New("not an answer in HTTP/1.1")
	}
	if status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return 0, errors.New("not an answer in HTTP/1.1")
	}
	length := 0
	for {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			break
		}
		if name, value, _ := bytes.Cut(line, []byte(":")); bytes.EqualFold(name, []byte("content-length")) {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil {
				return 0, err
			}
		}
	}
	if _, err := in.Discard(length); err != nil {
		return 0, errors.Join(io.ErrUnexpectedEOF, err)
	}
	return status, nil
}
