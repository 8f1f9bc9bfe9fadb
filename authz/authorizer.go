package authz

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// Keys is what a decision needs to know of keys, and what it needs from whoever keeps them in memory.
type Keys interface {
	// Cached answers from memory and never blocks. ok is false where only FindKey can tell. An unknown
	// digest is apikey.ErrNotFound.
	Cached(d *apikey.Digest) (k *apikey.Key, ok bool, err error)
	// FindKey may ask the store, on behalf of a client at source.
	FindKey(ctx context.Context, d apikey.Digest, source netip.Addr) (*apikey.Key, error)
	// Instance returns an instance by its canonical id, nil if there is none.
	Instance(id string) *apikey.Instance
	// LastUsed returns when a key was last used by any replica, as far as anybody has written it down.
	LastUsed(ctx context.Context, id apikey.ID) (time.Time, error)
	// Serving returns nil while what the others answered may still be relied on.
	Serving() error
}

// Redigests hears of a secret that was found by the digest of the previous pepper. It must not block.
type Redigests interface {
	Redigest(old, current apikey.Digest)
}

// A Settler is Keys that know some keys by a slow hash only: imported Agent Access Tokens whose holder has
// not come yet, which are found by apikey.ID.PendingDigest. [New] looks whether its Keys are one.
type Settler interface {
	// Lacks reports whether nothing had a digest at the moment for which Cached says that secrets are unknown.
	Lacks(d *apikey.Digest) bool
	// Settle finds out whether a token, with that digest, is the secret of a key that was found so, on behalf
	// of a client at source. pending is nil if there was such a key, and is not now.
	//
	// nil means that something has changed: whoever looks again finds it.
	// Errors: apikey.ErrNotFound if it is not; *apikey.BusyError; apikey.ErrUndecided.
	Settle(ctx context.Context, pending *apikey.Key, token *apikey.AgentToken, digest apikey.Digest, source netip.Addr) error
}

// Config is what an operator says about requests. It can be changed while requests are decided.
type Config struct {
	Credentials  Credentials
	Rules        []Rule
	IgnoreCase   bool // of all rules' paths
	DenyUnrouted bool // a request that no rule matches is refused; otherwise it needs a key
	AllowCORS    bool // preflight requests pass without a key
	// LeaseWait is how long a request may wait for another of the same key to end.
	LeaseWait     time.Duration
	ClientAddress ClientAddress
	TrustedHops   int // with ClientXFF: proxies in front of Envoy that are trusted
	JWT           JWT
	// ShowLimits adds to the decisions about allowed requests where their limits stand.
	ShowLimits bool
}

// An Authorizer decides requests. Safe for concurrent use.
type Authorizer struct {
	keys      Keys
	settler   Settler // nil: no key is pending
	limiter   limits.Leaser
	uses      Uses
	peppers   apikey.Peppers
	redigests Redigests
	rules     atomic.Pointer[rules]
	notes     notes
	quotas    quotaSets
	recent    recent
}

// rules is a Config made ready.
type rules struct {
	Config
	routes   *Routes
	headers  []string
	claims   []string
	wantBody bool // of some request
}

// New returns an Authorizer. All of it is needed.
func New(cfg Config, keys Keys, limiter limits.Leaser, peppers apikey.Peppers, uses Uses, redigests Redigests) (*Authorizer, error) {
	a := &Authorizer{keys: keys, limiter: limiter, uses: uses, peppers: peppers, redigests: redigests}
	a.settler, _ = keys.(Settler)
	if err := peppers.Validate(); err != nil {
		return nil, err
	}
	return a, a.Configure(cfg)
}

// Configure replaces the configuration. On error the old one stays.
func (a *Authorizer) Configure(cfg Config) error {
	cfg.Rules = slices.Clone(cfg.Rules)
	for i := range cfg.Rules {
		rule := &cfg.Rules[i]
		rule.pattern = rule.Host + rule.Path
		rule.note = a.notes.number(rule.pattern)
	}
	r, err := prepare(cfg)
	if err != nil {
		return err
	}
	a.rules.Store(r)
	return nil
}

