package manage

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// Whatever is accepted means the same to encoding/json, and whatever is refused is refused politely.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"name":"n","scopes":[],"limits":{"rate":{"requests":1,"per":"1s"},"burst":null},"metadata":{"k":"v"},"inactivityDays":3}`))
	f.Add([]byte(`{"name":"n","name":"m"}`))
	f.Add([]byte(`{"NAME":"n"}`))
	f.Add([]byte(`{"limits":{"burst":-0}}`))
	f.Add([]byte(`{"metadata":{"\ud800":"\u0000"}}`))
	f.Add([]byte("\xef\xbb\xbf{}"))
	f.Add([]byte(`[[[[`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var got, want admin.KeyInput
		if err := decode(data, &got); err != nil {
			if _, ok := errors.AsType[*apikey.InvalidError](err); !ok {
				t.Fatalf("got %T %v", err, err)
			}
			if len(err.Error()) > 300 {
				t.Errorf("an error of %d bytes repeats its input", len(err.Error()))
			}
			return
		}
		strict := json.NewDecoder(bytes.NewReader(data))
		strict.DisallowUnknownFields()
		if err := strict.Decode(&want); err != nil {
			t.Fatalf("accepted, but encoding/json says %v", err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-encoding/json +ours)\n%s", diff)
		}
	})
}

func TestDecodeTellsNullFromEmpty(t *testing.T) {
	for body, want := range map[string]admin.KeyInput{
		`{"name":"n"}`:             {Name: "n"},
		`{"name":"n","scopes":[]}`: {Name: "n", Scopes: []string{}},
		`{"name":"n","limits":null,"metadata":null,"allowedIps":null,"agentName":null,"inactivityDays":null}`: {Name: "n"},
		`{"name":"n","limits":{"rate":null,"burst":null}}`:                                                    {Name: "n"},
		`{"name":"n","limits":{"burst":0}}`:                                                                   {Name: "n", Limits: admin.LimitsInput{Burst: new(0)}},
	} {
		var got admin.KeyInput
		if err := decode([]byte(body), &got); err != nil {
			t.Errorf("%s: %v", body, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got)\n%s", body, diff)
		}
	}
}

func TestStatusOf(t *testing.T) {
	secret := "postgres://user:password@db"
	for _, tt := range []struct {
		err    error
		status int
		code   string
		target string
		retry  string
		logged bool
	}{
		{apikey.Invalid("limits.burst", "is wrong"), 400, CodeInvalidRequest, "limits.burst", "", false},
		{fmt.Errorf("create: %w", apikey.Invalid("name", "is missing")), 400, CodeInvalidRequest, "name", "", false},
		{errors.Join(apikey.Invalid("a", "x"), apikey.Invalid("b", "y")), 400, CodeInvalidRequest, "a", "", false},
		{&admin.ForbiddenError{Reason: "no"}, 403, CodeForbidden, "", "", false},
		{&admin.ForbiddenError{Field: "scopes", Reason: "no"}, 403, CodeForbidden, "scopes", "", false},
		{admin.ErrUnauthenticated, 401, CodeUnauthorized, "", "", false},
		{fmt.Errorf("key: %w", apikey.ErrNotFound), 404, CodeNotFound, "", "", false},
		{admin.ErrInUse, 409, CodeInstanceInUse, "", "", false},
		{admin.ErrPepperInUse, 409, CodePepperInUse, "", "", false},
		{apikey.ErrConflict, 409, CodeConflict, "", "", false},
		{errTooLarge, 413, CodePayloadTooLarge, "", "", false},
		{errMediaType, 415, CodeUnsupportedMediaType, "", "", false},
		{fmt.Errorf("%w: %s", apikey.ErrUndecided, secret), 503, CodeServiceUnavailable, "", "1", true},
		{&apikey.BusyError{What: "much", RetryAfter: 1500 * time.Millisecond}, 503, CodeServiceUnavailable, "", "2", true},
		{errors.New(secret), 500, CodeInternalError, "", "", true},
		{errors.Join(), 500, CodeInternalError, "", "", false},
	} {
		f := statusOf(tt.err)
		got := f.ErrorBody.Error
		if f.status != tt.status || got.Code != tt.code || got.Target != tt.target || f.header.Get("Retry-After") != tt.retry || (f.cause != nil) != tt.logged {
			t.Errorf("%v: got %d %+v %v, logged %v", tt.err, f.status, got, f.header, f.cause)
		}
		if strings.Contains(got.Message, secret) || got.Message == "" {
			t.Errorf("%v: says %q", tt.err, got.Message)
		}
		if http.StatusText(f.status) == "" {
			t.Errorf("%d is no status", f.status)
		}
	}
}

// An empty string in the place of a date or of a filter would leave out what the caller meant to say: a key
// without an end, a revocation of every user's keys.
func TestDecodeRefusesEmptyWhereItMatters(t *testing.T) {
	for body, c := range map[string]struct {
		into  any
		field string
	}{
		`{"name":"n","expirationDate":""}`:                           {new(admin.KeyInput), "expirationDate"},
		`{"name":"n","expiresIn":""}`:                                {new(admin.KeyInput), "expiresIn"},
		`{"name":"n","notBefore":""}`:                                {new(admin.KeyInput), "notBefore"},
		`{"name":"n","secret":"s","expirationDate":""}`:              {new(admin.ImportInput), "expirationDate"},
		`{"gracePeriod":""}`:                                         {new(admin.RotateInput), "gracePeriod"},
		`{"filter":{"type":"user","userPrincipalName":""}}`:          {new(admin.BulkRevocation), "filter.userPrincipalName"},
		`{"filter":{"environment":"test","unusedFor":""},"count":9}`: {new(admin.BulkRevocation), "filter.unusedFor"},
		`{"filter":{"type":"","agentName":"x"}}`:                     {new(admin.BulkRevocation), "filter.type"},
	} {
		err := decode([]byte(body), c.into)
		if bad, ok := errors.AsType[*apikey.InvalidError](err); !ok || bad.Field != c.field {
			t.Errorf("%s: got %v, want an error about %s", body, err, c.field)
		}
	}
	if err := decode([]byte(`{"name":"n","description":"","expirationDate":null}`), new(admin.KeyInput)); err != nil {
		t.Error(err)
	}
}
