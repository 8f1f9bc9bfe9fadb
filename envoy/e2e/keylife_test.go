package e2e_test

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/manage"
)

// rotate gives a key another secret, and returns the key with that.
func (s *server) rotate(t testing.TB, k key, in admin.RotateInput) key {
	t.Helper()
	made, err := s.client.RotateKey(t.Context(), k.InstanceID, k.ID, in)
	if err != nil {
		t.Fatal(err)
	}
	s.canary.Add(made.Secret.Reveal())
	return key{made.Key, made.Secret.Reveal()}
}

// TestKeyLifeThroughEnvoy: what the Management API has answered is so for the next request of a client, in
// every step of a key's life.
func TestKeyLifeThroughEnvoy(t *testing.T) {
	t.Parallel()
	s := serve(t, config{})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	c := f.caller(t)
	wants := func(secret string, status int, when string) {
		t.Helper()
		c.get("/any", withKey(secret)).want(t, status, when)
	}
	done := func(effect manage.Effect, err error) {
		t.Helper()
		if err != nil || effect.Replicas.Confirmed != 1 || effect.Replicas.Total != 1 {
			t.Fatalf("got %+v, %v, want one replica that knows", effect, err)
		}
	}
	home := s.instance(t, admin.PolicyInput{})
	first, other := s.key(t, home, admin.KeyInput{}), s.key(t, home, admin.KeyInput{})
	wants(first.secret, http.StatusOK, "as soon as it is made")
	wants(other.secret, http.StatusOK, "another one")

	switched := func(disabled bool) {
		t.Helper()
		changed, err := s.client.UpdateKey(t.Context(), home, first.ID, admin.KeyPatch{Disabled: admin.To(disabled)})
		done(changed.Effect, err)
	}
	switched(true)
	wants(first.secret, http.StatusUnauthorized, "disabled")
	wants(other.secret, http.StatusOK, "another one, while the first is disabled")
	switched(false)
	wants(first.secret, http.StatusOK, "enabled")

	for _, disabled := range []bool{true, false} {
		changed, err := s.client.SwitchInstance(t.Context(), home, disabled)
		done(changed.Effect, err)
		want := http.StatusOK
		if disabled {
			want = http.StatusUnauthorized
		}
		wants(first.secret, want, fmt.Sprintf("its instance is disabled: %t", disabled))
		wants(other.secret, want, fmt.Sprintf("its instance is disabled: %t", disabled))
	}

	// Rotated: both, then only the new one, by hand or by time.
	second := s.rotate(t, first, admin.RotateInput{GracePeriod: "1h"})
	wants(first.secret, http.StatusOK, "the older secret, in its hour")
	wants(second.secret, http.StatusOK, "the newer secret")
	changed, err := s.client.RevokeGeneration(t.Context(), home, first.ID, 1)
	done(changed.Effect, err)
	wants(first.secret, http.StatusUnauthorized, "the older secret, ended")
	wants(second.secret, http.StatusOK, "the newer secret, alone")
	third := s.rotate(t, second, admin.RotateInput{GracePeriod: "2s"})
	until := third.Generations[1].ValidUntil
	for {
		before := time.Now()
		status := c.get("/any", withKey(second.secret)).status
		after := time.Now()
		switch {
		case status == http.StatusOK && before.After(until):
			t.Errorf("the older secret is accepted %v after its end", before.Sub(until))
		case status == http.StatusUnauthorized && !after.After(until):
			t.Errorf("the older secret is refused %v before its end", until.Sub(after))
		case status == http.StatusOK:
			time.Sleep(100 * time.Millisecond)
			continue
		case status != http.StatusUnauthorized:
			t.Errorf("the older secret gets %d", status)
		}
		break
	}
	wants(third.secret, http.StatusOK, "the newest secret")
	fourth := s.rotate(t, third, admin.RotateInput{GracePeriod: "0s"})
	wants(third.secret, http.StatusUnauthorized, "the older secret, ended by the rotation")
	wants(fourth.secret, http.StatusOK, "the newest secret")

	s.revoke(t, fourth)
	wants(fourth.secret, http.StatusUnauthorized, "revoked")
	wants(other.secret, http.StatusOK, "another one, at the end")
	revoked, err := s.client.RevokeKeys(t.Context(), home, admin.BulkRevocation{Filter: admin.KeyListInput{Status: "active"}, Count: new(1)})
	done(revoked.Effect, err)
	wants(other.secret, http.StatusUnauthorized, "revoked with all that are active")
}
