package authz_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/storetest"
	"keyward/cache"
	"keyward/limits"
	"keyward/limits/local"
)

var uncachedSeed = flag.Uint64("uncachedseed", 0, "seed of TestCachedIsAsUncached; 0: a random one, which is logged")

// TestCachedIsAsUncached decides a million random requests twice, from a cache and straight from the
// store, while everything about keys, instances and time changes at random: after each change was
// acknowledged both say the same, to the last field. P14 of DESIGN §11.
//
// A history that shows a difference is made shorter, and told step by step.
func TestCachedIsAsUncached(t *testing.T) {
	const each = 5000
	seed := *uncachedSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-uncachedseed %d", seed)
	var sum tally
	for i := range sized(1_000_000) / each {
		steps := randomSteps(rand.New(rand.NewPCG(seed, uint64(i))), each)
		told, played := play(t, steps, &sum, false)
		if told == "" {
			continue
		}
		steps = steps[:played]
		until := time.Now().Add(20 * time.Second)
		for n := len(steps) / 2; n > 0; n /= 2 { // drop what the difference does not need
			for at := 0; at+n <= len(steps) && time.Now().Before(until); {
				fewer := slices.Delete(slices.Clone(steps), at, at+n)
				if shorter, played := play(t, fewer, new(tally), true); shorter != "" {
					steps, told = fewer[:played], shorter
				} else {
					at += n
				}
			}
		}
		t.Fatalf("-uncachedseed %d, history %d, made shorter:\n%s", seed, i, told)
	}
	t.Logf("%d requests, %.0f answered from the cache, %.0f keys from warm-ups, %d changes; reasons %v", sum.requests, sum.hits, sum.warmed, sum.changes, sum.reasons)
	if sum.hits < float64(sum.requests)/4 {
		t.Errorf("the cache answered %v of %d requests: too few to prove anything", sum.hits, sum.requests)
	}
	if sum.explained < sum.requests/10 {
		t.Errorf("%d of %d requests were explained: too few to prove anything", sum.explained, sum.requests)
	}
	if sum.warmed < float64(sum.requests)/1000 {
		t.Errorf("warm-ups loaded %v keys: too few to prove anything", sum.warmed)
	}
	for _, want := range []authz.Reason{
		authz.ReasonKey, authz.ReasonUnknownKey, authz.ReasonRevoked, authz.ReasonDisabled, authz.ReasonInstanceDisabled,
		authz.ReasonNotYetValid, authz.ReasonExpired, authz.ReasonGenerationEnded, authz.ReasonIdle, authz.ReasonWrongInstance,
		authz.ReasonWrongAgent, authz.ReasonWrongEnvironment, authz.ReasonMissingScope, authz.ReasonAddress,
		authz.ReasonLimitInstance, authz.ReasonLimitBurst, authz.ReasonLimitConcurrency,
	} {
		if sum.reasons[want] < sum.requests/10_000 {
			t.Errorf("%v came %d times in %d: too rarely to prove anything", want, sum.reasons[want], sum.requests)
		}
	}
}

type tally struct {
	requests, changes int
	explained         int
	hits, warmed      float64
	reasons           map[authz.Reason]int
}

// A step is what happens next, as numbers that mean something whatever happened before: so a history
// without some of its steps is a history.
type step struct {
	kind, key, other, detail uint32
}

func randomSteps(random *rand.Rand, n int) []step {
	steps := make([]step, n)
	for i := range steps {
		steps[i] = step{random.Uint32(), random.Uint32(), random.Uint32(), random.Uint32()}
	}
	return steps
}

// play plays a history in virtual time, up to a difference, and says after how many steps that was. It
// tells what happened if it should: most histories are not worth the words.
func play(t *testing.T, steps []step, sum *tally, telling bool) (told string, played int) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, sum)
		s.telling = telling
		told, played = s.play(steps)
	})
	return told, played
}

// direct is the store without a cache.
type direct struct{ *stage }

