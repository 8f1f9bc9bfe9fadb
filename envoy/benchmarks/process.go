package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
	"keyward/envoy/envoytest/loopback"
	"keyward/envoy/traffic"
)

// A process is a server that was started here.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

// start runs a program, with more added to its environment, and pinned to the servers' core if wanted.
// What it writes is in the log.
func start(log string, pinned bool, env []string, args ...string) (*process, error) {
	if pinned {
		args = append([]string{"taskset", "-c", serverCore}, args...)
	}
	out, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer out.Close() // the child has its own
	p := &process{cmd: exec.Command(args[0], args[1:]...), log: log, done: make(chan struct{})}
	// What configures keyward and Go for whoever runs this must not configure what is compared.
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "KEYWARD_") && !strings.HasPrefix(v, "GOGC=") && !strings.HasPrefix(v, "GOMEMLIMIT=") {
			p.cmd.Env = append(p.cmd.Env, v)
		}
	}
	p.cmd.Env = append(p.cmd.Env, env...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait() // how it ended is in ProcessState
		close(p.done)
	}()
	return p, nil
}

// stop ends the process and waits for it.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // gone already is as good
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// await polls until ok, while the process runs.
func (p *process) await(ctx context.Context, what string, ok func() bool) error {
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-p.done:
			text, _ := os.ReadFile(p.log)
			return fmt.Errorf("%s ended early: %s", what, bytes.TrimSpace(text))
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("waited in vain for %s; its log is %s", what, p.log)
		}
	}
	return nil
}

// processTime is the processor time of a process, of its threads that ended too, in the kernel's
// nanoseconds. What /proc has of it is either of the threads that live, or in clock ticks.
func processTime(pid int) (time.Duration, error) {
	const sched = 2 // CPUCLOCK_SCHED: of the clocks that the kernel has of a process, the one behind schedstat
	var used unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|sched, &used); err != nil {
		return 0, fmt.Errorf("processor time of process %d: %w", pid, err)
	}
	return time.Duration(used.Nano()), nil
}

// A server answers Checks, and is one of those that are compared.
type server struct {
	name    string
	address string // of Checks
	secrets *traffic.Secrets
	want    []int
	*process
}

func (s *server) cpu() (time.Duration, error) { return processTime(s.cmd.Process.Pid) }

// startConstant starts the server that answers a constant.
func startConstant(ctx context.Context, dir, name string, pinned bool, env []string, more ...string) (*server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p, err := start(filepath.Join(dir, strings.NewReplacer(" ", "-", ",", "").Replace(name)+".log"), pinned, env, append([]string{self, "constant"}, more...)...)
	if err != nil {
		return nil, err
	}
	s := &server{name: name, process: p, want: []int{http.StatusOK}}
	err = p.await(ctx, name, func() bool {
		text, _ := os.ReadFile(p.log)
		line, _, whole := strings.Cut(string(text), "\n")
		s.address = line
		return whole
	})
	if err != nil {
		p.stop()
		return nil, err
	}
	return s, nil
}

// A keyward is one keyward with its folder.
type keyward struct {
	server
	dir    string
	client *manage.Client
}

// keywardConfig is how a keyward is started.
type keywardConfig struct {
	binary string
	env    []string
	unix   bool   // Checks come over a Unix socket
	yaml   string // more of its configuration
	pinned bool
}

// startKeyward starts a keyward on the store and the pepper in dir, which are made if they are missing.
func startKeyward(ctx context.Context, dir, name string, c keywardConfig) (*keyward, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	pepper := filepath.Join(dir, "pepper")
	if _, err := os.Stat(pepper); errors.Is(err, fs.ErrNotExist) {
		if out, err := exec.CommandContext(ctx, c.binary, "pepper", "new", "--out", pepper).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w: %s", err, out)
		}
	}
	checks, manages, metrics := loopback.FreeAddress(), loopback.FreeAddress(), loopback.FreeAddress()
	if c.unix {
		checks = "unix://" + filepath.Join(dir, "check.sock")
	}
	config := filepath.Join(dir, "keyward.yaml")
	text := fmt.Sprintf("listen:\n  check: {address: %q}\n  manage: {address: %q}\n  metrics: {address: %q}\nstore: {sqlite: {path: %q}}\npepper: {file: %q}\n%s",
		checks, manages, metrics, filepath.Join(dir, "keyward.db"), pepper, c.yaml)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	p, err := start(filepath.Join(dir, "keyward.log"), c.pinned, c.env, c.binary, "serve", "--config", config)
	if err != nil {
		return nil, err
	}
	k := &keyward{server: server{name: name, address: checks, process: p, want: []int{http.StatusOK}}, dir: dir}
	err = p.await(ctx, name, func() bool {
		resp, err := http.Get("http://" + metrics + "/readyz")
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	if err == nil {
		var token []byte
		if token, err = os.ReadFile(filepath.Join(dir, "admin.token")); err == nil {
			k.client = manage.NewClient("http://"+manages, apikey.NewSecret(strings.TrimSpace(string(token))), nil)
		}
	}
	if err != nil {
		p.stop()
		return nil, err
	}
	return k, nil
}

// unlimited are limits that never refuse; running is max-concurrent.
func unlimited(running int) admin.LimitsInput {
	none := apikey.Unlimited
	return admin.LimitsInput{Rate: &admin.RateInput{Requests: &none}, Burst: &none, MaxConcurrent: &running}
}

// A madeKey is a key with its secret.
type madeKey struct {
	id     apikey.ID
	secret string
}

// makeKeys makes an instance without limits, with keys; expires may be zero.
func (k *keyward) makeKeys(ctx context.Context, instance string, n int, expires time.Time) ([]madeKey, error) {
	if err := k.limitConcurrency(ctx, instance, apikey.Unlimited); err != nil {
		return nil, err
	}
	keys := make([]madeKey, n)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(16)
	for i := range keys {
		group.Go(func() error {
			in := admin.KeyInput{Name: fmt.Sprintf("bench %d", i)}
			if !expires.IsZero() {
				in.ExpirationDate = expires.UTC().Format(time.RFC3339)
			}
			created, err := k.client.CreateKey(ctx, instance, in)
			keys[i] = madeKey{created.Key.ID, created.Secret.Reveal()}
			return err
		})
	}
	return keys, group.Wait()
}

// limitConcurrency makes an instance, or changes it: no limits but a max-concurrent of each key, which may be none.
func (k *keyward) limitConcurrency(ctx context.Context, instance string, running int) error {
	_, err := k.client.PutInstance(ctx, instance, admin.PolicyInput{
		Defaults: admin.DefaultsInput{Instance: unlimited(running)},
		Caps:     admin.CapsInput{Instance: new(apikey.Unlimited)}, Creation: admin.CreationInput{PerHour: new(apikey.Unlimited)},
	})
	return err
}

func secretsOf(keys []madeKey) *traffic.Secrets {
	s := &traffic.Secrets{}
	for _, k := range keys {
		s.Add(k.secret)
	}
	return s
}

// madeUp are well-formed secrets that no key has.
func madeUp(n int) *traffic.Secrets {
	s := &traffic.Secrets{}
	for range n {
		s.Add(apikey.Format{}.New(apikey.KindInstance).Reveal())
	}
	return s
}

// copyState gives another keyward the same keys.
func copyState(from, to string) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	for _, name := range []string{"keyward.db", "keyward.db-wal", "pepper", "admin.token"} {
		b, err := os.ReadFile(filepath.Join(from, name))
		if errors.Is(err, fs.ErrNotExist) && strings.HasSuffix(name, "-wal") {
			continue
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(to, name), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}
