package authz

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"keyward/authz/apikey"
)

// A Mode says what a rule wants of credentials.
type Mode uint8

// The modes. Required is the zero Mode.
const (
	Required Mode = iota // a good credential
	Optional             // none, or a good one
	Public               // credentials are not looked at
)

var modes = [...]string{Required: "required", Optional: "optional", Public: "public"}

// ParseMode reads a mode as configurations write it; nothing is required.
func ParseMode(s string) (Mode, error) {
	if s == "" {
		return Required, nil
	}
	if i := slices.Index(modes[:], s); i >= 0 {
		return Mode(i), nil
	}
	return 0, fmt.Errorf("mode %q is not one of required, optional and public", s)
}

func (m Mode) String() string { return modes[m] }

// A Source is one place that names an instance, an agent or an environment: a fixed name, a wildcard of
// the rule's path, a query parameter or a member of the JSON object that the body is.
type Source struct {
	from sourceKind
	name string // of the wildcard, parameter or member, or the fixed name itself
}

type sourceKind uint8

const (
	fromLiteral sourceKind = iota
	fromPath
	fromQuery
	fromBody
)

// ParseSource reads a source: "{name}" is a wildcard of the path, "?name" a query parameter, "$.name" a
// member of the body, anything else the name itself.
func ParseSource(s string) (Source, error) {
	source := Source{name: s}
	if name, ok := strings.CutPrefix(s, "?"); ok {
		source = Source{from: fromQuery, name: name}
	} else if name, ok := strings.CutPrefix(s, "$"); ok {
		name, ok = strings.CutPrefix(name, ".")
		if !ok || strings.ContainsAny(name, ".[]$\"\\") {
			return Source{}, fmt.Errorf("source %q is not $.member: a member of the body is named by itself, such as $.agent_name", s)
		}
		source = Source{from: fromBody, name: name}
	} else if name, ok := strings.CutPrefix(s, "{"); ok && strings.HasSuffix(name, "}") {
		name = strings.TrimSuffix(strings.TrimSuffix(name, "}"), "...")
		source = Source{from: fromPath, name: name}
	}
	if source.name == "" || strings.ContainsAny(source.name, "{}?&= ") {
		return Source{}, fmt.Errorf("source %q is not {wildcard}, ?parameter, $.member or a plain name", s)
	}
	return source, nil
}

func (s Source) String() string {
	switch s.from {
	case fromPath:
		return "{" + s.name + "}"
	case fromQuery:
		return "?" + s.name
	case fromBody:
		return "$." + s.name
	}
	return s.name
}

// InBody reports whether the source is a member of the body.
func (s Source) InBody() bool { return s.from == fromBody }

// value returns what the source names in a request that matched its rule. ok is false if the request
// names it twice or cannot be read. It allocates only where a query or a body is escaped.
func (s *Source) value(r *Request, query string) (value string, present, ok bool) {
	switch s.from {
	case fromPath:
		value, present = r.match.value(s.name)
		return value, present, true
	case fromBody:
		return r.member(s.name)
	case fromQuery:
		if inOtherCase(query, s.name) { // as with members of a body: somebody behind us may read it
			return "", true, false
		}
		value, n, ok := queryValue(query, s.name)
		return value, n > 0, ok && n < 2
	}
	return s.name, true, true
}

// A Rule says what requests need on the routes that its pattern covers.
//
// Host, Method and Path form a pattern of net/http.ServeMux: an empty Host or Method is any, GET
// covers HEAD; the path has {name}, {name...}, {$} and a trailing slash for everything below. Two things
// differ. Patterns are compared with decoded text, so they are written decoded. And a trailing slash
// of the request does not count: "/files/" covers "/files" as well, if no other rule has that path, and
// "/files/{$}" is "/files".
type Rule struct {
	Host   string // without port
	Method string
	Path   string

	Mode   Mode
	Scopes apikey.Scopes // needed, all of them

	// Instance, Agent and Environment are where a request names its place; all that do must agree.
	Instance, Agent, Environment []Source
	// AgentRequired refuses agent keys where the request names no agent, AgentNeeded any caller who counts.
	AgentRequired, AgentNeeded bool
	// KeyTypes are the types of the keys that may; nil: all.
	KeyTypes []apikey.Type

	// Context is that of the quotas that count the rule's requests, {service}:{controller}. Where a request
	// has an agent, those of {service}:{controller}:{agent} count it too. "": no quota does.
	Context string
	// Cost is how many units of each quota a request spends; 0: 1.
	Cost int
	// Shadow says that scopes which a caller lacks here are reported, and refuse nobody.
	Shadow bool

	pattern string // host and path
	note    uint32 // number of pattern, see notes
}

