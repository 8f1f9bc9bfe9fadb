// Package manage is the Management API: authz/admin over HTTP, its OpenAPI document, and the Go client
// that the command line is built on.
//
// huma makes routes and the document from Go types. What it would do with input stays off: it reads no
// body and checks no parameter, because its errors repeat what was sent, and what was sent may be a
// secret. One strict decoder reads bodies, one function turns errors into answers.
//
// Trade-off: strictness over kindness. An unknown member, a member twice or in the wrong case, an
// unknown parameter: all are refused by name, since what is silently ignored is found out in production.
//
// Begin with [New] on the server's side and [NewClient] on the other.
package manage
