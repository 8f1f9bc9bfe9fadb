package main

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

const inherit = "inherit"

func (a *app) keysUpdate() *cobra.Command {
	var f keyFlags
	var remove []string
	var anyScope, anyIP, noExpiry, noInactivity bool
	var policy, ifMatch string
	var quotas map[string]string
	c := &cobra.Command{
		Use:   "update INSTANCE KEY-ID",
		Short: "Change a key; what it loses, it has lost everywhere when the command returns",
		Long: "Change a key. What no flag names stays as it is.\n\n" +
			"With --if-match the command fails, with exit code 5, if the key has changed since keyward keys get showed that ETag.",
		Example: "  keyward keys update demo 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f --scope orders:read --rate 60/1m --burst inherit\n" +
			"  keyward keys update demo 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f --expires-in 90d",
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := parseID("KEY-ID", args[1])
			if err != nil {
				return err
			}
			flags := cmd.Flags()
			patch := admin.KeyPatch{
				Name: said(flags, "name", f.name), Description: said(flags, "description", f.description),
				Scopes: said(flags, "scope", f.scopes), AllowedIPs: said(flags, "allow-ip", f.allowedIPs),
				ExpirationDate: said(flags, "expires", f.expires), ExpiresIn: said(flags, "expires-in", f.expiresIn),
				InactivityDays:   said(flags, "inactivity-days", f.inactivityDays),
				ExpirationPolicy: said(flags, "expiration-policy", apikey.ExpirationPolicy(policy)),
			}
			for _, e := range []struct {
				flag, other string
				set         bool
				do          func()
			}{
				{"no-scopes", "scope", f.noScopes, func() { patch.Scopes = admin.To([]string{}) }},
				{"any-scope", "scope", anyScope, func() { patch.Scopes = admin.Null[[]string]() }},
				{"any-scope", "no-scopes", anyScope, func() {}},
				{"any-ip", "allow-ip", anyIP, func() { patch.AllowedIPs = admin.Null[[]string]() }},
				{"no-expiry", "expires", noExpiry, func() { patch.ExpirationDate = admin.Null[string]() }},
				{"no-expiry", "expires-in", noExpiry, func() {}},
				{"no-inactivity", "inactivity-days", noInactivity, func() { patch.InactivityDays = admin.Null[int]() }},
			} {
				if e.set && flags.Changed(e.other) {
					return usageError{fmt.Errorf("--%s does not go with --%s", e.flag, e.other)}
				}
				if e.set {
					e.do()
				}
			}
			if patch.Limits, err = f.limitsPatch(flags); err != nil {
				return err
			}
			overrides, err := quotaOverrides(quotas)
			if err != nil {
				return err
			}
			if len(overrides) > 0 {
				patch.Quotas = admin.To(overrides)
			}
			if len(f.metadata) > 0 || len(remove) > 0 {
				entries := map[string]*string{}
				for name, value := range f.metadata {
					entries[name] = &value
				}
				for _, name := range remove {
					if _, both := f.metadata[name]; both {
						return usageError{errors.New("--remove-metadata: a name is also given by --metadata")}
					}
					entries[name] = nil
				}
				patch.Metadata = admin.To(entries)
			}
			if reflect.ValueOf(patch).IsZero() {
				return usageError{errors.New("nothing to change: name it by a flag")}
			}
			return a.change(cmd.Context(), args[0], id, ifMatch, patch)
		},
	}
	flags := c.Flags()
	f.add(flags)
	flags.StringToStringVar(&quotas, "quota", nil, "name=limit: what the key has instead of a quota that counts it alone; a number, unlimited or inherit; repeat for more")
	flags.BoolVar(&anyScope, "any-scope", false, "give the key every right that the policy allows")
	flags.BoolVar(&anyIP, "any-ip", false, "let the key be used from everywhere")
	flags.BoolVar(&noExpiry, "no-expiry", false, "take the key's date away")
	flags.BoolVar(&noInactivity, "no-inactivity", false, "the key no longer ends without use")
	flags.StringVar(&policy, "expiration-policy", "", "none, time or inactivity; dates and days that are not given are the policy's")
	flags.StringSliceVar(&remove, "remove-metadata", nil, "name to keep no longer; repeat for more")
	flags.StringVar(&ifMatch, "if-match", "", "ETag that the key must still have")
	return c
}

