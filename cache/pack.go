package cache

import (
	"encoding/binary"
	"slices"
	"strings"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"keyward/authz/apikey"
)

// A packer lays records out for being kept by the million. The garbage collector looks at every object
// that there is, at each of its cycles, and a record as stores make them is ten: two million of them take
// the collector seconds of processor time. A packed one is two: the record with its generation, and the
// text that only it has. What many keys have in common (instance, creator, scopes) is kept once.
// Safe for concurrent use.
type packer struct {
	mu     sync.Mutex
	words  *simplelru.LRU[string, string]
	scopes *simplelru.LRU[string, apikey.Scopes] // by all of them, each after its length
}

const (
	// packerWords is how many words and lists of scopes are remembered as shared. Who falls out is shared no
	// more with those that come later, and that is all.
	packerWords = 16_384
	// packerList is how long a list of scopes may be to be shared: hardly two keys have the same longer one.
	packerList = 1 << 10 // bytes
)

func newPacker() (*packer, error) {
	words, err := simplelru.NewLRU[string, string](packerWords, nil)
	if err != nil {
		return nil, err
	}
	scopes, err := simplelru.NewLRU[string, apikey.Scopes](packerWords, nil)
	return &packer{words: words, scopes: scopes}, err
}

// pack returns a copy of k that is equal to it. Only metadata, addresses and quotas, which few keys have, are k's.
func (p *packer) pack(k *apikey.Key) *apikey.Key {
	one := &struct {
		key        apikey.Key
		generation [1]apikey.Generation
	}{key: *k}
	to := &one.key
	if len(k.Generations) == 1 {
		one.generation[0] = k.Generations[0]
		to.Generations = one.generation[:]
	} else {
		to.Generations = slices.Clone(k.Generations)
	}

	p.mu.Lock()
	to.Type = apikey.Type(p.shared(string(k.Type)))
	to.RevokedReason = apikey.RevocationReason(p.shared(string(k.RevokedReason)))
	for _, s := range []*string{&to.InstanceID, &to.Environment, &to.AgentName, &to.CreatedBy} {
		*s = p.shared(*s)
	}
	own := append(make([]*string, 0, 8), &to.Name, &to.Description, &to.UserPrincipalName)
	if scopes, ok := p.sharedScopes(k.Scopes); ok {
		to.Scopes = scopes
	} else {
		to.Scopes = slices.Clone(k.Scopes)
		for i := range to.Scopes {
			own = append(own, (*string)(&to.Scopes[i]))
		}
	}
	p.mu.Unlock()

	for i := range to.Generations {
		own = append(own, &to.Generations[i].Hint)
	}
	var text strings.Builder
	length := 0
	for _, s := range own {
		length += len(*s)
	}
	text.Grow(length)
	for _, s := range own {
		text.WriteString(*s)
	}
	rest := text.String()
	for _, s := range own {
		n := len(*s)
		*s, rest = rest[:n], rest[n:]
	}
	return to
}

// sharedScopes returns the one copy of a list; ok is false if it is too long for that. The caller holds the
// lock.
func (p *packer) sharedScopes(list apikey.Scopes) (shared apikey.Scopes, ok bool) {
	if len(list) == 0 {
		return list, true
	}
	length := 0
	for _, s := range list {
		length += binary.MaxVarintLen16 + len(s)
	}
	if length > packerList {
		return nil, false
	}
	text := make([]byte, 0, packerList)
	for _, s := range list {
		text = append(binary.AppendUvarint(text, uint64(len(s))), s...)
	}
	if shared, ok = p.scopes.Get(string(text)); ok {
		return shared, true
	}
	shared = slices.Clone(list)
	for i := range shared {
		shared[i] = apikey.Scope(p.shared(string(shared[i])))
	}
	p.scopes.Add(string(text), shared)
	return shared, true
}

// shared returns the one copy of a word. The caller holds the lock.
func (p *packer) shared(word string) string {
	if word == "" {
		return ""
	}
	if kept, ok := p.words.Get(word); ok {
		return kept
	}
	word = strings.Clone(word)
	p.words.Add(word, word)
	return word
}