// String returns the rule's pattern as ServeMux writes it.
func (r *Rule) String() string {
	return strings.TrimPrefix(r.Method+" "+r.Host+r.Path, " ")
}

// validate reports what cannot be meant, besides the path. wildcards are those of the path.
func (r *Rule) validate(wildcards []string) error {
	for i := range len(r.Method) {
		if c := r.Method[i]; (c < 'A' || c > 'Z') && !isDigit(c) && c != '-' && c != '_' {
			return fmt.Errorf("method %q is not a method such as GET: methods are written in upper case, any method by leaving it out", r.Method)
		}
	}
	if !isRuleHost(r.Host) {
		return fmt.Errorf("host %q is no host name and no IPv6 address in brackets: write it without port and wildcards, or leave it out for any host", r.Host)
	}
	if r.Mode > Public {
		return fmt.Errorf("mode %d does not exist", r.Mode)
	}
	if r.Mode == Public && (len(r.Scopes)+len(r.Instance)+len(r.Agent)+len(r.Environment) > 0 || r.AgentRequired || r.AgentNeeded || r.KeyTypes != nil || r.Context != "") {
		return errors.New("a public rule looks at no credential, so it cannot ask for scopes, instance, agent, environment or types of keys, and no quota counts it")
	}
	for i, t := range r.KeyTypes {
		if t.Kind() == 0 || slices.Contains(r.KeyTypes[:i], t) {
			return errors.New("keyTypes must be some of instance, agent and user, each once")
		}
	}
	if r.Context != "" && !isContext(r.Context) {
		return fmt.Errorf("context %q is not {service}:{controller}, each of letters, digits, . _ and -, such as CoreAPI:Completions; the agent is added where the rule says where requests name it", r.Context)
	}
	if r.Cost < 0 || r.Cost > maxCost {
		return fmt.Errorf("cost %d is not from 1 to %d", r.Cost, maxCost)
	}
	if r.Cost > 1 && r.Context == "" {
		return errors.New("a cost needs a context: it is spent of the context's quotas")
	}
	if r.AgentNeeded && len(r.Agent) == 0 {
		return errors.New("agentMissing: require needs agent: say where requests name theirs")
	}
	for _, field := range []struct {
		name    string
		sources []Source
	}{{"instance", r.Instance}, {"agent", r.Agent}, {"environment", r.Environment}} {
		for i, s := range field.sources {
			switch {
			case s.name == "":
				return fmt.Errorf("%s: an empty source", field.name)
			case slices.Contains(field.sources[:i], s):
				return fmt.Errorf("%s: %s is there twice", field.name, s)
			case s.from == fromPath && !slices.Contains(wildcards, s.name):
				return fmt.Errorf("%s: the path has no wildcard %s", field.name, s)
			}
		}
	}
	return nil
}

// maxCost is the most that one request can cost.
const maxCost = 1_000_000

// isContext reports whether s is a service and a controller.
func isContext(s string) bool {
	service, controller, ok := strings.Cut(s, ":")
	return ok && isWord(service) && isWord(controller)
}

func isWord(s string) bool {
	const word = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
	return s != "" && len(s) <= 64 && strings.Trim(s, word) == ""
}

// ReadsBody reports whether the rule needs the request's body.
func (r *Rule) ReadsBody() bool {
	return slices.ContainsFunc(r.Instance, Source.InBody) || slices.ContainsFunc(r.Agent, Source.InBody) || slices.ContainsFunc(r.Environment, Source.InBody)
}

// SamePattern reports whether two rules cover the same requests, so that only one of them can be there.
func (r *Rule) SamePattern(other *Rule, ignoreCase bool) bool {
	p, err := parsePattern(r, ignoreCase)
	q, otherErr := parsePattern(other, ignoreCase)
	return err == nil && otherErr == nil && p.same(p.subtree) == q.same(q.subtree)
}

