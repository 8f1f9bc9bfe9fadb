package sqlite

import (
	"strconv"
	"strings"

	"keyward/authz/admin"
)

// A listing is a query of keys in the making. Every list names the index that it goes by: SQLite, left to
// itself, sorts a million keys for a page where it misjudges a filter.
type listing struct {
	where []string
	args  []any
	text  string // the whole
}

// arg adds an argument and returns its place.
func (l *listing) arg(v any) string {
	l.args = append(l.args, v)
	return "?" + strconv.Itoa(len(l.args))
}

func (l *listing) and(condition string) { l.where = append(l.where, condition) }

// orders are the columns that keys are ordered by.
var orders = map[admin.KeyOrder]struct {
	column string
	rising bool
}{
	admin.OrderNewest:         {"created_at", false},
	admin.OrderOldest:         {"created_at", true},
	admin.OrderName:           {"name", true},
	admin.OrderNameDesc:       {"name", false},
	admin.OrderLastUsed:       {"quiet_since", true},
	admin.OrderLastUsedDesc:   {"quiet_since", false},
	admin.OrderExpiration:     {"expiry", true},
	admin.OrderExpirationDesc: {"expiry", false},
	admin.OrderIdle:           {"idle_after", true},
}

// fewKeys is how many keys a filter may mean for the list to be made by sorting them all. If it means more, a
// page of them is soon full in the order of the list.
const fewKeys = 5_000

// rareKeys returns, for each part of a filter that has an index of its own, the statement that counts the
// keys it means up to one more than fewKeys.
func rareKeys(instanceID string, q admin.KeyQuery) (indexes []string, queries map[string]listing) {
	f, queries := &q.KeyFilter, map[string]listing{}
	if f.UserPrincipalName != "" || f.AgentName != "" {
		return nil, nil // which are found by their owner
	}
	usual, _ := drive(orders[q.Order].column, f)
	for _, part := range []struct {
		asked  bool
		index  string
		filter admin.KeyFilter
		more   string // without which SQLite does not take the index
	}{
		{f.CreatedBy != "", "keys_by_creator", admin.KeyFilter{CreatedBy: f.CreatedBy}, ""},
		{f.Environment != "", "keys_by_environment", admin.KeyFilter{Environment: f.Environment}, "environment <> ''"},
		{f.NeverUsed, "keys_never_used", admin.KeyFilter{NeverUsed: true}, ""},
		{f.NoExpiration, "keys_without_end", admin.KeyFilter{NoExpiration: true}, ""},
		{f.NamePrefix != "", "keys_by_name", admin.KeyFilter{NamePrefix: f.NamePrefix}, ""},
		{!f.ExpiresBefore.IsZero(), "keys_by_expiry", admin.KeyFilter{ExpiresBefore: f.ExpiresBefore}, ""},
		{!f.IdleBefore.IsZero(), "keys_by_idleness", admin.KeyFilter{IdleBefore: f.IdleBefore}, "inactivity_days > 0"},
		{!f.UnusedSince.IsZero(), "keys_by_use", admin.KeyFilter{UnusedSince: f.UnusedSince}, ""},
		{f.Status != "", "keys_by_status", admin.KeyFilter{}, ""},
	} {
		if !part.asked || part.index == usual {
			continue
		}
		l := listing{}
		l.and("instance_id = " + l.arg(instanceID))
		l.filter(&part.filter)
		if part.more != "" {
			l.and(part.more)
		}
		if part.index == "keys_by_status" {
			l.and("status = " + l.arg(f.Status))
		}
		l.text = `SELECT count(*) FROM (SELECT 1 FROM keys INDEXED BY ` + part.index + ` WHERE ` + strings.Join(l.where, " AND ") +
			` LIMIT ` + strconv.Itoa(fewKeys+1) + `)`
		indexes, queries[part.index] = append(indexes, part.index), l
	}
	return indexes, queries
}

