package manage

import (
	"bytes"
	"database/sql"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
)

const aKeys = "/instances/a/apiKeys"

func (d *desk) once(token apikey.Secret, target, body, key string) *httptest.ResponseRecorder {
	return d.send(token, "POST", target, body, onceHeader, key)
}

// keysOf are those of an instance.
func (d *desk) keysOf(t *testing.T, instance string) []admin.KeyRecord {
	t.Helper()
	return read[list[admin.KeyRecord]](t, d.send(d.owner, "GET", "/instances/"+instance+"/apiKeys", ""), 200).Value
}

func TestRepeatedCreationIsOne(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	d.instance(t, "b")
	first := d.once(d.owner, aKeys, `{"name":"n"}`, "k-1")
	made := read[createdKey](t, first, 201)
	for range 3 {
		again := d.once(d.owner, aKeys, `{"name":"n"}`, "k-1")
		if diff := cmp.Diff(made, read[createdKey](t, again, 201)); diff != "" {
			t.Errorf("the answer changed (-first +again)\n%s", diff)
		}
		if again.Header().Get("Location") != first.Header().Get("Location") || again.Header().Get("Idempotent-Replayed") != "true" || first.Header().Get("Idempotent-Replayed") != "" {
			t.Errorf("headers: %v, again %v", first.Header(), again.Header())
		}
	}
	if all := d.keysOf(t, "a"); len(all) != 1 {
		t.Errorf("%d keys were made", len(all))
	}
	events, err := d.store.FindEvents(t.Context(), admin.EventFilter{Action: "key.create"}, admin.EventPlace{}, 10)
	if err != nil || len(events) != 1 {
		t.Errorf("%d events, %v", len(events), err)
	}

	// Another request is another request.
	other := d.token(t, admin.TokenInput{Name: "n", Role: admin.RoleOwner}).Secret
	for name, w := range map[string]*httptest.ResponseRecorder{
		"another key":      d.once(d.owner, aKeys, `{"name":"n"}`, "k-2"),
		"another caller":   d.once(other, aKeys, `{"name":"n"}`, "k-1"),
		"another instance": d.once(d.owner, "/instances/b/apiKeys", `{"name":"n"}`, "k-1"),
		"no key":           d.send(d.owner, "POST", aKeys, `{"name":"n"}`),
	} {
		if got := read[createdKey](t, w, 201); got.Secret == made.Secret || got.Key.ID == made.Key.ID {
			t.Errorf("%s: got the other one's", name)
		}
	}
	for _, body := range []string{`{"name":"m"}`, `{"name":"n" }`, `{"name":"n","scopes":[]}`} {
		wantError(t, d.once(d.owner, aKeys, body, "k-1"), 422, CodeIdempotencyKeyReused, "")
	}
	read[any](t, d.send(d.owner, "DELETE", first.Header().Get("Location"), ""), 200)
	wantError(t, d.once(d.owner, aKeys, `{"name":"n"}`, "k-1"), 409, CodeIdempotencyResultGone, "")
	noCanary(t, d.log.String(), apikey.NewSecret(made.Secret))
}

func TestIdempotencyKeyIsChecked(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	for _, key := range []string{"", strings.Repeat("x", 256), "a b", "a\tb", "é"} {
		wantError(t, d.once(d.owner, aKeys, `{"name":"n"}`, key), 400, CodeInvalidRequest, onceHeader)
	}
	r := httptest.NewRequest("POST", aKeys, strings.NewReader(`{"name":"n"}`))
	r.Header = http.Header{"Content-Type": {"application/json"}, "Authorization": {"Bearer " + d.owner.Reveal()}, onceHeader: {"a", "a"}}
	w := httptest.NewRecorder()
	d.ServeHTTP(w, r)
	wantError(t, w, 400, CodeInvalidRequest, onceHeader)
	// Where it would do nothing it is refused, not ignored.
	wantError(t, d.once(d.owner, "/tokens", `{"name":"n","role":"owner"}`, "k"), 400, CodeInvalidRequest, onceHeader)
	if n := len(d.keysOf(t, "a")); n != 0 {
		t.Errorf("%d keys were made", n)
	}
	read[any](t, d.once(d.owner, aKeys, `{"name":"n"}`, strings.Repeat("~", 255)), 201)
	// A request that was refused has used nothing up.
	wantError(t, d.once(d.owner, aKeys, `{"name":""}`, "again"), 400, CodeInvalidRequest, "name")
	read[any](t, d.once(d.owner, aKeys, `{"name":"n"}`, "again"), 201)
}

