package sqlite

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A listing is a query of keys in the making. Every list names the index that it goes by: SQLite, left to
// itself, sorts a million keys for a page where it misjudges a filter.
type listing struct {
	where []string
	args  []any
	text  string // the whole

	// A column that is bounded by places: SQLite takes one condition for each end of a range, and any other than
	// the place makes it read again what was read before, or on beyond.
	column                   string
	closedBelow, closedAbove bool
}

// arg adds an argument and returns its place.
func (l *listing) arg(v any) string {
	l.args = append(l.args, v)
	return "?" + strconv.Itoa(len(l.args))
}

func (l *listing) and(condition string) { l.where = append(l.where, condition) }

// bound adds an end of a range.
func (l *listing) bound(column, is string, v any) {
	if column == l.column && (is[0] == '<' && l.closedAbove || is[0] == '>' && l.closedBelow) {
		column = "+" + column // not for the index
	}
	l.and(column + " " + is + " " + l.arg(v))
}

// between adds that a key stands after q.After, and not after upTo. To be called before what else is of the
// order's column.
func (l *listing) between(q admin.KeyQuery, upTo admin.KeyPlace) {
	order := orders[q.Order]
	l.column = order.column
	l.closedBelow, l.closedAbove = q.After != (admin.KeyPlace{}), upTo != (admin.KeyPlace{})
	after, until := " > ", " <= "
	if !order.rising {
		l.closedBelow, l.closedAbove = l.closedAbove, l.closedBelow
		after, until = " < ", " >= "
	}
	for _, end := range []struct {
		is    string
		place admin.KeyPlace
	}{{after, q.After}, {until, upTo}} {
		if end.place == (admin.KeyPlace{}) {
			continue
		}
		var at any = micros(end.place.At)
		switch {
		case order.column == "name":
			at = end.place.Name
		case order.column == "expiry" && end.place.At.IsZero():
			at = int64(forever)
		}
		l.and("(" + order.column + ", id)" + end.is + "(" + l.arg(at) + ", " + l.arg(end.place.ID[:]) + ")")
	}
}

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

// What a page of a list costs at most where no index has its filter and its order both.
const (
	// fewKeys is how many keys a part of a filter may mean for the list to be made by sorting them all. If it
	// means more, a page of them is soon full in the order of the list.
	fewKeys = 5_000
	// manyKeys is how many keys are looked at in the order of the list before a page ends, full or not.
	manyKeys = 5_000
)

// A way is how a list is read: by an index, and in its order.
type way struct {
	index string
	more  []string        // conditions without which SQLite does not take the index
	means admin.KeyFilter // the part of the filter that the index answers
	// exact: it answers the whole filter, so that a page of keys is a page read, and what is over and nobody has
	// marked besides.
	exact bool
}

// A part is of a filter, and has an index in the order of creation.
type part struct {
	index string
	more  string // condition without which SQLite does not take the index
	means admin.KeyFilter
	every bool // it has an index in each order
}

// equals returns the parts of a filter that name one value, what means the fewest keys first.
func equals(f *admin.KeyFilter) (parts []part) {
	for _, p := range []struct {
		asked bool
		part
	}{
		{f.UserPrincipalName != "", part{"keys_by_user", "user_principal_name <> ''", admin.KeyFilter{UserPrincipalName: f.UserPrincipalName}, false}},
		{f.AgentName != "", part{"keys_by_agent", "agent_name <> ''", admin.KeyFilter{AgentName: f.AgentName}, false}},
		{f.CreatedBy != "", part{"keys_by_creator", "", admin.KeyFilter{CreatedBy: f.CreatedBy}, false}},
		{f.Environment != "", part{"keys_by_environment", "environment <> ''", admin.KeyFilter{Environment: f.Environment}, false}},
		{f.NeverUsed, part{"keys_never_used", "", admin.KeyFilter{NeverUsed: true}, false}},
		{f.NoExpiration, part{"keys_without_end", "", admin.KeyFilter{NoExpiration: true}, false}},
		{f.Status != "", part{"keys_by_status", "", admin.KeyFilter{Status: f.Status}, true}},
		// The keys of a user are user keys.
		{f.Type != "" && (f.UserPrincipalName == "" || f.Type != apikey.TypeUser) && (f.AgentName == "" || f.Type != apikey.TypeAgent),
			part{"keys_by_type", "", admin.KeyFilter{Type: f.Type}, true}},
	} {
		if p.asked {
			parts = append(parts, p.part)
		}
	}
	return parts
}

