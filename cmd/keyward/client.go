package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
	"keyward/authz/store/sqlite"
)

const (
	defaultServer = "http://127.0.0.1:9192"
	callTimeout   = time.Minute
	longTimeout   = 24 * time.Hour // of what takes as long as there is data
)

// clientFlags are those of every command that asks a server to do something.
func (a *app) clientFlags(c *cobra.Command) {
	flags := c.PersistentFlags()
	a.serverFlags(flags)
	flags.BoolVar(&a.offline, "offline", false, "work on the store itself while no server runs; needs --config")
	flags.StringVar(&a.configFile, "config", "", "with --offline: configuration file of the server")
	flags.StringVarP(&a.output, "output", "o", "table", "table, json, jsonl or yaml")
	flags.BoolVarP(&a.quiet, "quiet", "q", false, "print ids only, or the secret only where one is made")
	flags.BoolVar(&a.yes, "yes", false, "do not ask before ending something")
	c.PersistentPreRunE = func(*cobra.Command, []string) error {
		return wrapUsage(oneOf("--output", a.output, "table", "json", "jsonl", "yaml"))
	}
}

// serverFlags say which server is called, and who calls.
func (a *app) serverFlags(flags *pflag.FlagSet) {
	flags.StringVar(&a.server, "server", "", "Management API to call (KEYWARD_SERVER; default "+defaultServer+")")
	flags.StringVar(&a.tokenFile, "token-file", "", "file with the management token (KEYWARD_TOKEN_FILE)")
	flags.StringVar(&a.contextName, "context", "", "context to work in, see keyward context (KEYWARD_CONTEXT)")
}

func wrapUsage(err error) error {
	if err == nil {
		return nil
	}
	return usageError{err}
}

// withClient gives fn a client, of a server or of the store itself.
func (a *app) withClient(ctx context.Context, fn func(ctx context.Context, c *manage.Client) error) error {
	patience := callTimeout
	if a.long {
		patience = longTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if a.offline {
		return a.withStore(ctx, fn)
	}
	c, reach, err := a.onlineClient()
	if err != nil {
		return err
	}
	return reach(ctx, fn(ctx, c))
}

// serverURL is the server that the flags, the environment or the context in use name, and that context.
func (a *app) serverURL() (string, ServerContext, error) {
	server, err := a.named("--server", a.server, "KEYWARD_SERVER")
	if err != nil {
		return "", ServerContext{}, err
	}
	in, err := a.serverContext(server)
	return cmp.Or(server, in.Server, defaultServer), in, err
}

// onlineClient returns a client of the server that the flags or the environment name, and what says of an
// error of its calls, if that is so, that no server answers.
func (a *app) onlineClient() (_ *manage.Client, reach func(ctx context.Context, err error) error, err error) {
	server, in, err := a.serverURL()
	if err != nil {
		return nil, nil, err
	}
	if u, err := url.Parse(server); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, nil, usageError{fmt.Errorf("--server: must be a URL such as %s", defaultServer)}
	}
	file := cmp.Or(a.tokenFile, a.environment("KEYWARD_TOKEN_FILE"), in.TokenFile)
	if a.contextName != "" {
		file = cmp.Or(a.tokenFile, in.TokenFile, a.environment("KEYWARD_TOKEN_FILE"))
	}
	if file == "" {
		return nil, nil, usageError{errors.New("no management token: name its file by --token-file, KEYWARD_TOKEN_FILE or a context; the first one is in admin.token beside the server's store")}
	}
	token, err := readPrivate(file)
	if err != nil {
		return nil, nil, usageError{fmt.Errorf("management token: %w", err)}
	}
	reach = func(ctx context.Context, err error) error {
		if unreachable, ok := errors.AsType[*url.Error](err); ok {
			if ctx.Err() != nil && errors.Is(ctx.Err(), context.Canceled) {
				return errInterrupted
			}
			return fmt.Errorf("%w at %s: %w", errUnreachable, server, unreachable.Err)
		}
		return err
	}
	return manage.NewClient(server, apikey.NewSecret(strings.TrimSpace(string(token))), nil), reach, nil
}

