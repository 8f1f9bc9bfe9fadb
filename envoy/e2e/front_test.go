package e2e_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"keyward/envoy/envoytest"
	"keyward/envoy/generate"
)

// A front is an Envoy that asks a keyward, with an upstream of its own behind it.
type front struct {
	*envoytest.Process
	address string
	up      *upstream
	log     string // path of what Envoy wrote
}

// A frontConfig says in what a front differs from the usual one.
type frontConfig struct {
	version string                      // "": the default one
	grpc    bool                        // the upstream speaks HTTP/2 without TLS
	args    []string                    // more arguments of keyward envoy generate envoy
	edit    func(config map[string]any) // changes the configuration that was generated
}

// front starts an Envoy in front of an upstream, with the configuration that the program itself writes.
func (s *server) front(t *testing.T, c frontConfig) *front {
	t.Helper()
	if c.version == "" {
		c.version = envoytest.DefaultVersion
	}
	envoy := envoytest.Need(t, c.version)
	f := &front{up: serveUpstream(t, c.grpc)}
	args := append([]string{"envoy", "generate", "envoy", "--config", s.path("keyward.yaml"), "--upstream", f.up.address,
		"--listen", "127.0.0.1:0", "--access-log",
		// What is to be exact must not depend on how busy the machine is: a Check that Envoy gave up may have
		// been counted. A test of the usual timeout says so.
		"--check-timeout", "20s"}, c.args...)
	if c.grpc {
		args = append(args, "--upstream-http2")
	}
	bootstrap := s.run(t, args...)
	if c.edit != nil {
		var tree map[string]any
		if err := yaml.Unmarshal(bootstrap, &tree); err != nil {
			t.Fatal(err)
		}
		c.edit(tree)
		var err error
		if bootstrap, err = yaml.Marshal(tree); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := os.MkdirTemp(s.dir, "envoy-"+c.version+"-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "envoy.yaml"), bootstrap, 0o600); err != nil {
		t.Fatal(err)
	}
	f.log = filepath.Join(dir, "envoy.log")
	log, err := os.Create(f.log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	f.Process, err = envoytest.Start(t.Context(), envoytest.Config{
		Binary: envoy, Bootstrap: bootstrap, Concurrency: 2, LogLevel: "info", Log: log, ReadyIn: patience,
	})
	if err != nil {
		t.Fatal(err)
	}
	f.address = f.Listener(generate.Listener)
	t.Cleanup(func() {
		for _, page := range []string{"config_dump", "stats"} {
			if _, body, err := fetch(f.Admin() + "/" + page); err == nil {
				_ = os.WriteFile(filepath.Join(dir, page), body, 0o600)
			}
		}
		if err := f.Stop(); err != nil {
			t.Error(err)
		}
		if said := f.Log(); t.Failed() {
			t.Logf("envoy %s:\n%s", c.version, said[max(0, len(said)-4<<10):])
		}
	})
	return f
}

// awaitHealthy returns when Envoy knows that keyward is there.
func (f *front) awaitHealthy(t *testing.T) {
	t.Helper()
	waitFor(t, "Envoy to find keyward", func() bool {
		stats, err := f.Stats(t.Context(), `^cluster\.keyward\.membership_healthy$`)
		return err == nil && stats["cluster.keyward.membership_healthy"] == 1
	})
}

// A caller sends requests as they are written, on a connection that it keeps. For one goroutine.
type caller struct {
	t *testing.T
	f *front
	// patient: 503 is no answer but a health check that came too late on a busy machine, and the request,
	// which nobody judged, is sent again.
	patient bool

	conn net.Conn
	in   *bufio.Reader
}

// caller returns one that is patient.
func (f *front) caller(t *testing.T) *caller {
	c := &caller{t: t, f: f, patient: true}
	t.Cleanup(c.hangUp)
	return c
}

func (c *caller) hangUp() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}

// An answer is what came back, and what the upstream had seen if it came from there.
type answer struct {
	status int
	header http.Header
	body   string
	seen   *seen // nil if the upstream had no part in it
	sent   time.Time
	came   time.Time
}

// send sends a request, all of it as it is written.
func (c *caller) send(request string) answer {
	c.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		a, err := c.once(request)
		if err != nil {
			c.t.Fatalf("%q: %v", request, err)
		}
		if a.status != http.StatusServiceUnavailable || !c.patient || time.Now().After(end) {
			return a
		}
	}
}

func (c *caller) once(request string) (a answer, err error) {
	if c.conn == nil {
		if c.conn, err = net.Dial("tcp", c.f.address); err != nil {
			return a, err
		}
		c.in = bufio.NewReader(c.conn)
	}
	if err := c.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return a, err
	}
	a.sent = time.Now()
	if _, err := io.WriteString(c.conn, request); err != nil {
		return a, err
	}
	method, _, _ := strings.Cut(request, " ")
	res, err := http.ReadResponse(c.in, &http.Request{Method: method})
	if err != nil {
		return a, err
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return a, err
	}
	a.came = time.Now()
	a.status, a.header, a.body = res.StatusCode, res.Header, string(body)
	if res.Close {
		c.hangUp()
	}
	if res.Header.Get(upstreamMark) != "" && method != http.MethodHead {
		a.seen = new(seen)
		if err := json.Unmarshal(body, a.seen); err != nil {
			return a, fmt.Errorf("%w: %q", err, body)
		}
	}
	return a, nil
}

// get sends a GET with these header lines.
func (c *caller) get(target string, lines ...string) answer {
	c.t.Helper()
	return c.do("GET", target, lines...)
}

func (c *caller) do(method, target string, lines ...string) answer {
	c.t.Helper()
	return c.send(requestText(method, target, lines...))
}

func requestText(method, target string, lines ...string) string {
	return method + " " + target + " HTTP/1.1\r\nHost: app.test\r\n" + strings.Join(append(lines, ""), "\r\n") + "\r\n"
}

// want ends the test unless the answer has this status.
func (a answer) want(t *testing.T, status int, what ...any) answer {
	t.Helper()
	if a.status != status {
		t.Fatalf("%s: got %d %v %q, want %d", fmt.Sprint(what...), a.status, a.header, a.body, status)
	}
	return a
}

// withKey is the usual header with a secret in it.
func withKey(secret string) string { return "X-API-Key: " + secret }

// everyVersion starts an Envoy of each version in front of one keyward, and runs a test on each.
func everyVersion(t *testing.T, s *server, test func(t *testing.T, f *front)) {
	t.Helper()
	for _, version := range envoytest.Versions() {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			f := s.front(t, frontConfig{version: version})
			f.awaitHealthy(t)
			test(t, f)
		})
	}
}

// A line is a header line in the spelling in which it came.
type line struct{ Name, Value string }

// A seen is a request as an upstream saw it.
type seen struct {
	Method, Target string
	Lines          []line // in the order in which they came; over HTTP/2 in none
	Trailers       []line
}

// values returns the values of all lines of this name, in any case.
func (s *seen) values(name string) []string {
	var values []string
	for _, l := range s.Lines {
		if strings.EqualFold(l.Name, name) {
			values = append(values, l.Value)
		}
	}
	return values
}

// has reports whether the request has this text in any part of it.
func (s *seen) has(text string) bool {
	return strings.Contains(s.Target, text) || slices.ContainsFunc(slices.Concat(s.Lines, s.Trailers), func(l line) bool {
		return strings.Contains(l.Name, text) || strings.Contains(l.Value, text)
	})
}
