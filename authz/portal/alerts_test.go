package portal

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

const (
	alertsPath = "/instances/" + instance + "/alerts"
	hostile    = `"><script>alert(1)</script><img src=x onerror=alert(2)>'{{.}}`
)

// alert opens an alert, of a key or, with nil, of none.
func (d *desk) alert(n byte, kind admin.AlertKind, k *apikey.Key, change func(a *admin.Alert)) *admin.Alert {
	d.t.Helper()
	at := time.Now().UTC().Add(-time.Hour + time.Duration(n)*time.Second)
	a := &admin.Alert{
		ID: apikey.ID{2, 15: n}, InstanceID: instance, Kind: kind, Subject: hostile, Message: fmt.Sprintf("message %d %s", n, hostile), Count: 3, OpenedAt: at, SeenAt: at,
	}
	if k != nil {
		a.KeyID = k.ID
	}
	if change != nil {
		change(a)
	}
	if err := d.store.PutAlert(d.t.Context(), a); err != nil {
		d.t.Fatal(err)
	}
	return a
}

func alertPath(a *admin.Alert, action string) string {
	return alertsPath + "/" + a.ID.String() + "/" + action
}

// kept returns an alert as the store has it.
func (d *desk) kept(a *admin.Alert) *admin.Alert {
	d.t.Helper()
	kept, err := d.store.Alert(d.t.Context(), a.ID)
	if err != nil {
		d.t.Fatal(err)
	}
	return kept
}

// An alert of each kind is a row with what belongs to it, offered to each role as far as it may, and its text is text.
func TestAlertsOfEachKind(t *testing.T) {
	d := newDesk(t)
	k := d.key(admin.KeyInput{Name: `the <b>"key"</b>`}).Key
	gone := &apikey.Key{ID: apikey.ID{9, 15: 9}}
	opened := []*admin.Alert{
		d.alert(1, admin.AlertNewNetwork, k, nil), d.alert(2, admin.AlertRefusals, nil, nil), d.alert(3, admin.AlertUnknownKeys, nil, nil),
		d.alert(4, admin.AlertExpiring, k, nil), d.alert(5, admin.AlertUnused, gone, nil),
	}
	d.alert(6, admin.AlertRefusals, k, func(a *admin.Alert) { a.ResolvedAt = time.Now().UTC() })
	d.alert(7, admin.AlertUnknownKeys, nil, func(a *admin.Alert) { a.InstanceID = "" }) // of no instance, which these do not see

	for _, role := range []admin.Role{admin.RoleOwner, admin.RoleOperator, admin.RoleAuditor} {
		status, page := d.signIn(role).get(alertsPath)
		if status != http.StatusOK || strings.Count(page, `<article class="alert"`) != len(opened) {
			t.Fatalf("%s: %d, %d alerts, want %d:\n%s", role, status, strings.Count(page, `<article class="alert"`), len(opened), page)
		}
		if strings.Contains(page, "<script>alert") || strings.Contains(page, "<img") || strings.Contains(page, `<b>"key`) {
			t.Errorf("%s: text of an alert is markup:\n%s", role, page)
		}
		may := role != admin.RoleAuditor
		last := len(page)
		for i, title := range []string{"New network", "Many refusals", "Unknown keys", "Expires soon", "Unused"} {
			a := opened[i]
			at := strings.Index(page, `id="a-`+a.ID.String()+`"`)
			if at < 0 || at > last { // opened last, shown first
				t.Fatalf("%s: %s is not there, or not in its place:\n%s", role, a.Kind, page)
			}
			row := page[at:last]
			last = at
			of := a.KeyID == k.ID
			for what, want := range map[string]bool{
				title: true, fmt.Sprintf("message %d &#34;&gt;&lt;script&gt;", i+1): true, "3 times": true, ">open<": true,
				alertPath(a, "ack"): may, "/keys/" + k.ID.String() + `"`: of, "the &lt;b&gt;": of, alertPath(a, "disable"): of && may,
			} {
				if strings.Contains(row, what) != want {
					t.Errorf("%s, %s: %q is there: %v, want %v:\n%s", role, a.Kind, what, !want, want, row)
				}
			}
		}
		if _, page = d.signIn(role).get(alertsPath + "?show=all&kind=refusals"); strings.Count(page, `<article class="alert"`) != 2 || !strings.Contains(page, "Over since") {
			t.Errorf("%s: all of one kind:\n%s", role, page)
		}
	}
	if status, page := d.signIn(admin.RoleUser).get(alertsPath); status != http.StatusForbidden || strings.Contains(page, "message 1") {
		t.Errorf("a user sees alerts: %d", status)
	}
}

