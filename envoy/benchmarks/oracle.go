package main

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/envoy/traffic"
)

// oracleKeys are the keys of each class of refused ones.
const oracleKeys = 100

// suspicious is the t from which the field (dudect) calls two timings different.
const suspicious = 4.5

// moments are mean and variance of a sample.
type moments struct{ n, mean, variance float64 }

func momentsOf(v []float64) moments {
	m := moments{n: float64(len(v))}
	for _, x := range v {
		m.mean += x / m.n
	}
	for _, x := range v {
		m.variance += (x - m.mean) * (x - m.mean) / (m.n - 1)
	}
	return m
}

// welch is Student's t for samples of unequal variance.
func welch(a, b moments) float64 {
	return (a.mean - b.mean) / math.Sqrt(a.variance/a.n+b.variance/b.n)
}

// crop takes away what lies above the 95th percentile of all samples together: interrupts and garbage
// collections, which hide what is looked for.
func crop(classes [][]float64) [][]float64 {
	all := slices.Sorted(slices.Values(slices.Concat(classes...)))
	limit := all[len(all)*95/100]
	out := make([][]float64, len(classes))
	for i, class := range classes {
		out[i] = slices.DeleteFunc(slices.Clone(class), func(x float64) bool { return x > limit })
	}
	return out
}

// measureOracle compares how long keyward takes to refuse keys that never were, and keys that were and are
// not good any more: over the wire, one request at a time, the classes mixed at random.
func measureOracle(ctx context.Context, o options, dir string, pinned bool) (string, error) {
	k, err := startKeyward(ctx, filepath.Join(dir, "oracle"), "keyward", keywardConfig{binary: filepath.Join(o.bin, "keyward"), pinned: pinned})
	if err != nil {
		return "", err
	}
	defer k.stop()
	say("no oracle: making keys that are not good any more")
	refused, err := refusedKeys(ctx, k)
	if err != nil {
		return "", err
	}
	classes := make([]traffic.Class, len(refused))
	for i, c := range refused {
		secrets := &traffic.Secrets{}
		for _, s := range c.secrets {
			secrets.Add(s)
		}
		classes[i] = traffic.Class{Name: c.name, Share: 1, Secrets: secrets, Want: []int{http.StatusUnauthorized}}
	}
	samples := make([][]float64, len(classes))
	fewest := func() int {
		return len(slices.MinFunc(samples, func(a, b []float64) int { return cmp.Compare(len(a), len(b)) }))
	}
	for perSec, seed := 1000.0, uint64(0); fewest() < o.samples; {
		missing := time.Duration(float64((o.samples-fewest())*len(classes)) / perSec * float64(time.Second))
		err := again(ctx, "refused keys", func() error {
			seed++
			took := make([][]float64, len(classes))
			r, err := traffic.Run(ctx, traffic.Config{
				Address: k.address, Warmup: o.warmup, Duration: min(missing+100*time.Millisecond, 30*time.Second), Timeout: patience, Classes: classes, Seed: seed,
				// One connection: this is called by one goroutine.
				Observe: func(class int, t time.Duration) { took[class] = append(took[class], float64(t)) },
			})
			if err == nil {
				err = right(r)
			}
			if err != nil {
				return err
			}
			for i := range samples {
				samples[i] = append(samples[i], took[i]...)
				samples[i] = samples[i][:min(len(samples[i]), o.samples)]
			}
			perSec = max(r.PerSec, 1)
			return nil
		})
		if err != nil {
			return "", err
		}
		say("no oracle: %d of %d samples of each class", fewest(), o.samples)
	}
	report := oracleTable("over the wire, one request at a time", refused, samples)
	k.stop()
	say("no oracle: in process")
	if samples, err = timeInProcess(ctx, o, k.dir, refused); err != nil {
		return "", err
	}
	return report + oracleTable("in process, from the Check's bytes to the answer's", refused, samples), nil
}

func oracleTable(where string, classes []refusedClass, samples [][]float64) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n**No oracle: time to refuse, %s; %d samples of each class, mixed at random**\n\n", where, len(samples[0]))
	b.WriteString("| class | mean µs | against unknown: difference ns | Welch's t | without the slowest 5 %: difference ns | t |\n|---|---|---|---|---|---|\n")
	cropped := crop(samples)
	worst := 0.0
	for i, class := range classes {
		all, core := momentsOf(samples[i]), momentsOf(cropped[i])
		if i == 0 {
			fmt.Fprintf(&b, "| %s | %.2f | – | – | – | – |\n", class.name, all.mean/1e3)
			continue
		}
		base, baseCore := momentsOf(samples[0]), momentsOf(cropped[0])
		t, tCore := welch(all, base), welch(core, baseCore)
		worst = max(worst, math.Abs(t), math.Abs(tCore))
		fmt.Fprintf(&b, "| %s | %.2f | %+.0f | %+.1f | %+.0f | %+.1f |\n", class.name, all.mean/1e3, all.mean-base.mean, t, core.mean-baseCore.mean, tCore)
	}
	if worst < suspicious {
		fmt.Fprintf(&b, "\nThe largest |t| is %.1f, below %.1f: these samples do not tell a refused key that exists from one that never did.\n", worst, suspicious)
	} else {
		fmt.Fprintf(&b, "\nThe largest |t| is %.1f, above %.1f: with as many samples, from so near, the classes can be told apart by the differences above. "+
			"A caller sees them under the noise of a network, and needs some (5 × noise ÷ difference)² requests with one key to be as sure.\n", worst, suspicious)
	}
	return b.String()
}

// A refusedClass is keys that are refused for the same cause.
type refusedClass struct {
	name    string
	secrets []string
}

func newRequest(secret string) (*traffic.Request, error) {
	return traffic.NewRequest("GET", "app.example", "/orders/1048576?expand=items", len(secret))
}

// refusedKeys makes the classes. The first never existed.
func refusedKeys(ctx context.Context, k *keyward) ([]refusedClass, error) {
	end := time.Now().Add(3 * time.Second)
	expired, err := k.makeKeys(ctx, "expired", oracleKeys, end)
	if err != nil {
		return nil, err
	}
	revoked, err := k.makeKeys(ctx, "revoked", oracleKeys, zeroTime)
	if err != nil {
		return nil, err
	}
	group, revoking := errgroup.WithContext(ctx)
	group.SetLimit(16)
	for _, key := range revoked {
		group.Go(func() error {
			_, err := k.client.RevokeKey(revoking, "revoked", key.id, "")
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	disabled, err := k.makeKeys(ctx, "disabled", oracleKeys, zeroTime)
	if err != nil {
		return nil, err
	}
	if _, err := k.client.PutInstance(ctx, "disabled", admin.PolicyInput{Disabled: true}); err != nil {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-time.After(time.Until(end) + time.Second):
	}
	texts := func(keys []madeKey) (all []string) {
		for _, key := range keys {
			all = append(all, key.secret)
		}
		return all
	}
	var unknown []string
	for range oracleKeys {
		unknown = append(unknown, apikey.Format{}.New(apikey.KindInstance).Reveal())
	}
	return []refusedClass{{"unknown", unknown}, {"revoked", texts(revoked)}, {"expired", texts(expired)}, {"disabled (its instance)", texts(disabled)}}, nil
}
