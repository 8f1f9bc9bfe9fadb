package apikey_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"keyward/authz/apikey"
)

// A pepper whose key the tests know.
var pepperKey = []byte("0123456789abcdefghijklmnopqrstuv")

func pepperText(lines ...string) []byte {
	return []byte("keyward pepper\n" + strings.Join(lines, "\n") + "\n")
}

func keyLine(key []byte) string { return "key: " + base64.StdEncoding.EncodeToString(key) }

func knownPepper(t testing.TB, version int) *apikey.Pepper {
	t.Helper()
	p, err := apikey.ParsePepper(pepperText(fmt.Sprintf("version: %d", version), keyLine(pepperKey)))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func hmacOf(key []byte, parts ...string) []byte {
	m := hmac.New(sha256.New, key)
	for _, part := range parts {
		m.Write([]byte(part))
	}
	return m.Sum(nil)
}

func TestDigestIsHMAC(t *testing.T) {
	p := knownPepper(t, 1)
	rapid.Check(t, func(t *rapid.T) {
		// One pepper for many secrets, long after short and short after long.
		secret := rapid.OneOf(rapid.String(), rapid.StringN(0, 300, 1000), rapid.Just("")).Draw(t, "secret")
		d := p.Digest(secret)
		if !bytes.Equal(d[:], hmacOf(pepperKey, secret)) {
			t.Fatalf("digest of %q is %x, want %x", secret, d[:], hmacOf(pepperKey, secret))
		}
	})
}

func TestDigest(t *testing.T) {
	p, q := apikey.NewPepper(1, false), apikey.NewPepper(1, false)
	d := p.Digest("secret")
	same, otherSecret, otherPepper := p.Digest("secret"), p.Digest("Secret"), q.Digest("secret")
	if !d.Equal(&same) || d.Equal(&otherSecret) || d.Equal(&otherPepper) {
		t.Error("a digest must equal that of the same secret under the same pepper, and no other")
	}
	for i := range d {
		off := d
		off[i] ^= 1
		if d.Equal(&off) {
			t.Errorf("a digest that differs in byte %d is equal", i)
		}
	}
	if got, want := d.Prefix(), binary.BigEndian.Uint64(d[:8]); got != want {
		t.Errorf("prefix %x, want %x", got, want)
	}
	if got, want := d.String(), fmt.Sprintf("%x…", d[:4]); got != want {
		t.Errorf("printed as %s, want %s", got, want)
	}
}

func TestDigestConcurrently(t *testing.T) {
	p := apikey.NewPepper(1, false)
	want := make([]apikey.Digest, 50)
	for i := range want {
		want[i] = p.Digest(strings.Repeat("x", i))
	}
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for n := range 2000 {
				if i := n % len(want); p.Digest(strings.Repeat("x", i)) != want[i] {
					t.Errorf("the digest of secret %d is another's", i)
					return
				}
			}
		})
	}
	all.Wait()
}

func TestDigestDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector empties pools; run without -race")
	}
	p := apikey.NewPepper(1, false)
	secret := apikey.Format{}.New(apikey.KindUser).Reveal()
	if allocs := testing.AllocsPerRun(1000, func() { p.Digest(secret) }); allocs != 0 {
		t.Errorf("%v allocations, want 0", allocs)
	}
}

func TestDerive(t *testing.T) {
	p := knownPepper(t, 1)
	// The first block of HKDF-Expand, spelt out.
	got := p.Derive("lease mac")
	if want := hmacOf(pepperKey, "keyward lease mac", "\x01"); !bytes.Equal(got[:], want) {
		t.Errorf("got %x, want %x", got, want)
	}
	seen := map[[32]byte]string{[32]byte(pepperKey): "the pepper itself"}
	for _, label := range []string{"lease mac", "lease", "mac", "", "cursor", "Lease mac", "lease mac "} {
		derived := p.Derive(label)
		if other, ok := seen[derived]; ok {
			t.Errorf("%q is the same as %q", label, other)
		}
		seen[derived] = label
		if derived != p.Derive(label) {
			t.Errorf("%q is not the same twice", label)
		}
		if derived == [32]byte(p.Digest("keyward "+label)) || derived == [32]byte(p.Digest(label)) {
			t.Errorf("%q is the digest of a secret", label)
		}
		if derived == apikey.NewPepper(1, false).Derive(label) {
			t.Errorf("%q does not depend on the pepper", label)
		}
	}
}

