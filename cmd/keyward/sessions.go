package main

import (
	"context"
	"errors"
	"strconv"

	"github.com/spf13/cobra"

	"keyward/authz/admin"
	"keyward/authz/manage"
)

func (a *app) sessionsCommand() *cobra.Command {
	c := &cobra.Command{Use: "sessions", Short: "End who is signed in to the portal", Args: cobra.NoArgs}
	a.clientFlags(c)
	var all bool
	end := &cobra.Command{
		Use: "end (ACTOR | --all)", Short: "End sessions of the portal, at once",
		Long: "End sessions of the portal, at once. ACTOR is who signed in by OIDC, as keyward audit list --action session.begin\n" +
			"shows it: oidc:, the issuer, # and the subject. Take the role away at the issuer first: who still has one can sign in\n" +
			"again. Sessions that began with a management token end when that is revoked.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 1) == all {
				return usageError{errors.New("say either whose sessions are to end, or --all")}
			}
			whose := admin.WhoseSessions{All: all}
			if !all {
				whose.Actor = args[0]
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				ended, err := client.EndSessions(ctx, whose)
				if err != nil {
					return err
				}
				return printOne(a, ended, [][2]string{{"ENDED", strconv.Itoa(ended.Ended)}})
			})
		},
	}
	end.Flags().BoolVar(&all, "all", false, "those of everybody, however they signed in")
	c.AddCommand(end)
	return c
}
