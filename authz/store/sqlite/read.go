package sqlite

import (
	"context"
	"database/sql"
	"fmt"
	"iter"
	"math"
	"slices"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/limits"
)

// A reader answers admin.Reader from a pool of connections or from a transaction. Every answer comes
// from one statement, hence from one snapshot.
type reader struct {
	query func(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	find  func(ctx context.Context, args ...any) (*sql.Rows, error) // findKey
	enter func() (leave func(), err error)
	fault func(what string, err error) error

	budget budget
}

// The statements whose plans a test looks at.
const (
	keyColumns = `k.id, k.instance_id, k.type, k.name, k.description, k.agent_name, k.user_principal_name, k.environment,
	k.scopes, k.allowed_ips, k.limits, k.quotas, k.expires_at, k.inactivity_days, k.not_before, k.metadata, k.disabled,
	k.revoked_at, k.revoked_reason, k.leak_reported_at, k.created_at, k.created_by, k.last_used_at, k.last_used_network, k.last_used_path, k.idle_from, k.revision,
	g.number, g.hint, g.created_at, g.valid_until, g.last_used_at, g.revoked`

	findKey = `SELECT (SELECT revision FROM meta WHERE one = 1), d.generation, ` + keyColumns + `
	FROM key_digests d JOIN keys k ON k.id = d.key_id JOIN generations g ON g.key_id = k.id
	WHERE d.digest = ? ORDER BY g.number`

	missKey = `SELECT revision, EXISTS (SELECT 1 FROM key_digests WHERE digest = ?) FROM meta WHERE one = 1`

	oneKey = `SELECT ` + keyColumns + ` FROM keys k LEFT JOIN generations g ON g.key_id = k.id
	WHERE k.id = ? AND k.instance_id = ? ORDER BY g.number`

	dueKeys = `SELECT ` + keyColumns + ` FROM (
		SELECT * FROM (SELECT id FROM keys INDEXED BY keys_due_by_time WHERE ` + dueByTime + ` AND expires_at < ?1 LIMIT ?3)
		UNION
		SELECT * FROM (SELECT id FROM keys INDEXED BY keys_due_by_idleness WHERE ` + dueByIdleness + ` AND idle_after < ?2 LIMIT ?3)
		LIMIT ?3) due
	JOIN keys k ON k.id = due.id LEFT JOIN generations g ON g.key_id = k.id
	ORDER BY k.id, g.number`

	revokedKeys = `SELECT ` + keyColumns + `
	FROM (SELECT * FROM keys WHERE instance_id = ? AND revoked_at < ? AND revoked_at <> ` + neverSQL + ` ORDER BY revoked_at LIMIT ?) k
	LEFT JOIN generations g ON g.key_id = k.id
	ORDER BY k.revoked_at, k.id, g.number`

	// Kept counts, less what has expired by time since anybody marked.
	countKeys = `SELECT total(c.total), total(c.usable) - o.due, total(c.disabled) - o.disabled, total(c.revoked)
	FROM (SELECT count(*) AS due, total(disabled) AS disabled FROM keys INDEXED BY keys_due_by_time
		WHERE ` + dueByTime + ` AND expires_at < ?4 AND instance_id = ?1
			AND (?2 = '' OR type = ?2 AND ?3 = CASE type WHEN 'agent' THEN agent_name ELSE lower(user_principal_name) END)) o
	LEFT JOIN key_counts c ON c.instance_id = ?1 AND c.type = ?2 AND c.name = ?3`

	creations = `SELECT created_at FROM keys WHERE instance_id = ? AND created_at > ?
		AND created_by NOT GLOB '` + admin.ImportedBy + `*' ORDER BY created_at DESC LIMIT ?`

	creationsBy = `SELECT created_at FROM keys INDEXED BY keys_by_creator
	WHERE instance_id = ? AND created_at > ? AND created_by = ? ORDER BY created_at DESC LIMIT ?`

	// The conditions of partial indexes, which SQLite wants word for word.
	dueByTime     = `revoked_at = ` + neverSQL + ` AND ended_at = ` + neverSQL + ` AND expires_at <> ` + neverSQL
	dueByIdleness = `revoked_at = ` + neverSQL + ` AND ended_at = ` + neverSQL + ` AND inactivity_days > 0`

	listChanges = `SELECT m.revision, m.forgotten, c.revision, c.instance_id, c.key_id, c.digest
	FROM meta m LEFT JOIN changes c ON c.revision > ?1 AND ?1 BETWEEN m.forgotten AND m.revision
	WHERE m.one = 1 ORDER BY c.revision, c.seq`

	listDigests = `SELECT m.revision, d.digest FROM meta m LEFT JOIN key_digests d WHERE m.one = 1`

	// The order of the joins is that of the index, so that the first rows come at once.
	recentKeys = `SELECT (SELECT revision FROM meta WHERE one = 1), d.digest, d.generation, ` + keyColumns + `
	FROM keys k INDEXED BY keys_recent CROSS JOIN key_digests d ON d.key_id = k.id CROSS JOIN generations g ON g.key_id = k.id
	WHERE k.revoked_at = ? ORDER BY k.last_used_at DESC`

	tokenColumns = `t.id, t.name, t.role, t.instance_id, t.hint, t.created_at, t.created_by, t.expires_at, t.revoked_at, t.bootstrap, t.user_principal_name, t.last_used_at` //nolint:gosec // G101: names of columns

	oneToken = `SELECT ` + tokenColumns + ` FROM token_digests d JOIN tokens t ON t.id = d.token_id WHERE d.digest = ?`

	// left counts what only the version p.version finds and could still be used at ?1.
	left = `(
	SELECT count(*) FROM key_digests d
	JOIN generations g ON g.key_id = d.key_id AND g.number = d.generation
	JOIN keys k ON k.id = d.key_id
	WHERE d.pepper_version = p.version AND k.revoked_at = ?2
		AND (k.expires_at = ?2 OR k.expires_at >= ?1) AND (g.valid_until = ?2 OR g.valid_until >= ?1) AND NOT g.revoked
		AND NOT EXISTS (SELECT 1 FROM key_digests o
			WHERE o.key_id = d.key_id AND o.generation = d.generation AND o.pepper_version <> p.version)
	) + (
	SELECT count(*) FROM token_digests d
	JOIN tokens t ON t.id = d.token_id
	WHERE d.pepper_version = p.version AND t.revoked_at = ?2 AND (t.expires_at = ?2 OR t.expires_at >= ?1)
		AND NOT EXISTS (SELECT 1 FROM token_digests o WHERE o.token_id = d.token_id AND o.pepper_version <> p.version))`
)

// rows runs a query and yields its rows; an error is the last thing it yields.
func (r *reader) rows(ctx context.Context, what, query string, args ...any) iter.Seq2[*sql.Rows, error] {
	return r.each(what, func() (*sql.Rows, error) { return r.query(ctx, query, args...) })
}

func (r *reader) each(what string, run func() (*sql.Rows, error)) iter.Seq2[*sql.Rows, error] {
	return func(yield func(*sql.Rows, error) bool) {
		leave, err := r.enter()
		if err != nil {
			yield(nil, r.fault(what, err))
			return
		}
		defer leave()
		rows, err := run()
		if err != nil {
			yield(nil, r.fault(what, err))
			return
		}
		defer func() { _ = rows.Close() }()
		for rows.Next() {
			if !yield(rows, nil) {
				return
			}
		}
		if err := rows.Err(); err != nil { // ctx, too, ends rows early
			yield(nil, r.fault(what, err))
		}
	}
}

// one runs a query for one row and scans it; false without an error means that there is none.
func (r *reader) one(ctx context.Context, what, query string, args []any, to ...any) (bool, error) {
	for row, err := range r.rows(ctx, what, query, args...) {
		if err == nil {
			err = r.scan(what, row, to...)
		}
		return err == nil, err
	}
	return false, nil
}

func (r *reader) scan(what string, row *sql.Rows, to ...any) error {
	if err := row.Scan(to...); err != nil {
		return r.fault(what, err)
	}
	return nil
}

func notFound(what string) error { return fmt.Errorf("%s: %w", what, apikey.ErrNotFound) }

// Instance implements admin.Reader.
func (r *reader) Instance(ctx context.Context, id string) (*apikey.Instance, error) {
	in := &apikey.Instance{ID: id}
	found, err := r.one(ctx, "read instance "+id, `SELECT policy, quotas, created_at, revision FROM instances WHERE id = ?`,
		[]any{id}, document{&in.Policy}, document{&in.Quotas}, instant{&in.CreatedAt}, &in.Revision)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, notFound("instance")
	}
	return in, nil
}

