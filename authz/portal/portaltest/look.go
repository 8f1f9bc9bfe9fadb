package portaltest

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"image/png"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// axe is axe-core 4.14.1, from the npm registry (axe.min.js), under the licences beside it.
//
//go:embed testdata/axe.min.js
var axe string

// runAxe asks for what WCAG 2.2 A and AA and axe-core's best practices find; the rules it names are off as shipped.
// It loads nothing.
const runAxe = `axe.run(document, {preload: false, resultTypes: ['violations'], rules: Object.fromEntries(
	['target-size', 'label-content-name-mismatch', 'td-has-header', 'table-fake-caption', 'p-as-heading', 'css-orientation-lock', 'focus-order-semantics']
		.map(id => [id, {enabled: true}]))}).then(r => JSON.stringify(
	r.violations.map(v => ({id: v.id, help: v.help, nodes: v.nodes.map(n => ({html: n.html, why: n.failureSummary}))}))))`

// Accessible fails the test of everything that axe-core finds on the page as it is shown. axe-core runs in a
// world of its own, so the page's Content-Security-Policy stays as it is.
func (p *Page) Accessible() {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, 2*Patience)
	defer cancel()
	found, err := chromedp.Run(ctx, func(ctx context.Context, t *chromedp.Target) (string, error) {
		tree, err := cdp.Call(ctx, t, page.GetFrameTree, cdp.Empty{})
		if err != nil {
			return "", err
		}
		world, err := cdp.Call(ctx, t, page.CreateIsolatedWorld, page.CreateIsolatedWorldParams{FrameID: tree.FrameTree.Frame.ID, WorldName: "axe"})
		if err != nil {
			return "", err
		}
		in := func(p *runtime.EvaluateParams) { p.ContextID = world.ExecutionContextID }
		if _, err := chromedp.Evaluate[bool](axe+"; true", in)(ctx, t); err != nil {
			return "", err
		}
		return chromedp.Evaluate[string](runAxe, in, chromedp.EvalAwaitPromise)(ctx, t)
	})
	if err != nil {
		p.t.Fatalf("axe-core: %v", err)
	}
	var violations []struct {
		ID, Help string
		Nodes    []struct{ HTML, Why string }
	}
	if err := json.Unmarshal([]byte(found), &violations); err != nil {
		p.t.Fatalf("axe-core: %v", err)
	}
	for _, v := range violations {
		for _, n := range v.Nodes {
			p.t.Errorf("%s: axe-core: %s (%s): %s\n%s", Value[string](p, "location.pathname"), v.Help, v.ID, n.HTML, n.Why)
		}
	}
}

// Fits fails the test if the page is wider than what it is shown on. What scrolls inside an element of its own,
// such as a table, is no fault.
func (p *Page) Fits() {
	p.t.Helper()
	p.Until("true") // a navigation may be under way
	// A phone that shows a page that is too wide makes it smaller: then there is more room than there was.
	wide := `(() => {
		const width = ` + strconv.Itoa(p.view.Width) + `;
		if (document.documentElement.scrollWidth <= width && window.innerWidth <= width) return [];
		const scrolls = e => e && (/(auto|scroll|hidden|clip)/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
		const out = Array.from(document.body.querySelectorAll('*')).filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement));
		return ['the page'].concat(out.slice(0, 8).map(e => e.outerHTML.slice(0, 160)));
	})()`
	if found := Value[[]string](p, wide); len(found) > 0 {
		p.t.Errorf("%s is wider than %d px: %s", Value[string](p, "location.pathname"), p.view.Width, strings.Join(found, "\n"))
	}
}

// Reaches fails the test unless the Tab key gets to an element that each of the selectors names, from the top of
// the page, and the element then shows that it has the focus.
func (p *Page) Reaches(selectors ...string) {
	p.t.Helper()
	p.Until("(() => { document.activeElement?.blur(); window.getSelection()?.removeAllRanges(); document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex'); return true })()")
	left := make(map[string]bool, len(selectors))
	for _, s := range selectors {
		left[s] = true
	}
	for range 400 {
		p.do(chromedp.KeyEvent(kb.Tab))
		for s := range left {
			if Value[bool](p, "Boolean(document.activeElement?.matches("+quote(s)+"))") {
				delete(left, s)
				if !Value[bool](p, "(() => { const s = getComputedStyle(document.activeElement); return s.outlineStyle !== 'none' && s.outlineWidth !== '0px' || s.boxShadow !== 'none' })()") {
					p.t.Errorf("%s does not show that it has the focus", s)
				}
			}
		}
		if len(left) == 0 {
			return
		}
		if Value[bool](p, "document.activeElement === document.body || document.activeElement === null") {
			break // once round
		}
	}
	for s := range left {
		p.t.Errorf("%s: the Tab key does not get to %s", Value[string](p, "location.pathname"), s)
	}
}

// tallest is how much of a page a picture shows, in px.
const tallest = 1200

// Screenshot writes a picture of the page from its top to a file, whose folder is made.
func (p *Page) Screenshot(file string) {
	p.t.Helper()
	p.Until("document.fonts.status === 'loaded'")
	ctx, cancel := context.WithTimeout(p.ctx, Patience)
	defer cancel()
	width := Value[float64](p, "document.documentElement.clientWidth")
	height := min(tallest, max(Value[float64](p, "document.documentElement.scrollHeight"), Value[float64](p, "window.innerHeight")))
	picture, err := chromedp.Run(ctx, func(ctx context.Context, t *chromedp.Target) ([]byte, error) {
		beyond := true
		r, err := cdp.Call(ctx, t, page.CaptureScreenshot, page.CaptureScreenshotParams{
			CaptureBeyondViewport: &beyond,
			Clip:                  &page.Viewport{Width: width, Height: height, Scale: 1},
		})
		return r.Data, err
	})
	if err == nil {
		picture, err = smaller(picture)
	}
	if err == nil {
		err = os.MkdirAll(filepath.Dir(file), 0o755) //nolint:gosec // pictures in docs are for everybody
	}
	if err == nil {
		err = os.WriteFile(file, picture, 0o644) //nolint:gosec // as above
	}
	if err != nil {
		p.t.Fatal(fmt.Errorf("screenshot: %w", err))
	}
}

// smaller compresses a picture more than a browser has time for.
func smaller(picture []byte) ([]byte, error) {
	img, err := png.Decode(bytes.NewReader(picture))
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&b, img)
	return b.Bytes(), err
}

// Settled waits until nothing has been loading for a moment and pictures of charts are drawn.
func (p *Page) Settled() {
	p.t.Helper()
	p.Until("true")
	time.Sleep(150 * time.Millisecond)
}
