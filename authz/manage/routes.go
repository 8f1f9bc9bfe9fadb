package manage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

type (
	noInput    struct{}
	atInstance struct {
		InstanceID string `path:"instanceId"`
	}
	atKey struct {
		InstanceID string `path:"instanceId"`
		KeyID      string `path:"keyId" format:"uuid"`
	}
	atToken struct {
		TokenID string `path:"tokenId" format:"uuid"`
	}
	// huma looks into no embedded struct whose name is not exported, so the paths are repeated.
	keyRevocation struct {
		InstanceID string `path:"instanceId"`
		KeyID      string `path:"keyId" format:"uuid"`
		Reason     string `query:"reason" enum:"keyCompromise,superseded,ownerLeft,unused,other"`
	}
	instanceDeletion struct {
		InstanceID string `path:"instanceId"`
		RevokeKeys yesNo  `query:"revokeKeys" doc:"true: also if the instance has usable keys."`
	}
)

// Parameters that are documented as what they are, but arrive as text: if huma read them, its errors
// would repeat them.
type (
	number      string // from 1
	wholeNumber string // from 0
	yesNo       string
)

func (number) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeInteger, Minimum: new(1.0)}
}

func (wholeNumber) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeInteger, Minimum: new(0.0)}
}

func (n wholeNumber) value(name string) (int64, error) {
	if n == "" {
		return 0, nil
	}
	v, err := strconv.ParseUint(string(n), 10, 63)
	if err != nil {
		return 0, apikey.Invalid(name, "must be a whole number from 0")
	}
	return int64(v), nil
}

func (yesNo) Schema(huma.Registry) *huma.Schema { return &huma.Schema{Type: huma.TypeBoolean} }

// An out is an answer with a body of type T.
type out[T any] struct {
	Status   int
	Location string `header:"Location"`
	Replayed string `header:"Idempotent-Replayed"` // "true", or absent
	ETag     string `header:"ETag"`                // of what is in versioned
	Body     T
}

func ok[T any](body T) *out[T] { return &out[T]{Status: http.StatusOK, Body: body} }

// sooner is 200, or 202 while a change is not everywhere.
func sooner(p admin.Propagation) int {
	if p.Everywhere {
		return http.StatusOK
	}
	return http.StatusAccepted
}

func (h *handler) routes(api huma.API) {
	const (
		instances = "/instances"
		instance  = instances + "/{instanceId}"
		keys      = instance + "/apiKeys"
		key       = keys + "/{keyId}"
		tokens    = "/tokens"
		token     = tokens + "/{tokenId}"
		peppers   = "/peppers"
		pepper    = peppers + "/{version}"
		inFlight  = instance + "/inFlight"
		lease     = inFlight + "/{leaseId}"
	)
	route(h, api, http.MethodGet, instance+"/auditEvents", "listAuditEvents", "List the audit events of an instance, newest first", nil, h.listEvents)
	route(h, api, http.MethodGet, "/auditEvents", "listAllAuditEvents", "List the audit events of all instances, newest first", nil, h.listAllEvents)
	route(h, api, http.MethodGet, "/audit/chain", "getAuditChain", "List the audit events of all instances in the order of their chain, to keep a copy", nil, h.auditChain)
	route(h, api, http.MethodGet, "/audit/head", "getAuditHead", "Get the end of the audit's chain, to keep it elsewhere", nil, h.auditHead)
	route(h, api, http.MethodGet, "/audit/verify", "verifyAudit", "Follow the audit's chain from its beginning, and report what is wrong with it", nil, h.auditVerify)
	route(h, api, http.MethodGet, instances, "listInstances", "List instances", nil, h.listInstances)
	route(h, api, http.MethodPut, instance, "putInstance", "Create an instance or replace its policy", InstanceInput{}, h.putInstance, 201, 202)
	route(h, api, http.MethodGet, instance, "getInstance", "Get an instance", nil, h.getInstance)
	route(h, api, http.MethodDelete, instance, "deleteInstance", "Delete an instance with its keys", nil, h.deleteInstance, 202)
	route(h, api, http.MethodGet, keys, "listKeys", "List the keys of an instance, by default newest first", nil, h.listKeys)
	route(h, api, http.MethodPost, keys, "createKey", "Create a key", admin.KeyInput{}, h.createKey)
	route(h, api, http.MethodGet, key, "getKey", "Get a key", nil, h.getKey)
	h.keyLife(api, instance, keys, key)
	route(h, api, http.MethodDelete, key, "revokeKey", "Revoke a key for good", nil, h.revokeKey, 202)
	h.transferRoutes(api, keys)
	h.quotaRoutes(api, instance)
	h.agentTokenRoutes(api, instance)
	h.explainRoutes(api, instance, keys, key)
	h.usageRoutes(api, instance, key)
	h.alertRoutes(api, instance)
	route(h, api, http.MethodGet, inFlight, "listInFlight", "List the requests that run now, the oldest first", nil, h.listInFlight)
	route(h, api, http.MethodDelete, lease, "endInFlight", "End a lease by force; the request itself goes on", nil, h.endInFlight)
	route(h, api, http.MethodGet, tokens, "listTokens", "List management tokens, newest first", nil, h.listTokens)
	route(h, api, http.MethodPost, tokens, "createToken", "Create a management token", admin.TokenInput{}, h.createToken)
	route(h, api, http.MethodDelete, token, "revokeToken", "Revoke a management token, at once", nil, h.revokeToken)
	route(h, api, http.MethodDelete, "/sessions", "endSessions", "End sessions of the portal, at once", nil, h.endSessions)
	route(h, api, http.MethodGet, peppers, "listPeppers", "List the peppers, and how many keys and tokens only each of them finds", nil, h.listPeppers)
	route(h, api, http.MethodDelete, pepper, "retirePepper", "Retire an earlier pepper that nothing needs any more", nil, h.retirePepper)
}

