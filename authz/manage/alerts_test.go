package manage

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"net/url"
	"slices"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// alert keeps an open alert, n seconds after others.
func (d *desk) alert(t *testing.T, n byte, instance string, kind admin.AlertKind, key apikey.ID) apikey.ID {
	t.Helper()
	at := time.Date(2026, 3, 1, 12, 0, int(n), 0, time.UTC)
	a := &admin.Alert{
		ID: apikey.ID{1, 15: n}, InstanceID: instance, Kind: kind, KeyID: key, Subject: fmt.Sprint(n), Message: "m", Count: 1, OpenedAt: at, SeenAt: at,
	}
	if err := d.store.PutAlert(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	return a.ID
}

func TestAlerts(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	key := d.key(t, "a").Key.ID
	network := d.alert(t, 1, "a", admin.AlertNewNetwork, key)
	unused := d.alert(t, 2, "a", admin.AlertUnused, key)
	foreign := d.alert(t, 3, "b", admin.AlertUnused, apikey.ID{7})
	nowhere := d.alert(t, 4, "", admin.AlertUnknownKeys, apikey.ID{})
	list := func(target string) (ids []byte, next string) {
		t.Helper()
		page := read[list[admin.AlertRecord]](t, d.send(d.owner, "GET", target, ""), 200)
		for _, a := range page.Value {
			ids = append(ids, a.ID[15])
		}
		return ids, page.NextLink
	}
	want := func(target string, want ...byte) {
		t.Helper()
		if got, next := list(target); !slices.Equal(got, want) || next != "" {
			t.Errorf("%s: got %v, next %q, want %v", target, got, next, want)
		}
	}
	want("/instances/a/alerts", 2, 1)
	want("/alerts", 4, 3, 2, 1)
	want("/alerts?kind=unused", 3, 2)
	want("/instances/a/alerts?kind=unused&open=true", 2)
	want("/instances/a/alerts?keyId="+key.String(), 2, 1)
	want("/alerts?keyId="+apikey.ID{7}.String(), 3)
	for target, field := range map[string]string{
		"kind=odd": "kind", "open=perhaps": "open", "keyId=x": "keyId", "maxpagesize=0": "maxpagesize", "cursor=x": "cursor", "cursor=": "cursor", "all=1": "all",
		"keyId=" + apikey.ID{}.String(): "keyId",
	} {
		wantError(t, d.send(d.owner, "GET", "/alerts?"+target, ""), 400, CodeInvalidRequest, field)
	}
	wantError(t, d.send(d.owner, "GET", "/instances/nobody/alerts", ""), 404, CodeNotFound, "")

	// In pages; a cursor is for its own list and filter.
	first, next := list("/alerts?maxpagesize=3")
	link, err := url.Parse(next)
	if err != nil || !slices.Equal(first, []byte{4, 3, 2}) {
		t.Fatalf("first page %v, next %q", first, next)
	}
	want(link.RequestURI(), 1)
	for _, other := range []string{"/instances/a/alerts?cursor=", "/alerts?open=true&cursor=", "/auditEvents?cursor=", "/instances/a/apiKeys?cursor="} {
		wantError(t, d.send(d.owner, "GET", other+link.Query().Get("cursor"), ""), 400, CodeInvalidRequest, "cursor")
	}

	// Whose it is decides who sees it, and who says that it is known.
	own := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleOperator, InstanceID: "a"}).Secret
	eyes := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleAuditor}).Secret
	for _, target := range []string{"/instances/a/alerts/" + foreign.String(), "/instances/b/alerts/" + foreign.String(), "/alerts/" + foreign.String(), "/instances/a/alerts/" + nowhere.String()} {
		wantError(t, d.send(own, "GET", target, ""), 404, CodeNotFound, "")
		wantError(t, d.send(own, "POST", target+"/ack", ""), 404, CodeNotFound, "")
	}
	wantError(t, d.send(eyes, "POST", "/alerts/"+nowhere.String()+"/ack", ""), 403, CodeForbidden, "")
	wantError(t, d.send(d.owner, "POST", "/alerts/x/ack", ""), 404, CodeNotFound, "")

	acked := read[admin.AlertRecord](t, d.send(own, "POST", "/instances/a/alerts/"+network.String()+"/ack", ""), 200)
	if acked.Status != "resolved" || acked.AckedAt.IsZero() || acked.AckedBy == "" || acked.KeyID == nil || *acked.KeyID != key {
		t.Errorf("a new network that is known: %+v", acked)
	}
	if again := read[admin.AlertRecord](t, d.send(d.owner, "POST", "/alerts/"+network.String()+"/ack", ""), 200); again != acked && (again.AckedBy != acked.AckedBy || !again.AckedAt.Equal(acked.AckedAt)) {
		t.Errorf("acked again: %+v", again)
	}
	for target, id := range map[string]apikey.ID{"/instances/a/alerts/": unused, "/alerts/": nowhere} {
		if r := read[admin.AlertRecord](t, d.send(d.owner, "POST", target+id.String()+"/ack", ""), 200); r.Status != "open" || r.AckedAt.IsZero() {
			t.Errorf("an alert that goes on: %+v", r)
		}
	}
	want("/alerts?open=true", 4, 3, 2)
	events, err := d.store.FindEvents(t.Context(), admin.EventFilter{Action: "alert.ack", Outcome: admin.OutcomeDone}, admin.EventPlace{}, 9)
	if err != nil || len(events) != 3 || events[2].InstanceID != "a" || events[2].Target != network.String() || events[0].Before == nil || events[0].After == nil {
		t.Errorf("audit: %+v, %v", events, err)
	}

	read[DeletedInstance](t, d.send(d.owner, "DELETE", "/instances/a?revokeKeys=true", ""), 200)
	want("/alerts", 4, 3)
}

