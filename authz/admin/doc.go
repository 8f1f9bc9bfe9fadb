// Package admin says what may be done to instances, keys and management tokens, and by whom.
//
// Every mutation is one transaction with its audit events, then a wait until the replicas that answer
// Checks know of it (DESIGN §7.7). HTTP, the command line and the portal are three ways to the same
// [Service]; none of them decides anything.
//
// Trade-off: who may do what is one table of roles, not a policy language. Nobody should need a tool
// to find out who can revoke a key.
//
// Begin with [New]; [Store] is what it stands on.
package admin
