package admin_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

var acme = apikey.Format{Foreign: []apikey.Shape{{Prefix: "acme_", MinLength: 21, MaxLength: 60}, {Prefix: "exact_", MinLength: 22, MaxLength: 22}, {AgentToken: true}}}

// importer opens a service that knows foreign secrets.
func importer(t *testing.T) *desk {
	t.Helper()
	d := open(t)
	d.instance(t, "a")
	d.knows(apikey.Peppers{Current: d.pepper})
	return d
}

func (d *desk) knows(peppers apikey.Peppers) {
	d.Service = admin.New(d.store, admin.Config{Peppers: peppers, Format: acme}, nil, slog.New(slog.NewTextHandler(d.log, nil)))
}

func foreign(n string) string { return "acme_0123456789abcdef" + n }

func row(number int, name, secret string) admin.ImportRow {
	return admin.ImportRow{Number: number, Input: admin.ImportInput{KeyInput: admin.KeyInput{Name: name}, Secret: secret}}
}

func (d *desk) bring(t *testing.T, dryRun bool, rows ...admin.ImportRow) admin.Import {
	t.Helper()
	done, err := d.ImportKeys(t.Context(), root, "a", rows, dryRun)
	if err != nil {
		t.Fatal(err)
	}
	return done
}

func statuses(done admin.Import) (all []admin.ImportStatus) {
	for _, row := range done.Rows {
		all = append(all, row.Status)
	}
	return all
}

func (d *desk) names(t *testing.T) (names []string) {
	t.Helper()
	keys, err := d.store.Keys(t.Context(), "a", admin.KeyQuery{Limit: 100, Order: admin.OrderName})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		names = append(names, k.Name)
	}
	return names
}

func TestABatchIsImportedAsAWholeOrNotAtAll(t *testing.T) {
	d := importer(t)
	before := len(d.actions(t))
	good, bad := row(1, "one", foreign("1")), row(2, "", foreign("2"))
	if got := statuses(d.bring(t, false, good, bad)); !slices.Equal(got, []admin.ImportStatus{admin.RowHeld, admin.RowRefused}) {
		t.Errorf("with a bad row: %v", got)
	}
	if got := statuses(d.bring(t, true, good)); !slices.Equal(got, []admin.ImportStatus{admin.RowImported}) {
		t.Errorf("dry run: %v", got)
	}
	if got := d.names(t); got != nil || len(d.actions(t)) != before {
		t.Fatalf("something was kept: %v, %v", got, d.actions(t)[before:])
	}
	first := d.bring(t, false, good)
	again := d.bring(t, false, good, row(2, "two", foreign("2")))
	if got := statuses(again); !slices.Equal(got, []admin.ImportStatus{admin.RowExisting, admin.RowImported}) || again.Rows[0].KeyID != first.Rows[0].KeyID {
		t.Errorf("repeated: %v", got)
	}
	if got := d.names(t); !slices.Equal(got, []string{"one", "two"}) {
		t.Errorf("got %v", got)
	}
	if got := d.actions(t)[before:]; !slices.Equal(got, []string{"key.import", "key.import"}) {
		t.Errorf("audit: %v", got)
	}
	// The same secret in two rows.
	twice := d.bring(t, false, row(7, "x", foreign("3")), row(9, "y", foreign("3")))
	if bad, ok := errors.AsType[*apikey.InvalidError](twice.Rows[1].Err); !ok || bad.Field != "secret" || !strings.Contains(bad.Reason, "row 7") {
		t.Errorf("twice in a batch: %v", twice.Rows[1].Err)
	}
	events, err := d.store.Events(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(events)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(foreign("1")))
	for _, canary := range []string{foreign("1"), hex.EncodeToString(sum[:])} {
		if strings.Contains(string(text), canary) || strings.Contains(d.log.String(), canary) {
			t.Error("the audit or the log has a secret or its SHA-256")
		}
	}
}

