package portal

import (
	"bytes"
	"context"
	"embed"
	"encoding/base64"
	"errors"
	"html/template"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"
	"unicode/utf8"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A section is an entry of the navigation, under Settings > API Keys.
type section struct {
	name  string
	path  string // of its first page, under /instances/{instance}
	needs string // what the caller must be able to do at all to see it
	pages func(*portal)
}

// sections are the entries in their order.
var sections = []section{
	{sectionKeys, "/keys", "key.read", (*portal).keyPages},
}

// A visit is a request of somebody who is signed in.
type visit struct {
	*http.Request // with a context in which changes depend on what the visitor signed in with

	admin.Visitor
	Instance  string // canonical id, where the address names one
	FormToken string // what forms carry, see [admin.Service.FormToken]
	Section   string // name of the section that the page belongs to
}

// Can reports whether what the caller may do at all includes an action, in the words of the audit.
func (v *visit) Can(action string) bool { return v.Caller.Can(action) }

// Path returns an address in the visit's instance, of the parts given, each escaped.
func (v *visit) Path(parts ...string) string {
	b := strings.Builder{}
	b.WriteString("/instances/" + url.PathEscape(v.Instance))
	for _, part := range parts {
		b.WriteString("/" + url.PathEscape(part))
	}
	return b.String()
}

type pageFunc func(w http.ResponseWriter, v *visit) error

// page registers a page for who is signed in. A pattern is one of http.ServeMux; if it has {instance}, the visit
// has its canonical id. Methods other than GET are refused unless the form is ours.
func (p *portal) page(section, pattern string, page pageFunc) {
	p.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		v, err := p.visitor(r)
		if err != nil {
			p.fail(w, r, nil, err)
			return
		}
		v.Section = section
		if id := r.PathValue("instance"); id != "" {
			// What none can have is none; whether there is one, the service says.
			if v.Instance, err = apikey.CanonicalInstanceID(id); err != nil {
				p.fail(w, r, v, apikey.ErrNotFound)
				return
			}
		}
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			if err := v.ParseForm(); err != nil {
				p.fail(w, r, v, formFault(err))
				return
			}
			if !sameText(v.PostForm.Get("form"), v.FormToken) {
				p.fail(w, r, v, errForeign)
				return
			}
		}
		if r.Header.Get(unattended) == "" {
			p.svc.Seen(r.Context(), v.Visitor)
		}
		if err := page(w, v); err != nil {
			p.fail(w, r, v, err)
		}
	})
}

// formFault is the fault of a form that cannot be read. What was sent is not repeated.
func formFault(err error) error {
	if large, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return large
	}
	return errForm
}

// unattended marks a request that a page makes by itself: it does not keep anybody signed in.
const unattended = "Keyward-Unattended"

// visitor returns who sends a request. Errors: [admin.ErrUnauthenticated].
func (p *portal) visitor(r *http.Request) (*visit, error) {
	cookie, ok := sessionOf(r)
	if !ok {
		return nil, admin.ErrUnauthenticated
	}
	who, err := p.svc.Visitor(r.Context(), cookie)
	if err != nil {
		return nil, err
	}
	who.Caller.RequestID = requestID(r)
	who.Caller.RemoteAddr = r.RemoteAddr
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		who.Caller.RemoteAddr = host
	}
	who.Caller.Attempt = new(admin.Attempt)
	r = r.WithContext(admin.WithCredential(r.Context(), who.Caller))
	return &visit{Request: r, Visitor: who, FormToken: p.svc.FormToken(cookie)}, nil
}

// A view is what a template gets.
type view struct {
	Title   string
	Visit   *visit // nil: nobody is signed in
	Said    string // what the page before did
	Data    any    // the page's own
	Version string
}

// A navItem is an entry of the navigation, as it stands on a page.
type navItem struct {
	Name, URL string
	Here      bool
}

// Nav returns the navigation; empty outside an instance.
func (v *view) Nav() []navItem {
	if v.Visit == nil || v.Visit.Instance == "" {
		return nil
	}
	var items []navItem
	for _, s := range sections {
		if v.Visit.Can(s.needs) {
			items = append(items, navItem{s.name, v.Visit.Path() + s.path, s.name == v.Visit.Section})
		}
	}
	return items
}