// Instances implements admin.Reader.
func (r *reader) Instances(ctx context.Context) ([]*apikey.Instance, error) {
	var list []*apikey.Instance
	for row, err := range r.rows(ctx, "list instances", `SELECT id, policy, quotas, created_at, revision FROM instances ORDER BY id`) {
		if err != nil {
			return nil, err
		}
		in := &apikey.Instance{}
		if err := row.Scan(&in.ID, document{&in.Policy}, document{&in.Quotas}, instant{&in.CreatedAt}, &in.Revision); err != nil {
			return nil, r.fault("read instance "+in.ID, err)
		}
		list = append(list, in)
	}
	return list, nil
}

// Key implements admin.Reader.
func (r *reader) Key(ctx context.Context, instanceID string, id apikey.ID) (*apikey.Key, error) {
	list, err := r.keys(r.rows(ctx, "read key", oneKey, id[:], instanceID))
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, notFound("key")
	}
	return list[0], nil
}

// Keys implements admin.Reader.
func (r *reader) Keys(ctx context.Context, instanceID string, q admin.KeyQuery) ([]*apikey.Key, error) {
	w, _, err := r.way(ctx, instanceID, q)
	if err != nil {
		return nil, err
	}
	query, args := listKeys(instanceID, q, w, admin.KeyPlace{})
	return r.keys(r.rows(ctx, "list keys", query, args...))
}

