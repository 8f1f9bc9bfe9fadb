package check

import (
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"keyward/authz"
	"keyward/envoy/wire"
)

// about is what an answer needs to know of the request that it answers.
type about struct {
	grpc bool // the caller speaks gRPC
}

// Errors of reader.read. Envoy makes none of them; whoever does learns what to change.
var (
	errMalformed    = status.Error(codes.InvalidArgument, "not a CheckRequest: its bytes are no protobuf message, or hold text that is not UTF-8 or one header in more than 64 spellings")
	errNoAttributes = status.Error(codes.InvalidArgument, "a Check without attributes")
	errNotHTTP      = status.Error(codes.Unimplemented, "keyward decides HTTP requests only: use the HTTP filter envoy.filters.http.ext_authz")
)

// A reader takes what a decision needs out of a CheckRequest, and nothing else: of the headers and
// context extensions only the named ones. What it takes borrows from the message.
//
// It gives the same as generated code would: fields in any order, unknown and wrongly typed ones skipped,
// of a repeated scalar the last, repeated messages merged, of a choice the last, of a map's key the last.
// Only what is taken has to be UTF-8. Groups, which generated code skips, and more than maxSpellings of
// wanted headers in the map are refused.
//
// Source: envoy.service.auth.v3.AttributeContext. Envoy sends headers as a map, repeats joined by commas
// and foreign bytes replaced, or with encode_raw_headers as a list that keeps both.
type reader struct {
	to         *authz.Request
	headers    []string // wanted, in lower case
	extensions []string // wanted
	payload    string   // of the token's claims in Envoy's metadata
	claims     []string // wanted; none: metadata is not looked at
	body       bool     // is wanted

	attributes, http bool // there are such messages
	address          string
	port             uint32
	seconds          int64 // of the request's start
	nanos            int32
	id               string
	metadata         []byte // of the request, merged
	rawBody          []byte
	protocol         string
	partial          string // whether the body is cut: "true", "false" or not said

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
	// partialBody is what Envoy adds where it sends a body; from clients it does not come through.
	partialBody = "x-envoy-auth-partial-body"
	// jwtNamespace is where Envoy's jwt_authn filter writes.
	jwtNamespace = "envoy.filters.http.jwt_authn"
)

// mapTag is that of HttpRequest.headers, whose entries begin with entryKey and entryValue.
const mapTag = 3<<3 | bytesOf

