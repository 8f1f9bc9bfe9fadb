package portal

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// jsonPaths lists the leaves of a type by their paths in JSON.
func jsonPaths(t reflect.Type, path string) []string {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return []string{path}
	}
	var all []string
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		all = append(all, jsonPaths(f.Type, strings.TrimPrefix(path+"."+name, "."))...)
	}
	return all
}

// The form has every field that the Management API has, but what has no meaning.
func TestPolicyFormHasEveryField(t *testing.T) {
	want := slices.DeleteFunc(jsonPaths(reflect.TypeFor[admin.PolicyInput](), ""), func(s string) bool { return s == "total.maxConcurrent" })
	var got []string
	for _, group := range policyForm {
		for _, f := range group.fields {
			got = append(got, f.name)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("the form has %v\nwant %v", got, want)
	}
}

// What a form shows of a policy is that policy when it is sent back.
func TestPolicyFormLosesNothing(t *testing.T) {
	values := policyValues{}
	for _, group := range policyForm {
		for _, f := range group.fields {
			switch f.kind {
			case policySwitch:
				values[f.name] = "on"
			case policyChoice:
				values[f.name] = f.choices[len(f.choices)-1]
			case policyScopes:
				values[f.name] = "agents:*\nchat:read"
			case policyYesNo:
				values[f.name] = "no"
			case policyNumbers:
				values[f.name] = "7 2"
			case policyDuration:
				values[f.name] = map[string]string{"alerts.refusals.window": "9m", "expiration.longestLife": "200d"}[f.name]
				if values[f.name] == "" {
					values[f.name] = "30d"
				}
			case policyCount:
				values[f.name] = "7"
			}
		}
	}
	in, err := values.input()
	if err != nil {
		t.Fatal(err)
	}
	p, err := in.Policy()
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range policyValuesOf(&p) {
		if got != values[name] {
			t.Errorf("%s: got %q, want %q", name, got, values[name])
		}
		delete(values, name)
	}
	if len(values) > 0 {
		t.Errorf("lost: %v", values)
	}
}

func revisionIn(t *testing.T, d *desk) string {
	t.Helper()
	in, err := d.svc.Instance(t.Context(), d.owner, instance)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(in.Revision)
}

// A change is shown first, made by the same form, and refused with what was entered if somebody was faster.
func TestPolicyIsPreviewedAndNotOverwritten(t *testing.T) {
	d := newDesk(t)
	b := d.signIn(admin.RoleOperator)
	form := url.Values{"revision": {revisionIn(t, d)}, "caps.instance": {"7"}, "do": {"preview"}}
	status, page := b.follow(b.post("/instances/acme/policy", form))
	if status != http.StatusOK || !strings.Contains(page, "<td>1000</td><td>7</td>") {
		t.Fatalf("%d, want the change from 1000 to 7:\n%s", status, page)
	}
	if in, _ := d.svc.Instance(t.Context(), d.owner, instance); in.Policy.Caps.Instance != 0 {
		t.Fatal("the preview changed the policy")
	}
	if _, err := d.svc.PutInstance(t.Context(), d.owner, instance, apikey.Policy{Caps: apikey.Caps{User: 3}}); err != nil {
		t.Fatal(err)
	}
	form.Set("do", "apply")
	status, page = b.follow(b.post("/instances/acme/policy", form))
	if status != http.StatusPreconditionFailed || !strings.Contains(page, "Of each user: now 3, you entered inherited") || !strings.Contains(page, `value="7"`) {
		t.Fatalf("%d, want what differs and what was entered:\n%s", status, page)
	}
	form.Set("revision", revisionIn(t, d))
	if status, page = b.follow(b.post("/instances/acme/policy", form)); status != http.StatusOK || !strings.Contains(page, "The policy is as you said.") {
		t.Fatalf("%d:\n%s", status, page)
	}
	if in, _ := d.svc.Instance(t.Context(), d.owner, instance); in.Policy.Caps.Instance != 7 || in.Policy.Caps.User != 0 {
		t.Errorf("the policy is %+v", in.Policy.Caps)
	}
	form.Set("caps.instance", "many")
	if status, page = b.follow(b.post("/instances/acme/policy", form)); status != http.StatusBadRequest || !strings.Contains(page, "Must be a whole number.") || !strings.Contains(page, `value="many"`) {
		t.Errorf("%d, want the fault at its field:\n%s", status, page)
	}
}

func TestQuotaIsMadeChangedAndDeleted(t *testing.T) {
	d := newDesk(t)
	b := d.signIn(admin.RoleOperator)
	form := url.Values{"revision": {revisionIn(t, d)}, "name": {"daily"}, "context": {"core:completions"}, "partition": {"None"}, "limit": {"100"}, "period": {"day"}}
	status, page := b.follow(b.post("/instances/acme/new-quota", form))
	if status != http.StatusOK || !strings.Contains(page, "100 in each day") {
		t.Fatalf("%d, want a preview:\n%s", status, page)
	}
	if all, _, _ := d.svc.Quotas(t.Context(), d.owner, instance); len(all) != 0 {
		t.Fatal("the preview made the quota")
	}
	form.Set("do", "apply")
	if status, page = b.follow(b.post("/instances/acme/new-quota", form)); status != http.StatusOK || !strings.Contains(page, "The quota daily is as you said.") {
		t.Fatalf("%d:\n%s", status, page)
	}
	// The same once more, as by a reload, is no second one and no change.
	form.Set("revision", revisionIn(t, d))
	if status, page = b.follow(b.post("/instances/acme/new-quota", form)); status != http.StatusBadRequest || !strings.Contains(page, "Is taken by another quota") {
		t.Errorf("%d, want the name to be taken:\n%s", status, page)
	}
	form.Set("do", "preview")
	form.Set("limit", "50")
	status, page = b.follow(b.post("/instances/acme/quotas/daily", form))
	if status != http.StatusOK || !strings.Contains(page, "<td>100</td><td>50</td>") {
		t.Fatalf("%d, want the change:\n%s", status, page)
	}
	form.Set("context", "x")
	form.Set("window", "soon")
	status, page = b.follow(b.post("/instances/acme/quotas/daily", form))
	if status != http.StatusBadRequest || strings.Count(page, `class="fault"`) < 1 || !strings.Contains(page, `value="soon"`) {
		t.Errorf("%d, want faults at their fields:\n%s", status, page)
	}
	form.Set("revision", "1")
	form.Set("context", "core:completions")
	form.Del("window")
	if status, page = b.follow(b.post("/instances/acme/quotas/daily", form)); status != http.StatusPreconditionFailed || !strings.Contains(page, "Somebody else changed") {
		t.Errorf("%d, want a conflict:\n%s", status, page)
	}
	if status, page = b.get("/instances/acme/quotas/daily/delete"); status != http.StatusOK || !strings.Contains(page, "Delete daily") {
		t.Errorf("%d:\n%s", status, page)
	}
	if status, page = b.follow(b.post("/instances/acme/quotas/daily/delete", url.Values{"revision": {revisionIn(t, d)}})); status != http.StatusOK || !strings.Contains(page, "is deleted") {
		t.Errorf("%d:\n%s", status, page)
	}
	if all, _, _ := d.svc.Quotas(t.Context(), d.owner, instance); len(all) != 0 {
		t.Error("the quota is still there")
	}
}

// Who may see a page sees it, and who may not is told so; what changes something is not offered to who may not.
func TestPagesOfRoles(t *testing.T) {
	d := newDesk(t)
	if _, err := d.svc.PutQuota(t.Context(), d.owner, instance, "daily", admin.QuotaInput{Context: "core:x", Partition: apikey.PartitionNone, Limit: 5, Period: "day"}, 0); err != nil {
		t.Fatal(err)
	}
	all := []admin.Role{admin.RoleOwner, admin.RoleOperator, admin.RoleAuditor, admin.RoleUser}
	for path, see := range map[string][]admin.Role{
		"/quotas": all[:3], "/quotas/daily": all[:3], "/policy": all[:3], "/audit": {all[0], all[2]}, "/alerts": all[:3],
		"/tokens": {all[0], all[2]}, "/new-token": all[:1], "/envoy": all[:3],
	} {
		for _, role := range all {
			b := d.signIn(role)
			status, page := b.get("/instances/acme" + path)
			want := http.StatusForbidden
			if slices.Contains(see, role) {
				want = http.StatusOK
			}
			if status != want {
				t.Errorf("%s, %s: got %d, want %d:\n%s", path, role, status, want, page)
			}
			if main := page[strings.Index(page, "<main"):]; role == admin.RoleAuditor && strings.Contains(main, `method="post"`) {
				t.Errorf("%s offers a change to an auditor:\n%s", path, main)
			}
		}
	}
	for path, form := range map[string]url.Values{
		"/policy": {"revision": {revisionIn(t, d)}, "do": {"apply"}, "disabled": {"on"}}, "/new-quota": {"revision": {revisionIn(t, d)}, "do": {"apply"}, "name": {"x"}, "context": {"a:b"}, "limit": {"1"}, "period": {"day"}, "partition": {"None"}},
		"/quotas/daily/delete": {"revision": {revisionIn(t, d)}}, "/new-token": {"name": {"x"}, "role": {"owner"}, "instanceId": {instance}},
	} {
		if resp := d.signIn(admin.RoleAuditor).post("/instances/acme"+path, form); resp.StatusCode != http.StatusForbidden {
			t.Errorf("POST %s as an auditor: %d, want 403", path, resp.StatusCode)
		}
		if resp := d.signIn(admin.RoleOwner).do(http.MethodPost, "/instances/acme"+path, form); resp.StatusCode != http.StatusForbidden {
			t.Errorf("POST %s without what its form carries: %d, want 403", path, resp.StatusCode)
		}
	}
}

func TestTokenIsShownOnceAndRevoked(t *testing.T) {
	d := newDesk(t)
	b := d.signIn(admin.RoleOwner)
	_, page := b.get("/instances/acme/new-token")
	form := fieldsOf(page)
	for name, value := range map[string]string{"name": "<script>alert(1)</script>", "role": "auditor", "instanceId": instance, "expiresIn": "30d"} {
		form.Set(name, value)
	}
	resp := b.do(http.MethodPost, "/instances/acme/new-token", form)
	page = text(t, resp)
	at := strings.Index(page, "kwm_")
	if resp.StatusCode != http.StatusOK || at < 0 || resp.Header.Get("Cache-Control") != "no-store, max-age=0" || strings.Contains(page, "<script>alert") {
		t.Fatalf("%d %q:\n%s", resp.StatusCode, resp.Header.Get("Cache-Control"), page)
	}
	secret := page[at : at+53]
	caller, err := d.svc.Authenticate(t.Context(), apikey.NewSecret(secret))
	if err != nil || caller.Role != admin.RoleAuditor {
		t.Fatalf("%+v, %v", caller, err)
	}
	// The same form once more, by a second click say: the same token, and its one secret.
	if again := text(t, b.do(http.MethodPost, "/instances/acme/new-token", form)); !strings.Contains(again, secret) {
		t.Error("the form sent twice does not answer what it made")
	}
	elsewhere := d.signIn(admin.RoleOwner)
	copied := maps.Clone(form)
	copied.Set("form", elsewhere.formToken())
	if resp := elsewhere.do(http.MethodPost, "/instances/acme/new-token", copied); resp.StatusCode != http.StatusConflict || strings.Contains(text(t, resp), secret) {
		t.Errorf("the form in another session: %d, want 409 and no secret", resp.StatusCode)
	}
	if all, err := d.svc.Tokens(t.Context(), d.owner); err != nil || len(all) != len(d.tokens)+1 {
		t.Errorf("%d tokens, want one more than %d; %v", len(all), len(d.tokens), err)
	}
	if _, list := b.get("/instances/acme/tokens"); strings.Contains(list, secret) || !strings.Contains(list, "&lt;script&gt;") {
		t.Errorf("the list shows the secret, or not the name:\n%s", list)
	}
	id := strings.TrimPrefix(caller.Name, "token:")
	if status, page := b.get("/instances/acme/tokens/" + id + "/revoke"); status != http.StatusOK || !strings.Contains(page, "at once and for good") {
		t.Errorf("%d:\n%s", status, page)
	}
	if status, page := b.follow(b.post("/instances/acme/tokens/"+id+"/revoke", nil)); status != http.StatusOK || !strings.Contains(page, "is revoked, at once.") {
		t.Errorf("%d:\n%s", status, page)
	}
	if _, err := d.svc.Authenticate(t.Context(), apikey.NewSecret(secret)); err == nil {
		t.Error("the revoked token works")
	}
	if resp := b.do(http.MethodPost, "/instances/acme/new-token", form); resp.StatusCode != http.StatusConflict {
		t.Errorf("the form of a token that is revoked: %d, want 409", resp.StatusCode)
	}
	if resp := b.post("/instances/acme/new-token", url.Values{"name": {"x"}, "role": {"auditor"}}); resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a form without what tells it from another: %d, want 400", resp.StatusCode)
	}
	form.Set("once", "3d5f2f4c-5f0c-4b55-93c5-0a4c2b0e9f10")
	form.Set("instanceId", "other")
	if resp := b.do(http.MethodPost, "/instances/acme/new-token", form); resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a token of another instance: %d, want 400", resp.StatusCode)
	}
}

