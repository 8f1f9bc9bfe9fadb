package admin

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"keyward/authz/apikey"
)

// What FoundationaLLM's Management API does with Agent Access Tokens: they are the keys of an agent, under ids
// that the client chooses, with secrets in that platform's format. A role that has to do with its own keys only
// has nothing to do with them.

// An AgentTokenInput is what is said of an Agent Access Token, each time all of it.
type AgentTokenInput struct {
	Description    string
	Active         bool
	ExpirationDate string // RFC 3339
}

// A PutAgentToken is an Agent Access Token that is there now.
type PutAgentToken struct {
	Key         *apikey.Key
	Secret      apikey.Secret // only of a new one
	Created     bool
	Propagation Propagation
}

// agentToken is what a new Agent Access Token has besides what every key has.
type agentToken struct {
	id       apikey.ID
	disabled bool
}

// AgentTokens returns the keys of an agent that are not revoked, the newest first: all of them, whatever format
// their secrets have.
func (s *Service) AgentTokens(ctx context.Context, caller Caller, instanceID, agent string) ([]*apikey.Key, error) {
	id, err := caller.mayAgentTokens(instanceID, readKeys)
	if err != nil {
		return nil, err
	}
	if _, err := s.store.Instance(ctx, id); err != nil {
		return nil, err
	}
	if !agentName.ok(agent) {
		return nil, nil
	}
	var all []*apikey.Key
	q := KeyQuery{KeyFilter: KeyFilter{Type: apikey.TypeAgent, AgentName: agent}, Now: now()}
	err = allKeys(ctx, s.store, id, q, func(k *apikey.Key) bool {
		if k.RevokedAt.IsZero() {
			all = append(all, k)
		}
		return true
	})
	return all, err
}

// PutAgentToken makes an Agent Access Token under an id, or changes the one that has it. What is new is a key as
// any other: the policy, the caps and the creation rate hold. One that was deleted cannot be had again.
// Errors: *StateError where the id is another key's, or the server knows no such tokens; those of CreateKey and
// UpdateKey.
func (s *Service) PutAgentToken(ctx context.Context, caller Caller, instanceID, agent string, id apikey.ID, in AgentTokenInput) (PutAgentToken, error) {
	instance, err := caller.mayAgentTokens(instanceID, createKey)
	if err != nil {
		return PutAgentToken{}, err
	}
	old, err := s.store.Key(ctx, instance, id)
	switch {
	case isNotFound(err):
		return s.createAgentToken(ctx, caller, instance, agent, id, in)
	case err != nil:
		return PutAgentToken{}, err
	case old.Type != apikey.TypeAgent || old.AgentName != agent:
		return PutAgentToken{}, &StateError{"another key has this id"}
	case !old.RevokedAt.IsZero():
		return PutAgentToken{}, &StateError{"the token was deleted: make one with another id"}
	}
	patch := KeyPatch{Description: To(in.Description), Disabled: To(!in.Active)}
	// Where it stays, it may be in the past, or beyond what the policy allows by now.
	end, day, err := parseTime("expiration_date", in.ExpirationDate)
	if day {
		end = endOfDay(end)
	}
	if err != nil || !end.Equal(old.ExpirationDate) {
		patch.ExpirationDate = To(in.ExpirationDate)
	}
	changed, err := s.UpdateKey(ctx, caller, instance, id, patch, 0)
	if err != nil {
		return PutAgentToken{}, asAgentToken(err)
	}
	return PutAgentToken{Key: changed.Key, Propagation: changed.Propagation}, nil
}

func (s *Service) createAgentToken(ctx context.Context, caller Caller, instance, agent string, id apikey.ID, in AgentTokenInput) (PutAgentToken, error) {
	if !slices.Contains(s.cfg.Format.Foreign, apikey.Shape{AgentToken: true}) {
		return PutAgentToken{}, &StateError{"the server's configuration does not register Agent Access Tokens, so it would know none: add credentials.foreign: [{parser: agentAccessToken}], or preset: {name: foundationallm}"}
	}
	made, err := s.createKey(ctx, caller, instance, KeyInput{
		Name: id.String(), Description: in.Description, Type: apikey.TypeAgent, AgentName: agent, ExpirationDate: in.ExpirationDate,
	}, &agentToken{id: id, disabled: !in.Active})
	if errors.Is(err, apikey.ErrConflict) {
		err = &StateError{"another key has this id"}
	}
	return PutAgentToken{Key: made.Key, Secret: made.Secret, Created: true, Propagation: made.Propagation}, asAgentToken(err)
}

