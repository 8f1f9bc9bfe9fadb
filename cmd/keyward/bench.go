package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/term"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
	"keyward/envoy/traffic"
)

const (
	defaultMetrics = "http://127.0.0.1:9193"
	// benchMakers keys are made at once: a store on a disk writes them in few transactions then.
	benchMakers = 16
	// benchKeyLife is how much longer than the run keys live that are not removed, because bench was killed.
	benchKeyLife = time.Hour
	// cpuStep is what process_cpu_seconds_total counts in: the kernel's clock ticks.
	cpuStep = 10 * time.Millisecond
	// benchRemoval is how long the removal of the instance may take, whatever ended the run.
	benchRemoval = 2 * time.Minute
)

// errBenchFailed: the run is over and was printed, and not all answers were right.
var errBenchFailed = errors.New("not all answers were right")

// A bench is one run of keyward bench.
type bench struct {
	*app
	load    traffic.Config
	secrets string // file with secrets that exist; "": keys are made
	keys    int
	unknown float64
	limited float64
	running int // max-concurrent of each key
	prefix  string
	metrics string // "": where they are by default, if that may be ours; "-": not read
	cpuFrom string // where the server's processor time is read; "": it is not
	tls     struct{ ca, cert, key, name string }
}

func (a *app) benchCommand() *cobra.Command { return (&bench{app: a}).command() }

func (b *bench) command() *cobra.Command {
	c := &cobra.Command{
		Use:   "bench",
		Short: "Load a running keyward with Checks, as Envoy sends them, and measure its answers",
		Long: "Load a running keyward with Checks, as Envoy sends them, and measure its answers. It makes an instance of\n" +
			"its own, named bench-…, with keys that have no limits, and removes it at the end, also after Ctrl-C. If it\n" +
			"is killed, the keys expire an hour after the run would have ended.\n\n" +
			"Without --rate each stream asks again as soon as it was answered, which shows how much the server can do.\n" +
			"With --rate requests are due at even distances and latency counts from when each was due, which shows what\n" +
			"callers feel at that load. CPU is the server's, from its metrics; rates and CPU cover the measured time,\n" +
			"answers and errors the whole run. Any wrong answer is an error, and errors make the exit code 1.\n\n" +
			"The load is real: keep it off a keyward that serves others, and do not run it on the server's only core.",
		Example: "  keyward bench --connections 4 --streams 8 --duration 10s\n" +
			"  keyward bench --rate 10000 --unknown 0.5 -o json\n" +
			"  keyward bench --secrets some.secrets --address unix:///run/keyward/check.sock",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return b.run(cmd.Context()) },
	}
	f := c.Flags()
	b.serverFlags(f)
	f.StringVarP(&b.output, "output", "o", "table", "table or json")
	f.StringVar(&b.load.Address, "address", defaultConfig().Listen.Check.Address, "where keyward answers Checks, host:port or unix:///path")
	f.StringVar(&b.tls.ca, "tls-ca", "", "file: who signed keyward's certificate; the Checks go by TLS then")
	f.StringVar(&b.tls.cert, "tls-cert", "", "file: our certificate, where keyward wants one from its clients")
	f.StringVar(&b.tls.key, "tls-key", "", "file: the certificate's key")
	f.StringVar(&b.tls.name, "tls-name", "", "name in keyward's certificate; by default the host of --address")
	f.StringVar(&b.metrics, "metrics", "", "keyward's metrics listener, to measure its CPU; - for not (default "+defaultMetrics+", if it answers and --address and --server are on this machine)")
	f.IntVar(&b.load.Connections, "connections", 4, "connections")
	f.IntVar(&b.load.Streams, "streams", 8, "requests at once on each connection")
	f.Float64Var(&b.load.Rate, "rate", 0, "requests per second in all, evenly spaced; 0: as fast as they are answered")
	f.DurationVar(&b.load.Warmup, "warmup", 2*time.Second, "load before measuring")
	f.DurationVar(&b.load.Duration, "duration", 10*time.Second, "how long to measure")
	f.DurationVar(&b.load.Timeout, "timeout", 250*time.Millisecond, "of a Check; a later answer is an error")
	f.IntVar(&b.keys, "keys", 1000, "keys to make")
	f.StringVar(&b.secrets, "secrets", "", "file with secrets of keys that exist, one a line: nothing is made or removed, and their own limits apply")
	f.Float64Var(&b.load.Zipf, "zipf", 1.1, "how unevenly keys are used: s of Zipf's law, above 1; 0: evenly")
	f.Float64Var(&b.unknown, "unknown", 0, "share of requests with well-formed keys that do not exist, 0 to 1")
	f.Float64Var(&b.limited, "limited", 0, "share of requests with keys that have used up their rate, 0 to 1")
	f.IntVar(&b.running, "max-concurrent", apikey.Unlimited, "max-concurrent of each key; its leases are ended through the access log, in batches")
	f.StringVar(&b.load.Method, "method", "GET", "method of the requests that Envoy asks about")
	f.StringVar(&b.load.Host, "host", "app.example", "their host")
	f.StringVar(&b.load.Path, "path", "/orders/1048576?expand=items", "their path; on a route that wants more than a key they are 403")
	f.StringVar(&b.prefix, "prefix", apikey.DefaultFirst, "first part of made-up keys, as credentials.prefix has it")
	return c
}

