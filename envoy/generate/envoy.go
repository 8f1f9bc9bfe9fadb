package generate

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	overloadv3 "github.com/envoyproxy/go-control-plane/envoy/config/overload/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	streamlogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	extauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	headermutationv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	downstreamconnectionsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/downstream_connections/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	upstreamhttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/envoyproxy/go-control-plane/pkg/wellknown"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Listener is the name of the listener in a complete configuration, for whoever asks Envoy's admin
// interface for its port.
const Listener = "ingress"

const (
	keywardCluster  = "keyward"
	upstreamCluster = "upstream"

	// maxConnections bounds what clients can have open; Envoy warns at every start where nothing does. The
	// circuit breaker of the upstream lets as many through: its own default, 1024, would answer 503
	// long before the limits that keyward keeps.
	maxConnections = 50_000
	// maxChecks is far above anything that happens, for the same reason: a full breaker is a 503.
	maxChecks = 100_000
	// connectionBuffer is the limit that Envoy's guide for edge proxies recommends.
	connectionBuffer = 32 << 10
)

type message interface {
	proto.Message
	ValidateAll() error
}

// pack checks m by Envoy's rules; those of the message around it do not look into an Any.
func pack(m message) (*anypb.Any, error) {
	if err := m.ValidateAll(); err != nil {
		return nil, err
	}
	return anypb.New(m)
}

func bootstrap(c Config) (*bootstrapv3.Bootstrap, error) {
	manager, err := connectionManager(c)
	if err != nil {
		return nil, err
	}
	packedManager, err := pack(manager)
	if err != nil {
		return nil, err
	}
	keyward, err := keywardClusterOf(c)
	if err != nil {
		return nil, err
	}
	upstream, err := upstreamClusterOf(c)
	if err != nil {
		return nil, err
	}
	connections, err := pack(&downstreamconnectionsv3.DownstreamConnectionsConfig{MaxActiveDownstreamConnections: maxConnections})
	if err != nil {
		return nil, err
	}
	b := &bootstrapv3.Bootstrap{
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{
			Listeners: []*listenerv3.Listener{{
				Name:                          Listener,
				Address:                       listenAddress(c.Listen),
				PerConnectionBufferLimitBytes: wrapperspb.UInt32(downstreamBuffer(c)),
				FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{{
					Name:       wellknown.HTTPConnectionManager,
					ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: packedManager},
				}}}},
			}},
			Clusters: []*clusterv3.Cluster{keyward, upstream},
		},
		OverloadManager: &overloadv3.OverloadManager{ResourceMonitors: []*overloadv3.ResourceMonitor{{
			Name:       "envoy.resource_monitors.global_downstream_max_connections",
			ConfigType: &overloadv3.ResourceMonitor_TypedConfig{TypedConfig: connections},
		}}},
	}
	if c.Admin != "" {
		b.Admin = &bootstrapv3.Admin{Address: socketAddress(c.Admin)}
	}
	if err := b.ValidateAll(); err != nil {
		return nil, err
	}
	return b, nil
}

// fragment returns the parts of a connection manager that matter to keyward, and its cluster.
func fragment(c Config) (*hcmv3.HttpConnectionManager, *clusterv3.Cluster, error) {
	manager, err := connectionManager(c)
	if err != nil {
		return nil, nil, err
	}
	manager.StatPrefix = ""
	manager.RouteSpecifier = nil
	manager.AccessLog = slices.DeleteFunc(manager.AccessLog, func(l *accesslogv3.AccessLog) bool { return l.GetName() == stdoutLogger })
	manager.HttpFilters = manager.HttpFilters[:len(manager.HttpFilters)-1] // the router is there already
	cluster, err := keywardClusterOf(c)
	return manager, cluster, err
}

