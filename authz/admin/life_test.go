package admin_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

const oneDay = 24 * time.Hour

// policy gives an instance a policy.
func (d *desk) policy(t *testing.T, id string, p apikey.Policy) {
	t.Helper()
	if _, err := d.PutInstance(t.Context(), root, id, p); err != nil {
		t.Fatal(err)
	}
}

// make makes a key of "a".
func (d *desk) make(t *testing.T, in admin.KeyInput) admin.CreatedKey {
	t.Helper()
	if in.Name == "" {
		in.Name = "n"
	}
	made, err := d.CreateKey(t.Context(), root, "a", in)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// patch changes a key of "a".
func (d *desk) patch(t *testing.T, id apikey.ID, p admin.KeyPatch) *apikey.Key {
	t.Helper()
	changed, err := d.UpdateKey(t.Context(), root, "a", id, p, 0)
	if err != nil {
		t.Fatal(err)
	}
	return changed.Key
}

// use notes a use of a key's first generation.
func (d *desk) use(t *testing.T, id apikey.ID, at time.Time) {
	t.Helper()
	if err := d.store.Touch(t.Context(), []apikey.Use{{KeyID: id, Generation: 1, At: at}}); err != nil {
		t.Fatal(err)
	}
}

func invalidField(err error) string {
	if bad, ok := errors.AsType[*apikey.InvalidError](err); ok {
		return bad.Field
	}
	if no, ok := errors.AsType[*admin.ForbiddenError](err); ok {
		return no.Field
	}
	return fmt.Sprint(err)
}

// TestLastPlaceIsTakenOnce: of a hundred at the last free place one gets it, whichever bound it is.
func TestLastPlaceIsTakenOnce(t *testing.T) {
	unbounded := apikey.Policy{
		Caps:     apikey.Caps{Instance: apikey.Unlimited, User: apikey.Unlimited, Agent: apikey.Unlimited},
		Creation: apikey.Creation{PerHour: apikey.Unlimited, PerHourAndUser: apikey.Unlimited},
	}
	ann := admin.Caller{Name: "oidc:ann", Role: admin.RoleUser, UserPrincipalName: "ann"}
	for _, c := range []struct {
		name   string
		set    func(p *apikey.Policy, n int)
		caller admin.Caller
		in     admin.KeyInput
		want   any
	}{
		{"instance", func(p *apikey.Policy, n int) { p.Caps.Instance = n }, root, admin.KeyInput{Name: "n"},
			&admin.QuotaExceededError{Cap: "instance", Limit: 5, Used: 5}},
		{"user", func(p *apikey.Policy, n int) { p.Caps.User = n }, root, admin.KeyInput{Name: "n", Type: "user", UserPrincipalName: "bob"},
			&admin.QuotaExceededError{Cap: "user", Limit: 5, Used: 5}},
		{"agent", func(p *apikey.Policy, n int) { p.Caps.Agent = n }, root, admin.KeyInput{Name: "n", Type: "agent", AgentName: "x"},
			&admin.QuotaExceededError{Cap: "agent", Limit: 5, Used: 5}},
		{"per hour", func(p *apikey.Policy, n int) { p.Creation.PerHour = n }, root, admin.KeyInput{Name: "n"}, &admin.RateError{}},
		{"per hour and user", func(p *apikey.Policy, n int) { p.Creation.PerHourAndUser = n }, ann, admin.KeyInput{Name: "n"}, &admin.RateError{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := open(t)
			p := unbounded
			c.set(&p, 5)
			d.policy(t, "a", p)
			for range 4 {
				if _, err := d.CreateKey(t.Context(), c.caller, "a", c.in); err != nil {
					t.Fatal(err)
				}
			}
			var made, refused atomic.Int64
			var all sync.WaitGroup
			for range 100 {
				all.Go(func() {
					_, err := d.CreateKey(t.Context(), c.caller, "a", c.in)
					for errors.Is(err, apikey.ErrUndecided) { // a machine that is too busy for a hundred at once
						_, err = d.CreateKey(t.Context(), c.caller, "a", c.in)
					}
					full, isFull := errors.AsType[*admin.QuotaExceededError](err)
					often, isOften := errors.AsType[*admin.RateError](err)
					switch {
					case err == nil:
						made.Add(1)
					case isFull && cmp.Equal(c.want, full):
						refused.Add(1)
					case isOften && often.Limit == 5 && often.RetryAfter > 59*time.Minute && often.RetryAfter <= time.Hour:
						refused.Add(1)
					default:
						t.Errorf("got %v", err)
					}
				})
			}
			all.Wait()
			if made.Load() != 1 || refused.Load() != 99 {
				t.Errorf("%d were made and %d refused, want 1 and 99", made.Load(), refused.Load())
			}
			keys, err := d.store.Keys(t.Context(), "a", admin.KeyQuery{Limit: 1000})
			if err != nil || len(keys) != 5 {
				t.Errorf("%d keys, error %v; want 5", len(keys), err)
			}
			// Whom it is not about, it does not bind.
			other := admin.KeyInput{Name: "n", Type: "user", UserPrincipalName: "carol"}
			if _, err := d.CreateKey(t.Context(), root, "a", other); (err == nil) != (c.name != "instance" && c.name != "per hour") {
				t.Errorf("somebody else's key: %v", err)
			}
		})
	}
}

// TestCreationRetryAfterIsTrue: a moment earlier is too early, then it passes.
func TestCreationRetryAfterIsTrue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.policy(t, "a", apikey.Policy{Creation: apikey.Creation{PerHour: 3}})
		create := func() error {
			_, err := d.CreateKey(t.Context(), root, "a", admin.KeyInput{Name: "n"})
			return err
		}
		var made []time.Time
		for range 10 {
			err := create()
			if often, ok := errors.AsType[*admin.RateError](err); ok {
				time.Sleep(often.RetryAfter - time.Microsecond)
				if _, early := errors.AsType[*admin.RateError](create()); !early {
					t.Error("it passed before the time that it was told")
				}
				time.Sleep(time.Microsecond)
				err = create()
			}
			if err != nil {
				t.Fatal(err)
			}
			made = append(made, time.Now())
			time.Sleep(7 * time.Minute)
		}
		for i := 3; i < len(made); i++ {
			if made[i].Sub(made[i-3]) < time.Hour {
				t.Errorf("4 keys within %v", made[i].Sub(made[i-3]))
			}
		}
		// Lowered to one: the wait is until fewer than one is left in the hour, not until the oldest is gone.
		d.policy(t, "a", apikey.Policy{Creation: apikey.Creation{PerHour: 1}})
		often, ok := errors.AsType[*admin.RateError](create())
		if want := time.Until(made[len(made)-1].Add(time.Hour)); !ok || often.RetryAfter != want.Round(time.Microsecond) {
			t.Errorf("got %v, want to wait %v", often, want)
		}
	})
}

