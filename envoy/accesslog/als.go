package accesslog

import (
	"math"
	"net/netip"
	"time"

	"keyward/envoy/wire"
)

// Where our decision leaves what it tells the log.
const (
	metadataNamespace = "envoy.filters.http.ext_authz"
	metadataLease     = "keyward.lease"
	metadataKey       = "keyward.key_id"
	metadataInstance  = "keyward.instance"
)

// The values of envoy.data.accesslog.v3.AccessLogType that matter.
const (
	alsDownstreamPeriodic = 5
	alsDownstreamEnd      = 6
)

// readALS reads an envoy.service.accesslog.v3.StreamAccessLogsMessage.
func readALS(message []byte, named func(origin), take func(entry)) {
	var from origin
	identified := false
	logs := message
	f := walk(message)
	for f.next() {
		switch {
		case f.isBytes(1): // identifier
			if !readIdentifier(f.bytes, &from) {
				f.broken = true
			}
			identified = true
		case f.isBytes(3): // tcp_logs: an alternative to the http_logs before it
			logs = f.rest
		}
	}
	if f.broken {
		take(entry{broken: true})
		return
	}
	if identified {
		named(from)
	}
	for f := walk(logs); f.next(); {
		if !f.isBytes(2) { // http_logs
			continue
		}
		entries := walk(f.bytes)
		for entries.next() {
			if entries.isBytes(1) {
				take(readHTTPEntry(entries.bytes))
			}
		}
		if entries.broken {
			take(entry{broken: true})
		}
	}
}

func readIdentifier(b []byte, to *origin) bool {
	f := walk(b)
	for f.next() {
		switch {
		case f.isBytes(1): // node
			node := walk(f.bytes)
			for node.next() {
				switch {
				case node.isBytes(1):
					to.node = wire.Text(node.bytes)
				case node.isBytes(2):
					to.cluster = wire.Text(node.bytes)
				}
			}
			if node.broken {
				return false
			}
		case f.isBytes(2):
			to.log = wire.Text(f.bytes)
		}
	}
	return !f.broken
}

// common is what matters of an envoy.data.accesslog.v3.AccessLogCommon, as it is collected.
type common struct {
	lease           string
	key, instance   string
	sent, received  uint64 // bytes on the client's connection
	address         string
	port            uint32
	start, duration moment
	timed           bool // there is a duration
	logType         int32
}

// A moment is a google.protobuf.Timestamp or Duration.
type moment struct {
	seconds int64
	nanos   int32
}

// readHTTPEntry reads an envoy.data.accesslog.v3.HTTPAccessLogEntry.
func readHTTPEntry(b []byte) entry {
	var c common
	var status uint32
	f := walk(b)
	for f.next() {
		ok := true
		switch {
		case f.isBytes(1): // common_properties
			ok = c.read(f.bytes)
		case f.isBytes(4): // response
			ok = readStatus(f.bytes, &status)
		}
		if !ok {
			return entry{broken: true}
		}
	}
	if f.broken {
		return entry{broken: true}
	}
	e := entry{
		lease: c.lease, start: time.Unix(c.start.seconds, int64(c.start.nanos)),
		key: c.key, instance: c.instance, status: int64(status), received: whole(c.received), sent: whole(c.sent), took: c.duration.asDuration(),
	}
	switch c.logType {
	case alsDownstreamEnd:
		e.event = eventEnd
	case alsDownstreamPeriodic:
		e.event = eventPeriodic
	}
	if c.timed {
		e.end = time.Unix(c.start.seconds+c.duration.seconds, int64(c.start.nanos)+int64(c.duration.nanos))
	}
	if c.address != "" && c.port <= 1<<16-1 {
		if addr, err := netip.ParseAddr(c.address); err == nil {
			e.peer = netip.AddrPortFrom(addr, uint16(c.port))
		}
	}
	return e
}

// whole is unknown for what no int64 holds.
func whole(n uint64) int64 {
	if n > math.MaxInt64 {
		return unknown
	}
	return int64(n)
}

// readStatus reads the response_code, a google.protobuf.UInt32Value, of an
// envoy.data.accesslog.v3.HTTPResponseProperties.
func readStatus(b []byte, to *uint32) bool {
	f := walk(b)
	for f.next() {
		if !f.isBytes(1) {
			continue
		}
		value := walk(f.bytes)
		for value.next() {
			if value.isVarint(1) {
				*to = uint32(value.number())
			}
		}
		if value.broken {
			return false
		}
	}
	return !f.broken
}

