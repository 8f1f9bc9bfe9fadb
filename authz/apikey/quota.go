package apikey

import "time"

// A Partition says what a quota counts apart.
type Partition string

// The partitions, by their names in FoundationaLLM's quota-store.json; PartitionKey is our own.
const (
	PartitionNone       Partition = "None"              // one count for everybody
	PartitionUPN        Partition = "UserPrincipalName" // one for each principal
	PartitionIdentifier Partition = "UserIdentifier"    // one for each principal, by its identifier
	PartitionKey        Partition = "ApiKey"            // one for each key; callers without a key have none
)

// A Period is a span of the calendar in UTC.
type Period string

// The periods.
const (
	PeriodDay   Period = "day"
	PeriodMonth Period = "month"
)

// A Quota is a named limit over a window, for the requests of one context. All keys of its instance
// inherit it.
type Quota struct {
	Name        string
	Description string
	Context     string // {service}:{controller} or {service}:{controller}:{agent}, exact
	Partition   Partition
	Limit       int           // units per window
	Window      time.Duration // 0: Period says it
	Period      Period
	// Smoothed: judged over 20 s, with the share of the limit that falls to them, as FoundationaLLM does.
	Smoothed    bool
	Lockout     time.Duration // 0: none
	Distributed bool          // counted over all replicas where limits are shared
	// Shadow: counted and reported, but it refuses nothing.
	Shadow bool
}
