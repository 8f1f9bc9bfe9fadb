package check

import (
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
)

// ServiceName is what Envoy's health checks ask for.
const ServiceName = "envoy.service.auth.v3.Authorization"

// Register makes a gRPC server answer Checks with s.
func (s *Server) Register(r grpc.ServiceRegistrar) { authv3.RegisterAuthorizationServer(r, s) }
