package admin_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
)

var root = admin.Caller{Name: "test", Role: admin.RoleOwner}

// A desk is a service on a new store, and what it logged.
type desk struct {
	*admin.Service
	store  admin.Store
	pepper *apikey.Pepper
	log    *bytes.Buffer
}

func openStore(t *testing.T) admin.Store {
	t.Helper()
	store, err := sqlite.Open(context.Background(), sqlite.Config{Path: filepath.Join(t.TempDir(), "keyward.db")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return store
}

func open(t *testing.T) *desk {
	t.Helper()
	d := &desk{store: openStore(t), pepper: apikey.NewPepper(1, false), log: new(bytes.Buffer)}
	d.Service = d.with(d.store, apikey.Peppers{Current: d.pepper})
	return d
}

func (d *desk) with(store admin.Store, peppers apikey.Peppers) *admin.Service {
	return admin.New(store, admin.Config{Peppers: peppers}, nil, slog.New(slog.NewTextHandler(d.log, nil)))
}

func (d *desk) instance(t *testing.T, id string) {
	t.Helper()
	// What bounds creation has tests of its own.
	if _, err := d.PutInstance(t.Context(), root, id, apikey.Policy{Creation: apikey.Creation{PerHour: apikey.Unlimited}}); err != nil {
		t.Fatal(err)
	}
}

func (d *desk) key(t *testing.T, instance string) admin.CreatedKey {
	t.Helper()
	made, err := d.CreateKey(t.Context(), root, instance, admin.KeyInput{Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// actions are those of the audit, in order.
func (d *desk) actions(t *testing.T) []string {
	t.Helper()
	events, err := d.store.Events(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	var actions []string
	for _, e := range events {
		actions = append(actions, e.Action)
	}
	return actions
}

func TestWhoMayDoWhat(t *testing.T) {
	const (
		yes, no, hidden = "yes", "forbidden", "not found"
	)
	ops := []struct {
		name string
		do   func(context.Context, *desk, admin.Caller, admin.CreatedKey) error
		// everywhere: by owner, operator, auditor of all instances.
		// At home: the same of the instance it is about. Abroad: the same of another.
		everywhere, home, abroad [3]string
	}{
		{"put instance", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			_, err := d.PutInstance(ctx, c, "a", apikey.Policy{})
			return err
		}, [3]string{yes, yes, no}, [3]string{yes, yes, no}, [3]string{hidden, hidden, hidden}},
		{"get instance", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			_, err := d.Instance(ctx, c, "a")
			return err
		}, [3]string{yes, yes, yes}, [3]string{yes, yes, yes}, [3]string{hidden, hidden, hidden}},
		{"list instances", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			all, err := d.Instances(ctx, c)
			if err == nil && !slices.ContainsFunc(all, func(in *apikey.Instance) bool { return in.ID == "a" }) {
				return apikey.ErrNotFound
			}
			return err
		}, [3]string{yes, yes, yes}, [3]string{yes, yes, yes}, [3]string{hidden, hidden, hidden}},
		{"delete instance", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			_, err := d.DeleteInstance(ctx, c, "a", true)
			return err
		}, [3]string{yes, no, no}, [3]string{yes, no, no}, [3]string{hidden, hidden, hidden}},
		{"create key", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			_, err := d.CreateKey(ctx, c, "a", admin.KeyInput{Name: "n"})
			return err
		}, [3]string{yes, yes, no}, [3]string{yes, yes, no}, [3]string{hidden, hidden, hidden}},
		{"get key", func(ctx context.Context, d *desk, c admin.Caller, k admin.CreatedKey) error {
			_, err := d.Key(ctx, c, "a", k.Key.ID)
			return err
		}, [3]string{yes, yes, yes}, [3]string{yes, yes, yes}, [3]string{hidden, hidden, hidden}},
		{"list keys", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			_, err := d.Keys(ctx, c, "a", admin.KeyQuery{Limit: 10})
			return err
		}, [3]string{yes, yes, yes}, [3]string{yes, yes, yes}, [3]string{hidden, hidden, hidden}},
		{"revoke key", func(ctx context.Context, d *desk, c admin.Caller, k admin.CreatedKey) error {
			_, err := d.RevokeKey(ctx, c, "a", k.Key.ID, "")
			return err
		}, [3]string{yes, yes, no}, [3]string{yes, yes, no}, [3]string{hidden, hidden, hidden}},
		{"create token for all instances", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			_, err := d.CreateToken(ctx, c, admin.TokenInput{Name: "n", Role: admin.RoleOwner})
			return err
		}, [3]string{yes, no, no}, [3]string{no, no, no}, [3]string{no, no, no}},
		{"create token for the instance", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			_, err := d.CreateToken(ctx, c, admin.TokenInput{Name: "n", Role: admin.RoleOwner, InstanceID: "a"})
			if bad, ok := errors.AsType[*apikey.InvalidError](err); ok && bad.Field == "instanceId" {
				return apikey.ErrNotFound
			}
			return err
		}, [3]string{yes, no, no}, [3]string{yes, no, no}, [3]string{hidden, no, no}},
		{"list tokens", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			all, err := d.Tokens(ctx, c)
			if err == nil && len(all) == 0 {
				return apikey.ErrNotFound
			}
			return err
		}, [3]string{yes, no, yes}, [3]string{yes, no, yes}, [3]string{hidden, no, hidden}},
		{"revoke token", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			tokens, err := d.Tokens(ctx, root)
			if err != nil {
				return err
			}
			_, err = d.RevokeToken(ctx, c, tokens[0].ID)
			return err
		}, [3]string{yes, no, no}, [3]string{yes, no, no}, [3]string{hidden, no, no}},
		{"list peppers", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			_, err := d.Peppers(ctx, c)
			return err
		}, [3]string{yes, no, yes}, [3]string{hidden, hidden, hidden}, [3]string{hidden, hidden, hidden}},
		{"retire pepper", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			err := d.RetirePepper(ctx, c, 1)
			if errors.Is(err, admin.ErrPepperInUse) {
				return nil // asked as one who may
			}
			return err
		}, [3]string{yes, no, no}, [3]string{hidden, hidden, hidden}, [3]string{hidden, hidden, hidden}},
		{"end sessions", func(ctx context.Context, d *desk, c admin.Caller, _ admin.CreatedKey) error {
			_, err := d.EndSessions(ctx, c, admin.WhoseSessions{All: true})
			return err
		}, [3]string{yes, no, no}, [3]string{hidden, hidden, hidden}, [3]string{hidden, hidden, hidden}},
	}
	d := open(t)
	if err := admin.OpenPeppers(t.Context(), d.store, apikey.Peppers{Current: d.pepper}, "test"); err != nil {
		t.Fatal(err)
	}
	for _, op := range ops {
		for place, want := range map[string][3]string{"": op.everywhere, "a": op.home, "b": op.abroad} {
			for i, role := range []admin.Role{admin.RoleOwner, admin.RoleOperator, admin.RoleAuditor} {
				d.instance(t, "a") // the one before may have deleted it
				d.instance(t, "b")
				k := d.key(t, "a")
				if _, err := d.CreateToken(t.Context(), root, admin.TokenInput{Name: "n", Role: admin.RoleAuditor, InstanceID: "a"}); err != nil {
					t.Fatal(err)
				}
				err := op.do(t.Context(), d, admin.Caller{Name: "test", Role: role, InstanceID: place}, k)
				got := yes
				if _, forbidden := errors.AsType[*admin.ForbiddenError](err); forbidden {
					got = no
				} else if errors.Is(err, apikey.ErrNotFound) {
					got = hidden
				} else if err != nil {
					got = err.Error()
				}
				if got != want[i] {
					t.Errorf("%s by %s of instance %q: got %s, want %s", op.name, role, place, got, want[i])
				}
			}
		}
	}
	for _, role := range []admin.Role{"", "user", "OWNER"} {
		if _, err := d.Instances(t.Context(), admin.Caller{Role: role}); err == nil {
			t.Errorf("role %q may read", role)
		}
	}
}

