package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
	"keyward/authz/usage"
)

// Alerts says who is told of alerts, how long they are kept, and what instances' policies cannot.
type Alerts struct {
	Keep        apikey.Duration `yaml:"keep"` // how long resolved ones are kept
	UnknownKeys UnknownKeys     `yaml:"unknownKeys"`
	Webhook     Webhook         `yaml:"webhook"`
}

// UnknownKeys says what of requests that belong to no instance is worth an alert.
type UnknownKeys struct {
	Disabled  bool `yaml:"disabled"`
	PerMinute int  `yaml:"perMinute"` // requests with a secret that is no key's, at least
}

// A Webhook is told of alerts.
type Webhook struct {
	URL          string          `yaml:"url"`          // https; "": there is none
	SecretFile   string          `yaml:"secretFile"`   // what deliveries are signed with
	AllowPrivate bool            `yaml:"allowPrivate"` // addresses of private networks and of this machine too
	Timeout      apikey.Duration `yaml:"timeout"`      // of one try
}

const (
	minKeepAlerts     = 24 * time.Hour
	maxWebhookTimeout = time.Minute
)

func defaultAlerts() Alerts {
	return Alerts{
		Keep: apikey.Duration(usage.KeepAlerts), UnknownKeys: UnknownKeys{PerMinute: apikey.ShippedAlerts.UnknownKeys.PerMinute},
		Webhook: Webhook{Timeout: apikey.Duration(usage.WebhookTimeout)},
	}
}

func (c Alerts) validate() error {
	var faults []error
	fault := func(field, reason string) { faults = append(faults, apikey.Invalid("alerts."+field, reason)) }
	if keep := c.Keep.Std(); keep < minKeepAlerts || keep > maxKeepUsage {
		fault("keep", "must be from 1d to 3650d")
	}
	if c.UnknownKeys.PerMinute < 1 {
		fault("unknownKeys.perMinute", "must be at least 1; unknownKeys.disabled switches these alerts off")
	}
	if timeout := c.Webhook.Timeout.Std(); timeout <= 0 || timeout > maxWebhookTimeout {
		fault("webhook.timeout", "must be a positive duration of at most 1m")
	}
	if c.Webhook.URL == "" {
		if c.Webhook.SecretFile != "" {
			fault("webhook.url", "is missing: there is a secretFile, and nobody to tell")
		}
		return errors.Join(faults...)
	}
	if err := usage.CheckWebhookURL(c.Webhook.URL, c.Webhook.AllowPrivate); err != nil {
		fault("webhook.url", err.Error())
	}
	if c.Webhook.SecretFile == "" {
		fault("webhook.secretFile", "is missing: deliveries are signed; openssl rand -hex 32 makes a secret")
	}
	return errors.Join(faults...)
}

// webhook makes the webhook that is configured; nil if none is.
func (s *service) newWebhook(cfg Webhook) (*usage.Webhook, error) {
	if cfg.URL == "" {
		return nil, nil
	}
	secret, err := readPrivate(cfg.SecretFile)
	if err != nil {
		return nil, fmt.Errorf("alerts.webhook.secretFile: %w", err)
	}
	w, err := usage.NewWebhook(usage.WebhookConfig{
		URL: cfg.URL, Secret: usage.TrimSecret(secret), AllowPrivate: cfg.AllowPrivate, Timeout: cfg.Timeout.Std(), UserAgent: "keyward/" + readVersion().Version,
	}, s.registry, s.log)
	if err != nil {
		return nil, fmt.Errorf("alerts.webhook: %s: %w", cfg.SecretFile, err)
	}
	return w, nil
}

func (a *app) alertsCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "alerts", Short: "See what is odd, say that it is known, and test the webhook", Args: cobra.NoArgs,
		Long: "See what is odd about keys and their use, say that it is known, and test the webhook. What is worth an alert the\n" +
			"policy of an instance says (policy.alerts); alerts are resolved by themselves when what they tell of is over.",
	}
	a.clientFlags(c)
	c.AddCommand(a.alertsList(), a.alertsAck(), a.alertsTest())
	return c
}

