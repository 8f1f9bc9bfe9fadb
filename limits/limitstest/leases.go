package limitstest

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// What every leaser promises, whatever its configuration.
const (
	adoptFor     = 45 * time.Second       // how long leases of older requests are adopted
	skew         = 5 * time.Second        // how much later than the process an older request may have begun
	goneFor      = time.Second            // how long nothing is granted to an identity that ended
	answerBefore = 20 * time.Millisecond  // how long before its deadline a wait ends
	retryHint    = time.Second            // of whoever is refused because too many run
	queueBound   = 64                     // waiters of one cell
	waitingBound = 4096                   // waiters in all
	aWhile       = 100 * time.Millisecond // of no meaning
)

// A LeaseSubject is a leaser to be tested. No other test may use its state at the same time.
type LeaseSubject struct {
	Leaser limits.Leaser
	// Started is when the leaser's process began. It must be new: the suite is over with what it tries
	// of a process's first 45 seconds before they are.
	Started time.Time
	// TTL is how long a lease lives that nobody renews, OrphanTTL how long it lives after its connection.
	// Both are multiples of a millisecond, OrphanTTL the shorter by a second at least.
	TTL, OrphanTTL time.Duration
	// Advance moves the leaser's clock on, and the time by which contexts and waits end. In a bubble:
	// time.Sleep.
	Advance func(time.Duration)
	// Settle returns when everybody who waits has had what is due. In a bubble: synctest.Wait.
	Settle func()
}

// RunLeasesInBubble holds the subjects that open returns to the contract of [limits.Leaser], a fresh one
// for each case. Every case and its call of open are in a testing/synctest bubble of their own.
// [RunInBubble] has the rest of the contract: that of [limits.Limiter].
func RunLeasesInBubble(t *testing.T, open func(t *testing.T) LeaseSubject) {
	for _, c := range leaseCases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { newCrowd(t, open(t)).try(c.run) })
		})
	}
}

// The cases, the plainest first: where several fail, the first says most.
var leaseCases = []struct {
	name string
	run  func(t failer, s *crowd)
}{
	{"LimitThenRefusal", limitThenRefusal},
	{"NoLimitNoLease", noLimitNoLease},
	{"LostEndIsOverInTime", lostEndIsOverInTime},
	{"EndTwiceOrOfNothing", endTwiceOrOfNothing},
	{"EndIsOfOneLease", endIsOfOneLease},
	{"SameLeaseSpendsNothing", sameLeaseSpendsNothing},
	{"SameLeaseLivesOn", sameLeaseLivesOn},
	{"RefusalTakesNothing", refusalTakesNothing},
	{"LongestWaitWithLeases", longestWaitWithLeases},
	{"LeaseAndRateShareNoCell", leaseAndRateShareNoCell},
	{"RenewedLivesOn", renewedLivesOn},
	{"UnknownRenewalIsDropped", unknownRenewalIsDropped},
	{"ExpiredIsAdopted", expiredIsAdopted},
	{"EndedIsNotAdopted", endedIsNotAdopted},
	{"OlderRequestIsAdopted", olderRequestIsAdopted},
	{"EarlyEndBeatsRenewal", earlyEndBeatsRenewal},
	{"EndOfIdentityEndsAll", endOfIdentityEndsAll},
	{"NothingIsGrantedToTheGone", nothingIsGrantedToTheGone},
	{"NoIdentityNoEndOfAll", noIdentityNoEndOfAll},
	{"OrphansEndSoon", orphansEndSoon},
	{"RunningIsListed", runningIsListed},
	{"WaitForAnEnd", waitForAnEnd},
	{"WaitEndsInRefusal", waitEndsInRefusal},
	{"WaitForExpiry", waitForExpiry},
	{"WaitForOrphans", waitForOrphans},
	{"FirstComeFirstServed", firstComeFirstServed},
	{"NobodyOvertakes", nobodyOvertakes},
	{"GoneWaiterIsSkipped", goneWaiterIsSkipped},
	{"PanicLosesNoTurn", panicLosesNoTurn},
	{"WaitHoldsNothing", waitHoldsNothing},
	{"TurnRefusedByRatePassesOn", turnRefusedByRatePassesOn},
	{"WaitOnlyWhereNothingElseRefuses", waitOnlyWhereNothingElseRefuses},
	{"SameLeaseWaitsTwice", sameLeaseWaitsTwice},
	{"EndedWaiterGetsNothing", endedWaiterGetsNothing},
	{"QuotasAreSpentWithTheLease", quotasAreSpentWithTheLease},
	{"TurnRefusedByQuotaPassesOn", turnRefusedByQuotaPassesOn},
	{"LongestWaitWithQuotas", longestWaitWithQuotas},
	{"ShadowGrantsAboveTheLimit", shadowGrantsAboveTheLimit},
	{"LookAtLeases", lookAtLeases},
	{"RaisedLimitWakes", raisedLimitWakes},
	{"LoweredLimitGrantsNone", loweredLimitGrantsNone},
	{"QueuesAreBounded", queuesAreBounded},
	{"Histories", func(t failer, s *crowd) { histories(t, 100, func() *crowd { return s }) }},
	{"Throng", throng},
}

// A crowd is a subject with what the cases say over and over.
type crowd struct {
	LeaseSubject
	t       failer
	cells   uint64
	asked   uint64
	takes   atomic.Uint64
	started []*waiting
}

func newCrowd(t failer, s LeaseSubject) *crowd {
	if s.Advance == nil {
		s.Advance = time.Sleep
	}
	if s.Settle == nil {
		s.Settle = synctest.Wait
	}
	return &crowd{LeaseSubject: s, t: t}
}

// try runs a case, and lets nobody wait on after it.
func (s *crowd) try(run func(failer, *crowd)) {
	defer s.disperse()
	run(s.t, s)
}

func (s *crowd) disperse() {
	for _, w := range s.started {
		w.cancel()
	}
	s.started = nil
	s.Settle()
}

// cell returns a cell that nobody has used.
func (s *crowd) cell(class limits.Class) limits.Cell {
	s.cells++
	c := limits.Cell{Class: class}
	binary.LittleEndian.PutUint64(c.Owner[3:], s.cells)
	return c
}

