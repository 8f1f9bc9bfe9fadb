package usage

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/store/storetest"
)

var webhookSecret = []byte("0123456789abcdef0123456789abcdef")

// A delivered is one request that a receiver got.
type delivered struct {
	header http.Header
	body   []byte
}

// A receiver is a webhook's other end.
type receiver struct {
	*httptest.Server
	mu     sync.Mutex
	got    []delivered
	answer func(w http.ResponseWriter, r *http.Request) // nil: 204
}

func newReceiver(t *testing.T, answer func(w http.ResponseWriter, r *http.Request)) *receiver {
	t.Helper()
	rec := &receiver{answer: answer}
	rec.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		rec.mu.Lock()
		rec.got = append(rec.got, delivered{r.Header, body})
		rec.mu.Unlock()
		if rec.answer == nil {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		rec.answer(w, r)
	}))
	t.Cleanup(rec.Close)
	return rec
}

func (rec *receiver) all() []delivered {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return slices.Clone(rec.got)
}

// webhookTo makes a webhook that trusts a receiver's certificate.
func webhookTo(t *testing.T, rec *receiver, change func(*WebhookConfig)) *Webhook {
	t.Helper()
	cfg := WebhookConfig{URL: rec.URL + "/in?token=t0ps3cret", Secret: webhookSecret, AllowPrivate: true, Timeout: time.Minute}
	if change != nil {
		change(&cfg)
	}
	w, err := NewWebhook(cfg, nil, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(rec.Certificate())
	transport(w).TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12, ServerName: "example.com"}
	t.Cleanup(transport(w).CloseIdleConnections)
	return w
}

func transport(w *Webhook) *http.Transport { return w.client.Transport.(*http.Transport) }

