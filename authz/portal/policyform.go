package portal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A policyField is a field of the form for a policy. Its name is its path in the policy's JSON, so the form knows
// of every field what the Management API does, and a fault names the field that it is shown at.
type policyField struct {
	name, label, help string
	kind              policyKind
	choices           []string // of a choice, besides what is inherited
}

type policyKind string

const (
	policyCount    policyKind = "count"
	policyDuration policyKind = "duration"
	policyChoice   policyKind = "choice"
	policySwitch   policyKind = "switch"
	policyScopes   policyKind = "scopes"
	policyYesNo    policyKind = "yes or no" // or neither
	policyNumbers  policyKind = "numbers"
)

// A policyGroup is fields that belong together.
type policyGroup struct {
	title, text string
	fields      []policyField
}

// policyForm is every field of a policy. TestPolicyFormHasEveryField keeps it whole.
var policyForm = []policyGroup{
	{"All keys at once", "", []policyField{
		{"disabled", "Refuse every key of this instance", "The fastest way to end all access. Keys come back as they were when this is switched off.", policySwitch, nil},
	}},
	{"Limits of each instance key", "Each key of type instance has these, unless it has its own.", limitFields("defaults.instance")},
	{"Limits of each agent key", "Agent Access Tokens.", limitFields("defaults.agent")},
	{"Limits of each user key", "", limitFields("defaults.user")},
	{"Limits of all keys together", "Shared by every key of the instance, besides each key's own.", []policyField{
		{"total.rate.requests", "Requests", "Sustained, in the time after it. -1: unlimited.", policyCount, nil},
		{"total.rate.per", "in", "A duration such as 1s or 60s.", policyDuration, nil},
		{"total.burst", "Burst", "How many may come at once. A rate needs it.", policyCount, nil},
	}},
	{"Scopes", "", []policyField{
		{"allowedScopes", "Keys may have no more than these scopes", "One on each line, such as chat:read or agents:*. Nothing there: no cap.", policyScopes, nil},
	}},
	{"How many keys there may be", "Neither revoked nor expired; disabled ones count.", []policyField{
		{"caps.instance", "In the instance", "-1: no cap.", policyCount, nil},
		{"caps.user", "Of each user", "-1: no cap.", policyCount, nil},
		{"caps.agent", "Of each agent", "-1: no cap.", policyCount, nil},
		{"creation.perHour", "Made within an hour", "-1: no limit.", policyCount, nil},
		{"creation.perHourAndUser", "Made within an hour by one user", "By each creator with the role user. -1: no limit.", policyCount, nil},
	}},
	{"How long keys live", "", []policyField{
		{"expiration.default", "A key that says nothing expires", "none: never. time: on a date. inactivity: when nobody uses it.", policyChoice, []string{"none", "time", "inactivity"}},
		{"expiration.required", "Refuse keys without an end", "", policySwitch, nil},
		{"expiration.life", "Life of a key with an end", "Where no date is chosen. A duration such as 120d.", policyDuration, nil},
		{"expiration.longestLife", "Longest life", "From creation, change or rotation. From 1h to 3650d.", policyDuration, nil},
		{"expiration.inactivityDays", "Days without use until a key expires", "Where it expires by inactivity and says no number.", policyCount, nil},
		{"keepRevoked", "Keep revoked keys", "Then they are removed with all that belongs to them. From 1d.", policyDuration, nil},
	}},
	{"When somebody reports a secret as leaked", "revoke ends the secret at once; flag only tells of it.", []policyField{
		{"onLeak.instance", "Instance keys", "", policyChoice, []string{"revoke", "flag"}},
		{"onLeak.agent", "Agent keys", "", policyChoice, []string{"revoke", "flag"}},
		{"onLeak.user", "User keys", "", policyChoice, []string{"revoke", "flag"}},
	}},
	{"Usage", "", []policyField{
		{"usage.enabled", "Count requests by key and minute", "For charts, tables and alerts. When a key was last used is kept always.", policyYesNo, nil},
	}},
	{"Alerts", "What is worth one, and how much it takes.", []policyField{
		{"alerts.newNetwork.disabled", "No alert when a key is used from a network that it was never used from", "", policySwitch, nil},
		{"alerts.refusals.disabled", "No alert when far more is refused than usual", "", policySwitch, nil},
		{"alerts.refusals.window", "Refusals are counted within", "Whole minutes, from 1m to 1h.", policyDuration, nil},
		{"alerts.refusals.perKey", "Refusals of a key, at least", "", policyCount, nil},
		{"alerts.refusals.perInstance", "Refusals of the instance, at least", "", policyCount, nil},
		{"alerts.refusals.factor", "Times as many as usual", "", policyCount, nil},
		{"alerts.unknownKeys.disabled", "No alert when somebody tries secrets that are no key's", "", policySwitch, nil},
		{"alerts.unknownKeys.perMinute", "Unknown secrets in a minute, at least", "", policyCount, nil},
		{"alerts.expiring.disabled", "No alert when a key that is in use expires soon", "", policySwitch, nil},
		{"alerts.expiring.days", "Days before the end", "Falling, such as 14 3 1; each is an alert of its own.", policyNumbers, nil},
		{"alerts.unused.disabled", "No alert when nobody uses a key", "", policySwitch, nil},
		{"alerts.unused.idleDays", "Days since the last use", "", policyCount, nil},
		{"alerts.unused.neverUsedDays", "Days since a key that was never used was made", "", policyCount, nil},
	}},
	{"Shadow", "What is ticked is judged, counted and reported, and refuses nobody: to see what a limit would do.", []policyField{
		{"shadow.rate", "Rate and burst of keys", "", policySwitch, nil},
		{"shadow.maxConcurrent", "Running requests of keys", "", policySwitch, nil},
		{"shadow.total", "Limits of all keys together", "", policySwitch, nil},
		{"shadow.scopes", "Scopes that routes require", "", policySwitch, nil},
		{"shadow.allowedIps", "Addresses that keys may be used from", "", policySwitch, nil},
	}},
}

