package envoytest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Config says what to run. Binary and Bootstrap are needed.
type Config struct {
	Binary    string // path of the Envoy, from [Find]
	Bootstrap []byte // YAML or JSON. Its listeners may have port 0; an admin address in it is replaced

	Concurrency int       // worker threads; 0: 1
	LogLevel    string    // "": warning
	Log         io.Writer // gets what Envoy writes to stdout and stderr; nil: only kept for [Process.Log]

	ReadyIn time.Duration // how long Envoy may take until it serves; 0: 15 s
	StopIn  time.Duration // how long [Process.Stop] lets it end by itself before it is killed; 0: 5 s
}

// A Process is a running Envoy. Safe for concurrent use.
type Process struct {
	cmd    *exec.Cmd
	dir    string
	stopIn time.Duration
	log    *tail
	done   chan struct{} // closed when the process has ended and was waited for
	err    error         // how it ended; read after done

	admin     string            // base URL
	listeners map[string]string // addresses by name
}

// Start runs an Envoy and returns when it is ready and its listeners have their addresses. ctx bounds
// the start only; the process then runs until Stop or Kill, and on Linux not longer than this program.
//
// Its configuration may hold secrets, so it is kept in a folder that only this user can read, which goes
// with the process. Errors carry the end of Envoy's log.
func Start(ctx context.Context, c Config) (*Process, error) {
	c.ReadyIn = cmp.Or(c.ReadyIn, 15*time.Second)
	ctx, cancel := context.WithTimeoutCause(ctx, c.ReadyIn, fmt.Errorf("not ready after %v", c.ReadyIn))
	defer cancel()

	dir, file, err := writeBootstrap(c.Bootstrap)
	if err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	adminFile := filepath.Join(dir, "admin-address")
	p := &Process{dir: dir, stopIn: cmp.Or(c.StopIn, 5*time.Second), log: &tail{}, done: make(chan struct{})}
	p.cmd = exec.Command(c.Binary, arguments(c, file,
		// A base id of its own, or a second Envoy on this machine would refuse to start.
		"--use-dynamic-base-id",
		"--config-yaml", "admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}",
		"--admin-address-path", adminFile,
		// Envoy's own default spreads a drain over ten minutes.
		"--drain-strategy", "immediate", "--drain-time-s", "2",
		"--concurrency", strconv.Itoa(max(c.Concurrency, 1)),
	)...)
	var out io.Writer = p.log
	if c.Log != nil {
		out = io.MultiWriter(p.log, c.Log)
	}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = ownGroup()
	if err := p.run(); err != nil {
		_ = os.RemoveAll(dir)
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	if err := p.waitReady(ctx, adminFile); err != nil {
		_ = p.Kill()
		return nil, fmt.Errorf("start envoy: %w\n%s", err, p.Log())
	}
	return p, nil
}

// run starts the process, and leaves a goroutine that waits for its end.
func (p *Process) run() error {
	started := make(chan error)
	go func() {
		// Linux sends the parent-death signal when the thread that started the process ends, not when the
		// program does: the thread is kept until the process is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = p.cmd.Wait()
		_ = os.RemoveAll(p.dir)
		close(p.done)
	}()
	return <-started
}

// waitReady polls: Envoy tells nobody when it is ready.
func (p *Process) waitReady(ctx context.Context, adminFile string) error {
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-p.done:
			return fmt.Errorf("it ended: %v", p.cmd.ProcessState)
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
		address, err := os.ReadFile(adminFile) // half an address does not answer
		if err != nil || len(address) == 0 {
			continue
		}
		p.admin = "http://" + string(bytes.TrimSpace(address))
		if _, err := p.get(ctx, "/ready"); err != nil {
			continue
		}
		p.listeners, err = p.readListeners(ctx)
		return err
	}
}

// Pid is the process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the process ended: nil while it runs, and after an end with exit code 0.
func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

// Log returns the last 32 KiB of what Envoy wrote to stdout and stderr.
func (p *Process) Log() string { return p.log.String() }

// Stop ends Envoy and waits for it: SIGTERM, and SIGKILL when its time is over. Stopping twice does no harm.
func (p *Process) Stop() error {
	if err := p.signal(syscall.SIGTERM); err != nil {
		return err
	}
	if err := p.Continue(); err != nil { // a paused process would not see the SIGTERM
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(p.stopIn):
		return p.Kill()
	}
}

// Kill ends Envoy at once, as a crash would, and waits for it.
func (p *Process) Kill() error {
	if err := p.signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}

// Pause freezes Envoy until [Process.Continue]: its connections stay open and nobody answers.
func (p *Process) Pause() error { return p.signal(syscall.SIGSTOP) }

// Continue ends a [Process.Pause].
func (p *Process) Continue() error { return p.signal(syscall.SIGCONT) }

// signal goes to the one process that was started: os.Process knows when it was waited for, so a process
// that got its id later is never hit.
func (p *Process) signal(s syscall.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("envoy, pid %d: %w", p.Pid(), err)
	}
	return nil
}

// Validate asks an Envoy whether it would accept the configuration. It opens no port.
func Validate(ctx context.Context, c Config) error {
	dir, file, err := writeBootstrap(c.Bootstrap)
	if err != nil {
		return fmt.Errorf("validate with envoy: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	out, err := exec.CommandContext(ctx, c.Binary, arguments(c, file, "--mode", "validate")...).CombinedOutput()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("validate with envoy: %w\n%s", err, bytes.TrimSpace(out))
	}
	return nil
}

func arguments(c Config, file string, more ...string) []string {
	return append([]string{"-c", file, "--log-level", cmp.Or(c.LogLevel, "warning")}, more...)
}

// writeBootstrap makes a folder of mode 0700 with the configuration in it.
func writeBootstrap(bootstrap []byte) (dir, file string, err error) {
	if dir, err = os.MkdirTemp("", "keyward-envoy-"); err != nil {
		return "", "", err
	}
	file = filepath.Join(dir, "envoy.yaml") // JSON is YAML
	if err := os.WriteFile(file, bootstrap, 0o600); err != nil {
		_ = os.RemoveAll(dir)
		return "", "", err
	}
	return dir, file, nil
}

// tailSize is how much of Envoy's output is kept: its last error is at the end.
const tailSize = 32 << 10

// A tail keeps the end of what was written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if extra := len(t.buf) - tailSize; extra > 0 {
		t.buf = append(t.buf[:0], t.buf[extra:]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.buf))
}