// KeyPage implements admin.Reader.
func (r *reader) KeyPage(ctx context.Context, instanceID string, q admin.KeyQuery) (admin.KeyPage, error) {
	w, rare, err := r.way(ctx, instanceID, q)
	if err != nil {
		return admin.KeyPage{}, err
	}
	var upTo admin.KeyPlace
	if !w.exact && !rare {
		if upTo, err = r.lastLooked(ctx, instanceID, q, w); err != nil {
			return admin.KeyPage{}, err
		}
	}
	size := max(q.Limit, 0)
	q.Limit = size + 1 // one more tells whether this is the last page
	query, args := listKeys(instanceID, q, w, upTo)
	keys, err := r.keys(r.rows(ctx, "list keys", query, args...))
	switch {
	case err != nil:
		return admin.KeyPage{}, err
	case len(keys) <= size:
		return admin.KeyPage{Keys: keys, Next: upTo}, nil
	case size == 0:
		return admin.KeyPage{Next: q.After}, nil
	}
	return admin.KeyPage{Keys: keys[:size], Next: q.Order.PlaceOf(keys[size-1])}, nil
}

// way chooses how a list is read; rare: by sorting the keys that a part of the filter means, which are few.
func (r *reader) way(ctx context.Context, instanceID string, q admin.KeyQuery) (w way, rare bool, err error) {
	w = drive(orders[q.Order].column, &q.KeyFilter)
	if w.exact {
		return w, false, nil
	}
	parts, counts := r.budget.rareParts(instanceID, q, w)
	least := r.budget.fewKeys() + 1
	for i, p := range parts {
		var n int
		if _, err := r.one(ctx, "list keys", counts[i].text, counts[i].args, &n); err != nil {
			return way{}, false, err
		}
		if n < least {
			least, rare = n, true
			w = way{index: p.index, means: p.means}
			if p.more != "" {
				w.more = []string{p.more}
			}
		}
	}
	return w, rare, nil
}

