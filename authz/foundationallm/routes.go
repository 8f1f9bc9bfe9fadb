package foundationallm

import (
	"keyward/authz"
	"keyward/authz/apikey"
)

// A controller is one line of the Core API's routes: below /instances/{instanceId}, but for the last ones.
type controller struct {
	name   string
	method string
	path   string
	agent  string // where the request names its agent; "": nowhere
	tokens bool   // Agent Access Tokens may
}

// The controllers that Agent Access Tokens may use, and the one of what has none.
const (
	completions  = "Completions"
	status       = "CompletionsStatus"
	sessions     = "Sessions"
	files        = "Files"
	noController = "__default__"
)

var controllers = []controller{
	{completions, "POST", "/completions", "$.agent_name", true},
	{completions, "POST", "/async-completions", "$.agent_name", true},
	{completions, "GET", "/completions/agents", "", true},
	{status, "GET", "/async-completions/{operationId}/status", "", true},
	{sessions, "GET", "/sessions", "", true},
	{sessions, "POST", "/sessions", "", true},
	{sessions, "GET", "/sessions/{sessionId}", "", true},
	{sessions, "DELETE", "/sessions/{sessionId}", "", true},
	{sessions, "GET", "/sessions/{sessionId}/messages", "", true},
	{sessions, "GET", "/sessions/{sessionId}/messagescount", "", true},
	{sessions, "GET", "/sessions/{sessionId}/completionprompts/{promptId}", "", true},
	{sessions, "POST", "/sessions/{sessionId}/message/{messageId}/rate", "", true},
	{sessions, "POST", "/sessions/{sessionId}/update", "", true},
	{files, "POST", "/files/upload", "?agentName", true},
	{files, "GET", "/files/{provider}/{fileId}", "", true},
	{files, "POST", "/files/delete", "", true},
	{"RealtimeSpeech", "GET", "/sessions/{sessionId}/realtime-speech", "?agentName", false},
	{"RealtimeSpeech", "GET", "/agents/{agentName}/realtime-speech/config", "{agentName}", false},
	{"Status", "GET", "/status/auth", "", false},
	{"Configuration", "GET", "/configuration", "", false},
	{"UserProfiles", "GET", "/userprofiles", "", false},
	{"UserProfiles", "POST", "/userprofiles/add-agent", "", false},
	{"UserProfiles", "POST", "/userprofiles/remove-agent", "", false},
	{"OneDriveWorkSchool", "POST", "/onedriveworkschool/connect", "", false},
	{"OneDriveWorkSchool", "POST", "/onedriveworkschool/disconnect", "", false},
	{"OneDriveWorkSchool", "POST", "/onedriveworkschool/download", "", false},
	{noController, "", "/{rest...}", "", false},
}

// The facade of the Management API, which is a controller of the Core API too.
var facade = []controller{
	{"Resource", "", "/providers/{provider}/{path...}", "", false},
	{"Resource", "", "/providers/FoundationaLLM.Agent/agents/{agentName}/{path...}", "{agentName}", false},
	{noController, "", "/{rest...}", "", false}, // of its instance all the same
}

// What nobody needs to be known for.
var public = []controller{
	{"", "GET", "/instances/{instanceId}/status", "", false},
	{"", "OPTIONS", "/instances/{instanceId}/status", "", false},
	{"", "GET", "/instances/{instanceId}/branding", "", false},
	{"", "GET", "/swagger/", "", false},
}

// CoreAPI returns the rules for the routes of FoundationaLLM's Core API below a prefix, such as /core; "" for
// none. They are for paths compared without regard to case, as there.
//
// Every route is of one instance, which the path names, and counts in CoreAPI:{controller}; those that name an
// agent in CoreAPI:{controller}:{agent} as well. Agent Access Tokens may use four controllers, as there, and
// other keys all. mode is that of all routes but the public ones: with Optional who has no key is the Core
// API's to know.
//
// A completion has to name its agent, or it is refused: the Core API fails it as well, and what it names is
// what an Agent Access Token is judged by, and a quota of the agent counts.
//
// Source: reference/foundationallm.md §6.
func CoreAPI(prefix string, mode authz.Mode) ([]authz.Rule, error) {
	const instance = "/instances/{instanceId}"
	var rules []authz.Rule
	place, err := authz.ParseSource("{instanceId}")
	if err != nil {
		return nil, err
	}
	add := func(below string, c controller) error {
		r := authz.Rule{
			Method: c.method, Path: prefix + below + c.path, Mode: mode,
			Instance: []authz.Source{place}, Context: "CoreAPI:" + c.name,
		}
		if c.agent != "" {
			agent, err := authz.ParseSource(c.agent)
			if err != nil {
				return err
			}
			r.Agent, r.AgentNeeded = []authz.Source{agent}, agent.InBody()
		}
		if !c.tokens {
			r.KeyTypes = []apikey.Type{apikey.TypeInstance, apikey.TypeUser}
		}
		rules = append(rules, r)
		return nil
	}
	for _, c := range controllers {
		if err := add(instance, c); err != nil {
			return nil, err
		}
	}
	for _, c := range facade {
		if err := add("/management"+instance, c); err != nil {
			return nil, err
		}
	}
	for _, c := range public {
		rules = append(rules, authz.Rule{Method: c.method, Path: prefix + c.path, Mode: authz.Public})
	}
	return rules, nil
}
