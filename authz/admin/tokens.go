package admin

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"keyward/authz/apikey"
)

// A TokenInput is what a new management token is to be.
type TokenInput struct {
	Name       string `json:"name" minLength:"1" maxLength:"128" doc:"1 to 128 printable characters."`
	Role       Role   `json:"role" enum:"owner,operator,auditor,user"`
	InstanceID string `json:"instanceId,omitempty" doc:"Absent: all instances."`
	ExpiresIn  string `json:"expiresIn,omitempty" doc:"A duration such as 90d, at most 365d. Absent: never."`
	// UserPrincipalName is whose keys the holder sees and makes.
	UserPrincipalName string `json:"userPrincipalName,omitempty" minLength:"1" maxLength:"256" doc:"Needed for the role user, refused for others: whose keys its holder sees and makes."`
}

// A CreatedToken is a new token with its secret, which is nowhere else.
type CreatedToken struct {
	Token  *Token
	Secret apikey.Secret
}

// CreateToken makes a management token. An owner's for all instances ends the bootstrap token. With caller.Once, a
// repeated request answers what the first one made. Errors: [ErrReplayBody], [ErrReplayGone] of a repeated one.
func (s *Service) CreateToken(ctx context.Context, caller Caller, in TokenInput) (CreatedToken, error) {
	if err := caller.may(createToken); err != nil {
		return CreatedToken{}, err
	}
	if caller.Once == nil {
		return s.createToken(ctx, caller, in)
	}
	if made, found, err := s.replayToken(ctx, caller); found || err != nil {
		return made, err
	}
	made, err := s.createToken(ctx, caller, in)
	if !errors.Is(err, errReplayed) {
		return made, err
	}
	if made, found, err := s.replayToken(ctx, caller); found || err != nil {
		return made, err
	}
	return CreatedToken{}, apikey.ErrConflict // the other one's time ran out at this very moment
}

// replayToken returns the token that an earlier request of the caller's with the same Idempotency-Key made; found is
// false if there was none.
func (s *Service) replayToken(ctx context.Context, caller Caller) (made CreatedToken, found bool, err error) {
	r, found, err := s.keptReplay(ctx, caller, caller.InstanceID)
	if !found || err != nil {
		return CreatedToken{}, false, err
	}
	tokens, err := s.store.Tokens(ctx)
	if err != nil {
		return CreatedToken{}, false, err
	}
	i := slices.IndexFunc(tokens, func(t *Token) bool { return t.ID == r.KeyID })
	if i < 0 || tokens[i].statusAt(now()) != "active" {
		return CreatedToken{}, false, ErrReplayGone
	}
	return CreatedToken{Token: tokens[i], Secret: apikey.NewSecret(r.Secret)}, true, nil
}

func (s *Service) createToken(ctx context.Context, caller Caller, in TokenInput) (CreatedToken, error) {
	t, err := in.token(s.cfg.Format, now())
	if err != nil {
		return CreatedToken{}, err
	}
	if caller.InstanceID != "" && t.InstanceID == "" {
		return CreatedToken{}, &ForbiddenError{Field: "instanceId", Reason: "is needed: a caller of one instance makes tokens for that instance only"}
	}
	secret := s.cfg.Format.New(apikey.KindManagement)
	_, err = s.update(ctx, func(ctx context.Context, tx Tx) error {
		if t.InstanceID != "" {
			_, err := tx.Instance(ctx, t.InstanceID)
			// Another's instance is none: the answer must not tell which ids are taken.
			if isNotFound(err) || caller.InstanceID != "" && t.InstanceID != caller.InstanceID {
				return apikey.Invalid("instanceId", "there is no such instance")
			}
			if err != nil {
				return err
			}
		}
		if t.Role == RoleOwner && t.InstanceID == "" {
			tokens, err := tx.Tokens(ctx)
			if err != nil {
				return err
			}
			for _, old := range tokens {
				if old.Bootstrap && old.RevokedAt.IsZero() {
					if err := endToken(ctx, tx, caller, old); err != nil {
						return err
					}
				}
			}
		}
		if err := s.keepToken(ctx, tx, caller, t, secret); err != nil {
			return err
		}
		return s.keepReplay(ctx, tx, caller, caller.InstanceID, t.ID, 0, secret)
	})
	if err != nil {
		return CreatedToken{}, err
	}
	return CreatedToken{Token: t, Secret: secret}, nil
}

