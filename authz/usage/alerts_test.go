package usage_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/storetest"
	"keyward/authz/usage"
)

// A watch is an engine over a store in memory, inside a bubble.
type watch struct {
	t      *testing.T
	store  *storetest.Memory
	engine *usage.Alerts
	log    *bytes.Buffer
	reg    *prometheus.Registry
	stop   func()
	keep   time.Duration // of resolved alerts; 0: as usual
	quiet  bool          // no webhook is configured
}

const home = "home"

func newWatch(t *testing.T, policy apikey.Alerts) *watch {
	t.Helper()
	w := &watch{t: t, store: storetest.NewMemory(admin.AuditKeys{})}
	t.Cleanup(func() { _ = w.store.Close() })
	w.policy(policy)
	w.start("one")
	return w
}

func (w *watch) start(holder string) {
	w.log, w.reg = new(bytes.Buffer), prometheus.NewRegistry()
	w.engine = usage.NewAlerts(w.store, usage.AlertsConfig{Notify: !w.quiet, Holder: holder, Keep: w.keep}, w.reg, slog.New(slog.NewTextHandler(w.log, nil)))
	ctx, cancel := context.WithCancel(context.WithoutCancel(w.t.Context()))
	done := make(chan error)
	time.Sleep(30 * time.Second)
	go func() { done <- w.engine.Run(ctx) }()
	w.stop = func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	}
	// What the test does is never at the very instant at which an engine looks, and before its look of that minute.
	synctest.Wait()
	time.Sleep(33 * time.Second)
}

func (w *watch) policy(alerts apikey.Alerts) {
	w.t.Helper()
	w.update(func(tx admin.Tx) error {
		return tx.PutInstance(w.t.Context(), &apikey.Instance{ID: home, Policy: apikey.Policy{Alerts: alerts}, CreatedAt: time.Now()})
	})
}

