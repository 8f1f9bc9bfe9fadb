package usage

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// WebhookConfig says who is told of alerts, and how.
type WebhookConfig struct {
	URL    string // see CheckWebhookURL
	Secret []byte // what deliveries are signed with
	// AllowPrivate allows addresses of private networks and of this machine. Those of the link, where clouds keep
	// their metadata, and those of many are refused all the same.
	AllowPrivate bool
	Timeout      time.Duration // of one try; 0 means [WebhookTimeout]
	UserAgent    string        // "" means keyward
}

// WebhookTimeout is how long a try may take unless something else is configured.
const WebhookTimeout = 10 * time.Second

// The headers of a delivery.
const (
	DeliveryHeader  = "Keyward-Delivery"  // id of the notice
	EventHeader     = "Keyward-Event"     // its type
	SignatureHeader = "Keyward-Signature" // t=<Unix seconds>,v1=<hex of HMAC-SHA-256 over "<t>.<body>">
)

const (
	maxWebhookAnswer = 64 << 10 // of the body that is read, and of the header
	minWebhookSecret = 16       // bytes
	webhookJob       = "webhook"
	webhookEvery     = 5 * time.Second // the queue is looked at
	webhookTTL       = time.Minute     // of the lead; a try takes less
	webhookBatch     = 50
	webhookPause     = time.Minute // at most, after tries that nobody answered
	// WebhookGivesUp is how long a notice is tried.
	WebhookGivesUp = 24 * time.Hour
	// maxNotices wait at most, some 10 MB; it is looked at before every batch.
	maxNotices = 10_000
)

// webhookWaits are how long the next try waits after each one that failed, the last one again and again; each is made
// longer by up to a quarter, so that many that failed together do not come back together.
var webhookWaits = []time.Duration{10 * time.Second, 30 * time.Second, 2 * time.Minute, 10 * time.Minute, 30 * time.Minute, time.Hour, 2 * time.Hour}

// A Webhook tells somebody of alerts by HTTP POST. Notices wait in the store, so they survive a crash: each is
// delivered at least once, or tried for [WebhookGivesUp]; of more than maxNotices the oldest are dropped. Safe for concurrent use.
type Webhook struct {
	cfg        WebhookConfig
	client     *http.Client
	log        *slog.Logger
	deliveries *prometheus.CounterVec
}

// NewWebhook makes a webhook. Its metrics go to reg; nil: nowhere. Errors are for the operator.
func NewWebhook(cfg WebhookConfig, reg prometheus.Registerer, log *slog.Logger) (*Webhook, error) {
	if err := CheckWebhookURL(cfg.URL, cfg.AllowPrivate); err != nil {
		return nil, err
	}
	if len(cfg.Secret) < minWebhookSecret {
		return nil, fmt.Errorf("the secret has %d bytes: it needs %d at least, such as those of: openssl rand -hex 32", len(cfg.Secret), minWebhookSecret)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = WebhookTimeout
	}
	if cfg.UserAgent == "" {
		cfg.UserAgent = "keyward"
	}
	w := &Webhook{cfg: cfg, log: log, deliveries: promauto.With(reg).NewCounterVec(prometheus.CounterOpts{
		Name: "keyward_webhook_deliveries_total",
		Help: "Tries to tell the webhook of an alert: delivered, failed and to be tried again, or given up after a day; and what was dropped because too much waits.",
	}, []string{"outcome"})}
	for _, outcome := range []string{"delivered", "failed", "given_up", "dropped"} {
		w.deliveries.WithLabelValues(outcome)
	}
	target, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, err
	}
	plain := target.Scheme == "http"
	dialer := &net.Dialer{Timeout: cfg.Timeout, Control: func(_, address string, _ syscall.RawConn) error {
		return mayDial(address, cfg.AllowPrivate, plain)
	}}
	w.client = &http.Client{
		Timeout: cfg.Timeout,
		// A redirect would take the notice to where nobody wanted it.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			Proxy:                  nil, // a proxy would dial for us, and past mayDial
			DialContext:            dialer.DialContext,
			ForceAttemptHTTP2:      true,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:    cfg.Timeout,
			MaxResponseHeaderBytes: maxWebhookAnswer,
			MaxConnsPerHost:        4,
			IdleConnTimeout:        30 * time.Second,
		},
	}
	return w, nil
}

// TrimSecret returns the secret that a file holds: without the end of its line, which no receiver has.
func TrimSecret(text []byte) []byte { return bytes.TrimRight(text, "\r\n") }

