package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"go.yaml.in/yaml/v3"

	"keyward/authz/apikey"
)

const (
	dashboard = "../../docs/grafana/keyward.json"
	rulesFile = "../../docs/prometheus/alerts.yml"
	ruleTests = "../../docs/prometheus/*_test.yml"
)

// An expression is PromQL that a file of ours holds.
type expression struct{ where, text string }

// rulesOf reads the rules that Prometheus gets.
func rulesOf(t *testing.T) (found []expression) {
	t.Helper()
	text, err := os.ReadFile(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			found = append(found, expression{r.Alert, r.Expr})
		}
	}
	return found
}

// panelsOf reads what the dashboard asks, with Grafana's variables filled in.
func panelsOf(t *testing.T) (found []expression) {
	t.Helper()
	text, err := os.ReadFile(dashboard)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	ids := map[int]bool{}
	for _, p := range file.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the id %d", p.ID)
		}
		ids[p.ID] = true
		for _, target := range p.Targets {
			expr := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*", "$job", ".*").Replace(target.Expr)
			if strings.Contains(expr, "$") {
				t.Errorf("%s: unknown variable in %s", p.Title, expr)
			}
			found = append(found, expression{p.Title, expr})
		}
	}
	return found
}

var (
	metricName = regexp.MustCompile(`\b(?:keyward|process|go)_[a-z0-9_]+`)
	selector   = regexp.MustCompile(`\b((?:keyward|process|go)_[a-z0-9_]+|up)(?:\{([^}]*)\})?`)
	matcher    = regexp.MustCompile(`\s*([a-z_]+)\s*(=~|!=|=)\s*"([^"]*)"\s*`)
	grouping   = regexp.MustCompile(`\b(?:by|on|group_right|group_left)\s*\(([^)]*)\)`)
)

// scraped are labels that Prometheus adds, and le, which buckets have.
var scraped = []string{"job", "instance", "le"}

// TestDashboardsShowWhatThereIs: every metric, label and value that the dashboard and the rules name is there in
// a keyward with all that can be switched on.
func TestDashboardsShowWhatThereIs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := newAuthority(t, "first").server(t, "a")
	if err := os.WriteFile(filepath.Join(dir, "pair.pem"), first.cert, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "pair.key"), first.key, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeNewPrivate(filepath.Join(dir, "pepper"), apikey.MarshalPepper(apikey.NewPepper(1, false))); err != nil {
		t.Fatal(err)
	}
	cfg := defaultConfig()
	cfg.Cache.Records = 1000
	cfg.Store.SQLite.Path, cfg.Pepper.File = filepath.Join(dir, "keyward.db"), filepath.Join(dir, "pepper")
	for _, l := range []*Listener{&cfg.Listen.Check, &cfg.Listen.Manage, &cfg.Listen.Metrics} {
		l.Address = "127.0.0.1:0"
	}
	cfg.Listen.Metrics.TLS = TLS{CertFile: filepath.Join(dir, "pair.pem"), KeyFile: filepath.Join(dir, "pair.key")}
	cfg.Alerts.Webhook = Webhook{URL: "https://alerts.example.com/keyward", SecretFile: filepath.Join(dir, "webhook.secret")}
	if err := os.WriteFile(cfg.Alerts.Webhook.SecretFile, []byte(strings.Repeat("5ecret", 6)), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := openService(t.Context(), &cfg, serviceOptions{log: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.close() })
	if _, err := s.grpcServer(); err != nil {
		t.Fatal(err)
	}
	families := map[string]*dto.MetricFamily{}
	gathered, err := s.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range gathered {
		families[f.GetName()] = f
	}
	find := func(name string) *dto.MetricFamily {
		if f := families[name]; f != nil {
			return f
		}
		for _, suffix := range []string{"_bucket", "_count", "_sum"} {
			if of, cut := strings.CutSuffix(name, suffix); cut && families[of].GetType() == dto.MetricType_HISTOGRAM && families[of] != nil {
				return families[of]
			}
		}
		return nil
	}

	all := append(rulesOf(t), panelsOf(t)...)
	if len(all) < 50 {
		t.Fatalf("only %d expressions", len(all))
	}
	for _, e := range all {
		labels := slices.Clone(scraped)
		if !metricName.MatchString(e.text) && !strings.Contains(e.text, "up{") {
			t.Errorf("%s names no metric: %s", e.where, e.text)
		}
		for _, used := range selector.FindAllStringSubmatch(e.text, -1) {
			if used[1] == "up" {
				continue
			}
			f := find(used[1])
			if f == nil {
				t.Errorf("%s: there is no metric %s", e.where, used[1])
				continue
			}
			series := f.GetMetric()
			for _, l := range series[0].GetLabel() {
				labels = append(labels, l.GetName())
			}
			for _, m := range matcher.FindAllStringSubmatch(used[2], -1) {
				if slices.Contains(scraped, m[1]) {
					continue
				}
				matches := regexp.MustCompile("^(?:" + m[3] + ")$")
				if !slices.ContainsFunc(series, func(one *dto.Metric) bool {
					return slices.ContainsFunc(one.GetLabel(), func(l *dto.LabelPair) bool { return l.GetName() == m[1] && matches.MatchString(l.GetValue()) })
				}) {
					t.Errorf("%s: no %s has %s", e.where, used[1], m[0])
				}
			}
		}
		for _, g := range grouping.FindAllStringSubmatch(e.text, -1) {
			for label := range strings.SplitSeq(g[1], ",") {
				if label = strings.TrimSpace(label); label != "" && !slices.Contains(labels, label) {
					t.Errorf("%s: no metric of %s has the label %s", e.where, e.text, label)
				}
			}
		}
	}
}

// TestEveryRuleIsTested: of each rule promtool's tests say when it fires and when it does not. promtool itself takes
// the name of a rule that there is not for one that is silent.
func TestEveryRuleIsTested(t *testing.T) {
	t.Parallel()
	type said struct{ fires, silent bool }
	tested := map[string]said{}
	for _, r := range rulesOf(t) {
		tested[r.where] = said{}
	}
	files, err := filepath.Glob(ruleTests)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var file struct {
			Tests []struct {
				Rules []struct {
					Alert    string      `yaml:"alertname"`
					Expected []yaml.Node `yaml:"exp_alerts"`
				} `yaml:"alert_rule_test"`
			}
		}
		if err := yaml.Unmarshal(text, &file); err != nil {
			t.Fatal(err)
		}
		for _, test := range file.Tests {
			for _, rule := range test.Rules {
				so, there := tested[rule.Alert]
				if !there {
					t.Errorf("%s tests %s, which is no rule", name, rule.Alert)
					continue
				}
				so.fires, so.silent = so.fires || len(rule.Expected) > 0, so.silent || len(rule.Expected) == 0
				tested[rule.Alert] = so
			}
		}
	}
	for rule, so := range tested {
		if !so.fires || !so.silent {
			t.Errorf("%s: a test says when it fires: %v, one when it does not: %v", rule, so.fires, so.silent)
		}
	}
}

// TestPromtool has Prometheus's own tool read the rules and test what they say. It puts the dashboard's questions
// to what a keyward behind an Envoy has counted in envoy/e2e.
func TestPromtool(t *testing.T) {
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
			t.Skip("there is no promtool: run make promtool, which takes it out of Debian's package prometheus")
		}
	}
	tests, err := filepath.Glob(ruleTests)
	if err != nil || len(tests) == 0 {
		t.Fatalf("%s: %v", ruleTests, err)
	}
	for _, args := range [][]string{{"check", "rules", rulesFile}, append([]string{"test", "rules"}, tests...)} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}
