package apikey_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"keyward/authz/apikey"
)

// The token that reference implementations agree on.
const (
	tokenInstance = "NfYmD45x1VE4aLuxejdmSnhNKupGV6SY3PgqPFH4EBxLCuz8k"
	tokenContext  = "25SDHuoyL2qesXhJwG7ZzqxMuyS2xXhpNhVGXSzy5iR49jJfLvLFSP9LhWDFRxGhhSaREydkw4unBkiPifvMEvAyjPW7SYwVUVcKJDR"
	tokenKey      = "jtTBaL8RrVeEvQDkJ7cXaYa2eE3Xh7GN7bs49GeQGg8mFBCp4"
	tokenSecret   = "6ywo1VdN1YNnohPCoRVXjqzs31usB8U18hQAUMz3TM6worfPf2mtMGVXbhzi6Wvj4pNMPAHxgztHZkLD9oQCHR4Q5SsZVvQUU3iuxK38e9XiFCHawfC8Y6tP3MmFR9TLfCDMGLANgF5Kd8uRr3xz1Pt1rn6JpStpKXYhpYqp12SZQK"
)

var agentToken = strings.Join([]string{"keya", tokenInstance, tokenContext, tokenKey, tokenSecret, "ayek"}, ".")

var foreignFormat = apikey.Format{Foreign: []apikey.Shape{{Prefix: "acme_", MinLength: 21, MaxLength: 40}, {AgentToken: true}}}

func TestForeignShapes(t *testing.T) {
	part := func(i int, with string) string {
		parts := strings.Split(agentToken, ".")
		parts[i] = with
		return strings.Join(parts, ".")
	}
	for s, want := range map[string]error{
		"acme_0123456789abcdef":                          nil,
		"acme_" + strings.Repeat("x", 35):                nil,
		"acme_" + strings.Repeat("x", 36):                apikey.ErrShape,
		"acme_0123456789abcde":                           apikey.ErrShape,
		"acme_0123456789abc ef":                          apikey.ErrShape,
		"acme_0123456789abc,ef":                          apikey.ErrShape,
		"acme_0123456789abc\"ef":                         apikey.ErrShape,
		"acme_0123456789abc\x7fef":                       apikey.ErrShape,
		"acme_0123456789abcéef":                          apikey.ErrShape,
		"ACME_0123456789abcdef":                          apikey.ErrShape,
		"other_0123456789abcdef":                         apikey.ErrShape,
		agentToken:                                       nil,
		strings.ToUpper(agentToken[:4]) + agentToken[4:]: apikey.ErrShape,
		part(5, "AYEK"):                                  apikey.ErrShape,
		agentToken + ".ayek":                             apikey.ErrShape,
		part(3, tokenKey+"."+tokenKey):                   apikey.ErrShape,
		part(3, ""):                                      apikey.ErrShape,
		part(2, tokenContext+"0"):                        apikey.ErrShape,
		part(2, tokenContext+"l"):                        apikey.ErrShape,
		part(4, tokenSecret[:100]):                       apikey.ErrShape,
		part(4, tokenSecret+tokenSecret):                 apikey.ErrShape,
		"keya..ayek":                                     apikey.ErrShape,
		"keya.ayek":                                      apikey.ErrShape,
	} {
		kind, err := foreignFormat.Check(s)
		if !errors.Is(err, want) || (err == nil) != (kind == apikey.KindForeign) {
			t.Errorf("%q: got %c, %v, want %v", s, kind, err, want)
		}
		if _, err := (apikey.Format{}).Check(s); err == nil {
			t.Errorf("%q fits without being registered", s)
		}
	}
	// What begins like one is judged, and never passed on.
	if kind, ok := foreignFormat.Owns("keya.whatever"); !ok || kind != apikey.KindForeign {
		t.Error("what begins like a foreign secret is not ours to judge")
	}
	// Ours stay ours.
	ours := apikey.Format{}.New(apikey.KindAgent).Reveal()
	if kind, err := foreignFormat.Check(ours); err != nil || kind != apikey.KindAgent {
		t.Errorf("our own: %c, %v", kind, err)
	}
	for secret, want := range map[string]string{"acme_0123456789abcdef": "acme_…cdef", agentToken: "keya.…SZQK"} {
		if got := foreignFormat.Hint(apikey.NewSecret(secret)); got != want {
			t.Errorf("hint %q, want %q", got, want)
		}
	}
}

