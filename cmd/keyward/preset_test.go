package main

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// What is said by oneself holds: routes in the place of the preset's, and what the preset only changes the
// default of.
func TestPreset(t *testing.T) {
	route := func(cfg *Config, method, path string) (all []Route) {
		for _, r := range cfg.Routes {
			if r.Method == method && r.Path == path {
				all = append(all, r)
			}
		}
		return all
	}
	cfg, faults := load(t, smallest+"preset: {name: foundationallm}\n", nil, nil)
	if faults != nil {
		t.Fatal(faults)
	}
	const completions = "/instances/{instanceId}/completions"
	if got := route(cfg, "POST", completions); len(got) != 1 || got[0].Mode != "required" || got[0].AgentMissing != "require" {
		t.Errorf("got %+v", got)
	}
	if !cfg.IgnoreCase || cfg.CORSPreflight != "allow" || cfg.IdentityHeaders.UserIdentity != "x-user-identity" {
		t.Errorf("got %t, %s, %s", cfg.IgnoreCase, cfg.CORSPreflight, cfg.IdentityHeaders.UserIdentity)
	}
	if diff := cmp.Diff([]ForeignShape{{Parser: "agentAccessToken"}}, cfg.Credentials.Foreign); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	usual := len(cfg.Routes)

	// What config print shows is the same configuration.
	text, err := yaml.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	again, faults := load(t, string(text), nil, nil)
	if faults != nil {
		t.Fatal(faults)
	}
	if got, err := yaml.Marshal(again); err != nil || string(got) != string(text) {
		t.Errorf("%v: (-first +again):\n%s", err, cmp.Diff(string(text), string(got)))
	}

	cfg, faults = load(t, smallest+`
preset: {name: foundationallm, prefix: /core, mode: optional}
ignoreCase: false
corsPreflight: deny
identityHeaders: {userIdentity: "off"}
credentials: {foreign: [{prefix: old_, minLength: 30}]}
routes:
- {method: POST, path: "/core/instances/{id}/completions/", instance: "{id}", agent: "$.agent_name", agentMissing: ignore}
- {path: "/core/instances/{id}/providers/", mode: public}
`, nil, nil)
	if faults != nil {
		t.Fatal(faults)
	}
	if cfg.IgnoreCase || cfg.CORSPreflight != "deny" || cfg.IdentityHeaders.UserIdentity != "off" || len(cfg.Credentials.Foreign) != 2 {
		t.Errorf("got %t, %s, %s, %v", cfg.IgnoreCase, cfg.CORSPreflight, cfg.IdentityHeaders.UserIdentity, cfg.Credentials.Foreign)
	}
	if got := route(cfg, "POST", "/core"+completions); len(got) != 1 || len(cfg.Routes) != usual+2 {
		// a subtree covers what is below as well: it is another pattern
		t.Errorf("got %+v among %d", got, len(cfg.Routes))
	}
	cfg, faults = load(t, smallest+`
preset: {name: foundationallm}
routes: [{method: POST, path: "/Instances/{id}/Completions", mode: public}]
`, []string{"KEYWARD_PRESET_MODE=optional"}, nil)
	if faults != nil {
		t.Fatal(faults)
	}
	if len(cfg.Routes) != usual || cfg.Routes[0].Mode != "public" || len(route(cfg, "POST", completions)) != 0 {
		t.Errorf("the preset's stands beside one's own: %d routes", len(cfg.Routes))
	}
	if !slices.ContainsFunc(cfg.Routes, func(r Route) bool { return r.Mode == "optional" }) {
		t.Error("the mode of the environment is not in force")
	}
	for text, want := range map[string]string{
		"preset: {prefix: /core}":                            "preset.name: is missing: preset.prefix is for the paths of a preset",
		"preset: {name: other}":                              "preset.name: must be foundationallm, or absent",
		"preset: {name: foundationallm, prefix: core}":       "preset.prefix: must be a path without wildcards and without a slash at its end, such as /core",
		"preset: {name: foundationallm, prefix: /core/}":     "preset.prefix: must be a path without wildcards and without a slash at its end, such as /core",
		"preset: {name: foundationallm, prefix: \"/{a}\"}":   "preset.prefix: must be a path without wildcards and without a slash at its end, such as /core",
		"preset: {name: foundationallm, mode: public}":       "preset.mode: must be required or optional",
		"routes: [{path: /a, keyTypes: [owner]}]":            `routes[0] "/a": keyTypes must be some of instance, agent and user, each once`,
		"routes: [{path: /a, keyTypes: [user, user]}]":       `routes[0] "/a": keyTypes must be some of instance, agent and user, each once`,
		"routes: [{path: /a, mode: public, keyTypes: user}]": `routes[0] "/a": a public rule looks at no credential, so it cannot ask for scopes, instance, agent, environment or types of keys, and no quota counts it`,
	} {
		if _, faults := load(t, smallest+text+"\n", nil, nil); len(faults) != 1 || faults[0] != want {
			t.Errorf("%s: got %q, want %q", text, faults, want)
		}
	}
}
