package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/limits"
)

// A tx is one transaction on the writing connection.
type tx struct {
	reader
	sql      *sql.Tx
	prepared map[string]*sql.Stmt // batches and imports run few statements many times
	audit    admin.AuditKeys
	revision apikey.Revision // of this transaction
	audited  bool
	last     struct { // what Audit wrote last; nil before it did
		segment *admin.AuditSegment
		event   int64
	}
	// broken is the first outage. SQLite takes the whole transaction back on some of them (an interrupted
	// write, a full disk), and the next statement would run, and stay, outside any transaction: after an
	// outage nothing runs.
	broken error
}

func newTx(sqlTx *sql.Tx, audit admin.AuditKeys, fault func(what string, err error) error) *tx {
	t := &tx{sql: sqlTx, audit: audit, prepared: map[string]*sql.Stmt{}}
	query := func(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
		if t.broken != nil {
			return nil, t.broken
		}
		return sqlTx.QueryContext(ctx, query, args...)
	}
	t.reader = reader{
		query: query,
		find:  func(ctx context.Context, args ...any) (*sql.Rows, error) { return query(ctx, findKey, args...) },
		enter: func() (func(), error) { return func() {}, nil }, // whoever began the transaction is under way
		fault: func(what string, err error) error {
			if t.broken == nil {
				t.broken = fault(what, err)
			}
			return t.broken
		},
	}
	return t
}

// exec runs a statement and returns how many rows it changed. What a constraint refuses did nothing.
func (t *tx) exec(ctx context.Context, what, query string, args ...any) (int64, error) {
	statement, err := t.prepare(ctx, what, query) //nolint:sqlclosecheck // closed with the transaction
	if err != nil {
		return 0, err
	}
	result, err := statement.ExecContext(ctx, args...)
	if err != nil {
		if err := refused(what, err); err != nil {
			return 0, err
		}
		return 0, t.fault(what, err)
	}
	n, err := result.RowsAffected()
	if err != nil {
		return 0, t.fault(what, err)
	}
	return n, nil
}

// prepare returns a statement that is closed with the transaction.
func (t *tx) prepare(ctx context.Context, what, query string) (*sql.Stmt, error) {
	if t.broken != nil {
		return nil, t.broken
	}
	statement := t.prepared[query]
	if statement == nil {
		var err error
		if statement, err = t.sql.PrepareContext(ctx, query); err != nil {
			return nil, t.fault(what, err)
		}
		t.prepared[query] = statement
	}
	return statement, nil
}

// execOne runs a statement that changes exactly the row it names.
func (t *tx) execOne(ctx context.Context, what, query string, args ...any) error {
	n, err := t.exec(ctx, what, query, args...)
	switch {
	case err != nil:
		return err
	case n == 0:
		return notFound(what)
	case n > 1:
		return t.fault(what, fmt.Errorf("%d rows would have changed instead of one", n))
	}
	return nil
}

// begin gives the transaction its revision.
func (t *tx) begin(ctx context.Context) error {
	found, err := t.one(ctx, "new revision", `UPDATE meta SET revision = revision + 1 WHERE one = 1 RETURNING revision`, nil, &t.revision)
	if err == nil && !found {
		err = t.fault("new revision", errors.New("its row is missing"))
	}
	return err
}

// instanceChanged and keyChanged list what a write touched. A key is listed with the digests that find
// it now, so before it loses one and after it gets one.
func (t *tx) instanceChanged(ctx context.Context, id string) error {
	return t.execOne(ctx, "list the change", `INSERT INTO changes (revision, instance_id) VALUES (?, ?)`, t.revision, id)
}

const listChange = `INSERT INTO changes (revision, instance_id, key_id, digest)
	SELECT ?, k.instance_id, k.id, d.digest FROM keys k LEFT JOIN key_digests d ON d.key_id = k.id `

func (t *tx) keyChanged(ctx context.Context, id apikey.ID) error {
	if err := t.execOne(ctx, "key", `UPDATE keys SET revision = ? WHERE id = ?`, t.revision, id[:]); err != nil {
		return err
	}
	_, err := t.exec(ctx, "list the change", listChange+`WHERE k.id = ?`, t.revision, id[:])
	return err
}

// forgetOldest keeps the newest changes. Every transaction drops about as many as it adds.
func (t *tx) forgetOldest(ctx context.Context, keep int64) error {
	var seq int64
	var revision apikey.Revision
	found, err := t.one(ctx, "forget old changes",
		`SELECT seq, revision FROM changes WHERE seq <= (SELECT max(seq) FROM changes) - ? ORDER BY seq DESC LIMIT 1`,
		[]any{keep}, &seq, &revision)
	if err != nil || !found {
		return err
	}
	if err := t.forget(ctx, revision); err != nil {
		return err
	}
	_, err = t.exec(ctx, "forget old changes", `DELETE FROM changes WHERE seq <= ?`, seq)
	return err
}

