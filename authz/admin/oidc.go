package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/go-oidc/v3/oidc"

	"keyward/authz/apikey"
)

// An OIDCIssuer is who may say, in signed tokens, who a caller of the Management API is, and what that
// makes of the caller here. Nothing of a token is believed before its signature is checked, and no address
// in a token is ever followed: keys come from where the configuration says.
type OIDCIssuer struct {
	// Issuer is exactly what tokens name as iss. https, or http on this machine.
	Issuer string
	// Audience is what a token must be for.
	Audience string
	// Algorithms a token may be signed with, asymmetric ones only; nil: RS256.
	Algorithms []string
	// JWKSURL is where the issuer's keys are; "": where its discovery document says.
	JWKSURL string
	// Rules are tried in order; the first that fits decides. If none does the caller has no rights at all.
	Rules []OIDCRule
	// UPNClaim holds the user principal name of a caller; "": it has none. Of email only if email_verified.
	UPNClaim string
	// UPNSuffix ends every user principal name of this issuer, e.g. "@example.com"; needed where there are
	// several issuers, so that none can speak for the users of another.
	UPNSuffix string
	// AllowNonce accepts tokens with a nonce: those are the answer to one login, and made for that.
	AllowNonce bool
}

// An OIDCRule gives a role to who has a claim with a value.
type OIDCRule struct {
	// Claim is a name, or where it is inside of others a JSON pointer such as /realm_access/roles. It may
	// hold a string or a list of them.
	Claim string
	// Value is what the claim must be or have in it, exactly. "*" is any; not for RoleOwner.
	Value string
	Role  Role
	// InstanceID confines the caller to an instance, InstanceClaim to the one that a claim names. Without
	// both it is all instances.
	InstanceID, InstanceClaim string
}

// oidcAlgorithms are those whose verification needs no secret.
var oidcAlgorithms = []string{
	oidc.RS256, oidc.RS384, oidc.RS512, oidc.ES256, oidc.ES384, oidc.ES512, oidc.PS256, oidc.PS384, oidc.PS512, oidc.EdDSA,
}

const (
	// oidcSkew is how far an issuer's clock may be off.
	oidcSkew = time.Minute
	maxJWT   = 16 << 10 // bytes
	maxSub   = 255      // OpenID Connect Core §2
)

// validateOIDC reports every fault of the issuers, with fields such as oidc[0].issuer.
func validateOIDC(issuers []OIDCIssuer) error {
	var bad faults
	for i, one := range issuers {
		fault := func(field, reason string) { bad.add(apikey.Invalid(fmt.Sprintf("oidc[%d].%s", i, field), reason)) }
		if !secureURL(one.Issuer) {
			fault("issuer", "must be an https URL without query and fragment (http only on this machine)")
		}
		if one.JWKSURL != "" && !secureURL(one.JWKSURL) {
			fault("jwksURL", "must be an https URL without query and fragment (http only on this machine)")
		}
		if one.Audience == "" {
			fault("audience", "is missing: a token for somebody else must not open keyward")
		}
		for _, a := range one.Algorithms {
			if !slices.Contains(oidcAlgorithms, a) {
				fault("algorithms", "must be of "+strings.Join(oidcAlgorithms, ", "))
			}
		}
		switch {
		case one.UPNSuffix == "" && one.UPNClaim != "" && len(issuers) > 1:
			fault("upnSuffix", "is needed where there are several issuers, or one could speak for the users of another")
		case one.UPNSuffix != "" && (len(one.UPNSuffix) < 2 || one.UPNSuffix[0] != '@' || strings.Contains(one.UPNSuffix[1:], "@") || !isPrincipal(one.UPNSuffix)):
			fault("upnSuffix", "must be @ and a domain, such as @example.com")
		}
		for j := range i {
			if one.Issuer == issuers[j].Issuer {
				fault("issuer", "is there twice")
			}
			if one.UPNSuffix != "" && strings.EqualFold(one.UPNSuffix, issuers[j].UPNSuffix) {
				fault("upnSuffix", "is that of another issuer too")
			}
		}
		if len(one.Rules) == 0 {
			fault("roles", "is missing: nobody would have a role")
		}
		for j, rule := range one.Rules {
			at := fmt.Sprintf("roles[%d].", j)
			if rule.Claim == "" {
				fault(at+"claim", "is missing")
			}
			switch {
			case rule.Value == "":
				fault(at+"value", "is missing")
			case rule.Value == "*" && rule.Role == RoleOwner:
				fault(at+"value", "must be one exact value for the role owner")
			}
			if !slices.Contains([]Role{RoleOwner, RoleOperator, RoleAuditor, RoleUser}, rule.Role) {
				fault(at+"role", "must be owner, operator, auditor or user")
			}
			if rule.Role == RoleUser && one.UPNClaim == "" {
				fault("upnClaim", "is needed for the role user")
			}
			if rule.InstanceID != "" {
				if _, err := apikey.CanonicalInstanceID(rule.InstanceID); err != nil {
					fault(at+"instance", "is no id of an instance")
				}
				if rule.InstanceClaim != "" {
					fault(at+"instanceClaim", "cannot be set together with instance")
				}
			}
		}
	}
	return bad.err()
}

