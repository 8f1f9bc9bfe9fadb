package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
)

// constantServer is the least that an authorizer on grpc-go can do: it decodes the Check by the standard
// codec, looks at nothing, and lets everything through with the same answer.
type constantServer struct {
	authv3.UnimplementedAuthorizationServer
	answer *authv3.CheckResponse
}

func (s *constantServer) Check(context.Context, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	return s.answer, nil
}

// serveConstant serves until ctx is done. It says where it listens.
func serveConstant(ctx context.Context, address string, workers uint32) error {
	// Envoy pings; grpc-go's default would hang up on it.
	options := []grpc.ServerOption{grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true})}
	if workers > 0 {
		options = append(options, grpc.NumStreamWorkers(workers))
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer(options...)
	authv3.RegisterAuthorizationServer(server, &constantServer{answer: &authv3.CheckResponse{
		Status: &statuspb.Status{},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{
			Headers: []*corev3.HeaderValueOption{{Header: &corev3.HeaderValue{Key: "x-authorized", Value: "yes"}}},
		}},
	}})
	healthServer := health.NewServer()
	healthServer.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(server, healthServer)
	fmt.Fprintln(os.Stdout, l.Addr())
	go func() {
		<-ctx.Done()
		server.Stop()
	}()
	return server.Serve(l)
}