func TestReplayIsGoneAfterTenMinutes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		first := read[createdKey](t, d.once(d.owner, aKeys, `{"name":"n"}`, "k"), 201)
		time.Sleep(10*time.Minute - time.Second)
		if got := read[createdKey](t, d.once(d.owner, aKeys, `{"name":"n"}`, "k"), 201); got.Secret != first.Secret {
			t.Error("it was gone before its time")
		}
		time.Sleep(time.Second)
		second := read[createdKey](t, d.once(d.owner, aKeys, `{"name":"m"}`, "k"), 201)
		if second.Secret == first.Secret || second.Key.Name != "m" {
			t.Error("the old answer is still given")
		}
	})
}

func TestManyAtOnceMakeOne(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	var mu sync.Mutex
	secrets := map[string]int{}
	var all sync.WaitGroup
	for range 40 {
		all.Go(func() {
			w := d.once(d.owner, aKeys, `{"name":"n"}`, "k")
			got := read[createdKey](t, w, 201)
			mu.Lock()
			defer mu.Unlock()
			secrets[got.Secret]++
		})
	}
	all.Wait()
	if len(secrets) != 1 || len(d.keysOf(t, "a")) != 1 {
		t.Errorf("got %d secrets and %d keys", len(secrets), len(d.keysOf(t, "a")))
	}
}

// A replay is asked for its right like the first request, and outlives a rotation of the pepper.
func TestReplayAsksForTheRight(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	caller := admin.Caller{Name: "oidc:x#y", Role: admin.RoleOperator, Once: &admin.Once{Key: "k", Method: "POST", Route: aKeys}}
	made, err := d.svc.CreateKey(t.Context(), caller, "a", admin.KeyInput{Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	for name, now := range map[string]admin.Caller{
		"an auditor now":       {Role: admin.RoleAuditor},
		"of another instance":  {Role: admin.RoleOperator, InstanceID: "b"},
		"a user, not its own":  {Role: admin.RoleUser, UserPrincipalName: "ann@example.com"},
		"a user without a UPN": {Role: admin.RoleUser},
	} {
		now.Name, now.Once = caller.Name, caller.Once
		if got, err := d.svc.CreateKey(t.Context(), now, "a", admin.KeyInput{Name: "n"}); err == nil {
			t.Errorf("%s: got %v", name, got.Key)
		}
	}
	next := apikey.NewPepper(2, false)
	rotated := on(t, d.store, apikey.Peppers{Current: next, Previous: pepper})
	again, err := rotated.svc.CreateKey(t.Context(), caller, "a", admin.KeyInput{Name: "n"})
	if err != nil || again.Secret.Reveal() != made.Secret.Reveal() || !again.Replayed {
		t.Errorf("after a rotation: got %+v, %v", again.Key, err)
	}
}

// Neither the file nor the file and the pepper show what a replay holds.
func TestReplayIsSealed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keyward.db")
	store, err := sqlite.Open(t.Context(), sqlite.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	d := on(t, store, apikey.Peppers{Current: pepper})
	d.instance(t, "a")
	made := read[createdKey](t, d.once(d.owner, aKeys, `{"name":"n"}`, "idempotency-canary"), 201)
	db, err := sql.Open("sqlite", "file:"+path+"?mode=ro")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	var id, sealed []byte
	if err := db.QueryRow("SELECT id, sealed FROM idempotency").Scan(&id, &sealed); err != nil {
		t.Fatal(err)
	}
	row := append(id, sealed...)
	for _, secret := range []string{made.Secret, made.Secret[4:20], made.Key.ID.String(), "idempotency-canary"} {
		if bytes.Contains(row, []byte(secret)) {
			t.Errorf("the row shows %d bytes of what it should not", len(secret))
		}
	}
	if got := d.once(d.owner, aKeys, `{"name":"n"}`, "idempotency-canary"); got.Code != 201 {
		t.Fatalf("got %d", got.Code)
	}
	// A row that was changed opens nothing, and makes nothing anew.
	writable, err := sql.Open("sqlite", "file:"+path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = writable.Close() }()
	if _, err := writable.Exec("UPDATE idempotency SET sealed = randomblob(length(sealed))"); err != nil {
		t.Fatal(err)
	}
	wantError(t, d.once(d.owner, aKeys, `{"name":"n"}`, "idempotency-canary"), 500, CodeInternalError, "")
	if n := len(d.keysOf(t, "a")); n != 1 || !strings.Contains(d.log.String(), "was the database changed?") {
		t.Errorf("%d keys; the log says %s", n, d.log)
	}
}

func TestClientRepeatsOnce(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	c := NewClient(serve(t, d), d.owner, nil)
	ctx := WithIdempotencyKey(t.Context(), "k")
	first, err := c.CreateKey(ctx, "a", admin.KeyInput{Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.CreateKey(ctx, "a", admin.KeyInput{Name: "n"})
	if err != nil || again.Secret.Reveal() != first.Secret.Reveal() {
		t.Errorf("got %+v, %v", again.Key, err)
	}
}
