package manage

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A merge patch means the same to encoding/json, and a member tells absent, null and a value apart.
func FuzzDecodePatch(f *testing.F) {
	f.Add([]byte(`{"name":null,"scopes":[],"limits":{"rate":{"requests":1,"per":null},"burst":null},"metadata":{"k":"v","l":null},"disabled":true}`))
	f.Add([]byte(`{"limits":null,"metadata":null,"scopes":null,"inactivityDays":null}`))
	f.Add([]byte(`{"name":"n","name":"m"}`))
	f.Add([]byte(`{"Present":true,"Null":true}`))
	f.Add([]byte(`{"scopes":[null]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var got, want admin.KeyPatch
		if err := decode(data, &got); err != nil {
			if _, ok := errors.AsType[*apikey.InvalidError](err); !ok {
				t.Fatalf("got %T %v", err, err)
			}
			return
		}
		strict := json.NewDecoder(bytes.NewReader(data))
		strict.DisallowUnknownFields()
		if err := strict.Decode(&want); err != nil {
			t.Fatalf("accepted, but encoding/json says %v", err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-encoding/json +ours)\n%s", diff)
		}
	})
}

func TestDecodePatch(t *testing.T) {
	value := "v"
	for body, want := range map[string]admin.KeyPatch{
		`{}`:                                 {},
		`{"name":null}`:                      {Name: admin.Null[string]()},
		`{"name":""}`:                        {Name: admin.To("")},
		`{"scopes":[]}`:                      {Scopes: admin.To([]string{})},
		`{"scopes":null}`:                    {Scopes: admin.Null[[]string]()},
		`{"disabled":false}`:                 {Disabled: admin.To(false)},
		`{"inactivityDays":null}`:            {InactivityDays: admin.Null[int]()},
		`{"metadata":{"k":"v","l":null}}`:    {Metadata: admin.To(map[string]*string{"k": &value, "l": nil})},
		`{"limits":{"rate":null,"burst":3}}`: {Limits: admin.To(admin.LimitsPatch{Rate: admin.Null[admin.RatePatch](), Burst: admin.To(3)})},
		`{"limits":{"rate":{"per":"1s"}}}`:   {Limits: admin.To(admin.LimitsPatch{Rate: admin.To(admin.RatePatch{Per: admin.To("1s")})})},
	} {
		var got admin.KeyPatch
		if err := decode([]byte(body), &got); err != nil {
			t.Errorf("%s: %v", body, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got)\n%s", body, diff)
		}
	}
	for body, field := range map[string]string{
		`{"name":1}`:                         "name",
		`{"limits":{"burst":1.5}}`:           "limits.burst",
		`{"limits":{"rate":{"per":1}}}`:      "limits.rate.per",
		`{"limits":{"Burst":1}}`:             "limits.burst",
		`{"limits":{"burst":1,"burst":2}}`:   "limits.burst",
		`{"metadata":{"k":1}}`:               "metadata",
		`{"metadata":{"k":null,"k":"v"}}`:    "metadata",
		`{"scopes":[null]}`:                  "scopes[0]",
		`{"disabled":"true"}`:                "disabled",
		`{"status":"disabled"}`:              "status",
		`{"name":{"Present":true,"Null":1}}`: "name",
	} {
		err := decode([]byte(body), new(admin.KeyPatch))
		if bad, ok := errors.AsType[*apikey.InvalidError](err); !ok || bad.Field != field {
			t.Errorf("%s: got %v, want an error about %s", body, err, field)
		}
	}
}

func TestUpdateKey(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	made := read[createdKey](t, d.send(d.owner, "POST", "/instances/a/apiKeys",
		`{"name":"n","description":"d","scopes":["x"],"metadata":{"k":"v","l":"w"},"limits":{"burst":5},"expiresIn":"1d"}`), 201)
	at := "/instances/a/apiKeys/" + made.Key.ID.String()
	tag := d.send(d.owner, "GET", at, "").Header().Get("ETag")
	if tag == "" || tag != d.send(d.owner, "GET", at, "").Header().Get("ETag") {
		t.Fatalf("ETag %q does not stay", tag)
	}
	w := d.send(d.owner, "PATCH", at, `{"name":"m","metadata":{"k":null,"x":"y"},"limits":{"maxConcurrent":3}}`, "Content-Type", "application/merge-patch+json", "If-Match", tag)
	got := read[ChangedKey](t, w, 200)
	want := made.Key
	want.Name, want.Metadata, want.Limits.MaxConcurrent = "m", map[string]string{"l": "w", "x": "y"}, 3
	if diff := cmp.Diff(want, got.KeyRecord); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if got.EffectiveEverywhereAt.IsZero() {
		t.Errorf("the answer does not say since when it holds: %s", w.Body)
	}
	now := w.Header().Get("ETag")
	if now == tag || now != d.send(d.owner, "GET", at, "").Header().Get("ETag") {
		t.Errorf("ETag %q after %q", now, tag)
	}
	// The loser is told, and has changed nothing; so is whoever names a version that never was.
	for _, seen := range []string{tag, "W/" + now, `"0"`, `"x"`, `""`, `"9999999999999999999999"`} {
		wantError(t, d.send(d.owner, "PATCH", at, `{"name":"z"}`, "If-Match", seen), 412, CodePreconditionFailed, "")
	}
	for _, bad := range []string{"1", "", `"1`, `"1", "2"`, `"1" `} {
		wantError(t, d.send(d.owner, "PATCH", at, `{"name":"z"}`, "If-Match", bad), 400, CodeInvalidRequest, "If-Match")
	}
	if got := read[admin.KeyRecord](t, d.send(d.owner, "GET", at, ""), 200); got.Name != "m" {
		t.Errorf("name %q: a refused change changed it", got.Name)
	}
	// What is so already changes nothing; * is any version that is.
	if again := d.send(d.owner, "PATCH", at, `{"name":"m","type":"instance"}`, "If-Match", "*"); again.Code != 200 || again.Header().Get("ETag") != now {
		t.Errorf("got %d with ETag %q, want %q", again.Code, again.Header().Get("ETag"), now)
	}
	for body, field := range map[string]string{
		`{"type":"user"}`:                      "type",
		`{"agentName":"b"}`:                    "agentName",
		`{"environment":"prod"}`:               "environment",
		`{"notBefore":"2099-01-01T00:00:00Z"}`: "notBefore",
		`{"name":null}`:                        "name",
		`{"disabled":null}`:                    "disabled",
		`{"expiresIn":"366d"}`:                 "expiresIn",
		`{"id":"x"}`:                           "id",
	} {
		wantError(t, d.send(d.owner, "PATCH", at, body), 400, CodeInvalidRequest, field)
	}
	wantError(t, d.send(d.owner, "PATCH", at, `{}`, "Content-Type", "application/json-patch+json"), 415, CodeUnsupportedMediaType, "")
	read[any](t, d.send(d.owner, "DELETE", at, ""), 200)
	wantError(t, d.send(d.owner, "PATCH", at, `{"name":"z"}`), 409, CodeKeyState, "")
}

// A user changes its own keys, but not how much they may use, and enables none that was disabled.
func TestUsersChangeTheirOwn(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	user := d.token(t, tokenFor(admin.RoleUser, "a")).Secret
	made := read[createdKey](t, d.send(user, "POST", "/instances/a/apiKeys", `{"name":"n"}`), 201)
	at := "/instances/a/apiKeys/" + made.Key.ID.String()
	read[any](t, d.send(user, "PATCH", at, `{"name":"m"}`), 200)
	wantError(t, d.send(user, "PATCH", at, `{"limits":{"burst":1000}}`), 403, CodeForbidden, "limits")
	read[any](t, d.send(user, "POST", at+"/rotate", `{}`), 200)
	read[any](t, d.send(user, "POST", at+"/generations/1/revoke", ""), 200)
	read[any](t, d.send(user, "PATCH", at, `{"disabled":true}`), 200)
	wantError(t, d.send(user, "PATCH", at, `{"disabled":false}`), 403, CodeForbidden, "disabled")
	read[any](t, d.send(d.owner, "PATCH", at, `{"disabled":false}`), 200)
	// By filter too it reaches no other's.
	other := d.key(t, "a")
	got := read[RevokedKeys](t, d.send(user, "POST", "/instances/a/apiKeys:revoke", `{"all":true,"dryRun":true}`), 200)
	if got.Count != 1 || got.Keys[0].ID != made.Key.ID {
		t.Errorf("got %+v", got)
	}
	limits := read[admin.KeyLimits](t, d.send(user, "GET", "/instances/a/apiKeys:limits", ""), 200)
	if limits.Owner == nil || limits.Owner.Used != 1 || limits.Creator == nil || limits.Creator.Used != 1 {
		t.Errorf("got %+v", limits)
	}
	wantError(t, d.send(user, "GET", "/instances/a/apiKeys:limits?userPrincipalName=bob@example.com", ""), 404, CodeNotFound, "")
	wantError(t, d.send(user, "GET", "/instances/a/apiKeys/"+other.Key.ID.String()+"/advice", ""), 404, CodeNotFound, "")
}

func TestRotateKey(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	k := d.key(t, "a")
	at := "/instances/a/apiKeys/" + k.Key.ID.String()
	w := d.send(d.owner, "POST", at+"/rotate", `{"gracePeriod":"1h"}`, "Idempotency-Key", "once")
	first := read[rotatedKey](t, w, 200)
	if kind, err := (apikey.Format{}).Check(first.Secret); err != nil || kind != apikey.KindInstance || first.Secret == k.Secret.Reveal() {
		t.Errorf("secret of kind %c, %v", kind, err)
	}
	if n := len(first.Key.Generations); n != 2 || first.Key.ID != k.Key.ID || first.Key.Generations[0].ValidUntil.IsZero() {
		t.Errorf("got %+v", first.Key)
	}
	if w.Header().Get("ETag") == "" || w.Header().Get("Idempotent-Replayed") != "" || w.Header().Get("Location") != "" {
		t.Errorf("headers %v", w.Header())
	}
	// Asked again, the same answer; with another body, none.
	w = d.send(d.owner, "POST", at+"/rotate", `{"gracePeriod":"1h"}`, "Idempotency-Key", "once")
	if again := read[rotatedKey](t, w, 200); again.Secret != first.Secret || w.Header().Get("Idempotent-Replayed") != "true" {
		t.Errorf("repeated: another secret, or %v", w.Header())
	}
	wantError(t, d.send(d.owner, "POST", at+"/rotate", `{}`, "Idempotency-Key", "once"), 422, CodeIdempotencyKeyReused, "")
	wantError(t, d.send(d.owner, "POST", at+"/rotate", `{}`), 409, CodeKeyState, "")
	wantError(t, d.send(d.owner, "POST", at+"/rotate", `{"gracePeriod":"31d"}`), 400, CodeInvalidRequest, "gracePeriod")
	wantError(t, d.send(d.owner, "POST", at+"/rotate", `{"endOldest":true}`, "If-Match", `"1"`), 412, CodePreconditionFailed, "")

	ended := read[ChangedKey](t, d.send(d.owner, "POST", at+"/generations/1/revoke", ""), 200)
	if g := ended.Generations[0]; !g.Revoked || g.ValidUntil.After(time.Now()) {
		t.Errorf("got %+v", g)
	}
	read[any](t, d.send(d.owner, "POST", at+"/generations/1/revoke", ""), 200) // repeatable
	wantError(t, d.send(d.owner, "POST", at+"/generations/2/revoke", ""), 409, CodeKeyState, "")
	for _, number := range []string{"0", "3", "-1", "1.0", "x", "%00", "99999999999999999999"} {
		wantError(t, d.send(d.owner, "POST", at+"/generations/"+number+"/revoke", ""), 404, CodeNotFound, "")
	}
	noCanary(t, d.log.String(), k.Secret, apikey.NewSecret(first.Secret))
}

// Whatever is asked and however it is ordered, the pages together are what a look at every key says.
func TestListsByFilterAndOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		var all []*apikey.Key
		for i, body := range []string{
			`{"name":"b"}`, `{"name":"a","expiresIn":"1d"}`, `{"name":"a b","expiresIn":"40d","environment":"prod"}`,
			`{"name":"ä","type":"user","userPrincipalName":"ann@example.com","inactivityDays":3}`,
			`{"name":"a","type":"agent","agentName":"sales","inactivityDays":30,"expiresIn":"2d"}`,
			`{"name":"c","type":"agent","agentName":"ops"}`, `{"name":"b","type":"user","userPrincipalName":"bob@example.com"}`,
		} {
			made := read[createdKey](t, d.send(d.owner, "POST", "/instances/a/apiKeys", body), 201)
			at := "/instances/a/apiKeys/" + made.Key.ID.String()
			if i%3 == 1 {
				read[any](t, d.send(d.owner, "PATCH", at, `{"disabled":true}`), 200)
			}
			if i == 6 {
				read[any](t, d.send(d.owner, "DELETE", at, ""), 200)
			}
			time.Sleep(13 * time.Hour)
			if i == 2 || i == 4 {
				if err := d.store.Touch(t.Context(), []apikey.Use{{KeyID: made.Key.ID, Generation: 1, At: time.Now()}}); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, k := range read[list[admin.KeyRecord]](t, d.send(d.owner, "GET", "/instances/a/apiKeys", ""), 200).Value {
			one, err := d.store.Key(t.Context(), "a", k.ID)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, one)
		}
		for _, filter := range []url.Values{
			{}, {"type": {"agent"}}, {"status": {"active"}}, {"status": {"disabled"}}, {"status": {"revoked"}}, {"status": {"expired"}},
			{"userPrincipalName": {"ann@example.com"}}, {"agentName": {"ops"}}, {"environment": {"prod"}}, {"createdBy": {all[0].CreatedBy}}, {"createdBy": {"nobody"}},
			{"namePrefix": {"a"}}, {"namePrefix": {"ä"}}, {"unusedFor": {"40h"}}, {"expiresBefore": {"10d"}}, {"idleBefore": {"20d"}}, {"neverUsed": {"true"}},
			{"noExpiration": {"true"}}, {"noExpiration": {"false"}, "type": {"user"}}, {"type": {"agent"}, "neverUsed": {"true"}, "namePrefix": {"c"}},
		} {
			for _, order := range []string{"", "createdAt", "createdAt desc", "name", "name desc", "lastUsedAt", "lastUsedAt desc", "expirationDate", "expirationDate desc", "idleAfter"} {
				if order != "" {
					filter.Set("orderby", order)
				}
				in := keyList{
					Type: filter.Get("type"), Status: filter.Get("status"), UserPrincipalName: filter.Get("userPrincipalName"), AgentName: filter.Get("agentName"),
					Environment: filter.Get("environment"), CreatedBy: filter.Get("createdBy"), NamePrefix: filter.Get("namePrefix"), UnusedFor: filter.Get("unusedFor"),
					ExpiresBefore: filter.Get("expiresBefore"), IdleBefore: filter.Get("idleBefore"), NeverUsed: yesNo(filter.Get("neverUsed")),
					NoExpiration: yesNo(filter.Get("noExpiration")), OrderBy: filter.Get("orderby"),
				}
				asked, err := in.input()
				if err != nil {
					t.Fatal(err)
				}
				q, err := asked.Query(time.Now())
				if err != nil {
					t.Fatal(err)
				}
				want := map[apikey.ID]bool{}
				for _, k := range all {
					if q.Passes(k, q.Now) && (q.Order != admin.OrderIdle || k.InactivityDays != 0) {
						want[k.ID] = true
					}
				}
				for _, size := range []int{1, 3} {
					filter.Set("maxpagesize", strconv.Itoa(size))
					var got []admin.KeyRecord
					for target := "/instances/a/apiKeys?" + filter.Encode(); target != ""; {
						page := read[list[admin.KeyRecord]](t, d.send(d.owner, "GET", target, ""), 200)
						got = append(got, page.Value...)
						if target = page.NextLink; len(got) > 2*len(all) {
							t.Fatalf("%s: the pages do not end", filter.Encode())
						}
					}
					seen := map[apikey.ID]bool{}
					for _, k := range got {
						seen[k.ID] = true
					}
					if len(got) != len(want) || !cmp.Equal(seen, want) {
						t.Errorf("%s: got %d keys, want %d", filter.Encode(), len(got), len(want))
					}
					if !slices.IsSortedFunc(got, func(a, b admin.KeyRecord) int { return inOrder(q.Order, a, b) }) {
						t.Errorf("%s: not in order: %+v", filter.Encode(), got)
					}
				}
			}
		}
	})
}