// said is a member with the value of a flag, absent if the flag was not given.
func said[T any](flags *pflag.FlagSet, flag string, value T) admin.Member[T] {
	if !flags.Changed(flag) {
		return admin.Member[T]{}
	}
	return admin.To(value)
}

// keyFlags are what of a key can be changed.
type keyFlags struct {
	name, description, rate, burst, maxConcurrent, expires, expiresIn string
	scopes, allowedIPs                                                []string
	metadata                                                          map[string]string
	noScopes                                                          bool
	inactivityDays                                                    int
}

func (k *keyFlags) add(f *pflag.FlagSet) {
	f.StringVar(&k.name, "name", "", "what the key is for")
	f.StringVar(&k.description, "description", "", "more about it")
	f.StringSliceVar(&k.scopes, "scope", nil, "a right of the key, instead of those that it has; repeat for more")
	f.BoolVar(&k.noScopes, "no-scopes", false, "leave the key no right that a route could ask for")
	f.StringSliceVar(&k.allowedIPs, "allow-ip", nil, "address or CIDR that the key may be used from, instead of those that it has; repeat for more")
	f.StringVar(&k.rate, "rate", "", "requests per time, such as 120/1m; unlimited; or inherit")
	f.StringVar(&k.burst, "burst", "", "requests that may come at once; unlimited; or inherit")
	f.StringVar(&k.maxConcurrent, "max-concurrent", "", "requests that may run at once; unlimited; or inherit")
	f.StringVar(&k.expiresIn, "expires-in", "", "life of the key from now, such as 120d")
	f.StringVar(&k.expires, "expires", "", "end of the key: RFC 3339, or a date, which means its end in UTC")
	f.IntVar(&k.inactivityDays, "inactivity-days", 0, "the key ends after so many days without use")
	f.StringToStringVar(&k.metadata, "metadata", nil, "name=value to keep with the key; repeat for more")
}

// limitsPatch reads the flags of limits.
func (k *keyFlags) limitsPatch(flags *pflag.FlagSet) (admin.Member[admin.LimitsPatch], error) {
	var l admin.LimitsPatch
	if flags.Changed("rate") {
		l.Rate = admin.Null[admin.RatePatch]()
		if k.rate != inherit {
			rate, err := parseRate(k.rate)
			if err != nil {
				return admin.Member[admin.LimitsPatch]{}, usageError{err}
			}
			l.Rate = admin.To(admin.RatePatch{Requests: admin.To(*rate.Requests), Per: admin.To(rate.Per)})
		}
	}
	for _, count := range []struct {
		flag, text string
		to         *admin.Member[int]
	}{{"burst", k.burst, &l.Burst}, {"max-concurrent", k.maxConcurrent, &l.MaxConcurrent}} {
		if !flags.Changed(count.flag) {
			continue
		}
		switch n, err := strconv.Atoi(count.text); {
		case count.text == inherit:
			*count.to = admin.Null[int]()
		case count.text == "unlimited":
			*count.to = admin.To(apikey.Unlimited)
		case err != nil:
			return admin.Member[admin.LimitsPatch]{}, usageError{fmt.Errorf("--%s: must be a number, unlimited or inherit", count.flag)}
		default:
			*count.to = admin.To(n)
		}
	}
	if l == (admin.LimitsPatch{}) {
		return admin.Member[admin.LimitsPatch]{}, nil
	}
	return admin.To(l), nil
}

// keysSwitch is disable, or enable.
func (a *app) keysSwitch(use, short string, disabled bool) *cobra.Command {
	return &cobra.Command{
		Use: use + " INSTANCE KEY-ID", Short: short, Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := parseID("KEY-ID", args[1])
			if err != nil {
				return err
			}
			return a.change(cmd.Context(), args[0], id, "", admin.KeyPatch{Disabled: admin.To(disabled)})
		},
	}
}

