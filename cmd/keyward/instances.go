package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"keyward/authz/admin"
	"keyward/authz/manage"
)

func (a *app) instancesCommand() *cobra.Command {
	c := &cobra.Command{Use: "instances", Short: "Make, list and delete instances, and set their policies", Args: cobra.NoArgs}
	a.clientFlags(c)
	c.AddCommand(a.instancesPut(), a.instancesGet(), a.instancesList(), a.instancesDelete(),
		a.instancesSwitch("disable", "Refuse every key of an instance, at once", true), a.instancesSwitch("enable", "No longer refuse every key of an instance", false))
	return c
}

func (a *app) instancesPut() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "put INSTANCE",
		Short: "Make an instance, or replace the policy of one",
		Long: "Make an instance, or replace the policy of one. The policy is a YAML or JSON file:\n\n" +
			"  disabled: false\n" +
			"  defaults:\n" +
			"    user: {rate: {requests: 60, per: 1m}, burst: 10}\n" +
			"  total: {rate: {requests: 6000, per: 1m}, burst: 500}\n" +
			"  allowedScopes: [\"orders:*\"]\n",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var policy admin.PolicyInput
			if file != "" {
				text, err := readConfigFile(file, a.stdin)
				if err != nil {
					return err
				}
				if err := yaml.UnmarshalStrict(text, &policy); err != nil {
					return usageError{fmt.Errorf("%s: %w", file, errors.New(cleanYAMLError(err)))}
				}
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				if file == "" {
					in, err := ensureInstance(ctx, client, args[0])
					if err != nil {
						return err
					}
					return a.printInstance(in)
				}
				changed, err := client.PutInstance(ctx, args[0], policy)
				if err != nil {
					return err
				}
				return a.printInstance(changed.Instance)
			})
		},
	}
	c.Flags().StringVar(&file, "policy", "", "file with the whole policy; - for standard input; without it an instance that exists stays as it is")
	return c
}

// ensureInstance makes an instance where there is none. One that is there stays as it is, whoever made it, and when.
func ensureInstance(ctx context.Context, client *manage.Client, id string) (manage.Instance, error) {
	in, err := client.Instance(ctx, id) // which the audit has no refusal of where it is there, as mostly
	if refusedAs(err) != http.StatusNotFound {
		return in, err
	}
	made, err := client.PutInstance(manage.WithIfAbsent(ctx), id, admin.PolicyInput{})
	if refusedAs(err) == http.StatusPreconditionFailed { // somebody was faster
		return client.Instance(ctx, id)
	}
	return made.Instance, err
}

// refusedAs is the status that a server refused with; 0 where it did not.
func refusedAs(err error) int {
	if answer, ok := errors.AsType[*manage.Error](err); ok {
		return answer.Status
	}
	return 0
}

func (a *app) printInstance(in manage.Instance) error {
	if a.quiet {
		fmt.Fprintln(a.stdout, in.ID)
		return nil
	}
	if a.output != "table" {
		return a.printData(in)
	}
	policy, err := yaml.Marshal(in.Policy)
	if err != nil {
		return err
	}
	fmt.Fprintf(a.stdout, "ID       %s\nCREATED  %s\nPOLICY\n%s", in.ID, stamp(in.CreatedAt), policy)
	return nil
}

func (a *app) instancesGet() *cobra.Command {
	return &cobra.Command{
		Use: "get INSTANCE", Short: "Show an instance and its policy", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				in, err := client.VersionedInstance(ctx, args[0])
				if err != nil {
					return err
				}
				if a.output == "table" && !a.quiet {
					fmt.Fprintf(a.stdout, "ETAG     %s\n", in.ETag)
				} else if a.output != "table" && !a.quiet {
					return a.printData(in)
				}
				return a.printInstance(in.Instance)
			})
		},
	}
}

func (a *app) instancesList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List instances", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				all, err := client.Instances(ctx)
				if err != nil {
					return err
				}
				return printList(a, all, table[manage.Instance]{
					header: "ID\tSTATUS\tCREATED",
					row: func(in manage.Instance) []string {
						status := "active"
						if in.Policy.Disabled {
							status = "disabled"
						}
						return []string{in.ID, status, when(in.CreatedAt)}
					},
					id: func(in manage.Instance) string { return in.ID },
				})
			})
		},
	}
}

func (a *app) instancesDelete() *cobra.Command {
	var revokeKeys bool
	c := &cobra.Command{
		Use: "delete INSTANCE", Short: "Delete an instance with all its keys", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.confirm(fmt.Sprintf("Delete the instance %s with everything in it?", args[0])); err != nil {
				return err
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				deleted, err := client.DeleteInstance(ctx, args[0], revokeKeys)
				if err != nil {
					return err
				}
				return printOne(a, deleted, [][2]string{{"DELETED", deleted.InstanceID}, {"EFFECTIVE EVERYWHERE", stamp(deleted.EffectiveEverywhereAt)}})
			})
		},
	}
	c.Flags().BoolVar(&revokeKeys, "revoke-keys", false, "also if keys are left that work")
	return c
}
