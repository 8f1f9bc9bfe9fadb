package e2e_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"keyward/authz/admin"
)

func TestDrain(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	home := s.instance(t, admin.PolicyInput{})
	k := s.key(t, home, admin.KeyInput{})
	conn, err := grpc.NewClient(s.check, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	health := func() healthpb.HealthCheckResponse_ServingStatus {
		answer, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil {
			return healthpb.HealthCheckResponse_UNKNOWN
		}
		return answer.Status
	}
	page := func(name string) int { // 0: no answer
		code, _, _ := fetch("http://" + s.metrics + "/" + name)
		return code
	}
	if got := health(); got != healthpb.HealthCheckResponse_SERVING || page("healthz") != 200 || page("readyz") != 200 {
		t.Fatalf("got health %v before the drain", got)
	}

	// Running: a request that the upstream takes its time for, and a call of the Management API whose second
	// half has not been sent yet.
	slow := make(chan answer, 1)
	go func() {
		c := f.caller(t)
		a, err := c.once(requestText("GET", "/any", withKey(k.secret), delayHeader+": 8s", caseHeader+": slow"))
		if err != nil {
			t.Error(err)
		}
		slow <- a
	}()
	waitFor(t, "the slow request", func() bool { return len(f.up.of("slow")) == 1 })
	token, err := os.ReadFile(s.path("admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	half, err := net.Dial("tcp", s.manage)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = half.Close() }()
	body := `{"name": "made while draining"}`
	if _, err := fmt.Fprintf(half, "POST /instances/%s/apiKeys HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n",
		home, s.manage, strings.TrimSpace(string(token)), len(body)); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(half)
	if interim, err := in.ReadString('\n'); err != nil || !strings.Contains(interim, "100") { // the server wants the body: it is at it
		t.Fatalf("got %q, %v", interim, err)
	}
	if _, err := in.ReadString('\n'); err != nil {
		t.Fatal(err)
	}

	// For 2 s everything is answered, so that Envoy's health checks see it too. What a busy machine asks too late
	// proves nothing.
	begin := time.Now()
	inTime := func() bool { return time.Since(begin) < 1900*time.Millisecond }
	s.process.signal(t, syscall.SIGTERM)
	waitFor(t, "NOT_SERVING", func() bool {
		got := health()
		if got == healthpb.HealthCheckResponse_UNKNOWN && inTime() {
			t.Fatal("gone without having said that it would go")
		}
		return got == healthpb.HealthCheckResponse_NOT_SERVING || !inTime()
	})
	if (page("readyz") != http.StatusServiceUnavailable || page("healthz") != http.StatusOK) && inTime() {
		t.Error("want neither ready nor dead while draining")
	}
	asked, err := authv3.NewAuthorizationClient(conn).Check(t.Context(), checkOf(k.secret))
	if (err != nil || asked.GetOkResponse() == nil) && inTime() {
		t.Errorf("while draining: got %v, %v, want the key accepted", asked, err)
	}

	waitFor(t, "the listeners to go", func() bool {
		conn, err := net.Dial("tcp", s.manage)
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	})
	if _, err := io.WriteString(half, body); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatalf("a running call was cut: %v", err)
	}
	if res.StatusCode != http.StatusCreated {
		t.Errorf("a running call: got %s, want 201", res.Status)
	}
	_ = half.Close()
	if err := s.process.wait(t); err != nil {
		t.Errorf("got %v, want exit code 0", err)
	}
	if log := s.log(); !strings.Contains(log, `"msg":"draining"`) || !strings.Contains(log, `"msg":"stopped"`) {
		t.Error("the log does not say that it drained and stopped")
	}
	(<-slow).want(t, http.StatusOK, "a request that was let through before")

	// What was made while draining is there afterwards.
	s.restart(t)
	found := false
	for k, err := range s.client.Keys(t.Context(), home) {
		if err != nil {
			t.Fatal(err)
		}
		found = found || k.Name == "made while draining"
	}
	if !found {
		t.Error("a key whose creation was acknowledged is not there")
	}
	s.process.signal(t, syscall.SIGTERM)
	waitFor(t, "the drain", func() bool { return strings.Count(s.log(), `"msg":"draining"`) == 2 })
	waitFor(t, "an end at once", func() bool {
		s.process.signal(t, syscall.SIGTERM) // and again: until the first was taken up, two are one
		select {
		case <-s.process.done:
			return true
		default:
			return false
		}
	})
	bad, ok := errors.AsType[*exec.ExitError](s.process.err)
	if !ok || bad.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
		t.Errorf("got %v, want an end by the second SIGTERM", s.process.err)
	}
}

// checkOf is what Envoy asks about a request with this key.
func checkOf(secret string) *authv3.CheckRequest {
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source: &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
			SocketAddress: &corev3.SocketAddress{Address: "127.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 4711}},
		}}},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Method: "GET", Host: "app.test", Path: "/any", Headers: map[string]string{"x-api-key": secret},
		}},
	}}
}