// lastLooked returns the place of the last of the keys that may be looked at for a page by the way w; zero if
// there are fewer.
func (r *reader) lastLooked(ctx context.Context, instanceID string, q admin.KeyQuery, w way) (p admin.KeyPlace, err error) {
	query, args := r.budget.lastLooked(instanceID, q, w)
	at := any(instant{&p.At})
	switch orders[q.Order].column {
	case "name":
		at = &p.Name
	case "expiry":
		at = orNever{&p.At}
	}
	found, err := r.one(ctx, "list keys", query, args, at, exactly(p.ID[:]))
	if err != nil || !found {
		return admin.KeyPlace{}, err
	}
	return p, nil
}

// CountKeys implements admin.Reader.
func (r *reader) CountKeys(ctx context.Context, instanceID string, owner admin.KeyOwner, now time.Time) (n admin.KeyCounts, err error) {
	var total, usable, disabled, revoked float64 // SQLite's total()
	_, err = r.one(ctx, "count keys", countKeys, []any{instanceID, string(owner.Type), owner.Name, micros(now)},
		&total, &usable, &disabled, &revoked)
	n = admin.KeyCounts{Total: int(total), Usable: int(usable), Disabled: int(disabled), Revoked: int(revoked)}
	n.Expired = n.Total - n.Usable - n.Revoked
	return n, err
}

// Creations implements admin.Reader.
func (r *reader) Creations(ctx context.Context, instanceID, createdBy string, since time.Time, limit int) ([]time.Time, error) {
	query, args := creations, []any{instanceID, micros(since), max(limit, 0)}
	if createdBy != "" {
		query, args = creationsBy, []any{instanceID, micros(since), createdBy, max(limit, 0)}
	}
	var list []time.Time
	for row, err := range r.rows(ctx, "list creations", query, args...) {
		var at time.Time
		if err == nil {
			err = r.scan("list creations", row, instant{&at})
		}
		if err != nil {
			return nil, err
		}
		list = append(list, at)
	}
	return list, nil
}

// DueKeys implements admin.Reader.
func (r *reader) DueKeys(ctx context.Context, expired, idle time.Time, limit int) ([]*apikey.Key, error) {
	return r.keys(r.rows(ctx, "list due keys", dueKeys, micros(expired), micros(idle), max(limit, 0)))
}

// RevokedKeys implements admin.Reader.
func (r *reader) RevokedKeys(ctx context.Context, instanceID string, before time.Time, limit int) ([]*apikey.Key, error) {
	return r.keys(r.rows(ctx, "list revoked keys", revokedKeys, instanceID, micros(before), max(limit, 0)))
}

// keys reads rows of keyColumns, in which the generations of a key follow each other. lead are columns
// before those.
func (r *reader) keys(rows iter.Seq2[*sql.Rows, error], lead ...any) ([]*apikey.Key, error) {
	var list []*apikey.Key
	for row, err := range rows {
		if err != nil {
			return nil, err
		}
		k, err := r.key(row, lead...)
		if err != nil {
			return nil, err
		}
		if n := len(list); n > 0 && list[n-1].ID == k.ID {
			list[n-1].Generations = append(list[n-1].Generations, k.Generations...)
		} else {
			list = append(list, k)
		}
	}
	return list, nil
}

// key reads a row of lead and keyColumns: a key, and at most one of its generations.
func (r *reader) key(row *sql.Rows, lead ...any) (*apikey.Key, error) {
	k := &apikey.Key{}
	var number, createdAt, validUntil, lastUsedAt sql.Null[int64]
	var hint sql.Null[string]
	var ended sql.Null[bool]
	err := row.Scan(append(slices.Clip(lead),
		exactly(k.ID[:]), &k.InstanceID, &k.Type, &k.Name, &k.Description, &k.AgentName, &k.UserPrincipalName, &k.Environment,
		document{&k.Scopes}, document{&k.AllowedIPs}, document{&k.Limits}, document{&k.Quotas}, instant{&k.ExpirationDate}, &k.InactivityDays,
		instant{&k.NotBefore}, document{&k.Metadata}, &k.Disabled,
		instant{&k.RevokedAt}, &k.RevokedReason, instant{&k.LeakReportedAt}, instant{&k.CreatedAt}, &k.CreatedBy,
		instant{&k.LastUsedAt}, &k.LastUsedNetwork, &k.LastUsedPath, instant{&k.IdleFrom}, &k.Revision,
		&number, &hint, &createdAt, &validUntil, &lastUsedAt, &ended)...)
	if err != nil {
		return nil, r.fault("read key "+k.ID.String(), err)
	}
	if number.Valid {
		k.Generations = []apikey.Generation{{
			Number:     int(number.V),
			Hint:       hint.V,
			CreatedAt:  time.UnixMicro(createdAt.V).UTC(),
			ValidUntil: time.UnixMicro(validUntil.V).UTC(),
			LastUsedAt: time.UnixMicro(lastUsedAt.V).UTC(),
			Revoked:    ended.V,
		}}
	}
	return k, nil
}

