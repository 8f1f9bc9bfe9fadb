package admin

import (
	"context"
	"encoding/json"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// A Store keeps instances, keys, tokens and audit for good. What was acknowledged survives a crash of
// the process at any moment. Times come back in UTC, to the microsecond, rounded down; what is nil and
// what is empty stay apart. Safe for concurrent use.
//
// Errors: apikey.ErrNotFound where a single thing was asked for; apikey.ErrConflict where a unique name
// or digest is taken; anything else is an outage and wraps apikey.ErrUndecided, and ctx's error if it
// was that. None carries a digest. storetest is the contract in full.
type Store interface {
	Reader
	UsageStore
	KeysUsageStore
	AlertStore
	SessionStore

	// Update runs fn in one transaction. If fn returns nil and wrote at least one audit event, the
	// transaction commits with a new revision, which Update returns; every reader that starts after
	// that sees it. fn may run again after a lost race, so it has no effects outside tx; it must not
	// keep tx, nor call Update. An error of fn comes back as it is, and nothing was changed; the same
	// if it panics. Without an audit event Update refuses: no audit, no mutation. That error is a bug
	// of fn, not an outage.
	//
	// After an outage inside fn, a done ctx included, the transaction is over whatever fn makes of it.
	// An error of the commit itself leaves unknown whether it happened: look before trying again.
	Update(ctx context.Context, fn func(tx Tx) error) (apikey.Revision, error)

	// Touch records uses, in any order and batch: a last use only grows. It is no mutation: no
	// revision, no audit. Keys that are gone are skipped.
	Touch(ctx context.Context, uses []apikey.Use) error
	// Redigest gives generations that are found by Old under the pepper of an earlier version the digest
	// New under version Version; both find them until the earlier pepper is retired. Generations that no
	// longer have Old are skipped. No mutation either.
	Redigest(ctx context.Context, batch []Redigest) error
	// TouchTokens is Touch for management tokens.
	TouchTokens(ctx context.Context, uses []TokenUse) error
	// SealAudit chains the events of a store from before there was a chain, and gives the segments whose MAC
	// is right, and of an earlier pepper, one of the current pepper, so that the earlier one can be
	// forgotten. No mutation either.
	SealAudit(ctx context.Context) error
	// ForgetReplays removes what KeepReplay kept and has run out at now. Backups are made without any of it.
	ForgetReplays(ctx context.Context, now time.Time) error

	// SaveQuotaStates keeps what long quotas have counted, in batches, each state in place of an older one of its
	// cell. Counts have a byte at least. No mutation either.
	SaveQuotaStates(ctx context.Context, states []limits.QuotaState) error
	// QuotaStates calls yield with every state that still says something at now (Until after now), in no
	// order, until it returns false. yield must not call the store.
	QuotaStates(ctx context.Context, now time.Time, yield func(limits.QuotaState) bool) error
	// ForgetQuotaStates removes what says nothing any more at now.
	ForgetQuotaStates(ctx context.Context, now time.Time) error

	// Register makes a replica known: from now on revocations wait for it. It is known until ttl after
	// its last Register or Confirm, by the store's clock.
	Register(ctx context.Context, replica string, at apikey.Revision, ttl time.Duration) error
	// Confirm says that the replica serves nothing older than a revision, and renews it. What is
	// confirmed only grows, until the replica registers anew.
	// Errors: apikey.ErrNotFound if the replica is no longer known; it must register anew.
	Confirm(ctx context.Context, replica string, at apikey.Revision, ttl time.Duration) error
	// Unregister forgets a replica that stopped serving.
	Unregister(ctx context.Context, replica string) error
	// Replicas lists the known replicas that have not run out.
	Replicas(ctx context.Context) ([]Replica, error)

	// Lead makes holder the one that does a job until ttl from now, by the store's clock, if nobody else
	// is; a holder that asks again goes on. It reports whether holder leads. A ttl of 0 gives the job up.
	Lead(ctx context.Context, job, holder string, ttl time.Duration) (leads bool, err error)

	// Close waits for the calls that are under way. Later calls fail as in an outage; closing again
	// does nothing.
	Close() error
}

// A Reader is what may be asked of a store, in a transaction and outside.
type Reader interface {
	Instance(ctx context.Context, id string) (*apikey.Instance, error)
	// Instances lists all instances by id, byte by byte.
	Instances(ctx context.Context) ([]*apikey.Instance, error)

	// Key returns one key of one instance, without Digest.
	Key(ctx context.Context, instanceID string, id apikey.ID) (*apikey.Key, error)
	// Keys lists keys of an instance, as q says. An instance that is not there has no keys.
	Keys(ctx context.Context, instanceID string, q KeyQuery) ([]*apikey.Key, error)
	// KeyPage does the same, but looks at a bounded number of keys, however many there are: a page may be
	// short, even empty, and still have a next one.
	KeyPage(ctx context.Context, instanceID string, q KeyQuery) (KeyPage, error)
	// CountKeys counts the keys of an instance, or those of one owner in it, from counts that are kept: it
	// does not read the keys.
	CountKeys(ctx context.Context, instanceID string, owner KeyOwner, now time.Time) (KeyCounts, error)
	// Creations returns when the newest keys of an instance were made, newest first, at most limit and
	// only after since. createdBy narrows it to one creator; "" is everybody, but
	// keys that were imported, whose creator begins with ImportedBy, are left out.
	Creations(ctx context.Context, instanceID, createdBy string, since time.Time, limit int) ([]time.Time, error)
	// DueKeys lists keys of all instances that are over and not marked: not revoked, and with an
	// ExpirationDate before expired, or IdleAfter before idle. At most limit, in no order.
	DueKeys(ctx context.Context, expired, idle time.Time, limit int) ([]*apikey.Key, error)
	// RevokedKeys lists keys of an instance that were revoked before a time, the longest ago first, at
	// most limit.
	RevokedKeys(ctx context.Context, instanceID string, before time.Time, limit int) ([]*apikey.Key, error)
	// FindKey returns the key that a digest finds, with Digest and Generation set, whatever its status,
	// and a revision: the record is at least as new as that. The revision comes with ErrNotFound too.
	FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, apikey.Revision, error)
	// AgentHash returns what a Tx kept of a key by InsertPending, until Settle.
	// Errors: apikey.ErrNotFound.
	AgentHash(ctx context.Context, id apikey.ID) (apikey.AgentHash, error)
	// LastUsed returns when a key was last used, as far as the store knows; zero for never.
	// Errors: apikey.ErrNotFound.
	LastUsed(ctx context.Context, id apikey.ID) (time.Time, error)

	// Digests calls yield with every digest that finds a key, in no order, until it returns false. The
	// digests are at least as new as the returned revision.
	Digests(ctx context.Context, yield func(apikey.Digest) bool) (apikey.Revision, error)
	// RecentKeys calls yield with what FindKey would answer to every digest that finds a key that is not
	// revoked, the keys that were used last first, until it returns false: the record, and a revision that
	// it is at least as new as. It keeps no writer waiting, however long yield takes. yield must not call
	// the store.
	RecentKeys(ctx context.Context, yield func(k *apikey.Key, at apikey.Revision) bool) error
	// Changes returns what changed after a revision, oldest first, and the newest revision. truncated
	// means that the store no longer knows everything since then, or that it is older than the caller (a
	// restored backup): the caller must forget all it knows. A key comes once per revision.
	Changes(ctx context.Context, after apikey.Revision) (changes []apikey.Change, head apikey.Revision, truncated bool, err error)

	// Token returns the management token that a digest finds, whatever its status.
	Token(ctx context.Context, d apikey.Digest) (*Token, error)
	// Session returns a session of the portal, whether or not it is over. Errors: apikey.ErrNotFound.
	Session(ctx context.Context, id SessionID) (*Session, error)
	// Tokens lists all management tokens, newest first.
	Tokens(ctx context.Context) ([]*Token, error)

	// Peppers lists the pepper versions that the store has seen, by version.
	Peppers(ctx context.Context) ([]PepperRecord, error)
	// PepperLeft counts usable generations and tokens (not revoked, not expired by the store's clock; disabled
	// keys included) that only this version of the pepper finds. It looks at every key: seconds a million.
	PepperLeft(ctx context.Context, version uint32) (int, error)

	// Events lists audit events in the order in which they were written, at most limit, after the
	// event with the given sequence number (0: from the first).
	Events(ctx context.Context, after int64, limit int) ([]Event, error)
	// Mutations counts the transactions of Update that were committed, ever. Each wrote an audit event at
	// least, so the audit has had no fewer.
	Mutations(ctx context.Context) (int64, error)
	// FindEvents lists the audit events that a filter lets through, newest first (At, then Sequence, both
	// falling), at most limit, from the given place on; the zero place is the beginning.
	FindEvents(ctx context.Context, filter EventFilter, after EventPlace, limit int) ([]Event, error)
	// AuditSegments lists the segments of the audit by number.
	AuditSegments(ctx context.Context) ([]AuditSegment, error)

	// Replay returns what a Tx kept under an id by KeepReplay, unless it has run out at now.
	// Errors: apikey.ErrNotFound.
	Replay(ctx context.Context, id ReplayID, now time.Time) (sealed []byte, err error)
}

