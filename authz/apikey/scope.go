package apikey

import (
	"slices"
	"strings"
)

// A Scope is a right: parts joined by ":", each of [A-Za-z0-9._-]{1,64}; "*" alone or as the last part
// stands for everything below. Case matters.
type Scope string

// MaxScopes is how many scopes a key may carry.
const MaxScopes = 64

const (
	maxScopePart = 64
	maxScopeLen  = 512
)

// ParseScope checks the grammar.
func ParseScope(s string) (Scope, error) {
	if s == "" || len(s) > maxScopeLen {
		return "", Invalid("", "a scope has 1 to 512 characters")
	}
	rest, more := s, true
	for more {
		var part string
		part, rest, more = strings.Cut(rest, ":")
		if part == "*" && !more {
			break
		}
		if !isScopePart(part) {
			return "", Invalid("", "a scope is parts joined by \":\", each 1 to 64 of A-Z a-z 0-9 . _ -, with * only as the last part")
		}
	}
	return Scope(s), nil
}

func isScopePart(s string) bool {
	if s == "" || len(s) > maxScopePart {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && c != '.' && c != '_' && c != '-' {
			return false
		}
	}
	return true
}

// Covers reports whether holding s gives the right want: "a:*" covers "a:b" and "a:b:c", not "a";
// "a" covers only "a"; "*" covers everything.
func (s Scope) Covers(want Scope) bool {
	if s == want || s == "*" {
		return true
	}
	n := len(s)
	return n >= 2 && s[n-1] == '*' && s[n-2] == ':' && len(want) > n-1 && want[:n-1] == s[:n-1]
}

// Scopes are the rights of a key, sorted and without doubles. nil means that nothing was said, which
// is every right; an empty, non-nil Scopes is none.
type Scopes []Scope

// ParseScopes checks, sorts and removes doubles. A nil slice stays nil.
func ParseScopes(list []string) (Scopes, error) {
	if list == nil {
		return nil, nil
	}
	if len(list) > MaxScopes {
		return nil, Invalid("", "at most 64 scopes")
	}
	scopes := make(Scopes, 0, len(list))
	for _, s := range list {
		scope, err := ParseScope(s)
		if err != nil {
			return nil, err
		}
		scopes = append(scopes, scope)
	}
	slices.Sort(scopes)
	return slices.Compact(scopes), nil
}

// Cover reports whether one of the scopes gives the right want.
func (s Scopes) Cover(want Scope) bool {
	if s == nil {
		return true
	}
	for _, have := range s {
		if have.Covers(want) {
			return true
		}
	}
	return false
}

// Intersect returns the rights that both give, of each overlapping pair the narrower. It may use room,
// which is empty.
func (s Scopes) Intersect(room, other Scopes) Scopes {
	if s == nil {
		return other
	}
	if other == nil {
		return s
	}
	both := room
	if both == nil {
		both = Scopes{}
	}
	for _, a := range s {
		for _, b := range other {
			switch {
			case b.Covers(a):
				both = append(both, a)
			case a.Covers(b):
				both = append(both, b)
			}
		}
	}
	slices.Sort(both)
	return slices.Compact(both)
}

// Strings returns the scopes as strings; nil stays nil.
func (s Scopes) Strings() []string {
	if s == nil {
		return nil
	}
	list := make([]string, len(s))
	for i, scope := range s {
		list[i] = string(scope)
	}
	return list
}

// Append appends the scopes separated by spaces, as upstreams see them; "*" for nil.
func (s Scopes) Append(dst []byte) []byte {
	if s == nil {
		return append(dst, '*')
	}
	for i, scope := range s {
		if i > 0 {
			dst = append(dst, ' ')
		}
		dst = append(dst, scope...)
	}
	return dst
}