// route registers one operation. body is a value of the type that it reads, nil for none; also are the
// statuses that it may answer with besides its usual one.
//
// huma is told of the body only when it has set up the route, so that it documents it but does not read it.
func route[I, T any](h *handler, api huma.API, method, path, id, summary string, body any,
	do func(context.Context, *call, *I) (*out[T], error), also ...int) {
	schemas := api.OpenAPI().Components.Schemas
	usual := http.StatusOK
	if method == http.MethodPost && !actions[id] {
		usual = http.StatusCreated
	}
	op := huma.Operation{
		OperationID: id, Method: method, Path: path, Summary: summary, DefaultStatus: usual,
		SkipValidateParams: true, SkipValidateBody: true,
		Responses: map[string]*huma.Response{"default": {
			Description: "Error",
			Content:     map[string]*huma.MediaType{"application/json": {Schema: schemas.Schema(reflect.TypeFor[ErrorBody](), true, "")}},
		}},
	}
	version := versionParameter
	if platformOperations[id] {
		version = platformVersionParameter
		platformErrors(op.Responses["default"])
	}
	op.Parameters = append(op.Parameters, version)
	if onceOperations[id] {
		op.Parameters = append(op.Parameters, onceParameter)
	}
	if conditional[id] {
		op.Parameters = append(op.Parameters, ifMatchParameter)
	}
	if id == creating {
		op.Parameters = append(op.Parameters, ifNoneMatchParameter)
	}
	params := queryParams(reflect.TypeFor[I]())
	huma.Register(api, op, func(ctx context.Context, in *I) (*out[T], error) {
		c := ctx.Value(callKey{}).(*call)
		var answer *out[T]
		err := checkQuery(c.r.URL.RawQuery, params, version)
		if err == nil {
			err = refuseOnce(&op, c.r)
		}
		if err == nil {
			err = refuseIfNoneMatch(&op, c.r)
		}
		if err == nil {
			answer, err = do(ctx, c, in)
		}
		if err != nil {
			f := statusOf(err)
			h.logCause(c.r, c.RequestID, f)
			switch {
			case f.status == http.StatusUnauthorized: // it was good when the request began
				h.svc.Unauthenticated(c.RemoteAddr)
			case slices.Contains(refusals, f.status):
				h.svc.Refused(ctx, c.Caller, c.target(), f.ErrorBody.Error.Code)
			}
			if platformOperations[id] {
				return nil, platformError{f}
			}
			return nil, f
		}
		return answer, nil
	})
	item := api.OpenAPI().Paths[path]
	registered := map[string]*huma.Operation{
		http.MethodGet: item.Get, http.MethodPut: item.Put, http.MethodPost: item.Post, http.MethodPatch: item.Patch, http.MethodDelete: item.Delete,
	}[method]
	first := registered.Responses[strconv.Itoa(usual)]
	for _, status := range also {
		registered.Responses[strconv.Itoa(status)] = &huma.Response{Description: http.StatusText(status), Content: first.Content, Headers: first.Headers}
	}
	for status, response := range registered.Responses {
		sent := map[string]*huma.Param{}
		for name, header := range response.Headers {
			if name == "Location" && status == strconv.Itoa(http.StatusCreated) || name == "Idempotent-Replayed" && onceOperations[id] || name == "ETag" && versioned[id] {
				sent[name] = header
			}
		}
		response.Headers = sent
	}
	if body != nil {
		content := map[string]*huma.MediaType{"application/json": {Schema: schemas.Schema(reflect.TypeOf(body), true, "")}}
		if method == http.MethodPatch {
			content[mergePatch] = content["application/json"]
		}
		registered.RequestBody = &huma.RequestBody{Required: true, Content: content}
	}
}