// inOrder compares two keys as an order of the API says, in what orders alone.
func inOrder(o admin.KeyOrder, a, b admin.KeyRecord) int {
	used := func(k admin.KeyRecord) time.Time {
		if k.LastUsedAt.IsZero() {
			return k.CreatedAt
		}
		return k.LastUsedAt
	}
	end := func(k admin.KeyRecord) time.Time {
		if k.ExpirationDate.IsZero() {
			return time.Unix(1<<40, 0) // without a date: last
		}
		return k.ExpirationDate
	}
	switch o {
	case admin.OrderNewest:
		return b.CreatedAt.Compare(a.CreatedAt)
	case admin.OrderOldest:
		return a.CreatedAt.Compare(b.CreatedAt)
	case admin.OrderName:
		return strings.Compare(a.Name, b.Name)
	case admin.OrderNameDesc:
		return strings.Compare(b.Name, a.Name)
	case admin.OrderLastUsed:
		return used(a).Compare(used(b))
	case admin.OrderLastUsedDesc:
		return used(b).Compare(used(a))
	case admin.OrderExpiration:
		return end(a).Compare(end(b))
	case admin.OrderExpirationDesc:
		return end(b).Compare(end(a))
	}
	return a.IdleAfter.Compare(b.IdleAfter)
}

