package apikey

import (
	"net/netip"
	"time"
)

// A Revision grows with every change in the store. It is how a replica knows how fresh it is.
type Revision uint64

// A Type is what a key stands for.
type Type string

// The types of keys.
const (
	TypeInstance Type = "instance" // the whole instance
	TypeAgent    Type = "agent"    // one agent of it: an Agent Access Token
	TypeUser     Type = "user"     // one user of it
)

// Kind is the kind of secret that a key of this type has; 0 for an unknown type.
func (t Type) Kind() Kind {
	switch t {
	case TypeInstance:
		return KindInstance
	case TypeAgent:
		return KindAgent
	case TypeUser:
		return KindUser
	}
	return 0
}

// A Key is the record that keyward keeps. Secrets belong to its generations, of which at most two are
// valid at once; counters, limits and history belong to the key.
//
// A *Key is immutable once it was handed out: many requests read one record.
type Key struct {
	ID                ID
	InstanceID        string // canonical, see CanonicalInstanceID
	Type              Type
	Name              string
	Description       string
	AgentName         string // set for agent keys only
	UserPrincipalName string // set for user keys only
	Environment       string // "": any
	Scopes            Scopes // nil: every right
	AllowedIPs        []netip.Prefix
	Limits            Limits
	Quotas            map[string]QuotaOverride // of the instance's quotas, by their names; nil: none
	ExpirationDate    time.Time                // zero: none
	InactivityDays    int                      // 0: does not expire for idleness
	NotBefore         time.Time                // zero: at once
	Metadata          map[string]string
	Disabled          bool
	RevokedAt         time.Time // zero: not revoked
	RevokedReason     RevocationReason
	LeakReportedAt    time.Time // of the newest secret that was: the first time; zero: nobody has reported a leak
	CreatedAt         time.Time
	CreatedBy         string
	LastUsedAt        time.Time // zero: never; up to a minute behind
	// From which network (/24, or /48 of IPv6) that was, and on which rule's host and path; "": not known.
	LastUsedNetwork, LastUsedPath string
	// IdleFrom is the earliest instant that idleness counts from, where that is not the creation: nothing is
	// known of uses before it, since the key was imported, or restored from a backup. Zero: creation.
	IdleFrom    time.Time
	Generations []Generation // by number
	// Revision is that of the last change to the key. Uses are none.
	Revision Revision

	// Digest and Generation say by which digest the record was found and to which generation that
	// belongs. Set by FindKey only: the digest is compared again on every use, because caches may
	// know it by a part only.
	Digest     Digest
	Generation int
}

// A Generation is one secret of a key, as everybody may see it.
type Generation struct {
	Number     int       // from 1
	Hint       string    // prefix and last 4 characters
	CreatedAt  time.Time // UTC
	ValidUntil time.Time // zero: as long as the key
	LastUsedAt time.Time // zero: never; up to a minute behind
	// Revoked says that it was ended at once, at ValidUntil. It is over on every replica, whatever the
	// clock there says.
	Revoked bool
}

// EndedAt reports whether the generation is over at now. Valid while now ≤ ValidUntil.
func (g *Generation) EndedAt(now time.Time) bool {
	return g.Revoked || !g.ValidUntil.IsZero() && now.After(g.ValidUntil)
}

// A RevocationReason says why a key was revoked; "" is no reason given.
type RevocationReason string

// The reasons.
const (
	RevokedKeyCompromise RevocationReason = "keyCompromise" // the secret is, or may be, known to others
	RevokedSuperseded    RevocationReason = "superseded"    // another key has taken its place
	RevokedOwnerLeft     RevocationReason = "ownerLeft"     // whose it was has left
	RevokedUnused        RevocationReason = "unused"        // nobody used it
	RevokedOther         RevocationReason = "other"
)

// RevocationReasons lists all reasons.
func RevocationReasons() []RevocationReason {
	return []RevocationReason{RevokedKeyCompromise, RevokedSuperseded, RevokedOwnerLeft, RevokedUnused, RevokedOther}
}

// A Status is where a key stands in its life.
type Status string

