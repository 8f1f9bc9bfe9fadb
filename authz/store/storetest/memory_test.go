package storetest

import (
	"testing"

	"keyward/authz/admin"
)

func TestMemory(t *testing.T) {
	Run(t, func(*testing.T) admin.Store { return NewMemory() })
}
