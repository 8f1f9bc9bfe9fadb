package manage

import (
	"context"
	"net/http"
	"net/url"

	"github.com/danielgtaylor/huma/v2"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

type atQuota struct {
	InstanceID string `path:"instanceId"`
	Name       string `path:"name"`
}

// A ChangedQuota is the answer to a put.
type ChangedQuota struct {
	admin.QuotaRecord
	Effect
}

// A DeletedQuota is the answer to a deletion.
type DeletedQuota struct {
	Name string `json:"name"`
	Effect
}

// AppliedQuotas is the answer to a set of quotas.
type AppliedQuotas struct {
	DryRun  bool          `json:"dryRun,omitempty" doc:"true: nothing was changed."`
	Changes []QuotaChange `json:"changes" nullable:"false" doc:"By name. Quotas that stay as they are are not in it."`
	Effect

	ETag string `json:"-"` // of the quotas then, for [WithIfMatch]; in a dry run of those that are there
}

func (q *AppliedQuotas) version(etag string) { q.ETag = etag }

// A QuotaChange is what became of one quota, or in a dry run would.
type QuotaChange struct {
	Name   string             `json:"name"`
	Change QuotaVerb          `json:"change" enum:"create,update,delete"`
	Before *admin.QuotaRecord `json:"before,omitempty"`
	After  *admin.QuotaRecord `json:"after,omitempty"`
}

// A QuotaVerb says what is done to a quota.
type QuotaVerb string

// The verbs.
const (
	QuotaCreate QuotaVerb = "create"
	QuotaUpdate QuotaVerb = "update"
	QuotaDelete QuotaVerb = "delete"
)

func (h *handler) quotaRoutes(api huma.API, instance string) {
	quotas := instance + "/quotas"
	quota := quotas + "/{name}"
	route(h, api, http.MethodGet, quotas, "listQuotas", "List the quotas of an instance, by name", nil, h.listQuotas)
	route(h, api, http.MethodPost, quotas+":apply", "applyQuotas", "Create and replace quotas, all of a set or none, or tell what that would change", admin.QuotaSet{}, h.applyQuotas, 202)
	route(h, api, http.MethodGet, quota, "getQuota", "Get a quota", nil, h.getQuota)
	route(h, api, http.MethodPut, quota, "putQuota", "Create a quota or replace it; counts that run go on", admin.QuotaInput{}, h.putQuota, 201, 202)
	route(h, api, http.MethodDelete, quota, "deleteQuota", "Delete a quota; what keys have instead stays with them", nil, h.deleteQuota, 202)
}

func (h *handler) listQuotas(ctx context.Context, c *call, in *atInstance) (*out[list[admin.QuotaRecord]], error) {
	quotas, rev, err := h.svc.Quotas(ctx, c.Caller, in.InstanceID)
	if err != nil {
		return nil, err
	}
	answer := ok(listOf(quotas, func(q apikey.Quota) admin.QuotaRecord { return admin.QuotaRecordOf(&q) }))
	answer.ETag = etag(rev)
	return answer, nil
}

func (h *handler) getQuota(ctx context.Context, c *call, in *atQuota) (*out[admin.QuotaRecord], error) {
	q, rev, err := h.svc.Quota(ctx, c.Caller, in.InstanceID, in.Name)
	if err != nil {
		return nil, err
	}
	return &out[admin.QuotaRecord]{Status: http.StatusOK, ETag: etag(rev), Body: admin.QuotaRecordOf(&q)}, nil
}

func (h *handler) putQuota(ctx context.Context, c *call, in *atQuota) (*out[ChangedQuota], error) {
	var body admin.QuotaInput
	if err := readBody(c.w, c.r, &body); err != nil {
		return nil, err
	}
	seen, err := c.ifMatch()
	if err != nil {
		return nil, err
	}
	put, err := h.svc.PutQuota(ctx, c.Caller, in.InstanceID, in.Name, body, seen)
	if err != nil {
		return nil, err
	}
	q := put.Quota(in.Name)
	answer := &out[ChangedQuota]{
		Status: sooner(put.Propagation), ETag: etag(put.Revision),
		Body: ChangedQuota{admin.QuotaRecordOf(&q), effectOf(put.Propagation)},
	}
	if len(put.Changes) > 0 && put.Changes[0].Before == nil {
		answer.Status, answer.Location = http.StatusCreated, c.r.URL.EscapedPath()
	}
	return answer, nil
}

func (h *handler) deleteQuota(ctx context.Context, c *call, in *atQuota) (*out[DeletedQuota], error) {
	seen, err := c.ifMatch()
	if err != nil {
		return nil, err
	}
	gone, err := h.svc.DeleteQuota(ctx, c.Caller, in.InstanceID, in.Name, seen)
	if err != nil {
		return nil, err
	}
	return &out[DeletedQuota]{
		Status: sooner(gone.Propagation), ETag: etag(gone.Revision), Body: DeletedQuota{in.Name, effectOf(gone.Propagation)},
	}, nil
}

func (h *handler) applyQuotas(ctx context.Context, c *call, in *atInstance) (*out[AppliedQuotas], error) {
	var body admin.QuotaSet
	if err := readBody(c.w, c.r, &body); err != nil {
		return nil, err
	}
	if body.Quotas == nil {
		return nil, apikey.Invalid("quotas", "is missing")
	}
	seen, err := c.ifMatch()
	if err != nil {
		return nil, err
	}
	applied, err := h.svc.ApplyQuotas(ctx, c.Caller, in.InstanceID, body, seen)
	if err != nil {
		return nil, err
	}
	answer := ok(AppliedQuotas{
		DryRun: body.DryRun, Changes: listOf(applied.Changes, quotaChangeOf).Value, Effect: effectOf(applied.Propagation),
	})
	answer.ETag = etag(applied.Revision)
	if !body.DryRun {
		answer.Status = sooner(applied.Propagation)
	}
	return answer, nil
}

func quotaChangeOf(c admin.QuotaChange) QuotaChange {
	change := QuotaChange{Name: c.Name(), Change: QuotaUpdate}
	switch {
	case c.Before == nil:
		change.Change = QuotaCreate
	case c.After == nil:
		change.Change = QuotaDelete
	}
	for _, side := range []struct {
		from *apikey.Quota
		to   **admin.QuotaRecord
	}{{c.Before, &change.Before}, {c.After, &change.After}} {
		if side.from != nil {
			record := admin.QuotaRecordOf(side.from)
			*side.to = &record
		}
	}
	return change
}

// Quotas lists the quotas of an instance, by name.
func (c *Client) Quotas(ctx context.Context, instanceID string) ([]admin.QuotaRecord, error) {
	answer, err := send[list[admin.QuotaRecord]](ctx, c, http.MethodGet, instancePath(instanceID, "quotas"), nil, nil)
	return answer.Value, err
}

// Quota returns one quota.
func (c *Client) Quota(ctx context.Context, instanceID, name string) (admin.QuotaRecord, error) {
	return send[admin.QuotaRecord](ctx, c, http.MethodGet, quotaPath(instanceID, name), nil, nil)
}

// PutQuota creates a quota or replaces it.
func (c *Client) PutQuota(ctx context.Context, instanceID, name string, in admin.QuotaInput) (ChangedQuota, error) {
	return send[ChangedQuota](ctx, c, http.MethodPut, quotaPath(instanceID, name), nil, in)
}

// DeleteQuota deletes a quota.
func (c *Client) DeleteQuota(ctx context.Context, instanceID, name string) (DeletedQuota, error) {
	return send[DeletedQuota](ctx, c, http.MethodDelete, quotaPath(instanceID, name), nil, nil)
}

// ApplyQuotas creates and replaces quotas, all of a set or none, or with DryRun tells what that would change.
func (c *Client) ApplyQuotas(ctx context.Context, instanceID string, set admin.QuotaSet) (AppliedQuotas, error) {
	return send[AppliedQuotas](ctx, c, http.MethodPost, instancePath(instanceID, "quotas:apply"), nil, set)
}

func quotaPath(instanceID, name string) string {
	return instancePath(instanceID, "quotas", url.PathEscape(name))
}
