package limitstest

import (
	"math/big"
	"time"

	"keyward/limits"
)

// A Bucket is a token bucket in exact fractions, written from what a rate promises and not from how
// package limits keeps it: the oracle that rules and limiters are held to. It starts full. Its times
// are nanoseconds on a clock of its user's, and never go back. Not safe for concurrent use.
type Bucket struct {
	rate   limits.Rate
	tokens *big.Rat // from 0 to rate.Burst
	at     int64    // when tokens was right
}

// Wait returns how long after now a request at rate r would pass; 0: now. Where r is not the rate of the
// time before, what is missing from the bucket is missing for as long as it would have been, and what a
// smaller bucket cannot hold is forgotten.
func (b *Bucket) Wait(r limits.Rate, now int64) time.Duration {
	if b.tokens == nil {
		b.rate, b.at, b.tokens = r, now, new(big.Rat).SetInt64(r.Burst)
	}
	interval := func(r limits.Rate) *big.Rat { return new(big.Rat).SetInt64(int64(r.Interval)) }

	earned := new(big.Rat).SetInt64(now - b.at)
	b.tokens.Add(b.tokens, earned.Quo(earned, interval(b.rate)))
	if full := new(big.Rat).SetInt64(b.rate.Burst); b.tokens.Cmp(full) > 0 {
		b.tokens = full
	}
	b.at = now

	if r != b.rate {
		missing := new(big.Rat).SetInt64(b.rate.Burst)
		missing.Sub(missing, b.tokens).Mul(missing, interval(b.rate)).Quo(missing, interval(r))
		b.tokens = new(big.Rat).SetInt64(r.Burst)
		if b.tokens.Sub(b.tokens, missing); b.tokens.Sign() < 0 {
			b.tokens = new(big.Rat)
		}
		b.rate = r
	}

	lacking := new(big.Rat).SetInt64(1)
	if lacking.Sub(lacking, b.tokens).Sign() <= 0 {
		return 0
	}
	lacking.Mul(lacking, interval(r))
	whole, rest := new(big.Int).QuoRem(lacking.Num(), lacking.Denom(), new(big.Int))
	if rest.Sign() > 0 {
		whole.Add(whole, big.NewInt(1))
	}
	return time.Duration(whole.Int64())
}

// Spend takes a token that the last Wait said is there.
func (b *Bucket) Spend() { b.tokens.Sub(b.tokens, new(big.Rat).SetInt64(1)) }
