package admin

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"

	"keyward/authz/apikey"
)

// OIDCLoginConfig says how people sign in with an issuer: keyward is a client of it.
type OIDCLoginConfig struct {
	Issuer       string // one of the issuers of an [OIDC], whose rules give roles
	ClientID     string
	ClientSecret apikey.Secret // none: a public client
	RedirectURL  string        // where the issuer sends people back to, as it was registered there
}

// An OIDCLogin lets people sign in with an issuer: OpenID Connect's authorization code flow, with PKCE. What an
// issuer says of itself is fetched when it is needed first. Safe for concurrent use.
type OIDCLogin struct {
	cfg      OIDCLoginConfig
	issuer   oidcIssuer // whose verifier takes tokens made for the client
	client   *http.Client
	mu       sync.Mutex
	endpoint *loginEndpoint // nil: not known yet
}

// A loginEndpoint is what the discovery document says.
type loginEndpoint struct {
	Issuer      string   `json:"issuer"`
	AuthURL     string   `json:"authorization_endpoint"`
	TokenURL    string   `json:"token_endpoint"`
	AuthMethods []string `json:"token_endpoint_auth_methods_supported"`
	NamesItself bool     `json:"authorization_response_iss_parameter_supported"`
}

// An OIDCFlow is what the browser that began to sign in keeps until it comes back: who does not bring it did not
// begin. All are random, 43 characters each.
type OIDCFlow struct{ State, Nonce, Verifier string }

// loginTimeout bounds what an issuer is asked while somebody waits.
const loginTimeout = 10 * time.Second

// NewOIDCLogin returns how people sign in with one of the issuers of o, which may be nil.
// Errors: *apikey.InvalidError, several joined, with fields such as portal.oidc.issuer.
func NewOIDCLogin(o *OIDC, cfg OIDCLoginConfig) (*OIDCLogin, error) {
	var bad faults
	var of *oidcIssuer
	if o != nil {
		of = o.issuers[cfg.Issuer]
	}
	if of == nil {
		bad.add(apikey.Invalid("portal.oidc.issuer", "must be one of those in oidc, whose roles decide who may sign in"))
	}
	if cfg.ClientID == "" {
		bad.add(apikey.Invalid("portal.oidc.clientID", "is missing: the issuer gives one to whom it signs people in for"))
	}
	if u, err := url.Parse(cfg.RedirectURL); err != nil || !secureURL(cfg.RedirectURL) || u.Path != LoginPath {
		bad.add(apikey.Invalid("portal.oidc.redirectURL", "must be the https URL of the portal (http only on this machine) with the path "+LoginPath))
	}
	if err := bad.err(); err != nil {
		return nil, err
	}
	l := &OIDCLogin{cfg: cfg, issuer: *of, client: of.keys.client}
	l.issuer.verifier = oidc.NewVerifier(of.Issuer, of.keys, &oidc.Config{
		ClientID: cfg.ClientID, SupportedSigningAlgs: of.Algorithms, Now: func() time.Time { return time.Now().Add(-oidcSkew) },
	})
	return l, nil
}

// LoginPath is that of the address that an issuer sends people back to.
const LoginPath = "/sign-in/oidc/back"

// Host is what people know the issuer by.
func (l *OIDCLogin) Host() string {
	u, err := url.Parse(l.cfg.Issuer)
	if err != nil {
		return l.cfg.Issuer
	}
	return u.Host
}

// Begin returns where to send a browser, and what it is to keep until it is back.
// Errors: apikey.ErrUndecided while the issuer is away.
func (l *OIDCLogin) Begin(ctx context.Context) (to string, flow OIDCFlow, err error) {
	ctx, cancel := context.WithTimeout(ctx, loginTimeout)
	defer cancel()
	client, _, err := l.oauth(ctx)
	if err != nil {
		return "", flow, err
	}
	flow = OIDCFlow{State: oauth2.GenerateVerifier(), Nonce: oauth2.GenerateVerifier(), Verifier: oauth2.GenerateVerifier()}
	return client.AuthCodeURL(flow.State, oidc.Nonce(flow.Nonce), oauth2.S256ChallengeOption(flow.Verifier)), flow, nil
}

