package authz_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/limits"
	"keyward/limits/local"
)

// counted is a world whose limits are counted: one instance with quotas, and rules like those of the platform
// that quotas come from.
type counted struct {
	*world
	*authz.Authorizer
	limiter *local.Limiter
	n       uint64
}

func newCounted(t *testing.T, cfg authz.Config, quotas ...apikey.Quota) *counted {
	t.Helper()
	w := newWorld()
	w.instances["demo"] = &apikey.Instance{ID: "demo", Quotas: quotas}
	if cfg.Rules == nil {
		cfg.Rules = []authz.Rule{
			{Method: "POST", Path: "/instances/{id}/completions", Mode: authz.Optional, Context: "CoreAPI:Completions", Instance: sources(t, "{id}"), Agent: sources(t, "$.agent_name"), AgentNeeded: true},
			{Method: "GET", Path: "/instances/{id}/completions/agents", Context: "CoreAPI:Completions", Instance: sources(t, "{id}")},
			{Path: "/scoped", Context: "CoreAPI:Completions", Scopes: apikey.Scopes{"a:b"}},
		}
	}
	if cfg.JWT.Issuer == "" {
		cfg.JWT = authz.JWT{Issuer: "https://login.example", Payload: "claims"}
	}
	c := &counted{world: w, limiter: local.New(local.Config{}, nil)}
	var err error
	if c.Authorizer, err = authz.New(cfg, w, c.limiter, w.peppers, w, w); err != nil {
		t.Fatal(err)
	}
	return c
}

func sources(t *testing.T, texts ...string) (all []authz.Source) {
	t.Helper()
	for _, text := range texts {
		s, err := authz.ParseSource(text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	return all
}

// user makes a key without limits of its own.
func (c *counted) user(upn string) string {
	return c.issue(free(apikey.Key{Type: apikey.TypeUser, UserPrincipalName: upn})).Reveal()
}

func (c *counted) agent(name string) string {
	return c.issue(free(apikey.Key{Type: apikey.TypeAgent, AgentName: name})).Reveal()
}

func free(k apikey.Key) apikey.Key {
	k.Limits = apikey.Limits{Rate: apikey.Rate{Requests: apikey.Unlimited}, MaxConcurrent: apikey.Unlimited}
	return k
}

// completion asks for a completion by an agent.
func (c *counted) completion(t *testing.T, secret, agent string) authz.Decision {
	t.Helper()
	r := completion(secret)
	r.Body, r.BodySent = fmt.Appendf(nil, `{"user_prompt": "hello", "agent_name": %q}`, agent), true
	return decide(t, c.Authorizer, r)
}

func completion(secret string) authz.Request {
	r := authz.Request{Method: "POST", Path: "/instances/demo/completions"}
	if secret != "" {
		r.Headers = []authz.Pair{{Name: "x-api-key", Value: secret}}
	}
	return r
}

// token asks for a completion with a verified token instead of a key.
func (c *counted) token(t *testing.T, claims ...string) authz.Decision {
	t.Helper()
	r := completion("")
	r.Body, r.BodySent = []byte(`{"agent_name":"sales"}`), true
	for i := 0; i < len(claims); i += 2 {
		r.Claims = append(r.Claims, authz.Pair{Name: claims[i], Value: claims[i+1]})
	}
	return decide(t, c.Authorizer, r)
}

// passes counts how many of n completions pass.
func (c *counted) passes(t *testing.T, n int, secret, agent string) (passed int) {
	t.Helper()
	for range n {
		if c.completion(t, secret, agent).Reason.Outcome() == authz.Allowed {
			passed++
		}
	}
	return passed
}

var perUser = apikey.Quota{
	Name: "completions", Context: "CoreAPI:Completions", Partition: apikey.PartitionUPN,
	Limit: 120, Window: time.Minute, Smoothed: true, Lockout: time.Minute,
}

// The oracles are those of reference/foundationallm.md §7.1, by number.

func TestOracle1BurstAndLockout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCounted(t, authz.Config{}, perUser)
		ada := c.user("ada@example.com")
		if n := c.passes(t, 40, ada, "sales"); n != 40 {
			t.Fatalf("%d of 40 pass", n)
		}
		began := time.Now()
		for _, at := range []struct {
			after time.Duration
			wait  time.Duration // 0: it passes
		}{
			{0, time.Minute}, {30 * time.Second, 30 * time.Second}, {59900 * time.Millisecond, 100 * time.Millisecond},
			{time.Minute + time.Millisecond, 0},
		} {
			time.Sleep(time.Until(began.Add(at.after)))
			d := c.completion(t, ada, "sales")
			if at.wait == 0 {
				if d.Reason != authz.ReasonKey {
					t.Errorf("after %v: %v", at.after, d.Reason)
				}
				continue
			}
			if d.Reason != authz.ReasonLimitQuotaPrincipal || d.RetryAfter != at.wait || d.Quota == nil || d.Quota.Name != "completions" {
				t.Errorf("after %v: %v, retry after %v, quota %v, want %v", at.after, d.Reason, d.RetryAfter, d.Quota, at.wait)
			}
			if want := (limits.Quota{Limit: 40, Window: 20 * time.Second, Lockout: time.Minute}); d.QuotaLimit != want {
				t.Errorf("the limit is told as %+v, want %+v", d.QuotaLimit, want)
			}
		}
		// Oracle 4: what came meanwhile did neither count nor extend it.
		if n := c.passes(t, 60, ada, "sales"); n != 39 {
			t.Errorf("after the lockout %d more pass, want 39", n)
		}
	})
}

