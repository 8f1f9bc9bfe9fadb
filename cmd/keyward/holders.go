package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"keyward/authz/apikey"
	"keyward/authz/holders"
	"keyward/authz/manage"
)

// A holdersClient asks a holders' listener, where a secret is all that is needed.
type holdersClient struct {
	*app

	address string
}

// A holdersError is an error that the holders' listener answered, where no management token is the cure.
type holdersError struct{ answer *manage.Error }

func (e holdersError) Error() string { return e.answer.Error() }
func (e holdersError) Unwrap() error { return e.answer }

func (h *holdersClient) flags(c *cobra.Command) {
	c.Flags().StringVar(&h.address, "holders", "", "holders' listener to call (KEYWARD_HOLDERS; default http://"+usualHolders+")")
	c.Flags().StringVar(&h.contextName, "context", "", "context to work in, see keyward context (KEYWARD_CONTEXT)")
	c.Flags().StringVarP(&h.output, "output", "o", "table", "table, json, jsonl or yaml")
	check := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if err := wrapUsage(oneOf("--output", h.output, "table", "json", "jsonl", "yaml")); err != nil {
			return err
		}
		return check(cmd, args)
	}
}

func (a *app) selfCommand() *cobra.Command {
	h := &holdersClient{app: a}
	c := &cobra.Command{
		Use:   "self < SECRET-FILE",
		Short: "Show what a key may, to who holds it; its secret comes by standard input",
		Long: "Show what a key may, to who holds it: its scopes and limits in force, what is left of them, and when it ends.\n" +
			"The secret comes by standard input, and goes to a server whose listen.holders is on. Asking is no use of the key.",
		Example: "  keyward self --holders https://keys.example:9194 < key.secret",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			secret, err := a.readSecret()
			if err != nil {
				return err
			}
			var self holders.Answer
			if err := h.call(cmd.Context(), http.MethodGet, "/self", secret, nil, &self); err != nil {
				return err
			}
			return printOne(a, self, selfFields(self))
		},
	}
	h.flags(c)
	return c
}

func selfFields(s holders.Answer) [][2]string {
	fields := [][2]string{
		{"ID", s.KeyID.String()}, {"INSTANCE", s.InstanceID}, {"TYPE", string(s.Type)}, {"AGENT", s.AgentName}, {"USER", s.UserPrincipalName},
		{"ENVIRONMENT", s.Environment}, {"SCOPES", strings.Join(s.Scopes, " ")}, {"LIMITS", limitsText(s.Limits)},
	}
	if r := s.Remaining; r != nil {
		fields = append(fields, [2]string{"LEFT", fmt.Sprintf("burst %s, concurrent %s", leftText(r.Burst), leftText(r.MaxConcurrent))})
	}
	for _, l := range s.Standings {
		if l.Quota == "" {
			continue
		}
		text := leftText(l.Remaining) + " left of " + leftText(l.Most) + " per " + l.Window
		switch {
		case l.Most == apikey.Unlimited:
			text = "unlimited"
		case !l.LockedUntil.IsZero():
			text += ", locked until " + stamp(l.LockedUntil)
		case !l.ResetsAt.IsZero():
			text += ", all of it " + when(l.ResetsAt)
		}
		fields = append(fields, [2]string{"QUOTA " + l.Quota, text})
	}
	fields = append(fields, [][2]string{
		{"EXPIRES", stamp(s.ExpirationDate)}, {"ENDS UNUSED", stamp(s.IdleAfter)}, {"GENERATION", strconv.Itoa(s.Generation.Number)},
		{"SECRET ENDS", stamp(s.Generation.ValidUntil)},
	}...)
	if since := s.Generation.DeprecatedSince; !since.IsZero() {
		fields = append(fields, [2]string{"DEPRECATED", "a newer secret is there since " + stamp(since)})
	}
	return fields
}

func leftText(n int64) string {
	if n == apikey.Unlimited {
		return "unlimited"
	}
	return strconv.FormatInt(n, 10)
}