// takes reports whether keys of a type may on the rule's routes.
func (r *Rule) takes(t apikey.Type) bool { return r.KeyTypes == nil || slices.Contains(r.KeyTypes, t) }

// isRuleHost reports whether a rule can have this host; "" is any.
func isRuleHost(host string) bool {
	if address, ok := strings.CutPrefix(host, "["); ok {
		a, err := netip.ParseAddr(strings.TrimSuffix(address, "]"))
		return err == nil && a.Is6() && strings.HasSuffix(address, "]")
	}
	if host == "." { // clean, it would be any host
		return false
	}
	for i := range len(host) {
		c := host[i] | 0x20 // letters in lower case
		if !isDigit(host[i]) && (c < 'a' || c > 'z') && !strings.Contains("-._", host[i:i+1]) {
			return false
		}
	}
	return true
}

// maxWildcards is how many wildcards a path may have, so that a match has room for their values.
const maxWildcards = 16

// Routes finds the rule for a request: the most specific one, as net/http.ServeMux chooses. ServeMux
// itself judges patterns and conflicts while rules are loaded, but it keeps the values of its wildcards
// to itself and allocates, so the look-up is ours. Safe for concurrent use.
type Routes struct {
	ignoreCase bool
	hosts      map[string]methods // by clean host; "" is any
}

// methods holds the paths of one host by method; "" is any.
type methods map[string]*node

// A node is a place in the tree of paths: the segments that led to it have been matched.
type node struct {
	literals map[string]*node // by the next segment, in lower case if case is ignored
	longest  int              // bytes of the longest literal
	wildcard *node            // if the next segment is a {name}
	here     *route           // if the path ends here
	below    *route           // for the path that ends here and has no route of its own, and for all below
}

type route struct {
	Rule
	wildcards []string // their names, in the order of the path
}

// A match is what is known of a request after its rule was found. It borrows from the request's path.
type match struct {
	names  []string
	values [maxWildcards]string
}

// value returns what a wildcard of the rule stands for.
func (m *match) value(name string) (value string, ok bool) {
	i := slices.Index(m.names, name)
	if i < 0 {
		return "", false
	}
	return m.values[i], true
}

// match returns the rule for a request, nil if there is none, and keeps the values of its wildcards in m.
// host is the authority as the request has it, path comes from [judgePath]. It does not allocate.
func (r *Routes) match(m *match, method, host, path string) *Rule {
	m.names = nil
	if path == "" || path[0] != '/' {
		return nil // the one of CONNECT or OPTIONS *
	}
	path = strings.TrimSuffix(path, "/") // the root's
	var room [256]byte                   // longer than any host name
	host, _ = cleanHost(room[:0], host)
	found := r.find(r.hosts[host], m, method, path)
	if found == nil {
		found = r.find(r.hosts[""], m, method, path)
	}
	if found == nil {
		return nil
	}
	m.names = found.wildcards
	return &found.Rule
}

func (r *Routes) find(host methods, m *match, method, path string) *route {
	if host == nil {
		return nil
	}
	found := r.findBelow(host[method], m, path, 0)
	if found == nil && method == http.MethodHead {
		found = r.findBelow(host[http.MethodGet], m, path, 0)
	}
	if found == nil {
		found = r.findBelow(host[""], m, path, 0)
	}
	return found
}

// findBelow matches the rest of a path, which is empty or begins with a slash, below n. wildcards is how
// many the path has had. A literal goes before a wildcard, and that before everything below: what the
// tree cannot decide in that order is a conflict and was not loaded. Every node is looked at once at
// most, so no path makes this slow.
func (r *Routes) findBelow(n *node, m *match, rest string, wildcards int) *route {
	if n == nil {
		return nil
	}
	if rest == "" {
		if n.here != nil {
			return n.here
		}
	} else {
		segment, after := rest[1:], ""
		if i := strings.IndexByte(segment, '/'); i >= 0 {
			segment, after = segment[:i], segment[i:]
		}
		if found := r.findBelow(r.literal(n, segment), m, after, wildcards); found != nil {
			return found
		}
		if n.wildcard != nil {
			m.values[wildcards] = segment
			if found := r.findBelow(n.wildcard, m, after, wildcards+1); found != nil {
				return found
			}
		}
	}
	if n.below != nil && wildcards < len(n.below.wildcards) { // it has a name
		m.values[wildcards] = strings.TrimPrefix(rest, "/")
	}
	return n.below
}

