package manage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// refused are the refused attempts in the audit, oldest first.
func (d *desk) refused(t *testing.T) []admin.Event {
	t.Helper()
	events, err := d.store.FindEvents(t.Context(), admin.EventFilter{Outcome: admin.OutcomeRefused}, admin.EventPlace{}, 10_000)
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(events)
	return events
}

func TestRefusedAttemptsAreEvents(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	key := d.key(t, "a")
	operator := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleOperator})
	tenant := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleOwner, InstanceID: "b"})
	const nobody = "0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f"
	canary := apikey.Format{}.New(apikey.KindInstance).Reveal()
	for _, tt := range []struct {
		who                        admin.CreatedToken
		method, target, body, want string // want: action, code, instance, target; "": no event
	}{
		{operator, "DELETE", "/instances/a", "", "instance.delete Forbidden a "},
		{operator, "POST", "/tokens", `{"name":"n","role":"owner"}`, "token.create Forbidden  "},
		{operator, "GET", "/tokens", "", "token.read Forbidden  "},
		{operator, "DELETE", "/instances/a/apiKeys/" + nobody, "", "key.revoke NotFound a " + nobody},
		{operator, "DELETE", "/instances/a/apiKeys/" + canary, "", "key.revoke NotFound a "},
		{operator, "DELETE", "/instances/" + canary, "", "instance.delete Forbidden  "},
		{operator, "GET", "/instances/a/apiKeys/" + nobody, "", ""},
		{operator, "GET", "/instances/nobody", "", ""},
		{operator, "GET", "/nothing", "", ""},
		{operator, "POST", "/instances/a/apiKeys", `{"name":""}`, ""},
		{operator, "GET", "/instances/a", "", ""},
		// What is another's is refused in the caller's own audit.
		{tenant, "GET", "/instances/a", "", "instance.read NotFound b a"},
		{tenant, "DELETE", "/instances/a/apiKeys/" + key.Key.ID.String(), "", "key.revoke NotFound b a/" + key.Key.ID.String()},
		{tenant, "GET", "/peppers", "", "pepper.read NotFound b "},
		{admin.CreatedToken{Token: &admin.Token{}, Secret: d.owner}, "DELETE", "/instances/a", "", "instance.delete InstanceInUse a "},
	} {
		before := len(d.refused(t))
		w := d.send(tt.who.Secret, tt.method, tt.target, tt.body, "X-Request-Id", "r-1")
		got := d.refused(t)[before:]
		if tt.want == "" {
			if len(got) != 0 {
				t.Errorf("%s %s: got %+v", tt.method, tt.target, got)
			}
			continue
		}
		if len(got) != 1 {
			t.Errorf("%s %s: answered %d, got %d events", tt.method, tt.target, w.Code, len(got))
			continue
		}
		e := got[0]
		if text := fmt.Sprintf("%s %s %s %s", e.Action, e.Refused, e.InstanceID, e.Target); text != tt.want {
			t.Errorf("%s %s: got %q, want %q", tt.method, tt.target, text, tt.want)
		}
		if id := tt.who.Token.ID; !id.IsZero() && e.Actor != "token:"+id.String() || e.RemoteAddr != "192.0.2.1" || e.RequestID != "r-1" || time.Since(e.At) > time.Minute || e.Before != nil || e.After != nil {
			t.Errorf("%s %s: got %+v", tt.method, tt.target, e)
		}
	}
	all, err := d.store.Events(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	noCanary(t, string(text), apikey.NewSecret(canary), d.owner, operator.Secret)
	if report, err := d.svc.AuditVerify(t.Context(), root); err != nil || !report.Whole {
		t.Errorf("got %+v, %v", report, err)
	}
}

// attempts are how many attempts an event stands for.
func attempts(t *testing.T, e admin.Event) int {
	t.Helper()
	var after struct{ Attempts int }
	if err := json.Unmarshal(e.After, &after); err != nil || after.Attempts == 0 {
		t.Errorf("%+v has no attempts", e)
	}
	return after.Attempts
}

func TestRepeatedRefusalsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- d.svc.Run(ctx) }()
		auditor := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleAuditor})
		for range 5 {
			d.send(auditor.Secret, "DELETE", "/instances/a", "")
		}
		if got := d.refused(t); len(got) != 1 || got[0].After != nil {
			t.Fatalf("got %+v", got)
		}
		time.Sleep(time.Minute + time.Second)
		got := d.refused(t)
		if len(got) != 2 || attempts(t, got[1]) != 4 || got[1].Actor != got[0].Actor || got[1].InstanceID != "a" {
			t.Fatalf("got %+v", got)
		}
		// As many targets as the caller likes do not make as many events.
		for i := range 2000 {
			d.send(auditor.Secret, "DELETE", fmt.Sprintf("/instances/a/apiKeys/0192f0c1-8a4e-7cc3-98c4-%012d", i), "")
		}
		before := len(got)
		time.Sleep(time.Minute + time.Second)
		got = d.refused(t)[before:]
		sum := 0
		for _, e := range got {
			if e.After == nil {
				sum++
			} else {
				sum += attempts(t, e)
			}
		}
		if len(got) > 40 || sum != 2000 {
			t.Errorf("2000 attempts became %d events that tell of %d", len(got), sum)
		}
		// The last minute is written at the end.
		d.send(auditor.Secret, "DELETE", "/instances/a", "")
		d.send(auditor.Secret, "DELETE", "/instances/a", "")
		before = len(d.refused(t))
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := len(d.refused(t)); n != before+1 {
			t.Errorf("got %d more events at the end", n-before)
		}
	})
}

func TestUnauthenticatedNoiseIsCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- d.svc.Run(ctx) }()
		from := func(addr string, n int) {
			for range n {
				r := httptest.NewRequest("GET", "/instances", nil)
				r.RemoteAddr = addr
				r.Header.Set("Authorization", "Bearer kwm_nonsense")
				w := httptest.NewRecorder()
				d.ServeHTTP(w, r)
				if w.Code != http.StatusUnauthorized {
					t.Errorf("got %d", w.Code)
				}
			}
		}
		from("192.0.2.7:1", 3)
		from("192.0.2.7:2", 2)
		from("[2001:db8::1]:1", 1)
		from("[2001:db8::2]:1", 1)
		if n := len(d.refused(t)); n != 0 {
			t.Errorf("%d events at once", n)
		}
		time.Sleep(time.Minute + time.Second)
		got := map[string]int{}
		for _, e := range d.refused(t) {
			if e.Action != "authenticate" || e.Actor != "" || e.Refused != "Unauthorized" {
				t.Errorf("got %+v", e)
			}
			got[e.RemoteAddr] = attempts(t, e)
		}
		if len(got) != 2 || got["192.0.2.7"] != 5 || got["2001:db8::/64"] != 2 {
			t.Errorf("got %v", got)
		}
		before := len(d.refused(t))
		for i := range 2000 {
			from(fmt.Sprintf("10.0.%d.%d:1", i/250, i%250), 1)
		}
		time.Sleep(time.Minute + time.Second)
		sum := 0
		events := d.refused(t)[before:]
		for _, e := range events {
			sum += attempts(t, e)
		}
		if len(events) > 300 || sum != 2000 {
			t.Errorf("2000 requests became %d events that tell of %d", len(events), sum)
		}
		stop()
		<-done
	})
}

func TestLastUseOfTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- d.svc.Run(ctx) }()
		token := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleAuditor})
		events, err := d.store.Events(t.Context(), 0, 1000)
		if err != nil {
			t.Fatal(err)
		}
		used := time.Now()
		read[any](t, d.send(token.Secret, "GET", "/instances", ""), 200)
		time.Sleep(time.Minute)
		for _, one := range read[list[admin.TokenRecord]](t, d.send(d.owner, "GET", "/tokens", ""), 200).Value {
			if one.ID == token.Token.ID && one.LastUsedAt.Sub(used).Abs() > time.Microsecond {
				t.Errorf("used at %v, a minute later the list says %v", used, one.LastUsedAt)
			}
		}
		after, err := d.store.Events(t.Context(), 0, 1000)
		if err != nil || len(after) != len(events) {
			t.Errorf("a use is %d events, %v", len(after)-len(events), err)
		}
		stop()
		<-done
	})
}

