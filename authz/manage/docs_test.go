package manage

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"keyward/authz/apikey"
)

// A tag is an element of a page as it begins.
type tag struct {
	name string
	attr map[string]string
}

// tagsOf reads a page; ours is XML but for its doctype and tags that HTML never closes.
func tagsOf(t *testing.T, page string) (tags []tag) {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(page))
	d.Strict, d.AutoClose, d.Entity = false, xml.HTMLAutoClose, xml.HTMLEntity
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return tags
		}
		if err != nil {
			t.Fatal(err)
		}
		if start, ok := token.(xml.StartElement); ok {
			one := tag{start.Name.Local, map[string]string{}}
			for _, a := range start.Attr {
				one.attr[a.Name.Local] = a.Value
			}
			tags = append(tags, one)
		}
	}
}

// TestDocsPageLoadsNothing: no element that fetches, no script, no address elsewhere, and a policy by which
// a browser would not follow one.
func TestDocsPageLoadsNothing(t *testing.T) {
	d := open(t)
	w := d.send(apikey.Secret{}, http.MethodGet, docsPath, "")
	if w.Code != 200 || w.Header().Get("Content-Type") != "text/html; charset=utf-8" {
		t.Fatalf("got %d, %v", w.Code, w.Header())
	}
	policy := w.Header().Get("Content-Security-Policy")
	if !strings.HasPrefix(policy, "default-src 'none'; style-src 'sha256-") || strings.Count(policy, "-src") != 2 || strings.Contains(policy, "unsafe") {
		t.Errorf("policy %q", policy)
	}
	page := w.Body.String()
	// What a browser hashes is what stands between the tags, to the byte.
	if style := regexp.MustCompile(`(?s)<style>(.*)</style>`).FindStringSubmatch(page); style == nil || style[1] != docsStyle {
		t.Error("the style is not the one that the policy allows")
	}
	allowed := strings.Fields("html head meta title style body header h1 h2 h3 p a nav ul li main section div table thead tbody tr th td code")
	ids := map[string]bool{}
	var links []string
	for _, tag := range tagsOf(t, page) {
		if !slices.Contains(allowed, tag.name) {
			t.Errorf("there is a <%s>", tag.name)
		}
		for name, value := range tag.attr {
			switch {
			case name == "id" && ids[value]:
				t.Errorf("the id %s is there twice", value)
			case name == "id":
				ids[value] = true
			case name == "href" && tag.name == "a":
				links = append(links, value)
			case !slices.Contains(strings.Fields("lang charset name content aria-label class scope"), name):
				t.Errorf("<%s> has the attribute %s", tag.name, name)
			}
		}
	}
	for _, link := range links {
		if id, here := strings.CutPrefix(link, "#"); here && !ids[id] || !here && link != documentPath {
			t.Errorf("a link to %s, which is not there", link)
		}
	}
	if elsewhere := regexp.MustCompile(`(?i)https?://|url\(|@import|src=|javascript:`).FindString(page); elsewhere != "" {
		t.Errorf("the page has %q", elsewhere)
	}
}

// The page says everything that the document does.
func TestDocsPageIsWhole(t *testing.T) {
	d := open(t)
	page := d.send(apikey.Secret{}, http.MethodGet, docsPath, "").Body.String()
	var doc struct {
		Paths      map[string]map[string]struct{ OperationID string }
		Components struct {
			Schemas map[string]struct{ Properties map[string]any }
		}
	}
	if err := json.Unmarshal(d.send(apikey.Secret{}, http.MethodGet, documentPath, "").Body.Bytes(), &doc); err != nil {
		t.Fatal(err)
	}
	var want []string
	for path, item := range doc.Paths {
		for method, op := range item {
			want = append(want, `<section id="`+op.OperationID+`">`+"\n<h3>"+strings.ToUpper(method)+" "+path+"</h3>")
		}
	}
	for name, schema := range doc.Components.Schemas {
		want = append(want, `<section id="schema-`+name+`">`)
		for member := range schema.Properties {
			want = append(want, "<code>"+member+"</code>")
		}
	}
	for _, code := range Codes {
		want = append(want, "<code>"+code.Code+"</code>")
	}
	for _, twice := range regexp.MustCompile(`<td>([A-Z][^<.]{10,}\.[^<]*?) ([A-Z][^<]*)`).FindAllStringSubmatch(page, -1) {
		if strings.HasPrefix(twice[2], twice[1]) {
			t.Errorf("the page says twice %q", twice[1])
		}
	}
	if len(want) < 100 {
		t.Fatalf("only %d things to look for", len(want))
	}
	for _, text := range want {
		if !strings.Contains(page, text) {
			t.Errorf("the page lacks %s", text)
		}
	}
}
