package foundationallm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"keyward/authz/apikey"
)

// A storedQuota is a definition in quota-store.json, which is an array of them.
type storedQuota struct {
	Name                   string `json:"name"`
	Description            string `json:"description"`
	Context                string `json:"context"`
	Type                   string `json:"type"`
	MetricPartition        string `json:"metric_partition"`
	MetricLimit            int    `json:"metric_limit"`
	MetricWindowSeconds    int    `json:"metric_window_seconds"`
	LockoutDurationSeconds int    `json:"lockout_duration_seconds"`
	DistributedEnforcement bool   `json:"distributed_enforcement"`
}

// The types. Nothing looks at them: the context says what is counted.
const (
	rawRequestRate   = "RawRequestRateLimit"
	agentRequestRate = "AgentRequestRateLimit"
)

// theirs are the names of our fields in the file.
var theirs = map[string]string{
	"partition": "metric_partition",
	"limit":     "metric_limit",
	"window":    "metric_window_seconds",
	"lockout":   "lockout_duration_seconds",
}

// longest is more seconds than any definition may have, and few enough to be a Duration.
const longest = 1 << 32

// IsQuotaStore reports whether a file is a quota-store.json, and not a list of quotas in our own format: one
// has members that only that has. An empty list is either.
func IsQuotaStore(text []byte) bool {
	var list []map[string]json.RawMessage
	if json.Unmarshal(withoutMark(text), &list) != nil {
		return false
	}
	return slices.ContainsFunc(list, func(members map[string]json.RawMessage) bool {
		for name := range members {
			if strings.HasPrefix(name, "metric_") || name == "lockout_duration_seconds" || name == "distributed_enforcement" {
				return true
			}
		}
		return false
	})
}

// ParseQuotaStore reads quota-store.json. Its quotas are smoothed, as that platform enforces them. Unlike there, a context
// may have several, and a partition be ApiKey.
//
// warnings tell of what is read and has no effect: as there, unknown members. Errors: *apikey.InvalidError
// for all that is wrong, joined, with the names that the file has.
func ParseQuotaStore(text []byte) (quotas []apikey.Quota, warnings []string, err error) {
	var list []json.RawMessage
	if err := json.Unmarshal(withoutMark(text), &list); err != nil || list == nil {
		return nil, nil, apikey.Invalid("", "a quota-store.json must be a JSON array of quota definitions")
	}
	var bad []error
	quotas = make([]apikey.Quota, len(list))
	unreadable := map[string]bool{} // fields whose faults are told already
	for i, definition := range list {
		at := "quotas[" + strconv.Itoa(i) + "]"
		members, twice := membersOf(definition)
		if members == nil {
			return nil, nil, apikey.Invalid(at, "must be an object")
		}
		for _, name := range twice {
			bad = append(bad, apikey.Invalid(at, "has "+shown(name)+" twice"))
		}
		var stored storedQuota
		fields := stored.fields()
		for _, name := range slices.Sorted(maps.Keys(members)) {
			to, known := fields[name]
			if !known {
				warnings = append(warnings, at+": has "+shown(name)+", which has no effect")
				continue
			}
			if err := json.Unmarshal(members[name], to); err != nil {
				bad = append(bad, apikey.Invalid(at+"."+name, "must be "+kind(to)))
				unreadable[at+"."+name] = true
			}
		}
		q, ok := stored.quota()
		if !ok {
			bad = append(bad, apikey.Invalid(at+".type", "must be "+rawRequestRate+" or "+agentRequestRate))
		}
		quotas[i] = q
		if agent := strings.Count(q.Context, ":") > 1; ok && stored.Type != "" && agent != strings.EqualFold(stored.Type, agentRequestRate) {
			warnings = append(warnings, at+": its type does not go with its context; the context says what is counted")
		}
	}
	for _, one := range faults(apikey.ValidateQuotas(quotas)) {
		path, field := one.Field, ""
		if dot := strings.LastIndexByte(path, '.'); dot >= 0 {
			path, field = path[:dot], path[dot+1:]
		}
		if name, ok := theirs[field]; ok {
			field = name
		}
		i := slices.IndexFunc(quotas, func(q apikey.Quota) bool { return path == "quotas."+q.Name })
		if i >= 0 && unreadable["quotas["+strconv.Itoa(i)+"]."+field] || unreadable[path+"."+field] {
			continue
		}
		if field != "" {
			path += "." + field
		}
		bad = append(bad, apikey.Invalid(path, one.Reason))
	}
	return quotas, warnings, errors.Join(bad...)
}

