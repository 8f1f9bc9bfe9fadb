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
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

func (a *app) auditCommand() *cobra.Command {
	c := &cobra.Command{Use: "audit", Short: "See who did what, keep a copy, and prove that nothing is missing", Args: cobra.NoArgs}
	a.clientFlags(c)
	c.AddCommand(a.auditList(), a.auditHead(), a.auditVerify(), a.auditExport())
	return c
}

func (a *app) auditList() *cobra.Command {
	var filter admin.EventFilter
	var outcome, from, to string
	var limit int
	c := &cobra.Command{
		Use: "list", Short: "List audit events, newest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			filter.Outcome = admin.Outcome(outcome)
			for _, bound := range []struct {
				flag, text string
				into       *time.Time
			}{{"--from", from, &filter.From}, {"--to", to, &filter.To}} {
				if bound.text == "" {
					continue
				}
				var err error
				if *bound.into, err = moment(bound.text, time.Now()); err != nil {
					return usageError{fmt.Errorf("%s: %w", bound.flag, err)}
				}
			}
			if limit < 0 {
				return usageError{errors.New("--limit: must be 0 (all) or more")}
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				var all []admin.EventRecord
				for e, err := range client.AuditEvents(ctx, filter) {
					if err != nil {
						return err
					}
					if all = append(all, e); len(all) == limit {
						break
					}
				}
				return printList(a, all, table[admin.EventRecord]{
					header: "EVENT\tAT\tACTOR\tFROM\tACTION\tOUTCOME\tINSTANCE\tTARGET",
					row: func(e admin.EventRecord) []string {
						outcome := string(e.Outcome)
						if e.Refused != "" {
							outcome += ": " + e.Refused
						}
						return []string{strconv.FormatInt(e.Sequence, 10), stamp(e.At), e.Actor, e.RemoteAddr, e.Action, outcome, e.InstanceID, e.Target}
					},
					id: func(e admin.EventRecord) string { return strconv.FormatInt(e.Sequence, 10) },
				})
			})
		},
	}
	f := c.Flags()
	f.StringVar(&filter.InstanceID, "instance", "", "of this instance only")
	f.StringVar(&filter.Actor, "actor", "", "by whom, exactly, such as token:0192f0c1-…")
	f.StringVar(&filter.Action, "action", "", "what, exactly, such as key.create")
	f.StringVar(&filter.Target, "target", "", "the id of what was changed")
	f.StringVar(&outcome, "outcome", "", "done or refused")
	f.StringVar(&from, "from", "", "not before this time (RFC 3339), or not longer ago than this, such as 24h")
	f.StringVar(&to, "to", "", "not after this time, or longer ago than this")
	f.IntVar(&limit, "limit", 100, "at most so many; 0 for all")
	return c
}

// moment reads a time, or how long ago it is.
func moment(s string, now time.Time) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	ago, err := apikey.ParseDuration(s)
	if err != nil {
		return time.Time{}, errors.New("must be a time such as 2026-01-31T12:00:00Z, or a duration such as 24h")
	}
	return now.Add(-ago.Std()), nil
}

func (a *app) auditHead() *cobra.Command {
	return &cobra.Command{
		Use:   "head",
		Short: "Show the end of the chain; kept elsewhere, it proves later that nothing was cut off",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				head, err := client.AuditHead(ctx)
				if err != nil {
					return err
				}
				return printOne(a, head, [][2]string{{"EVENT", strconv.FormatInt(head.Sequence, 10)}, {"LINK", head.Link.String()}, {"AT", stamp(head.At)}})
			})
		},
	}
}

// errAudit: something is wrong with the audit. What it is has been printed.
var errAudit = errors.New("the audit is not as it was written")

func (a *app) auditVerify() *cobra.Command {
	var headFile, exported string
	c := &cobra.Command{
		Use:   "verify",
		Short: "Follow the audit's chain, and say what was changed, dropped, moved, put in or cut off",
		Long: "Follow the audit's chain, and say what was changed, dropped, moved, put in or cut off; exit code 1 if anything was.\n" +
			"What the server cannot know, that the whole store was replaced by an older copy of it, a head finds that was kept\n" +
			"elsewhere: keyward audit head -o json > FILE, and later keyward audit verify --head FILE.\n" +
			"With --export a copy that keyward audit export made is followed instead. That needs neither a server nor the pepper,\n" +
			"and proves something only together with --head.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			head, err := readHead(headFile)
			if err != nil {
				return err
			}
			if exported != "" {
				report, err := a.verifyExport(exported, head)
				if err != nil {
					return err
				}
				return a.printReport(report)
			}
			a.long = true
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				report, err := client.AuditVerify(ctx, head)
				if err != nil {
					return err
				}
				return a.printReport(report)
			})
		},
	}
	c.Flags().StringVar(&headFile, "head", "", "file with a head from earlier, as keyward audit head -o json wrote it")
	c.Flags().StringVar(&exported, "export", "", "follow this copy; - for standard input")
	return c
}

