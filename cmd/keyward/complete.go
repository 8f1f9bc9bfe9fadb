package main

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

const (
	// completeTimeout is how long a shell waits for us, with a person before it.
	completeTimeout = 2 * time.Second
	completeMost    = 200 // more help nobody
	completeSearch  = 2000
)

// A completer lists what may stand at one place; before are the arguments to the left of it.
type completer func(ctx context.Context, client *manage.Client, before []string, prefix string) []cobra.Completion

// completers are for arguments, by what a command's Use calls them.
var completers = map[string]completer{
	"INSTANCE": func(ctx context.Context, client *manage.Client, _ []string, _ string) (list []cobra.Completion) {
		all, _ := client.Instances(ctx)
		for _, in := range all {
			list = append(list, in.ID)
		}
		return list
	},
	"KEY-ID": func(ctx context.Context, client *manage.Client, before []string, prefix string) (list []cobra.Completion) {
		if len(before) == 0 {
			return nil
		}
		seen := 0
		for k, err := range client.Keys(ctx, before[0]) {
			if seen++; err != nil || seen > completeSearch || len(list) == completeMost {
				break
			}
			if id := k.ID.String(); strings.HasPrefix(id, prefix) {
				list = append(list, cobra.CompletionWithDesc(id, k.Name+", "+k.Status))
			}
		}
		return list
	},
	"QUOTA": func(ctx context.Context, client *manage.Client, before []string, _ string) (list []cobra.Completion) {
		if len(before) == 0 {
			return nil
		}
		all, _ := client.Quotas(ctx, before[0])
		for _, q := range all {
			list = append(list, cobra.CompletionWithDesc(q.Name, q.Context))
		}
		return list
	},
	"TOKEN-ID": func(ctx context.Context, client *manage.Client, _ []string, _ string) (list []cobra.Completion) {
		all, _ := client.Tokens(ctx)
		for _, token := range all {
			list = append(list, cobra.CompletionWithDesc(token.ID.String(), token.Name))
		}
		return list
	},
	"LEASE": func(ctx context.Context, client *manage.Client, before []string, _ string) (list []cobra.Completion) {
		if len(before) == 0 {
			return nil
		}
		all, _ := client.InFlight(ctx, before[0])
		for _, r := range all {
			list = append(list, cobra.CompletionWithDesc(r.LeaseID, r.Method+" "+r.Path))
		}
		return list
	},
}

// flagWords are the values of flags that take one of a few.
var flagWords = map[string][]string{
	"output": {"table", "json", "jsonl", "yaml"},
	"type":   {string(apikey.TypeInstance), string(apikey.TypeAgent), string(apikey.TypeUser)},
	"role":   {"owner", "operator", "auditor", "user"},

	"interval": {string(admin.UsageMinute), string(admin.UsageHour), string(admin.UsageDay)},
	"by":       {string(admin.ByRequests), string(admin.ByRefused)},
}

// addCompletion teaches every command what a shell may complete: arguments by their names in Use, flags by
// theirs. Ids are asked of the server that the command would call.
func (a *app) addCompletion(c *cobra.Command) {
	if _, arguments, ok := strings.Cut(c.Use, " "); ok && c.ValidArgsFunction == nil {
		c.ValidArgsFunction = a.completeArguments(strings.Fields(strings.NewReplacer("[", "", "]", "").Replace(arguments)))
	}
	c.LocalFlags().VisitAll(func(f *pflag.Flag) {
		var complete cobra.CompletionFunc
		switch words := flagWords[f.Name]; {
		case f.Value.Type() != "string":
		case words != nil:
			complete = cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)
		case f.Name == "instance":
			complete = a.completeArguments([]string{"INSTANCE"})
		case f.Name == "context":
			complete = func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
				return a.contextNames(), cobra.ShellCompDirectiveNoFileComp
			}
		}
		if complete != nil {
			_ = c.RegisterFlagCompletionFunc(f.Name, complete) // an error only for one that has it already
		}
	})
	for _, child := range c.Commands() {
		a.addCompletion(child)
	}
}

func (a *app) completeArguments(names []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, before []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(before) >= len(names) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		switch name := names[len(before)]; {
		case name == "FILE":
			return nil, cobra.ShellCompDirectiveDefault
		case name == "CONTEXT":
			return a.contextNames(), cobra.ShellCompDirectiveNoFileComp
		case completers[name] == nil || a.offline: // which would open the store, and bring its schema up to date
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), completeTimeout)
		defer cancel()
		var list []cobra.Completion
		// What cannot be had is not completed; the command itself says why.
		_ = a.withClient(ctx, func(ctx context.Context, client *manage.Client) error {
			list = completers[names[len(before)]](ctx, client, before, prefix)
			return nil
		})
		return list, cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) contextNames() []cobra.Completion {
	all, _ := a.readContexts()
	return slices.Sorted(maps.Keys(all.Contexts))
}
