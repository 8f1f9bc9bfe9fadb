package loopback_test

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"keyward/envoy/envoytest/loopback"
)

const many = 250 // more than a block

// TestMain: as a child it gives out addresses, and holds them until its input ends.
func TestMain(m *testing.M) {
	if os.Getenv("GIVE") == "" {
		os.Exit(m.Run())
	}
	for range many {
		_, _ = os.Stdout.WriteString(loopback.FreeAddress() + "\n")
	}
	_ = os.Stdout.Close()
	_, _ = os.Stdin.Read(make([]byte, 1))
}

// TestFreeAddress: processes side by side get no address twice, and a server can listen on each.
func TestFreeAddress(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	see := func(a string) {
		t.Helper()
		if seen[a] {
			t.Errorf("%s was given twice", a)
		}
		seen[a] = true
		l, err := net.Listen("tcp", a)
		if err != nil {
			t.Error(err)
			return
		}
		if err := l.Close(); err != nil { // as that of a server that is down
			t.Error(err)
		}
	}
	for range 8 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "GIVE=1")
		hold, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = hold.Close()
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
		})
		var text bytes.Buffer
		if _, err := text.ReadFrom(out); err != nil {
			t.Fatal(err)
		}
		for a := range strings.Lines(text.String()) {
			see(strings.TrimSpace(a))
		}
	}
	for range many {
		see(loopback.FreeAddress())
	}
	if len(seen) != 9*many {
		t.Errorf("%d addresses, want %d", len(seen), 9*many)
	}
}
