package accesslog

import (
	"strings"
	"sync"
	"time"

	"keyward/authz/apikey"
)

const (
	// usageLog is the name of the log that tells of usage.
	usageLog = "keyward-usage"

	// What no request is, and what sums of are no numbers any more: an entry that says more is refused.
	maxTook  = 30 * 24 * time.Hour
	maxBytes = 1 << 46
	// maxInstances bounds how many names are kept. More than that cost a copy now and then.
	maxInstances = 16_384
)

// A usageCounter is told how the requests of known keys went.
type usageCounter interface {
	// Ended is called once for each request when it has ended, also for one that was refused. It may be called
	// by many goroutines at once, and must not block.
	//
	// status is from 100 to 599, or 0 where the client was sent none, or one of no known class. The bytes are those
	// of the client's connection as Envoy counts them: headers, body and framing, without TLS. took is from
	// the request's first byte until Envoy was done with it.
	Ended(instanceID string, key apikey.ID, status int, requestBytes, responseBytes int64, took time.Duration)
}

// count tells of one request how it went.
func (s *Server) count(e *entry) kind {
	if s.usage == nil || e.event != eventEnd || e.key == "" {
		return kindIgnored
	}
	key, err := apikey.ParseID(e.key)
	if err != nil || key.IsZero() || e.status < 0 || e.status > 0 && e.status < 100 || e.status > 999 ||
		e.received < 0 || e.received > maxBytes || e.sent < 0 || e.sent > maxBytes || e.took < 0 {
		return kindMalformed
	}
	instance, ok := s.names.instance(e.instance)
	if !ok {
		return kindMalformed
	}
	status := int(e.status)
	if status > 599 {
		status = 0
	}
	s.usage.Ended(instance, key, status, e.received, e.sent, e.took)
	return kindUsage
}

// names keeps the ids of instances, so that a text of which the bytes are about to go is not copied with
// each entry. Safe for concurrent use.
type names struct {
	mu    sync.RWMutex
	known map[string]string // as they were heard -> as they are
}

// instance returns the id of an instance, which may be kept. ok is false if it cannot be one.
func (n *names) instance(heard string) (id string, ok bool) {
	n.mu.RLock()
	id, ok = n.known[heard]
	n.mu.RUnlock()
	if ok {
		return id, true
	}
	if len(heard) > maxName {
		return "", false
	}
	heard = strings.Clone(heard)
	id, err := apikey.CanonicalInstanceID(heard)
	if err != nil {
		return "", false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.known) >= maxInstances {
		clear(n.known)
	}
	n.known[heard] = id
	return id, true
}
