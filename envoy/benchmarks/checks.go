package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"keyward/envoy/traffic"
)

// The servers that are compared.
const (
	constant        = "constant"
	constantTuned   = "constant, tuned"
	keywardStandard = "keyward, standard codec"
	keywardShipped  = "keyward"
	keywardGC100    = "keyward, GOGC=100"
	keywardGC400    = "keyward, GOGC=400"
)

// A visit is one way to load a server.
type visit struct {
	name                 string
	connections, streams int
	rate, unknown        float64
}

var visits = []visit{
	{name: "1×1", connections: 1, streams: 1},
	{name: "4×8", connections: 4, streams: 8},
	{name: "8×32", connections: 8, streams: 32},
	{name: "4×8, half unknown", connections: 4, streams: 8, unknown: 0.5},
	{name: "10,000/s", connections: 4, streams: 64, rate: 10_000},
}

// A series is what the visits of one kind to one server measured, round by round.
type series struct{ cpu, rps, p50, p99 []float64 } // µs, requests per second, µs, µs

func (s *series) add(r *traffic.Result) {
	s.cpu = append(s.cpu, float64(r.CPUPerRequest)/1e3)
	s.rps = append(s.rps, r.PerSec)
	s.p50 = append(s.p50, r.Latency.P50)
	s.p99 = append(s.p99, r.Latency.P99)
}

// compareChecks measures, and writes the tables.
func compareChecks(ctx context.Context, o options) error {
	pinned, err := pin()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "keyward-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	servers, stop, err := startServers(ctx, o, dir, pinned)
	defer stop()
	if err != nil {
		return err
	}
	unknown := madeUp(min(o.keys, 100_000))
	measured := map[string]map[string]*series{}
	for _, v := range visits {
		measured[v.name] = map[string]*series{}
		for _, s := range servers {
			measured[v.name][s.name] = &series{}
		}
	}
	for round := range o.rounds {
		for _, v := range visits {
			say("round %d of %d: %s", round+1, o.rounds, v.name)
			for i := range servers {
				s := servers[(i+round)%len(servers)]
				err := again(ctx, s.name+" at "+v.name, func() error {
					r, err := pay(ctx, o, v, s, unknown, uint64(round))
					if err == nil {
						measured[v.name][s.name].add(r)
					}
					return err
				})
				if err != nil {
					return err
				}
			}
		}
	}
	flood, err := measureFlood(ctx, o, dir, pinned)
	if err != nil {
		return err
	}
	oracle, err := measureOracle(ctx, o, dir, pinned)
	if err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString(conditions(ctx, o, pinned, false))
	b.WriteString("\n")
	cpu := func(name string) []float64 { return measured["4×8"][name].cpu }
	b.WriteString(promiseTable([]promise{
		promised("CPU per request at 4×8: keyward, GOGC=100 ÷ constant", 0.65, ratios(cpu(keywardGC100), cpu(constant))),
		promised("CPU per request at 4×8: keyward, GOGC=400 ÷ constant", 0.45, ratios(cpu(keywardGC400), cpu(constant))),
		promised("p99 at 10,000/s: keyward ÷ constant", 1, ratios(measured["10,000/s"][keywardShipped].p99, measured["10,000/s"][constant].p99)),
		promised("CPU per request: keyward, half of the keys unknown ÷ all valid", 1.1, ratios(measured["4×8, half unknown"][keywardShipped].cpu, cpu(keywardShipped))),
	}))
	for _, v := range visits {
		fmt.Fprintf(&b, "\n**%s**\n\n| | CPU µs/request | ÷ constant | ÷ constant, tuned | requests/s | p50 µs | p99 µs |\n|---|---|---|---|---|---|---|\n", v.title())
		for _, s := range servers {
			m := measured[v.name][s.name]
			fmt.Fprintf(&b, "| %s | %.1f | %.2f | %.2f | %.0f | %.0f | %.0f |\n", s.name, median(m.cpu),
				median(ratios(m.cpu, measured[v.name][constant].cpu)), median(ratios(m.cpu, measured[v.name][constantTuned].cpu)),
				median(m.rps), median(m.p50), median(m.p99))
		}
	}
	b.WriteString(flood)
	b.WriteString(oracle)
	return publish(o.doc, "bench", b.String())
}

