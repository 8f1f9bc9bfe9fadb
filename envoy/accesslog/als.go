package accesslog

import (
	"net/netip"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

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
	f := wire.Walk(message)
	for f.Next() {
		switch {
		case f.IsBytes(1): // identifier
			if !readIdentifier(f.Bytes, &from) {
				f.Broken = true
			}
			identified = true
		case f.IsBytes(3): // tcp_logs: an alternative to the http_logs before it
			logs = f.Rest
		}
	}
	if f.Broken {
		take(entry{broken: true})
		return
	}
	if identified {
		named(from)
	}
	for f := wire.Walk(logs); f.Next(); {
		if !f.IsBytes(2) { // http_logs
			continue
		}
		entries := wire.Walk(f.Bytes)
		for entries.Next() {
			if entries.IsBytes(1) {
				take(readHTTPEntry(entries.Bytes))
			}
		}
		if entries.Broken {
			take(entry{broken: true})
		}
	}
}

func readIdentifier(b []byte, to *origin) bool {
	f := wire.Walk(b)
	for f.Next() {
		switch {
		case f.IsBytes(1): // node
			node := wire.Walk(f.Bytes)
			for node.Next() {
				switch {
				case node.IsBytes(1):
					to.node = wire.Text(node.Bytes)
				case node.IsBytes(2):
					to.cluster = wire.Text(node.Bytes)
				}
			}
			if node.Broken {
				return false
			}
		case f.IsBytes(2):
			to.log = wire.Text(f.Bytes)
		}
	}
	return !f.Broken
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
	f := wire.Walk(b)
	for f.Next() {
		if f.IsBytes(1) && !c.read(f.Bytes) { // common_properties
			return entry{broken: true}
		}
	}
	if f.Broken {
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
	f := wire.Walk(b)
	for f.Next() {
		ok := true
		switch {
		case f.IsBytes(5):
			ok = c.start.read(f.Bytes)
		case f.IsBytes(17):
			ok = c.readMetadata(f.Bytes)
		case f.IsBytes(20): // downstream_direct_remote_address
			ok = c.readAddress(f.Bytes)
		case f.IsBytes(23):
			c.timed = true
			ok = c.duration.read(f.Bytes)
		case f.IsVarint(33):
			c.logType = int32(f.Varint)
		}
		if !ok {
			return false
		}
	}
	return !f.Broken
}

func (m *moment) read(b []byte) bool {
	f := wire.Walk(b)
	for f.Next() {
		switch {
		case f.IsVarint(1):
			m.seconds = int64(f.Varint)
		case f.IsVarint(2):
			m.nanos = int32(f.Varint)
		}
	}
	return !f.Broken
}

// readAddress reads an envoy.config.core.v3.Address.
func (c *common) readAddress(b []byte) bool {
	f := wire.Walk(b)
	for f.Next() {
		switch {
		case f.IsBytes(1): // socket_address
			if !c.readSocketAddress(f.Bytes) {
				return false
			}
		case f.IsBytes(2), f.IsBytes(3): // pipe, envoy_internal_address
			c.address, c.port = "", 0
		}
	}
	return !f.Broken
}

func (c *common) readSocketAddress(b []byte) bool {
	f := wire.Walk(b)
	for f.Next() {
		switch {
		case f.IsBytes(2):
			c.address = wire.Text(f.Bytes)
		case f.IsVarint(3):
			c.port = uint32(f.Varint)
		case f.IsBytes(4): // named_port
			c.port = 0
		}
	}
	return !f.Broken
}

// readMetadata reads an envoy.config.core.v3.Metadata: maps of structs of maps of values. An entry of a
// map replaces an earlier one with its key.
func (c *common) readMetadata(b []byte) bool {
	f := wire.Walk(b)
	for f.Next() {
		if !f.IsBytes(1) { // filter_metadata
			continue
		}
		found, ok := hasKey(f.Bytes, metadataNamespace)
		if !ok {
			return false
		}
		if found {
			c.lease = ""
			for values := wire.Walk(f.Bytes); values.Next(); {
				if values.IsBytes(2) && !c.readStruct(values.Bytes) {
					return false
				}
			}
		}
	}
	return !f.Broken
}

// readStruct reads a google.protobuf.Struct.
func (c *common) readStruct(b []byte) bool {
	f := wire.Walk(b)
	for f.Next() {
		if !f.IsBytes(1) { // fields
			continue
		}
		found, ok := hasKey(f.Bytes, metadataLease)
		if !ok {
			return false
		}
		if found {
			c.lease = ""
			for values := wire.Walk(f.Bytes); values.Next(); {
				if values.IsBytes(2) && !c.readValue(values.Bytes) {
					return false
				}
			}
		}
	}
	return !f.Broken
}

// readValue reads a google.protobuf.Value, of which only text is a lease.
func (c *common) readValue(b []byte) bool {
	f := wire.Walk(b)
	for f.Next() {
		switch {
		case f.IsBytes(3):
			c.lease = wire.Text(f.Bytes)
		case f.IsVarint(1), f.Is(2, protowire.Fixed64Type), f.IsVarint(4), f.IsBytes(5), f.IsBytes(6):
			c.lease = ""
		}
	}
	return !f.Broken
}

// hasKey reports whether an entry of a map has this key, which may come after the value. ok is false if
// the entry is not in wire format.
func hasKey(entry []byte, key string) (has, ok bool) {
	f := wire.Walk(entry)
	for f.Next() {
		if f.IsBytes(1) {
			has = string(f.Bytes) == key
		}
	}
	return has, !f.Broken
}
