package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/portal"
	"keyward/cache"
	"keyward/envoy/check"
	"keyward/envoy/generate"
	"keyward/limits/local"
)

// Config is the whole configuration of keyward serve: one YAML file, then the environment, then flags.
type Config struct {
	Listen          Listen          `yaml:"listen"`
	Store           Store           `yaml:"store"`
	Pepper          PepperFiles     `yaml:"pepper"`
	Credentials     Credentials     `yaml:"credentials"`
	Client          Client          `yaml:"client"`
	Preset          Preset          `yaml:"preset"` // routes of a platform, besides one's own
	Routes          []Route         `yaml:"routes"`
	IgnoreCase      bool            `yaml:"ignoreCase"`    // of the paths of all routes
	DefaultRoute    string          `yaml:"defaultRoute"`  // required | deny
	CORSPreflight   string          `yaml:"corsPreflight"` // deny | allow
	IdentityHeaders IdentityHeaders `yaml:"identityHeaders"`
	Cache           Cache           `yaml:"cache"`
	Concurrency     Concurrency     `yaml:"concurrency"`
	JWT             JWT             `yaml:"jwt"` // callers without a key whom Envoy knows by a token
	RateLimit       RateLimit       `yaml:"rateLimitHeaders"`
	Errors          string          `yaml:"errors"` // rpc | error_response
	Envoy           EnvoyFacts      `yaml:"envoy"`
	OIDC            []OIDCIssuer    `yaml:"oidc"` // who else than holders of a token may use the Management API
	Audit           Audit           `yaml:"audit"`
	Usage           Usage           `yaml:"usage"`
	Alerts          Alerts          `yaml:"alerts"`
	Portal          Portal          `yaml:"portal"`
	Log             Log             `yaml:"log"`
	Tracing         Tracing         `yaml:"tracing"`
	Runtime         Runtime         `yaml:"runtime"`
}

// Listen names keyward's servers.
type Listen struct {
	Check   Listener `yaml:"check"`   // gRPC, for Envoy
	Manage  Listener `yaml:"manage"`  // Management API
	Holders Listener `yaml:"holders"` // what holders of keys may ask; off unless it has an address
	Portal  Listener `yaml:"portal"`  // the portal, for browsers; off unless it has an address
	Metrics Listener `yaml:"metrics"` // Prometheus, health
}

// Store says where keys are kept.
type Store struct {
	SQLite struct {
		Path string `yaml:"path"`
	} `yaml:"sqlite"`
}

// PepperFiles are the files of the pepper in use and, during a rotation, of the one before it.
type PepperFiles struct {
	File         string `yaml:"file"`
	PreviousFile string `yaml:"previousFile"`
}

// Credentials says where a request carries its secret, and how secrets look.
type Credentials struct {
	Headers []string `yaml:"headers"`
	Bearer  *bool    `yaml:"bearer"` // look in Authorization too; true if absent
	Query   string   `yaml:"query"`  // name of a query parameter; "" looks in none
	Prefix  string   `yaml:"prefix"` // first part of every secret
	Realm   string   `yaml:"realm"`  // of the WWW-Authenticate header
	// Foreign are the shapes of secrets that keyward did not make, for keys that were imported.
	Foreign []ForeignShape `yaml:"foreign"`
	// Deprecation tells clients with an older secret than their key's newest so, in the answers they get.
	Deprecation bool `yaml:"deprecation"`
}

// A ForeignShape says how secrets of somebody else look: a prefix and lengths, or a parser that knows them.
type ForeignShape struct {
	Prefix    string `yaml:"prefix"`
	MinLength int    `yaml:"minLength"` // of the whole secret; by default 16 beyond the prefix
	MaxLength int    `yaml:"maxLength"` // by default 512
	Parser    string `yaml:"parser"`    // agentAccessToken; "" by prefix
}

// agentAccessToken is the parser of FoundationaLLM's tokens.
const agentAccessToken = "agentAccessToken"

