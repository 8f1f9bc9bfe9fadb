package sqlite

import (
	"context"
	"database/sql"
	"time"
)

// numberOf returns the number under which counts and alerts of an instance are kept, and when the instance was made;
// false if there is none. "" stands for what belongs to no instance.
func (t *tx) numberOf(ctx context.Context, instanceID string) (number int64, made time.Time, there bool, err error) {
	const what = "number of an instance"
	if instanceID == "" {
		return 0, time.Time{}, true, nil
	}
	var known sql.NullInt64
	there, err = t.one(ctx, what, `SELECT i.created_at, n.number FROM instances i LEFT JOIN instance_numbers n ON n.instance_id = i.id WHERE i.id = ?`,
		[]any{instanceID}, instant{&made}, &known)
	if err != nil || !there || known.Valid {
		return known.Int64, made, there, err
	}
	_, err = t.one(ctx, what, `INSERT INTO instance_numbers (instance_id) VALUES (?) RETURNING number`, []any{instanceID}, &number)
	return number, made, true, err
}

// forgetNumber hides what is kept under an instance's number from every reader; ForgetDeleted removes it.
func (t *tx) forgetNumber(ctx context.Context, instanceID string) error {
	_, err := t.exec(ctx, "instance", `UPDATE instance_numbers SET instance_id = NULL WHERE instance_id = ?`, instanceID)
	return err
}

// ForgetDeleted implements admin.Store.
func (s *Store) ForgetDeleted(ctx context.Context) error {
	const what = "remove what is left of deleted instances"
	for {
		var number int64
		var left bool
		// A number goes last, so that it is not given to another instance while there are rows under it.
		err := s.write(ctx, what, func(t *tx) (err error) {
			left, err = t.one(ctx, what, `SELECT number FROM instance_numbers WHERE instance_id IS NULL LIMIT 1`, nil, &number)
			if err != nil || !left {
				return err
			}
			for _, statement := range []string{
				`DELETE FROM usage WHERE (instance, key_id, interval, start) IN (SELECT instance, key_id, interval, start FROM usage WHERE instance = ? LIMIT ?)`,
				`DELETE FROM alerts WHERE id IN (SELECT id FROM alerts WHERE instance = ? LIMIT ?)`,
			} {
				if n, err := t.exec(ctx, what, statement, number, batch); err != nil || n == batch {
					return err
				}
			}
			_, err = t.exec(ctx, what, `DELETE FROM instance_numbers WHERE number = ?`, number)
			return err
		})
		if err != nil || !left {
			return err
		}
	}
}
