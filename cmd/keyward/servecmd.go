package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func (a *app) serveCommand() *cobra.Command {
	var allowDevPepper bool
	c := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Answer Envoy's questions, and serve the Management API",
		Long: "Answer Envoy's questions, and serve the Management API.\n\n" +
			"SIGTERM and SIGINT drain and end with exit code 0; a second one ends at once. SIGHUP reads the configuration\n" +
			"again; a faulty file changes nothing. What changes at once: " + reloaded + ".\n" +
			"Where header names or client.address change, Envoy needs a newly generated configuration too.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			// From the first moment to the last: a SIGHUP that nobody takes ends a process.
			hangup := make(chan os.Signal, 1)
			signal.Notify(hangup, syscall.SIGHUP)
			defer signal.Stop(hangup)

			cfg, err := a.config()
			if err != nil {
				return err
			}
			s, err := openService(cmd.Context(), cfg, serviceOptions{allowDevPepper: allowDevPepper, drainDelay: a.drainDelay, log: a.stderr})
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.close()) }()
			cfg.Runtime.apply(a.environ, s.log)
			if s.bootstrapMade {
				s.log.Warn("the first management token was made: use it to make your own, which ends it", "file", s.adminTokenPath())
			}
			ctx, stop := context.WithCancel(cmd.Context())
			defer stop()
			reloaded := make(chan struct{})
			go func() {
				defer close(reloaded)
				a.reloadOnHangup(ctx, hangup, s)
			}()
			err = s.run(ctx)
			stop()
			<-reloaded
			return err
		},
	}
	a.configFlags(c)
	c.Flags().BoolVar(&allowDevPepper, "allow-dev-pepper", false, "accept a pepper that keyward dev made")
	return c
}

// reloadOnHangup reads the configuration again at every hangup until ctx is done.
func (a *app) reloadOnHangup(ctx context.Context, hangup <-chan os.Signal, s *service) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
		}
		next, err := a.config()
		if err == nil {
			err = s.reload(next)
		}
		if err != nil {
			s.log.Error("the new configuration was not taken; the old one stays in force", "error", err)
		}
	}
}
