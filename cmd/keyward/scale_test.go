package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
)

// keysPerInstance is the shipped cap.
const keysPerInstance = 1000

// scaleSecret is the secret of the nth key, always the same.
func scaleSecret(n int) string {
	const base62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	b := []byte("kwi_")
	random := sha256.Sum256(binary.BigEndian.AppendUint64([]byte("scale"), uint64(n)))
	for i := range 43 {
		b = append(b, base62[(int(random[i%32])+i)%62])
	}
	sum := crc32.ChecksumIEEE(b)
	var digits [6]byte
	for i := range digits {
		digits[5-i] = base62[sum%62]
		sum /= 62
	}
	return string(append(b, digits[:]...))
}

// scaleID is the id of the nth key: as UUIDv7 has it, later ones are greater.
func scaleID(n int) (id apikey.ID) {
	binary.BigEndian.PutUint64(id[:8], 0x0190_0000_0000_7000+uint64(n)<<16)
	random := sha256.Sum256(binary.BigEndian.AppendUint64([]byte("id"), uint64(n)))
	copy(id[8:], random[:8])
	return id
}

// fillStore makes a store of so many keys, each used at some time, past the store's own code: through that
// it would take a day.
func fillStore(ctx context.Context, path string, pepper *apikey.Pepper, keys int, progress func(string)) error {
	peppers := apikey.Peppers{Current: pepper}
	store, err := sqlite.Open(ctx, sqlite.Config{Path: path, Audit: admin.NewAuditKeys(peppers)})
	if err != nil {
		return err
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	unlimited := apikey.Limits{Rate: apikey.Rate{Requests: apikey.Unlimited}, MaxConcurrent: apikey.Unlimited}
	err = errors.Join(
		admin.OpenPeppers(ctx, store, peppers, "scale"),
		func() error {
			_, err := store.Update(ctx, func(tx admin.Tx) error {
				for n := range (keys + keysPerInstance - 1) / keysPerInstance {
					in := &apikey.Instance{ID: fmt.Sprintf("tenant-%05d", n), CreatedAt: now}
					in.Policy.Defaults.Instance = unlimited
					if err := tx.PutInstance(ctx, in); err != nil {
						return err
					}
				}
				return tx.Audit(ctx, admin.Event{At: now, Actor: "scale", Action: "test"})
			})
			return err
		}(),
		store.Close())
	if err != nil {
		return err
	}
	db, err := sql.Open("sqlite", "file:"+path+"?_pragma=journal_mode(OFF)&_pragma=synchronous(OFF)&_pragma=locking_mode(EXCLUSIVE)&_pragma=cache_size(-3000000)&_pragma=foreign_keys(0)")
	if err != nil {
		return err
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	// The indexes that can be made at the end are faster made then, and so are the counts that triggers keep.
	later, err := dropIndexes(ctx, db)
	if err != nil {
		return err
	}

	type found struct {
		digest apikey.Digest
		n      int32
	}
	all := make([]found, keys)
	var making sync.WaitGroup
	for part := range runtime.GOMAXPROCS(0) {
		making.Go(func() {
			for n := part; n < keys; n += runtime.GOMAXPROCS(0) {
				all[n] = found{pepper.Digest(scaleSecret(n)), int32(n)}
			}
		})
	}
	making.Wait()
	never := time.Time{}.UnixMicro()
	insert := func(table string, columns int, row func(n int, values []any) []any) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer func() { _ = tx.Rollback() }()
		const some = 100
		one := "(?" + strings.Repeat(",?", columns-1) + ")"
		many, err := tx.PrepareContext(ctx, "INSERT INTO "+table+" VALUES "+one+strings.Repeat(","+one, some-1))
		if err != nil {
			return err
		}
		defer many.Close()
		single, err := tx.PrepareContext(ctx, "INSERT INTO "+table+" VALUES "+one)
		if err != nil {
			return err
		}
		defer single.Close()
		var values []any
		for n := 0; n < keys; {
			values = values[:0]
			if keys-n >= some {
				for range some {
					values = row(n, values)
					n++
				}
				_, err = many.ExecContext(ctx, values...)
			} else {
				_, err = single.ExecContext(ctx, row(n, values)...)
				n++
			}
			if err != nil {
				return err
			}
			if n%1_000_000 == 0 {
				progress(fmt.Sprintf("%s: %d", table, n))
			}
		}
		return tx.Commit()
	}
	err = errors.Join(
		insert("keys", 25, func(n int, v []any) []any {
			id := scaleID(n)
			// The last use falls with n, but every thousandth key was used just now: what was used last lies
			// all over the table.
			used := now.Add(-time.Duration(n) * time.Second / 10)
			if n%1000 == 0 {
				used = now
			}
			return append(v, id[:], fmt.Sprintf("tenant-%05d", n/keysPerInstance), "instance", fmt.Sprintf("backend %d", n), "", "", "", "",
				`["orders:read","orders:write"]`, "null", "{}", now.Add(120*24*time.Hour).UnixMicro(), 0, never, "null", 0, never, "",
				now.UnixMicro()+int64(n), "token:0192f0c1-7a5e-7bcd-8123-0123456789ab", used.UnixMicro(), 1, never, never, never)
		}),
		insert("generations", 7, func(n int, v []any) []any {
			id := scaleID(n)
			secret := scaleSecret(n)
			return append(v, id[:], 1, "kwi_…"+secret[len(secret)-4:], now.UnixMicro(), never, never, false)
		}),
		func() error {
			slices.SortFunc(all, func(a, b found) int { return bytes.Compare(a.digest[:], b.digest[:]) })
			return insert("key_digests", 4, func(n int, v []any) []any {
				id := scaleID(int(all[n].n))
				return append(v, all[n].digest[:], id[:], 1, pepper.Version())
			})
		}())
	if err != nil {
		return err
	}
	if _, err := db.ExecContext(ctx, "INSERT INTO key_counts SELECT instance_id, '', '', count(*), count(*), 0, 0 FROM keys GROUP BY instance_id"); err != nil {
		return err
	}
	for name, statement := range later {
		progress(name)
		if _, err := db.ExecContext(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}

// dropIndexes drops the indexes of keys that no constraint needs, and its triggers, and returns the statements
// that make them.
func dropIndexes(ctx context.Context, db *sql.DB) (map[string]string, error) {
	rows, err := db.QueryContext(ctx, `SELECT type || ' ' || name, sql FROM sqlite_schema WHERE type IN ('index', 'trigger') AND tbl_name = 'keys' AND sql IS NOT NULL`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	all := map[string]string{}
	for rows.Next() {
		var name, statement string
		if err := rows.Scan(&name, &statement); err != nil {
			return nil, err
		}
		all[name] = statement
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	_ = rows.Close() // before the tables change under it
	for name := range all {
		if _, err := db.ExecContext(ctx, "DROP "+name); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// passThrough is a codec for messages that are bytes already.
type passThrough struct{}

func (passThrough) Name() string { return "proto" }
func (passThrough) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}
func (passThrough) Unmarshal(b mem.BufferSlice, v any) error {
	*v.(*[]byte) = b.Materialize()
	return nil
}

// An answered is one request of a load: when it was due, and how long its answer took from then.
type answered struct {
	due  time.Time
	took time.Duration
}

// loadAt asks about keys at a fixed rate, whatever the answers take, over 4 connections, and returns what
// was measured. secretOf names the secret of the nth request.
func loadAt(address string, rate int, length time.Duration, secretOf func(n int) string) ([]answered, error) {
	var conns [4]*grpc.ClientConn
	for i := range conns {
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.ForceCodecV2(passThrough{})))
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		conns[i] = conn
	}
	const placeholder = "SECRET-OF-53-CHARACTERS-THAT-EVERY-REQUEST-REPLACES--"
	template, err := proto.Marshal(checkRequest(placeholder, http.MethodGet, "/orders"))
	if err != nil {
		return nil, err
	}
	at := bytes.Index(template, []byte(placeholder))
	total := rate * int(length/time.Second)
	all := make([]answered, total)
	begin := time.Now().Add(10 * time.Millisecond)
	var next atomic.Int64
	var failed atomic.Pointer[error]
	var asking sync.WaitGroup
	for worker := range 256 { // more than ever wait: whoever is late is asked about late, and counts as such
		asking.Go(func() {
			request := bytes.Clone(template)
			for failed.Load() == nil {
				n := int(next.Add(1)) - 1
				if n >= total {
					return
				}
				due := begin.Add(time.Duration(n) * time.Second / time.Duration(rate))
				time.Sleep(time.Until(due))
				request = bytes.Clone(request)
				copy(request[at:], secretOf(n))
				var answer []byte
				err := conns[worker%len(conns)].Invoke(context.Background(), "/envoy.service.auth.v3.Authorization/Check", request, &answer)
				if err == nil && bytes.Contains(answer, []byte("keyward.denied")) {
					err = errors.New("a good key was refused")
				}
				if err != nil {
					failed.CompareAndSwap(nil, &err)
					return
				}
				all[n] = answered{due, time.Since(due)}
			}
		})
	}
	asking.Wait()
	if err := failed.Load(); err != nil {
		return nil, *err
	}
	return all, nil
}

// percentile of what took how long; all of it is at least one.
func percentile(all []answered, p float64) time.Duration {
	took := make([]time.Duration, len(all))
	for i, a := range all {
		took[i] = a.took
	}
	slices.Sort(took)
	return took[min(len(took)-1, int(p*float64(len(took))))]
}

// cpuOf returns the processor time that a process has used.
func cpuOf(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+2:]))
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2)
}

