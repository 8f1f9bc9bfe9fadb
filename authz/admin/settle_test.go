package admin_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/storetest"
	"keyward/authz/usage"
	"keyward/cache"
	"keyward/limits/local"
)

// The token that reference implementations agree on, and what the application keeps of it.
const (
	tokenInstance = "11111111-2222-3333-4444-555555555555"
	tokenID       = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
	tokenSalt     = "LqTT3d9tPF8RJqfzmsVnhC"
	tokenHash     = "QuqkFxrzS5VjSrsEU8P71nAj9xMKjutNBZsTNqWYPGgs4yPJLMFbYJFJTjeSiQiH7WEV62EawUMAQgX2cKthVjxA18TQETxJyrSPo3MEKzVML9WjvSvV8JPjjD3xGcWJJaYXWvmRqQb1EtNXusAiyf3Zre8TDHJcNsiVo2GD8nTFZWP"
	token         = "keya.NfYmD45x1VE4aLuxejdmSnhNKupGV6SY3PgqPFH4EBxLCuz8k.25SDHuoyL2qesXhJwG7ZzqxMuyS2xXhpNhVGXSzy5iR49jJfLvLFSP9LhWDFRxGhhSaREydkw4unBkiPifvMEvAyjPW7SYwVUVcKJDR.jtTBaL8RrVeEvQDkJ7cXaYa2eE3Xh7GN7bs49GeQGg8mFBCp4.6ywo1VdN1YNnohPCoRVXjqzs31usB8U18hQAUMz3TM6worfPf2mtMGVXbhzi6Wvj4pNMPAHxgztHZkLD9oQCHR4Q5SsZVvQUU3iuxK38e9XiFCHawfC8Y6tP3MmFR9TLfCDMGLANgF5Kd8uRr3xz1Pt1rn6JpStpKXYhpYqp12SZQK.ayek"
)

var keyOfToken, _ = apikey.ParseID(tokenID)

// tokenOf makes a token as the application does.
func tokenOf(instance, agent, id, random string) apikey.Secret {
	parts := []string{instance, instance + "~FoundationaLLM.Agent~agents~" + agent, id, random}
	for i, part := range parts {
		parts[i] = base58Of(part)
	}
	return apikey.NewSecret("keya." + strings.Join(parts, ".") + ".ayek")
}

func base58Of(s string) (text string) {
	const digits = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
	n, base, digit := new(big.Int).SetBytes([]byte(s)), big.NewInt(58), new(big.Int)
	for n.Sign() > 0 {
		n.DivMod(n, base, digit)
		text = string(digits[digit.Int64()]) + text
	}
	return strings.Repeat("1", len(s)-len(strings.TrimLeft(s, "\x00"))) + text
}

// wrongToken is another secret for the key of the token.
func wrongToken(n int) apikey.Secret {
	return tokenOf(tokenInstance, "demo-agent", tokenID, fmt.Sprintf("%0128d", n))
}

func hashed(change ...func(in *admin.ImportInput)) admin.ImportRow {
	in := admin.ImportInput{
		KeyInput: admin.KeyInput{Name: "n", AgentName: "demo-agent"},
		ID:       tokenID, Argon2ID: &admin.AgentHashInput{Salt: tokenSalt, Hash: tokenHash},
	}
	for _, fn := range change {
		fn(&in)
	}
	return admin.ImportRow{Number: 1, Input: in}
}

// slow is how long a hash takes in these tests: as long as a real one.
const slow = 300 * time.Millisecond

// A tokenGate decides as serve does, and counts what it hashes. A hash takes virtual time only.
type tokenGate struct {
	*desk
	store    *flaky
	replicas []*authz.Authorizer
	caches   []*cache.Cache

	hashes, atOnce, mostAtOnce atomic.Int64
}

// A flaky store is away where a test says so.
type flaky struct {
	admin.Store
	awayHashes, awayUpdates atomic.Bool
	panics                  atomic.Bool
	beforeUpdate            atomic.Pointer[func()] // run once
}

var errAway = fmt.Errorf("away: %w", apikey.ErrUndecided)

func (f *flaky) AgentHash(ctx context.Context, id apikey.ID) (apikey.AgentHash, error) {
	if f.panics.Load() {
		panic("on purpose")
	}
	if f.awayHashes.Load() {
		return apikey.AgentHash{}, errAway
	}
	return f.Store.AgentHash(ctx, id)
}

