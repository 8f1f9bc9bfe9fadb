package accesslog

import (
	"encoding/binary"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"keyward/envoy/wire"
)

// reading is what a parser found in a message.
type reading struct {
	Origins []origin
	Entries []entry
}

func read(parse parser, message []byte) (r reading) {
	parse(message, func(o origin) { r.Origins = append(r.Origins, o) }, func(e entry) { r.Entries = append(r.Entries, e) })
	return r
}

var exported = cmp.AllowUnexported(origin{}, entry{})

// compare holds a parser to what generated code says; where that refuses the message, to not panicking.
func compare(t *testing.T, parse parser, oracle func([]byte) (reading, error), message []byte) {
	t.Helper()
	got := read(parse, message)
	want, err := oracle(message)
	if err == nil && (!slices.Equal(got.Origins, want.Origins) || !slices.Equal(got.Entries, want.Entries)) {
		t.Errorf("%x\n(-generated +ours):\n%s", message, cmp.Diff(want, got, exported, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })))
	}
}

// alsOracle reads ALS by generated code.
func alsOracle(message []byte) (r reading, err error) {
	var m alsv3.StreamAccessLogsMessage
	if err := proto.Unmarshal(message, &m); err != nil {
		return r, err
	}
	if id := m.GetIdentifier(); id != nil {
		r.Origins = append(r.Origins, origin{id.GetNode().GetId(), id.GetNode().GetCluster(), id.GetLogName()})
	}
	for _, logged := range m.GetHttpLogs().GetLogEntry() {
		c := logged.GetCommonProperties()
		start := c.GetStartTime()
		facts := c.GetMetadata().GetFilterMetadata()["envoy.filters.http.ext_authz"].GetFields()
		bytes := func(n uint64) int64 {
			if n > math.MaxInt64 {
				return -1
			}
			return int64(n)
		}
		e := entry{
			lease: facts["keyward.lease"].GetStringValue(),
			start: time.Unix(start.GetSeconds(), int64(start.GetNanos())),
			key:   facts["keyward.key_id"].GetStringValue(), instance: facts["keyward.instance"].GetStringValue(),
			status:   int64(logged.GetResponse().GetResponseCode().GetValue()),
			received: bytes(c.GetDownstreamWireBytesReceived()), sent: bytes(c.GetDownstreamWireBytesSent()),
			took: c.GetDuration().AsDuration(), // 0 for none, and saturated
		}
		if d := c.GetDuration(); d.GetSeconds() < 0 || d.GetSeconds() > 30*24*3600 || d.GetNanos() < 0 || d.GetNanos() > 999_999_999 {
			e.took = -1
		}
		switch c.GetAccessLogType() {
		case datav3.AccessLogType_DownstreamEnd:
			e.event = eventEnd
		case datav3.AccessLogType_DownstreamPeriodic:
			e.event = eventPeriodic
		}
		if d := c.GetDuration(); d != nil {
			e.end = time.Unix(start.GetSeconds()+d.GetSeconds(), int64(start.GetNanos())+int64(d.GetNanos()))
		}
		socket := c.GetDownstreamDirectRemoteAddress().GetSocketAddress()
		if addr, err := netip.ParseAddr(socket.GetAddress()); err == nil && socket.GetPortValue() <= math.MaxUint16 {
			e.peer = netip.AddrPortFrom(addr, uint16(socket.GetPortValue()))
		}
		r.Entries = append(r.Entries, e)
	}
	return r, nil
}

