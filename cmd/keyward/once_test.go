package main

import (
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"keyward/authz/apikey"
)

// TestLostAnswersMakeNothingTwice: where the answer to a command is lost on its way, the command asks again
// and shows what the first call made; there is one key, and one new secret of it.
func TestLostAnswersMakeNothingTwice(t *testing.T) {
	t.Parallel()
	dir, at := t.TempDir(), newPorts()
	if err := os.WriteFile(filepath.Join(dir, "keyward.yaml"), []byte("store: {sqlite: {path: keyward.db}}\npepper: {file: pepper}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeNewPrivate(filepath.Join(dir, "pepper"), apikey.MarshalPepper(apikey.NewPepper(1, false))); err != nil {
		t.Fatal(err)
	}
	server, err := serve(dir, at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.kill)

	// What stands between loses the next answer to a POST, or the whole call.
	var loseAnswer, loseCall atomic.Bool
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: at.manage})
	drop := func(w http.ResponseWriter) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_ = conn.(*net.TCPConn).SetLinger(0) // a reset, as of a machine that went away
		_ = conn.Close()
	}
	between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodPost && loseCall.CompareAndSwap(true, false):
			drop(w)
		case r.Method == http.MethodPost && loseAnswer.CompareAndSwap(true, false):
			proxy.ServeHTTP(httptest.NewRecorder(), r)
			drop(w)
		default:
			proxy.ServeHTTP(w, r)
		}
	}))
	defer between.Close()
	command := func(args ...string) string {
		t.Helper()
		code, out, said := tested(t, "", append(args, "--server", between.URL, "--token-file", filepath.Join(dir, adminTokenFile), "-q")...)
		if code != exitOK {
			t.Fatalf("%v: exit code %d: %s", args, code, said)
		}
		return strings.TrimSpace(out)
	}
	works := func(secret string) {
		t.Helper()
		conn, err := dialCheck(at.check)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got, err := conn.status(secret, http.MethodGet, "/"); err != nil || got != http.StatusOK {
			t.Errorf("a secret that was shown gets %d, %v", got, err)
		}
	}
	command("instances", "put", "demo")
	for _, lose := range []*atomic.Bool{&loseAnswer, &loseCall} {
		lose.Store(true)
		works(command("keys", "create", "demo", "--name", "one"))
		ids := strings.Fields(command("keys", "list", "demo", "--status", "active"))
		if lose.Load() || len(ids) != 1 {
			t.Fatalf("the answer was lost: %t; %d keys, want one", !lose.Load(), len(ids))
		}
		lose.Store(true)
		works(command("keys", "rotate", "demo", ids[0]))
		if got := strings.Count(command("keys", "get", "demo", ids[0], "-o", "json"), `"number"`); lose.Load() || got != 2 {
			t.Errorf("the answer was lost: %t; %d secrets, want two", !lose.Load(), got)
		}
		command("keys", "revoke", "demo", ids[0], "--yes")
	}
	// A script repeats the whole command.
	again := []string{"keys", "create", "demo", "--name", "two", "--idempotency-key", "release-7"}
	if first, second := command(again...), command(again...); first != second {
		t.Error("the same command with the same --idempotency-key shows another secret")
	}
	// Who cannot be reached at all is not asked twice.
	code, _, said := tested(t, "", "keys", "create", "demo", "--name", "x", "--server", "http://"+at.holders, "--token-file", filepath.Join(dir, adminTokenFile))
	if code != exitUnavailable || strings.Contains(said, "asking again") {
		t.Errorf("exit code %d: %s", code, said)
	}
}
