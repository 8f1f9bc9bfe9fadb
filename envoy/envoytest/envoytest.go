// Package envoytest finds, starts and stops a real Envoy: for tests, and for keyward dev.
//
// [Find] says where an Envoy is, [Start] runs one with the configuration given to it, on ports that it
// chooses itself, so that many run side by side. In a test [Run] does both and cleans up.
// "make envoy" puts an Envoy into the project's own folder by fetch.py.
package envoytest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// DefaultVersion is the Envoy that keyward is developed against.
const DefaultVersion = "1.40.0"

// Versions lists the versions on which what depends on Envoy's behaviour is tested: the oldest that we
// support, one in the middle, and the default.
func Versions() []string { return []string{"1.36.4", "1.38.3", DefaultVersion} }

// ErrMissing is what [Find] wraps when there is no Envoy.
var ErrMissing = errors.New("no Envoy")

// Find returns the path of an Envoy. For [DefaultVersion], also named "", any Envoy that the user chose
// will do: $ENVOY_BIN, then envoy on PATH, then the project's own copy. For another version only the
// project's own copy.
//
// Errors: [ErrMissing], with what to do about it; another if $ENVOY_BIN names no program.
func Find(version string) (string, error) {
	if version == "" {
		version = DefaultVersion
	}
	isDefault := version == DefaultVersion
	if isDefault {
		if path := os.Getenv("ENVOY_BIN"); path != "" {
			// Never something else than what was asked for: that would hide a typing error.
			found, err := exec.LookPath(path)
			if err != nil {
				return "", fmt.Errorf("ENVOY_BIN: %q is not a program that can be run", path)
			}
			return filepath.Abs(found)
		}
		if path, err := exec.LookPath("envoy"); err == nil {
			return filepath.Abs(path)
		}
	}
	if root, ok := moduleRoot(); ok {
		if path, err := exec.LookPath(filepath.Join(root, ".envoy", version, "envoy")); err == nil {
			return path, nil
		}
	}
	if isDefault {
		return "", fmt.Errorf(`%w found: run "make envoy" in keyward's source tree, put envoy on PATH, or set ENVOY_BIN to it`, ErrMissing)
	}
	return "", fmt.Errorf(`%w %s found: run "make envoy VERSION=%[2]s" in keyward's source tree`, ErrMissing, version)
}

// moduleRoot is the folder of the go.mod that the working directory belongs to.
func moduleRoot() (string, bool) {
	dir, err := os.Getwd()
	if err != nil {
		return "", false
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, true
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", false
		}
		dir = parent
	}
}

// TB is what this package uses of testing.TB, so that keyward dev does not link package testing.
type TB interface {
	Helper()
	Cleanup(func())
	Failed() bool
	Logf(format string, args ...any)
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Need returns the path of an Envoy of that version. Where there is none it skips the test, saying why;
// in CI (the environment's CI is not empty) it fails it.
func Need(t TB, version string) string {
	t.Helper()
	path, err := Find(version)
	if errors.Is(err, ErrMissing) && os.Getenv("CI") == "" {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatalf("%v", err)
	}
	return path
}

// Run starts an Envoy of that version for a test, with [Need] for c.Binary, and stops it when the test
// has ended; the log of a failed test shows what Envoy said.
func Run(t TB, version string, c Config) *Process {
	t.Helper()
	c.Binary = Need(t, version)
	p, err := Start(context.Background(), c)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := p.Stop(); err != nil {
			t.Logf("%v", err)
		}
		if log := p.Log(); t.Failed() && log != "" {
			t.Logf("envoy %s:\n%s", version, log)
		}
	})
	return p
}
