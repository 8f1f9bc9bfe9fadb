package checktest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/envoy/check"
	"keyward/limits"
)

// answers writes CheckResponses.
type answers struct {
	identity      check.Identity
	remove        []string // of every allowed request
	realm         string
	errorResponse bool
	deprecation   bool
	legacy        bool
	leases        *authz.LeaseIDs
}

func newAnswers(cfg check.Config) (answers, error) {
	identity, err := cfg.Identity.Resolve()
	if err != nil {
		return answers{}, err
	}
	if cfg.Realm == "" {
		cfg.Realm = check.DefaultRealm
	}
	return answers{identity: identity, remove: identity.Names(), realm: cfg.Realm, errorResponse: cfg.ErrorResponse, deprecation: cfg.Deprecation, legacy: cfg.LegacyRateLimit, leases: cfg.Leases}, nil
}

// allow lets a request through: who is calling is set, everything that could be mistaken for it and
// every secret of ours is removed.
func (a *answers) allow(d *authz.Decision) *authv3.CheckResponse {
	ok := &authv3.OkHttpResponse{}
	set := map[string]bool{}
	type named struct{ name, value string }
	var identity []named
	if k := d.Key; k != nil {
		identity = []named{
			{a.identity.KeyID, k.ID.String()},
			{a.identity.KeyType, string(k.Type)},
			{a.identity.InstanceID, k.InstanceID},
			{a.identity.Agent, k.AgentName},
			{a.identity.User, k.UserPrincipalName},
			{a.identity.Scopes, string(d.AppendScopes(nil))},
			{a.identity.DecisionID, d.ID.String()},
		}
	} else if d.HasIdentity() {
		identity = []named{{a.identity.User, string(d.AppendUser(nil))}, {a.identity.DecisionID, d.ID.String()}}
	}
	if d.HasIdentity() {
		identity = append(identity, named{a.identity.UserIdentity, userIdentity(d)})
	}
	for _, h := range identity {
		// An empty value would overwrite with an empty header: remove instead. Creation refuses values
		// that are not visible ASCII; what an import slipped through is not handed on.
		if h.name != check.Off && h.value != "" && isVisible(h.value) {
			ok.Headers = append(ok.Headers, header(h.name, h.value))
			set[h.name] = true
		}
	}
	for _, name := range a.remove {
		if !set[name] {
			ok.HeadersToRemove = append(ok.HeadersToRemove, name)
		}
	}
	ok.HeadersToRemove = append(ok.HeadersToRemove, d.CredentialHeaders...)
	if d.InAuthorization {
		ok.HeadersToRemove = append(ok.HeadersToRemove, "authorization")
	}
	// Only when it is there: Envoy re-orders the query whenever this is sent.
	if d.InQuery {
		ok.QueryParametersToRemove = []string{d.CredentialQuery}
	}
	ok.ResponseHeadersToAdd = append(ok.ResponseHeadersToAdd, a.deprecated(d)...)
	if len(d.Standings) > 0 {
		var policies, states []string
		least := d.Standings[0]
		for _, s := range d.Standings {
			name := limitName(s.Class, s.Quota)
			policies = append(policies, policy(name, s.Class, s.Quota, s.QuotaLimit, s.Rate, s.Limit))
			states = append(states, fmt.Sprintf("%q;r=%d;t=%.0f", name, s.Remaining, math.Ceil(s.ResetsIn.Seconds())))
			if s.Remaining < least.Remaining {
				least = s
			}
		}
		ok.ResponseHeadersToAdd = append(ok.ResponseHeadersToAdd,
			header("ratelimit-policy", strings.Join(policies, ", ")), header("ratelimit", strings.Join(states, ", ")))
		if a.legacy {
			ok.ResponseHeadersToAdd = append(ok.ResponseHeadersToAdd, legacy(least.Limit, least.Remaining, int64(math.Ceil(least.ResetsIn.Seconds())))...)
		}
	}
	return &authv3.CheckResponse{
		Status:          &status.Status{Code: int32(codes.OK)},
		HttpResponse:    &authv3.CheckResponse_OkResponse{OkResponse: ok},
		DynamicMetadata: a.granted(d),
	}
}