// format is how secrets look.
func (c *Config) format() apikey.Format {
	f := apikey.Format{First: c.Credentials.Prefix}
	for _, shape := range c.Credentials.Foreign {
		if shape.Parser != "" {
			f.Foreign = append(f.Foreign, apikey.Shape{AgentToken: true, Prefix: shape.Prefix, MinLength: shape.MinLength, MaxLength: shape.MaxLength})
			continue
		}
		f.Foreign = append(f.Foreign, apikey.Shape{
			Prefix: shape.Prefix, MinLength: cmp.Or(shape.MinLength, len(shape.Prefix)+16), MaxLength: cmp.Or(shape.MaxLength, 512),
		})
	}
	return f
}

// Client says which address counts as the client's.
type Client struct {
	Address     string `yaml:"address"` // peer | x-envoy-external-address | xff
	TrustedHops int    `yaml:"trustedHops"`
}

// A Route is a rule for the requests that it matches, in the patterns of Go's http.ServeMux.
type Route struct {
	Host   string  `yaml:"host"`
	Method string  `yaml:"method"`
	Path   string  `yaml:"path"`
	Mode   string  `yaml:"mode"` // required | optional | public
	Scopes strList `yaml:"scopes"`
	// Where the request names its place: "{wildcard}" of the path, "?parameter" of the query, "$.member" of the
	// body, or a literal.
	Instance    strList `yaml:"instance"`
	Agent       strList `yaml:"agent"` // "required": an agent key needs a request that names its agent
	Environment strList `yaml:"environment"`
	// AgentMissing says what becomes of a request that names no agent: require | ignore. By default it is
	// required where the body should name it, and otherwise not.
	AgentMissing string  `yaml:"agentMissing"`
	KeyTypes     strList `yaml:"keyTypes"` // instance, agent, user: the keys that may; all if absent
	Context      string  `yaml:"context"`  // of the quotas that count the requests: service:controller
	Cost         int     `yaml:"cost"`     // units of these quotas for each request; 1 if absent
	Shadow       bool    `yaml:"shadow"`   // scopes that are missing are reported, and refuse nobody
}

// JWT says whose tokens make a principal of a caller without a key, on optional routes.
type JWT struct {
	Issuer   string  `yaml:"issuer"`   // as tokens name it; "": nobody's
	Payload  string  `yaml:"payload"`  // payload_in_metadata of Envoy's jwt_authn provider
	UPNClaim string  `yaml:"upnClaim"` // who is calling
	IDClaim  strList `yaml:"idClaim"`  // its identifier: the first of these that the token has
	Instance string  `yaml:"instance"` // of requests that name none
}

// RateLimit says which headers tell clients of their limits, besides those of a refusal.
type RateLimit struct {
	OnSuccess bool `yaml:"onSuccess"` // RateLimit and RateLimit-Policy on what is let through as well
	Legacy    bool `yaml:"legacy"`    // X-RateLimit-Limit, -Remaining and -Reset beside them
}

// IdentityHeaders name the headers that tell an upstream who is calling; "off" sends none.
type IdentityHeaders struct {
	KeyID      string `yaml:"keyId"`
	KeyType    string `yaml:"keyType"`
	InstanceID string `yaml:"instanceId"`
	Agent      string `yaml:"agent"`
	User       string `yaml:"user"`
	Scopes     string `yaml:"scopes"`
	DecisionID string `yaml:"decisionId"`
	// UserIdentity is FoundationaLLM's JSON; "off" unless it is named, and never taken from clients.
	UserIdentity string `yaml:"userIdentity"`
}

// Cache bounds what is kept in memory and what unknown keys may cost.
type Cache struct {
	Records int              `yaml:"records"` // keys in memory
	Unknown int              `yaml:"unknown"` // digests known to be unknown
	Grace   *apikey.Duration `yaml:"grace"`   // how long known keys are served without the store; 0: not at all
	WarmUp  *apikey.Duration `yaml:"warmUp"`  // how long the start may wait for keys to be loaded; 0: not at all
}

// Concurrency says how keyward learns that requests end, which is what max-concurrent lives on. Server
// and generated configuration read the same.
type Concurrency struct {
	Feedback string `yaml:"feedback"` // als | alsBatched | otlp | otlpBatched | none
	// Wait is how long a request may wait for another of the same key to end; by default just long
	// enough for Envoy's word to arrive.
	Wait       *apikey.Duration `yaml:"wait"`
	RenewEvery apikey.Duration  `yaml:"renewEvery"` // how often Envoy says that a request still runs
	TTL        apikey.Duration  `yaml:"ttl"`        // how long a lease lives of which nothing is heard; 0: 3.5 × renewEvery
}

