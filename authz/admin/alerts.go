package admin

import (
	"context"
	"errors"
	"slices"
	"time"

	"keyward/authz/apikey"
)

// An AlertStore keeps alerts, what the webhook has to be told of them, and which networks keys were used from.
// Nothing in it is a mutation: no revision, no audit.
type AlertStore interface {
	// PutAlert keeps an alert, in place of the one with its ID, and in the same transaction the notices about it.
	// Of an alert that is there AckedAt and AckedBy stay. Errors: apikey.ErrConflict, and nothing is kept, if
	// another one of the same InstanceID, Kind, KeyID and Subject is open, and this one is too; or if the one with
	// its ID is resolved, which it stays, or another instance's. apikey.ErrNotFound if there is no such instance.
	PutAlert(ctx context.Context, a *Alert, notices ...Notice) error
	// Alert returns one alert. Errors: apikey.ErrNotFound.
	Alert(ctx context.Context, id apikey.ID) (*Alert, error)
	// Alerts lists alerts, those opened last first, and then by id, at most limit, from the place after which to
	// begin; the zero place is the beginning.
	Alerts(ctx context.Context, q AlertQuery) ([]*Alert, error)
	// OpenAlerts counts the alerts that are open.
	OpenAlerts(ctx context.Context) (map[AlertsOf]int, error)
	// ForgetAlerts removes alerts that were resolved before a time.
	ForgetAlerts(ctx context.Context, before time.Time) error

	// DueNotices lists the notices whose turn has come at now, the longest ago first, at most limit.
	DueNotices(ctx context.Context, now time.Time, limit int) ([]Notice, error)
	// RetryNotice replaces Tries and NextAt of a notice. One that is gone stays gone.
	RetryNotice(ctx context.Context, n Notice) error
	// ForgetNotice removes a notice.
	ForgetNotice(ctx context.Context, id apikey.ID) error
	// ForgetNotices removes the notices that were made before a time, and of the others the oldest where more than
	// keep are left. It returns how many there were of both, also of those that it removed before an error.
	ForgetNotices(ctx context.Context, before time.Time, keep int) (late, over int, err error)

	// KeyNetworks lists the networks that a key is known to be used from, those used last first; at most
	// [MaxKeyNetworks].
	KeyNetworks(ctx context.Context, key apikey.ID) ([]KeyNetwork, error)
	// LearnNetworks adds networks that keys were used from, or notes that they were used from them again: FirstAt
	// only falls, LastAt only grows. Of more than [MaxKeyNetworks] of one key those used longest ago are forgotten.
	// Keys that are gone are skipped. It writes in batches: on error some may be learnt.
	LearnNetworks(ctx context.Context, networks []KeyNetwork) error
	// ForgetNetworks removes networks that were last used before a time.
	ForgetNetworks(ctx context.Context, before time.Time) error
}

// A KeyNetwork is a network that a key is used from.
type KeyNetwork struct {
	KeyID   apikey.ID
	Network string // as UsageCounts.Networks names it
	FirstAt time.Time
	LastAt  time.Time
}

// MaxKeyNetworks is how many networks of a key are known.
const MaxKeyNetworks = 256