// membersOf returns the members of an object, and the names that it has more than once: which of them that
// platform would take is nobody's to guess. nil if it is no object.
func membersOf(object json.RawMessage) (members map[string]json.RawMessage, twice []string) {
	d := json.NewDecoder(bytes.NewReader(object))
	if begin, err := d.Token(); err != nil || begin != json.Delim('{') {
		return nil, nil
	}
	members = map[string]json.RawMessage{}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, nil
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, nil
		}
		if _, known := members[name.(string)]; known && !slices.Contains(twice, name.(string)) {
			twice = append(twice, name.(string))
		}
		members[name.(string)] = value
	}
	return members, twice
}

// FormatQuotaStore writes quotas as that platform reads them.
// Errors: *apikey.InvalidError for each that it could not enforce, or would not start with, joined.
func FormatQuotaStore(quotas []apikey.Quota) ([]byte, error) {
	list := make([]storedQuota, len(quotas))
	var bad []error
	contexts := map[string]string{}
	for i := range quotas {
		q := &quotas[i]
		refuse := func(field, reason string) {
			bad = append(bad, apikey.Invalid(apikey.QuotaField(quotas, i)+"."+field, reason))
		}
		if q.Partition == apikey.PartitionKey {
			refuse("partition", "is not known to FoundationaLLM")
		}
		if !q.Smoothed {
			refuse("smoothed", "must be true: FoundationaLLM smooths every quota over 20s")
		}
		if q.Shadow {
			refuse("shadow", "is not known to FoundationaLLM, which would refuse requests")
		}
		if q.Lockout%time.Second != 0 {
			refuse("lockout", "must be whole seconds for FoundationaLLM")
		}
		if other, taken := contexts[q.Context]; taken {
			refuse("context", "is that of "+other+" too: FoundationaLLM takes one quota for each")
		}
		contexts[q.Context] = q.Name
		list[i] = storedQuota{
			q.Name, q.Description, q.Context, rawRequestRate, string(q.Partition), q.Limit,
			int(q.Window / time.Second), int(q.Lockout / time.Second), q.Distributed,
		}
		if strings.Count(q.Context, ":") > 1 {
			list[i].Type = agentRequestRate
		}
	}
	if err := errors.Join(bad...); err != nil {
		return nil, err
	}
	text, err := json.MarshalIndent(list, "", "  ")
	return append(text, '\n'), err
}

// fields are where the members go.
func (s *storedQuota) fields() map[string]any {
	return map[string]any{
		"name": &s.Name, "description": &s.Description, "context": &s.Context, "type": &s.Type,
		"metric_partition": &s.MetricPartition, "metric_limit": &s.MetricLimit, "metric_window_seconds": &s.MetricWindowSeconds,
		"lockout_duration_seconds": &s.LockoutDurationSeconds, "distributed_enforcement": &s.DistributedEnforcement,
	}
}

// quota returns the definition in our words, not validated; ok is false for an unknown type. The words of
// enumerations are read in any case, and the first of one is what an absent member means, as there.
func (s *storedQuota) quota() (q apikey.Quota, ok bool) {
	partition := apikey.Partition(s.MetricPartition)
	if partition == "" {
		partition = apikey.PartitionNone
	}
	for _, known := range apikey.Partitions() {
		if strings.EqualFold(string(partition), string(known)) {
			partition = known
		}
	}
	seconds := func(n int) time.Duration { return time.Duration(min(max(n, -1), longest)) * time.Second }
	return apikey.Quota{
		Name: s.Name, Description: s.Description, Context: s.Context, Partition: partition, Limit: s.MetricLimit,
		Window: seconds(s.MetricWindowSeconds), Smoothed: true, Lockout: seconds(s.LockoutDurationSeconds), Distributed: s.DistributedEnforcement,
	}, s.Type == "" || strings.EqualFold(s.Type, rawRequestRate) || strings.EqualFold(s.Type, agentRequestRate)
}

func kind(field any) string {
	switch field.(type) {
	case *int:
		return "a whole number"
	case *bool:
		return "true or false"
	}
	return "a string"
}

var looksLikeAName = regexp.MustCompile(`^[A-Za-z_]{1,32}$`)

// shown names a member, if it looks like a name: somebody may have put anything there.
func shown(name string) string {
	if looksLikeAName.MatchString(name) {
		return fmt.Sprintf("a member %q", name)
	}
	return "an unknown member"
}

// faults are the *apikey.InvalidErrors that err joins.
func faults(err error) (all []*apikey.InvalidError) {
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		for _, one := range many.Unwrap() {
			all = append(all, faults(one)...)
		}
	} else if one, ok := errors.AsType[*apikey.InvalidError](err); ok {
		all = append(all, one)
	}
	return all
}

// withoutMark takes off a byte order mark, which .NET writes and reads.
func withoutMark(text []byte) []byte { return bytes.TrimPrefix(text, []byte("\xef\xbb\xbf")) }
