package check

import (
	"context"

	"google.golang.org/grpc"
)

// ServiceName is what Envoy's health checks ask for.
const ServiceName = "envoy.service.auth.v3.Authorization"

const fullMethod = "/" + ServiceName + "/Check"

// Register makes a gRPC server, which has the codec of package wire, answer Checks with s.
func (s *Server) Register(r grpc.ServiceRegistrar) { r.RegisterService(&service, s) }

var service = grpc.ServiceDesc{
	ServiceName: ServiceName,
	HandlerType: (*any)(nil),
	Methods:     []grpc.MethodDesc{{MethodName: "Check", Handler: handle}},
	Metadata:    "envoy/service/auth/v3/external_auth.proto",
}

func handle(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) { //nolint:revive // gRPC's order
	return srv.(*Server).check(ctx, decode, interceptor)
}