func TestTokenPagesOfAnotherInstanceAreNone(t *testing.T) {
	d := newDesk(t)
	if _, err := d.svc.PutInstance(t.Context(), d.owner, "rival", apikey.Policy{}); err != nil {
		t.Fatal(err)
	}
	b := d.signIn(admin.RoleOwner)
	for _, path := range []string{"rival/tokens", "rival/new-token", "missing/tokens", "missing/new-token"} {
		if status, _ := b.get("/instances/" + path); status != http.StatusNotFound {
			t.Errorf("%s: %d, want 404", path, status)
		}
	}
}

func TestAuditIsFilteredAndPaged(t *testing.T) {
	d := newDesk(t)
	for range auditPage + 5 {
		if _, err := d.svc.PutInstance(t.Context(), d.owner, instance, apikey.Policy{}); err != nil {
			t.Fatal(err)
		}
	}
	b := d.signIn(admin.RoleAuditor)
	status, page := b.get("/instances/acme/audit?action=instance.put")
	if status != http.StatusOK || strings.Count(page, `data-label="Action">instance.put`) != auditPage {
		t.Fatalf("%d, %d events", status, strings.Count(page, `data-label="Action">instance.put`))
	}
	_, older, _ := strings.Cut(page, `after=`)
	older, _, _ = strings.Cut(older, `"`)
	older = strings.ReplaceAll(older, "&amp;", "&")
	if status, page = b.get("/instances/acme/audit?action=instance.put&after=" + older); status != http.StatusOK || strings.Count(page, `data-label="Action">instance.put`) != 6 {
		t.Errorf("%d, %d events on the second page, want 6", status, strings.Count(page, `data-label="Action">instance.put`))
	}
	if status, page = b.get("/instances/acme/audit?from=yesterday"); status != http.StatusBadRequest || !strings.Contains(page, "Must be a date") {
		t.Errorf("%d, want the fault at its field", status)
	}
	if status, _ = b.get("/instances/acme/audit?to=2020-01-01&actor=nobody&target=x&outcome=refused"); status != http.StatusOK {
		t.Errorf("%d", status)
	}
	// The chain is of all instances, and none of a tenant's business.
	if resp := b.post("/instances/acme/audit/verify", nil); resp.StatusCode != http.StatusNotFound {
		t.Errorf("verify by a token of one instance: %d, want 404", resp.StatusCode)
	}
}

