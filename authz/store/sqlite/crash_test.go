package sqlite

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
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

// A step is one transaction in the life of a key.
type step struct {
	name  string
	write func(ctx context.Context, tx admin.Tx, k *apikey.Key) error
}

// The life of a key in the kill test: one transaction each, in this order, and what it writes. Every
// second key is removed in the end.
var life = []step{
	{"create", func(ctx context.Context, tx admin.Tx, k *apikey.Key) error {
		if _, err := tx.Instance(ctx, "tenant"); errors.Is(err, apikey.ErrNotFound) {
			if err := tx.PutInstance(ctx, &apikey.Instance{ID: "tenant", CreatedAt: time.Now()}); err != nil {
				return err
			}
		}
		return errors.Join(tx.InsertKey(ctx, k), tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 1}, digestOf(number(k)), 1))
	}},
	{"disable", func(ctx context.Context, tx admin.Tx, k *apikey.Key) error {
		k.Disabled = true
		return tx.UpdateKey(ctx, k)
	}},
	{"rotate", func(ctx context.Context, tx admin.Tx, k *apikey.Key) error {
		k.ExpirationDate = time.Now().Add(time.Hour)
		return errors.Join(tx.UpdateKey(ctx, k), tx.EndGeneration(ctx, k.ID, 1, time.Now(), false),
			tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 2}, digestOf(-number(k)), 1))
	}},
	{"revokeGeneration", func(ctx context.Context, tx admin.Tx, k *apikey.Key) error {
		return tx.EndGeneration(ctx, k.ID, 1, time.Now(), true)
	}},
	{"expire", func(ctx context.Context, tx admin.Tx, k *apikey.Key) error {
		return tx.MarkEnded(ctx, k.ID, time.Now())
	}},
	{"revoke", func(ctx context.Context, tx admin.Tx, k *apikey.Key) error {
		k.RevokedAt = time.Now()
		return tx.UpdateKey(ctx, k)
	}},
	{"remove", func(ctx context.Context, tx admin.Tx, k *apikey.Key) error { return tx.DeleteKey(ctx, "tenant", k.ID) }},
}

// number is that of a key of this test.
func number(k *apikey.Key) int {
	n, err := strconv.Atoi(strings.TrimPrefix(k.Name, "key "))
	if err != nil {
		panic(err)
	}
	return n
}

// stages is how many steps of life a key goes through.
func stages(n int) int { return len(life) - n%2 }

