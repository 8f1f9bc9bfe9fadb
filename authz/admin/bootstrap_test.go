package admin_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

func readToken(t *testing.T, path string) apikey.Secret {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return apikey.NewSecret(strings.TrimSpace(string(b)))
}

func TestBootstrapMakesOneOwnerOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		path := filepath.Join(t.TempDir(), "admin.token")
		for i := range 2 {
			made, err := d.Bootstrap(t.Context(), root, path)
			if err != nil || made != (i == 0) {
				t.Fatalf("start %d: got %v, %v", i, made, err)
			}
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("file: %v, %v", info.Mode(), err)
		}
		secret := readToken(t, path)
		noCanary(t, d.log.String(), secret)
		if caller, err := d.Authenticate(t.Context(), secret); err != nil || caller.Role != admin.RoleOwner || caller.InstanceID != "" {
			t.Errorf("got %+v, %v", caller, err)
		}
		if ends, err := d.BootstrapAlive(t.Context()); err != nil || !ends.Equal(time.Now().Add(7*24*time.Hour)) {
			t.Errorf("ends %v, %v", ends, err)
		}
		time.Sleep(7*24*time.Hour + time.Microsecond)
		if _, err := d.Authenticate(t.Context(), secret); !errors.Is(err, admin.ErrUnauthenticated) {
			t.Errorf("after seven days: %v", err)
		}
		if ends, err := d.BootstrapAlive(t.Context()); err != nil || !ends.IsZero() {
			t.Errorf("alive until %v, %v", ends, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if made, err := d.Bootstrap(t.Context(), root, path); made || err != nil {
			t.Errorf("a store makes a first token once in its life: %v, %v", made, err)
		}
	})
}

