package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/envoy/envoytest"
	"keyward/envoy/generate"
)

const (
	devActor    = "keyward dev"
	devInstance = "demo"
	// usualHolders is where keyward dev listens for holders of keys, and where keyward self asks unless told otherwise.
	usualHolders = "127.0.0.1:9194"
	devKeyName   = "demo"

	devPepperFile = "pepper"
	devSecretFile = "demo.secret"
	devFile       = "dev.json"
	devLogFile    = "keyward.log"
	devEnvoyLog   = "envoy.log"
	devMarker     = "keyward-dev"

	// The demo key is tight, so that few requests show its limit.
	devBurst      = 10
	devConcurrent = 3
)

// devRoutes are the rules of the demo: everything needs a key, and some of it more or less.
var devRoutes = []Route{
	{Path: "/public/", Mode: "public"},
	{Path: "/orders", Method: "GET", Scopes: strList{"orders:read"}},
	{Path: "/orders", Method: "POST", Scopes: strList{"orders:write"}},
	{Path: "/agents/{agent}/chat", Agent: strList{"{agent}"}},
}

func (a *app) devCommand() *cobra.Command {
	var dir string
	var tour bool
	c := &cobra.Command{
		Use:   "dev",
		Short: "Run Envoy, a demo service and keyward in one terminal, with nothing configured",
		Long: "Run Envoy, a demo service and keyward in one terminal, with nothing configured and a first key made.\n" +
			"Everything listens on this machine only. --tour sends the requests itself, says what was expected and what\n" +
			"came, and ends with exit code 0 if all of it was right.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.dev(cmd.Context(), dir, tour)
		},
	}
	c.Flags().StringVar(&dir, "dir", ".keyward", "folder for its state; can be deleted at any time")
	c.Flags().BoolVar(&tour, "tour", false, "send the requests, compare the answers, and end")
	return c
}

// A devState says where everything is, for scripts. It is written to dev.json.
type devState struct {
	Envoy      string `json:"envoy"`   // base URL
	Manage     string `json:"manage"`  // base URL
	Holders    string `json:"holders"` // base URL
	Metrics    string `json:"metrics"` // base URL
	GRPC       string `json:"grpc"`    // address
	Instance   string `json:"instance"`
	TokenFile  string `json:"tokenFile"`
	SecretFile string `json:"secretFile"`
	PID        int    `json:"pid"`
	EnvoyPID   int    `json:"envoyPid"`

	keyID apikey.ID
}

func (a *app) dev(ctx context.Context, dir string, tour bool) (err error) {
	binary, err := envoytest.Find("")
	if err != nil {
		return err
	}
	if dir, err = prepareDevFolder(dir); err != nil {
		return err
	}
	// Not emptied: another dev may be running on this folder, and is about to refuse this one.
	logFile, err := openDevLog(filepath.Join(dir, devLogFile), os.O_APPEND)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, logFile.Close()) }()

	cfg := defaultConfig()
	cfg.Store.SQLite.Path = filepath.Join(dir, "keyward.db")
	cfg.Pepper.File = filepath.Join(dir, devPepperFile)
	cfg.Routes = devRoutes
	cfg.Listen.Holders.Address = usualHolders
	for _, l := range []*Listener{&cfg.Listen.Check, &cfg.Listen.Manage, &cfg.Listen.Holders, &cfg.Listen.Metrics} {
		l.Address = usualOrFree(l.Address)
	}
	if err := cfg.validate(); err != nil {
		return err
	}
	if err := ensureDevPepper(cfg.Pepper.File); err != nil {
		return err
	}
	s, err := openService(ctx, &cfg, serviceOptions{allowDevPepper: true, log: logFile})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()

	demo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	demoServer := s.httpServer(http.HandlerFunc(demoService))
	demoServer.WriteTimeout = 0 // as slow as it is asked to be

	running, stop := context.WithCancel(ctx)
	defer stop()
	group, running := errgroup.WithContext(running)
	group.Go(func() error { return s.run(running) })
	group.Go(func() error {
		if err := demoServer.Serve(demo); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	group.Go(func() error {
		<-running.Done()
		return demoServer.Close()
	})
	group.Go(func() error {
		defer stop()
		return a.devSession(running, s, binary, dir, demo.Addr().String(), tour)
	})
	err = group.Wait()
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return nil // Ctrl-C is how this ends
	}
	return err
}