func notice(t *testing.T) admin.Notice {
	t.Helper()
	n, err := admin.NewNotice(admin.NoticeOpened, &admin.Alert{ID: apikey.ID{1}, InstanceID: "home", Kind: admin.AlertUnused, Message: "m"},
		&apikey.Key{ID: apikey.ID{2}, InstanceID: "home", Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestWebhookDelivery(t *testing.T) {
	rec := newReceiver(t, nil)
	n := notice(t)
	answer := webhookTo(t, rec, nil).Send(t.Context(), n)
	if !answer.Delivered || answer.Status != 204 || answer.Error != "" || answer.DeliveryID != n.ID {
		t.Fatalf("got %+v", answer)
	}
	got := rec.all()
	if len(got) != 1 || !bytes.Equal(got[0].body, n.Body) {
		t.Fatalf("got %+v", got)
	}
	h := got[0].header
	if h.Get(DeliveryHeader) != n.ID.String() || h.Get(EventHeader) != "alert.opened" || h.Get("Content-Type") != "application/json" {
		t.Errorf("headers %v", h)
	}
	signature := h.Get(SignatureHeader)
	var at int64
	if _, err := fmt.Sscanf(signature, "t=%d,v1=", &at); err != nil || time.Since(time.Unix(at, 0)) > time.Minute {
		t.Errorf("signature %q", signature)
	}
	if want := Sign(webhookSecret, got[0].body, time.Unix(at, 0)); signature != want {
		t.Errorf("signature %q, want %q", signature, want)
	}
	for what, other := range map[string]string{
		"another body":   Sign(webhookSecret, append(got[0].body, ' '), time.Unix(at, 0)),
		"another time":   strings.Replace(Sign(webhookSecret, got[0].body, time.Unix(at+1, 0)), fmt.Sprint("t=", at+1), fmt.Sprint("t=", at), 1),
		"another secret": Sign([]byte("0123456789abcdef0123456789abcdeF"), got[0].body, time.Unix(at, 0)),
	} {
		if other == signature {
			t.Errorf("%s has the same signature", what)
		}
	}
}

func TestWebhookThatDoesNotTakeIt(t *testing.T) {
	elsewhere := newReceiver(t, nil)
	endless := make(chan struct{})
	t.Cleanup(func() { close(endless) })
	for name, test := range map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request)
		status int
		says   string
	}{
		"500": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, 500, "HTTP status 500"},
		"400": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(400) }, 400, "HTTP status 400"},
		"redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		}, 307, "redirects are not followed"},
		"hangs": {func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-r.Context().Done():
			case <-endless:
			}
		}, 0, "imeout"}, // of the dial, the handshake or the answer: a busy machine may not get as far
		"hangs up":     {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, 0, "EOF"},
		"endless body": {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.CopyN(w, zeros{}, 1<<30) }, 200, ""},
		"endless header": {func(w http.ResponseWriter, _ *http.Request) {
			for n := range 2000 {
				w.Header().Set(fmt.Sprint("X-", n), strings.Repeat("x", 100))
			}
		}, 0, "header"},
	} {
		t.Run(name, func(t *testing.T) {
			rec := newReceiver(t, test.answer)
			rec.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
			w := webhookTo(t, rec, func(cfg *WebhookConfig) {
				if name == "hangs" {
					cfg.Timeout = 100 * time.Millisecond
				}
			})
			answer := w.Send(t.Context(), notice(t))
			if answer.Delivered != (test.says == "") || answer.Status != test.status || !strings.Contains(answer.Error, test.says) {
				t.Errorf("got %+v, want status %d and %q", answer, test.status, test.says)
			}
			if strings.Contains(answer.Error, "t0ps3cret") {
				t.Errorf("the address, which may hold a token, is in %q", answer.Error)
			}
		})
	}
	if n := len(elsewhere.all()); n != 0 {
		t.Errorf("%d redirects were followed", n)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// A name may mean a public address when it is looked at, and a private one when it is dialled: only the second
// counts.
func TestWebhookIsNotLedToPrivateAddresses(t *testing.T) {
	rec := newReceiver(t, nil)
	_, port, err := net.SplitHostPort(rec.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("HTTPS_PROXY", rec.URL) // and no proxy dials for it
	t.Setenv("HTTP_PROXY", rec.URL)
	send := func(host string, allow bool) (admin.WebhookAnswer, error) {
		timeout := time.Second // a resolver may not answer for what is no name
		if allow || host == "localhost" {
			timeout = time.Minute
		}
		w, err := NewWebhook(WebhookConfig{URL: "https://" + net.JoinHostPort(host, port), Secret: webhookSecret, AllowPrivate: allow, Timeout: timeout},
			nil, slog.New(slog.DiscardHandler))
		if err != nil {
			return admin.WebhookAnswer{}, err
		}
		pool := x509.NewCertPool()
		pool.AddCert(rec.Certificate())
		transport(w).TLSClientConfig.RootCAs, transport(w).TLSClientConfig.ServerName = pool, "example.com"
		defer transport(w).CloseIdleConnections()
		return w.Send(t.Context(), notice(t)), nil
	}
	for _, host := range []string{"localhost", "127.0.0.1", "::1", "::ffff:127.0.0.1", "127.1", "0.0.0.0", "2130706433"} {
		if answer, err := send(host, false); err == nil && (answer.Delivered || answer.Error == "") {
			t.Errorf("%s: got %+v", host, answer)
		}
	}
	if n := len(rec.all()); n != 0 {
		t.Fatalf("%d deliveries to a private address", n)
	}
	if answer, err := send("127.0.0.1", true); err != nil || !answer.Delivered {
		t.Errorf("allowed: got %+v, %v", answer, err)
	}
	// What a resolver says goes through the same door: the dialer's Control sees addresses alone.
	if answer, _ := send("localhost", false); !strings.Contains(answer.Error, "is private") {
		t.Errorf("a name of this machine: got %+v", answer)
	}
}

func TestMayDial(t *testing.T) {
	for address, want := range map[string]struct{ usually, private bool }{
		"93.184.216.34:443":                        {true, true},
		"[2606:2800:220:1:248:1893:25c8:1946]:443": {true, true},
		"[64:ff9b::5db8:d822]:443":                 {true, true}, // 93.184.216.34 behind NAT64
		"10.1.2.3:443":                             {false, true},
		"172.16.0.1:443":                           {false, true},
		"172.32.0.1:443":                           {true, true},
		"192.168.1.1:443":                          {false, true},
		"127.0.0.1:443":                            {false, true},
		"127.9.9.9:443":                            {false, true},
		"100.64.0.1:443":                           {false, true},
		"198.18.0.1:443":                           {false, true},
		"[::1]:443":                                {false, true},
		"[fd12:3456::1]:443":                       {false, true},
		"[::ffff:10.0.0.1]:443":                    {false, true},
		"[64:ff9b::a00:1]:443":                     {false, true}, // 10.0.0.1
		"[64:ff9b::7f00:1]:443":                    {false, true}, // 127.0.0.1
		"169.254.169.254:80":                       {false, false},
		"[::ffff:169.254.169.254]:80":              {false, false},
		"[64:ff9b::a9fe:a9fe]:80":                  {false, false},
		"[64:ff9b:1::1]:80":                        {false, false},
		"[fd00:ec2::254]:80":                       {false, false},
		"100.100.100.200:80":                       {false, false},
		"[fe80::1%eth0]:443":                       {false, false},
		"[fe80::1]:443":                            {false, false},
		"[fec0::1]:443":                            {false, false},
		"[ff02::1]:443":                            {false, false},
		"[2002:7f00:1::]:443":                      {false, false}, // 127.0.0.1 by 6to4
		"[2001:0:1::]:443":                         {false, false}, // Teredo
		"[::7f00:1]:443":                           {false, false}, // 127.0.0.1, the old way
		"[::ffff:0:7f00:1]:443":                    {false, false}, // translated
		"[::]:443":                                 {false, false},
		"[100::1]:443":                             {false, false},
		"0.0.0.0:443":                              {false, false},
		"0.1.2.3:443":                              {false, false},
		"224.0.0.1:443":                            {false, false},
		"255.255.255.255:443":                      {false, false},
		"240.0.0.1:443":                            {false, false},
		"192.0.0.8:443":                            {false, false},
		"localhost:443":                            {false, false},
		"/run/some.socket":                         {false, false},
	} {
		if got := mayDial(address, false, false) == nil; got != want.usually {
			t.Errorf("%s: got %v, want %v", address, got, want.usually)
		}
		if got := mayDial(address, true, false) == nil; got != want.private {
			t.Errorf("%s, private allowed: got %v, want %v", address, got, want.private)
		}
	}
	if mayDial("10.0.0.1:80", true, true) == nil || mayDial("127.0.0.1:80", true, true) != nil {
		t.Error("http goes to this machine, and nowhere else")
	}
}

func TestCheckWebhookURL(t *testing.T) {
	for address, want := range map[string]struct{ usually, private bool }{
		"https://alerts.example.com/in": {true, true},
		"https://10.0.0.1:8443/in":      {true, true}, // refused when it is dialled
		"http://127.0.0.1:8080/in":      {false, true},
		"http://[::1]:8080/in":          {false, true},
		"HTTP://127.0.0.1/":             {false, true},
		"http://localhost/":             {false, false}, // a name may mean anything
		"http://10.0.0.1/":              {false, false},
		"http://alerts.example.com/":    {false, false},
		"https://user:pw@example.com/":  {false, false},
		"https://example.com/#part":     {false, false},
		"https:///in":                   {false, false},
		"https://:443/in":               {false, false},
		"ftp://example.com/":            {false, false},
		"unix:///run/socket":            {false, false},
		"file:///etc/passwd":            {false, false},
		"https:example.com":             {false, false},
		"alerts.example.com":            {false, false},
		"":                              {false, false},
		"https://exa mple.com/":         {false, false},
	} {
		if got := CheckWebhookURL(address, false) == nil; got != want.usually {
			t.Errorf("%q: got %v, want %v", address, got, want.usually)
		}
		if got := CheckWebhookURL(address, true) == nil; got != want.private {
			t.Errorf("%q, private allowed: got %v, want %v", address, got, want.private)
		}
	}
}

// A fakeRound is a transport that needs no network, so that it works in a bubble.
type fakeRound func(body admin.NoticeBody) (status int, err error)

func (f fakeRound) RoundTrip(r *http.Request) (*http.Response, error) {
	var body admin.NoticeBody
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		return nil, err
	}
	status, err := f(body)
	if err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: status, Body: http.NoBody, Header: http.Header{}}, nil
}

