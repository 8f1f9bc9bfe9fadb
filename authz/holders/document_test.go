package holders_test

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/go-cmp/cmp"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/holders"
)

var update = flag.Bool("update", false, "rewrite docs/holders-openapi.json")

var schemas = huma.NewMapRegistry("#/components/schemas/", huma.DefaultSchemaNamer)

func body[T any]() map[string]*huma.MediaType {
	return map[string]*huma.MediaType{"application/json": {Schema: schemas.Schema(reflect.TypeFor[T](), true, "")}}
}

// document is the OpenAPI document of the listener. It is a file for people and programs and not served: there
// is nothing else on the listener.
func document() *huma.OpenAPI {
	text := &huma.Schema{Type: huma.TypeString}
	header := func(name, about string, schema *huma.Schema) map[string]*huma.Param {
		return map[string]*huma.Param{name: {Description: about, Schema: schema}}
	}
	retry := header("Retry-After", "Seconds.", &huma.Schema{Type: huma.TypeInteger, Minimum: new(1.0)})
	// answers are those of an operation: its success, its refusals, and what every path may be answered.
	answers := func(status int, about string, success map[string]*huma.MediaType, refusals ...int) map[string]*huma.Response {
		all := map[string]*huma.Response{strconv.Itoa(status): {Description: about, Content: success}}
		for _, one := range append(refusals, http.StatusMethodNotAllowed) {
			var codes []string
			for _, c := range holders.Codes {
				if c.Status == one {
					codes = append(codes, c.Code+": "+c.Meaning)
				}
			}
			r := &huma.Response{Description: strings.Join(codes, " "), Content: body[holders.ErrorBody]()}
			switch one {
			case http.StatusUnauthorized:
				r.Headers = header("WWW-Authenticate", "", text)
			case http.StatusMethodNotAllowed:
				r.Headers = header("Allow", "", text)
			case http.StatusTooManyRequests, http.StatusServiceUnavailable:
				r.Headers = retry
			}
			all[strconv.Itoa(one)] = r
		}
		return all
	}
	return &huma.OpenAPI{
		OpenAPI: "3.1.0",
		Info: &huma.Info{
			Title: "keyward for holders of keys", Version: "1",
			Description: "What who holds a key, or has found a leaked one, may ask on listen.holders. It is off unless it has an address.",
		},
		Servers: []*huma.Server{{URL: "http://127.0.0.1:9194"}},
		Components: &huma.Components{Schemas: schemas, SecuritySchemes: map[string]*huma.SecurityScheme{
			"header": {Type: "apiKey", In: "header", Name: "X-API-Key", Description: "The secret of a key. Headers are those of the server's credentials."},
			"bearer": {Type: "http", Scheme: "bearer", Description: "The same."},
		}},
		Paths: map[string]*huma.PathItem{
			"/self": {Get: &huma.Operation{
				OperationID: "getSelf", Summary: "Tell what a key may, to who holds it",
				Description: "It is no use of the key and spends nothing. An address may send 30 secrets that are no usable key's, and one more every 2 s.",
				Security:    []map[string][]string{{"header": {}}, {"bearer": {}}},
				Responses:   answers(http.StatusOK, "What the key may.", body[holders.Answer](), http.StatusUnauthorized, http.StatusTooManyRequests, http.StatusServiceUnavailable),
			}},
			"/revoke": {Post: &huma.Operation{
				OperationID: "reportLeaked", Summary: "End a leaked key",
				Description: "The secret is its own proof. The answer comes before anything is looked up, and is the same whether it is a key's or not. " +
					"What becomes of the key the instance's policy says. An address may send 30 reports, and one more every minute.",
				RequestBody: &huma.RequestBody{Required: true, Description: "At most 4 KiB.", Content: body[holders.Report]()},
				Responses: answers(http.StatusAccepted, "The report was taken.", body[holders.Accepted](), http.StatusBadRequest, http.StatusRequestEntityTooLarge,
					http.StatusUnsupportedMediaType, http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusServiceUnavailable),
			}},
		},
	}
}