func TestCreatedKeyIsFoundByItsSecret(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	made, err := d.CreateKey(t.Context(), root, "a", admin.KeyInput{
		Name: "n", Type: "agent", AgentName: "x", Scopes: []string{}, Metadata: map[string]string{"k": "v"}, ExpiresIn: "1h",
	})
	if err != nil {
		t.Fatal(err)
	}
	if kind, err := (apikey.Format{}).Check(made.Secret.Reveal()); err != nil || kind != apikey.KindAgent {
		t.Errorf("secret of kind %c, %v", kind, err)
	}
	found, _, err := d.store.FindKey(t.Context(), d.pepper.Digest(made.Secret.Reveal()))
	if err != nil {
		t.Fatal(err)
	}
	found.Digest, found.Generation = apikey.Digest{}, 0
	if diff := cmp.Diff(made.Key, found); diff != "" {
		t.Errorf("created, found (-created +found)\n%s", diff)
	}
	if got, err := d.Key(t.Context(), root, "a", made.Key.ID); err != nil || !cmp.Equal(made.Key, got) {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestScopeOutsideThePolicyIsRefused(t *testing.T) {
	d := open(t)
	if _, err := d.PutInstance(t.Context(), root, "a", apikey.Policy{AllowedScopes: apikey.Scopes{"chat:*"}}); err != nil {
		t.Fatal(err)
	}
	for scope, ok := range map[string]bool{"chat:read": true, "chat:*": true, "*": false, "chat": false, "files:read": false} {
		_, err := d.CreateKey(t.Context(), root, "a", admin.KeyInput{Name: "n", Scopes: []string{scope}})
		no, forbidden := errors.AsType[*admin.ForbiddenError](err)
		if forbidden == ok || forbidden && no.Field != "scopes" {
			t.Errorf("%s: %v", scope, err)
		}
	}
	if _, err := d.CreateKey(t.Context(), root, "a", admin.KeyInput{Name: "n"}); err != nil {
		t.Errorf("a key that has what the policy allows: %v", err)
	}
}

func TestRevokingTwiceIsOneEvent(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	made := d.key(t, "a")
	first, err := d.RevokeKey(t.Context(), root, "a", made.Key.ID, apikey.RevokedKeyCompromise)
	if err != nil {
		t.Fatal(err)
	}
	again, err := d.RevokeKey(t.Context(), root, "a", made.Key.ID, apikey.RevokedOther)
	if err != nil {
		t.Fatal(err)
	}
	if !again.Key.RevokedAt.Equal(first.Key.RevokedAt) || again.Key.RevokedReason != apikey.RevokedKeyCompromise || !again.Propagation.Everywhere {
		t.Errorf("got %+v", again)
	}
	if got, want := d.actions(t), []string{"instance.put", "key.create", "key.revoke"}; !slices.Equal(got, want) {
		t.Errorf("audit: got %v, want %v", got, want)
	}
	found, _, err := d.store.FindKey(t.Context(), d.pepper.Digest(made.Secret.Reveal()))
	if err != nil || found.StatusAt(time.Now()) != apikey.StatusRevoked {
		t.Errorf("found %v, %v", found, err)
	}
	if _, err := d.RevokeKey(t.Context(), root, "a", apikey.ID{1}, ""); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("no such key: %v", err)
	}
	if _, err := d.RevokeKey(t.Context(), root, "a", made.Key.ID, "bored"); err == nil {
		t.Error("a reason that is none was accepted")
	}
}

// What was revoked earlier may still be on its way: a repeated call waits for it as the first did.
func TestRevokingAgainStillWaitsForReplicas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		made := d.key(t, "a")
		if err := d.store.Register(t.Context(), "behind", 2, time.Hour); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			begin := time.Now()
			got, err := d.RevokeKey(t.Context(), root, "a", made.Key.ID, "")
			if err != nil || got.Propagation.Everywhere || got.Propagation.Total != 1 || !got.Propagation.EffectiveEverywhereAt.After(begin) {
				t.Errorf("got %+v, %v", got, err)
			}
			if took := time.Since(begin); took < 5*time.Second {
				t.Errorf("waited %v", took)
			}
		}
		if err := d.store.Confirm(t.Context(), "behind", 3, time.Hour); err != nil {
			t.Fatal(err)
		}
		if got, err := d.RevokeKey(t.Context(), root, "a", made.Key.ID, ""); err != nil || !got.Propagation.Everywhere || got.Propagation.Confirmed != 1 {
			t.Errorf("got %+v, %v", got, err)
		}
	})
}

