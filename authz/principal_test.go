package authz_test

import (
	"strings"
	"testing"
	"testing/synctest"

	"keyward/authz"
	"keyward/authz/apikey"
)

// TestWhereTheAgentIsNamed: in one place, in several that agree, in none, and where it cannot be seen.
func TestWhereTheAgentIsNamed(t *testing.T) {
	w := newWorld()
	user := w.issue(apikey.Key{Type: apikey.TypeUser, UserPrincipalName: "a@b"}).Reveal()
	agent := w.issue(apikey.Key{Type: apikey.TypeAgent, AgentName: "sales"}).Reveal()
	q := func(name, context string) apikey.Quota {
		return apikey.Quota{Name: name, Context: context, Partition: apikey.PartitionNone, Limit: 1, Window: 1e9}
	}
	w.instances["demo"] = &apikey.Instance{ID: "demo", Quotas: []apikey.Quota{q("raw", "a:b"), q("sales", "a:b:sales"), q("billing", "a:b:billing")}}
	a := w.authorizer(t, authz.Config{Rules: []authz.Rule{
		{Path: "/needed/{agent}", Context: "a:b", Agent: sources(t, "{agent}", "?agent", "$.agent_name")},
		{Path: "/body", Context: "a:b", Agent: sources(t, "$.agent_name"), AgentNeeded: true},
		{Path: "/ignored", Context: "a:b", Agent: sources(t, "$.agent_name")},
		{Path: "/none", Context: "a:b"},
	}})
	body := func(agent string) []byte { return []byte(`{"agent_name":"` + agent + `"}`) }
	length := func(n string) []authz.Pair { return []authz.Pair{header("content-length", n)} }
	for name, tt := range map[string]struct {
		request authz.Request
		key     string
		want    authz.Reason
		counted string // names of quotas
	}{
		"three agree":             {authz.Request{Path: "/needed/sales?agent=sales", Body: body("sales")}, user, authz.ReasonKey, "raw sales"},
		"one says otherwise":      {authz.Request{Path: "/needed/sales?agent=sales", Body: body("billing")}, user, authz.ReasonInvalidRequest, ""},
		"an agent's key, wrong":   {authz.Request{Path: "/needed/sales", Body: body("billing")}, agent, authz.ReasonWrongAgent, ""},
		"the body":                {authz.Request{Path: "/body", Body: body("billing")}, user, authz.ReasonKey, "raw billing"},
		"the body, escaped":       {authz.Request{Path: "/body", Body: body(`b\u0069lling`)}, user, authz.ReasonKey, "raw billing"},
		"an agent without quota":  {authz.Request{Path: "/body", Body: body("other")}, user, authz.ReasonKey, "raw"},
		"not named":               {authz.Request{Path: "/body", Body: []byte(`{}`)}, user, authz.ReasonAgentMissing, ""},
		"not named by an agent":   {authz.Request{Path: "/body", Body: []byte(`{}`)}, agent, authz.ReasonAgentMissing, ""},
		"no body":                 {authz.Request{Path: "/body", BodySent: true}, user, authz.ReasonAgentMissing, ""},
		"empty":                   {authz.Request{Path: "/body", Body: body("")}, user, authz.ReasonInvalidRequest, ""},
		"no JSON":                 {authz.Request{Path: "/body", Body: []byte(`agent_name=sales`)}, user, authz.ReasonInvalidBody, ""},
		"twice":                   {authz.Request{Path: "/body", Body: []byte(`{"agent_name":"sales","agent_name":"sales"}`)}, user, authz.ReasonInvalidBody, ""},
		"encoded":                 {authz.Request{Path: "/body", Body: body("sales"), Headers: []authz.Pair{header("content-encoding", "deflate")}}, user, authz.ReasonInvalidBody, ""},
		"encoded twice":           {authz.Request{Path: "/body", Body: body("sales"), Headers: []authz.Pair{header("content-encoding", "identity"), header("content-encoding", "br")}}, user, authz.ReasonInvalidBody, ""},
		"encoded as it is":        {authz.Request{Path: "/body", Body: body("sales"), Headers: []authz.Pair{header("content-encoding", "Identity")}}, user, authz.ReasonKey, "raw sales"},
		"cut":                     {authz.Request{Path: "/body", Body: body("sales"), BodyCut: true}, user, authz.ReasonInvalidBody, ""},
		"not sent":                {authz.Request{Path: "/body", Headers: length("22")}, user, authz.ReasonInvalidBody, ""},
		"not sent, and no length": {authz.Request{Path: "/body", Headers: []authz.Pair{header("transfer-encoding", "chunked")}}, user, authz.ReasonInvalidBody, ""},
		"ignored, not sent":       {authz.Request{Path: "/ignored", Headers: length("22")}, user, authz.ReasonInvalidBody, ""},
		"ignored, no body":        {authz.Request{Path: "/ignored", Headers: length("0")}, user, authz.ReasonKey, "raw"},
		"ignored, cut":            {authz.Request{Path: "/ignored", Body: []byte(`{"x":1}`), BodyCut: true}, user, authz.ReasonInvalidBody, ""},
		"ignored":                 {authz.Request{Path: "/ignored", Body: []byte(`{}`)}, user, authz.ReasonKey, "raw"},
		"ignored, an agent's key": {authz.Request{Path: "/ignored", Body: []byte(`{}`)}, agent, authz.ReasonKey, "raw sales"},
		"ignored, HTTP/2":         {authz.Request{Path: "/ignored", Framed: true}, user, authz.ReasonInvalidBody, ""},
		"ignored, HTTP/2, none":   {authz.Request{Path: "/ignored", Framed: true, Headers: length("0")}, user, authz.ReasonKey, "raw"},
		"ignored, HTTP/2, empty":  {authz.Request{Path: "/ignored", Framed: true, BodySent: true}, user, authz.ReasonKey, "raw"},
		"ignored, HTTP/1":         {authz.Request{Path: "/ignored"}, user, authz.ReasonKey, "raw"},
		"nobody asks":             {authz.Request{Path: "/none", Body: body("sales")}, agent, authz.ReasonKey, "raw"},
	} {
		t.Run(name, func(t *testing.T) {
			w.demands = nil
			tt.request.Method = "POST"
			tt.request.BodySent = tt.request.BodySent || len(tt.request.Body) > 0
			tt.request.Headers = append(tt.request.Headers, header("x-api-key", tt.key))
			d := decide(t, a, tt.request)
			if d.Reason != tt.want {
				t.Fatalf("got %v, want %v", d.Reason, tt.want)
			}
			var counted []string
			for _, demand := range w.demands {
				for _, one := range demand.Quotas {
					for _, q := range w.instances["demo"].Quotas {
						if authz.QuotaCell("demo", &q, nil) == one.Cell {
							counted = append(counted, q.Name)
						}
					}
				}
			}
			if got := strings.Join(counted, " "); got != tt.counted {
				t.Errorf("counted by %q, want %q", got, tt.counted)
			}
		})
	}
}

