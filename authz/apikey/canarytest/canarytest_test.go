package canarytest

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"keyward/authz/apikey"
)

func TestSecretsAreFound(t *testing.T) {
	raw := make([]byte, 32)
	_, _ = rand.Read(raw)
	for kind, secret := range map[string]string{"a key's": apikey.Format{}.New(apikey.KindInstance).Reveal(), "a pepper": string(raw)} {
		var c Canary
		c.Add(secret)
		escaped := ""
		for i := range len(secret) {
			escaped += fmt.Sprintf("%%%02X", secret[i])
		}
		pressed := func(text string) string {
			var b bytes.Buffer
			w := gzip.NewWriter(&b)
			_, _ = w.Write([]byte(text))
			_ = w.Close()
			return b.String()
		}
		for name, text := range map[string]string{
			"raw":              "key=" + secret + "\n",
			"cut":              secret[5:30],
			"hexadecimal":      fmt.Sprintf("%x", secret),
			"HEXADECIMAL":      fmt.Sprintf("%X", secret),
			"base64":           base64.StdEncoding.EncodeToString([]byte(secret)),
			"base64, offset 1": base64.StdEncoding.EncodeToString([]byte("1" + secret)),
			"base64, offset 2": base64.URLEncoding.EncodeToString([]byte("12" + secret + "!")),
			"escaped":          escaped,
			"gzip":             pressed("key=" + secret),
			"gzip in gzip":     pressed("\x1f\x8b" + pressed(secret)),
			"gzip, cut":        pressed("key=" + secret)[:60],
		} {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "log"), []byte("before "+text), 0o600); err != nil {
				t.Fatal(err)
			}
			if hits, err := c.Search(dir); err != nil || len(hits) == 0 {
				t.Errorf("%s, %s: got %v, %v, want a hit", kind, name, hits, err)
			}
			if hits, err := c.Search(dir, "log"); err != nil || len(hits) != 0 {
				t.Errorf("%s, %s: got %v, %v where it may be", kind, name, hits, err)
			}
		}
		if hits := c.Find([]byte(secret[:8] + secret[len(secret)-8:])); len(hits) != 0 {
			t.Errorf("%s: what lists show is a hit: %v", kind, hits)
		}
	}
}
