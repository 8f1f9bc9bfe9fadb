package manage

import (
	"context"
	"net/http"
	"net/url"
	"strconv"

	"keyward/authz/admin"
)

// EndedSessions is the answer to the end of sessions of the portal.
type EndedSessions struct {
	Ended int `json:"ended" doc:"How many there were."`
}

type sessionsEnd struct {
	Actor string `query:"actor" doc:"Who signed in by OIDC, as in the audit: oidc:, the issuer, # (%23 in an address) and the subject."`
	All   yesNo  `query:"all" doc:"true: everybody, however they signed in. Either this or actor."`
}

func (h *handler) endSessions(ctx context.Context, c *call, in *sessionsEnd) (*out[EndedSessions], error) {
	all, err := in.All.value("all")
	if err != nil {
		return nil, err
	}
	ended, err := h.svc.EndSessions(ctx, c.Caller, admin.WhoseSessions{Actor: in.Actor, All: all})
	if err != nil {
		return nil, err
	}
	return ok(EndedSessions{ended}), nil
}

// EndSessions ends sessions of the portal.
func (c *Client) EndSessions(ctx context.Context, whose admin.WhoseSessions) (EndedSessions, error) {
	query := url.Values{}
	if whose.Actor != "" {
		query.Set("actor", whose.Actor)
	}
	if whose.All {
		query.Set("all", strconv.FormatBool(true))
	}
	return send[EndedSessions](ctx, c, http.MethodDelete, "/sessions", query, nil)
}
