package admin

import (
	"context"
	"log/slog"
	"time"

	"keyward/authz/apikey"
)

// A Redigester gives keys that were found by the previous pepper their digest under the current one, in
// the background and in batches. A digest needs the secret, so it can happen only when a key is used.
// Safe for concurrent use.
type Redigester struct {
	store   Store
	version uint32
	learn   func(apikey.Digest)
	queue   chan Redigest
	log     *slog.Logger
}

const (
	redigestQueue = 1024
	redigestBatch = 256
	redigestEvery = time.Second
)

// NewRedigester returns a Redigester for the pepper of a version. learn hears of every digest that was
// written, so that this replica's set of known digests has it too.
func NewRedigester(store Store, version uint32, learn func(apikey.Digest), log *slog.Logger) *Redigester {
	return &Redigester{store: store, version: version, learn: learn, queue: make(chan Redigest, redigestQueue), log: log}
}

// Redigest queues a digest. When the queue is full the key has to wait for its next use: nothing is lost,
// since the old digest goes on finding it.
func (r *Redigester) Redigest(old, current apikey.Digest) {
	select {
	case r.queue <- Redigest{Old: old, New: current, Version: r.version}:
	default:
	}
}

// Run writes until ctx is done.
func (r *Redigester) Run(ctx context.Context) error {
	tick := time.NewTicker(redigestEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			r.write(ctx)
		}
	}
}

func (r *Redigester) write(ctx context.Context) {
	seen := map[apikey.Digest]bool{}
	var batch []Redigest
	for len(batch) < redigestBatch {
		select {
		case one := <-r.queue:
			if !seen[one.Old] {
				seen[one.Old] = true
				batch = append(batch, one)
			}
			continue
		default:
		}
		break
	}
	if len(batch) == 0 {
		return
	}
	if err := r.store.Redigest(ctx, batch); err != nil {
		r.log.Warn("digests under the new pepper could not be written; they are tried again at the next use", "keys", len(batch), "error", err)
		return
	}
	for _, one := range batch {
		r.learn(one.New)
	}
}