func (f *flaky) Update(ctx context.Context, fn func(admin.Tx) error) (apikey.Revision, error) {
	if run := f.beforeUpdate.Swap(nil); run != nil {
		(*run)()
	}
	if f.awayUpdates.Load() {
		return 0, errAway
	}
	return f.Store.Update(ctx, fn)
}

// inTokenGate runs fn in a bubble with as many replicas on one store. Their caches look at it by themselves
// once in an hour only.
func inTokenGate(t *testing.T, replicas int, fn func(t *testing.T, g *tokenGate)) {
	synctest.Test(t, func(t *testing.T) {
		d := &desk{pepper: apikey.NewPepper(1, false), log: new(bytes.Buffer)}
		peppers := apikey.Peppers{Current: d.pepper}
		g := &tokenGate{desk: d, store: &flaky{Store: storetest.NewMemory(admin.NewAuditKeys(peppers))}}
		d.store = g.store
		ctx, stop := context.WithCancel(context.Background())
		var running sync.WaitGroup
		var services []*admin.Service
		defer func() { stop(); running.Wait() }()
		for range replicas {
			facts, err := cache.New(g.store, cache.Config{Poll: time.Hour, Lease: 3 * time.Hour}, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			service := admin.New(g.store, admin.Config{Peppers: peppers, Format: acme}, facts, slog.New(slog.DiscardHandler))
			settler := admin.NewSettler(service, facts)
			settler.HashWith(func(random string, salt [16]byte) [128]byte {
				g.hashes.Add(1)
				if n := g.atOnce.Add(1); n > g.mostAtOnce.Load() {
					g.mostAtOnce.Store(n)
				}
				defer g.atOnce.Add(-1)
				time.Sleep(slow)
				return fastHash(random)
			})
			running.Go(func() { _ = facts.Run(ctx); facts.Close() })
			running.Go(func() { _ = settler.Run(ctx) })
			a, err := authz.New(authz.Config{Credentials: authz.Credentials{Format: acme}}, settlingFacts{decisionFacts{facts, g.store}, settler},
				local.New(local.Config{}, nil), peppers, usage.NewCounter(g.store, usage.Config{}, nil, slog.New(slog.DiscardHandler)), nobodyRedigests{})
			if err != nil {
				t.Fatal(err)
			}
			g.replicas, g.caches = append(g.replicas, a), append(g.caches, facts)
			services = append(services, service)
		}
		d.Service = services[0]
		time.Sleep(time.Second) // the caches have loaded what they need
		d.instance(t, tokenInstance)
		fn(t, g)
	})
}

type settlingFacts struct {
	decisionFacts
	*admin.Settler
}

var _ authz.Settler = settlingFacts{}

// fastHash stands for the slow one: of the reference token it is the reference hash.
func fastHash(random string) [128]byte {
	hash, err := apikey.ParseAgentHash(tokenSalt, tokenHash)
	if err != nil {
		panic(err)
	}
	if parsed, _ := apikey.ParseAgentToken(token); random != parsed.Random.Reveal() {
		hash.Hash[127]++
	}
	return hash.Hash
}

func (g *tokenGate) importHashed(t *testing.T, change ...func(in *admin.ImportInput)) {
	t.Helper()
	done, err := g.ImportKeys(t.Context(), root, tokenInstance, []admin.ImportRow{hashed(change...)}, false)
	if err != nil || !done.Done {
		t.Fatalf("import: %+v, %v", done, err)
	}
	_, rev, _ := g.store.FindKey(t.Context(), apikey.Digest{})
	for _, facts := range g.caches { // the others hear of it in their own time
		if err := facts.CatchUp(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
	}
}

// decide is one request, first without waiting, as an adapter does.
func (g *tokenGate) decide(ctx context.Context, replica int, secret apikey.Secret, peer string) (authz.Reason, error) {
	r := &authz.Request{Method: "GET", Host: "h", Path: "/", Peer: peer, Headers: []authz.Pair{{Name: "x-agent-access-token", Value: secret.Reveal()}}}
	d := new(authz.Decision)
	a := g.replicas[replica]
	ok, err := a.Try(r, d)
	if !ok {
		err = a.Decide(ctx, r, d)
	}
	if err == nil {
		a.TakeBack(ctx, d)
	}
	if err == nil && d.Reason == authz.ReasonUnknownKey && d.Key != nil {
		return d.Reason, errors.New("a key is named, and nothing is proved")
	}
	return d.Reason, err
}

func (g *tokenGate) wants(t *testing.T, what string, secret apikey.Secret, want authz.Reason, hashes int64) {
	t.Helper()
	before := g.hashes.Load()
	got, err := g.decide(t.Context(), 0, secret, "192.0.2.1")
	if err != nil || got != want {
		t.Errorf("%s: got %v, error %v, want %v", what, got, err, want)
	}
	if made := g.hashes.Load() - before; made != hashes {
		t.Errorf("%s: %d hashes were made, want %d", what, made, hashes)
	}
}

func reference() apikey.Secret { return apikey.NewSecret(token) }

// The real hash, of the vector that two other implementations agree on.
func TestReferenceHash(t *testing.T) {
	parsed, err := apikey.ParseAgentToken(token)
	if err != nil {
		t.Fatal(err)
	}
	want, err := apikey.ParseAgentHash(tokenSalt, tokenHash)
	if err != nil {
		t.Fatal(err)
	}
	if got := admin.HashAgentToken(parsed.Random.Reveal(), want.Salt); got != want.Hash {
		t.Errorf("got %s…", hex.EncodeToString(got[:8]))
	}
	if admin.AgentHashParameters != "m=8192,t=40,p=16" {
		t.Errorf("parameters: %s", admin.AgentHashParameters) // docs and OpenAPI name them
	}
	if made := tokenOf(tokenInstance, "demo-agent", tokenID, parsed.Random.Reveal()); made.Reveal() != token {
		t.Error("tokenOf makes others than the application")
	}
}

// The first request of its holder turns the hash into a digest; from then on nothing is hashed for the id.
func TestTheFirstUseSettles(t *testing.T) {
	inTokenGate(t, 1, func(t *testing.T, g *tokenGate) {
		g.wants(t, "before the import", reference(), authz.ReasonUnknownKey, 0)
		g.importHashed(t)
		g.wants(t, "wrong", wrongToken(1), authz.ReasonUnknownKey, 1)
		g.wants(t, "the same again", wrongToken(1), authz.ReasonUnknownKey, 0)
		g.wants(t, "another one", wrongToken(2), authz.ReasonUnknownKey, 1)
		g.wants(t, "the holder", reference(), authz.ReasonKey, 1)
		g.wants(t, "the holder again", reference(), authz.ReasonKey, 0)
		g.wants(t, "wrong, later", wrongToken(3), authz.ReasonUnknownKey, 0)
		g.wants(t, "wrong, as before", wrongToken(1), authz.ReasonUnknownKey, 0)
		if _, err := g.store.AgentHash(t.Context(), keyOfToken); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("the hash is still there: %v", err)
		}
		k, _, err := g.store.FindKey(t.Context(), g.pepper.DigestOf(apikey.KindForeign, token))
		if err != nil || k.ID != keyOfToken || k.CreatedBy != "import by test" {
			t.Errorf("found %+v, error %v", k, err)
		}
		events, err := g.store.FindEvents(t.Context(), admin.EventFilter{Action: "key.settle"}, admin.EventPlace{}, 10)
		if err != nil || len(events) != 1 || events[0].Target != tokenID || events[0].InstanceID != tokenInstance ||
			events[0].RemoteAddr != "192.0.2.1" || events[0].Actor != "keyward serve" {
			t.Errorf("audit: %+v, error %v", events, err)
		}
	})
}

// Ids, agents and instances in a token can be made up: only what agrees with the key costs a hash.
func TestOnlyTheKeysOwnTokenIsHashed(t *testing.T) {
	inTokenGate(t, 1, func(t *testing.T, g *tokenGate) {
		g.importHashed(t)
		g.instance(t, "other")
		parsed, _ := apikey.ParseAgentToken(token)
		random := parsed.Random.Reveal()
		const otherID = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeee0"
		for what, secret := range map[string]apikey.Secret{
			"another id":       tokenOf(tokenInstance, "demo-agent", otherID, random),
			"another agent":    tokenOf(tokenInstance, "other-agent", tokenID, random),
			"another instance": tokenOf("other", "demo-agent", tokenID, random),
			"127 bytes":        tokenOf(tokenInstance, "demo-agent", tokenID, random[:127]+"\x00\x00"),
		} {
			g.wants(t, what, secret, authz.ReasonUnknownKey, 0)
		}
		g.wants(t, "its own", reference(), authz.ReasonKey, 1)
	})
}

// A key that cannot be used costs no hash, and says no more than an unknown one.
func TestLifeComesBeforeTheHash(t *testing.T) {
	for what, c := range map[string]struct {
		change func(in *admin.ImportInput)
		then   func(t *testing.T, g *tokenGate)
		back   func(t *testing.T, g *tokenGate) // nil: there is no way back
	}{
		"disabled": {func(in *admin.ImportInput) { in.Disabled = true }, nil, func(t *testing.T, g *tokenGate) {
			g.patchToken(t, admin.KeyPatch{Disabled: admin.To(false)})
		}},
		"expired": {func(in *admin.ImportInput) { in.ExpiresIn = "1h" }, func(*testing.T, *tokenGate) { time.Sleep(61 * time.Minute) }, nil},
		"not yet valid": {func(in *admin.ImportInput) {
			in.NotBefore = time.Now().Add(24 * time.Hour).UTC().Format(time.RFC3339)
		}, nil, func(*testing.T, *tokenGate) {
			time.Sleep(25 * time.Hour)
		}},
		"idle": {func(in *admin.ImportInput) { in.InactivityDays = new(1) }, func(*testing.T, *tokenGate) { time.Sleep(25 * time.Hour) }, nil},
		"revoked": {nil, func(t *testing.T, g *tokenGate) {
			if _, err := g.RevokeKey(t.Context(), root, tokenInstance, keyOfToken, ""); err != nil {
				t.Fatal(err)
			}
		}, nil},
		"instance disabled": {nil, func(t *testing.T, g *tokenGate) {
			if _, err := g.PutInstance(t.Context(), root, tokenInstance, apikey.Policy{Disabled: true}); err != nil {
				t.Fatal(err)
			}
		}, func(t *testing.T, g *tokenGate) { g.instance(t, tokenInstance) }},
	} {
		t.Run(what, func(t *testing.T) {
			inTokenGate(t, 1, func(t *testing.T, g *tokenGate) {
				change := c.change
				if change == nil {
					change = func(*admin.ImportInput) {}
				}
				g.importHashed(t, change)
				if c.then != nil {
					c.then(t, g)
				}
				g.wants(t, "the holder", reference(), authz.ReasonUnknownKey, 0)
				if c.back != nil {
					c.back(t, g)
					g.wants(t, "the holder, later", reference(), authz.ReasonKey, 1)
				}
			})
		})
	}
}

func (g *tokenGate) patchToken(t *testing.T, p admin.KeyPatch) {
	t.Helper()
	if _, err := g.UpdateKey(t.Context(), root, tokenInstance, keyOfToken, p, 0); err != nil {
		t.Fatal(err)
	}
}

// A rotated key's first secret is over when its grace is, hash or not; the new one works at once.
func TestAPendingGenerationEnds(t *testing.T) {
	inTokenGate(t, 1, func(t *testing.T, g *tokenGate) {
		g.importHashed(t)
		next, err := g.RotateKey(t.Context(), root, tokenInstance, keyOfToken, admin.RotateInput{GracePeriod: "1h"}, 0)
		if err != nil {
			t.Fatal(err)
		}
		g.wants(t, "the new secret", next.Secret, authz.ReasonKey, 0)
		time.Sleep(61 * time.Minute)
		g.wants(t, "the old one", reference(), authz.ReasonUnknownKey, 0)
	})
}

// Whoever asks, and however many: one hash at a time, and those who cannot wait are told to come again.
func TestOneHashAtATime(t *testing.T) {
	inTokenGate(t, 1, func(t *testing.T, g *tokenGate) {
		g.importHashed(t)
		var all sync.WaitGroup
		var refused, busy atomic.Int64
		for i := range 200 {
			all.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond) // as Envoy's
				defer cancel()
				reason, err := g.decide(ctx, 0, wrongToken(i), fmt.Sprintf("192.0.2.%d", i))
				said, isBusy := errors.AsType[*apikey.BusyError](err)
				switch {
				case isBusy && said.RetryAfter == time.Second:
					busy.Add(1)
				case err == nil && reason == authz.ReasonUnknownKey:
					refused.Add(1)
				default:
					t.Errorf("got %v, error %v", reason, err)
				}
			})
		}
		all.Wait()
		synctest.Wait()
		if g.mostAtOnce.Load() != 1 || g.hashes.Load() != 1 || refused.Load() != 0 || busy.Load() != 200 {
			t.Errorf("%d hashes, %d at once, %d refused, %d told to come again, want 1, 1, 0, 200", g.hashes.Load(), g.mostAtOnce.Load(), refused.Load(), busy.Load())
		}
		// With more patience several get their turn, one after another.
		for i := range 20 {
			all.Go(func() {
				_, _ = g.decide(t.Context(), 0, wrongToken(1000+i), fmt.Sprintf("192.0.2.%d", i))
			})
		}
		all.Wait()
		time.Sleep(time.Minute)
		// After each that was wrong comes as long a rest: some of the machine is for the others.
		if n := g.hashes.Load(); g.mostAtOnce.Load() != 1 || n < 3 || n > 5 {
			t.Errorf("%d hashes in 2 s, %d at once", n, g.mostAtOnce.Load())
		}
	})
}