// A leaver cancels the caller's context while the transaction runs.
type leaver struct {
	admin.Store
	leave context.CancelFunc
}

func (l leaver) Update(ctx context.Context, fn func(admin.Tx) error) (apikey.Revision, error) {
	return l.Store.Update(ctx, func(tx admin.Tx) error {
		l.leave()
		return fn(tx)
	})
}

func TestCallerThatLeavesUndoesNothing(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	made := d.key(t, "a")
	ctx, leave := context.WithCancel(t.Context())
	svc := d.with(leaver{d.store, leave}, apikey.Peppers{Current: d.pepper})
	if _, err := svc.RevokeKey(ctx, root, "a", made.Key.ID, ""); err != nil {
		t.Fatal(err)
	}
	if k, err := d.store.Key(t.Context(), "a", made.Key.ID); err != nil || k.RevokedAt.IsZero() {
		t.Errorf("got %+v, %v; want it revoked", k, err)
	}
}

func TestDeleteInstance(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	made, bystander := d.key(t, "a"), d.key(t, "b")
	token, err := d.CreateToken(t.Context(), root, admin.TokenInput{Name: "n", Role: admin.RoleOwner, InstanceID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.DeleteInstance(t.Context(), root, "a", false); !errors.Is(err, admin.ErrInUse) {
		t.Fatalf("got %v, want in use", err)
	}
	if _, err := d.Key(t.Context(), root, "a", made.Key.ID); err != nil {
		t.Fatalf("a refused deletion took the key: %v", err)
	}
	if _, err := d.DeleteInstance(t.Context(), root, "a", true); err != nil {
		t.Fatal(err)
	}
	if _, _, err := d.store.FindKey(t.Context(), d.pepper.Digest(made.Secret.Reveal())); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("the key is still found: %v", err)
	}
	d.instance(t, "a") // another tenant takes the name
	if _, err := d.Authenticate(t.Context(), token.Secret); !errors.Is(err, admin.ErrUnauthenticated) {
		t.Errorf("the old tenant's token works: %v", err)
	}
	if _, err := d.Key(t.Context(), root, "b", bystander.Key.ID); err != nil {
		t.Errorf("another instance's key: %v", err)
	}
	if _, err := d.DeleteInstance(t.Context(), root, "a", false); err != nil {
		t.Errorf("without usable keys: %v", err)
	}
	if _, err := d.DeleteInstance(t.Context(), root, "a", true); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("twice: %v", err)
	}
}