// forget makes Changes say that it no longer knows all of a revision and those before.
func (t *tx) forget(ctx context.Context, upTo apikey.Revision) error {
	return t.execOne(ctx, "forget old changes", `UPDATE meta SET forgotten = max(forgotten, ?) WHERE one = 1`, upTo)
}

// PutInstance implements admin.Tx.
func (t *tx) PutInstance(ctx context.Context, in *apikey.Instance) error {
	policy, err := text(in.Policy)
	if err != nil {
		return fmt.Errorf("instance %s: policy: %w", in.ID, err)
	}
	quotas, err := text(in.Quotas)
	if err != nil {
		return fmt.Errorf("instance %s: quotas: %w", in.ID, err)
	}
	err = t.execOne(ctx, "put instance", `INSERT INTO instances (id, policy, quotas, created_at, revision) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET policy = excluded.policy, quotas = excluded.quotas, revision = excluded.revision`,
		in.ID, policy, quotas, micros(in.CreatedAt), t.revision)
	if err != nil {
		return err
	}
	return t.instanceChanged(ctx, in.ID)
}

// DeleteInstance implements admin.Tx.
func (t *tx) DeleteInstance(ctx context.Context, id string) error {
	// The keys first: once they are gone nobody knows their digests. Where there is no instance there
	// are no keys either, and nothing is listed.
	if _, err := t.exec(ctx, "list the change", listChange+`WHERE k.instance_id = ?`, t.revision, id); err != nil {
		return err
	}
	// And their counts, or every key would be taken off them one by one.
	if _, err := t.exec(ctx, "count keys", `DELETE FROM key_counts WHERE instance_id = ?`, id); err != nil {
		return err
	}
	if err := t.forgetNumber(ctx, id); err != nil {
		return err
	}
	if err := t.execOne(ctx, "instance", `DELETE FROM instances WHERE id = ?`, id); err != nil { // takes its keys along
		return err
	}
	return t.instanceChanged(ctx, id)
}

// keyDocuments are the columns of a key that hold JSON.
func keyDocuments(k *apikey.Key) (scopes, allowedIPs, limits, quotas, metadata string, err error) {
	var errs [5]error
	scopes, errs[0] = text(k.Scopes)
	allowedIPs, errs[1] = text(k.AllowedIPs)
	limits, errs[2] = text(k.Limits)
	quotas, errs[3] = text(k.Quotas)
	metadata, errs[4] = text(k.Metadata)
	if err := errors.Join(errs[:]...); err != nil {
		return "", "", "", "", "", fmt.Errorf("key %s: %w", k.ID, err)
	}
	return scopes, allowedIPs, limits, quotas, metadata, nil
}

