package authz

import (
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// bothCases returns an escape with its digits in lower and in upper case.
func bothCases(escape string) []string {
	return []string{strings.ToLower(escape), strings.ToUpper(escape)}
}

func TestBadPathIsRefusedWhereverItIs(t *testing.T) {
	bad := []string{
		`\`, ";", "#", " ", "\t", "\r\n", "\x00", "\x1f", "\x7f", "\x80", "\xff", "é", "\u2215", "\uff0e",
		"//", "/./", "/../", "/..;/", "/.;/", "/%2e/", "/.%2e/", "/%2E./",
		"%", "%%", "%4", "%zz", "%g0", "%0g", "% 1", "%+1", "%u0041", "%25", "%2525", "%252e%252e", "%252f",
	}
	for _, c := range []byte("/\\;%-._~09azAZ\x00\x09\x0a\x0d\x1f\x7f") {
		bad = append(bad, bothCases(fmt.Sprintf("%%%02x", c))...)
	}
	for _, overlong := range []string{
		"%c0%ae", "%c0%af", "%c1%9c", "%e0%80%ae", "%e0%81%9c", "%f0%80%80%af", "%f8%80%80%80%ae", "%fc%80%80%80%80%af",
	} {
		bad = append(bad, bothCases(overlong)...)
	}
	for _, s := range bad {
		for _, place := range []string{"/%s/b/c", "/a%s", "/a%s/b", "/a/%sb", "/a/b%sc/d", "/a/b%s?q=1", "/%%C3%%A9/b%sc/"} {
			target := fmt.Sprintf(place, s)
			if path, _, _, ok := judgePath(nil, target); ok {
				t.Errorf("judgePath(%q) = %q, want it refused", target, path)
			}
		}
		// A query is the application's.
		if _, query, _, ok := judgePath(nil, "/a?"+s); !ok || query != s {
			t.Errorf("query %q = %q, %t; queries are not judged", s, query, ok)
		}
	}
	for _, target := range []string{
		"", "?", "?/a", "*", "a", "a/b", ".", "..", "http://host/a", "host:443", "%2f", `\a`,
		"/.", "/..", "/./", "/../", "/a/.", "/a/..", "/a/../", "/../a", "/./a", "//", "/a//", "//a", "/a/.?q", "/a/..?q", "/a//?q",
		"/%", "/%4", "/a%2", "/a/%c3%", "/%?41", "/%4?1",
	} {
		if path, _, _, ok := judgePath(nil, target); ok {
			t.Errorf("judgePath(%q) = %q, want it refused", target, path)
		}
	}
}

func TestGoodPathIsDecodedOnce(t *testing.T) {
	for _, c := range []struct{ target, path, query string }{
		{"/", "/", ""},
		{"/?", "/", ""},
		{"/?a=b", "/", "a=b"},
		{"/a", "/a", ""},
		{"/a/", "/a", ""},
		{"/a/b/?x=1&y=%2f", "/a/b", "x=1&y=%2f"},
		{"/a?b?c", "/a", "b?c"},
		{"/a?x=/../;y\\%25%zz#", "/a", `x=/../;y\%25%zz#`},
		{"/-._~09AZaz", "/-._~09AZaz", ""},
		{"/!$&'()*+,:=@[]^`{|}<>\"", "/!$&'()*+,:=@[]^`{|}<>\"", ""},
		{"/...", "/...", ""},
		{"/.a/..b/c./d../a.b", "/.a/..b/c./d../a.b", ""},
		{"/caf%C3%A9", "/café", ""},
		{"/caf%c3%a9/", "/café", ""},
		{"/caf%e9", "/caf\xe9", ""}, // Latin-1
		{"/%E4%BD%A0%E5%A5%BD", "/你好", ""},
		{"/%F0%9F%94%91", "/🔑", ""},
		{"/a%20b/%3A%3a%40%3F%3f%23%7B%7d?c%20d", "/a b/::@??#{}", "c%20d"},
		{"/a+b", "/a+b", ""},
		{"/c0%80/%C3c0%ae", "/c0\x80/\xc3c0\xae", ""}, // not overlong: C0 is text here
		{"/a%20%20b/c%20d", "/a  b/c d", ""},
	} {
		path, query, _, ok := judgePath(nil, c.target)
		if got := (struct{ target, path, query string }{c.target, path, query}); !ok || got != c {
			t.Errorf("judgePath: got %q %t, want %q", got, ok, c)
		}
	}
}

// Every byte, raw and escaped, against the contract written down a second time.
func TestEveryByteOfAPath(t *testing.T) {
	const unreserved = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
	for i := range 256 {
		c := byte(i)
		control := c < 0x20 || c == 0x7f
		raw := !control && c < 0x80 && !strings.ContainsRune(" \\;#", rune(c))
		if c != '%' && c != '/' && c != '?' {
			target := "/a" + string([]byte{c}) + "b"
			if path, _, _, ok := judgePath(nil, target); ok != raw || ok && path != target {
				t.Errorf("raw %#02x: got %q %t, want %t", c, path, ok, raw)
			}
		}
		escaped := !control && (c >= 0x80 || !strings.ContainsRune(`/\;%`+unreserved, rune(c)))
		for _, format := range []string{"/a%%%02xb", "/a%%%02Xb"} {
			target := fmt.Sprintf(format, c)
			if path, _, _, ok := judgePath(nil, target); ok != escaped || ok && path != "/a"+string([]byte{c})+"b" {
				t.Errorf("%s: got %q %t, want %t", target, path, ok, escaped)
			}
		}
	}
}

func TestScratchIsAppendedTo(t *testing.T) {
	scratch := append(make([]byte, 0, 64), "kept"...)
	plain, _, scratch, _ := judgePath(scratch, "/plain")
	first, _, scratch, _ := judgePath(scratch, "/1%20a")
	host, scratch := cleanHost(scratch, "HOST")
	second, _, scratch, _ := judgePath(scratch, "/1%20b")
	_, _, scratch, _ = judgePath(scratch, "/1%20%2f") // refused half-way
	got := []string{plain, first, host, second, string(scratch)}
	if diff := cmp.Diff([]string{"/plain", "/1 a", "host", "/1 b", "kept/1 ahost/1 b"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestVeryLongPaths(t *testing.T) {
	const size = 1 << 20
	for _, c := range []struct {
		name, target string
		ok           bool
	}{
		{"plain", "/" + strings.Repeat("a", size), true},
		{"segments", strings.Repeat("/a", size/2), true},
		{"escapes", "/" + strings.Repeat("%3A", size/3), true},
		{"dots", "/" + strings.Repeat(".", size), true},
		{"query", "/?" + strings.Repeat("%", size), true},
		{"slashes", strings.Repeat("/", size), false},
		{"dot segments", strings.Repeat("/..", size/3), false},
		{"bad end", "/" + strings.Repeat("a", size) + "%2f", false},
		{"cut end", "/" + strings.Repeat("%3A", size/3) + "%2", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path, query, _, ok := judgePath(nil, c.target)
			if ok != c.ok {
				t.Fatalf("got %t, want %t", ok, c.ok)
			}
			target, wantQuery, _ := strings.Cut(c.target, "?")
			if want, _ := url.PathUnescape(target); ok && (path != want || query != wantQuery) {
				t.Errorf("got a path of %d and a query of %d bytes, want %d and %d", len(path), len(query), len(want), len(wantQuery))
			}
		})
	}
}

// badPath is DESIGN §2.1 as regular expressions.
var badPath = regexp.MustCompile(`(?is)^$|^[^/]|[\x00-\x20\x7f\\;#]` +
	`|%(5c|2f|3b|25|[01].|7f)` +
	`|//|/\.\.?(/|$)` +
	`|%(2d|2e|5f|7e|3[0-9]|4[1-9a-f]|5[0-9a]|6[1-9a-f]|7[0-9a])` +
	`|%([^0-9a-f]|.[^0-9a-f]|.?$)` +
	`|%c[01]%[89ab]|%(e0|f0|f8|fc)%8[01]` +
	`|/%20|%20(/|$)`)

func isBadPath(target string) bool {
	path, _, _ := strings.Cut(target, "?")
	for i := range len(path) {
		if path[i] >= 0x80 {
			return true
		}
	}
	return badPath.MatchString(path)
}

func FuzzJudgePath(f *testing.F) {
	for _, s := range []string{
		"/", "/a/b/?q", "/%C3%A9/x", "/a%20b", "/%2e%2E/", "/a/..;/b", "//", "/a%2", "/%c0%ae", "/...", "/a?/../", "/%41", "/%5C",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, target string) {
		path, query, _, ok := judgePath(nil, target)
		if ok == isBadPath(target) {
			t.Fatalf("judgePath(%q) = %q, %t: not what the contract says", target, path, ok)
		}
		if !ok {
			return
		}
		wantPath, wantQuery, _ := strings.Cut(target, "?")
		wantPath, err := url.PathUnescape(wantPath)
		if wantPath != "/" {
			wantPath = strings.TrimSuffix(wantPath, "/")
		}
		if err != nil || path != wantPath || query != wantQuery {
			t.Errorf("judgePath(%q) = %q, %q, want %q, %q (%v)", target, path, query, wantPath, wantQuery, err)
		}
	})
}

func TestHostIsCleaned(t *testing.T) {
	for _, c := range []struct{ host, want string }{
		{"", ""},
		{".", ""},
		{"example.com", "example.com"},
		{"example.com.", "example.com"},
		{"example.com:443", "example.com"},
		{"example.com:", "example.com"},
		{"example.com.:8080", "example.com"},
		{"API.Example.COM.:8080", "api.example.com"},
		{"XN--CAF-DMA.example", "xn--caf-dma.example"},
		{"127.0.0.1:80", "127.0.0.1"},
		{"[::1]", "[::1]"},
		{"[::1]:80", "[::1]"},
		{"[FE80::A]:80", "[fe80::a]"},
		{"[::ffff:127.0.0.1]:80", "[::ffff:127.0.0.1]"},
		// No authorities: they stay as they are and match no rule's host.
		{"::1", "::1"},
		{"a:b:80", "a:b:80"},
		{"example.com:http", "example.com:http"},
		{"example.com:80.", "example.com:80"},
		{"user@example.com:80", "user@example.com"},
		{"example.com..", "example.com."},
		{"É.example", "É.example"},
	} {
		if got, _ := cleanHost(nil, c.host); got != c.want {
			t.Errorf("cleanHost(%q) = %q, want %q", c.host, got, c.want)
		}
	}
}

func FuzzCleanHost(f *testing.F) {
	for _, s := range []string{"Example.com:80", "[::1]:80", "a.:1", "::1", "a:b:1", "[", "]:1", ":80"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, host string) {
		got, _ := cleanHost(nil, host)
		if upper := strings.ContainsAny(got, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"); upper || len(got) > len(host) {
			t.Errorf("cleanHost(%q) = %q", host, got)
		}
		// Whatever net takes for an authority with a port is cleaned to its host.
		name, port, err := net.SplitHostPort(host)
		if err != nil || strings.Trim(port, "0123456789") != "" || strings.ContainsAny(name, "[]") {
			return
		}
		want := strings.TrimSuffix(name, ".")
		if strings.HasPrefix(host, "[") {
			want = "[" + name + "]"
		}
		if !strings.EqualFold(got, want) {
			t.Errorf("cleanHost(%q) = %q, want %q", host, got, want)
		}
	})
}

func TestQueryValue(t *testing.T) {
	for _, c := range []struct {
		query, name, want string
		n                 int
		ok                bool
	}{
		{"", "a", "", 0, true},
		{"&&", "a", "", 0, true},
		{"b=1", "a", "", 0, true},
		{"a=1", "a", "1", 1, true},
		{"b=1&a=2&c=3", "a", "2", 1, true},
		{"a=1=2", "a", "1=2", 1, true},
		{"a=1?a=2", "a", "1?a=2", 1, true},
		{"a", "a", "", 1, true},
		{"a=", "a", "", 1, true},
		{"A=1&aa=1&ab=1", "a", "", 0, true},
		{"a=1&a=1", "a", "1", 2, true},
		{"a=1&b=2&a=3&a=4", "a", "1", 2, true},
		{"a=&a=x", "a", "", 2, true},
		{"a=x%20y+z%2B%26", "a", "x y z+&", 1, true},
		{"a=%C3%A9", "a", "é", 1, true},
		{"api%5Fkey=s", "api_key", "s", 1, true},
		{"%61%70%69%5f%6b%65%79=s", "api_key", "s", 1, true},
		{"api_key=s&api%5Fkey=s", "api_key", "s", 2, true},
		{"api%5fkey=s&api_key=t", "api_key", "s", 2, true},
		{"a+b=1", "a b", "1", 1, true},
		{"a%20b=1", "a b", "1", 1, true},
		{"a+b=1", "a+b", "", 0, true},
		{"a%2Bb=1", "a+b", "1", 1, true},
		{"a=%", "a", "", 1, false},
		{"a=%4", "a", "", 1, false},
		{"a=%zz&b=1", "a", "", 1, false},
		{"%zz=1&a%=1&a=2", "a", "2", 1, true},
		{"b=%zz&a=2", "a", "2", 1, true},
		{"a=1;b=2", "a", "", 1, false},
		{"b=2;a=1", "a", "", 0, true},
		{"a=1%3Bb=2", "a", "1;b=2", 1, true},
	} {
		value, n, ok := queryValue(c.query, c.name)
		if value != c.want || n != c.n || ok != c.ok {
			t.Errorf("queryValue(%q, %q) = %q, %d, %t, want %q, %d, %t", c.query, c.name, value, n, ok, c.want, c.n, c.ok)
		}
	}
}

func FuzzQueryValue(f *testing.F) {
	for _, q := range []string{"a=1&b=2", "a=1&a=2", "api%5Fkey=x", "a=%zz", "a;b=1", "a=1;b", "a+b=c+d", "&=&a"} {
		f.Add(q, "a")
		f.Add(q, "api_key")
	}
	f.Fuzz(func(t *testing.T, query, name string) {
		if name == "" {
			t.Skip("no parameter has no name")
		}
		// net/url reads pair by pair; of one that it cannot read it says nothing but that.
		value, n, ok := "", 0, true
		for pair := range strings.SplitSeq(query, "&") {
			key, _, _ := strings.Cut(pair, "=")
			if key, err := url.QueryUnescape(key); err != nil || key != name {
				continue
			}
			if n++; n > 1 {
				break
			}
			read, err := url.ParseQuery(pair)
			if value, ok = read.Get(name), err == nil; !ok {
				break
			}
		}
		gotValue, gotN, gotOK := queryValue(query, name)
		if gotValue != value || gotN != n || gotOK != ok {
			t.Errorf("queryValue(%q, %q) = %q, %d, %t, want %q, %d, %t", query, name, gotValue, gotN, gotOK, value, n, ok)
		}
	})
}

// wantNoAllocs fails if f allocates.
func wantNoAllocs(t *testing.T, f func()) {
	t.Helper()
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	if n := testing.AllocsPerRun(1000, f); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

func TestJudgingAllocatesNothing(t *testing.T) {
	scratch := make([]byte, 0, 128)
	for _, target := range []string{
		"/", "/instances/0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f/agents/?api_key=x", "/caf%C3%A9/a%20b?x", "/a/%2e%2e/b", "/%zz",
	} {
		t.Run(target, func(t *testing.T) {
			wantNoAllocs(t, func() { _, _, _, _ = judgePath(scratch, target) })
		})
	}
	for _, host := range []string{"example.com", "Example.COM.:8080", "[::1]:80"} {
		t.Run(host, func(t *testing.T) {
			wantNoAllocs(t, func() { _, _ = cleanHost(scratch, host) })
		})
	}
	t.Run("query", func(t *testing.T) {
		wantNoAllocs(t, func() { _, _, _ = queryValue("b=%20&c=+&agent=sales&d", "agent") })
	})
}

func BenchmarkJudgePath(b *testing.B) {
	scratch := make([]byte, 0, 128)
	for _, c := range []struct{ name, target string }{
		{"plain", "/instances/0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f/agents/sales/completions?api-version=1"},
		{"escaped", "/instances/0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f/agents/caf%C3%A9%20noir/completions?api-version=1"},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, _, _, _ = judgePath(scratch, c.target)
			}
		})
	}
}
