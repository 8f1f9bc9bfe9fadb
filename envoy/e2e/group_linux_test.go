package e2e_test

import "syscall"

// ownGroup keeps Ctrl-C in a terminal from keyward, which is stopped in its turn, and has the kernel kill
// it when the tests are gone, however that came.
func ownGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
