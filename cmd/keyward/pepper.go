package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"

	"keyward/authz/apikey"
	"keyward/authz/manage"
)

func (a *app) pepperCommand() *cobra.Command {
	c := &cobra.Command{Use: "pepper", Short: "Make and rotate the pepper, under which secrets become digests", Args: cobra.NoArgs}
	a.clientFlags(c)
	c.AddCommand(a.pepperNew(), a.pepperRotate(), a.pepperStatus(), a.pepperRetire())
	return c
}

func (a *app) pepperNew() *cobra.Command {
	var out string
	c := &cobra.Command{
		Use: "new --out FILE", Short: "Make the first pepper, in a new file of mode 0600", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := writeNewPrivate(out, apikey.MarshalPepper(apikey.NewPepper(1, false))); err != nil {
				return err
			}
			fmt.Fprintf(a.stderr, "Keep a copy of %s apart from the store's backups: without it no key can be checked.\n", out)
			return nil
		},
	}
	c.Flags().StringVar(&out, "out", "", "the new file (needed)")
	_ = c.MarkFlagRequired("out")
	return c
}

func (a *app) pepperRotate() *cobra.Command {
	c := &cobra.Command{
		Use:   "rotate --config FILE",
		Short: "Put a new pepper in use, and keep the old one beside it",
		Long: "Put a new pepper in use: pepper.file becomes a new version, and what it held goes to pepper.previousFile, which\n" +
			"has to be configured, and may be so at any time: a file that is not there is no previous pepper.\n" +
			"Restart keyward afterwards. Both peppers find keys; each key that is used gets its digest under the new one.\n" +
			"keyward pepper status shows how many are left; when none is, keyward pepper retire ends the old pepper.",
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			if cfg.Pepper.PreviousFile == "" {
				return usageError{errors.New("pepper.previousFile is not set: name the file that the old pepper is to be kept in")}
			}
			file, err := filepath.EvalSymlinks(cfg.Pepper.File)
			if err != nil {
				return err
			}
			peppers, err := readPeppers(PepperFiles{File: file}, true, nil)
			if err != nil {
				return err
			}
			old := peppers.Current
			next := apikey.NewPepper(old.Version()+1, old.Dev())
			// The old one is safe in its new place before its old place is overwritten. Where that is done
			// already, an earlier rotate was cut off right there, and this one goes on.
			kept, err := readPrivate(cfg.Pepper.PreviousFile)
			switch {
			case errors.Is(err, fs.ErrNotExist):
				if err := writeNewPrivate(cfg.Pepper.PreviousFile, apikey.MarshalPepper(old)); err != nil {
					return err
				}
			case err != nil:
				return err
			case !bytes.Equal(kept, apikey.MarshalPepper(old)):
				return usageError{fmt.Errorf("%s is there already: the last rotation is not finished. Once keyward pepper retire has succeeded, remove it", cfg.Pepper.PreviousFile)}
			}
			if err := errors.Join(sameOwner(cfg.Pepper.PreviousFile, file), replacePrivate(file, apikey.MarshalPepper(next))); err != nil {
				return err
			}
			fmt.Fprintf(a.stderr, "%s now holds version %d, %s version %d.\nRestart keyward; then keyward pepper status shows how many keys are left.\n",
				cfg.Pepper.File, next.Version(), cfg.Pepper.PreviousFile, old.Version())
			return nil
		},
	}
	c.Flags().StringArrayVar(&a.settings, "set", nil, "set one field of the configuration, as serve was told")
	return c
}

func (a *app) pepperStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show how many keys and tokens only an older pepper finds", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				all, err := client.Peppers(ctx)
				if err != nil {
					return err
				}
				return printList(a, all, table[manage.Pepper]{
					header: "VERSION\tLEFT",
					row: func(p manage.Pepper) []string {
						return []string{strconv.Itoa(int(p.Version)), strconv.Itoa(p.Left)}
					},
					id: func(p manage.Pepper) string { return strconv.Itoa(int(p.Version)) },
				})
			})
		},
	}
}

func (a *app) pepperRetire() *cobra.Command {
	return &cobra.Command{
		Use: "retire VERSION", Short: "End an older pepper; refused while keys are left that only it finds", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			version, err := strconv.ParseUint(args[0], 10, 32)
			if err != nil || version == 0 {
				return usageError{errors.New("VERSION must be a number from 1")}
			}
			if err := a.confirm("Retire pepper version " + args[0] + "?"); err != nil {
				return err
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				if err := client.RetirePepper(ctx, uint32(version)); err != nil {
					return err
				}
				fmt.Fprintln(a.stderr, "Remove pepper.previousFile from the configuration, and the file, before the next restart.")
				return nil
			})
		},
	}
}

// A takenError is a file that must be new and is not.
type takenError struct{ path string }

func (e takenError) Error() string { return e.path + " is there already and is not overwritten" }

func (e takenError) Is(target error) bool { return target == fs.ErrExist }

// writeNewPrivate writes a file of mode 0600 that must not exist yet, and returns when it is on disk.
func writeNewPrivate(path string, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return usageError{takenError{path}}
	}
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Sync(), f.Close(), syncFolder(filepath.Dir(path)))
}

// sameOwner gives a file to the owner of another. It matters where root works on a server's files.
func sameOwner(path, as string) error {
	info, err := os.Stat(as)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 {
		return os.Chown(path, int(stat.Uid), int(stat.Gid))
	}
	return nil
}

// replacePrivate puts a file in the place of another, whole or not at all, and leaves it to the same owner.
func replacePrivate(path string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close(), sameOwner(f.Name(), path)); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncFolder(filepath.Dir(path))
}

func syncFolder(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
