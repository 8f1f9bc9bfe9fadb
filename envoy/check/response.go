package check

import (
	"errors"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/envoy/wire"
	"keyward/limits"
)

// answers writes CheckResponses in wire format.
//
// Source: envoy.service.auth.v3.CheckResponse. Its field numbers stand here again; package checktest
// makes the same answers out of generated code, and a test compares the two.
type answers struct {
	identity      [identityCount]identityHeader
	remove        [][]byte // of every allowed request: names in wire format
	realm         string
	errorResponse bool
	deprecation   bool
	legacy        bool
	leases        *authz.LeaseIDs
}

// An identityHeader is one header that says who is calling.
type identityHeader struct {
	name   string // "": not sent
	remove uint64 // its place among the names that are removed where it is not set, as a bit
}

func newAnswers(cfg Config) (answers, error) {
	identity, err := cfg.Identity.Resolve()
	if cfg.Realm == "" {
		cfg.Realm = DefaultRealm
	}
	if strings.ContainsAny(cfg.Realm, "\"\\") || !isVisible(cfg.Realm) {
		err = errors.Join(err, apikey.Invalid("credentials.realm", "must be visible ASCII without quotes and backslashes"))
	}
	if err != nil {
		return answers{}, err
	}
	a := answers{realm: cfg.Realm, errorResponse: cfg.ErrorResponse, deprecation: cfg.Deprecation, legacy: cfg.LegacyRateLimit, leases: cfg.Leases}
	remove := identity.Names()
	for _, name := range remove {
		a.remove = append(a.remove, appendText(nil, okRemove, name))
	}
	for i, name := range identity.names() {
		if *name != Off {
			a.identity[i] = identityHeader{*name, 1 << slices.Index(remove, *name)}
		}
	}
	return a, nil
}

// The identity headers, in the order of Identity.names.
const (
	identityKeyID = iota
	identityKeyType
	identityInstanceID
	identityAgent
	identityUser
	identityScopes
	identityDecisionID
	identityUserIdentity
	identityCount
)

// allow lets a request through: who is calling is set, everything that could be mistaken for it and
// every secret of ours is removed.
func (a *answers) allow(dst []byte, d *authz.Decision) []byte {
	dst = appendStatus(dst, codes.OK)
	dst, ok := open(dst, responseOK)
	text, set := textOf(d), uint64(0)
	if k := d.Key; k != nil {
		dst = identify(dst, &a.identity[identityKeyID], &set, text.key[:])
		dst = identify(dst, &a.identity[identityKeyType], &set, k.Type)
		dst = identify(dst, &a.identity[identityInstanceID], &set, k.InstanceID)
		dst = identify(dst, &a.identity[identityAgent], &set, k.AgentName)
		dst = identify(dst, &a.identity[identityUser], &set, k.UserPrincipalName)
		var scopes [256]byte
		dst = identify(dst, &a.identity[identityScopes], &set, d.AppendScopes(scopes[:0]))
		dst = identify(dst, &a.identity[identityDecisionID], &set, text.decision[:])
	} else if d.Holder != (authz.Holder{}) { // nothing that only a key could say
		var user [256]byte
		dst = identify(dst, &a.identity[identityUser], &set, d.AppendUser(user[:0]))
		dst = identify(dst, &a.identity[identityDecisionID], &set, text.decision[:])
	}
	if a.identity[identityUserIdentity].name != "" && d.HasIdentity() {
		var room [512]byte
		dst = identify(dst, &a.identity[identityUserIdentity], &set, appendUserIdentity(room[:0], d))
	}
	for i, name := range a.remove {
		if set&(1<<i) == 0 {
			dst = append(dst, name...)
		}
	}
	for _, name := range d.CredentialHeaders {
		dst = appendText(dst, okRemove, name)
	}
	if d.InAuthorization {
		dst = appendText(dst, okRemove, "authorization")
	}
	// Only when it is there: Envoy re-orders the query whenever this is sent.
	if d.InQuery {
		dst = appendText(dst, okRemoveQuery, d.CredentialQuery)
	}
	if a.deprecation && d.Key != nil {
		dst = deprecate(dst, okToClient, d.Key)
	}
	if len(d.Standings) > 0 {
		dst = a.appendStandings(dst, d.Standings)
	}
	dst = shut(dst, ok)

	dst, metadata := open(dst, responseMetadata)
	dst = appendFacts(dst, d, &text)
	if d.Leased {
		var room [authz.LeaseIDSize]byte
		dst = appendFact(dst, "keyward.lease", a.leases.Append(room[:0], d.Lease))
	}
	return shut(dst, metadata)
}

