package limitstest

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"keyward/authz/apikey"
	"keyward/limits"
)

// A ledger is the contract of leases with one lock and no index, and a place for each mistake that a
// real leaser could make.
type ledger struct {
	mistake string
	base    time.Time
	rates   *simple

	mu      sync.Mutex
	live    []*entry
	expired map[limits.Lease]bool
	early   map[limits.Lease]bool // an identity is a lease that is nothing else
	gone    map[limits.Identity]time.Duration
	cells   map[limits.Cell]*ledgerCell
	waiting int
}

type entry struct {
	limits.Running
	until    time.Duration
	orphaned time.Duration // 0: it is not
}

type ledgerCell struct {
	limit int64
	extra int64 // by mistake: what counts beside the leases
	turns int64
	queue []*ledgerWaiter

	changed chan struct{} // closed when a waiter should look at the times again
}

type ledgerWaiter struct {
	turn chan struct{}
	own  int64 // limit
}

const (
	ledgerTTL    = 35 * time.Second
	ledgerOrphan = 13 * time.Second
)

func newLedger(mistake string) *ledger {
	return &ledger{
		mistake: mistake, base: time.Now(), rates: newSimple(""),
		expired: make(map[limits.Lease]bool), early: make(map[limits.Lease]bool),
		gone: make(map[limits.Identity]time.Duration), cells: make(map[limits.Cell]*ledgerCell),
	}
}

const (
	leasesLiveForever   = "never lets a lease expire"
	expiresLate         = "lets a lease expire a moment late"
	renewsNothing       = "ignores renewals"
	adoptsAll           = "adopts whatever is renewed"
	adoptsNothing       = "adopts nothing"
	adoptsOnlyExpired   = "adopts nothing of older requests"
	adoptsEnded         = "adopts what expired, also when it ended after"
	adoptsUpToLimit     = "adopts up to the limit"
	adoptsForever       = "adopts older requests' leases at any age"
	knowsNoSkew         = "adopts nothing that began after itself"
	forgetsEarly        = "forgets ends that come before renewals"
	forgetsEarlyAll     = "forgets ends of identities that come before renewals"
	endsUnknown         = "counts down for an end of nothing"
	endsByIdentity      = "ends by identity where a lease is named"
	endsByHTTP          = "ends by HTTP's id alone"
	endsOne             = "ends one lease of an identity"
	endsInOneCell       = "ends an identity's leases in one cell"
	forgetsGone         = "forgets identities that ended"
	remembersGone       = "remembers identities that ended for too long"
	zeroIsIdentity      = "takes no address for an identity"
	repeatSpends        = "spends rates for the same lease again"
	repeatIsNew         = "counts the same lease twice"
	repeatKeepsTime     = "does not renew what is taken again"
	repeatKeepsNode     = "leaves what is taken again to the old connection"
	leasesAnyway        = "counts a lease that a rate refuses"
	spendsAnyway        = "spends rates where the leases refuse"
	oneLeaseTooMany     = "grants one lease above the limit"
	hintsNothing        = "reports leases last, whatever the waits"
	leasesNoLimit       = "counts where there is no limit"
	sharesCells         = "lets a rate and leases share a cell"
	orphansEndAtOnce    = "ends leases with their connection"
	orphansLive         = "ignores the end of connections"
	orphansLiveLonger   = "lets a lease live longer because its connection ended"
	orphansCannotLive   = "ends an orphan although it is renewed"
	listsDead           = "lists leases that ended"
	listsNoAdoption     = "does not tell adopted leases"
	neverWaits          = "never waits"
	waitsInTry          = "says no where waiting is the answer"
	ignoresDeadline     = "waits until its caller has gone"
	sleepsThrough       = "does not wake for what expires"
	sleepsThroughNodes  = "does not wake for orphans"
	lastComeFirstServed = "serves the last first"
	turnsAreFree        = "lets those who come take what a turn was given for"
	losesTurnOfGone     = "loses the turn of one who is gone"
	losesTurnOnPanic    = "loses the turn of one who panics"
	losesRefusedTurn    = "loses a turn that a rate refuses"
	holdsWhileWaiting   = "spends rates before it waits"
	waitsForNothing     = "waits where a rate refuses as well"
	ignoresRates        = "does not look at rates again after a wait"
	ignoresRaised       = "does not see a raised limit while somebody waits"
	ignoresLowered      = "wakes waiters by the limit they came with"
	queuesForever       = "has no bound for one queue"
	waitsForever        = "has no bound for all queues"
	grantsInTwoSteps    = "judges and grants under two locks"
	grantsToGone        = "grants a turn to one whose request ended"
	quotasAreForgotten  = "does not look at quotas again after a wait"
	lockoutIsForgotten  = "begins no lockout after a wait"
	locksUnreported     = "begins a lockout where running requests are reported"
	quotasAreHeld       = "spends quotas before it waits"
	shadowRefusesLeases = "refuses leases in shadow"
	shadowLeaseIsSilent = "says nothing of leases in shadow"
	shadowLeavesWaiting = "leaves those waiting who came before the shadow"
	looksAtNoLeases     = "does not see leases when it looks"
	looksAtDead         = "sees leases that expired when it looks"
)

