package sqlite_test

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
)

// BenchmarkAddUsage adds the counts of a hundred keys, to rows that are there already: what keeps others from
// writing meanwhile.
func BenchmarkAddUsage(b *testing.B) {
	s, err := sqlite.Open(b.Context(), sqlite.Config{Path: filepath.Join(b.TempDir(), "keyward.db")})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if _, err := s.Update(b.Context(), func(tx admin.Tx) error {
		return errors.Join(tx.PutInstance(b.Context(), &apikey.Instance{ID: "demo"}), tx.Audit(b.Context(), admin.Event{}))
	}); err != nil {
		b.Fatal(err)
	}
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	var counts []admin.Usage
	for i := range 10_000 {
		counts = append(counts, admin.Usage{InstanceID: "demo", KeyID: apikey.ID{1, 14: byte(i >> 8), 15: byte(i)}, Start: start, UsageCounts: admin.UsageCounts{
			Allowed: 5, Refused: 1, Reasons: map[string]int64{"limit_burst": 1}, Generations: map[int]int64{1: 5}, Networks: map[string]int64{"192.0.2.0/24": 5},
		}})
	}
	if err := s.AddUsage(b.Context(), admin.UsageBatch{}, counts); err != nil {
		b.Fatal(err)
	}
	n := 0
	for b.Loop() {
		at := n % len(counts)
		if err := s.AddUsage(b.Context(), admin.UsageBatch{Writer: apikey.ID{1}, Number: int64(n + 1)}, counts[at:at+100]); err != nil {
			b.Fatal(err)
		}
		n += 100
	}
}
