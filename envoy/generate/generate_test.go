package generate_test

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"sigs.k8s.io/yaml"

	"keyward/envoy/envoytest"
	"keyward/envoy/generate"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// configs are the golden files' names, and what they are of.
var configs = map[string]generate.Config{
	"plain": {Upstreams: []string{"127.0.0.1:8080"}},
	"full": {
		Listen: "[::]:443", Admin: "127.0.0.1:9901",
		Upstreams: []string{"app-1.test:8080", "10.0.0.7:8080"}, UpstreamHTTP2: true,
		Keyward:           "keyward.test:9191",
		KeywardTLS:        &generate.TLS{CAFile: "/etc/envoy/ca.pem", CertFile: "/etc/envoy/envoy.pem", KeyFile: "/etc/envoy/envoy.key"},
		CheckTimeout:      300 * time.Millisecond,
		CredentialHeaders: []string{"X-API-Key"},
		IdentityHeaders:   append(generate.DefaultIdentityHeaders(), "X-Other-Identity", "x-keyward-key-environment", "x-keyward-organisation-unit"),
		CheckHeaders:      []string{"x-tenant", "content-type"},
		ClientAddress:     generate.ClientForwardedFor, TrustedHops: 2, CORSPreflight: true,
		InternalCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/8")},
		StatPrefix:    "keyward_edge", AccessLog: true,
		RequestTimeout: 30 * time.Second, ResponseTimeout: -1, IdleTimeout: 10 * time.Minute,
	},
	// As much as fits: Envoy must accept what our estimate of its expressions' size lets through.
	"many":         {Upstreams: []string{"127.0.0.1:8080"}, CredentialHeaders: []string{"k"}, IdentityHeaders: manyNames()},
	"socket":       {Upstreams: []string{"localhost:8080"}, Keyward: "unix:///run/keyward/check.sock"},
	"als_batched":  {Upstreams: []string{"127.0.0.1:8080"}, Feedback: generate.FeedbackALSBatched, RenewEvery: time.Second},
	"otlp":         {Upstreams: []string{"127.0.0.1:8080"}, Feedback: generate.FeedbackOTLP},
	"otlp_batched": {Upstreams: []string{"127.0.0.1:8080"}, Feedback: generate.FeedbackOTLPBatched, AccessLog: true},
	"bodies": {
		Upstreams: []string{"127.0.0.1:8080"}, TokenClaims: true, MaxRequestBytes: 100_000, IdentityHeaders: []string{"x-user"},
		Bodies: []generate.Body{
			{Method: "POST", Path: "/instances/{id}/completions", IgnoreCase: true},
			{Path: "/files/{rest...}"}, {Path: "/a b.é/(x)/{$}"}, {Path: "/{$}"}, {Path: "/all/"},
			{Path: "/all/"}, // of another host
			{Method: "PUT", Path: "/" + strings.Repeat("long/", 30) + "{id}"},
		},
	},
	"usage":       {Upstreams: []string{"127.0.0.1:8080"}, Usage: true},
	"usage_otlp":  {Upstreams: []string{"127.0.0.1:8080"}, Usage: true, Feedback: generate.FeedbackOTLP},
	"usage_only":  {Upstreams: []string{"127.0.0.1:8080"}, Usage: true, Feedback: generate.FeedbackNone},
	"no_feedback": {Upstreams: []string{"127.0.0.1:8080"}, Feedback: generate.FeedbackNone},
}

// manyNames are 80 names with few beginnings in common and many hyphens.
func manyNames() []string {
	r := rand.New(rand.NewPCG(1, 2))
	var names []string
	for range 80 {
		name := fmt.Sprintf("%c-x", "abcdefgh"[r.IntN(8)])
		for range 1 + r.IntN(8) {
			name += "-" + "abcdefghijklmnopqrstuvwxyz"[:1+r.IntN(5)]
		}
		names = append(names, name)
	}
	return names
}