func (l *ledger) is(mistake string) bool { return l.mistake == mistake }

func (l *ledger) now() time.Duration { return time.Since(l.base) }

func (l *ledger) cell(c limits.Cell) *ledgerCell {
	if l.cells[c] == nil {
		l.cells[c] = &ledgerCell{changed: make(chan struct{})}
	}
	return l.cells[c]
}

func (l *ledger) liveOf(c limits.Cell) (n int64) {
	for _, e := range l.live {
		if e.Lease.Cell == c {
			n++
		}
	}
	return n + l.cell(c).extra
}

func (l *ledger) find(lease limits.Lease) *entry {
	for _, e := range l.live {
		if e.Lease == lease {
			return e
		}
	}
	return nil
}

// drop ends the leases for which of returns true.
func (l *ledger) drop(of func(*entry) bool) (n int) {
	before := len(l.live)
	l.live = slices.DeleteFunc(l.live, of)
	return before - len(l.live)
}

// expire ends what is over.
func (l *ledger) expire() {
	now := l.now()
	if l.is(expiresLate) {
		now--
	}
	l.drop(func(e *entry) bool {
		over := !l.is(leasesLiveForever) && e.until <= now || e.orphaned > 0 && e.orphaned <= now
		if over {
			l.expired[e.Lease] = true
		}
		return over
	})
}

// serve ends what is over, and gives every free place to whoever waits for it.
func (l *ledger) serve() {
	l.expire()
	for c, q := range l.cells {
		for len(q.queue) > 0 {
			at := 0
			if l.is(lastComeFirstServed) {
				at = len(q.queue) - 1
			}
			limit := q.limit
			if l.is(ignoresLowered) {
				limit = q.queue[at].own
			}
			if l.liveOf(c)+q.turns >= limit {
				break
			}
			w := q.queue[at]
			q.queue = slices.Delete(q.queue, at, at+1)
			l.waiting--
			q.turns++
			close(w.turn)
		}
	}
}

// next is when whoever waits for a cell must look again.
func (l *ledger) next(c limits.Cell) time.Duration {
	now, next := l.now(), time.Duration(1<<62)
	for _, e := range l.live {
		if e.Lease.Cell != c {
			continue
		}
		if e.until > now && !l.is(sleepsThrough) {
			next = min(next, e.until)
		}
		if e.orphaned > now && !l.is(sleepsThrough) && !l.is(sleepsThroughNodes) {
			next = min(next, e.orphaned)
		}
	}
	return next
}

func (l *ledger) isGone(lease limits.Lease) bool {
	at, ok := l.gone[lease.Identity]
	lasts := goneFor
	if l.is(remembersGone) {
		lasts = 2 * goneFor
	}
	return ok && l.now() < at+lasts && !l.is(forgetsGone)
}

var errLedger = fmt.Errorf("not decided: %w", apikey.ErrUndecided)

func (l *ledger) TryTake(d *limits.Demand) (limits.Decision, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	decision, waits, err := l.judge(d, nil, false)
	if err != nil || waits && !l.is(waitsInTry) && d.Lease.Wait > 0 {
		return limits.Decision{}, false
	}
	return decision, true
}

