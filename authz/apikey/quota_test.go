package apikey

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// minute is a quota that is valid.
var minute = Quota{Name: "q", Context: "CoreAPI:Completions", Partition: PartitionUPN, Limit: 120, Window: time.Minute, Smoothed: true, Lockout: time.Minute}

// faultsOf are the fields that an error names, sorted.
func faultsOf(err error) (fields []string) {
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		for _, one := range many.Unwrap() {
			fields = append(fields, faultsOf(one)...)
		}
	} else if bad, ok := errors.AsType[*InvalidError](err); ok {
		fields = append(fields, bad.Field)
	}
	slices.Sort(fields)
	return fields
}

func TestQuotaValidate(t *testing.T) {
	for name, c := range map[string]struct {
		change func(q *Quota)
		want   []string
	}{
		"as it is":                    {func(*Quota) {}, nil},
		"not smoothed, any window":    {func(q *Quota) { q.Smoothed, q.Window, q.Limit = false, 7*time.Second, 1 }, nil},
		"a day":                       {func(q *Quota) { q.Smoothed, q.Window, q.Period = false, 0, PeriodDay }, nil},
		"a month":                     {func(q *Quota) { q.Smoothed, q.Window, q.Period = false, 0, PeriodMonth }, nil},
		"an agent":                    {func(q *Quota) { q.Context = "CoreAPI:Completions:__default__" }, nil},
		"every partition":             {func(q *Quota) { q.Partition = PartitionKey }, nil},
		"no name":                     {func(q *Quota) { q.Name = "" }, []string{"name"}},
		"a name that is a path":       {func(q *Quota) { q.Name = ".." }, []string{"name"}},
		"a name with a slash":         {func(q *Quota) { q.Name = "a/b" }, []string{"name"}},
		"a name with a space":         {func(q *Quota) { q.Name = "a b" }, []string{"name"}},
		"the longest name":            {func(q *Quota) { q.Name = strings.Repeat("a", 128) }, nil},
		"a longer name":               {func(q *Quota) { q.Name = strings.Repeat("a", 129) }, []string{"name"}},
		"no context":                  {func(q *Quota) { q.Context = "" }, []string{"context"}},
		"a service alone":             {func(q *Quota) { q.Context = "CoreAPI" }, []string{"context"}},
		"no controller":               {func(q *Quota) { q.Context = "CoreAPI:" }, []string{"context"}},
		"an empty agent":              {func(q *Quota) { q.Context = "CoreAPI:Completions:" }, []string{"context"}},
		"four parts":                  {func(q *Quota) { q.Context = "a:b:c:d" }, []string{"context"}},
		"a context with a wildcard":   {func(q *Quota) { q.Context = "CoreAPI:*" }, []string{"context"}},
		"a long agent":                {func(q *Quota) { q.Context = "a:b:" + strings.Repeat("c", 128) }, nil},
		"a longer controller":         {func(q *Quota) { q.Context = "a:" + strings.Repeat("c", 65) }, []string{"context"}},
		"no partition":                {func(q *Quota) { q.Partition = "" }, []string{"partition"}},
		"a partition in another case": {func(q *Quota) { q.Partition = "none" }, []string{"partition"}},
		"no limit":                    {func(q *Quota) { q.Limit = 0 }, []string{"limit"}},
		"unlimited":                   {func(q *Quota) { q.Limit = Unlimited }, []string{"limit"}},
		"too much":                    {func(q *Quota) { q.Limit = 1_000_000_001 }, []string{"limit"}},
		"the least share":             {func(q *Quota) { q.Limit = 3 }, nil},
		"less than the least share":   {func(q *Quota) { q.Limit = 2 }, []string{"limit"}},
		"the same, not smoothed":      {func(q *Quota) { q.Smoothed, q.Limit = false, 2 }, nil},
		"no window":                   {func(q *Quota) { q.Smoothed, q.Window = false, 0 }, []string{"window"}},
		"a negative window":           {func(q *Quota) { q.Window = -time.Minute }, []string{"window"}},
		"the shortest window":         {func(q *Quota) { q.Smoothed, q.Window = false, time.Second }, nil},
		"a shorter window":            {func(q *Quota) { q.Smoothed, q.Window = false, time.Second-1 }, []string{"window"}},
		"the longest window":          {func(q *Quota) { q.Smoothed, q.Window = false, 366*day }, nil},
		"a longer window":             {func(q *Quota) { q.Smoothed, q.Window = false, 366*day+1 }, []string{"window"}},
		"smoothed over 20s":           {func(q *Quota) { q.Window, q.Limit = 20*time.Second, 1 }, nil},
		"smoothed over 50s":           {func(q *Quota) { q.Window = 50 * time.Second }, []string{"window"}},
		"smoothed over less than 20s": {func(q *Quota) { q.Window = 10 * time.Second }, []string{"window"}},
		"window and period":           {func(q *Quota) { q.Smoothed, q.Period = false, PeriodDay }, []string{"period"}},
		"an unknown period":           {func(q *Quota) { q.Smoothed, q.Window, q.Period = false, 0, "week" }, []string{"period"}},
		"a smoothed period":           {func(q *Quota) { q.Window, q.Period = 0, PeriodDay }, []string{"smoothed"}},
		"no lockout":                  {func(q *Quota) { q.Lockout = 0 }, nil},
		"a negative lockout":          {func(q *Quota) { q.Lockout = -1 }, []string{"lockout"}},
		"a lockout of an instant":     {func(q *Quota) { q.Lockout = time.Millisecond }, []string{"lockout"}},
		"a lockout for ever":          {func(q *Quota) { q.Lockout = 367 * day }, []string{"lockout"}},
		"everything": {func(q *Quota) { *q = Quota{Lockout: -1} },
			[]string{"context", "limit", "lockout", "name", "partition", "window"}},
	} {
		t.Run(name, func(t *testing.T) {
			q := minute
			c.change(&q)
			if diff := cmp.Diff(c.want, faultsOf(q.Validate(""))); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			var under []string
			for _, field := range c.want {
				under = append(under, "at."+field)
			}
			if diff := cmp.Diff(under, faultsOf(q.Validate("at"))); diff != "" {
				t.Errorf("below a path (-want +got)\n%s", diff)
			}
		})
	}
}

