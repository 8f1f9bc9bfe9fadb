package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"keyward/envoy/envoytest"
)

// TestDev is a session of keyward dev with a real Envoy: what it leaves on disk and tells, the lines that
// it prints, its end, and a tour on what it left.
func TestDev(t *testing.T) {
	t.Parallel()
	env := []string{"ENVOY_BIN=" + envoytest.Need(t, "")}
	work := t.TempDir()
	dir := filepath.Join(work, "it's here") // which a shell has to be told
	// Somebody has the usual ports: this test, or whoever it was that came first.
	usual := defaultConfig()
	for _, address := range []string{usual.Listen.Check.Address, usual.Listen.Manage.Address, usualHolders, usualPortal, usual.Listen.Metrics.Address} {
		if l, err := net.Listen("tcp", address); err == nil {
			t.Cleanup(func() { _ = l.Close() })
		}
	}
	dev, err := start(work, env, "dev", "--dir", dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(dev.kill)
	var printed string
	if err := eventually(func() error {
		select {
		case <-dev.done:
			return fatal{errors.New("it ended")}
		default:
		}
		text, err := os.ReadFile(dev.out)
		if printed = string(text); err == nil && !strings.Contains(printed, " keys list demo\n") {
			err = errors.New("it prints no lines to paste")
		}
		return err
	}); err != nil {
		t.Fatalf("dev: %v; it says:\n%s", err, dev.says())
	}

	var state devState
	t.Run("dev.json", func(t *testing.T) {
		text, err := os.ReadFile(filepath.Join(dir, devFile))
		if err != nil {
			t.Fatal(err)
		}
		var members map[string]any
		if err := errors.Join(json.Unmarshal(text, &state), json.Unmarshal(text, &members)); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"envoy", "manage", "holders", "portal", "metrics", "grpc", "instance", "tokenFile", "secretFile", "pid", "envoyPid"} {
			if members[name] == nil || members[name] == "" || members[name] == 0.0 {
				t.Errorf("%s: got %v", name, members[name])
			}
			delete(members, name)
		}
		if len(members) > 0 {
			t.Errorf("and %v", members)
		}
		if state.PID != dev.cmd.Process.Pid || state.Instance != devInstance {
			t.Errorf("got %+v", state)
		}
		for got, taken := range map[string]string{state.GRPC: usual.Listen.Check.Address, state.Manage: "http://" + usual.Listen.Manage.Address, state.Holders: "http://" + usualHolders, state.Portal: "http://" + usualPortal, state.Metrics: "http://" + usual.Listen.Metrics.Address} {
			if got == taken {
				t.Errorf("%s was taken", got)
			}
		}
		if err := errors.Join(statusIs(state.Metrics+"/readyz", 200), statusIs(state.Envoy+"/orders", 401), statusIs(state.Portal+"/sign-in", 200), statusIs(state.Envoy+"/public/x", 200)); err != nil {
			t.Error(err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}

	t.Run("private folder", func(t *testing.T) {
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("the folder has mode %v, %v", info.Mode(), err)
		}
		files := 0
		if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			files++
			info, err := d.Info()
			if err == nil && info.Mode().Perm() != 0o600 {
				t.Errorf("%s has mode %v", path, info.Mode())
			}
			return err
		}); err != nil || files < 8 {
			t.Errorf("%d files, %v", files, err)
		}
		if text, err := os.ReadFile(filepath.Join(dir, ".gitignore")); err != nil || string(text) != "*\n" {
			t.Errorf(".gitignore: %q, %v", text, err)
		}
		for _, name := range []string{devLogFile, devEnvoyLog} {
			if text, err := os.ReadFile(filepath.Join(dir, name)); err != nil || strings.Contains(string(text), "kwi_") || strings.Contains(string(text), "kwm_") {
				t.Errorf("%s: %v, or it holds a secret", name, err)
			}
		}
	})

	// command runs the program to its end.
	command := func(t *testing.T, args ...string) (code int, said string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
		defer cancel()
		cmd := exec.CommandContext(ctx, "keyward", args...)
		cmd.Dir, cmd.Env = work, programEnv(env...)
		out, err := cmd.CombinedOutput()
		if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), string(out)
	}
	t.Run("second dev on the folder", func(t *testing.T) {
		code, said := command(t, "dev", "--dir", dir)
		if code != exitError || !strings.Contains(said, "is in use by process "+strconv.Itoa(state.PID)) {
			t.Errorf("exit code %d: %s", code, said)
		}
		if log, err := os.ReadFile(filepath.Join(dir, devLogFile)); err != nil || !strings.Contains(string(log), `"serving"`) {
			t.Errorf("the log of the first is %q, %v", log, err)
		}
		if _, err := os.Stat(filepath.Join(dir, devFile)); err != nil {
			t.Error(err)
		}
	})
	t.Run("serve refuses its pepper", func(t *testing.T) {
		args := []string{"serve", "--set", "pepper.file=" + filepath.Join(dir, devPepperFile), "--set", "store.sqlite.path=" + filepath.Join(work, "other.db")}
		code, said := command(t, args...)
		if code != exitError || !strings.Contains(said, "was made by keyward dev and must not guard real keys") {
			t.Errorf("exit code %d: %s", code, said)
		}
	})

	t.Run("lines to paste", func(t *testing.T) {
		if _, err := exec.LookPath("curl"); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatal("no curl found: install it")
			}
			t.Skip("skipped: no curl found")
		}
		pasteLines(t, printed, state)
	})

	t.Run("Ctrl-C", func(t *testing.T) {
		if err := dev.cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		if code, err := dev.ended(); code != exitOK || err != nil {
			t.Errorf("exit code %d, %v; it says:\n%s", code, err, dev.says())
		}
		if err := syscall.Kill(state.EnvoyPID, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("its Envoy runs on: %v", err)
		}
		if _, err := os.Stat(filepath.Join(dir, devFile)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", devFile, err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}

	// On the same folder: it makes a new demo key for the one that was revoked.
	t.Run("tour", func(t *testing.T) {
		code, said := command(t, "dev", "--tour", "--dir", dir)
		lines := strings.Split(strings.TrimSpace(said), "\n")
		if code != exitOK || len(lines) < 15 || lines[len(lines)-1] != "All as expected." {
			t.Fatalf("exit code %d:\n%s", code, said)
		}
		for _, line := range lines[:len(lines)-1] {
			if !strings.HasPrefix(line, "ok  ") || !strings.Contains(line, "expected ") || !strings.Contains(line, "got ") {
				t.Errorf("got %q", line)
			}
		}
		if _, err := os.Stat(filepath.Join(dir, devFile)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", devFile, err)
		}
	})
}

// pasteLines gives the lines that dev printed to a shell, block by block, and compares what comes with
// what the comment above each says.
func pasteLines(t *testing.T, printed string, state devState) {
	_, lines, ok := strings.Cut(printed, "\n\n")
	if !ok {
		t.Fatalf("nothing to paste in\n%s", printed)
	}
	paste := func(t *testing.T, lines string) string {
		t.Helper()
		sh := exec.Command("sh", "-eu", "-c", lines)
		sh.Env = programEnv("HOME=" + t.TempDir())
		out, err := sh.CombinedOutput()
		if err != nil {
			t.Errorf("%s\n%v: %s", lines, err, out)
		}
		return string(out)
	}
	contains := func(want string) func(*testing.T, string) {
		return func(t *testing.T, out string) {
			if !strings.Contains(out, want) {
				t.Errorf("got %s, want %s", out, want)
			}
		}
	}
	wants := map[string]func(*testing.T, string){
		"200": func(t *testing.T, out string) {
			contains("HTTP/1.1 200 OK")(t, out)
			contains(`"X-Keyward-Instance-Id"`)(t, out)
			if strings.Contains(out, "kwi_") {
				t.Error("the key reached the service")
			}
		},
		"401": contains("HTTP/1.1 401 Unauthorized"),
		"403": contains("HTTP/1.1 403 Forbidden"),
		"429:": func(t *testing.T, out string) {
			contains("200 ")(t, out)
			contains("429 ")(t, out)
			// On a slow machine the very last request may find a token again.
			if !strings.Contains(out, `"RateLimitExceeded"`) && !strings.HasSuffix(out, "}\n") {
				t.Errorf("got %s", out)
			}
		},
		"429 again": func(t *testing.T, out string) {
			if strings.Count(out, "200 ") != devConcurrent || strings.Count(out, "429 ") != 1 {
				t.Errorf("got %s, want %d of 200 and one 429", out, devConcurrent)
			}
		},
		"what the key may": contains(`"remaining":{"burst":`),
		"the keys of the instance": func(t *testing.T, out string) {
			contains(`"name":"demo"`)(t, out)
			contains(`"name":"my-api-key"`)(t, out)
			contains(`"secret":"kwi_`)(t, out)
		},
		"revoke the demo key": contains(`"effectiveEverywhereAt"`),
		"the same from":       contains("my-api-key"),
	}
	_, blocks, _ := strings.Cut(lines, "# ")
	done := map[string]bool{}
	for block := range strings.SplitSeq(blocks, "\n# ") {
		title, commands, _ := strings.Cut(block, "\n")
		found := false
		for about, want := range wants {
			if strings.HasPrefix(title, about) {
				found, done[about] = true, true
				if about == "429 again" {
					time.Sleep((devConcurrent + 2) * time.Second) // as the line asks: a token a second comes back
				}
				want(t, paste(t, commands))
				if about == "revoke the demo key" {
					again := fmt.Sprintf(`curl -i -H "X-API-Key: $(cat %s)" %s/orders`, shellPath(state.SecretFile), state.Envoy)
					wants["401"](t, paste(t, again))
				}
			}
		}
		if !found {
			t.Errorf("this test does not know what %q should do", title)
		}
	}
	if len(done) != len(wants) {
		t.Errorf("only %v were printed", done)
	}
}

func TestShellPath(t *testing.T) {
	for _, path := range []string{"/plain/path-1_2.txt", "/with space", "/it's", `/"quoted"/$HOME/$(id)/;rm`, "/new\nline", "/ünïcode", "-n"} {
		out, err := exec.Command("sh", "-c", "printf %s "+shellPath(path)).Output()
		if err != nil || string(out) != path {
			t.Errorf("%q: a shell reads %q, %v", path, out, err)
		}
	}
}

// TestDevWithoutEnvoy says what to do before anything is made.
func TestDevWithoutEnvoy(t *testing.T) {
	t.Parallel()
	work := t.TempDir() // outside the source tree, which may have an Envoy
	program, err := exec.LookPath("keyward")
	if err != nil {
		t.Fatal(err)
	}
	for env, want := range map[string]string{
		"ENVOY_BIN=/nowhere/envoy": `ENVOY_BIN: "/nowhere/envoy" is not a program that can be run`,
		"ENVOY_BIN=":               `no Envoy found: run "make envoy" in keyward's source tree, put envoy on PATH, or set ENVOY_BIN to it`,
	} {
		cmd := exec.Command(program, "dev")
		cmd.Dir, cmd.Env = work, programEnv("PATH="+work, env)
		out, _ := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != exitError || !strings.Contains(string(out), want) {
			t.Errorf("%s: exit code %d: %s", env, code, out)
		}
	}
	if left, err := os.ReadDir(work); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}
