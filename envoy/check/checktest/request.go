package checktest

import (
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"keyward/authz"
)

// A Wanted is what a decision looks at.
type Wanted struct {
	Headers, Extensions []string
	Payload             string // of the claims
	Claims              []string
	Body                bool
}

// Fill copies what a decision needs into r: of headers, context extensions and claims only the named ones. It
// reports whether the caller speaks gRPC.
//
// Source: envoy.service.auth.v3.AttributeContext. Envoy sends headers as a map, repeats joined by commas
// and foreign bytes replaced, or with encode_raw_headers as a list that keeps both.
// Errors: InvalidArgument without attributes, Unimplemented for connections that are not HTTP.
func Fill(r *authz.Request, in *authv3.CheckRequest, want Wanted) (grpc bool, err error) {
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
		if slices.Contains(want.Extensions, name) {
			r.Extensions = append(r.Extensions, authz.Pair{Name: name, Value: value})
		}
	}
	contentType, partial := "", ""
	take := func(name, value string) {
		if want.Body && isNamed(name, "x-envoy-auth-partial-body") {
			partial = value
		}
		if isNamed(name, "content-type") {
			contentType = value
		}
		for _, wanted := range want.Headers {
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
	if want.Body {
		r.Framed = request.GetProtocol() != "" && !strings.HasPrefix(request.GetProtocol(), "HTTP/1")
		r.Body = request.GetRawBody()
		if len(r.Body) == 0 {
			r.Body = []byte(request.GetBody())
		}
		r.BodySent, r.BodyCut = len(r.Body) > 0 || partial != "", partial == "true"
	}
	claims := attributes.GetMetadataContext().GetFilterMetadata()["envoy.filters.http.jwt_authn"].GetFields()[want.Payload].GetStructValue().GetFields()
	for _, name := range want.Claims {
		if text, ok := claims[name].GetKind().(*structpb.Value_StringValue); ok {
			r.Claims = append(r.Claims, authz.Pair{Name: name, Value: text.StringValue})
		}
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
