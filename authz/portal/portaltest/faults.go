package portaltest

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/cdproto/audits"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// quote writes a string as JavaScript does.
func quote(s string) string {
	b, _ := json.Marshal(s) // a string always can be
	return string(b)
}

// faults are what went wrong in a page.
type faults struct {
	mu        sync.Mutex
	found     []string
	documents map[string]bool // addresses that pages were loaded from
}

func (f *faults) add(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.found = append(f.found, fmt.Sprintf(format, args...))
}

// listen collects faults until ctx ends.
func (f *faults) listen(t testing.TB, ctx context.Context) {
	t.Helper()
	f.documents = make(map[string]bool)
	err := chromedp.Listen(ctx, func(ev any) {
		switch e := ev.(type) {
		case *network.EventRequestWillBeSent:
			if e.Type == network.ResourceTypeDocument {
				f.mu.Lock()
				f.documents[e.Request.URL] = true
				f.mu.Unlock()
			}
		case *runtime.EventExceptionThrown:
			f.add("exception: %s", e.ExceptionDetails.Text+" "+described(e.ExceptionDetails.Exception))
		case *runtime.EventConsoleAPICalled:
			// Nothing of ours writes there, so whatever does was let in by somebody.
			texts := make([]string, len(e.Args))
			for i, a := range e.Args {
				texts[i] = described(a)
			}
			f.add("console.%s: %s", e.Type, strings.Join(texts, " "))
		case *log.EventEntryAdded:
			if e.Entry.Level == log.EntryLevelVerbose {
				return // advice, e.g. on what browsers may autocomplete
			}
			f.mu.Lock()
			answer := e.Entry.Source == log.EntrySourceNetwork && f.documents[e.Entry.URL]
			f.mu.Unlock()
			if !answer { // that a page was answered with 401 or 409 is for the test to judge
				f.add("%s %s: %s %s", e.Entry.Source, e.Entry.Level, e.Entry.Text, e.Entry.URL)
			}
		case *audits.EventIssueAdded:
			if d := e.Issue.Details.ContentSecurityPolicyIssueDetails; d != nil {
				f.add("Content-Security-Policy: %s %s %s", d.ViolatedDirective, d.ContentSecurityPolicyViolationType, d.BlockedURL)
			}
		case *page.EventJavascriptDialogOpening:
			f.add("dialog: %s %q", e.Type, e.Message)
			go func() { // the listener must not wait for an answer
				_ = chromedp.Do(ctx, call(page.HandleJavaScriptDialog, page.HandleJavaScriptDialogParams{Accept: true}))
			}()
		}
	})
	if err == nil {
		_, err = chromedp.Call(ctx, audits.Enable, struct{}{})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func described(o *runtime.RemoteObject) string {
	switch {
	case o == nil:
		return ""
	case o.Description != "":
		return o.Description
	}
	return string(o.Value)
}

// Check fails the test of what went wrong in the page since the last call. It is called when the test ends.
func (p *Page) Check() {
	p.t.Helper()
	for _, what := range p.taken() {
		p.t.Errorf("in the browser: %s", what)
	}
}

// Expect fails the test unless each of the parts is in something that went wrong since the last call, and takes
// those as what had to be.
func (p *Page) Expect(parts ...string) {
	p.t.Helper()
	found := p.taken()
	for _, part := range parts {
		met := false
		left := found[:0:0]
		for _, what := range found {
			if strings.Contains(what, part) {
				met = true
			} else {
				left = append(left, what)
			}
		}
		if found = left; !met {
			p.t.Errorf("nothing went wrong in the browser that says %q", part)
		}
	}
	p.faults.mu.Lock()
	p.faults.found = append(p.faults.found, found...)
	p.faults.mu.Unlock()
}

// Taken returns what went wrong in the page since the last call, which is then no fault of the test.
func (p *Page) Taken() []string { return p.taken() }

func (p *Page) taken() []string {
	p.faults.mu.Lock()
	defer p.faults.mu.Unlock()
	found := p.faults.found
	p.faults.found = nil
	return found
}
