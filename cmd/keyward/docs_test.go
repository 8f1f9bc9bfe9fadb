package main

import (
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/foundationallm"
	"keyward/authz/holders"
	"keyward/authz/manage"
)

var updateDocs = flag.Bool("update", false, "rewrite the generated parts of docs/")

// generated is what the pages for users take from the code, by name.
func generated() map[string]string {
	p, l := apikey.ShippedPolicy, apikey.ShippedLimits
	table := func(header string, rows ...string) string {
		columns := strings.Count(header, "|") + 1
		return "| " + header + " |\n|" + strings.Repeat(" --- |", columns) + "\n| " + strings.Join(rows, " |\n| ") + " |\n"
	}
	var reasons []string
	about := map[apikey.RevocationReason]string{
		apikey.RevokedKeyCompromise: "the secret is, or may be, known to others",
		apikey.RevokedSuperseded:    "another key has taken its place",
		apikey.RevokedOwnerLeft:     "whose it was has left",
		apikey.RevokedUnused:        "nobody used it",
		apikey.RevokedOther:         "anything else",
	}
	for _, r := range apikey.RevocationReasons() {
		reasons = append(reasons, fmt.Sprintf("`%s` | %s", r, about[r]))
	}
	var errorsOfManage, errorsOfHolders []string
	for _, c := range manage.Codes {
		errorsOfManage = append(errorsOfManage, fmt.Sprintf("%d | `%s` | %s", c.Status, c.Code, c.Meaning))
	}
	for _, c := range holders.Codes {
		errorsOfHolders = append(errorsOfHolders, fmt.Sprintf("%d | `%s` | %s", c.Status, c.Code, c.Meaning))
	}
	leak := func(t apikey.Type) string {
		says := map[apikey.LeakAction]string{
			apikey.LeakRevokes: "the secret ends at once, and with its last one the key",
			apikey.LeakFlags:   "the key is marked (`leakReportedAt`) and goes on",
		}
		return fmt.Sprintf("`%s` | `%s`: %s | `onLeak.%[1]s`", t, p.OnLeak.Of(t), says[p.OnLeak.Of(t)])
	}
	e := p.Expiration
	routes, agents, anonymous := coreAPIRows()
	return map[string]string{
		"coreapi":    table("Context | Method | Path | Tokens", routes...),
		"coreagents": table("Context | Method | Path | Agent | Tokens", agents...),
		"corepublic": table("Method | Path", anonymous...),
		"caps": table("Limit | Value | Notes | Policy",
			fmt.Sprintf("Max API keys per instance | %d | Total keys, of all types | `caps.instance`", p.Caps.Instance),
			fmt.Sprintf("Max API keys per user | %d | Per user | `caps.user`", p.Caps.User),
			fmt.Sprintf("Max Agent Access Tokens per agent | %d | Per agent | `caps.agent`", p.Caps.Agent),
		),
		"creation": table("Limit | Value | Window | Policy",
			fmt.Sprintf("Key creation rate | %d | Per hour and instance | `creation.perHour`", p.Creation.PerHour),
			fmt.Sprintf("Key creation rate of one creator with the role `user` | %d | Per hour | `creation.perHourAndUser`", p.Creation.PerHourAndUser),
		),
		"usage": table("Limit | Value | Field",
			fmt.Sprintf("Rate | %d requests per %s | `rate`", l.Rate.Requests, l.Rate.Per),
			fmt.Sprintf("Burst limit | %d requests at once | `burst`", l.Burst),
			fmt.Sprintf("Max concurrent requests | %d | `maxConcurrent`", l.MaxConcurrent),
		),
		"rotation": table("Limit | Value | Field",
			fmt.Sprintf("Grace period, by default | %s | `gracePeriod`", apikey.Duration(admin.UsualGrace)),
			fmt.Sprintf("Grace period, at most | %s, and never beyond the end that the key had | `gracePeriod`", apikey.Duration(admin.LongestGrace)),
			fmt.Sprintf("Secrets of a key that are valid at once, at most | %d; a further rotation is a 409 unless it says `endOldest` | `endOldest`", admin.MaxValid),
			"New end of a key that has one, by default | the original duration again | `expirationDate`, `expiresIn`",
		),
		"expiration": table("What | Value | Policy",
			fmt.Sprintf("Expiration of a key that says nothing | `%s` | `expiration.default`", e.Default),
			fmt.Sprintf("Life of a key that says only `time` | %s | `expiration.life`", e.Life),
			fmt.Sprintf("Longest life, on creation, change and rotation | %s | `expiration.longestLife`", e.LongestLife),
			fmt.Sprintf("Inactivity of a key that says only `inactivity` | %d days | `expiration.inactivityDays`", e.InactivityDays),
			fmt.Sprintf("Inactivity, at most | %d days | ", apikey.MaxInactivityDays),
			fmt.Sprintf("Revoked keys are kept, then removed with their digests | %s | `keepRevoked`", p.KeepRevoked),
		),
		"revocation": table("`reason` | Meaning", reasons...),
		"leaks":      table("Type | What a report does | Policy", leak(apikey.TypeInstance), leak(apikey.TypeAgent), leak(apikey.TypeUser)),
		"errors":     table("Status | Code | Meaning", errorsOfManage...), "holdersErrors": table("Status | Code | Meaning", errorsOfHolders...),
		"alerts": table("Kind | Opened when | Policy",
			"`newNetwork` | a key is used from a network that it was never used from | `alerts.newNetwork`",
			fmt.Sprintf("`refusals` | within %s at least %d requests of a key are refused, and at least %d times as many as usual | `alerts.refusals.window`, `perKey`, `factor`",
				p.Alerts.Refusals.Window, p.Alerts.Refusals.PerKey, p.Alerts.Refusals.Factor),
			fmt.Sprintf("`refusals` | the same of the whole instance: at least %d | `alerts.refusals.perInstance`", p.Alerts.Refusals.PerInstance),
			fmt.Sprintf("`unknownKeys` | within a minute at least %d requests come with secrets that are no key's | `alerts.unknownKeys.perMinute`", p.Alerts.UnknownKeys.PerMinute),
			fmt.Sprintf("`expiring` | a key that is in use expires within %s days | `alerts.expiring.days`", strings.Trim(strings.ReplaceAll(fmt.Sprint(p.Alerts.Expiring.Days), " ", ", "), "[]")),
			fmt.Sprintf("`unused` | a key was not used for %d days, or was never used in the first %d | `alerts.unused.idleDays`, `neverUsedDays`", p.Alerts.Unused.IdleDays, p.Alerts.Unused.NeverUsedDays),
		),
		"quota": table("Field | Needed | What it is", quotaRows()...),
		"quotabounds": table("Limit | Value",
			fmt.Sprintf("Quotas of an instance, at most | %d", apikey.MaxQuotas),
			fmt.Sprintf("Window of a smoothed quota, in which its share is counted | %s", apikey.Duration(apikey.SmoothedWindow)),
		),
		"pattern": "```\n" + apikey.Format{}.Pattern() + "\n```\n",
	}
}