// TestWhatCounts: revoked and expired keys leave their place, disabled ones do not; whoever comes back has
// to find room.
func TestWhatCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		full := apikey.Policy{Caps: apikey.Caps{Instance: 2}, Creation: apikey.Creation{PerHour: apikey.Unlimited}}
		d.policy(t, "a", full)
		quota := func(what string, err error) {
			t.Helper()
			if _, is := errors.AsType[*admin.QuotaExceededError](err); !is {
				t.Errorf("%s: got %v, want that the quota is exceeded", what, err)
			}
		}
		create := func() error {
			_, err := d.CreateKey(t.Context(), root, "a", admin.KeyInput{Name: "n"})
			return err
		}
		brief, other := d.make(t, admin.KeyInput{ExpiresIn: "1h"}), d.make(t, admin.KeyInput{})
		d.patch(t, other.Key.ID, admin.KeyPatch{Disabled: admin.To(true)})
		quota("disabled keys count", create())
		time.Sleep(time.Hour + time.Microsecond)
		if err := create(); err != nil { // at once, before anybody has marked anything
			t.Errorf("after one expired: %v", err)
		}
		quota("full again", create())
		_, err := d.UpdateKey(t.Context(), root, "a", brief.Key.ID, admin.KeyPatch{ExpiresIn: admin.To("1h")}, 0)
		quota("an expired key comes back", err)
		if k, err := d.store.Key(t.Context(), "a", brief.Key.ID); err != nil || k.StatusAt(time.Now()) != apikey.StatusExpired {
			t.Errorf("the refused change was made: %+v, %v", k, err)
		}
		if _, err := d.RevokeKey(t.Context(), root, "a", other.Key.ID, ""); err != nil {
			t.Fatal(err)
		}
		d.patch(t, brief.Key.ID, admin.KeyPatch{ExpiresIn: admin.To("1h")})
		quota("full with what came back", create())
		d.patch(t, brief.Key.ID, admin.KeyPatch{Disabled: admin.To(true)})
		full.Caps.Instance = 1
		d.policy(t, "a", full)
		_, err = d.UpdateKey(t.Context(), root, "a", brief.Key.ID, admin.KeyPatch{Disabled: admin.To(false)}, 0)
		quota("enabled though the cap was lowered", err)
		// What makes no key more usable goes on.
		d.patch(t, brief.Key.ID, admin.KeyPatch{Name: admin.To("renamed")})
	})
}

func TestPolicyRightsOnCreation(t *testing.T) {
	d := open(t)
	d.policy(t, "a", apikey.Policy{
		AllowedScopes: apikey.Scopes{"chat:*"},
		Expiration:    apikey.Expiration{Required: true, Life: apikey.Duration(10 * oneDay), LongestLife: apikey.Duration(30 * oneDay), InactivityDays: 7},
	})
	for _, c := range []struct {
		in    admin.KeyInput
		field string
	}{
		{admin.KeyInput{}, "expirationPolicy"},
		{admin.KeyInput{ExpirationPolicy: "none"}, "expirationPolicy"},
		{admin.KeyInput{ExpiresIn: "31d"}, "expiresIn"},
		{admin.KeyInput{ExpirationDate: time.Now().Add(31 * oneDay).Format(time.RFC3339)}, "expirationDate"},
		{admin.KeyInput{ExpiresIn: "1d", Scopes: []string{"files"}}, "scopes"},
	} {
		c.in.Name = "n"
		if _, err := d.CreateKey(t.Context(), root, "a", c.in); invalidField(err) != c.field {
			t.Errorf("%+v: got %v, want %s named", c.in, err, c.field)
		}
	}
	if k := d.make(t, admin.KeyInput{ExpirationPolicy: "time"}).Key; k.ExpirationDate.Sub(k.CreatedAt) != 10*oneDay {
		t.Errorf("time alone: until %v", k.ExpirationDate)
	}
	if k := d.make(t, admin.KeyInput{ExpirationPolicy: "inactivity"}).Key; k.InactivityDays != 7 || !k.ExpirationDate.IsZero() {
		t.Errorf("inactivity alone: %+v", k)
	}
	d.policy(t, "a", apikey.Policy{Expiration: apikey.Expiration{Default: apikey.ExpiresByTime}})
	if k := d.make(t, admin.KeyInput{}).Key; k.ExpirationDate.Sub(k.CreatedAt) != 120*oneDay {
		t.Errorf("the default: until %v", k.ExpirationDate)
	}
	if k := d.make(t, admin.KeyInput{InactivityDays: new(3)}).Key; !k.ExpirationDate.IsZero() {
		t.Errorf("what is said is no default: until %v", k.ExpirationDate)
	}
}

// TestUserCountsInAnyCase: nobody has more keys by being spelled in another way. What may be seen goes by the
// exact spelling: two spellings may be two people elsewhere.
func TestUserCountsInAnyCase(t *testing.T) {
	d := open(t)
	d.policy(t, "a", apikey.Policy{Caps: apikey.Caps{User: 2}})
	d.make(t, admin.KeyInput{Type: "user", UserPrincipalName: "ann@example.com"})
	other := d.make(t, admin.KeyInput{Type: "user", UserPrincipalName: "Ann@Example.com"})
	_, err := d.CreateKey(t.Context(), root, "a", admin.KeyInput{Name: "n", Type: "user", UserPrincipalName: "ANN@example.com"})
	if full, ok := errors.AsType[*admin.QuotaExceededError](err); !ok || full.Cap != "user" || full.Used != 2 {
		t.Errorf("a third: error %v", err)
	}
	ann := admin.Caller{Name: "oidc:ann", Role: admin.RoleUser, UserPrincipalName: "ann@example.com"}
	for _, owner := range []string{"ann@example.com", "aNN@example.com"} {
		got, err := d.KeyLimits(t.Context(), ann, "a", admin.KeyOwner{Type: apikey.TypeUser, Name: owner})
		if err != nil || got.Owner == nil || got.Owner.Used != 2 {
			t.Errorf("%s: got %+v and error %v", owner, got, err)
		}
	}
	if _, err := d.Key(t.Context(), ann, "a", other.Key.ID); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("the key of another spelling: error %v", err)
	}
}