func TestDirectCallersGetNoAllowance(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	conn, err := grpc.NewClient(s.check, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	client := authv3.NewAuthorizationClient(conn)
	for name, tt := range map[string]struct {
		request *authv3.CheckRequest
		want    codes.Code
	}{
		"without attributes":   {&authv3.CheckRequest{}, codes.InvalidArgument},
		"for a TCP connection": {&authv3.CheckRequest{Attributes: &authv3.AttributeContext{}}, codes.Unimplemented},
	} {
		if answer, err := client.Check(t.Context(), tt.request); status.Code(err) != tt.want {
			t.Errorf("%s: got %v, %v, want %v", name, answer, err, tt.want)
		}
	}
}

func TestReload(t *testing.T) {
	t.Parallel()
	s := serve(t, config{yaml: routes})
	f := s.front(t, frontConfig{})
	f.awaitHealthy(t)
	k := s.key(t, s.instance(t, admin.PolicyInput{}), admin.KeyInput{Scopes: []string{"orders:read"}})
	c := f.caller(t)
	hangUp := func(more, says string) {
		t.Helper()
		before := strings.Count(s.log(), says)
		s.configure(t, more)
		s.process.signal(t, syscall.SIGHUP)
		waitFor(t, says, func() bool { return strings.Count(s.log(), says) == before+1 })
	}
	const taken, notTaken = `"msg":"configuration reloaded"`, `"msg":"the new configuration was not taken; the old one stays in force"`

	c.get("/later/a").want(t, http.StatusUnauthorized, "before")
	c.get("/orders", withKey(k.secret)).want(t, http.StatusOK, "before")
	changed := strings.Replace(routes, "/public/", "/later/", 1)
	changed = strings.Replace(changed, `scopes: "orders:read"`, `scopes: "orders:list"`, 1)
	hangUp(changed, taken)
	after := func(when string) {
		t.Helper()
		c.get("/later/a").want(t, http.StatusOK, when)
		c.get("/public/a").want(t, http.StatusUnauthorized, when)
		c.get("/orders", withKey(k.secret)).want(t, http.StatusForbidden, when)
		c.get("/any", withKey(k.secret)).want(t, http.StatusOK, when)
	}
	after("reloaded")
	for _, broken := range []string{
		"routes:\n- {path: /, mode: public}\nno_such_field: 1\n",     // an unknown field
		"routes:\n- {path: /, mode: public}\n- {path: '/{x...}'}\n",  // two rules of equal rank
		"routes:\n- {path: /, mode: public\n",                        // no YAML
		"routes:\n- {path: /, mode: public}\ndefaultRoute: whatever", // a wrong word
	} {
		hangUp(broken, notTaken)
		after(fmt.Sprintf("after %q", broken))
	}
	hangUp(routes, taken)
	c.get("/public/a").want(t, http.StatusOK, "as at the beginning")
	c.get("/later/a").want(t, http.StatusUnauthorized, "as at the beginning")
	c.get("/orders", withKey(k.secret)).want(t, http.StatusOK, "as at the beginning")
}
