package manage

import (
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestEveryCodeIsDocumented compares the constants and the table, of which the page for users is made.
func TestEveryCodeIsDocumented(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "errors.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var constants []string
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(spec.Names[0].Name, "Code") || len(spec.Values) != 1 {
			return true
		}
		if value, ok := spec.Values[0].(*ast.BasicLit); ok {
			code, err := strconv.Unquote(value.Value)
			if err != nil {
				t.Fatal(err)
			}
			constants = append(constants, code)
		}
		return true
	})
	var listed []string
	for i, c := range Codes {
		listed = append(listed, c.Code)
		if i > 0 && c.Status < Codes[i-1].Status {
			t.Errorf("%s is not in the order of the statuses", c.Code)
		}
		if http.StatusText(c.Status) == "" || c.Meaning == "" {
			t.Errorf("%s says too little", c.Code)
		}
	}
	slices.Sort(constants)
	slices.Sort(listed)
	if diff := cmp.Diff(constants, listed); diff != "" {
		t.Errorf("constants and table differ (-constants +table)\n%s", diff)
	}
	if len(slices.Compact(listed)) != len(Codes) {
		t.Error("a code is there twice")
	}
}

// What is answered is what the table says, wherever an answer is made.
func TestStatusesAreThoseOfTheTable(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "errors.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	statusOfCode := map[string]string{} // by name of the constant
	ast.Inspect(file, func(n ast.Node) bool {
		if lit, ok := n.(*ast.CompositeLit); ok && len(lit.Elts) == 3 {
			if code, ok := lit.Elts[0].(*ast.Ident); ok {
				if status, ok := lit.Elts[1].(*ast.SelectorExpr); ok {
					statusOfCode[code.Name] = status.Sel.Name
				}
			}
		}
		return true
	})
	calls := 0
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if fn, ok := call.Fun.(*ast.Ident); !ok || fn.Name != "fail" || len(call.Args) != 3 {
				return true
			}
			calls++
			status, ok1 := call.Args[0].(*ast.SelectorExpr)
			code, ok2 := call.Args[1].(*ast.Ident)
			if !ok1 || !ok2 || statusOfCode[code.Name] != status.Sel.Name {
				t.Errorf("%s: a call of fail has another status than the table", name)
			}
			return true
		})
	}
	if calls < len(Codes) || len(statusOfCode) != len(Codes) {
		t.Errorf("%d calls and %d codes were found", calls, len(statusOfCode))
	}
}
