// Keyward gives an Envoy ingress or mesh API keys: it issues, checks, limits and ends them.
package main

import (
	"context"
	"os"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