// Who was told to come again finds the key: what was begun for it went on.
func TestTheHoldersRequestsAreHashedOnce(t *testing.T) {
	inTokenGate(t, 1, func(t *testing.T, g *tokenGate) {
		g.importHashed(t)
		var all sync.WaitGroup
		for range 15 {
			all.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond)
				defer cancel()
				_, err := g.decide(ctx, 0, reference(), "192.0.2.1")
				if _, busy := errors.AsType[*apikey.BusyError](err); !busy {
					t.Errorf("got %v", err)
				}
			})
		}
		all.Wait()
		time.Sleep(slow)
		g.wants(t, "again", reference(), authz.ReasonKey, 0)
		if n := g.hashes.Load(); n != 1 {
			t.Errorf("%d hashes", n)
		}
	})
	inTokenGate(t, 1, func(t *testing.T, g *tokenGate) { // with patience they all wait for the one
		g.importHashed(t)
		var all sync.WaitGroup
		for range 15 {
			all.Go(func() {
				if got, err := g.decide(t.Context(), 0, reference(), "192.0.2.1"); err != nil || got != authz.ReasonKey {
					t.Errorf("got %v, error %v", got, err)
				}
			})
		}
		all.Wait()
		if n := g.hashes.Load(); n != 1 {
			t.Errorf("%d hashes", n)
		}
	})
}

