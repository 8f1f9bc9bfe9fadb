package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A listed package is what go list says of one, and what is read out of its files.
type listed struct {
	ImportPath string
	Standard   bool
	Imports    []string
	Deps       []string
	Dir        string
	GoFiles    []string

	readsEnvironment bool
}

const module = "keyward/"

// layers are the floors of the house, the lowest first. What is not named here and not cmd is an
// adapter, above all of them and below cmd.
var layers = []string{"authz/apikey", "limits", "authz", "authz/admin", "envoy/wire"}

func layer(path string) int {
	if i := slices.Index(layers, path); i >= 0 {
		return i
	}
	if strings.HasPrefix(path, "cmd/") {
		return len(layers) + 1
	}
	return len(layers)
}

// helps reports whether a package is there to test another, which it lies in.
func helps(importer, tested string) bool {
	return strings.HasSuffix(importer, "test") && strings.HasPrefix(importer, tested+"/")
}

// A ban says which package must not import what, and why. Paths of our own are without the module's name.
type ban struct {
	applies func(importer, imported string) bool
	why     string
}

func ours(path string) (string, bool) {
	if path+"/" == module {
		return "", true
	}
	return strings.CutPrefix(path, module)
}

// isStandard: the first element of any other import path is a domain.
func isStandard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	_, own := ours(path)
	return !own && !strings.Contains(first, ".")
}

var bans = []ban{
	{
		func(importer, imported string) bool {
			to, own := ours(imported)
			return own && layer(importer) == len(layers) && layer(to) == len(layers) && !helps(importer, to)
		},
		"adapters do not import each other: only cmd sees them all, so that each can be replaced alone",
	},
	{
		func(importer, imported string) bool {
			to, own := ours(imported)
			return own && layer(importer) < len(layers) && layer(importer) <= layer(to) || own && layer(to) > len(layers)
		},
		"imports point one way, cmd → adapters → authz/admin → authz → limits → authz/apikey: what decides must not know who asks, or where keys are kept",
	},
	{
		func(importer, imported string) bool {
			_, own := ours(imported)
			return !own && !isStandard(imported) && slices.Contains([]string{"authz/apikey", "limits", "authz"}, importer)
		},
		"the nouns and the rules stand on the standard library alone: nothing that can be attacked or change its mind is in a decision",
	},
	{
		func(importer, imported string) bool {
			return strings.HasPrefix(imported, "github.com/envoyproxy/go-control-plane") && !strings.HasPrefix(importer, "envoy/")
		},
		"only envoy/* faces Envoy: a change of its API must not reach the rest",
	},
	{
		func(importer, imported string) bool {
			return imported == "testing" && !strings.HasSuffix(importer, "test")
		},
		"package testing belongs into tests and into the packages that help them, whose names end in test",
	},
}

// topLevel are the only folders with code.
var topLevel = []string{"cmd", "authz", "cache", "limits", "envoy"}

// environmentReaders may read the environment.
var environmentReaders = map[string]string{
	"cmd/keyward":             "the program's configuration and its client's come from there, and from there only",
	"envoy/envoytest":         "ENVOY_BIN and CI concern tests and keyward dev, never serve",
	"authz/portal/portaltest": "CI says that a missing Chromium is no reason to skip",
}

// notLinked must not be in the program.
var notLinked = map[string]string{
	"testing":           "it registers flags and belongs into tests: envoytest has an interface of its own instead",
	"net/http/httptest": "it belongs into tests",
	"C":                 "the program is built without cgo, so that it runs on any Linux",
}

// violations says what the packages do that DESIGN §6 forbids.
func violations(packages []listed) []string {
	var found []string
	say := func(parts ...string) { found = append(found, strings.Join(parts, " ")) }
	for _, p := range packages {
		path, own := ours(p.ImportPath)
		if !own {
			continue
		}
		if first, _, _ := strings.Cut(path, "/"); !slices.Contains(topLevel, first) {
			say(p.ImportPath, "lies outside", strings.Join(topLevel, ", ")+":", "code has no other top-level folder")
		}
		for _, imported := range p.Imports {
			for _, b := range bans {
				if b.applies(path, imported) {
					say(path, "imports", strings.TrimPrefix(imported, module)+":", b.why)
				}
			}
		}
		if p.readsEnvironment && environmentReaders[path] == "" {
			say(path, "reads the environment:", "only cmd does, so that all configuration is in one place")
		}
		if strings.HasPrefix(path, "cmd/") {
			for _, dep := range p.Deps {
				if why := notLinked[dep]; why != "" {
					say(path, "links", dep+":", why)
				}
			}
		}
	}
	return found
}