func readHead(file string) (*admin.AuditHead, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, usageError{fmt.Errorf("--head: %w", err)}
	}
	var head admin.AuditHead
	if err := json.Unmarshal(text, &head); err != nil || head.Sequence < 1 {
		return nil, usageError{fmt.Errorf("--head: %s is not what keyward audit head -o json writes", file)}
	}
	return &head, nil
}

func (a *app) printReport(report admin.AuditReport) error {
	if a.output != "table" {
		if err := a.printData(report); err != nil {
			return err
		}
	} else {
		for _, f := range report.Findings {
			var where []string
			if f.Segment != 0 {
				where = append(where, fmt.Sprintf("segment %d", f.Segment))
			}
			if f.Sequence != 0 {
				where = append(where, fmt.Sprintf("event %d", f.Sequence))
			}
			fmt.Fprintf(a.stdout, "%s: %s\n", strings.Join(where, ", "), f.Problem)
		}
		for _, n := range report.Unproved {
			fmt.Fprintf(a.stderr, "The head of event %d proves nothing: its segment was removed for its age.\n", n)
		}
		if report.Whole {
			fmt.Fprintf(a.stdout, "whole: %d events in %d segments, %d of them removed for their age; it ends with event %d, link %s\n",
				report.Events, report.Segments, report.Removed, report.Head.Sequence, report.Head.Link)
		}
	}
	if !report.Whole {
		return errAudit
	}
	return nil
}

// verifyExport follows an exported chain. Its first event is taken as it is: what came before may have
// been removed for its age.
func (a *app) verifyExport(file string, head *admin.AuditHead) (report admin.AuditReport, err error) {
	in := a.stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return report, usageError{fmt.Errorf("--export: %w", err)}
		}
		defer f.Close()
		in = f
	}
	report.Findings = []admin.AuditFinding{}
	find := func(sequence int64, problem string) {
		if len(report.Findings) < 100 {
			report.Findings = append(report.Findings, admin.AuditFinding{Sequence: sequence, Problem: problem})
		}
	}
	proved := head == nil
	var last admin.EventRecord
	for d := json.NewDecoder(bufio.NewReader(in)); ; {
		var record admin.EventRecord
		if err := d.Decode(&record); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return report, usageError{fmt.Errorf("--export: after event %d there is no event: %w", last.Sequence, err)}
		}
		e := record.Event()
		before := last.Link
		if report.Events > 0 && e.Sequence != last.Sequence+1 {
			find(e.Sequence, fmt.Sprintf("events from %d up to it are missing", last.Sequence+1))
		} else if (report.Events > 0 || e.Sequence == 1) && e.LinkAfter(before) != e.Link {
			find(e.Sequence, "its link does not fit: the event or its place was changed")
		}
		if head != nil && head.Sequence == e.Sequence {
			proved = true
			if head.Link != e.Link {
				find(e.Sequence, "the head has another link here: this or an earlier event was changed since")
			}
		}
		last = record
		report.Events++
	}
	if !proved {
		find(last.Sequence, fmt.Sprintf("the copy does not have event %d, which the head is of", head.Sequence))
	}
	report.Whole = len(report.Findings) == 0
	report.Head = admin.AuditHead{Sequence: last.Sequence, Link: last.Link}
	return report, nil
}

func (a *app) auditExport() *cobra.Command {
	var out string
	c := &cobra.Command{
		Use:   "export",
		Short: "Write all audit events in the order of their chain, a JSON object on each line",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a.long = true
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) (err error) {
				to := a.stdout
				if out != "" {
					var f *os.File
					if f, err = os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
						return usageError{fmt.Errorf("--out: %w", err)}
					}
					defer func() { err = errors.Join(err, f.Sync(), f.Close()) }()
					to = f
				}
				buffered := bufio.NewWriter(to)
				lines := json.NewEncoder(buffered)
				lines.SetEscapeHTML(false)
				var events int
				var last admin.EventRecord
				for e, err := range client.AuditChain(ctx) {
					if err != nil {
						return errors.Join(err, buffered.Flush())
					}
					if err := lines.Encode(e); err != nil {
						return err
					}
					last = e
					events++
				}
				if err := buffered.Flush(); err != nil {
					return err
				}
				if !a.quiet {
					fmt.Fprintf(a.stderr, "%d events; the last one is %d, link %s\n", events, last.Sequence, last.Link)
				}
				return nil
			})
		},
	}
	c.Flags().StringVar(&out, "out", "", "write to this new file of mode 0600")
	return c
}