// otlpOracle reads OTLP by reflection over its schema.
func otlpOracle(message []byte) (r reading, err error) {
	m := dynamicpb.NewMessage(otlpSchema.Messages().ByName("ExportLogsServiceRequest"))
	if err := proto.Unmarshal(message, m); err != nil {
		return r, err
	}
	each(m, "resource_logs", func(logs protoreflect.Message) {
		from := attributes(get(logs, "resource").Message())
		r.Origins = append(r.Origins, origin{from["node_name"], from["cluster_name"], from["log_name"]})
		each(logs, "scope_logs", func(scope protoreflect.Message) {
			each(scope, "log_records", func(record protoreflect.Message) {
				said := attributes(record)
				for k, v := range said {
					if v == "-" {
						said[k] = ""
					}
				}
				number := func(key string) int64 {
					n, err := strconv.ParseInt(said[key], 10, 64)
					if err != nil && said[key] != "" {
						return -1
					}
					return n
				}
				e := entry{
					lease: said["lease"], key: said["key"], instance: said["instance"],
					status: number("status"), received: number("received"), sent: number("sent"),
				}
				if millis := number("duration"); millis < 0 || millis > 30*24*3600*1000 {
					e.took = -1
				} else {
					e.took = time.Duration(millis) * time.Millisecond
				}
				switch said["type"] {
				case "DownstreamEnd":
					e.event = eventEnd
				case "DownstreamPeriodic":
					e.event = eventPeriodic
				}
				if addr, err := netip.ParseAddrPort(said["peer"]); err == nil {
					e.peer = addr
				}
				if nanos, err := strconv.ParseInt(said["start"], 10, 64); err == nil {
					e.start = time.Unix(0, nanos)
					if millis, err := strconv.ParseInt(said["duration"], 10, 64); err == nil {
						e.end = e.start.Add(time.Duration(millis) * time.Millisecond)
					}
				}
				r.Entries = append(r.Entries, e)
			})
		})
	})
	return r, nil
}

func get(m protoreflect.Message, name protoreflect.Name) protoreflect.Value {
	return m.Get(m.Descriptor().Fields().ByName(name))
}

func each(m protoreflect.Message, list protoreflect.Name, do func(protoreflect.Message)) {
	all := get(m, list).List()
	for i := range all.Len() {
		do(all.Get(i).Message())
	}
}

func attributes(m protoreflect.Message) map[string]string {
	all := map[string]string{}
	each(m, "attributes", func(pair protoreflect.Message) {
		all[get(pair, "key").String()] = get(get(pair, "value").Message(), "string_value").String()
	})
	return all
}

// What follows writes the wire format by hand, also what no generated code would write.

func join(parts ...[]byte) []byte { return slices.Concat(parts...) }

// field is a text or a message made of parts.
func field(number protowire.Number, parts ...[]byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), join(parts...))
}

func str(number protowire.Number, s string) []byte { return field(number, []byte(s)) }

func varint(number protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, number, protowire.VarintType), v)
}

func fixed64(number protowire.Number, v uint64) []byte {
	return protowire.AppendFixed64(protowire.AppendTag(nil, number, protowire.Fixed64Type), v)
}

func fixed32(number protowire.Number, v uint32) []byte {
	return protowire.AppendFixed32(protowire.AppendTag(nil, number, protowire.Fixed32Type), v)
}

func group(number protowire.Number, parts ...[]byte) []byte {
	b := append(protowire.AppendTag(nil, number, protowire.StartGroupType), join(parts...)...)
	return protowire.AppendTag(b, number, protowire.EndGroupType)
}

// unknownFields are of numbers that no message here has, one of each type.
var unknownFields = join(str(1000, "?"), varint(1001, math.MaxUint64), fixed64(1002, 1), fixed32(1003, 1),
	group(1004, varint(1, 1), group(2, str(1, "deep"))))

// als wraps AccessLogCommons into a message; otlp the fields of log records.
func als(commons ...[]byte) []byte {
	var entries []byte
	for _, c := range commons {
		entries = append(entries, field(1, field(1, c))...)
	}
	return field(2, entries)
}

func otlp(records ...[]byte) []byte {
	var all []byte
	for _, r := range records {
		all = append(all, field(2, r)...)
	}
	return field(1, field(2, all))
}

func metadata(parts ...[]byte) []byte { return field(17, parts...) }

// mapOf is an entry of a map with text keys.
func mapOf(number protowire.Number, key string, values ...[]byte) []byte {
	parts := [][]byte{str(1, key)}
	for _, v := range values {
		parts = append(parts, field(2, v))
	}
	return field(number, parts...)
}

