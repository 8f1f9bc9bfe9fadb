package manage

import (
	"context"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A keyList is what may be asked of the list of keys. What each parameter means, admin.KeyListInput says.
type keyList struct {
	InstanceID        string `path:"instanceId"`
	Type              string `query:"type" enum:"instance,agent,user"`
	Status            string `query:"status" enum:"active,disabled,revoked,expired"`
	UserPrincipalName string `query:"userPrincipalName" doc:"Whose keys: a user."`
	AgentName         string `query:"agentName" doc:"Whose keys: an agent."`
	Environment       string `query:"environment"`
	CreatedBy         string `query:"createdBy" doc:"As the keys show it."`
	NamePrefix        string `query:"namePrefix" doc:"What the name begins with. Case matters."`
	UnusedFor         string `query:"unusedFor" doc:"A duration such as 90d: not used for so long, nor made, imported or restored in that time."`
	ExpiresBefore     string `query:"expiresBefore" doc:"RFC 3339, a date, which means its end in UTC, or a duration from now such as 30d."`
	IdleBefore        string `query:"idleBefore" doc:"Will expire for idleness before, unless it is used. Written as expiresBefore."`
	NeverUsed         yesNo  `query:"neverUsed"`
	NoExpiration      yesNo  `query:"noExpiration" doc:"Expires neither by time nor for idleness."`
	OrderBy           string `query:"orderby" enum:"createdAt,createdAt desc,name,name desc,lastUsedAt,lastUsedAt desc,expirationDate,expirationDate desc,idleAfter" doc:"By default what the filter is about, otherwise createdAt desc."`
	MaxPageSize       number `query:"maxpagesize" doc:"Keys on a page; more than 1000 counts as 1000. By default 100."`
	Cursor            string `query:"cursor" doc:"From nextLink. It holds for the same filter and order only."`
}

// input returns what is asked in the words of authz/admin.
func (in *keyList) input() (admin.KeyListInput, error) {
	l := admin.KeyListInput{
		Type: apikey.Type(in.Type), Status: in.Status, UserPrincipalName: in.UserPrincipalName, AgentName: in.AgentName,
		Environment: in.Environment, CreatedBy: in.CreatedBy, NamePrefix: in.NamePrefix, UnusedFor: in.UnusedFor,
		ExpiresBefore: in.ExpiresBefore, IdleBefore: in.IdleBefore, OrderBy: admin.KeyOrder(in.OrderBy),
	}
	var err error
	if l.NeverUsed, err = in.NeverUsed.value("neverUsed"); err != nil {
		return l, err
	}
	l.NoExpiration, err = in.NoExpiration.value("noExpiration")
	return l, err
}

func (y yesNo) value(name string) (bool, error) {
	switch y {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	}
	return false, apikey.Invalid(name, "must be true or false")
}

func (h *handler) listKeys(ctx context.Context, c *call, in *keyList) (*out[list[admin.KeyRecord]], error) {
	size, err := pageSizeOf(in.MaxPageSize)
	if err != nil {
		return nil, err
	}
	// The cursor holds for the instance, however its id is spelled.
	id, err := apikey.CanonicalInstanceID(in.InstanceID)
	if err != nil {
		return nil, apikey.ErrNotFound
	}
	asked, err := in.input()
	if err != nil {
		return nil, err
	}
	at := time.Now()
	query, err := asked.Query(at)
	if err != nil {
		return nil, err
	}
	if c.r.URL.Query().Has("cursor") {
		if query.After, err = h.cursors.decode(asked.In(id), in.Cursor); err != nil {
			return nil, err
		}
	}
	query.Limit = size
	found, err := h.svc.KeyPage(ctx, c.Caller, id, query)
	if err != nil {
		return nil, err
	}
	next := ""
	if found.Next != (admin.KeyPlace{}) {
		next = nextLink(c.r, h.cursors.Seal(asked.In(id), found.Next))
	}
	page := listOf(found.Keys, func(k *apikey.Key) admin.KeyRecord { return admin.RecordOf(k, at) })
	page.NextLink = next
	return ok(page), nil
}
