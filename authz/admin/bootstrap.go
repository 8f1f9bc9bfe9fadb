package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"keyward/authz/apikey"
)

const (
	bootstrapMark = "bootstrap token"
	bootstrapLife = 7 * 24 * time.Hour
)

var (
	errMade   = errors.New("the store has had its first token")
	errUnmade = errors.New("the store has not had its first token")
)

// Bootstrap makes the first management token, an owner's, if the store never had one, and writes it to
// a new file of mode 0600 at path. made says whether this call did. Of several replicas one makes it.
//
// The file is on disk before the token is committed, so a crash between the two leaves a file whose
// token opens nothing. The next Bootstrap replaces it without reading it: nobody can plant a token by
// putting a file there. A lock on the folder keeps two replicas that share it from taking each other's
// file for such a rest. Errors: anything at path that is not a regular file is refused.
func (s *Service) Bootstrap(ctx context.Context, caller Caller, path string) (made bool, err error) {
	unlock, err := lockFolder(ctx, filepath.Dir(path))
	if err != nil {
		return false, fmt.Errorf("first token: lock the folder of %s: %w", path, err)
	}
	defer unlock()

	// Asked first, in a transaction that is always rolled back, so that only a new store writes a file.
	_, err = s.update(ctx, func(ctx context.Context, tx Tx) error {
		first, err := tx.Mark(ctx, bootstrapMark)
		switch {
		case err != nil:
			return err
		case !first:
			return errMade
		}
		return errUnmade
	})
	switch {
	case errors.Is(err, errMade):
		return false, nil
	case !errors.Is(err, errUnmade):
		return false, fmt.Errorf("first token: %w", err)
	}

	secret := s.cfg.Format.New(apikey.KindManagement)
	if err := s.writeToken(path, secret); err != nil {
		return false, fmt.Errorf("first token: %w", err)
	}
	_, err = s.update(ctx, func(ctx context.Context, tx Tx) error {
		first, err := tx.Mark(ctx, bootstrapMark)
		if err != nil {
			return err
		}
		if !first { // a replica with another folder
			return errMade
		}
		at := now()
		t := &Token{Name: "bootstrap", Role: RoleOwner, CreatedAt: at, ExpiresAt: at.Add(bootstrapLife), Bootstrap: true}
		return s.keepToken(ctx, tx, caller, t, secret)
	})
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, errMade) {
		// Perhaps it was committed all the same, and the file is the only way in.
		look, cancel := context.WithTimeout(context.WithoutCancel(ctx), updateTimeout)
		defer cancel()
		_, lookErr := s.store.Token(look, s.cfg.Peppers.Current.Digest(secret.Reveal()))
		switch {
		case lookErr == nil:
			return true, nil
		case !isNotFound(lookErr):
			return false, fmt.Errorf("first token: %w; %s is left in place in case it was made", err, path)
		}
	}
	if rm := os.Remove(path); rm != nil {
		s.log.Warn("cannot remove a file whose token opens nothing", slog.String("path", path), slog.Any("error", rm))
	}
	if errors.Is(err, errMade) {
		return false, nil
	}
	return false, fmt.Errorf("first token: %w", err)
}

// BootstrapAlive returns when the token that Bootstrap made ends; zero if none is alive.
func (s *Service) BootstrapAlive(ctx context.Context) (time.Time, error) {
	tokens, err := s.store.Tokens(ctx)
	if err != nil {
		return time.Time{}, err
	}
	for _, t := range tokens {
		if t.Bootstrap && t.statusAt(time.Now()) == "active" {
			return t.ExpiresAt, nil
		}
	}
	return time.Time{}, nil
}

// writeToken writes a secret to a new file at path, and returns when it is on disk.
func (s *Service) writeToken(path string, secret apikey.Secret) (err error) {
	switch old, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case !old.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file: remove it, or name another path", path)
	default:
		s.log.Warn("replacing the token file of a start that did not finish", slog.String("path", path))
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(secret.Reveal() + "\n")
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(path) // half a token
		return err
	}
	return syncFolder(filepath.Dir(path))
}

// syncFolder makes a new name in a folder outlive a power cut.
func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lockFolder keeps others that lock the same folder out until unlock, or until this process ends.
func lockFolder(ctx context.Context, dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(d.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = d.Close() }, nil // which unlocks
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			_ = d.Close()
			return nil, err
		}
		select {
		case <-ctx.Done():
			_ = d.Close()
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}
