package admin

import (
	"context"
	"errors"
	"math"
	"slices"
	"time"

	"keyward/authz/apikey"
)

// A UsageStore keeps how many requests there were. Nothing in it is a mutation: no revision, no audit.
type UsageStore interface {
	// AddUsage adds counts: each to the minute, to the hour and to the day that its Start is in. All are added
	// in one transaction, or on error none: batches of a hundred keep others from writing for some 10 ms. Start
	// may be any instant. Counts of a key that is gone are added all the same; of an instance that is gone, or was
	// made at another time than InstanceMade, they are not.
	//
	// An error of the commit leaves unknown whether it happened. A batch that comes again is added once, and
	// nothing of it is looked at: see [UsageBatch].
	AddUsage(ctx context.Context, as UsageBatch, counts []Usage) error
	// Usage lists what was counted, oldest first: Start is the beginning of a minute, hour or day in UTC.
	// Where nothing was counted there is nothing.
	Usage(ctx context.Context, q UsageQuery) ([]Usage, error)
	// TopUsage sums what the keys of an instance did in a time, those with the most first, and then by id, at
	// most limit. Start is not set.
	TopUsage(ctx context.Context, instanceID string, q UsageTop) ([]Usage, error)
	// ForgetUsage removes minutes, hours and days that began before a time.
	ForgetUsage(ctx context.Context, before map[UsageInterval]time.Time) error
	// ForgetDeleted removes what is left of deleted instances, counts and alerts. Nobody is shown any of it since
	// the instance was deleted, not even where it was made again: this gives back its room, a little at a time.
	ForgetDeleted(ctx context.Context) error
}

// A UsageBatch names what is added, so that it can be tried again when nobody knows whether it was: with the same
// counts, before the writer's next one. What a writer adds under a Number that is not above its last one is there.
// The zero batch has no name, and is added whenever it comes.
type UsageBatch struct {
	Writer apikey.ID // a random one, of one process
	Number int64     // from 1, growing
}

// A UsageInterval is how long the time is that one Usage counts.
type UsageInterval string

// The intervals.
const (
	UsageMinute UsageInterval = "minute"
	UsageHour   UsageInterval = "hour"
	UsageDay    UsageInterval = "day" // in UTC
)

// UsageIntervals lists the intervals, the shortest first.
func UsageIntervals() []UsageInterval { return []UsageInterval{UsageMinute, UsageHour, UsageDay} }

// Duration is how long an interval is; 0 for an unknown one.
func (i UsageInterval) Duration() time.Duration {
	switch i {
	case UsageMinute:
		return time.Minute
	case UsageHour:
		return time.Hour
	case UsageDay:
		return 24 * time.Hour
	}
	return 0
}

// A UsageQuery asks for the counts of one key, of an instance, or of requests that belong to none.
type UsageQuery struct {
	InstanceID string    // "": requests of which no instance is known
	KeyID      apikey.ID // zero: everything that the instance counts
	Interval   UsageInterval
	From, To   time.Time // Start is From or later, and before To
}

// A UsageTop asks for the keys that did the most.
type UsageTop struct {
	Interval UsageInterval // of what is summed
	From, To time.Time     // as in UsageQuery
	By       UsageOrder
	Limit    int
}

// A UsageOrder is by what keys are compared.
type UsageOrder string

// The orders.
const (
	ByRequests UsageOrder = "requests" // allowed and refused
	ByRefused  UsageOrder = "refused"
)

// Usage counts the requests of one key in one time; with KeyID zero those of the instance as a whole: of all
// its keys, of callers with a token, and of who was refused before a key was known.
type Usage struct {
	InstanceID string
	KeyID      apikey.ID
	Start      time.Time
	// InstanceMade is the CreatedAt of the instance that is meant, of what is added: another one may have its id by
	// then. Zero: whichever has it. What is listed does not say.
	InstanceMade time.Time
	UsageCounts
}