// show sends a page: template is the name of its file in pages, without .html.
func (p *portal) show(w http.ResponseWriter, v *visit, template, title string, data any) error {
	return p.showAs(w, v, http.StatusOK, template, title, data)
}

// showAs is show with a status of its own.
func (p *portal) showAs(w http.ResponseWriter, v *visit, status int, template, title string, data any) error {
	in := &view{Title: title, Visit: v, Data: data, Version: p.cfg.Version}
	if v != nil {
		in.Said = p.said(w, v.Request)
	}
	var b bytes.Buffer
	if err := p.pages[template].ExecuteTemplate(&b, "layout", in); err != nil {
		return err
	}
	write(w, status, &b)
	return nil
}

// done redirects to a page of ours after a change, where it says what was done.
func (p *portal) done(w http.ResponseWriter, v *visit, to, said string) error {
	http.SetCookie(w, cookieOf(saidCookie, base64.RawURLEncoding.EncodeToString([]byte(said)), time.Minute))
	p.redirect(w, v.Request, to)
	return nil
}

// redirect goes to a page of ours, also for a script that would not.
func (p *portal) redirect(w http.ResponseWriter, r *http.Request, to string) {
	if r.Header.Get("HX-Request") != "" {
		w.Header().Set("HX-Redirect", to)
		w.WriteHeader(http.StatusNoContent)
		return
	}
	http.Redirect(w, r, to, http.StatusSeeOther) //nolint:gosec // G710: what came from a request went through ownPath
}

// said returns what the page before did, once.
func (p *portal) said(w http.ResponseWriter, r *http.Request) string {
	c, err := r.Cookie(saidCookie)
	if err != nil || r.Header.Get(unattended) != "" {
		return ""
	}
	http.SetCookie(w, cookieOf(saidCookie, "", -1))
	text, err := base64.RawURLEncoding.DecodeString(c.Value)
	if err != nil || len(text) > 1<<10 || !utf8.Valid(text) {
		return ""
	}
	return string(text)
}

//go:embed pages
var pageFiles embed.FS

// loadPages parses each page together with the layout.
func (p *portal) loadPages() map[string]*template.Template {
	shared := template.Must(template.New("").Funcs(p.functions()).ParseFS(pageFiles, "pages/layout.html"))
	names, err := pageFiles.ReadDir("pages")
	if err != nil {
		panic(err) // embedded
	}
	pages := map[string]*template.Template{}
	for _, e := range names {
		if e.Name() == "layout.html" {
			continue
		}
		one := template.Must(shared.Clone())
		pages[strings.TrimSuffix(e.Name(), path.Ext(e.Name()))] = template.Must(one.ParseFS(pageFiles, "pages/"+e.Name()))
	}
	return pages
}

// functions are what templates can call.
func (p *portal) functions() template.FuncMap {
	return template.FuncMap{
		"asset":  p.assets.of,
		"stamp":  stamp,
		"ago":    func(t time.Time) string { return distance(t, time.Now()) },
		"date":   func(t time.Time) string { return t.UTC().Format(time.DateOnly) },
		"join":   strings.Join,
		"number": number,
		// What "options" takes, and what "fault" does.
		"pair": func(choices []choice, chosen string) map[string]any {
			return map[string]any{"Choices": choices, "Chosen": chosen}
		},
		"field": func(faults map[string]string, field string) map[string]any {
			return map[string]any{"Faults": faults, "Field": field}
		},
		"iso": func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	}
}

// stamp is a time in full, for people; "never" for none.
func stamp(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format("2006-01-02 15:04") + " UTC"
}

// refused tells the audit of an attempt that was refused.
func (p *portal) refused(ctx context.Context, v *visit, target, code string) {
	p.svc.Refused(ctx, v.Caller, target, code)
}

// logCause logs what a page cannot tell.
func (p *portal) logCause(r *http.Request, err error) {
	p.cfg.Log.Error("a request of the portal failed", slog.String("request_id", requestID(r)), slog.String("method", r.Method),
		slog.String("route", r.Pattern), slog.Any("error", err))
}
