package authz

import (
	"slices"
	"strings"
	"unicode/utf8"

	"keyward/authz/apikey"
)

// JWT says how to know callers who have no key, but a token of somebody else that Envoy has verified. They
// are principals on optional routes: quotas count them as they count the same user's keys. The zero JWT
// knows nobody.
//
// Source: the dynamic metadata of Envoy's jwt_authn filter, which nobody else can write.
type JWT struct {
	Issuer string // exactly, as tokens have it
	// Payload is the name under which Envoy keeps the claims: payload_in_metadata of its provider.
	Payload  string
	UPNClaim string // "": DefaultUPNClaim
	// IDClaims are tried in order; nil: DefaultIDClaims.
	IDClaims []string
	// Instance is that of callers whose request names none; "": those are counted nowhere.
	Instance string
}

// DefaultUPNClaim and DefaultIDClaims hold the principal's name and its identifier.
const DefaultUPNClaim = "preferred_username"

// DefaultIDClaims hold the identifier.
var DefaultIDClaims = []string{"oid", "sub"}

// The claims that every token has.
const (
	claimIssuer  = "iss"
	claimSubject = "sub"
)

// maxClaim is the longest claim that can name anybody: a longer one counts as missing.
const maxClaim = 1 << 10 // bytes

// prepare fills in what is not said.
func (j JWT) prepare() (JWT, error) {
	if j.Issuer == "" {
		if j.Payload != "" || j.UPNClaim != "" || j.IDClaims != nil || j.Instance != "" {
			return j, apikey.Invalid("jwt.issuer", "is missing: it says whose tokens count")
		}
		return j, nil
	}
	if j.Payload == "" {
		return j, apikey.Invalid("jwt.payload", "is missing: it is payload_in_metadata of Envoy's jwt_authn provider")
	}
	if j.UPNClaim == "" {
		j.UPNClaim = DefaultUPNClaim
	}
	if j.IDClaims == nil {
		j.IDClaims = DefaultIDClaims
	}
	if slices.Contains(j.IDClaims, "") {
		return j, apikey.Invalid("jwt.idClaim", "has an empty name")
	}
	if j.Instance != "" {
		id, err := apikey.CanonicalInstanceID(j.Instance)
		if err != nil {
			return j, apikey.Invalid("jwt.instance", "is no instance's id")
		}
		j.Instance = id
	}
	return j, nil
}

// claimNames lists what has to be known of a token; nil if none counts.
func (j *JWT) claimNames() []string {
	if j.Issuer == "" {
		return nil
	}
	names := append([]string{claimIssuer, claimSubject, j.UPNClaim}, j.IDClaims...)
	slices.Sort(names)
	return slices.Compact(names)
}

// A Holder is a caller known by a token. Nobody is the zero Holder.
type Holder struct {
	Issuer           string
	Subject, UPN, ID string // "": the token does not say
}

// holder returns whose token Envoy has verified, nobody if it is none that counts.
func (j *JWT) holder(r *Request) Holder {
	if j.Issuer == "" || r.claim(claimIssuer) != j.Issuer {
		return Holder{}
	}
	h := Holder{Issuer: j.Issuer, Subject: r.claim(claimSubject), UPN: r.claim(j.UPNClaim)}
	for _, name := range j.IDClaims {
		if h.ID = r.claim(name); h.ID != "" {
			break
		}
	}
	return h
}

// claim returns a claim; "" if there is none that is any use.
func (r *Request) claim(name string) string {
	for i := range r.Claims {
		if r.Claims[i].Name == name && len(r.Claims[i].Value) <= maxClaim {
			return r.Claims[i].Value
		}
	}
	return ""
}

// appendUPN appends the caller's name as the token has it. Nobody gets away without one: those of whom an
// issuer says nothing have one together.
func (h *Holder) appendUPN(dst []byte) []byte {
	if h.UPN != "" {
		return append(dst, h.UPN...)
	}
	return append(append(append(dst, h.Issuer...), '#'), h.Subject...)
}

// AppendUPN appends on whose behalf the request counts: users in lower case, as their names are compared.
// Nothing for a caller without identity.
func (d *Decision) AppendUPN(dst []byte) []byte {
	start := len(dst)
	switch {
	case d.Key != nil && d.Key.Type != apikey.TypeUser:
		return d.Key.AppendPrincipal(dst) // its own, by its id
	case d.Key != nil:
		dst = d.Key.AppendPrincipal(dst)
	case d.Holder.Issuer != "":
		dst = d.Holder.appendUPN(dst)
	}
	return lowerFrom(dst, start)
}

// AppendUserID appends the identifier of whom the request counts for: the id of an instance's or agent's
// key, the name of a user; of a token what its issuer says, as it says it.
func (d *Decision) AppendUserID(dst []byte) []byte {
	switch {
	case d.Key != nil && d.Key.Type == apikey.TypeUser:
		return d.AppendUPN(dst)
	case d.Key != nil:
		return d.Key.ID.Append(dst)
	case d.Holder.ID != "":
		return append(dst, d.Holder.ID...)
	}
	return d.AppendUPN(dst)
}

// AppendUser appends the user whom the request is from, as the key or the token spells it; nothing for keys
// that are no user's.
func (d *Decision) AppendUser(dst []byte) []byte {
	switch {
	case d.Key != nil:
		return append(dst, d.Key.UserPrincipalName...)
	case d.Holder.Issuer != "":
		return d.Holder.appendUPN(dst)
	}
	return dst
}

// lowerFrom brings what stands from start on to lower case. It allocates only for what is not ASCII.
func lowerFrom(dst []byte, start int) []byte {
	for i := start; i < len(dst); i++ {
		switch c := dst[i]; {
		case 'A' <= c && c <= 'Z':
			dst[i] = c + 'a' - 'A'
		case c >= utf8.RuneSelf:
			return append(dst[:start], strings.ToLower(string(dst[start:]))...)
		}
	}
	return dst
}
