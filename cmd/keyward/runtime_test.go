package main

import (
	"bytes"
	"log/slog"
	"math"
	"os"
	"runtime/debug"
	"strings"
	"testing"

	"keyward/authz/apikey"
)

func TestMemoryLimits(t *testing.T) {
	for text, want := range map[string]memoryLimit{
		"90%": {share: 0.9}, "1%": {share: 0.01}, "100%": {share: 1}, "off": noMemoryLimit,
		"2GiB": {bytes: 2 << 30}, "512MiB": {bytes: 512 << 20}, "65536KiB": {bytes: 64 << 20}, "1TiB": {bytes: 1 << 40},
		"33554432B": {bytes: 32 << 20}, "33554432": {bytes: 32 << 20},
	} {
		r := Runtime{GCPercent: 100, MemoryLimit: text}
		if got, err := r.memoryLimit(); err != nil || got != want || r.validate() != nil {
			t.Errorf("%s: got %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "0%", "101%", "-1%", "1.5%", "%", "90 %", "2GB", "2 GiB", "GiB", "-2GiB", "1e9", "9000000TiB", "unlimited", "1MiB", "0"} {
		if err := (Runtime{GCPercent: 100, MemoryLimit: text}).validate(); err == nil || !strings.Contains(err.Error(), "runtime.memoryLimit: must be") {
			t.Errorf("%q: got %v", text, err)
		}
	}
	for _, r := range []Runtime{{-1, "off"}, {-2, "90%"}, {0, "90%"}, {10_001, "90%"}} {
		if err := r.validate(); err == nil || !strings.Contains(err.Error(), "runtime.gcPercent: ") {
			t.Errorf("%+v: got %v", r, err)
		}
	}
	if err := (Runtime{-1, "1GiB"}).validate(); err != nil {
		t.Error(err)
	}
}

// TestTheRuntimesOwnVariablesWin over the file and over ours, but not over what is said on the command line.
func TestTheRuntimesOwnVariablesWin(t *testing.T) {
	file := smallest + "runtime: {gcPercent: 200, memoryLimit: 1GiB}\n"
	ours := []string{"KEYWARD_RUNTIME_GC_PERCENT=300", "KEYWARD_RUNTIME_MEMORY_LIMIT=50%"}
	gos := []string{"GOGC=50", "GOMEMLIMIT=3GiB"}
	for _, test := range []struct {
		text              string
		environ, settings []string
		want              Runtime
	}{
		{smallest, nil, nil, Runtime{400, "90%"}},
		{file, nil, nil, Runtime{200, "1GiB"}},
		{file, ours, nil, Runtime{300, "50%"}},
		{file, append(gos, ours...), nil, Runtime{50, "3GiB"}},
		{smallest, append(ours, gos...), nil, Runtime{50, "3GiB"}},
		{smallest, []string{"GOGC=off"}, nil, Runtime{-1, "90%"}},
		{smallest, []string{"GOMEMLIMIT=off", "GOGC="}, nil, Runtime{400, "off"}},
		{smallest, gos, []string{"runtime.gcPercent=100"}, Runtime{100, "3GiB"}},
	} {
		cfg, faults := load(t, test.text, test.environ, test.settings)
		if faults != nil || cfg.Runtime != test.want {
			t.Errorf("%v %v: got %+v, %q, want %+v", test.environ, test.settings, cfg, faults, test.want)
		}
	}
	if _, faults := load(t, smallest, []string{"GOGC=" + canary}, nil); len(faults) != 1 || faults[0] != "environment: GOGC: must be a whole number" {
		t.Errorf("got %q", faults)
	}
}

func TestMemorySettingsAreInForceAndSaid(t *testing.T) {
	percent, limit := debug.SetGCPercent(100), debug.SetMemoryLimit(-1)
	defer func() {
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(limit)
	}()
	for _, test := range []struct {
		r       Runtime
		environ []string
		says    []string
	}{
		{Runtime{400, "90%"}, nil, []string{"gcPercent=400 gcPercentFrom=default", `memoryLimitFrom="default, 90% of the `}},
		{Runtime{150, "1GiB"}, nil, []string{"gcPercent=150 gcPercentFrom=configuration", `memoryLimit="1024 MiB" memoryLimitFrom=configuration`}},
		{Runtime{50, "2GiB"}, []string{"GOGC=50", "GOMEMLIMIT=2GiB"}, []string{"gcPercentFrom=GOGC", `memoryLimit="2048 MiB" memoryLimitFrom=GOMEMLIMIT`}},
		{Runtime{100, "off"}, nil, []string{"memoryLimit=none"}},
		{Runtime{-1, "2GiB"}, []string{"GOGC=off", "GOMEMLIMIT="}, []string{"gcPercentFrom=GOGC", "memoryLimitFrom=configuration"}},
		// --set wins over the variables.
		{Runtime{100, "1GiB"}, []string{"GOGC=50", "GOMEMLIMIT=2GiB"}, []string{"gcPercentFrom=configuration", "memoryLimitFrom=configuration"}},
		{Runtime{400, "90%"}, []string{"GOGC=50", "GOMEMLIMIT=2GiB"}, []string{"gcPercentFrom=configuration", `memoryLimitFrom="configuration, 90% of the `}},
	} {
		var log bytes.Buffer
		test.r.apply(test.environ, slog.New(slog.NewTextHandler(&log, nil)))
		for _, want := range test.says {
			if !strings.Contains(log.String(), want) {
				t.Errorf("%+v: got %s, want %s", test.r, log.String(), want)
			}
		}
		if got := debug.SetGCPercent(test.r.GCPercent); got != test.r.GCPercent {
			t.Errorf("%+v: GOGC is %d", test.r, got)
		}
		got := debug.SetMemoryLimit(-1)
		switch l, _ := test.r.memoryLimit(); {
		case l.share > 0: // of whatever this machine has
			if got <= minMemoryLimit || got == math.MaxInt64 {
				t.Errorf("%+v: GOMEMLIMIT is %d", test.r, got)
			}
		default:
			if got != l.bytes {
				t.Errorf("%+v: GOMEMLIMIT is %d, want %d", test.r, got, l.bytes)
			}
		}
	}
}

// TestServeSaysWhatMemoryItMayTake: in the log, in config print, and in the metrics.
func TestServeSaysWhatMemoryItMayTake(t *testing.T) {
	t.Parallel()
	dir, at := t.TempDir(), newPorts()
	if err := os.WriteFile(dir+"/keyward.yaml", []byte(smallest+"runtime: {gcPercent: 150, memoryLimit: 1GiB}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeNewPrivate(dir+"/pepper", apikey.MarshalPepper(apikey.NewPepper(1, false))); err != nil {
		t.Fatal(err)
	}
	server, err := serve(dir, at, "--set", "runtime.memoryLimit=768MiB")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.kill)
	if want := `"msg":"memory","gcPercent":150,"gcPercentFrom":"configuration","memoryLimit":"768 MiB","memoryLimitFrom":"configuration"`; !strings.Contains(server.says(), want) {
		t.Errorf("got %s, want %s", server.says(), want)
	}
	metrics := readMetrics(t, at)
	if metrics["go_gc_gogc_percent"] != 150 || metrics["go_gc_gomemlimit_bytes"] != 768<<20 {
		t.Errorf("the metrics say %v%% and %v bytes", metrics["go_gc_gogc_percent"], metrics["go_gc_gomemlimit_bytes"])
	}
	code, out, problems := tested(t, "", "config", "print", "--config", dir+"/keyward.yaml")
	if code != exitOK || !strings.Contains(out, "runtime:\n  gcPercent: 150\n  memoryLimit: 1GiB\n") {
		t.Errorf("config print: %d, %s%s", code, out, problems)
	}
}