// ranges returns the parts of a filter that are ranges, by the column of which.
func ranges(f *admin.KeyFilter) map[string]part {
	parts := map[string]part{}
	if f.NamePrefix != "" {
		parts["name"] = part{"keys_by_name", "", admin.KeyFilter{NamePrefix: f.NamePrefix}, false}
	}
	if !f.ExpiresBefore.IsZero() {
		parts["expiry"] = part{"keys_by_expiry", "", admin.KeyFilter{ExpiresBefore: f.ExpiresBefore}, false}
	}
	if !f.IdleBefore.IsZero() {
		parts["idle_after"] = part{"keys_by_idleness", "inactivity_days > 0", admin.KeyFilter{IdleBefore: f.IdleBefore}, false}
	}
	if !f.UnusedSince.IsZero() {
		parts["quiet_since"] = part{"keys_by_use", "", admin.KeyFilter{UnusedSince: f.UnusedSince}, false}
	}
	return parts
}

// ordered are the indexes in the order of a column: of all keys, and what the names of others end in.
var ordered = map[string]struct{ all, ending string }{
	"created_at":  {"keys_newest", ""},
	"name":        {"keys_by_name", "_and_name"},
	"quiet_since": {"keys_by_use", "_and_use"},
	"expiry":      {"keys_by_expiry", "_and_expiry"},
	"idle_after":  {"keys_by_idleness", "_and_idleness"},
}

// drive chooses the index that a list in the order of a column goes by.
func drive(column string, f *admin.KeyFilter) way {
	w := way{index: ordered[column].all, exact: true}
	for i, p := range equals(f) {
		if i > 0 || column != "created_at" && !p.every {
			w.exact = false
		}
		if w.means == (admin.KeyFilter{}) && (column == "created_at" || p.every) {
			w.index, w.means = p.index+ordered[column].ending, p.means
			if p.more != "" {
				w.more = []string{p.more}
			}
		}
	}
	for of := range ranges(f) {
		if of != column {
			w.exact = false
			continue
		}
		switch column { // the index has it besides
		case "name":
			w.means.NamePrefix = f.NamePrefix
		case "expiry":
			w.means.ExpiresBefore = f.ExpiresBefore
		case "idle_after":
			w.means.IdleBefore = f.IdleBefore
		case "quiet_since":
			w.means.UnusedSince = f.UnusedSince
		}
	}
	if column == "idle_after" {
		w.more = append(w.more, "inactivity_days > 0")
	}
	return w
}

// A budget is what a page may cost where no index has its filter and its order both, in keys; the zero one is
// fewKeys and manyKeys. Tests have a smaller one, so that fewer keys are more than it.
type budget struct{ few, many int }

func (b budget) fewKeys() int  { return cmp.Or(b.few, fewKeys) }
func (b budget) manyKeys() int { return cmp.Or(b.many, manyKeys) }

