package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

// filterFlags are those that say which keys are meant.
func filterFlags(f *pflag.FlagSet, in *admin.KeyListInput) {
	f.StringVar((*string)(&in.Type), "type", "", "instance, agent or user")
	f.StringVar(&in.Status, "status", "", "active, disabled, revoked or expired")
	f.StringVar(&in.UserPrincipalName, "user", "", "keys of this user")
	f.StringVar(&in.AgentName, "agent", "", "keys of this agent")
	f.StringVar(&in.Environment, "environment", "", "keys for this environment")
	f.StringVar(&in.CreatedBy, "created-by", "", "keys made by, exactly, such as token:0192f0c1-…")
	f.StringVar(&in.NamePrefix, "name-prefix", "", "what the name begins with")
	f.StringVar(&in.UnusedFor, "unused-for", "", "not used for so long, nor made in that time, such as 90d")
	f.StringVar(&in.ExpiresBefore, "expires-before", "", "expires before a time, a date, or within a duration such as 30d")
	f.StringVar(&in.IdleBefore, "idle-before", "", "expires before then, unless it is used: a time, a date or a duration")
	f.BoolVar(&in.NeverUsed, "never-used", false, "never used")
	f.BoolVar(&in.NoExpiration, "no-expiration", false, "expires neither by time nor for idleness")
}

// noEmptyFilter refuses a filter that was given and is empty, such as --unused-for "$DAYS" in a script that
// has lost its DAYS: as one that was not given it would mean more keys, not fewer.
func noEmptyFilter(given *pflag.FlagSet) error {
	var err error
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	filterFlags(own, &admin.KeyListInput{})
	own.VisitAll(func(f *pflag.Flag) {
		if g := given.Lookup(f.Name); g.Changed && g.Value.String() == "" {
			err = usageError{fmt.Errorf("--%s: is empty: say which keys, or leave it out for all", f.Name)}
		}
	})
	return err
}

func (a *app) keysList() *cobra.Command {
	var in admin.KeyListInput
	var limit int
	c := &cobra.Command{
		Use: "list INSTANCE", Short: "List the keys of an instance, by default newest first",
		Example: "  keyward keys list demo --unused-for 90d\n" +
			"  keyward keys list demo --type agent --status active --order name",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if limit < 0 {
				return usageError{errors.New("--limit: must be 0 (all) or more")}
			}
			if err := noEmptyFilter(cmd.Flags()); err != nil {
				return err
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				var all []admin.KeyRecord
				for k, err := range client.FindKeys(ctx, args[0], in) {
					if err != nil {
						return err
					}
					if all = append(all, k); len(all) == limit {
						break
					}
				}
				return printList(a, all, keyTable)
			})
		},
	}
	filterFlags(c.Flags(), &in)
	c.Flags().StringVar((*string)(&in.OrderBy), "order", "", `createdAt, name, lastUsedAt, expirationDate, each perhaps followed by " desc", or idleAfter; by default what the filter is about`)
	c.Flags().IntVar(&limit, "limit", 0, "at most so many; 0 for all")
	return c
}

func (a *app) keysRevoke() *cobra.Command {
	var reason string
	var generation int
	in := admin.BulkRevocation{}
	count := 0
	c := &cobra.Command{
		Use:   "revoke INSTANCE [KEY-ID]",
		Short: "End a key, or every key that a filter means, for good; when the command returns, it is refused everywhere",
		Long: "End a key for good, or one secret of it, or every key that a filter means.\n\n" +
			"Where a filter means more than ten keys, or one that was used within the last 7 days, a script has to repeat their\n" +
			"number by --count; --dry-run shows them and revokes nothing.",
		Example: "  keyward keys revoke demo 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f --reason superseded\n" +
			"  keyward keys revoke demo 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f --generation 1\n" +
			"  keyward keys revoke demo --unused-for 90d --reason unused --dry-run",
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := noEmptyFilter(cmd.Flags()); err != nil {
				return err
			}
			if cmd.Flags().Changed("count") {
				in.Count = &count
			}
			if len(args) == 1 {
				if cmd.Flags().Changed("generation") {
					return usageError{errors.New("--generation: is of one key: name its id")}
				}
				if !in.All && in.Filter == (admin.KeyListInput{}) {
					return usageError{errors.New("name a key, or say by flags which keys, or --all")}
				}
				in.Reason = apikey.RevocationReason(reason)
				return a.revokeMany(cmd.Context(), args[0], in)
			}
			if in.All || in.DryRun || in.Count != nil || in.Filter != (admin.KeyListInput{}) {
				return usageError{errors.New("a filter, --all, --count and --dry-run do not go with one key")}
			}
			id, err := parseID("KEY-ID", args[1])
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("generation") {
				if reason != "" {
					return usageError{errors.New("--reason: is of a key: it does not go with --generation")}
				}
				return a.revokeGeneration(cmd.Context(), args[0], id, generation)
			}
			return a.revokeOne(cmd.Context(), args[0], id, reason)
		},
	}
	f := c.Flags()
	f.StringVar(&reason, "reason", "", "keyCompromise, superseded, ownerLeft, unused or other")
	f.IntVar(&generation, "generation", 0, "end only this secret of the key")
	filterFlags(f, &in.Filter)
	f.BoolVar(&in.All, "all", false, "every key of the instance")
	f.BoolVar(&in.DryRun, "dry-run", false, "show which keys would go and when each was last used, and revoke nothing")
	f.IntVar(&count, "count", 0, "how many keys you expect")
	return c
}

