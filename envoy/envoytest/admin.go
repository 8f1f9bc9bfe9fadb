package envoytest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// Admin is the base URL of the admin interface, on loopback, without a slash at its end.
func (p *Process) Admin() string { return p.admin }

// Listener returns the address, host:port, that the listener of this name has got, or the path of a Unix
// socket; "" if there is no such listener. Listeners that came after the start are not known.
func (p *Process) Listener(name string) string { return p.listeners[name] }

// Stats returns the counters and gauges whose name matches the regular expression, which Envoy searches
// for anywhere in the name; those never touched are left out.
func (p *Process) Stats(ctx context.Context, filter string) (map[string]int64, error) {
	body, err := p.get(ctx, "/stats?usedonly&filter="+url.QueryEscape(filter))
	if err != nil {
		return nil, err
	}
	stats := map[string]int64{}
	for lines := bufio.NewScanner(bytes.NewReader(body)); lines.Scan(); {
		name, value, ok := strings.Cut(lines.Text(), ": ")
		if n, err := strconv.ParseInt(value, 10, 64); ok && err == nil { // a histogram is not a number
			stats[name] = n
		}
	}
	return stats, nil
}

// Drain asks Envoy to take its leave of its clients: answers carry "connection: close" or GOAWAY, and
// requests that run are finished; new connections are accepted for 2 s more. Stop afterwards: SIGTERM alone cuts requests and loses their log entries.
func (p *Process) Drain(ctx context.Context) error {
	_, err := p.ask(ctx, http.MethodPost, "/drain_listeners?graceful&skip_exit")
	return err
}

func (p *Process) readListeners(ctx context.Context) (map[string]string, error) {
	body, err := p.get(ctx, "/listeners?format=json")
	if err != nil {
		return nil, err
	}
	var answer struct {
		Statuses []struct {
			Name    string `json:"name"`
			Address struct {
				Socket struct {
					Address string `json:"address"`
					Port    int    `json:"port_value"`
				} `json:"socket_address"`
				Pipe struct {
					Path string `json:"path"`
				} `json:"pipe"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, fmt.Errorf("envoy admin: /listeners: %w", err)
	}
	listeners := map[string]string{}
	for _, l := range answer.Statuses {
		listeners[l.Name] = l.Address.Pipe.Path
		if s := l.Address.Socket; s.Address != "" {
			listeners[l.Name] = net.JoinHostPort(s.Address, strconv.Itoa(s.Port))
		}
	}
	return listeners, nil
}

func (p *Process) get(ctx context.Context, path string) ([]byte, error) {
	return p.ask(ctx, http.MethodGet, path)
}

// ask has a connection of its own for each question: none is left open when Envoy ends.
func (p *Process) ask(ctx context.Context, method, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, p.admin+path, nil)
	if err != nil {
		return nil, fmt.Errorf("envoy admin: %w", err)
	}
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("envoy admin: %w", err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, fmt.Errorf("envoy admin: %s: %w", path, err)
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("envoy admin: %s: %s: %s", path, res.Status, bytes.TrimSpace(body))
	}
	return body, nil
}