func TestPutInstance(t *testing.T) {
	d := open(t)
	const upper = "9D3CA1B4-0000-4000-8000-0123456789AB"
	first, err := d.PutInstance(t.Context(), root, upper, apikey.Policy{})
	if err != nil || !first.Created || first.Instance.ID != strings.ToLower(upper) {
		t.Fatalf("got %+v, %v", first, err)
	}
	second, err := d.PutInstance(t.Context(), root, strings.ToLower(upper), apikey.Policy{Disabled: true})
	if err != nil || second.Created || !second.Instance.CreatedAt.Equal(first.Instance.CreatedAt) {
		t.Fatalf("got %+v, %v", second, err)
	}
	got, err := d.Instance(t.Context(), root, upper)
	if err != nil || !cmp.Equal(got, second.Instance) || !got.Policy.Disabled {
		t.Errorf("got %+v, %v, want %+v", got, err, second.Instance)
	}
	for id, field := range map[string]string{"": "instanceId", "1a": "instanceId", "a/b": "instanceId"} {
		_, err := d.PutInstance(t.Context(), root, id, apikey.Policy{})
		if bad, ok := errors.AsType[*apikey.InvalidError](err); !ok || bad.Field != field {
			t.Errorf("%q: got %v", id, err)
		}
	}
	_, err = d.PutInstance(t.Context(), root, "a", apikey.Policy{Total: apikey.Limits{MaxConcurrent: 3}})
	if bad, ok := errors.AsType[*apikey.InvalidError](err); !ok || bad.Field != "policy.total.maxConcurrent" {
		t.Errorf("got %v", err)
	}
}

