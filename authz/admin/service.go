package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"keyward/authz/apikey"
)

// A Service does what callers ask, if they may. Safe for concurrent use.
//
// Errors of its methods: *apikey.InvalidError for an input that cannot be accepted (several at once
// joined), *ForbiddenError, apikey.ErrNotFound, apikey.ErrConflict, [ErrInUse], [ErrPrecondition],
// *[StateError], *[QuotaExceededError], *[RateError], *[ConfirmError]; anything else is an outage and
// wraps apikey.ErrUndecided, *[PartialError] among it.
type Service struct {
	store    Store
	cfg      Config
	replicas Propagator
	log      *slog.Logger
	leaks    leaks
	audit    AuditKeys
	refusals refusals
	uses     tokenUses
	verifies sync.Mutex // held while the audit is verified, and while old events are removed
}

// Config says how the service makes secrets and finds them.
type Config struct {
	Format  apikey.Format
	Peppers apikey.Peppers // Current is needed
	Leases  Leases         // nil in a process that answers no Checks
	// Decisions is nil in a process that answers no Checks, Replica its name in any other.
	Decisions Decisions
	Replica   string
	OIDC      *OIDC // nil: management tokens only
	// Webhook is told of alerts and of leaked keys; nil: nobody is.
	Webhook Webhook
	// AuditKeep is how long audit events are kept at least; 0: for good.
	AuditKeep time.Duration
	// UsageKeep is how long the counts of each interval are kept; those of one that it does not name for good.
	UsageKeep map[UsageInterval]time.Duration
}

// A Propagator is the cache of this process. CatchUp returns when it serves nothing older than a
// revision and the store knows that; an error means that it could not be done before ctx was done.
type Propagator interface {
	CatchUp(ctx context.Context, rev apikey.Revision) error
}

// New makes a service. replicas is nil in a process that answers no Checks.
func New(store Store, cfg Config, replicas Propagator, log *slog.Logger) *Service {
	return &Service{store: store, cfg: cfg, replicas: replicas, log: log, leaks: newLeaks(), audit: NewAuditKeys(cfg.Peppers)}
}

// A Caller is who asks. Whoever makes one vouches for it: [Service.Authenticate] does for a token.
type Caller struct {
	// Name is who it is, and never anybody else's: "token:" and the token's id, "oidc:" with issuer and subject,
	// or a process such as "keyward dev". It is not what a token or a person is called, so creations, replays
	// and the audit go by it.
	Name       string
	Role       Role
	InstanceID string // canonical; "": all instances
	// UserPrincipalName is whose keys a caller with the role user has to do with: no others exist for it.
	UserPrincipalName string
	RemoteAddr        string // "" for the process itself
	RequestID         string
	Once              *Once    // nil: a request without an Idempotency-Key
	Attempt           *Attempt // nil: nobody wants to know

	shown *credential // nil: nothing that could be over
}

// A credential is what a caller showed: a management token, by its digest, or something that ends by itself; and the
// session that began with it.
type credential struct {
	token   apikey.Digest
	until   time.Time // zero with a token
	session SessionID // zero outside the portal
}

// An Attempt is what a caller tried, as far as that was found out before it was refused.
type Attempt struct {
	Action     string // "": nothing that needs a right
	InstanceID string // canonical; "" where no instance is concerned, or no such one can be
	Foreign    bool   // it is not the caller's, who is told that it does not exist
}

// What can be done. The names of what changes something are those of the audit.
const (
	readInstances  = "instance.read"
	putInstance    = "instance.put"
	deleteInstance = "instance.delete"
	readQuotas     = "quota.read"
	putQuota       = "quota.put"
	deleteQuota    = "quota.delete"
	readKeys       = "key.read"
	createKey      = "key.create"
	updateKey      = "key.update"
	disableKey     = "key.disable"
	enableKey      = "key.enable"
	rotateKey      = "key.rotate"
	revokeKey      = "key.revoke"
	revokeOneOfKey = "key.revokeGeneration"
	importKeys     = "key.import"
	exportKeys     = "key.export"
	// What nobody asks for: it happens.
	expireKey = "key.expire"
	removeKey = "key.remove"
	leakKey   = "key.leak"
	settleKey = "key.settle"

	verifyKey    = "key.verify"
	readDecision = "decision.read"
	readTokens   = "token.read"
	createToken  = "token.create"
	revokeToken  = "token.revoke"
	readPeppers  = "pepper.read"
	retirePepper = "pepper.retire"
	readInFlight = "inflight.read"
	endInFlight  = "inflight.end"
	readAudit    = "audit.read"
	removeAudit  = "audit.remove"
	authenticate = "authenticate"
)

