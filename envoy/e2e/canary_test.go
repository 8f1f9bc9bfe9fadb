package e2e_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"keyward/authz/apikey"
)

// coreAt and coreLen name the part of a secret that is looked for. Sixteen random characters are never
// there by chance, and they find what was cut, or lost its prefix, as well.
const coreAt, coreLen = 8, 16

// forms are the spellings in which a secret could have been written down.
func forms(secret string) []string {
	core := secret[coreAt : coreAt+coreLen]
	escaped := ""
	for i := range len(core) {
		escaped += fmt.Sprintf("%%%02x", core[i])
	}
	all := []string{
		core, url.QueryEscape(core), escaped, strings.ToUpper(escaped),
		hex.EncodeToString([]byte(core)), strings.ToUpper(hex.EncodeToString([]byte(core))),
	}
	// In base64 the same text looks different at each of three offsets; what its neighbours have a part in
	// is left out.
	for offset := range 3 {
		for _, encoding := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			text := encoding.EncodeToString(append(make([]byte, offset), core...))
			all = append(all, text[(offset*8+5)/6:(offset+len(core))*8/6])
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// needleLen is how much of a form is looked up at every byte of a text; none is shorter.
const needleLen = coreLen

// search looks for all secrets in all files below dir, except those by these names. It never says the
// secret.
func (c *canary) search(dir string, except ...string) (hits []string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	needles := map[string][]string{} // forms by how they begin
	for _, secret := range c.secrets {
		for _, form := range forms(secret) {
			needles[form[:needleLen]] = append(needles[form[:needleLen]], form)
		}
	}
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || slices.Contains(except, entry.Name()) {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for at := 0; at+needleLen <= len(text); at++ {
			for _, form := range needles[string(text[at:at+needleLen])] {
				if bytes.HasPrefix(text[at:], []byte(form)) {
					before := text[max(0, at-60):at]
					hits = append(hits, fmt.Sprintf("%s, byte %d, after %q", filepath.Base(path), at, before[:max(0, len(before)-coreAt)]))
				}
			}
		}
		return nil
	})
	return hits, err
}

func TestCanaryFindsSecrets(t *testing.T) {
	var c canary
	secret := apikey.Format{}.New(apikey.KindInstance).Reveal()
	c.add(secret)
	escaped := ""
	for i := range len(secret) {
		escaped += fmt.Sprintf("%%%02X", secret[i])
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
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "log"), []byte("before "+text), 0o600); err != nil {
			t.Fatal(err)
		}
		if hits, err := c.search(dir); err != nil || len(hits) == 0 {
			t.Errorf("%s: got %v, %v, want a hit", name, hits, err)
		}
		if hits, err := c.search(dir, "log"); err != nil || len(hits) != 0 {
			t.Errorf("%s: got %v, %v where it may be", name, hits, err)
		}
	}
}
