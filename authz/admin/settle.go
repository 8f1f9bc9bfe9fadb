package admin

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/crypto/argon2"

	"keyward/authz/apikey"
)

// The application's parameters, and the only ones: with others a hash would confirm nothing.
const (
	argon2Time    = 40
	argon2Memory  = 8192 // KiB
	argon2Threads = 16
)

// AgentHashParameters are those of the hashes that can be imported, as the PHC string format writes them.
var AgentHashParameters = fmt.Sprintf("m=%d,t=%d,p=%d", argon2Memory, argon2Time, argon2Threads)

// hashAgentToken hashes the random part of an Agent Access Token: 8 MiB, and a few hundred milliseconds of
// all cores.
func hashAgentToken(random string, salt [16]byte) [128]byte {
	return [128]byte(argon2.IDKey([]byte(random), salt[:], argon2Time, argon2Memory, argon2Threads, 128))
}

const (
	// settleMost is how long a request waits for its turn and its verdict, and settleMargin how much sooner
	// than its deadline it is told to come again: whoever is cut off learns nothing.
	settleMost   = 2 * time.Second
	settleMargin = 50 * time.Millisecond
	// settleWrong is how many wrong secrets are remembered.
	settleWrong = 65_536
)

// A Settler finds out whether an Agent Access Token is the secret of a key that was imported by its Argon2id
// hash, and if it is, gives the key an ordinary digest: then no other token is ever hashed for it again.
// Hashes are made one at a time, whoever asks. Safe for concurrent use. Begin with [NewSettler].
type Settler struct {
	svc     *Service
	guesses Guesses
	hash    func(random string, salt [16]byte) [128]byte
	turn    chan struct{} // holds one value while a hash is made

	mu    sync.Mutex
	wrong *simplelru.LRU[guess, struct{}]
}

// Guesses bound how many secrets a source may try. Errors of Guess: *apikey.BusyError.
type Guesses interface {
	Guess(source netip.Addr) error
}

// A guess is a token, and the revision of the key as which it was wrong.
type guess struct {
	digest apikey.Digest
	key    apikey.Revision
}

// NewSettler returns a Settler of the keys of a service, which must have a [Propagator]. Give
// [Settler.Run] a goroutine.
func NewSettler(svc *Service, guesses Guesses) *Settler {
	wrong, err := simplelru.NewLRU[guess, struct{}](settleWrong, nil)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &Settler{svc: svc, guesses: guesses, hash: hashAgentToken, turn: make(chan struct{}, 1), wrong: wrong}
}

// Run waits until ctx is done, and then for the hash that is being made. None is made after that.
func (s *Settler) Run(ctx context.Context) error {
	<-ctx.Done()
	s.turn <- struct{}{}
	return nil
}

// Settle is authz.Settler's: it judges a token for a key that its apikey.ID.PendingDigest found, and whose
// life has been judged. digest is the token's, under the current pepper.
//
// A request that cannot wait for the end of it is told to come again; what was begun goes on, so that it
// finds the key then.
func (s *Settler) Settle(ctx context.Context, k *apikey.Key, token *apikey.AgentToken, digest apikey.Digest, source netip.Addr) error {
	if k != nil && s.isWrong(guess{digest, k.Revision}) {
		return apikey.ErrNotFound
	}
	if err := s.guesses.Guess(source); err != nil {
		return err
	}
	if k == nil {
		_, rev, err := s.svc.store.FindKey(ctx, digest)
		if err != nil {
			return err
		}
		return s.catchUp(ctx, rev)
	}
	wait := settleMost
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline)-settleMargin)
	}
	patience := time.NewTimer(wait)
	defer patience.Stop()
	select {
	case s.turn <- struct{}{}:
	case <-patience.C:
		return errSettling
	case <-ctx.Done():
		return fmt.Errorf("%w: settle key: %w", apikey.ErrUndecided, context.Cause(ctx))
	}
	verdict := make(chan error, 1)
	go func() {
		defer func() { <-s.turn }()
		began := time.Now()
		err := s.settle(context.WithoutCancel(ctx), k.ID, token, digest, source) // it will be asked again: the first may leave
		verdict <- err
		if isNotFound(err) {
			time.Sleep(time.Since(began)) // who guesses has half of the machine, and the others the rest
		}
	}()
	select {
	case err := <-verdict:
		return err
	case <-patience.C:
		return errSettling
	case <-ctx.Done():
		return fmt.Errorf("%w: settle key: %w", apikey.ErrUndecided, context.Cause(ctx))
	}
}

