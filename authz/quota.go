package authz

import (
	"crypto/sha256"
	"sync"

	"keyward/authz/apikey"
	"keyward/limits"
)

// A quotaCell is where a quota counts: for partition None the cell itself, otherwise what the cells of its
// principals or keys are made of.
type quotaCell struct {
	name [16]byte // of the quota in its instance
	cell limits.Cell
}

func newQuotaCell(instanceID string, q *apikey.Quota) quotaCell {
	var room [256]byte
	name := sha256.Sum256(append(append(append(room[:0], instanceID...), 0), q.Name...))
	c := quotaCell{name: [16]byte(name[:16]), cell: limits.Cell{Class: classOf(q.Partition)}}
	c.cell.Owner = c.owner(nil)
	return c
}

// owner is SHA-256(name ‖ value)[:16], where name is SHA-256(instance ‖ 0 ‖ quota)[:16]. It is the same on
// every replica and after a restart, and a key's costs one block.
func (c *quotaCell) owner(value []byte) [16]byte {
	var room [128]byte
	sum := sha256.Sum256(append(append(room[:0], c.name[:]...), value...))
	return [16]byte(sum[:16])
}

// QuotaCell names the state of one of an instance's quotas: for partition None with nothing, otherwise with
// the id of a key (its 16 bytes), a UPN or an identifier, as a [Decision] appends them.
func QuotaCell(instanceID string, q *apikey.Quota, of []byte) limits.Cell {
	c := newQuotaCell(instanceID, q)
	if q.Partition != apikey.PartitionNone {
		c.cell.Owner = c.owner(of)
	}
	return c.cell
}

func classOf(p apikey.Partition) limits.Class {
	switch p {
	case apikey.PartitionNone:
		return limits.ClassGlobalQuota
	case apikey.PartitionKey:
		return limits.ClassKeyQuota
	}
	return limits.ClassPrincipalQuota
}

// A quota is a definition made ready.
type quota struct {
	*apikey.Quota
	cell  quotaCell
	limit limits.Quota // of who has no override
}

// instanceQuotas are the quotas of one snapshot of an instance, by context.
type instanceQuotas map[string][]quota

func newInstanceQuotas(in *apikey.Instance) instanceQuotas {
	byContext := instanceQuotas{}
	for i := range in.Quotas {
		q := &in.Quotas[i]
		byContext[q.Context] = append(byContext[q.Context], quota{q, newQuotaCell(in.ID, q), limits.QuotaOf(q, q.Limit)})
	}
	return byContext
}

// quotaSets holds what was made ready, by snapshot: of each instance the newest that was asked about.
type quotaSets struct {
	ready  sync.Map // *apikey.Instance -> instanceQuotas; a pointer as key costs no allocation
	mu     sync.Mutex
	newest map[string]*apikey.Instance // by id
}

func (s *quotaSets) of(in *apikey.Instance) instanceQuotas {
	if len(in.Quotas) == 0 {
		return nil
	}
	if ready, ok := s.ready.Load(in); ok {
		return ready.(instanceQuotas)
	}
	ready := newInstanceQuotas(in)
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.newest[in.ID]; old != nil {
		s.ready.Delete(old)
	}
	if s.newest == nil {
		s.newest = map[string]*apikey.Instance{}
	}
	s.newest[in.ID] = in
	s.ready.Store(in, ready)
	return ready
}

// appendQuotas adds to the request's demand all quotas of the rule's context, and then those of the agent
// that the request names: what a caller is told, of two with the same wait, is the first.
func (a *Authorizer) appendQuotas(r *Request, d *Decision, q *question, instance *apikey.Instance) {
	r.quotas, r.inForce = r.quotas[:0], r.inForce[:0]
	if q.rule.Context == "" {
		return
	}
	byContext := a.quotas.of(instance)
	if byContext == nil {
		return
	}
	r.upn, r.userID = r.upn[:0], r.userID[:0]
	r.appendQuotas(byContext[q.rule.Context], d, q)
	if q.agent != "" {
		var room [256]byte
		context := append(append(append(room[:0], q.rule.Context...), ':'), q.agent...)
		r.appendQuotas(byContext[string(context)], d, q)
	}
}

func (r *Request) appendQuotas(quotas []quota, d *Decision, q *question) {
	for i := range quotas {
		of, k := &quotas[i], d.Key
		demand := limits.QuotaDemand{Cell: of.cell.cell, Quota: of.limit, Cost: int64(max(1, q.rule.Cost)), Shadow: of.Shadow}
		switch of.Partition {
		case apikey.PartitionKey:
			if k == nil {
				continue // it counts keys, and this caller has none
			}
			demand.Cell.Owner = of.cell.owner(k.ID[:])
		case apikey.PartitionUPN:
			if len(r.upn) == 0 {
				r.upn = d.AppendUPN(r.upn)
			}
			demand.Cell.Owner = of.cell.owner(r.upn)
		case apikey.PartitionIdentifier:
			if len(r.userID) == 0 {
				r.userID = d.AppendUserID(r.userID)
			}
			demand.Cell.Owner = of.cell.owner(r.userID)
		}
		if k != nil && len(k.Quotas) > 0 {
			demand.Quota = limits.QuotaOf(of.Quota, of.LimitOf(k))
		}
		if demand.Quota.IsZero() {
			continue // the key is exempt
		}
		r.quotas = append(r.quotas, demand)
		r.inForce = append(r.inForce, of.Quota)
	}
}
