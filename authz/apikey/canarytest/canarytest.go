// Package canarytest finds secrets where none may be: in logs, metrics, audit, backups, database files.
//
// A [Canary] is told every secret of a test, and then looks for them in any spelling that a program could
// have written them down in. Begin with the zero Canary.
package canarytest

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// coreAt and coreLen name the part of a secret that is looked for. Sixteen random bytes are never there by
// chance, and they find what was cut, or lost its prefix, as well.
const coreAt, coreLen = 8, 16

// needleLen is how much of a form is looked up at every byte of a text; none is shorter.
const needleLen = coreLen

// A Canary remembers every secret. Safe for concurrent use.
type Canary struct {
	mu      sync.Mutex
	needles map[string][]string // forms by how they begin
	secrets int
}

// Add remembers a secret of at least 24 bytes, which may be any bytes.
func (c *Canary) Add(secret string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.needles == nil {
		c.needles = map[string][]string{}
	}
	c.secrets++
	for _, form := range forms(secret) {
		c.needles[form[:needleLen]] = append(c.needles[form[:needleLen]], form)
	}
}

// Len is how many secrets were added.
func (c *Canary) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.secrets
}

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

// Find says where a text has secrets, also where a part of it is compressed by gzip. It never says the
// secret.
func (c *Canary) Find(text []byte) (hits []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.findLocked(text)
}

func (c *Canary) findLocked(text []byte) (hits []string) {
	for at := 0; at+needleLen <= len(text); at++ {
		for _, form := range c.needles[string(text[at:at+needleLen])] {
			if bytes.HasPrefix(text[at:], []byte(form)) {
				before := text[max(0, at-60):at]
				hits = append(hits, fmt.Sprintf("byte %d, after %q", at, before[:max(0, len(before)-coreAt)]))
			}
		}
	}
	for at := 0; ; at++ {
		next := bytes.Index(text[at:], []byte{0x1f, 0x8b, 8}) // gzip by deflate
		if next < 0 {
			return hits
		}
		at += next
		stream, err := gzip.NewReader(bytes.NewReader(text[at:]))
		if err != nil {
			continue
		}
		inner, _ := io.ReadAll(stream) // what comes before a fault counts as well
		for _, hit := range c.findLocked(inner) {
			hits = append(hits, fmt.Sprintf("gzip at byte %d: %s", at, hit))
		}
	}
}

// Search looks into all files below dir, except those by these names.
func (c *Canary) Search(dir string, except ...string) (hits []string, err error) {
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || slices.Contains(except, entry.Name()) {
			return err
		}
		text, err := os.ReadFile(path) //nolint:gosec // a folder of the test's own
		for _, hit := range c.Find(text) {
			hits = append(hits, filepath.Base(path)+", "+hit)
		}
		return err
	})
	return hits, err
}
