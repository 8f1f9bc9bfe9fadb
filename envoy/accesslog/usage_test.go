package accesslog

import (
	"context"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"
	"time"

	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"keyward/authz/apikey"
)

// account notes what it is told, and fails where it is told what Ended promises not to tell.
type account struct {
	mu    sync.Mutex
	ended []used
}

// used is a request of a known key that ended.
type used struct {
	Instance       string
	Key            string
	Status         int64
	Received, Sent int64
	Took           time.Duration
}

func (a *account) Ended(instanceID string, key apikey.ID, status int, requestBytes, responseBytes int64, took time.Duration) {
	if canonical, err := apikey.CanonicalInstanceID(instanceID); err != nil || canonical != instanceID || key.IsZero() ||
		status != 0 && (status < 100 || status > 599) || requestBytes < 0 || responseBytes < 0 || took < 0 ||
		requestBytes > maxBytes || responseBytes > maxBytes || took > maxTook+time.Second {
		panic(fmt.Sprint("not what was promised: ", instanceID, key, status, requestBytes, responseBytes, took))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ended = append(a.ended, used{instanceID, key.String(), int64(status), requestBytes, responseBytes, took})
}

// hearUsage gives the server one message of the log of usage.
func (w *world) hearUsage(t testing.TB, parse parser, message []byte) {
	t.Helper()
	m := received(message)
	// Its sender names another log, and what follows is of that.
	w.read(t.Context(), &source{sender: w.nodes.of(t.Context()), usage: true}, &m, func(message []byte, _ func(origin), take func(entry)) {
		parse(message, func(origin) {}, take)
	})
	m.Free()
}

const (
	usedKey  = "0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f"
	usedHome = "9d3ca1b4-0000-4000-8000-0123456789ab"
)

var plain = used{usedHome, usedKey, 200, 812, 4711, 70 * time.Millisecond}

// als is the entry, of a request that may hold a lease.
func (u used) als(s said) *alsv3.StreamAccessLogsMessage {
	s.took = u.Took
	m := alsMessage(s)
	e := m.GetHttpLogs().GetLogEntry()[0]
	fields := e.GetCommonProperties().GetMetadata().GetFilterMetadata()["envoy.filters.http.ext_authz"].GetFields()
	fields["keyward.key_id"], fields["keyward.instance"] = structpb.NewStringValue(u.Key), structpb.NewStringValue(u.Instance)
	e.Response.ResponseCode = wrapperspb.UInt32(uint32(u.Status))
	e.CommonProperties.DownstreamWireBytesReceived, e.CommonProperties.DownstreamWireBytesSent = uint64(u.Received), uint64(u.Sent)
	return m
}

// otlp is the record that the generated configuration has Envoy write.
func (u used) otlp(what string) []byte {
	return join(attribute("key", u.Key), attribute("instance", u.Instance), attribute("status", fmt.Sprint(u.Status)),
		attribute("received", fmt.Sprint(u.Received)), attribute("sent", fmt.Sprint(u.Sent)),
		attribute("duration", fmt.Sprint(u.Took.Milliseconds())), attribute("type", what))
}

var usageResource = field(1, field(1, str(1, "log_name"), field(2, str(1, "keyward-usage"))))

// TestUsageIsTold: what Envoy says of a request comes to whoever counts it, by either protocol.
func TestUsageIsTold(t *testing.T) {
	w := newWorld()
	dial, _ := w.serve(t)
	conn := dial()
	gone := used{Instance: "shop", Key: usedKey} // the client was, before there was an answer
	sendALS(t, conn, identified(plain.als(said{what: atEnd}), "n", "c", "keyward-usage"), gone.als(said{what: atEnd}))
	sendOTLP(t, conn, field(1, usageResource, field(2, field(2, plain.otlp("DownstreamEnd")), field(2, gone.otlp("DownstreamEnd")))))
	if diff := cmp.Diff([]used{plain, gone, plain, gone}, w.account.ended); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]float64{"usage": 4}, w.kinds(t)); diff != "" || w.keeper.order != "" {
		t.Errorf("kinds (-want +got), calls %q:\n%s", w.keeper.order, diff)
	}
}