func (l *ledger) Look(ctx context.Context, d *limits.Demand, standings []limits.Standing) ([]limits.Standing, error) {
	standings, err := l.rates.Look(ctx, d, standings)
	if err != nil || d.Lease.Limit == 0 || l.is(looksAtNoLeases) {
		return standings, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.is(looksAtDead) {
		l.serve()
	}
	c := d.Lease.Lease.Cell
	s := limits.Standing{Class: c.Class, Limit: d.Lease.Limit, Used: l.liveOf(c), Shadow: d.Lease.Shadow}
	if s.Remaining = max(0, s.Limit-s.Used-l.cell(c).turns); s.Remaining == 0 {
		s.RefusesFor = retryHint
	}
	return append(standings, s), nil
}

// judge decides, and spends what passes, for one that comes or that waited and has a turn or not. waits:
// only the leases refuse.
func (l *ledger) judge(d *limits.Demand, w *ledgerWaiter, turn bool) (decision limits.Decision, waits bool, err error) {
	l.expire()
	ask := d.Lease
	if ask.Limit == 0 && !l.is(leasesNoLimit) {
		decision, err = l.rates.Take(context.Background(), &limits.Demand{Rates: d.Rates, Quotas: d.Quotas})
		return decision, false, err
	}
	for _, r := range d.Rates {
		if r.Cell == ask.Lease.Cell && !l.is(sharesCells) {
			return limits.Decision{}, false, errLedger
		}
	}
	if e := l.find(ask.Lease); e != nil && !l.is(repeatIsNew) {
		if l.is(repeatSpends) {
			_, _ = l.rates.Take(context.Background(), &limits.Demand{Rates: d.Rates, Quotas: d.Quotas})
		}
		if !l.is(repeatKeepsTime) {
			e.until, e.orphaned = l.now()+ledgerTTL, 0
		}
		if !l.is(repeatKeepsNode) {
			e.Connection = ask.Connection
		}
		return repeated, false, nil
	}
	if l.isGone(ask.Lease) && (w == nil || !l.is(grantsToGone)) {
		return limits.Decision{}, false, errLedger
	}
	c := l.cell(ask.Lease.Cell)
	if w == nil && (!l.is(ignoresRaised) || len(c.queue)+int(c.turns) == 0) {
		c.limit = ask.Limit
		if ask.Shadow && !l.is(shadowLeavesWaiting) {
			c.limit = 1 << 40
		}
		l.serve()
	}
	limit := c.limit
	if l.is(oneLeaseTooMany) {
		limit++
	}
	counted := l.liveOf(ask.Lease.Cell)
	if !l.is(turnsAreFree) {
		counted += c.turns
	}
	full := counted >= limit || !turn && len(c.queue) > 0
	var shadowed uint16
	if ask.Shadow && !l.is(shadowRefusesLeases) {
		full = false
		if l.liveOf(ask.Lease.Cell) >= ask.Limit && !l.is(shadowLeaseIsSilent) {
			shadowed = 1 << limits.ClassConcurrency
		}
	}
	if !full && l.is(grantsInTwoSteps) {
		l.mu.Unlock()
		runtime.Gosched()
		l.mu.Lock()
	}

	// What the rates and quotas say is found by taking; a copy is put back where that must not be.
	putBack := l.rates.copied()
	rest := &limits.Demand{Rates: d.Rates, Quotas: d.Quotas}
	if w != nil && l.is(ignoresRates) {
		rest.Rates = nil
	}
	if w != nil && l.is(quotasAreForgotten) {
		rest.Quotas = nil
	}
	if decision, err = l.rates.Take(context.Background(), rest); err != nil {
		return limits.Decision{}, false, err
	}
	if !decision.Allowed && w != nil && l.is(lockoutIsForgotten) {
		putBack(true)
	}
	if full {
		waits = decision.Allowed || l.is(waitsForNothing)
		if !l.is(spendsAnyway) && !l.is(holdsWhileWaiting) {
			if decision.Allowed {
				putBack(!l.is(quotasAreHeld))
			} else if decision.RetryAfter < retryHint && !l.is(locksUnreported) {
				putBack(true)
			}
		}
		if decision.RetryAfter < retryHint && (decision.Allowed || !l.is(hintsNothing)) {
			decision = tooMany
		}
		return decision, waits, nil
	}
	decision.Shadowed |= shadowed
	if decision.Allowed || l.is(leasesAnyway) {
		l.live = append(l.live, &entry{until: l.now() + ledgerTTL, Running: limits.Running{
			Lease: ask.Lease, Note: ask.Note, Connection: ask.Connection, Granted: l.base.Add(l.now()),
		}})
		c.wake()
	}
	return decision, false, nil
}

func (l *ledger) Take(ctx context.Context, d *limits.Demand) (limits.Decision, error) {
	l.mu.Lock()
	decision, waits, err := l.judge(d, nil, false)
	c := l.cell(d.Lease.Lease.Cell)
	wait := d.Lease.Wait
	if deadline, ok := ctx.Deadline(); ok && !l.is(ignoresDeadline) {
		wait = min(wait, time.Until(deadline)-answerBefore)
	}
	bounded := len(c.queue) >= queueBound && !l.is(queuesForever) || l.waiting >= waitingBound && !l.is(waitsForever)
	if err != nil || !waits || wait <= 0 || bounded || l.is(neverWaits) {
		l.mu.Unlock()
		return decision, err
	}
	w := &ledgerWaiter{turn: make(chan struct{}), own: d.Lease.Limit}
	c.queue = append(c.queue, w)
	l.waiting++
	since := l.now()
	changed, next := c.changed, l.next(d.Lease.Lease.Cell)
	l.mu.Unlock()

	lost, answered := l.is(losesTurnOnPanic), false
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if !answered {
			l.takeOut(c, w, lost)
			l.serve()
		}
	}()
	for over := false; ; {
		timer := time.NewTimer(min(since+wait, next) - l.now())
		select {
		case <-w.turn:
			over = true
		case <-timer.C:
			over = l.now() >= since+wait
		case <-changed:
		case <-ctx.Done():
		}
		timer.Stop()
		if err := ctx.Err(); err != nil {
			lost = l.is(losesTurnOfGone)
			return limits.Decision{}, fmt.Errorf("%w: %w", errLedger, err)
		}
		l.mu.Lock()
		l.serve()
		changed, next = c.changed, l.next(d.Lease.Lease.Cell)
		if !over {
			l.mu.Unlock()
			continue
		}
		turn := l.takeOut(c, w, false)
		decision, _, err = l.judge(d, w, turn)
		if turn && !decision.Allowed && l.is(losesRefusedTurn) {
			c.turns++
		}
		l.serve()
		answered = true
		l.mu.Unlock()
		if err == nil {
			decision.Waited = l.now() - since
		}
		return decision, err
	}
}

