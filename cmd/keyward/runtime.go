package main

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/KimMachineGun/automemlimit/memlimit"

	"keyward/authz/apikey"
)

// Runtime says how Go's runtime uses memory. The runtime's own variables GOGC and GOMEMLIMIT say the same,
// and win over the file and over KEYWARD_RUNTIME_….
type Runtime struct {
	// GCPercent is how much garbage may come beside what lives before it is collected: GOGC. -1: no
	// collection until the memory limit. More is less processor time and more memory.
	GCPercent int `yaml:"gcPercent"`
	// MemoryLimit is near where garbage is collected more often instead of taking more: GOMEMLIMIT. A
	// percentage of what the process may have (its container's memory, else the machine's), a size such as
	// 2GiB, or off.
	MemoryLimit string `yaml:"memoryLimit"`
}

// runtimeEnv are the runtime's own variables, by the fields that they set.
var runtimeEnv = map[string]string{"GOGC": "runtime.gcPercent", "GOMEMLIMIT": "runtime.memoryLimit"}

// runtimeValue translates what the runtime's variables say and ours do not.
func runtimeValue(name, value string) string {
	if name == "GOGC" && value == "off" {
		return "-1"
	}
	return value
}

func (r Runtime) validate() error {
	var faults []error
	limit, err := r.memoryLimit()
	if err != nil {
		faults = append(faults, err)
	}
	switch {
	case r.GCPercent < -1 || r.GCPercent == 0 || r.GCPercent > 10_000:
		faults = append(faults, apikey.Invalid("runtime.gcPercent", "must be from 1 to 10000, such as 100 (Go's own default), or -1 for no collection until the memory limit"))
	case err == nil && r.GCPercent == -1 && limit == noMemoryLimit:
		faults = append(faults, apikey.Invalid("runtime.gcPercent", "-1 needs runtime.memoryLimit, or memory would grow until the system ends the process"))
	}
	return errors.Join(faults...)
}

// A memoryLimit is a share of what there is, or a number of bytes.
type memoryLimit struct {
	share float64 // 0: bytes counts
	bytes int64
}

var noMemoryLimit = memoryLimit{bytes: math.MaxInt64}

func (r Runtime) memoryLimit() (memoryLimit, error) {
	wrong := apikey.Invalid("runtime.memoryLimit", "must be a percentage from 1% to 100%, a size such as 512MiB or 2GiB, or off")
	if r.MemoryLimit == "off" {
		return noMemoryLimit, nil
	}
	if percent, ok := strings.CutSuffix(r.MemoryLimit, "%"); ok {
		n, err := strconv.ParseUint(percent, 10, 8)
		if err != nil || n < 1 || n > 100 {
			return memoryLimit{}, wrong
		}
		return memoryLimit{share: float64(n) / 100}, nil
	}
	// As the runtime reads GOMEMLIMIT.
	number, unit := r.MemoryLimit, int64(1)
	for i, suffix := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if rest, ok := strings.CutSuffix(number, suffix); ok {
			number, unit = rest, int64(1)<<(10*(i+1))
			break
		}
	}
	n, err := strconv.ParseInt(strings.TrimSuffix(number, "B"), 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/unit {
		return memoryLimit{}, wrong
	}
	if n*unit < minMemoryLimit {
		return memoryLimit{}, apikey.Invalid("runtime.memoryLimit", "must be at least 32MiB: below what keyward needs, it would do nothing but collect garbage")
	}
	return memoryLimit{bytes: n * unit}, nil
}

const minMemoryLimit = 32 << 20 // bytes

// apply puts both in force and says so, with where they come from. The runtime has taken its own variables
// by then; they are applied once more, to the same effect.
func (r Runtime) apply(environ []string, log *slog.Logger) {
	env := map[string]string{}
	for _, entry := range environ {
		name, value, _ := strings.Cut(entry, "=")
		env[name] = runtimeValue(name, value)
	}
	from := func(variable, inForce, byDefault string) string {
		switch value := env[variable]; {
		case value != "" && value == inForce:
			return variable
		case value == "" && inForce == byDefault:
			return "default"
		}
		return "configuration" // also what --set says instead of the variable
	}
	shipped := defaultConfig().Runtime
	limit, _ := r.memoryLimit() // validated
	of := ""
	if limit.share > 0 {
		limit.bytes, of = share(limit.share)
	}
	debug.SetGCPercent(r.GCPercent)
	debug.SetMemoryLimit(limit.bytes)
	shown := "none"
	if limit.bytes != math.MaxInt64 {
		shown = fmt.Sprintf("%d MiB", limit.bytes>>20)
	}
	log.Info("memory", "gcPercent", r.GCPercent, "gcPercentFrom", from("GOGC", strconv.Itoa(r.GCPercent), strconv.Itoa(shipped.GCPercent)),
		"memoryLimit", shown, "memoryLimitFrom", from("GOMEMLIMIT", r.MemoryLimit, shipped.MemoryLimit)+of)
}

// share returns a share of the memory that the process may have, and says of what.
func share(part float64) (int64, string) {
	for _, source := range []struct {
		ask  func() (uint64, error)
		name string
	}{{memlimit.FromCgroup, "the container's memory"}, {memlimit.FromSystem, "the machine's memory"}} {
		if all, err := source.ask(); err == nil && all > 0 && all < math.MaxInt64 {
			return max(int64(part*float64(all)), minMemoryLimit), fmt.Sprintf(", %.0f%% of %s", 100*part, source.name)
		}
	}
	return math.MaxInt64, ", neither container nor machine says how much there is"
}