// CheckWebhookURL reports what is wrong with the address of a webhook: it is https, but for tests http to an
// address of this machine where private ones are allowed.
func CheckWebhookURL(address string, allowPrivate bool) error {
	u, err := url.Parse(address)
	switch {
	case err != nil || u.Host == "" || u.Hostname() == "" || u.Opaque != "":
		return errors.New("must be an address such as https://alerts.example.com/keyward")
	case u.User != nil:
		return errors.New("must not hold a user or a password: the signature says who sends")
	case u.Fragment != "":
		return errors.New("must not have a fragment")
	case u.Scheme == "https":
	case u.Scheme != "http":
		return errors.New("must begin with https://")
	default:
		ip, err := netip.ParseAddr(u.Hostname())
		if !allowPrivate || err != nil || !ip.Unmap().IsLoopback() {
			return errors.New("must begin with https://: http is for tests, to an address such as 127.0.0.1, with allowPrivate")
		}
	}
	return nil
}

var (
	// neverDialled are networks that no webhook is in. In private ones there may be, where they are allowed.
	neverDialled = prefixes(
		"0.0.0.0/8",          // this network
		"169.254.0.0/16",     // link-local: metadata of clouds
		"192.0.0.0/24",       // protocol assignments
		"192.0.2.0/24",       // documentation
		"192.88.99.0/24",     // 6to4 relays
		"198.51.100.0/24",    // documentation
		"203.0.113.0/24",     // documentation
		"224.0.0.0/4",        // multicast
		"240.0.0.0/4",        // reserved, and broadcast
		"2001::/23",          // protocol assignments, Teredo among them
		"2001:db8::/32",      // documentation
		"2002::/16",          // 6to4: an IPv4 address in disguise
		"3fff::/20",          // documentation
		"fd00:ec2::254/128",  // metadata of a cloud
		"fd20:ce::254/128",   // metadata of a cloud
		"100.100.100.200/32", // metadata of a cloud
	)
	private = prefixes(
		"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16",
		"127.0.0.0/8", "::1/128", // this machine
		"100.64.0.0/10", // shared by carriers
		"198.18.0.0/15", // benchmarks
		"fc00::/7",
	)
	// public is what of IPv6 is given out; nat64 holds an IPv4 address in its last four bytes, which is what counts.
	public = netip.MustParsePrefix("2000::/3")
	nat64  = netip.MustParsePrefix("64:ff9b::/96")
)

func prefixes(list ...string) (all []netip.Prefix) {
	for _, one := range list {
		all = append(all, netip.MustParsePrefix(one))
	}
	return all
}

// mayDial judges the address that is about to be dialled, after every look-up of a name: what a name meant
// earlier does not count.
func mayDial(address string, allowPrivate, onlyLoopback bool) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return errors.New("not dialled: not an IP address")
	}
	ip := to.Addr().WithZone("").Unmap()
	if nat64.Contains(ip) {
		b := ip.As16()
		ip = netip.AddrFrom4([4]byte(b[12:]))
	}
	if onlyLoopback && !ip.IsLoopback() {
		return errors.New("not dialled: http goes to this machine only")
	}
	for _, net := range neverDialled {
		if net.Contains(ip) {
			return fmt.Errorf("not dialled: %s is of %s, where no webhook is", ip, net)
		}
	}
	for _, net := range private {
		switch {
		case !net.Contains(ip):
		case allowPrivate:
			return nil
		default:
			return fmt.Errorf("not dialled: %s is private (alerts.webhook.allowPrivate)", ip)
		}
	}
	if ip.Is6() && !public.Contains(ip) {
		return fmt.Errorf("not dialled: %s is no public address", ip)
	}
	return nil
}

// Sign returns the signature of a delivery at a time.
func Sign(secret, body []byte, at time.Time) string {
	t := strconv.FormatInt(at.Unix(), 10)
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(t + "."))
	mac.Write(body)
	return "t=" + t + ",v1=" + hex.EncodeToString(mac.Sum(nil))
}

// Send implements admin.Webhook.
func (w *Webhook) Send(ctx context.Context, n admin.Notice) admin.WebhookAnswer {
	begin := time.Now()
	answer := admin.WebhookAnswer{DeliveryID: n.ID}
	status, err := w.post(ctx, n)
	answer.Status, answer.Millis = status, time.Since(begin).Milliseconds()
	answer.Delivered = err == nil
	if err != nil {
		answer.Error = err.Error()
	}
	return answer
}

// post sends one notice. status is 0 where there was no answer.
func (w *Webhook) post(ctx context.Context, n admin.Notice) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.cfg.URL, bytes.NewReader(n.Body))
	if err != nil {
		return 0, errors.New("the address cannot be used")
	}
	for name, value := range map[string]string{
		"Content-Type": "application/json", "User-Agent": w.cfg.UserAgent,
		DeliveryHeader: n.ID.String(), EventHeader: string(n.Type), SignatureHeader: Sign(w.cfg.Secret, n.Body, time.Now()),
	} {
		req.Header.Set(name, value)
	}
	resp, err := w.client.Do(req)
	if err != nil {
		if wrapped, ok := errors.AsType[*url.Error](err); ok {
			err = wrapped.Err // without the address, which may hold a token
		}
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	// Read so that the connection can be used again; what it says is nobody's business here.
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxWebhookAnswer))
	switch resp.StatusCode / 100 {
	case 2:
		return resp.StatusCode, nil
	case 3:
		return resp.StatusCode, fmt.Errorf("it answers with HTTP status %d: redirects are not followed, name the address it redirects to", resp.StatusCode)
	}
	return resp.StatusCode, fmt.Errorf("it answers with HTTP status %d", resp.StatusCode)
}