// readsEnvironment reports whether a file calls what reads environment variables.
func readsEnvironment(file *ast.File) bool {
	found := false
	ast.Inspect(file, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			if x, ok := s.X.(*ast.Ident); ok && (x.Name == "os" || x.Name == "syscall") {
				found = found || slices.Contains([]string{"Getenv", "LookupEnv", "Environ", "ExpandEnv"}, s.Sel.Name)
			}
		}
		return true
	})
	return found
}

func listPackages(t *testing.T) []listed {
	t.Helper()
	list := exec.Command("go", "list", "-deps", "-json=ImportPath,Standard,Imports,Deps,Dir,GoFiles", "./...")
	list.Dir = filepath.Join("..", "..")
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		if _, own := ours(p.ImportPath); own {
			for _, name := range p.GoFiles {
				file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.SkipObjectResolution)
				if err != nil {
					t.Fatal(err)
				}
				p.readsEnvironment = p.readsEnvironment || readsEnvironment(file)
			}
		}
		all = append(all, p)
	}
}

// TestArchitecture holds DESIGN §6. Its cached pass can be stale: run it with -count=1.
func TestArchitecture(t *testing.T) {
	t.Parallel()
	all := listPackages(t)
	for _, v := range violations(all) {
		t.Error(v)
	}
	// What is looked for is there to be found.
	byPath := map[string]listed{}
	for _, p := range all {
		byPath[p.ImportPath] = p
		if p.Standard != isStandard(p.ImportPath) {
			t.Errorf("%s: standard library: got %t", p.ImportPath, !p.Standard)
		}
	}
	for _, name := range layers {
		if _, ok := byPath[module+name]; !ok {
			t.Errorf("there is no package %s", name)
		}
	}
	for name := range environmentReaders {
		if !byPath[module+name].readsEnvironment {
			t.Errorf("%s does not read the environment any more: take it out of the list", name)
		}
	}
	if len(byPath["keyward/cmd/keyward"].Deps) < 100 {
		t.Error("what the program links is not known")
	}
}