// withStore opens the store as serve would and speaks to a Management API that no network reaches.
// While a server has the store open, the store's own lock refuses.
func (a *app) withStore(ctx context.Context, fn func(ctx context.Context, c *manage.Client) error) (err error) {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	peppers, err := readPeppers(cfg.Pepper, true, log)
	if err != nil {
		return err
	}
	store, err := sqlite.Open(ctx, sqlite.Config{Path: cfg.Store.SQLite.Path, Audit: admin.NewAuditKeys(peppers)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	name := localActor("keyward --offline")
	if err := admin.OpenPeppers(ctx, store, peppers, name); err != nil {
		return err
	}
	format := cfg.format()
	service := admin.New(store, admin.Config{Format: format, Peppers: peppers}, nil, log)
	handler := manage.New(service, manage.Config{
		Format: format, Pepper: peppers.Current, Log: log,
		Caller: &admin.Caller{Name: name, Role: admin.RoleOwner},
	})
	c := manage.NewClient("http://store", apikey.Secret{}, &http.Client{Transport: inProcess{handler}})
	return fn(ctx, c)
}

// onceFor is how long a command asks again after it lost the connection over a call that makes a secret:
// as long as a server takes to be started again.
const onceFor = 15 * time.Second

// once makes a call that makes a secret. If the connection is lost after the call was sent, nobody knows
// whether the server heard it: then the call is repeated, with the same Idempotency-Key, so that it is done
// once. key is one that the user chose; "" is a fresh one.
func (a *app) once(ctx context.Context, key string, call func(ctx context.Context) error) error {
	key = cmp.Or(key, rand.Text())
	ctx = manage.WithIdempotencyKey(ctx, key)
	lost := false
	for start, pause := time.Now(), 100*time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		err := call(ctx)
		lostNow, refused := connectionLost(err)
		if lost = lost || lostNow; !lost || !lostNow && !refused {
			return err
		}
		if time.Since(start) > onceFor || ctx.Err() != nil {
			fmt.Fprintf(a.stderr, "Whether it was done is not known: within ten minutes, repeat the command with --idempotency-key %s\n", key)
			return err
		}
		fmt.Fprintln(a.stderr, "The connection was lost before the answer came; asking again.")
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// connectionLost tells of a call that got no answer whether it may have been heard, or nobody was there.
func connectionLost(err error) (lost, refused bool) {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Op == "read" || op.Op == "write", op.Op == "dial"
	}
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, context.DeadlineExceeded), false
}

// inProcess carries requests to a handler in this process.
type inProcess struct{ handler http.Handler }

func (t inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body == nil {
		r.Body = http.NoBody
	}
	answer := &memoryResponse{header: http.Header{}}
	if aborted(t.handler, answer, r) {
		return nil, io.ErrUnexpectedEOF // half an answer is none, as from a network
	}
	if answer.status == 0 {
		answer.status = http.StatusOK
	}
	return &http.Response{
		StatusCode: answer.status, Status: http.StatusText(answer.status), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: answer.header, Body: io.NopCloser(&answer.body), ContentLength: int64(answer.body.Len()), Request: r,
	}, nil
}

// aborted has a handler answer, and reports whether it gave up in the middle.
func aborted(h http.Handler, w http.ResponseWriter, r *http.Request) (gaveUp bool) {
	defer func() {
		if v := recover(); v == http.ErrAbortHandler { //nolint:errorlint // net/http compares it so too
			gaveUp = true
		} else if v != nil {
			panic(v)
		}
	}()
	h.ServeHTTP(w, r)
	return false
}

type memoryResponse struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (m *memoryResponse) Header() http.Header { return m.header }

func (m *memoryResponse) WriteHeader(status int) {
	if m.status == 0 {
		m.status = status
	}
}

func (m *memoryResponse) Write(b []byte) (int, error) {
	m.WriteHeader(http.StatusOK)
	return m.body.Write(b)
}

// await waits for what a read brings, or for the user to stop the command: a signal ends no read that has
// begun. What arrives afterwards is lost, which is no matter to a command that ends.
func await[T any](a *app, read func() (T, error)) (T, error) {
	type result struct {
		got T
		err error
	}
	done := make(chan result, 1)
	go func() {
		got, err := read()
		done <- result{got, err}
	}()
	select {
	case r := <-done:
		return r.got, r.err
	case <-a.stopped:
		var none T
		return none, errInterrupted
	}
}

// An input is standard input that does not keep a command from ending.
type input struct{ *app }

func (in input) Read(p []byte) (int, error) {
	got, err := await(in.app, func() ([]byte, error) {
		own := make([]byte, len(p)) // p is the caller's again when the user stops
		n, err := in.stdin.Read(own)
		return own[:n], err
	})
	return copy(p, got), err
}

// confirm asks before something is ended. Without a terminal nobody can answer: then --yes is needed.
func (a *app) confirm(question string) error {
	if a.yes {
		return nil
	}
	in, ok := a.stdin.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return usageError{errors.New("this ends something for good: say --yes")}
	}
	fmt.Fprintf(a.stderr, "%s [y/N] ", question)
	line := make([]byte, 0, 8)
	for b := make([]byte, 1); ; {
		n, err := input{a}.Read(b)
		if errors.Is(err, errInterrupted) {
			fmt.Fprintln(a.stderr)
			return err
		}
		if n == 0 || err != nil || b[0] == '\n' {
			break
		}
		line = append(line, b[0])
	}
	if answer := strings.ToLower(strings.TrimSpace(string(line))); answer != "y" && answer != "yes" {
		return errInterrupted
	}
	return nil
}