// lease returns a lease of a request that nobody has seen, and that is too young to be adopted.
func (s *crowd) lease(c limits.Cell) limits.Lease {
	s.asked++
	return limits.Lease{
		Cell: c,
		HTTP: s.asked,
		Identity: limits.Identity{
			Peer:  [16]byte{10: 0xff, 11: 0xff, 12: 192, 13: 0, 14: 2, 15: byte(s.asked)},
			Port:  uint16(1 + s.asked%50_000),
			Start: s.Started.Add(time.Hour).UnixMicro() + int64(s.asked),
		},
	}
}

// asking is a demand for a lease that does not wait.
func asking(lease limits.Lease, limit int64, rates ...limits.RateDemand) *limits.Demand {
	return &limits.Demand{
		Rates: slices.Clone(rates),
		Lease: limits.LeaseDemand{Lease: lease, Limit: limit, Connection: 1, Note: lease.HTTP},
	}
}

// patient is a demand for a lease that waits.
func patient(wait time.Duration, lease limits.Lease, limit int64, rates ...limits.RateDemand) *limits.Demand {
	d := asking(lease, limit, rates...)
	d.Lease.Wait = wait
	return d
}

// slow returns a rate of which so many can be spent while a case runs.
func (s *crowd) slow(class limits.Class, burst int64) limits.RateDemand {
	return limits.RateDemand{Cell: s.cell(class), Rate: limits.Rate{Interval: time.Hour, Burst: burst}}
}

// take decides a demand that has no reason to wait: by TryTake, and every second time by Take alone.
func (s *crowd) take(d *limits.Demand) (limits.Decision, error) {
	if s.takes.Add(1)%2 == 0 {
		return s.Leaser.Take(context.Background(), d)
	}
	return attempt(context.Background(), s.Leaser, d)
}

// attempt is what whoever can block does.
func attempt(ctx context.Context, l limits.Leaser, d *limits.Demand) (limits.Decision, error) {
	if decision, ok := l.TryTake(d); ok {
		return decision, nil
	}
	return l.Take(ctx, d)
}

func (s *crowd) want(d *limits.Demand, want limits.Decision) {
	s.t.Helper()
	if got, err := s.take(d); err != nil || got != want {
		s.t.Fatalf("got %+v, %v; want %+v", got, err, want)
	}
}

var (
	granted  = limits.Decision{Allowed: true}
	repeated = limits.Decision{Allowed: true, Repeated: true}
	tooMany  = limits.Decision{Class: limits.ClassConcurrency, RetryAfter: retryHint}
)

// after is a decision that somebody waited for.
func after(waited time.Duration, d limits.Decision) limits.Decision {
	d.Waited = waited
	return d
}

// grant takes a lease of a new request.
func (s *crowd) grant(c limits.Cell, limit int64) limits.Lease {
	s.t.Helper()
	lease := s.lease(c)
	s.want(asking(lease, limit), granted)
	return lease
}

// wantLive says how many leases of a cell live: it is refused at that limit, and not above.
func (s *crowd) wantLive(c limits.Cell, live int64) {
	s.t.Helper()
	if live > 0 {
		if got, err := s.take(asking(s.lease(c), live)); err != nil || got.Allowed {
			s.t.Fatalf("fewer than %d leases live (%+v, %v)", live, got, err)
		}
	}
	one := s.lease(c)
	if got, err := s.take(asking(one, live+1)); err != nil || !got.Allowed {
		s.t.Fatalf("more than %d leases live (%+v, %v)", live, got, err)
	}
	s.end(one)
}

// wantLeft says how many requests a rate has left, and spends them.
func (s *crowd) wantLeft(r limits.RateDemand, want int) {
	s.t.Helper()
	for got := range want + 1 {
		d, err := s.take(demand(r))
		if err != nil || d.Allowed != (got < want) {
			s.t.Fatalf("request %d of %d that are left: %+v, %v", got+1, want, d, err)
		}
	}
}

func (s *crowd) end(leases ...limits.Lease) {
	s.t.Helper()
	var endings []limits.Ending
	for _, lease := range leases {
		endings = append(endings, limits.Ending{Lease: lease, Cause: limits.CauseLog})
	}
	if err := s.Leaser.End(context.Background(), endings); err != nil {
		s.t.Fatalf("end: %v", err)
	}
}

// endAll ends everything of a lease's identity, as whoever knows no more of the lease does.
func (s *crowd) endAll(lease limits.Lease) {
	s.t.Helper()
	ending := limits.Ending{Lease: limits.Lease{Identity: lease.Identity}, AllOfIdentity: true, Cause: limits.CauseIdentity}
	if err := s.Leaser.End(context.Background(), []limits.Ending{ending}); err != nil {
		s.t.Fatalf("end of identity: %v", err)
	}
}

func (s *crowd) renew(leases ...limits.Lease) {
	s.t.Helper()
	if err := s.Leaser.Renew(context.Background(), leases); err != nil {
		s.t.Fatalf("renew: %v", err)
	}
}

// A waiting is a demand that somebody waits with.
type waiting struct {
	s      *crowd
	cancel context.CancelFunc
	done   chan struct{} // closed when there is an answer
	got    limits.Decision
	err    error
}

// start asks in a goroutine of its own, and returns when the answer is there or is waited for.
func (s *crowd) start(d *limits.Demand) *waiting {
	return s.startWith(context.Background(), d)
}

func (s *crowd) startWith(ctx context.Context, d *limits.Demand) *waiting {
	w := &waiting{s: s, done: make(chan struct{})}
	ctx, w.cancel = context.WithCancel(ctx)
	s.started = append(s.started, w)
	go func() {
		defer close(w.done)
		w.got, w.err = attempt(ctx, s.Leaser, d)
	}()
	s.Settle()
	return w
}

func (w *waiting) answered() bool {
	select {
	case <-w.done:
		return true
	default:
		return false
	}
}

func (w *waiting) wantWaiting() {
	w.s.t.Helper()
	w.s.Settle()
	if w.answered() {
		w.s.t.Fatalf("got %+v, %v; want it to wait", w.got, w.err)
	}
}

func (w *waiting) want(want limits.Decision) {
	w.s.t.Helper()
	w.s.Settle()
	if !w.answered() {
		w.cancel()
		<-w.done
		w.s.t.Fatalf("no answer, want %+v", want)
	}
	w.cancel()
	if w.err != nil || w.got != want {
		w.s.t.Fatalf("got %+v, %v; want %+v", w.got, w.err, want)
	}
}

