package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/foundationallm"
	"keyward/authz/manage"
)

func (a *app) quotasCommand() *cobra.Command {
	c := &cobra.Command{Use: "quotas", Short: "Show and set the quotas of an instance", Args: cobra.NoArgs}
	a.clientFlags(c)
	c.AddCommand(a.quotasList(), a.quotasGet(), a.quotasApply(), a.quotasDelete(), a.quotasReplay())
	return c
}

var quotaTable = table[admin.QuotaRecord]{
	header: "NAME\tCONTEXT\tPARTITION\tLIMIT\tENFORCED\tLOCKOUT\tSHADOW",
	row: func(q admin.QuotaRecord) []string {
		return []string{
			q.Name, q.Context, string(q.Partition), quotaLimit(int64(q.Limit), q.Window, q.Period), enforcedText(q.Enforced), q.Lockout, yesText(q.Shadow),
		}
	},
	id: func(q admin.QuotaRecord) string { return q.Name },
}

func quotaLimit(limit int64, window string, period apikey.Period) string {
	if period != "" {
		window = string(period)
	}
	return fmt.Sprintf("%d per %s", limit, window)
}

func enforcedText(e admin.EnforcedQuota) string {
	return quotaLimit(e.Limit, e.Window.String(), e.Period) + ", " + e.Counted
}

func yesText(b bool) string {
	if b {
		return "yes"
	}
	return ""
}

func (a *app) quotasList() *cobra.Command {
	var store bool
	c := &cobra.Command{
		Use: "list INSTANCE", Short: "List quotas; as JSON or YAML, as quotas apply takes them",
		Example: "  keyward quotas list demo -o yaml > quotas.yaml\n  keyward quotas list demo --quota-store > quota-store.json",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				records, err := client.Quotas(ctx, args[0])
				if err != nil {
					return err
				}
				if a.output == "table" && !store {
					return printList(a, records, quotaTable)
				}
				if !store {
					inputs := make([]admin.QuotaInput, len(records))
					for i := range records {
						inputs[i] = records[i].QuotaInput
					}
					return printList(a, inputs, table[admin.QuotaInput]{id: func(q admin.QuotaInput) string { return q.Name }})
				}
				quotas := make([]apikey.Quota, len(records))
				for i := range records {
					if quotas[i], err = records[i].Quota(); err != nil {
						return err
					}
				}
				text, err := foundationallm.FormatQuotaStore(quotas)
				if err != nil {
					return fmt.Errorf("these quotas make no quota-store.json:\n%w", err)
				}
				_, err = a.stdout.Write(text)
				return err
			})
		},
	}
	c.Flags().BoolVar(&store, "quota-store", false, "write FoundationaLLM's quota-store.json")
	return c
}

func (a *app) quotasGet() *cobra.Command {
	return &cobra.Command{
		Use: "get INSTANCE QUOTA", Short: "Show one quota", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				q, err := client.Quota(ctx, args[0], args[1])
				if err != nil {
					return err
				}
				if a.output != "table" {
					return a.printData(q.QuotaInput)
				}
				return printOne(a, q, [][2]string{
					{"NAME", q.Name}, {"DESCRIPTION", q.Description}, {"CONTEXT", q.Context}, {"PARTITION", string(q.Partition)},
					{"LIMIT", quotaLimit(int64(q.Limit), q.Window, q.Period)}, {"ENFORCED", enforcedText(q.Enforced)},
					{"LOCKOUT", q.Lockout}, {"SHADOW", yesText(q.Shadow)},
				})
			})
		},
	}
}

func (a *app) quotasApply() *cobra.Command {
	var file string
	var set admin.QuotaSet
	c := &cobra.Command{
		Use:   "apply INSTANCE --file FILE",
		Short: "Create and replace quotas, all that a file has or none; what changes is shown",
		Long: "Create and replace quotas. The file is YAML or JSON as keyward quotas list writes it, or FoundationaLLM's\n" +
			"quota-store.json as it is. All of it is judged, and all that is wrong is told at once. Counts that run go on.\n\n" +
			"  - name: completions-per-user\n" +
			"    context: CoreAPI:Completions\n" +
			"    partition: UserPrincipalName   # None, UserPrincipalName, UserIdentifier or ApiKey\n" +
			"    limit: 120\n" +
			"    window: 60s                    # or period: day, or month\n" +
			"    smoothed: true                 # 40 in any 20s\n" +
			"    lockout: 60s\n",
		Example: "  keyward quotas apply demo -f quota-store.json --dry-run\n  keyward quotas apply demo -f quotas.yaml --prune --yes",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			text, err := readConfigFile(file, a.stdin)
			if err != nil {
				return err
			}
			if set.Quotas, err = a.readQuotas(text); err != nil {
				return usageError{fmt.Errorf("%s: %w", file, err)}
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				if ctx, err = a.confirmPrune(ctx, client, args[0], set); err != nil {
					return err
				}
				applied, err := client.ApplyQuotas(ctx, args[0], set)
				if err != nil {
					return err
				}
				return a.printApplied(applied)
			})
		},
	}
	c.Flags().StringVarP(&file, "file", "f", "", "file with quotas; - for standard input (needed)")
	c.Flags().BoolVar(&set.Prune, "prune", false, "delete quotas that are not in the file")
	c.Flags().BoolVar(&set.DryRun, "dry-run", false, "show what would change, and change nothing")
	_ = c.MarkFlagRequired("file")
	return c
}

