package manage

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A lateBody arrives when something has happened.
type lateBody struct {
	happen func()
	io.Reader
}

func (b *lateBody) Read(p []byte) (int, error) {
	if b.happen != nil {
		b.happen()
		b.happen = nil
	}
	return b.Reader.Read(p)
}

// sendLate sends a request whose head comes now, and its body after something has happened.
func (d *desk) sendLate(token apikey.Secret, method, target, body string, happen func(), headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, &lateBody{happen, strings.NewReader(body)})
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+token.Reveal())
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	d.ServeHTTP(w, r)
	return w
}

// events is how many the audit has.
func (d *desk) events(t *testing.T) int64 {
	t.Helper()
	head, err := d.svc.AuditHead(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	return head.Sequence
}

// Whoever has a stolen token could keep a request half sent, and end it when the token is revoked.
func TestATokenRevokedDuringItsRequestChangesNothing(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	key := d.key(t, "a").Key.ID.String()
	for _, request := range [][3]string{
		{"POST", "/tokens", `{"name":"back door","role":"owner"}`},
		{"POST", "/instances/a/apiKeys", `{"name":"back door"}`},
		{"POST", "/instances/a/apiKeys/" + key + "/rotate", `{}`},
		{"PATCH", "/instances/a/apiKeys/" + key, `{"name":"x"}`},
		{"POST", "/instances/a/apiKeys:import", rowsOf(1)[0]},
		{"POST", "/instances/a/apiKeys:revoke", `{"all":true}`},
		{"PUT", "/instances/a", `{"policy":{"disabled":true}}`},
	} {
		stolen := d.token(t, admin.TokenInput{Name: "stolen", Role: admin.RoleOwner})
		var before int64
		w := d.sendLate(stolen.Secret, request[0], request[1], request[2], func() {
			if _, err := d.svc.RevokeToken(t.Context(), root, stolen.Token.ID); err != nil {
				t.Error(err)
			}
			before = d.events(t)
		})
		wantError(t, w, 401, CodeUnauthorized, "")
		if more := d.events(t) - before; more != 0 || w.Header().Get("WWW-Authenticate") == "" {
			t.Errorf("%v: %d events more, headers %v", request, more, w.Header())
		}
		good := d.token(t, admin.TokenInput{Name: "good", Role: admin.RoleOwner})
		if w := d.sendLate(good.Secret, request[0], request[1], request[2], func() {}); w.Code/100 != 2 {
			t.Errorf("%v with a token that goes on: %d %s", request, w.Code, w.Body)
		}
	}
	// Nor is it told again what it made.
	maker := d.token(t, admin.TokenInput{Name: "maker", Role: admin.RoleOwner})
	once := []string{"Idempotency-Key", "k"}
	read[any](t, d.sendLate(maker.Secret, "POST", "/instances/a/apiKeys", `{"name":"n"}`, func() {}, once...), 201)
	w := d.sendLate(maker.Secret, "POST", "/instances/a/apiKeys", `{"name":"n"}`, func() {
		if _, err := d.svc.RevokeToken(t.Context(), root, maker.Token.ID); err != nil {
			t.Error(err)
		}
	}, once...)
	wantError(t, w, 401, CodeUnauthorized, "")
	// Its last act may be its own end.
	own := d.token(t, admin.TokenInput{Name: "own", Role: admin.RoleOwner})
	read[any](t, d.send(own.Secret, "DELETE", "/tokens/"+own.Token.ID.String(), ""), 200)
}

// The same of what ends by itself.
func TestATokenThatEndsDuringItsRequestChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSigner(t, "k", jose.RS256)
		i := &issuer{url: "https://login.example"}
		i.publish(s)
		d := trusting(t, &http.Client{Transport: inBubble{i}}, i.config())
		d.instance(t, "a")
		for name, token := range map[string]func() apikey.Secret{
			"ours": func() apikey.Secret {
				return d.token(t, admin.TokenInput{Name: "short", Role: admin.RoleOwner, ExpiresIn: "10s"}).Secret
			},
			"an issuer's": func() apikey.Secret { // and a minute of skew
				return s.sign(t, i.claims("roles", "owners", "exp", time.Now().Add(-50*time.Second).Unix()))
			},
		} {
			for long, status := range map[time.Duration]int{8 * time.Second: 201, 12 * time.Second: 401} {
				w := d.sendLate(token(), "POST", "/instances/a/apiKeys", `{"name":"n"}`, func() { time.Sleep(long) })
				if w.Code != status {
					t.Errorf("%s token of 10 s, a request of %s: got %d, want %d", name, long, w.Code, status)
				}
			}
		}
	})
}