// Validate reports what cannot be meant.
func (c Config) Validate() error {
	_, err := prepare(c)
	return err
}

func prepare(cfg Config) (*rules, error) {
	if err := cfg.Credentials.Format.Validate(); err != nil {
		return nil, err
	}
	if cfg.Credentials.Headers == nil {
		cfg.Credentials.Headers = DefaultCredentialHeaders
	}
	switch cfg.ClientAddress {
	case "":
		cfg.ClientAddress = ClientPeer
	case ClientPeer, ClientExternal, ClientXFF:
	default:
		return nil, apikey.Invalid("client.address", "must be peer, x-envoy-external-address or xff")
	}
	if cfg.TrustedHops < 0 || cfg.TrustedHops > 0 && cfg.ClientAddress != ClientXFF {
		return nil, apikey.Invalid("client.trustedHops", "is a number from 0, and goes with address: xff")
	}
	routes, err := NewRoutes(cfg.Rules, cfg.IgnoreCase)
	if err != nil {
		return nil, err
	}
	if cfg.JWT, err = cfg.JWT.prepare(); err != nil {
		return nil, err
	}
	r := &rules{Config: cfg, routes: routes, claims: cfg.JWT.claimNames()}
	r.wantBody = slices.ContainsFunc(cfg.Rules, func(rule Rule) bool { return rule.ReadsBody() })
	r.headers = slices.Clone(cfg.Credentials.Headers)
	for i, h := range r.headers {
		if h != strings.ToLower(h) || h == "authorization" {
			return nil, apikey.Invalid("credentials.headers", "must be lower-case header names other than authorization")
		}
		if slices.Contains(r.headers[:i], h) {
			return nil, apikey.Invalid("credentials.headers", "names "+h+" twice")
		}
	}
	if q := cfg.Credentials.QueryParameter; strings.Trim(q, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._~-") != "" {
		return nil, apikey.Invalid("credentials.query", "must be of letters, digits, . _ ~ and -, which queries carry as they are")
	}
	if !cfg.Credentials.NoBearer {
		r.headers = append(r.headers, "authorization")
	}
	switch cfg.ClientAddress {
	case ClientExternal:
		r.headers = append(r.headers, "x-envoy-external-address")
	case ClientXFF:
		r.headers = append(r.headers, "x-forwarded-for")
	}
	if cfg.AllowCORS {
		r.headers = append(r.headers, "origin", "access-control-request-method")
	}
	if r.wantBody {
		r.headers = append(r.headers, bodyHeaders...)
	}
	// An adapter that was asked for a header twice would show it twice.
	slices.Sort(r.headers)
	r.headers = slices.Compact(r.headers)
	return r, nil
}

// HeaderNames lists the headers, in lower case, that a decision looks at. Adapters give these and no
// others.
func (a *Authorizer) HeaderNames() []string { return a.rules.Load().headers }

// ExtensionNames lists the context extensions that a decision looks at. Adapters give these and no others.
func (a *Authorizer) ExtensionNames() []string { return extensionNames[:] }

// bodyHeaders tell a request without a body from one whose body Envoy keeps to itself, and a body that is
// another once it is decoded.
var bodyHeaders = []string{"content-length", "transfer-encoding", "content-encoding"}

// WantsBody reports whether a decision may look at a body. Adapters give it only then.
func (a *Authorizer) WantsBody() bool { return a.rules.Load().wantBody }

// ClaimNames lists the claims that a decision looks at, and the name of the payload that has them. Adapters
// give these and no others; none if there are no names.
func (a *Authorizer) ClaimNames() (payload string, names []string) {
	r := a.rules.Load()
	return r.JWT.Payload, r.claims
}

var extensionNames = [...]string{extensionInstance, extensionAgent, extensionEnvironment, extensionScopes}

// The context extensions by which a route's configuration in Envoy says what it wants.
const (
	extensionInstance    = "instance"
	extensionAgent       = "agent"
	extensionEnvironment = "environment"
	extensionScopes      = "required_scopes"
)

// errBlock is how a step says that it cannot go on without waiting.
var errBlock = errors.New("would block")

