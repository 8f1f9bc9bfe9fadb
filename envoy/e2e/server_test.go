package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/apikey/canarytest"
	"keyward/authz/manage"
	"keyward/envoy/envoytest/loopback"
)

// A server is one keyward: its folder, which outlives restarts, and the process that runs now.
type server struct {
	dir                    string // configuration, pepper, store, logs
	check, manage, metrics string // addresses; check as --keyward has it
	portal                 string // its address
	client                 *manage.Client

	config  config
	process *process
	canary  canarytest.Canary
}

// A config is what a test says of keyward, besides files and ports.
type config struct {
	unix bool     // Checks come over a Unix socket
	tls  string   // listen.check.tls as a YAML flow mapping; "": none
	yaml string   // the rest of keyward.yaml
	env  []string // more of the environment
}

// serve starts a keyward that is stopped when the test has ended.
func serve(t testing.TB, c config) *server {
	t.Helper()
	s := &server{dir: t.TempDir(), config: c}
	s.run(t, "pepper", "new", "--out", s.path("pepper"))
	t.Cleanup(func() {
		s.keepMetrics()
		if s.process != nil {
			s.process.stop(t)
		}
		s.checkLogs(t)
		if log := s.log(); t.Failed() {
			t.Logf("keyward:\n%s", log[max(0, len(log)-8<<10):])
		}
	})
	s.choosePorts()
	s.configure(t, c.yaml)
	s.restart(t)
	token, err := os.ReadFile(s.path("admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	s.client = s.as(apikey.NewSecret(strings.TrimSpace(string(token))))
	return s
}

// as returns a client with another token.
func (s *server) as(token apikey.Secret) *manage.Client {
	s.canary.Add(token.Reveal())
	return manage.NewClient("http://"+s.manage, token, nil)
}

func (s *server) path(name string) string { return filepath.Join(s.dir, name) }

func (s *server) log() string {
	b, _ := os.ReadFile(s.path("keyward.log"))
	return string(b)
}

func (s *server) choosePorts() {
	s.check, s.manage, s.metrics, s.portal = loopback.FreeAddress(), loopback.FreeAddress(), loopback.FreeAddress(), loopback.FreeAddress()
	if s.config.unix {
		s.check = "unix://" + s.path("check.sock")
	}
}

// configure writes keyward.yaml; more is all of it that tests differ in.
func (s *server) configure(t testing.TB, more string) {
	t.Helper()
	tls := s.config.tls
	if tls == "" {
		tls = "{}"
	}
	text := fmt.Sprintf(`listen:
  check: {address: %q, tls: %s}
  manage: {address: %q}
  portal: {address: %q}
  metrics: {address: %q}
store: {sqlite: {path: %q}}
pepper: {file: %q}
log: {level: debug, decisionsPerSecond: 1000000}
%s`, s.check, tls, s.manage, s.portal, s.metrics, s.path("keyward.db"), s.path("pepper"), more)
	if err := os.WriteFile(s.path("keyward.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// command is a call of the program, not started yet.
func (s *server) command(args ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "KEYWARD_") { // those of whoever runs the tests
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, s.config.env...)
	return cmd
}

// run calls the program and returns what it wrote to stdout.
func (s *server) run(t testing.TB, args ...string) []byte {
	t.Helper()
	cmd := s.command(args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("keyward %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return out
}

// start starts keyward and returns when it says that it is ready.
func (s *server) start() error {
	log, err := os.OpenFile(s.path("keyward.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := s.command("serve", "--config", s.path("keyward.yaml"))
	cmd.Stdout, cmd.Stderr = log, log
	if s.process, err = startProcess(cmd); err != nil {
		return err
	}
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		select {
		case <-s.process.done:
			return fmt.Errorf("keyward ended: %w", s.process.err)
		default:
		}
		if status, _, err := fetch("http://" + s.metrics + "/readyz"); err == nil && status == http.StatusOK {
			return nil
		}
	}
	return errors.New("keyward is not ready")
}

// restart starts a keyward for the first time, or one that has ended on the same files and ports.
func (s *server) restart(t testing.TB) {
	t.Helper()
	if err := s.start(); err != nil {
		t.Fatalf("%v\n%s", err, s.log())
	}
}

// A process is a child that ends with us.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended and was waited for
	err  error         // how it ended; read after done
}

func startProcess(cmd *exec.Cmd) (*process, error) {
	cmd.SysProcAttr = ownGroup()
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Linux sends the parent-death signal when the thread that started the process ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, <-started
}

// signal goes to the process that was started, never to one that got its id later.
func (p *process) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal %v: %v", s, err)
	}
}

// wait returns how the process ended.
func (p *process) wait(t testing.TB) error {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Errorf("pid %d has not ended", p.cmd.Process.Pid)
		p.signal(t, syscall.SIGKILL)
		<-p.done
	}
	return p.err
}

// kill ends the process as a crash would.
func (p *process) kill(t testing.TB) {
	t.Helper()
	p.signal(t, syscall.SIGKILL)
	_ = p.wait(t)
}

// stop ends the process as an operator in a hurry would: SIGTERM, and again for those who do not want to
// wait for the drain.
func (p *process) stop(t testing.TB) {
	t.Helper()
	p.signal(t, syscall.SIGTERM)
	p.signal(t, syscall.SIGCONT) // one that is frozen would not hear it
	select {
	case <-p.done:
	case <-time.After(100 * time.Millisecond):
		p.signal(t, syscall.SIGTERM)
	}
	_ = p.wait(t)
}

// instance makes an instance of the test's own and returns its id.
func (s *server) instance(t testing.TB, policy admin.PolicyInput) string {
	t.Helper()
	id := fmt.Sprintf("i-%x", rand.Uint64())
	s.put(t, id, policy)
	return id
}

func (s *server) put(t testing.TB, id string, policy admin.PolicyInput) {
	t.Helper()
	if _, err := s.client.PutInstance(t.Context(), id, policy); err != nil {
		t.Fatal(err)
	}
}

// A key is one that keyward made, with its secret in clear.
type key struct {
	admin.KeyRecord
	secret string
}

// key makes a key. Unless it says otherwise it has no limit.
func (s *server) key(t testing.TB, instance string, in admin.KeyInput) key {
	t.Helper()
	if in.Name == "" {
		in.Name = "a key of " + t.Name()
	}
	if in.Limits == (admin.LimitsInput{}) {
		in.Limits.Rate = &admin.RateInput{Requests: new(apikey.Unlimited)}
	}
	made, err := s.client.CreateKey(t.Context(), instance, in)
	if err != nil {
		t.Fatal(err)
	}
	s.canary.Add(made.Secret.Reveal())
	return key{made.Key, made.Secret.Reveal()}
}

// revoke returns when the server has said that the key is over.
func (s *server) revoke(t testing.TB, k key) {
	t.Helper()
	done, err := s.client.RevokeKey(t.Context(), k.InstanceID, k.ID, "other")
	if err != nil {
		t.Fatal(err)
	}
	if done.Replicas.Confirmed != 1 || done.Replicas.Total != 1 {
		t.Fatalf("revoked in %+v, want one replica that knows", done.Replicas)
	}
}

// limited is a rate and a burst.
func limited(requests int, per string, burst int) admin.LimitsInput {
	return admin.LimitsInput{Rate: &admin.RateInput{Requests: &requests, Per: per}, Burst: &burst}
}

// unknown is a secret that looks like one of ours, and that nobody has.
func (s *server) unknown(kind apikey.Kind) string {
	secret := apikey.Format{}.New(kind).Reveal()
	s.canary.Add(secret)
	return secret
}

var plainClient = &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}

// fetch gets a page of the metrics listener, on a connection of its own.
func fetch(url string) (status int, body []byte, err error) {
	res, err := plainClient.Get(url)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = res.Body.Close() }()
	var b bytes.Buffer
	_, err = b.ReadFrom(res.Body)
	return res.StatusCode, b.Bytes(), err
}

// keepMetrics writes the metrics into the folder, where they are searched for secrets with the logs.
func (s *server) keepMetrics() {
	if _, body, err := fetch("http://" + s.metrics + "/metrics"); err == nil {
		_ = os.WriteFile(s.path("metrics.txt"), body, 0o600)
	}
}

// checkLogs looks through what the server and its Envoys left behind.
func (s *server) checkLogs(t testing.TB) {
	t.Helper()
	log := s.log()
	for _, bad := range []string{"WARNING: DATA RACE", "panic in a Check", "panic:", "fatal error:"} {
		if at := strings.Index(log, bad); at >= 0 {
			t.Errorf("keyward's log: %s", log[at:min(len(log), at+4<<10)])
		}
	}
	hits, err := s.canary.Search(s.dir, "pepper", "admin.token")
	if err != nil {
		t.Error(err)
	}
	for _, hit := range hits {
		t.Errorf("a secret was written down: %s", hit)
	}
}