// UsageCounts is what is counted of requests. The decisions are exact, but for what a crash loses.
type UsageCounts struct {
	Allowed     int64            `json:"allowed"`
	Refused     int64            `json:"refused"`               // the sum of Reasons
	Reasons     map[string]int64 `json:"reasons,omitempty"`     // refused, by authz.Reason
	Generations map[int]int64    `json:"generations,omitempty"` // allowed, by the number of the secret that was sent
	// Networks counts allowed requests by the client's /24, or /48 of IPv6; [OtherNetworks] counts those of
	// networks that there was no room for.
	Networks map[string]int64 `json:"networks,omitempty"`
	Ended    EndedRequests    `json:"ended,omitzero"` // all zero where Envoy does not tell
}

// OtherNetworks stands in UsageCounts for networks that are not counted apart.
const OtherNetworks = "other"

// MaxNetworks is how many networks are counted apart in one Usage; a store may be given more over time, and
// keeps the first.
const MaxNetworks = 64

// EndedRequests is what Envoy tells of requests when they have ended (the log keyward-usage).
type EndedRequests struct {
	Count         int64         `json:"count,omitempty"`
	Status        [6]int64      `json:"status,omitzero"` // by the first digit of the status; 0: none was sent
	RequestBytes  int64         `json:"requestBytes,omitempty"`
	ResponseBytes int64         `json:"responseBytes,omitempty"`
	Duration      time.Duration `json:"duration,omitempty"` // of all together
	Longest       time.Duration `json:"longest,omitempty"`
}

// Add adds other to c.
func (c *UsageCounts) Add(other *UsageCounts) {
	c.Allowed += other.Allowed
	c.Refused += other.Refused
	c.Reasons = addCounts(c.Reasons, other.Reasons)
	c.Generations = addCounts(c.Generations, other.Generations)
	for network, n := range other.Networks {
		if _, known := c.Networks[network]; !known && c.networks() >= MaxNetworks {
			network = OtherNetworks
		}
		c.Networks = addCounts(c.Networks, map[string]int64{network: n})
	}
	c.Ended.Add(&other.Ended)
}

// networks is how many networks are counted apart.
func (c *UsageCounts) networks() int {
	if _, others := c.Networks[OtherNetworks]; others {
		return len(c.Networks) - 1
	}
	return len(c.Networks)
}

// Add adds other to e. Bytes and duration stay at the most that can be told: they come from a log, which may tell
// anything.
func (e *EndedRequests) Add(other *EndedRequests) {
	e.Count += other.Count
	for class, n := range other.Status {
		e.Status[class] += n
	}
	e.RequestBytes = atMost(e.RequestBytes, other.RequestBytes)
	e.ResponseBytes = atMost(e.ResponseBytes, other.ResponseBytes)
	e.Duration = atMost(e.Duration, other.Duration)
	e.Longest = max(e.Longest, other.Longest)
}

