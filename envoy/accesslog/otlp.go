package accesslog

import (
	"net/netip"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"keyward/envoy/wire"
)

// The attributes of a log record, as the configuration that keyward generates has Envoy write them.
const (
	attributeLease    = "lease"    // %DYNAMIC_METADATA(envoy.filters.http.ext_authz:keyward.lease)%
	attributePeer     = "peer"     // %DOWNSTREAM_DIRECT_REMOTE_ADDRESS%
	attributeStart    = "start"    // %START_TIME(%s%9f)%, nanoseconds of Unix time
	attributeType     = "type"     // %ACCESS_LOG_TYPE%
	attributeDuration = "duration" // %DURATION%, milliseconds; only for the metric of delays

	// absent is what Envoy writes for a value that there is not.
	absent = "-"
)

// The attributes that Envoy gives the resource, unless it is told not to.
const (
	resourceNode    = "node_name"
	resourceCluster = "cluster_name"
	resourceLog     = "log_name"
)

// readOTLP reads an opentelemetry.proto.collector.logs.v1.ExportLogsServiceRequest.
func readOTLP(message []byte, named func(origin), take func(entry)) {
	f := wire.Walk(message)
	for f.Next() {
		if f.IsBytes(1) && !readResourceLogs(f.Bytes, named, take) { // resource_logs
			take(entry{broken: true})
		}
	}
	if f.Broken {
		take(entry{broken: true})
	}
}

func readResourceLogs(b []byte, named func(origin), take func(entry)) bool {
	var from origin
	f := wire.Walk(b)
	for f.Next() { // the resource first, wherever it stands
		if f.IsBytes(1) && !readResource(f.Bytes, &from) {
			return false
		}
	}
	if f.Broken {
		return false
	}
	named(from)
	for f := wire.Walk(b); f.Next(); {
		if !f.IsBytes(2) { // scope_logs
			continue
		}
		records := wire.Walk(f.Bytes)
		for records.Next() {
			if records.IsBytes(2) { // log_records
				take(readRecord(records.Bytes))
			}
		}
		if records.Broken {
			return false
		}
	}
	return true
}

func readResource(b []byte, to *origin) bool {
	f := wire.Walk(b)
	for f.Next() {
		if !f.IsBytes(1) { // attributes
			continue
		}
		key, value, ok := readKeyValue(f.Bytes)
		if !ok {
			return false
		}
		switch key {
		case resourceNode:
			to.node = value
		case resourceCluster:
			to.cluster = value
		case resourceLog:
			to.log = value
		}
	}
	return !f.Broken
}

// readRecord reads an opentelemetry.proto.logs.v1.LogRecord.
func readRecord(b []byte) entry {
	var e entry
	var peer, start, took, logType string
	f := wire.Walk(b)
	for f.Next() {
		if !f.IsBytes(6) { // attributes
			continue
		}
		key, value, ok := readKeyValue(f.Bytes)
		if !ok {
			return entry{broken: true}
		}
		if value == absent {
			value = ""
		}
		switch key {
		case attributeLease:
			e.lease = value
		case attributePeer:
			peer = value
		case attributeStart:
			start = value
		case attributeDuration:
			took = value
		case attributeType:
			logType = value
		}
	}
	if f.Broken {
		return entry{broken: true}
	}
	switch logType {
	case "DownstreamEnd":
		e.event = eventEnd
	case "DownstreamPeriodic":
		e.event = eventPeriodic
	}
	if peer != "" && peer[0] != '/' && peer[0] != '@' { // not a socket's path, which would cost an error each time
		if addr, err := netip.ParseAddrPort(peer); err == nil {
			e.peer = addr
		}
	}
	if nanos, ok := wholeNumber(start); ok {
		e.start = time.Unix(0, nanos)
		if millis, ok := wholeNumber(took); ok {
			e.end = e.start.Add(time.Duration(millis) * time.Millisecond)
		}
	}
	return e
}

func wholeNumber(s string) (int64, bool) {
	if s == "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// readKeyValue reads an opentelemetry.proto.common.v1.KeyValue. A value that is not text is "".
func readKeyValue(b []byte) (key, value string, ok bool) {
	f := wire.Walk(b)
	for f.Next() {
		switch {
		case f.IsBytes(1):
			key = wire.Text(f.Bytes)
		case f.IsBytes(2): // an AnyValue: a choice
			v := wire.Walk(f.Bytes)
			for v.Next() {
				switch {
				case v.IsBytes(1):
					value = wire.Text(v.Bytes)
				case v.IsVarint(2), v.IsVarint(3), v.Is(4, protowire.Fixed64Type), v.IsBytes(5), v.IsBytes(6), v.IsBytes(7):
					value = ""
				}
			}
			if v.Broken {
				return "", "", false
			}
		}
	}
	return key, value, !f.Broken
}