// read fills the request from a message.
// Errors: InvalidArgument, Unimplemented for connections that are not HTTP.
func (c *reader) read(message []byte) (about, error) {
	c.sizes = sizeBit(len(contentType))
	if c.body {
		c.sizes |= sizeBit(len(partialBody))
	}
	for _, name := range c.headers {
		c.sizes |= sizeBit(len(name))
	}
	for len(message) > 0 {
		tag, content, rest, ok := cutField(message)
		if message = rest; ok && tag == wire.Bytes(1) {
			c.attributes = true
			ok = c.readAttributes(content)
		}
		if !ok {
			return about{}, errMalformed
		}
	}
	switch {
	case !c.attributes:
		return about{}, errNoAttributes
	case !c.http:
		return about{}, errNotHTTP
	}
	r := c.to
	r.Peer = c.address
	r.Identity = authz.NewIdentity(c.address, c.port, time.Unix(c.seconds, int64(c.nanos)))
	r.HTTP = authz.HTTPID(c.id)
	if len(c.claims) > 0 && !c.readClaims() {
		return about{}, errMalformed
	}
	if len(c.rawBody) > 0 {
		r.Body = c.rawBody
	}
	r.Framed = c.protocol != "" && !strings.HasPrefix(c.protocol, "HTTP/1")
	r.BodySent, r.BodyCut = len(r.Body) > 0 || c.partial != "", c.partial == "true"
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

// maxSpellings is how many entries of the map of headers may be spellings of wanted names: Envoy sends
// each in lower case, and to compare each with all others must not become anybody's weapon.
const maxSpellings = 64

// keepTaken is how much room for headers is kept: one large request should not make every later one
// large.
const keepTaken = 128

// cutField is wire.Cut without groups.
func cutField(message []byte) (tag wire.Tag, content, rest []byte, ok bool) {
	tag, content, rest, ok = wire.Cut(message)
	return tag, content, rest, ok && !tag.IsGroup()
}

// text takes text, if it is such.
func text(into *string, b []byte) bool {
	*into = wire.Text(b)
	return utf8.Valid(b)
}

// readAttributes reads an AttributeContext.
func (c *reader) readAttributes(b []byte) bool {
	for len(b) > 0 {
		tag, content, rest, ok := cutField(b)
		switch b = rest; tag {
		case wire.Bytes(1): // source
			ok = c.readPeer(content)
		case wire.Bytes(4): // request
			ok = c.readRequest(content)
		case wire.Bytes(10): // context_extensions
			ok = c.readExtension(content)
		case wire.Bytes(11): // metadata_context
			if len(c.claims) > 0 {
				c.metadata = merged(c.metadata, content)
			}
		}
		if !ok {
			return false
		}
	}
	return true
}

// readPeer reads an AttributeContext.Peer.
func (c *reader) readPeer(b []byte) bool {
	for len(b) > 0 {
		tag, content, rest, ok := cutField(b)
		if b = rest; tag == wire.Bytes(1) { // address
			ok = c.readAddress(content)
		}
		if !ok {
			return false
		}
	}
	return true
}

// readAddress reads a core.v3.Address, which is a choice.
func (c *reader) readAddress(b []byte) bool {
	for len(b) > 0 {
		tag, content, rest, ok := cutField(b)
		switch b = rest; tag {
		case wire.Bytes(1): // socket_address
			ok = c.readSocketAddress(content)
		case wire.Bytes(2), wire.Bytes(3): // pipe, envoy_internal_address
			c.address, c.port = "", 0
		}
		if !ok {
			return false
		}
	}
	return true
}

func (c *reader) readSocketAddress(b []byte) bool {
	for len(b) > 0 {
		tag, content, rest, ok := cutField(b)
		switch b = rest; tag {
		case wire.Bytes(2): // address
			ok = text(&c.address, content)
		case wire.Varint(3): // port_value
			c.port = uint32(wire.Number(content))
		case wire.Bytes(4): // named_port, its alternative
			c.port = 0
		}
		if !ok {
			return false
		}
	}
	return true
}

// readRequest reads an AttributeContext.Request.
func (c *reader) readRequest(b []byte) bool {
	for len(b) > 0 {
		tag, content, rest, ok := cutField(b)
		switch b = rest; tag {
		case wire.Bytes(1): // time
			ok = c.readTime(content)
		case wire.Bytes(2): // http
			c.http = true
			ok = c.readHTTP(content)
		}
		if !ok {
			return false
		}
	}
	return true
}

// readTime reads a google.protobuf.Timestamp.
func (c *reader) readTime(b []byte) bool {
	for len(b) > 0 {
		tag, content, rest, ok := cutField(b)
		switch b = rest; tag {
		case wire.Varint(1):
			c.seconds = int64(wire.Number(content))
		case wire.Varint(2):
			c.nanos = int32(wire.Number(content))
		}
		if !ok {
			return false
		}
	}
	return true
}

// readHTTP reads an AttributeContext.HttpRequest.
func (c *reader) readHTTP(b []byte) bool {
	for len(b) > 0 {
		if n := c.skippable(b); n > 0 {
			b = b[n:]
			continue
		}
		tag, content, rest, ok := cutField(b)
		switch b = rest; tag {
		case wire.Bytes(3): // headers
			ok = c.readMapped(content)
		case wire.Bytes(1):
			ok = text(&c.id, content)
		case wire.Bytes(2):
			ok = text(&c.to.Method, content)
		case wire.Bytes(4):
			ok = text(&c.to.Path, content)
		case wire.Bytes(5):
			ok = text(&c.to.Host, content)
		case wire.Bytes(10): // protocol
			if c.body {
				ok = text(&c.protocol, content)
			}
		case wire.Bytes(11): // body
			if c.body {
				c.to.Body = content
				ok = utf8.Valid(content)
			}
		case wire.Bytes(12): // raw_body
			if c.body {
				c.rawBody = content
			}
		case wire.Bytes(13): // header_map
			ok = c.readList(content)
		}
		if !ok {
			return false
		}
	}
	return true
}

// skippable recognises, at the cost of a few bytes, a header that cannot be a wanted one: an entry of
// the map that is a short key and a short value and nothing else. It returns the field's length; 0 for
// everything that has to be looked at.
func (c *reader) skippable(b []byte) int {
	if len(b) < 6 || b[0] != mapTag || b[1] >= 0x80 || b[2] != entryKey || b[3] >= 0x80 || c.sizes&sizeBit(int(b[3])) != 0 {
		return 0
	}
	end, value := 2+int(b[1]), 4+int(b[3])
	if end > len(b) || value+2 > end || b[value] != entryValue || b[value+1] >= 0x80 || value+2+int(b[value+1]) != end {
		return 0
	}
	return end
}

// readMapped reads an entry of the map of headers.
func (c *reader) readMapped(b []byte) bool {
	key, value, ok := readEntry(b)
	if !ok || c.sizes&sizeBit(len(key)) == 0 {
		return ok
	}
	if !c.typeListed && isNamed(key, contentType) && !text(&c.contentType, value) {
		return false
	}
	if c.body && isNamed(key, partialBody) && !text(&c.partial, value) {
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
	return len(c.mapped) <= maxSpellings
}

// readList reads a core.v3.HeaderMap.
func (c *reader) readList(b []byte) bool {
	for len(b) > 0 {
		tag, content, rest, ok := cutField(b)
		if b = rest; tag == wire.Bytes(1) {
			ok = c.readListed(content)
		}
		if !ok {
			return false
		}
	}
	return true
}

// readListed reads a core.v3.HeaderValue.
func (c *reader) readListed(b []byte) bool {
	var key, value, raw []byte
	for len(b) > 0 {
		tag, content, rest, ok := cutField(b)
		if !ok {
			return false
		}
		switch b = rest; tag {
		case wire.Bytes(1):
			key = content
		case wire.Bytes(2):
			value = content
		case wire.Bytes(3):
			raw = content
		}
	}
	if c.sizes&sizeBit(len(key)) == 0 {
		return true
	}
	h := taken{name: c.wanted(key), sent: wire.Text(key)}
	isType, isPartial := isNamed(key, contentType), c.body && isNamed(key, partialBody)
	switch {
	case h.name == "" && !isType && !isPartial:
		return true
	case !text(&h.value, value):
		return false
	case len(raw) > 0: // bytes, which need not be UTF-8
		h.value = wire.Text(raw)
	}
	if isType {
		c.contentType, c.typeListed = h.value, true
	}
	if isPartial {
		c.partial = h.value
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
	for len(b) > 0 {
		tag, content, rest, ok := cutField(b)
		if !ok {
			return nil, nil, false
		}
		switch b = rest; tag {
		case wire.Bytes(1):
			key = content
		case wire.Bytes(2):
			value = content
		}
	}
	return key, value, true
}

// readClaims reads the wanted claims out of the request's metadata:
//
//	filter_metadata[jwtNamespace].fields[payload].struct_value.fields[claim].string_value
//
// Whatever stands there instead, of any type and depth, is no claim.
func (c *reader) readClaims() bool {
	metadata, ok := lookUp(c.metadata, jwtNamespace)
	if !ok {
		return false
	}
	payload, ok := lookUp(metadata, c.payload)
	if !ok {
		return false
	}
	claims, _, ok := choose(payload, wire.Bytes(5)) // struct_value
	if !ok {
		return false
	}
	for _, name := range c.claims {
		value, ok := lookUp(claims, name)
		if !ok {
			return false
		}
		value, isText, ok := choose(value, wire.Bytes(3)) // string_value
		if !ok {
			return false
		}
		if !isText {
			continue
		}
		claim := authz.Pair{Name: name}
		if !text(&claim.Value, value) {
			return false
		}
		c.to.Claims = append(c.to.Claims, claim)
	}
	return true
}

// lookUp finds what a map from text to messages, which is field 1 of b, has for a key: nothing if it has
// none, and of several the last.
func lookUp(b []byte, key string) (found []byte, ok bool) {
	for len(b) > 0 {
		tag, entry, rest, ok := cutField(b)
		if !ok {
			return nil, false
		}
		b = rest
		if tag != wire.Bytes(1) {
			continue
		}
		var name, value []byte
		for len(entry) > 0 {
			tag, content, rest, ok := cutField(entry)
			if !ok {
				return nil, false
			}
			switch entry = rest; tag {
			case wire.Bytes(1):
				name = content
			case wire.Bytes(2):
				value = merged(value, content)
			}
		}
		if string(name) == key {
			found = value
		}
	}
	return found, true
}

// choose returns the content of a google.protobuf.Value if that is of the wanted kind. The last kind that
// stands there counts, and messages of one kind are one.
func choose(b []byte, want wire.Tag) (content []byte, chosen, ok bool) {
	for len(b) > 0 {
		tag, value, rest, ok := cutField(b)
		if !ok {
			return nil, false, false
		}
		b = rest
		switch {
		case tag == want && chosen && want == wire.Bytes(5):
			content = merged(content, value)
		case tag == want:
			content, chosen = value, true
		case tag == wire.Varint(1), tag == wire.Fixed64(2), tag == wire.Bytes(3), tag == wire.Varint(4), tag == wire.Bytes(5), tag == wire.Bytes(6):
			content, chosen = nil, false
		}
	}
	return content, chosen, true
}

// merged is two messages of one field as one: that is what their bytes are one after the other. Envoy sends
// one.
func merged(a, b []byte) []byte {
	if len(a) == 0 {
		return b
	}
	return append(a[:len(a):len(a)], b...)
}

// isGRPC recognises application/grpc and application/grpc+proto, not application/grpc-web, which Envoy
// answers like any other HTTP.
func isGRPC(contentType string) bool {
	const grpc = "application/grpc"
	if len(contentType) < len(grpc) || contentType[len(grpc)-1]|0x20 != 'c' || !strings.EqualFold(contentType[:len(grpc)], grpc) {
		return false
	}
	rest := contentType[len(grpc):]
	return rest == "" || rest[0] == '+' || rest[0] == ';' || rest[0] == ' '
}
