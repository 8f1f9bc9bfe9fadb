package check

import (
	"unicode/utf16"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
)

// Tags of the fields that are written: number and wire type.
const (
	varint           = 0
	bytesOf          = 2
	responseStatus   = 1<<3 | bytesOf // google.rpc.Status
	responseDenied   = 2<<3 | bytesOf // DeniedHttpResponse
	responseOK       = 3<<3 | bytesOf // OkHttpResponse
	responseMetadata = 4<<3 | bytesOf // google.protobuf.Struct
	responseError    = 5<<3 | bytesOf // DeniedHttpResponse

	statusCode = 1<<3 | varint

	okHeaders     = 2<<3 | bytesOf // HeaderValueOption
	okRemove      = 5<<3 | bytesOf
	okToClient    = 6<<3 | bytesOf // HeaderValueOption
	okRemoveQuery = 8<<3 | bytesOf

	deniedStatus  = 1<<3 | bytesOf // type.v3.HttpStatus
	deniedHeaders = 2<<3 | bytesOf // HeaderValueOption
	deniedBody    = 3<<3 | bytesOf
	httpCode      = 1<<3 | varint

	optionHeader = 1<<3 | bytesOf // HeaderValue
	headerKey    = 1<<3 | bytesOf
	headerValue  = 2<<3 | bytesOf

	structFields = 1<<3 | bytesOf
	entryKey     = 1<<3 | bytesOf
	entryValue   = 2<<3 | bytesOf
	valueString  = 3<<3 | bytesOf
)

// open begins a message inside a message; what is appended from now on is its content, until shut is
// told where it began. One byte is left for its length, which is enough for most.
func open(dst []byte, tag byte) (_ []byte, begin int) { return append(dst, tag, 0), len(dst) + 2 }

func shut(dst []byte, begin int) []byte {
	n := len(dst) - begin
	if more := protowire.SizeVarint(uint64(n)) - 1; more > 0 {
		var room [9]byte
		dst = append(dst, room[:more]...)
		copy(dst[begin+more:], dst[begin:begin+n])
	}
	protowire.AppendVarint(dst[:begin-1], uint64(n))
	return dst
}

func appendText[S ~string | []byte](dst []byte, tag byte, s S) []byte {
	return append(protowire.AppendVarint(append(dst, tag), uint64(len(s))), s...)
}

// sizeText is how many bytes appendText appends.
func sizeText(n int) int { return 1 + protowire.SizeVarint(uint64(n)) + n }

// appendStatus writes a google.rpc.Status. Code 0 is an empty message, which is not the same as none.
func appendStatus(dst []byte, code codes.Code) []byte {
	if code == codes.OK {
		return append(dst, responseStatus, 0)
	}
	return append(dst, responseStatus, 2, statusCode, byte(code))
}

func appendHTTPStatus(dst []byte, code int) []byte {
	return append(dst, deniedStatus, 3, httpCode, byte(code)|0x80, byte(code>>7)) // 128 to 16383
}

// appendHeader sets a header to exactly this value. Envoys disagree on what an option means that does
// not say both: append: false, and OVERWRITE_IF_EXISTS_OR_ADD.
func appendHeader[S ~string | []byte](dst []byte, tag byte, name string, value S) []byte {
	const overwrite = "\x12\x00" + // append: a BoolValue that is false
		"\x18\x02" // append_action: OVERWRITE_IF_EXISTS_OR_ADD
	pair := sizeText(len(name)) + sizeText(len(value))
	dst = protowire.AppendVarint(append(dst, tag), uint64(sizeText(pair)+len(overwrite)))
	dst = protowire.AppendVarint(append(dst, optionHeader), uint64(pair))
	dst = appendText(dst, headerKey, name)
	dst = appendText(dst, headerValue, value)
	return append(dst, overwrite...)
}

// appendFact writes an entry of a google.protobuf.Struct.
func appendFact[S ~string | []byte](dst []byte, name string, value S) []byte {
	text := sizeText(len(value))
	dst = protowire.AppendVarint(append(dst, structFields), uint64(sizeText(len(name))+sizeText(text)))
	dst = appendText(dst, entryKey, name)
	dst = protowire.AppendVarint(append(dst, entryValue), uint64(text))
	return appendText(dst, valueString, value)
}

// appendJSON appends the inside of a JSON string. s is UTF-8.
func appendJSON[S string | []byte](dst []byte, s S) []byte {
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c < ' ':
			const digits = "0123456789abcdef"
			dst = append(dst, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
		default:
			dst = append(dst, c)
		}
	}
	return dst
}

// appendJSONText appends a JSON string in ASCII, its quotes included.
func appendJSONText[S string | []byte](dst []byte, s S) []byte {
	dst = append(dst, '"')
	for _, r := range string(s) {
		switch {
		case r < utf8.RuneSelf:
			dst = appendJSON(dst, string(r))
		case r < 1<<16:
			dst = appendUnit(dst, r)
		default:
			high, low := utf16.EncodeRune(r)
			dst = appendUnit(appendUnit(dst, high), low)
		}
	}
	return append(dst, '"')
}

// appendUnit appends the escape of a UTF-16 code unit.
func appendUnit(dst []byte, unit rune) []byte {
	const digits = "0123456789abcdef"
	return append(dst, '\\', 'u', digits[unit>>12], digits[unit>>8&15], digits[unit>>4&15], digits[unit&15])
}