func (r *Routes) literal(n *node, segment string) *node {
	switch {
	case len(segment) > n.longest:
		return nil
	case !r.ignoreCase:
		return n.literals[segment]
	}
	var room [128]byte
	return n.literals[string(appendLower(room[:0], segment))]
}

// NewRoutes makes rules ready. It reports every rule that cannot be meant, and every two of which neither
// is more specific than the other: for the requests that both cover nobody could say which one counts.
// ignoreCase compares paths without regard to the case of ASCII letters. The rules must not be changed
// afterwards.
func NewRoutes(rules []Rule, ignoreCase bool) (*Routes, error) {
	var (
		faults   []error
		patterns = make([]*pattern, 0, len(rules))
		bySame   = make(map[string]*pattern, len(rules))
		mux      = http.NewServeMux()
	)
	for i := range rules {
		p, err := parsePattern(&rules[i], ignoreCase)
		if err == nil {
			err = rules[i].validate(p.wildcards)
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("routes[%d] %q: %w", i, &rules[i], err))
			continue
		}
		p.index = i
		if twin := bySame[p.same(p.subtree)]; twin != nil {
			faults = append(faults, p.conflict(twin, "they cover the same requests (a trailing slash makes no difference)"))
			continue
		}
		if register(mux, p.text(p.subtree)) != nil {
			faults = append(faults, p.conflictAmong(patterns, p.subtree))
			continue
		}
		bySame[p.same(p.subtree)] = p
		patterns = append(patterns, p)
	}
	// To ServeMux "/files/" does not cover "/files". To us it does, where no other rule has that path.
	for _, p := range patterns {
		if p.subtree && len(p.segments) > 0 && bySame[p.same(false)] == nil && register(mux, p.text(false)) != nil {
			faults = append(faults, p.conflictAmong(patterns, false))
		}
	}
	if faults != nil {
		return nil, errors.Join(faults...)
	}

	r := &Routes{ignoreCase: ignoreCase, hosts: map[string]methods{}}
	for _, p := range patterns {
		r.add(p)
	}
	return r, nil
}

func (r *Routes) add(p *pattern) {
	if r.hosts[p.host] == nil {
		r.hosts[p.host] = methods{}
	}
	n := r.hosts[p.host][p.rule.Method]
	if n == nil {
		n = &node{literals: map[string]*node{}}
		r.hosts[p.host][p.rule.Method] = n
	}
	for _, s := range p.segments {
		n = n.child(s)
	}
	one := &route{Rule: *p.rule, wildcards: p.wildcards}
	if p.subtree {
		n.below = one
	} else {
		n.here = one
	}
}

// child returns the node for one segment more, which it makes if there is none.
func (n *node) child(segment string) *node {
	next := n.literals[segment]
	if segment == anySegment {
		next = n.wildcard
	}
	if next != nil {
		return next
	}
	next = &node{literals: map[string]*node{}}
	if segment == anySegment {
		n.wildcard = next
	} else {
		n.literals[segment] = next
		n.longest = max(n.longest, len(segment))
	}
	return next
}

// A pattern is a rule's pattern in parts.
type pattern struct {
	rule      *Rule
	index     int // in the configuration
	host      string
	segments  []string // without those that only say how the path ends; decoded, in lower case if case is ignored
	wildcards []string
	subtree   bool // everything below belongs to it
}

// anySegment stands for a wildcard among segments. No literal is written like that.
const anySegment = "{}"

