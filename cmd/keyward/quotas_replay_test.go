package main

import (
	"strings"
	"testing"
	"time"

	"keyward/authz"
	"keyward/authz/apikey"
)

// TestReplayReadsALogAsItIs: lines of something else may be of any length, and a decision of which only a part
// is there is told to be missing.
func TestReplayReadsALogAsItIs(t *testing.T) {
	const line = `{"time":"2026-01-01T00:00:01Z","msg":"decision","outcome":"allowed","instance":"a","context":"S:C","cost":1,"principal":"p","userId":"u"}` + "\n"
	for _, c := range []struct {
		name, log          string
		decisions, missing int
	}{
		{"whole lines", line + line, 2, 0},
		{"no line break at the end", line + strings.TrimSpace(line), 2, 0},
		{"a long line of something else", line + strings.Repeat("x", 3*maxLogLine+1) + "\n" + line, 2, 0},
		{"a long line at the end", line + strings.Repeat("x", maxLogLine+1), 1, 0},
		{"half a line of something else", line + `{"msg":"other` + "\n" + line, 2, 0},
		{"half a decision", line + line[:80] + "\n" + line, 2, 1},
		{"half a decision at the end", line + line[:80], 1, 1},
		{"a member of another kind", line + strings.Replace(line, `"p"`, "5", 1), 1, 1},
	} {
		instance := &apikey.Instance{ID: "a", Quotas: []apikey.Quota{{Name: "q", Context: "S:C", Partition: apikey.PartitionNone, Limit: 1, Window: time.Minute}}}
		r := replay{instance: instance, replay: authz.NewReplay(instance), rows: map[replayKey]*ReplayRow{}}
		if err := r.read(strings.NewReader(c.log)); err != nil || r.report.Decisions != c.decisions || r.report.Missing != int64(c.missing) {
			t.Errorf("%s: %v; %d decisions and %d missing, want %d and %d", c.name, err, r.report.Decisions, r.report.Missing, c.decisions, c.missing)
		}
	}
}
