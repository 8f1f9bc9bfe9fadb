// Package portaltest drives the portal in a real Chromium, and says what a person would stumble over.
//
// [Start] runs a Chromium for a test, [Browser.Open] opens a page in a profile of its own: a viewport, light or
// dark, with or without JavaScript. A page collects what goes wrong in it, such as an error on the console, a
// violation of the Content-Security-Policy or a dialog, and fails the test when that ends; see [Page.Expect].
// [Page.Accessible] asks axe-core.
//
// Nothing is loaded from another machine: all names but loopback's resolve to nothing.
package portaltest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
)

// Patience is how long a page may take to show what a test waits for. It bounds a failure, and says nothing of
// how fast anything is.
const Patience = 45 * time.Second

// errMissing says what to do about it.
var errMissing = errors.New(`no Chromium found: run "make chromium" in keyward's source tree, or put chromium, chromium-browser or google-chrome on PATH`)

func find() (string, error) {
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "google-chrome-stable"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errMissing
}

// A Browser is a running Chromium.
type Browser struct {
	ctx context.Context //nolint:containedctx // it is how chromedp names a browser
}

// Start starts a Chromium without a window and with a profile of its own, which ends with the test. Where there
// is none it skips the test, saying why; in CI (the environment's CI is not empty) it fails it.
func Start(t testing.TB) *Browser {
	t.Helper()
	path, err := find()
	if err != nil && os.Getenv("CI") == "" {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	// chromedp makes and removes the profile, talks over a pipe, and has the kernel end Chromium with us.
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(path),
		chromedp.Flag("no-sandbox", os.Getuid() == 0), // Chromium's sandbox does not run as root
		chromedp.Flag("no-proxy-server", true),
		chromedp.Flag("host-resolver-rules", "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"),
		chromedp.Flag("disable-component-update", true),
		chromedp.Flag("hide-scrollbars", true),
		chromedp.Flag("force-prefers-reduced-motion", true), // pictures of something that moves differ each time
	)
	allocator, end := chromedp.NewExecAllocator(context.Background(), options...)
	ctx, cancel := chromedp.NewContext(allocator, chromedp.WithErrorf(func(string, ...any) {}))
	t.Cleanup(func() {
		_ = chromedp.Cancel(ctx) // asks it to go; end then waits for the process, and ends it if it must
		cancel()
		end()
	})
	if err := chromedp.Do(ctx); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return &Browser{ctx}
}

// A View is how somebody looks at a page. The zero View is a light desk of 1280 × 800 with JavaScript.
type View struct {
	Width, Height int
	Dark          bool
	ForcedColors  bool // as people choose in their system, such as Windows' contrast themes
	NoScript      bool
}

// Views that pages are looked at with.
var (
	Desk   = View{Width: 1280, Height: 800}
	Dark   = View{Width: 1280, Height: 800, Dark: true}
	Narrow = View{Width: 320, Height: 640}
	Phone  = View{Width: 390, Height: 844}
)

// A Page is a tab in a profile of its own: it shares no cookie with another. Not safe for concurrent use.
type Page struct {
	t      testing.TB
	ctx    context.Context //nolint:containedctx // it is how chromedp names a tab
	faults faults
	view   View
}

// Open opens an empty page, which is closed when the test ends. The test then fails of what went wrong in it.
func (b *Browser) Open(t testing.TB, v View) *Page {
	t.Helper()
	if v.Width == 0 {
		v.Width, v.Height = Desk.Width, Desk.Height
	}
	p := &Page{t: t}
	var cancel context.CancelFunc
	p.ctx, cancel = chromedp.NewContext(b.ctx, chromedp.WithNewBrowserContext())
	t.Cleanup(func() {
		p.Check()
		if t.Failed() {
			p.describe()
		}
		cancel()
	})
	// The first call of a context must not have a deadline: the page would end with it.
	if err := chromedp.Do(p.ctx); err != nil {
		t.Fatal(err)
	}
	p.faults.listen(t, p.ctx)
	p.Look(v)
	return p
}

// Look changes how the page is looked at; JavaScript goes on or off with the next navigation.
func (p *Page) Look(v View) {
	p.t.Helper()
	p.view = v
	scheme, forced := "light", "none"
	if v.ForcedColors {
		forced = "active"
	}
	if v.Dark {
		scheme = "dark"
	}
	var mobile []chromedp.EmulateViewportOption
	if v.Width < 600 {
		mobile = append(mobile, chromedp.EmulateMobile, chromedp.EmulateTouch, chromedp.EmulatePortrait)
	}
	p.do(
		chromedp.EmulateViewport(int64(v.Width), int64(v.Height), mobile...),
		call(emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: scheme},
			{Name: "prefers-reduced-motion", Value: "reduce"},
			{Name: "forced-colors", Value: forced},
		}}),
		call(emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: v.NoScript}),
	)
}