// keepToken gives t an id and keeps it under the digest of its secret.
func (s *Service) keepToken(ctx context.Context, tx Tx, caller Caller, t *Token, secret apikey.Secret) error {
	t.ID, t.Hint, t.CreatedBy = newID(), s.cfg.Format.Hint(secret), caller.Name
	pepper := s.cfg.Peppers.Current
	if err := tx.InsertToken(ctx, t, pepper.Digest(secret.Reveal()), pepper.Version()); err != nil {
		return err
	}
	return caller.audit(ctx, tx, createToken, t.InstanceID, t.ID.String(), nil, TokenRecordOf(t, t.CreatedAt))
}

// Tokens lists the management tokens that the caller can see, newest first.
func (s *Service) Tokens(ctx context.Context, caller Caller) ([]*Token, error) {
	if err := caller.may(readTokens); err != nil {
		return nil, err
	}
	all, err := s.store.Tokens(ctx)
	if err != nil || caller.InstanceID == "" {
		return all, err
	}
	return slices.DeleteFunc(all, func(t *Token) bool { return t.InstanceID != caller.InstanceID }), nil
}

// RevokeToken ends a token, at once: tokens are never cached. Repeating it changes nothing.
func (s *Service) RevokeToken(ctx context.Context, caller Caller, id apikey.ID) (*Token, error) {
	if err := caller.may(revokeToken); err != nil {
		return nil, err
	}
	var ended *Token
	_, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		tokens, err := tx.Tokens(ctx)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(tokens, func(t *Token) bool { return t.ID == id })
		if i < 0 || caller.InstanceID != "" && tokens[i].InstanceID != caller.InstanceID {
			return apikey.ErrNotFound
		}
		if ended = tokens[i]; !ended.RevokedAt.IsZero() {
			return errNothing
		}
		return endToken(ctx, tx, caller, ended)
	})
	if err != nil && !errors.Is(err, errNothing) {
		return nil, err
	}
	return ended, nil
}

// endToken revokes t, in the store and in the record.
func endToken(ctx context.Context, tx Tx, caller Caller, t *Token) error {
	at := now()
	before := TokenRecordOf(t, at)
	t.RevokedAt = at
	if err := tx.RevokeToken(ctx, t.ID, at); err != nil {
		return err
	}
	return caller.audit(ctx, tx, revokeToken, t.InstanceID, t.ID.String(), before, TokenRecordOf(t, at))
}

// ErrUnauthenticated: no token, none of ours, or one that is over. Which of them is nobody's business.
var ErrUnauthenticated = errors.New("not a valid management token")

// Authenticate returns the holder of a management token, or of a token of an OIDC issuer, as a caller,
// without its RemoteAddr and RequestID. Errors: [ErrUnauthenticated]; *ForbiddenError for who is known to
// an issuer and has no role here, with the caller's Name; anything else is an outage.
func (s *Service) Authenticate(ctx context.Context, secret apikey.Secret) (Caller, error) {
	sent := secret.Reveal()
	if s.cfg.OIDC != nil && isJWT(sent) {
		caller, err := s.cfg.OIDC.authenticate(ctx, sent)
		if s.cfg.Format.Within(caller.Name) {
			return Caller{}, ErrUnauthenticated // the audit would have it in clear
		}
		return caller, err
	}
	// Shape and checksum first: garbage costs no hash and no look-up.
	if kind, err := s.cfg.Format.Check(sent); err != nil || kind != apikey.KindManagement {
		return Caller{}, ErrUnauthenticated
	}
	current, previous := s.cfg.Peppers.Current, s.cfg.Peppers.Previous
	digest := current.Digest(sent)
	t, err := s.store.Token(ctx, digest)
	var old apikey.Digest
	byPrevious := isNotFound(err) && previous != nil
	if byPrevious {
		old = previous.Digest(sent)
		t, err = s.store.Token(ctx, old)
	}
	switch {
	case isNotFound(err):
		return Caller{}, ErrUnauthenticated
	case err != nil:
		return Caller{}, err
	case t.statusAt(time.Now()) != "active":
		return Caller{}, ErrUnauthenticated
	}
	if byPrevious {
		if err := s.store.Redigest(ctx, []Redigest{{Old: old, New: digest, Version: current.Version()}}); err != nil {
			// The token works by its old digest until the old pepper is retired, and is seen again.
			s.log.Warn("cannot give a management token its new digest", slog.String("token", t.ID.String()), slog.Any("error", err))
		}
	}
	s.uses.note(t.ID, time.Now())
	if byPrevious {
		digest = old // which goes on finding it, whether it got the new one or not
	}
	return Caller{
		Name: "token:" + t.ID.String(), Role: t.Role, InstanceID: t.InstanceID, UserPrincipalName: t.UserPrincipalName, shown: &credential{token: digest},
	}, nil
}

