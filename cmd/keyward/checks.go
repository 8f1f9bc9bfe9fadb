//go:build !keyward_standard_codec

package main

import (
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"keyward/authz"
	"keyward/envoy/check"
)

// registerChecks makes the server answer Checks.
func registerChecks(to grpc.ServiceRegistrar, a *authz.Authorizer, cfg check.Config, reg prometheus.Registerer, log *slog.Logger) error {
	checks, err := check.New(a, cfg, reg, log)
	if err != nil {
		return err
	}
	checks.Register(to)
	return nil
}
