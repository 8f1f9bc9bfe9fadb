package accesslog

import (
	"net/netip"
	"time"

	"keyward/envoy/wire"
)

// Where our decision leaves what it tells the log.
const (
	metadataNamespace = "envoy.filters.http.ext_authz"
	metadataLease     = "keyward.lease"
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
	f := walk(b)
	for f.next() {
		if f.isBytes(1) && !c.read(f.bytes) { // common_properties
			return entry{broken: true}
		}
	}
	if f.broken {
		return entry{broken: true}
	}
	e := entry{lease: c.lease, start: time.Unix(c.start.seconds, int64(c.start.nanos))}
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
		found, ok := hasKey(f.bytes, metadataNamespace)
		if !ok {
			return false
		}
		if found {
			c.lease = ""
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
		found, ok := hasKey(f.bytes, metadataLease)
		if !ok {
			return false
		}
		if found {
			c.lease = ""
			for values := walk(f.bytes); values.next(); {
				if values.isBytes(2) && !c.readValue(values.bytes) {
					return false
				}
			}
		}
	}
	return !f.broken
}

// readValue reads a google.protobuf.Value, of which only text is a lease.
func (c *common) readValue(b []byte) bool {
	f := walk(b)
	for f.next() {
		switch {
		case f.isBytes(3):
			c.lease = wire.Text(f.bytes)
		case f.isVarint(1), f.tag == wire.Fixed64(2), f.isVarint(4), f.isBytes(5), f.isBytes(6):
			c.lease = ""
		}
	}
	return !f.broken
}

// hasKey reports whether an entry of a map has this key, which may come after the value. ok is false if
// the entry is not in wire format.
func hasKey(entry []byte, key string) (has, ok bool) {
	f := walk(entry)
	for f.next() {
		if f.isBytes(1) {
			has = string(f.bytes) == key
		}
	}
	return has, !f.broken
}
