package accesslog

import (
	"net/netip"
	"strconv"
	"time"

	"keyward/envoy/wire"
)

// The attributes of a log record, as the configuration that keyward generates has Envoy write them.
const (
	attributeLease    = "lease"    // %DYNAMIC_METADATA(envoy.filters.http.ext_authz:keyward.lease)%
	attributePeer     = "peer"     // %DOWNSTREAM_DIRECT_REMOTE_ADDRESS%
	attributeStart    = "start"    // %START_TIME(%s%9f)%, nanoseconds of Unix time
	attributeType     = "type"     // %ACCESS_LOG_TYPE%
	attributeDuration = "duration" // %DURATION%, milliseconds; of a lease only for the metric of delays

	// Those of usage.
	attributeKey      = "key"      // %DYNAMIC_METADATA(envoy.filters.http.ext_authz:keyward.key_id)%
	attributeInstance = "instance" // %DYNAMIC_METADATA(envoy.filters.http.ext_authz:keyward.instance)%
	attributeStatus   = "status"   // %RESPONSE_CODE%
	attributeReceived = "received" // %DOWNSTREAM_WIRE_BYTES_RECEIVED%
	attributeSent     = "sent"     // %DOWNSTREAM_WIRE_BYTES_SENT%

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
	f := walk(message)
	for f.next() {
		if f.isBytes(1) && !readResourceLogs(f.bytes, named, take) { // resource_logs
			take(entry{broken: true})
		}
	}
	if f.broken {
		take(entry{broken: true})
	}
}

func readResourceLogs(b []byte, named func(origin), take func(entry)) bool {
	var from origin
	f := walk(b)
	for f.next() { // the resource first, wherever it stands
		if f.isBytes(1) && !readResource(f.bytes, &from) {
			return false
		}
	}
	if f.broken {
		return false
	}
	named(from)
	for f := walk(b); f.next(); {
		if !f.isBytes(2) { // scope_logs
			continue
		}
		records := walk(f.bytes)
		for records.next() {
			if records.isBytes(2) { // log_records
				take(readRecord(records.bytes))
			}
		}
		if records.broken {
			return false
		}
	}
	return true
}

func readResource(b []byte, to *origin) bool {
	f := walk(b)
	for f.next() {
		if !f.isBytes(1) { // attributes
			continue
		}
		key, value, ok := readKeyValue(f.bytes)
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
	return !f.broken
}

// readRecord reads an opentelemetry.proto.logs.v1.LogRecord.
func readRecord(b []byte) entry {
	var e entry
	var peer, start, took, logType, status, received, sent string
	f := walk(b)
	for f.next() {
		if !f.isBytes(6) { // attributes
			continue
		}
		key, value, ok := readKeyValue(f.bytes)
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
		case attributeKey:
			e.key = value
		case attributeInstance:
			e.instance = value
		case attributeStatus:
			status = value
		case attributeReceived:
			received = value
		case attributeSent:
			sent = value
		}
	}
	if f.broken {
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
	millis, timed := wholeNumber(took)
	if nanos, ok := wholeNumber(start); ok {
		e.start = time.Unix(0, nanos)
		if timed {
			e.end = e.start.Add(time.Duration(millis) * time.Millisecond)
		}
	}
	switch {
	case timed && millis >= 0 && millis <= maxTook.Milliseconds():
		e.took = time.Duration(millis) * time.Millisecond
	case took != "":
		e.took = unknown
	}
	e.status, e.received, e.sent = count(status), count(received), count(sent)
	return e
}

// count is 0 for what is not there, and unknown for what is no number.
func count(s string) int64 {
	if n, ok := wholeNumber(s); ok || s == "" {
		return n
	}
	return unknown
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
	f := walk(b)
	for f.next() {
		switch {
		case f.isBytes(1):
			key = wire.Text(f.bytes)
		case f.isBytes(2): // an AnyValue: a choice
			v := walk(f.bytes)
			for v.next() {
				switch {
				case v.isBytes(1):
					value = wire.Text(v.bytes)
				case v.isVarint(2), v.isVarint(3), v.tag == wire.Fixed64(4), v.isBytes(5), v.isBytes(6), v.isBytes(7):
					value = ""
				}
			}
			if v.broken {
				return "", "", false
			}
		}
	}
	return key, value, !f.broken
}
