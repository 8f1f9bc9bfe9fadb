package manage

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// rowsOf are n rows with new secrets.
func rowsOf(n int) (lines []string) {
	for i := range n {
		lines = append(lines, fmt.Sprintf(`{"name":"n%d","secret":%q}`, i, apikey.Format{}.New(apikey.KindInstance).Reveal()))
	}
	return lines
}

func TestReportsNameTheRow(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	rows := rowsOf(3)
	body := "\n" + rows[0] + "\r\n\n" + `{"name":"x","secret":7}` + "\n" + `{"name":` + "\n" + `{"id":"x","expiresIn":"y"}` + "\n" + rows[1]
	w := d.send(d.owner, "POST", "/instances/a/apiKeys:import?firstRow=100", body, "Content-Type", "application/x-ndjson")
	got := read[ImportReport](t, w, 200)
	want := ImportReport{Refused: 3, Rows: []ImportedRow{
		{Row: 101, Status: admin.RowHeld},
		{Row: 103, Status: admin.RowRefused, Errors: []Detail{{"InvalidRequest", "secret: must be a string", "secret"}}},
		{Row: 104, Status: admin.RowRefused, Errors: []Detail{{"InvalidRequest", "the body is not one JSON document", ""}}},
		{Row: 105, Status: admin.RowRefused, Errors: []Detail{
			{"InvalidRequest", "secret: is missing: give it, or sha256 or argon2id", "secret"},
			{"InvalidRequest", "name: is missing", "name"},
			{"InvalidRequest", "expiresIn: is not a duration such as 90s, 24h or 30d", "expiresIn"},
			{"InvalidRequest", "id: must be a UUID such as 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f", "id"},
		}},
		{Row: 106, Status: admin.RowHeld},
	}}
	for i := range got.Rows {
		for j := range got.Rows[i].Errors {
			if strings.HasPrefix(got.Rows[i].Errors[j].Message, "expiresIn: ") {
				got.Rows[i].Errors[j].Message = want.Rows[3].Errors[2].Message // its words are apikey's
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	for query, field := range map[string]string{"dryRun=yes": "dryRun", "firstRow=0": "firstRow", "firstRow=x": "firstRow", "rows=1": "rows"} {
		wantError(t, d.send(d.owner, "POST", "/instances/a/apiKeys:import?"+query, rows[0]), 400, CodeInvalidRequest, field)
	}
	wantError(t, d.send(d.owner, "POST", "/instances/a/apiKeys:import", rows[0], "Content-Type", "text/plain"), 415, CodeUnsupportedMediaType, "")
	wantError(t, d.send(d.owner, "POST", "/instances/a/apiKeys:import", "\n\n"), 400, CodeInvalidRequest, "")
	wantError(t, d.send(d.owner, "POST", "/instances/a/apiKeys:import", strings.Repeat("{}\n", 501)), 400, CodeInvalidRequest, "")
	wantError(t, d.send(d.owner, "POST", "/instances/a/apiKeys:import", strings.Repeat(" ", 1<<20)+"{}"), 413, CodePayloadTooLarge, "")
}

// A batch that the policy refuses is a refused attempt, and a dry run is none.
func TestARefusedImportIsInTheAudit(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	if _, err := d.svc.PutInstance(t.Context(), root, "a", apikey.Policy{Caps: apikey.Caps{Instance: 1}}); err != nil {
		t.Fatal(err)
	}
	refused := func() int {
		events, err := d.store.FindEvents(t.Context(), admin.EventFilter{Action: "key.import", Outcome: admin.OutcomeRefused}, admin.EventPlace{}, 10)
		if err != nil {
			t.Fatal(err)
		}
		return len(events)
	}
	body := strings.Join(rowsOf(2), "\n")
	report := read[ImportReport](t, d.send(d.owner, "POST", "/instances/a/apiKeys:import?dryRun=true", body), 200)
	if report.Done || report.Rows[1].Errors[0].Code != CodeQuotaExceeded || refused() != 0 {
		t.Errorf("dry run: %+v", report)
	}
	if report = read[ImportReport](t, d.send(d.owner, "POST", "/instances/a/apiKeys:import", body), 200); report.Done || refused() != 1 {
		t.Errorf("%+v, refused in the audit: %d", report, refused())
	}
}

func TestClientImportsInBatches(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	server := httptest.NewServer(d)
	defer server.Close()
	c := NewClient(server.URL, d.owner, nil)
	rows := rowsOf(10)
	bad := append(append([]string{}, rows[:6]...), "{}")
	bad = append(bad, rows[7:]...)
	importing := func(text string, opts ImportOptions) (sums [][4]int, err error) {
		for report, e := range c.ImportKeys(t.Context(), "a", strings.NewReader(text), opts) {
			if e != nil {
				return sums, e
			}
			sums = append(sums, [4]int{report.Rows[0].Row, report.Imported, report.Existing, report.Refused})
		}
		return sums, nil
	}
	for _, step := range []struct {
		what, text string
		opts       ImportOptions
		want       [][4]int
	}{
		{"a dry run goes on after what is refused", strings.Join(bad, "\n"), ImportOptions{Batch: 4, DryRun: true}, [][4]int{{1, 4, 0, 0}, {5, 0, 0, 1}, {9, 2, 0, 0}}},
		{"an import stops there", strings.Join(bad, "\n"), ImportOptions{Batch: 4}, [][4]int{{1, 4, 0, 0}, {5, 0, 0, 1}}},
		{"from a row on", strings.Join(bad, "\n"), ImportOptions{Batch: 4, FromRow: 8}, [][4]int{{8, 3, 0, 0}}},
		{"mended, again", strings.Join(rows, "\n") + "\n", ImportOptions{Batch: 4}, [][4]int{{1, 0, 4, 0}, {5, 3, 1, 0}, {9, 0, 2, 0}}},
		{"blank lines", strings.Repeat("\n", 9) + rows[0] + "\n\n", ImportOptions{Batch: 4}, [][4]int{{10, 0, 1, 0}}},
		{"nothing", "\n", ImportOptions{}, nil},
	} {
		got, err := importing(step.text, step.opts)
		if diff := cmp.Diff(step.want, got); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got)\n%s", step.what, err, diff)
		}
	}
	// A batch has no more than the server takes.
	long := make([]string, 40)
	for i := range long {
		long[i] = rowsOf(1)[0] + strings.Repeat(" ", 60<<10)
	}
	if got, err := importing(strings.Join(long, "\n"), ImportOptions{}); err != nil || len(got) != 3 {
		t.Errorf("long rows: %v, %v", got, err)
	}
	if _, err := importing(rows[0]+"\n"+strings.Repeat("x", 1<<20), ImportOptions{}); err == nil || !strings.Contains(err.Error(), "row 2: ") {
		t.Errorf("a row of 1 MiB: %v", err)
	}
	exported := 0
	for k, err := range c.ExportKeys(t.Context(), "a") {
		if err != nil || k.Hint == "" {
			t.Fatal(k, err)
		}
		exported++
	}
	if exported != 50 {
		t.Errorf("exported %d", exported)
	}
}

// An export that breaks off does not look like one that ends.
func TestAnExportThatBreaksOffIsAnError(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	rows := make([]admin.ImportRow, 600) // more than a page
	for i, line := range rowsOf(len(rows)) {
		rows[i].Number = i
		if err := json.Unmarshal([]byte(line), &rows[i].Input); err != nil {
			t.Fatal(err)
		}
	}
	for batch := range slices.Chunk(rows, 200) {
		if done, err := d.svc.ImportKeys(t.Context(), root, "a", batch, false); err != nil || !done.Done {
			t.Fatal(done.Done, err)
		}
	}
	failing := &failingKeys{Store: d.store, after: 1}
	server := httptest.NewServer(on(t, failing, apikey.Peppers{Current: pepper}).Handler)
	defer server.Close()
	c := NewClient(server.URL, d.owner, nil)
	got, broken := 0, error(nil)
	for _, err := range c.ExportKeys(t.Context(), "a") {
		if err != nil {
			broken = err
			break
		}
		got++
	}
	if broken == nil || got > 500 {
		t.Errorf("%d keys, %v", got, broken)
	}
	// Before the first key it is an answer as any.
	failing.after = 0
	w := on(t, failing, apikey.Peppers{Current: pepper}).send(d.owner, "GET", "/instances/a/apiKeys:export", "")
	wantError(t, w, http.StatusServiceUnavailable, CodeServiceUnavailable, "")
}

// A token that is revoked gets no more of an export that runs, and what it got does not look whole.
func TestAnExportEndsWithItsToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		for range 2 { // more than a page
			body := strings.Join(rowsOf(300), "\n")
			read[ImportReport](t, d.send(d.owner, "POST", "/instances/a/apiKeys:import", body, "Content-Type", ndjson), 201)
		}
		export := func(between func(auditor *admin.Token)) (rows int, whole bool) {
			slow := &slowKeys{Store: d.store}
			d := on(t, slow, apikey.Peppers{Current: pepper})
			auditor := d.token(t, admin.TokenInput{Name: "auditor", Role: admin.RoleAuditor})
			slow.between = func() {
				time.Sleep(2 * time.Second)
				between(auditor.Token)
			}
			r := httptest.NewRequest("GET", "/instances/a/apiKeys:export", nil)
			r.Header.Set("Authorization", "Bearer "+auditor.Secret.Reveal())
			w := httptest.NewRecorder()
			whole = true
			func() {
				defer func() {
					if v := recover(); v != nil {
						whole = v != http.ErrAbortHandler //nolint:errorlint // net/http compares it so too
					}
				}()
				d.ServeHTTP(w, r)
			}()
			return bytes.Count(w.Body.Bytes(), []byte("\n")), whole
		}
		if rows, whole := export(func(*admin.Token) {}); rows != 600 || !whole {
			t.Errorf("a token that goes on: %d keys, whole: %v", rows, whole)
		}
		rows, whole := export(func(auditor *admin.Token) {
			if _, err := d.svc.RevokeToken(t.Context(), root, auditor.ID); err != nil {
				t.Error(err)
			}
		})
		if rows > 500 || whole {
			t.Errorf("a token that was revoked after the first page: %d keys, whole: %v", rows, whole)
		}
	})
}

// slowKeys does something after the first page of a list.
type slowKeys struct {
	admin.Store
	between func()
	pages   int
}

func (s *slowKeys) Keys(ctx context.Context, instance string, q admin.KeyQuery) ([]*apikey.Key, error) {
	if s.pages++; s.pages == 2 {
		s.between()
	}
	return s.Store.Keys(ctx, instance, q)
}

// failingKeys lists keys so many times, and then no more.
type failingKeys struct {
	admin.Store
	after int
}

func (f *failingKeys) Keys(ctx context.Context, instance string, q admin.KeyQuery) ([]*apikey.Key, error) {
	if f.after == 0 {
		return nil, fmt.Errorf("%w: %w", apikey.ErrUndecided, io.ErrClosedPipe)
	}
	f.after--
	return f.Store.Keys(ctx, instance, q)
}
