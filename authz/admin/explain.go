package admin

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/limits"
)

// Decisions is what decides requests in this process, for who wants to know how. *authz.Authorizer is one.
type Decisions interface {
	Explain(ctx context.Context, in authz.Inquiry) (*authz.Explanation, error)
	LimitsOf(ctx context.Context, k *apikey.Key) ([]authz.Standing, error)
	Recall(id authz.ID) (authz.Refusal, bool)
}

var errDecidesNothing = &StateError{Reason: "this process decides no requests: ask the one that runs keyward serve"}

// A VerifyInput is a request, and whose it is: what would be decided about it?
type VerifyInput struct {
	Secret            string            `json:"secret,omitempty" doc:"Of a key, as X-API-Key would carry it. It is judged, and appears nowhere."`
	KeyID             string            `json:"keyId,omitempty" format:"uuid" doc:"The key in place of its secret: then no credential is looked at."`
	Method            string            `json:"method,omitempty" default:"GET"`
	Host              string            `json:"host,omitempty"`
	Path              string            `json:"path,omitempty" default:"/" doc:"With its query, as it would come over the wire."`
	Headers           []NameValue       `json:"headers,omitempty" doc:"In their order; a name may stand there several times."`
	ContextExtensions map[string]string `json:"contextExtensions,omitempty" doc:"What the route's configuration in Envoy says: instance, agent, environment, required_scopes."`
	Body              *string           `json:"body,omitempty" doc:"Absent: Envoy sends none."`
	ClientAddress     string            `json:"clientAddress,omitempty" doc:"Absent: what the configuration reads from the headers."`
	Time              string            `json:"time,omitempty" format:"date-time" doc:"When the key's life is judged; absent: now. Limits are as they stand now in any case."`
}

// A NameValue is a header.
type NameValue struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

const (
	maxVerifyHeaders = 100
	maxVerifyText    = 16 << 10 // bytes of one text
)

// request makes the request that in describes. Errors: *apikey.InvalidError, several joined.
func (in *VerifyInput) request() (r authz.Request, client netip.Addr, at time.Time, _ error) {
	var bad faults
	if in.Secret != "" && in.KeyID != "" {
		bad.add(apikey.Invalid("keyId", "does not go with secret: give one of them"))
	}
	r = authz.Request{Method: in.Method, Host: in.Host, Path: in.Path}
	if r.Method == "" {
		r.Method = http.MethodGet
	}
	if r.Path == "" {
		r.Path = "/"
	}
	for name, text := range map[string]string{"secret": in.Secret, "method": in.Method, "host": in.Host, "path": in.Path} {
		if len(text) > maxVerifyText {
			bad.add(apikey.Invalid(name, "is longer than 16 KiB"))
		}
	}
	if len(in.Headers) > maxVerifyHeaders {
		bad.add(apikey.Invalid("headers", fmt.Sprintf("are more than %d", maxVerifyHeaders)))
	}
	for i, h := range in.Headers {
		if h.Name == "" || len(h.Name)+len(h.Value) > maxVerifyText {
			bad.add(apikey.Invalid(fmt.Sprintf("headers[%d]", i), "must have a name, and not more than 16 KiB"))
		}
		r.Headers = append(r.Headers, authz.Pair{Name: strings.ToLower(h.Name), Value: h.Value})
	}
	for name, value := range in.ContextExtensions {
		switch name {
		case "instance", "agent", "environment", "required_scopes":
			r.Extensions = append(r.Extensions, authz.Pair{Name: name, Value: value})
		default:
			bad.add(apikey.Invalid("contextExtensions", "may have instance, agent, environment and required_scopes"))
		}
	}
	if in.Body != nil {
		r.Body, r.BodySent = []byte(*in.Body), true
	}
	if in.ClientAddress != "" {
		var err error
		if client, err = netip.ParseAddr(in.ClientAddress); err != nil {
			bad.add(apikey.Invalid("clientAddress", "must be an IP address"))
		}
		client = client.Unmap().WithZone("")
		r.Peer = client.String()
	}
	if in.Time != "" {
		var err error
		at, _, err = parseTime("time", in.Time)
		bad.add(err)
	}
	return r, client, at, bad.err()
}