func TestAuthenticate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		token := func(in admin.TokenInput) admin.CreatedToken {
			made, err := d.CreateToken(t.Context(), root, in)
			if err != nil {
				t.Fatal(err)
			}
			return made
		}
		d.instance(t, "a")
		good := token(admin.TokenInput{Name: "good", Role: admin.RoleOperator, InstanceID: "a"})
		brief := token(admin.TokenInput{Name: "brief", Role: admin.RoleOwner, ExpiresIn: "1h"})
		revoked := token(admin.TokenInput{Name: "revoked", Role: admin.RoleOwner})
		for range 2 { // repeatable
			if _, err := d.RevokeToken(t.Context(), root, revoked.Token.ID); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := d.Authenticate(t.Context(), brief.Secret); err != nil {
			t.Errorf("before its end: %v", err)
		}
		time.Sleep(time.Hour + time.Microsecond)
		mistyped := []byte(good.Secret.Reveal())
		mistyped[10] ^= 1
		for name, secret := range map[string]apikey.Secret{
			"none":         {},
			"garbage":      apikey.NewSecret("kwm_"),
			"mistyped":     apikey.NewSecret(string(mistyped)),
			"unknown":      apikey.Format{}.New(apikey.KindManagement),
			"a key":        d.key(t, "a").Secret,
			"expired":      brief.Secret,
			"revoked":      revoked.Secret,
			"with a space": apikey.NewSecret(good.Secret.Reveal() + " "),
		} {
			if _, err := d.Authenticate(t.Context(), secret); err != admin.ErrUnauthenticated { //nolint:errorlint // exactly: all causes look alike
				t.Errorf("%s: got %v", name, err)
			}
		}
		got, err := d.Authenticate(t.Context(), good.Secret)
		want := admin.Caller{Name: "token:" + good.Token.ID.String(), Role: admin.RoleOperator, InstanceID: "a"}
		if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(admin.Caller{})); err != nil || diff != "" {
			t.Errorf("%v (-want +got)\n%s", err, diff)
		}
	})
}

func TestAuthenticateWhileTheStoreIsAway(t *testing.T) {
	d := open(t)
	if err := d.store.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := d.Authenticate(t.Context(), apikey.Format{}.New(apikey.KindManagement))
	if !errors.Is(err, apikey.ErrUndecided) {
		t.Errorf("got %v, want an outage and no denial", err)
	}
}

func TestTokenMovesToTheNewPepper(t *testing.T) {
	d := open(t)
	token, err := d.CreateToken(t.Context(), root, admin.TokenInput{Name: "n", Role: admin.RoleOwner})
	if err != nil {
		t.Fatal(err)
	}
	next := apikey.NewPepper(2, false)
	if _, err := d.with(d.store, apikey.Peppers{Current: next}).Authenticate(t.Context(), token.Secret); !errors.Is(err, admin.ErrUnauthenticated) {
		t.Fatalf("without the old pepper: %v", err)
	}
	for _, peppers := range []apikey.Peppers{{Current: next, Previous: d.pepper}, {Current: next}} {
		if _, err := d.with(d.store, peppers).Authenticate(t.Context(), token.Secret); err != nil {
			t.Errorf("with %v: %v", peppers, err)
		}
	}
}

