package generate

import (
	"regexp"
	"slices"
	"strings"
)

// Single hyphens between letters and digits: what is left when clients may not send underscores, and the
// only separator whose look-alikes anyOf knows.
var headerName = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)

// Reserved reports whether HTTP or Envoy needs what a client sends under this name.
func Reserved(name string) bool {
	for _, prefix := range []string{"x-envoy-", "x-forwarded-", "content-", "accept", "sec-", "access-control-", "proxy-", "if-", "grpc-"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return slices.Contains([]string{
		"connection", "cookie", "date", "expect", "forwarded", "host", "keep-alive", "origin", "range", "referer",
		"te", "trailer", "transfer-encoding", "upgrade", "user-agent", "via", "x-request-id",
	}, name)
}

// separator is what may stand in the place of a hyphen. Servers in the manner of CGI turn '-' into '_',
// and some of them every other character that is no letter and no digit as well.
const separator = "[!-/:-`{-~]"

// Envoy refuses an expression whose RE2 program is larger than 100; a few of them go to what cost does
// not count.
const maxCost = 90

// cost is how large the RE2 program for these names or namespaces is at most: one for each character,
// three for a separator (written as [^a-z0-9] it would be nine before Envoy 1.40), what they begin with
// in common only once, and one for each end, or three where anything may follow.
func cost(names []string) int {
	seen := map[string]bool{}
	total := 0
	for _, name := range names {
		for i := range len(name) {
			if seen[name[:i+1]] {
				continue
			}
			seen[name[:i+1]] = true
			total++
			if name[i] == '-' {
				total += 2
			}
		}
		total++
		if strings.HasSuffix(name, "-") {
			total += 2
		}
	}
	return total
}

// anyOf is an RE2 expression, to be matched against a whole header name in lower case, for these names
// and whatever an upstream might take for one of them.
func anyOf(names []string) string {
	names = slices.Compact(slices.Sorted(slices.Values(names))) // RE2 finds common beginnings only among neighbours
	return strings.ReplaceAll(strings.Join(names, "|"), "-", separator)
}

// identityPatterns are for all identity headers: one expression, if Envoy accepts it, because each is
// tried on every header of every request.
func identityPatterns(names []string) []string {
	names = slices.Sorted(slices.Values(names))
	var patterns []string
	for len(names) > 0 {
		n := len(names)
		for n > 1 && cost(names[:n]) > maxCost {
			n--
		}
		patterns = append(patterns, anyOf(names[:n]))
		names = names[n:]
	}
	return patterns
}

// namespaces are the names that keyward may change, with what begins like them: Envoy takes one
// expression only, and all names together are too large for it. x-keyward-user stands for x-keyward-*.
func namespaces(names []string) []string {
	out := make([]string, 0, len(names))
	for _, name := range names {
		if parts := strings.SplitAfterN(name, "-", 3); len(parts) == 3 {
			name = parts[0] + parts[1]
		}
		out = append(out, name)
	}
	return slices.Compact(slices.Sorted(slices.Values(out)))
}

// changeablePattern is for [namespaces].
func changeablePattern(namespaces []string) string {
	out := make([]string, len(namespaces))
	for i, n := range namespaces {
		out[i] = strings.ReplaceAll(n, "-", separator)
		if strings.HasSuffix(n, "-") {
			out[i] += "[!-~]+"
		}
	}
	return strings.Join(out, "|")
}
