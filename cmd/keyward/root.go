package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"keyward/authz/apikey"
	"keyward/authz/manage"
	"keyward/authz/store/sqlite"
)

// The exit codes, for scripts.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2 // a wrong command line or configuration
	exitAuth        = 3 // no right to do this
	exitNotFound    = 4
	exitConflict    = 5
	exitUnavailable = 6 // rate limited, or not to be reached
	exitInterrupted = 130
)

// A usageError is a fault in what the user wrote.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// errInterrupted ends a command that the user stopped.
var errInterrupted = errors.New("interrupted")

// An app is one run of the program: where it reads and writes, and the flags that many commands share.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	environ        []string

	output      string
	quiet       bool
	server      string
	contextName string
	tokenFile   string
	offline     bool
	configFile  string
	piped       []byte // the configuration that came by standard input, which can be read once
	settings    []string
	yes         bool
	long        bool // the command takes as long as there is data
	drainDelay  time.Duration

	stopped <-chan struct{} // closed when the user stops the command
}

// run is the program. It returns the exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, environ: os.Environ(), drainDelay: drainDelay}
	return a.run(ctx, args)
}

func (a *app) run(ctx context.Context, args []string) int {
	out, stderr := &output{to: a.stdout}, a.stderr
	a.stdout = out
	root := a.root()
	root.SetArgs(args)
	root.SetIn(a.stdin)
	root.SetOut(out)
	root.SetErr(stderr)

	ctx, stop := untilSignal(ctx)
	defer stop()
	a.stopped = ctx.Done()

	err := root.ExecuteContext(ctx)
	if err == nil {
		err = out.failed()
	}
	if err == nil {
		return exitOK
	}
	if !errors.Is(err, errInterrupted) {
		fmt.Fprintln(stderr, "error:", secretLike.ReplaceAllString(err.Error(), "[secret]"))
		if hint := hintFor(err); hint != "" {
			fmt.Fprintln(stderr, "hint:", hint)
		}
	}
	return exitCode(err)
}

// An output remembers the first write that failed: a script that got half of an answer, or none on a full
// disk, must not be told that all is well. Safe for concurrent use.
type output struct {
	to io.Writer

	mu  sync.Mutex
	err error
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n, err := o.to.Write(b)
	if o.err == nil {
		o.err = err
	}
	return n, err
}

// failed returns what the first failed write said.
func (o *output) failed() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// secretLike is how secrets look, whatever prefix a server gives them: an argument in a wrong place comes back
// in an error, and errors go into the logs of whoever runs scripts.
var secretLike = regexp.MustCompile(`[a-z][a-z0-9]{0,9}[iaum]_[0-9A-Za-z]{24,}|keya\.[0-9A-Za-z.]{24,}`)

// untilSignal ends a context at the first signal to stop; the second ends the process at once, as if
// nobody listened. Both are kept from the beginning: however soon the second comes, it is not lost.
func untilSignal(ctx context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	done := make(chan struct{})
	var listening sync.WaitGroup
	listening.Go(func() {
		select {
		case <-signals:
			cancel()
		case <-done:
			return
		}
		select {
		case again := <-signals:
			signal.Reset(os.Interrupt, syscall.SIGTERM)
			_ = syscall.Kill(os.Getpid(), again.(syscall.Signal))
		case <-done:
		}
	})
	return ctx, func() {
		signal.Stop(signals)
		close(done)
		listening.Wait()
		cancel()
	}
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "keyward",
		Short: "API keys and their limits, at Envoy",
		Long: "Keyward issues API keys, checks them on every request that Envoy asks about, limits what each may use,\n" +
			"and ends them. keyward dev shows all of it in one terminal.",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(
		a.serveCommand(), a.devCommand(),
		a.instancesCommand(), a.keysCommand(), a.policyCommand(), a.quotasCommand(), a.tokensCommand(), a.sessionsCommand(), a.usageCommand(), a.auditCommand(), a.alertsCommand(), a.inFlightCommand(), a.explainCommand(), a.pepperCommand(),
		a.selfCommand(), a.revokeLeakedCommand(), a.contextCommand(),
		a.backupCommand(), a.restoreCommand(), a.migrateCommand(),
		a.envoyCommand(), a.benchCommand(), a.configCommand(), a.versionCommand(),
	)
	root.InitDefaultCompletionCmd()
	a.addCompletion(root)
	markUsage(root)
	return root
}