type webhookFunc func(n admin.Notice) admin.WebhookAnswer

func (f webhookFunc) Send(_ context.Context, n admin.Notice) admin.WebhookAnswer { return f(n) }

func TestAlertsOverTheClient(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	server := httptest.NewServer(d)
	t.Cleanup(server.Close)
	client := NewClient(server.URL, d.owner, nil)
	for n := range 250 {
		d.alert(t, byte(n), "a", admin.AlertUnused, apikey.ID{byte(n) + 1, 1})
	}
	for _, instance := range []string{"a", ""} {
		n := 0
		for _, err := range client.Alerts(t.Context(), instance, admin.AlertQuery{Kind: admin.AlertUnused, Open: true}) {
			if err != nil {
				t.Fatal(err)
			}
			n++
		}
		if n != 250 {
			t.Errorf("%d alerts of %q, want 250", n, instance)
		}
		id := apikey.ID{1, 15: 5}
		if a, err := client.Alert(t.Context(), instance, id); err != nil || a.ID != id {
			t.Errorf("got %+v, %v", a, err)
		}
		if a, err := client.AckAlert(t.Context(), instance, id); err != nil || a.AckedAt.IsZero() {
			t.Errorf("got %+v, %v", a, err)
		}
	}
	if _, err := client.TestAlerts(t.Context()); err == nil || err.(*Error).Code != CodeNoWebhook { //nolint:errorlint // it is one
		t.Errorf("no webhook: %v", err)
	}

	// With a webhook: what became of it, whatever that is; and a notice goes out with each ack that resolves.
	var sent admin.Notice
	answer := admin.WebhookAnswer{Status: 500, Error: "it answers with HTTP status 500"}
	d.svc = admin.New(d.store, admin.Config{Peppers: apikey.Peppers{Current: pepper}, Webhook: webhookFunc(func(n admin.Notice) admin.WebhookAnswer {
		sent = n
		return answer
	})}, nil, slog.New(slog.DiscardHandler))
	server.Config.Handler = New(d.svc, Config{Pepper: pepper, Log: slog.New(slog.DiscardHandler)})
	if got, err := client.TestAlerts(t.Context()); err != nil || got != answer || sent.Type != admin.NoticeTest {
		t.Errorf("got %+v, %v after %s", got, err, sent.Body)
	}
	key := d.key(t, "a").Key.ID
	id := d.alert(t, 255, "a", admin.AlertNewNetwork, key)
	for range 2 {
		if _, err := client.AckAlert(t.Context(), "a", id); err != nil {
			t.Fatal(err)
		}
	}
	due, err := d.store.DueNotices(t.Context(), time.Now(), 9)
	if err != nil || len(due) != 1 || due[0].Type != admin.NoticeResolved {
		t.Fatalf("notices: %+v, %v", due, err)
	}
	var body admin.NoticeBody
	if err := json.Unmarshal(due[0].Body, &body); err != nil || body.Key == nil || body.Key.ID != key {
		t.Errorf("a notice that does not tell the key: %s, %v", due[0].Body, err)
	}
}
