package main

import (
	"cmp"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyward/authz/admin"
	"keyward/authz/manage"
)

func (a *app) usageCommand() *cobra.Command {
	var in admin.UsageInput
	var interval, by string
	var top int
	var noInstance bool
	c := &cobra.Command{
		Use:   "usage INSTANCE [KEY-ID]",
		Short: "Show how many requests there were, and what became of them",
		Long: "Show how many requests an instance or one of its keys had, allowed and refused, by reason, generation and network,\n" +
			"and what Envoy tells of them: status, bytes and duration. With --top the keys that did the most.\n\n" +
			"The counts are up to a minute behind. A table shows only the intervals in which something was counted, every other\n" +
			"output all of them. -q prints the totals of what was allowed and refused, with --top the ids of the keys.",
		Example: "  keyward usage demo\n" +
			"  keyward usage demo 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f --from 7d --interval day\n" +
			"  keyward usage demo --top 5 --by refused --from 2026-01-01 --to 2026-01-31\n" +
			"  keyward usage --no-instance -o csv",
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case top < 0:
				return usageError{errors.New("--top: must be from 1 to 1000")}
			case top == 0 && by != "":
				return usageError{errors.New("--by: goes with --top")}
			case top > 0 && (interval != "" || noInstance || len(args) > 1):
				return usageError{errors.New("--top: is of an instance, and goes neither with a key nor with --interval or --no-instance")}
			}
			in.Interval = admin.UsageInterval(interval)
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				if top > 0 {
					used, err := client.TopUsage(ctx, args[0], in, admin.UsageOrder(by), top)
					if err != nil {
						return err
					}
					return a.printTop(used)
				}
				r, err := usageOf(ctx, client, args, in)
				if err != nil {
					return err
				}
				return a.printUsage(r)
			})
		},
	}
	c.Args = func(cmd *cobra.Command, args []string) error {
		if noInstance {
			return cobra.NoArgs(cmd, args)
		}
		return cobra.RangeArgs(1, 2)(cmd, args)
	}
	a.clientFlags(c)
	outputs := []string{"table", "json", "jsonl", "yaml", "csv"}
	c.PersistentFlags().Lookup("output").Usage = "table, json, jsonl, yaml or csv"
	c.PersistentFlags().Lookup("quiet").Usage = "print totals only, or ids"
	c.PersistentPreRunE = func(*cobra.Command, []string) error { return wrapUsage(oneOf("--output", a.output, outputs...)) }
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(outputs, cobra.ShellCompDirectiveNoFileComp))
	f := c.Flags()
	f.StringVar(&in.From, "from", "", "since when: RFC 3339, a date in UTC, or how long ago, such as 7d (default 24h)")
	f.StringVar(&in.To, "to", "", "until when, written as --from; a date means its end (default now)")
	f.StringVar(&interval, "interval", "", "minute, hour or day; by default by how long the time is")
	f.IntVar(&top, "top", 0, "show so many keys that did the most")
	f.StringVar(&by, "by", "", "with --top: requests or refused")
	f.BoolVar(&noInstance, "no-instance", false, "show requests of which no instance is known, such as those with an unknown key")
	return c
}

// usageOf asks for the usage of what the arguments name: nothing, an instance, or one of its keys.
func usageOf(ctx context.Context, client *manage.Client, args []string, in admin.UsageInput) (admin.UsageRecord, error) {
	switch len(args) {
	case 0:
		return client.UsageOfNoInstance(ctx, in)
	case 1:
		return client.InstanceUsage(ctx, args[0], in)
	}
	id, err := parseID("KEY-ID", args[1])
	if err != nil {
		return admin.UsageRecord{}, err
	}
	return client.KeyUsage(ctx, args[0], id, in)
}

var usageColumns = []string{
	"allowed", "refused", "responses", "status_1xx", "status_2xx", "status_3xx", "status_4xx", "status_5xx", "status_none",
	"request_bytes", "response_bytes", "mean_seconds", "longest_seconds",
}