func TestOracle2SmallLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := perUser
		q.Limit, q.Lockout = 3, 0
		c := newCounted(t, authz.Config{}, q)
		ada := c.user("ada@example.com")
		for range 5 {
			if n := c.passes(t, 5, ada, "sales"); n != 1 {
				t.Fatalf("%d pass in 20 s, want 1", n)
			}
			time.Sleep(20 * time.Second)
		}
	})
}

func TestOracle3WhoSharesACount(t *testing.T) {
	for name, tt := range map[string]struct {
		partition apikey.Partition
		shared    map[string]bool // with a key of ada's
	}{
		"None":              {apikey.PartitionNone, map[string]bool{"ada": true, "ADA": true, "bob": true, "agent": true, "token": true}},
		"UserPrincipalName": {apikey.PartitionUPN, map[string]bool{"ada": true, "ADA": true, "token": true}},
		"UserIdentifier":    {apikey.PartitionIdentifier, map[string]bool{"ada": true, "ADA": true, "token id": true}},
		"ApiKey":            {apikey.PartitionKey, map[string]bool{}},
	} {
		for _, other := range []string{"ada", "ADA", "bob", "agent", "token", "token id"} {
			t.Run(name+", "+other, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					q := perUser
					q.Partition, q.Lockout = tt.partition, 0
					c := newCounted(t, authz.Config{}, q)
					first := c.user("ada@example.com")
					if n := c.passes(t, 41, first, "sales"); n != 40 {
						t.Fatalf("%d pass, want 40", n)
					}
					var d authz.Decision
					switch other {
					case "ada":
						d = c.completion(t, c.user("ada@example.com"), "sales")
					case "ADA":
						d = c.completion(t, c.user("Ada@EXAMPLE.com"), "sales")
					case "bob":
						d = c.completion(t, c.user("bob@example.com"), "sales")
					case "agent":
						d = c.completion(t, c.agent("sales"), "sales")
					case "token":
						d = c.token(t, "iss", "https://login.example", "preferred_username", "Ada@example.com", "oid", "1")
					case "token id":
						d = c.token(t, "iss", "https://login.example", "preferred_username", "x", "oid", "ada@example.com")
					}
					want := authz.Allowed
					if tt.shared[other] || other == "token id" && tt.partition == apikey.PartitionNone {
						want = authz.Limited
					}
					if d.Outcome() != want {
						t.Errorf("got %v (%v), want %v", d.Outcome(), d.Reason, want)
					}
				})
			})
		}
	}
}

