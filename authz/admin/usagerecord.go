package admin

import (
	"context"
	"maps"
	"slices"
	"time"

	"keyward/authz/apikey"
)

// A UsageInput is a time, as people write it. Empty fields say nothing.
type UsageInput struct {
	From, To string        // RFC 3339, a date in UTC, or a duration back from now such as 7d
	Interval UsageInterval // "": by how long the time is
}

const (
	usualUsage = 24 * time.Hour // where nobody says since when
	// Up to so long a time is shown in minutes, or in hours, where nobody says: as much as a chart can show. But
	// not of so long ago that they may not be kept any more.
	inMinutes, minutesKept = 3 * time.Hour, 24 * time.Hour
	inHours, hoursKept     = 7 * 24 * time.Hour, 30 * 24 * time.Hour
)

// Query checks in and returns the query it describes, of a time in whole intervals: the one that From is in is the
// first, the one that To is in the last. A To that is to come, or is not given, is now.
// Errors: *apikey.InvalidError, several joined.
func (in UsageInput) Query(now time.Time) (UsageQuery, error) {
	var bad faults
	to, err := usageTime("to", in.To, now, true)
	bad.add(err)
	if in.To == "" || to.After(now) {
		to = now
	}
	from := to.Add(-usualUsage)
	if in.From != "" {
		from, err = usageTime("from", in.From, now, false)
		bad.add(err)
	}
	if in.Interval != "" && !slices.Contains(UsageIntervals(), in.Interval) {
		bad.add(apikey.Invalid("interval", "must be minute, hour or day"))
	}
	if err := bad.err(); err != nil {
		return UsageQuery{}, err
	}
	if !from.Before(to) {
		return UsageQuery{}, apikey.Invalid("from", "must be before to, and before now")
	}
	q := UsageQuery{Interval: in.Interval}
	switch span, ago := to.Sub(from), now.Sub(from); {
	case q.Interval != "":
	case span <= inMinutes && ago <= minutesKept:
		q.Interval = UsageMinute
	case span <= inHours && ago <= hoursKept:
		q.Interval = UsageHour
	default:
		q.Interval = UsageDay
	}
	each := q.Interval.Duration()
	q.From = from.UTC().Truncate(each)
	if q.To = to.UTC().Truncate(each); q.To.Before(to) {
		q.To = q.To.Add(each)
	}
	return q, nil
}

// usageTime reads one end of a time; a date is its beginning, or its end.
func usageTime(field, s string, now time.Time, end bool) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if ago, err := apikey.ParseDuration(s); err == nil {
		if ago < 0 {
			return time.Time{}, apikey.Invalid(field, "must not be negative: a duration goes back from now")
		}
		return now.Add(-ago.Std()), nil
	}
	t, day, err := parseTime(field, s)
	if err != nil {
		return time.Time{}, apikey.Invalid(field, "must be RFC 3339 with a zone, such as 2027-01-31T12:00:00Z, a date from 1970 on, or a duration back from now such as 24h or 7d")
	}
	if day && end {
		t = t.AddDate(0, 0, 1)
	}
	return t, nil
}

// A UsageRecord is what was counted in a time, interval by interval, as JSON.
type UsageRecord struct {
	From         time.Time     `json:"from" doc:"Beginning of the first interval."`
	To           time.Time     `json:"to" doc:"End of the last interval, exclusive. What is of now is up to a minute behind."`
	Interval     UsageInterval `json:"interval" enum:"minute,hour,day"`
	NotCollected string        `json:"notCollected,omitempty" doc:"Absent if Envoy tells what became of requests; otherwise what to do so that it does."`
	Value        []UsageBucket `json:"value" nullable:"false" doc:"Each interval, oldest first, those in which nothing was counted too."`
	Total        UsageSums     `json:"total" doc:"Of all intervals."`
}

// A UsageBucket is one interval.
type UsageBucket struct {
	Start time.Time `json:"start" doc:"In UTC."`
	UsageSums
}

// UsageSums is what was counted of requests, as JSON.
type UsageSums struct {
	Allowed     int64            `json:"allowed"`
	Refused     int64            `json:"refused"`
	Reasons     map[string]int64 `json:"reasons" doc:"Refused requests, by reason."`
	Generations map[int]int64    `json:"generations" doc:"Allowed requests, by the number of the key's secret that they sent."`
	Networks    map[string]int64 `json:"networks" doc:"Allowed requests, by the client's /24, or /48 of IPv6; other: of networks that there was no room for."`
	Responses   *ResponseSums    `json:"responses" doc:"What Envoy told of requests with a known key when they had ended, of refused ones too; null where it told nothing of those that there were."`
}

