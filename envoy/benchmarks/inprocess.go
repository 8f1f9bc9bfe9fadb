package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"

	"keyward/authz"
	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
	"keyward/authz/usage"
	"keyward/cache"
	"keyward/envoy/check"
	"keyward/envoy/wire"
	"keyward/limits/local"
)

// Facts are what the authorizer is told of keys, as keyward serve has it.
type facts struct {
	*cache.Cache
	store *sqlite.Store
}

func (f facts) LastUsed(ctx context.Context, id apikey.ID) (time.Time, error) {
	return f.store.LastUsed(ctx, id)
}

// A checker answers Checks in this process: the store of a keyward that has ended, with all that keyward
// serve builds on it but the network.
type checker struct {
	method  grpc.MethodDesc
	service any
}

// RegisterService is how a service tells its methods.
func (c *checker) RegisterService(d *grpc.ServiceDesc, service any) {
	c.method, c.service = d.Methods[0], service
}

// answer sends a message through the codec, the decision and the codec.
func (c *checker) answer(ctx context.Context, message []byte) error {
	codec := wire.NewCodec()
	out, err := c.method.Handler(c.service, ctx, func(into any) error {
		return codec.Unmarshal(mem.BufferSlice{mem.SliceBuffer(message)}, into)
	}, nil)
	if err != nil {
		return err
	}
	sent, err := codec.Marshal(out)
	sent.Free()
	return err
}

// withChecker opens what a keyward left in a folder, and hands a checker to fn.
func withChecker(ctx context.Context, dir string, fn func(*checker) error) (err error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	text, err := os.ReadFile(filepath.Join(dir, "pepper"))
	if err != nil {
		return err
	}
	var peppers apikey.Peppers
	if peppers.Current, err = apikey.ParsePepper(text); err != nil {
		return err
	}
	store, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(dir, "keyward.db"), Audit: admin.NewAuditKeys(peppers)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	registry := prometheus.NewRegistry()
	keys, err := cache.New(store, cache.Config{Replica: "benchmarks"}, registry, log)
	if err != nil {
		return err
	}
	defer keys.Close()
	running, stop := context.WithCancel(ctx)
	var group errgroup.Group
	defer func() {
		stop()
		_ = group.Wait() // it ends with its context
	}()
	group.Go(func() error { return keys.Run(running) })
	counter := usage.NewCounter(store, usage.Config{}, nil, log)
	redigester := admin.NewRedigester(store, peppers.Current.Version(), keys.Learn, log)
	authorizer, err := authz.New(authz.Config{Credentials: authz.Credentials{Headers: authz.DefaultCredentialHeaders}},
		facts{keys, store}, local.New(local.Config{}, registry), peppers, counter, redigester)
	if err != nil {
		return err
	}
	server, err := check.New(authorizer, check.Config{Leases: authz.NewLeaseIDs(peppers)}, registry, log)
	if err != nil {
		return err
	}
	c := &checker{}
	server.Register(c)
	for end := time.Now().Add(time.Minute); !keys.Ready(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			return errors.New("the cache in this process does not become ready")
		}
	}
	return fn(c)
}

// timeInProcess takes samples of the time from a Check's bytes to the answer's, the classes mixed at random.
func timeInProcess(ctx context.Context, o options, dir string, classes []refusedClass) (samples [][]float64, err error) {
	samples = make([][]float64, len(classes))
	err = withChecker(ctx, dir, func(c *checker) error {
		request, err := newRequest(classes[0].secrets[0])
		if err != nil {
			return err
		}
		random := rand.New(rand.NewPCG(1, 2))
		for n, short := uint64(0), 0; short < o.samples; n++ {
			if n%100_000 == 0 && ctx.Err() != nil {
				return context.Cause(ctx)
			}
			class := random.IntN(len(classes))
			secrets := classes[class].secrets
			message := request.Make(secrets[random.IntN(len(secrets))], n, time.Now())
			begin := time.Now()
			if err := c.answer(ctx, message); err != nil {
				return fmt.Errorf("%s: %w", classes[class].name, err)
			}
			took := time.Since(begin)
			// The first ones fill the cache.
			if n >= 10*uint64(len(classes)*len(secrets)) && len(samples[class]) < o.samples {
				samples[class] = append(samples[class], float64(took))
				short = len(slices.MinFunc(samples, func(a, b []float64) int { return cmp.Compare(len(a), len(b)) }))
			}
		}
		return nil
	})
	return samples, err
}
