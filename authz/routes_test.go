package authz

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"keyward/authz/apikey"
)

// rulesOf makes rules of patterns as ServeMux writes them.
func rulesOf(patterns ...string) []Rule {
	rules := make([]Rule, len(patterns))
	for i, p := range patterns {
		before, path, _ := strings.Cut(p, "/")
		method, host, found := strings.Cut(before, " ")
		if !found {
			method, host = "", before
		}
		rules[i] = Rule{Method: method, Host: host, Path: "/" + path}
	}
	return rules
}

func newRoutes(tb testing.TB, ignoreCase bool, patterns ...string) *Routes {
	tb.Helper()
	r, err := NewRoutes(rulesOf(patterns...), ignoreCase)
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// found is what a look-up came to, as tests write it: the rule's pattern and the values of its
// wildcards, "" for no rule.
func found(r *Routes, method, host, path string) string {
	var m match
	rule := r.match(&m, method, host, path)
	if rule == nil {
		return ""
	}
	s := rule.String()
	for i, name := range m.names {
		s += fmt.Sprintf(" %s=%s", name, m.values[i])
	}
	return s
}

func TestMostSpecificRuleIsFound(t *testing.T) {
	r := newRoutes(t, false,
		"/",
		"/{$}",
		"/a",
		"GET /a",
		"/a/{id}",
		"GET /a/{id}",
		"HEAD /a/{id}",
		"/a/b/z",
		"/a/{x}/c",
		"/a/{x}/c/{rest...}",
		"/files/",
		"/Files/{name...}",
		"/caf\u00e9/a b",
		"example.com/",
		"POST example.com/a",
		"[::1]/a",
	)
	for _, c := range []struct{ method, host, path, want string }{
		{"GET", "x", "/", "/{$}"},
		{"GET", "x", "/unknown/path", "/"},
		{"GET", "x", "/a", "GET /a"},
		{"HEAD", "x", "/a", "GET /a"},
		{"POST", "x", "/a", "/a"},
		{"get", "x", "/a", "/a"}, // methods are exact
		{"GET", "x", "/A", "/"},
		{"GET", "x", "/a/1", "GET /a/{id} id=1"},
		{"HEAD", "x", "/a/1", "HEAD /a/{id} id=1"},
		{"PUT", "x", "/a/1", "/a/{id} id=1"},
		{"GET", "x", "/a/b/z", "/a/b/z"},
		{"GET", "x", "/a/b/c", "/a/{x}/c x=b"}, // after trying /a/b/z
		{"GET", "x", "/a/b/y", "/"},
		{"GET", "x", "/a/b/c/d/e", "/a/{x}/c/{rest...} x=b rest=d/e"},
		{"GET", "x", "/files", "/files/"},
		{"GET", "x", "/files/a", "/files/"},
		{"GET", "x", "/files/a/b", "/files/"},
		{"GET", "x", "/filesystem", "/"},
		{"GET", "x", "/Files", "/Files/{name...} name="},
		{"GET", "x", "/Files/a/b", "/Files/{name...} name=a/b"},
		{"GET", "x", "/café/a b", "/café/a b"},
		{"GET", "x", "/a/{id}", "GET /a/{id} id={id}"},
		{"GET", "x", "/a/é/%", "/"},
		{"GET", "example.com", "/a", "example.com/"}, // a host goes before everything
		{"POST", "Example.COM.:8443", "/a", "POST example.com/a"},
		{"GET", "sub.example.com", "/a", "GET /a"},
		{"POST", "[::1]:80", "/a", "[::1]/a"},
		{"POST", "", "/a", "/a"},
		{"CONNECT", "example.com:443", "", ""},
		{"OPTIONS", "example.com", "*", ""},
	} {
		if got := found(r, c.method, c.host, c.path); got != c.want {
			t.Errorf("%s %s%s: got %q, want %q", c.method, c.host, c.path, got, c.want)
		}
	}
}

func TestNoRule(t *testing.T) {
	r := newRoutes(t, false, "GET h/a/{x}", "/b/{x}/c")
	for _, path := range []string{"/", "/a", "/a/1/2", "/b", "/b/c", "/b/1/d", "/b/1/c/2"} {
		if got := found(r, "GET", "h", path); got != "" {
			t.Errorf("%s: got %q, want no rule", path, got)
		}
	}
	if got := found(r, "POST", "h", "/a/1"); got != "" {
		t.Errorf("other method: got %q, want no rule", got)
	}
	if got := found(r, "GET", "i", "/a/1"); got != "" {
		t.Errorf("other host: got %q, want no rule", got)
	}
	if got := found(newRoutes(t, false), "GET", "h", "/"); got != "" {
		t.Errorf("no rules: got %q, want no rule", got)
	}
}

// What an earlier request left in a match is not seen by the next one.
func TestMatchIsUsedAgain(t *testing.T) {
	r := newRoutes(t, false, "/a/{x}/{y}", "/b")
	var m match
	for _, path := range []string{"/b", "/c", "/", "*", ""} {
		r.match(&m, "GET", "", "/a/1/2")
		if v, ok := m.value("y"); v != "2" || !ok {
			t.Fatalf("y = %q, %t, want 2", v, ok)
		}
		r.match(&m, "GET", "", path)
		if v, ok := m.value("y"); ok {
			t.Errorf("%s: y = %q, want none", path, v)
		}
	}
}

// The trailing slash of a request is gone when rules are looked at, so "/files" has to be a path of the
// rule "/files/", and a wildcard must not take it away.
func TestTrailingSlashDoesNotCount(t *testing.T) {
	for _, c := range []struct {
		patterns   []string
		path, want string
	}{
		{[]string{"/files/", "/{page}"}, "/files", "/files/"},
		{[]string{"/files/", "/{page}"}, "/other", "/{page} page=other"},
		{[]string{"/files/", "/files"}, "/files", "/files"},
		{[]string{"/files/", "/files/{$}"}, "/files", "/files/{$}"},
		{[]string{"/files/", "/files/{$}"}, "/files/a", "/files/"},
		{[]string{"/{dir}/", "/files"}, "/files", "/files"},
		{[]string{"/{dir}/{$}"}, "/files", "/{dir}/{$} dir=files"},
		{[]string{"/files/{rest...}", "/"}, "/files", "/files/{rest...} rest="},
		{[]string{"/{rest...}"}, "/", "/{rest...} rest="},
		{[]string{"GET /files/", "/files"}, "/files", "GET /files/"},
		{[]string{"GET /files/", "/files"}, "/files/a", "GET /files/"},
	} {
		if got := found(newRoutes(t, false, c.patterns...), "GET", "", c.path); got != c.want {
			t.Errorf("%q, %s: got %q, want %q", c.patterns, c.path, got, c.want)
		}
	}
}

func TestIgnoreCase(t *testing.T) {
	r := newRoutes(t, true, "/Admin/{Name}/Keys", "GET /Caf\u00c9", "/{Rest...}")
	for _, c := range []struct{ path, want string }{
		{"/admin/Bob/keys", "/Admin/{Name}/Keys Name=Bob"},
		{"/ADMIN/BOB/KEYS", "/Admin/{Name}/Keys Name=BOB"},
		{"/aDMIN/é/kEYS", "/Admin/{Name}/Keys Name=é"},
		{"/cafÉ", "GET /CafÉ"},
		{"/café", "/{Rest...} Rest=café"}, // ASCII letters only
		{"/" + strings.Repeat("A", 1000), "/{Rest...} Rest=" + strings.Repeat("A", 1000)},
	} {
		if got := found(r, "GET", "", c.path); got != c.want {
			t.Errorf("%s: got %q, want %q", c.path, got, c.want)
		}
	}
	if got := found(newRoutes(t, false, "/Admin"), "GET", "", "/admin"); got != "" {
		t.Errorf("case counts: got %q, want no rule", got)
	}
	long := "/" + strings.Repeat("Long", 100)
	if got := found(newRoutes(t, true, long), "GET", "", strings.ToUpper(long)); got != long {
		t.Errorf("long literal: got %q, want %q", got, long)
	}
}

func TestRuleThatCannotBeMeantIsRefused(t *testing.T) {
	source := func(s string) []Source {
		source, err := ParseSource(s)
		if err != nil {
			t.Fatal(err)
		}
		return []Source{source}
	}
	for _, c := range []struct {
		name string
		rule Rule
		want string
	}{
		{"no path", Rule{}, `path "" does not begin with a slash`},
		{"relative", Rule{Path: "a/b"}, `path "a/b" does not begin with a slash`},
		{"escape", Rule{Path: "/caf%C3%A9"}, "the path has an escape"},
		{"query", Rule{Path: "/a?b=c"}, "a query is no part of it"},
		{"fragment", Rule{Path: "/a#b"}, "a query is no part of it"},
		{"double slash", Rule{Path: "/a//b"}, "no request can match"},
		{"two slashes", Rule{Path: "//"}, "no request can match"},
		{"dot segment", Rule{Path: "/a/../b"}, "no request can match"},
		{"dot at the end", Rule{Path: "/a/."}, "no request can match"},
		{"backslash", Rule{Path: `/a\b`}, "no request can match"},
		{"parameters", Rule{Path: "/a;b"}, "no request can match"},
		{"control", Rule{Path: "/a\nb"}, "no request can match"},
		{"overlong", Rule{Path: "/\xc0\xae"}, "no request can match"},
		{"open wildcard", Rule{Path: "/a/{x"}, "bad wildcard segment"},
		{"part of a segment", Rule{Path: "/a/x{y}"}, "bad wildcard segment"},
		{"wildcard without name", Rule{Path: "/{}"}, "empty wildcard"},
		{"bad name", Rule{Path: "/{a-b}"}, `bad wildcard name "a-b"`},
		{"name twice", Rule{Path: "/{a}/{a}"}, "duplicate wildcard name"},
		{"rest not last", Rule{Path: "/{a...}/b"}, "not at end"},
		{"end not last", Rule{Path: "/{$}/b"}, "{$} not at end"},
		{"rest and slash", Rule{Path: "/{a...}/"}, "not at end"},
		{"17 wildcards", Rule{Path: wildcards(17)}, "17 wildcards, at most 16"},
		{"lower-case method", Rule{Method: "get", Path: "/"}, `method "get"`},
		{"any method", Rule{Method: "*", Path: "/"}, `method "*"`},
		{"two methods", Rule{Method: "GET POST", Path: "/"}, `method "GET POST"`},
		{"host with port", Rule{Host: "example.com:80", Path: "/"}, `host "example.com:80"`},
		{"host with wildcard", Rule{Host: "*.example.com", Path: "/"}, `host "*.example.com"`},
		{"host with braces", Rule{Host: "{host}", Path: "/"}, `host "{host}"`},
		{"bare IPv6", Rule{Host: "::1", Path: "/"}, `host "::1"`},
		{"bad IPv6", Rule{Host: "[::x]", Path: "/"}, `host "[::x]"`},
		{"IPv4 in brackets", Rule{Host: "[127.0.0.1]", Path: "/"}, `host "[127.0.0.1]"`},
		{"open IPv6", Rule{Host: "[::1", Path: "/"}, `host "[::1"`},
		{"a dot for a host", Rule{Host: ".", Path: "/"}, `host "."`},
		{"no mode", Rule{Path: "/", Mode: 3}, "mode 3 does not exist"},
		{"public with scopes", Rule{Path: "/", Mode: Public, Scopes: apikey.Scopes{"a"}}, "public rule"},
		{"public with instance", Rule{Path: "/{a}", Mode: Public, Instance: source("{a}")}, "public rule"},
		{"public with agent", Rule{Path: "/", Mode: Public, Agent: source("?a")}, "public rule"},
		{"public with environment", Rule{Path: "/", Mode: Public, Environment: source("prod")}, "public rule"},
		{"public with required agent", Rule{Path: "/", Mode: Public, AgentRequired: true}, "public rule"},
		{"no such wildcard", Rule{Path: "/{a}", Instance: source("{b}")}, "instance: the path has no wildcard {b}"},
		{"source twice", Rule{Path: "/{a}", Agent: append(source("{a}"), source("{a}")...)}, "agent: {a} is there twice"},
		{"empty source", Rule{Path: "/", Environment: []Source{{}}}, "environment: an empty source"},
	} {
		t.Run(c.name, func(t *testing.T) {
			// The fault is told with the others, and with its place.
			rules := []Rule{{Path: "/fine"}, c.rule, {Path: "no slash either"}}
			r, err := NewRoutes(rules, false)
			if err == nil || r != nil {
				t.Fatal("accepted")
			}
			place := fmt.Sprintf("routes[1] %q: ", &rules[1])
			if text := err.Error(); !strings.Contains(text, place) || !strings.Contains(text, c.want) || !strings.Contains(text, "routes[2]") {
				t.Errorf("got %q, want %q and %q", text, place, c.want)
			}
			if text := err.Error(); strings.Contains(text, ".go:") {
				t.Errorf("%q names our source code", text)
			}
		})
	}
}

// wildcards is a path of n wildcards.
func wildcards(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "/{w%d}", i)
	}
	return b.String()
}

