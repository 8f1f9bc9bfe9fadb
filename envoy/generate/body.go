package generate

import (
	"fmt"
	"regexp/syntax"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	extauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/envoyproxy/go-control-plane/pkg/wellknown"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// A Body is a rule of keyward's that looks at bodies: its pattern, as Go's http.ServeMux has them, of decoded
// text. The host does not matter: a body that nobody looks at does no harm.
type Body struct {
	Method     string // "": any
	Path       string
	IgnoreCase bool
}

// bodyRoutes returns for each body a route that has Envoy send it. What to do with the request they do not
// say. A route that Envoy finds for less than its rule would be a way around the rule, were it not that
// keyward refuses what it cannot see; one for more only costs.
//
// Measured on 1.36.4, 1.38.3 and 1.40.0: the filter's own setting may be absent; of a longer body the
// beginning comes, and x-envoy-auth-partial-body says so, whatever allowed_headers has; a client's own header
// of that name does not come through.
func bodyRoutes(c Config) ([]*routev3.Route, error) {
	if len(c.Bodies) == 0 {
		return nil, nil
	}
	settings, err := pack(&extauthzv3.ExtAuthzPerRoute{Override: &extauthzv3.ExtAuthzPerRoute_CheckSettings{
		CheckSettings: &extauthzv3.CheckSettings{WithRequestBody: &extauthzv3.BufferSettings{
			MaxRequestBytes: uint32(c.MaxRequestBytes),
			// Otherwise Envoy answers a longer body by itself, and before anybody has asked for a key.
			AllowPartialMessage: true,
			PackAsBytes:         true,
		}},
	}})
	if err != nil {
		return nil, err
	}
	var routes []*routev3.Route
	seen := map[string]bool{}
	for _, b := range c.Bodies {
		match := &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: pathExpression(b)}}}
		if b.Method != "" {
			match.Headers = []*routev3.HeaderMatcher{{Name: ":method", HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{
				StringMatch: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: b.Method}},
			}}}
		}
		if key := match.String(); seen[key] { // of another host
			continue
		} else {
			seen[key] = true
		}
		routes = append(routes, &routev3.Route{
			Match:                match,
			TypedPerFilterConfig: map[string]*anypb.Any{wellknown.HTTPExternalAuthorization: proto.CloneOf(settings)},
		})
	}
	return routes, nil
}

// pathExpression is an RE2 expression for all paths, as they come, that a pattern can match. For a pattern too
// long for Envoy it is one for its beginning and everything below.
func pathExpression(b Body) string {
	const segment, below = "[!-.0-~]+", "(/[!-~]*)?"
	path := strings.TrimSuffix(strings.TrimPrefix(b.Path, "/"), "/{$}")
	subtree := strings.HasSuffix(path, "/") || path == "" || strings.HasSuffix(path, "...}")
	if path = strings.TrimSuffix(path, "/"); path == "{$}" {
		return "/"
	}
	var segments []string
	if path != "" {
		segments = strings.Split(path, "/")
	}
	if n := len(segments); n > 0 && strings.HasSuffix(segments[n-1], "...}") {
		segments = segments[:n-1]
	}
	for n := len(segments); ; n-- {
		var out strings.Builder
		if b.IgnoreCase {
			out.WriteString("(?i)")
		}
		for _, s := range segments[:n] {
			out.WriteByte('/')
			if strings.HasPrefix(s, "{") {
				out.WriteString(segment)
			} else {
				out.WriteString(literalExpression(s))
			}
		}
		if subtree || n < len(segments) {
			out.WriteString(below)
		} else {
			out.WriteString("/?")
		}
		if n == 0 || programSize(out.String()) <= maxCost {
			return out.String()
		}
	}
}

// literalExpression is for a literal as a request may spell it: what is neither a letter, a digit nor one of
// -._~ may be escaped, what is not ASCII has to be. Other escapes keyward refuses.
func literalExpression(literal string) string {
	var out strings.Builder
	for i := range len(literal) {
		c := literal[i]
		escaped := fmt.Sprintf("%%(?i:%02x)", c)
		switch {
		case c >= 0x80 || c == ' ':
			out.WriteString(escaped)
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '~':
			out.WriteByte(c)
		case c == '.':
			out.WriteString(`\.`)
		default:
			out.WriteString("(?:\\" + string(c) + "|" + escaped + ")")
		}
	}
	return out.String()
}

// programSize is about how large the RE2 program of an expression is: Go's is made the same way.
func programSize(expression string) int {
	parsed, err := syntax.Parse(expression, syntax.Perl)
	if err != nil {
		panic("generate: " + err.Error()) // made above, of what is escaped
	}
	program, err := syntax.Compile(parsed.Simplify())
	if err != nil {
		panic("generate: " + err.Error())
	}
	return len(program.Inst)
}
