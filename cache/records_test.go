package cache

import (
	"runtime"
	"testing"

	"keyward/authz/apikey"
)

func testRecords(t testing.TB, size, unknown int) *records {
	t.Helper()
	r, err := newRecords(size, unknown, newMetrics())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	return r
}

func found(d apikey.Digest) *apikey.Key { return &apikey.Key{Digest: d} }

func TestFilledRecordIsReadableAtOnce(t *testing.T) {
	r := testRecords(t, 1000, 10)
	for n := range 1000 {
		d := digest(n)
		k := found(d)
		r.fill(&d, k, r.generation(&d))
		if got, _ := r.get(&d); got != k {
			t.Fatalf("record %d is not there", n)
		}
	}
}

func TestRecordOfAnEarlierGenerationIsNoHit(t *testing.T) {
	r := testRecords(t, 10, 10)
	d, gone := digest(1), sharing(digest(1), 8)
	copy(gone[30:], d[30:]) // same stripe
	r.fill(&d, found(d), 0)
	r.fill(&gone, nil, 0)
	if k, generation := r.get(&d); k == nil || !r.lacks(&gone, generation) {
		t.Fatal("not kept")
	}
	r.stripeOf(&d).generation++ // and no Del
	k, generation := r.get(&d)
	if k != nil {
		t.Error("a record from before the invalidation is still served")
	}
	if r.lacks(&gone, generation) {
		t.Error("a digest is still said to find nothing")
	}
}

func TestAnswerFromBeforeAnInvalidationIsNotKept(t *testing.T) {
	r := testRecords(t, 10, 10)
	d := digest(1)
	before := r.generation(&d)
	r.invalidate(&d)
	if r.fill(&d, found(d), before) || r.fill(&d, nil, before) {
		t.Error("a fill from before the invalidation was taken")
	}
	now := found(d)
	if !r.fill(&d, now, r.generation(&d)) {
		t.Fatal("a fill was refused")
	}
	if r.fill(&d, found(d), before) {
		t.Error("a fill from before the invalidation was taken")
	}
	if k, _ := r.get(&d); k != now {
		t.Error("an old answer replaced a new one")
	}
	if r.unknown.Len() != 0 {
		t.Error("an old answer is remembered")
	}
}

// Of two Sets of a new key in its queue ristretto keeps the first.
func TestNewRecordBehindAnOldOneIsReadable(t *testing.T) {
	r := testRecords(t, 10_000, 10)
	for n := range 5000 {
		d := digest(n)
		r.keys.Set(d[:16], record{found(d), r.generation(&d)}, 1)
		r.stripeOf(&d).generation++
		now := found(d)
		r.fill(&d, now, r.generation(&d))
		if k, _ := r.get(&d); k != now {
			t.Fatalf("record %d is hidden by an older one", n)
		}
	}
}

func TestDigestsThatAgreeInPartAreDifferentKeys(t *testing.T) {
	r := testRecords(t, 100, 10)
	for _, n := range []int{8, 16, 24, 31} {
		d, other := digest(n), sharing(digest(n), n)
		r.fill(&d, found(d), r.generation(&d))
		if k, _ := r.get(&other); k != nil {
			t.Errorf("%d bytes agree: one digest finds the other's key", n)
		}
		r.fill(&other, found(other), r.generation(&other))
		for _, d := range []apikey.Digest{d, other} { // one of them may not be kept
			if k, _ := r.get(&d); k != nil && k.Digest != d {
				t.Errorf("%d bytes agree: one digest finds the other's key", n)
			}
		}
	}
}

func TestInvalidateAllSparesNothing(t *testing.T) {
	r := testRecords(t, 1000, 1000)
	for n := range 1000 {
		d := digest(n)
		if n%2 == 0 {
			r.fill(&d, found(d), r.generation(&d))
		} else {
			r.fill(&d, nil, r.generation(&d))
		}
	}
	r.invalidateAll()
	for n := range 1000 {
		d := digest(n)
		if k, generation := r.get(&d); k != nil || r.lacks(&d, generation) {
			t.Fatalf("digest %d survived", n)
		}
	}
}

func TestInvalidateTouchesNoOtherStripe(t *testing.T) {
	r := testRecords(t, 1000, 10)
	a, b := digest(1), digest(2)
	r.fill(&a, found(a), r.generation(&a))
	r.fill(&b, found(b), r.generation(&b))
	r.invalidate(&a)
	if k, _ := r.get(&b); k == nil {
		t.Error("another key was invalidated as well")
	}
}

func TestRecordsAreBounded(t *testing.T) {
	const size = 200
	r := testRecords(t, size, 50)
	held := func(n int) (held int) {
		for i := range n {
			d := digest(i)
			if k, _ := r.get(&d); k != nil {
				held++
			}
		}
		return held
	}
	for n := range 20 * size {
		d := digest(n)
		r.fill(&d, found(d), r.generation(&d))
		if n == size-1 {
			if got := held(size); got != size { // fewer if ristretto counted its own bytes
				t.Fatalf("%d records are kept, want %d", got, size)
			}
		}
		d = digest(-1 - n)
		r.fill(&d, nil, r.generation(&d))
	}
	if got := held(20 * size); got == 0 || got > size {
		t.Errorf("%d records are kept, want 1 to %d", got, size)
	}
	if got := r.unknown.Len(); got != 50 {
		t.Errorf("%d unknown digests are kept, want 50", got)
	}
}

// ristretto may panic in a Get while it closes.
func TestCloseWaitsForLookups(t *testing.T) {
	r, err := newRecords(10, 10, newMetrics())
	if err != nil {
		t.Fatal(err)
	}
	d := digest(1)
	lookup := r.stripeOf(&d)
	lookup.mu.RLock()
	closed := make(chan struct{})
	go func() { r.close(); close(closed) }()
	for range 10_000 {
		runtime.Gosched()
	}
	select {
	case <-closed:
		t.Error("closed under a look-up")
	default:
	}
	lookup.mu.RUnlock()
	<-closed
	if k, _ := r.get(&d); k != nil {
		t.Error("found something after the end")
	}
}
