package portal

import (
	"encoding/base64"
	"fmt"
	"html"
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

const keysPath = "/instances/" + instance + "/keys"

func (d *desk) key(in admin.KeyInput) admin.CreatedKey {
	d.t.Helper()
	made, err := d.svc.CreateKey(d.t.Context(), d.owner, instance, in)
	if err != nil {
		d.t.Fatal(err)
	}
	return made
}

func pathOf(k admin.CreatedKey) string { return keysPath + "/" + k.Key.ID.String() }

// fieldsOf returns the hidden fields of the first form of a page that posts, which a browser would send along.
func fieldsOf(page string) url.Values {
	form := url.Values{}
	for _, m := range regexp.MustCompile(`<input type="hidden" name="([^"]+)" value="([^"]*)">`).FindAllStringSubmatch(page, -1) {
		form.Set(m[1], html.UnescapeString(m[2]))
	}
	return form
}

// fill opens a page, and sends its form with fields filled in.
func (b *browser) fill(target string, fields url.Values) *http.Response {
	b.d.t.Helper()
	status, page := b.get(target)
	if status != http.StatusOK {
		b.d.t.Fatalf("%s: %d", target, status)
	}
	form := fieldsOf(page)
	for name, values := range fields {
		form[name] = values
	}
	return b.do(http.MethodPost, target, form)
}

// aNewKey is the form of a key, filled in as little as can be.
func aNewKey(name string) url.Values {
	return url.Values{"name": {name}, "type": {"instance"}, "scopesMode": {"all"}, "expirationPolicy": {"none"}}
}

var secretInText = regexp.MustCompile(`kw[iau]_[0-9A-Za-z]{49}`)

func TestPagesByRole(t *testing.T) {
	d := newDesk(t)
	others := d.key(admin.KeyInput{Name: "of the instance"})
	own := d.key(admin.KeyInput{Name: "ann's", Type: apikey.TypeUser, UserPrincipalName: ann})
	bobs := d.key(admin.KeyInput{Name: "bob's", Type: apikey.TypeUser, UserPrincipalName: "bob@example.com"})
	all := []admin.Role{admin.RoleOwner, admin.RoleOperator, admin.RoleAuditor, admin.RoleUser}
	changes := []admin.Role{admin.RoleOwner, admin.RoleOperator}
	for _, test := range []struct {
		method, target string
		may            []admin.Role
		user           int // what a user gets instead, if not 200 or 303
		other          int // what the others get
	}{
		{http.MethodGet, keysPath, all, 0, 0},
		{http.MethodGet, keysPath + "/new", append(slices.Clone(changes), admin.RoleUser), 0, http.StatusForbidden},
		{http.MethodGet, pathOf(own), all, 0, 0},
		{http.MethodGet, pathOf(own) + "/edit", append(slices.Clone(changes), admin.RoleUser), 0, http.StatusForbidden},
		{http.MethodGet, pathOf(own) + "/rotate", append(slices.Clone(changes), admin.RoleUser), 0, http.StatusForbidden},
		{http.MethodGet, pathOf(own) + "/revoke", append(slices.Clone(changes), admin.RoleUser), 0, http.StatusForbidden},
		{http.MethodGet, pathOf(others), all[:3], http.StatusNotFound, 0},
		{http.MethodGet, pathOf(bobs), all[:3], http.StatusNotFound, 0},
		{http.MethodGet, pathOf(bobs) + "/edit", changes, http.StatusNotFound, http.StatusForbidden},
		{http.MethodGet, pathOf(bobs) + "/rotate", changes, http.StatusNotFound, http.StatusForbidden},
		{http.MethodGet, pathOf(bobs) + "/revoke", changes, http.StatusNotFound, http.StatusForbidden},
		{http.MethodPost, pathOf(bobs) + "/disable", changes, http.StatusNotFound, http.StatusForbidden},
		{http.MethodPost, pathOf(bobs) + "/enable", changes, http.StatusNotFound, http.StatusForbidden},
		{http.MethodPost, pathOf(bobs) + "/generations/7/end", nil, http.StatusNotFound, 0},
		{http.MethodPost, pathOf(bobs) + "/revoke", nil, http.StatusNotFound, 0},
		{http.MethodGet, "/instances", all, 0, 0},
	} {
		for _, role := range all {
			if test.may == nil && role != admin.RoleUser && role != admin.RoleAuditor {
				continue
			}
			want := test.other
			switch {
			case slices.Contains(test.may, role):
				if want = http.StatusOK; test.method == http.MethodPost {
					want = http.StatusSeeOther
				}
			case role == admin.RoleUser:
				want = test.user
			case test.may == nil:
				want = http.StatusForbidden
			}
			b := d.signIn(role)
			var resp *http.Response
			if test.method == http.MethodGet {
				resp = b.do(test.method, test.target, nil)
			} else {
				resp = b.post(test.target, nil)
			}
			if resp.StatusCode != want {
				t.Errorf("%s %s as %s: got %d, want %d", test.method, test.target, role, resp.StatusCode, want)
			}
		}
	}

	_, list := d.signIn(admin.RoleUser).get(keysPath)
	if !strings.Contains(list, "ann&#39;s") || strings.Contains(list, "bob") || strings.Contains(list, "of the instance") || !strings.Contains(list, "<strong>1</strong> of 10 used") {
		t.Errorf("what a user sees of the list: %s", list)
	}
	_, page := d.signIn(admin.RoleAuditor).get(pathOf(own))
	for _, action := range []string{"/rotate", "/edit", "/revoke", "/disable", "/enable", "/end"} {
		if strings.Contains(page, pathOf(own)+action) {
			t.Errorf("an auditor is shown %s", action)
		}
	}
	if !strings.Contains(page, "<h2>Audit</h2>") || !strings.Contains(page, "key.create") {
		t.Error("an auditor does not see the audit of the key")
	}
	if _, page := d.signIn(admin.RoleOperator).get(pathOf(own)); strings.Contains(page, "<h2>Audit</h2>") {
		t.Error("an operator sees the audit")
	}
}

// TestRefusedAttemptsAreInTheAudit: the portal tells it of them as the Management API does.
func TestRefusedAttemptsAreInTheAudit(t *testing.T) {
	d := newDesk(t)
	k := d.key(admin.KeyInput{Name: "k"})
	d.signIn(admin.RoleAuditor).post(pathOf(k)+"/revoke", nil)
	events, err := d.store.FindEvents(t.Context(), admin.EventFilter{Action: "key.revoke", Outcome: admin.OutcomeRefused}, admin.EventPlace{}, 10)
	if err != nil || len(events) != 1 || events[0].Refused != "Forbidden" || events[0].Target != k.Key.ID.String() {
		t.Errorf("%+v, %v", events, err)
	}
}

func TestSecretIsShownOnce(t *testing.T) {
	d := newDesk(t)
	for _, role := range []admin.Role{admin.RoleOwner, admin.RoleUser} {
		b := d.signIn(role)
		fields := aNewKey("once " + string(role))
		_, page := b.get(keysPath + "/new")
		form := fieldsOf(page)
		for name, values := range fields {
			form[name] = values
		}
		resp := b.do(http.MethodPost, keysPath+"/new", form)
		if resp.StatusCode != http.StatusOK || !strings.HasPrefix(resp.Header.Get("Cache-Control"), "no-store") {
			t.Fatalf("%s: %d %v", role, resp.StatusCode, resp.Header)
		}
		page = text(t, resp)
		found := secretInText.FindAllString(page, -1)
		if len(found) != 1 {
			t.Fatalf("%s: %d secrets in the page, want 1", role, len(found))
		}
		if !strings.Contains(page, `data-file="once-`+string(role)+`-key.txt"`) {
			t.Error("there is no name to save it under")
		}
		secret := found[0]
		// The same form once more, by a second click say: the same key, and its one secret.
		if again := text(t, b.do(http.MethodPost, keysPath+"/new", form)); !strings.Contains(again, secret) {
			t.Errorf("%s: the form sent twice does not answer what it made", role)
		}
		changed := url.Values{}
		for name, values := range form {
			changed[name] = values
		}
		changed.Set("name", "another name")
		if resp := b.do(http.MethodPost, keysPath+"/new", changed); resp.StatusCode != http.StatusConflict {
			t.Errorf("%s: another form with the same id: %d", role, resp.StatusCode)
		}
		// The same person, elsewhere: whoever has its token and what was sent does not have the secret.
		elsewhere := d.signIn(role)
		maps.Copy(changed, form)
		changed.Set("form", elsewhere.formToken())
		if resp := elsewhere.do(http.MethodPost, keysPath+"/new", changed); resp.StatusCode != http.StatusConflict || strings.Contains(text(t, resp), secret) {
			t.Errorf("%s: the form in another session: %d", role, resp.StatusCode)
		}
		keys, err := d.svc.Keys(t.Context(), d.owner, instance, admin.KeyQuery{KeyFilter: admin.KeyFilter{NamePrefix: "once " + string(role)}, Limit: 10})
		if err != nil || len(keys) != 1 {
			t.Fatalf("%s: %d keys were made, %v", role, len(keys), err)
		}
		path := keysPath + "/" + keys[0].ID.String()
		_, edit := b.get(path + "/edit")
		for _, target := range []string{keysPath, path, path + "/edit", path + "/rotate", path + "/revoke", keysPath + "/new"} {
			if _, page := b.get(target); strings.Contains(page, secret) || strings.Contains(page, secret[4:40]) {
				t.Errorf("%s shows the secret", target)
			}
		}
		// It must not come in by another field either.
		form = fieldsOf(edit)
		for name, values := range fields {
			form[name] = values
		}
		form.Set("name", secret)
		resp = b.do(http.MethodPost, path+"/edit", form)
		if page := text(t, resp); resp.StatusCode != http.StatusBadRequest || !strings.Contains(page, "contains a secret") {
			t.Errorf("a secret for a name: %d", resp.StatusCode)
		}
		for _, k := range keys {
			digest, _, err := d.store.FindKey(t.Context(), d.pepper.Digest(secret))
			if err != nil || digest.ID != k.ID {
				t.Errorf("the secret opens nothing: %v", err)
			}
		}
	}
}

func TestRotateInTheBrowser(t *testing.T) {
	d := newDesk(t)
	k := d.key(admin.KeyInput{Name: "turn"})
	b := d.signIn(admin.RoleOperator)
	resp := b.fill(pathOf(k)+"/rotate", url.Values{"gracePeriod": {"1h"}})
	page := text(t, resp)
	found := secretInText.FindAllString(page, -1)
	if resp.StatusCode != http.StatusOK || len(found) != 1 || found[0] == k.Secret.Reveal() || !strings.Contains(page, "The secret before") {
		t.Fatalf("%d, %d secrets", resp.StatusCode, len(found))
	}
	for _, secret := range []string{found[0], k.Secret.Reveal()} {
		if got, _, err := d.store.FindKey(t.Context(), d.pepper.Digest(secret)); err != nil || got.StatusAt(time.Now()) != apikey.StatusActive {
			t.Errorf("a secret does not work: %v", err)
		}
	}
	// A third one only in place of the oldest.
	resp = b.fill(pathOf(k)+"/rotate", url.Values{"gracePeriod": {"1h"}})
	if page := text(t, resp); resp.StatusCode != http.StatusConflict || !strings.Contains(page, `name="endOldest"`) {
		t.Errorf("a third secret: %d", resp.StatusCode)
	}
	if resp = b.fill(pathOf(k)+"/rotate", url.Values{"gracePeriod": {"1h"}, "endOldest": {"true"}}); resp.StatusCode != http.StatusOK {
		t.Errorf("in place of the oldest: %d", resp.StatusCode)
	}
	if resp = b.fill(pathOf(k)+"/rotate", url.Values{"gracePeriod": {"nonsense"}, "endOldest": {"true"}}); resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a grace that is none: %d", resp.StatusCode)
	}
	if status, page := b.follow(b.post(pathOf(k)+"/generations/2/end", nil)); status != http.StatusOK || !strings.Contains(page, "Secret 2 is over.") || !strings.Contains(page, "ended at once") {
		t.Errorf("end a secret: %d", status)
	}
}