func (d direct) Cached(*apikey.Digest) (*apikey.Key, bool, error) { return nil, false, nil }
func (d direct) FindKey(ctx context.Context, digest apikey.Digest, _ netip.Addr) (*apikey.Key, error) {
	k, _, err := d.store.FindKey(ctx, digest)
	return k, err
}
func (d direct) Instance(id string) *apikey.Instance {
	in, err := d.store.Instance(context.Background(), id)
	if err != nil {
		return nil
	}
	return in
}
func (d direct) LastUsed(ctx context.Context, id apikey.ID) (time.Time, error) {
	return d.lastUsed(ctx, id)
}
func (d direct) Serving() error { return nil }

// A stage is where a history is played.
type stage struct {
	t        *testing.T
	sum      *tally
	store    *storetest.Memory
	peppers  apikey.Peppers
	cache    *cache.Cache
	reg      *prometheus.Registry // the cache's
	end      func()               // of the cache
	service  *admin.Service
	limiters [2]*local.Limiter
	deciders [2]*authz.Authorizer // from the cache, and straight from the store

	instances []string
	keys      []staged
	began     int
	running   []limits.Lease
	telling   bool
	told      []string

	// What a decision said is noted when both were made: one must not help the other.
	used      map[apikey.ID]time.Time
	uses      map[apikey.ID]time.Time // of this request
	redigests []admin.Redigest        // the same
}

// A staged is a key that was made, and one of its secrets.
type staged struct {
	id       apikey.ID
	instance string
	secret   apikey.Secret
}

func (s *stage) Decided(u authz.Use) {
	if u.Reason == authz.ReasonKey {
		s.uses[u.Key.ID] = u.At
	}
}
func (s *stage) Last(id apikey.ID) time.Time { return s.used[id] }
func (s *stage) Redigest(old, current apikey.Digest) {
	s.redigests = append(s.redigests, admin.Redigest{Old: old, New: current, Version: 2})
}

// lastUsed is as the program has it: the later of what is written and what waits to be.
func (s *stage) lastUsed(ctx context.Context, id apikey.ID) (time.Time, error) {
	at, err := s.store.LastUsed(ctx, id)
	if waits := s.used[id]; waits.After(at) {
		at = waits
	}
	return at, err
}

var agentOf, environmentOf = "?agent", "?environment"

func newStage(t *testing.T, sum *tally) *stage {
	s := &stage{
		t: t, sum: sum, instances: []string{"a", "b", "c"},
		peppers: apikey.Peppers{Previous: apikey.NewPepper(1, false), Current: apikey.NewPepper(2, false)},
		used:    map[apikey.ID]time.Time{}, uses: map[apikey.ID]time.Time{}, reg: prometheus.NewRegistry(),
	}
	s.store = storetest.NewMemory(admin.NewAuditKeys(s.peppers))
	if sum.reasons == nil {
		sum.reasons = map[authz.Reason]int{}
	}
	for i := range s.limiters {
		s.limiters[i] = local.New(local.Config{}, nil)
	}
	s.deciders[1] = s.authorizer(direct{s}, s.limiters[1])
	s.start()
	t.Cleanup(func() { s.stop() })
	for _, id := range s.instances {
		s.put(id, apikey.Policy{})
	}
	return s
}

func (s *stage) authorizer(keys authz.Keys, limiter limits.Leaser) *authz.Authorizer {
	config := authz.Config{Rules: []authz.Rule{
		{Path: "/", Scopes: []apikey.Scope{"use"}},
		{Path: "/free/"},
		{Path: "/in/{instance}/", Instance: source(s.t, "{instance}")},
		{Path: "/agent/", Agent: source(s.t, agentOf), Environment: source(s.t, environmentOf)},
		{Path: "/optional/", Mode: authz.Optional},
	}}
	a, err := authz.New(config, keys, limiter, s.peppers, s, s)
	if err != nil {
		s.t.Fatal(err)
	}
	return a
}