func TestListOfAuditEvents(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	for range 3 {
		d.key(t, "a")
	}
	d.key(t, "b")
	c := NewClient(serve(t, d), d.owner, nil)
	count := func(filter admin.EventFilter) (n int) {
		t.Helper()
		for e, err := range c.AuditEvents(t.Context(), filter) {
			if err != nil {
				t.Fatal(err)
			}
			if filter.InstanceID != "" && e.InstanceID != filter.InstanceID {
				t.Errorf("got one of %s", e.InstanceID)
			}
			n++
		}
		return n
	}
	for want, filter := range map[int]admin.EventFilter{
		8: {From: time.Now().Add(-time.Hour)}, // with the pepper and the owner's token
		4: {InstanceID: "a"},
		3: {InstanceID: "a", Action: "key.create"},
		1: {InstanceID: "b", Action: "key.create", Actor: "test", Outcome: admin.OutcomeDone},
		0: {InstanceID: "b", To: time.Now().Add(-time.Hour)},
	} {
		if got := count(filter); got != want {
			t.Errorf("%+v: got %d events, want %d", filter, got, want)
		}
	}
	// Pages, and a cursor that is for this list alone.
	page := read[list[admin.EventRecord]](t, d.send(d.owner, "GET", "/instances/a/auditEvents?maxpagesize=3", ""), 200)
	if len(page.Value) != 3 || page.NextLink == "" || page.Value[0].Sequence <= page.Value[1].Sequence {
		t.Fatalf("got %+v", page)
	}
	_, cursor, _ := strings.Cut(page.NextLink, "cursor=")
	cursor, _, _ = strings.Cut(cursor, "&")
	rest := read[list[admin.EventRecord]](t, d.send(d.owner, "GET", "/instances/a/auditEvents?cursor="+cursor, ""), 200)
	if len(rest.Value) != 1 || rest.Value[0].Action != "instance.put" || rest.NextLink != "" {
		t.Errorf("got %+v", rest)
	}
	for _, target := range []string{"/instances/b/auditEvents?cursor=", "/auditEvents?cursor=", "/instances/a/apiKeys?cursor="} {
		wantError(t, d.send(d.owner, "GET", target+cursor, ""), 400, CodeInvalidRequest, "cursor")
	}
	for target, field := range map[string]string{
		"outcome=maybe": "outcome", "from=yesterday": "from", "to=2026-01-01": "to", "maxpagesize=0": "maxpagesize", "actors=x": "actors",
	} {
		wantError(t, d.send(d.owner, "GET", "/auditEvents?"+target, ""), 400, CodeInvalidRequest, field)
	}
	// An instance that is gone still has its events; one that never was has none.
	read[any](t, d.send(d.owner, "DELETE", "/instances/a?revokeKeys=true", ""), 200)
	if got := count(admin.EventFilter{InstanceID: "a"}); got != 5 {
		t.Errorf("after the deletion: %d events", got)
	}
	wantError(t, d.send(d.owner, "GET", "/instances/nobody/auditEvents", ""), 404, CodeNotFound, "")

	head, err := c.AuditHead(t.Context())
	if err != nil || head.Sequence != 9 { // the deletion, too
		t.Errorf("head %+v, %v", head, err)
	}
	var chain []admin.EventRecord
	for e, err := range c.AuditChain(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, e)
	}
	if last := chain[len(chain)-1]; last.Sequence != head.Sequence || last.Link != head.Link || chain[0].Sequence != 1 {
		t.Errorf("the chain ends with %+v, the head is %+v", last, head)
	}
	report, err := c.AuditVerify(t.Context(), &head)
	if err != nil || !report.Whole || report.Events != int64(len(chain)) {
		t.Errorf("got %+v, %v", report, err)
	}
	head.Link[3]++
	if report, err := c.AuditVerify(t.Context(), &head); err != nil || report.Whole {
		t.Errorf("with a head of another chain: got %+v, %v", report, err)
	}
	for _, query := range []string{"sequence=1", "sequence=x&link=" + head.Link.String(), "sequence=1&link=zz"} {
		if w := d.send(d.owner, "GET", "/audit/verify?"+query, ""); w.Code != 400 {
			t.Errorf("%s: got %d", query, w.Code)
		}
	}
}

func TestAPIVersion(t *testing.T) {
	d := open(t)
	read[any](t, d.send(d.owner, "GET", "/instances?api-version="+apiVersion, ""), 200)
	for _, v := range []string{"", "2020-01-01", "latest"} {
		wantError(t, d.send(d.owner, "GET", "/instances?api-version="+v, ""), 400, CodeInvalidRequest, "api-version")
	}
}

