package main

import (
	"slices"
	"strings"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/authz/foundationallm"
	"keyward/envoy/check"
)

// A Preset is the routes of a platform that we know, and what goes with them. Routes of one's own stand beside
// them as any others do, and one with the same pattern takes the preset's place.
type Preset struct {
	Name   string `yaml:"name"`   // foundationallm; "": none
	Prefix string `yaml:"prefix"` // before all of the platform's paths, such as /core
	// Mode is that of the routes that are not public: required | optional.
	Mode string `yaml:"mode"`
}

const presetFoundationaLLM = "foundationallm"

func (p Preset) validate() error {
	switch {
	case p.Name == "" && p.Prefix != "":
		return apikey.Invalid("preset.name", "is missing: preset.prefix is for the paths of a preset")
	case p.Name != "" && p.Name != presetFoundationaLLM:
		return apikey.Invalid("preset.name", "must be "+presetFoundationaLLM+", or absent")
	case p.Prefix != "" && (!strings.HasPrefix(p.Prefix, "/") || strings.HasSuffix(p.Prefix, "/") || strings.ContainsAny(p.Prefix, "{}")):
		return apikey.Invalid("preset.prefix", "must be a path without wildcards and without a slash at its end, such as /core")
	}
	return oneOf("preset.mode", p.Mode, authz.Required.String(), authz.Optional.String())
}

// presetDefaults are the defaults that the preset changes: the platform's servers compare paths without regard
// to case, answer preflights themselves, and know callers by one header.
func (c *Config) presetDefaults() {
	c.IgnoreCase = true
	c.CORSPreflight = "allow"
	c.IdentityHeaders.UserIdentity = check.DefaultIdentity.UserIdentity
}

// expandPreset adds the preset's routes to those of the configuration, and the shape of the platform's tokens.
// A configuration that has them already stays as it is.
func (c *Config) expandPreset() error {
	if err := c.Preset.validate(); err != nil {
		return err
	}
	mode, err := authz.ParseMode(c.Preset.Mode)
	if err != nil {
		return err
	}
	rules, err := foundationallm.CoreAPI(c.Preset.Prefix, mode)
	if err != nil {
		return err
	}
	own := slices.Clone(c.Routes)
	for i := range rules {
		taken := slices.ContainsFunc(own, func(r Route) bool {
			return rules[i].SamePattern(&authz.Rule{Host: r.Host, Method: r.Method, Path: r.Path}, c.IgnoreCase)
		})
		if !taken {
			c.Routes = append(c.Routes, routeOf(&rules[i]))
		}
	}
	if !slices.ContainsFunc(c.Credentials.Foreign, func(s ForeignShape) bool { return s.Parser == agentAccessToken }) {
		c.Credentials.Foreign = append(c.Credentials.Foreign, ForeignShape{Parser: agentAccessToken})
	}
	return nil
}

// routeOf writes a rule as a configuration does.
func routeOf(rule *authz.Rule) Route {
	r := Route{
		Host: rule.Host, Method: rule.Method, Path: rule.Path, Mode: rule.Mode.String(), Scopes: rule.Scopes.Strings(),
		Context: rule.Context, Cost: rule.Cost, Shadow: rule.Shadow,
	}
	for _, field := range []struct {
		to   *strList
		from []authz.Source
	}{{&r.Instance, rule.Instance}, {&r.Agent, rule.Agent}, {&r.Environment, rule.Environment}} {
		for _, s := range field.from {
			*field.to = append(*field.to, s.String())
		}
	}
	if rule.AgentRequired {
		r.Agent = append(r.Agent, "required")
	}
	switch {
	case rule.AgentNeeded:
		r.AgentMissing = "require"
	case len(rule.Agent) > 0:
		r.AgentMissing = "ignore"
	}
	for _, t := range rule.KeyTypes {
		r.KeyTypes = append(r.KeyTypes, string(t))
	}
	return r
}