// AlertsOf are the alerts of one kind in one instance.
type AlertsOf struct {
	InstanceID string // "": of none
	Kind       AlertKind
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

// AlertKinds lists the kinds.
func AlertKinds() []AlertKind {
	return []AlertKind{AlertNewNetwork, AlertRefusals, AlertUnknownKeys, AlertExpiring, AlertUnused}
}

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

// An AlertRecord is an alert as people read it.
type AlertRecord struct {
	ID         apikey.ID  `json:"id" format:"uuid"`
	InstanceID string     `json:"instanceId,omitempty" doc:"Absent: of no instance, because none was named or known."`
	Kind       AlertKind  `json:"kind" enum:"newNetwork,refusals,unknownKeys,expiring,unused"`
	Status     string     `json:"status" enum:"open,resolved"`
	KeyID      *apikey.ID `json:"keyId,omitempty" format:"uuid" doc:"Absent: it is about no single key."`
	Subject    string     `json:"subject,omitempty" doc:"What tells it from others of its kind and key: the network, the stage." example:"203.0.113.0/24"`
	Message    string     `json:"message"`
	Count      int64      `json:"count" doc:"How often it was seen."`
	OpenedAt   time.Time  `json:"openedAt"`
	SeenAt     time.Time  `json:"seenAt" doc:"Last."`
	ResolvedAt time.Time  `json:"resolvedAt,omitzero" doc:"Absent: it is open."`
	AckedAt    time.Time  `json:"ackedAt,omitzero" doc:"Absent: nobody has said that it is known."`
	AckedBy    string     `json:"ackedBy,omitempty"`
}

// AlertRecordOf returns a as people read it.
func AlertRecordOf(a *Alert) AlertRecord {
	r := AlertRecord{
		ID: a.ID, InstanceID: a.InstanceID, Kind: a.Kind, Status: "open", Subject: a.Subject, Message: a.Message, Count: a.Count,
		OpenedAt: a.OpenedAt.UTC(), SeenAt: a.SeenAt.UTC(), ResolvedAt: a.ResolvedAt.UTC(), AckedAt: a.AckedAt.UTC(), AckedBy: a.AckedBy,
	}
	if !a.ResolvedAt.IsZero() {
		r.Status = "resolved"
	}
	if a.KeyID != (apikey.ID{}) {
		r.KeyID = &a.KeyID
	}
	return r
}

// Alerts are about what goes on in an instance as a whole, so the role user has to do with none: what it should
// know of its own keys their usage and advice say.
const (
	readAlerts = "alert.read"
	ackAlert   = "alert.ack"
	testAlerts = "alert.test"
)

// Alerts lists alerts of an instance, those opened last first; with instanceID "" those of all instances and of
// none, to a caller of all.
func (s *Service) Alerts(ctx context.Context, caller Caller, instanceID string, q AlertQuery) ([]*Alert, error) {
	var err error
	if q.Everywhere = instanceID == ""; q.Everywhere {
		err = caller.mayAll(readAlerts)
	} else {
		q.InstanceID, err = caller.mayIn(instanceID, readAlerts)
	}
	if err != nil {
		return nil, err
	}
	if q.Kind != "" && !slices.Contains(AlertKinds(), q.Kind) {
		return nil, apikey.Invalid("kind", "must be newNetwork, refusals, unknownKeys, expiring or unused")
	}
	if !q.Everywhere {
		if _, err := s.store.Instance(ctx, q.InstanceID); err != nil { // to tell no alerts from no instance
			return nil, err
		}
	}
	return s.store.Alerts(ctx, q)
}

// AlertsOfNone lists alerts that belong to no instance, those opened last first, to a caller of all.
func (s *Service) AlertsOfNone(ctx context.Context, caller Caller, q AlertQuery) ([]*Alert, error) {
	if err := caller.mayAll(readAlerts); err != nil {
		return nil, err
	}
	q.InstanceID, q.Everywhere = "", false
	return s.store.Alerts(ctx, q)
}

// Alert returns one alert of an instance; with instanceID "" any one, to a caller of all.
func (s *Service) Alert(ctx context.Context, caller Caller, instanceID string, id apikey.ID) (*Alert, error) {
	instance, err := caller.mayOfAlert(instanceID, readAlerts)
	if err != nil {
		return nil, err
	}
	return alertIn(ctx, s.store, instance, id)
}

// mayOfAlert returns the canonical id of the instance, "" for any.
func (c Caller) mayOfAlert(instanceID, action string) (string, error) {
	if instanceID == "" {
		return "", c.mayAll(action)
	}
	return c.mayIn(instanceID, action)
}

// alertIn returns an alert if it is of an instance, of any with "".
func alertIn(ctx context.Context, from interface {
	Alert(ctx context.Context, id apikey.ID) (*Alert, error)
}, instance string, id apikey.ID) (*Alert, error) {
	a, err := from.Alert(ctx, id)
	if err != nil {
		return nil, err
	}
	if instance != "" && a.InstanceID != instance {
		return nil, apikey.ErrNotFound
	}
	return a, nil
}

// AckAlert notes that somebody knows of an alert. The first one stays; repeating it changes nothing. A new network
// is no longer new then, so that alert is resolved; the others stay open until what they tell of is over.
func (s *Service) AckAlert(ctx context.Context, caller Caller, instanceID string, id apikey.ID) (*Alert, error) {
	instance, err := caller.mayOfAlert(instanceID, ackAlert)
	if err != nil {
		return nil, err
	}
	var a *Alert
	_, err = s.update(ctx, func(ctx context.Context, tx Tx) error {
		if a, err = alertIn(ctx, tx, instance, id); err != nil {
			return err
		}
		if !a.AckedAt.IsZero() {
			return errNothing
		}
		before := AlertRecordOf(a)
		a.AckedAt, a.AckedBy = now(), caller.Name
		if a.Kind == AlertNewNetwork && a.ResolvedAt.IsZero() {
			a.ResolvedAt = a.AckedAt
			if s.cfg.Webhook != nil {
				k, err := tx.Key(ctx, a.InstanceID, a.KeyID)
				if err != nil && !isNotFound(err) {
					return err
				}
				n, err := NewNotice(NoticeResolved, a, k)
				if err != nil {
					return err
				}
				if err := tx.QueueNotice(ctx, n); err != nil {
					return err
				}
			}
		}
		if err := tx.AckAlert(ctx, a); err != nil {
			return err
		}
		return caller.audit(ctx, tx, ackAlert, a.InstanceID, a.ID.String(), before, AlertRecordOf(a))
	})
	if err != nil && !errors.Is(err, errNothing) {
		return nil, err
	}
	return a, nil
}