// A Verification says what would be decided, and step by step why.
type Verification struct {
	Outcome    string     `json:"outcome" enum:"allowed,invalid,unauthenticated,forbidden,limited,undecided"`
	Reason     string     `json:"reason" doc:"none with undecided."`
	HTTPStatus int        `json:"httpStatus" doc:"That Envoy would answer with; 200 for a request that it would let pass."`
	RetryAfter int        `json:"retryAfterSeconds,omitempty"`
	KeyID      *apikey.ID `json:"keyId,omitempty" format:"uuid" doc:"Of the key, where it is known."`
	Route      string     `json:"route,omitempty" doc:"Pattern of the route that the request matched; absent where none did."`
	Steps      []StepDone `json:"steps" nullable:"false" doc:"All of them, in the order in which they are taken."`
	Limits     []KeyLimit `json:"limits,omitempty" doc:"Where the limits of the request stand, if it came to them."`
	Shadowed   string     `json:"shadowed,omitempty" doc:"What would refuse the request if it were not in shadow, separated by commas."`
}

// A StepDone is one step of a decision.
type StepDone struct {
	Step   string `json:"step" enum:"path,route,credential,shape,known,life,place,right,limits,allowed"`
	Answer string `json:"answer" enum:"passed,allowed,refused,undecided,notReached"`
	Detail string `json:"detail,omitempty" doc:"What was looked at."`
}

// A KeyLimit says where one limit of a key stands.
type KeyLimit struct {
	Limit       string    `json:"limit" enum:"instance,quota,burst,concurrency" doc:"As error.limit of a refusal says."`
	Quota       string    `json:"quota,omitempty" doc:"The quota's name."`
	Context     string    `json:"context,omitempty" doc:"Of the quota."`
	CountedBy   string    `json:"countedBy" enum:"instance,principal,key" doc:"Who shares it: all of the instance, one principal, or one key."`
	Most        int64     `json:"most" doc:"Requests that may come at once, units in the window, or requests that may run at once; -1: no limit."`
	Every       string    `json:"every,omitempty" doc:"Of a rate: one more request may come in so long."`
	Window      string    `json:"window,omitempty" doc:"Of a quota, as it is enforced: a duration, day or month."`
	Used        int64     `json:"used"`
	Remaining   int64     `json:"remaining" doc:"Requests that would pass now; -1: no limit."`
	ResetsAt    time.Time `json:"resetsAt,omitzero" doc:"When nothing is used, if nobody comes; absent where nothing is, and of requests that run."`
	LockedUntil time.Time `json:"lockedUntil,omitzero" doc:"Of a quota: the end of its lockout."`
	RefusesFor  float64   `json:"refusesForSeconds,omitempty" doc:"How long a request that comes now would have to wait; absent where there is room."`
	Overridden  bool      `json:"overridden" doc:"The key has its own; false: it is inherited."`
	Shadow      bool      `json:"shadow,omitempty" doc:"Counted, and refuses nothing."`
}

// KeyLimitsNow is every limit that a request with a key can meet.
type KeyLimitsNow struct {
	KeyID   apikey.ID  `json:"keyId" format:"uuid"`
	Limits  []KeyLimit `json:"limits" nullable:"false"`
	Replica string     `json:"replica" doc:"Where they are counted: each replica counts for itself."`
}

