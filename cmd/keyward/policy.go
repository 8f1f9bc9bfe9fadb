package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

func (a *app) policyCommand() *cobra.Command {
	c := &cobra.Command{Use: "policy", Short: "Show and set what the keys of an instance may be and use", Args: cobra.NoArgs}
	a.clientFlags(c)
	c.AddCommand(a.policyGet(), a.policySet())
	return c
}

func (a *app) policyGet() *cobra.Command {
	var inForce bool
	c := &cobra.Command{
		Use: "get INSTANCE", Short: "Show the policy of an instance, as policy set takes it",
		Long: "Show the policy of an instance, as policy set takes it. The comment at its top names the ETag, for\n" +
			"policy set --if-match.",
		Example: "  keyward policy get demo > policy.yaml\n  keyward policy get demo --in-force",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				in, err := client.VersionedInstance(ctx, args[0])
				if err != nil {
					return err
				}
				policy := in.Policy
				if inForce {
					policy = policy.InForce()
					for _, limits := range []*apikey.Limits{&policy.Defaults.Instance, &policy.Defaults.Agent, &policy.Defaults.User} {
						*limits = limits.Or(apikey.ShippedLimits)
					}
				}
				if a.output == "table" {
					fmt.Fprintf(a.stdout, "# ETag %s\n", in.ETag)
				}
				return a.printPolicy(policy)
			})
		},
	}
	c.Flags().BoolVar(&inForce, "in-force", false, "with what holds where the policy says nothing")
	return c
}

// printPolicy shows a policy, to people as the file that it can be written as.
func (a *app) printPolicy(policy apikey.Policy) error {
	if a.output != "table" {
		return a.printData(policy)
	}
	text, err := yaml.Marshal(policy)
	if err != nil {
		return err
	}
	_, err = a.stdout.Write(text)
	return err
}

func (a *app) policySet() *cobra.Command {
	var file, ifMatch string
	var dryRun bool
	c := &cobra.Command{
		Use:   "set INSTANCE --file FILE",
		Short: "Replace the policy of an instance; what it takes away is gone everywhere when the command returns",
		Long: "Replace the policy of an instance. The file, YAML or JSON, is the whole policy: what it does not say is as shipped.\n" +
			"With --if-match the command fails, with exit code 5, if the instance has changed since policy get showed that ETag.\n\n" +
			"  defaults:\n" +
			"    user: {rate: {requests: 60, per: 1m}, burst: 10}\n" +
			"  allowedScopes: [\"orders:*\"]\n" +
			"  caps: {instance: 500, user: 5, agent: 20}\n" +
			"  creation: {perHour: 60, perHourAndUser: 20}\n" +
			"  expiration: {default: time, required: true, life: 90d, longestLife: 180d, inactivityDays: 30}\n" +
			"  onLeak: {instance: revoke, agent: flag, user: revoke}\n" +
			"  keepRevoked: 90d\n" +
			"  alerts:\n" +
			"    refusals: {window: 5m, perKey: 100, perInstance: 500, factor: 5}\n" +
			"    unused: {disabled: true}\n",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var in admin.PolicyInput
			text, err := readConfigFile(file, a.stdin)
			if err != nil {
				return err
			}
			if err := yaml.UnmarshalStrict(text, &in); err != nil {
				return usageError{fmt.Errorf("%s: %w", file, errors.New(cleanYAMLError(err)))}
			}
			policy, err := in.Policy()
			if err != nil {
				return usageError{fmt.Errorf("%s: %w", file, err)}
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				// An instance is not made by a slip of the pen.
				ctx = manage.WithIfMatch(ctx, cmp.Or(ifMatch, "*"))
				old, err := client.VersionedInstance(ctx, args[0])
				if err != nil {
					return err
				}
				changes, err := differences(old.Policy, policy)
				if err != nil {
					return err
				}
				if dryRun {
					if ifMatch != "" && ifMatch != old.ETag {
						return &manage.Error{Status: http.StatusPreconditionFailed, Message: "it has changed since it had that ETag: read it again"}
					}
					if !a.quiet {
						fmt.Fprintf(a.stderr, "%d fields would change; nothing is changed.\n", len(changes))
					}
					return printList(a, changes, fieldTable)
				}
				changed, err := client.PutInstance(ctx, args[0], in)
				if err != nil {
					return err
				}
				a.sayWhere(changed.Effect)
				if a.quiet {
					return nil
				}
				return a.printPolicy(changed.Policy)
			})
		},
	}
	c.Flags().StringVar(&file, "file", "", "file with the whole policy; - for standard input (needed)")
	c.Flags().StringVar(&ifMatch, "if-match", "", "ETag that the instance must still have")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "show which fields would change, and change nothing")
	_ = c.MarkFlagRequired("file")
	return c
}

// A fieldChange is one field of a policy that two policies differ in, as JSON.
type fieldChange struct {
	Field  string          `json:"field"`
	Before json.RawMessage `json:"before,omitempty"`
	After  json.RawMessage `json:"after,omitempty"`
}

var fieldTable = table[fieldChange]{
	header: "FIELD\tBEFORE\tAFTER",
	row:    func(c fieldChange) []string { return []string{c.Field, string(c.Before), string(c.After)} },
	id:     func(c fieldChange) string { return c.Field },
}

// differences lists the fields that differ, by name.
func differences(before, after apikey.Policy) ([]fieldChange, error) {
	var sides [2]map[string]json.RawMessage
	for i, policy := range []apikey.Policy{before, after} {
		text, err := json.Marshal(policy)
		if err != nil {
			return nil, err
		}
		sides[i] = map[string]json.RawMessage{}
		flatten(sides[i], "", text)
	}
	all := maps.Clone(sides[0])
	maps.Copy(all, sides[1])
	var changes []fieldChange
	for _, field := range slices.Sorted(maps.Keys(all)) {
		if b, a := sides[0][field], sides[1][field]; string(b) != string(a) {
			changes = append(changes, fieldChange{field, b, a})
		}
	}
	return changes, nil
}

// flatten puts every value that is no object into fields, under its path.
func flatten(fields map[string]json.RawMessage, path string, text json.RawMessage) {
	var members map[string]json.RawMessage
	if json.Unmarshal(text, &members) != nil {
		fields[path] = text
		return
	}
	for name, value := range members {
		if path != "" {
			name = path + "." + name
		}
		flatten(fields, name, value)
	}
}

// instancesSwitch is the kill switch, on or off.
func (a *app) instancesSwitch(use, short string, disabled bool) *cobra.Command {
	return &cobra.Command{
		Use: use + " INSTANCE", Short: short, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				changed, err := client.SwitchInstance(ctx, args[0], disabled)
				if err != nil {
					return err
				}
				a.sayWhere(changed.Effect)
				return a.printInstance(changed.Instance)
			})
		},
	}
}