// start begins with a new cache, which loads what was used last.
func (s *stage) start() {
	// A poll an hour: what makes the cache new is the acknowledgement of a change alone.
	// Few records, so that keys come and go.
	config := cache.Config{Records: 20, Unknown: 20, WarmUp: time.Minute, Poll: time.Hour, Lease: 3 * time.Hour}
	s.reg = prometheus.NewRegistry()
	var err error
	if s.cache, err = cache.New(s.store, config, s.reg, slog.New(slog.DiscardHandler)); err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	run.Go(func() { _ = s.cache.Run(ctx) })
	s.end = func() { cancel(); run.Wait(); s.cache.Close() }
	synctest.Wait()
	s.service = admin.New(s.store, admin.Config{Peppers: s.peppers}, s.cache, slog.New(slog.DiscardHandler))
	s.deciders[0] = s.authorizer(facts{s.cache, s.lastUsed}, s.limiters[0])
}

func (s *stage) stop() {
	s.end()
	s.sum.hits += count(s.t, s.reg, "lookups_total")
	s.sum.warmed += count(s.t, s.reg, "warm_up_records")
}

func (s *stage) play(steps []step) (told string, played int) {
	for i, step := range steps {
		if difference := s.step(step); difference != "" {
			return strings.Join(s.told, "\n") + "\n" + difference, i + 1
		}
	}
	return "", len(steps)
}

func (s *stage) tell(format string, args ...any) {
	if s.telling {
		s.told = append(s.told, fmt.Sprintf("%4d  ", len(s.told)+1)+fmt.Sprintf(format, args...))
	}
}

// step does one: of twenty, nineteen are requests.
func (s *stage) step(p step) (difference string) {
	if len(s.keys) > 0 && p.kind%20 != 0 {
		return s.request(p)
	}
	s.sum.changes++
	instance := s.instances[int(p.other)%len(s.instances)]
	if kind := p.kind / 20 % 16; len(s.keys) == 0 || kind < 4 {
		s.create(instance, p.detail)
	} else if k := s.key(p); kind < 10 {
		s.change(k, p.detail)
	} else {
		switch kind {
		case 10:
			done, err := s.service.RevokeKey(s.t.Context(), owner, k.instance, k.id, "")
			s.acknowledged("revoke "+k.id.String(), done.Propagation, err)
		case 11:
			s.policy(instance, p.detail)
		case 12:
			if p.detail%4 == 0 {
				done, err := s.service.DeleteInstance(s.t.Context(), owner, instance, true)
				s.acknowledged("delete instance "+instance, done, err)
			}
			s.put(instance, apikey.Policy{})
		case 13: // uses are written down, and what is remembered of them is lost
			var uses []apikey.Use
			for id, at := range s.used {
				uses = append(uses, apikey.Use{KeyID: id, Generation: 1, At: at})
			}
			if err := s.store.Touch(s.t.Context(), uses); err != nil {
				s.t.Fatal(err)
			}
			clear(s.used)
			s.tell("uses are written")
			if p.detail%4 == 0 {
				s.stop()
				s.start()
				s.tell("the cache begins anew")
			}
		default:
			d := []time.Duration{time.Millisecond, time.Second, 20 * time.Second, time.Minute}[p.detail%4]
			if p.detail>>2%64 == 0 { // ristretto has a ticker of seconds: more would be dear
				d = time.Hour
			}
			time.Sleep(d)
			synctest.Wait()
			s.tell("%v go by", d)
		}
	}
	return ""
}

// key returns a key, one of the newest more often than not.
func (s *stage) key(p step) staged {
	n := len(s.keys)
	if p.detail%4 > 0 {
		n = min(n, 8)
	}
	return s.keys[len(s.keys)-1-int(p.key)%n]
}

func (s *stage) acknowledged(what string, done admin.Propagation, err error) {
	s.tell("%s: %v", what, err)
	if err != nil && !errors.Is(err, apikey.ErrNotFound) || err == nil && !done.Everywhere {
		s.t.Errorf("%s: %+v, %v", what, done, err)
	}
}

