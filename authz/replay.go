package authz

import (
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// A Past is a request as a log of decisions tells of it.
type Past struct {
	At    time.Time
	KeyID apikey.ID // zero: the caller had none
	// Principal and UserID stand for whom it counted: any text, the same for the same one.
	Principal, UserID string
	Context, Agent    string
	Cost              int
}

// A Replay counts past requests against quotas, in the time of the requests. The rules are those of requests,
// but what keys have in place of quotas is not known to it. It is for one goroutine.
type Replay struct {
	byContext instanceQuotas
	tallies   map[limits.Cell]*replayed
	request   Request
	last      int64 // Unix nanoseconds
}

type replayed struct {
	limits.Tally
	limits.Runs
}

// NewReplay returns a Replay of an instance's quotas that has counted nothing. The instance is not changed
// while it is used.
func NewReplay(instance *apikey.Instance) *Replay {
	return &Replay{byContext: newInstanceQuotas(instance), tallies: map[limits.Cell]*replayed{}}
}

// A Replayed is what became of a past request.
type Replayed struct {
	Quotas  []*apikey.Quota // that count it; valid until the next Take
	Refused *apikey.Quota   // the one of them that refuses it; nil: it passes
}

// Take counts a request, which does not come before the one before it.
func (p *Replay) Take(past Past) Replayed {
	r, d := &p.request, Decision{Holder: Holder{Issuer: "replay"}}
	if !past.KeyID.IsZero() {
		d.Key = &apikey.Key{ID: past.KeyID}
	}
	r.quotas, r.inForce = r.quotas[:0], r.inForce[:0]
	r.upn, r.userID = append(r.upn[:0], past.Principal...), append(r.userID[:0], past.UserID...)
	q := question{rule: &Rule{Cost: past.Cost}}
	r.appendQuotas(p.byContext[past.Context], &d, &q)
	if past.Agent != "" {
		r.appendQuotas(p.byContext[past.Context+":"+past.Agent], &d, &q)
	}
	p.last = max(p.last, past.At.UnixNano())
	now := p.last
	standings := make([]limits.Standing, len(r.quotas))
	for i := range r.quotas {
		t := p.tallies[r.quotas[i].Cell]
		if t == nil {
			t = &replayed{}
			p.tallies[r.quotas[i].Cell] = t
		}
		standings[i] = t.Stand(&t.Runs, &r.quotas[i], now, now)
		standings[i].Quota = i
	}
	judged := limits.Judge(standings)
	answer := Replayed{Quotas: r.inForce}
	if !judged.Allowed {
		refuses := judged.Quota
		answer.Refused = r.inForce[refuses]
		if t := p.tallies[r.quotas[refuses].Cell]; standings[refuses].NoRoomFor > 0 {
			t.Lock(&t.Runs, &r.quotas[refuses].Quota, now)
		}
		return answer
	}
	for i := range r.quotas {
		if standings[i].RefusesFor > 0 {
			continue // in shadow
		}
		t := p.tallies[r.quotas[i].Cell]
		if int(t.Len) == len(t.Ring) {
			t.Runs = t.CopyTo(make([]limits.Run, max(4, 2*len(t.Ring))))
		}
		t.Spend(&t.Runs, &r.quotas[i].Quota, r.quotas[i].Units(), now, now)
	}
	return answer
}
