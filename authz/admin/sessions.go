package admin

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"log/slog"
	"strings"
	"time"

	"keyward/authz/apikey"
)

// A SessionStore keeps who is signed in to the portal. Nothing in it is a mutation: no revision, no audit; that
// somebody signed in or out is an event of its own.
type SessionStore interface {
	// PutSession keeps a session, in place of the one with its ID.
	PutSession(ctx context.Context, s *Session) error
	// TouchSession notes that a session was used: SeenAt and IdleAt only grow. One that is gone stays gone, and
	// that is no error: who signs out must not be signed in again by a page that was still on its way.
	TouchSession(ctx context.Context, id SessionID, seen, idle time.Time) error
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

// A SessionLife is how long somebody stays signed in.
type SessionLife struct {
	Idle time.Duration // without using it; to within a minute
	Most time.Duration // in any case
}

// A Visitor is who is signed in.
type Visitor struct {
	Caller Caller    // without RemoteAddr and RequestID
	Title  string    // what people call it: a token's name, or who it is
	EndsAt time.Time // the session, at the latest

	session Session
	idle    time.Duration
}

const (
	signIn  = "session.begin"
	signOut = "session.end"
	// endSessions is what an owner does to others'.
	endSessions = "session.revoke"
	// cookieBytes is what a session's cookie has of chance.
	cookieBytes = 32
)

// SignIn begins a session for a caller, whom [Service.Authenticate] knows, and returns what the browser is to
// keep: whoever has it is the caller. former is what the browser kept until now, if anything; that session ends,
// so that nobody who knew it is signed in with the new one.
//
// A session that began with something that is over at a time is over then too.
// Errors: [ErrUnauthenticated] if what the caller showed is good no more.
func (s *Service) SignIn(ctx context.Context, caller Caller, former apikey.Secret, life SessionLife) (apikey.Secret, error) {
	if caller.shown == nil {
		return apikey.Secret{}, ErrUnauthenticated
	}
	chance := make([]byte, cookieBytes)
	_, _ = rand.Read(chance)
	cookie := apikey.NewSecret(base64.RawURLEncoding.EncodeToString(chance))
	at := now()
	session := &Session{
		ID: sessionID(s.cfg.Peppers.Current, chance), CreatedAt: at, SeenAt: at,
		EndsAt: at.Add(life.Most), IdleAt: at.Add(life.Idle), Token: caller.shown.token,
	}
	if session.Token == (apikey.Digest{}) {
		session.Subject = OIDCSubject{Name: caller.Name, Role: caller.Role, InstanceID: caller.InstanceID, UserPrincipalName: caller.UserPrincipalName}
		if caller.shown.until.Before(session.EndsAt) {
			session.EndsAt = caller.shown.until
		}
	}
	// The audit first: nobody is signed in of whom it does not know.
	_, err := s.update(WithCredential(ctx, caller), func(ctx context.Context, tx Tx) error {
		return caller.audit(ctx, tx, signIn, caller.InstanceID, subjectOf(caller), nil, nil)
	})
	if err != nil {
		return apikey.Secret{}, err
	}
	if err := s.endSession(ctx, former); err != nil {
		return apikey.Secret{}, err
	}
	return cookie, s.store.PutSession(ctx, session)
}

// subjectOf is the id of a token, or who an issuer says it is.
func subjectOf(c Caller) string {
	_, id, _ := strings.Cut(c.Name, ":")
	return id
}

// Visitor returns who is signed in with what a browser keeps. What it may do is looked up anew: a token that was
// revoked or has expired signs its holder out. Errors: [ErrUnauthenticated].
func (s *Service) Visitor(ctx context.Context, cookie apikey.Secret) (Visitor, error) {
	session, err := s.session(ctx, cookie)
	if err != nil {
		return Visitor{}, err
	}
	at := now()
	v := Visitor{EndsAt: session.EndsAt, session: *session, idle: session.IdleAt.Sub(session.SeenAt)}
	if !at.Before(session.EndsAt) || !at.Before(session.IdleAt) {
		return Visitor{}, cmp.Or(s.store.EndSession(ctx, session.ID), ErrUnauthenticated)
	}
	if session.Token == (apikey.Digest{}) {
		who := session.Subject
		v.Title = subjectOf(Caller{Name: who.Name})
		v.Caller = Caller{
			Name: who.Name, Role: who.Role, InstanceID: who.InstanceID, UserPrincipalName: who.UserPrincipalName, shown: &credential{until: session.EndsAt, session: session.ID},
		}
		return v, nil
	}
	t, err := s.store.Token(ctx, session.Token)
	if isNotFound(err) || err == nil && t.statusAt(at) != "active" {
		return Visitor{}, cmp.Or(s.store.EndSession(ctx, session.ID), ErrUnauthenticated)
	}
	if err != nil {
		return Visitor{}, err
	}
	s.uses.note(t.ID, at)
	v.Title, v.Caller = t.Name, Caller{
		Name: "token:" + t.ID.String(), Role: t.Role, InstanceID: t.InstanceID, UserPrincipalName: t.UserPrincipalName, shown: &credential{token: session.Token, session: session.ID},
	}
	return v, nil
}

// Seen notes that somebody used the session, so that it does not end for idleness. It writes once a minute at
// most, and what cannot be written only makes the session end sooner.
func (s *Service) Seen(ctx context.Context, v Visitor) {
	at := now()
	if at.Sub(v.session.SeenAt) < min(time.Minute, v.idle/4) {
		return
	}
	if err := s.store.TouchSession(ctx, v.session.ID, at, at.Add(v.idle)); err != nil {
		s.log.Warn("cannot note that a session is in use: it may end early", slog.Any("error", err))
	}
}

// SignOut ends a session at once. That there is none is no error.
func (s *Service) SignOut(ctx context.Context, caller Caller, cookie apikey.Secret) error {
	if err := s.endSession(ctx, cookie); err != nil {
		return err
	}
	_, err := s.write(ctx, func(ctx context.Context, tx Tx) error {
		return caller.audit(ctx, tx, signOut, caller.InstanceID, subjectOf(caller), nil, nil)
	})
	return err
}

// WhoseSessions says whose sessions are to end: one of the two.
type WhoseSessions struct {
	Actor string // who signed in by OIDC, as Caller.Name and the audit have it
	All   bool   // everybody, however they signed in
}

// EndSessions ends sessions at once, and returns how many there were. Whom the issuer still gives a role can sign in
// again. One person's that began with a management token end with that: see [Service.RevokeToken].
func (s *Service) EndSessions(ctx context.Context, caller Caller, whose WhoseSessions) (ended int, err error) {
	if err := caller.mayAll(endSessions); err != nil {
		return 0, err
	}
	switch oidc := strings.HasPrefix(whose.Actor, "oidc:"); {
	case whose.All && whose.Actor != "":
		return 0, apikey.Invalid("actor", "cannot be set together with all")
	case !whose.All && !oidc:
		return 0, apikey.Invalid("actor", "must be oidc:, the issuer, # and the subject, as in the audit, unless all are meant; the sessions of a management token end when it is revoked")
	}
	_, err = s.update(ctx, func(ctx context.Context, tx Tx) error {
		var err error
		if ended, err = tx.EndSessions(ctx, whose.Actor); err != nil {
			return err
		}
		if ended == 0 {
			return errNothing // nor is what was sent, which may be anything, in the audit
		}
		return caller.audit(ctx, tx, endSessions, "", subjectOf(Caller{Name: whose.Actor}), nil, map[string]int{"ended": ended})
	})
	if err != nil && !errors.Is(err, errNothing) {
		return 0, err
	}
	return ended, nil
}

func (s *Service) endSession(ctx context.Context, cookie apikey.Secret) error {
	session, err := s.session(ctx, cookie)
	if errors.Is(err, ErrUnauthenticated) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.store.EndSession(ctx, session.ID)
}

// session finds a session, over or not. Errors: [ErrUnauthenticated].
func (s *Service) session(ctx context.Context, cookie apikey.Secret) (*Session, error) {
	chance, err := base64.RawURLEncoding.Strict().DecodeString(cookie.Reveal())
	if err != nil || len(chance) != cookieBytes { // costs no look-up
		return nil, ErrUnauthenticated
	}
	for _, p := range []*apikey.Pepper{s.cfg.Peppers.Current, s.cfg.Peppers.Previous} {
		if p == nil {
			continue
		}
		session, err := s.store.Session(ctx, sessionID(p, chance))
		if !isNotFound(err) {
			return session, err
		}
	}
	return nil, ErrUnauthenticated
}

func sessionID(p *apikey.Pepper, chance []byte) SessionID {
	key := p.Derive("portal session")
	h := hmac.New(sha256.New, key[:])
	h.Write(chance)
	return SessionID(h.Sum(nil))
}

// FormToken returns what the forms of a session carry, so that a form that somebody else made is told from ours:
// who does not know the cookie cannot make it.
func (s *Service) FormToken(cookie apikey.Secret) string {
	key := s.cfg.Peppers.Current.Derive("portal form")
	h := hmac.New(sha256.New, key[:])
	h.Write([]byte(cookie.Reveal()))
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

// Can reports whether the caller's role may do something at all, in the words of the audit, such as
// key.create: to show what can be used. Whether it may with this thing, the call itself decides.
func (c Caller) Can(action string) bool {
	if _, known := may[action]; !known {
		panic("admin: no such action: " + action)
	}
	c.Attempt = nil
	return c.may(action) == nil
}