func (w *waiting) wantUndecided() {
	w.s.t.Helper()
	w.s.Settle()
	if !w.answered() {
		w.cancel()
		<-w.done
		w.s.t.Fatalf("no answer, want apikey.ErrUndecided")
	}
	if !errors.Is(w.err, apikey.ErrUndecided) {
		w.s.t.Fatalf("got %+v, %v; want apikey.ErrUndecided", w.got, w.err)
	}
}

func (s *crowd) wantUndecided(d *limits.Demand) {
	s.t.Helper()
	if got, ok := s.Leaser.TryTake(d); ok {
		s.t.Fatalf("TryTake decided: %+v", got)
	}
	if got, err := s.Leaser.Take(context.Background(), d); !errors.Is(err, apikey.ErrUndecided) {
		s.t.Fatalf("got %+v, %v; want apikey.ErrUndecided", got, err)
	}
}

func limitThenRefusal(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	var leases []limits.Lease
	for range 3 {
		leases = append(leases, s.grant(c, 3))
	}
	for range 5 {
		s.want(asking(s.lease(c), 3), tooMany)
	}
	s.grant(s.cell(limits.ClassConcurrency), 1) // another's is another's
	for range 10 {
		s.end(leases[0])
		leases = append(leases[1:], s.grant(c, 3))
		s.want(asking(s.lease(c), 3), tooMany)
	}
	s.end(leases...)
	s.wantLive(c, 0)
}

func noLimitNoLease(t failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	for range 5 {
		s.want(asking(s.lease(c), 0), granted)
	}
	s.wantLive(c, 0)
	if running := s.Leaser.Running(func(limits.Cell) bool { return true }); len(running) != 0 {
		t.Fatalf("%+v run without a limit", running)
	}
}

func lostEndIsOverInTime(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	s.grant(c, 2)
	s.Advance(aWhile)
	s.grant(c, 2)
	s.Advance(s.TTL - aWhile - 1)
	s.want(asking(s.lease(c), 2), tooMany)
	s.Advance(1)
	s.wantLive(c, 1)
	s.Advance(aWhile - 1)
	s.wantLive(c, 1)
	s.Advance(1)
	s.wantLive(c, 0)
}

// Ends come twice, late, in any order, and of what never was. None takes another's place, or counts below
// nothing.
func endTwiceOrOfNothing(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	first, second := s.grant(c, 2), s.grant(c, 2)
	refused, never := s.lease(c), s.lease(c)
	s.want(asking(refused, 2), tooMany)
	s.end(refused, never)
	s.wantLive(c, 2)
	s.end(second, second, refused, second)
	s.wantLive(c, 1)
	third := s.grant(c, 2)
	s.end(second)
	s.wantLive(c, 2)
	s.Advance(s.TTL - 1)
	s.renew(third)
	s.Advance(1) // the first is over
	s.end(first, never)
	s.wantLive(c, 1)
	s.end(third, first, third)
	s.end(first, second, third)
	s.endAll(first)
	s.wantLive(c, 0)
	s.grant(c, 1)
	s.want(asking(s.lease(c), 1), tooMany)
}

// A lease is itself in all its parts.
func endIsOfOneLease(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	lease := s.grant(c, 9)
	for _, change := range []func(*limits.Lease){
		func(e *limits.Lease) { e.HTTP++ },
		func(e *limits.Lease) { e.HTTP ^= 1 << 63 },
		func(e *limits.Lease) { e.Identity.Start++ },
		func(e *limits.Lease) { e.Identity.Port++ },
		func(e *limits.Lease) { e.Identity.Peer[0]++ },
		func(e *limits.Lease) { e.Identity.Peer[15]++ },
		func(e *limits.Lease) { e.Cell.Owner[15]++ },
		func(e *limits.Lease) { e.Cell.Class = limits.ClassKeyQuota },
	} {
		near := lease
		change(&near)
		s.end(near)
		s.wantLive(c, 1)
		if near.Cell == c {
			s.want(asking(near, 9), granted)
			s.wantLive(c, 2)
			s.end(near)
		}
	}
	s.end(lease)
	s.wantLive(c, 0)
}

func sameLeaseSpendsNothing(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	rate := s.slow(limits.ClassBurst, 3)
	lease := s.lease(c)
	s.want(asking(lease, 1, rate), granted)
	for range 5 {
		s.want(asking(lease, 1, rate), repeated)
	}
	s.want(patient(time.Hour, lease, 1, rate), repeated)
	s.wantLive(c, 1)
	s.wantLeft(rate, 2)
	s.want(asking(lease, 1, rate), repeated) // nor does it need anything
	s.end(lease)
	s.wantLive(c, 0)
	// A redirect makes another lease of the same identity.
	redirected := lease
	redirected.HTTP++
	s.want(asking(lease, 2), granted)
	s.want(asking(redirected, 2), granted)
	s.wantLive(c, 2)
}

func sameLeaseLivesOn(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	d := asking(s.lease(c), 1)
	s.want(d, granted)
	s.Advance(s.TTL - 1)
	d.Lease.Connection = 7 // and belongs to the connection that asked last
	s.want(d, repeated)
	s.Leaser.Disconnected(1)
	s.Advance(s.TTL - 1)
	s.wantLive(c, 1)
	s.want(d, repeated)
	s.Leaser.Disconnected(7)
	s.Advance(s.OrphanTTL - 1)
	s.wantLive(c, 1)
	s.Advance(1)
	s.wantLive(c, 0)
}

// A refusal by whichever limit has spent nothing of the others.
func refusalTakesNothing(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	rate, total := s.slow(limits.ClassBurst, 3), s.slow(limits.ClassInstance, 2)
	s.want(asking(s.lease(c), 1, rate, total), granted)
	for range 5 {
		s.want(asking(s.lease(c), 1, rate, total), tooMany)
	}
	s.wantLeft(total, 1)
	for range 5 {
		s.want(asking(s.lease(c), 9, rate, total), limits.Decision{Class: limits.ClassInstance, RetryAfter: time.Hour})
	}
	s.wantLive(c, 1)
	s.wantLeft(rate, 2)
}

