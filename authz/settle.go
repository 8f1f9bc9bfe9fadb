package authz

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"keyward/authz/apikey"
)

// settle judges an Agent Access Token that no digest finds: a key may be known by the slow hash of it. Ids
// are public, so everything that can refuse without that hash does so first; and until it is proved, nobody
// is told whose token this claims to be. nil: look again.
// Errors: apikey.ErrNotFound, and those of [Settler].
func (a *Authorizer) settle(ctx context.Context, r *Request, q *question) error {
	if r.explain != nil {
		return r.explain.settle(ctx, q)
	}
	token, err := apikey.ParseAgentToken(q.secret)
	if err != nil {
		return apikey.ErrNotFound
	}
	digest, pending := r.digests[0], &r.digests[1] // find has left the token's own in the first
	*pending = token.KeyID.PendingDigest()
	k, ok, err := a.keys.Cached(pending)
	if !ok && err == nil && q.mayBlock {
		k, err = a.keys.FindKey(ctx, *pending, q.client)
	}
	switch {
	case errors.Is(err, apikey.ErrNotFound) && !a.settler.Lacks(pending):
		// It may have been settled since the token's own digest was looked for, or since this replica last
		// heard of changes.
		if !q.mayBlock {
			return errBlock
		}
		return a.settler.Settle(ctx, nil, &token, digest, q.client)
	case err != nil:
		return err
	case k == nil:
		return errBlock
	// The hash is of the random part alone: the rest could be anything.
	case k.InstanceID != token.InstanceID || !strings.EqualFold(k.AgentName, token.AgentName):
		return apikey.ErrNotFound
	}
	instance := a.keys.Instance(k.InstanceID)
	if instance == nil {
		return fmt.Errorf("instance of key %s is not known yet: %w", k.ID, apikey.ErrUndecided)
	}
	switch reason, _, err := a.life(ctx, k, instance, q); {
	case err != nil:
		return err
	case reason != ReasonNone:
		return apikey.ErrNotFound
	case !q.mayBlock:
		return errBlock
	}
	return a.settler.Settle(ctx, k, &token, digest, q.client)
}
