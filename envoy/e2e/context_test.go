package e2e_test

import (
	"bufio"
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// at walks down a tree of YAML; a number is an index.
func at(tree any, path ...any) any {
	for _, step := range path {
		switch step := step.(type) {
		case string:
			tree = tree.(map[string]any)[step]
		case int:
			tree = tree.([]any)[step]
		}
	}
	return tree
}

// TestRoutesSayWhatTheyNeed: routes in Envoy's own configuration name scopes and places by
// context_extensions, beside keyward's rules; and what keyward decided is there for Envoy's logs.
func TestRoutesSayWhatTheyNeed(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes + "- {path: /named/scoped, scopes: [\"orders:list\"]}\n"})
	home := s.instance(t, admin.PolicyInput{})
	f := s.front(t, frontConfig{edit: func(tree map[string]any) {
		manager := at(tree, "static_resources", "listeners", 0, "filter_chains", 0, "filters", 0, "typed_config").(map[string]any)
		host := at(manager, "route_config", "virtual_hosts", 0).(map[string]any)
		rest := host["routes"].([]any)
		var named []any
		for path, extensions := range map[string]map[string]any{
			"/named/scopes":      {"required_scopes": "orders:read orders:write"},
			"/named/commas":      {"required_scopes": "orders:read,orders:write"},
			"/named/scoped":      {"required_scopes": "orders:read"},
			"/named/instance":    {"instance": home},
			"/named/away":        {"instance": "away"},
			"/named/agent":       {"agent": "sales"},
			"/named/environment": {"environment": "production"},
			"/named/all":         {"instance": home, "agent": "sales", "environment": "production", "required_scopes": "orders:read", "theirs": "x"},
			"/named/empty":       {"agent": ""},
		} {
			named = append(named, map[string]any{
				"match": map[string]any{"path": path}, "route": at(rest, 0, "route"),
				"typed_per_filter_config": map[string]any{"envoy.filters.http.ext_authz": map[string]any{
					"@type":          "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
					"check_settings": map[string]any{"context_extensions": extensions},
				}},
			})
		}
		host["routes"] = append(named, rest...)
		format := at(manager, "access_log", 0, "typed_config", "log_format", "json_format").(map[string]any)
		for _, name := range []string{"reason", "denied", "key_id", "instance", "decision_id"} {
			format["keyward_"+name] = "%DYNAMIC_METADATA(envoy.filters.http.ext_authz:keyward." + name + ")%"
		}
	}})
	f.awaitHealthy(t)
	reader := s.key(t, home, admin.KeyInput{Scopes: []string{"orders:read"}})
	writer := s.key(t, home, admin.KeyInput{Scopes: []string{"orders:read", "orders:write"}})
	agent := s.key(t, home, admin.KeyInput{Type: apikey.TypeAgent, AgentName: "sales", Environment: "production"})
	support := s.key(t, home, admin.KeyInput{Type: apikey.TypeAgent, AgentName: "support"})
	staging := s.key(t, home, admin.KeyInput{Environment: "staging"})

	c := f.caller(t)
	var want []map[string]any // what Envoy's log says of each request
	for _, tt := range []struct {
		target string
		key    key
		status int
		reason string
	}{
		{"/named/scopes", writer, http.StatusOK, "key"},
		{"/named/scopes", reader, http.StatusForbidden, "missing_scope"},
		{"/named/commas", reader, http.StatusForbidden, "missing_scope"},
		{"/named/scoped", reader, http.StatusForbidden, "missing_scope"}, // keyward's rule asks for more
		{"/named/scoped", agent, http.StatusOK, "key"},
		{"/named/instance", reader, http.StatusOK, "key"},
		{"/named/away", reader, http.StatusForbidden, "wrong_instance"},
		{"/named/agent", agent, http.StatusOK, "key"},
		{"/named/agent", support, http.StatusForbidden, "wrong_agent"},
		{"/named/agent", reader, http.StatusOK, "key"},
		{"/named/environment", agent, http.StatusOK, "key"},
		{"/named/environment", staging, http.StatusForbidden, "wrong_environment"},
		{"/named/all", agent, http.StatusOK, "key"},
		{"/named/all", staging, http.StatusForbidden, "wrong_environment"},
		{"/named/empty", reader, http.StatusBadRequest, "invalid_request"},
		{"/any", support, http.StatusOK, "key"},
	} {
		a := c.get(tt.target, withKey(tt.key.secret)).want(t, tt.status, tt.target)
		line := map[string]any{"path": tt.target, "status": float64(tt.status), "keyward_reason": tt.reason, "keyward_denied": "true", "keyward_key_id": tt.key.ID.String(), "keyward_instance": home}
		if tt.status == http.StatusOK {
			line["keyward_denied"] = nil
			line["keyward_decision_id"] = a.seen.values(defaultNames.decisionID)[0]
		} else {
			var body struct{ Error struct{ DecisionID string } }
			if err := json.Unmarshal([]byte(a.body), &body); err != nil {
				t.Fatal(err)
			}
			line["keyward_decision_id"] = body.Error.DecisionID
		}
		want = append(want, line)
	}

	if err := f.Stop(); err != nil { // which writes the log to its end
		t.Fatal(err)
	}
	log, err := os.Open(f.log)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	var got []map[string]any
	for lines := bufio.NewScanner(log); lines.Scan(); {
		var line map[string]any
		if !strings.HasPrefix(lines.Text(), "{") || json.Unmarshal(lines.Bytes(), &line) != nil {
			continue
		}
		if line["status"] == float64(http.StatusServiceUnavailable) {
			continue // sent again
		}
		for name := range line {
			if name != "path" && name != "status" && !strings.HasPrefix(name, "keyward_") {
				delete(line, name)
			}
		}
		got = append(got, line)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Envoy's log (-want +got):\n%s", diff)
	}
}