func TestEditAndConflict(t *testing.T) {
	d := newDesk(t)
	burst := 3
	k := d.key(admin.KeyInput{Name: "before", Scopes: []string{"a:b"}, Metadata: map[string]string{"team": "x", "gone": "y"}, Limits: admin.LimitsInput{Burst: &burst}, ExpiresIn: "30d"})
	b := d.signIn(admin.RoleOperator)
	_, page := b.get(pathOf(k) + "/edit")
	form := fieldsOf(page)
	date := k.Key.ExpirationDate.Format(time.DateOnly)
	for name, value := range map[string]string{
		"name": "after", "description": "two\r\nlines", "scopesMode": "these", "scopes": "a:b\r\nc", "allowedIps": "10.0.0.0/8", "metadata": "team=z\r\nnew = 1",
		"rateRequests": "100", "ratePer": "1m", "burst": "", "maxConcurrent": "-1", "expirationPolicy": "time", "expirationDate": date,
	} {
		form.Set(name, value)
	}
	status, page := b.follow(b.do(http.MethodPost, pathOf(k)+"/edit", form))
	if status != http.StatusOK || !strings.Contains(page, "Changed.") {
		t.Fatalf("%d: %s", status, page)
	}
	if _, page := b.get(pathOf(k)); strings.Contains(page, "Changed.") {
		t.Error("what was done is said twice")
	}
	got, err := d.svc.Key(t.Context(), d.owner, instance, k.Key.ID)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got.Name, got.Description, got.Scopes.Strings(), got.AllowedIPs, got.Metadata, got.Limits.Rate.Requests, got.Limits.Burst, got.Limits.MaxConcurrent) !=
		`aftertwo
lines[a:b c] [10.0.0.0/8] map[new:1 team:z] 100 0 -1` || !got.ExpirationDate.Equal(k.Key.ExpirationDate) {
		t.Errorf("the key is now %+v", got)
	}
	// Sent once more, with what was seen before: somebody has changed it meanwhile.
	form.Set("name", "mine")
	resp := b.do(http.MethodPost, pathOf(k)+"/edit", form)
	page = text(t, resp)
	if resp.StatusCode != http.StatusPreconditionFailed || !strings.Contains(page, `<td class="lines">after</td><td class="lines">mine</td>`) || !strings.Contains(page, `value="mine"`) {
		t.Errorf("a conflict: %d %s", resp.StatusCode, page)
	}
	// And from that page, knowing of it.
	form.Set("revision", fieldsOf(page).Get("revision"))
	if status, _ := b.follow(b.do(http.MethodPost, pathOf(k)+"/edit", form)); status != http.StatusOK {
		t.Errorf("after the conflict: %d", status)
	}
	form.Set("revision", "x")
	if resp := b.do(http.MethodPost, pathOf(k)+"/edit", form); resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a revision that is none: %d", resp.StatusCode)
	}
}