// identify sets an identity header. An empty value would overwrite with an empty header, so it is
// removed instead. Creation refuses values that are not visible ASCII; what an import slipped through is
// not handed on.
func identify[S ~string | []byte](dst []byte, h *identityHeader, set *uint64, value S) []byte {
	if h.name == "" || len(value) == 0 || !isVisible(value) {
		return dst
	}
	*set |= h.remove
	return appendHeader(dst, okHeaders, h.name, value)
}

// appendUserIdentity appends who is calling as FoundationaLLM's servers tell each other: in ASCII, so that a
// header can carry it.
//
// Source: reference/foundationallm.md §2.4 and §2.7. A key that is no user's is its own user.
func appendUserIdentity(dst []byte, d *authz.Decision) []byte {
	var upnRoom, idRoom [256]byte
	upn, id := d.AppendUPN(upnRoom[:0]), d.AppendUserID(idRoom[:0])
	name := upn
	if d.Key != nil {
		name = id // of a user's key, the name of the user
	}
	dst = appendJSONText(append(dst, `{"name":`...), name)
	dst = appendJSONText(append(dst, `,"user_name":`...), name)
	dst = appendJSONText(append(dst, `,"user_id":`...), id)
	dst = appendJSONText(append(dst, `,"upn":`...), upn)
	byToken := d.Key != nil && d.Key.Type == apikey.TypeAgent
	dst = strconv.AppendBool(append(dst, `,"associated_with_access_token":`...), byToken)
	return append(dst, `,"group_ids":[]}`...)
}

// appendStandings says where the limits of a request that passed stand, all of them.
func (a *answers) appendStandings(dst []byte, standings []authz.Standing) []byte {
	var policyRoom, stateRoom [512]byte
	policy, state, least := policyRoom[:0], stateRoom[:0], &standings[0]
	for i := range standings {
		s := &standings[i]
		if i > 0 {
			policy, state = append(policy, ", "...), append(state, ", "...)
		}
		l := limit{class: s.Class, quota: s.Quota, quotaLimit: s.QuotaLimit, rate: s.Rate, concurrent: s.Limit}
		policy = l.appendPolicy(policy)
		state = appendState(state, l.name(), s.Remaining, resets(s))
		if s.Remaining < least.Remaining {
			least = s
		}
	}
	dst = appendHeader(dst, okToClient, "ratelimit-policy", policy)
	dst = appendHeader(dst, okToClient, "ratelimit", state)
	if a.legacy {
		dst = appendLegacy(dst, okToClient, least.Limit, least.Remaining, resets(least))
	}
	return dst
}

// resets is in how many seconds a limit is as if nobody had used it.
func resets(s *authz.Standing) int64 { return int64(math.Ceil(s.ResetsIn.Seconds())) }