func TestUserSeesAndMakesItsOwnKeysOnly(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	ann := d.token(t, tokenFor(admin.RoleUser, "a")).Secret
	create := func(token apikey.Secret, body string) *httptest.ResponseRecorder {
		return d.send(token, "POST", aKeys, body)
	}
	for body, field := range map[string]string{
		`{"name":"n","type":"instance"}`:                                       "type",
		`{"name":"n","type":"agent","agentName":"x"}`:                          "type",
		`{"name":"n","type":"user","userPrincipalName":"bob@example.com"}`:     "userPrincipalName",
		`{"name":"n","userPrincipalName":"Ann@example.com"}`:                   "userPrincipalName",
		`{"name":"n","limits":{"burst":-1}}`:                                   "limits",
		`{"name":"n","limits":{"rate":{"requests":100000000,"per":"1s"}}}`:     "limits",
		`{"name":"n","userPrincipalName":"ann@example.com","type":"instance"}`: "type",
	} {
		wantError(t, create(ann, body), 403, CodeForbidden, field)
	}
	var own []string
	for _, body := range []string{`{"name":"1"}`, `{"name":"2","type":"user"}`, `{"name":"3","type":"user","userPrincipalName":"ann@example.com"}`} {
		got := read[createdKey](t, create(ann, body), 201)
		if got.Key.Type != apikey.TypeUser || got.Key.UserPrincipalName != "ann@example.com" {
			t.Errorf("got %+v", got.Key)
		}
		own = append(own, got.Key.ID.String())
	}
	bobs := read[createdKey](t, create(d.owner, `{"name":"n","type":"user","userPrincipalName":"bob@example.com"}`), 201)
	// Like a name of hers, but an instance's.
	d.key(t, "a")
	var listed []string
	target := aKeys + "?maxpagesize=2"
	for target != "" {
		page := read[list[admin.KeyRecord]](t, d.send(ann, "GET", target, ""), 200)
		for _, k := range page.Value {
			listed = append(listed, k.ID.String())
		}
		target = page.NextLink
	}
	slices.Reverse(listed)
	if !slices.Equal(listed, own) {
		t.Errorf("sees %v, want %v", listed, own)
	}
	_, err := d.svc.Keys(t.Context(), admin.Caller{Name: "x", Role: admin.RoleUser}, "a", admin.KeyQuery{Limit: 10})
	if _, forbidden := errors.AsType[*admin.ForbiddenError](err); !forbidden {
		t.Errorf("a user without a name: %v", err)
	}
	const nobody = "0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f"
	for _, method := range []string{"GET", "DELETE"} {
		there, nowhere := d.send(ann, method, aKeys+"/"+bobs.Key.ID.String(), ""), d.send(ann, method, aKeys+"/"+nobody, "")
		wantError(t, there, 404, CodeNotFound, "")
		if there.Body.String() != nowhere.Body.String() {
			t.Errorf("%s: %s, but of none %s", method, there.Body, nowhere.Body)
		}
		read[any](t, d.send(ann, method, aKeys+"/"+own[0], ""), 200)
	}
	if k := read[admin.KeyRecord](t, d.send(d.owner, "GET", aKeys+"/"+bobs.Key.ID.String(), ""), 200); k.Status != "active" {
		t.Errorf("bob's key is %s", k.Status)
	}
}

// Whoever gets the id of an instance that was deleted does not get its history.
func TestAuditOfAnInstanceBeforeItsTime(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.key(t, "a")
	read[any](t, d.send(d.owner, "DELETE", "/instances/a?revokeKeys=true", ""), 200)
	d.instance(t, "a")
	mine := d.key(t, "a").Key
	auditor := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleAuditor, InstanceID: "a"}).Secret
	for query, want := range map[string]int{"": 3, "?from=2020-01-01T00:00:00Z": 3, "?action=key.create": 1, "?target=" + mine.ID.String(): 1} {
		if got := read[list[admin.EventRecord]](t, d.send(auditor, "GET", "/instances/a/auditEvents"+query, ""), 200).Value; len(got) != want {
			t.Errorf("%q: the new tenant sees %d events, want %d: %+v", query, len(got), want, got)
		}
		if got := read[list[admin.EventRecord]](t, d.send(d.owner, "GET", "/instances/a/auditEvents"+query, ""), 200).Value; query == "" && len(got) != 6 {
			t.Errorf("the owner of all sees %d events", len(got))
		}
	}
}
