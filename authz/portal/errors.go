package portal

import (
	"errors"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

var (
	errForeign = errors.New("the request did not come from a page of this portal")
	errForm    = errors.New("the form cannot be read")
	errMethod  = errors.New("the method is not allowed here")
	errBug     = errors.New("a bug")

	errNoAnswer      = errors.New("what came back from the issuer is no answer to this browser")
	errIssuerRefused = errors.New("the issuer did not sign in")
)

// A failure is an error as a page tells it: what happened, why, and what to do next.
type failure struct {
	Status int
	Title  string
	Text   string
	Next   string
	ID     string // of the request, where the server's log knows more

	code  string // for the audit, as the Management API calls it
	retry time.Duration
}

// failureOf translates an error into what a page tells. It is the one place that does.
func failureOf(err error) *failure {
	if no, ok := errors.AsType[*admin.ForbiddenError](err); ok {
		return &failure{
			Status: http.StatusForbidden, Title: "Not allowed", Text: upper(no.Error()) + ".",
			Next: "If you need it, ask an owner for a role that may, or to do it.", code: "Forbidden",
		}
	}
	if fields, rest := faultsOf(err); len(fields) > 0 && len(rest) == 0 {
		text := ""
		for field, reason := range fields {
			text = field + ": " + reason
		}
		return &failure{Status: http.StatusBadRequest, Title: "That cannot be accepted", Text: text, Next: "Go back, correct it, and send it again.", code: "InvalidRequest"}
	}
	if full, ok := errors.AsType[*admin.QuotaExceededError](err); ok {
		return &failure{Status: http.StatusConflict, Title: "No more keys", Text: upper(full.Error()) + ".", code: "QuotaExceeded"}
	}
	if state, ok := errors.AsType[*admin.StateError](err); ok {
		return &failure{Status: http.StatusConflict, Title: "Not as things are now", Text: upper(state.Error()) + ".", code: "KeyState"}
	}
	if often, ok := errors.AsType[*admin.RateError](err); ok {
		return &failure{Status: http.StatusTooManyRequests, Title: "Too many for now", Text: upper(often.Error()) + ".", code: "TooManyRequests", retry: often.RetryAfter}
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return &failure{Status: http.StatusRequestEntityTooLarge, Title: "Too large", Text: "The form is larger than 256 KiB.", code: "PayloadTooLarge"}
	}
	switch {
	case errors.Is(err, errForeign):
		return &failure{
			Status: http.StatusForbidden, Title: "Not from this portal",
			Text: "The request did not come from a page of this portal, or from one of another session, so nothing was done.",
			Next: "If you sent a form here yourself: open its page again, and send it from there.", code: "Forbidden",
		}
	case errors.Is(err, errForm):
		return &failure{Status: http.StatusBadRequest, Title: "The form cannot be read", Text: "It is cut off, too large, or no form at all; nothing was done.", code: "InvalidRequest"}
	case errors.Is(err, errNoAnswer):
		return &failure{
			Status: http.StatusUnauthorized, Title: "Not signed in",
			Text: "What came back is not the answer to a sign-in that this browser began within the last ten minutes, or its answer is not good (any more).",
			Next: "Open the sign-in page, and begin anew there. If it happens again, tell whoever runs keyward.", code: "Unauthorized",
		}
	case errors.Is(err, errIssuerRefused):
		return &failure{
			Status: http.StatusUnauthorized, Title: "Not signed in", Text: "You were sent back without being signed in.",
			Next: "Open the sign-in page, and begin anew there; or ask whoever runs the accounts whether yours may use this.", code: "Unauthorized",
		}
	case errors.Is(err, errMethod):
		return &failure{Status: http.StatusMethodNotAllowed, Title: "Not here", Text: "There is a page at this address, but it does not take what was sent.", code: "MethodNotAllowed"}
	case errors.Is(err, admin.ErrPrecondition):
		return &failure{
			Status: http.StatusPreconditionFailed, Title: "Changed by somebody else", Text: "It has changed since the page was made, so nothing was done.",
			Next: "Open the page again, and decide anew.", code: "PreconditionFailed",
		}
	case errors.Is(err, admin.ErrReplayBody):
		return &failure{Status: http.StatusConflict, Title: "Sent already", Text: "This form was sent before, with other values or in another session; nothing was done this time.", Next: "Open an empty form, and begin anew.", code: "IdempotencyKeyReused"}
	case errors.Is(err, admin.ErrReplayGone):
		return &failure{Status: http.StatusConflict, Title: "Sent already", Text: "This form was sent before, and what it made does not work any more.", Next: "Open an empty form, and begin anew.", code: "IdempotencyResultGone"}
	case errors.Is(err, admin.ErrUnauthenticated):
		return &failure{Status: http.StatusUnauthorized, Title: "Signed out", Text: "You are not signed in any more.", Next: "Sign in again.", code: "Unauthorized"}
	case errors.Is(err, apikey.ErrNotFound):
		return &failure{Status: http.StatusNotFound, Title: "Not found", Text: "There is nothing at this address, or it is not yours to see.", code: "NotFound"}
	case errors.Is(err, admin.ErrInUse):
		return &failure{Status: http.StatusConflict, Title: "In use", Text: "The instance has usable keys.", Next: "Revoke them first.", code: "InstanceInUse"}
	case errors.Is(err, apikey.ErrConflict):
		return &failure{Status: http.StatusConflict, Title: "Somebody was faster", Text: "Another change got there first.", Next: "Look how things are now, and try again.", code: "Conflict"}
	case errors.Is(err, apikey.ErrUndecided):
		f := &failure{
			Status: http.StatusServiceUnavailable, Title: "Not now", Text: "The server cannot do it or find it out at the moment. Nothing may have been done, or all of it.",
			Next: "Look how things are in a moment, and try again.", code: "ServiceUnavailable", retry: time.Second,
		}
		if busy, ok := errors.AsType[*apikey.BusyError](err); ok {
			f.retry = max(f.retry, busy.RetryAfter)
		}
		return f
	}
	return &failure{Status: http.StatusInternalServerError, Title: "That is a bug", Text: "The server did something that it should not.", Next: "Tell whoever runs it, with the request id below.", code: "InternalError"}
}

// faultsOf returns what is wrong with the fields of a form, and what else is wrong.
func faultsOf(err error) (fields map[string]string, rest []error) {
	fields = map[string]string{}
	var walk func(err error)
	walk = func(err error) {
		if all, ok := err.(interface{ Unwrap() []error }); ok {
			for _, one := range all.Unwrap() {
				walk(one)
			}
			return
		}
		if bad, ok := errors.AsType[*apikey.InvalidError](err); ok {
			fields[bad.Field] = join(fields[bad.Field], bad.Reason)
			return
		}
		if no, ok := errors.AsType[*admin.ForbiddenError](err); ok && no.Field != "" {
			fields[no.Field] = join(fields[no.Field], no.Reason)
			return
		}
		rest = append(rest, err)
	}
	if err != nil {
		walk(err)
	}
	return fields, rest
}

func join(a, b string) string {
	if a == "" {
		return b
	}
	return a + "; " + b
}

// fail answers with a page that explains. v is nil where nobody is signed in, or it is not known yet.
func (p *portal) fail(w http.ResponseWriter, r *http.Request, v *visit, err error) {
	if errors.Is(err, admin.ErrUnauthenticated) {
		p.signInFirst(w, r)
		return
	}
	f := failureOf(err)
	if v != nil {
		p.refused(r.Context(), v, v.PathValue("key"), f.code)
	}
	if f.Status >= http.StatusInternalServerError {
		f.ID = requestID(r)
		if !errors.Is(err, errBug) { // which is logged already
			p.logCause(r, err)
		}
	}
	f.sayWhen(w)
	if err := p.showAs(w, v, f.Status, "error", f.Title, f); err != nil {
		p.logCause(r, err)
		http.Error(w, f.Title+". "+f.Text, f.Status)
	}
}

// sayWhen tells when to try again, where there is such a time.
func (f *failure) sayWhen(w http.ResponseWriter) {
	if f.retry > 0 {
		w.Header().Set("Retry-After", retryAfter(f.retry))
	}
}

// retryAfter is a wait in whole seconds, never too short.
func retryAfter(wait time.Duration) string { return strconv.Itoa(int(math.Ceil(wait.Seconds()))) }

// signInFirst sends somebody who is not signed in to where that is done, and afterwards back. The cookie stays as it
// is: this answer may come late, when the browser has signed in anew and keeps another one, which it would lose.
// One that is of no use is replaced there, and goes by itself at the latest when its session would have ended.
func (p *portal) signInFirst(w http.ResponseWriter, r *http.Request) {
	to := "/sign-in"
	if r.Method == http.MethodGet && r.URL.Path != "/" && r.Header.Get("HX-Request") == "" {
		to += "?next=" + url.QueryEscape(r.URL.RequestURI())
	}
	p.redirect(w, r, to)
}