// coreAPIRows are the rules of the preset for FoundationaLLM: those that count, those of them that name an agent,
// and those for everybody.
func coreAPIRows() (all, agents, anonymous []string) {
	rules, err := foundationallm.CoreAPI("", authz.Required)
	if err != nil {
		panic(err)
	}
	for _, r := range rules {
		method, tokens := r.Method, "no"
		if method == "" {
			method = "any"
		}
		if r.KeyTypes == nil {
			tokens = "yes"
		}
		if r.Mode == authz.Public {
			anonymous = append(anonymous, fmt.Sprintf("%s | `%s`", method, r.Path))
			continue
		}
		all = append(all, fmt.Sprintf("`%s` | %s | `%s` | %s", r.Context, method, r.Path, tokens))
		for _, source := range r.Agent {
			agents = append(agents, fmt.Sprintf("`%s:{agent}` | %s | `%s` | `%s` | %s", r.Context, method, r.Path, source, tokens))
		}
	}
	return all, agents, anonymous
}

// TestPlatformPageConfigures: the first configuration on the page about FoundationaLLM is one, and so is what it
// says to add.
func TestPlatformPageConfigures(t *testing.T) {
	t.Parallel()
	blocks := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(readText(t, filepath.Join("..", "..", "docs", "foundationallm.md")), -1)
	if len(blocks) != 2 {
		t.Fatalf("there are %d blocks of configuration", len(blocks))
	}
	for _, text := range []string{blocks[0][1], blocks[0][1] + blocks[1][1]} {
		if cfg, faults := load(t, text, nil, nil); faults != nil || cfg.Preset.Name != presetFoundationaLLM {
			t.Errorf("%s: %q", text, faults)
		}
	}
}

