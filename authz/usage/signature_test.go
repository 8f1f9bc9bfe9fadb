package usage_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"keyward/authz/usage"
)

// TestExampleVerifiesSignatures runs what docs/alerts.md tells receivers to do.
func TestExampleVerifiesSignatures(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "alerts.md"))
	if err != nil {
		t.Fatal(err)
	}
	example := regexp.MustCompile("(?s)```python\n(.*?)```").FindSubmatch(page)
	if example == nil {
		t.Fatal("docs/alerts.md has no example")
	}
	python, err := exec.LookPath("python3")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("no python3 here: the example is not run")
	}
	secret, body, at := []byte("0123456789abcdef"), []byte(`{"id":"…"}`), time.Unix(1_795_467_851, 0)
	good := usage.Sign(secret, body, at)
	var asked strings.Builder
	asked.Write(example[1])
	cases := []struct {
		header, body string
		seconds      int64 // after it was sent
		want         string
	}{
		{good, string(body), 0, "True"},
		{good, string(body), 299, "True"},
		{good, string(body), 301, "False"},
		{good, string(body) + " ", 0, "False"},
		{strings.Replace(good, "t=1795467851", "t=1795467852", 1), string(body), 0, "False"},
		{"t=1795467851,v1=", string(body), 0, "False"},
		{"t=1795467851", string(body), 0, "False"},
		{"v1=00", string(body), 0, "False"},
		{"t=x,v1=é", string(body), 0, "False"},
		{"", string(body), 0, "False"},
		{usage.Sign([]byte("0123456789abcdeF"), body, at), string(body), 0, "False"},
	}
	for _, c := range cases {
		fmt.Fprintf(&asked, "\nprint(genuine(%q.encode(), %q, %q.encode(), lambda: %d))", secret, c.header, c.body, at.Unix()+c.seconds)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	said, err := exec.CommandContext(ctx, python, "-c", asked.String()).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	got := strings.Fields(string(said))
	if len(got) != len(cases) {
		t.Fatalf("got %s", said)
	}
	for i, c := range cases {
		if got[i] != c.want {
			t.Errorf("%+v: got %s", c, got[i])
		}
	}
}
