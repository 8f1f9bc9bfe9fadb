package admin_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// perUser is a quota that is valid, under a name.
func perUser(name string) admin.QuotaInput {
	return admin.QuotaInput{
		Name: name, Context: "CoreAPI:Completions", Partition: apikey.PartitionUPN, Limit: 120, Window: "60s", Smoothed: true, Lockout: "60s",
	}
}

func (d *desk) quotas(t *testing.T, set admin.QuotaSet) admin.QuotasChange {
	t.Helper()
	done, err := d.ApplyQuotas(t.Context(), root, "a", set, 0)
	if err != nil {
		t.Fatal(err)
	}
	return done
}

// quotaNames are those of the quotas that the instance has.
func (d *desk) quotaNames(t *testing.T) (names []string) {
	t.Helper()
	quotas, _, err := d.Quotas(t.Context(), root, "a")
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range quotas {
		names = append(names, q.Name)
	}
	return names
}

// A set is applied as a whole or not at all, and the audit has each quota before and after under one revision.
func TestApplyQuotas(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	ctx := t.Context()

	first := d.quotas(t, admin.QuotaSet{Quotas: []admin.QuotaInput{perUser("c"), perUser("a")}})
	if got := d.quotaNames(t); !slices.Equal(got, []string{"a", "c"}) || len(first.Changes) != 2 {
		t.Fatalf("got %v and %+v", got, first.Changes)
	}
	in, err := d.Instance(ctx, root, "a")
	if err != nil || in.Revision != first.Revision {
		t.Fatalf("the instance is of revision %d, the answer of %d, error %v", in.Revision, first.Revision, err)
	}
	events := len(d.actions(t))

	// The same again, and a dry run, change nothing: no revision, no audit.
	changed := perUser("a")
	changed.Limit = 240
	set := admin.QuotaSet{Quotas: []admin.QuotaInput{changed, perUser("b")}, Prune: true, DryRun: true}
	again, would := d.quotas(t, admin.QuotaSet{Quotas: []admin.QuotaInput{perUser("a")}}), d.quotas(t, set)
	if len(again.Changes) != 0 || len(would.Changes) != 3 || would.Revision != first.Revision || !again.Propagation.Everywhere {
		t.Errorf("again: %+v, would: %+v", again, would)
	}
	if in, err := d.Instance(ctx, root, "a"); err != nil || in.Revision != first.Revision || len(d.actions(t)) != events {
		t.Errorf("a change of nothing is one: revision %d, error %v", in.Revision, err)
	}

	set.DryRun = false
	done := d.quotas(t, set)
	if diff := cmp.Diff(would.Changes, done.Changes); diff != "" {
		t.Errorf("not what the dry run said (-would +did)\n%s", diff)
	}
	if got := d.quotaNames(t); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("got %v", got)
	}
	list, err := d.store.Events(ctx, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		action, target, before, after string
	}{
		{"quota.put", "a", `"limit":120`, `"limit":240`},
		{"quota.put", "b", "", `"window":"1m"`},
		{"quota.delete", "c", `"partition":"UserPrincipalName"`, ""},
	} {
		e := list[events+i]
		if e.Action != want.action || e.Target != want.target || e.InstanceID != "a" ||
			!strings.Contains(string(e.Before), want.before) || !strings.Contains(string(e.After), want.after) ||
			(e.Before == nil) != (want.before == "") || (e.After == nil) != (want.after == "") {
			t.Errorf("event %d: got %+v, before %s, after %s; want %+v", i, e, e.Before, e.After, want)
		}
	}

	// Another's change in between, and one that names nothing there.
	if _, err := d.ApplyQuotas(ctx, root, "a", set, first.Revision); !errors.Is(err, admin.ErrPrecondition) {
		t.Errorf("an older version was applied: %v", err)
	}
	if _, err := d.DeleteQuota(ctx, root, "a", "b", first.Revision); !errors.Is(err, admin.ErrPrecondition) {
		t.Errorf("an older version was deleted: %v", err)
	}
	if _, err := d.DeleteQuota(ctx, root, "a", "none", 0); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("what is not there was deleted: %v", err)
	}
	if _, _, err := d.Quota(ctx, root, "a", "none"); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("what is not there was found: %v", err)
	}
	for _, id := range []string{"none", "no such id"} {
		if _, err := d.ApplyQuotas(ctx, root, id, set, 0); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("an instance that is not there: %v", err)
		}
	}
	if _, err := d.DeleteQuota(ctx, root, "a", "b", done.Revision); err != nil {
		t.Error(err)
	}
}

