package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A command that waits for its standard input ends when the user stops it, and does not wait for a line more.
func TestAStoppedCommandWaitsForNoInput(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("kwm_x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"self"},
		{"revoke-leaked"},
		{"keys", "import", "demo", "-", "--server", "http://127.0.0.1:1", "--token-file", token},
	} {
		silent, keepOpen := io.Pipe()
		ctx, stop := context.WithCancel(t.Context())
		stop()
		var out, said bytes.Buffer
		ended := make(chan int, 1)
		go func() { ended <- run(ctx, args, silent, &out, &said) }()
		select {
		case code := <-ended:
			if code != exitInterrupted || out.Len() > 0 {
				t.Errorf("%v: exit code %d, %s%s", args, code, &out, &said)
			}
		case <-time.After(time.Minute):
			t.Errorf("%v: still waits", args)
		}
		_ = keepOpen.Close()
	}
}
