package manage

import (
	"context"
	"encoding/json"
	"net/http"
	"path"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// The routes of FoundationaLLM's Management API that are about Agent Access Tokens, so that its portal can call
// us: its paths, names in snake case, envelopes, versions and errors.
//
// Where we differ: a change that is not everywhere yet is a 202, and a request that never comes to one of these
// routes, such as one without a management token, is refused in the shape of our own API.
//
// Source: reference/foundationallm.md §4.

type (
	atAgent struct {
		InstanceID string `path:"instanceId"`
		Agent      string `path:"agent"`
	}
	atAgentToken struct {
		InstanceID string `path:"instanceId"`
		Agent      string `path:"agent"`
		KeyID      string `path:"keyId" format:"uuid"`
	}
)

// An AgentAccessTokenInput is what a client says of a token. The members that resources of that platform have
// in common are taken and not looked at.
type AgentAccessTokenInput struct {
	ID             string `json:"id,omitempty" format:"uuid" doc:"That of the path, or absent."`
	Name           string `json:"name,omitempty" doc:"Not kept: a token is called by its id."`
	Description    string `json:"description,omitempty"`
	Active         *bool  `json:"active" doc:"false: the token is refused until it is true again."`
	ExpirationDate string `json:"expiration_date" doc:"RFC 3339 with a zone, or a date, which means its end in UTC."`

	Type        string            `json:"type,omitempty" doc:"Not looked at, and so the members below."`
	ObjectID    string            `json:"object_id,omitempty"`
	DisplayName string            `json:"display_name,omitempty"`
	CostCenter  string            `json:"cost_center,omitempty"`
	Properties  map[string]string `json:"properties,omitempty"`
	CreatedOn   string            `json:"created_on,omitempty"`
	CreatedBy   string            `json:"created_by,omitempty"`
	UpdatedOn   string            `json:"updated_on,omitempty"`
	UpdatedBy   string            `json:"updated_by,omitempty"`
	Deleted     bool              `json:"deleted,omitempty"`
	Actions     []string          `json:"inheritable_authorizable_actions,omitempty"`
}

// An AgentAccessToken is a token as a resource of that platform. It has no secret.
type AgentAccessToken struct {
	Type           string     `json:"type"`
	ID             apikey.ID  `json:"id" format:"uuid"`
	Name           string     `json:"name" doc:"The id."`
	Description    string     `json:"description"`
	Active         bool       `json:"active"`
	ExpirationDate *time.Time `json:"expiration_date" doc:"null: never, which only our own API can say."`
	CreatedOn      time.Time  `json:"created_on"`
	CreatedBy      string     `json:"created_by"`
	Deleted        bool       `json:"deleted"`
}

// An AgentAccessTokenEnvelope is what lists hold.
type AgentAccessTokenEnvelope struct {
	Resource   AgentAccessToken  `json:"resource"`
	Roles      []string          `json:"roles" nullable:"false"`
	Actions    []string          `json:"actions" nullable:"false"`
	Properties map[string]string `json:"properties"`
}

// A PutAgentAccessToken is the answer to an upsert.
type PutAgentAccessToken struct {
	ObjectID string  `json:"object_id"`
	Exists   bool    `json:"resource_exists" doc:"The token was there, and was changed."`
	Resource *string `json:"resource" doc:"The token, shown this once; null if it was there."`
}

// A DeletedAgentAccessToken is the answer to a deletion.
type DeletedAgentAccessToken struct {
	ObjectID string  `json:"object_id"`
	Success  bool    `json:"is_success"`
	Error    *string `json:"error_message"`
}

// An AgentAccessTokenQuestion asks whether a token is good.
type AgentAccessTokenQuestion struct {
	Token string `json:"access_token"`
}

// An AgentAccessTokenVerdict says whether a token is good, and on whose behalf it speaks.
type AgentAccessTokenVerdict struct {
	Valid    bool             `json:"valid"`
	Identity *VirtualIdentity `json:"virtual_identity" doc:"null for a token that is not valid."`
}

// A VirtualIdentity is that platform's principal of a token.
type VirtualIdentity virtualIdentity

// Schema is that of an object that may be null.
func (VirtualIdentity) Schema(r huma.Registry) *huma.Schema {
	return orNull[virtualIdentity]{}.Schema(r)
}

type virtualIdentity struct {
	Name     string   `json:"name"`
	UserName string   `json:"user_name"`
	UserID   string   `json:"user_id"`
	UPN      string   `json:"upn"`
	ByToken  bool     `json:"associated_with_access_token"`
	GroupIDs []string `json:"group_ids" nullable:"false" doc:"Always empty: groups are the platform's own."`
}

// platformVersion is the one version of that API that there is.
const platformVersion = "2024-02-16"

var platformVersionParameter = &huma.Param{
	Name: "api-version", In: "query", Description: "The version of FoundationaLLM's Management API; absent: this one.",
	Schema: &huma.Schema{Type: huma.TypeString, Enum: []any{platformVersion}},
}

// platformOperations are those whose versions and errors are that platform's.
var platformOperations = map[string]bool{
	"listAgentAccessTokens": true, "putAgentAccessToken": true, "deleteAgentAccessToken": true, "validateAgentAccessToken": true,
}

// platformErrors documents the errors of such an operation.
func platformErrors(r *huma.Response) {
	r.Description = "Error: its message; an object where no token or no such path was found"
	content := r.Content["application/json"]
	content.Schema = &huma.Schema{AnyOf: []*huma.Schema{{Type: huma.TypeString}, content.Schema}}
}

// A platformError is an error as that platform answers it: the message alone, as a JSON string.
type platformError struct{ *failure }

func (f platformError) MarshalJSON() ([]byte, error) { return json.Marshal(f.Error()) }

func (h *handler) agentTokenRoutes(api huma.API, instance string) {
	tokens := instance + "/providers/FoundationaLLM.Agent/agents/{agent}/agentAccessTokens"
	token := tokens + "/{keyId}"
	route(h, api, http.MethodGet, tokens, "listAgentAccessTokens", "As FoundationaLLM: list the Agent Access Tokens of an agent", nil, h.listAgentTokens)
	route(h, api, http.MethodPost, token, "putAgentAccessToken", "As FoundationaLLM: make an Agent Access Token under an id, or change it", AgentAccessTokenInput{}, h.putAgentToken, 202)
	route(h, api, http.MethodDelete, token, "deleteAgentAccessToken", "As FoundationaLLM: delete an Agent Access Token, also one that is not there", nil, h.deleteAgentToken, 202)
	route(h, api, http.MethodPost, tokens+"/validate", "validateAgentAccessToken", "As FoundationaLLM: tell whether an Agent Access Token is good", AgentAccessTokenQuestion{}, h.validateAgentToken)
}

// isValidation reports whether a path is that of validateAgentAccessToken, which the path of a token covers too:
// other methods must not take "validate" for an id.
func isValidation(p string) bool {
	is, err := path.Match("/instances/*/providers/FoundationaLLM.Agent/agents/*/agentAccessTokens/validate", p)
	return is && err == nil
}

// supported says which versions there are, as that platform does in each answer.
func (c *call) supported() { c.w.Header().Set("Api-Supported-Versions", platformVersion) }

func (h *handler) listAgentTokens(ctx context.Context, c *call, in *atAgent) (*out[[]AgentAccessTokenEnvelope], error) {
	c.supported()
	keys, err := h.svc.AgentTokens(ctx, c.Caller, in.InstanceID, in.Agent)
	if err != nil {
		return nil, err
	}
	all := make([]AgentAccessTokenEnvelope, 0, len(keys))
	for _, k := range keys {
		resource := AgentAccessToken{
			Type: "agentAccessToken", ID: k.ID, Name: k.ID.String(), Description: k.Description, Active: !k.Disabled,
			CreatedOn: k.CreatedAt.UTC(), CreatedBy: k.CreatedBy,
		}
		if !k.ExpirationDate.IsZero() {
			resource.ExpirationDate = new(k.ExpirationDate.UTC())
		}
		all = append(all, AgentAccessTokenEnvelope{resource, []string{}, []string{}, map[string]string{}})
	}
	return ok(all), nil
}

func (h *handler) putAgentToken(ctx context.Context, c *call, in *atAgentToken) (*out[PutAgentAccessToken], error) {
	c.supported()
	var body AgentAccessTokenInput
	if err := readBody(c.w, c.r, &body); err != nil {
		return nil, err
	}
	id, err := in.id()
	switch {
	case err != nil:
		return nil, err
	case body.ID != "" && !strings.EqualFold(body.ID, in.KeyID):
		return nil, apikey.Invalid("id", "is not the one in the path")
	case body.Active == nil:
		return nil, apikey.Invalid("active", "is missing")
	case body.ExpirationDate == "":
		return nil, apikey.Invalid("expiration_date", "is missing")
	}
	put, err := h.svc.PutAgentToken(ctx, c.Caller, in.InstanceID, in.Agent, id, admin.AgentTokenInput{
		Description: body.Description, Active: *body.Active, ExpirationDate: body.ExpirationDate,
	})
	if err != nil {
		return nil, err
	}
	answer := PutAgentAccessToken{ObjectID: objectID(c.r), Exists: !put.Created}
	if put.Created {
		answer.Resource = new(put.Secret.Reveal())
		return ok(answer), nil // a token that works nowhere yet takes nothing away
	}
	return &out[PutAgentAccessToken]{Status: sooner(put.Propagation), Body: answer}, nil
}

func (h *handler) deleteAgentToken(ctx context.Context, c *call, in *atAgentToken) (*out[DeletedAgentAccessToken], error) {
	c.supported()
	id, err := in.id()
	if err != nil {
		return nil, err
	}
	p, err := h.svc.DeleteAgentToken(ctx, c.Caller, in.InstanceID, in.Agent, id)
	if err != nil {
		return nil, err
	}
	return &out[DeletedAgentAccessToken]{Status: sooner(p), Body: DeletedAgentAccessToken{ObjectID: objectID(c.r), Success: true}}, nil
}

func (h *handler) validateAgentToken(ctx context.Context, c *call, in *atAgent) (*out[AgentAccessTokenVerdict], error) {
	c.supported()
	var body AgentAccessTokenQuestion
	if err := readBody(c.w, c.r, &body); err != nil {
		return nil, err
	}
	if body.Token == "" {
		return nil, apikey.Invalid("access_token", "is missing")
	}
	k, err := h.svc.ValidateAgentToken(ctx, c.Caller, in.InstanceID, in.Agent, body.Token)
	if err != nil || k == nil {
		return ok(AgentAccessTokenVerdict{}), err
	}
	id := k.ID.String()
	return ok(AgentAccessTokenVerdict{Valid: true, Identity: &VirtualIdentity{
		Name: id, UserName: id, UserID: id, UPN: string(k.AppendPrincipal(nil)), ByToken: true, GroupIDs: []string{},
	}}), nil
}

func (in *atAgentToken) id() (apikey.ID, error) {
	id, err := apikey.ParseID(in.KeyID)
	if err != nil || id.IsZero() {
		return apikey.ID{}, apikey.Invalid("id", "must be a UUID such as 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f")
	}
	return id, nil
}

// objectID is the path of what a request is about.
func objectID(r *http.Request) string { return r.URL.EscapedPath() }