// KeyLimitOf makes what people read of where a limit stands at a time. k is whose it is; nil: a caller without a
// key.
func KeyLimitOf(k *apikey.Key, s *authz.Standing, at time.Time) KeyLimit {
	l := KeyLimit{Most: s.Limit, Used: s.Used, Remaining: s.Remaining, Shadow: s.Shadow}
	if s.ResetsIn > 0 && s.Class != limits.ClassConcurrency {
		l.ResetsAt = at.Add(s.ResetsIn).UTC()
	}
	if s.LockedFor > 0 {
		l.LockedUntil = at.Add(s.LockedFor).UTC()
	}
	if s.RefusesFor > 0 && s.RefusesFor != limits.Never {
		l.RefusesFor = s.RefusesFor.Seconds()
	}
	switch s.Class {
	case limits.ClassInstance:
		l.Limit, l.CountedBy = "instance", "instance"
	case limits.ClassBurst:
		l.Limit, l.CountedBy = "burst", "key"
		l.Overridden = k != nil && (k.Limits.Rate != apikey.Rate{} || k.Limits.Burst != 0)
	case limits.ClassConcurrency:
		l.Limit, l.CountedBy = "concurrency", "key"
		l.Overridden = k != nil && k.Limits.MaxConcurrent != 0
	}
	if !s.Rate.IsZero() {
		l.Every = s.Rate.Interval.String()
	}
	if q := s.Quota; q != nil {
		l.Limit, l.Quota, l.Context = "quota", q.Name, q.Context
		l.CountedBy = map[apikey.Partition]string{apikey.PartitionNone: "instance", apikey.PartitionKey: "key"}[q.Partition]
		if l.CountedBy == "" {
			l.CountedBy = "principal"
		}
		switch {
		case s.QuotaLimit.Window > 0:
			l.Window = apikey.Duration(s.QuotaLimit.Window).String()
		default:
			l.Window = string(q.Period)
		}
		if k != nil {
			_, own := k.Quotas[q.Name]
			l.Overridden = own && q.PerKey(k.Type)
		}
	}
	return l
}

func keyLimitsOf(k *apikey.Key, standings []authz.Standing) []KeyLimit {
	at := now()
	list := make([]KeyLimit, len(standings))
	for i := range standings {
		list[i] = KeyLimitOf(k, &standings[i], at)
	}
	return list
}

// LimitsOfKey says where every limit of a key, its principal and its instance stands. It spends nothing.
func (s *Service) LimitsOfKey(ctx context.Context, caller Caller, instanceID string, id apikey.ID) (KeyLimitsNow, error) {
	k, err := s.Key(ctx, caller, instanceID, id)
	switch {
	case err != nil:
		return KeyLimitsNow{}, err
	case s.cfg.Decisions == nil:
		return KeyLimitsNow{}, errDecidesNothing
	}
	standings, err := s.cfg.Decisions.LimitsOf(ctx, k)
	return KeyLimitsNow{KeyID: k.ID, Limits: keyLimitsOf(k, standings), Replica: s.cfg.Replica}, err
}

// keysOf finds the keys of one instance: those of others are as good as unknown.
type keysOf struct {
	store    Reader
	instance string
}

func (f keysOf) FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, error) {
	k, _, err := f.store.FindKey(ctx, d)
	if err == nil && k.InstanceID != f.instance {
		return nil, apikey.ErrNotFound
	}
	return k, err
}

// Verify says what would be decided about a request, and why. Nothing is spent, granted, remembered or
// written down; the secret goes nowhere. A key of another instance is as good as unknown.
func (s *Service) Verify(ctx context.Context, caller Caller, instanceID string, in VerifyInput) (Verification, error) {
	id, err := caller.mayIn(instanceID, verifyKey)
	if err != nil {
		return Verification{}, err
	}
	if _, err := s.store.Instance(ctx, id); err != nil {
		return Verification{}, err
	}
	if s.cfg.Decisions == nil {
		return Verification{}, errDecidesNothing
	}
	r, client, at, err := in.request()
	if err != nil {
		return Verification{}, err
	}
	inquiry := authz.Inquiry{Request: &r, Secret: in.Secret, Client: client, At: at, Keys: keysOf{s.store, id}}
	if in.KeyID != "" {
		keyID, err := apikey.ParseID(in.KeyID)
		if err != nil {
			return Verification{}, apikey.ErrNotFound
		}
		if inquiry.Key, err = s.store.Key(ctx, id, keyID); err != nil {
			return Verification{}, err
		}
	}
	x, err := s.cfg.Decisions.Explain(ctx, inquiry)
	if err != nil {
		return Verification{}, err
	}
	return s.verification(x, inquiry.Key != nil), nil
}

