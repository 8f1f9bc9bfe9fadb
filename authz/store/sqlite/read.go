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
)

// A reader answers admin.Reader from a pool of connections or from a transaction. Every answer comes
// from one statement, hence from one snapshot.
type reader struct {
	query func(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	find  func(ctx context.Context, args ...any) (*sql.Rows, error) // findKey
	enter func() (leave func(), err error)
	fault func(what string, err error) error
}

// The statements whose plans a test looks at.
const (
	keyColumns = `k.id, k.instance_id, k.type, k.name, k.description, k.agent_name, k.user_principal_name, k.environment,
	k.scopes, k.allowed_ips, k.limits, k.expires_at, k.inactivity_days, k.not_before, k.metadata, k.disabled,
	k.revoked_at, k.revoked_reason, k.created_at, k.created_by, k.last_used_at,
	g.number, g.hint, g.created_at, g.valid_until, g.last_used_at`

	findKey = `SELECT (SELECT revision FROM meta WHERE one = 1), d.generation, ` + keyColumns + `
	FROM key_digests d JOIN keys k ON k.id = d.key_id JOIN generations g ON g.key_id = k.id
	WHERE d.digest = ? ORDER BY g.number`

	missKey = `SELECT revision, EXISTS (SELECT 1 FROM key_digests WHERE digest = ?) FROM meta WHERE one = 1`

	oneKey = `SELECT ` + keyColumns + ` FROM keys k LEFT JOIN generations g ON g.key_id = k.id
	WHERE k.id = ? AND k.instance_id = ? ORDER BY g.number`

	listKeys = `SELECT ` + keyColumns + `
	FROM (SELECT * FROM keys WHERE instance_id = ? AND (created_at, id) < (?, ?)
		ORDER BY created_at DESC, id DESC LIMIT ?) k
	LEFT JOIN generations g ON g.key_id = k.id
	ORDER BY k.created_at DESC, k.id DESC, g.number`

	listChanges = `SELECT m.revision, m.forgotten, c.revision, c.instance_id, c.key_id, c.digest
	FROM meta m LEFT JOIN changes c ON c.revision > ?1 AND ?1 BETWEEN m.forgotten AND m.revision
	WHERE m.one = 1 ORDER BY c.revision, c.seq`

	listDigests = `SELECT m.revision, d.digest FROM meta m LEFT JOIN key_digests d WHERE m.one = 1`

	tokenColumns = `t.id, t.name, t.role, t.instance_id, t.hint, t.created_at, t.created_by, t.expires_at, t.revoked_at, t.bootstrap, t.user_principal_name, t.last_used_at` //nolint:gosec // G101: names of columns

	oneToken = `SELECT ` + tokenColumns + ` FROM token_digests d JOIN tokens t ON t.id = d.token_id WHERE d.digest = ?`

	listPeppers = `SELECT p.version, p.check_value, ` + left + ` FROM peppers p ORDER BY p.version`

	// left counts what only the version p.version finds and could still be used at ?1.
	left = `(
	SELECT count(*) FROM key_digests d
	JOIN generations g ON g.key_id = d.key_id AND g.number = d.generation
	JOIN keys k ON k.id = d.key_id
	WHERE d.pepper_version = p.version AND k.revoked_at = ?2
		AND (k.expires_at = ?2 OR k.expires_at >= ?1) AND (g.valid_until = ?2 OR g.valid_until >= ?1)
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
	found, err := r.one(ctx, "read instance "+id, `SELECT policy, created_at, revision FROM instances WHERE id = ?`,
		[]any{id}, document{&in.Policy}, instant{&in.CreatedAt}, &in.Revision)
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
	for row, err := range r.rows(ctx, "list instances", `SELECT id, policy, created_at, revision FROM instances ORDER BY id`) {
		if err != nil {
			return nil, err
		}
		in := &apikey.Instance{}
		if err := row.Scan(&in.ID, document{&in.Policy}, instant{&in.CreatedAt}, &in.Revision); err != nil {
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
func (r *reader) Keys(ctx context.Context, instanceID string, after admin.KeyPlace, limit int) ([]*apikey.Key, error) {
	createdAt := micros(after.CreatedAt)
	if after.CreatedAt.IsZero() && after.ID.IsZero() {
		createdAt = math.MaxInt64 // above every place
	}
	return r.keys(r.rows(ctx, "list keys", listKeys, instanceID, createdAt, after.ID[:], max(limit, 0)))
}

// keys reads rows of keyColumns, in which the generations of a key follow each other. lead are columns
// before those.
func (r *reader) keys(rows iter.Seq2[*sql.Rows, error], lead ...any) ([]*apikey.Key, error) {
	var list []*apikey.Key
	for row, err := range rows {
		if err != nil {
			return nil, err
		}
		k := &apikey.Key{}
		var number, createdAt, validUntil, lastUsedAt sql.Null[int64]
		var hint sql.Null[string]
		err := row.Scan(append(slices.Clip(lead),
			exactly(k.ID[:]), &k.InstanceID, &k.Type, &k.Name, &k.Description, &k.AgentName, &k.UserPrincipalName, &k.Environment,
			document{&k.Scopes}, document{&k.AllowedIPs}, document{&k.Limits}, instant{&k.ExpirationDate}, &k.InactivityDays,
			instant{&k.NotBefore}, document{&k.Metadata}, &k.Disabled,
			instant{&k.RevokedAt}, &k.RevokedReason, instant{&k.CreatedAt}, &k.CreatedBy, instant{&k.LastUsedAt},
			&number, &hint, &createdAt, &validUntil, &lastUsedAt)...)
		if err != nil {
			return nil, r.fault("read key "+k.ID.String(), err)
		}
		if n := len(list); n > 0 && list[n-1].ID == k.ID {
			k = list[n-1]
		} else {
			list = append(list, k)
		}
		if number.Valid {
			k.Generations = append(k.Generations, apikey.Generation{
				Number:     int(number.V),
				Hint:       hint.V,
				CreatedAt:  time.UnixMicro(createdAt.V).UTC(),
				ValidUntil: time.UnixMicro(validUntil.V).UTC(),
				LastUsedAt: time.UnixMicro(lastUsedAt.V).UTC(),
			})
		}
	}
	return list, nil
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
	for row, err := range r.rows(ctx, "list peppers", listPeppers, micros(time.Now()), never) {
		if err != nil {
			return nil, err
		}
		var p admin.PepperRecord
		if err := r.scan("list peppers", row, &p.Version, exactly(p.Check[:]), &p.Left); err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	return list, nil
}
