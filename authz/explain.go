package authz

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// A Step is a step of a decision, in the order in which they are taken: the first that fails answers.
type Step uint8

// The steps.
const (
	StepPath Step = iota + 1
	StepRoute
	StepCredential
	StepShape
	StepKnown
	StepLife
	StepPlace
	StepRight
	StepLimits
	StepAllowed
)

var steps = [...]string{
	StepPath: "path", StepRoute: "route", StepCredential: "credential", StepShape: "shape", StepKnown: "known",
	StepLife: "life", StepPlace: "place", StepRight: "right", StepLimits: "limits", StepAllowed: "allowed",
}

func (s Step) String() string { return steps[s] }

// Steps lists all steps in their order.
func Steps() []Step {
	list := make([]Step, 0, len(steps)-1)
	for s := StepPath; s <= StepAllowed; s++ {
		list = append(list, s)
	}
	return list
}

// Finder finds keys for whoever explains. Nothing that it answers may be remembered for requests.
type Finder interface {
	// FindKey returns the key of a digest. Errors: apikey.ErrNotFound; anything else is an outage.
	FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, error)
}

// An Inquiry asks what would be decided.
type Inquiry struct {
	Request *Request // of which Peer may be empty
	// Key is whose request it is, whatever secret that carries; nil: that of the secret.
	Key *apikey.Key
	// Secret is sent as one of our headers carries it, beside what the request carries; "" for none.
	Secret string
	// Keys finds the key of the secret.
	Keys Finder
	// Client is where the request comes from; the zero Addr: what the configuration reads from the request.
	Client netip.Addr
	// At is when the key's life is judged; zero: now. Limits are as they stand now in any case.
	At time.Time
}

// An Explanation is a decision that nobody acts on, and what it was made of.
type Explanation struct {
	Decision Decision
	Step     Step  // the last one that was taken: it has decided
	Rule     *Rule // that the request matched; nil: none
	Client   netip.Addr
	At       time.Time // when the key's life was judged; zero where it was not
	Limits   []Standing
	// Undecided says why there is no decision; "" if there is one.
	Undecided string

	inquiry *Inquiry
}

// Explain decides as [Authorizer.Decide] does, and by the same code, but for what it must not do: nothing is
// spent, granted, locked, remembered or written down, and no key is used by it.
//
// Errors: apikey.ErrUndecided.
func (a *Authorizer) Explain(ctx context.Context, in Inquiry) (*Explanation, error) {
	x := &Explanation{inquiry: &in, Client: in.Client, At: in.At}
	in.Request.explain = x
	defer func() { in.Request.explain = nil }()
	err := a.decide(ctx, in.Request, &x.Decision, true)
	if unsettled, ok := errors.AsType[*unsettledError](err); ok {
		x.Undecided = unsettled.Error()
		return x, nil
	}
	return x, err
}

// reach notes that a step is taken. The methods of an Explanation do nothing for a nil one: almost every
// decision is explained to nobody.
func (x *Explanation) reach(s Step) {
	if x != nil {
		x.Step = s
	}
}

// given reports whether the key is given, so that no credential is looked at.
func (x *Explanation) given() bool { return x != nil && x.inquiry.Key != nil }

// prepare tells a question what the inquiry says.
func (x *Explanation) prepare(q *question) {
	if x == nil {
		return
	}
	if x.Client.IsValid() {
		q.client = x.Client
	}
	x.Client = q.client
	if q.at = x.At; q.at.IsZero() {
		q.at = time.Now()
		x.At = q.at
	}
	q.pinned = true
}

// find adds to what the request carries what the inquiry says.
func (x *Explanation) find(found *credential) {
	switch {
	case x == nil:
	case x.given():
		*found = credential{sent: true}
	case x.inquiry.Secret != "":
		if strings.ContainsAny(x.inquiry.Secret, ", \t") {
			found.sent, found.ambiguous = true, true
			return
		}
		found.add(x.inquiry.Secret)
	}
}

// key is where the key comes from.
func (x *Explanation) key(ctx context.Context, a *Authorizer, q *question) (*apikey.Key, error) {
	if k := x.inquiry.Key; k != nil {
		return withGeneration(k, q.at), nil
	}
	for _, pepper := range []*apikey.Pepper{a.peppers.Current, a.peppers.Previous} {
		if pepper == nil {
			continue
		}
		k, err := x.inquiry.Keys.FindKey(ctx, pepper.DigestOf(q.kind, q.secret))
		if err == nil || !errors.Is(err, apikey.ErrNotFound) {
			return k, err
		}
	}
	return nil, apikey.ErrNotFound
}