func (s *Service) verification(x *authz.Explanation, given bool) Verification {
	d := &x.Decision
	v := Verification{
		Outcome: d.Outcome().String(), Reason: d.Reason.String(), HTTPStatus: httpStatus(d.Outcome()),
		Limits: keyLimitsOf(d.Key, x.Limits), Shadowed: string(d.Shadowed.Append(nil)), RetryAfter: retrySeconds(d.RetryAfter),
	}
	if d.Key != nil {
		v.KeyID = &d.Key.ID
	}
	if x.Rule != nil {
		v.Route = x.Rule.String()
	}
	var answer string
	switch {
	case x.Undecided != "":
		v.Outcome, v.HTTPStatus, answer = "undecided", http.StatusServiceUnavailable, "undecided"
	case d.Outcome() == authz.Allowed:
		answer = "allowed"
	default:
		answer = "refused"
	}
	v.Steps = stepsUntil(x.Step, answer)
	for i := range v.Steps {
		if v.Steps[i].Answer != "notReached" {
			v.Steps[i].Detail = s.clean(detailOf(authz.Steps()[i], x, given))
		}
	}
	last := &v.Steps[x.Step-1]
	if x.Undecided != "" {
		last.Detail = x.Undecided
	}
	if answer == "refused" {
		last.Detail = strings.TrimSuffix(v.Reason+": "+last.Detail, ": ")
	}
	return v
}

// stepsUntil lists all steps: those before last have passed, those after it were not reached.
func stepsUntil(last authz.Step, answer string) []StepDone {
	var done []StepDone
	for _, step := range authz.Steps() {
		d := StepDone{Step: step.String(), Answer: "passed"}
		switch {
		case step == last:
			d.Answer = answer
		case step > last:
			d.Answer = "notReached"
		}
		done = append(done, d)
	}
	return done
}

// detailOf tells what a step has looked at, in words that hold nothing of the request.
func detailOf(step authz.Step, x *authz.Explanation, given bool) string {
	d, k := &x.Decision, x.Decision.Key
	switch step {
	case authz.StepRoute:
		if x.Rule == nil {
			return "no route matches"
		}
		return fmt.Sprintf("matches %s, mode %s", x.Rule, x.Rule.Mode)
	case authz.StepCredential:
		switch {
		case given:
			return "the key is given: no credential was looked at"
		case d.InQuery:
			return "one stands in the query"
		case d.InAuthorization:
			return "one stands in Authorization"
		case d.CredentialSent:
			return "one stands in a header of ours"
		}
		return "there is none"
	case authz.StepKnown:
		if k == nil {
			return "no key of the instance has this secret"
		}
		return fmt.Sprintf("key %s, of type %s", k.ID, k.Type)
	case authz.StepLife:
		var facts []string
		facts = append(facts, statusOf(k, x.At)+" at "+x.At.UTC().Format(time.RFC3339))
		if !k.NotBefore.IsZero() {
			facts = append(facts, "valid from "+k.NotBefore.UTC().Format(time.RFC3339))
		}
		if !k.ExpirationDate.IsZero() {
			facts = append(facts, "expires "+k.ExpirationDate.UTC().Format(time.RFC3339))
		}
		if k.InactivityDays > 0 {
			facts = append(facts, fmt.Sprintf("expires when unused for %d days", k.InactivityDays))
		}
		return strings.Join(append(facts, fmt.Sprintf("secret number %d", k.Generation)), ", ")
	case authz.StepPlace:
		facts := []string{"the key is for instance " + k.InstanceID}
		if k.AgentName != "" {
			facts = append(facts, "agent "+k.AgentName)
		}
		if k.Environment != "" {
			facts = append(facts, "environment "+k.Environment)
		}
		return strings.Join(facts, ", ")
	case authz.StepRight:
		var facts []string
		if x.Rule != nil && len(x.Rule.Scopes) > 0 {
			facts = append(facts, "the route needs "+strings.Join(x.Rule.Scopes.Strings(), " "))
		}
		if d.MissingScope != "" {
			facts = append(facts, "the key lacks "+string(d.MissingScope))
		}
		if k.AllowedIPs != nil {
			facts = append(facts, fmt.Sprintf("the key may be used from %v, the client is %v", k.AllowedIPs, x.Client))
		}
		return strings.Join(facts, "; ")
	case authz.StepLimits:
		if len(x.Limits) == 0 {
			return "none"
		}
		refuse := slices.DeleteFunc(slices.Clone(x.Limits), func(l authz.Standing) bool { return l.RefusesFor <= 0 || l.Shadow })
		return fmt.Sprintf("%d, of which %d refuse", len(x.Limits), len(refuse))
	}
	return ""
}

