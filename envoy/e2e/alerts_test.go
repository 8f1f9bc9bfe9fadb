package e2e_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/sqlite"
)

// A webhook is somebody whom a keyward tells of alerts. It believes only what is signed, and does not take the
// first delivery of a type that it is to refuse once.
type webhook struct {
	t      *testing.T
	url    string
	caFile string // PEM of who signed its certificate
	secret string

	mu      sync.Mutex
	refuse  admin.NoticeType // the next one of these is answered with 503; "": none
	refused apikey.ID        // the one that was
	taken   map[apikey.ID]admin.NoticeBody
	text    bytes.Buffer // all bodies, to search
}

func listenForAlerts(t *testing.T) *webhook {
	t.Helper()
	w := &webhook{t: t, secret: strings.Repeat("5ecret", 6), taken: map[apikey.ID]admin.NoticeBody{}}
	web := httptest.NewTLSServer(w)
	t.Cleanup(web.Close)
	w.url = web.URL + "/alerts"
	w.caFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(w.caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: web.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return w
}

// genuine judges a delivery as docs/alerts.md tells receivers to do.
func (w *webhook) genuine(header string, body []byte) bool {
	t, signature, ok := strings.Cut(strings.TrimPrefix(header, "t="), ",v1=")
	at, err := strconv.ParseInt(t, 10, 64)
	if !ok || err != nil || time.Since(time.Unix(at, 0)).Abs() > 5*time.Minute {
		return false
	}
	mac := hmac.New(sha256.New, []byte(w.secret))
	mac.Write([]byte(t + "."))
	mac.Write(body)
	return hmac.Equal([]byte(hex.EncodeToString(mac.Sum(nil))), []byte(signature))
}

func (w *webhook) ServeHTTP(to http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // keyward was stopped meanwhile: it comes again
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text.Write(body)
	var said admin.NoticeBody
	strict := json.NewDecoder(bytes.NewReader(body))
	strict.DisallowUnknownFields()
	switch err := strict.Decode(&said); {
	case !w.genuine(r.Header.Get("Keyward-Signature"), body):
		w.t.Errorf("a delivery with signature %q", r.Header.Get("Keyward-Signature"))
	case err != nil:
		w.t.Errorf("%v: %s", err, body)
	case r.Method != http.MethodPost || r.URL.Path != "/alerts" || r.Header.Get("Content-Type") != "application/json" ||
		r.Header.Get("Keyward-Delivery") != said.ID.String() || r.Header.Get("Keyward-Event") != string(said.Type):
		w.t.Errorf("%s %s with %v for %s", r.Method, r.URL, r.Header, body)
	case said.Type == w.refuse && w.refused.IsZero():
		w.refused = said.ID
		to.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	w.taken[said.ID] = said // the same again is nothing new
}

// told returns what was delivered of a type.
func (w *webhook) told(of admin.NoticeType) map[apikey.ID]admin.NoticeBody {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := maps.Clone(w.taken)
	maps.DeleteFunc(all, func(_ apikey.ID, n admin.NoticeBody) bool { return n.Type != of })
	return all
}

// An oddity is what tells one alert from another.
type oddity struct {
	instance string
	kind     admin.AlertKind
	key      apikey.ID
	subject  string
}

func oddityOf(a admin.AlertRecord) oddity {
	o := oddity{instance: a.InstanceID, kind: a.Kind, subject: a.Subject}
	if a.KeyID != nil {
		o.key = *a.KeyID
	}
	return o
}

// alertsPatience is how long an alert may take: refusals and open alerts are looked at once a minute.
const alertsPatience = 4 * time.Minute

// alert waits for an alert and returns it.
func (s *server) alert(t *testing.T, want oddity, status string) admin.AlertRecord {
	t.Helper()
	for end := time.Now().Add(alertsPatience); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		for a, err := range s.client.Alerts(t.Context(), want.instance, admin.AlertQuery{Kind: want.kind, KeyID: want.key}) {
			if err != nil {
				t.Fatal(err)
			}
			if oddityOf(a) == want && a.Status == status {
				return a
			}
		}
	}
	t.Fatalf("no alert %+v became %s", want, status)
	panic("unreachable")
}

// cli runs a command against the server as an operator does.
func (s *server) cli(t *testing.T, args ...string) []byte {
	t.Helper()
	return s.run(t, append(args, "--server", "http://"+s.manage, "--token-file", s.path("admin.token"))...)
}

// alertsListed is what the command line lists.
func (s *server) alertsListed(t *testing.T, args ...string) (list []admin.AlertRecord) {
	t.Helper()
	if err := json.Unmarshal(s.cli(t, append([]string{"alerts", "list", "-o", "json", "--limit", "0"}, args...)...), &list); err != nil {
		t.Fatal(err)
	}
	return list
}

// disable ends what an alert tells of, with what it says and nothing else.
func (s *server) disable(t *testing.T, a admin.AlertRecord) {
	t.Helper()
	s.cli(t, "keys", "disable", a.InstanceID, a.KeyID.String(), "--yes")
}

// ack says that an alert is known and returns it.
func (s *server) ack(t *testing.T, a admin.AlertRecord) (acked admin.AlertRecord) {
	t.Helper()
	if err := json.Unmarshal(s.cli(t, "alerts", "ack", a.ID.String(), "-o", "json"), &acked); err != nil {
		t.Fatal(err)
	}
	if acked.AckedAt.IsZero() || acked.AckedBy == "" {
		t.Errorf("acked: %+v", acked)
	}
	return acked
}

// openAlerts is the metric, by kind, without zeros.
func (s *server) openAlerts(t *testing.T) map[admin.AlertKind]int {
	t.Helper()
	values, open := s.samples(t), map[admin.AlertKind]int{}
	for _, kind := range admin.AlertKinds() {
		n, there := values[`keyward_alerts_open{kind="`+string(kind)+`"}`]
		if !there {
			t.Fatalf("keyward_alerts_open has no kind %s", kind)
		}
		if n != 0 {
			open[kind] = n
		}
	}
	return open
}

// kept puts a key into the store of a keyward that does not run, as one of weeks ago would have left it.
func (s *server) kept(t *testing.T, instance, name string, made, used time.Time) key {
	t.Helper()
	text, err := os.ReadFile(s.path("pepper"))
	if err != nil {
		t.Fatal(err)
	}
	pepper, err := apikey.ParsePepper(text)
	if err != nil {
		t.Fatal(err)
	}
	store, err := sqlite.Open(t.Context(), sqlite.Config{Path: s.path("keyward.db"), Audit: admin.NewAuditKeys(apikey.Peppers{Current: pepper})})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	secret := apikey.Format{}.New(apikey.KindInstance)
	s.canary.Add(secret.Reveal())
	k := &apikey.Key{
		ID: apikey.ID(uuid.Must(uuid.NewV7())), InstanceID: instance, Type: apikey.TypeInstance, Name: name,
		CreatedAt: made, CreatedBy: "somebody", LastUsedAt: used,
	}
	if _, err := store.Update(t.Context(), func(tx admin.Tx) error {
		return errors.Join(tx.InsertKey(t.Context(), k), tx.InsertGeneration(t.Context(), k.ID,
			apikey.Generation{Number: 1, Hint: apikey.Format{}.Hint(secret), CreatedAt: made}, pepper.DigestOf(apikey.KindInstance, secret.Reveal()), pepper.Version()),
			tx.Audit(t.Context(), admin.Event{At: made.UTC(), Actor: "somebody", Action: "key.create", InstanceID: instance, Target: k.ID.String()}))
	}); err != nil {
		t.Fatal(err)
	}
	return key{admin.RecordOf(k, time.Now()), secret.Reveal()}
}

// stopGently ends keyward as a deployment does.
func (s *server) stopGently(t *testing.T) {
	t.Helper()
	s.process.signal(t, syscall.SIGTERM)
	if err := s.process.wait(t); err != nil {
		t.Fatal(err)
	}
}

// TestAlertsThroughEnvoy: what is odd in the requests that Envoy asks about is one alert, everywhere where alerts
// are told of; what is just not odd is none; the key is disabled by what the alert says, and Envoy refuses it.
//
// keyward's own clock says when it looks: what was heard every 10 s, refusals every minute, keys and their dates
// when it starts. So it is started three times, and the second time lasts a minute.
func TestAlertsThroughEnvoy(t *testing.T) {
	t.Parallel()
	const (
		perKey, perInstance = 10, 19 // refusals
		perMinute, ofNone   = 5, 7   // unknown keys
		here, alsoHere      = "X-Forwarded-For: 203.0.113.7", "X-Forwarded-For: 203.0.113.200"
		elsewhere, far      = "X-Forwarded-For: 198.51.100.7", "X-Forwarded-For: 2001:db8:7:1::5"
	)
	hook := listenForAlerts(t)
	secretFile := filepath.Join(t.TempDir(), "webhook.secret")
	if err := os.WriteFile(secretFile, []byte(hook.secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	configuration := func(unknownKeys string) string {
		return fmt.Sprintf("%sclient: {address: xff, trustedHops: 1}\nalerts:\n  unknownKeys: %s\n  webhook: {url: %q, secretFile: %q, allowPrivate: true, timeout: 30s}\n",
			routes, unknownKeys, hook.url, secretFile)
	}
	s := serve(t, config{env: []string{"SSL_CERT_FILE=" + hook.caFile}, yaml: configuration(fmt.Sprintf("{perMinute: %d}", ofNone))})
	s.canary.Add(hook.secret)
	t.Cleanup(func() { _ = os.WriteFile(s.path("webhook.txt"), hook.text.Bytes(), 0o600) }) // before it is searched
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	c := f.caller(t)

	// The first time: keys are made and used.
	surging := admin.PolicyInput{Alerts: admin.AlertsInput{Refusals: admin.RefusalAlertsInput{PerKey: new(perKey), PerInstance: new(perInstance)}}}
	flooded := admin.PolicyInput{Alerts: admin.AlertsInput{UnknownKeys: admin.UnknownKeyAlertsInput{PerMinute: new(perMinute)}}}
	home, crowd, tried, spared := s.instance(t, admin.PolicyInput{}), s.instance(t, surging), s.instance(t, flooded), s.instance(t, flooded)
	roaming := s.key(t, home, admin.KeyInput{Name: "roaming"})
	reader := admin.KeyInput{Scopes: []string{"orders:read"}}
	refused, seldom := s.key(t, crowd, reader), s.key(t, crowd, reader)
	ending := s.key(t, home, admin.KeyInput{ExpiresIn: "10h"})
	s.key(t, home, admin.KeyInput{Name: "nobody's, so that it ends is no matter", ExpiresIn: "10h"})
	lasting := s.key(t, home, admin.KeyInput{ExpiresIn: "15d"})
	for _, k := range []key{ending, lasting} {
		c.get("/any", withKey(k.secret), here).want(t, http.StatusOK)
	}
	s.stopGently(t)
	ago := func(days int) time.Time { return time.Now().Add(-time.Duration(days) * 24 * time.Hour) } // whatever the clocks were put to since
	never := s.kept(t, home, "never used", ago(15), time.Time{})
	s.kept(t, home, "young", ago(13), time.Time{})
	idle := s.kept(t, home, "idle", ago(100), ago(61))
	s.kept(t, home, "quarterly", ago(100), ago(59))

	// The second time. What the webhook does not take comes again.
	hook.mu.Lock()
	hook.refuse = admin.NoticeOpened
	hook.mu.Unlock()
	s.restart(t)
	f.awaitHealthy(t)
	endsSoon := oddity{home, admin.AlertExpiring, ending.ID, "1d"}
	neverUsed, unused := oddity{home, admin.AlertUnused, never.ID, "neverUsed"}, oddity{home, admin.AlertUnused, idle.ID, "idle"}
	expiring := s.alert(t, endsSoon, "open")
	s.alert(t, neverUsed, "open")
	s.alert(t, unused, "open")

	// The key's first network is heard of no later than the floods, and judged before them: when they are told of,
	// it is known.
	c.get("/any", withKey(roaming.secret), here).want(t, http.StatusOK)
	for _, n := range []struct {
		key   key
		times int
	}{{refused, perKey}, {seldom, perInstance - perKey}} {
		for range n.times {
			c.get("/admin/x", withKey(n.key.secret), here).want(t, http.StatusForbidden)
		}
	}
	flood := func() {
		t.Helper()
		unknown := withKey(s.unknown(apikey.KindInstance))
		for target, times := range map[string]int{"/instances/" + tried + "/x": 2*perMinute - 1, "/any": 2*ofNone - 1} { // so many that a minute has enough
			for range times {
				c.get(target, unknown, elsewhere).want(t, http.StatusUnauthorized)
			}
		}
	}
	for range perMinute - 1 {
		c.get("/instances/"+spared+"/x", withKey(s.unknown(apikey.KindInstance)), elsewhere).want(t, http.StatusUnauthorized)
	}
	flood()
	inInstance, inNone := oddity{instance: tried, kind: admin.AlertUnknownKeys}, oddity{kind: admin.AlertUnknownKeys}
	s.alert(t, inInstance, "open")
	s.alert(t, inNone, "open")

	flood() // again, which is no other alert
	for _, from := range []string{alsoHere, elsewhere, far, elsewhere} {
		c.get("/any", withKey(roaming.secret), from).want(t, http.StatusOK)
	}
	fromElsewhere, fromFar := oddity{home, admin.AlertNewNetwork, roaming.ID, "198.51.100.0/24"}, oddity{home, admin.AlertNewNetwork, roaming.ID, "2001:db8:7::/48"}
	newNetwork := s.alert(t, fromElsewhere, "open")
	s.alert(t, fromFar, "open")
	ofKey, ofInstance := oddity{crowd, admin.AlertRefusals, refused.ID, ""}, oddity{instance: crowd, kind: admin.AlertRefusals}
	surge := s.alert(t, ofKey, "open")
	s.alert(t, ofInstance, "open")
	for _, again := range []oddity{inInstance, inNone} {
		waitFor(t, "the second flood to be seen", func() bool { return s.alert(t, again, "open").Count > 1 })
	}

	all := []oddity{endsSoon, neverUsed, unused, inInstance, inNone, fromElsewhere, fromFar, ofKey, ofInstance}
	if !sameOddities(t, "the API", all, slices.Collect(func(yield func(admin.AlertRecord) bool) {
		for a, err := range s.client.Alerts(t.Context(), "", admin.AlertQuery{}) {
			if err != nil {
				t.Error(err)
			}
			if !yield(a) {
				return
			}
		}
	})) || !sameOddities(t, "keyward alerts list", all, s.alertsListed(t)) ||
		!sameOddities(t, "keyward alerts list --kind", []oddity{fromElsewhere, fromFar}, s.alertsListed(t, "--instance", home, "--kind", "newNetwork")) {
		return
	}
	hook.awaits(t, admin.NoticeOpened, all)
	counted := byKind(all)
	waitFor(t, fmt.Sprintf("the metrics to say %v", counted), func() bool {
		values := s.samples(t)
		return maps.Equal(s.openAlerts(t), counted) && !slices.ContainsFunc(admin.AlertKinds(), func(kind admin.AlertKind) bool {
			return values[`keyward_alerts_opened_total{kind="`+string(kind)+`"}`] != counted[kind]
		})
	})
	for _, n := range hook.told(admin.NoticeOpened) {
		if n.Alert.KeyID == nil != (n.Key == nil) || n.Key != nil && (n.Key.ID != *n.Alert.KeyID || n.Key.Status != "active" || n.Key.Hint == "") {
			t.Errorf("the webhook was told of key %+v in %+v", n.Key, n.Alert)
		}
	}
	hook.mu.Lock()
	if _, again := hook.taken[hook.refused]; !again || hook.refused.IsZero() {
		t.Errorf("delivery %v was refused once: did it come again: %v", hook.refused, again)
	}
	hook.mu.Unlock()
	waitFor(t, "the deliveries to be counted", func() bool {
		values := s.samples(t)
		return values[`keyward_webhook_deliveries_total{outcome="delivered"}`] == len(all) && values[`keyward_webhook_deliveries_total{outcome="failed"}`] > 0
	})

	var answer admin.WebhookAnswer
	if err := json.Unmarshal(s.cli(t, "alerts", "test", "-o", "json"), &answer); err != nil || !answer.Delivered || answer.Status != http.StatusOK {
		t.Errorf("keyward alerts test: %+v, %v", answer, err)
	}
	if _, came := hook.told(admin.NoticeTest)[answer.DeliveryID]; !came {
		t.Errorf("keyward alerts test says that %s was delivered: it was not", answer.DeliveryID)
	}

	// From the alert to the end of the key.
	for _, one := range []struct {
		alert  admin.AlertRecord
		secret string
		status string // after it was acked
	}{
		{newNetwork, roaming.secret, "resolved"}, {surge, refused.secret, "open"}, {expiring, ending.secret, "open"},
	} {
		c.get("/orders", withKey(one.secret), here).want(t, http.StatusOK, one.alert.Kind, ": not disabled yet")
		if acked := s.ack(t, one.alert); acked.Status != one.status {
			t.Errorf("%s is acked and %s, want %s", one.alert.Kind, acked.Status, one.status)
		}
		s.disable(t, one.alert)
		c.get("/orders", withKey(one.secret), here).want(t, http.StatusUnauthorized, one.alert.Kind, ": disabled")
	}
	c.get("/orders", withKey(seldom.secret), here).want(t, http.StatusOK, "another key")
	c.get("/orders", withKey(never.secret), here).want(t, http.StatusOK, "at last")
	waitFor(t, "the webhook to be told of what was acked", func() bool { // and perhaps, by now, of what was disabled
		return slices.ContainsFunc(slices.Collect(maps.Values(hook.told(admin.NoticeResolved))), func(n admin.NoticeBody) bool {
			return oddityOf(*n.Alert) == fromElsewhere && n.Alert.AckedBy != ""
		})
	})

	// The third time: what is over, or not looked at any more, is resolved, and what goes on is no other alert. The
	// last key to be looked at says that all have been.
	off := admin.AlertsInput{Refusals: admin.RefusalAlertsInput{Disabled: true}, UnknownKeys: admin.UnknownKeyAlertsInput{Disabled: true}}
	for _, id := range []string{crowd, tried} {
		s.put(t, id, admin.PolicyInput{Alerts: off})
	}
	s.stopGently(t)
	last := oddity{home, admin.AlertUnused, s.kept(t, home, "never used either", ago(14), time.Time{}).ID, "neverUsed"}
	s.configure(t, configuration("{disabled: true}"))
	s.restart(t)
	s.alert(t, last, "open")
	all, open, over := append(all, last), []oddity{unused, last}, slices.DeleteFunc(slices.Clone(all), func(o oddity) bool { return o == unused })
	sameOddities(t, "keyward alerts list", open, s.alertsListed(t))
	sameOddities(t, "keyward alerts list --all", all, s.alertsListed(t, "--all"))
	waitFor(t, "the metric", func() bool { return maps.Equal(s.openAlerts(t), byKind(open)) })
	hook.awaits(t, admin.NoticeOpened, all)
	hook.awaits(t, admin.NoticeResolved, over)
}

// awaits waits for deliveries about alerts, each once, and of no others.
func (w *webhook) awaits(t *testing.T, of admin.NoticeType, want []oddity) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d deliveries of %s", len(want), of), func() bool { return len(w.told(of)) >= len(want) })
	var got []admin.AlertRecord
	for _, n := range w.told(of) {
		got = append(got, *n.Alert)
	}
	sameOddities(t, "the webhook was told "+string(of)+", which", want, got)
}

// sameOddities reports whether alerts are those that are wanted, each once.
func sameOddities(t *testing.T, who string, want []oddity, got []admin.AlertRecord) bool {
	t.Helper()
	lines := func(of []oddity) (all []string) {
		for _, o := range of {
			all = append(all, fmt.Sprintf("%s %s %s %s", o.kind, o.instance, o.key, o.subject))
		}
		slices.Sort(all)
		return all
	}
	var found []oddity
	for _, a := range got {
		found = append(found, oddityOf(a))
	}
	diff := cmp.Diff(lines(want), lines(found))
	if diff != "" {
		t.Errorf("%s says (-want +got):\n%s", who, diff)
	}
	return diff == ""
}

func byKind(of []oddity) map[admin.AlertKind]int {
	n := map[admin.AlertKind]int{}
	for _, o := range of {
		n[o.kind]++
	}
	return n
}
