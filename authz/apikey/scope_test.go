package apikey_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"keyward/authz/apikey"
)

func TestParseScope(t *testing.T) {
	long := strings.Repeat("x", 64)
	for _, good := range []string{
		"*", "a", "a:b", "a:b:c", "a:*", "a:b:*", "A-Z:0.9:_x_", ".", "-", "_", "..", long, long + ":" + long,
		strings.Repeat(long+":", 7) + "x", // 7 × 65 + 1 = 456
	} {
		if got, err := apikey.ParseScope(good); err != nil || string(got) != good {
			t.Errorf("%q: got %q, %v", good, got, err)
		}
	}
	for _, bad := range []string{
		"", ":", "a:", ":a", "a::b", "*:a", "a:*:b", "**", "a*", "*a", "a:b*", "a:**", "*:*", "a b", " a", "a ",
		"a/b", "a,b", "a\n", "a\x00", "ä", "a:ä", "a%3ab", long + "x", "a:" + long + "x", "a:" + long + "x:b",
		strings.Repeat("a:", 256) + "a", // 513 characters
	} {
		got, err := apikey.ParseScope(bad)
		if invalid, ok := errors.AsType[*apikey.InvalidError](err); !ok || got != "" {
			t.Errorf("%q: got %q, %v; want an *InvalidError", bad, got, err)
		} else if len(bad) > 4 && strings.Contains(invalid.Error(), bad) {
			t.Errorf("%q: the error repeats the value: %v", bad, err)
		}
	}
}

func TestCovers(t *testing.T) {
	for _, tt := range []struct {
		have, want string
		covers     bool
	}{
		{"*", "a", true},
		{"*", "a:b:c", true},
		{"*", "*", true},
		{"*", "a:*", true},
		{"a", "a", true},
		{"a", "a:b", false},
		{"a", "A", false},
		{"a", "ab", false},
		{"a", "*", false},
		{"a", "a:*", false},
		{"a:*", "a:b", true},
		{"a:*", "a:b:c", true},
		{"a:*", "a:*", true},
		{"a:*", "a:b:*", true},
		{"a:*", "a", false},
		{"a:*", "ab", false},
		{"a:*", "ab:c", false},
		{"a:*", "A:b", false},
		{"a:*", "b:a:b", false},
		{"a:*", "*", false},
		{"a:b:*", "a:b", false},
		{"a:b:*", "a:bc:d", false},
		{"a:b:*", "a:b:c", true},
		{"a:b:*", "a:*", false},
		{"a:b", "a:b", true},
		{"a:b", "a", false},
		{"a:b", "a:b:c", false},
		// What nobody parsed gives no more than it says.
		{"a*", "ab", false},
		{"a:*", "a:", false},
		{"", "a", false},
	} {
		if got := apikey.Scope(tt.have).Covers(apikey.Scope(tt.want)); got != tt.covers {
			t.Errorf("%s covers %s: got %t, want %t", tt.have, tt.want, got, tt.covers)
		}
	}
}

func TestParseScopes(t *testing.T) {
	got, err := apikey.ParseScopes([]string{"b", "a:*", "b", "*", "B", "a:*"})
	if diff := cmp.Diff(apikey.Scopes{"*", "B", "a:*", "b"}, got); diff != "" || err != nil {
		t.Errorf("%v, difference (-want +got):\n%s", err, diff)
	}
	// Nothing said is every right; an empty list is none. They must not become each other.
	if got, err := apikey.ParseScopes(nil); got != nil || err != nil {
		t.Errorf("nil: got %v, %v", got, err)
	}
	if got, err := apikey.ParseScopes([]string{}); got == nil || len(got) != 0 || err != nil {
		t.Errorf("empty: got %#v, %v", got, err)
	}
	if got, err := apikey.ParseScopes([]string{"a", "b c"}); got != nil || err == nil {
		t.Errorf("one bad scope: got %v, %v", got, err)
	}
	many := make([]string, apikey.MaxScopes+1)
	for i := range many {
		many[i] = fmt.Sprintf("s%d", i)
	}
	if _, err := apikey.ParseScopes(many); err == nil {
		t.Errorf("%d scopes were taken", len(many))
	}
	if got, err := apikey.ParseScopes(many[:apikey.MaxScopes]); err != nil || len(got) != apikey.MaxScopes {
		t.Errorf("%d scopes: got %d, %v", apikey.MaxScopes, len(got), err)
	}
}

func TestScopesText(t *testing.T) {
	for _, tt := range []struct {
		scopes  apikey.Scopes
		strings []string
		text    string
	}{
		{nil, nil, "*"},
		{apikey.Scopes{}, []string{}, ""},
		{apikey.Scopes{"a"}, []string{"a"}, "a"},
		{apikey.Scopes{"a:*", "b"}, []string{"a:*", "b"}, "a:* b"},
	} {
		if diff := cmp.Diff(tt.strings, tt.scopes.Strings()); diff != "" {
			t.Errorf("Strings of %#v (-want +got):\n%s", tt.scopes, diff)
		}
		if got := string(tt.scopes.Append([]byte("scopes="))); got != "scopes="+tt.text {
			t.Errorf("Append of %#v: got %q, want %q", tt.scopes, got, "scopes="+tt.text)
		}
	}
}

// A small universe in which scopes meet often: all concrete scopes of up to three parts, and all
// patterns over them.
var concrete, patterns = func() (concrete, patterns []apikey.Scope) {
	patterns = append(patterns, "*")
	var below func(prefix string, depth int)
	below = func(prefix string, depth int) {
		for _, part := range []string{"a", "b", "ab"} {
			s := prefix + part
			concrete = append(concrete, apikey.Scope(s))
			if depth < 3 {
				patterns = append(patterns, apikey.Scope(s+":*"))
				below(s+":", depth+1)
			}
		}
	}
	below("", 1)
	return concrete, append(patterns, concrete...)
}()