// TestCallersWithAToken: whom Envoy's word makes a principal, and whom not. Global quotas of one unit tell.
func TestCallersWithAToken(t *testing.T) {
	const issuer = "https://login.example"
	long := strings.Repeat("x", 2000)
	for name, tt := range map[string]struct {
		claims  []string
		path    string
		jwt     authz.JWT
		want    authz.Reason
		upn, id string
		second  authz.Reason // of the same caller; zero: as the first
	}{
		"known":            {claims: []string{"iss", issuer, "preferred_username", "Ada@Example.com", "oid", "O-1", "sub", "s"}, want: authz.ReasonJWT, upn: "ada@example.com", id: "O-1", second: authz.ReasonLimitQuotaPrincipal},
		"without an oid":   {claims: []string{"iss", issuer, "preferred_username", "ada", "sub", "S"}, want: authz.ReasonJWT, upn: "ada", id: "S", second: authz.ReasonLimitQuotaPrincipal},
		"without a name":   {claims: []string{"iss", issuer, "sub", "S"}, want: authz.ReasonJWT, upn: issuer + "#s", id: "S", second: authz.ReasonLimitQuotaPrincipal},
		"with nothing":     {claims: []string{"iss", issuer}, want: authz.ReasonJWT, upn: issuer + "#", id: issuer + "#", second: authz.ReasonLimitQuotaPrincipal},
		"too long":         {claims: []string{"iss", issuer, "preferred_username", long, "oid", long, "sub", "s"}, want: authz.ReasonJWT, upn: issuer + "#s", id: "s", second: authz.ReasonLimitQuotaPrincipal},
		"in other letters": {claims: []string{"iss", issuer, "preferred_username", "ÉVA@example.com"}, want: authz.ReasonJWT, upn: "éva@example.com", id: "éva@example.com", second: authz.ReasonLimitQuotaPrincipal},
		"other claims":     {claims: []string{"iss", issuer, "upn", "U", "uid", "I"}, jwt: authz.JWT{UPNClaim: "upn", IDClaims: []string{"uid"}}, want: authz.ReasonJWT, upn: "u", id: "I", second: authz.ReasonLimitQuotaPrincipal},
		"another issuer":   {claims: []string{"iss", issuer + "/", "preferred_username", "ada"}, want: authz.ReasonAnonymous},
		"no issuer":        {claims: []string{"preferred_username", "ada"}, want: authz.ReasonAnonymous},
		"no token":         {want: authz.ReasonAnonymous},
		"another instance": {claims: []string{"iss", issuer, "preferred_username", "ada"}, path: "/instances/none/completions", want: authz.ReasonWrongInstance},
		"a configured one": {claims: []string{"iss", issuer, "preferred_username", "ada"}, path: "/elsewhere", jwt: authz.JWT{Instance: "demo"}, want: authz.ReasonJWT, upn: "ada", id: "ada", second: authz.ReasonLimitQuotaPrincipal},
		"no instance":      {claims: []string{"iss", issuer, "preferred_username", "ada"}, path: "/elsewhere", want: authz.ReasonJWT, upn: "ada", id: "ada"},
		"a configured one, and the path's is another": {claims: []string{"iss", issuer, "preferred_username", "ada"}, path: "/instances/none/completions", jwt: authz.JWT{Instance: "demo"}, want: authz.ReasonWrongInstance},
		"on a required route":                         {claims: []string{"iss", issuer, "preferred_username", "ada"}, path: "/required", want: authz.ReasonNoCredential},
		"on a public route":                           {claims: []string{"iss", issuer, "preferred_username", "ada"}, path: "/public", want: authz.ReasonPublic},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				q := perUser
				q.Limit, q.Smoothed, q.Lockout = 1, false, 0
				tt.jwt.Issuer, tt.jwt.Payload = issuer, "claims"
				c := newCounted(t, authz.Config{JWT: tt.jwt, Rules: []authz.Rule{
					{Path: "/instances/{id}/completions", Mode: authz.Optional, Context: q.Context, Instance: sources(t, "{id}")},
					{Path: "/elsewhere", Mode: authz.Optional, Context: q.Context},
					{Path: "/required", Context: q.Context},
					{Path: "/public", Mode: authz.Public},
				}}, q)
				r := authz.Request{Method: "POST", Path: tt.path}
				if r.Path == "" {
					r.Path = "/instances/demo/completions"
				}
				for i := 0; i < len(tt.claims); i += 2 {
					r.Claims = append(r.Claims, header(tt.claims[i], tt.claims[i+1]))
				}
				again := r
				d := decide(t, c.Authorizer, r)
				if d.Reason != tt.want {
					t.Fatalf("got %v, want %v", d.Reason, tt.want)
				}
				if d.Reason == authz.ReasonJWT {
					if upn, id := string(d.AppendUPN(nil)), string(d.AppendUserID(nil)); upn != tt.upn || id != tt.id {
						t.Errorf("counts as %q, %q, want %q, %q", upn, id, tt.upn, tt.id)
					}
				}
				if d.Key != nil {
					t.Error("has a key")
				}
				if tt.second == 0 {
					tt.second = tt.want
				}
				if d = decide(t, c.Authorizer, again); d.Reason != tt.second {
					t.Errorf("the second: got %v, want %v", d.Reason, tt.second)
				}
			})
		})
	}
}