// refusals are the statuses of what was understood and not done.
var refusals = []int{
	http.StatusForbidden, http.StatusNotFound, http.StatusConflict, http.StatusPreconditionFailed, http.StatusUnprocessableEntity, http.StatusTooManyRequests,
}

// target is the id of what a request is about, for the audit; "" where the path has none, or something
// else in its place, which may be a secret.
func (c *call) target() string {
	for _, name := range []string{"keyId", "tokenId", "alertId"} {
		if id, err := apikey.ParseID(c.r.PathValue(name)); err == nil {
			return id.String()
		}
	}
	return ""
}

// apiVersion is the one version of the API that there is. A client may name it, so that a later server
// that has others can tell what it means.
const apiVersion = "2026-11-01"

var versionParameter = &huma.Param{
	Name: "api-version", In: "query", Description: "The version of the API; absent: the newest.",
	Schema: &huma.Schema{Type: huma.TypeString, Enum: []any{apiVersion}},
}

// queryParams are the names of the query parameters of an input.
func queryParams(input reflect.Type) map[string]bool {
	names := map[string]bool{versionParameter.Name: true}
	for _, field := range reflect.VisibleFields(input) {
		if name := field.Tag.Get("query"); name != "" {
			names[name] = true
		}
	}
	return names
}

// checkQuery refuses what nobody would read.
func checkQuery(raw string, known map[string]bool, version *huma.Param) error {
	query, err := url.ParseQuery(raw)
	if err != nil {
		return apikey.Invalid("", "the query cannot be read")
	}
	for name, values := range query {
		switch {
		case !known[name] && fieldName.MatchString(name):
			return apikey.Invalid(name, "is not a known parameter")
		case !known[name]:
			return apikey.Invalid("", "the query has an unknown parameter")
		case len(values) > 1:
			return apikey.Invalid(name, "is given twice")
		case name == version.Name && !slices.Contains(version.Schema.Enum, any(values[0])):
			return apikey.Invalid(name, fmt.Sprintf("must be %s, or absent", version.Schema.Enum[0]))
		}
	}
	return nil
}

func (h *handler) listInstances(ctx context.Context, c *call, _ *noInput) (*out[list[Instance]], error) {
	all, err := h.svc.Instances(ctx, c.Caller)
	if err != nil {
		return nil, err
	}
	return ok(listOf(all, instanceOf)), nil
}

func instanceOf(in *apikey.Instance) Instance {
	return Instance{ID: in.ID, Policy: in.Policy, CreatedAt: in.CreatedAt.UTC()}
}

func (h *handler) getInstance(ctx context.Context, c *call, in *atInstance) (*out[Instance], error) {
	instance, err := h.svc.Instance(ctx, c.Caller, in.InstanceID)
	if err != nil {
		return nil, err
	}
	return &out[Instance]{Status: http.StatusOK, ETag: etag(instance.Revision), Body: instanceOf(instance)}, nil
}

func (h *handler) putInstance(ctx context.Context, c *call, in *atInstance) (*out[ChangedInstance], error) {
	var body InstanceInput
	if err := readBody(c.w, c.r, &body); err != nil {
		return nil, err
	}
	if body.Policy == nil {
		return nil, apikey.Invalid("policy", "is missing: it is replaced as a whole; {} is the default")
	}
	policy, err := body.Policy.Policy()
	if err != nil {
		return nil, err
	}
	seen, err := c.ifMatchOrAbsent()
	if err != nil {
		return nil, err
	}
	put, err := h.svc.PutInstanceIf(ctx, c.Caller, in.InstanceID, policy, seen)
	if seen == admin.IfAbsent && errors.Is(err, admin.ErrPrecondition) {
		return nil, errThere
	}
	if err != nil {
		return nil, err
	}
	answer := changedInstance(put)
	if put.Created {
		answer.Status, answer.Location = http.StatusCreated, "/instances/"+put.Instance.ID
	}
	return answer, nil
}

func changedInstance(put admin.PutResult) *out[ChangedInstance] {
	return &out[ChangedInstance]{
		Status: sooner(put.Propagation),
		ETag:   etag(put.Instance.Revision),
		Body:   ChangedInstance{instanceOf(put.Instance), effectOf(put.Propagation)},
	}
}