// queueOf is a store with alerts whose notices wait.
func queueOf(t *testing.T, n int) (*storetest.Memory, []admin.Notice) {
	t.Helper()
	store := storetest.NewMemory(admin.AuditKeys{})
	t.Cleanup(func() { _ = store.Close() })
	var waiting []admin.Notice
	for i := range n {
		one := notice(t)
		waiting = append(waiting, one)
		if err := store.PutAlert(t.Context(), &admin.Alert{ID: apikey.ID{9, byte(i)}, Subject: fmt.Sprint(i)}, one); err != nil {
			t.Fatal(err)
		}
	}
	return store, waiting
}

// runWebhook runs a webhook with a fake transport until stop is called.
func runWebhook(t *testing.T, store noticeStore, holder string, round fakeRound) (stop func()) {
	t.Helper()
	w, err := NewWebhook(WebhookConfig{URL: "https://alerts.example.com", Secret: webhookSecret}, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w.client.Transport = round
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- w.Run(ctx, store, holder) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestQueueIsTriedForADay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := queueOf(t, 1)
		begin := time.Now()
		var tries []time.Duration
		stop := runWebhook(t, store, "one", func(admin.NoticeBody) (int, error) {
			tries = append(tries, time.Since(begin))
			return 500, nil
		})
		time.Sleep(48 * time.Hour)
		stop()
		if n := len(tries); n < 12 || n > 25 || tries[n-1] > 24*time.Hour || tries[n-1] < 18*time.Hour {
			t.Errorf("tried at %v", tries)
		}
		if left, _ := store.DueNotices(t.Context(), time.Now().Add(1000*time.Hour), 9); len(left) != 0 {
			t.Errorf("given up, and still there: %v", left)
		}
	})
}