// A Tx is a transaction. Its reads see its writes. Every write that touches a key or an instance is
// listed in Changes under the transaction's revision, with all digests that find the key before or after,
// and that becomes the key's Revision; but for MarkEnded, which changes no decision.
// A write that answers apikey.ErrNotFound or apikey.ErrConflict did nothing, and the transaction goes on.
type Tx interface {
	Reader

	// PutInstance creates or replaces an instance, its policy and quotas; CreatedAt of an existing one stays. Its Revision
	// becomes the transaction's.
	PutInstance(ctx context.Context, in *apikey.Instance) error
	// DeleteInstance removes an instance with all its keys, its usage and its alerts; audit and tokens stay.
	// Errors: apikey.ErrNotFound.
	DeleteInstance(ctx context.Context, id string) error

	// InsertKey adds a key without generations. Errors: apikey.ErrConflict if the id is taken,
	// apikey.ErrNotFound if there is no such instance.
	InsertKey(ctx context.Context, k *apikey.Key) error
	// UpdateKey replaces what may change of a key: everything but ID, InstanceID, Type, AgentName,
	// UserPrincipalName, CreatedAt, CreatedBy, LastUsed…, Generations and Revision. Another
	// ExpirationDate or InactivityDays takes back MarkEnded. Errors: apikey.ErrNotFound, also where the
	// key belongs to another instance.
	UpdateKey(ctx context.Context, k *apikey.Key) error
	// DeleteKey removes a key with its digests. Errors: as UpdateKey.
	DeleteKey(ctx context.Context, instanceID string, id apikey.ID) error
	// MarkEnded notes that a key was found to be over. It then counts as expired in KeyCounts, and is not
	// listed by DueKeys any more. Marking twice is no error; the first time stays. A later use of a key that
	// is then neither over by its date nor idle takes the mark back. Errors: apikey.ErrNotFound.
	MarkEnded(ctx context.Context, id apikey.ID, at time.Time) error
	// InsertGeneration adds a generation with its digest under a pepper version. Errors:
	// apikey.ErrConflict if the digest or the number is taken, apikey.ErrNotFound if there is no such key.
	InsertGeneration(ctx context.Context, id apikey.ID, g apikey.Generation, d apikey.Digest, pepperVersion uint32) error
	// InsertPending adds a generation of whose secret only a hash is known. The key's PendingDigest finds it,
	// under apikey.NoPepper, until Settle. Errors: as InsertGeneration; a key has one such generation at most.
	InsertPending(ctx context.Context, id apikey.ID, g apikey.Generation, h apikey.AgentHash) error
	// Settle gives the generation of InsertPending the digest of its secret, and forgets the hash and the
	// PendingDigest. Errors: apikey.ErrConflict if the digest is taken, apikey.ErrNotFound if the key has no
	// such generation.
	Settle(ctx context.Context, id apikey.ID, d apikey.Digest, pepperVersion uint32) error
	// EndGeneration replaces ValidUntil and Revoked of a generation. Its digest goes on finding it.
	// Errors: apikey.ErrNotFound.
	EndGeneration(ctx context.Context, id apikey.ID, number int, validUntil time.Time, revoked bool) error

	// InsertToken adds a management token. Errors: apikey.ErrConflict.
	InsertToken(ctx context.Context, t *Token, d apikey.Digest, pepperVersion uint32) error
	// RevokeToken ends a token. Revoking it twice is no error; the first time stays.
	// Errors: apikey.ErrNotFound.
	RevokeToken(ctx context.Context, id apikey.ID, at time.Time) error
	// EndSessions forgets the sessions of who signed in by OIDC under a name, "": all sessions, and returns how many.
	EndSessions(ctx context.Context, name string) (int, error)

	// PutPepper remembers the check value of a pepper version. Errors: apikey.ErrConflict if the version
	// is known with another check value.
	PutPepper(ctx context.Context, version uint32, check [16]byte) error
	// RetirePepper forgets a pepper version and every digest under it. Keys and tokens that can no longer
	// be used stay, though nothing finds them by digest any more. Every cache is told to forget all it
	// knows. Errors: apikey.ErrConflict while PepperLeft is not 0, apikey.ErrNotFound.
	RetirePepper(ctx context.Context, version uint32) error

	// Mark sets a named mark that can be set once; first reports whether this call did.
	Mark(ctx context.Context, name string) (first bool, err error)

	// Audit writes an audit event and puts it at the end of the chain: its Sequence, which grows by one,
	// and its Link are given by AuditKeys.Extend. Before and After come back byte for byte.
	Audit(ctx context.Context, e Event) error
	// RemoveAuditSegment removes the events of a sealed segment. The segment stays.
	// Errors: apikey.ErrNotFound if there is no such sealed segment, or its MAC is wrong.
	RemoveAuditSegment(ctx context.Context, number int64, at time.Time) error

	// Alert is as in AlertStore.
	Alert(ctx context.Context, id apikey.ID) (*Alert, error)
	// AckAlert replaces AckedAt, AckedBy and ResolvedAt of an alert. Errors: apikey.ErrNotFound.
	AckAlert(ctx context.Context, a *Alert) error
	// QueueNotice keeps a notice for the webhook.
	QueueNotice(ctx context.Context, n Notice) error

	// KeepReplay keeps a sealed text under an id until it runs out.
	// Errors: apikey.ErrConflict if there is one that has not run out at now.
	KeepReplay(ctx context.Context, id ReplayID, sealed []byte, now, until time.Time) error
}

