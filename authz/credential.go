package authz

import (
	"crypto/subtle"
	"net/http"
	"strings"

	"keyward/authz/apikey"
)

// Credentials says where secrets are looked for. The zero value looks in X-API-Key,
// X-Agent-Access-Token and Authorization, and not in the query.
type Credentials struct {
	// Headers are headers that carry nothing but a secret, in lower case. Each takes secrets of any kind.
	Headers []string
	// NoBearer leaves Authorization alone.
	NoBearer bool
	// QueryParameter, if not empty, may carry a secret too. Queries end up in logs and histories: off
	// unless there is no other way.
	QueryParameter string
	// Format is how secrets look.
	Format apikey.Format
}

// DefaultCredentialHeaders are the headers in which secrets are looked for.
var DefaultCredentialHeaders = []string{"x-api-key", "x-agent-access-token"}

// credential is what a request carries to prove who is calling.
type credential struct {
	secret          string
	sent            bool // something was meant as one of our secrets
	ambiguous       bool // and cannot be taken as one
	inAuthorization bool
	inQuery         bool
	unremovable     bool // it stands where Envoy cannot take it away
}

// find collects the secret from all places. Equal secrets in two places are one; different ones, a
// repeated header or a list where one value belongs are ambiguous.
func (c *Credentials) find(r *Request, query string) (found credential) {
	for _, name := range c.Headers {
		value, n := r.header(name)
		if n > 1 || strings.ContainsAny(value, ", \t") {
			found.sent, found.ambiguous = true, true
		} else if value != "" {
			found.add(value)
		}
	}
	if !c.NoBearer {
		c.findBearer(r, &found)
	}
	if c.QueryParameter != "" {
		value, n, ok := queryValue(query, c.QueryParameter)
		if n > 0 {
			found.inQuery = true
			// Envoy removes parameters by their literal name, and from a CONNECT none at all.
			found.unremovable = escapedParameter(query, c.QueryParameter) || r.Method == http.MethodConnect
		}
		if n > 1 || !ok {
			found.sent, found.ambiguous = true, true
		} else if value != "" {
			found.add(value)
		}
	}
	return found
}

// findBearer looks at every element of every Authorization header. Elements that are not of our shape
// belong to the application: they neither count nor disturb, unless one of ours stands among them.
func (c *Credentials) findBearer(r *Request, found *credential) {
	elements, ours := 0, ""
	for _, h := range r.Headers {
		if h.Name != "authorization" {
			continue
		}
		for rest, more := h.Value, true; more; {
			var element string
			element, rest, more = strings.Cut(rest, ",")
			elements++
			if token, ok := bearer(element); ok {
				if _, owned := c.Format.Owns(token); owned {
					found.inAuthorization = true
					ours = token
				}
			}
		}
	}
	switch {
	case !found.inAuthorization:
	case elements > 1:
		found.sent, found.ambiguous = true, true
	default:
		found.add(ours)
	}
}

// bearer returns the token of an element with the Bearer scheme, in any case.
func bearer(element string) (token string, ok bool) {
	element = trimSpace(element)
	const scheme = "bearer"
	if len(element) <= len(scheme) || !strings.EqualFold(element[:len(scheme)], scheme) {
		return "", false
	}
	token = trimSpace(element[len(scheme):])
	return token, len(token) < len(element)-len(scheme)
}

func (c *credential) add(secret string) {
	if c.sent && subtle.ConstantTimeCompare([]byte(c.secret), []byte(secret)) != 1 {
		c.ambiguous = true
	}
	c.sent, c.secret = true, secret
}

// escapedParameter reports whether a parameter stands in the query under another spelling of its name,
// such as api%5Fkey. Upstreams read it all the same.
func escapedParameter(query, name string) bool {
	for rest, more := query, query != ""; more; {
		var pair string
		pair, rest, more = strings.Cut(rest, "&")
		if key, _, _ := strings.Cut(pair, "="); key != name && spells(key, name) {
			return true
		}
	}
	return false
}