func connectionManager(c Config) (*hcmv3.HttpConnectionManager, error) {
	filters, err := httpFilters(c)
	if err != nil {
		return nil, err
	}
	// Nobody is internal unless named. Without this field, and with an empty list too, every private
	// address is, loopback among them, and its x-envoy-* headers are obeyed: so a list with an address that
	// no client can have.
	cidrs := c.InternalCIDRs
	if len(cidrs) == 0 {
		cidrs = []netip.Prefix{netip.MustParsePrefix("255.255.255.255/32")}
	}
	internal := &hcmv3.HttpConnectionManager_InternalAddressConfig{}
	for _, p := range cidrs {
		internal.CidrRanges = append(internal.CidrRanges, &corev3.CidrRange{
			AddressPrefix: p.Addr().String(), PrefixLen: wrapperspb.UInt32(uint32(p.Bits())),
		})
	}
	routes, err := routes(c)
	if err != nil {
		return nil, err
	}
	m := &hcmv3.HttpConnectionManager{
		StatPrefix:     Listener,
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: routes},
		HttpFilters:    filters,

		// The address of the other end counts, so x-forwarded-for and x-envoy-external-address are Envoy's
		// word, x-request-id is Envoy's choice, and x-envoy-* headers of clients are removed.
		UseRemoteAddress:      wrapperspb.Bool(true),
		XffNumTrustedHops:     uint32(c.TrustedHops),
		InternalAddressConfig: internal,
		GenerateRequestId:     wrapperspb.Bool(true),

		// One spelling for each path: keyward's rules and the upstream see the same. A path of which two
		// servers could think differently is refused (400).
		NormalizePath:                wrapperspb.Bool(true),
		MergeSlashes:                 true,
		PathWithEscapedSlashesAction: hcmv3.HttpConnectionManager_REJECT_REQUEST,

		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
			IdleTimeout: durationpb.New(time.Hour), // of a connection without requests
			// Upstreams in the manner of CGI cannot tell x_keyward_user from x-keyward-user.
			HeadersWithUnderscoresAction: corev3.HttpProtocolOptions_REJECT_REQUEST,
		},
		Http2ProtocolOptions: &corev3.Http2ProtocolOptions{
			MaxConcurrentStreams:        wrapperspb.UInt32(100),
			InitialStreamWindowSize:     wrapperspb.UInt32(64 << 10),
			InitialConnectionWindowSize: wrapperspb.UInt32(1 << 20),
		},
		RequestTimeout:    timeout(c.RequestTimeout),
		StreamIdleTimeout: timeout(c.IdleTimeout),
		// Any other upgrade would tunnel bytes that nobody has checked.
		UpgradeConfigs: []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
		// Clients need not know that there is an Envoy.
		ServerHeaderTransformation: hcmv3.HttpConnectionManager_PASS_THROUGH,
	}
	if c.AccessLog {
		log, err := stdoutLog()
		if err != nil {
			return nil, err
		}
		m.AccessLog = []*accesslogv3.AccessLog{log}
	}
	if err := addFeedback(m, c); err != nil {
		return nil, err
	}
	return m, addUsage(m, c)
}

// downstreamBuffer leaves room for the bodies that are looked at.
func downstreamBuffer(c Config) uint32 {
	if len(c.Bodies) == 0 {
		return connectionBuffer
	}
	return max(connectionBuffer, uint32(c.MaxRequestBytes))
}

// timeout is in Envoy's terms, where 0 means none.
func timeout(d time.Duration) *durationpb.Duration { return durationpb.New(max(d, 0)) }

func routes(c Config) (*routev3.RouteConfiguration, error) {
	all, err := bodyRoutes(c)
	if err != nil {
		return nil, err
	}
	all = append(all, &routev3.Route{Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}})
	for _, r := range all {
		r.Action = &routev3.Route_Route{Route: &routev3.RouteAction{
			ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: upstreamCluster},
			Timeout:          timeout(c.ResponseTimeout),
		}}
	}
	return &routev3.RouteConfiguration{
		Name:         Listener,
		VirtualHosts: []*routev3.VirtualHost{{Name: "all", Domains: []string{"*"}, Routes: all}},
	}, nil
}

// httpFilters returns the filters in their order: what clients may not send is gone before keyward is
// asked, and the router is last.
func httpFilters(c Config) ([]*hcmv3.HttpFilter, error) {
	var filters []*hcmv3.HttpFilter
	for _, f := range []struct {
		name   string
		config message
	}{
		{"envoy.filters.http.header_mutation", removeIdentity(c)},
		{wellknown.HTTPExternalAuthorization, extAuthz(c)},
		{wellknown.Router, &routerv3.Router{
			SuppressEnvoyHeaders: true, // nor that there is one by x-envoy-upstream-service-time
		}},
	} {
		config, err := pack(f.config)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.name, err)
		}
		filters = append(filters, &hcmv3.HttpFilter{Name: f.name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: config}})
	}
	return filters, nil
}

