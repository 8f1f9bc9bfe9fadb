package admin

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"keyward/authz/apikey"
)

// A Propagation says how far a committed change has come. The change is done either way.
type Propagation struct {
	Confirmed, Total int  // replicas
	Everywhere       bool // no replica acts on anything older
	// EffectiveEverywhereAt is when that is or was so, by the store's clock: in the future until
	// Everywhere. Zero if the store could not be asked.
	EffectiveEverywhereAt time.Time
}

// How long an answer waits for the replicas. A change that takes rights away is worth more patience.
const (
	revokeWait = 5 * time.Second
	createWait = time.Second

	firstPoll = 5 * time.Millisecond
	lastPoll  = 100 * time.Millisecond
)

// propagate waits until every replica has confirmed rev or run out, at most wait.
//
// A caller that went away ends the waiting, never the catching up of this process. Its last look at
// the replicas is made even then, so that what is returned is true.
func (s *Service) propagate(ctx context.Context, rev apikey.Revision, wait time.Duration) Propagation {
	work, cancel := context.WithTimeout(context.WithoutCancel(ctx), wait)
	defer cancel()
	if s.replicas != nil {
		if err := s.replicas.CatchUp(work, rev); err != nil {
			// No more than a delay: whether it caught up is what the store says below.
			s.log.Warn("this replica has not caught up with a change yet", slog.Uint64("revision", uint64(rev)), slog.Any("error", err))
		}
	}
	var p Propagation
	for pause := firstPoll; ; pause = min(2*pause, lastPoll) {
		look, cancelLook := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		replicas, err := s.store.Replicas(look)
		cancelLook()
		if err != nil {
			s.log.Warn("cannot ask which replicas know of a change", slog.Uint64("revision", uint64(rev)), slog.Any("error", err))
		} else if p = progress(replicas, rev); p.Everywhere {
			return p
		}
		select {
		case <-ctx.Done():
			return p
		case <-work.Done():
			return p
		case <-time.After(pause):
		}
	}
}

// progress judges one look at the replicas.
func progress(replicas []Replica, rev apikey.Revision) Propagation {
	p := Propagation{Total: len(replicas), EffectiveEverywhereAt: now()}
	if len(replicas) > 0 {
		p.EffectiveEverywhereAt = replicas[0].Now
	}
	for _, r := range replicas {
		switch {
		case r.Confirmed >= rev:
			p.Confirmed++
		case r.Until.After(p.EffectiveEverywhereAt):
			p.EffectiveEverywhereAt = r.Until
		}
	}
	p.Everywhere = p.Confirmed == p.Total
	p.EffectiveEverywhereAt = p.EffectiveEverywhereAt.UTC()
	return p
}

// head is the newest revision, for a change that was made earlier.
func (s *Service) head(ctx context.Context) (apikey.Revision, error) {
	// Every look-up says how fresh the store is; that nothing has this digest does not matter.
	_, rev, err := s.store.FindKey(ctx, apikey.Digest{})
	if err != nil && !isNotFound(err) {
		return 0, err
	}
	return rev, nil
}

// ofKey is what follows a change of one key: its revision, which the key is given. Where there was nothing to do, it
// is the newest, since the same change may still be on its way from when it was made.
func (s *Service) ofKey(ctx context.Context, k *apikey.Key, rev apikey.Revision, err error) (apikey.Revision, error) {
	switch {
	case errors.Is(err, errNothing):
		return s.head(ctx)
	case err != nil:
		return 0, err
	}
	k.Revision = rev
	return rev, nil
}