func TestFaultsStandAtTheirFields(t *testing.T) {
	d := newDesk(t)
	b := d.signIn(admin.RoleOwner)
	resp := b.fill(keysPath+"/new", url.Values{
		"name": {""}, "description": {"kept <b>"}, "type": {"agent"}, "agentName": {"no/such"}, "scopesMode": {"these"}, "scopes": {"ok\nnot ok"},
		"allowedIps": {"10.0.0.0/8\n10.0.0.300"}, "rateRequests": {"many"}, "expirationPolicy": {"time"}, "expirationDate": {"2020-01-01"},
	})
	page := text(t, resp)
	if resp.StatusCode != http.StatusBadRequest || !strings.Contains(page, "kept &lt;b&gt;</textarea>") || !strings.Contains(page, `value="no/such"`) {
		t.Fatalf("%d: %s", resp.StatusCode, page)
	}
	if !strings.Contains(page, `id="rateRequests-fault"`) {
		t.Error("what is no number is not told at its field")
	}
	resp = b.fill(keysPath+"/new", url.Values{
		"name": {""}, "type": {"agent"}, "agentName": {"no/such"}, "scopesMode": {"these"}, "scopes": {"ok\nnot ok"},
		"allowedIps": {"10.0.0.0/8\n10.0.0.300"}, "burst": {"0"}, "expirationPolicy": {"time"}, "expirationDate": {"2020-01-01"},
	})
	page = text(t, resp)
	for field, reason := range map[string]string{
		"name": "is missing", "agentName": "must be", "scopes": "line 2 ", "allowedIps": "line 2 ", "burst": "must not be 0", "expirationDate": "must be in the future",
	} {
		if !regexp.MustCompile(`id="`+field+`-fault" class="fault">[^<]*`+reason).MatchString(page) || !regexp.MustCompile(`id="`+field+`"[^>]* aria-invalid="true" aria-describedby="`+field+`-fault`).MatchString(page) {
			t.Errorf("%s: no fault at the field: %s", field, page)
		}
	}
	// None left to make: the form stays.
	if _, err := d.svc.PutInstance(t.Context(), d.owner, instance, apikey.Policy{Caps: apikey.Caps{Instance: 1}}); err != nil {
		t.Fatal(err)
	}
	d.key(admin.KeyInput{Name: "the one"})
	resp = b.fill(keysPath+"/new", aNewKey("one more"))
	if page := text(t, resp); resp.StatusCode != http.StatusConflict || !strings.Contains(page, "All keys of this instance are used") || !strings.Contains(page, `value="one more"`) {
		t.Errorf("over the cap: %d", resp.StatusCode)
	}
}