// wait returns the wait in force.
func (c Concurrency) wait() time.Duration {
	if c.Wait != nil {
		return c.Wait.Std()
	}
	switch generate.Feedback(c.Feedback) {
	case generate.FeedbackALS, generate.FeedbackOTLP:
		return 5 * time.Millisecond
	case generate.FeedbackALSBatched, generate.FeedbackOTLPBatched:
		return 30 * time.Millisecond
	}
	return 0 // nobody will say that a place is free
}

func (c Concurrency) validate() error {
	var faults []error
	fault := func(field, reason string) { faults = append(faults, apikey.Invalid("concurrency."+field, reason)) }
	if !slices.Contains(generate.Feedbacks(), generate.Feedback(c.Feedback)) {
		fault("feedback", "must be als, alsBatched, otlp, otlpBatched or none")
	}
	if c.Wait != nil && (*c.Wait < 0 || c.Wait.Std() > time.Minute) {
		fault("wait", "must be from 0s to 1m")
	}
	if c.RenewEvery.Std() < 100*time.Millisecond || c.RenewEvery.Std() > time.Hour {
		fault("renewEvery", "must be from 100ms to 1h")
	}
	switch ttl := c.TTL.Std(); {
	case ttl < 0:
		fault("ttl", "must be a positive duration")
	case ttl == 0 && c.Feedback == string(generate.FeedbackNone):
		fault("ttl", "is needed with feedback: none. Nobody says then that a request ended, so every request counts for exactly that long")
	case ttl > 0 && c.Feedback != string(generate.FeedbackNone) && ttl < 2*c.RenewEvery.Std():
		fault("ttl", "must be at least 2 × renewEvery, or requests that still run would be forgotten")
	}
	return errors.Join(faults...)
}

// connectionIdle is how long a connection may be open without a call: longer than a lease lives, because
// those that were granted by it are shortened when it ends.
func (c Concurrency) connectionIdle() time.Duration {
	return max(connectionIdle, c.TTL.Std(), 4*c.RenewEvery.Std())
}

// leases translates what concerns running requests.
func (c Concurrency) leases() local.Config {
	return local.Config{RenewEvery: c.RenewEvery.Std(), TTL: c.TTL.Std()}
}

// EnvoyFacts is what keyward has to know of the Envoys that ask it.
type EnvoyFacts struct {
	MinVersion string `yaml:"minVersion"` // e.g. "1.37"; needed for errors: error_response
	// MaxRequestBytes is how much of a body Envoy sends, on routes that look at it. A longer one cannot be judged.
	MaxRequestBytes int `yaml:"maxRequestBytes"`
}

// An OIDCIssuer is who may say, in signed tokens, who a caller of the Management API is.
type OIDCIssuer struct {
	Issuer     string   `yaml:"issuer"` // as tokens name it
	Audience   string   `yaml:"audience"`
	Algorithms []string `yaml:"algorithms"` // asymmetric only; RS256 if empty
	JWKSURL    string   `yaml:"jwksURL"`    // "": where the issuer's discovery document says
	// Roles are tried in order, and the first that fits decides. There is no role for who fits none.
	Roles     []OIDCRole `yaml:"roles"`
	UPNClaim  string     `yaml:"upnClaim"`
	UPNSuffix string     `yaml:"upnSuffix"` // e.g. "@example.com"; needed where there are several issuers
	Nonce     string     `yaml:"nonce"`     // refused | ignored; "": refused
}

// An OIDCRole gives a role to who has a claim with a value.
type OIDCRole struct {
	Claim         string `yaml:"claim"` // a name, or a JSON pointer such as /realm_access/roles
	Value         string `yaml:"value"` // exactly; "*" for any, except for owner
	Role          string `yaml:"role"`
	Instance      string `yaml:"instance"`      // the one instance that it is for; all if neither is set
	InstanceClaim string `yaml:"instanceClaim"` // the claim that names it
}

// Audit says how long the audit is kept.
type Audit struct {
	Keep apikey.Duration `yaml:"keep"` // at least; 0: for good
}

