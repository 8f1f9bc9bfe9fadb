package checktest

import (
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"keyward/authz"
)

// Fill copies what a decision needs into r: of headers and context extensions only the named ones. It
// reports whether the caller speaks gRPC.
//
// Source: envoy.service.auth.v3.AttributeContext. Envoy sends headers as a map, repeats joined by commas
// and foreign bytes replaced, or with encode_raw_headers as a list that keeps both.
// Errors: InvalidArgument without attributes, Unimplemented for connections that are not HTTP.
func Fill(r *authz.Request, in *authv3.CheckRequest, headers, extensions []string) (grpc bool, err error) {
	attributes := in.GetAttributes()
	if attributes == nil {
		return false, status.Error(codes.InvalidArgument, "a Check without attributes")
	}
	request := attributes.GetRequest().GetHttp()
	if request == nil {
		return false, status.Error(codes.Unimplemented, "keyward decides HTTP requests only: use the HTTP filter envoy.filters.http.ext_authz")
	}
	r.Method, r.Host, r.Path = request.GetMethod(), request.GetHost(), request.GetPath()
	source := attributes.GetSource().GetAddress().GetSocketAddress()
	r.Peer = source.GetAddress()
	r.Identity = authz.NewIdentity(r.Peer, source.GetPortValue(), attributes.GetRequest().GetTime().AsTime())
	r.HTTP = authz.HTTPID(request.GetId())
	for name, value := range attributes.GetContextExtensions() {
		if slices.Contains(extensions, name) {
			r.Extensions = append(r.Extensions, authz.Pair{Name: name, Value: value})
		}
	}
	contentType := ""
	take := func(name, value string) {
		if isNamed(name, "content-type") {
			contentType = value
		}
		for _, wanted := range headers {
			if isNamed(name, wanted) {
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
	return isGRPC(contentType), nil
}

// isNamed compares in ASCII: to Unicode, the sign for Kelvin is a k.
func isNamed(sent, name string) bool { return len(sent) == len(name) && strings.EqualFold(sent, name) }

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
