package manage

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
)

// echoed stands in the inputs of FuzzRequests where a caller could have typed a secret. No name of a
// member or parameter is like it, so no error has a reason to show it.
const echoed = "c4n4ry"

// fuzzRoutes are the routes that read a body or a query.
var fuzzRoutes = []struct{ method, target string }{
	{"POST", "/instances/demo/apiKeys"},
	{"PUT", "/instances/demo"},
	{"POST", "/tokens"},
	{"GET", "/instances/demo/apiKeys"},
	{"DELETE", "/instances/demo/apiKeys/0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f"},
	{"DELETE", "/instances/gone"},
	{"PATCH", "/instances/demo/apiKeys/0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f"},
	{"POST", "/instances/demo/apiKeys/0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f/rotate"},
	{"POST", "/instances/demo/apiKeys:revoke"},
	{"GET", "/instances/demo/apiKeys:limits"},
}

// FuzzRequests: whatever body and query come, the API answers, never with a fault of its own; an error
// says what is wrong without showing what was sent.
func FuzzRequests(f *testing.F) {
	for _, body := range []string{
		`{"name":"n"}`,
		`{"name":"n","type":"agent","agentName":"sales","scopes":["chat:*"],"environment":"prod","allowedIps":["10.0.0.0/8","::ffff:10.0.0.1"],` +
			`"limits":{"rate":{"requests":90,"per":"90s"},"burst":5,"maxConcurrent":-1},"expiresIn":"30d","inactivityDays":10,"notBefore":null,"metadata":{"team":"core"}}`,
		`{"name":"c4n4ry\u0000","type":"c4n4ry","scopes":["c4n4ry*"],"environment":"c4n4ry ","allowedIps":["c4n4ry"],"expiresIn":"c4n4ry","notBefore":"c4n4ry"}`,
		`{"name":"n","expirationDate":"c4n4ry","metadata":{"c4n4ry":1}}`,
		`{"name":"n","c4n4ry":1}`, `{"name":"n","limits":{"burst":"c4n4ry"}}`, `"c4n4ry"`, `c4n4ry`, `{"name":"n"}c4n4ry`,
	} {
		f.Add(uint8(0), "", "application/json", []byte(body))
	}
	for _, body := range []string{
		`{"policy":{}}`, `{"policy":{"disabled":true,"defaults":{"user":{"burst":1}},"total":{"rate":{"requests":1,"per":"1s"},"burst":9},"allowedScopes":["a:*"]}}`,
		`{"policy":{"allowedScopes":["c4n4ry "]}}`, `{"policy":{"total":{"rate":{"requests":1,"per":"c4n4ry"}}}}`, `{"policy":null}`, `{}`,
	} {
		f.Add(uint8(1), "", "application/json; charset=utf-8", []byte(body))
	}
	f.Add(uint8(2), "", "application/json", []byte(`{"name":"n","role":"auditor","instanceId":"demo","expiresIn":"1h"}`))
	f.Add(uint8(2), "", "application/json", []byte(`{"name":"n","role":"c4n4ry","instanceId":"c4n4ry!"}`))
	f.Add(uint8(3), "maxpagesize=1&cursor=c4n4ry", "", []byte(nil))
	f.Add(uint8(3), "maxpagesize=c4n4ry", "", []byte(nil))
	f.Add(uint8(3), "c4n4ry=1&a=%zz", "", []byte(nil))
	f.Add(uint8(4), "reason=lost+it", "", []byte(nil))
	f.Add(uint8(4), "reason=c4n4ry%00&reason=c4n4ry", "text/plain", []byte("\xff"))
	f.Add(uint8(5), "revokeKeys=c4n4ry", "", []byte(nil))
	f.Add(uint8(3), "type=c4n4ry&status=c4n4ry&unusedFor=c4n4ry&expiresBefore=c4n4ry&neverUsed=c4n4ry&orderby=c4n4ry", "", []byte(nil))
	f.Add(uint8(3), "namePrefix=c4n4ry&userPrincipalName=c4n4ry&expiresBefore=30d&orderby=name+desc", "", []byte(nil))
	for _, body := range []string{
		`{"name":"c4n4ry","description":null,"scopes":["c4n4ry"],"allowedIps":["c4n4ry"],"limits":{"rate":{"requests":1,"per":"c4n4ry"}},"metadata":{"c4n4ry":null}}`,
		`{"disabled":true,"expiresIn":"1d","inactivityDays":null,"expirationPolicy":"none","type":"c4n4ry"}`, `{"limits":{"c4n4ry":1}}`, `{"metadata":{"c4n4ry":1}}`, `{"disabled":null}`,
	} {
		f.Add(uint8(6), "", "application/merge-patch+json", []byte(body))
	}
	f.Add(uint8(7), "", "application/json", []byte(`{"gracePeriod":"1h","expiresIn":"30d"}`))
	f.Add(uint8(7), "", "application/json", []byte(`{"gracePeriod":"c4n4ry","expirationDate":"c4n4ry","endOldest":true}`))
	f.Add(uint8(8), "", "application/json", []byte(`{"filter":{"type":"user","unusedFor":"90d"},"reason":"unused","count":0}`))
	f.Add(uint8(8), "", "application/json", []byte(`{"all":true,"filter":{"status":"c4n4ry","expiresBefore":"c4n4ry"},"reason":"c4n4ry","dryRun":true}`))
	f.Add(uint8(9), "userPrincipalName=c4n4ry", "", []byte(nil))
	f.Add(uint8(9), "userPrincipalName=c4n4ry&agentName=c4n4ry", "", []byte(nil))

	peppers := apikey.Peppers{Current: apikey.NewPepper(1, false)}
	store, err := sqlite.Open(f.Context(), sqlite.Config{Path: filepath.Join(f.TempDir(), "keyward.db"), Audit: admin.NewAuditKeys(peppers)})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = store.Close() })
	if err := admin.OpenPeppers(f.Context(), store, peppers, "test"); err != nil {
		f.Fatal(err)
	}
	log := new(strings.Builder)
	logger := slog.New(slog.NewTextHandler(log, nil))
	svc := admin.New(store, admin.Config{Peppers: peppers}, nil, logger)
	api := New(svc, Config{Pepper: peppers.Current, Log: logger, Caller: &root})
	if _, err := svc.PutInstance(f.Context(), root, "demo", apikey.Policy{}); err != nil {
		f.Fatal(err)
	}
	// A key for the routes that need one, under the id that they name.
	if _, err := store.Update(f.Context(), func(tx admin.Tx) error {
		id, err := apikey.ParseID("0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f")
		if err != nil {
			return err
		}
		err = tx.InsertKey(f.Context(), &apikey.Key{ID: id, InstanceID: "demo", Type: apikey.TypeInstance, Name: "n", CreatedAt: time.Now()})
		if err != nil {
			return err
		}
		return tx.Audit(f.Context(), admin.Event{At: time.Now(), Actor: "test", Action: "test"})
	}); err != nil {
		f.Fatal(err)
	}

	f.Fuzz(func(t *testing.T, route uint8, query, contentType string, body []byte) {
		to := fuzzRoutes[int(route)%len(fuzzRoutes)]
		r := httptest.NewRequest(to.method, to.target, strings.NewReader(string(body)))
		r.URL.RawQuery = query
		r.Header.Set("Content-Type", contentType)
		w := httptest.NewRecorder()
		log.Reset()
		api.ServeHTTP(w, r)
		answer, _ := io.ReadAll(w.Result().Body)
		if log.Len() > 0 {
			t.Errorf("logged: %s", log)
		}
		if w.Code < 300 {
			if to.method != http.MethodDelete && !json.Valid(answer) {
				t.Errorf("got %d %s", w.Code, answer)
			}
			return
		}
		if !slices.Contains([]int{400, 403, 404, 409, 413, 415, 429}, w.Code) {
			t.Errorf("got status %d", w.Code)
		}
		var said ErrorBody
		if err := json.Unmarshal(answer, &said); err != nil || said.Error.Code == "" || said.Error.Message == "" || len(answer) > 16<<10 {
			t.Fatalf("got %d with %d bytes: %.1000s", w.Code, len(answer), answer)
		}
		if strings.Contains(strings.ToLower(string(answer)), echoed) {
			t.Errorf("the error shows what was sent: %s", answer)
		}
		for _, field := range append([]Detail{{Target: said.Error.Target}}, said.Error.Details...) {
			if !fieldPath.MatchString(field.Target) {
				t.Errorf("the error is about %q, which is no field", field.Target)
			}
		}
	})
}

// fieldPath is what errors may call a field.
var fieldPath = regexp.MustCompile(`^([A-Za-z]{1,32}(\[\d+\])?(\.[A-Za-z]{1,32}(\[\d+\])?)*)?$`)
