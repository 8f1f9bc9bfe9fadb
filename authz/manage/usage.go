package manage

import (
	"context"
	"net/http"
	"net/url"
	"reflect"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// UsageTimes are the parameters of a time. huma looks into an embedded struct only if its name is exported.
type UsageTimes struct {
	From     string `query:"from" doc:"RFC 3339 with a zone, a date, which means its beginning in UTC, or a duration back from now such as 7d. By default 24h before to."`
	To       string `query:"to" doc:"Written as from; a date means its end. By default, and at most, now."`
	Interval string `query:"interval" enum:"minute,hour,day" doc:"By default minute up to 3 hours of the last day, hour up to 7 days of the last 30, else day. At most 2000 are listed at once."`
}

func (in *UsageTimes) query() (admin.UsageQuery, error) {
	return admin.UsageInput{From: in.From, To: in.To, Interval: admin.UsageInterval(in.Interval)}.Query(time.Now())
}

type (
	usageOfKey struct {
		InstanceID string `path:"instanceId"`
		KeyID      string `path:"keyId" format:"uuid"`
		UsageTimes
	}
	usageOfInstance struct {
		InstanceID string `path:"instanceId"`
		UsageTimes
	}
	usageTop struct {
		InstanceID string `path:"instanceId"`
		From       string `query:"from" doc:"RFC 3339 with a zone, a date, which means its beginning in UTC, or a duration back from now such as 7d. By default 24h before to."`
		To         string `query:"to" doc:"Written as from; a date means its end. By default, and at most, now."`
		By         string `query:"by" enum:"requests,refused" doc:"By default requests: allowed and refused."`
		Limit      number `query:"limit" doc:"From 1 to 1000. By default 10."`
	}
)

// usualTop is how many keys are listed where nobody says.
const usualTop = 10

// TopUsage is the keys that did the most.
type TopUsage struct {
	From  time.Time        `json:"from"`
	To    time.Time        `json:"to" doc:"Exclusive."`
	By    admin.UsageOrder `json:"by" enum:"requests,refused"`
	Value []admin.UsedKey  `json:"value" nullable:"false" doc:"Those with the most first. Keys that were not used are not in it."`
}

// responseSums documents what stands everywhere as null where Envoy does not tell.
type responseSums admin.ResponseSums

func (h *handler) usageRoutes(api huma.API, instance, key string) {
	api.OpenAPI().Components.Schemas.RegisterTypeAlias(reflect.TypeFor[admin.ResponseSums](), reflect.TypeFor[orNull[responseSums]]())
	route(h, api, http.MethodGet, key+"/usage", "getKeyUsage", "Get how many requests a key made, and what became of them", nil, h.keyUsage)
	route(h, api, http.MethodGet, instance+"/usage", "getInstanceUsage", "Get how many requests an instance had in all, those without a key too", nil, h.instanceUsage)
	route(h, api, http.MethodGet, instance+"/usage/top", "getTopUsage", "List the keys of an instance that were used, or refused, the most", nil, h.topUsage)
	route(h, api, http.MethodGet, "/usage", "getUsage", "Get how many requests there were of which no instance is known", nil, h.usageOfNone)
}

func (h *handler) keyUsage(ctx context.Context, c *call, in *usageOfKey) (*out[admin.UsageRecord], error) {
	return usageBy(in.UsageTimes, func(q admin.UsageQuery) ([]admin.Usage, error) {
		return h.svc.KeyUsage(ctx, c.Caller, in.InstanceID, keyID(in.KeyID), q)
	})
}

func (h *handler) instanceUsage(ctx context.Context, c *call, in *usageOfInstance) (*out[admin.UsageRecord], error) {
	return usageBy(in.UsageTimes, func(q admin.UsageQuery) ([]admin.Usage, error) {
		return h.svc.InstanceUsage(ctx, c.Caller, in.InstanceID, q)
	})
}

func (h *handler) usageOfNone(ctx context.Context, c *call, in *UsageTimes) (*out[admin.UsageRecord], error) {
	return usageBy(*in, func(q admin.UsageQuery) ([]admin.Usage, error) { return h.svc.UsageOfNoInstance(ctx, c.Caller, q) })
}

func usageBy(in UsageTimes, list func(admin.UsageQuery) ([]admin.Usage, error)) (*out[admin.UsageRecord], error) {
	q, err := in.query()
	if err != nil {
		return nil, err
	}
	counted, err := list(q)
	if err != nil {
		return nil, err
	}
	return ok(admin.UsageRecordOf(q, counted)), nil
}

func (h *handler) topUsage(ctx context.Context, c *call, in *usageTop) (*out[TopUsage], error) {
	times := UsageTimes{From: in.From, To: in.To}
	q, err := times.query()
	if err != nil {
		return nil, err
	}
	top := admin.UsageTop{Interval: q.Interval, From: q.From, To: q.To, By: admin.UsageOrder(in.By), Limit: usualTop}
	if in.By == "" {
		top.By = admin.ByRequests
	}
	if in.Limit != "" {
		if top.Limit, err = strconv.Atoi(string(in.Limit)); err != nil {
			return nil, apikey.Invalid("limit", "must be from 1 to 1000")
		}
	}
	keys, err := h.svc.UsedKeys(ctx, c.Caller, in.InstanceID, top)
	if err != nil {
		return nil, err
	}
	return ok(TopUsage{From: q.From, To: q.To, By: top.By, Value: keys}), nil
}

// KeyUsage returns how many requests a key made.
func (c *Client) KeyUsage(ctx context.Context, instanceID string, id apikey.ID, in admin.UsageInput) (admin.UsageRecord, error) {
	return send[admin.UsageRecord](ctx, c, http.MethodGet, keyPath(instanceID, id, "usage"), usageParams(in), nil)
}

// InstanceUsage returns how many requests an instance had in all.
func (c *Client) InstanceUsage(ctx context.Context, instanceID string, in admin.UsageInput) (admin.UsageRecord, error) {
	return send[admin.UsageRecord](ctx, c, http.MethodGet, instancePath(instanceID, "usage"), usageParams(in), nil)
}

// UsageOfNoInstance returns how many requests there were of which no instance is known.
func (c *Client) UsageOfNoInstance(ctx context.Context, in admin.UsageInput) (admin.UsageRecord, error) {
	return send[admin.UsageRecord](ctx, c, http.MethodGet, "/usage", usageParams(in), nil)
}

// TopUsage lists the keys of an instance that did the most. by "" is by requests, limit 0 is 10. The interval
// says nothing here.
func (c *Client) TopUsage(ctx context.Context, instanceID string, in admin.UsageInput, by admin.UsageOrder, limit int) (TopUsage, error) {
	in.Interval = ""
	query := usageParams(in)
	if by != "" {
		query.Set("by", string(by))
	}
	if limit != 0 {
		query.Set("limit", strconv.Itoa(limit))
	}
	return send[TopUsage](ctx, c, http.MethodGet, instancePath(instanceID, "usage", "top"), query, nil)
}

func usageParams(in admin.UsageInput) url.Values {
	query := url.Values{}
	for name, value := range map[string]string{"from": in.From, "to": in.To, "interval": string(in.Interval)} {
		if value != "" {
			query.Set(name, value)
		}
	}
	return query
}
