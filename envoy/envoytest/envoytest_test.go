package envoytest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"keyward/envoy/envoytest"
)

func TestMain(m *testing.M) {
	if binary := os.Getenv("ENVOYTEST_PARENT"); binary != "" {
		beParent(binary)
	}
	if os.Getenv("ENVOYTEST_STUBBORN") != "" {
		beStubborn(os.Args)
	}
	os.Exit(m.Run())
}

// program writes a shell script that can be run and returns its path.
func program(t *testing.T, path, script string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFind(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	chosen := program(t, filepath.Join(dir, "chosen"), "exit 0")
	onPath := program(t, filepath.Join(dir, "bin", "envoy"), "exit 0")
	module := filepath.Join(dir, "module")
	own := program(t, filepath.Join(module, ".envoy", envoytest.DefaultVersion, "envoy"), "exit 0")
	other := program(t, filepath.Join(module, ".envoy", "1.36.4", "envoy"), "exit 0")
	deep := filepath.Join(module, "a", "b")
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(module, "go.mod"), []byte("module m\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, version, env, path, wd string
		want                         string
		missing                      bool
		says                         string
	}{
		{name: "ENVOY_BIN first", env: chosen, path: filepath.Dir(onPath), wd: deep, want: chosen},
		{name: "then PATH", path: filepath.Dir(onPath), wd: deep, want: onPath},
		{name: "then the project's copy", wd: deep, want: own},
		{name: "the default by its name", version: envoytest.DefaultVersion, env: chosen, wd: deep, want: chosen},
		{name: "another version is never the user's", version: "1.36.4", env: chosen, path: filepath.Dir(onPath), wd: deep, want: other},
		{name: "missing", wd: dir, missing: true, says: `run "make envoy" in`},
		{name: "another version missing", version: "1.38.3", env: chosen, path: filepath.Dir(onPath), wd: deep, missing: true, says: `run "make envoy VERSION=1.38.3" in`},
		{name: "a mistyped ENVOY_BIN is not passed over", env: filepath.Join(dir, "chosn"), path: filepath.Dir(onPath), wd: deep, says: "ENVOY_BIN"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("ENVOY_BIN", c.env)
			t.Setenv("PATH", c.path)
			t.Chdir(c.wd)
			got, err := envoytest.Find(c.version)
			if got != c.want || (err == nil) != (c.want != "") {
				t.Fatalf("got %q, %v, want %q", got, err, c.want)
			}
			if errors.Is(err, envoytest.ErrMissing) != c.missing {
				t.Errorf("got %v, want missing: %v", err, c.missing)
			}
			if err != nil && (!strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n")) {
				t.Errorf("got %q, want one line with %q", err, c.says)
			}
		})
	}
}

// verdict is a TB that remembers how the test ended.
type verdict struct {
	testing.TB
	skipped, failed string
}

func (v *verdict) Helper() {}
func (v *verdict) Skipf(format string, args ...any) {
	v.skipped = fmt.Sprintf(format, args...)
	panic(v)
}
func (v *verdict) Fatalf(format string, args ...any) {
	v.failed = fmt.Sprintf(format, args...)
	panic(v)
}

func TestMissingEnvoySkipsAtADeskAndFailsInCI(t *testing.T) {
	t.Setenv("ENVOY_BIN", "")
	t.Setenv("PATH", "")
	t.Chdir(t.TempDir())
	need := func(ci string) *verdict {
		t.Setenv("CI", ci)
		v := &verdict{}
		func() {
			defer func() { _ = recover() }()
			envoytest.Need(v, "")
		}()
		return v
	}
	if v := need(""); !strings.Contains(v.skipped, "make envoy") || v.failed != "" {
		t.Errorf("at a desk: got skipped %q, failed %q", v.skipped, v.failed)
	}
	if v := need("true"); !strings.Contains(v.failed, "make envoy") || v.skipped != "" {
		t.Errorf("in CI: got skipped %q, failed %q", v.skipped, v.failed)
	}
}

// bootstrap answers every request with 200 on a port of Envoy's choice.
const bootstrap = `
static_resources:
  listeners:
  - name: front
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: front
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{match: {prefix: /}, direct_response: {status: 200}}]
`

// secretBootstrap has an admin address of its own, which must not be used.
const secretBootstrap = bootstrap + `
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 1}}}
`

func get(t *testing.T, address string) *http.Response {
	t.Helper()
	res, err := http.Get("http://" + address + "/")
	if err != nil {
		t.Fatal(err)
	}
	if err := res.Body.Close(); err != nil {
		t.Error(err)
	}
	return res
}