// usageCells are the values of usageColumns; what was not collected is empty.
func usageCells(s *admin.UsageSums) []string {
	n := func(v int64) string { return strconv.FormatInt(v, 10) }
	cells := []string{n(s.Allowed), n(s.Refused)}
	r := s.Responses
	if r == nil {
		return append(cells, make([]string, len(usageColumns)-len(cells))...)
	}
	seconds := func(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }
	by := r.Statuses
	return append(cells, n(r.Count), n(by.Informational), n(by.Success), n(by.Redirection), n(by.ClientError), n(by.ServerError), n(by.None),
		n(r.RequestBytes), n(r.ResponseBytes), seconds(r.MeanSeconds), seconds(r.LongestSeconds))
}

// usageRow are the cells of a table that people read.
func usageRow(s *admin.UsageSums) []string {
	row := []string{strconv.FormatInt(s.Allowed, 10), strconv.FormatInt(s.Refused, 10)}
	r := s.Responses
	if r == nil || r.Count == 0 {
		return append(row, "", "", "", "")
	}
	return append(row, strconv.FormatInt(r.Statuses.ClientError, 10), strconv.FormatInt(r.Statuses.ServerError, 10),
		byteText(r.RequestBytes)+" / "+byteText(r.ResponseBytes), tookText(r.MeanSeconds)+" / "+tookText(r.LongestSeconds))
}

const usageHeader = "ALLOWED\tREFUSED\t4XX\t5XX\tBYTES IN / OUT\tMEAN / LONGEST"

func (a *app) printUsage(r admin.UsageRecord) error {
	switch {
	case a.quiet:
		fmt.Fprintln(a.stdout, r.Total.Allowed, r.Total.Refused)
		return nil
	case a.output == "csv":
		w := csv.NewWriter(a.stdout)
		_ = w.Write(append([]string{"start"}, usageColumns...))
		for i := range r.Value {
			_ = w.Write(append([]string{stamp(r.Value[i].Start)}, usageCells(&r.Value[i].UsageSums)...))
		}
		w.Flush()
		return w.Error()
	case a.output == "jsonl":
		return printList(a, r.Value, table[admin.UsageBucket]{})
	}
	var allowed, refused []int64
	var busy []admin.UsageBucket
	for _, b := range r.Value {
		allowed, refused = append(allowed, b.Allowed), append(refused, b.Refused)
		if b.Allowed+b.Refused > 0 || b.Responses != nil && b.Responses.Count > 0 {
			busy = append(busy, b)
		}
	}
	s := &r.Total
	fields := [][2]string{
		{"FROM", stamp(r.From)}, {"TO", stamp(r.To)},
		{"ALLOWED", fmt.Sprintf("%d  %s", s.Allowed, a.sparkline(allowed))}, {"REFUSED", fmt.Sprintf("%d  %s", s.Refused, a.sparkline(refused))},
		{"REASONS", countsText(s.Reasons)}, {"GENERATIONS", generationsText(s.Generations)}, {"NETWORKS", countsText(s.Networks)},
	}
	if p := s.Responses; p != nil && p.Count > 0 {
		fields = append(fields, [2]string{"RESPONSES", strconv.FormatInt(p.Count, 10)}, [2]string{"STATUSES", countsText(map[string]int64{
			"1xx": p.Statuses.Informational, "2xx": p.Statuses.Success, "3xx": p.Statuses.Redirection, "4xx": p.Statuses.ClientError,
			"5xx": p.Statuses.ServerError, "none": p.Statuses.None,
		})}, [2]string{"BYTES IN / OUT", byteText(p.RequestBytes) + " / " + byteText(p.ResponseBytes)},
			[2]string{"MEAN / LONGEST", tookText(p.MeanSeconds) + " / " + tookText(p.LongestSeconds)})
	}
	if err := printOne(a, r, fields); err != nil || a.output != "table" {
		return err
	}
	a.sayNotCollected(r.NotCollected != "")
	if len(busy) == 0 {
		return nil
	}
	fmt.Fprintln(a.stdout)
	return printList(a, busy, table[admin.UsageBucket]{
		header: strings.ToUpper(string(r.Interval)) + "\t" + usageHeader,
		row:    func(b admin.UsageBucket) []string { return append([]string{stamp(b.Start)}, usageRow(&b.UsageSums)...) },
	})
}

func (a *app) sayNotCollected(missing bool) {
	if missing {
		fmt.Fprintln(a.stderr, "Status, bytes and duration: not collected; keyward envoy generate --usage adds the log that tells them.")
	}
}

