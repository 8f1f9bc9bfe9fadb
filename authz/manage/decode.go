package manage

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

const (
	maxBody    = 1 << 20
	mergePatch = "application/merge-patch+json"
)

// readBody reads the JSON body of a request into a value. Errors: errMediaType, errTooLarge,
// *apikey.InvalidError.
func readBody(w http.ResponseWriter, r *http.Request, into any) error {
	data, err := readData(w, r)
	if err != nil {
		return err
	}
	return decode(data, into)
}

// readData reads the body of a request as it is.
//
// A merge patch may call itself one.
func readData(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	return readDataAs(w, r, "application/json")
}

// readDataAs is the same with other media types.
func readDataAs(w http.ResponseWriter, r *http.Request, types ...string) ([]byte, error) {
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	known := slices.Contains(types, kind) || r.Method == http.MethodPatch && kind == mergePatch
	if err != nil || !known || r.Header.Get("Content-Encoding") != "" {
		return nil, errMediaType
	}
	if charset, ok := params["charset"]; ok && !strings.EqualFold(charset, "utf-8") {
		return nil, errMediaType
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, errTooLarge
	}
	if err != nil {
		return nil, apikey.Invalid("", "the body did not arrive in full")
	}
	return data, nil
}

// decode reads one JSON document, strictly: UTF-8 without a byte order mark, nothing after it, every
// member known, in its own case and given once, every value of its own type, numbers whole. encoding/json
// accepts the opposite of most of these, and two readers that disagree about a document are a hole.
//
// null stands for an absent member, except where the field's tag says strict:"notnull" because absent
// and empty mean opposite things, and in a merge patch, whose admin.Member tells the two apart. So does an empty
// string, but where the tag says strict:"notempty": there it is somebody's mistake, and what it leaves out matters.
//
// Shape: into points to a struct of strings, ints, bools, structs, slices, maps of strings or structs, pointers
// to those, and members of merge patches of them. Depth is bounded by that type. Errors: *apikey.InvalidError, which never repeats a value.
func decode(data []byte, into any) error {
	switch {
	case len(bytes.TrimSpace(data)) == 0:
		return apikey.Invalid("", "the body is empty: it must be a JSON object")
	case bytes.HasPrefix(data, []byte("\xef\xbb\xbf")) || !utf8.Valid(data):
		return apikey.Invalid("", "the body must be UTF-8 without a byte order mark")
	case !json.Valid(data):
		return apikey.Invalid("", "the body is not one JSON document")
	}
	d := decoder{json.NewDecoder(bytes.NewReader(data))}
	d.UseNumber()
	token, err := d.Token()
	if err != nil {
		return err // cannot be: the document is valid
	}
	if token == nil { // absent is what its members may be, not the object
		return apikey.Invalid("", "the body must be a JSON object")
	}
	return d.from(token, "", reflect.ValueOf(into).Elem())
}

type decoder struct{ *json.Decoder }

// from reads the value that begins with token into v; path names it.
func (d decoder) from(token json.Token, path string, v reflect.Value) error {
	if isMember(v.Type()) {
		v.FieldByName("Present").SetBool(true)
		if token == nil {
			v.FieldByName("Null").SetBool(true)
			return nil
		}
		return d.from(token, path, v.FieldByName("Value"))
	}
	if token == nil {
		return nil
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		return d.from(token, path, v.Elem())
	case reflect.String:
		s, ok := token.(string)
		if !ok {
			return apikey.Invalid(path, "must be a string")
		}
		v.SetString(s)
	case reflect.Bool:
		b, ok := token.(bool)
		if !ok {
			return apikey.Invalid(path, "must be true or false")
		}
		v.SetBool(b)
	case reflect.Int:
		n, ok := token.(json.Number)
		i, err := strconv.Atoi(n.String()) // which takes neither 1.0 nor 1e1
		if !ok || err != nil {
			return apikey.Invalid(path, "must be a whole number of at most 64 bits")
		}
		v.SetInt(int64(i))
	case reflect.Slice:
		if token != json.Delim('[') {
			return apikey.Invalid(path, "must be an array")
		}
		return d.array(path, v)
	case reflect.Map:
		if token != json.Delim('{') {
			return apikey.Invalid(path, "must be an object")
		}
		return d.entries(path, v)
	case reflect.Struct:
		if token != json.Delim('{') {
			if path == "" {
				return apikey.Invalid("", "the body must be a JSON object")
			}
			return apikey.Invalid(path, "must be an object")
		}
		return d.members(path, v)
	default:
		panic("manage: decode into " + v.Type().String())
	}
	return nil
}

