package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"sigs.k8s.io/yaml"
)

// A table shows things to people: a header, and one row for each.
type table[T any] struct {
	header string // columns separated by tabs
	row    func(T) []string
	id     func(T) string
}

// printList writes things in the form that the user asked for.
func printList[T any](a *app, things []T, t table[T]) error {
	if a.quiet {
		for _, thing := range things {
			fmt.Fprintln(a.stdout, t.id(thing))
		}
		return nil
	}
	switch a.output {
	case "table":
		return writeTable(a.stdout, things, t)
	case "jsonl":
		for _, thing := range things {
			b, err := json.Marshal(thing)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.stdout, "%s\n", b)
		}
		return nil
	}
	if things == nil {
		things = []T{}
	}
	return a.printData(things)
}

// printOne writes one thing in the form that the user asked for; as a table, a line for each column.
func printOne[T any](a *app, thing T, fields [][2]string) error {
	if a.output != "table" {
		return a.printData(thing)
	}
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	for _, f := range fields {
		if f[1] != "" {
			fmt.Fprintf(w, "%s\t%s\n", f[0], f[1])
		}
	}
	return w.Flush()
}

func (a *app) printData(v any) error {
	if a.output == "yaml" {
		b, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = a.stdout.Write(b)
		return err
	}
	e := json.NewEncoder(a.stdout)
	e.SetEscapeHTML(false)
	if a.output == "json" {
		e.SetIndent("", "  ")
	}
	return e.Encode(v)
}

func writeTable[T any](out io.Writer, things []T, t table[T]) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, t.header)
	for _, thing := range things {
		for i, cell := range t.row(thing) {
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			if cell == "" {
				cell = "-"
			}
			fmt.Fprint(w, cell)
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

// when shows a time to people: how long ago or until, roughly.
func when(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	d := time.Until(t)
	if d > 0 {
		return "in " + rough(d)
	}
	return rough(-d) + " ago"
}

func rough(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// stamp shows a time exactly.
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