func TestGolden(t *testing.T) {
	check := func(name string, write func(generate.Config) ([]byte, error), c generate.Config) {
		t.Run(name, func(t *testing.T) {
			got, err := write(c)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", name+".yaml")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatalf("%v (-update writes it)", err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("(-want +got, -update rewrites):\n%s", diff)
			}
		})
	}
	for name, c := range configs {
		if name == "many" {
			continue // nobody would read it
		}
		check("envoy_"+name, generate.Envoy, c)
		c.Upstreams = nil // a fragment does without
		check("fragment_"+name, generate.EnvoyFragment, c)
	}
}

// parse reads YAML into m as strictly as Envoy does.
func parse(t *testing.T, text []byte, m proto.Message) {
	t.Helper()
	j, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := protojson.Unmarshal(j, m); err != nil {
		t.Fatal(err)
	}
}

// parts reads a fragment.
func parts(t *testing.T, text []byte) (*hcmv3.HttpConnectionManager, []*clusterv3.Cluster, []*routev3.Route) {
	t.Helper()
	var f struct {
		Manager  map[string]any   `json:"http_connection_manager"`
		Clusters []map[string]any `json:"clusters"`
		Routes   []any            `json:"routes"` // of a rule that looks at bodies
	}
	if err := yaml.UnmarshalStrict(text, &f); err != nil {
		t.Fatal(err)
	}
	read := func(v any, m proto.Message) {
		text, err := yaml.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		parse(t, text, m)
	}
	manager := &hcmv3.HttpConnectionManager{}
	read(f.Manager, manager)
	clusters := make([]*clusterv3.Cluster, len(f.Clusters))
	for i, c := range f.Clusters {
		clusters[i] = &clusterv3.Cluster{}
		read(c, clusters[i])
	}
	routes := make([]*routev3.Route, len(f.Routes))
	for i, r := range f.Routes {
		routes[i] = &routev3.Route{}
		read(r, routes[i])
	}
	return manager, clusters, routes
}

// embed pastes a fragment into a configuration that has neither keyward nor any hardening.
func embed(t *testing.T, fragment []byte, upstream string) []byte {
	t.Helper()
	host, port, _ := strings.Cut(upstream, ":")
	b := &bootstrapv3.Bootstrap{}
	parse(t, []byte(`
static_resources:
  listeners:
  - name: theirs
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: theirs
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: theirs}}]}]
  clusters:
  - name: theirs
    type: STATIC
    load_assignment:
      cluster_name: theirs
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: `+host+`, port_value: `+port+`}}}}]}]
`), b)
	manager, clusters, routes := parts(t, fragment)
	packed := b.StaticResources.Listeners[0].FilterChains[0].Filters[0].GetTypedConfig()
	theirs := &hcmv3.HttpConnectionManager{}
	if err := packed.UnmarshalTo(theirs); err != nil {
		t.Fatal(err)
	}
	manager.HttpFilters = append(manager.HttpFilters, theirs.HttpFilters...)
	theirs.HttpFilters = nil
	all := theirs.GetRouteConfig().GetVirtualHosts()[0]
	for _, r := range routes {
		r.Action = all.Routes[0].Action
	}
	all.Routes = append(routes, all.Routes...)
	proto.Merge(theirs, manager)
	if err := packed.MarshalFrom(theirs); err != nil {
		t.Fatal(err)
	}
	b.StaticResources.Clusters = append(b.StaticResources.Clusters, clusters...)
	out, err := protojson.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestEnvoyAcceptsWhatIsGenerated(t *testing.T) {
	ca := newCA(t)
	ca.issue(t, "envoy", "envoy.test")
	for _, version := range envoytest.Versions() {
		for name, c := range configs {
			t.Run(version+"/"+name, func(t *testing.T) {
				binary := envoytest.Need(t, version)
				if c.KeywardTLS != nil { // its files must be there
					tls := generate.TLS{CAFile: ca.file("ca.pem"), CertFile: ca.file("envoy.pem"), KeyFile: ca.file("envoy.key")}
					c.KeywardTLS = &tls
				}
				config, err := generate.Envoy(c)
				if err != nil {
					t.Fatal(err)
				}
				if err := envoytest.Validate(t.Context(), envoytest.Config{Binary: binary, Bootstrap: config}); err != nil {
					t.Error(err)
				}
				fragment, err := generate.EnvoyFragment(c)
				if err != nil {
					t.Fatal(err)
				}
				if err := envoytest.Validate(t.Context(), envoytest.Config{Binary: binary, Bootstrap: embed(t, fragment, "127.0.0.1:80")}); err != nil {
					t.Errorf("fragment: %v", err)
				}
			})
		}
	}
}

// walk calls visit for every field that is set, inside Any messages too.
func walk(t *testing.T, path string, m protoreflect.Message, visit func(path string, f protoreflect.FieldDescriptor, v protoreflect.Value)) {
	t.Helper()
	if packed, ok := m.Interface().(*anypb.Any); ok {
		inner, err := packed.UnmarshalNew()
		if err != nil {
			t.Fatal(err)
		}
		if v, ok := inner.(interface{ ValidateAll() error }); ok {
			if err := v.ValidateAll(); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
		m = inner.ProtoReflect()
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		p := path + "." + string(f.Name())
		visit(p, f, v)
		switch {
		case f.IsMap():
			if f.MapValue().Message() != nil {
				v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
					walk(t, p+"["+k.String()+"]", v.Message(), visit)
					return true
				})
			}
		case f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				walk(t, fmt.Sprintf("%s[%d]", p, i), v.List().Get(i).Message(), visit)
			}
		default:
			walk(t, p, v.Message(), visit)
		}
		return true
	})
}

