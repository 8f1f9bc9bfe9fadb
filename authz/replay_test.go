package authz_test

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/limits/local"
)

// TestReplayIsAsItWas decides random requests of two users, each with two keys, and counts the same ones again
// from what a log has of them: the same ones are refused, by the same quota.
func TestReplayIsAsItWas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		quota := func(name, context string, p apikey.Partition, limit int, more ...func(*apikey.Quota)) apikey.Quota {
			q := apikey.Quota{Name: name, Context: context, Partition: p, Limit: limit, Window: time.Minute}
			for _, change := range more {
				change(&q)
			}
			return q
		}
		in := &apikey.Instance{ID: "a", Quotas: []apikey.Quota{
			quota("all", "S:C", apikey.PartitionNone, 24, func(q *apikey.Quota) { q.Smoothed = true }),
			quota("user", "S:C", apikey.PartitionUPN, 12, func(q *apikey.Quota) { q.Lockout = 50 * time.Second }),
			quota("key", "S:C", apikey.PartitionKey, 7),
			quota("agent", "S:C:sales", apikey.PartitionIdentifier, 40, func(q *apikey.Quota) { q.Window, q.Period = 0, apikey.PeriodDay }),
			quota("shadow", "S:C", apikey.PartitionNone, 3, func(q *apikey.Quota) { q.Shadow = true }),
			quota("other", "S:D", apikey.PartitionNone, 1),
		}}
		w.instances["a"] = in
		free := apikey.Limits{Rate: apikey.Rate{Requests: -1}, MaxConcurrent: -1}
		var secrets []apikey.Secret
		for _, user := range []string{"ann@x", "ann@x", "bob@x", "bob@x"} {
			secrets = append(secrets, w.issue(apikey.Key{InstanceID: "a", Type: apikey.TypeUser, UserPrincipalName: user, Limits: free}))
		}
		config := authz.Config{Rules: []authz.Rule{
			{Path: "/c", Context: "S:C", Cost: 2}, {Path: "/c/{agent}", Context: "S:C", Agent: source(t, "{agent}")},
		}}
		a, err := authz.New(config, w, local.New(local.Config{}, nil), w.peppers, w, w)
		if err != nil {
			t.Fatal(err)
		}
		replay := authz.NewReplay(in)
		dice := rand.New(rand.NewPCG(1, 7))
		refusals := map[string]int{}
		for n := range sized(20_000) {
			time.Sleep(time.Duration(dice.Int64N(int64(3 * time.Second))))
			r := asking(secrets[dice.IntN(len(secrets))])
			r.Path = []string{"/c", "/c/sales", "/c/other"}[dice.IntN(3)]
			var d authz.Decision
			if err := a.Decide(t.Context(), &r, &d); err != nil {
				t.Fatal(err)
			}
			_, context, cost := d.Route()
			got := replay.Take(authz.Past{
				At: time.Now(), KeyID: d.Key.ID, Principal: "p" + string(d.AppendUPN(nil)), UserID: "u" + string(d.AppendUserID(nil)),
				Context: context, Agent: d.Agent, Cost: cost,
			})
			if (got.Refused == nil) != (d.Quota == nil) || d.Quota != nil && got.Refused.Name != d.Quota.Name || d.InstanceID != "a" {
				t.Fatalf("request %d to %s: decided %v by %+v, replayed %+v", n, r.Path, d.Reason, d.Quota, got.Refused)
			}
			if d.Quota != nil {
				refusals[d.Quota.Name]++
			}
		}
		for _, name := range []string{"all", "user", "key", "agent"} {
			if refusals[name] == 0 {
				t.Errorf("%s never refused: %v", name, refusals)
			}
		}
		t.Log(refusals)
	})
}