// TestUsageLogsNeverTouchLeases, and logs of leases are no usage.
func TestUsageLogsNeverTouchLeases(t *testing.T) {
	w := newWorld()
	id := string(w.ids.Append(nil, leaseOf("203.0.113.9", 4711, 7)))
	withLease := said{lease: id, address: "203.0.113.9", port: 4711, start: start, what: atEnd}
	without, running := withLease, withLease
	without.lease = ""
	running.what = atInterval
	dial, _ := w.serve(t)
	conn := dial()
	// The name comes with the first message only.
	sendALS(t, conn, identified(alsMessage(withLease), "n", "c", "keyward-usage"), alsMessage(without), plain.als(withLease), plain.als(running))
	sendOTLP(t, conn, field(1, field(2, field(2, withLease.otlp(), plain.otlp("DownstreamEnd"))), usageResource))
	if diff := cmp.Diff(map[string]float64{"ignored": 3, "usage": 2}, w.kinds(t)); diff != "" || w.keeper.order != "" {
		t.Errorf("kinds (-want +got), calls %q:\n%s", w.keeper.order, diff)
	}
	if w.Heard(w.Nodes()[0].Connection) || w.Nodes()[0].Ends != 0 {
		t.Error("who tells of usage alone passes for somebody who tells that leases end")
	}
	// Another stream of the same connection, and another resource of the same call, are others.
	sendALS(t, conn, plain.als(withLease))
	sendOTLP(t, conn, join(field(1, usageResource), otlp(join(withLease.otlp(), plain.otlp("DownstreamEnd")))))
	if diff := cmp.Diff(map[string]float64{"ignored": 3, "usage": 2, "end": 2}, w.kinds(t)); diff != "" {
		t.Errorf("kinds (-want +got):\n%s", diff)
	}
	if len(w.account.ended) != 2 {
		t.Errorf("%d requests are counted, want the 2 of the log of usage", len(w.account.ended))
	}
}

// TestOddUsageIsDropped: what cannot be true is counted as such and not passed on.
func TestOddUsageIsDropped(t *testing.T) {
	but := func(change func(*used)) used {
		u := plain
		change(&u)
		return u
	}
	for name, tt := range map[string]struct {
		said used
		kind string
		told int64 // status
	}{
		"plain":              {plain, "usage", 200},
		"no key":             {but(func(u *used) { u.Key = "" }), "ignored", 0},
		"key of zeros":       {but(func(u *used) { u.Key = apikey.ID{}.String() }), "malformed", 0},
		"key that is none":   {but(func(u *used) { u.Key = "kwu_secret" }), "malformed", 0},
		"no instance":        {but(func(u *used) { u.Instance = "" }), "malformed", 0},
		"odd instance":       {but(func(u *used) { u.Instance = "a/b" }), "malformed", 0},
		"long instance":      {but(func(u *used) { u.Instance = strings.Repeat("a", 1<<20) }), "malformed", 0},
		"upper case":         {but(func(u *used) { u.Instance = strings.ToUpper(u.Instance) }), "usage", 200},
		"status 42":          {but(func(u *used) { u.Status = 42 }), "malformed", 0},
		"status 100":         {but(func(u *used) { u.Status = 100 }), "usage", 100},
		"status 599":         {but(func(u *used) { u.Status = 599 }), "usage", 599},
		"status of no class": {but(func(u *used) { u.Status = 999 }), "usage", 0},
		"status 1000":        {but(func(u *used) { u.Status = 1000 }), "malformed", 0},
		"no bytes":           {but(func(u *used) { u.Received, u.Sent = 0, 0 }), "usage", 200},
		"most bytes":         {but(func(u *used) { u.Received, u.Sent = maxBytes, maxBytes }), "usage", 200},
		"too many received":  {but(func(u *used) { u.Received = maxBytes + 1 }), "malformed", 0},
		"too many sent":      {but(func(u *used) { u.Sent = math.MaxInt64 }), "malformed", 0},
		"fewer than none":    {but(func(u *used) { u.Sent = -1 }), "malformed", 0},
		"longest":            {but(func(u *used) { u.Took = maxTook }), "usage", 200},
		"too long":           {but(func(u *used) { u.Took = maxTook + time.Second }), "malformed", 0},
		"before it began":    {but(func(u *used) { u.Took = -time.Second }), "malformed", 0},
	} {
		for protocol, message := range map[string]struct {
			parse parser
			bytes []byte
		}{
			"ALS":  {readALS, marshal(t, tt.said.als(said{what: atEnd}))},
			"OTLP": {readOTLP, otlp(tt.said.otlp("DownstreamEnd"))},
		} {
			t.Run(name+"/"+protocol, func(t *testing.T) {
				w := newWorld()
				w.hearUsage(t, message.parse, message.bytes)
				if diff := cmp.Diff(map[string]float64{tt.kind: 1}, w.kinds(t)); diff != "" {
					t.Fatalf("(-want +got):\n%s", diff)
				}
				if tt.kind != "usage" {
					return
				}
				want := tt.said
				want.Instance, want.Status = usedHome, tt.told
				if diff := cmp.Diff([]used{want}, w.account.ended); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			})
		}
	}
}