// Guesses have the budget of unknown keys: 20 at once from one source.
func TestGuessesHaveABudget(t *testing.T) {
	inTokenGate(t, 1, func(t *testing.T, g *tokenGate) {
		g.importHashed(t)
		var all sync.WaitGroup
		var spent atomic.Int64
		for i := range 50 {
			all.Go(func() {
				_, err := g.decide(t.Context(), 0, wrongToken(i), "192.0.2.1")
				if said, busy := errors.AsType[*apikey.BusyError](err); busy && said.What == "too many unknown keys" {
					spent.Add(1)
				}
			})
		}
		synctest.Wait()
		if n := spent.Load(); n != 30 {
			t.Errorf("%d of 50 were told that there were too many, want all beyond 20", n)
		}
		_, err := g.decide(t.Context(), 0, wrongToken(50), "192.0.2.2")
		if said, busy := errors.AsType[*apikey.BusyError](err); busy && said.What == "too many unknown keys" {
			t.Errorf("from elsewhere: %v", err)
		}
		all.Wait()
	})
}

// A revocation that comes while the hash is made ends the key: nothing is written, and nobody gets in.
func TestRevokedWhileItIsHashed(t *testing.T) {
	inTokenGate(t, 1, func(t *testing.T, g *tokenGate) {
		g.importHashed(t)
		var all sync.WaitGroup
		all.Go(func() { g.wants(t, "the holder", reference(), authz.ReasonUnknownKey, 1) })
		time.Sleep(slow / 2)
		if _, err := g.RevokeKey(t.Context(), root, tokenInstance, keyOfToken, ""); err != nil {
			t.Error(err)
		}
		all.Wait()
		g.wants(t, "later", reference(), authz.ReasonUnknownKey, 0)
		if slices.Contains(g.actions(t), "key.settle") {
			t.Error("a revoked key was settled")
		}
	})
	// And one that waits for its turn meanwhile is not hashed at all.
	inTokenGate(t, 1, func(t *testing.T, g *tokenGate) {
		g.importHashed(t)
		var all sync.WaitGroup
		all.Go(func() { _, _ = g.decide(t.Context(), 0, wrongToken(1), "192.0.2.1") })
		time.Sleep(slow / 2)
		all.Go(func() {
			if got, err := g.decide(t.Context(), 0, reference(), "192.0.2.2"); err != nil || got != authz.ReasonUnknownKey {
				t.Errorf("got %v, error %v", got, err)
			}
		})
		synctest.Wait()
		if _, err := g.RevokeKey(t.Context(), root, tokenInstance, keyOfToken, ""); err != nil {
			t.Error(err)
		}
		all.Wait()
		if n := g.hashes.Load(); n != 1 {
			t.Errorf("%d hashes, want the first alone", n)
		}
	})
}

