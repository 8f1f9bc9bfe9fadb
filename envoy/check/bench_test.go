package check_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/usage"
	"keyward/cache"
	"keyward/cache/cachetest"
	"keyward/envoy/check"
	"keyward/envoy/check/checktest"
	"keyward/envoy/wire"
	"keyward/limits"
	"keyward/limits/local"
)

// A stack is a Check's whole way: everything but the transport and the store, whose answers are cached.
type stack struct {
	server  *check.Server
	another func(check.Config) (*check.Server, error) // makes one on the same facts
	plain   *checktest.Server
	limiter *local.Limiter
	cache   *cache.Cache
	peppers apikey.Peppers
	// secrets are of keys that are cached: in classes, for each sort of Check one.
	free, leased, spent, old []string
	unknown, broken          []string
	ids                      map[string]apikey.ID     // of secrets
	large                    map[string]apikey.Scopes // of secrets: of more than 2 KiB, and of more than 64 KiB
	single                   string                   // of a key that may be used by one request at a time
	leases                   *authz.LeaseIDs
	counted                  *prometheus.Registry // of the limiter
}

// waits is how often a Check waited for a running request to end.
func (s *stack) waits(t testing.TB) (n uint64) {
	t.Helper()
	families, err := s.counted.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "keyward_limits_lease_wait_seconds" {
			n = f.GetMetric()[0].GetHistogram().GetSampleCount()
		}
	}
	return n
}

// touch forgets last uses, which are written behind a Check's back.
type touch struct{}

func (touch) Touch(context.Context, []apikey.Use) error                       { return nil }
func (touch) AddUsage(context.Context, admin.UsageBatch, []admin.Usage) error { return nil }

// facts of keys for the authorizer: the cache, and a store that is not asked.
type cached struct{ *cache.Cache }

func (cached) LastUsed(context.Context, apikey.ID) (time.Time, error) {
	return time.Time{}, errors.New("not asked")
}
func (cached) Redigest(_, _ apikey.Digest) {}