func (w *watch) update(fn func(tx admin.Tx) error) {
	w.t.Helper()
	_, err := w.store.Update(w.t.Context(), func(tx admin.Tx) error {
		return errors.Join(tx.Audit(w.t.Context(), admin.Event{At: time.Now(), Action: "test"}), fn(tx))
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// key adds a key made now.
func (w *watch) key(n byte, change func(k *apikey.Key)) *apikey.Key {
	w.t.Helper()
	k := &apikey.Key{ID: apikey.ID{1, 15: n}, InstanceID: home, Type: apikey.TypeInstance, Name: fmt.Sprint("key ", n), CreatedAt: time.Now(), CreatedBy: "token:x"}
	if change != nil {
		change(k)
	}
	w.update(func(tx admin.Tx) error { return tx.InsertKey(w.t.Context(), k) })
	return k
}

// used tells the engine, as the counter does, that a key was used from networks.
func (w *watch) used(k *apikey.Key, networks ...string) {
	w.t.Helper()
	u := admin.Usage{InstanceID: home, KeyID: k.ID, Start: time.Now(), UsageCounts: admin.UsageCounts{Allowed: 1, Networks: map[string]int64{}}}
	for _, n := range networks {
		u.Networks[n] = 1
	}
	if err := w.store.Touch(w.t.Context(), []apikey.Use{{KeyID: k.ID, At: time.Now()}}); err != nil {
		w.t.Fatal(err)
	}
	w.count(u)
}

func (w *watch) count(u ...admin.Usage) {
	w.t.Helper()
	if err := w.store.AddUsage(w.t.Context(), admin.UsageBatch{}, u); err != nil {
		w.t.Fatal(err)
	}
	w.engine.Counted(w.t.Context(), u)
}

// refused counts refusals of a key, by this replica or, unheard, by another.
func (w *watch) refused(instance string, key apikey.ID, reason string, n int64) admin.Usage {
	return admin.Usage{InstanceID: instance, KeyID: key, Start: time.Now(), UsageCounts: admin.UsageCounts{Refused: n, Reasons: map[string]int64{reason: n}}}
}

// alerts lists kind, subject and state, those opened first first.
func (w *watch) alerts() (list []string) {
	w.t.Helper()
	synctest.Wait()
	all, err := w.store.Alerts(w.t.Context(), admin.AlertQuery{Everywhere: true, Limit: 10_000})
	if err != nil {
		w.t.Fatal(err)
	}
	slices.Reverse(all)
	for _, a := range all {
		text := string(a.Kind)
		if a.InstanceID == "" {
			text = "nowhere " + text
		}
		if a.KeyID.IsZero() {
			text = "all " + text
		}
		if a.Subject != "" {
			text += " " + a.Subject
		}
		if !a.ResolvedAt.IsZero() {
			text += " resolved"
		}
		list = append(list, text)
	}
	return list
}

func (w *watch) want(when string, want ...string) {
	w.t.Helper()
	if diff := cmp.Diff(want, w.alerts()); diff != "" {
		w.t.Errorf("%s: alerts (-want +got)\n%s\n%s", when, diff, w.log)
	}
}

func inBubble(t *testing.T, policy apikey.Alerts, test func(t *testing.T, w *watch)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatch(t, policy)
		defer func() { w.stop() }()
		test(t, w)
	})
}

const (
	office, cafe = "192.0.2.0/24", "198.51.100.0/24"
	tick         = 10 * time.Second // in which every engine looks once
	day          = 24 * time.Hour
)

func TestNewNetwork(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		k := w.key(1, nil)
		w.used(k, office)
		time.Sleep(tick)
		w.want("the first network")
		w.used(k, office, cafe, admin.OtherNetworks)
		time.Sleep(tick)
		w.want("the second", "newNetwork "+cafe)
		for range 20 {
			time.Sleep(time.Hour)
			w.used(k, office, cafe)
		}
		w.want("both go on", "newNetwork "+cafe)

		// A restart knows what was learnt.
		w.stop()
		w.start("two")
		w.used(k, office, cafe)
		time.Sleep(tick)
		w.want("after a restart", "newNetwork "+cafe)

		time.Sleep(8 * day)
		w.want("a week later", "newNetwork "+cafe+" resolved")
		w.used(k, cafe)
		time.Sleep(tick)
		w.want("it stays known", "newNetwork "+cafe+" resolved")
	})
}

func TestNetworksOfLongAgoAreForgotten(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		k := w.key(1, nil)
		last := time.Now().Add(-399 * day)
		if err := w.store.LearnNetworks(t.Context(), []admin.KeyNetwork{{KeyID: k.ID, Network: cafe, FirstAt: last, LastAt: last}}); err != nil {
			t.Fatal(err)
		}
		for range 26 {
			time.Sleep(time.Hour)
			w.used(k, office) // after the first time it is known
		}
		w.want("399 days later", "newNetwork "+office)
		w.used(k, cafe)
		time.Sleep(tick)
		w.want("400 days later", "newNetwork "+office, "newNetwork "+cafe)
	})
}

func TestNetworksOfAnOldKeyAreLearntForADay(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		old := w.key(1, func(k *apikey.Key) { k.CreatedAt = k.CreatedAt.Add(-30 * day) })
		imported := w.key(2, func(k *apikey.Key) { k.CreatedBy = admin.ImportedBy + "token:x" })
		for _, k := range []*apikey.Key{old, imported} {
			w.used(k, office)
		}
		for n := range 20 {
			time.Sleep(time.Hour)
			w.used(old, fmt.Sprintf("10.0.%d.0/24", n))
			w.used(imported, fmt.Sprintf("10.0.%d.0/24", n))
		}
		w.want("within a day")
		time.Sleep(5 * time.Hour)
		w.used(old, cafe)
		w.used(imported, cafe)
		time.Sleep(tick)
		w.want("after a day", "newNetwork "+cafe, "newNetwork "+cafe)
	})
}

