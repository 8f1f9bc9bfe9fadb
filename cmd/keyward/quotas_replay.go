package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"keyward/authz"
	"keyward/authz/apikey"
)

func (a *app) quotasReplay() *cobra.Command {
	var log, file string
	var sampled bool
	c := &cobra.Command{
		Use:   "replay INSTANCE --log FILE --file FILE",
		Short: "Tell from a log who would be refused under other quotas",
		Long: "Tell who would have been refused under other quotas: the decisions of a log are counted again, in their own time,\n" +
			"under the quotas of a file such as quotas apply takes. No server is asked, and nothing is changed.\n\n" +
			"The log is what keyward serve writes with log.format: json. It has every decision only if log.decisionsPerSecond is\n" +
			"above the number of requests: where some were left out, that is told, and nothing else unless --sampled accepts\n" +
			"counts that are too low. What keys have in place of quotas is not in the log, so each is judged by the quota itself.\n" +
			"Requests that another limit refused stay refused. Clients that are refused at other times may come at other times.",
		Example: "  keyward quotas replay demo --log keyward.log -f new.yaml\n  journalctl -u keyward -o cat | keyward quotas replay demo --log - -f quota-store.json -o json",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			instance, err := a.replayInstance(args[0], file)
			if err != nil {
				return err
			}
			var from io.Reader = input{a}
			if log != "-" {
				f, err := os.Open(log)
				if err != nil {
					return err
				}
				defer f.Close()
				from = f
			}
			r := replay{instance: instance, replay: authz.NewReplay(instance), rows: map[replayKey]*ReplayRow{}}
			if err := r.read(from); err != nil {
				return fmt.Errorf("%s: %w", log, err)
			}
			return a.printReplay(&r, sampled)
		},
	}
	c.Flags().StringVar(&log, "log", "", "log with decisions, as JSON lines; - for standard input (needed)")
	c.Flags().StringVarP(&file, "file", "f", "", "file with quotas (needed)")
	c.Flags().BoolVar(&sampled, "sampled", false, "also where the log lacks decisions")
	_ = c.MarkFlagRequired("log")
	_ = c.MarkFlagRequired("file")
	return c
}

// replayInstance is an instance with the quotas of a file.
func (a *app) replayInstance(id, file string) (*apikey.Instance, error) {
	text, err := readConfigFile(file, a.stdin)
	if err != nil {
		return nil, err
	}
	inputs, err := a.readQuotas(text)
	if err != nil {
		return nil, usageError{fmt.Errorf("%s: %w", file, err)}
	}
	if id, err = apikey.CanonicalInstanceID(id); err != nil {
		return nil, usageError{fmt.Errorf("INSTANCE: %w", err)}
	}
	instance := &apikey.Instance{ID: id}
	var bad []error
	for i := range inputs {
		q, err := inputs[i].Quota()
		if err != nil {
			bad = append(bad, err)
		}
		instance.Quotas = append(instance.Quotas, q)
	}
	if err := errors.Join(bad...); err == nil {
		bad = append(bad, apikey.ValidateQuotas(instance.Quotas))
	}
	if err := errors.Join(bad...); err != nil {
		return nil, usageError{fmt.Errorf("%s: %w", file, err)}
	}
	return instance, nil
}

// A ReplayRow is what became of the requests of one principal or key under one quota.
type ReplayRow struct {
	Quota     string      `json:"quota"`
	KeyIDs    []apikey.ID `json:"keyIds,omitempty"`    // that were used; of a quota for everybody none
	Principal string      `json:"principal,omitempty"` // as the log has it
	Requests  int         `json:"requests"`            // that the quota counts or refuses
	Refused   int         `json:"refused"`             // by a quota of that name, as the log says
	Would     int         `json:"wouldRefuse"`         // under the quotas of the file
}

// A ReplayReport is what a replay comes to.
type ReplayReport struct {
	From        time.Time   `json:"from,omitzero"`
	To          time.Time   `json:"to,omitzero"`
	Decisions   int         `json:"decisions"`   // of the instance that quotas count or refuse
	Missing     int64       `json:"missing"`     // decisions, of all instances, that the log left out
	Refused     int         `json:"refused"`     // by quotas, as the log says
	WouldRefuse int         `json:"wouldRefuse"` // by the quotas of the file
	Rows        []ReplayRow `json:"rows"`
}

type replayKey struct{ quota, who string }

type replay struct {
	instance *apikey.Instance
	replay   *authz.Replay
	report   ReplayReport
	lines    int // with decisions, of any instance
	rows     map[replayKey]*ReplayRow
}

// A loggedDecision is a line of the log that tells of a decision.
type loggedDecision struct {
	Time      time.Time `json:"time"`
	Msg       string    `json:"msg"`
	Outcome   string    `json:"outcome"`
	Reason    string    `json:"reason"`
	Instance  string    `json:"instance"`
	KeyID     string    `json:"keyId"`
	Context   string    `json:"context"`
	Agent     string    `json:"agent"`
	Cost      int       `json:"cost"`
	Principal string    `json:"principal"`
	UserID    string    `json:"userId"`
	Quota     string    `json:"quota"`
	Skipped   int64     `json:"skipped"`
}

const maxLogLine = 1 << 20 // bytes

