package manage

import (
	"context"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"

	"github.com/danielgtaylor/huma/v2"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

type (
	alertList struct {
		InstanceID  string `path:"instanceId"`
		Open        yesNo  `query:"open" doc:"true: only those that are open."`
		Kind        string `query:"kind" enum:"newNetwork,refusals,unknownKeys,expiring,unused"`
		KeyID       string `query:"keyId" format:"uuid" doc:"Those about this key."`
		MaxPageSize number `query:"maxpagesize" doc:"Alerts on a page; more than 1000 counts as 1000. By default 100."`
		Cursor      string `query:"cursor" doc:"From nextLink. It holds for the same filter only."`
	}
	// The same without an instance: huma would document one that is not in the path.
	allAlertList struct {
		Open        yesNo  `query:"open" doc:"true: only those that are open."`
		Kind        string `query:"kind" enum:"newNetwork,refusals,unknownKeys,expiring,unused"`
		KeyID       string `query:"keyId" format:"uuid" doc:"Those about this key."`
		MaxPageSize number `query:"maxpagesize" doc:"Alerts on a page; more than 1000 counts as 1000. By default 100."`
		Cursor      string `query:"cursor" doc:"From nextLink. It holds for the same filter only."`
	}
	atAlert struct {
		InstanceID string `path:"instanceId"`
		AlertID    string `path:"alertId" format:"uuid"`
	}
	atAnyAlert struct {
		AlertID string `path:"alertId" format:"uuid"`
	}
)

func (h *handler) alertRoutes(api huma.API, instance string) {
	const (
		all   = "/alerts"
		alert = "/{alertId}"
		ack   = alert + "/ack"
	)
	in := instance + all
	route(h, api, http.MethodGet, in, "listAlerts", "List the alerts of an instance, those opened last first", nil, h.listAlerts)
	route(h, api, http.MethodGet, in+alert, "getAlert", "Get an alert", nil, h.getAlert)
	route(h, api, http.MethodPost, in+ack, "ackAlert", "Say that an alert is known; a new network is resolved by that", nil, h.ackAlert)
	route(h, api, http.MethodGet, all, "listAllAlerts", "List the alerts of all instances and of none, those opened last first", nil, h.listAllAlerts)
	route(h, api, http.MethodGet, all+alert, "getAnyAlert", "Get an alert of any instance or of none", nil, h.getAnyAlert)
	route(h, api, http.MethodPost, all+ack, "ackAnyAlert", "Say that an alert of any instance or of none is known", nil, h.ackAnyAlert)
	route(h, api, http.MethodPost, all+":test", "testAlerts", "Send a test notice to the webhook, once, and tell what became of it", nil, h.testAlerts)
}

func (h *handler) listAlerts(ctx context.Context, c *call, in *alertList) (*out[list[admin.AlertRecord]], error) {
	// The cursor holds for the instance, however its id is spelled.
	id, err := apikey.CanonicalInstanceID(in.InstanceID)
	if err != nil {
		return nil, apikey.ErrNotFound
	}
	in.InstanceID = id
	return h.alerts(ctx, c, in)
}

func (h *handler) listAllAlerts(ctx context.Context, c *call, in *allAlertList) (*out[list[admin.AlertRecord]], error) {
	return h.alerts(ctx, c, &alertList{Open: in.Open, Kind: in.Kind, KeyID: in.KeyID, MaxPageSize: in.MaxPageSize, Cursor: in.Cursor})
}

func (h *handler) alerts(ctx context.Context, c *call, in *alertList) (*out[list[admin.AlertRecord]], error) {
	size, err := pageSizeOf(in.MaxPageSize)
	if err != nil {
		return nil, err
	}
	query := admin.AlertQuery{Kind: admin.AlertKind(in.Kind), Limit: size + 1} // one more tells whether this is the last page
	if query.Open, err = in.Open.value("open"); err != nil {
		return nil, err
	}
	if in.KeyID != "" {
		if query.KeyID, err = apikey.ParseID(in.KeyID); err != nil || query.KeyID == (apikey.ID{}) {
			return nil, apikey.Invalid("keyId", "must be the id of a key")
		}
	}
	of := fmt.Sprintf("alerts of %q %q %v %v", in.InstanceID, query.Kind, query.KeyID, query.Open)
	if c.r.URL.Query().Has("cursor") {
		place, err := h.cursors.decode(of, in.Cursor)
		if err != nil {
			return nil, err
		}
		query.After = admin.AlertPlace{OpenedAt: place.At, ID: place.ID}
	}
	alerts, err := h.svc.Alerts(ctx, c.Caller, in.InstanceID, query)
	if err != nil {
		return nil, err
	}
	next := ""
	if len(alerts) > size {
		alerts = alerts[:size]
		last := alerts[size-1]
		next = nextLink(c.r, h.cursors.Seal(of, admin.KeyPlace{At: last.OpenedAt, ID: last.ID}))
	}
	page := listOf(alerts, admin.AlertRecordOf)
	page.NextLink = next
	return ok(page), nil
}

func (h *handler) getAlert(ctx context.Context, c *call, in *atAlert) (*out[admin.AlertRecord], error) {
	if _, err := apikey.CanonicalInstanceID(in.InstanceID); err != nil {
		return nil, apikey.ErrNotFound
	}
	return recordOf(h.svc.Alert(ctx, c.Caller, in.InstanceID, keyID(in.AlertID)))
}

func (h *handler) ackAlert(ctx context.Context, c *call, in *atAlert) (*out[admin.AlertRecord], error) {
	if _, err := apikey.CanonicalInstanceID(in.InstanceID); err != nil {
		return nil, apikey.ErrNotFound
	}
	return recordOf(h.svc.AckAlert(ctx, c.Caller, in.InstanceID, keyID(in.AlertID)))
}

func (h *handler) getAnyAlert(ctx context.Context, c *call, in *atAnyAlert) (*out[admin.AlertRecord], error) {
	return recordOf(h.svc.Alert(ctx, c.Caller, "", keyID(in.AlertID)))
}

func (h *handler) ackAnyAlert(ctx context.Context, c *call, in *atAnyAlert) (*out[admin.AlertRecord], error) {
	return recordOf(h.svc.AckAlert(ctx, c.Caller, "", keyID(in.AlertID)))
}

func recordOf(a *admin.Alert, err error) (*out[admin.AlertRecord], error) {
	if err != nil {
		return nil, err
	}
	return ok(admin.AlertRecordOf(a)), nil
}

func (h *handler) testAlerts(ctx context.Context, c *call, _ *noInput) (*out[admin.WebhookAnswer], error) {
	answer, err := h.svc.TestWebhook(ctx, c.Caller)
	if err != nil {
		return nil, err
	}
	return ok(answer), nil
}

// Alerts lists alerts of an instance, those opened last first, page by page as they are asked for; with
// instanceID "" those of all instances and of none. Of the query Kind, KeyID and Open count. An error ends it.
func (c *Client) Alerts(ctx context.Context, instanceID string, q admin.AlertQuery) iter.Seq2[admin.AlertRecord, error] {
	query := url.Values{"maxpagesize": {strconv.Itoa(pageSize)}}
	if q.Kind != "" {
		query.Set("kind", string(q.Kind))
	}
	if q.KeyID != (apikey.ID{}) {
		query.Set("keyId", q.KeyID.String())
	}
	if q.Open {
		query.Set("open", "true")
	}
	return func(yield func(admin.AlertRecord, error) bool) {
		for {
			page, err := send[list[admin.AlertRecord]](ctx, c, http.MethodGet, alertsPath(instanceID), query, nil)
			if err != nil {
				yield(admin.AlertRecord{}, err)
				return
			}
			for _, a := range page.Value {
				if !yield(a, nil) {
					return
				}
			}
			if page.NextLink == "" {
				return
			}
			// Only the place is taken from the link: the token goes to no other server.
			next, err := url.Parse(page.NextLink)
			if err != nil || next.Query().Get("cursor") == "" {
				yield(admin.AlertRecord{}, fmt.Errorf("list alerts: the server's nextLink has no cursor"))
				return
			}
			query.Set("cursor", next.Query().Get("cursor"))
		}
	}
}

// Alert returns one alert of an instance, with instanceID "" any one.
func (c *Client) Alert(ctx context.Context, instanceID string, id apikey.ID) (admin.AlertRecord, error) {
	return send[admin.AlertRecord](ctx, c, http.MethodGet, alertsPath(instanceID)+"/"+id.String(), nil, nil)
}

// AckAlert says that an alert is known. It may be repeated.
func (c *Client) AckAlert(ctx context.Context, instanceID string, id apikey.ID) (admin.AlertRecord, error) {
	return send[admin.AlertRecord](ctx, c, http.MethodPost, alertsPath(instanceID)+"/"+id.String()+"/ack", nil, nil)
}

// TestAlerts has the server send a test notice to its webhook, and returns what became of it.
func (c *Client) TestAlerts(ctx context.Context) (admin.WebhookAnswer, error) {
	return send[admin.WebhookAnswer](ctx, c, http.MethodPost, "/alerts:test", nil, nil)
}

func alertsPath(instanceID string) string {
	if instanceID == "" {
		return "/alerts"
	}
	return instancePath(instanceID, "alerts")
}
