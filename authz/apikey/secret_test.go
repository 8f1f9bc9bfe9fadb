package apikey_test

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"math/big"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"keyward/authz/apikey"
)

// leaks reports whether text holds a recognisable piece of a secret: as it is, in hexadecimal, in
// base64 or as the numbers that %d and %v print of bytes.
func leaks(text string, secret []byte) bool {
	piece := secret[len(secret)/2:][:6]
	number := make([]string, len(piece))
	goSyntax := make([]string, len(piece))
	for i, c := range piece {
		number[i] = fmt.Sprint(c)
		goSyntax[i] = fmt.Sprintf("0x%x", c)
	}
	needles := []string{
		string(piece),
		hex.EncodeToString(piece),
		strings.ToUpper(hex.EncodeToString(piece)),
		strings.ToUpper(fmt.Sprintf("% x", piece)),
		fmt.Sprintf("% x", piece),
		strings.Join(number, " "),
		strings.Join(number, ", "),
		strings.Join(number, ","),
		strings.Join(goSyntax, ", "),
		strings.Join(goSyntax, " "),
	}
	for shift := range 3 { // base64 of the whole, wherever the piece begins in it
		at := len(secret)/2 + shift
		at -= at % 3
		needles = append(needles, base64.StdEncoding.EncodeToString(secret[at:at+6]))
	}
	for _, needle := range needles {
		if strings.Contains(text, needle) {
			return true
		}
	}
	return false
}

// What leaks finds, so that the tests built on it can fail.
func TestLeaksFinds(t *testing.T) {
	plain := []byte(apikey.Format{}.New(apikey.KindUser).Reveal())
	for _, format := range []string{"%s", "%v", "%q", "%x", "%X", "% x", "% X", "%d", "%#v"} {
		if text := fmt.Sprintf(format, plain); !leaks(text, plain) {
			t.Errorf("%s of the plain bytes is not found in %s", format, text)
		}
	}
	for _, value := range []any{string(plain), plain, struct{ S string }{string(plain)}} {
		text, err := json.Marshal(value)
		if err != nil || !leaks(string(text), plain) {
			t.Errorf("%T as JSON is not found in %s, %v", value, text, err)
		}
	}
	if leaks("[secret] kwu_…abcd", plain) {
		t.Error("found what is not there")
	}
}

type exported struct {
	Name   string
	Secret apikey.Secret
}

type unexported struct {
	name   string
	secret apikey.Secret
}

type pointers struct {
	Out *apikey.Secret
	in  *apikey.Secret
}

type embedded struct{ apikey.Secret }

type deep struct {
	list []unexported
	byID map[string]*unexported
	any  any
	arr  [1]apikey.Secret
}

type failure struct{ secret apikey.Secret }

func (f failure) Error() string { return fmt.Sprintf("no luck with %v %s", f.secret, f.secret) }

// holders are the ways in which a secret gets into something that is printed.
func holders(s apikey.Secret) map[string]any {
	hidden := unexported{"n", s}
	return map[string]any{
		"itself":              s,
		"pointer":             &s,
		"pointer to pointer":  func() **apikey.Secret { p := &s; return &p }(),
		"exported field":      exported{"n", s},
		"pointer to struct":   &exported{"n", s},
		"unexported field":    hidden,
		"pointer to hidden":   &hidden,
		"pointer fields":      pointers{&s, &s},
		"embedded":            embedded{s},
		"pointer to embedded": &embedded{s},
		"slice":               []apikey.Secret{s, s},
		"slice of pointers":   []*apikey.Secret{&s},
		"slice of structs":    []exported{{"n", s}},
		"array":               [2]apikey.Secret{s, s},
		"map":                 map[string]apikey.Secret{"k": s},
		"map of pointers":     map[int]*apikey.Secret{1: &s},
		"map of any":          map[string]any{"k": s},
		"slice of any":        []any{"x", s, &s},
		"deep":                deep{[]unexported{hidden}, map[string]*unexported{"k": &hidden}, hidden, [1]apikey.Secret{s}},
		"pointer to deep":     &deep{[]unexported{hidden}, nil, &hidden, [1]apikey.Secret{s}},
		"anonymous struct":    struct{ s struct{ s apikey.Secret } }{struct{ s apikey.Secret }{s}},
		"error":               failure{s},
		"wrapped error":       fmt.Errorf("create: %w", failure{s}),
		"joined errors":       errors.Join(failure{s}, fmt.Errorf("for %v", s)),
		"reflect.Value":       reflect.ValueOf(s),
		"reflect.Value field": reflect.ValueOf(&hidden).Elem().Field(1),
		"function's result":   func() any { return s }(),
	}
}

