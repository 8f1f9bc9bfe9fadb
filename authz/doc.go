// Package authz decides about requests: who is calling, may they, and may they now.
//
// An [Authorizer] joins what is known of keys, the route rules and the limits into one [Decision]. It
// knows neither Envoy nor a database: adapters give it a [Request] and carry the Decision back.
// Allowed and denied are decisions; "could not decide" is an error and never becomes either.
//
// Trade-off: the steps run in one fixed order and the first that fails answers, so a caller learns one
// thing at a time. In exchange garbage costs next to nothing, and nothing is spent on a request that
// another rule refuses.
//
// The part of a decision that never blocks, [Authorizer.Try], is apart from the part that may,
// [Authorizer.Decide]: a transport that cannot wait can still answer everything that is in memory.
package authz