func TestBadShapesAreRefused(t *testing.T) {
	for name, shapes := range map[string][]apikey.Shape{
		"short prefix":         {{Prefix: "ab", MinLength: 40, MaxLength: 50}},
		"long prefix":          {{Prefix: strings.Repeat("a", 33), MinLength: 60, MaxLength: 90}},
		"prefix with a comma":  {{Prefix: "abc,", MinLength: 40, MaxLength: 50}},
		"guessable":            {{Prefix: "acme_", MinLength: 20, MaxLength: 50}},
		"longest is shorter":   {{Prefix: "acme_", MinLength: 40, MaxLength: 39}},
		"too long":             {{Prefix: "acme_", MinLength: 40, MaxLength: 1025}},
		"ours":                 {{Prefix: "kwi_", MinLength: 40, MaxLength: 50}},
		"begins as ours":       {{Prefix: "kwi_x", MinLength: 40, MaxLength: 50}},
		"JWT":                  {{Prefix: "eyJhbGciOi", MinLength: 40, MaxLength: 50}},
		"twice":                {{Prefix: "acme_", MinLength: 40, MaxLength: 50}, {Prefix: "acme_x", MinLength: 40, MaxLength: 50}},
		"token twice":          {{AgentToken: true}, {AgentToken: true}},
		"token and its prefix": {{AgentToken: true}, {Prefix: "keya.x", MinLength: 40, MaxLength: 50}},
		"token with prefix":    {{AgentToken: true, Prefix: "keya."}},
	} {
		if (apikey.Format{Foreign: shapes}).Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := foreignFormat.Validate(); err != nil {
		t.Error(err)
	}
}

func TestParseAgentToken(t *testing.T) {
	got, err := apikey.ParseAgentToken(agentToken)
	id, _ := apikey.ParseID("aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee")
	want := apikey.AgentToken{InstanceID: "11111111-2222-3333-4444-555555555555", AgentName: "demo-agent", KeyID: id}
	random := make([]byte, 128)
	for i := range random {
		random[i] = byte(i + 1)
	}
	if got.Random.Reveal() != string(random) {
		t.Errorf("random part: got %x", got.Random.Reveal())
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(apikey.AgentToken{}, "Random")); err != nil || diff != "" {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
	parts := strings.Split(agentToken, ".")
	for name, change := range map[string]func([]string){
		"instance and context disagree": func(p []string) { p[1] = p[3] },
		"context of something else":     func(p []string) { p[2] = p[1] },
		"key id is none":                func(p []string) { p[3] = "2J" },
		"secret of 129 bytes":           func(p []string) { p[4] = "1" + p[4] },
		"not base58":                    func(p []string) { p[1] = "0OIl" },
	} {
		changed := append([]string{}, parts...)
		change(changed)
		if got, err := apikey.ParseAgentToken(strings.Join(changed, ".")); err == nil {
			t.Errorf("%s: %+v", name, got)
		} else if strings.Contains(err.Error(), tokenKey) {
			t.Errorf("%s: the error shows the token", name)
		}
	}
}

// A foreign secret and its SHA-256 find the same key; the SHA-256 itself, sent as a secret, finds none.
func TestForeignDigests(t *testing.T) {
	p := apikey.NewPepper(1, false)
	const secret = "acme_0123456789abcdef"
	sum := sha256.Sum256([]byte(secret))
	digest := p.DigestOf(apikey.KindForeign, secret)
	if digest != p.DigestSHA256(sum) {
		t.Error("the secret and its SHA-256 have different digests")
	}
	if digest == p.Digest(secret) || digest == apikey.NewPepper(1, false).DigestSHA256(sum) {
		t.Error("the digest is not HMAC(pepper, SHA-256)")
	}
	if _, err := foreignFormat.Check(string(sum[:])); err == nil {
		t.Error("the SHA-256 passes for a secret")
	}
	ours := apikey.Format{}.New(apikey.KindInstance).Reveal()
	if p.DigestOf(apikey.KindInstance, ours) != p.Digest(ours) {
		t.Error("our own secrets have another digest")
	}
}

func TestForeignSecretsCostNoAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	p := apikey.NewPepper(1, false)
	for _, secret := range []string{"acme_0123456789abcdef", agentToken} {
		p.DigestOf(apikey.KindForeign, secret) // the pool and its room for input
		if n := testing.AllocsPerRun(1000, func() {
			kind, err := foreignFormat.Check(secret)
			if err != nil {
				t.Fatal(err)
			}
			p.DigestOf(kind, secret)
		}); n != 0 {
			t.Errorf("%d characters: %v allocations", len(secret), n)
		}
	}
}

// The salt and hash of the reference token, as the application keeps them.
const (
	tokenSalt = "LqTT3d9tPF8RJqfzmsVnhC"
	tokenHash = "QuqkFxrzS5VjSrsEU8P71nAj9xMKjutNBZsTNqWYPGgs4yPJLMFbYJFJTjeSiQiH7WEV62EawUMAQgX2cKthVjxA18TQETxJyrSPo3MEKzVML9WjvSvV8JPjjD3xGcWJJaYXWvmRqQb1EtNXusAiyf3Zre8TDHJcNsiVo2GD8nTFZWP"
)

func TestParseAgentHash(t *testing.T) {
	h, err := apikey.ParseAgentHash(tokenSalt, tokenHash)
	if err != nil || h.Salt[0] != 0xa0 || h.Salt[15] != 0xaf || !bytes.HasPrefix(h.Hash[:], []byte{0xe9, 0xaa, 0x41, 0xd8, 0xf4, 0x0f, 0xaa, 0x1e}) {
		t.Errorf("got %x, error %v", h.Salt, err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%x", "%s", "%d"} {
		if got := fmt.Sprintf(verb, h); got != "[hash]" {
			t.Errorf("%s shows %q", verb, got)
		}
	}
	for name, c := range map[string]struct{ salt, hash, field string }{
		"no salt":        {"", tokenHash, "salt"},
		"short salt":     {tokenSalt[2:], tokenHash, "salt"},
		"long salt":      {"1" + tokenSalt, tokenHash, "salt"},
		"salt in hex":    {"a0a1a2a3a4a5a6a7a8a9aaabacadaeaf", tokenHash, "salt"},
		"no hash":        {tokenSalt, "", "hash"},
		"cut hash":       {tokenSalt, tokenHash[:len(tokenHash)-2], "hash"},
		"not base58":     {tokenSalt, "0" + tokenHash[1:], "hash"},
		"in the middle":  {tokenSalt, tokenHash[:9] + "l" + tokenHash[10:], "hash"},
		"a megabyte":     {tokenSalt, strings.Repeat("z", 1<<20), "hash"},
		"the other way":  {tokenHash, tokenSalt, "salt"},
		"zeros too many": {tokenSalt, strings.Repeat("1", 129), "hash"},
	} {
		_, err := apikey.ParseAgentHash(c.salt, c.hash)
		bad, ok := errors.AsType[*apikey.InvalidError](err)
		if !ok || bad.Field != c.field {
			t.Errorf("%s: got %v, want field %s", name, err, c.field)
		} else if c.hash != "" && strings.Contains(err.Error(), c.hash) || c.salt != "" && strings.Contains(err.Error(), c.salt) {
			t.Errorf("%s: the error shows it", name)
		}
	}
}

// What finds a pending key is under no pepper, and no digest of a secret.
func TestPendingDigests(t *testing.T) {
	id, other := apikey.ID{1}, apikey.ID{2}
	if id.PendingDigest() == other.PendingDigest() {
		t.Error("two ids have one digest")
	}
	p := apikey.NewPepper(1, false)
	for _, text := range []string{string(id[:]), id.String(), "keyward pending agent access token\x00" + string(id[:])} {
		if d := id.PendingDigest(); d == p.Digest(text) || d == p.DigestOf(apikey.KindForeign, text) || d == sha256.Sum256([]byte(id.String())) {
			t.Error("a secret could have it as its digest")
		}
	}
}

// What we make is what the application makes: it is taken apart again, and no two are alike.
func TestNewAgentToken(t *testing.T) {
	format := apikey.Format{Foreign: []apikey.Shape{{AgentToken: true}}}
	id, err := apikey.ParseID("aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for range 200 {
		for _, instance := range []string{"11111111-2222-3333-4444-555555555555", "shop", strings.Repeat("x", 64)} {
			for _, agent := range []string{"demo-agent", strings.Repeat("a", 128)} {
				s := apikey.NewAgentToken(instance, agent, id).Reveal()
				got, err := apikey.ParseAgentToken(s)
				if err != nil || got.InstanceID != instance || got.AgentName != agent || got.KeyID != id || len(got.Random.Reveal()) != 128 {
					t.Fatalf("%v of %d characters for %s and %s: %+v", err, len(s), instance, agent, got)
				}
				if kind, err := format.Check(s); err != nil || kind != apikey.KindForeign {
					t.Fatalf("%v %v", kind, err)
				}
				if seen[got.Random.Reveal()] {
					t.Fatal("twice the same")
				}
				seen[got.Random.Reveal()] = true
			}
		}
	}
	vector := strings.Split(agentToken, ".")
	if got := strings.Split(apikey.NewAgentToken("11111111-2222-3333-4444-555555555555", "demo-agent", id).Reveal(), "."); !slices.Equal(got[:4], vector[:4]) {
		t.Errorf("got %q, want %q", got[:4], vector[:4])
	}
}