// TestDocumentIsInTheDocs: -update writes it.
func TestDocumentIsInTheDocs(t *testing.T) {
	text, err := json.MarshalIndent(document(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	text = append(text, '\n')
	path := filepath.Join("..", "..", "docs", "holders-openapi.json")
	if *update {
		if err := os.WriteFile(path, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(text), string(got)); diff != "" {
		t.Errorf("run with -update (-want +got)\n%s", diff)
	}
}

// TestAnswersAreAsDocumented gets every answer that there is out of the handler, and looks it up.
func TestAnswersAreAsDocumented(t *testing.T) {
	api := document()
	operations := map[string]*huma.Operation{"GET /self": api.Paths["/self"].Get, "POST /revoke": api.Paths["/revoke"].Post}
	unseen := map[string]bool{}
	for name, op := range operations {
		for status := range op.Responses {
			unseen[name+" "+status] = true
		}
	}
	codes := map[holders.CodeMeaning]bool{} // without their meanings
	for i, c := range holders.Codes {
		if http.StatusText(c.Status) == "" || c.Meaning == "" || i > 0 && c.Status < holders.Codes[i-1].Status {
			t.Errorf("%s says too little, or is not in the order of the statuses", c.Code)
		}
		codes[holders.CodeMeaning{Code: c.Code, Status: c.Status}] = false
	}
	key := &apikey.Key{
		InstanceID: "demo", Type: apikey.TypeUser, UserPrincipalName: "ann@example.com", Environment: "prod", ExpirationDate: time.Unix(1e9, 0), InactivityDays: 3, Generation: 1,
		Generations: []apikey.Generation{{Number: 1, ValidUntil: time.Unix(1e9, 0)}, {Number: 2, CreatedAt: time.Unix(2e9, 0)}},
	}
	busy := &apikey.BusyError{What: "too many", RetryAfter: time.Second}
	known := &behind{reason: authz.ReasonKey, self: authz.Self{Key: key, Limits: apikey.ShippedLimits, Left: &authz.Left{Burst: 1, Running: -1}}}
	report := `{"secret":"` + secret + `"}`
	spent := holders.New(&behind{reason: authz.ReasonUnknownKey}, known, slog.New(slog.DiscardHandler))
	for range 100 {
		send(spent, "GET", "/self", "")
	}
	open := func(b *behind) http.Handler { return holders.New(b, b, slog.New(slog.DiscardHandler)) }
	for _, ask := range []struct {
		of                        string // the operation; "" where there is none
		h                         http.Handler
		method, path, body, media string
	}{
		{"GET /self", open(known), "GET", "/self", "", ""},
		{"GET /self", open(&behind{reason: authz.ReasonKey, self: authz.Self{Key: &apikey.Key{Type: apikey.TypeAgent, AgentName: "a"}}}), "GET", "/self", "", ""},
		{"GET /self", open(&behind{reason: authz.ReasonNoCredential}), "GET", "/self", "", ""},
		{"GET /self", open(&behind{err: busy}), "GET", "/self", "", ""},
		{"GET /self", spent, "GET", "/self", "", ""},
		{"GET /self", open(known), "PUT", "/self", "", ""},
		{"POST /revoke", open(known), "POST", "/revoke", report, "application/json"},
		{"POST /revoke", open(known), "POST", "/revoke", "{}{}", "application/json"},
		{"POST /revoke", open(known), "POST", "/revoke", report, "text/plain"},
		{"POST /revoke", open(known), "POST", "/revoke", report + strings.Repeat(" ", 4<<10), "application/json"},
		{"POST /revoke", open(&behind{report: &admin.RateError{RetryAfter: time.Minute}}), "POST", "/revoke", report, "application/json"},
		{"POST /revoke", open(&behind{report: busy}), "POST", "/revoke", report, "application/json"},
		{"POST /revoke", open(&behind{report: errors.New("a bug")}), "POST", "/revoke", report, "application/json"},
		{"POST /revoke", open(known), "DELETE", "/revoke", "", ""},
		{"", open(known), "GET", "/openapi.json", "", ""},
	} {
		r := send(ask.h, ask.method, ask.path, ask.body, "Content-Type", ask.media)
		said := text(t, r)
		name := fmt.Sprintf("%s %s: %d %s", ask.method, ask.path, r.StatusCode, said)
		if r.StatusCode >= 400 {
			var refused holders.ErrorBody
			if err := json.Unmarshal([]byte(said), &refused); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			pair := holders.CodeMeaning{Code: refused.Error.Code, Status: r.StatusCode}
			if _, listed := codes[pair]; !listed {
				t.Errorf("%s: not among the codes", name)
			}
			codes[pair] = true
		}
		if ask.of == "" {
			continue
		}
		status := strconv.Itoa(r.StatusCode)
		documented := operations[ask.of].Responses[status]
		if documented == nil {
			t.Errorf("%s: not documented", name)
			continue
		}
		delete(unseen, ask.of+" "+status)
		for header := range documented.Headers {
			if r.Header.Get(header) == "" {
				t.Errorf("%s: without %s", name, header)
			}
		}
		for _, header := range []string{"Retry-After", "Allow", "WWW-Authenticate"} {
			if r.Header.Get(header) != "" && documented.Headers[header] == nil {
				t.Errorf("%s: %s is not documented", name, header)
			}
		}
		schema := documented.Content[r.Header.Get("Content-Type")].Schema
		var value any
		if err := json.Unmarshal([]byte(said), &value); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		result := &huma.ValidateResult{}
		huma.Validate(schemas, schema, huma.NewPathBuffer(nil, 0), huma.ModeReadFromServer, value, result)
		if len(result.Errors) > 0 {
			t.Errorf("%s: %v", name, result.Errors)
		}
	}
	if len(unseen) > 0 {
		t.Errorf("documented, and never answered: %v", unseen)
	}
	for pair, seen := range codes {
		if !seen {
			t.Errorf("never answered: %v", pair)
		}
	}
}
