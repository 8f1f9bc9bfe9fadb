package foundationallm_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/authz/foundationallm"
)

// TestCoreAPIRules is the table of reference/foundationallm.md §6: for each route its controller, whether Agent
// Access Tokens may, and where the agent is found.
func TestCoreAPIRules(t *testing.T) {
	const table = `
POST /instances/{instanceId}/completions                                      Completions        aat $.agent_name!
POST /instances/{instanceId}/async-completions                                Completions        aat $.agent_name!
GET  /instances/{instanceId}/completions/agents                               Completions        aat -
GET  /instances/{instanceId}/async-completions/{operationId}/status           CompletionsStatus  aat -
GET  /instances/{instanceId}/sessions                                         Sessions           aat -
POST /instances/{instanceId}/sessions                                         Sessions           aat -
GET  /instances/{instanceId}/sessions/{sessionId}                             Sessions           aat -
DELETE /instances/{instanceId}/sessions/{sessionId}                           Sessions           aat -
GET  /instances/{instanceId}/sessions/{sessionId}/messages                    Sessions           aat -
GET  /instances/{instanceId}/sessions/{sessionId}/messagescount               Sessions           aat -
GET  /instances/{instanceId}/sessions/{sessionId}/completionprompts/{promptId} Sessions          aat -
POST /instances/{instanceId}/sessions/{sessionId}/message/{messageId}/rate    Sessions           aat -
POST /instances/{instanceId}/sessions/{sessionId}/update                      Sessions           aat -
POST /instances/{instanceId}/files/upload                                     Files              aat ?agentName
GET  /instances/{instanceId}/files/{provider}/{fileId}                        Files              aat -
POST /instances/{instanceId}/files/delete                                     Files              aat -
GET  /instances/{instanceId}/sessions/{sessionId}/realtime-speech             RealtimeSpeech     no  ?agentName
GET  /instances/{instanceId}/agents/{agentName}/realtime-speech/config        RealtimeSpeech     no  {agentName}
GET  /instances/{instanceId}/status/auth                                      Status             no  -
GET  /instances/{instanceId}/configuration                                    Configuration      no  -
GET  /instances/{instanceId}/userprofiles                                     UserProfiles       no  -
POST /instances/{instanceId}/userprofiles/add-agent                           UserProfiles       no  -
POST /instances/{instanceId}/userprofiles/remove-agent                        UserProfiles       no  -
POST /instances/{instanceId}/onedriveworkschool/connect                       OneDriveWorkSchool no  -
POST /instances/{instanceId}/onedriveworkschool/disconnect                    OneDriveWorkSchool no  -
POST /instances/{instanceId}/onedriveworkschool/download                      OneDriveWorkSchool no  -
any  /instances/{instanceId}/{rest...}                                        __default__        no  -
any  /management/instances/{instanceId}/providers/{provider}/{path...}        Resource           no  -
any  /management/instances/{instanceId}/providers/FoundationaLLM.Agent/agents/{agentName}/{path...} Resource no {agentName}
any  /management/instances/{instanceId}/{rest...} __default__ no -
GET  /instances/{instanceId}/status                                           public             -   -
OPTIONS /instances/{instanceId}/status                                        public             -   -
GET  /instances/{instanceId}/branding                                         public             -   -
GET  /swagger/                                                                public             -   -
`
	for _, prefix := range []string{"", "/core"} {
		rules, err := foundationallm.CoreAPI(prefix, authz.Optional)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := authz.NewRoutes(rules, true); err != nil {
			t.Error(err)
		}
		var got []string
		for _, r := range rules {
			controller, tokens, agent, method := strings.TrimPrefix(r.Context, "CoreAPI:"), "no", "-", r.Method
			switch {
			case r.Mode == authz.Public:
				controller, tokens = "public", "-"
			case r.Mode != authz.Optional || len(r.Instance) != 1 || r.Instance[0].String() != "{instanceId}" || !strings.HasPrefix(r.Context, "CoreAPI:"):
				t.Errorf("%s: %+v", &r, r)
			case r.KeyTypes == nil:
				tokens = "aat"
			case !slices.Equal(r.KeyTypes, []apikey.Type{apikey.TypeInstance, apikey.TypeUser}):
				t.Errorf("%s is for %v", &r, r.KeyTypes)
			}
			if len(r.Agent) == 1 {
				agent = r.Agent[0].String()
			}
			if r.AgentNeeded {
				agent += "!"
			}
			if method == "" {
				method = "any"
			}
			path, ok := strings.CutPrefix(r.Path, prefix)
			if !ok {
				t.Errorf("%s lacks the prefix", &r)
			}
			got = append(got, strings.Join([]string{method, path, controller, tokens, agent}, " "))
		}
		var want []string
		for line := range strings.Lines(strings.TrimSpace(table)) {
			want = append(want, strings.Join(strings.Fields(line), " "))
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("prefix %q (-want +got):\n%s", prefix, diff)
		}
	}
}