// child leads keys through their lives, from the number on that it reads first, and says so after each
// acknowledgement, until it is killed or its parent is gone. Zero: it only holds the store.
func child(path string) error {
	ctx := context.Background()
	var n int
	if _, err := fmt.Scan(&n); err != nil {
		return err
	}
	s, err := Open(ctx, Config{Path: path})
	if err != nil {
		return err
	}
	if n == 0 {
		fmt.Println("holding")
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	}
	for ; ; n++ {
		k := &apikey.Key{ID: keyID(n), InstanceID: "tenant", Type: apikey.TypeUser, UserPrincipalName: "ann", Name: fmt.Sprint("key ", n), CreatedAt: time.Now()}
		for stage, step := range life[:stages(n)] {
			_, err := s.Update(ctx, func(tx admin.Tx) error {
				return errors.Join(step.write(ctx, tx, k), tx.Audit(ctx, admin.Event{Action: "key." + step.name, Target: k.ID.String()}))
			})
			if err != nil {
				return err
			}
			if _, err := fmt.Println(n, stage); err != nil {
				return err // the parent is gone
			}
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
	acknowledged := map[int]int{} // the last stage of each key
	next, steps := 1, 0
	for round := range *kills {
		cmd, says := start(t, path, next)
		wait := time.Duration(rand.IntN(150)) * time.Millisecond
		first := true
		for says.Scan() {
			if first { // it is writing
				first = false
				time.AfterFunc(wait, func() { _ = cmd.Process.Kill() })
			}
			var n, stage int
			if _, err := fmt.Sscan(says.Text(), &n, &stage); err != nil {
				t.Fatalf("round %d: child: %q", round, says.Text())
			}
			acknowledged[n] = stage
			next = max(next, n+1)
			steps++
		}
		_ = cmd.Wait()
		if first {
			t.Fatalf("round %d: the child wrote nothing", round)
		}
		next = verify(t, path, acknowledged, next)
		if t.Failed() {
			t.Fatalf("round %d, killed %v after the first acknowledgement", round, wait)
		}
	}
	t.Logf("%d kills, %d steps of %d keys acknowledged", *kills, steps, len(acknowledged))
}

// verify opens the store as after any crash, and returns the next number that is free.
func verify(t *testing.T, path string, acknowledged map[int]int, next int) int {
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
	// The audit says how far each key has come; all else must say the same: a mutation is one thing.
	events, err := s.Events(ctx, 0, 1_000_000)
	if err != nil {
		t.Fatal(err)
	}
	stage := map[apikey.ID]int{}
	for _, e := range events {
		id, err := apikey.ParseID(e.Target)
		if err != nil {
			t.Fatal(err)
		}
		if e.Action != "key."+life[stage[id]].name {
			t.Fatalf("key %s: %s as step %d of its life", id, e.Action, stage[id])
		}
		stage[id]++
	}
	newest := map[apikey.ID]apikey.Revision{}
	changed := map[apikey.ID]int{}
	changes, head, truncated, err := s.Changes(ctx, 0)
	if err != nil || truncated {
		t.Fatalf("changes: truncated %t, error %v", truncated, err)
	}
	if int(head) != len(events) {
		t.Errorf("revision %d after %d transactions", head, len(events))
	}
	for _, c := range changes {
		changed[c.KeyID]++
		newest[c.KeyID] = c.Revision
	}
	for n, last := range acknowledged {
		if stage[keyID(n)] <= last {
			t.Errorf("key %d: %s was acknowledged and is gone", n, life[last].name)
		}
	}
	var want admin.KeyCounts
	for id, steps := range stage {
		n := int(binary.BigEndian.Uint64(id[:8]))
		next = max(next, n+1)
		done := func(name string) bool {
			return slices.IndexFunc(life, func(s step) bool { return s.name == name }) < steps
		}
		listed := steps
		if done("expire") { // which no cache need hear of
			listed--
		}
		if changed[id] != listed {
			t.Errorf("key %d: %d changes after %s, want %d", n, changed[id], life[steps-1].name, listed)
		}
		if done("remove") {
			if _, _, err := s.FindKey(ctx, digestOf(n)); !errors.Is(err, apikey.ErrNotFound) {
				t.Errorf("key %d was removed and is back: %v", n, err)
			}
			continue
		}
		k, _, err := s.FindKey(ctx, digestOf(n))
		if err != nil {
			t.Errorf("key %d is there by half: %v", n, err)
			continue
		}
		_, _, second := s.FindKey(ctx, digestOf(-n))
		var marked bool
		if err := s.writer.QueryRowContext(ctx, "SELECT ended_at <> "+neverSQL+" FROM keys WHERE id = ?", id[:]).Scan(&marked); err != nil {
			t.Error(err)
		}
		got := []bool{k.Disabled, second == nil, len(k.Generations) == 2, !k.ExpirationDate.IsZero(), !k.Generations[0].ValidUntil.IsZero(), k.Generations[0].Revoked, marked, !k.RevokedAt.IsZero()}
		rotated := done("rotate")
		if want := []bool{done("disable"), rotated, rotated, rotated, rotated, done("revokeGeneration"), done("expire"), done("revoke")}; !slices.Equal(got, want) {
			t.Errorf("key %d after %s: got %v, want %v", n, life[steps-1].name, got, want)
		}
		if k.Revision != newest[id] {
			t.Errorf("key %d has revision %d, its last change is %d", n, k.Revision, newest[id])
		}
		want.Total++
		switch {
		case done("revoke"):
			want.Revoked++
		case done("expire"):
			want.Expired++
		default:
			want.Usable++
			if done("disable") {
				want.Disabled++
			}
		}
	}
	for _, owner := range []admin.KeyOwner{{}, {Type: apikey.TypeUser, Name: "ann"}} {
		if got, err := s.CountKeys(ctx, "tenant", owner, time.Now()); err != nil || got != want {
			t.Errorf("%+v: counted %+v, error %v, want %+v", owner, got, err, want)
		}
	}
	return next
}