// may is the one place that says which role may do what.
var may = map[string][]Role{
	readInstances:  {RoleOwner, RoleOperator, RoleAuditor},
	putInstance:    {RoleOwner, RoleOperator},
	deleteInstance: {RoleOwner},
	readQuotas:     {RoleOwner, RoleOperator, RoleAuditor},
	putQuota:       {RoleOwner, RoleOperator},
	deleteQuota:    {RoleOwner, RoleOperator},
	readKeys:       {RoleOwner, RoleOperator, RoleAuditor, RoleUser}, // RoleUser: where owns says so
	createKey:      {RoleOwner, RoleOperator, RoleUser},
	updateKey:      {RoleOwner, RoleOperator, RoleUser},
	rotateKey:      {RoleOwner, RoleOperator, RoleUser},
	revokeKey:      {RoleOwner, RoleOperator, RoleUser},
	importKeys:     {RoleOwner, RoleOperator},
	exportKeys:     {RoleOwner, RoleOperator, RoleAuditor},
	verifyKey:      {RoleOwner, RoleOperator},
	readDecision:   {RoleOwner, RoleOperator, RoleAuditor},
	readTokens:     {RoleOwner, RoleAuditor},
	createToken:    {RoleOwner},
	revokeToken:    {RoleOwner},
	readPeppers:    {RoleOwner, RoleAuditor},
	retirePepper:   {RoleOwner},
	endSessions:    {RoleOwner},
	readInFlight:   {RoleOwner, RoleOperator, RoleAuditor},
	endInFlight:    {RoleOwner, RoleOperator},
	readAudit:      {RoleOwner, RoleAuditor},
	readAlerts:     {RoleOwner, RoleOperator, RoleAuditor},
	ackAlert:       {RoleOwner, RoleOperator},
	testAlerts:     {RoleOwner, RoleOperator},
	readUsage:      {RoleOwner, RoleOperator, RoleAuditor, RoleUser}, // RoleUser: of the keys it owns
}

// A ForbiddenError says that the caller may not do this, or not with this value.
type ForbiddenError struct {
	Field  string // of the input; "" where it is not about one
	Reason string
}

func (e *ForbiddenError) Error() string {
	if e.Field == "" {
		return e.Reason
	}
	return e.Field + ": " + e.Reason
}

var (
	// ErrInUse: the instance still has keys that work.
	ErrInUse = errors.New("the instance has usable keys")
	// ErrPrecondition: what was to be changed has changed since the caller looked.
	ErrPrecondition = errors.New("changed by somebody else since it was read")
	// errNothing ends a transaction that has nothing to do.
	errNothing = errors.New("nothing to do")
)

// A StateError says that a key cannot be changed so, as it is.
type StateError struct {
	Reason string // e.g. "the key is revoked"
}

func (e *StateError) Error() string { return e.Reason }

// A QuotaExceededError says that there may not be another key.
type QuotaExceededError struct {
	Cap   string // instance, user or agent
	Limit int    // how many there may be
	Used  int    // how many there are
}

func (e *QuotaExceededError) Error() string {
	whose := "of this " + e.Cap
	return fmt.Sprintf("all keys %s are used: %d of %d. Revoke one that nobody needs, or raise policy.caps.%s", whose, e.Used, e.Limit, e.Cap)
}

// A RateError says that something was asked for too often.
type RateError struct {
	What       string        // e.g. "keys were made in this instance"
	Limit      int           // how many may be
	Per        time.Duration // in what time
	RetryAfter time.Duration // at least a second: when the next one may be
}

func (e *RateError) Error() string {
	return fmt.Sprintf("%d %s within %s, which is the most: try again in %s", e.Limit, e.What,
		apikey.Duration(e.Per), apikey.Duration(e.RetryAfter.Round(time.Second)))
}

func (c Caller) may(action string) error {
	if c.Attempt != nil {
		c.Attempt.Action = action
	}
	switch {
	case !slices.Contains(may[action], c.Role):
		return &ForbiddenError{Reason: fmt.Sprintf("the role %s has no right to %s", c.Role, action)}
	case c.Role == RoleUser && c.UserPrincipalName == "":
		return &ForbiddenError{Reason: "the role user needs a user principal name, and the caller has none"}
	}
	return nil
}