func TestOracle5ContextsCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, agent := perUser, perUser
		raw.Limit, raw.Lockout, raw.Smoothed = 3, 0, false
		agent.Name, agent.Context, agent.Limit, agent.Lockout, agent.Smoothed = "sales", "CoreAPI:Completions:sales", 2, 0, false
		other := raw
		other.Name, other.Context, other.Limit = "files", "CoreAPI:Files", 1
		c := newCounted(t, authz.Config{}, raw, agent, other)
		ada := c.user("ada@example.com")
		if n := c.passes(t, 2, ada, "sales"); n != 2 {
			t.Fatalf("%d of 2 pass", n)
		}
		if d := c.completion(t, ada, "sales"); d.Quota == nil || d.Quota.Name != "sales" {
			t.Errorf("the third of sales: %v, quota %v", d.Reason, d.Quota)
		}
		// The refusal spent nothing of the raw quota; names of agents are exact; GET counts the raw one alone.
		get := authz.Request{Method: "GET", Path: "/instances/demo/completions/agents", Headers: []authz.Pair{{Name: "x-api-key", Value: ada}}}
		if d := decide(t, c.Authorizer, get); d.Reason != authz.ReasonKey {
			t.Errorf("GET agents: %v", d.Reason)
		}
		if d := c.completion(t, ada, "Sales"); d.Quota == nil || d.Quota.Name != "completions" {
			t.Errorf("the fourth of all: %v, quota %v", d.Reason, d.Quota)
		}
		// Both refuse and wait alike: the raw one is told.
		if d := c.completion(t, ada, "sales"); d.Quota == nil || d.Quota.Name != "completions" {
			t.Errorf("both refuse: %v, quota %v", d.Reason, d.Quota)
		}
	})
}

func TestOracle6WhatIsRefusedCountsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := perUser
		q.Partition, q.Limit, q.Smoothed = apikey.PartitionNone, 1, false
		c := newCounted(t, authz.Config{}, q)
		k := c.agent("sales")
		scoped := c.issue(free(apikey.Key{Type: apikey.TypeUser, UserPrincipalName: "a@b", Scopes: apikey.Scopes{}})).Reveal()
		for range 5 {
			bad := completion(strings.Replace(k, "kwa_", "kwa_x", 1)[:len(k)])
			if d := decide(t, c.Authorizer, bad); d.Outcome() != authz.Unauthenticated {
				t.Errorf("bad key: %v", d.Reason)
			}
			wrong := completion(k)
			wrong.Path = "/instances/other/completions"
			if d := decide(t, c.Authorizer, wrong); d.Reason != authz.ReasonWrongInstance {
				t.Errorf("other instance: %v", d.Reason)
			}
			if d := decide(t, c.Authorizer, authz.Request{Method: "GET", Path: "/scoped", Headers: []authz.Pair{{Name: "x-api-key", Value: scoped}}}); d.Reason != authz.ReasonMissingScope {
				t.Errorf("no scope: %v", d.Reason)
			}
			if d := c.completion(t, k, "billing"); d.Reason != authz.ReasonWrongAgent { // oracle 8
				t.Errorf("other agent: %v", d.Reason)
			}
			if d := decide(t, c.Authorizer, completion(k)); d.Reason != authz.ReasonAgentMissing {
				t.Errorf("no agent: %v", d.Reason)
			}
		}
		if d := c.completion(t, k, "sales"); d.Reason != authz.ReasonKey {
			t.Errorf("the first that counts: %v", d.Reason)
		}
		if d := c.completion(t, k, "sales"); d.Reason != authz.ReasonLimitQuotaGlobal || d.Limit != limits.ClassGlobalQuota {
			t.Errorf("the second: %v", d.Reason)
		}
	})
}

