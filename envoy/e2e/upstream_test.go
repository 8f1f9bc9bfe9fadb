package e2e_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

const (
	// upstreamMark is in every answer of an upstream, so that nothing else is taken for one.
	upstreamMark = "X-E2e-Upstream"
	// caseHeader names the test that sent a request, for [upstream.of].
	caseHeader = "X-E2e-Case"
	// delayHeader makes an answer slow.
	delayHeader = "X-E2e-Delay"
)

// An upstream answers every request with what it saw of it, and keeps that.
type upstream struct {
	address string

	mu     sync.Mutex
	byCase map[string][]*seen
}

func (u *upstream) keep(s *seen) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, name := range s.values(caseHeader) {
		u.byCase[name] = append(u.byCase[name], s)
	}
}

// of returns the requests that carried this case.
func (u *upstream) of(name string) []*seen {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.byCase[name]
}

// serveUpstream serves until the test ends. Over HTTP/2 it also serves gRPC's health service.
func serveUpstream(t *testing.T, http2 bool) *upstream {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u := &upstream{address: l.Addr().String(), byCase: map[string][]*seen{}}
	if http2 {
		u.serveHTTP2(t, l)
	} else {
		u.serveHTTP1(t, l)
	}
	return u
}

// serveHTTP1 reads requests itself: net/http would spell names its own way.
func (u *upstream) serveHTTP1(t *testing.T, l net.Listener) {
	var running sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	running.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
				defer func() { _ = conn.Close() }()
				for in := bufio.NewReader(conn); ; {
					s, err := readRequest(in)
					if err != nil {
						if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && ctx.Err() == nil && !isReset(err) {
							t.Errorf("upstream: %v", err)
						}
						return
					}
					u.keep(s)
					if err := u.answer(ctx, conn, s); err != nil {
						return // the caller is gone
					}
				}
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		_ = l.Close()
		running.Wait()
	})
}

func isReset(err error) bool { _, ok := errors.AsType[*net.OpError](err); return ok }

// readRequest reads a request to its end.
func readRequest(in *bufio.Reader) (*seen, error) {
	first, err := in.ReadString('\n')
	if err != nil {
		return nil, err
	}
	words := strings.Split(strings.TrimRight(first, "\r\n"), " ")
	if len(words) != 3 {
		return nil, fmt.Errorf("request line %q", first)
	}
	s := &seen{Method: words[0], Target: words[1]}
	if s.Lines, err = readLines(in); err != nil {
		return nil, err
	}
	if length := s.values("content-length"); length != nil {
		n, err := strconv.ParseInt(length[0], 10, 64)
		if err != nil {
			return nil, err
		}
		_, err = io.CopyN(io.Discard, in, n)
		return s, err
	}
	for chunked := s.values("transfer-encoding") != nil; chunked; {
		size, err := in.ReadString('\n')
		if err != nil {
			return nil, err
		}
		n, err := strconv.ParseInt(strings.TrimSpace(size), 16, 64)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			s.Trailers, err = readLines(in)
			return s, err
		}
		if _, err := io.CopyN(io.Discard, in, n+2); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// readLines reads header lines to the empty one, without changing them.
func readLines(in *bufio.Reader) ([]line, error) {
	var lines []line
	for {
		text, err := in.ReadString('\n')
		if err != nil {
			return nil, err
		}
		if text = strings.TrimRight(text, "\r\n"); text == "" {
			return lines, nil
		}
		name, value, _ := strings.Cut(text, ":")
		lines = append(lines, line{name, strings.TrimPrefix(value, " ")})
	}
}

func (u *upstream) answer(ctx context.Context, w io.Writer, s *seen) error {
	s.dawdle(ctx)
	body, err := json.Marshal(s)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "HTTP/1.1 200 OK\r\n%s: 1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", upstreamMark, len(body))
	if err == nil && s.Method != http.MethodHead {
		_, err = w.Write(body)
	}
	return err
}

// dawdle takes as long as the request says.
func (s *seen) dawdle(ctx context.Context) {
	if values := s.values(delayHeader); values != nil {
		if delay, err := time.ParseDuration(values[0]); err == nil {
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
		}
	}
}

func (u *upstream) serveHTTP2(t *testing.T, l net.Listener) {
	services := grpc.NewServer()
	healthpb.RegisterHealthServer(services, health.NewServer())
	server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := &seen{Method: r.Method, Target: r.RequestURI, Lines: linesOf(r.Header)}
		if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			u.keep(s)
			services.ServeHTTP(w, r)
			return
		}
		_, _ = io.Copy(io.Discard, r.Body) // after it, trailers are there
		s.Trailers = linesOf(r.Trailer)
		u.keep(s)
		s.dawdle(r.Context())
		w.Header().Set(upstreamMark, "1")
		_ = json.NewEncoder(w).Encode(s)
	})}
	server.Protocols.SetUnencryptedHTTP2(true)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
		services.Stop()
	})
}

func linesOf(h http.Header) []line {
	var lines []line
	for name, values := range h {
		for _, v := range values {
			lines = append(lines, line{textproto.CanonicalMIMEHeaderKey(name), v})
		}
	}
	return lines
}
