package admin

import (
	"context"
	"strings"
	"time"

	"keyward/authz/apikey"
)

// A KeyQuery asks for one page of the keys of an instance: those that pass the filter, in an order, from
// the place after which to begin, at most Limit. The zero query but for Limit begins with the newest.
type KeyQuery struct {
	KeyFilter
	Order KeyOrder
	After KeyPlace // the zero place is the beginning
	Limit int
	// Now is when Status is judged. A store is not asked for a status at the zero time; for the Service
	// that is now.
	Now time.Time
}

// A KeyFilter says which keys are meant: those that every field agrees with. An empty field says nothing.
type KeyFilter struct {
	Type apikey.Type
	// Status is what a KeyRecord says: active, disabled, revoked or expired, which is by time or idleness.
	Status            string
	UserPrincipalName string
	AgentName         string
	Environment       string
	CreatedBy         string
	NamePrefix        string    // byte by byte
	UnusedSince       time.Time // neither used nor made, imported or restored since
	ExpiresBefore     time.Time // has a date, and that is before
	IdleBefore        time.Time // expires for idleness before, if it is not used
	NeverUsed         bool
	NoExpiration      bool // neither by time nor by idleness
}

// A KeyOrder is what a list is ordered by, and then by id. The names are those of the API.
type KeyOrder string

// The orders. By name is byte by byte; by last use, a key that was not used since it was made, imported or
// restored stands there; by date, a key without one comes last in rising order.
const (
	OrderNewest         KeyOrder = "" // createdAt desc
	OrderOldest         KeyOrder = "createdAt"
	OrderName           KeyOrder = "name"
	OrderNameDesc       KeyOrder = "name desc"
	OrderLastUsed       KeyOrder = "lastUsedAt"
	OrderLastUsedDesc   KeyOrder = "lastUsedAt desc"
	OrderExpiration     KeyOrder = "expirationDate"
	OrderExpirationDesc KeyOrder = "expirationDate desc"
	OrderIdle           KeyOrder = "idleAfter" // lists only keys that expire for idleness
)

// A KeyPlace is a place in one order of keys: where a key stands, or stood.
type KeyPlace struct {
	At   time.Time // the time that orders; zero where there is none
	Name string    // the name, where that orders
	ID   apikey.ID
}

// A KeyPage is one page of a list.
type KeyPage struct {
	Keys []*apikey.Key // at most KeyQuery.Limit
	Next KeyPlace      // KeyQuery.After of the next page; zero: this is the last
}

// PlaceOf returns where k stands in the order.
func (o KeyOrder) PlaceOf(k *apikey.Key) KeyPlace {
	p := KeyPlace{ID: k.ID}
	switch o {
	case OrderName, OrderNameDesc:
		p.Name = k.Name
	case OrderLastUsed, OrderLastUsedDesc:
		p.At = quietSince(k)
	case OrderExpiration, OrderExpirationDesc:
		p.At = k.ExpirationDate
	case OrderIdle:
		p.At = k.IdleAfter()
	default:
		p.At = k.CreatedAt
	}
	return p
}

// quietSince is since when nobody is known to have used k: its last use, but not before it was made, imported
// or restored, since nothing is known of uses before that.
func quietSince(k *apikey.Key) time.Time {
	since := k.LastUsedAt
	for _, at := range [...]time.Time{k.CreatedAt, k.IdleFrom} {
		if since.Before(at) {
			since = at
		}
	}
	return since
}

// A KeyOwner is an agent or a user whose keys are counted. The zero KeyOwner is everybody.
//
// A user counts without regard to case, since one person is spelled in several ways: Ann@example.com has no ten
// keys more than ann@example.com. Who may see a key is another question, which goes by the exact spelling.
type KeyOwner struct {
	Type apikey.Type // agent or user
	Name string      // of a user in lower case
}

// canonical returns o as stores count it.
func (o KeyOwner) canonical() KeyOwner {
	if o.Type == apikey.TypeUser {
		o.Name = strings.ToLower(o.Name)
	}
	return o
}

// OwnerOf returns whose key k is; the zero KeyOwner for an instance key.
func OwnerOf(k *apikey.Key) KeyOwner {
	switch k.Type {
	case apikey.TypeAgent:
		return KeyOwner{k.Type, k.AgentName}
	case apikey.TypeUser:
		return KeyOwner{k.Type, k.UserPrincipalName}.canonical()
	}
	return KeyOwner{}
}

// KeyCounts count keys. Expired are those whose date has passed, and those that were marked as ended: a
// key becomes idle without anybody noticing, so until it is marked it counts as usable.
type KeyCounts struct {
	Total    int
	Usable   int // neither revoked nor expired; disabled ones included
	Disabled int // of the usable ones
	Revoked  int
	Expired  int
}

