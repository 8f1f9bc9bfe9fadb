package manage

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// salesTokens are the tokens of the agent "sales", below an instance.
const salesTokens = "/providers/FoundationaLLM.Agent/agents/sales/agentAccessTokens"

// tokenBody is what that platform's portal sends, with a date that is good in real time.
var tokenBody = fmt.Sprintf(`{"id":"8b0f6c58-4a7c-4d7f-9d3e-5b1a0c9e7f21","name":"8b0f6c58-4a7c-4d7f-9d3e-5b1a0c9e7f21","description":"kiosk","active":true,"expiration_date":%q}`,
	time.Now().Add(120*24*time.Hour).UTC().Format("2006-01-02T15:04:05.000Z"))

// wantPlatformError fails unless an answer is an error as that platform's: its message, as a JSON string.
func wantPlatformError(t *testing.T, w *httptest.ResponseRecorder, status int) string {
	t.Helper()
	var message string
	if err := json.Unmarshal(w.Body.Bytes(), &message); err != nil || message == "" || w.Code != status {
		t.Errorf("got %d %q, want %d and a message", w.Code, w.Body, status)
	}
	if got := w.Header().Get("Content-Type"); got != "application/json" {
		t.Errorf("Content-Type %q", got)
	}
	return message
}

// A platformPortal calls the Management API as that platform's portal does, as its documentation has it.
type platformPortal struct {
	*desk
	t               *testing.T
	token           apikey.Secret
	agent, instance string
}

type portalToken struct {
	ID             string    `json:"id"`
	Name           string    `json:"name"`
	Description    string    `json:"description"`
	Active         bool      `json:"active"`
	ExpirationDate time.Time `json:"expiration_date"`
}

func (p *platformPortal) call(method, below, body string) *httptest.ResponseRecorder {
	p.t.Helper()
	target := "/instances/" + p.instance + "/providers/FoundationaLLM.Agent/agents/" + url.PathEscape(p.agent) + "/agentAccessTokens" + below + "?api-version=2024-02-16"
	return p.send(p.token, method, target, body)
}

func (p *platformPortal) list() (all []portalToken) {
	p.t.Helper()
	w := p.call("GET", "", "")
	for _, e := range read[[]struct {
		Resource       portalToken
		Roles, Actions []string
		Properties     map[string]string
	}](p.t, w, 200) {
		if e.Roles == nil || e.Actions == nil || e.Properties == nil {
			p.t.Errorf("an envelope lacks something: %s", w.Body)
		}
		all = append(all, e.Resource)
	}
	if strings.Contains(w.Body.String(), "hash") || w.Header().Get("Api-Supported-Versions") != "2024-02-16" {
		p.t.Errorf("got %v %s", w.Header(), w.Body)
	}
	return all
}

// save upserts a token and returns it as text; "" if it was there.
func (p *platformPortal) save(one portalToken) string {
	p.t.Helper()
	body, err := json.Marshal(one)
	if err != nil {
		p.t.Fatal(err)
	}
	w := p.call("POST", "/"+one.ID, string(body))
	got := read[struct {
		ObjectID string `json:"object_id"`
		Exists   *bool  `json:"resource_exists"`
		Resource *string
	}](p.t, w, 200)
	if got.Exists == nil || *got.Exists != (got.Resource == nil) || got.ObjectID != "/instances/"+p.instance+"/providers/FoundationaLLM.Agent/agents/"+p.agent+"/agentAccessTokens/"+one.ID {
		p.t.Errorf("got %s", w.Body)
	}
	if got.Resource == nil {
		return ""
	}
	return *got.Resource
}

func (p *platformPortal) remove(id string) {
	p.t.Helper()
	got := read[map[string]any](p.t, p.call("DELETE", "/"+id, ""), 200)
	message, there := got["error_message"]
	if got["is_success"] != true || message != nil || !there || got["object_id"] == "" {
		p.t.Errorf("got %v", got)
	}
}

func (p *platformPortal) validate(token string) (valid bool, upn string) {
	p.t.Helper()
	got := read[struct {
		Valid    bool
		Identity *struct {
			UPN    string
			UserID string   `json:"user_id"`
			Groups []string `json:"group_ids"`
		} `json:"virtual_identity"`
	}](p.t, p.call("POST", "/validate", fmt.Sprintf(`{"access_token":%q}`, token)), 200)
	if got.Valid != (got.Identity != nil) {
		p.t.Errorf("got %+v", got)
	}
	if got.Identity == nil {
		return false, ""
	}
	return true, got.Identity.UPN
}

