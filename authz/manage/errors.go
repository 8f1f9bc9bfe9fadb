package manage

import (
	"errors"
	"math"
	"net/http"
	"strconv"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// The codes of errors. They are part of the API: none changes its meaning, new ones may come. [Codes] says
// what each means.
const (
	CodeInvalidRequest        = "InvalidRequest"
	CodeUnauthorized          = "Unauthorized"
	CodeForbidden             = "Forbidden"
	CodeNotFound              = "NotFound"
	CodeMethodNotAllowed      = "MethodNotAllowed"
	CodeConflict              = "Conflict"
	CodeInstanceInUse         = "InstanceInUse"
	CodePepperInUse           = "PepperInUse"
	CodeQuotaExceeded         = "QuotaExceeded"
	CodeKeyState              = "KeyState"
	CodeNoWebhook             = "NoWebhook"
	CodeConfirmationNeeded    = "ConfirmationNeeded"
	CodeIdempotencyResultGone = "IdempotencyResultGone"
	CodePreconditionFailed    = "PreconditionFailed"
	CodePayloadTooLarge       = "PayloadTooLarge"
	CodeUnsupportedMediaType  = "UnsupportedMediaType"
	CodeIdempotencyKeyReused  = "IdempotencyKeyReused"
	CodeTooManyRequests       = "TooManyRequests"
	CodeInternalError         = "InternalError"
	CodeServiceUnavailable    = "ServiceUnavailable"
)

// A CodeMeaning says what a code of an error means.
type CodeMeaning struct {
	Code    string
	Status  int // of HTTP
	Meaning string
}

// Codes lists every code of an error, by status. docs/error-codes.md is made of it.
var Codes = []CodeMeaning{
	{CodeInvalidRequest, http.StatusBadRequest, "The request cannot be accepted as it is. `target` names the field or parameter; `details` lists all that is wrong."},
	{CodeUnauthorized, http.StatusUnauthorized, "There is no management token, or none that works."},
	{CodeForbidden, http.StatusForbidden, "The caller's role does not allow it, or the instance's policy does not allow the value that `target` names."},
	{CodeNotFound, http.StatusNotFound, "There is no such thing, or it is not the caller's to see."},
	{CodeMethodNotAllowed, http.StatusMethodNotAllowed, "There is something at this address, but it does not take the method; the header `Allow` lists those that it takes."},
	{CodeConflict, http.StatusConflict, "Another change got there first. Look how things are now, and try again."},
	{CodeInstanceInUse, http.StatusConflict, "The instance has usable keys: revoke them, or delete it with `revokeKeys=true`."},
	{CodePepperInUse, http.StatusConflict, "The pepper is the newest, or something can only be found with it."},
	{CodeQuotaExceeded, http.StatusConflict, "The instance's policy allows no more keys: the message names the cap, its size and how many are used."},
	{CodeKeyState, http.StatusConflict, "Not with a key as this one is, such as a revoked one: the message says what is in the way."},
	{CodeNoWebhook, http.StatusConflict, "The server has no webhook configured (`alerts.webhook`), so there is nothing to test."},
	{CodeConfirmationNeeded, http.StatusConflict, "It would revoke many keys, or keys that are in use. Repeat it with the count that the message tells."},
	{CodeIdempotencyResultGone, http.StatusConflict, "What the first request with this `Idempotency-Key` made is revoked, has ended or is gone. Send a new request with a new key."},
	{CodePreconditionFailed, http.StatusPreconditionFailed, "It has changed since it was read, or is there already (`If-None-Match: *`). Read it again, and decide anew."},
	{CodePayloadTooLarge, http.StatusRequestEntityTooLarge, "The body has more than 1 MiB."},
	{CodeUnsupportedMediaType, http.StatusUnsupportedMediaType, "The body is not `application/json` in UTF-8, or is compressed."},
	{CodeIdempotencyKeyReused, http.StatusUnprocessableEntity, "The `Idempotency-Key` was used with another body within the last ten minutes."},
	{CodeTooManyRequests, http.StatusTooManyRequests, "As many keys, or secrets of one key, as the instance's policy allows were made within the last hour. `Retry-After` says when the next one may be."},
	{CodeInternalError, http.StatusInternalServerError, "A bug. The server's log knows the request by the id in `X-Request-Id`."},
	{CodeServiceUnavailable, http.StatusServiceUnavailable, "It cannot be decided or done now, because the store or an OIDC issuer does not answer. `Retry-After` says when to come again."},
}

// An Error is the API's answer where it is not a success, as the client returns it.
type Error struct {
	Status     int // of HTTP
	Code       string
	Message    string
	Target     string        // the field or parameter that it is about
	Details    []Detail      // where several things are wrong: all of them
	RequestID  string        // by which the server's log and audit know the request
	RetryAfter time.Duration // 0: not said
}

func (e *Error) Error() string {
	s := e.Message
	if s == "" {
		s = "HTTP status " + strconv.Itoa(e.Status)
	}
	if len(e.Details) > 1 {
		s = "several things are wrong"
		for _, d := range e.Details {
			s += "; " + d.Message
		}
	}
	return s
}

// A Detail is one of several things that are wrong.
type Detail struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Target  string `json:"target,omitempty"`
}