func TestKeyLimits(t *testing.T) {
	d := open(t)
	d.policy(t, "a", apikey.Policy{Caps: apikey.Caps{Instance: 3, Agent: apikey.Unlimited}, Creation: apikey.Creation{PerHour: 5}})
	d.make(t, admin.KeyInput{})
	d.make(t, admin.KeyInput{Type: "agent", AgentName: "x"})
	revoked := d.make(t, admin.KeyInput{Type: "user", UserPrincipalName: "ann"})
	if _, err := d.RevokeKey(t.Context(), root, "a", revoked.Key.ID, ""); err != nil {
		t.Fatal(err)
	}
	got, err := d.KeyLimits(t.Context(), root, "a", admin.KeyOwner{Type: apikey.TypeAgent, Name: "x"})
	want := admin.KeyLimits{
		Instance: admin.Room{Limit: 3, Used: 2, Left: new(1)}, Owner: &admin.Room{Limit: -1, Used: 1},
		PerUser: 10, PerAgent: -1, Creation: admin.Room{Limit: 5, Used: 3, Left: new(2)},
	}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("error %v (-want +got)\n%s", err, diff)
	}
	ann := admin.Caller{Name: "oidc:ann", Role: admin.RoleUser, UserPrincipalName: "ann"}
	got, err = d.KeyLimits(t.Context(), ann, "a", admin.KeyOwner{})
	if err != nil || !cmp.Equal(got.Owner, &admin.Room{Limit: 10, Left: new(10)}) || !cmp.Equal(got.Creator, &admin.Room{Limit: 20, Left: new(20)}) {
		t.Errorf("of a user: got %+v and error %v", got, err)
	}
	if _, err := d.KeyLimits(t.Context(), ann, "a", admin.KeyOwner{Type: apikey.TypeAgent, Name: "x"}); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("of somebody else: %v", err)
	}
	counts, err := d.CountKeys(t.Context(), root, "a")
	if want := (admin.KeyCounts{Total: 3, Usable: 2, Revoked: 1}); err != nil || counts != want {
		t.Errorf("got %+v and error %v, want %+v", counts, err, want)
	}
}

func TestUpdateKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.policy(t, "a", apikey.Policy{Caps: apikey.Caps{Agent: apikey.Unlimited}, Creation: apikey.Creation{PerHour: apikey.Unlimited}})
		decode := func(text string) (p admin.KeyPatch) {
			if err := json.Unmarshal([]byte(text), &p); err != nil {
				t.Fatal(err)
			}
			return p
		}
		full := admin.KeyInput{
			Name: "n", Description: "d", Type: "agent", AgentName: "x", Scopes: []string{"a", "b"}, Environment: "prod",
			AllowedIPs: []string{"10.0.0.0/8"}, ExpiresIn: "10d", InactivityDays: new(5), Metadata: map[string]string{"k": "v", "team": "blue"},
			Limits: admin.LimitsInput{Rate: &admin.RateInput{Requests: new(60), Per: "1m"}, Burst: new(5), MaxConcurrent: new(3)},
		}
		minute := apikey.Duration(time.Minute)
		for _, c := range []struct {
			patch string
			want  func(k *apikey.Key) // changes what was to what is
			field string              // of the refusal
		}{
			{`{}`, func(*apikey.Key) {}, ""},
			{`{"name":"new","description":null}`, func(k *apikey.Key) { k.Name, k.Description = "new", "" }, ""},
			{`{"scopes":["c","a"]}`, func(k *apikey.Key) { k.Scopes = apikey.Scopes{"a", "c"} }, ""},
			{`{"scopes":[]}`, func(k *apikey.Key) { k.Scopes = apikey.Scopes{} }, ""},
			{`{"scopes":null}`, func(k *apikey.Key) { k.Scopes = nil }, ""},
			{`{"allowedIps":null}`, func(k *apikey.Key) { k.AllowedIPs = nil }, ""},
			{`{"limits":{"burst":null}}`, func(k *apikey.Key) { k.Limits.Burst = 0 }, ""},
			{`{"limits":{"rate":{"requests":30}}}`, func(k *apikey.Key) { k.Limits.Rate = apikey.Rate{Requests: 30, Per: minute} }, ""},
			{`{"limits":{"rate":null,"maxConcurrent":-1}}`, func(k *apikey.Key) { k.Limits.Rate, k.Limits.MaxConcurrent = apikey.Rate{}, -1 }, ""},
			{`{"limits":null}`, func(k *apikey.Key) { k.Limits = apikey.Limits{} }, ""},
			{`{"metadata":{"k":null,"new":"x"}}`, func(k *apikey.Key) { k.Metadata = map[string]string{"team": "blue", "new": "x"} }, ""},
			{`{"metadata":null}`, func(k *apikey.Key) { k.Metadata = nil }, ""},
			{`{"disabled":true}`, func(k *apikey.Key) { k.Disabled = true }, ""},
			{`{"expiresIn":"1d"}`, func(k *apikey.Key) { k.ExpirationDate = k.CreatedAt.Add(oneDay) }, ""},
			{`{"expirationDate":null}`, func(k *apikey.Key) { k.ExpirationDate = time.Time{} }, ""},
			{`{"expiresIn":null}`, func(*apikey.Key) {}, ""}, // it takes away what is not there
			{`{"inactivityDays":null}`, func(k *apikey.Key) { k.InactivityDays = 0 }, ""},
			{`{"inactivityDays":7}`, func(k *apikey.Key) { k.InactivityDays = 7 }, ""},
			{`{"expirationPolicy":"none"}`, func(k *apikey.Key) { k.ExpirationDate, k.InactivityDays = time.Time{}, 0 }, ""},
			{`{"expirationPolicy":"time"}`, func(k *apikey.Key) { k.InactivityDays = 0 }, ""},
			{`{"expirationPolicy":"inactivity"}`, func(*apikey.Key) {}, ""},
			{`{"expirationPolicy":"inactivity","expirationDate":null}`, func(k *apikey.Key) { k.ExpirationDate = time.Time{} }, ""},
			{`{"type":"agent","agentName":"x","environment":"prod","userPrincipalName":null}`, func(*apikey.Key) {}, ""},

			{`{"type":"user"}`, nil, "type"},
			{`{"agentName":"y"}`, nil, "agentName"},
			{`{"environment":null}`, nil, "environment"},
			{`{"userPrincipalName":"ann"}`, nil, "userPrincipalName"},
			{`{"notBefore":"2030-01-01"}`, nil, "notBefore"},
			{`{"name":null}`, nil, "name"},
			{`{"name":" "}`, nil, "name"},
			{`{"disabled":null}`, nil, "disabled"},
			{`{"scopes":["a b"]}`, nil, "scopes[0]"},
			{`{"allowedIps":[]}`, nil, "allowedIps"},
			{`{"limits":{"burst":0}}`, nil, "limits.burst"},
			{`{"limits":{"rate":{"per":null}}}`, nil, "limits.rate.per"},
			{`{"limits":{"rate":{"requests":null}}}`, nil, "limits.rate.requests"},
			{`{"metadata":{"k":"a\nb"}}`, nil, "metadata"},
			{`{"expirationDate":"1999-12-31"}`, nil, "expirationDate"},
			{`{"expiresIn":"366d"}`, nil, "expiresIn"},
			{`{"expiresIn":"1d","expirationDate":"2030-01-01"}`, nil, "expiresIn"},
			{`{"expirationPolicy":null}`, nil, "expirationPolicy"},
			{`{"expirationPolicy":"never"}`, nil, "expirationPolicy"},
			{`{"expirationPolicy":""}`, nil, "expirationPolicy"},
			{`{"expirationDate":""}`, nil, "expirationDate"},
			{`{"expiresIn":""}`, nil, "expiresIn"},
			{`{"expirationPolicy":"none","inactivityDays":3}`, nil, "expirationPolicy"},
			{`{"expirationPolicy":"time","inactivityDays":3}`, nil, "inactivityDays"},
			{`{"inactivityDays":0}`, nil, "inactivityDays"},
		} {
			made := d.make(t, full)
			before := d.actions(t)
			got, err := d.UpdateKey(t.Context(), root, "a", made.Key.ID, decode(c.patch), 0)
			if c.want == nil {
				if invalidField(err) != c.field {
					t.Errorf("%s: got %v, want %s named", c.patch, err, c.field)
				}
				if after := d.actions(t); len(after) != len(before) {
					t.Errorf("%s was refused, and written down as done", c.patch)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", c.patch, err)
				continue
			}
			want := *made.Key
			c.want(&want)
			stored, err := d.Key(t.Context(), root, "a", made.Key.ID)
			if err != nil {
				t.Fatal(err)
			}
			want.Revision = stored.Revision
			for what, k := range map[string]*apikey.Key{"answer": got.Key, "store": stored} {
				if diff := cmp.Diff(&want, k, prefixes); diff != "" {
					t.Errorf("%s: %s (-want +got)\n%s", c.patch, what, diff)
				}
			}
			want.Revision = made.Key.Revision
			nothing := cmp.Equal(&want, made.Key, prefixes)
			if events := len(d.actions(t)) - len(before); nothing != (events == 0) || nothing != (stored.Revision == made.Key.Revision) {
				t.Errorf("%s: %d events, revision %d after %d", c.patch, events, stored.Revision, made.Key.Revision)
			}
		}
	})
}

