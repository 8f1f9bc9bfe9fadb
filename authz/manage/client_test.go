package manage

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func TestClientRoundTrip(t *testing.T) {
	d := open(t)
	c := NewClient(serve(t, d)+"/", d.owner, nil)
	ctx := t.Context()

	put, err := c.PutInstance(ctx, "a", admin.PolicyInput{Total: admin.LimitsInput{Rate: &admin.RateInput{Requests: new(9), Per: "1s"}, Burst: new(9)}})
	if err != nil || put.ID != "a" || put.Policy.Total.Burst != 9 {
		t.Fatalf("put: %+v, %v", put, err)
	}
	instance, err := c.Instance(ctx, "a")
	if err != nil || !cmp.Equal(instance, put.Instance) {
		t.Errorf("instance: %+v, %v", instance, err)
	}
	if all, err := c.Instances(ctx); err != nil || len(all) != 1 || !cmp.Equal(all[0], instance) {
		t.Errorf("instances: %+v, %v", all, err)
	}
	in := admin.KeyInput{
		Name: "n", Description: "d", Type: "user", UserPrincipalName: "ann@example.org", Scopes: []string{}, Environment: "prod",
		AllowedIPs: []string{"10.0.0.0/8"}, Limits: admin.LimitsInput{MaxConcurrent: new(-1)}, ExpiresIn: "1h",
		NotBefore: time.Now().UTC().Format(time.RFC3339), InactivityDays: new(3), Metadata: map[string]string{"k": "v"},
	}
	made, err := c.CreateKey(ctx, "a", in)
	if err != nil || made.Key.Scopes == nil || made.Key.Limits.MaxConcurrent != -1 {
		t.Fatalf("create: %+v, %v", made.Key, err)
	}
	if kind, err := (apikey.Format{}).Check(made.Secret.Reveal()); err != nil || kind != apikey.KindUser {
		t.Errorf("secret of kind %c, %v", kind, err)
	}
	if got, err := c.Key(ctx, "a", made.Key.ID); err != nil || !cmp.Equal(got, made.Key) {
		t.Errorf("key: %+v, %v", got, err)
	}
	if got, err := c.RevokeKey(ctx, "a", made.Key.ID, "ownerLeft"); err != nil || got.KeyID != made.Key.ID || got.EffectiveEverywhereAt.IsZero() {
		t.Errorf("revoke: %+v, %v", got, err)
	}
	if k, err := d.store.Key(ctx, "a", made.Key.ID); err != nil || k.RevokedReason != "ownerLeft" {
		t.Errorf("reason %q, %v", k.RevokedReason, err)
	}
	token, err := c.CreateToken(ctx, admin.TokenInput{Name: "n", Role: admin.RoleAuditor, InstanceID: "a", ExpiresIn: "1d"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewClient(serve(t, d), token.Secret, nil).Instances(ctx); err != nil {
		t.Errorf("the new token: %v", err)
	}
	if all, err := c.Tokens(ctx); err != nil || len(all) != 2 {
		t.Errorf("tokens: %+v, %v", all, err)
	}
	if got, err := c.RevokeToken(ctx, token.Token.ID); err != nil || got.TokenID != token.Token.ID {
		t.Errorf("revoke token: %+v, %v", got, err)
	}
	if all, err := c.Peppers(ctx); err != nil || len(all) != 1 {
		t.Errorf("peppers: %+v, %v", all, err)
	}
	if got, err := c.DeleteInstance(ctx, "a", false); err != nil || got.InstanceID != "a" {
		t.Errorf("delete: %+v, %v", got, err)
	}
}

func TestClientListsAllPages(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	_, err := d.store.Update(t.Context(), func(tx admin.Tx) error { // at once: this is about the list
		for i := range 2*pageSize + 1 {
			k := &apikey.Key{ID: apikey.ID{byte(i >> 8), byte(i), 1}, InstanceID: "a", Type: apikey.TypeInstance, Name: fmt.Sprint(i), CreatedAt: time.Now()}
			if err := tx.InsertKey(t.Context(), k); err != nil {
				return err
			}
		}
		return tx.Audit(t.Context(), admin.Event{At: time.Now(), Actor: "test", Action: "test"})
	})
	if err != nil {
		t.Fatal(err)
	}
	c := NewClient(serve(t, d), d.owner, nil)
	seen := map[apikey.ID]bool{}
	for k, err := range c.Keys(t.Context(), "a") {
		if err != nil {
			t.Fatal(err)
		}
		seen[k.ID] = true
	}
	if len(seen) != 2*pageSize+1 {
		t.Errorf("saw %d keys", len(seen))
	}
	for range c.Keys(t.Context(), "a") {
		break // which must not panic
	}
	for _, err := range c.Keys(t.Context(), "nobody") {
		if e, ok := errors.AsType[*Error](err); !ok || e.Status != 404 {
			t.Errorf("got %v", err)
		}
	}
}

func TestClientErrors(t *testing.T) {
	d := open(t)
	c := NewClient(serve(t, d), d.owner, nil)
	_, err := c.CreateKey(t.Context(), "a", admin.KeyInput{Type: "agent"})
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Status != 400 || e.Code != CodeInvalidRequest || e.Target != "name" || e.RequestID == "" || len(e.Details) != 2 {
		t.Fatalf("got %+v", e)
	}
	if text := e.Error(); !strings.Contains(text, "name: ") || !strings.Contains(text, "agentName: ") {
		t.Errorf("says %q", text)
	}
	_, err = NewClient(serve(t, d), apikey.Secret{}, nil).Instances(t.Context())
	if e, ok := errors.AsType[*Error](err); !ok || e.Status != 401 || strings.Contains(e.Error(), "HTTP status") {
		t.Errorf("got %v", err)
	}
	// More than the server reads, over a real connection.
	_, err = c.CreateKey(t.Context(), "a", admin.KeyInput{Name: "n", Description: strings.Repeat("x", 4*maxBody)})
	if e, ok := errors.AsType[*Error](err); err == nil || ok && e.Code != CodePayloadTooLarge {
		t.Errorf("got %v", err) // a broken connection is as good: the server did not read it all
	}
	for name, answer := range map[string]http.HandlerFunc{
		"another server": func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>")) },
		"a proxy": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "7")
			http.Error(w, "bad gateway", http.StatusBadGateway)
		},
	} {
		_, err := NewClient(serve(t, answer), d.owner, nil).Instances(t.Context())
		if err == nil || strings.Contains(err.Error(), "<html>") {
			t.Errorf("%s: got %v", name, err)
		}
		if e, ok := errors.AsType[*Error](err); ok && (e.Status != 502 || e.RetryAfter != 7*time.Second || !strings.Contains(e.Error(), " answers with HTTP status 502, and not as a Management API does")) {
			t.Errorf("%s: got %+v", name, e)
		}
		noCanary(t, err.Error(), d.owner)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Instances(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// A server that was taken over cannot send the token elsewhere.
func TestClientKeepsItsTokenToOneServer(t *testing.T) {
	stolen := ""
	thief := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { stolen += r.Header.Get("Authorization") }))
	secret := apikey.Format{}.New(apikey.KindManagement)
	asked := 0
	base := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		switch {
		case r.URL.Path == "/instances":
			http.Redirect(w, r, thief+"/instances", http.StatusTemporaryRedirect)
		case r.URL.Query().Get("cursor") == "":
			_, _ = fmt.Fprintf(w, `{"value":[],"nextLink":"%s/instances/a/apiKeys?cursor=x"}`, thief)
		default:
			_, _ = w.Write([]byte(`{"value":[]}`))
		}
	}))
	c := NewClient(base, secret, nil)
	if _, err := c.Instances(t.Context()); err == nil {
		t.Error("a redirect was taken for an answer")
	}
	for _, err := range c.Keys(t.Context(), "a") {
		t.Error(err)
	}
	if stolen != "" || asked != 3 {
		t.Errorf("asked the server %d times, the other got %d bytes of a token", asked, len(stolen))
	}
}
