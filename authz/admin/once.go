package admin

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"keyward/authz/apikey"
)

// Once lets a request that makes a secret be repeated until its answer arrives: only the first one does
// anything, the others get what that made.
//
// What it made is kept for ten minutes in the same transaction as the key, sealed under a key that is
// derived from the pepper and from everything that tells one request from another, the caller's own
// Idempotency-Key among it: neither the database nor the pepper nor both open it without the request.
type Once struct {
	Key           string // the Idempotency-Key: 1 to 255 printable characters
	Method, Route string
	Body          [32]byte // SHA-256 of the body
}

const replayLife = 10 * time.Minute

var (
	// ErrReplayBody: the Idempotency-Key was used for another body.
	ErrReplayBody = errors.New("the Idempotency-Key was used with another body")
	// ErrReplayGone: what the first request made is over, so there is no answer to repeat.
	ErrReplayGone = errors.New("what the first request with this Idempotency-Key made does not work any more")

	errReplayed = errors.New("another request with this Idempotency-Key got there first")
)

// A replay is what an earlier request made.
type replay struct {
	KeyID      apikey.ID `json:"keyId"`      // or a management token's
	Generation int       `json:"generation"` // 0 for a token
	Secret     string    `json:"secret"`
	Body       []byte    `json:"body"`
}

// names returns where a replay is kept under a pepper, and what it is sealed with.
func (o *Once) names(p *apikey.Pepper, caller Caller, instanceID string) (id ReplayID, key [32]byte) {
	var facts []byte
	for _, s := range []string{caller.Name, instanceID, o.Method, o.Route, o.Key} {
		facts = binary.BigEndian.AppendUint32(facts, uint32(len(s))) // or two requests could be spelled alike
		facts = append(facts, s...)
	}
	return p.Derive("idempotency record " + string(facts)), p.Derive("idempotency seal " + string(facts))
}

func (o *Once) seal(key [32]byte, r replay) ([]byte, error) {
	r.Body = o.Body[:]
	text, err := json.Marshal(r) //nolint:gosec // G117: to be sealed right here
	if err != nil {
		return nil, err
	}
	c, err := sealer(key)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, c.NonceSize()) // after ten minutes the same key may seal again
	_, _ = rand.Read(nonce)
	return c.Seal(nonce, nonce, text, nil), nil
}

func unseal(key [32]byte, sealed []byte) (r replay, err error) {
	c, err := sealer(key)
	if err != nil {
		return r, err
	}
	if len(sealed) < c.NonceSize() {
		return r, errors.New("a kept answer is too short")
	}
	text, err := c.Open(nil, sealed[:c.NonceSize()], sealed[c.NonceSize():], nil)
	if err != nil {
		return r, errors.New("a kept answer cannot be opened: was the database changed?")
	}
	return r, json.Unmarshal(text, &r)
}

func sealer(key [32]byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// once does what makes a secret, unless an earlier request of the caller's with the same Idempotency-Key did:
// then it answers what that made. It waits for the replicas as long as do would.
func (s *Service) once(ctx context.Context, caller Caller, instanceID string, wait time.Duration, do func() (CreatedKey, error)) (CreatedKey, error) {
	if caller.Once == nil {
		return do()
	}
	if made, found, err := s.replay(ctx, caller, instanceID, wait); found || err != nil {
		return made, err
	}
	made, err := do()
	if err == nil {
		return made, nil
	}
	// The other one may have been faster by a moment, and what it made is then what this one was refused for:
	// the last free place, say.
	switch made, found, lookErr := s.replay(ctx, caller, instanceID, wait); {
	case found || lookErr != nil:
		return made, lookErr
	case errors.Is(err, errReplayed):
		return CreatedKey{}, apikey.ErrConflict // the other one's time ran out at this very moment
	}
	return CreatedKey{}, err
}

// replay returns the key and secret that an earlier request of the caller's with the same Idempotency-Key
// made; found is false if there was none. Whoever calls it has asked whether the caller may do it at all.
// Errors: [ErrReplayBody]; [ErrReplayGone] once the key is revoked, gone, or not the caller's any more, or
// the secret has ended.
func (s *Service) replay(ctx context.Context, caller Caller, instanceID string, wait time.Duration) (made CreatedKey, found bool, err error) {
	r, found, err := s.keptReplay(ctx, caller, instanceID)
	if !found || err != nil {
		return CreatedKey{}, false, err
	}
	k, err := s.store.Key(ctx, instanceID, r.KeyID)
	switch {
	case isNotFound(err):
		return CreatedKey{}, false, ErrReplayGone
	case err != nil:
		return CreatedKey{}, false, err
	case !k.RevokedAt.IsZero() || !caller.owns(k) || !works(k, r.Generation, now()):
		return CreatedKey{}, false, ErrReplayGone
	}
	// The first request may have ended before the replicas knew of the key.
	rev, err := s.head(ctx)
	if err != nil {
		return CreatedKey{}, false, err
	}
	return CreatedKey{Key: k, Secret: apikey.NewSecret(r.Secret), Propagation: s.propagate(ctx, rev, wait), Replayed: true}, true, nil
}

// keptReplay returns what an earlier request of the caller's with the same Idempotency-Key made, whether or not
// that still works; found is false if there was none. Errors: [ErrReplayBody]; [ErrUnauthenticated].
func (s *Service) keptReplay(ctx context.Context, caller Caller, instanceID string) (r replay, found bool, err error) {
	o := caller.Once
	for _, p := range []*apikey.Pepper{s.cfg.Peppers.Current, s.cfg.Peppers.Previous} {
		if p == nil {
			continue
		}
		id, key := o.names(p, caller, instanceID)
		sealed, err := s.store.Replay(ctx, id, now())
		if isNotFound(err) {
			continue
		}
		if err != nil {
			return replay{}, false, err
		}
		if r, err = unseal(key, sealed); err != nil {
			return replay{}, false, err
		}
		found = true
		break
	}
	switch {
	case !found:
		return replay{}, false, nil
	case !bytes.Equal(r.Body, o.Body[:]):
		return replay{}, false, ErrReplayBody
	}
	if err := stillGood(ctx, s.store); err != nil { // a secret is told, though nothing is changed
		return replay{}, false, err
	}
	return r, true, nil
}

// works reports whether a generation is there and has not ended.
func works(k *apikey.Key, generation int, now time.Time) bool {
	for _, g := range k.Generations {
		if g.Number == generation {
			return !g.EndedAt(now)
		}
	}
	return false
}

// keepReplay keeps what a transaction makes, if the caller gave an Idempotency-Key. Errors: errReplayed if
// another request was faster: then nothing is committed, and replay has the answer.
func (s *Service) keepReplay(ctx context.Context, tx Tx, caller Caller, instanceID string, keyID apikey.ID, generation int, secret apikey.Secret) error {
	o := caller.Once
	if o == nil {
		return nil
	}
	id, key := o.names(s.cfg.Peppers.Current, caller, instanceID)
	sealed, err := o.seal(key, replay{KeyID: keyID, Generation: generation, Secret: secret.Reveal()})
	if err != nil {
		return err
	}
	at := now()
	err = tx.KeepReplay(ctx, id, sealed, at, at.Add(replayLife))
	if errors.Is(err, apikey.ErrConflict) {
		return errReplayed
	}
	if err != nil {
		return fmt.Errorf("keep the answer for its Idempotency-Key: %w", err)
	}
	return nil
}
