package main

import (
	"context"
	"encoding/json"
	"flag"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

var (
	schemathesisTime = flag.Duration("schemathesis", 40*time.Second, "how long TestSchemathesis asks")
	schemathesisSeed = flag.Uint64("schemathesisseed", 0, "seed of TestSchemathesis; 0: a random one, which is logged")
)

// TestSchemathesis has schemathesis make requests of the OpenAPI document and send them to a running
// server: none is answered with a fault of the server's, and none with what is not documented. Every
// operation is asked, and succeeds.
func TestSchemathesis(t *testing.T) {
	t.Parallel()
	program, err := filepath.Abs(filepath.Join("..", "..", ".tools", "schemathesis", "bin", "schemathesis"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(filepath.Dir(program)), ".complete")); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("%v: run make schemathesis", err)
		}
		t.Skip("there is no schemathesis in .tools: run make schemathesis, which needs Python 3 with venv and pip")
	}
	dir, at := t.TempDir(), newPorts()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("testdata", "schemathesis"))); err != nil {
		t.Fatal(err)
	}
	server, token := fresh(t, dir, at)
	client := manage.NewClient("http://"+at.manage, token, nil)
	var made []apikey.ID // keys of "demo"
	for _, id := range []string{"demo", "other", "gone"} {
		unbounded := admin.PolicyInput{Caps: admin.CapsInput{Instance: new(-1)}, Creation: admin.CreationInput{PerHour: new(-1)}}
		if _, err := client.PutInstance(t.Context(), id, unbounded); err != nil {
			t.Fatal(err)
		}
		for range 20 {
			key, err := client.CreateKey(t.Context(), id, admin.KeyInput{Name: "asked about"})
			if err != nil {
				t.Fatal(err)
			}
			if id == "demo" {
				made = append(made, key.Key.ID)
			}
		}
	}
	if _, err := client.RotateKey(t.Context(), "demo", made[0], admin.RotateInput{}); err != nil {
		t.Fatal(err)
	}
	// The first one of these ends the token that the server made.
	var tokens [3]apikey.Secret
	var spare apikey.ID // of the last of them
	for i := range tokens {
		made, err := client.CreateToken(t.Context(), admin.TokenInput{Name: "schemathesis", Role: admin.RoleOwner})
		if err != nil {
			t.Fatal(err)
		}
		tokens[i], spare = made.Secret, made.Token.ID
		if i == 0 {
			client = manage.NewClient("http://"+at.manage, made.Secret, nil)
		}
	}
	called := filepath.Join(dir, "called")
	examples, known := askedAbout(made, spare)
	codes, err := filepath.Abs(filepath.Join("..", "..", "docs", "error-codes.md"))
	if err != nil {
		t.Fatal(err)
	}
	asJSON := func(v any) string {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	ask := func(token apikey.Secret, lasting time.Duration, args ...string) {
		// Its own time is about asking; it begins with a plan, and ends with a report.
		ctx, cancel := context.WithTimeout(t.Context(), lasting+2*patience)
		defer cancel()
		args = append([]string{
			"--config-file", "schemathesis.toml", "run", "--max-time", strconv.Itoa(int(lasting.Seconds())), "--continue-on-failure",
			"--suppress-health-check", "all", "--request-timeout", strconv.Itoa(int(patience.Seconds())), "--no-color",
		}, args...)
		if *schemathesisSeed != 0 {
			args = append(args, "--seed", strconv.FormatUint(*schemathesisSeed, 10))
		}
		c := exec.CommandContext(ctx, program, append(args, "http://"+at.manage+"/openapi.json")...)
		c.Dir = dir
		c.Env = programEnv("HOME="+dir, "PYTHONDONTWRITEBYTECODE=1", "KEYWARD_SERVER=http://"+at.manage,
			"KEYWARD_TOKEN="+token.Reveal(), "KEYWARD_ERROR_CODES="+codes, "KEYWARD_CALLED="+called,
			"KEYWARD_EXAMPLES="+asJSON(examples), "KEYWARD_KNOWN="+asJSON(known))
		said, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s\n%s", err, said, server.says())
		}
		cases := regexp.MustCompile(`(\d+) generated`).FindSubmatch(said)
		if cases == nil || len(cases[1]) < 2 {
			t.Fatalf("too little was asked:\n%s", said)
		}
		t.Logf("%s cases; %s", cases[1], regexp.MustCompile(`Seed: \d+`).Find(said))
	}
	// With tokens it would find its own, and revoke it: those come last.
	document, aboutTokens := "http://"+at.manage+"/openapi.json", []string{"listTokens", "createToken", "revokeToken"}
	ask(tokens[0], *schemathesisTime*4/5, "--exclude-operation-id", "revokeToken")
	// On a busy machine the time is over before each operation had more than its example.
	for range 5 {
		missing := leftOut(t, document, called)
		var only []string
		for operation, succeeded := range missing {
			if succeeded {
				delete(examples, operation)
			}
			if !slices.Contains(aboutTokens, operation) {
				only = append(only, "--include-operation-id", operation)
			}
		}
		if only == nil {
			break
		}
		ask(tokens[0], *schemathesisTime, only...)
	}
	if _, err := manage.NewClient("http://"+at.manage, tokens[0], nil).Instances(t.Context()); err != nil {
		t.Fatalf("what was asked with the token proves nothing: %v", err)
	}
	var only []string
	for _, operation := range aboutTokens {
		only = append(only, "--include-operation-id", operation)
	}
	ask(tokens[1], *schemathesisTime/2, only...)
	for operation, succeeded := range leftOut(t, document, called) {
		t.Errorf("%s: asked less than twice, or not with success (%t)", operation, succeeded)
	}
	if said := server.says(); strings.Contains(said, "panic") {
		t.Errorf("the server says:\n%s", said)
	}
}