// A KeyListInput says which keys to list, as people write it. Empty fields say nothing.
type KeyListInput struct {
	Type              apikey.Type `json:"type,omitempty" strict:"notempty" enum:"instance,agent,user"`
	Status            string      `json:"status,omitempty" strict:"notempty" enum:"active,disabled,revoked,expired"`
	UserPrincipalName string      `json:"userPrincipalName,omitempty" strict:"notempty" minLength:"1" doc:"Whose keys: a user."`
	AgentName         string      `json:"agentName,omitempty" strict:"notempty" minLength:"1" doc:"Whose keys: an agent."`
	Environment       string      `json:"environment,omitempty" strict:"notempty" minLength:"1"`
	CreatedBy         string      `json:"createdBy,omitempty" strict:"notempty" minLength:"1" doc:"As the keys show it."`
	NamePrefix        string      `json:"namePrefix,omitempty" strict:"notempty" minLength:"1" doc:"What the name begins with. Case matters."`
	UnusedFor         string      `json:"unusedFor,omitempty" strict:"notempty" minLength:"1" doc:"A duration such as 90d: not used for so long, nor made, imported or restored in that time."`
	ExpiresBefore     string      `json:"expiresBefore,omitempty" strict:"notempty" minLength:"1" doc:"RFC 3339, a date, which means its end in UTC, or a duration from now such as 30d."`
	IdleBefore        string      `json:"idleBefore,omitempty" strict:"notempty" minLength:"1" doc:"Will expire for idleness before, unless it is used. Written as expiresBefore."`
	NeverUsed         bool        `json:"neverUsed,omitempty"`
	NoExpiration      bool        `json:"noExpiration,omitempty" doc:"Expires neither by time nor for idleness."`
	OrderBy           KeyOrder    `json:"orderby,omitempty" enum:"createdAt,createdAt desc,name,name desc,lastUsedAt,lastUsedAt desc,expirationDate,expirationDate desc,idleAfter" doc:"By default what the filter is about, otherwise createdAt desc."`
}

// Query checks in and returns the query it describes, judged at now, without After and Limit.
//
// Without an order the list goes by what the filter is about, because then a page costs no more than a
// page: the longest unused first, the first to expire first, names in order.
// Errors: *apikey.InvalidError, several joined.
func (in KeyListInput) Query(now time.Time) (KeyQuery, error) {
	q := KeyQuery{Now: now, KeyFilter: KeyFilter{
		Type: in.Type, Status: in.Status, UserPrincipalName: in.UserPrincipalName, AgentName: in.AgentName,
		Environment: in.Environment, CreatedBy: in.CreatedBy, NamePrefix: in.NamePrefix, NeverUsed: in.NeverUsed, NoExpiration: in.NoExpiration,
	}}
	var bad faults
	if in.Type != "" && in.Type.Kind() == 0 {
		bad.add(apikey.Invalid("type", "must be instance, agent or user"))
	}
	switch in.Status {
	case "", statusActive, statusDisabled, statusRevoked, statusExpired:
	default:
		bad.add(apikey.Invalid("status", "must be active, disabled, revoked or expired"))
	}
	if in.UnusedFor != "" {
		d, err := apikey.ParseDuration(in.UnusedFor)
		if err == nil && d < 0 {
			err = apikey.Invalid("", "must not be negative")
		}
		bad.add(under("unusedFor", err))
		q.UnusedSince = now.Add(-d.Std())
	}
	var err error
	q.ExpiresBefore, err = moment("expiresBefore", in.ExpiresBefore, now)
	bad.add(err)
	q.IdleBefore, err = moment("idleBefore", in.IdleBefore, now)
	bad.add(err)
	switch q.Order = in.OrderBy; q.Order {
	case "createdAt desc":
		q.Order = OrderNewest
	case OrderNewest:
		switch {
		case !q.IdleBefore.IsZero():
			q.Order = OrderIdle
		case !q.ExpiresBefore.IsZero():
			q.Order = OrderExpiration
		case !q.UnusedSince.IsZero():
			q.Order = OrderLastUsed
		case q.NamePrefix != "":
			q.Order = OrderName
		}
	case OrderOldest, OrderName, OrderNameDesc, OrderLastUsed, OrderLastUsedDesc, OrderExpiration, OrderExpirationDesc, OrderIdle:
	default:
		bad.add(apikey.Invalid("orderby", "must be createdAt, name, lastUsedAt, expirationDate, each perhaps followed by desc, or idleAfter"))
	}
	return q, bad.err()
}

