package main

import (
	"errors"
	"net"
	"os"

	"github.com/spf13/cobra"

	"keyward/authz"
	"keyward/envoy/check"
	"keyward/envoy/generate"
)

func (a *app) envoyCommand() *cobra.Command {
	c := &cobra.Command{Use: "envoy", Short: "Write configuration for Envoy", Args: cobra.NoArgs}
	generateCommand := &cobra.Command{Use: "generate", Short: "Write configuration that puts keyward in front of an application", Args: cobra.NoArgs}
	generateCommand.AddCommand(a.generateEnvoy())
	c.AddCommand(generateCommand)
	return c
}

func (a *app) generateEnvoy() *cobra.Command {
	var g generate.Config
	var fragment bool
	var tls generate.TLS
	var out string
	c := &cobra.Command{
		Use:   "envoy --upstream HOST:PORT",
		Short: "Write a complete, hardened configuration for Envoy itself",
		Long: "Write a complete, hardened configuration for Envoy itself. Header names and the client's address are taken\n" +
			"from keyward's own configuration, so that both sides agree.",
		Example: "  keyward envoy generate envoy --config keyward.yaml --upstream 127.0.0.1:8080 > envoy.yaml\n" +
			"  keyward envoy generate envoy --config keyward.yaml --fragment",
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			cfg, err := a.headersConfig()
			if err != nil {
				return err
			}
			cfg.envoy(&g)
			if tls != (generate.TLS{}) {
				g.KeywardTLS = &tls
			} else if cfg.Listen.Check.TLS.enabled() {
				return usageError{errors.New("listen.check has TLS: say by --keyward-ca, and --keyward-cert and --keyward-key where keyward wants client certificates, how Envoy is to speak it")}
			}
			if host, _, err := net.SplitHostPort(g.Keyward); err == nil {
				if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
					return usageError{errors.New("listen.check.address does not say where Envoy finds keyward: name it by --keyward HOST:PORT")}
				}
			}
			write := generate.Envoy
			if fragment {
				write = generate.EnvoyFragment
			}
			text, err := write(g)
			if err != nil {
				return usageError{err}
			}
			if out == "" {
				_, err = a.stdout.Write(text)
				return err
			}
			return os.WriteFile(out, text, 0o644) //nolint:gosec // it holds no secret, and Envoy has to read it
		},
	}
	a.configFlags(c)
	f := c.Flags()
	f.BoolVar(&fragment, "fragment", false, "only what goes into a configuration of your own")
	f.StringVar(&out, "out", "", "write to this file instead of standard output")
	f.StringVar(&g.Listen, "listen", generate.DefaultListen, "where Envoy accepts requests")
	f.StringVar(&g.Admin, "admin", "", "Envoy's admin interface, on loopback; none if empty")
	f.StringSliceVar(&g.Upstreams, "upstream", nil, "server of the application; repeat for more")
	f.BoolVar(&g.UpstreamHTTP2, "upstream-http2", false, "the application speaks HTTP/2 without TLS, as gRPC servers do")
	f.StringVar(&g.Keyward, "keyward", "", "where keyward answers Checks, host:port or unix:///path; by default listen.check.address")
	f.BoolVar(&g.PlaintextKeyward, "plaintext-keyward", false, "keyward is on another machine and has no TLS: the network between sees all keys")
	f.StringVar(&tls.CAFile, "keyward-ca", "", "file on Envoy's machine: who signed keyward's certificate")
	f.StringVar(&tls.CertFile, "keyward-cert", "", "file on Envoy's machine: Envoy's certificate for keyward")
	f.StringVar(&tls.KeyFile, "keyward-key", "", "file on Envoy's machine: the certificate's key")
	f.StringVar(&tls.ServerName, "keyward-name", "", "name in keyward's certificate; by default the host of --keyward")
	f.DurationVar(&g.CheckTimeout, "check-timeout", 0, "how long keyward may take; by default 250 ms and what a request may wait for another to end")
	f.DurationVar(&g.RequestTimeout, "request-timeout", generate.DefaultRequestTimeout, "how long a client may take to send its request; negative: without end")
	f.DurationVar(&g.ResponseTimeout, "response-timeout", generate.DefaultResponseTimeout, "how long the application's whole answer may take; negative: without end")
	f.DurationVar(&g.IdleTimeout, "idle-timeout", generate.DefaultIdleTimeout, "how long a connection may be silent; negative: without end")
	f.BoolVar(&g.Usage, "usage", false, "tell keyward of each request's status, bytes and duration")
	f.BoolVar(&g.AccessLog, "access-log", false, "write a line of JSON for each request to Envoy's standard output, without its query")
	return c
}

// headersConfig reads the configuration for what Envoy has to know of it. Store and pepper do not
// matter to Envoy, so they may be missing.
func (a *app) headersConfig() (*Config, error) {
	given := a.settings
	a.settings = append([]string{"store.sqlite.path=-", "pepper.file=-"}, given...)
	defer func() { a.settings = given }()
	return a.config()
}

// envoy fills in what Envoy and keyward have to agree on.
func (c *Config) envoy(g *generate.Config) {
	g.CredentialHeaders = append([]string(nil), c.Credentials.Headers...)
	if c.Credentials.Bearer == nil || *c.Credentials.Bearer {
		g.CredentialHeaders = append(g.CredentialHeaders, "authorization")
	}
	g.IdentityHeaders = check.Identity(c.IdentityHeaders).Names()
	g.ClientAddress = map[authz.ClientAddress]generate.ClientAddress{
		authz.ClientPeer: generate.ClientPeer, authz.ClientExternal: generate.ClientEnvoyExternal, authz.ClientXFF: generate.ClientForwardedFor,
	}[authz.ClientAddress(c.Client.Address)]
	g.TrustedHops = c.Client.TrustedHops
	g.Feedback = generate.Feedback(c.Concurrency.Feedback)
	g.RenewEvery = c.Concurrency.RenewEvery.Std()
	if g.CheckTimeout == 0 {
		// Room for the wait, and for the decision.
		g.CheckTimeout = c.Concurrency.wait() + generate.DefaultCheckTimeout
	}
	g.TokenClaims = c.JWT.Issuer != ""
	g.MaxRequestBytes = c.Envoy.MaxRequestBytes
	if decisions, err := c.authorizer(); err == nil { // which was validated
		for _, rule := range decisions.Rules {
			if rule.ReadsBody() {
				g.Bodies = append(g.Bodies, generate.Body{Method: rule.Method, Path: rule.Path, IgnoreCase: c.IgnoreCase})
			}
		}
	}
	g.CORSPreflight = c.CORSPreflight == "allow"
	if g.Keyward == "" {
		g.Keyward = c.Listen.Check.Address
	}
}
