package main

import (
	"encoding/json"
	"errors"
	"maps"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.yaml.in/yaml/v3"

	"keyward/authz/apikey"
)

// canary stands in fixtures and cases wherever a value is wrong: it could be a secret, so nothing shows it.
const canary = "c4n4ry"

// smallest is all that a configuration needs.
const smallest = "store: {sqlite: {path: keyward.db}}\npepper: {file: pepper}\n"

// load reads a configuration as a command would, and returns its faults one by one.
func load(t *testing.T, text string, environ, settings []string) (*Config, []string) {
	t.Helper()
	cfg, err := loadConfig("-", strings.NewReader(text), environ, settings)
	return cfg, faultsOf(t, err)
}

func faultsOf(t *testing.T, err error) []string {
	t.Helper()
	if err == nil {
		return nil
	}
	if code := exitCode(err); code != exitUsage {
		t.Errorf("%v: exit code %d, want %d", err, code, exitUsage)
	}
	if strings.Contains(err.Error(), canary) {
		t.Errorf("the error shows a value:\n%v", err)
	}
	lines := strings.Split(err.Error(), "\n")
	if len(lines) < 2 || lines[0] != "configuration:" {
		t.Errorf("got %q, want a heading and faults", lines)
	}
	return lines[1:]
}

// TestConfigFiles reads the fixtures: a bad one says in its last lines all the faults that it has, in
// order, and a good one has none.
func TestConfigFiles(t *testing.T) {
	files, err := filepath.Glob("testdata/config/*.yaml")
	if err != nil || len(files) < 15 {
		t.Fatalf("got %d fixtures, %v", len(files), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		t.Run(name, func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for line := range strings.Lines(string(text)) {
				if fault, ok := strings.CutPrefix(strings.TrimSpace(line), "# want: "); ok {
					want = append(want, fault)
				}
			}
			if strings.HasPrefix(name, "good_") != (want == nil) {
				t.Fatal("the fixture's name and its last lines say different things")
			}
			_, err = loadConfig(file, nil, nil, nil)
			got := faultsOf(t, err)
			if len(got) > 0 && got[0] == file+":" {
				got = got[1:]
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestNoFileIsTheDefaultsAndAnEmptyOneIsAFault(t *testing.T) {
	settings := []string{"store.sqlite.path=k.db", "pepper.file=p"}
	want := defaultConfig()
	want.Store.SQLite.Path, want.Pepper.File = "k.db", "p"
	wait := apikey.Duration(5 * time.Millisecond)
	want.Concurrency.Wait = &wait
	if cfg, err := loadConfig("", nil, nil, settings); err != nil {
		t.Error(err)
	} else if diff := cmp.Diff(&want, cfg); diff != "" {
		t.Errorf("no file: %s", diff)
	}
	if cfg, faults := load(t, "{}", nil, settings); faults != nil {
		t.Error(faults)
	} else if diff := cmp.Diff(&want, cfg); diff != "" {
		t.Errorf("{}: %s", diff)
	}
	for name, text := range map[string]string{"no byte": "", "a comment": "# nothing\n", "an empty document": "---\n", "null": "~\n"} {
		if cfg, faults := load(t, text, nil, settings); faults == nil {
			t.Errorf("%s: accepted as %+v", name, cfg)
		}
	}
}

func TestLargeConfig(t *testing.T) {
	comment := "# " + strings.Repeat("x", 1022-1) + "\n" // 1 KiB
	for kib, want := range map[int]string{4 << 10: "configuration: - is larger than 4 MiB", 4<<10 - 1: ""} {
		_, err := loadConfig("-", strings.NewReader(smallest+strings.Repeat(comment, kib)), nil, nil)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%d KiB: got %q, want %q", kib, got, want)
		}
	}
	if _, err := loadConfig("-", strings.NewReader(strings.Repeat("- ", 5<<20)), nil, nil); exitCode(err) != exitUsage {
		t.Errorf("5 MiB on standard input: %v", err)
	}
	if _, err := loadConfig(filepath.Join(t.TempDir(), "none.yaml"), nil, nil, nil); exitCode(err) != exitUsage || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("no file: %v", err)
	}
	// As deep as it can be written: refused, not a stack that grows without end.
	if _, faults := load(t, strings.Repeat("[", 1<<20), nil, nil); faults == nil {
		t.Error("a million brackets are a configuration")
	}
}

// leaves are the fields that environment and --set can set, by path.
func leaves(t *testing.T, cfg *Config) map[string]reflect.Value {
	t.Helper()
	fields := map[string]reflect.Value{}
	collectFields(reflect.ValueOf(cfg).Elem(), "", fields)
	maps.DeleteFunc(fields, func(_ string, v reflect.Value) bool { return v.Kind() == reflect.Slice })
	if len(fields) < 35 {
		t.Fatalf("only %d fields", len(fields))
	}
	return fields
}

func leafText(t *testing.T, v reflect.Value) string {
	t.Helper()
	text, err := yaml.Marshal(v.Interface())
	if err != nil {
		t.Fatal(err)
	}
	var s string // without yaml's quotes
	if err := yaml.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestEveryFieldHasAnEnvironmentVariable sets each field of the whole fixture by its variable, and all by --set,
// and gets what the file gives.
func TestEveryFieldHasAnEnvironmentVariable(t *testing.T) {
	want, err := loadConfig("testdata/config/good_whole.yaml", nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defaults := defaultConfig()
	defaultFields := leaves(t, &defaults)
	var environ, settings []string
	names := map[string]string{}
	for path, field := range leaves(t, want) {
		name := envName(path)
		if other, taken := names[name]; taken {
			t.Errorf("%s is the variable of %s and of %s", name, path, other)
		}
		names[name] = path
		if strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_") != "" || !strings.HasPrefix(name, "KEYWARD_") || strings.Contains(name, "__") {
			t.Errorf("%s: %s is no such name", path, name)
		}
		if slices.Contains(clientEnv, name) {
			t.Errorf("%s is a variable of the client's too", name)
		}
		if reflect.DeepEqual(field.Interface(), defaultFields[path].Interface()) {
			t.Errorf("the fixture leaves %s at its default: then this test proves nothing", path)
		}
		environ = append(environ, name+"="+leafText(t, field))
		settings = append(settings, path+"="+leafText(t, field))
	}
	for path, name := range map[string]string{
		"listen.check.tls.clientCAFile": "KEYWARD_LISTEN_CHECK_TLS_CLIENT_CA_FILE",
		"listen.check.tls.certFile":     "KEYWARD_LISTEN_CHECK_TLS_CERT_FILE",
		"store.sqlite.path":             "KEYWARD_STORE_SQLITE_PATH",
		"defaultRoute":                  "KEYWARD_DEFAULT_ROUTE",
		"corsPreflight":                 "KEYWARD_CORS_PREFLIGHT",
		"log.decisionsPerSecond":        "KEYWARD_LOG_DECISIONS_PER_SECOND",
		"identityHeaders.keyId":         "KEYWARD_IDENTITY_HEADERS_KEY_ID",
	} {
		if names[name] != path {
			t.Errorf("%s sets %q, want %s", name, names[name], path)
		}
	}
	// Lists are in the file only.
	lists := `
listen:
  check: {tls: {clientNames: [envoy.example, "spiffe://example/envoy"]}}
  manage: {tls: {clientNames: [admin.example]}}
  holders: {tls: {clientNames: [holder.example]}}
  portal: {tls: {clientNames: [person.example]}}
  metrics: {tls: {clientNames: [prometheus.example]}}
credentials: {headers: [x-token]}
routes:
  - {host: app.example, method: GET, path: "/tenants/{tenant}/orders", mode: optional, scopes: "orders:read",
     instance: "{tenant}", agent: [required, "?agent", "$.agent_name"], environment: prod,
     agentMissing: ignore, context: "shop:orders", cost: 3, shadow: true, keyTypes: [user, agent]}
jwt: {idClaim: uid}
oidc:
  - {issuer: "https://login.example/v2.0", audience: "api://keyward", algorithms: [RS256, ES256], jwksURL: "https://login.example/keys", nonce: ignored,
     upnClaim: email, upnSuffix: "@example.com",
     roles: [{claim: roles, value: keyward-owner, role: owner}, {claim: /realm/roles, value: "*", role: user, instance: demo},
       {claim: groups, value: ops, role: operator, instanceClaim: tenant}]}
`
	for how, got := range map[string]func() (*Config, []string){
		"environment": func() (*Config, []string) { return load(t, lists, environ, nil) },
		"--set":       func() (*Config, []string) { return load(t, lists, nil, settings) },
	} {
		cfg, faults := got()
		if faults != nil {
			t.Errorf("%s: %q", how, faults)
		} else if diff := cmp.Diff(want, cfg); diff != "" {
			t.Errorf("%s: %s", how, diff)
		}
	}
}

func TestEnvironmentAndSettings(t *testing.T) {
	for name, test := range map[string]struct {
		environ, settings []string
		want              []string
	}{
		"others' variables":      {environ: []string{"PATH=/bin", "HOME", "XKEYWARD_LOG_LEVEL=debug", "keyward_log_level=" + canary}},
		"the client's variables": {environ: []string{"KEYWARD_SERVER=http://" + canary, "KEYWARD_TOKEN_FILE=/" + canary}},
		"unknown variables": {
			environ: []string{"KEYWARD_LOG_LEVELS=" + canary, "KEYWARD_WHATEVER_ELSE_THERE_IS=" + canary, "KEYWARD_=" + canary, "KEYWARD_TOKEN_FIL=" + canary},
			want: []string{
				`environment: KEYWARD_LOG_LEVELS sets nothing; did you mean "KEYWARD_LOG_LEVEL"?`,
				`environment: KEYWARD_WHATEVER_ELSE_THERE_IS sets nothing`,
				`environment: KEYWARD_ sets nothing`,
				`environment: KEYWARD_TOKEN_FIL sets nothing; did you mean "KEYWARD_TOKEN_FILE"?`,
			},
		},
		"lists": {
			environ:  []string{"KEYWARD_CREDENTIALS_HEADERS=" + canary, "KEYWARD_ROUTES=" + canary},
			settings: []string{"routes=" + canary, "listen.check.tls.clientNames=" + canary},
			want: []string{
				`environment: KEYWARD_CREDENTIALS_HEADERS: is a list: lists are set in the file only`,
				`environment: KEYWARD_ROUTES: is a list: lists are set in the file only`,
				`--set: routes: is a list: lists are set in the file only`,
				`--set: listen.check.tls.clientNames: is a list: lists are set in the file only`,
			},
		},
		"wrong values": {
			environ:  []string{"KEYWARD_CACHE_RECORDS=" + canary, "KEYWARD_CACHE_UNKNOWN=", "KEYWARD_CACHE_GRACE=" + canary, "KEYWARD_IGNORE_CASE=yes", "KEYWARD_CREDENTIALS_BEARER"},
			settings: []string{"log.decisionsPerSecond=~", "client.trustedHops=0x" + canary, "cache.grace="},
			want: []string{
				`environment: KEYWARD_CACHE_RECORDS: must be a whole number`,
				`environment: KEYWARD_CACHE_UNKNOWN: must be a whole number`,
				`environment: KEYWARD_CACHE_GRACE: must be a duration such as 90s, 24h or 30d`,
				`environment: KEYWARD_IGNORE_CASE: must be true or false`,
				`environment: KEYWARD_CREDENTIALS_BEARER: must be true or false`,
				`--set: log.decisionsPerSecond: must be a whole number`,
				`--set: client.trustedHops: must be a whole number`,
				`--set: cache.grace: must be a duration such as 90s, 24h or 30d`,
			},
		},
		"wrong settings": {
			settings: []string{canary, "log.levle=" + canary, "log=" + canary},
			want: []string{
				`--set: must be path=value, such as log.level=debug`,
				`--set: there is no field "log.levle"; did you mean "log.level"?`,
				`--set: there is no field "log"`,
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, got := load(t, smallest, test.environ, test.settings)
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestPrecedence(t *testing.T) {
	file := smallest + "log: {level: warn}\n"
	for _, test := range []struct {
		text              string
		environ, settings []string
		want              string
	}{
		{text: smallest, want: "info"},
		{text: file, want: "warn"},
		{text: file, environ: []string{"KEYWARD_LOG_LEVEL=error"}, want: "error"},
		{text: file, settings: []string{"log.level=debug"}, want: "debug"},
		{text: file, environ: []string{"KEYWARD_LOG_LEVEL=error"}, settings: []string{"log.level=debug"}, want: "debug"},
		{text: file, settings: []string{"log.level=error", "log.level=debug"}, want: "debug"},
		{text: smallest, environ: []string{"KEYWARD_LOG_LEVEL=error"}, want: "error"},
	} {
		cfg, faults := load(t, test.text, test.environ, test.settings)
		if faults != nil || cfg.Log.Level != test.want {
			t.Errorf("%+v: got %v, %q", test, cfg, faults)
		}
	}
}

// TestFaultsOfAllPartsAreReported mixes faults of file, environment and settings.
func TestFaultsOfAllPartsAreReported(t *testing.T) {
	_, got := load(t, "logs: 1\n", []string{"KEYWARD_SOMETHING_ELSE=1"}, []string{"y=1"})
	want := []string{
		"-:", `line 1: there is no field "logs" here; did you mean "log"?`,
		"environment: KEYWARD_SOMETHING_ELSE sets nothing", `--set: there is no field "y"`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// withLogin spoils a sign-in by OIDC that is good otherwise.
func withLogin(spoil func(*PortalOIDC)) func(*Config) {
	return func(c *Config) {
		if c.OIDC == nil {
			c.OIDC = []OIDCIssuer{{Issuer: "https://login.example", Audience: "keyward", Roles: []OIDCRole{{Claim: "roles", Value: "ops", Role: "operator"}}}}
			c.Portal.OIDC = PortalOIDC{Issuer: "https://login.example", ClientID: "portal", RedirectURL: "https://keys.example/sign-in/oidc/back"}
		}
		spoil(&c.Portal.OIDC)
	}
}

// TestValidation breaks one field at a time, and then all together.
func TestValidation(t *testing.T) {
	faults := []struct {
		field string // that the fault names
		spoil func(*Config)
	}{
		{"listen.check.address", func(c *Config) { c.Listen.Check.Address = "" }},
		{"listen.check.address", func(c *Config) { c.Listen.Check.Address = canary }},
		{"listen.check.address", func(c *Config) { c.Listen.Check.Address = "unix://" + canary }},
		{"listen.check.tls", func(c *Config) {
			c.Listen.Check.Address, c.Listen.Check.TLS = "unix:///run/x", TLS{CertFile: canary, KeyFile: canary}
		}},
		{"listen.manage.address", func(c *Config) { c.Listen.Manage.Address = canary }},
		{"listen.manage.tls", func(c *Config) { c.Listen.Manage.TLS.CertFile = canary }},
		{"listen.manage.tls", func(c *Config) { c.Listen.Manage.TLS.KeyFile = canary }},
		{"listen.holders.address", func(c *Config) { c.Listen.Holders.Address = canary }},
		{"listen.portal.address", func(c *Config) { c.Listen.Portal.Address = canary }},
		{"portal.idle", func(c *Config) { c.Portal.Idle = 0 }},
		{"portal.most", func(c *Config) { c.Portal.Most = -1 }},
		{"listen.metrics.address", func(c *Config) { c.Listen.Metrics.Address = canary }},
		{"listen.metrics.tls", func(c *Config) { c.Listen.Metrics.TLS.ClientCAFile = canary }},
		{"listen.metrics.tls.clientNames", func(c *Config) { c.Listen.Metrics.TLS.ClientNames = []string{canary} }},
		{"store.sqlite.path", func(c *Config) { c.Store.SQLite.Path = "" }},
		{"pepper.file", func(c *Config) { c.Pepper.File = "" }},
		{"credentials.headers", func(c *Config) { c.Credentials.Headers = []string{"X-" + canary} }},
		{"credentials.headers", func(c *Config) { c.Credentials.Headers = []string{""} }},
		{"credentials.headers", func(c *Config) { c.Credentials.Headers = []string{canary + " "} }},
		{"credentials.headers", func(c *Config) { c.Credentials.Headers = []string{"authorization"} }},
		{"credentials.headers", func(c *Config) { c.Credentials.Headers = []string{"x-keyward-user"} }},
		{"credentials.headers", func(c *Config) { c.Credentials.Headers = []string{"cookie"} }},
		{"identityHeaders", func(c *Config) { c.IdentityHeaders.User = "host" }},
		{"concurrency.wait", func(c *Config) { d := apikey.Duration(-1); c.Concurrency.Wait = &d }},
		{"concurrency.renewEvery", func(c *Config) { c.Concurrency.RenewEvery = 0 }},
		{"concurrency.ttl", func(c *Config) { c.Concurrency.Feedback = "none" }},
		{"concurrency.ttl", func(c *Config) { c.Concurrency.TTL = apikey.Duration(time.Second) }},
		{"concurrency.ttl", func(c *Config) { c.Concurrency.TTL = -1 }},
		{"concurrency.feedback", func(c *Config) { c.Concurrency.Feedback = canary }},
		{"credentials.foreign", func(c *Config) { c.Credentials.Foreign = []ForeignShape{{Prefix: "a b" + canary}} }},
		{"credentials.foreign", func(c *Config) { c.Credentials.Foreign = []ForeignShape{{}} }},
		{"credentials.foreign", func(c *Config) { c.Credentials.Foreign = []ForeignShape{{Parser: "agentAccessToken", MinLength: 9}} }},
		{"credentials.foreign[0].parser", func(c *Config) { c.Credentials.Foreign = []ForeignShape{{Parser: canary}} }},
		{"credentials.prefix", func(c *Config) { c.Credentials.Prefix = "Not_" + canary }},
		{"credentials.realm", func(c *Config) { c.Credentials.Realm = `"` + canary }},
		{"client.address", func(c *Config) { c.Client.Address = canary }},
		{"client.trustedHops", func(c *Config) { c.Client.TrustedHops = 1 }},
		{"client.trustedHops", func(c *Config) { c.Client.Address, c.Client.TrustedHops = "xff", -1 }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "no slash"}} }},
		{"routes[1]", func(c *Config) { c.Routes = []Route{{Path: "/a"}, {Path: "/b", Mode: "open"}} }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "/a", Scopes: strList{"a b " + canary}}} }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "/a", Instance: strList{"{tenant}"}}} }},
		{"routes[1]", func(c *Config) { c.Routes = []Route{{Path: "/a"}, {Path: "/a"}} }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "/a", Agent: strList{"$agent"}}} }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "/a", Agent: strList{"$.a.b"}}} }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "/a", Agent: strList{"$.a"}, AgentMissing: "allow"}} }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "/a", AgentMissing: "require"}} }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "/a", Context: "Core"}} }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "/a", Context: "Core:A:agent"}} }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "/a", Context: "Core:A", Cost: -1}} }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "/a", Cost: 2}} }},
		{"routes[0]", func(c *Config) { c.Routes = []Route{{Path: "/a", Mode: "public", Context: "Core:A"}} }},
		{"jwt.instance", func(c *Config) { c.JWT = JWT{Issuer: "i", Payload: "p", Instance: "no id"} }},
		{"envoy.maxRequestBytes", func(c *Config) { c.Envoy.MaxRequestBytes = 2 << 20 }},
		{"defaultRoute", func(c *Config) { c.DefaultRoute = canary }},
		{"corsPreflight", func(c *Config) { c.CORSPreflight = canary }},
		{"identityHeaders", func(c *Config) { c.IdentityHeaders.User = "X-User" }},
		{"identityHeaders", func(c *Config) { c.IdentityHeaders.User = c.IdentityHeaders.Agent }},
		{"cache.records", func(c *Config) { c.Cache.Records = 0 }},
		{"cache.unknown", func(c *Config) { c.Cache.Unknown = -1 }},
		{"cache.grace", func(c *Config) { d := apikey.Duration(-1); c.Cache.Grace = &d }},
		{"errors", func(c *Config) { c.Errors = canary }},
		{"errors", func(c *Config) { c.Errors, c.Envoy.MinVersion = "error_response", "" }},
		{"errors", func(c *Config) { c.Errors, c.Envoy.MinVersion = "error_response", "1.36" }},
		{"envoy.minVersion", func(c *Config) { c.Envoy.MinVersion = canary }},
		{"log.level", func(c *Config) { c.Log.Level = canary }},
		{"log.format", func(c *Config) { c.Log.Format = canary }},
		{"log.decisionsPerSecond", func(c *Config) { n := -1; c.Log.DecisionsPerSecond = &n }},
		{"portal.oidc.issuer", withLogin(func(p *PortalOIDC) { p.Issuer = "https://" + canary })},
		{"portal.oidc.clientID", withLogin(func(p *PortalOIDC) { p.ClientID = "" })},
		{"portal.oidc.redirectURL", withLogin(func(p *PortalOIDC) { p.RedirectURL = "https://keys.example/" + canary })},
		{"portal.oidc.redirectURL", withLogin(func(p *PortalOIDC) { p.RedirectURL = "http://keys.example/sign-in/oidc/back" })},
		{"tracing.ratio", func(c *Config) { c.Tracing.Ratio = 1.1 }},
		{"tracing.ratio", func(c *Config) { c.Tracing.Ratio = math.NaN() }},
		{"tracing.endpoint", func(c *Config) { c.Tracing.Endpoint = canary + ":4317" }},
		{"tracing.endpoint", func(c *Config) { c.Tracing.Endpoint = "https://user:" + canary + "@collector.example" }},
		{"tracing.endpoint", func(c *Config) { c.Tracing.Endpoint = "https://collector.example/?key=" + canary }},
	}
	good := func() *Config {
		cfg := defaultConfig()
		cfg.Store.SQLite.Path, cfg.Pepper.File = "k.db", "p"
		return &cfg
	}
	if err := good().validate(); err != nil {
		t.Fatal(err)
	}
	all, want := good(), map[string]bool{}
	for _, f := range faults {
		cfg := good()
		f.spoil(cfg)
		err := cfg.validate()
		if err == nil {
			t.Errorf("%s: broken, and nothing is said", f.field)
			continue
		}
		for line := range strings.SplitSeq(err.Error(), "\n") {
			// A secret in a route's host or path would be in every log of every proxy: those are shown.
			if !strings.HasPrefix(line, f.field+":") && !strings.HasPrefix(line, f.field+" ") {
				t.Errorf("%s: got %q", f.field, line)
			}
			if strings.Contains(line, canary) {
				t.Errorf("%s: the value is shown: %s", f.field, line)
			}
		}
		switch f.field {
		case "listen.check.tls", "listen.manage.tls", "listen.metrics.tls", "listen.metrics.tls.clientNames", "errors", "credentials.headers", "identityHeaders", "routes[0]", "routes[1]", "client.trustedHops", "credentials.foreign":
			// One undoes another's fault.
		default:
			f.spoil(all)
			want[f.field] = true
		}
	}
	got := map[string]bool{}
	for line := range strings.SplitSeq(all.validate().Error(), "\n") {
		field, _, _ := strings.Cut(line, ":")
		got[field] = true
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for version, ok := range map[string]bool{"1.37": true, "1.40": true, "1.40.0": true, "2.0": true, "1.36.4": false, "1.4": false, "1": false} {
		cfg := good()
		cfg.Errors, cfg.Envoy.MinVersion = "error_response", version
		if err := cfg.validate(); (err == nil) != ok {
			t.Errorf("error_response with Envoy %s: %v", version, err)
		}
	}
}