// devSession runs an Envoy until ctx is done or, on a tour, until that ends.
func (a *app) devSession(ctx context.Context, s *service, binary, dir, upstream string, tour bool) (err error) {
	select {
	case <-s.serving:
	case <-ctx.Done():
		return ctx.Err()
	}
	state := devState{
		Manage: "http://" + s.manage.Addr().String(), Holders: "http://" + s.holders.Addr().String(), Metrics: "http://" + s.metrics.Addr().String(),
		GRPC: s.check.Addr().String(), Instance: devInstance,
		TokenFile: s.adminTokenPath(), SecretFile: filepath.Join(dir, devSecretFile), PID: os.Getpid(),
	}
	if err := ensureDevToken(ctx, s.admin, state.TokenFile); err != nil {
		return err
	}
	if state.keyID, err = ensureDevKey(ctx, s, state.SecretFile); err != nil {
		return err
	}

	g := generate.Config{Listen: usualOrFree(generate.DefaultListen), Upstreams: []string{upstream}, Keyward: state.GRPC, Usage: true}
	s.cfg.envoy(&g)
	bootstrap, err := generate.Envoy(g)
	if err != nil {
		return err
	}
	envoyLog, err := openDevLog(filepath.Join(dir, devEnvoyLog), os.O_TRUNC)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, envoyLog.Close()) }()
	envoy, err := envoytest.Start(ctx, envoytest.Config{Binary: binary, Bootstrap: bootstrap, Concurrency: 2, Log: envoyLog})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, envoy.Stop()) }()
	state.Envoy = "http://" + envoy.Listener(generate.Listener)
	state.EnvoyPID = envoy.Pid()
	text, err := json.MarshalIndent(state, "", "  ")
	if err != nil {
		return err
	}
	if err := replacePrivate(filepath.Join(dir, devFile), append(text, '\n')); err != nil {
		return err
	}
	// What it says is true only while it runs.
	defer func() { err = errors.Join(err, os.Remove(filepath.Join(dir, devFile))) }()

	if tour {
		return a.tour(ctx, state)
	}
	fmt.Fprint(a.stdout, welcome(state, dir))
	select {
	case <-ctx.Done():
		fmt.Fprintln(a.stderr, "\nStopping.")
		return nil
	case <-envoy.Done():
		return fmt.Errorf("envoy ended by itself: %w; its last words are in %s", envoy.Err(), envoyLog.Name())
	}
}

// welcome shows what to try, in lines that can be pasted.
func welcome(s devState, dir string) string {
	key := fmt.Sprintf(`-H "X-API-Key: $(cat %s)"`, shellPath(s.SecretFile))
	token := fmt.Sprintf(`-H "Authorization: Bearer $(cat %s)"`, shellPath(s.TokenFile))
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	say("keyward is running: Envoy at %s, Management API at %s, metrics at %s/metrics", s.Envoy, s.Manage, s.Metrics)
	say("State and logs are in %s. Ctrl-C ends it.", dir)
	say("")
	say("# 200: the demo service shows what reached it: who is calling, and no key")
	say("curl -i %s %s/orders", key, s.Envoy)
	say("# 401: no key")
	say("curl -i %s/orders", s.Envoy)
	say("# 403: the key may read orders, not write them")
	say("curl -i -X POST %s %s/orders", key, s.Envoy)
	say("# 429: more at once than the key's burst of %d", devBurst)
	say("for i in $(seq %d); do curl -s -o /dev/null -w '%%{http_code} ' %s %s/orders; done; curl -si %s %s/orders | tail -n 1",
		2*devBurst, key, s.Envoy, key, s.Envoy)
	say("# 429 again: slow requests count while they run, and this key may have %d at once (give the burst 10 s to refill)", devConcurrent)
	say("for i in $(seq %d); do curl -s -o /dev/null -w '%%{http_code} ' %s '%s/orders?delay=3s' & done; wait", devConcurrent+1, key, s.Envoy)
	say("# what the key may, and what is left of its limits")
	say("curl %s %s/self", key, s.Holders)
	say("# the keys of the instance %q, and another key", s.Instance)
	say("curl %s %s/instances/%s/apiKeys", token, s.Manage, s.Instance)
	say(`curl -X POST %s -H 'Content-Type: application/json' -d '{"name": "my-api-key"}' %s/instances/%s/apiKeys`, token, s.Manage, s.Instance)
	say("# revoke the demo key: the next request with it is a 401 (dev makes a new one at its next start)")
	say("curl -X DELETE %s %s/instances/%s/apiKeys/%s", token, s.Manage, s.Instance, s.keyID)
	say("# the same from the command line")
	say("export KEYWARD_SERVER=%s KEYWARD_TOKEN_FILE=%s", s.Manage, shellPath(s.TokenFile))
	say("%s keys list %s", shellPath(thisProgram()), s.Instance)
	return b.String()
}