// Owners and operators say that they know of an alert, and disable the key that it is about; others do neither, and
// nobody of what is not theirs.
func TestAlertIsKnownAndItsKeyDisabled(t *testing.T) {
	d := newDesk(t)
	if _, err := d.svc.PutInstance(t.Context(), d.owner, "other", apikey.Policy{}); err != nil {
		t.Fatal(err)
	}
	theirs := d.alert(99, admin.AlertRefusals, nil, func(a *admin.Alert) { a.InstanceID = "other" })
	n := byte(0)
	for _, role := range []admin.Role{admin.RoleOwner, admin.RoleOperator, admin.RoleAuditor, admin.RoleUser} {
		may := role == admin.RoleOwner || role == admin.RoleOperator
		b := d.signIn(role)
		k := d.key(admin.KeyInput{Name: "of " + string(role)}).Key
		n += 4
		fresh, surge, flood := d.alert(n, admin.AlertNewNetwork, k, nil), d.alert(n+1, admin.AlertRefusals, k, nil), d.alert(n+2, admin.AlertUnknownKeys, nil, func(a *admin.Alert) { a.Subject = string(role) })
		disabled := func() bool {
			now, err := d.store.Key(t.Context(), instance, k.ID)
			return err == nil && now.Disabled
		}
		want := func(what string, resp *http.Response, code int, says string) {
			t.Helper()
			if !may && code == http.StatusOK {
				code, says = http.StatusForbidden, ""
			}
			if status, page := b.follow(resp); status != code || !strings.Contains(page, says) {
				t.Errorf("%s, %s: %d, want %d and %q:\n%s", role, what, status, code, says, page)
			}
		}
		if resp := b.do(http.MethodPost, alertPath(surge, "disable"), nil); resp.StatusCode != http.StatusForbidden {
			t.Errorf("%s: without what its form carries: %d, want 403", role, resp.StatusCode)
		}
		want("a new network", b.post(alertPath(fresh, "ack"), nil), http.StatusOK, "with that it is over")
		if got := d.kept(fresh); got.AckedAt.IsZero() == may || got.ResolvedAt.IsZero() == may {
			t.Errorf("%s: after the new network: %+v", role, got)
		}
		want("a flood", b.post(alertPath(flood, "ack"), nil), http.StatusOK, "It stays open until")
		if got := d.kept(flood); got.AckedAt.IsZero() == may || !got.ResolvedAt.IsZero() {
			t.Errorf("%s: after the flood: %+v", role, got)
		}
		if disabled() {
			t.Errorf("%s: the key is disabled too early", role)
		}
		want("disable", b.post(alertPath(surge, "disable"), nil), http.StatusOK, "Disabled: requests with it are refused")
		if got := d.kept(surge); disabled() != may || got.AckedAt.IsZero() == may {
			t.Errorf("%s: the key is disabled: %v; %+v", role, disabled(), got)
		}
		missing := http.StatusNotFound
		if !may {
			missing = http.StatusForbidden
		}
		if resp := b.post(alertPath(flood, "disable"), nil); !slices.Contains([]int{http.StatusNotFound, missing}, resp.StatusCode) {
			t.Errorf("%s, disable what is no key: %d, want %d", role, resp.StatusCode, missing)
		}
		for _, action := range []string{"ack", "disable"} {
			for _, id := range []string{theirs.ID.String(), apikey.ID{7}.String(), "nonsense"} {
				if resp := b.post(alertsPath+"/"+id+"/"+action, nil); !slices.Contains([]int{http.StatusNotFound, missing}, resp.StatusCode) {
					t.Errorf("%s, %s of %s: %d, want %d", role, action, id, resp.StatusCode, missing)
				}
			}
		}
		if may {
			_, page := b.get(alertsPath)
			if at := strings.Index(page, alertPath(surge, "")); at >= 0 {
				t.Errorf("%s: the known alert of a disabled key still offers something", role)
			}
			if !strings.Contains(page, ">known<") || !strings.Contains(page, "Known to token:") {
				t.Errorf("%s: nothing says who knows:\n%s", role, page)
			}
		}
	}
	if got := d.kept(theirs); !got.AckedAt.IsZero() {
		t.Errorf("an alert of another instance is known: %+v", got)
	}
}