// asAgentToken names the fields of an input as this API does.
func asAgentToken(err error) error {
	bad, ok := errors.AsType[*apikey.InvalidError](err)
	if many, joined := err.(interface{ Unwrap() []error }); joined {
		var all faults
		for _, one := range many.Unwrap() {
			all.add(asAgentToken(one))
		}
		return all.err()
	}
	if ok && bad.Field == "expirationDate" {
		return apikey.Invalid("expiration_date", bad.Reason)
	}
	return err
}

// DeleteAgentToken revokes an Agent Access Token. One that is not there is deleted already.
func (s *Service) DeleteAgentToken(ctx context.Context, caller Caller, instanceID, agent string, id apikey.ID) (Propagation, error) {
	instance, err := caller.mayAgentTokens(instanceID, revokeKey)
	if err != nil {
		return Propagation{}, err
	}
	if _, err := s.store.Instance(ctx, instance); err != nil {
		return Propagation{}, err
	}
	k, err := s.store.Key(ctx, instance, id)
	if isNotFound(err) || err == nil && (k.Type != apikey.TypeAgent || k.AgentName != agent) {
		return Propagation{Everywhere: true}, nil
	}
	if err != nil {
		return Propagation{}, err
	}
	done, err := s.RevokeKey(ctx, caller, instance, id, "")
	return done.Propagation, err
}

// ValidateAgentToken returns the key of an Agent Access Token that may be used now for an agent of an instance;
// nil if it may not. It counts as no use of it.
// Errors: *StateError for one that was imported by its Argon2id hash and has not been used since.
func (s *Service) ValidateAgentToken(ctx context.Context, caller Caller, instanceID, agent, secret string) (*apikey.Key, error) {
	instance, err := caller.mayAgentTokens(instanceID, readKeys)
	if err != nil {
		return nil, err
	}
	in, err := s.store.Instance(ctx, instance)
	if err != nil {
		return nil, err
	}
	token, err := apikey.ParseAgentToken(secret)
	if err != nil || token.InstanceID != instance || !strings.EqualFold(token.AgentName, agent) {
		return nil, nil //nolint:nilerr // that it is none is the answer
	}
	for _, d := range s.digests(func(p *apikey.Pepper) apikey.Digest { return p.DigestOf(apikey.KindForeign, secret) }) {
		k, _, err := s.store.FindKey(ctx, d)
		switch {
		case isNotFound(err):
			continue
		case err != nil:
			return nil, err
		case k.ID != token.KeyID || k.InstanceID != instance || k.Type != apikey.TypeAgent:
			return nil, nil
		}
		at := time.Now()
		if k.StatusAt(at) != apikey.StatusActive || k.GenerationEnded(at) || in.Policy.Disabled {
			return nil, nil
		}
		return k, nil
	}
	pending, _, err := s.store.FindKey(ctx, token.KeyID.PendingDigest())
	switch {
	case isNotFound(err):
		return nil, nil
	case err != nil:
		return nil, err
	case unusable(pending) || pending.InstanceID != instance || in.Policy.Disabled:
		return nil, nil
	}
	return nil, &StateError{"the token was imported by its hash: whether this is it shows when it is first used"}
}

// mayAgentTokens is mayIn for Agent Access Tokens.
func (c Caller) mayAgentTokens(instanceID, action string) (string, error) {
	id, err := c.mayIn(instanceID, action)
	if err == nil && c.Role == RoleUser {
		return "", &ForbiddenError{Reason: "the role user has no right to Agent Access Tokens: it has to do with keys of its own"}
	}
	return id, err
}
