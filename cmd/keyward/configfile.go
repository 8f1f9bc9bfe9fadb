package main

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"

	"keyward/authz/apikey"
)

// envPrefix begins the name of every environment variable that sets a field.
const envPrefix = "KEYWARD_"

// clientEnv are the variables of the commands that call a server; they are no configuration of one.
var clientEnv = []string{"KEYWARD_SERVER", "KEYWARD_TOKEN_FILE", "KEYWARD_HOLDERS", "KEYWARD_CONTEXT", "KEYWARD_CONTEXTS"}

// serviceLink are the variables that Kubernetes sets for services whose names begin with keyward.
var serviceLink = regexp.MustCompile(`^KEYWARD(_[A-Z0-9_]+)?_(SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$`)

// loadConfig reads defaults, then the file ("" for none, "-" for stdin), then the environment, then
// settings of the form path=value, and reports every fault at once.
func loadConfig(file string, stdin io.Reader, environ, settings []string) (*Config, error) {
	var text []byte
	if file != "" {
		var err error
		if text, err = readConfigFile(file, stdin); err != nil {
			return nil, err
		}
	}
	cfg := defaultConfig()
	faults := fillConfig(&cfg, file, text, environ, settings)
	if len(faults) == 0 && cfg.Preset.Name != "" {
		cfg = defaultConfig()
		cfg.presetDefaults()
		faults = append(fillConfig(&cfg, file, text, environ, settings), cfg.expandPreset())
		faults = slices.DeleteFunc(faults, func(err error) bool { return err == nil })
	}
	if len(faults) == 0 {
		// Only a configuration that could be read is worth judging.
		if err := cfg.validate(); err != nil {
			faults = append(faults, err)
		}
	}
	if err := errors.Join(faults...); err != nil {
		return nil, usageError{fmt.Errorf("configuration:\n%w", err)}
	}
	wait := apikey.Duration(cfg.Concurrency.wait()) // the default, which goes with the feedback
	cfg.Concurrency.Wait = &wait
	return &cfg, nil
}

// fillConfig puts what the file says over what is in cfg, over that the environment and then the settings.
func fillConfig(cfg *Config, file string, text []byte, environ, settings []string) (faults []error) {
	if file != "" {
		if err := decodeYAML(text, cfg); err != nil {
			faults = append(faults, fmt.Errorf("%s:\n%w", file, err))
		}
	}
	fields := map[string]reflect.Value{}
	collectFields(reflect.ValueOf(cfg).Elem(), "", fields)
	for _, entry := range environ {
		name, value, _ := strings.Cut(entry, "=")
		if !strings.HasPrefix(name, envPrefix) || slices.Contains(clientEnv, name) || serviceLink.MatchString(name) {
			continue
		}
		path, ok := pathOfEnv(name, fields)
		if !ok {
			faults = append(faults, fmt.Errorf("environment: %s sets nothing%s", name, didYouMean(name, append(envNames(fields), clientEnv...))))
			continue
		}
		if value == "" && fields[path].Kind() == reflect.String && fields[path].String() != "" {
			faults = append(faults, fmt.Errorf("environment: %s is empty and would switch off what is set: unset it, or use --set %s=", name, path))
			continue
		}
		if err := setField(fields[path], value); err != nil {
			faults = append(faults, fmt.Errorf("environment: %s: %w", name, err))
		}
	}
	for _, entry := range environ { // after ours, over which they win
		name, value, _ := strings.Cut(entry, "=")
		if path, ok := runtimeEnv[name]; ok && value != "" {
			if err := setField(fields[path], runtimeValue(name, value)); err != nil {
				faults = append(faults, fmt.Errorf("environment: %s: %w", name, err))
			}
		}
	}
	for _, setting := range settings {
		path, value, ok := strings.Cut(setting, "=")
		if !ok {
			faults = append(faults, errors.New("--set: must be path=value, such as log.level=debug"))
			continue
		}
		field, known := fields[path]
		if !known {
			faults = append(faults, fmt.Errorf("--set: there is no field %q%s", path, didYouMean(path, keys(fields))))
			continue
		}
		if err := setField(field, value); err != nil {
			faults = append(faults, fmt.Errorf("--set: %s: %w", path, err))
		}
	}
	return faults
}

const maxConfigFile = 4 << 20 // bytes

func readConfigFile(file string, stdin io.Reader) ([]byte, error) {
	in := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, usageError{fmt.Errorf("configuration: %w", err)}
		}
		defer f.Close()
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, maxConfigFile+1))
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if len(text) > maxConfigFile {
		return nil, usageError{fmt.Errorf("configuration: %s is larger than 4 MiB", file)}
	}
	return text, nil
}

// decodeYAML decodes one document into a struct, or reports all that is wrong with it.
func decodeYAML(text []byte, into any) error {
	var root yaml.Node
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	if err := decoder.Decode(&root); err != nil {
		if errors.Is(err, io.EOF) {
			// Most likely it is being written just now; as a configuration it would open every route.
			return errors.New("is empty: write {} for a configuration of defaults only")
		}
		return err
	}
	if err := decoder.Decode(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return errors.New("holds more than one YAML document")
	}
	var faults []error
	judge(root.Content[0], reflect.TypeOf(into).Elem(), "", &faults)
	if len(faults) > 0 {
		return errors.Join(faults...)
	}
	return root.Decode(into)
}