// rareParts returns the parts of a filter by which the list could go instead of the way w, and for each the
// statement that counts the keys that it means, up to one more than are few.
func (b budget) rareParts(instanceID string, q admin.KeyQuery, w way) (parts []part, counts []listing) {
	parts = equals(&q.KeyFilter)
	for column, p := range ranges(&q.KeyFilter) {
		if column != orders[q.Order].column {
			parts = append(parts, p)
		}
	}
	parts = slices.DeleteFunc(parts, func(p part) bool { return strings.HasPrefix(w.index, p.index) })
	slices.SortFunc(parts, func(a, b part) int { return strings.Compare(a.index, b.index) }) // not that of a map
	for _, p := range parts {
		l := listing{}
		l.and("instance_id = " + l.arg(instanceID))
		l.filter(&p.means)
		if p.means.Status != "" {
			l.and("status = " + l.arg(p.means.Status))
		}
		if p.more != "" {
			l.and(p.more)
		}
		l.text = `SELECT count(*) FROM (SELECT 1 FROM keys INDEXED BY ` + p.index + ` WHERE ` + strings.Join(l.where, " AND ") +
			` LIMIT ` + strconv.Itoa(b.fewKeys()+1) + `)`
		counts = append(counts, l)
	}
	return parts, counts
}

// lastLooked returns the statement for the place of the last of the keys that may be looked at for a page by
// the way w.
func (b budget) lastLooked(instanceID string, q admin.KeyQuery, w way) (string, []any) {
	l := &listing{}
	order := orders[q.Order]
	direction := " DESC"
	if order.rising {
		direction = ""
	}
	l.and("instance_id = " + l.arg(instanceID))
	l.between(q, admin.KeyPlace{})
	for _, more := range w.more {
		l.and(more)
	}
	l.filter(&w.means)
	if w.means.Status != "" {
		l.and("status = " + l.arg(w.means.Status))
	}
	return `SELECT ` + order.column + `, id FROM keys INDEXED BY ` + w.index + ` WHERE ` + strings.Join(l.where, " AND ") +
		` ORDER BY ` + order.column + direction + `, id` + direction + ` LIMIT 1 OFFSET ` + strconv.Itoa(b.manyKeys()-1), l.args
}

// listKeys returns the statement for a query of keys by the way w, at most as far as a place; zero: as far as
// it goes.
func listKeys(instanceID string, q admin.KeyQuery, w way, upTo admin.KeyPlace) (string, []any) {
	l := &listing{}
	order := orders[q.Order]
	direction := " DESC"
	if order.rising {
		direction = ""
	}
	limit := l.arg(max(q.Limit, 0))
	l.and("instance_id = " + l.arg(instanceID))
	l.between(q, upTo)
	l.filter(&q.KeyFilter)
	if q.Order == admin.OrderIdle {
		l.and("inactivity_days > 0")
	}
	// branch selects a page of keys that meet the conditions so far and some more.
	branch := func(index string, more ...string) string {
		return `SELECT * FROM keys INDEXED BY ` + index + ` WHERE ` + strings.Join(append(more, l.where...), " AND ") +
			` ORDER BY ` + order.column + direction + `, id` + direction + ` LIMIT ` + limit
	}
	index, more := w.index, w.more
	var from string
	switch q.Status {
	case "":
		from = branch(index, more...)
	case "active":
		l.bound("expiry", ">=", micros(q.Now))
		l.bound("idle_after", ">=", micros(q.Now))
		from = branch(index, append(more, "status = 'active'")...)
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
		l.bound("name", ">=", f.NamePrefix)
		l.bound("name", "<", f.NamePrefix+"\U0010ffff") // which no name has
	}
	if !f.UnusedSince.IsZero() {
		l.bound("quiet_since", "<", micros(f.UnusedSince))
	}
	if !f.ExpiresBefore.IsZero() {
		l.bound("expiry", "<", micros(f.ExpiresBefore))
	}
	if !f.IdleBefore.IsZero() {
		l.bound("idle_after", "<", micros(f.IdleBefore))
	}
	if f.NeverUsed {
		l.and("last_used_at = " + neverSQL)
	}
	if f.NoExpiration {
		l.and("expires_at = " + neverSQL)
		l.and("inactivity_days = 0")
	}
}