// A key that was removed and imported with another hash is not settled by the old one.
func TestAnotherHashMeanwhile(t *testing.T) {
	inTokenGate(t, 1, func(t *testing.T, g *tokenGate) {
		g.importHashed(t)
		again := func() {
			if _, err := g.DeleteInstance(t.Context(), root, tokenInstance, true); err != nil {
				t.Error(err)
			}
			g.instance(t, tokenInstance)
			g.importHashed(t, func(in *admin.ImportInput) { in.Argon2ID.Salt = base58Of("another salt, 16") })
		}
		g.store.beforeUpdate.Store(&again)
		// Its own hash is made once more, and in these tests that is the same one.
		g.wants(t, "the holder", reference(), authz.ReasonKey, 2)
	})
}

// While the store is away nobody is let in and nobody is refused for good; then all goes on.
func TestAnOutageIsNoVerdict(t *testing.T) {
	inTokenGate(t, 1, func(t *testing.T, g *tokenGate) {
		g.importHashed(t)
		for what, away := range map[string]*atomic.Bool{
			"the hash": &g.store.awayHashes, "the digest": &g.store.awayUpdates, "a panic": &g.store.panics,
		} {
			away.Store(true)
			for range 2 {
				_, err := g.decide(t.Context(), 0, reference(), "192.0.2.1")
				if _, busy := errors.AsType[*apikey.BusyError](err); !errors.Is(err, apikey.ErrUndecided) || busy {
					t.Errorf("%s: got %v", what, err)
				}
			}
			away.Store(false)
		}
		g.wants(t, "back again", reference(), authz.ReasonKey, 1)
	})
}