// ErrorBody is an error as JSON.
type ErrorBody struct {
	Error ErrorMembers `json:"error"`
}

// ErrorMembers are the members of an error.
type ErrorMembers struct {
	Code    string   `json:"code" example:"InvalidRequest"`
	Message string   `json:"message" example:"limits.burst: must be from 1 to 1000000000, or -1 for unlimited"`
	Target  string   `json:"target,omitempty" doc:"The field or parameter that it is about." example:"limits.burst"`
	Details []Detail `json:"details,omitempty" nullable:"false" doc:"Where several things are wrong: all of them."`
}

// A failure is an error on its way out. It gives huma the status, the headers and the body.
type failure struct {
	ErrorBody
	status int
	header http.Header
	cause  error // for the log; nil where the caller alone has to do with it
}

func (f *failure) Error() string           { return f.ErrorBody.Error.Message }
func (f *failure) GetStatus() int          { return f.status }
func (f *failure) GetHeaders() http.Header { return f.header }

func fail(status int, code, message string) *failure {
	return &failure{status: status, header: http.Header{}, ErrorBody: ErrorBody{ErrorMembers{Code: code, Message: message}}}
}

var (
	errTooLarge  = errors.New("the body is larger than 1 MiB")
	errThere     = errors.New("it is there already, and stays as it is")
	errMediaType = errors.New("the body must be application/json in UTF-8, not compressed; for an import, application/x-ndjson")
)

const challenge = `Bearer realm="keyward management"`