// Try decides if everything it needs is in memory. ok is false if only [Authorizer.Decide] can decide;
// nothing has been spent then. Errors are those of Decide.
func (a *Authorizer) Try(r *Request, d *Decision) (ok bool, err error) {
	err = a.decide(context.Background(), r, d, false)
	if errors.Is(err, errBlock) {
		return false, nil
	}
	return true, err
}

// Decide decides; it may wait for the store or for room until ctx is done.
//
// Errors: apikey.ErrUndecided, perhaps as an *apikey.BusyError. Then nothing was granted, and what *d
// holds means nothing.
func (a *Authorizer) Decide(ctx context.Context, r *Request, d *Decision) error {
	return a.decide(ctx, r, d, true)
}

func (a *Authorizer) decide(ctx context.Context, r *Request, d *Decision, mayBlock bool) error {
	rules := a.rules.Load()
	*d = Decision{ID: newID(), CredentialHeaders: rules.Credentials.Headers, CredentialQuery: rules.Credentials.QueryParameter}

	x := r.explain
	x.reach(StepPath)
	path, query, scratch, ok := judgePath(r.scratch, r.Path)
	r.scratch = scratch
	if !ok {
		d.Reason = ReasonInvalidPath
		return nil
	}
	x.reach(StepRoute)
	rule := rules.routes.match(&r.match, r.Method, r.Host, path)
	if x != nil {
		x.Rule = rule
	}
	if rule == nil {
		if rules.DenyUnrouted {
			d.Reason = ReasonNoRoute
			return nil
		}
		rule = &anyRequest
	}
	d.route = rule

	// Looked for on every route, because what carries a secret must be removed on every route.
	found := rules.Credentials.find(r, query)
	x.find(&found)
	d.CredentialSent, d.InAuthorization, d.InQuery = found.sent, found.inAuthorization, found.inQuery
	if rule.Mode != Public {
		x.reach(StepCredential)
	}
	switch {
	case found.unremovable:
		d.Reason = ReasonInvalidRequest
		return nil
	case rules.AllowCORS && isPreflight(r):
		d.Reason = ReasonPreflight
		return nil
	case rule.Mode == Public:
		d.Reason = ReasonPublic
		return nil
	case !found.sent && rule.Mode == Optional:
		if d.Holder = rules.JWT.holder(r); d.Holder == (Holder{}) {
			d.Reason = ReasonAnonymous
			return nil
		}
		d.client = r.clientAddr(rules.ClientAddress, rules.TrustedHops)
		return a.decideToken(ctx, r, d, rules, &question{rule: rule, query: query, mayBlock: mayBlock})
	case !found.sent:
		d.Reason = ReasonNoCredential
		return nil
	case found.ambiguous:
		d.Reason = ReasonAmbiguousCredential
		return nil
	}
	x.reach(StepShape)
	var kind apikey.Kind
	if !x.given() {
		if kind, d.Reason = shape(rules.Credentials.Format, found.secret); d.Reason != ReasonNone {
			return nil
		}
	}

	d.client = r.clientAddr(rules.ClientAddress, rules.TrustedHops)
	q := question{rule: rule, query: query, secret: found.secret, kind: kind, client: d.client, mayBlock: mayBlock, at: r.At}
	x.prepare(&q)
	instance, err := a.known(ctx, r, d, &q)
	if err != nil || d.Reason != ReasonNone {
		return err
	}
	waited, err := a.limit(ctx, r, d, rules, &q, instance)
	if err != nil || d.Reason != ReasonNone {
		return err
	}
	if waited {
		// What was true before the wait may have been taken away during it, and whoever took it away has
		// been told that it is gone.
		instance, err = a.known(ctx, r, d, &q)
		if err != nil || d.Reason != ReasonNone {
			a.TakeBack(ctx, d)
			return err
		}
	}
	if err := a.keys.Serving(); err != nil {
		a.TakeBack(ctx, d)
		return err // the process stood still, perhaps for longer than a revocation waits for it
	}
	x.reach(StepAllowed)
	d.Reason = ReasonKey
	d.allowed = instance.Policy.AllowedScopes
	return nil
}

