package portal

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// TestWhatIsAPersonsIsNoBug: whatever the service refuses, in whatever form that changes something it was asked, is told
// as what it is.
func TestWhatIsAPersonsIsNoBug(t *testing.T) {
	d := newDesk(t)
	made, err := d.svc.CreateToken(t.Context(), d.owner, admin.TokenInput{Name: "of all", Role: admin.RoleOwner})
	if err != nil {
		t.Fatal(err)
	}
	d.tokens[admin.RoleOwner] = made
	k := d.key(admin.KeyInput{Name: "k"})
	alert := d.alert(1, admin.AlertExpiring, k.Key, nil)
	quota := admin.QuotaInput{Context: "core:completions", Partition: apikey.PartitionNone, Limit: 100, Period: apikey.PeriodDay}
	if _, err := d.svc.PutQuota(t.Context(), d.owner, instance, "daily", quota, 0); err != nil {
		t.Fatal(err)
	}
	const at = "/instances/" + instance
	forms := map[string]url.Values{
		"/instances":                     {"id": {"fresh"}},
		"/sign-out":                      nil,
		keysPath + "/new":                aNewKey("x"),
		pathOf(k) + "/edit":              {"name": {"changed"}, "scopesMode": {"all"}, "expirationPolicy": {"none"}},
		pathOf(k) + "/rotate":            {"gracePeriod": {"1h"}},
		pathOf(k) + "/revoke":            nil,
		pathOf(k) + "/disable":           nil,
		pathOf(k) + "/enable":            nil,
		pathOf(k) + "/generations/1/end": nil,
		at + "/policy":                   {"caps.instance": {"7"}, "do": {"apply"}},
		at + "/new-quota":                {"name": {"other"}, "context": {"core:completions"}, "partition": {"None"}, "limit": {"1"}, "period": {"day"}, "do": {"apply"}},
		at + "/quotas/daily":             {"context": {"core:completions"}, "partition": {"None"}, "limit": {"1"}, "period": {"day"}, "do": {"apply"}},
		at + "/quotas/daily/delete":      nil,
		at + "/new-token":                {"name": {"x"}, "role": {"auditor"}, "instanceId": {instance}},
		alertPath(alert, "ack"):          nil,
		alertPath(alert, "disable"):      nil,
		at + "/tokens/" + made.Token.ID.String() + "/revoke": nil,
	}
	for name, test := range map[string]struct {
		err  error
		want int
	}{
		"a field":        {fmt.Errorf("in: %w", apikey.Invalid("name", "is not good")), http.StatusBadRequest},
		"two fields":     {errors.Join(apikey.Invalid("name", "is not good"), apikey.Invalid("elsewhere", "neither")), http.StatusBadRequest},
		"forbidden":      {&admin.ForbiddenError{Reason: "no"}, http.StatusForbidden},
		"gone":           {fmt.Errorf("look: %w", apikey.ErrNotFound), http.StatusNotFound},
		"somebody else":  {apikey.ErrConflict, http.StatusConflict},
		"in use":         {admin.ErrInUse, http.StatusConflict},
		"its state":      {&admin.StateError{Reason: "the key is revoked"}, http.StatusConflict},
		"a cap":          {&admin.QuotaExceededError{Cap: "user", Limit: 10, Used: 10}, http.StatusConflict},
		"another body":   {admin.ErrReplayBody, http.StatusConflict},
		"a replay, gone": {admin.ErrReplayGone, http.StatusConflict},
		"changed":        {admin.ErrPrecondition, http.StatusPreconditionFailed},
		"too often":      {&admin.RateError{What: "keys were made", Limit: 60, Per: time.Hour, RetryAfter: 90 * time.Second}, http.StatusTooManyRequests},
		"busy":           {&apikey.BusyError{What: "too many", RetryAfter: 3 * time.Second}, http.StatusServiceUnavailable},
		"the store":      {fmt.Errorf("store: %w", apikey.ErrUndecided), http.StatusServiceUnavailable},
		"signed out":     {admin.ErrUnauthenticated, http.StatusSeeOther},
		"a bug":          {errors.New("what nobody thought of"), http.StatusInternalServerError},
	} {
		for target, fields := range forms {
			t.Run(name+" "+target, func(t *testing.T) {
				in, err := d.svc.Instance(t.Context(), d.owner, instance)
				if err != nil {
					t.Fatal(err)
				}
				revision := fmt.Sprint(in.Revision)
				if strings.HasSuffix(target, "/edit") {
					now, err := d.svc.Key(t.Context(), d.owner, instance, k.Key.ID)
					if err != nil {
						t.Fatal(err)
					}
					revision = fmt.Sprint(now.Revision)
				}
				form := url.Values{"revision": {revision}, "once": {"3d5f2f4c-5f0c-4b55-93c5-0a4c2b0e9f10"}}
				maps.Copy(form, fields)
				b := d.signIn(admin.RoleOwner) // anew: signing out ends a session also where the audit cannot be told
				d.fails = test.err
				resp := b.post(target, form)
				d.fails = nil
				want := test.want
				if target == "/instances" && name == "changed" {
					want = http.StatusConflict // there is nothing that the page was made of: it is there already
				}
				if page := text(t, resp); resp.StatusCode != want {
					t.Errorf("got %d, want %d: %s", resp.StatusCode, want, page)
				}
				if wants := want == http.StatusTooManyRequests || want == http.StatusServiceUnavailable; wants && resp.Header.Get("Retry-After") == "" {
					t.Error("it does not say when to try again")
				}
			})
		}
	}
}

// undecided decides nothing now.
type undecided struct {
	admin.Decisions

	err error
}

func (u undecided) LimitsOf(context.Context, *apikey.Key) ([]authz.Standing, error) {
	return nil, u.err
}

// TestQuotasWithoutDecisions: where nobody can tell how much of them is used, quotas are shown and changed all the same.
func TestQuotasWithoutDecisions(t *testing.T) {
	for name, decisions := range map[string]admin.Decisions{
		"a process that decides none": nil,
		"the server is busy":          undecided{err: &apikey.BusyError{What: "x", RetryAfter: time.Second}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t)
			d.svc = admin.New(gate{d.store, d}, admin.Config{
				Format: apikey.Format{First: apikey.DefaultFirst}, Peppers: apikey.Peppers{Current: d.pepper}, Decisions: decisions,
			}, nil, d.cfg.Log)
			d.web = New(d.svc, d.cfg)
			d.key(admin.KeyInput{Name: "k"})
			quota := admin.QuotaInput{Context: "core:completions", Partition: apikey.PartitionNone, Limit: 100, Period: apikey.PeriodDay}
			if _, err := d.svc.PutQuota(t.Context(), d.owner, instance, "daily", quota, 0); err != nil {
				t.Fatal(err)
			}
			b := d.signIn(admin.RoleOwner)
			for _, path := range []string{"/quotas", "/quotas/daily", "/quotas/daily/delete"} {
				if status, page := b.get("/instances/" + instance + path); status != http.StatusOK || !strings.Contains(page, "daily") {
					t.Errorf("%s: %d: %s", path, status, page)
				}
			}
			form := url.Values{"revision": {revisionIn(t, d)}, "context": {"core:completions"}, "partition": {"None"}, "limit": {"soon"}, "period": {"day"}}
			if resp := b.post("/instances/"+instance+"/quotas/daily", form); resp.StatusCode != http.StatusBadRequest {
				t.Errorf("a change that cannot be: %d, want 400", resp.StatusCode)
			}
		})
	}
}