// A Replica is one keyward process that answers Checks from this store.
type Replica struct {
	ID        string
	Confirmed apikey.Revision // it serves nothing older
	Until     time.Time       // known until then, by the store's clock
	Now       time.Time       // the store's clock at the answer
}

// A Redigest gives a digest to a generation or token whose secret was just seen.
type Redigest struct {
	Old, New apikey.Digest
	Version  uint32 // of the pepper of New
}

// A PepperRecord is what the store knows of a pepper.
type PepperRecord struct {
	Version uint32
	Check   [16]byte
}

// A Token lets its holder use the Management API. Only its digest is kept.
type Token struct {
	ID         apikey.ID
	Name       string
	Role       Role
	InstanceID string // "": all instances
	Hint       string
	CreatedAt  time.Time
	CreatedBy  string
	// UserPrincipalName is on whose behalf the holder acts: set for RoleUser, and only for that.
	UserPrincipalName string
	ExpiresAt         time.Time // zero: never
	RevokedAt         time.Time // zero: not revoked
	LastUsedAt        time.Time // up to a minute behind; zero: never
	// Bootstrap marks the token that serve makes for itself on a new store.
	Bootstrap bool
}

// A Role says what a caller of the Management API may do.
type Role string

// The roles, the mightiest first.
const (
	RoleOwner    Role = "owner"    // everything, tokens and deleting instances included
	RoleOperator Role = "operator" // instances, policies and keys
	RoleAuditor  Role = "auditor"  // reads everything, changes nothing
	RoleUser     Role = "user"     // the keys of its own user principal name, and nothing else
)