func leaseStruct(lease string) []byte { return mapOf(1, metadataLease, str(3, lease)) }

func usageMetadata(key, instance string) []byte {
	return metadata(mapOf(1, metadataNamespace, mapOf(1, metadataKey, str(3, key)), mapOf(1, metadataInstance, str(3, instance))))
}

func leaseMetadata(lease string) []byte {
	return metadata(mapOf(1, metadataNamespace, leaseStruct(lease)))
}

func attribute(key, value string) []byte { return field(6, str(1, key), field(2, str(1, value))) }

var (
	endType  = varint(33, 6)
	startAt  = field(5, varint(1, 1_700_000_000), varint(2, 123456789))
	peerAddr = field(20, field(1, str(2, "203.0.113.9"), varint(3, 4711)))
	wholeALS = join(leaseMetadata("L"), endType, startAt, peerAddr, field(23, varint(1, 3), varint(2, 5)))

	wholeOTLP = join(attribute("lease", "L"), attribute("peer", "203.0.113.9:4711"),
		attribute("start", "1700000000123456789"), attribute("type", "DownstreamEnd"), attribute("duration", "70"))

	usedALS = field(2, field(1, field(1, usageMetadata("K", "I"), endType, field(23, varint(1, 3), varint(2, 5)), varint(30, 7), varint(29, 8)),
		field(3, str(5, "/")), field(4, field(1, varint(1, 404)), varint(2, 9))))
	usedOTLP = otlp(join(attribute("key", "K"), attribute("instance", "I"), attribute("status", "404"), attribute("received", "7"), attribute("sent", "8"),
		attribute("type", "DownstreamEnd"), attribute("duration", "70")))
)