// removeIdentity takes keyward's names, and what could pass for them, from what clients send: also where
// ext_authz is switched off, and in trailers, which ext_authz never sees.
func removeIdentity(c Config) *headermutationv3.HeaderMutation {
	var remove []*mutationv3.HeaderMutation
	for _, pattern := range identityPatterns(c.IdentityHeaders) {
		remove = append(remove, &mutationv3.HeaderMutation{Action: &mutationv3.HeaderMutation_RemoveOnMatch_{
			RemoveOnMatch: &mutationv3.HeaderMutation_RemoveOnMatch{KeyMatcher: &matcherv3.StringMatcher{
				MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: pattern}},
			}},
		}})
	}
	// Keys are never taken from trailers, so they must not go on in them either.
	trailers := slices.Clone(remove)
	for _, name := range c.CredentialHeaders {
		trailers = append(trailers, &mutationv3.HeaderMutation{Action: &mutationv3.HeaderMutation_Remove{Remove: name}})
	}
	return &headermutationv3.HeaderMutation{Mutations: &headermutationv3.Mutations{
		RequestMutations: remove, RequestTrailersMutations: trailers,
	}}
}

func extAuthz(c Config) *extauthzv3.ExtAuthz {
	// Fewer headers are less to send, and keep cookies and the rest from keyward. Method, path and host
	// are sent always.
	headers := append([]string{"content-type", "x-request-id"}, c.CredentialHeaders...)
	switch c.ClientAddress {
	case ClientEnvoyExternal:
		headers = append(headers, "x-envoy-external-address")
	case ClientForwardedFor:
		headers = append(headers, "x-forwarded-for")
	}
	if c.CORSPreflight {
		headers = append(headers, "origin", "access-control-request-method")
	}
	if len(c.Bodies) > 0 { // by which keyward knows whether it was sent all of a body, and as others read it
		headers = append(headers, "content-length", "transfer-encoding", "content-encoding")
	}
	headers = append(headers, c.CheckHeaders...)
	allowed := &matcherv3.ListStringMatcher{}
	seen := map[string]bool{}
	for _, h := range headers {
		if !seen[h] {
			seen[h] = true
			allowed.Patterns = append(allowed.Patterns, &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: h}})
		}
	}
	var known []string
	if c.TokenClaims {
		known = []string{"envoy.filters.http.jwt_authn"}
	}
	return &extauthzv3.ExtAuthz{
		MetadataContextNamespaces: known,

		StatPrefix:          c.StatPrefix,
		TransportApiVersion: corev3.ApiVersion_V3,
		// No retry policy: a request must not be counted twice.
		Services: &extauthzv3.ExtAuthz_GrpcService{GrpcService: &corev3.GrpcService{
			TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: keywardCluster}},
			Timeout:         durationpb.New(c.CheckTimeout),
		}},
		// failure_mode_allow stays false. Envoy's own answer, 403, would tell a client that its key is bad.
		StatusOnError: &typev3.HttpStatus{Code: typev3.StatusCode_ServiceUnavailable},
		// As they came: otherwise repeated headers are joined and bytes that are not UTF-8 replaced.
		EncodeRawHeaders:  true,
		AllowedHeaders:    allowed,
		ValidateMutations: true,
		// A mistake in keyward cannot reach further than its own headers: neither path nor host.
		DecoderHeaderMutationRules: &mutationv3.HeaderMutationRules{
			DisallowAll:     wrapperspb.Bool(true),
			AllowExpression: &matcherv3.RegexMatcher{Regex: changeablePattern(namespaces(slices.Concat(c.CredentialHeaders, c.IdentityHeaders)))},
		},
	}
}

