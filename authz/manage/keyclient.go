package manage

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

type ifMatchKey struct{}

// WithIfMatch makes the calls of a client that change a key or put an instance, with the context that it
// returns, fail with [CodePreconditionFailed] unless that is as it was when it had this ETag; *: is there.
func WithIfMatch(ctx context.Context, etag string) context.Context {
	return context.WithValue(ctx, ifMatchKey{}, etag)
}

type ifAbsentKey struct{}

// WithIfAbsent makes [Client.PutInstance], with the context that it returns, fail with [CodePreconditionFailed]
// where there is such an instance already: it is not replaced.
func WithIfAbsent(ctx context.Context) context.Context {
	return context.WithValue(ctx, ifAbsentKey{}, true)
}

// A VersionedKey is a key with its ETag.
type VersionedKey struct {
	admin.KeyRecord
	ETag string `json:"etag,omitempty"`
}

func (k *VersionedKey) version(etag string) { k.ETag = etag }

// VersionedKey returns one key with its ETag, for [WithIfMatch].
func (c *Client) VersionedKey(ctx context.Context, instanceID string, id apikey.ID) (VersionedKey, error) {
	return send[VersionedKey](ctx, c, http.MethodGet, keyPath(instanceID, id), nil, nil)
}

// FindKeys lists the keys of an instance that in describes, page by page as they are asked for. An error
// ends it.
func (c *Client) FindKeys(ctx context.Context, instanceID string, in admin.KeyListInput) iter.Seq2[admin.KeyRecord, error] {
	return func(yield func(admin.KeyRecord, error) bool) {
		query := listQuery(in)
		query.Set("maxpagesize", strconv.Itoa(pageSize))
		for {
			page, err := send[list[admin.KeyRecord]](ctx, c, http.MethodGet, instancePath(instanceID, "apiKeys"), query, nil)
			if err != nil {
				yield(admin.KeyRecord{}, err)
				return
			}
			for _, k := range page.Value {
				if !yield(k, nil) {
					return
				}
			}
			if page.NextLink == "" {
				return
			}
			// Only the cursor is taken from the link: the token goes to no other server.
			next, err := url.Parse(page.NextLink)
			if err != nil || next.Query().Get("cursor") == "" {
				yield(admin.KeyRecord{}, fmt.Errorf("list keys: the server's nextLink has no cursor"))
				return
			}
			query.Set("cursor", next.Query().Get("cursor"))
		}
	}
}

// listQuery writes in as a query. Its parameters have the names of the members in JSON, and what is absent
// there is absent here.
func listQuery(in admin.KeyListInput) url.Values {
	query := url.Values{}
	text, err := json.Marshal(in)
	var members map[string]any
	if err == nil {
		err = json.Unmarshal(text, &members)
	}
	if err != nil {
		panic(err) // of a struct of strings and bools
	}
	for name, value := range members {
		query.Set(name, fmt.Sprint(value))
	}
	return query
}

// UpdateKey changes a key.
func (c *Client) UpdateKey(ctx context.Context, instanceID string, id apikey.ID, patch admin.KeyPatch) (ChangedKey, error) {
	return send[ChangedKey](ctx, c, http.MethodPatch, keyPath(instanceID, id), nil, patch)
}

// A RotatedKey is a key with another secret, which the server does not have any more.
type RotatedKey struct {
	CreatedKey
	Effect Effect
}

// RotateKey gives a key another secret.
func (c *Client) RotateKey(ctx context.Context, instanceID string, id apikey.ID, in admin.RotateInput) (RotatedKey, error) {
	answer, err := send[rotatedKey](ctx, c, http.MethodPost, keyPath(instanceID, id, "rotate"), nil, in)
	return RotatedKey{CreatedKey{answer.Key, apikey.NewSecret(answer.Secret)}, answer.Effect}, err
}

// RevokeGeneration ends one secret of a key at once. It may be repeated.
func (c *Client) RevokeGeneration(ctx context.Context, instanceID string, id apikey.ID, number int) (ChangedKey, error) {
	return send[ChangedKey](ctx, c, http.MethodPost, keyPath(instanceID, id, "generations", strconv.Itoa(number), "revoke"), nil, nil)
}

// RevokeKeys revokes every key of an instance that a filter means, or with DryRun tells which.
func (c *Client) RevokeKeys(ctx context.Context, instanceID string, in admin.BulkRevocation) (RevokedKeys, error) {
	return send[RevokedKeys](ctx, c, http.MethodPost, instancePath(instanceID, "apiKeys:revoke"), nil, in)
}

// KeyLimits returns the caps of an instance and their use, and those of one owner unless it is the zero one.
func (c *Client) KeyLimits(ctx context.Context, instanceID string, owner admin.KeyOwner) (admin.KeyLimits, error) {
	query := url.Values{}
	switch owner.Type {
	case apikey.TypeUser:
		query.Set("userPrincipalName", owner.Name)
	case apikey.TypeAgent:
		query.Set("agentName", owner.Name)
	}
	return send[admin.KeyLimits](ctx, c, http.MethodGet, instancePath(instanceID, "apiKeys:limits"), query, nil)
}

// KeyAdvice tells whether a key seems to be needed.
func (c *Client) KeyAdvice(ctx context.Context, instanceID string, id apikey.ID) (admin.Advice, error) {
	return send[admin.Advice](ctx, c, http.MethodGet, keyPath(instanceID, id, "advice"), nil, nil)
}

// SwitchInstance refuses every key of an instance, or no longer does. It may be repeated.
func (c *Client) SwitchInstance(ctx context.Context, instanceID string, disabled bool) (ChangedInstance, error) {
	action := "enable"
	if disabled {
		action = "disable"
	}
	return send[ChangedInstance](ctx, c, http.MethodPost, instancePath(instanceID, action), nil, nil)
}

func keyPath(instanceID string, id apikey.ID, more ...string) string {
	return instancePath(instanceID, append([]string{"apiKeys", id.String()}, more...)...)
}
