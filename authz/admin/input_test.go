package admin

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"keyward/authz/apikey"
)

var noon = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// shipped is the policy of an instance that says nothing.
var shipped = apikey.Policy{}.InForce()

func at(s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		panic(err)
	}
	return t.UTC()
}

func TestKeyInputAccepted(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   KeyInput
		want apikey.Key
	}{
		{"least", KeyInput{}, apikey.Key{}},
		{"no scopes is every right", KeyInput{Scopes: nil}, apikey.Key{Scopes: nil}},
		{"empty scopes is none", KeyInput{Scopes: []string{}}, apikey.Key{Scopes: apikey.Scopes{}}},
		{"scopes sorted, no doubles", KeyInput{Scopes: []string{"b", "a:*", "b"}}, apikey.Key{Scopes: apikey.Scopes{"a:*", "b"}}},
		{"agent", KeyInput{Type: "agent", AgentName: "sales-01"}, apikey.Key{Type: "agent", AgentName: "sales-01"}},
		{"user", KeyInput{Type: "user", UserPrincipalName: "ann@example.org"}, apikey.Key{Type: "user", UserPrincipalName: "ann@example.org"}},
		{"description of two lines", KeyInput{Description: "one\ntwo"}, apikey.Key{Description: "one\ntwo"}},
		{
			"addresses in one spelling",
			KeyInput{AllowedIPs: []string{"10.1.2.3/8", "::ffff:192.0.2.1", "::ffff:10.0.0.0/104", "2001:DB8::1"}},
			apikey.Key{AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::1/128")}},
		},
		{"date and time", KeyInput{ExpirationDate: "2026-06-01T14:00:00.5+01:00"}, apikey.Key{ExpirationDate: at("2026-06-01T13:00:00.5Z")}},
		{"a date is its end in UTC", KeyInput{ExpirationDate: "2026-06-01"}, apikey.Key{ExpirationDate: at("2026-06-01T23:59:59.999999Z")}},
		{"365 days ahead", KeyInput{ExpirationDate: "2027-06-01T12:00:00Z"}, apikey.Key{ExpirationDate: at("2027-06-01T12:00:00Z")}},
		{"duration", KeyInput{ExpiresIn: "30d"}, apikey.Key{ExpirationDate: at("2026-07-01T12:00:00Z")}},
		{"not before today", KeyInput{NotBefore: "2026-06-01"}, apikey.Key{NotBefore: at("2026-06-01T00:00:00Z")}},
		{"not before now, a little late", KeyInput{NotBefore: "2026-06-01T11:59:30Z"}, apikey.Key{NotBefore: at("2026-06-01T11:59:30Z")}},
		{"inactivity", KeyInput{InactivityDays: new(365)}, apikey.Key{InactivityDays: 365}},
		{"inactivity alone", KeyInput{ExpirationPolicy: "inactivity"}, apikey.Key{InactivityDays: 90}},
		{"inactivity and a date", KeyInput{ExpirationPolicy: "inactivity", ExpiresIn: "1d"}, apikey.Key{InactivityDays: 90, ExpirationDate: at("2026-06-02T12:00:00Z")}},
		{"days and a date", KeyInput{InactivityDays: new(3), ExpiresIn: "1d"}, apikey.Key{InactivityDays: 3, ExpirationDate: at("2026-06-02T12:00:00Z")}},
		{"time alone", KeyInput{ExpirationPolicy: "time"}, apikey.Key{ExpirationDate: at("2026-09-29T12:00:00Z")}},
		{"time and a date", KeyInput{ExpirationPolicy: "time", ExpirationDate: "2026-06-03"}, apikey.Key{ExpirationDate: at("2026-06-03T23:59:59.999999Z")}},
		{"none", KeyInput{ExpirationPolicy: "none"}, apikey.Key{}},
		{
			"limits",
			KeyInput{Limits: LimitsInput{Rate: &RateInput{new(60), "1m"}, Burst: new(5), MaxConcurrent: new(-1)}},
			apikey.Key{Limits: apikey.Limits{Rate: apikey.Rate{Requests: 60, Per: apikey.Duration(time.Minute)}, Burst: 5, MaxConcurrent: -1}},
		},
		{"unlimited rate needs no time", KeyInput{Limits: LimitsInput{Rate: &RateInput{Requests: new(-1)}}}, apikey.Key{Limits: apikey.Limits{Rate: apikey.Rate{Requests: -1}}}},
		{"markup is text", KeyInput{Name: "<script> =cmd() ../.. é 日本"}, apikey.Key{Name: "<script> =cmd() ../.. é 日本"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.in.Name == "" {
				tt.in.Name, tt.want.Name = "n", "n"
			}
			if tt.want.Type == "" {
				tt.want.Type = apikey.TypeInstance
			}
			tt.want.CreatedAt = noon
			got, err := tt.in.key(apikey.Format{}, &shipped, noon)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&tt.want, got, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestKeyInputRefused(t *testing.T) {
	pasted := apikey.Format{}.New(apikey.KindUser).Reveal()
	many := make([]string, 65)
	for i := range many {
		many[i] = fmt.Sprintf("10.0.0.%d", i)
	}
	crowd := map[string]string{}
	for i := range 33 {
		crowd[fmt.Sprint(i)] = ""
	}
	for _, tt := range []struct {
		name  string
		in    KeyInput
		field string
	}{
		{"name missing", KeyInput{Name: ""}, "name"},
		{"name too long", KeyInput{Name: strings.Repeat("x", 129)}, "name"},
		{"name of spaces", KeyInput{Name: "   "}, "name"},
		{"name ends with a space", KeyInput{Name: "n "}, "name"},
		{"name with a line break", KeyInput{Name: "a\nb"}, "name"},
		{"name with NUL", KeyInput{Name: "a\x00b"}, "name"},
		{"name not UTF-8", KeyInput{Name: "a\xffb"}, "name"},
		{"name turns right to left", KeyInput{Name: "a\u202eb"}, "name"},
		{"name what a decoder left of half a character", KeyInput{Name: "a\ufffdb"}, "name"},
		{"name holds a secret", KeyInput{Name: "mine: " + pasted}, "name"},
		{"description too long", KeyInput{Name: "n", Description: strings.Repeat("x", 1025)}, "description"},
		{"description holds a secret", KeyInput{Name: "n", Description: pasted + " is it"}, "description"},
		{"type unknown", KeyInput{Name: "n", Type: "service"}, "type"},
		{"type in another case", KeyInput{Name: "n", Type: "Agent", AgentName: "a"}, "type"},
		{"agent without name", KeyInput{Name: "n", Type: "agent"}, "agentName"},
		{"agent with a bad name", KeyInput{Name: "n", Type: "agent", AgentName: "a b"}, "agentName"},
		{"agent name on an instance key", KeyInput{Name: "n", AgentName: "a"}, "agentName"},
		{"user without principal", KeyInput{Name: "n", Type: "user"}, "userPrincipalName"},
		{"user with a comma", KeyInput{Name: "n", Type: "user", UserPrincipalName: "a,b"}, "userPrincipalName"},
		{"user not ASCII", KeyInput{Name: "n", Type: "user", UserPrincipalName: "é@x"}, "userPrincipalName"},
		{"user too long", KeyInput{Name: "n", Type: "user", UserPrincipalName: strings.Repeat("x", 257)}, "userPrincipalName"},
		{"principal on an agent key", KeyInput{Name: "n", Type: "agent", AgentName: "a", UserPrincipalName: "u"}, "userPrincipalName"},
		{"environment", KeyInput{Name: "n", Environment: "pro d"}, "environment"},
		{"environment too long", KeyInput{Name: "n", Environment: strings.Repeat("e", 65)}, "environment"},
		{"second scope", KeyInput{Name: "n", Scopes: []string{"a", "b c"}}, "scopes[1]"},
		{"too many scopes", KeyInput{Name: "n", Scopes: make65scopes()}, "scopes"},
		{"empty list of addresses", KeyInput{Name: "n", AllowedIPs: []string{}}, "allowedIps"},
		{"too many addresses", KeyInput{Name: "n", AllowedIPs: many}, "allowedIps"},
		{"zone", KeyInput{Name: "n", AllowedIPs: []string{"fe80::1%eth0"}}, "allowedIps[0]"},
		{"octal", KeyInput{Name: "n", AllowedIPs: []string{"1.1.1.1", "010.0.0.1"}}, "allowedIps[1]"},
		{"mapped and wider than IPv4", KeyInput{Name: "n", AllowedIPs: []string{"::ffff:0:0/95"}}, "allowedIps[0]"},
		{"burst 0", KeyInput{Name: "n", Limits: LimitsInput{Burst: new(0)}}, "limits.burst"},
		{"concurrency 0", KeyInput{Name: "n", Limits: LimitsInput{MaxConcurrent: new(0)}}, "limits.maxConcurrent"},
		{"rate 0", KeyInput{Name: "n", Limits: LimitsInput{Rate: &RateInput{new(0), "1m"}}}, "limits.rate.requests"},
		{"rate empty", KeyInput{Name: "n", Limits: LimitsInput{Rate: &RateInput{}}}, "limits.rate.requests"},
		{"rate without time", KeyInput{Name: "n", Limits: LimitsInput{Rate: &RateInput{Requests: new(1)}}}, "limits.rate.per"},
		{"rate per nonsense", KeyInput{Name: "n", Limits: LimitsInput{Rate: &RateInput{new(1), "soon"}}}, "limits.rate.per"},
		{"burst -2", KeyInput{Name: "n", Limits: LimitsInput{Burst: new(-2)}}, "limits.burst"},
		{"date past", KeyInput{Name: "n", ExpirationDate: "2026-06-01T11:59:59Z"}, "expirationDate"},
		{"date now", KeyInput{Name: "n", ExpirationDate: "2026-06-01T12:00:00Z"}, "expirationDate"},
		{"date yesterday", KeyInput{Name: "n", ExpirationDate: "2026-05-31"}, "expirationDate"},
		{"date too far", KeyInput{Name: "n", ExpirationDate: "2027-06-01T12:00:01Z"}, "expirationDate"},
		{"bare date too far", KeyInput{Name: "n", ExpirationDate: "2027-06-01"}, "expirationDate"},
		{"year 10000", KeyInput{Name: "n", ExpirationDate: "10000-01-01T00:00:00Z"}, "expirationDate"},
		{"year 0", KeyInput{Name: "n", ExpirationDate: "0000-01-01T00:00:00Z"}, "expirationDate"},
		{"no zone", KeyInput{Name: "n", ExpirationDate: "2026-12-31T23:59:59"}, "expirationDate"},
		{"24 o'clock", KeyInput{Name: "n", ExpirationDate: "2026-12-31T24:00:00Z"}, "expirationDate"},
		{"leap second", KeyInput{Name: "n", ExpirationDate: "2026-12-31T23:59:60Z"}, "expirationDate"},
		{"hour of one digit", KeyInput{Name: "n", ExpirationDate: "2026-12-31T3:00:00Z"}, "expirationDate"},
		{"comma for a point", KeyInput{Name: "n", ExpirationDate: "2026-12-31T03:00:00,5Z"}, "expirationDate"},
		{"zone of a day", KeyInput{Name: "n", ExpirationDate: "2026-12-31T03:00:00+24:00"}, "expirationDate"},
		{"small t", KeyInput{Name: "n", ExpirationDate: "2026-12-31t03:00:00z"}, "expirationDate"},
		{"epoch", KeyInput{Name: "n", ExpirationDate: "1798761599"}, "expirationDate"},
		{"30 February", KeyInput{Name: "n", ExpirationDate: "2027-02-30"}, "expirationDate"},
		{"date and duration", KeyInput{Name: "n", ExpirationDate: "2026-12-31", ExpiresIn: "1d"}, "expiresIn"},
		{"duration nonsense", KeyInput{Name: "n", ExpiresIn: "soon"}, "expiresIn"},
		{"duration 0", KeyInput{Name: "n", ExpiresIn: "0s"}, "expiresIn"},
		{"duration negative", KeyInput{Name: "n", ExpiresIn: "-1d"}, "expiresIn"},
		{"duration too long", KeyInput{Name: "n", ExpiresIn: "366d"}, "expiresIn"},
		{"policy unknown", KeyInput{Name: "n", ExpirationPolicy: "never"}, "expirationPolicy"},
		{"none with a date", KeyInput{Name: "n", ExpirationPolicy: "none", ExpiresIn: "1d"}, "expirationPolicy"},
		{"none with days", KeyInput{Name: "n", ExpirationPolicy: "none", InactivityDays: new(1)}, "expirationPolicy"},
		{"time with days", KeyInput{Name: "n", ExpirationPolicy: "time", InactivityDays: new(1)}, "inactivityDays"},
		{"not before yesterday", KeyInput{Name: "n", NotBefore: "2026-05-31"}, "notBefore"},
		{"not before an hour ago", KeyInput{Name: "n", NotBefore: "2026-06-01T11:00:00Z"}, "notBefore"},
		{"not before the end", KeyInput{Name: "n", NotBefore: "2026-06-02T12:00:00Z", ExpiresIn: "1d"}, "notBefore"},
		{"not before too far", KeyInput{Name: "n", NotBefore: "2028-01-01"}, "notBefore"},
		{"inactivity 0", KeyInput{Name: "n", InactivityDays: new(0)}, "inactivityDays"},
		{"inactivity too long", KeyInput{Name: "n", InactivityDays: new(366)}, "inactivityDays"},
		{"metadata crowd", KeyInput{Name: "n", Metadata: crowd}, "metadata"},
		{"metadata without name", KeyInput{Name: "n", Metadata: map[string]string{"": "v"}}, "metadata"},
		{"metadata long name", KeyInput{Name: "n", Metadata: map[string]string{strings.Repeat("k", 65): "v"}}, "metadata"},
		{"metadata long value", KeyInput{Name: "n", Metadata: map[string]string{"k": strings.Repeat("v", 257)}}, "metadata"},
		{"metadata line break", KeyInput{Name: "n", Metadata: map[string]string{"k": "a\r\nb"}}, "metadata"},
		{"metadata holds a secret", KeyInput{Name: "n", Metadata: map[string]string{"k": pasted}}, "metadata"},
		{"scope is a secret", KeyInput{Name: "n", Scopes: []string{pasted}}, "scopes"},
		{"name holds a mistyped secret", KeyInput{Name: "mine: " + pasted[:20] + pasted[21:] + "x"}, "name"},
		{"metadata name is a secret", KeyInput{Name: "n", Metadata: map[string]string{pasted: ""}}, "metadata"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := tt.in.key(apikey.Format{}, &shipped, noon)
			bad, ok := errors.AsType[*apikey.InvalidError](err)
			if !ok || bad.Field != tt.field {
				t.Fatalf("got %v, want an invalid %s", err, tt.field)
			}
			if strings.Contains(err.Error(), pasted) {
				t.Error("the error repeats a secret")
			}
		})
	}
}

func make65scopes() []string {
	list := make([]string, 65)
	for i := range list {
		list[i] = fmt.Sprintf("s%d", i)
	}
	return list
}

func TestAllFaultsAreToldAtOnce(t *testing.T) {
	in := KeyInput{Name: "", Type: "user", Environment: "?", ExpiresIn: "soon"}
	_, err := in.key(apikey.Format{}, &shipped, noon)
	for _, field := range []string{"name", "userPrincipalName", "environment", "expiresIn"} {
		if err == nil || !strings.Contains(err.Error(), field+": ") {
			t.Errorf("got %v, want it to name %s too", err, field)
		}
	}
}

func TestPolicyInput(t *testing.T) {
	for _, tt := range []struct {
		name  string
		in    PolicyInput
		field string // of the fault; "" for none
	}{
		{"empty", PolicyInput{}, ""},
		{"total", PolicyInput{Total: LimitsInput{Rate: &RateInput{new(10), "1s"}, Burst: new(20)}}, ""},
		{"scopes", PolicyInput{AllowedScopes: []string{"a:*"}}, ""},
		{"alerts", PolicyInput{Alerts: AlertsInput{Refusals: RefusalAlertsInput{Window: "10m", PerKey: new(5)}, Expiring: ExpiringAlertsInput{Days: []int{30, 7}}}}, ""},
		{"alert threshold 0", PolicyInput{Alerts: AlertsInput{UnknownKeys: UnknownKeyAlertsInput{PerMinute: new(0)}}}, "policy.alerts.unknownKeys.perMinute"},
		{"alert window 0", PolicyInput{Alerts: AlertsInput{Refusals: RefusalAlertsInput{Window: "0s"}}}, "policy.alerts.refusals.window"},
		{"alert window of seconds", PolicyInput{Alerts: AlertsInput{Refusals: RefusalAlertsInput{Window: "90s"}}}, "policy.alerts.refusals.window"},
		{"alert stages empty", PolicyInput{Alerts: AlertsInput{Expiring: ExpiringAlertsInput{Days: []int{}}}}, "policy.alerts.expiring.days"},
		{"default 0", PolicyInput{Defaults: DefaultsInput{Agent: LimitsInput{Burst: new(0)}}}, "policy.defaults.agent.burst"},
		{"total concurrency", PolicyInput{Total: LimitsInput{MaxConcurrent: new(3)}}, "policy.total.maxConcurrent"},
		{"total rate without burst", PolicyInput{Total: LimitsInput{Rate: &RateInput{new(10), "1s"}}}, "policy.total.burst"},
		{"scope", PolicyInput{AllowedScopes: []string{"a:"}}, "policy.allowedScopes[0]"},
		{"all about life", PolicyInput{
			Caps: CapsInput{new(-1), new(5), new(7)}, Creation: CreationInput{new(-1), new(3)}, KeepRevoked: "30d",
			Expiration: ExpirationInput{"time", true, "30d", "90d", new(14)}, OnLeak: apikey.OnLeak{Agent: apikey.LeakRevokes},
		}, ""},
		{"a longest life below the shipped life", PolicyInput{Expiration: ExpirationInput{LongestLife: "30d"}}, ""},
		{"cap 0", PolicyInput{Caps: CapsInput{User: new(0)}}, "policy.caps.user"},
		{"cap -2", PolicyInput{Caps: CapsInput{Instance: new(-2)}}, "policy.caps.instance"},
		{"creation 0", PolicyInput{Creation: CreationInput{PerHour: new(0)}}, "policy.creation.perHour"},
		{"default expiration", PolicyInput{Expiration: ExpirationInput{Default: "never"}}, "policy.expiration.default"},
		{"life nonsense", PolicyInput{Expiration: ExpirationInput{Life: "long"}}, "policy.expiration.life"},
		{"life 0", PolicyInput{Expiration: ExpirationInput{Life: "0s"}}, "policy.expiration.life"},
		{"life too short", PolicyInput{Expiration: ExpirationInput{Life: "1m"}}, "policy.expiration.life"},
		{"life above the longest", PolicyInput{Expiration: ExpirationInput{Life: "31d", LongestLife: "30d"}}, "policy.expiration.life"},
		{"life above the shipped longest", PolicyInput{Expiration: ExpirationInput{Life: "366d"}}, "policy.expiration.life"},
		{"longest life of eleven years", PolicyInput{Expiration: ExpirationInput{LongestLife: "4015d"}}, "policy.expiration.longestLife"},
		{"inactivity -1", PolicyInput{Expiration: ExpirationInput{InactivityDays: new(-1)}}, "policy.expiration.inactivityDays"},
		{"inactivity of two years", PolicyInput{Expiration: ExpirationInput{InactivityDays: new(730)}}, "policy.expiration.inactivityDays"},
		{"leak action", PolicyInput{OnLeak: apikey.OnLeak{User: "ignore"}}, "policy.onLeak.user"},
		{"kept for an hour", PolicyInput{KeepRevoked: "1h"}, "policy.keepRevoked"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := tt.in.Policy()
			bad, _ := errors.AsType[*apikey.InvalidError](err)
			if (bad == nil) != (tt.field == "") || bad != nil && bad.Field != tt.field {
				t.Errorf("got %v, want a fault of %q", err, tt.field)
			}
		})
	}
}

// A prefix once read is read as itself again, and covers the address that it was written with.
func TestPrefixIsCanonical(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bytes := rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "address")
		if rapid.Bool().Draw(t, "mapped") {
			copy(bytes, []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff})
		}
		addr := netip.AddrFrom16([16]byte(bytes))
		written := netip.PrefixFrom(addr, rapid.IntRange(0, 128).Draw(t, "bits"))
		got, ok := parsePrefix(written.String())
		if !ok {
			if !addr.Is4In6() || written.Bits() >= 96 {
				t.Fatalf("%v was refused", written)
			}
			return
		}
		again, ok := parsePrefix(got.String())
		if !ok || again != got {
			t.Errorf("%v became %v, then %v", written, got, again)
		}
		if !got.Contains(addr.Unmap()) {
			t.Errorf("%v does not hold %v", got, addr)
		}
	})
}