func TestAnotherOwnerEndsTheBootstrapToken(t *testing.T) {
	d := open(t)
	path := filepath.Join(t.TempDir(), "admin.token")
	if _, err := d.Bootstrap(t.Context(), root, path); err != nil {
		t.Fatal(err)
	}
	d.instance(t, "a")
	for _, in := range []admin.TokenInput{{Name: "n", Role: admin.RoleOperator}, {Name: "n", Role: admin.RoleOwner, InstanceID: "a"}} {
		if _, err := d.CreateToken(t.Context(), root, in); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Authenticate(t.Context(), readToken(t, path)); err != nil {
			t.Fatalf("%+v ended it: nobody is left who may do everything", in)
		}
	}
	if _, err := d.CreateToken(t.Context(), root, admin.TokenInput{Name: "n", Role: admin.RoleOwner}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Authenticate(t.Context(), readToken(t, path)); !errors.Is(err, admin.ErrUnauthenticated) {
		t.Errorf("got %v", err)
	}
	want := []string{"token.create", "instance.put", "token.create", "token.create", "token.revoke", "token.create"}
	if got := d.actions(t); !slices.Equal(got, want) {
		t.Errorf("audit: got %v, want %v", got, want)
	}
}

func TestReplicasThatStartAtOnceMakeOneToken(t *testing.T) {
	for _, shared := range []bool{true, false} {
		d := open(t)
		folder := t.TempDir()
		const replicas = 8
		paths := make([]string, replicas)
		made := make([]bool, replicas)
		var group sync.WaitGroup
		for i := range replicas {
			paths[i] = filepath.Join(folder, "admin.token")
			if !shared {
				paths[i] = filepath.Join(t.TempDir(), "admin.token")
			}
			group.Go(func() {
				var err error
				made[i], err = d.with(d.store, apikey.Peppers{Current: d.pepper}).Bootstrap(t.Context(), root, paths[i])
				if err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		winner := slices.Index(made, true)
		if winner < 0 || slices.Contains(made[winner+1:], true) {
			t.Fatalf("shared %v: made %v, want one", shared, made)
		}
		if _, err := d.Authenticate(t.Context(), readToken(t, paths[winner])); err != nil {
			t.Errorf("shared %v: the file's token: %v", shared, err)
		}
		for i, path := range paths {
			if _, err := os.Lstat(path); !shared && i != winner && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a replica that lost left a file: %v", err)
			}
		}
		if tokens, err := d.store.Tokens(t.Context()); err != nil || len(tokens) != 1 {
			t.Errorf("got %d tokens, %v", len(tokens), err)
		}
	}
}

func TestBootstrapAfterACrashBeforeTheCommit(t *testing.T) {
	d := open(t)
	path := filepath.Join(t.TempDir(), "admin.token")
	// What a crash leaves, or what someone put there to be let in.
	planted := apikey.Format{}.New(apikey.KindManagement)
	if err := os.WriteFile(path, []byte(planted.Reveal()+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if made, err := d.Bootstrap(t.Context(), root, path); err != nil || !made {
		t.Fatalf("got %v, %v", made, err)
	}
	if _, err := d.Authenticate(t.Context(), planted); !errors.Is(err, admin.ErrUnauthenticated) {
		t.Errorf("the planted token: %v", err)
	}
	if _, err := d.Authenticate(t.Context(), readToken(t, path)); err != nil {
		t.Errorf("the new token: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestBootstrapRefusesWhatIsNoFile(t *testing.T) {
	for name, put := range map[string]func(path, target string) error{
		"symlink":          func(path, target string) error { return os.Symlink(target, path) },
		"dangling symlink": func(path, target string) error { return os.Symlink(target+".none", path) },
		"folder":           func(path, _ string) error { return os.Mkdir(path, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			d := open(t)
			folder := t.TempDir()
			path, target := filepath.Join(folder, "admin.token"), filepath.Join(folder, "target")
			if err := os.WriteFile(target, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := put(path, target); err != nil {
				t.Fatal(err)
			}
			if made, err := d.Bootstrap(t.Context(), root, path); err == nil || made {
				t.Fatalf("got %v, %v", made, err)
			}
			if b, err := os.ReadFile(target); err != nil || string(b) != "precious" {
				t.Errorf("the target: %q, %v", b, err)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if made, err := d.Bootstrap(t.Context(), root, path); err != nil || !made {
				t.Errorf("once it is gone: %v, %v", made, err)
			}
		})
	}
}

// A torn store answers the n-th Update with an outage, before or after its commit.
type torn struct {
	admin.Store
	n      int
	commit bool
}

func (s *torn) Update(ctx context.Context, fn func(admin.Tx) error) (apikey.Revision, error) {
	if s.n--; s.n != 0 {
		return s.Store.Update(ctx, fn)
	}
	if s.commit {
		if _, err := s.Store.Update(ctx, fn); err != nil {
			return 0, err
		}
	}
	return 0, apikey.ErrUndecided
}

func TestBootstrapWhoseCommitIsUnknown(t *testing.T) {
	for name, committed := range map[string]bool{"committed": true, "not committed": false} {
		t.Run(name, func(t *testing.T) {
			d := open(t)
			path := filepath.Join(t.TempDir(), "admin.token")
			made, err := d.with(&torn{d.store, 2, committed}, apikey.Peppers{Current: d.pepper}).Bootstrap(t.Context(), root, path)
			if made != committed || (err == nil) != committed {
				t.Fatalf("got %v, %v", made, err)
			}
			if committed {
				if _, err := d.Authenticate(t.Context(), readToken(t, path)); err != nil {
					t.Errorf("the file's token: %v", err)
				}
				return
			}
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a token that opens nothing was left: %v", err)
			}
			if made, err := d.Bootstrap(t.Context(), root, path); err != nil || !made {
				t.Errorf("the next start: %v, %v", made, err)
			}
		})
	}
}

func TestBootstrapWaitsForTheFolderNoLongerThanItsContext(t *testing.T) {
	d := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	folder := t.TempDir()
	done := make(chan error, 1)
	// The first holds the lock for as long as its transaction runs.
	inside, leave := make(chan struct{}), make(chan struct{})
	go func() {
		_, err := d.with(gate{d.store, inside, leave}, apikey.Peppers{Current: d.pepper}).Bootstrap(t.Context(), root, filepath.Join(folder, "admin.token"))
		done <- err
	}()
	<-inside
	if _, err := d.Bootstrap(ctx, root, filepath.Join(folder, "admin.token")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(leave)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

type gate struct {
	admin.Store
	inside, leave chan struct{}
}

func (g gate) Update(ctx context.Context, fn func(admin.Tx) error) (apikey.Revision, error) {
	select {
	case <-g.leave:
	default:
		g.inside <- struct{}{}
		<-g.leave
	}
	return g.Store.Update(ctx, fn)
}