// Everything that is wrong with a set is told at once, by quota and field, and nothing is changed.
func TestAllFaultsOfASet(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	bad := []admin.QuotaInput{
		{Name: "a", Context: "x", Partition: "PerKey", Window: "soon", Lockout: "0s", Description: " d"},
		{Name: "b", Context: "a:b", Partition: "None", Limit: 2, Window: "60s", Smoothed: true},
		{Name: "b", Context: "a:b", Partition: "None", Limit: 2, Window: "50s", Smoothed: true},
		{Name: "", Context: "a:b", Partition: "None", Limit: 2, Period: "day", Smoothed: true, Lockout: "never"},
		perUser("good"),
	}
	_, err := d.ApplyQuotas(t.Context(), root, "a", admin.QuotaSet{Quotas: bad}, 0)
	want := []string{
		"quotas.a.context", "quotas.a.description", "quotas.a.limit", "quotas.a.lockout", "quotas.a.partition", "quotas.a.window",
		"quotas.b.limit", "quotas[2].name", "quotas[2].window", "quotas[3].lockout", "quotas[3].name", "quotas[3].smoothed",
	}
	if diff := cmp.Diff(want, fields(err)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if got := d.quotaNames(t); got != nil {
		t.Errorf("some of it was applied: %v", got)
	}
	// The same of one, without a path.
	_, err = d.PutQuota(t.Context(), root, "a", "a", bad[0], 0)
	if diff := cmp.Diff([]string{"context", "description", "limit", "lockout", "partition", "window"}, fields(err)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if _, err = d.PutQuota(t.Context(), root, "a", "other", perUser("good"), 0); invalidField(err) != "name" {
		t.Errorf("another name than the address has: %v", err)
	}
}

// fields are those that an error names, sorted.
func fields(err error) (list []string) {
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		for _, one := range many.Unwrap() {
			list = append(list, fields(one)...)
		}
		slices.Sort(list)
		return list
	}
	return []string{invalidField(err)}
}

func TestNoSecretInAQuota(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	secret := apikey.Format{}.New(apikey.KindUser)
	for field, change := range map[string]func(in *admin.QuotaInput){
		"name":        func(in *admin.QuotaInput) { in.Name = secret.Reveal() },
		"description": func(in *admin.QuotaInput) { in.Description = "see " + secret.Reveal() },
		"context":     func(in *admin.QuotaInput) { in.Context = "CoreAPI:Completions:" + secret.Reveal() },
	} {
		in := perUser("q")
		change(&in)
		in.Limit = 0 // a fault that would be told by the quota's name
		_, err := d.ApplyQuotas(t.Context(), root, "a", admin.QuotaSet{Quotas: []admin.QuotaInput{in}}, 0)
		if got := fields(err); !slices.Equal(got, []string{"quotas[0]." + field}) {
			t.Errorf("%s in a set: got %v", field, got)
		}
		_, one := d.PutQuota(t.Context(), root, "a", in.Name, in, 0)
		if got := fields(one); !slices.Equal(got, []string{field}) {
			t.Errorf("%s of one: got %v", field, got)
		}
		noCanary(t, fmt.Sprint(err, one), secret)
	}
}

func TestMostQuotas(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	var set admin.QuotaSet
	for i := range apikey.MaxQuotas {
		set.Quotas = append(set.Quotas, perUser(fmt.Sprint("q", i)))
	}
	d.quotas(t, set)
	if _, err := d.PutQuota(t.Context(), root, "a", "more", perUser(""), 0); invalidField(err) != "quotas" {
		t.Errorf("one more by put: %v", err)
	}
	if _, err := d.ApplyQuotas(t.Context(), root, "a", admin.QuotaSet{Quotas: []admin.QuotaInput{perUser("more")}}, 0); invalidField(err) != "quotas" {
		t.Errorf("one more by apply: %v", err)
	}
	d.quotas(t, admin.QuotaSet{Quotas: []admin.QuotaInput{perUser("more")}, Prune: true})
	if got := d.quotaNames(t); !slices.Equal(got, []string{"more"}) {
		t.Errorf("got %v", got)
	}
}

// What is done to the policy and the switch of an instance leaves its quotas alone, and the other way round.
func TestPolicyAndQuotasAreApart(t *testing.T) {
	d := open(t)
	d.policy(t, "a", apikey.Policy{AllowedScopes: apikey.Scopes{"x"}})
	d.quotas(t, admin.QuotaSet{Quotas: []admin.QuotaInput{perUser("q")}})
	if in, err := d.Instance(t.Context(), root, "a"); err != nil || len(in.Policy.AllowedScopes) != 1 {
		t.Errorf("the policy is %+v, error %v", in.Policy, err)
	}
	d.policy(t, "a", apikey.Policy{})
	if _, err := d.SwitchInstance(t.Context(), root, "a", true); err != nil {
		t.Fatal(err)
	}
	if got := d.quotaNames(t); len(got) != 1 {
		t.Errorf("got %v", got)
	}
	if _, err := d.DeleteInstance(t.Context(), root, "a", false); err != nil {
		t.Fatal(err)
	}
	events, err := d.store.Events(t.Context(), 0, 100)
	if err != nil || !strings.Contains(string(events[len(events)-1].Before), `"quotas":[{"name":"q"`) {
		t.Errorf("the audit does not know which quotas went with their instance: %v", err)
	}
}

// Of many changes at once none is lost.
func TestQuotasAtOnce(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			if _, err := d.PutQuota(t.Context(), root, "a", fmt.Sprint("q", i), perUser(""), 0); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if got := d.quotaNames(t); len(got) != 20 {
		t.Errorf("%d quotas are left of 20", len(got))
	}
	_, rev, err := d.Quotas(t.Context(), root, "a")
	if err != nil {
		t.Fatal(err)
	}
	var won atomic.Int64
	for i := range 10 {
		all.Go(func() {
			in := perUser("")
			in.Limit = 1000 + i
			_, err := d.PutQuota(t.Context(), root, "a", "q0", in, rev)
			if err == nil {
				won.Add(1)
			} else if !errors.Is(err, admin.ErrPrecondition) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if won.Load() != 1 {
		t.Errorf("%d of ten that saw the same version changed it", won.Load())
	}
}

func TestWhoMayChangeQuotas(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	ops := map[string]func(ctx context.Context, c admin.Caller) error{
		"read": func(ctx context.Context, c admin.Caller) error {
			_, _, err := d.Quotas(ctx, c, "a")
			return err
		},
		"put": func(ctx context.Context, c admin.Caller) error {
			_, err := d.PutQuota(ctx, c, "a", "q", perUser(""), 0)
			return err
		},
		"apply": func(ctx context.Context, c admin.Caller) error {
			_, err := d.ApplyQuotas(ctx, c, "a", admin.QuotaSet{Quotas: []admin.QuotaInput{perUser("q")}}, 0)
			return err
		},
		"prune": func(ctx context.Context, c admin.Caller) error {
			_, err := d.ApplyQuotas(ctx, c, "a", admin.QuotaSet{Quotas: []admin.QuotaInput{perUser("q")}, Prune: true}, 0)
			return err
		},
		"dry run": func(ctx context.Context, c admin.Caller) error {
			_, err := d.ApplyQuotas(ctx, c, "a", admin.QuotaSet{Quotas: []admin.QuotaInput{perUser("q")}, DryRun: true}, 0)
			return err
		},
		"delete": func(ctx context.Context, c admin.Caller) error {
			d.quotas(t, admin.QuotaSet{Quotas: []admin.QuotaInput{perUser("gone")}})
			_, err := d.DeleteQuota(ctx, c, "a", "gone", 0)
			return err
		},
	}
	for name, do := range ops {
		for role, may := range map[admin.Role]bool{
			admin.RoleOwner: true, admin.RoleOperator: true, admin.RoleAuditor: name == "read", admin.RoleUser: false,
		} {
			for place, want := range map[string]bool{"": may, "a": may} {
				c := admin.Caller{Name: "test", Role: role, InstanceID: place, UserPrincipalName: "ann"}
				err := do(t.Context(), c)
				if _, forbidden := errors.AsType[*admin.ForbiddenError](err); forbidden == want || !forbidden && err != nil {
					t.Errorf("%s by %s of %q: %v", name, role, place, err)
				}
			}
			c := admin.Caller{Name: "test", Role: role, InstanceID: "b", UserPrincipalName: "ann"}
			if err := do(t.Context(), c); !errors.Is(err, apikey.ErrNotFound) {
				t.Errorf("%s by %s of another instance: %v", name, role, err)
			}
		}
	}
}

func override(limit int) *apikey.QuotaOverride { return &apikey.QuotaOverride{Limit: limit} }

func TestKeyOverridesQuotas(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	ctx := t.Context()
	global, each := perUser("global"), perUser("each")
	global.Partition, each.Partition = apikey.PartitionNone, apikey.PartitionKey
	d.quotas(t, admin.QuotaSet{Quotas: []admin.QuotaInput{global, each, perUser("user")}})

	own := map[string]apikey.QuotaOverride{"each": {Limit: 500}, "user": {Limit: apikey.Unlimited}}
	made := d.make(t, admin.KeyInput{Quotas: own})
	if diff := cmp.Diff(own, made.Key.Quotas); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if k, err := d.Key(ctx, root, "a", made.Key.ID); err != nil || !cmp.Equal(own, k.Quotas) {
		t.Errorf("got %v and error %v", k.Quotas, err)
	}
	for name, c := range map[string]struct {
		in   admin.KeyInput
		want []string
	}{
		"everybody's":    {admin.KeyInput{Quotas: map[string]apikey.QuotaOverride{"global": {Limit: 5}}}, []string{"quotas.global"}},
		"no such quota":  {admin.KeyInput{Quotas: map[string]apikey.QuotaOverride{"eahc": {Limit: 5}}}, []string{"quotas"}},
		"too little":     {admin.KeyInput{Quotas: map[string]apikey.QuotaOverride{"each": {Limit: 2}}}, []string{"quotas.each.limit"}},
		"nothing":        {admin.KeyInput{Quotas: map[string]apikey.QuotaOverride{"each": {}}}, []string{"quotas.each.limit"}},
		"the user's own": {admin.KeyInput{Type: "user", UserPrincipalName: "ann", Quotas: map[string]apikey.QuotaOverride{"user": {Limit: 5}}}, []string{"quotas.user"}},
		"with all else that is wrong": {admin.KeyInput{Environment: "?", Quotas: map[string]apikey.QuotaOverride{"each": {Limit: 2}, "global": {Limit: 5}}},
			[]string{"environment", "quotas.each.limit", "quotas.global"}},
		"two that are not there": {admin.KeyInput{Quotas: map[string]apikey.QuotaOverride{"x": {Limit: 5}, "y": {Limit: 5}, "each": {Limit: 2}}}, []string{"quotas", "quotas.each.limit"}},
		"a secret":               {admin.KeyInput{Quotas: map[string]apikey.QuotaOverride{made.Secret.Reveal(): {Limit: 5}}}, []string{"quotas"}},
	} {
		c.in.Name = "n"
		_, err := d.CreateKey(ctx, root, "a", c.in)
		if diff := cmp.Diff(c.want, fields(err)); diff != "" {
			t.Errorf("%s (-want +got)\n%s", name, diff)
		}
		noCanary(t, fmt.Sprint(err), made.Secret)
	}
	d.make(t, admin.KeyInput{Type: "user", UserPrincipalName: "ann", Quotas: map[string]apikey.QuotaOverride{"each": {Limit: 5}}})
	d.make(t, admin.KeyInput{Type: "agent", AgentName: "sales", Quotas: map[string]apikey.QuotaOverride{"user": {Limit: 5}}})

	// A change merges: what it names is set or inherited again, the rest stays.
	patch := func(list map[string]*apikey.QuotaOverride) admin.KeyPatch {
		return admin.KeyPatch{Quotas: admin.To(list)}
	}
	k := d.patch(t, made.Key.ID, patch(map[string]*apikey.QuotaOverride{"each": override(600)}))
	if diff := cmp.Diff(map[string]apikey.QuotaOverride{"each": {Limit: 600}, "user": {Limit: apikey.Unlimited}}, k.Quotas); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	_, err := d.UpdateKey(ctx, root, "a", made.Key.ID, patch(map[string]*apikey.QuotaOverride{"global": override(5), "each": override(2)}), 0)
	if diff := cmp.Diff([]string{"quotas.each.limit", "quotas.global"}, fields(err)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}

	// What a quota that is gone was overridden by stays, and is in nobody's way.
	if _, err := d.DeleteQuota(ctx, root, "a", "user", 0); err != nil {
		t.Fatal(err)
	}
	k = d.patch(t, made.Key.ID, patch(map[string]*apikey.QuotaOverride{"each": nil}))
	if diff := cmp.Diff(map[string]apikey.QuotaOverride{"user": {Limit: apikey.Unlimited}}, k.Quotas); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	k = d.patch(t, made.Key.ID, patch(map[string]*apikey.QuotaOverride{"user": override(apikey.Unlimited)})) // as it is
	again := k.Revision
	if k = d.patch(t, made.Key.ID, patch(map[string]*apikey.QuotaOverride{"none": nil})); k.Revision != again {
		t.Error("a change of nothing is one")
	}
	if k = d.patch(t, made.Key.ID, admin.KeyPatch{Quotas: admin.Null[map[string]*apikey.QuotaOverride]()}); k.Quotas != nil {
		t.Errorf("all inherited: got %v", k.Quotas)
	}

	// The audit, the record and an import have them too.
	events, err := d.store.Events(ctx, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(events, func(e admin.Event) bool { return e.Action == "key.create" }); !strings.Contains(string(events[i].After), `"quotas":{"each":{"limit":500},"user":{"limit":-1}}`) {
		t.Errorf("the audit has %s", events[i].After)
	}
	for want, status := range map[string]admin.ImportStatus{`{"each":{"limit":7}}`: admin.RowImported, `{"gone":{"limit":7}}`: admin.RowRefused} {
		row := admin.ImportRow{Number: 1, Input: admin.ImportInput{KeyInput: admin.KeyInput{Name: "n"}, Secret: apikey.Format{}.New(apikey.KindInstance).Reveal()}}
		if err := json.Unmarshal([]byte(want), &row.Input.Quotas); err != nil {
			t.Fatal(err)
		}
		done, err := d.ImportKeys(ctx, root, "a", []admin.ImportRow{row}, false)
		if err != nil || done.Rows[0].Status != status {
			t.Errorf("import of %s: got %+v and error %v", want, done.Rows, err)
		}
	}
}

// The role user chooses no limits, lower ones neither: they would stay when those of the instance go down.
func TestRoleUserOverridesNothing(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	each := perUser("each")
	each.Partition = apikey.PartitionKey
	d.quotas(t, admin.QuotaSet{Quotas: []admin.QuotaInput{each}})
	ann := admin.Caller{Name: "oidc:ann", Role: admin.RoleUser, UserPrincipalName: "ann"}
	for _, limit := range []int{apikey.Unlimited, 5, 120, 500} {
		_, err := d.CreateKey(t.Context(), ann, "a", admin.KeyInput{Name: "n", Quotas: map[string]apikey.QuotaOverride{"each": {Limit: limit}}})
		if no, forbidden := errors.AsType[*admin.ForbiddenError](err); !forbidden || no.Field != "quotas" {
			t.Errorf("%d on creation: %v", limit, err)
		}
	}
	made, err := d.CreateKey(t.Context(), ann, "a", admin.KeyInput{Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	d.patch(t, made.Key.ID, admin.KeyPatch{Quotas: admin.To(map[string]*apikey.QuotaOverride{"each": override(60)})})
	for _, own := range []*apikey.QuotaOverride{override(apikey.Unlimited), override(5), nil} {
		_, err := d.UpdateKey(t.Context(), ann, "a", made.Key.ID, admin.KeyPatch{Quotas: admin.To(map[string]*apikey.QuotaOverride{"each": own})}, 0)
		if no, forbidden := errors.AsType[*admin.ForbiddenError](err); !forbidden || no.Field != "quotas" {
			t.Errorf("%v by a change: %v", own, err)
		}
	}
	_, err = d.UpdateKey(t.Context(), ann, "a", made.Key.ID, admin.KeyPatch{Quotas: admin.To(map[string]*apikey.QuotaOverride{"none": override(5)})}, 0)
	if no, forbidden := errors.AsType[*admin.ForbiddenError](err); !forbidden || strings.Contains(no.Error(), "each") {
		t.Errorf("it is told which quotas there are: %v", err)
	}
	if _, err := d.UpdateKey(t.Context(), ann, "a", made.Key.ID, admin.KeyPatch{Quotas: admin.To(map[string]*apikey.QuotaOverride{"each": override(60)})}, 0); err != nil {
		t.Errorf("what is so already: %v", err)
	}
	if _, err := d.UpdateKey(t.Context(), ann, "a", made.Key.ID, admin.KeyPatch{Name: admin.To("m")}, 0); err != nil {
		t.Errorf("what else there is to change: %v", err)
	}
}
