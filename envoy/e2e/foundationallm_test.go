package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// behindIngress is all that is configured for FoundationaLLM behind an ingress with a prefix.
const behindIngress = "preset: {name: foundationallm, prefix: /core}\n"

// A platformClient calls the Core API as that platform's documentation says: the token in its own header and
// nothing in Authorization, a session first, and of a refusal it reads two members.
type platformClient struct {
	t        *testing.T
	base     string // with the prefix
	instance string
	token    string
}

// post sends a request and returns the status and, of a refusal for a quota, what that platform's clients read.
func (c *platformClient) post(target string, body map[string]any) (status int, exceeded bool, retry time.Duration) {
	c.t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		c.t.Fatal(err)
	}
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		r, err := http.NewRequestWithContext(c.t.Context(), http.MethodPost, c.base+"/instances/"+c.instance+target, bytes.NewReader(text))
		if err != nil {
			c.t.Fatal(err)
		}
		r.Header.Set("X-AGENT-ACCESS-TOKEN", c.token)
		r.Header.Set("Content-Type", "application/json")
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			c.t.Fatal(err)
		}
		said, err := io.ReadAll(answer.Body)
		_ = answer.Body.Close()
		if err != nil {
			c.t.Fatal(err)
		}
		if answer.StatusCode == http.StatusServiceUnavailable && time.Now().Before(end) {
			continue // not decided, which is not refused
		}
		var refusal struct {
			Exceeded bool `json:"quota_exceeded"`
			Seconds  int  `json:"time_until_retry_seconds"`
		}
		if answer.StatusCode == http.StatusTooManyRequests {
			if err := json.Unmarshal(said, &refusal); err != nil {
				c.t.Fatalf("%v: %s", err, said)
			}
		}
		return answer.StatusCode, refusal.Exceeded, time.Duration(refusal.Seconds) * time.Second
	}
}

func (c *platformClient) complete() (status int, exceeded bool, retry time.Duration) {
	c.t.Helper()
	return c.post("/completions", map[string]any{"session_id": "s", "user_prompt": "hello", "agent_name": "sales"})
}

// agentToken makes an Agent Access Token by the route of that platform's portal.
func (s *server) agentToken(t *testing.T, instance, agent string) (id, token string) {
	t.Helper()
	secret, err := os.ReadFile(s.path("admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	id = uuid.NewString()
	body := fmt.Sprintf(`{"id":%q,"name":%[1]q,"description":"kiosk","active":true,"expiration_date":%q}`, id, time.Now().Add(24*time.Hour).UTC().Format(time.RFC3339))
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost,
		"http://"+s.manage+"/instances/"+instance+"/providers/FoundationaLLM.Agent/agents/"+agent+"/agentAccessTokens/"+id+"?api-version=2024-02-16", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(secret)))
	r.Header.Set("Content-Type", "application/json")
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	var made struct{ Resource string }
	if err := json.NewDecoder(answer.Body).Decode(&made); err != nil || answer.StatusCode != http.StatusOK || !strings.HasPrefix(made.Resource, "keya.") {
		t.Fatalf("got %d, %v and %d characters", answer.StatusCode, err, len(made.Resource))
	}
	s.canary.Add(made.Resource)
	return id, made.Resource
}

// applyStore applies the quota-store.json of the tests, as it is.
func (s *server) applyStore(t *testing.T, instance string) {
	t.Helper()
	s.run(t, "quotas", "apply", instance, "-f", filepath.Join("testdata", "foundationallm", "quota-store.json"),
		"--server", "http://"+s.manage, "--token-file", s.path("admin.token"))
}