// deprecate tells a client whose secret is not its key's newest when that came, and when its own ends. It goes
// with allows and 429s: advice to who may come (again) with this secret. A client that is mostly limited has to
// hear of it too; a 401 must not tell that a secret is an old one, and to a 403 a newer one makes no difference.
//
// Source: RFC 9745, a date as structured fields write it, and RFC 8594, an HTTP date.
func deprecate(dst []byte, tag byte, k *apikey.Key) []byte {
	since, until, ok := k.Deprecated()
	if !ok {
		return dst
	}
	var room [32]byte
	dst = appendHeader(dst, tag, "deprecation", strconv.AppendInt(append(room[:0], '@'), since.Unix(), 10))
	if until.IsZero() {
		return dst
	}
	return appendHeader(dst, tag, "sunset", until.UTC().AppendFormat(room[:0], http.TimeFormat))
}

// refusal is how an outcome is said over HTTP and gRPC.
type refusal struct {
	http int
	grpc codes.Code
	code string
}

var (
	refusals = [...]refusal{
		authz.Invalid:         {http.StatusBadRequest, codes.InvalidArgument, "InvalidRequest"},
		authz.Unauthenticated: {http.StatusUnauthorized, codes.Unauthenticated, "Unauthorized"},
		authz.Forbidden:       {http.StatusForbidden, codes.PermissionDenied, "Forbidden"},
		authz.Limited:         {http.StatusTooManyRequests, codes.ResourceExhausted, "RateLimitExceeded"},
	}
	badPath     = refusal{http.StatusBadRequest, codes.InvalidArgument, "InvalidPath"}
	unavailable = refusal{http.StatusServiceUnavailable, codes.Unavailable, "ServiceUnavailable"}
)

// limitNames are the words of error.limit and of the RateLimit headers.
var limitNames = [...]string{
	limits.ClassInstance:       "instance",
	limits.ClassGlobalQuota:    "quota",
	limits.ClassPrincipalQuota: "quota",
	limits.ClassKeyQuota:       "quota",
	limits.ClassBurst:          "burst",
	limits.ClassConcurrency:    "concurrency",
}

// A limit is one that headers speak of.
type limit struct {
	class      limits.Class
	quota      *apikey.Quota // of the classes of quotas
	quotaLimit limits.Quota
	rate       limits.Rate
	concurrent int64
}

// name is a quota's own, or the word for the class. It needs no escape in a header.
func (l *limit) name() string {
	if l.quota != nil && isPlain(l.quota.Name) {
		return l.quota.Name
	}
	return limitNames[l.class]
}

// size is how many requests, or units, the limit lets through.
func (l *limit) size() int64 {
	switch {
	case l.quota != nil:
		return l.quotaLimit.Limit
	case l.class == limits.ClassConcurrency:
		return l.concurrent
	}
	return l.rate.Burst
}

// window is in how many seconds it does so; 0: that cannot be said in seconds.
func (l *limit) window() int64 {
	switch {
	case l.quota != nil && l.quotaLimit.Period == limits.Day:
		return 24 * 60 * 60
	case l.quota != nil && l.quotaLimit.Window == 0: // a month, or running requests
		return 0
	case l.quota != nil:
		return seconds(l.quotaLimit.Window)
	case l.class == limits.ClassConcurrency:
		return 0
	}
	return seconds(time.Duration(l.rate.Burst) * l.rate.Interval)
}

// appendPolicy appends an item of the header RateLimit-Policy.
//
// Source: draft-ietf-httpapi-ratelimit-headers.
func (l *limit) appendPolicy(dst []byte) []byte {
	dst = append(append(append(dst, '"'), l.name()...), `";q=`...)
	dst = strconv.AppendInt(dst, l.size(), 10)
	if l.class == limits.ClassConcurrency {
		return append(dst, `;qu="concurrent-requests"`...)
	}
	if w := l.window(); w > 0 {
		dst = strconv.AppendInt(append(dst, ";w="...), w, 10)
	}
	return dst
}

// appendState appends an item of the header RateLimit.
func appendState(dst []byte, name string, remaining, resets int64) []byte {
	dst = append(append(append(dst, '"'), name...), `";r=`...)
	dst = strconv.AppendInt(dst, remaining, 10)
	return strconv.AppendInt(append(dst, ";t="...), resets, 10)
}