// FindKey implements admin.Reader.
func (r *reader) FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, apikey.Revision, error) {
	for {
		var revision apikey.Revision
		var generation int
		found, err := r.keys(r.each("find key", func() (*sql.Rows, error) { return r.find(ctx, d[:]) }), &revision, &generation)
		if err != nil {
			return nil, 0, err
		}
		if len(found) > 0 {
			k := found[0]
			k.Digest, k.Generation = d, generation
			return k, revision, nil
		}
		// No row, no revision: ask for it in a snapshot that has no such digest either.
		var appeared bool
		if _, err := r.one(ctx, "find key", missKey, []any{d[:]}, &revision, &appeared); err != nil {
			return nil, 0, err
		}
		if !appeared {
			return nil, revision, notFound("key")
		}
	}
}

// LastUsed implements admin.Reader.
func (r *reader) LastUsed(ctx context.Context, id apikey.ID) (at time.Time, err error) {
	found, err := r.one(ctx, "read last use", `SELECT last_used_at FROM keys WHERE id = ?`, []any{id[:]}, instant{&at})
	if err == nil && !found {
		err = notFound("key")
	}
	return at, err
}

// Digests implements admin.Reader.
func (r *reader) Digests(ctx context.Context, yield func(apikey.Digest) bool) (apikey.Revision, error) {
	var revision apikey.Revision
	for row, err := range r.rows(ctx, "list digests", listDigests) {
		if err != nil {
			return 0, err
		}
		var digest sql.RawBytes
		if err := r.scan("list digests", row, &revision, &digest); err != nil {
			return 0, err
		}
		if digest == nil {
			break // there are none
		}
		if len(digest) != len(apikey.Digest{}) {
			return 0, r.fault("list digests", fmt.Errorf("one has %d bytes", len(digest)))
		}
		if !yield(apikey.Digest(digest)) {
			break
		}
	}
	return revision, nil
}

// RecentKeys implements admin.Reader. It holds one snapshot for as long as yield takes: writers go on, but
// the log beside the file grows until it ends.
func (r *reader) RecentKeys(ctx context.Context, yield func(*apikey.Key, apikey.Revision) bool) error {
	var revision apikey.Revision
	var last *apikey.Key // whose generations are not all read yet
	for row, err := range r.rows(ctx, "list recent keys", recentKeys, never) {
		if err != nil {
			return err
		}
		var digest apikey.Digest
		var generation int
		k, err := r.key(row, &revision, exactly(digest[:]), &generation)
		if err != nil {
			return err
		}
		if last != nil && last.Digest == digest {
			last.Generations = append(last.Generations, k.Generations...)
			continue
		}
		if last != nil && !yield(last, revision) {
			return nil
		}
		k.Digest, k.Generation = digest, generation
		last = k
	}
	if last != nil {
		yield(last, revision)
	}
	return nil
}