// Alerts of no instance are on the page of whichever instance, for who may see all of them, and nobody else knows
// that there are any.
func TestAlertsOfNoInstance(t *testing.T) {
	d := newDesk(t)
	a := d.alert(7, admin.AlertUnknownKeys, nil, func(a *admin.Alert) { a.InstanceID = "" })
	over := d.alert(3, admin.AlertUnknownKeys, nil, func(a *admin.Alert) { a.InstanceID, a.ResolvedAt = "", time.Now().UTC() })
	d.alert(9, admin.AlertUnused, nil, nil)
	knows := url.Values{"of": {"none"}}
	ofOne := d.signIn(admin.RoleOwner)
	if _, page := ofOne.get(alertsPath); strings.Contains(page, a.ID.String()) || !strings.Contains(page, "message 9") {
		t.Errorf("an owner of one instance sees:\n%s", page)
	}
	if resp := ofOne.post(alertPath(a, "ack"), knows); resp.StatusCode != http.StatusNotFound || !d.kept(a).AckedAt.IsZero() {
		t.Errorf("an owner of one instance acks it: %d", resp.StatusCode)
	}
	for _, role := range []admin.Role{admin.RoleAuditor, admin.RoleOperator} {
		made, err := d.svc.CreateToken(t.Context(), d.owner, admin.TokenInput{Name: "of all", Role: role})
		if err != nil {
			t.Fatal(err)
		}
		d.tokens[role] = made
		b, may := d.signIn(role), role == admin.RoleOperator
		_, page := b.get(alertsPath)
		if strings.Count(page, `<article class="alert"`) != 2 || strings.Index(page, "message 7") > strings.Index(page, "message 9") ||
			!strings.Contains(page, "Unknown keys of no instance") || strings.Contains(page, alertPath(a, "ack")) != may || strings.Contains(page, `name="of" value="none"`) != may {
			t.Errorf("%s of all:\n%s", role, page)
		}
		if _, page = b.get(alertsPath + "?show=all&kind=unknownKeys"); !strings.Contains(page, a.ID.String()) || !strings.Contains(page, over.ID.String()) || strings.Contains(page, "message 9") {
			t.Errorf("%s of all, all of a kind:\n%s", role, page)
		}
		if resp := b.post(alertPath(a, "ack"), nil); may && resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s of all: without its form's word it is one of the instance: %d", role, resp.StatusCode)
		}
		status, page := b.follow(b.post(alertPath(a, "ack"), knows))
		if got := d.kept(a); got.AckedAt.IsZero() == may || strings.Contains(page, "It stays open until") != may {
			t.Errorf("%s of all acks it: %d, %+v", role, status, got)
		}
	}
}

func TestAlertsArePaged(t *testing.T) {
	d := newDesk(t)
	for n := range byte(alertPage + 5) {
		d.alert(n, admin.AlertUnused, nil, func(a *admin.Alert) {
			a.Subject = fmt.Sprint(n)
			a.OpenedAt = a.OpenedAt.Add(-time.Duration(n) * time.Second).Truncate(time.Second) // some at the same time
		})
	}
	b := d.signIn(admin.RoleAuditor)
	seen := map[string]bool{}
	rows := func(page string) (n int) {
		for _, part := range strings.Split(page, `<article class="alert" aria-labelledby="`)[1:] {
			id, _, _ := strings.Cut(part, `"`)
			seen[id] = true
			n++
		}
		return n
	}
	_, page := b.get(alertsPath + "?kind=unused")
	if got := rows(page); got != alertPage {
		t.Fatalf("%d alerts on the first page:\n%s", got, page)
	}
	_, older, _ := strings.Cut(page, `<a href="`+alertsPath+`?after=`)
	older, _, there := strings.Cut(older, `"`)
	if !there {
		t.Fatalf("no older page:\n%s", page)
	}
	_, page = b.get(alertsPath + "?after=" + strings.ReplaceAll(older, "&amp;", "&"))
	if got := rows(page); got != 5 || len(seen) != alertPage+5 || !strings.Contains(page, "Newest") || strings.Contains(page, `rel="next"`) {
		t.Errorf("%d alerts on the second page, %d in all:\n%s", got, len(seen), page)
	}
	for _, bad := range []string{"x", "1.x", "1", "99999999999999999999.x"} {
		if status, _ := b.get(alertsPath + "?after=" + bad); status != http.StatusNotFound {
			t.Errorf("after=%s: %d, want 404", bad, status)
		}
	}
}