// An Event is one entry of the audit: who did what to what, when. Before and After never hold a secret.
type Event struct {
	Sequence   int64
	At         time.Time // UTC
	Actor      string    // e.g. "token:0192f0c1-…", "keyward serve"
	RemoteAddr string    // where the call came from; "" for the process itself
	Action     string    // e.g. "key.create"
	Refused    string    // why nothing was done; "" if it was done
	InstanceID string    // "" where no instance is concerned
	Target     string    // id of what was changed
	RequestID  string
	Before     json.RawMessage // nil where there was nothing
	After      json.RawMessage // nil where nothing is left
	Link       Link            // SHA-256 over all of the above and the link of the event before
}

// An EventFilter says which audit events are wanted. What is zero does not matter.
type EventFilter struct {
	Actor, Action, InstanceID, Target string
	From, To                          time.Time // both inclusive
	Outcome                           Outcome
}

// An Outcome is how an attempt ended.
type Outcome string

// The outcomes.
const (
	OutcomeDone    Outcome = "done"
	OutcomeRefused Outcome = "refused"
)

// Outcome is whether what the event tells of was done.
func (e *Event) Outcome() Outcome {
	if e.Refused != "" {
		return OutcomeRefused
	}
	return OutcomeDone
}

// An EventPlace is a place in the order of [Reader.FindEvents].
type EventPlace struct {
	At       time.Time
	Sequence int64
}

// A TokenUse is a use of a management token.
type TokenUse struct {
	ID apikey.ID
	At time.Time
}

// A ReplayID is how the answer to a request with an Idempotency-Key is found again.
type ReplayID [32]byte
