package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz/apikey"
)

var (
	source  = netip.MustParseAddr("192.0.2.1")
	errAway = errors.New("the store is away")
)

func digest(n int) apikey.Digest {
	return sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(n)))
}

func key(n int) *apikey.Key {
	return &apikey.Key{ID: apikey.ID(binary.BigEndian.AppendUint64(make([]byte, 8), uint64(n))), InstanceID: "demo"}
}

func revoked(n int) *apikey.Key {
	k := key(n)
	k.RevokedAt = time.Unix(1, 0)
	return k
}

// newCache makes a small cache that the test closes.
func newCache(t testing.TB, store Source, cfg Config) *Cache {
	t.Helper()
	if cfg.Records == 0 {
		cfg.Records = 1000
	}
	cfg.Replica = "r1"
	c, err := New(store, cfg, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// running gives c.Run a goroutine; the returned function ends it.
func running(t testing.TB, c *Cache) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	run.Go(func() {
		if err := c.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	end = func() {
		cancel()
		run.Wait()
	}
	t.Cleanup(end)
	return end
}

// started makes a cache that follows store, outside of a bubble.
func started(t testing.TB, store Source, cfg Config) *Cache {
	t.Helper()
	c := newCache(t, store, cfg)
	running(t, c)
	for c.CatchUp(t.Context(), 1) != nil { // until Run has loaded the set
	}
	return c
}

// bubble runs test with a cache that follows store, in virtual time.
func bubble(t *testing.T, store Source, cfg Config, test func(t *testing.T, c *Cache)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, store, cfg)
		running(t, c)
		synctest.Wait()
		test(t, c)
	})
}

// find asks as a request does.
func find(t testing.TB, c *Cache, d apikey.Digest) (*apikey.Key, error) {
	t.Helper()
	if k, ok, err := c.Cached(&d); ok {
		return k, err
	}
	return c.FindKey(t.Context(), d, source)
}

func mustFind(t testing.TB, c *Cache, d apikey.Digest) *apikey.Key {
	t.Helper()
	k, err := find(t, c, d)
	if err != nil {
		t.Fatalf("got %v, want a key", err)
	}
	return k
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got error %v, want %v", err, want)
	}
}

func catchUp(t testing.TB, c *Cache, revision apikey.Revision) {
	t.Helper()
	if err := c.CatchUp(t.Context(), revision); err != nil {
		t.Fatal(err)
	}
}

// sharing returns a digest of which the first n bytes are d's.
func sharing(d apikey.Digest, n int) apikey.Digest {
	for i := n; i < len(d); i++ {
		d[i] ^= 0xff
	}
	return d
}

// value reads a metric of c by its name and, if it has one, its label's value.
func value(t testing.TB, c *Cache, name, label string) float64 {
	t.Helper()
	reg := prometheus.NewRegistry()
	if err := c.metrics.register(reg, c); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			if family.GetName() != "keyward_cache_"+name || label != "" && m.GetLabel()[0].GetValue() != label {
				continue
			}
			return m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s{%s}", name, label)
	return 0
}

// A logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Count(l.b.Bytes(), []byte(s))
}
