package local

import (
	"testing"
	"time"

	"keyward/limits"
)

// threeQuotas are those of a usual request: over everybody, of its principal and of its key.
func threeQuotas(key uint64, q limits.Quota) []limits.QuotaDemand {
	return []limits.QuotaDemand{
		{Cell: cellOf(1, limits.ClassGlobalQuota), Quota: q, Cost: 1},
		{Cell: cellOf(key%1000, limits.ClassPrincipalQuota), Quota: q, Cost: 1},
		{Cell: cellOf(key, limits.ClassKeyQuota), Quota: q, Cost: 1},
	}
}

// What three quotas cost beside the rates of a usual request: none, exact windows that let one of many pass,
// windows in hundredths, and a calendar.
func BenchmarkTryTakeQuotas(b *testing.B) {
	for _, tt := range []struct {
		name  string
		quota limits.Quota
	}{
		{"none", limits.Quota{}},
		{"exact", limits.Quota{Limit: 1000, Window: time.Millisecond}},
		{"coarse", limits.Quota{Limit: 1_000_000_000, Window: time.Hour}},
		{"calendar", limits.Quota{Limit: 1 << 50, Period: limits.Month}},
		{"refused", limits.Quota{Limit: 1000, Window: 24 * time.Hour}},
	} {
		b.Run(tt.name, func(b *testing.B) {
			b.ReportAllocs()
			l, d := New(Config{}, nil), usual(7)
			d.Quotas = threeQuotas(7, tt.quota)
			for b.Loop() {
				l.TryTake(d)
			}
		})
	}
}