func (a *app) printTop(top manage.TopUsage) error {
	switch {
	case a.quiet || a.output == "jsonl":
	case a.output == "csv":
		w := csv.NewWriter(a.stdout)
		_ = w.Write(append([]string{"key_id", "name", "hint", "type", "status"}, usageColumns...))
		for i := range top.Value {
			k := &top.Value[i]
			_ = w.Write(append([]string{k.KeyID.String(), harmless(k.Name), k.Hint, string(k.Type), k.Status}, usageCells(&k.UsageSums)...))
		}
		w.Flush()
		return w.Error()
	case a.output != "table":
		return a.printData(top)
	default:
		a.sayNotCollected(slices.ContainsFunc(top.Value, func(k admin.UsedKey) bool { return k.Responses == nil && k.Allowed > 0 }))
	}
	return printList(a, top.Value, table[admin.UsedKey]{
		header: "KEY\tNAME\tHINT\tSTATUS\t" + usageHeader + "\tREASONS",
		row: func(k admin.UsedKey) []string {
			status := k.Status
			if status == "" {
				status = "gone"
			}
			return append(append([]string{k.KeyID.String(), k.Name, k.Hint, status}, usageRow(&k.UsageSums)...), countsText(k.Reasons))
		},
		id: func(k admin.UsedKey) string { return k.KeyID.String() },
	})
}

// harmless keeps a spreadsheet from taking a name, which anybody may have given, for a formula.
func harmless(name string) string {
	if name != "" && strings.ContainsRune("=+-@\t\r", rune(name[0])) {
		return "'" + name
	}
	return name
}

// sparkWidth is how many characters a sparkline has at most; more intervals share one.
const sparkWidth = 60

// The characters of a sparkline; the first one is nothing at all.
var (
	sparkBlocks = []rune("▁▂▃▄▅▆▇█")
	sparkASCII  = []rune("_.:-=+*#")
)

// sparkline draws counts, oldest first, in characters that the terminal has.
func (a *app) sparkline(counts []int64) string {
	if len(counts) == 0 {
		return ""
	}
	var points []int64
	for some := range slices.Chunk(counts, (len(counts)+sparkWidth-1)/sparkWidth) {
		var sum int64
		for _, n := range some {
			sum += n
		}
		points = append(points, sum)
	}
	levels := sparkBlocks
	if !a.unicode() {
		levels = sparkASCII
	}
	var line strings.Builder
	for _, n := range points {
		level := 0
		if most := slices.Max(points); n > 0 { // however little, it shows
			level = 1 + int(float64(n)/float64(most)*float64(len(levels)-2))
		}
		line.WriteRune(levels[level])
	}
	return line.String()
}

// unicode reports whether blocks can be shown: not on a dumb terminal, and not where the locale is one without.
func (a *app) unicode() bool {
	locale := strings.ToLower(cmp.Or(a.environment("LC_ALL"), a.environment("LC_CTYPE"), a.environment("LANG"), "utf-8"))
	return a.environment("TERM") != "dumb" && (strings.Contains(locale, "utf-8") || strings.Contains(locale, "utf8"))
}

const mostCounts = 8 // in one line

// countsText shows counts, the largest first.
func countsText(counts map[string]int64) string {
	var parts []string
	for _, name := range slices.SortedFunc(maps.Keys(counts), func(x, y string) int {
		return cmp.Or(cmp.Compare(counts[y], counts[x]), cmp.Compare(x, y))
	}) {
		if counts[name] != 0 {
			parts = append(parts, fmt.Sprintf("%s %d", name, counts[name]))
		}
	}
	if more := len(parts) - mostCounts; more > 0 {
		parts = append(parts[:mostCounts], fmt.Sprintf("and %d more", more))
	}
	return strings.Join(parts, ", ")
}

func generationsText(counts map[int]int64) string {
	var parts []string
	for _, number := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%d: %d", number, counts[number]))
	}
	return strings.Join(parts, ", ")
}

func byteText(n int64) string {
	size := float64(n)
	for _, unit := range []string{"B", "KiB", "MiB", "GiB"} {
		if size < 1024 {
			return strconv.FormatFloat(size, 'f', min(1, len(unit)-1), 64) + " " + unit
		}
		size /= 1024
	}
	return fmt.Sprintf("%.1f TiB", size)
}

func tookText(s float64) string {
	return time.Duration(s * float64(time.Second)).Round(100 * time.Microsecond).String()
}