func TestManyNewNetworksAreFewAlerts(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		k := w.key(1, nil)
		w.used(k, office)
		time.Sleep(tick)
		for n := range 100 {
			w.used(k, fmt.Sprintf("10.0.%d.0/24", n))
			time.Sleep(tick)
		}
		got := w.alerts()
		if len(got) != 9 || !slices.Contains(got, "newNetwork other") {
			t.Errorf("100 new networks of a key: got %v", got)
		}
	})
}

func TestNewNetworkIsResolvedWhenItIsAcked(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		k := w.key(1, nil)
		w.used(k, office)
		time.Sleep(tick)
		w.used(k, cafe)
		time.Sleep(tick)
		all, _ := w.store.Alerts(t.Context(), admin.AlertQuery{Everywhere: true, Limit: 1})
		w.update(func(tx admin.Tx) error {
			a := *all[0]
			a.AckedAt, a.AckedBy, a.ResolvedAt = time.Now(), "token:x", time.Now()
			return tx.AckAlert(t.Context(), &a)
		})
		w.used(k, cafe)
		time.Sleep(time.Hour)
		w.want("acked", "newNetwork "+cafe+" resolved")
	})
}

func TestSurgeOfRefusals(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		k := w.key(1, nil)
		steady := func(minutes int, n int64) {
			for range minutes {
				w.count(w.refused(home, k.ID, "limit_burst", n), w.refused(home, apikey.ID{}, "limit_burst", n))
				time.Sleep(time.Minute)
			}
		}
		steady(90, 15) // 75 within 5 minutes: usual, and below what is worth a look
		w.want("what is usual")
		steady(5, 30) // 150, twice as many
		w.want("somewhat more")
		steady(5, 120) // 600
		if got := w.alerts(); !slices.Contains(got, "refusals") {
			t.Fatalf("a surge: got %v", got)
		}
		steady(60, 120)
		w.want("it goes on", "refusals", "all refusals")
		all, _ := w.store.Alerts(t.Context(), admin.AlertQuery{Everywhere: true, KeyID: k.ID, Limit: 9})
		if a := all[0]; a.Count < 50 || time.Since(a.SeenAt) > 2*time.Minute || !strings.Contains(a.Message, "requests were refused within 5m, and it goes on") || !strings.Contains(a.Message, "limit_burst") {
			t.Errorf("the alert: %+v", a)
		}
		time.Sleep(25 * time.Minute)
		w.want("it is over", "refusals resolved", "all refusals resolved")
		opened := strings.Count(w.log.String(), "alert opened")
		if resolved := strings.Count(w.log.String(), "alert resolved"); opened != 2 || resolved != 2 {
			t.Errorf("log: %d opened, %d resolved\n%s", opened, resolved, w.log)
		}
	})
}

// What one replica hears is little; what all have written is a surge.
func TestSurgeIsTheStoresNotOneReplicas(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		k := w.key(1, nil)
		if err := w.store.AddUsage(t.Context(), admin.UsageBatch{}, []admin.Usage{w.refused(home, k.ID, "revoked", 99)}); err != nil {
			t.Fatal(err)
		}
		w.count(w.refused(home, k.ID, "revoked", 1))
		time.Sleep(time.Minute + tick)
		w.want("100 by two replicas", "refusals")
	})
}

func TestUnknownKeyFlood(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		w.count(w.refused("", apikey.ID{}, "unknown_key", 99), w.refused(home, apikey.ID{}, "bad_checksum", 99))
		time.Sleep(4 * time.Minute)
		w.want("a few")
		for range 10 {
			w.count(w.refused("", apikey.ID{}, "unknown_key", 50), w.refused("", apikey.ID{}, "malformed_credential", 50),
				w.refused(home, apikey.ID{}, "bad_checksum", 1000))
			time.Sleep(time.Minute)
		}
		got := w.alerts()
		slices.Sort(got)
		want := []string{"all nowhere unknownKeys", "all unknownKeys"} // and no surge of refusals besides
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("a flood (-want +got)\n%s", diff)
		}
		time.Sleep(10 * time.Minute)
		for _, a := range w.alerts() {
			if !strings.HasSuffix(a, "resolved") {
				t.Errorf("%s: it has stopped", a)
			}
		}
	})
}