func TestConflictNamesBothRules(t *testing.T) {
	for _, c := range []struct {
		name       string
		ignoreCase bool
		patterns   []string
		want       string
	}{
		{"same", false, []string{"/x", "GET /a", "GET /a"}, `routes[2] "GET /a" and routes[1] "GET /a": they cover the same requests`},
		{"same but for names", false, []string{"/a/{x}", "/a/{y}"}, `routes[1] "/a/{y}" and routes[0] "/a/{x}": they cover the same`},
		{"same but for end", false, []string{"/a", "/a/{$}"}, `routes[1] "/a/{$}" and routes[0] "/a": they cover the same`},
		{"same below", false, []string{"/a/", "/a/{rest...}"}, `routes[1] "/a/{rest...}" and routes[0] "/a/": they cover the same`},
		{"same but for host's case", false, []string{"H/a", "h./a"}, `routes[1] "h./a" and routes[0] "H/a": they cover the same`},
		{"same but for case", true, []string{"/a/B", "/A/b"}, `routes[1] "/A/b" and routes[0] "/a/B": they cover the same`},
		{"overlap", false, []string{"/x", "/a/{x}", "/{y}/b"}, `routes[2] "/{y}/b" and routes[1] "/a/{x}": neither is more specific; `},
		{"overlap below", false, []string{"/a/{x}/", "/{y}/b/c"}, `routes[1] "/{y}/b/c" and routes[0] "/a/{x}/": neither is more specific; `},
		{"method against path", false, []string{"GET /a/{x}", "/a/b"}, `routes[1] "/a/b" and routes[0] "GET /a/{x}": neither is more specific; `},
		{"overlap at the slash", false, []string{"/{y}/b/", "/a/{x}"}, `routes[0] "/{y}/b/" and routes[1] "/a/{x}": neither is more specific; `},
		{"overlap at the slash, methods", false, []string{"/b/c", "GET /{x}", "/a/"}, `routes[2] "/a/" and routes[1] "GET /{x}": neither is more specific; `},
		{"spaces and accents", false, []string{"/a b/{x}", "/{y}/\u00e9"}, `routes[1] "/{y}/é" and routes[0] "/a b/{x}": neither is more specific; `},
		{"two at once", false, []string{"/a", "/b", "/b", "/a"}, `routes[3] "/a" and routes[0] "/a": `},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := NewRoutes(rulesOf(c.patterns...), c.ignoreCase)
			if err == nil {
				t.Fatal("accepted")
			}
			if text := err.Error(); !strings.Contains(text, c.want) || strings.Contains(text, ".go:") {
				t.Errorf("got %q, want %q", text, c.want)
			}
		})
	}
	for _, fine := range [][]string{
		{"h/a", "i/a", "/a"},
		{"/a/B", "/A/b"},
		{"/a", "/a/", "/a/{x}", "/a/b", "/{x}", "/{x}/", "/"},
		{"GET /a", "HEAD /a", "POST /a", "/a"},
		{"GET h/a/{x}", "/a/b"},
	} {
		if _, err := NewRoutes(rulesOf(fine...), false); err != nil {
			t.Errorf("%q: %v", fine, err)
		}
	}
}