// TestPlatformPortal makes, lists, disables, lengthens and deletes a token as that platform's portal does.
func TestPlatformPortal(t *testing.T) {
	d := open(t)
	const home = "11111111-2222-3333-4444-555555555555"
	d.instance(t, home)
	p := &platformPortal{desk: d, t: t, token: d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleOperator, InstanceID: home}).Secret, agent: "demo-agent", instance: home}
	if got := p.list(); got != nil {
		t.Fatalf("got %v", got)
	}
	id := uuid.NewString()
	one := portalToken{ID: id, Name: id, Description: "kiosk", Active: true, ExpirationDate: time.Now().Add(120 * 24 * time.Hour).UTC().Truncate(time.Millisecond)}
	secret := p.save(one)
	token, err := apikey.ParseAgentToken(secret)
	if err != nil || token.InstanceID != home || token.AgentName != "demo-agent" || token.KeyID.String() != id {
		t.Fatalf("%v: %d characters for %v", err, len(secret), token.KeyID)
	}
	if diff := cmp.Diff([]portalToken{one}, p.list()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	k, err := d.svc.Key(t.Context(), root, home, token.KeyID)
	if err != nil || k.Type != apikey.TypeAgent || k.AgentName != "demo-agent" || k.CreatedBy == "" || k.CreatedBy == root.Name {
		t.Fatalf("%v: %+v", err, k)
	}
	want := "aat_demo-agent_" + id + "@foundationallm.internal_"
	if valid, upn := p.validate(secret); !valid || upn != want {
		t.Errorf("got %t %s", valid, upn)
	}

	one.Active, one.Description = false, "closed"
	if again := p.save(one); again != "" {
		t.Error("an existing token was shown again")
	}
	if valid, _ := p.validate(secret); valid {
		t.Error("valid, and not active")
	}
	one.Active, one.ExpirationDate = true, one.ExpirationDate.Add(24*time.Hour)
	p.save(one)
	if valid, _ := p.validate(secret); !valid {
		t.Error("not valid, and active again")
	}
	if diff := cmp.Diff([]portalToken{one}, p.list()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}

	// Of another agent, of another instance, altered, ours, nobody's.
	other := *p
	other.agent = "other-agent"
	if valid, _ := other.validate(secret); valid {
		t.Error("valid for another agent")
	}
	if got := other.list(); got != nil {
		t.Errorf("another agent has %v", got)
	}
	other.remove(id) // it has none, and so it is gone
	mine, err := d.svc.CreateKey(t.Context(), root, home, admin.KeyInput{Name: "n", Type: apikey.TypeAgent, AgentName: "demo-agent"})
	if err != nil {
		t.Fatal(err)
	}
	for _, not := range []string{"x", mine.Secret.Reveal(), apikey.NewAgentToken(home, "demo-agent", token.KeyID).Reveal(), secret + "x"} {
		if valid, _ := p.validate(not); valid {
			t.Error("valid, and made up")
		}
	}
	if valid, _ := p.validate(secret); !valid {
		t.Error("another agent deleted it")
	}
	if got := p.list(); len(got) != 2 {
		t.Errorf("a key of ours is not among the agent's: %v", got)
	}

	p.remove(id)
	p.remove(id)
	p.remove(uuid.NewString())
	if valid, _ := p.validate(secret); valid {
		t.Error("valid, and deleted")
	}
	if got := p.list(); len(got) != 1 || got[0].ID == id {
		t.Errorf("got %v", got)
	}
	text, _ := json.Marshal(one)
	if message := wantPlatformError(t, p.call("POST", "/"+id, string(text)), 409); !strings.Contains(message, "another id") {
		t.Errorf("got %q", message)
	}
	closed := one
	closed.ID, closed.Active = uuid.NewString(), false
	closed.Name = closed.ID
	if valid, _ := p.validate(p.save(closed)); valid {
		t.Error("valid, and never active")
	}
	events := d.send(d.owner, "GET", "/instances/"+home+"/auditEvents", "").Body.String()
	for _, action := range []string{"key.create", "key.disable", "key.enable", "key.revoke"} {
		if !strings.Contains(events, `"`+action+`"`) {
			t.Errorf("the audit has no %s", action)
		}
	}
	noCanary(t, d.log.String()+events, mine.Secret)
	if random := strings.Split(secret, ".")[4]; strings.Contains(d.log.String()+events, random) {
		t.Error("the token leaked")
	}
}

