package foundationallm

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyward/authz/apikey"
)

func testdata(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// The file of that platform's documentation, and the definitions of its other pages.
func TestParseQuotaStore(t *testing.T) {
	want := []apikey.Quota{
		{
			Name: "CoreAPICompletionsUPNRawRequestRateLimit", Description: "Per UPN raw request rate limit on the Core API completions controller.",
			Context: "CoreAPI:Completions", Partition: apikey.PartitionUPN, Limit: 120, Window: time.Minute, Smoothed: true, Lockout: time.Minute,
		},
		{
			Name: "CoreAPICompletionsGlobal", Description: "All completions together.",
			Context: "CoreAPI:Completions", Partition: apikey.PartitionNone, Limit: 1000, Window: time.Minute, Smoothed: true, Distributed: true,
		},
		{
			Name: "SalesAgent", Description: "", Context: "CoreAPI:Completions:sales", Partition: apikey.PartitionIdentifier,
			Limit: 1000, Window: 15 * time.Minute, Smoothed: true, Lockout: 5 * time.Minute,
		},
	}
	text := testdata(t, "quota-store.json")
	for name, text := range map[string][]byte{"as it is": text, "with a byte order mark": append([]byte("\xef\xbb\xbf"), text...)} {
		if !IsQuotaStore(text) {
			t.Errorf("%s: is not known as what it is", name)
		}
		got, warnings, err := ParseQuotaStore(text)
		if err != nil || warnings != nil {
			t.Fatalf("%s: warnings %q, error %v", name, warnings, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got)\n%s", name, diff)
		}
	}
	if got, warnings, err := ParseQuotaStore([]byte("[]")); err != nil || len(got)+len(warnings) != 0 {
		t.Errorf("as that platform makes it: got %v, %q, %v", got, warnings, err)
	}
}

func TestWhatIsReadAsThere(t *testing.T) {
	const rest = `,"context":"CoreAPI:Completions","metric_limit":3,"metric_window_seconds":60`
	for name, c := range map[string]struct {
		text      string
		partition apikey.Partition
		warnings  int
	}{
		"words in any case":           {`{"name":"q"` + rest + `,"metric_partition":"userprincipalname","type":"RAWREQUESTRATELIMIT"}`, apikey.PartitionUPN, 0},
		"our own partition":           {`{"name":"q"` + rest + `,"metric_partition":"ApiKey"}`, apikey.PartitionKey, 0},
		"the first word is meant":     {`{"name":"q"` + rest + `}`, apikey.PartitionNone, 0},
		"unknown members are ignored": {`{"name":"q"` + rest + `,"enabled":false,"Name":"x","kwi_0123":{}}`, apikey.PartitionNone, 3},
		"the type is not looked at":   {`{"name":"q"` + rest + `,"type":"AgentRequestRateLimit"}`, apikey.PartitionNone, 1},
	} {
		quotas, warnings, err := ParseQuotaStore([]byte("[" + c.text + "]"))
		if err != nil || len(quotas) != 1 || quotas[0].Partition != c.partition || len(warnings) != c.warnings {
			t.Errorf("%s: got %v, warnings %q, error %v", name, quotas, warnings, err)
		}
		if strings.Contains(strings.Join(warnings, ""), "0123") {
			t.Errorf("%s: what is no name is repeated: %q", name, warnings)
		}
	}
}

// All that is wrong is told at once, with the names of the file.
func TestParseQuotaStoreTellsAllFaults(t *testing.T) {
	text := `[
		{"name":"a","context":"CoreAPI:Completions","metric_partition":"PerUser","metric_limit":2,"metric_window_seconds":60,"lockout_duration_seconds":-5},
		{"name":"b","context":"CoreAPI","metric_limit":120,"metric_window_seconds":10,"type":"Other"},
		{"name":"b","context":"CoreAPI:Files","metric_limit":"120","metric_window_seconds":50.5,"distributed_enforcement":"no"},
		{"name":"c","context":"CoreAPI:Files","metric_limit":120,"metric_window_seconds":36028797018964028},
		{"name":"d","context":"CoreAPI:Files","metric_limit":120,"metric_window_seconds":60,"metric_limit":1200,"enabled":true,"enabled":true,"kwi_0123":1,"kwi_0123":2,"kwi_0123":3}
	]`
	_, _, err := ParseQuotaStore([]byte(text))
	want := []string{
		`quotas.a.lockout_duration_seconds: must be from 1s to 366d, or absent for none`,
		`quotas.a.metric_limit: must be at least 3: smoothed to 20s of 1m, less would refuse the first request`,
		`quotas.a.metric_partition: must be None, UserPrincipalName, UserIdentifier or ApiKey`,
		`quotas.b.context: must be {service}:{controller} or {service}:{controller}:{agent}, each of A-Z a-z 0-9 . _ -, such as CoreAPI:Completions`,
		`quotas.b.metric_window_seconds: must be a multiple of 20s, because it is smoothed`,
		`quotas.c.metric_window_seconds: must be from 1s to 366d`,
		`quotas[1].type: must be RawRequestRateLimit or AgentRequestRateLimit`,
		`quotas[2].distributed_enforcement: must be true or false`,
		`quotas[2].metric_limit: must be a whole number`,
		`quotas[2].metric_window_seconds: must be a whole number`,
		`quotas[2].name: is that of quotas[1] too: b`,
		`quotas[4]: has a member "enabled" twice`,
		`quotas[4]: has a member "metric_limit" twice`,
		`quotas[4]: has an unknown member twice`,
	}
	var got []string
	for _, one := range faults(err) {
		got = append(got, one.Error())
	}
	if diff := cmp.Diff(want, slices.Sorted(slices.Values(got))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	for _, text := range []string{``, `{}`, `null`, `[`, `[1]`, `[null]`, `"x"`} {
		if _, _, err := ParseQuotaStore([]byte(text)); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

func TestFormatQuotaStore(t *testing.T) {
	stored := []apikey.Quota{
		{Name: "a", Description: "d", Context: "CoreAPI:Completions", Partition: apikey.PartitionUPN, Limit: 120, Window: time.Minute, Smoothed: true, Lockout: time.Minute},
		{Name: "b", Context: "CoreAPI:Completions:sales", Partition: apikey.PartitionNone, Limit: 3, Window: time.Minute, Smoothed: true, Distributed: true},
	}
	text, err := FormatQuotaStore(stored)
	if err != nil {
		t.Fatal(err)
	}
	var members []map[string]any
	if err := json.Unmarshal(text, &members); err != nil || len(members[0]) != 9 || members[0]["type"] != rawRequestRate || members[1]["type"] != agentRequestRate {
		t.Errorf("got %s, %v", text, err)
	}
	back, warnings, err := ParseQuotaStore(text)
	if err != nil || warnings != nil {
		t.Fatalf("%q, %v", warnings, err)
	}
	if diff := cmp.Diff(stored, back); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}

	// What that platform cannot do is not written as if it could.
	ours := []apikey.Quota{
		{Name: "a", Context: "a:b", Partition: apikey.PartitionKey, Limit: 1, Window: time.Minute, Smoothed: true},
		{Name: "b", Context: "a:b", Partition: apikey.PartitionNone, Limit: 1, Period: apikey.PeriodDay},
		{Name: "c", Context: "a:c", Partition: apikey.PartitionNone, Limit: 100, Window: time.Minute, Smoothed: true, Shadow: true, Lockout: 1500 * time.Millisecond},
	}
	_, err = FormatQuotaStore(ours)
	var got []string
	for _, one := range faults(err) {
		got = append(got, one.Field)
	}
	if diff := cmp.Diff([]string{"quotas.a.partition", "quotas.b.context", "quotas.b.smoothed", "quotas.c.lockout", "quotas.c.shadow"}, slices.Sorted(slices.Values(got))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestOtherFilesAreNoQuotaStore(t *testing.T) {
	for _, text := range []string{``, `[]`, `{}`, `[{"name":"q","context":"a:b","partition":"None","limit":1,"window":"60s"}]`, "- name: q\n", `[1]`} {
		if IsQuotaStore([]byte(text)) {
			t.Errorf("%q is taken for one", text)
		}
	}
}

// Whatever comes is read or refused, and what is read is valid and comes back from what is written of it.
func FuzzParseQuotaStore(f *testing.F) {
	f.Add([]byte(`[{"name":"q","context":"a:b:c","metric_limit":3,"metric_window_seconds":60,"lockout_duration_seconds":9223372036}]`))
	f.Add([]byte(`[{"name":"q","context":"a:b","metric_limit":-1,"metric_window_seconds":-9223372036854775808}]`))
	f.Add([]byte(`[{"metric_partition":null}]`))
	f.Fuzz(func(t *testing.T, text []byte) {
		quotas, _, err := ParseQuotaStore(text)
		if err != nil {
			if _, ok := errors.AsType[*apikey.InvalidError](err); !ok {
				t.Fatalf("got %T", err)
			}
			return
		}
		if err := apikey.ValidateQuotas(quotas); err != nil {
			t.Fatalf("accepted: %v", err)
		}
		again, err := FormatQuotaStore(quotas)
		if err != nil {
			return // it can say more than that platform
		}
		back, warnings, err := ParseQuotaStore(again)
		if err != nil || warnings != nil || len(back) != len(quotas) {
			t.Fatalf("warnings %q, error %v", warnings, err)
		}
		for i := range back {
			if back[i].Description = quotas[i].Description; back[i] != quotas[i] { // of which JSON mends the UTF-8
				t.Fatalf("got %+v, want %+v", back[i], quotas[i])
			}
		}
	})
}