func TestMode(t *testing.T) {
	for _, c := range []struct {
		text string
		want Mode
	}{{"", Required}, {"required", Required}, {"optional", Optional}, {"public", Public}} {
		got, err := ParseMode(c.text)
		if err != nil || got != c.want || c.text != "" && got.String() != c.text {
			t.Errorf("ParseMode(%q) = %v, %v", c.text, got, err)
		}
	}
	for _, bad := range []string{"Public", "none", "publick", " public"} {
		if got, err := ParseMode(bad); err == nil {
			t.Errorf("ParseMode(%q) = %v, want an error", bad, got)
		}
	}
}

func TestSource(t *testing.T) {
	r := newRoutes(t, false, "/i/{id}/{rest...}")
	var m match
	if r.match(&m, "GET", "", "/i/42/a/b") == nil {
		t.Fatal("no rule")
	}
	const query = "agent=sales&empty=&twice=1&twice=1&bad=%zz&flag&x%2Dy=a%20b&AgentName=b&one=1&%6FNE=2"
	for _, c := range []struct {
		source      string
		want        string
		present, ok bool
	}{
		{"prod", "prod", true, true},
		{"0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f", "0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f", true, true},
		{"{id}", "42", true, true},
		{"{rest}", "a/b", true, true},
		{"?agent", "sales", true, true},
		{"?none", "", false, true},
		{"?empty", "", true, true},
		{"?flag", "", true, true},
		{"?twice", "1", true, false},
		{"?bad", "", true, false},
		{"?x-y", "a b", true, true},
		{"?agentName", "", true, false}, // in another case: who reads that without regard to it knows an agent
		{"?one", "", true, false},
	} {
		source, err := ParseSource(c.source)
		if err != nil || source.String() != c.source {
			t.Errorf("ParseSource(%q) = %q, %v", c.source, source, err)
			continue
		}
		value, present, ok := source.value(&Request{match: m}, query)
		if value != c.want || present != c.present || ok != c.ok {
			t.Errorf("%s: got %q, %t, %t, want %q, %t, %t", c.source, value, present, ok, c.want, c.present, c.ok)
		}
	}
	if source, err := ParseSource("{rest...}"); err != nil || source.String() != "{rest}" {
		t.Errorf("ParseSource({rest...}) = %q, %v, want {rest}", source, err)
	}
	for _, bad := range []string{"", "?", "{}", "{...}", "{id", "id}", "a{id}", "{a}{b}", "{?a}", "?{a}", "?a&b", "?a=b", "two words"} {
		if source, err := ParseSource(bad); err == nil {
			t.Errorf("ParseSource(%q) = %q, want an error", bad, source)
		}
	}
}

