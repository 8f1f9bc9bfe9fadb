package manage

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A Client calls the Management API. Safe for concurrent use.
//
// Errors of its methods: *[Error] where the server answered, otherwise what net/http says.
type Client struct {
	base  string
	token apikey.Secret
	http  *http.Client
}

// NewClient returns a client of the server at baseURL, e.g. "http://127.0.0.1:9821". httpClient is
// http.DefaultClient if nil. Redirects are not followed: the API has none, and a token should not
// travel further than it was sent.
func NewClient(baseURL string, token apikey.Secret, httpClient *http.Client) *Client {
	if httpClient == nil {
		httpClient = http.DefaultClient
	}
	own := *httpClient
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &Client{base: strings.TrimRight(baseURL, "/"), token: token, http: &own}
}

// PutInstance creates an instance or replaces its policy; see [WithIfMatch] and [WithIfAbsent].
func (c *Client) PutInstance(ctx context.Context, instanceID string, policy admin.PolicyInput) (ChangedInstance, error) {
	return send[ChangedInstance](ctx, c, http.MethodPut, instancePath(instanceID), nil, InstanceInput{&policy})
}

// Instance returns one instance.
func (c *Client) Instance(ctx context.Context, instanceID string) (Instance, error) {
	return send[Instance](ctx, c, http.MethodGet, instancePath(instanceID), nil, nil)
}

// A VersionedInstance is an instance with its ETag.
type VersionedInstance struct {
	Instance
	ETag string `json:"etag,omitempty"`
}

func (i *VersionedInstance) version(etag string) { i.ETag = etag }

// VersionedInstance returns one instance with its ETag, for [WithIfMatch].
func (c *Client) VersionedInstance(ctx context.Context, instanceID string) (VersionedInstance, error) {
	return send[VersionedInstance](ctx, c, http.MethodGet, instancePath(instanceID), nil, nil)
}

// Instances lists the instances that the token can see.
func (c *Client) Instances(ctx context.Context) ([]Instance, error) {
	answer, err := send[list[Instance]](ctx, c, http.MethodGet, "/instances", nil, nil)
	return answer.Value, err
}

// DeleteInstance removes an instance; with revokeKeys also if it has usable keys.
func (c *Client) DeleteInstance(ctx context.Context, instanceID string, revokeKeys bool) (DeletedInstance, error) {
	query := url.Values{"revokeKeys": {strconv.FormatBool(revokeKeys)}}
	return send[DeletedInstance](ctx, c, http.MethodDelete, instancePath(instanceID), query, nil)
}

// A CreatedKey is a new key with its secret, which the server does not have any more.
type CreatedKey struct {
	Key    admin.KeyRecord
	Secret apikey.Secret
}

// CreateKey makes a key.
func (c *Client) CreateKey(ctx context.Context, instanceID string, in admin.KeyInput) (CreatedKey, error) {
	answer, err := send[createdKey](ctx, c, http.MethodPost, instancePath(instanceID, "apiKeys"), nil, in)
	return CreatedKey{answer.Key, apikey.NewSecret(answer.Secret)}, err
}

// Key returns one key.
func (c *Client) Key(ctx context.Context, instanceID string, id apikey.ID) (admin.KeyRecord, error) {
	return send[admin.KeyRecord](ctx, c, http.MethodGet, instancePath(instanceID, "apiKeys", id.String()), nil, nil)
}

// Keys lists the keys of an instance, newest first, page by page as they are asked for. An error ends it.
func (c *Client) Keys(ctx context.Context, instanceID string) iter.Seq2[admin.KeyRecord, error] {
	return c.FindKeys(ctx, instanceID, admin.KeyListInput{})
}

// RevokeKey ends a key for good. It may be repeated. reason is for the audit and may be empty.
func (c *Client) RevokeKey(ctx context.Context, instanceID string, id apikey.ID, reason string) (RevokedKey, error) {
	var query url.Values
	if reason != "" {
		query = url.Values{"reason": {reason}}
	}
	return send[RevokedKey](ctx, c, http.MethodDelete, instancePath(instanceID, "apiKeys", id.String()), query, nil)
}

// A CreatedToken is a new management token with its secret, which the server does not have any more.
type CreatedToken struct {
	Token  admin.TokenRecord
	Secret apikey.Secret
}