func TestTwoEnvoysRunSideBySide(t *testing.T) {
	a := envoytest.Run(t, "", envoytest.Config{Bootstrap: []byte(bootstrap)})
	b := envoytest.Run(t, "", envoytest.Config{Bootstrap: []byte(secretBootstrap), Concurrency: 2})
	for range 3 {
		for _, p := range []*envoytest.Process{a, b} {
			if res := get(t, p.Listener("front")); res.StatusCode != http.StatusOK {
				t.Errorf("got %s, want 200", res.Status)
			}
		}
	}
	if a.Listener("front") == b.Listener("front") || a.Admin() == b.Admin() || a.Pid() == b.Pid() {
		t.Errorf("got one and the same: %v, %v", a, b)
	}
	if got := a.Listener("other"); got != "" {
		t.Errorf("got address %q for a listener that does not exist", got)
	}
	stats, err := b.Stats(t.Context(), `^http\.front\.downstream_rq_2xx$`)
	if err != nil {
		t.Fatal(err)
	}
	if len(stats) != 1 || stats["http.front.downstream_rq_2xx"] != 3 {
		t.Errorf("got %v, want three requests", stats)
	}
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := a.Stop(); err != nil {
		t.Errorf("stopped twice: %v", err)
	}
	if err := a.Err(); err != nil {
		t.Errorf("got %v, want exit code 0 after SIGTERM", err)
	}
	if res := get(t, b.Listener("front")); res.StatusCode != http.StatusOK {
		t.Errorf("the other: got %s, want 200", res.Status)
	}
}

func TestConfigurationIsPrivateAndGoesWithTheProcess(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	p := envoytest.Run(t, "", envoytest.Config{Bootstrap: []byte(bootstrap)})
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), "keyward-envoy-*"))
	if err != nil || len(dirs) != 1 {
		t.Fatalf("got folders %v, %v, want one", dirs, err)
	}
	for path, want := range map[string]os.FileMode{dirs[0]: 0o700, filepath.Join(dirs[0], "envoy.yaml"): 0o600} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s: got mode %v, want %v", path, got, want)
		}
	}
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dirs[0]); !os.IsNotExist(err) {
		t.Errorf("the folder is still there: %v", err)
	}
}

func TestFailedStartSaysWhyAndLeavesNothing(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	scripts := t.TempDir()
	done, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("called off"))
	for _, c := range []struct {
		name   string
		ctx    context.Context
		config envoytest.Config
		says   []string
	}{
		{"no binary", t.Context(), envoytest.Config{Binary: filepath.Join(scripts, "none")}, []string{"start envoy", "no such file"}},
		{"ends at once", t.Context(), envoytest.Config{Binary: program(t, filepath.Join(scripts, "ends"), "echo bad configuration >&2; exit 3")}, []string{"exit status 3", "bad configuration"}},
		{"ends well", t.Context(), envoytest.Config{Binary: program(t, filepath.Join(scripts, "ends-well"), "exit 0")}, []string{"exit status 0"}},
		{"never ready", t.Context(), envoytest.Config{Binary: program(t, filepath.Join(scripts, "hangs"), "echo warming up; exec sleep 600"), ReadyIn: 300 * time.Millisecond}, []string{"not ready after 300ms", "warming up"}},
		{"called off", done, envoytest.Config{Binary: filepath.Join(scripts, "hangs")}, []string{"called off"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := envoytest.Start(c.ctx, c.config)
			if err == nil {
				_ = p.Stop()
				t.Fatal("got a process")
			}
			for _, want := range c.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("got %q, want %q in it", err, want)
				}
			}
			if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "keyward-envoy-*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestKillAndPause(t *testing.T) {
	var log safeBuilder
	p := envoytest.Run(t, "", envoytest.Config{Bootstrap: []byte(bootstrap), LogLevel: "info", Log: &log})
	if err := p.Pause(); err != nil {
		t.Fatal(err)
	}
	stalled, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := p.Stats(stalled, "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("paused: got %v, want no answer", err)
	}
	if err := p.Continue(); err != nil {
		t.Fatal(err)
	}
	if res := get(t, p.Listener("front")); res.StatusCode != http.StatusOK {
		t.Errorf("continued: got %s, want 200", res.Status)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	default:
		t.Error("killed, but not done")
	}
	if bad, ok := errors.AsType[*exec.ExitError](p.Err()); !ok || bad.Exited() {
		t.Errorf("got %v, want an end by signal", p.Err())
	}
	if got := log.String(); !strings.Contains(got, "starting main dispatch loop") || !strings.Contains(got, p.Log()) {
		t.Errorf("got log %q, and %q", got, p.Log())
	}
}

