package checktest

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

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
	return answers{identity: identity, remove: identity.Names(), realm: cfg.Realm, errorResponse: cfg.ErrorResponse, deprecation: cfg.Deprecation, leases: cfg.Leases}, nil
}

// allow lets a request through: who is calling is set, everything that could be mistaken for it and
// every secret of ours is removed.
func (a *answers) allow(d *authz.Decision) *authv3.CheckResponse {
	ok := &authv3.OkHttpResponse{}
	set := map[string]bool{}
	if k := d.Key; k != nil {
		for _, h := range []struct{ name, value string }{
			{a.identity.KeyID, k.ID.String()},
			{a.identity.KeyType, string(k.Type)},
			{a.identity.InstanceID, k.InstanceID},
			{a.identity.Agent, k.AgentName},
			{a.identity.User, k.UserPrincipalName},
			{a.identity.Scopes, string(d.AppendScopes(nil))},
			{a.identity.DecisionID, d.ID.String()},
		} {
			// An empty value would overwrite with an empty header: remove instead. Creation refuses
			// values that are not visible ASCII; what an import slipped through is not handed on.
			if h.name != check.Off && h.value != "" && isVisible(h.value) {
				ok.Headers = append(ok.Headers, header(h.name, h.value))
				set[h.name] = true
			}
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
		policy := fmt.Sprintf("%q;q=%d;qu=\"concurrent-requests\"", body.Limit, d.Concurrent)
		if d.Concurrent == 0 {
			policy = fmt.Sprintf("%q;q=%d;w=%d", body.Limit, d.Rate.Burst, seconds(time.Duration(d.Rate.Burst)*d.Rate.Interval))
		}
		headers = append(headers,
			header("retry-after", retry),
			header("ratelimit-policy", policy),
			header("ratelimit", fmt.Sprintf("%q;r=0;t=%s", body.Limit, retry)))
		headers = append(headers, a.deprecated(d)...)
	}
	return a.refuse(how, body, headers, grpc, metadata(d))
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
	out := a.refuse(how, body, []*corev3.HeaderValueOption{header("retry-after", strconv.FormatInt(retry, 10))}, grpc, nil)
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

func (a *answers) refuse(how refusal, body problemError, headers []*corev3.HeaderValueOption, grpc bool, metadata *structpb.Struct) *authv3.CheckResponse {
	headers = append(headers, header("cache-control", "no-store"))
	text := body.Message
	if grpc {
		// Without it Envoy makes UNAVAILABLE of a 429, which many clients retry at once.
		headers = append(headers, header("grpc-status", strconv.Itoa(int(how.grpc))))
	} else {
		headers = append(headers, header("content-type", "application/json"))
		b, err := json.Marshal(problem{body})
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
	case authz.ReasonNoRoute:
		return "No route allows this request."
	case authz.ReasonWrongInstance:
		return "The key belongs to another instance."
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
