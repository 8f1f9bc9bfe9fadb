package sqlite

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"
)

// micros is how times are kept: microseconds since 1970, UTC. The zero time is kept as what it is, the
// year 1, and needs no special case in either direction.
func micros(t time.Time) int64 { return t.UnixMicro() }

// never is the zero time, for statements that ask for it; neverSQL is the same in their text, where the
// condition of an index asks for it word for word. forever is what the columns that order lists have for it.
var never = micros(time.Time{})

const (
	neverSQL = "-62135596800000000"
	forever  = math.MaxInt64
)

// An instant reads a time.
type instant struct{ to *time.Time }

func (i instant) Scan(from any) error {
	v, ok := from.(int64)
	if !ok {
		return errors.New("not a time in microseconds")
	}
	*i.to = time.UnixMicro(v).UTC()
	return nil
}

// orNever reads an instant of which the largest number means that there is none.
type orNever struct{ to *time.Time }

func (i orNever) Scan(from any) error {
	if v, ok := from.(int64); ok && v == forever {
		*i.to = time.Time{}
		return nil
	}
	return instant(i).Scan(from)
}

// exactly reads a BLOB that has the length of the slice: an id or a digest.
type exactly []byte

func (to exactly) Scan(from any) error {
	b, ok := from.([]byte)
	if !ok || len(b) != len(to) {
		return fmt.Errorf("not %d bytes", len(to)) // without the bytes: they may be a digest
	}
	copy(to, b)
	return nil
}

// A document reads JSON.
type document struct{ to any }

func (d document) Scan(from any) error {
	s, ok := from.(string)
	if !ok {
		return errors.New("not JSON")
	}
	return json.Unmarshal([]byte(s), d.to)
}

// text writes JSON.
func text(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}

// raw passes JSON through, and nil as NULL.
func raw(m json.RawMessage) sql.NullString { return sql.NullString{String: string(m), Valid: m != nil} }