func TestDisableEnableRevoke(t *testing.T) {
	d := newDesk(t)
	k := d.key(admin.KeyInput{Name: "doomed"})
	b := d.signIn(admin.RoleOperator)
	status, page := b.follow(b.post(pathOf(k)+"/disable", nil))
	if status != http.StatusOK || !strings.Contains(page, "Disabled:") || !strings.Contains(page, pathOf(k)+"/enable") || strings.Contains(page, pathOf(k)+"/disable") {
		t.Errorf("disable: %d %s", status, page)
	}
	if status, page = b.follow(b.post(pathOf(k)+"/enable", nil)); status != http.StatusOK || !strings.Contains(page, "Enabled:") {
		t.Errorf("enable: %d", status)
	}
	if _, page = b.get(pathOf(k) + "/revoke"); !strings.Contains(page, "<strong>doomed</strong>") || !strings.Contains(page, "It was never used.") {
		t.Errorf("before revoking: %s", page)
	}
	status, page = b.follow(b.fill(pathOf(k)+"/revoke", url.Values{"reason": {"unused"}}))
	if status != http.StatusOK || !strings.Contains(page, "Revoked:") || strings.Contains(page, pathOf(k)+"/rotate") {
		t.Errorf("revoke: %d %s", status, page)
	}
	got, err := d.svc.Key(t.Context(), d.owner, instance, k.Key.ID)
	if err != nil || got.RevokedReason != apikey.RevokedUnused {
		t.Errorf("%+v, %v", got, err)
	}
	if resp := b.post(pathOf(k)+"/enable", nil); resp.StatusCode != http.StatusConflict {
		t.Errorf("enable a revoked key: %d", resp.StatusCode)
	}
}

// TestUserMayNotEnable: who disabled a key may have had a reason.
func TestUserMayNotEnable(t *testing.T) {
	d := newDesk(t)
	k := d.key(admin.KeyInput{Name: "ann's", Type: apikey.TypeUser, UserPrincipalName: ann})
	b := d.signIn(admin.RoleUser)
	if _, page := b.follow(b.post(pathOf(k)+"/disable", nil)); strings.Contains(page, pathOf(k)+"/enable") {
		t.Error("a user is shown a button that it may not use")
	}
	if resp := b.post(pathOf(k)+"/enable", nil); resp.StatusCode != http.StatusForbidden {
		t.Errorf("got %d", resp.StatusCode)
	}
}

