package apikey

import (
	"bytes"
	"reflect"
	"testing"
)

// The pool of keyed hashes lives as long as the server. What it keeps of a request is nothing, wherever
// the standard library has put it.
func TestPoolKeepsNoSecret(t *testing.T) {
	p := NewPepper(1, false)
	for range 3 {
		secret := Format{}.New(KindUser).Reveal()
		p.Digest(secret)
		m, _ := p.macs.Get().(*mac)
		if m == nil {
			t.Skip("the race detector has emptied the pool; run without -race")
		}
		m.in = m.in[:cap(m.in)]
		if found := find(reflect.ValueOf(m), []byte(secret[20:30]), 0); found != "" {
			t.Errorf("the secret is still in mac%s", found)
		}
		m.in = append(m.in[:0], secret...)
		if found := find(reflect.ValueOf(m), []byte(secret[20:30]), 0); found != ".in" {
			t.Fatalf("found in %q what was put in .in: this test finds nothing", found)
		}
		clear(m.in)
		p.macs.Put(m)
	}
}

// find says where in a value, or in what it points to, a sequence of bytes is; "": nowhere.
func find(v reflect.Value, want []byte, depth int) string {
	if depth > 20 {
		return ""
	}
	if k := v.Kind(); (k == reflect.Pointer || k == reflect.Interface) && !v.IsNil() {
		return find(v.Elem(), want, depth+1)
	}
	if v.Kind() == reflect.Struct {
		for i := range v.NumField() {
			if found := find(v.Field(i), want, depth+1); found != "" || holds(v.Field(i), want) {
				return "." + v.Type().Field(i).Name + found
			}
		}
	}
	return ""
}

func holds(v reflect.Value, want []byte) bool {
	if v.Kind() != reflect.Array && v.Kind() != reflect.Slice || v.Type().Elem().Kind() != reflect.Uint8 {
		return false
	}
	content := make([]byte, v.Len())
	for i := range content {
		content[i] = byte(v.Index(i).Uint())
	}
	return bytes.Contains(content, want)
}