// appendLegacy writes the headers that clients looked for before there was a draft.
func appendLegacy(dst []byte, tag byte, size, remaining, resets int64) []byte {
	var room [20]byte
	dst = appendHeader(dst, tag, "x-ratelimit-limit", strconv.AppendInt(room[:0], size, 10))
	dst = appendHeader(dst, tag, "x-ratelimit-remaining", strconv.AppendInt(room[:0], remaining, 10))
	return appendHeader(dst, tag, "x-ratelimit-reset", strconv.AppendInt(room[:0], resets, 10))
}

// isPlain reports whether a name can stand between quotes as it is, in headers and in JSON.
func isPlain(name string) bool {
	return name != "" && len(name) <= maxName && isVisible(name) && !strings.ContainsAny(name, "\"\\")
}

// maxName is the longest name of a quota, and about half the longest of a context.
const maxName = 128

// deny refuses a request.
func (a *answers) deny(dst []byte, d *authz.Decision, about about) []byte {
	how := &refusals[d.Outcome()]
	if d.Reason == authz.ReasonInvalidPath {
		how = &badPath
	}
	dst = appendStatus(dst, how.grpc)
	dst, denied := open(dst, responseDenied)
	dst = appendHTTPStatus(dst, how.http)
	var retry int64
	switch d.Outcome() {
	case authz.Unauthenticated:
		var room [192]byte
		challenge := append(append(append(room[:0], `Bearer realm="`...), a.realm...), '"')
		if d.CredentialSent {
			challenge = append(challenge, `, error="invalid_token"`...)
		}
		dst = appendHeader(dst, deniedHeaders, "www-authenticate", challenge)
	case authz.Limited:
		retry = seconds(d.RetryAfter)
		dst = a.appendLimit(dst, d, retry)
		if a.deprecation && d.Key != nil {
			dst = deprecate(dst, deniedHeaders, d.Key)
		}
	}
	var room [512]byte
	text := textOf(d)
	dst = appendBody(dst, how, about, appendMessage(room[:0], d), retry, d, &text)
	dst = shut(dst, denied)

	dst, metadata := open(dst, responseMetadata)
	dst = appendFacts(dst, d, &text)
	dst = appendFact(dst, "keyward.denied", "true")
	return shut(dst, metadata)
}

// appendLimit says which limit refuses, how large it is and when to come again.
func (a *answers) appendLimit(dst []byte, d *authz.Decision, retry int64) []byte {
	l := limit{class: d.Limit, quota: d.Quota, quotaLimit: d.QuotaLimit, rate: d.Rate, concurrent: d.Concurrent}
	var room [256]byte
	dst = appendHeader(dst, deniedHeaders, "retry-after", strconv.AppendInt(room[:0], retry, 10))
	dst = appendHeader(dst, deniedHeaders, "ratelimit-policy", l.appendPolicy(room[:0]))
	dst = appendHeader(dst, deniedHeaders, "ratelimit", appendState(room[:0], l.name(), 0, retry))
	if a.legacy {
		dst = appendLegacy(dst, deniedHeaders, l.size(), 0, retry)
	}
	return dst
}

