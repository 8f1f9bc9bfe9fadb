package manage

import (
	"encoding/json"
	"errors"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

func TestQuotas(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	const (
		at   = "/instances/a/quotas"
		body = `{"context":"CoreAPI:Completions","partition":"UserPrincipalName","limit":100,"window":"60s","smoothed":true,"lockout":"90s","distributedEnforcement":true}`
	)
	empty := d.send(d.owner, "GET", at, "")
	if got := strings.TrimSpace(empty.Body.String()); empty.Code != 200 || got != `{"value":[]}` {
		t.Fatalf("got %d %s", empty.Code, got)
	}
	wantError(t, d.send(d.owner, "PUT", at+"/per-user", body, "If-Match", "*"), 412, CodePreconditionFailed, "")
	w := d.send(d.owner, "PUT", at+"/per-user", body, "If-Match", empty.Header().Get("ETag"))
	made := read[map[string]any](t, w, 201)
	if got := w.Header().Get("Location"); got != at+"/per-user" {
		t.Errorf("Location %q", got)
	}
	tag := w.Header().Get("ETag")
	delete(made, "effectiveEverywhereAt")
	if diff := cmp.Diff(map[string]any{
		"name": "per-user", "context": "CoreAPI:Completions", "partition": "UserPrincipalName", "limit": 100.0, "window": "1m", "smoothed": true,
		"lockout": "1m30s", "distributedEnforcement": true,
		// What it comes to is said, and so is that each replica counts alone.
		"enforced": map[string]any{"limit": 33.0, "window": "20s", "counted": "perReplica"},
		"replicas": map[string]any{"confirmed": 0.0, "total": 0.0},
	}, made); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	got := d.send(d.owner, "GET", at+"/per-user", "")
	if q := read[admin.QuotaRecord](t, got, 200); q.Enforced.Limit != 33 || got.Header().Get("ETag") != tag {
		t.Errorf("got %s of %q, want %q", got.Body, got.Header().Get("ETag"), tag)
	}
	if w := d.send(d.owner, "PUT", at+"/per-user", body, "If-Match", "*"); w.Code != 200 || w.Header().Get("ETag") != tag {
		t.Errorf("the same again: %d of %q, want 200 of %q", w.Code, w.Header().Get("ETag"), tag)
	}
	w = d.send(d.owner, "PUT", at+"/per-user", `{"name":"per-user","context":"CoreAPI:Completions","partition":"ApiKey","limit":10,"period":"month"}`, "If-Match", tag)
	if q := read[admin.QuotaRecord](t, w, 200); q.Limit != 10 || q.Lockout != "" || q.Enforced.Period != "month" || w.Header().Get("ETag") == tag {
		t.Errorf("replaced as a whole: %s", w.Body)
	}
	wantError(t, d.send(d.owner, "PUT", at+"/per-user", body, "If-Match", tag), 412, CodePreconditionFailed, "")
	wantError(t, d.send(d.owner, "DELETE", at+"/per-user", "", "If-Match", tag), 412, CodePreconditionFailed, "")
	wantError(t, d.send(d.owner, "PUT", at+"/per-user", `{"name":"another","context":"a:b","partition":"None","limit":1,"window":"1s"}`), 400, CodeInvalidRequest, "name")
	wantError(t, d.send(d.owner, "PUT", at+"/a%2Fb", body), 400, CodeInvalidRequest, "name")
	wantError(t, d.send(d.owner, "PUT", at+"/b", `{"context":"a:b","partition":"None","limit":"1","window":"1s"}`), 400, CodeInvalidRequest, "limit")
	wantError(t, d.send(d.owner, "PUT", at+"/b", `{"context":"a:b","partition":"None","limit":1,"windwo":"1s"}`), 400, CodeInvalidRequest, "windwo")

	gone := read[DeletedQuota](t, d.send(d.owner, "DELETE", at+"/per-user", ""), 200)
	if gone.Name != "per-user" || gone.EffectiveEverywhereAt.IsZero() {
		t.Errorf("got %+v", gone)
	}
	wantError(t, d.send(d.owner, "DELETE", at+"/per-user", ""), 404, CodeNotFound, "")
	wantError(t, d.send(d.owner, "GET", at+"/per-user", ""), 404, CodeNotFound, "")
	wantError(t, d.send(d.owner, "GET", "/instances/none/quotas", ""), 404, CodeNotFound, "")
}

func TestApplyQuotas(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	const (
		at = "/instances/a/quotas:apply"
		x  = `{"name":"x","context":"a:b","partition":"None","limit":5,"window":"1h"}`
		y  = `{"name":"y","context":"a:b","partition":"None","limit":5,"window":"1h"}`
		x2 = `{"name":"x","context":"a:b","partition":"None","limit":6,"window":"1h"}`
	)
	verbs := func(a AppliedQuotas) (list []string) {
		for _, c := range a.Changes {
			list = append(list, string(c.Change)+" "+c.Name)
			if (c.Before == nil) != (c.Change == QuotaCreate) || (c.After == nil) != (c.Change == QuotaDelete) {
				t.Errorf("%s: before %v, after %v", c.Change, c.Before, c.After)
			}
		}
		return list
	}
	apply := func(body string, headers ...string) (*httptest.ResponseRecorder, AppliedQuotas) {
		t.Helper()
		w := d.send(d.owner, "POST", at, body, headers...)
		return w, read[AppliedQuotas](t, w, 200)
	}
	_, first := apply(`{"quotas":[` + y + `,` + x + `]}`)
	if got := verbs(first); !slices.Equal(got, []string{"create x", "create y"}) || first.EffectiveEverywhereAt.IsZero() {
		t.Errorf("got %v", got)
	}
	w, would := apply(`{"quotas":[` + x2 + `],"prune":true,"dryRun":true}`)
	tag := w.Header().Get("ETag")
	if got := verbs(would); !slices.Equal(got, []string{"update x", "delete y"}) || !would.DryRun {
		t.Errorf("would: %v", got)
	}
	if got := read[list[admin.QuotaRecord]](t, d.send(d.owner, "GET", "/instances/a/quotas", ""), 200); len(got.Value) != 2 || got.Value[0].Limit != 5 {
		t.Errorf("a dry run changed something: %+v", got)
	}
	// Without prune, what is not named stays.
	if _, done := apply(`{"quotas":[`+x2+`]}`, "If-Match", tag); !slices.Equal(verbs(done), []string{"update x"}) {
		t.Errorf("got %v", verbs(done))
	}
	wantError(t, d.send(d.owner, "POST", at, `{"quotas":[`+x+`]}`, "If-Match", tag), 412, CodePreconditionFailed, "")
	if w, none := apply(`{"quotas":[]}`); len(none.Changes) != 0 || !strings.Contains(w.Body.String(), `"changes":[]`) {
		t.Errorf("got %s", w.Body)
	}

	// All that is wrong is told at once.
	w = d.send(d.owner, "POST", at, `{"quotas":[{"name":"x","context":"a","partition":"Me","limit":1,"window":"50s","smoothed":true},`+y+`,`+y+`]}`)
	wantError(t, w, 400, CodeInvalidRequest, "quotas.x.context")
	var told ErrorBody
	if err := json.Unmarshal(w.Body.Bytes(), &told); err != nil {
		t.Fatal(err)
	}
	var targets []string
	for _, one := range told.Error.Details {
		targets = append(targets, one.Target)
	}
	if diff := cmp.Diff([]string{"quotas.x.context", "quotas.x.partition", "quotas.x.window", "quotas[2].name"}, targets); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	for body, target := range map[string]string{
		`{}`: "quotas", `{"quotas":null}`: "quotas", `{"quotas":{}}`: "quotas", `{"quotas":[null]}`: "quotas[0]", `{"quotas":[{"name":1}]}`: "quotas[0].name",
		`{"quotas":[],"prune":"yes"}`: "prune", `{"quotas":[{"metric_limit":1}]}`: "quotas[0]",
	} {
		wantError(t, d.send(d.owner, "POST", at, body), 400, CodeInvalidRequest, target)
	}
	if _, all := apply(`{"quotas":[],"prune":true}`); !slices.Equal(verbs(all), []string{"delete x", "delete y"}) {
		t.Errorf("got %v", verbs(all))
	}
}

func TestOverridesOverHTTP(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	read[AppliedQuotas](t, d.send(d.owner, "POST", "/instances/a/quotas:apply", `{"quotas":[
		{"name":"x","context":"a:b","partition":"ApiKey","limit":5,"window":"1h"},{"name":"y","context":"a:b","partition":"None","limit":5,"window":"1h"}]}`), 200)
	made := read[createdKey](t, d.send(d.owner, "POST", "/instances/a/apiKeys", `{"name":"n","quotas":{"x":{"limit":500}}}`), 201)
	at := "/instances/a/apiKeys/" + made.Key.ID.String()
	changed := read[ChangedKey](t, d.send(d.owner, "PATCH", at, `{"quotas":{"x":{"limit":-1}}}`), 200)
	if changed.Quotas["x"].Limit != apikey.Unlimited || made.Key.Quotas["x"].Limit != 500 {
		t.Errorf("got %v, then %v", made.Key.Quotas, changed.Quotas)
	}
	page := read[list[admin.KeyRecord]](t, d.send(d.owner, "GET", "/instances/a/apiKeys", ""), 200)
	if len(page.Value) != 1 || page.Value[0].Quotas["x"].Limit != apikey.Unlimited {
		t.Errorf("got %+v", page.Value)
	}
	export := d.send(d.owner, "GET", "/instances/a/apiKeys:export", "")
	if !strings.Contains(export.Body.String(), `"quotas":{"x":{"limit":-1}}`) {
		t.Errorf("got %s", export.Body)
	}
	if w := d.send(d.owner, "PATCH", at, `{"quotas":{"x":null}}`); strings.Contains(w.Body.String(), "quotas") {
		t.Errorf("got %s", w.Body)
	}
	wantError(t, d.send(d.owner, "POST", "/instances/a/apiKeys", `{"name":"n","quotas":{"x":null}}`), 400, CodeInvalidRequest, "quotas")
	for body, target := range map[string]string{
		`{"quotas":{"y":{"limit":1}}}`:                 "quotas.y",
		`{"quotas":{"x":{"limit":0}}}`:                 "quotas.x.limit",
		`{"quotas":{"x":{}}}`:                          "quotas.x.limit",
		`{"quotas":{"x":1}}`:                           "quotas",
		`{"quotas":{"x":{"limit":"1"}}}`:               "quotas.limit",
		`{"quotas":{"x":{"burst":1}}}`:                 "quotas.burst",
		`{"quotas":{"x":{"limit":1},"x":{"limit":2}}}`: "quotas",
		`{"quotas":[]}`:                                "quotas",
	} {
		wantError(t, d.send(d.owner, "PATCH", at, body), 400, CodeInvalidRequest, target)
		wantError(t, d.send(d.owner, "POST", "/instances/a/apiKeys", `{"name":"n",`+body[1:]), 400, CodeInvalidRequest, target)
	}
}

func TestClientQuotas(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	server := httptest.NewServer(d)
	defer server.Close()
	c := NewClient(server.URL, d.owner, nil)
	ctx := t.Context()

	in := admin.QuotaInput{Context: "a:b", Partition: apikey.PartitionNone, Limit: 5, Window: "1h"}
	put, err := c.PutQuota(ctx, "a", "q", in)
	if err != nil || put.Enforced.Limit != 5 {
		t.Fatalf("got %+v, %v", put, err)
	}
	got, err := c.Quota(ctx, "a", "q")
	if err != nil || got != put.QuotaRecord {
		t.Errorf("got %+v, %v", got, err)
	}
	back, err := got.Quota()
	if err != nil {
		t.Fatal(err)
	}
	if again := admin.QuotaRecordOf(&back); again != got {
		t.Errorf("got %+v, want %+v", again, got)
	}
	if all, err := c.Quotas(ctx, "a"); err != nil || len(all) != 1 || all[0] != got {
		t.Errorf("got %+v, %v", all, err)
	}
	in.Name, in.Limit = "r", 6
	would, err := c.ApplyQuotas(ctx, "a", admin.QuotaSet{Quotas: []admin.QuotaInput{admin.QuotaInputOf(&back), in}, DryRun: true})
	if err != nil || len(would.Changes) != 1 || would.ETag == "" {
		t.Fatalf("got %+v, %v", would, err)
	}
	if _, err := c.ApplyQuotas(WithIfMatch(ctx, would.ETag), "a", admin.QuotaSet{Quotas: []admin.QuotaInput{in}}); err != nil {
		t.Error(err)
	}
	_, err = c.DeleteQuota(WithIfMatch(ctx, would.ETag), "a", "q")
	if e, ok := errors.AsType[*Error](err); !ok || e.Code != CodePreconditionFailed {
		t.Errorf("got %v", err)
	}
	if gone, err := c.DeleteQuota(ctx, "a", "q"); err != nil || gone.Name != "q" {
		t.Errorf("got %+v, %v", gone, err)
	}
	if _, err := c.Quota(ctx, "a", "a/b"); err == nil {
		t.Error("a name with a slash is another address")
	}
}
