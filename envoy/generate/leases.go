package generate

import (
	"slices"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	grpclogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"
	otlplogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/open_telemetry/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/envoyproxy/go-control-plane/pkg/wellknown"
	otlpv1 "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A Feedback is how Envoy tells keyward that requests ended, which is what max-concurrent lives on.
type Feedback string

// The kinds of feedback: Envoy's own access-log protocol or OTLP logs, each entry at once or in batches
// of 20 ms. Batches cost both sides less and let a key's next request wait longer.
const (
	FeedbackALS         Feedback = "als"
	FeedbackALSBatched  Feedback = "alsBatched"
	FeedbackOTLP        Feedback = "otlp"
	FeedbackOTLPBatched Feedback = "otlpBatched"
	FeedbackNone        Feedback = "none"
)

// Feedbacks lists them all.
func Feedbacks() []Feedback {
	return []Feedback{FeedbackALS, FeedbackALSBatched, FeedbackOTLP, FeedbackOTLPBatched, FeedbackNone}
}

// DefaultRenewEvery is how often Envoy says that a request still runs.
const DefaultRenewEvery = 10 * time.Second

const (
	metadataNamespace = wellknown.HTTPExternalAuthorization
	leaseLogName      = "keyward-leases"
	// Each entry at once, still bounded: 0 would have no bound.
	eachEntry = 1
	// A batch that is kept while keyward is away holds about 2,300 entries.
	batchBytes = 1 << 20
	// batchInterval is also that of loggers that send each entry at once: it is a timer that runs without
	// traffic, and nothing is gained by a shorter one.
	batchInterval = 20 * time.Millisecond

	usageLogName = "keyward-usage"
	// Usage is in no hurry: a batch each second, or when there are some 500 entries. An Envoy that is
	// killed loses that much of it.
	usageInterval = time.Second
	usageBytes    = 256 << 10
)

// addFeedback has Envoy tell keyward which requests ended and which still run.
func addFeedback(m *hcmv3.HttpConnectionManager, c Config) error {
	if c.Feedback == FeedbackNone {
		return nil
	}
	size := uint32(eachEntry)
	if c.Feedback == FeedbackALSBatched || c.Feedback == FeedbackOTLPBatched {
		size = batchBytes
	}
	m.AccessLogOptions = &hcmv3.HttpConnectionManager_HcmAccessLogOptions{AccessLogFlushInterval: durationpb.New(c.RenewEvery)}
	return addLog(m, c, leaseFilter(), &grpclogv3.CommonGrpcAccessLogConfig{
		LogName: leaseLogName, BufferFlushInterval: durationpb.New(batchInterval), BufferSizeBytes: wrapperspb.UInt32(size),
	},
		attribute("lease", metadataOf("keyward.lease")),
		attribute("peer", "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%"),
		attribute("start", "%START_TIME(%s%9f)%"),
		attribute("type", "%ACCESS_LOG_TYPE%"),
		attribute("duration", "%DURATION%"),
	)
}

// addUsage has Envoy tell keyward how each request of a known key went, when it has ended.
func addUsage(m *hcmv3.HttpConnectionManager, c Config) error {
	if !c.Usage {
		return nil
	}
	filter := and(logTypes(datav3.AccessLogType_DownstreamEnd), metadataIs("keyward.key_id", isPresent(), false))
	return addLog(m, c, filter, &grpclogv3.CommonGrpcAccessLogConfig{
		LogName: usageLogName, BufferFlushInterval: durationpb.New(usageInterval), BufferSizeBytes: wrapperspb.UInt32(usageBytes),
	},
		attribute("key", metadataOf("keyward.key_id")),
		attribute("instance", metadataOf("keyward.instance")),
		attribute("status", "%RESPONSE_CODE%"),
		attribute("received", "%DOWNSTREAM_WIRE_BYTES_RECEIVED%"),
		attribute("sent", "%DOWNSTREAM_WIRE_BYTES_SENT%"),
		attribute("duration", "%DURATION%"),
		attribute("type", "%ACCESS_LOG_TYPE%"),
	)
}

// addLog adds an access log to keyward, by the protocol of the feedback: Envoy's own if there is none.
// OpenTelemetry carries the attributes only; Envoy's own protocol whatever there is.
func addLog(m *hcmv3.HttpConnectionManager, c Config, filter *accesslogv3.AccessLogFilter, common *grpclogv3.CommonGrpcAccessLogConfig, attributes ...*otlpv1.KeyValue) error {
	common.TransportApiVersion = corev3.ApiVersion_V3
	common.GrpcService = &corev3.GrpcService{
		TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: keywardCluster}},
	}
	name := wellknown.HTTPGRPCAccessLog
	var config message = &grpclogv3.HttpGrpcAccessLogConfig{CommonConfig: common}
	if c.Feedback == FeedbackOTLP || c.Feedback == FeedbackOTLPBatched {
		name = "envoy.access_loggers.open_telemetry"
		config = &otlplogv3.OpenTelemetryAccessLogConfig{
			CommonConfig: common, //nolint:staticcheck // what replaces it came with 1.37
			// Envoy's own labels stay on: they name the node and the log.
			Attributes: &otlpv1.KeyValueList{Values: attributes},
		}
	}
	packed, err := pack(config)
	if err != nil {
		return err
	}
	m.AccessLog = append(m.AccessLog, &accesslogv3.AccessLog{
		Name: name, Filter: filter, ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: packed},
	})
	return nil
}

