package main

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

// A onceRequest is what a client sent last; secret is "" until it was acknowledged.
type onceRequest struct{ name, secret string }

// key is its Idempotency-Key, which has no spaces.
func (r onceRequest) key() string { return strings.ReplaceAll(r.name, " ", "-") }

// TestCreationIsRepeatedOverAKill kills a server with SIGKILL while clients create keys with an
// Idempotency-Key. Each client repeats its last request on the next server: whether the first one was
// done or not, and acknowledged or not, there is one key of it, and a secret that was shown is the secret.
// The audit of what all of these servers wrote is one whole chain.
func TestCreationIsRepeatedOverAKill(t *testing.T) {
	t.Parallel()
	rounds := *kills
	if rounds == 0 {
		rounds = 5
		if os.Getenv("CI") != "" {
			rounds = 20
		}
	}
	dir, at := t.TempDir(), newPorts()
	if err := os.WriteFile(filepath.Join(dir, "keyward.yaml"), []byte("store: {sqlite: {path: keyward.db}}\npepper: {file: pepper}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeNewPrivate(filepath.Join(dir, "pepper"), apikey.MarshalPepper(apikey.NewPepper(1, false))); err != nil {
		t.Fatal(err)
	}
	web := &http.Client{Transport: &http.Transport{}, Timeout: patience}
	defer web.CloseIdleConnections()
	var server *process
	t.Cleanup(func() {
		if server != nil {
			server.kill()
		}
	})
	const clients = 4
	var last [clients]onceRequest
	var client *manage.Client
	names := map[string]bool{}
	done, unacknowledged := 0, 0
	for round := range rounds + 1 {
		var err error
		if server, err = serve(dir, at); err != nil {
			t.Fatalf("round %d: %v", round, err)
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
		for _, r := range last {
			if r.name == "" {
				continue
			}
			names[r.name] = true
			if r.secret == "" {
				unacknowledged++
			}
			again, err := client.CreateKey(manage.WithIdempotencyKey(t.Context(), r.key()), "demo", admin.KeyInput{Name: r.name})
			if err != nil {
				t.Fatalf("round %d: %s: %v", round, r.name, err)
			}
			if r.secret != "" && again.Secret.Reveal() != r.secret {
				t.Errorf("round %d: %s was acknowledged, and the second answer has another secret", round, r.name)
			}
		}
		if round == rounds {
			break
		}
		var all sync.WaitGroup
		for i := range clients {
			all.Go(func() {
				for n := 0; ; n++ {
					r := onceRequest{name: fmt.Sprintf("round %d client %d key %d", round, i, n)}
					last[i] = r
					made, err := client.CreateKey(manage.WithIdempotencyKey(t.Context(), r.key()), "demo", admin.KeyInput{Name: r.name})
					if err != nil {
						return
					}
					last[i].secret = made.Secret.Reveal()
				}
			})
		}
		time.Sleep(time.Duration(20+rand.IntN(80)) * time.Millisecond) // anywhere in a request
		server.kill()
		all.Wait()
	}
	count := map[string]int{}
	for k, err := range client.Keys(t.Context(), "demo") {
		if err != nil {
			t.Fatal(err)
		}
		count[k.Name]++
		done++
	}
	for name, n := range count {
		if n != 1 {
			t.Errorf("%s was made %d times", name, n)
		}
	}
	for name := range names {
		if count[name] != 1 {
			t.Errorf("%s was repeated, and is there %d times", name, count[name])
		}
	}
	if unacknowledged == 0 || done < rounds {
		t.Errorf("too little happened to prove anything: %d keys, %d requests without an answer", done, unacknowledged)
	}
	if report, err := client.AuditVerify(t.Context(), nil); err != nil || !report.Whole {
		t.Errorf("the audit after %d kills: %+v, %v", rounds, report, err)
	}
	t.Logf("%d kills, %d keys, %d requests without an answer", rounds, done, unacknowledged)
}