// takeOut takes a waiter from its queue, or its turn from it.
func (l *ledger) takeOut(c *ledgerCell, w *ledgerWaiter, lost bool) (turn bool) {
	if at := slices.Index(c.queue, w); at >= 0 {
		c.queue = slices.Delete(c.queue, at, at+1)
		l.waiting--
		return false
	}
	if !lost {
		c.turns--
	}
	return true
}

func (l *ledger) Renew(_ context.Context, leases []limits.Lease) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire()
	for _, lease := range leases {
		began := time.UnixMicro(lease.Identity.Start)
		margin := skew
		if l.is(knowsNoSkew) {
			margin = 0
		}
		young := l.now() < adoptFor || l.is(adoptsForever)
		young = young && !began.After(l.base.Add(margin)) && !l.is(adoptsOnlyExpired)
		early := l.early[lease] || l.early[limits.Lease{Identity: lease.Identity}] && !lease.Identity.IsZero()
		known := l.find(lease)
		switch {
		case l.is(renewsNothing):
		case known != nil:
			known.until = l.now() + ledgerTTL
			if !l.is(orphansCannotLive) {
				known.orphaned = 0
			}
		case l.is(adoptsAll), !l.is(adoptsNothing) && (l.expired[lease] || young) && (!young || !early):
			if l.is(adoptsUpToLimit) && l.liveOf(lease.Cell) >= l.cell(lease.Cell).limit {
				continue
			}
			delete(l.expired, lease)
			l.live = append(l.live, &entry{until: l.now() + ledgerTTL, Running: limits.Running{
				Lease: lease, Adopted: !l.is(listsNoAdoption), Granted: began,
			}})
		}
	}
	return nil
}

func (l *ledger) End(_ context.Context, endings []limits.Ending) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.serve()
	for _, e := range endings {
		if e.AllOfIdentity {
			l.endIdentity(e.Lease.Identity)
		} else {
			l.endLease(e.Lease)
		}
		l.serve()
	}
	return nil
}

func (l *ledger) endLease(lease limits.Lease) {
	n := l.drop(func(e *entry) bool {
		return e.Lease == lease ||
			l.is(endsByIdentity) && e.Lease.Identity == lease.Identity ||
			l.is(endsByHTTP) && e.Lease.HTTP == lease.HTTP
	})
	if n == 0 && l.is(endsUnknown) {
		l.cell(lease.Cell).extra--
	}
	if !l.is(adoptsEnded) {
		delete(l.expired, lease)
	}
	if !l.is(forgetsEarly) {
		l.early[lease] = true
	}
}