// TestOracle9DisabledIsNotRevoked: what a key counted it has counted when it works again.
func TestOracle9DisabledIsNotRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := perUser
		q.Limit, q.Smoothed, q.Lockout = 2, false, 0
		c := newCounted(t, authz.Config{}, q)
		k := c.agent("sales")
		if n := c.passes(t, 1, k, "sales"); n != 1 {
			t.Fatal("the first does not pass")
		}
		record := c.keys[c.peppers.Current.Digest(k)]
		record.Disabled = true
		if d := c.completion(t, k, "sales"); d.Reason != authz.ReasonDisabled {
			t.Errorf("disabled: %v", d.Reason)
		}
		record.Disabled = false
		record.ExpirationDate = time.Now().Add(-time.Second)
		if d := c.completion(t, k, "sales"); d.Reason != authz.ReasonExpired {
			t.Errorf("expired: %v", d.Reason)
		}
		record.ExpirationDate = time.Time{}
		if n := c.passes(t, 3, k, "sales"); n != 1 {
			t.Errorf("%d more pass, want 1", n)
		}
	})
}

func TestKeysHaveTheirOwnNumbers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := perUser
		q.Partition, q.Limit, q.Smoothed, q.Lockout = apikey.PartitionKey, 2, false, 0
		c := newCounted(t, authz.Config{}, q)
		own := func(limit int) string {
			return c.issue(free(apikey.Key{Type: apikey.TypeUser, UserPrincipalName: "a@b", Quotas: map[string]apikey.QuotaOverride{"completions": {Limit: limit}, "gone": {Limit: 1}}})).Reveal()
		}
		for limit, want := range map[int]int{5: 5, 1: 1, apikey.Unlimited: 50} {
			if n := c.passes(t, 50, own(limit), "sales"); n != want {
				t.Errorf("limit %d: %d pass, want %d", limit, n, want)
			}
		}
		if n := c.passes(t, 50, c.user("a@b"), "sales"); n != 2 {
			t.Errorf("without its own: %d pass, want 2", n)
		}
	})
}

// TestChangedQuotasKeepTheirCounts: a snapshot comes with the change, cells stay.
func TestChangedQuotasKeepTheirCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := perUser
		q.Limit, q.Smoothed, q.Lockout = 10, false, 0
		c := newCounted(t, authz.Config{}, q)
		ada := c.user("ada@example.com")
		c.passes(t, 8, ada, "sales")
		q.Limit = 12
		c.instances["demo"] = &apikey.Instance{ID: "demo", Quotas: []apikey.Quota{q}}
		if n := c.passes(t, 50, ada, "sales"); n != 4 {
			t.Errorf("%d more pass, want 4", n)
		}
		c.instances["demo"] = &apikey.Instance{ID: "demo"}
		if n := c.passes(t, 50, ada, "sales"); n != 50 {
			t.Errorf("without a quota %d of 50 pass", n)
		}
	})
}

func TestCostIsSpent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := perUser
		q.Limit, q.Smoothed, q.Lockout = 10, false, 0
		c := newCounted(t, authz.Config{Rules: []authz.Rule{
			{Path: "/dear", Context: "CoreAPI:Completions", Cost: 4}, {Path: "/cheap", Context: "CoreAPI:Completions"},
		}}, q)
		ada := c.user("ada@example.com")
		get := func(path string) bool {
			return decide(t, c.Authorizer, authz.Request{Method: "GET", Path: path, Headers: []authz.Pair{{Name: "x-api-key", Value: ada}}}).Reason.Outcome() == authz.Allowed
		}
		got := []bool{get("/dear"), get("/dear"), get("/dear"), get("/cheap"), get("/cheap"), get("/cheap")}
		if diff := cmp.Diff([]bool{true, true, false, true, true, false}, got); diff != "" {
			t.Error(diff)
		}
	})
}

