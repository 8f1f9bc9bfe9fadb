package e2e_test

import (
	"net/http"
	"strings"
	"testing"

	"keyward/authz/admin"
)

// TestOlderSecretIsToldSoThroughEnvoy: the headers reach the client, and only who has the older secret.
func TestOlderSecretIsToldSoThroughEnvoy(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: "credentials: {deprecation: true}\n"})
	k := s.key(t, s.instance(t, admin.PolicyInput{}), admin.KeyInput{})
	newer := s.rotate(t, k, admin.RotateInput{}).secret
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