// change changes a key and shows it.
func (a *app) change(ctx context.Context, instance string, id apikey.ID, ifMatch string, patch admin.KeyPatch) error {
	return a.withClient(ctx, func(ctx context.Context, client *manage.Client) error {
		if ifMatch != "" {
			ctx = manage.WithIfMatch(ctx, ifMatch)
		}
		changed, err := client.UpdateKey(ctx, instance, id, patch)
		if err != nil {
			return err
		}
		return a.printChanged(changed)
	})
}

func (a *app) printChanged(changed manage.ChangedKey) error {
	a.sayWhere(changed.Effect)
	if a.quiet {
		fmt.Fprintln(a.stdout, changed.ID)
		return nil
	}
	return printOne(a, changed, keyFields(changed.KeyRecord))
}

// sayWhere tells of replicas that do not know of a change yet.
func (a *app) sayWhere(e manage.Effect) {
	if e.Replicas.Confirmed < e.Replicas.Total {
		fmt.Fprintf(a.stderr, "Not everywhere yet: %d of %d replicas know; all do by %s.\n",
			e.Replicas.Confirmed, e.Replicas.Total, stamp(e.EffectiveEverywhereAt))
	}
}

func (a *app) keysRotate() *cobra.Command {
	var in admin.RotateInput
	var ifMatch, once string
	c := &cobra.Command{
		Use:   "rotate INSTANCE KEY-ID",
		Short: "Give a key another secret, which is shown once; the one before goes on for a while",
		Example: "  keyward keys rotate demo 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f --grace 7d\n" +
			"  keyward keys rotate demo 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f --grace 0s --yes",
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := parseID("KEY-ID", args[1])
			if err != nil {
				return err
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				grace, _ := apikey.ParseDuration(in.GracePeriod)
				if in.EndOldest || in.GracePeriod != "" && grace == 0 {
					if err := a.confirm("End a secret of the key at once?"); err != nil {
						return err
					}
				}
				if ifMatch != "" {
					ctx = manage.WithIfMatch(ctx, ifMatch)
				}
				return a.once(ctx, once, func(ctx context.Context) error {
					rotated, err := client.RotateKey(ctx, args[0], id, in)
					if err != nil {
						return err
					}
					a.sayWhere(rotated.Effect)
					return a.printMade(rotated.CreatedKey)
				})
			})
		},
	}
	f := c.Flags()
	f.StringVar(&in.GracePeriod, "grace", "", "how long the secret before goes on: 0s to 30d; by default 24h")
	f.StringVar(&in.ExpirationDate, "expires", "", "end of the key: RFC 3339, or a date, which means its end in UTC")
	f.StringVar(&in.ExpiresIn, "expires-in", "", "life of the key from now; by default, if it has an end, as long again as before")
	f.BoolVar(&in.EndOldest, "end-oldest", false, "where two secrets are valid already: end the older one at once")
	f.StringVar(&ifMatch, "if-match", "", "ETag that the key must still have")
	onceFlag(f, &once)
	return c
}

// printMade shows a key with a secret that is nowhere else. Where it cannot be shown, it says what to end.
func (a *app) printMade(made manage.CreatedKey) error {
	err := a.showMade(made)
	if err == nil {
		return nil
	}
	end := fmt.Sprintf("keyward keys revoke %s %s", made.Key.InstanceID, made.Key.ID)
	if n := len(made.Key.Generations); n > 1 {
		end += fmt.Sprintf(" --generation %d", made.Key.Generations[n-1].Number)
	}
	return fmt.Errorf("%w; the secret was made and is lost: end it with %s", err, end)
}

func (a *app) showMade(made manage.CreatedKey) error {
	if a.quiet {
		_, err := fmt.Fprintln(a.stdout, made.Secret.Reveal())
		return err
	}
	fmt.Fprintln(a.stderr, "Keep the secret now: it is not shown again.")
	answer := struct {
		Key    admin.KeyRecord `json:"key"`
		Secret string          `json:"secret"`
	}{made.Key, made.Secret.Reveal()}
	return printOne(a, answer, append(keyFields(made.Key), [2]string{"SECRET", made.Secret.Reveal()}))
}

