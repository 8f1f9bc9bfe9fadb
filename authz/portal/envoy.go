package portal

import (
	"net/http"
	"strings"
	"time"

	"keyward/authz/admin"
)

// Envoys is what the portal shows of the Envoys in front of the server.
type Envoys interface {
	// Nodes lists the Envoys that were heard, each once for every connection it has.
	Nodes() []EnvoyNode
	// Configuration writes what puts keyward in front of an application, as YAML. Errors are for people.
	Configuration(EnvoyInput) (string, error)
}

// An EnvoyNode is an Envoy as it was heard on one connection.
type EnvoyNode struct {
	ID, Cluster string
	Connected   time.Time
	LastHeard   time.Time
	LastEnd     time.Time // of a request; zero: never
	Entries     int64     // of its access logs
	Ends        int64     // of requests
}

// An EnvoyInput is what people choose of a configuration.
type EnvoyInput struct {
	Listen    string   // "": the usual one
	Upstreams []string // host:port
	Fragment  bool     // only what goes into a configuration of somebody's own
	Usage     bool     // Envoy tells of status, bytes and durations
}

func (p *portal) envoyPages() {
	p.page("Envoy", "GET /instances/{instance}/envoy", p.envoy)
}

// An envoyView is the page about the Envoys in front.
type envoyView struct {
	Nodes     []envoyNode
	SeesNodes bool // others' traffic is not a tenant's to see
	Fields    fieldList
	Text      string
	Fault     string
	Asked     bool
}

// An envoyNode is all connections of one Envoy.
type envoyNode struct {
	EnvoyNode
	Connections int
	Silent      bool // it was never heard to end a request
}

func (p *portal) envoy(w http.ResponseWriter, v *visit) error {
	if !v.Can("instance.read") {
		return &admin.ForbiddenError{Reason: "the role " + string(v.Caller.Role) + " has no right to instance.read"}
	}
	if err := v.ParseForm(); err != nil {
		return errForm
	}
	// To tell no such instance: the page is the same for all of them.
	if _, err := p.svc.Instance(v.Context(), v.Caller, v.Instance); err != nil {
		return err
	}
	in := EnvoyInput{
		Listen: strings.TrimSpace(v.Form.Get("listen")), Upstreams: strings.Fields(v.Form.Get("upstreams")),
		Fragment: v.Form.Get("fragment") != "", Usage: v.Form.Get("usage") != "",
	}
	data := envoyView{SeesNodes: v.Caller.InstanceID == "", Asked: v.Form.Has("upstreams")}
	on := func(b bool) string {
		if b {
			return "on"
		}
		return ""
	}
	if !data.Asked {
		in.Upstreams, in.Usage = []string{"127.0.0.1:8080"}, true
	}
	data.Fields = fieldList{
		{Name: "upstreams", Label: "Servers of the application", Kind: "lines", Value: strings.Join(in.Upstreams, "\n"), Help: "host:port, one on each line."},
		{Name: "listen", Label: "Envoy listens on", Kind: "text", Value: in.Listen, Empty: "127.0.0.1:10000", Max: 64},
		{Name: "usage", Label: "Envoy tells of status, bytes and durations", Kind: "switch", Value: on(in.Usage)},
		{Name: "fragment", Label: "Only what goes into a configuration of your own", Kind: "switch", Value: on(in.Fragment)},
	}
	if p.cfg.Envoys != nil {
		if data.SeesNodes {
			data.Nodes = envoyNodes(p.cfg.Envoys.Nodes())
		}
		text, err := p.cfg.Envoys.Configuration(in)
		if err != nil {
			data.Fault = upper(err.Error())
		}
		data.Text = text
	}
	status := http.StatusOK
	if data.Fault != "" && data.Asked {
		status = http.StatusBadRequest
	}
	return p.showAs(w, v, status, "envoy", "Envoy", data)
}

// envoyNodes joins the connections of each Envoy, in the order in which they came.
func envoyNodes(connections []EnvoyNode) []envoyNode {
	var nodes []envoyNode
	at := map[[2]string]int{}
	for _, c := range connections {
		i, known := at[[2]string{c.ID, c.Cluster}]
		if !known {
			i = len(nodes)
			at[[2]string{c.ID, c.Cluster}] = i
			nodes = append(nodes, envoyNode{EnvoyNode: EnvoyNode{ID: c.ID, Cluster: c.Cluster, Connected: c.Connected}})
		}
		n := &nodes[i]
		n.Connections++
		n.Entries += c.Entries
		n.Ends += c.Ends
		for _, t := range []struct {
			to *time.Time
			at time.Time
		}{{&n.LastHeard, c.LastHeard}, {&n.LastEnd, c.LastEnd}} {
			if t.at.After(*t.to) {
				*t.to = t.at
			}
		}
		if c.Connected.Before(n.Connected) {
			n.Connected = c.Connected
		}
	}
	for i := range nodes {
		nodes[i].Silent = nodes[i].LastEnd.IsZero()
	}
	return nodes
}