// tokenUses remembers when tokens were last used until that is written. Safe for concurrent use; the zero
// value works. It holds no more than there are tokens.
type tokenUses struct {
	mu   sync.Mutex
	last map[apikey.ID]time.Time
}

func (u *tokenUses) note(id apikey.ID, at time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.last == nil {
		u.last = map[apikey.ID]time.Time{}
	}
	if at.After(u.last[id]) {
		u.last[id] = at
	}
}

// writeUses writes when tokens were last used: no event, no revision.
func (s *Service) writeUses(ctx context.Context) error {
	s.uses.mu.Lock()
	pending := s.uses.last
	s.uses.last = nil
	s.uses.mu.Unlock()
	if len(pending) == 0 {
		return nil
	}
	uses := make([]TokenUse, 0, len(pending))
	for id, at := range pending {
		uses = append(uses, TokenUse{id, at})
	}
	err := s.store.TouchTokens(ctx, uses)
	if err != nil {
		for _, use := range uses {
			s.uses.note(use.ID, use.At)
		}
	}
	return err
}

// statusAt is active, revoked or expired. Like a key, a token is valid while now ≤ expiry.
func (t *Token) statusAt(now time.Time) string {
	switch {
	case !t.RevokedAt.IsZero():
		return "revoked"
	case !t.ExpiresAt.IsZero() && now.After(t.ExpiresAt):
		return "expired"
	}
	return "active"
}

// A TokenRecord is a management token as people read it. It holds no secret and no digest.
type TokenRecord struct {
	ID         apikey.ID `json:"id" format:"uuid"`
	Name       string    `json:"name"`
	Role       Role      `json:"role" enum:"owner,operator,auditor,user"`
	InstanceID string    `json:"instanceId,omitempty" doc:"Absent: all instances."`
	// UserPrincipalName is whose keys its holder sees and makes.
	UserPrincipalName string    `json:"userPrincipalName,omitempty" doc:"Set for the role user only."`
	Status            string    `json:"status" enum:"active,revoked,expired"`
	Hint              string    `json:"hint" doc:"Prefix and last four characters."`
	CreatedAt         time.Time `json:"createdAt"`
	CreatedBy         string    `json:"createdBy"`
	ExpiresAt         time.Time `json:"expiresAt,omitzero" doc:"Absent: never."`
	RevokedAt         time.Time `json:"revokedAt,omitzero"`
	LastUsedAt        time.Time `json:"lastUsedAt,omitzero" doc:"Up to a minute behind."`
	Bootstrap         bool      `json:"bootstrap,omitempty" doc:"The server made it for itself on a new store."`
}

// TokenRecordOf returns t as people read it at a time.
func TokenRecordOf(t *Token, at time.Time) TokenRecord {
	return TokenRecord{
		ID: t.ID, Name: t.Name, Role: t.Role, InstanceID: t.InstanceID, Status: t.statusAt(at), Hint: t.Hint,
		CreatedAt: t.CreatedAt.UTC(), CreatedBy: t.CreatedBy, UserPrincipalName: t.UserPrincipalName, LastUsedAt: t.LastUsedAt.UTC(),
		ExpiresAt: t.ExpiresAt.UTC(), RevokedAt: t.RevokedAt.UTC(), Bootstrap: t.Bootstrap,
	}
}