func TestCheckValue(t *testing.T) {
	p := knownPepper(t, 1)
	value := p.CheckValue()
	if want := hmacOf(pepperKey, "keyward pepper check value", "\x01")[:16]; !bytes.Equal(value[:], want) {
		t.Errorf("got %x, want %x: every store would take its pepper for a wrong one", value, want)
	}
	if leaks(string(value[:]), pepperKey) {
		t.Error("it gives the pepper away")
	}
	if value == apikey.NewPepper(1, false).CheckValue() {
		t.Error("two peppers have the same check value")
	}
}

func TestPeppers(t *testing.T) {
	one, two, dev := apikey.NewPepper(1, false), apikey.NewPepper(2, false), apikey.NewPepper(3, true)
	if one.Dev() || !dev.Dev() || two.Version() != 2 {
		t.Error("a pepper does not say what it was made as")
	}
	for _, tt := range []struct {
		name    string
		peppers apikey.Peppers
		ok      bool
	}{
		{"one", apikey.Peppers{Current: one}, true},
		{"rotating", apikey.Peppers{Current: two, Previous: one}, true},
		{"none", apikey.Peppers{}, false},
		{"previous alone", apikey.Peppers{Previous: one}, false},
		{"swapped", apikey.Peppers{Current: one, Previous: two}, false},
		{"the same twice", apikey.Peppers{Current: one, Previous: one}, false},
	} {
		if err := tt.peppers.Validate(); (err == nil) != tt.ok {
			t.Errorf("%s: got %v", tt.name, err)
		}
	}
	both := apikey.Peppers{Current: two, Previous: one}
	for version, want := range map[uint32]*apikey.Pepper{0: nil, 1: one, 2: two, 3: nil} {
		if got := both.ByVersion(version); got != want {
			t.Errorf("version %d: got %v, want %v", version, got, want)
		}
	}
	if got := (apikey.Peppers{}).ByVersion(0); got != nil {
		t.Errorf("of none: got %v", got)
	}
}

func TestPepperFile(t *testing.T) {
	for _, dev := range []bool{false, true} {
		p := apikey.NewPepper(7, dev)
		back, err := apikey.ParsePepper(apikey.MarshalPepper(p))
		if err != nil {
			t.Fatal(err)
		}
		if back.Version() != 7 || back.Dev() != dev || back.Digest("x") != p.Digest("x") || back.CheckValue() != p.CheckValue() {
			t.Errorf("dev %t: another pepper came back", dev)
		}
	}
	golden := "keyward pepper\nversion: 7\nfor: development\nkey: MDEyMzQ1Njc4OWFiY2RlZmdoaWprbG1ub3BxcnN0dXY=\n"
	p, err := apikey.ParsePepper([]byte(golden))
	if err != nil || p.Version() != 7 || !p.Dev() || !bytes.Equal(apikey.MarshalPepper(p), []byte(golden)) {
		t.Errorf("the file as it was always written is not read, %v", err)
	}
	for name, text := range map[string][]byte{
		"line ends of Windows": []byte(strings.ReplaceAll(golden, "\n", "\r\n")),
		"empty lines":          []byte(strings.ReplaceAll(golden, "\n", "\n\n")),
		"no last line end":     []byte(strings.TrimSpace(golden)),
		"another order":        pepperText(keyLine(pepperKey), "version: 7"),
	} {
		if p, err := apikey.ParsePepper(text); err != nil || p.Version() != 7 || !bytes.Equal(hmacOf(pepperKey, "x"), sum(p.Digest("x"))) {
			t.Errorf("%s: got %v, %v", name, p, err)
		}
	}
}

func sum(d apikey.Digest) []byte { return d[:] }

