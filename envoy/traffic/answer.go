package traffic

import (
	"net/http"

	"google.golang.org/protobuf/encoding/protowire"
)

// An answer is what a CheckResponse says.
type answer struct {
	status int    // what Envoy answers its client; 200 lets the request through
	lease  []byte // the id of a lease that was granted; in the message
}

// What an answer can be besides a status. The texts are counted.
const (
	brokenAnswer = "an answer that is not a CheckResponse"
	// Envoy takes it for an allow: the worst that an authorizer can send.
	halfAnswer = "an answer without a status, which Envoy takes for an allow"
	// Status and content disagree.
	oddAnswer = "an answer that both allows and denies"
)

// classify reads a CheckResponse in place. fault is "" if it is one that Envoy can use.
func classify(message []byte) (a answer, fault string) {
	const (
		fieldStatus   = 1
		fieldDenied   = 2
		fieldOK       = 3
		fieldMetadata = 4
		fieldError    = 5
	)
	var code uint64
	stated, allowed, refused := false, false, 0
	ok := fields(message, func(n protowire.Number, v []byte, _ uint64) bool {
		switch n {
		case fieldStatus:
			stated = true
			return fields(v, func(n protowire.Number, _ []byte, x uint64) bool {
				if n == 1 {
					code = x
				}
				return true
			})
		case fieldOK:
			allowed = true
		case fieldDenied, fieldError:
			refused = http.StatusForbidden // what Envoy answers if none is named
			return fields(v, func(n protowire.Number, status []byte, _ uint64) bool {
				return n != 1 || fields(status, func(n protowire.Number, _ []byte, x uint64) bool {
					if n == 1 && x != 0 {
						refused = int(x)
					}
					return true
				})
			})
		case fieldMetadata:
			lease, ok := findLease(v)
			a.lease = lease
			return ok
		}
		return true
	})
	switch {
	case !ok:
		return answer{}, brokenAnswer
	case !stated:
		return answer{}, halfAnswer
	case code == 0 && refused == 0:
		a.status = http.StatusOK
	case code != 0 && !allowed && refused != 0:
		a.status = refused
	case code != 0 && !allowed:
		a.status = http.StatusForbidden
	default:
		return answer{}, oddAnswer
	}
	return a, ""
}

// fields calls take for each field of a message: v is the content of a length-delimited one, x the number
// of a varint. It reports whether the message is whole and take had no objection. What judges keyward's
// answers shares no parser with keyward.
func fields(message []byte, take func(n protowire.Number, v []byte, x uint64) bool) bool {
	for len(message) > 0 {
		n, kind, size := protowire.ConsumeTag(message)
		if size < 0 {
			return false
		}
		message = message[size:]
		var v []byte
		var x uint64
		switch kind {
		case protowire.BytesType:
			v, size = protowire.ConsumeBytes(message)
		case protowire.VarintType:
			x, size = protowire.ConsumeVarint(message)
		default:
			size = protowire.ConsumeFieldValue(n, kind, message)
		}
		if size < 0 || !take(n, v, x) {
			return false
		}
		message = message[size:]
	}
	return true
}

// leaseField names the lease in the dynamic metadata of an answer.
const leaseField = "keyward.lease"

// findLease returns the text of a google.protobuf.Struct's field of that name, nil if there is none.
func findLease(metadata []byte) (lease []byte, ok bool) {
	ok = fields(metadata, func(n protowire.Number, entry []byte, _ uint64) bool {
		if n != 1 {
			return true
		}
		var key, value []byte
		if !fields(entry, func(n protowire.Number, v []byte, _ uint64) bool {
			switch n {
			case 1:
				key = v
			case 2:
				value = v
			}
			return true
		}) {
			return false
		}
		if string(key) != leaseField {
			return true
		}
		return fields(value, func(n protowire.Number, v []byte, _ uint64) bool {
			if n == 3 {
				lease = v
			}
			return true
		})
	})
	return lease, ok
}