func (a *app) alertsList() *cobra.Command {
	var instance, kind, key string
	var all bool
	var limit int
	c := &cobra.Command{
		Use: "list", Short: "List alerts that are open, those opened last first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			query := admin.AlertQuery{Kind: admin.AlertKind(kind), Open: !all}
			if kind != "" && !slices.Contains(admin.AlertKinds(), query.Kind) {
				return usageError{errors.New("--kind: must be newNetwork, refusals, unknownKeys, expiring or unused")}
			}
			if key != "" {
				var err error
				if query.KeyID, err = apikey.ParseID(key); err != nil {
					return usageError{errors.New("--key: must be the id of a key")}
				}
			}
			if limit < 0 {
				return usageError{errors.New("--limit: must be 0 (all) or more")}
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				var alerts []admin.AlertRecord
				for one, err := range client.Alerts(ctx, instance, query) {
					if err != nil {
						return err
					}
					if alerts = append(alerts, one); len(alerts) == limit {
						break
					}
				}
				err := printList(a, alerts, table[admin.AlertRecord]{
					header: "ALERT\tKIND\tSTATUS\tINSTANCE\tKEY\tOPENED\tSEEN\tCOUNT\tMESSAGE",
					row: func(r admin.AlertRecord) []string {
						return []string{r.ID.String(), string(r.Kind), alertStatus(r), r.InstanceID, keyOfAlert(r), when(r.OpenedAt), when(r.SeenAt), strconv.FormatInt(r.Count, 10), r.Message}
					},
					id: func(r admin.AlertRecord) string { return r.ID.String() },
				})
				if err == nil && !a.quiet && a.output == "table" && slices.ContainsFunc(alerts, func(r admin.AlertRecord) bool { return r.KeyID != nil }) {
					fmt.Fprintln(a.stderr, "If a key should not go on: keyward keys disable INSTANCE KEY")
				}
				return err
			})
		},
	}
	f := c.Flags()
	f.StringVar(&instance, "instance", "", "of this instance only; without it those of all, and of none")
	f.StringVar(&kind, "kind", "", "newNetwork, refusals, unknownKeys, expiring or unused")
	f.StringVar(&key, "key", "", "about the key with this id")
	f.BoolVar(&all, "all", false, "those that are resolved too")
	f.IntVar(&limit, "limit", 100, "at most so many; 0 for all")
	return c
}

func alertStatus(r admin.AlertRecord) string {
	if r.AckedBy != "" && r.ResolvedAt.IsZero() {
		return "open, acked"
	}
	return r.Status
}

func keyOfAlert(r admin.AlertRecord) string {
	if r.KeyID == nil {
		return ""
	}
	return r.KeyID.String()
}

func (a *app) alertsAck() *cobra.Command {
	var instance string
	c := &cobra.Command{
		Use: "ack ALERT", Short: "Say that an alert is known; a new network is resolved by that", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := apikey.ParseID(args[0])
			if err != nil {
				return usageError{errors.New("the alert's id must be a UUID: keyward alerts list shows it")}
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				r, err := client.AckAlert(ctx, instance, id)
				if err != nil {
					return err
				}
				disable := ""
				if r.KeyID != nil {
					disable = "keyward keys disable " + r.InstanceID + " " + r.KeyID.String()
				}
				return printOne(a, r, [][2]string{
					{"ALERT", r.ID.String()}, {"KIND", string(r.Kind)}, {"STATUS", alertStatus(r)}, {"INSTANCE", r.InstanceID}, {"KEY", keyOfAlert(r)},
					{"MESSAGE", r.Message}, {"OPENED", stamp(r.OpenedAt)}, {"ACKED", stamp(r.AckedAt) + " by " + r.AckedBy}, {"TO DISABLE", disable},
				})
			})
		},
	}
	c.Flags().StringVar(&instance, "instance", "", "that the alert is of; needed with a token of one instance")
	return c
}

func (a *app) alertsTest() *cobra.Command {
	return &cobra.Command{
		Use: "test", Short: "Have the server send a test notice to its webhook, once, and tell what became of it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				answer, err := client.TestAlerts(ctx)
				if err != nil {
					return err
				}
				status := ""
				if answer.Status != 0 {
					status = strconv.Itoa(answer.Status)
				}
				if err := printOne(a, answer, [][2]string{
					{"DELIVERED", strconv.FormatBool(answer.Delivered)}, {"STATUS", status}, {"ERROR", answer.Error},
					{"DELIVERY", answer.DeliveryID.String()}, {"TOOK", strconv.FormatInt(answer.Millis, 10) + "ms"},
				}); err != nil || answer.Delivered {
					return err
				}
				return errors.New("the webhook was not told: " + answer.Error)
			})
		},
	}
}
