package e2e_test

import (
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

// problem returns the members of a refusal's error, without the decision's id.
func (a answer) problem(t *testing.T) map[string]any {
	t.Helper()
	var body map[string]map[string]any
	if err := json.Unmarshal([]byte(a.body), &body); err != nil || len(body) != 1 || body["error"] == nil {
		t.Fatalf("got body %q, %v, want one error in JSON", a.body, err)
	}
	p := body["error"]
	if id, _ := p["decisionId"].(string); !decisionID.MatchString(id) {
		t.Errorf("got decisionId %q, want 32 hexadecimal digits", id)
	}
	delete(p, "decisionId")
	return p
}

// wantRefusal checks what all refusals have in common, and returns the error's members.
func (a answer) wantRefusal(t *testing.T, status int, what string) map[string]any {
	t.Helper()
	a.want(t, status, what)
	if a.seen != nil {
		t.Errorf("%s: refused, and at the upstream", what)
	}
	if len(a.body) > 1024 || a.header.Get("Content-Type") != "application/json" || a.header.Get("Cache-Control") != "no-store" {
		t.Errorf("%s: got %v and %d bytes, want small JSON that nobody stores", what, a.header, len(a.body))
	}
	return a.problem(t)
}

func TestUnauthorized(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	home := s.instance(t, admin.PolicyInput{})
	good := s.key(t, home, admin.KeyInput{}).secret
	other := s.key(t, home, admin.KeyInput{}).secret
	later := s.key(t, home, admin.KeyInput{NotBefore: time.Now().Add(time.Hour).Format(time.RFC3339)}).secret

	t.Run("ForEveryCauseAlike", func(t *testing.T) {
		t.Parallel()
		revoked := s.key(t, home, admin.KeyInput{})
		s.revoke(t, revoked)
		mistyped := []byte(good)
		mistyped[20] ^= 1
		if mistyped[20] < '0' {
			mistyped[20] = 'Z'
		}
		const none, bad = `Bearer realm="keyward"`, `Bearer realm="keyward", error="invalid_token"`
		c := f.caller(t)
		var first map[string]any
		for _, tt := range []struct {
			name      string
			lines     []string
			challenge string
		}{
			{"no key", nil, none},
			{"an empty header", []string{"X-API-Key:"}, none},
			{"the application's own token alone", []string{"Authorization: Bearer eyJhbGciOiJub25lIn0.e30.c2ln"}, none},
			{"unknown", []string{withKey(s.unknown(apikey.KindInstance))}, bad},
			{"unknown, in Authorization", []string{"Authorization: Bearer " + s.unknown(apikey.KindUser)}, bad},
			{"a wrong checksum", []string{withKey(string(mistyped))}, bad},
			{"too short", []string{withKey(good[:len(good)-1])}, bad},
			{"too long", []string{withKey(good + "x")}, bad},
			{"another prefix", []string{withKey("kwx" + good[3:])}, bad},
			{"in upper case", []string{withKey(strings.ToUpper(good))}, bad},
			{"another alphabet", []string{withKey(good[:20] + "-" + good[21:])}, bad},
			{"not ASCII", []string{withKey(good[:20] + "\xff" + good[21:])}, bad},
			{"anything", []string{withKey("secret")}, bad},
			{"very long", []string{withKey(strings.Repeat("x", 30_000))}, bad},
			{"a management token", []string{withKey(s.token(t, "for no request", ""))}, bad},
			{"revoked", []string{withKey(revoked.secret)}, bad},
			{"not valid yet", []string{withKey(later)}, bad},
			{"with a scheme", []string{withKey("Bearer " + good)}, bad},
			{"two different keys", []string{withKey(good), "X-Agent-Access-Token: " + other}, bad},
			{"two different keys, one in Authorization", []string{withKey(good), "Authorization: Bearer " + other}, bad},
			{"a good key and a wrong one", []string{withKey(good), "X-Agent-Access-Token: " + string(mistyped)}, bad},
			{"the header twice, with one key", []string{withKey(good), withKey(good)}, bad},
			{"the header twice, with two keys", []string{withKey(good), withKey(other)}, bad},
			{"a list of keys", []string{withKey(good + "," + good)}, bad},
			{"a list in Authorization", []string{"Authorization: Bearer " + good + ", Bearer " + other}, bad},
			{"Authorization twice", []string{"Authorization: Bearer eyJhbGciOiJub25lIn0.e30.c2ln", "Authorization: Bearer " + good}, bad},
		} {
			a := c.get("/any", tt.lines...)
			p := a.wantRefusal(t, http.StatusUnauthorized, tt.name)
			if first == nil {
				first = p
			}
			if diff := cmp.Diff(first, p); diff != "" {
				t.Errorf("%s: tells more than %q does:\n%s", tt.name, "no key", diff)
			}
			if got := a.header.Values("WWW-Authenticate"); !slices.Equal(got, []string{tt.challenge}) {
				t.Errorf("%s: got WWW-Authenticate %q, want %q", tt.name, got, tt.challenge)
			}
			names := []string{"Cache-Control", "Content-Length", "Content-Type", "Date", "Www-Authenticate"}
			if got := slices.Sorted(maps.Keys(a.header)); !slices.Equal(got, names) {
				t.Errorf("%s: got headers %v, want %v", tt.name, got, names)
			}
		}
		if first["code"] != "Unauthorized" || first["message"] == "" {
			t.Errorf("got %v", first)
		}
		c.get("/any", withKey(good), "X-Agent-Access-Token: "+good).want(t, http.StatusOK, "the same key in two headers")
		c.get("/any", withKey(" \t"+good+" ")).want(t, http.StatusOK, "white space around it")
	})

	t.Run("OnTheNextRequestAfterRevoking", func(t *testing.T) {
		t.Parallel()
		home := s.instance(t, admin.PolicyInput{})
		// A connection for each of Envoy's workers and more.
		callers := []*caller{f.caller(t), f.caller(t), f.caller(t), f.caller(t)}
		for i := range 50 {
			k := s.key(t, home, admin.KeyInput{})
			c := callers[i%len(callers)]
			c.get("/any", withKey(k.secret)).want(t, http.StatusOK, "a key that was just made")
			s.revoke(t, k)
			for _, c := range callers {
				c.get("/any", withKey(k.secret)).wantRefusal(t, http.StatusUnauthorized, "a key that was just revoked")
			}
		}
	})

	t.Run("ForARevokedKeyInFullUse", func(t *testing.T) {
		t.Parallel()
		home := s.instance(t, admin.PolicyInput{})
		for range 10 {
			k := s.key(t, home, admin.KeyInput{})
			var stop atomic.Bool
			var count atomic.Int32
			answers := make([][]answer, 3)
			var using sync.WaitGroup
			for i := range answers {
				c := f.caller(t)
				using.Go(func() {
					for !stop.Load() {
						a, err := c.once(requestText("GET", "/any", withKey(k.secret)))
						if err != nil {
							t.Error(err)
							return
						}
						answers[i] = append(answers[i], a)
						count.Add(1)
					}
				})
			}
			waitFor(t, "some use", func() bool { return t.Failed() || count.Load() > 10 })
			s.revoke(t, k)
			revoked, used := time.Now(), count.Load()
			waitFor(t, "some more use", func() bool { return t.Failed() || count.Load() > used+10 })
			stop.Store(true)
			using.Wait()
			before, after := 0, 0
			for _, a := range slices.Concat(answers...) {
				switch {
				case a.status == http.StatusOK && a.sent.After(revoked):
					t.Errorf("accepted %v after the revocation was acknowledged", a.sent.Sub(revoked))
				case a.status == http.StatusOK:
					before++
				case a.status == http.StatusUnauthorized && a.sent.After(revoked):
					after++
				}
			}
			if before == 0 || after == 0 {
				t.Errorf("%d uses before and %d after, want some of both", before, after)
			}
		}
	})

	t.Run("ToTheInstantOfExpiry", func(t *testing.T) {
		t.Parallel()
		k := s.key(t, home, admin.KeyInput{ExpiresIn: "2s"})
		if life := k.ExpirationDate.Sub(k.CreatedAt); life != 2*time.Second {
			t.Errorf("made for %v, want 2s", life)
		}
		c := f.caller(t)
		before, after := 0, 0
		for after < 5 {
			a := c.get("/any", withKey(k.secret))
			// Same machine, same clock. No tolerance: only what ran across the instant may be either.
			switch {
			case a.status == http.StatusOK && a.sent.After(k.ExpirationDate):
				t.Fatalf("accepted %v after it expired", a.sent.Sub(k.ExpirationDate))
			case a.status == http.StatusUnauthorized && a.came.Before(k.ExpirationDate):
				t.Fatalf("refused %v before it expired", k.ExpirationDate.Sub(a.came))
			case a.status == http.StatusOK:
				before++
			case a.status == http.StatusUnauthorized:
				after++
			default:
				t.Fatalf("got status %d", a.status)
			}
			time.Sleep(2 * time.Millisecond)
		}
		if before == 0 {
			t.Error("never accepted")
		}
	})

	t.Run("UntilTheInstantItBecomesValid", func(t *testing.T) {
		t.Parallel()
		from := time.Now().Add(1500 * time.Millisecond)
		k := s.key(t, home, admin.KeyInput{NotBefore: from.UTC().Format("2006-01-02T15:04:05.000000Z")})
		c := f.caller(t)
		for accepted := 0; accepted < 5; time.Sleep(2 * time.Millisecond) {
			a := c.get("/any", withKey(k.secret))
			switch {
			case a.status == http.StatusOK && a.came.Before(k.NotBefore):
				t.Fatalf("accepted %v too early", k.NotBefore.Sub(a.came))
			case a.status == http.StatusUnauthorized && a.sent.After(k.NotBefore):
				t.Fatalf("refused %v after it became valid", a.sent.Sub(k.NotBefore))
			case a.status == http.StatusOK:
				accepted++
			}
		}
	})

	t.Run("WhileItsInstanceIsDisabledOrGone", func(t *testing.T) {
		t.Parallel()
		home := s.instance(t, admin.PolicyInput{})
		k := s.key(t, home, admin.KeyInput{})
		c := f.caller(t)
		for range 5 {
			c.get("/any", withKey(k.secret)).want(t, http.StatusOK, "enabled")
			s.put(t, home, admin.PolicyInput{Disabled: true})
			c.get("/any", withKey(k.secret)).wantRefusal(t, http.StatusUnauthorized, "disabled")
			s.put(t, home, admin.PolicyInput{})
		}
		if _, err := s.client.DeleteInstance(t.Context(), home, true); err != nil {
			t.Fatal(err)
		}
		c.get("/any", withKey(k.secret)).wantRefusal(t, http.StatusUnauthorized, "gone")
	})
}

// token makes a management token of one instance, or of all.
func (s *server) token(t *testing.T, name, instance string) string {
	t.Helper()
	made, err := s.client.CreateToken(t.Context(), admin.TokenInput{Name: name, Role: admin.RoleOperator, InstanceID: instance})
	if err != nil {
		t.Fatal(err)
	}
	s.canary.Add(made.Secret.Reveal())
	return made.Secret.Reveal()
}

func TestForbidden(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	const home, away = "6F9619FF-8B86-D011-B42D-00CF4FC964FF", "away"
	s.put(t, home, admin.PolicyInput{})
	s.put(t, away, admin.PolicyInput{AllowedScopes: []string{"orders:read"}})
	reader := s.key(t, home, admin.KeyInput{Scopes: []string{"orders:read"}}).secret
	writer := s.key(t, home, admin.KeyInput{Scopes: []string{"orders:*"}}).secret
	agent := s.key(t, home, admin.KeyInput{Type: apikey.TypeAgent, AgentName: "sales"}).secret
	production := s.key(t, home, admin.KeyInput{Environment: "production"}).secret
	near := s.key(t, home, admin.KeyInput{AllowedIPs: []string{"127.0.0.0/8", "2001:db8::/32"}}).secret
	far := s.key(t, home, admin.KeyInput{AllowedIPs: []string{"203.0.113.7"}}).secret
	stranger := s.key(t, away, admin.KeyInput{}).secret
	lower := strings.ToLower(home)

	c := f.caller(t)
	for _, tt := range []struct {
		name, method, target string
		lines                []string
		message              string // "": allowed
	}{
		{"a scope that it has", "GET", "/orders", []string{withKey(reader)}, ""},
		{"HEAD is GET", "HEAD", "/orders", []string{withKey(reader)}, ""},
		{"a scope that it lacks", "POST", "/orders", []string{withKey(reader)}, "The key lacks the scope orders:write. Use a key that has it."},
		{"a scope that a wider one covers", "POST", "/orders", []string{withKey(writer)}, ""},
		{"a scope that the policy takes away", "POST", "/orders", []string{withKey(stranger)}, "The key lacks the scope orders:write. Use a key that has it."},
		{"no rule for the method, any key", "PUT", "/orders", []string{withKey(reader)}, ""},
		{"its own agent", "GET", "/agents/sales/chat", []string{withKey(agent)}, ""},
		{"another agent", "GET", "/agents/support/chat", []string{withKey(agent)}, "The key is for another agent."},
		{"its agent in another case", "GET", "/agents/Sales/chat", []string{withKey(agent)}, "The key is for another agent."},
		{"an agent, with a key for all", "GET", "/agents/support/chat", []string{withKey(reader)}, ""},
		{"no agent where one is required", "GET", "/chat", []string{withKey(agent)}, "The key is for one agent, and the request names none."},
		{"the agent as a parameter", "GET", "/chat?agent=sales", []string{withKey(agent)}, ""},
		{"another agent as a parameter", "GET", "/chat?agent=support", []string{withKey(agent)}, "The key is for another agent."},
		{"another agent, escaped", "GET", "/chat?%61gent=support", []string{withKey(agent)}, "The key is for another agent."},
		{"no agent, with a key for all", "GET", "/chat", []string{withKey(reader)}, ""},
		{"no agent named", "GET", "/any", []string{withKey(agent)}, ""},
		{"its own instance", "GET", "/instances/" + home + "/x", []string{withKey(reader)}, ""},
		{"its own instance in another case", "GET", "/instances/" + lower + "/x", []string{withKey(reader)}, ""},
		{"another instance", "GET", "/instances/" + away + "/x", []string{withKey(reader)}, "The key belongs to another instance."},
		{"its instance, with another's key", "GET", "/instances/" + home + "/x", []string{withKey(stranger)}, "The key belongs to another instance."},
		{"an instance that nobody has", "GET", "/instances/nobody/x", []string{withKey(reader)}, "The key belongs to another instance."},
		{"its own environment", "GET", "/environments/production/x", []string{withKey(production)}, ""},
		{"another environment", "GET", "/environments/staging/x", []string{withKey(production)}, "The key is for another environment."},
		{"an environment, with a key for all", "GET", "/environments/staging/x", []string{withKey(reader)}, ""},
		{"an address that is allowed", "GET", "/any", []string{withKey(near)}, ""},
		{"an address that is not", "GET", "/any", []string{withKey(far)}, "The key may not be used from this address."},
		{"an address that the client claims", "GET", "/any", []string{withKey(far), "X-Forwarded-For: 203.0.113.7", "X-Envoy-External-Address: 203.0.113.7", "X-Real-Ip: 203.0.113.7", "Forwarded: for=203.0.113.7"}, "The key may not be used from this address."},
	} {
		a := c.do(tt.method, tt.target, append(tt.lines, "Content-Length: 0")...)
		if tt.message == "" {
			a.want(t, http.StatusOK, tt.name)
			continue
		}
		p := a.wantRefusal(t, http.StatusForbidden, tt.name)
		if diff := cmp.Diff(map[string]any{"code": "Forbidden", "message": tt.message}, p); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
	for _, target := range []string{"/chat?agent=sales&agent=sales", "/chat?agent=", "/chat?agent=sa%zzles"} {
		if p := c.get(target, withKey(agent)).wantRefusal(t, http.StatusBadRequest, target); p["code"] != "InvalidRequest" {
			t.Errorf("%s: got %v", target, p)
		}
	}
}

func TestTwoInstancesDoNotSeeEachOther(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	a, b := s.instance(t, admin.PolicyInput{}), s.instance(t, admin.PolicyInput{})
	keyA, keyB := s.key(t, a, admin.KeyInput{}), s.key(t, b, admin.KeyInput{})
	ownerA := s.as(apikey.NewSecret(s.token(t, "a", a)))

	// On the way through Envoy.
	c := f.caller(t)
	c.get("/instances/"+a+"/x", withKey(keyA.secret)).want(t, http.StatusOK, "its own")
	c.get("/instances/"+b+"/x", withKey(keyA.secret)).wantRefusal(t, http.StatusForbidden, "the other's")
	if got := c.get("/any", withKey(keyB.secret)).want(t, http.StatusOK).seen.values("x-keyward-instance-id"); !slices.Equal(got, []string{b}) {
		t.Errorf("got instance %v, want %s", got, b)
	}

	// And in the Management API, where the other's things do not exist.
	notFound := func(what string, err error) {
		t.Helper()
		if answer, ok := errors.AsType[*manage.Error](err); !ok || answer.Status != http.StatusNotFound || answer.Code != manage.CodeNotFound {
			t.Errorf("%s: got %v, want 404", what, err)
		}
	}
	_, err := ownerA.Instance(t.Context(), b)
	notFound("the other instance", err)
	_, err = ownerA.Instance(t.Context(), "nobody")
	notFound("an instance that nobody has", err)
	_, err = ownerA.Key(t.Context(), b, keyB.ID)
	notFound("the other's key", err)
	_, err = ownerA.Key(t.Context(), a, keyB.ID)
	notFound("the other's key, as if it were its own", err)
	_, err = ownerA.CreateKey(t.Context(), b, admin.KeyInput{Name: "intruder"})
	notFound("a key in the other instance", err)
	_, err = ownerA.RevokeKey(t.Context(), b, keyB.ID, "")
	notFound("revoke the other's key", err)
	_, err = ownerA.RevokeKey(t.Context(), a, keyB.ID, "")
	notFound("revoke the other's key, as if it were its own", err)
	_, err = ownerA.PutInstance(t.Context(), b, admin.PolicyInput{Disabled: true})
	notFound("the other's policy", err)
	for _, err := range ownerA.Keys(t.Context(), b) {
		notFound("the other's keys", err)
	}
	instances, err := ownerA.Instances(t.Context())
	if err != nil || len(instances) != 1 || instances[0].ID != a {
		t.Errorf("got instances %v, %v, want %s alone", instances, err, a)
	}
	for k, err := range ownerA.Keys(t.Context(), a) {
		if err != nil || k.ID != keyA.ID {
			t.Errorf("got key %v, %v, want its own alone", k.ID, err)
		}
	}
	tokens, err := ownerA.Tokens(t.Context())
	for _, token := range tokens {
		if token.InstanceID != a {
			t.Errorf("got token %+v, want its own alone", token)
		}
	}
	if err != nil {
		if answer, ok := errors.AsType[*manage.Error](err); !ok || answer.Status != http.StatusForbidden {
			t.Errorf("tokens: got %v", err)
		}
	}
	c.get("/any", withKey(keyB.secret)).want(t, http.StatusOK, "the other's key after all that")
}