func TestTooSmallALimitSaysTheLeast(t *testing.T) {
	q := minute
	q.Window, q.Limit = 15*time.Minute, 44
	err := q.Validate("")
	if want := "limit: must be at least 45: smoothed to 20s of 15m, less would refuse the first request"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if q.Limit = q.LeastLimit(); q.Validate("") != nil {
		t.Errorf("%d is said to be enough, and is not", q.Limit)
	}
}

// All faults of all quotas are told at once, each by quota and field.
func TestValidateQuotas(t *testing.T) {
	named := func(name string, change func(q *Quota)) Quota {
		q := minute
		q.Name = name
		if change != nil {
			change(&q)
		}
		return q
	}
	list := []Quota{
		named("a", nil),
		named("b", func(q *Quota) { q.Limit, q.Partition = 0, "" }),
		named("a", func(q *Quota) { q.Window = 0 }),
		named("no name", func(q *Quota) { q.Context = "x" }),
		named("no name", nil),
		named("c", nil),
	}
	want := []string{"quotas.b.limit", "quotas.b.partition", "quotas[2].name", "quotas[2].window", "quotas[3].context", "quotas[3].name", "quotas[4].name"}
	if diff := cmp.Diff(want, faultsOf(ValidateQuotas(list))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if err := ValidateQuotas(nil); err != nil {
		t.Error(err)
	}
	var many []Quota
	for i := range MaxQuotas + 1 {
		many = append(many, named(fmt.Sprint("q", i), nil))
	}
	if err := ValidateQuotas(many[:MaxQuotas]); err != nil {
		t.Errorf("as many as there may be: %v", err)
	}
	if diff := cmp.Diff([]string{"quotas"}, faultsOf(ValidateQuotas(many))); diff != "" {
		t.Errorf("one more (-want +got)\n%s", diff)
	}
}

func TestQuotaAsJSON(t *testing.T) {
	full := Quota{
		Name: "n", Description: "d", Context: "a:b", Partition: PartitionKey, Limit: 5, Window: 30 * day, Period: PeriodDay,
		Smoothed: true, Lockout: 90 * time.Second, Distributed: true, Shadow: true,
	}
	for want, q := range map[string]Quota{
		`{"name":"n","description":"d","context":"a:b","partition":"ApiKey","limit":5,"window":"30d","period":"day","smoothed":true,"lockout":"1m30s","distributedEnforcement":true,"shadow":true}`: full,
		`{"name":"n","context":"a:b","partition":"None","limit":5,"window":"1h"}`: {Name: "n", Context: "a:b", Partition: PartitionNone, Limit: 5, Window: time.Hour},
	} {
		text, err := json.Marshal(q)
		if err != nil || string(text) != want {
			t.Errorf("got %s, error %v, want %s", text, err, want)
		}
		got := full // what is absent is zero, whatever was there
		if err := json.Unmarshal(text, &got); err != nil || got != q {
			t.Errorf("got %+v, error %v, want %+v", got, err, q)
		}
	}
	var q Quota
	if err := json.Unmarshal([]byte(`{"window":"soon"}`), &q); err == nil {
		t.Error("no duration is taken for one")
	}
}

// A key overrides only what counts it alone.
func TestOverrides(t *testing.T) {
	const own = 7
	for _, c := range []struct {
		partition Partition
		of        map[Type]int // limit in force
	}{
		{PartitionNone, map[Type]int{TypeInstance: 120, TypeAgent: 120, TypeUser: 120}},
		{PartitionUPN, map[Type]int{TypeInstance: own, TypeAgent: own, TypeUser: 120}},
		{PartitionIdentifier, map[Type]int{TypeInstance: own, TypeAgent: own, TypeUser: 120}},
		{PartitionKey, map[Type]int{TypeInstance: own, TypeAgent: own, TypeUser: own}},
	} {
		for typ, want := range c.of {
			q := minute
			q.Partition = c.partition
			k := &Key{Type: typ, Quotas: map[string]QuotaOverride{"q": {Limit: own}, "other": {Limit: 1}}}
			if got := q.LimitOf(k); got != want {
				t.Errorf("%s, a key of type %s: got %d, want %d", c.partition, typ, got, want)
			}
			if got := q.LimitOf(&Key{Type: typ}); got != 120 {
				t.Errorf("%s, without an override: got %d", c.partition, got)
			}
			if err := q.ValidateOverride("f", typ, QuotaOverride{Limit: own}); (err == nil) != (want == own) {
				t.Errorf("%s, a key of type %s: got %v", c.partition, typ, err)
			}
		}
	}
	q := minute
	for limit, field := range map[int]string{Unlimited: "", 3: "", 1_000_000_000: "", 2: "f.limit", 0: "f.limit", -2: "f.limit", 1_000_000_001: "f.limit"} {
		var want []string
		if field != "" {
			want = []string{field}
		}
		if diff := cmp.Diff(want, faultsOf(q.ValidateOverride("f", TypeAgent, QuotaOverride{Limit: limit}))); diff != "" {
			t.Errorf("%d (-want +got)\n%s", limit, diff)
		}
	}
}