func TestMalformedPepperFiles(t *testing.T) {
	const version = "version: 1"
	key := keyLine(pepperKey)
	for name, text := range map[string][]byte{
		"empty":                     nil,
		"a line end":                []byte("\n"),
		"the key alone":             []byte(key + "\n"),
		"no header":                 []byte(version + "\n" + key + "\n"),
		"another header":            []byte("keyward peppers\n" + version + "\n" + key + "\n"),
		"a space before the header": []byte(" keyward pepper\n" + version + "\n" + key + "\n"),
		"a byte order mark":         append([]byte("\xef\xbb\xbf"), pepperText(version, key)...),
		"header alone":              pepperText(),
		"no version":                pepperText(key),
		"no key":                    pepperText(version),
		"version 0":                 pepperText("version: 0", key),
		"negative version":          pepperText("version: -1", key),
		"version too large":         pepperText("version: 4294967296", key),
		"version in hexadecimal":    pepperText("version: 0x1", key),
		"version without space":     pepperText("version:1", key),
		"version and a space":       pepperText("version: 1 ", key),
		"no number":                 pepperText("version: one", key),
		"empty key":                 pepperText(version, "key: "),
		"short key":                 pepperText(version, keyLine(pepperKey[:31])),
		"long key":                  pepperText(version, keyLine(append(pepperKey[:32:32], 'x'))),
		"key cut off":               pepperText(version, key[:len(key)-5]),
		"key without padding":       pepperText(version, strings.TrimRight(key, "=")),
		"key with a space":          pepperText(version, key[:20]+" "+key[20:]),
		"key in hexadecimal":        pepperText(version, fmt.Sprintf("key: %x", pepperKey)),
		"key as it is":              pepperText(version, "key: "+string(pepperKey)),
		"for production":            pepperText(version, "for: production", key),
		"a field nobody knows":      pepperText(version, key, "comment: "+string(pepperKey)),
		"a word":                    pepperText(version, key, string(pepperKey)),
		"two files in one":          append(pepperText(version, key), pepperText(version, key)...),
		"two keys":                  pepperText(version, key, keyLine(bytes.Repeat([]byte("y"), 32))),
		"two versions":              pepperText(version, "version: 2", key),
		"twice for":                 pepperText(version, "for: development", "for: development", key),
		"capital field":             pepperText(version, "KEY"+key[3:]),
		"zero bytes":                pepperText(version, key, "\x00"),
		"an endless line":           pepperText(version, key, strings.Repeat("x", 1<<17)),
		"binary":                    bytes.Repeat([]byte{0xff, 0x00, '\n'}, 100),
	} {
		p, err := apikey.ParsePepper(text)
		if err == nil || p != nil {
			t.Errorf("%s: was read", name)
			continue
		}
		if leaks(err.Error(), pepperKey) || strings.Contains(err.Error(), key[5:15]) {
			t.Errorf("%s: the error shows the key: %v", name, err)
		}
	}
}

func FuzzParsePepper(f *testing.F) {
	f.Add(pepperText("version: 1", keyLine(pepperKey)))
	f.Add(pepperText("version: 1", "for: development", keyLine(pepperKey)))
	f.Add([]byte("keyward pepper\r\n\r\nversion: 4294967295\nkey: \n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := apikey.ParsePepper(text)
		if err != nil {
			return
		}
		back, err := apikey.ParsePepper(apikey.MarshalPepper(p))
		if err != nil || back.Version() != p.Version() || back.Dev() != p.Dev() || back.CheckValue() != p.CheckValue() {
			t.Fatalf("what was read is written as another pepper: %v", err)
		}
	})
}

func TestPepperIsNotShown(t *testing.T) {
	p := knownPepper(t, 3)
	p.Digest("so that its pool holds a keyed hash")
	type hidden struct {
		pepper  *apikey.Pepper
		peppers apikey.Peppers
	}
	both := apikey.Peppers{Current: p, Previous: knownPepper(t, 2)}
	for name, holder := range map[string]any{
		"pepper":   p,
		"itself":   reflect.ValueOf(p).Elem(),
		"pair":     both,
		"hidden":   hidden{p, both},
		"pointer":  &hidden{p, both},
		"in slice": []any{p, both},
		"in map":   map[string]*apikey.Pepper{"p": p},
		"in error": fmt.Errorf("%w: %v", apikey.ErrUndecided, p),
	} {
		for _, flags := range []string{"", "+", "#", " ", "0"} {
			for c := 'A'; c <= 'z'; c++ {
				if text := fmt.Sprintf("%"+flags+string(c), holder); leaks(text, pepperKey) {
					t.Errorf("%s: %%%s%c shows it: %s", name, flags, c, text)
				}
			}
		}
		var out bytes.Buffer
		slog.New(slog.NewTextHandler(&out, nil)).Info("hello", "pepper", holder)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("hello", "pepper", holder)
		text, _ := json.Marshal(holder)
		if out.Write(text); leaks(out.String(), pepperKey) {
			t.Errorf("%s: logged or marshalled as %s", name, &out)
		}
	}
	if got := fmt.Sprintf("%v %#v", p, p); got != "pepper version 3 pepper version 3" {
		t.Errorf("got %s", got)
	}
}

func BenchmarkDigest(b *testing.B) {
	p := apikey.NewPepper(1, false)
	secret := apikey.Format{}.New(apikey.KindUser).Reveal()
	b.ReportAllocs()
	for b.Loop() {
		p.Digest(secret)
	}
}
