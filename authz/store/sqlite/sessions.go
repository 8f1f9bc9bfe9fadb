package sqlite

import (
	"context"
	"time"

	"keyward/authz/admin"
)

// PutSession implements admin.Store.
func (s *Store) PutSession(ctx context.Context, session *admin.Session) error {
	return s.write(ctx, "keep a session", func(t *tx) error {
		subject, err := text(session.Subject)
		if err != nil {
			return t.fault("keep a session", err)
		}
		return t.execOne(ctx, "keep a session", `INSERT INTO sessions (id, created_at, seen_at, ends_at, idle_at, token, subject) VALUES (?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT DO UPDATE SET created_at = excluded.created_at, seen_at = excluded.seen_at, ends_at = excluded.ends_at,
				idle_at = excluded.idle_at, token = excluded.token, subject = excluded.subject`,
			session.ID[:], micros(session.CreatedAt), micros(session.SeenAt), micros(session.EndsAt), micros(session.IdleAt), session.Token[:], subject)
	})
}

// Session implements admin.Reader.
func (r *reader) Session(ctx context.Context, id admin.SessionID) (*admin.Session, error) {
	s := &admin.Session{ID: id}
	found, err := r.one(ctx, "read a session", `SELECT created_at, seen_at, ends_at, idle_at, token, subject FROM sessions WHERE id = ?`, []any{id[:]},
		instant{&s.CreatedAt}, instant{&s.SeenAt}, instant{&s.EndsAt}, instant{&s.IdleAt}, exactly(s.Token[:]), document{&s.Subject})
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, notFound("session")
	}
	return s, nil
}

// TouchSession implements admin.Store.
func (s *Store) TouchSession(ctx context.Context, id admin.SessionID, seen, idle time.Time) error {
	return s.write(ctx, "note the use of a session", func(t *tx) error {
		_, err := t.exec(ctx, "note the use of a session", `UPDATE sessions SET seen_at = max(seen_at, ?), idle_at = max(idle_at, ?) WHERE id = ?`,
			micros(seen), micros(idle), id[:])
		return err
	})
}

// EndSession implements admin.Store.
func (s *Store) EndSession(ctx context.Context, id admin.SessionID) error {
	return s.write(ctx, "end a session", func(t *tx) error {
		_, err := t.exec(ctx, "end a session", `DELETE FROM sessions WHERE id = ?`, id[:])
		return err
	})
}

// EndSessions implements admin.Tx.
func (t *tx) EndSessions(ctx context.Context, name string) (int, error) {
	n, err := t.exec(ctx, "end sessions", `DELETE FROM sessions WHERE ?1 = '' OR subject ->> '$.name' = ?1`, name)
	return int(n), err
}

// ForgetSessions implements admin.Store.
func (s *Store) ForgetSessions(ctx context.Context, now time.Time) error {
	return s.write(ctx, "forget sessions", func(t *tx) error {
		_, err := t.exec(ctx, "forget sessions", `DELETE FROM sessions WHERE idle_at <= ?1 OR ends_at <= ?1`, micros(now))
		return err
	})
}
