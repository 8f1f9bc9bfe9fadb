package authz

import (
	"context"

	"keyward/authz/apikey"
	"keyward/limits"
)

// A Self is what the holder of a key may know of it: what is in force now.
type Self struct {
	Key    *apikey.Key
	Scopes apikey.Scopes // the key's, capped by the policy; nil: every right
	Limits apikey.Limits // with what the key inherits; [apikey.Unlimited] where there is none
	// Left is what of the limits nobody uses now; nil where the limiter cannot tell.
	Left *Left
	// Standings are where each limit stands, as [Authorizer.LimitsOf] says; nil where the limiter cannot tell.
	Standings []Standing
}

// Left counts requests; [apikey.Unlimited] where there is no limit.
type Left struct {
	Burst   int64 // that may come at once, of the key and of its instance together
	Running int64 // that may run beside those that do
}

// Self answers the holder of a key who asks about it. Only Headers and Peer of the request count, and only
// who is calling is judged: the credential, its life, and the addresses that it may be used from. It is no
// use of the key: nothing is spent, and it does not keep the key from being idle.
//
// The reason is [ReasonKey], or why there is no answer; whoever asks must not learn which.
// Errors: those of [Authorizer.Decide].
func (a *Authorizer) Self(ctx context.Context, r *Request) (Self, Reason, error) {
	rules := a.rules.Load()
	found := rules.Credentials.find(r, "")
	switch {
	case !found.sent:
		return Self{}, ReasonNoCredential, nil
	case found.ambiguous:
		return Self{}, ReasonAmbiguousCredential, nil
	}
	kind, reason := shape(rules.Credentials.Format, found.secret)
	if reason != ReasonNone {
		return Self{}, reason, nil
	}
	q := question{rule: &anyRequest, secret: found.secret, kind: kind, client: r.clientAddr(ClientPeer, 0), mayBlock: true}
	var d Decision
	instance, err := a.known(ctx, &Request{}, &d, &q)
	if err != nil {
		return Self{}, ReasonNone, err
	}
	if d.Reason != ReasonNone {
		return Self{}, d.Reason, nil
	}
	if err := a.keys.Serving(); err != nil {
		return Self{}, ReasonNone, err
	}
	k := d.Key
	self := Self{Key: k, Scopes: k.Scopes, Limits: instance.Policy.LimitsOf(k)}
	if allowed := instance.Policy.AllowedScopes; allowed != nil {
		self.Scopes = k.Scopes.Intersect(apikey.Scopes{}, allowed)
	}
	// That limits cannot be seen is no reason to say nothing of the key.
	if standings, err := a.limitsOf(ctx, k, instance); err == nil {
		self.Left, self.Standings = leftOf(standings), standings
	}
	return self, ReasonKey, nil
}

// leftOf sums up what the limits that are no quotas leave.
func leftOf(standings []Standing) *Left {
	left := &Left{Burst: apikey.Unlimited, Running: apikey.Unlimited}
	for _, s := range standings {
		switch {
		case s.Class == limits.ClassConcurrency:
			left.Running = s.Remaining
		case s.Quota == nil && (left.Burst == apikey.Unlimited || s.Remaining < left.Burst):
			left.Burst = s.Remaining
		}
	}
	return left
}
