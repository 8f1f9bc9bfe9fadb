package main

import (
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"keyward/authz/admin"
	"keyward/authz/store/sqlite"
)

// storeFlags are those of commands that work on the store's file itself.
func (a *app) storeFlags(c *cobra.Command) {
	a.configFlags(c)
	c.Flags().StringVarP(&a.output, "output", "o", "table", "table, json, jsonl or yaml")
	do := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if err := wrapUsage(oneOf("--output", a.output, "table", "json", "jsonl", "yaml")); err != nil {
			return err
		}
		return do(cmd, args)
	}
}

func (a *app) backupCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "backup FILE --config FILE",
		Short: "Copy the store to a new file, while the server runs",
		Long: "Copy the store to a new file of mode 0600, while the server runs or not. It is run where the store's file is: it\n" +
			"reads that, and asks no server. What is committed before the command starts is in the copy, whole; the file is\n" +
			"there when all of it is. Keep the pepper's file too, and elsewhere: without it no key in the copy can be checked,\n" +
			"the copy alone tells no secret.",
		Example: "  keyward backup /backups/keyward-$(date +%F).db --config /etc/keyward/keyward.yaml",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			if err := sqlite.Backup(cmd.Context(), cfg.Store.SQLite.Path, args[0]); err != nil {
				return err
			}
			info, err := os.Stat(args[0])
			if err != nil {
				return err
			}
			done := struct {
				File  string `json:"file"`
				Bytes int64  `json:"bytes"`
			}{args[0], info.Size()}
			return printOne(a, done, [][2]string{{"FILE", done.File}, {"BYTES", strconv.FormatInt(done.Bytes, 10)}})
		},
	}
	a.storeFlags(c)
	return c
}

func (a *app) restoreCommand() *cobra.Command {
	var replace bool
	c := &cobra.Command{
		Use:   "restore FILE --config FILE",
		Short: "Make the store from a backup, while no server runs",
		Long: "Make the store from a backup, while no server runs. The backup is checked first, whole, and so is that the pepper\n" +
			"is the one of its keys; if anything is wrong, nothing is changed. A store that is there is only replaced with\n" +
			"--replace, and is kept beside.\n\n" +
			"What was done after the backup is lost. Keys that were revoked since work again: revoke them anew.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			peppers, err := readPeppers(cfg.Pepper, true, slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
			if err != nil {
				return err
			}
			if err := a.confirm(fmt.Sprintf("Make %s from %s? What was done after that backup is lost, revocations included.", cfg.Store.SQLite.Path, args[0])); err != nil {
				return err
			}
			store := sqlite.Config{Path: cfg.Store.SQLite.Path, Audit: admin.NewAuditKeys(peppers)}
			done, err := sqlite.Restore(cmd.Context(), args[0], store, localActor("keyward restore"), replace)
			if err != nil {
				return err
			}
			if err := sameOwner(cfg.Store.SQLite.Path, args[0]); err != nil {
				return err
			}
			fmt.Fprintf(a.stderr, "What was done after %s is not in it: keys that were revoked since work again until they are revoked anew.\n", stamp(done.TakenAt))
			answer := struct {
				TakenAt  time.Time `json:"takenAt"`
				Replaced string    `json:"replaced,omitempty"`
			}{done.TakenAt, done.Replaced}
			return printOne(a, answer, [][2]string{{"RESTORED", cfg.Store.SQLite.Path}, {"AS OF", stamp(done.TakenAt)}, {"REPLACED", done.Replaced}})
		},
	}
	a.storeFlags(c)
	c.Flags().BoolVar(&replace, "replace", false, "take the place of the store that is there, which is kept beside")
	c.Flags().BoolVar(&a.yes, "yes", false, "do not ask")
	return c
}

// localActor is who the audit says did something on the file itself.
func localActor(command string) string {
	if u, err := user.Current(); err == nil {
		return command + " as " + u.Username
	}
	return command
}

func (a *app) migrateCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "migrate", Short: "Show and bring up to date the schema of the store, while no server runs", Args: cobra.NoArgs,
		Long: "Show and bring up to date the schema of the store, while no server runs. A server does the same when it starts;\n" +
			"this is for who wants to see it done before.",
	}
	status := &cobra.Command{
		Use: "status --config FILE", Short: "List the steps of the schema and when each was made; changes nothing", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			steps, err := sqlite.Migrations(cmd.Context(), cfg.Store.SQLite.Path)
			return a.printMigrations(steps, err)
		},
	}
	up := &cobra.Command{
		Use: "up --config FILE", Short: "Make the steps that are not made yet; take a backup before", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			if _, err := os.Stat(cfg.Store.SQLite.Path); err != nil {
				return usageError{fmt.Errorf("store.sqlite.path: %w; keyward serve makes a new store", err)}
			}
			steps, err := sqlite.Migrate(cmd.Context(), cfg.Store.SQLite.Path)
			return a.printMigrations(steps, err)
		},
	}
	a.storeFlags(status)
	a.storeFlags(up)
	c.AddCommand(status, up)
	return c
}

func (a *app) printMigrations(steps []sqlite.Migration, err error) error {
	if err != nil {
		return err
	}
	type step struct {
		Version   int64     `json:"version"`
		Name      string    `json:"name"`
		AppliedAt time.Time `json:"appliedAt,omitzero"`
	}
	var list []step
	for _, s := range steps {
		list = append(list, step(s))
	}
	return printList(a, list, table[step]{
		header: "VERSION\tNAME\tMADE",
		row: func(s step) []string {
			return []string{strconv.FormatInt(s.Version, 10), s.Name, stamp(s.AppliedAt)}
		},
		id: func(s step) string { return s.Name },
	})
}