// oddALS are messages that generated code reads.
var oddALS = map[string][]byte{
	"empty":                         {},
	"as Envoy sends it":             join(field(1, field(1, str(1, "node"), str(2, "cluster")), str(2, "log")), als(wholeALS)),
	"many":                          als(wholeALS, endType, nil, wholeALS),
	"empty entry":                   field(2, field(1)),
	"no entry":                      field(2),
	"unknown fields":                join(unknownFields, field(1, unknownFields, field(1, unknownFields)), field(2, unknownFields, field(1, unknownFields, field(1, unknownFields, wholeALS, unknownFields)))),
	"unknown fields deeper":         als(join(metadata(unknownFields, mapOf(1, metadataNamespace, unknownFields, leaseStruct("L")), unknownFields), field(5, unknownFields), field(20, unknownFields, field(1, unknownFields, str(2, "::1"), varint(3, 7))), endType)),
	"identifier twice merges":       join(field(1, field(1, str(1, "a"), str(2, "b")), str(2, "x")), field(1, field(1, str(2, "c")))),
	"identifier after the logs":     join(als(wholeALS), field(1, str(2, "x"))),
	"empty identifier":              field(1),
	"logs twice merge":              join(als(wholeALS), als(endType)),
	"tcp after http: only tcp":      join(als(wholeALS), field(3, field(1))),
	"http after tcp: only http":     join(als(wholeALS), field(3), als(endType), als(wholeALS)),
	"tcp between":                   join(field(3), als(wholeALS), field(3), als(endType), field(3)),
	"common twice merges":           field(2, field(1, field(1, leaseMetadata("L")), field(1, endType), field(1, startAt), field(1, peerAddr))),
	"scalars: the last":             als(join(varint(33, 5), endType, varint(33, 6), field(5, varint(1, 1), varint(1, 2)), startAt)),
	"enum cut to 32 bits":           als(varint(33, 1<<32+6)),
	"negative enum":                 als(varint(33, math.MaxUint64)),
	"other types":                   als(varint(33, 4), varint(33, 10), varint(33, 7)),
	"wrong wire types":              als(join(str(33, "\x06"), fixed32(33, 6), varint(5, 1), varint(17, 1), varint(20, 1), fixed64(23, 1), group(17))),
	"packed is not for one value":   als(str(33, "\x06\x05")),
	"start twice merges":            als(join(field(5, varint(1, 5)), field(5, varint(2, 7)))),
	"start with extremes":           als(join(field(5, varint(1, math.MaxInt64), varint(2, math.MaxUint64)), field(23, varint(1, math.MaxInt64), varint(2, 1<<63)))),
	"no duration is not a zero one": als(startAt, join(startAt, field(23))),
	"address: pipe":                 als(field(20, field(2, str(1, "/run/x.sock")))),
	"address: pipe after socket":    als(join(peerAddr, field(20, field(2)))),
	"address: socket after pipe":    als(join(field(20, field(2)), peerAddr)),
	"address: internal":             als(join(peerAddr, field(20, field(3)))),
	"address: sockets merge":        als(field(20, field(1, str(2, "::1")), field(1, varint(3, 9)))),
	"address: merge ends at pipe":   als(field(20, field(1, str(2, "::1")), field(2), field(1, varint(3, 9)))),
	"port: named":                   als(field(20, field(1, str(2, "::1"), varint(3, 9), str(4, "http")))),
	"port: named, then a number":    als(field(20, field(1, str(2, "::1"), str(4, "http"), varint(3, 9)))),
	"port: too large":               als(field(20, field(1, str(2, "::1"), varint(3, 1<<16)))),
	"port: cut to 32 bits":          als(field(20, field(1, str(2, "::1"), varint(3, 1<<32+9)))),
	"address with a zone":           als(field(20, field(1, str(2, "fe80::1%eth0"), varint(3, 9)))),
	"address that is a name":        als(field(20, field(1, str(2, "localhost"), varint(3, 9)))),
	"metadata twice merges":         als(join(leaseMetadata("L"), metadata(mapOf(1, "other", leaseStruct("M"))))),
	"metadata: a key replaces":      als(join(leaseMetadata("L"), metadata(mapOf(1, metadataNamespace)))),
	"metadata: the last key":        als(metadata(field(1, str(1, "other"), field(2, leaseStruct("L")), str(1, metadataNamespace)))),
	"metadata: key lost":            als(metadata(field(1, str(1, metadataNamespace), field(2, leaseStruct("L")), str(1, "other")))),
	"metadata: no key":              als(metadata(field(1, field(2, leaseStruct("L"))))),
	"metadata: structs merge":       als(metadata(mapOf(1, metadataNamespace, leaseStruct("L"), mapOf(1, "k", str(3, "v"))))),
	"metadata: values: the last":    als(metadata(mapOf(1, metadataNamespace, leaseStruct("L"), leaseStruct("M")))),
	"metadata: another map":         als(metadata(mapOf(2, metadataNamespace, leaseStruct("L")))),
	"value: merges":                 als(metadata(mapOf(1, metadataNamespace, mapOf(1, metadataLease, str(3, "L"), str(3, "M"))))),
	"value: key comes last":         als(metadata(mapOf(1, metadataNamespace, field(1, field(2, str(3, "L")), str(1, metadataLease))))),
	"value: key replaces":           als(metadata(mapOf(1, metadataNamespace, leaseStruct("L"), mapOf(1, metadataLease)))),
	"value: null after":             als(metadata(mapOf(1, metadataNamespace, mapOf(1, metadataLease, str(3, "L"), varint(1, 0))))),
	"value: number after":           als(metadata(mapOf(1, metadataNamespace, mapOf(1, metadataLease, join(str(3, "L"), fixed64(2, 1)))))),
	"value: bool after":             als(metadata(mapOf(1, metadataNamespace, mapOf(1, metadataLease, join(str(3, "L"), varint(4, 1)))))),
	"value: struct after":           als(metadata(mapOf(1, metadataNamespace, mapOf(1, metadataLease, join(str(3, "L"), field(5)))))),
	"value: list after":             als(metadata(mapOf(1, metadataNamespace, mapOf(1, metadataLease, join(str(3, "L"), field(6)))))),
	"value: text after all":         als(metadata(mapOf(1, metadataNamespace, mapOf(1, metadataLease, join(field(6), varint(4, 1), str(3, "L")))))),
	"value: wrong types after":      als(metadata(mapOf(1, metadataNamespace, mapOf(1, metadataLease, join(str(3, "L"), varint(2, 1), str(4, "x"), fixed32(5, 1), varint(3, 1)))))),
	"usage":                         usedALS,
	"usage: the last":               join(usedALS, als(join(usageMetadata("K", "I"), usageMetadata("L", "J"), varint(29, 1), varint(29, 2), varint(30, 3), varint(30, 4)))),
	"usage: facts are of one map":   als(join(usageMetadata("K", "I"), leaseMetadata("L"))),
	"usage: lease, then a key":      als(join(leaseMetadata("L"), metadata(mapOf(1, metadataNamespace, mapOf(1, metadataKey, str(3, "K")))))),
	"usage: facts merge":            als(metadata(mapOf(1, metadataNamespace, leaseStruct("L"), mapOf(1, metadataKey, str(3, "K")), mapOf(1, metadataInstance, varint(1, 0))))),
	"usage: a number for a key":     als(metadata(mapOf(1, metadataNamespace, mapOf(1, metadataKey, join(str(3, "K"), fixed64(2, 1)))))),
	"usage: extremes":               als(join(varint(29, math.MaxUint64), varint(30, 1<<63), field(23, varint(1, math.MaxInt64)))),
	"usage: too long":               als(field(23, varint(1, 30*24*3600), varint(2, 999_999_999)), field(23, varint(1, 30*24*3600+1)), field(23, varint(2, 1_000_000_000)), field(23, varint(2, math.MaxUint64))),
	"usage: wrong wire types":       als(join(str(29, "x"), fixed64(30, 1))),
	"status: merges":                field(2, field(1, field(4, field(1, varint(1, 200))), field(4, field(1)), field(4, field(1, varint(1, 500), unknownFields), unknownFields))),
	"status: cut to 32 bits":        field(2, field(1, field(4, field(1, varint(1, 1<<32+200))))),
	"status: wrong wire types":      field(2, field(1, varint(4, 1), field(4, varint(1, 200)), field(4, field(1, str(1, "200"))))),
	"tag written long":              join([]byte{0x92, 0x80, 0x00, 0x02}, field(1)), // field 2
}

