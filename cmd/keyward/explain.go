package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

func (a *app) explainCommand() *cobra.Command {
	var in admin.VerifyInput
	var decision, bodyFile string
	var headers []string
	var extensions map[string]string
	var noKey bool
	c := &cobra.Command{
		Use:   "explain INSTANCE [PATH] < SECRET-FILE",
		Short: "Tell what would be decided about a request, and step by step why; or why one was refused",
		Long: "Tell what would be decided about a request, and step by step why: what each step looked at, and where the limits\n" +
			"stand. Nothing is spent, and no key is used by it. The secret of the key comes by standard input; --key names a key\n" +
			"in its place, and then no credential is looked at.\n\n" +
			"With --decision, tell why a request was refused a moment ago: its answer and the log have the id. Only the replica\n" +
			"that refused it knows, and only the last few thousand.",
		Example: "  keyward explain demo /orders --method POST --client 192.0.2.7 < key.secret\n" +
			"  keyward explain demo /orders --key 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f -H 'x-environment: prod'\n" +
			"  keyward explain demo --decision 5e0c2f9f0f0b4d1c8f4f0a7d3b2a1c00",
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if decision != "" {
				if len(args) > 1 || in.KeyID != "" || noKey {
					return usageError{errors.New("--decision: is of a request that was: it goes with no other")}
				}
				return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
					return a.explainDecision(ctx, client, args[0], decision)
				})
			}
			if len(args) > 1 {
				in.Path = args[1]
			}
			in.ContextExtensions = extensions
			for _, h := range headers {
				name, value, ok := strings.Cut(h, ":")
				if !ok || strings.TrimSpace(name) == "" {
					return usageError{errors.New("--header: must be 'name: value'")}
				}
				if (apikey.Format{}).Within(value) {
					return usageError{errors.New("--header: holds what looks like a secret: it has to come by standard input")}
				}
				in.Headers = append(in.Headers, admin.NameValue{Name: strings.TrimSpace(name), Value: strings.TrimSpace(value)})
			}
			if bodyFile != "" {
				text, err := os.ReadFile(bodyFile)
				if err != nil {
					return err
				}
				body := string(text)
				in.Body = &body
			}
			switch {
			case in.KeyID != "" && noKey:
				return usageError{errors.New("--no-key does not go with --key")}
			case in.KeyID != "":
				if _, err := parseID("--key", in.KeyID); err != nil {
					return err
				}
			case !noKey:
				secret, err := a.readSecret()
				if err != nil {
					return err
				}
				in.Secret = secret.Reveal()
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				v, err := client.Verify(ctx, args[0], in)
				if err != nil {
					return err
				}
				return a.printVerification(v)
			})
		},
	}
	a.clientFlags(c)
	f := c.Flags()
	f.StringVar(&in.KeyID, "key", "", "id of the key, in place of its secret")
	f.BoolVar(&noKey, "no-key", false, "the request carries no key")
	f.StringVar(&in.Method, "method", "GET", "method of the request")
	f.StringVar(&in.Host, "host", "", "host of the request")
	f.StringArrayVarP(&headers, "header", "H", nil, "'name: value' of the request; repeatable")
	f.StringToStringVar(&extensions, "extension", nil, "name=value of a context extension: instance, agent, environment, required_scopes")
	f.StringVar(&bodyFile, "body", "", "file with the request's body, where Envoy sends that")
	f.StringVar(&in.ClientAddress, "client", "", "client's address; by default what the headers say, as configured")
	f.StringVar(&in.Time, "time", "", "when to judge the key's life, such as 2026-12-24T18:00:00Z; by default now")
	f.StringVar(&decision, "decision", "", "id of a request that was refused a moment ago")
	return c
}

var stepTable = table[admin.StepDone]{
	header: "STEP\tANSWER\tLOOKED AT",
	row:    func(s admin.StepDone) []string { return []string{s.Step, s.Answer, s.Detail} },
}

func (a *app) printVerification(v admin.Verification) error {
	if a.output != "table" {
		return a.printData(v)
	}
	if a.quiet {
		fmt.Fprintln(a.stdout, v.Outcome)
		return nil
	}
	if err := printOne(a, v, [][2]string{
		{"OUTCOME", fmt.Sprintf("%s (%d)", v.Outcome, v.HTTPStatus)}, {"REASON", v.Reason}, {"RETRY AFTER", secondsText(v.RetryAfter)},
		{"KEY", idText(v.KeyID)}, {"ROUTE", v.Route}, {"SHADOWED", v.Shadowed},
	}); err != nil {
		return err
	}
	fmt.Fprintln(a.stdout)
	if err := writeTable(a.stdout, v.Steps, stepTable); err != nil || len(v.Limits) == 0 {
		return err
	}
	fmt.Fprintln(a.stdout)
	return writeTable(a.stdout, v.Limits, keyLimitTable)
}

func (a *app) explainDecision(ctx context.Context, client *manage.Client, instance, id string) error {
	r, err := client.Decision(ctx, instance, id)
	if err != nil {
		return err
	}
	if err := printOne(a, r, [][2]string{
		{"OUTCOME", fmt.Sprintf("%s (%d)", r.Outcome, r.HTTPStatus)}, {"REASON", r.Reason}, {"AT", stamp(r.At)},
		{"RETRY AFTER", secondsText(r.RetryAfter)}, {"KEY", idText(r.KeyID)}, {"ROUTE", r.Route}, {"QUOTA", r.Quota}, {"CONTEXT", r.Context},
		{"SHADOWED", r.Shadowed}, {"REPLICA", r.Replica},
	}); err != nil || a.output != "table" {
		return err
	}
	fmt.Fprintln(a.stdout)
	return writeTable(a.stdout, r.Steps, stepTable)
}

func idText(id *apikey.ID) string {
	if id == nil {
		return ""
	}
	return id.String()
}

func secondsText(n int) string {
	if n == 0 {
		return ""
	}
	return (time.Duration(n) * time.Second).String()
}

var keyLimitTable = table[admin.KeyLimit]{
	header: "LIMIT\tCONTEXT\tCOUNTED BY\tMOST\tUSED\tREMAINING\tRESETS\tLOCKED UNTIL\tFROM\tSHADOW",
	row: func(l admin.KeyLimit) []string {
		name, most, remaining, from := l.Limit, capText(int(l.Most)), capText(int(l.Remaining)), "inherited"
		if l.Quota != "" {
			name += " " + l.Quota
		}
		switch {
		case l.Every != "":
			most += ", one more in " + l.Every
		case l.Window != "":
			most += " per " + l.Window
		}
		if l.Overridden {
			from = "key"
		}
		return []string{name, l.Context, l.CountedBy, most, fmt.Sprint(l.Used), remaining, when(l.ResetsAt), stamp(l.LockedUntil), from, yesText(l.Shadow)}
	},
	id: func(l admin.KeyLimit) string { return strings.TrimSpace(l.Limit + " " + l.Quota) },
}

// limitsOfKey shows where the limits of one key stand.
func (a *app) limitsOfKey(ctx context.Context, instance, key string) error {
	id, err := parseID("KEY-ID", key)
	if err != nil {
		return err
	}
	return a.withClient(ctx, func(ctx context.Context, client *manage.Client) error {
		l, err := client.LimitsOfKey(ctx, instance, id)
		if err != nil {
			return err
		}
		if a.output != "table" {
			return a.printData(l)
		}
		return printList(a, l.Limits, keyLimitTable)
	})
}