// markUsage makes wrong arguments what they are to scripts: a fault in the command line.
func markUsage(c *cobra.Command) {
	if !c.Runnable() {
		// cobra shows help for a command that only holds others, and judges none of its arguments.
		c.Args, c.RunE = cobra.NoArgs, func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		c.DisableFlagsInUseLine = true
	}
	c.PreRunE = func(cmd *cobra.Command, _ []string) error { return wrapUsage(cmd.ValidateRequiredFlags()) }
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usageError{fmt.Errorf("%s: %w", cmd.CommandPath(), err)}
			}
			return nil
		}
	}
	for _, child := range c.Commands() {
		markUsage(child)
	}
}

func exitCode(err error) int {
	if errors.Is(err, errInterrupted) {
		return exitInterrupted
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	if answer, ok := errors.AsType[*manage.Error](err); ok {
		switch answer.Status {
		case http.StatusUnauthorized, http.StatusForbidden:
			return exitAuth
		case http.StatusNotFound:
			if answer.Code == "" { // nothing there said so that would know
				return exitError
			}
			return exitNotFound
		case http.StatusConflict, http.StatusPreconditionFailed:
			return exitConflict
		case http.StatusTooManyRequests, http.StatusServiceUnavailable:
			return exitUnavailable
		case http.StatusBadRequest:
			return exitUsage
		}
		return exitError
	}
	if errors.Is(err, sqlite.ErrDamaged) { // an outage, but to try again is of no use
		return exitError
	}
	if errors.Is(err, errUnreachable) || errors.Is(err, apikey.ErrUndecided) {
		return exitUnavailable
	}
	return exitError
}

// errUnreachable: no server answered.
var errUnreachable = errors.New("no keyward answers")

func hintFor(err error) string {
	if _, ok := errors.AsType[holdersError](err); ok {
		return "" // what it says says what to do
	}
	if answer, ok := errors.AsType[*manage.Error](err); ok {
		var hints []string
		if answer.Status == http.StatusUnauthorized {
			hints = append(hints, "name a file with a good management token by --token-file or KEYWARD_TOKEN_FILE; one is made by keyward tokens create --offline")
		}
		if answer.RequestID != "" {
			hints = append(hints, "the server's log knows this call as "+answer.RequestID)
		}
		return strings.Join(hints, "; ")
	}
	if errors.Is(err, errUnreachable) {
		return "start it with keyward serve or keyward dev, or name another by --server or KEYWARD_SERVER"
	}
	return ""
}

// environment returns the value of a variable, "" if it is not set.
func (a *app) environment(name string) string {
	for _, entry := range a.environ {
		if value, ok := strings.CutPrefix(entry, name+"="); ok {
			return value
		}
	}
	return ""
}

// configFlags are those of every command that reads a server's configuration.
func (a *app) configFlags(c *cobra.Command) {
	c.Flags().StringVar(&a.configFile, "config", "", "configuration file; - for standard input")
	c.Flags().StringArrayVar(&a.settings, "set", nil, "set one field, such as log.level=debug; wins over file and environment")
}

func (a *app) config() (*Config, error) {
	in := a.stdin
	if a.configFile == "-" {
		if a.piped == nil {
			text, err := readConfigFile("-", a.stdin)
			if err != nil {
				return nil, err
			}
			a.piped = text
		}
		in = bytes.NewReader(a.piped)
	}
	return loadConfig(a.configFile, in, a.environ, a.settings)
}