// judge walks a document beside the type it is for and reports all that does not fit, by line and field
// and never with the value: yaml's own errors repeat it, and cut 5.5 down to 5 without one.
func judge(n *yaml.Node, t reflect.Type, path string, faults *[]error) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	fault := func(n *yaml.Node, format string, args ...any) {
		*faults = append(*faults, fmt.Errorf("line %d: %w", n.Line, apikey.Invalid(path, fmt.Sprintf(format, args...))))
	}
	switch {
	case n.Kind == yaml.AliasNode:
		fault(n, "aliases are not used here: write the value again")
	case n.Style&yaml.TaggedStyle != 0:
		fault(n, "tags such as !!str are not used here")
	case isNull(n):
		// "scopes:" with nothing after it, or a file that is being written just now, would open a door.
		fault(n, "has no value: give it one ([] for an empty list, {} for defaults only), or leave it out")
	case t.Kind() == reflect.Struct:
		if n.Kind != yaml.MappingNode {
			fault(n, "must hold fields, each with its value: name: value")
			return
		}
		fields := map[string]reflect.Type{}
		for field := range t.Fields() {
			fields[field.Tag.Get("yaml")] = field.Type
		}
		seen := map[string]bool{}
		for i := 0; i < len(n.Content); i += 2 {
			key, value := n.Content[i], n.Content[i+1]
			name := key.Value
			fieldType, known := fields[name]
			switch {
			case key.Kind != yaml.ScalarNode:
				fault(key, "a field's name must be a word")
			case !known:
				fault(key, "there is no field %q here%s", name, didYouMean(name, keys(fields)))
			case seen[name]:
				fault(key, "%s is set twice", name)
			default:
				judge(value, fieldType, strings.TrimPrefix(path+"."+name, "."), faults)
			}
			seen[name] = true
		}
	case t.Kind() == reflect.Slice && n.Kind == yaml.SequenceNode:
		for i, item := range n.Content {
			judge(item, t.Elem(), fmt.Sprintf("%s[%d]", path, i), faults)
		}
	case t == reflect.TypeFor[strList]() && n.Kind == yaml.ScalarNode:
	case t.Kind() == reflect.Slice:
		fault(n, "must be a list")
	case n.Kind != yaml.ScalarNode:
		fault(n, "must be one value")
	default:
		if err := setScalar(reflect.New(t).Elem(), n); err != nil {
			fault(n, "%v", err)
		}
	}
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// setScalar sets a field that holds one value. Its error says what is wanted, not what was written.
func setScalar(field reflect.Value, n *yaml.Node) error {
	if text, ok := field.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return text.UnmarshalText([]byte(n.Value))
	}
	switch tag := n.ShortTag(); {
	case field.Kind() == reflect.Bool && tag != "!!bool":
		return errors.New("must be true or false")
	case field.Kind() == reflect.Int && (tag != "!!int" || n.Decode(field.Addr().Interface()) != nil):
		return errors.New("must be a whole number")
	case field.Kind() == reflect.Float64 && (tag != "!!int" && tag != "!!float" || n.Decode(field.Addr().Interface()) != nil):
		return errors.New("must be a number")
	case field.Kind() == reflect.String:
		field.SetString(n.Value)
		return nil
	}
	return n.Decode(field.Addr().Interface())
}

// collectFields lists the fields of a struct that hold values, by their path, such as
// listen.check.address.
func collectFields(v reflect.Value, path string, into map[string]reflect.Value) {
	for field, value := range v.Fields() {
		name := strings.TrimPrefix(path+"."+field.Tag.Get("yaml"), ".")
		if value.Kind() == reflect.Struct {
			collectFields(value, name, into)
		} else {
			into[name] = value
		}
	}
}

func setField(field reflect.Value, value string) error {
	if field.Kind() == reflect.Slice {
		return errors.New("is a list: lists are set in the file only")
	}
	if field.Kind() == reflect.Pointer {
		field.Set(reflect.New(field.Type().Elem()))
		field = field.Elem()
	}
	return setScalar(field, &yaml.Node{Kind: yaml.ScalarNode, Value: value})
}

// envName is the environment variable of a path: KEYWARD_LISTEN_CHECK_TLS_CERT_FILE for
// listen.check.tls.certFile.
func envName(path string) string {
	var b strings.Builder
	b.WriteString(envPrefix)
	wasLower := false
	for _, c := range path {
		if c == '.' {
			b.WriteByte('_')
			wasLower = false
			continue
		}
		// CA in clientCAFile is one word of its own and File the next.
		if unicode.IsUpper(c) && wasLower {
			b.WriteByte('_')
		}
		wasLower = unicode.IsLower(c)
		b.WriteRune(unicode.ToUpper(c))
	}
	return strings.Replace(b.String(), "CAFILE", "CA_FILE", 1)
}

func envNames(fields map[string]reflect.Value) []string {
	var names []string
	for path := range fields {
		names = append(names, envName(path))
	}
	return names
}

func pathOfEnv(name string, fields map[string]reflect.Value) (string, bool) {
	for path := range fields {
		if envName(path) == name {
			return path, true
		}
	}
	return "", false
}

func keys[V any](m map[string]V) []string {
	var names []string
	for name := range m {
		names = append(names, name)
	}
	return names
}

// didYouMean names the candidate nearest to what was written, if one is near enough to be meant.
func didYouMean(written string, candidates []string) string {
	slices.Sort(candidates)
	best, bestDistance := "", 1+len(written)/3
	for _, c := range candidates {
		if d := editDistance(strings.ToLower(written), strings.ToLower(c)); d <= bestDistance && (best == "" || d < bestDistance) {
			best, bestDistance = c, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// editDistance counts the insertions, deletions and substitutions between two words.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			substitute := diagonal
			if a[i] != b[j] {
				substitute++
			}
			diagonal = row[j+1]
			row[j+1] = min(substitute, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}

// A strList is a list of strings that may be written as one string where it has one element.
type strList []string

// UnmarshalYAML reads a string or a list of strings.
func (l *strList) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode {
		*l = strList{n.Value}
		return nil
	}
	return n.Decode((*[]string)(l))
}