// line reads one line. ok is true for a decision that quotas count or refuse.
func (r *replay) line(text []byte) (d loggedDecision, ok bool) {
	switch err := json.Unmarshal(text, &d); {
	case err != nil && bytes.Contains(text, []byte(`"msg":"decision"`)): // half of one, or two at once
		r.report.Missing++
		return d, false
	case err != nil || d.Msg != "decision" && d.Msg != "could not decide":
		return d, false // of something else
	}
	if r.lines++; r.lines > 1 { // what was left out before the first is not of this log's time
		r.report.Missing += d.Skipped
	}
	return d, d.Instance == r.instance.ID && d.Context != "" && (d.Outcome == "allowed" || d.Outcome == "limited")
}

func (r *replay) read(from io.Reader) error {
	var all []loggedDecision
	lines := bufio.NewReaderSize(from, maxLogLine)
	for {
		line, err := lines.ReadSlice('\n')
		tooLong := errors.Is(err, bufio.ErrBufferFull)
		for errors.Is(err, bufio.ErrBufferFull) { // of something else: lines about decisions are short
			_, err = lines.ReadSlice('\n')
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if !tooLong {
			if d, ok := r.line(line); ok {
				all = append(all, d)
			}
		}
		if err != nil {
			break
		}
	}
	if r.lines == 0 {
		return errors.New("has no decisions as JSON lines: keyward serve writes them with log.format: json and log.decisionsPerSecond above 0")
	}
	slices.SortStableFunc(all, func(x, y loggedDecision) int { return x.Time.Compare(y.Time) }) // several writers may have met
	for i := range all {
		r.take(&all[i])
	}
	return nil
}

func (r *replay) take(d *loggedDecision) {
	id, _ := apikey.ParseID(d.KeyID) // zero for a caller without a key
	r.report.Decisions++
	if r.report.From.IsZero() {
		r.report.From = d.Time
	}
	r.report.To = d.Time
	byQuota := d.Quota != "" && d.Outcome == "limited"
	if d.Outcome == "limited" && !byQuota {
		return // refused by a limit that is none of these, so no quota counted it
	}
	if byQuota {
		r.report.Refused++
		if i := slices.IndexFunc(r.instance.Quotas, func(q apikey.Quota) bool { return q.Name == d.Quota }); i < 0 {
			r.row(&apikey.Quota{Name: d.Quota, Partition: apikey.PartitionUPN}, d, id).Refused++
		}
	}
	became := r.replay.Take(authz.Past{
		At: d.Time, KeyID: id, Principal: d.Principal, UserID: d.UserID, Context: d.Context, Agent: d.Agent, Cost: d.Cost,
	})
	if became.Refused != nil {
		r.report.WouldRefuse++
	}
	for _, q := range became.Quotas {
		row := r.row(q, d, id)
		row.Requests++
		if byQuota && d.Quota == q.Name {
			row.Refused++
		}
		if q == became.Refused {
			row.Would++
		}
	}
}

func (r *replay) row(q *apikey.Quota, d *loggedDecision, id apikey.ID) *ReplayRow {
	who, principal := "", ""
	switch q.Partition {
	case apikey.PartitionKey:
		who = d.KeyID
	case apikey.PartitionUPN:
		who, principal = d.Principal, d.Principal
	case apikey.PartitionIdentifier:
		who, principal = d.UserID, d.UserID
	}
	row := r.rows[replayKey{q.Name, who}]
	if row == nil {
		row = &ReplayRow{Quota: q.Name, Principal: principal}
		r.rows[replayKey{q.Name, who}] = row
	}
	if who != "" && !id.IsZero() && !slices.Contains(row.KeyIDs, id) {
		row.KeyIDs = append(row.KeyIDs, id)
	}
	return row
}

func (a *app) printReplay(r *replay, sampled bool) error {
	report := &r.report
	if report.Missing > 0 {
		missing := fmt.Sprintf("the log lacks %d decisions: set log.decisionsPerSecond above the number of requests to have all", report.Missing)
		if !sampled {
			return errors.New(missing + "; --sampled counts those that are there, which is too few")
		}
		fmt.Fprintln(a.stderr, "warning:", missing+". Counts are too low: who is refused here would be refused, and others too")
	}
	report.Rows = []ReplayRow{}
	for _, row := range r.rows {
		report.Rows = append(report.Rows, *row)
	}
	slices.SortFunc(report.Rows, func(x, y ReplayRow) int {
		return cmp.Or(cmp.Compare(x.Quota, y.Quota), cmp.Compare(y.Would, x.Would), cmp.Compare(y.Requests, x.Requests),
			cmp.Compare(x.Principal, y.Principal), slices.CompareFunc(x.KeyIDs, y.KeyIDs, func(p, q apikey.ID) int { return bytes.Compare(p[:], q[:]) }))
	})
	if !a.quiet {
		fmt.Fprintf(a.stderr, "%d requests from %s to %s: quotas refused %d, and would refuse %d.\n",
			report.Decisions, stamp(report.From), stamp(report.To), report.Refused, report.WouldRefuse)
	}
	if a.output != "table" {
		return a.printData(report)
	}
	return printList(a, report.Rows, table[ReplayRow]{
		header: "QUOTA\tKEY\tPRINCIPAL\tREQUESTS\tREFUSED\tWOULD REFUSE",
		row: func(row ReplayRow) []string {
			key := ""
			if len(row.KeyIDs) > 0 {
				key = row.KeyIDs[0].String()
			}
			if more := len(row.KeyIDs) - 1; more > 0 {
				key += fmt.Sprintf(" and %d more", more)
			}
			return []string{row.Quota, key, row.Principal, strconv.Itoa(row.Requests), strconv.Itoa(row.Refused), strconv.Itoa(row.Would)}
		},
		id: func(row ReplayRow) string { return row.Quota },
	})
}