// TestDisableWhateverTheWords: a word that would not be accepted any more, because a foreign shape was registered
// since, keeps nobody from disabling its key.
func TestDisableWhateverTheWords(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	k := d.make(t, admin.KeyInput{Description: "was " + foreign("")}).Key
	d.knows(apikey.Peppers{Current: d.pepper})
	if k = d.patch(t, k.ID, admin.KeyPatch{Disabled: admin.To(true)}); !k.Disabled {
		t.Error("it goes on")
	}
	_, err := d.UpdateKey(t.Context(), root, "a", k.ID, admin.KeyPatch{Name: admin.To("new")}, 0)
	if field := invalidField(err); field != "description" {
		t.Errorf("got error %v", err)
	}
}

// Of twenty that change what all of them saw, one wins, and the others are told.
func TestOneOfManyChangesWins(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	made := d.make(t, admin.KeyInput{})
	var won, lost atomic.Int64
	var all sync.WaitGroup
	for n := range 20 {
		all.Go(func() {
			_, err := d.UpdateKey(t.Context(), root, "a", made.Key.ID, admin.KeyPatch{Name: admin.To(fmt.Sprint("by ", n))}, made.Key.Revision)
			switch {
			case err == nil:
				won.Add(1)
			case errors.Is(err, admin.ErrPrecondition):
				lost.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	all.Wait()
	if won.Load() != 1 || lost.Load() != 19 {
		t.Errorf("%d won, %d lost", won.Load(), lost.Load())
	}
	_, err := d.RotateKey(t.Context(), root, "a", made.Key.ID, admin.RotateInput{}, made.Key.Revision)
	if !errors.Is(err, admin.ErrPrecondition) {
		t.Errorf("a rotation of what was seen before: %v", err)
	}
	// A use is no change.
	k, err := d.Key(t.Context(), root, "a", made.Key.ID)
	if err != nil {
		t.Fatal(err)
	}
	d.use(t, k.ID, time.Now())
	if _, err := d.UpdateKey(t.Context(), root, "a", k.ID, admin.KeyPatch{Name: admin.To("after a use")}, k.Revision); err != nil {
		t.Errorf("after a use: %v", err)
	}
}

// What takes something away waits for the replicas as a revocation does; a new name does not.
func TestNarrowingWaitsForReplicas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		made, other := d.make(t, admin.KeyInput{ExpiresIn: "10d"}), d.make(t, admin.KeyInput{})
		if err := d.store.Register(t.Context(), "behind", 2, time.Hour); err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]struct {
			do   func() (admin.Propagation, error)
			want time.Duration
		}{
			"scopes": {func() (admin.Propagation, error) {
				c, err := d.UpdateKey(t.Context(), root, "a", made.Key.ID, admin.KeyPatch{Scopes: admin.To([]string{"a"})}, 0)
				return c.Propagation, err
			}, 5 * time.Second},
			"life": {func() (admin.Propagation, error) {
				c, err := d.UpdateKey(t.Context(), root, "a", made.Key.ID, admin.KeyPatch{ExpiresIn: admin.To("1d")}, 0)
				return c.Propagation, err
			}, 5 * time.Second},
			"name": {func() (admin.Propagation, error) {
				c, err := d.UpdateKey(t.Context(), root, "a", made.Key.ID, admin.KeyPatch{Name: admin.To("other")}, 0)
				return c.Propagation, err
			}, time.Second},
			"rotation": {func() (admin.Propagation, error) {
				c, err := d.RotateKey(t.Context(), root, "a", made.Key.ID, admin.RotateInput{ExpiresIn: "1d"}, 0)
				return c.Propagation, err
			}, time.Second},
			"a short grace": {func() (admin.Propagation, error) {
				c, err := d.RotateKey(t.Context(), root, "a", other.Key.ID, admin.RotateInput{GracePeriod: "10s"}, 0)
				return c.Propagation, err
			}, 5 * time.Second},
			"kill switch": {func() (admin.Propagation, error) {
				c, err := d.SwitchInstance(t.Context(), root, "a", true)
				return c.Propagation, err
			}, 5 * time.Second},
		} {
			begin := time.Now()
			p, err := c.do()
			if took := time.Since(begin); err != nil || p.Everywhere || took < c.want || took > c.want+time.Second {
				t.Errorf("%s: waited %v, want %v; %+v, error %v", name, took, c.want, p, err)
			}
		}
	})
}

