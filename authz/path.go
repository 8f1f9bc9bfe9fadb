package authz

import (
	"net/url"
	"strings"
	"unsafe"
)

// judgePath judges a request target, which is :path as Envoy sends it, before any rule does. It returns
// the path decoded once, without query and trailing slash (the root stays "/"), and the raw query, which
// is not judged.
//
// ok is false for whatever an upstream might take for another path than we do: empty and dot segments,
// a second separator, path parameters, escapes of characters that need none or that would have to be
// decoded twice, bytes that no path has. Refusing them here is what makes a rule's path mean the same
// to everybody behind us.
//
// Nothing is allocated while scratch has room: the path borrows from target or, where something had to
// be decoded, from scratch, which is returned with the path appended.
func judgePath(scratch []byte, target string) (path, query string, _ []byte, ok bool) {
	path, query, _ = strings.Cut(target, "?")
	if path == "" || path[0] != '/' {
		return "", "", scratch, false
	}
	escaped := false
	for i := 0; i < len(path); i++ {
		switch pathBytes[path[i]] {
		case pathPlain:
		case pathSeparator:
			if beginsBadly(path[i+1:]) {
				return "", "", scratch, false
			}
		case pathEscape:
			c, ok := unescape(path[i:])
			if !ok || isBadEscaped(c) || isOverlong(path[:i], c) || c == ' ' && isEdge(path, i) {
				return "", "", scratch, false
			}
			escaped = true
			i += 2
		default:
			return "", "", scratch, false
		}
	}
	if len(path) > 1 {
		path = strings.TrimSuffix(path, "/")
	}
	if !escaped {
		return path, query, scratch, true
	}
	start := len(scratch)
	for i := 0; i < len(path); i++ {
		c := path[i]
		if c == '%' {
			c, _ = unescape(path[i:])
			i += 2
		}
		scratch = append(scratch, c)
	}
	return borrow(scratch[start:]), query, scratch, true
}

// beginsBadly reports whether the segment that rest begins with is empty or a dot segment. The nothing
// after a trailing slash is no segment.
func beginsBadly(rest string) bool {
	if rest == "" || rest[0] == '/' {
		return rest != ""
	}
	if rest[0] != '.' {
		return false
	}
	rest = strings.TrimPrefix(rest[1:], ".")
	return rest == "" || rest[0] == '/'
}

// pathBytes says what each byte is to a path. A table, because every byte of every request is asked about.
var pathBytes = func() (table [256]pathByte) {
	for i := range table {
		switch c := byte(i); {
		case c == '/':
			table[c] = pathSeparator
		case c == '%':
			table[c] = pathEscape
		case c <= ' ' || c >= 0x7f || c == '\\' || c == ';' || c == '#':
			table[c] = pathRefused
		}
	}
	return table
}()

type pathByte uint8

const (
	pathPlain pathByte = iota
	pathSeparator
	pathEscape
	pathRefused
)

// isBadEscaped reports whether a path may not hold c escaped: characters that separate or escape,
// control characters, and those whose escape is only another spelling of themselves.
func isBadEscaped(c byte) bool {
	switch c {
	case '/', '\\', ';', '%', '-', '.', '_', '~', 0x7f:
		return true
	}
	return c < ' ' || isDigit(c) || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z'
}

// isEdge reports whether the escape at i begins or ends a segment. A server that trims blanks would see
// another segment there, ".." among them.
func isEdge(path string, i int) bool {
	return path[i-1] == '/' || i+3 == len(path) || path[i+3] == '/'
}

// isOverlong reports whether c, together with the escape that before ends with, begins a UTF-8 spelling
// of an ASCII character in more bytes than it has: to a careless decoder %C0%AE is a dot. No text in
// UTF-8 has it, and none in Latin-1 that anybody would read.
func isOverlong(before string, c byte) bool {
	at := len(before) - len("%XX")
	if at < 0 || before[at] != '%' {
		return false
	}
	switch first, _ := unescape(before[at:]); first {
	case 0xc0, 0xc1:
		return c&0xc0 == 0x80
	case 0xe0, 0xf0, 0xf8, 0xfc:
		return c&0xfe == 0x80
	}
	return false
}