// clean shows nothing that could be a secret, wherever it came from.
func (s *Service) clean(text string) string {
	if s.cfg.Format.Within(text) {
		return "[not shown: it holds what looks like a secret]"
	}
	return text
}

func httpStatus(o authz.Outcome) int {
	return map[authz.Outcome]int{
		authz.Allowed: http.StatusOK, authz.Invalid: http.StatusBadRequest, authz.Unauthenticated: http.StatusUnauthorized,
		authz.Forbidden: http.StatusForbidden, authz.Limited: http.StatusTooManyRequests,
	}[o]
}

func retrySeconds(d time.Duration) int {
	if d <= 0 {
		return 0
	}
	return int(math.Ceil(min(d, math.MaxInt32*time.Second).Seconds()))
}

// A RecentRefusal is what is remembered of a request that was refused.
type RecentRefusal struct {
	DecisionID string     `json:"decisionId"`
	At         time.Time  `json:"at"`
	Outcome    string     `json:"outcome" enum:"invalid,unauthenticated,forbidden,limited"`
	Reason     string     `json:"reason"`
	HTTPStatus int        `json:"httpStatus"`
	RetryAfter int        `json:"retryAfterSeconds,omitempty"`
	KeyID      *apikey.ID `json:"keyId,omitempty" format:"uuid" doc:"Of the key, where it was known."`
	Route      string     `json:"route,omitempty"`
	Quota      string     `json:"quota,omitempty" doc:"That refused."`
	Context    string     `json:"context,omitempty" doc:"Of the quota."`
	Steps      []StepDone `json:"steps" nullable:"false"`
	Shadowed   string     `json:"shadowed,omitempty"`
	Replica    string     `json:"replica" doc:"That refused it, and alone remembers it."`
}

// Decision recalls a recent refusal by the id that its answer carried. One of a key of another instance does
// not exist; one without a known key is anybody's who knows its id. Errors: apikey.ErrNotFound also for a
// request that was allowed, refused by another replica, or so long ago that it was forgotten.
func (s *Service) Decision(ctx context.Context, caller Caller, instanceID, decision string) (RecentRefusal, error) {
	id, err := caller.mayIn(instanceID, readDecision)
	if err != nil {
		return RecentRefusal{}, err
	}
	if _, err := s.store.Instance(ctx, id); err != nil {
		return RecentRefusal{}, err
	}
	if s.cfg.Decisions == nil {
		return RecentRefusal{}, errDecidesNothing
	}
	wanted, ok := authz.ParseID(decision)
	if !ok {
		return RecentRefusal{}, apikey.ErrNotFound
	}
	r, ok := s.cfg.Decisions.Recall(wanted)
	if !ok || r.InstanceID != "" && r.InstanceID != id {
		return RecentRefusal{}, apikey.ErrNotFound
	}
	found := RecentRefusal{
		DecisionID: r.ID.String(), At: r.At.UTC(), Outcome: r.Reason.Outcome().String(), Reason: r.Reason.String(),
		HTTPStatus: httpStatus(r.Reason.Outcome()), RetryAfter: retrySeconds(r.RetryAfter), Route: r.Route,
		Steps: stepsUntil(r.Step(), "refused"), Shadowed: string(r.Shadowed.Append(nil)), Replica: s.cfg.Replica,
	}
	if !r.KeyID.IsZero() {
		found.KeyID = &r.KeyID
	}
	if r.Quota != nil {
		found.Quota, found.Context = r.Quota.Name, r.Quota.Context
	}
	return found, nil
}

var _ Decisions = (*authz.Authorizer)(nil)