// TestUsageIsNotOfRequestsThatRun, nor of what keyward did not ask to be told.
func TestUsageIsNotOfRequestsThatRun(t *testing.T) {
	w := newWorld()
	w.hearUsage(t, readALS, marshal(t, plain.als(said{what: atInterval})))
	w.hearUsage(t, readOTLP, otlp(plain.otlp("DownstreamStart")))
	w.usage = nil
	w.hearUsage(t, readALS, marshal(t, plain.als(said{what: atEnd})))
	if diff := cmp.Diff(map[string]float64{"ignored": 3}, w.kinds(t)); diff != "" || len(w.account.ended) != 0 {
		t.Errorf("%d counted, kinds (-want +got):\n%s", len(w.account.ended), diff)
	}
}

// TestInstancesAreCopied: whoever counts keeps the name of the instance, and the message is overwritten.
func TestInstancesAreCopied(t *testing.T) {
	w := newWorld()
	for range 2 {
		message := otlp(plain.otlp("DownstreamEnd"))
		w.hearUsage(t, readOTLP, message)
		clear(message)
	}
	if diff := cmp.Diff([]used{plain, plain}, w.account.ended); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestInstancesAreBounded: whoever makes up names does not fill the memory.
func TestInstancesAreBounded(t *testing.T) {
	var n names
	n.known = map[string]string{}
	for i := range maxInstances + 10 {
		want := fmt.Sprint("i", i)
		if got, ok := n.instance(want); !ok || got != want {
			t.Fatalf("got %q, %v, want %q", got, ok, want)
		}
	}
	if len(n.known) > maxInstances {
		t.Errorf("%d names are kept, want at most %d", len(n.known), maxInstances)
	}
}

// blind is an account that keeps nothing.
type blind struct{}

func (blind) Ended(string, apikey.ID, int, int64, int64, time.Duration) {}

func usageMessages(tb testing.TB, entries int) map[string]struct {
	parse parser
	bytes []byte
} {
	logs := alsMessage()
	var records [][]byte
	for range entries {
		logs.GetHttpLogs().LogEntry = append(logs.GetHttpLogs().LogEntry, plain.als(said{what: atEnd, address: "203.0.113.9", port: 4711, start: start}).GetHttpLogs().GetLogEntry()...)
		records = append(records, plain.otlp("DownstreamEnd"))
	}
	return map[string]struct {
		parse parser
		bytes []byte
	}{"ALS": {readALS, marshal(tb, logs)}, "OTLP": {readOTLP, otlp(records...)}}
}

func (w *world) usageOnly(tb testing.TB) *source {
	w.usage = blind{}
	return &source{sender: w.nodes.of(tb.Context()), usage: true}
}

// TestUsageAllocatesNothing of what is once for each entry.
func TestUsageAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector empties pools; run without -race")
	}
	w := newWorld()
	from := w.usageOnly(t)
	one, hundred := usageMessages(t, 1), usageMessages(t, 100)
	for name := range one {
		allocs := func(bytes []byte) float64 {
			m := received(bytes)
			return testing.AllocsPerRun(100, func() {
				w.read(context.Background(), from, &m, func(message []byte, _ func(origin), take func(entry)) {
					one[name].parse(message, func(origin) {}, take)
				})
			})
		}
		if a, b := allocs(one[name].bytes), allocs(hundred[name].bytes); b > a || a > 16 {
			t.Errorf("%s: %v allocations for one entry, %v for a hundred", name, a, b)
		}
	}
	if w.counter(t, "keyward_access_log_entries_total", "usage") == 0 {
		t.Error("nothing was counted")
	}
}

func BenchmarkUsageLog(b *testing.B) {
	w := newWorld()
	from := w.usageOnly(b)
	for name, message := range usageMessages(b, 100) {
		b.Run(name, func(b *testing.B) {
			m := received(message.bytes)
			b.ReportAllocs()
			b.SetBytes(int64(len(message.bytes)))
			parse := func(message1 []byte, _ func(origin), take func(entry)) {
				message.parse(message1, func(origin) {}, take)
			}
			for b.Loop() {
				w.read(context.Background(), from, &m, parse)
			}
			b.ReportMetric(100*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}