// check reports what cannot be meant.
func (b *bench) check() error {
	faults := []error{oneOf("--output", b.output, "table", "json"), apikey.Format{First: b.prefix}.Validate()}
	fault := func(text string) { faults = append(faults, errors.New(text)) }
	if b.unknown < 0 || b.limited < 0 || b.unknown+b.limited > 1 {
		fault("--unknown and --limited: must be shares from 0 to 1, together at most 1")
	}
	if b.secrets != "" && b.limited > 0 {
		fault("--limited does not go with --secrets: it needs keys of its own")
	}
	if b.secrets == "" && b.keys < 1 {
		fault("--keys: must be at least 1")
	}
	if b.running == 0 || b.running < apikey.Unlimited {
		fault("--max-concurrent: must be at least 1, or -1 for none")
	}
	if b.load.Zipf != 0 && b.load.Zipf <= 1 {
		fault("--zipf: must be above 1, or 0 for an even use")
	}
	if b.load.Connections < 1 || b.load.Streams < 1 {
		fault("--connections and --streams: must be at least 1")
	}
	if b.load.Rate < 0 || b.load.Duration <= 0 || b.load.Warmup < 0 || b.load.Timeout < time.Millisecond {
		fault("--rate and --warmup must not be negative, --duration must be positive, --timeout at least 1ms")
	}
	var err error
	if b.load.TLS, err = b.tlsConfig(); err != nil {
		faults = append(faults, err)
	}
	return wrapUsage(errors.Join(faults...))
}