// listKeys returns the statement for a query of keys. by is the index of a part of its filter that means few
// keys, "" if none does.
func listKeys(instanceID string, q admin.KeyQuery, by string) (string, []any) {
	l := &listing{}
	order := orders[q.Order]
	direction, beyond := " DESC", " < "
	if order.rising {
		direction, beyond = "", " > "
	}
	limit := l.arg(max(q.Limit, 0))
	l.and("instance_id = " + l.arg(instanceID))
	l.filter(&q.KeyFilter)
	if q.Order == admin.OrderIdle {
		l.and("inactivity_days > 0")
	}
	if q.After != (admin.KeyPlace{}) {
		var at any = micros(q.After.At)
		switch {
		case order.column == "name":
			at = q.After.Name
		case order.column == "expiry" && q.After.At.IsZero():
			at = int64(forever)
		}
		l.and("(" + order.column + ", id)" + beyond + "(" + l.arg(at) + ", " + l.arg(q.After.ID[:]) + ")")
	}
	// branch selects a page of keys that meet the conditions so far and some more.
	branch := func(index string, more ...string) string {
		return `SELECT * FROM keys INDEXED BY ` + index + ` WHERE ` + strings.Join(append(more, l.where...), " AND ") +
			` ORDER BY ` + order.column + direction + `, id` + direction + ` LIMIT ` + limit
	}
	index, more := drive(order.column, &q.KeyFilter)
	if by != "" {
		index, more = by, nil
		switch by {
		case "keys_by_environment":
			more = []string{"environment <> ''"}
		case "keys_by_idleness":
			more = []string{"inactivity_days > 0"}
		}
	}
	var from string
	switch q.Status {
	case "":
		from = branch(index, more...)
	case "active":
		n := l.arg(micros(q.Now))
		from = branch(index, append(more, "status = 'active'", "expiry >= "+n, "idle_after >= "+n)...)
	case "expired":
		// What is marked, and what is over and nobody has marked yet: those are few.
		n := l.arg(micros(q.Now))
		from = `SELECT * FROM (` + branch(index, append(more, "status = 'expired'")...) +
			`) UNION ALL SELECT * FROM (` + branch("keys_due_by_time", dueByTime, "NOT disabled", "expires_at < "+n) +
			`) UNION ALL SELECT * FROM (` + branch("keys_due_by_idleness", dueByIdleness, "NOT disabled", "idle_after < "+n, "expiry >= "+n) +
			`) ORDER BY ` + order.column + direction + `, id` + direction + ` LIMIT ` + limit
	default:
		from = branch(index, append(more, "status = "+l.arg(q.Status))...)
	}
	return `SELECT ` + keyColumns + ` FROM (` + from + `) k
	LEFT JOIN generations g ON g.key_id = k.id
	ORDER BY k.` + order.column + direction + `, k.id` + direction + `, g.number`, l.args
}

// filter adds what a filter asks for, but for the status.
func (l *listing) filter(f *admin.KeyFilter) {
	for _, equal := range []struct{ column, value string }{
		{"type", string(f.Type)},
		{"user_principal_name", f.UserPrincipalName},
		{"agent_name", f.AgentName},
		{"environment", f.Environment},
		{"created_by", f.CreatedBy},
	} {
		if equal.value != "" {
			l.and(equal.column + " = " + l.arg(equal.value))
		}
	}
	if f.NamePrefix != "" {
		l.and("name >= " + l.arg(f.NamePrefix))
		l.and("name < " + l.arg(f.NamePrefix+"\U0010ffff")) // which no name has
	}
	if !f.UnusedSince.IsZero() {
		l.and("quiet_since < " + l.arg(micros(f.UnusedSince)))
	}
	if !f.ExpiresBefore.IsZero() {
		l.and("expiry < " + l.arg(micros(f.ExpiresBefore)))
	}
	if !f.IdleBefore.IsZero() {
		l.and("idle_after < " + l.arg(micros(f.IdleBefore)))
	}
	if f.NeverUsed {
		l.and("last_used_at = " + neverSQL)
	}
	if f.NoExpiration {
		l.and("expires_at = " + neverSQL)
		l.and("inactivity_days = 0")
	}
}

// drive chooses the index that a list goes by, and the conditions without which SQLite does not take it.
// One owner has few keys, so they may be sorted; everything else goes in the order of the list.
func drive(column string, f *admin.KeyFilter) (index string, conditions []string) {
	switch {
	case f.UserPrincipalName != "":
		return "keys_by_user", []string{"user_principal_name <> ''"}
	case f.AgentName != "":
		return "keys_by_agent", []string{"agent_name <> ''"}
	case column == "idle_after":
		return "keys_by_idleness", nil
	}
	switch column {
	case "name":
		return "keys_by_name", nil
	case "expiry":
		return "keys_by_expiry", nil
	case "quiet_since":
		if f.Status != "" {
			return "keys_by_status_and_use", nil
		}
		return "keys_by_use", nil
	}
	switch {
	case f.CreatedBy != "":
		return "keys_by_creator", nil
	case f.Environment != "":
		return "keys_by_environment", []string{"environment <> ''"}
	case f.NeverUsed:
		return "keys_never_used", nil
	case f.NoExpiration:
		return "keys_without_end", nil
	case f.Status != "":
		return "keys_by_status", nil
	case f.Type != "":
		return "keys_by_type", nil
	}
	return "keys_newest", nil
}