// thisProgram is how this program can be called from anywhere.
func thisProgram() string {
	path, err := os.Executable()
	if err != nil {
		return "keyward"
	}
	return path
}

// shellPath quotes a path for a shell where it needs it.
func shellPath(path string) string {
	if strings.Trim(path, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+") == "" {
		return path
	}
	return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
}

// prepareDevFolder makes the folder, private and not for version control, and returns its full path. A
// folder that dev did not make is refused, and so is a link: a checkout of somebody else's may hold one.
func prepareDevFolder(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	marker := filepath.Join(dir, devMarker)
	switch info, err := os.Lstat(dir); {
	case errors.Is(err, fs.ErrNotExist):
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return "", err
		}
	case err != nil:
		return "", err
	case !info.IsDir():
		return "", usageError{fmt.Errorf("--dir: %s is no folder", dir)}
	default:
		entries, err := os.ReadDir(dir)
		if err != nil {
			return "", err
		}
		if made, err := os.Lstat(marker); len(entries) > 0 && (err != nil || !made.Mode().IsRegular()) {
			return "", usageError{fmt.Errorf("--dir: %s holds files that keyward dev did not make: name another folder", dir)}
		}
	}
	if err := os.Chmod(dir, 0o700); err != nil { //nolint:gosec // a folder that only its owner may enter
		return "", err
	}
	for path, text := range map[string]string{marker: "made by keyward dev\n", filepath.Join(dir, ".gitignore"): "*\n"} {
		if err := writeNewPrivate(path, []byte(text)); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", err
		}
	}
	return dir, nil
}

// openDevLog opens a log, never through a link. how is O_APPEND or O_TRUNC.
func openDevLog(path string, how int) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|how|syscall.O_NOFOLLOW, 0o600)
}

func ensureDevPepper(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return writeNewPrivate(path, apikey.MarshalPepper(apikey.NewPepper(1, true)))
}

// devCaller is who dev acts as.
var devCaller = admin.Caller{Name: devActor, Role: admin.RoleOwner}

// ensureDevToken puts a good management token into the file, if there is none.
func ensureDevToken(ctx context.Context, service *admin.Service, path string) error {
	if text, err := readPrivate(path); err == nil {
		if _, err := service.Authenticate(ctx, apikey.NewSecret(strings.TrimSpace(string(text)))); err == nil {
			return nil
		}
	}
	created, err := service.CreateToken(ctx, devCaller, admin.TokenInput{Name: devActor, Role: admin.RoleOwner})
	if err != nil {
		return err
	}
	return replacePrivate(path, []byte(created.Secret.Reveal()+"\n"))
}

// ensureDevKey puts the secret of a good key into the file, if there is none, and returns the key's id.
func ensureDevKey(ctx context.Context, s *service, path string) (apikey.ID, error) {
	if _, err := s.admin.Instance(ctx, devCaller, devInstance); errors.Is(err, apikey.ErrNotFound) {
		if _, err := s.admin.PutInstance(ctx, devCaller, devInstance, apikey.Policy{}); err != nil {
			return apikey.ID{}, err
		}
	} else if err != nil {
		return apikey.ID{}, err
	}
	if text, err := readPrivate(path); err == nil {
		k, _, err := s.store.FindKey(ctx, s.pepper.Digest(strings.TrimSpace(string(text))))
		if err == nil && k.StatusAt(time.Now()) == apikey.StatusActive {
			return k.ID, nil
		}
	}
	requests, burst, concurrent := 60, devBurst, devConcurrent
	created, err := s.admin.CreateKey(ctx, devCaller, devInstance, admin.KeyInput{
		Name: devKeyName, Description: "made by keyward dev", Scopes: []string{"orders:read"},
		Limits: admin.LimitsInput{Rate: &admin.RateInput{Requests: &requests, Per: "1m"}, Burst: &burst, MaxConcurrent: &concurrent},
	})
	if err != nil {
		return apikey.ID{}, err
	}
	return created.Key.ID, replacePrivate(path, []byte(created.Secret.Reveal()+"\n"))
}

// usualOrFree returns the usual address if nobody has it, otherwise the same host with a port that the
// system chooses.
func usualOrFree(address string) string {
	l, err := net.Listen("tcp", address)
	if err == nil {
		_ = l.Close()
		return address
	}
	host, _, _ := net.SplitHostPort(address)
	return net.JoinHostPort(host, "0")
}