func TestRevokedKeysCannotBeChanged(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	made := d.make(t, admin.KeyInput{})
	if _, err := d.RevokeKey(t.Context(), root, "a", made.Key.ID, ""); err != nil {
		t.Fatal(err)
	}
	_, update := d.UpdateKey(t.Context(), root, "a", made.Key.ID, admin.KeyPatch{Disabled: admin.To(false), Name: admin.To("back")}, 0)
	_, rotate := d.RotateKey(t.Context(), root, "a", made.Key.ID, admin.RotateInput{}, 0)
	for _, err := range []error{update, rotate} {
		if _, ok := errors.AsType[*admin.StateError](err); !ok {
			t.Errorf("got %v", err)
		}
	}
}

func TestDisableAndEnable(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	made := d.make(t, admin.KeyInput{})
	for range 2 {
		d.patch(t, made.Key.ID, admin.KeyPatch{Disabled: admin.To(true)})
	}
	d.patch(t, made.Key.ID, admin.KeyPatch{Disabled: admin.To(false), Name: admin.To("back")})
	if got, want := d.actions(t)[2:], []string{"key.disable", "key.enable"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// prefixes compares what go-cmp cannot look into.
var prefixes = cmpopts.EquateComparable(netip.Prefix{})

func TestRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.policy(t, "a", apikey.Policy{Creation: apikey.Creation{PerHour: apikey.Unlimited}, Expiration: apikey.Expiration{LongestLife: apikey.Duration(100 * oneDay)}})
		for _, c := range []struct {
			name       string
			make       admin.KeyInput
			wait       time.Duration // before the rotation
			rotate     admin.RotateInput
			old, until time.Duration // from the rotation; 0: none
		}{
			{"as shipped", admin.KeyInput{}, time.Hour, admin.RotateInput{}, oneDay, 0},
			{"thirty days", admin.KeyInput{}, 0, admin.RotateInput{GracePeriod: "30d"}, 30 * oneDay, 0},
			{"as long again", admin.KeyInput{ExpiresIn: "60d"}, 50 * oneDay, admin.RotateInput{}, oneDay, 60 * oneDay},
			{"not beyond the end it had", admin.KeyInput{ExpiresIn: "60d"}, 60*oneDay - time.Hour, admin.RotateInput{}, time.Hour, 60 * oneDay},
			{"a date of its own", admin.KeyInput{ExpiresIn: "60d"}, oneDay, admin.RotateInput{ExpiresIn: "12h"}, 12 * time.Hour, 12 * time.Hour},
			{"a first date", admin.KeyInput{}, 0, admin.RotateInput{ExpiresIn: "5d"}, oneDay, 5 * oneDay},
			{"idle keys live on", admin.KeyInput{InactivityDays: new(5)}, 4 * oneDay, admin.RotateInput{GracePeriod: "1h"}, time.Hour, 0},
		} {
			made := d.make(t, c.make)
			time.Sleep(c.wait)
			got, err := d.RotateKey(t.Context(), root, "a", made.Key.ID, c.rotate, made.Key.Revision)
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
				continue
			}
			at := got.Key.Generations[1].CreatedAt
			want := *made.Key
			want.Revision = got.Key.Revision
			if c.until != 0 {
				want.ExpirationDate = at.Add(c.until)
			}
			want.Generations = []apikey.Generation{made.Key.Generations[0], {Number: 2, Hint: got.Key.Generations[1].Hint, CreatedAt: at}}
			want.Generations[0].ValidUntil = at.Add(c.old)
			stored, err := d.store.Key(t.Context(), "a", made.Key.ID)
			if err != nil {
				t.Fatal(err)
			}
			for what, k := range map[string]*apikey.Key{"answer": got.Key, "store": stored} {
				if diff := cmp.Diff(&want, k, prefixes); diff != "" {
					t.Errorf("%s: %s (-want +got)\n%s", c.name, what, diff)
				}
			}
			// Each secret finds its own generation; what a decision asks is whether that is over.
			for n, secret := range []apikey.Secret{made.Secret, got.Secret} {
				k, _, err := d.store.FindKey(t.Context(), d.pepper.Digest(secret.Reveal()))
				if err != nil || k.Generation != n+1 || k.GenerationEnded(at) {
					t.Errorf("%s: secret %d finds %+v, error %v", c.name, n+1, k, err)
					continue
				}
				if ended := k.GenerationEnded(at.Add(c.old)); ended {
					t.Errorf("%s: secret %d is over at the end of the grace period", c.name, n+1)
				}
				if ended := k.GenerationEnded(at.Add(c.old + time.Microsecond)); ended != (n == 0) {
					t.Errorf("%s: secret %d after the grace period: ended %t", c.name, n+1, ended)
				}
				since, until, deprecated := k.Deprecated()
				if deprecated != (n == 0) || deprecated && (!since.Equal(at) || !until.Equal(at.Add(c.old))) {
					t.Errorf("%s: secret %d is deprecated %t, since %v, until %v", c.name, n+1, deprecated, since, until)
				}
			}
		}
	})
}

func TestRotateRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		for field, in := range map[string]admin.RotateInput{
			"gracePeriod":    {GracePeriod: "31d"},
			"expiresIn":      {ExpiresIn: "366d"},
			"expirationDate": {ExpirationDate: "1999-12-31"},
		} {
			if _, err := d.RotateKey(t.Context(), root, "a", d.make(t, admin.KeyInput{}).Key.ID, in, 0); invalidField(err) != field {
				t.Errorf("got %v, want %s named", err, field)
			}
		}
		if _, err := d.RotateKey(t.Context(), root, "a", d.make(t, admin.KeyInput{}).Key.ID, admin.RotateInput{GracePeriod: "-1h"}, 0); invalidField(err) != "gracePeriod" {
			t.Errorf("got %v", err)
		}
		disabled, brief, idle := d.make(t, admin.KeyInput{}), d.make(t, admin.KeyInput{ExpiresIn: "1h"}), d.make(t, admin.KeyInput{InactivityDays: new(1)})
		d.patch(t, disabled.Key.ID, admin.KeyPatch{Disabled: admin.To(true)})
		time.Sleep(oneDay + time.Microsecond)
		for name, made := range map[string]admin.CreatedKey{"disabled": disabled, "expired": brief, "idle": idle} {
			_, err := d.RotateKey(t.Context(), root, "a", made.Key.ID, admin.RotateInput{}, 0)
			if state, ok := errors.AsType[*admin.StateError](err); !ok || !strings.Contains(state.Reason, "only an active key") {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := d.RotateKey(t.Context(), root, "a", apikey.ID{1}, admin.RotateInput{}, 0); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("no key: %v", err)
		}
		// The policy that came later counts now.
		endless := d.make(t, admin.KeyInput{})
		d.policy(t, "a", apikey.Policy{Expiration: apikey.Expiration{Required: true}})
		if _, err := d.RotateKey(t.Context(), root, "a", endless.Key.ID, admin.RotateInput{}, 0); invalidField(err) != "expirationPolicy" {
			t.Errorf("got %v", err)
		}
	})
}