// TestInstanceIsMadeOnce: of two who make the same instance at once, one makes it, and the other does not reset what
// was made of it since.
func TestInstanceIsMadeOnce(t *testing.T) {
	d := newDesk(t)
	made, err := d.svc.CreateToken(t.Context(), d.owner, admin.TokenInput{Name: "of all", Role: admin.RoleOwner})
	if err != nil {
		t.Fatal(err)
	}
	d.tokens[admin.RoleOwner] = made
	b := d.signIn(admin.RoleOwner)
	theirs := apikey.Policy{Caps: apikey.Caps{Instance: 7}}
	d.before = func() {
		if _, err := d.svc.PutInstance(t.Context(), d.owner, "fresh", theirs); err != nil {
			t.Error(err)
		}
	}
	resp := b.post("/instances", url.Values{"id": {"fresh"}})
	if page := text(t, resp); resp.StatusCode != http.StatusConflict || !strings.Contains(page, "is there already") {
		t.Errorf("%d:\n%s", resp.StatusCode, page)
	}
	if in, err := d.svc.Instance(t.Context(), d.owner, "fresh"); err != nil || in.Policy.Caps != theirs.Caps {
		t.Errorf("the policy was reset: %+v, %v", in, err)
	}
	if resp := b.post("/instances", url.Values{"id": {"another"}}); resp.StatusCode != http.StatusSeeOther {
		t.Errorf("an instance that nobody made: %d", resp.StatusCode)
	}
}