// What one replica settled the others find, though they have not heard of it; and what one knows to be
// settled it does not hash.
func TestSettledOnAnotherReplica(t *testing.T) {
	inTokenGate(t, 2, func(t *testing.T, g *tokenGate) {
		g.importHashed(t)
		for i, want := range []int64{1, 1} {
			if got, err := g.decide(t.Context(), i, reference(), "192.0.2.1"); err != nil || got != authz.ReasonKey || g.hashes.Load() != want {
				t.Errorf("replica %d: got %v, error %v, %d hashes", i, got, err, g.hashes.Load())
			}
		}
	})
	inTokenGate(t, 2, func(t *testing.T, g *tokenGate) { // both at once
		g.importHashed(t)
		var all sync.WaitGroup
		for i := range 2 {
			all.Go(func() {
				if got, err := g.decide(t.Context(), i, reference(), "192.0.2.1"); err != nil || got != authz.ReasonKey {
					t.Errorf("replica %d: got %v, error %v", i, got, err)
				}
			})
		}
		all.Wait()
		if events, err := g.store.FindEvents(t.Context(), admin.EventFilter{Action: "key.settle"}, admin.EventPlace{}, 10); err != nil || len(events) != 1 {
			t.Errorf("audit: %+v, error %v", events, err)
		}
	})
}