func TestArchitectureIsChecked(t *testing.T) {
	for name, test := range map[string]struct {
		packages []listed
		want     []string // of each violation the beginning, up to its colon
	}{
		"as it should be": {packages: []listed{
			{ImportPath: "keyward/authz/apikey", Imports: []string{"time", "crypto/hmac"}},
			{ImportPath: "keyward/limits", Imports: []string{"time", "keyward/authz/apikey"}},
			{ImportPath: "keyward/authz", Imports: []string{"keyward/limits", "keyward/authz/apikey", "net/http"}},
			{ImportPath: "keyward/authz/admin", Imports: []string{"keyward/authz", "github.com/google/uuid"}},
			{ImportPath: "keyward/authz/store/sqlite", Imports: []string{"keyward/authz/admin", "modernc.org/sqlite"}},
			{ImportPath: "keyward/authz/store/storetest", Imports: []string{"testing", "keyward/authz/admin"}},
			{ImportPath: "keyward/cache", Imports: []string{"keyward/limits"}},
			{ImportPath: "keyward/envoy/check", Imports: []string{"keyward/authz", "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"}},
			{ImportPath: "keyward/envoy/envoytest", readsEnvironment: true},
			{ImportPath: "keyward/cmd/keyward", Imports: []string{"keyward/envoy/check", "keyward/cache"}, Deps: []string{"os", "C/fake"}, readsEnvironment: true},
			{ImportPath: "github.com/somebody/else", Imports: []string{"testing"}, readsEnvironment: true},
		}},
		"the nouns know a rule":       {[]listed{{ImportPath: "keyward/authz/apikey", Imports: []string{"keyward/limits"}}}, []string{"authz/apikey imports limits"}},
		"the nouns need a library":    {[]listed{{ImportPath: "keyward/authz/apikey", Imports: []string{"github.com/google/uuid"}}}, []string{"authz/apikey imports github.com/google/uuid"}},
		"the rules need a library":    {[]listed{{ImportPath: "keyward/limits", Imports: []string{"golang.org/x/time/rate"}}}, []string{"limits imports golang.org/x/time/rate"}},
		"a rule knows a decision":     {[]listed{{ImportPath: "keyward/limits", Imports: []string{"keyward/authz"}}}, []string{"limits imports authz"}},
		"a decision knows a store":    {[]listed{{ImportPath: "keyward/authz", Imports: []string{"keyward/authz/store/sqlite"}}}, []string{"authz imports authz/store/sqlite"}},
		"a decision knows the cache":  {[]listed{{ImportPath: "keyward/authz", Imports: []string{"keyward/cache"}}}, []string{"authz imports cache"}},
		"a decision knows admin":      {[]listed{{ImportPath: "keyward/authz", Imports: []string{"keyward/authz/admin"}}}, []string{"authz imports authz/admin"}},
		"admin knows HTTP's side":     {[]listed{{ImportPath: "keyward/authz/admin", Imports: []string{"keyward/authz/manage"}}}, []string{"authz/admin imports authz/manage"}},
		"cache knows the store":       {[]listed{{ImportPath: "keyward/cache", Imports: []string{"keyward/authz/store/sqlite"}}}, []string{"cache imports authz/store/sqlite"}},
		"two sides of Envoy":          {[]listed{{ImportPath: "keyward/envoy/check", Imports: []string{"keyward/envoy/generate"}}}, []string{"envoy/check imports envoy/generate"}},
		"local limits know the cache": {[]listed{{ImportPath: "keyward/limits/local", Imports: []string{"keyward/cache"}}}, []string{"limits/local imports cache"}},
		"somebody knows cmd":          {[]listed{{ImportPath: "keyward/envoy/e2e", Imports: []string{"keyward/cmd/keyward"}}}, []string{"envoy/e2e imports cmd/keyward"}},
		"cmd speaks Envoy's API": {
			[]listed{{ImportPath: "keyward/cmd/keyward", Imports: []string{"github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"}}},
			[]string{"cmd/keyward imports github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"},
		},
		"a store in the tests' clothes": {[]listed{{ImportPath: "keyward/authz/store/sqlite", Imports: []string{"testing"}}}, []string{"authz/store/sqlite imports testing"}},
		"a folder of odds and ends":     {[]listed{{ImportPath: "keyward/internal/util"}}, []string{"keyward/internal/util lies outside cmd, authz, cache, limits, envoy"}},
		"a new folder at the top":       {[]listed{{ImportPath: "keyward/keys"}}, []string{"keyward/keys lies outside cmd, authz, cache, limits, envoy"}},
		"code at the top":               {[]listed{{ImportPath: "keyward"}}, []string{"keyward lies outside cmd, authz, cache, limits, envoy"}},
		"a hidden setting":              {[]listed{{ImportPath: "keyward/cache", readsEnvironment: true}}, []string{"cache reads the environment"}},
		"tests in the program":          {[]listed{{ImportPath: "keyward/cmd/keyward", Deps: []string{"testing"}}}, []string{"cmd/keyward links testing"}},
		"all at once": {
			[]listed{{ImportPath: "keyward/limits", Imports: []string{"keyward/cache", "testing"}, readsEnvironment: true}},
			[]string{"limits imports cache", "limits imports testing", "limits reads the environment"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, v := range violations(test.packages) {
				what, why, ok := strings.Cut(v, ": ")
				if !ok || why == "" {
					t.Errorf("%q says no why", v)
				}
				got = append(got, what)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestEnvironmentReadersAreFound(t *testing.T) {
	for source, want := range map[string]bool{
		`os.Getenv("X")`:                   true,
		`_, _ = os.LookupEnv("X")`:         true,
		`f := os.Environ; f()`:             true,
		`os.ExpandEnv("$X")`:               true,
		`syscall.Getenv("X")`:              true,
		`os.Getpid()`:                      false,
		`var os settings; os.Get("X")`:     false,
		`println("os.Getenv in a string")`: false,
	} {
		file, err := parser.ParseFile(token.NewFileSet(), "x.go", "package x\nfunc f() {"+source+"}", 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := readsEnvironment(file); got != want {
			t.Errorf("%s: got %t", source, got)
		}
	}
}
