package admin

import (
	"context"
	"time"

	"keyward/authz/apikey"
)

// An AlertStore keeps alerts. Nothing in it is a mutation: no revision, no audit.
type AlertStore interface {
	// PutAlert keeps an alert, in place of the one with its ID. Errors: apikey.ErrConflict if another one of the
	// same Instance, Kind, KeyID and Subject is open, and this one is too.
	PutAlert(ctx context.Context, a *Alert) error
	// Alert returns one alert of an instance. Errors: apikey.ErrNotFound.
	Alert(ctx context.Context, instanceID string, id apikey.ID) (*Alert, error)
	// Alerts lists alerts, those opened last first, and then by id, at most limit, from the place after which to
	// begin; the zero place is the beginning.
	Alerts(ctx context.Context, q AlertQuery) ([]*Alert, error)
	// ForgetAlerts removes alerts that were resolved before a time.
	ForgetAlerts(ctx context.Context, before time.Time) error
}

// An AlertKind is what an alert is about.
type AlertKind string

// The kinds.
const (
	AlertNewNetwork  AlertKind = "newNetwork"  // a key was used from a network that it was never used from
	AlertRefusals    AlertKind = "refusals"    // a key, or an instance, is refused far more than it was
	AlertUnknownKeys AlertKind = "unknownKeys" // somebody tries secrets that are no key's
	AlertExpiring    AlertKind = "expiring"    // a key that is in use expires soon
	AlertUnused      AlertKind = "unused"      // a key is idle, or was never used
)

// An Alert is something that a person should know. It is open until it is over, or until somebody resolves what
// it is about; then it is resolved, and if the same comes again it is another alert.
type Alert struct {
	ID         apikey.ID // a UUIDv7
	InstanceID string    // "": of no instance: what was refused before one was known
	Kind       AlertKind
	KeyID      apikey.ID // zero: of no key
	Subject    string    // what tells it from others of its kind and key, e.g. the network; "" for none
	Message    string    // a sentence for a person; holds no secret
	Count      int64     // how often it was seen
	OpenedAt   time.Time
	SeenAt     time.Time // last
	ResolvedAt time.Time // zero: open
	AckedAt    time.Time // zero: nobody has said that it is known
	AckedBy    string
}

// An AlertQuery asks for one page of alerts.
type AlertQuery struct {
	InstanceID string
	// Everywhere asks for those of all instances and of none.
	Everywhere bool
	Kind       AlertKind // "": all
	KeyID      apikey.ID // zero: all
	Open       bool      // only those not resolved
	After      AlertPlace
	Limit      int
}

// An AlertPlace is a place in the order of [AlertStore].Alerts.
type AlertPlace struct {
	OpenedAt time.Time
	ID       apikey.ID
}