// oddOTLP are messages that generated code reads.
var oddOTLP = map[string][]byte{
	"empty": {},
	"as Envoy sends it": field(1,
		field(1, field(1, str(1, "log_name"), field(2, str(1, "log"))), field(1, str(1, "node_name"), field(2, str(1, "node"))), field(1, str(1, "cluster_name"), field(2, str(1, "cluster")))),
		field(2, field(2, wholeOTLP))),
	"many":                      otlp(wholeOTLP, nil, attribute("type", "DownstreamPeriodic"), wholeOTLP),
	"unknown fields":            join(unknownFields, field(1, unknownFields, field(1, unknownFields), field(2, unknownFields, field(2, unknownFields, wholeOTLP, unknownFields)))),
	"unknown fields deeper":     otlp(field(6, unknownFields, str(1, "lease"), field(2, unknownFields, str(1, "L"), unknownFields), unknownFields)),
	"resource after the logs":   field(1, field(2, field(2, wholeOTLP)), field(1, field(1, str(1, "log_name"), field(2, str(1, "x"))))),
	"resources merge":           field(1, field(1, field(1, str(1, "node_name"), field(2, str(1, "a")))), field(1, field(1, str(1, "cluster_name"), field(2, str(1, "b"))))),
	"several resources":         join(field(1, field(1, field(1, str(1, "node_name"), field(2, str(1, "a"))))), field(1)),
	"attribute twice: the last": otlp(join(attribute("lease", "L"), attribute("lease", "M"))),
	"attribute without value":   otlp(join(attribute("lease", "L"), field(6, str(1, "lease")))),
	"attribute without key":     otlp(field(6, field(2, str(1, "L")))),
	"key after value":           otlp(field(6, field(2, str(1, "L")), str(1, "lease"))),
	"key twice":                 otlp(field(6, str(1, "other"), field(2, str(1, "L")), str(1, "lease"))),
	"value twice merges":        otlp(field(6, str(1, "lease"), field(2, str(1, "L")), field(2))),
	"value: the last":           otlp(field(6, str(1, "lease"), field(2, str(1, "L"), str(1, "M")))),
	"value: a bool after":       otlp(field(6, str(1, "lease"), field(2, str(1, "L"), varint(2, 1)))),
	"value: a number after":     otlp(field(6, str(1, "lease"), field(2, str(1, "L"), varint(3, 1)))),
	"value: a double after":     otlp(field(6, str(1, "lease"), field(2, str(1, "L"), fixed64(4, 1)))),
	"value: a list after":       otlp(field(6, str(1, "lease"), field(2, str(1, "L"), field(5)))),
	"value: a map after":        otlp(field(6, str(1, "lease"), field(2, str(1, "L"), field(6)))),
	"value: bytes after":        otlp(field(6, str(1, "lease"), field(2, str(1, "L"), str(7, "L")))),
	"value: text after all":     otlp(field(6, str(1, "lease"), field(2, str(7, "L"), varint(2, 1), str(1, "L")))),
	"value: wrong types after":  otlp(field(6, str(1, "lease"), field(2, str(1, "L"), str(2, "x"), fixed32(3, 1), varint(4, 1), varint(1, 1)))),
	"nothing known":             otlp(join(attribute("lease", "-"), attribute("peer", "-"), attribute("start", "-"), attribute("type", "-"), attribute("duration", "-"))),
	"IPv6":                      otlp(attribute("peer", "[2001:db8::1]:4711")),
	"IPv6 with a zone":          otlp(attribute("peer", "[fe80::1%eth0]:4711")),
	"a socket's path":           otlp(attribute("peer", "/run/x.sock"), attribute("peer", "@abstract:1"), attribute("peer", "x:1")),
	"numbers that are none":     otlp(join(attribute("start", "17e9"), attribute("duration", "1")), join(attribute("start", "1"), attribute("duration", "0.5")), attribute("start", "99999999999999999999"), join(attribute("start", "-5"), attribute("duration", "-9223372036854775808"))),
	"usage":                     usedOTLP,
	"usage: nothing known":      otlp(join(attribute("key", "-"), attribute("instance", "-"), attribute("status", "-"), attribute("received", "-"), attribute("sent", "-"))),
	"usage: no numbers":         otlp(join(attribute("status", "OK"), attribute("received", "1e3"), attribute("sent", "99999999999999999999"), attribute("duration", "x"))),
	"usage: below nothing":      otlp(join(attribute("status", "-1"), attribute("received", "-2"), attribute("sent", "-3"), attribute("duration", "-1"))),
	"usage: too long":           otlp(attribute("duration", "2592000000"), attribute("duration", "2592000001")),
	"severity, body, times":     otlp(join(fixed64(1, 1_700_000_000_000_000_000), fixed64(11, 1), varint(2, 9), field(5, str(1, "body")), fixed32(8, 1), wholeOTLP)),
}

