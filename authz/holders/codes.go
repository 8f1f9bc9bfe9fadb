package holders

import "net/http"

// A CodeMeaning says what a code of an error means here.
type CodeMeaning struct {
	Code    string
	Status  int // of HTTP
	Meaning string
}

// Codes lists every code of an error, by status. docs/error-codes.md is made of it.
var Codes = []CodeMeaning{
	{"InvalidRequest", http.StatusBadRequest, "The body is not `{\"secret\": \"…\"}` and nothing else, or the secret has not the shape of a key."},
	{"Unauthorized", http.StatusUnauthorized, "There is no API key, or none that works: the answer is the same for every cause."},
	{"NotFound", http.StatusNotFound, "There is `GET /self` and `POST /revoke` here, and nothing else."},
	{"MethodNotAllowed", http.StatusMethodNotAllowed, "The header `Allow` lists the methods that there are."},
	{"PayloadTooLarge", http.StatusRequestEntityTooLarge, "The body has more than 4 KiB."},
	{"UnsupportedMediaType", http.StatusUnsupportedMediaType, "The body is not `application/json` in UTF-8, or is compressed."},
	{"TooManyRequests", http.StatusTooManyRequests, "Too many wrong keys, or too many reports, came from this address. `Retry-After` says when to come again."},
	{"InternalError", http.StatusInternalServerError, "A bug. The server's log has it."},
	{"ServiceUnavailable", http.StatusServiceUnavailable, "It cannot be decided or taken now. `Retry-After` says when to come again."},
}
