package e2e_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A panel is one of docs/grafana/keyward.json, as far as it matters what it shows.
type panel struct {
	ID          int
	Type, Title string
	FieldConfig struct{ Defaults struct{ Unit string } }
	Targets     []struct{ Expr, LegendFormat string }
}

// most is the largest value that makes sense in a unit.
func (p panel) most(t *testing.T) float64 {
	t.Helper()
	switch unit := p.FieldConfig.Defaults.Unit; unit {
	case "percentunit":
		return 1
	case "s":
		return time.Hour.Seconds()
	case "dateTimeFromNow": // milliseconds
		return float64(time.Now().AddDate(100, 0, 0).UnixMilli())
	case "short", "ops", "reqps":
		return 1 << 40
	case "bytes":
		return 1 << 63 // what the runtime says where there is no limit
	default:
		t.Errorf("%s: unit %q is not known here", p.Title, unit)
		return 0
	}
}

// least is the smallest one.
func (p panel) least() float64 {
	if p.FieldConfig.Defaults.Unit == "dateTimeFromNow" {
		return float64(time.Now().UnixMilli())
	}
	return 0
}

// TestDashboardShowsTraffic: whatever a panel of the Grafana dashboard asks has an answer once there was traffic, in
// a range that its unit allows, with the labels that its legend names. promtool answers, from what the metrics were
// before and after.
func TestDashboardShowsTraffic(t *testing.T) {
	t.Parallel()
	promtool, err := filepath.Abs(filepath.Join("..", "..", ".tools", "promtool"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(promtool); err != nil {
		if promtool, err = exec.LookPath("promtool"); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("%v: run make promtool", err)
			}
			t.Skip("there is no promtool: run make promtool")
		}
	}
	text, err := os.ReadFile("../../docs/grafana/keyward.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels     []panel
		Templating struct{ List []struct{ Definition string } }
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}

	// All that can be switched on, and something of everything that has no value before it first happens.
	ca := newAuthority(t)
	ca.issue("keyward", "keyward.test", "127.0.0.1")
	s := serve(t, config{
		tls:  fmt.Sprintf("{certFile: %q, keyFile: %q}", ca.file("keyward.pem"), ca.file("keyward.key")),
		yaml: "concurrency: {wait: 10ms}\n",
	})
	x := s.stage(t, frontConfig{args: []string{"--keyward-ca", ca.file("ca.pem"), "--keyward-name", "keyward.test"}})
	before := s.scrape(t)
	k := x.leaseKey(t, 1)
	held := x.hold(t, k, "/held?hold=1m")
	x.wantFull(t, k)
	held.abort()
	x.wantBack(t, k, patience)
	far := s.key(t, x.home, admin.KeyInput{AllowedIPs: []string{"203.0.113.7"}})
	c := x.caller(t)
	c.get("/", withKey(far.secret)).want(t, http.StatusForbidden, "from elsewhere")
	c.get("/", withKey(s.unknown(apikey.KindInstance))).want(t, http.StatusUnauthorized, "unknown")
	waitFor(t, "the end of a request to be heard", func() bool { return s.metric(t, "keyward_access_log_delay_seconds_count") > 0 })
	after := s.scrape(t)

	type series struct {
		Series string `yaml:"series"`
		Values string `yaml:"values"`
	}
	type sample struct {
		Labels string  `yaml:"labels"`
		Value  float64 `yaml:"value"`
	}
	type question struct {
		Expr    string   `yaml:"expr"`
		At      string   `yaml:"eval_time"`
		Samples []sample `yaml:"exp_samples"`
	}
	var input []series
	for _, name := range slices.Sorted(maps.Keys(after)) {
		was, there := before[name]
		if !there {
			was = "_"
		}
		input = append(input, series{name, was + " " + after[name]})
	}
	var questions []question
	legend := regexp.MustCompile(`\{\{\s*(\w+)\s*\}\}`)
	for _, p := range dashboard.Panels {
		if p.Type == "row" {
			continue
		}
		if len(p.Targets) == 0 {
			t.Errorf("panel %d, %s, asks nothing", p.ID, p.Title)
		}
		for _, target := range p.Targets {
			expr := "(" + strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*", "$job", ".*").Replace(target.Expr) + ")"
			sane := fmt.Sprintf("(%s >= %s <= %s)", expr, figure(p.least()), figure(p.most(t))) // which NaN is not
			labelled, by, has := sane, []string{}, []string{}
			for _, label := range legend.FindAllStringSubmatch(target.LegendFormat, -1) {
				labelled = fmt.Sprintf(`label_replace(%s, "has_%s", "yes", %q, ".+")`, labelled, label[1], label[1])
				by, has = append(by, "has_"+label[1]), append(has, "has_"+label[1]+`="yes"`)
			}
			questions = append(questions,
				question{fmt.Sprintf("count by (%s) (%s) > bool 0", strings.Join(by, ", "), labelled), "1m", []sample{{"{" + strings.Join(has, ", ") + "}", 1}}},
				question{fmt.Sprintf("count(%s unless %s) or vector(0)", expr, sane), "1m", []sample{{"{}", 0}}})
		}
	}
	if len(questions) < 50 {
		t.Fatalf("only %d questions", len(questions))
	}
	for _, v := range dashboard.Templating.List {
		if of := regexp.MustCompile(`^label_values\((\w+)`).FindStringSubmatch(v.Definition); of != nil &&
			!slices.ContainsFunc(input, func(one series) bool { return strings.HasPrefix(one.Series, of[1]+"{") }) {
			t.Errorf("a variable is taken from %s, which there is not", of[1])
		}
	}
	out, err := yaml.Marshal(map[string]any{"tests": []any{map[string]any{"interval": "1m", "input_series": input, "promql_expr_test": questions}}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "panels.yml")
	if err := os.WriteFile(file, out, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(promtool, "test", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}

// figure writes a number as promtool takes it in values.
func figure(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }

// scrape returns what Prometheus would get: values by series, with the labels that it adds.
func (s *server) scrape(t *testing.T) map[string]string {
	t.Helper()
	status, body, err := fetch("http://" + s.metrics + "/metrics")
	if err != nil || status != http.StatusOK {
		t.Fatalf("metrics: %d, %v", status, err)
	}
	values := map[string]string{}
	for line := range strings.Lines(string(body)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		at := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(strings.TrimSpace(line[at+1:]), 64)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		name, labels, _ := strings.Cut(strings.TrimSuffix(line[:at], "}"), "{")
		if labels != "" {
			labels += ","
		}
		values[name+"{"+labels+`job="keyward",instance="a"}`] = figure(value)
	}
	return values
}
