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
	cfg    OIDCLoginConfig
	issuer oidcIssuer // whose verifier takes tokens made for the client
	client *http.Client

	mu       sync.Mutex
	endpoint *loginEndpoint // nil: not known yet
	fetching chan struct{}  // closed when the fetch that runs is over; nil: none runs
	err      error          // of the last fetch
	pause    time.Duration  // after it, before the next one
	again    time.Time      // when that may be
}

// An IssuerAwayError is an [apikey.ErrUndecided] of somebody who wants to sign in: the issuer cannot be reached, or
// does not answer as it should.
type IssuerAwayError struct {
	Host       string        // what people know the issuer by
	RetryAfter time.Duration // at least a second: before that, nothing is tried
	Cause      error         // for the log; nil where that has it of another who asked at the same time, or a moment ago
}

func (e *IssuerAwayError) Error() string {
	text := fmt.Sprintf("the issuer %s cannot be reached, or does not answer as it should", e.Host)
	if e.Cause != nil {
		text += ": " + e.Cause.Error()
	}
	return text
}

// Unwrap makes errors.Is(e, ErrUndecided) true.
func (e *IssuerAwayError) Unwrap() error { return apikey.ErrUndecided }

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

// Who is asked for may be anybody, so an issuer that is away is asked seldom: after a second, then twice as long
// each time, at most this.
const longestPause = 30 * time.Second

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

// Begin returns where to send a browser, and what it is to keep until it is back. Errors: *[IssuerAwayError].
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

// known returns what the issuer says of itself: fetched once, for all who ask meanwhile, and after a failure not
// before a pause is over. Errors: *[IssuerAwayError].
func (l *OIDCLogin) known(ctx context.Context) (*loginEndpoint, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := l.endpoint == nil && l.fetching == nil && !time.Now().Before(l.again)
	if first {
		l.fetching = make(chan struct{})
		go l.discover() //nolint:gosec // G118: it outlives the request on purpose, as discover says
	}
	if over := l.fetching; over != nil {
		l.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
		}
		l.mu.Lock()
	}
	if l.endpoint != nil {
		return l.endpoint, nil
	}
	away := l.away(time.Until(l.again), nil)
	if first {
		away.Cause = l.err
	}
	return nil, away
}

// discover fetches what the issuer says of itself. Its context is its own: who asked first may leave, others wait too.
func (l *OIDCLogin) discover() {
	ctx, cancel := context.WithTimeout(context.Background(), loginTimeout)
	defer cancel()
	found, keys := new(loginEndpoint), l.issuer.keys
	err := keys.get(ctx, keys.discovery(), found)
	if err == nil && (found.Issuer != l.cfg.Issuer || !secureURL(withoutQuery(found.AuthURL)) || !secureURL(found.TokenURL)) {
		err = errors.New("it is of another issuer, or names no https URLs to sign in at")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		l.endpoint, l.err = found, nil
	} else {
		l.err = fmt.Errorf("discovery document: %w", err)
		l.pause = min(max(2*l.pause, time.Second), longestPause)
		l.again = time.Now().Add(l.pause)
	}
	close(l.fetching)
	l.fetching = nil
}

func (l *OIDCLogin) away(retry time.Duration, cause error) *IssuerAwayError {
	return &IssuerAwayError{Host: l.Host(), RetryAfter: max(retry, time.Second), Cause: cause}
}

// oauth returns the client for what the issuer says of itself.
func (l *OIDCLogin) oauth(ctx context.Context) (*oauth2.Config, *loginEndpoint, error) {
	found, err := l.known(ctx)
	if err != nil {
		return nil, nil, err
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
// where the caller has no role, with its name; *[IssuerAwayError].
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
		return Caller{}, l.away(keysPause, fmt.Errorf("it does not exchange a code (status %d, %q): look at clientID and clientSecretFile",
			no.Response.StatusCode, no.ErrorCode))
	}
	if err != nil {
		return Caller{}, l.away(keysPause, fmt.Errorf("it does not exchange a code: %w", err))
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
	if errors.Is(err, apikey.ErrUndecided) {
		return Caller{}, l.away(keysPause, err)
	}
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
