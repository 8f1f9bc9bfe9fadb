package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

// Contexts is the file in which a user keeps the servers that they work with, so that none has to be named
// again and again. It names the files of management tokens and holds none.
type Contexts struct {
	// Current is the context in use where neither a flag nor the environment names one; "" for none.
	Current  string                   `yaml:"current,omitempty"`
	Contexts map[string]ServerContext `yaml:"contexts"`
}

// A ServerContext is one server and how to reach it.
type ServerContext struct {
	Server    string `yaml:"server" json:"server"`                           // URL of the Management API
	TokenFile string `yaml:"tokenFile,omitempty" json:"tokenFile,omitempty"` // full path
	Holders   string `yaml:"holders,omitempty" json:"holders,omitempty"`     // URL of the holders' listener
}

// contextsPath is where the file is: what KEYWARD_CONTEXTS says, else keyward/contexts.yaml in the user's
// folder for configuration; "" if there is no such folder.
func (a *app) contextsPath() string {
	if path := a.environment("KEYWARD_CONTEXTS"); path != "" {
		return path
	}
	if dir := a.environment("XDG_CONFIG_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "keyward", "contexts.yaml")
	}
	if home := a.environment("HOME"); home != "" {
		return filepath.Join(home, ".config", "keyward", "contexts.yaml")
	}
	return ""
}

// readContexts reads the file; one that is not there holds nothing.
func (a *app) readContexts() (all Contexts, err error) {
	path := a.contextsPath()
	if path == "" {
		return all, nil
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return all, nil
	}
	if err != nil {
		return all, usageError{fmt.Errorf("contexts: %w", err)}
	}
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	if err := d.Decode(&all); err != nil && !errors.Is(err, io.EOF) {
		return all, usageError{fmt.Errorf("contexts: %s: %w", path, err)}
	}
	return all, nil
}

func (a *app) writeContexts(all Contexts) error {
	path := a.contextsPath()
	if path == "" {
		return usageError{errors.New("no place for the contexts file: set HOME or KEYWARD_CONTEXTS")}
	}
	text, err := yaml.Marshal(all)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return replacePrivate(path, text)
}

// serverContext returns the context in force: of --context; where no server is named by server, a flag or the
// environment, that of KEYWARD_CONTEXT or the file's current one; otherwise the zero context. A server that
// is named by itself has no context: the token of another server must not be sent to it.
func (a *app) serverContext(server string) (ServerContext, error) {
	name := a.contextName
	if server != "" {
		return ServerContext{}, nil
	}
	if name == "" {
		name = a.environment("KEYWARD_CONTEXT")
	}
	all, err := a.readContexts()
	if err != nil {
		return ServerContext{}, err
	}
	if name == "" {
		name = all.Current
	}
	if name == "" {
		return ServerContext{}, nil
	}
	found, ok := all.Contexts[name]
	if !ok {
		return ServerContext{}, usageError{fmt.Errorf("there is no context %q in %s: keyward context list shows them, keyward context set makes one", name, a.contextsPath())}
	}
	return found, nil
}

// named returns the server that a flag or the environment names by itself; --context wins over the environment.
func (a *app) named(flag, value, variable string) (string, error) {
	switch {
	case value != "" && a.contextName != "":
		return "", usageError{fmt.Errorf("%s does not go with --context, which names a server itself", flag)}
	case value != "" || a.contextName != "":
		return value, nil
	}
	return a.environment(variable), nil
}

func (a *app) contextCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "context", Short: "Keep the servers that you work with, and choose one", Args: cobra.NoArgs,
		Long: "Keep the servers that you work with in a file, and choose one. It is ~/.config/keyward/contexts.yaml, or what\n" +
			"KEYWARD_CONTEXTS names; it holds the paths of token files, no token. What decides, first to last: --server, --context,\n" +
			"KEYWARD_SERVER, KEYWARD_CONTEXT, the context chosen by keyward context use. The token file of a context goes to its\n" +
			"own server only.",
	}
	c.PersistentFlags().StringVarP(&a.output, "output", "o", "table", "table, json, jsonl or yaml")
	c.PersistentFlags().BoolVarP(&a.quiet, "quiet", "q", false, "print names only")
	c.PersistentPreRunE = func(*cobra.Command, []string) error {
		return wrapUsage(oneOf("--output", a.output, "table", "json", "jsonl", "yaml"))
	}
	c.AddCommand(a.contextList(), a.contextSet(), a.contextUse(), a.contextRemove())
	return c
}