// decideToken decides about a caller whom Envoy knows by a token. What it may do the application says; here
// the quotas of its instance count it.
func (a *Authorizer) decideToken(ctx context.Context, r *Request, d *Decision, rules *rules, q *question) error {
	id := ""
	if d.Reason = eachSource(q.rule.Instance, extensionInstance, r, q.query, ReasonWrongInstance, func(v string) bool {
		if id == "" {
			if canonical, err := apikey.CanonicalInstanceID(v); err == nil {
				id = canonical
			}
		}
		return id != "" && apikey.IsInstance(id, v)
	}, nil); d.Reason != ReasonNone {
		return nil
	}
	if d.Reason = q.findAgent(r, func(string) bool { return true }); d.Reason != ReasonNone {
		return nil
	}
	if id == "" {
		id = rules.JWT.Instance
	}
	if id != "" {
		instance := a.keys.Instance(id)
		if instance == nil {
			d.Reason = ReasonWrongInstance // one that does not exist must not be a way around all quotas
			return nil
		}
		if _, err := a.limit(ctx, r, d, rules, q, instance); err != nil || d.Reason != ReasonNone {
			return err
		}
	}
	d.Reason = ReasonJWT
	return nil
}

// A question is a request that carries a secret of the right shape.
type question struct {
	rule     *Rule
	query    string
	secret   string
	kind     apikey.Kind
	client   netip.Addr
	mayBlock bool
	at       time.Time // when the key's life was judged
	pinned   bool      // at is when it is to be judged
	agent    string    // that the request is for; "": none
}