// tlsConfig is how keyward is reached; nil without TLS.
func (b *bench) tlsConfig() (*tls.Config, error) {
	if b.tls.ca == "" {
		if b.tls.cert != "" || b.tls.key != "" || b.tls.name != "" {
			return nil, errors.New("--tls-cert, --tls-key and --tls-name: need --tls-ca")
		}
		return nil, nil
	}
	pem, err := os.ReadFile(b.tls.ca)
	if err != nil {
		return nil, fmt.Errorf("--tls-ca: %w", err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool(), ServerName: b.tls.name}
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("--tls-ca: %s holds no certificate in PEM", b.tls.ca)
	}
	if b.tls.cert != "" || b.tls.key != "" {
		pair, err := tls.LoadX509KeyPair(b.tls.cert, b.tls.key)
		if err != nil {
			return nil, fmt.Errorf("--tls-cert: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

func (b *bench) run(ctx context.Context) (err error) {
	if err := b.check(); err != nil {
		return err
	}
	if b.load.CPU, err = b.cpu(ctx); err != nil {
		return err
	}
	progress, erase := b.progress()
	defer erase()
	b.load.Progress = func(p traffic.Progress) {
		progress("%s of %s, %d answers, %d errors", p.Elapsed.Round(time.Second), p.Total, p.Answers, p.Errors)
	}
	if b.unknown > 0 {
		// Enough of them that not all are remembered.
		b.load.Classes = append(b.load.Classes, traffic.Class{Name: "unknown", Share: b.unknown, Secrets: madeUp(b.prefix, max(b.keys, 100_000)), Want: []int{http.StatusUnauthorized}})
	}
	if b.secrets != "" {
		return b.withSecrets(ctx, erase)
	}
	return b.withInstance(ctx, progress, erase)
}

// withSecrets uses keys that exist.
func (b *bench) withSecrets(ctx context.Context, erase func()) error {
	in, err := os.Open(b.secrets)
	if err != nil {
		return usageError{err}
	}
	defer in.Close()
	secrets, err := traffic.ReadSecrets(in)
	if err != nil {
		return usageError{fmt.Errorf("%s: %w", b.secrets, err)}
	}
	// That a key's own limit refuses is no wrong answer.
	b.addValid(secrets, http.StatusOK, http.StatusTooManyRequests)
	return b.measure(ctx, erase)
}

func (b *bench) addValid(secrets *traffic.Secrets, want ...int) {
	if share := 1 - b.unknown - b.limited; share > 0 {
		b.load.Classes = append(b.load.Classes, traffic.Class{Name: "valid", Share: share, Secrets: secrets, Want: want})
	}
}

// withInstance makes an instance with its keys, measures, and removes it, however that ends.
func (b *bench) withInstance(ctx context.Context, progress func(string, ...any), erase func()) (err error) {
	client, reach, err := b.onlineClient()
	if err != nil {
		return err
	}
	var random [6]byte
	_, _ = rand.Read(random[:]) // never fails: crypto/rand ends the program instead
	id := "bench-" + hex.EncodeToString(random[:])
	unlimited, none := apikey.Unlimited, b.running
	limits := admin.LimitsInput{Rate: &admin.RateInput{Requests: &unlimited}, Burst: &unlimited, MaxConcurrent: &none}
	policy := admin.PolicyInput{
		Defaults: admin.DefaultsInput{Instance: limits},
		Caps:     admin.CapsInput{Instance: &unlimited}, Creation: admin.CreationInput{PerHour: &unlimited},
	}
	// Before it is made: an interrupted call may have made it all the same.
	defer func() {
		erase()
		left := b.remove(ctx, client, id)
		if errors.Is(err, errInterrupted) && left != nil {
			err = nil // it is not said, and would keep the other from being said
		}
		err = errors.Join(err, left)
	}()
	if _, err := client.PutInstance(ctx, id, policy); err != nil {
		return reach(ctx, err)
	}
	valid, err := b.makeKeys(ctx, client, id, "keys", b.keys, admin.LimitsInput{}, progress)
	if err != nil {
		return reach(ctx, err)
	}
	want := []int{http.StatusOK}
	if b.running != apikey.Unlimited {
		want = append(want, http.StatusTooManyRequests)
	}
	b.addValid(valid, want...)
	if b.limited > 0 {
		one := 1
		tight := admin.LimitsInput{Rate: &admin.RateInput{Requests: &one, Per: "24h"}, Burst: &one, MaxConcurrent: &unlimited}
		limited, err := b.makeKeys(ctx, client, id, "limited keys", max(b.keys/10, 1), tight, progress)
		if err != nil {
			return reach(ctx, err)
		}
		// The first request of each is allowed.
		b.load.Classes = append(b.load.Classes, traffic.Class{Name: "limited", Share: b.limited, Secrets: limited, Want: []int{http.StatusTooManyRequests, http.StatusOK}})
	}
	return b.measure(ctx, erase)
}

// makeKeys makes keys of an instance and returns their secrets.
func (b *bench) makeKeys(ctx context.Context, client *manage.Client, instance, what string, n int, limits admin.LimitsInput, progress func(string, ...any)) (*traffic.Secrets, error) {
	life := apikey.Duration(b.load.Warmup + b.load.Duration + benchKeyLife).String()
	made := make(chan apikey.Secret)
	group, making := errgroup.WithContext(ctx)
	numbers := make(chan int)
	group.Go(func() error {
		defer close(numbers)
		for i := range n {
			select {
			case numbers <- i:
			case <-making.Done():
				return nil
			}
		}
		return nil
	})
	for range min(benchMakers, n) {
		group.Go(func() error {
			for i := range numbers {
				created, err := client.CreateKey(making, instance, admin.KeyInput{Name: fmt.Sprintf("bench %d", i), Limits: limits, ExpiresIn: life})
				if err != nil {
					return err
				}
				made <- created.Secret
			}
			return nil
		})
	}
	failed := make(chan error, 1)
	go func() {
		failed <- group.Wait()
		close(made)
	}()
	secrets := &traffic.Secrets{}
	for s := range made {
		secrets.Add(s.Reveal())
		if secrets.Len()%100 == 0 {
			progress("%d of %d %s made", secrets.Len(), n, what)
		}
	}
	return secrets, <-failed
}

// remove ends the instance of this run, also if the run was interrupted.
func (b *bench) remove(ctx context.Context, client *manage.Client, id string) error {
	byHand := "keyward instances delete " + id + " --revoke-keys --yes"
	if ctx.Err() != nil {
		// A second signal ends the program at once: then this was its last word.
		fmt.Fprintf(b.stderr, "Interrupted: removing the instance. If that is cut short: %s\n", byHand)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), benchRemoval)
	defer cancel()
	_, err := client.DeleteInstance(ctx, id, true)
	if answer, ok := errors.AsType[*manage.Error](err); ok && answer.Status == http.StatusNotFound {
		return nil // it was never made
	}
	if err != nil {
		return fmt.Errorf("the instance %s may be left: %w; remove it by: %s", id, err, byHand)
	}
	return nil
}

// madeUp are secrets that no key has, with a good checksum.
func madeUp(prefix string, n int) *traffic.Secrets {
	secrets := &traffic.Secrets{}
	for range n {
		secrets.Add(apikey.Format{First: prefix}.New(apikey.KindInstance).Reveal())
	}
	return secrets
}

// measure runs the load and prints what came of it.
func (b *bench) measure(ctx context.Context, erase func()) error {
	result, err := traffic.Run(ctx, b.load)
	erase()
	if ctx.Err() != nil {
		return errInterrupted
	}
	if err != nil {
		return err
	}
	if err := b.print(result); err != nil {
		return err
	}
	if n := result.ErrorCount(); n > 0 {
		return fmt.Errorf("%w: %d errors", errBenchFailed, n)
	}
	return nil
}

// A benchReport is a run as JSON.
type benchReport struct {
	*traffic.Result
	Connections     int     `json:"connections"`
	Streams         int     `json:"streams"`
	Rate            float64 `json:"rate,omitempty"`
	DurationSeconds float64 `json:"durationSeconds"`
	// CPUMicros is the server's processor time for each request, rounded to what its clock can tell. CPUFrom
	// is where it was read.
	CPUMicros *float64 `json:"cpuMicrosPerRequest,omitempty"`
	CPUFrom   string   `json:"cpuFrom,omitempty"`
}

func (b *bench) print(r *traffic.Result) error {
	micros, cpu := serverCPU(r)
	if b.output == "json" {
		report := benchReport{Result: r, Connections: b.load.Connections, Streams: b.load.Streams, Rate: b.load.Rate,
			DurationSeconds: r.Elapsed.Seconds(), CPUFrom: b.cpuFrom}
		if b.load.CPU != nil && r.Requests > 0 {
			report.CPUMicros = &micros
		}
		return b.printData(report)
	}
	w := tabwriter.NewWriter(b.stdout, 0, 0, 2, ' ', 0)
	how := "closed loop"
	if b.load.Rate > 0 {
		how = fmt.Sprintf("%g requests a second, latency from when each was due", b.load.Rate)
	}
	fmt.Fprintf(w, "LOAD\t%d connections × %d streams, %s, %s\n", b.load.Connections, b.load.Streams, b.load.Duration, how)
	fmt.Fprintf(w, "REQUESTS/S\t%.0f\n", r.PerSec)
	if b.load.CPU != nil && r.Requests > 0 {
		fmt.Fprintf(w, "CPU/REQUEST\t%s of the server, by %s\n", cpu, b.cpuFrom)
	}
	for _, status := range slices.Sorted(maps.Keys(r.Answers)) {
		fmt.Fprintf(w, "ANSWERS %d\t%d\n", status, r.Answers[status])
	}
	if r.Leases > 0 {
		fmt.Fprintf(w, "LEASES\t%d, all ended\n", r.Leases)
	}
	fmt.Fprintf(w, "ERRORS\t%d\n", r.ErrorCount())
	for _, kind := range r.ErrorKinds() {
		fmt.Fprintf(w, "\t%d × %s\n", r.Errors[kind], kind)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(b.stdout)
	rows := []string{"all"}
	if len(r.Classes) > 1 {
		rows = append(rows, slices.Sorted(maps.Keys(r.Classes))...)
	}
	return writeTable(b.stdout, rows, table[string]{
		header: "µs\tMEAN\tP50\tP90\tP99\tP99.9\tMAX\tCOUNT",
		row: func(name string) []string {
			l, ok := r.Classes[name]
			if !ok {
				l = r.Latency
			}
			cells := []string{name}
			for _, v := range []float64{l.Mean, l.P50, l.P90, l.P99, l.P999, l.Max} {
				cells = append(cells, fmt.Sprintf("%.0f", v))
			}
			return append(cells, fmt.Sprint(l.Count))
		},
	})
}

// progress returns what shows a line that the next one replaces, on a terminal only, and what erases it.
func (b *bench) progress() (show func(format string, args ...any), erase func()) {
	out, ok := b.stderr.(*os.File)
	if !ok || !term.IsTerminal(int(out.Fd())) {
		return func(string, ...any) {}, func() {}
	}
	const line = "\r\x1b[K"
	return func(format string, args ...any) { fmt.Fprintf(out, line+format, args...) },
		func() { fmt.Fprint(out, line) }
}

// serverCPU is the server's processor time for each request in microseconds, to the power of ten that a
// step of its clock makes of each, at best a tenth. Result.Requests is not 0, or there is none.
func serverCPU(r *traffic.Result) (micros float64, text string) {
	step := float64(cpuStep) / 1e3 / float64(max(r.Requests, 1))
	unit, digits := 0.1, 1
	for unit < step {
		unit, digits = unit*10, 0
	}
	text = strconv.FormatFloat(math.Round(float64(r.CPUPerRequest)/1e3/unit)*unit, 'f', digits, 64)
	micros, _ = strconv.ParseFloat(text, 64) // without what 0.1 leaves behind
	if micros == 0 {
		return 0, "less than " + strconv.FormatFloat(unit, 'f', digits, 64) + " µs"
	}
	return micros, text + " µs"
}

// cpu returns what reads the server's processor time from its metrics; nil if that is not wanted, or
// where nobody said where they are and they are not where they are by default.
func (b *bench) cpu(ctx context.Context) (func() (time.Duration, error), error) {
	base := b.metricsURL()
	if base == "" {
		return nil, nil
	}
	read := func() (time.Duration, error) { return processTime(ctx, base+"/metrics") }
	if _, err := read(); err != nil {
		if b.metrics == "" {
			return nil, nil
		}
		return nil, fmt.Errorf("--metrics: %w", err)
	}
	b.cpuFrom = base
	if u, err := url.Parse(base); err == nil {
		b.cpuFrom = u.Redacted()
	}
	return read, nil
}

// metricsURL is where the server's metrics are; "" if they are not wanted, or nobody said where they are
// and the server is on another machine: another keyward's processor time would look just as good.
func (b *bench) metricsURL() string {
	base := b.metrics
	switch {
	case base == "-":
		return ""
	case base != "":
	case !(Listener{Address: b.load.Address}).isLoopback(), b.secrets == "" && !b.isServerHere():
		return ""
	default:
		return defaultMetrics
	}
	if !strings.Contains(base, "://") {
		base = "http://" + base
	}
	return strings.TrimRight(base, "/")
}

// isServerHere reports whether the Management API is on this machine.
func (b *bench) isServerHere() bool {
	server, _, err := b.serverURL()
	if err != nil {
		return false
	}
	u, err := url.Parse(server)
	return err == nil && (Listener{Address: net.JoinHostPort(u.Hostname(), u.Port())}).isLoopback()
}

// processTime reads process_cpu_seconds_total.
func processTime(ctx context.Context, url string) (time.Duration, error) {
	const name = "process_cpu_seconds_total"
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("%s: %s", url, resp.Status)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bufio.NewReader(io.LimitReader(resp.Body, 16<<20)))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", url, err)
	}
	if m := families[name].GetMetric(); len(m) == 1 {
		return time.Duration(m[0].GetCounter().GetValue() * float64(time.Second)), nil
	}
	return 0, fmt.Errorf("%s: no %s: is it keyward's metrics listener?", url, name)
}