// failure says that keyward could not decide. Nothing was granted.
func (a *answers) failure(dst []byte, d *authz.Decision, about about, err error) ([]byte, error) {
	busy, isBusy := errors.AsType[*apikey.BusyError](err)
	if !a.errorResponse && !isBusy {
		return nil, rpcStatus(err)
	}
	// A call that was shed has to be able to say when to come again, which an RPC error cannot; and it is
	// a decision after all: an Envoy told to let requests through when its authorizer fails must not do
	// so for whoever sends too many made-up keys.
	retry := int64(1)
	if isBusy {
		retry = seconds(busy.RetryAfter)
	}
	dst = appendStatus(dst, unavailable.grpc)
	as := byte(responseDenied)
	if a.errorResponse {
		as = responseError
	}
	dst, denied := open(dst, as)
	dst = appendHTTPStatus(dst, unavailable.http)
	var room [20]byte
	dst = appendHeader(dst, deniedHeaders, "retry-after", strconv.AppendInt(room[:0], retry, 10))
	text := textOf(d)
	dst = appendBody(dst, &unavailable, about, "The key could not be checked right now. Retry shortly.", retry, nil, &text)
	dst = shut(dst, denied)
	if a.errorResponse {
		return dst, nil
	}
	dst, metadata := open(dst, responseMetadata)
	dst = appendFact(dst, "keyward.reason", "busy")
	dst = appendFact(dst, "keyward.decision_id", text.decision[:])
	dst = appendFact(dst, "keyward.denied", "true")
	return shut(dst, metadata), nil
}

// appendBody writes the last headers of a refusal and its body: text for gRPC callers, JSON for others. d is
// the decision, nil if there is none.
func appendBody[S string | []byte](dst []byte, how *refusal, about about, message S, retry int64, d *authz.Decision, text *ids) []byte {
	dst = appendHeader(dst, deniedHeaders, "cache-control", "no-store")
	if about.grpc {
		// Without it Envoy makes UNAVAILABLE of a 429, which many clients retry at once.
		var room [2]byte
		dst = appendHeader(dst, deniedHeaders, "grpc-status", strconv.AppendInt(room[:0], int64(how.grpc), 10))
		return appendText(dst, deniedBody, message)
	}
	dst = appendHeader(dst, deniedHeaders, "content-type", "application/json")
	dst, body := open(dst, deniedBody)
	dst = append(append(dst, `{"error":{"code":"`...), how.code...)
	if dst = append(dst, `","message":"`...); how == &refusals[authz.Forbidden] { // which may name a scope
		dst = appendJSON(dst, message)
	} else {
		dst = append(dst, message...)
	}
	if retry != 0 {
		dst = strconv.AppendInt(append(dst, `","retryAfter":`...), retry, 10)
	} else {
		dst = append(dst, '"')
	}
	if d != nil && d.Outcome() == authz.Limited {
		dst = append(append(append(dst, `,"limit":"`...), limitNames[d.Limit]...), '"')
	}
	dst = append(append(append(dst, `,"decisionId":"`...), text.decision[:]...), `"}`...)
	if d != nil && d.Quota != nil { // what FoundationaLLM's clients read
		dst = appendJSONText(append(dst, `,"quota_name":`...), cut(d.Quota.Name, maxName))
		dst = appendJSONText(append(dst, `,"quota_context":`...), cut(d.Quota.Context, 2*maxName))
		dst = strconv.AppendInt(append(dst, `,"quota_exceeded":true,"time_until_retry_seconds":`...), retry, 10)
	}
	return shut(append(dst, '}'), body)
}