// The hint of the limit of running requests counts as its wait.
func longestWaitWithLeases(_ failer, s *crowd) {
	for _, tt := range []struct {
		interval time.Duration
		want     limits.Decision
	}{
		{retryHint - 1, tooMany},
		{retryHint, limits.Decision{Class: limits.ClassBurst, RetryAfter: retryHint}},
		{retryHint + 1, limits.Decision{Class: limits.ClassBurst, RetryAfter: retryHint + 1}},
	} {
		c := s.cell(limits.ClassConcurrency)
		rate := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: limits.Rate{Interval: tt.interval, Burst: 1}}
		s.want(asking(s.lease(c), 1, rate), granted)
		s.want(asking(s.lease(c), 1, rate), tt.want)
		// Two limits refuse, so nobody waits for one of them.
		s.start(patient(time.Hour, s.lease(c), 1, rate)).want(tt.want)
	}
}

func leaseAndRateShareNoCell(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	rate := limits.RateDemand{Cell: c, Rate: limits.Rate{Interval: time.Hour, Burst: 1}}
	s.wantUndecided(asking(s.lease(c), 1, rate))
	s.wantLive(c, 0)
}

func renewedLivesOn(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	long, short := s.grant(c, 2), s.grant(c, 2)
	for range 20 {
		s.Advance(s.TTL - 1)
		s.renew(long, long)
		s.Advance(1)
		s.wantLive(c, 1)
		s.renew(long)
	}
	s.end(short)
	s.Advance(s.TTL - 1)
	s.wantLive(c, 1)
	s.Advance(1)
	s.wantLive(c, 0)
}

func unknownRenewalIsDropped(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	never, refused := s.lease(c), s.lease(c)
	s.renew(never)
	s.grant(c, 1)
	s.want(asking(refused, 1), tooMany)
	s.renew(never, refused)
	s.wantLive(c, 1)
}

// What this process let expire comes back with its renewal, whatever the limit.
func expiredIsAdopted(t failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	first, second := s.grant(c, 2), s.grant(c, 2)
	s.Advance(s.TTL)
	third, fourth := s.grant(c, 2), s.grant(c, 2)
	s.renew(second, first, first)
	s.wantLive(c, 4)
	for _, r := range s.Leaser.Running(func(of limits.Cell) bool { return of == c }) {
		if want := r.Lease == first || r.Lease == second; r.Adopted != want {
			t.Fatalf("adopted %t, want %t: %+v", r.Adopted, want, r)
		}
	}
	s.end(first, third, fourth)
	s.wantLive(c, 1)
	s.Advance(s.TTL)
	s.wantLive(c, 0)
	s.renew(second)
	s.wantLive(c, 1)
	s.renew(first, third)
	s.wantLive(c, 1)
}

// The renewal was sent before the end, and comes after it.
func endedIsNotAdopted(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	lease := s.grant(c, 1)
	s.end(lease)
	s.renew(lease)
	s.wantLive(c, 0)
	for _, end := range []func(limits.Lease){func(e limits.Lease) { s.end(e) }, s.endAll} {
		lease = s.grant(c, 1)
		s.Advance(s.TTL)
		end(lease)
		s.renew(lease)
		s.wantLive(c, 0)
		s.Advance(s.TTL)
		s.renew(lease)
		s.wantLive(c, 0)
	}
}

// older returns a lease of a request that began so long after the process.
func (s *crowd) older(c limits.Cell, after time.Duration) limits.Lease {
	lease := s.lease(c)
	lease.Identity.Start = s.Started.Add(after).UnixMicro()
	return lease
}

func olderRequestIsAdopted(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	old, just, late := s.older(c, -time.Hour), s.older(c, skew), s.older(c, skew+time.Microsecond)
	s.renew(old, just, late)
	s.wantLive(c, 2)
	s.want(asking(old, 1), repeated)
	s.want(asking(s.lease(c), 2), tooMany) // whatever the limit is, they count
	s.end(just)
	s.wantLive(c, 1)
	last := s.older(c, -time.Second)
	s.Advance(adoptFor - 1)
	s.renew(last)
	s.end(old)
	s.wantLive(c, 1)
	s.Advance(1)
	s.renew(s.older(c, -time.Second), old, just)
	s.wantLive(c, 1)
}

func earlyEndBeatsRenewal(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	ended, endedAll, redirected := s.older(c, -time.Second), s.older(c, -time.Second), s.older(c, -time.Second)
	redirected.Identity, redirected.HTTP = endedAll.Identity, redirected.HTTP+1
	known := s.older(c, time.Second)
	s.want(asking(known, 1), granted)
	s.end(ended, known)
	s.endAll(endedAll)
	for range 4 {
		s.renew(ended, endedAll, redirected, known)
		s.wantLive(c, 0)
		s.Advance((adoptFor - 1) / 3)
	}
}

func endOfIdentityEndsAll(_ failer, s *crowd) {
	a, b := s.cell(limits.ClassConcurrency), s.cell(limits.ClassConcurrency)
	lease, other := s.lease(a), s.lease(a)
	s.want(asking(other, 99), granted)
	same := []limits.Lease{lease}
	for i := range 20 {
		e := lease
		e.HTTP += uint64(1000 + i)
		if i%2 == 0 {
			e.Cell = b
		}
		same = append(same, e)
	}
	for _, e := range same {
		s.want(asking(e, 99), granted)
	}
	s.wantLive(a, 12)
	s.wantLive(b, 10)
	s.endAll(lease)
	s.wantLive(a, 1)
	s.wantLive(b, 0)
	s.end(same...)
	s.endAll(lease)
	s.wantLive(a, 1)
	for _, change := range []func(*limits.Identity){
		func(i *limits.Identity) { i.Start++ },
		func(i *limits.Identity) { i.Port++ },
		func(i *limits.Identity) { i.Peer[3]++ },
	} {
		near := other
		change(&near.Identity)
		s.endAll(near)
	}
	s.wantLive(a, 1)
}

// The end overtook the question: nobody is there to use the answer.
func nothingIsGrantedToTheGone(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	rate := s.slow(limits.ClassBurst, 2)
	lease, redirected, other := s.lease(c), s.lease(c), s.lease(c)
	redirected.Identity = lease.Identity
	s.endAll(lease)
	s.wantUndecided(asking(lease, 9, rate))
	s.wantUndecided(asking(redirected, 9, rate))
	s.Advance(goneFor - 1)
	s.wantUndecided(patient(time.Hour, lease, 9, rate))
	s.want(asking(other, 9, rate), granted)
	s.wantLive(c, 1)
	s.Advance(1)
	s.want(asking(lease, 9, rate), granted)
	s.wantLeft(rate, 0)
}

