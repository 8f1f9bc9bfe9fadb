package main

import (
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestScript tells the stories of testdata/script. Beside testscript's own commands there are:
//
//	serve [arg...]            start keyward serve --config keyward.yaml here, until it is ready; what it
//	                          says is in serve.log. Only one at a time
//	signal TERM|INT|HUP       send the server a signal
//	ended CODE                the server has to end with this exit code, or by signal -CODE
//	exits CODE cmd [arg...]   run a command that has to end with this exit code
//	eventually RE cmd [arg…]  repeat a command until its standard output matches
//	awaitlog RE               wait until the server says so
//	check STATUS FILE METHOD PATH  ask the server as Envoy would, with the secret in FILE (- for none)
//	capture VAR stdout|FILE   keep the text, without space around it, in a variable
//	mode PERM FILE...         files have to have this mode
//	sql FILE STATEMENT        change a store behind its back
//	newerschema FILE          make a store look as if a newer keyward wrote it
//
// A script has ports of its own: the variables that make a server listen there and a client call it are
// set, and the token file is admin.token. A command that hangs ends after a while with where it hangs, a
// story that does ends before the test's own deadline.
func TestScript(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			server := &scriptServer{at: newPorts()}
			e.Values[serverKey{}] = server
			e.Defer(func() {
				if server.process != nil {
					server.kill()
				}
			})
			e.Vars = append(e.Vars, server.at.env()...)
			e.Vars = append(e.Vars,
				"GORACE=atexit_sleep_ms=0", "GOCOVERDIR="+os.Getenv("GOCOVERDIR"), timeLimit+"="+commandLimit.String(), drainTime+"=10ms",
				"CHECK="+server.at.check, "MANAGE="+server.at.manage, "METRICS="+server.at.metrics, "HOLDERS="+server.at.holders,
				"KEYWARD_HOLDERS=http://"+server.at.holders,
				"KEYWARD_SERVER=http://"+server.at.manage, "KEYWARD_TOKEN_FILE="+filepath.Join(e.WorkDir, "admin.token"),
			)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"serve": func(ts *testscript.TestScript, neg bool, args []string) {
				s := serverOf(ts, neg, len(args) >= 0)
				if s.process != nil && !s.over() {
					ts.Fatalf("a server runs already")
				}
				p, err := serveAs(ts.MkAbs("."), append(s.at.env(), drainTime+"="+ts.Getenv(drainTime)), s.at, args...)
				ts.Check(err)
				s.process = p
			},
			"signal": func(ts *testscript.TestScript, neg bool, args []string) {
				s := serverOf(ts, neg, len(args) == 1)
				signal, ok := map[string]syscall.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP}[args[0]]
				if !ok {
					ts.Fatalf("unknown signal %s", args[0])
				}
				ts.Check(s.cmd.Process.Signal(signal))
			},
			"ended": func(ts *testscript.TestScript, neg bool, args []string) {
				s := serverOf(ts, neg, len(args) == 1)
				code, err := s.ended()
				ts.Check(err)
				if strconv.Itoa(code) != args[0] {
					ts.Fatalf("ended with %d; it says:\n%s", code, s.says())
				}
			},
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				serverOf(ts, neg, len(args) >= 2)
				code := 0
				err := ts.Exec(args[1], args[2:]...)
				if exit, ok := errors.AsType[*exec.ExitError](err); ok {
					code = exit.ExitCode()
				} else {
					ts.Check(err)
				}
				if strconv.Itoa(code) != args[0] {
					ts.Fatalf("exit code %d, want %s", code, args[0])
				}
			},
			"eventually": func(ts *testscript.TestScript, neg bool, args []string) {
				serverOf(ts, neg, len(args) >= 2)
				want := regexp.MustCompile("(?m)" + args[0])
				ts.Check(eventually(func() error {
					cmd := exec.Command(args[1], args[2:]...)
					cmd.Dir = ts.MkAbs(".")
					cmd.Env = programEnv("HOME="+ts.Getenv("HOME"), "KEYWARD_HOLDERS="+ts.Getenv("KEYWARD_HOLDERS"), "KEYWARD_SERVER="+ts.Getenv("KEYWARD_SERVER"), "KEYWARD_TOKEN_FILE="+ts.Getenv("KEYWARD_TOKEN_FILE"))
					out, err := cmd.CombinedOutput()
					if err == nil && !want.Match(out) {
						err = fmt.Errorf("got %s, want %s", out, want)
					}
					return err
				}))
			},
			"awaitlog": func(ts *testscript.TestScript, neg bool, args []string) {
				s := serverOf(ts, neg, len(args) == 1)
				want := regexp.MustCompile(args[0])
				ts.Check(eventually(func() error {
					if said := s.says(); !want.MatchString(said) {
						return fmt.Errorf("it does not say %s but:\n%s", want, said)
					}
					return nil
				}))
			},
			"check": func(ts *testscript.TestScript, neg bool, args []string) {
				s := serverOf(ts, neg, len(args) == 4)
				secret := ""
				if args[1] != "-" {
					secret = strings.TrimSpace(ts.ReadFile(args[1]))
				}
				conn, err := dialCheck(s.at.check)
				ts.Check(err)
				defer conn.Close()
				got, err := conn.status(secret, args[2], args[3])
				for tries := 0; err == nil && got == 503 && args[0] != "503" && tries < 10; tries++ {
					time.Sleep(time.Second) // which is what Retry-After says of the only thing here that takes so long
					got, err = conn.status(secret, args[2], args[3])
				}
				ts.Check(err)
				if strconv.Itoa(got) != args[0] {
					ts.Fatalf("Envoy would answer %d, want %s", got, args[0])
				}
			},
			"capture": func(ts *testscript.TestScript, neg bool, args []string) {
				serverOf(ts, neg, len(args) == 2)
				ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile(args[1])))
			},
			"mode": func(ts *testscript.TestScript, neg bool, args []string) {
				serverOf(ts, neg, len(args) >= 2)
				want, err := strconv.ParseUint(args[0], 8, 32)
				ts.Check(err)
				for _, name := range args[1:] {
					info, err := os.Stat(ts.MkAbs(name))
					ts.Check(err)
					if got := info.Mode().Perm(); got != fs.FileMode(want) {
						ts.Fatalf("%s has mode %#o, want %#o", name, got, want)
					}
				}
			},
			"sql": func(ts *testscript.TestScript, neg bool, args []string) {
				serverOf(ts, neg, len(args) == 2)
				db, err := sql.Open("sqlite", ts.MkAbs(args[0]))
				ts.Check(err)
				_, err = db.Exec(args[1])
				ts.Check(errors.Join(err, db.Close()))
			},
			"newerschema": func(ts *testscript.TestScript, neg bool, args []string) {
				serverOf(ts, neg, len(args) == 1)
				db, err := sql.Open("sqlite", ts.MkAbs(args[0]))
				ts.Check(err)
				_, err = db.Exec("INSERT INTO goose_db_version (version_id, is_applied) VALUES (9999, 1)")
				ts.Check(errors.Join(err, db.Close()))
			},
		},
	})
}

type serverKey struct{}

// A scriptServer is the server of one script, if it has one.
type scriptServer struct {
	at ports
	*process
}

func (s *scriptServer) over() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

func serverOf(ts *testscript.TestScript, neg, usable bool) *scriptServer {
	if neg || !usable {
		ts.Fatalf("wrong use of a command: see TestScript")
	}
	return ts.Value(serverKey{}).(*scriptServer)
}