// quotaRows are the fields of a quota, as the API documents them.
func quotaRows() (rows []string) {
	for f := range reflect.TypeFor[admin.QuotaInput]().Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		needed := "yes"
		if options != "" && name != "name" {
			needed = ""
		}
		about := f.Tag.Get("doc")
		for tag, says := range map[string]string{"enum": "One of ", "maxLength": "At most so many characters: "} {
			if value := f.Tag.Get(tag); value != "" {
				about += " " + says + strings.ReplaceAll(value, ",", ", ") + "."
			}
		}
		rows = append(rows, fmt.Sprintf("`%s` | %s | %s", name, needed, strings.TrimSpace(about)))
	}
	return rows
}

// TestPagesSayWhatTheCodeDoes compares what is generated of the pages for users; -update writes it.
func TestPagesSayWhatTheCodeDoes(t *testing.T) {
	t.Parallel()
	parts := generated()
	mark := regexp.MustCompile(`(?s)(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)`)
	for _, path := range pages(t) {
		old := readText(t, path)
		text := mark.ReplaceAllStringFunc(old, func(block string) string {
			found := mark.FindStringSubmatch(block)
			part, ok := parts[found[2]]
			if !ok {
				t.Errorf("%s: there is no %q, or it is there twice", path, found[2])
				return block
			}
			delete(parts, found[2])
			return found[1] + part + found[4]
		})
		if *updateDocs && text != old {
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			old = text
		}
		if diff := cmp.Diff(text, old); diff != "" {
			t.Errorf("%s: run with -update (-want +got)\n%s", path, diff)
		}
		if strings.Count(old, "generated: ") != len(mark.FindAllString(old, -1)) {
			t.Errorf("%s: a mark is not closed", path)
		}
		if strings.Contains(old, "TODO") {
			t.Errorf("%s: a value is open", path)
		}
	}
	for name := range parts {
		t.Errorf("no page has %q", name)
	}
}

// pages are the pages for users.
func pages(t *testing.T) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join("..", "..", "docs", "*.md"))
	if err != nil || len(all) < 5 {
		t.Fatalf("got %v, %v", all, err)
	}
	return append(all, filepath.Join("..", "..", "README.md"))
}

func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var (
	fence    = regexp.MustCompile("(?ms)^ *```.*?^ *```")
	codeSpan = regexp.MustCompile("`[^`\n]*`")
	heading  = regexp.MustCompile(`(?m)^#{1,6} +(.*)$`)
	link     = regexp.MustCompile(`\]\(([^)]*)\)|(?m:^\[[^\]]+\]: *(\S+))|<(https?:[^>]*)>`)
)

// anchors are the names by which a page's headings can be linked to, as GitHub makes them.
func anchors(text string) []string {
	var all []string
	for _, h := range heading.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		name := strings.Map(func(r rune) rune {
			switch {
			case r == ' ' || r == '-':
				return '-'
			case unicode.IsLetter(r) || unicode.IsDigit(r) || r == '_':
				return unicode.ToLower(r)
			}
			return -1
		}, h[1])
		for base, n := name, 1; slices.Contains(all, name); n++ {
			name = base + "-" + strconv.Itoa(n)
		}
		all = append(all, name)
	}
	return all
}

// linkFaults follows the links of a page: to files and to headings, which have to be there. Of what is
// elsewhere only the address is looked at.
func linkFaults(path, text string) (links int, faults []string) {
	text = codeSpan.ReplaceAllString(fence.ReplaceAllString(text, ""), "")
	for _, found := range link.FindAllStringSubmatch(text, -1) {
		links++
		target := found[1] + found[2] + found[3]
		fault := func(why string) { faults = append(faults, fmt.Sprintf("%s: %q %s", filepath.Base(path), target, why)) }
		u, err := url.Parse(target)
		switch {
		case err != nil || target == "" || strings.ContainsAny(target, " \t"):
			fault("is no address")
			continue
		case u.Scheme == "https" || u.Scheme == "http":
			if u.Host == "" {
				fault("has no host")
			}
			continue
		case u.Scheme != "" || u.Host != "" || strings.HasPrefix(u.Path, "/"):
			fault("is neither of the web nor of this repository")
			continue
		}
		file := path
		if u.Path != "" {
			file = filepath.Join(filepath.Dir(path), filepath.FromSlash(u.Path))
		}
		page, err := os.ReadFile(file)
		if err != nil {
			fault("is not there")
		} else if u.Fragment != "" && !slices.Contains(anchors(string(page)), u.Fragment) {
			fault("names no heading of it")
		}
	}
	return links, faults
}

