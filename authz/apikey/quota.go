package apikey

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Partition says what a quota counts apart.
type Partition string

// The partitions, by their names in FoundationaLLM's quota-store.json; PartitionKey is our own.
const (
	PartitionNone       Partition = "None"              // one count for everybody
	PartitionUPN        Partition = "UserPrincipalName" // one for each principal
	PartitionIdentifier Partition = "UserIdentifier"    // one for each principal, by its identifier
	PartitionKey        Partition = "ApiKey"            // one for each key; callers without a key have none
)

// Partitions lists all partitions.
func Partitions() []Partition {
	return []Partition{PartitionNone, PartitionUPN, PartitionIdentifier, PartitionKey}
}

// A Period is a span of the calendar in UTC.
type Period string

// The periods.
const (
	PeriodDay   Period = "day"
	PeriodMonth Period = "month"
)

const (
	// MaxQuotas is how many quotas an instance can have.
	MaxQuotas = 256
	// SmoothedWindow is what a smoothed quota is judged over.
	SmoothedWindow = 20 * time.Second

	minWindow    = time.Second
	maxWindow    = 366 * day
	maxQuotaName = 128
	maxPart      = 64 // of a context; its agent has maxQuotaName
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

// A QuotaOverride is what one key has instead of a quota's numbers.
type QuotaOverride struct {
	Limit int `json:"limit"` // units per window of the quota; [Unlimited] exempts the key
}

// quotaJSON is a quota in JSON, as stores, audit and API have it.
type quotaJSON struct {
	Name        string    `json:"name"`
	Description string    `json:"description,omitempty"`
	Context     string    `json:"context"`
	Partition   Partition `json:"partition"`
	Limit       int       `json:"limit"`
	Window      Duration  `json:"window,omitempty"`
	Period      Period    `json:"period,omitempty"`
	Smoothed    bool      `json:"smoothed,omitempty"`
	Lockout     Duration  `json:"lockout,omitempty"`
	Distributed bool      `json:"distributedEnforcement,omitempty"`
	Shadow      bool      `json:"shadow,omitempty"`
}

// MarshalJSON writes durations in their short form.
func (q Quota) MarshalJSON() ([]byte, error) {
	return json.Marshal(quotaJSON{
		q.Name, q.Description, q.Context, q.Partition, q.Limit, Duration(q.Window), q.Period, q.Smoothed, Duration(q.Lockout), q.Distributed, q.Shadow,
	})
}

// UnmarshalJSON reads what MarshalJSON writes. It does not validate.
func (q *Quota) UnmarshalJSON(text []byte) error {
	var j quotaJSON
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*q = Quota{
		j.Name, j.Description, j.Context, j.Partition, j.Limit, j.Window.Std(), j.Period, j.Smoothed, j.Lockout.Std(), j.Distributed, j.Shadow,
	}
	return nil
}

// Agent returns the agent that the quota's context ends in; "" for all of a controller.
func (q *Quota) Agent() string {
	_, rest, _ := strings.Cut(q.Context, ":")
	_, agent, _ := strings.Cut(rest, ":")
	return agent
}

// PerKey reports whether the quota counts each key of a type alone: only then can a key override it. The
// principal of an instance or agent key is the key itself.
func (q *Quota) PerKey(t Type) bool {
	switch q.Partition {
	case PartitionKey:
		return true
	case PartitionUPN, PartitionIdentifier:
		return t == TypeInstance || t == TypeAgent
	}
	return false
}

// LimitOf returns the limit that k has under q: its own if it overrides the quota, and may. [Unlimited] exempts it.
func (q *Quota) LimitOf(k *Key) int {
	if len(k.Quotas) > 0 {
		if own, ok := k.Quotas[q.Name]; ok && q.PerKey(k.Type) {
			return own.Limit
		}
	}
	return q.Limit
}

// LeastLimit is the lowest limit that lets a request through: 1, but for a smoothed quota, of whose limit
// only a share counts at a time.
func (q *Quota) LeastLimit() int {
	if !q.Smoothed {
		return 1
	}
	return max(1, int(q.Window/SmoothedWindow))
}

// Validate reports every field that cannot be meant, by its path below field: as *InvalidError, several
// joined. field is "" for a quota that stands alone.
func (q *Quota) Validate(field string) error {
	var bad []error
	refuse := func(name, reason string) {
		if field != "" {
			name = field + "." + name
		}
		bad = append(bad, Invalid(name, reason))
	}
	if !isQuotaName(q.Name) {
		refuse("name", "must be 1 to 128 of A-Z a-z 0-9 . _ -, and begin with a letter or digit")
	}
	if !isQuotaContext(q.Context) {
		refuse("context", "must be {service}:{controller} or {service}:{controller}:{agent}, each of A-Z a-z 0-9 . _ -, such as CoreAPI:Completions")
	}
	switch q.Partition {
	case PartitionNone, PartitionUPN, PartitionIdentifier, PartitionKey:
	default:
		refuse("partition", "must be None, UserPrincipalName, UserIdentifier or ApiKey")
	}
	window := q.Period == "" && q.Window >= minWindow && q.Window <= maxWindow
	switch {
	case q.Period != "" && q.Window != 0:
		refuse("period", "does not go with window: give one of them")
	case q.Period != "" && q.Period != PeriodDay && q.Period != PeriodMonth:
		refuse("period", "must be day or month")
	case q.Period == "" && q.Window == 0:
		refuse("window", "is missing: give it, such as 60s, 1h or 30d, or a period, day or month")
	case q.Period == "" && !window:
		refuse("window", "must be from 1s to 366d")
	}
	switch {
	case !q.Smoothed:
	case q.Period != "":
		refuse("smoothed", "does not go with period: what is smoothed has a window")
	case window && q.Window%SmoothedWindow != 0:
		refuse("window", "must be a multiple of 20s, because it is smoothed")
		window = false
	}
	switch {
	case q.Limit < 1 || q.Limit > maxCount:
		refuse("limit", "must be from 1 to 1000000000")
	case window && q.Limit < q.LeastLimit():
		refuse("limit", tooSmall(q))
	}
	if q.Lockout != 0 && (q.Lockout < minWindow || q.Lockout > maxWindow) {
		refuse("lockout", "must be from 1s to 366d, or absent for none")
	}
	return errors.Join(bad...)
}

func tooSmall(q *Quota) string {
	return fmt.Sprintf("must be at least %d: smoothed to 20s of %s, less would refuse the first request", q.LeastLimit(), Duration(q.Window))
}

// ValidateOverride reports why k cannot have an override of q; field is its path. nil: it can.
func (q *Quota) ValidateOverride(field string, t Type, own QuotaOverride) error {
	switch {
	case !q.PerKey(t) && q.Partition == PartitionNone:
		return Invalid(field, "cannot be overridden: the quota counts all callers together")
	case !q.PerKey(t):
		return Invalid(field, "cannot be overridden by a key of type "+string(t)+": the quota counts all keys of one user together")
	case own.Limit == Unlimited:
		return nil
	case own.Limit < 1 || own.Limit > maxCount:
		return Invalid(field+".limit", "must be from 1 to 1000000000, or -1 for unlimited")
	case own.Limit < q.LeastLimit():
		return Invalid(field+".limit", tooSmall(q))
	}
	return nil
}

// ValidateQuotas reports every fault of the quotas that an instance is to have, each by quota and field:
// quotas.{name}.{field}, or quotas[{position}].{field} where the name itself is at fault. Errors: as
// [Quota.Validate].
func ValidateQuotas(quotas []Quota) error {
	if len(quotas) > MaxQuotas { // and of so many no more is said
		return Invalid("quotas", fmt.Sprintf("are more than %d, the most that an instance can have", MaxQuotas))
	}
	var bad []error
	for i := range quotas {
		q, field := &quotas[i], QuotaField(quotas, i)
		if before := firstNamed(quotas, q.Name); before < i && isQuotaName(q.Name) {
			bad = append(bad, Invalid(field+".name", "is that of quotas["+strconv.Itoa(before)+"] too: "+q.Name))
		}
		if err := q.Validate(field); err != nil {
			bad = append(bad, err)
		}
	}
	return errors.Join(bad...)
}

// QuotaField is the path by which faults of one of several quotas are told: by its name, if that is one and
// the first of its kind, otherwise by its position.
func QuotaField(quotas []Quota, i int) string {
	if name := quotas[i].Name; isQuotaName(name) && firstNamed(quotas, name) == i {
		return "quotas." + name
	}
	return "quotas[" + strconv.Itoa(i) + "]"
}

func firstNamed(quotas []Quota, name string) int {
	return slices.IndexFunc(quotas, func(q Quota) bool { return q.Name == name })
}

// isQuotaName: a name is part of an address.
func isQuotaName(s string) bool { return isWord(s, maxQuotaName) && (isLetter(s[0]) || isDigit(s[0])) }

func isQuotaContext(s string) bool {
	service, rest, ok := strings.Cut(s, ":")
	controller, agent, named := strings.Cut(rest, ":")
	return ok && isWord(service, maxPart) && isWord(controller, maxPart) && (!named || isWord(agent, maxQuotaName))
}

func isWord(s string, most int) bool {
	for i := range len(s) {
		if c := s[i]; !isLetter(c) && !isDigit(c) && c != '.' && c != '_' && c != '-' {
			return false
		}
	}
	return s != "" && len(s) <= most
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }
