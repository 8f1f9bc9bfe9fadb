package apikey_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"keyward/authz/apikey"
)

func TestIDIsAUUID(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		raw := [16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "bytes"))
		id, want := apikey.ID(raw), uuid.UUID(raw)
		if id.String() != want.String() {
			t.Fatalf("got %s, want %s", id, want)
		}
		if got := string(id.Append([]byte("x"))); got != "x"+want.String() {
			t.Fatalf("Append got %s, want x%s", got, want)
		}
		for _, spelling := range []string{id.String(), strings.ToUpper(id.String())} {
			if got, err := apikey.ParseID(spelling); err != nil || got != id {
				t.Fatalf("%s: got %s, %v", spelling, got, err)
			}
		}
		text, err := json.Marshal(id)
		if err != nil || string(text) != `"`+want.String()+`"` {
			t.Fatalf("as JSON: got %s, %v", text, err)
		}
		var back apikey.ID
		if err := json.Unmarshal(text, &back); err != nil || back != id {
			t.Fatalf("from JSON: got %s, %v; want %s", back, err, id)
		}
		if id.IsZero() != (want == uuid.Nil) {
			t.Fatalf("IsZero of %s is %t", id, id.IsZero())
		}
	})
	if !(apikey.ID{}).IsZero() {
		t.Error("the zero ID is not zero")
	}
}

// Only the plain form of 36 characters names a key: one key, one spelling but for case.
func TestParseIDRefuses(t *testing.T) {
	const good = "11d5ad3c-8a4e-7cc3-98c4-dc0c0c07398f"
	for _, bad := range []string{
		"", "x", good[:35], good + "0", " " + good[1:],
		"11d5ad3c8a4e7cc398c4dc0c0c07398f",
		"{" + good + "}", "urn:uuid:" + good,
		"11d5ad3c-8a4e-7cc3-98c4-dc0c0c07398g",
		"11d5ad3c_8a4e-7cc3-98c4-dc0c0c07398f",
		"11d5ad3c8-a4e-7cc3-98c4-dc0c0c07398f",
		"0192f0c1-8a4e-7cc3-98c4-dc0c0c0739\xc3\xa9",
		strings.Repeat("-", 36), strings.Repeat("\x00", 36),
	} {
		if id, err := apikey.ParseID(bad); err == nil || id != (apikey.ID{}) {
			t.Errorf("%q: got %s, %v; want an error", bad, id, err)
		} else if bad != "" && bad != "x" && strings.Contains(err.Error(), bad) {
			t.Errorf("%q: the error repeats the value: %v", bad, err)
		}
	}
	for _, hyphen := range []int{8, 13, 18, 23} {
		if id, err := apikey.ParseID(good[:hyphen] + "a" + good[hyphen+1:]); err == nil {
			t.Errorf("without the hyphen at %d: got %s", hyphen, id)
		}
	}
	id := apikey.ID{1}
	if err := id.UnmarshalText([]byte("nonsense")); err == nil {
		t.Error("UnmarshalText took nonsense")
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("11d5ad3c-8a4e-7cc3-98c4-dc0c0c07398f")
	f.Add("11D5AD3C-8A4E-7CC3-98C4-DC0C0C07398F")
	f.Add("{11d5ad3c-8a4e-7cc3-98c4-dc0c0c07398f}")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := apikey.ParseID(s)
		want, wantErr := uuid.Parse(s)
		if wantErr == nil && len(s) != 36 {
			wantErr = err // forms that uuid reads and we do not
			if err == nil {
				t.Fatalf("%q was read as %s", s, id)
			}
		}
		if (err == nil) != (wantErr == nil) || err == nil && id != apikey.ID(want) {
			t.Fatalf("%q: got %s, %v; uuid reads %s, %v", s, id, err, want, wantErr)
		}
	})
}
