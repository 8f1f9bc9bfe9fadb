//go:build keyward_standard_codec

package main

import (
	"log/slog"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"keyward/authz"
	"keyward/envoy/check"
	"keyward/envoy/check/checktest"
)

// registerChecks makes the server answer Checks through generated code and grpc-go's own codec: not for
// use, but for make bench to compare with.
func registerChecks(to grpc.ServiceRegistrar, a *authz.Authorizer, cfg check.Config, _ prometheus.Registerer, _ *slog.Logger) error {
	checks, err := checktest.New(a, cfg)
	if err != nil {
		return err
	}
	authv3.RegisterAuthorizationServer(to, checks)
	return nil
}