func TestSecretIsNotPrinted(t *testing.T) {
	s := apikey.Format{}.New(apikey.KindUser)
	plain := []byte(s.Reveal())
	var verbs []string
	for c := 'A'; c <= 'z'; c++ {
		if c <= 'Z' || c >= 'a' {
			verbs = append(verbs, string(c))
		}
	}
	for name, holder := range holders(s) {
		for _, flags := range []string{"", "+", "#", "-", " ", "0", "+#", "# ", "100", "-100", ".60", "#100.60"} {
			for _, verb := range verbs {
				if text := fmt.Sprintf("%"+flags+verb, holder); leaks(text, plain) {
					t.Errorf("%s: %%%s%s shows it: %s", name, flags, verb, text)
				}
			}
		}
		for _, text := range []string{fmt.Sprint(holder), fmt.Sprintln(holder), fmt.Errorf("%v", holder).Error()} {
			if leaks(text, plain) {
				t.Errorf("%s: printed as %s", name, text)
			}
		}
	}
	if got := fmt.Sprintf("%v %s %+v %#v %x %d %q", s, s, s, s, s, s, s); got != strings.TrimSpace(strings.Repeat("[secret] ", 7)) {
		t.Errorf("got %s", got)
	}
}

func TestSecretIsNotLogged(t *testing.T) {
	s := apikey.Format{}.New(apikey.KindUser)
	plain := []byte(s.Reveal())
	var out bytes.Buffer
	for name, handler := range map[string]slog.Handler{
		"text": slog.NewTextHandler(&out, nil),
		"json": slog.NewJSONHandler(&out, nil),
	} {
		log := slog.New(handler)
		for holderName, holder := range holders(s) {
			out.Reset()
			log.Info("hello", "key", holder)
			log.With("key", holder).Info("hello", slog.Group("group", slog.Any("key", holder)))
			if leaks(out.String(), plain) {
				t.Errorf("%s, %s: logged as %s", name, holderName, &out)
			}
		}
		out.Reset()
		log.Info("hello", "key", s)
		if !strings.Contains(out.String(), "[secret]") {
			t.Errorf("%s: no placeholder in %s", name, &out)
		}
	}
}

func TestSecretIsNotMarshalled(t *testing.T) {
	s := apikey.Format{}.New(apikey.KindUser)
	plain := []byte(s.Reveal())
	encoders := map[string]func(any) ([]byte, error){
		"json": json.Marshal,
		"xml":  xml.Marshal,
		"gob": func(v any) ([]byte, error) {
			var out bytes.Buffer
			err := gob.NewEncoder(&out).Encode(v)
			return out.Bytes(), err
		},
	}
	for name, encode := range encoders {
		for holderName, holder := range holders(s) {
			out, err := encode(holder)
			if leaks(string(out), plain) || err != nil && leaks(err.Error(), plain) {
				t.Errorf("%s, %s: got %s, %v", name, holderName, out, err)
			}
		}
		// Where an encoder would have to write it, it says so instead of writing something else.
		for _, holder := range []any{s, &s, exported{"n", s}, []apikey.Secret{s}, embedded{s}} {
			if out, err := encode(holder); err == nil {
				t.Errorf("%s of %T: got %q, want an error", name, holder, out)
			}
		}
	}
	attr := struct {
		Secret apikey.Secret `xml:",attr"`
	}{s}
	if out, err := xml.Marshal(attr); err == nil || leaks(string(out), plain) {
		t.Errorf("xml attribute: got %s, %v", out, err)
	}
	if _, err := s.MarshalText(); err == nil {
		t.Error("MarshalText works")
	}
	if _, err := s.MarshalBinary(); err == nil {
		t.Error("MarshalBinary works")
	}
}