func call[P, R any](command cdp.Command[P, R], params P) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, command, params)
		return err
	})
}

// do runs actions, and fails the test if one does not succeed in time.
func (p *Page) do(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	if err := p.try(Patience, actions...); err != nil {
		p.t.Fatal(err)
	}
}

func (p *Page) try(patience time.Duration, actions ...chromedp.Action[chromedp.Void]) error {
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	return chromedp.Do(ctx, actions...)
}

// describe says what the page of a failed test shows.
func (p *Page) describe() {
	where, _ := value[string](p, "location.href")
	text, _ := value[string](p, "document.body ? document.body.innerText : ''")
	p.t.Logf("the page was %s:\n%s", where, text[:min(len(text), 4<<10)])
}

// value evaluates JavaScript in the page, also where scripts of the page itself are off.
func value[T any](p *Page, expression string) (T, error) {
	ctx, cancel := context.WithTimeout(p.ctx, 10*time.Second)
	defer cancel()
	return chromedp.Run(ctx, chromedp.Evaluate[T](expression))
}

// Value evaluates a JavaScript expression in the page.
func Value[T any](p *Page, expression string) T {
	p.t.Helper()
	v, err := value[T](p, expression)
	if err != nil {
		p.t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// Until waits until a JavaScript expression is true, over navigations.
func (p *Page) Until(expression string) {
	p.t.Helper()
	var err error
	for end := time.Now().Add(Patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		var ok bool
		// An error may be a navigation's, which took the page away.
		if ok, err = value[bool](p, "document.readyState === 'complete' && Boolean("+expression+")"); err == nil && ok {
			return
		}
	}
	p.t.Fatalf("this did not come true: %s (%v)", expression, err)
}

// Go opens an address and waits for it to be loaded.
func (p *Page) Go(url string) {
	p.t.Helper()
	p.do(chromedp.Navigate(url))
}

// See waits until the page shows a text, whatever its white space.
func (p *Page) See(text string) {
	p.t.Helper()
	p.Until("document.body.innerText.replace(/\\s+/g, ' ').includes(" + quote(strings.Join(strings.Fields(text), " ")) + ")")
}

// Has reports whether there is an element that can be seen.
func (p *Page) Has(selector string) bool {
	p.t.Helper()
	return Value[bool](p, "Array.from(document.querySelectorAll("+quote(selector)+")).some(e => e.checkVisibility())")
}

// Text returns what the first such element shows.
func (p *Page) Text(selector string) string {
	p.t.Helper()
	p.Until("document.querySelector(" + quote(selector) + ")")
	return strings.TrimSpace(Value[string](p, "document.querySelector("+quote(selector)+").innerText"))
}

// Click clicks on the first such element with the mouse, once it can be seen.
func (p *Page) Click(selector string) {
	p.t.Helper()
	if err := p.try(Patience, chromedp.Click(chromedp.CSS(selector), chromedp.NodeVisible)); err != nil {
		p.t.Fatalf("click on %s: %v", selector, err)
	}
}

// Press clicks on the button or link with that text, within an element that the selector names.
func (p *Page) Press(within, text string) {
	p.t.Helper()
	const mark = "data-portaltest"
	p.Until("(() => { document.querySelectorAll('[" + mark + "]').forEach(e => e.removeAttribute('" + mark + "'));" +
		"const e = Array.from(document.querySelectorAll(" + quote(within) + ")).flatMap(w => Array.from(w.querySelectorAll('button, a, summary, [role=button]')))" +
		".find(e => e.innerText.replace(/\\s+/g, ' ').trim() === " + quote(text) + " && e.checkVisibility());" +
		"e?.setAttribute('" + mark + "', ''); return e })()")
	p.Click("[" + mark + "]")
}

// Fill puts a value into a field, as if it had been typed or pasted.
func (p *Page) Fill(selector, value string) {
	p.t.Helper()
	p.Until("document.querySelector(" + quote(selector) + ")")
	p.Until("(() => { const e = document.querySelector(" + quote(selector) + ");" +
		"e.focus(); e.value = " + quote(value) + ";" +
		"e.dispatchEvent(new Event('input', {bubbles: true})); e.dispatchEvent(new Event('change', {bubbles: true})); return true })()")
}

// Type types into the element that has the focus.
func (p *Page) Type(keys string) {
	p.t.Helper()
	p.do(chromedp.KeyEvent(keys))
}

// Do runs actions of chromedp's own.
func (p *Page) Do(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	p.do(actions...)
}

// WaitReload loads the page again until ok.
func (p *Page) WaitReload(ok func() bool) {
	p.t.Helper()
	for end := time.Now().Add(Patience); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		// An error may be a navigation's that was still under way.
		if err := p.try(Patience, chromedp.Reload()); err == nil && ok() {
			return
		}
	}
	p.t.Fatal("the page does not show what it should, however often it is loaded")
}