// No setting of any name by which a request could pass unchecked, be checked twice, or be checked elsewhere.
func TestNothingOpensTheDoor(t *testing.T) {
	const perRoute = "typed_per_filter_config"
	// Of a route's own settings, those that have Envoy send the body.
	body := regexp.MustCompile(`\.typed_per_filter_config(\[envoy\.filters\.http\.ext_authz\]\.check_settings(\.with_request_body(\.(max_request_bytes|allow_partial_message|pack_as_bytes))?)?)?$`)
	never := func(path string, f protoreflect.FieldDescriptor, v protoreflect.Value) {
		switch name := string(f.Name()); {
		case strings.Contains(path, perRoute):
			if !strings.Contains(path, "bodies") || !body.MatchString(path) {
				t.Errorf("%s is set to %v", path, v)
			}
		case strings.Contains(name, "retry"), strings.Contains(name, "retries"),
			name == "google_grpc", name == "http_service",
			name == "failure_mode_allow", name == "failure_mode_allow_header_add",
			name == "filter_enabled", name == "filter_enabled_metadata", name == "deny_at_disable", name == "disabled",
			name == "shadow_mode", name == "clear_route_cache", name == "clear_route_cache_headers", name == "with_request_body",
			name == "is_optional",
			name == "filters" && strings.Contains(path, "upgrade_configs"):
			t.Errorf("%s is set to %v", path, v)
		}
	}
	for name, c := range configs {
		config, err := generate.Envoy(c)
		if err != nil {
			t.Fatal(err)
		}
		b := &bootstrapv3.Bootstrap{}
		parse(t, config, b)
		if err := b.ValidateAll(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		fields := 0
		walk(t, name, b.ProtoReflect(), func(path string, f protoreflect.FieldDescriptor, v protoreflect.Value) {
			fields++
			never(path, f, v)
		})
		if fields < 100 { // else the walk went past what it should look at
			t.Errorf("%s: looked at %d fields only", name, fields)
		}
		fragment, err := generate.EnvoyFragment(c)
		if err != nil {
			t.Fatal(err)
		}
		manager, clusters, _ := parts(t, fragment)
		walk(t, name+" fragment", manager.ProtoReflect(), never)
		for _, c := range clusters {
			walk(t, name+" fragment", c.ProtoReflect(), never)
		}
	}
}

func TestSameConfigSameBytes(t *testing.T) {
	c := configs["full"]
	first, err := generate.Envoy(c)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if again, err := generate.Envoy(c); err != nil || !bytes.Equal(first, again) {
			t.Fatalf("got something else, %v", err)
		}
	}
	if c.CredentialHeaders[0] != "X-API-Key" || c.KeywardTLS.ServerName != "" {
		t.Errorf("the caller's Config was changed: %v", c)
	}
}

func TestUnsafeOrContradictoryInputIsRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*generate.Config)
		says   string // "": accepted
	}{
		{"nothing but upstreams", func(*generate.Config) {}, ""},
		{"a zone to listen on", func(c *generate.Config) { c.Listen = "[fe80::1%eth0]:80" }, "listen: "},
		{"a name to listen on", func(c *generate.Config) { c.Listen = "localhost:80" }, "listen: "},
		{"port 0", func(c *generate.Config) { c.Listen, c.Admin = "127.0.0.1:0", "127.0.0.1:0" }, ""},
		{"all addresses", func(c *generate.Config) { c.Listen = "0.0.0.0:443" }, ""},
		{"admin for everyone", func(c *generate.Config) { c.Admin = "0.0.0.0:9901" }, "admin: "},
		{"admin on a name", func(c *generate.Config) { c.Admin = "localhost:9901" }, "admin: "},
		{"admin on the listener", func(c *generate.Config) { c.Admin = "127.0.0.1:10000" }, "admin: "},
		{"no upstream", func(c *generate.Config) { c.Upstreams = nil }, "upstreams: "},
		{"upstream without port", func(c *generate.Config) { c.Upstreams = []string{"app"} }, "upstreams: "},
		{"upstream with port 0", func(c *generate.Config) { c.Upstreams = []string{"app:0"} }, "upstreams: "},
		{"upstream as URL", func(c *generate.Config) { c.Upstreams = []string{"http://app:80"} }, "upstreams: "},
		{"IPv6 upstream", func(c *generate.Config) { c.Upstreams = []string{"[2001:db8::1]:80"} }, ""},
		{"upstream with a zone", func(c *generate.Config) { c.Upstreams = []string{"[fe80::1%eth0]:80"} }, "upstreams: "},
		{"upstream is Envoy", func(c *generate.Config) { c.Upstreams = []string{"localhost:10000"} }, "upstreams: "},
		{"upstream is Envoy, on all addresses", func(c *generate.Config) { c.Listen, c.Upstreams = "[::]:80", []string{"127.0.0.1:80"} }, "upstreams: "},
		{"upstream is Envoy, by its address", func(c *generate.Config) { c.Listen, c.Upstreams = "10.0.0.1:80", []string{"10.0.0.1:80"} }, "upstreams: "},
		{"the same port elsewhere", func(c *generate.Config) { c.Upstreams = []string{"app:10000"} }, ""},
		{"keyward is Envoy", func(c *generate.Config) { c.Keyward = "127.0.0.1:10000" }, "keyward: "},
		{"keyward without port", func(c *generate.Config) { c.Keyward = "keyward" }, "keyward: "},
		{"keyward afar in clear", func(c *generate.Config) { c.Keyward = "keyward:9191" }, "keyward: "},
		{"keyward afar by address in clear", func(c *generate.Config) { c.Keyward = "10.0.0.1:9191" }, "keyward: "},
		{"keyward afar in clear on purpose", func(c *generate.Config) { c.Keyward, c.PlaintextKeyward = "keyward:9191", true }, ""},
		{"keyward on localhost", func(c *generate.Config) { c.Keyward = "localhost:9191" }, ""},
		{"keyward on IPv6 loopback", func(c *generate.Config) { c.Keyward = "[::1]:9191" }, ""},
		{"in clear and TLS", func(c *generate.Config) { c.PlaintextKeyward, c.KeywardTLS = true, &generate.TLS{CAFile: "ca"} }, "plaintextKeyward: "},
		{"relative socket", func(c *generate.Config) { c.Keyward = "unix://run/k.sock" }, "keyward: "},
		{"socket", func(c *generate.Config) { c.Keyward = "unix:///run/k.sock" }, ""},
		{"socket of 107 bytes", func(c *generate.Config) { c.Keyward = "unix:///" + strings.Repeat("a", 106) }, ""},
		{"socket of 108 bytes", func(c *generate.Config) { c.Keyward = "unix:///" + strings.Repeat("a", 107) }, "keyward: "},
		{"TLS without CA", func(c *generate.Config) { c.KeywardTLS = &generate.TLS{} }, "keywardTLS.caFile: "},
		{"TLS with half a certificate", func(c *generate.Config) { c.KeywardTLS = &generate.TLS{CAFile: "ca", CertFile: "c"} }, "keywardTLS.certFile: "},
		{"TLS on a socket without a name", func(c *generate.Config) { c.Keyward, c.KeywardTLS = "unix:///k", &generate.TLS{CAFile: "ca"} }, "keywardTLS.serverName: "},
		{"TLS with no name", func(c *generate.Config) { c.KeywardTLS = &generate.TLS{CAFile: "ca", ServerName: "a b"} }, "keywardTLS.serverName: "},
		{"negative timeout", func(c *generate.Config) { c.CheckTimeout = -1 }, "checkTimeout: "},
		{"identity header that HTTP needs", func(c *generate.Config) { c.IdentityHeaders = []string{"Content-Type"} }, "identityHeaders: "},
		{"identity header of Envoy's", func(c *generate.Config) { c.IdentityHeaders = []string{"x-envoy-user"} }, "identityHeaders: "},
		{"identity header that carries keys", func(c *generate.Config) {
			c.CredentialHeaders, c.IdentityHeaders = []string{"x-api-key"}, []string{"authorization"}
		}, "identityHeaders: "},
		{"identity header with an underscore", func(c *generate.Config) { c.IdentityHeaders = []string{"x_user"} }, "identityHeaders: "},
		{"identity header as expression", func(c *generate.Config) { c.IdentityHeaders = []string{".*"} }, "identityHeaders: "},
		{"identity header too long", func(c *generate.Config) { c.IdentityHeaders = []string{strings.Repeat("a-", 30) + "a"} }, "identityHeaders: "},
		{"identity headers in too many ways", func(c *generate.Config) {
			for i := range 12 {
				c.IdentityHeaders = append(c.IdentityHeaders, fmt.Sprintf("tenant%d-user-id", i))
			}
		}, "identityHeaders: "},
		{"many identity headers in one way", func(c *generate.Config) {
			for i := range 50 {
				c.IdentityHeaders = append(c.IdentityHeaders, fmt.Sprintf("x-acme-%c%c-id", 'a'+i%26, 'a'+i%7))
			}
		}, ""},
		{"credential header is one of identity", func(c *generate.Config) { c.CredentialHeaders = []string{"X-Keyward-User"} }, "credentialHeaders: "},
		{"credentials in cookies", func(c *generate.Config) { c.CredentialHeaders = []string{"cookie"} }, "credentialHeaders: "},
		{"empty credential header", func(c *generate.Config) { c.CredentialHeaders = []string{""} }, "credentialHeaders: "},
		{"keyward to see what is removed", func(c *generate.Config) { c.CheckHeaders = []string{"x-keyward-user"} }, "checkHeaders: "},
		{"unknown client address", func(c *generate.Config) { c.ClientAddress = "forwarded" }, "clientAddress: "},
		{"hops that nobody looks at", func(c *generate.Config) { c.TrustedHops = 1 }, "trustedHops: "},
		{"negative hops", func(c *generate.Config) { c.ClientAddress, c.TrustedHops = generate.ClientForwardedFor, -1 }, "trustedHops: "},
		{"everyone internal", func(c *generate.Config) { c.InternalCIDRs = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")} }, "internalCIDRs: "},
		{"no network", func(c *generate.Config) { c.InternalCIDRs = []netip.Prefix{{}} }, "internalCIDRs: "},
		{"odd statistics", func(c *generate.Config) { c.StatPrefix = "a.b" }, "statPrefix: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := generate.Config{Upstreams: []string{"127.0.0.1:8080"}}
			c.change(&config)
			_, err := generate.Envoy(config)
			if c.says == "" {
				if err != nil {
					t.Errorf("got %v, want no error", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one error with %q", err, c.says)
			}
		})
	}
	_, err := generate.Envoy(generate.Config{Listen: "x", Admin: "y"})
	for _, field := range []string{"listen: ", "admin: ", "upstreams: "} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("got %v, want all faults at once, and %q among them", err, field)
		}
	}
}