// askedAbout returns one example of each operation that should succeed, and the ids that other requests should
// be about.
func askedAbout(keys []apikey.ID, token apikey.ID) (examples, known map[string]any) {
	type ids = map[string]any
	type example struct {
		Path  ids `json:"path,omitempty"`
		Query ids `json:"query,omitempty"`
		Body  any `json:"body,omitempty"`
	}
	in := ids{"instanceId": "other"}
	of := func(n int) ids { return ids{"instanceId": "demo", "keyId": keys[n]} }
	name := ids{"name": "n"}
	quota := ids{"name": "q", "context": "CoreAPI:Completions", "partition": "None", "limit": 1, "window": "60s"}
	atQuota := ids{"instanceId": "other", "name": "q"}
	atAgent := ids{"instanceId": "other", "agent": "a"}
	atAgentToken := ids{"instanceId": "other", "agent": "a", "keyId": "8b0f6c58-4a7c-4d7f-9d3e-5b1a0c9e7f21"}
	atAlert := ids{"instanceId": "other", "alertId": keys[0]}
	soon := time.Now().AddDate(0, 0, 30).UTC().Format(time.RFC3339)
	lately := time.Now().AddDate(0, 0, -30).UTC().Format(time.DateOnly)
	return map[string]any{
		"listAuditEvents": example{Path: in}, "listAllAuditEvents": example{}, "getAuditChain": example{}, "getAuditHead": example{}, "verifyAudit": example{},
		"listInstances": example{}, "getInstance": example{Path: in}, "disableInstance": example{Path: in}, "enableInstance": example{Path: in},
		"putInstance":    example{Path: in, Body: ids{"policy": ids{"caps": ids{"instance": -1}, "creation": ids{"perHour": -1}}}},
		"deleteInstance": example{Path: ids{"instanceId": "gone"}, Query: ids{"revokeKeys": "true"}},
		"listKeys":       example{Path: in, Query: ids{"status": "active", "orderby": "name"}},
		"createKey":      example{Path: in, Body: ids{"name": "n", "type": "agent", "agentName": "a", "scopes": []string{"a:b"}, "expiresIn": "30d"}},
		"getKey":         example{Path: of(1)}, "getKeyAdvice": example{Path: of(1)}, "getKeyLimits": example{Path: in}, "updateKey": example{Path: of(1), Body: name},
		"rotateKey": example{Path: of(2), Body: ids{"gracePeriod": "1h"}}, "revokeKey": example{Path: of(3), Query: ids{"reason": "unused"}},
		"revokeGeneration": example{Path: ids{"instanceId": "demo", "keyId": keys[0], "number": 1}},
		"revokeKeys":       example{Path: in, Body: ids{"filter": ids{"namePrefix": "asked"}, "dryRun": true}},
		"importKeys":       example{Path: in, Body: ids{"name": "n", "secret": apikey.Format{}.New(apikey.KindInstance).Reveal()}}, "exportKeys": example{Path: in},
		"listQuotas": example{Path: in}, "applyQuotas": example{Path: in, Body: ids{"quotas": []ids{quota}}}, "putQuota": example{Path: atQuota, Body: quota},
		"getQuota": example{Path: atQuota}, "deleteQuota": example{Path: atQuota},
		"listAgentAccessTokens":    example{Path: atAgent},
		"putAgentAccessToken":      example{Path: atAgentToken, Body: ids{"description": "d", "active": true, "expiration_date": soon}},
		"deleteAgentAccessToken":   example{Path: atAgentToken},
		"validateAgentAccessToken": example{Path: atAgent, Body: ids{"access_token": "none"}},
		"listInFlight":             example{Path: in}, "endInFlight": example{Path: ids{"instanceId": "other", "leaseId": "none"}},
		"verifyKey": example{Path: in, Body: ids{"method": "GET", "path": "/"}}, "getLimitsOfKey": example{Path: of(1)},
		"getKeyUsage": example{Path: of(1), Query: ids{"from": "7d", "interval": "hour"}}, "getInstanceUsage": example{Path: in, Query: ids{"from": "2h"}},
		"getTopUsage": example{Path: in, Query: ids{"by": "refused", "limit": 5}}, "getUsage": example{Query: ids{"from": lately, "interval": "day"}},
		"getDecision": example{Path: ids{"instanceId": "other", "decisionId": "none"}},
		"listAlerts":  example{Path: in, Query: ids{"open": "true"}}, "listAllAlerts": example{Query: ids{"kind": "unused"}},
		"getAlert": example{Path: atAlert}, "ackAlert": example{Path: atAlert},
		"getAnyAlert": example{Path: ids{"alertId": keys[0]}}, "ackAnyAlert": example{Path: ids{"alertId": keys[0]}}, "testAlerts": example{},
		"listPeppers": example{}, "retirePepper": example{Path: ids{"version": 1}},
		"listTokens": example{}, "createToken": example{Body: ids{"name": "n", "role": "auditor"}}, "revokeToken": example{Path: ids{"tokenId": token}},
		"endSessions": example{Query: ids{"actor": "oidc:https://issuer.example#ann"}},
	}, ids{"instanceId": []string{"demo", "other"}, "keyId": keys[4:]}
}