// == on secrets would compare in a time that tells how much of them is equal (and here, only pointers).
func TestSecretIsNotComparable(t *testing.T) {
	for _, typ := range []reflect.Type{reflect.TypeFor[apikey.Secret](), reflect.TypeFor[exported]()} {
		if typ.Comparable() {
			t.Errorf("%s can be compared with == and be the key of a map", typ)
		}
	}
}

func TestRevealIsTheWayOut(t *testing.T) {
	s := apikey.NewSecret("x")
	if s.Reveal() != "x" || s.IsZero() {
		t.Errorf("got %q, zero: %t", s.Reveal(), s.IsZero())
	}
	for name, none := range map[string]apikey.Secret{"zero": {}, "empty": apikey.NewSecret("")} {
		if none.Reveal() != "" || !none.IsZero() || none.String() != "[secret]" {
			t.Errorf("%s: got %q, zero: %t, printed as %s", name, none.Reveal(), none.IsZero(), none)
		}
	}
}

const alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

var kinds = map[apikey.Kind]string{
	apikey.KindInstance:   "kwi_",
	apikey.KindAgent:      "kwa_",
	apikey.KindUser:       "kwu_",
	apikey.KindManagement: "kwm_",
}

// checksum is the checksum of a key, computed another way: math/big writes base 62 with its small
// letters before the capital ones.
func checksum(body string) string {
	digits := new(big.Int).SetUint64(uint64(crc32.ChecksumIEEE([]byte(body)))).Text(62)
	swapped := strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z':
			return c - 'a' + 'A'
		case c >= 'A' && c <= 'Z':
			return c - 'A' + 'a'
		}
		return c
	}, digits)
	return strings.Repeat("0", 6-len(swapped)) + swapped
}

// Keys that were made and checked outside of this program: the format is a promise to scanners.
func TestGoldenKeys(t *testing.T) {
	for _, tt := range []struct {
		first, key string
		kind       apikey.Kind
		hint       string
	}{
		{"", "kwi_00000000000000000000000000000000000000000000waICh", apikey.KindInstance, "kwi_…aICh"},
		{"kw", "kwu_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopq2k0kIo", apikey.KindUser, "kwu_…0kIo"},
		{"acme1", "acme1a_56789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijkl2IFqsv", apikey.KindAgent, "acme1a_…Fqsv"},
	} {
		f := apikey.Format{First: tt.first}
		if kind, err := f.Check(tt.key); err != nil || kind != tt.kind {
			t.Errorf("%s: got %q, %v; want %q", tt.key, kind, err, tt.kind)
		}
		if got := f.Hint(apikey.NewSecret(tt.key)); got != tt.hint {
			t.Errorf("%s: hint %s, want %s", tt.key, got, tt.hint)
		}
		if body := tt.key[:len(tt.key)-6]; body+checksum(body) != tt.key {
			t.Errorf("%s: want checksum %s", tt.key, checksum(body))
		}
	}
}

