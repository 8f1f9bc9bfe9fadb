// Package generate writes configuration for Envoy that puts keyward in front of an application, with
// everything switched on that a proxy at the edge needs and Envoy leaves off.
//
// [Envoy] writes a complete static configuration, [EnvoyFragment] only what has to go into one's own.
// What each setting is for, and on which versions it was tried, stands beside it in envoy.go. It is
// built from Envoy's own messages and checked by their rules, so a mistyped field does not compile and a
// value out of range is an error here and not when Envoy starts.
package generate

import (
	"bytes"
	"fmt"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"
)

// Supported Envoy versions, and the first ones without the flaws of August and September 2026, some of
// them in ext_authz.
const versionNote = `# For Envoy 1.36 to 1.40. Security fixes that matter here came with 1.36.10, 1.37.6, 1.38.4 and 1.39.1.
`

const envoyNote = `# Envoy in front of keyward, written by "keyward envoy generate envoy".
# Start: envoy -c FILE
#
` + versionNote + `#
# Do not add: failure_mode_allow (requests would pass unchecked while keyward is away), retries of Check
# (a request would be counted twice), upgrade_configs with filters of their own (they would replace these),
# or a route on which ext_authz is disabled, unless keyward's rules call it public.
`

const fragmentNote = `# keyward for an Envoy configuration of your own, written by "keyward envoy generate envoy --fragment".
# Check the result: envoy --mode validate -c FILE
#
` + versionNote

const hcmNote = `#
# 1. Into the typed_config of each http_connection_manager. http_filters go before all other filters, in
# this order; the router stays last. Do not add failure_mode_allow or retries of Check.
`

const jwtNote = `#
# Before ext_authz your own envoy.filters.http.jwt_authn: with payload_in_metadata as keyward's jwt.payload has
# it, and a requirement that lets requests without a token pass (requires_any: your provider, allow_missing).
`

const clustersNote = `#
# 2. Into static_resources.clusters.
`

const routesNote = `#
# 3. keyward looks at the bodies of these requests. Into the typed_per_filter_config of each route that takes
# them; routes without it send none, and keyward refuses what it cannot look at.
`

// Envoy returns a complete configuration for an Envoy between clients, c.Upstreams and keyward, as YAML
// with comments. The same Config gives the same bytes.
// Errors name every field that is contradictory or unsafe.
func Envoy(c Config) ([]byte, error) {
	c = c.withDefaults()
	if err := c.validate(false); err != nil {
		return nil, fmt.Errorf("generate envoy: %w", err)
	}
	b, err := bootstrap(c)
	if err != nil {
		return nil, fmt.Errorf("generate envoy: %w", err)
	}
	body, err := marshal(b)
	if err != nil {
		return nil, fmt.Errorf("generate envoy: %w", err)
	}
	return append([]byte(envoyNote), body...), nil
}

// EnvoyFragment returns what an existing configuration needs, as YAML with comments that say where each
// part goes: the filters with the settings of the connection manager around them
// (http_connection_manager), and the cluster of keyward (clusters). What c says about listener, admin,
// upstreams and access log is not used.
// Errors name every field that is contradictory or unsafe.
func EnvoyFragment(c Config) ([]byte, error) {
	c = c.withDefaults()
	if err := c.validate(true); err != nil {
		return nil, fmt.Errorf("generate fragment: %w", err)
	}
	manager, cluster, err := fragment(c)
	if err != nil {
		return nil, fmt.Errorf("generate fragment: %w", err)
	}
	note := hcmNote
	if c.TokenClaims {
		note += jwtNote
	}
	out := bytes.NewBufferString(fragmentNote + note + "http_connection_manager:\n")
	if err := appendIndented(out, "  ", "  ", manager); err != nil {
		return nil, fmt.Errorf("generate fragment: %w", err)
	}
	out.WriteString(clustersNote + "clusters:\n")
	if err := appendIndented(out, "- ", "  ", cluster); err != nil {
		return nil, fmt.Errorf("generate fragment: %w", err)
	}
	bodies, err := bodyRoutes(c)
	if err != nil {
		return nil, fmt.Errorf("generate fragment: %w", err)
	}
	if len(bodies) > 0 {
		out.WriteString(routesNote + "routes:\n")
	}
	for _, r := range bodies {
		if err := appendIndented(out, "- ", "  ", r); err != nil {
			return nil, fmt.Errorf("generate fragment: %w", err)
		}
	}
	return out.Bytes(), nil
}

func appendIndented(out *bytes.Buffer, first, rest string, m proto.Message) error {
	body, err := marshal(m)
	if err != nil {
		return err
	}
	indent := first
	for line := range bytes.Lines(body) {
		out.WriteString(indent)
		out.Write(line)
		indent = rest
	}
	return nil
}

// marshal goes by way of JSON, which is the form that protobuf defines; YAML sorts the fields by name.
func marshal(m proto.Message) ([]byte, error) {
	b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	return yaml.JSONToYAML(b)
}