// Usage says what is counted of requests, and how long that is kept. When keys were last used is kept always.
type Usage struct {
	Enabled     *bool           `yaml:"enabled"`     // true if absent; instances can say no for themselves
	KeepMinutes apikey.Duration `yaml:"keepMinutes"` // counts by minute
	KeepHours   apikey.Duration `yaml:"keepHours"`
	KeepDays    apikey.Duration `yaml:"keepDays"`
}

const (
	oneDay       = apikey.Duration(24 * time.Hour)
	minKeepUsage = time.Hour
	maxKeepUsage = 3650 * 24 * time.Hour
)

func (u Usage) validate() error {
	var faults []error
	for _, keep := range []struct {
		field string
		apikey.Duration
	}{{"keepMinutes", u.KeepMinutes}, {"keepHours", u.KeepHours}, {"keepDays", u.KeepDays}} {
		if keep.Std() < minKeepUsage || keep.Std() > maxKeepUsage {
			faults = append(faults, apikey.Invalid("usage."+keep.field, "must be from 1h to 3650d"))
		}
	}
	return errors.Join(faults...)
}

// keep is how long the counts of each interval are kept.
func (u Usage) keep() map[admin.UsageInterval]time.Duration {
	return map[admin.UsageInterval]time.Duration{
		admin.UsageMinute: u.KeepMinutes.Std(), admin.UsageHour: u.KeepHours.Std(), admin.UsageDay: u.KeepDays.Std(),
	}
}

// Portal says how long people stay signed in.
type Portal struct {
	Idle apikey.Duration `yaml:"idle"` // without doing anything
	Most apikey.Duration `yaml:"most"` // in any case
	// OIDC signs people in with an issuer, besides with tokens.
	OIDC PortalOIDC `yaml:"oidc"`
}

// PortalOIDC is how the portal is known to an issuer.
type PortalOIDC struct {
	Issuer           string `yaml:"issuer"` // one of those in oidc; "": nobody signs in so
	ClientID         string `yaml:"clientID"`
	ClientSecretFile string `yaml:"clientSecretFile"` // "": the client is a public one
	RedirectURL      string `yaml:"redirectURL"`      // https://portal.example/sign-in/oidc/back
}

// login returns how people sign in by OIDC; nil if they do not. issuers are the configuration's.
func (p PortalOIDC) login(issuers *admin.OIDC, secret apikey.Secret) (*admin.OIDCLogin, error) {
	if p == (PortalOIDC{}) {
		return nil, nil
	}
	return admin.NewOIDCLogin(issuers, admin.OIDCLoginConfig{Issuer: p.Issuer, ClientID: p.ClientID, ClientSecret: secret, RedirectURL: p.RedirectURL})
}

func (p Portal) validate() error {
	var faults []error
	for field, d := range map[string]apikey.Duration{"portal.idle": p.Idle, "portal.most": p.Most} {
		if d.Std() < time.Minute || d.Std() > 30*24*time.Hour {
			faults = append(faults, apikey.Invalid(field, "must be from 1m to 30d"))
		}
	}
	return errors.Join(faults...)
}

// Log says what is logged, to standard error.
type Log struct {
	Level              string `yaml:"level"`              // debug | info | warn | error
	Format             string `yaml:"format"`             // json | text
	DecisionsPerSecond *int   `yaml:"decisionsPerSecond"` // at most; 0: none
}