// noticeStore is what a webhook needs of a store.
type noticeStore interface {
	DueNotices(ctx context.Context, now time.Time, limit int) ([]admin.Notice, error)
	RetryNotice(ctx context.Context, n admin.Notice) error
	ForgetNotice(ctx context.Context, id apikey.ID) error
	ForgetNotices(ctx context.Context, before time.Time, keep int) (late, over int, err error)
	Lead(ctx context.Context, job, holder string, ttl time.Duration) (leads bool, err error)
}

// Run delivers what waits in store until ctx is done, in one process at a time; holder names this one.
func (w *Webhook) Run(ctx context.Context, store noticeStore, holder string) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	failed := 0 // rounds, one after the other, that ended because nobody answered
	for {
		select {
		case <-ctx.Done():
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			if _, err := store.Lead(end, webhookJob, holder, 0); err != nil {
				w.log.Warn("another process takes the webhook over only when the lead runs out", slog.Any("error", err))
			}
			return nil
		case <-timer.C:
		}
		answered, err := w.round(ctx, store, holder)
		if err != nil && ctx.Err() == nil {
			w.log.Warn("what the webhook has to be told cannot be read or written now; it is tried again", slog.Any("error", err))
		}
		wait := webhookEvery
		if failed++; answered {
			failed = 0
		} else {
			wait = min(webhookPause, webhookEvery<<min(failed, 5))
		}
		timer.Reset(wait)
	}
}

// round delivers what is due, the longest due first. It ends early where nobody answers: who does not answer one
// does not answer the next.
func (w *Webhook) round(ctx context.Context, store noticeStore, holder string) (answered bool, err error) {
	var late, over int
	defer func() {
		if late+over > 0 {
			w.log.LogAttrs(ctx, slog.LevelError, "what the webhook had to be told was dropped: it was not taken within a day, or too much waited",
				slog.Int("late", late), slog.Int("too_many", over), slog.Int("most", maxNotices))
		}
	}()
	for {
		leads, err := store.Lead(ctx, webhookJob, holder, max(webhookTTL, 2*w.cfg.Timeout))
		if err != nil || !leads {
			return true, err
		}
		tooLate, tooMany, err := store.ForgetNotices(ctx, time.Now().Add(-WebhookGivesUp), maxNotices)
		late, over = late+tooLate, over+tooMany
		w.deliveries.WithLabelValues("given_up").Add(float64(tooLate))
		w.deliveries.WithLabelValues("dropped").Add(float64(tooMany))
		if err != nil {
			return true, err
		}
		due, err := store.DueNotices(ctx, time.Now(), webhookBatch)
		if err != nil || len(due) == 0 {
			return true, err
		}
		for i, n := range due {
			if i > 0 { // a batch may take longer than the lead
				if leads, err := store.Lead(ctx, webhookJob, holder, max(webhookTTL, 2*w.cfg.Timeout)); err != nil || !leads {
					return true, err
				}
			}
			status, err := w.post(ctx, n)
			if ctx.Err() != nil { // it was cut short, and counts as not tried
				return true, nil //nolint:nilerr // that the process ends is no failure of the webhook
			}
			if err := w.settle(ctx, store, n, err); err != nil {
				return true, err
			}
			if status == 0 {
				return false, nil
			}
		}
	}
}

// settle writes down what became of a try.
func (w *Webhook) settle(ctx context.Context, store noticeStore, n admin.Notice, failure error) error {
	attrs := []slog.Attr{slog.String("delivery", n.ID.String()), slog.String("event", string(n.Type)), slog.Int("try", n.Tries+1)}
	if failure == nil {
		w.deliveries.WithLabelValues("delivered").Inc()
		return store.ForgetNotice(ctx, n.ID)
	}
	attrs = append(attrs, slog.Any("error", failure))
	wait := webhookWaits[min(n.Tries, len(webhookWaits)-1)]
	wait += time.Duration(rand.Int64N(int64(wait / 4))) //nolint:gosec // any will do
	n.Tries, n.NextAt = n.Tries+1, time.Now().Add(wait)
	if n.NextAt.After(n.MadeAt.Add(WebhookGivesUp)) {
		w.deliveries.WithLabelValues("given_up").Inc()
		w.log.LogAttrs(ctx, slog.LevelError, "the webhook was not told, and is not tried any more", attrs...)
		return store.ForgetNotice(ctx, n.ID)
	}
	w.deliveries.WithLabelValues("failed").Inc()
	w.log.LogAttrs(ctx, slog.LevelWarn, "the webhook was not told; it is tried again", append(attrs, slog.Time("next", n.NextAt))...)
	return store.RetryNotice(ctx, n)
}