func limitFields(path string) []policyField {
	return []policyField{
		{path + ".rate.requests", "Requests", "Sustained, in the time after it. -1: unlimited.", policyCount, nil},
		{path + ".rate.per", "in", "A duration such as 1s, 60s or 1h.", policyDuration, nil},
		{path + ".burst", "Burst", "How many may come at once.", policyCount, nil},
		{path + ".maxConcurrent", "At the same time", "Requests that may run at once. -1: unlimited.", policyCount, nil},
	}
}

// policyValues are what a form's fields hold, by name. A switch that is off and a field that inherits are absent.
type policyValues map[string]string

// input reads the form. Errors: *apikey.InvalidError, several joined, where a number is none.
func (v policyValues) input() (admin.PolicyInput, error) {
	tree := map[string]any{}
	var bad faultList
	for _, group := range policyForm {
		for _, f := range group.fields {
			text := strings.TrimSpace(v[f.name])
			if text == "" {
				continue
			}
			var value any = text
			switch f.kind {
			case policyCount:
				n, err := strconv.Atoi(text)
				if err != nil {
					bad.add(apikey.Invalid("policy."+f.name, "must be a whole number"))
					continue
				}
				value = n
			case policySwitch:
				value = true
			case policyYesNo:
				value = text == "yes"
			case policyScopes:
				value = strings.Fields(text)
			case policyNumbers:
				list, err := numbers(text)
				if err != nil {
					bad.add(apikey.Invalid("policy."+f.name, "must be whole numbers with spaces between"))
					continue
				}
				value = list
			}
			plant(tree, f.name, value)
		}
	}
	var in admin.PolicyInput
	if err := bad.err(); err != nil {
		return in, err
	}
	b, err := json.Marshal(tree)
	if err == nil {
		d := json.NewDecoder(bytes.NewReader(b))
		d.DisallowUnknownFields()
		err = d.Decode(&in)
	}
	return in, err
}

