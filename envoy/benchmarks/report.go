package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"keyward/envoy/envoytest"
)

// median of some values; 0 of none.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// ratios divides round by round.
func ratios(a, b []float64) []float64 {
	var out []float64
	for i := range min(len(a), len(b)) {
		if b[i] != 0 {
			out = append(out, a[i]/b[i])
		}
	}
	return out
}

// A promise is what was measured against what was promised.
type promise struct {
	what    string
	got, at float64 // got has to be at most at
	low, up float64 // the range over the rounds
}

func (p promise) String() string {
	verdict := "met"
	if p.got > p.at {
		verdict = "**not met**"
	}
	return fmt.Sprintf("| %s | ≤ %.2f | %.2f [%.2f..%.2f] | %s |", p.what, p.at, p.got, p.low, p.up, verdict)
}

func promised(what string, at float64, perRound []float64) promise {
	p := promise{what: what, at: at, got: median(perRound)}
	if len(perRound) > 0 {
		p.low, p.up = slices.Min(perRound), slices.Max(perRound)
	}
	return p
}

func promiseTable(all []promise) string {
	var b strings.Builder
	b.WriteString("| promise (median of per-round ratios, with their range) | at most | measured | |\n|---|---|---|---|\n")
	for _, p := range all {
		fmt.Fprintln(&b, p)
	}
	return b.String()
}

// conditions say on what and how the figures came about.
func conditions(ctx context.Context, o options, pinned, envoy bool) string {
	var b strings.Builder
	line := func(what, format string, args ...any) {
		fmt.Fprintf(&b, "- %s: %s\n", what, fmt.Sprintf(format, args...))
	}
	line("Measured", "%s, by `%s`", time.Now().UTC().Format("2006-01-02 15:04 UTC"), commandLine())
	line("Machine", "%s, %d cores, %s", field("/proc/cpuinfo", "model name"), cores(), strings.TrimSpace(output(ctx, "uname", "-sr")))
	versions := runtime.Version()
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			switch m.Path {
			case "google.golang.org/grpc", "google.golang.org/protobuf", "golang.org/x/net":
				versions += fmt.Sprintf(", %s %s", m.Path, m.Version)
			}
		}
	}
	line("Versions", "%s; keyward %s", versions, keywardVersion(ctx, o))
	if envoy {
		path, err := envoytest.Find("")
		if err == nil {
			_, version, _ := strings.Cut(strings.TrimSpace(output(ctx, path, "--version")), "version: ")
			line("Envoy", "%s, --concurrency 1", version)
		}
	}
	use := "used by Zipf's law with s = 1.1"
	if envoy {
		use = "used in turn"
	}
	line("Rounds", "%d, each visit %s after %s of warm-up; %d keys, %s", o.rounds, o.measure, o.warmup, o.keys, use)
	switch {
	case envoy:
		line("Cores", "shared by all processes")
	case pinned:
		line("Cores", "every server on core %s, the client on core %s (taskset)", serverCore, clientCore)
	default:
		line("Cores", "not pinned: no taskset, or fewer than two cores. Servers and client disturb each other")
	}
	return b.String()
}

func keywardVersion(ctx context.Context, o options) string {
	var v struct{ Version, Revision string }
	if json.Unmarshal([]byte(output(ctx, o.bin+"/keyward", "version", "-o", "json")), &v) != nil {
		return "unknown"
	}
	return strings.TrimSpace(v.Version + " " + v.Revision)
}

// cores are those of the machine: this process may be pinned to one.
func cores() int {
	text, _ := os.ReadFile("/proc/cpuinfo")
	return strings.Count(string(text), "\nprocessor") + strings.Count(string(text[:min(len(text), 9)]), "processor")
}

func field(file, name string) string {
	text, _ := os.ReadFile(file)
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

func output(ctx context.Context, args ...string) string {
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).Output()
	if err != nil {
		return "unknown"
	}
	return string(out)
}

// publish prints a report, and puts it between its markers in the document.
func publish(doc, name, text string) error {
	fmt.Println(text)
	begin, end := "<!-- "+name+":begin -->\n", "<!-- "+name+":end -->"
	old, err := os.ReadFile(doc)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(old, []byte(begin))
	_, after, ok2 := bytes.Cut(rest, []byte(end))
	if !ok || !ok2 {
		return fmt.Errorf("%s has no %s … %s: the report is above", doc, strings.TrimSpace(begin), end)
	}
	next := slices.Concat(before, []byte(begin), []byte(text), []byte(end), after)
	if err := os.WriteFile(doc, next, 0o644); err != nil {
		return err
	}
	say("the tables are in %s", doc)
	return nil
}
