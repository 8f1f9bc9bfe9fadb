package admin

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"keyward/authz/apikey"
)

// oidcKeys are the keys of one issuer. go-oidc has such a set, but one that asks the issuer about every
// token with a wrong signature, whoever sends it, and that never forgets a key the issuer has withdrawn.
// Safe for concurrent use.
type oidcKeys struct {
	issuer, url string // url "": where the issuer's discovery document says
	client      *http.Client
	algorithms  []string

	mu       sync.Mutex
	keys     []jose.JSONWebKey
	fetched  time.Time     // when keys came
	tried    time.Time     // when they were last asked for
	fetching chan struct{} // closed when the fetch that runs is over; nil: none runs
	err      error         // of the last fetch
}

const (
	// keysFresh is how long a withdrawn key goes on working while the issuer answers, keysStale while it
	// does not.
	keysFresh = 10 * time.Minute
	keysStale = 24 * time.Hour
	// keysPause is the least time between two fetches for the sake of unknown keys. An issuer publishes a
	// key before it uses it, so nobody waits that long in practice.
	keysPause   = 5 * time.Second
	keysTimeout = 10 * time.Second
	maxKeySet   = 1 << 20 // bytes
)

func decodeSegment(s string) ([]byte, error) { return base64.RawURLEncoding.DecodeString(s) }

// VerifySignature implements oidc.KeySet.
func (k *oidcKeys) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	var algorithms []jose.SignatureAlgorithm
	for _, a := range k.algorithms {
		algorithms = append(algorithms, jose.SignatureAlgorithm(a))
	}
	signed, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		return nil, err
	}
	if len(signed.Signatures) != 1 {
		return nil, errors.New("not one signature")
	}
	id := signed.Signatures[0].Header.KeyID
	keys, err := k.known(ctx, func(keys []jose.JSONWebKey) bool {
		for i := range keys {
			if id == "" || keys[i].KeyID == id {
				return true
			}
		}
		return false
	})
	if err != nil {
		if outage, ok := ctx.Value(outageKey{}).(*error); ok {
			*outage = fmt.Errorf("issuer %s: %w: %w: %w", k.issuer, apikey.ErrUndecided, errNoKeys, err)
		}
		return nil, err
	}
	for i := range keys {
		if id == "" || keys[i].KeyID == id {
			if payload, err := signed.Verify(&keys[i]); err == nil {
				return payload, nil
			}
		}
	}
	return nil, errors.New("no key of the issuer made the signature")
}

// known returns the issuer's keys, fetched anew where they are old or suffice says that they do not do.
// Old ones are used where they cannot be. Errors: what was wrong with the last fetch.
func (k *oidcKeys) known(ctx context.Context, suffice func([]jose.JSONWebKey) bool) ([]jose.JSONWebKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if suffice(k.keys) && time.Since(k.fetched) < keysFresh {
		return k.keys, nil
	}
	if k.fetching == nil && time.Since(k.tried) >= keysPause {
		k.tried, k.fetching = time.Now(), make(chan struct{})
		go k.fetch() //nolint:gosec // G118: it outlives the request on purpose, as fetch says
	}
	if over := k.fetching; over != nil {
		k.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
		}
		k.mu.Lock()
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	if k.err != nil && (!suffice(k.keys) || time.Since(k.fetched) >= keysStale) {
		return nil, k.err
	}
	return k.keys, nil
}

// fetch asks the issuer for its keys. Its context is its own: who asked first may leave, others wait too.
func (k *oidcKeys) fetch() {
	ctx, cancel := context.WithTimeout(context.Background(), keysTimeout)
	defer cancel()
	keys, err := k.download(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err = err; err == nil {
		k.keys, k.fetched = keys, time.Now()
	}
	close(k.fetching)
	k.fetching = nil
}

// discovery is where an issuer tells of itself.
func (k *oidcKeys) discovery() string {
	return strings.TrimSuffix(k.issuer, "/") + "/.well-known/openid-configuration"
}

func (k *oidcKeys) download(ctx context.Context) ([]jose.JSONWebKey, error) {
	address := k.url
	if address == "" {
		var document struct {
			Issuer  string `json:"issuer"`
			JWKSURL string `json:"jwks_uri"`
		}
		if err := k.get(ctx, k.discovery(), &document); err != nil {
			return nil, fmt.Errorf("discovery document: %w", err)
		}
		if document.Issuer != k.issuer {
			return nil, errors.New("discovery document: it is of another issuer")
		}
		if !secureURL(document.JWKSURL) {
			return nil, errors.New("discovery document: jwks_uri is no https URL")
		}
		address = document.JWKSURL
	}
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := k.get(ctx, address, &set); err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	var keys []jose.JSONWebKey
	for _, text := range set.Keys {
		var key jose.JSONWebKey
		// Of a kind that is not known, a secret, or for encryption: not for us.
		if key.UnmarshalJSON(text) == nil && key.Valid() && key.IsPublic() && (key.Use == "" || key.Use == "sig") {
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("keys: there is none that could have signed a token")
	}
	return keys, nil
}

func (k *oidcKeys) get(ctx context.Context, address string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := k.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %d", address, resp.StatusCode)
	}
	body, err := readAll(resp)
	if err != nil {
		return fmt.Errorf("%s: %w", address, err)
	}
	if json.Unmarshal(body, into) != nil {
		return fmt.Errorf("%s answers something else than JSON", address)
	}
	return nil
}
