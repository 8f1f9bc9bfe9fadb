package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"keyward/authz/admin"
	"keyward/authz/manage"
)

func (a *app) keysImport() *cobra.Command {
	var opts manage.ImportOptions
	c := &cobra.Command{
		Use: "import INSTANCE FILE", Short: "Make keys of secrets that their holders have already",
		Long: "Import reads one JSON object a line (- for standard input): what keys create takes, and \"secret\"\n" +
			"(or \"sha256\" of it, or \"argon2id\" of an Agent Access Token: see docs/agent-access-token.md).\n" +
			"Rows go in batches, of which each is imported as a whole or not at all. It stops at the first batch\n" +
			"with a row that cannot be imported. Mend the file and import it again: what is there already is\n" +
			"passed over.",
		Example: "  keyward keys import demo keys.ndjson --dry-run\n" +
			"  echo '{\"name\":\"backend\",\"secret\":\"kwi_…\"}' | keyward keys import demo -",
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if opts.Batch < 1 || opts.Batch > admin.MaxImport {
				return usageError{fmt.Errorf("--batch: must be from 1 to %d", admin.MaxImport)}
			}
			if opts.FromRow < 1 {
				return usageError{errors.New("--from-row: must be at least 1")}
			}
			var from io.Reader = input{a}
			if args[1] != "-" {
				f, err := os.Open(args[1])
				if err != nil {
					return usageError{err}
				}
				defer func() { _ = f.Close() }()
				from = f
			}
			a.long = true
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				return a.importKeys(ctx, client, args[0], from, opts)
			})
		},
	}
	c.Flags().BoolVar(&opts.DryRun, "dry-run", false, "judge every row, and keep nothing")
	c.Flags().IntVar(&opts.FromRow, "from-row", 1, "begin with this line")
	c.Flags().IntVar(&opts.Batch, "batch", 100, "lines that are imported together or not at all, at most 500")
	return c
}

// importKeys imports batch by batch. What became of the rows goes to stdout, how far it is to stderr.
func (a *app) importKeys(ctx context.Context, client *manage.Client, instance string, from io.Reader, opts manage.ImportOptions) error {
	var sum manage.ImportReport
	var shown []manage.ImportedRow
	held := 0
	for report, err := range client.ImportKeys(ctx, instance, from, opts) {
		if err != nil {
			if sum.Imported > 0 && !opts.DryRun {
				fmt.Fprintf(a.stderr, "%d keys were imported before this; import the file again to go on.\n", sum.Imported)
			}
			return err
		}
		sum.Imported += report.Imported
		sum.Existing += report.Existing
		sum.Refused += report.Refused
		for _, row := range report.Rows {
			if row.Status == admin.RowHeld {
				held++
			}
			// A table is for people: it names what has to be mended.
			if a.output != "table" || row.Status == admin.RowRefused || a.quiet {
				shown = append(shown, row)
			}
		}
		if a.output == "jsonl" || a.quiet { // a long import shows its rows as they come
			if err := a.printRows(shown); err != nil {
				return err
			}
			shown = shown[:0]
		}
		if !a.quiet {
			fmt.Fprintf(a.stderr, "%d rows\n", sum.Imported+sum.Existing+sum.Refused+held)
		}
	}
	if a.output != "jsonl" && !a.quiet && (a.output != "table" || len(shown) > 0) {
		if err := printList(a, shown, importTable); err != nil {
			return err
		}
	}
	if !a.quiet {
		would := ""
		if opts.DryRun {
			would = "would be "
		}
		fmt.Fprintf(a.stderr, "%s%d imported, %d there already, %d refused, %d held back with them\n", would, sum.Imported, sum.Existing, sum.Refused, held)
	}
	switch {
	case sum.Refused == 0:
		return nil
	case opts.DryRun:
		return usageError{fmt.Errorf("rows that cannot be imported: %d", sum.Refused)}
	}
	return usageError{fmt.Errorf("rows that cannot be imported: %d, and with them %d others of their batch: mend them and import the file again", sum.Refused, held)}
}

// printRows shows rows one by one.
func (a *app) printRows(rows []manage.ImportedRow) error {
	if !a.quiet {
		return printList(a, rows, importTable)
	}
	for _, row := range rows {
		if !row.KeyID.IsZero() {
			fmt.Fprintln(a.stdout, row.KeyID)
		}
	}
	return nil
}

var importTable = table[manage.ImportedRow]{
	header: "ROW\tSTATUS\tWHY",
	row: func(r manage.ImportedRow) []string {
		why := ""
		for i, e := range r.Errors {
			if i > 0 {
				why += "; "
			}
			why += e.Message
		}
		return []string{strconv.Itoa(r.Row), string(r.Status), why}
	},
	id: func(r manage.ImportedRow) string { return r.KeyID.String() },
}

func (a *app) keysExport() *cobra.Command {
	return &cobra.Command{
		Use: "export INSTANCE", Short: "Write what is known of all keys, one JSON object a line, without secrets",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			a.long = true
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				w := bufio.NewWriter(a.stdout)
				e := json.NewEncoder(w)
				e.SetEscapeHTML(false)
				for k, err := range client.ExportKeys(ctx, args[0]) {
					if err == nil {
						err = e.Encode(k)
					}
					if err != nil {
						return errors.Join(err, w.Flush())
					}
				}
				return w.Flush()
			})
		},
	}
}
