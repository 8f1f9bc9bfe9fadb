package admin

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"keyward/authz/apikey"
)

// A Notice is something that the webhook is told, kept until it was: at least once, also across a crash.
type Notice struct {
	ID     apikey.ID // a UUIDv7, the same with every try
	Type   NoticeType
	Body   []byte // a NoticeBody as JSON
	MadeAt time.Time
	Tries  int
	NextAt time.Time // of the next try
}

// A NoticeType is what a notice is about.
type NoticeType string

// The types.
const (
	NoticeOpened   NoticeType = "alert.opened"
	NoticeResolved NoticeType = "alert.resolved"
	NoticeLeaked   NoticeType = "key.leaked" // somebody reported the secret: no alert, since it was acted upon at once
	NoticeTest     NoticeType = "test"
)

// A NoticeBody is what the webhook is sent. It holds no secret.
type NoticeBody struct {
	ID    apikey.ID    `json:"id"` // of the notice: whoever has seen it has had this one
	Type  NoticeType   `json:"type"`
	At    time.Time    `json:"at"`
	Alert *AlertRecord `json:"alert,omitempty"` // with alert.opened and alert.resolved
	Key   *NoticeKey   `json:"key,omitempty"`   // that it is about; absent where it is about none, or the key is gone
	Leak  *NoticeLeak  `json:"leak,omitempty"`  // with key.leaked
}

// A NoticeKey tells which key a notice is about.
type NoticeKey struct {
	InstanceID        string      `json:"instanceId"`
	ID                apikey.ID   `json:"id"`
	Name              string      `json:"name"`
	Type              apikey.Type `json:"type"`
	Hint              string      `json:"hint,omitempty"`
	Status            string      `json:"status"`
	UserPrincipalName string      `json:"userPrincipalName,omitempty"`
	AgentName         string      `json:"agentName,omitempty"`
}

// A NoticeLeak tells what a report of a leaked secret did.
type NoticeLeak struct {
	Generation int    `json:"generation"`
	Done       string `json:"done"` // flagged, secretEnded or keyRevoked
}

// What a report of a leaked secret did.
const (
	LeakFlagged     = "flagged"
	LeakEndedSecret = "secretEnded"
	LeakRevokedKey  = "keyRevoked"
)

// NewNotice makes a notice whose turn is now. a is nil where it is about no alert, k where it is about no key.
func NewNotice(of NoticeType, a *Alert, k *apikey.Key) (Notice, error) {
	body := NoticeBody{Type: of}
	if a != nil {
		record := AlertRecordOf(a)
		body.Alert = &record
	}
	return body.notice(k)
}

func (b NoticeBody) notice(k *apikey.Key) (Notice, error) {
	b.ID, b.At = newID(), now()
	if k != nil {
		record := RecordOf(k, b.At)
		b.Key = &NoticeKey{
			InstanceID: k.InstanceID, ID: k.ID, Name: k.Name, Type: k.Type, Hint: record.Hint, Status: record.Status,
			UserPrincipalName: k.UserPrincipalName, AgentName: k.AgentName,
		}
	}
	text, err := json.Marshal(b)
	return Notice{ID: b.ID, Type: b.Type, Body: text, MadeAt: b.At, NextAt: b.At}, err
}

// A Webhook tells somebody else. Safe for concurrent use.
type Webhook interface {
	// Send sends one notice once, and returns what became of it.
	Send(ctx context.Context, n Notice) WebhookAnswer
}

// A WebhookAnswer is what became of one notice.
type WebhookAnswer struct {
	Delivered  bool      `json:"delivered" doc:"It was answered with a status from 200 to 299."`
	Status     int       `json:"status,omitempty" doc:"Of the answer. Absent: there was none."`
	Error      string    `json:"error,omitempty" doc:"Why it counts as not delivered."`
	DeliveryID apikey.ID `json:"deliveryId" format:"uuid" doc:"Sent in the header Keyward-Delivery, and as id in the body."`
	Millis     int64     `json:"millis" doc:"How long it took, in milliseconds."`
}

// ErrNoWebhook: the server has none configured.
var ErrNoWebhook = errors.New("no webhook is configured: set alerts.webhook.url and alerts.webhook.secretFile")

// TestWebhook sends a test notice to the webhook, once, and returns what became of it.
// Errors: [ErrNoWebhook]. That it could not be delivered is no error.
func (s *Service) TestWebhook(ctx context.Context, caller Caller) (WebhookAnswer, error) {
	if err := caller.mayAll(testAlerts); err != nil {
		return WebhookAnswer{}, err
	}
	if s.cfg.Webhook == nil {
		return WebhookAnswer{}, ErrNoWebhook
	}
	n, err := NewNotice(NoticeTest, nil, nil)
	if err != nil {
		return WebhookAnswer{}, err
	}
	return s.cfg.Webhook.Send(ctx, n), nil
}
