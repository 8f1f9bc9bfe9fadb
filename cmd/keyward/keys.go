package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

func (a *app) keysCommand() *cobra.Command {
	c := &cobra.Command{Use: "keys", Short: "Make, find, change, rotate and revoke keys", Args: cobra.NoArgs}
	a.clientFlags(c)
	c.AddCommand(
		a.keysCreate(), a.keysList(), a.keysGet(), a.keysUpdate(), a.keysRotate(), a.keysAdvice(), a.keysLimits(), a.keysRevoke(),
		a.keysSwitch("disable", "Refuse a key until it is enabled; when the command returns, it is refused everywhere", true),
		a.keysSwitch("enable", "No longer refuse a key", false),
		a.keysImport(), a.keysExport(),
	)
	return c
}

func (a *app) keysCreate() *cobra.Command {
	var in admin.KeyInput
	var keyType, rate, expires, policy, once string
	var noScopes bool
	var burst, maxConcurrent, inactivityDays int
	var quotas map[string]string
	c := &cobra.Command{
		Use:   "create INSTANCE --name NAME",
		Short: "Make a key; its secret is shown once",
		Example: "  keyward keys create demo --name backend --expires-in 120d\n" +
			"  keyward keys create demo --name chat --type agent --agent sales --scope chat:use --rate 60/1m --burst 5",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in.Type = apikey.Type(keyType)
			in.ExpirationDate, in.ExpirationPolicy = expires, apikey.ExpirationPolicy(policy)
			if noScopes {
				if len(in.Scopes) > 0 {
					return usageError{errors.New("--no-scopes does not go with --scope")}
				}
				in.Scopes = []string{}
			}
			for flag, field := range map[string]**int{"burst": &in.Limits.Burst, "max-concurrent": &in.Limits.MaxConcurrent, "inactivity-days": &in.InactivityDays} {
				if cmd.Flags().Changed(flag) {
					n, _ := cmd.Flags().GetInt(flag)
					*field = &n
				}
			}
			if rate != "" {
				parsed, err := parseRate(rate)
				if err != nil {
					return usageError{err}
				}
				in.Limits.Rate = parsed
			}
			overrides, err := quotaOverrides(quotas)
			if err != nil {
				return err
			}
			for name, override := range overrides {
				if override != nil { // what is inherited needs no word
					if in.Quotas == nil {
						in.Quotas = map[string]apikey.QuotaOverride{}
					}
					in.Quotas[name] = *override
				}
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				return a.once(ctx, once, func(ctx context.Context) error {
					created, err := client.CreateKey(ctx, args[0], in)
					if err != nil {
						return err
					}
					return a.printMade(created)
				})
			})
		},
	}
	f := c.Flags()
	f.StringVar(&in.Name, "name", "", "what the key is for (needed)")
	f.StringVar(&in.Description, "description", "", "more about it")
	f.StringVar(&keyType, "type", "", "instance (default), agent or user")
	f.StringVar(&in.AgentName, "agent", "", "agent of an agent key")
	f.StringVar(&in.UserPrincipalName, "user", "", "user principal name of a user key")
	f.StringSliceVar(&in.Scopes, "scope", nil, "a right of the key; repeat for more; without any: all that the policy allows")
	f.BoolVar(&noScopes, "no-scopes", false, "give the key no right that a route could ask for")
	f.StringVar(&in.Environment, "environment", "", "environment that the key is for; any if empty")
	f.StringSliceVar(&in.AllowedIPs, "allow-ip", nil, "address or CIDR that the key may be used from; repeat for more")
	f.StringVar(&rate, "rate", "", "requests per time, such as 120/1m, or unlimited; inherited if empty")
	f.IntVar(&burst, "burst", 0, "requests that may come at once; inherited if not set")
	f.IntVar(&maxConcurrent, "max-concurrent", 0, "requests that may run at once; inherited if not set")
	f.StringToStringVar(&quotas, "quota", nil, "name=limit: what the key has instead of a quota that counts it alone; a number or unlimited; repeat for more")
	f.StringVar(&in.ExpiresIn, "expires-in", "", "life of the key, such as 120d")
	f.StringVar(&expires, "expires", "", "end of the key: RFC 3339, or a date, which means its end in UTC")
	f.StringVar(&policy, "expiration-policy", "", "none, time or inactivity; a date and days that are not given are the policy's")
	f.StringVar(&in.NotBefore, "not-before", "", "beginning of the key's life")
	f.IntVar(&inactivityDays, "inactivity-days", 0, "the key ends after so many days without use")
	f.StringToStringVar(&in.Metadata, "metadata", nil, "name=value to keep with the key; repeat for more")
	onceFlag(f, &once)
	_ = c.MarkFlagRequired("name")
	return c
}