func metadataOf(key string) string { return "%DYNAMIC_METADATA(" + metadataNamespace + ":" + key + ")%" }

func attribute(key, value string) *otlpv1.KeyValue {
	return &otlpv1.KeyValue{Key: key, Value: &otlpv1.AnyValue{Value: &otlpv1.AnyValue_StringValue{StringValue: value}}}
}

// leaseFilter lets through what says something of a lease: entries with one, and the ends of requests
// whose grant Envoy may not have taken. Those are requests whose client was gone during the Check, which
// have no response code, and those whose Check failed, which are unlike denied ones in that nothing
// came with them.
func leaseFilter() *accesslogv3.AccessLogFilter {
	ends := func(more ...*accesslogv3.AccessLogFilter) *accesslogv3.AccessLogFilter {
		return and(append([]*accesslogv3.AccessLogFilter{logTypes(datav3.AccessLogType_DownstreamEnd)}, more...)...)
	}
	return and(
		logTypes(datav3.AccessLogType_DownstreamEnd, datav3.AccessLogType_DownstreamPeriodic),
		&accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_OrFilter{OrFilter: &accesslogv3.OrFilter{
			Filters: []*accesslogv3.AccessLogFilter{
				metadataIs("keyward.lease", isPresent(), false),
				ends(&accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_StatusCodeFilter{
					StatusCodeFilter: &accesslogv3.StatusCodeFilter{Comparison: &accesslogv3.ComparisonFilter{
						Op:    accesslogv3.ComparisonFilter_EQ,
						Value: &corev3.RuntimeUInt32{DefaultValue: 0, RuntimeKey: "keyward.unused"},
					}},
				}}),
				ends(
					&accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_ResponseFlagFilter{
						ResponseFlagFilter: &accesslogv3.ResponseFlagFilter{Flags: []string{"UAEX"}},
					}},
					// "Is not there": the filter has no such thing, and ignores invert. So a match that never
					// succeeds, and success where there is nothing to match.
					metadataIs("keyward.denied", &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_StringMatch{
						StringMatch: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: "never"}},
					}}, true),
				),
			},
		}}},
	)
}

func and(filters ...*accesslogv3.AccessLogFilter) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_AndFilter{
		AndFilter: &accesslogv3.AndFilter{Filters: filters},
	}}
}

func logTypes(types ...datav3.AccessLogType) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_LogTypeFilter{
		LogTypeFilter: &accesslogv3.LogTypeFilter{Types: slices.Clone(types)},
	}}
}

func isPresent() *matcherv3.ValueMatcher {
	return &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_PresentMatch{PresentMatch: true}}
}

func metadataIs(key string, value *matcherv3.ValueMatcher, ifMissing bool) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_MetadataFilter{
		MetadataFilter: &accesslogv3.MetadataFilter{
			Matcher: &matcherv3.MetadataMatcher{
				Filter: metadataNamespace,
				Path:   []*matcherv3.MetadataMatcher_PathSegment{{Segment: &matcherv3.MetadataMatcher_PathSegment_Key{Key: key}}},
				Value:  value,
			},
			MatchIfKeyNotFound: wrapperspb.Bool(ifMissing),
		},
	}}
}