func TestPausedEnvoyIsStopped(t *testing.T) {
	p := envoytest.Run(t, "", envoytest.Config{Bootstrap: []byte(bootstrap)})
	if err := p.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := p.Err(); err != nil {
		t.Errorf("got %v, want an end by SIGTERM, not by SIGKILL", err)
	}
}

// beStubborn is an Envoy, as far as Start looks, that SIGTERM does not end.
func beStubborn(args []string) {
	signal.Ignore(syscall.SIGTERM)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	file := args[slices.Index(args, "--admin-address-path")+1]
	if err := os.WriteFile(file+".new", []byte(l.Addr().String()), 0o600); err != nil {
		panic(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		panic(err)
	}
	panic(http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") })))
}

func TestStubbornEnvoyIsKilled(t *testing.T) {
	binary := program(t, filepath.Join(t.TempDir(), "envoy"), "ENVOYTEST_STUBBORN=1 exec "+os.Args[0]+` "$@"`)
	p, err := envoytest.Start(t.Context(), envoytest.Config{Binary: binary, StopIn: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	if bad, ok := errors.AsType[*exec.ExitError](p.Err()); !ok || bad.String() != "signal: killed" {
		t.Errorf("got %v, want SIGKILL after the SIGTERM that it ignores", p.Err())
	}
}

func TestDrainTellsClientsToLeave(t *testing.T) {
	p := envoytest.Run(t, "", envoytest.Config{Bootstrap: []byte(bootstrap)})
	if res := get(t, p.Listener("front")); res.Close {
		t.Error("closed before the drain")
	}
	if err := p.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if res := get(t, p.Listener("front")); !res.Close {
		t.Error("not closed during the drain")
	}
}

func TestValidate(t *testing.T) {
	for _, version := range envoytest.Versions() {
		t.Run(version, func(t *testing.T) {
			c := envoytest.Config{Binary: envoytest.Need(t, version), Bootstrap: []byte(bootstrap)}
			if err := envoytest.Validate(t.Context(), c); err != nil {
				t.Error(err)
			}
			c.Bootstrap = []byte(strings.Replace(bootstrap, "stat_prefix: front", "stat_prefix: front\n          no_such_field: 1", 1))
			if err := envoytest.Validate(t.Context(), c); err == nil || !strings.Contains(err.Error(), "no_such_field") {
				t.Errorf("got %v, want a complaint about no_such_field", err)
			}
			done, cancel := context.WithCancel(t.Context())
			cancel()
			if err := envoytest.Validate(done, c); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want context.Canceled", err)
			}
			out, err := exec.Command(c.Binary, "--version").Output()
			if version != envoytest.DefaultVersion && (err != nil || !strings.Contains(string(out), "/"+version+"/")) {
				t.Errorf("got %q, %v, want version %s", out, err, version)
			}
		})
	}
}

// beParent is another program: it starts what it takes for an Envoy and waits to be killed.
func beParent(binary string) {
	_, err := envoytest.Start(context.Background(), envoytest.Config{Binary: binary, ReadyIn: time.Hour})
	fmt.Println(err)
	os.Exit(1)
}

func TestEnvoyDoesNotOutliveItsParent(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("skipped: only Linux tells a process that its parent is gone")
	}
	dir := t.TempDir()
	pidFile := filepath.Join(dir, "pid")
	child := program(t, filepath.Join(dir, "envoy"), "echo $$ > "+pidFile+".new; mv "+pidFile+".new "+pidFile+"; exec sleep 600")
	parent := exec.Command(os.Args[0])
	parent.Env = append(os.Environ(), "ENVOYTEST_PARENT="+child, "TMPDIR="+dir)
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	pid := 0
	waitFor(t, "the child's start", func() bool {
		b, err := os.ReadFile(pidFile)
		if err != nil {
			return false
		}
		pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
		return err == nil
	})
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait()
	waitFor(t, "the child's end", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(stat), ") Z ") // nobody may be there to reap it
	})
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain for %s", what)
}

func TestUnixListener(t *testing.T) {
	path := filepath.Join(t.TempDir(), "front.sock")
	p := envoytest.Run(t, "", envoytest.Config{Bootstrap: []byte(strings.Replace(bootstrap,
		"{socket_address: {address: 127.0.0.1, port_value: 0}}", "{pipe: {path: "+path+"}}", 1))})
	if got := p.Listener("front"); got != path {
		t.Fatalf("got %q, want %q", got, path)
	}
	conn, err := net.Dial("unix", p.Listener("front"))
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}
