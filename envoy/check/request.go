package check

import (
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"keyward/authz"
)

// fill copies what a decision needs into r: of the headers only the named ones, which are in lower case.
//
// Source: envoy.service.auth.v3.AttributeContext. Envoy sends headers as a map, repeats joined by commas
// and foreign bytes replaced, or with encode_raw_headers as a list that keeps both.
// Errors: InvalidArgument without attributes, Unimplemented for connections that are not HTTP.
func fill(r *authz.Request, in *authv3.CheckRequest, names []string) (about, error) {
	attributes := in.GetAttributes()
	if attributes == nil {
		return about{}, status.Error(codes.InvalidArgument, "a Check without attributes")
	}
	request := attributes.GetRequest().GetHttp()
	if request == nil {
		return about{}, status.Error(codes.Unimplemented, "keyward decides HTTP requests only: use the HTTP filter envoy.filters.http.ext_authz")
	}
	r.Method, r.Host, r.Path = request.GetMethod(), request.GetHost(), request.GetPath()
	source := attributes.GetSource().GetAddress().GetSocketAddress()
	r.Peer = source.GetAddress()
	r.Identity = authz.NewIdentity(r.Peer, source.GetPortValue(), attributes.GetRequest().GetTime().AsTime())
	r.HTTP = authz.HTTPID(request.GetId())
	for name, value := range attributes.GetContextExtensions() {
		r.Extensions = append(r.Extensions, authz.Pair{Name: name, Value: value})
	}
	contentType := ""
	take := func(name, value string) {
		if strings.EqualFold(name, "content-type") {
			contentType = value
		}
		for _, wanted := range names {
			if strings.EqualFold(name, wanted) {
				r.Headers = append(r.Headers, authz.Pair{Name: wanted, Value: value})
			}
		}
	}
	for name, value := range request.GetHeaders() {
		take(name, value)
	}
	for _, h := range request.GetHeaderMap().GetHeaders() {
		take(h.GetKey(), headerValue(h))
	}
	return about{grpc: isGRPC(contentType)}, nil
}

func headerValue(h *corev3.HeaderValue) string {
	if raw := h.GetRawValue(); len(raw) > 0 {
		return string(raw)
	}
	return h.GetValue()
}

// isGRPC recognises application/grpc and application/grpc+proto, not application/grpc-web, which Envoy
// answers like any other HTTP.
func isGRPC(contentType string) bool {
	const grpc = "application/grpc"
	if len(contentType) < len(grpc) || !strings.EqualFold(contentType[:len(grpc)], grpc) {
		return false
	}
	rest := contentType[len(grpc):]
	return rest == "" || rest[0] == '+' || rest[0] == ';' || rest[0] == ' '
}