// TestPrintedConfigLoadsAgain: what config print writes is a configuration, and the same one.
func TestPrintedConfigLoadsAgain(t *testing.T) {
	files, err := filepath.Glob("testdata/config/good_*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		code, printed, problems := tested(t, "", "config", "print", "--config", file)
		if code != exitOK {
			t.Fatalf("%s: exit code %d: %s", file, code, problems)
		}
		before, err := loadConfig(file, nil, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		after, faults := load(t, printed, nil, nil)
		if faults != nil {
			t.Fatalf("%s: %q in\n%s", file, faults, printed)
		}
		// Nothing and an empty list are one.
		if diff := cmp.Diff(before, after, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s: %s", file, diff)
		}
		code, again, _ := tested(t, printed, "config", "print", "--config", "-")
		if code != exitOK || again != printed {
			t.Errorf("%s: printed twice: %s", file, cmp.Diff(printed, again))
		}
	}
}

// fits judges a document by the few words of JSON Schema that config schema uses, and fails on others.
func fits(t *testing.T, schema map[string]any, v any, path string) {
	t.Helper()
	if options, ok := schema["anyOf"].([]any); ok {
		for _, option := range options {
			want := option.(map[string]any)["type"]
			if _, isList := v.([]any); isList == (want == "array") {
				fits(t, option.(map[string]any), v, path)
				return
			}
		}
		t.Errorf("%s: %v is none of %v", path, v, options)
		return
	}
	for word := range schema {
		if !slices.Contains([]string{"type", "properties", "additionalProperties", "items", "$schema", "title"}, word) {
			t.Errorf("%s: this test does not know %q", path, word)
		}
	}
	bad := func() { t.Errorf("%s: %T %v does not fit %v", path, v, v, schema["type"]) }
	switch schema["type"] {
	case "object":
		object, ok := v.(map[string]any)
		if !ok {
			bad()
			return
		}
		if schema["additionalProperties"] != false {
			t.Errorf("%s: a misspelt field would pass", path)
		}
		for name, value := range object {
			property, ok := schema["properties"].(map[string]any)[name].(map[string]any)
			if !ok {
				t.Errorf("%s: the schema has no %s", path, name)
				continue
			}
			fits(t, property, value, path+"."+name)
		}
	case "array":
		list, ok := v.([]any)
		if !ok {
			bad()
		}
		for i, item := range list {
			fits(t, schema["items"].(map[string]any), item, path+"["+strconv.Itoa(i)+"]")
		}
	case "string":
		if _, ok := v.(string); !ok {
			bad()
		}
	case "integer":
		if n, ok := v.(float64); !ok || n != float64(int(n)) {
			bad()
		}
	case "number":
		if _, ok := v.(float64); !ok {
			bad()
		}
	case "boolean":
		if _, ok := v.(bool); !ok {
			bad()
		}
	default:
		t.Errorf("%s: type %v", path, schema["type"])
	}
}

func TestSchemaFitsWhatIsPrinted(t *testing.T) {
	code, text, problems := tested(t, "", "config", "schema")
	if code != exitOK {
		t.Fatal(problems)
	}
	var schema map[string]any
	if err := json.Unmarshal([]byte(text), &schema); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"testdata/config/good_smallest.yaml", "testdata/config/good_whole.yaml"} {
		_, printed, _ := tested(t, "", "config", "print", "--config", file)
		var document any
		if err := yaml.Unmarshal([]byte(printed), &document); err != nil {
			t.Fatal(err)
		}
		asJSON, err := json.Marshal(document)
		if err != nil {
			t.Fatal(err)
		}
		var v any
		if err := json.Unmarshal(asJSON, &v); err != nil {
			t.Fatal(err)
		}
		fits(t, schema, v, "$")
		// Both ways: the schema knows no field that there is not.
		if strings.HasSuffix(file, "whole.yaml") {
			known := slices.Sorted(maps.Keys(schema["properties"].(map[string]any)))
			if diff := cmp.Diff(slices.Sorted(maps.Keys(v.(map[string]any))), known); diff != "" {
				t.Error(diff)
			}
		}
	}
}