func TestTokenInputRefused(t *testing.T) {
	d := open(t)
	for _, tt := range []struct {
		field string
		in    admin.TokenInput
	}{
		{"name", admin.TokenInput{Role: admin.RoleOwner}},
		{"role", admin.TokenInput{Name: "n", Role: "users"}},
		{"role", admin.TokenInput{Name: "n"}},
		{"userPrincipalName", admin.TokenInput{Name: "n", Role: admin.RoleUser}},
		{"userPrincipalName", admin.TokenInput{Name: "n", Role: admin.RoleUser, UserPrincipalName: "a b"}},
		{"userPrincipalName", admin.TokenInput{Name: "n", Role: admin.RoleOwner, UserPrincipalName: "ann@example.com"}},
		{"instanceId", admin.TokenInput{Name: "n", Role: admin.RoleOwner, InstanceID: "nobody"}},
		{"expiresIn", admin.TokenInput{Name: "n", Role: admin.RoleOwner, ExpiresIn: "never"}},
	} {
		_, err := d.CreateToken(t.Context(), root, tt.in)
		if bad, ok := errors.AsType[*apikey.InvalidError](err); !ok || bad.Field != tt.field {
			t.Errorf("%+v: got %v, want an invalid %s", tt.in, err, tt.field)
		}
	}
}

func TestAuditKnowsAllAndHoldsNoSecret(t *testing.T) {
	d := open(t)
	caller := admin.Caller{Name: "token:x", Role: admin.RoleOwner, RemoteAddr: "192.0.2.1", RequestID: "r1"}
	if _, err := d.PutInstance(t.Context(), caller, "a", apikey.Policy{}); err != nil {
		t.Fatal(err)
	}
	made, err := d.CreateKey(t.Context(), caller, "a", admin.KeyInput{Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.RevokeKey(t.Context(), caller, "a", made.Key.ID, apikey.RevokedKeyCompromise); err != nil {
		t.Fatal(err)
	}
	token, err := d.CreateToken(t.Context(), caller, admin.TokenInput{Name: "n", Role: admin.RoleAuditor, InstanceID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.RevokeToken(t.Context(), caller, token.Token.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := d.DeleteInstance(t.Context(), caller, "a", false); err != nil {
		t.Fatal(err)
	}
	events, err := d.store.Events(t.Context(), 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		action, target string
		before, after  bool
	}{
		{"instance.put", "a", false, true},
		{"key.create", made.Key.ID.String(), false, true},
		{"key.revoke", made.Key.ID.String(), true, true},
		{"token.create", token.Token.ID.String(), false, true},
		{"token.revoke", token.Token.ID.String(), true, true},
		{"instance.delete", "a", true, false},
	} {
		if i >= len(events) {
			t.Fatalf("no event %s", want.action)
		}
		e := events[i]
		if e.Action != want.action || e.Target != want.target || e.InstanceID != "a" || (e.Before != nil) != want.before || (e.After != nil) != want.after {
			t.Errorf("event %d: got %+v, want %+v", i, e, want)
		}
		if e.Actor != "token:x" || e.RemoteAddr != "192.0.2.1" || e.RequestID != "r1" || time.Since(e.At) > time.Minute {
			t.Errorf("event %d does not say who or when: %+v", i, e)
		}
	}
	if !strings.Contains(string(events[2].After), `"revokedReason":"keyCompromise"`) {
		t.Errorf("the reason is not there: %s", events[2].After)
	}
	all, err := json.Marshal(events)
	if err != nil {
		t.Fatal(err)
	}
	noCanary(t, string(all)+d.log.String(), made.Secret, token.Secret)
	digest := d.pepper.Digest(made.Secret.Reveal())
	for _, form := range []string{hex.EncodeToString(digest[:8]), base64.StdEncoding.EncodeToString(digest[:9])} {
		if strings.Contains(string(all), form) {
			t.Error("the audit holds a digest")
		}
	}
}

// noCanary fails if text holds more of a secret than its hint.
func noCanary(t *testing.T, text string, secrets ...apikey.Secret) {
	t.Helper()
	for _, s := range secrets {
		if sent := s.Reveal(); strings.Contains(text, sent[4:20]) || strings.Contains(text, sent[20:40]) {
			t.Error("a secret leaked")
		}
	}
}