func TestWhatCannotBeImported(t *testing.T) {
	d := importer(t)
	d.instance(t, "b")
	if _, err := d.PutInstance(t.Context(), root, "a", apikey.Policy{AllowedScopes: apikey.Scopes{"x:*"}}); err != nil {
		t.Fatal(err)
	}
	taken := d.key(t, "b")
	ours := apikey.Format{}.New(apikey.KindAgent).Reveal()
	const exact = "exact_0123456789abcdef" // of a shape of one length
	agentToken := "keya.aa.bb.cc." + strings.Repeat("d", 130) + ".ayek"
	for name, c := range map[string]struct {
		in    admin.ImportInput
		field string // "": the state is in the way
	}{
		"no secret":          {admin.ImportInput{}, "secret"},
		"both":               {admin.ImportInput{Secret: foreign(""), SHA256: strings.Repeat("a", 64)}, "sha256"},
		"no shape":           {admin.ImportInput{Secret: "other_0123456789abcdef"}, "secret"},
		"checksum":           {admin.ImportInput{Secret: ours[:len(ours)-6] + "000000"}, "secret"},
		"management token":   {admin.ImportInput{Secret: apikey.Format{}.New(apikey.KindManagement).Reveal()}, "secret"},
		"sha256":             {admin.ImportInput{SHA256: strings.Repeat("g", 64)}, "sha256"},
		"another type":       {admin.ImportInput{Secret: ours, KeyInput: admin.KeyInput{Type: apikey.TypeUser, UserPrincipalName: "u"}}, "type"},
		"agent without name": {admin.ImportInput{Secret: ours}, "agentName"},
		"id":                 {admin.ImportInput{Secret: foreign(""), ID: "x"}, "id"},
		"id of zeros":        {admin.ImportInput{Secret: foreign(""), ID: "00000000-0000-0000-0000-000000000000"}, "id"},
		"from the future":    {admin.ImportInput{Secret: foreign(""), CreatedAt: "2999-01-01"}, "createdAt"},
		"from the year -1":   {admin.ImportInput{Secret: foreign(""), CreatedAt: "0000-01-01T00:00:00+23:59"}, "createdAt"},
		"somebody's zero":    {admin.ImportInput{Secret: foreign(""), CreatedAt: "0001-01-01"}, "createdAt"},
		"over":               {admin.ImportInput{Secret: foreign(""), KeyInput: admin.KeyInput{ExpirationDate: "2020-01-01"}}, "expirationDate"},
		"too long a life":    {admin.ImportInput{Secret: foreign(""), CreatedAt: "2020-01-01", KeyInput: admin.KeyInput{ExpiresIn: "366d"}}, "expiresIn"},
		"a secret as a name": {admin.ImportInput{Secret: foreign(""), KeyInput: admin.KeyInput{Description: "it is " + foreign("") + ", ok"}}, "description"},
		"and a full stop":    {admin.ImportInput{Secret: foreign(""), KeyInput: admin.KeyInput{Description: "it is " + exact + ". Ok?"}}, "description"},
		"in an address":      {admin.ImportInput{Secret: foreign(""), KeyInput: admin.KeyInput{Metadata: map[string]string{"at": "https://x?key=" + exact + "&n=" + strings.Repeat("1", 40)}}}, "metadata"},
		"in brackets":        {admin.ImportInput{Secret: foreign(""), KeyInput: admin.KeyInput{Description: "(" + agentToken + ")"}}, "description"},
		"scope":              {admin.ImportInput{Secret: foreign(""), KeyInput: admin.KeyInput{Scopes: []string{"y"}}}, "scopes"},
		"id that is taken":   {admin.ImportInput{Secret: foreign(""), ID: taken.Key.ID.String()}, ""},
		"another's secret":   {admin.ImportInput{Secret: taken.Secret.Reveal()}, ""},
	} {
		c.in.Name = "n"
		done := d.bring(t, false, admin.ImportRow{Number: 1, Input: c.in})
		err := done.Rows[0].Err
		var field string
		if bad, ok := errors.AsType[*apikey.InvalidError](err); ok {
			field = bad.Field
		} else if no, ok := errors.AsType[*admin.ForbiddenError](err); ok {
			field = no.Field
		} else if _, ok := errors.AsType[*admin.StateError](err); !ok {
			t.Errorf("%s: got %v", name, err)
		}
		if done.Done || field != c.field {
			t.Errorf("%s: got %v, want field %q", name, err, c.field)
		}
		if err != nil && c.in.Secret != "" && strings.Contains(err.Error(), c.in.Secret) {
			t.Errorf("%s: the error shows the secret", name)
		}
	}
	if got := d.names(t); got != nil {
		t.Errorf("imported: %v", got)
	}
	// Where no foreign shape is registered, no Check would know what is behind a SHA-256.
	plain := d.with(d.store, apikey.Peppers{Current: d.pepper})
	done, err := plain.ImportKeys(t.Context(), root, "a", []admin.ImportRow{{Number: 1, Input: admin.ImportInput{KeyInput: admin.KeyInput{Name: "n"}, SHA256: strings.Repeat("a", 64)}}}, false)
	if err != nil || done.Done {
		t.Errorf("a SHA-256 without a shape: %+v, %v", done, err)
	}
}

