package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

func (a *app) configCommand() *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Check and show the configuration of serve", Args: cobra.NoArgs}
	validate := &cobra.Command{
		Use: "validate --config FILE", Short: "Check the configuration; every fault at once, exit code 2", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if _, err := a.config(); err != nil {
				return err
			}
			fmt.Fprintln(a.stderr, "The configuration is good.")
			return nil
		},
	}
	a.configFlags(validate)
	show := &cobra.Command{
		Use: "print --config FILE", Short: "Show the configuration in force: defaults, file, environment and flags", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			e := yaml.NewEncoder(a.stdout)
			e.SetIndent(2)
			return errors.Join(e.Encode(cfg), e.Close())
		},
	}
	a.configFlags(show)
	schema := &cobra.Command{
		Use: "schema", Short: "Write a JSON Schema of the configuration, for editors", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			s := schemaOf(reflect.TypeFor[Config]())
			s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
			s["title"] = "keyward"
			e := json.NewEncoder(a.stdout)
			e.SetIndent("", "  ")
			return e.Encode(s)
		},
	}
	c.AddCommand(validate, show, schema)
	return c
}

// schemaOf describes a type of the configuration.
func schemaOf(t reflect.Type) map[string]any {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t == reflect.TypeFor[strList]():
		return map[string]any{"anyOf": []any{
			map[string]any{"type": "string"},
			map[string]any{"type": "array", "items": map[string]any{"type": "string"}},
		}}
	case t.Kind() == reflect.Struct:
		properties := map[string]any{}
		for field := range t.Fields() {
			properties[field.Tag.Get("yaml")] = schemaOf(field.Type)
		}
		return map[string]any{"type": "object", "additionalProperties": false, "properties": properties}
	case t.Kind() == reflect.Slice:
		return map[string]any{"type": "array", "items": schemaOf(t.Elem())}
	case t.Kind() == reflect.Bool:
		return map[string]any{"type": "boolean"}
	case t.Kind() == reflect.Int:
		return map[string]any{"type": "integer"}
	case t.Kind() == reflect.Float64:
		return map[string]any{"type": "number"}
	}
	return map[string]any{"type": "string"} // durations are written as text
}

// cleanYAMLError takes the parts of a YAML error that say something to a person.
func cleanYAMLError(err error) string {
	return strings.TrimPrefix(strings.TrimPrefix(err.Error(), "error unmarshaling JSON: while decoding JSON: "), "json: ")
}

// A buildVersion says what this program was built from.
type buildVersion struct {
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	Date    string `json:"date,omitempty"` // of the commit
	Dirty   bool   `json:"dirty,omitempty"`
	Go      string `json:"go"`
	Envoy   string `json:"envoyApi"` // version of go-control-plane/envoy
}

func readVersion() buildVersion {
	v := buildVersion{Version: "devel"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	v.Go = info.GoVersion
	if main := info.Main.Version; main != "" && main != "(devel)" {
		v.Version = main
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Commit = s.Value
		case "vcs.time":
			v.Date = s.Value
		case "vcs.modified":
			v.Dirty = s.Value == "true"
		}
	}
	for _, m := range info.Deps {
		if m.Path == "github.com/envoyproxy/go-control-plane/envoy" {
			v.Envoy = m.Version
		}
	}
	return v
}

func (a *app) versionCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "version", Short: "Show what this program was built from", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := oneOf("--output", a.output, "table", "json", "yaml"); err != nil {
				return usageError{err}
			}
			v := readVersion()
			return printOne(a, v, [][2]string{
				{"VERSION", v.Version}, {"COMMIT", v.Commit}, {"DATE", v.Date}, {"GO", v.Go}, {"ENVOY API", v.Envoy},
			})
		},
	}
	c.Flags().StringVarP(&a.output, "output", "o", "table", "table, json or yaml")
	return c
}