func (v visit) title() string {
	switch {
	case v.rate > 0:
		return fmt.Sprintf("Fixed rate, %s, latency from when each request was due", v.name)
	case v.unknown > 0:
		return fmt.Sprintf("Closed loop, %d connections × %d streams, half of the keys unknown", v.connections, v.streams)
	}
	return fmt.Sprintf("Closed loop, %d connections × %d streams", v.connections, v.streams)
}

// startServers starts all that are compared, on copies of one store.
func startServers(ctx context.Context, o options, dir string, pinned bool) (all []*server, stop func(), err error) {
	stop = func() {
		var group sync.WaitGroup
		for _, s := range all {
			group.Go(s.stop)
		}
		group.Wait()
	}
	say("making %d keys", o.keys)
	first := filepath.Join(dir, "first")
	k, err := startKeyward(ctx, first, "keyward", keywardConfig{binary: filepath.Join(o.bin, "keyward")})
	if err != nil {
		return nil, stop, err
	}
	keys, err := k.makeKeys(ctx, "bench", o.keys, zeroTime)
	k.stop()
	if err != nil {
		return nil, stop, err
	}
	secrets := secretsOf(keys)
	for _, c := range []struct {
		name string
		args []string
		env  []string
	}{{name: constant}, {name: constantTuned, args: []string{"-workers", "256"}, env: []string{"GOGC=400"}}} {
		s, err := startConstant(ctx, dir, c.name, pinned, c.env, c.args...)
		if err != nil {
			return all, stop, err
		}
		all = append(all, s)
	}
	for i, c := range []struct {
		name, binary string
		env          []string
	}{
		{name: keywardStandard, binary: "keyward-standard"},
		{name: keywardShipped, binary: "keyward"},
		{name: keywardGC100, binary: "keyward", env: []string{"GOGC=100"}},
		{name: keywardGC400, binary: "keyward", env: []string{"GOGC=400"}},
	} {
		own := filepath.Join(dir, fmt.Sprint(i))
		if err := copyState(first, own); err != nil {
			return all, stop, err
		}
		k, err := startKeyward(ctx, own, c.name, keywardConfig{binary: filepath.Join(o.bin, c.binary), env: c.env, pinned: pinned})
		if err != nil {
			return all, stop, err
		}
		all = append(all, &k.server)
	}
	for _, s := range all {
		s.secrets = secrets
	}
	return all, stop, nil
}

// pay loads a server. A wrong answer is an error: what answers wrongly has no speed.
func pay(ctx context.Context, o options, v visit, s *server, unknown *traffic.Secrets, seed uint64) (*traffic.Result, error) {
	refused := []int{http.StatusUnauthorized}
	if strings.HasPrefix(s.name, constant) {
		refused = s.want // it knows nothing
	}
	r, err := traffic.Run(ctx, traffic.Config{
		Address: s.address, Connections: v.connections, Streams: v.streams, Rate: v.rate,
		Warmup: o.warmup, Duration: o.measure, Timeout: patience, Zipf: 1.1, Seed: seed, CPU: s.cpu,
		Path: "/orders/1048576?expand=items",
		Classes: []traffic.Class{
			{Name: "valid", Share: 1 - v.unknown, Secrets: s.secrets, Want: s.want},
			{Name: "unknown", Share: v.unknown, Secrets: unknown, Want: refused},
		},
	})
	if err != nil {
		return nil, err
	}
	return r, right(r)
}

// right reports answers that were not.
func right(r *traffic.Result) error {
	if n := r.ErrorCount(); n > 0 {
		return fmt.Errorf("%d errors, most of them: %s", n, r.ErrorKinds()[0])
	}
	return nil
}
