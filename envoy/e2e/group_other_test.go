//go:build !linux

package e2e_test

import "syscall"

// ownGroup keeps Ctrl-C in a terminal from keyward, which is stopped in its turn.
func ownGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