func (l *ledger) endIdentity(identity limits.Identity) {
	if identity.IsZero() && !l.is(zeroIsIdentity) {
		return
	}
	l.gone[identity] = l.now()
	if !l.is(forgetsEarlyAll) {
		l.early[limits.Lease{Identity: identity}] = true
	}
	var first *entry
	l.drop(func(e *entry) bool {
		if e.Lease.Identity != identity {
			return false
		}
		if first == nil {
			first = e
			return true
		}
		return !l.is(endsOne) && (!l.is(endsInOneCell) || e.Lease.Cell == first.Lease.Cell)
	})
	for lease := range l.expired {
		if lease.Identity == identity && !l.is(adoptsEnded) {
			delete(l.expired, lease)
		}
	}
}

func (l *ledger) Disconnected(connection uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire()
	for _, e := range l.live {
		if connection == 0 || e.Connection != connection || l.is(orphansLive) {
			continue
		}
		e.Connection = 0
		until := l.now() + ledgerOrphan
		if l.is(orphansEndAtOnce) {
			until = l.now()
		}
		if until < e.until {
			e.orphaned = until
		} else if l.is(orphansLiveLonger) {
			e.until = until
		}
	}
	for _, c := range l.cells {
		c.wake()
	}
}

// wake lets all who wait look at the times again.
func (c *ledgerCell) wake() {
	close(c.changed)
	c.changed = make(chan struct{})
}

func (l *ledger) Running(of func(limits.Cell) bool) (running []limits.Running) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.is(listsDead) {
		l.expire()
	}
	for _, e := range l.live {
		if of(e.Lease.Cell) {
			r := e.Running
			until := e.until
			if e.orphaned > 0 {
				until = e.orphaned
			}
			r.Until = l.base.Add(until)
			running = append(running, r)
		}
	}
	return running
}

func openLedger(mistake string) LeaseSubject {
	return LeaseSubject{Leaser: newLedger(mistake), Started: time.Now(), TTL: ledgerTTL, OrphanTTL: ledgerOrphan}
}

func TestLedgerPasses(t *testing.T) {
	RunLeasesInBubble(t, func(*testing.T) LeaseSubject { return openLedger("") })
	Histories(t, 1000, func(*testing.T) LeaseSubject { return openLedger("") })
}