func TestALSIsReadAsGeneratedCodeDoes(t *testing.T) {
	for name, message := range oddALS {
		t.Run(name, func(t *testing.T) {
			if _, err := alsOracle(message); err != nil {
				t.Fatalf("generated code refuses it: %v", err)
			}
			compare(t, readALS, alsOracle, message)
		})
	}
}

func TestOTLPIsReadAsReflectionDoes(t *testing.T) {
	for name, message := range oddOTLP {
		t.Run(name, func(t *testing.T) {
			if _, err := otlpOracle(message); err != nil {
				t.Fatalf("its schema refuses it: %v", err)
			}
			compare(t, readOTLP, otlpOracle, message)
		})
	}
}

// TestWholeEntries spells out what an ordinary entry becomes: the oracles share too much with the code.
func TestWholeEntries(t *testing.T) {
	want := entry{
		event: eventEnd, lease: "L", peer: netip.MustParseAddrPort("203.0.113.9:4711"),
		start: time.Unix(1_700_000_000, 123456789), end: time.Unix(1_700_000_003, 123456794), took: 3*time.Second + 5,
	}
	if got := read(readALS, oddALS["as Envoy sends it"]); !slices.Equal(got.Entries, []entry{want}) || !slices.Equal(got.Origins, []origin{{"node", "cluster", "log"}}) {
		t.Errorf("ALS: got %+v, want %+v", got, want)
	}
	want.end, want.took = time.Unix(1_700_000_000, 193456789), 70*time.Millisecond
	if got := read(readOTLP, oddOTLP["as Envoy sends it"]); !slices.Equal(got.Entries, []entry{want}) || !slices.Equal(got.Origins, []origin{{"node", "cluster", "log"}}) {
		t.Errorf("OTLP: got %+v, want %+v", got, want)
	}
}