// update changes the store as the service will when it can, and waits until the replica knows.
func (s *stage) update(what string, fn func(ctx context.Context, tx admin.Tx) error) {
	ctx := s.t.Context()
	revision, err := s.store.Update(ctx, func(tx admin.Tx) error {
		return errors.Join(tx.Audit(ctx, admin.Event{}), fn(ctx, tx))
	})
	if err == nil {
		err = s.cache.CatchUp(ctx, revision)
	}
	s.acknowledged(what, admin.Propagation{Everywhere: true}, err)
}

func (s *stage) put(id string, policy apikey.Policy) {
	done, err := s.service.PutInstance(s.t.Context(), owner, id, unbounded(policy))
	s.acknowledged(fmt.Sprintf("put instance %s %+v", id, policy), done.Propagation, err)
}

func (s *stage) policy(id string, detail uint32) {
	var p apikey.Policy
	switch detail % 6 {
	case 0:
		p.Disabled = true
	case 1:
		p.AllowedScopes = apikey.Scopes{"use:less"}
	case 2:
		p.AllowedScopes = apikey.Scopes{"use", "x:*"}
	case 3:
		p.Total = apikey.Limits{Rate: apikey.Rate{Requests: 1, Per: apikey.Duration(time.Second)}, Burst: 3}
	case 4:
		p.Defaults.Instance = apikey.Limits{Burst: 2, MaxConcurrent: 1}
	}
	s.put(id, p)
}

func (s *stage) create(instance string, detail uint32) {
	in := admin.KeyInput{Name: "n"}
	if detail%3 == 0 {
		in.Type, in.AgentName = apikey.TypeAgent, "helper"
	}
	if detail>>3%3 == 0 {
		in.Environment = "prod"
	}
	switch detail >> 5 % 6 {
	case 0:
		in.ExpiresIn = "90s"
	case 1:
		in.InactivityDays = new(1)
	case 2:
		in.NotBefore = time.Now().Add(time.Minute).UTC().Format(time.RFC3339)
	}
	if detail>>8%2 == 0 {
		in.Limits = unlimited
	}
	if detail>>9%5 == 0 { // made before the rotation of the pepper
		secret := apikey.Format{}.New(apikey.KindInstance)
		k := &apikey.Key{ID: apikey.ID{1, byte(len(s.keys) >> 16), byte(len(s.keys) >> 8), byte(len(s.keys))}, InstanceID: instance, Type: apikey.TypeInstance, CreatedAt: time.Now()}
		if detail>>5%2 == 0 { // and idle soon, unless it is used
			k.InactivityDays, k.CreatedAt = 1, k.CreatedAt.Add([]time.Duration{time.Millisecond, time.Minute}[detail>>20%2]-24*time.Hour)
		}
		s.unknownBefore(instance, secret, detail)
		s.update(fmt.Sprintf("create %v in %s under the previous pepper", k.ID, instance), func(ctx context.Context, tx admin.Tx) error {
			return errors.Join(tx.InsertKey(ctx, k),
				tx.InsertGeneration(ctx, k.ID, apikey.Generation{Number: 1}, s.peppers.Previous.Digest(secret.Reveal()), 1))
		})
		s.keys = append(s.keys, staged{k.ID, instance, secret})
		return
	}
	made, err := s.service.CreateKey(s.t.Context(), owner, instance, in)
	if forbidden, ok := errors.AsType[*admin.ForbiddenError](err); ok {
		s.tell("create in %s: %v", instance, forbidden)
		return
	}
	if err != nil {
		s.acknowledged("create in "+instance, made.Propagation, err)
		return
	}
	s.acknowledged(fmt.Sprintf("create %v in %s %+v", made.Key.ID, instance, in), made.Propagation, err)
	s.keys = append(s.keys, staged{made.Key.ID, instance, made.Secret})
}