// defaultConfig holds the defaults that config print shows.
func defaultConfig() Config {
	yes, perSecond := true, 10
	grace, warmUp := apikey.Duration(cache.DefaultGrace), apikey.Duration(cache.DefaultWarmUp)
	return Config{
		Listen: Listen{
			// Each thread of an Envoy keeps one connection, and its health checks one more.
			Check:   Listener{Address: "127.0.0.1:9191", MaxConnections: 4096},
			Manage:  Listener{Address: "127.0.0.1:9192", MaxConnections: 512},
			Holders: Listener{MaxConnections: 512},
			Portal:  Listener{MaxConnections: 512},
			Metrics: Listener{Address: "127.0.0.1:9193", MaxConnections: 512},
		},
		Credentials:   Credentials{Headers: authz.DefaultCredentialHeaders, Bearer: &yes, Prefix: apikey.DefaultFirst, Realm: "keyward"},
		Client:        Client{Address: string(authz.ClientPeer)},
		DefaultRoute:  "required",
		CORSPreflight: "deny",
		IdentityHeaders: IdentityHeaders{
			KeyID: check.DefaultIdentity.KeyID, KeyType: check.DefaultIdentity.KeyType,
			InstanceID: check.DefaultIdentity.InstanceID, Agent: check.DefaultIdentity.Agent,
			User: check.DefaultIdentity.User, Scopes: check.DefaultIdentity.Scopes,
			DecisionID: check.DefaultIdentity.DecisionID, UserIdentity: check.Off,
		},
		Cache:       Cache{Records: 1_000_000, Unknown: 65_536, Grace: &grace, WarmUp: &warmUp},
		Concurrency: Concurrency{Feedback: string(generate.FeedbackALS), RenewEvery: apikey.Duration(generate.DefaultRenewEvery)},
		Preset:      Preset{Mode: authz.Required.String()},
		JWT:         JWT{UPNClaim: authz.DefaultUPNClaim, IDClaim: authz.DefaultIDClaims},
		Usage:       Usage{Enabled: new(true), KeepMinutes: 2 * oneDay, KeepHours: 90 * oneDay, KeepDays: 800 * oneDay},
		Alerts:      defaultAlerts(),
		Envoy:       EnvoyFacts{MaxRequestBytes: generate.DefaultMaxRequestBytes},

		Errors:  "rpc",
		Tracing: Tracing{Ratio: 0.01},
		Log:     Log{Level: "info", Format: "json", DecisionsPerSecond: &perSecond},
		Portal:  Portal{Idle: apikey.Duration(portal.DefaultIdle), Most: apikey.Duration(portal.DefaultMost)},
		// What lives is the cache, what dies is requests', and marking the cache for their sake is the greater
		// part of collecting: four times as seldom as Go does by itself, a request costs a quarter less.
		Runtime: Runtime{GCPercent: 400, MemoryLimit: "90%"},
	}
}

// maxRequestBytes keeps a Check far below what gRPC takes.
const maxRequestBytes = 1 << 20