func TestListInPages(t *testing.T) {
	d := newDesk(t)
	if _, err := d.svc.PutInstance(t.Context(), d.owner, instance, apikey.Policy{Creation: apikey.Creation{PerHour: apikey.Unlimited}}); err != nil {
		t.Fatal(err)
	}
	b := d.signIn(admin.RoleAuditor)
	if _, page := b.get(keysPath); !strings.Contains(page, "There are no keys yet") || strings.Contains(page, keysPath+"/new") {
		t.Errorf("an empty list for who may not create: %s", page)
	}
	if _, page := d.signIn(admin.RoleOwner).get(keysPath); !strings.Contains(page, "Create the first key") {
		t.Error("an empty list does not say what to do")
	}
	const many = 2*memoryLook + 3
	var made []*apikey.Key
	for i := range many {
		in := admin.KeyInput{Name: fmt.Sprintf("key %03d", i)}
		switch {
		case i%50 == 3: // few of all: most pages have none, and end at a key of somebody else
			in.Type, in.UserPrincipalName = apikey.TypeUser, ann
		case i%2 == 1:
			in.Type, in.UserPrincipalName = apikey.TypeUser, fmt.Sprintf("u%d@example.com", i)
		}
		made = append(made, d.key(in).Key)
	}
	all := func(*apikey.Key) bool { return true }
	none := func(*apikey.Key) bool { return false }
	for query, want := range map[string]struct {
		passes func(*apikey.Key) bool
		order  string // "": the newest first
	}{
		"":                                    {all, ""},
		"?order=name":                         {all, "rising"},
		"?order=name+desc":                    {all, "falling"},
		"?type=user":                          {func(k *apikey.Key) bool { return k.Type == apikey.TypeUser }, ""},
		"?status=active&order=createdAt":      {all, "rising"},
		"?name=key+00":                        {func(k *apikey.Key) bool { return strings.HasPrefix(k.Name, "key 00") }, "rising"},
		"?owner=" + ann:                       {func(k *apikey.Key) bool { return k.UserPrincipalName == ann }, ""},
		"?type=user&owner=u5@example.com":     {func(k *apikey.Key) bool { return k.UserPrincipalName == "u5@example.com" }, ""},
		"?owner=nobody":                       {none, ""},
		"?status=revoked":                     {none, ""},
		"?show=never":                         {all, ""},
		"?show=endless":                       {all, ""},
		"?show=expiring":                      {none, "rising"},
		"?environment=prod&order=name":        {none, "rising"},
		"?owner=" + ann + "&order=name":       {func(k *apikey.Key) bool { return k.UserPrincipalName == ann }, "rising"},
		"?owner=" + ann + "&order=createdAt":  {func(k *apikey.Key) bool { return k.UserPrincipalName == ann }, "rising"},
		"?owner=" + ann + "&order=name+desc":  {func(k *apikey.Key) bool { return k.UserPrincipalName == ann }, "falling"},
		"?owner=" + ann + "&status=active":    {func(k *apikey.Key) bool { return k.UserPrincipalName == ann }, ""},
		"?owner=" + ann + "&environment=prod": {none, ""},
	} {
		for role := range d.tokens {
			var names []string
			for _, k := range made {
				if want.passes(k) && (role != admin.RoleUser || k.UserPrincipalName == ann) {
					names = append(names, k.Name) // made in the order of their names
				}
			}
			if want.order != "rising" {
				slices.Reverse(names)
			}
			if got := d.signIn(role).walk(keysPath + query); !slices.Equal(got, names) {
				t.Errorf("%q as %s: got %q, want %q", query, role, got, names)
			}
		}
	}
	if _, page := b.get(keysPath); !strings.Contains(page, fmt.Sprintf("<strong>%d</strong> of 1000 used", many)) {
		t.Error("how many are used is not told")
	}
}

// memoryLook is how many keys a page of the store in memory looks at.
const memoryLook = 100

// walk reads a list of keys from its first page to its last, and returns their names in its order. A page is told
// to be the end, or to have found nothing, only where it is so.
func (b *browser) walk(target string) []string {
	b.d.t.Helper()
	var names []string
	for n := 0; target != ""; n++ {
		status, page := b.get(target)
		if status != http.StatusOK || n > 2*memoryLook {
			b.d.t.Fatalf("%s: status %d on page %d", target, status, n+1)
		}
		found := regexp.MustCompile(`>(key \d{3})</a>`).FindAllStringSubmatch(page, -1)
		for _, m := range found {
			names = append(names, m[1])
		}
		next := regexp.MustCompile(`<a href="([^"]+)" rel="next">`).FindStringSubmatch(page)
		for text, want := range map[string]bool{
			"No key is so": len(found) == 0 && next == nil && n == 0, "No further key is so": len(found) == 0 && next == nil && n > 0,
			"More may be on the": len(found) == 0 && next != nil, ">First page</a>": n > 0,
		} {
			if strings.Contains(page, text) != want {
				b.d.t.Errorf("page %d of %s with %d keys: %q is there: %v, want %v", n+1, target, len(found), text, !want, want)
			}
		}
		if target = ""; next != nil {
			target = html.UnescapeString(next[1])
		}
	}
	return names
}

