package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"keyward/authz/manage"
)

func (a *app) inFlightCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "inflight", Short: "List the requests that run now, and end a lease by force", Args: cobra.NoArgs,
		Long: "List the requests that run now and count against their keys' max-concurrent, and end a lease by force.\n" +
			"That frees its place; the request itself goes on.",
	}
	a.clientFlags(c)
	c.AddCommand(&cobra.Command{
		Use: "list INSTANCE", Short: "List the requests of an instance that run now, the oldest first", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				all, err := client.InFlight(ctx, args[0])
				if err != nil {
					return err
				}
				return printList(a, all, table[manage.InFlight]{
					header: "LEASE\tKEY\tAGE\tMETHOD\tPATH\tNODE\tREPLICA\tUNTIL",
					row: func(r manage.InFlight) []string {
						node := r.Node
						if node == "" && r.Connection != 0 {
							node = fmt.Sprintf("connection %d", r.Connection)
						}
						return []string{r.LeaseID, r.KeyID.String(), fmt.Sprintf("%.1fs", r.AgeSeconds), r.Method, r.Path, node, r.Replica, when(r.CountsUntil)}
					},
					id: func(r manage.InFlight) string { return r.LeaseID },
				})
			})
		},
	}, &cobra.Command{
		Use: "end INSTANCE LEASE", Short: "End a lease by force; the request itself goes on", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.confirm("End the lease of a request that may still run?"); err != nil {
				return err
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				if err := client.EndInFlight(ctx, args[0], args[1]); err != nil {
					return err
				}
				return printOne(a, manage.EndedInFlight{LeaseID: args[1]}, [][2]string{{"ENDED", args[1]}})
			})
		},
	})
	return c
}