// known answers who is calling, and whether they may here: life, place and right.
func (a *Authorizer) known(ctx context.Context, r *Request, d *Decision, q *question) (*apikey.Instance, error) {
	x := r.explain
	for range maxLooks {
		x.reach(StepKnown)
		k, err := a.find(ctx, r, q)
		if errors.Is(err, apikey.ErrNotFound) && q.kind == apikey.KindForeign && a.settler != nil {
			if err = a.settle(ctx, r, q); err == nil {
				continue
			}
		}
		if errors.Is(err, apikey.ErrNotFound) {
			// As much as is done for a key that exists and may not be used, so that the time does not tell.
			_, _, _ = a.life(ctx, &nobodys, a.keys.Instance(nobodys.InstanceID), q)
			d.Reason = ReasonUnknownKey
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		d.Key = k
		instance := a.keys.Instance(k.InstanceID)
		if instance == nil {
			// The record is here and its instance is not: the snapshot is a moment behind.
			return nil, fmt.Errorf("instance of key %s is not known yet: %w", k.ID, apikey.ErrUndecided)
		}
		x.reach(StepLife)
		var asked bool
		if d.Reason, asked, err = a.life(ctx, k, instance, q); err != nil || d.Reason != ReasonNone {
			return nil, err
		}
		if asked && x == nil {
			// The store was asked, which takes time: only a record that is still the one in force counts.
			if again, err := a.find(ctx, r, q); err != nil || again != k {
				continue
			}
		}
		x.reach(StepPlace)
		if d.Reason = place(k, q, r); d.Reason != ReasonNone {
			return nil, nil
		}
		x.reach(StepRight)
		d.Reason = right(d, k, instance, q.rule, r, q.client)
		return instance, nil
	}
	return nil, fmt.Errorf("the key changes faster than it can be looked at: %w", apikey.ErrUndecided)
}

const maxLooks = 4

// nobodys is a key that no secret finds. It was revoked, so that its life ends every question about it.
var nobodys = apikey.Key{InstanceID: "00000000-0000-0000-0000-000000000000", RevokedAt: time.Unix(1, 0)}

// shape refuses what cannot be a key, at no cost. A management token is no key.
func shape(format apikey.Format, secret string) (apikey.Kind, Reason) {
	kind, err := format.Check(secret)
	switch {
	case errors.Is(err, apikey.ErrChecksum):
		return 0, ReasonBadChecksum
	case err != nil || kind == apikey.KindManagement:
		return 0, ReasonMalformedCredential
	}
	return kind, ReasonNone
}

// anyRequest is the rule of requests that no rule matches.
var anyRequest Rule

// isPreflight recognises the request that a browser sends before one across origins. It never carries
// credentials.
func isPreflight(r *Request) bool {
	if r.Method != http.MethodOptions {
		return false
	}
	origin, _ := r.header("origin")
	method, _ := r.header("access-control-request-method")
	return origin != "" && method != ""
}

// find looks a secret up by its digest: under the current pepper, and while a rotation lasts under the
// previous one as well.
func (a *Authorizer) find(ctx context.Context, r *Request, q *question) (*apikey.Key, error) {
	if r.explain != nil {
		return r.explain.key(ctx, a, q)
	}
	digest := &r.digests[0] // in the request, where a pointer to it costs no allocation
	*digest = a.peppers.Current.DigestOf(q.kind, q.secret)
	k, ok, err := a.keys.Cached(digest)
	if ok && err == nil {
		return k, nil
	}
	if a.peppers.Previous != nil {
		// Memory is asked about both before anything is read for either: a key that is held under its old
		// digest must not have to wait for news of the new one.
		old := &r.digests[1]
		*old = a.peppers.Previous.DigestOf(q.kind, q.secret)
		before, oldOK, oldErr := a.keys.Cached(old)
		if !oldOK && oldErr == nil && q.mayBlock {
			before, oldErr = a.keys.FindKey(ctx, *old, q.client)
		}
		switch {
		case oldErr == nil && before != nil:
			a.redigests.Redigest(*old, *digest)
			return before, nil
		case oldErr == nil:
			return nil, errBlock
		case !errors.Is(oldErr, apikey.ErrNotFound):
			return nil, oldErr
		}
	}
	switch {
	case ok || err != nil:
		return nil, err
	case !q.mayBlock:
		return nil, errBlock
	}
	return a.keys.FindKey(ctx, *digest, q.client)
}

// life says where in its life the key stands: ReasonNone if it may be used now. asked says that the store
// had to be asked.
func (a *Authorizer) life(ctx context.Context, k *apikey.Key, instance *apikey.Instance, q *question) (reason Reason, asked bool, err error) {
	now := q.at
	if !q.pinned && (q.mayBlock || now.IsZero()) { // time has passed since it was asked about
		now = time.Now()
		q.at = now
	}
	status := k.StatusAt(now)
	switch {
	case status == apikey.StatusRevoked:
		return ReasonRevoked, false, nil
	case status == apikey.StatusDisabled:
		return ReasonDisabled, false, nil
	case instance.Policy.Disabled:
		return ReasonInstanceDisabled, false, nil
	case status == apikey.StatusNotYetValid:
		return ReasonNotYetValid, false, nil
	case status == apikey.StatusExpired:
		return ReasonExpired, false, nil
	case k.GenerationEnded(now):
		return ReasonGenerationEnded, false, nil
	// Idle by the record, whose last use is as old as the record: this replica, or another one, may have
	// served the key since.
	case status == apikey.StatusActive || !k.IdleAt(now, a.uses.Last(k.ID)):
		return ReasonNone, false, nil
	case !q.mayBlock:
		return ReasonNone, false, errBlock
	}
	lastUsed, err := a.keys.LastUsed(ctx, k.ID)
	if err != nil || !k.IdleAt(now, lastUsed) {
		return ReasonNone, true, err
	}
	return ReasonIdle, true, nil
}

// place compares every source that names an instance, an agent or an environment with the key's.
// There is no precedence: each of them has to agree.
func place(k *apikey.Key, q *question, r *Request) Reason {
	if reason := eachSource(q.rule.Instance, extensionInstance, r, q.query, ReasonWrongInstance, func(v string) bool {
		return apikey.IsInstance(k.InstanceID, v)
	}, nil); reason != ReasonNone {
		return reason
	}
	if !q.rule.takes(k.Type) {
		return ReasonWrongType
	}
	if reason := q.findAgent(r, func(v string) bool { return k.Type != apikey.TypeAgent || v == k.AgentName }); reason != ReasonNone {
		return reason
	}
	if q.agent == "" && k.Type == apikey.TypeAgent {
		if q.rule.AgentRequired {
			return ReasonAgentRequired
		}
		if len(q.rule.Agent) > 0 {
			q.agent = k.AgentName // the rule is about agents, and the key is for no other
		}
	}
	return eachSource(q.rule.Environment, extensionEnvironment, r, q.query, ReasonWrongEnvironment, func(v string) bool {
		return k.Environment == "" || v == k.Environment
	}, nil)
}

// findAgent finds out which agent the request names. All that name one have to name the same, also to a key
// that may use each: the application will take one of them, and nobody knows which.
func (q *question) findAgent(r *Request, agrees func(string) bool) Reason {
	q.agent = ""
	if reason := eachSource(q.rule.Agent, extensionAgent, r, q.query, ReasonWrongAgent, agrees, &q.agent); reason != ReasonNone {
		return reason
	}
	if q.agent == "" && q.rule.AgentNeeded {
		return ReasonAgentMissing
	}
	return ReasonNone
}

// eachSource judges every value that a rule's sources and Envoy's context extension give for one name. same,
// if not nil, holds what the first named, and every other has to be.
func eachSource(sources []Source, extension string, r *Request, query string, wrong Reason, agrees func(string) bool, same *string) Reason {
	judge := func(value string) Reason {
		switch {
		case value == "":
			return ReasonInvalidRequest
		case !agrees(value):
			return wrong
		case same == nil:
		case *same == "":
			*same = value
		case *same != value:
			return ReasonInvalidRequest
		}
		return ReasonNone
	}
	for i := range sources {
		value, present, ok := sources[i].value(r, query)
		if !ok && sources[i].from == fromBody {
			return ReasonInvalidBody
		}
		if !ok {
			return ReasonInvalidRequest
		}
		if !present {
			continue
		}
		if reason := judge(value); reason != ReasonNone {
			return reason
		}
	}
	for _, e := range r.Extensions {
		if e.Name == extension {
			if reason := judge(e.Value); reason != ReasonNone {
				return reason
			}
		}
	}
	return ReasonNone
}

// right asks for every required scope, from the key and from its instance's policy, and for the
// client's address.
func right(d *Decision, k *apikey.Key, instance *apikey.Instance, rule *Rule, r *Request, client netip.Addr) Reason {
	missing := func(want apikey.Scope) bool {
		if k.Scopes.Cover(want) && instance.Policy.AllowedScopes.Cover(want) {
			return false
		}
		d.MissingScope = want
		if rule.Shadow || instance.Policy.Shadow.Scopes {
			d.Shadowed |= ShadowedScopes
			return false
		}
		return true
	}
	for _, want := range rule.Scopes {
		if missing(want) {
			return ReasonMissingScope
		}
	}
	for _, e := range r.Extensions {
		if e.Name != extensionScopes {
			continue
		}
		for rest := e.Value; rest != ""; {
			var word string
			word, rest = cutWord(rest)
			if word != "" && missing(apikey.Scope(word)) {
				return ReasonMissingScope
			}
		}
	}
	if k.AllowedIPs != nil && !slices.ContainsFunc(k.AllowedIPs, func(p netip.Prefix) bool { return p.Contains(client) }) {
		if !instance.Policy.Shadow.AllowedIPs {
			return ReasonAddress
		}
		d.Shadowed |= ShadowedAddresses
	}
	return ReasonNone
}

// cutWord cuts at the first space or comma.
func cutWord(s string) (word, rest string) {
	if i := strings.IndexAny(s, " ,"); i >= 0 {
		return s[:i], s[i+1:]
	}
	return s, ""
}

// TakeBack ends the lease of a decision that nobody will act on, if that decision granted it: a Check that
// was asked twice has one lease. What it spent otherwise stays spent.
func (a *Authorizer) TakeBack(ctx context.Context, d *Decision) {
	if !d.Leased {
		return
	}
	d.Leased = false
	if d.repeated {
		return // whoever was granted it first may run
	}
	// The lease is given back because ctx may be done; giving back must not depend on it. A limiter that
	// cannot be reached lets the lease run out.
	_ = a.limiter.End(context.WithoutCancel(ctx), []limits.Ending{{Lease: d.Lease, Cause: limits.CauseContext}})
}

// appendRates appends the rates that a request with the key must pass.
func appendRates(rates []limits.RateDemand, k *apikey.Key, instance *apikey.Instance, inForce apikey.Limits) []limits.RateDemand {
	if total := limits.RateOf(instance.Policy.Total); !total.IsZero() {
		var room [64]byte
		owner := sha256.Sum256(append(room[:0], instance.ID...))
		rates = append(rates, limits.RateDemand{
			Cell: limits.Cell{Owner: [16]byte(owner[:16]), Class: limits.ClassInstance}, Rate: total,
			Shadow: instance.Policy.Shadow.Total,
		})
	}
	if rate := limits.RateOf(inForce); !rate.IsZero() {
		rates = append(rates, limits.RateDemand{
			Cell: limits.Cell{Owner: k.ID, Class: limits.ClassBurst}, Rate: rate,
			Shadow: instance.Policy.Shadow.Rate,
		})
	}
	return rates
}

// limit judges and spends. waited says that it took long enough for other things to have changed.
func (a *Authorizer) limit(ctx context.Context, r *Request, d *Decision, rules *rules, q *question, instance *apikey.Instance) (waited bool, err error) {
	demand := &r.demand // in the request, as the digests are
	*demand = limits.Demand{}
	if k := d.Key; k != nil {
		inForce := instance.Policy.LimitsOf(k)
		demand.Rates = appendRates(r.rates[:0], k, instance, inForce)
		if inForce.MaxConcurrent > 0 {
			demand.Lease = limits.LeaseDemand{
				Lease: limits.Lease{Cell: LeaseCell(k.ID), Identity: r.Identity, HTTP: r.HTTP},
				Limit: int64(inForce.MaxConcurrent), Wait: rules.LeaseWait,
				Connection: r.Connection, Note: note(q.rule, r.Method),
				Shadow: instance.Policy.Shadow.MaxConcurrent,
			}
		}
	}
	d.Agent, d.InstanceID = q.agent, instance.ID
	a.appendQuotas(r, d, q, instance)
	demand.Quotas = r.quotas
	var answer limits.Decision
	ok := r.explain != nil
	if ok {
		r.explain.reach(StepLimits)
		answer, err = a.judge(ctx, r)
	} else {
		answer, ok = a.limiter.TryTake(demand)
	}
	if err != nil {
		return false, err
	}
	if !ok {
		if !q.mayBlock {
			return false, errBlock
		}
		if answer, err = a.limiter.Take(ctx, demand); err != nil {
			return false, err
		}
	}
	d.Shadowed |= Shadowed(answer.Shadowed)
	if answer.Allowed && r.explain != nil {
		return false, nil
	}
	if answer.Allowed {
		d.Leased, d.Lease, d.repeated = demand.Lease.Limit > 0, demand.Lease.Lease, answer.Repeated
		if rules.ShowLimits {
			a.look(ctx, r, d)
		}
		return answer.Waited > 0, nil
	}
	d.Reason, d.Limit, d.RetryAfter = limitReasons[answer.Class], answer.Class, answer.RetryAfter
	switch answer.Class {
	case limits.ClassConcurrency:
		d.Concurrent = demand.Lease.Limit
	case limits.ClassGlobalQuota, limits.ClassPrincipalQuota, limits.ClassKeyQuota:
		d.Quota, d.QuotaLimit = r.inForce[answer.Quota], r.quotas[answer.Quota].Quota
	}
	for i := range demand.Rates {
		if demand.Rates[i].Cell.Class == answer.Class {
			d.Rate = demand.Rates[i].Rate
		}
	}
	return false, nil
}

// look says in d where the limits of the request's demand stand, but for those in shadow. That they cannot be
// seen is no reason to refuse anybody.
func (a *Authorizer) look(ctx context.Context, r *Request, d *Decision) {
	seen, err := a.standings(ctx, r, r.standings[:0])
	r.standings = slices.DeleteFunc(seen, func(s Standing) bool { return s.Shadow })
	if err == nil {
		d.Standings = r.standings
	}
}
