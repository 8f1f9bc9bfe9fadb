package admin

import (
	"context"
	"fmt"
	"time"

	"keyward/authz/apikey"
)

// A UsageAdvice says how a key was used lately. Counts are of allowed requests, and up to a minute behind.
type UsageAdvice struct {
	Requests    int64           `json:"requests" doc:"Within the last 30 days."`
	PerDay      float64         `json:"perDay" doc:"Of those, on average since the first day with one."`
	Networks    int             `json:"networks" doc:"How many networks they came from, each a /24, or a /48 of IPv6; 64 may be more."`
	Generations []GenerationUse `json:"generations" nullable:"false" doc:"Of the secrets that are valid, the oldest first."`
	OldInUse    bool            `json:"oldInUse" doc:"A secret that has a newer one was used within the last hour: somebody has not changed to the newer one."`
}

// A GenerationUse says how one secret of a key was used lately.
type GenerationUse struct {
	Number     int       `json:"number"`
	LastHour   int64     `json:"lastHour" doc:"Requests within the last hour."`
	ValidUntil time.Time `json:"validUntil,omitzero"`
}

// adviceTime is what advice looks back on.
const adviceTime = 30 * 24 * time.Hour

// KeyAdvice says whether a key seems to be needed, by when it was last used and by what was counted.
func (s *Service) KeyAdvice(ctx context.Context, caller Caller, instanceID string, id apikey.ID) (Advice, error) {
	k, err := s.Key(ctx, caller, instanceID, id)
	if err != nil {
		return Advice{}, err
	}
	at := now()
	a := AdviceOn(k, at)
	lately := UsageQuery{InstanceID: k.InstanceID, KeyID: k.ID, Interval: UsageDay, From: at.Add(-adviceTime), To: at.Add(time.Minute)}
	days, err := s.store.Usage(ctx, lately)
	if err != nil {
		return Advice{}, err
	}
	lately.Interval, lately.From = UsageMinute, at.Add(-time.Hour)
	minutes, err := s.store.Usage(ctx, lately)
	if err != nil {
		return Advice{}, err
	}
	a.use(k, days, minutes, at)
	return a, nil
}

// use adds what was counted of k in the days and minutes before a time.
func (a *Advice) use(k *apikey.Key, days, minutes []Usage, at time.Time) {
	var sum, hour UsageCounts
	first := at
	for i := range days {
		if days[i].Allowed > 0 && days[i].Start.Before(first) {
			first = days[i].Start
		}
		sum.Add(&days[i].UsageCounts)
	}
	if sum.Allowed == 0 {
		return
	}
	for i := range minutes {
		hour.Add(&minutes[i].UsageCounts)
	}
	u := &UsageAdvice{
		Requests: sum.Allowed, PerDay: float64(sum.Allowed) / float64(at.Sub(first)/(24*time.Hour)+1),
		Networks: len(sum.Networks), Generations: []GenerationUse{},
	}
	if _, others := sum.Networks[OtherNetworks]; others {
		u.Networks--
	}
	valid := validGenerations(k, at)
	for i, g := range valid {
		use := GenerationUse{Number: g.Number, LastHour: hour.Generations[g.Number], ValidUntil: g.ValidUntil.UTC()}
		u.Generations = append(u.Generations, use)
		if use.LastHour == 0 || i == len(valid)-1 || a.Safe {
			continue
		}
		u.OldInUse = true
		a.Text += fmt.Sprintf(" The secret with the number %d is still in use: requests within the last hour: %d.", g.Number, use.LastHour)
		if !g.ValidUntil.IsZero() {
			a.Text += fmt.Sprintf(" It ends in %s.", apikey.Duration(g.ValidUntil.Sub(at).Round(time.Minute)))
		}
	}
	a.Usage = u
}