func TestLinksLeadSomewhere(t *testing.T) {
	t.Parallel()
	all := 0
	for _, path := range pages(t) {
		links, faults := linkFaults(path, readText(t, path))
		all += links
		for _, fault := range faults {
			t.Error(fault)
		}
	}
	if all < 15 {
		t.Errorf("only %d links were found", all)
	}
	// And that it would tell.
	here := filepath.Join("..", "..", "docs", "api-key-limits.md")
	for text, want := range map[string]int{
		"[a](error-codes.md) [b](#key-lifecycle) [c](../README.md#install) <https://example.com> [d](https://example.com/a)": 0,
		"[a](gone.md)": 1, "[b](#gone)": 1, "[c](../README.md#gone)": 1, "[d](https:///a)": 1, "[e]()": 1, "[f](/docs/a.md)": 1,
		"[g](mailto:a@example.com)": 1, "`[h](gone.md)`": 0, "```\n[i](gone.md)\n```": 0, "[j][k]\n\n[k]: gone.md": 1, "[l\nm](gone.md)": 1,
	} {
		if _, faults := linkFaults(here, text); len(faults) != want {
			t.Errorf("%q: got %q, want %d", text, faults, want)
		}
	}
}

// TestPublishedPatternFindsSecrets: the pattern, the rule and the program on the page find secrets
// wherever they stand in a text, and nothing else.
func TestPublishedPatternFindsSecrets(t *testing.T) {
	t.Parallel()
	page := readText(t, filepath.Join("..", "..", "docs", "secret-scanning.md"))
	pattern := apikey.Format{}.Pattern()
	for _, as := range []string{"regex = '''" + pattern + "'''", `re.findall(r"` + pattern + `", line)`, "\n" + pattern + "\n"} {
		if !strings.Contains(page, as) {
			t.Errorf("the page lacks %s", as)
		}
	}
	keywords := regexp.MustCompile(`(?m)^keywords = \[(.*)\]$`).FindStringSubmatch(page)
	program := regexp.MustCompile("(?s)```python\n(.*?)```").FindStringSubmatch(page)
	if keywords == nil || program == nil {
		t.Fatal("the page has no rule or no program")
	}

	compiled := regexp.MustCompile(pattern)
	var text, want strings.Builder
	line := 0
	for _, kind := range []apikey.Kind{apikey.KindInstance, apikey.KindAgent, apikey.KindUser, apikey.KindManagement} {
		if !strings.Contains(keywords[1], `"kw`+string(kind)+`_"`) {
			t.Errorf("the rule has no keyword for %c", kind)
		}
		for range 20 {
			secret := apikey.Format{}.New(kind).Reveal()
			hint := secret[:4] + "…" + secret[len(secret)-4:]
			for _, around := range []string{"%s", "X-API-Key: %s", `{"secret":"%s"}`, "KEY=%s;", "https://h/p?key=%s&a=b", "ключ:%s.", "<%s>"} {
				in := fmt.Sprintf(around, secret)
				if found := compiled.FindStringSubmatch(in); found == nil || found[1] != secret {
					t.Fatalf("%s: a secret is not found", around)
				}
				line++
				text.WriteString(in + "\n")
				fmt.Fprintf(&want, "line %d: %s\n", line, hint)
			}
			for _, no := range []string{secret[1:], secret[:len(secret)-1], secret + "x", "x" + secret, strings.ToUpper(secret), secret[:3] + secret[4:]} {
				if compiled.MatchString(no) {
					t.Fatal("what is no secret is found")
				}
				line++
				text.WriteString(no + "\n")
			}
			// By shape only: the checksum tells.
			line++
			text.WriteString(flipped(secret, 20) + "\n")
		}
	}

	python, err := exec.LookPath("python3")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("the program on the page is not tried: there is no python3")
	}
	scan := filepath.Join(t.TempDir(), "scan.py")
	if err := os.WriteFile(scan, []byte(program[1]), 0o600); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), python, scan)
	c.WaitDelay = time.Second
	c.Env = programEnv("PYTHONUTF8=1")
	c.Stdin = strings.NewReader(text.String())
	got, err := c.CombinedOutput()
	if diff := cmp.Diff(want.String(), string(got)); err != nil || diff != "" {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
}
