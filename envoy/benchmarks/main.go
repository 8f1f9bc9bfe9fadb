// Benchmarks compares keyward with what it could at best be, and writes the tables of
// docs/performance.md. It has a go.mod of its own, so that keyward's stays short.
//
//	benchmarks checks    Checks against a server that answers a constant, and the timing of refusals
//	benchmarks envoy     what an authorizer costs behind a real Envoy
//	benchmarks constant  that server
//
// All servers are up at once and are visited in rotating order, round after round. A ratio is the median
// of the ratios of the rounds, never a ratio of medians: a machine that is slower for a minute is slower
// for both sides of a round. "make bench" and "make bench-envoy" run it from the project's folder.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// options are what both comparisons know.
type options struct {
	rounds  int
	measure time.Duration // of each visit
	warmup  time.Duration
	keys    int
	samples int // of each class of refusals
	flood   int // made-up keys
	doc     string
	bin     string // folder with keyward and keyward-standard
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) < 2 {
		return errors.New("say what to do: checks, envoy or constant")
	}
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	if os.Args[1] == "constant" {
		address := flags.String("address", "127.0.0.1:0", "where to listen")
		workers := flags.Uint("workers", 0, "stream workers of grpc-go")
		if err := flags.Parse(os.Args[2:]); err != nil {
			return err
		}
		return serveConstant(ctx, *address, uint32(*workers))
	}
	var o options
	flags.IntVar(&o.rounds, "rounds", 5, "rounds; a figure is the median of them")
	flags.DurationVar(&o.measure, "measure", 1500*time.Millisecond, "how long each visit is measured")
	flags.DurationVar(&o.warmup, "warmup", 700*time.Millisecond, "and how long before that it is loaded")
	flags.IntVar(&o.keys, "keys", 10_000, "keys")
	flags.IntVar(&o.samples, "samples", 1_000_000, "samples of each class of refused keys")
	flags.IntVar(&o.flood, "flood", 1_000_000, "distinct unknown keys of the flood")
	flags.StringVar(&o.doc, "doc", "docs/performance.md", "where the tables go")
	flags.StringVar(&o.bin, "bin", "bin", "folder with keyward and keyward-standard")
	if err := flags.Parse(os.Args[2:]); err != nil {
		return err
	}
	if o.rounds < 1 || o.measure <= 0 || o.keys < 1 || o.samples < 100 || o.flood < 1 {
		return errors.New("rounds, measure, keys and flood must be at least 1, samples at least 100")
	}
	switch os.Args[1] {
	case "checks":
		return compareChecks(ctx, o)
	case "envoy":
		return compareEnvoys(ctx, o)
	}
	return fmt.Errorf("%s: say checks, envoy or constant", os.Args[1])
}

// Where servers and the client run, if there are two cores and a taskset.
const (
	serverCore = "0"
	clientCore = "1"
)

// pin starts this program again on the client's core, and reports whether it is there. Servers then have
// a core for themselves.
func pin() (bool, error) {
	const marker = "KEYWARD_BENCHMARKS_PINNED"
	if os.Getenv(marker) != "" {
		// The pacer sleeps in the kernel: with one processor it would hold up the answers.
		runtime.GOMAXPROCS(2)
		return true, nil
	}
	taskset, err := exec.LookPath("taskset")
	if errors.Is(err, exec.ErrNotFound) || runtime.NumCPU() < 2 {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	self, err := os.Executable()
	if err != nil {
		return false, err
	}
	return false, syscall.Exec(taskset, append([]string{taskset, "-c", clientCore, self}, os.Args[1:]...), append(os.Environ(), marker+"=1"))
}

// again tries up to three times: a machine that stands still for a moment fails a visit, a server that
// answers wrongly fails every one.
func again(ctx context.Context, what string, visit func() error) error {
	for try := 1; ; try++ {
		err := visit()
		if err == nil {
			return nil
		}
		if try == 3 || ctx.Err() != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		say("%s: %v: again", what, err)
	}
}

// say tells whoever waits what goes on.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s "+format+"\n", append([]any{time.Now().Format("15:04:05")}, args...)...)
}

// commandLine is the command as it was given.
func commandLine() string { return strings.Join(os.Args, " ") }