// TestWholeUsage does the same for the entries of the other log.
func TestWholeUsage(t *testing.T) {
	want := entry{
		event: eventEnd, start: time.Unix(0, 0), end: time.Unix(3, 5), key: "K", instance: "I", status: 404, received: 7, sent: 8, took: 3*time.Second + 5,
	}
	if got := read(readALS, usedALS); !slices.Equal(got.Entries, []entry{want}) {
		t.Errorf("ALS: got %+v, want %+v", got, want)
	}
	want.start, want.end, want.took = time.Time{}, time.Time{}, 70*time.Millisecond
	if got := read(readOTLP, usedOTLP); !slices.Equal(got.Entries, []entry{want}) {
		t.Errorf("OTLP: got %+v, want %+v", got, want)
	}
}

// TestBrokenMessages: a broken part is told once, and what stands apart from it still counts.
func TestBrokenMessages(t *testing.T) {
	cut := func(b []byte) []byte { return b[:len(b)-1] }
	end := entry{event: eventEnd, start: time.Unix(0, 0)}
	endOTLP := entry{event: eventEnd}
	bad := entry{broken: true}
	badVarint := join(protowire.AppendTag(nil, 1, protowire.VarintType), []byte(strings.Repeat("\xff", 11)))
	record := attribute("type", "DownstreamEnd")
	for _, tt := range []struct {
		name    string
		parse   parser
		message []byte
		want    []entry
	}{
		{"als: cut at the end", readALS, cut(als(endType)), []entry{bad}},
		{"als: cut after whole logs", readALS, cut(join(als(endType), als(endType))), []entry{bad}},
		{"als: garbage", readALS, []byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), []entry{bad}},
		{"als: field 0", readALS, []byte{0x02, 0x00}, []entry{bad}},
		{"als: end of a group that did not begin", readALS, []byte{0x0c}, []entry{bad}},
		{"als: group without end", readALS, []byte{0x0b}, []entry{bad}},
		{"als: length beyond all", readALS, []byte("\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f"), []entry{bad}},
		{"als: identifier", readALS, join(field(1, badVarint), als(endType)), []entry{bad}},
		{"als: node", readALS, join(field(1, field(1, badVarint)), als(endType)), []entry{bad}},
		{"als: one entry of three", readALS, als(endType, join(endType, badVarint), endType), []entry{end, bad, end}},
		{"als: the entry around the common", readALS, field(2, field(1, field(1, endType), badVarint), field(1, field(1, endType))), []entry{bad, end}},
		{"als: entries cut", readALS, field(2, cut(join(field(1, field(1, endType)), field(1, field(1, endType))))), []entry{end, bad}},
		{"als: start", readALS, als(join(endType, field(5, badVarint))), []entry{bad}},
		{"als: duration", readALS, als(join(endType, field(23, badVarint))), []entry{bad}},
		{"als: address", readALS, als(join(endType, field(20, badVarint))), []entry{bad}},
		{"als: socket address", readALS, als(join(endType, field(20, field(1, badVarint)))), []entry{bad}},
		{"als: metadata", readALS, als(join(endType, metadata(badVarint))), []entry{bad}},
		{"als: map of metadata", readALS, als(join(endType, metadata(field(1, badVarint)))), []entry{bad}},
		{"als: struct", readALS, als(join(endType, metadata(mapOf(1, metadataNamespace, badVarint)))), []entry{bad}},
		{"als: map of the struct", readALS, als(join(endType, metadata(mapOf(1, metadataNamespace, field(1, badVarint))))), []entry{bad}},
		{"als: value", readALS, als(join(endType, metadata(mapOf(1, metadataNamespace, mapOf(1, metadataLease, badVarint))))), []entry{bad}},
		{"als: response", readALS, field(2, field(1, field(1, endType), field(4, badVarint))), []entry{bad}},
		{"als: response code", readALS, field(2, field(1, field(4, field(1, badVarint)), field(1, endType))), []entry{bad}},
		{"otlp: cut", readOTLP, cut(join(otlp(record), otlp(record))), []entry{endOTLP, bad}},
		{"otlp: garbage", readOTLP, []byte("\xff"), []entry{bad}},
		{"otlp: one resource's logs of two", readOTLP, join(field(1, badVarint), otlp(record)), []entry{bad, endOTLP}},
		{"otlp: resource", readOTLP, field(1, field(1, badVarint), field(2, field(2, record))), []entry{bad}},
		{"otlp: resource's attribute", readOTLP, field(1, field(1, field(1, badVarint)), field(2, field(2, record))), []entry{bad}},
		{"otlp: scope", readOTLP, field(1, field(2, field(2, record), badVarint)), []entry{endOTLP, bad}},
		{"otlp: one record of three", readOTLP, otlp(record, join(record, badVarint), record), []entry{endOTLP, bad, endOTLP}},
		{"otlp: attribute", readOTLP, otlp(field(6, badVarint)), []entry{bad}},
		{"otlp: value", readOTLP, otlp(field(6, field(2, badVarint))), []entry{bad}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := read(tt.parse, tt.message); !slices.Equal(got.Entries, tt.want) {
				t.Errorf("got %+v, want %+v", got.Entries, tt.want)
			}
		})
	}
}

