package authz

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestBodyMember(t *testing.T) {
	for _, c := range []struct {
		body        string
		want        string
		present, ok bool
	}{
		{`{"agent_name":"sales"}`, "sales", true, true},
		{" \r\n\t{ \"a\" : [1,{\"agent_name\":\"x\"},\"]\"] , \"agent_name\" : \"sales\" , \"b\":{\"agent_name\":\"}\"} } \n", "sales", true, true},
		{`{"a\"b":"\\","n":-1.5e3,"t":true,"u":null,"agent_name":"s"}`, "s", true, true},
		{`{"agent\u005fname":"sa\u006ces"}`, "sales", true, true},
		{`{"agent_name":""}`, "", true, true},
		{`{"agent_name":"é\ud83d\ude00"}`, "é😀", true, true},
		{`{}`, "", false, true},
		{`{"other":"x"}`, "", false, true},
		{`{"x":{"agent_name":"sales"}}`, "", false, true},
		// What somebody behind us might read otherwise.
		{`{"agent_name":"a","agent_name":"a"}`, "", true, false},
		{`{"agent_name":"a","agent\u005fname":"b"}`, "", true, false},
		{`{"agent_name":"a","Agent_Name":"b"}`, "", true, false},
		{`{"AGENT_NAME":"a"}`, "", true, false},
		{`{"agent_name":null}`, "", true, false},
		{`{"agent_name":7}`, "", true, false},
		{`{"agent_name":["a"]}`, "", true, false},
		{`{"agent_name":{"a":1}}`, "", true, false},
		{`{"agent_name":"\ud800"}`, "", true, false},
		{`{"agent_name":"a\u0000"}`, "", true, false},
		{"{\"agent_name\":\"\xff\"}", "", false, false},
		{"\xef\xbb\xbf{\"agent_name\":\"a\"}", "", false, false},
		{`{"agent_name":"a"}{"agent_name":"b"}`, "", false, false},
		{`{"agent_name":"a"},`, "", false, false},
		{`{"agent_name":"a"`, "", false, false},
		{`{'agent_name':'a'}`, "", false, false},
		{`{"agent_name":"a",}`, "", false, false},
		{`[{"agent_name":"a"}]`, "", false, false},
		{`"agent_name"`, "", false, false},
		{`null`, "", false, false},
		{`agent_name=a`, "", false, false},
		{` `, "", false, false},
		{strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000), "", false, false},
		{`{"a":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + `,"agent_name":"a"}`, "a", true, true},
	} {
		got, present, ok := bodyMember([]byte(c.body), "agent_name")
		if got != c.want || present != c.present || ok != c.ok {
			t.Errorf("%.60s: got %q, %t, %t, want %q, %t, %t", c.body, got, present, ok, c.want, c.present, c.ok)
		}
	}
}

// FuzzBodyMember compares with the standard library, which takes a map's last.
func FuzzBodyMember(f *testing.F) {
	for _, body := range []string{`{"agent_name":"sales"}`, `{"a":[{}],"agent\u005fname":"x" }`, `{"agent_name":"\ud800"}`, "{\"\xff\":1}", `{"a":"\\\"","agent_name":7}`} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		before := bytes.Clone(body)
		got, present, ok := bodyMember(body, "agent_name")
		if !bytes.Equal(before, body) {
			t.Fatal("the body was changed")
		}
		var want map[string]any
		if err := json.Unmarshal(body, &want); err != nil || want == nil || !utf8.Valid(body) {
			if ok {
				t.Errorf("%q: read, although it is no object: %v", body, err)
			}
			return
		}
		value, there := want["agent_name"]
		switch {
		case !ok: // stricter: the library does not tell
		case present != there:
			t.Errorf("%q: present %t, want %t", body, present, there)
		case there && value != got:
			t.Errorf("%q: got %q, want %v", body, got, value)
		}
	})
}
