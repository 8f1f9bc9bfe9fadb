package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"keyward/envoy/envoytest/loopback"
)

// TestMain makes this test binary the program too: "keyward" on the PATH of tests and scripts is a copy
// of it, so that what is tested has the race detector in it.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"keyward": child})
}

const (
	// timeLimit is a variable of a child's environment: how long it may run. One that hangs says where.
	timeLimit = "TIME_LIMIT"
	// drainTime is another: how long a server that drains waits for Envoy to see it, which is no part of
	// most stories. Empty: as always.
	drainTime = "DRAIN_TIME"
	// commandLimit is the limit of a command in a story. None takes long: a machine with other work may make
	// it a few seconds.
	commandLimit = 2 * time.Minute
)

// child is main, except that it ends when the test does, however that ends.
func child() {
	parent, limit := os.Getppid(), time.NewTimer(24*time.Hour)
	if d, err := time.ParseDuration(os.Getenv(timeLimit)); err == nil {
		limit.Reset(d)
	}
	go func() {
		for os.Getppid() == parent {
			select {
			case <-limit.C:
				_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
				fmt.Fprintln(os.Stderr, "test: this command hangs")
				os.Exit(97)
			case <-time.After(time.Second):
			}
		}
		os.Exit(97)
	}()
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, environ: os.Environ(), drainDelay: drainDelay}
	if d, err := time.ParseDuration(os.Getenv(drainTime)); err == nil {
		a.drainDelay = d
	}
	os.Exit(a.run(context.Background(), os.Args[1:]))
}

// patience is how long a test waits for what is bound to happen, on a machine that has other work.
const patience = time.Minute

// programEnv is the environment of the program in tests: nothing of ours but what a test adds.
func programEnv(more ...string) []string {
	env := []string{
		"PATH=" + os.Getenv("PATH"),
		"TMPDIR=" + os.TempDir(),
		"GORACE=atexit_sleep_ms=0", // the race detector's own default holds up every end for a second
	}
	if dir := os.Getenv("GOCOVERDIR"); dir != "" {
		env = append(env, "GOCOVERDIR="+dir)
	}
	return append(env, more...)
}

// ports are addresses on loopback for one server.
type ports struct{ check, manage, metrics, holders string }

// env makes a server listen there; for holders it has to be asked to. Its cache is small: under the race
// detector, closing one for a million keys takes longer than most tests.
func (p ports) env() []string {
	return []string{
		"KEYWARD_CACHE_RECORDS=10000",
		"KEYWARD_LISTEN_CHECK_ADDRESS=" + p.check,
		"KEYWARD_LISTEN_MANAGE_ADDRESS=" + p.manage,
		"KEYWARD_LISTEN_METRICS_ADDRESS=" + p.metrics,
	}
}

func newPorts() ports {
	return ports{loopback.FreeAddress(), loopback.FreeAddress(), loopback.FreeAddress(), loopback.FreeAddress()}
}

// A process is the program, running.
type process struct {
	cmd      *exec.Cmd
	log, out string        // files with its standard error and output
	done     chan struct{} // closed at its end
}

// start runs the program in a folder, with its standard error in serve.log there and its output in
// serve.out.
func start(dir string, env []string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command("keyward", args...), done: make(chan struct{}),
		log: filepath.Join(dir, "serve.log"), out: filepath.Join(dir, "serve.out")}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the child has its own
	out, err := os.Create(p.out)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p.cmd.Dir, p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = dir, programEnv(env...), out, log
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait() // its outcome is in ProcessState
		close(p.done)
	}()
	return p, nil
}

// kill ends the process as a crash would, and waits for it.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// ended waits for the end and returns the exit code; killed by signal N: -N.
func (p *process) ended() (int, error) {
	select {
	case <-p.done:
	case <-time.After(patience):
		return 0, fmt.Errorf("still running; it says:\n%s", p.says())
	}
	if s, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && s.Signaled() {
		return -int(s.Signal()), nil
	}
	return p.cmd.ProcessState.ExitCode(), nil
}

func (p *process) says() string {
	text, _ := os.ReadFile(p.log)
	return string(text)
}

// serve starts a server in a folder that holds keyward.yaml, and returns when it is ready.
func serve(dir string, at ports, args ...string) (*process, error) {
	return serveAs(dir, at.env(), at, args...)
}

// serveAs does the same with another environment.
func serveAs(dir string, env []string, at ports, args ...string) (*process, error) {
	p, err := start(dir, env, append([]string{"serve", "--config", "keyward.yaml"}, args...)...)
	if err != nil {
		return nil, err
	}
	err = eventually(func() error {
		select {
		case <-p.done:
			return fatal{errors.New("it ended")}
		default:
		}
		return statusIs("http://"+at.metrics+"/readyz", http.StatusOK)
	})
	if err != nil {
		p.kill()
		return nil, fmt.Errorf("serve: %w; it says:\n%s", err, p.says())
	}
	return p, nil
}

// A fatal error ends eventually at once.
type fatal struct{ error }

// eventually repeats try until it succeeds.
func eventually(try func() error) error {
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		err := try()
		if err == nil {
			return nil
		}
		if _, ok := errors.AsType[fatal](err); ok || time.Now().After(end) {
			return err
		}
	}
}

func statusIs(url string, want int) error {
	resp, err := http.Get(url)
	if err != nil {
		return err
	}
	_ = resp.Body.Close()
	if resp.StatusCode != want {
		return fmt.Errorf("%s: got status %d, want %d", url, resp.StatusCode, want)
	}
	return nil
}

// An envoyConn asks a server what Envoy would ask.
type envoyConn struct {
	conn   *grpc.ClientConn
	client authv3.AuthorizationClient
}

func dialCheck(address string) (*envoyConn, error) {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &envoyConn{conn, authv3.NewAuthorizationClient(conn)}, nil
}

func (c *envoyConn) Close() { _ = c.conn.Close() }

// checkRequest is what Envoy sends for a request that carries a secret; none if it is empty.
func checkRequest(secret, method, path string) *authv3.CheckRequest {
	headers := map[string]string{}
	if secret != "" {
		headers["x-api-key"] = secret
	}
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source: &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
			SocketAddress: &corev3.SocketAddress{Address: "192.0.2.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 40000}},
		}}},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Id: "1", Method: method, Host: "app.example", Path: path, Headers: headers,
		}},
	}}
}

// status returns what Envoy would answer its client: 200 for an allow, 503 for an error.
func (c *envoyConn) status(secret, method, path string) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	answer, err := c.client.Check(ctx, checkRequest(secret, method, path), grpc.WaitForReady(true))
	switch {
	case status.Code(err) == codes.Unavailable:
		return http.StatusServiceUnavailable, nil
	case err != nil:
		return 0, err
	case answer.GetStatus().GetCode() == int32(codes.OK) && answer.GetOkResponse() != nil:
		return http.StatusOK, nil
	case answer.GetDeniedResponse() != nil:
		return int(answer.GetDeniedResponse().GetStatus().GetCode()), nil
	}
	return 0, fmt.Errorf("an answer that Envoy cannot use: %v", answer)
}

// tested runs a command of the program in this process.
func tested(t testing.TB, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, problems bytes.Buffer
	code = run(t.Context(), args, strings.NewReader(stdin), &out, &problems)
	return code, out.String(), problems.String()
}