// unknownBefore asks with a secret that is nobody's yet, so that the cache has something to forget.
func (s *stage) unknownBefore(instance string, secret apikey.Secret, detail uint32) {
	if difference := s.decide(staged{instance: instance, secret: secret}, step{detail: detail}); difference != "" {
		s.t.Error(difference)
	}
}

// change changes one thing about a key.
func (s *stage) change(k staged, detail uint32) {
	if detail%9 == 0 { // one more secret
		secret := apikey.Format{}.New(apikey.KindInstance)
		s.update(fmt.Sprintf("rotate %v", k.id), func(ctx context.Context, tx admin.Tx) error {
			now, err := tx.Key(ctx, k.instance, k.id)
			if err != nil {
				return err
			}
			g := apikey.Generation{Number: len(now.Generations) + 1}
			if detail%2 == 0 {
				g.ValidUntil = time.Now().Add(time.Minute)
			}
			return tx.InsertGeneration(ctx, k.id, g, s.peppers.Current.Digest(secret.Reveal()), 2)
		})
		s.keys = append(s.keys, staged{k.id, k.instance, secret})
		return
	}
	var next *apikey.Key
	s.update(fmt.Sprintf("change %v by %d", k.id, detail%9), func(ctx context.Context, tx admin.Tx) (err error) {
		if next, err = tx.Key(ctx, k.instance, k.id); err != nil {
			return err
		}
		switch detail % 9 {
		case 1:
			next.Disabled = !next.Disabled
		case 2:
			next.Scopes = apikey.Scopes{"use:less"}
		case 3:
			next.Scopes = nil
		case 4:
			next.AllowedIPs = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/25")}
		case 5:
			next.AllowedIPs = nil
		case 6:
			next.ExpirationDate = time.Now().Add(time.Duration(detail%100) * time.Second)
		case 7:
			next.ExpirationDate, next.NotBefore = time.Time{}, time.Time{}
		case 8:
			next.Limits = apikey.Limits{Rate: apikey.Rate{Requests: 60, Per: apikey.Duration(time.Minute)}, Burst: 1 + int(detail%3), MaxConcurrent: 1 + int(detail%2)}
		}
		return tx.UpdateKey(ctx, next)
	})
}

func (s *stage) request(p step) string {
	k := s.key(p)
	if p.detail%16 == 0 { // nobody's
		k.secret = apikey.Format{}.New(apikey.KindUser)
	}
	return s.decide(k, p)
}

// decide decides one request twice and tells the difference.
func (s *stage) decide(k staged, p step) string {
	s.began++
	s.sum.requests++
	s.endSome(p.other)
	path := []string{
		"/", "/free/", "/free/more", "/in/" + k.instance + "/x", "/in/" + s.instances[int(p.other)%3] + "/x",
		"/agent/?agent=helper", "/agent/?agent=other", "/agent/?environment=prod", "/agent/?environment=test", "/optional/",
	}[p.detail>>4%10]
	peer := netip.AddrFrom4([4]byte{192, 0, 2, byte(p.detail >> 8)})
	request := func() *authz.Request {
		r := asking(k.secret)
		r.Path, r.Peer = path, peer.String()
		r.Identity = authz.IdentityOf(netip.AddrPortFrom(peer, 4711), time.UnixMicro(int64(1_000_000_000_000_000+s.began)))
		r.HTTP, r.Connection = uint64(s.began), 1
		if p.detail>>16%8 == 0 {
			r.Extensions = []authz.Pair{{Name: "required_scopes", Value: "use:less"}}
		}
		return &r
	}
	// Explained to one of the deciders only, often: if that spent anything, they would no longer agree.
	var explained *authz.Explanation
	if p.kind>>8%4 == 0 {
		var err error
		if explained, err = s.deciders[0].Explain(s.t.Context(), authz.Inquiry{Request: request(), Keys: finder{s}}); err != nil {
			return fmt.Sprintf("explain: %v", err)
		}
		if len(s.uses)+len(s.redigests) > 0 {
			return "an explanation used a key"
		}
	}
	var got [2]authz.Decision
	var errs [2]error
	for i, a := range s.deciders {
		errs[i] = ask(s.t.Context(), a, request(), &got[i])
	}
	for id, at := range s.uses {
		s.used[id] = at
	}
	clear(s.uses)
	if len(s.redigests) > 0 {
		if err := s.store.Redigest(s.t.Context(), s.redigests); err != nil {
			s.t.Fatal(err)
		}
		for _, r := range s.redigests {
			s.cache.Learn(r.New)
		}
		s.redigests = s.redigests[:0]
	}
	s.tell("request of %v from %v to %s: %v, %v", k.id, peer, path, got[0].Reason, errs[0])
	s.sum.reasons[got[1].Reason]++
	if got[0].Leased {
		s.running = append(s.running, got[0].Lease)
	}
	if errs[0] != nil || errs[1] != nil {
		return fmt.Sprintf("cached %v, uncached %v: want no error", errs[0], errs[1])
	}
	if explained != nil {
		s.sum.explained++
		if told := misexplained(explained, &got[0]); told != "" {
			return told
		}
	}
	return s.differ(&got[0], &got[1])
}