// secureURL: what is fetched decides who is owner, so nobody on the way may change it.
func secureURL(s string) bool {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.ContainsAny(s, "#?") {
		return false
	}
	switch u.Scheme {
	case "https":
		return true
	case "http":
		ip := net.ParseIP(u.Hostname())
		return u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	}
	return false
}

// OIDC knows callers by the tokens of OIDC issuers. Keys are fetched when they are needed first, so that
// a start does not wait for an issuer. Safe for concurrent use.
type OIDC struct {
	issuers map[string]*oidcIssuer
}

type oidcIssuer struct {
	OIDCIssuer
	keys     *oidcKeys
	verifier *oidc.IDTokenVerifier
}

// NewOIDC returns an OIDC for issuers. client fetches their documents and keys; nil is one with timeouts.
// Errors: *apikey.InvalidError, several joined, with fields such as oidc[0].issuer.
func NewOIDC(issuers []OIDCIssuer, client *http.Client) (*OIDC, error) {
	if err := validateOIDC(issuers); err != nil {
		return nil, err
	}
	if client == nil {
		client = &http.Client{Timeout: 5 * time.Second}
	}
	own := *client
	// A redirect would be followed to wherever the answer says.
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	o := &OIDC{issuers: map[string]*oidcIssuer{}}
	for _, one := range issuers {
		if len(one.Algorithms) == 0 {
			one.Algorithms = []string{oidc.RS256}
		}
		keys := &oidcKeys{issuer: one.Issuer, url: one.JWKSURL, client: &own, algorithms: one.Algorithms}
		o.issuers[one.Issuer] = &oidcIssuer{one, keys, oidc.NewVerifier(one.Issuer, keys, &oidc.Config{
			ClientID: one.Audience, SupportedSigningAlgs: one.Algorithms,
			Now: func() time.Time { return time.Now().Add(-oidcSkew) }, // a token ends that much later
		})}
	}
	return o, nil
}

// isJWT tells a token of an issuer from one of ours, which has no dot.
func isJWT(s string) bool { return strings.Count(s, ".") == 2 }

// authenticate returns who a token is about. Errors: ErrUnauthenticated; *ForbiddenError where the caller
// has no role, with its name; an outage where the issuer's keys cannot be had.
func (o *OIDC) authenticate(ctx context.Context, token string) (Caller, error) {
	if len(token) > maxJWT {
		return Caller{}, ErrUnauthenticated
	}
	// Unverified: it only chooses among the issuers that are configured.
	one := o.issuers[unverifiedIssuer(token)]
	if one == nil {
		return Caller{}, ErrUnauthenticated
	}
	return one.authenticate(ctx, token, func(claims map[string]any) bool {
		_, there := claims["nonce"]
		return !there || one.AllowNonce
	})
}

