package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"keyward/envoy/envoytest"
	"keyward/envoy/generate"
)

// The ways to have Envoy authorize. All have the same Envoy, as keyward envoy generate writes it, and
// differ in what is named.
const (
	wayNone       = "no authorizer"
	wayOwn        = "Envoy's api_key_auth + local_ratelimit"
	wayConstant   = "constant"
	wayTCP        = "keyward, TCP"
	wayUnix       = "keyward, Unix socket"
	wayALS        = "keyward, max-concurrent, als"
	wayALSBatched = "keyward, max-concurrent, alsBatched"
	wayOTLP       = "keyward, max-concurrent, otlp"
)

// concurrent is the max-concurrent of keys that have one: more than a benchmark asks at once.
const concurrent = 1000

// A way is one Envoy, and the authorizer behind it.
type way struct {
	name       string
	envoy      *envoytest.Process
	authorizer *server // nil: none
}

// connectionCounts are how many clients there are at once.
var connectionCounts = []int{1, 16, 128}

// A costs is what one way costs at one number of connections, round by round, in µs.
type costs struct{ envoy, authorizer, p50, p99 []float64 }

func (c *costs) both() []float64 { return plus(c.envoy, c.authorizer, 1) }

// plus is a + f·b, round by round.
func plus(a, b []float64, f float64) []float64 {
	out := make([]float64, len(a))
	for i := range a {
		out[i] = a[i] + f*b[i]
	}
	return out
}