func keywardClusterOf(c Config) (*clusterv3.Cluster, error) {
	var endpoint *corev3.Address
	discovery := clusterv3.Cluster_STATIC
	if socket, ok := strings.CutPrefix(c.Keyward, unixScheme); ok {
		endpoint = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: socket}}}
	} else {
		endpoint = socketAddress(c.Keyward)
		discovery = discoveryOf(c.Keyward)
	}
	cluster := newCluster(keywardCluster, discovery, endpoint)
	cluster.ConnectTimeout = durationpb.New(250 * time.Millisecond)
	cluster.CircuitBreakers = breakers(maxChecks)
	// A keyward that is away is known within two seconds and then refused at once. Without health checks,
	// and with Envoy's panic threshold, requests would go on being sent to it, and access log entries
	// be lost without a trace.
	cluster.HealthChecks = []*corev3.HealthCheck{{
		Timeout:            durationpb.New(time.Second),
		Interval:           durationpb.New(time.Second),
		NoTrafficInterval:  durationpb.New(time.Second),
		UnhealthyThreshold: wrapperspb.UInt32(1),
		HealthyThreshold:   wrapperspb.UInt32(1),
		HealthChecker:      &corev3.HealthCheck_GrpcHealthCheck_{GrpcHealthCheck: &corev3.HealthCheck_GrpcHealthCheck{}},
	}}
	cluster.CommonLbConfig = &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: 0}}
	err := speakHTTP(cluster, &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig{
		ProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
			Http2ProtocolOptions: &corev3.Http2ProtocolOptions{ConnectionKeepalive: &corev3.KeepaliveSettings{
				Interval: durationpb.New(10 * time.Second), Timeout: durationpb.New(3 * time.Second),
			}},
		},
	})
	if err != nil {
		return nil, err
	}
	if c.KeywardTLS != nil {
		if cluster.TransportSocket, err = transportSocket(*c.KeywardTLS); err != nil {
			return nil, err
		}
	}
	return cluster, cluster.ValidateAll()
}

func upstreamClusterOf(c Config) (*clusterv3.Cluster, error) {
	discovery := clusterv3.Cluster_STATIC
	endpoints := make([]*corev3.Address, len(c.Upstreams))
	for i, u := range c.Upstreams {
		endpoints[i] = socketAddress(u)
		if discoveryOf(u) == clusterv3.Cluster_STRICT_DNS {
			discovery = clusterv3.Cluster_STRICT_DNS
		}
	}
	cluster := newCluster(upstreamCluster, discovery, endpoints...)
	cluster.ConnectTimeout = durationpb.New(5 * time.Second)
	cluster.CircuitBreakers = breakers(maxConnections)
	cluster.PerConnectionBufferLimitBytes = wrapperspb.UInt32(connectionBuffer)
	protocol := &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig{
		ProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: &corev3.Http1ProtocolOptions{}},
	}
	if c.UpstreamHTTP2 {
		protocol.ProtocolConfig = &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
			Http2ProtocolOptions: &corev3.Http2ProtocolOptions{
				InitialStreamWindowSize:     wrapperspb.UInt32(64 << 10),
				InitialConnectionWindowSize: wrapperspb.UInt32(1 << 20),
			},
		}
	}
	if err := speakHTTP(cluster, protocol); err != nil {
		return nil, err
	}
	return cluster, cluster.ValidateAll()
}

func newCluster(name string, discovery clusterv3.Cluster_DiscoveryType, addresses ...*corev3.Address) *clusterv3.Cluster {
	endpoints := make([]*endpointv3.LbEndpoint, len(addresses))
	for i, a := range addresses {
		endpoints[i] = &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: a}}}
	}
	c := &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: discovery},
		LoadAssignment: &endpointv3.ClusterLoadAssignment{
			ClusterName: name,
			Endpoints:   []*endpointv3.LocalityLbEndpoints{{LbEndpoints: endpoints}},
		},
	}
	if discovery == clusterv3.Cluster_STRICT_DNS {
		// Envoy's default takes only IPv6 where a name has both, as localhost has, and many servers listen
		// on IPv4 alone.
		c.DnsLookupFamily = clusterv3.Cluster_V4_PREFERRED
	}
	return c
}

func discoveryOf(hostPort string) clusterv3.Cluster_DiscoveryType {
	if _, err := netip.ParseAddrPort(hostPort); err != nil {
		return clusterv3.Cluster_STRICT_DNS
	}
	return clusterv3.Cluster_STATIC
}

