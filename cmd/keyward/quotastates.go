package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"keyward/authz/store/sqlite"
	"keyward/limits"
	"keyward/limits/local"
)

const (
	// saveQuotasEvery is how often what long quotas have counted is written down. A crash forgets what was
	// counted since the last time began: with a store that answers, less than 10 s.
	saveQuotasEvery = 5 * time.Second
	// quotaBatch states are written in one transaction, so that no other change waits long.
	quotaBatch = 500
	// forgetQuotasEvery is how often states that say nothing more are removed.
	forgetQuotasEvery = time.Hour
	// lastSave is how long the last time may take.
	lastSave = 10 * time.Second
)

// A quotaKeeper keeps what long quotas count over a restart.
type quotaKeeper struct {
	store   *sqlite.Store
	limiter *local.Limiter
	log     *slog.Logger
	saved   time.Duration // what was counted until then, on the limiter's clock, is written down
	failing bool
}

// restore gives the limiter what another process has counted. Call it before anything is served.
func (k *quotaKeeper) restore(ctx context.Context) error {
	var batch []limits.QuotaState
	restored := 0
	take := func() {
		if err := k.limiter.RestoreQuotas(batch); err != nil {
			k.log.Error("some quotas count from nothing", "error", err)
		}
		restored += len(batch)
		batch = batch[:0]
	}
	err := k.store.QuotaStates(ctx, time.Now(), func(s limits.QuotaState) bool {
		if batch = append(batch, s); len(batch) == quotaBatch {
			take()
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("read what quotas have counted: %w", err)
	}
	take()
	if restored > 0 {
		k.log.Info("quotas go on with what was counted before", "states", restored)
	}
	return nil
}

// run saves until ctx is done, and then once more.
func (k *quotaKeeper) run(ctx context.Context) error {
	save, forget := time.NewTicker(saveQuotasEvery), time.NewTicker(forgetQuotasEvery)
	defer save.Stop()
	defer forget.Stop()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastSave)
			defer cancel()
			k.save(last)
			return nil
		case <-save.C:
			k.save(ctx)
		case <-forget.C:
			if err := k.store.ForgetQuotaStates(ctx, time.Now()); err != nil && ctx.Err() == nil {
				k.log.Warn("what quotas have counted long ago could not be removed", "error", err)
			}
		}
	}
}

// save writes down what was counted since the last time. What could not be written is written next time.
func (k *quotaKeeper) save(ctx context.Context) {
	var batch []limits.QuotaState
	var failed error
	write := func() bool {
		if len(batch) > 0 && failed == nil {
			failed = k.store.SaveQuotaStates(ctx, batch)
		}
		batch = batch[:0]
		return failed == nil
	}
	next := k.limiter.SaveQuotas(k.saved, func(s limits.QuotaState) bool {
		batch = append(batch, s)
		return len(batch) < quotaBatch || write()
	})
	if write() {
		k.saved = next
		if k.failing {
			k.log.Info("what quotas count is written down again")
		}
	} else if ctx.Err() == nil && !k.failing {
		k.log.Error("what quotas count could not be written down: a restart would forget it", "error", failed)
	}
	k.failing = failed != nil
}