// collect makes a process collect its garbage, and returns how long that took.
func collect(at ports) (time.Duration, error) {
	begin := time.Now()
	resp, err := http.Get("http://" + at.metrics + "/debug/pprof/heap?gc=1")
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return time.Since(begin), errors.Join(err, resp.Body.Close())
}

// metricsOf reads the metrics that have no labels.
func metricsOf(at ports) (map[string]float64, error) {
	resp, err := http.Get("http://" + at.metrics + "/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	values := map[string]float64{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, text, _ := strings.Cut(lines.Text(), " ")
		if value, err := strconv.ParseFloat(text, 64); err == nil {
			values[name] = value
		}
	}
	return values, lines.Err()
}

func envNumber(b *testing.B, name string, otherwise int) int {
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		b.Fatalf("%s=%s: must be a number from 1", name, text)
	}
	return n
}

// BenchmarkStateAtScale measures keyward on a store of KEYS keys (100,000), of which up to CACHED (one
// million) are in memory: how long it takes to be ready, what memory they take, what a request costs, and
// how long it takes quietly and while garbage is collected, at RATE (5,000) requests a second. It makes the
// store in a folder of its own, or in STATE, which it then leaves behind with secrets.txt, one secret a
// line, for keyward bench. With DOC it writes the table into that file, between the scale markers.
func BenchmarkStateAtScale(b *testing.B) {
	keys, rate := envNumber(b, "KEYS", 100_000), envNumber(b, "RATE", 5000)
	cached := min(keys, envNumber(b, "CACHED", 1_000_000))
	length := time.Duration(envNumber(b, "SECONDS", 10)) * time.Second
	loadedBefore, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		b.Fatal(err)
	}
	begin := time.Now()
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%6.1fs  %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
	}
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	dir := cmp.Or(os.Getenv("STATE"), b.TempDir())
	must(os.MkdirAll(dir, 0o700))
	database := filepath.Join(dir, "keyward.db")
	must(os.WriteFile(filepath.Join(dir, "keyward.yaml"), []byte(smallest+"log: {decisionsPerSecond: 0}\n"), 0o600))
	if _, err := os.Stat(filepath.Join(dir, "secrets.txt")); err != nil { // it is written last
		pepper := apikey.NewPepper(1, false)
		_ = os.Remove(database)
		_ = os.Remove(filepath.Join(dir, "pepper"))
		must(os.WriteFile(filepath.Join(dir, "pepper"), apikey.MarshalPepper(pepper), 0o600))
		must(fillStore(b.Context(), database, pepper, keys, func(what string) { say("%s", what) }))
		file, err := os.OpenFile(filepath.Join(dir, "secrets.txt"), os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
		must(err)
		w := bufio.NewWriter(file)
		for n := range keys {
			fmt.Fprintln(w, scaleSecret(n))
		}
		must(errors.Join(w.Flush(), file.Close()))
	}
	info, err := os.Stat(database)
	must(err)
	say("store of %d keys, %d MB", keys, info.Size()>>20)

	started := time.Now()
	at := newPorts()
	server, err := start(dir, at.env(), "serve", "--config", "keyward.yaml",
		"--set", "cache.records="+strconv.Itoa(max(cached, 1)), "--set", "cache.warmUp=10m")
	must(err)
	b.Cleanup(server.kill)
	for statusIs("http://"+at.metrics+"/readyz", http.StatusOK) != nil {
		select {
		case <-server.done:
			b.Fatal(server.says())
		case <-time.After(10 * time.Millisecond):
		}
	}
	ready := time.Since(started)
	pid := server.cmd.Process.Pid
	startCPU, err := cpuOf(pid)
	must(err)
	metrics := func() map[string]float64 {
		m, err := metricsOf(at)
		must(err)
		return m
	}
	m := metrics()
	known, warm := m["keyward_cache_known_load_seconds"], m["keyward_cache_warm_up_seconds"]
	if got := int(m["keyward_cache_warm_up_records"]); got != cached {
		b.Fatalf("%d keys are in memory, want %d", got, cached)
	}
	say("ready after %v", ready)
	_, err = collect(at)
	must(err)
	cycle, err := collect(at)
	must(err)
	m = metrics()
	rss, heap, objects := m["process_resident_memory_bytes"], m["go_memstats_heap_alloc_bytes"], m["go_memstats_heap_objects"]

	// The keys that the cache has loaded, which are those that were used last: see fillStore.
	var held []int
	for n := 0; n < keys && len(held) < cached; n += 1000 {
		held = append(held, n)
	}
	for n := 0; n < keys && len(held) < cached; n++ {
		if n%1000 != 0 {
			held = append(held, n)
		}
	}
	spread := func(n, among int) string { // evenly over the first so many
		return scaleSecret(held[int((uint64(n)*0x9E3779B97F4A7C15)>>33)%among])
	}
	type measured struct {
		p50, p99, p999, cpu time.Duration // the last a request
	}
	run := func(among int, collecting bool) measured {
		b.Helper()
		_, err := loadAt(at.check, rate, time.Second, func(n int) string { return spread(n, among) }) // connections, pools
		must(err)
		stop, stopped := make(chan struct{}), make(chan struct{})
		var cycles [][2]time.Time
		go func() {
			defer close(stopped)
			for collecting {
				select {
				case <-stop:
					return
				default:
				}
				begin := time.Now()
				if _, err := collect(at); err != nil {
					return // it shows in what was measured
				}
				cycles = append(cycles, [2]time.Time{begin, time.Now()})
			}
		}()
		before, err := cpuOf(pid)
		must(err)
		all, err := loadAt(at.check, rate, length, func(n int) string { return spread(n, among) })
		must(err)
		after, err := cpuOf(pid)
		must(err)
		close(stop)
		<-stopped
		if collecting && len(cycles) == 0 {
			b.Fatal("no cycle ended: SECONDS is too small")
		}
		return measured{percentile(all, .5), percentile(all, .99), percentile(all, .999), (after - before) / time.Duration(len(all))}
	}
	few := min(1000, cached)
	var hot, wide, collected []measured
	for round := range 3 { // interleaved: this machine has other work
		hot, wide = append(hot, run(few, false)), append(wide, run(cached, false))
		collected = append(collected, run(cached, true))
		say("round %d: %d keys %v, %d keys %v, collecting %v", round+1, few, hot[round], cached, wide[round], collected[round])
	}
	median := func(of []measured, what func(measured) time.Duration) time.Duration {
		all := make([]time.Duration, len(of))
		for i, one := range of {
			all[i] = what(one)
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	row := func(what string, of []measured) string {
		us := func(f func(measured) time.Duration) string {
			return strconv.FormatInt(median(of, f).Microseconds(), 10)
		}
		return fmt.Sprintf("| %s | %s | %s | %s | %s |\n", what, us(func(m measured) time.Duration { return m.p50 }),
			us(func(m measured) time.Duration { return m.p99 }), us(func(m measured) time.Duration { return m.p999 }),
			us(func(m measured) time.Duration { return m.cpu }))
	}
	gogc := m["go_gc_gogc_percent"]
	load, _, _ := strings.Cut(string(loadedBefore), " ")
	var table strings.Builder
	fmt.Fprintf(&table, "`SCALE_KEYS=%d make bench-scale`, %s, %s/%s, %d processors, GOGC %v, on %s. The machine's load average was %s before it began. Median of 3 interleaved rounds of %v at %d requests/s.\n\n",
		keys, runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), gogc, time.Now().UTC().Format(time.DateOnly), load, length, rate)
	fmt.Fprintf(&table, "| keys in the store, in memory | %d, %d |\n| --- | --- |\n", keys, cached)
	for _, line := range [][2]string{
		{"database file", fmt.Sprintf("%d MB", info.Size()>>20)},
		{"start until ready", fmt.Sprintf("%.1f s (%.1f s of processor time): known digests %.1f s, warm-up %.1f s", ready.Seconds(), startCPU.Seconds(), known, warm)},
		{"resident memory", fmt.Sprintf("%.0f MB", rss/(1<<20))},
		{"heap after a collection", fmt.Sprintf("%.0f MB in %.1f million objects", heap/(1<<20), objects/1e6)},
		{"a garbage collection, without traffic", fmt.Sprintf("%.2f s", cycle.Seconds())},
	} {
		fmt.Fprintf(&table, "| %s | %s |\n", line[0], line[1])
	}
	fmt.Fprintf(&table, "\n| asked for | p50 µs | p99 µs | p99.9 µs | CPU µs a request |\n| --- | --- | --- | --- | --- |\n")
	table.WriteString(row(fmt.Sprintf("%d keys", few), hot) + row(fmt.Sprintf("%d keys", cached), wide) +
		row(fmt.Sprintf("%d keys, collecting garbage all the time", cached), collected))
	fmt.Print(table.String())
	if doc := os.Getenv("DOC"); doc != "" {
		must(writeBetween(doc, "<!-- scale:begin -->\n", "<!-- scale:end -->\n", table.String()))
	}
}

// writeBetween replaces what stands between two markers in a file.
func writeBetween(file, begin, end, text string) error {
	old, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(old), begin)
	_, after, found := strings.Cut(rest, end)
	if !ok || !found {
		return fmt.Errorf("%s has no %s", file, strings.TrimSpace(begin))
	}
	return os.WriteFile(file, []byte(before+begin+text+end+after), 0o600)
}