// atMost adds what is not negative, as far as there are numbers for it.
func atMost[N ~int64](a, b N) N {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

func addCounts[K comparable](to, from map[K]int64) map[K]int64 {
	if to == nil && len(from) > 0 {
		to = make(map[K]int64, len(from))
	}
	for what, n := range from {
		to[what] += n
	}
	return to
}

// forgetUsage removes counts that are older than they are to be kept, and what is left of deleted instances.
func (s *Service) forgetUsage(ctx context.Context) error {
	errs := []error{s.store.ForgetDeleted(ctx)}
	before := make(map[UsageInterval]time.Time, len(s.cfg.UsageKeep))
	for interval, keep := range s.cfg.UsageKeep {
		before[interval] = now().Add(-keep)
	}
	if len(before) > 0 {
		errs = append(errs, s.store.ForgetUsage(ctx, before))
	}
	return errors.Join(errs...)
}

// readUsage is what a caller needs the right to; to one with the role user the keys it owns are all there is.
const readUsage = "usage.read"

// maxUsageRows bounds what one question is answered with.
const maxUsageRows = 2000

// KeyUsage lists what one key did, as [UsageStore].Usage does.
//
// Errors: *apikey.InvalidError also where the answer would have more than 2,000 entries.
func (s *Service) KeyUsage(ctx context.Context, caller Caller, instanceID string, id apikey.ID, q UsageQuery) ([]Usage, error) {
	instance, err := caller.mayIn(instanceID, readUsage)
	if err != nil {
		return nil, err
	}
	k, err := s.store.Key(ctx, instance, id)
	if err != nil {
		return nil, err
	}
	if !caller.owns(k) {
		return nil, apikey.ErrNotFound
	}
	q.InstanceID, q.KeyID = instance, id
	return s.usage(ctx, q)
}

// InstanceUsage lists what an instance counted in all.
func (s *Service) InstanceUsage(ctx context.Context, caller Caller, instanceID string, q UsageQuery) ([]Usage, error) {
	instance, err := s.ofWholeInstance(ctx, caller, instanceID)
	if err != nil {
		return nil, err
	}
	q.InstanceID, q.KeyID = instance, apikey.ID{}
	return s.usage(ctx, q)
}

// UsageOfNoInstance lists what was counted of requests of which no instance is known, such as those with an
// unknown key. It is for callers of all instances.
func (s *Service) UsageOfNoInstance(ctx context.Context, caller Caller, q UsageQuery) ([]Usage, error) {
	if err := caller.mayAll(readUsage); err != nil {
		return nil, err
	}
	if err := caller.notUser(); err != nil {
		return nil, err
	}
	q.InstanceID, q.KeyID = "", apikey.ID{}
	return s.usage(ctx, q)
}

// TopUsage lists the keys of an instance that did the most.
func (s *Service) TopUsage(ctx context.Context, caller Caller, instanceID string, q UsageTop) ([]Usage, error) {
	instance, err := s.ofWholeInstance(ctx, caller, instanceID)
	if err != nil {
		return nil, err
	}
	var bad faults
	if q.By != ByRequests && q.By != ByRefused {
		bad.add(apikey.Invalid("by", "must be requests or refused"))
	}
	if !q.From.Before(q.To) {
		bad.add(apikey.Invalid("from", "must be before to"))
	}
	if !slices.Contains(UsageIntervals(), q.Interval) {
		bad.add(apikey.Invalid("interval", "must be minute, hour or day"))
	}
	if q.Limit < 1 || q.Limit > pageOfAll {
		bad.add(apikey.Invalid("limit", "must be from 1 to 1000"))
	}
	if err := bad.err(); err != nil {
		return nil, err
	}
	return s.store.TopUsage(ctx, instance, q)
}

func (s *Service) ofWholeInstance(ctx context.Context, caller Caller, instanceID string) (string, error) {
	instance, err := caller.mayIn(instanceID, readUsage)
	if err != nil {
		return "", err
	}
	if err := caller.notUser(); err != nil {
		return "", err
	}
	_, err = s.store.Instance(ctx, instance) // to tell nothing used from no instance
	return instance, err
}

func (c Caller) notUser() error {
	if c.Role == RoleUser {
		return &ForbiddenError{Reason: "the role user sees the usage of its own keys only"}
	}
	return nil
}

func (s *Service) usage(ctx context.Context, q UsageQuery) ([]Usage, error) {
	var bad faults
	each := q.Interval.Duration()
	if !slices.Contains(UsageIntervals(), q.Interval) {
		bad.add(apikey.Invalid("interval", "must be minute, hour or day"))
	}
	switch {
	case !q.From.Before(q.To):
		bad.add(apikey.Invalid("from", "must be before to"))
	case each > 0 && q.To.Sub(q.From) > maxUsageRows*each:
		bad.add(apikey.Invalid("interval", "is too short for so long a time: at most 2000 of them are listed at once, so ask for a longer interval or a shorter time"))
	}
	if err := bad.err(); err != nil {
		return nil, err
	}
	return s.store.Usage(ctx, q)
}