// readQuotas reads quotas in either format.
func (a *app) readQuotas(text []byte) ([]admin.QuotaInput, error) {
	if foundationallm.IsQuotaStore(text) {
		quotas, warnings, err := foundationallm.ParseQuotaStore(text)
		if err != nil {
			return nil, err
		}
		for _, warning := range warnings {
			fmt.Fprintln(a.stderr, "warning:", warning)
		}
		list := make([]admin.QuotaInput, len(quotas))
		for i := range quotas {
			list[i] = admin.QuotaInputOf(&quotas[i])
		}
		return list, nil
	}
	text, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return nil, errors.New(cleanYAMLError(err))
	}
	list := []admin.QuotaInput{} // never null
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&list); err != nil || list == nil {
		if _, other := errors.AsType[*json.UnmarshalTypeError](err); err == nil || other && !bytes.HasPrefix(text, []byte("[")) {
			return nil, errors.New("must be a list of quotas")
		}
		return nil, errors.New(cleanYAMLError(err))
	}
	return list, nil
}

// confirmPrune asks before quotas are deleted, and sees to it that no others are than those it asked about.
func (a *app) confirmPrune(ctx context.Context, client *manage.Client, instance string, set admin.QuotaSet) (context.Context, error) {
	if !set.Prune || set.DryRun || a.yes {
		return ctx, nil
	}
	set.DryRun = true
	would, err := client.ApplyQuotas(ctx, instance, set)
	if err != nil {
		return ctx, err
	}
	var gone []string
	for _, c := range would.Changes {
		if c.Change == manage.QuotaDelete {
			gone = append(gone, c.Name)
		}
	}
	if len(gone) == 0 {
		return manage.WithIfMatch(ctx, would.ETag), nil
	}
	return manage.WithIfMatch(ctx, would.ETag), a.confirm("Delete quotas: " + strings.Join(gone, ", ") + "?")
}

// A quotaFieldChange is one field that a change of a quota changes.
type quotaFieldChange struct {
	quota, field, before, after string
	change                      manage.QuotaVerb
}

var quotaFieldTable = table[quotaFieldChange]{
	header: "QUOTA\tCHANGE\tFIELD\tBEFORE\tAFTER",
	row: func(c quotaFieldChange) []string {
		return []string{c.quota, string(c.change), c.field, c.before, c.after}
	},
}

// printApplied shows what was changed, or would be.
func (a *app) printApplied(applied manage.AppliedQuotas) error {
	a.sayWhere(applied.Effect)
	if !a.quiet {
		n := map[manage.QuotaVerb]int{}
		for _, c := range applied.Changes {
			n[c.Change]++
		}
		would, nothing := "", ""
		if applied.DryRun {
			would, nothing = " would be", "; nothing is changed"
		}
		fmt.Fprintf(a.stderr, "%d%s created, %d updated, %d deleted%s.\n",
			n[manage.QuotaCreate], would, n[manage.QuotaUpdate], n[manage.QuotaDelete], nothing)
	}
	if a.output != "table" || a.quiet {
		return printList(a, applied.Changes, table[manage.QuotaChange]{id: func(c manage.QuotaChange) string { return c.Name }})
	}
	var fields []quotaFieldChange
	for _, c := range applied.Changes {
		var sides [2]map[string]json.RawMessage
		for i, record := range []*admin.QuotaRecord{c.Before, c.After} {
			sides[i] = map[string]json.RawMessage{}
			if record != nil {
				text, err := json.Marshal(record.QuotaInput)
				if err != nil {
					return err
				}
				flatten(sides[i], "", text)
			}
		}
		all := maps.Clone(sides[0])
		maps.Copy(all, sides[1])
		delete(all, "name")
		for _, field := range slices.Sorted(maps.Keys(all)) {
			if before, after := string(sides[0][field]), string(sides[1][field]); before != after {
				fields = append(fields, quotaFieldChange{c.Name, field, before, after, c.Change})
			}
		}
	}
	if len(fields) == 0 {
		return nil
	}
	return printList(a, fields, quotaFieldTable)
}

func (a *app) quotasDelete() *cobra.Command {
	return &cobra.Command{
		Use: "delete INSTANCE QUOTA", Short: "Delete a quota; when the command returns, it limits nothing anywhere", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				if err := a.confirm("Delete the quota " + args[1] + "?"); err != nil {
					return err
				}
				gone, err := client.DeleteQuota(ctx, args[0], args[1])
				if err != nil {
					return err
				}
				a.sayWhere(gone.Effect)
				if a.quiet {
					fmt.Fprintln(a.stdout, gone.Name)
					return nil
				}
				return printOne(a, gone, [][2]string{{"DELETED", gone.Name}})
			})
		},
	}
}

// quotaOverrides reads name=limit flags; a limit of inherit is nil.
func quotaOverrides(flags map[string]string) (map[string]*apikey.QuotaOverride, error) {
	list := map[string]*apikey.QuotaOverride{}
	for name, limit := range flags {
		switch n, err := strconv.Atoi(limit); {
		case limit == inherit:
			list[name] = nil
		case limit == "unlimited":
			list[name] = &apikey.QuotaOverride{Limit: apikey.Unlimited}
		case err != nil:
			return nil, usageError{errors.New("--quota: must be name=limit, and the limit a number, unlimited or inherit")}
		default:
			list[name] = &apikey.QuotaOverride{Limit: n}
		}
	}
	return list, nil
}

func overridesText(list map[string]apikey.QuotaOverride) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(list)) {
		limit := strconv.Itoa(list[name].Limit)
		if list[name].Limit == apikey.Unlimited {
			limit = "unlimited"
		}
		parts = append(parts, name+" "+limit)
	}
	return strings.Join(parts, ", ")
}