// authenticate is that of one issuer. fits says whether a token with these claims is for this use.
func (one *oidcIssuer) authenticate(ctx context.Context, token string, fits func(claims map[string]any) bool) (Caller, error) {
	if len(token) > maxJWT {
		return Caller{}, ErrUnauthenticated
	}
	// go-oidc flattens what a key set says, so an outage takes another way.
	var outage error
	verified, err := one.verifier.Verify(context.WithValue(ctx, outageKey{}, &outage), token)
	if outage != nil {
		return Caller{}, outage
	}
	if err != nil {
		return Caller{}, ErrUnauthenticated
	}
	var claims map[string]any
	if err := verified.Claims(&claims); err != nil || claims == nil || respelled(claims) {
		return Caller{}, ErrUnauthenticated
	}
	if nbf, there := claims["nbf"]; there {
		seconds, ok := nbf.(float64) // compared as such: of one too large for an int64 nobody knows what becomes
		if !ok || seconds > float64(time.Now().Add(oidcSkew).Unix()) {
			return Caller{}, ErrUnauthenticated
		}
	}
	if !fits(claims) {
		return Caller{}, ErrUnauthenticated
	}
	if !isSubject(verified.Subject) {
		return Caller{}, ErrUnauthenticated
	}
	// An issuer has no fragment, so no two identities have one name.
	caller := Caller{Name: "oidc:" + one.Issuer + "#" + verified.Subject, shown: &credential{until: verified.Expiry.Add(oidcSkew)}}
	for _, rule := range one.Rules {
		instance, fits := rule.fits(claims)
		if !fits {
			continue
		}
		caller.Role, caller.InstanceID = rule.Role, instance
		if rule.Role == RoleUser {
			if caller.UserPrincipalName = one.principal(claims); caller.UserPrincipalName == "" {
				return Caller{Name: caller.Name}, &ForbiddenError{Reason: "the token does not say which user principal name is the caller's"}
			}
		}
		return caller, nil
	}
	return caller, &ForbiddenError{Reason: "the caller has no role here"}
}

// respelled reports whether a claim is one of those that go-oidc reads, in another case: it would take
// SUB or EXP for the issuer's own, and an issuer may let its users choose what such claims hold.
func respelled(claims map[string]any) bool {
	for name := range claims {
		for _, own := range []string{"iss", "sub", "aud", "exp", "nbf", "iat", "nonce", "at_hash", "_claim_names", "_claim_sources"} {
			if name != own && strings.EqualFold(name, own) {
				return true
			}
		}
	}
	return false
}

// isSubject: it becomes part of a name in the audit.
func isSubject(s string) bool {
	return s != "" && len(s) <= maxSub && utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

func unverifiedIssuer(token string) string {
	parts := strings.Split(token, ".")
	payload, err := decodeSegment(parts[1])
	if err != nil {
		return ""
	}
	var claims struct {
		Issuer string `json:"iss"`
	}
	if json.Unmarshal(payload, &claims) != nil {
		return ""
	}
	return claims.Issuer
}

// fits reports whether a caller with these claims has the rule's role, and in which instance.
func (r *OIDCRule) fits(claims map[string]any) (instanceID string, fits bool) {
	switch {
	case !slices.ContainsFunc(texts(claims, r.Claim), func(s string) bool { return s == r.Value || r.Value == "*" && s != "" && r.Role != RoleOwner }):
		return "", false
	case r.InstanceID != "":
		id, err := apikey.CanonicalInstanceID(r.InstanceID)
		return id, err == nil
	case r.InstanceClaim != "":
		named := texts(claims, r.InstanceClaim)
		if len(named) != 1 { // of several none is the one
			return "", false
		}
		id, err := apikey.CanonicalInstanceID(named[0])
		return id, err == nil
	}
	return "", true
}

// texts returns the strings that a claim holds.
func texts(claims map[string]any, name string) []string {
	value, ok := claims[name]
	if !ok && strings.HasPrefix(name, "/") {
		value = claims
		for part := range strings.SplitSeq(name[1:], "/") {
			part = strings.NewReplacer("~1", "/", "~0", "~").Replace(part)
			inner, isObject := value.(map[string]any)
			if !isObject {
				return nil
			}
			value = inner[part]
		}
	}
	switch v := value.(type) {
	case string:
		return []string{v}
	case []any:
		var all []string
		for _, one := range v {
			if s, ok := one.(string); ok {
				all = append(all, s)
			}
		}
		return all
	}
	return nil
}

// principal returns the user principal name that the claims give; "" for none that can be believed.
func (one *oidcIssuer) principal(claims map[string]any) string {
	name, ok := claims[one.UPNClaim].(string)
	if !ok || !isPrincipal(name) {
		return ""
	}
	if one.UPNClaim == "email" && claims["email_verified"] != true {
		return ""
	}
	if n := len(name) - len(one.UPNSuffix); n < 1 || !strings.EqualFold(name[n:], one.UPNSuffix) {
		return ""
	}
	return name
}

var errNoKeys = errors.New("the keys of the OIDC issuer cannot be had")

type outageKey struct{}

// readAll reads an answer of an issuer.
func readAll(resp *http.Response) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxKeySet+1))
	if err == nil && len(b) > maxKeySet {
		err = errors.New("the answer is larger than 1 MiB")
	}
	return b, err
}