// A secret is one key's, whether it came itself or as its SHA-256, and during a pepper rotation too.
func TestAForeignSecretIsOneKey(t *testing.T) {
	d := importer(t)
	sum := sha256.Sum256([]byte(foreign("1")))
	hashed := admin.ImportRow{Number: 1, Input: admin.ImportInput{KeyInput: admin.KeyInput{Name: "n"}, SHA256: strings.ToUpper(hex.EncodeToString(sum[:]))}}
	first := d.bring(t, false, hashed)
	if got := d.bring(t, false, row(1, "n", foreign("1"))); got.Rows[0].Status != admin.RowExisting || got.Rows[0].KeyID != first.Rows[0].KeyID {
		t.Errorf("the secret itself: %+v", got)
	}
	k, _, err := d.store.FindKey(t.Context(), d.pepper.DigestOf(apikey.KindForeign, foreign("1")))
	if err != nil || k.ID != first.Rows[0].KeyID {
		t.Errorf("found %v, %v", k, err)
	}
	next := apikey.NewPepper(2, false)
	d.knows(apikey.Peppers{Current: next, Previous: d.pepper})
	if got := d.bring(t, false, hashed); got.Rows[0].Status != admin.RowExisting {
		t.Errorf("under the next pepper: %+v", got)
	}
}

