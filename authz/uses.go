package authz

import (
	"net/netip"
	"time"

	"keyward/authz/apikey"
)

// Uses hears of every decision once, with its final reason, from many goroutines. It must not block.
type Uses interface {
	Decided(u Use)
	// Last returns when a key was last used, as far as this process remembers; zero if it does not.
	Last(id apikey.ID) time.Time
}

// A Use is what is counted of one decision. Nothing in it borrows from the request.
type Use struct {
	Reason Reason
	Key    *apikey.Key // nil: none was known
	// InstanceID is that of the key, else the one that the request was about; "" where that is not known. There
	// was such an instance a moment ago.
	InstanceID string
	Client     netip.Addr // zero: not looked for, because no key was, or no IP address
	Pattern    string     // host and path of the rule that the request matched; "": none did
	At         time.Time
}

// Decided counts a decision, and remembers it if it refuses. Adapters say so once for each, when its reason is
// final, with the request that it answers: an allowed request that nobody says it of is no use of its key.
func (a *Authorizer) Decided(r *Request, d *Decision, at time.Time) {
	if d.Outcome() != Allowed {
		a.remember(d, at)
	}
	u := Use{Reason: d.Reason, Key: d.Key, Client: d.client, At: at}
	if d.Key != nil {
		u.InstanceID = d.Key.InstanceID
	} else {
		u.InstanceID = a.instanceOf(r, d)
	}
	if d.route != nil {
		u.Pattern = d.route.pattern
	}
	a.uses.Decided(u)
}

// instanceOf returns the instance that a request without a known key was about: the one whose quotas judged
// it, or the first that the rule itself, its path or Envoy's configuration of the route names. Queries and
// bodies are not looked at: to refuse garbage must stay cheap.
func (a *Authorizer) instanceOf(r *Request, d *Decision) string {
	if d.InstanceID != "" || d.route == nil {
		return d.InstanceID
	}
	named := ""
	for i := range d.route.Instance {
		if s := &d.route.Instance[i]; named == "" && (s.from == fromLiteral || s.from == fromPath) {
			named, _, _ = s.value(r, "")
		}
	}
	for i := range r.Extensions {
		if named == "" && r.Extensions[i].Name == extensionInstance {
			named = r.Extensions[i].Value
		}
	}
	if named == "" {
		return ""
	}
	instance := a.keys.Instance(named)
	if instance == nil { // perhaps a GUID in capitals
		canonical, err := apikey.CanonicalInstanceID(named)
		if err != nil || canonical == named {
			return ""
		}
		if instance = a.keys.Instance(canonical); instance == nil {
			return ""
		}
	}
	return instance.ID
}
