// Package e2e_test keeps keyward's promises at its outside: the program itself, built and started as an
// operator does it, behind a real Envoy with the configuration that the program wrote for it. Requests
// are sent byte by byte where spelling matters, and what counts is what arrived at the upstream.
//
// Each test has keys of its own, so that many share one keyward and one Envoy and run at the same time.
// Whatever depends on Envoy's treatment of headers and paths runs on every version in
// envoytest.Versions. Real processes have a real clock: waiting is polling with a deadline, and no test
// depends on how fast the machine is.
//
// When a test's keyward has ended, everything that it and its Envoys wrote is searched for every secret
// that was made or sent (canary_test.go), and for reports of the race detector.
package e2e_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// program is the keyward under test.
var program string

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "keyward-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	program = filepath.Join(dir, "keyward")
	args := []string{"build", "-o", program}
	if raceEnabled {
		args = append(args, "-race")
	}
	build := exec.Command("go", append(args, "keyward/cmd/keyward")...)
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build keyward: %v\n%s", err, out)
		return 1
	}
	// Most of these tests wait most of the time: for a key to expire, a bucket to fill, a server to drain.
	if err := flag.Set("test.parallel", "16"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// patience is how long anything that has to come may take on a machine that is busy with other things.
const patience = 60 * time.Second

// waitFor polls until ok, and ends the test when it has waited in vain.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain for %s", what)
}