func numbers(text string) ([]int, error) {
	var list []int
	for _, word := range strings.FieldsFunc(text, func(r rune) bool { return r == ' ' || r == ',' || r == '\t' }) {
		n, err := strconv.Atoi(word)
		if err != nil {
			return nil, err
		}
		list = append(list, n)
	}
	return list, nil
}

// policyValuesOf returns what a form shows for a policy: what it says itself.
func policyValuesOf(p *apikey.Policy) policyValues { return pick(p) }

// policyInForce returns what holds under a policy, whoever says it.
func policyInForce(p *apikey.Policy) policyValues {
	all := p.InForce()
	for _, l := range []*apikey.Limits{&all.Defaults.Instance, &all.Defaults.Agent, &all.Defaults.User} {
		*l = l.Or(apikey.ShippedLimits)
	}
	return pick(&all)
}

// pick reads the fields of the form out of a policy's JSON.
func pick(p *apikey.Policy) policyValues {
	values := policyValues{}
	var tree map[string]any
	b, err := json.Marshal(p)
	if err == nil {
		d := json.NewDecoder(bytes.NewReader(b))
		d.UseNumber()
		err = d.Decode(&tree)
	}
	if err != nil {
		panic("portal: a policy is no JSON: " + err.Error()) // it was read from JSON
	}
	for _, group := range policyForm {
		for _, f := range group.fields {
			switch value := find(tree, f.name).(type) {
			case nil:
			case bool:
				switch {
				case f.kind == policyYesNo && !value:
					values[f.name] = "no"
				case f.kind == policyYesNo:
					values[f.name] = "yes"
				case value:
					values[f.name] = "on"
				}
			case []any:
				parts := make([]string, len(value))
				for i, part := range value {
					parts[i] = fmt.Sprint(part) // a string or a number
				}
				separator := "\n"
				if f.kind == policyNumbers {
					separator = " "
				}
				values[f.name] = strings.Join(parts, separator)
			case json.Number:
				values[f.name] = value.String()
			case string:
				values[f.name] = value
			}
		}
	}
	return values
}

// plant puts a value at a path of a tree.
func plant(tree map[string]any, path string, value any) {
	for {
		first, rest, more := strings.Cut(path, ".")
		if !more {
			tree[first] = value
			return
		}
		branch, ok := tree[first].(map[string]any)
		if !ok {
			branch = map[string]any{}
			tree[first] = branch
		}
		tree, path = branch, rest
	}
}

// find returns what is at a path of a tree; nil if nothing is.
func find(tree map[string]any, path string) any {
	first, rest, more := strings.Cut(path, ".")
	if !more {
		return tree[first]
	}
	branch, ok := tree[first].(map[string]any)
	if !ok {
		return nil
	}
	return find(branch, rest)
}

// A policyChange is a field that would hold something else.
type policyChange struct{ Group, Label, Before, After string }

// policyChanges lists what differs between two policies in force, as people read it.
func policyChanges(before, after policyValues) []policyChange {
	var changes []policyChange
	for _, group := range policyForm {
		for _, f := range group.fields {
			if before[f.name] != after[f.name] {
				changes = append(changes, policyChange{group.title, f.label, f.read(before[f.name]), f.read(after[f.name])})
			}
		}
	}
	return changes
}

// read says a value as people read it.
func (f *policyField) read(value string) string {
	switch {
	case f.kind == policySwitch && value != "":
		return "yes"
	case f.kind == policySwitch:
		return "no"
	case f.kind == policyYesNo && value == "":
		return "yes, unless the server counts nothing"
	case f.kind == policyScopes && value == "":
		return "no cap"
	case f.kind == policyScopes:
		return strings.Join(strings.Fields(value), ", ")
	case value == strconv.Itoa(apikey.Unlimited):
		return "unlimited"
	case value == "":
		return "no limit"
	}
	return value
}
