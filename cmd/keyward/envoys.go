package main

import (
	"errors"
	"net"

	"keyward/authz/portal"
	"keyward/envoy/generate"
)

// envoys is what the portal shows of the Envoys in front of this replica.
type envoys struct{ s *service }

func (e envoys) Nodes() []portal.EnvoyNode {
	heard := e.s.accessLogs.Nodes()
	nodes := make([]portal.EnvoyNode, len(heard))
	for i, n := range heard {
		nodes[i] = portal.EnvoyNode{
			ID: n.ID, Cluster: n.Cluster, Connected: n.Connected, LastHeard: n.LastHeard, LastEnd: n.LastEnd, Entries: n.Entries, Ends: n.Ends,
		}
	}
	return nodes
}

func (e envoys) Configuration(in portal.EnvoyInput) (string, error) {
	if e.s.cfg.Listen.Check.TLS.enabled() {
		return "", errors.New("listen.check has TLS, and the files for it are on Envoy's machine: write the configuration with " +
			"keyward envoy generate envoy --keyward-ca FILE, and --keyward-cert and --keyward-key where keyward wants client certificates")
	}
	g := generate.Config{Listen: in.Listen, Upstreams: in.Upstreams, Usage: in.Usage}
	if addr, ok := e.s.check.Addr().(*net.TCPAddr); ok {
		g.Keyward = addr.String() // port 0 is a real one by now
		if addr.IP.IsUnspecified() {
			return "", errors.New("listen.check.address does not say where Envoy finds keyward: write the configuration with keyward envoy generate envoy --keyward HOST:PORT")
		}
	}
	e.s.cfg.envoy(&g)
	write := generate.Envoy
	if in.Fragment {
		write = generate.EnvoyFragment
	}
	text, err := write(g)
	return string(text), err
}