// leftOut compares what was asked, a line with operation and status for each answer, with the document. It
// returns the operations that were asked less than twice, or never with success, and whether they had any.
func leftOut(t *testing.T, document, called string) map[string]bool {
	t.Helper()
	answer, err := http.Get(document)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	var api struct {
		Paths map[string]map[string]struct{ OperationID string }
	}
	if err := json.NewDecoder(answer.Body).Decode(&api); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(called)
	if err != nil {
		t.Fatal(err)
	}
	asked, done := map[string]int{}, map[string]int{}
	for line := range strings.Lines(string(text)) {
		operation, status, _ := strings.Cut(strings.TrimSpace(line), " ")
		asked[operation]++
		if status[0] == '2' {
			done[operation]++
		}
	}
	missing := map[string]bool{}
	for _, methods := range api.Paths {
		for _, operation := range methods {
			id := operation.OperationID
			// No request runs, no pepper can go, nothing is odd and nobody is told: these have nothing to succeed with.
			succeeded := done[id] > 0 || slices.Contains([]string{
				"endInFlight", "getDecision", "retirePepper", "getAlert", "ackAlert", "getAnyAlert", "ackAnyAlert", "testAlerts",
			}, id)
			if asked[id] < 2 || !succeeded {
				missing[id] = succeeded
			}
		}
	}
	return missing
}

// fresh starts a server on a new store in a folder, and returns it with its first management token.
func fresh(t *testing.T, dir string, at ports) (*process, apikey.Secret) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "keyward.yaml"), []byte(smallest+"credentials: {foreign: [{parser: agentAccessToken}]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeNewPrivate(filepath.Join(dir, "pepper"), apikey.MarshalPepper(apikey.NewPepper(1, false))); err != nil {
		t.Fatal(err)
	}
	server, err := serve(dir, at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.kill)
	token, err := os.ReadFile(filepath.Join(dir, adminTokenFile))
	if err != nil {
		t.Fatal(err)
	}
	return server, apikey.NewSecret(strings.TrimSpace(string(token)))
}