// deprecated are the headers for who has an older secret than its key's newest.
func (a *answers) deprecated(d *authz.Decision) (headers []*corev3.HeaderValueOption) {
	if !a.deprecation || d.Key == nil {
		return nil
	}
	if since, until, old := d.Key.Deprecated(); old {
		headers = append(headers, header("deprecation", fmt.Sprintf("@%d", since.Unix())))
		if !until.IsZero() {
			headers = append(headers, header("sunset", until.UTC().Format(http.TimeFormat)))
		}
	}
	return headers
}

// granted is the metadata of an allowed request: with its lease, by which the access log names it.
func (a *answers) granted(d *authz.Decision) *structpb.Struct {
	m := metadata(d)
	if d.Leased {
		m.Fields["keyward.lease"] = structpb.NewStringValue(string(a.leases.Append(nil, d.Lease)))
	}
	return m
}

// refusal is how each outcome is said over HTTP and gRPC.
type refusal struct {
	http typev3.StatusCode
	grpc codes.Code
	code string
}

var refusals = map[authz.Outcome]refusal{
	authz.Invalid:         {typev3.StatusCode_BadRequest, codes.InvalidArgument, "InvalidRequest"},
	authz.Unauthenticated: {typev3.StatusCode_Unauthorized, codes.Unauthenticated, "Unauthorized"},
	authz.Forbidden:       {typev3.StatusCode_Forbidden, codes.PermissionDenied, "Forbidden"},
	authz.Limited:         {typev3.StatusCode_TooManyRequests, codes.ResourceExhausted, "RateLimitExceeded"},
}

// problem is the body of every refusal.
type problem struct {
	Error problemError `json:"error"`
	*problemQuota
}

// problemQuota is what FoundationaLLM's clients read where a quota refuses.
type problemQuota struct {
	Name     string `json:"quota_name"`
	Context  string `json:"quota_context"`
	Exceeded bool   `json:"quota_exceeded"`
	Retry    int64  `json:"time_until_retry_seconds"`
}

// userIdentity is the JSON by which FoundationaLLM's servers tell each other who is calling.
func userIdentity(d *authz.Decision) string {
	identity := struct {
		Name     string   `json:"name"`
		UserName string   `json:"user_name"`
		UserID   string   `json:"user_id"`
		UPN      string   `json:"upn"`
		Token    bool     `json:"associated_with_access_token"`
		Groups   []string `json:"group_ids"`
	}{UserID: string(d.AppendUserID(nil)), UPN: string(d.AppendUPN(nil)), Groups: []string{}}
	identity.Name = identity.UPN
	if d.Key != nil {
		identity.Name = identity.UserID
		identity.Token = d.Key.Type == apikey.TypeAgent
	}
	identity.UserName = identity.Name
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(identity); err != nil {
		panic(err) // text always marshals
	}
	var ascii strings.Builder
	for _, r := range strings.TrimSpace(b.String()) {
		for _, unit := range utf16.Encode([]rune{r}) {
			if r < utf8.RuneSelf {
				ascii.WriteRune(r)
			} else {
				fmt.Fprintf(&ascii, "\\u%04x", unit)
			}
		}
	}
	return ascii.String()
}

func limitName(class limits.Class, quota *apikey.Quota) string {
	if quota != nil && quota.Name != "" && len(quota.Name) <= 128 && isVisible(quota.Name) && !strings.ContainsAny(quota.Name, "\"\\") {
		return quota.Name
	}
	return limitNames[class]
}

func policy(name string, class limits.Class, quota *apikey.Quota, of limits.Quota, rate limits.Rate, concurrent int64) string {
	switch {
	case quota != nil && of.Period == limits.Day:
		return fmt.Sprintf("%q;q=%d;w=86400", name, of.Limit)
	case quota != nil && of.Window == 0:
		return fmt.Sprintf("%q;q=%d", name, of.Limit)
	case quota != nil:
		return fmt.Sprintf("%q;q=%d;w=%d", name, of.Limit, seconds(of.Window))
	case class == limits.ClassConcurrency:
		return fmt.Sprintf("%q;q=%d;qu=\"concurrent-requests\"", name, concurrent)
	}
	return fmt.Sprintf("%q;q=%d;w=%d", name, rate.Burst, seconds(time.Duration(rate.Burst)*rate.Interval))
}

