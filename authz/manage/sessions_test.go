package manage

import (
	"net/url"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
)

func TestEndSessions(t *testing.T) {
	d := open(t)
	const ann = "oidc:https://issuer.example#ann"
	at := time.Now()
	for i, name := range []string{"", ann, ann, "oidc:https://issuer.example#bob"} {
		err := d.store.PutSession(t.Context(), &admin.Session{
			ID: admin.SessionID{byte(i)}, CreatedAt: at, SeenAt: at, EndsAt: at.Add(time.Hour), IdleAt: at.Add(time.Hour), Subject: admin.OIDCSubject{Name: name},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		query, field string
		ended        int
	}{
		{"", "actor", 0}, {"actor=", "actor", 0}, {"all=false", "actor", 0}, {"all=maybe", "all", 0}, {"actor=token:x", "actor", 0}, {"actor=ann", "actor", 0},
		{"all=true&actor=" + url.QueryEscape(ann), "actor", 0},
		{"actor=" + url.QueryEscape(ann), "", 2}, {"actor=" + url.QueryEscape(ann), "", 0}, {"all=true", "", 2}, {"all=true", "", 0},
	} {
		w := d.send(d.owner, "DELETE", "/sessions?"+step.query, "")
		if step.field != "" {
			wantError(t, w, 400, CodeInvalidRequest, step.field)
			continue
		}
		if got := read[EndedSessions](t, w, 200); got.Ended != step.ended {
			t.Errorf("%s: %d ended, want %d", step.query, got.Ended, step.ended)
		}
	}
	events, err := d.store.FindEvents(t.Context(), admin.EventFilter{Action: "session.revoke"}, admin.EventPlace{}, 10)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range events { // newest first
		got = append(got, e.Target+" "+string(e.After))
	}
	if diff := cmp.Diff([]string{` {"ended":2}`, `https://issuer.example#ann {"ended":2}`}, got); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
}