// TestKeyWinsOverToken: with both it is the key that counts, and a bad one is bad.
func TestKeyWinsOverToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := perUser
		q.Limit, q.Smoothed, q.Lockout = 1, false, 0
		c := newCounted(t, authz.Config{}, q)
		ada := c.user("ada@example.com")
		both := func(secret string) authz.Decision {
			r := completion(secret)
			r.Body, r.BodySent = []byte(`{"agent_name":"sales"}`), true
			r.Claims = []authz.Pair{header("iss", "https://login.example"), header("preferred_username", "eve@example.com")}
			return decide(t, c.Authorizer, r)
		}
		if d := both(ada); d.Reason != authz.ReasonKey || string(d.AppendUPN(nil)) != "ada@example.com" {
			t.Errorf("got %v as %s", d.Reason, d.AppendUPN(nil))
		}
		if d := both(ada[:len(ada)-1] + "!"); d.Outcome() != authz.Unauthenticated {
			t.Errorf("a bad key: %v", d.Reason)
		}
		if d := c.token(t, "iss", "https://login.example", "preferred_username", "eve@example.com"); d.Reason != authz.ReasonJWT {
			t.Errorf("eve was counted for ada's key: %v", d.Reason)
		}
		if d := c.token(t, "iss", "https://login.example", "preferred_username", "ADA@example.com"); d.Reason != authz.ReasonLimitQuotaPrincipal {
			t.Errorf("ada with a token: %v", d.Reason)
		}
	})
}

func TestPrincipals(t *testing.T) {
	id := apikey.ID{1, 2, 3}
	const text = "01020300-0000-0000-0000-000000000000"
	for _, tt := range []struct {
		key     apikey.Key
		upn, id string
	}{
		{apikey.Key{ID: id, Type: apikey.TypeUser, UserPrincipalName: "Ada@Example.com"}, "ada@example.com", "ada@example.com"},
		{apikey.Key{ID: id, Type: apikey.TypeAgent, AgentName: "sales"}, "aat_sales_" + text + "@foundationallm.internal_", text},
		{apikey.Key{ID: id, Type: apikey.TypeInstance}, "iak_" + text + "@foundationallm.internal_", text},
	} {
		d := authz.Decision{Key: &tt.key}
		if upn, id := string(d.AppendUPN(nil)), string(d.AppendUserID(nil)); upn != tt.upn || id != tt.id {
			t.Errorf("%s: got %q, %q, want %q, %q", tt.key.Type, upn, id, tt.upn, tt.id)
		}
	}
}

// TestQuotaCellsStayTheSame: their states outlive the process.
func TestQuotaCellsStayTheSame(t *testing.T) {
	q := apikey.Quota{Name: "completions", Partition: apikey.PartitionUPN}
	got := authz.QuotaCell("demo", &q, []byte("ada@example.com"))
	if text := apikey.ID(got.Owner).String(); text != "36dd0475-e0fc-08f1-9a01-c83329e74cc8" {
		t.Errorf("got %s", text)
	}
}