// generationFields shows the secrets of a key, where it has had more than one.
func generationFields(k admin.KeyRecord) [][2]string {
	if len(k.Generations) < 2 {
		return nil
	}
	var fields [][2]string
	for _, g := range k.Generations {
		parts := []string{g.Hint, "made " + stamp(g.CreatedAt)}
		switch {
		case g.Revoked:
			parts = append(parts, "revoked "+stamp(g.ValidUntil))
		case !g.ValidUntil.IsZero():
			parts = append(parts, "valid until "+stamp(g.ValidUntil))
		}
		if g.LastUsedAt.IsZero() {
			parts = append(parts, "never used")
		} else {
			parts = append(parts, "last used "+stamp(g.LastUsedAt))
		}
		fields = append(fields, [2]string{"GENERATION " + strconv.Itoa(g.Number), strings.Join(parts, ", ")})
	}
	return fields
}

func (a *app) keysAdvice() *cobra.Command {
	return &cobra.Command{
		Use: "advice INSTANCE KEY-ID", Short: "Tell whether a key seems to be needed", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := parseID("KEY-ID", args[1])
			if err != nil {
				return err
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				advice, err := client.KeyAdvice(ctx, args[0], id)
				if err != nil {
					return err
				}
				fields := [][2]string{
					{"ADVICE", advice.Text}, {"LAST USED", stamp(advice.LastUsedAt)}, {"UNUSED", strconv.Itoa(advice.UnusedDays) + " days"},
				}
				if u := advice.Usage; u != nil {
					fields = append(fields, [2]string{"IN 30 DAYS", fmt.Sprintf("%s, %.1f a day, from %s", plural(u.Requests, "request"), u.PerDay, plural(int64(u.Networks), "network"))})
					for _, g := range u.Generations {
						fields = append(fields, [2]string{fmt.Sprintf("GENERATION %d", g.Number), plural(g.LastHour, "request") + " within the last hour"})
					}
				}
				return printOne(a, advice, fields)
			})
		},
	}
}

func plural(n int64, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}

func (a *app) keysLimits() *cobra.Command {
	var user, agent string
	c := &cobra.Command{
		Use: "limits INSTANCE [KEY-ID]", Short: "Show how many keys there may be and are; of one key, where each of its limits stands",
		Example: "  keyward keys limits demo --user ann@example.com\n  keyward keys limits demo 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f",
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 2 {
				if user != "" || agent != "" {
					return usageError{errors.New("--user and --agent do not go with one key")}
				}
				return a.limitsOfKey(cmd.Context(), args[0], args[1])
			}
			owner := admin.KeyOwner{}
			switch {
			case user != "" && agent != "":
				return usageError{errors.New("--user does not go with --agent")}
			case user != "":
				owner = admin.KeyOwner{Type: apikey.TypeUser, Name: user}
			case agent != "":
				owner = admin.KeyOwner{Type: apikey.TypeAgent, Name: agent}
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				l, err := client.KeyLimits(ctx, args[0], owner)
				if err != nil {
					return err
				}
				fields := [][2]string{{"KEYS", roomText(&l.Instance)}, {"KEYS OF THE OWNER", roomText(l.Owner)}}
				for _, most := range []struct {
					name string
					n    int
				}{{"CAP PER USER", l.PerUser}, {"CAP PER AGENT", l.PerAgent}} {
					fields = append(fields, [2]string{most.name, capText(most.n)})
				}
				fields = append(fields, [2]string{"MADE WITHIN AN HOUR", roomText(&l.Creation)}, [2]string{"OF THOSE BY YOU", roomText(l.Creator)})
				return printOne(a, l, fields)
			})
		},
	}
	c.Flags().StringVar(&user, "user", "", "tell this user's keys too")
	c.Flags().StringVar(&agent, "agent", "", "tell this agent's keys too")
	return c
}

func capText(n int) string {
	if n == apikey.Unlimited {
		return "unlimited"
	}
	return strconv.Itoa(n)
}

// roomText shows use and limit; "" where there is nothing to show.
func roomText(r *admin.Room) string {
	switch {
	case r == nil:
		return ""
	case r.Left == nil:
		return fmt.Sprintf("%d, unlimited", r.Used)
	}
	return fmt.Sprintf("%d of %d, %d left", r.Used, r.Limit, *r.Left)
}