func legacy(size, remaining, resets int64) []*corev3.HeaderValueOption {
	return []*corev3.HeaderValueOption{
		header("x-ratelimit-limit", strconv.FormatInt(size, 10)),
		header("x-ratelimit-remaining", strconv.FormatInt(remaining, 10)),
		header("x-ratelimit-reset", strconv.FormatInt(resets, 10)),
	}
}

type problemError struct {
	Code       string `json:"code"`
	Message    string `json:"message"`
	RetryAfter int64  `json:"retryAfter,omitempty"` // seconds
	Limit      string `json:"limit,omitempty"`
	DecisionID string `json:"decisionId"`
}

// limitNames are the words of error.limit and of the RateLimit headers.
var limitNames = map[limits.Class]string{
	limits.ClassInstance: "instance",
	limits.ClassBurst:    "burst",

	limits.ClassGlobalQuota:    "quota",
	limits.ClassPrincipalQuota: "quota",
	limits.ClassKeyQuota:       "quota",

	limits.ClassConcurrency: "concurrency",
}

// deny refuses a request.
func (a *answers) deny(d *authz.Decision, grpc bool) *authv3.CheckResponse {
	how := refusals[d.Outcome()]
	body := problemError{Code: how.code, Message: message(d), DecisionID: d.ID.String()}
	if d.Reason == authz.ReasonInvalidPath {
		body.Code = "InvalidPath"
	}
	var headers []*corev3.HeaderValueOption
	switch d.Outcome() {
	case authz.Unauthenticated:
		challenge := `Bearer realm="` + a.realm + `"`
		if d.CredentialSent {
			challenge += `, error="invalid_token"`
		}
		headers = append(headers, header("www-authenticate", challenge))
	case authz.Limited:
		body.RetryAfter = seconds(d.RetryAfter)
		body.Limit = limitNames[d.Limit]
		retry := strconv.FormatInt(body.RetryAfter, 10)
		name := limitName(d.Limit, d.Quota)
		headers = append(headers,
			header("retry-after", retry),
			header("ratelimit-policy", policy(name, d.Limit, d.Quota, d.QuotaLimit, d.Rate, d.Concurrent)),
			header("ratelimit", fmt.Sprintf("%q;r=0;t=%s", name, retry)))
		if a.legacy {
			size := d.Rate.Burst
			switch {
			case d.Quota != nil:
				size = d.QuotaLimit.Limit
			case d.Limit == limits.ClassConcurrency:
				size = d.Concurrent
			}
			headers = append(headers, legacy(size, 0, body.RetryAfter)...)
		}
		headers = append(headers, a.deprecated(d)...)
	}
	var exceeded *problemQuota
	if d.Quota != nil {
		exceeded = &problemQuota{cut(d.Quota.Name, 128), cut(d.Quota.Context, 256), true, body.RetryAfter}
	}
	return a.refuse(how, problem{body, exceeded}, headers, grpc, metadata(d))
}

// failure says that keyward could not decide. Nothing was granted.
func (a *answers) failure(d *authz.Decision, grpc bool, err error) (*authv3.CheckResponse, error) {
	busy, isBusy := errors.AsType[*apikey.BusyError](err)
	if !a.errorResponse && !isBusy {
		return nil, grpcstatus.Error(codes.Unavailable, err.Error())
	}
	// A call that was shed has to be able to say when to come again, which an RPC error cannot; and it is
	// a decision after all: an Envoy told to let requests through when its authorizer fails must not do
	// so for whoever sends too many made-up keys.
	retry := int64(1)
	if isBusy {
		retry = seconds(busy.RetryAfter)
	}
	how := refusal{typev3.StatusCode_ServiceUnavailable, codes.Unavailable, "ServiceUnavailable"}
	body := problemError{Code: how.code, Message: "The key could not be checked right now. Retry shortly.", RetryAfter: retry, DecisionID: d.ID.String()}
	out := a.refuse(how, problem{Error: body}, []*corev3.HeaderValueOption{header("retry-after", strconv.FormatInt(retry, 10))}, grpc, nil)
	if a.errorResponse {
		out.HttpResponse = &authv3.CheckResponse_ErrorResponse{ErrorResponse: out.GetDeniedResponse()}
		return out, nil
	}
	out.DynamicMetadata = &structpb.Struct{Fields: map[string]*structpb.Value{
		"keyward.denied":      structpb.NewStringValue("true"),
		"keyward.reason":      structpb.NewStringValue("busy"),
		"keyward.decision_id": structpb.NewStringValue(body.DecisionID),
	}}
	return out, nil
}