// TestPlatformErrors: what is refused, in that platform's shape; nothing is made by it.
func TestPlatformErrors(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	if _, err := d.svc.PutInstance(t.Context(), root, "full", apikey.Policy{Caps: apikey.Caps{Agent: 1}}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.svc.PutInstance(t.Context(), root, "seldom", apikey.Policy{Creation: apikey.Creation{PerHour: 1}}); err != nil {
		t.Fatal(err)
	}
	foreign := d.key(t, "a").Key.ID.String()
	at := func(instance string) string { return "/instances/" + instance + salesTokens }
	fresh := func() string { return uuid.NewString() }
	soon := time.Now().Add(24 * time.Hour).UTC().Format(time.RFC3339)
	good := `{"description":"d","active":true,"expiration_date":"` + soon + `"}`
	for _, instance := range []string{"full", "seldom"} {
		read[map[string]any](t, d.send(d.owner, "POST", at(instance)+"/"+fresh(), good), 200)
	}
	for name, tt := range map[string]struct {
		method, target, body string
		status               int
		says                 string
	}{
		"no date":           {"POST", at("a") + "/" + fresh(), `{"active":true}`, 400, "expiration_date"},
		"null date":         {"POST", at("a") + "/" + fresh(), `{"active":true,"expiration_date":null}`, 400, "expiration_date"},
		"past date":         {"POST", at("a") + "/" + fresh(), `{"active":true,"expiration_date":"2020-01-01T00:00:00Z"}`, 400, "expiration_date"},
		"far date":          {"POST", at("a") + "/" + fresh(), `{"active":true,"expiration_date":"2099-01-01T00:00:00Z"}`, 400, "expiration_date"},
		"no active":         {"POST", at("a") + "/" + fresh(), `{"expiration_date":"` + soon + `"}`, 400, "active"},
		"another id":        {"POST", at("a") + "/" + fresh(), `{"id":"` + fresh() + `",` + good[1:], 400, "id"},
		"no GUID":           {"POST", at("a") + "/one", good, 400, "id"},
		"the zero GUID":     {"POST", at("a") + "/00000000-0000-0000-0000-000000000000", good, 400, "id"},
		"no agent's name":   {"POST", "/instances/a/providers/FoundationaLLM.Agent/agents/a%20b/agentAccessTokens/" + fresh(), good, 400, "agentName"},
		"another key's id":  {"POST", at("a") + "/" + foreign, good, 409, "another key"},
		"the cap":           {"POST", at("full") + "/" + fresh(), good, 409, "caps.agent"},
		"the rate":          {"POST", at("seldom") + "/" + fresh(), good, 429, "within 1h"},
		"no instance":       {"GET", at("none"), "", 404, "no such"},
		"delete there":      {"DELETE", at("none") + "/" + fresh(), "", 404, "no such"},
		"validate nothing":  {"POST", at("a") + "/validate", `{}`, 400, "access_token"},
		"another version":   {"GET", at("a") + "?api-version=2020-01-01", "", 400, "2024-02-16"},
		"our own version":   {"GET", at("a") + "?api-version=" + apiVersion, "", 400, "2024-02-16"},
		"unknown parameter": {"GET", at("a") + "?top=1", "", 400, "top"},
	} {
		w := d.send(d.owner, tt.method, tt.target, tt.body)
		if message := wantPlatformError(t, w, tt.status); !strings.Contains(message, tt.says) {
			t.Errorf("%s: got %q", name, message)
		}
		if (w.Header().Get("Retry-After") != "") != (tt.status == http.StatusTooManyRequests) {
			t.Errorf("%s: Retry-After %q", name, w.Header().Get("Retry-After"))
		}
	}
	if got := d.send(d.owner, "GET", at("a"), "").Body.String(); strings.TrimSpace(got) != "[]" {
		t.Errorf("something was made: %s", got)
	}
	// Our own routes know nothing of that platform's version.
	wantError(t, d.send(d.owner, "GET", "/instances?api-version=2024-02-16", ""), 400, CodeInvalidRequest, "api-version")
	// The action is no token.
	for _, method := range []string{"DELETE", "GET", "OPTIONS"} {
		w := d.send(d.owner, method, at("a")+"/validate", "")
		wantError(t, w, 405, CodeMethodNotAllowed, "")
		if allow := w.Header().Get("Allow"); allow != "POST" {
			t.Errorf("Allow: %s", allow)
		}
	}
	// What never comes to a route has our shape.
	wantError(t, d.send(apikey.Secret{}, "GET", at("a"), ""), 401, CodeUnauthorized, "")
}

// Where the server would not know such a token, it makes none.
func TestPlatformTokensNeedTheirShape(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.Handler = New(admin.New(d.store, admin.Config{Peppers: apikey.Peppers{Current: pepper}}, nil, slog.New(slog.DiscardHandler)), Config{Caller: &root})
	message := wantPlatformError(t, d.send(apikey.Secret{}, "POST", "/instances/a"+salesTokens+"/8b0f6c58-4a7c-4d7f-9d3e-5b1a0c9e7f21", tokenBody), 409)
	if !strings.Contains(message, "agentAccessToken") {
		t.Errorf("got %q", message)
	}
}