// validate reports every fault at once.
func (c *Config) validate() error {
	faults := []error{
		c.Listen.Check.validate("listen.check"),
		c.Listen.Manage.validate("listen.manage"),
		c.Listen.Holders.validate("listen.holders"),
		c.Listen.Portal.validate("listen.portal"),
		c.Listen.Metrics.validate("listen.metrics"),
		c.Portal.validate(),
		c.Concurrency.validate(),
		c.Runtime.validate(),
		c.Preset.validate(),
		c.Tracing.validate(),
		c.Usage.validate(),
		c.Alerts.validate(),
		oneOf("defaultRoute", c.DefaultRoute, "required", "deny"),
		oneOf("corsPreflight", c.CORSPreflight, "deny", "allow"),
		oneOf("errors", c.Errors, "rpc", "error_response"),
		oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error"),
		oneOf("log.format", c.Log.Format, "json", "text"),
		c.checkConfig().Validate(),
	}
	fault := func(field, reason string) { faults = append(faults, apikey.Invalid(field, reason)) }
	if c.Listen.Check.Address == "" {
		fault("listen.check.address", "is missing: Envoy has to reach keyward somewhere")
	}
	if c.Store.SQLite.Path == "" {
		fault("store.sqlite.path", "is missing: name the file that keys are kept in")
	}
	if c.Pepper.File == "" {
		fault("pepper.file", "is missing: keyward pepper new --out FILE makes one")
	}
	if c.Cache.Records < 1 {
		fault("cache.records", "must be at least 1")
	}
	if c.Cache.Unknown < 1 {
		fault("cache.unknown", "must be at least 1")
	}
	if c.Cache.Grace != nil && *c.Cache.Grace < 0 {
		fault("cache.grace", "must be 0 or a positive duration such as 30s")
	}
	if c.Cache.WarmUp != nil && *c.Cache.WarmUp < 0 {
		fault("cache.warmUp", "must be 0 or a positive duration such as 60s")
	}
	if n := c.Log.DecisionsPerSecond; n != nil && *n < 0 {
		fault("log.decisionsPerSecond", "must be 0 or more")
	}
	if c.Errors == "error_response" && !atLeast(c.Envoy.MinVersion, 1, 37) {
		fault("errors", "error_response needs envoy.minVersion 1.37 or newer: older Envoys make a 403 of it")
	}
	if v := c.Envoy.MinVersion; v != "" && !atLeast(v, 0, 0) {
		fault("envoy.minVersion", "must be a version such as \"1.37\"")
	}
	if n := c.Envoy.MaxRequestBytes; n < 1 || n > maxRequestBytes {
		fault("envoy.maxRequestBytes", "must be from 1 to 1048576")
	}
	if keep := c.Audit.Keep.Std(); keep != 0 && keep < 24*time.Hour {
		fault("audit.keep", "must be at least 1d, or 0 to keep it for good")
	}
	issuers, err := c.oidc()
	faults = append(faults, err)
	if err == nil {
		_, err = c.Portal.OIDC.login(issuers, apikey.Secret{})
		faults = append(faults, err)
	}
	identity := check.Identity(c.IdentityHeaders).Names()
	for _, name := range identity {
		if generate.Reserved(name) || name == "authorization" {
			fault("identityHeaders", "has a name with a meaning of its own, such as host: it cannot be taken away from clients")
		}
	}
	for _, h := range c.Credentials.Headers {
		if generate.Reserved(h) {
			fault("credentials.headers", "has a name with a meaning of its own, such as cookie or host: it cannot be taken away from clients")
		}
		if h == "" || strings.Trim(h, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || h == "authorization" {
			fault("credentials.headers", "must be names of lower-case letters, digits and -, other than authorization")
		} else if slices.Contains(identity, h) {
			fault("credentials.headers", "has a name that identityHeaders has too: what a client sends there must not come to look like what keyward says")
		}
	}
	for i, shape := range c.Credentials.Foreign {
		if shape.Parser != "" && shape.Parser != agentAccessToken {
			fault(fmt.Sprintf("credentials.foreign[%d].parser", i), "must be agentAccessToken, or absent")
		}
	}
	if bad, ok := errors.AsType[*apikey.InvalidError](c.format().Validate()); ok {
		fault("credentials."+bad.Field, bad.Reason)
	}
	// authz stops at its first fault, so it is asked about one thing at a time.
	cfg, err := c.authorizer()
	faults = append(faults, err,
		authz.Config{ClientAddress: cfg.ClientAddress, TrustedHops: cfg.TrustedHops}.Validate(),
		authz.Config{JWT: cfg.JWT}.Validate())
	if err == nil {
		faults = append(faults, authz.Config{Rules: cfg.Rules, IgnoreCase: cfg.IgnoreCase}.Validate())
	}
	return errors.Join(faults...)
}

func oneOf(field, value string, words ...string) error {
	if slices.Contains(words, value) {
		return nil
	}
	return apikey.Invalid(field, "must be "+strings.Join(words[:len(words)-1], ", ")+" or "+words[len(words)-1])
}

func atLeast(version string, major, minor int) bool {
	var gotMajor, gotMinor int
	if n, _ := fmt.Sscanf(version, "%d.%d", &gotMajor, &gotMinor); n != 2 {
		return false
	}
	return gotMajor > major || gotMajor == major && gotMinor >= minor
}

// authorizer translates what concerns decisions; it can be replaced while serving.
func (c *Config) authorizer() (authz.Config, error) {
	out := authz.Config{
		Credentials: authz.Credentials{
			Headers:        c.Credentials.Headers,
			NoBearer:       c.Credentials.Bearer != nil && !*c.Credentials.Bearer,
			QueryParameter: c.Credentials.Query,
			Format:         c.format(),
		},
		IgnoreCase:    c.IgnoreCase,
		DenyUnrouted:  c.DefaultRoute == "deny",
		AllowCORS:     c.CORSPreflight == "allow",
		ClientAddress: authz.ClientAddress(c.Client.Address),
		TrustedHops:   c.Client.TrustedHops,
		LeaseWait:     c.Concurrency.wait(),
		ShowLimits:    c.RateLimit.OnSuccess,
	}
	if c.JWT.Issuer != "" || c.JWT.Payload != "" || c.JWT.Instance != "" {
		out.JWT = authz.JWT{Issuer: c.JWT.Issuer, Payload: c.JWT.Payload, UPNClaim: c.JWT.UPNClaim, IDClaims: c.JWT.IDClaim, Instance: c.JWT.Instance}
	}
	var faults []error
	for i, route := range c.Routes {
		rule, err := route.rule()
		if err != nil {
			faults = append(faults, fmt.Errorf("routes[%d]: %w", i, err))
		}
		out.Rules = append(out.Rules, rule)
	}
	return out, errors.Join(faults...)
}

func (r Route) rule() (authz.Rule, error) {
	rule := authz.Rule{Host: r.Host, Method: r.Method, Path: r.Path, Context: r.Context, Cost: r.Cost, Shadow: r.Shadow}
	var faults []error
	var err error
	if rule.Mode, err = authz.ParseMode(r.Mode); err != nil {
		faults = append(faults, err)
	}
	if rule.Scopes, err = apikey.ParseScopes(r.Scopes); err != nil {
		faults = append(faults, fmt.Errorf("scopes: %w", err))
	}
	sources := func(field string, list []string) (parsed []authz.Source) {
		for _, s := range list {
			source, err := authz.ParseSource(s)
			if err != nil {
				faults = append(faults, fmt.Errorf("%s: %w", field, err))
			}
			parsed = append(parsed, source)
		}
		return parsed
	}
	agents := slices.Clone(r.Agent)
	if i := slices.Index(agents, "required"); i >= 0 {
		rule.AgentRequired = true
		agents = slices.Delete(agents, i, i+1)
	}
	for _, t := range r.KeyTypes {
		rule.KeyTypes = append(rule.KeyTypes, apikey.Type(t))
	}
	rule.Instance = sources("instance", r.Instance)
	rule.Agent = sources("agent", agents)
	rule.Environment = sources("environment", r.Environment)
	switch r.AgentMissing {
	case "":
		rule.AgentNeeded = slices.ContainsFunc(rule.Agent, authz.Source.InBody)
	case "require":
		rule.AgentNeeded = true
	case "ignore":
	default:
		faults = append(faults, errors.New("agentMissing must be require or ignore"))
	}
	return rule, errors.Join(faults...)
}

// oidc translates the issuers; nil where there are none. Nothing is fetched yet.
func (c *Config) oidc() (*admin.OIDC, error) {
	if len(c.OIDC) == 0 {
		return nil, nil
	}
	var faults []error
	var issuers []admin.OIDCIssuer
	for i, one := range c.OIDC {
		if one.Nonce != "" {
			faults = append(faults, oneOf(fmt.Sprintf("oidc[%d].nonce", i), one.Nonce, "refused", "ignored"))
		}
		issuer := admin.OIDCIssuer{
			Issuer: one.Issuer, Audience: one.Audience, Algorithms: one.Algorithms, JWKSURL: one.JWKSURL,
			UPNClaim: one.UPNClaim, UPNSuffix: one.UPNSuffix, AllowNonce: one.Nonce == "ignored",
		}
		for _, r := range one.Roles {
			issuer.Rules = append(issuer.Rules, admin.OIDCRule{
				Claim: r.Claim, Value: r.Value, Role: admin.Role(r.Role), InstanceID: r.Instance, InstanceClaim: r.InstanceClaim,
			})
		}
		issuers = append(issuers, issuer)
	}
	issuersOf, err := admin.NewOIDC(issuers, nil)
	return issuersOf, errors.Join(append(faults, err)...)
}

// checkConfig translates what concerns answers to Envoy.
func (c *Config) checkConfig() check.Config {
	return check.Config{
		Identity:      check.Identity(c.IdentityHeaders),
		Realm:         c.Credentials.Realm,
		Format:        c.format(),
		ErrorResponse: c.Errors == "error_response",
		Deprecation:   c.Credentials.Deprecation,
		MaxBody:       c.Envoy.MaxRequestBytes,

		LegacyRateLimit: c.RateLimit.Legacy,
		LogPerSecond:    *c.Log.DecisionsPerSecond,
		Timeout:         c.Concurrency.wait() + time.Second, // a wait that was asked for is not cut short
	}
}

// cacheConfig translates what concerns the cache.
func (c *Config) cacheConfig() cache.Config {
	return cache.Config{Records: c.Cache.Records, Unknown: c.Cache.Unknown, Grace: c.Cache.Grace.Std(), WarmUp: c.Cache.WarmUp.Std()}
}

func (c *Config) logLevel() slog.Level {
	var level slog.Level
	_ = level.UnmarshalText([]byte(c.Log.Level)) // validated
	return level
}