// moment reads a time, or how far ahead one is; zero for "".
func moment(field, s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := apikey.ParseDuration(s); err == nil {
		return now.Add(d.Std()), nil
	}
	t, day, err := parseTime(field, s)
	if err == nil && day {
		t = endOfDay(t)
	}
	return t, err
}

// Keys lists keys of an instance, as q says. A caller with the role user sees its own. Where no index has the
// filter and the order, it takes the longer the more keys there are: [Service.KeyPage] does not.
func (s *Service) Keys(ctx context.Context, caller Caller, instanceID string, q KeyQuery) ([]*apikey.Key, error) {
	instance, any, err := s.narrowed(ctx, caller, instanceID, &q)
	if err != nil || !any {
		return nil, err
	}
	return s.store.Keys(ctx, instance, q)
}

// KeyPage does the same for a page that is made in bounded time: it may be short, even empty, and still have
// a next one.
func (s *Service) KeyPage(ctx context.Context, caller Caller, instanceID string, q KeyQuery) (KeyPage, error) {
	instance, any, err := s.narrowed(ctx, caller, instanceID, &q)
	if err != nil || !any {
		return KeyPage{}, err
	}
	return s.store.KeyPage(ctx, instance, q)
}

// narrowed makes q one of what the caller may see; any is false if that is nothing.
func (s *Service) narrowed(ctx context.Context, caller Caller, instanceID string, q *KeyQuery) (instance string, any bool, err error) {
	if instance, err = caller.mayIn(instanceID, readKeys); err != nil {
		return "", false, err
	}
	if _, err := s.store.Instance(ctx, instance); err != nil {
		return "", false, err // to tell no keys from no instance
	}
	if q.Now.IsZero() {
		q.Now = now()
	}
	return instance, caller.narrow(&q.KeyFilter), nil
}

// narrow makes a filter one of what the caller may see; false if that is nothing.
func (c Caller) narrow(f *KeyFilter) bool {
	if c.Role != RoleUser {
		return true
	}
	if c.UserPrincipalName == "" || f.Type != "" && f.Type != apikey.TypeUser ||
		f.UserPrincipalName != "" && f.UserPrincipalName != c.UserPrincipalName {
		return false
	}
	f.Type, f.UserPrincipalName = apikey.TypeUser, c.UserPrincipalName
	return true
}

// all returns every key that a query finds, page by page, until yield returns false.
func allKeys(ctx context.Context, from Reader, instanceID string, q KeyQuery, yield func(*apikey.Key) bool) error {
	q.Limit = pageOfAll
	for {
		page, err := from.Keys(ctx, instanceID, q)
		if err != nil {
			return err
		}
		for _, k := range page {
			if !yield(k) {
				return nil
			}
		}
		if len(page) < q.Limit {
			return nil
		}
		q.After = q.Order.PlaceOf(page[len(page)-1])
	}
}

const pageOfAll = 1000

// The statuses of a KeyRecord.
const (
	statusActive   = "active"
	statusDisabled = "disabled"
	statusRevoked  = "revoked"
	statusExpired  = "expired"
)

// statusOf is what people are told of where a key stands.
func statusOf(k *apikey.Key, at time.Time) string {
	switch k.StatusAt(at) {
	case apikey.StatusRevoked:
		return statusRevoked
	case apikey.StatusDisabled:
		return statusDisabled
	case apikey.StatusExpired, apikey.StatusIdle:
		return statusExpired
	}
	return statusActive
}

// Passes reports whether k passes the filter at a time, for stores' tests and for fakes: what a store
// answers must be what this says.
func (f *KeyFilter) Passes(k *apikey.Key, at time.Time) bool {
	quiet := quietSince(k)
	idle := k.IdleAfter()
	return (f.Type == "" || f.Type == k.Type) &&
		(f.Status == "" || f.Status == statusOf(k, at)) &&
		(f.UserPrincipalName == "" || f.UserPrincipalName == k.UserPrincipalName) &&
		(f.AgentName == "" || f.AgentName == k.AgentName) &&
		(f.Environment == "" || f.Environment == k.Environment) &&
		(f.CreatedBy == "" || f.CreatedBy == k.CreatedBy) &&
		strings.HasPrefix(k.Name, f.NamePrefix) &&
		(f.UnusedSince.IsZero() || quiet.Before(f.UnusedSince)) &&
		(f.ExpiresBefore.IsZero() || !k.ExpirationDate.IsZero() && k.ExpirationDate.Before(f.ExpiresBefore)) &&
		(f.IdleBefore.IsZero() || !idle.IsZero() && idle.Before(f.IdleBefore)) &&
		(!f.NeverUsed || k.LastUsedAt.IsZero()) &&
		(!f.NoExpiration || k.ExpirationDate.IsZero() && k.InactivityDays == 0)
}
