package check_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/authz/usage"
	"keyward/cache"
	"keyward/cache/cachetest"
	"keyward/envoy/check"
	"keyward/limits"
	"keyward/limits/local"
)

// A stack is a Check's whole way: everything but the transport and the store, whose answers are cached.
type stack struct {
	server  *check.Server
	limiter *local.Limiter
	// secrets are of keys that are cached: in classes, for each sort of Check one.
	free, leased, spent, old []string
	unknown, broken          []string
	ids                      map[string]apikey.ID // of secrets
}

// touch forgets last uses, which are written behind a Check's back.
type touch struct{}

func (touch) Touch(context.Context, []apikey.Use) error { return nil }

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
	store.PutInstance(&apikey.Instance{ID: "demo"})
	s := &stack{ids: map[string]apikey.ID{}}
	var digests []apikey.Digest
	number := 0
	issue := func(in apikey.Limits, generations ...apikey.Generation) string {
		number++
		k := &apikey.Key{
			InstanceID: "demo", Type: apikey.TypeAgent, AgentName: "sales", Limits: in,
			Scopes: apikey.Scopes{"completions:write", "files:read"}, Generation: 1, Generations: generations,
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
	for !facts.Ready() {
		time.Sleep(time.Millisecond)
	}
	for _, d := range digests {
		if _, err := facts.FindKey(ctx, d, netip.Addr{}); err != nil {
			t.Fatal(err)
		}
	}
	s.limiter = local.New(local.Config{RenewEvery: time.Hour}, prometheus.NewRegistry())
	uses := usage.NewLastUsed(touch{}, slog.New(slog.DiscardHandler))
	known := cached{facts}
	a, err := authz.New(authz.Config{}, known, s.limiter, peppers, uses, known)
	if err != nil {
		t.Fatal(err)
	}
	s.server, err = check.New(a, check.Config{Leases: authz.NewLeaseIDs(peppers), Deprecation: true}, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
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

// next makes another request of the message, with a secret of the same length.
func (a *asked) next(secret string) []byte {
	a.n++
	copy(a.secret, secret)
	for i, n := len(a.id)-1, a.n; n > 0; i, n = i-1, n/10 {
		a.id[i] = byte('0' + n%10)
	}
	for i := range a.at {
		a.at[i] = 0x80 | byte(a.n>>(7*i))
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

// TestCheckAllocatesNothing is for keys that are cached, allowed or denied, with every limit on.
func TestCheckAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector empties pools; run without -race")
	}
	s := newStack(t, 10)
	for _, sort := range sorts {
		secrets := sort.secrets(s)
		a, dst := newAsked(t, secrets[0]), make([]byte, 0, 2048)
		n := 0
		var answer []byte
		check := func() {
			answer, _ = s.server.Answer(context.Background(), a.next(secrets[n%len(secrets)]), dst)
			n++
		}
		for range 3000 { // tables that grow with leases have their size
			check()
		}
		s.endAll(t)
		if allocs := testing.AllocsPerRun(2000, check); allocs != 0 {
			t.Errorf("%s: %v allocations", sort.name, allocs)
		}
		if got := codeOf(t, answer); got != sort.code {
			t.Errorf("%s: code %d, want %d", sort.name, got, sort.code)
		}
		s.endAll(t)
	}
}

// TestAnswersAreTheirCallersOwn: buffers and calls are used again, and never by two at a time.
func TestAnswersAreTheirCallersOwn(t *testing.T) {
	const streams = 64
	s := newStack(t, streams)
	client := serve(t, s.server)
	var all sync.WaitGroup
	for i := range streams {
		all.Go(func() {
			for n := range 200 {
				secret := s.leased[i]
				want, code := s.ids[secret].String(), int32(0)
				switch n % 4 {
				case 1:
					secret, want, code = s.spent[i], s.ids[s.spent[i]].String(), 8
				case 2:
					secret, want, code = s.unknown[i], "", 16
				case 3:
					secret = strings.Repeat("x", 3000*(i%3)) // of all sizes
					want, code = "", 16
				}
				in := fullRequest(secret)
				in.Attributes.Request.Http.Id = strconv.Itoa(i*1000 + n)
				out, err := client.Check(t.Context(), in)
				if err != nil {
					t.Error(err)
					return
				}
				key, _ := out.GetDynamicMetadata().AsMap()["keyward.key_id"].(string)
				if out.GetStatus().GetCode() != code || key != want {
					t.Errorf("code %d and key %q, want %d and %q", out.GetStatus().GetCode(), key, code, want)
				}
				if code == 0 && headersOf(out.GetOkResponse().GetHeaders())["x-keyward-key-id"] != want {
					t.Errorf("headers %v, want key %s", out.GetOkResponse().GetHeaders(), want)
				}
			}
		})
	}
	all.Wait()
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
			var answer []byte
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				var err error
				answer, err = s.server.Answer(context.Background(), a.next(secrets[int(order[n%len(order)])%len(secrets)]), dst)
				if err != nil {
					b.Fatal(err)
				}
				if sort.name == "allowed_lease" && n%100_000 == 99_999 {
					b.StopTimer() // ending is not a Check's work; see BenchmarkAccessLog
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
	b.Run("patching", func(b *testing.B) { // what of the above is the benchmark's own
		a := newAsked(b, s.free[0])
		for n := 0; b.Loop(); n++ {
			a.next(s.free[order[n%len(order)]])
		}
	})
}
