package manage

import (
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// An Instance is an instance as JSON.
type Instance struct {
	ID        string        `json:"id"`
	Policy    apikey.Policy `json:"policy"`
	CreatedAt time.Time     `json:"createdAt"`
}

// An InstanceInput is the body that creates an instance or replaces its policy.
type InstanceInput struct {
	Policy *admin.PolicyInput `json:"policy" required:"true" doc:"The whole policy; {} for the default."`
}

// Effect says how far a change has come. It is part of answers that take rights away; those have the
// status 202 while some replica may still act on what was before.
type Effect struct {
	EffectiveEverywhereAt time.Time `json:"effectiveEverywhereAt,omitzero" doc:"In the future with status 202. Absent if it is not known yet: ask again."`
	Replicas              Replicas  `json:"replicas"`
}

// Replicas counts the replicas that know of a change.
type Replicas struct {
	Confirmed int `json:"confirmed"`
	Total     int `json:"total"`
}

func effectOf(p admin.Propagation) Effect {
	return Effect{p.EffectiveEverywhereAt, Replicas{p.Confirmed, p.Total}}
}

// A ChangedInstance is the answer to a put.
type ChangedInstance struct {
	Instance
	Effect
}

// DeletedInstance is the answer to the deletion of an instance.
type DeletedInstance struct {
	InstanceID string `json:"instanceId"`
	Effect
}

// RevokedKey is the answer to the revocation of a key.
type RevokedKey struct {
	KeyID     apikey.ID `json:"keyId" format:"uuid"`
	RevokedAt time.Time `json:"revokedAt"`
	Effect
}

// RevokedToken is the answer to the revocation of a token, which works everywhere at once.
type RevokedToken struct {
	TokenID   apikey.ID `json:"tokenId" format:"uuid"`
	RevokedAt time.Time `json:"revokedAt"`
}

// A list is a page of things.
type list[T any] struct {
	Value    []T    `json:"value" nullable:"false"`
	NextLink string `json:"nextLink,omitempty" format:"uri" doc:"The next page. Absent on the last. A page may be shorter than asked for, even empty, and still have a next one."`
}

func listOf[T, R any](all []T, record func(T) R) list[R] {
	l := list[R]{Value: make([]R, len(all))}
	for i, one := range all {
		l.Value[i] = record(one)
	}
	return l
}

// createdKey and createdToken are the two answers that carry a secret.
type createdKey struct {
	Key    admin.KeyRecord `json:"key"`
	Secret string          `json:"secret" doc:"In this answer only: keep it now."`
}

type createdToken struct {
	Token  admin.TokenRecord `json:"token"`
	Secret string            `json:"secret" doc:"In this answer only: keep it now."`
}