// mayAll is for what concerns all instances: to a caller of one it does not exist.
func (c Caller) mayAll(action string) error {
	if c.InstanceID != "" {
		c.foreign(action, "")
		return apikey.ErrNotFound
	}
	return c.may(action)
}

// mayIn returns the canonical id of the instance that the caller may do action in. To a caller of one
// instance all others look as if they did not exist, whatever its role, and so do ids that none can have.
func (c Caller) mayIn(instanceID, action string) (string, error) {
	id, err := apikey.CanonicalInstanceID(instanceID)
	if err != nil || c.InstanceID != "" && id != c.InstanceID {
		c.foreign(action, id)
		return "", apikey.ErrNotFound
	}
	if c.Attempt != nil {
		c.Attempt.InstanceID = id
	}
	return id, c.may(action)
}

// foreign notes an attempt at what does not exist for the caller.
func (c Caller) foreign(action, instanceID string) {
	if c.Attempt != nil {
		*c.Attempt = Attempt{Action: action, InstanceID: instanceID, Foreign: c.InstanceID != ""}
	}
}

// owns reports whether a key is the caller's to see and to change: to a user, its own alone.
func (c Caller) owns(k *apikey.Key) bool {
	return c.Role != RoleUser || k.Type == apikey.TypeUser && k.UserPrincipalName == c.UserPrincipalName
}

// event makes an audit event of the caller's. before and after are marshalled; nil where there is none.
func (c Caller) event(action, instanceID, target string, before, after any) (Event, error) {
	e := Event{
		At: now(), Actor: c.Name, RemoteAddr: c.RemoteAddr, RequestID: c.RequestID,
		Action: action, InstanceID: instanceID, Target: target,
	}
	var err error
	for _, side := range []struct {
		to   *json.RawMessage
		from any
	}{{&e.Before, before}, {&e.After, after}} {
		if side.from == nil {
			continue
		}
		if *side.to, err = json.Marshal(side.from); err != nil {
			return Event{}, fmt.Errorf("audit %s: %w", action, err)
		}
	}
	return e, nil
}

// audit writes one event of the caller's.
func (c Caller) audit(ctx context.Context, tx Tx, action, instanceID, target string, before, after any) error {
	e, err := c.event(action, instanceID, target, before, after)
	if err != nil {
		return err
	}
	return tx.Audit(ctx, e)
}

// now is the time as records keep it: what a caller is told at once is what a later look finds.
func now() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }

const updateTimeout = 10 * time.Second

type credentialKey struct{}

// WithCredential makes every change with the context depend on what the caller showed to [Service.Authenticate]:
// the transaction that makes the change looks at it once more. A request may be long on its way, and wait
// long for its turn, and what the caller showed may be revoked or over meanwhile: then it changes nothing.
func WithCredential(ctx context.Context, caller Caller) context.Context {
	return context.WithValue(ctx, credentialKey{}, caller.shown)
}

// stillGood returns ErrUnauthenticated if what the caller of [WithCredential] showed is good no more.
func stillGood(ctx context.Context, from Reader) error {
	shown, _ := ctx.Value(credentialKey{}).(*credential)
	if shown == nil {
		return nil
	}
	if shown.session != (SessionID{}) {
		if _, err := from.Session(ctx, shown.session); isNotFound(err) {
			return ErrUnauthenticated
		} else if err != nil {
			return err
		}
	}
	at := time.Now()
	switch {
	case !shown.until.IsZero() && !at.After(shown.until):
		return nil
	case !shown.until.IsZero():
		return ErrUnauthenticated
	}
	t, err := from.Token(ctx, shown.token)
	if isNotFound(err) || err == nil && t.statusAt(at) != "active" {
		return ErrUnauthenticated
	}
	return err
}

// update runs fn in one transaction, for whom [WithCredential] names if that still may.
func (s *Service) update(ctx context.Context, fn func(ctx context.Context, tx Tx) error) (apikey.Revision, error) {
	return s.write(ctx, func(ctx context.Context, tx Tx) error {
		if err := stillGood(ctx, tx); err != nil {
			return err
		}
		return fn(ctx, tx)
	})
}

// write runs fn in one transaction, whoever asked.
func (s *Service) write(ctx context.Context, fn func(ctx context.Context, tx Tx) error) (apikey.Revision, error) {
	// A caller that goes away must not cut a commit short: nobody would know whether it happened.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), updateTimeout)
	defer cancel()
	return s.store.Update(ctx, func(tx Tx) error { return fn(ctx, tx) })
}