func (c *common) read(b []byte) bool {
	f := walk(b)
	for f.next() {
		ok := true
		switch {
		case f.isBytes(5):
			ok = c.start.read(f.bytes)
		case f.isBytes(17):
			ok = c.readMetadata(f.bytes)
		case f.isBytes(20): // downstream_direct_remote_address
			ok = c.readAddress(f.bytes)
		case f.isBytes(23):
			c.timed = true
			ok = c.duration.read(f.bytes)
		case f.isVarint(29): // downstream_wire_bytes_sent
			c.sent = f.number()
		case f.isVarint(30): // downstream_wire_bytes_received
			c.received = f.number()
		case f.isVarint(33):
			c.logType = int32(f.number())
		}
		if !ok {
			return false
		}
	}
	return !f.broken
}

func (m *moment) read(b []byte) bool {
	f := walk(b)
	for f.next() {
		switch {
		case f.isVarint(1):
			m.seconds = int64(f.number())
		case f.isVarint(2):
			m.nanos = int32(f.number())
		}
	}
	return !f.broken
}

// asDuration is unknown for what is none, or too long to be true.
func (m *moment) asDuration() time.Duration {
	if m.seconds < 0 || m.nanos < 0 || m.nanos >= 1e9 || m.seconds > int64(maxTook/time.Second) {
		return unknown
	}
	return time.Duration(m.seconds)*time.Second + time.Duration(m.nanos)
}

// readAddress reads an envoy.config.core.v3.Address.
func (c *common) readAddress(b []byte) bool {
	f := walk(b)
	for f.next() {
		switch {
		case f.isBytes(1): // socket_address
			if !c.readSocketAddress(f.bytes) {
				return false
			}
		case f.isBytes(2), f.isBytes(3): // pipe, envoy_internal_address
			c.address, c.port = "", 0
		}
	}
	return !f.broken
}

func (c *common) readSocketAddress(b []byte) bool {
	f := walk(b)
	for f.next() {
		switch {
		case f.isBytes(2):
			c.address = wire.Text(f.bytes)
		case f.isVarint(3):
			c.port = uint32(f.number())
		case f.isBytes(4): // named_port
			c.port = 0
		}
	}
	return !f.broken
}

// readMetadata reads an envoy.config.core.v3.Metadata: maps of structs of maps of values. An entry of a
// map replaces an earlier one with its key.
func (c *common) readMetadata(b []byte) bool {
	f := walk(b)
	for f.next() {
		if !f.isBytes(1) { // filter_metadata
			continue
		}
		key, ok := keyOf(f.bytes)
		if !ok {
			return false
		}
		if key == metadataNamespace {
			c.lease, c.key, c.instance = "", "", ""
			for values := walk(f.bytes); values.next(); {
				if values.isBytes(2) && !c.readStruct(values.bytes) {
					return false
				}
			}
		}
	}
	return !f.broken
}

// readStruct reads a google.protobuf.Struct.
func (c *common) readStruct(b []byte) bool {
	f := walk(b)
	for f.next() {
		if !f.isBytes(1) { // fields
			continue
		}
		key, ok := keyOf(f.bytes)
		if !ok {
			return false
		}
		var to *string
		switch key {
		case metadataLease:
			to = &c.lease
		case metadataKey:
			to = &c.key
		case metadataInstance:
			to = &c.instance
		default:
			continue
		}
		*to = ""
		for values := walk(f.bytes); values.next(); {
			if values.isBytes(2) && !readText(values.bytes, to) {
				return false
			}
		}
	}
	return !f.broken
}

// readText reads a google.protobuf.Value, of which only text matters.
func readText(b []byte, to *string) bool {
	f := walk(b)
	for f.next() {
		switch {
		case f.isBytes(3):
			*to = wire.Text(f.bytes)
		case f.isVarint(1), f.tag == wire.Fixed64(2), f.isVarint(4), f.isBytes(5), f.isBytes(6):
			*to = ""
		}
	}
	return !f.broken
}

// keyOf returns the key of an entry of a map, which may come after the value. ok is false if the entry is
// not in wire format.
func keyOf(entry []byte) (key string, ok bool) {
	f := walk(entry)
	for f.next() {
		if f.isBytes(1) {
			key = wire.Text(f.bytes)
		}
	}
	return key, !f.broken
}
