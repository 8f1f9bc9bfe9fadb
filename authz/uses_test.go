package authz_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"keyward/authz"
	"keyward/authz/apikey"
)

// TestDecisionsSayWhatTheyWereAbout: who counts hears of every decision once, with the key that it knew, and for
// others with the instance that the request was about, if there is one.
func TestDecisionsSayWhatTheyWereAbout(t *testing.T) {
	const guid = "0b6c1f3e-5d6a-4a3e-9d0a-1f2e3d4c5b6a"
	w := newWorld()
	w.instances[guid] = &apikey.Instance{ID: guid}
	good := w.issue(apikey.Key{})
	narrow := w.issue(apikey.Key{Scopes: apikey.Scopes{"none"}})
	unknown := apikey.Format{}.New(apikey.KindInstance)
	a := w.authorizer(t, authz.Config{Rules: []authz.Rule{
		{Path: "/any/{rest...}"},
		{Host: "api.example", Path: "/in/{instance}/", Instance: source(t, "{instance}")},
		{Path: "/fixed", Instance: source(t, "demo")},
		{Path: "/query", Instance: source(t, "?instance")},
		{Path: "/optional", Mode: authz.Optional},
		{Path: "/public", Mode: authz.Public},
		{Path: "/admin", Scopes: apikey.Scopes{"admin"}},
	}, DenyUnrouted: true})
	from := netip.MustParseAddr("192.0.2.1")
	for name, tt := range map[string]struct {
		path   string
		secret apikey.Secret
		named  string // by Envoy's configuration
		want   authz.Use
		keyed  bool
	}{
		"allowed":                     {"/any/x", good, "", authz.Use{Reason: authz.ReasonKey, InstanceID: "demo", Client: from, Pattern: "/any/{rest...}"}, true},
		"refused":                     {"/admin", narrow, "", authz.Use{Reason: authz.ReasonMissingScope, InstanceID: "demo", Client: from, Pattern: "/admin"}, true},
		"in another instance":         {"/in/" + guid + "/x", good, "", authz.Use{Reason: authz.ReasonWrongInstance, InstanceID: "demo", Client: from, Pattern: "api.example/in/{instance}/"}, true},
		"anonymous":                   {"/optional", apikey.Secret{}, "", authz.Use{Reason: authz.ReasonAnonymous, Pattern: "/optional"}, false},
		"public":                      {"/public", good, "", authz.Use{Reason: authz.ReasonPublic, Pattern: "/public"}, false},
		"unknown":                     {"/any/x", unknown, "", authz.Use{Reason: authz.ReasonUnknownKey, Client: from, Pattern: "/any/{rest...}"}, false},
		"unknown, in an instance":     {"/in/" + guid + "/x", unknown, "", authz.Use{Reason: authz.ReasonUnknownKey, InstanceID: guid, Client: from, Pattern: "api.example/in/{instance}/"}, false},
		"unknown, in capitals":        {"/in/" + strings.ToUpper(guid) + "/x", unknown, "", authz.Use{Reason: authz.ReasonUnknownKey, InstanceID: guid, Client: from, Pattern: "api.example/in/{instance}/"}, false},
		"unknown, in no instance":     {"/in/nowhere/x", unknown, "", authz.Use{Reason: authz.ReasonUnknownKey, Client: from, Pattern: "api.example/in/{instance}/"}, false},
		"unknown, in no id":           {"/in/0/x", unknown, "", authz.Use{Reason: authz.ReasonUnknownKey, Client: from, Pattern: "api.example/in/{instance}/"}, false},
		"unknown, as the rule says":   {"/fixed", unknown, "", authz.Use{Reason: authz.ReasonUnknownKey, InstanceID: "demo", Client: from, Pattern: "/fixed"}, false},
		"unknown, as Envoy says":      {"/any/x", unknown, "demo", authz.Use{Reason: authz.ReasonUnknownKey, InstanceID: "demo", Client: from, Pattern: "/any/{rest...}"}, false},
		"queries are not looked at":   {"/query?instance=demo", unknown, "", authz.Use{Reason: authz.ReasonUnknownKey, Client: from, Pattern: "/query"}, false},
		"without, in an instance":     {"/fixed", apikey.Secret{}, "", authz.Use{Reason: authz.ReasonNoCredential, InstanceID: "demo", Pattern: "/fixed"}, false},
		"no rule":                     {"/nothing", good, "demo", authz.Use{Reason: authz.ReasonNoRoute}, false},
		"a path that cannot be meant": {"/any/../x", good, "demo", authz.Use{Reason: authz.ReasonInvalidPath}, false},
	} {
		r := authz.Request{Method: "GET", Host: "api.example", Path: tt.path, Peer: from.String()}
		if secret := tt.secret.Reveal(); secret != "" {
			r.Headers = []authz.Pair{header("x-api-key", secret)}
		}
		if tt.named != "" {
			r.Extensions = []authz.Pair{{Name: "instance", Value: tt.named}}
		}
		var d authz.Decision
		if err := a.Decide(t.Context(), &r, &d); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		w.decided = nil
		at := time.Now()
		a.Decided(&r, &d, at)
		if len(w.decided) != 1 {
			t.Fatalf("%s: heard %d times", name, len(w.decided))
		}
		got := w.decided[0]
		if !got.At.Equal(at) || (got.Key != nil) != tt.keyed {
			t.Errorf("%s: at %v, key %v", name, got.At, got.Key)
		}
		got.Key, got.At = nil, time.Time{}
		if got != tt.want {
			t.Errorf("%s: got %+v, want %+v", name, got, tt.want)
		}
		if _, remembered := a.Recall(d.ID); remembered != (d.Outcome() != authz.Allowed) {
			t.Errorf("%s: remembered: %v", name, remembered)
		}
	}
}
