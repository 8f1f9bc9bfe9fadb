package manage

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/limits/local"
)

// facts is a store as decisions see it, without a cache.
type facts struct{ admin.Store }

func (f facts) Cached(*apikey.Digest) (*apikey.Key, bool, error) { return nil, false, nil }
func (f facts) FindKey(ctx context.Context, d apikey.Digest, _ netip.Addr) (*apikey.Key, error) {
	k, _, err := f.Store.FindKey(ctx, d)
	return k, err
}

func (f facts) Instance(id string) *apikey.Instance {
	in, _ := f.Store.Instance(context.Background(), id)
	return in
}
func (f facts) Serving() error { return nil }
func (f facts) Decided(u authz.Use) {
	if u.Reason.Outcome() == authz.Allowed {
		panic("a use of " + u.Key.ID.String())
	}
}
func (f facts) Last(apikey.ID) time.Time    { return time.Time{} }
func (f facts) Redigest(_, _ apikey.Digest) { panic("an explanation wrote something down") }

var rules = []authz.Rule{
	{Path: "/"}, {Path: "/read", Scopes: apikey.Scopes{"orders:read"}}, {Path: "/open", Mode: authz.Public},
	{Path: "/chat", Context: "CoreAPI:Completions"},
}

func decides(t *testing.T, store admin.Store, peppers apikey.Peppers) *authz.Authorizer {
	t.Helper()
	f := facts{store}
	a, err := authz.New(authz.Config{Rules: rules}, f, local.New(local.Config{}, nil), peppers, f, f)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// step returns what became of a step.
func step(v admin.Verification, name string) admin.StepDone {
	for _, s := range v.Steps {
		if s.Step == name {
			return s
		}
	}
	return admin.StepDone{}
}

func TestVerifyTellsEachStepAndSpendsNothing(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	made, err := d.svc.CreateKey(t.Context(), root, "a", admin.KeyInput{Name: "n", Scopes: []string{"orders:write"}, Limits: admin.LimitsInput{Burst: new(1)}})
	if err != nil {
		t.Fatal(err)
	}
	foreign := d.key(t, "b")
	if w := d.send(d.owner, "PUT", "/instances/a/quotas/q", `{"name":"q","context":"CoreAPI:Completions","partition":"ApiKey","limit":1,"window":"1h","lockout":"2h"}`); w.Code != 201 {
		t.Fatal(w.Body)
	}
	secret, id := made.Secret.Reveal(), made.Key.ID.String()
	for range 3 { // the same each time: burst and quota are 1
		for _, tt := range []struct{ body, reason, last, answer string }{
			{`{"secret":"` + secret + `"}`, "key", "allowed", "allowed"},
			{`{"secret":"` + secret + `","path":"/chat"}`, "key", "allowed", "allowed"},
			{`{"keyId":"` + id + `","path":"/chat"}`, "key", "allowed", "allowed"},
			{`{"headers":[{"name":"X-API-Key","value":"` + secret + `"}]}`, "key", "allowed", "allowed"},
			{`{"secret":"` + secret + `","path":"/read"}`, "missing_scope", "right", "refused"},
			{`{"keyId":"` + id + `","path":"/read"}`, "missing_scope", "right", "refused"},
			{`{"secret":"` + secret + `","path":"/a//b"}`, "invalid_path", "path", "refused"},
			{`{"secret":"` + secret + `","path":"/open"}`, "public", "route", "allowed"},
			{`{"secret":"` + secret + `","headers":[{"name":"x-api-key","value":"` + foreign.Secret.Reveal() + `"}]}`, "ambiguous_credential", "credential", "refused"},
			{`{}`, "no_credential", "credential", "refused"},
			{`{"secret":"kwi_x"}`, "malformed_credential", "shape", "refused"},
			{`{"secret":"` + foreign.Secret.Reveal() + `"}`, "unknown_key", "known", "refused"},
			{`{"secret":"` + importable + `"}`, "unknown_key", "known", "refused"},
			{`{"secret":"` + secret + `","contextExtensions":{"instance":"b"}}`, "wrong_instance", "place", "refused"},
			{`{"secret":"` + secret + `","time":"1999-01-01T00:00:00Z","contextExtensions":{"required_scopes":"` + secret + `"}}`, "missing_scope", "right", "refused"},
		} {
			w := d.send(d.owner, "POST", "/instances/a/apiKeys:verify", tt.body)
			v := read[admin.Verification](t, w, 200)
			last := step(v, tt.last)
			if v.Reason != tt.reason || last.Answer != tt.answer || len(v.Steps) != 10 {
				t.Errorf("%s: got %s, %+v, want %s at %s", tt.body, v.Reason, v.Steps, tt.reason, tt.last)
			}
			noCanary(t, w.Body.String(), made.Secret, foreign.Secret)
			if tt.reason == "key" && (v.KeyID == nil || *v.KeyID != made.Key.ID || len(v.Limits) < 2 || v.Limits[0].Used != 0) {
				t.Errorf("%s: %+v", tt.body, v)
			}
		}
	}
	for _, body := range []string{
		`{"secret":"x","keyId":"` + id + `"}`, `{"clientAddress":"nowhere"}`, `{"time":"soon"}`, `{"contextExtensions":{"x":"y"}}`, `{"headers":[{"name":"","value":""}]}`,
	} {
		if w := d.send(d.owner, "POST", "/instances/a/apiKeys:verify", body); w.Code != 400 {
			t.Errorf("%s: %d %s", body, w.Code, w.Body)
		}
	}
	for _, body := range []string{`{"keyId":"` + foreign.Key.ID.String() + `"}`, `{"keyId":"x"}`} {
		wantError(t, d.send(d.owner, "POST", "/instances/a/apiKeys:verify", body), 404, CodeNotFound, "")
	}
	noCanary(t, d.log.String(), made.Secret, foreign.Secret)
	if k, err := d.store.Key(t.Context(), "a", made.Key.ID); err != nil || !k.LastUsedAt.IsZero() {
		t.Errorf("the key was used: %+v, %v", k, err)
	}
}

func TestLimitsOfKeyAreAllThatItCanMeet(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	for name, rest := range map[string]string{
		"everybody": `"partition":"None","context":"CoreAPI:Completions"`, "mine": `"partition":"ApiKey","context":"CoreAPI:Completions"`,
		"exempt": `"partition":"ApiKey","context":"CoreAPI:Completions"`, "other-agent": `"partition":"None","context":"CoreAPI:Completions:other","shadow":true`,
	} {
		if w := d.send(d.owner, "PUT", "/instances/a/quotas/"+name, `{"name":"`+name+`","limit":60,"window":"1m",`+rest+`}`); w.Code != 201 {
			t.Fatal(w.Body)
		}
	}
	w := d.send(d.owner, "POST", "/instances/a/apiKeys", `{"name":"n","type":"agent","agentName":"sales","limits":{"burst":3},"quotas":{"mine":{"limit":7},"exempt":{"limit":-1}}}`)
	id := read[struct{ Key admin.KeyRecord }](t, w, 201).Key.ID.String()
	got := read[admin.KeyLimitsNow](t, d.send(d.owner, "GET", "/instances/a/apiKeys/"+id+"/limits", ""), 200)
	var said []string
	for _, l := range got.Limits {
		text := l.Limit + l.Quota + " by " + l.CountedBy
		if l.Overridden {
			text += ", own"
		}
		if l.Most == 7 || l.Most == 3 || l.Most == -1 {
			text += ", as said"
		}
		said = append(said, text)
	}
	const want = "burst by key, own, as said; quotaeverybody by instance; quotamine by key, own, as said; concurrency by key; quotaexempt by key, own, as said"
	if text := strings.Join(said, "; "); text != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
}

func TestRefusalsAreRecalledWhereTheyBelong(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	own := d.key(t, "a")
	refuse := func(secret string) string {
		r := authz.Request{Method: "GET", Path: "/read", Headers: []authz.Pair{{Name: "x-api-key", Value: secret}}, Extensions: []authz.Pair{{Name: "instance", Value: "b"}}}
		var decision authz.Decision
		if err := d.decider.Decide(t.Context(), &r, &decision); err != nil {
			t.Fatal(err)
		}
		d.decider.Decided(&r, &decision, time.Now())
		return decision.ID.String()
	}
	id := refuse(own.Secret.Reveal())
	got := read[admin.RecentRefusal](t, d.send(d.owner, "GET", "/instances/a/decisions/"+id, ""), 200)
	if got.Reason != "wrong_instance" || got.HTTPStatus != 403 || got.KeyID == nil || *got.KeyID != own.Key.ID || got.Route != "/read" || got.DecisionID != id || got.Replica != "r" {
		t.Errorf("%+v", got)
	}
	wantError(t, d.send(d.owner, "GET", "/instances/b/decisions/"+id, ""), 404, CodeNotFound, "")
	unknown := refuse(importable)
	for range 5000 { // garbage pushes out garbage, and no refusal of a known key
		refuse("kwi_x")
	}
	wantError(t, d.send(d.owner, "GET", "/instances/a/decisions/"+unknown, ""), 404, CodeNotFound, "")
	unknown = refuse(importable)
	for _, at := range []string{"/instances/a/decisions/" + id, "/instances/a/decisions/" + unknown, "/instances/b/decisions/" + unknown} {
		if w := d.send(d.owner, "GET", at, ""); w.Code != 200 {
			t.Errorf("%s: %d %s", at, w.Code, w.Body)
		}
	}
}