// CreateToken makes a management token.
func (c *Client) CreateToken(ctx context.Context, in admin.TokenInput) (CreatedToken, error) {
	answer, err := send[createdToken](ctx, c, http.MethodPost, "/tokens", nil, in)
	return CreatedToken{answer.Token, apikey.NewSecret(answer.Secret)}, err
}

// Tokens lists the management tokens that the token can see.
func (c *Client) Tokens(ctx context.Context) ([]admin.TokenRecord, error) {
	answer, err := send[list[admin.TokenRecord]](ctx, c, http.MethodGet, "/tokens", nil, nil)
	return answer.Value, err
}

// RevokeToken ends a management token. It may be repeated.
func (c *Client) RevokeToken(ctx context.Context, id apikey.ID) (RevokedToken, error) {
	return send[RevokedToken](ctx, c, http.MethodDelete, "/tokens/"+id.String(), nil, nil)
}

func instancePath(instanceID string, more ...string) string {
	return strings.Join(append([]string{"/instances", url.PathEscape(instanceID)}, more...), "/")
}

const (
	pageSize  = 200
	maxAnswer = 64 << 20 // more than any page of keys
)

// send sends one request, with body as JSON unless nil, and reads the answer.
func send[T any](ctx context.Context, c *Client, method, path string, query url.Values, body any) (T, error) {
	if body == nil {
		return sendAs[T](ctx, c, method, path, query, "", nil)
	}
	b, err := json.Marshal(body)
	if err != nil {
		var none T
		return none, err
	}
	mediaType := "application/json"
	if method == http.MethodPatch {
		mediaType = mergePatch
	}
	return sendAs[T](ctx, c, method, path, query, mediaType, bytes.NewReader(b))
}

// sendAs sends one request with a body of a type, and reads the answer.
func sendAs[T any](ctx context.Context, c *Client, method, path string, query url.Values, mediaType string, body io.Reader) (T, error) {
	var answer T
	resp, err := c.do(ctx, method, path, query, mediaType, body)
	if err != nil {
		return answer, err
	}
	defer func() { _ = resp.Body.Close() }()
	got, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return answer, fmt.Errorf("read the answer: %w", err)
	}
	if err := json.Unmarshal(got, &answer); err != nil {
		return answer, fmt.Errorf("the answer is not what a Management API sends: is there something else at %s?", c.base)
	}
	if versioned, ok := any(&answer).(interface{ version(etag string) }); ok {
		versioned.version(resp.Header.Get("ETag"))
	}
	return answer, nil
}

// do sends one request, with a body of a type unless that is "". The answer is a success; whoever asked
// closes its body.
func (c *Client) do(ctx context.Context, method, path string, query url.Values, mediaType string, body io.Reader) (*http.Response, error) {
	address := c.base + path
	if len(query) > 0 {
		address += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, address, body)
	if err != nil {
		return nil, err
	}
	if mediaType != "" {
		req.Header.Set("Content-Type", mediaType)
	}
	if seen, ok := ctx.Value(ifMatchKey{}).(string); ok && method != http.MethodGet {
		req.Header.Set(ifMatchHeader, seen)
	}
	if ctx.Value(ifAbsentKey{}) != nil && method == http.MethodPut {
		req.Header.Set(ifNoneMatchHeader, "*")
	}
	if once, ok := ctx.Value(onceKey{}).(string); ok && method == http.MethodPost {
		req.Header.Set(onceHeader, once)
	}
	req.Header.Set("Authorization", "Bearer "+c.token.Reveal())
	resp, err := c.http.Do(req)
	if err != nil || resp.StatusCode/100 == 2 {
		return resp, err
	}
	defer func() { _ = resp.Body.Close() }()
	got, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	failed := errorOf(resp, got)
	if failed.Code == "" {
		failed.Message = fmt.Sprintf("%s answers with HTTP status %d, and not as a Management API does: is there something else, or something in between?", c.base, failed.Status)
	}
	return nil, failed
}

func errorOf(resp *http.Response, got []byte) *Error {
	e := &Error{Status: resp.StatusCode, RequestID: resp.Header.Get("X-Request-Id")}
	var body ErrorBody
	if json.Unmarshal(got, &body) == nil { // what stands between may answer in its own way
		e.Code, e.Message, e.Target, e.Details = body.Error.Code, body.Error.Message, body.Error.Target, body.Error.Details
	}
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
		e.RetryAfter = time.Duration(seconds) * time.Second
	}
	return e
}