func TestExpiring(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		end := time.Now().Add(30 * day)
		with := func(k *apikey.Key) { k.ExpirationDate = end }
		k, extended, revoked := w.key(1, with), w.key(2, with), w.key(3, with)
		w.key(4, with) // nobody uses it
		w.key(5, func(k *apikey.Key) { k.ExpirationDate = end; k.Disabled = true })
		w.key(6, nil)
		for _, one := range []*apikey.Key{k, extended, revoked} {
			w.used(one, office)
		}
		time.Sleep(15 * day)
		if got := w.alerts(); slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "expiring") }) {
			t.Fatalf("15 days before: %v", got)
		}
		w.policy(apikey.Alerts{Unused: apikey.UnusedKeyAlerts{Disabled: true}})
		time.Sleep(day + 2*time.Hour)
		before := w.alerts()
		if got := len(slices.DeleteFunc(before, func(s string) bool { return s != "expiring 14d" })); got != 3 {
			t.Errorf("14 days before: %v", w.alerts())
		}
		w.update(func(tx admin.Tx) error {
			e, r := *extended, *revoked
			e.ExpirationDate, r.RevokedAt = end.Add(60*day), time.Now()
			return errors.Join(tx.UpdateKey(t.Context(), &e), tx.UpdateKey(t.Context(), &r))
		})
		expiring := func() (list []string) {
			all, _ := w.store.Alerts(t.Context(), admin.AlertQuery{Everywhere: true, Kind: admin.AlertExpiring, Limit: 99})
			slices.Reverse(all)
			for _, a := range all {
				list = append(list, fmt.Sprintf("%d %s %v", a.KeyID[15], a.Subject, a.ResolvedAt.IsZero()))
			}
			slices.Sort(list)
			return list
		}
		want := func(when string, want ...string) {
			t.Helper()
			synctest.Wait()
			if diff := cmp.Diff(want, expiring()); diff != "" {
				t.Errorf("%s (-want +got)\n%s", when, diff)
			}
		}
		time.Sleep(2 * time.Minute)
		want("extended and revoked", "1 14d true", "2 14d false", "3 14d false")
		time.Sleep(11 * day)
		want("3 days before", "1 14d false", "1 3d true", "2 14d false", "3 14d false")
		time.Sleep(2 * day)
		want("the day before", "1 14d false", "1 1d true", "1 3d false", "2 14d false", "3 14d false")
		time.Sleep(day)
		want("expired", "1 14d false", "1 1d false", "1 3d false", "2 14d false", "3 14d false")
	})
}

func TestUnused(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		k, late := w.key(1, nil), w.key(2, nil)
		w.key(3, func(k *apikey.Key) { k.Disabled = true })
		w.used(k, office)
		time.Sleep(14*day + 2*time.Hour)
		w.want("never used", "unused neverUsed")
		w.used(late, office)
		time.Sleep(2 * time.Minute)
		w.want("used at last", "unused neverUsed resolved")
		time.Sleep(46*day + 2*time.Hour)
		w.want("idle", "unused neverUsed resolved", "unused idle")
		for range 3 {
			w.stop()
			w.start("again")
		}
		w.want("after restarts", "unused neverUsed resolved", "unused idle")
		w.used(k, office)
		time.Sleep(2 * time.Minute)
		w.want("used again", "unused neverUsed resolved", "unused idle resolved")
		// Resolved ones are forgotten when they are old.
		w.stop()
		w.keep = day
		w.start("tidy")
		time.Sleep(day - 5*time.Minute)
		w.want("a day later", "unused idle resolved")
		time.Sleep(2 * time.Hour)
		w.want("more than a day later")
	})
}