func TestImportedKeysAreWhatTheirRowsSay(t *testing.T) {
	d := importer(t)
	const id = "0192f0c1-8a4e-4cc3-98c4-dc0c0c07398f"
	in := admin.ImportInput{
		KeyInput: admin.KeyInput{Name: "n", Scopes: []string{"a:b"}, InactivityDays: new(30), Metadata: map[string]string{"k": "v"}},
		ID:       id, Secret: foreign("1"), CreatedAt: "2020-02-29", Disabled: true,
	}
	before := time.Now().Add(-time.Second)
	d.bring(t, false, admin.ImportRow{Number: 1, Input: in})
	want, _ := apikey.ParseID(id)
	k, err := d.Key(t.Context(), root, "a", want)
	if err != nil {
		t.Fatal(err)
	}
	if k.IdleFrom.Before(before) {
		t.Errorf("idle from %s: it would be idle before it was ever used here", k.IdleFrom)
	}
	k.IdleFrom, k.Revision = time.Time{}, 0
	created := time.Date(2020, 2, 29, 0, 0, 0, 0, time.UTC)
	if diff := cmp.Diff(&apikey.Key{
		ID: want, InstanceID: "a", Type: apikey.TypeInstance, Name: "n", Scopes: apikey.Scopes{"a:b"}, InactivityDays: 30,
		Metadata: map[string]string{"k": "v"}, Disabled: true, CreatedAt: created, CreatedBy: "import by test",
		Generations: []apikey.Generation{{Number: 1, Hint: "acme_…def1", CreatedAt: created}},
	}, k, cmp.Comparer(func(a, b time.Time) bool { return a.Equal(b) })); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// Caps hold to the last place; what was imported does not count as created.
func TestImportsHeedTheCaps(t *testing.T) {
	d := importer(t)
	if _, err := d.PutInstance(t.Context(), root, "a", apikey.Policy{Caps: apikey.Caps{Instance: 5}, Creation: apikey.Creation{PerHour: 1}}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			n := string(rune('a' + i))
			_, err := d.ImportKeys(t.Context(), root, "a", []admin.ImportRow{row(1, n+"1", foreign(n+"1")), row(2, n+"2", foreign(n+"2"))}, false)
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := d.names(t); len(got) != 4 {
		t.Errorf("%d keys, want two batches of 2 below the cap of 5", len(got))
	}
	if _, err := d.CreateKey(t.Context(), root, "a", admin.KeyInput{Name: "new"}); err != nil {
		t.Errorf("imports count as creations: %v", err)
	}
	full := d.bring(t, false, row(1, "n", foreign("z")))
	if _, ok := errors.AsType[*admin.QuotaExceededError](full.Rows[0].Err); !ok {
		t.Errorf("above the cap: %+v", full)
	}
}

func TestWhoMayImportAndExport(t *testing.T) {
	d := importer(t)
	for role, may := range map[admin.Role][2]bool{
		admin.RoleOwner: {true, true}, admin.RoleOperator: {true, true}, admin.RoleAuditor: {false, true}, admin.RoleUser: {false, false},
	} {
		caller := admin.Caller{Name: "c", Role: role, UserPrincipalName: "u"}
		_, importErr := d.ImportKeys(t.Context(), caller, "a", []admin.ImportRow{row(1, "n", foreign("1"))}, true)
		exportErr := d.ExportKeys(t.Context(), caller, "a", func(*apikey.Key) bool { return true })
		if got := [2]bool{importErr == nil, exportErr == nil}; got != may {
			t.Errorf("%s: got %v, want %v", role, got, may)
		}
		caller.InstanceID = "b"
		if err := d.ExportKeys(t.Context(), caller, "a", nil); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("%s of another instance: %v", role, err)
		}
	}
}

func TestExportHasEveryKeyOnce(t *testing.T) {
	d := importer(t)
	var rows []admin.ImportRow
	for i := range 600 { // more than a page
		in := row(i+1, "n", foreign(string(rune('a'+i/100))+string(rune('a'+i/10%10))+string(rune('a'+i%10))))
		in.Input.CreatedAt = "2025-01-01" // all at one instant, so that pages end in the middle of it
		rows = append(rows, in)
	}
	for batch := range slices.Chunk(rows, 50) {
		if done := d.bring(t, false, batch...); !done.Done {
			t.Fatal(done.Rows[0].Err)
		}
	}
	seen := map[apikey.ID]bool{}
	err := d.ExportKeys(t.Context(), root, "a", func(k *apikey.Key) bool {
		if seen[k.ID] || k.Digest != (apikey.Digest{}) {
			t.Errorf("%s twice, or with a digest", k.ID)
		}
		seen[k.ID] = true
		return true
	})
	if err != nil || len(seen) != 600 {
		t.Errorf("%d keys, %v", len(seen), err)
	}
	if events, err := d.store.FindEvents(t.Context(), admin.EventFilter{Action: "key.export"}, admin.EventPlace{}, 10); err != nil || len(events) != 1 {
		t.Errorf("exports in the audit: %v, %v", events, err)
	}
}

// TestImportKeepsSecretsOutOfOtherFields: a column that slipped puts secrets where everybody reads them.
func TestImportKeepsSecretsOutOfOtherFields(t *testing.T) {
	d := importer(t)
	ours := acme.New(apikey.KindInstance).Reveal()
	for _, secret := range []string{ours, ours[:20] + "x" + ours[21:], foreign("secret")} {
		for field, set := range map[string]func(in *admin.ImportInput){
			"name":              func(in *admin.ImportInput) { in.Name = "of " + secret },
			"description":       func(in *admin.ImportInput) { in.Description = secret },
			"metadata":          func(in *admin.ImportInput) { in.Metadata = map[string]string{"was": secret} },
			"scopes":            func(in *admin.ImportInput) { in.Scopes = []string{"a:b", secret} },
			"environment":       func(in *admin.ImportInput) { in.Environment = secret },
			"agentName":         func(in *admin.ImportInput) { in.Type, in.AgentName = apikey.TypeAgent, secret },
			"userPrincipalName": func(in *admin.ImportInput) { in.Type, in.UserPrincipalName = apikey.TypeUser, secret },
		} {
			in := row(1, "n", foreign("own"))
			set(&in.Input)
			done := d.bring(t, false, in)
			if bad, ok := errors.AsType[*apikey.InvalidError](done.Rows[0].Err); !ok || bad.Field != field || !strings.Contains(bad.Reason, "contains a secret") {
				t.Errorf("%s: got %v", field, done.Rows[0].Err)
			}
		}
	}
	if got := d.names(t); got != nil {
		t.Errorf("imported: %v", got)
	}
}