func (a *app) contextList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the contexts", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			all, err := a.readContexts()
			if err != nil {
				return err
			}
			type listed struct {
				Name    string `json:"name"`
				Current bool   `json:"current"`
				ServerContext
			}
			var list []listed
			for _, name := range slices.Sorted(maps.Keys(all.Contexts)) {
				list = append(list, listed{name, name == all.Current, all.Contexts[name]})
			}
			return printList(a, list, table[listed]{
				header: "NAME\tCURRENT\tSERVER\tTOKEN FILE\tHOLDERS",
				row: func(l listed) []string {
					return []string{l.Name, map[bool]string{true: "yes"}[l.Current], l.Server, l.TokenFile, l.Holders}
				},
				id: func(l listed) string { return l.Name },
			})
		},
	}
}

func (a *app) contextSet() *cobra.Command {
	var in ServerContext
	c := &cobra.Command{
		Use: "set CONTEXT --server URL", Short: "Make a context, or replace it; the first one is chosen at once", Args: cobra.ExactArgs(1),
		Example: "  keyward context set prod --server https://keys.example:9192 --token-file ~/.config/keyward/prod.token",
		RunE: func(_ *cobra.Command, args []string) error {
			if args[0] == "" {
				return usageError{errors.New("CONTEXT: must have a name")}
			}
			for flag, address := range map[string]string{"--server": in.Server, "--holders": in.Holders} {
				if u, err := url.Parse(address); address != "" && (err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
					return usageError{fmt.Errorf("%s: must be a URL such as %s", flag, defaultServer)}
				}
			}
			if in.TokenFile != "" {
				full, err := filepath.Abs(in.TokenFile) // the file is used from other folders too
				if err != nil {
					return err
				}
				in.TokenFile = full
			}
			all, err := a.readContexts()
			if err != nil {
				return err
			}
			if all.Contexts == nil {
				all.Contexts = map[string]ServerContext{}
			}
			if len(all.Contexts) == 0 {
				all.Current = args[0]
			}
			all.Contexts[args[0]] = in
			return a.writeContexts(all)
		},
	}
	c.Flags().StringVar(&in.Server, "server", "", "URL of its Management API (needed)")
	c.Flags().StringVar(&in.TokenFile, "token-file", "", "file with the management token for it")
	c.Flags().StringVar(&in.Holders, "holders", "", "URL of its holders' listener, for keyward self and revoke-leaked")
	_ = c.MarkFlagRequired("server")
	return c
}

func (a *app) contextUse() *cobra.Command {
	return &cobra.Command{
		Use: "use CONTEXT", Short: "Choose the context that is in use from now on", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.changeContext(args[0], func(all *Contexts) { all.Current = args[0] })
		},
	}
}

func (a *app) contextRemove() *cobra.Command {
	return &cobra.Command{
		Use: "remove CONTEXT", Short: "Forget a context; its token file stays", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.changeContext(args[0], func(all *Contexts) {
				delete(all.Contexts, args[0])
				if all.Current == args[0] {
					all.Current = ""
				}
			})
		},
	}
}

// changeContext changes what the file says of a context that is there.
func (a *app) changeContext(name string, change func(*Contexts)) error {
	all, err := a.readContexts()
	if err != nil {
		return err
	}
	if _, ok := all.Contexts[name]; !ok {
		return usageError{fmt.Errorf("there is no context %q in %s", name, a.contextsPath())}
	}
	change(&all)
	return a.writeContexts(all)
}