func (a *app) revokeLeakedCommand() *cobra.Command {
	h := &holdersClient{app: a}
	c := &cobra.Command{
		Use:   "revoke-leaked < SECRET-FILE",
		Short: "Report a leaked key; its secret comes by standard input",
		Long: "Report a leaked key to a server whose listen.holders is on. Its secret comes by standard input and is its own proof:\n" +
			"whoever has found it may end it. The answer is the same whether it is a key's or not. What becomes of the key the\n" +
			"instance's policy says: by default instance and user keys lose the secret at once, agent keys are flagged.",
		Example: "  keyward revoke-leaked --holders https://keys.example:9194 < found.txt",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			secret, err := a.readSecret()
			if err != nil {
				return err
			}
			var accepted holders.Accepted
			if err := h.call(cmd.Context(), http.MethodPost, "/revoke", apikey.Secret{}, holders.Report{Secret: secret.Reveal()}, &accepted); err != nil {
				return err
			}
			return printOne(a, accepted, [][2]string{{"ACCEPTED", accepted.Message}, {"REQUEST", accepted.RequestID}})
		},
	}
	h.flags(c)
	return c
}

// readSecret reads one secret from standard input; a terminal does not show it.
func (a *app) readSecret() (apikey.Secret, error) {
	var text []byte
	var err error
	if in, ok := a.stdin.(*os.File); ok && term.IsTerminal(int(in.Fd())) {
		fmt.Fprint(a.stderr, "Secret: ")
		fd := int(in.Fd())
		shows, _ := term.GetState(fd)
		text, err = await(a, func() ([]byte, error) { return term.ReadPassword(fd) })
		if errors.Is(err, errInterrupted) && shows != nil {
			err = errors.Join(err, term.Restore(fd, shows)) // it is still being read, unseen
		}
		fmt.Fprintln(a.stderr)
	} else {
		text, err = io.ReadAll(io.LimitReader(input{a}, 4<<10))
	}
	if err != nil {
		return apikey.Secret{}, err
	}
	secret := strings.TrimSpace(string(text))
	if secret == "" || strings.ContainsAny(secret, " \t\r\n") {
		return apikey.Secret{}, usageError{errors.New("one secret has to come by standard input, and nothing else")}
	}
	return apikey.NewSecret(secret), nil
}

// call asks the listener. Errors: *manage.Error where it answered; its errors have the same form.
func (h *holdersClient) call(ctx context.Context, method, path string, secret apikey.Secret, body, into any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	base, err := h.named("--holders", h.address, "KEYWARD_HOLDERS")
	if err != nil {
		return err
	}
	in, err := h.serverContext(base)
	if err != nil {
		return err
	}
	if base == "" && in.Server != "" && in.Holders == "" {
		return usageError{errors.New("the context does not say where holders are listened to: name it by --holders, or by keyward context set --holders")}
	}
	base = cmp.Or(base, in.Holders, "http://"+usualHolders)
	if u, err := url.Parse(base); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return usageError{fmt.Errorf("--holders: must be a URL such as http://%s", usualHolders)}
	}
	var content io.Reader = http.NoBody
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(text)
	}
	r, err := http.NewRequestWithContext(ctx, method, strings.TrimRight(base, "/")+path, content)
	if err != nil {
		return err
	}
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	if sent := secret.Reveal(); sent != "" {
		r.Header.Set("X-Api-Key", sent) // in both, because either may be switched off
		r.Header.Set("Authorization", "Bearer "+sent)
	}
	// Not followed: a secret should not travel further than it was sent.
	client := http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(r)
	if unreachable, ok := errors.AsType[*url.Error](err); ok {
		if errors.Is(ctx.Err(), context.Canceled) {
			return errInterrupted
		}
		return fmt.Errorf("%w at %s: %w; its listen.holders has to be on", errUnreachable, base, unreachable.Err)
	}
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	if resp.StatusCode/100 != 2 {
		failed := &manage.Error{Status: resp.StatusCode}
		var said manage.ErrorBody
		if json.Unmarshal(answer, &said) == nil { // what stands between may answer in its own way
			failed.Code, failed.Message = said.Error.Code, said.Error.Message
		}
		if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
			failed.RetryAfter = time.Duration(seconds) * time.Second
		}
		if failed.Code == "" {
			failed.Message = fmt.Sprintf("%s answers with HTTP status %d, and not as keyward does to holders: is there something else?", base, failed.Status)
		}
		return holdersError{failed}
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return fmt.Errorf("the answer is not what keyward sends to holders: is there something else at %s?", base)
	}
	return nil
}