// oauth returns the client for what the issuer says of itself.
func (l *OIDCLogin) oauth(ctx context.Context) (*oauth2.Config, *loginEndpoint, error) {
	l.mu.Lock()
	found := l.endpoint
	l.mu.Unlock()
	if found == nil {
		found = new(loginEndpoint)
		keys := l.issuer.keys
		if err := keys.get(ctx, keys.discovery(), found); err != nil {
			return nil, nil, fmt.Errorf("issuer %s: %w: discovery document: %w", l.cfg.Issuer, apikey.ErrUndecided, err)
		}
		if found.Issuer != l.cfg.Issuer || !secureURL(withoutQuery(found.AuthURL)) || !secureURL(found.TokenURL) {
			return nil, nil, fmt.Errorf("issuer %s: %w: its discovery document is of another issuer, or names no https URLs to sign in at", l.cfg.Issuer, apikey.ErrUndecided)
		}
		l.mu.Lock()
		l.endpoint = found
		l.mu.Unlock()
	}
	style := oauth2.AuthStyleInHeader // which is the default, and tried twice a code would be spent
	if l.cfg.ClientSecret.Reveal() == "" || len(found.AuthMethods) > 0 && !slices.Contains(found.AuthMethods, "client_secret_basic") {
		style = oauth2.AuthStyleInParams
	}
	return &oauth2.Config{
		ClientID: l.cfg.ClientID, ClientSecret: l.cfg.ClientSecret.Reveal(), RedirectURL: l.cfg.RedirectURL,
		Endpoint: oauth2.Endpoint{AuthURL: found.AuthURL, TokenURL: found.TokenURL, AuthStyle: style},
		Scopes:   []string{oidc.ScopeOpenID, "profile", "email"},
	}, found, nil
}

// withoutQuery: some issuers have one in the address that people are sent to.
func withoutQuery(address string) string {
	before, _, _ := strings.Cut(address, "?")
	return before
}

// FinishLogin returns who signed in, from what came back to the browser that kept flow. The caller's rights are
// those that the issuer's rules give; they end when the id_token does.
//
// Errors: [ErrUnauthenticated] for whatever is not the answer to that very flow, or is not believed; *ForbiddenError
// where the caller has no role, with its name; apikey.ErrUndecided while the issuer is away.
func (s *Service) FinishLogin(ctx context.Context, l *OIDCLogin, flow OIDCFlow, back url.Values) (Caller, error) {
	ctx, cancel := context.WithTimeout(ctx, loginTimeout)
	defer cancel()
	if flow == (OIDCFlow{}) || !sameSecret(only(back, "state"), flow.State) {
		return Caller{}, ErrUnauthenticated
	}
	client, issuer, err := l.oauth(ctx)
	if err != nil {
		return Caller{}, err
	}
	// RFC 9207: the answer of another issuer, to which somebody lured the browser, is not taken for ours.
	if named := back["iss"]; len(named) > 1 || len(named) == 1 && named[0] != l.cfg.Issuer || len(named) == 0 && issuer.NamesItself {
		return Caller{}, ErrUnauthenticated
	}
	code := only(back, "code")
	if code == "" || back.Has("error") {
		return Caller{}, ErrUnauthenticated
	}
	token, err := client.Exchange(context.WithValue(ctx, oauth2.HTTPClient, l.client), code, oauth2.VerifierOption(flow.Verifier))
	if no, ok := errors.AsType[*oauth2.RetrieveError](err); ok {
		if no.ErrorCode == "invalid_grant" {
			return Caller{}, ErrUnauthenticated
		}
		// Its text repeats the issuer's whole answer.
		return Caller{}, fmt.Errorf("issuer %s: %w: it does not exchange a code (status %d, %q): look at clientID and clientSecretFile",
			l.cfg.Issuer, apikey.ErrUndecided, no.Response.StatusCode, no.ErrorCode)
	}
	if err != nil {
		return Caller{}, fmt.Errorf("issuer %s: %w: it does not exchange a code: %w", l.cfg.Issuer, apikey.ErrUndecided, err)
	}
	signed, _ := token.Extra("id_token").(string)
	if !isJWT(signed) || unverifiedIssuer(signed) != l.cfg.Issuer {
		return Caller{}, ErrUnauthenticated
	}
	caller, err := l.issuer.authenticate(ctx, signed, func(claims map[string]any) bool {
		nonce, _ := claims["nonce"].(string)
		azp, there := claims["azp"]
		audiences, several := claims["aud"].([]any)
		return sameSecret(nonce, flow.Nonce) && (!there && (!several || len(audiences) == 1) || azp == l.cfg.ClientID)
	})
	if s.cfg.Format.Within(caller.Name) {
		return Caller{}, ErrUnauthenticated // the audit would have it in clear
	}
	return caller, err
}

// only returns the value of a parameter that is there once.
func only(values url.Values, name string) string {
	if len(values[name]) != 1 {
		return ""
	}
	return values[name][0]
}

// sameSecret: nothing is the same as what was never given.
func sameSecret(got, want string) bool {
	return want != "" && subtle.ConstantTimeCompare([]byte(got), []byte(want)) == 1
}