var errSettling error = &apikey.BusyError{What: "an Agent Access Token is being looked at for the first time", RetryAfter: time.Second}

// settle judges a token, its turn having come.
func (s *Settler) settle(ctx context.Context, id apikey.ID, token *apikey.AgentToken, digest apikey.Digest, source netip.Addr) (err error) {
	defer func() { // nobody above would catch it
		if p := recover(); p != nil {
			s.svc.log.Error("panic", "doing", "settle key", "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("%w: settle key: a panic, see the log", apikey.ErrUndecided)
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, updateTimeout)
	defer cancel()
	// Much may have happened while others had their turn, also on other replicas.
	k, rev, err := s.svc.store.FindKey(ctx, id.PendingDigest())
	switch {
	case isNotFound(err):
		return s.catchUp(ctx, rev) // it was settled, or is gone
	case err != nil:
		return err
	case unusable(k):
		return s.catchUp(ctx, rev)
	case s.isWrong(guess{digest, k.Revision}):
		return apikey.ErrNotFound
	}
	kept, err := s.svc.store.AgentHash(ctx, id)
	switch {
	case isNotFound(err):
		return s.catchUp(ctx, rev)
	case err != nil:
		return err
	}
	sum := s.hash(token.Random.Reveal(), kept.Salt)
	if subtle.ConstantTimeCompare(sum[:], kept.Hash[:]) != 1 {
		s.mu.Lock()
		s.wrong.Add(guess{digest, k.Revision}, struct{}{})
		s.mu.Unlock()
		return apikey.ErrNotFound
	}
	caller := Caller{Name: sweeper.Name}
	if source.IsValid() {
		caller.RemoteAddr = source.String()
	}
	rev, err = s.svc.update(ctx, func(ctx context.Context, tx Tx) error {
		k, _, err := tx.FindKey(ctx, id.PendingDigest())
		if err != nil {
			return err
		}
		now, err := tx.AgentHash(ctx, id)
		if err != nil {
			return err
		}
		if now != kept || unusable(k) {
			return errNothing
		}
		if err := tx.Settle(ctx, id, digest, s.svc.cfg.Peppers.Current.Version()); err != nil {
			return err
		}
		return caller.audit(ctx, tx, settleKey, k.InstanceID, id.String(), nil, auditOf(k))
	})
	if isNotFound(err) || errors.Is(err, errNothing) || errors.Is(err, apikey.ErrConflict) {
		// Somebody was faster, and what is so now is in the store.
		rev, err = s.svc.head(ctx)
	}
	if err != nil {
		s.svc.log.Warn("a token was confirmed by its Argon2id hash, and that could not be written down; it is tried again when the token comes again",
			slog.String("key", id.String()), slog.Any("error", err))
		return err
	}
	return s.catchUp(ctx, rev)
}

// unusable reports whether a key cannot be used, whatever its secret.
func unusable(k *apikey.Key) bool {
	at := now()
	status := k.StatusAt(at)
	return status != apikey.StatusActive && status != apikey.StatusIdle || k.GenerationEnded(at) // idle: by the record only
}

// catchUp makes this replica as new as the store was, so that whoever looks again sees that.
func (s *Settler) catchUp(ctx context.Context, rev apikey.Revision) error {
	return s.svc.replicas.CatchUp(ctx, rev)
}

func (s *Settler) isWrong(g guess) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, wrong := s.wrong.Get(g)
	return wrong
}
