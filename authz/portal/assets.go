package portal

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"mime"
	"net/http"
	"path"
	"strings"
)

//go:embed assets
var assetFiles embed.FS

// assets are what pages load. An address holds the beginning of the hash of what is there, so that browsers may
// keep it for good.
type assets struct {
	url map[string]string // by name, such as portal.css
}

func loadAssets() *assets {
	a := &assets{url: map[string]string{}}
	entries, err := assetFiles.ReadDir("assets")
	if err != nil {
		panic(err) // embedded
	}
	for _, e := range entries {
		sum := sha256.Sum256(a.read(e.Name()))
		ext := path.Ext(e.Name())
		a.url[e.Name()] = "/assets/" + strings.TrimSuffix(e.Name(), ext) + "." + hex.EncodeToString(sum[:6]) + ext
	}
	return a
}

func (a *assets) read(name string) []byte {
	b, err := assetFiles.ReadFile("assets/" + name)
	if err != nil {
		panic(err) // embedded
	}
	return b
}

func (a *assets) routes(mux *http.ServeMux) {
	for name, url := range a.url {
		content, kind := a.read(name), mime.TypeByExtension(path.Ext(name))
		switch path.Ext(name) { // not what the machine thinks
		case ".js":
			kind = "text/javascript; charset=utf-8"
		case ".css":
			kind = "text/css; charset=utf-8"
		case ".svg":
			kind = "image/svg+xml"
		case ".txt":
			kind = "text/plain; charset=utf-8"
		}
		mux.HandleFunc("GET "+url, func(w http.ResponseWriter, _ *http.Request) {
			h := w.Header()
			h.Set("Content-Type", kind)
			h.Set("Cache-Control", "public, max-age=31536000, immutable")
			_, _ = w.Write(content)
		})
	}
}

// of returns the address of an asset, for templates.
func (a *assets) of(name string) string {
	url, ok := a.url[name]
	if !ok {
		panic("portal: no such asset: " + name)
	}
	return url
}
