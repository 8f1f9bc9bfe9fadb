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

// The codes of errors. They are part of the API: none changes its meaning, new ones may come.
const (
	CodeInvalidRequest       = "InvalidRequest"       // 400: target names the field or parameter
	CodeUnauthorized         = "Unauthorized"         // 401: no management token, or none that works
	CodeForbidden            = "Forbidden"            // 403: the role, or a value that the policy does not allow
	CodeNotFound             = "NotFound"             // 404: no such thing, or not the caller's to see
	CodeMethodNotAllowed     = "MethodNotAllowed"     // 405: Allow lists those that are
	CodeConflict             = "Conflict"             // 409: another change got there first
	CodeInstanceInUse        = "InstanceInUse"        // 409: it has usable keys
	CodePepperInUse          = "PepperInUse"          // retiring a pepper that something needs
	CodeQuotaExceeded        = "QuotaExceeded"        // 409: the policy allows no more keys
	CodeKeyState             = "KeyState"             // 409: not with a key as this one is
	CodeConfirmationNeeded   = "ConfirmationNeeded"   // 409: repeat it with the count that the message tells
	CodePreconditionFailed   = "PreconditionFailed"   // 412: it has changed since it was read
	CodeTooManyRequests      = "TooManyRequests"      // 429: Retry-After says when to come again
	CodePayloadTooLarge      = "PayloadTooLarge"      // 413: more than 1 MiB
	CodeUnsupportedMediaType = "UnsupportedMediaType" // 415: not application/json in UTF-8
	CodeInternalError        = "InternalError"        // 500: a bug; the log knows it by the request id
	CodeServiceUnavailable   = "ServiceUnavailable"   // 503: the store is away; Retry-After says when to come again
)

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
	errMediaType = errors.New("the body must be application/json in UTF-8, not compressed")
)

// statusOf translates an error into an answer. It is the one place that does.
func statusOf(err error) *failure {
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
	case errors.Is(err, errTooLarge):
		return fail(http.StatusRequestEntityTooLarge, CodePayloadTooLarge, errTooLarge.Error())
	case errors.Is(err, errMediaType):
		return fail(http.StatusUnsupportedMediaType, CodeUnsupportedMediaType, errMediaType.Error())
	case errors.Is(err, admin.ErrUnauthenticated):
		return fail(http.StatusUnauthorized, CodeUnauthorized, "a management token is needed: Authorization: Bearer <token>")
	case errors.Is(err, apikey.ErrNotFound):
		return fail(http.StatusNotFound, CodeNotFound, "there is no such thing here")
	case errors.Is(err, admin.ErrInUse):
		return fail(http.StatusConflict, CodeInstanceInUse, "the instance has usable keys: revoke them, or delete it with revokeKeys=true")
	case errors.Is(err, admin.ErrPepperInUse):
		return fail(http.StatusConflict, CodePepperInUse, "the pepper is the newest, or keys are left that only it finds: wait until they are used, or rotate or revoke them")
	case errors.Is(err, apikey.ErrConflict):
		return fail(http.StatusConflict, CodeConflict, "another change got there first: look, and try again")
	case errors.Is(err, apikey.ErrUndecided):
		f := fail(http.StatusServiceUnavailable, CodeServiceUnavailable, "the store does not answer now: try again")
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
