// Package apikey holds the nouns of keyward: keys, secrets, digests, scopes, limits, instances and
// the errors that every layer speaks. It imports the standard library only, so that stores, caches
// and rules can share it without knowing each other.
//
// Trade-off: records are immutable once made. Whoever wants to change a [Key] copies it, changes the
// copy and gives it to the store; that is what lets the cache hand one record to many readers.
//
// Begin with [Format.New], which makes a [Secret], and [Peppers.Digest], which says how it is found.
package apikey
