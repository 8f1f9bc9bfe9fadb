package admin

import (
	"context"
	"time"

	"keyward/authz/apikey"
)

// A SessionStore keeps who is signed in to the portal. Nothing in it is a mutation: no revision, no audit; that
// somebody signed in or out is an event of its own.
type SessionStore interface {
	// PutSession keeps a session, in place of the one with its ID.
	PutSession(ctx context.Context, s *Session) error
	// Session returns a session, whether or not it is over. Errors: apikey.ErrNotFound.
	Session(ctx context.Context, id SessionID) (*Session, error)
	// EndSession forgets a session. That there is none is no error.
	EndSession(ctx context.Context, id SessionID) error
	// ForgetSessions removes sessions that are over at a time.
	ForgetSessions(ctx context.Context, now time.Time) error
}

// A SessionID is how a session is found: an HMAC of what the browser's cookie holds, which is kept nowhere.
type SessionID [32]byte

// A Session is a browser that somebody signed in with. What they may do is looked up again at each request, from
// what they showed.
type Session struct {
	ID        SessionID
	CreatedAt time.Time
	SeenAt    time.Time // last; up to a minute behind
	EndsAt    time.Time // at the latest
	IdleAt    time.Time // ends then, unless it is used
	// Token is the digest of the management token that was shown; zero for who signed in by OIDC.
	Token apikey.Digest
	// Caller, of OIDC, is who it is.
	Subject OIDCSubject
}

// An OIDCSubject is who signed in by OIDC, with what their token gave them. Zero: nobody did.
type OIDCSubject struct {
	Name              string `json:"name"` // as Caller has it
	Role              Role   `json:"role"`
	InstanceID        string `json:"instanceId,omitempty"`
	UserPrincipalName string `json:"userPrincipalName,omitempty"`
}