func TestVeryLongPathIsMatched(t *testing.T) {
	const size = 1 << 20
	full := "/b" + wildcards(maxWildcards) + "/"
	r := newRoutes(t, true, "/a/a/a/a", "/a/{x}/a/b", full, "/a/{x}/")
	long := strings.Repeat("A", size)
	deep := strings.Repeat("/a", size/2)
	for _, c := range []struct{ name, path, want string }{
		{"segment", "/" + long, ""},
		{"value", "/a/" + long, "/a/{x}/ x=" + long},
		{"deep", deep, "/a/{x}/ x=a"},
		{"all wildcards", "/b" + strings.Repeat("/"+long[:9], maxWildcards) + "/z", full + values(long[:9])},
	} {
		if got := found(r, "GET", long, c.path); got != c.want {
			t.Errorf("%s: got %.60q…, want %.60q…", c.name, got, c.want)
		}
	}
}

func values(v string) (s string) {
	for i := range maxWildcards {
		s += fmt.Sprintf(" w%d=%s", i, v)
	}
	return s
}

// An oracle is a ServeMux that knows what ServeMux does not: that a trailing slash does not count.
type oracle struct {
	mux    *http.ServeMux
	found  int // index of the rule, -1 for none
	values []string
}

var (
	anyWildcard   = regexp.MustCompile(`\{\w+\}`)
	namedWildcard = regexp.MustCompile(`\{(\w+)(\.\.\.)?\}`)
)

