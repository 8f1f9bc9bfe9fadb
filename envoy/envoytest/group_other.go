//go:build !linux

package envoytest

import "syscall"

// ownGroup keeps Ctrl-C in a terminal from Envoy, which is stopped in its turn.
func ownGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
