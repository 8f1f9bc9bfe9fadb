package check

import (
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"keyward/authz"
	"keyward/envoy/wire"
)

// about is what an answer needs to know of the request that it answers.
type about struct {
	grpc bool // the caller speaks gRPC
}

// Errors of fill. Envoy makes none of them; whoever does learns what to change.
var (
	errMalformed    = status.Error(codes.InvalidArgument, "not a CheckRequest: its bytes are no protobuf message, or hold text that is not UTF-8")
	errNoAttributes = status.Error(codes.InvalidArgument, "a Check without attributes")
	errNotHTTP      = status.Error(codes.Unimplemented, "keyward decides HTTP requests only: use the HTTP filter envoy.filters.http.ext_authz")
)

// A reader takes what a decision needs out of a CheckRequest, and nothing else: of the headers and
// context extensions only the named ones. What it takes borrows from the message.
//
// It gives the same as generated code would: fields in any order, unknown and wrongly typed ones skipped,
// of a repeated scalar the last, repeated messages merged, of a choice the last, of a map's key the last.
// Only what is taken has to be UTF-8; and groups, which generated code skips, are refused.
//
// Source: envoy.service.auth.v3.AttributeContext. Envoy sends headers as a map, repeats joined by commas
// and foreign bytes replaced, or with encode_raw_headers as a list that keeps both.
type reader struct {
	to         *authz.Request
	headers    []string // wanted, in lower case
	extensions []string // wanted

	attributes, http bool // there are such messages
	address          string
	port             uint32
	seconds          int64 // of the request's start
	nanos            int32
	id               string

	// The list of headers comes after the map, whichever stands first in the message.
	mapped, listed []taken
	// contentType is the list's if typeListed, otherwise the map's.
	contentType string
	typeListed  bool
	// sizes has bit n%64 set if a wanted name has n bytes, which tells most headers apart at once.
	sizes uint64
}

// A taken header has, besides the name that was asked for, the one that was sent, by which a map tells
// its entries apart.
type taken struct{ name, sent, value string }

const (
	contentType = "content-type"
	bytesType   = protowire.BytesType
)

// read fills the request from a message.
// Errors: InvalidArgument, Unimplemented for connections that are not HTTP.
func (c *reader) read(message []byte) (about, error) {
	c.sizes = sizeBit(len(contentType))
	for _, name := range c.headers {
		c.sizes |= sizeBit(len(name))
	}
	f := walk(message)
	for f.Next() {
		if f.IsBytes(1) {
			c.attributes = true
			if !c.readAttributes(f.Bytes) {
				return about{}, errMalformed
			}
		}
	}
	switch {
	case f.Broken:
		return about{}, errMalformed
	case !c.attributes:
		return about{}, errNoAttributes
	case !c.http:
		return about{}, errNotHTTP
	}
	r := c.to
	r.Peer = c.address
	r.Identity = authz.NewIdentity(c.address, c.port, time.Unix(c.seconds, int64(c.nanos)))
	r.HTTP = authz.HTTPID(c.id)
	for _, list := range [...][]taken{c.mapped, c.listed} {
		for _, h := range list {
			r.Headers = append(r.Headers, authz.Pair{Name: h.name, Value: h.value})
		}
	}
	return about{grpc: isGRPC(c.contentType)}, nil
}

// reset makes the reader ready for another message, and forgets what it borrowed.
func (c *reader) reset() {
	clear(c.mapped)
	clear(c.listed)
	*c = reader{mapped: c.mapped[:0], listed: c.listed[:0]}
	if cap(c.mapped)+cap(c.listed) > keepTaken {
		*c = reader{}
	}
}

// keepTaken is how much room for headers is kept: one large request should not make every later one
// large.
const keepTaken = 128

func walk(message []byte) wire.Fields { return wire.Fields{Rest: message, NoGroups: true} }

// text takes text, if it is such.
func text(into *string, b []byte) bool {
	*into = wire.Text(b)
	return utf8.Valid(b)
}

// readAttributes reads an AttributeContext.
func (c *reader) readAttributes(b []byte) bool {
	f := walk(b)
	for f.Next() {
		if f.Kind != bytesType {
			continue
		}
		ok := true
		switch f.Number {
		case 1: // source
			ok = c.readPeer(f.Bytes)
		case 4: // request
			ok = c.readRequest(f.Bytes)
		case 10: // context_extensions
			ok = c.readExtension(f.Bytes)
		}
		if !ok {
			return false
		}
	}
	return !f.Broken
}

// readPeer reads an AttributeContext.Peer, and of its core.v3.Address, a choice, the socket's.
func (c *reader) readPeer(b []byte) bool {
	f := walk(b)
	for f.Next() {
		if !f.IsBytes(1) { // address
			continue
		}
		a := walk(f.Bytes)
		for a.Next() {
			switch {
			case a.IsBytes(1): // socket_address
				if !c.readSocketAddress(a.Bytes) {
					return false
				}
			case a.IsBytes(2), a.IsBytes(3): // pipe, envoy_internal_address
				c.address, c.port = "", 0
			}
		}
		if a.Broken {
			return false
		}
	}
	return !f.Broken
}

func (c *reader) readSocketAddress(b []byte) bool {
	f := walk(b)
	for f.Next() {
		switch {
		case f.IsBytes(2): // address
			if !text(&c.address, f.Bytes) {
				return false
			}
		case f.IsVarint(3): // port_value
			c.port = uint32(f.Varint) //nolint:gosec // as generated code does
		case f.IsBytes(4): // named_port, its alternative
			c.port = 0
		}
	}
	return !f.Broken
}