func TestNewSecrets(t *testing.T) {
	const each = 2500
	seen := make(map[string]bool)
	var counts [128]int
	var pattern = regexp.MustCompile(`^kw[iaum]_[0-9A-Za-z]{43}[0-9A-Za-z]{6}$`)
	for kind, prefix := range kinds {
		for range each {
			plain := apikey.Format{}.New(kind).Reveal()
			if seen[plain] {
				t.Fatalf("made twice")
			}
			seen[plain] = true
			if len(plain) != 53 || len(plain) != (apikey.Format{}).Len() || !strings.HasPrefix(plain, prefix) || !pattern.MatchString(plain) {
				t.Fatalf("a key of kind %q has the wrong shape: %d characters", kind, len(plain))
			}
			body := plain[:47]
			if plain[47:] != checksum(body) {
				t.Fatalf("wrong checksum %s of %s, want %s", plain[47:], body, checksum(body))
			}
			if got, err := (apikey.Format{}).Check(plain); err != nil || got != kind {
				t.Fatalf("its own key is refused: %q, %v", got, err)
			}
			for _, c := range body[4:] {
				counts[c]++
			}
		}
	}
	// Every character is equally likely. With 61 degrees of freedom chi-square has mean 61 and standard
	// deviation 11; a bias as of byte modulo 62 would make it 2,800.
	want := float64(len(kinds)*each*43) / float64(len(alphabet))
	var chi2 float64
	for _, c := range alphabet {
		off := float64(counts[c]) - want
		chi2 += off * off / want
	}
	if chi2 > 190 {
		t.Errorf("chi-square %.0f: characters are not equally likely", chi2)
	}
}

// What people and editors do to a key is noticed without asking anyone.
func TestTypingErrorsAreNoticed(t *testing.T) {
	f := apikey.Format{}
	for range 20 {
		good := f.New(apikey.KindAgent).Reveal()
		refuse := func(what, bad string) {
			t.Helper()
			if bad == good {
				return
			}
			if _, err := f.Check(bad); err == nil {
				t.Fatalf("%s was accepted: %s for %s", what, bad, good)
			} else if !errors.Is(err, apikey.ErrShape) && !errors.Is(err, apikey.ErrChecksum) {
				t.Fatalf("%s: got %v, want ErrShape or ErrChecksum", what, err)
			}
		}
		for i := range good {
			for _, c := range []byte(alphabet + "_-. \x00\x7f\xff") {
				refuse("a substitution", good[:i]+string([]byte{c})+good[i+1:])
			}
			refuse("a missing character", good[:i]+good[i+1:])
			refuse("a doubled character", good[:i+1]+good[i:])
			if i > 0 {
				refuse("a transposition", good[:i-1]+string([]byte{good[i], good[i-1]})+good[i+1:])
			}
			refuse("a beginning", good[:i])
			refuse("an end", good[i+1:])
		}
		refuse("another case", strings.ToLower(good))
		refuse("another case", strings.ToUpper(good))
		refuse("a space", good+" ")
		refuse("a line end", good+"\n")
		refuse("quotes", `"`+good+`"`)
		refuse("two", good+good)
	}
}

// 62^6 is more than 2^32: a checksum of which only the low 32 bits fit must not pass for them.
func TestChecksumIsOneSpelling(t *testing.T) {
	f := apikey.Format{}
	for range 1000 {
		good := f.New(apikey.KindUser).Reveal()
		sum := uint64(crc32.ChecksumIEEE([]byte(good[:47]))) + 1<<32
		var digits [6]byte
		for i := 5; i >= 0; i-- {
			digits[i] = alphabet[sum%62]
			sum /= 62
		}
		if _, err := f.Check(good[:47] + string(digits[:])); !errors.Is(err, apikey.ErrChecksum) {
			t.Fatalf("%s for %s: got %v, want ErrChecksum", digits, good, err)
		}
	}
}

// A right checksum does not make up for a wrong length.
func TestLengthIsExact(t *testing.T) {
	for n := range 100 {
		body := "kwu_" + strings.Repeat("x", n)
		if _, err := (apikey.Format{}).Check(body + checksum(body)); (err == nil) != (n == 43) || err != nil && !errors.Is(err, apikey.ErrShape) {
			t.Errorf("%d random characters: got %v", n, err)
		}
	}
}