// newOracle returns nil if ServeMux refuses the rules. literals of their paths are plain ASCII or have
// to be escaped for it.
func newOracle(rules []Rule, ignoreCase bool) (o *oracle) {
	defer func() {
		if recover() != nil {
			o = nil
		}
	}()
	o = &oracle{mux: http.NewServeMux()}
	taken := map[string]bool{}
	handle := func(i int, prefix, path string) {
		taken[prefix+anyWildcard.ReplaceAllString(path, "{}")] = true
		wildcards := namedWildcard.FindAllStringSubmatch(rules[i].Path, -1)
		o.mux.HandleFunc(prefix+path, func(_ http.ResponseWriter, r *http.Request) {
			o.found, o.values = i, nil
			for _, w := range wildcards {
				o.values = append(o.values, r.PathValue(w[1]))
			}
		})
	}
	escaped := strings.NewReplacer(" ", "%20", "é", "%C3%A9")
	prefixes, paths := make([]string, len(rules)), make([]string, len(rules))
	for i, r := range rules {
		prefixes[i] = r.Method + " " + r.Host
		if r.Method == "" {
			prefixes[i] = r.Host
		}
		path := r.Path
		if ignoreCase {
			path = strings.ToLower(path)
		}
		path = escaped.Replace(path)
		if path != "/{$}" {
			path = strings.TrimSuffix(path, "/{$}")
		}
		paths[i] = path
		handle(i, prefixes[i], path)
	}
	for i, path := range paths {
		at := strings.LastIndexByte(path, '/')
		if below := path[at:] == "/" || strings.HasSuffix(path, "...}"); !below || at == 0 {
			continue
		}
		if path = path[:at]; !taken[prefixes[i]+anyWildcard.ReplaceAllString(path, "{}")] {
			handle(i, prefixes[i], path)
		}
	}
	return o
}