func FuzzReadALS(f *testing.F) {
	for _, message := range oddALS {
		f.Add(message)
	}
	f.Add(marshal(f, &alsv3.StreamAccessLogsMessage{
		Identifier: &alsv3.StreamAccessLogsMessage_Identifier{Node: &corev3.Node{Id: "n", Cluster: "c"}, LogName: "l"},
		LogEntries: &alsv3.StreamAccessLogsMessage_HttpLogs{HttpLogs: &alsv3.StreamAccessLogsMessage_HTTPAccessLogEntries{
			LogEntry: []*datav3.HTTPAccessLogEntry{{CommonProperties: &datav3.AccessLogCommon{AccessLogType: 5}}},
		}},
	}))
	fuzz(f, readALS, alsOracle)
}

func FuzzReadOTLP(f *testing.F) {
	for _, message := range oddOTLP {
		f.Add(message)
	}
	fuzz(f, readOTLP, otlpOracle)
}

// fuzz compares with the oracle, and sees that any bytes go through the whole server without a panic.
func fuzz(f *testing.F, parse parser, oracle func([]byte) (reading, error)) {
	w := newWorld()
	f.Fuzz(func(t *testing.T, message []byte) {
		compare(t, parse, oracle, message)
		w.hear(t, parse, message)
		w.hearUsage(t, parse, message)
		if n := w.counter(t, "keyward_access_log_panics_total", ""); n > 0 {
			t.Errorf("%x: a panic", message)
		}
	})
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestNamesAreCopied: what outlives a message must be a copy.
func TestNamesAreCopied(t *testing.T) {
	b := []byte("node")
	s := &sender{id: Unknown, cluster: Unknown}
	s.name(wire.Text(b), "")
	binary.BigEndian.PutUint32(b, 0)
	if got := s.node(); got.ID != "node" || got.Cluster != Unknown {
		t.Errorf("got %+v", got)
	}
}
