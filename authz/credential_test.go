package authz

import (
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"keyward/authz/apikey"
)

// Secrets of the right shape, for inputs that have no room for them: $1 and $2 are two, $b has a wrong
// checksum.
var fuzzSecrets = strings.NewReplacer(
	"$1", "kwi_00000000000000000000000000000000000000000000waICh",
	"$2", "kwu_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopq2k0kIo",
	"$b", "kwi_00000000000000000000000000000000000000000000waICi",
)

var (
	bearerElement = regexp.MustCompile(`(?is)^[ \t]*bearer[ \t]+([^ \t].*?)[ \t]*$`)
	ownedSecret   = regexp.MustCompile(`^kw[iaum]_`)
)

// claims is what DESIGN §2.3 says of a request's credentials, written down a second time: everything
// that claims to be a secret of ours is collected, and only then looked at.
func claims(c *Credentials, r *Request, query string) (want credential) {
	var claimed []string
	claim := func(secret string) { claimed = append(claimed, secret) }
	for _, name := range c.Headers {
		var values []string
		for _, h := range r.Headers {
			if h.Name == name {
				values = append(values, h.Value)
			}
		}
		if len(values) > 1 {
			want.ambiguous = true
		} else if len(values) == 1 {
			value := strings.Trim(values[0], " \t")
			want.ambiguous = want.ambiguous || strings.ContainsAny(value, ", \t")
			if value != "" {
				claim(value)
			}
		}
	}
	if !c.NoBearer {
		var elements []string
		for _, h := range r.Headers {
			if h.Name == "authorization" {
				elements = append(elements, strings.Split(h.Value, ",")...)
			}
		}
		for _, e := range elements {
			if m := bearerElement.FindStringSubmatch(e); m != nil && ownedSecret.MatchString(m[1]) {
				want.inAuthorization = true
				claim(m[1])
			}
		}
		want.ambiguous = want.ambiguous || want.inAuthorization && len(elements) > 1
	}
	if name := c.QueryParameter; name != "" {
		n := 0
		for pair := range strings.SplitSeq(query, "&") {
			key, _, _ := strings.Cut(pair, "=")
			if decoded, err := url.QueryUnescape(key); err != nil || decoded != name {
				continue
			}
			n++
			want.unremovable = want.unremovable || key != name
			values, err := url.ParseQuery(pair)
			want.ambiguous = want.ambiguous || err != nil
			if value := values.Get(name); value != "" {
				claim(value)
			}
		}
		want.inQuery = n > 0
		want.ambiguous = want.ambiguous || n > 1
		want.unremovable = want.unremovable || n > 0 && r.Method == http.MethodConnect
	}
	want.sent = want.ambiguous || len(claimed) > 0
	want.ambiguous = want.ambiguous || len(slices.Compact(slices.Clone(claimed))) > 1
	if !want.ambiguous && want.sent {
		want.secret = claimed[0]
	}
	return want
}

// FuzzFindCredential: whatever headers and query a request has, a secret is taken from it only where
// exactly one is claimed, and every place that it has to be removed from is known. headers are lines of
// name: value.
func FuzzFindCredential(f *testing.F) {
	for _, headers := range []string{
		"", "x-api-key: $1", "x-api-key:", "x-api-key: \t ", "x-api-key: $1\nx-api-key: $1", "x-api-key: $1,$2", "x-api-key: $1 ",
		"x-api-key: $1\nx-agent-access-token: $1", "x-api-key: $1\nx-agent-access-token: $2", "x-api-key: $1\nauthorization: Bearer eyJ.e30.x",
		"authorization: bEaReR $1", "authorization: Bearer\t $1", "authorization: Bearer$1", "authorization: Basic $1", "authorization: Bearer",
		"authorization: Bearer $1, Bearer $2", "authorization: Bearer x, Bearer $1", "authorization: Bearer $1\nauthorization: Basic x",
		"authorization: Bearer $b\nx-api-key: $1", "x-api-key: \xff$1", "cookie: x-api-key=$1",
	} {
		f.Add(headers, "", "GET", uint8(0))
		f.Add(headers, "api_key=$1", "GET", uint8(1))
	}
	for _, query := range []string{"api_key=$1&api_key=$1", "api%5Fkey=$1", "api_key=%zz", "api_key=$1;x", "API_KEY=$1", "api_key"} {
		f.Add("x-api-key: $1", query, "CONNECT", uint8(1))
		f.Add("", query, "GET", uint8(3))
	}
	f.Fuzz(func(t *testing.T, headers, query, method string, how uint8) {
		c := Credentials{Headers: DefaultCredentialHeaders, NoBearer: how&2 != 0}
		if how&1 != 0 {
			c.QueryParameter = "api_key"
		}
		r := Request{Method: method}
		for line := range strings.SplitSeq(fuzzSecrets.Replace(headers), "\n") {
			name, value, _ := strings.Cut(line, ":")
			r.Headers = append(r.Headers, Pair{name, value})
		}
		query = fuzzSecrets.Replace(query)
		got, want := c.find(&r, query), claims(&c, &r, query)
		if got.ambiguous {
			got.secret = "" // it is never looked at
		}
		if got != want {
			t.Fatalf("%q, query %q:\ngot  %+v\nwant %+v", r.Headers, query, got, want)
		}
		if _, bad := shape(apikey.Format{}, got.secret); got.sent && !got.ambiguous && bad == ReasonNone && len(got.secret) != (apikey.Format{}).Len() {
			t.Errorf("%q is taken for a secret", got.secret)
		}
	})
}

// FuzzClientAddress: only the word of the hop that the operator trusts counts, never one from further left.
func FuzzClientAddress(f *testing.F) {
	for _, s := range []string{"10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "010.0.0.1", "a, b,10.0.0.1 ,\t2001:db8::1", "", ",", ",,", "10.0.0.1:80", "[::1]"} {
		f.Add(s, "10.9.9.9", 0)
		f.Add(s+"\n"+s, "not an address", 1)
		f.Add(s+"\n10.1.1.1", "", 3)
	}
	f.Fuzz(func(t *testing.T, forwarded, peer string, hops int) {
		if hops < 0 {
			return // refused at configuration
		}
		r := Request{Peer: peer}
		var all []string
		for value := range strings.SplitSeq(forwarded, "\n") {
			r.Headers = append(r.Headers, Pair{"x-forwarded-for", value})
			elements := strings.Split(value, ",")
			if value == "" || strings.HasPrefix(value, ",") {
				elements = elements[1:] // nothing before the first comma is no element
			}
			all = append(all, elements...)
		}
		word := peer
		if at := len(all) - 1 - hops; hops < len(all) && isAddress(strings.Trim(all[at], " \t")) {
			word = strings.Trim(all[at], " \t")
		}
		want := (&Request{Peer: word}).clientAddr(ClientPeer, 0)
		got := r.clientAddr(ClientXFF, hops)
		if got != want {
			t.Fatalf("%q with %d hops: got %v, want %v", forwarded, hops, got, want)
		}
		if got.Is4In6() || got.Zone() != "" {
			t.Errorf("%v is not in its plain form", got)
		}
	})
}

func isAddress(s string) bool { return (&Request{Peer: s}).clientAddr(ClientPeer, 0).IsValid() }