func (o *oracle) ask(method, host, path string) {
	o.found, o.values = -1, nil
	o.mux.ServeHTTP(deaf{}, &http.Request{Method: method, Host: host, URL: &url.URL{Path: path}})
}

// deaf hears no answer.
type deaf struct{}

func (deaf) Header() http.Header         { return http.Header{} }
func (deaf) Write(b []byte) (int, error) { return len(b), nil }
func (deaf) WriteHeader(int)             {}

// compareWithServeMux makes a set of rules and requests out of choices and compares who finds what. It
// returns how many answers it compared.
func compareWithServeMux(t *testing.T, choose func(n int) int, requests int) (compared int) {
	t.Helper()
	pick := func(from ...string) string { return from[choose(len(from))] }
	ignoreCase := choose(4) == 0
	var rules []Rule
	var routes *Routes
	var mux *oracle
	for range 1 + choose(9) {
		r := Rule{Method: pick("", "", "GET", "HEAD", "POST"), Host: pick("", "", "", "h", "i")}
		for i := range choose(4) {
			r.Path += "/" + pick("a", "a", "b", "A", "é x", fmt.Sprintf("{w%d}", i), fmt.Sprintf("{v%d}", i))
		}
		r.Path += pick("", "", "/", "/{$}", "/{rest...}")
		if r.Path == "" {
			r.Path = "/"
		}
		more := append(rules[:len(rules):len(rules)], r)
		made, err := NewRoutes(more, ignoreCase)
		asked := newOracle(more, ignoreCase)
		if (err == nil) != (asked != nil) {
			t.Fatalf("%q, ignoreCase %t: error %v, ServeMux accepts: %t", patternsOf(more), ignoreCase, err, asked != nil)
		}
		compared++
		if err == nil {
			rules, routes, mux = more, made, asked
		}
	}
	var m match
	for range requests {
		method, host, path := pick("GET", "HEAD", "POST", "PUT", "CONNECT"), pick("", "h", "i", "j"), ""
		for range choose(6) {
			path += "/" + pick("a", "a", "b", "A", "B", "é x", "{}", "c")
		}
		if path == "" {
			path = "/"
		}
		said := pick(host, host, strings.ToUpper(host), host+":80")
		if ignoreCase {
			mux.ask(method, host, strings.ToLower(path))
		} else {
			mux.ask(method, host, path)
		}
		got, values := -1, []string(nil)
		if rule := routes.match(&m, method, said, path); rule != nil {
			for i := range rules {
				if rule.String() == rules[i].String() {
					got = i
				}
			}
			for i := range m.names {
				v := m.values[i]
				if !strings.Contains(path, v) {
					t.Errorf("%s %s%s: value %q is no part of the path", method, said, path, v)
				}
				if ignoreCase {
					v = strings.ToLower(v)
				}
				values = append(values, v)
			}
		}
		if got != mux.found || !slices.Equal(values, mux.values) {
			t.Fatalf("%q, ignoreCase %t\n%s %s%s: got rule %d with %q, ServeMux rule %d with %q",
				patternsOf(rules), ignoreCase, method, said, path, got, values, mux.found, mux.values)
		}
		compared++
	}
	return compared
}

func patternsOf(rules []Rule) []string {
	patterns := make([]string, len(rules))
	for i := range rules {
		patterns[i] = rules[i].String()
	}
	return patterns
}

func TestMatchChoosesAsServeMux(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 7))
	for compared := 0; compared < 200_000; {
		compared += compareWithServeMux(t, random.IntN, 150)
	}
}

