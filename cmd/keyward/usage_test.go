package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/admin"
	"keyward/authz/manage"
)

func TestSparkline(t *testing.T) {
	long := make([]int64, 1440)
	long[0], long[1439] = 1, 7
	many := strings.Repeat
	for _, tt := range []struct {
		name        string
		environ     []string
		counts      []int64
		want, plain string
	}{
		{"nothing", nil, nil, "", ""},
		{"nobody came", nil, []int64{0, 0, 0}, "▁▁▁", "___"},
		{"all the same", nil, []int64{5, 5}, "██", "##"},
		{"however little, it shows", nil, []int64{0, 1, 1_000_000, 500_000}, "▁▂█▅", "_.#="},
		{"each level", nil, []int64{0, 1, 2, 3, 4, 5, 6}, "▁▃▄▅▆▇█", "_:-=+*#"},
		{"a day of minutes", nil, long, "▂" + many("▁", 58) + "█", "." + many("_", 58) + "#"},
	} {
		if got := (&app{environ: tt.environ}).sparkline(tt.counts); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
		if got := (&app{environ: []string{"TERM=dumb"}}).sparkline(tt.counts); got != tt.plain {
			t.Errorf("%s, without blocks: got %q, want %q", tt.name, got, tt.plain)
		}
	}
	for environ, want := range map[string]bool{
		"": true, "LANG=C": false, "LANG=de_DE.UTF-8": true, "LANG=en_US.utf8": true, "LANG=C LC_ALL=C.UTF-8": true, "LANG=C.UTF-8 LC_CTYPE=POSIX": false,
		"LANG=C.UTF-8 TERM=dumb": false, "LANG=C.UTF-8 TERM=xterm": true, "LANG=de_DE.ISO-8859-1": false,
	} {
		if got := (&app{environ: strings.Fields(environ)}).unicode(); got != want {
			t.Errorf("%q: got %t, want %t", environ, got, want)
		}
	}
}

func TestUsageShowsWhatEnvoyTells(t *testing.T) {
	start := time.Date(2026, 3, 2, 10, 0, 0, 0, time.UTC)
	q := admin.UsageQuery{Interval: admin.UsageHour, From: start, To: start.Add(3 * time.Hour)}
	counts := admin.UsageCounts{
		Allowed: 4, Refused: 3, Reasons: map[string]int64{"expired": 1, "limit_burst": 2}, Generations: map[int]int64{2: 3, 1: 1},
		Ended: admin.EndedRequests{
			Count: 7, Status: [6]int64{1, 0, 3, 0, 3, 0}, RequestBytes: 1000, ResponseBytes: 3 << 20, Duration: 14 * time.Millisecond, Longest: 1500 * time.Millisecond,
		},
	}
	var ids map[string]int64
	for _, network := range strings.Fields("a b c d e f g h i j") {
		if ids == nil {
			ids = map[string]int64{}
		}
		ids[network] = 1
	}
	counts.Networks = ids
	record := admin.UsageRecordOf(q, []admin.Usage{{Start: start.Add(time.Hour), UsageCounts: counts}})
	show := func(output string, write func(*app) error) (stdout, stderr string) {
		t.Helper()
		var out, said bytes.Buffer
		if err := write(&app{stdout: &out, stderr: &said, output: output}); err != nil {
			t.Fatal(err)
		}
		return out.String(), said.String()
	}
	got, said := show("table", func(a *app) error { return a.printUsage(record) })
	want := `FROM            2026-03-02T10:00:00Z
TO              2026-03-02T13:00:00Z
ALLOWED         4  ▁█▁
REFUSED         3  ▁█▁
REASONS         limit_burst 2, expired 1
GENERATIONS     1: 1, 2: 3
NETWORKS        a 1, b 1, c 1, d 1, e 1, f 1, g 1, h 1, and 2 more
RESPONSES       7
STATUSES        2xx 3, 4xx 3, none 1
BYTES IN / OUT  1000 B / 3.0 MiB
MEAN / LONGEST  2ms / 1.5s

HOUR                  ALLOWED  REFUSED  4XX  5XX  BYTES IN / OUT    MEAN / LONGEST
2026-03-02T11:00:00Z  4        3        3    0    1000 B / 3.0 MiB  2ms / 1.5s
`
	if diff := cmp.Diff(want, got); diff != "" || said != "" {
		t.Errorf("it says %q (-want +got)\n%s", said, diff)
	}
	got, _ = show("csv", func(a *app) error { return a.printUsage(record) })
	const header = "allowed,refused,responses,status_1xx,status_2xx,status_3xx,status_4xx,status_5xx,status_none,request_bytes,response_bytes,mean_seconds,longest_seconds\n"
	want = "start," + header + "2026-03-02T10:00:00Z,0,0,0,0,0,0,0,0,0,0,0,0,0\n2026-03-02T11:00:00Z,4,3,7,0,3,0,3,0,1,1000,3145728,0.002,1.5\n2026-03-02T12:00:00Z,0,0,0,0,0,0,0,0,0,0,0,0,0\n"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("csv (-want +got)\n%s", diff)
	}

	top := manage.TopUsage{Value: []admin.UsedKey{{UsageSums: admin.UsageSumsOf(&counts)}, {Name: "=1+1", Status: "active", UsageSums: admin.UsageSumsOf(&admin.UsageCounts{Allowed: 1})}}}
	got, said = show("table", func(a *app) error { return a.printTop(top) })
	if !strings.Contains(got, " gone ") || !strings.Contains(said, "not collected") {
		t.Errorf("got %s%s", got, said)
	}
	got, _ = show("csv", func(a *app) error { return a.printTop(top) })
	if !strings.Contains(got, ",'=1+1,") || !strings.HasPrefix(got, "key_id,name,hint,type,status,"+header) {
		t.Errorf("got %s", got)
	}
}
