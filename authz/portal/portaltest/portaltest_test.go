package portaltest_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"keyward/authz/portal/portaltest"
)

// A recorder is a test of which only is kept what it says.
type recorder struct {
	testing.TB
	cleanups []func()
	said     []string
}

func (r *recorder) Errorf(format string, args ...any) {
	r.said = append(r.said, fmt.Sprintf(format, args...))
}
func (r *recorder) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }
func (r *recorder) end() {
	for _, f := range slices.Backward(r.cleanups) {
		f()
	}
}

func serve(t *testing.T, policy, body string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/" {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Security-Policy", policy)
		_, _ = fmt.Fprintf(w, `<!doctype html><html lang="en"><head><title>A page</title><link rel="icon" href="data:,">
			<meta name="viewport" content="width=device-width"></head><body><main><h1>A page</h1>%s</main></body></html>`, body)
	}))
	t.Cleanup(s.Close)
	return s.URL + "/"
}

// What the harness promises to notice, it notices; and of a good page it says nothing.
func TestFaultsOfAPageAreNoticed(t *testing.T) {
	browser := portaltest.Start(t)
	const open = "default-src * data: 'unsafe-inline'"
	for _, c := range []struct {
		name, policy, body string
		view               portaltest.View
		look               func(*portaltest.Page)
		want               string // in what is said; "": nothing is
	}{
		{name: "good", policy: "default-src 'none'; img-src data:", body: "<p>Nothing is wrong.</p><a href='/'>A link</a>",
			view: portaltest.Narrow, look: func(p *portaltest.Page) { p.Accessible(); p.Fits(); p.Reaches("a") }},
		{name: "inline script", policy: "default-src 'none'; img-src data:", body: "<script>1</script>", want: "Content-Security-Policy"},
		{name: "from elsewhere", policy: open, body: "<img alt='' src='https://elsewhere.example/x.png'>", want: "elsewhere.example"},
		{name: "not found", policy: open, body: "<img alt='' src='/gone.png'>", want: "404"},
		{name: "console", policy: open, body: "<script>console.log('here I am')</script>", want: "here I am"},
		{name: "exception", policy: open, body: "<script>nothing.at.all()</script>", want: "exception"},
		{name: "dialog", policy: open, body: "<script>alert('boo')</script>", want: "boo"},
		{name: "no script", policy: open, body: "<script>alert('boo')</script><noscript>off</noscript>",
			view: portaltest.View{NoScript: true}, look: func(p *portaltest.Page) { p.See("off") }},
		{name: "contrast", policy: open, body: "<p style='color:#ccc;background:#fff'>Hardly to be read</p>",
			look: (*portaltest.Page).Accessible, want: "color-contrast"},
		{name: "wide", policy: open, body: "<p style='width:500px'>Wide</p>", view: portaltest.Narrow, look: (*portaltest.Page).Fits, want: "wider than 320 px"},
		{name: "scrolls by itself", policy: open, body: "<div style='overflow-x:auto' tabindex=0><p style='width:500px'>Wide</p></div>",
			view: portaltest.Narrow, look: (*portaltest.Page).Fits},
		{name: "mouse only", policy: open, body: "<a href='/'>A link</a><span class=x onclick='1'>Press</span>",
			look: func(p *portaltest.Page) { p.Reaches(".x") }, want: "does not get to .x"},
		{name: "no focus", policy: open, body: "<style>a{outline:none}</style><a href='/'>A link</a>",
			look: func(p *portaltest.Page) { p.Reaches("a") }, want: "does not show"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := &recorder{TB: t}
			p := browser.Open(r, c.view)
			p.Go(serve(t, c.policy, c.body))
			p.Settled()
			if c.look != nil {
				c.look(p)
			}
			r.end()
			said := strings.Join(r.said, "\n")
			if c.want == "" && said != "" || !strings.Contains(said, c.want) {
				t.Errorf("said %q, want it to say %q", said, c.want)
			}
		})
	}
}

func TestExpectTakesOnlyWhatItNames(t *testing.T) {
	browser := portaltest.Start(t)
	r := &recorder{TB: t}
	p := browser.Open(r, portaltest.Desk)
	p.Go(serve(t, "default-src * 'unsafe-inline'", "<script>console.log('one'); console.log('two')</script>"))
	p.Settled()
	p.Expect("one")
	r.end()
	if said := strings.Join(r.said, "\n"); !strings.Contains(said, "two") || strings.Contains(said, "one") {
		t.Errorf("said %q, want two alone", said)
	}
}

func TestScreenshotIsOfTheWholePage(t *testing.T) {
	browser := portaltest.Start(t)
	p := browser.Open(t, portaltest.Dark)
	p.Go(serve(t, "default-src 'none'; img-src data:", strings.Repeat("<p>A line.</p>", 40)))
	file := filepath.Join(t.TempDir(), "made", "page.png")
	p.Screenshot(file)
	if b, err := os.ReadFile(file); err != nil || len(b) < 1000 || string(b[1:4]) != "PNG" {
		t.Errorf("%d bytes, %v, want a picture", len(b), err)
	}
}