// parsePattern takes a rule's pattern apart. Whether wildcards are well formed is for ServeMux to say.
func parsePattern(rule *Rule, ignoreCase bool) (*pattern, error) {
	p := &pattern{rule: rule}
	p.host, _ = cleanHost(nil, rule.Host)
	path, ok := strings.CutPrefix(rule.Path, "/")
	switch {
	case !ok:
		return nil, fmt.Errorf("path %q does not begin with a slash: / alone is every path", rule.Path)
	case strings.ContainsRune(path, '%'):
		return nil, errors.New("the path has an escape: requests are decoded before they are compared, so write what it stands for")
	case strings.ContainsAny(path, "?#"):
		return nil, errors.New("the path has a ? or #: a query is no part of it")
	}

	var asRequest, forMux strings.Builder // the pattern as a request could have it, and as ServeMux reads it
	segments := strings.Split(path, "/")
	for i, s := range segments {
		last := i == len(segments)-1
		asRequest.WriteByte('/')
		forMux.WriteByte('/')
		if !strings.Contains(s, "{") {
			asRequest.WriteString(escapeLiteral(s))
			forMux.WriteString(escapeLiteral(s))
			if s == "" && last {
				p.subtree = true
				continue
			}
			if ignoreCase {
				s = string(appendLower(nil, s))
			}
			p.segments = append(p.segments, s)
			continue
		}
		asRequest.WriteString("wildcard")
		forMux.WriteString(s)
		if s == "{$}" && last {
			continue
		}
		name := strings.TrimSuffix(strings.TrimPrefix(s, "{"), "}")
		if rest, ok := strings.CutSuffix(name, "..."); ok {
			name, p.subtree = rest, true
		} else {
			p.segments = append(p.segments, anySegment)
		}
		p.wildcards = append(p.wildcards, name)
	}
	if _, _, _, ok := judgePath(nil, asRequest.String()); !ok {
		return nil, errors.New("no request can match the path: requests with //, dot segments, backslashes, semicolons or control characters are refused before")
	}
	if err := register(http.NewServeMux(), forMux.String()); err != nil {
		_, reason, _ := strings.Cut(err.Error(), ": ") // what comes first is the pattern as we wrote it
		return nil, fmt.Errorf("the path is no pattern: %s", reason)
	}
	if len(p.wildcards) > maxWildcards {
		return nil, fmt.Errorf("the path has %d wildcards, at most %d are possible", len(p.wildcards), maxWildcards)
	}
	return p, nil
}

// text returns the pattern for ServeMux to compare with others, with all below it or without.
func (p *pattern) text(subtree bool) string {
	var b strings.Builder
	if p.rule.Method != "" {
		b.WriteString(p.rule.Method + " ")
	}
	b.WriteString(p.host)
	wildcards := p.wildcards
	for _, s := range p.segments {
		b.WriteByte('/')
		if s == anySegment {
			b.WriteString("{" + wildcards[0] + "}")
			wildcards = wildcards[1:]
		} else {
			b.WriteString(escapeLiteral(s))
		}
	}
	switch {
	case subtree:
		b.WriteByte('/')
	case len(p.segments) == 0:
		b.WriteString("/{$}")
	}
	return b.String()
}

// same is equal for patterns that cover the same requests.
func (p *pattern) same(subtree bool) string {
	return fmt.Sprintf("%q %q %q %t", p.rule.Method, p.host, p.segments, subtree)
}

func (p *pattern) conflict(other *pattern, why string) error {
	return fmt.Errorf("routes[%d] %q and routes[%d] %q: %s", p.index, p.rule, other.index, other.rule, why)
}

// conflictAmong finds out which of the patterns p conflicts with; ServeMux says so only in prose.
func (p *pattern) conflictAmong(patterns []*pattern, subtree bool) error {
	for _, other := range patterns {
		pair := http.NewServeMux()
		if other == p || register(pair, other.text(other.subtree)) != nil {
			continue
		}
		if err := register(pair, p.text(subtree)); err != nil {
			_, why, _ := strings.Cut(err.Error(), "\n") // the first line names lines of this file
			why, _, _ = strings.Cut(why, "\n")
			return p.conflict(other, "neither is more specific; "+strings.TrimSuffix(why, "."))
		}
	}
	panic("authz: ServeMux found a conflict among patterns of which no two conflict")
}

// register gives a pattern to mux, which panics to say what is wrong with it.
func register(mux *http.ServeMux, pattern string) (err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("%v", fault)
		}
	}()
	mux.Handle(pattern, http.NotFoundHandler())
	return nil
}

// escapeLiteral writes a literal so that judgePath and ServeMux read it as what it is.
func escapeLiteral(literal string) string {
	var b strings.Builder
	for i := range len(literal) {
		if c := literal[i]; c == ' ' || c >= 0x80 {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