// TestRotationsAreNotEndless: each leaves a secret in the store for as long as the key is there, so they are as
// many in an hour as new keys may be.
func TestRotationsAreNotEndless(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.policy(t, "a", apikey.Policy{Creation: apikey.Creation{PerHour: 14, PerHourAndUser: 12}})
		ann := admin.Caller{Name: "oidc:ann", Role: admin.RoleUser, UserPrincipalName: "ann"}
		k := d.make(t, admin.KeyInput{Type: "user", UserPrincipalName: "ann"}).Key
		rotate := func(caller admin.Caller) error {
			time.Sleep(time.Minute)
			_, err := d.RotateKey(t.Context(), caller, "a", k.ID, admin.RotateInput{GracePeriod: "0s"}, 0)
			return err
		}
		for range 11 {
			if err := rotate(ann); err != nil {
				t.Fatal(err)
			}
		}
		before := len(d.actions(t))
		err := rotate(ann)
		often, ok := errors.AsType[*admin.RateError](err)
		if !ok || often.Limit != 12 || often.RetryAfter != 48*time.Minute { // the first came 12 minutes ago
			t.Fatalf("a thirteenth secret within the hour: %v", err)
		}
		if n := len(d.actions(t)); n != before {
			t.Errorf("%d events for what was refused", n-before)
		}
		if err := rotate(root); err != nil {
			t.Errorf("an operator has another rate: %v", err)
		}
		time.Sleep(often.RetryAfter)
		if err := rotate(ann); err != nil {
			t.Errorf("after the wait that was named: %v", err)
		}
		// Where new keys are to be rare, a secret can still be replaced.
		time.Sleep(time.Hour)
		d.policy(t, "a", apikey.Policy{Creation: apikey.Creation{PerHour: 1}})
		for n := range 11 {
			if err := rotate(root); (err == nil) != (n < 10) {
				t.Errorf("rotation %d: %v", n+1, err)
			}
		}
	})
}

// TestAtMostTwoSecrets: whatever is rotated and ended, no more than two secrets of a key are valid.
func TestAtMostTwoSecrets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := open(t)
		d.instance(t, "a")
		id := d.make(t, admin.KeyInput{}).Key.ID
		valid := func() (numbers []int) {
			k, err := d.store.Key(t.Context(), "a", id)
			if err != nil {
				t.Fatal(err)
			}
			for _, g := range k.Generations {
				if !g.EndedAt(time.Now()) {
					numbers = append(numbers, g.Number)
				}
			}
			return numbers
		}
		rotate := func(in admin.RotateInput) error {
			_, err := d.RotateKey(t.Context(), root, "a", id, in, 0)
			time.Sleep(time.Millisecond)
			return err
		}
		want := func(what string, numbers ...int) {
			t.Helper()
			if got := valid(); !slices.Equal(got, numbers) {
				t.Errorf("%s: %v are valid, want %v", what, got, numbers)
			}
		}
		if err := rotate(admin.RotateInput{}); err != nil {
			t.Fatal(err)
		}
		want("rotated", 1, 2)
		if _, refused := errors.AsType[*admin.StateError](rotate(admin.RotateInput{})); !refused {
			t.Error("a third secret was made")
		}
		want("refused", 1, 2)
		if err := rotate(admin.RotateInput{EndOldest: true}); err != nil {
			t.Fatal(err)
		}
		want("oldest ended", 2, 3)
		time.Sleep(oneDay)
		want("grace over", 3)
		if err := rotate(admin.RotateInput{GracePeriod: "0s"}); err != nil {
			t.Fatal(err)
		}
		want("no grace", 4)
		if _, err := d.RevokeGeneration(t.Context(), root, "a", id, 4); err == nil {
			t.Error("the only secret was ended")
		}
		if err := rotate(admin.RotateInput{}); err != nil {
			t.Fatal(err)
		}
		for range 2 { // repeatable
			if c, err := d.RevokeGeneration(t.Context(), root, "a", id, 4); err != nil || !c.Propagation.Everywhere {
				t.Fatal(c, err)
			}
		}
		want("one revoked", 5)
		if _, err := d.RevokeGeneration(t.Context(), root, "a", id, 9); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("no such generation: %v", err)
		}
		// The clock of a replica that is behind does not bring back what was ended at once.
		k, err := d.store.Key(t.Context(), "a", id)
		if err != nil || !k.Generations[3].EndedAt(time.Now().Add(-365*oneDay)) {
			t.Errorf("got %+v and error %v", k.Generations, err)
		}
		if got := d.actions(t); got[len(got)-1] != "key.revokeGeneration" || len(got) != 7 {
			t.Errorf("audit: %v", got)
		}
	})
}

// Fifty rotations at once, each of which ends the oldest: never more than two valid, and every answer's
// secret is one of the key's.
func TestRotationsAtOnce(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	id := d.make(t, admin.KeyInput{}).Key.ID
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			got, err := d.RotateKey(t.Context(), root, "a", id, admin.RotateInput{EndOldest: true}, 0)
			if err != nil {
				t.Error(err)
				return
			}
			k, _, err := d.store.FindKey(t.Context(), d.pepper.Digest(got.Secret.Reveal()))
			if err != nil || k.ID != id || k.Generation != got.Key.Newest().Number {
				t.Errorf("found %+v, error %v", k, err)
			}
		})
	}
	all.Wait()
	k, err := d.store.Key(t.Context(), "a", id)
	if err != nil {
		t.Fatal(err)
	}
	valid := 0
	for _, g := range k.Generations {
		if !g.EndedAt(time.Now()) {
			valid++
		}
	}
	if len(k.Generations) != 51 || valid != 2 {
		t.Errorf("%d generations, %d valid; want 51 and 2", len(k.Generations), valid)
	}
}

