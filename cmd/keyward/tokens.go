package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"keyward/authz/admin"
	"keyward/authz/manage"
)

func (a *app) tokensCommand() *cobra.Command {
	c := &cobra.Command{Use: "tokens", Short: "Make, list and revoke tokens of the Management API", Args: cobra.NoArgs}
	a.clientFlags(c)
	c.AddCommand(a.tokensCreate(), a.tokensList(), a.tokensRevoke())
	return c
}

func (a *app) tokensCreate() *cobra.Command {
	var in admin.TokenInput
	var role, out string
	c := &cobra.Command{
		Use:   "create --role ROLE --name NAME",
		Short: "Make a management token; it is shown once",
		Long: "Make a management token; it is shown once. An owner's token ends the one that the server made for itself.\n" +
			"With --offline it works without any token, while no server has the store open: the way back in.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			in.Role = admin.Role(role)
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) (err error) {
				var file *os.File
				if out != "" {
					// Opened first: a token that cannot be kept should not be made.
					if file, err = os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
						return err
					}
					defer func() { err = errors.Join(err, file.Close()) }()
				}
				created, err := client.CreateToken(ctx, in)
				if err != nil {
					if out != "" {
						_ = os.Remove(out)
					}
					return err
				}
				shown, kept := created.Secret.Reveal(), false
				defer func() {
					if err != nil && !kept {
						err = fmt.Errorf("%w; the token was made: revoke it with keyward tokens revoke %s", err, created.Token.ID)
					}
				}()
				if file != nil {
					if _, err := fmt.Fprintln(file, shown); err != nil {
						return err
					}
					shown, kept = "in "+out, true
				}
				if a.quiet {
					_, err := fmt.Fprintln(a.stdout, shown)
					return err
				}
				if file == nil {
					fmt.Fprintln(a.stderr, "Keep the token now: it is not shown again.")
				}
				answer := struct {
					Token  admin.TokenRecord `json:"token"`
					Secret string            `json:"secret"`
				}{created.Token, shown}
				t := created.Token
				return printOne(a, answer, [][2]string{
					{"ID", t.ID.String()}, {"NAME", t.Name}, {"ROLE", string(t.Role)}, {"INSTANCE", t.InstanceID},
					{"USER", t.UserPrincipalName}, {"EXPIRES", stamp(t.ExpiresAt)}, {"TOKEN", shown},
				})
			})
		},
	}
	f := c.Flags()
	f.StringVar(&role, "role", "", "owner, operator, auditor or user (needed)")
	f.StringVar(&in.UserPrincipalName, "user", "", "with --role user: the user principal name whose keys its holder sees and makes")
	f.StringVar(&in.Name, "name", "", "who or what it is for (needed)")
	f.StringVar(&in.InstanceID, "instance", "", "the one instance that it is for; all if empty")
	f.StringVar(&in.ExpiresIn, "expires-in", "", "its life, such as 90d; without end if empty")
	f.StringVar(&out, "out", "", "write it to this new file of mode 0600 instead of showing it")
	_ = c.MarkFlagRequired("role")
	_ = c.MarkFlagRequired("name")
	return c
}

func (a *app) tokensList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List management tokens, newest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				all, err := client.Tokens(ctx)
				if err != nil {
					return err
				}
				return printList(a, all, table[admin.TokenRecord]{
					header: "ID\tNAME\tROLE\tINSTANCE\tUSER\tSTATUS\tHINT\tCREATED\tEXPIRES\tLAST USED",
					row: func(t admin.TokenRecord) []string {
						return []string{t.ID.String(), t.Name, string(t.Role), t.InstanceID, t.UserPrincipalName, t.Status, t.Hint, when(t.CreatedAt), when(t.ExpiresAt), when(t.LastUsedAt)}
					},
					id: func(t admin.TokenRecord) string { return t.ID.String() },
				})
			})
		},
	}
}

func (a *app) tokensRevoke() *cobra.Command {
	return &cobra.Command{
		Use: "revoke TOKEN-ID", Short: "End a management token", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := parseID("TOKEN-ID", args[0])
			if err != nil {
				return err
			}
			if err := a.confirm("Revoke the management token " + args[0] + "?"); err != nil {
				return err
			}
			return a.withClient(cmd.Context(), func(ctx context.Context, client *manage.Client) error {
				revoked, err := client.RevokeToken(ctx, id)
				if err != nil {
					return err
				}
				return printOne(a, revoked, [][2]string{{"ID", revoked.TokenID.String()}, {"REVOKED", stamp(revoked.RevokedAt)}})
			})
		},
	}
}
