package main

import (
	"context"
	"database/sql"
	"flag"
	"fmt"
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
	kills    = flag.Int("kills", 0, "rounds of TestKillLoop; 0: 50 in CI, 10 elsewhere")
	killSeed = flag.Uint64("killseed", 0, "seed of TestKillLoop; 0: a random one, which is logged")
)

// An ackedKey is a key whose creation was acknowledged.
type ackedKey struct {
	id     apikey.ID
	secret string
	// asked and revoked: a revocation was sent, and acknowledged. Between the two it may or may not be done.
	asked, revoked bool
}

// A ledger is what a server has acknowledged. Safe for concurrent use.
type ledger struct {
	mu   sync.Mutex
	keys []*ackedKey
	acks atomic.Int64
}

// write creates keys through a Management API, and revokes some, until something fails.
func (l *ledger) write(ctx context.Context, c *manage.Client, random *rand.Rand) {
	var mine []*ackedKey
	for n := 0; ; n++ {
		created, err := c.CreateKey(ctx, "demo", admin.KeyInput{Name: fmt.Sprintf("key %d", n)})
		if err != nil {
			return
		}
		k := &ackedKey{id: created.Key.ID, secret: created.Secret.Reveal()}
		l.mu.Lock()
		l.keys = append(l.keys, k)
		l.mu.Unlock()
		l.acks.Add(1)
		mine = append(mine, k)
		if random.IntN(2) > 0 {
			continue
		}
		k = mine[random.IntN(len(mine))]
		l.mu.Lock()
		k.asked = true
		l.mu.Unlock()
		if _, err := c.RevokeKey(ctx, "demo", k.id, "other"); err != nil {
			return
		}
		l.mu.Lock()
		k.revoked = true
		l.mu.Unlock()
		l.acks.Add(1)
	}
}

// TestKillLoop kills a writing server with SIGKILL at a random moment, again and again on the same
// files: each time all that it acknowledged is there, works or is refused, and nothing is half-made.
func TestKillLoop(t *testing.T) {
	t.Parallel()
	rounds, seed := *kills, *killSeed
	if rounds == 0 {
		rounds = 10
		if os.Getenv("CI") != "" {
			rounds = 50
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

	acked := &ledger{}
	var client *manage.Client
	checked := 0 // keys of earlier rounds, each looked at once
	for round := range rounds {
		if server, err = serve(dir, at); err != nil {
			t.Fatalf("round %d: after the kill: %v", round, err)
		}
		if round == 0 {
			token, err := os.ReadFile(filepath.Join(dir, adminTokenFile))
			if err != nil {
				t.Fatal(err)
			}
			client = manage.NewClient("http://"+at.manage, apikey.NewSecret(strings.TrimSpace(string(token))), web)
			unbounded := admin.PolicyInput{Caps: admin.CapsInput{Instance: new(-1)}, Creation: admin.CreationInput{PerHour: new(-1)}}
			if _, err := client.PutInstance(t.Context(), "demo", unbounded); err != nil {
				t.Fatal(err)
			}
		}
		// Those of the last round, and some of the earlier ones; now and then, and at the end, all. What is
		// damaged stays so: it is found late, not missed.
		recent := slices.Clone(acked.keys[checked:])
		for range min(5, checked) {
			recent = append(recent, acked.keys[random.IntN(checked)])
		}
		wantAcked(t, client, at, recent)
		if round%5 == 1 {
			wantWhole(t, client, acked, filepath.Join(dir, "keyward.db"))
		}
		if t.Failed() {
			t.Fatalf("round %d, -killseed %d", round, seed)
		}
		checked = len(acked.keys)

		var writers sync.WaitGroup
		for range 4 {
			own := rand.New(rand.NewPCG(random.Uint64(), 0))
			writers.Go(func() { acked.write(t.Context(), client, own) })
		}
		enough := acked.acks.Load() + 1 + random.Int64N(16)
		if err := eventually(func() error {
			if acked.acks.Load() < enough {
				return fmt.Errorf("round %d: only %d of %d acknowledgements; it says:\n%s", round, acked.acks.Load(), enough, server.says())
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Duration(random.IntN(3000)) * time.Microsecond) // anywhere in a transaction
		server.kill()
		writers.Wait()
	}
	if server, err = serve(dir, at); err != nil {
		t.Fatal(err)
	}
	wantAcked(t, client, at, acked.keys)
	wantWhole(t, client, acked, filepath.Join(dir, "keyward.db"))
	revoked := 0
	for _, k := range acked.keys {
		if k.revoked {
			revoked++
		}
	}
	if len(acked.keys) < rounds || rounds >= 10 && revoked == 0 {
		t.Errorf("too little was written to prove anything: %d keys, %d revoked", len(acked.keys), revoked)
	}
	t.Logf("%d creates and %d revocations were acknowledged before a kill", len(acked.keys), revoked)
}

// wantAcked asks for each key, and with each key.
func wantAcked(t *testing.T, client *manage.Client, at ports, keys []*ackedKey) {
	t.Helper()
	conn, err := dialCheck(at.check) // anew: the last one is still shy of the port on which nobody answered
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, k := range keys {
		if _, err := client.Key(t.Context(), "demo", k.id); err != nil {
			t.Errorf("key %s was acknowledged: %v", k.id, err)
		}
		got, err := conn.status(k.secret, http.MethodGet, "/")
		switch {
		case err != nil:
			t.Errorf("key %s: %v", k.id, err)
		case k.revoked && got != http.StatusUnauthorized:
			t.Errorf("key %s was revoked, acknowledged, and gets %d", k.id, got)
		case !k.asked && got != http.StatusOK:
			t.Errorf("key %s works no more: %d", k.id, got)
		case got != http.StatusOK && got != http.StatusUnauthorized:
			t.Errorf("key %s: %d", k.id, got)
		}
	}
}

// wantWhole looks at all keys that there are, acknowledged or not, and at the file.
func wantWhole(t *testing.T, client *manage.Client, acked *ledger, path string) {
	t.Helper()
	status := map[apikey.ID]string{}
	for k, err := range client.Keys(t.Context(), "demo") {
		if err != nil {
			t.Fatal(err)
		}
		if len(k.Generations) != 1 || k.Hint == "" {
			t.Errorf("key %s is half-made: %d generations", k.ID, len(k.Generations))
		}
		status[k.ID] = k.Status
	}
	for _, k := range acked.keys {
		if got := status[k.id]; k.revoked && got != "revoked" || !k.asked && got != "active" || got == "" {
			t.Errorf("key %s is %q: asked to revoke %t, acknowledged %t", k.id, got, k.asked, k.revoked)
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