func TestKindsCanBeSwitchedOff(t *testing.T) {
	off := apikey.Alerts{
		NewNetwork: apikey.NewNetworkAlerts{Disabled: true}, Refusals: apikey.RefusalAlerts{Disabled: true}, UnknownKeys: apikey.UnknownKeyAlerts{Disabled: true},
		Expiring: apikey.ExpiringKeyAlerts{Disabled: true}, Unused: apikey.UnusedKeyAlerts{Disabled: true},
	}
	everything := func(w *watch) {
		k := w.key(byte(time.Now().Unix()), func(k *apikey.Key) { k.ExpirationDate = time.Now().Add(day) })
		w.key(byte(time.Now().Unix())+1, func(k *apikey.Key) { k.CreatedAt = time.Now().Add(-400 * day) })
		w.used(k, office)
		time.Sleep(tick)
		w.used(k, cafe)
		w.count(w.refused(home, k.ID, "limit_burst", 1000), w.refused(home, apikey.ID{}, "limit_burst", 1000), w.refused(home, apikey.ID{}, "unknown_key", 1000))
		time.Sleep(time.Hour + time.Minute)
	}
	inBubble(t, off, func(t *testing.T, w *watch) {
		everything(w)
		w.want("all off")
	})
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		everything(w)
		metrics := map[string]float64{}
		families, err := w.reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				metrics[f.GetName()+" "+m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
		for kind, want := range map[string]float64{"newNetwork": 1, "refusals": 2, "unknownKeys": 1, "expiring": 1, "unused": 1} {
			if opened, open := metrics["keyward_alerts_opened_total "+kind], metrics["keyward_alerts_open "+kind]; opened != want || open != want && kind != "refusals" && kind != "unknownKeys" {
				t.Errorf("%s: %v opened, %v open, want %v", kind, opened, open, want)
			}
		}
		got := w.alerts()
		if len(got) != 6 { // of the key and of the instance
			t.Fatalf("all on: got %v", got)
		}
		w.policy(off)
		time.Sleep(2 * time.Minute)
		for _, a := range w.alerts() {
			if !strings.HasSuffix(a, "resolved") {
				t.Errorf("switched off: %s", a)
			}
		}
	})
}

// Two replicas that see the same open one alert.
func TestTwoReplicasOpenOneAlert(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		other := &watch{t: t, store: w.store}
		other.start("two")
		defer other.stop()
		k := w.key(1, nil)
		w.used(k, office)
		time.Sleep(tick)
		for range 3 {
			w.used(k, cafe)
			other.used(k, cafe)
			w.count(w.refused(home, k.ID, "limit_burst", 500))
			other.count(w.refused(home, k.ID, "limit_burst", 500), w.refused("", apikey.ID{}, "unknown_key", 500))
			w.count(w.refused("", apikey.ID{}, "unknown_key", 500))
			time.Sleep(time.Minute)
		}
		got := w.alerts()
		slices.Sort(got)
		if diff := cmp.Diff([]string{"all nowhere unknownKeys", "newNetwork " + cafe, "refusals"}, got); diff != "" {
			t.Errorf("alerts (-want +got)\n%s", diff)
		}
	})
}

func TestNoticesOfAlerts(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		k := w.key(1, nil)
		w.used(k, office)
		time.Sleep(tick)
		w.used(k, cafe)
		time.Sleep(tick)
		time.Sleep(7*day + time.Hour)
		due, err := w.store.DueNotices(t.Context(), time.Now(), 10)
		if err != nil || len(due) != 2 {
			t.Fatalf("got %d notices, error %v", len(due), err)
		}
		for i, want := range []admin.NoticeType{admin.NoticeOpened, admin.NoticeResolved} {
			var body admin.NoticeBody
			if err := json.Unmarshal(due[i].Body, &body); err != nil {
				t.Fatal(err)
			}
			if due[i].Type != want || body.Type != want || body.ID != due[i].ID || body.Alert == nil || body.Alert.Subject != cafe || body.Key == nil || body.Key.ID != k.ID || body.Key.Name != k.Name {
				t.Errorf("notice: %s", due[i].Body)
			}
		}
	})
}