func TestDidYouMean(t *testing.T) {
	names := []string{"address", "level", "format", "path"}
	for written, want := range map[string]string{
		"adress": "address", "Level": "level", "levle": "level", "paths": "path", "wholly-different": "", "": "", "x": "",
	} {
		got := didYouMean(written, slices.Clone(names))
		if want != "" {
			want = `; did you mean "` + want + `"?`
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", written, got, want)
		}
	}
	for _, test := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"kitten", "sitting", 3}, {"flaw", "lawn", 2}, {"same", "same", 0}} {
		if got := editDistance(test.a, test.b); got != test.want {
			t.Errorf("%q to %q: got %d, want %d", test.a, test.b, got, test.want)
		}
	}
}

func TestWhoseTokensCountIsSaidWhole(t *testing.T) {
	for want, jwt := range map[string]JWT{
		"jwt.issuer":   {Payload: "claims"},
		"jwt.payload":  {Issuer: "https://login.example"},
		"jwt.idClaim":  {Issuer: "https://login.example", Payload: "claims", IDClaim: strList{""}},
		"jwt.instance": {Issuer: "https://login.example", Payload: "claims", Instance: "no id"},
	} {
		cfg := defaultConfig()
		cfg.Store.SQLite.Path, cfg.Pepper.File, cfg.JWT = "a", "b", jwt
		if bad, ok := errors.AsType[*apikey.InvalidError](cfg.validate()); !ok || bad.Field != want {
			t.Errorf("%+v: got %v, want a fault of %s", jwt, cfg.validate(), want)
		}
	}
}