// TestLinkOfAnotherListIsRefused: where a list goes on holds for that list alone, and nobody can read it or make it.
func TestLinkOfAnotherListIsRefused(t *testing.T) {
	d := newDesk(t)
	policy := apikey.Policy{Creation: apikey.Creation{PerHour: apikey.Unlimited}}
	for _, id := range []string{instance, "rival"} {
		if _, err := d.svc.PutInstance(t.Context(), d.owner, id, policy); err != nil {
			t.Fatal(err)
		}
	}
	all, err := d.svc.CreateToken(t.Context(), d.owner, admin.TokenInput{Name: "of all", Role: admin.RoleOwner})
	if err != nil {
		t.Fatal(err)
	}
	d.tokens[admin.RoleOwner] = all
	var last admin.CreatedKey
	for range pageSize + 1 {
		last = d.key(admin.KeyInput{Name: "the name that orders"})
	}
	b := d.signIn(admin.RoleOwner)
	_, page := b.get(keysPath + "?order=name")
	m := regexp.MustCompile(`after=([A-Za-z0-9_-]+)`).FindStringSubmatch(page)
	if m == nil {
		t.Fatalf("no link to the next page: %s", page)
	}
	after := m[1]
	if status, _ := b.get(keysPath + "?order=name&after=" + after); status != http.StatusOK {
		t.Fatalf("the link itself: %d", status)
	}
	if plain, err := base64.RawURLEncoding.DecodeString(after); err != nil || strings.Contains(string(plain), "name that orders") {
		t.Errorf("%q, %v: the link can be read", plain, err)
	}
	in := admin.KeyListInput{OrderBy: admin.OrderName}
	place := admin.OrderName.PlaceOf(last.Key)
	targets := map[string]string{
		"another instance's": "/instances/rival/keys?order=name&after=" + after,
		"another filter's":   keysPath + "?order=name&type=instance&after=" + after,
		"another order's":    keysPath + "?order=name+desc&after=" + after,
		"no order's":         keysPath + "?after=" + after,
		"the API's":          keysPath + "?order=name&after=" + d.svc.KeyPlaces(admin.PlacesOfAPI).Seal(in.In(instance), place),
		"another server's":   keysPath + "?order=name&after=" + admin.NewKeyPlaces(nil, admin.PlacesOfPortal).Seal(in.In(instance), place),
		"of an old version":  keysPath + "?order=name&after=0." + last.Key.ID.String() + ".bmFtZQ",
		"garbage":            keysPath + "?order=name&after=%00%ff",
		"long":               keysPath + "?order=name&after=" + strings.Repeat("A", 1<<12),
		"cut":                keysPath + "?order=name&after=" + after[:len(after)-2],
	}
	for i := range after {
		edited := []byte(after)
		if edited[i] = 'A'; after[i] == 'A' {
			edited[i] = 'B'
		}
		targets[fmt.Sprint("edited at ", i)] = keysPath + "?order=name&after=" + string(edited)
	}
	for name, target := range targets {
		status, page := b.get(target)
		first, _, _ := strings.Cut(target, "after=")
		link := html.UnescapeString(fmt.Sprint(regexp.MustCompile(`<a href="([^"]*)">Begin at the first page</a>`).FindStringSubmatch(page)))
		if status != http.StatusBadRequest || !strings.Contains(page, "goes on in another list of keys") || strings.Contains(page, "No key is so") ||
			!strings.HasSuffix(link, " "+strings.TrimRight(first, "?&")+"]") {
			t.Errorf("%s: status %d, to the first page %q, want %q", name, status, link, first)
		}
	}
}

func TestBadges(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	day := 24 * time.Hour
	old := now.Add(-200 * day)
	for name, test := range map[string]struct {
		key  apikey.Key
		want string
	}{
		"nothing":         {apikey.Key{CreatedAt: old, LastUsedAt: now.Add(-time.Hour)}, "[]"},
		"expires":         {apikey.Key{CreatedAt: old, LastUsedAt: now, ExpirationDate: now.Add(3 * day)}, "[{expires in 3 days true}]"},
		"expires later":   {apikey.Key{CreatedAt: old, LastUsedAt: now, ExpirationDate: now.Add(15 * day)}, "[]"},
		"over":            {apikey.Key{CreatedAt: old, ExpirationDate: now.Add(-day)}, "[]"},
		"idle":            {apikey.Key{CreatedAt: old, LastUsedAt: now.Add(-40 * day)}, "[{idle for 40 days false}]"},
		"ends for it":     {apikey.Key{CreatedAt: old, LastUsedAt: now.Add(-40 * day), InactivityDays: 45}, "[{ends unused in 5 days true}]"},
		"leaked":          {apikey.Key{CreatedAt: old, LastUsedAt: now, LeakReportedAt: now}, "[{reported as leaked true}]"},
		"not yet":         {apikey.Key{CreatedAt: now, NotBefore: now.Add(2 * day)}, "[{begins in 2 days false}]"},
		"old secret used": {apikey.Key{CreatedAt: old, LastUsedAt: now, Generations: []apikey.Generation{{Number: 1, ValidUntil: now.Add(day), LastUsedAt: now}, {Number: 2, CreatedAt: now.Add(-day)}}}, "[{old secret still in use true}]"},
		"old one unused":  {apikey.Key{CreatedAt: old, LastUsedAt: now, Generations: []apikey.Generation{{Number: 1, ValidUntil: now.Add(day), LastUsedAt: now.Add(-2 * day)}, {Number: 2, CreatedAt: now.Add(-day)}}}, "[]"},
		"old one is over": {apikey.Key{CreatedAt: old, LastUsedAt: now, Generations: []apikey.Generation{{Number: 1, ValidUntil: now.Add(-time.Hour), LastUsedAt: now.Add(-2 * time.Hour)}, {Number: 2, CreatedAt: now.Add(-day)}}}, "[]"},
	} {
		r := admin.RecordOf(&test.key, now)
		if got := fmt.Sprint(badgesOf(&test.key, &r, now)); got != test.want {
			t.Errorf("%s: got %s, want %s", name, got, test.want)
		}
	}
}

