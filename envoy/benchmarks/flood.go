package main

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"keyward/envoy/traffic"
)

// patience is a timeout that a busy machine does not reach.
const patience = 10 * time.Second

var zeroTime time.Time

// measureFlood asks with valid keys at a fixed rate, alone and beside as many made-up keys as get
// through, and returns what the valid ones felt.
func measureFlood(ctx context.Context, o options, dir string, pinned bool) (string, error) {
	const rate = 2000
	k, err := startKeyward(ctx, filepath.Join(dir, "flood"), "keyward", keywardConfig{binary: filepath.Join(o.bin, "keyward"), pinned: pinned})
	if err != nil {
		return "", err
	}
	defer k.stop()
	keys, err := k.makeKeys(ctx, "bench", min(o.keys, 1000), zeroTime)
	if err != nil {
		return "", err
	}
	made := madeUp(o.flood)
	valid := traffic.Config{
		Address: k.address, Connections: 2, Streams: 64, Rate: rate, Warmup: o.warmup, Duration: o.measure, Timeout: patience, Zipf: 1.1,
		Classes: []traffic.Class{{Name: "valid", Share: 1, Secrets: secretsOf(keys), Want: k.want}},
	}
	flood := traffic.Config{
		Address: k.address, Connections: 2, Streams: 8, Warmup: o.warmup, Duration: o.measure, Timeout: patience,
		// 503 is shed: over the budget for reads of the store.
		Classes: []traffic.Class{{Name: "made up", Share: 1, Secrets: made, Want: []int{http.StatusUnauthorized, http.StatusServiceUnavailable}}},
	}
	var quiet50, quiet99, loud50, loud99, refused []float64
	for round := range o.rounds {
		say("flood: round %d of %d", round+1, o.rounds)
		flood.Seed = uint64(round)
		err := again(ctx, "flood", func() error {
			quiet, err := traffic.Run(ctx, valid)
			if err == nil {
				err = right(quiet)
			}
			if err != nil {
				return err
			}
			var group errgroup.Group
			var loud, beside *traffic.Result
			group.Go(func() (err error) {
				if beside, err = traffic.Run(ctx, flood); err == nil {
					err = right(beside)
				}
				return err
			})
			group.Go(func() (err error) {
				if loud, err = traffic.Run(ctx, valid); err == nil {
					err = right(loud)
				}
				return err
			})
			if err := group.Wait(); err != nil {
				return err
			}
			quiet50, quiet99 = append(quiet50, quiet.Latency.P50), append(quiet99, quiet.Latency.P99)
			loud50, loud99 = append(loud50, loud.Latency.P50), append(loud99, loud.Latency.P99)
			refused = append(refused, beside.PerSec)
			return nil
		})
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("\n**Flood: valid keys at %d/s, beside a closed loop (2 × 8) of %d distinct made-up keys**\n\n"+
		"| | p50 µs | p99 µs | made-up keys/s |\n|---|---|---|---|\n| alone | %.0f | %.0f | – |\n| in the flood | %.0f | %.0f | %.0f |\n",
		rate, o.flood, median(quiet50), median(quiet99), median(loud50), median(loud99), median(refused)), nil
}
