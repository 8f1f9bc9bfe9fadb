package envoytest

import "syscall"

// ownGroup keeps Ctrl-C in a terminal from Envoy, which is stopped in its turn, and has the kernel kill
// it when this program is gone, however that came.
func ownGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
