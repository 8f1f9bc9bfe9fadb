package e2e_test

import (
	"errors"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"testing"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
)

// TestOlderSecretIsToldSoThroughEnvoy: the headers reach the client, and only who has the older secret.
func TestOlderSecretIsToldSoThroughEnvoy(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: "credentials: {deprecation: true}\n"})
	k := s.key(t, s.instance(t, admin.PolicyInput{}), admin.KeyInput{})
	s.process.stop(t)
	newer := s.rotateOffline(t, k)
	s.restart(t)
	everyVersion(t, s, func(t *testing.T, f *front) {
		c := f.caller(t)
		old := c.get("/any", withKey(k.secret)).want(t, http.StatusOK, "the older secret")
		if got := old.header.Values("Deprecation"); len(got) != 1 || !strings.HasPrefix(got[0], "@") {
			t.Errorf("Deprecation %q", got)
		}
		if got := old.header.Values("Sunset"); len(got) != 1 {
			t.Errorf("Sunset %q", got)
		} else if _, err := http.ParseTime(got[0]); err != nil {
			t.Error(err)
		}
		if now := c.get("/any", withKey(newer)).want(t, http.StatusOK, "the newest"); now.header.Get("Deprecation")+now.header.Get("Sunset") != "" {
			t.Errorf("the newest secret is called old: %v", now.header)
		}
	})
}

// rotateOffline gives a key a newer secret while no server runs.
func (s *server) rotateOffline(t *testing.T, k key) string {
	t.Helper()
	text, err := os.ReadFile(s.path("pepper"))
	if err != nil {
		t.Fatal(err)
	}
	pepper, err := apikey.ParsePepper(text)
	if err != nil {
		t.Fatal(err)
	}
	peppers := apikey.Peppers{Current: pepper}
	store, err := sqlite.Open(t.Context(), sqlite.Config{Path: s.path("keyward.db"), Audit: admin.NewAuditKeys(peppers)})
	if err != nil {
		t.Fatal(err)
	}
	service := admin.New(store, admin.Config{Peppers: peppers}, nil, slog.New(slog.DiscardHandler))
	made, err := service.RotateKey(t.Context(), admin.Caller{Name: "test", Role: admin.RoleOwner}, k.InstanceID, k.ID, admin.RotateInput{}, 0)
	if err = errors.Join(err, store.Close()); err != nil {
		t.Fatal(err)
	}
	s.canary.Add(made.Secret.Reveal())
	return made.Secret.Reveal()
}