func breakers(limit uint32) *clusterv3.CircuitBreakers {
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
		MaxConnections:     wrapperspb.UInt32(limit),
		MaxPendingRequests: wrapperspb.UInt32(limit),
		MaxRequests:        wrapperspb.UInt32(limit),
	}}}
}

func speakHTTP(c *clusterv3.Cluster, protocol *upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig) error {
	options, err := pack(&upstreamhttpv3.HttpProtocolOptions{
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{IdleTimeout: durationpb.New(time.Hour)},
		UpstreamProtocolOptions:   &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: protocol},
	})
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}
	return err
}

// transportSocket is TLS in which keyward proves its name and, if asked to, Envoy its own.
func transportSocket(c TLS) (*corev3.TransportSocket, error) {
	file := func(path string) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_Filename{Filename: path}}
	}
	name := &tlsv3.SubjectAltNameMatcher{
		SanType: tlsv3.SubjectAltNameMatcher_DNS,
		Matcher: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: c.ServerName}},
	}
	sni := c.ServerName
	if _, err := netip.ParseAddr(c.ServerName); err == nil {
		name.SanType = tlsv3.SubjectAltNameMatcher_IP_ADDRESS
		sni = "" // RFC 6066: not for addresses
	}
	common := &tlsv3.CommonTlsContext{
		// keyward has 1.3; as a client Envoy stops at 1.2 unless told otherwise.
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		},
		AlpnProtocols: []string{"h2"}, // grpc-go insists
		ValidationContextType: &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			TrustedCa: file(c.CAFile), MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{name},
		}},
	}
	if c.CertFile != "" {
		common.TlsCertificates = []*tlsv3.TlsCertificate{{CertificateChain: file(c.CertFile), PrivateKey: file(c.KeyFile)}}
	}
	config, err := pack(&tlsv3.UpstreamTlsContext{Sni: sni, CommonTlsContext: common})
	if err != nil {
		return nil, err
	}
	return &corev3.TransportSocket{
		Name: "envoy.transport_sockets.tls", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: config},
	}, nil
}

// socketAddress is of a host:port that validate has seen.
func socketAddress(hostPort string) *corev3.Address {
	host, port, _ := net.SplitHostPort(hostPort)
	n, _ := strconv.ParseUint(port, 10, 16)
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(n)},
	}}}
}

// listenAddress makes "::" mean all addresses, as it does nearly everywhere else, and not all of IPv6.
func listenAddress(ipPort string) *corev3.Address {
	a := socketAddress(ipPort)
	a.GetSocketAddress().Ipv4Compat = a.GetSocketAddress().Address == "::"
	return a
}

const stdoutLogger = "envoy.access_loggers.stdout"

func stdoutLog() (*accesslogv3.AccessLog, error) {
	format, err := structpb.NewStruct(map[string]any{
		"time":          "%START_TIME%",
		"method":        "%REQ(:METHOD)%",
		"host":          "%REQ(:AUTHORITY)%",
		"path":          "%PATH(NQ)%", // no query: it may hold a key
		"protocol":      "%PROTOCOL%",
		"status":        "%RESPONSE_CODE%",
		"details":       "%RESPONSE_CODE_DETAILS%",
		"flags":         "%RESPONSE_FLAGS%",
		"bytesReceived": "%BYTES_RECEIVED%",
		"bytesSent":     "%BYTES_SENT%",
		"durationMs":    "%DURATION%",
		"client":        "%DOWNSTREAM_REMOTE_ADDRESS%",
		"requestId":     "%REQ(X-REQUEST-ID)%",
	})
	if err != nil {
		return nil, err
	}
	config, err := pack(&streamlogv3.StdoutAccessLog{AccessLogFormat: &streamlogv3.StdoutAccessLog_LogFormat{
		LogFormat: &corev3.SubstitutionFormatString{Format: &corev3.SubstitutionFormatString_JsonFormat{JsonFormat: format}},
	}})
	if err != nil {
		return nil, err
	}
	return &accesslogv3.AccessLog{
		Name: stdoutLogger, ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: config},
		// Not every time a request is said to run still.
		Filter: logTypes(datav3.AccessLogType_DownstreamEnd),
	}, nil
}