// statusOf translates an error into an answer. It is the one place that does.
func statusOf(err error) *failure {
	if some, ok := errors.AsType[*admin.PartialError](err); ok {
		f := statusOf(some.Err)
		f.ErrorBody.Error.Message = some.Progress()
		return f
	}
	if bad := invalid(err); len(bad) > 0 {
		f := fail(http.StatusBadRequest, CodeInvalidRequest, bad[0].Error())
		f.ErrorBody.Error.Target = bad[0].Field
		if len(bad) > 1 {
			for _, one := range bad {
				f.ErrorBody.Error.Details = append(f.ErrorBody.Error.Details, Detail{CodeInvalidRequest, one.Error(), one.Field})
			}
		}
		return f
	}
	if no, ok := errors.AsType[*admin.ForbiddenError](err); ok {
		f := fail(http.StatusForbidden, CodeForbidden, no.Error())
		f.ErrorBody.Error.Target = no.Field
		return f
	}
	if full, ok := errors.AsType[*admin.QuotaExceededError](err); ok {
		return fail(http.StatusConflict, CodeQuotaExceeded, full.Error())
	}
	if state, ok := errors.AsType[*admin.StateError](err); ok {
		return fail(http.StatusConflict, CodeKeyState, state.Error())
	}
	if confirm, ok := errors.AsType[*admin.ConfirmError](err); ok {
		return fail(http.StatusConflict, CodeConfirmationNeeded, confirm.Error())
	}
	if often, ok := errors.AsType[*admin.RateError](err); ok {
		f := fail(http.StatusTooManyRequests, CodeTooManyRequests, often.Error())
		f.header.Set("Retry-After", strconv.Itoa(int(math.Ceil(often.RetryAfter.Seconds()))))
		return f
	}
	switch {
	case errors.Is(err, admin.ErrPrecondition):
		return fail(http.StatusPreconditionFailed, CodePreconditionFailed, "it has changed since you read it: read it again, and decide anew")
	case errors.Is(err, errThere):
		return fail(http.StatusPreconditionFailed, CodePreconditionFailed, errThere.Error())
	case errors.Is(err, errTooLarge):
		return fail(http.StatusRequestEntityTooLarge, CodePayloadTooLarge, errTooLarge.Error())
	case errors.Is(err, errMediaType):
		return fail(http.StatusUnsupportedMediaType, CodeUnsupportedMediaType, errMediaType.Error())
	case errors.Is(err, admin.ErrReplayBody):
		return fail(http.StatusUnprocessableEntity, CodeIdempotencyKeyReused, "the Idempotency-Key was used with another body: take a new one")
	case errors.Is(err, admin.ErrReplayGone):
		return fail(http.StatusConflict, CodeIdempotencyResultGone, "what the first request with this Idempotency-Key made does not work any more: take a new one")
	case errors.Is(err, admin.ErrUnauthenticated):
		f := fail(http.StatusUnauthorized, CodeUnauthorized, "a management token is needed: Authorization: Bearer <token>")
		f.header.Set("WWW-Authenticate", challenge+`, error="invalid_token"`)
		return f
	case errors.Is(err, apikey.ErrNotFound):
		return fail(http.StatusNotFound, CodeNotFound, "there is no such thing here")
	case errors.Is(err, admin.ErrInUse):
		return fail(http.StatusConflict, CodeInstanceInUse, "the instance has usable keys: revoke them, or delete it with revokeKeys=true")
	case errors.Is(err, admin.ErrNoWebhook):
		return fail(http.StatusConflict, CodeNoWebhook, admin.ErrNoWebhook.Error())
	case errors.Is(err, admin.ErrPepperInUse):
		return fail(http.StatusConflict, CodePepperInUse, "the pepper is the newest, or keys are left that only it finds: wait until they are used, or rotate or revoke them")
	case errors.Is(err, apikey.ErrConflict):
		return fail(http.StatusConflict, CodeConflict, "another change got there first: look, and try again")
	case errors.Is(err, apikey.ErrUndecided):
		f := fail(http.StatusServiceUnavailable, CodeServiceUnavailable, "it cannot be decided or done now: try again")
		retry := time.Second
		if busy, ok := errors.AsType[*apikey.BusyError](err); ok {
			retry = max(retry, busy.RetryAfter)
		}
		f.header.Set("Retry-After", strconv.Itoa(int(math.Ceil(retry.Seconds()))))
		f.cause = err
		return f
	}
	f := fail(http.StatusInternalServerError, CodeInternalError, "internal error: the server's log has it under this request's id")
	f.cause = err
	return f
}

// invalid returns every *apikey.InvalidError that err joins or wraps.
func invalid(err error) []*apikey.InvalidError {
	switch e := err.(type) { //nolint:errorlint // it unwraps itself, to find all and not the first
	case *apikey.InvalidError:
		return []*apikey.InvalidError{e}
	case interface{ Unwrap() []error }:
		var all []*apikey.InvalidError
		for _, one := range e.Unwrap() {
			all = append(all, invalid(one)...)
		}
		return all
	case interface{ Unwrap() error }:
		return invalid(e.Unwrap())
	}
	return nil
}