// newStack makes n keys of each class.
func newStack(t testing.TB, n int) *stack {
	t.Helper()
	peppers := apikey.Peppers{Current: apikey.NewPepper(1, false)}
	store := cachetest.NewStore()
	format := apikey.Format{}
	store.PutInstance(&apikey.Instance{ID: "demo", Quotas: []apikey.Quota{
		{Name: "global", Context: "Core:Metered", Partition: apikey.PartitionNone, Limit: 1e9, Period: apikey.PeriodDay},
		{Name: "per-key", Context: "Core:Metered", Partition: apikey.PartitionKey, Limit: 1e9, Window: time.Hour},
		{Name: "per-user", Context: "Core:Metered", Partition: apikey.PartitionUPN, Limit: 1e9, Window: time.Hour, Lockout: time.Minute},
	}})
	s := &stack{peppers: peppers, ids: map[string]apikey.ID{}}
	var digests []apikey.Digest
	number := 0
	scopes := apikey.Scopes{"completions:write", "files:read"}
	issue := func(in apikey.Limits, generations ...apikey.Generation) string {
		number++
		if len(generations) == 0 {
			generations = []apikey.Generation{{Number: 1}}
		}
		k := &apikey.Key{
			InstanceID: "demo", Type: apikey.TypeAgent, AgentName: "sales", Limits: in,
			Scopes: scopes, Generation: 1, Generations: generations,
		}
		for i := range 8 {
			k.ID[i], k.ID[15-i] = byte(number>>(8*i)), byte(number>>(8*i))
		}
		secret := format.New(apikey.KindAgent).Reveal()
		digest := peppers.Current.Digest(secret)
		store.Put(k, digest)
		s.ids[secret] = k.ID
		digests = append(digests, digest)
		return secret
	}
	first := apikey.Generation{Number: 1}
	until := apikey.Generation{Number: 1, ValidUntil: time.Now().Add(24 * time.Hour)}
	wide := apikey.Rate{Requests: 1_000_000, Per: apikey.Duration(time.Second)}
	for range n {
		s.free = append(s.free, issue(apikey.Limits{Rate: wide, Burst: 1_000_000, MaxConcurrent: -1}, first))
		s.leased = append(s.leased, issue(apikey.Limits{Rate: wide, Burst: 1_000_000, MaxConcurrent: 1_000_000}, first))
		s.unknown = append(s.unknown, format.New(apikey.KindAgent).Reveal())
		good := format.New(apikey.KindAgent).Reveal()
		s.broken = append(s.broken, good[:len(good)-1]+string(good[len(good)-1]^1))
		if len(s.spent) < 1000 {
			s.spent = append(s.spent, issue(apikey.Limits{Rate: apikey.Rate{Requests: 1, Per: apikey.Duration(24 * time.Hour)}, Burst: 1, MaxConcurrent: 10}, first))
			s.old = append(s.old, issue(apikey.Limits{Rate: wide, Burst: 1_000_000, MaxConcurrent: -1}, until, apikey.Generation{Number: 2, CreatedAt: time.Now()}))
		}
	}
	s.single = issue(apikey.Limits{Rate: wide, Burst: 1_000_000, MaxConcurrent: 1})
	s.large = map[string]apikey.Scopes{}
	for _, length := range []int{128, 1100} { // of the second sort no key can be made: it must not matter
		scopes = nil
		for i := range apikey.MaxScopes {
			scopes = append(scopes, apikey.Scope(fmt.Sprintf("%0*d", length, number*100+i)))
		}
		s.large[issue(apikey.Limits{Rate: wide, Burst: 1_000_000, MaxConcurrent: -1})] = scopes
	}

	facts, err := cache.New(store, cache.Config{Records: max(1000, 4*n)}, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = facts.Run(ctx) })
	t.Cleanup(func() {
		stop()
		running.Wait()
		facts.Close()
	})
	s.cache = facts
	for !facts.Ready() {
		time.Sleep(time.Millisecond)
	}
	for _, d := range digests {
		if _, err := facts.FindKey(ctx, d, netip.Addr{}); err != nil {
			t.Fatal(err)
		}
	}
	s.counted = prometheus.NewRegistry()
	s.limiter = local.New(local.Config{RenewEvery: time.Hour}, s.counted)
	uses := usage.NewCounter(touch{}, usage.Config{}, nil, slog.New(slog.DiscardHandler))
	known := cached{facts}
	a, err := authz.New(authz.Config{LeaseWait: 500 * time.Millisecond, Rules: []authz.Rule{
		{Path: "/v1/agents/sales/quotacounts", Context: "Core:Metered"},
	}}, known, s.limiter, peppers, uses, known)
	if err != nil {
		t.Fatal(err)
	}
	s.leases = authz.NewLeaseIDs(peppers)
	s.another = func(config check.Config) (*check.Server, error) {
		config.Leases = s.leases
		return check.New(a, config, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	}
	config := check.Config{Leases: s.leases, Deprecation: true}
	if s.plain, err = checktest.New(a, config); err != nil {
		t.Fatal(err)
	}
	s.server, err = s.another(config)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range s.spent {
		if _, err := s.server.Answer(ctx, newAsked(t, secret).message, nil); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// asked is one message whose secret, id and start are changed in place.
type asked struct {
	message        []byte
	secret, id, at []byte // parts of message
	n              uint64
}

func newAsked(t testing.TB, secret string) *asked {
	t.Helper()
	const id = "13718393372137239113"
	in := fullRequest(secret)
	in.Attributes.Request.Time.Nanos = 1 << 28 // five bytes
	message := marshal(t, in)
	part := func(of string) []byte {
		i := bytes.Index(message, []byte(of))
		if i < 0 || bytes.Count(message, []byte(of)) != 1 {
			t.Fatalf("the message does not have %q once", of)
		}
		return message[i : i+len(of)]
	}
	return &asked{message: message, secret: part(secret), id: part(id), at: part("\x10\x80\x80\x80\x80\x01")[1:5]}
}

// metered makes the message one whose route has quotas.
func (a *asked) metered() *asked {
	const plain, metered = "sales/completions?", "sales/quotacounts?"
	for {
		i := bytes.Index(a.message, []byte(plain))
		if i < 0 {
			return a
		}
		copy(a.message[i:], metered)
	}
}

// next makes another request of the message, with a secret of the same length.
func (a *asked) next(secret string) []byte {
	a.n++
	copy(a.secret, secret)
	for i, n := len(a.id)-1, a.n; n > 0; i, n = i-1, n/10 {
		a.id[i] = byte('0' + n%10)
	}
	for i := range a.at {
		a.at[i] = 0x80 | byte(1000*a.n>>(7*i)) // nanoseconds: no two requests begin in the same microsecond
	}
	return a.message
}

// endAll ends every lease.
func (s *stack) endAll(t testing.TB) {
	var ended []limits.Ending
	for _, r := range s.limiter.Running(func(limits.Cell) bool { return true }) {
		ended = append(ended, limits.Ending{Lease: r.Lease})
	}
	if err := s.limiter.End(t.Context(), ended); err != nil {
		t.Fatal(err)
	}
}

// wanted is the status code that each sort of Check is answered with.
var sorts = []struct {
	name    string
	code    int32
	secrets func(*stack) []string
}{
	{"allowed", 0, func(s *stack) []string { return s.free }},
	{"quotas", 0, func(s *stack) []string { return s.free }}, // "allowed", and counted by three quotas
	{"allowed_lease", 0, func(s *stack) []string { return s.leased }},
	{"allowed_old", 0, func(s *stack) []string { return s.old }}, // answered with Deprecation and Sunset
	{"denied_burst", 8, func(s *stack) []string { return s.spent }},
	{"unknown_cached", 16, func(s *stack) []string { return s.unknown }},
	{"bad_checksum", 16, func(s *stack) []string { return s.broken }},
}

func codeOf(t testing.TB, answer []byte) int32 {
	t.Helper()
	out := new(authv3.CheckResponse)
	if err := proto.Unmarshal(answer, out); err != nil {
		t.Fatal(err)
	}
	return out.GetStatus().GetCode()
}

// lookUps is what ristretto keeps of look-ups before it hands them to its policy in one slice, which is
// then made anew: cache/records.go, BufferItems. A measurement is a multiple of it.
const lookUps = 1024

// allocated is what n calls allocate, in all and exactly: the average of testing.AllocsPerRun is rounded
// down, and says 0 of calls of which all but one allocate. It is the least of some tries, as others in
// the process, above all the cache that asks its store, allocate now and then.
func allocated(n int, call, after func()) float64 {
	least := math.Inf(1)
	for range 5 {
		allocs := testing.AllocsPerRun(1, func() { // it runs once before, to warm up
			for range 10 { // ristretto's policy has to take what it was handed, or it is handed no more
				runtime.Gosched()
			}
			for range n {
				call()
			}
		})
		least = min(least, allocs)
		after()
	}
	return least
}

// TestCheckAllocatesNothing is for keys that are cached, allowed or denied, with every limit on: not one
// allocation in 2,048 Checks, but for the two slices that as many bare look-ups in the cache allocate
// there. As gRPC calls it there is one more for each Check, the mem.BufferSlice in which the codec hands
// over the answer.
func TestCheckAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector empties pools; run without -race")
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // a collection empties pools, too
	const checks = 2 * lookUps
	s := newStack(t, 10)
	bare := func(secrets []string) float64 {
		digests := make([]apikey.Digest, len(secrets))
		for i, secret := range secrets {
			digests[i] = s.peppers.Current.Digest(secret)
		}
		n := 0
		return allocated(checks, func() {
			_, _, _ = s.cache.Cached(&digests[n%len(digests)])
			n++
		}, func() {})
	}
	codec := wire.NewCodec()
	for _, sort := range sorts {
		secrets := sort.secrets(s)
		lookedUp := bare(secrets)
		if lookedUp > checks/lookUps {
			t.Errorf("%s: the look-ups alone: %v allocations, want at most %d", sort.name, lookedUp, checks/lookUps)
		}
		if sort.name == "bad_checksum" {
			lookedUp = 0 // nothing is looked up
		}
		a, dst := newAsked(t, secrets[0]), make([]byte, 0, 2048)
		if sort.name == "quotas" {
			a.metered()
		}
		n := 0
		var answer []byte
		check := func() {
			answer, _ = s.server.Answer(context.Background(), a.next(secrets[n%len(secrets)]), dst)
			n++
		}
		data := mem.BufferSlice{mem.SliceBuffer(a.message)}
		decode := func(v any) error { return codec.Unmarshal(data, v) }
		serve := func() {
			a.next(secrets[n%len(secrets)])
			n++
			out, err := s.server.Handle(context.Background(), decode)
			if err != nil {
				t.Fatal(err)
			}
			sent, err := codec.Marshal(out)
			if err != nil {
				t.Fatal(err)
			}
			answer = append(answer[:0], sent[0].ReadOnlyData()...)
			sent.Free() // as gRPC does when it is written
		}
		end := func() { s.endAll(t) }
		for range 8 * checks { // tables that grow with leases have their size
			check()
		}
		end()
		for _, way := range []struct {
			name string
			call func()
			want float64
		}{
			{"from bytes to bytes", check, lookedUp},
			{"as gRPC calls it", serve, lookedUp + checks},
		} {
			if allocs := allocated(checks, way.call, end); allocs != way.want {
				t.Errorf("%s, %s: %v allocations in %d Checks, want %v", sort.name, way.name, allocs, checks, way.want)
			}
			if got := codeOf(t, answer); got != sort.code {
				t.Errorf("%s, %s: code %d, want %d", sort.name, way.name, got, sort.code)
			}
		}
	}
}

// TestAnswersAreTheirCallersOwn: buffers and calls are used again, and never by two at a time. Answers are
// of all sizes: such as fit the room that they begin with, such as do not, and such as are not kept for
// another. And some callers wait for another of the same key to end.
func TestAnswersAreTheirCallersOwn(t *testing.T) {
	const streams, waiting = 64, 8
	s := newStack(t, streams)
	client := serve(t, s.server)
	scopesOf := map[string]string{}
	for secret := range s.ids {
		scopesOf[secret] = "completions:write files:read"
	}
	for secret, scopes := range s.large {
		scopesOf[secret] = string(scopes.Append(nil))
	}
	large := slices.Sorted(maps.Keys(s.large))
	ask := func(secret string, id int) (out *authv3.CheckResponse, key string, ok bool) {
		in := fullRequest(secret)
		in.Attributes.Request.Http.Id = strconv.Itoa(id)
		out, err := client.Check(t.Context(), in)
		if err != nil {
			t.Error(err)
			return nil, "", false
		}
		key, _ = out.GetDynamicMetadata().AsMap()["keyward.key_id"].(string)
		return out, key, true
	}
	allowed := func(out *authv3.CheckResponse, secret string) {
		got := headersOf(out.GetOkResponse().GetHeaders())
		if got["x-keyward-key-id"] != s.ids[secret].String() || got["x-keyward-scopes"] != scopesOf[secret] {
			t.Errorf("headers of key %s and %d bytes of scopes, want %s and %d", got["x-keyward-key-id"], len(got["x-keyward-scopes"]), s.ids[secret], len(scopesOf[secret]))
		}
	}
	var all sync.WaitGroup
	for i := range streams {
		all.Go(func() {
			for n := range 200 {
				secret, code := s.leased[i], int32(0)
				want := s.ids[secret].String()
				switch n % 5 {
				case 1:
					secret, want, code = s.spent[i], s.ids[s.spent[i]].String(), 8
				case 2:
					secret, want, code = s.unknown[i], "", 16
				case 3:
					secret = strings.Repeat("x", 3000*(i%3)) // of all sizes
					want, code = "", 16
				case 4:
					secret = large[(i+n)%len(large)]
					want = s.ids[secret].String()
				}
				out, key, ok := ask(secret, i*1000+n)
				if !ok {
					return
				}
				if out.GetStatus().GetCode() != code || key != want {
					t.Errorf("code %d and key %q, want %d and %q", out.GetStatus().GetCode(), key, code, want)
				}
				if code == 0 {
					allowed(out, secret)
				}
			}
		})
	}
	for i := range waiting {
		all.Go(func() {
			identity := authz.NewIdentity("203.0.113.9", 51234, time.Unix(1_700_000_000, 123_456_000)) // fullRequest's
			for n := range 20 {
				id := 1_000_000 + i*1000 + n
				out, key, ok := ask(s.single, id)
				if !ok {
					return
				}
				if code := out.GetStatus().GetCode(); code == 8 && key == s.ids[s.single].String() {
					continue // it waited in vain, as on a slow machine
				} else if code != 0 {
					t.Errorf("code %d of a key with room for one at a time", code)
					return
				}
				allowed(out, s.single)
				text, _ := out.GetDynamicMetadata().AsMap()["keyward.lease"].(string)
				lease, err := s.leases.Open(text, identity)
				if want := (limits.Lease{Cell: authz.LeaseCell(s.ids[s.single]), Identity: identity, HTTP: uint64(id)}); err != nil || lease != want {
					t.Errorf("lease %+v, %v, want %+v", lease, err, want)
				}
				time.Sleep(time.Millisecond) // the others wait that long
				if err := s.limiter.End(t.Context(), []limits.Ending{{Lease: lease, Cause: limits.CauseLog}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if s.waits(t) == 0 {
		t.Error("nobody had to wait")
	}
}

// BenchmarkCheck measures a Check from bytes to bytes, of a million keys whose use follows Zipf's law.
func BenchmarkCheck(b *testing.B) {
	const keys = 1 << 20
	s := newStack(b, keys)
	zipf := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.1, 1, keys-1)
	order := make([]uint32, 1<<20)
	for i := range order {
		order[i] = uint32(zipf.Uint64())
	}
	for _, sort := range sorts {
		secrets := sort.secrets(s)
		b.Run(sort.name, func(b *testing.B) {
			a, dst := newAsked(b, secrets[0]), make([]byte, 0, 2048)
			if sort.name == "quotas" {
				a.metered()
			}
			var answer []byte
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				var err error
				answer, err = s.server.Answer(context.Background(), a.next(secrets[int(order[n%len(order)])%len(secrets)]), dst)
				if err != nil {
					b.Fatal(err)
				}
				if sort.name == "allowed_lease" && n%1000 == 999 {
					b.StopTimer() // a thousand run at once; ending is not a Check's work, see BenchmarkAccessLog
					s.endAll(b)
					b.StartTimer()
				}
			}
			b.StopTimer()
			if got := codeOf(b, answer); got != sort.code {
				b.Fatalf("code %d, want %d", got, sort.code)
			}
			s.endAll(b)
		})
	}
	b.Run("generated", func(b *testing.B) { // "allowed" through generated code, to compare with on the same machine
		a := newAsked(b, s.free[0])
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			in := new(authv3.CheckRequest)
			if err := proto.Unmarshal(a.next(s.free[order[n%len(order)]]), in); err != nil {
				b.Fatal(err)
			}
			out, err := s.plain.Check(context.Background(), in)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := proto.Marshal(out); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("patching", func(b *testing.B) { // what of the above is the benchmark's own
		a := newAsked(b, s.free[0])
		for n := 0; b.Loop(); n++ {
			a.next(s.free[order[n%len(order)]])
		}
	})
}