// readRequest reads an AttributeContext.Request.
func (c *reader) readRequest(b []byte) bool {
	f := walk(b)
	for f.Next() {
		switch {
		case f.IsBytes(1): // time
			if !c.readTime(f.Bytes) {
				return false
			}
		case f.IsBytes(2): // http
			c.http = true
			if !c.readHTTP(f.Bytes) {
				return false
			}
		}
	}
	return !f.Broken
}

// readTime reads a google.protobuf.Timestamp.
func (c *reader) readTime(b []byte) bool {
	f := walk(b)
	for f.Next() {
		switch {
		case f.IsVarint(1):
			c.seconds = int64(f.Varint) //nolint:gosec // as generated code does
		case f.IsVarint(2):
			c.nanos = int32(f.Varint) //nolint:gosec // as generated code does
		}
	}
	return !f.Broken
}

// readHTTP reads an AttributeContext.HttpRequest.
func (c *reader) readHTTP(b []byte) bool {
	f := walk(b)
	for f.Next() {
		if f.Kind != bytesType {
			continue
		}
		ok := true
		switch f.Number {
		case 1:
			ok = text(&c.id, f.Bytes)
		case 2:
			ok = text(&c.to.Method, f.Bytes)
		case 3: // headers
			ok = c.readMapped(f.Bytes)
		case 4:
			ok = text(&c.to.Path, f.Bytes)
		case 5:
			ok = text(&c.to.Host, f.Bytes)
		case 13: // header_map
			ok = c.readList(f.Bytes)
		}
		if !ok {
			return false
		}
	}
	return !f.Broken
}

// readMapped reads an entry of the map of headers.
func (c *reader) readMapped(b []byte) bool {
	key, value, ok := readEntry(b)
	if !ok {
		return false
	}
	if c.sizes&sizeBit(len(key)) == 0 {
		return true
	}
	if !c.typeListed && isNamed(key, contentType) && !text(&c.contentType, value) {
		return false
	}
	h := taken{name: c.wanted(key), sent: wire.Text(key)}
	if h.name == "" {
		return true
	}
	if !text(&h.value, value) {
		return false
	}
	for i := range c.mapped {
		if c.mapped[i].sent == h.sent {
			c.mapped[i].value = h.value
			return true
		}
	}
	c.mapped = append(c.mapped, h)
	return true
}

// readList reads a core.v3.HeaderMap.
func (c *reader) readList(b []byte) bool {
	f := walk(b)
	for f.Next() {
		if f.IsBytes(1) && !c.readListed(f.Bytes) {
			return false
		}
	}
	return !f.Broken
}

// readListed reads a core.v3.HeaderValue.
func (c *reader) readListed(b []byte) bool {
	var key, value, raw []byte
	f := walk(b)
	for f.Next() {
		switch {
		case f.IsBytes(1):
			key = f.Bytes
		case f.IsBytes(2):
			value = f.Bytes
		case f.IsBytes(3):
			raw = f.Bytes
		}
	}
	switch {
	case f.Broken:
		return false
	case c.sizes&sizeBit(len(key)) == 0:
		return true
	}
	h := taken{name: c.wanted(key), sent: wire.Text(key)}
	isType := isNamed(key, contentType)
	switch {
	case h.name == "" && !isType:
		return true
	case !text(&h.value, value):
		return false
	case len(raw) > 0: // bytes, which need not be UTF-8
		h.value = wire.Text(raw)
	}
	if isType {
		c.contentType, c.typeListed = h.value, true
	}
	if h.name != "" {
		c.listed = append(c.listed, h)
	}
	return true
}

// wanted returns the name under which a header was asked for, "" if it was not.
func (c *reader) wanted(sent []byte) string {
	for _, name := range c.headers {
		if isNamed(sent, name) {
			return name
		}
	}
	return ""
}

func sizeBit(n int) uint64 { return 1 << (uint(n) % 64) }

// isNamed compares the name of a header, in any case, with one in lower case.
func isNamed(sent []byte, name string) bool {
	if len(sent) != len(name) {
		return false
	}
	for i := range sent {
		b := sent[i]
		if 'A' <= b && b <= 'Z' {
			b += 'a' - 'A'
		}
		if b != name[i] {
			return false
		}
	}
	return true
}

// readExtension reads an entry of the map of context extensions.
func (c *reader) readExtension(b []byte) bool {
	key, value, ok := readEntry(b)
	if !ok {
		return false
	}
	for _, name := range c.extensions {
		if string(key) != name {
			continue
		}
		e := authz.Pair{Name: name}
		if !text(&e.Value, value) {
			return false
		}
		for i := range c.to.Extensions {
			if c.to.Extensions[i].Name == name {
				c.to.Extensions[i].Value = e.Value
				return true
			}
		}
		c.to.Extensions = append(c.to.Extensions, e)
	}
	return true
}

// readEntry reads an entry of a map from text to text.
func readEntry(b []byte) (key, value []byte, ok bool) {
	f := walk(b)
	for f.Next() {
		switch {
		case f.IsBytes(1):
			key = f.Bytes
		case f.IsBytes(2):
			value = f.Bytes
		}
	}
	return key, value, !f.Broken
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