// appendMessage tells the caller what is wrong and what to do, and nothing that helps whoever guesses
// keys.
func appendMessage(dst []byte, d *authz.Decision) []byte {
	switch d.Outcome() {
	case authz.Unauthenticated:
		return append(dst, "A valid API key is required. Check that the key is complete, active and sent once."...)
	case authz.Limited:
		dst = strconv.AppendInt(append(dst, "Rate limit exceeded. Retry after "...), seconds(d.RetryAfter), 10)
		return append(dst, " seconds."...)
	}
	switch d.Reason {
	case authz.ReasonMissingScope:
		dst = append(append(dst, "The key lacks the scope "...), cut(string(d.MissingScope), 256)...)
		return append(dst, ". Use a key that has it."...)
	case authz.ReasonInvalidPath:
		return append(dst, "The path is ambiguous. Send it without dot segments, empty segments, backslashes, semicolons and needless escapes."...)
	case authz.ReasonInvalidRequest:
		return append(dst, "The request names an instance, agent, environment or key twice, emptily or in an escaped spelling."...)
	case authz.ReasonInvalidBody:
		return append(dst, "The body does not say once and plainly which agent, instance or environment it is for, or is too long to be looked at: send a JSON object."...)
	case authz.ReasonAgentMissing:
		return append(dst, "The request does not say which agent it is for."...)
	case authz.ReasonNoRoute:
		return append(dst, "No route allows this request."...)
	case authz.ReasonWrongInstance:
		return append(dst, "The key belongs to another instance."...)
	case authz.ReasonWrongType:
		return append(dst, "Keys of this type are not for this route."...)
	case authz.ReasonWrongAgent:
		return append(dst, "The key is for another agent."...)
	case authz.ReasonAgentRequired:
		return append(dst, "The key is for one agent, and the request names none."...)
	case authz.ReasonWrongEnvironment:
		return append(dst, "The key is for another environment."...)
	case authz.ReasonAddress:
		return append(dst, "The key may not be used from this address."...)
	}
	return append(dst, "The request is not allowed."...)
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

// ids are the texts of what an answer names more than once.
type ids struct {
	key      [36]byte
	decision [2 * len(authz.ID{})]byte
}

func textOf(d *authz.Decision) (text ids) {
	d.ID.Append(text.decision[:0])
	if d.Key != nil {
		d.Key.ID.Append(text.key[:0])
	} else if d.Reason == authz.ReasonUnknownKey { // so that the time does not tell
		nobodys.ID.Append(text.key[:0])
	}
	return text
}

// appendFacts writes what goes to Envoy's later filters and logs, under envoy.filters.http.ext_authz.
func appendFacts(dst []byte, d *authz.Decision, text *ids) []byte {
	dst = appendFact(dst, "keyward.reason", d.Reason.String())
	dst = appendFact(dst, "keyward.decision_id", text.decision[:])
	if d.Shadowed != 0 {
		var room [64]byte
		dst = appendFact(dst, "keyward.shadow", d.Shadowed.Append(room[:0]))
	}
	switch {
	case d.Key != nil:
		return appendKey(dst, d.Key, text)
	case d.Reason == authz.ReasonUnknownKey: // written and left out, so that the time does not tell
		return appendKey(dst, &nobodys, text)[:len(dst)]
	}
	return dst
}

func appendKey(dst []byte, k *apikey.Key, text *ids) []byte {
	dst = appendFact(dst, "keyward.key_id", text.key[:])
	return appendFact(dst, "keyward.instance", k.InstanceID)
}

// nobodys is a key that no secret finds, with an instance whose id is as long as most.
var nobodys = apikey.Key{InstanceID: "00000000-0000-0000-0000-000000000000"}

// complete lets only whole answers out: an allow that says so, or a refusal that says so. To Envoy, a
// response without a status is an "allowed".
func complete(answer []byte) bool {
	tag, status, answer, ok := cutMessage(answer)
	if !ok || tag != responseStatus {
		return false
	}
	refused := false
	if len(status) > 0 {
		tag, code, _, ok := wire.Cut(status)
		refused = ok && tag == statusCode && wire.Number(code) != 0
	}
	tag, _, answer, ok = cutMessage(answer)
	switch {
	case !ok:
		return false
	case refused && tag != responseDenied && tag != responseError, !refused && tag != responseOK:
		return false
	case len(answer) == 0:
		return true
	}
	tag, _, answer, ok = cutMessage(answer)
	return ok && tag == responseMetadata && len(answer) == 0
}

// cutMessage is wire.Cut of a message that may be empty.
func cutMessage(b []byte) (tag wire.Tag, content, rest []byte, ok bool) {
	if len(b) == 0 {
		return 0, nil, nil, false
	}
	return wire.Cut(b)
}

// isVisible reports whether s is ASCII from space to tilde, neither beginning nor ending with a space.
func isVisible[S ~string | []byte](s S) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return len(s) == 0 || s[0] != ' ' && s[len(s)-1] != ' '
}