// ResponseSums is what Envoy told of requests, as JSON.
type ResponseSums struct {
	Count          int64          `json:"count"`
	Statuses       ResponseStatus `json:"statuses"`
	RequestBytes   int64          `json:"requestBytes"`
	ResponseBytes  int64          `json:"responseBytes"`
	MeanSeconds    float64        `json:"meanSeconds"`
	LongestSeconds float64        `json:"longestSeconds"`
}

// ResponseStatus counts answers by the first digit of their HTTP status.
type ResponseStatus struct {
	Informational int64 `json:"1xx"`
	Success       int64 `json:"2xx"`
	Redirection   int64 `json:"3xx"`
	ClientError   int64 `json:"4xx"`
	ServerError   int64 `json:"5xx"`
	None          int64 `json:"none" doc:"No answer was sent, such as when the client left."`
}

// NotCollected is what to do so that Envoy tells what became of requests.
const NotCollected = "Envoy does not tell status, bytes and duration: keyward envoy generate --usage adds the log that does"

// UsageRecordOf makes of what a store lists for a query what people read.
func UsageRecordOf(q UsageQuery, counted []Usage) UsageRecord {
	r := UsageRecord{From: q.From, To: q.To, Interval: q.Interval}
	var total UsageCounts
	for i := range counted {
		total.Add(&counted[i].UsageCounts)
	}
	r.Total = UsageSumsOf(&total)
	if r.Total.Responses == nil && total.Allowed > 0 { // of a refused one without a known key Envoy has nothing to tell
		r.NotCollected = NotCollected
	}
	each := q.Interval.Duration()
	r.Value = make([]UsageBucket, 0, q.To.Sub(q.From)/each)
	next := 0
	for start := q.From; start.Before(q.To); start = start.Add(each) {
		var c UsageCounts
		if next < len(counted) && counted[next].Start.Equal(start) {
			c = counted[next].UsageCounts
			next++
		}
		b := UsageBucket{start, UsageSumsOf(&c)}
		if r.Total.Responses == nil {
			b.Responses = nil // in an empty interval too: the whole column is not there
		}
		r.Value = append(r.Value, b)
	}
	return r
}

// UsageSumsOf makes of counts what people read.
func UsageSumsOf(c *UsageCounts) UsageSums {
	s := UsageSums{
		Allowed: c.Allowed, Refused: c.Refused, Reasons: orEmpty(c.Reasons), Generations: orEmpty(c.Generations), Networks: orEmpty(c.Networks),
	}
	e := &c.Ended
	if e.Count == 0 && c.Allowed+c.Refused > 0 {
		return s
	}
	s.Responses = &ResponseSums{
		Count:        e.Count,
		Statuses:     ResponseStatus{e.Status[1], e.Status[2], e.Status[3], e.Status[4], e.Status[5], e.Status[0]},
		RequestBytes: e.RequestBytes, ResponseBytes: e.ResponseBytes, LongestSeconds: e.Longest.Seconds(),
	}
	if e.Count > 0 {
		s.Responses.MeanSeconds = (e.Duration / time.Duration(e.Count)).Seconds()
	}
	return s
}

func orEmpty[K comparable](m map[K]int64) map[K]int64 {
	if m == nil {
		return map[K]int64{}
	}
	return maps.Clone(m)
}

// A UsedKey is one of the keys of an instance that did the most, as JSON.
type UsedKey struct {
	KeyID  apikey.ID   `json:"keyId" format:"uuid"`
	Name   string      `json:"name,omitempty" doc:"Absent, as hint, type and status, of a key that is gone."`
	Hint   string      `json:"hint,omitempty"`
	Type   apikey.Type `json:"type,omitempty" enum:"instance,agent,user"`
	Status string      `json:"status,omitempty" enum:"active,disabled,revoked,expired"`
	UsageSums
}

// UsedKeys lists the keys of an instance that did the most, as TopUsage does, with what they are.
func (s *Service) UsedKeys(ctx context.Context, caller Caller, instanceID string, q UsageTop) ([]UsedKey, error) {
	top, err := s.TopUsage(ctx, caller, instanceID, q)
	if err != nil {
		return nil, err
	}
	at := now()
	list := make([]UsedKey, len(top))
	for i := range top {
		u := &top[i]
		list[i] = UsedKey{KeyID: u.KeyID, UsageSums: UsageSumsOf(&u.UsageCounts)}
		switch k, err := s.store.Key(ctx, u.InstanceID, u.KeyID); {
		case err == nil:
			record := RecordOf(k, at)
			list[i].Name, list[i].Hint, list[i].Type, list[i].Status = record.Name, record.Hint, record.Type, record.Status
		case !isNotFound(err):
			return nil, err
		}
	}
	return list, nil
}