func TestOwnsAndCheck(t *testing.T) {
	ours := apikey.Format{}
	acme := apikey.Format{First: "acme"}
	key := ours.New(apikey.KindUser).Reveal()
	foreign := acme.New(apikey.KindUser).Reveal()
	for _, tt := range []struct {
		name string
		f    apikey.Format
		s    string
		owns apikey.Kind
		err  error
	}{
		{"a key", ours, key, apikey.KindUser, nil},
		{"a key, first part named", apikey.Format{First: "kw"}, key, apikey.KindUser, nil},
		{"a prefix alone", ours, "kwi_", apikey.KindInstance, apikey.ErrShape},
		{"a prefix and rubbish", ours, "kwa_hello world", apikey.KindAgent, apikey.ErrShape},
		{"management", ours, "kwm_x", apikey.KindManagement, apikey.ErrShape},
		{"right shape, wrong checksum", ours, key[:52] + string(alphabet[(strings.IndexByte(alphabet, key[52])+1)%62]), apikey.KindUser, apikey.ErrChecksum},
		{"right length, wrong alphabet", ours, key[:10] + "-" + key[11:], apikey.KindUser, apikey.ErrShape},
		{"another kind for the same characters", ours, "kwi" + key[3:], apikey.KindInstance, apikey.ErrChecksum},
		{"no kind of ours", ours, "kwx" + key[3:], 0, apikey.ErrShape},
		{"capital prefix", ours, "KWU" + key[3:], 0, apikey.ErrShape},
		{"hyphen for underscore", ours, "kwu-" + key[4:], 0, apikey.ErrShape},
		{"nothing", ours, "", 0, apikey.ErrShape},
		{"too short for a prefix", ours, "kwi", 0, apikey.ErrShape},
		{"a JWT", ours, "eyJhbGciOiJIUzI1NiJ9.e30.XmNK3GpH3Ys", 0, apikey.ErrShape},
		{"another installation's", ours, foreign, 0, apikey.ErrShape},
		{"ours, seen by another installation", acme, key, 0, apikey.ErrShape},
		{"its own", acme, foreign, apikey.KindUser, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			kind, owns := tt.f.Owns(tt.s)
			if kind != tt.owns || owns != (tt.owns != 0) {
				t.Errorf("Owns: got %q, %t; want %q", kind, owns, tt.owns)
			}
			kind, err := tt.f.Check(tt.s)
			if !errors.Is(err, tt.err) || (err == nil) != (kind == tt.owns && kind != 0) {
				t.Errorf("Check: got %q, %v; want %v", kind, err, tt.err)
			}
		})
	}
}

func TestWithin(t *testing.T) {
	f := apikey.Format{Foreign: []apikey.Shape{{Prefix: "acme_", MinLength: 21, MaxLength: 64}}}
	key := f.New(apikey.KindUser).Reveal()
	mistyped := key[:10] + string(alphabet[(strings.IndexByte(alphabet, key[10])+1)%62]) + key[11:]
	for text, want := range map[string]bool{
		"": false, "kwi_": false, "a text with kwi_ and acme_ in it": false, key[:52]: false, key[1:]: false, "acme_short": false,
		key: true, "x" + key + "y": true, "see\n" + key: true, mistyped: true, "kwi_ " + key: true, key[:20] + key: true,
		"acme_0123456789abcdef": true, "token: acme_0123456789abcdef, please": true, "acme_0123456789abcdef.(end)": true,
	} {
		if got := f.Within(text); got != want {
			t.Errorf("%q: got %t", text, got)
		}
	}
}