// Where the connection has no address, requests have leases, and are told apart, but no identity.
func noIdentityNoEndOfAll(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	var leases []limits.Lease
	for range 3 {
		lease := s.lease(c)
		lease.Identity = limits.Identity{Start: s.Started.Add(time.Hour).UnixMicro()}
		leases = append(leases, lease)
		s.want(asking(lease, 3), granted)
	}
	s.want(asking(leases[0], 3), repeated)
	s.endAll(leases[0])
	s.wantLive(c, 3)
	s.end(leases[0])
	s.want(asking(leases[0], 3), granted)
	s.renew(leases...)
	s.end(leases...)
	s.wantLive(c, 0)
}

func orphansEndSoon(_ failer, s *crowd) {
	a, b := s.cell(limits.ClassConcurrency), s.cell(limits.ClassConcurrency)
	by := func(connection uint64, c limits.Cell) limits.Lease {
		d := asking(s.lease(c), 99)
		d.Lease.Connection = connection
		s.want(d, granted)
		return d.Lease.Lease
	}
	by(0, a) // by no connection that is known
	soon := by(5, a)
	s.Advance(s.TTL - s.OrphanTTL + 1) // 1 less than OrphanTTL is left of those two
	renewed, ended := by(5, b), by(5, a)
	by(5, a)
	by(5, b)
	by(6, a)
	s.Leaser.Disconnected(0)
	s.Leaser.Disconnected(5)
	s.Leaser.Disconnected(5)
	s.Leaser.Disconnected(77)
	s.end(ended)
	s.wantLive(a, 4)
	s.wantLive(b, 2)
	s.Advance(s.OrphanTTL - 1)
	s.wantLive(a, 2) // no longer than its own time
	s.wantLive(b, 2)
	s.renew(renewed)
	s.Advance(1)
	s.wantLive(a, 1)
	s.wantLive(b, 1)
	s.Advance(s.TTL - s.OrphanTTL - 1)
	s.wantLive(a, 1)
	s.Advance(1)
	s.wantLive(a, 0)
	s.Advance(s.OrphanTTL - 2)
	s.wantLive(b, 1)
	s.Advance(1)
	s.wantLive(b, 0)
	s.renew(soon) // nobody ended it
	s.wantLive(a, 1)
}