func FuzzMatch(f *testing.F) {
	random := rand.New(rand.NewPCG(11, 13))
	for _, size := range []int{0, 20, 100, 300} {
		choices := make([]byte, size)
		for i := range choices {
			choices[i] = byte(random.Uint32())
		}
		f.Add(choices)
	}
	f.Fuzz(func(t *testing.T, choices []byte) {
		choose := func(n int) int {
			if len(choices) == 0 {
				return 0
			}
			c := int(choices[0]) % n
			choices = choices[1:]
			return c
		}
		compareWithServeMux(t, choose, 20)
	})
}

// FuzzNewRoutes: whatever stands in a configuration, rules are refused or found again.
func FuzzNewRoutes(f *testing.F) {
	for _, s := range []string{"/", "/a/{x}/", "/{x...}", "/{$}", "/caf\u00e9 b", "/a}", "/{x", "//", "/%41", "/\xff"} {
		f.Add("GET", "Example.com", s, "/{y}/b")
		f.Add("", "[::1]", s, "/{z...}")
	}
	f.Fuzz(func(t *testing.T, method, host, path, other string) {
		rules := []Rule{{Method: method, Host: host, Path: path}, {Path: other}}
		r, err := NewRoutes(rules, false)
		if err != nil {
			return
		}
		// A request that spells the pattern itself matches it, wildcards standing for anything.
		if strings.HasSuffix(path, "{$}") {
			return // which is no text for a request to have
		}
		target := (&url.URL{Path: path}).EscapedPath()
		judged, _, _, ok := judgePath(nil, target)
		if !ok {
			t.Fatalf("%q was accepted, and %q refused", path, target)
		}
		if method == "" {
			method = "ANY"
		}
		var m match
		if rule := r.match(&m, method, host, judged); rule == nil {
			t.Errorf("%q does not match %q", judged, &rules[0])
		}
	})
}

func TestMatchAllocatesNothing(t *testing.T) {
	var m match
	for _, ignoreCase := range []bool{false, true} {
		r := newRoutes(t, ignoreCase, manyRules(500)...)
		for _, c := range []struct{ method, host, path string }{
			{"GET", "example.com", "/service7/instances/42/agents/sales/completions"},
			{"HEAD", "EXAMPLE.com:8443", "/SERVICE7/Instances/42/Agents/Sales/Completions"},
			{"POST", "host.example", "/service9/a/b/c/d"},
			{"GET", "example.com", "/nothing"},
			{"GET", "example.com", "/service7/" + strings.Repeat("A", 1000)},
		} {
			wantNoAllocs(t, func() { r.match(&m, c.method, c.host, c.path) })
		}
	}
	sources := []Source{{from: fromPath, name: "agent"}, {from: fromQuery, name: "agent"}, {name: "sales"}}
	r := newRoutes(t, false, manyRules(10)...)
	var request Request
	r.match(&request.match, "GET", "", "/service0/instances/42/agents/sales/completions")
	wantNoAllocs(t, func() {
		for i := range sources {
			if v, present, ok := sources[i].value(&request, "a=b&agent=sales"); v != "sales" || !present || !ok {
				t.Fatalf("%s: got %q, %t, %t", sources[i], v, present, ok)
			}
		}
	})
}

// manyRules returns n patterns, five for each service.
func manyRules(n int) []string {
	patterns := make([]string, 0, n)
	for i := range n / 5 {
		service := fmt.Sprintf("/service%d", i)
		patterns = append(patterns,
			service+"/",
			"GET "+service+"/instances/{instance}",
			"GET "+service+"/instances/{instance}/agents/{agent}/completions",
			"POST "+service+"/instances/{instance}/agents/{agent}/completions",
			"host.example"+service+"/{rest...}",
		)
	}
	return patterns
}

func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{10, 500} {
		for _, ignoreCase := range []bool{false, true} {
			r := newRoutes(b, ignoreCase, manyRules(n)...)
			b.Run(fmt.Sprintf("rules=%d/ignoreCase=%t", n, ignoreCase), func(b *testing.B) {
				var m match
				b.ReportAllocs()
				for b.Loop() {
					if r.match(&m, "POST", "api.example.com", "/service1/instances/0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f/agents/sales/completions") == nil {
						b.Fatal("no rule")
					}
				}
			})
		}
	}
}

func BenchmarkNewRoutes(b *testing.B) {
	rules := rulesOf(manyRules(500)...)
	for b.Loop() {
		if _, err := NewRoutes(rules, false); err != nil {
			b.Fatal(err)
		}
	}
}