// What a webhook should have been told that is configured no more goes after its day, but not before: another replica
// may still have it.
func TestNoticesOfAWebhookThatIsNoMore(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		left := func(when string, want int) {
			t.Helper()
			due, err := w.store.DueNotices(t.Context(), time.Now(), 10)
			if err != nil || len(due) != want {
				t.Errorf("%s: %d are left, error %v; want %d", when, len(due), err, want)
			}
		}
		k := w.key(1, nil)
		w.used(k, office)
		time.Sleep(tick)
		w.used(k, cafe)
		time.Sleep(2 * day)
		left("with a webhook, whose they are", 1)
		w.stop()
		w.quiet = true
		w.update(func(tx admin.Tx) error {
			return tx.QueueNotice(t.Context(), admin.Notice{ID: apikey.ID{5}, MadeAt: time.Now(), NextAt: time.Now()})
		})
		w.start("without")
		left("at the start", 1)
		if log := w.log.String(); strings.Count(log, "none is configured any more") != 1 || !strings.Contains(log, "number=1") {
			t.Errorf("log:\n%s", log)
		}
		time.Sleep(22 * time.Hour)
		left("within the other's day", 1)
		time.Sleep(3*time.Hour + 5*time.Minute)
		left("after it", 0)
	})
}

// A store that is away now and then costs time, and no alert.
func TestAlertsOutliveAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory := storetest.NewMemory(admin.AuditKeys{})
		defer memory.Close()
		w := &watch{t: t, store: memory}
		w.policy(apikey.Alerts{})
		k := w.key(1, func(k *apikey.Key) { k.ExpirationDate = time.Now().Add(10 * day) })
		store := &failing{Memory: memory}
		engine := usage.NewAlerts(store, usage.AlertsConfig{Holder: "one"}, nil, slog.New(slog.NewTextHandler(io.Discard, nil)))
		w.engine, w.log = engine, new(bytes.Buffer)
		store.away.Store(true)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- engine.Run(ctx) }()
		w.used(k, office)
		time.Sleep(10 * time.Minute)
		w.want("away")
		store.away.Store(false)
		time.Sleep(2 * time.Minute)
		w.want("back", "expiring 14d")
		cancel()
		<-done
	})
}

type failing struct {
	*storetest.Memory
	away atomic.Bool
}

func (f *failing) Instances(ctx context.Context) ([]*apikey.Instance, error) {
	if f.away.Load() {
		return nil, apikey.ErrUndecided
	}
	return f.Memory.Instances(ctx)
}

func (f *failing) KeyNetworks(ctx context.Context, id apikey.ID) ([]admin.KeyNetwork, error) {
	if f.away.Load() {
		return nil, apikey.ErrUndecided
	}
	return f.Memory.KeyNetworks(ctx, id)
}

func TestTooManyAlertsAreOneMore(t *testing.T) {
	inBubble(t, apikey.Alerts{}, func(t *testing.T, w *watch) {
		w.update(func(tx admin.Tx) error {
			for n := range 1500 {
				k := &apikey.Key{ID: apikey.ID{1, 14: byte(n >> 8), 15: byte(n)}, InstanceID: home, Type: apikey.TypeInstance, Name: "n", CreatedAt: time.Now().Add(-20 * day)}
				if err := tx.InsertKey(t.Context(), k); err != nil {
					return err
				}
			}
			return nil
		})
		time.Sleep(3 * time.Hour)
		got := w.alerts()
		if len(got) != 1001 || got[1000] != "all unused more" {
			t.Errorf("1500 unused keys: %d alerts, the last one %q", len(got), got[len(got)-1])
		}
	})
}