// A cursor goes on with the list that gave it and with no other, whatever differs.
func TestCursorsBindFilterAndOrder(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.key(t, "a")
	d.key(t, "a")
	page := read[list[admin.KeyRecord]](t, d.send(d.owner, "GET", "/instances/a/apiKeys?maxpagesize=1&orderby=name&namePrefix=n", ""), 200)
	next, err := url.Parse(page.NextLink)
	if err != nil {
		t.Fatal(err)
	}
	cursor := "&cursor=" + next.Query().Get("cursor")
	read[any](t, d.send(d.owner, "GET", "/instances/a/apiKeys?namePrefix=n&orderby=name&maxpagesize=7"+cursor, ""), 200)
	for _, query := range []string{
		"", "orderby=name", "namePrefix=n", "orderby=name+desc&namePrefix=n", "orderby=lastUsedAt&namePrefix=n", "orderby=name&namePrefix=na", "orderby=name&namePrefix=n&type=agent",
		"orderby=name&namePrefix=n&neverUsed=true", "orderby=name&namePrefix=n&unusedFor=1d",
	} {
		wantError(t, d.send(d.owner, "GET", "/instances/a/apiKeys?"+query+cursor, ""), 400, CodeInvalidRequest, "cursor")
	}
	for query, field := range map[string]string{
		"type=x": "type", "status=x": "status", "unusedFor=x": "unusedFor", "expiresBefore=x": "expiresBefore", "idleBefore=x": "idleBefore",
		"neverUsed=1": "neverUsed", "noExpiration=yes": "noExpiration", "orderby=hint": "orderby", "owner=x": "owner",
	} {
		wantError(t, d.send(d.owner, "GET", "/instances/a/apiKeys?"+query, ""), 400, CodeInvalidRequest, field)
	}
}

