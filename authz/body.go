package authz

import (
	"encoding/json"
	"strings"
	"unicode/utf8"
	"unsafe"
)

// bodyMember returns the text of one member of the JSON object that a body is. ok is false for a body of
// which somebody behind us could read something else: no JSON object or not UTF-8, the member twice, in
// another case (many servers read names without regard to it), or not text.
//
// Whether the body is JSON is for the standard library to say; in what is JSON, members are found by
// their braces and quotes alone. It allocates only if the member, or a name, is escaped.
func bodyMember(body []byte, name string) (value string, present, ok bool) {
	if !utf8.Valid(body) || !json.Valid(body) {
		return "", false, false
	}
	rest := skipSpace(body)
	if rest[0] != '{' {
		return "", false, false
	}
	for rest = skipSpace(rest[1:]); rest[0] != '}'; {
		if rest[0] == ',' {
			rest = skipSpace(rest[1:])
		}
		n := stringEnd(rest)
		member, _ := plainString(rest[:n])
		rest = skipSpace(skipSpace(rest[n:])[1:]) // the colon
		n = valueEnd(rest)
		if strings.EqualFold(member, name) {
			if present || member != name || rest[0] != '"' {
				return "", true, false
			}
			present = true
			if value, ok = plainString(rest[:n]); !ok {
				return "", true, false
			}
		}
		rest = skipSpace(rest[n:])
	}
	return value, present, true
}

func skipSpace(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t' || b[0] == '\n' || b[0] == '\r') {
		b = b[1:]
	}
	return b
}

// stringEnd returns the length of the string that valid JSON begins with.
func stringEnd(b []byte) int {
	for i := 1; ; i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
}

// valueEnd returns the length of the value that valid JSON begins with.
func valueEnd(b []byte) int {
	depth := 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '"':
			i += stringEnd(b[i:]) - 1
			if depth == 0 {
				return i + 1
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 {
				return i
			}
			if depth--; depth == 0 {
				return i + 1
			}
		case ',', ' ', '\t', '\n', '\r':
			if depth == 0 {
				return i
			}
		}
	}
	return len(b)
}

// plainString decodes a string with its quotes. ok is false if it holds half a character, which every
// reader replaces by what it likes.
func plainString(quoted []byte) (s string, ok bool) {
	inside := quoted[1 : len(quoted)-1]
	s = unsafe.String(unsafe.SliceData(inside), len(inside)) //nolint:gosec // spares a copy of every member's name
	if strings.IndexByte(s, '\\') >= 0 {
		var decoded string
		if json.Unmarshal(quoted, &decoded) != nil {
			return "", false
		}
		s = decoded
	}
	return s, strings.IndexByte(s, 0) < 0 && !strings.ContainsRune(s, utf8.RuneError)
}