// compareEnvoys measures, and writes the tables.
func compareEnvoys(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp("", "keyward-bench-envoy-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ways, secrets, stop, err := startWays(ctx, o, dir)
	defer stop()
	if err != nil {
		return err
	}
	measured := map[int]map[string]*costs{}
	for _, n := range connectionCounts {
		measured[n] = map[string]*costs{}
		for _, w := range ways {
			measured[n][w.name] = &costs{}
		}
	}
	for round := range o.rounds {
		for _, n := range connectionCounts {
			say("round %d of %d: %d connections", round+1, o.rounds, n)
			for i := range ways {
				w := ways[(i+round)%len(ways)]
				if err := again(ctx, fmt.Sprintf("%s, %d connections", w.name, n), func() error {
					return w.visit(ctx, o, n, secrets, measured[n][w.name])
				}); err != nil {
					return err
				}
			}
		}
	}
	return publish(o.doc, "bench-envoy", envoyReport(ctx, o, ways, measured))
}

func (w *way) visit(ctx context.Context, o options, connections int, secrets [][]byte, into *costs) error {
	l := httpLoad{
		address: w.envoy.Listener("ingress"), connections: connections, secrets: secrets, warmup: o.warmup, duration: o.measure,
		cpu: []func() (time.Duration, error){func() (time.Duration, error) { return processTime(w.envoy.Pid()) }},
	}
	if w.authorizer != nil {
		l.cpu = append(l.cpu, w.authorizer.cpu)
	}
	r, err := l.run(ctx)
	if err != nil {
		return err
	}
	into.envoy = append(into.envoy, float64(r.cpu[0])/1e3)
	own := 0.0
	if w.authorizer != nil {
		own = float64(r.cpu[1]) / 1e3
	}
	into.authorizer = append(into.authorizer, own)
	into.p50, into.p99 = append(into.p50, r.p50), append(into.p99, r.p99)
	return nil
}

func envoyReport(ctx context.Context, o options, ways []*way, measured map[int]map[string]*costs) string {
	var b strings.Builder
	b.WriteString(conditions(ctx, o, false, true))
	b.WriteString("\n")
	// What a way adds, to both processes, relative to what the constant server adds.
	added := func(n int, name string) []float64 {
		return plus(measured[n][name].both(), measured[n][wayNone].both(), -1)
	}
	var promises []promise
	for i, n := range connectionCounts {
		promises = append(promises, promised(fmt.Sprintf("CPU added at %d connections: keyward, TCP ÷ constant", n), []float64{0.95, 0.90, 0.80}[i],
			ratios(added(n, wayTCP), added(n, wayConstant))))
	}
	b.WriteString(promiseTable(promises))
	for _, n := range connectionCounts {
		fmt.Fprintf(&b, "\n**%d connections**\n\n| | Envoy CPU µs/request | authorizer | added, both | ÷ constant | added p50 µs | added p99 µs |\n|---|---|---|---|---|---|---|\n", n)
		for _, w := range ways {
			m, none := measured[n][w.name], measured[n][wayNone]
			authorizer := "–"
			if w.authorizer != nil {
				authorizer = fmt.Sprintf("%.1f", median(m.authorizer))
			}
			if w.name == wayNone {
				fmt.Fprintf(&b, "| %s | %.1f | – | 0 | – | 0 (%.0f) | 0 (%.0f) |\n", w.name, median(m.envoy), median(m.p50), median(m.p99))
				continue
			}
			fmt.Fprintf(&b, "| %s | %.1f | %s | %.1f | %.2f | %.0f | %.0f |\n", w.name, median(m.envoy), authorizer,
				median(added(n, w.name)), median(ratios(added(n, w.name), added(n, wayConstant))),
				median(plus(m.p50, none.p50, -1)), median(plus(m.p99, none.p99, -1)))
		}
	}
	return b.String()
}

// startWays starts an Envoy for each way, and what it asks.
func startWays(ctx context.Context, o options, dir string) (ways []*way, secrets [][]byte, stop func(), err error) {
	stop = func() {
		for _, w := range ways {
			if w.envoy != nil {
				_ = w.envoy.Kill() // it keeps nothing
			}
			if w.authorizer != nil {
				w.authorizer.stop()
			}
		}
	}
	binary, err := envoytest.Find("")
	if err != nil {
		return nil, nil, stop, err
	}
	say("making %d keys", o.keys)
	first := filepath.Join(dir, "first")
	k, err := startKeyward(ctx, first, "keyward", keywardConfig{binary: filepath.Join(o.bin, "keyward")})
	if err != nil {
		return nil, nil, stop, err
	}
	free, err := k.makeKeys(ctx, "bench", o.keys, zeroTime)
	k.stop()
	if err != nil {
		return nil, nil, stop, err
	}
	for _, key := range free {
		secrets = append(secrets, []byte(key.secret))
	}
	for i, c := range []struct {
		name     string
		feedback generate.Feedback // of a keyward with leases
		unix     bool
	}{
		{name: wayNone}, {name: wayOwn}, {name: wayConstant}, {name: wayTCP}, {name: wayUnix, unix: true},
		{name: wayALS, feedback: generate.FeedbackALS},
		{name: wayALSBatched, feedback: generate.FeedbackALSBatched},
		{name: wayOTLP, feedback: generate.FeedbackOTLP},
	} {
		say("starting: %s", c.name)
		w := &way{name: c.name}
		ways = append(ways, w)
		switch c.name {
		case wayNone, wayOwn:
		case wayConstant:
			if w.authorizer, err = startConstant(ctx, dir, c.name, false, nil); err != nil {
				return ways, nil, stop, err
			}
		default:
			own := filepath.Join(dir, fmt.Sprint(i))
			if err := copyState(first, own); err != nil {
				return ways, nil, stop, err
			}
			more := ""
			if c.feedback != "" {
				more = fmt.Sprintf("concurrency: {feedback: %s}\n", c.feedback)
			}
			k, err := startKeyward(ctx, own, c.name, keywardConfig{binary: filepath.Join(o.bin, "keyward"), unix: c.unix, yaml: more})
			if err != nil {
				return ways, nil, stop, err
			}
			w.authorizer = &k.server
			if c.feedback != "" {
				// The same keys, each with a max-concurrent now.
				if err := k.limitConcurrency(ctx, "bench", concurrent); err != nil {
					return ways, nil, stop, err
				}
			}
		}
		bootstrap, err := w.bootstrap(c.feedback, secrets)
		if err != nil {
			return ways, nil, stop, err
		}
		if w.envoy, err = envoytest.Start(ctx, envoytest.Config{Binary: binary, Bootstrap: bootstrap}); err != nil {
			return ways, nil, stop, err
		}
		if w.authorizer != nil {
			if err := w.awaitHealthy(ctx); err != nil {
				return ways, nil, stop, err
			}
		}
	}
	return ways, secrets, stop, nil
}

// awaitHealthy waits until Envoy's health checks have found the authorizer.
func (w *way) awaitHealthy(ctx context.Context) error {
	return w.authorizer.await(ctx, w.name, func() bool {
		stats, err := w.envoy.Stats(ctx, `^cluster\.keyward\.membership_healthy$`)
		return err == nil && stats["cluster.keyward.membership_healthy"] == 1
	})
}

// bootstrap is Envoy's configuration: what keyward generates, with an answer of its own in the place of an
// upstream, and another authorizer or none where that is asked for.
func (w *way) bootstrap(feedback generate.Feedback, secrets [][]byte) ([]byte, error) {
	c := generate.Config{Listen: "127.0.0.1:0", Upstreams: []string{"127.0.0.1:1"}, Feedback: feedback, CheckTimeout: 5 * time.Second}
	if w.authorizer != nil {
		c.Keyward = w.authorizer.address
	}
	text, err := generate.Envoy(c)
	if err != nil {
		return nil, err
	}
	var config map[string]any
	if err := yaml.Unmarshal(text, &config); err != nil {
		return nil, err
	}
	resources := object(config["static_resources"])
	manager := object(object(first(object(first(object(first(resources["listeners"]))["filter_chains"]))["filters"]))["typed_config"])
	route := object(first(object(first(object(manager["route_config"])["virtual_hosts"]))["routes"]))
	if route == nil || manager["http_filters"] == nil {
		return nil, errors.New("the generated configuration is not built as it was: see way.bootstrap")
	}
	delete(route, "route")
	route["direct_response"] = map[string]any{"status": 200, "body": map[string]any{"inline_string": "ok\n"}}
	if feedback == "" {
		delete(manager, "access_log") // it is for leases, which nobody grants here
		delete(manager, "access_log_options")
	}
	if w.authorizer == nil {
		var clusters []any
		for _, cluster := range resources["clusters"].([]any) {
			if object(cluster)["name"] != "keyward" {
				clusters = append(clusters, cluster)
			}
		}
		resources["clusters"] = clusters
		var filters []any
		for _, f := range manager["http_filters"].([]any) {
			if object(f)["name"] != "envoy.filters.http.ext_authz" {
				filters = append(filters, f)
			} else if w.name == wayOwn {
				filters = append(filters, ownFilters(secrets)...)
			}
		}
		manager["http_filters"] = filters
	}
	return json.Marshal(config)
}

// ownFilters are Envoy's nearest: keys in the configuration, and one bucket for all.
func ownFilters(secrets [][]byte) []any {
	var credentials []any
	for i, s := range secrets {
		credentials = append(credentials, map[string]any{"key": string(s), "client": fmt.Sprintf("client-%d", i)})
	}
	all := map[string]any{"default_value": map[string]any{"numerator": 100, "denominator": "HUNDRED"}}
	return []any{
		map[string]any{"name": "envoy.filters.http.api_key_auth", "typed_config": map[string]any{
			"@type":       "type.googleapis.com/envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuth",
			"credentials": credentials, "key_sources": []any{map[string]any{"header": "x-api-key"}},
		}},
		map[string]any{"name": "envoy.filters.http.local_ratelimit", "typed_config": map[string]any{
			"@type":          "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
			"stat_prefix":    "own",
			"token_bucket":   map[string]any{"max_tokens": 1_000_000_000, "tokens_per_fill": 1_000_000_000, "fill_interval": "1s"},
			"filter_enabled": all, "filter_enforced": all,
		}},
	}
}

func object(v any) map[string]any {
	m, _ := v.(map[string]any)
	return m
}

func first(v any) any {
	if list, ok := v.([]any); ok && len(list) > 0 {
		return list[0]
	}
	return nil
}