func (h *handler) deleteInstance(ctx context.Context, c *call, in *instanceDeletion) (*out[DeletedInstance], error) {
	if in.RevokeKeys != "" && in.RevokeKeys != "true" && in.RevokeKeys != "false" {
		return nil, apikey.Invalid("revokeKeys", "must be true or false")
	}
	p, err := h.svc.DeleteInstance(ctx, c.Caller, in.InstanceID, in.RevokeKeys == "true")
	if err != nil {
		return nil, err
	}
	id, err := apikey.CanonicalInstanceID(in.InstanceID)
	return &out[DeletedInstance]{Status: sooner(p), Body: DeletedInstance{id, effectOf(p)}}, err
}

const (
	usualPage = 100
	maxPage   = 1000
)

// nextLink is the request's own address with another cursor.
func nextLink(r *http.Request, cursor string) string { return nextLinkWith(r, "cursor", cursor) }

// nextLinkWith is the same with another value of a parameter.
func nextLinkWith(r *http.Request, name, value string) string {
	u := *r.URL
	if r.Host != "" {
		u.Scheme, u.Host = "http", r.Host
		if r.TLS != nil {
			u.Scheme = "https"
		}
	}
	query := u.Query()
	query.Set(name, value)
	u.RawQuery = query.Encode()
	return u.String()
}

func (h *handler) createKey(ctx context.Context, c *call, in *atInstance) (*out[createdKey], error) {
	var body admin.KeyInput
	if err := c.readOnce(&body); err != nil {
		return nil, err
	}
	made, err := h.svc.CreateKey(ctx, c.Caller, in.InstanceID, body)
	if err != nil {
		return nil, err
	}
	replayed := ""
	if made.Replayed {
		replayed = "true"
	}
	return &out[createdKey]{
		Status:   http.StatusCreated,
		Replayed: replayed,
		ETag:     etag(made.Key.Revision),
		Location: "/instances/" + made.Key.InstanceID + "/apiKeys/" + made.Key.ID.String(),
		Body:     createdKey{admin.RecordOf(made.Key, time.Now()), made.Secret.Reveal()},
	}, nil
}

func (h *handler) getKey(ctx context.Context, c *call, in *atKey) (*out[admin.KeyRecord], error) {
	k, err := h.svc.Key(ctx, c.Caller, in.InstanceID, keyID(in.KeyID))
	if err != nil {
		return nil, err
	}
	return &out[admin.KeyRecord]{Status: http.StatusOK, ETag: etag(k.Revision), Body: admin.RecordOf(k, time.Now())}, nil
}

func (h *handler) revokeKey(ctx context.Context, c *call, in *keyRevocation) (*out[RevokedKey], error) {
	done, err := h.svc.RevokeKey(ctx, c.Caller, in.InstanceID, keyID(in.KeyID), apikey.RevocationReason(in.Reason))
	if err != nil {
		return nil, err
	}
	return &out[RevokedKey]{
		Status: sooner(done.Propagation),
		Body:   RevokedKey{done.Key.ID, done.Key.RevokedAt.UTC(), effectOf(done.Propagation)},
	}, nil
}

// keyID reads an id from a path; what is not one becomes the id that nothing has, and goes the same way.
func keyID(s string) apikey.ID {
	id, err := apikey.ParseID(s)
	if err != nil {
		return apikey.ID{}
	}
	return id
}

func (h *handler) listTokens(ctx context.Context, c *call, _ *noInput) (*out[list[admin.TokenRecord]], error) {
	all, err := h.svc.Tokens(ctx, c.Caller)
	if err != nil {
		return nil, err
	}
	at := time.Now()
	return ok(listOf(all, func(t *admin.Token) admin.TokenRecord { return admin.TokenRecordOf(t, at) })), nil
}

func (h *handler) createToken(ctx context.Context, c *call, _ *noInput) (*out[createdToken], error) {
	var body admin.TokenInput
	if err := readBody(c.w, c.r, &body); err != nil {
		return nil, err
	}
	made, err := h.svc.CreateToken(ctx, c.Caller, body)
	if err != nil {
		return nil, err
	}
	return &out[createdToken]{
		Status:   http.StatusCreated,
		Location: "/tokens/" + made.Token.ID.String(),
		Body:     createdToken{admin.TokenRecordOf(made.Token, time.Now()), made.Secret.Reveal()},
	}, nil
}

func (h *handler) revokeToken(ctx context.Context, c *call, in *atToken) (*out[RevokedToken], error) {
	t, err := h.svc.RevokeToken(ctx, c.Caller, keyID(in.TokenID))
	if err != nil {
		return nil, err
	}
	return ok(RevokedToken{t.ID, t.RevokedAt.UTC()}), nil
}

func writeJSON(w io.Writer, v any) error { return json.NewEncoder(w).Encode(v) }