// withGeneration returns k as the newest of its secrets that is not over finds it.
func withGeneration(k *apikey.Key, at time.Time) *apikey.Key {
	found := *k
	if newest := k.Newest(); newest != nil {
		found.Generation = newest.Number
	}
	best := 0
	for i := range k.Generations {
		if g := &k.Generations[i]; !g.EndedAt(at) && g.Number > best {
			best = g.Number
			found.Generation = best
		}
	}
	return &found
}

// An unsettledError says that only a request can decide.
type unsettledError struct{ id apikey.ID }

func (e *unsettledError) Error() string {
	return fmt.Sprintf("the token names the imported key %s, of which nobody has used a token yet: its first use is judged by a slow hash, and is not tried here", e.id)
}

// settle tells a token that would be judged by a slow hash from one that is nobody's. Errors:
// apikey.ErrNotFound, *unsettledError.
func (x *Explanation) settle(ctx context.Context, q *question) error {
	token, err := apikey.ParseAgentToken(q.secret)
	if err != nil {
		return apikey.ErrNotFound
	}
	k, err := x.inquiry.Keys.FindKey(ctx, token.KeyID.PendingDigest())
	if err != nil {
		return err
	}
	if k.InstanceID != token.InstanceID || !strings.EqualFold(k.AgentName, token.AgentName) {
		return apikey.ErrNotFound
	}
	return &unsettledError{k.ID}
}

// judge is limiting without spending.
func (a *Authorizer) judge(ctx context.Context, r *Request) (limits.Decision, error) {
	var err error
	if r.explain.Limits, err = a.standings(ctx, r, nil); err != nil {
		return limits.Decision{}, err
	}
	seen := make([]limits.Standing, len(r.explain.Limits))
	for i := range seen {
		seen[i] = r.explain.Limits[i].Standing
	}
	return limits.Judge(seen), nil
}

// standings appends where the limits of the request's demand stand.
func (a *Authorizer) standings(ctx context.Context, r *Request, into []Standing) ([]Standing, error) {
	var room [8]limits.Standing
	seen, err := a.limiter.Look(ctx, &r.demand, room[:0])
	if err != nil {
		return into, err
	}
	for _, s := range seen {
		standing := Standing{Standing: s}
		switch s.Class {
		case limits.ClassGlobalQuota, limits.ClassPrincipalQuota, limits.ClassKeyQuota:
			standing.Quota, standing.QuotaLimit = r.inForce[s.Quota], r.quotas[s.Quota].Quota
		}
		for i := range r.demand.Rates {
			if r.demand.Rates[i].Cell.Class == s.Class {
				standing.Rate = r.demand.Rates[i].Rate
			}
		}
		into = append(into, standing)
	}
	return into, nil
}

// LimitsOf says where every limit that a request with the key can meet stands: those of the key, of its
// principal and of its instance, whatever the context. A quota that the key is exempt from has
// [apikey.Unlimited] as its Limit. Nothing is spent.
//
// Errors: apikey.ErrUndecided.
func (a *Authorizer) LimitsOf(ctx context.Context, k *apikey.Key) ([]Standing, error) {
	instance := a.keys.Instance(k.InstanceID)
	if instance == nil {
		return nil, fmt.Errorf("instance of key %s is not known yet: %w", k.ID, apikey.ErrUndecided)
	}
	return a.limitsOf(ctx, k, instance)
}

func (a *Authorizer) limitsOf(ctx context.Context, k *apikey.Key, instance *apikey.Instance) ([]Standing, error) {
	var r Request
	d, q := Decision{Key: k}, question{rule: &anyRequest}
	inForce := instance.Policy.LimitsOf(k)
	r.demand.Rates = appendRates(nil, k, instance, inForce)
	if most := int64(inForce.MaxConcurrent); most > 0 {
		r.demand.Lease = limits.LeaseDemand{
			Lease: limits.Lease{Cell: LeaseCell(k.ID)}, Limit: most, Shadow: instance.Policy.Shadow.MaxConcurrent,
		}
	}
	var exempt []Standing
	for i := range instance.Quotas {
		of := &instance.Quotas[i]
		if agent := of.Agent(); agent != "" && k.Type == apikey.TypeAgent && agent != k.AgentName {
			continue // no request of the key has that context
		}
		if of.LimitOf(k) == apikey.Unlimited {
			exempt = append(exempt, Standing{Quota: of, Standing: limits.Standing{
				Class: classOf(of.Partition), Limit: apikey.Unlimited, Remaining: apikey.Unlimited, Shadow: of.Shadow,
			}})
			continue
		}
		r.appendQuotas([]quota{{of, newQuotaCell(instance.ID, of), limits.QuotaOf(of, of.Limit)}}, &d, &q)
	}
	r.demand.Quotas = r.quotas
	list, err := a.standings(ctx, &r, nil)
	return append(list, exempt...), err
}
