package manage

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// An InFlight is a running request as JSON.
type InFlight struct {
	LeaseID     string    `json:"leaseId"`
	KeyID       apikey.ID `json:"keyId"`
	Method      string    `json:"method,omitempty" doc:"Absent for a method of no standard."`
	Path        string    `json:"path,omitempty" doc:"Host and path pattern of the route it matched; absent where none did."`
	Node        string    `json:"node,omitempty" doc:"The Envoy it runs at; absent while that has not said its name."`
	Connection  uint64    `json:"connection,omitempty" doc:"By which Envoy asked, as a number of the replica's own."`
	Replica     string    `json:"replica"`
	Adopted     bool      `json:"adopted,omitempty" doc:"Granted before the replica started."`
	StartedAt   time.Time `json:"startedAt"`
	AgeSeconds  float64   `json:"ageSeconds"`
	CountsUntil time.Time `json:"countsUntil" doc:"Unless Envoy says that it still runs."`
}

// An EndedInFlight is the answer to the forced end of a lease.
type EndedInFlight struct {
	LeaseID string `json:"leaseId"`
}

type atLease struct {
	InstanceID string `path:"instanceId"`
	LeaseID    string `path:"leaseId"`
}

func (h *handler) listInFlight(ctx context.Context, c *call, in *atInstance) (*out[list[InFlight]], error) {
	all, err := h.svc.InFlight(ctx, c.Caller, in.InstanceID)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return ok(listOf(all, func(r admin.RunningRequest) InFlight {
		return InFlight{
			LeaseID: r.ID, KeyID: r.KeyID, Method: r.Method, Path: r.Path, Node: r.Node, Connection: r.Connection,
			Replica: r.Replica, Adopted: r.Adopted, StartedAt: r.Started.UTC(), AgeSeconds: now.Sub(r.Started).Seconds(), CountsUntil: r.Until.UTC(),
		}
	})), nil
}

func (h *handler) endInFlight(ctx context.Context, c *call, in *atLease) (*out[EndedInFlight], error) {
	if err := h.svc.EndInFlight(ctx, c.Caller, in.InstanceID, in.LeaseID); err != nil {
		return nil, err
	}
	return ok(EndedInFlight{in.LeaseID}), nil
}

// InFlight lists the requests of an instance that run now, the oldest first.
func (c *Client) InFlight(ctx context.Context, instanceID string) ([]InFlight, error) {
	answer, err := send[list[InFlight]](ctx, c, http.MethodGet, instancePath(instanceID, "inFlight"), nil, nil)
	return answer.Value, err
}

// EndInFlight ends the lease of a request by force. The request itself goes on.
func (c *Client) EndInFlight(ctx context.Context, instanceID, leaseID string) error {
	_, err := send[EndedInFlight](ctx, c, http.MethodDelete, instancePath(instanceID, "inFlight", url.PathEscape(leaseID)), nil, nil)
	return err
}