// InsertKey implements admin.Tx.
func (t *tx) InsertKey(ctx context.Context, k *apikey.Key) error {
	scopes, allowedIPs, limits, quotas, metadata, err := keyDocuments(k)
	if err != nil {
		return err
	}
	err = t.execOne(ctx, "insert key", `INSERT INTO keys (id, instance_id, type, name, description, agent_name,
		user_principal_name, environment, scopes, allowed_ips, limits, expires_at, inactivity_days, not_before, metadata,
		disabled, revoked_at, revoked_reason, leak_reported_at, created_at, created_by, last_used_at, last_used_network, last_used_path, idle_from, quotas)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		k.ID[:], k.InstanceID, string(k.Type), k.Name, k.Description, k.AgentName,
		k.UserPrincipalName, k.Environment, scopes, allowedIPs, limits, micros(k.ExpirationDate), k.InactivityDays,
		micros(k.NotBefore), metadata, k.Disabled, micros(k.RevokedAt), string(k.RevokedReason), micros(k.LeakReportedAt),
		micros(k.CreatedAt), k.CreatedBy, micros(k.LastUsedAt), k.LastUsedNetwork, k.LastUsedPath, micros(k.IdleFrom), quotas)
	if err != nil {
		return err
	}
	return t.keyChanged(ctx, k.ID)
}

// UpdateKey implements admin.Tx.
func (t *tx) UpdateKey(ctx context.Context, k *apikey.Key) error {
	scopes, allowedIPs, limits, quotas, metadata, err := keyDocuments(k)
	if err != nil {
		return err
	}
	err = t.execOne(ctx, "update key", `UPDATE keys SET name = ?1, description = ?2, environment = ?3, scopes = ?4, allowed_ips = ?5,
		limits = ?6, expires_at = ?7, inactivity_days = ?8, not_before = ?9, metadata = ?10, disabled = ?11, revoked_at = ?12,
		revoked_reason = ?13, leak_reported_at = ?14, idle_from = ?15, quotas = ?18,
		ended_at = CASE WHEN expires_at = ?7 AND inactivity_days = ?8 THEN ended_at ELSE `+neverSQL+` END
		WHERE id = ?16 AND instance_id = ?17`,
		k.Name, k.Description, k.Environment, scopes, allowedIPs,
		limits, micros(k.ExpirationDate), k.InactivityDays, micros(k.NotBefore), metadata, k.Disabled, micros(k.RevokedAt),
		string(k.RevokedReason), micros(k.LeakReportedAt), micros(k.IdleFrom), k.ID[:], k.InstanceID, quotas)
	if err != nil {
		return err
	}
	return t.keyChanged(ctx, k.ID)
}

// DeleteKey implements admin.Tx.
func (t *tx) DeleteKey(ctx context.Context, instanceID string, id apikey.ID) error {
	// Listed before: once it is gone nobody knows its digests.
	if _, err := t.exec(ctx, "list the change", listChange+`WHERE k.id = ? AND k.instance_id = ?`, t.revision, id[:], instanceID); err != nil {
		return err
	}
	return t.execOne(ctx, "delete key", `DELETE FROM keys WHERE id = ? AND instance_id = ?`, id[:], instanceID)
}

// MarkEnded implements admin.Tx.
func (t *tx) MarkEnded(ctx context.Context, id apikey.ID, at time.Time) error {
	return t.execOne(ctx, "mark key", `UPDATE keys SET ended_at = CASE ended_at WHEN ?1 THEN ?2 ELSE ended_at END WHERE id = ?3`,
		never, micros(at), id[:])
}

// InsertGeneration implements admin.Tx.
func (t *tx) InsertGeneration(ctx context.Context, id apikey.ID, g apikey.Generation, d apikey.Digest, pepperVersion uint32) error {
	// Two rows, all or nothing: the digest is looked up first, and nobody else writes meanwhile.
	if err := t.free(ctx, "insert generation", `SELECT 1 FROM key_digests WHERE digest = ?`, d); err != nil {
		return err
	}
	err := t.execOne(ctx, "insert generation", `INSERT INTO generations (key_id, number, hint, created_at, valid_until, last_used_at, revoked)
		VALUES (?, ?, ?, ?, ?, ?, ?)`,
		id[:], g.Number, g.Hint, micros(g.CreatedAt), micros(g.ValidUntil), micros(g.LastUsedAt), g.Revoked)
	if err != nil {
		return err
	}
	err = t.execOne(ctx, "insert digest", `INSERT INTO key_digests (digest, key_id, generation, pepper_version) VALUES (?, ?, ?, ?)`,
		d[:], id[:], g.Number, pepperVersion)
	if err != nil {
		return err
	}
	return t.keyChanged(ctx, id)
}

// EndGeneration implements admin.Tx.
func (t *tx) EndGeneration(ctx context.Context, id apikey.ID, number int, validUntil time.Time, revoked bool) error {
	err := t.execOne(ctx, "end generation", `UPDATE generations SET valid_until = ?, revoked = ? WHERE key_id = ? AND number = ?`,
		micros(validUntil), revoked, id[:], number)
	if err != nil {
		return err
	}
	return t.keyChanged(ctx, id)
}

// free refuses a digest that is taken.
func (t *tx) free(ctx context.Context, what, query string, d apikey.Digest) error {
	var one int
	taken, err := t.one(ctx, what, query, []any{d[:]}, &one)
	if err == nil && taken {
		err = fmt.Errorf("%s: %w", what, apikey.ErrConflict)
	}
	return err
}

// InsertToken implements admin.Tx.
func (t *tx) InsertToken(ctx context.Context, token *admin.Token, d apikey.Digest, pepperVersion uint32) error {
	if err := t.free(ctx, "insert token", `SELECT 1 FROM token_digests WHERE digest = ?`, d); err != nil {
		return err
	}
	err := t.execOne(ctx, "insert token", `INSERT INTO tokens (id, name, role, instance_id, hint, created_at, created_by,
		expires_at, revoked_at, bootstrap, user_principal_name, last_used_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		token.ID[:], token.Name, string(token.Role), token.InstanceID, token.Hint, micros(token.CreatedAt), token.CreatedBy,
		micros(token.ExpiresAt), micros(token.RevokedAt), token.Bootstrap, token.UserPrincipalName, micros(token.LastUsedAt))
	if err != nil {
		return err
	}
	return t.execOne(ctx, "insert digest", `INSERT INTO token_digests (digest, token_id, pepper_version) VALUES (?, ?, ?)`,
		d[:], token.ID[:], pepperVersion)
}

// RevokeToken implements admin.Tx.
func (t *tx) RevokeToken(ctx context.Context, id apikey.ID, at time.Time) error {
	return t.execOne(ctx, "token", `UPDATE tokens SET revoked_at = CASE revoked_at WHEN ?1 THEN ?2 ELSE revoked_at END WHERE id = ?3`,
		never, micros(at), id[:])
}

// PutPepper implements admin.Tx.
func (t *tx) PutPepper(ctx context.Context, version uint32, check [16]byte) error {
	n, err := t.exec(ctx, "put pepper", `INSERT INTO peppers (version, check_value) VALUES (?1, ?2)
		ON CONFLICT (version) DO UPDATE SET check_value = check_value WHERE check_value = excluded.check_value`, version, check[:])
	if err == nil && n == 0 {
		err = fmt.Errorf("pepper version %d is known with another check value: %w", version, apikey.ErrConflict)
	}
	return err
}

// RetirePepper implements admin.Tx.
func (t *tx) RetirePepper(ctx context.Context, version uint32) error {
	what := fmt.Sprintf("pepper version %d", version)
	n, err := t.pepperLeft(ctx, version)
	switch {
	case err != nil:
		return err
	case !n.Valid:
		return notFound(what)
	case n.V > 0:
		return fmt.Errorf("%s is the only one to find %d usable secrets: %w", what, n.V, apikey.ErrConflict)
	}
	for _, statement := range []string{
		`DELETE FROM key_digests WHERE pepper_version = ?`,
		`DELETE FROM token_digests WHERE pepper_version = ?`,
		`DELETE FROM peppers WHERE version = ?`,
	} {
		if _, err := t.exec(ctx, "retire pepper", statement, version); err != nil {
			return err
		}
	}
	return t.forget(ctx, t.revision)
}

// Mark implements admin.Tx.
func (t *tx) Mark(ctx context.Context, name string) (first bool, err error) {
	n, err := t.exec(ctx, "mark", `INSERT INTO marks (name) VALUES (?) ON CONFLICT DO NOTHING`, name)
	return n == 1, err
}

// touch records one use.
func (t *tx) touch(ctx context.Context, use apikey.Use) error {
	at := micros(use.At)
	// A use takes back the mark of a key that was held for over: for idle, before the use was written down, or
	// by a clock that was ahead for a while. What is over by its date now stays marked.
	_, err := t.exec(ctx, "record use", `UPDATE keys SET last_used_at = ?1, last_used_network = ?4, last_used_path = ?5,
		ended_at = CASE WHEN expiry >= ?3 AND (inactivity_days = 0 OR ?1 + inactivity_days * 86400000000 >= ?3) THEN `+neverSQL+` ELSE ended_at END
		WHERE id = ?2 AND last_used_at < ?1`, at, use.KeyID[:], micros(time.Now()), use.Network, use.Path)
	if err != nil {
		return err
	}
	_, err = t.exec(ctx, "record use", `UPDATE generations SET last_used_at = ?1 WHERE key_id = ?2 AND number = ?3 AND last_used_at < ?1`,
		at, use.KeyID[:], use.Generation)
	return err
}

// redigest adds a digest beside the old one, if that is still there, older, and has none of that version
// beside it yet. Nothing else is a conflict: a batch may come twice.
func (t *tx) redigest(ctx context.Context, r admin.Redigest) error {
	for _, statement := range []string{
		`INSERT INTO key_digests (digest, key_id, generation, pepper_version)
			SELECT ?1, key_id, generation, ?2 FROM key_digests WHERE digest = ?3 AND pepper_version < ?2 ON CONFLICT DO NOTHING`,
		`INSERT INTO token_digests (digest, token_id, pepper_version)
			SELECT ?1, token_id, ?2 FROM token_digests WHERE digest = ?3 AND pepper_version < ?2 ON CONFLICT DO NOTHING`,
	} {
		if _, err := t.exec(ctx, "redigest", statement, r.New[:], r.Version, r.Old[:]); err != nil {
			return err
		}
	}
	return nil
}

// saveQuotaState keeps a state in place of an older one of its cell.
func (t *tx) saveQuotaState(ctx context.Context, state *limits.QuotaState) error {
	return t.execOne(ctx, "save a quota's state", `INSERT INTO quota_states (owner, class, until, counts) VALUES (?, ?, ?, ?)
		ON CONFLICT (owner, class) DO UPDATE SET until = excluded.until, counts = excluded.counts`,
		state.Cell.Owner[:], state.Cell.Class, micros(state.Until), state.Counts)
}
