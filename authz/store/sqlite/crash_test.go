package sqlite

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

var kills = flag.Int("kills", 10, "rounds of the kill -9 test")

// childPath is set in the environment of this test's child processes.
const childPath = "KEYWARD_TEST_SQLITE_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childPath); path != "" {
		if err := child(path); err != nil {
			fmt.Println("failed", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// child creates keys and revokes every second one, from the number on that it reads first, and says so
// after each acknowledgement, until it is killed or its parent is gone. Zero: it only holds the store.
func child(path string) error {
	var n int
	if _, err := fmt.Scan(&n); err != nil {
		return err
	}
	s, err := Open(context.Background(), Config{Path: path})
	if err != nil {
		return err
	}
	if n == 0 {
		fmt.Println("holding")
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	}
	for ; ; n++ {
		if _, err := createKey(context.Background(), s, n); err != nil {
			return err
		}
		if _, err := fmt.Println("created", n); err != nil {
			return err // the parent is gone
		}
		if n%2 == 0 {
			if err := revokeKey(context.Background(), s, n); err != nil {
				return err
			}
			fmt.Println("revoked", n)
		}
	}
}

// start runs child in a process of its own; the end of the test ends it.
func start(t *testing.T, path string, n int) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childPath+"="+path)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
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
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if _, err := fmt.Fprintln(in, n); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewScanner(out)
}

func TestSecondProcessIsRefused(t *testing.T) {
	path := file(t)
	holder, says := start(t, path, 0)
	if !says.Scan() || says.Text() != "holding" {
		t.Fatalf("child: %q", says.Text())
	}
	_, err := Open(t.Context(), Config{Path: path})
	wantError(t, err, fmt.Sprintf("%s is in use by process %d", path, holder.Process.Pid))

	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = holder.Wait()
	mustCreate(t, open(t, path), 1) // a crash frees the lock

	// And the other way round: the child is refused, and names us.
	_, says = start(t, path, 0)
	if !says.Scan() || !strings.Contains(says.Text(), fmt.Sprintf("in use by process %d", os.Getpid())) {
		t.Errorf("child: %q", says.Text())
	}
}

// TestAcknowledgedSurvivesKill kills a writing process at a random moment, again and again on one file:
// everything that it acknowledged is there, and what it did not is there whole or not at all.
func TestAcknowledgedSurvivesKill(t *testing.T) {
	path := file(t)
	created, revoked := map[int]bool{}, map[int]bool{}
	next := 1
	for round := range *kills {
		cmd, says := start(t, path, next)
		wait := time.Duration(rand.IntN(150)) * time.Millisecond
		first := true
		for says.Scan() {
			if first { // it is writing
				first = false
				time.AfterFunc(wait, func() { _ = cmd.Process.Kill() })
			}
			what, number, _ := strings.Cut(says.Text(), " ")
			n, err := strconv.Atoi(number)
			switch {
			case err == nil && what == "created":
				created[n] = true
				next = max(next, n+1)
			case err == nil && what == "revoked":
				revoked[n] = true
			default:
				t.Fatalf("round %d: child: %q", round, says.Text())
			}
		}
		_ = cmd.Wait()
		if first {
			t.Fatalf("round %d: the child wrote nothing", round)
		}
		next = verify(t, path, created, revoked, next)
		if t.Failed() {
			t.Fatalf("round %d, killed %v after the first acknowledgement", round, wait)
		}
	}
	t.Logf("%d kills, %d creates and %d revocations acknowledged", *kills, len(created), len(revoked))
}

// verify opens the store as after any crash, and returns the next number that is free.
func verify(t *testing.T, path string, created, revoked map[int]bool, next int) int {
	t.Helper()
	ctx := t.Context()
	s, err := Open(ctx, Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	var sound string
	if err := s.writer.QueryRowContext(ctx, "PRAGMA integrity_check").Scan(&sound); err != nil || sound != "ok" {
		t.Errorf("integrity: %s, error %v", sound, err)
	}
	var broken int
	if err := s.writer.QueryRowContext(ctx, "SELECT count(*) FROM pragma_foreign_key_check").Scan(&broken); err != nil || broken != 0 {
		t.Errorf("%d rows point to nothing, error %v", broken, err)
	}
	for n := range created {
		k, _, err := s.FindKey(ctx, digestOf(n))
		if err != nil {
			t.Errorf("key %d was acknowledged and is gone: %v", n, err)
		} else if revoked[n] && k.RevokedAt.IsZero() {
			t.Errorf("key %d was revoked, acknowledged, and is back", n)
		}
	}
	// Each key has its generation, its digest, its audit event and its change: a mutation is one thing.
	audited := map[string]int{}
	all, err := s.Events(ctx, 0, 1_000_000)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		audited[e.Action+" "+e.Target]++
	}
	changed := map[apikey.ID]int{}
	changes, head, truncated, err := s.Changes(ctx, 0)
	if err != nil || truncated {
		t.Fatalf("changes: truncated %t, error %v", truncated, err)
	}
	for _, c := range changes {
		changed[c.KeyID]++
	}
	keys, err := s.Keys(ctx, "tenant", admin.KeyQuery{Limit: 1_000_000})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		n, err := strconv.Atoi(strings.TrimPrefix(k.Name, "key "))
		if err != nil {
			t.Fatal(err)
		}
		next = max(next, n+1)
		if _, _, err := s.FindKey(ctx, digestOf(n)); errors.Is(err, apikey.ErrNotFound) || len(k.Generations) != 1 {
			t.Errorf("key %d is there by half: %v, %d generations", n, err, len(k.Generations))
		}
		mutations := 1
		if !k.RevokedAt.IsZero() {
			mutations = 2
		}
		if audited["key.create "+k.ID.String()] != 1 || audited["key.revoke "+k.ID.String()] != mutations-1 || changed[k.ID] != mutations {
			t.Errorf("key %d has %d mutations, but audit events and changes are not one for each (%d changes)", n, mutations, changed[k.ID])
		}
	}
	if int(head) != len(all) {
		t.Errorf("revision %d after %d transactions", head, len(all))
	}
	return next
}