func (d decoder) array(path string, v reflect.Value) error {
	v.Set(reflect.MakeSlice(v.Type(), 0, 0))
	for i := 0; d.More(); i++ {
		one := reflect.New(v.Type().Elem()).Elem()
		token, err := d.Token()
		if err != nil {
			return err
		}
		at := path + "[" + strconv.Itoa(i) + "]"
		if token == nil {
			return apikey.Invalid(at, "must not be null")
		}
		if err := d.from(token, at, one); err != nil {
			return err
		}
		v.Set(reflect.Append(v, one))
	}
	_, err := d.Token()
	return err
}

// isMember reports whether t is an admin.Member of something.
func isMember(t reflect.Type) bool {
	return t.PkgPath() == reflect.TypeFor[admin.KeyPatch]().PkgPath() && strings.HasPrefix(t.Name(), "Member[")
}

// entries reads a map of strings or structs, or of pointers to those where null is a value too. Its names are
// the caller's own, so errors do not repeat them.
func (d decoder) entries(path string, v reflect.Value) error {
	v.Set(reflect.MakeMap(v.Type()))
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return err
		}
		value, err := d.Token()
		if err != nil {
			return err
		}
		one := reflect.New(v.Type().Elem()).Elem()
		nullable := one.Kind() == reflect.Pointer
		of := one.Type()
		if nullable {
			of = of.Elem()
		}
		s, isString := value.(string)
		switch {
		case value == nil && nullable:
		case of.Kind() == reflect.Struct:
			if value == nil {
				return apikey.Invalid(path, "must have objects as values")
			}
			if err := d.from(value, path, one); err != nil {
				return err
			}
		case !isString:
			return apikey.Invalid(path, "must have strings as values")
		case nullable:
			one.Set(reflect.ValueOf(&s))
		default:
			one.SetString(s)
		}
		key := reflect.ValueOf(name)
		if v.MapIndex(key).IsValid() {
			return apikey.Invalid(path, "has a name twice")
		}
		v.SetMapIndex(key, one)
	}
	_, err := d.Token()
	return err
}

func (d decoder) members(path string, v reflect.Value) error {
	seen := map[string]bool{}
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return err
		}
		name := token.(string) // of a member: always
		field, err := member(v.Type(), path, name)
		if err != nil {
			return err
		}
		at := join(path, name)
		if seen[name] {
			return apikey.Invalid(at, "is given twice")
		}
		seen[name] = true
		value, err := d.Token()
		if err != nil {
			return err
		}
		switch strict := field.Tag.Get("strict"); {
		case strict == "notnull" && value == nil:
			return apikey.Invalid(at, "must not be null: leave it out, or give []")
		case strict == "notempty" && value == "":
			return apikey.Invalid(at, "must not be empty: leave it out")
		}
		if err := d.from(value, at, v.FieldByIndex(field.Index)); err != nil {
			return err
		}
	}
	_, err := d.Token()
	return err
}

// member finds the field that a member is for.
func member(t reflect.Type, path, name string) (reflect.StructField, error) {
	for _, field := range reflect.VisibleFields(t) {
		if field.Anonymous {
			continue // its fields come by themselves
		}
		known, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if known == name {
			return field, nil
		}
		if strings.EqualFold(known, name) {
			return field, apikey.Invalid(join(path, known), "is written in another case: names are case-sensitive")
		}
	}
	// A name is repeated only if it looks like one: someone may have put a secret there.
	if !fieldName.MatchString(name) {
		return reflect.StructField{}, apikey.Invalid(path, "has an unknown member")
	}
	return reflect.StructField{}, apikey.Invalid(join(path, name), "is not known")
}

var fieldName = regexp.MustCompile(`^[A-Za-z]{1,32}$`)

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}