func TestRevokeKeysByFilter(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	for range 11 {
		d.key(t, "a")
	}
	const at = "/instances/a/apiKeys:revoke"
	for body, field := range map[string]string{
		`{}`: "filter", `{"filter":{}}`: "filter", `{"all":true,"filter":{"type":"user"}}`: "all", `{"all":true,"reason":"x"}`: "reason",
		`{"all":true,"count":-1}`: "count", `{"filter":{"unusedFor":"x"}}`: "filter.unusedFor", `{"filter":{"owner":"x"}}`: "filter.owner",
	} {
		wantError(t, d.send(d.owner, "POST", at, body), 400, CodeInvalidRequest, field)
	}
	look := read[RevokedKeys](t, d.send(d.owner, "POST", at, `{"filter":{"namePrefix":"n"},"dryRun":true}`), 200)
	if look.Count != 11 || len(look.Keys) != 11 || look.Revoked != 0 || look.Keys[0].Status != "active" {
		t.Errorf("got %+v", look)
	}
	for _, body := range []string{`{"filter":{"namePrefix":"n"}}`, `{"filter":{"namePrefix":"n"},"count":10}`, `{"all":true,"count":0}`} {
		w := d.send(d.owner, "POST", at, body)
		wantError(t, w, 409, CodeConfirmationNeeded, "")
		if !strings.Contains(w.Body.String(), "count 11") {
			t.Errorf("does not say how many: %s", w.Body)
		}
	}
	if page := read[list[admin.KeyRecord]](t, d.send(d.owner, "GET", "/instances/a/apiKeys?status=active", ""), 200); len(page.Value) != 11 {
		t.Fatalf("%d keys are left", len(page.Value))
	}
	done := read[RevokedKeys](t, d.send(d.owner, "POST", at, `{"filter":{"namePrefix":"n"},"count":11,"reason":"keyCompromise"}`), 200)
	if done.Revoked != 11 || done.EffectiveEverywhereAt.IsZero() {
		t.Errorf("got %+v", done)
	}
	if page := read[list[admin.KeyRecord]](t, d.send(d.owner, "GET", "/instances/a/apiKeys?status=revoked", ""), 200); len(page.Value) != 11 {
		t.Errorf("%d keys are revoked", len(page.Value))
	}
}