func TestUsageOnThePage(t *testing.T) {
	d := newDesk(t)
	k := d.key(admin.KeyInput{Name: "busy"})
	hour := time.Now().UTC().Truncate(time.Hour)
	err := d.store.AddUsage(t.Context(), admin.UsageBatch{}, []admin.Usage{
		{InstanceID: instance, KeyID: k.Key.ID, Start: hour, UsageCounts: admin.UsageCounts{
			Allowed: 1234, Refused: 7, Reasons: map[string]int64{"burst": 5, "scope": 2}, Generations: map[int]int64{1: 1234}, Networks: map[string]int64{"192.0.2.0/24": 1234},
			Ended: admin.EndedRequests{Count: 2, Status: [6]int64{0, 0, 1, 0, 0, 1}, RequestBytes: 10, ResponseBytes: 3 << 20, Duration: 3 * time.Second, Longest: 2 * time.Second},
		}},
		{InstanceID: instance, KeyID: k.Key.ID, Start: hour.Add(-3 * time.Hour), UsageCounts: admin.UsageCounts{Allowed: 1}},
		{InstanceID: instance, KeyID: k.Key.ID, Start: hour.Add(-30 * time.Hour), UsageCounts: admin.UsageCounts{Allowed: 100}},
	})
	if err != nil {
		t.Fatal(err)
	}
	b := d.signIn(admin.RoleAuditor)
	for query, want := range map[string][]string{
		"":           {"1\u202f235 allowed and 7 refused in the last 24 hours. Most refusals: burst (5).", "burst 5, scope 2", "<code>192.0.2.0/24</code>: 1\u202f234", "2xx: 1", "5xx: 1", "Took 1.5s on average, 2s at most", "3.0 MiB out"},
		"?range=7d":  {"1\u202f335 allowed"},
		"?range=30d": {"1\u202f335 allowed"},
		"?range=x":   {"in the last 24 hours"},
	} {
		_, page := b.get(pathOf(k) + query)
		for _, text := range want {
			if !strings.Contains(page, text) {
				t.Errorf("%q: %q is not on the page", query, text)
			}
		}
	}
	_, page := b.get(pathOf(k))
	sum := 0
	rows := regexp.MustCompile(`<tr><th scope="row"><time datetime="[^"]+">[^<]+</time></th><td class="number" data-n="(\d+)">`).FindAllStringSubmatch(page, -1)
	for _, row := range rows {
		n := 0
		_, _ = fmt.Sscan(row[1], &n)
		sum += n
	}
	if len(rows) != 24 || sum != 1235 {
		t.Errorf("the table has %d rows of %d in all, want 24 of 1235", len(rows), sum)
	}
	if _, list := b.get(keysPath); !strings.Contains(list, "1\u202f335 allowed and 7 refused in 14 days") {
		t.Error("the list shows no usage")
	}
}

// TestUsageOfOthers: a user who comes by the record of another's key is told nothing of it.
func TestUsageOfOthers(t *testing.T) {
	d := newDesk(t)
	own, bobs := d.key(admin.KeyInput{Name: "a", Type: apikey.TypeUser, UserPrincipalName: ann}), d.key(admin.KeyInput{Name: "b", Type: apikey.TypeUser, UserPrincipalName: "bob@example.com"})
	now := time.Now()
	for _, k := range []admin.CreatedKey{own, bobs} {
		if err := d.store.AddUsage(t.Context(), admin.UsageBatch{}, []admin.Usage{{InstanceID: instance, KeyID: k.Key.ID, Start: now, UsageCounts: admin.UsageCounts{Allowed: 1}}}); err != nil {
			t.Fatal(err)
		}
	}
	caller, err := d.svc.Authenticate(t.Context(), d.tokens[admin.RoleUser].Secret)
	if err != nil {
		t.Fatal(err)
	}
	q := admin.UsageQuery{Interval: admin.UsageHour, From: now.Add(-2 * time.Hour), To: now.Add(time.Second)}
	got, err := d.svc.KeysUsage(t.Context(), caller, instance, []*apikey.Key{own.Key, bobs.Key}, q)
	if err != nil || len(got) != 1 || len(got[own.Key.ID]) != 1 {
		t.Errorf("%v, %v", got, err)
	}
	q.From = now.Add(-101 * time.Hour)
	if _, err := d.svc.KeysUsage(t.Context(), caller, instance, []*apikey.Key{own.Key}, q); err == nil {
		t.Error("more intervals than may be were listed")
	}
}