func TestRoleUserHasItsOwnKeys(t *testing.T) {
	d := open(t)
	d.instance(t, "a")
	ctx := t.Context()
	ann := admin.Caller{Name: "oidc:ann", Role: admin.RoleUser, UserPrincipalName: "ann"}
	others := []admin.CreatedKey{
		d.make(t, admin.KeyInput{}), d.make(t, admin.KeyInput{Type: "user", UserPrincipalName: "bob"}), d.make(t, admin.KeyInput{Type: "agent", AgentName: "ann"}),
	}
	own, err := d.CreateKey(ctx, ann, "a", admin.KeyInput{Name: "mine"})
	if err != nil || own.Key.Type != apikey.TypeUser || own.Key.UserPrincipalName != "ann" || own.Key.CreatedBy != "oidc:ann" {
		t.Fatalf("got %+v and error %v", own.Key, err)
	}
	for field, in := range map[string]admin.KeyInput{
		"type":              {Name: "n", Type: "instance"},
		"userPrincipalName": {Name: "n", UserPrincipalName: "bob"},
		"limits":            {Name: "n", Limits: admin.LimitsInput{Burst: new(1)}}, // a lower one too
	} {
		_, err := d.CreateKey(ctx, ann, "a", in)
		if no, forbidden := errors.AsType[*admin.ForbiddenError](err); !forbidden || no.Field != field {
			t.Errorf("got %v, want %s forbidden", err, field)
		}
	}
	if _, err := d.CreateKey(ctx, ann, "a", admin.KeyInput{Name: "another"}); err != nil {
		t.Fatal(err)
	}
	// Nor by a change, nor can it take back what an operator set; and it can change what else there is.
	limited := d.patch(t, own.Key.ID, admin.KeyPatch{Limits: admin.To(admin.LimitsPatch{Burst: admin.To(2)})})
	for _, burst := range []int{-1, 1, 0} {
		patch := admin.KeyPatch{Limits: admin.To(admin.LimitsPatch{Burst: admin.To(burst)})}
		if burst == 0 {
			patch.Limits.Value = admin.LimitsPatch{Burst: admin.Member[int]{Present: true, Null: true}}
		}
		if _, err = d.UpdateKey(ctx, ann, "a", own.Key.ID, patch, 0); invalidField(err) != "limits" {
			t.Errorf("burst %d by a change: %v", burst, err)
		}
	}
	renamed, err := d.UpdateKey(ctx, ann, "a", own.Key.ID, admin.KeyPatch{Name: admin.To("renamed")}, 0)
	if err != nil || renamed.Key.Limits != limited.Limits {
		t.Errorf("another name: got %+v and error %v", renamed.Key, err)
	}
	d.patch(t, own.Key.ID, admin.KeyPatch{Disabled: admin.To(true)})
	if _, err = d.UpdateKey(ctx, ann, "a", own.Key.ID, admin.KeyPatch{Disabled: admin.To(false)}, 0); invalidField(err) != "disabled" {
		t.Errorf("a key that an operator disabled: %v", err)
	}
	list, err := d.Keys(ctx, ann, "a", admin.KeyQuery{Limit: 10})
	if err != nil || len(list) != 2 {
		t.Errorf("sees %d keys, error %v; want its 2", len(list), err)
	}
	if list, err := d.Keys(ctx, ann, "a", admin.KeyQuery{KeyFilter: admin.KeyFilter{UserPrincipalName: "bob"}, Limit: 10}); err != nil || len(list) != 0 {
		t.Errorf("sees another's: %v, %v", list, err)
	}
	for _, other := range others {
		id := other.Key.ID
		_, get := d.Key(ctx, ann, "a", id)
		_, update := d.UpdateKey(ctx, ann, "a", id, admin.KeyPatch{Disabled: admin.To(true)}, 0)
		_, rotate := d.RotateKey(ctx, ann, "a", id, admin.RotateInput{}, 0)
		_, revoke := d.RevokeKey(ctx, ann, "a", id, "")
		_, one := d.RevokeGeneration(ctx, ann, "a", id, 1)
		for i, err := range []error{get, update, rotate, revoke, one} {
			if !errors.Is(err, apikey.ErrNotFound) {
				t.Errorf("operation %d on a %s key: %v, want not found", i, other.Key.Type, err)
			}
		}
	}
	bulk, err := d.RevokeKeys(ctx, ann, "a", admin.BulkRevocation{All: true})
	if err != nil || bulk.Revoked != 2 {
		t.Errorf("all of its own: got %+v and error %v", bulk, err)
	}
	for _, other := range others {
		if k, err := d.Key(ctx, root, "a", other.Key.ID); err != nil || !k.RevokedAt.IsZero() {
			t.Errorf("it reached another's key: %+v, %v", k, err)
		}
	}
	nobody := admin.Caller{Name: "oidc:x", Role: admin.RoleUser}
	if _, err := d.CreateKey(ctx, nobody, "a", admin.KeyInput{Name: "n"}); err == nil {
		t.Error("a user without a name of its own made a key")
	}
	if list, err := d.Keys(ctx, nobody, "a", admin.KeyQuery{Limit: 10}); err == nil || len(list) != 0 {
		t.Errorf("a user without a name of its own sees %d keys, error %v", len(list), err)
	}
	if _, err := d.PutInstance(ctx, ann, "a", apikey.Policy{}); err == nil {
		t.Error("a user changed the policy")
	}
}

