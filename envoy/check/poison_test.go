package check_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"keyward/authz"
	"keyward/authz/apikey"
	"keyward/authz/usage"
	"keyward/envoy/check"
	"keyward/envoy/wire"
	"keyward/limits"
	"keyward/limits/local"
)

// A poison is a pool that spoils what it is given back: whoever kept something of it is found out.
type poison struct{ given int }

func (p *poison) Get(int) *[]byte { panic("nothing is taken from here") }

func (p *poison) Put(b *[]byte) {
	p.given++
	for i := range *b {
		(*b)[i] = 0xaa
	}
}

// asking are facts of a cache that has to ask its store, and of whoever asks it.
type asking struct {
	*facts
	sources []netip.Addr
}

func (a *asking) Cached(*apikey.Digest) (*apikey.Key, bool, error) { return nil, false, nil }
func (a *asking) FindKey(_ context.Context, _ apikey.Digest, source netip.Addr) (*apikey.Key, error) {
	a.sources = append(a.sources, source)
	return a.find()
}

// TestNothingOutlivesTheMessage: what a decision leaves behind, in the limiter, in last uses, in the
// budget of the store, in the log and in metrics, holds nothing of the bytes that it was asked in. Also
// not of those of a request that waited.
func TestNothingOutlivesTheMessage(t *testing.T) {
	for name, cached := range map[string]bool{"from memory": true, "from the store": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testNothingOutlives(t, cached) })
		})
	}
}

func testNothingOutlives(t *testing.T, cached bool) {
	f := newFacts()
	one := *record
	one.Limits.MaxConcurrent = 1
	f.find = func() (*apikey.Key, error) { return &one, nil }
	asked := &asking{facts: f}
	var keys authz.Keys = asked
	if cached {
		keys = f
	}
	peppers := apikey.Peppers{Current: apikey.NewPepper(1, false)}
	limiter := local.New(local.Config{RenewEvery: time.Hour}, prometheus.NewRegistry())
	uses := usage.NewCounter(touch{}, usage.Config{}, nil, slog.New(slog.DiscardHandler))
	a, err := authz.New(authz.Config{LeaseWait: time.Second, Rules: []authz.Rule{{Path: "/v1/{rest...}", Scopes: apikey.Scopes{"a:b"}}}}, keys, limiter, peppers, uses, f)
	if err != nil {
		t.Fatal(err)
	}
	ids := authz.NewLeaseIDs(peppers)
	log, metrics := new(bytes.Buffer), prometheus.NewRegistry()
	s, err := check.New(a, check.Config{Leases: ids, LogPerSecond: 100, Timeout: 10 * time.Second}, metrics, slog.New(slog.NewJSONHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}

	codec, pool := wire.NewCodec(), new(poison)
	ask := func(http uint64, key string) *authv3.CheckResponse {
		in := fullRequest(key)
		in.Attributes.Request.Http.Id = strconv.FormatUint(http, 10)
		message := marshal(t, in)
		data := mem.BufferSlice{mem.NewBuffer(&message, pool)}
		out, err := s.Handle(t.Context(), func(v any) error {
			err := codec.Unmarshal(data, v)
			data.Free() // as gRPC does
			return err
		})
		if err != nil {
			t.Error(err)
			return nil
		}
		if message[0] != 0xaa || message[len(message)-1] != 0xaa {
			t.Error("the message was not given back")
		}
		sent, err := codec.Marshal(out)
		if err != nil {
			t.Error(err)
			return nil
		}
		defer sent.Free()
		answer := new(authv3.CheckResponse)
		if err := proto.Unmarshal(sent.Materialize(), answer); err != nil {
			t.Error(err)
		}
		return answer
	}
	identity := authz.NewIdentity("203.0.113.9", 51234, time.Unix(1_700_000_000, 123_456_000)) // fullRequest's
	running := func(http uint64) limits.Lease {
		t.Helper()
		want := limits.Lease{Cell: authz.LeaseCell(keyID), Identity: identity, HTTP: http}
		all := limiter.Running(func(limits.Cell) bool { return true })
		if len(all) != 1 || all[0].Lease != want {
			t.Fatalf("running %+v, want the lease %+v", all, want)
		}
		if method, pattern := a.Describe(all[0].Note); method != "POST" || pattern != "/v1/{rest...}" {
			t.Errorf("listed as %q %q", method, pattern)
		}
		return want
	}
	granted := func(out *authv3.CheckResponse, want limits.Lease) {
		t.Helper()
		id, _ := out.GetDynamicMetadata().AsMap()["keyward.lease"].(string)
		if got, err := ids.Open(id, identity); err != nil || got != want {
			t.Errorf("granted %+v, %v, want %+v", got, err, want)
		}
	}

	out := ask(11, secret)
	first := running(11)
	granted(out, first)
	if got := uses.Pending(keyID); !got.Equal(time.Now()) {
		t.Errorf("used at %v, want %v", got, time.Now())
	}

	waited := make(chan *authv3.CheckResponse, 1)
	go func() { waited <- ask(12, secret) }()
	synctest.Wait()
	running(11) // and the other waits
	time.Sleep(300 * time.Millisecond)
	if err := limiter.End(t.Context(), []limits.Ending{{Lease: first, Cause: limits.CauseLog}}); err != nil {
		t.Fatal(err)
	}
	granted(<-waited, running(12))
	if got := uses.Pending(keyID); !got.Equal(time.Now()) {
		t.Errorf("used at %v, want %v", got, time.Now())
	}

	f.find = func() (*apikey.Key, error) { return nil, apikey.ErrNotFound }
	if out := ask(13, secret); out.GetStatus().GetCode() != 16 {
		t.Errorf("unknown: %v", out)
	}
	if want := 3; pool.given != want {
		t.Errorf("%d messages given back, want %d", pool.given, want)
	}
	for _, source := range asked.sources {
		if source != netip.MustParseAddr("203.0.113.9") {
			t.Errorf("the store is asked on behalf of %v", source)
		}
	}
	if (len(asked.sources) == 0) != cached {
		t.Errorf("the store was asked %d times", len(asked.sources))
	}
	var lines []map[string]any
	for line := range strings.Lines(log.String()) {
		var l map[string]any
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		for _, name := range []string{"time", "decisionId", "tookMicros"} {
			delete(l, name)
		}
		lines = append(lines, l)
	}
	line := func(outcome, reason string) map[string]any {
		return map[string]any{"level": "INFO", "msg": "decision", "outcome": outcome, "reason": reason, "method": "POST",
			"path": "/v1/agents/sales/completions", "peer": "203.0.113.9", "skipped": 0.0}
	}
	allowed := line("allowed", "key")
	allowed["keyId"], allowed["instance"] = keyID.String(), "demo"
	if diff := cmp.Diff([]map[string]any{allowed, allowed, line("unauthenticated", "unknown_key")}, lines); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
	counted := map[string]float64{}
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			if n := m.GetCounter().GetValue(); n != 0 {
				text := family.GetName()
				for _, l := range m.GetLabel() {
					text += " " + l.GetValue()
				}
				counted[text] = n
			}
		}
	}
	if diff := cmp.Diff(map[string]float64{"keyward_decisions_total allowed key": 2, "keyward_decisions_total unauthenticated unknown_key": 1}, counted); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}