// TestFoundationaLLM is the preset and one quota-store.json behind Envoy.
func TestFoundationaLLM(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: behindIngress})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)

	// It is refused, reads how long to wait, waits, and passes.
	t.Run("TheDocumentedClient", func(t *testing.T) {
		for try := 0; ; try++ {
			home := s.instance(t, admin.PolicyInput{})
			s.applyStore(t, home)
			_, token := s.agentToken(t, home, "sales")
			c := &platformClient{t: t, base: "http://" + f.address + "/core", instance: home, token: token}
			began := time.Now()
			if status, _, _ := c.post("/sessions", map[string]any{"name": "a kiosk"}); status != http.StatusOK {
				t.Fatalf("a session: got %d", status)
			}
			for range 3 {
				if status, _, _ := c.complete(); status != http.StatusOK {
					t.Fatalf("a completion: got %d", status)
				}
			}
			status, exceeded, retry := c.complete()
			if status == http.StatusOK && time.Since(began) > 15*time.Second && try < 5 {
				continue // some of them have left the window
			}
			if status != http.StatusTooManyRequests || !exceeded || retry != 3*time.Second {
				t.Fatalf("the fourth: got %d %t %v", status, exceeded, retry)
			}
			time.Sleep(retry)
			if status, _, retry := c.complete(); status != http.StatusOK {
				t.Fatalf("after %v: got %d, and %v more", 3*time.Second, status, retry)
			}
			return
		}
	})

	t.Run("RefusalsCountNothing", func(t *testing.T) {
		for try := 0; ; try++ {
			home, away := s.instance(t, admin.PolicyInput{}), s.instance(t, admin.PolicyInput{})
			s.applyStore(t, home)
			_, token := s.agentToken(t, home, "sales")
			c, header := f.caller(t), platformToken(token)
			at := "/core/instances/" + home
			began := time.Now()
			for range 4 { // more than would pass
				c.doJSON("POST", at+"/completions", `{"agent_name":"billing"}`, header).want(t, http.StatusForbidden, "another agent")
				c.doJSON("POST", "/core/instances/"+away+"/completions", toSales, header).want(t, http.StatusForbidden, "another instance")
				c.doJSON("POST", at+"/completions", `{"user_prompt":"hello"}`, header).want(t, http.StatusBadRequest, "no agent")
				c.doJSON("POST", at+"/completions", toSales, platformToken(token+"x")).want(t, http.StatusUnauthorized, "no token")
			}
			// All three ways to be a request of the controller count together; its case does not matter.
			c.doJSON("POST", "/Core/Instances/"+home+"/Async-Completions", toSales, header).want(t, http.StatusOK)
			c.get(at+"/completions/agents", header).want(t, http.StatusOK)
			a := c.doJSON("POST", at+"/completions", toSales, header).want(t, http.StatusOK)
			c.get(at+"/async-completions/1/status", header).want(t, http.StatusOK, "another controller")
			over := c.get(at+"/completions/agents", header)
			if over.status == http.StatusOK && time.Since(began) > 15*time.Second && try < 5 {
				continue
			}
			if e := over.exceeded(t); e.Name != "CompletionsPerCaller" || e.Context != "CoreAPI:Completions" {
				t.Errorf("got %+v", e)
			}
			for name, want := range map[string][]string{"x-agent-access-token": nil, "x-keyward-agent": {"sales"}, "x-keyward-instance-id": {home}} {
				if diff := cmp.Diff(want, a.seen.values(name)); diff != "" {
					t.Errorf("%s (-want +got):\n%s", name, diff)
				}
			}
			if identity := strings.Join(a.seen.values("x-user-identity"), ""); !strings.Contains(identity, `"upn":"aat_sales_`) || !strings.Contains(identity, `"associated_with_access_token":true`) {
				t.Errorf("got x-user-identity %s", identity)
			}
			return
		}
	})

	t.Run("ContextsOfAgentsAndOfNothing", func(t *testing.T) {
		home := s.instance(t, admin.PolicyInput{})
		s.applyStore(t, home)
		at := "/core/instances/" + home
		user := func(upn string) string {
			return withKey(s.key(t, home, admin.KeyInput{Type: apikey.TypeUser, UserPrincipalName: upn}).secret)
		}
		c := f.caller(t)
		// Everybody together has one in 20 s, and then 60 s of nothing.
		c.doJSON("POST", at+"/completions", `{"agent_name":"billing"}`, user("ada@example.com")).want(t, http.StatusOK)
		if e := c.doJSON("POST", at+"/completions", `{"agent_name":"billing"}`, user("bob@example.com")).exceeded(t); e.Name != "CompletionsOfBilling" {
			t.Errorf("got %+v", e)
		}
		c.doJSON("POST", at+"/completions", toSales, user("bob@example.com")).want(t, http.StatusOK, "another agent")
		carl := user("carl@example.com")
		c.get(at+"/no-such-controller/at/all", carl).want(t, http.StatusOK)
		if e := c.get(at+"/another", carl).exceeded(t); e.Context != "CoreAPI:__default__" {
			t.Errorf("got %+v", e)
		}
	})

	t.Run("WhoMayWhere", func(t *testing.T) {
		home := s.instance(t, admin.PolicyInput{})
		at := "/core/instances/" + home
		_, token := s.agentToken(t, home, "sales")
		agent, none := platformToken(token), "X-Nothing: 1"
		user := withKey(s.key(t, home, admin.KeyInput{Type: apikey.TypeUser, UserPrincipalName: "ada@example.com"}).secret)
		c := f.caller(t)
		const preflight = "Origin: https://portal.test\r\nAccess-Control-Request-Method: POST"
		for _, tt := range []struct {
			method, target, line string
			status               int
		}{
			{"GET", at + "/status", none, 200}, {"OPTIONS", at + "/status", none, 200}, {"GET", at + "/Branding", none, 200},
			{"GET", "/core/swagger/v1/swagger.json", none, 200}, {"OPTIONS", at + "/completions", preflight, 200},
			{"OPTIONS", at + "/completions", none, 401}, {"GET", at + "/status/auth", none, 401}, {"POST", at + "/status", none, 401},
			{"GET", at + "/configuration", none, 401}, {"GET", "/status", none, 401}, {"GET", "/core/other", none, 401},
			{"GET", at + "/configuration", agent, 403}, {"GET", at + "/configuration", user, 200},
			{"GET", at + "/userprofiles", agent, 403}, {"GET", at + "/status/auth", agent, 403}, {"GET", at + "/no-such", agent, 403},
			{"POST", at + "/onedriveworkschool/connect", agent, 403}, {"POST", at + "/onedriveworkschool/connect", user, 200},
			{"GET", at + "/sessions/1/realtime-speech?agentName=sales", agent, 403}, {"GET", at + "/sessions/1/realtime-speech?agentName=sales", user, 200},
			{"GET", at + "/agents/sales/realtime-speech/config", agent, 403}, {"GET", at + "/agents/sales/realtime-speech/config", user, 200},
			{"GET", "/core/management" + at[len("/core"):] + "/providers/FoundationaLLM.Agent/agents/sales", agent, 403},
			{"GET", "/core/management" + at[len("/core"):] + "/providers/FoundationaLLM.Prompt/prompts", user, 200},
			{"GET", "/core/management/instances/other/providers/FoundationaLLM.Prompt/prompts", user, 403},
			{"GET", at + "/sessions/1/messages", agent, 200}, {"POST", at + "/files/upload?sessionId=1&agentName=sales", agent, 200},
			{"POST", at + "/files/upload?sessionId=1&agentName=billing", agent, 403}, {"GET", at + "/files/p/1", agent, 200},
			{"POST", at + "/files/upload?agentName=sales&agentName=billing", agent, 400}, {"DELETE", at + "/sessions/1", agent, 200},
		} {
			if a := c.do(tt.method, tt.target, tt.line, "Content-Length: 0"); a.status != tt.status {
				t.Errorf("%s %s with %.12s: got %d %s, want %d", tt.method, tt.target, tt.line, a.status, a.body, tt.status)
			}
		}
	})
}