func (a *app) revokeOne(ctx context.Context, instance string, id apikey.ID, reason string) error {
	return a.withClient(ctx, func(ctx context.Context, client *manage.Client) error {
		if !a.yes {
			k, err := client.Key(ctx, instance, id)
			if err != nil {
				return err
			}
			used := "never used"
			if !k.LastUsedAt.IsZero() {
				used = "last used " + when(k.LastUsedAt)
			}
			if err := a.confirm(fmt.Sprintf("Revoke %q (%s, %s)?", k.Name, k.Hint, used)); err != nil {
				return err
			}
		}
		revoked, err := client.RevokeKey(ctx, instance, id, reason)
		if err != nil {
			return err
		}
		a.sayWhere(revoked.Effect)
		if a.quiet {
			fmt.Fprintln(a.stdout, revoked.KeyID)
			return nil
		}
		return printOne(a, revoked, [][2]string{
			{"ID", revoked.KeyID.String()}, {"REVOKED", stamp(revoked.RevokedAt)}, {"EFFECTIVE EVERYWHERE", stamp(revoked.EffectiveEverywhereAt)},
		})
	})
}

func (a *app) revokeGeneration(ctx context.Context, instance string, id apikey.ID, number int) error {
	if err := a.confirm(fmt.Sprintf("End the secret of generation %d?", number)); err != nil {
		return err
	}
	return a.withClient(ctx, func(ctx context.Context, client *manage.Client) error {
		changed, err := client.RevokeGeneration(ctx, instance, id, number)
		if err != nil {
			return err
		}
		return a.printChanged(changed)
	})
}

// revokeMany shows at a terminal what would go before it asks; a script has said --yes, and the server asks
// it for the number of keys where that matters.
func (a *app) revokeMany(ctx context.Context, instance string, in admin.BulkRevocation) error {
	a.long = true
	return a.withClient(ctx, func(ctx context.Context, client *manage.Client) error {
		if !in.DryRun && !a.yes {
			look := in
			look.DryRun = true
			would, err := client.RevokeKeys(ctx, instance, look)
			if err != nil {
				return err
			}
			if err := writeTable(a.stderr, would.Keys, keyTable); err != nil {
				return err
			}
			if err := a.confirm(fmt.Sprintf("Revoke %d keys, of which %d were used within the last 7 days?", would.Count, would.RecentlyUsed)); err != nil {
				return err
			}
			if in.Count == nil { // what was seen is what was agreed to
				in.Count = &would.Count
			}
		}
		done, err := client.RevokeKeys(ctx, instance, in)
		if err != nil {
			return err
		}
		if in.DryRun {
			fmt.Fprintf(a.stderr, "Would revoke %d keys, of which %d were used within the last 7 days.\n", done.Count, done.RecentlyUsed)
			if done.Count > len(done.Keys) {
				fmt.Fprintf(a.stderr, "Only the first %d are shown.\n", len(done.Keys))
			}
			return printList(a, done.Keys, keyTable)
		}
		if done.Revoked > 0 {
			a.sayWhere(done.Effect)
		}
		if a.quiet {
			fmt.Fprintln(a.stdout, done.Revoked)
			return nil
		}
		return printOne(a, done, [][2]string{
			{"REVOKED", strconv.Itoa(done.Revoked)}, {"EFFECTIVE EVERYWHERE", stamp(done.EffectiveEverywhereAt)},
		})
	})
}
