package authz

import (
	"encoding/binary"
	"encoding/hex"
	"math/rand/v2"
	"net/netip"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// An Outcome is the sort of answer a caller gets.
type Outcome uint8

// The outcomes. The zero Outcome is no decision at all.
const (
	Allowed         Outcome = iota + 1
	Invalid                 // the request cannot be judged: 400
	Unauthenticated         // no key, or none that is good: 401
	Forbidden               // a good key, but not for this: 403
	Limited                 // a good key for this, but not now: 429
)

func (o Outcome) String() string {
	return [...]string{"none", "allowed", "invalid", "unauthenticated", "forbidden", "limited"}[o]
}

// A Reason is why a decision was made. Callers learn only its outcome; the reason goes to metadata,
// logs and metrics.
type Reason uint8

// The reasons, in the order in which they are looked for.
const (
	ReasonNone Reason = iota
	ReasonInvalidPath
	ReasonNoRoute
	ReasonPublic
	ReasonPreflight
	ReasonNoCredential
	ReasonAmbiguousCredential // a repeat, a comma, or two different secrets
	ReasonMalformedCredential // wrong shape
	ReasonBadChecksum
	ReasonAnonymous // allowed without a credential, on an optional route
	ReasonUnknownKey
	ReasonRevoked
	ReasonDisabled
	ReasonInstanceDisabled
	ReasonNotYetValid
	ReasonExpired
	ReasonGenerationEnded
	ReasonIdle
	ReasonInvalidRequest // a place given twice or empty
	ReasonInvalidBody    // the body should name a place, and cannot be read
	ReasonAgentMissing   // the rule needs every request to name its agent
	ReasonWrongInstance
	ReasonWrongType // keys of its type may not here
	ReasonWrongAgent
	ReasonAgentRequired
	ReasonWrongEnvironment
	ReasonMissingScope
	ReasonAddress
	ReasonLimitInstance
	ReasonLimitQuotaGlobal
	ReasonLimitQuotaPrincipal
	ReasonLimitQuotaKey
	ReasonLimitBurst
	ReasonLimitConcurrency
	// ReasonNoFeedback is ReasonLimitConcurrency at a node that never says that a request ended. Adapters,
	// who know nodes, make the one of the other.
	ReasonNoFeedback
	ReasonKey // allowed with a key
	ReasonJWT // allowed without one, and known by a token, on an optional route
	reasonCount
)

var reasons = [reasonCount]struct {
	name    string
	outcome Outcome
}{
	ReasonNone:                {"none", 0},
	ReasonInvalidPath:         {"invalid_path", Invalid},
	ReasonNoRoute:             {"no_route", Forbidden},
	ReasonPublic:              {"public", Allowed},
	ReasonPreflight:           {"preflight", Allowed},
	ReasonNoCredential:        {"no_credential", Unauthenticated},
	ReasonAmbiguousCredential: {"ambiguous_credential", Unauthenticated},
	ReasonMalformedCredential: {"malformed_credential", Unauthenticated},
	ReasonBadChecksum:         {"bad_checksum", Unauthenticated},
	ReasonAnonymous:           {"anonymous", Allowed},
	ReasonUnknownKey:          {"unknown_key", Unauthenticated},
	ReasonRevoked:             {"revoked", Unauthenticated},
	ReasonDisabled:            {"disabled", Unauthenticated},
	ReasonInstanceDisabled:    {"instance_disabled", Unauthenticated},
	ReasonNotYetValid:         {"not_yet_valid", Unauthenticated},
	ReasonExpired:             {"expired", Unauthenticated},
	ReasonGenerationEnded:     {"generation_ended", Unauthenticated},
	ReasonIdle:                {"idle", Unauthenticated},
	ReasonInvalidRequest:      {"invalid_request", Invalid},
	ReasonInvalidBody:         {"invalid_body", Invalid},
	ReasonAgentMissing:        {"agent_missing", Invalid},
	ReasonWrongInstance:       {"wrong_instance", Forbidden},
	ReasonWrongType:           {"wrong_type", Forbidden},
	ReasonWrongAgent:          {"wrong_agent", Forbidden},
	ReasonAgentRequired:       {"agent_required", Forbidden},
	ReasonWrongEnvironment:    {"wrong_environment", Forbidden},
	ReasonMissingScope:        {"missing_scope", Forbidden},
	ReasonAddress:             {"address", Forbidden},
	ReasonLimitInstance:       {"limit_instance", Limited},
	ReasonLimitQuotaGlobal:    {"limit_quota_global", Limited},
	ReasonLimitQuotaPrincipal: {"limit_quota_principal", Limited},
	ReasonLimitQuotaKey:       {"limit_quota_key", Limited},
	ReasonLimitBurst:          {"limit_burst", Limited},
	ReasonLimitConcurrency:    {"limit_concurrency", Limited},
	ReasonNoFeedback:          {"concurrency_no_feedback", Limited},
	ReasonKey:                 {"key", Allowed},
	ReasonJWT:                 {"jwt", Allowed},
}

func (r Reason) String() string { return reasons[r].name }

// Outcome is what the caller learns of a reason.
func (r Reason) Outcome() Outcome { return reasons[r].outcome }

// Reasons lists every reason a decision can have.
func Reasons() []Reason {
	list := make([]Reason, 0, reasonCount-1)
	for r := ReasonNone + 1; r < reasonCount; r++ {
		list = append(list, r)
	}
	return list
}

// limitReasons says which reason the refusal of a class of limits is.
var limitReasons = map[limits.Class]Reason{
	limits.ClassInstance: ReasonLimitInstance,
	limits.ClassBurst:    ReasonLimitBurst,

	limits.ClassGlobalQuota:    ReasonLimitQuotaGlobal,
	limits.ClassPrincipalQuota: ReasonLimitQuotaPrincipal,
	limits.ClassKeyQuota:       ReasonLimitQuotaKey,

	limits.ClassConcurrency: ReasonLimitConcurrency,
}

// Shadowed says what would have refused a request, were it not in shadow: a bit for each class of limits, as
// limits.Decision has them, and two more.
type Shadowed uint16

// The bits beside those of limits.
const (
	ShadowedScopes    Shadowed = 1 << 14
	ShadowedAddresses Shadowed = 1 << 15
)

// ShadowedNames are the words for the bits in logs, metadata and metrics; several classes may have one word.
var ShadowedNames = [16]string{
	limits.ClassInstance:       "instance",
	limits.ClassGlobalQuota:    "quota",
	limits.ClassPrincipalQuota: "quota",
	limits.ClassKeyQuota:       "quota",
	limits.ClassBurst:          "burst",
	limits.ClassConcurrency:    "concurrency",
	14:                         "scopes",
	15:                         "addresses",
}

// Append appends the words for what is set, each once, separated by commas.
func (s Shadowed) Append(dst []byte) []byte {
	last := ""
	for bit, name := range ShadowedNames { // the same word stands in neighbours only
		if s>>bit&1 == 0 || name == "" || name == last {
			continue
		}
		if last != "" {
			dst = append(dst, ',')
		}
		dst = append(dst, name...)
		last = name
	}
	return dst
}

// An ID names one decision, in answers, logs and metadata. It is random, not secret.
type ID [16]byte

func newID() (id ID) {
	binary.NativeEndian.PutUint64(id[:8], rand.Uint64()) //nolint:gosec // not a secret, and it is made for every request
	binary.NativeEndian.PutUint64(id[8:], rand.Uint64()) //nolint:gosec // the same
	return id
}

// Append appends the id as 32 hexadecimal digits.
func (id ID) Append(dst []byte) []byte { return hex.AppendEncode(dst, id[:]) }

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// A Decision is the answer to a request, and everything that an adapter needs to say it. It borrows
// from the request that it answers.
type Decision struct {
	ID     ID
	Reason Reason

	// Key is the caller's key as soon as it is known, for denials too; nil otherwise. On an allowed
	// request it is the identity to hand on; nil then means a caller without identity, or with [ReasonJWT] one
	// who is known by a token.
	Key *apikey.Key
	// Holder is who is known by a token.
	Holder Holder
	// Agent is the agent that the request is for, as soon as its limits are judged; "": none.
	Agent string
	// InstanceID is that whose limits were judged; "": none were.
	InstanceID string
	route      *Rule      // that the request matched, perhaps anyRequest; nil where that was not looked for
	client     netip.Addr // where it was looked for
	// allowed are the rights that the policy leaves to keys.
	allowed apikey.Scopes

	// Leased says that the request, allowed, holds Lease until somebody says that it ended.
	Leased bool
	Lease  limits.Lease
	// repeated says that the lease lived already: another answer granted it, and may be in use.
	repeated bool

	// CredentialHeaders and CredentialQuery ("" for none) say from where secrets are taken, and so what has
	// to be removed before the request goes on; Authorization only with InAuthorization.
	CredentialHeaders []string
	CredentialQuery   string
	// CredentialSent says that the request carried something meant as one of our secrets.
	CredentialSent bool
	// InAuthorization and InQuery say where else than in our own headers, which never reach an upstream,
	// a secret of ours stands. It has to be removed from there.
	InAuthorization, InQuery bool

	MissingScope apikey.Scope // with ReasonMissingScope
	// Shadowed is what would have refused the request, whatever became of it.
	Shadowed Shadowed

	Limit      limits.Class  // with Limited
	Quota      *apikey.Quota // the quota that refuses; nil where none does
	QuotaLimit limits.Quota  // as it is judged, with what the key has instead
	Rate       limits.Rate   // the rate that refuses; zero where none does
	Concurrent int64         // the number of running requests that refuses; 0 where it does not
	RetryAfter time.Duration // with Limited; above 0
	// Standings are where the limits of an allowed request stand after it, in the order of their classes; only
	// with [Config].ShowLimits.
	Standings []Standing
}

// A Standing is where one limit stands.
type Standing struct {
	limits.Standing
	Quota *apikey.Quota // nil for a limit that is no quota
	// What the limit is: one of them is set; of running requests none is.
	QuotaLimit limits.Quota
	Rate       limits.Rate
}

// Route returns the pattern of the rule that the request matched; "" if none did. Quotas of the context, ""
// for none, and of the context with the agent count the request, so many units each.
func (d *Decision) Route() (pattern, context string, cost int) {
	if d.route == nil {
		return "", "", 0
	}
	if d.route.Context != "" {
		cost = max(1, d.route.Cost)
	}
	return d.route.String(), d.route.Context, cost
}

// Outcome is what the caller learns.
func (d *Decision) Outcome() Outcome { return d.Reason.Outcome() }

// HasIdentity reports whether it is known on whose behalf the request counts.
func (d *Decision) HasIdentity() bool { return d.Key != nil || d.Holder != (Holder{}) }

// AppendScopes appends the rights in force of a request that is allowed with a key: the key's, capped by
// the policy, separated by spaces; "*" for all.
func (d *Decision) AppendScopes(dst []byte) []byte {
	if d.allowed == nil {
		return d.Key.Scopes.Append(dst)
	}
	var room [apikey.MaxScopes]apikey.Scope
	return d.Key.Scopes.Intersect(room[:0], d.allowed).Append(dst)
}