func (a *answers) refuse(how refusal, body problem, headers []*corev3.HeaderValueOption, grpc bool, metadata *structpb.Struct) *authv3.CheckResponse {
	headers = append(headers, header("cache-control", "no-store"))
	text := body.Error.Message
	if grpc {
		// Without it Envoy makes UNAVAILABLE of a 429, which many clients retry at once.
		headers = append(headers, header("grpc-status", strconv.Itoa(int(how.grpc))))
	} else {
		headers = append(headers, header("content-type", "application/json"))
		b, err := json.Marshal(body)
		if err != nil {
			panic(err) // strings and numbers always marshal
		}
		text = string(b)
	}
	return &authv3.CheckResponse{
		Status: &status.Status{Code: int32(how.grpc)},
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
			Status: &typev3.HttpStatus{Code: how.http}, Headers: headers, Body: text,
		}},
		DynamicMetadata: metadata,
	}
}

// message tells the caller what is wrong and what to do, and nothing that helps whoever guesses keys.
func message(d *authz.Decision) string {
	switch d.Outcome() {
	case authz.Unauthenticated:
		return "A valid API key is required. Check that the key is complete, active and sent once."
	case authz.Limited:
		return fmt.Sprintf("Rate limit exceeded. Retry after %d seconds.", seconds(d.RetryAfter))
	}
	switch d.Reason {
	case authz.ReasonInvalidPath:
		return "The path is ambiguous. Send it without dot segments, empty segments, backslashes, semicolons and needless escapes."
	case authz.ReasonInvalidRequest:
		return "The request names an instance, agent, environment or key twice, emptily or in an escaped spelling."
	case authz.ReasonInvalidBody:
		return "The body does not say once and plainly which agent, instance or environment it is for, or is too long to be looked at: send a JSON object."
	case authz.ReasonAgentMissing:
		return "The request does not say which agent it is for."
	case authz.ReasonNoRoute:
		return "No route allows this request."
	case authz.ReasonWrongInstance:
		return "The key belongs to another instance."
	case authz.ReasonWrongType:
		return "Keys of this type are not for this route."
	case authz.ReasonWrongAgent:
		return "The key is for another agent."
	case authz.ReasonAgentRequired:
		return "The key is for one agent, and the request names none."
	case authz.ReasonWrongEnvironment:
		return "The key is for another environment."
	case authz.ReasonMissingScope:
		return fmt.Sprintf("The key lacks the scope %s. Use a key that has it.", cut(string(d.MissingScope), 256))
	case authz.ReasonAddress:
		return "The key may not be used from this address."
	}
	return "The request is not allowed."
}

// seconds rounds up to whole seconds, at least 1: a client that waits that long has waited long enough.
func seconds(d time.Duration) int64 {
	return max(1, int64(math.Ceil(d.Seconds())))
}

func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}

// header sets a header to exactly this value. Envoys disagree on what an option means that does not say
// both.
func header(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header:       &corev3.HeaderValue{Key: name, Value: value},
		Append:       wrapperspb.Bool(false), //nolint:staticcheck // what it replaces is ignored by the Envoys we support
		AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
	}
}

// metadata goes to Envoy's later filters and logs, under envoy.filters.http.ext_authz.
func metadata(d *authz.Decision) *structpb.Struct {
	fields := map[string]*structpb.Value{
		"keyward.reason":      structpb.NewStringValue(d.Reason.String()),
		"keyward.decision_id": structpb.NewStringValue(d.ID.String()),
	}
	if d.Key != nil {
		fields["keyward.key_id"] = structpb.NewStringValue(d.Key.ID.String())
		fields["keyward.instance"] = structpb.NewStringValue(d.Key.InstanceID)
	}
	if d.Shadowed != 0 {
		fields["keyward.shadow"] = structpb.NewStringValue(string(d.Shadowed.Append(nil)))
	}
	if d.Outcome() != authz.Allowed {
		fields["keyward.denied"] = structpb.NewStringValue("true")
	}
	return &structpb.Struct{Fields: fields}
}

// isVisible reports whether s is ASCII from space to tilde, neither beginning nor ending with a space.
func isVisible(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return s == strings.TrimSpace(s)
}