// TestShadowReportsAndRefusesNobody is for each limit and right that can be in shadow.
func TestShadowReportsAndRefusesNobody(t *testing.T) {
	strict := apikey.Key{
		Type: apikey.TypeUser, UserPrincipalName: "a@b", Scopes: apikey.Scopes{},
		Limits: apikey.Limits{Rate: apikey.Rate{Requests: 1, Per: apikey.Duration(time.Hour)}, Burst: 1, MaxConcurrent: 1},
	}
	for name, tt := range map[string]struct {
		policy apikey.Policy
		rule   authz.Rule
		quota  bool
		twice  bool // the second request would be refused
		want   string
	}{
		"quota":            {quota: true, twice: true, want: "quota"},
		"rate":             {policy: apikey.Policy{Shadow: apikey.Shadow{Rate: true}}, twice: true, want: "burst"},
		"running requests": {policy: apikey.Policy{Shadow: apikey.Shadow{MaxConcurrent: true}}, twice: true, want: "concurrency"},
		"total":            {policy: apikey.Policy{Total: strict.Limits, Shadow: apikey.Shadow{Total: true}}, twice: true, want: "instance"},
		"scopes of a rule": {rule: authz.Rule{Scopes: apikey.Scopes{"a:b"}, Shadow: true}, want: "scopes"},
		"scopes":           {policy: apikey.Policy{Shadow: apikey.Shadow{Scopes: true}}, rule: authz.Rule{Scopes: apikey.Scopes{"a:b"}}, want: "scopes"},
		"addresses":        {policy: apikey.Policy{Shadow: apikey.Shadow{AllowedIPs: true}}, want: "addresses"},
		"all of it":        {policy: apikey.Policy{Shadow: apikey.Shadow{Rate: true, MaxConcurrent: true, Total: true, Scopes: true, AllowedIPs: true}, Total: strict.Limits}, rule: authz.Rule{Scopes: apikey.Scopes{"a:b"}}, quota: true, twice: true, want: "instance,quota,burst,concurrency,scopes,addresses"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tt.rule.Path, tt.rule.Context = "/", "a:b"
				w := newCounted(t, authz.Config{Rules: []authz.Rule{tt.rule}})
				tt.policy.Total.MaxConcurrent = 0
				in := &apikey.Instance{ID: "demo", Policy: tt.policy}
				if tt.quota {
					in.Quotas = []apikey.Quota{{Name: "q", Context: "a:b", Partition: apikey.PartitionUPN, Limit: 1, Window: time.Hour, Lockout: time.Hour, Shadow: true}}
				}
				w.instances["demo"] = in
				k := free(strict)
				if tt.policy.Shadow.Rate {
					k.Limits.Rate, k.Limits.Burst = strict.Limits.Rate, 1
				}
				if tt.policy.Shadow.MaxConcurrent {
					k.Limits.MaxConcurrent = 1
				}
				if tt.policy.Shadow.AllowedIPs {
					k.AllowedIPs = prefixes("192.0.2.0/24")
				}
				secret := w.issue(k).Reveal()
				get := func() authz.Decision {
					w.n++
					return decide(t, w.Authorizer, authz.Request{Method: "GET", Path: "/", Headers: []authz.Pair{{Name: "x-api-key", Value: secret}}, Peer: "203.0.113.9", HTTP: w.n})
				}
				d := get()
				if first := string(d.Shadowed.Append(nil)); tt.twice == (first == tt.want) {
					t.Errorf("the first: %q", first)
				}
				if tt.twice {
					d = get()
				}
				if got := string(d.Shadowed.Append(nil)); d.Reason != authz.ReasonKey || got != tt.want {
					t.Errorf("got %v and %q, want an allow that says %q", d.Reason, got, tt.want)
				}
			})
		})
	}
}

