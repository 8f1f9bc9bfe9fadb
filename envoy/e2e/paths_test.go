package e2e_test

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"keyward/authz/admin"
)

// tricks are targets that name a public path at first sight, and that some server behind could take for
// /admin.
func tricks() []string {
	all := []string{
		"/public/..;/admin", "/public/%2e%2e/admin", "/public//admin", `/public\admin`, "/public/%2e%2e%2fadmin", "/public/;/../admin",
		"/public/../admin", "/public/..%2fadmin", "/public/.%2e/admin", "/public/%2E./admin", "/public/x/../../admin", "/public/./../admin",
		"/public/..;x=1/admin", "/public/;x/../../admin", "/public;/../admin", "/public;x=/../admin", "/public/..//admin", "//public/..//admin",
		`/public/..\admin`, `/public\..\admin`, "/public/..%5cadmin", "/public%2f..%2fadmin", "/public/%252e%252e/admin", "/public/..%252fadmin",
		"/public/%c0%ae%c0%ae/admin", "/public/..%c0%afadmin", "/public/%e0%80%ae%e0%80%ae/admin", "/public/%uff0e%uff0e/admin", "/public/..%00/admin",
		"/public/%00/../admin", "/public/..%0d%0a/admin", "/public/../public/../admin", "/public/../../../admin", "/admin/../public/../admin",
		"/public/..?/admin", "/public/../admin?", "/public/..#/admin", "/public/../admin;", "/public/../%61dmin", "/public/../admin%2f",
		"/public/..%3b/admin", "/public/%2e%2e;/admin", "/public/%2e%2e%3b/admin", "/public/..;%2fadmin", "/public/...;/../../admin",
		"http://app.test/public/../admin", "http://app.test/public/..;/admin", "http://app.test//public/../admin", "http://app.test/public/%2e%2e/admin",
		"http://app.test/admin", "http://app.test\\public/../admin", "http:///public/../admin", "https://app.test/public/../admin", "HTTP://APP.TEST/public/../admin",
		"/%70ublic/../admin", "/%61dmin", "/admin", "/admin/", "//admin", "/./admin", "/x/../admin", "/ADMIN/../admin", "/admin;x", "/admin%20", "/admin/.", "/admin%2f",
		"admin", "*", "/public/\x01/../admin", "/public/\xff/../admin", "/public/\t/../admin",
	}
	for _, dots := range []string{"..", "%2e%2e", ".%2E", "..;", "..;a=b", "%2e%2e;", "%252e%252e", "%c0%ae%c0%ae", "..%00", "..%3B"} {
		for _, slash := range []string{"/", "%2f", "%5C", `\`, "//", "/./", "/;/", "%252f", "%c0%af", ";/", "/%2e/"} {
			all = append(all, "/public"+slash+dots+slash+"admin", "/public/a"+slash+dots+slash+dots+slash+"admin")
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// lenient is what the most obliging server could make of a target: it decodes as often as there is
// something to decode, also what is overlong, takes every slash for one and dots for a step up wherever
// they stand, and knows neither path parameters nor case.
func lenient(target string) string {
	if _, rest, ok := strings.Cut(target, "://"); ok {
		_, path, _ := strings.Cut(rest, "/")
		target = "/" + path
	}
	path, _, _ := strings.Cut(target, "?")
	path, _, _ = strings.Cut(path, "#")
	for range 4 {
		if decoded, err := url.PathUnescape(path); err == nil {
			path = decoded
		}
	}
	path = strings.NewReplacer("\xc0\xae", ".", "\xc0\xaf", "/", "\xe0\x80\xae", ".", "%uff0e", ".", `\`, "/", "\x00", "", "\r", "", "\n", "").Replace(path)
	var walked []string
	for segment := range strings.SplitSeq(path, "/") {
		segment, _, _ = strings.Cut(segment, ";")
		switch segment {
		case "", ".":
		case "..":
			walked = walked[:max(0, len(walked)-1)]
		default:
			walked = append(walked, strings.ToLower(segment))
		}
	}
	return "/" + strings.Join(walked, "/")
}

func TestPathTricksReachNothing(t *testing.T) {
	t.Parallel()
	if got := lenient("http://app.test/public/%252e%252e;x/./%2561dmin"); got != "/admin" {
		t.Fatalf("got %s, want the most obliging reading", got)
	}
	s := serve(t, config{yaml: routes})
	reader := s.key(t, s.instance(t, admin.PolicyInput{}), admin.KeyInput{Scopes: []string{"orders:read"}}).secret
	all := tricks()
	everyVersion(t, s, func(t *testing.T, f *front) {
		c := f.caller(t)
		statuses := map[int]int{}
		try := func(mark, target string, allowed bool, a answer) {
			t.Helper()
			got := f.up.of(mark)
			if (a.status == http.StatusOK) != (len(got) == 1) || len(got) > 1 {
				t.Errorf("%q: got status %d, and %d requests at the upstream", target, a.status, len(got))
			}
			for _, seen := range got {
				if read := lenient(seen.Target); !allowed && !strings.HasPrefix(read+"/", "/public/") {
					t.Errorf("%q: the upstream got %q, which can be read as %s", target, seen.Target, read)
				} else if strings.HasPrefix(read+"/", "/admin/") {
					t.Errorf("%q: the upstream got %q", target, seen.Target)
				}
			}
			if a.status == http.StatusOK && strings.HasPrefix(lenient(target)+"/", "/admin/") && strings.HasPrefix(lenient(got[0].Target)+"/", "/admin/") {
				t.Errorf("%q: got 200", target)
			}
			statuses[a.status]++
		}
		for i, target := range all {
			// Without a key nothing but the public path is to be had.
			mark := fmt.Sprint("path-", i)
			a := c.get(target, caseHeader+": "+mark)
			try(mark, target, false, a)
			if !slices.Contains([]int{http.StatusOK, http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound}, a.status) {
				t.Errorf("%q: got status %d", target, a.status)
			}
			if a.status == http.StatusBadRequest && a.body != "" && a.header.Get("Content-Type") == "application/json" {
				if p := a.problem(t); p["code"] != "InvalidPath" {
					t.Errorf("%q: got %v", target, p)
				}
			}
			// With a key that lacks the scope, nothing that could be read as /admin.
			mark += "-key"
			try(mark, target, true, c.get(target, caseHeader+": "+mark, withKey(reader)))
			// The same over HTTP/2, which has no request line.
			mark += "-h2"
			arrived := f.http2(t, []field{{":method", "GET"}, {":scheme", "http"}, {":authority", "app.test"}, {":path", target}, {strings.ToLower(caseHeader), mark}}, nil)
			try(mark, target, false, answer{status: map[bool]int{true: http.StatusOK}[arrived]})
		}
		t.Logf("%d targets: %v (0: refused over HTTP/2)", len(all), statuses)
		if statuses[http.StatusBadRequest] < 30 || statuses[http.StatusUnauthorized] < 10 {
			t.Errorf("got %v, too few to mean anything", statuses)
		}

		// What is no trick is not refused.
		for _, target := range []string{"/public/a", "/public/", "/public", "/public/a.b/..c/.d/e..", "/public/a%20b/%C3%A9", "/public/a:b@c,d!$&'()*+=~_-", "/public/a?x=/../admin;%2e%2e%2f//"} {
			if a := c.get(target).want(t, http.StatusOK, target); a.seen.Target != target {
				t.Errorf("%s: the upstream got %s", target, a.seen.Target)
			}
		}
	})
}