func TestSwitchInstance(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	before := read[Instance](t, d.send(d.owner, "GET", "/instances/a", ""), 200)
	for range 2 { // repeatable
		off := read[ChangedInstance](t, d.send(d.owner, "POST", "/instances/a/disable", ""), 200)
		if !off.Policy.Disabled || off.EffectiveEverywhereAt.IsZero() {
			t.Errorf("got %+v", off)
		}
	}
	on := read[ChangedInstance](t, d.send(d.owner, "POST", "/instances/a/enable", ""), 200)
	if diff := cmp.Diff(before, on.Instance); diff != "" {
		t.Errorf("switched off and on it is another (-before +after)\n%s", diff)
	}
	wantError(t, d.send(d.owner, "POST", "/instances/nobody/disable", ""), 404, CodeNotFound, "")
}

func TestClientKeyLife(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	c := NewClient(serve(t, d), d.owner, nil)
	ctx := t.Context()
	made, err := c.CreateKey(ctx, "a", admin.KeyInput{Name: "n", Type: "agent", AgentName: "sales"})
	if err != nil {
		t.Fatal(err)
	}
	id := made.Key.ID
	seen, err := c.VersionedKey(ctx, "a", id)
	if err != nil || seen.ETag == "" || !cmp.Equal(seen.KeyRecord, made.Key) {
		t.Fatalf("got %+v, %v", seen, err)
	}
	patch := admin.KeyPatch{Description: admin.To("d"), Limits: admin.To(admin.LimitsPatch{Burst: admin.To(3)}), InactivityDays: admin.Null[int]()}
	changed, err := c.UpdateKey(WithIfMatch(ctx, seen.ETag), "a", id, patch)
	if err != nil || changed.Description != "d" || changed.Limits.Burst != 3 || changed.Replicas.Total != changed.Replicas.Confirmed {
		t.Errorf("update: %+v, %v", changed, err)
	}
	if _, err := c.UpdateKey(WithIfMatch(ctx, seen.ETag), "a", id, admin.KeyPatch{Name: admin.To("z")}); !isCode(err, CodePreconditionFailed) {
		t.Errorf("got %v", err)
	}
	if _, err := c.RotateKey(WithIfMatch(ctx, seen.ETag), "a", id, admin.RotateInput{}); !isCode(err, CodePreconditionFailed) {
		t.Errorf("got %v", err)
	}
	rotated, err := c.RotateKey(WithIdempotencyKey(ctx, "k"), "a", id, admin.RotateInput{GracePeriod: "1h"})
	if err != nil || rotated.Secret.IsZero() || len(rotated.Key.Generations) != 2 {
		t.Errorf("rotate: %+v, %v", rotated.Key, err)
	}
	if again, err := c.RotateKey(WithIdempotencyKey(ctx, "k"), "a", id, admin.RotateInput{GracePeriod: "1h"}); err != nil || again.Secret.Reveal() != rotated.Secret.Reveal() {
		t.Errorf("rotate again: %v", err)
	}
	if ended, err := c.RevokeGeneration(ctx, "a", id, 1); err != nil || !ended.Generations[0].Revoked {
		t.Errorf("generation: %+v, %v", ended, err)
	}
	if advice, err := c.KeyAdvice(ctx, "a", id); err != nil || advice.Text == "" || advice.Safe {
		t.Errorf("advice: %+v, %v", advice, err)
	}
	if l, err := c.KeyLimits(ctx, "a", admin.KeyOwner{Type: apikey.TypeAgent, Name: "sales"}); err != nil || l.Owner == nil || l.Owner.Used != 1 || l.Instance.Limit != 1000 {
		t.Errorf("limits: %+v, %v", l, err)
	}
	for in, want := range map[admin.KeyListInput]int{
		{AgentName: "sales", NeverUsed: true, OrderBy: "name desc"}: 1, {NamePrefix: "z"}: 0, {NoExpiration: true, Status: "active", UnusedFor: "1d"}: 0,
	} {
		n := 0
		for _, err := range c.FindKeys(ctx, "a", in) {
			if err != nil {
				t.Fatal(err)
			}
			n++
		}
		if n != want {
			t.Errorf("%+v: got %d keys, want %d", in, n, want)
		}
	}
	if in, err := c.SwitchInstance(ctx, "a", true); err != nil || !in.Policy.Disabled {
		t.Errorf("switch: %+v, %v", in, err)
	}
	if done, err := c.RevokeKeys(ctx, "a", admin.BulkRevocation{All: true, Count: new(1)}); err != nil || done.Revoked != 1 {
		t.Errorf("revoke: %+v, %v", done, err)
	}
}

func isCode(err error, code string) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Code == code
}

// A bulk revocation may take longer than other answers; its caller is told what became of it.
func TestABulkRevocationOutlastsTheWriteTimeout(t *testing.T) {
	slow := &slowKeys{Store: open(t).store, between: func() { time.Sleep(300 * time.Millisecond) }}
	d := on(t, slow, apikey.Peppers{Current: pepper})
	d.instance(t, "a")
	d.key(t, "a")
	server := httptest.NewUnstartedServer(d)
	server.Config.WriteTimeout = 100 * time.Millisecond
	server.Start()
	defer server.Close()
	done, err := NewClient(server.URL, d.owner, nil).RevokeKeys(t.Context(), "a", admin.BulkRevocation{All: true})
	if err != nil || done.Revoked != 1 {
		t.Errorf("%d revoked, %v", done.Revoked, err)
	}
}