// The statuses, in the order in which they are looked for.
const (
	StatusRevoked     Status = "revoked"
	StatusDisabled    Status = "disabled"
	StatusNotYetValid Status = "notYetValid"
	StatusExpired     Status = "expired"
	StatusIdle        Status = "idle" // unused for longer than InactivityDays
	StatusActive      Status = "active"
)

// StatusAt says where the key stands at now. Valid while now ≤ expiry: the key ends after that
// instant. An idle key is idle by the record's LastUsedAt, which may be stale: ask the store before
// refusing anybody for it.
func (k *Key) StatusAt(now time.Time) Status {
	switch {
	case !k.RevokedAt.IsZero():
		return StatusRevoked
	case k.Disabled:
		return StatusDisabled
	case now.Before(k.NotBefore):
		return StatusNotYetValid
	case !k.ExpirationDate.IsZero() && now.After(k.ExpirationDate):
		return StatusExpired
	case k.IdleAt(now, k.LastUsedAt):
		return StatusIdle
	}
	return StatusActive
}

// IdleAt reports whether a key last used at lastUsed has been unused for too long at now. A key that
// was never used counts from its creation.
func (k *Key) IdleAt(now, lastUsed time.Time) bool {
	return k.InactivityDays != 0 && now.After(k.idleAfter(lastUsed))
}

// IdleAfter is when a key that is not used any more has been, or will have been, unused for too long:
// the last instant at which it is valid. Zero for a key that does not expire for idleness.
func (k *Key) IdleAfter() time.Time {
	if k.InactivityDays == 0 {
		return time.Time{}
	}
	return k.idleAfter(k.LastUsedAt)
}

func (k *Key) idleAfter(lastUsed time.Time) time.Time {
	for _, floor := range [...]time.Time{k.CreatedAt, k.IdleFrom} {
		if lastUsed.Before(floor) {
			lastUsed = floor
		}
	}
	return lastUsed.Add(time.Duration(k.InactivityDays) * day)
}

// GenerationEnded reports whether the generation that the record was found by is over at now, or gone.
func (k *Key) GenerationEnded(now time.Time) bool {
	for i := range k.Generations {
		if g := &k.Generations[i]; g.Number == k.Generation {
			return g.EndedAt(now)
		}
	}
	return true
}

// Deprecated tells a caller with an older secret than the newest when that came, and until when its own
// is valid: zero for as long as the key. ok is false for the newest. What the record was found by says
// which secret it is, so it is for records from FindKey only.
func (k *Key) Deprecated() (since, until time.Time, ok bool) {
	newest := k.Newest()
	if newest == nil || newest.Number <= k.Generation {
		return time.Time{}, time.Time{}, false
	}
	for i := range k.Generations {
		if g := &k.Generations[i]; g.Number == k.Generation {
			until = g.ValidUntil
		}
	}
	return newest.CreatedAt, until, true
}

// Newest returns the newest generation, nil if there is none.
func (k *Key) Newest() (newest *Generation) {
	for i := range k.Generations {
		if g := &k.Generations[i]; newest == nil || g.Number > newest.Number {
			newest = g
		}
	}
	return newest
}

// AppendPrincipal appends on whose behalf a request with this key counts: the user of a user key,
// otherwise a name of the key's own.
func (k *Key) AppendPrincipal(dst []byte) []byte {
	const domain = "@foundationallm.internal_"
	switch k.Type {
	case TypeUser:
		return append(dst, k.UserPrincipalName...)
	case TypeAgent:
		dst = append(append(append(dst, "aat_"...), k.AgentName...), '_')
	default:
		dst = append(dst, "iak_"...)
	}
	return append(k.ID.Append(dst), domain...)
}

// A Change says what a revision touched, for caches to follow.
type Change struct {
	Revision   Revision
	InstanceID string
	KeyID      ID       // zero: the instance itself changed
	Digests    []Digest // of the key, all that find it or found it
}

// A Use says when a key was last used.
type Use struct {
	KeyID      ID
	Generation int
	At         time.Time
	// Network and Path are of the key's last use: see Key. A store keeps them with At, if that is its last.
	Network, Path string
}