// unescape reads the escape that s begins with.
func unescape(s string) (c byte, ok bool) {
	if len(s) < 3 {
		return 0, false
	}
	high, low := hexValue(s[1]), hexValue(s[2])
	return high<<4 | low, high < 16 && low < 16
}

// hexValue returns 16 for what is no hexadecimal digit.
func hexValue(c byte) byte {
	switch {
	case isDigit(c):
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10
	}
	return 16
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// cleanHost returns an authority as rules know it: in lower case, without port and without the dot that
// may end a name. The brackets of an IPv6 address stay. What is no authority comes back in lower case
// and matches nobody's rule.
//
// The host borrows as [judgePath]'s path does.
func cleanHost(scratch []byte, host string) (string, []byte) {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && isPort(host[i+1:]) {
		// An address without brackets has no port: its last colon is its own.
		if name := host[:i]; strings.HasSuffix(name, "]") || strings.IndexByte(name, ':') < 0 {
			host = name
		}
	}
	host = strings.TrimSuffix(host, ".")
	for i := range len(host) {
		if 'A' <= host[i] && host[i] <= 'Z' {
			start := len(scratch)
			scratch = appendLower(scratch, host)
			return borrow(scratch[start:]), scratch
		}
	}
	return host, scratch
}

func isPort(s string) bool {
	for i := range len(s) {
		if !isDigit(s[i]) {
			return false
		}
	}
	return true
}

// appendLower appends s with its ASCII letters in lower case.
func appendLower(dst []byte, s string) []byte {
	for i := range len(s) {
		c := s[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		dst = append(dst, c)
	}
	return dst
}

// borrow returns a string that shares b's bytes. They must not change while it is in use.
func borrow(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) } //nolint:gosec // spares a copy for every escaped path

// queryValue looks for a parameter in a raw query, under any spelling of its name. It returns the
// decoded value of the first one and how often there is one: 0, 1, or 2 for more. ok is false if the
// parameter is there and cannot be read. As in net/url, "+" is a space, and ";" separates nothing and
// spoils the pair it is in: the next reader may think that it does.
//
// It allocates only if something is escaped.
func queryValue(query, name string) (value string, n int, ok bool) {
	for query != "" {
		var pair string
		pair, query, _ = strings.Cut(query, "&")
		key, v, _ := strings.Cut(pair, "=")
		if !spells(key, name) {
			continue
		}
		if n++; n > 1 {
			return value, n, true
		}
		if strings.IndexByte(pair, ';') >= 0 {
			return "", n, false
		}
		value = v
		if strings.ContainsAny(v, "%+") {
			decoded, err := url.QueryUnescape(v)
			if err != nil {
				return "", n, false
			}
			value = decoded
		}
	}
	return value, n, true
}

// spells reports whether a key in a raw query is name once decoded.
func spells(key, name string) bool {
	if key == name && !strings.ContainsAny(name, "%+") {
		return true
	}
	if len(key) > 3*len(name) || !strings.ContainsAny(key, "%+") {
		return false
	}
	decoded, err := url.QueryUnescape(key)
	return err == nil && decoded == name
}

// inOtherCase reports whether a raw query has a parameter that is name in another case: many servers read
// names without regard to it. It allocates only if a key is escaped.
func inOtherCase(query, name string) bool {
	for query != "" {
		var pair string
		pair, query, _ = strings.Cut(query, "&")
		key, _, _ := strings.Cut(pair, "=")
		if len(key) <= 3*len(name) && strings.ContainsAny(key, "%+") {
			if decoded, err := url.QueryUnescape(key); err == nil {
				key = decoded
			}
		}
		if key != name && strings.EqualFold(key, name) {
			return true
		}
	}
	return false
}