func anyScopes(t *rapid.T, label string) apikey.Scopes {
	list := rapid.OneOf(
		rapid.Just[[]string](nil),
		rapid.SliceOfN(rapid.Map(rapid.SampledFrom(patterns), func(s apikey.Scope) string { return string(s) }), 0, 8),
	).Draw(t, label)
	scopes, err := apikey.ParseScopes(list)
	if err != nil {
		t.Fatal(err)
	}
	return scopes
}

// What a key may do under a policy is what both allow, no more and no less.
func TestIntersectIsBoth(t *testing.T) {
	for _, s := range patterns {
		if _, err := apikey.ParseScope(string(s)); err != nil {
			t.Fatal(err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b := anyScopes(t, "a"), anyScopes(t, "b")
		aBefore, bBefore := slices.Clone(a), slices.Clone(b)
		both := a.Intersect(nil, b)
		for _, want := range patterns {
			if got := both.Cover(want); got != (a.Cover(want) && b.Cover(want)) {
				t.Fatalf("%v and %v give %v, which covers %s: %t", a, b, both, want, got)
			}
		}
		if (both == nil) != (a == nil && b == nil) {
			t.Fatalf("%v and %v give %#v", a, b, both)
		}
		if !slices.IsSorted(both) || len(slices.Compact(slices.Clone(both))) != len(both) {
			t.Fatalf("%v is not sorted and without doubles", both)
		}
		if diff := cmp.Diff(both, b.Intersect(nil, a)); diff != "" {
			t.Fatalf("the other way round it differs:\n%s", diff)
		}
		if !slices.Equal(a, aBefore) || !slices.Equal(b, bBefore) {
			t.Fatal("an argument was changed")
		}
	})
}

// Cover agrees with the words of the contract, spelt out part by part.
func TestCoverIsTheDefinition(t *testing.T) {
	for _, have := range patterns {
		for _, want := range concrete {
			h, w := strings.Split(string(have), ":"), strings.Split(string(want), ":")
			covers := slices.Equal(h, w)
			if last := len(h) - 1; h[last] == "*" {
				covers = len(w) > last && slices.Equal(h[:last], w[:last])
			}
			if got := (apikey.Scopes{have}).Cover(want); got != covers {
				t.Errorf("%s covers %s: got %t, want %t", have, want, got, covers)
			}
		}
	}
	for _, want := range patterns {
		if !apikey.Scopes(nil).Cover(want) || (apikey.Scopes{}).Cover(want) {
			t.Errorf("%s: nothing said must cover it, and an empty list must not", want)
		}
	}
}

func FuzzParseScope(f *testing.F) {
	for _, s := range []string{"*", "a:*", "a:b", "a::b", "a*"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := apikey.ParseScope(text)
		if err != nil {
			return
		}
		if !s.Covers(s) || !apikey.Scope("*").Covers(s) {
			t.Fatalf("%q is not covered by itself and *", text)
		}
		for _, c := range []byte(text) {
			// It goes into a header, separated by spaces, and into JSON, CSV and paths.
			if !strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-:*", rune(c)) {
				t.Fatalf("%q was taken", text)
			}
		}
	})
}

// FuzzScopes: whatever list is taken, what two lists give together is what each of them gives.
func FuzzScopes(f *testing.F) {
	for _, lists := range [][2]string{{"", ""}, {"*", "a:b"}, {"a:* b", "a:b a:c:*"}, {"b a a", "a:*"}, {"a:b:*", "a:b:c:d a:b"}, {"a::b", "*:a"}} {
		f.Add(lists[0], lists[1], "a:b")
	}
	f.Fuzz(func(t *testing.T, one, two, want string) {
		a, err := apikey.ParseScopes(strings.Fields(one))
		if err != nil {
			wantInvalid(t, err, one)
			return
		}
		b, err := apikey.ParseScopes(strings.Fields(two))
		if err != nil {
			wantInvalid(t, err, two)
			return
		}
		if !slices.IsSorted(a) || len(slices.Compact(slices.Clone(a))) != len(a) || len(a) > apikey.MaxScopes {
			t.Fatalf("%q became %q", one, a)
		}
		again, err := apikey.ParseScopes(strings.Fields(string(a.Append(nil))))
		if err != nil || !slices.Equal(again, a) {
			t.Fatalf("%q was written and read as %q, %v", a, again, err)
		}
		both := a.Intersect(nil, b)
		wanted := slices.Concat(a, b)
		if s, err := apikey.ParseScope(want); err == nil {
			wanted = append(wanted, s)
		}
		for _, s := range wanted {
			if got := both.Cover(s); got != (a.Cover(s) && b.Cover(s)) {
				t.Errorf("%q and %q are %q, which covers %s: %t", a, b, both, s, got)
			}
		}
	})
}

// wantInvalid fails unless an error is polite: of our kind, and without the value it is about.
func wantInvalid(t *testing.T, err error, value string) {
	t.Helper()
	invalid, ok := errors.AsType[*apikey.InvalidError](err)
	if !ok {
		t.Fatalf("got %T %v, want an *InvalidError", err, err)
	}
	// A value of a few characters may stand in any sentence.
	if len(value) > 10 && strings.Contains(invalid.Error(), value) {
		t.Fatalf("the error repeats %q: %v", value, err)
	}
}