// TestNothingOfARecordIsMarkup puts markup wherever a record of somebody else's can have text.
func TestNothingOfARecordIsMarkup(t *testing.T) {
	d := newDesk(t)
	const evil = `"><script>alert(1)</script><img src=x onerror=alert(1)>'{{7}}`
	// Not by the service, which would refuse some of it: what is in the store may be older than its rules.
	_, err := d.store.Update(t.Context(), func(tx admin.Tx) error {
		k := &apikey.Key{
			ID: apikey.ID{1, 15: 1}, InstanceID: instance, Name: evil, Description: evil, Type: apikey.TypeAgent, AgentName: evil, Environment: evil,
			CreatedBy: evil, CreatedAt: time.Now(), Metadata: map[string]string{evil: evil}, Scopes: apikey.Scopes{apikey.Scope(evil)},
		}
		if err := tx.InsertKey(t.Context(), k); err != nil {
			return err
		}
		if err := tx.InsertGeneration(t.Context(), k.ID, apikey.Generation{Number: 1, Hint: evil, CreatedAt: time.Now()}, apikey.Digest{1}, 1); err != nil {
			return err
		}
		user := *k
		user.ID, user.Type, user.AgentName, user.UserPrincipalName = apikey.ID{2, 15: 1}, apikey.TypeUser, "", evil
		if err := tx.InsertKey(t.Context(), &user); err != nil {
			return err
		}
		return tx.Audit(t.Context(), admin.Event{
			At: time.Now(), Actor: evil, RemoteAddr: evil, RequestID: evil, Action: evil, Refused: evil, InstanceID: instance, Target: k.ID.String(),
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	usage := admin.UsageCounts{Allowed: 1, Refused: 1, Reasons: map[string]int64{evil: 1}, Networks: map[string]int64{evil: 1}}
	if err := d.store.AddUsage(t.Context(), admin.UsageBatch{}, []admin.Usage{{InstanceID: instance, KeyID: apikey.ID{1, 15: 1}, Start: time.Now(), UsageCounts: usage}}); err != nil {
		t.Fatal(err)
	}
	made, err := d.svc.CreateToken(t.Context(), d.owner, admin.TokenInput{Name: evil, Role: admin.RoleOwner, InstanceID: instance})
	if err != nil {
		t.Fatal(err)
	}
	d.tokens[admin.RoleOwner] = made
	b := d.signIn(admin.RoleOwner)
	path := keysPath + "/" + apikey.ID{1, 15: 1}.String()
	typed := url.QueryEscape(evil)
	seen := 0
	look := func(target, page string) {
		t.Helper()
		if strings.Contains(page, "<script>") || strings.Contains(page, "<img") || strings.Contains(page, `"><`+"script") || strings.Contains(page, "'{{7}}") && strings.Contains(page, ">'{{") {
			t.Errorf("%s has markup of a record: %s", target, page)
		}
		seen += strings.Count(page, "&lt;script&gt;")
	}
	for _, target := range []string{
		keysPath, path, keysPath + "/" + apikey.ID{2, 15: 1}.String(), path + "/edit", path + "/rotate", path + "/revoke", "/instances", keysPath + "/new",
		keysPath + "?name=" + typed + "&owner=" + typed + "&environment=" + typed + "&type=" + typed + "&status=" + typed + "&show=" + typed + "&order=" + typed + "&after=" + typed,
		path + "?range=" + typed, "/instances?id=" + typed, "/sign-in?next=" + typed, "/" + url.PathEscape(evil),
	} {
		_, page := b.get(target)
		look(target, page)
	}
	form := aNewKey(evil)
	for _, field := range []string{"description", "agentName", "userPrincipalName", "environment", "scopes", "allowedIps", "metadata", "rateRequests", "ratePer", "burst", "maxConcurrent", "expirationDate", "inactivityDays", "type", "scopesMode", "expirationPolicy"} {
		form.Set(field, evil)
	}
	look("create", text(t, b.fill(keysPath+"/new", form)))
	look("edit", text(t, b.fill(path+"/edit", form)))
	good := aNewKey(evil)
	look("secret", text(t, b.fill(keysPath+"/new", good)))
	b.cookies[saidCookie] = "PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg" // <script>alert(1)</script>
	_, page := b.get(keysPath)
	look("what was done", page)
	if seen < 40 {
		t.Errorf("the text was seen %d times: it is not where it is looked for", seen)
	}
}

func TestFileNames(t *testing.T) {
	for name, want := range map[string]string{
		"my key": "my-key-key.txt", "../../etc/passwd": "etc-passwd-key.txt", "ключ": "keyward-key.txt", `a"b\c`: "a-b-c-key.txt", "...": "keyward-key.txt", ".hidden": "hidden-key.txt",
	} {
		if got := fileName(name); got != want {
			t.Errorf("%q: got %q, want %q", name, got, want)
		}
	}
}

// TestPagesHaveWhatTheyNeed looks at the templates: what a person with a screen reader needs, and no code.
func TestPagesHaveWhatTheyNeed(t *testing.T) {
	names, err := fs.Glob(pageFiles, "pages/*.html")
	if err != nil || len(names) < 5 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		b, err := pageFiles.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		page := string(b)
		for _, form := range strings.Split(page, `<form method="post"`)[1:] {
			if head, _, _ := strings.Cut(form, "<button"); !strings.Contains(head, `{{template "form" $}}`) && name != "pages/signin.html" {
				t.Errorf("%s: a form without {{template \"form\" $}}", name)
			}
		}
		for _, no := range []string{" style=", "<style", " onclick", "hx-on", "http://", "https://"} {
			if strings.Contains(page, no) && (no != "http://" || name != "pages/nocookie.html") {
				t.Errorf("%s has %q", name, no)
			}
		}
	}
}