func runningIsListed(t failer, s *crowd) {
	a, b := s.cell(limits.ClassConcurrency), s.cell(limits.ClassConcurrency)
	s.Advance(aWhile)
	first := s.grant(a, 9)
	s.Advance(aWhile)
	second, ended := s.grant(a, 9), s.grant(a, 9)
	s.grant(b, 9)
	s.end(ended)
	old := s.older(a, -time.Minute)
	s.renew(old)
	s.Advance(aWhile)
	s.renew(first)
	at := func(d time.Duration) int64 { return s.Started.Add(d).UnixMicro() }
	type line struct {
		lease            limits.Lease
		note, connection uint64
		adopted          bool
		granted, until   int64
	}
	want := []line{
		{first, first.HTTP, 1, false, at(aWhile), at(3*aWhile + s.TTL)},
		{second, second.HTTP, 1, false, at(2 * aWhile), at(2*aWhile + s.TTL)},
		{old, 0, 0, true, at(-time.Minute), at(2*aWhile + s.TTL)},
	}
	var got []line
	for _, r := range s.Leaser.Running(func(c limits.Cell) bool { return c == a }) {
		got = append(got, line{r.Lease, r.Note, r.Connection, r.Adopted, r.Granted.UnixMicro(), r.Until.UnixMicro()})
	}
	slices.SortFunc(got, func(x, y line) int { return int(x.lease.HTTP) - int(y.lease.HTTP) })
	if !slices.Equal(got, want) {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	if all := s.Leaser.Running(func(limits.Cell) bool { return true }); len(all) != 4 {
		t.Fatalf("%d run in all, want 4", len(all))
	}
	s.Advance(s.TTL)
	if all := s.Leaser.Running(func(limits.Cell) bool { return true }); len(all) != 0 {
		t.Fatalf("%+v run after their time", all)
	}
}

func waitForAnEnd(t failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	running := s.grant(c, 1)
	d := patient(time.Second, s.lease(c), 1)
	if got, ok := s.Leaser.TryTake(d); ok {
		t.Fatalf("TryTake decided what may wait: %+v", got)
	}
	w := s.start(d)
	w.wantWaiting()
	s.Advance(aWhile)
	s.end(running)
	w.want(after(aWhile, granted))
	s.wantLive(c, 1)
	// However it ends.
	w = s.start(patient(time.Second, s.lease(c), 1))
	w.wantWaiting()
	s.endAll(d.Lease.Lease)
	w.want(granted)
}

func waitEndsInRefusal(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	running := s.grant(c, 1)
	w := s.start(patient(aWhile, s.lease(c), 1))
	s.Advance(aWhile - 1)
	w.wantWaiting()
	s.Advance(1)
	w.want(after(aWhile, tooMany))

	within := func(deadline, wait time.Duration) *waiting {
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		w := s.startWith(ctx, patient(wait, s.lease(c), 1))
		context.AfterFunc(ctx, cancel)
		return w
	}
	w = within(answerBefore+aWhile, time.Hour)
	s.Advance(aWhile - 1)
	w.wantWaiting()
	s.Advance(1)
	w.want(after(aWhile, tooMany))
	within(answerBefore, time.Hour).want(tooMany)
	within(answerBefore-1, time.Hour).want(tooMany)
	w = within(time.Hour, aWhile)
	s.Advance(aWhile)
	w.want(after(aWhile, tooMany))

	// A wait that is over leaves nothing behind.
	s.end(running)
	s.wantLive(c, 0)
	s.Advance(time.Hour)
}

func waitForExpiry(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	running := s.grant(c, 1)
	s.Advance(aWhile)
	first, second := s.start(patient(9*s.TTL, s.lease(c), 1)), s.start(patient(9*s.TTL, s.lease(c), 1))
	s.Advance(s.TTL - aWhile - 1)
	first.wantWaiting()
	s.renew(running)
	s.Advance(s.TTL - 1)
	first.wantWaiting()
	s.Advance(1)
	first.want(after(2*s.TTL-aWhile-1, granted))
	second.wantWaiting()
	s.Advance(s.TTL - 1)
	second.wantWaiting()
	s.Advance(1)
	second.want(after(3*s.TTL-aWhile-1, granted))

	// What is over in the moment in which the wait ends is over.
	for range 20 {
		c := s.cell(limits.ClassConcurrency)
		s.grant(c, 1)
		w := s.start(patient(s.TTL, s.lease(c), 1))
		s.Advance(s.TTL)
		w.want(after(s.TTL, granted))
	}
}

func waitForOrphans(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	s.grant(c, 1)
	w := s.start(patient(9*s.TTL, s.lease(c), 1))
	s.Leaser.Disconnected(1)
	s.Advance(s.OrphanTTL - 1)
	w.wantWaiting()
	s.Advance(1)
	w.want(after(s.OrphanTTL, granted))
}

func firstComeFirstServed(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	running := []limits.Lease{s.grant(c, 2), s.grant(c, 2)}
	var line []*waiting
	for range 20 {
		d := patient(time.Hour, s.lease(c), 2)
		running = append(running, d.Lease.Lease)
		line = append(line, s.start(d))
	}
	for i, w := range line {
		w.wantWaiting()
		s.Advance(1)
		s.end(running[i])
		w.want(after(time.Duration(i+1), granted))
	}
	s.wantLive(c, 2)
}

// From the moment there is room it is the first waiter's, also before that one has noticed.
func nobodyOvertakes(t failer, s *crowd) {
	for range 50 {
		c := s.cell(limits.ClassConcurrency)
		running := s.grant(c, 1)
		w := s.start(patient(time.Hour, s.lease(c), 1))
		w.wantWaiting()
		s.end(running)
		if got, ok := s.Leaser.TryTake(asking(s.lease(c), 1)); ok && got.Allowed {
			t.Fatalf("one that just came got what another waits for")
		}
		w.want(granted)
		s.want(asking(s.lease(c), 1), tooMany)
	}
	// Nor does one that comes while others wait below the limit that it brings itself.
	c := s.cell(limits.ClassConcurrency)
	s.grant(c, 1)
	first, second := s.start(patient(time.Hour, s.lease(c), 1)), s.start(patient(time.Hour, s.lease(c), 1))
	third := s.start(patient(time.Hour, s.lease(c), 2))
	first.want(granted)
	second.wantWaiting()
	third.wantWaiting()
	s.want(asking(s.lease(c), 4), tooMany)
	second.want(granted)
	third.want(granted)
	s.wantLive(c, 4)
}

func goneWaiterIsSkipped(t failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	running := s.grant(c, 1)
	var line []*waiting
	for range 4 {
		line = append(line, s.start(patient(time.Hour, s.lease(c), 1)))
	}
	line[0].cancel()
	line[0].wantUndecided()
	if !errors.Is(line[0].err, context.Canceled) {
		t.Fatalf("got %v, want to be told of the context", line[0].err)
	}
	line[2].cancel()
	line[2].wantUndecided()
	line[1].wantWaiting()
	s.end(running)
	line[1].want(granted)
	// One that is gone in the moment in which it gets its turn passes it on, or has its lease.
	for range 50 {
		c := s.cell(limits.ClassConcurrency)
		running := s.grant(c, 1)
		d := patient(time.Hour, s.lease(c), 1)
		first, second := s.start(d), s.start(patient(time.Hour, s.lease(c), 1))
		s.end(running)
		first.cancel()
		s.Settle()
		if !first.answered() {
			t.Fatalf("one that is gone waits on")
		}
		if first.err == nil {
			s.end(d.Lease.Lease)
		}
		second.want(granted)
		s.wantLive(c, 1)
	}
	line[3].cancel()
	line[3].wantUndecided()
}

// A frightened context panics once it is told to.
type frightened struct {
	context.Context
	now *atomic.Bool
}

func (c frightened) Err() error {
	if c.now.Load() {
		panic("frightened")
	}
	return c.Context.Err()
}

func panicLosesNoTurn(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	running := s.grant(c, 1)
	d := patient(time.Hour, s.lease(c), 1)
	var now atomic.Bool
	go func() {
		defer func() {
			if recover() == nil {
				s.end(d.Lease.Lease) // this leaser did not ask the context
			}
		}()
		_, _ = s.Leaser.Take(frightened{context.Background(), &now}, d)
	}()
	s.Settle()
	next := s.start(patient(time.Hour, s.lease(c), 1))
	next.wantWaiting()
	now.Store(true)
	s.end(running)
	next.want(granted)
	s.wantLive(c, 1)
}

// Whoever waits has spent nothing and holds nothing.
func waitHoldsNothing(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	rate := s.slow(limits.ClassInstance, 2)
	running := s.grant(c, 1)
	w := s.start(patient(aWhile, s.lease(c), 1, rate))
	s.want(demand(rate), granted)
	w.wantWaiting()
	s.Advance(aWhile)
	w.want(after(aWhile, tooMany))
	w = s.start(patient(aWhile, s.lease(c), 1, rate))
	s.end(running)
	w.want(granted)
	s.wantLeft(rate, 0)
}

func turnRefusedByRatePassesOn(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	rate, other := s.slow(limits.ClassBurst, 1), s.slow(limits.ClassInstance, 2)
	running := s.grant(c, 1)
	first := s.start(patient(time.Hour, s.lease(c), 1, rate, other))
	second := s.start(patient(time.Hour, s.lease(c), 1))
	timeout := s.start(patient(aWhile, s.lease(c), 1, rate))
	s.want(demand(rate), granted)
	first.wantWaiting()
	s.Advance(aWhile)
	// What refuses longest now is reported.
	timeout.want(after(aWhile, limits.Decision{Class: limits.ClassBurst, RetryAfter: time.Hour - aWhile}))
	s.end(running)
	first.want(after(aWhile, limits.Decision{Class: limits.ClassBurst, RetryAfter: time.Hour - aWhile}))
	second.want(after(aWhile, granted))
	s.wantLeft(other, 2)
	s.wantLive(c, 1)
}

func waitOnlyWhereNothingElseRefuses(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	rate := s.slow(limits.ClassBurst, 1)
	s.want(asking(s.lease(c), 1, rate), granted)
	refused := limits.Decision{Class: limits.ClassBurst, RetryAfter: time.Hour}
	s.start(patient(time.Hour, s.lease(c), 1, rate)).want(refused)
	s.want(patient(time.Hour, s.lease(c), 1, rate), refused)
}

func sameLeaseWaitsTwice(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	running := s.grant(c, 1)
	d := patient(time.Hour, s.lease(c), 1)
	again := patient(aWhile, d.Lease.Lease, 1)
	first, second, third := s.start(d), s.start(again), s.start(patient(time.Hour, s.lease(c), 1))
	s.end(running)
	first.want(granted)
	s.Advance(aWhile)
	second.want(after(aWhile, repeated))
	third.wantWaiting()
	s.end(d.Lease.Lease)
	third.want(after(aWhile, granted))
	s.wantLive(c, 1)
}

func endedWaiterGetsNothing(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	running := s.grant(c, 1)
	gone := s.lease(c)
	first, second := s.start(patient(time.Hour, gone, 1)), s.start(patient(time.Hour, s.lease(c), 1))
	s.endAll(gone)
	s.end(running)
	first.wantUndecided()
	second.want(granted)
	s.wantLive(c, 1)
}

func raisedLimitWakes(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	s.grant(c, 1)
	var line []*waiting
	for range 5 {
		line = append(line, s.start(patient(time.Hour, s.lease(c), 1)))
	}
	s.want(asking(s.lease(c), 3), tooMany) // brings room for two, and has none for itself
	line[0].want(granted)
	line[1].want(granted)
	line[2].wantWaiting()
	w := s.start(patient(time.Hour, s.lease(c), 7)) // brings room for all
	for _, before := range line[2:] {
		before.want(granted)
	}
	w.want(granted)
	s.wantLive(c, 7)
}

func loweredLimitGrantsNone(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	var running []limits.Lease
	for range 4 {
		running = append(running, s.grant(c, 4))
	}
	first, second := s.start(patient(time.Hour, s.lease(c), 4)), s.start(patient(time.Hour, s.lease(c), 4))
	s.want(asking(s.lease(c), 2), tooMany)
	s.end(running[:2]...)
	first.wantWaiting()
	s.want(asking(s.lease(c), 2), tooMany)
	s.end(running[2])
	first.want(granted)
	second.wantWaiting()
	s.end(running[3])
	second.want(granted)
	s.wantLive(c, 2)
}

func queuesAreBounded(_ failer, s *crowd) {
	var line []*waiting
	var running []limits.Lease
	for len(line) < waitingBound {
		c := s.cell(limits.ClassConcurrency)
		running = append(running, s.grant(c, 1))
		for range queueBound {
			line = append(line, s.start(patient(time.Hour, s.lease(c), 1)))
		}
		s.want(patient(time.Hour, s.lease(c), 1), tooMany)
		s.start(patient(time.Hour, s.lease(c), 1)).want(tooMany)
	}
	line[0].wantWaiting()
	line[waitingBound-1].wantWaiting()
	c := s.cell(limits.ClassConcurrency)
	last := s.grant(c, 1)
	s.start(patient(time.Hour, s.lease(c), 1)).want(tooMany)
	// Whoever leaves makes room, however.
	line[queueBound-1].cancel()
	line[queueBound-1].wantUndecided()
	w := s.start(patient(time.Hour, s.lease(c), 1))
	w.wantWaiting()
	s.start(patient(time.Hour, s.lease(c), 1)).want(tooMany)
	s.end(running[0])
	line[0].want(granted)
	s.start(patient(time.Minute, s.lease(c), 1)).wantWaiting()
	s.end(last)
	w.want(granted)
	for _, w := range line {
		w.cancel()
	}
	s.Advance(time.Minute)
	s.Settle()
	s.start(patient(time.Minute, s.lease(c), 1)).wantWaiting()
	s.Advance(time.Minute)
}

// Hundreds at once, who stay a while, give up, end twice, end without a word or panic: never do more
// run than may, and in the end nothing is left.
func throng(t failer, s *crowd) {
	const people, rounds, limit = 300, 8, 7 // more than may wait
	c := s.cell(limits.ClassConcurrency)
	rate := limits.RateDemand{Cell: s.cell(limits.ClassBurst), Rate: limits.Rate{Interval: time.Microsecond, Burst: 20}}
	leases := make([]limits.Lease, people*rounds)
	for i := range leases {
		leases[i] = s.lease(c)
	}
	var running, most, grants atomic.Int64
	var all sync.WaitGroup
	for person := range people {
		all.Go(func() {
			dice := uint64(person)*0x9e3779b97f4a7c15 + 1
			roll := func(n uint64) uint64 {
				dice ^= dice << 13
				dice ^= dice >> 7
				dice ^= dice << 17
				return dice % n
			}
			for round := range rounds {
				time.Sleep(time.Duration(roll(20_000)) * time.Microsecond)
				lease := leases[person*rounds+round]
				d := patient(time.Duration(roll(20))*time.Millisecond, lease, limit, rate)
				ctx, cancel := context.WithCancel(context.Background())
				switch roll(4) {
				case 0:
					time.AfterFunc(time.Duration(roll(10_000))*time.Microsecond, cancel)
				case 1:
					ctx, cancel = context.WithTimeout(ctx, time.Duration(15+roll(20))*time.Millisecond)
				case 2:
					var now atomic.Bool
					ctx = frightened{ctx, &now}
					time.AfterFunc(time.Duration(roll(10_000))*time.Microsecond, func() { now.Store(true) })
				}
				decision, err := func() (d2 limits.Decision, err error) {
					defer func() {
						if recover() != nil {
							err = apikey.ErrUndecided
						}
					}()
					return attempt(ctx, s.Leaser, d)
				}()
				if err != nil && !errors.Is(err, apikey.ErrUndecided) {
					t.Errorf("take: %v", err)
				}
				if err == nil && decision.Allowed {
					grants.Add(1)
					n := running.Add(1)
					for {
						if before := most.Load(); n <= before || most.CompareAndSwap(before, n) {
							break
						}
					}
					time.Sleep(time.Duration(roll(2000)) * time.Microsecond)
					running.Add(-1)
					ending := limits.Ending{Lease: lease, Cause: limits.CauseLog, AllOfIdentity: roll(5) == 0}
					_ = s.Leaser.End(context.Background(), slices.Repeat([]limits.Ending{ending}, int(1+roll(2))))
				}
				cancel()
			}
		})
	}
	all.Wait()
	if got := most.Load(); got > limit {
		t.Fatalf("%d ran at once, want at most %d", got, limit)
	}
	if grants.Load() < people {
		t.Fatalf("%d grants: nobody was let in", grants.Load())
	}
	s.wantLive(c, 0)
}

// hourly asks for a unit of a quota over an hour.
func (s *crowd) hourly(class limits.Class, limit int64, lockout time.Duration) limits.QuotaDemand {
	return limits.QuotaDemand{Cell: s.cell(class), Quota: limits.Quota{Limit: limit, Window: time.Hour, Lockout: lockout}, Cost: 1}
}

func with(d *limits.Demand, quotas ...limits.QuotaDemand) *limits.Demand {
	d.Quotas = quotas
	return d
}

// used says how much of the limits of a demand is used.
func (s *crowd) used(d *limits.Demand, want ...int64) {
	s.t.Helper()
	standings, err := s.Leaser.Look(context.Background(), d, nil)
	var got []int64
	for _, standing := range standings {
		got = append(got, standing.Used)
	}
	if err != nil || !slices.Equal(got, want) {
		s.t.Fatalf("%v used (%v), want %v", got, err, want)
	}
}

// A wait holds nothing of a quota, a repeat spends nothing again, and a refusal neither.
func quotasAreSpentWithTheLease(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	quota := s.hourly(limits.ClassKeyQuota, 3, 0)
	first := s.lease(c)
	s.want(with(asking(first, 1), quota), granted)
	s.want(with(asking(first, 1), quota), repeated)
	s.want(with(asking(s.lease(c), 1), quota), tooMany)
	w := s.start(with(patient(time.Hour, s.lease(c), 1), quota))
	w.wantWaiting()
	s.used(with(asking(first, 1), quota), 1, 1)
	s.end(first)
	w.want(granted)
	s.used(with(asking(first, 1), quota), 2, 1)
}

func turnRefusedByQuotaPassesOn(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	quota, other := s.hourly(limits.ClassKeyQuota, 1, 3*time.Hour), s.hourly(limits.ClassGlobalQuota, 5, 0)
	running := s.grant(c, 1)
	first := s.start(with(patient(time.Hour, s.lease(c), 1), other, quota))
	second := s.start(with(patient(time.Hour, s.lease(c), 1), other))
	s.want(with(demand(), quota), granted)
	first.wantWaiting()
	s.end(running)
	// The refusal of one who has waited begins the lockout like any other.
	first.want(limits.Decision{Class: limits.ClassKeyQuota, Quota: 1, RetryAfter: 3 * time.Hour})
	second.want(granted)
	s.used(with(demand(), other, quota), 1, 0)
	s.Advance(aWhile)
	s.want(with(demand(), quota), limits.Decision{Class: limits.ClassKeyQuota, RetryAfter: 3*time.Hour - aWhile})
}

// Where running requests are what is reported, no quota locks.
func longestWaitWithQuotas(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	brief := limits.QuotaDemand{Cell: s.cell(limits.ClassKeyQuota), Quota: limits.Quota{Limit: 1, Window: aWhile, Lockout: 2 * aWhile}, Cost: 1}
	running := s.lease(c)
	s.want(with(asking(running, 1), brief), granted)
	s.want(with(asking(s.lease(c), 1), brief), tooMany)
	s.want(with(patient(time.Hour, s.lease(c), 1), brief), tooMany) // no wait where another limit refuses
	s.used(with(demand(), brief), 1)
	s.end(running)
	s.want(with(asking(s.lease(c), 1), brief), limits.Decision{Class: limits.ClassKeyQuota, RetryAfter: 2 * aWhile})
	s.used(with(asking(running, 1), brief), 0, 0)
}

func shadowGrantsAboveTheLimit(_ failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	shadow := func(d *limits.Demand) *limits.Demand {
		d.Lease.Shadow = true
		return d
	}
	const bit = 1 << limits.ClassConcurrency
	over := limits.Decision{Allowed: true, Shadowed: bit}
	s.want(shadow(asking(s.lease(c), 2)), granted)
	s.want(shadow(asking(s.lease(c), 2)), granted)
	s.want(shadow(patient(time.Hour, s.lease(c), 2)), over)
	s.wantLive(c, 3)
	s.want(asking(s.lease(c), 2), tooMany)
	quota := s.hourly(limits.ClassKeyQuota, 1, 0)
	s.want(shadow(with(asking(s.lease(c), 2), quota)), over)
	s.want(shadow(with(asking(s.lease(c), 2), quota)), limits.Decision{Class: limits.ClassKeyQuota, RetryAfter: time.Hour, Shadowed: bit})
	s.wantLive(c, 4)
	// In shadow nobody needs to wait, nor does who waits already.
	w := s.start(patient(time.Hour, s.lease(c), 2))
	w.wantWaiting()
	s.Advance(aWhile)
	s.want(shadow(asking(s.lease(c), 2)), over)
	w.want(after(aWhile, granted))
	s.wantLive(c, 6)
}

func lookAtLeases(t failer, s *crowd) {
	c := s.cell(limits.ClassConcurrency)
	ask := asking(s.lease(c), 2)
	want := func(want limits.Standing) {
		t.Helper()
		want.Class, want.Limit = limits.ClassConcurrency, 2
		got, err := s.Leaser.Look(context.Background(), ask, nil)
		if err != nil || len(got) != 1 || got[0] != want {
			t.Fatalf("got %+v, %v, want %+v", got, err, want)
		}
	}
	want(limits.Standing{Remaining: 2})
	first := s.grant(c, 2)
	want(limits.Standing{Used: 1, Remaining: 1})
	s.grant(c, 2)
	want(limits.Standing{Used: 2, RefusesFor: retryHint})
	s.grant(c, 9) // the limit was lowered since
	want(limits.Standing{Used: 3, RefusesFor: retryHint})
	s.end(first)
	want(limits.Standing{Used: 2, RefusesFor: retryHint})
	s.Advance(s.TTL)
	want(limits.Standing{Remaining: 2})
	standings := []limits.Standing{{Class: limits.ClassBurst}}
	if got, err := s.Leaser.Look(context.Background(), ask, standings); err != nil || len(got) != 2 || got[0] != standings[0] {
		t.Fatalf("got %+v, %v, want one more standing", got, err)
	}
}