// TestLimitsAreShownByASwitch: what headers say of a request that passed.
func TestLimitsAreShownByASwitch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := perUser
		q.Lockout = 0
		shadow := q
		shadow.Name, shadow.Shadow = "shadow", true
		for _, show := range []bool{false, true} {
			c := newCounted(t, authz.Config{ShowLimits: show}, q, shadow)
			k := c.issue(apikey.Key{Type: apikey.TypeUser, UserPrincipalName: "a@b"}).Reveal()
			r := completion(k)
			r.Body, r.BodySent = []byte(`{"agent_name":"sales"}`), true
			r.Identity = authz.NewIdentity("203.0.113.9", 1, time.Now())
			var d authz.Decision
			if _, err := c.Try(&r, &d); err != nil || d.Reason != authz.ReasonKey {
				t.Fatal(d.Reason, err)
			}
			var got []string
			for _, s := range d.Standings {
				name := fmt.Sprintf("class %d", s.Class)
				if s.Quota != nil {
					name = s.Quota.Name
				}
				got = append(got, fmt.Sprintf("%s %d of %d", name, s.Remaining, s.Limit))
			}
			want := []string{"class 5 19 of 20", "completions 39 of 40", "class 6 9 of 10"}
			if !show {
				want = nil
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("shown %v (-want +got):\n%s", show, diff)
			}
		}
	})
}

// TestRetryAfterIsTrue: alone, a retry passes then, and not a moment sooner. 10^5 cases.
func TestRetryAfterIsTrue(t *testing.T) {
	cases := 100_000
	if authz.RaceEnabled || testing.Short() {
		cases = 2000
	}
	synctest.Test(t, func(t *testing.T) {
		random := newRandom(7)
		c := newCounted(t, authz.Config{})
		secrets := []string{c.user("ada@example.com"), c.user("ada@example.com"), c.agent("sales")}
		change := func() {
			quotas := make([]apikey.Quota, 1+random.IntN(3))
			for i := range quotas {
				quotas[i] = apikey.Quota{
					Name: string(rune('a' + i)), Context: "CoreAPI:Completions", Partition: apikey.Partitions()[random.IntN(4)],
					Limit: 1 + random.IntN(12), Window: time.Duration(1+random.IntN(9)) * 10 * time.Second,
				}
				switch random.IntN(4) {
				case 0:
					quotas[i].Window, quotas[i].Period = 0, apikey.PeriodDay
				case 1:
					quotas[i].Lockout = time.Duration(1+random.IntN(90)) * time.Second
				}
			}
			c.instances["demo"] = &apikey.Instance{ID: "demo", Quotas: quotas}
		}
		refused := 0
		for refused < cases {
			if random.IntN(200) == 0 {
				change()
			}
			time.Sleep(time.Duration(random.IntN(3000)) * time.Millisecond)
			secret := secrets[random.IntN(len(secrets))]
			d := c.completion(t, secret, "sales")
			if d.Outcome() == authz.Allowed {
				continue
			}
			refused++
			if d.RetryAfter <= 0 {
				t.Fatalf("%v: retry after %v", d.Reason, d.RetryAfter)
			}
			if random.IntN(4) == 0 { // not always: others come in between
				continue
			}
			time.Sleep(d.RetryAfter - 1)
			sooner := c.completion(t, secret, "sales")
			if sooner.Outcome() == authz.Allowed {
				t.Fatalf("%v passes 1 ns before %v", d.Reason, d.RetryAfter)
			}
			time.Sleep(sooner.RetryAfter)
			if after := c.completion(t, secret, "sales"); after.Outcome() != authz.Allowed {
				t.Fatalf("%v refuses after %v: %v, %v", d.Reason, sooner.RetryAfter, after.Reason, after.RetryAfter)
			}
		}
	})
}

func newRandom(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, seed)) }

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}
