package local
import ("testing";"keyward/limits")
func leased(i uint64) *limits.Demand {
	d := &limits.Demand{}
	d.Lease = limits.LeaseDemand{Limit: 10, Connection: 1, Lease: limits.Lease{Cell: cellOf(i, limits.ClassConcurrency), HTTP: i}}
	d.Lease.Lease.Identity = limits.Identity{Port: 1, Start: int64(i) + 1<<61}
	return d
}
func BenchmarkPair(b *testing.B) {
	b.ReportAllocs()
	l := New(Config{}, nil)
	d := leased(1)
	ends := make([]limits.Ending, 1)
	ctx := b.Context()
	for b.Loop() {
		d.Lease.Lease.Identity.Start++
		if dd, ok := l.TryTake(d); !ok || !dd.Allowed { b.Fatal(dd, ok) }
		ends[0] = limits.Ending{Lease: d.Lease.Lease, Cause: limits.CauseLog}
		l.End(ctx, ends)
	}
}
func BenchmarkPairM(b *testing.B) {
	b.ReportAllocs()
	l := New(Config{}, nil)
	for i := range uint64(1_000_000) {
		l.TryTake(leased(i/8+2))
		d := leased(i/8+2); d.Lease.Lease.HTTP = 10+i; d.Lease.Lease.Identity.Port= uint16(i%8+2)
		if dd, ok := l.TryTake(d); !ok || !dd.Allowed { b.Fatal(dd, ok) }
	}
	d := leased(1)
	ends := make([]limits.Ending, 1)
	ctx := b.Context()
	for b.Loop() {
		d.Lease.Lease.Identity.Start++
		d.Lease.Lease.Cell.Owner[3]++
		if dd, ok := l.TryTake(d); !ok || !dd.Allowed { b.Fatal(dd, ok) }
		ends[0] = limits.Ending{Lease: d.Lease.Lease, Cause: limits.CauseLog}
		l.End(ctx, ends)
	}
}
