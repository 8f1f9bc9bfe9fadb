package main

import (
	"context"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
	"keyward/authz/manage"
)

var (
	schemathesisTime = flag.Duration("schemathesis", 40*time.Second, "how long TestSchemathesis asks")
	schemathesisSeed = flag.Uint64("schemathesisseed", 0, "seed of TestSchemathesis; 0: a random one, which is logged")
)

// TestSchemathesis has schemathesis make requests of the OpenAPI document and send them to a running
// server: none is answered with a fault of the server's, and none with what is not documented.
func TestSchemathesis(t *testing.T) {
	t.Parallel()
	program, err := filepath.Abs(filepath.Join("..", "..", ".tools", "schemathesis", "bin", "schemathesis"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(filepath.Dir(program)), ".complete")); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("%v: run make schemathesis", err)
		}
		t.Skip("there is no schemathesis in .tools: run make schemathesis, which needs Python 3 with venv and pip")
	}
	dir, at := t.TempDir(), newPorts()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("testdata", "schemathesis"))); err != nil {
		t.Fatal(err)
	}
	server, token := fresh(t, dir, at)
	client := manage.NewClient("http://"+at.manage, token, nil)
	for _, id := range []string{"demo", "other"} {
		unbounded := admin.PolicyInput{Caps: admin.CapsInput{Instance: new(-1)}, Creation: admin.CreationInput{PerHour: new(-1)}}
		if _, err := client.PutInstance(t.Context(), id, unbounded); err != nil {
			t.Fatal(err)
		}
		if _, err := client.CreateKey(t.Context(), id, admin.KeyInput{Name: "asked about"}); err != nil {
			t.Fatal(err)
		}
	}
	// The first one of these ends the token that the server made.
	var tokens [2]apikey.Secret
	for i := range tokens {
		made, err := client.CreateToken(t.Context(), admin.TokenInput{Name: "schemathesis", Role: admin.RoleOwner})
		if err != nil {
			t.Fatal(err)
		}
		tokens[i] = made.Secret
		client = manage.NewClient("http://"+at.manage, made.Secret, nil)
	}
	codes, err := filepath.Abs(filepath.Join("..", "..", "docs", "error-codes.md"))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(token apikey.Secret, lasting time.Duration, args ...string) {
		// Its own time is about asking; it begins with a plan, and ends with a report.
		ctx, cancel := context.WithTimeout(t.Context(), lasting+2*patience)
		defer cancel()
		args = append([]string{
			"--config-file", "schemathesis.toml", "run", "--max-time", strconv.Itoa(int(lasting.Seconds())), "--continue-on-failure",
			"--suppress-health-check", "all", "--request-timeout", strconv.Itoa(int(patience.Seconds())), "--no-color",
		}, args...)
		if *schemathesisSeed != 0 {
			args = append(args, "--seed", strconv.FormatUint(*schemathesisSeed, 10))
		}
		c := exec.CommandContext(ctx, program, append(args, "http://"+at.manage+"/openapi.json")...)
		c.Dir = dir
		c.Env = programEnv("HOME="+dir, "PYTHONDONTWRITEBYTECODE=1", "KEYWARD_SERVER=http://"+at.manage,
			"KEYWARD_TOKEN="+token.Reveal(), "KEYWARD_ERROR_CODES="+codes)
		said, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s\n%s", err, said, server.says())
		}
		cases := regexp.MustCompile(`(\d+) generated`).FindSubmatch(said)
		if cases == nil || len(cases[1]) < 2 {
			t.Fatalf("too little was asked:\n%s", said)
		}
		t.Logf("%s cases; %s", cases[1], regexp.MustCompile(`Seed: \d+`).Find(said))
	}
	// With tokens it would find its own, and revoke it: those come last.
	ask(tokens[0], *schemathesisTime*4/5, "--exclude-operation-id", "revokeToken")
	if _, err := manage.NewClient("http://"+at.manage, tokens[0], nil).Instances(t.Context()); err != nil {
		t.Fatalf("what was asked with the token proves nothing: %v", err)
	}
	ask(tokens[1], *schemathesisTime/5, "--include-operation-id", "listTokens", "--include-operation-id", "createToken", "--include-operation-id", "revokeToken")
	if said := server.says(); strings.Contains(said, "panic") {
		t.Errorf("the server says:\n%s", said)
	}
}

// fresh starts a server on a new store in a folder, and returns it with its first management token.
func fresh(t *testing.T, dir string, at ports) (*process, apikey.Secret) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "keyward.yaml"), []byte(smallest), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeNewPrivate(filepath.Join(dir, "pepper"), apikey.MarshalPepper(apikey.NewPepper(1, false))); err != nil {
		t.Fatal(err)
	}
	server, err := serve(dir, at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.kill)
	token, err := os.ReadFile(filepath.Join(dir, adminTokenFile))
	if err != nil {
		t.Fatal(err)
	}
	return server, apikey.NewSecret(strings.TrimSpace(string(token)))
}
