package manage

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/danielgtaylor/huma/v2"
)

// docsPath is a page for people about the API, made of the OpenAPI document: text, one style, no script.
const docsPath = "/docs"

var (
	//go:embed docs.css
	docsStyle string
	//go:embed docs.html
	docsText string

	docsPage = template.Must(template.New("docs").Funcs(template.FuncMap{
		"type": typeOf, "bounds": boundsOf, "schema": jsonSchemaOf, "in": slices.Contains[[]string],
		"marked": func(s string) []string { return strings.Split(s, "`") }, "odd": func(i int) bool { return i%2 == 1 },
	}).Parse(docsText))

	// docsPolicy lets a browser load nothing at all, and apply the one style that the page itself has.
	docsPolicy = func() string {
		sum := sha256.Sum256([]byte(docsStyle))
		return "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
			"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	}()
)

// A docsOperation is one operation where it stands on the page.
type docsOperation struct {
	*huma.Operation
	Method, Path string
}

// serveDocs serves the page, made once.
func (h *handler) serveDocs(api *huma.OpenAPI) {
	var operations []docsOperation
	for _, path := range slices.Sorted(maps.Keys(api.Paths)) {
		item := api.Paths[path]
		for _, op := range []docsOperation{
			{item.Get, http.MethodGet, path}, {item.Post, http.MethodPost, path}, {item.Put, http.MethodPut, path},
			{item.Patch, http.MethodPatch, path}, {item.Delete, http.MethodDelete, path},
		} {
			if op.Operation != nil {
				operations = append(operations, op)
			}
		}
	}
	var page bytes.Buffer
	err := docsPage.Execute(&page, map[string]any{
		"Style": template.CSS(docsStyle), //nolint:gosec // our own file
		"API":   api, "Operations": operations, "Schemas": api.Components.Schemas.Map(), "Codes": Codes,
		"Document": documentPath, "Version": apiVersion,
	})
	if err != nil {
		panic(err) // of our own types
	}
	h.mux.HandleFunc("GET "+docsPath, func(w http.ResponseWriter, _ *http.Request) {
		header := w.Header()
		header.Set("Content-Type", "text/html; charset=utf-8")
		header.Set("Content-Security-Policy", docsPolicy)
		header.Set("Referrer-Policy", "no-referrer")
		_, _ = w.Write(page.Bytes())
	})
}

// A docsType is a type in words: "list of" and a schema of the page to link to, or no such schema.
type docsType struct{ Words, Ref string }

func typeOf(s *huma.Schema) docsType {
	switch name, ok := strings.CutPrefix(s.Ref, "#/components/schemas/"); {
	case ok:
		return docsType{"", name}
	case len(s.AnyOf) == 2 && s.AnyOf[1].Type == "null":
		of := typeOf(s.AnyOf[0])
		return docsType{"null or " + of.Words, of.Ref}
	case s.Nullable && (s.Items != nil || s.Type != ""):
		plain := *s
		plain.Nullable = false
		of := typeOf(&plain)
		return docsType{"null or " + of.Words, of.Ref}
	case s.Items != nil:
		of := typeOf(s.Items)
		return docsType{"list of " + of.Words, of.Ref}
	case len(s.Enum) > 0:
		values := make([]string, len(s.Enum))
		for i, v := range s.Enum {
			values[i] = fmt.Sprint(v)
		}
		return docsType{strings.Join(values, " | "), ""}
	case s.Format != "" && s.Type == huma.TypeString:
		return docsType{s.Type + ", " + s.Format, ""}
	}
	if of, ok := s.AdditionalProperties.(*huma.Schema); ok {
		members := typeOf(of)
		return docsType{"object, each member " + members.Words, members.Ref}
	}
	if s.Type == "" {
		return docsType{"any", ""}
	}
	return docsType{s.Type, ""}
}

// boundsOf says in words what a value may be.
func boundsOf(s *huma.Schema) string {
	var parts []string
	between := func(unit string, least, most *float64) {
		number := func(f *float64) string { return strconv.FormatFloat(*f, 'f', -1, 64) }
		switch {
		case least != nil && most != nil:
			parts = append(parts, number(least)+" to "+number(most)+unit)
		case least != nil:
			parts = append(parts, "from "+number(least)+unit)
		case most != nil:
			parts = append(parts, "at most "+number(most)+unit)
		}
	}
	between("", s.Minimum, s.Maximum)
	between(" characters", float(s.MinLength), float(s.MaxLength))
	between(" entries", float(s.MinItems), float(s.MaxItems))
	if s.Pattern != "" {
		parts = append(parts, "matches "+s.Pattern)
	}
	if s.Default != nil {
		parts = append(parts, fmt.Sprintf("default %v", s.Default))
	}
	return strings.Join(parts, "; ")
}

func float(n *int) *float64 {
	if n == nil {
		return nil
	}
	return new(float64(*n))
}

// jsonSchemaOf is the schema of a JSON body, nil where there is none.
func jsonSchemaOf(content map[string]*huma.MediaType) *huma.Schema {
	if media := content["application/json"]; media != nil {
		return media.Schema
	}
	return nil
}