// Changes implements admin.Reader.
func (r *reader) Changes(ctx context.Context, after apikey.Revision) (list []apikey.Change, head apikey.Revision, truncated bool, err error) {
	type place struct {
		revision apikey.Revision
		instance string
		key      apikey.ID
	}
	known := map[place]int{} // where in list
	for row, err := range r.rows(ctx, "list changes", listChanges, min(after, math.MaxInt64)) {
		if err != nil {
			return nil, 0, false, err
		}
		var forgotten apikey.Revision
		var revision sql.Null[apikey.Revision]
		var instance sql.Null[string]
		var key, digest []byte
		if err := r.scan("list changes", row, &head, &forgotten, &revision, &instance, &key, &digest); err != nil {
			return nil, 0, false, err
		}
		if after < forgotten || after > head {
			return nil, head, true, nil
		}
		if !revision.Valid {
			break
		}
		p := place{revision: revision.V, instance: instance.V}
		if key != nil {
			if err := exactly(p.key[:]).Scan(key); err != nil {
				return nil, 0, false, r.fault("list changes", err)
			}
		}
		i, ok := known[p]
		if !ok {
			i = len(list)
			known[p] = i
			list = append(list, apikey.Change{Revision: p.revision, InstanceID: p.instance, KeyID: p.key})
		}
		if digest != nil {
			var d apikey.Digest
			if err := exactly(d[:]).Scan(digest); err != nil {
				return nil, 0, false, r.fault("list changes", err)
			}
			if !slices.Contains(list[i].Digests, d) {
				list[i].Digests = append(list[i].Digests, d)
			}
		}
	}
	return list, head, false, nil
}

// Token implements admin.Reader.
func (r *reader) Token(ctx context.Context, d apikey.Digest) (*admin.Token, error) {
	list, err := r.tokens(r.rows(ctx, "find token", oneToken, d[:]))
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, notFound("token")
	}
	return list[0], nil
}

// Tokens implements admin.Reader.
func (r *reader) Tokens(ctx context.Context) ([]*admin.Token, error) {
	return r.tokens(r.rows(ctx, "list tokens", `SELECT `+tokenColumns+` FROM tokens t ORDER BY t.created_at DESC, t.id DESC`))
}

func (r *reader) tokens(rows iter.Seq2[*sql.Rows, error]) ([]*admin.Token, error) {
	var list []*admin.Token
	for row, err := range rows {
		if err != nil {
			return nil, err
		}
		t := &admin.Token{}
		err := row.Scan(exactly(t.ID[:]), &t.Name, &t.Role, &t.InstanceID, &t.Hint, instant{&t.CreatedAt}, &t.CreatedBy,
			instant{&t.ExpiresAt}, instant{&t.RevokedAt}, &t.Bootstrap, &t.UserPrincipalName, instant{&t.LastUsedAt})
		if err != nil {
			return nil, r.fault("read token "+t.ID.String(), err)
		}
		list = append(list, t)
	}
	return list, nil
}

// Peppers implements admin.Reader.
func (r *reader) Peppers(ctx context.Context) ([]admin.PepperRecord, error) {
	var list []admin.PepperRecord
	for row, err := range r.rows(ctx, "list peppers", `SELECT version, check_value FROM peppers ORDER BY version`) {
		if err != nil {
			return nil, err
		}
		var p admin.PepperRecord
		if err := r.scan("list peppers", row, &p.Version, exactly(p.Check[:])); err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	return list, nil
}

// pepperLeft counts; none means that the version is not known.
func (r *reader) pepperLeft(ctx context.Context, version uint32) (n sql.Null[int], err error) {
	_, err = r.one(ctx, "count what a pepper finds", `SELECT `+left+` FROM peppers p WHERE p.version = ?3`,
		[]any{micros(time.Now()), never, version}, &n)
	return n, err
}

// PepperLeft implements admin.Reader.
func (r *reader) PepperLeft(ctx context.Context, version uint32) (int, error) {
	n, err := r.pepperLeft(ctx, version)
	return n.V, err
}

// QuotaStates implements admin.Store.
func (r *reader) QuotaStates(ctx context.Context, now time.Time, yield func(limits.QuotaState) bool) error {
	for row, err := range r.rows(ctx, "list the states of quotas", `SELECT owner, class, until, counts FROM quota_states WHERE until > ?`, micros(now)) {
		if err != nil {
			return err
		}
		var state limits.QuotaState
		if err := r.scan("list the states of quotas", row, exactly(state.Cell.Owner[:]), &state.Cell.Class, instant{&state.Until}, &state.Counts); err != nil {
			return err
		}
		if !yield(state) {
			return nil
		}
	}
	return nil
}
