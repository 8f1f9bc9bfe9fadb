package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.yaml.in/yaml/v3"
)

// FuzzConfig: whatever stands in a configuration file, it is refused with an exit code and without
// showing a value, or config print writes it as a configuration that is read as the same.
func FuzzConfig(f *testing.F) {
	files, err := filepath.Glob("testdata/config/*.yaml")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		before, err := loadConfig("-", bytes.NewReader(text), nil, nil)
		if err != nil {
			if code := exitCode(err); code != exitUsage {
				t.Fatalf("exit code %d for %v", code, err)
			}
			if said := err.Error(); strings.Contains(said, canary) && !namesCanary(text) {
				t.Fatalf("the error shows a value:\n%s", said)
			}
			return
		}
		printed, err := yaml.Marshal(before)
		if err != nil {
			t.Fatal(err)
		}
		after, err := loadConfig("-", bytes.NewReader(printed), nil, nil)
		if err != nil {
			t.Fatalf("what is printed is refused: %v\n%s", err, printed)
		}
		if diff := cmp.Diff(before, after, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("what is printed is read as another configuration:\n%s\n%s", diff, printed)
		}
		again, err := yaml.Marshal(after)
		if err != nil || !bytes.Equal(again, printed) {
			t.Fatalf("printed again it differs: %v\n%s", err, cmp.Diff(string(printed), string(again)))
		}
	})
}

// namesCanary reports whether the canary stands where a name does, which errors may show: of a field, an
// alias, an anchor or a tag, or in a route, which is named by its pattern.
func namesCanary(text []byte) bool {
	for _, mark := range []string{"*", "&", "!", "%"} {
		if bytes.Contains(text, []byte(mark+canary)) {
			return true
		}
	}
	var root yaml.Node
	_ = yaml.Unmarshal(text, &root) // what cannot be read has no names
	var named func(n *yaml.Node) bool
	named = func(n *yaml.Node) bool {
		for i, child := range n.Content {
			isName := n.Kind == yaml.MappingNode && i%2 == 0
			if isName && (strings.Contains(child.Value, canary) || child.Value == "routes" && bytes.Contains(text, []byte(canary))) || named(child) {
				return true
			}
		}
		return false
	}
	return named(&root)
}
