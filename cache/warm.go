package cache

import (
	"context"
	"errors"
	"time"

	"keyward/authz/apikey"
)

const (
	// warmBatch is how many keys are set before ristretto is waited for: its queue takes 32,768, and drops
	// what comes when that is full.
	warmBatch = 8192
	// warmTries is how often a key that is not there after its Set is set again.
	warmTries = 3
	// warmProgress is how often the log says how far loading has come.
	warmProgress = 5 * time.Second
)

// warmUp loads the keys that were used last, as many as the cache holds, and reads each of them back. It
// ends when it has them or when its time is over: the rest is loaded when it is asked for.
//
// Polls go on meanwhile, and requests that come are answered. What keeps it right is what keeps every
// load right: the generations of all stripes are read first, then the newest revision heard of, and only
// then the store; what comes of a digest whose stripe was counted up since is not kept. And what the store
// was asked for on behalf of a request is left alone: the answer may be from after a change that no poll
// has shown yet, and whoever heard of it must not be told the old story again.
func (c *Cache) warmUp(ctx context.Context) {
	defer func() {
		c.records.warmed()
		c.warm.Store(true)
	}()
	if c.cfg.WarmUp == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.WarmUp)
	defer cancel()
	begin := time.Now()
	w := warming{Cache: c, generations: c.records.generations(), said: begin}
	heard := c.follower.heard.Load()
	err := w.read(ctx, heard)
	took := time.Since(begin)
	c.metrics.warmSeconds.Set(took.Seconds())
	log := c.log.With("keys", w.kept, "took", took.Round(time.Millisecond))
	switch {
	case err == nil && w.lost == 0:
		log.Info("the keys that were used last are in the cache")
	case err == nil:
		log.Warn("not all of the keys that were used last are in the cache: the rest is loaded when it is asked for", "lost", w.lost)
	case errors.Is(context.Cause(ctx), context.DeadlineExceeded):
		log.Warn("the time to load keys into the cache is over: the rest is loaded when it is asked for", "cache.warmUp", c.cfg.WarmUp)
	case ctx.Err() != nil: // the end of Run
	default:
		log.Error("cannot load keys into the cache: they are loaded when they are asked for", "err", c.failed("recent_keys", err))
	}
}

// A warming is a warm-up under way.
type warming struct {
	*Cache
	generations []uint64 // of the stripes, from before the store was asked
	batch       []*apikey.Key
	kept, lost  int
	said        time.Time // when the log last heard of it
}

func (w *warming) read(ctx context.Context, heard uint64) (err error) {
	defer w.recovered("warm up", &err)
	asked, old := 0, false
	err = w.store.RecentKeys(ctx, func(k *apikey.Key, at apikey.Revision) bool {
		if old = uint64(at) < heard; old {
			return false
		}
		w.batch = append(w.batch, w.packer.pack(k))
		asked++
		if len(w.batch) == warmBatch {
			w.keep()
		}
		return asked < w.cfg.Records && ctx.Err() == nil
	})
	w.keep()
	if old {
		err = errors.New("the store's answer is older than what this server has seen")
	}
	return errors.Join(err, ctx.Err())
}

// keep puts a batch into the cache and reads it back: ristretto drops what comes too fast, and says so
// only sometimes.
func (w *warming) keep() {
	for range warmTries {
		if len(w.batch) == 0 {
			break
		}
		left := w.batch[:0]
		for _, k := range w.batch {
			if now, _ := w.records.get(&k.Digest); now != nil {
				w.kept++
				continue
			}
			// Where that is refused it changed since, or is being read: whoever asks for it gets it from the store.
			if w.records.warm(&k.Digest, record{k, w.generations[stripeIndex(&k.Digest)]}) {
				left = append(left, k)
			}
		}
		w.batch = left
		w.records.keys.Wait()
	}
	for _, k := range w.batch {
		if now, _ := w.records.get(&k.Digest); now != nil {
			w.kept++
		} else {
			w.lost++
		}
	}
	w.batch = w.batch[:0]
	w.metrics.warmRecords.Set(float64(w.kept))
	if now := time.Now(); now.Sub(w.said) >= warmProgress {
		w.log.Info("loading keys into the cache", "keys", w.kept, "of at most", w.cfg.Records)
		w.said = now
	}
}