// The suite is worth what it refuses: each mistake is caught, by the case that is there for it.
func TestMistakesWithLeasesAreCaught(t *testing.T) {
	for _, tt := range []struct{ mistake, caughtBy string }{
		{leasesLiveForever, "LostEndIsOverInTime"},
		{expiresLate, "LostEndIsOverInTime"},
		{renewsNothing, "RenewedLivesOn"},
		{adoptsAll, "UnknownRenewalIsDropped"},
		{adoptsNothing, "ExpiredIsAdopted"},
		{adoptsNothing, "OlderRequestIsAdopted"},
		{adoptsOnlyExpired, "OlderRequestIsAdopted"},
		{adoptsEnded, "EndedIsNotAdopted"},
		{adoptsUpToLimit, "ExpiredIsAdopted"},
		{adoptsForever, "OlderRequestIsAdopted"},
		{knowsNoSkew, "OlderRequestIsAdopted"},
		{forgetsEarly, "EarlyEndBeatsRenewal"},
		{forgetsEarlyAll, "EarlyEndBeatsRenewal"},
		{endsUnknown, "EndTwiceOrOfNothing"},
		{endsByIdentity, "EndIsOfOneLease"},
		{endsByHTTP, "EndIsOfOneLease"},
		{endsOne, "EndOfIdentityEndsAll"},
		{endsInOneCell, "EndOfIdentityEndsAll"},
		{forgetsGone, "NothingIsGrantedToTheGone"},
		{remembersGone, "NothingIsGrantedToTheGone"},
		{zeroIsIdentity, "NoIdentityNoEndOfAll"},
		{repeatSpends, "SameLeaseSpendsNothing"},
		{repeatIsNew, "SameLeaseSpendsNothing"},
		{repeatKeepsTime, "SameLeaseLivesOn"},
		{repeatKeepsNode, "SameLeaseLivesOn"},
		{leasesAnyway, "RefusalTakesNothing"},
		{spendsAnyway, "RefusalTakesNothing"},
		{oneLeaseTooMany, "LimitThenRefusal"},
		{hintsNothing, "LongestWaitWithLeases"},
		{leasesNoLimit, "NoLimitNoLease"},
		{sharesCells, "LeaseAndRateShareNoCell"},
		{orphansEndAtOnce, "OrphansEndSoon"},
		{orphansLive, "OrphansEndSoon"},
		{orphansLiveLonger, "OrphansEndSoon"},
		{orphansCannotLive, "OrphansEndSoon"},
		{listsDead, "RunningIsListed"},
		{listsNoAdoption, "RunningIsListed"},
		{neverWaits, "WaitForAnEnd"},
		{waitsInTry, "WaitForAnEnd"},
		{ignoresDeadline, "WaitEndsInRefusal"},
		{sleepsThrough, "WaitForExpiry"},
		{sleepsThroughNodes, "WaitForOrphans"},
		{lastComeFirstServed, "FirstComeFirstServed"},
		{turnsAreFree, "NobodyOvertakes"},
		{losesTurnOfGone, "GoneWaiterIsSkipped"},
		{losesTurnOnPanic, "PanicLosesNoTurn"},
		{losesRefusedTurn, "TurnRefusedByRatePassesOn"},
		{holdsWhileWaiting, "WaitHoldsNothing"},
		{waitsForNothing, "WaitOnlyWhereNothingElseRefuses"},
		{ignoresRates, "TurnRefusedByRatePassesOn"},
		{ignoresRaised, "RaisedLimitWakes"},
		{ignoresLowered, "LoweredLimitGrantsNone"},
		{queuesForever, "QueuesAreBounded"},
		{waitsForever, "QueuesAreBounded"},
		{grantsInTwoSteps, "Throng"},
		{grantsToGone, "EndedWaiterGetsNothing"},
		{repeatSpends, "QuotasAreSpentWithTheLease"},
		{quotasAreHeld, "QuotasAreSpentWithTheLease"},
		{quotasAreForgotten, "TurnRefusedByQuotaPassesOn"},
		{lockoutIsForgotten, "TurnRefusedByQuotaPassesOn"},
		{locksUnreported, "LongestWaitWithQuotas"},
		{shadowRefusesLeases, "ShadowGrantsAboveTheLimit"},
		{shadowLeaseIsSilent, "ShadowGrantsAboveTheLimit"},
		{shadowLeavesWaiting, "ShadowGrantsAboveTheLimit"},
		{looksAtNoLeases, "LookAtLeases"},
		{looksAtDead, "LookAtLeases"},
	} {
		t.Run(tt.caughtBy+"/"+tt.mistake, func(t *testing.T) {
			failed := firstLeaseFailure(t, tt.mistake, tt.caughtBy)
			if failed == "" {
				t.Errorf("a leaser that %s passed", tt.mistake)
			}
			t.Log(failed)
		})
	}
}

// Random histories alone find what the cases find, but for what is not in them.
func TestHistoriesCatchMistakes(t *testing.T) {
	for _, mistake := range []string{
		leasesLiveForever, expiresLate, renewsNothing, adoptsAll, adoptsNothing, adoptsOnlyExpired, adoptsEnded,
		adoptsUpToLimit, adoptsForever, forgetsEarly, forgetsEarlyAll, endsUnknown, endsByIdentity, endsOne,
		endsInOneCell, forgetsGone, remembersGone, zeroIsIdentity, repeatIsNew, repeatKeepsTime,
		repeatKeepsNode, leasesAnyway, spendsAnyway, oneLeaseTooMany, orphansEndAtOnce, orphansLive,
		orphansLiveLonger, orphansCannotLive, neverWaits, waitsInTry, ignoresDeadline, sleepsThrough,
		sleepsThroughNodes, lastComeFirstServed, turnsAreFree, losesRefusedTurn, holdsWhileWaiting,
		waitsForNothing, ignoresRates, ignoresRaised, ignoresLowered, grantsToGone,
	} {
		t.Run(mistake, func(t *testing.T) {
			failed := failureOf(t, func(t failer) {
				histories(t, 20_000, func() *crowd { return newCrowd(t, openLedger(mistake)) })
			})
			if failed == "" {
				t.Errorf("a leaser that %s passed", mistake)
			}
		})
	}
}

// firstLeaseFailure runs a case with a leaser that makes a mistake, and returns the first failure; "": none.
func firstLeaseFailure(t *testing.T, mistake, name string) string {
	for _, c := range leaseCases {
		if c.name == name {
			return failureOf(t, func(t failer) { newCrowd(t, openLedger(mistake)).try(c.run) })
		}
	}
	t.Fatalf("no case %s", name)
	return ""
}