func onceFlag(f *pflag.FlagSet, to *string) {
	f.StringVar(to, "idempotency-key", "", "repeated within ten minutes with the same key and flags, the command shows the same secret again")
}

// parseRate reads 120/1m or unlimited.
func parseRate(s string) (*admin.RateInput, error) {
	if s == "unlimited" {
		n := apikey.Unlimited
		return &admin.RateInput{Requests: &n}, nil
	}
	requests, per, ok := strings.Cut(s, "/")
	n, err := strconv.Atoi(requests)
	if !ok || err != nil {
		return nil, errors.New("--rate: must be requests/time, such as 120/1m, or unlimited")
	}
	return &admin.RateInput{Requests: &n, Per: per}, nil
}

var keyTable = table[admin.KeyRecord]{
	header: "ID\tNAME\tTYPE\tOWNER\tSTATUS\tHINT\tCREATED\tEXPIRES\tLAST USED",
	row: func(k admin.KeyRecord) []string {
		return []string{
			k.ID.String(), k.Name, string(k.Type), k.AgentName + k.UserPrincipalName, k.Status, k.Hint,
			when(k.CreatedAt), when(k.ExpirationDate), when(k.LastUsedAt),
		}
	},
	id: func(k admin.KeyRecord) string { return k.ID.String() },
}

func keyFields(k admin.KeyRecord) [][2]string {
	scopes := "all that the policy allows"
	if k.Scopes != nil {
		scopes = strings.Join(k.Scopes, " ")
		if scopes == "" {
			scopes = "none"
		}
	}
	return append([][2]string{
		{"ID", k.ID.String()}, {"INSTANCE", k.InstanceID}, {"NAME", k.Name}, {"DESCRIPTION", k.Description},
		{"TYPE", string(k.Type)}, {"AGENT", k.AgentName}, {"USER", k.UserPrincipalName}, {"STATUS", k.Status},
		{"HINT", k.Hint}, {"SCOPES", scopes}, {"ENVIRONMENT", k.Environment}, {"ALLOWED IPS", strings.Join(k.AllowedIPs, " ")},
		{"LIMITS", limitsText(k.Limits)}, {"QUOTAS", overridesText(k.Quotas)}, {"CREATED", stamp(k.CreatedAt) + " by " + k.CreatedBy},
		{"NOT BEFORE", stamp(k.NotBefore)}, {"EXPIRES", stamp(k.ExpirationDate)}, {"IDLE AFTER", daysText(k.InactivityDays)},
		{"LAST USED", stamp(k.LastUsedAt)}, {"LEAK REPORTED", stamp(k.LeakReportedAt)}, {"METADATA", metadataText(k.Metadata)},
	}, generationFields(k)...)
}

func metadataText(entries map[string]string) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		parts = append(parts, name+"="+entries[name])
	}
	return strings.Join(parts, " ")
}

func daysText(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("%d days without use", n)
}

// limitsText shows limits as they are set; what is not set is inherited.
func limitsText(l apikey.Limits) string {
	var parts []string
	count := func(name string, n int) {
		switch {
		case n == apikey.Unlimited:
			parts = append(parts, name+" unlimited")
		case n != 0:
			parts = append(parts, fmt.Sprintf("%s %d", name, n))
		}
	}
	if l.Rate.Requests > 0 {
		parts = append(parts, fmt.Sprintf("rate %d/%s", l.Rate.Requests, l.Rate.Per))
	} else {
		count("rate", l.Rate.Requests)
	}
	count("burst", l.Burst)
	count("max concurrent", l.MaxConcurrent)
	if parts == nil {
		return "inherited"
	}
	return strings.Join(parts, ", ")
}

func (a *app) keysGet() *cobra.Command {
	return &cobra.Command{
		Use: "get INSTANCE KEY-ID", Short: "Show one key", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := parseID("KEY-ID", args[1])
			if err != nil {
				return err
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				k, err := client.VersionedKey(ctx, args[0], id)
				if err != nil {
					return err
				}
				return printOne(a, k, append(keyFields(k.KeyRecord), [2]string{"ETAG", k.ETag}))
			})
		},
	}
}

func parseID(name, s string) (apikey.ID, error) {
	id, err := apikey.ParseID(s)
	if err != nil {
		return id, usageError{fmt.Errorf("%s: %w", name, err)}
	}
	return id, nil
}
