package main

import (
	"database/sql"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

var (
	kills    = flag.Int("kills", 0, "rounds of TestKillLoop; 0: 30 in CI, 10 elsewhere")
	killSeed = flag.Uint64("killseed", 0, "seed of TestKillLoop; 0: a random one, which is logged")
)

// killMutations are all that writers make; TestKillLoop wants each of them.
var killMutations = []string{
	"bulk revoke", "create", "create token", "delete instance", "disable", "enable", "import", "patch", "put instance", "report", "revoke",
	"revoke generation", "revoke token", "rotate", "switch instance, disabled false", "switch instance, disabled true",
}

// TestKillLoop kills a server with SIGKILL at a random moment while writers make every change that there
// is, again and again on the same files. Each time all that was acknowledged is there and works or is
// refused, has its audit event, and is told again to who repeats it with its Idempotency-Key; what was not
// acknowledged was done with its event, or not at all; and the audit proves itself.
func TestKillLoop(t *testing.T) {
	t.Parallel()
	rounds, seed := *kills, *killSeed
	if rounds == 0 {
		rounds = 10
		if os.Getenv("CI") != "" {
			rounds = 30
		}
	}
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("%d rounds, -killseed %d", rounds, seed)
	random := rand.New(rand.NewPCG(seed, 0))

	dir, at := t.TempDir(), newPorts()
	if err := os.WriteFile(filepath.Join(dir, "keyward.yaml"), []byte("store: {sqlite: {path: keyward.db}}\npepper: {file: pepper}\nlog: {decisionsPerSecond: 0}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeNewPrivate(filepath.Join(dir, "pepper"), apikey.MarshalPepper(apikey.NewPepper(1, false))); err != nil {
		t.Fatal(err)
	}
	var err error
	var server *process
	t.Cleanup(func() {
		if server != nil {
			server.kill()
		}
	})
	web := &http.Client{Transport: &http.Transport{}, Timeout: patience}
	defer web.CloseIdleConnections()

	var acks atomic.Int64
	var mu sync.Mutex
	made := map[string]int{} // by what it is
	acked := func(what string) {
		mu.Lock()
		made[what]++
		mu.Unlock()
		acks.Add(1)
	}
	const writers = 4
	var all [writers]*killWriter
	var client *manage.Client
	done, not := 0, 0 // of the changes that were not acknowledged
	begin := func(round int) {
		t.Helper()
		if server, err = serve(dir, at, "--set", "listen.holders.address="+at.holders); err != nil {
			t.Fatalf("round %d: after the kill: %v", round, err)
		}
		if round == 0 {
			token, err := os.ReadFile(filepath.Join(dir, adminTokenFile))
			if err != nil {
				t.Fatal(err)
			}
			client = manage.NewClient("http://"+at.manage, apikey.NewSecret(strings.TrimSpace(string(token))), web)
			for i := range all {
				name := fmt.Sprintf("w%d", i)
				all[i] = &killWriter{
					name: name, client: client, manage: "http://" + at.manage, holders: "http://" + at.holders + "/revoke", web: web,
					random: rand.New(rand.NewPCG(seed, uint64(i+1))), acked: acked, events: map[string]int{},
					home: killTenant{id: name}, spare: killTenant{id: name + "-spare"},
				}
			}
		}
	}
	wantAll := func(round int, whole bool) {
		t.Helper()
		written := wantAudit(t, client, all[:])
		for _, w := range all {
			waited := w.pending != nil
			was, err := w.settle(t.Context(), written)
			if err != nil {
				t.Errorf("%s: %v", w.name, err)
			}
			switch {
			case was:
				done++
			case waited:
				not++
			}
		}
		conn, err := dialCheck(at.check) // anew: the last one is still shy of the port on which nobody answered
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for _, w := range all {
			if err := w.look(t.Context(), conn, whole); err != nil {
				t.Error(err)
			}
		}
		if whole {
			wantWhole(t, client, all[:], filepath.Join(dir, "keyward.db"))
			wantAudit(t, client, all[:])
		}
		if t.Failed() {
			t.Fatalf("round %d, -killseed %d", round, seed)
		}
	}
	for round := range rounds {
		begin(round)
		// Those of the last round, and some of the earlier ones; now and then, and at the end, all. What is
		// damaged stays so: it is found late, not missed.
		wantAll(round, round%10 == 9)
		var running sync.WaitGroup
		failed := make(chan error, writers)
		for _, w := range all {
			running.Go(func() { failed <- w.run(t.Context()) })
		}
		enough := acks.Load() + 1 + random.Int64N(32)
		if err := eventually(func() error {
			select {
			case err := <-failed:
				return fatal{fmt.Errorf("while the server runs: %w", err)}
			default:
			}
			if acks.Load() < enough {
				return fmt.Errorf("only %d of %d acknowledgements; it says:\n%s", acks.Load(), enough, server.says())
			}
			return nil
		}); err != nil {
			t.Errorf("round %d, -killseed %d: %v", round, seed, err)
		}
		time.Sleep(time.Duration(random.IntN(3000)) * time.Microsecond) // anywhere in a transaction
		server.kill()
		running.Wait()
	}
	begin(rounds)
	wantAll(rounds, true)
	t.Logf("%d changes, of which a kill came before the answer to %d that were made and %d that were not: %v", acks.Load(), done, not, made)
	if got := slices.Sorted(maps.Keys(made)); rounds >= 30 && !slices.Equal(got, killMutations) {
		t.Errorf("too little was done to prove anything: %v, want each of %v", got, killMutations)
	}
	// Which way those went is chance: on a busy machine none may be killed between its commit and its answer.
	if rounds >= 30 && done+not == 0 {
		t.Error("no kill came while a change was on its way")
	}
}

// wantAudit looks whether the audit is whole and has what was acknowledged, and returns how often it has
// each event.
func wantAudit(t *testing.T, client *manage.Client, all []*killWriter) map[string]int {
	t.Helper()
	if report, err := client.AuditVerify(t.Context(), nil); err != nil || !report.Whole {
		t.Errorf("the audit: %+v, %v", report, err)
	}
	written := map[string]int{}
	for e, err := range client.AuditChain(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Outcome == admin.OutcomeDone {
			written[eventOf(e.Action, e.InstanceID, e.Target)]++
		}
	}
	for _, w := range all {
		for e, n := range w.events {
			if written[e] < n {
				t.Errorf("%s: %q was acknowledged %d times, the audit has it %d times", w.name, e, n, written[e])
			}
		}
	}
	return written
}

// wantWhole looks at all keys that there are, and at the file.
func wantWhole(t *testing.T, client *manage.Client, all []*killWriter, path string) {
	t.Helper()
	for _, w := range all {
		for _, i := range []*killTenant{&w.home, &w.spare} {
			if !i.exists {
				continue
			}
			known := map[apikey.ID]bool{}
			for _, k := range i.keys {
				known[k.id] = true
			}
			for k, err := range client.Keys(t.Context(), i.id) {
				if err != nil {
					t.Fatal(err)
				}
				if !known[k.ID] {
					t.Errorf("nobody made key %s %s of %s", k.ID, k.Name, i.id)
				}
			}
		}
	}
	db, err := sql.Open("sqlite", "file:"+path+"?mode=ro")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var sound string
	var dangling int
	if err := db.QueryRow("PRAGMA integrity_check").Scan(&sound); err != nil || sound != "ok" {
		t.Errorf("integrity: %s, %v", sound, err)
	}
	if err := db.QueryRow("SELECT count(*) FROM pragma_foreign_key_check").Scan(&dangling); err != nil || dangling != 0 {
		t.Errorf("%d rows point to nothing, %v", dangling, err)
	}
}
