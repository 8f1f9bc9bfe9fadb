package manage

import (
	"context"
	"net/http"
	"reflect"
	"regexp"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

type (
	atGeneration struct {
		InstanceID string `path:"instanceId"`
		KeyID      string `path:"keyId" format:"uuid"`
		Number     number `path:"number"`
	}
	limitsOfKeys struct {
		InstanceID        string `path:"instanceId"`
		UserPrincipalName string `query:"userPrincipalName" doc:"Tell this user's keys too."`
		AgentName         string `query:"agentName" doc:"Tell this agent's keys too."`
	}
)

// A ChangedKey is the answer to what changes a key.
type ChangedKey struct {
	admin.KeyRecord
	Effect
}

// rotatedKey is the third answer that carries a secret.
type rotatedKey struct {
	Key    admin.KeyRecord `json:"key"`
	Secret string          `json:"secret" doc:"In this answer only: keep it now."`
	Effect
}

// RevokedKeys is the answer to a bulk revocation.
type RevokedKeys struct {
	Count        int               `json:"count" doc:"Keys that the filter means and that were not revoked before."`
	RecentlyUsed int               `json:"recentlyUsed" doc:"Of those: used within the last 7 days."`
	Revoked      int               `json:"revoked" doc:"0 with dryRun. Fewer than count where a key no longer passed the filter when its turn came."`
	Keys         []admin.KeyRecord `json:"keys" nullable:"false" doc:"The first 1000 of them, as they were before."`
	Effect
}

// actions are the operations by POST that change what is there: they answer 200.
var actions = map[string]bool{
	"rotateKey": true, "revokeGeneration": true, "revokeKeys": true, "disableInstance": true, "enableInstance": true,
	"applyQuotas": true, "putAgentAccessToken": true, "validateAgentAccessToken": true, "verifyKey": true,
	"ackAlert": true, "ackAnyAlert": true, "testAlerts": true,
}

// versioned are the operations that answer with a key, an instance or quotas and their ETag, conditional those
// that heed If-Match.
var (
	versioned = map[string]bool{
		"createKey": true, "getKey": true, "updateKey": true, "rotateKey": true, "revokeGeneration": true,
		"getInstance": true, "putInstance": true, "disableInstance": true, "enableInstance": true,
		"listQuotas": true, "getQuota": true, "putQuota": true, "deleteQuota": true, "applyQuotas": true,
	}
	conditional = map[string]bool{
		"updateKey": true, "rotateKey": true, "putInstance": true, "putQuota": true, "deleteQuota": true, "applyQuotas": true,
	}
)

const (
	ifMatchHeader     = "If-Match"
	ifNoneMatchHeader = "If-None-Match"
)

// creating is the one operation that heeds If-None-Match. Other PUTs refuse it: who sends it does not want to
// replace anything, and what is ignored would.
const creating = "putInstance"

var ifNoneMatchParameter = &huma.Param{
	Name: ifNoneMatchHeader, In: "header", Schema: &huma.Schema{Type: huma.TypeString, Enum: []any{"*"}},
	Description: "*: make the instance if there is none, and leave one that is there as it is: 412. Not together with If-Match.",
}

var ifMatchParameter = &huma.Param{
	Name: ifMatchHeader, In: "header", Schema: &huma.Schema{Type: huma.TypeString},
	Description: "The ETag of the key, the instance or the quotas as the caller saw it: 412 if it has changed since. Absent: whatever it is now; *: the same, if it is there.",
}

// keyLife registers the routes of what happens to a key after it was made.
func (h *handler) keyLife(api huma.API, instance, keys, key string) {
	schemas := api.OpenAPI().Components.Schemas
	alias[string](schemas)
	alias[bool](schemas)
	alias[int](schemas)
	alias[[]string](schemas)
	alias[apikey.ExpirationPolicy](schemas)
	objectAlias[map[string]*string](schemas)
	objectAlias[admin.LimitsPatch](schemas)
	objectAlias[admin.RatePatch](schemas)
	objectAlias[map[string]*apikey.QuotaOverride](schemas)

	route(h, api, http.MethodGet, keys+":limits", "getKeyLimits", "Get how many keys there may be, how many there are, and how fast they may be made", nil, h.keyLimits)
	route(h, api, http.MethodPost, keys+":revoke", "revokeKeys", "Revoke every key that a filter means, or tell which", admin.BulkRevocation{}, h.revokeKeys, 202)
	route(h, api, http.MethodPatch, key, "updateKey", "Change a key, disable or enable it", admin.KeyPatch{}, h.updateKey, 202)
	route(h, api, http.MethodPost, key+"/rotate", "rotateKey", "Give a key another secret", admin.RotateInput{}, h.rotateKey, 202)
	route(h, api, http.MethodPost, key+"/generations/{number}/revoke", "revokeGeneration", "End one secret of a key at once", nil, h.revokeGeneration, 202)
	route(h, api, http.MethodGet, key+"/advice", "getKeyAdvice", "Tell whether a key seems to be needed", nil, h.keyAdvice)
	route(h, api, http.MethodPost, instance+"/disable", "disableInstance", "Refuse every key of an instance, at once", nil, h.switchInstance(true), 202)
	route(h, api, http.MethodPost, instance+"/enable", "enableInstance", "No longer refuse every key of an instance", nil, h.switchInstance(false), 202)
}

// alias documents a member of a merge patch as its value, which may be null.
func alias[T any](schemas huma.Registry) {
	schemas.RegisterTypeAlias(reflect.TypeFor[admin.Member[T]](), reflect.TypeFor[*T]())
}

// objectAlias does the same for an object, of which huma does not say that it may be null.
func objectAlias[T any](schemas huma.Registry) {
	schemas.RegisterTypeAlias(reflect.TypeFor[admin.Member[T]](), reflect.TypeFor[orNull[T]]())
}

type orNull[T any] struct{}

func (orNull[T]) Schema(r huma.Registry) *huma.Schema {
	return &huma.Schema{AnyOf: []*huma.Schema{r.Schema(reflect.TypeFor[T](), true, ""), {Type: "null"}}}
}

// etag is the version of a key, an instance or its quotas: what was decided of it, not when it was last used.
func etag(r apikey.Revision) string { return `"` + strconv.FormatInt(int64(r), 10) + `"` }

var (
	oneTag = regexp.MustCompile(`^(W/)?"[!#-~]*"$`)
	ours   = regexp.MustCompile(`^"([1-9][0-9]{0,17})"$`)
)

// ifMatch returns the revision that the caller saw, 0 or [admin.IfThere] for whatever it is now. A tag that
// nothing can have is that of another version.
func (c *call) ifMatch() (apikey.Revision, error) {
	sent := c.r.Header.Values(ifMatchHeader)
	switch {
	case len(sent) == 0:
		return 0, nil
	case len(sent) == 1 && sent[0] == "*":
		return admin.IfThere, nil
	case len(sent) > 1 || !oneTag.MatchString(sent[0]):
		return 0, apikey.Invalid(ifMatchHeader, "must be one ETag, with its quotes, or *")
	}
	tag := ours.FindStringSubmatch(sent[0])
	if tag == nil {
		return 0, admin.ErrPrecondition
	}
	n, err := strconv.ParseInt(tag[1], 10, 64)
	return apikey.Revision(n), err
}

// ifMatchOrAbsent is ifMatch where a thing may be made too: [admin.IfAbsent] is what the caller wants to be new.
func (c *call) ifMatchOrAbsent() (apikey.Revision, error) {
	sent := c.r.Header.Values(ifNoneMatchHeader)
	switch {
	case len(sent) == 0:
		return c.ifMatch()
	case len(sent) > 1 || sent[0] != "*":
		return 0, apikey.Invalid(ifNoneMatchHeader, "must be *")
	case len(c.r.Header.Values(ifMatchHeader)) > 0:
		return 0, apikey.Invalid(ifNoneMatchHeader, "does not go with If-Match: nothing is both there and not")
	}
	return admin.IfAbsent, nil
}

// refuseIfNoneMatch refuses the header where it would be ignored and something replaced.
func refuseIfNoneMatch(op *huma.Operation, r *http.Request) error {
	if op.Method == http.MethodPut && op.OperationID != creating && len(r.Header.Values(ifNoneMatchHeader)) > 0 {
		return apikey.Invalid(ifNoneMatchHeader, "is not supported here")
	}
	return nil
}

func (h *handler) keyLimits(ctx context.Context, c *call, in *limitsOfKeys) (*out[admin.KeyLimits], error) {
	var owner admin.KeyOwner
	switch {
	case in.UserPrincipalName != "" && in.AgentName != "":
		return nil, apikey.Invalid("agentName", "does not go with userPrincipalName: ask about one of them")
	case in.UserPrincipalName != "":
		owner = admin.KeyOwner{Type: apikey.TypeUser, Name: in.UserPrincipalName}
	case in.AgentName != "":
		owner = admin.KeyOwner{Type: apikey.TypeAgent, Name: in.AgentName}
	}
	limits, err := h.svc.KeyLimits(ctx, c.Caller, in.InstanceID, owner)
	if err != nil {
		return nil, err
	}
	return ok(limits), nil
}

func (h *handler) updateKey(ctx context.Context, c *call, in *atKey) (*out[ChangedKey], error) {
	var patch admin.KeyPatch
	if err := readBody(c.w, c.r, &patch); err != nil {
		return nil, err
	}
	seen, err := c.ifMatch()
	if err != nil {
		return nil, err
	}
	changed, err := h.svc.UpdateKey(ctx, c.Caller, in.InstanceID, keyID(in.KeyID), patch, seen)
	if err != nil {
		return nil, err
	}
	return changedKey(changed), nil
}

func changedKey(change admin.KeyChange) *out[ChangedKey] {
	return &out[ChangedKey]{
		Status: sooner(change.Propagation),
		ETag:   etag(change.Key.Revision),
		Body:   ChangedKey{admin.RecordOf(change.Key, time.Now()), effectOf(change.Propagation)},
	}
}

func (h *handler) rotateKey(ctx context.Context, c *call, in *atKey) (*out[rotatedKey], error) {
	var body admin.RotateInput
	if err := c.readOnce(&body); err != nil {
		return nil, err
	}
	seen, err := c.ifMatch()
	if err != nil {
		return nil, err
	}
	made, err := h.svc.RotateKey(ctx, c.Caller, in.InstanceID, keyID(in.KeyID), body, seen)
	if err != nil {
		return nil, err
	}
	answer := &out[rotatedKey]{
		Status: sooner(made.Propagation),
		ETag:   etag(made.Key.Revision),
		Body:   rotatedKey{admin.RecordOf(made.Key, time.Now()), made.Secret.Reveal(), effectOf(made.Propagation)},
	}
	if made.Replayed {
		answer.Replayed = "true"
	}
	return answer, nil
}

func (h *handler) revokeGeneration(ctx context.Context, c *call, in *atGeneration) (*out[ChangedKey], error) {
	n, _ := strconv.ParseUint(string(in.Number), 10, 31) // what is no number is one that nothing has
	changed, err := h.svc.RevokeGeneration(ctx, c.Caller, in.InstanceID, keyID(in.KeyID), int(n))
	if err != nil {
		return nil, err
	}
	return changedKey(changed), nil
}

func (h *handler) revokeKeys(ctx context.Context, c *call, in *atInstance) (*out[RevokedKeys], error) {
	var body admin.BulkRevocation
	if err := readBody(c.w, c.r, &body); err != nil {
		return nil, err
	}
	defer c.unhurried()()
	done, err := h.svc.RevokeKeys(ctx, c.Caller, in.InstanceID, body)
	if err != nil {
		return nil, err
	}
	at := time.Now()
	answer := ok(RevokedKeys{
		Count: done.Count, RecentlyUsed: done.RecentlyUsed, Revoked: done.Revoked,
		Keys:   listOf(done.Keys, func(k *apikey.Key) admin.KeyRecord { return admin.RecordOf(k, at) }).Value,
		Effect: effectOf(done.Propagation),
	})
	if done.Propagation != (admin.Propagation{}) { // it did revoke, or had done
		answer.Status = sooner(done.Propagation)
	}
	return answer, nil
}

func (h *handler) keyAdvice(ctx context.Context, c *call, in *atKey) (*out[admin.Advice], error) {
	advice, err := h.svc.KeyAdvice(ctx, c.Caller, in.InstanceID, keyID(in.KeyID))
	if err != nil {
		return nil, err
	}
	return ok(advice), nil
}

// switchInstance is the kill switch: one change, however many keys there are.
func (h *handler) switchInstance(disabled bool) func(context.Context, *call, *atInstance) (*out[ChangedInstance], error) {
	return func(ctx context.Context, c *call, in *atInstance) (*out[ChangedInstance], error) {
		put, err := h.svc.SwitchInstance(ctx, c.Caller, in.InstanceID, disabled)
		if err != nil {
			return nil, err
		}
		return changedInstance(put), nil
	}
}
