package check

import (
	"slices"
	"strconv"
	"strings"

	"keyward/authz/apikey"
)

// Identity names the headers that tell an upstream who is calling. An empty name is the default one;
// "off" sends none. Whatever a client sends under these names, and under the default ones, is removed.
type Identity struct {
	KeyID, KeyType, InstanceID, Agent, User, Scopes, DecisionID string
	// UserIdentity is the JSON by which FoundationaLLM's servers tell each other who is calling. It is sent
	// only if it is named, and removed under its default name always: they believe whoever sends it.
	UserIdentity string
}

// Off is the name of an identity header that is not sent.
const Off = "off"

// DefaultIdentity are the names of the identity headers.
var DefaultIdentity = Identity{
	KeyID:      "x-keyward-key-id",
	KeyType:    "x-keyward-key-type",
	InstanceID: "x-keyward-instance-id",
	Agent:      "x-keyward-agent",
	User:       "x-keyward-user",
	Scopes:     "x-keyward-scopes",
	DecisionID: "x-keyward-decision-id",

	UserIdentity: "x-user-identity",
}

// names returns the names in a fixed order.
func (i *Identity) names() []*string {
	return []*string{&i.KeyID, &i.KeyType, &i.InstanceID, &i.Agent, &i.User, &i.Scopes, &i.DecisionID, &i.UserIdentity}
}

// Names lists every header name that carries identity, in lower case: those in use and the defaults.
// Clients must not be able to send any of them.
func (i Identity) Names() []string {
	defaults := DefaultIdentity
	var all []string
	for n, name := range i.names() {
		all = append(all, *defaults.names()[n])
		if *name != "" && *name != Off {
			all = append(all, *name)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Resolve fills in the default names.
// Errors: *apikey.InvalidError for names that no header can have or that two of them share.
func (i Identity) Resolve() (Identity, error) {
	defaults := DefaultIdentity
	if i.UserIdentity == "" {
		i.UserIdentity = Off
	}
	seen := map[string]bool{}
	for n, name := range i.names() {
		if *name == "" {
			*name = *defaults.names()[n]
		}
		if *name == Off {
			continue
		}
		if !isHeaderName(*name) {
			return i, apikey.Invalid("identityHeaders", strconv.Quote(*name)+" is not a header name of lower-case letters, digits and -")
		}
		if seen[*name] {
			return i, apikey.Invalid("identityHeaders", "two of them are named "+*name)
		}
		seen[*name] = true
	}
	return i, nil
}

func isHeaderName(s string) bool {
	return s != "" && len(s) <= 128 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == "" && s[0] != '-'
}