// misexplained tells an explanation from the decision that came after it.
func misexplained(x *authz.Explanation, d *authz.Decision) string {
	facts := func(d *authz.Decision) authz.Decision {
		f := authz.Decision{
			Reason: d.Reason, MissingScope: d.MissingScope, Shadowed: d.Shadowed, Limit: d.Limit, Rate: d.Rate, Concurrent: d.Concurrent,
			RetryAfter: d.RetryAfter, Agent: d.Agent, CredentialSent: d.CredentialSent, InAuthorization: d.InAuthorization,
		}
		if d.Key != nil {
			f.Key = &apikey.Key{ID: d.Key.ID}
		}
		return f
	}
	if explained, decided := facts(&x.Decision), facts(d); !reflect.DeepEqual(explained, decided) {
		return fmt.Sprintf("explained %+v\ndecided   %+v", explained, decided)
	}
	if x.Decision.Leased || x.Undecided != "" {
		return fmt.Sprintf("explained %+v", x)
	}
	if want := (authz.Refusal{Reason: d.Reason}).Step(); x.Step != want {
		return fmt.Sprintf("%v is explained by the step %v, want %v", d.Reason, x.Step, want)
	}
	return ""
}

// finder is the store, for who explains.
type finder struct{ *stage }

func (f finder) FindKey(ctx context.Context, d apikey.Digest) (*apikey.Key, error) {
	k, _, err := f.store.FindKey(ctx, d)
	return k, err
}

// differ compares two decisions, but for their random ids, for when a key was last used, of which a record
// in a cache knows nothing new, and for which of a key's two digests found it, of which a cache may hold one.
func (s *stage) differ(cached, uncached *authz.Decision) string {
	for _, d := range []*authz.Decision{cached, uncached} {
		d.ID = authz.ID{}
		if d.Key == nil {
			continue
		}
		k := *d.Key
		k.Digest, k.LastUsedAt, k.Generations = apikey.Digest{}, time.Time{}, slices.Clone(k.Generations)
		for i := range k.Generations {
			k.Generations[i].LastUsedAt = time.Time{}
		}
		d.Key = &k
	}
	if reflect.DeepEqual(cached, uncached) {
		return ""
	}
	return fmt.Sprintf("cached   %+v of %+v\nuncached %+v of %+v", cached, cached.Key, uncached, uncached.Key)
}

// endSome ends the requests that run, but for a few.
func (s *stage) endSome(keep uint32) {
	if keep%3 > 0 || len(s.running) == 0 {
		return
	}
	var endings []limits.Ending
	for _, l := range s.running {
		endings = append(endings, limits.Ending{Lease: l, Cause: limits.CauseLog})
	}
	s.running = s.running[:0]
	for _, l := range s.limiters {
		if err := l.End(context.Background(), endings); err != nil {
			s.t.Fatal(err)
		}
	}
}