func TestImportByHash(t *testing.T) {
	d := importer(t)
	d.instance(t, tokenInstance)
	bring := func(dryRun bool, change ...func(in *admin.ImportInput)) admin.ImportedRow {
		t.Helper()
		done, err := d.ImportKeys(t.Context(), root, tokenInstance, []admin.ImportRow{hashed(change...)}, dryRun)
		if err != nil {
			t.Fatal(err)
		}
		return done.Rows[0]
	}
	for name, c := range map[string]struct {
		change func(in *admin.ImportInput)
		field  string
	}{
		"no id":              {func(in *admin.ImportInput) { in.ID = "" }, "id"},
		"no agent":           {func(in *admin.ImportInput) { in.AgentName = "" }, "agentName"},
		"another type":       {func(in *admin.ImportInput) { in.Type, in.AgentName = apikey.TypeInstance, "" }, "type"},
		"with a secret":      {func(in *admin.ImportInput) { in.Secret = token }, "argon2id"},
		"with a SHA-256":     {func(in *admin.ImportInput) { in.SHA256 = strings.Repeat("a", 64) }, "argon2id"},
		"no salt":            {func(in *admin.ImportInput) { in.Argon2ID.Salt = "" }, "argon2id.salt"},
		"cut hash":           {func(in *admin.ImportInput) { in.Argon2ID.Hash = tokenHash[:100] }, "argon2id.hash"},
		"other parameters":   {func(in *admin.ImportInput) { in.Argon2ID.Parameters = "m=65536,t=3,p=4" }, "argon2id.parameters"},
		"from before it was": {func(in *admin.ImportInput) { in.CreatedAt = "2999-01-01" }, "createdAt"},
	} {
		got := bring(false, c.change)
		bad, ok := errors.AsType[*apikey.InvalidError](got.Err)
		if !ok || bad.Field != c.field {
			t.Errorf("%s: got %v, want field %s", name, got.Err, c.field)
		}
	}
	if got := bring(true); got.Status != admin.RowImported {
		t.Errorf("dry run: %+v", got)
	}
	if _, err := d.store.AgentHash(t.Context(), keyOfToken); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("a dry run kept the hash: %v", err)
	}
	if got := bring(false, func(in *admin.ImportInput) { in.Argon2ID.Parameters = "m=8192,t=40,p=16" }); got.Status != admin.RowImported || got.KeyID != keyOfToken {
		t.Errorf("import: %+v", got)
	}
	if got := bring(false); got.Status != admin.RowExisting || got.KeyID != keyOfToken {
		t.Errorf("repeated: %+v", got)
	}
	if got := bring(false, func(in *admin.ImportInput) { in.Argon2ID.Salt = base58Of("another salt, 16") }); got.Status != admin.RowRefused || !got.KeyID.IsZero() {
		t.Errorf("with another hash: %+v", got)
	}
	if got := bring(false, func(in *admin.ImportInput) { in.AgentName = "other" }); got.Status != admin.RowRefused {
		t.Errorf("for another agent: %+v", got)
	}
	if done, err := d.ImportKeys(t.Context(), root, "a", []admin.ImportRow{hashed()}, false); err != nil || done.Rows[0].Status != admin.RowRefused {
		t.Errorf("in another instance: %+v, %v", done, err)
	}
	second := hashed()
	second.Number = 2
	second.Input.ID = strings.ToUpper("aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeee1")
	third := second
	third.Number, third.Input.ID = 3, strings.ToLower(second.Input.ID)
	done, err := d.ImportKeys(t.Context(), root, tokenInstance, []admin.ImportRow{second, third}, false)
	if bad, ok := errors.AsType[*apikey.InvalidError](done.Rows[1].Err); err != nil || !ok || bad.Field != "id" || !strings.Contains(bad.Reason, "row 2") {
		t.Errorf("twice in a batch: %+v, %v", done, err)
	}
	k, err := d.Key(t.Context(), root, tokenInstance, keyOfToken)
	if err != nil || k.Type != apikey.TypeAgent || k.AgentName != "demo-agent" || k.CreatedBy != "import by test" {
		t.Errorf("got %+v, %v", k, err)
	}

	// Once its holder has come, to import it again does no harm.
	digest := d.pepper.DigestOf(apikey.KindForeign, token)
	_, err = d.store.Update(t.Context(), func(tx admin.Tx) error {
		return errors.Join(tx.Settle(t.Context(), keyOfToken, digest, 1), tx.Audit(t.Context(), admin.Event{}))
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := bring(false); got.Status != admin.RowExisting || got.KeyID != keyOfToken {
		t.Errorf("repeated after its first use: %+v", got)
	}
	// Where no Agent Access Tokens are registered, no Check would know one.
	plain := d.with(d.store, apikey.Peppers{Current: d.pepper})
	if done, err := plain.ImportKeys(t.Context(), root, tokenInstance, []admin.ImportRow{hashed()}, false); err != nil || done.Done {
		t.Errorf("without the shape: %+v, %v", done, err)
	}
}