func TestFormatPrefixes(t *testing.T) {
	for _, first := range []string{"", "kw", "k", "acme", "a1", "abcdefghij"} {
		f := apikey.Format{First: first}
		if err := f.Validate(); err != nil {
			t.Errorf("%q: %v", first, err)
		}
		for kind := range kinds {
			plain := f.New(kind).Reveal()
			if got, err := f.Check(plain); err != nil || got != kind || len(plain) != f.Len() {
				t.Errorf("%q: its own key is refused: %q, %v", first, got, err)
			}
		}
	}
	for _, first := range []string{"K", "kW", "1k", "k_", "k-w", "_", " ", "k w", "abcdefghijk", "kä", "k\n", "kw\x00"} {
		err := apikey.Format{First: first}.Validate()
		if _, ok := errors.AsType[*apikey.InvalidError](err); !ok {
			t.Errorf("%q: got %v, want an *InvalidError", first, err)
		}
	}
}

func TestHint(t *testing.T) {
	f := apikey.Format{}
	s := f.New(apikey.KindManagement)
	plain := s.Reveal()
	if got, want := f.Hint(s), "kwm_…"+plain[49:]; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	// Of anything shorter, four characters might be much of it.
	for _, other := range []apikey.Secret{{}, apikey.NewSecret("kwu_1234"), apikey.NewSecret(plain + "x")} {
		if got := f.Hint(other); got != "" {
			t.Errorf("got %q for what is no key of ours", got)
		}
	}
}

func TestCheckDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates; run without -race")
	}
	f := apikey.Format{}
	good := f.New(apikey.KindUser).Reveal()
	for _, s := range []string{good, good[:20], "Basic abc", good[:51] + "00"} {
		if allocs := testing.AllocsPerRun(1000, func() { _, _ = f.Check(s) }); allocs != 0 {
			t.Errorf("Check allocates %v times", allocs)
		}
	}
}

func FuzzCheck(f *testing.F) {
	f.Add("kw", "kwi_00000000000000000000000000000000000000000000waICh")
	f.Add("", "kwu_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopq2k0kIo")
	f.Add("acme1", "acme1a_56789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijkl2IFqsv")
	f.Add("kw", "kwi_")
	f.Add("kw", "kwu_"+strings.Repeat("z", 49))
	f.Fuzz(func(t *testing.T, first, s string) {
		format := apikey.Format{First: first}
		kind, err := format.Check(s)
		_ = format.Hint(apikey.NewSecret(s))
		if format.Validate() != nil {
			return // refused at configuration; it only must not panic
		}
		if owned, owns := format.Owns(s); err == nil && (!owns || owned != kind) {
			t.Fatalf("%q is accepted and not owned", s)
		}
		if first == "" {
			first = apikey.DefaultFirst
		}
		_, known := kinds[kind]
		body := max(0, len(s)-6)
		shape := regexp.MustCompile(`^` + regexp.QuoteMeta(first) + `[iaum]_[0-9A-Za-z]{49}$`).MatchString(s)
		switch {
		case err == nil && (!known || !shape || s[body:] != checksum(s[:body])):
			t.Fatalf("%q is accepted as %q", s, kind)
		case errors.Is(err, apikey.ErrShape) && shape:
			t.Fatalf("%q has the shape", s)
		case errors.Is(err, apikey.ErrChecksum) && (!shape || s[body:] == checksum(s[:body])):
			t.Fatalf("%q has the right checksum, or not even the shape", s)
		case err != nil && (kind != 0 || !errors.Is(err, apikey.ErrShape) && !errors.Is(err, apikey.ErrChecksum)):
			t.Fatalf("%q: got %q, %v", s, kind, err)
		}

		// The same characters with the right checksum are a key.
		if shape {
			if _, err := format.Check(s[:body] + checksum(s[:body])); err != nil {
				t.Fatalf("%q with its checksum: %v", s, err)
			}
		}
	})
}

func BenchmarkCheck(b *testing.B) {
	f := apikey.Format{}
	s := f.New(apikey.KindUser).Reveal()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.Check(s); err != nil {
			b.Fatal(err)
		}
	}
}
