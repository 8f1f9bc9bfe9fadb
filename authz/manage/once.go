package manage

import (
	"context"
	"crypto/sha256"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

const onceHeader = "Idempotency-Key"

// onceOperations are those that make a secret and read their body by readOnce. Other operations that are
// not repeatable by nature refuse the header, because what is ignored there would be found out by having
// made two things.
var onceOperations = map[string]bool{"createKey": true, "rotateKey": true}

// onceParameter documents the header.
var onceParameter = &huma.Param{
	Name: onceHeader, In: "header", Schema: &huma.Schema{Type: huma.TypeString, MinLength: new(1), MaxLength: new(255)},
	Description: "Makes it safe to send the request again: for ten minutes the same caller, key and body get the same answer, " +
		"with Idempotent-Replayed: true. 422 for another body; 409 once what was made is revoked.",
}

// refuseOnce refuses the header where nothing would heed it.
func refuseOnce(op *huma.Operation, r *http.Request) error {
	if op.Method == http.MethodPost && !onceOperations[op.OperationID] && len(r.Header.Values(onceHeader)) > 0 {
		return apikey.Invalid(onceHeader, "is not supported here")
	}
	return nil
}

// readOnce reads the body of a request that makes a secret, with its Idempotency-Key if it has one.
func (c *call) readOnce(into any) error {
	data, err := readData(c.w, c.r)
	if err != nil {
		return err
	}
	sent := c.r.Header.Values(onceHeader)
	switch {
	case len(sent) > 1:
		return apikey.Invalid(onceHeader, "is given twice")
	case len(sent) == 1:
		if !printable(sent[0], 255) {
			return apikey.Invalid(onceHeader, "must be 1 to 255 printable ASCII characters")
		}
		c.Once = &admin.Once{Key: sent[0], Method: c.r.Method, Route: c.r.URL.Path, Body: sha256.Sum256(data)}
	}
	return decode(data, into)
}

// printable reports whether s has 1 to most printable ASCII characters, none of them a space.
func printable(s string, most int) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return s != "" && len(s) <= most
}

type onceKey struct{}

// WithIdempotencyKey makes the calls of a client that make a secret, with the context that it returns, safe
// to repeat for ten minutes: those with the same key and input do it once.
func WithIdempotencyKey(ctx context.Context, key string) context.Context {
	return context.WithValue(ctx, onceKey{}, key)
}
