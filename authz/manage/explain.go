package manage

import (
	"context"
	"net/http"
	"net/url"

	"github.com/danielgtaylor/huma/v2"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

type atDecision struct {
	InstanceID string `path:"instanceId"`
	DecisionID string `path:"decisionId" doc:"As the refusal's answer or the log has it: 32 hexadecimal digits."`
}

func (h *handler) explainRoutes(api huma.API, instance, keys, key string) {
	route(h, api, http.MethodPost, keys+":verify", "verifyKey", "Tell what would be decided about a request, and step by step why; nothing is spent", admin.VerifyInput{}, h.verifyKey)
	route(h, api, http.MethodGet, key+"/limits", "getLimitsOfKey", "Get where every limit of a key, its principal and its instance stands", nil, h.limitsOfKey)
	route(h, api, http.MethodGet, instance+"/decisions/{decisionId}", "getDecision", "Get why a request was refused a moment ago", nil, h.getDecision)
}

func (h *handler) verifyKey(ctx context.Context, c *call, in *atInstance) (*out[admin.Verification], error) {
	var body admin.VerifyInput
	if err := readBody(c.w, c.r, &body); err != nil {
		return nil, err
	}
	answer, err := h.svc.Verify(ctx, c.Caller, in.InstanceID, body)
	if err != nil {
		return nil, err
	}
	return ok(answer), nil
}

func (h *handler) limitsOfKey(ctx context.Context, c *call, in *atKey) (*out[admin.KeyLimitsNow], error) {
	answer, err := h.svc.LimitsOfKey(ctx, c.Caller, in.InstanceID, keyID(in.KeyID))
	if err != nil {
		return nil, err
	}
	return ok(answer), nil
}

func (h *handler) getDecision(ctx context.Context, c *call, in *atDecision) (*out[admin.RecentRefusal], error) {
	answer, err := h.svc.Decision(ctx, c.Caller, in.InstanceID, in.DecisionID)
	if err != nil {
		return nil, err
	}
	return ok(answer), nil
}

// Verify tells what would be decided about a request. Nothing is spent.
func (c *Client) Verify(ctx context.Context, instanceID string, in admin.VerifyInput) (admin.Verification, error) {
	return send[admin.Verification](ctx, c, http.MethodPost, instancePath(instanceID, "apiKeys:verify"), nil, in)
}

// LimitsOfKey returns where every limit of a key stands.
func (c *Client) LimitsOfKey(ctx context.Context, instanceID string, id apikey.ID) (admin.KeyLimitsNow, error) {
	return send[admin.KeyLimitsNow](ctx, c, http.MethodGet, keyPath(instanceID, id, "limits"), nil, nil)
}

// Decision returns why a request was refused a moment ago.
func (c *Client) Decision(ctx context.Context, instanceID, decisionID string) (admin.RecentRefusal, error) {
	return send[admin.RecentRefusal](ctx, c, http.MethodGet, instancePath(instanceID, "decisions", url.PathEscape(decisionID)), nil, nil)
}