func TestKeyListInput(t *testing.T) {
	noon := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		in    admin.KeyListInput
		want  admin.KeyQuery
		field string
	}{
		{admin.KeyListInput{}, admin.KeyQuery{}, ""},
		{admin.KeyListInput{OrderBy: "createdAt desc"}, admin.KeyQuery{}, ""},
		{admin.KeyListInput{UnusedFor: "90d", Status: "active"},
			admin.KeyQuery{KeyFilter: admin.KeyFilter{UnusedSince: noon.Add(-90 * oneDay), Status: "active"}, Order: admin.OrderLastUsed}, ""},
		{admin.KeyListInput{ExpiresBefore: "30d"}, admin.KeyQuery{KeyFilter: admin.KeyFilter{ExpiresBefore: noon.Add(30 * oneDay)}, Order: admin.OrderExpiration}, ""},
		{admin.KeyListInput{ExpiresBefore: "2026-06-30"}, admin.KeyQuery{
			KeyFilter: admin.KeyFilter{ExpiresBefore: time.Date(2026, 6, 30, 23, 59, 59, 999999000, time.UTC)}, Order: admin.OrderExpiration}, ""},
		{admin.KeyListInput{IdleBefore: "7d", ExpiresBefore: "7d"}, admin.KeyQuery{
			KeyFilter: admin.KeyFilter{IdleBefore: noon.Add(7 * oneDay), ExpiresBefore: noon.Add(7 * oneDay)}, Order: admin.OrderIdle}, ""},
		{admin.KeyListInput{NamePrefix: "a", OrderBy: "lastUsedAt desc"}, admin.KeyQuery{KeyFilter: admin.KeyFilter{NamePrefix: "a"}, Order: admin.OrderLastUsedDesc}, ""},
		{admin.KeyListInput{Type: "service"}, admin.KeyQuery{}, "type"},
		{admin.KeyListInput{Status: "idle"}, admin.KeyQuery{}, "status"},
		{admin.KeyListInput{UnusedFor: "long"}, admin.KeyQuery{}, "unusedFor"},
		{admin.KeyListInput{UnusedFor: "-1d"}, admin.KeyQuery{}, "unusedFor"},
		{admin.KeyListInput{ExpiresBefore: "soon"}, admin.KeyQuery{}, "expiresBefore"},
		{admin.KeyListInput{IdleBefore: "soon"}, admin.KeyQuery{}, "idleBefore"},
		{admin.KeyListInput{OrderBy: "hint"}, admin.KeyQuery{}, "orderby"},
	} {
		got, err := c.in.Query(noon)
		if c.field != "" {
			if invalidField(err) != c.field {
				t.Errorf("%+v: got %v, want %s named", c.in, err, c.field)
			}
			continue
		}
		c.want.Now = noon
		if diff := cmp.Diff(c.want, got); err != nil || diff != "" {
			t.Errorf("%+v: error %v (-want +got)\n%s", c.in, err, diff)
		}
	}
}

func TestSwitchInstance(t *testing.T) {
	d := open(t)
	d.policy(t, "a", apikey.Policy{AllowedScopes: apikey.Scopes{"x"}})
	for range 2 {
		put, err := d.SwitchInstance(t.Context(), root, "a", true)
		if err != nil || !put.Instance.Policy.Disabled || !put.Propagation.Everywhere {
			t.Fatalf("got %+v and error %v", put, err)
		}
	}
	put, err := d.SwitchInstance(t.Context(), root, "a", false)
	if err != nil || put.Instance.Policy.Disabled || !slices.Equal(put.Instance.Policy.AllowedScopes, apikey.Scopes{"x"}) {
		t.Errorf("got %+v and error %v", put.Instance, err)
	}
	if got := d.actions(t); len(got) != 3 {
		t.Errorf("audit: %v, want the two switches that switched", got)
	}
	if _, err := d.SwitchInstance(t.Context(), root, "nobody", true); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

// TestLastPlaceWhoeverComes: new keys, imported ones, and expired ones that are given a new life go for the last
// places of the instance at once, and of one user in another spelling; rotations and enabling, which take none,
// go on beside them.
func TestLastPlaceWhoeverComes(t *testing.T) {
	d := sealed(t, filepath.Join(t.TempDir(), "keys.db"), 0)
	free := apikey.Policy{
		Caps:     apikey.Caps{Instance: apikey.Unlimited, User: apikey.Unlimited},
		Creation: apikey.Creation{PerHour: apikey.Unlimited},
	}
	d.policy(t, "a", free)
	const places = 12
	var over []apikey.ID
	for n := range 20 {
		k := d.make(t, admin.KeyInput{Type: "user", UserPrincipalName: []string{"ann", "Ann"}[n%2]}).Key
		past := *k
		past.ExpirationDate = time.Now().Add(-time.Minute)
		_, err := d.store.Update(t.Context(), func(tx admin.Tx) error {
			return errors.Join(tx.UpdateKey(t.Context(), &past), tx.Audit(t.Context(), admin.Event{}))
		})
		if err != nil {
			t.Fatal(err)
		}
		over = append(over, k.ID)
	}
	var living []apikey.ID
	for range places - 3 {
		living = append(living, d.make(t, admin.KeyInput{Type: "user", UserPrincipalName: "ann"}).Key.ID)
	}
	free.Caps = apikey.Caps{Instance: places, User: places}
	d.policy(t, "a", free)

	var all sync.WaitGroup
	var won atomic.Int64
	try := func(takes bool, do func() error) {
		all.Go(func() {
			err := do()
			for errors.Is(err, apikey.ErrUndecided) { // a machine that is too busy
				err = do()
			}
			_, full := errors.AsType[*admin.QuotaExceededError](err)
			_, state := errors.AsType[*admin.StateError](err) // of a rotation: two secrets are valid already
			switch {
			case err == nil && takes:
				won.Add(1)
			case err != nil && takes != full && !state:
				t.Errorf("got error %v", err)
			}
		})
	}
	for n, id := range over {
		try(true, func() error {
			_, err := d.UpdateKey(t.Context(), root, "a", id, admin.KeyPatch{ExpiresIn: admin.To("1d")}, 0)
			return err
		})
		try(true, func() error {
			_, err := d.CreateKey(t.Context(), root, "a", admin.KeyInput{Name: "n", Type: "user", UserPrincipalName: "ANN"})
			return err
		})
		try(true, func() error {
			secret := apikey.Format{}.New(apikey.KindUser).Reveal()
			in := admin.ImportInput{KeyInput: admin.KeyInput{Name: "n", UserPrincipalName: "ann"}, Secret: secret}
			done, err := d.ImportKeys(t.Context(), root, "a", []admin.ImportRow{{Number: 1, Input: in}}, false)
			if err == nil && !done.Done {
				err = done.Rows[0].Err
			}
			return err
		})
		try(false, func() error {
			_, err := d.RotateKey(t.Context(), root, "a", living[n%len(living)], admin.RotateInput{}, 0)
			return err
		})
		try(false, func() error {
			_, err := d.UpdateKey(t.Context(), root, "a", living[n%len(living)], admin.KeyPatch{Disabled: admin.To(n%2 == 0)}, 0)
			return err
		})
	}
	all.Wait()
	for _, owner := range []admin.KeyOwner{{}, {Type: apikey.TypeUser, Name: "ann"}} {
		counts, err := d.store.CountKeys(t.Context(), "a", owner, time.Now())
		if err != nil || counts.Usable != places || won.Load() != 3 {
			t.Errorf("%+v: got %+v and error %v; %d got a place, want 3", owner, counts, err, won.Load())
		}
	}
}
