package admin_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// repeatable is root with an Idempotency-Key.
func repeatable(route, key string) admin.Caller {
	c := root
	c.Once = &admin.Once{Key: key, Method: "POST", Route: route, Body: [32]byte{1}}
	return c
}

// TestRepeatedRotationIsOne: whoever repeats a rotation gets the secret that the first one made, whatever has
// become of the revision and of the places for secrets since.
func TestRepeatedRotationIsOne(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	made := d.key(t, "a")
	id, ctx := made.Key.ID, t.Context()
	caller := repeatable("rotate", "1")
	rotate := func(c admin.Caller, in admin.RotateInput) (admin.CreatedKey, error) {
		return d.RotateKey(ctx, c, "a", id, in, made.Key.Revision)
	}
	first, err := rotate(caller, admin.RotateInput{})
	if err != nil || first.Replayed || first.Secret.Reveal() == made.Secret.Reveal() {
		t.Fatalf("got %+v and error %v", first, err)
	}
	again, err := rotate(caller, admin.RotateInput{})
	if err != nil || !again.Replayed || again.Secret.Reveal() != first.Secret.Reveal() || len(again.Key.Generations) != 2 {
		t.Errorf("again: got %+v and error %v", again, err)
	}
	if _, err := rotate(repeatable("rotate", "2"), admin.RotateInput{}); !errors.Is(err, admin.ErrPrecondition) {
		t.Errorf("another Idempotency-Key: %v", err)
	}
	other := caller
	other.Once = &admin.Once{Key: "1", Method: "POST", Route: "rotate", Body: [32]byte{2}}
	if _, err := rotate(other, admin.RotateInput{}); !errors.Is(err, admin.ErrReplayBody) {
		t.Errorf("another body: %v", err)
	}
	if _, err := rotate(repeatable("create", "1"), admin.RotateInput{}); !errors.Is(err, admin.ErrPrecondition) {
		t.Errorf("another route: %v", err)
	}
	auditor := caller
	auditor.Role = admin.RoleAuditor
	if _, err := rotate(auditor, admin.RotateInput{}); err == nil {
		t.Error("who may not rotate was given the secret")
	}
	// Its end is the end of the answer, on this replica's clock or not.
	if _, err := d.RotateKey(ctx, root, "a", id, admin.RotateInput{EndOldest: true}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := d.RevokeGeneration(ctx, root, "a", id, 2); err != nil {
		t.Fatal(err)
	}
	_, err = d.store.Update(ctx, func(tx admin.Tx) error { // by a clock that is ahead
		return errors.Join(tx.EndGeneration(ctx, id, 2, time.Now().Add(time.Hour), true), tx.Audit(ctx, admin.Event{}))
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rotate(caller, admin.RotateInput{}); !errors.Is(err, admin.ErrReplayGone) {
		t.Errorf("a secret that was ended: %v", err)
	}
}

// TestRepeatedForTheLastPlaceIsOne: requests that are one request do not refuse each other, though there is
// room for one key, one creation and one more secret only.
func TestRepeatedForTheLastPlaceIsOne(t *testing.T) {
	d := open(t)
	ctx := t.Context()
	put := func(id string, p apikey.Policy) {
		t.Helper()
		if _, err := d.PutInstance(ctx, root, id, p); err != nil {
			t.Fatal(err)
		}
	}
	put("cap", apikey.Policy{Caps: apikey.Caps{Instance: 1}, Creation: apikey.Creation{PerHour: apikey.Unlimited}})
	put("rate", apikey.Policy{Creation: apikey.Creation{PerHour: 1}})
	put("rotate", apikey.Policy{})
	key := d.key(t, "rotate").Key
	for instance, do := range map[string]func(ctx context.Context, c admin.Caller) (admin.CreatedKey, error){
		"cap": func(ctx context.Context, c admin.Caller) (admin.CreatedKey, error) {
			return d.CreateKey(ctx, c, "cap", admin.KeyInput{Name: "n"})
		},
		"rate": func(ctx context.Context, c admin.Caller) (admin.CreatedKey, error) {
			return d.CreateKey(ctx, c, "rate", admin.KeyInput{Name: "n"})
		},
		"rotate": func(ctx context.Context, c admin.Caller) (admin.CreatedKey, error) {
			return d.RotateKey(ctx, c, "rotate", key.ID, admin.RotateInput{}, key.Revision)
		},
	} {
		var all sync.WaitGroup
		var secrets [20]string
		for i := range secrets {
			all.Go(func() {
				made, err := do(ctx, repeatable(instance, "1"))
				if err != nil {
					t.Errorf("%s: %v", instance, err)
					return
				}
				secrets[i] = made.Secret.Reveal()
			})
		}
		all.Wait()
		for _, s := range secrets {
			if s != secrets[0] {
				t.Errorf("%s: two answers have two secrets", instance)
				break
			}
		}
		if _, err := do(ctx, repeatable(instance, "2")); err == nil {
			t.Errorf("%s: there was room for more, so this proves nothing", instance)
		}
	}
}

// TestRepeatedTokenIsOne: requests for a management token that are one request make one token, however many arrive
// at once.
func TestRepeatedTokenIsOne(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	ctx, in := t.Context(), admin.TokenInput{Name: "n", Role: admin.RoleAuditor, InstanceID: "a"}
	var all sync.WaitGroup
	var secrets [20]string
	for i := range secrets {
		all.Go(func() {
			made, err := d.CreateToken(ctx, repeatable("token", "1"), in)
			if err != nil {
				t.Error(err)
				return
			}
			secrets[i] = made.Secret.Reveal()
		})
	}
	all.Wait()
	for _, s := range secrets {
		if s == "" || s != secrets[0] {
			t.Fatal("two answers have two secrets")
		}
	}
	tokens, err := d.Tokens(ctx, root)
	if err != nil || len(tokens) != 1 {
		t.Fatalf("%d tokens, %v", len(tokens), err)
	}
	other := repeatable("token", "1")
	other.Once.Body = [32]byte{2}
	if _, err := d.CreateToken(ctx, other, in); !errors.Is(err, admin.ErrReplayBody) {
		t.Errorf("another body: %v", err)
	}
	auditor := repeatable("token", "1")
	auditor.Role = admin.RoleAuditor
	if _, err := d.CreateToken(ctx, auditor, in); err == nil {
		t.Error("who may not make tokens was given the secret")
	}
	if _, err := d.RevokeToken(ctx, root, tokens[0].ID); err != nil {
		t.Fatal(err)
	}
	if _, err := d.CreateToken(ctx, repeatable("token", "1"), in); !errors.Is(err, admin.ErrReplayGone) {
		t.Errorf("a token that was revoked: %v", err)
	}
}