// deliveries returns what was counted, by outcome.
func deliveries(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counted := map[string]float64{}
	for _, m := range families[0].GetMetric() {
		counted[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
	}
	return counted
}

// TestQueueIsBounded: while nobody answers the oldest are dropped where there are too many, and each is when its day is
// over, tried or not.
func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := queueOf(t, 0)
		queue := func(n int) (ids []apikey.ID) {
			t.Helper()
			_, err := store.Update(t.Context(), func(tx admin.Tx) error {
				for range n {
					one := notice(t)
					ids = append(ids, one.ID)
					if err := tx.QueueNotice(t.Context(), one); err != nil {
						return err
					}
				}
				return tx.Audit(t.Context(), admin.Event{})
			})
			if err != nil {
				t.Fatal(err)
			}
			return ids
		}
		left := func(when string, want []apikey.ID) {
			t.Helper()
			due, err := store.DueNotices(t.Context(), time.Now().Add(1000*time.Hour), 2*maxNotices)
			if err != nil {
				t.Fatal(err)
			}
			var got []apikey.ID
			for _, n := range due {
				got = append(got, n.ID)
			}
			less := func(a, b apikey.ID) int { return bytes.Compare(a[:], b[:]) }
			slices.SortFunc(got, less)
			slices.SortFunc(want, less)
			if !slices.Equal(got, want) {
				t.Errorf("%s: %d are left, not the %d that should be", when, len(got), len(want))
			}
		}
		var log bytes.Buffer
		reg := prometheus.NewRegistry()
		w, err := NewWebhook(WebhookConfig{URL: "https://alerts.example.com", Secret: webhookSecret}, reg, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		w.client.Transport = fakeRound(func(admin.NoticeBody) (int, error) { return 0, net.ErrClosed })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- w.Run(ctx, store, "one") }()
		time.Sleep(3 * time.Second)
		first := queue(300)
		time.Sleep(20 * time.Hour)
		second := queue(100)
		time.Sleep(time.Hour)
		left("long before a day is over", append(first, second...))
		time.Sleep(3*time.Hour + 10*time.Minute)
		left("the day of the first is over", second)
		if n := deliveries(t, reg)["given_up"]; n != 300 {
			t.Errorf("%v were counted as given up, want 300", n)
		}
		log.Reset()
		third := queue(maxNotices - 70)
		time.Sleep(2 * time.Minute)
		left("too many", append(second[30:], third...))
		if n := deliveries(t, reg)["dropped"]; n != 30 {
			t.Errorf("%v were counted as dropped, want 30", n)
		}
		if n := strings.Count(log.String(), "level=ERROR"); n != 1 || !strings.Contains(log.String(), "late=0 too_many=30") {
			t.Errorf("%d lines tell of it:\n%.3000s", n, log.String())
		}
		cancel()
		<-done
	})
}

func TestQueueSurvivesFailuresAndRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, waiting := queueOf(t, 20)
		var got []apikey.ID
		away, poison := true, waiting[3].ID
		round := func(body admin.NoticeBody) (int, error) {
			switch {
			case away:
				return 0, net.ErrClosed
			case body.ID == poison:
				return 400, nil
			}
			got = append(got, body.ID)
			return 200, nil
		}
		stop := runWebhook(t, store, "one", round)
		time.Sleep(time.Hour)
		stop()
		away = false
		stop = runWebhook(t, store, "two", round)
		time.Sleep(3 * time.Hour)
		stop()
		slices.SortFunc(got, func(a, b apikey.ID) int { return bytes.Compare(a[:], b[:]) })
		if len(got) != 19 || len(slices.Compact(slices.Clone(got))) != 19 || slices.Contains(got, poison) {
			t.Errorf("%d were delivered, want each of the other 19 once", len(got))
		}
	})
}

func TestOneReplicaDelivers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, waiting := queueOf(t, 30)
		var mu sync.Mutex
		seen := map[apikey.ID]int{}
		round := func(body admin.NoticeBody) (int, error) {
			time.Sleep(time.Second)
			mu.Lock()
			defer mu.Unlock()
			seen[body.ID]++
			return 200, nil
		}
		stopOne, stopTwo := runWebhook(t, store, "one", round), runWebhook(t, store, "two", round)
		time.Sleep(10*time.Second + 500*time.Millisecond) // within a delivery
		stopOne()                                         // the other takes over at once
		time.Sleep(time.Minute)
		stopTwo()
		again := 0
		for _, n := range waiting {
			switch seen[n.ID] {
			case 0:
				t.Errorf("%v was not delivered", n.ID)
			case 1:
			default:
				again++
			}
		}
		if again > 1 { // the one that the end of the first cut short
			t.Errorf("%d were delivered twice", again)
		}
	})
}
